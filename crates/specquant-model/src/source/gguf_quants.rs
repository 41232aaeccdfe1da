//! ggml's block formats, widened to f32 (ggml/src/ggml-quants.c, `dequantize_row_*`; block layouts in ggml-common.h).

use half::f16;

use super::Dtype;

/// Widens whole blocks. Nothing happens for types without blocks.
pub(super) fn dequantize(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    let Some((elements, size)) = dtype.block() else { return };
    let widen: fn(&[u8], &mut [f32]) = match dtype {
        Dtype::Q4_0 => q4_0,
        Dtype::Q4_1 => q4_1,
        Dtype::Q5_0 => q5_0,
        Dtype::Q5_1 => q5_1,
        Dtype::Q8_0 => q8_0,
        Dtype::Q4K => q4_k,
        Dtype::Q5K => q5_k,
        Dtype::Q6K => q6_k,
        _ => return,
    };
    for (block, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(elements)) {
        widen(block, out);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `d`, 16 bytes of nibbles: the low ones are elements 0 to 15, the high ones 16 to 31.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (j, q) in block[2..18].iter().enumerate() {
        out[j] = (i32::from(q & 15) - 8) as f32 * d;
        out[j + 16] = (i32::from(q >> 4) - 8) as f32 * d;
    }
}

/// `d`, `m`, nibbles.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, q) in block[4..20].iter().enumerate() {
        out[j] = f32::from(q & 15) * d + m;
        out[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The 32 five-bit codes of 4 bytes of fifth bits and 16 of nibbles.
fn five_bits(high: &[u8], low: &[u8]) -> [u8; 32] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    std::array::from_fn(|i| {
        let nibble = if i < 16 { low[i] & 15 } else { low[i - 16] >> 4 };
        nibble | ((high >> i) as u8 & 1) << 4
    })
}

/// `d`, fifth bits, nibbles.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let codes = five_bits(&block[2..6], &block[6..22]);
    out.iter_mut().zip(codes).for_each(|(x, q)| *x = (i32::from(q) - 16) as f32 * d);
}

/// `d`, `m`, fifth bits, nibbles.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let codes = five_bits(&block[4..8], &block[8..24]);
    out.iter_mut().zip(codes).for_each(|(x, q)| *x = f32::from(q) * d + m);
}

/// `d`, 32 signed bytes.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    out.iter_mut().zip(&block[2..34]).for_each(|(x, &q)| *x = f32::from(q as i8) * d);
}

/// Scale and minimum of group `j` of 8, from 12 bytes of six-bit numbers (`get_scale_min_k4`).
fn scale_min(j: usize, s: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// `d`, `dmin`, scales, 128 bytes of nibbles: each 32 bytes hold two groups, low nibbles first.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(group, &block[4..16]);
        let (scale, min) = (d * scale, dmin * min);
        let low = &block[16 + group / 2 * 32..][..32];
        let shift = group % 2 * 4;
        out.iter_mut().zip(low).for_each(|(x, q)| *x = scale * f32::from(q >> shift & 15) - min);
    }
}

/// `d`, `dmin`, scales, 32 bytes of fifth bits (bit g belongs to group g), nibbles as in Q4_K.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(group, &block[4..16]);
        let (scale, min) = (d * scale, dmin * min);
        let low = &block[48 + group / 2 * 32..][..32];
        let shift = group % 2 * 4;
        for ((x, q), high) in out.iter_mut().zip(low).zip(&block[16..48]) {
            *x = scale * f32::from(q >> shift & 15 | (high >> group & 1) << 4) - min;
        }
    }
}

/// 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales, `d`. Each half of the block: four runs of 32 elements.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 208);
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let (half, quarter) = (run / 4, run % 4);
        let low = &block[half * 64 + quarter % 2 * 32..][..32];
        let high = &block[128 + half * 32..][..32];
        for (l, x) in out.iter_mut().enumerate() {
            let q = low[l] >> (quarter / 2 * 4) & 15 | (high[l] >> (2 * quarter) & 3) << 4;
            let scale = block[192 + run * 2 + l / 16] as i8;
            *x = d * f32::from(scale) * (i32::from(q) - 32) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Element `i` of a block, straight from the layouts of ggml-common.h: a block is a string of little-endian bit fields.
    fn slow(dtype: Dtype, b: &[u8], i: usize) -> f64 {
        let f = |at: usize| f64::from(f16::from_bits(u16::from(b[at]) | u16::from(b[at + 1]) << 8));
        let bits = |byte: usize, bit: usize, n: usize| -> i64 {
            (0..n).map(|k| i64::from(b[byte + (bit + k) / 8] >> ((bit + k) % 8) & 1) << k).sum()
        };
        let nibble32 = |at: usize| bits(at + i % 16, if i < 16 { 0 } else { 4 }, 4);
        // Six-bit scales and minima of the K formats: 0..4 in the low six bits of bytes 0..4 and 4..8; 4..8 in nibbles of bytes 8..12
        // plus the top two bits of the former.
        let k_scale = |at: usize, g: usize| -> (f64, f64) {
            let (s, m) = match g {
                0..4 => (bits(at + g, 0, 6), bits(at + 4 + g, 0, 6)),
                _ => (
                    bits(at + 4 + g, 0, 4) + 16 * bits(at + g - 4, 6, 2),
                    bits(at + 4 + g, 4, 4) + 16 * bits(at + g, 6, 2),
                ),
            };
            (s as f64, m as f64)
        };
        match dtype {
            Dtype::Q4_0 => (nibble32(2) - 8) as f64 * f(0),
            Dtype::Q4_1 => nibble32(4) as f64 * f(0) + f(2),
            Dtype::Q5_0 => (nibble32(6) + 16 * bits(2, i, 1) - 16) as f64 * f(0),
            Dtype::Q5_1 => (nibble32(8) + 16 * bits(4, i, 1)) as f64 * f(0) + f(2),
            Dtype::Q8_0 => f64::from(b[2 + i] as i8) * f(0),
            Dtype::Q4K => {
                let (s, m) = k_scale(4, i / 32);
                f(0) * s * bits(16 + i / 64 * 32 + i % 32, i / 32 % 2 * 4, 4) as f64 - f(2) * m
            }
            Dtype::Q5K => {
                let (s, m) = k_scale(4, i / 32);
                let q =
                    bits(48 + i / 64 * 32 + i % 32, i / 32 % 2 * 4, 4) + 16 * bits(16 + i % 32, i / 32, 1);
                f(0) * s * q as f64 - f(2) * m
            }
            Dtype::Q6K => {
                let q = bits(i / 128 * 64 + i % 64, i / 64 % 2 * 4, 4)
                    + 16 * bits(128 + i / 128 * 32 + i % 32, i % 128 / 32 * 2, 2);
                f(208) * f64::from(b[192 + i / 16] as i8) * (q - 32) as f64
            }
            _ => unreachable!(),
        }
    }

    proptest! {
        #[test]
        fn equals_the_slow_twin(seed in prop::collection::vec(any::<u8>(), 420), d in -3.0f32..3.0, m in -3.0f32..3.0) {
            use Dtype::*;
            for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
                let (elements, size) = dtype.block().unwrap();
                let mut bytes = seed[..2 * size].to_vec();
                for block in bytes.chunks_exact_mut(size) {
                    // Random bits would often be NaN.
                    let at = if dtype == Q6K { 208 } else { 0 };
                    block[at..at + 2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
                    if matches!(dtype, Q4_1 | Q5_1 | Q4K | Q5K) {
                        block[2..4].copy_from_slice(&f16::from_f32(m).to_le_bytes());
                    }
                }
                let mut out = vec![0.0; 2 * elements];
                dequantize(dtype, &bytes, &mut out);
                for (i, &x) in out.iter().enumerate() {
                    let expect = slow(dtype, &bytes[i / elements * size..][..size], i % elements);
                    let close = (f64::from(x) - expect).abs() <= 1e-6 * (1.0 + expect.abs()) * 64.0;
                    prop_assert!(close, "{dtype:?}[{i}]: {x} {expect}");
                }
            }
        }
    }
}
