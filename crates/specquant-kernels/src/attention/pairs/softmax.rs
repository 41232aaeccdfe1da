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

/// e^x for x <= 0, 0 where that would be subnormal and in lanes that are not asked for; NaN stays NaN. As `ops::exp_nonpositive`, but for the rounding of the exponent.
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

#[cfg(test)]
mod tests {
    use super::super::KEYS;
    use super::*;
    use crate::isa::Avx512Vnni;
    use crate::ops::test_noise as noise;

    #[test]
    fn exponentials_are_those_of_f64() {
        if Avx512Vnni::new().is_none() {
            return;
        }
        let exp = |x: f32| {
            // SAFETY: the token proves AVX-512 F.
            let v = unsafe { exp_nonpositive(_mm512_set1_ps(x), 1) };
            // SAFETY: 16 numbers either way.
            unsafe { std::mem::transmute::<__m512, [f32; ROWS]>(v) }
        };
        for i in 0..=8700 {
            let x = -0.01 * i as f32;
            let (got, want) = (exp(x), f64::from(x).exp());
            assert!((f64::from(got[0]) / want - 1.0).abs() < 2.5e-7, "{x}: {} {want}", got[0]);
            assert_eq!(got[1..], [0.0; ROWS - 1]);
        }
        assert_eq!([-87.00001, f32::NEG_INFINITY].map(|x| exp(x)[0]), [0.0; 2]);
        assert!(exp(-87.0)[0] > 0.0 && exp(f32::NAN)[0].is_nan());
    }

    #[test]
    fn a_row_is_its_softmax() {
        if Avx512Vnni::new().is_none() {
            return;
        }
        let n = 48;
        for (visible, before, zeros) in [
            (0..n, None, false),
            (0..n, Some(0.1), true),
            (0..1, Some(-3.0), false),
            (5..n, Some(7.0), true),
            (20..23, None, true),
            (17..47, Some(0.0), false),
            (9..9, Some(1.0), false),
            // As far behind the last key as a window may begin.
            (Range { start: 30, end: 10 }, None, false),
        ] {
            let side = |seed: u64| {
                let mut side = Side { scale: [0.0; KEYS], zero: [0.0; KEYS], zeros };
                side.scale[..n].iter_mut().zip(noise(n, seed)).for_each(|(to, v)| *to = 1.0 + v.abs());
                let zero = side.zero[..n].iter_mut().zip(noise(n, seed + 1));
                zero.for_each(|(to, v)| *to = if zeros { v } else { 0.0 });
                // What a query does not see may be anything.
                let hidden = (0..n).filter(|i| !visible.contains(i));
                hidden.for_each(|i| side.scale[i] = f32::NAN);
                side
            };
            let (k, v, q_sum) = (side(1), side(3), 0.7);
            let (mut row, mut out) = (noise(n, 5), noise(32, 6));
            let (mut max, mut sum) = (before.unwrap_or(f32::NEG_INFINITY), before.map_or(0.0, |_| 2.0));
            let score = |i: usize| f64::from((row[i] - k.zero[i] * q_sum) * k.scale[i]);
            let most = visible.clone().map(score).fold(f64::from(max), f64::max);
            let shrink = if before.is_some() { (f64::from(max) - most).exp() } else { 1.0 };
            let weights: Vec<f64> =
                (0..n).map(|i| if visible.contains(&i) { (score(i) - most).exp() } else { 0.0 }).collect();
            let want_sum = f64::from(sum) * shrink + weights.iter().sum::<f64>();
            let want_out: Vec<f64> = out.iter().map(|v| f64::from(*v) * shrink).collect();
            let state = RowState { max: &mut max, sum: &mut sum, out: &mut out };
            // SAFETY: the token proves AVX-512 F.
            unsafe { absorb_row(&mut row, visible.clone(), q_sum, &k, &v, state) };
            let near = |got: f32, want: f64| (f64::from(got) - want).abs() <= 1e-6 * want.abs().max(1.0);
            assert!(f64::from(max) == most || near(max, most), "{visible:?}: {max} {most}");
            assert!(near(sum, want_sum), "{visible:?}: {sum} {want_sum}");
            assert!(out.iter().zip(want_out).all(|(got, want)| near(*got, want)), "{visible:?}");
            for (i, (got, weight)) in row.iter().zip(weights).enumerate() {
                let want = if weight > 0.0 { weight * f64::from(v.scale[i]) } else { 0.0 };
                assert!(near(*got, want), "{visible:?} {i}: {got} {want}");
            }
        }
    }
}
