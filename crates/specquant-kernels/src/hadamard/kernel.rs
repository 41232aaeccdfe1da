//! The loops of [`super::Hadamard`]: additions and subtractions in one fixed order, so that every instruction set gives the
//! same bits.

use super::lanes::{Lanes, Single};
use super::orders::{GROUP, GROUPS, OUTPUTS, Order};
#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512Vnni};
use crate::isa::{Isa, Scalar, with_token};
use std::sync::Arc;

/// Columns that are mixed side by side: two vectors.
const STRIP: usize = 16;
/// Values that the butterflies finish before they turn to wider strides: they stay in an L1 cache.
const NEAR: usize = 4096;

/// One step of the transform in place: a contiguous `[.., k, k, low, inner]`, mixed along all but the last axis.
pub(super) struct Steps<'a> {
    /// Width of the power of two.
    pub low: usize,
    /// Values that lie between two neighbours of the axis `low`: one transform for each.
    pub inner: usize,
    /// Axes that are no power of two, the innermost first.
    pub orders: &'a [Arc<Order>],
    /// Whether they are mixed with the transposed matrices.
    pub transposed: bool,
    /// What the result is multiplied with.
    pub scale: f32,
}

/// Room for [`transform`].
pub(super) struct Scratch {
    /// For 16 groups of 4 values, their sums with every choice of signs, in every column of a strip.
    tables: Vec<[f32; STRIP << GROUP]>,
    /// A strip of outputs.
    sums: Vec<[[f32; STRIP]; OUTPUTS]>,
}

impl Scratch {
    pub fn new(orders: &[Arc<Order>]) -> Self {
        let k = orders.iter().map(|order| order.k).max().unwrap_or(0);
        Scratch {
            tables: vec![[0.0; STRIP << GROUP]; GROUPS.min(k / GROUP)],
            sums: vec![[[0.0; STRIP]; OUTPUTS]; k / OUTPUTS],
        }
    }
}

/// Transforms one contiguous block in place with the kernel of an instruction set, or the scalar one if the machine lacks it.
pub(super) fn transform(isa: Isa, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
    with_token!(isa, token => token.transform(x, steps, scratch));
}

trait Kernel {
    fn transform(self, x: &mut [f32], steps: &Steps, scratch: &mut Scratch);
}

impl Kernel for Scalar {
    fn transform(self, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
        run(self, x, steps, scratch);
    }
}

#[cfg(target_arch = "x86_64")]
impl Kernel for Avx2 {
    fn transform(self, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
        #[target_feature(enable = "avx2")]
        fn avx2(token: Avx2, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
            run(token, x, steps, scratch);
        }
        // SAFETY: the token proves AVX2.
        unsafe { avx2(self, x, steps, scratch) }
    }
}

// Twice as wide is no faster: the butterflies wait for the L1 cache, and for the one port that adds.
#[cfg(target_arch = "x86_64")]
impl Kernel for Avx512Vnni {
    fn transform(self, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
        self.avx2.transform(x, steps, scratch);
    }
}

// The loops below are written out where closures would do: a closure is compiled by itself, without the instruction set.

#[inline(always)]
fn run<S: Lanes>(s: S, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
    let (mut stride, mut scale) = (steps.low * steps.inner, steps.scale);
    if steps.low > 1 {
        for x in x.chunks_exact_mut(stride) {
            butterflies(s, x, steps.inner, scale);
        }
        scale = 1.0;
    }
    for order in steps.orders {
        let codes = order.codes(steps.transposed);
        for x in x.chunks_exact_mut(order.k * stride) {
            let mut at = 0;
            while at + 2 * S::N <= stride {
                mix::<S, 2>(s, &mut x[at..], stride, codes, order.k, scale, scratch);
                at += 2 * S::N;
            }
            if at + S::N <= stride {
                mix::<S, 1>(s, &mut x[at..], stride, codes, order.k, scale, scratch);
                at += S::N;
            }
            while at < stride {
                mix::<Single, 1>(Single, &mut x[at..], stride, codes, order.k, scale, scratch);
                at += 1;
            }
        }
        stride *= order.k;
        scale = 1.0;
    }
}

/// The Walsh-Hadamard transform of x `[len / inner, inner]` along its first axis, a power of two, times `scale`.
#[inline(always)]
fn butterflies<S: Lanes>(s: S, x: &mut [f32], inner: usize, scale: f32) {
    let (len, mut reach) = (x.len(), 2 * inner);
    while reach < len && reach < NEAR {
        reach *= 2;
    }
    for x in x.chunks_exact_mut(reach) {
        if inner == 1 && reach >= S::N {
            let stride = first(s, x, scale);
            levels(s, x, stride, reach, 1.0);
        } else if inner.is_multiple_of(S::N) {
            levels(s, x, inner, reach, scale);
        } else {
            levels(Single, x, inner, reach, scale);
        }
    }
    if reach.is_multiple_of(S::N) {
        levels(s, x, reach, len, 1.0);
    } else {
        levels(Single, x, reach, len, 1.0);
    }
}

/// The butterflies of strides below S::N, or below 8·S::N if x is that long, times `scale`; returns which of the two. The length
/// of x is a power of two, S::N and up.
#[inline(always)]
fn first<S: Lanes>(s: S, x: &mut [f32], scale: f32) -> usize {
    let square = 8 * S::N;
    if x.len() < square {
        for x in x.chunks_exact_mut(S::N) {
            s.store(s.butterflies(s.load(x, scale)), x);
        }
        return S::N;
    }
    for x in x.chunks_exact_mut(square) {
        let mut v = [s.zero(); 8];
        for r in 0..8 {
            v[r] = s.butterflies(s.load(&x[r * S::N..], scale));
        }
        between(s, &mut v);
        for r in 0..8 {
            s.store(v[r], &mut x[r * S::N..]);
        }
    }
    square
}

/// The butterflies between R vectors, a power of two.
#[inline(always)]
fn between<S: Lanes, const R: usize>(s: S, v: &mut [S::V; R]) {
    let mut bit = 1;
    while bit < R {
        for r in 0..R {
            if r & bit == 0 {
                (v[r], v[r | bit]) = (s.add(v[r], v[r | bit]), s.sub(v[r], v[r | bit]));
            }
        }
        bit *= 2;
    }
}

/// The butterflies of strides `stride`, 2·`stride`, .. up to below `end`, three of them in one pass, times `scale`.
#[inline(always)]
fn levels<S: Lanes>(s: S, x: &mut [f32], mut stride: usize, end: usize, mut scale: f32) {
    while stride < end {
        let radix = match end / stride {
            2 => pass::<S, 2>(s, x, stride, scale),
            4 => pass::<S, 4>(s, x, stride, scale),
            _ => pass::<S, 8>(s, x, stride, scale),
        };
        (stride, scale) = (stride * radix, 1.0);
    }
}

/// Butterflies of R values each, `stride` apart, times `scale`; returns R. The stride is a multiple of S::N.
#[inline(always)]
fn pass<S: Lanes, const R: usize>(s: S, x: &mut [f32], stride: usize, scale: f32) -> usize {
    for x in x.chunks_exact_mut(R * stride) {
        let mut at = 0;
        while at < stride {
            let mut v = [s.zero(); R];
            for r in 0..R {
                v[r] = s.load(&x[r * stride + at..], scale);
            }
            between(s, &mut v);
            for r in 0..R {
                s.store(v[r], &mut x[r * stride + at..]);
            }
            at += S::N;
        }
    }
    R
}

/// Replaces C vectors of columns of x, `[k, stride]`, by their products with the signs of `codes`, times `scale`.
///
/// Four inputs have 16 sums, one for every choice of signs: each is made once, and an output adds one of them where a plain
/// product would take four additions.
#[inline(always)]
fn mix<S: Lanes, const C: usize>(
    s: S,
    x: &mut [f32],
    stride: usize,
    codes: &[u32],
    k: usize,
    scale: f32,
    scratch: &mut Scratch,
) {
    let mut codes = codes;
    for first in (0..k).step_by(GROUP * GROUPS) {
        let tables = &mut scratch.tables[..GROUPS.min((k - first) / GROUP)];
        for (g, table) in tables.iter_mut().enumerate() {
            for c in 0..C {
                let mut v = [s.zero(); GROUP];
                for i in 0..GROUP {
                    v[i] = s.load(&x[(first + g * GROUP + i) * stride + c * S::N..], scale);
                }
                let (low, high) = (choices(s, v[0], v[1]), choices(s, v[2], v[3]));
                for code in 0..1 << GROUP {
                    s.store(s.add(low[code % 4], high[code / 4]), &mut table[code * STRIP + c * S::N..]);
                }
            }
        }
        for sums in &mut scratch.sums[..k / OUTPUTS] {
            let (mine, others) = codes.split_at(tables.len());
            codes = others;
            let mut acc = [[s.zero(); C]; OUTPUTS];
            if first > 0 {
                for o in 0..OUTPUTS {
                    for c in 0..C {
                        acc[o][c] = s.load(&sums[o][c * S::N..], 1.0);
                    }
                }
            }
            for (code, table) in mine.iter().zip(tables.iter()) {
                for o in 0..OUTPUTS {
                    let term = &table[(code >> (8 * o)) as usize % (1 << GROUP) * STRIP..];
                    for c in 0..C {
                        acc[o][c] = s.add(acc[o][c], s.load(&term[c * S::N..], 1.0));
                    }
                }
            }
            for o in 0..OUTPUTS {
                for c in 0..C {
                    s.store(acc[o][c], &mut sums[o][c * S::N..]);
                }
            }
        }
    }
    for (i, sum) in scratch.sums[..k / OUTPUTS].as_flattened().iter().enumerate() {
        x[i * stride..][..C * S::N].copy_from_slice(&sum[..C * S::N]);
    }
}

/// ±a ± b: bit 0 of the index subtracts a, bit 1 b.
#[inline(always)]
fn choices<S: Lanes>(s: S, a: S::V, b: S::V) -> [S::V; 4] {
    let (sum, difference) = (s.add(a, b), s.sub(b, a));
    [sum, difference, s.sub(a, b), s.sub(s.sub(s.zero(), a), b)]
}
