//! AVX-VNNI kernel: `vpdpbusd` on 256 bits, half a chunk at a time: a quad of inputs of 8 channels.
//!
//! One or two tokens unpack nibbles in registers; more share one unpacking, six at a time: twelve sums, two registers of weights and one of codes. Float
//! products use the AVX2 code.

use super::avx2::{add_to, check, expand, fetch_ahead, load, quad, table, unpack};
use super::{Columns, FloatBlock, IntBlock, Kernel, Term};
use crate::Buffer;
use crate::isa::{Avx2, AvxVnni};
use crate::weights::{Chunk, PANEL};
use std::arch::x86_64::*;

impl Kernel for AvxVnni {
    type Scratch = Buffer<Chunk>;
    type Floats = Avx2;

    fn floats(self) -> Avx2 {
        self.avx2
    }

    fn int_block(self, block: &IntBlock, scratch: &mut Buffer<Chunk>, acc: &mut [[i32; PANEL]]) {
        block.clear(acc);
        for (panel, acc) in block.panels().iter().zip(acc.chunks_exact_mut(block.rows)) {
            let depth = panel.len() * if block.nibbles { 8 } else { 4 };
            check(block.a.len(), block.stride, block.rows, depth, acc.len());
            // SAFETY: the token proves AVX2 and AVX-VNNI; `check` has proved that every token has the codes that the chunks ask for.
            unsafe { int_block(block, panel, scratch, acc) }
        }
    }

    fn float_block(self, block: &FloatBlock, scratch: &mut Buffer<f32>, acc: &mut [[f32; PANEL]]) {
        self.avx2.float_block(block, scratch, acc);
    }

    fn fold(self, group: Term, sum: &mut [[f32; PANEL]], begin: bool) {
        self.avx2.fold(group, sum, begin);
    }

    fn finish(self, main: Term, tail: Option<Term>, to: Columns) {
        self.avx2.finish(main, tail, to);
    }

    fn store(self, sum: &[[f32; PANEL]], scale: &[f32], to: Columns) {
        self.avx2.store(sum, scale, to);
    }
}

/// Unsafe contract of the functions below: `a` points to rows that lie `stride` apart, as many as `acc` has (or R), and each
/// has as many codes as the chunks have inputs.
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn int_block(block: &IntBlock, w: &[Chunk], scratch: &mut Buffer<Chunk>, acc: &mut [[i32; PANEL]]) {
    let (a, stride) = (block.a.as_ptr(), block.stride);
    // SAFETY: forwarded; a tile's rows start 6 i rows on.
    unsafe {
        match (block.nibbles, block.rows) {
            (true, 1) => return nibbles::<1>(w, block.levels, a, stride, acc),
            (true, 2) => return nibbles::<2>(w, block.levels, a, stride, acc),
            (true, _) => expand(w, block.levels, scratch),
            (false, _) => {}
        }
        let w = if block.nibbles { scratch } else { w };
        for (i, acc) in acc.chunks_mut(6).enumerate() {
            let a = a.add(6 * i * stride);
            match acc.len() {
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

/// Byte chunks.
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn tile<const R: usize>(w: &[Chunk], a: *const u8, stride: usize, acc: &mut [[i32; PANEL]]) {
    let mut sum = [[_mm256_setzero_si256(); 2]; R];
    for (q, chunk) in w.iter().enumerate() {
        let w = load(chunk);
        for r in 0..R {
            // SAFETY: the row has as many quads as there are chunks.
            let x = unsafe { quad(a.add(r * stride + 4 * q)) };
            for h in 0..2 {
                sum[r][h] = _mm256_dpbusd_avx_epi32(sum[r][h], x, w[h]);
            }
        }
    }
    for r in 0..R {
        add_to(&mut acc[r], sum[r]);
    }
}

/// Nibble chunks, unpacked in registers; the two quads of a chunk have sums of their own, which do not wait for each other.
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn nibbles<const R: usize>(
    w: &[Chunk],
    levels: &[i8; 16],
    a: *const u8,
    stride: usize,
    acc: &mut [[i32; PANEL]],
) {
    let table = table(levels);
    let mut sum = [[[_mm256_setzero_si256(); 2]; 2]; R];
    for (j, chunk) in w.iter().enumerate() {
        fetch_ahead(chunk);
        for (q, w) in unpack(chunk, table).into_iter().enumerate() {
            for r in 0..R {
                // SAFETY: the row has two quads for each chunk.
                let x = unsafe { quad(a.add(r * stride + 8 * j + 4 * q)) };
                for h in 0..2 {
                    sum[r][q][h] = _mm256_dpbusd_avx_epi32(sum[r][q][h], x, w[h]);
                }
            }
        }
    }
    for r in 0..R {
        for q in 0..2 {
            add_to(&mut acc[r], sum[r][q]);
        }
    }
}
