//! The factor of a [`Hessian`], for [`gptq`](super::gptq).

use super::hessian::{mirror, triangle};
use super::{GptqConfig, Hessian};
use faer::linalg::cholesky::llt::factor::{
    LltParams, LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
};
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, Auto, MatMut, MatRef, Par, Spec, dyn_stack};
use rayon::prelude::*;
use std::ops::Range;

/// Columns that are factorized at once, and rows and columns of what one task then computes: whole tiles of 48 rows of AVX-512.
const CHOLESKY_COLUMNS: usize = 240;

/// A factorized [`Hessian`], to be shared by all layers with the same input (q/k/v, gate/up).
#[derive(Clone, Debug)]
pub struct Factor {
    pub(super) dim: usize,
    /// By how much the errors of the columns before it move column j: U_ij / U_jj, where `H + damping = U Uᵀ` with U upper triangular. Blocks of
    /// `block_size` rows, `[rows, end]` with the row `end` that follows. Empty after a fallback.
    pub(super) feedback: Vec<Vec<f32>>,
    /// U_jj², the weight of the squared error of column j.
    pub(super) pivots: Vec<f64>,
    /// The input channel that is rounded as the j-th.
    pub(super) order: Vec<usize>,
    /// By input channel: no calibration input ever used it.
    pub(super) dead: Vec<bool>,
    pub(super) block_size: usize,
    /// Damping used: this share of the mean diagonal was added to the diagonal.
    pub dampening_frac: f64,
    /// Input channels that no calibration input ever used; their weights are rounded to zero.
    pub dead_columns: usize,
    /// Why there is no factor, and layers are rounded to nearest.
    pub fallback: Option<String>,
}

impl Factor {
    /// Row j of [`Factor::feedback`], `[j]`.
    pub(super) fn row(&self, j: usize) -> &[f32] {
        let (block, at) = (j / self.block_size, j % self.block_size);
        let width = self.dim.min(j - at + self.block_size);
        &self.feedback[block][at * width..][..j]
    }
}

/// Puts row and column `order[i]` of `a: [n, n]` in the place of row and column i, in place.
fn permute(a: &mut [f64], n: usize, order: &[usize]) {
    a.par_chunks_exact_mut(n).for_each(|row| {
        let old = row.to_vec();
        row.iter_mut().zip(order).for_each(|(to, &from)| *to = old[from]);
    });
    // Rows along the cycles of the permutation.
    let mut placed = vec![false; n];
    for first in 0..n {
        if placed[first] {
            continue;
        }
        let spare = a[first * n..][..n].to_vec();
        let mut at = first;
        loop {
            placed[at] = true;
            let from = order[at];
            if from == first {
                break;
            }
            a.copy_within(from * n..(from + 1) * n, at * n);
            at = from;
        }
        a[at * n..][..n].copy_from_slice(&spare);
    }
}

/// Factorizes a Hessian by f64 Cholesky, in the memory of the whole matrix, to which its triangle grows.
///
/// The damping begins at `dampening_frac` times the mean diagonal and grows tenfold after every failure, up to 1; should
/// that fail too, or H be unusable, [`Factor::fallback`] says why. The mean is taken over the channels that are alive.
pub fn factorize(h: Hessian, cfg: &GptqConfig) -> Factor {
    let n = h.dim;
    let mut factor = Factor {
        dim: n,
        feedback: Vec::new(),
        pivots: Vec::new(),
        order: (0..n).collect(),
        dead: vec![false; n],
        block_size: cfg.block_size.max(1),
        dampening_frac: cfg.dampening_frac,
        dead_columns: 0,
        fallback: None,
    };
    let mut diagonal = h.diagonal();
    if let Some(at) = h.sums.iter().position(|v| !v.is_finite()) {
        let row = (0..n).take_while(|&i| triangle(i) <= at).count() - 1;
        factor.fallback = Some(format!("the Hessian is not finite at [{row}, {}]", at - triangle(row)));
        return factor;
    }
    let dead: Vec<bool> = diagonal.iter().map(|&v| v == 0.0).collect();
    let alive = dead.iter().filter(|&&dead| !dead).count();
    if alive == 0 {
        factor.fallback = Some("every calibration input is zero".to_string());
        return factor;
    }
    let mean = diagonal.iter().sum::<f64>() / alive as f64;
    diagonal.iter_mut().filter(|v| **v == 0.0).for_each(|v| *v = 1.0);
    if cfg.actorder {
        factor.order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a])); // stable: ties keep their order
    }

    // Reversing rows and columns turns the upper factor that is wanted into the lower one that Cholesky gives: [c * n + r], c <= r, is column-major.
    let mut lower = h.into_normalized();
    if cfg.actorder {
        let reversed: Vec<usize> = factor.order.iter().rev().copied().collect();
        permute(&mut lower, n, &reversed);
    } else {
        lower.reverse();
    }
    // An attempt that fails destroys what it was made from, but not what is above it.
    let blocks: Vec<f64> = (0..n).flat_map(|c| &lower[diagonal_block(c, n)]).copied().collect();
    let mut frac = cfg.dampening_frac.max(0.0);
    loop {
        for (c, &j) in factor.order.iter().rev().enumerate() {
            lower[c * (n + 1)] = diagonal[j] + frac * mean;
        }
        if cholesky(&mut lower, n) {
            break;
        }
        if frac >= 1.0 {
            factor.dampening_frac = frac;
            factor.fallback = Some(format!("the Hessian has no Cholesky factor, even with damping {frac}"));
            return factor;
        }
        frac = (10.0 * frac.max(1e-4)).min(1.0);
        mirror(&mut lower, n);
        let mut rest = blocks.as_slice();
        for column in (0..n).map(|c| diagonal_block(c, n)) {
            let (block, after) = rest.split_at(column.len());
            lower[column].copy_from_slice(block);
            rest = after;
        }
    }
    drop(blocks);

    let firsts: Vec<usize> = (0..n).step_by(factor.block_size).collect();
    let blocks = firsts.into_par_iter().map(|first| {
        let width = n.min(first + factor.block_size);
        let mut block = vec![0.0; (width - first) * width];
        for (j, row) in (first..width).zip(block.chunks_exact_mut(width)) {
            let column = &lower[(n - 1 - j) * n..][n - 1 - j..n]; // U_jj, U_j-1,j, ..., U_0,j
            for i in 0..j {
                row[i] = (column[j - i] / column[0]) as f32;
            }
        }
        block
    });
    factor.feedback = blocks.collect();
    factor.pivots = (0..n).map(|j| lower[(n - 1 - j) * (n + 1)].powi(2)).collect();
    factor.dead_columns = n - alive;
    factor.dead = dead;
    factor.dampening_frac = frac;
    factor
}

/// Places of column c of a matrix `[n, n]`, column-major, in what [`cholesky`] writes above and below the diagonal.
fn diagonal_block(c: usize, n: usize) -> Range<usize> {
    let first = c / CHOLESKY_COLUMNS * CHOLESKY_COLUMNS;
    c * n + first..c * n + n.min(first + CHOLESKY_COLUMNS)
}

/// Lower Cholesky factor in place, `a: [n, n]` column-major; false if there is none. Above the diagonal anything may stand, and stays but for [`diagonal_block`].
///
/// Some columns at a time, on all threads: their own triangle, what is below it, and what both take away from the columns to the right. The parts have fixed
/// sizes, so that the number of threads changes no bit.
fn cholesky(a: &mut [f64], n: usize) -> bool {
    let params: Spec<LltParams, f64> = Spec::new(<LltParams as Auto<f64>>::auto());
    let scratch = cholesky_in_place_scratch::<f64>(CHOLESKY_COLUMNS, Par::Seq, params);
    let mut buffer = dyn_stack::MemBuffer::new(scratch);
    for first in (0..n).step_by(CHOLESKY_COLUMNS) {
        let width = CHOLESKY_COLUMNS.min(n - first);
        let (columns, right) = a[first * n..].split_at_mut(width * n);
        let (_, panel) = MatMut::from_column_major_slice_mut(&mut *columns, n, width).split_at_row_mut(first);
        let (mut triangle, mut below) = panel.split_at_row_mut(width);
        let stack = dyn_stack::MemStack::new(&mut buffer);
        let regularization = LltRegularization::default();
        if cholesky_in_place(triangle.rb_mut(), regularization, Par::Seq, stack, params).is_err() {
            return false;
        }
        let mut parts = Vec::new();
        while below.nrows() > 0 {
            let rows = CHOLESKY_COLUMNS.min(below.nrows());
            let (part, rest) = below.split_at_row_mut(rows);
            parts.push(part);
            below = rest;
        }
        let triangle = triangle.rb();
        let solve = |part: MatMut<f64>| {
            solve_lower_triangular_in_place(triangle, part.transpose_mut(), Par::Seq);
        };
        parts.into_par_iter().for_each(solve);
        let panel = MatRef::from_column_major_slice(columns, n, width);
        right.par_chunks_mut(CHOLESKY_COLUMNS * n).enumerate().for_each(|(i, columns)| {
            let (at, width) = (first + width + i * CHOLESKY_COLUMNS, columns.len() / n);
            let (_, to) = MatMut::from_column_major_slice_mut(columns, n, width).split_at_row_mut(at);
            let (below, beside) = (panel.subrows(at, n - at), panel.subrows(at, width));
            matmul(to, Accum::Add, below, beside.transpose(), -1.0, Par::Seq);
        });
    }
    // A huge but finite H can overflow on the way without an error.
    (0..n * n).step_by(n + 1).all(|at| a[at].is_finite() && a[at] > 0.0)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{correlated, gaussian, with_threads};
    use super::*;

    /// More columns than are factorized at once, and not whole parts of them.
    #[test]
    fn cholesky_in_parts() {
        for n in [1, CHOLESKY_COLUMNS, 2 * CHOLESKY_COLUMNS + 3, 700] {
            let mut h = Hessian::new(n);
            h.add(&correlated(2 * n, n, 5));
            let mut whole = h.normalized();
            (0..n).for_each(|i| whole[i * (n + 1)] += 0.01);
            let factor = |threads| {
                let mut lower = whole.clone();
                // Above the diagonal, whatever it is.
                (0..n * n).filter(|k| k % n < k / n).for_each(|k| lower[k] = f64::NAN);
                assert!(with_threads(threads, || cholesky(&mut lower, n)), "{n}");
                let above = (0..n).flat_map(|c| c * n..diagonal_block(c, n).start);
                assert!(above.into_iter().all(|k| lower[k].is_nan()), "{n}: what is above stays");
                (0..n * n).filter(|k| k % n < k / n).for_each(|k| lower[k] = 0.0);
                lower
            };
            let lower = factor(1);
            assert_eq!(lower, factor(3), "{n}");
            for (i, j) in [(0, 0), (n - 1, 0), (n - 1, n - 1), (n / 2, n / 3), (n - 1, n / 2)] {
                let product: f64 = (0..n).map(|k| lower[k * n + i] * lower[k * n + j]).sum();
                assert!((product - whole[j * n + i]).abs() < 1e-9, "{n}: {product} at {i}, {j}");
            }
            whole[(n - 1) * (n + 1)] = -1.0;
            assert!(!cholesky(&mut whole, n));
        }
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        let x = gaussian(600 * 150, 2);
        let run = || {
            let mut h = Hessian::new(150);
            h.add(&x);
            factorize(h.clone(), &GptqConfig::default())
        };
        let (one, two) = (with_threads(1, run), with_threads(2, run));
        assert_eq!(one.feedback, two.feedback);
        assert_eq!(one.pivots, two.pivots);
    }

    #[test]
    fn rows_and_columns_in_another_order() {
        // Cycles of 1, 2 and 4.
        let order = [4, 1, 3, 2, 6, 0, 5];
        let n = order.len();
        let matrix: Vec<f64> = (0..n * n).map(|v| v as f64).collect();
        let mut got = matrix.clone();
        permute(&mut got, n, &order);
        for (at, got) in got.into_iter().enumerate() {
            assert_eq!(got, matrix[order[at / n] * n + order[at % n]]);
        }
    }

    #[test]
    fn factor_multiplies_back_to_the_damped_hessian() {
        let dim = 40;
        let mut h = Hessian::new(dim);
        h.add(&correlated(200, dim, 4));
        let f = factorize(h.clone(), &GptqConfig::default());
        let (matrix, diagonal) = (h.normalized(), h.diagonal());
        let mean = diagonal.iter().sum::<f64>() / dim as f64;
        let unit = |i: usize, j: usize| if i == j { 1.0 } else { f64::from(f.row(j)[i]) };
        for i in 0..dim {
            for j in 0..dim {
                let got: f64 = (i.max(j)..dim).map(|k| unit(i, k) * f.pivots[k] * unit(j, k)).sum();
                let want = matrix[i * dim + j] + if i == j { 0.01 * mean } else { 0.0 };
                assert!(
                    (got - want).abs() < 1e-5 * (diagonal[i] * diagonal[j]).sqrt(),
                    "{i} {j}: {got} {want}"
                );
            }
        }
    }

    #[test]
    fn damping_escalates_until_the_factorization_succeeds() {
        // Eigenvalues 1 + 1.05 and 1 - 1.05: 0.01 is not enough, 0.1 is.
        let h = Hessian::from_matrix(2, vec![1.0, 1.05, 1.05, 1.0]);
        let f = factorize(h.clone(), &GptqConfig::default());
        assert_eq!((f.dampening_frac, f.fallback), (0.1, None));
        // Singular and without damping.
        let h = Hessian::from_matrix(2, vec![1.0; 4]);
        let f = factorize(h.clone(), &GptqConfig { dampening_frac: 0.0, ..Default::default() });
        assert_eq!((f.dampening_frac, f.fallback), (1e-3, None));
        let f = factorize(Hessian::from_matrix(2, vec![1.0, 5.0, 5.0, 1.0]), &GptqConfig::default());
        assert_eq!(f.dampening_frac, 1.0);
        assert!(f.fallback.unwrap().contains("no Cholesky factor"));
    }

    #[test]
    fn unusable_hessians_are_reported() {
        let mut h = Hessian::new(3);
        assert!(factorize(h.clone(), &GptqConfig::default()).fallback.unwrap().contains("zero"));
        h.add(&[1.0, f32::NAN, 2.0]);
        assert!(
            factorize(h.clone(), &GptqConfig::default()).fallback.unwrap().contains("not finite at [1, 0]")
        );
    }

    /// An attempt that fails leaves nothing behind: the next is as if it were the first.
    #[test]
    fn damping_is_raised_from_the_same_matrix() {
        let n = 2 * CHOLESKY_COLUMNS + 30;
        let mut h = Hessian::new(n);
        h.add(&correlated(2 * n, n, 4));
        let mut h = h.into_normalized();
        // Two strong channels that cannot be, which are factorized at last: everything before them was overwritten.
        let mean = h.iter().step_by(n + 1).sum::<f64>() / n as f64;
        for i in 0..n {
            for strong in 0..2 {
                (h[i * n + strong], h[strong * n + i]) = (0.0, 0.0);
            }
        }
        for (i, j, v) in [(0, 0, 10.0), (1, 1, 10.0), (0, 1, 10.05), (1, 0, 10.05)] {
            h[i * n + j] = v * mean;
        }
        for actorder in [false, true] {
            let with = |dampening_frac| {
                let cfg = GptqConfig { dampening_frac, actorder, ..Default::default() };
                factorize(Hessian::from_matrix(n, h.clone()), &cfg)
            };
            let (raised, at_once) = (with(0.01), with(0.1));
            assert_eq!((raised.dampening_frac, &raised.fallback), (0.1, &None));
            assert!(raised.feedback == at_once.feedback && raised.pivots == at_once.pivots);
        }
    }
}
