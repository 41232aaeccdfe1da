//! The loops of [`super::Hadamard`]: additions and subtractions in one fixed order, so that every instruction set gives the
//! same bits.

use super::butterflies::Butterflies;
use super::orders::{GROUP, GROUPS, OUTPUTS, Order};
use crate::buffer::{Buffer, element};
#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512Vnni};
use crate::isa::{Isa, Scalar, with_token};
use crate::lanes::Lanes;
use std::sync::Arc;

/// Floats of a vector.
const LANES: usize = 8;
/// Columns that are mixed side by side.
const STRIP: usize = 2 * LANES;
// What a code of [`Order::codes`] is made for.
const _: () = assert!(STRIP == 16 && GROUP == 4);
/// Values that the butterflies finish before they turn to wider strides: they stay in an L1 cache.
const NEAR: usize = 4096;

/// What to do with x, contiguous `[.., k, .., k, low, inner]`: mix along the axes k and `low`.
pub(super) struct Steps<'a> {
    /// Width of the power of two.
    pub low: usize,
    /// Neighbouring values that are transformed each by itself.
    pub inner: usize,
    /// The matrices of the axes k, the innermost first.
    pub orders: &'a [Arc<Order>],
    /// Whether they are transposed.
    pub transposed: bool,
    /// What the result is multiplied with.
    pub scale: f32,
}

/// Room for [`transform`].
pub(super) struct Scratch {
    /// For 16 groups of 4 values, their sums with every choice of signs, in every column of a strip.
    tables: Buffer<Aligned<{ STRIP << GROUP }>>,
    /// A strip of outputs, [k / 4, 4, 16].
    sums: Buffer<Aligned<{ STRIP * OUTPUTS }>>,
}

/// Where every vector lies within one line of the cache: vectors that straddle two are read at half the speed.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Aligned<const N: usize>([f32; N]);

element!(Aligned<{ STRIP << GROUP }>, Aligned([0.0; STRIP << GROUP]));
element!(Aligned<{ STRIP * OUTPUTS }>, Aligned([0.0; STRIP * OUTPUTS]));

impl Scratch {
    pub fn new(orders: &[Arc<Order>]) -> Self {
        let k = orders.iter().map(|order| order.k).max().unwrap_or(0);
        Scratch { tables: Buffer::new(GROUPS.min(k / GROUP)), sums: Buffer::new(k / OUTPUTS) }
    }
}

/// Transforms whole blocks in place with the kernel of an instruction set, or the scalar one if the machine lacks it.
pub(super) fn transform(isa: Isa, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
    with_token!(isa, token => token.transform(x, steps, scratch));
}

trait Kernel {
    fn transform(self, x: &mut [f32], steps: &Steps, scratch: &mut Scratch);
}

impl Kernel for Scalar {
    fn transform(self, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
        run(self, self, x, steps, scratch);
    }
}

#[cfg(target_arch = "x86_64")]
impl Kernel for Avx2 {
    fn transform(self, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
        #[target_feature(enable = "avx2")]
        fn avx2(token: Avx2, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
            run(token, token, x, steps, scratch);
        }
        // SAFETY: the token proves AVX2.
        unsafe { avx2(self, x, steps, scratch) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Kernel for Avx512Vnni {
    fn transform(self, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
        // Butterflies wait for memory, which wider registers do not change.
        #[target_feature(enable = "avx2,avx512f,avx512vl")]
        fn avx512(token: Avx512Vnni, x: &mut [f32], steps: &Steps, scratch: &mut Scratch) {
            run(token.avx2, token, x, steps, scratch);
        }
        // SAFETY: the token proves AVX-512.
        unsafe { avx512(self, x, steps, scratch) }
    }
}

// The loops below are written out where closures would do: a closure is compiled by itself, without the instruction set.

/// s: for butterflies; wide: for strips of columns.
#[inline(always)]
fn run<S: Butterflies<LANES>, W: Lanes<STRIP>>(
    s: S,
    wide: W,
    x: &mut [f32],
    steps: &Steps,
    scratch: &mut Scratch,
) {
    if steps.orders.is_empty() {
        return butterflies(s, x, steps.low, steps.inner, steps.scale);
    }
    let mut block = steps.low * steps.inner;
    for order in steps.orders {
        block *= order.k;
    }
    for x in x.chunks_exact_mut(block) {
        let (mut stride, mut scale) = (steps.low * steps.inner, steps.scale);
        if steps.low > 1 {
            butterflies(s, x, steps.low, steps.inner, scale);
            scale = 1.0;
        }
        for order in steps.orders {
            for x in x.chunks_exact_mut(order.k * stride) {
                mix_all(s, wide, x, stride, order.codes(steps.transposed), scale, scratch);
            }
            stride *= order.k;
            scale = 1.0;
        }
    }
}

/// The Walsh-Hadamard transforms of x `[.., low, inner]` along `low`, a power of two from 2 on, times `scale`.
#[inline(always)]
fn butterflies<S: Butterflies<LANES>>(s: S, x: &mut [f32], low: usize, inner: usize, scale: f32) {
    let length = low * inner;
    if length < LANES || (inner > 1 && !inner.is_multiple_of(LANES)) {
        return levels::<1, _>(Scalar, x, inner, length, scale);
    }
    // Strides below `near` are done piece by piece: whole transforms if several fit in, or else a part of one.
    let mut near = 2 * inner;
    while near < length && near < NEAR {
        near *= 2;
    }
    for x in x.chunks_mut((NEAR / near).max(1) * near) {
        match inner {
            1 if low < LANES * LANES => {
                lanes(s, x, scale);
                levels(s, x, LANES, near, 1.0);
            }
            1 => {
                squares(s, x, scale);
                levels(s, x, LANES * LANES, near, 1.0);
            }
            _ => levels(s, x, inner, near, scale),
        }
    }
    levels(s, x, near, length, 1.0);
}

/// The butterflies of strides 1, 2 and 4, times `scale`.
#[inline(always)]
fn lanes<S: Butterflies<LANES>>(s: S, x: &mut [f32], scale: f32) {
    for x in x.as_chunks_mut::<LANES>().0 {
        s.store(s.butterflies(s.scale(s.load(x), scale)), x);
    }
}

/// The butterflies of strides 1 to 32, times `scale`.
#[inline(always)]
fn squares<S: Butterflies<LANES>>(s: S, x: &mut [f32], scale: f32) {
    for x in x.as_chunks_mut::<LANES>().0.as_chunks_mut::<LANES>().0 {
        let mut v = [s.zero(); LANES];
        for r in 0..LANES {
            v[r] = s.butterflies(s.scale(s.load(&x[r]), scale));
        }
        between(s, &mut v);
        for r in 0..LANES {
            s.store(v[r], &mut x[r]);
        }
    }
}

/// The butterflies between R vectors, a power of two.
#[inline(always)]
fn between<const N: usize, S: Lanes<N>, const R: usize>(s: S, v: &mut [S::V; R]) {
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

/// The butterflies of strides `stride`, 2·`stride`, .. up to below `end`, three of them in one pass, times `scale` if there are
/// any. `stride` is a multiple of N.
#[inline(always)]
fn levels<const N: usize, S: Lanes<N>>(s: S, x: &mut [f32], stride: usize, end: usize, mut scale: f32) {
    let x = x.as_chunks_mut::<N>().0;
    let mut stride = stride / N;
    while stride < end / N {
        let radix = match end / N / stride {
            2 => pass::<N, S, 2>(s, x, stride, scale),
            4 => pass::<N, S, 4>(s, x, stride, scale),
            _ => pass::<N, S, 8>(s, x, stride, scale),
        };
        (stride, scale) = (stride * radix, 1.0);
    }
}

/// Butterflies of R vectors each, `stride` of them apart, times `scale`; returns R.
#[inline(always)]
fn pass<const N: usize, S: Lanes<N>, const R: usize>(
    s: S,
    x: &mut [[f32; N]],
    stride: usize,
    scale: f32,
) -> usize {
    for x in x.chunks_exact_mut(R * stride) {
        for at in 0..stride {
            let mut v = [s.zero(); R];
            for r in 0..R {
                v[r] = s.scale(s.load(&x[r * stride + at]), scale);
            }
            between(s, &mut v);
            for r in 0..R {
                s.store(v[r], &mut x[r * stride + at]);
            }
        }
    }
    R
}

/// Replaces the columns of x, `[k, stride]`, by their products with the signs of `codes`, times `scale`.
#[inline(always)]
fn mix_all<S: Lanes<LANES>, W: Lanes<STRIP>>(
    s: S,
    wide: W,
    x: &mut [f32],
    stride: usize,
    codes: &[u32],
    scale: f32,
    scratch: &mut Scratch,
) {
    let k = x.len() / stride;
    let mut at = 0;
    while at + STRIP <= stride {
        mix::<STRIP, W>(wide, &mut x[at..], k, stride, codes, scale, scratch);
        at += STRIP;
    }
    if at + LANES <= stride {
        mix::<LANES, S>(s, &mut x[at..], k, stride, codes, scale, scratch);
        at += LANES;
    }
    while at < stride {
        mix::<1, _>(Scalar, &mut x[at..], k, stride, codes, scale, scratch);
        at += 1;
    }
}

/// [`mix_all`] for the first N columns.
///
/// Four inputs have 16 sums, one for every choice of signs: each is made once, and an output adds one of them where a plain
/// product would take four additions.
#[inline(always)]
fn mix<const N: usize, S: Lanes<N>>(
    s: S,
    x: &mut [f32],
    k: usize,
    stride: usize,
    mut codes: &[u32],
    scale: f32,
    scratch: &mut Scratch,
) {
    for first in (0..k).step_by(GROUP * GROUPS) {
        let tables = &mut scratch.tables[..GROUPS.min((k - first) / GROUP)];
        for (g, table) in tables.iter_mut().enumerate() {
            let mut v = [s.zero(); GROUP];
            for i in 0..GROUP {
                let x = x[(first + g * GROUP + i) * stride..].as_chunks::<N>().0;
                v[i] = s.scale(s.load(&x[0]), scale);
            }
            let (low, high) = (choices(s, v[0], v[1]), choices(s, v[2], v[3]));
            for (code, sums) in table.0.as_chunks_mut::<STRIP>().0.iter_mut().enumerate() {
                s.store(s.add(low[code % 4], high[code / 4]), &mut sums.as_chunks_mut::<N>().0[0]);
            }
        }
        let (of_this, others) = codes.split_at(k / OUTPUTS * tables.len());
        codes = others;
        let mut of_this = of_this.chunks_exact(tables.len());
        // Two at a time, whose additions do not wait for each other.
        let (pairs, last) = scratch.sums[..k / OUTPUTS].as_chunks_mut::<2>();
        for pair in pairs {
            let mine = [(); 2].map(|()| of_this.next().unwrap_or_default());
            add_sums(s, pair, mine, tables, first > 0);
        }
        if let [sums] = last {
            add_sums(s, std::array::from_mut(sums), [of_this.next().unwrap_or_default()], tables, first > 0);
        }
    }
    for (i, sums) in scratch.sums[..k / OUTPUTS].iter().enumerate() {
        for o in 0..OUTPUTS {
            x[(i * OUTPUTS + o) * stride..][..N].copy_from_slice(&sums.0[o * STRIP..][..N]);
        }
    }
}

/// P times [`OUTPUTS`] outputs: of every table the entry that their codes name, added to what is there if `more`.
#[inline(always)]
fn add_sums<const N: usize, S: Lanes<N>, const P: usize>(
    s: S,
    sums: &mut [Aligned<{ STRIP * OUTPUTS }>; P],
    codes: [&[u32]; P],
    tables: &[Aligned<{ STRIP << GROUP }>],
    more: bool,
) {
    let mut acc = [[s.zero(); OUTPUTS]; P];
    if more {
        for p in 0..P {
            for o in 0..OUTPUTS {
                acc[p][o] = s.load(&sums[p].0[o * STRIP..].as_chunks::<N>().0[0]);
            }
        }
    }
    let codes: [&[u32]; P] = codes.map(|codes| &codes[..tables.len()]);
    for (g, table) in tables.iter().enumerate() {
        for p in 0..P {
            let code = codes[p][g];
            for o in 0..OUTPUTS {
                // (The mask tells the compiler that the line lies in the table.)
                let line = &table.0[(code >> (8 * o)) as usize & 0xf0..];
                acc[p][o] = s.add(acc[p][o], s.load(&line.as_chunks::<N>().0[0]));
            }
        }
    }
    for p in 0..P {
        for o in 0..OUTPUTS {
            s.store(acc[p][o], &mut sums[p].0[o * STRIP..].as_chunks_mut::<N>().0[0]);
        }
    }
}

/// ±a ± b: bit 0 of the index subtracts a, bit 1 b.
#[inline(always)]
fn choices<const N: usize, S: Lanes<N>>(s: S, a: S::V, b: S::V) -> [S::V; 4] {
    let (sum, difference) = (s.add(a, b), s.sub(b, a));
    [sum, difference, s.sub(a, b), s.sub(s.sub(s.zero(), a), b)]
}
