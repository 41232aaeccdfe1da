//! The wider branch beside the integer product: a few directions of the input, kept in floating point.
//!
//! The branch's weight is `W' = C P`, with a [`Basis`](crate::Basis) P [r, in] that all layers with one input share and coefficients C [out, r] of each layer,
//! so it is `x W'ᵀ = (x Pᵀ) Cᵀ`: one thin projection for every input, and one thin product for every layer (arXiv 2511.11663, Eq. 16), which a rectangle
//! of the integer product is finished with while it is in a core's caches.

use super::grid::{Grid, Rect};
use super::{ROWS, TILE_ROWS};
use crate::isa::with_token;
use crate::packed_dense::{Product, Tile};
use crate::parallel::for_each_index;
use crate::weights::PANEL;
use crate::{Isa, KernelError};
use half::f16;
use std::ops::Range;

/// The coefficients C of the branch, f16, in panels of 16 output channels: [basis rows that the panel uses, 16], zero where a
/// channel has none.
#[derive(Debug, Clone)]
pub struct BranchCoeffs {
    out: usize,
    rank: usize,
    data: Vec<[f16; PANEL]>,
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
            data.resize(base + depth, [f16::ZERO; PANEL]);
            for (lane, entries) in mine.iter().enumerate() {
                entries.iter().for_each(|(row, c)| data[base + row][lane] = *c);
            }
            rank = rank.max(depth);
            starts.push(data.len());
        }
        Ok(Self { out: counts.len(), rank, data, starts })
    }

    /// Basis rows that the layer uses: the r to [`Basis::project`](crate::Basis::project) with.
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
}

/// What a branch adds to a product: `p Cᵀ`.
#[derive(Debug, Clone, Copy)]
pub struct BranchPart<'a> {
    /// x Pᵀ, the rows' coordinates, `[rows, stride]`, of which the first [`BranchCoeffs::rank`] columns count.
    pub p: &'a [f32],
    /// How far the coordinates of two rows lie apart.
    pub stride: usize,
    /// C.
    pub coeffs: &'a BranchCoeffs,
}

impl BranchPart<'_> {
    /// # Panics
    /// If lengths do not follow from a product `[rows, out]`, or there are too few columns.
    pub(super) fn check(&self, rows: usize, out: usize) {
        let (stride, used) = (self.stride, self.coeffs.rank);
        assert_eq!(self.coeffs.out, out, "branch: outputs of the coefficients");
        assert_eq!(self.p.len(), rows * stride, "branch: p is not [{rows}, {stride}]");
        assert!(stride >= used, "branch: p has {stride} columns, the coefficients need {used}");
    }
}

/// Adds the branch to y, `[rows, out]`. The result depends neither on the number of threads nor on the instruction set, nor that of a row on the others.
///
/// # Panics
/// If a length does not follow from the shape, or there are too few columns.
pub fn add_branch(branch: BranchPart, rows: usize, y: &mut [f32]) {
    add_branch_with(Isa::active(), branch, rows, y);
}

fn add_branch_with(isa: Isa, branch: BranchPart, rows: usize, y: &mut [f32]) {
    let BranchCoeffs { out, rank, .. } = *branch.coeffs;
    branch.check(rows, out);
    let grid = Grid::new(y, [rows, out, rank.max(1)], ROWS, TILE_ROWS);
    with_token!(isa, token => for_each_index(grid.len(), |i| {
        // SAFETY: every rectangle is taken once.
        let mut rect = unsafe { grid.rect(i) };
        let panels = rect.col / PANEL..(rect.col + rect.width).div_ceil(PANEL);
        add_to_panels(token, branch, &mut rect, 0, panels);
    }));
}

/// Adds the branch to some panels of a rectangle, the first of which is at column `col` of it: every sum begins with what is there and takes one basis row after
/// the other.
pub(super) fn add_to_panels(
    token: impl Tile,
    branch: BranchPart,
    rect: &mut Rect,
    mut col: usize,
    panels: Range<usize>,
) {
    let BranchPart { p, stride, coeffs } = branch;
    let depth = |panel: usize| coeffs.starts[panel + 1] - coeffs.starts[panel];
    let mut first = panels.start;
    while first < panels.end {
        // Panels of one depth are one product.
        let end = (first..panels.end).find(|&panel| depth(panel) != depth(first)).unwrap_or(panels.end);
        let width = ((end - first) * PANEL).min(rect.width - col);
        if depth(first) > 0 {
            let product = Product {
                x: &p[rect.row * stride..],
                pitch: stride,
                panels: coeffs.data[coeffs.starts[first]..coeffs.starts[end]].as_flattened(),
                n: width,
                k: depth(first),
                ldy: rect.stride,
                accumulate: true,
            };
            // SAFETY: these rows and columns are the rectangle's.
            unsafe { product.block(token, 0..rect.rows, 0..end - first, rect.at(col)) };
        }
        (first, col) = (end, col + width);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_noise as noise;
    use crate::{Basis, IntProduct, PackedWeights, matmul_int_with, matmul_nt};

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
                pool.install(|| add_branch(BranchPart { p: &p, stride, coeffs: &c }, t, &mut y));
                y
            };
            let y = run(1);
            assert_eq!(y, run(2));
            for (e, want) in naive(&x, &basis, &counts, &rows, &coeffs, &y0).into_iter().enumerate() {
                assert!((f64::from(y[e]) - want).abs() < 3e-5, "{n} {out} {t} at {e}: {} {want}", y[e]);
            }
            // Every instruction set, to the same bits.
            for isa in Isa::available() {
                let mut again = y0.clone();
                add_branch_with(isa, BranchPart { p: &p, stride, coeffs: &c }, t, &mut again);
                assert_eq!(y, again, "{}", isa.name());
            }
        }
    }

    /// Behind products of one block and of several, of groups, and of two parts, beside one without a branch.
    #[test]
    fn a_branch_behind_a_product_is_the_one_added_to_it() {
        for (inp, group, tail, out, t) in [
            (64, 64, 0, 40, 1),
            (576, 576, 32, 70, 13),
            (64, 16, 0, 33, 5),
            (64, 16, 16, 33, 100),
            (2048, 2048, 0, 35, 7),
            (2048, 2048, 900, 16, 97),
        ] {
            let packed = |inp: usize, group: usize| {
                let codes: Vec<i8> = (0..out * inp).map(|i| (i * 7919 % 15) as i8 - 7).collect();
                PackedWeights::pack(&codes, &vec![0.01; out * inp / group], out, inp, 4, group).unwrap()
            };
            let acts = |inp| crate::quantize_acts(&noise(t * inp, 1), t, inp, 4, 1.0);
            let (w, w_tail) = (packed(inp, group), packed(tail.max(8), tail.max(8)));
            let (a, a_tail) = (acts(inp), acts(tail.max(8)));
            let parts = &[(&a, &w), (&a_tail, &w_tail)][..if tail > 0 { 2 } else { 1 }];
            let (counts, stride) = ((0..out).map(|j| j % 7).collect::<Vec<_>>(), 9);
            let rows: Vec<u32> = counts.iter().flat_map(|&count| 0..count as u32).collect();
            let coeffs: Vec<f16> = noise(rows.len(), 2).iter().map(|&v| f16::from_f32(v)).collect();
            let c = BranchCoeffs::pack(stride, &counts, &rows, &coeffs).unwrap();
            let p = noise(t * stride, 3);
            let branch = BranchPart { p: &p, stride, coeffs: &c };
            for isa in Isa::available() {
                let (mut behind, mut plain) = (vec![f32::NAN; t * out], vec![f32::NAN; t * out]);
                matmul_int_with(
                    isa,
                    [
                        IntProduct { parts, branch: Some(branch), y: &mut behind },
                        IntProduct { parts, branch: None, y: &mut plain },
                    ],
                );
                add_branch_with(Isa::Scalar, branch, t, &mut plain);
                assert_eq!(behind, plain, "{} {inp} {group} {tail} {out} {t}", isa.name());
            }
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
            add_branch(BranchPart { p: &basis.project(&x, 3, n), stride: n, coeffs: &c }, 3, &mut y);
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
