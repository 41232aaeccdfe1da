//! How much of a weight any sharing out of frequency bins can catch (claim T7).
//!
//! Bin f of channel j puts out the energy `e_jf = |ŵ_jf|² · S_f` if phases are random, where S_f is the mean power of the input at that frequency. Of all ways to keep
//! K bins the best one keeps the K largest e_jf, wherever they are: reverse water-filling, which leaves everything below one level in every channel. Where a
//! channel's bins have to be its lowest ones, the best counts are those that maximize `Σ_f<k e_jf − μ k` for every channel, under one price μ.

use serde::{Deserialize, Serialize};
use specquant_quantize::branch::{Score, allocate, bin_energies};
use specquant_quantize::layer::{Input, Weight};

/// Shares of a layer's activation-weighted energy that are caught.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Allocation {
    /// By the same number of lowest bins in every channel.
    pub uniform: f64,
    /// Shared out by the paper's activation-aware score, at a temperature of 1.
    pub adaptive: f64,
    /// By the best numbers of lowest bins, at most.
    pub best_lowest: f64,
    /// By the best bins of any frequency.
    pub best: f64,
}

impl Allocation {
    /// With `mean_k` bins a channel, on average. `input` must have its second moment.
    pub fn of(w: &Weight, input: &Input, mean_k: usize) -> Option<Self> {
        let power = power(&input.hessian?.normalized(), w.inp);
        let mut energies = bin_energies(w.values, w.out, w.inp);
        let bins = power.len();
        energies.chunks_exact_mut(bins).for_each(|row| row.iter_mut().zip(&power).for_each(|(e, p)| *e *= p));
        let score = Score::ActivationAware.of(w.values, w.out, w.inp, input.mean_abs);
        let lowest = |counts: &[u16]| -> f64 {
            let rows = energies.chunks_exact(bins).zip(counts);
            rows.map(|(row, &k)| row[..usize::from(k)].iter().sum::<f64>()).sum()
        };
        let total = energies.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let budget = mean_k.min(bins) * w.out;
        Some(Allocation {
            uniform: lowest(&allocate(&score, 0.0, mean_k, bins)) / total,
            adaptive: lowest(&allocate(&score, 1.0, mean_k, bins)) / total,
            best_lowest: best_lowest(&energies, bins, budget) / total,
            best: best(energies.clone(), budget) / total,
        })
    }
}

/// Mean power of inputs at every frequency, `[n / 2 + 1]`, up to a factor. h: their second moment, `[n, n]`.
fn power(h: &[f64], n: usize) -> Vec<f64> {
    // Σ_t |X_f|² = Σ_d r(d) cos(2π f d / n), with the circular autocorrelation r.
    let r: Vec<f64> = (0..n).map(|d| (0..n).map(|i| h[i * n + (i + d) % n]).sum()).collect();
    let at = |f: usize| -> f64 {
        let angle = |d: usize| std::f64::consts::TAU * (f * d % n) as f64 / n as f64;
        r.iter().enumerate().map(|(d, r)| r * angle(d).cos()).sum()
    };
    (0..=n / 2).map(|f| at(f).max(0.0)).collect()
}

/// The sum of the `budget` largest.
fn best(mut energies: Vec<f64>, budget: usize) -> f64 {
    energies.sort_unstable_by(|a, b| b.total_cmp(a));
    energies.iter().take(budget).sum()
}

/// A bound on what `budget` bins hold if a channel's are its lowest ones, nearly reached where there are many channels: the dual of the choice,
/// `max_k Σ (e − μ) + μ · budget` at the price μ at which the budget is spent.
fn best_lowest(energies: &[f64], bins: usize, budget: usize) -> f64 {
    let buy = |price: f64| -> (usize, f64) {
        let mut bought = (0, 0.0);
        for row in energies.chunks_exact(bins) {
            let (mut sum, mut most) = (0.0, (0.0, 0, 0.0));
            for (k, e) in row.iter().enumerate() {
                sum += e;
                let gain = sum - price * (k + 1) as f64;
                if gain > most.0 {
                    most = (gain, k + 1, sum);
                }
            }
            bought = (bought.0 + most.1, bought.1 + most.2);
        }
        bought
    };
    let (mut low, mut high) = (0.0, energies.iter().copied().fold(0.0, f64::max));
    for _ in 0..100 {
        let price = 0.5 * (low + high);
        if buy(price).0 > budget { low = price } else { high = price }
    }
    let (count, sum) = buy(high);
    sum + high * (budget - count) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use specquant_quantize::rounding::Hessian;

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(next).collect()
    }

    #[test]
    fn the_power_of_inputs_is_that_of_their_transforms() {
        let (rows, n) = (7, 12);
        let x = noise(rows * n, 1);
        let mut h = Hessian::new(n);
        h.add(&x);
        let got = power(&h.normalized(), n);
        for (f, got) in got.iter().enumerate() {
            let part = |row: &[f32], g: fn(f64) -> f64| -> f64 {
                let angle = |i: usize| std::f64::consts::TAU * (i * f) as f64 / n as f64;
                row.iter().enumerate().map(|(i, x)| f64::from(*x) * g(angle(i))).sum()
            };
            let want: f64 =
                x.chunks(n).map(|row| part(row, f64::cos).powi(2) + part(row, f64::sin).powi(2)).sum();
            assert!((got - 2.0 / rows as f64 * want).abs() < 1e-4 * want, "{f}: {got} {want}");
        }
    }

    /// Against every choice there is.
    #[test]
    fn no_choice_holds_more() {
        let (channels, bins, budget) = (3, 4, 5);
        for seed in 0..20 {
            let energies: Vec<f64> =
                noise(channels * bins, seed).iter().map(|v| f64::from(*v).powi(2)).collect();
            let (mut most, mut lowest) = (0.0f64, 0.0f64);
            for choice in 0u32..1 << (channels * bins) {
                if choice.count_ones() as usize > budget {
                    continue;
                }
                let sum: f64 =
                    (0..channels * bins).filter(|i| choice >> i & 1 == 1).map(|i| energies[i]).sum();
                most = most.max(sum);
                let prefix = (0..channels).all(|c| {
                    let row = choice >> (c * bins) & ((1 << bins) - 1);
                    row & (row + 1) == 0
                });
                if prefix {
                    lowest = lowest.max(sum);
                }
            }
            assert!((best(energies.clone(), budget) - most).abs() < 1e-12);
            let got = best_lowest(&energies, bins, budget);
            assert!(got >= lowest - 1e-12 && got <= most + 1e-12, "{got} {lowest} {most}");
        }
    }
}
