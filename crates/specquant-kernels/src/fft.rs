//! The complex Fourier transform of any length, of 16 rows at once or of one: every lane of a register belongs to a row, so that all of it is
//! vector code whatever the factors of the length are, and a row's result does not depend on the others'.
//!
//! Stockham's form of Cooley and Tukey's algorithm (Van Loan, Computational Frameworks for the FFT, 1992, section 1.7): a pass for every prime
//! factor p, and for 4, from one buffer to another, with no reordering in the end. A pass costs some p multiply-adds a number, which
//! suits the factors of model widths.

#[cfg(target_arch = "x86_64")]
mod x86;

use crate::isa::Scalar;
use crate::lanes::Lanes;

/// Rows at once, where there are several.
pub(crate) const ROWS: usize = 16;

/// One number of each of 16 rows.
pub(crate) type Row16 = [f32; ROWS];

/// Real and imaginary parts of numbers of R rows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spectrum<const R: usize> {
    pub(crate) re: Vec<[f32; R]>,
    pub(crate) im: Vec<[f32; R]>,
}

impl<const R: usize> Spectrum<R> {
    pub(crate) fn zeros(n: usize) -> Self {
        Spectrum { re: vec![[0.0; R]; n], im: vec![[0.0; R]; n] }
    }

    fn view(&self) -> View<'_, R> {
        View { re: &self.re, im: &self.im }
    }

    fn view_mut(&mut self) -> ViewMut<'_, R> {
        ViewMut { re: &mut self.re, im: &mut self.im }
    }
}

/// A [`Spectrum`] to read.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, const R: usize> {
    re: &'a [[f32; R]],
    im: &'a [[f32; R]],
}

impl<'a, const R: usize> View<'a, R> {
    /// The same numbers, 16 together.
    fn sixteens(self) -> View<'a, ROWS> {
        View { re: self.re.as_flattened().as_chunks().0, im: self.im.as_flattened().as_chunks().0 }
    }
}

/// A [`Spectrum`] to write.
pub(crate) struct ViewMut<'a, const R: usize> {
    re: &'a mut [[f32; R]],
    im: &'a mut [[f32; R]],
}

impl<'a, const R: usize> ViewMut<'a, R> {
    fn sixteens(self) -> ViewMut<'a, ROWS> {
        ViewMut {
            re: self.re.as_flattened_mut().as_chunks_mut().0,
            im: self.im.as_flattened_mut().as_chunks_mut().0,
        }
    }
}

/// The plan of a transform of n numbers: X_k = Σ_i x_i e^(−2πi·ik/n).
#[derive(Debug, Clone)]
pub(crate) struct Fft {
    n: usize,
    passes: Vec<Pass>,
}

/// One pass over all numbers.
#[derive(Debug, Clone)]
pub(crate) struct Pass {
    /// The factor that this pass takes out.
    factor: usize,
    /// Numbers between neighbours of one small transform's outputs: the product of the factors before.
    stride: usize,
    /// e^(−2πi·jt/(p·m)) for j in 0..m and t in 1..p, where p·m numbers are still to be transformed.
    twiddles: Vec<[f32; 2]>,
    /// cos and sin of 2πjt/p for t and j in 1..=(p − 1)/2; nothing for factors with code of their own.
    circle: Vec<[f32; 2]>,
}

impl Fft {
    /// Of n numbers.
    ///
    /// # Panics
    /// If n is 0.
    pub(crate) fn new(n: usize) -> Self {
        assert!(n > 0, "a Fourier transform of no numbers");
        let turn = |part: usize, of: usize| {
            let (sin, cos) = (2.0 * std::f64::consts::PI * part as f64 / of as f64).sin_cos();
            [cos as f32, sin as f32]
        };
        let (mut passes, mut left, mut stride) = (Vec::new(), n, 1);
        while left > 1 {
            let factor = if left.is_multiple_of(4) { 4 } else { smallest_factor(left) };
            let m = left / factor;
            let twiddles = (0..m).flat_map(|j| (1..factor).map(move |t| (j, t)));
            let half = (1..=(factor - 1) / 2).flat_map(|t| (1..=(factor - 1) / 2).map(move |j| (j, t)));
            passes.push(Pass {
                factor,
                stride,
                twiddles: twiddles.map(|(j, t)| turn(j * t, left)).map(|[c, s]| [c, -s]).collect(),
                circle: match factor {
                    2 | 4 => Vec::new(),
                    p => half.map(|(j, t)| turn(j * t % p, p)).collect(),
                },
            });
            (left, stride) = (m, stride * factor);
        }
        Fft { n, passes }
    }

    /// Transforms x; `other` is for the passes in between, of the same length. Returns which of the two holds the result.
    ///
    /// # Panics
    /// If they do not hold n numbers.
    pub(crate) fn transform<'a, K: Rows + Passes<R>, const R: usize>(
        &self,
        token: K,
        mut x: &'a mut Spectrum<R>,
        mut other: &'a mut Spectrum<R>,
    ) -> &'a mut Spectrum<R> {
        for s in [&*x, &*other] {
            assert!(
                s.re.len() == self.n && s.im.len() == self.n,
                "a Fourier transform of {} numbers",
                self.n
            );
        }
        for pass in &self.passes {
            let (from, to) = (x.view(), other.view_mut());
            if R == 1 && pass.stride.is_multiple_of(ROWS) {
                // What is done to the numbers of a stride is the same for all: a row alone fills the lanes with them.
                token.pass(pass, pass.stride / ROWS, from.sixteens(), to.sixteens());
            } else {
                token.pass(pass, pass.stride, from, to);
            }
            std::mem::swap(&mut x, &mut other);
        }
        x
    }
}

fn smallest_factor(n: usize) -> usize {
    (2..).take_while(|p| p * p <= n).find(|p| n.is_multiple_of(*p)).unwrap_or(n)
}

/// An instruction set's way through a pass over numbers of R rows.
pub(crate) trait Passes<const R: usize>: Copy {
    /// stride: numbers of R rows between neighbours.
    fn pass(self, pass: &Pass, stride: usize, x: View<R>, y: ViewMut<R>);
    /// With the transform Z of m pairs of values (the first of a pair real, the second imaginary) and factors [p, q] for k in 0..=m: the real part of
    /// `p Z_k + q conj Z_(m−k)` is `y[k]`, the negative imaginary part `y[2m − k]`. y: `[2m]`.
    fn join(self, z: &Spectrum<R>, factors: &[[Factor; 2]], y: &mut [[f32; R]]);
}

/// What numbers of a spectrum are multiplied with.
pub(crate) type Factor = realfft::num_complex::Complex<f32>;

/// What the transforms of this crate ask of an instruction set.
pub(crate) trait Rows: Passes<1> + Passes<ROWS> {
    /// Makes rows of columns.
    fn transpose(self, block: &mut [Row16; ROWS]);
}

#[inline(always)]
fn join<const R: usize>(z: &Spectrum<R>, factors: &[[Factor; 2]], y: &mut [[f32; R]]) {
    let m = z.re.len();
    for (k, [p, q]) in factors.iter().enumerate() {
        let (front, mirror) = (if k == m { 0 } else { k }, if k == 0 { 0 } else { m - k });
        let (zr, zi, mr, mi) = (&z.re[front], &z.im[front], &z.re[mirror], &z.im[mirror]);
        let to = &mut y[k];
        for l in 0..R {
            to[l] = p.re * zr[l] - p.im * zi[l] + (q.re * mr[l] + q.im * mi[l]);
        }
        if k > 0 && k < m {
            let to = &mut y[2 * m - k];
            for l in 0..R {
                to[l] = q.re * mi[l] - q.im * mr[l] - (p.im * zr[l] + p.re * zi[l]);
            }
        }
    }
}

fn transpose(block: &mut [Row16; ROWS]) {
    for i in 0..ROWS {
        for j in 0..i {
            (block[i][j], block[j][i]) = (block[j][i], block[i][j]);
        }
    }
}

impl<const R: usize> Passes<R> for Scalar {
    fn pass(self, p: &Pass, stride: usize, x: View<R>, y: ViewMut<R>) {
        pass(self, p, stride, x, y);
    }
    fn join(self, z: &Spectrum<R>, factors: &[[Factor; 2]], y: &mut [[f32; R]]) {
        join(z, factors, y);
    }
}

impl Rows for Scalar {
    fn transpose(self, block: &mut [Row16; ROWS]) {
        transpose(block);
    }
}

/// A complex number of every row.
#[derive(Clone, Copy)]
struct Complex<V> {
    re: V,
    im: V,
}

/// Arithmetic on [`Complex`] numbers of R rows.
#[derive(Clone, Copy)]
struct Complexes<S, const R: usize>(S);

impl<S: Lanes<R>, const R: usize> Complexes<S, R> {
    #[inline(always)]
    fn zero(self) -> Complex<S::V> {
        Complex { re: self.0.zero(), im: self.0.zero() }
    }

    #[inline(always)]
    fn load(self, from: View<R>, i: usize) -> Complex<S::V> {
        Complex { re: self.0.load(&from.re[i]), im: self.0.load(&from.im[i]) }
    }

    #[inline(always)]
    fn store(self, v: Complex<S::V>, to: &mut ViewMut<R>, i: usize) {
        self.0.store(v.re, &mut to.re[i]);
        self.0.store(v.im, &mut to.im[i]);
    }

    #[inline(always)]
    fn add(self, a: Complex<S::V>, b: Complex<S::V>) -> Complex<S::V> {
        Complex { re: self.0.add(a.re, b.re), im: self.0.add(a.im, b.im) }
    }

    #[inline(always)]
    fn sub(self, a: Complex<S::V>, b: Complex<S::V>) -> Complex<S::V> {
        Complex { re: self.0.sub(a.re, b.re), im: self.0.sub(a.im, b.im) }
    }

    /// v · −i.
    #[inline(always)]
    fn back(self, v: Complex<S::V>) -> Complex<S::V> {
        Complex { re: v.im, im: self.0.sub(self.0.zero(), v.re) }
    }

    /// v · (c + i s).
    #[inline(always)]
    fn turn(self, v: Complex<S::V>, [c, s]: [f32; 2]) -> Complex<S::V> {
        let op = self.0;
        Complex {
            re: op.add_scaled(op.scale(v.re, c), v.im, -s),
            im: op.add_scaled(op.scale(v.im, c), v.re, s),
        }
    }

    /// sum + v · factor.
    #[inline(always)]
    fn add_scaled(self, sum: Complex<S::V>, v: Complex<S::V>, factor: f32) -> Complex<S::V> {
        Complex { re: self.0.add_scaled(sum.re, v.re, factor), im: self.0.add_scaled(sum.im, v.im, factor) }
    }
}

/// One pass: for j in 0..m and every number k of a stride, the p numbers k + stride · (j + m i) are transformed, turned, and stored side by
/// side as k + stride · (p j + t).
#[inline(always)]
fn pass<S: Lanes<R>, const R: usize>(s: S, pass: &Pass, stride: usize, x: View<R>, mut y: ViewMut<R>) {
    let (op, p, y) = (Complexes::<S, R>(s), pass.factor, &mut y);
    let m = x.re.len() / (p * stride);
    let mut sums = vec![[op.zero(); 2]; p / 2];
    for j in 0..m {
        let turns = &pass.twiddles[j * (p - 1)..(j + 1) * (p - 1)];
        for k in 0..stride {
            let from = |i: usize| op.load(x, k + stride * (j + m * i));
            let to = |t: usize| k + stride * (p * j + t);
            match p {
                2 => {
                    let (a, b) = (from(0), from(1));
                    op.store(op.add(a, b), y, to(0));
                    op.store(op.turn(op.sub(a, b), turns[0]), y, to(1));
                }
                4 => {
                    let [a, b, c, d] = [from(0), from(1), from(2), from(3)];
                    let even = [op.add(a, c), op.sub(a, c)];
                    let odd = [op.add(b, d), op.back(op.sub(b, d))];
                    op.store(op.add(even[0], odd[0]), y, to(0));
                    op.store(op.turn(op.add(even[1], odd[1]), turns[0]), y, to(1));
                    op.store(op.turn(op.sub(even[0], odd[0]), turns[1]), y, to(2));
                    op.store(op.turn(op.sub(even[1], odd[1]), turns[2]), y, to(3));
                }
                _ => {
                    let first = from(0);
                    let mut all = first;
                    for (i, sum) in (1..).zip(&mut sums) {
                        let (a, b) = (from(i), from(p - i));
                        *sum = [op.add(a, b), op.sub(a, b)];
                        all = op.add(all, sum[0]);
                    }
                    op.store(all, y, to(0));
                    let mut t = 1;
                    while t <= sums.len() {
                        t += match sums.len() + 1 - t {
                            4.. => outputs::<S, R, 4>(op, pass, &sums, first, t, turns, y, to),
                            _ => outputs::<S, R, 1>(op, pass, &sums, first, t, turns, y, to),
                        };
                    }
                }
            }
        }
    }
}

/// Outputs t to t + T − 1 of a small transform and their mirror images: T at a time, so that a sum is loaded once for all of them. Returns T.
///
/// Output t is x₀ + Σ cos · (x_j + x_(p−j)) − i Σ sin · (x_j − x_(p−j)), and p − t has the other sign. sums: those of every j, [+, −].
#[inline(always)]
fn outputs<S: Lanes<R>, const R: usize, const T: usize>(
    op: Complexes<S, R>,
    pass: &Pass,
    sums: &[[Complex<S::V>; 2]],
    first: Complex<S::V>,
    t: usize,
    turns: &[[f32; 2]],
    y: &mut ViewMut<R>,
    to: impl Fn(usize) -> usize,
) -> usize {
    let (mut even, mut odd) = ([first; T], [op.zero(); T]);
    let circles: [&[[f32; 2]]; T] =
        std::array::from_fn(|o| &pass.circle[(t + o - 1) * sums.len()..][..sums.len()]);
    for (j, [sum, difference]) in sums.iter().enumerate() {
        for o in 0..T {
            let [c, s] = circles[o][j];
            even[o] = op.add_scaled(even[o], *sum, c);
            odd[o] = op.add_scaled(odd[o], *difference, s);
        }
    }
    let p = pass.factor;
    for o in 0..T {
        let (t, odd) = (t + o, op.back(odd[o]));
        op.store(op.turn(op.add(even[o], odd), turns[t - 1]), y, to(t));
        op.store(op.turn(op.sub(even[o], odd), turns[p - t - 1]), y, to(p - t));
    }
    T
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::isa::with_token;
    use crate::ops::affordable;

    #[test]
    fn transposes() {
        let block: [Row16; ROWS] = std::array::from_fn(|i| std::array::from_fn(|j| (16 * i + j) as f32));
        for isa in Isa::available() {
            let mut got = block;
            with_token!(isa, k => Rows::transpose(k, &mut got));
            assert!((0..256).all(|e| got[e % 16][e / 16] == block[e / 16][e % 16]), "{isa:?}");
        }
    }

    #[test]
    fn equals_the_definition_on_every_instruction_set() {
        let lengths = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 30, 47, 94, 272, 283];
        for n in affordable(lengths, |n| 4 * n * n) {
            let value = |i: usize, l: usize| ((i * 7919 + l * 31 + 5) % 1009) as f32 / 504.5 - 1.0;
            let mut x = Spectrum::<ROWS>::zeros(n);
            for i in 0..n {
                x.re[i] = std::array::from_fn(|l| value(i, l));
                x.im[i] = std::array::from_fn(|l| value(i + n, l));
            }
            let fft = Fft::new(n);
            let mut scalar: Option<Spectrum<ROWS>> = None;
            for isa in Isa::available() {
                let (mut a, mut b) = (x.clone(), Spectrum::zeros(n));
                let got = with_token!(isa, k => fft.transform(k, &mut a, &mut b)).clone();
                let twin = scalar.get_or_insert_with(|| got.clone());
                assert_eq!((&got.re, &got.im), (&twin.re, &twin.im), "{isa:?}");
                // Each row alone gives the same.
                let one = |v: &[Row16]| v.iter().map(|v| [v[3]]).collect::<Vec<_>>();
                let (mut a, mut b) = (Spectrum { re: one(&x.re), im: one(&x.im) }, Spectrum::zeros(n));
                let alone = with_token!(isa, k => fft.transform(k, &mut a, &mut b)).clone();
                assert_eq!((alone.re, alone.im), (one(&got.re), one(&got.im)), "{isa:?}");
                for k in 0..n {
                    for l in [0, 7, 15] {
                        let (mut re, mut im) = (0.0f64, 0.0f64);
                        for i in 0..n {
                            let angle = -2.0 * std::f64::consts::PI * (i * k % n) as f64 / n as f64;
                            let (a, b) = (f64::from(x.re[i][l]), f64::from(x.im[i][l]));
                            re += a * angle.cos() - b * angle.sin();
                            im += a * angle.sin() + b * angle.cos();
                        }
                        let tolerance = 2e-6 * (n as f64).sqrt() + 1e-6;
                        assert!(
                            (f64::from(got.re[k][l]) - re).abs() < tolerance,
                            "{n} {k}: {} {re}",
                            got.re[k][l]
                        );
                        assert!(
                            (f64::from(got.im[k][l]) - im).abs() < tolerance,
                            "{n} {k}: {} {im}",
                            got.im[k][l]
                        );
                    }
                }
            }
        }
    }
}
