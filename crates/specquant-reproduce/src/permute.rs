//! A copy of a model whose MLPs have their hidden units in another order. It computes the same function: whatever depends on the order of a
//! weight's columns, such as a spectrum along them, depends on nothing that the model knows.

use std::fs;
use std::path::Path;

use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use safetensors::tensor::TensorView;
use specquant_model::{Source, StoredTensor};

use crate::{Error, Result};

/// A random order of `n` things.
pub(crate) fn order(n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    order
}

/// Columns of `w: [out, inp]` in another order.
pub(crate) fn columns(w: &[f32], order: &[usize]) -> Vec<f32> {
    w.chunks_exact(order.len()).flat_map(|row| order.iter().map(|&i| row[i])).collect()
}

/// Writes the copy, in f32, as a Hugging Face directory, and opens it.
///
/// # Errors
/// When a tensor cannot be read or the disk refuses.
pub(crate) fn write(source: &Source, dir: &Path, seed: u64) -> Result<Source> {
    remove(dir)?;
    let io = |cause| Error::Io { path: dir.to_owned(), cause };
    fs::create_dir_all(dir).map_err(io)?;
    let mut tensors = Vec::new();
    for name in source.names() {
        let view = source.tensor(name)?;
        let mut values = view.to_f32()?;
        let width = view.shape.last().copied().unwrap_or(1).max(1);
        if name.contains(".mlp.down_proj.") && view.shape.len() == 2 {
            values = columns(&values, &order(width, seed));
        } else if name.contains(".mlp.gate_proj.") || name.contains(".mlp.up_proj.") {
            let row = if view.shape.len() == 2 { width } else { 1 };
            let order = order(values.len() / row, seed);
            values = order.iter().flat_map(|&i| values[i * row..(i + 1) * row].iter().copied()).collect();
        }
        tensors.push(match name.ends_with("norm.weight") {
            true => source.config().norm_tensor(name.to_owned(), &values),
            false => StoredTensor::f32(name.to_owned(), view.shape.clone(), &values),
        });
    }
    let views = tensors.iter().map(|t| {
        let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes);
        view.map(|v| (t.name.as_str(), v)).map_err(|e| io(std::io::Error::other(e)))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    safetensors::serialize_to_file(views, metadata, &dir.join("model.safetensors"))
        .map_err(|e| io(std::io::Error::other(e)))?;
    for (name, bytes) in source.side_files()? {
        fs::write(dir.join(name), bytes).map_err(io)?;
    }
    fs::write(dir.join("config.json"), source.config_json().to_string()).map_err(io)?;
    Ok(Source::open(dir)?)
}

/// Removes a directory, if it is there.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Io { path: dir.to_owned(), cause: e })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use specquant_model::Model;

    use super::*;

    /// Three of the families: one with biases, one with more than one shard, one whose norms are stored less 1.
    #[test]
    fn the_copy_computes_the_same_from_other_weights() {
        for name in ["llama-sharded", "qwen2", "gemma3"] {
            let tiny =
                if name == "gemma3" { "../specquant-model/tests" } else { "../../../shared/golden/tiny" };
            let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join(tiny).join(name);
            let source = Source::open(&tiny).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let copy = write(&source, &dir.path().join("copy"), 7).unwrap();
            let logits = |source: &Source| {
                let model = Model::load(source).unwrap();
                let mut sequence = model.sequence();
                let ids: Vec<u32> = (0..40).map(|i| i * 7 % model.config.vocab_size as u32).collect();
                model.next_logits(&mut [(&mut sequence, &ids[..])]).unwrap()
            };
            let (want, got) = (logits(&source), logits(&copy));
            let most = want.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            for (w, g) in want.iter().zip(&got) {
                assert!((w - g).abs() < 1e-4 * most, "{name}: {g} instead of {w}");
            }
            let down = |source: &Source| {
                source.tensor("model.layers.0.mlp.down_proj.weight").unwrap().to_f32().unwrap()
            };
            assert_ne!(down(&source), down(&copy));
        }
    }
}
