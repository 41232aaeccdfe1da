//! The low-frequency branch: a truncated real Fourier series of every output channel along the input channels.
//!
//! With N inputs and `F = rfft(w_j)`, the orthonormal coefficients of bin m are `re = c Re F_m` and `im = -c Im F_m`,
//! `c = √(2/N)`, or `√(1/N)` at m = 0 and N/2, where im is zero: `re` multiplies the cosine and `im` the sine row of
//! [`specquant_kernels::Basis::Fourier`]. Keeping bins m < k leaves the squared error `1/N Σ_{m=k}^{N-k} |F_m|²` (Parseval).
//!
//! Deviations from arXiv 2511.11663, whose equations contradict each other: the signal is an output channel over the
//! inputs (text of section 3.2; algorithm 1 loops over inputs), the factors above replace those of Eq. 5, 10 and 11, and
//! a coefficient is stored as (re, im) in f16 instead of amplitude and phase, which takes the same bytes. Everything is
//! done by FFT, of any length, which is as fast as a product with the basis even for a few bins.

use super::{BranchError, coefficient};
use half::f16;
use rayon::prelude::*;
use realfft::RealFftPlanner;
use realfft::num_complex::Complex;
use specquant_model::{BranchBasis, StoredBranch};

/// Keeps the lowest `bins[j]` frequency bins of output channel j of `w_hat: [out, inp]`.
///
/// # Errors
/// If a channel has fewer bins, or a coefficient does not fit f16.
///
/// # Panics
/// If the slices do not have these shapes.
pub fn truncate(w_hat: &[f32], out: usize, inp: usize, bins: &[u16]) -> Result<StoredBranch, BranchError> {
    keep(w_hat, out, inp, BranchBasis::Fourier, bins)
}

/// Keeps the `bins[j]` frequency bins of most energy of output channel j of `w_hat: [out, inp]`, the largest first. This
/// costs an index a bin, and a whole transform of every input at run time.
///
/// # Errors
/// As [`truncate`].
///
/// # Panics
/// As [`truncate`].
pub fn truncate_top(
    w_hat: &[f32],
    out: usize,
    inp: usize,
    bins: &[u16],
) -> Result<StoredBranch, BranchError> {
    keep(w_hat, out, inp, BranchBasis::FourierTop, bins)
}

fn keep(
    w_hat: &[f32],
    out: usize,
    inp: usize,
    basis: BranchBasis,
    counts: &[u16],
) -> Result<StoredBranch, BranchError> {
    assert_eq!(counts.len(), out, "one number of bins for each output channel");
    let limit = inp / 2 + 1;
    if let Some(channel) = counts.iter().position(|&k| usize::from(k) > limit) {
        return Err(BranchError::TooManyBins { channel, bins: usize::from(counts[channel]), inp, limit });
    }
    let channels = map_spectra(w_hat, out, inp, |channel, spectrum| {
        let mut order: Vec<u16> = (0..spectrum.len() as u16).collect();
        if basis == BranchBasis::FourierTop {
            let energy =
                |&bin: &u16| spectrum[usize::from(bin)].norm_sqr() * norm(usize::from(bin), inp).powi(2);
            order.sort_by(|a, b| energy(b).total_cmp(&energy(a))); // stable
        }
        order.truncate(usize::from(counts[channel]));
        let mut coeffs = Vec::with_capacity(2 * order.len());
        for bin in order.iter().map(|&bin| usize::from(bin)) {
            let f = spectrum[bin];
            for value in [f.re * norm(bin, inp), -f.im * norm(bin, inp)] {
                coeffs.push(coefficient(value, channel, bin)?);
            }
        }
        Ok((order, coeffs))
    });
    let (mut indices, mut coeffs) = (Vec::new(), Vec::new());
    for channel in channels {
        let (order, values) = channel?; // the first channel that fails is the one named, whatever the number of threads
        if basis == BranchBasis::FourierTop {
            indices.extend(order);
        }
        coeffs.extend(values);
    }
    Ok(StoredBranch { basis, counts: counts.to_vec(), indices, coeffs })
}

/// The weight W' as `[out, inp]` that the stored coefficients stand for.
///
/// It comes from the rounded coefficients, so that the residual `w_hat - W'` takes up their rounding error.
///
/// # Panics
/// If `t` is not of `out` channels with at most `inp / 2 + 1` bins each.
pub fn reconstruct(t: &StoredBranch, out: usize, inp: usize) -> Vec<f32> {
    assert_eq!(t.counts.len(), out, "one number of bins for each output channel");
    let mut w = vec![0.0; out * inp];
    if w.is_empty() {
        return w;
    }
    let (mut rest, mut indices) = (t.coeffs.as_slice(), t.indices.as_slice());
    let channels: Vec<(&[f16], &[u16])> = t
        .counts
        .iter()
        .map(|&k| {
            let k = usize::from(k);
            (rest.split_off(..2 * k).unwrap_or(&[]), indices.split_off(..k).unwrap_or(&[]))
        })
        .collect();
    let plan = RealFftPlanner::new().plan_fft_inverse(inp);
    w.par_chunks_exact_mut(inp).zip(channels).for_each_init(
        || (plan.make_input_vec(), plan.make_scratch_vec()),
        |(spectrum, scratch), (w, (coeffs, indices))| {
            spectrum.fill(Complex::default());
            for (item, c) in coeffs.chunks_exact(2).enumerate() {
                let bin = indices.get(item).map_or(item, |&bin| usize::from(bin));
                let own_mirror = bin == 0 || 2 * bin == inp;
                // The inverse transform adds every other bin and its mirror image.
                let share = norm(bin, inp) * if own_mirror { 1.0 } else { 0.5 };
                spectrum[bin] = Complex::new(
                    c[0].to_f32() * share,
                    if own_mirror { 0.0 } else { -c[1].to_f32() * share },
                );
            }
            let done = plan.process_with_scratch(spectrum, w, scratch);
            debug_assert!(done.is_ok(), "{done:?}");
        },
    );
    w
}

/// Spectral entropy of every output channel, in nats: `-Σ p ln p` with `p = |F|² / Σ |F|²` over the half spectrum (0 to
/// N/2). 0 for a pure tone and for zeros, `ln(N/2 + 1)` for a flat spectrum.
///
/// # Panics
/// If `w_hat` is not `[out, inp]`.
pub fn spectral_entropy(w_hat: &[f32], out: usize, inp: usize) -> Vec<f32> {
    map_spectra(w_hat, out, inp, |_, spectrum| {
        let power = |f: &Complex<f32>| f64::from(f.re).powi(2) + f64::from(f.im).powi(2);
        let total: f64 = spectrum.iter().map(power).sum();
        let shares = spectrum.iter().map(|f| power(f) / total);
        shares.filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum::<f64>() as f32
    })
}

/// Energy of every bin of the half spectrum of every output channel, mirror images included, `[out, in / 2 + 1]`: a channel's sum is its energy.
///
/// # Panics
/// If `w` is not `[out, inp]`.
pub fn bin_energies(w: &[f32], out: usize, inp: usize) -> Vec<f64> {
    let energies = map_spectra(w, out, inp, |_, spectrum| -> Vec<f64> {
        spectrum.iter().enumerate().map(|(bin, f)| energy(f, bin, inp)).collect()
    });
    energies.concat()
}

fn energy(f: &Complex<f32>, bin: usize, n: usize) -> f64 {
    (f64::from(f.re).powi(2) + f64::from(f.im).powi(2)) * f64::from(norm(bin, n)).powi(2)
}

/// Share of every output channel's energy that lies in the lowest `fraction` of its frequencies, rounded to whole bins of
/// the half spectrum; mirror images count. White noise gives `fraction`, zeros give 0.
///
/// # Panics
/// If `w` is not `[out, inp]`.
pub fn low_frequency_energy(w: &[f32], out: usize, inp: usize, fraction: f64) -> Vec<f32> {
    map_spectra(w, out, inp, |_, spectrum| {
        let low = (fraction * spectrum.len() as f64).round() as usize;
        let energy = |(bin, f): (usize, &Complex<f32>)| energy(f, bin, inp);
        let kept: f64 = spectrum.iter().enumerate().take(low).map(energy).sum();
        let total: f64 = spectrum.iter().enumerate().map(energy).sum();
        if total > 0.0 { (kept / total) as f32 } else { 0.0 }
    })
}

/// What makes the rfft bin of a real signal of length n orthonormal.
fn norm(bin: usize, n: usize) -> f32 {
    let mirrored = bin != 0 && 2 * bin != n;
    (if mirrored { 2.0 } else { 1.0 } / n as f64).sqrt() as f32
}

/// Calls `f` with every output channel of `w: [out, inp]` and its rfft, `[inp / 2 + 1]`.
fn map_spectra<R: Send>(
    w: &[f32],
    out: usize,
    inp: usize,
    f: impl Fn(usize, &[Complex<f32>]) -> R + Sync,
) -> Vec<R> {
    assert_eq!(w.len(), out * inp, "weights are [out, in]");
    if w.is_empty() {
        return (0..out).map(|channel| f(channel, &[])).collect();
    }
    let plan = RealFftPlanner::new().plan_fft_forward(inp);
    w.par_chunks_exact(inp)
        .enumerate()
        .map_init(
            || (plan.make_input_vec(), plan.make_output_vec(), plan.make_scratch_vec()),
            |(signal, spectrum, scratch), (channel, w)| {
                signal.copy_from_slice(w);
                let done = plan.process_with_scratch(signal, spectrum, scratch);
                debug_assert!(done.is_ok(), "{done:?}");
                f(channel, spectrum)
            },
        )
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounding::testing::gaussian;
    use specquant_kernels::{Basis, fourier_rows};
    use std::f64::consts::TAU;

    fn squared_error(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    /// |F_m|² for all m in 0..n, by the definition.
    fn naive_power(w: &[f32]) -> Vec<f64> {
        let n = w.len();
        let part = |m: usize, f: fn(f64) -> f64| -> f64 {
            w.iter().enumerate().map(|(i, &v)| f64::from(v) * f(TAU * ((m * i) % n) as f64 / n as f64)).sum()
        };
        (0..n).map(|m| part(m, f64::cos).powi(2) + part(m, f64::sin).powi(2)).collect()
    }

    #[test]
    fn coefficients_belong_to_the_orthonormal_basis() {
        for n in [1usize, 2, 7, 12, 576] {
            let w = gaussian(2 * n, 1);
            let k = (n / 2 + 1).min(9);
            let t = truncate(&w, 2, n, &[k as u16, k as u16]).unwrap();
            for channel in 0..2 {
                for bin in 0..k {
                    let c = if bin == 0 || 2 * bin == n { 1.0 / n as f64 } else { 2.0 / n as f64 }.sqrt();
                    let dot = |f: fn(f64) -> f64| -> f64 {
                        (0..n)
                            .map(|i| f64::from(w[channel * n + i]) * c * f(TAU * (bin * i) as f64 / n as f64))
                            .sum()
                    };
                    let at = 2 * (channel * k + bin);
                    for (got, want) in [(t.coeffs[at], dot(f64::cos)), (t.coeffs[at + 1], dot(f64::sin))] {
                        assert!(
                            (got.to_f64() - want).abs() < 2e-3 * want.abs().max(0.1),
                            "n {n} bin {bin}: {got} {want}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_kernels_basis_gives_the_same_weight() {
        for (n, k) in [(45, 7), (64, 33), (576, 16)] {
            let w = gaussian(n, 7);
            let t = truncate(&w, 1, n, &[k as u16]).unwrap();
            let basis = Basis::Fourier(n);
            let basis = basis.rows(fourier_rows(n, k));
            // Rows DC, cos 1, sin 1, ...: all coefficients in order but the im of bin 0 (and of bin n/2, at the end).
            let coeffs: Vec<f32> = [t.coeffs[0]].iter().chain(&t.coeffs[2..]).map(|c| c.to_f32()).collect();
            for (i, got) in reconstruct(&t, 1, n).iter().enumerate() {
                let want: f32 = basis.chunks(n).zip(&coeffs).map(|(row, c)| row[i] * c).sum();
                assert!((got - want).abs() < 1e-5, "n {n} k {k} at {i}: {got} {want}");
            }
        }
    }

    #[test]
    fn error_is_the_energy_of_the_bins_left_out() {
        for n in [45usize, 64] {
            let w = gaussian(n, 2);
            let power = naive_power(&w);
            for k in [1, 2, 8, n / 2] {
                let back = reconstruct(&truncate(&w, 1, n, &[k as u16]).unwrap(), 1, n);
                let want = power[k..=n - k].iter().sum::<f64>() / n as f64;
                let got = squared_error(&w, &back);
                assert!((got - want).abs() < 1e-3 * want + 1e-5, "n {n} k {k}: {got} {want}");
            }
        }
    }

    #[test]
    fn all_bins_give_the_weight_back() {
        for n in [1usize, 2, 9, 576, 1535] {
            let w = gaussian(3 * n, 3);
            let t = truncate(&w, 3, n, &[(n / 2 + 1) as u16; 3]).unwrap();
            let back = reconstruct(&t, 3, n);
            let relative = squared_error(&w, &back) / squared_error(&w, &vec![0.0; 3 * n]);
            assert!(relative.sqrt() < 4e-4, "n {n}: {}", relative.sqrt());
        }
    }

    #[test]
    fn truncation_equals_the_inverse_of_the_truncated_rfft() {
        let n = 60;
        let w = gaussian(4 * n, 4);
        let bins = [0u16, 1, 7, 31];
        let back = reconstruct(&truncate(&w, 4, n, &bins).unwrap(), 4, n);
        let mut planner = RealFftPlanner::<f32>::new();
        let (forward, inverse) = (planner.plan_fft_forward(n), planner.plan_fft_inverse(n));
        for (channel, &k) in bins.iter().enumerate() {
            let mut spectrum = forward.make_output_vec();
            forward.process(&mut w[channel * n..][..n].to_vec(), &mut spectrum).unwrap();
            spectrum[usize::from(k)..].fill(Complex::default());
            let mut want = inverse.make_output_vec();
            inverse.process(&mut spectrum, &mut want).unwrap();
            for (got, want) in back[channel * n..][..n].iter().zip(want) {
                assert!((got - want / n as f32).abs() < 2e-3, "channel {channel}: {got} {want}");
            }
        }
    }

    /// The largest bins are the best choice of that many, so they leave less than the lowest; and all of them leave nothing.
    #[test]
    fn the_largest_bins_come_first_and_are_put_back_where_they_were() {
        let n = 60;
        let w = gaussian(3 * n, 5);
        let error = |t: &StoredBranch| squared_error(&w, &reconstruct(t, 3, n));
        let power: Vec<Vec<f64>> = w.chunks(n).map(naive_power).collect();
        for k in [1u16, 4, 31] {
            let top = truncate_top(&w, 3, n, &[k; 3]).unwrap();
            for (power, indices) in power.iter().zip(top.indices.chunks(usize::from(k))) {
                let both = |bin: usize| power[bin] * if bin == 0 || 2 * bin == n { 1.0 } else { 2.0 };
                let kept: Vec<f64> = indices.iter().map(|&bin| both(usize::from(bin))).collect();
                assert!(kept.is_sorted_by(|a, b| *a >= b * (1.0 - 1e-4)), "{kept:?}");
                let least = kept.last().unwrap();
                let left_out = (0..=n / 2).filter(|&bin| !indices.contains(&(bin as u16)));
                assert!(left_out.into_iter().all(|bin| both(bin) <= least * (1.0 + 1e-4)));
            }
            assert!(error(&top) <= error(&truncate(&w, 3, n, &[k; 3]).unwrap()) + 1e-4);
        }
        assert!(error(&truncate_top(&w, 3, n, &[31; 3]).unwrap()) < 1e-4);
    }

    #[test]
    fn storage_of_sixteen_bins_is_the_overhead_the_paper_reports() {
        // Table 4: 2.7% of the 4-bit codes of Llama-2-7B.
        let block = [
            (4096, 4096),
            (4096, 4096),
            (4096, 4096),
            (4096, 4096),
            (11008, 4096),
            (11008, 4096),
            (4096, 11008),
        ];
        let channels: usize = block.iter().map(|(out, _)| out).sum();
        let weights: usize = block.iter().map(|(out, inp)| out * inp).sum();
        assert_eq!((channels, weights), (42_496, 202_375_168));
        let one = truncate(&[1.0; 64], 1, 64, &[16]).unwrap();
        let bits = channels * one.coeffs.len() * 16;
        assert_eq!(format!("{:.2}%", 100.0 * bits as f64 / (4 * weights) as f64), "2.69%");
    }

    #[test]
    fn errors_name_the_channel() {
        let mut w = vec![1.0f32; 4 * 8];
        assert_eq!(
            truncate(&w, 4, 8, &[5, 5, 6, 7]),
            Err(BranchError::TooManyBins { channel: 2, bins: 6, inp: 8, limit: 5 })
        );
        w[8..16].fill(3e4);
        w[24..32].fill(f32::NAN);
        let error = truncate(&w, 4, 8, &[1; 4]).unwrap_err();
        assert!(matches!(error, BranchError::NotRepresentable { channel: 1, item: 0, .. }), "{error}");
        assert!(truncate(&w, 4, 8, &[1, 0, 1, 0]).is_ok());
    }

    #[test]
    fn entropy_of_a_tone_and_of_noise() {
        let n = 576;
        let tone: Vec<f32> = (0..n).map(|i| (TAU * 5.0 * i as f64 / n as f64).cos() as f32).collect();
        assert!(spectral_entropy(&tone, 1, n)[0] < 1e-3);
        assert_eq!(spectral_entropy(&[0.0; 8], 1, 8), [0.0]);
        let entropies = spectral_entropy(&gaussian(200 * n, 5), 200, n);
        let bins = (n / 2 + 1) as f64;
        let normalized = entropies.iter().map(|&v| f64::from(v)).sum::<f64>() / 200.0 / bins.ln();
        let want = 1.0 - (1.0 - 0.577_215_66) / bins.ln();
        assert!((normalized - want).abs() < 2e-3, "{normalized} {want}");
    }

    #[test]
    fn low_frequency_energy_of_a_tone_and_of_noise() {
        let n = 1000;
        let tone: Vec<f32> = (0..n).map(|i| (TAU * 90.0 * i as f64 / n as f64).sin() as f32).collect();
        assert!(low_frequency_energy(&tone, 1, n, 0.2)[0] > 0.999);
        assert!(low_frequency_energy(&tone, 1, n, 0.1)[0] < 1e-3);
        let noise = low_frequency_energy(&gaussian(100 * n, 6), 100, n, 0.2);
        assert!((noise.iter().sum::<f32>() / 100.0 - 0.2).abs() < 5e-3);
        assert_eq!(low_frequency_energy(&[0.0; 8], 1, 8, 0.5), [0.0]);
    }
}
