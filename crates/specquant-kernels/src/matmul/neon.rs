//! NEON kernel: `sdot` multiplies a quarter of a chunk, a quad of inputs of 4 channels, with a token's quad and adds to 4 i32 lanes.
//!
//! It takes signed bytes. Activation codes up to 127 are that as they stand; larger ones are taken less 128, and 128 times the sum of the weights
//! is added. Float products use the portable code.

use super::{FloatBlock, IntBlock, Kernel};
use crate::Buffer;
use crate::isa::{NeonDot, Scalar};
use crate::weights::{Chunk, PANEL};
use std::arch::aarch64::*;
use std::arch::asm;

/// Tokens of a tile: 24 sums, four registers of weights and one of codes.
const TILE: usize = 6;

impl Kernel for NeonDot {
    type Scratch = Buffer<Chunk>;
    type Floats = Scalar;

    fn floats(self) -> Scalar {
        Scalar
    }

    fn int_block(self, block: &IntBlock, scratch: &mut Buffer<Chunk>, acc: &mut [[i32; PANEL]]) {
        block.clear(acc);
        let (rows, stride) = (block.rows, block.stride);
        for (panel, acc) in block.panels().iter().zip(acc.chunks_exact_mut(rows)) {
            let depth = panel.len() * if block.nibbles { 8 } else { 4 };
            assert!(rows > 0 && acc.len() == rows && block.a.len() >= (rows - 1) * stride + depth);
            // SAFETY: the token proves the dot products; every token has the codes that the chunks ask for.
            unsafe { int_block(block, panel, scratch, acc) }
        }
    }

    fn float_block(self, block: &FloatBlock, scratch: &mut Buffer<f32>, acc: &mut [[f32; PANEL]]) {
        Scalar.float_block(block, scratch, acc);
    }
}

/// acc + Σ of four products a · w in each of 4 lanes. (The intrinsic is not stable.)
#[target_feature(enable = "neon,dotprod")]
fn dot(mut acc: int32x4_t, a: int8x16_t, w: int8x16_t) -> int32x4_t {
    // SAFETY: registers in, one register out.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {a:v}.16b, {w:v}.16b",
            acc = inout(vreg) acc, a = in(vreg) a, w = in(vreg) w,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

#[target_feature(enable = "neon")]
fn load(chunk: &Chunk) -> [int8x16_t; 4] {
    // SAFETY: a chunk is 64 bytes.
    [0, 16, 32, 48].map(|at| unsafe { vld1q_s8(chunk.0.as_ptr().add(at).cast()) })
}

/// Nibble chunks to byte chunks.
#[target_feature(enable = "neon")]
fn expand(w: &[Chunk], levels: &[i8; 16], bytes: &mut Buffer<Chunk>) {
    bytes.resize(2 * w.len());
    // SAFETY: 16 bytes from an array of 16; a chunk is 64 bytes.
    unsafe {
        let table = vld1q_s8(levels.as_ptr());
        for (chunk, [low, high]) in w.iter().zip(bytes.as_chunks_mut::<2>().0) {
            for (i, v) in load(chunk).into_iter().enumerate() {
                let v = vreinterpretq_u8_s8(v);
                vst1q_s8(
                    low.0.as_mut_ptr().add(16 * i).cast(),
                    vqtbl1q_s8(table, vandq_u8(v, vdupq_n_u8(15))),
                );
                vst1q_s8(high.0.as_mut_ptr().add(16 * i).cast(), vqtbl1q_s8(table, vshrq_n_u8::<4>(v)));
            }
        }
    }
}

/// # Safety
/// Every row of the block must have as many codes as the chunks have inputs.
#[target_feature(enable = "neon,dotprod")]
unsafe fn int_block(block: &IntBlock, w: &[Chunk], scratch: &mut Buffer<Chunk>, acc: &mut [[i32; PANEL]]) {
    let w = if block.nibbles {
        expand(w, block.levels, scratch);
        scratch
    } else {
        w
    };
    let (a, stride) = (block.a.as_ptr(), block.stride);
    let flip = if block.a_max > i32::from(i8::MAX) { 0x80 } else { 0 };
    for (i, acc) in acc.chunks_mut(TILE).enumerate() {
        // SAFETY: forwarded; the tile's rows start TILE i rows on.
        unsafe {
            let a = a.add(TILE * i * stride);
            match acc.len() {
                TILE => tile::<TILE>(w, a, stride, flip, acc),
                5 => tile::<5>(w, a, stride, flip, acc),
                4 => tile::<4>(w, a, stride, flip, acc),
                3 => tile::<3>(w, a, stride, flip, acc),
                2 => tile::<2>(w, a, stride, flip, acc),
                _ => tile::<1>(w, a, stride, flip, acc),
            }
        }
    }
    if flip != 0 {
        let mut sums = [vdupq_n_s32(0); 4];
        for chunk in w {
            for (sum, w) in sums.iter_mut().zip(load(chunk)) {
                *sum = dot(*sum, vdupq_n_s8(1), w);
            }
        }
        let sums = sums.map(|sum| vshlq_n_s32::<7>(sum));
        acc.iter_mut().for_each(|acc| add_to(acc, sums));
    }
}

#[target_feature(enable = "neon")]
fn add_to(acc: &mut [i32; PANEL], v: [int32x4_t; 4]) {
    for (quarter, v) in acc.as_chunks_mut::<4>().0.iter_mut().zip(v) {
        // SAFETY: 4 lanes from and to an array of 4.
        unsafe { vst1q_s32(quarter.as_mut_ptr(), vaddq_s32(vld1q_s32(quarter.as_ptr()), v)) };
    }
}

/// Byte chunks times R tokens, whose codes are taken with the bits of `flip` turned.
///
/// # Safety
/// `a` must point to R rows, `stride` apart, of as many codes as the chunks have inputs.
#[target_feature(enable = "neon,dotprod")]
unsafe fn tile<const R: usize>(w: &[Chunk], a: *const u8, stride: usize, flip: u8, acc: &mut [[i32; PANEL]]) {
    let flip = vdupq_n_u8(flip);
    let mut sum = [[vdupq_n_s32(0); 4]; R];
    for (q, chunk) in w.iter().enumerate() {
        let w = load(chunk);
        for r in 0..R {
            // SAFETY: the row has as many quads as there are chunks.
            let x = unsafe { a.add(r * stride + 4 * q).cast::<u32>().read_unaligned() };
            let x = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_u32(vdupq_n_u32(x)), flip));
            for i in 0..4 {
                sum[r][i] = dot(sum[r][i], x, w[i]);
            }
        }
    }
    for r in 0..R {
        add_to(&mut acc[r], sum[r]);
    }
}

/// `rounds` times 16 dot products that stay in registers; returns their operations.
pub(crate) fn dot_loop(_: NeonDot, rounds: usize) -> f64 {
    #[target_feature(enable = "neon,dotprod")]
    fn run(rounds: usize) -> f64 {
        let (a, w) = (vdupq_n_s8(std::hint::black_box(3)), vdupq_n_s8(std::hint::black_box(-5)));
        let mut acc = [vdupq_n_s32(std::hint::black_box(3)); 16];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = dot(*v, a, w);
            }
        }
        std::hint::black_box(acc);
        (rounds * 16 * 16 * 2) as f64
    }
    // SAFETY: the token proves the dot products.
    unsafe { run(rounds) }
}
