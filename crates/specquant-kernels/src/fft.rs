//! The complex Fourier transform of any length, of 16 rows at once or of one: every lane of a register belongs to a row, so that all of it is
//! vector code whatever the factors of the length are, and a row's result does not depend on the others'.
//!
//! Stockham's form of Cooley and Tukey's algorithm (Van Loan, Computational Frameworks for the FFT, 1992, section 1.7): a pass for every prime
//! factor p, and for 4, from one buffer to another, with no reordering in the end. A pass costs some p multiply-adds a number, which
//! suits the factors of model widths.

use crate::isa::Scalar;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512Vnni};

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

/// R numbers in registers. Every operation rounds once: all implementations give the same bits.
trait Lanes<const R: usize>: Copy {
    fn zero() -> Self;
    fn load(x: &[f32; R]) -> Self;
    fn store(self, x: &mut [f32; R]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    /// self · factor.
    fn scale(self, factor: f32) -> Self;
    /// self + x · factor.
    fn add_scaled(self, x: Self, factor: f32) -> Self;
}

impl<const R: usize> Lanes<R> for [f32; R] {
    #[inline(always)]
    fn zero() -> Self {
        [0.0; R]
    }
    #[inline(always)]
    fn load(x: &[f32; R]) -> Self {
        *x
    }
    #[inline(always)]
    fn store(self, x: &mut [f32; R]) {
        *x = self;
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        std::array::from_fn(|l| self[l] + other[l])
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        std::array::from_fn(|l| self[l] - other[l])
    }
    #[inline(always)]
    fn scale(self, factor: f32) -> Self {
        self.map(|v| v * factor)
    }
    #[inline(always)]
    fn add_scaled(self, x: Self, factor: f32) -> Self {
        std::array::from_fn(|l| x[l].mul_add(factor, self[l]))
    }
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
        pass::<[f32; R], R>(p, stride, x, y);
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

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    /// [`Lanes`] of `$count` registers. Only functions compiled for the instruction set, which its token calls, name them.
    macro_rules! lanes {
        ($name:ident, $reg:ty, $count:literal, $zero:ident, $load:ident, $store:ident, $add:ident, $sub:ident, $mul:ident, $splat:ident,
         $fma:ident) => {
            #[derive(Clone, Copy)]
            struct $name([$reg; $count]);

            // SAFETY (of all): the instruction set is there, see above; memory is that of whole arrays of 16.
            impl Lanes<ROWS> for $name {
                #[inline(always)]
                fn zero() -> Self {
                    Self([unsafe { $zero() }; $count])
                }
                #[inline(always)]
                fn load(x: &Row16) -> Self {
                    Self(std::array::from_fn(|i| unsafe { $load(x.as_ptr().add(i * (ROWS / $count))) }))
                }
                #[inline(always)]
                fn store(self, x: &mut Row16) {
                    for (i, v) in self.0.into_iter().enumerate() {
                        unsafe { $store(x.as_mut_ptr().add(i * (ROWS / $count)), v) };
                    }
                }
                #[inline(always)]
                fn add(self, other: Self) -> Self {
                    Self(std::array::from_fn(|i| unsafe { $add(self.0[i], other.0[i]) }))
                }
                #[inline(always)]
                fn sub(self, other: Self) -> Self {
                    Self(std::array::from_fn(|i| unsafe { $sub(self.0[i], other.0[i]) }))
                }
                #[inline(always)]
                fn scale(self, factor: f32) -> Self {
                    Self(self.0.map(|v| unsafe { $mul(v, $splat(factor)) }))
                }
                #[inline(always)]
                fn add_scaled(self, x: Self, factor: f32) -> Self {
                    Self(std::array::from_fn(|i| unsafe { $fma(x.0[i], $splat(factor), self.0[i]) }))
                }
            }
        };
    }
    lanes!(
        Zmm,
        __m512,
        1,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps
    );
    lanes!(
        Ymms,
        __m256,
        2,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps
    );

    #[target_feature(enable = "avx512f,fma")]
    fn pass512(p: &Pass, stride: usize, x: View<ROWS>, y: ViewMut<ROWS>) {
        pass::<Zmm, ROWS>(p, stride, x, y);
    }

    #[target_feature(enable = "avx2,fma")]
    fn pass256(p: &Pass, stride: usize, x: View<ROWS>, y: ViewMut<ROWS>) {
        pass::<Ymms, ROWS>(p, stride, x, y);
    }

    #[target_feature(enable = "avx2,fma")]
    fn pass_alone(p: &Pass, stride: usize, x: View<1>, y: ViewMut<1>) {
        pass::<[f32; 1], 1>(p, stride, x, y);
    }

    #[target_feature(enable = "avx512f")]
    fn join512(z: &Spectrum<ROWS>, factors: &[[Factor; 2]], y: &mut [Row16]) {
        join(z, factors, y);
    }

    #[target_feature(enable = "avx2")]
    fn join256<const R: usize>(z: &Spectrum<R>, factors: &[[Factor; 2]], y: &mut [[f32; R]]) {
        join(z, factors, y);
    }

    /// Pairs, then quads within 128-bit lanes, then the lanes themselves change places.
    #[target_feature(enable = "avx512f")]
    fn transpose512(block: &mut [Row16; ROWS]) {
        // SAFETY: whole arrays of 16.
        let mut a: [__m512; 16] = std::array::from_fn(|i| unsafe { _mm512_loadu_ps(block[i].as_ptr()) });
        let mut b = a;
        for i in 0..8 {
            b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
        }
        for i in 0..4 {
            for h in 0..2 {
                let (u, v) = (_mm512_castps_pd(b[4 * i + h]), _mm512_castps_pd(b[4 * i + 2 + h]));
                a[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(u, v));
                a[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(u, v));
            }
        }
        // a[4 i + c] has, in lane l, column 4 l + c of rows 4 i to 4 i + 3.
        for c in 0..4 {
            let (low, high) = ([a[c], a[4 + c]], [a[8 + c], a[12 + c]]);
            let (p, q) = (
                [
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(low[0], low[1]),
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(high[0], high[1]),
                ],
                [
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(low[0], low[1]),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(high[0], high[1]),
                ],
            );
            b[c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(p[0], p[1]);
            b[8 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(p[0], p[1]);
            b[4 + c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(q[0], q[1]);
            b[12 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(q[0], q[1]);
        }
        for (row, v) in block.iter_mut().zip(b) {
            // SAFETY: a whole array of 16.
            unsafe { _mm512_storeu_ps(row.as_mut_ptr(), v) };
        }
    }

    #[target_feature(enable = "avx2")]
    fn transpose256(block: &mut [Row16; ROWS]) {
        transpose(block);
    }

    impl Passes<ROWS> for Avx2 {
        fn pass(self, pass: &Pass, stride: usize, x: View<ROWS>, y: ViewMut<ROWS>) {
            // SAFETY: the token proves AVX2 and FMA.
            unsafe { pass256(pass, stride, x, y) }
        }
        fn join(self, z: &Spectrum<ROWS>, factors: &[[Factor; 2]], y: &mut [Row16]) {
            // SAFETY: the token proves AVX2.
            unsafe { join256(z, factors, y) }
        }
    }

    impl Passes<1> for Avx2 {
        fn pass(self, pass: &Pass, stride: usize, x: View<1>, y: ViewMut<1>) {
            // SAFETY: the token proves AVX2 and FMA.
            unsafe { pass_alone(pass, stride, x, y) }
        }
        fn join(self, z: &Spectrum<1>, factors: &[[Factor; 2]], y: &mut [[f32; 1]]) {
            // SAFETY: the token proves AVX2.
            unsafe { join256(z, factors, y) }
        }
    }

    impl Rows for Avx2 {
        fn transpose(self, block: &mut [Row16; ROWS]) {
            // SAFETY: the token proves AVX2.
            unsafe { transpose256(block) }
        }
    }

    impl Passes<ROWS> for Avx512Vnni {
        fn pass(self, pass: &Pass, stride: usize, x: View<ROWS>, y: ViewMut<ROWS>) {
            // SAFETY: the token proves AVX-512 F and FMA.
            unsafe { pass512(pass, stride, x, y) }
        }
        fn join(self, z: &Spectrum<ROWS>, factors: &[[Factor; 2]], y: &mut [Row16]) {
            // SAFETY: the token proves AVX-512 F.
            unsafe { join512(z, factors, y) }
        }
    }

    impl Passes<1> for Avx512Vnni {
        fn pass(self, pass: &Pass, stride: usize, x: View<1>, y: ViewMut<1>) {
            self.avx2.pass(pass, stride, x, y);
        }
        fn join(self, z: &Spectrum<1>, factors: &[[Factor; 2]], y: &mut [[f32; 1]]) {
            self.avx2.join(z, factors, y);
        }
    }

    impl Rows for Avx512Vnni {
        fn transpose(self, block: &mut [Row16; ROWS]) {
            // SAFETY: the token proves AVX-512 F.
            unsafe { transpose512(block) }
        }
    }
}

/// A complex number of every row.
#[derive(Clone, Copy)]
struct Complex<V> {
    re: V,
    im: V,
}

#[inline(always)]
fn load<V: Lanes<R>, const R: usize>(s: View<R>, i: usize) -> Complex<V> {
    Complex { re: V::load(&s.re[i]), im: V::load(&s.im[i]) }
}

#[inline(always)]
fn store<V: Lanes<R>, const R: usize>(v: Complex<V>, s: &mut ViewMut<R>, i: usize) {
    v.re.store(&mut s.re[i]);
    v.im.store(&mut s.im[i]);
}

/// Arithmetic on [`Complex`].
trait Arithmetic<const R: usize>: Copy {
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    /// Times −i.
    fn back(self) -> Self;
    /// Times c + i s.
    fn turn(self, turn: [f32; 2]) -> Self;
}

impl<V: Lanes<R>, const R: usize> Arithmetic<R> for Complex<V> {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Complex { re: self.re.add(other.re), im: self.im.add(other.im) }
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Complex { re: self.re.sub(other.re), im: self.im.sub(other.im) }
    }
    #[inline(always)]
    fn back(self) -> Self {
        Complex { re: self.im, im: V::zero().sub(self.re) }
    }
    #[inline(always)]
    fn turn(self, [c, s]: [f32; 2]) -> Self {
        Complex { re: self.re.scale(c).add_scaled(self.im, -s), im: self.im.scale(c).add_scaled(self.re, s) }
    }
}

/// One pass: for j in 0..m and every number k of a stride, the p numbers k + stride · (j + m i) are transformed, turned, and stored side by
/// side as k + stride · (p j + t).
#[inline(always)]
fn pass<V: Lanes<R>, const R: usize>(pass: &Pass, stride: usize, x: View<R>, mut y: ViewMut<R>) {
    let (p, y) = (pass.factor, &mut y);
    let m = x.re.len() / (p * stride);
    let mut sums = vec![[Complex { re: V::zero(), im: V::zero() }; 2]; p / 2];
    for j in 0..m {
        let turns = &pass.twiddles[j * (p - 1)..(j + 1) * (p - 1)];
        for k in 0..stride {
            let from = |i: usize| load::<V, R>(x, k + stride * (j + m * i));
            let to = |t: usize| k + stride * (p * j + t);
            match p {
                2 => {
                    let (a, b) = (from(0), from(1));
                    store(a.add(b), y, to(0));
                    store(a.sub(b).turn(turns[0]), y, to(1));
                }
                4 => {
                    let [a, b, c, d] = [from(0), from(1), from(2), from(3)];
                    let (even, odd) = ([a.add(c), a.sub(c)], [b.add(d), b.sub(d).back()]);
                    store(even[0].add(odd[0]), y, to(0));
                    store(even[1].add(odd[1]).turn(turns[0]), y, to(1));
                    store(even[0].sub(odd[0]).turn(turns[1]), y, to(2));
                    store(even[1].sub(odd[1]).turn(turns[2]), y, to(3));
                }
                _ => {
                    let first = from(0);
                    let mut all = first;
                    for (i, sum) in (1..).zip(&mut sums) {
                        let (a, b) = (from(i), from(p - i));
                        *sum = [a.add(b), a.sub(b)];
                        all = all.add(sum[0]);
                    }
                    store(all, y, to(0));
                    let mut t = 1;
                    while t <= sums.len() {
                        let left = sums.len() + 1 - t;
                        let done = if left >= 4 {
                            outputs::<V, R, 4>(pass, &sums, first, t)
                                .into_iter()
                                .enumerate()
                                .for_each(|(o, pair)| pair.store(y, turns, t + o, p, to));
                            4
                        } else {
                            let [pair] = outputs::<V, R, 1>(pass, &sums, first, t);
                            pair.store(y, turns, t, p, to);
                            1
                        };
                        t += done;
                    }
                }
            }
        }
    }
}

/// What outputs t and p − t of a small transform consist of.
struct Pair<V> {
    /// x₀ + Σ cos · (x_j + x_(p−j)).
    even: Complex<V>,
    /// Σ sin · (x_j − x_(p−j)).
    odd: Complex<V>,
}

impl<V> Pair<V> {
    #[inline(always)]
    fn store<const R: usize>(
        self,
        y: &mut ViewMut<R>,
        turns: &[[f32; 2]],
        t: usize,
        p: usize,
        to: impl Fn(usize) -> usize,
    ) where
        V: Lanes<R>,
    {
        let odd = self.odd.back();
        store(self.even.add(odd).turn(turns[t - 1]), y, to(t));
        store(self.even.sub(odd).turn(turns[p - t - 1]), y, to(p - t));
    }
}

/// Outputs t to t + T − 1 and their mirror images: T at a time, so that a sum is loaded once for all of them.
#[inline(always)]
fn outputs<V: Lanes<R>, const R: usize, const T: usize>(
    pass: &Pass,
    sums: &[[Complex<V>; 2]],
    first: Complex<V>,
    t: usize,
) -> [Pair<V>; T] {
    let zero = Complex { re: V::zero(), im: V::zero() };
    let (mut even, mut odd) = ([first; T], [zero; T]);
    let circles: [&[[f32; 2]]; T] =
        std::array::from_fn(|o| &pass.circle[(t + o - 1) * sums.len()..][..sums.len()]);
    for (j, [sum, difference]) in sums.iter().enumerate() {
        for o in 0..T {
            let [c, s] = circles[o][j];
            even[o].re = even[o].re.add_scaled(sum.re, c);
            even[o].im = even[o].im.add_scaled(sum.im, c);
            odd[o].re = odd[o].re.add_scaled(difference.re, s);
            odd[o].im = odd[o].im.add_scaled(difference.im, s);
        }
    }
    std::array::from_fn(|o| Pair { even: even[o], odd: odd[o] })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::isa::with_token;

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
        for n in [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 30, 47, 94, 272, 283] {
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
