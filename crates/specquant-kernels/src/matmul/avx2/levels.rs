//! Activation codes of 7 bits times levels of 8: an i16 takes one sum of two products for certain, and to widen each of them takes as long as to multiply it.
//!
//! For given weights the sums that are possible reach over a range only half as wide: codes `a` lie within 64 of 64, so that Σ a·w − 64 Σ w is an i16 as long as
//! Σ |w| ≤ 511. Additions wrap, so it does not matter what their sums are on the way. That holds for two quads always (4 · 127), and in all lanes for four of five
//! runs of four quads of Gaussian weights. So a block is cut into long runs and short ones, which are only then widened, all long ones first: in the order in
//! which they lie the processor would guess wrong at every fifth. The 64 Σ w go back in once for every channel, and begin its sums.

use super::{add_to, fetch_ahead, i16_sums, load, quad, store_chunk, table, unpack};
use crate::Buffer;
use crate::matmul::INT_DEPTH;
use crate::weights::{Chunk, PANEL};
use std::arch::x86_64::*;

/// The largest weight, and log₂ of the middle of the codes, which are below twice that.
const LARGEST: i32 = 127;
const MIDDLE: i32 = 6;
/// Σ |w| of what is added up in an i16.
const LIMIT: i16 = i16::MAX >> MIDDLE;
const _: () = assert!(4 * LARGEST <= LIMIT as i32);
/// Quads of a long run and of a short one, which is a nibble chunk.
const LONG: usize = 4;
const SHORT: usize = 2;
/// Nibble chunks of a block at most.
const MOST: usize = INT_DEPTH / 8;

/// Rows up to which nibbles are looked up for every four of them: to cut a block into runs takes as long as to multiply it with some rows.
const FEW: usize = 8;

/// Whether codes up to `a_max` and weights up to `w_max` are what this file multiplies.
pub(super) fn fits(a_max: i32, w_max: i32) -> bool {
    a_max < 2 << MIDDLE && w_max <= LARGEST
}

/// Adds products with a block of nibbles to `acc`.
///
/// # Safety
/// `a` points to rows that lie `stride` apart, as many as `acc` has, and each has as many codes as the chunks have inputs; codes and levels [`fits`].
#[target_feature(enable = "avx2")]
pub(super) unsafe fn int_block(
    w: &[Chunk],
    levels: &[i8; 16],
    a: *const u8,
    stride: usize,
    scratch: &mut Buffer<Chunk>,
    acc: &mut [[i32; PANEL]],
) {
    // SAFETY: forwarded; the rows of tile i start as many tiles on.
    unsafe {
        if acc.len() <= FEW {
            for (i, acc) in acc.chunks_mut(4).enumerate() {
                let a = a.add(4 * i * stride);
                match acc.len() {
                    4 => few::<4, 1>(w, levels, a, stride, acc),
                    3 => few::<3, 1>(w, levels, a, stride, acc),
                    2 => few::<2, 2>(w, levels, a, stride, acc),
                    _ => few::<1, 2>(w, levels, a, stride, acc),
                }
            }
            return;
        }
        let mut places = [[0; MOST]; 2];
        let runs = runs(w, levels, scratch, &mut places);
        for (i, acc) in acc.chunks_mut(TILE).enumerate() {
            let a = a.add(TILE * i * stride);
            match acc.len() {
                TILE => tile::<TILE>(runs, a, stride, acc),
                2 => tile::<2>(runs, a, stride, acc),
                _ => tile::<1>(runs, a, stride, acc),
            }
        }
    }
}

/// Rows of a tile: 6 registers of sums of runs, 6 of sums, two of weights, one of codes and one of products.
const TILE: usize = 3;

/// Runs of Q quads: of each −64 Σ w of every lane, which its sums begin with, and its byte chunks.
#[derive(Clone, Copy)]
struct Runs<'a, const Q: usize> {
    stream: &'a [Chunk],
    /// Their first nibble chunks.
    places: &'a [u8],
}

/// Cuts nibble chunks into long and short runs. Returns the 64 Σ w of all, too.
#[target_feature(enable = "avx2")]
fn runs<'a>(
    w: &[Chunk],
    levels: &[i8; 16],
    scratch: &'a mut Buffer<Chunk>,
    places: &'a mut [[u8; MOST]; 2],
) -> (Runs<'a, LONG>, Runs<'a, SHORT>, [__m256i; 2]) {
    let (table, limit) = (table(levels), _mm256_set1_epi16(LIMIT));
    let longest = w.len() / 2 * (1 + LONG);
    scratch.resize(longest + w.len() * (1 + SHORT));
    let (long, short) = scratch.split_at_mut(longest);
    let [long_places, short_places] = places;
    let (mut longs, mut shorts, mut middle) = (0, 0, [_mm256_setzero_si256(); 2]);
    for (i, pair) in w.chunks(2).enumerate() {
        let mut quads = [[[_mm256_setzero_si256(); 2]; SHORT]; 2];
        let mut sums = [[_mm256_setzero_si256(); 2]; 2];
        let mut sizes = [_mm256_setzero_si256(); 2];
        for (c, chunk) in pair.iter().enumerate() {
            fetch_ahead(chunk);
            quads[c] = unpack(chunk, table);
            for h in 0..2 {
                for quad in quads[c] {
                    let one = _mm256_set1_epi8(1);
                    sums[c][h] = _mm256_add_epi16(sums[c][h], _mm256_maddubs_epi16(one, quad[h]));
                    let size = _mm256_maddubs_epi16(_mm256_abs_epi8(quad[h]), one);
                    sizes[h] = _mm256_add_epi16(sizes[h], size);
                }
            }
        }
        let [a, b] = sizes;
        let over = _mm256_or_si256(_mm256_cmpgt_epi16(a, limit), _mm256_cmpgt_epi16(b, limit));
        if pair.len() == 2 && _mm256_movemask_epi8(over) == 0 {
            let to = &mut long[longs * (1 + LONG)..][..1 + LONG];
            let [first, second] = sums;
            let both = [_mm256_add_epi16(first[0], second[0]), _mm256_add_epi16(first[1], second[1])];
            begin(&mut to[0], both, &mut middle);
            for (to, quad) in to[1..].iter_mut().zip(quads.as_flattened()) {
                store_chunk(to, *quad);
            }
            long_places[longs] = 2 * i as u8;
            longs += 1;
        } else {
            for c in 0..pair.len() {
                let to = &mut short[shorts * (1 + SHORT)..][..1 + SHORT];
                begin(&mut to[0], sums[c], &mut middle);
                for (to, quad) in to[1..].iter_mut().zip(quads[c]) {
                    store_chunk(to, quad);
                }
                short_places[shorts] = (2 * i + c) as u8;
                shorts += 1;
            }
        }
    }
    let long = Runs { stream: &long[..longs * (1 + LONG)], places: &long_places[..longs] };
    (long, Runs { stream: &short[..shorts * (1 + SHORT)], places: &short_places[..shorts] }, middle)
}

/// Writes what a run's sums begin with; its 64 Σ w, which they lack then, are added to `middle`.
#[target_feature(enable = "avx2")]
fn begin(to: &mut Chunk, sums: [__m256i; 2], middle: &mut [__m256i; 2]) {
    let mut begin = [_mm256_setzero_si256(); 2];
    for h in 0..2 {
        let lacks = _mm256_slli_epi16::<MIDDLE>(sums[h]);
        begin[h] = _mm256_sub_epi16(begin[h], lacks);
        middle[h] = _mm256_add_epi32(middle[h], _mm256_madd_epi16(lacks, _mm256_set1_epi16(1)));
    }
    store_chunk(to, begin);
}

/// Products with what [`runs`] made; `middle` puts the 64 Σ w back that it lacks.
#[target_feature(enable = "avx2")]
unsafe fn tile<const R: usize>(
    (long, short, middle): (Runs<LONG>, Runs<SHORT>, [__m256i; 2]),
    a: *const u8,
    stride: usize,
    acc: &mut [[i32; PANEL]],
) {
    let mut sum = [middle; R];
    // SAFETY: forwarded.
    unsafe {
        add_runs::<R, LONG>(long, a, stride, &mut sum);
        add_runs::<R, SHORT>(short, a, stride, &mut sum);
    }
    acc.iter_mut().zip(sum).for_each(|(acc, sum)| add_to(acc, sum));
}

#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_runs<const R: usize, const Q: usize>(
    runs: Runs<Q>,
    a: *const u8,
    stride: usize,
    sum: &mut [[__m256i; 2]; R],
) {
    let ones = _mm256_set1_epi16(1);
    for (run, &place) in runs.stream.chunks_exact(1 + Q).zip(runs.places) {
        // SAFETY: forwarded; the run's quads start at its place.
        let part = unsafe { i16_sums::<R>(load(&run[0]), &run[1..], a.add(8 * usize::from(place)), stride) };
        for r in 0..R {
            for h in 0..2 {
                sum[r][h] = _mm256_add_epi32(sum[r][h], _mm256_madd_epi16(part[r][h], ones));
            }
        }
    }
}

/// Few rows: nibbles are looked up in registers and every sum of two products is widened. The quads of a chunk have C chains of additions.
#[target_feature(enable = "avx2")]
unsafe fn few<const R: usize, const C: usize>(
    w: &[Chunk],
    levels: &[i8; 16],
    a: *const u8,
    stride: usize,
    acc: &mut [[i32; PANEL]],
) {
    let (table, ones) = (table(levels), _mm256_set1_epi16(1));
    let mut sum = [[[_mm256_setzero_si256(); 2]; C]; R];
    for (j, chunk) in w.iter().enumerate() {
        fetch_ahead(chunk);
        for (q, w) in unpack(chunk, table).into_iter().enumerate() {
            for r in 0..R {
                // SAFETY: the row has two quads for each chunk.
                let x = unsafe { quad(a.add(r * stride + 8 * j + 4 * q)) };
                for h in 0..2 {
                    let products = _mm256_madd_epi16(_mm256_maddubs_epi16(x, w[h]), ones);
                    sum[r][q % C][h] = _mm256_add_epi32(sum[r][q % C][h], products);
                }
            }
        }
    }
    for r in 0..R {
        for sum in sum[r] {
            add_to(&mut acc[r], sum);
        }
    }
}
