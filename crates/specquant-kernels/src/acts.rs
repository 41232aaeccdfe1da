//! The activation quantizer: per token, asymmetric.
//!
//! For a token with values `x`, at `b` bits:
//!
//! ```text
//! min   = clip · min(0, min x)          max  = clip · max(0, max x)
//! scale = max((max − min) / (2ᵇ − 1), MIN_SCALE)
//! zero  = round(−min / scale)
//! q     = clamp(round(x / scale) + zero, 0, 2ᵇ − 1)          x ≈ scale · (q − zero)
//! ```
//!
//! with rounding half to even: QuaRot's `ActQuantizer` (`quant_utils.py`: `find_params`, `asym_quant`), which SpinQuant shares.
//! Deviation: where QuaRot replaces the range of an all-zero token by [−1, 1], the scale has a lower bound; both give zeros.

#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512Vnni};
use crate::isa::{Scalar, with_token};
use crate::parallel::{Shared, for_each_index};
use crate::weights::nearest_levels;
use crate::{Buffer, Isa};
use std::ops::Range;

/// Lower bound of a token's scale, so that an all-zero token quantizes to zeros instead of dividing by zero.
pub const MIN_SCALE: f32 = 1e-20;

/// Values that one thread quantizes at least; below, spawning costs more than it saves.
const GRAIN: usize = 1 << 14;

/// Quantized activations, one scale and zero point per token.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedActs {
    /// Tokens.
    pub rows: usize,
    /// Values per token.
    pub cols: usize,
    /// Codes from one token to the next: at least `cols` rounded up to a multiple of 8; the padding is 0.
    pub stride: usize,
    /// Bit width, 2 to 8.
    pub bits: u8,
    /// `[rows, stride]`, each in 0..2^bits.
    pub codes: Buffer<u8>,
    /// `[rows]`: value of one step.
    pub scale: Buffer<f32>,
    /// `[rows]`: code of the value 0.
    pub zero: Buffer<i32>,
}

impl QuantizedActs {
    /// The values that the codes stand for: `[rows, cols]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut x = Vec::with_capacity(self.rows * self.cols);
        for t in 0..self.rows {
            let codes = &self.codes[t * self.stride..][..self.cols];
            x.extend(codes.iter().map(|&q| self.scale[t] * (i32::from(q) - self.zero[t]) as f32));
        }
        x
    }
}

/// Quantizes activations per token (see the module's formula).
///
/// `x`: `[rows, cols]`, finite; `bits`: 2 to 8; `clip` multiplies minimum and maximum (QuaRot: 0.9 for 4 bits).
///
/// # Panics
/// If `x` has another length or `bits` is out of range.
pub fn quantize_acts(x: &[f32], rows: usize, cols: usize, bits: u8, clip: f32) -> QuantizedActs {
    quantize_acts_with(Isa::active(), x, rows, cols, bits, clip)
}

/// Largest level of [`quantize_acts_gaussian`].
const GAUSSIAN_MAX: i32 = 63;

/// The 16 levels of a Gaussian activation, those of [`GAUSSIAN_LEVELS`](crate::GAUSSIAN_LEVELS) in units of 1/63 of the largest: pairs of products with
/// those fit an i16.
const GAUSSIAN_ACT_LEVELS: [i8; 16] = [-63, -48, -37, -29, -22, -15, -9, -3, 3, 9, 15, 22, 29, 37, 48, 63];

/// For every code of 0 to 126, that of the nearest level.
const GAUSSIAN_ACT_CODES: [u8; 128] = {
    let mut codes = nearest_levels::<128>(&GAUSSIAN_ACT_LEVELS, -GAUSSIAN_MAX);
    let mut i = 0;
    while i < codes.len() {
        codes[i] = (GAUSSIAN_ACT_LEVELS[codes[i] as usize] as i32 + GAUSSIAN_MAX) as u8;
        i += 1;
    }
    codes
};

/// Quantizes activations per token to 16 levels whose distances suit a Gaussian, which a rotated input nearly is.
///
/// ```text
/// scale = max(clip · max |x| / 63, MIN_SCALE)
/// q     = the level nearest to clamp(round(x / scale), −63, 63)          x ≈ scale · q
/// ```
///
/// Processors multiply bytes and not 4-bit numbers, so that with VNNI levels cost no more than evenly spaced codes; sums of `vpmaddubsw` (AVX2) have to be widened
/// after two steps or more, mostly four, instead of 136. As codes of 7 bits, level + 63.
///
/// # Panics
/// If `x` is not `[rows, cols]`.
pub fn quantize_acts_gaussian(x: &[f32], rows: usize, cols: usize, clip: f32) -> QuantizedActs {
    quantize_acts_to(x, rows, ActQuantizer { cols, format: ActFormat::Gaussian, clip })
}

/// [`quantize_acts`] or [`quantize_acts_gaussian`].
///
/// # Panics
/// As those.
pub fn quantize_acts_to(x: &[f32], rows: usize, to: ActQuantizer) -> QuantizedActs {
    quantize(Isa::active(), x, rows, to)
}

/// [`quantize_acts`] on a given instruction set, for tests.
#[doc(hidden)]
pub fn quantize_acts_with(
    isa: Isa,
    x: &[f32],
    rows: usize,
    cols: usize,
    bits: u8,
    clip: f32,
) -> QuantizedActs {
    quantize(isa, x, rows, ActQuantizer { cols, format: ActFormat::Uniform { bits }, clip })
}

fn quantize(isa: Isa, x: &[f32], rows: usize, to: ActQuantizer) -> QuantizedActs {
    let cols = to.cols;
    assert_eq!(x.len(), rows * cols, "x must be [rows, cols]");
    let [acts] = quantize_with(isa, rows, GRAIN.div_ceil(cols.max(1)), [to], |tokens, put| {
        tokens.for_each(|t| put([&x[t * cols..][..cols]]));
    });
    acts
}

/// What activation codes stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActFormat {
    /// See [`quantize_acts`].
    Uniform {
        /// 2 to 8.
        bits: u8,
    },
    /// See [`quantize_acts_gaussian`].
    Gaussian,
}

/// How tokens are quantized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActQuantizer {
    /// Values per token.
    pub cols: usize,
    /// What codes stand for.
    pub format: ActFormat,
    /// What a token's range is multiplied with.
    pub clip: f32,
}

/// Quantizes tokens in N parts each, some tokens at a time, which are computed right before and so still lie in the core's cache.
///
/// tokens: called for every `at_once` of the `rows` tokens, on all threads; gives the parts of each of them in order, `[to[i].cols]`, to the function that it gets.
///
/// # Panics
/// If a part has another length, tokens are too few or too many, `at_once` is 0 or there are no such bits.
pub fn quantize_tokens<const N: usize>(
    rows: usize,
    at_once: usize,
    to: [ActQuantizer; N],
    tokens: impl Fn(Range<usize>, &mut dyn FnMut([&[f32]; N])) + Sync,
) -> [QuantizedActs; N] {
    quantize_with(Isa::active(), rows, at_once, to, tokens)
}

fn quantize_with<const N: usize>(
    isa: Isa,
    rows: usize,
    at_once: usize,
    to: [ActQuantizer; N],
    tokens: impl Fn(Range<usize>, &mut dyn FnMut([&[f32]; N])) + Sync,
) -> [QuantizedActs; N] {
    let mut acts = to.map(|to| {
        let stride = stride(to.cols);
        let bits = match to.format {
            ActFormat::Uniform { bits } => bits,
            ActFormat::Gaussian => 7,
        };
        assert!((2..=8).contains(&bits), "{bits} bits for activations");
        QuantizedActs {
            rows,
            cols: to.cols,
            stride,
            bits,
            codes: Buffer::new(rows * stride),
            scale: Buffer::new(rows),
            zero: Buffer::new(rows),
        }
    });
    let places = acts.each_mut().map(|a| {
        let (codes, scale, zero) = (a.codes.as_mut_ptr(), a.scale.as_mut_ptr(), a.zero.as_mut_ptr());
        (a.stride, Shared(codes), Shared(scale), Shared(zero))
    });
    let quantize = |k: &dyn Quantizer| {
        for_each_index(rows.div_ceil(at_once), |i| {
            let (mut t, end) = (i * at_once, rows.min((i + 1) * at_once));
            tokens(t..end, &mut |parts: [&[f32]; N]| {
                assert!(t < end, "more tokens than {at_once}");
                for ((x, to), (stride, codes, scale, zero)) in parts.into_iter().zip(&to).zip(&places) {
                    assert_eq!(x.len(), to.cols, "values of a token");
                    // SAFETY: there are as many codes, scales and zero points as tokens, and this task alone has token t.
                    unsafe {
                        let codes = std::slice::from_raw_parts_mut(codes.get().add(t * stride), *stride);
                        (*scale.get().add(t), *zero.get().add(t)) = token(k, x, to, &mut codes[..to.cols]);
                        codes[to.cols..].fill(0);
                    }
                }
                t += 1;
            });
            assert_eq!(t, end, "tokens are missing");
        });
    };
    with_token!(isa, k => quantize(&k));
    acts
}

/// Codes from one token to the next: whole cache lines, for what crosses them is read at half the speed, and an odd number of them, so that those of
/// many tokens at a time are spread over all sets of the first cache.
pub(crate) fn stride(cols: usize) -> usize {
    match cols.div_ceil(64) {
        0 => 0,
        lines => 64 * (lines | 1),
    }
}

/// Quantizes one token; returns scale and zero point. codes: as x.
fn token(k: &dyn Quantizer, x: &[f32], to: &ActQuantizer, codes: &mut [u8]) -> (f32, i32) {
    let (min, max) = k.range(x);
    match to.format {
        ActFormat::Uniform { bits } => {
            let steps = ((1u32 << bits) - 1) as f32;
            let (min, max) = (min * to.clip, max * to.clip);
            let scale = ((max - min) / steps).max(MIN_SCALE);
            let zero = (-min / scale).round_ties_even().clamp(0., steps);
            k.codes(x, scale, zero, steps, codes);
            (scale, zero as i32)
        }
        ActFormat::Gaussian => {
            let scale = (max.max(-min) * to.clip / GAUSSIAN_MAX as f32).max(MIN_SCALE);
            k.codes(x, scale, GAUSSIAN_MAX as f32, 2.0 * GAUSSIAN_MAX as f32, codes);
            k.to_levels(codes);
            (scale, GAUSSIAN_MAX)
        }
    }
}

trait Quantizer: Send + Sync {
    /// (min(0, min x), max(0, max x))
    fn range(&self, x: &[f32]) -> (f32, f32);
    /// clamp(round(x / scale) + zero, 0, steps)
    fn codes(&self, x: &[f32], scale: f32, zero: f32, steps: f32, codes: &mut [u8]);
    /// Codes of 7 bits to those of the nearest levels, see [`GAUSSIAN_ACT_CODES`].
    fn to_levels(&self, codes: &mut [u8]);
}

impl Quantizer for Scalar {
    fn range(&self, x: &[f32]) -> (f32, f32) {
        x.iter().fold((0., 0.), |(min, max), &v| (v.min(min), v.max(max)))
    }

    fn codes(&self, x: &[f32], scale: f32, zero: f32, steps: f32, codes: &mut [u8]) {
        for (q, v) in codes.iter_mut().zip(x) {
            *q = ((v / scale).round_ties_even() + zero).max(0.).min(steps) as u8;
        }
    }

    fn to_levels(&self, codes: &mut [u8]) {
        codes.iter_mut().for_each(|q| *q = GAUSSIAN_ACT_CODES[usize::from(*q & 127)]);
    }
}

#[cfg(target_arch = "x86_64")]
impl Quantizer for Avx2 {
    fn range(&self, x: &[f32]) -> (f32, f32) {
        // SAFETY: the token proves AVX2.
        unsafe { x86::range(x) }
    }

    fn codes(&self, x: &[f32], scale: f32, zero: f32, steps: f32, codes: &mut [u8]) {
        // SAFETY: the token proves AVX2.
        unsafe { x86::codes(x, scale, zero, steps, codes) }
    }

    fn to_levels(&self, codes: &mut [u8]) {
        // SAFETY: the token proves AVX2.
        unsafe { x86::to_levels(codes) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Quantizer for Avx512Vnni {
    fn range(&self, x: &[f32]) -> (f32, f32) {
        self.avx2.range(x)
    }

    fn codes(&self, x: &[f32], scale: f32, zero: f32, steps: f32, codes: &mut [u8]) {
        self.avx2.codes(x, scale, zero, steps, codes);
    }

    fn to_levels(&self, codes: &mut [u8]) {
        self.avx2.to_levels(codes);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{GAUSSIAN_ACT_CODES, Quantizer, Scalar};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2")]
    pub(super) fn range(x: &[f32]) -> (f32, f32) {
        let (blocks, rest) = x.as_chunks::<16>();
        let mut min = [_mm256_setzero_ps(); 2];
        let mut max = min;
        for block in blocks {
            for i in 0..2 {
                // SAFETY: 8 of the block's 16 values.
                let v = unsafe { _mm256_loadu_ps(block.as_ptr().add(8 * i)) };
                // The second operand wins over a NaN, as in `f32::min`.
                min[i] = _mm256_min_ps(v, min[i]);
                max[i] = _mm256_max_ps(v, max[i]);
            }
        }
        let (mut lo, mut hi) = ([0f32; 8], [0f32; 8]);
        // SAFETY: the arrays hold 8 values each.
        unsafe {
            _mm256_storeu_ps(lo.as_mut_ptr(), _mm256_min_ps(min[0], min[1]));
            _mm256_storeu_ps(hi.as_mut_ptr(), _mm256_max_ps(max[0], max[1]));
        }
        let (min, max) = Scalar.range(rest);
        (lo.into_iter().fold(min, f32::min), hi.into_iter().fold(max, f32::max))
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn codes(x: &[f32], scale: f32, zero: f32, steps: f32, codes: &mut [u8]) {
        let (blocks, rest) = x.as_chunks::<8>();
        let (outs, out_rest) = codes.as_chunks_mut::<8>();
        let (s, z, top) = (_mm256_set1_ps(scale), _mm256_set1_ps(zero), _mm256_set1_ps(steps));
        for (block, out) in blocks.iter().zip(outs) {
            // SAFETY: the block's 8 values.
            let v = unsafe { _mm256_loadu_ps(block.as_ptr()) };
            let v = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_div_ps(v, s));
            let v = _mm256_max_ps(_mm256_add_ps(v, z), _mm256_setzero_ps());
            let q = _mm256_cvttps_epi32(_mm256_min_ps(v, top));
            let q = _mm_packus_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256::<1>(q));
            // SAFETY: 8 bytes into an array of 8.
            unsafe { _mm_storel_epi64(out.as_mut_ptr().cast(), _mm_packus_epi16(q, q)) };
        }
        Scalar.codes(rest, scale, zero, steps, out_rest);
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn to_levels(codes: &mut [u8]) {
        let (blocks, rest) = codes.as_chunks_mut::<32>();
        let mut tables = [_mm256_setzero_si256(); 8];
        for (table, codes) in tables.iter_mut().zip(GAUSSIAN_ACT_CODES.as_chunks::<16>().0) {
            // SAFETY: 16 codes.
            *table = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(codes.as_ptr().cast())) };
        }
        for block in blocks {
            // SAFETY: 32 codes, each below 128, of which the shuffles read the low four bits.
            let q = unsafe { _mm256_loadu_si256(block.as_ptr().cast()) };
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(q), _mm256_set1_epi8(7));
            let mut levels = _mm256_shuffle_epi8(tables[0], q);
            for (i, table) in tables.iter().enumerate().skip(1) {
                let mine = _mm256_cmpeq_epi8(high, _mm256_set1_epi8(i as i8));
                levels = _mm256_blendv_epi8(levels, _mm256_shuffle_epi8(*table, q), mine);
            }
            // SAFETY: as above.
            unsafe { _mm256_storeu_si256(block.as_mut_ptr().cast(), levels) };
        }
        Scalar.to_levels(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_noise as noise;
    use proptest::prelude::*;

    /// The formula as QuaRot's Python has it, in one expression per line.
    fn twin(x: &[f32], bits: u8, clip: f32) -> (Vec<u8>, f32, i32) {
        let maxq = ((1 << bits) - 1) as f32;
        let xmax = x.iter().copied().fold(f32::NEG_INFINITY, f32::max).max(0.0) * clip;
        let xmin = x.iter().copied().fold(f32::INFINITY, f32::min).min(0.0) * clip;
        let scale = f32::max((xmax - xmin) / maxq, 1e-20);
        let zero = (-xmin / scale).round_ties_even();
        let q = x.iter().map(|v| ((v / scale).round_ties_even() + zero).clamp(0.0, maxq) as u8).collect();
        (q, scale, zero as i32)
    }

    fn check(x: &[f32], rows: usize, cols: usize, bits: u8, clip: f32) {
        for isa in Isa::available() {
            let a = quantize_acts_with(isa, x, rows, cols, bits, clip);
            assert_eq!((a.rows, a.cols, a.stride, a.bits), (rows, cols, stride(cols), bits));
            for t in 0..rows {
                let (codes, scale, zero) = twin(&x[t * cols..][..cols], bits, clip);
                assert_eq!(&a.codes[t * a.stride..][..cols], codes, "{isa:?}");
                assert!(a.codes[t * a.stride..][cols..a.stride].iter().all(|&q| q == 0));
                assert_eq!((a.scale[t].to_bits(), a.zero[t]), (scale.to_bits(), zero), "{isa:?}");
            }
        }
    }

    #[test]
    fn special_rows() {
        let mut outlier = vec![0.01; 45];
        outlier[17] = 3e4;
        for bits in 2..=8 {
            check(&[0.; 27], 3, 9, bits, 1.); // zeros
            check(&[0.5, 1., 2., 7., 15., 1., 0.1, 3., 4.], 1, 9, bits, 1.); // positive
            check(&[-0.5, -1., -2., -7.5], 2, 2, bits, 0.9); // negative
            check(&outlier, 1, 45, bits, 1.);
            check(&[1e-30; 8], 1, 8, bits, 1.);
            check(&[f32::MAX, f32::MIN, 0.], 1, 3, bits, 1.); // the range overflows
        }
        let zeros = quantize_acts(&[0.; 16], 2, 8, 4, 1.);
        assert_eq!(zeros.dequantize(), [0.; 16]);
        let ties = quantize_acts(&[0., 15., 0.5, 1.5, 2.5, 14.5], 1, 6, 4, 1.);
        assert_eq!(&ties.codes[..6], [0, 15, 0, 2, 2, 14]);
        assert_eq!(quantize_acts(&[], 3, 0, 4, 1.).codes.len(), 0);
        assert_eq!(quantize_acts(&[], 0, 3, 4, 1.).codes.len(), 0);
    }

    /// By the formula, value by value.
    #[test]
    fn gaussian_levels_are_the_nearest_ones() {
        let (rows, cols) = (3, 45);
        let x: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 250.0 - 2.0).collect();
        for clip in [1.0, 0.8] {
            let a = quantize_acts_gaussian(&x, rows, cols, clip);
            for (t, (x, got)) in x.chunks(cols).zip(a.dequantize().chunks(cols)).enumerate() {
                let scale = x.iter().fold(0.0f32, |m, v| m.max(v.abs())) * clip / 63.0;
                assert_eq!((a.scale[t], a.zero[t]), (scale, 63));
                for (x, got) in x.iter().zip(got) {
                    let q = (x / scale).round_ties_even().clamp(-63.0, 63.0);
                    let least = GAUSSIAN_ACT_LEVELS
                        .iter()
                        .map(|&l| (f32::from(l) - q).abs())
                        .fold(f32::MAX, f32::min);
                    let level = got / scale;
                    assert!(GAUSSIAN_ACT_LEVELS.iter().any(|&l| (f32::from(l) - level).abs() < 1e-3));
                    assert!(((level - q).abs() - least).abs() < 1e-3, "{x}: {level} for {q}");
                }
            }
        }
        assert_eq!(quantize_acts_gaussian(&[0.0; 8], 1, 8, 1.0).scale[..], [MIN_SCALE]);
    }

    #[test]
    fn every_instruction_set_finds_the_same_levels() {
        // All codes there are, and a rest.
        let codes: Vec<u8> = (0..=126).chain(0..=84).collect();
        let want: Vec<u8> = codes.iter().map(|&q| GAUSSIAN_ACT_CODES[usize::from(q)]).collect();
        for isa in Isa::available() {
            let mut codes = codes.clone();
            with_token!(isa, k => k.to_levels(&mut codes));
            assert_eq!(codes, want, "{isa:?}");
        }
    }

    #[test]
    #[should_panic(expected = "tokens are missing")]
    fn every_token_is_wanted() {
        let to = ActQuantizer { cols: 2, format: ActFormat::Gaussian, clip: 1.0 };
        quantize_tokens(5, 2, [to], |tokens, put| {
            if tokens.start < 4 {
                tokens.for_each(|_| put([&[1.0, 2.0]]));
            }
        });
    }

    /// Less error for Gaussian values, both at their best clip.
    #[test]
    fn gaussian_levels_suit_gaussian_values() {
        let (rows, cols) = (8, 560);
        // Sums of 12 uniform values.
        let uniform: Vec<Vec<f32>> = (0..12).map(|seed| noise(rows * cols, seed)).collect();
        let x: Vec<f32> = (0..rows * cols).map(|i| uniform.iter().map(|u| u[i]).sum()).collect();
        let error =
            |a: QuantizedActs| -> f32 { a.dequantize().iter().zip(&x).map(|(a, x)| (a - x).powi(2)).sum() };
        let best = |f: &dyn Fn(f32) -> QuantizedActs| {
            [1.0, 0.95, 0.9, 0.85, 0.8, 0.75].map(|clip| error(f(clip))).into_iter().fold(f32::MAX, f32::min)
        };
        let uniform = best(&|clip| quantize_acts(&x, rows, cols, 4, clip));
        let gaussian = best(&|clip| quantize_acts_gaussian(&x, rows, cols, clip));
        assert!(gaussian < 0.9 * uniform, "{gaussian} {uniform}");
    }

    #[test]
    fn many_rows_equal_single_rows_on_any_number_of_threads() {
        let (rows, cols) = (700, 131);
        let x: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 100. - 4.).collect();
        check(&x, rows, cols, 4, 0.9);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| quantize_acts(&x, rows, cols, 4, 0.9))
        };
        assert_eq!(run(1), run(2));
    }

    #[test]
    #[should_panic(expected = "x must be [rows, cols]")]
    fn wrong_length() {
        quantize_acts(&[0.; 5], 2, 3, 4, 1.);
    }

    proptest! {
        #[test]
        fn equals_the_twin(
            x in prop::collection::vec(-100f32..100., 1..200), bits in 2u8..=8, clip in 0.5f32..=1.0, shift in -150f32..150.
        ) {
            let x: Vec<f32> = x.iter().map(|v| v + shift).collect();
            check(&x, 1, x.len(), bits, clip);
            // Without clipping, the error is at most one step (half of it by the rounding of the zero point).
            let a = quantize_acts(&x, 1, x.len(), bits, 1.);
            for (v, d) in x.iter().zip(a.dequantize()) {
                prop_assert!((v - d).abs() <= a.scale[0] * 1.001);
            }
        }
    }
}
