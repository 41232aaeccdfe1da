//! Activation codes of 7 bits times levels of 8: an i16 takes one sum of two products for certain, and to widen each of them takes as long as to multiply it.
//!
//! For given weights the sums that are possible reach over a range only half as wide: codes `a` lie within 64 of 64, so that Σ a·w − 64 Σ w is an i16 as long as
//! Σ |w| ≤ 511. Additions wrap, so it does not matter what their sums are on the way. Chunks are taken together as long as that holds in every lane, two quads
//! always (4 · 127) and mostly four of Gaussian weights, and only then widened; the 64 Σ w go back in at the end, once for every channel.

use super::{add_to, fetch_ahead, load, quad, table, unpack};
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
    // SAFETY: forwarded; a tile's rows start 4 i rows on.
    unsafe {
        match acc.len() {
            1 => return few::<1, 2>(w, levels, a, stride, acc),
            2 => return few::<2, 2>(w, levels, a, stride, acc),
            3 => return few::<3, 1>(w, levels, a, stride, acc),
            4 => return few::<4, 1>(w, levels, a, stride, acc),
            _ => {}
        }
        let mut lengths = [0; INT_DEPTH / 8];
        let (lengths, middle) = segments(w, levels, scratch, &mut lengths);
        for (i, acc) in acc.chunks_mut(4).enumerate() {
            let a = a.add(4 * i * stride);
            match acc.len() {
                4 => tile::<4>(scratch, lengths, a, stride, acc),
                3 => tile::<3>(scratch, lengths, a, stride, acc),
                2 => tile::<2>(scratch, lengths, a, stride, acc),
                _ => tile::<1>(scratch, lengths, a, stride, acc),
            }
            for acc in acc {
                add_to(acc, middle);
            }
        }
    }
}

/// Cuts nibble chunks into segments: in `stream` of each −64 Σ w of every lane, which its sums begin with, and its byte chunks. Returns how many nibble chunks
/// each has, and the 64 Σ w of all.
#[target_feature(enable = "avx2")]
fn segments<'a>(
    w: &[Chunk],
    levels: &[i8; 16],
    stream: &mut Buffer<Chunk>,
    lengths: &'a mut [u8; INT_DEPTH / 8],
) -> (&'a [u8], [__m256i; 2]) {
    let (zero, one) = (_mm256_setzero_si256(), _mm256_set1_epi8(1));
    let (table, limit) = (table(levels), _mm256_set1_epi16(LIMIT));
    stream.resize(3 * w.len());
    // Of the segment: where its chunks begin in the stream, Σ |w| and Σ w.
    let (mut count, mut start, mut end) = (0, 0, 0);
    let (mut sizes, mut sums, mut middle) = ([zero; 2], [zero; 2], [zero; 2]);
    for chunk in w {
        fetch_ahead(chunk);
        let quads = unpack(chunk, table);
        let (mut joined, mut own, mut sum) = (sizes, [zero; 2], [zero; 2]);
        for h in 0..2 {
            for quad in quads {
                own[h] = _mm256_add_epi16(own[h], _mm256_maddubs_epi16(_mm256_abs_epi8(quad[h]), one));
                sum[h] = _mm256_add_epi16(sum[h], _mm256_maddubs_epi16(one, quad[h]));
            }
            joined[h] = _mm256_add_epi16(sizes[h], own[h]);
        }
        let over =
            _mm256_or_si256(_mm256_cmpgt_epi16(joined[0], limit), _mm256_cmpgt_epi16(joined[1], limit));
        if count == 0 || _mm256_movemask_epi8(over) != 0 {
            if count > 0 {
                close(&mut stream[start], sums, &mut middle);
            }
            (count, start, end) = (count + 1, end, end + 1);
            (sizes, sums) = (own, sum);
        } else {
            sizes = joined;
            sums = [_mm256_add_epi16(sums[0], sum[0]), _mm256_add_epi16(sums[1], sum[1])];
        }
        lengths[count - 1] += 1;
        for quad in quads {
            store(&mut stream[end], quad);
            end += 1;
        }
    }
    if count > 0 {
        close(&mut stream[start], sums, &mut middle);
    }
    (&lengths[..count], middle)
}

/// Writes what a segment's sums begin with; its 64 Σ w, which they lack then, are added to `middle`.
#[target_feature(enable = "avx2")]
fn close(to: &mut Chunk, sums: [__m256i; 2], middle: &mut [__m256i; 2]) {
    let mut begin = [_mm256_setzero_si256(); 2];
    for h in 0..2 {
        let lacks = _mm256_slli_epi16::<MIDDLE>(sums[h]);
        begin[h] = _mm256_sub_epi16(begin[h], lacks);
        middle[h] = _mm256_add_epi32(middle[h], _mm256_madd_epi16(lacks, _mm256_set1_epi16(1)));
    }
    store(to, begin);
}

#[target_feature(enable = "avx2")]
fn store(chunk: &mut Chunk, v: [__m256i; 2]) {
    // SAFETY: a chunk is 64 aligned bytes.
    unsafe {
        _mm256_store_si256(chunk.0.as_mut_ptr().cast(), v[0]);
        _mm256_store_si256(chunk.0.as_mut_ptr().add(32).cast(), v[1]);
    }
}

/// Products with what [`segments`] made, less 64 Σ w.
#[target_feature(enable = "avx2")]
unsafe fn tile<const R: usize>(
    mut stream: &[Chunk],
    lengths: &[u8],
    mut a: *const u8,
    stride: usize,
    acc: &mut [[i32; PANEL]],
) {
    let ones = _mm256_set1_epi16(1);
    for &length in lengths {
        let (segment, rest) = stream.split_at(1 + 2 * usize::from(length));
        stream = rest;
        let mut sum = [load(&segment[0]); R];
        for chunk in &segment[1..] {
            let w = load(chunk);
            for r in 0..R {
                // SAFETY: the row has as many quads as there are byte chunks.
                let x = unsafe { quad(a.add(r * stride)) };
                for h in 0..2 {
                    sum[r][h] = _mm256_add_epi16(sum[r][h], _mm256_maddubs_epi16(x, w[h]));
                }
            }
            a = a.wrapping_add(4);
        }
        for r in 0..R {
            let [a, b] = sum[r];
            add_to(&mut acc[r], [_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)]);
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
