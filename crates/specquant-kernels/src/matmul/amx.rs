//! AMX kernel: `tdpbusd` adds the products of 64 inputs of 16 tokens and 16 channels to 256 sums.
//!
//! 16 byte chunks of a panel, one after the other, are such a tile of weights, and 16 rows of 64 codes one of activations; a tile of sums is 16
//! rows of `acc`. 32 tokens and two panels at a time: four tiles of sums, for which four loads serve four products. Lower and
//! narrower tiles take the rest of the tokens and of the inputs, so that nothing is computed beside what is asked for.
//!
//! Up to 8 tokens, for whom tiles are mostly empty and unpacking to memory costs more than it saves, float products and everything behind the
//! sums use the AVX-512 code. Stable Rust has no intrinsics for tiles yet, hence assembly; in one block, for the compiler knows nothing of their shapes.

use super::avx512::{FEW_ROWS, byte_panels};
use super::{Columns, FloatBlock, Group, IntBlock, Kernel, PANELS};
use crate::Buffer;
use crate::isa::AmxInt8;
use crate::weights::{Chunk, PANEL};
use std::arch::asm;

/// Rows of a tile, and bytes of a row.
const ROWS: usize = 16;
const ROW_BYTES: usize = 64;

impl Kernel for AmxInt8 {
    const INT_PANELS: usize = PANELS;
    const INT_ROWS: usize = 256;
    const INT_TILE_ROWS: usize = 2 * ROWS;

    fn int_block(self, block: &IntBlock, scratch: &mut Buffer<Chunk>, acc: &mut [[i32; PANEL]]) {
        let (rows, panels) = (block.rows, block.panels);
        if rows <= FEW_ROWS {
            return self.avx512.int_block(block, scratch, acc);
        }
        let quads = panels[0].len() * if block.nibbles { 2 } else { 1 };
        assert!(panels.iter().all(|p| p.len() == panels[0].len()) && panels.len() <= PANELS);
        assert!(acc.len() == panels.len() * rows && block.a.len() >= (rows - 1) * block.stride + 4 * quads);
        // SAFETY: the token proves AVX-512 F and BW.
        let bytes = unsafe { byte_panels(block, scratch) };
        let whole = quads / ROWS;
        // What is left of the inputs is one step of shorter tiles.
        for (first, steps, step) in [(0, whole, ROWS), (whole * ROWS, 1, quads % ROWS)] {
            if steps * step == 0 {
                continue;
            }
            let mut row = 0;
            while row < rows {
                let high =
                    if rows - row < 2 * ROWS { rows - row } else { (rows - row) / (2 * ROWS) * 2 * ROWS };
                let at = row * block.stride + 4 * first;
                let work = Work {
                    block,
                    // A second panel that is not there is empty.
                    bytes: bytes.map(|p| p.get(first..).unwrap_or(p)),
                    at,
                    row,
                    high,
                    steps,
                    step,
                };
                // SAFETY: the token proves AMX; rows and inputs lie within the block by the assertions above.
                unsafe {
                    match (high > ROWS, panels.len()) {
                        (true, 2) => work.run::<2, 2>(acc),
                        (true, _) => work.run::<2, 1>(acc),
                        (false, 2) => work.run::<1, 2>(acc),
                        (false, _) => work.run::<1, 1>(acc),
                    }
                }
                row += high;
            }
        }
    }

    fn float_block(self, block: &FloatBlock, scratch: &mut Buffer<f32>, acc: &mut [[f32; PANEL]]) {
        self.avx512.float_block(block, scratch, acc);
    }

    fn fold(self, group: Group, acc: &mut [[i32; PANEL]], sum: &mut [[f32; PANEL]], begin: bool) {
        self.avx512.fold(group, acc, sum, begin);
    }

    fn finish(self, group: Group, acc: &mut [[i32; PANEL]], to: Columns) {
        self.avx512.finish(group, acc, to);
    }

    fn store(self, sum: &[[f32; PANEL]], to: Columns) {
        self.avx512.store(sum, to);
    }
}

/// What `ldtilecfg` reads: rows and bytes a row of each of the eight tiles.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// tiles: rows and bytes a row of each.
    fn new(tiles: [[usize; 2]; 8]) -> Self {
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, [rows, row_bytes]) in tiles.into_iter().enumerate() {
            (config.rows[i], config.row_bytes[i]) = (rows as u8, row_bytes as u16);
        }
        config
    }
}

/// Some rows of a block times some of its inputs.
struct Work<'a> {
    block: &'a IntBlock<'a>,
    /// Of each panel, from the first input on.
    bytes: [&'a [Chunk]; PANELS],
    /// Where the first row's first code is.
    at: usize,
    /// The first row, and how many: up to a pair of tiles, or any number of whole pairs.
    row: usize,
    high: usize,
    /// Tiles of inputs, and the quads of each.
    steps: usize,
    step: usize,
}

impl Work<'_> {
    /// R tiles of rows and P panels at a time.
    ///
    /// # Safety
    /// The machine must have AMX; rows and inputs must lie within the block, and `acc` have as many rows as the block for each panel.
    unsafe fn run<const R: usize, const P: usize>(&self, acc: &mut [[i32; PANEL]]) {
        let mut tiles = [[0; 2]; 8];
        for r in 0..R {
            let rows = ROWS.min(self.high - r * ROWS);
            (0..P).for_each(|p| tiles[2 * r + p] = [rows, ROW_BYTES]);
            tiles[4 + r] = [rows, 4 * self.step];
        }
        (0..P).for_each(|p| tiles[6 + p] = [self.step, ROW_BYTES]);
        let config = Config::new(tiles);
        let last = P - 1;
        // SAFETY: every load and store is of a tile's rows as configured: of codes, of whole chunks, and of sums of `acc`.
        unsafe {
            let a = self.block.a.as_ptr().add(self.at);
            let sums = acc.as_mut_ptr().add(self.row);
            asm!(
                "ldtilecfg [{config}]",
                // Pairs of tiles of rows.
                "2:",
                "tileloadd tmm0, [{sums0} + 1*{line}]",
                ".if {p} == 2",
                "tileloadd tmm1, [{sums1} + 1*{line}]",
                ".endif",
                ".if {r} == 2",
                "tileloadd tmm2, [{sums0} + 1*{line} + 1024]",
                ".if {p} == 2",
                "tileloadd tmm3, [{sums1} + 1*{line} + 1024]",
                ".endif",
                ".endif",
                "mov {left}, {steps}",
                // Steps of inputs.
                "3:",
                "tileloadd tmm6, [{w0} + 1*{line}]",
                "tileloadd tmm4, [{a0} + 1*{stride}]",
                "tdpbusd tmm0, tmm4, tmm6",
                ".if {p} == 2",
                "tileloadd tmm7, [{w1} + 1*{line}]",
                "tdpbusd tmm1, tmm4, tmm7",
                ".endif",
                ".if {r} == 2",
                "tileloadd tmm5, [{a1} + 1*{stride}]",
                "tdpbusd tmm2, tmm5, tmm6",
                ".if {p} == 2",
                "tdpbusd tmm3, tmm5, tmm7",
                ".endif",
                ".endif",
                "add {a0}, 64",
                "add {a1}, 64",
                "add {w0}, 1024",
                "add {w1}, 1024",
                "dec {left}",
                "jnz 3b",
                "tilestored [{sums0} + 1*{line}], tmm0",
                ".if {p} == 2",
                "tilestored [{sums1} + 1*{line}], tmm1",
                ".endif",
                ".if {r} == 2",
                "tilestored [{sums0} + 1*{line} + 1024], tmm2",
                ".if {p} == 2",
                "tilestored [{sums1} + 1*{line} + 1024], tmm3",
                ".endif",
                ".endif",
                // The next pair's rows, and the weights from the beginning.
                "mov {left}, {steps}",
                "shl {left}, 6",
                "sub {a0}, {left}",
                "sub {a1}, {left}",
                "shl {left}, 4",
                "sub {w0}, {left}",
                "sub {w1}, {left}",
                "mov {left}, {stride}",
                "shl {left}, 5",
                "add {a0}, {left}",
                "add {a1}, {left}",
                "add {sums0}, 2048",
                "add {sums1}, 2048",
                "dec {pairs}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &raw const config,
                sums0 = inout(reg) sums => _,
                sums1 = inout(reg) sums.add(last * self.block.rows) => _,
                a0 = inout(reg) a => _,
                a1 = inout(reg) a.wrapping_add(ROWS * self.block.stride) => _,
                w0 = inout(reg) self.bytes[0].as_ptr() => _,
                w1 = inout(reg) self.bytes[last].as_ptr() => _,
                stride = in(reg) self.block.stride,
                line = in(reg) ROW_BYTES,
                steps = in(reg) self.steps,
                pairs = inout(reg) self.high.div_ceil(R * ROWS) => _,
                left = out(reg) _,
                r = const R,
                p = const P,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// Products of tiles and nothing else, for the machine's limit; returns the operations.
pub(crate) fn tile_loop(_: AmxInt8, rounds: usize) -> f64 {
    let config = Config::new([[ROWS, ROW_BYTES]; 8]);
    // SAFETY: the token proves AMX; memory is read for the configuration only.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "2:",
            "tdpbusd tmm0, tmm4, tmm6",
            "tdpbusd tmm1, tmm4, tmm7",
            "tdpbusd tmm2, tmm5, tmm6",
            "tdpbusd tmm3, tmm5, tmm7",
            "dec {left}",
            "jnz 2b",
            "tilerelease",
            config = in(reg) &raw const config,
            left = inout(reg) rounds.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
    (rounds * 4 * ROWS * PANEL * ROW_BYTES * 2) as f64
}
