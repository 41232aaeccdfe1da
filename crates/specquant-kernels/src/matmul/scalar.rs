//! The scalar kernels: what the others are tested against.

use super::{FloatBlock, IntBlock, Kernel};
use crate::Buffer;
use crate::isa::Scalar;
use crate::weights::{Chunk, PANEL};

impl Kernel for Scalar {
    type Scratch = ();
    type Floats = Scalar;

    fn floats(self) -> Scalar {
        self
    }

    fn int_block(self, block: &IntBlock, (): &mut (), acc: &mut [[i32; PANEL]]) {
        block.clear(acc);
        for (panel, acc) in block.panels().iter().zip(acc.chunks_exact_mut(block.rows)) {
            for_quads(panel, block.nibbles.then_some(block.levels), |q, w| {
                for (t, acc) in acc.iter_mut().enumerate() {
                    let a = &block.a[t * block.stride + 4 * q..][..4];
                    for c in 0..PANEL {
                        for i in 0..4 {
                            acc[c] += i32::from(a[i]) * i32::from(w[c][i]);
                        }
                    }
                }
            });
        }
    }

    fn float_block(self, block: &FloatBlock, _: &mut Buffer<f32>, acc: &mut [[f32; PANEL]]) {
        for_quads(block.w, block.nibbles.then_some(block.levels), |q, w| {
            for (t, acc) in acc.iter_mut().enumerate() {
                for k in 4 * q..block.depth.min(4 * q + 4) {
                    let x = block.x[t * block.stride + k];
                    for c in 0..PANEL {
                        acc[c] = x.mul_add(f32::from(w[c][k % 4]), acc[c]);
                    }
                }
            }
        });
    }
}

/// Calls `f(quad, codes)` for each quad of inputs. levels: what nibbles stand for, if there are any.
fn for_quads(chunks: &[Chunk], levels: Option<&[i8; 16]>, mut f: impl FnMut(usize, &[[i8; 4]; PANEL])) {
    for (j, chunk) in chunks.iter().enumerate() {
        let (quads, _) = chunk.0.as_chunks::<4>();
        let mut quad = |q, code: &dyn Fn(u8) -> i8| {
            let mut w = [[0; 4]; PANEL];
            for c in 0..PANEL {
                w[c] = quads[c].map(code);
            }
            f(q, &w);
        };
        if let Some(levels) = levels {
            quad(2 * j, &|b| levels[usize::from(b & 15)]);
            quad(2 * j + 1, &|b| levels[usize::from(b >> 4)]);
        } else {
            quad(j, &|b| b as i8);
        }
    }
}
