//! The low-frequency branch of SpecQuant (arXiv 2511.11663, Eqs. 5, 10 and 16) as real linear algebra.
//!
//! Keeping the first k bins of the DFT of a weight row of n inputs is a projection onto the span of
//!
//! ```text
//! 1/√n,   √(2/n) cos(2πmi/n),   √(2/n) sin(2πmi/n)   (m = 1 .. k−1),   and for even n at m = n/2:  (−1)^i/√n
//! ```
//!
//! an orthonormal basis Φ of at most 2k−1 rows. The truncated weight is `W' = C Φ`, so the branch is `x W'ᵀ = (x Φᵀ) Cᵀ`: one
//! thin projection, shared by every layer that reads x, and one thin product per layer with the stored coefficients C.
//! The paper's Eq. 10 leaves out the real part and the factors 1/n at DC and Nyquist and 2/n elsewhere; the orthonormal basis
//! carries them.

use crate::KernelError;
use crate::dense::matmul_nt;
use crate::ops::{twin, widen_f16};
use half::f16;
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Output channels in a panel.
const PANEL: usize = 16;
/// Rows of one task of [`add_branch`]: each expands every panel once.
const ROWS: usize = 64;
/// Multiply-adds below which a second thread does not pay.
const SMALL: usize = 1 << 17;

/// Bins of the half spectrum of n inputs: floor(n/2) + 1.
fn bins_of(n: usize) -> usize {
    n / 2 + 1
}

/// Rows of [`real_basis`]: 2k − 1, less one if the last bin is the Nyquist frequency; 0 for no bins.
///
/// # Panics
/// If k exceeds floor(n/2) + 1.
pub fn basis_rows(n: usize, k: usize) -> usize {
    assert!(k == 0 || (n > 0 && k <= bins_of(n)), "{k} bins of {n} inputs: there are {}", bins_of(n));
    (2 * k).saturating_sub(1).min(n)
}

/// The orthonormal basis of the lowest `k` frequencies of `n` inputs, [[`basis_rows`]`(n, k)`, n]: DC, cos 1, sin 1, cos 2, …
/// The Nyquist frequency, if reached, has no sine. Computed in f64; kept for the life of the process, as a model has few widths.
///
/// # Panics
/// If k exceeds floor(n/2) + 1.
pub fn real_basis(n: usize, k: usize) -> Arc<Vec<f32>> {
    type Cache = Mutex<HashMap<(usize, usize), Arc<Vec<f32>>>>;
    static CACHE: OnceLock<Cache> = OnceLock::new();
    let rows = basis_rows(n, k);
    // A panic elsewhere cannot leave the map half-written, so a poisoned lock is as good as new.
    let mut cache = CACHE.get_or_init(Cache::default).lock().unwrap_or_else(PoisonError::into_inner);
    let make = || {
        let mut basis = vec![0.0f32; rows * n];
        for (row, out) in basis.chunks_exact_mut(n.max(1)).enumerate() {
            let (m, sine) = (row.div_ceil(2), row > 0 && row % 2 == 0);
            let norm = if m == 0 || 2 * m == n { 1.0 } else { 2.0 };
            let norm = (norm / n as f64).sqrt();
            for (i, v) in out.iter_mut().enumerate() {
                // The exact remainder keeps the angle small, hence accurate.
                let angle = (m * i % n) as f64 * (std::f64::consts::TAU / n as f64);
                *v = (norm * if sine { angle.sin() } else { angle.cos() }) as f32;
            }
        }
        Arc::new(basis)
    };
    Arc::clone(cache.entry((n, k)).or_insert_with(make))
}

/// x Φᵀ: the low-frequency coordinates of every row. x: [rows, n]; the result: [rows, [`basis_rows`]`(n, k)`].
///
/// # Panics
/// If x is not [rows, n], or k exceeds floor(n/2) + 1.
pub fn project(x: &[f32], rows: usize, n: usize, k: usize) -> Vec<f32> {
    let r = basis_rows(n, k);
    let mut p = vec![0.0; rows * r];
    if r > 0 {
        matmul_nt(x, &real_basis(n, k), &mut p, rows, n, r, false);
    }
    p
}

/// The coefficients C of the branch, f16, in panels of 16 output channels: [basis rows of the panel's largest k, 16], zero
/// where a channel keeps fewer.
#[derive(Debug, Clone)]
pub struct SpectralCoeffs {
    n: usize,
    out: usize,
    k_max: usize,
    data: Vec<f16>,
    /// Where each panel starts in `data`, and where the last ends.
    starts: Vec<usize>,
}

impl SpectralCoeffs {
    /// Packs the coefficients of `bins.len()` output channels of `n` inputs.
    ///
    /// coeffs: channel after channel, low frequency first, `bins[j]` pairs (re, im): the coordinates with respect to the
    /// cosine and sine rows of [`real_basis`]. The im of DC and of the Nyquist frequency has no row and is ignored.
    ///
    /// # Errors
    /// If a channel keeps more bins than there are, the lengths do not agree or a coefficient is not finite.
    pub fn pack(n: usize, bins: &[u16], coeffs: &[f16]) -> Result<Self, KernelError> {
        let max = if n == 0 { 0 } else { bins_of(n) };
        if let Some(row) = bins.iter().position(|&b| usize::from(b) > max) {
            return Err(KernelError::Bins { row, bins: usize::from(bins[row]), n, max });
        }
        let want = 2 * bins.iter().map(|&b| usize::from(b)).sum::<usize>();
        if coeffs.len() != want {
            return Err(KernelError::Length { what: "spectral coefficients", got: coeffs.len(), want });
        }
        if let Some(index) = coeffs.iter().position(|c| !c.is_finite()) {
            let value = coeffs[index].to_string();
            return Err(KernelError::NotFinite { what: "spectral coefficient", index, value });
        }
        let mut data = Vec::new();
        let mut starts = vec![0];
        let mut rest = coeffs;
        for panel in bins.chunks(PANEL) {
            let base = data.len();
            let k = panel.iter().copied().max().map_or(0, usize::from);
            data.resize(base + basis_rows(n, k) * PANEL, f16::ZERO);
            for (lane, &bins) in panel.iter().enumerate() {
                let (mine, others) = rest.split_at(2 * usize::from(bins));
                rest = others;
                for (m, pair) in mine.chunks_exact(2).enumerate() {
                    data[base + (2 * m).saturating_sub(1) * PANEL + lane] = pair[0];
                    if m > 0 && 2 * m != n {
                        data[base + 2 * m * PANEL + lane] = pair[1];
                    }
                }
            }
            starts.push(data.len());
        }
        let k_max = bins.iter().copied().max().map_or(0, usize::from);
        Ok(Self { n, out: bins.len(), k_max, data, starts })
    }

    /// The largest number of bins of any channel: the k to [`project`] with.
    pub fn k_max(&self) -> usize {
        self.k_max
    }

    /// Input width n.
    pub fn in_features(&self) -> usize {
        self.n
    }

    /// Output channels.
    pub fn out_features(&self) -> usize {
        self.out
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.data[..]) + size_of_val(&self.starts[..])
    }

    /// The panel's coefficients [rows, 16] in f32, written over `buf`.
    fn expand<'a>(&self, panel: usize, buf: &'a mut Vec<f32>) -> &'a [f32] {
        let c = &self.data[self.starts[panel]..self.starts[panel + 1]];
        buf.resize(c.len(), 0.0);
        widen_f16(c, buf);
        buf
    }
}

/// y += p C: adds the low-frequency branch. p: [rows, p_stride], of which the first [`basis_rows`]`(n, k_max)` columns count;
/// y: [rows, out]. The result does not depend on the number of threads.
///
/// # Panics
/// If a length does not follow from the shape, or p has too few columns.
pub fn add_branch(p: &[f32], rows: usize, p_stride: usize, c: &SpectralCoeffs, y: &mut [f32]) {
    let used = basis_rows(c.n, c.k_max);
    assert_eq!(p.len(), rows * p_stride, "add_branch: p is not [{rows}, {p_stride}]");
    assert!(p_stride >= used, "add_branch: p has {p_stride} columns, the coefficients need {used}");
    assert_eq!(y.len(), rows * c.out, "add_branch: y is not [{rows}, {}]", c.out);
    if rows == 0 || c.data.is_empty() {
        return;
    }
    let panels = c.starts.len() - 1;
    if rows * c.data.len() < SMALL {
        add_panels(p, rows, p_stride, c, 0..panels, y, c.out);
    } else if rows == 1 {
        let step = panels.div_ceil(8);
        y.par_chunks_mut(step * PANEL).enumerate().for_each(|(i, y)| {
            let width = y.len();
            add_panels(p, 1, p_stride, c, i * step..panels.min((i + 1) * step), y, width);
        });
    } else {
        let tasks = y.par_chunks_mut(ROWS * c.out).zip(p.par_chunks(ROWS * p_stride));
        tasks.for_each(|(y, p)| add_panels(p, y.len() / c.out, p_stride, c, 0..panels, y, c.out));
    }
}

/// Adds some panels; y [rows, width] starts at the first of them.
fn add_panels(
    p: &[f32],
    rows: usize,
    p_stride: usize,
    c: &SpectralCoeffs,
    panels: std::ops::Range<usize>,
    y: &mut [f32],
    width: usize,
) {
    let mut buf = Vec::new();
    let first = panels.start;
    for panel in panels {
        let coeffs = c.expand(panel, &mut buf);
        let at = (panel - first) * PANEL;
        add_panel(p, rows, p_stride, coeffs, &mut y[at..], width, PANEL.min(width - at));
    }
}

/// R rows from `t`: accumulators start at y and take one basis row after another.
#[inline(always)]
fn add_tile<const R: usize>(
    p: &[f32],
    p_stride: usize,
    c: &[f32],
    y: &mut [f32],
    width: usize,
    lanes: usize,
    t: usize,
) {
    let mut acc = [[0.0f32; PANEL]; R];
    let depth = c.len() / PANEL;
    let p: [&[f32]; R] = std::array::from_fn(|i| &p[(t + i) * p_stride..][..depth]);
    for i in 0..R {
        acc[i][..lanes].copy_from_slice(&y[(t + i) * width..][..lanes]);
    }
    for (r, c) in c.chunks_exact(PANEL).enumerate() {
        for i in 0..R {
            let p = p[i][r];
            for l in 0..PANEL {
                acc[i][l] = p.mul_add(c[l], acc[i][l]);
            }
        }
    }
    for i in 0..R {
        y[(t + i) * width..][..lanes].copy_from_slice(&acc[i][..lanes]);
    }
}

#[inline(always)]
fn add_panel_body(
    p: &[f32],
    rows: usize,
    p_stride: usize,
    c: &[f32],
    y: &mut [f32],
    width: usize,
    lanes: usize,
) {
    let whole = rows / 4 * 4;
    for t in (0..whole).step_by(4) {
        add_tile::<4>(p, p_stride, c, y, width, lanes, t);
    }
    for t in whole..rows {
        add_tile::<1>(p, p_stride, c, y, width, lanes, t);
    }
}

twin! {
    /// y [rows, lanes] (rows `width` apart) += p · c, with c [.., 16].
    fn add_panel = add_panel_body(
        p: &[f32], rows: usize, p_stride: usize, c: &[f32], y: &mut [f32], width: usize, lanes: usize
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_noise as noise;
    use std::f64::consts::TAU;

    /// Real and imaginary part of bin m, by definition.
    fn dft(x: &[f32], m: usize) -> (f64, f64) {
        let w = -TAU * m as f64 / x.len() as f64;
        x.iter().enumerate().fold((0.0, 0.0), |(re, im), (i, &v)| {
            let (s, c) = (w * i as f64).sin_cos();
            (re + f64::from(v) * c, im + f64::from(v) * s)
        })
    }

    /// Coordinates of x with respect to the basis, as the (re, im) pairs that `pack` takes.
    fn pairs(x: &[f32], k: usize) -> Vec<f16> {
        let n = x.len();
        let p = project(x, 1, n, k);
        let mut out = Vec::new();
        for m in 0..k {
            let im = if m == 0 || 2 * m == n { 9.0 } else { p[2 * m] };
            out.extend([f16::from_f32(p[(2 * m).saturating_sub(1)]), f16::from_f32(im)]);
        }
        out
    }

    #[test]
    fn basis_is_orthonormal_and_the_full_one_preserves_energy() {
        for n in [1, 2, 3, 8, 9, 30, 64, 65] {
            let k = n / 2 + 1;
            let (b, rows) = (real_basis(n, k), basis_rows(n, k));
            assert_eq!(rows, n);
            assert_eq!(b.len(), n * n);
            for i in 0..rows {
                for j in 0..rows {
                    let dot: f64 = (0..n).map(|e| f64::from(b[i * n + e]) * f64::from(b[j * n + e])).sum();
                    let want = if i == j { 1.0 } else { 0.0 };
                    assert!((dot - want).abs() < 1e-6, "n {n}: {i}·{j} = {dot}");
                }
            }
            let x = noise(n, n as u64);
            let energy = |v: &[f32]| v.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
            assert!((energy(&project(&x, 1, n, k)) - energy(&x)).abs() < 1e-5);
        }
        assert!(Arc::ptr_eq(&real_basis(30, 4), &real_basis(30, 4)));
        assert_eq!(
            (basis_rows(30, 0), basis_rows(30, 1), basis_rows(30, 16), basis_rows(31, 16)),
            (0, 1, 30, 31)
        );
        assert!(project(&[], 0, 30, 2).is_empty() && project(&[1.0; 30], 1, 30, 0).is_empty());
    }

    #[test]
    fn projection_is_the_scaled_dft() {
        for n in [24, 25] {
            let (k, x) = (n / 2 + 1, noise(n, 2));
            let p = project(&x, 1, n, k);
            for m in 0..k {
                let (re, im) = dft(&x, m);
                let norm =
                    if m == 0 || 2 * m == n { (1.0 / n as f64).sqrt() } else { (2.0 / n as f64).sqrt() };
                assert!((f64::from(p[(2 * m).saturating_sub(1)]) - re * norm).abs() < 1e-5);
                if m > 0 && 2 * m != n {
                    assert!((f64::from(p[2 * m]) + im * norm).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn truncated_spectrum_equals_basis_times_coefficients() {
        for (n, k) in [(24, 1), (24, 5), (24, 13), (25, 6), (25, 13)] {
            let x = noise(n, 7);
            let p = project(&x, 1, n, k);
            let basis = real_basis(n, k);
            for i in 0..n {
                let mut want = 0.0;
                for m in 0..k {
                    let (re, im) = dft(&x, m);
                    let weight = if m == 0 || 2 * m == n { 1.0 } else { 2.0 } / n as f64;
                    let (s, c) = (TAU * (m * i) as f64 / n as f64).sin_cos();
                    want += weight * (re * c - im * s);
                }
                let got: f64 =
                    p.iter().enumerate().map(|(r, &c)| f64::from(c) * f64::from(basis[r * n + i])).sum();
                assert!((got - want).abs() < 1e-5, "n {n} k {k} at {i}");
                if k == n / 2 + 1 {
                    assert!((got - f64::from(x[i])).abs() < 1e-5);
                }
            }
        }
    }

    /// The branch by the long way round: W' = C Φ in f64, then x W'ᵀ.
    fn naive(x: &[f32], rows: usize, n: usize, bins: &[u16], coeffs: &[f16], y: &[f32]) -> Vec<f64> {
        let mut at = 0;
        let mut want: Vec<f64> = y.iter().map(|&v| f64::from(v)).collect();
        for (j, &bins) in bins.iter().enumerate() {
            let mut w = vec![0.0f64; n];
            for m in 0..usize::from(bins) {
                let (re, im) = (f64::from(coeffs[at].to_f32()), f64::from(coeffs[at + 1].to_f32()));
                at += 2;
                let edge = m == 0 || 2 * m == n;
                let norm = (if edge { 1.0 } else { 2.0 } / n as f64).sqrt();
                for (i, w) in w.iter_mut().enumerate() {
                    let (s, c) = (TAU * (m * i) as f64 / n as f64).sin_cos();
                    *w += norm * (re * c + if edge { 0.0 } else { im * s });
                }
            }
            for t in 0..rows {
                want[t * bins_len(y, rows) + j] +=
                    (0..n).map(|i| f64::from(x[t * n + i]) * w[i]).sum::<f64>();
            }
        }
        want
    }

    fn bins_len(y: &[f32], rows: usize) -> usize {
        y.len() / rows
    }

    #[test]
    fn branch_matches_f64_for_ragged_bins() {
        for (n, out, rows, kind) in [
            (24, 1, 1, 1),
            (24, 35, 5, 2),
            (25, 16, 4, 2),
            (64, 40, 131, 2),
            (576, 700, 1, 3),
            (24, 20, 3, 0),
        ] {
            let max = n / 2 + 1;
            let bins: Vec<u16> = (0..out)
                .map(|j| match kind {
                    0 => 0,
                    1 => max as u16,
                    2 => {
                        if (16..32).contains(&j) {
                            0
                        } else {
                            (j * 7 % (max + 1)) as u16
                        }
                    }
                    _ => 16,
                })
                .collect();
            let count = 2 * bins.iter().map(|&b| usize::from(b)).sum::<usize>();
            let coeffs: Vec<f16> = noise(count, 3).iter().map(|&v| f16::from_f32(v)).collect();
            let c = SpectralCoeffs::pack(n, &bins, &coeffs).unwrap();
            assert_eq!(c.k_max(), bins.iter().copied().max().map_or(0, usize::from));
            let (x, y0) = (noise(rows * n, 4), noise(rows * out, 5));
            let k = max.min(c.k_max() + 1);
            let (p, stride) = (project(&x, rows, n, k), basis_rows(n, k));
            let run = |threads| {
                let mut y = y0.clone();
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| add_branch(&p, rows, stride, &c, &mut y));
                y
            };
            let y = run(1);
            assert_eq!(y, run(2));
            for (e, want) in naive(&x, rows, n, &bins, &coeffs, &y0).into_iter().enumerate() {
                assert!((f64::from(y[e]) - want).abs() < 2e-5, "{n} {out} {rows} at {e}: {} {want}", y[e]);
            }
            // The scalar twin.
            let mut twin = y0.clone();
            let mut buf = Vec::new();
            for panel in 0..out.div_ceil(PANEL) {
                let lanes = PANEL.min(out - panel * PANEL);
                let coeffs = c.expand(panel, &mut buf);
                add_panel_body(&p, rows, stride, coeffs, &mut twin[panel * PANEL..], out, lanes);
            }
            assert_eq!(y, twin);
        }
    }

    #[test]
    fn all_bins_give_the_whole_layer() {
        for n in [30, 31] {
            let (k, out) = (n / 2 + 1, 18);
            let (w, x) = (noise(out * n, 1), noise(3 * n, 2));
            let coeffs: Vec<f16> = w.chunks(n).flat_map(|row| pairs(row, k)).collect();
            let c = SpectralCoeffs::pack(n, &vec![k as u16; out], &coeffs).unwrap();
            let mut y = vec![0.0; 3 * out];
            add_branch(&project(&x, 3, n, k), 3, basis_rows(n, k), &c, &mut y);
            let mut want = vec![0.0; 3 * out];
            matmul_nt(&x, &w, &mut want, 3, n, out, false);
            for (a, b) in y.iter().zip(&want) {
                assert!((a - b).abs() < 5e-3, "{a} {b}");
            }
        }
    }

    #[test]
    fn pack_refuses_what_does_not_fit() {
        let h = |v: f32| f16::from_f32(v);
        assert!(matches!(
            SpectralCoeffs::pack(8, &[1, 6], &[]),
            Err(KernelError::Bins { row: 1, max: 5, .. })
        ));
        assert!(matches!(SpectralCoeffs::pack(8, &[1], &[]), Err(KernelError::Length { want: 2, .. })));
        let bad = SpectralCoeffs::pack(8, &[1], &[h(1.0), h(f32::NAN)]);
        assert!(matches!(bad, Err(KernelError::NotFinite { index: 1, .. })));
        assert_eq!(SpectralCoeffs::pack(8, &[0, 0], &[]).unwrap().k_max(), 0);
    }
}
