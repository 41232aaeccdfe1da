//! How far a model's next-token distributions are from a reference's: what separates methods that perplexity cannot.

use serde::{Deserialize, Serialize};
use specquant_kernels::{exp_in_place, log_sum_exp};

use crate::stats::{Difference, Estimate, weighted};

/// Ranges of window positions for which the mean divergence is reported.
const POSITION_RANGES: usize = 16;

/// One predicted token.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Token {
    /// Negative log-likelihood, in nats.
    pub nll: f64,
    /// KL(reference ‖ model) of the distributions, in nats.
    pub kl: f64,
    /// Whether both have the same first choice.
    pub same_choice: bool,
}

/// A model's distance to its reference on a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Distance {
    /// Mean over tokens of KL(reference ‖ model), in nats; standard error over windows.
    pub kl: Estimate,
    /// 99th percentile over tokens of the same.
    pub kl_p99: f64,
    /// Share of tokens for which both models have the same first choice; standard error over windows.
    pub top1_agreement: Estimate,
    /// Log-perplexity of the model minus that of the reference, paired over windows.
    pub delta_log_perplexity: Difference,
    /// Mean divergence by position in the window.
    pub kl_by_position: Vec<PositionRange>,
}

/// Tokens in a range of window positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionRange {
    /// Positions of the predicted tokens, from 0, the end excluded.
    pub positions: (usize, usize),
    /// Mean KL(reference ‖ model).
    pub kl: f64,
}

impl Distance {
    /// tokens: of every window; firsts: position of every window's first token.
    pub(crate) fn new(
        tokens: &[Vec<Token>],
        firsts: impl Iterator<Item = usize> + Clone,
        window: usize,
        delta_log_perplexity: Difference,
    ) -> Distance {
        let over_windows = |value: fn(&Token) -> f64| {
            let means = tokens.iter().map(|w| w.iter().map(value).sum::<f64>() / w.len() as f64);
            weighted(&means.collect::<Vec<_>>(), &tokens.iter().map(Vec::len).collect::<Vec<_>>())
        };
        let mut sorted: Vec<f64> = tokens.iter().flatten().map(|t| t.kl).collect();
        sorted.sort_by(f64::total_cmp);
        let width = window.div_ceil(POSITION_RANGES);
        let kl_by_position = (0..window.div_ceil(width)).filter_map(|r| {
            let range = r * width..((r + 1) * width).min(window);
            let inside = tokens.iter().zip(firsts.clone()).flat_map(|(tokens, first)| {
                let range = range.clone();
                tokens
                    .iter()
                    .enumerate()
                    .filter(move |(i, _)| range.contains(&(first + i)))
                    .map(|(_, t)| t.kl)
            });
            let (sum, n) = inside.fold((0.0, 0), |(sum, n), kl| (sum + kl, n + 1));
            (n > 0).then(|| PositionRange { positions: (range.start, range.end), kl: sum / f64::from(n) })
        });
        Distance {
            kl: over_windows(|t| t.kl),
            // The value that 99% of the tokens do not exceed.
            kl_p99: sorted[((sorted.len() as f64 * 0.99).ceil() as usize).clamp(1, sorted.len()) - 1],
            top1_agreement: over_windows(|t| f64::from(u8::from(t.same_choice))),
            delta_log_perplexity,
            kl_by_position: kl_by_position.collect(),
        }
    }
}

/// Σ p ln(p / q) in nats for p = softmax(`p`) and q = softmax(`q`): with d = p − q (logits), `Σ softmax(p) d − lse(p) + lse(q)`.
pub(crate) fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    let (lse_p, lse_q) = (log_sum_exp(p), log_sum_exp(q));
    let (mut weighted, mut total) = (0.0, 0.0);
    let mut e = [0.0f32; 1024];
    for (p, q) in p.chunks(e.len()).zip(q.chunks(e.len())) {
        let e = &mut e[..p.len()];
        e.iter_mut().zip(p).for_each(|(e, p)| *e = p - lse_p as f32);
        exp_in_place(e);
        for ((e, p), q) in e.iter().zip(p).zip(q) {
            weighted += f64::from(*e) * (f64::from(*p) - f64::from(*q));
            total += f64::from(*e);
        }
    }
    // Divided by the sum of the rounded probabilities, a shift of all logits drops out exactly. Never negative but for rounding.
    (weighted / total - lse_p + lse_q).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::paired;

    /// By the definition, in f64.
    fn naive(p: &[f32], q: &[f32]) -> f64 {
        let softmax = |x: &[f32]| {
            let e: Vec<f64> = x.iter().map(|&x| f64::from(x).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.into_iter().map(|e| e / sum).collect::<Vec<_>>()
        };
        softmax(p).iter().zip(softmax(q)).map(|(p, q)| p * (p / q).ln()).sum()
    }

    #[test]
    fn divergence_is_its_definition() {
        let p: Vec<f32> = (0..3000).map(|i| (i as f32 * 0.37).sin() * 4.0).collect();
        for (scale, shift) in [(0.0, 0.0), (1e-3, 0.0), (0.3, 2.0), (3.0, -40.0)] {
            let q: Vec<f32> =
                p.iter().enumerate().map(|(i, p)| p + scale * (i as f32).cos() + shift).collect();
            let (got, want) = (kl_divergence(&p, &q), naive(&p, &q));
            assert!((got - want).abs() < 1e-6 * want.max(1.0), "scale {scale}: {got} instead of {want}");
        }
        assert_eq!(kl_divergence(&p, &p), 0.0);
    }

    #[test]
    fn percentile_agreement_and_positions() {
        let token = |kl: f64, same_choice| Token { nll: 1.0, kl, same_choice };
        // 200 tokens in two windows; 3 of them far off.
        let far = |i: usize| [7, 50, 90].contains(&i);
        let first: Vec<Token> = (0..100).map(|i| token(if far(i) { 9.0 } else { 0.1 }, !far(i))).collect();
        let second: Vec<Token> = (0..100).map(|_| token(0.1, true)).collect();
        let d = Distance::new(&[first, second], [1, 1].into_iter(), 101, paired(&[1.0, 2.0], &[0.5, 1.5]));
        assert_eq!(d.kl_p99, 9.0);
        assert!((d.kl.mean - (0.1 * 197.0 + 27.0) / 200.0).abs() < 1e-12 && d.kl.stderr > 0.1);
        assert!((d.top1_agreement.mean - 0.985).abs() < 1e-12);
        assert!((d.delta_log_perplexity.mean - 0.5).abs() < 1e-12);
        // Ranges of 7 positions; the token at position 8 (index 7) is in the second.
        assert_eq!((d.kl_by_position.len(), d.kl_by_position[1].positions), (15, (7, 14)));
        assert!((d.kl_by_position[1].kl - (9.0 + 13.0 * 0.1) / 14.0).abs() < 1e-12);
        assert!((d.kl_by_position[0].kl - 0.1).abs() < 1e-12);
    }
}
