//! AVX-512 kernel: `vpdpbusd` multiplies a chunk (a quad of inputs of 16 channels) with a token's quad and adds to 16 i32 lanes.
//!
//! Eight tokens at a time keep eight chains of accumulation busy at nine loads for eight products; a lone token splits its
//! sum into four chains. Float products and the rest use the AVX2 code.

use super::avx2::check;
use super::{FloatBlock, IntBlock, Kernel};
use crate::isa::Avx512Vnni;
use crate::weights::{Chunk, PANEL};
use std::arch::x86_64::*;

impl Kernel for Avx512Vnni {
    fn int_block(self, block: &IntBlock, scratch: &mut Vec<Chunk>, acc: &mut [[i32; PANEL]]) {
        check(
            block.a.len(),
            block.stride,
            block.rows,
            block.w.len() * if block.nibbles { 8 } else { 4 },
            acc.len(),
        );
        // SAFETY: the token proves AVX-512 F, BW and VNNI; `check` has proved that every token has the chunks' codes.
        unsafe { int_block(block, scratch, acc) }
    }

    fn float_block(self, block: &FloatBlock, scratch: &mut Vec<f32>, acc: &mut [[f32; PANEL]]) {
        self.avx2.float_block(block, scratch, acc);
    }

    fn fold(
        self,
        group: (&[f32; PANEL], &[i32; PANEL]),
        zero: &[i32],
        acc: &mut [[i32; PANEL]],
        sum: &mut [[f32; PANEL]],
    ) {
        self.avx2.fold(group, zero, acc, sum);
    }
}

/// Unsafe contract of the functions below: `a` points to rows that lie `stride` apart, as many as `acc` has (or R), and each
/// has as many codes as the chunks have inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn int_block(block: &IntBlock, scratch: &mut Vec<Chunk>, acc: &mut [[i32; PANEL]]) {
    let (a, stride) = (block.a.as_ptr(), block.stride);
    // SAFETY: forwarded; a tile's rows start 8 i rows on.
    unsafe {
        if block.nibbles && block.rows < 4 {
            for (r, acc) in acc.iter_mut().enumerate() {
                nibbles(block.w, block.levels, a.add(r * stride), acc);
            }
            return;
        }
        let w = if block.nibbles {
            expand(block.w, block.levels, scratch);
            &*scratch
        } else {
            block.w
        };
        for (i, acc) in acc.chunks_mut(8).enumerate() {
            let a = a.add(8 * i * stride);
            match acc.len() {
                8 => tile::<8>(w, a, stride, acc),
                7 => tile::<7>(w, a, stride, acc),
                6 => tile::<6>(w, a, stride, acc),
                5 => tile::<5>(w, a, stride, acc),
                4 => tile::<4>(w, a, stride, acc),
                3 => tile::<3>(w, a, stride, acc),
                2 => tile::<2>(w, a, stride, acc),
                _ => tile::<1>(w, a, stride, acc),
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
fn load(chunk: &Chunk) -> __m512i {
    // SAFETY: a chunk is 64 aligned bytes.
    unsafe { _mm512_load_si512(chunk.0.as_ptr().cast()) }
}

/// The levels in every 128-bit lane, to be looked up.
#[target_feature(enable = "avx512f")]
fn table(levels: &[i8; 16]) -> __m512i {
    // SAFETY: 16 bytes from an array of 16.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(levels.as_ptr().cast()) })
}

/// What the quads in the low and in the high nibbles stand for.
#[target_feature(enable = "avx512f,avx512bw")]
fn unpack(chunk: &Chunk, table: __m512i) -> [__m512i; 2] {
    let mask = _mm512_set1_epi8(15);
    let v = load(chunk);
    [v, _mm512_srli_epi16::<4>(v)].map(|v| _mm512_shuffle_epi8(table, _mm512_and_si512(v, mask)))
}

/// Nibble chunks to byte chunks.
#[target_feature(enable = "avx512f,avx512bw")]
fn expand(w: &[Chunk], levels: &[i8; 16], bytes: &mut Vec<Chunk>) {
    let table = table(levels);
    bytes.resize(2 * w.len(), Chunk([0; 64]));
    for (chunk, pair) in w.iter().zip(bytes.as_chunks_mut::<2>().0) {
        for (quad, to) in unpack(chunk, table).into_iter().zip(pair) {
            // SAFETY: a chunk is 64 aligned bytes.
            unsafe { _mm512_store_si512(to.0.as_mut_ptr().cast(), quad) };
        }
    }
}

/// A quad of activation codes in every 32-bit lane.
#[target_feature(enable = "avx512f")]
unsafe fn quad(a: *const u8) -> __m512i {
    // SAFETY: the caller's row has 4 codes there.
    _mm512_set1_epi32(unsafe { a.cast::<i32>().read_unaligned() })
}

#[target_feature(enable = "avx512f")]
fn add_to(acc: &mut [i32; PANEL], v: __m512i) {
    let p = acc.as_mut_ptr().cast();
    // SAFETY: 16 lanes from and to an array of 16.
    unsafe { _mm512_storeu_si512(p, _mm512_add_epi32(_mm512_loadu_si512(p.cast_const()), v)) };
}

/// Byte chunks times R tokens.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn tile<const R: usize>(w: &[Chunk], a: *const u8, stride: usize, acc: &mut [[i32; PANEL]]) {
    let mut sum = [_mm512_setzero_si512(); R];
    for (q, chunk) in w.iter().enumerate() {
        let w = load(chunk);
        for r in 0..R {
            // SAFETY: the row has as many quads as there are chunks.
            sum[r] = _mm512_dpbusd_epi32(sum[r], unsafe { quad(a.add(r * stride + 4 * q)) }, w);
        }
    }
    for r in 0..R {
        add_to(&mut acc[r], sum[r]);
    }
}

/// Nibble chunks times one token, unpacked in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn nibbles(w: &[Chunk], levels: &[i8; 16], a: *const u8, acc: &mut [i32; PANEL]) {
    let table = table(levels);
    let mut sum = [_mm512_setzero_si512(); 4];
    let (pairs, last) = w.as_chunks::<2>();
    for (j, pair) in pairs.iter().enumerate() {
        let [u, v] = [unpack(&pair[0], table), unpack(&pair[1], table)];
        for (i, w) in [u[0], u[1], v[0], v[1]].into_iter().enumerate() {
            // SAFETY: the row has four quads for each pair of chunks.
            sum[i] = _mm512_dpbusd_epi32(sum[i], unsafe { quad(a.add(16 * j + 4 * i)) }, w);
        }
    }
    for chunk in last {
        for (i, w) in unpack(chunk, table).into_iter().enumerate() {
            // SAFETY: the row has two quads for each chunk.
            sum[i] = _mm512_dpbusd_epi32(sum[i], unsafe { quad(a.add(16 * pairs.len() + 4 * i)) }, w);
        }
    }
    add_to(acc, _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3])));
}
