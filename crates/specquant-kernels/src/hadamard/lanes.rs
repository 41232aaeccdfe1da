//! Eight floats at a time, or one. A token of [`crate::isa`] is what allows its instructions, so that these functions are safe.

#[cfg(target_arch = "x86_64")]
use crate::isa::Avx2;
use crate::isa::Scalar;

/// Arithmetic on vectors of N floats. Each operation is exact or rounds once: all implementations give the same bits.
pub(super) trait Lanes<const N: usize>: Copy {
    type V: Copy;

    fn zero(self) -> Self::V;
    fn load(self, x: &[f32; N]) -> Self::V;
    fn store(self, v: Self::V, x: &mut [f32; N]);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn scale(self, v: Self::V, scale: f32) -> Self::V;
    /// The butterflies of all strides below N between the lanes.
    fn butterflies(self, v: Self::V) -> Self::V;
}

impl Lanes<8> for Scalar {
    type V = [f32; 8];

    #[inline(always)]
    fn zero(self) -> Self::V {
        [0.0; 8]
    }

    #[inline(always)]
    fn load(self, x: &[f32; 8]) -> Self::V {
        *x
    }

    #[inline(always)]
    fn store(self, v: Self::V, x: &mut [f32; 8]) {
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
    fn scale(self, v: Self::V, scale: f32) -> Self::V {
        v.map(|v| v * scale)
    }

    #[inline(always)]
    fn butterflies(self, v: Self::V) -> Self::V {
        [1, 2, 4].into_iter().fold(v, |v, bit| {
            std::array::from_fn(|l| if l & bit == 0 { v[l] + v[l | bit] } else { v[l ^ bit] - v[l] })
        })
    }
}

/// One float at a time, where there are too few side by side.
#[derive(Clone, Copy)]
pub(super) struct Single;

impl Lanes<1> for Single {
    type V = f32;

    #[inline(always)]
    fn zero(self) -> f32 {
        0.0
    }

    #[inline(always)]
    fn load(self, x: &[f32; 1]) -> f32 {
        x[0]
    }

    #[inline(always)]
    fn store(self, v: f32, x: &mut [f32; 1]) {
        *x = [v];
    }

    #[inline(always)]
    fn add(self, a: f32, b: f32) -> f32 {
        a + b
    }

    #[inline(always)]
    fn sub(self, a: f32, b: f32) -> f32 {
        a - b
    }

    #[inline(always)]
    fn scale(self, v: f32, scale: f32) -> f32 {
        v * scale
    }

    #[inline(always)]
    fn butterflies(self, v: f32) -> f32 {
        v
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    impl Lanes<8> for Avx2 {
        type V = __m256;

        #[inline(always)]
        fn zero(self) -> __m256 {
            // SAFETY: the token proves AVX2.
            unsafe { _mm256_setzero_ps() }
        }

        #[inline(always)]
        fn load(self, x: &[f32; 8]) -> __m256 {
            // SAFETY: the token proves AVX2; x has 8 floats.
            unsafe { _mm256_loadu_ps(x.as_ptr()) }
        }

        #[inline(always)]
        fn store(self, v: __m256, x: &mut [f32; 8]) {
            // SAFETY: the token proves AVX2; x has 8 floats.
            unsafe { _mm256_storeu_ps(x.as_mut_ptr(), v) }
        }

        #[inline(always)]
        fn add(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: the token proves AVX2.
            unsafe { _mm256_add_ps(a, b) }
        }

        #[inline(always)]
        fn sub(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: the token proves AVX2.
            unsafe { _mm256_sub_ps(a, b) }
        }

        #[inline(always)]
        fn scale(self, v: __m256, scale: f32) -> __m256 {
            // SAFETY: the token proves AVX2.
            unsafe { _mm256_mul_ps(v, _mm256_set1_ps(scale)) }
        }

        #[inline(always)]
        fn butterflies(self, v: __m256) -> __m256 {
            // Every lane is added to its partner, the second of a pair after a change of its sign.
            // SAFETY: the token proves AVX2.
            unsafe {
                let signs = _mm256_setr_ps(0., -0., 0., -0., 0., -0., 0., -0.);
                let v = _mm256_add_ps(_mm256_permute_ps::<0b10_11_00_01>(v), _mm256_xor_ps(v, signs));
                let signs = _mm256_setr_ps(0., 0., -0., -0., 0., 0., -0., -0.);
                let v = _mm256_add_ps(_mm256_permute_ps::<0b01_00_11_10>(v), _mm256_xor_ps(v, signs));
                let signs = _mm256_setr_ps(0., 0., 0., 0., -0., -0., -0., -0.);
                _mm256_add_ps(_mm256_permute2f128_ps::<0x01>(v, v), _mm256_xor_ps(v, signs))
            }
        }
    }
}
