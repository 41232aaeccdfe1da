//! Pairs of i16, multiplied by AVX-512 VNNI's `vpdpwssd`: a number is one of ±32767 steps of its row's largest, and sums are exact.

use super::{KEYS, Pairs, Rows, paired};
use crate::Buffer;
use crate::isa::Avx512Vnni;
use crate::tiles::{ROWS, STRIP};
use std::arch::x86_64::*;

/// Numbers of a row at most: sums of their products with levels stay below 2³¹.
pub(super) const MOST: usize = 512;
const _: () = assert!(KEYS <= MOST);
/// Largest magnitude of a number, in steps.
const LARGEST: f32 = 32767.0;
/// Rows of a tile: with two groups of columns 16 sums, and 10 loads for 16 products.
const TILE: usize = 8;

/// Rows in steps, in whole strips.
pub(super) struct Words {
    pairs: Buffer<Pairs>,
    /// The step of every row, not a number where one of its numbers is none.
    scale: Buffer<f32>,
    /// [`Pairs`] of a row.
    steps: usize,
}

impl Rows for Words {
    type Proof = Avx512Vnni;

    fn new(rows: usize, width: usize) -> Self {
        let (rows, steps) = (rows.next_multiple_of(STRIP), width / STRIP);
        Words { pairs: Buffer::zeros(rows * steps), scale: Buffer::zeros(rows), steps }
    }

    fn level(level: i8) -> u16 {
        i16::from(level) as u16
    }

    fn narrow(&mut self, width: usize) {
        self.steps = width / STRIP;
    }

    fn set(&mut self, _: &Avx512Vnni, row: usize, x: &[f32], apart: usize) {
        let to = &mut self.pairs[row * self.steps..(row + 1) * self.steps];
        // SAFETY: the token proves AVX-512 F.
        self.scale[row] = unsafe { set(to, x, apart) };
    }

    fn multiply(&self, _: &Avx512Vnni, first: usize, columns: &[Pairs], y: &mut [f32], pitch: usize) {
        let (steps, group) = (self.steps * ROWS, columns.len() / 2);
        let rows = &self.pairs[first * self.steps..][..STRIP * self.steps];
        let scale = &self.scale[first..][..STRIP];
        assert!(steps <= group && y.len() >= (STRIP - 1) * pitch + STRIP);
        for at in (0..STRIP).step_by(TILE) {
            let rows = rows[at * self.steps..].as_ptr().cast();
            // SAFETY: the token proves AVX-512 F and VNNI; there are the tile's rows of `steps` pairs each, as many in both groups of columns, and
            // the tile's rows of 32 numbers of y.
            unsafe { tile(rows, columns, group, steps, &scale[at..], y[at * pitch..].as_mut_ptr(), pitch) };
        }
    }
}

/// Sets a row, and returns its step.
#[target_feature(enable = "avx512f")]
fn set(to: &mut [Pairs], x: &[f32], apart: usize) -> f32 {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    // As integers magnitudes have the same order, and what is not a number is larger than all.
    let mut largest = _mm512_setzero_si512();
    for x in x.as_chunks::<ROWS>().0 {
        // SAFETY: 16 numbers.
        let bits = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
    }
    let largest = f32::from_bits(_mm512_reduce_max_epi32(largest) as u32);
    if !largest.is_finite() {
        return f32::NAN;
    }
    // Smaller steps have no inverse. One division waits for another: a row has one.
    let scale = (largest * (1.0 / LARGEST)).max(f32::MIN_POSITIVE);
    let (inverse, low) = (_mm512_set1_ps(1.0 / scale), _mm512_set1_epi32(0xffff));
    let mut to = to.iter_mut();
    // (To flatten this takes an eighth longer, of attention in all.)
    for x in x.chunks_exact(2 * apart) {
        for ((first, second), to) in paired(x).zip(&mut to) {
            // SAFETY: 16 numbers of either, and 16 pairs, aligned to a line.
            unsafe {
                let first = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(first.as_ptr()), inverse));
                let second = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(second.as_ptr()), inverse));
                let pairs = _mm512_or_si512(_mm512_and_si512(first, low), _mm512_slli_epi32::<16>(second));
                _mm512_store_si512(to.0.as_mut_ptr().cast(), pairs);
            }
        }
    }
    scale
}

/// A tile's rows of `steps` pairs, one after the other, times two groups of 16 columns, which lie `group` apart.
///
/// # Safety
/// There must be [`TILE`] rows, scales, and rows of 32 numbers of y, `pitch` apart; and `steps` pairs in both groups.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn tile(
    rows: *const i32,
    columns: &[Pairs],
    group: usize,
    steps: usize,
    scale: &[f32],
    y: *mut f32,
    pitch: usize,
) {
    let (mut sum, columns) = ([[_mm512_setzero_si512(); 2]; TILE], columns.as_ptr());
    for i in 0..steps {
        // SAFETY: the caller's.
        unsafe {
            let a = _mm512_load_si512(columns.add(i).cast());
            let b = _mm512_load_si512(columns.add(group + i).cast());
            for r in 0..TILE {
                let x = _mm512_set1_epi32(*rows.add(r * steps + i));
                sum[r][0] = _mm512_dpwssd_epi32(sum[r][0], x, a);
                sum[r][1] = _mm512_dpwssd_epi32(sum[r][1], x, b);
            }
        }
    }
    for r in 0..TILE {
        let scale = _mm512_set1_ps(scale[r]);
        for g in 0..2 {
            // SAFETY: the caller's.
            unsafe {
                let to = y.add(r * pitch + g * ROWS);
                _mm512_storeu_ps(to, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum[r][g])));
            }
        }
    }
}
