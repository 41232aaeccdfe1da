//! The orthonormal cosine transform DCT-II of any width: a rotation that spreads an outlier as a Hadamard transform does, without asking for a
//! Hadamard matrix of that order.
//!
//! ```text
//! y_k = √(2/n) · Σ_i x_i cos(π (2i + 1) k / 2n)   for k > 0,     y_0 = √(1/n) · Σ_i x_i
//! ```
//!
//! in n log n by one real Fourier transform of the reordered values (Makhoul, IEEE Trans. ASSP 28, 1980): the even ones in rising order, then the odd
//! ones in falling order, whose k-th coefficient is turned by k/4n of a turn.

use rayon::prelude::*;
use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};
use std::fmt;
use std::sync::Arc;

/// Values per task; fewer are not worth a second thread.
const CHUNK: usize = 1 << 14;

/// The plan of a transform of vectors of n values.
#[derive(Clone)]
pub struct Dct {
    n: usize,
    fft: Arc<dyn RealToComplex<f32>>,
    inverse: Arc<dyn ComplexToReal<f32>>,
    /// What the real part of a coefficient is of: scale · e^(−iπk/2n), [n/2 + 1].
    turns: Vec<Complex<f32>>,
}

impl Dct {
    /// The transform of vectors of `n` values.
    ///
    /// # Panics
    /// If n is 0.
    pub fn new(n: usize) -> Self {
        assert!(n > 0, "a cosine transform of no values");
        let turn = |k: usize| {
            let scale = (if k == 0 { 1.0 } else { 2.0 } / n as f64).sqrt();
            let (sine, cosine) = (std::f64::consts::PI * k as f64 / (2 * n) as f64).sin_cos();
            Complex::new((scale * cosine) as f32, (-scale * sine) as f32)
        };
        let mut planner = RealFftPlanner::new();
        let (fft, inverse) = (planner.plan_fft_forward(n), planner.plan_fft_inverse(n));
        Dct { n, fft, inverse, turns: (0..=n / 2).map(turn).collect() }
    }

    /// x ↦ y for every row, in place. x: [rows, n]. The result depends neither on the other rows nor on the number of threads.
    ///
    /// # Panics
    /// If x is not [rows, n].
    pub fn apply(&self, x: &mut [f32], rows: usize) {
        assert_eq!(x.len(), rows * self.n, "cosine transform: x is not [{rows}, {}]", self.n);
        let at_once = (CHUNK / self.n).max(1);
        let task = |x: &mut [f32]| {
            let (mut values, mut spectrum) = (self.fft.make_input_vec(), self.fft.make_output_vec());
            let mut scratch = self.fft.make_scratch_vec();
            for row in x.chunks_exact_mut(self.n) {
                self.transform(row, &mut values, &mut spectrum, &mut scratch);
            }
        };
        if rows <= at_once { task(x) } else { x.par_chunks_mut(at_once * self.n).for_each(task) }
    }

    /// y ↦ x for every row, in place: undoes [`apply`](Self::apply). y: [rows, n].
    ///
    /// # Panics
    /// If y is not [rows, n].
    pub fn apply_transposed(&self, y: &mut [f32], rows: usize) {
        assert_eq!(y.len(), rows * self.n, "cosine transform: y is not [{rows}, {}]", self.n);
        let task = |y: &mut [f32]| {
            let (mut spectrum, mut values) = (self.inverse.make_input_vec(), self.inverse.make_output_vec());
            let mut scratch = self.inverse.make_scratch_vec();
            for row in y.chunks_exact_mut(self.n) {
                self.undo(row, &mut values, &mut spectrum, &mut scratch);
            }
        };
        let at_once = (CHUNK / self.n).max(1);
        if rows <= at_once { task(y) } else { y.par_chunks_mut(at_once * self.n).for_each(task) }
    }

    fn undo(
        &self,
        y: &mut [f32],
        values: &mut [f32],
        spectrum: &mut [Complex<f32>],
        scratch: &mut [Complex<f32>],
    ) {
        let n = self.n;
        for (k, (s, turn)) in spectrum.iter_mut().zip(&self.turns).enumerate() {
            *s = Complex::new(y[k], if k == 0 { 0.0 } else { -y[n - k] }) / turn / n as f32;
            // What is real but for rounding, which the inverse transform insists on.
            if k == 0 || 2 * k == n {
                s.im = 0.0;
            }
        }
        // Only wrong lengths and imaginary parts at the ends are errors.
        if self.inverse.process_with_scratch(spectrum, values, scratch).is_err() {
            return;
        }
        let (evens, odds) = values.split_at(n.div_ceil(2));
        y.iter_mut().step_by(2).zip(evens).for_each(|(to, v)| *to = *v);
        y.iter_mut().skip(1).step_by(2).zip(odds.iter().rev()).for_each(|(to, v)| *to = *v);
    }

    fn transform(
        &self,
        x: &mut [f32],
        values: &mut [f32],
        spectrum: &mut [Complex<f32>],
        scratch: &mut [Complex<f32>],
    ) {
        let n = self.n;
        let (evens, odds) = values.split_at_mut(n.div_ceil(2));
        evens.iter_mut().zip(x.iter().step_by(2)).for_each(|(to, v)| *to = *v);
        odds.iter_mut().rev().zip(x.iter().skip(1).step_by(2)).for_each(|(to, v)| *to = *v);
        // Only wrong lengths are errors, and these are the plan's own.
        if self.fft.process_with_scratch(values, spectrum, scratch).is_err() {
            return;
        }
        // A real input's other half is the conjugate, and its turn (cos, sin) is that of n − k mirrored: y_(n−k) is the
        // negative imaginary part of what y_k is the real part of.
        for (k, (s, turn)) in spectrum.iter().zip(&self.turns).enumerate() {
            let y = s * turn;
            x[k] = y.re;
            if k > 0 && 2 * k != n {
                x[n - k] = -y.im;
            }
        }
    }
}

impl fmt::Debug for Dct {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Dct").field("n", &self.n).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Basis;

    #[test]
    fn equals_the_matrix() {
        for n in [1, 2, 3, 7, 8, 45, 64, 560, 1504] {
            let rows = 3;
            let x: Vec<f32> = (0..rows * n).map(|i| ((i * 7919 + 5) % 1009) as f32 / 504.5 - 1.0).collect();
            let want = Basis::Dct(n).project(&x, rows, n);
            let mut got = x.clone();
            Dct::new(n).apply(&mut got, rows);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((g - w).abs() < 2e-5, "n {n}, {i}: {g} {w}");
            }
            Dct::new(n).apply_transposed(&mut got, rows);
            for (i, (g, w)) in got.iter().zip(&x).enumerate() {
                assert!((g - w).abs() < 2e-5, "n {n}, {i}, undone: {g} {w}");
            }
        }
    }

    #[test]
    fn many_rows_equal_single_rows() {
        let (rows, n) = (300, 96);
        let x: Vec<f32> = (0..rows * n).map(|i| ((i * 31 + 5) % 101) as f32 / 50.0 - 1.0).collect();
        let dct = Dct::new(n);
        let mut all = x.clone();
        dct.apply(&mut all, rows);
        for (row, want) in x.chunks(n).zip(all.chunks(n)) {
            let mut row = row.to_vec();
            dct.apply(&mut row, 1);
            assert_eq!(row, want);
        }
    }
}
