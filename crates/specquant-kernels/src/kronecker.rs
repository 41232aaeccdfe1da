//! Kronecker products of two small matrices, applied to rows: the transform of a layer's input in FlatQuant (Sun et al., arXiv 2410.09426, section
//! 3.2), which learns far more than a rotation for √n times fewer values than a full matrix.
//!
//! ```text
//! x ↦ x (A ⊗ B),   n = n₁ n₂,   (A ⊗ B)[a n₂ + b, a' n₂ + b'] = A[a, a'] B[b, b']
//! ```
//!
//! With x as a matrix X `[n₁, n₂]` that is Aᵀ X B: n (n₁ + n₂) multiplications. What reads the transformed input is multiplied by the inverse transpose,
//! `(A ⊗ B)⁻ᵀ = A⁻ᵀ ⊗ B⁻ᵀ`.

use crate::{Buffer, PackedDense, for_each_chunk, matmul_packed, transposed};

/// Values per task; fewer are not worth a second thread.
const CHUNK: usize = 1 << 14;

/// A pivot, relative to the largest value of its matrix, below which the matrix counts as singular.
const LEAST_PIVOT: f64 = 1e-7;

/// A Kronecker product A ⊗ B.
#[derive(Debug, Clone)]
pub struct Kronecker {
    left: Factor,
    right: Factor,
}

/// A square matrix, or the identity.
#[derive(Debug, Clone)]
struct Factor {
    n: usize,
    /// `[n, n]`; empty for the identity.
    matrix: Vec<f32>,
    /// Its transpose, which products with it take.
    packed: Option<PackedDense>,
}

impl Factor {
    fn new(n: usize, matrix: Vec<f32>) -> Self {
        let packed = (!matrix.is_empty()).then(|| PackedDense::pack_transposed(&matrix, n, n));
        Factor { n, matrix, packed }
    }

    fn transposed(&self) -> Self {
        if self.matrix.is_empty() {
            return self.clone();
        }
        Factor::new(self.n, transposed(&self.matrix, self.n, self.n).into_vec())
    }

    /// The inverse, transposed, in f64 on the way.
    fn inverse_transposed(&self) -> Option<Self> {
        if self.matrix.is_empty() {
            return Some(self.clone());
        }
        let inverse = inverse(&self.matrix, self.n)?;
        let inverse: Vec<f32> = inverse.into_iter().map(|v| v as f32).collect();
        Some(Factor::new(self.n, transposed(&inverse, self.n, self.n).into_vec()))
    }
}

impl Kronecker {
    /// A ⊗ B of n × n values. left: A, `[n₁, n₁]`; right: B, `[n₂, n₂]`; either empty for the identity of the width that the other leaves.
    ///
    /// # Panics
    /// If the matrices are not square or their widths do not multiply to n.
    pub fn new(n: usize, left: Vec<f32>, right: Vec<f32>) -> Self {
        let width = |matrix: &[f32]| (!matrix.is_empty()).then_some(matrix.len().isqrt());
        let (n1, n2) = match (width(&left), width(&right)) {
            (Some(n1), Some(n2)) => (n1, n2),
            (Some(n1), None) => (n1, n / n1),
            (None, Some(n2)) => (n / n2, n2),
            (None, None) => (n, 1),
        };
        let square = |matrix: &[f32], n: usize| matrix.is_empty() || matrix.len() == n * n;
        assert!(
            n > 0 && n1 * n2 == n && square(&left, n1) && square(&right, n2),
            "{} and {} values are no Kronecker factors of {n} × {n}",
            left.len(),
            right.len()
        );
        Kronecker { left: Factor::new(n1, left), right: Factor::new(n2, right) }
    }

    /// n₁ ≤ n₂ with n₁ n₂ = n > 0, as near to each other as can be, both even or both odd if possible (FlatQuant, function_utils.py, `get_decompose_dim`,
    /// which does not come back where that is not possible).
    pub fn widths(n: usize) -> (usize, usize) {
        let pairs = || (1..=n.isqrt()).rev().filter(|n1| n.is_multiple_of(*n1)).map(|n1| (n1, n / n1));
        pairs().find(|(n1, n2)| (n1 + n2).is_multiple_of(2)).or_else(|| pairs().next()).unwrap_or((1, n))
    }

    /// Width n of the vectors.
    pub fn width(&self) -> usize {
        self.left.n * self.right.n
    }

    /// A, `[n₁, n₁]`; empty for the identity.
    pub fn left(&self) -> &[f32] {
        &self.left.matrix
    }

    /// B, `[n₂, n₂]`; empty for the identity.
    pub fn right(&self) -> &[f32] {
        &self.right.matrix
    }

    /// Aᵀ ⊗ Bᵀ.
    pub fn transposed(&self) -> Self {
        Kronecker { left: self.left.transposed(), right: self.right.transposed() }
    }

    /// A⁻ᵀ ⊗ B⁻ᵀ, or nothing if a factor is singular.
    pub fn inverse_transposed(&self) -> Option<Self> {
        Some(Kronecker { left: self.left.inverse_transposed()?, right: self.right.inverse_transposed()? })
    }

    /// x ↦ x (A ⊗ B) for every row, in place. x: `[rows, n]`. The result depends neither on the other rows nor on the number of threads.
    ///
    /// # Panics
    /// If x is not `[rows, n]`.
    pub fn apply(&self, x: &mut [f32], rows: usize) {
        let n = self.width();
        assert_eq!(x.len(), rows * n, "Kronecker product: x is not [{rows}, {n}]");
        let at_once = (CHUNK / n).max(1);
        for_each_chunk(x, at_once * n, |_, x| self.task(x));
    }

    /// Whole rows.
    fn task(&self, x: &mut [f32]) {
        let (n, n1, n2) = (self.width(), self.left.n, self.right.n);
        let mut other = Buffer::new(x.len());
        if let Some(right) = &self.right.packed {
            matmul_packed(x, right, &mut other, x.len() / n2);
            x.copy_from_slice(&other);
        }
        if let Some(left) = &self.left.packed {
            // Xᵀ A is the transpose of Aᵀ X.
            x.chunks_exact(n).zip(other.chunks_exact_mut(n)).for_each(|(x, t)| transpose(x, t, n1, n2));
            let mut product = Buffer::new(x.len());
            matmul_packed(&other, left, &mut product, x.len() / n1);
            product.chunks_exact(n).zip(x.chunks_exact_mut(n)).for_each(|(t, x)| transpose(t, x, n2, n1));
        }
    }
}

/// x `[rows, columns]` as `[columns, rows]`.
fn transpose(x: &[f32], t: &mut [f32], rows: usize, columns: usize) {
    for (column, t) in t.chunks_exact_mut(rows).enumerate() {
        t.iter_mut().zip(x[column..].iter().step_by(columns)).for_each(|(t, x)| *t = *x);
    }
}

/// The inverse of `[n, n]`, by elimination with the largest pivot of each column; nothing if that is too small, or not finite.
fn inverse(matrix: &[f32], n: usize) -> Option<Vec<f64>> {
    let largest = matrix.iter().fold(0.0f64, |m, &v| m.max(f64::from(v).abs()));
    // Rows of [matrix | identity].
    let mut rows: Vec<Vec<f64>> = matrix
        .chunks_exact(n)
        .enumerate()
        .map(|(i, row)| {
            let identity = (0..n).map(|j| if i == j { 1.0 } else { 0.0 });
            row.iter().map(|&v| f64::from(v)).chain(identity).collect()
        })
        .collect();
    for column in 0..n {
        let pivot = (column..n).max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()))?;
        rows.swap(column, pivot);
        let value = rows[column][column];
        // Also false for what is not a number.
        if !(value.abs() > LEAST_PIVOT * largest && value.is_finite()) {
            return None;
        }
        rows[column].iter_mut().for_each(|v| *v /= value);
        let row = rows[column].clone();
        for (i, other) in rows.iter_mut().enumerate() {
            let factor = other[column];
            if i != column && factor != 0.0 {
                other.iter_mut().zip(&row).skip(column).for_each(|(v, p)| *v -= factor * p);
            }
        }
    }
    Some(rows.into_iter().flat_map(|row| row.into_iter().skip(n)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{affordable, test_noise as noise};

    /// x (A ⊗ B) by the matrix of the definition, in f64. An empty matrix is the identity.
    fn naive(x: &[f32], left: &[f32], right: &[f32], n1: usize, n2: usize) -> Vec<f64> {
        let n = n1 * n2;
        let at = |m: &[f32], n: usize, i: usize, j: usize| match m.is_empty() {
            true => f64::from(u8::from(i == j)),
            false => f64::from(m[i * n + j]),
        };
        let entry = |i: usize, j: usize| at(left, n1, i / n2, j / n2) * at(right, n2, i % n2, j % n2);
        let out = |x: &[f32], j: usize| (0..n).map(|i| f64::from(x[i]) * entry(i, j)).sum::<f64>();
        x.chunks_exact(n).flat_map(|x| (0..n).map(|j| out(x, j)).collect::<Vec<_>>()).collect()
    }

    const SHAPES: [(usize, usize); 8] = [(1, 1), (1, 7), (5, 1), (3, 4), (4, 6), (9, 64), (24, 24), (32, 48)];

    #[test]
    fn equals_the_dense_product() {
        for (i, (n1, n2)) in affordable(SHAPES.into_iter().enumerate(), |(_, (n1, n2))| 8 * (n1 * n2).pow(2))
        {
            for rows in [1, 2, 37] {
                let x = noise(rows * n1 * n2, i as u64);
                for (l, r) in [(n1, n2), (0, n2), (n1, 0), (0, 0)] {
                    let (left, right) = (noise(l * l, 100), noise(r * r, 101));
                    let want = naive(&x, &left, &right, n1, n2);
                    let mut got = x.clone();
                    Kronecker::new(n1 * n2, left, right).apply(&mut got, rows);
                    let size = want.iter().fold(1e-3, |m: f64, v| m.max(v.abs()));
                    for (got, want) in got.iter().zip(&want) {
                        let off = (f64::from(*got) - want).abs() / size;
                        assert!(off < 1e-5, "{n1} × {n2}, {rows} rows: {got}, not {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn widths_are_split_as_flatquant_splits_them() {
        for (n, want) in [
            (576, (24, 24)),
            (1536, (32, 48)),
            (4096, (64, 64)),
            (11008, (86, 128)),
            (14336, (112, 128)),
            (13824, (108, 128)),
            (6, (2, 3)),
            (12, (2, 6)),
            (7, (1, 7)),
            (1, (1, 1)),
        ] {
            assert_eq!(Kronecker::widths(n), want, "{n}");
        }
    }

    /// (x K)(w K⁻ᵀ)ᵀ = x wᵀ, and K⁻¹ undoes K.
    #[test]
    fn the_inverse_transpose_keeps_products() {
        for (n1, n2) in affordable(SHAPES, |(n1, n2)| (n1 * n2).pow(2)) {
            let n = n1 * n2;
            // Far from orthonormal, and far from singular.
            let matrix = |n: usize, seed| {
                let mut m = noise(n * n, seed);
                m.iter_mut().for_each(|v| *v *= 0.5 / (n as f32).sqrt());
                m.iter_mut().step_by(n + 1).for_each(|v| *v += 1.5);
                m
            };
            let kronecker = Kronecker::new(n, matrix(n1, 7), matrix(n2, 8));
            let inverse = kronecker.inverse_transposed().unwrap();
            let (x, w) = (noise(3 * n, 1), noise(2 * n, 2));
            let (mut tx, mut tw) = (x.clone(), w.clone());
            kronecker.apply(&mut tx, 3);
            inverse.apply(&mut tw, 2);
            let dot = |x: &[f32], w: &[f32]| -> f64 {
                x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
            };
            for i in 0..3 {
                for j in 0..2 {
                    let (want, got) =
                        (dot(&x[i * n..][..n], &w[j * n..][..n]), dot(&tx[i * n..][..n], &tw[j * n..][..n]));
                    assert!((want - got).abs() < 1e-3, "{n1} × {n2}: {got}, not {want}");
                }
            }
            inverse.transposed().apply(&mut tx, 3);
            for (got, want) in tx.iter().zip(&x) {
                assert!((got - want).abs() < 1e-3, "{n1} × {n2}, undone: {got}, not {want}");
            }
        }
    }

    #[test]
    fn a_singular_factor_has_no_inverse() {
        for left in [vec![0.0; 4], vec![1.0, 2.0, 2.0, 4.0], vec![f32::NAN, 0.0, 0.0, 1.0]] {
            assert!(Kronecker::new(6, left, Vec::new()).inverse_transposed().is_none());
        }
        assert!(Kronecker::new(6, Vec::new(), Vec::new()).inverse_transposed().is_some());
    }

    #[test]
    fn many_rows_equal_single_rows_on_any_number_of_threads() {
        let (rows, n) = (301, 96);
        let x = noise(rows * n, 3);
        let kronecker = Kronecker::new(n, noise(64, 4), noise(144, 5));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut x = x.clone();
            pool.install(|| kronecker.apply(&mut x, rows));
            x
        };
        let all = run(1);
        assert!(all == run(2) && all == run(3));
        for (row, want) in x.chunks(n).zip(all.chunks(n)) {
            let mut row = row.to_vec();
            kronecker.apply(&mut row, 1);
            assert_eq!(row, want);
        }
    }

    #[test]
    #[should_panic(expected = "no Kronecker factors")]
    fn widths_that_do_not_multiply() {
        Kronecker::new(10, vec![1.0; 4], vec![1.0; 9]);
    }
}
