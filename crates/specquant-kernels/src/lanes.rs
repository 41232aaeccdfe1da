//! N floats at a time. A token of [`crate::isa`] is what allows its instructions, so that these functions are safe.

use crate::isa::Scalar;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512Vnni};

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
                v.map(|v| unsafe { std::arch::x86_64::$mul(v, std::arch::x86_64::$splat(factor)) })
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
