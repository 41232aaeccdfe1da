//! The wider branch beside the integer product: a few directions of the input, kept in floating point.
//!
//! The branch's weight is `W' = C P`, with a [`Basis`] P [r, in] that all layers with one input share and coefficients C [out, r] of each layer,
//! so it is `x W'ᵀ = (x Pᵀ) Cᵀ`: one thin projection for every input, and one thin product for every layer (arXiv 2511.11663, Eq. 16).
//!
//! SpecQuant's own basis is the low end of the discrete Fourier transform (Eqs. 5 and 10). Keeping the first k bins of the DFT of a weight row of
//! n inputs is a projection onto the span of
//!
//! ```text
//! 1/√n,   √(2/n) cos(2πmi/n),   √(2/n) sin(2πmi/n)   (m = 1 .. k−1),   and for even n at m = n/2:  (−1)^i/√n
//! ```
//!
//! an orthonormal basis of at most 2k−1 rows. The paper's Eq. 10 leaves out the real part and the factors 1/n at DC and Nyquist and
//! 2/n elsewhere; the orthonormal basis carries them. The cosine transform, single inputs and stored directions (low-rank
//! branches) are other bases of the same product.

use crate::buffer::Buffer;
use crate::dense::matmul_nt;
use crate::ops::{twin, widen_f16};
use crate::{KernelError, for_each_chunk};
use half::f16;
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Output channels in a panel.
const PANEL: usize = 16;
/// Rows of one task of [`add_branch`]: each expands every panel once.
const ROWS: usize = 64;
/// Multiply-adds below which a second thread does not pay.
const SMALL: usize = 1 << 17;

/// The directions P [r, n] that inputs are projected on, the most useful first.
#[derive(Debug, Clone, PartialEq)]
pub enum Basis {
    /// The real Fourier basis of n inputs by rising frequency, n rows: DC, cos 1, sin 1, cos 2, … An even n ends with the Nyquist
    /// frequency, which has no sine.
    Fourier(usize),
    /// The cosine transform DCT-II of n inputs by rising frequency, n rows.
    Dct(usize),
    /// Single inputs.
    Inputs {
        /// Width n.
        n: usize,
        /// Their numbers, below n.
        indices: Vec<u32>,
    },
    /// Any directions.
    Dense {
        /// Width n.
        n: usize,
        /// [r, n].
        rows: Vec<f32>,
    },
}

impl Basis {
    /// Input width n.
    pub fn in_features(&self) -> usize {
        match self {
            Basis::Fourier(n) | Basis::Dct(n) | Basis::Inputs { n, .. } | Basis::Dense { n, .. } => *n,
        }
    }

    /// Rows there are.
    pub fn len(&self) -> usize {
        match self {
            Basis::Fourier(n) | Basis::Dct(n) => *n,
            Basis::Inputs { indices, .. } => indices.len(),
            Basis::Dense { n, rows } => rows.len() / (*n).max(1),
        }
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Resident bytes; those of computed bases are shared by all that have them.
    pub fn bytes(&self) -> usize {
        match self {
            Basis::Fourier(_) | Basis::Dct(_) => 0,
            Basis::Inputs { indices, .. } => size_of_val(indices.as_slice()),
            Basis::Dense { rows, .. } => size_of_val(rows.as_slice()),
        }
    }

    /// x Pᵀ for the first `r` rows of P: the coordinates of every row of x. x: [rows, n]; the result: [rows, r].
    ///
    /// # Panics
    /// If x is not [rows, n], or there are fewer than r rows.
    pub fn project(&self, x: &[f32], rows: usize, r: usize) -> Buffer<f32> {
        let n = self.in_features();
        assert_eq!(x.len(), rows * n, "project: x is not [{rows}, {n}]");
        assert!(r <= self.len(), "project: {r} of {} basis rows", self.len());
        let mut p = Buffer::new(rows * r);
        match self {
            _ if r == 0 => {}
            Basis::Inputs { indices, .. } => {
                for (p, x) in p.chunks_exact_mut(r).zip(x.chunks_exact(n)) {
                    p.iter_mut().zip(indices).for_each(|(p, i)| *p = x[*i as usize]);
                }
            }
            Basis::Dense { rows: basis, .. } => matmul_nt(x, &basis[..r * n], &mut p, rows, n, r, false),
            _ => matmul_nt(x, &self.computed(r)[..r * n], &mut p, rows, n, r, false),
        }
        p
    }

    /// The first `r` rows of P, [r, n]. Those of a computed basis are in f64 precision until they are rounded, and kept for the life of
    /// the process, as a model has few widths.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn rows(&self, r: usize) -> Cow<'_, [f32]> {
        assert!(r <= self.len(), "{r} of {} basis rows", self.len());
        match self {
            Basis::Dense { n, rows } => Cow::Borrowed(&rows[..r * n]),
            Basis::Inputs { n, indices } => {
                let mut rows = vec![0.0; r * n];
                rows.chunks_exact_mut((*n).max(1)).zip(indices).for_each(|(row, &i)| row[i as usize] = 1.0);
                Cow::Owned(rows)
            }
            Basis::Fourier(n) | Basis::Dct(n) => Cow::Owned(self.computed(r)[..r * n].to_vec()),
        }
    }

    /// At least the first `r` rows of a computed basis.
    fn computed(&self, r: usize) -> Arc<Vec<f32>> {
        type Cache = Mutex<HashMap<(bool, usize), Arc<Vec<f32>>>>;
        static CACHE: OnceLock<Cache> = OnceLock::new();
        let (fourier, n) = (matches!(self, Basis::Fourier(_)), self.in_features());
        // A panic elsewhere cannot leave the map half-written, so a poisoned lock is as good as new.
        let cache = || CACHE.get_or_init(Cache::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = cache().get(&(fourier, n)).filter(|rows| rows.len() >= r * n) {
            return Arc::clone(known);
        }
        // Not under the lock: the rows are computed in parallel, and a worker may take up other work that wants it.
        let mut basis = vec![0.0f32; r * n];
        basis.par_chunks_exact_mut(n.max(1)).enumerate().for_each(|(row, out)| {
            let (m, sine) = if fourier { (row.div_ceil(2), row > 0 && row % 2 == 0) } else { (row, false) };
            let constant = m == 0 || fourier && 2 * m == n;
            let norm = (if constant { 1.0 } else { 2.0 } / n as f64).sqrt();
            for (i, v) in out.iter_mut().enumerate() {
                // The exact remainder keeps the angle small, hence accurate.
                let turns = if fourier {
                    (m * i % n) as f64 / n as f64
                } else {
                    (m * (2 * i + 1) % (4 * n)) as f64 / (4 * n) as f64
                };
                let angle = turns * std::f64::consts::TAU;
                *v = (norm * if sine { angle.sin() } else { angle.cos() }) as f32;
            }
        });
        let basis = Arc::new(basis);
        let mut cache = cache();
        let kept = cache.entry((fourier, n)).or_insert_with(|| Arc::clone(&basis));
        if kept.len() < basis.len() {
            *kept = Arc::clone(&basis);
        }
        basis
    }
}

/// Rows of [`Basis::Fourier`] that the lowest `k` bins span: 2k − 1, less one if the last is the Nyquist frequency; 0 for no bins.
pub fn fourier_rows(n: usize, k: usize) -> usize {
    (2 * k).saturating_sub(1).min(n)
}

/// The coefficients C of the branch, f16, in panels of 16 output channels: [basis rows that the panel uses, 16], zero where a
/// channel has none.
#[derive(Debug, Clone)]
pub struct BranchCoeffs {
    out: usize,
    rank: usize,
    data: Vec<f16>,
    /// Where each panel starts in `data`, and where the last ends.
    starts: Vec<usize>,
}

impl BranchCoeffs {
    /// Packs the coefficients of `counts.len()` output channels.
    ///
    /// counts: coefficients of each channel; rows: the basis row that each belongs to, channel after channel, below `len`; coeffs: as rows.
    ///
    /// # Errors
    /// If a row is not below `len`, the lengths do not agree or a coefficient is not finite.
    pub fn pack(len: usize, counts: &[usize], rows: &[u32], coeffs: &[f16]) -> Result<Self, KernelError> {
        let want = counts.iter().sum();
        for (what, got) in [("branch coefficients", coeffs.len()), ("basis rows of coefficients", rows.len())]
        {
            if got != want {
                return Err(KernelError::Length { what, got, want });
            }
        }
        if let Some(&row) = rows.iter().find(|&&r| r as usize >= len) {
            return Err(KernelError::BasisRow { row: row as usize, len });
        }
        if let Some(index) = coeffs.iter().position(|c| !c.is_finite()) {
            let value = coeffs[index].to_string();
            return Err(KernelError::NotFinite { what: "branch coefficient", index, value });
        }
        let (mut data, mut starts, mut rank) = (Vec::new(), vec![0], 0);
        let mut rest = rows.iter().zip(coeffs);
        for panel in counts.chunks(PANEL) {
            let mine: Vec<Vec<(usize, f16)>> = panel
                .iter()
                .map(|&count| rest.by_ref().take(count).map(|(&r, &c)| (r as usize, c)).collect())
                .collect();
            let depth = mine.iter().flatten().map(|(row, _)| row + 1).max().unwrap_or(0);
            let base = data.len();
            data.resize(base + depth * PANEL, f16::ZERO);
            for (lane, entries) in mine.iter().enumerate() {
                entries.iter().for_each(|(row, c)| data[base + row * PANEL + lane] = *c);
            }
            rank = rank.max(depth);
            starts.push(data.len());
        }
        Ok(Self { out: counts.len(), rank, data, starts })
    }

    /// Basis rows that the layer uses: the r to [`Basis::project`] with.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Output channels.
    pub fn out_features(&self) -> usize {
        self.out
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.data[..]) + size_of_val(&self.starts[..])
    }

    /// The panel's coefficients [rows, 16] in f32.
    fn expand(&self, panel: usize) -> Buffer<f32> {
        let c = &self.data[self.starts[panel]..self.starts[panel + 1]];
        let mut wide = Buffer::new(c.len());
        widen_f16(c, &mut wide);
        wide
    }
}

/// y += p Cᵀ: adds the branch. p: [rows, p_stride], of which the first [`BranchCoeffs::rank`] columns count; y: [rows, out]. The
/// result does not depend on the number of threads.
///
/// # Panics
/// If a length does not follow from the shape, or p has too few columns.
pub fn add_branch(p: &[f32], rows: usize, p_stride: usize, c: &BranchCoeffs, y: &mut [f32]) {
    let used = c.rank;
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
        for_each_chunk(y, step * PANEL, |i, y| {
            let width = y.len();
            add_panels(p, 1, p_stride, c, i * step..panels.min((i + 1) * step), y, width);
        });
    } else {
        for_each_chunk(y, ROWS * c.out, |i, y| {
            let rows = y.len() / c.out;
            let p = &p[i * ROWS * p_stride..][..rows * p_stride];
            add_panels(p, rows, p_stride, c, 0..panels, y, c.out);
        });
    }
}

/// Adds some panels; y [rows, width] starts at the first of them.
fn add_panels(
    p: &[f32],
    rows: usize,
    p_stride: usize,
    c: &BranchCoeffs,
    panels: std::ops::Range<usize>,
    y: &mut [f32],
    width: usize,
) {
    let first = panels.start;
    for panel in panels {
        let coeffs = c.expand(panel);
        let at = (panel - first) * PANEL;
        add_panel(p, rows, p_stride, &coeffs, &mut y[at..], width, PANEL.min(width - at));
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

    fn assert_orthonormal(rows: &[f32], n: usize) {
        for (i, a) in rows.chunks(n).enumerate() {
            for (j, b) in rows.chunks(n).enumerate() {
                let dot: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let want = if i == j { 1.0 } else { 0.0 };
                assert!((dot - want).abs() < 1e-6, "n {n}: {i}·{j} = {dot}");
            }
        }
    }

    #[test]
    fn computed_bases_are_orthonormal_and_the_full_ones_preserve_energy() {
        for n in [1, 2, 3, 8, 9, 30, 64, 65] {
            for basis in [Basis::Fourier(n), Basis::Dct(n)] {
                assert_eq!((basis.len(), basis.in_features(), basis.bytes()), (n, n, 0));
                assert_orthonormal(&basis.rows(n), n);
                let x = noise(n, n as u64);
                let energy = |v: &[f32]| v.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
                assert!((energy(&basis.project(&x, 1, n)) - energy(&x)).abs() < 1e-5);
                assert_eq!(basis.rows(n.div_ceil(2))[..], basis.rows(n)[..n.div_ceil(2) * n]);
            }
        }
        assert!(Arc::ptr_eq(&Basis::Dct(30).computed(4), &Basis::Dct(30).computed(4)));
        assert_eq!([0, 1, 16].map(|k| fourier_rows(30, k)), [0, 1, 30]);
        assert_eq!(fourier_rows(31, 16), 31);
        let basis = Basis::Fourier(30);
        assert!(basis.project(&[], 0, 2).is_empty() && basis.project(&[1.0; 30], 1, 0).is_empty());
    }

    #[test]
    fn fourier_coordinates_are_the_scaled_dft() {
        for n in [24, 25] {
            let x = noise(n, 2);
            let p = Basis::Fourier(n).project(&x, 1, n);
            for m in 0..=n / 2 {
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
    fn cosine_coordinates_are_those_of_scipy() {
        // scipy.fft.dct([1, 2, 4, 8], type=2, norm="ortho")
        let want = [7.5, -5.114_166_5, 1.5, -0.587_623_4];
        for (got, want) in Basis::Dct(4).project(&[1.0, 2.0, 4.0, 8.0], 1, 4).iter().zip(want) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }

    #[test]
    fn inputs_and_stored_directions_are_taken_as_they_are() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let inputs = Basis::Inputs { n: 3, indices: vec![2, 0] };
        assert_eq!(inputs.project(&x, 2, 2)[..], [3.0, 1.0, 6.0, 4.0]);
        assert_eq!(inputs.project(&x, 2, 1)[..], [3.0, 6.0]);
        let dense = Basis::Dense { n: 3, rows: inputs.rows(2).into_owned() };
        assert_eq!((dense.len(), dense.project(&x, 2, 2)), (2, inputs.project(&x, 2, 2)));
    }

    /// The branch by the long way round: W' = C P in f64, then x W'ᵀ.
    fn naive(
        x: &[f32],
        basis: &Basis,
        counts: &[usize],
        rows: &[u32],
        coeffs: &[f16],
        y: &[f32],
    ) -> Vec<f64> {
        let n = basis.in_features();
        let all = basis.rows(basis.len());
        let mut want: Vec<f64> = y.iter().map(|&v| f64::from(v)).collect();
        let mut entries = rows.iter().zip(coeffs);
        for (j, &count) in counts.iter().enumerate() {
            let mut w = vec![0.0f64; n];
            for (row, c) in entries.by_ref().take(count) {
                let row = &all[*row as usize * n..][..n];
                w.iter_mut().zip(row).for_each(|(w, b)| *w += f64::from(c.to_f32()) * f64::from(*b));
            }
            for (want, x) in want.chunks_mut(counts.len()).zip(x.chunks(n)) {
                want[j] += x.iter().zip(&w).map(|(x, w)| f64::from(*x) * w).sum::<f64>();
            }
        }
        want
    }

    #[test]
    fn branch_matches_f64_for_ragged_and_scattered_rows() {
        for (n, out, t, kind) in [
            (24, 1, 1, 1),
            (24, 35, 5, 2),
            (25, 16, 4, 2),
            (64, 40, 131, 2),
            (576, 700, 1, 3),
            (24, 20, 3, 0),
            (30, 37, 9, 4),
        ] {
            let basis = if kind == 2 { Basis::Dct(n) } else { Basis::Fourier(n) };
            let counts: Vec<usize> = (0..out)
                .map(|j| match kind {
                    0 => 0,
                    1 => n,
                    2 if (16..32).contains(&j) => 0,
                    2 => j * 7 % (n + 1),
                    3 => 31,
                    _ => 5,
                })
                .collect();
            // Prefixes, but for the last kind: every third row from somewhere.
            let rows: Vec<u32> = counts
                .iter()
                .enumerate()
                .flat_map(|(j, &c)| {
                    (0..c).map(move |i| if kind == 4 { (j % 16 + 3 * i) % 30 } else { i } as u32)
                })
                .collect();
            let coeffs: Vec<f16> = noise(rows.len(), 3).iter().map(|&v| f16::from_f32(v)).collect();
            let c = BranchCoeffs::pack(n, &counts, &rows, &coeffs).unwrap();
            assert_eq!(c.rank(), rows.iter().max().map_or(0, |&r| r as usize + 1));
            let (x, y0) = (noise(t * n, 4), noise(t * out, 5));
            let stride = n.min(c.rank() + 1);
            let p = basis.project(&x, t, stride);
            let run = |threads| {
                let mut y = y0.clone();
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| add_branch(&p, t, stride, &c, &mut y));
                y
            };
            let y = run(1);
            assert_eq!(y, run(2));
            for (e, want) in naive(&x, &basis, &counts, &rows, &coeffs, &y0).into_iter().enumerate() {
                assert!((f64::from(y[e]) - want).abs() < 3e-5, "{n} {out} {t} at {e}: {} {want}", y[e]);
            }
            // The scalar twin.
            let mut twin = y0.clone();
            for panel in 0..out.div_ceil(PANEL) {
                let lanes = PANEL.min(out - panel * PANEL);
                let coeffs = c.expand(panel);
                add_panel_body(&p, t, stride, &coeffs, &mut twin[panel * PANEL..], out, lanes);
            }
            assert_eq!(y, twin);
        }
    }

    #[test]
    fn all_rows_give_the_whole_layer() {
        for basis in [Basis::Fourier(30), Basis::Fourier(31), Basis::Dct(30)] {
            let (n, out) = (basis.len(), 18);
            let (w, x) = (noise(out * n, 1), noise(3 * n, 2));
            let coeffs: Vec<f16> = basis.project(&w, out, n).iter().map(|&v| f16::from_f32(v)).collect();
            let rows: Vec<u32> = (0..out).flat_map(|_| 0..n as u32).collect();
            let c = BranchCoeffs::pack(n, &vec![n; out], &rows, &coeffs).unwrap();
            let mut y = vec![0.0; 3 * out];
            add_branch(&basis.project(&x, 3, n), 3, n, &c, &mut y);
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
            BranchCoeffs::pack(8, &[1, 1], &[7, 8], &[h(1.0); 2]),
            Err(KernelError::BasisRow { row: 8, len: 8 })
        ));
        assert!(matches!(BranchCoeffs::pack(8, &[1], &[0], &[]), Err(KernelError::Length { want: 1, .. })));
        let bad = BranchCoeffs::pack(8, &[2], &[0, 1], &[h(1.0), h(f32::NAN)]);
        assert!(matches!(bad, Err(KernelError::NotFinite { index: 1, .. })));
        assert_eq!(BranchCoeffs::pack(8, &[0, 0], &[], &[]).unwrap().rank(), 0);
    }
}
