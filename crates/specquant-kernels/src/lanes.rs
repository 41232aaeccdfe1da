//! N floats at a time. A token of [`crate::isa`] is what allows its instructions, so that these functions are safe.

use crate::isa::Scalar;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512Vnni};
use crate::ops::fold;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Arithmetic on vectors of N floats. Each operation is exact or rounds once: all implementations give the same bits.
pub(crate) trait Lanes<const N: usize>: Copy {
    type V: Copy;

    fn zero(self) -> Self::V;
    fn load(self, x: &[f32; N]) -> Self::V;
    fn store(self, v: Self::V, x: &mut [f32; N]);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// v · factor.
    fn scale(self, v: Self::V, factor: f32) -> Self::V;
    /// v + x · factor.
    fn add_scaled(self, v: Self::V, x: Self::V, factor: f32) -> Self::V;
}

/// What sums of products need besides.
pub(crate) trait Fold: Lanes<16> {
    /// a · b + v.
    fn mul_add(self, a: Self::V, b: Self::V, v: Self::V) -> Self::V;
    /// The sum across the lanes of each, as [`fold`] adds them.
    fn fold_four(self, v: [Self::V; 4]) -> [f32; 4];
}

impl Fold for Scalar {
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, v: Self::V) -> Self::V {
        std::array::from_fn(|l| a[l].mul_add(b[l], v[l]))
    }

    #[inline(always)]
    fn fold_four(self, v: [Self::V; 4]) -> [f32; 4] {
        v.map(fold)
    }
}

/// Any number of them; one at a time, where there are too few side by side.
impl<const N: usize> Lanes<N> for Scalar {
    type V = [f32; N];

    #[inline(always)]
    fn zero(self) -> Self::V {
        [0.0; N]
    }

    #[inline(always)]
    fn load(self, x: &[f32; N]) -> Self::V {
        *x
    }

    #[inline(always)]
    fn store(self, v: Self::V, x: &mut [f32; N]) {
        *x = v;
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|l| a[l] + b[l])
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|l| a[l] - b[l])
    }

    #[inline(always)]
    fn scale(self, v: Self::V, factor: f32) -> Self::V {
        v.map(|v| v * factor)
    }

    #[inline(always)]
    fn add_scaled(self, v: Self::V, x: Self::V, factor: f32) -> Self::V {
        std::array::from_fn(|l| x[l].mul_add(factor, v[l]))
    }
}

/// [`Lanes`] of `$n` floats in `$count` registers `$reg` of an instruction set.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_lanes {
    ($token:ty, $n:literal, $reg:ident x $count:literal,
     $zero:ident, $load:ident, $store:ident, $add:ident, $sub:ident, $mul:ident, $splat:ident, $fma:ident) => {
        // SAFETY (of all): the token proves the instruction set; every register's floats lie in the array.
        impl Lanes<$n> for $token {
            type V = [std::arch::x86_64::$reg; $count];

            #[inline(always)]
            fn zero(self) -> Self::V {
                [unsafe { std::arch::x86_64::$zero() }; $count]
            }

            #[inline(always)]
            fn load(self, x: &[f32; $n]) -> Self::V {
                std::array::from_fn(|i| unsafe {
                    std::arch::x86_64::$load(x.as_ptr().add(i * ($n / $count)))
                })
            }

            #[inline(always)]
            fn store(self, v: Self::V, x: &mut [f32; $n]) {
                for (i, v) in v.into_iter().enumerate() {
                    unsafe { std::arch::x86_64::$store(x.as_mut_ptr().add(i * ($n / $count)), v) };
                }
            }

            #[inline(always)]
            fn add(self, a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|i| unsafe { std::arch::x86_64::$add(a[i], b[i]) })
            }

            #[inline(always)]
            fn sub(self, a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|i| unsafe { std::arch::x86_64::$sub(a[i], b[i]) })
            }

            #[inline(always)]
            fn scale(self, v: Self::V, factor: f32) -> Self::V {
                std::array::from_fn(|i| unsafe {
                    std::arch::x86_64::$mul(v[i], std::arch::x86_64::$splat(factor))
                })
            }

            #[inline(always)]
            fn add_scaled(self, v: Self::V, x: Self::V, factor: f32) -> Self::V {
                std::array::from_fn(|i| unsafe {
                    std::arch::x86_64::$fma(x[i], std::arch::x86_64::$splat(factor), v[i])
                })
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
macro_rules! avx2_lanes {
    ($n:literal, $count:literal) => {
        x86_lanes!(
            Avx2, $n, __m256 x $count, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, _mm256_sub_ps,
            _mm256_mul_ps, _mm256_set1_ps, _mm256_fmadd_ps
        );
    };
}

#[cfg(target_arch = "x86_64")]
avx2_lanes!(8, 1);
#[cfg(target_arch = "x86_64")]
avx2_lanes!(16, 2);
#[cfg(target_arch = "x86_64")]
x86_lanes!(
    Avx512Vnni, 16, __m512 x 1, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, _mm512_sub_ps,
    _mm512_mul_ps, _mm512_set1_ps, _mm512_fmadd_ps
);

/// The sums across the lanes of four vectors of eight, each in the order of [`fold`]: halves, then halves of those.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fold_eights([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
    let mut sums = [0.0; 4];
    // SAFETY: only called with the token of an instruction set that has AVX2; the array holds four floats.
    unsafe {
        let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let b = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
        let c = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps::<1>(c));
        let d = _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps::<1>(d));
        // [a0 + a2, a1 + a3, b0 + b2, b1 + b3], and of c and d.
        let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
        let cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
        let even = _mm_shuffle_ps::<0b10_00_10_00>(ab, cd);
        let odd = _mm_shuffle_ps::<0b11_01_11_01>(ab, cd);
        _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(even, odd));
    }
    sums
}

#[cfg(target_arch = "x86_64")]
impl Fold for Avx2 {
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, v: Self::V) -> Self::V {
        // SAFETY: the token proves FMA.
        std::array::from_fn(|i| unsafe { _mm256_fmadd_ps(a[i], b[i], v[i]) })
    }

    #[inline(always)]
    fn fold_four(self, v: [Self::V; 4]) -> [f32; 4] {
        // (A closure would be compiled without the instruction set, and might be called.)
        let mut halves = [v[0][0]; 4];
        for i in 0..4 {
            // SAFETY: the token proves AVX2.
            halves[i] = unsafe { _mm256_add_ps(v[i][0], v[i][1]) };
        }
        fold_eights(halves)
    }
}

#[cfg(target_arch = "x86_64")]
impl Fold for Avx512Vnni {
    #[inline(always)]
    fn mul_add(self, [a]: Self::V, [b]: Self::V, [v]: Self::V) -> Self::V {
        // SAFETY: the token proves AVX-512.
        [unsafe { _mm512_fmadd_ps(a, b, v) }]
    }

    #[inline(always)]
    fn fold_four(self, v: [Self::V; 4]) -> [f32; 4] {
        // SAFETY: as below.
        let mut halves = [unsafe { _mm256_setzero_ps() }; 4];
        for i in 0..4 {
            // SAFETY: the token proves AVX-512 F and DQ.
            halves[i] = unsafe {
                _mm256_add_ps(_mm512_castps512_ps256(v[i][0]), _mm512_extractf32x8_ps::<1>(v[i][0]))
            };
        }
        fold_eights(halves)
    }
}
