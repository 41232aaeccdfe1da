//! Streaming causal attention over a [`KvCache`], with grouped query heads and an optional sliding window.
//!
//! Scores never exist as a whole: keys and values pass in tiles, and every query row carries the running maximum, the running
//! sum of exponentials and the unnormalized output (Dao et al., FlashAttention, arXiv 2205.14135, Algorithm 1). The query heads
//! that share a kv head are rows of one tile, so that a tile of the cache is widened to f32 once for all of them.

#[cfg(not(target_arch = "x86_64"))]
mod absent;
mod codes;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod rows;

#[cfg(not(target_arch = "x86_64"))]
use absent as pairs;

use crate::ops::{exp, exp_sum_body, max_body, twin};
use crate::packed_dense::{tile_nn_add, tile_nt};
use crate::parallel::{Shared, for_each_chunk_pair, for_each_index};
use crate::{Buffer, Isa, KvCache, KvSide};
use rows::{add_values, dot_rows};
use std::ops::Range;

/// Rows (queries times the heads of a group) of one task: tiles of this many rows and [`KEYS`] keys stay in the L2 cache.
const ROWS: usize = 192;
/// Keys in a tile.
const KEYS: usize = 128;
/// Keys, or values, that a single query widens at a time, so that they stay in the L1 cache.
const WIDENED: usize = 32;
/// Keys in a task of a single query: fixed, so that any number of threads adds up the same parts.
const DECODE_KEYS: usize = 256;
/// Values of keys and values below which a single query is not worth sharing.
const FEW_VALUES: usize = 1 << 14;

/// Causal attention of the last `t` tokens in the cache: query i stands at position `cache.len() − t + i` and sees the keys up
/// to its own position, at most `window` of them.
///
/// q, out: [t, heads · head_dim]; query head h reads kv head `h / (heads / kv_heads)`; scores are multiplied by `scale`, which is
/// 1/√head_dim as a rule. The result does not depend on the number of threads.
///
/// # Panics
/// If a length does not follow from the shape, the kv heads do not divide the heads, the cache holds fewer than `t` tokens, or
/// the window is 0.
pub fn attention(
    q: &[f32],
    t: usize,
    heads: usize,
    cache: &KvCache,
    scale: f32,
    window: Option<usize>,
    out: &mut [f32],
) {
    attention_with(Isa::active(), q, t, heads, cache, scale, window, out);
}

/// [`attention`] of many queries with the pairs of an instruction set, for tests.
#[allow(clippy::too_many_arguments)] // those of `attention`
fn attention_with(
    isa: Isa,
    q: &[f32],
    t: usize,
    heads: usize,
    cache: &KvCache,
    scale: f32,
    window: Option<usize>,
    out: &mut [f32],
) {
    let (kv_heads, head_dim) = (cache.kv_heads(), cache.head_dim());
    let width = heads * head_dim;
    assert_eq!(q.len(), t * width, "attention: q is not [{t}, {heads} x {head_dim}]");
    assert_eq!(out.len(), t * width, "attention: out is not [{t}, {heads} x {head_dim}]");
    assert!(t <= cache.len(), "attention: {t} queries, but the cache holds {} tokens", cache.len());
    assert!(window != Some(0), "attention: a window of 0 sees nothing");
    if q.is_empty() {
        return;
    }
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "attention: {kv_heads} kv heads, {heads} heads");
    let pairs = pairs::Kernel::new(isa, head_dim).filter(|_| cache.any_order());
    let job = Job { cache, group: heads / kv_heads, scale, window: window.unwrap_or(usize::MAX), pairs };
    if t == 1 {
        return job.decode(q, out);
    }
    // Products in pairs are so much faster that keys should be widened for more rows.
    let rows = if job.pairs.is_some() { 2 * ROWS } else { ROWS };
    let queries = (rows / job.group).clamp(16, 128);
    let start = cache.len() - t;
    let part = job.group * head_dim;
    let out = Shared(out.as_mut_ptr());
    // The longest first: later queries see more keys.
    let blocks = t.div_ceil(queries);
    for_each_index(blocks * kv_heads, |i| {
        let (first, head) = ((blocks - 1 - i / kv_heads) * queries, i % kv_heads);
        let q = &q[first * width..(first + queries).min(t) * width];
        let tile = job.block(q, width, head, start + first);
        // Heads lie side by side in a token.
        for (tile, token) in tile.chunks_exact(part).zip(first..) {
            // SAFETY: token < t and head < kv_heads; this task alone has both.
            let out =
                unsafe { std::slice::from_raw_parts_mut(out.get().add(token * width + head * part), part) };
            out.copy_from_slice(tile);
        }
    });
}

/// What all tasks of one call share.
struct Job<'a> {
    cache: &'a KvCache,
    /// Query heads per kv head.
    group: usize,
    scale: f32,
    window: usize,
    /// What multiplies many queries with codes.
    pairs: Option<pairs::Kernel>,
}

impl Job<'_> {
    /// Attention of a block of queries (the first at `position`) of one group: [queries, group, head_dim].
    fn block(&self, q: &[f32], width: usize, head: usize, position: usize) -> Buffer<f32> {
        let d = self.cache.head_dim();
        let part = self.group * d;
        let tokens = q.chunks_exact(width).map(|token| &token[head * part..][..part]);
        let rows = tokens.len() * self.group;
        let mut q = Buffer::new(rows * d);
        q.iter_mut().zip(tokens.flatten()).for_each(|(to, v)| *to = v * self.scale);
        let end = position + rows / self.group;
        let (mut out, mut sums) = (Buffer::new(rows * d), Buffer::new(2 * rows));
        let mut state = State::new(&mut out, &mut sums);
        let mut scores = Buffer::new(rows * KEYS);
        let [mut kbuf, mut vbuf] = [(); 2].map(|()| Buffer::new(KEYS * d));
        // Tiles start at multiples of KEYS, or where codes begin; the first is the one of the first key that the first query sees.
        let mut from = (position + 1).saturating_sub(self.window) / KEYS * KEYS;
        // Keys from `coded` on are multiplied in codes.
        let coded = self.pairs.and_then(|_| self.cache.codes(KvSide::Keys, head, from..end));
        let coded = end - coded.map_or(0, |codes| codes.scale.len());
        while from < coded {
            let keys = from..(from + KEYS).min(coded);
            let n = keys.len();
            let scores = &mut scores[..rows * n];
            let k = self.cache.tile(KvSide::Keys, head, keys.clone(), &mut kbuf);
            tile_nt(&q, k, scores, rows, d, n);
            absorb(scores, n, from, position, self.group, self.window, &mut state);
            let v = self.cache.tile(KvSide::Values, head, keys.clone(), &mut vbuf);
            tile_nn_add(scores, v, state.out, rows, n, d);
            from = keys.end;
        }
        if let Some(pairs) = self.pairs.filter(|_| from < end) {
            pairs.absorb_codes(&Coded { job: self, q: &q, position, head, keys: from..end }, &mut state);
        }
        state.finish();
        out
    }

    /// Attention of the last token alone: dot products, in parallel over kv heads and fixed ranges of keys.
    fn decode(&self, q: &[f32], out: &mut [f32]) {
        let (d, len) = (self.cache.head_dim(), self.cache.len());
        let part = self.group * d;
        let first = len.saturating_sub(self.window);
        let ranges = (len - first).div_ceil(DECODE_KEYS);
        let mut scaled = Buffer::from(q);
        scaled.iter_mut().for_each(|v| *v *= self.scale);
        let task = |i: usize, state: State| {
            let (head, from) = (i / ranges, first + i % ranges * DECODE_KEYS);
            self.decode_range(
                &scaled[head * part..][..part],
                head,
                from..(from + DECODE_KEYS).min(len),
                state,
            );
        };
        let tasks = self.cache.kv_heads() * ranges;
        let (mut parts, mut sums) = (Buffer::new(tasks * part), Buffer::new(tasks * 2 * self.group));
        let few = (len - first) * 2 * self.cache.kv_heads() * d < FEW_VALUES;
        let at_once = if few { tasks } else { 1 };
        let chunks = [part, 2 * self.group].map(|len| at_once * len);
        for_each_chunk_pair((&mut parts, chunks[0]), (&mut sums, chunks[1]), |i, parts, sums| {
            let states = parts.chunks_exact_mut(part).zip(sums.chunks_exact_mut(2 * self.group));
            states.zip(i * at_once..).for_each(|((out, sums), i)| task(i, State::new(out, sums)));
        });
        let parts = parts.chunks_exact_mut(ranges * part).zip(sums.chunks_exact_mut(ranges * 2 * self.group));
        for (out, (parts, sums)) in out.chunks_exact_mut(part).zip(parts) {
            let states = parts.chunks_exact_mut(part).zip(sums.chunks_exact_mut(2 * self.group));
            let mut states = states.map(|(out, sums)| State::of(out, sums));
            let Some(mut whole) = states.next() else { continue };
            states.for_each(|part| whole.merge(&part));
            whole.finish();
            out.copy_from_slice(whole.out);
        }
    }

    fn decode_range(&self, q: &[f32], head: usize, keys: Range<usize>, mut state: State) {
        let d = self.cache.head_dim();
        let isa = Isa::active();
        let kernel = codes::Kernel::new(isa, d);
        let mut scores = Buffer::new(self.group * KEYS);
        let mut buf = Buffer::new(WIDENED * d);
        for from in keys.clone().step_by(KEYS) {
            let keys = from..(from + KEYS).min(keys.end);
            let n = keys.len();
            let scores = &mut scores[..self.group * n];
            // What lies in codes is multiplied where it lies, if the processor can; the tokens before it are widened.
            let coded = kernel.and_then(|kernel| {
                let codes = |side| self.cache.codes(side, head, keys.clone());
                Some((kernel, codes(KvSide::Keys)?, codes(KvSide::Values)?))
            });
            let first = coded.as_ref().map_or(n, |(_, keys, _)| n - keys.scale.len());
            let widened =
                || (from..from + first).step_by(WIDENED).map(|at| at..(at + WIDENED).min(from + first));
            for some in widened() {
                let k = self.cache.tile(KvSide::Keys, head, some.clone(), &mut buf);
                dot_rows(isa, q, k, &mut scores[some.start - from..], n, d);
            }
            if let Some((kernel, keys, _)) = &coded {
                kernel.dot_rows(q, keys, &mut scores[first..], n);
            }
            // Every key of the range is visible: the window was cut before.
            absorb(scores, n, from, self.cache.len() - 1, self.group, usize::MAX, &mut state);
            for some in widened() {
                let v = self.cache.tile(KvSide::Values, head, some.clone(), &mut buf);
                add_values(isa, &scores[some.start - from..], n, v, state.out, d);
            }
            if let Some((kernel, _, values)) = &coded {
                kernel.add_values(&scores[first..], n, values, state.out);
            }
        }
    }
}

/// The query rows of a block, and keys that all lie in codes.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // only x86 multiplies pairs
struct Coded<'a> {
    job: &'a Job<'a>,
    /// `[rows, head_dim]`, the first of which stands at `position`.
    q: &'a [f32],
    position: usize,
    /// Of keys and values.
    head: usize,
    keys: Range<usize>,
}

/// The running softmax of some query rows.
struct State<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// Unnormalized output, [rows, head_dim].
    out: &'a mut [f32],
}

impl<'a> State<'a> {
    /// Of no key. out: [rows, head_dim]; sums: [2, rows]; both overwritten.
    fn new(out: &'a mut [f32], sums: &'a mut [f32]) -> Self {
        let state = State::of(out, sums);
        state.max.fill(f32::NEG_INFINITY);
        state.sum.fill(0.0);
        state.out.fill(0.0);
        state
    }

    /// What another has left.
    fn of(out: &'a mut [f32], sums: &'a mut [f32]) -> Self {
        let (max, sum) = sums.split_at_mut(sums.len() / 2);
        State { max, sum, out }
    }

    fn finish(&mut self) {
        let d = self.out.len() / self.max.len();
        for (out, sum) in self.out.chunks_exact_mut(d).zip(&*self.sum) {
            let inverse = 1.0 / sum;
            out.iter_mut().for_each(|v| *v *= inverse);
        }
    }

    /// Adds the state of the same rows over other keys.
    fn merge(&mut self, other: &State) {
        let d = self.out.len() / self.max.len();
        for r in 0..self.max.len() {
            let max = if other.max[r] > self.max[r] { other.max[r] } else { self.max[r] };
            let (a, b) = (exp(self.max[r] - max), exp(other.max[r] - max));
            self.max[r] = max;
            self.sum[r] = self.sum[r] * a + other.sum[r] * b;
            for (v, w) in self.out[r * d..][..d].iter_mut().zip(&other.out[r * d..][..d]) {
                *v = *v * a + w * b;
            }
        }
    }
}

/// Turns a tile of scores [rows, n], whose first key is at `from`, into e^(score − maximum), 0 where the query does not see the key; rescales the
/// running state where the maximum grows. The first row is of the query at `position`.
#[inline(always)]
fn absorb_body(
    scores: &mut [f32],
    n: usize,
    from: usize,
    position: usize,
    group: usize,
    window: usize,
    state: &mut State,
) {
    let d = state.out.len() / state.max.len();
    for (r, row) in scores.chunks_exact_mut(n).enumerate() {
        let position = position + r / group;
        let end = (position + 1).saturating_sub(from).min(n);
        let start = (position + 1).saturating_sub(window).saturating_sub(from).min(end);
        row[..start].fill(0.0);
        row[end..].fill(0.0);
        let row = &mut row[start..end];
        if row.is_empty() {
            continue;
        }
        let max = max_body(row);
        if max > state.max[r] {
            // Before the first key there is nothing to rescale.
            if state.max[r] > f32::NEG_INFINITY {
                let shrink = exp(state.max[r] - max);
                state.sum[r] *= shrink;
                state.out[r * d..][..d].iter_mut().for_each(|v| *v *= shrink);
            }
            state.max[r] = max;
        }
        state.sum[r] += exp_sum_body(row, state.max[r]);
    }
}

twin! {
    fn absorb = absorb_body(
        scores: &mut [f32], n: usize, from: usize, position: usize, group: usize, window: usize, state: &mut State,
    )
}

#[cfg(test)]
mod tests;
