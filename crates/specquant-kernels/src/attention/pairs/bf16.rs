//! Pairs of bfloat16, multiplied by AMX's tiles: a number is the sum of two of them, 16 bits of mantissa, which are multiplied one after the other. Sums are those of
//! f32, in another order.

use super::{Pairs, Rows, paired};
use crate::Buffer;
use crate::isa::AmxInt8;
use crate::tiles::{ROWS, STRIP, Tiles};
use std::arch::asm;

/// Rows as sums of two, in whole strips.
pub(super) struct Halves {
    high: Buffer<Pairs>,
    low: Buffer<Pairs>,
    /// [`Pairs`] of a row.
    steps: usize,
}

/// This thread's tiles while they are whole.
pub(super) struct Shaped(#[allow(dead_code)] Tiles); // what they are given up by

impl Shaped {
    pub(super) fn new(token: AmxInt8) -> Self {
        let mut tiles = Tiles::default();
        tiles.shape(token, STRIP, ROWS);
        Shaped(tiles)
    }
}

impl Rows for Halves {
    type Proof = Shaped;

    fn new(rows: usize, width: usize) -> Self {
        let steps = width / STRIP;
        let [high, low] = [(); 2].map(|()| Buffer::zeros(rows.next_multiple_of(STRIP) * steps));
        Halves { high, low, steps }
    }

    fn level(level: i8) -> u16 {
        (f32::from(level).to_bits() >> 16) as u16
    }

    fn narrow(&mut self, width: usize) {
        self.steps = width / STRIP;
    }

    #[inline(always)]
    fn set(&mut self, _: &Shaped, row: usize, x: &[f32], apart: usize) {
        let row = row * self.steps..(row + 1) * self.steps;
        let to = self.high[row.clone()].iter_mut().zip(&mut self.low[row]);
        for ((high, low), (first, second)) in to.zip(x.chunks_exact(2 * apart).flat_map(paired)) {
            for i in 0..ROWS {
                let (a, b) = (first[i].to_bits(), second[i].to_bits());
                // What is cut off is exact in f32, and rounded to 8 bits itself.
                let rest = |x: f32, bits: u32| {
                    (x - f32::from_bits(bits & 0xffff_0000)).to_bits().wrapping_add(0x8000)
                };
                high.0[i] = a >> 16 | b & 0xffff_0000;
                low.0[i] = rest(first[i], a) >> 16 | rest(second[i], b) & 0xffff_0000;
            }
        }
    }

    fn multiply(&self, _: &Shaped, first: usize, columns: &[Pairs], y: &mut [f32], pitch: usize) {
        let rows = [&self.high, &self.low].map(|half| &half[first * self.steps..][..STRIP * self.steps]);
        // SAFETY: the tiles have their shape.
        unsafe { product(rows, columns, y, pitch) }
    }
}

/// A strip of 32 columns of y, whose rows lie `pitch` apart: the product of a strip's rows, both halves, and two groups of 16 columns,
/// which lie one after the other.
///
/// # Safety
/// The machine must have AMX, and its tiles be whole.
unsafe fn product([high, low]: [&[Pairs]; 2], columns: &[Pairs], y: &mut [f32], pitch: usize) {
    let steps = high.len() / STRIP;
    let group = columns.len() / 2;
    assert!(steps > 0 && low.len() == high.len() && steps * ROWS <= group);
    assert!(high.len() == STRIP * steps && y.len() >= (STRIP - 1) * pitch + STRIP);
    let second = ROWS * steps;
    // SAFETY: tiles of rows are 16 rows of `steps` pairs; those of columns `steps` times 16 pairs; y has 32 rows of 32 columns.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm6, [{c0} + 1*{line}]",
            "tileloadd tmm4, [{h0} + 1*{row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{c1} + 1*{line}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{h1} + 1*{row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{l0} + 1*{row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{l1} + 1*{row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {h0}, 64",
            "add {h1}, 64",
            "add {l0}, 64",
            "add {l1}, 64",
            "add {c0}, 1024",
            "add {c1}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{y0} + 1*{pitch}], tmm0",
            "tilestored [{y0} + 1*{pitch} + 64], tmm1",
            "tilestored [{y1} + 1*{pitch}], tmm2",
            "tilestored [{y1} + 1*{pitch} + 64], tmm3",
            h0 = inout(reg) high.as_ptr() => _,
            h1 = inout(reg) high.as_ptr().add(second) => _,
            l0 = inout(reg) low.as_ptr() => _,
            l1 = inout(reg) low.as_ptr().add(second) => _,
            c0 = inout(reg) columns.as_ptr() => _,
            c1 = inout(reg) columns.as_ptr().add(group) => _,
            row = in(reg) steps * size_of::<Pairs>(),
            line = in(reg) size_of::<Pairs>(),
            steps = inout(reg) steps => _,
            y0 = in(reg) y.as_mut_ptr(),
            y1 = in(reg) y.as_mut_ptr().add(ROWS * pitch),
            pitch = in(reg) pitch * size_of::<f32>(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
