//! Cache rows of 16 levels that suit a Gaussian, per token and head.
//!
//! ```text
//! scale = f16(p · max |x| / 127)     q = the level of x's sign nearest to clamp(round(x / scale), −127, 127)     x ≈ scale · q
//! ```
//!
//! with the levels of [`GAUSSIAN_LEVELS`], and of some shrink factors p the one of least squared error: a row is written once and read at every
//! token, so that a search pays. Codes lie as those of other 4-bit caches do.

use super::range;
use crate::Isa;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512Vnni};
use crate::isa::{Scalar, with_token};
use crate::ops::{LANES, fold_all, twin};
use crate::weights::GAUSSIAN_LEVELS;
use half::f16;

/// Shrink factors that are tried. Of 64 Gaussian values the largest lies at 2.4 standard deviations, the outermost level best at 2.7.
const SHRINK: [f32; 6] = [1.15, 1.05, 0.95, 0.85, 0.75, 0.65];

/// Where the next larger magnitude of a level becomes the nearer one, and by how much it is larger.
const STEPS: [(f32, f32); 7] = {
    let mut steps = [(0.0, 0.0); 7];
    let mut i = 0;
    while i < 7 {
        let (low, high) = (GAUSSIAN_LEVELS[8 + i] as i32, GAUSSIAN_LEVELS[9 + i] as i32);
        steps[i] = (((low + high + 1) / 2) as f32, (high - low) as f32);
        i += 1;
    }
    steps
};

/// Quantizes one head of one token. codes: `[x.len() / 2]`, rounded up, zeros. Returns the scale, NaN for a row that is not finite.
pub(super) fn quantize(x: &[f32], codes: &mut [u8]) -> f16 {
    quantize_with(Isa::active(), x, codes)
}

fn quantize_with(isa: Isa, x: &[f32], codes: &mut [u8]) -> f16 {
    #[cfg(target_arch = "x86_64")]
    if let Some(token) = Avx512Vnni::new().filter(|_| isa.vectors() == Isa::Avx512Vnni) {
        return token.quantize(x, codes);
    }
    let _ = isa;
    quantize_portable(x, codes)
}

twin! {
    fn quantize_portable = quantize_body(x: &[f32], codes: &mut [u8]) -> f16
}

/// |x| / scale as an integer of at most 127.
#[inline(always)]
fn magnitude(v: f32, scale: f32) -> f32 {
    let a = (v.abs() / scale).round_ties_even();
    if a > 127.0 { 127.0 } else { a }
}

/// The level that a magnitude up to 127 is nearest to.
#[inline(always)]
const fn level(magnitude: f32) -> f32 {
    let (mut level, mut i) = (GAUSSIAN_LEVELS[8] as f32, 0);
    while i < STEPS.len() {
        level += if magnitude >= STEPS[i].0 { STEPS[i].1 } else { 0.0 };
        i += 1;
    }
    level
}

#[inline(always)]
fn quantize_body(x: &[f32], codes: &mut [u8]) -> f16 {
    let Some(scales) = candidates(x) else { return f16::NAN };
    let mut sums = [[0.0f32; LANES]; SHRINK.len()];
    let error = |v: f32, scale: f32| v.abs() - level(magnitude(v, scale)) * scale;
    let (whole, tail) = x.as_chunks::<LANES>();
    for (scale, sums) in scales.iter().zip(&mut sums) {
        let scale = scale.to_f32();
        for x in whole {
            for l in 0..LANES {
                let e = error(x[l], scale);
                sums[l] = e.mul_add(e, sums[l]);
            }
        }
        for (sum, v) in sums.iter_mut().zip(tail) {
            let e = error(*v, scale);
            *sum = e.mul_add(e, *sum);
        }
    }
    encode(x, scales, sums, codes)
}

/// The scales to try; nothing for a row that is not finite.
#[inline(always)]
fn candidates(x: &[f32]) -> Option<[f16; SHRINK.len()]> {
    let (lo, hi) = range(x);
    let largest = if hi > -lo { hi } else { -lo };
    let scale = |shrink: f32| f16::from_f32((shrink * largest / 127.0).min(f16::MAX.to_f32()));
    (!lo.is_nan()).then(|| SHRINK.map(scale))
}

/// Writes the codes of the scale of least error. sums: squared errors of each scale in lanes.
#[inline(always)]
fn encode(
    x: &[f32],
    scales: [f16; SHRINK.len()],
    sums: [[f32; LANES]; SHRINK.len()],
    codes: &mut [u8],
) -> f16 {
    // No level is zero: where the range rounds to nothing, the smallest scale comes nearest.
    let mut best = (f32::INFINITY, f16::from_bits(1));
    // All at once, for each has to wait for itself at every step.
    let sums = fold_all(sums);
    for i in 0..sums.len() {
        if scales[i] != f16::ZERO && sums[i] < best.0 {
            best = (sums[i], scales[i]);
        }
    }
    let scale = best.1.to_f32();
    let number = |v: f32| {
        let (a, mut index) = (magnitude(v, scale), 0);
        for (from, _) in STEPS {
            index += u8::from(a >= from);
        }
        if v > 0.0 { 8 + index } else { 7 - index }
    };
    let (first, second) = x.split_at(codes.len());
    codes.iter_mut().zip(first).for_each(|(c, v)| *c = number(*v));
    codes.iter_mut().zip(second).for_each(|(c, v)| *c |= number(*v) << 4);
    best.1
}

#[cfg(target_arch = "x86_64")]
impl Avx512Vnni {
    fn quantize(self, x: &[f32], codes: &mut [u8]) -> f16 {
        #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
        fn quantize(x: &[f32], codes: &mut [u8]) -> f16 {
            let Some(scales) = candidates(x) else { return f16::NAN };
            encode(x, scales, errors(x, &scales), codes)
        }
        // SAFETY: the token proves them.
        unsafe { quantize(x, codes) }
    }
}

/// Levels by magnitude.
#[cfg(target_arch = "x86_64")]
const LEVELS: [i16; 128] = {
    let (mut levels, mut i) = ([0; 128], 0);
    while i < 128 {
        levels[i] = level(i as f32) as i16;
        i += 1;
    }
    levels
};

/// The squared errors of [`quantize_body`], whose levels are looked up; lanes of all scales side by side, for a division takes long.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn errors(x: &[f32], scales: &[f16; SHRINK.len()]) -> [[f32; LANES]; SHRINK.len()] {
    use std::arch::x86_64::*;
    // The low half of every lane.
    const LOW: __mmask32 = 0x5555_5555;
    let [mut sums, mut wide] = [[_mm512_setzero_ps(); SHRINK.len()]; 2];
    let mut table = [_mm512_setzero_si512(); 4];
    for (i, part) in table.iter_mut().enumerate() {
        // SAFETY: 32 of 128 numbers.
        *part = unsafe { _mm512_loadu_si512(LEVELS.as_ptr().add(32 * i).cast()) };
    }
    for i in 0..SHRINK.len() {
        wide[i] = _mm512_set1_ps(scales[i].to_f32());
    }
    for x in x.chunks(LANES) {
        let there = (u32::from(u16::MAX) >> (LANES - x.len())) as __mmask16;
        // SAFETY: as many values as there are.
        let v = _mm512_abs_ps(unsafe { _mm512_maskz_loadu_ps(there, x.as_ptr()) });
        for i in 0..SHRINK.len() {
            let a = _mm512_min_ps(_mm512_div_ps(v, wide[i]), _mm512_set1_ps(127.0));
            let a = _mm512_cvtps_epi32(a);
            let low = _mm512_maskz_permutex2var_epi16(LOW, table[0], a, table[1]);
            let high = _mm512_maskz_permutex2var_epi16(LOW, table[2], a, table[3]);
            let level = _mm512_mask_mov_epi32(low, _mm512_test_epi32_mask(a, _mm512_set1_epi32(64)), high);
            let e = _mm512_sub_ps(v, _mm512_mul_ps(_mm512_cvtepi32_ps(level), wide[i]));
            sums[i] = _mm512_mask3_fmadd_ps(e, e, sums[i], there);
        }
    }
    let mut lanes = [[0.0; LANES]; SHRINK.len()];
    for (lanes, sum) in lanes.iter_mut().zip(sums) {
        // SAFETY: 16 lanes to an array of 16.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sum) };
    }
    lanes
}

/// The values of rows of codes. codes: [rows, head_dim / 2], rounded up; scale: [rows]; out: [rows, head_dim].
pub(super) fn dequantize(codes: &[u8], scale: &[f16], head_dim: usize, out: &mut [f32]) {
    dequantize_with(Isa::active(), codes, scale, head_dim, out);
}

fn dequantize_with(isa: Isa, codes: &[u8], scale: &[f16], head_dim: usize, out: &mut [f32]) {
    let half = head_dim.div_ceil(2);
    let rows = out.chunks_exact_mut(head_dim).zip(codes.chunks_exact(half)).zip(scale);
    with_token!(isa, k => rows.for_each(|((out, codes), scale)| {
        let (first, second) = out.split_at_mut(half);
        k.widen(codes, scale.to_f32(), first, second);
    }))
}

trait Widen: Copy {
    /// The low nibbles to `first`, of the same length, the high ones to `second`, which may be one shorter.
    fn widen(self, codes: &[u8], scale: f32, first: &mut [f32], second: &mut [f32]);
}

impl Widen for Scalar {
    fn widen(self, codes: &[u8], scale: f32, first: &mut [f32], second: &mut [f32]) {
        let level = |number: u8| f32::from(GAUSSIAN_LEVELS[usize::from(number & 15)]) * scale;
        first.iter_mut().zip(codes).for_each(|(v, c)| *v = level(*c));
        second.iter_mut().zip(codes).for_each(|(v, c)| *v = level(c >> 4));
    }
}

#[cfg(target_arch = "x86_64")]
impl Widen for Avx2 {
    fn widen(self, codes: &[u8], scale: f32, first: &mut [f32], second: &mut [f32]) {
        // SAFETY: the token proves AVX2.
        unsafe { widen_avx2(codes, scale, first, second) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Widen for Avx512Vnni {
    fn widen(self, codes: &[u8], scale: f32, first: &mut [f32], second: &mut [f32]) {
        // SAFETY: the token proves AVX-512.
        unsafe { widen_avx512(codes, scale, first, second) }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn widen_avx512(codes: &[u8], scale: f32, first: &mut [f32], second: &mut [f32]) {
    use std::arch::x86_64::*;
    // SAFETY: 16 bytes from an array of 16.
    let levels = unsafe { _mm_loadu_si128(GAUSSIAN_LEVELS.as_ptr().cast()) };
    let table = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(levels)), _mm512_set1_ps(scale));
    let blocks = second.len() / 16;
    for i in 0..blocks {
        let block = 16 * i..16 * i + 16;
        let (codes, first, second) = (&codes[block.clone()], &mut first[block.clone()], &mut second[block]);
        // SAFETY: 16 codes, and two times 16 values. Looking up takes the lowest four bits of an index.
        unsafe {
            let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            _mm512_storeu_ps(first.as_mut_ptr(), _mm512_permutexvar_ps(codes, table));
            _mm512_storeu_ps(
                second.as_mut_ptr(),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table),
            );
        }
    }
    let done = 16 * blocks;
    Scalar.widen(&codes[done..], scale, &mut first[done..], &mut second[done..]);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn widen_avx2(codes: &[u8], scale: f32, first: &mut [f32], second: &mut [f32]) {
    use std::arch::x86_64::*;
    // SAFETY: 16 bytes from an array of 16.
    let table = unsafe { _mm_loadu_si128(GAUSSIAN_LEVELS.as_ptr().cast()) };
    let (mask, wide) = (_mm_set1_epi8(15), _mm256_set1_ps(scale));
    let blocks = second.len() / 8;
    for i in 0..blocks {
        let block = 8 * i..8 * i + 8;
        let (codes, first, second) = (&codes[block.clone()], &mut first[block.clone()], &mut second[block]);
        // SAFETY: 8 codes, and two times 8 values.
        unsafe {
            let v = _mm_loadl_epi64(codes.as_ptr().cast());
            let low = _mm_shuffle_epi8(table, _mm_and_si128(v, mask));
            let high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16::<4>(v), mask));
            let value = |levels| _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(levels)), wide);
            _mm256_storeu_ps(first.as_mut_ptr(), value(low));
            _mm256_storeu_ps(second.as_mut_ptr(), value(high));
        }
    }
    let done = 8 * blocks;
    Scalar.widen(&codes[done..], scale, &mut first[done..], &mut second[done..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_noise as noise;

    /// The same codes on every instruction set, also of what lies halfway between two magnitudes.
    #[test]
    fn instruction_sets_agree() {
        let check = |x: &[f32], what: &str| {
            let run = |quantize: &dyn Fn(&[f32], &mut [u8]) -> f16| {
                let mut codes = vec![0; x.len().div_ceil(2)];
                let scale = quantize(x, &mut codes).to_bits();
                (codes, scale)
            };
            let want = run(&|x, codes| quantize_body(x, codes));
            for isa in Isa::available() {
                assert_eq!(run(&|x, codes| quantize_with(isa, x, codes)), want, "{isa:?} {what}");
            }
        };
        for head_dim in [1usize, 7, 16, 33, 64, 128] {
            for factor in [1.0, 1e-12, 1e30, f32::INFINITY, f32::NAN, 0.0] {
                for seed in 0..20 {
                    let mut x = noise(head_dim, seed);
                    x[head_dim / 2] *= factor;
                    check(&x, &format!("{head_dim} {factor} {seed}"));
                }
            }
        }
        for shrink in SHRINK {
            let scale = f16::from_f32(shrink / 127.0).to_f32();
            let mut x: Vec<f32> = (0..256).map(|k| scale * 0.5 * k as f32).collect();
            x.iter_mut().step_by(3).for_each(|v| *v = -*v);
            // The largest, of which the scales are shares.
            x.retain(|v| v.abs() < 1.0);
            x.push(1.0);
            check(&x, &format!("multiples of {scale}"));
        }
    }

    /// Every value at its nearest level, by the scale of least error, on every instruction set.
    #[test]
    fn values_are_the_nearest_levels() {
        for head_dim in [1usize, 7, 16, 33, 64, 128] {
            let half = head_dim.div_ceil(2);
            let x = noise(5 * head_dim, 1);
            let (mut codes, mut scales) = (vec![0; 5 * half], Vec::new());
            for (x, codes) in x.chunks(head_dim).zip(codes.chunks_mut(half)) {
                scales.push(quantize(x, codes));
            }
            let mut scalar = vec![0.0; x.len()];
            dequantize_with(Isa::Scalar, &codes, &scales, head_dim, &mut scalar);
            for isa in Isa::available() {
                let mut got = vec![0.0; x.len()];
                dequantize_with(isa, &codes, &scales, head_dim, &mut got);
                assert_eq!(got, scalar, "{isa:?} {head_dim}");
            }
            for ((x, got), scale) in x.chunks(head_dim).zip(scalar.chunks(head_dim)).zip(&scales) {
                let round = |v: f32, scale: f32| {
                    let q = (v / scale).round_ties_even().clamp(-127.0, 127.0);
                    let distance = |l: &f32| (l - q).abs();
                    let levels = GAUSSIAN_LEVELS.map(f32::from);
                    let least = levels.iter().map(distance).fold(f32::MAX, f32::min);
                    levels.into_iter().filter(|l| distance(l) == least).map(|l| l * scale).collect::<Vec<_>>()
                };
                for (v, g) in x.iter().zip(got) {
                    assert!(round(*v, scale.to_f32()).contains(g), "{v} {g}");
                }
                let error = |got: &dyn Fn(f32) -> f32| x.iter().map(|v| (v - got(*v)).powi(2)).sum::<f32>();
                let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let mine = error(&|v| round(v, scale.to_f32())[0]);
                for shrink in SHRINK {
                    let other = f16::from_f32(shrink * largest / 127.0).to_f32();
                    assert!(mine <= error(&|v| round(v, other)[0]) * 1.001, "{shrink}");
                }
            }
        }
    }
}
