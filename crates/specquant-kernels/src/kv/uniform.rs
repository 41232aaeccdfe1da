//! Cache rows of evenly spaced codes, per token and head: the formula is in [`super`].

use super::range;
use crate::ops::{twin, widen_f16};
use half::f16;

/// Quantizes elements from..from + head_dim of every `width`-wide row of x; scales come out as f32 that are exact in f16.
#[inline(always)]
fn quantize_body(
    x: &[f32],
    width: usize,
    from: usize,
    head_dim: usize,
    bits: u8,
    clip: f32,
    codes: &mut [u8],
    scales: &mut [f32],
    zeros: &mut [u8],
) {
    let top = ((1u32 << bits) - 1) as f32;
    let packed = bits <= 4;
    let half = head_dim.div_ceil(2);
    let bytes = if packed { half } else { head_dim };
    for (t, codes) in codes.chunks_exact_mut(bytes).enumerate() {
        let x = &x[t * width + from..][..head_dim];
        let (lo, hi) = range(x);
        let (lo, hi) = (lo * clip, hi * clip);
        if lo.is_nan() {
            scales[t] = f32::NAN;
            continue;
        }
        // Far beyond f16 the range saturates; a range that rounds to nothing leaves zeros, for which any scale will do.
        let scale = f16::from_f32(((hi - lo) / top).min(f16::MAX.to_f32())).to_f32();
        let scale = if scale == 0.0 { 1.0 } else { scale };
        let zero = (-lo / scale).round_ties_even().min(top);
        scales[t] = scale;
        zeros[t] = zero as u8;
        let code = |v: f32| {
            let q = (v / scale).round_ties_even() + zero;
            let q = if q < 0.0 { 0.0 } else { q };
            let q = if q > top { top } else { q };
            // The low mantissa bits of q + 2^23 are the integer q: cheaper than a saturating conversion.
            (q + 8_388_608.0).to_bits() as u8
        };
        if packed {
            let (first, second) = x.split_at(half);
            for (c, &v) in codes.iter_mut().zip(first) {
                *c = code(v);
            }
            for (c, &v) in codes.iter_mut().zip(second) {
                *c |= code(v) << 4;
            }
        } else {
            for (c, &v) in codes.iter_mut().zip(x) {
                *c = code(v);
            }
        }
    }
}

twin! {
    pub(super) fn quantize = quantize_body(
        x: &[f32], width: usize, from: usize, head_dim: usize, bits: u8, clip: f32,
        codes: &mut [u8], scales: &mut [f32], zeros: &mut [u8],
    )
}

/// The values of rows of codes. codes: two a byte if `packed`; scale, zero: [rows]; out: [rows, head_dim].
pub(super) fn dequantize(
    codes: &[u8],
    packed: bool,
    scale: &[f16],
    zero: &[u8],
    head_dim: usize,
    out: &mut [f32],
) {
    // Scales are widened many at a time: one by one, each would ask for the instruction set.
    const ROWS: usize = 64;
    let mut wide = [0.0f32; ROWS];
    let bytes = if packed { head_dim.div_ceil(2) } else { head_dim };
    let tokens = scale.chunks(ROWS).zip(zero.chunks(ROWS)).zip(codes.chunks(ROWS * bytes));
    for (((scale, zero), codes), out) in tokens.zip(out.chunks_mut(ROWS * head_dim)) {
        let wide = &mut wide[..scale.len()];
        widen_f16(scale, wide);
        if packed {
            widen_nibbles(codes, wide, zero, head_dim, out);
        } else {
            widen_bytes(codes, wide, zero, head_dim, out);
        }
    }
}

#[inline(always)]
fn widen_nibbles_body(codes: &[u8], scale: &[f32], zero: &[u8], head_dim: usize, out: &mut [f32]) {
    let half = head_dim.div_ceil(2);
    for (t, out) in out.chunks_exact_mut(head_dim).enumerate() {
        let (s, z) = (scale[t], i32::from(zero[t]));
        let (first, second) = out.split_at_mut(half);
        let codes = &codes[t * half..][..half];
        for (v, &c) in first.iter_mut().zip(codes) {
            *v = (i32::from(c & 15) - z) as f32 * s;
        }
        for (v, &c) in second.iter_mut().zip(codes) {
            *v = (i32::from(c >> 4) - z) as f32 * s;
        }
    }
}

twin! {
    fn widen_nibbles = widen_nibbles_body(codes: &[u8], scale: &[f32], zero: &[u8], head_dim: usize, out: &mut [f32])
}

#[inline(always)]
fn widen_bytes_body(codes: &[u8], scale: &[f32], zero: &[u8], head_dim: usize, out: &mut [f32]) {
    for (t, (out, codes)) in out.chunks_exact_mut(head_dim).zip(codes.chunks_exact(head_dim)).enumerate() {
        let (s, z) = (scale[t], i32::from(zero[t]));
        for (v, &c) in out.iter_mut().zip(codes) {
            *v = (i32::from(c) - z) as f32 * s;
        }
    }
}

twin! {
    fn widen_bytes = widen_bytes_body(codes: &[u8], scale: &[f32], zero: &[u8], head_dim: usize, out: &mut [f32])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_noise as noise;

    #[test]
    fn twins_agree() {
        for (bits, head_dim) in [(4, 64), (4, 7), (8, 33)] {
            let (t, width) = (9, 2 * head_dim);
            let x = noise(t * width, 3);
            let bytes = if bits <= 4 { head_dim.div_ceil(2) } else { head_dim };
            let (mut c1, mut s1, mut z1) = (vec![0; t * bytes], vec![0.0; t], vec![0; t]);
            let (mut c2, mut s2, mut z2) = (c1.clone(), s1.clone(), z1.clone());
            quantize(&x, width, head_dim, head_dim, bits, 0.95, &mut c1, &mut s1, &mut z1);
            quantize_body(&x, width, head_dim, head_dim, bits, 0.95, &mut c2, &mut s2, &mut z2);
            assert_eq!((&c1, &s1, &z1), (&c2, &s2, &z2));
            let (mut a, mut b) = (vec![0.0; t * head_dim], vec![0.0; t * head_dim]);
            if bits <= 4 {
                widen_nibbles(&c1, &s1, &z1, head_dim, &mut a);
                widen_nibbles_body(&c1, &s1, &z1, head_dim, &mut b);
            } else {
                widen_bytes(&c1, &s1, &z1, head_dim, &mut a);
                widen_bytes_body(&c1, &s1, &z1, head_dim, &mut b);
            }
            assert_eq!(a, b);
        }
    }
}
