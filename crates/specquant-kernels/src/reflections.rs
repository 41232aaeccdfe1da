//! Products of Householder reflections: an orthonormal change of coordinates whose first few are any directions one likes.
//!
//! A reflection `H(v) = 1 − 2 v vᵀ / (vᵀv)` is orthonormal for every v but zero, however coarsely v is rounded, so that a transform which is stored in
//! few bits still cancels exactly against the weights that it was multiplied into. r of them in a row are applied at once in their
//! compact form (Schreiber and Van Loan, SIAM J. Sci. Stat. Comput. 10, 1989), two thin products:
//!
//! ```text
//! x H(v₁) ⋯ H(vᵣ) = x − ((x Vᵀ) T) V,    V [r, n],  T [r, r] upper triangular
//! T_jj = 2 / |v_j|²,   T_ij = −T_jj Σ_k T_ik (v_k · v_j)   for i < j
//! ```

use crate::{Buffer, PackedDense, add_matmul_packed, for_each_chunk, matmul_packed};

/// Rows of a task of [`Reflections::apply`].
const ROWS: usize = 256;

/// A product of reflections of vectors of n values.
#[derive(Debug, Clone)]
pub struct Reflections {
    n: usize,
    /// Vᵀ and V as right operands.
    along: PackedDense,
    back: PackedDense,
    /// −T, [r, r], and its transpose.
    factors: [PackedDense; 2],
}

impl Reflections {
    /// H(v₁) ⋯ H(vᵣ). vectors: [r, n], finite, of any length; a vector of zeros reflects nothing.
    ///
    /// # Panics
    /// If `vectors` is not whole vectors of n values.
    pub fn new(n: usize, vectors: Vec<f32>) -> Self {
        assert!(n > 0 && vectors.len().is_multiple_of(n), "reflections: vectors are not [r, {n}]");
        let r = vectors.len() / n;
        let row = |i: usize| &vectors[i * n..(i + 1) * n];
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let mut t = vec![0.0f64; r * r];
        for j in 0..r {
            let length: f64 = dot(row(j), row(j));
            let tau = if length > 0.0 { 2.0 / length } else { 0.0 };
            let products: Vec<f64> = (0..j).map(|k| dot(row(k), row(j))).collect();
            for i in 0..j {
                t[i * r + j] = -tau * (i..j).map(|k| t[i * r + k] * products[k]).sum::<f64>();
            }
            t[j * r + j] = tau;
        }
        let factor: Vec<f32> = t.into_iter().map(|v| -v as f32).collect();
        Reflections {
            n,
            along: PackedDense::pack(&vectors, r, n).compact(),
            back: PackedDense::pack_transposed(&vectors, n, r).compact(),
            factors: [PackedDense::pack_transposed(&factor, r, r), PackedDense::pack(&factor, r, r)],
        }
    }

    /// Width n.
    pub fn width(&self) -> usize {
        self.n
    }

    /// Number r of reflections.
    pub fn len(&self) -> usize {
        self.along.out_features()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The vectors v, [r, n].
    pub fn vectors(&self) -> Vec<f32> {
        self.along.unpack()
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        let factors: usize = self.factors.iter().map(PackedDense::bytes).sum();
        self.along.bytes() + self.back.bytes() + factors
    }

    /// x ↦ x H(v₁) ⋯ H(vᵣ) for every row, in place. x: [rows, n]. The result does not depend on the number of threads.
    ///
    /// # Panics
    /// If x is not [rows, n].
    pub fn apply(&self, x: &mut [f32], rows: usize) {
        self.run(x, rows, false);
    }

    /// x ↦ x H(vᵣ) ⋯ H(v₁) for every row, in place: undoes [`apply`](Self::apply). x: [rows, n].
    ///
    /// # Panics
    /// If x is not [rows, n].
    pub fn apply_transposed(&self, x: &mut [f32], rows: usize) {
        self.run(x, rows, true);
    }

    fn run(&self, x: &mut [f32], rows: usize, transposed: bool) {
        let (n, r) = (self.n, self.len());
        assert_eq!(x.len(), rows * n, "reflections: x is not [{rows}, {n}]");
        if r == 0 {
            return;
        }
        for_each_chunk(x, ROWS * n, |_, x| {
            let rows = x.len() / n;
            let (mut along, mut shares) = (Buffer::new(rows * r), Buffer::new(rows * r));
            matmul_packed(x, &self.along, &mut along, rows);
            matmul_packed(&along, &self.factors[usize::from(transposed)], &mut shares, rows);
            add_matmul_packed(&shares, &self.back, x, rows);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::affordable;

    fn vectors(r: usize, n: usize) -> Vec<f32> {
        (0..r * n).map(|i| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    /// One reflection after another, in f64.
    fn naive(x: &[f32], vectors: &[f32], n: usize) -> Vec<f64> {
        let mut x: Vec<f64> = x.iter().map(|&v| v.into()).collect();
        for v in vectors.chunks(n) {
            let length: f64 = v.iter().map(|&v| f64::from(v).powi(2)).sum();
            for row in x.chunks_mut(n) {
                let along: f64 = row.iter().zip(v).map(|(x, &v)| x * f64::from(v)).sum();
                row.iter_mut().zip(v).for_each(|(x, &v)| *x -= 2.0 * along / length * f64::from(v));
            }
        }
        x
    }

    #[test]
    fn equal_one_reflection_after_another() {
        let shapes = [(1, 8, 1), (3, 40, 5), (300, 96, 16), (1, 576, 32)];
        for (rows, n, r) in affordable(shapes, |(rows, n, r)| rows * n * r) {
            let (v, x) = (vectors(r, n), vectors(rows, n));
            let mut got = x.clone();
            Reflections::new(n, v.clone()).apply(&mut got, rows);
            for (g, w) in got.iter().zip(naive(&x, &v, n)) {
                assert!((f64::from(*g) - w).abs() < 2e-5, "{rows} x {n}, {r}: {g} {w}");
            }
            Reflections::new(n, v).apply_transposed(&mut got, rows);
            for (g, w) in got.iter().zip(x) {
                assert!((g - w).abs() < 2e-5, "{rows} x {n}, {r}, undone: {g} {w}");
            }
        }
    }

    /// Also of coarse vectors: products of rows stay what they were.
    #[test]
    fn keep_inner_products() {
        let (n, r) = (64, 12);
        let coarse: Vec<f32> = vectors(r, n).iter().map(|v| (v * 3.0).round()).collect();
        let plain = vectors(2, n);
        let mut turned = plain.clone();
        Reflections::new(n, coarse).apply(&mut turned, 2);
        let dot =
            |x: &[f32], a: usize, b: usize| -> f32 { (0..n).map(|i| x[a * n + i] * x[b * n + i]).sum() };
        for (a, b) in [(0, 0), (0, 1), (1, 1)] {
            assert!((dot(&plain, a, b) - dot(&turned, a, b)).abs() < 1e-4);
        }
        assert_ne!(plain, turned);
    }

    #[test]
    fn no_vectors_and_zero_vectors_do_nothing() {
        let x = vectors(2, 8);
        for v in [vec![], vec![0.0; 16]] {
            let mut y = x.clone();
            let reflections = Reflections::new(8, v.clone());
            assert_eq!(reflections.vectors(), v);
            reflections.apply(&mut y, 2);
            assert_eq!(x, y);
        }
    }
}
