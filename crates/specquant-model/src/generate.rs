//! Sampling, and the loop that feeds samples back.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::{Model, Result, Sequence};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Only the k most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens whose probabilities first reach this sum.
    pub top_p: f32,
    /// Of the generator.
    pub seed: u64,
}

impl Sampling {
    /// The most likely token, always.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
}

/// Draws tokens; equal seeds draw equally on every machine.
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at the start of its stream.
    pub fn new(sampling: Sampling) -> Self {
        Sampler { sampling, rng: ChaCha8Rng::seed_from_u64(sampling.seed) }
    }

    /// Chooses from `logits`, `[vocab]`. Equal logits: the lower id first.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        if temperature <= 0.0 {
            return argmax(logits);
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if top_k > 0 && top_k < order.len() {
            order.select_nth_unstable_by(top_k - 1, by_logit);
            order.truncate(top_k);
        }
        if top_p < 1.0 {
            order.sort_unstable_by(by_logit);
        }
        let max = order.iter().map(|&id| logits[id as usize]).fold(f32::NEG_INFINITY, f32::max);
        let weight = |id: &u32| f64::from((logits[*id as usize] - max) / temperature).exp();
        let mut weights: Vec<f64> = order.iter().map(weight).collect();
        let mut total: f64 = weights.iter().sum();
        if top_p < 1.0 {
            let mut mass = 0.0;
            let kept = weights.iter().position(|w| {
                mass += w;
                mass >= f64::from(top_p) * total
            });
            weights.truncate(kept.map_or(weights.len(), |last| last + 1));
            total = weights.iter().sum();
        }
        let mut left = self.rng.random::<f64>() * total;
        let chosen = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        order[chosen.unwrap_or(weights.len() - 1)]
    }
}

/// Index of the largest logit, the first of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in logits.iter().enumerate() {
        if *v > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// Continues `prompt` by up to `max_new` tokens, ending after a token for which `emit` returns false.
///
/// # Errors
/// As [`Model::next_logits`].
pub fn generate(
    model: &Model,
    sequence: &mut Sequence,
    prompt: &[u32],
    max_new: usize,
    sampler: &mut Sampler,
    mut emit: impl FnMut(u32) -> bool,
) -> Result<()> {
    let mut feed = prompt.to_vec();
    for _ in 0..max_new {
        let logits = model.next_logits(&mut [(&mut *sequence, &feed)])?;
        let token = sampler.sample(&logits);
        if !emit(token) {
            break;
        }
        feed.clear();
        feed.push(token);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(sampling: Sampling, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling);
        (0..n).map(|_| sampler.sample(logits)).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(draw(Sampling::GREEDY, &[1.0, 3.0, 3.0, 2.0], 2), [1, 1]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0_f32, 1.0, 2.0, -1.0];
        let total: f64 = logits.iter().map(|&l| f64::from(l / 0.7).exp()).sum();
        let n = 20_000;
        let drawn = draw(Sampling { temperature: 0.7, top_k: 0, top_p: 1.0, seed: 3 }, &logits, n);
        for (id, &logit) in logits.iter().enumerate() {
            let p = f64::from(logit / 0.7).exp() / total;
            let seen = drawn.iter().filter(|&&d| d as usize == id).count() as f64 / n as f64;
            assert!(
                (seen - p).abs() < 4.0 * (p * (1.0 - p) / n as f64).sqrt(),
                "id {id}: {seen} instead of {p}"
            );
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [0.0, 1.0, 2.0, 3.0];
        assert!(
            draw(Sampling { temperature: 5.0, top_k: 2, top_p: 1.0, seed: 1 }, &logits, 200)
                .iter()
                .all(|d| *d >= 2)
        );
        // softmax = .03 .09 .24 .64: the two largest are the first to reach 0.7.
        let drawn = draw(Sampling { temperature: 1.0, top_k: 0, top_p: 0.7, seed: 1 }, &logits, 200);
        assert!(drawn.iter().all(|d| *d >= 2) && drawn.contains(&2) && drawn.contains(&3));
    }

    #[test]
    fn seeds_repeat() {
        let s = Sampling { temperature: 1.0, top_k: 0, top_p: 0.9, seed: 7 };
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
        assert_eq!(draw(s, &logits, 50), draw(s, &logits, 50));
        assert_ne!(draw(s, &logits, 50), draw(Sampling { seed: 8, ..s }, &logits, 50));
    }
}
