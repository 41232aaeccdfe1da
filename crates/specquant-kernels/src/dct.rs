//! The orthonormal cosine transform DCT-II of any width: a rotation that spreads an outlier as a Hadamard transform does, without asking for a
//! Hadamard matrix of that order.
//!
//! ```text
//! y_k = √(2/n) · Σ_i x_i cos(π (2i + 1) k / 2n)   for k > 0,     y_0 = √(1/n) · Σ_i x_i
//! ```
//!
//! in n log n by one real Fourier transform of the reordered values (Makhoul, IEEE Trans. ASSP 28, 1980): the even ones in rising order, then the odd
//! ones in falling order, whose k-th coefficient is turned by k/4n of a turn.

use crate::fft::{Fft, Passes, ROWS, Rows, Spectrum};
use crate::isa::with_token;
use crate::{Isa, for_each_chunk};
use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner};
use std::fmt;
use std::sync::Arc;

/// Values per task; fewer are not worth a second thread.
const CHUNK: usize = 1 << 15;

/// Fewer rows are transformed one by one.
const FEW_ROWS: usize = 4;

/// The plan of a transform of vectors of n values.
#[derive(Clone)]
pub struct Dct {
    n: usize,
    /// Of n / 2 pairs of values as complex numbers; of n values where n is odd.
    fft: Fft,
    inverse: Arc<dyn ComplexToReal<f32>>,
    /// What the real part of a coefficient is of: scale · e^(−iπk/2n), [n/2 + 1].
    turns: Vec<Complex<f32>>,
    /// For an even n: what of the two halves' coefficients Z_k and conj Z_(n/2−k) make y_k and y_(n−k), [n/2 + 1].
    join: Vec<[Complex<f32>; 2]>,
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
            Complex::new(scale * cosine, -scale * sine)
        };
        // V_k = (Z_k + conj Z_(m−k)) / 2 + e^(−2πik/n) (Z_k − conj Z_(m−k)) / 2i, and y_k = Re(turn_k · V_k).
        let join = |k: usize| {
            let (sine, cosine) = (2.0 * std::f64::consts::PI * k as f64 / n as f64).sin_cos();
            let odd = Complex::new(cosine, -sine) * Complex::new(0.0, -0.5);
            [(turn(k) * (odd + 0.5)), (turn(k) * (-odd + 0.5))].map(narrow)
        };
        let even = n.is_multiple_of(2);
        Dct {
            n,
            fft: Fft::new(if even { n / 2 } else { n }),
            inverse: RealFftPlanner::new().plan_fft_inverse(n),
            turns: (0..=n / 2).map(|k| narrow(turn(k))).collect(),
            join: if even { (0..=n / 2).map(join).collect() } else { Vec::new() },
        }
    }

    /// x ↦ y for every row, in place. x: [rows, n]. The result depends neither on the other rows nor on the number of threads.
    ///
    /// # Panics
    /// If x is not [rows, n].
    pub fn apply(&self, x: &mut [f32], rows: usize) {
        self.apply_with(Isa::active(), x, rows);
    }

    fn apply_with(&self, isa: Isa, x: &mut [f32], rows: usize) {
        assert_eq!(x.len(), rows * self.n, "cosine transform: x is not [{rows}, {}]", self.n);
        let task = |x: &mut [f32]| with_token!(isa, k => self.rows(k, x));
        let at_once = (CHUNK / self.n).max(1).next_multiple_of(ROWS);
        for_each_chunk(x, at_once * self.n, |_, x| task(x));
    }

    /// [`apply`](Self::apply) on this thread: 16 rows at a time, or one.
    fn rows(&self, token: impl Rows, x: &mut [f32]) {
        if x.len() < FEW_ROWS * self.n {
            let (mut work, mut y) = (self.work(), vec![[0.0]; self.n]);
            for row in x.chunks_exact_mut(self.n) {
                self.transform(token, &mut work, |i| [row[i]], &mut y);
                row.iter_mut().zip(&y).for_each(|(x, [y])| *x = *y);
            }
            return;
        }
        let padded = self.n.next_multiple_of(ROWS);
        let (mut work, mut columns, mut y) =
            (self.work(), vec![[0.0; ROWS]; padded], vec![[0.0; ROWS]; padded]);
        for x in x.chunks_mut(ROWS * self.n) {
            let mut block = [[0.0; ROWS]; ROWS];
            for (i, columns) in columns.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
                for (to, row) in block.iter_mut().zip(x.chunks_exact(self.n)) {
                    copy(&row[i * ROWS..], to);
                }
                *columns = block;
                token.transpose(columns);
            }
            self.transform(token, &mut work, |i| columns[i], &mut y[..self.n]);
            for (i, y) in y.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
                token.transpose(y);
                for (from, row) in y.iter().zip(x.chunks_exact_mut(self.n)) {
                    copy(from, &mut row[i * ROWS..]);
                }
            }
        }
    }

    fn work<const R: usize>(&self) -> [Spectrum<R>; 2] {
        let numbers = if self.join.is_empty() { self.n } else { self.n / 2 };
        [Spectrum::zeros(numbers), Spectrum::zeros(numbers)]
    }

    /// y from x of R rows: x(i) is value i of every row.
    fn transform<const R: usize>(
        &self,
        token: impl Rows + Passes<R>,
        [a, b]: &mut [Spectrum<R>; 2],
        x: impl Fn(usize) -> [f32; R],
        y: &mut [[f32; R]],
    ) {
        let n = self.n;
        // Makhoul's order.
        let value = |j: usize| x(if 2 * j < n { 2 * j } else { 2 * (n - j) - 1 });
        if self.join.is_empty() {
            (0..n).for_each(|j| a.re[j] = value(j));
            a.im.fill([0.0; R]);
            let v = self.fft.transform(token, a, b);
            // A real input's other half is the conjugate: y_(n−k) is the negative imaginary part of what y_k is the real part of.
            for (k, t) in self.turns.iter().enumerate() {
                for l in 0..R {
                    let (re, im) = (v.re[k][l], v.im[k][l]);
                    y[k][l] = t.re * re - t.im * im;
                    if k > 0 {
                        y[n - k][l] = -(t.im * re + t.re * im);
                    }
                }
            }
        } else {
            for j in 0..n / 2 {
                (a.re[j], a.im[j]) = (value(2 * j), value(2 * j + 1));
            }
            token.join(self.fft.transform(token, a, b), &self.join, y);
        }
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
        for_each_chunk(y, at_once * self.n, |_, y| task(y));
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
}

fn narrow(z: Complex<f64>) -> Complex<f32> {
    Complex::new(z.re as f32, z.im as f32)
}

/// As much of `from` as `to` has room for, up to 16.
fn copy(from: &[f32], to: &mut [f32]) {
    match (from.first_chunk::<ROWS>(), to.first_chunk_mut::<ROWS>()) {
        (Some(from), Some(to)) => *to = *from,
        _ => to.iter_mut().zip(from).for_each(|(to, v)| *to = *v),
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
    use crate::ops::affordable;

    #[test]
    fn equals_the_matrix() {
        let shapes = [(1, 3), (2, 3), (3, 40), (7, 16), (8, 17), (45, 3), (64, 3), (544, 20), (1504, 3)];
        for (n, rows) in affordable(shapes, |(n, rows)| n * n * rows) {
            let x: Vec<f32> = (0..rows * n).map(|i| ((i * 7919 + 5) % 1009) as f32 / 504.5 - 1.0).collect();
            let want = Basis::Dct(n).project(&x, rows, n);
            let mut got = x.clone();
            Dct::new(n).apply(&mut got, rows);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((g - w).abs() < 2e-5, "n {n}, {i}: {g} {w}");
            }
            for isa in Isa::available() {
                let mut twin = x.clone();
                Dct::new(n).apply_with(isa, &mut twin, rows);
                assert_eq!(twin, got, "{isa:?} {n}");
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
