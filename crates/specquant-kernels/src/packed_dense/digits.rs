//! Products with int8 weights as products of bytes: a value in 16 bits is two digits of 8,
//!
//! ```text
//! x ≈ scale · (256 · high + low − 32768)      scale = max |x| / 32767
//! ```
//!
//! so that two integer products, whose sums are exact, take the place of one of floats. A value is off by half a step at most, 2⁻¹⁶ of the row's largest.

use crate::acts::stride;
use crate::ops::{LANES, twin};
use crate::{Buffer, IntProduct, Isa, PackedWeights, QuantizedActs, matmul_int_with};

/// Largest magnitude of a value, in steps, and what makes it a positive number.
const LARGEST: f32 = 32767.0;
const MIDDLE: f32 = 32768.0;

/// Whether two integer products take less time than one of floats: where bytes are multiplied four at a time.
pub(super) fn pay(isa: Isa) -> bool {
    !matches!(isa, Isa::Scalar | Isa::Avx2)
}

/// y [m, n] = x [m, k] · wᵀ. A row that is not finite gives NaN.
pub(super) fn multiply(isa: Isa, x: &[f32], w: &PackedWeights, y: &mut [f32], m: usize) {
    let k = w.in_features();
    let stride = stride(k);
    let [mut high, mut low] = [128, 0].map(|zero| {
        let mut acts = QuantizedActs {
            rows: m,
            cols: k,
            stride,
            bits: 8,
            codes: Buffer::zeros(m * stride),
            scale: Buffer::new(m),
            zero: Buffer::new(m),
        };
        acts.zero.fill(zero);
        acts
    });
    let codes = high.codes.chunks_exact_mut(stride).zip(low.codes.chunks_exact_mut(stride));
    for (row, ((h, l), x)) in codes.zip(x.chunks_exact(k)).enumerate() {
        let scale = digits(x, h, l);
        (high.scale[row], low.scale[row]) = (256.0 * scale, scale);
    }
    matmul_int_with(isa, [IntProduct { parts: &[(&high, w), (&low, w)], branch: None, y }]);
}

twin! {
    /// The digits of a row, and its scale: NaN if a value is not finite.
    fn digits = digits_body(x: &[f32], high: &mut [u8], low: &mut [u8]) -> f32
}

#[inline(always)]
fn digits_body(x: &[f32], high: &mut [u8], low: &mut [u8]) -> f32 {
    let mut largest = [0.0f32; LANES];
    let (whole, tail) = x.as_chunks::<LANES>();
    let larger = |a: f32, v: f32| if v.abs() > a || v.is_nan() { v.abs() } else { a };
    for x in whole {
        (0..LANES).for_each(|i| largest[i] = larger(largest[i], x[i]));
    }
    let largest = largest.into_iter().chain(tail.iter().copied()).fold(0.0, larger);
    if !largest.is_finite() {
        return f32::NAN;
    }
    // Steps of less have no inverse.
    let scale = (largest / LARGEST).max(f32::MIN_POSITIVE);
    let inverse = 1.0 / scale;
    for ((x, high), low) in x.iter().zip(high).zip(low) {
        let value = (x * inverse).clamp(-LARGEST, LARGEST).round_ties_even() + MIDDLE;
        let value = value as u32;
        (*high, *low) = ((value >> 8) as u8, value as u8);
    }
    scale
}
