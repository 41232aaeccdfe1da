//! Whole models: prompts, and decoding of one sequence and of several.

use serde::Serialize;
use specquant_model::{Model, Result, Sequence, Source};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::Settings;

/// Lengths of prompts.
const PROMPTS: [usize; 2] = [512, 2048];
/// Sequences that are decoded side by side.
const BATCHES: [usize; 3] = [1, 8, 32];
/// Tokens before decoding begins, and tokens decoded.
const BEFORE: usize = 128;
const DECODED: usize = 32;

/// One model.
#[derive(Debug, Clone, Serialize)]
pub struct ModelRow {
    /// Where it lies.
    #[serde(serialize_with = "file_name")]
    pub path: PathBuf,
    /// Its scheme, or f32.
    pub scheme: String,
    /// Seconds from opening to the first token of a one-token prompt.
    pub load_seconds: f64,
    /// Prompt length and tokens a second.
    pub prefill: Vec<(usize, f64)>,
    /// Sequences and tokens a second, of all together.
    pub decode: Vec<(usize, f64)>,
}

/// A result says which model it is of, not where that lies on somebody's machine.
fn file_name<S: serde::Serializer>(path: &Path, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_str(&path.file_name().unwrap_or(path.as_os_str()).to_string_lossy())
}

pub(crate) fn measure(path: &Path, settings: &Settings) -> Result<ModelRow> {
    let started = Instant::now();
    let source = Source::open(path)?;
    let mut model = Model::load_for_decoding(&source)?;
    model.set_any_order(true);
    model.next_logits(&mut [(&mut model.sequence(), &[1])])?;
    let load_seconds = started.elapsed().as_secs_f64();
    let longest = model.config.max_position_embeddings;
    let ids: Vec<u32> =
        (0..PROMPTS[1] as u32).map(|i| (i * 7919 + 13) % model.config.vocab_size as u32).collect();
    let mut prefill = Vec::new();
    for length in PROMPTS.into_iter().filter(|n| *n <= longest) {
        let prompt = &ids[..length];
        let least = least(settings.seconds, || {
            let mut sequence = model.sequence();
            let started = Instant::now();
            model.next_logits(&mut [(&mut sequence, prompt)])?;
            Ok(started.elapsed().as_secs_f64())
        })?;
        prefill.push((length, length as f64 / least));
    }
    let mut decode = Vec::new();
    for batch in BATCHES {
        let mut sequences: Vec<Sequence> = (0..batch).map(|_| model.sequence()).collect();
        for (i, sequence) in sequences.iter_mut().enumerate() {
            model.next_logits(&mut [(sequence, &ids[i..(i + BEFORE).min(longest.max(i + 1))])])?;
        }
        let least = least(settings.seconds, || {
            sequences.iter_mut().for_each(|s| s.truncate(BEFORE));
            let started = Instant::now();
            for step in 0..DECODED {
                let mut entries: Vec<_> = sequences.iter_mut().map(|s| (s, &ids[step..=step])).collect();
                model.next_logits(&mut entries)?;
            }
            Ok(started.elapsed().as_secs_f64())
        })?;
        decode.push((batch, (batch * DECODED) as f64 / least));
    }
    let scheme = model.quantization.as_ref().map_or("f32".to_owned(), |q| q.scheme.to_string());
    Ok(ModelRow { path: path.to_owned(), scheme, load_seconds, prefill, decode })
}

/// The least of what calls return, in `seconds` and at least three calls.
fn least(seconds: f64, mut call: impl FnMut() -> Result<f64>) -> Result<f64> {
    let (started, mut least, mut calls) = (Instant::now(), f64::INFINITY, 0);
    while calls < 3 || started.elapsed().as_secs_f64() < seconds {
        least = least.min(call()?);
        calls += 1;
    }
    Ok(least)
}
