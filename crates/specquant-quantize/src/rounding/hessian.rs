//! The second-order statistic of a layer's input.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Rows of a batch that are multiplied in f32 before they are added up in f64.
const CHUNK_ROWS: usize = 256;
/// Rows of the matrix that one task computes.
const PANEL: usize = 64;

/// `H = 2/n · Σ x xᵀ` over the n calibration inputs x of a layer: the Hessian of its squared output error for every
/// output channel (GPTQ, arXiv 2210.17323; the factor is that of QuaRot's `gptq_utils.py`).
///
/// Products of up to 256 rows are computed in f32, their sums in f64. The split of the rows into batches decides where
/// these pieces begin, the number of threads has no influence.
#[derive(Clone, Debug)]
pub struct Hessian {
    pub(super) dim: usize,
    /// `Σ x xᵀ`: the lower triangle, row by row, for a wide layer's whole matrix takes a gigabyte. Row i begins at [`triangle`]`(i)`.
    pub(super) sums: Vec<f64>,
    rows: usize,
}

/// Values of the first n rows of a lower triangle.
pub(super) fn triangle(n: usize) -> usize {
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
        // The room that is left serves whoever needs the whole again.
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

    /// [`Hessian::normalized`], to which the memory of the sums grows.
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
pub(super) fn mirror(a: &mut [f64], n: usize) {
    below_diagonal(n, |below, above| a[above] = a[below]);
}

#[cfg(test)]
mod tests {
    use super::super::testing::correlated;
    use super::*;

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
}
