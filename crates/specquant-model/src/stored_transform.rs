//! What lies on disk for the input of a site: its transform and its clip ratio.

use half::f16;
use specquant_kernels::{Kronecker, Reflections};

use crate::checkpoint::StoredTensor;
use crate::stored_linear::Reader;
use crate::{
    Dtype, InputRotation, InputTransform, KeyTransform, QuantizationConfig, Result, RotationKind, Site,
    Source,
};

/// The matrix of a learned transform as the disk will hold it, so that weights get the inverse of what the engine will multiply by.
pub fn storable_matrix(matrix: Vec<f32>) -> Vec<f32> {
    matrix.into_iter().map(|v| f16::from_f32(v).to_f32()).collect()
}

/// A tensor of a matrix that [`storable_matrix`] has rounded.
fn square_tensor(name: String, matrix: &[f32]) -> StoredTensor {
    let half: Vec<f16> = matrix.iter().map(|&v| f16::from_f32(v)).collect();
    StoredTensor::f16(name, vec![matrix.len().isqrt(); 2], &half)
}

/// The tensors of a site's transform, whose reflections have vectors of whole numbers up to 127, and whose matrices f16 holds: none where it keeps
/// nothing and has no matrix.
pub fn transform_tensors(transform: &InputTransform, prefix: &str, site: Site) -> Vec<StoredTensor> {
    let name = |suffix: &str| format!("{prefix}.{}.{suffix}", site.name());
    if let Some(kronecker) = transform.as_kronecker() {
        let factors = [("kronecker_left", kronecker.left()), ("kronecker_right", kronecker.right())];
        let stored = factors.into_iter().filter(|(_, matrix)| !matrix.is_empty());
        return stored.map(|(suffix, matrix)| square_tensor(name(suffix), matrix)).collect();
    }
    let reflections = transform.reflections();
    if reflections.is_empty() {
        return Vec::new();
    }
    let vectors = StoredTensor {
        name: name("reflections"),
        dtype: safetensors::Dtype::I8,
        shape: vec![reflections.len(), reflections.width()],
        bytes: reflections.vectors().into_iter().map(|v| v as i8 as u8).collect(),
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
    let rotation = quant.and_then(|q| q.input_rotation);
    let (kronecker, reflections) = (&["kronecker_left", "kronecker_right"][..], &["reflections"][..]);
    let (foreign, kind) = match rotation {
        Some(InputRotation::Kronecker) => (reflections, None),
        Some(InputRotation::Hadamard) => (kronecker, Some(RotationKind::Hadamard)),
        Some(InputRotation::Dct) => (kronecker, Some(RotationKind::Dct)),
        None => (&["reflections", "kronecker_left", "kronecker_right"][..], None),
    };
    // A transform that nothing declares would be left out without a word.
    if let Some(suffix) = foreign.iter().find(|suffix| source.has(&reader.name(suffix))) {
        let named = if rotation.is_some() { "another" } else { "no" };
        return Err(reader.fail(suffix, format!("is there, but config.json names {named} input_rotation")));
    }
    let Some(kind) = kind else {
        return rotation.map(|_| read_kronecker(&reader, n)).transpose();
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

/// The matrix `suffix`, `[w, w]`; empty if there is none.
fn read_square(reader: &Reader, suffix: &str) -> Result<Vec<f32>> {
    if !reader.source.has(&reader.name(suffix)) {
        return Ok(Vec::new());
    }
    let view = reader.tensor(suffix)?;
    let width = view.shape.first().copied().unwrap_or(0);
    reader.expect(&view, suffix, Dtype::F16, &[width, width])?;
    match width {
        0 => Err(reader.fail(suffix, "is empty".to_owned())),
        _ => view.to_f32(),
    }
}

/// A learned transform of `n` values.
fn read_kronecker(reader: &Reader, n: usize) -> Result<InputTransform> {
    let (left, right) = (read_square(reader, "kronecker_left")?, read_square(reader, "kronecker_right")?);
    let [n1, n2] = [&left, &right].map(|matrix| matrix.len().isqrt());
    let fits = match (n1, n2) {
        (0, 0) => false,
        (0, width) | (width, 0) => n.is_multiple_of(width),
        _ => n1.checked_mul(n2) == Some(n),
    };
    if !fits {
        let why = format!("and kronecker_right have {n1} and {n2} rows, which do not make {n}");
        return Err(reader.fail("kronecker_left", why));
    }
    InputTransform::kronecker(Kronecker::new(n, left, right))
        .ok_or_else(|| reader.fail("kronecker_left", "or kronecker_right is singular".to_owned()))
}

/// The tensor of a learned transform of keys, for `prefix` such as `model.layers.0`.
pub fn key_transform_tensor(transform: &KeyTransform, prefix: &str) -> StoredTensor {
    square_tensor(format!("{prefix}.self_attn.k_transform"), transform.matrix())
}

/// The learned transform of a block's keys, if it has one.
pub(crate) fn read_key_transform(
    source: &Source,
    quant: Option<&QuantizationConfig>,
    prefix: &str,
    head_dim: usize,
) -> Result<Option<KeyTransform>> {
    let prefix = format!("{prefix}.self_attn");
    let reader = Reader { source, prefix: &prefix };
    let matrix = read_square(&reader, "k_transform")?;
    if matrix.is_empty() {
        return Ok(None);
    }
    let fail = |why: String| Err(reader.fail("k_transform", why));
    if quant.and_then(|q| q.input_rotation) != Some(InputRotation::Kronecker) {
        return fail("is there, but config.json does not name the input_rotation kronecker".to_owned());
    }
    if matrix.len() != head_dim * head_dim {
        return fail(format!("has {} rows, where heads have {head_dim} values", matrix.len().isqrt()));
    }
    match KeyTransform::new(matrix, head_dim) {
        Some(transform) => Ok(Some(transform)),
        None => fail("is singular".to_owned()),
    }
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
