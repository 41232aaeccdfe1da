//! Single bits of checkpoints are turned over: `verify` names the file, and without the checksums the checkpoint is refused or gives finite logits. Where the
//! bit is in no file that the model is read from, they are the logits that they were.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a find ends the test")]

use std::path::Path;

use specquant_fuzz::{split, target, write};
use specquant_model::{CHECKSUMS, Model, Source, checksums, verify};

/// Of the bits of headers and of JSON, every so many are turned, and of the numbers in tensors so many times fewer; primes. `SPECQUANT_BITS` in the place of the first
/// one: 1 turns every bit of the headers.
const EVERY: usize = 499;
const TENSORS: usize = 11;

fn logits(dir: &Path) -> Result<Vec<f32>, Box<dyn std::error::Error>> {
    let source = Source::open(dir)?;
    let model = Model::load(&source)?;
    let mut sequence = model.sequence();
    Ok(model.next_logits(&mut [(&mut sequence, &[1, 5, 9])])?.to_vec())
}

/// Bytes of the length and the header of a safetensors file; all of another one.
fn header(name: &str, bytes: &[u8]) -> usize {
    match bytes.first_chunk::<8>() {
        Some(length) if name.ends_with(".safetensors") => 8 + u64::from_le_bytes(*length) as usize,
        _ => bytes.len(),
    }
}

#[test]
fn a_turned_bit_is_named_and_refused_or_harmless() {
    let every = std::env::var("SPECQUANT_BITS").map_or(EVERY, |n| n.parse().unwrap());
    let (mut turned, mut refused, mut same) = (0, 0, 0);
    for seed in (target("checkpoint").unwrap().seeds)() {
        let dir = tempfile::tempdir().unwrap();
        let files = split(seed);
        write(dir.path(), &files).unwrap();
        let sums = checksums(dir.path(), &Default::default()).unwrap();
        std::fs::write(dir.path().join(CHECKSUMS), sums).unwrap();
        assert!(verify(dir.path()).unwrap().is_empty());
        let before = logits(dir.path()).unwrap();
        for (name, bytes) in &files {
            let path = dir.path().join(name);
            let head = 8 * header(name, bytes);
            let bits = (0..head).step_by(every).chain((head..8 * bytes.len()).step_by(every * TENSORS));
            for bit in bits {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                std::fs::write(&path, damaged).unwrap();
                let what = format!("bit {bit} of {name}");
                // A damaged config.json may make it something else than a model, which is an error of its own.
                match verify(dir.path()) {
                    Ok(problems) => {
                        let named = |p: &str| p.contains(name.as_str()) && p.contains("SHA-256");
                        assert!(problems.iter().any(named), "{what}: {problems:?}");
                    }
                    Err(e) => assert!(e.to_string().contains("config.json"), "{what}: {e}"),
                }
                match logits(dir.path()) {
                    Ok(after) => {
                        assert!(after.iter().all(|v| v.is_finite()), "{what}");
                        let is_same = after == before;
                        let read = name.ends_with(".safetensors")
                            || name.contains("config")
                            || name.contains("index");
                        assert!(is_same || read, "{what} changes the logits");
                        same += usize::from(is_same);
                    }
                    Err(e) => {
                        assert!(!e.to_string().trim().is_empty(), "{what}");
                        refused += 1;
                    }
                }
                turned += 1;
            }
            std::fs::write(&path, bytes).unwrap();
        }
    }
    println!(
        "{turned} bits: {refused} refused, {same} without effect, {} other logits",
        turned - refused - same
    );
    assert!(refused > 0 && same > 0 && turned > refused + same);
}
