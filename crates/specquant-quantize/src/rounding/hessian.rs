//! The second-order statistic of a layer's input, and its factorization for [`gptq`](super::gptq).

use super::GptqConfig;
use faer::linalg::cholesky::llt::factor::{
    LltParams, LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
};
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, Auto, MatMut, MatRef, Par, Spec, dyn_stack};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of a batch that are multiplied in f32 before they are added up in f64.
const CHUNK_ROWS: usize = 256;
/// Rows of the matrix that one task computes.
const PANEL: usize = 64;
/// Columns that are factorized at once, and rows and columns of what one task then computes: whole tiles of 48 rows of AVX-512.
const CHOLESKY_COLUMNS: usize = 240;

/// `H = 2/n · Σ x xᵀ` over the n calibration inputs x of a layer: the Hessian of its squared output error for every
/// output channel (GPTQ, arXiv 2210.17323; the factor is that of QuaRot's `gptq_utils.py`).
///
/// Products of up to 256 rows are computed in f32, their sums in f64. The split of the rows into batches decides where
/// these pieces begin, the number of threads has no influence.
#[derive(Clone, Debug)]
pub struct Hessian {
    dim: usize,
    /// `Σ x xᵀ`: the lower triangle, row by row, for a wide layer's whole matrix takes a gigabyte. Row i begins at [`triangle`]`(i)`.
    sums: Vec<f64>,
    rows: usize,
}

/// Values of the first n rows of a lower triangle.
fn triangle(n: usize) -> usize {
    n * (n + 1) / 2
}

/// Rows of a lower triangle that begins with row `first`.
fn rows_mut(mut values: &mut [f64], first: usize) -> impl Iterator<Item = &mut [f64]> {
    (first + 1..).map_while(move |len| {
        let (row, rest) = std::mem::take(&mut values).split_at_mut_checked(len)?;
        values = rest;
        Some(row)
    })
}

impl Hessian {
    /// Of `dim` input channels, before any input was seen.
    pub fn new(dim: usize) -> Self {
        Self { dim, sums: vec![0.0; triangle(dim)], rows: 0 }
    }

    /// The identity: with it GPTQ rounds to nearest.
    pub fn identity(dim: usize) -> Self {
        let mut matrix = vec![0.0; dim * dim];
        matrix.iter_mut().step_by(dim + 1).for_each(|v| *v = 1.0);
        Self::from_matrix(dim, matrix)
    }

    /// A given H: `[dim, dim]`, of which the lower triangle is read.
    ///
    /// # Panics
    /// If `matrix` is not `dim * dim` long.
    pub fn from_matrix(dim: usize, mut matrix: Vec<f64>) -> Self {
        assert_eq!(matrix.len(), dim * dim, "H is [dim, dim]");
        (1..dim).for_each(|i| matrix.copy_within(i * dim..=i * dim + i, triangle(i)));
        matrix.truncate(triangle(dim));
        // As if from two inputs, for which 2/n is 1.
        Self { dim, sums: matrix, rows: 2 }
    }

    /// Adds the inputs `x: [rows, dim]`.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows.
    pub fn add(&mut self, x: &[f32]) {
        let dim = self.dim;
        assert!(dim > 0 && x.len().is_multiple_of(dim), "inputs are [rows, {dim}]");
        self.rows += x.len() / dim;
        // A task owns some rows of H and computes them up to the diagonal.
        let (mut panels, mut rest) = (Vec::new(), self.sums.as_mut_slice());
        for first in (0..dim).step_by(PANEL) {
            let end = dim.min(first + PANEL);
            panels.push((
                first..end,
                rest.split_off_mut(..triangle(end) - triangle(first)).unwrap_or_default(),
            ));
        }
        panels.into_par_iter().with_max_len(1).for_each(|(rows, sums)| {
            let (first, height, width) = (rows.start, rows.len(), rows.end);
            let mut product = vec![0.0f32; height * width];
            for chunk in x.chunks(CHUNK_ROWS * dim) {
                let chunk = MatRef::from_row_major_slice(chunk, chunk.len() / dim, dim);
                matmul(
                    MatMut::from_row_major_slice_mut(&mut product, height, width),
                    Accum::Replace,
                    chunk.subcols(first, height).transpose(),
                    chunk.subcols(0, width),
                    1.0,
                    Par::Seq,
                );
                for (sums, product) in rows_mut(sums, first).zip(product.chunks_exact(width)) {
                    sums.iter_mut().zip(product).for_each(|(s, &p)| *s += f64::from(p));
                }
            }
        });
    }

    /// Turns the Hessian of inputs x into that of inputs `x_i · factors_i`, as smoothing makes them.
    ///
    /// # Panics
    /// If there are not `dim` factors.
    pub fn rescale(&mut self, factors: &[f32]) {
        assert_eq!(factors.len(), self.dim, "one factor for each input channel");
        for (i, row) in rows_mut(&mut self.sums, 0).enumerate() {
            row.iter_mut().zip(factors).for_each(|(v, &f)| *v *= f64::from(f) * f64::from(factors[i]));
        }
    }

    /// The Hessian of inputs `x Q`, for a `rotate` that takes rows `[rows, dim]` to rows Q, in f32. In the memory of the whole matrix, a few rows at a time.
    pub fn rotated(self, rotate: impl Fn(Vec<f32>) -> Vec<f32>) -> Self {
        let n = self.dim;
        let mut h = self.into_normalized();
        let rotate_rows = |h: &mut [f64]| {
            for rows in h.chunks_mut(CHUNK_ROWS * n.max(1)) {
                let rotated = rotate(rows.iter().map(|&v| v as f32).collect());
                rows.iter_mut().zip(rotated).for_each(|(to, v)| *to = f64::from(v));
            }
        };
        rotate_rows(&mut h); // H Q
        below_diagonal(n, |below, above| h.swap(below, above));
        rotate_rows(&mut h); // Qᵀ H Q, transposed
        Self::from_matrix(n, h)
    }

    /// Input channels.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Inputs seen.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// H as a whole, `[dim, dim]`.
    pub fn normalized(&self) -> Vec<f64> {
        self.clone().into_normalized()
    }

    /// [`Hessian::normalized`], in whose memory the sums are then.
    pub fn into_normalized(self) -> Vec<f64> {
        let (n, scale, mut h) = (self.dim, self.scale(), self.sums);
        h.par_iter_mut().for_each(|v| *v *= scale);
        h.reserve_exact(n * n - h.len());
        h.resize(n * n, 0.0);
        (1..n).rev().for_each(|i| h.copy_within(triangle(i)..triangle(i + 1), i * n));
        mirror(&mut h, n);
        h
    }

    /// The diagonal of H: twice the mean square of every input channel.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.dim).map(|i| self.sums[triangle(i) + i] * self.scale()).collect()
    }

    fn scale(&self) -> f64 {
        2.0 / self.rows.max(1) as f64
    }
}

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

/// Every place below the diagonal of a matrix `[n, n]`, and the one that mirrors it.
fn below_diagonal(n: usize, mut each: impl FnMut(usize, usize)) {
    // In tiles, as one of the two is walked down its columns.
    const TILE: usize = 32;
    for (first_i, first_j) in (0..n).step_by(TILE).flat_map(|i| (0..=i).step_by(TILE).map(move |j| (i, j))) {
        for i in first_i..n.min(first_i + TILE) {
            for j in first_j..i.min(first_j + TILE) {
                each(i * n + j, j * n + i);
            }
        }
    }
}

/// Copies the triangle below the diagonal of `a: [n, n]` onto the other.
fn mirror(a: &mut [f64], n: usize) {
    below_diagonal(n, |below, above| a[above] = a[below]);
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

/// Factorizes a Hessian by f64 Cholesky, in its memory.
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
    fn batches_add_up_to_the_mean_of_outer_products() {
        let (rows, dim) = (700, 70);
        let x = correlated(rows, dim, 1);
        let mut h = Hessian::new(dim);
        x.chunks(300 * dim).for_each(|batch| h.add(batch));
        assert_eq!((h.rows(), h.dim()), (rows, dim));
        let (got, diagonal) = (h.normalized(), h.diagonal());
        for i in 0..dim {
            assert_eq!(diagonal[i], got[i * dim + i]);
            for j in 0..dim {
                let products = x.chunks(dim).map(|x| f64::from(x[i]) * f64::from(x[j]));
                let want = 2.0 * products.sum::<f64>() / rows as f64;
                let size = (diagonal[i] * diagonal[j]).sqrt();
                assert!((got[i * dim + j] - want).abs() < 1e-5 * size.max(1e-3), "{i} {j}");
                assert_eq!(got[i * dim + j], got[j * dim + i]);
            }
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
    fn rescaling_equals_scaled_inputs() {
        let x = correlated(90, 6, 3);
        let factors = [0.5f32, 2.0, 1.0, 4.0, 0.25, 8.0]; // powers of two: no rounding
        let scaled: Vec<f32> = x.iter().enumerate().map(|(i, v)| v * factors[i % 6]).collect();
        let (mut a, mut b) = (Hessian::new(6), Hessian::new(6));
        a.add(&x);
        a.rescale(&factors);
        b.add(&scaled);
        for (a, b) in a.normalized().iter().zip(b.normalized()) {
            assert!((a - b).abs() <= 1e-6 * b.abs().max(1e-2), "{a} {b}");
        }
    }

    /// More rows than are rotated at a time.
    #[test]
    fn rotated_inputs() {
        let n = CHUNK_ROWS + 20;
        let x = correlated(2 * n, n, 8);
        // A permutation with factors; what each row is turned by does not depend on its neighbours.
        let turn = |rows: Vec<f32>| -> Vec<f32> {
            rows.chunks_exact(n)
                .flat_map(|row| (0..n).map(|i| row[(7 * i + 3) % n] * [1.0, -2.0][i % 2]))
                .collect()
        };
        let of = |x: &[f32]| {
            let mut h = Hessian::new(n);
            h.add(x);
            h
        };
        let (got, want) = (of(&x).rotated(turn), of(&turn(x)));
        assert_eq!((n % 7, got.rows()), (3, 2), "7 i + 3 is a permutation");
        for (got, want) in got.normalized().iter().zip(want.normalized()) {
            assert!((got - want).abs() <= 1e-5 * want.abs().max(0.1), "{got} {want}");
        }
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
        h.add(&correlated(90, n, 4)); // of rank 90
        let mut h = h.into_normalized();
        let mean = h.iter().step_by(n + 1).sum::<f64>() / n as f64;
        h.iter_mut().step_by(n + 1).for_each(|v| *v -= 0.05 * mean);
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
