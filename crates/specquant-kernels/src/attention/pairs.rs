//! Attention of many queries to 4-bit codes by instructions that multiply pairs of 16 bits: AMX's tiles of bfloat16 ([`bf16`]), and AVX-512 VNNI's
//! `vpdpwssd` ([`words`]), which do 16 and two times as many products a cycle as AVX-512 does in f32.
//!
//! What codes stand for, levels of 8 bits, is exact in both. Queries and softmax weights are rounded to 16 bits: of each
//! number in bfloat16; in i16 of the largest of its row (a query's values, or its weights of 128 keys, each times the scale of its value), so that a weight of
//! less than 1/65534 of that counts for nothing.
//!
//! An instruction adds, of two rows of pairs, both products. A byte of codes is such a pair: elements i and i + d/2 of a key, so that queries
//! are paired alike; and of values the pairs are two keys, 16 apart. Scales of keys multiply scores, those of values the weights.

mod bf16;
mod softmax;
mod words;

use super::{Coded, KEYS, State};
use crate::buffer::element;
use crate::isa::{AmxInt8, Avx512Vnni};
use crate::kv::Codes;
use crate::ops::widen_f16;
use crate::tiles::{ROWS, STRIP};
use crate::{Buffer, Isa, KvSide};
use softmax::{RowState, absorb_row};
use std::arch::x86_64::*;

/// 16 pairs of numbers of 16 bits, the first of a pair in the low half.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Pairs([u32; ROWS]);

element!(Pairs, Pairs([0; ROWS]));

/// Rows of numbers in 16 bits, in pairs, and how they are multiplied.
trait Rows {
    /// What proves that the instructions are there and ready.
    type Proof;
    /// Zeros, for `rows` rows of `width` numbers.
    fn new(rows: usize, width: usize) -> Self;
    /// What a level is as one of the 16 bits.
    fn level(level: i8) -> u16;
    /// Has rows of another width from now on, which is no more than the first.
    fn narrow(&mut self, width: usize);
    /// Sets a row; numbers that are `apart` make a pair.
    fn set(&mut self, proof: &Self::Proof, row: usize, x: &[f32], apart: usize);
    /// y, a strip of 32 rows and columns, whose rows lie `pitch` apart: the rows from `first` on times two groups of 16 columns, which lie one after the other.
    /// Columns beyond a row's width are not read.
    fn multiply(&self, proof: &Self::Proof, first: usize, columns: &[Pairs], y: &mut [f32], pitch: usize);
}

/// 16 pairs at a time: a number of the first half of x, and one of the second.
#[inline(always)]
fn paired(x: &[f32]) -> impl Iterator<Item = (&[f32; ROWS], &[f32; ROWS])> {
    let (first, second) = x.split_at(x.len() / 2);
    first.as_chunks().0.iter().zip(second.as_chunks().0)
}

/// The kernel for heads of d values, on a processor that has one.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    token: Token,
    d: usize,
}

#[derive(Clone, Copy)]
enum Token {
    Bf16(AmxInt8),
    Words(Avx512Vnni),
}

impl Kernel {
    /// Nothing where the processor has no such instructions, or a head is not whole rows of pairs, or so wide that sums could overflow.
    pub(super) fn new(isa: Isa, d: usize) -> Option<Self> {
        let token = match isa {
            Isa::AmxInt8 => AmxInt8::new().map(Token::Bf16),
            Isa::Avx512Vnni if d <= words::MOST => Avx512Vnni::new().map(Token::Words),
            _ => None,
        };
        token.filter(|_| d.is_multiple_of(2 * ROWS)).map(|token| Kernel { token, d })
    }

    /// Adds keys to the state of query rows.
    ///
    /// # Panics
    /// If the keys do not lie in codes, or lengths do not follow from the shapes.
    pub(super) fn absorb_codes(self, coded: &Coded, state: &mut State) {
        // SAFETY: the tokens prove the instructions that this is compiled for.
        unsafe {
            match self.token {
                Token::Bf16(token) => {
                    absorb_codes::<bf16::Halves>(&bf16::Shaped::new(token), self.d, coded, state)
                }
                Token::Words(token) => absorb_codes::<words::Words>(&token, self.d, coded, state),
            }
        }
    }
}

/// [`Kernel::absorb_codes`] for heads of d values.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn absorb_codes<R: Rows>(proof: &R::Proof, d: usize, coded: &Coded, state: &mut State) {
    let Coded { job, q, position, head, ref keys } = *coded;
    assert!(q.len() == state.out.len() && q.len() == state.max.len() * d);
    let rows = state.max.len();
    let mut queries = R::new(rows, d);
    let mut q_sums = Buffer::new(rows);
    for (r, q) in q.chunks_exact(d).enumerate() {
        queries.set(proof, r, q, d / 2);
        q_sums[r] = softmax::sum(q);
    }
    let mut pairs = Buffer::new(2 * d * GROUPS / 2);
    let (key_pairs, value_pairs) = pairs.split_at_mut(d * GROUPS / 2);
    let (mut scores, mut sums) = (Buffer::new(STRIP * KEYS), Buffer::new(STRIP * d));
    let mut weights = R::new(STRIP, KEYS);
    for from in keys.clone().step_by(KEYS) {
        let keys = from..(from + KEYS).min(keys.end);
        let codes = |side| job.cache.codes(side, head, keys.clone());
        let both = codes(KvSide::Keys).zip(codes(KvSide::Values));
        let all = both.as_ref().is_some_and(|(k, v)| [k, v].iter().all(|c| c.scale.len() == keys.len()));
        assert!(all, "attention: not all of these keys and values lie in codes");
        let Some((k, v)) = both else { return };
        expand_keys(&k, tables::<R>(&k.levels), d, key_pairs);
        expand_values(&v, tables::<R>(&v.levels), d, value_pairs);
        let (k, v) = (Side::new(&k), Side::new(&v));
        for first in (0..rows).step_by(STRIP) {
            let strip = first..(first + STRIP).min(rows);
            let (start, last) = (position + first / job.group, position + (strip.end - 1) / job.group);
            if last < from || keys.end <= (start + 1).saturating_sub(job.window) {
                continue;
            }
            // Keys that any of the strip's queries sees, and what fills up the last pair of tiles.
            let n = ((last + 1).min(keys.end) - from).next_multiple_of(STRIP);
            let scores = &mut scores[..STRIP * n];
            for (at, keys) in key_pairs.chunks_exact(d).enumerate().take(n / STRIP) {
                queries.multiply(proof, first, keys, &mut scores[at * STRIP..], n);
            }
            weights.narrow(n);
            for (r, row) in scores.chunks_exact_mut(n).enumerate().take(strip.len()) {
                let at = first + r;
                let end = (position + at / job.group + 1).saturating_sub(from).min(n);
                let start = (position + at / job.group + 1).saturating_sub(job.window).saturating_sub(from);
                let state = RowState {
                    max: &mut state.max[at],
                    sum: &mut state.sum[at],
                    out: &mut state.out[at * d..][..d],
                };
                absorb_row(row, start..end, q_sums[at], &k, &v, state);
                weights.set(proof, r, row, ROWS);
            }
            for (at, values) in value_pairs.chunks_exact(KEYS).enumerate() {
                weights.multiply(proof, 0, values, &mut sums[at * STRIP..], d);
            }
            let out = state.out[strip.start * d..strip.end * d].chunks_exact_mut(d);
            let rows = out.zip(sums.chunks_exact(d)).zip(scores.chunks_exact(n));
            for ((out, sums), p) in rows {
                let zero = v.zeros(p);
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum - zero);
            }
        }
    }
}

/// Groups of keys of a tile's columns.
const GROUPS: usize = KEYS / ROWS;

/// Scales and zero points of some keys or values; what is not there has a scale of 0.
struct Side {
    scale: [f32; KEYS],
    zero: [f32; KEYS],
    /// Whether any is not 0.
    zeros: bool,
}

impl Side {
    fn new(codes: &Codes) -> Self {
        let mut side = Side { scale: [0.0; KEYS], zero: [0.0; KEYS], zeros: !codes.zero.is_empty() };
        widen_f16(codes.scale, &mut side.scale[..codes.scale.len()]);
        side.zero.iter_mut().zip(codes.zero).for_each(|(to, zero)| *to = f32::from(*zero));
        side
    }

    /// What the zero points of values contribute to every element.
    #[inline(always)]
    fn zeros(&self, row: &[f32]) -> f32 {
        if !self.zeros {
            return 0.0;
        }
        let mut sums = [0.0; ROWS];
        for (x, zero) in row.as_chunks::<ROWS>().0.iter().zip(self.zero.as_chunks::<ROWS>().0) {
            (0..ROWS).for_each(|i| sums[i] += x[i] * zero[i]);
        }
        sums.iter().sum()
    }
}

/// What the 16 codes stand for, in the low and in the high half of a pair.
type Tables = [__m512i; 2];

#[target_feature(enable = "avx512f")]
fn tables<R: Rows>(levels: &[i8; 16]) -> Tables {
    let low = levels.map(|level| u32::from(R::level(level)));
    // SAFETY: 16 numbers of 32 bits.
    let low = unsafe { _mm512_loadu_si512(low.as_ptr().cast()) };
    [low, _mm512_slli_epi32::<16>(low)]
}

/// 16 pairs of levels: of the lowest four bits of `a` and of `b`.
#[target_feature(enable = "avx512f")]
fn look_up(tables: Tables, a: __m512i, b: __m512i, to: &mut Pairs) {
    let pair =
        _mm512_or_si512(_mm512_permutexvar_epi32(a, tables[0]), _mm512_permutexvar_epi32(b, tables[1]));
    // SAFETY: 64 bytes, aligned so.
    unsafe { _mm512_store_si512(to.0.as_mut_ptr().cast(), pair) };
}

/// 16 bytes of codes of a key; zeros where there is no such key.
#[target_feature(enable = "sse2")]
fn bytes(codes: &Codes, d: usize, key: usize, from: usize) -> __m128i {
    match codes.codes.get(key * d / 2 + from..).and_then(|codes| codes.first_chunk::<16>()) {
        // SAFETY: 16 bytes are there.
        Some(codes) => unsafe { _mm_loadu_si128(codes.as_ptr().cast()) },
        None => _mm_setzero_si128(),
    }
}

/// Keys: for every group of 16, row i has byte i of each.
#[target_feature(enable = "avx512f")]
fn expand_keys(codes: &Codes, tables: Tables, d: usize, pairs: &mut [Pairs]) {
    let groups = codes.scale.len().next_multiple_of(STRIP) / ROWS;
    for (group, pairs) in pairs.chunks_exact_mut(d / 2).enumerate().take(groups) {
        for (i, pairs) in pairs.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
            let mut rows = [_mm_setzero_si128(); ROWS];
            for (k, row) in rows.iter_mut().enumerate() {
                *row = bytes(codes, d, group * ROWS + k, i * ROWS);
            }
            // Each round interleaves what lies 8 rows apart; four of them transpose.
            for _ in 0..4 {
                let old = rows;
                for k in 0..ROWS / 2 {
                    rows[2 * k] = _mm_unpacklo_epi8(old[k], old[k + ROWS / 2]);
                    rows[2 * k + 1] = _mm_unpackhi_epi8(old[k], old[k + ROWS / 2]);
                }
            }
            for (row, pair) in rows.into_iter().zip(pairs) {
                let codes = _mm512_cvtepu8_epi32(row);
                look_up(tables, codes, _mm512_srli_epi32::<4>(codes), pair);
            }
        }
    }
}

/// Values: for every group of 16 elements, row 16 i + j has keys 32 i + j and 32 i + 16 + j.
#[target_feature(enable = "avx512f")]
fn expand_values(codes: &Codes, tables: Tables, d: usize, pairs: &mut [Pairs]) {
    let groups = codes.scale.len().div_ceil(STRIP);
    // Elements of the first half, and of the second.
    let (first, second) = pairs.split_at_mut(d / STRIP * KEYS / 2);
    for row in 0..groups * ROWS {
        let key = row / ROWS * STRIP + row % ROWS;
        for i in 0..d / STRIP {
            let a = _mm512_cvtepu8_epi32(bytes(codes, d, key, i * ROWS));
            let b = _mm512_cvtepu8_epi32(bytes(codes, d, key + ROWS, i * ROWS));
            let at = i * KEYS / 2 + row;
            look_up(tables, a, b, &mut first[at]);
            look_up(tables, _mm512_srli_epi32::<4>(a), _mm512_srli_epi32::<4>(b), &mut second[at]);
        }
    }
}
