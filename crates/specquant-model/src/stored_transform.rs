//! What lies on disk for the input of a site: its transform and its clip ratio.

use specquant_kernels::Reflections;

use crate::checkpoint::StoredTensor;
use crate::stored_linear::Reader;
use crate::{Dtype, InputTransform, QuantizationConfig, Result, Site, Source};

/// The tensors of a site's transform, whose reflections have vectors of whole numbers up to 127: none where it keeps nothing.
pub fn transform_tensors(transform: &InputTransform, prefix: &str, site: Site) -> Vec<StoredTensor> {
    let reflections = transform.reflections();
    if reflections.is_empty() {
        return Vec::new();
    }
    let name = |suffix: &str| format!("{prefix}.{}.{suffix}", site.name());
    let vectors = StoredTensor {
        name: name("reflections"),
        dtype: safetensors::Dtype::I8,
        shape: vec![reflections.len(), reflections.width()],
        bytes: reflections.vectors().iter().map(|&v| v as i8 as u8).collect(),
    };
    vec![vectors, StoredTensor::f32(name("kept_norm"), vec![transform.kept()], transform.norms())]
}

/// The transform of a site's input, `n` wide; none where the checkpoint has none.
pub(crate) fn read_transform(
    source: &Source,
    quant: Option<&QuantizationConfig>,
    prefix: &str,
    site: Site,
    n: usize,
) -> Result<Option<InputTransform>> {
    let prefix = format!("{prefix}.{}", site.name());
    let reader = Reader { source, prefix: &prefix };
    let Some(kind) = quant.and_then(|q| q.input_rotation) else {
        return match source.has(&reader.name("reflections")) {
            true => {
                Err(reader
                    .fail("reflections", "is there, but config.json names no input_rotation".to_owned()))
            }
            false => Ok(None),
        };
    };
    let (mut vectors, mut norms) = (Vec::new(), Vec::new());
    if source.has(&reader.name("reflections")) {
        let view = reader.tensor("reflections")?;
        let r = view.shape.first().copied().unwrap_or(0);
        reader.expect(&view, "reflections", Dtype::I8, &[r, n])?;
        if r >= n {
            return Err(reader.fail("reflections", format!("keeps {r} of {n} coordinates")));
        }
        vectors = view.bytes().iter().map(|&b| f32::from(b as i8)).collect();
        let view = reader.tensor("kept_norm")?;
        reader.expect(&view, "kept_norm", Dtype::F32, &[r])?;
        norms = view.to_f32()?;
        if let Some(i) = norms.iter().position(|norm| *norm <= 0.0) {
            return Err(
                reader.fail("kept_norm", format!("holds {} at {i}, where norms are positive", norms[i]))
            );
        }
    }
    Ok(Some(InputTransform::new(Reflections::new(n, vectors), norms, kind)))
}

/// The tensor of a site's own clip ratio of activations.
pub fn act_clip_tensor(clip: f32, prefix: &str, site: Site) -> StoredTensor {
    StoredTensor::f32(format!("{prefix}.{}.act_clip", site.name()), vec![1], &[clip])
}

/// A site's own clip ratio of activations, if it has one.
pub(crate) fn read_act_clip(source: &Source, prefix: &str, site: Site) -> Result<Option<f32>> {
    let prefix = format!("{prefix}.{}", site.name());
    let reader = Reader { source, prefix: &prefix };
    if !source.has(&reader.name("act_clip")) {
        return Ok(None);
    }
    let view = reader.tensor("act_clip")?;
    reader.expect(&view, "act_clip", Dtype::F32, &[1])?;
    match view.to_f32()?.first() {
        Some(&clip) if clip > 0.0 && clip <= 1.0 => Ok(Some(clip)),
        other => Err(reader.fail("act_clip", format!("is {other:?}, where a clip ratio lies in (0, 1]"))),
    }
}
