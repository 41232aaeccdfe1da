//! How many frequency bins every output channel keeps.
//!
//! A score for each channel is made a share of the layer's budget of bins (arXiv 2511.11663, Eq. 12 to 14): `ρ = softmax(T
//! · score)`, `k_j = ρ_j · K`. Three things differ from the letter of the paper. Its Eq. 12 is a product of signed means,
//! near zero and defined for square weights only; [`activation_score`] uses magnitudes. Its Eq. 14 gives out `C_in` bins
//! in all, about one a channel, against the 16 or 32 of its tables; here `K = k̄ · C_out`. And raw scores would make the
//! softmax flat or one-hot, so they are standardized first.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::spectral_entropy;

/// What the share of a channel is decided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Score {
    /// The channel's weights times the size of their inputs: [`activation_score`] (Eq. 12).
    #[default]
    #[serde(rename = "act")]
    ActivationAware,
    /// [`spectral_entropy`](super::spectral_entropy) (algorithm 1, Table 5).
    #[serde(rename = "entropy")]
    Entropy,
    /// Mean magnitude of the row (Table 5).
    #[serde(rename = "absmean")]
    AbsMean,
    /// Largest magnitude of the row (Table 5).
    #[serde(rename = "absmax")]
    AbsMax,
    /// Euclidean norm of the row (Table 5).
    #[serde(rename = "l2")]
    L2,
    /// All channels alike.
    #[serde(rename = "uniform")]
    Uniform,
}

/// The score of every output channel that looks at its weights alone, `w_hat: [out, inp]`.
fn by_row(w_hat: &[f32], inp: usize, score: impl Fn(&[f32]) -> f64 + Sync) -> Vec<f32> {
    w_hat.par_chunks_exact(inp.max(1)).map(|w| score(w) as f32).collect()
}

impl Score {
    /// The score of every output channel of `w_hat: [out, inp]`; `mean_abs_x: [inp]`, of the smoothed input.
    ///
    /// # Panics
    /// If the slices do not have these shapes.
    pub fn of(self, w_hat: &[f32], out: usize, inp: usize, mean_abs_x: &[f32]) -> Vec<f32> {
        let abs = |w: &f32| f64::from(w.abs());
        match self {
            Score::ActivationAware => activation_score(w_hat, out, inp, mean_abs_x),
            Score::Entropy => spectral_entropy(w_hat, out, inp),
            Score::AbsMean => by_row(w_hat, inp, |w| w.iter().map(abs).sum::<f64>() / inp as f64),
            Score::AbsMax => by_row(w_hat, inp, |w| w.iter().map(abs).fold(0.0, f64::max)),
            Score::L2 => by_row(w_hat, inp, |w| w.iter().map(|w| abs(w).powi(2)).sum::<f64>().sqrt()),
            Score::Uniform => vec![0.0; out],
        }
    }
}

/// `1/in · Σ_i mean_t |x_ti| · |w_ji|` for every output channel j of `w_hat: [out, inp]`; `mean_abs_x: [inp]`, of the
/// smoothed input.
///
/// # Panics
/// If the slices do not have these shapes.
pub fn activation_score(w_hat: &[f32], out: usize, inp: usize, mean_abs_x: &[f32]) -> Vec<f32> {
    assert_eq!(w_hat.len(), out * inp, "weights are [out, in]");
    assert_eq!(mean_abs_x.len(), inp, "one mean for each input channel");
    let product = |(&w, &x): (&f32, &f32)| f64::from(w.abs()) * f64::from(x);
    by_row(w_hat, inp, |w| w.iter().zip(mean_abs_x).map(product).sum::<f64>() / inp as f64)
}

/// Bins for every output channel: `mean_k` on average, shared out by `softmax(temperature · standardized score)` and
/// rounded by largest remainder. A temperature of 0 gives every channel `mean_k`.
///
/// Every channel gets at least 1 and at most `most` bins, of which a width of n has n / 2 + 1; what these bounds take or leave is spread over the other
/// channels in proportion, and the sum is `mean_k · out` exactly. Ties go to the lower channel. `mean_k = 0` gives none, a
/// `mean_k` above the most there is gives that.
pub fn allocate(scores: &[f32], temperature: f32, mean_k: usize, most: usize) -> Vec<u16> {
    let (out, most) = (scores.len(), most.min(usize::from(u16::MAX)));
    let mean_k = mean_k.min(most);
    if mean_k == 0 || out == 0 {
        return vec![0; out];
    }
    let total = mean_k * out;
    let mean = scores.iter().map(|&s| f64::from(s)).sum::<f64>() / out as f64;
    let deviation = (scores.iter().map(|&s| (f64::from(s) - mean).powi(2)).sum::<f64>() / out as f64).sqrt();
    let logits: Vec<f64> = scores
        .iter()
        .map(|&s| f64::from(temperature) * (f64::from(s) - mean) / deviation)
        .map(|z| if z.is_finite() { z } else { 0.0 })
        .collect();

    // The shares are c · exp(logit) within the bounds; the sum grows with ln c, which is found by bisection.
    let share = |ln_c: f64, logit: f64| (ln_c + logit).exp().clamp(1.0, most as f64);
    let largest = logits.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
    let smallest = logits.iter().fold(f64::INFINITY, |a, &b| a.min(b));
    let (mut low, mut high) = (-largest, (most as f64).ln() - smallest); // all at 1, all at the most
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        let sum: f64 = logits.iter().map(|&z| share(middle, z)).sum();
        if sum <= total as f64 { low = middle } else { high = middle }
    }

    let shares: Vec<f64> = logits.iter().map(|&z| share(low, z)).collect();
    let mut bins: Vec<u16> = shares.iter().map(|&s| s as u16).collect();
    let mut by_remainder: Vec<usize> = (0..out).collect();
    by_remainder.sort_by(|&a, &b| shares[b].fract().total_cmp(&shares[a].fract())); // stable
    let mut left = total.saturating_sub(bins.iter().map(|&k| usize::from(k)).sum());
    for &channel in by_remainder.iter().cycle() {
        if left == 0 {
            break;
        }
        if usize::from(bins[channel]) < most {
            bins[channel] += 1;
            left -= 1;
        }
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_temperature_is_uniform() {
        assert_eq!(allocate(&[1.0, 5.0, -3.0], 0.0, 16, 289), [16; 3]);
        assert_eq!(allocate(&[2.0; 4], 1.0, 16, 289), [16; 4]);
        assert_eq!(allocate(&[2.0, 3.0], 1.0, 0, 289), [0; 2]);
        assert_eq!(allocate(&[2.0, 3.0], 1.0, 99, 5), [5; 2]);
        assert_eq!(allocate(&[f32::NAN, 3.0], 1.0, 2, 5), [2; 2]);
        assert!(allocate(&[], 1.0, 2, 5).is_empty());
    }

    #[test]
    fn shares_follow_the_softmax() {
        let scores: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
        let bins = allocate(&scores, 0.5, 64, 2049);
        let mean = scores.iter().sum::<f32>() / 100.0;
        let deviation = (scores.iter().map(|s| (s - mean).powi(2)).sum::<f32>() / 100.0).sqrt();
        let weights: Vec<f32> = scores.iter().map(|s| (0.5 * (s - mean) / deviation).exp()).collect();
        let sum: f32 = weights.iter().sum();
        for (k, w) in bins.iter().zip(&weights) {
            assert!((f32::from(*k) - 6400.0 * w / sum).abs() < 1.01, "{k} {}", 6400.0 * w / sum);
        }
    }

    #[test]
    fn what_the_bounds_cut_off_goes_to_the_others() {
        // One channel asks for everything, gets the 9 there are, and the rest is shared by equals, low channels first.
        assert_eq!(allocate(&[0.0, 0.0, 100.0, 0.0], 20.0, 4, 9), [3, 2, 9, 2]);
        assert_eq!(allocate(&[0.0, 0.0, 100.0, 0.0], 20.0, 2, 9), [1, 1, 5, 1]);
    }

    #[test]
    fn activation_score_by_hand() {
        let score = activation_score(&[1.0, -2.0, 0.5, 0.0], 2, 2, &[3.0, 0.5]);
        assert_eq!(score, [2.0, 0.75]);
    }

    #[test]
    fn scores_of_rows_by_hand() {
        let of = |score: Score| score.of(&[3.0, -4.0, 0.5, 0.0], 2, 2, &[1.0, 1.0]);
        assert_eq!(of(Score::AbsMean), [3.5, 0.25]);
        assert_eq!(of(Score::AbsMax), [4.0, 0.5]);
        assert_eq!(of(Score::L2), [5.0, 0.5]);
        assert_eq!(of(Score::Uniform), [0.0, 0.0]);
    }

    #[test]
    fn score_names() {
        let name = |s: Score| toml::Value::try_from(s).unwrap();
        for (score, want) in [
            (Score::ActivationAware, "act"),
            (Score::Entropy, "entropy"),
            (Score::AbsMean, "absmean"),
            (Score::AbsMax, "absmax"),
            (Score::L2, "l2"),
            (Score::Uniform, "uniform"),
        ] {
            assert_eq!(name(score).as_str(), Some(want));
            assert_eq!(name(score).try_into::<Score>().unwrap(), score);
        }
    }

    proptest! {
        #[test]
        fn sum_and_bounds_hold(
            scores in prop::collection::vec(-1e3f32..1e3, 1..60),
            temperature in -3.0f32..30.0,
            mean_k in 1usize..40,
            most in 1usize..46,
        ) {
            let bins = allocate(&scores, temperature, mean_k, most);
            prop_assert_eq!(bins.iter().map(|&k| usize::from(k)).sum::<usize>(), mean_k.min(most) * scores.len());
            prop_assert!(bins.iter().all(|&k| k >= 1 && usize::from(k) <= most));
            if temperature > 0.0 {
                for (a, b) in (0..scores.len()).zip(1..scores.len()) {
                    if scores[a] > scores[b] {
                        prop_assert!(bins[a] + 1 >= bins[b]);
                    }
                }
            }
        }
    }
}
