//! The passes and transpositions of x86-64's instruction sets.

use super::*;
use crate::isa::{Avx2, Avx512Vnni};
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f,fma")]
fn pass512(s: Avx512Vnni, p: &Pass, stride: usize, x: View<ROWS>, y: ViewMut<ROWS>) {
    pass(s, p, stride, x, y);
}

#[target_feature(enable = "avx2,fma")]
fn pass256(s: Avx2, p: &Pass, stride: usize, x: View<ROWS>, y: ViewMut<ROWS>) {
    pass(s, p, stride, x, y);
}

#[target_feature(enable = "avx2,fma")]
fn pass_alone(p: &Pass, stride: usize, x: View<1>, y: ViewMut<1>) {
    pass(Scalar, p, stride, x, y);
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
        unsafe { pass256(self, pass, stride, x, y) }
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
        unsafe { pass512(self, pass, stride, x, y) }
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
