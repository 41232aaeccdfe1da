//! How long a model takes with more and more bins in its branches, beside the same model in full precision.

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use specquant_model::{Model, Source, Truncation};

use crate::Result;

/// Tokens of a prompt.
pub const PROMPT: usize = 512;
/// Tokens generated after it.
pub const GENERATED: usize = 32;
/// Every model is timed so often, taking turns; the best counts, as others use the machine too.
pub(crate) const ROUNDS: usize = 5;

/// Of one model, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Of [`PROMPT`] tokens at once.
    pub prefill: f64,
    /// Of [`GENERATED`] tokens, one after another.
    pub decode: f64,
}

/// All of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// In full precision, f32.
    pub dense: Speed,
    /// With so many bins in every channel's branch.
    pub by_k: Vec<(usize, Speed)>,
    /// The processor.
    pub cpu: String,
    /// Worker threads.
    pub threads: usize,
}

/// Worker threads of this process.
pub(crate) fn threads() -> usize {
    rayon::current_num_threads()
}

/// The processor, as the system names it, or its architecture.
pub(crate) fn cpu() -> String {
    specquant_kernels::cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

impl Latency {
    /// # Errors
    /// When a model cannot be loaded or run.
    pub(crate) fn measure(source: &Source, checkpoint: &Path, ks: &[usize], ids: &[u32]) -> Result<Latency> {
        let mut models = vec![Model::load_for_decoding(source)?];
        for &k in ks {
            let mut source = Source::open(checkpoint)?;
            source.truncate_branches(Truncation::Items(k))?;
            models.push(Model::load_for_decoding(&source)?);
        }
        let worst = Speed { prefill: f64::INFINITY, decode: f64::INFINITY };
        let mut best = vec![worst; models.len()];
        // The first round warms up.
        for round in 0..=ROUNDS {
            for (i, model) in models.iter().enumerate() {
                let mut sequence = model.sequence();
                let started = Instant::now();
                model.next_logits(&mut [(&mut sequence, &ids[..PROMPT.min(ids.len())])])?;
                let prefill = started.elapsed().as_secs_f64();
                let started = Instant::now();
                for id in ids.iter().take(GENERATED) {
                    model.next_logits(&mut [(&mut sequence, std::slice::from_ref(id))])?;
                }
                let decode = started.elapsed().as_secs_f64();
                if round > 0 {
                    best[i].prefill = best[i].prefill.min(prefill);
                    best[i].decode = best[i].decode.min(decode);
                }
            }
        }
        Ok(Latency {
            dense: best[0],
            by_k: ks.iter().copied().zip(best[1..].iter().copied()).collect(),
            cpu: cpu(),
            threads: threads(),
        })
    }
}
