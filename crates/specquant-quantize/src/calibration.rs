//! Calibration tokens: from a file, or written by the model itself.

use std::path::Path;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;
use specquant_kernels::KvFormat;
use specquant_model::{Model, Sampler, Sampling, Sequence, Tokenizer, read_first_text};

use crate::recipe::Calibration;
use crate::{Error, Result};

/// Sequences that the model writes side by side.
pub(crate) const GENERATION_BATCH: usize = 32;

/// Bytes of a file that are read: some two million tokens, of which a calibration takes a few percent.
const MOST_TEXT: usize = 8 << 20;
/// Bytes of text that become tokens at a time: the library takes more than a hundred for every token until then.
const PIECE: usize = 3 << 19;

/// The calibration text of a file: as [`read_text`](specquant_model::read_text) has it, of a larger one the first 8 MiB.
///
/// # Errors
/// [`Error::Calibration`] when the file is unreadable or has no text.
pub fn read(path: &Path) -> Result<String> {
    read_first_text(path, MOST_TEXT).map_err(|why| Error::Calibration { path: path.to_owned(), why })
}

/// Parts of a text of about so many bytes, which end with a line where one ends.
fn pieces(mut text: &str, bytes: usize) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let most = (bytes..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
        let end = if most < text.len() { text[..most].rfind('\n').map_or(most, |at| at + 1) } else { most };
        let (piece, rest) = text.split_at(end);
        text = rest;
        Some(piece).filter(|piece| !piece.is_empty())
    })
}

/// Token sequences of `calibration.sequence_length` from a file that [`read`] reads, at random places drawn with `seed`. A text that holds fewer gives as many as cover it, and one with fewer tokens than a
/// sequence gives one shorter sequence.
/// Where texts start with a BOS token every sequence does: Gemma's attention rests on it, and a window without it is a third more perplexing.
///
/// # Errors
/// [`Error::Calibration`] when the file is unreadable, has no text, or fewer than two tokens.
pub fn from_file(
    path: &Path,
    tokenizer: &Tokenizer,
    calibration: &Calibration,
    seed: u64,
) -> Result<Vec<Vec<u32>>> {
    let mut ids = Vec::new();
    for piece in pieces(&read(path)?, PIECE) {
        ids.append(&mut tokenizer.encode(piece, false)?);
    }
    if ids.len() < 2 {
        let why = "has no tokens to calibrate on; name a file with a few pages of ordinary text".to_owned();
        return Err(Error::Calibration { path: path.to_owned(), why });
    }
    let bos = tokenizer.first_id();
    let length = calibration.sequence_length.saturating_sub(bos.iter().len()).clamp(1, ids.len());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // No more than cover it: a short text is not made long by reading it again.
    let samples = calibration.samples.min(ids.len().div_ceil(length));
    Ok((0..samples)
        .map(|_| {
            let start = rng.random_range(0..=ids.len() - length);
            bos.iter().chain(&ids[start..start + length]).copied().collect()
        })
        .collect())
}

/// Text that the model writes itself, as in LLM-QAT (arXiv 2305.17888, section 3.1): every sequence starts with a random token, behind
/// `bos` if given ([`Tokenizer::first_id`]), and is sampled at temperature 1. Each has a generator of its own, so that a text does not depend on how
/// many are written.
///
/// model: dropped in the end, for it is large; keys and values are cached in f16.
/// progress: called with the number of finished tokens.
///
/// # Errors
/// When the model cannot be run.
pub fn self_generated(
    mut model: Model,
    bos: Option<u32>,
    calibration: &Calibration,
    seed: u64,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<u32>>> {
    model.set_kv_format(KvFormat::F16);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let vocab = model.config.vocab_size;
    let mut texts: Vec<(Vec<u32>, Sampler)> = (0..calibration.samples)
        .map(|_| {
            let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: rng.random() };
            let text = bos.into_iter().chain([rng.random_range(0..vocab as u32)]);
            (text.collect(), Sampler::new(sampling))
        })
        .collect();
    let mut done = texts.iter().map(|(text, _)| text.len()).sum();
    for batch in texts.chunks_mut(GENERATION_BATCH) {
        let mut sequences: Vec<Sequence> = batch.iter().map(|_| model.sequence()).collect();
        for position in 0..calibration.sequence_length - 1 {
            let feed: Vec<u32> = batch.iter().map(|(text, _)| text[position]).collect();
            let mut entries: Vec<_> = sequences.iter_mut().zip(feed.chunks(1)).collect();
            let logits = model.next_logits(&mut entries)?;
            if position + 1 == batch[0].0.len() {
                let each = batch.par_iter_mut().zip(logits.par_chunks_exact(vocab));
                each.for_each(|((text, sampler), logits)| text.push(sampler.sample(logits)));
                done += batch.len();
            }
            progress(done);
        }
    }
    Ok(texts.into_iter().map(|(text, _)| text).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_with_a_line_and_are_the_text() {
        let found = |text| pieces(text, 6).collect::<Vec<_>>();
        assert_eq!(found("one\ntwo\nthree four\n"), ["one\n", "two\n", "three ", "four\n"]);
        assert_eq!(found("äöüßé"), ["äöü", "ßé"]);
        assert_eq!(found("aäöüß"), ["aäöü", "ß"]);
        assert!(found("").is_empty());
    }
}
