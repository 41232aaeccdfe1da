//! Softmax of a row of scores, between the two products of pairs, where any order of sums will do: two passes over what lies in the first cache.

use super::{ROWS, Side};
use crate::ops::{EXP, LN2, exp};
use std::arch::x86_64::*;
use std::ops::Range;

/// Of a multiple of 16 numbers.
#[target_feature(enable = "avx512f")]
pub(super) fn sum(x: &[f32]) -> f32 {
    let mut sum = _mm512_setzero_ps();
    for x in x.as_chunks().0 {
        sum = _mm512_add_ps(sum, load(x));
    }
    _mm512_reduce_add_ps(sum)
}

/// The running softmax of one query row.
pub(super) struct RowState<'a> {
    pub max: &'a mut f32,
    pub sum: &'a mut f32,
    /// Unnormalized output.
    pub out: &'a mut [f32],
}

/// Turns products with the codes of keys into e^(score − maximum) times the values' scales, 0 where the query does not see the key; rescales the running
/// state where the maximum grows. q_sum: the sum of the query, which the zero points of keys were multiplied with.
#[target_feature(enable = "avx512f")]
pub(super) fn absorb_row(
    row: &mut [f32],
    visible: Range<usize>,
    q_sum: f32,
    k: &Side,
    v: &Side,
    state: RowState,
) {
    if visible.is_empty() {
        return row.fill(0.0);
    }
    let rows = row.as_chunks_mut().0;
    if visible == (0..rows.len() * ROWS) {
        absorb_seen::<true>(rows, visible, q_sum, k, v, state);
    } else {
        absorb_seen::<false>(rows, visible, q_sum, k, v, state);
    }
}

/// ALL: whether the query sees every key.
#[target_feature(enable = "avx512f")]
fn absorb_seen<const ALL: bool>(
    row: &mut [[f32; ROWS]],
    visible: Range<usize>,
    q_sum: f32,
    k: &Side,
    v: &Side,
    state: RowState,
) {
    let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
    for (i, x) in row.iter_mut().enumerate() {
        let mut score = load(x);
        if k.zeros {
            score = _mm512_fnmadd_ps(load_at(&k.zero, i), _mm512_set1_ps(q_sum), score);
        }
        score = _mm512_mul_ps(score, load_at(&k.scale, i));
        store(score, x);
        // What is not a number counts for nothing here, as in `absorb`, and makes the sum none.
        max = _mm512_mask_max_ps(max, seen::<ALL>(&visible, i), score, max);
    }
    let max = _mm512_reduce_max_ps(max);
    if max > *state.max {
        // Before the first key there is nothing to rescale.
        if *state.max > f32::NEG_INFINITY {
            let shrink = exp(*state.max - max);
            *state.sum *= shrink;
            for x in state.out.as_chunks_mut::<ROWS>().0 {
                store(_mm512_mul_ps(load(x), _mm512_set1_ps(shrink)), x);
            }
        }
        *state.max = max;
    }
    let (max, mut sum) = (_mm512_set1_ps(*state.max), _mm512_setzero_ps());
    for (i, x) in row.iter_mut().enumerate() {
        let seen = seen::<ALL>(&visible, i);
        let weight = exp_nonpositive(_mm512_sub_ps(load(x), max), seen);
        sum = _mm512_add_ps(sum, weight);
        store(_mm512_maskz_mul_ps(seen, weight, load_at(&v.scale, i)), x);
    }
    *state.sum += _mm512_reduce_add_ps(sum);
}

/// The lanes of group i that a query sees.
#[target_feature(enable = "avx512f")]
fn seen<const ALL: bool>(visible: &Range<usize>, i: usize) -> __mmask16 {
    if ALL {
        return __mmask16::MAX;
    }
    let at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    let key = _mm512_add_epi32(at, _mm512_set1_epi32((i * ROWS) as i32));
    let below = _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(visible.end as i32));
    _mm512_mask_cmpge_epi32_mask(below, key, _mm512_set1_epi32(visible.start as i32))
}

#[target_feature(enable = "avx512f")]
fn load(x: &[f32; ROWS]) -> __m512 {
    // SAFETY: 16 numbers.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// Group i.
#[target_feature(enable = "avx512f")]
fn load_at(x: &[f32], i: usize) -> __m512 {
    load(&x.as_chunks::<ROWS>().0[i])
}

#[target_feature(enable = "avx512f")]
fn store(v: __m512, x: &mut [f32; ROWS]) {
    // SAFETY: 16 numbers.
    unsafe { _mm512_storeu_ps(x.as_mut_ptr(), v) }
}

/// e^x for x <= 0, 0 where that would be subnormal and in lanes that are not asked for; NaN stays NaN. As `ops::exp`, but for the rounding of the exponent.
#[target_feature(enable = "avx512f")]
fn exp_nonpositive(x: __m512, lanes: __mmask16) -> __m512 {
    let least = _mm512_set1_ps(-87.0);
    let large = _mm512_mask_cmp_ps_mask::<_CMP_NLT_UQ>(lanes, x, least);
    // Of what is not a number the second is taken.
    let x = _mm512_max_ps(least, x);
    let n = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    let mut r = x;
    for part in LN2 {
        r = _mm512_fnmadd_ps(n, _mm512_set1_ps(part), r);
    }
    let mut p = _mm512_set1_ps(EXP[0]);
    for c in &EXP[1..] {
        p = _mm512_fmadd_ps(r, p, _mm512_set1_ps(*c));
    }
    let y = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r), _mm512_set1_ps(1.0));
    _mm512_maskz_scalef_ps(large, y, n)
}
