//! The butterflies between the lanes of a vector.

#[cfg(target_arch = "x86_64")]
use crate::isa::Avx2;
use crate::isa::Scalar;
use crate::lanes::Lanes;

/// What Hadamard transforms ask of [`Lanes`] besides arithmetic.
pub(super) trait Butterflies<const N: usize>: Lanes<N> {
    /// The butterflies of all strides below N between the lanes.
    fn butterflies(self, v: Self::V) -> Self::V;
}

impl Butterflies<8> for Scalar {
    #[inline(always)]
    fn butterflies(self, v: [f32; 8]) -> [f32; 8] {
        [1, 2, 4].into_iter().fold(v, |v, bit| {
            std::array::from_fn(|l| if l & bit == 0 { v[l] + v[l | bit] } else { v[l ^ bit] - v[l] })
        })
    }
}

#[cfg(target_arch = "x86_64")]
impl Butterflies<8> for Avx2 {
    #[inline(always)]
    fn butterflies(self, [v]: Self::V) -> Self::V {
        use std::arch::x86_64::*;
        // Every lane is added to its partner, the second of a pair after a change of its sign.
        // SAFETY: the token proves AVX2.
        unsafe {
            let signs = _mm256_setr_ps(0., -0., 0., -0., 0., -0., 0., -0.);
            let v = _mm256_add_ps(_mm256_permute_ps::<0b10_11_00_01>(v), _mm256_xor_ps(v, signs));
            let signs = _mm256_setr_ps(0., 0., -0., -0., 0., 0., -0., -0.);
            let v = _mm256_add_ps(_mm256_permute_ps::<0b01_00_11_10>(v), _mm256_xor_ps(v, signs));
            let signs = _mm256_setr_ps(0., 0., 0., 0., -0., -0., -0., -0.);
            [_mm256_add_ps(_mm256_permute2f128_ps::<0x01>(v, v), _mm256_xor_ps(v, signs))]
        }
    }
}
