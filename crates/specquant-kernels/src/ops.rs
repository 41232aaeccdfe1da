//! Float operations between the linear layers: RMS norm, gated SiLU, rotary embedding, exponentials.
//!
//! Each is written once, in plain loops over [`f32::mul_add`], and compiled three times by [`twin!`]: for AVX-512 and for AVX2 with FMA,
//! where the loops become vector code, and for the baseline. `mul_add` rounds once either way and sums run in fixed lanes, so they
//! agree bit for bit, and so do any two numbers of threads.

use crate::for_each_chunk;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Defines `name`, which runs the `#[inline(always)]` function `body` compiled for the active instruction set.
macro_rules! twin {
    ($(#[$doc:meta])* $vis:vis fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                match $crate::Isa::active().vectors() {
                    // SAFETY: an instruction set is active only on a machine that has it, and this one means AVX-512 F, BW, DQ and VL, too.
                    $crate::Isa::Avx512Vnni => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above; AVX2 and FMA.
                    $crate::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            $body($($arg),*)
        }
    };
}
pub(crate) use twin;

/// Lanes of a running sum or maximum.
pub(crate) const LANES: usize = 16;
/// Elements per task of an element-wise operation; fewer are not worth a second thread.
const CHUNK: usize = 1 << 14;

/// ln 2 in two parts, the first of few bits, so that its small multiples are exact; and the coefficients of x⁷ to x² of e^x (Cephes, expf.c).
pub(crate) const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
pub(crate) const EXP: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// e^x = y · 2^n: x = n ln2 + r with |r| <= ln2/2, and Cephes' polynomial (expf.c) in r.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, i32) {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, half to even, without an instruction beyond SSE2.
    const MAGIC: f32 = 12_582_912.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = n.mul_add(-LN2[1], n.mul_add(-LN2[0], x));
    let mut p = EXP[0];
    for c in &EXP[1..] {
        p = r.mul_add(p, *c);
    }
    ((r * r).mul_add(p, r) + 1.0, shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as i32)
}

#[inline(always)]
fn pow2(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// e^x within 2 units in the last place; 2^n in two factors, so that results near the ends of the range, subnormals and infinity
/// come out right. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Comparisons, not `clamp`, keep the loop around this branch-free and let NaN through.
    let x = if x < -105.0 { -105.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let (y, n) = exp_parts(x);
    let half = n >> 1;
    y * pow2(half) * pow2(n.wrapping_sub(half))
}

/// The same for x <= 0, a third faster: what would be subnormal is 0.
#[inline(always)]
fn exp_nonpositive(x: f32) -> f32 {
    let (y, n) = exp_parts(if x < -87.0 { -87.0 } else { x });
    if x < -87.0 { 0.0 } else { y * pow2(n) }
}

#[inline(always)]
fn exp_body(x: &mut [f32]) {
    for v in x {
        *v = exp(*v);
    }
}

#[inline(always)]
pub(crate) fn max_body(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for c in chunks {
        for l in 0..LANES {
            lanes[l] = if c[l] > lanes[l] { c[l] } else { lanes[l] };
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(tail) {
        *lane = if v > *lane { v } else { *lane };
    }
    // Halves, as in `fold`: one after the other they would wait for each other.
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = if lanes[l + width] > lanes[l] { lanes[l + width] } else { lanes[l] };
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn sum_body(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for c in chunks {
        for l in 0..LANES {
            lanes[l] += c[l];
        }
    }
    for (lane, v) in lanes.iter_mut().zip(tail) {
        *lane += v;
    }
    fold(lanes)
}

/// Sums lanes pairwise: the same tree on every instruction set.
#[inline(always)]
pub(crate) fn fold<const N: usize>(lanes: [f32; N]) -> f32 {
    let [sum] = fold_all([lanes]);
    sum
}

/// [`fold`] of several, whose steps do not wait for each other.
#[inline(always)]
pub(crate) fn fold_all<const N: usize, const M: usize>(mut all: [[f32; N]; M]) -> [f32; M] {
    let mut width = N / 2;
    while width > 0 {
        for lanes in &mut all {
            for l in 0..width {
                lanes[l] += lanes[l + width];
            }
        }
        width /= 2;
    }
    let mut sums = [0.0; M];
    for (sum, lanes) in sums.iter_mut().zip(&all) {
        *sum = lanes[0];
    }
    sums
}

/// x = e^(x − max) in place, where max is no less than any x; returns the sum.
#[inline(always)]
pub(crate) fn exp_sum_body(x: &mut [f32], max: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut chunks = x.chunks_exact_mut(LANES);
    for c in &mut chunks {
        for l in 0..LANES {
            c[l] = exp_nonpositive(c[l] - max);
            lanes[l] += c[l];
        }
    }
    for (lane, v) in lanes.iter_mut().zip(chunks.into_remainder()) {
        *v = exp_nonpositive(*v - max);
        *lane += *v;
    }
    fold(lanes)
}

/// out = x in f32. Exact, hence the same on every instruction set; `half`'s own conversion asks for the instruction set and
/// makes a call for every eight numbers.
///
/// # Panics
/// If the lengths differ.
pub(crate) fn widen_f16(x: &[f16], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "widen_f16: lengths");
    #[cfg(target_arch = "x86_64")]
    if crate::Isa::active() >= crate::Isa::Avx2 {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
        #[target_feature(enable = "avx,f16c")]
        fn eights(x: &[[f16; 8]], out: &mut [[f32; 8]]) {
            for (x, out) in x.iter().zip(out) {
                // SAFETY: both point at 8 elements, and neither needs alignment.
                unsafe {
                    _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())))
                };
            }
        }
        let ((x, x_tail), (out, out_tail)) = (x.as_chunks::<8>(), out.as_chunks_mut::<8>());
        // SAFETY: `Isa::Avx2` and above are active only on a machine with F16C.
        unsafe { eights(x, out) };
        return x_tail.convert_to_f32_slice(out_tail);
    }
    x.convert_to_f32_slice(out);
}

twin! { fn exp_chunk = exp_body(x: &mut [f32]) }

/// x = e^x for every element, within 2 units in the last place; NaN stays NaN.
pub fn exp_in_place(x: &mut [f32]) {
    if x.len() <= CHUNK {
        return exp_chunk(x);
    }
    for_each_chunk(x, CHUNK, |_, x| exp_chunk(x));
}

#[inline(always)]
fn softmax_body(x: &mut [f32]) {
    let sum = exp_sum_body(x, max_body(x));
    for v in x {
        *v /= sum;
    }
}

twin! {
    /// Softmax of one row, in place.
    pub fn softmax = softmax_body(x: &mut [f32])
}

#[inline(always)]
fn log_sum_exp_body(x: &[f32]) -> f64 {
    let max = max_body(x);
    if max.is_infinite() {
        // Empty or all -inf, or a +inf that outweighs everything; but NaN wins.
        return if x.iter().any(|v| v.is_nan()) { f64::NAN } else { f64::from(max) };
    }
    // A block's f32 sum is short enough to lose next to nothing; blocks add up in f64.
    let mut sum = 0.0f64;
    let mut e = [0.0f32; 256];
    for chunk in x.chunks(e.len()) {
        let e = &mut e[..chunk.len()];
        for (e, v) in e.iter_mut().zip(chunk) {
            *e = exp_nonpositive(v - max);
        }
        sum += f64::from(sum_body(e));
    }
    f64::from(max) + sum.ln()
}

twin! {
    /// ln Σ e^x of one row: shifted by the maximum, f32 exponentials, summed in f64 but for blocks of 256. Within 1e-6 of the f64 value.
    pub fn log_sum_exp = log_sum_exp_body(x: &[f32]) -> f64
}

#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let n = weight.len();
    for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
        let mut lanes = [0.0f32; LANES];
        let chunks = x.chunks_exact(LANES);
        let tail = chunks.remainder();
        for c in chunks {
            for l in 0..LANES {
                lanes[l] = c[l].mul_add(c[l], lanes[l]);
            }
        }
        for (lane, v) in lanes.iter_mut().zip(tail) {
            *lane = v.mul_add(*v, *lane);
        }
        let scale = 1.0 / (fold(lanes) / n as f32 + eps).sqrt();
        for i in 0..n {
            out[i] = x[i] * scale * weight[i];
        }
    }
}

twin! { fn rms_norm_rows = rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) }

/// out = x / sqrt(mean(x²) + eps) · weight for every row, in the order of Hugging Face's `LlamaRMSNorm`.
///
/// x, out: [rows, weight.len()].
///
/// # Panics
/// If `out` is not as long as `x`, or they are not whole rows.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "rms_norm: x and out differ in length");
    let n = weight.len();
    if x.is_empty() {
        return;
    }
    assert!(n > 0 && x.len().is_multiple_of(n), "rms_norm: x holds no whole rows of {n}");
    let chunk = (CHUNK / n).max(1) * n;
    if x.len() <= chunk {
        return rms_norm_rows(x, weight, eps, out);
    }
    for_each_chunk(out, chunk, |i, out| rms_norm_rows(&x[i * chunk..][..out.len()], weight, eps, out));
}

#[inline(always)]
fn silu_mul_body(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

twin! { fn silu_mul_chunk = silu_mul_body(gate: &mut [f32], up: &[f32]) }

/// gate = silu(gate) · up, with silu(x) = x / (1 + e^−x); the lengths are equal.
///
/// # Panics
/// If the lengths differ.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "silu_mul: gate and up differ in length");
    if gate.len() <= CHUNK {
        return silu_mul_chunk(gate, up);
    }
    for_each_chunk(gate, CHUNK, |i, gate| silu_mul_chunk(gate, &up[i * CHUNK..][..gate.len()]));
}

/// 2 √(2/π), the slope at 0 of what [`gelu_mul`] gives the exponential.
pub const GELU_SLOPE: f32 = 1.595_769;
/// The weight of its cubic term.
pub const GELU_CUBIC: f32 = 0.044_715;

#[inline(always)]
fn gelu_mul_body(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        let z = GELU_SLOPE * *g * (1.0 + GELU_CUBIC * *g * *g);
        *g = *g / (1.0 + exp(-z)) * u;
    }
}

twin! { fn gelu_mul_chunk = gelu_mul_body(gate: &mut [f32], up: &[f32]) }

/// gate = gelu(gate) · up, with the approximation gelu(x) = x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³))) (Hendrycks and Gimpel, arXiv
/// 1606.08415; transformers' `gelu_pytorch_tanh`), computed as x / (1 + e^−z), z being twice the argument of tanh; the lengths are equal.
///
/// # Panics
/// If the lengths differ.
pub fn gelu_mul(gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "gelu_mul: gate and up differ in length");
    if gate.len() <= CHUNK {
        return gelu_mul_chunk(gate, up);
    }
    for_each_chunk(gate, CHUNK, |i, gate| gelu_mul_chunk(gate, &up[i * CHUNK..][..gate.len()]));
}

/// Rotary embedding of one token, in place: element i of a head's first half turns with element i of its second half, the
/// convention of Hugging Face's `rotate_half`.
///
/// x: [heads, head_dim]; cos, sin: [head_dim / 2].
///
/// # Panics
/// If a length does not follow from the shape, or `head_dim` is odd.
pub fn rope(x: &mut [f32], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
    let half = head_dim / 2;
    assert!(head_dim.is_multiple_of(2), "rope: head_dim {head_dim} is odd");
    assert!(x.len() == heads * head_dim && cos.len() == half && sin.len() == half, "rope: lengths");
    for head in x.chunks_exact_mut(head_dim.max(1)) {
        let (a, b) = head.split_at_mut(half);
        for i in 0..half {
            let (x, y) = (a[i], b[i]);
            a[i] = x * cos[i] - y * sin[i];
            b[i] = y * cos[i] + x * sin[i];
        }
    }
}

/// Test cases, all of them but under Miri, which interprets those of little work in minutes. work: about the products of a case.
#[cfg(test)]
pub(crate) fn affordable<T>(
    cases: impl IntoIterator<Item = T>,
    work: impl Fn(&T) -> usize,
) -> impl Iterator<Item = T> {
    cases.into_iter().filter(move |case| !cfg!(miri) || work(case) <= 2000)
}

/// Reproducible numbers in [-1, 1).
#[cfg(test)]
pub(crate) fn test_noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

#[cfg(test)]
mod tests;
