//! AMX kernel: `tdpbusd` adds the products of 64 inputs of 16 tokens and 16 channels to 256 sums.
//!
//! 16 byte chunks of a panel, one after the other, are such a tile of weights, and 16 rows of 64 codes one of activations; a tile of sums is 16
//! rows of `acc`. A strip is 32 tokens and two panels: four tiles of sums, for which four loads serve four products. Lower tiles
//! take the rest of the tokens; the rest of the inputs is filled up with zeros, or takes narrower tiles where tokens have no codes to multiply them with.
//!
//! Up to 8 tokens, for whom tiles are mostly empty and unpacking to memory costs more than it saves, float products and everything behind the
//! sums use the AVX-512 code. Stable Rust has no intrinsics for tiles yet, hence assembly; in one block, for the compiler knows nothing of their shapes.

use super::avx512::expand;
use super::{Columns, FloatBlock, INT_DEPTH, IntBlock, Kernel, PANELS, Term};
use crate::Buffer;
use crate::isa::{AmxInt8, Avx512Vnni};
use crate::tiles::{ROW_BYTES, ROWS, STRIP, Tiles};
use crate::weights::{Chunk, PANEL};
use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Up to as many tokens use the AVX-512 code.
const FEW_ROWS: usize = 8;
/// Inputs of a block for many tokens: unpacked, 32 channels take half a megabyte.
const DEEP: usize = 1 << 14;
/// A core's L2 where the processor does not tell.
const L2: usize = 2 << 20;

/// Bytes of codes of a rectangle's tokens: seven tenths of a core's L2, in which weights lie beside them: 128 tokens of 11008 inputs, 352 of 4096, in 2 MiB.
fn row_codes() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| 7 * l2_bytes().unwrap_or(L2) / 10)
}

/// Size of a core's L2, from leaf 4 of `cpuid`, which lists the caches (Intel's manual, volume 2A).
fn l2_bytes() -> Option<usize> {
    let field = |register: u32, low: u32, bits: u32| (register >> low & ((1 << bits) - 1)) as usize;
    // SAFETY: every processor with AMX has leaf 4; Rust asks for the word until 1.90.
    #[allow(unused_unsafe)]
    let cache = |i| unsafe { __cpuid_count(4, i) };
    let caches = (0..8).map(cache).take_while(|cache| field(cache.eax, 0, 5) != 0);
    let l2 = caches.filter(|cache| field(cache.eax, 5, 3) == 2).last()?;
    let [line, partitions, ways] =
        [(0, 12), (12, 10), (22, 10)].map(|(low, bits)| field(l2.ebx, low, bits) + 1);
    Some(ways * partitions * line * (l2.ecx as usize + 1))
}

impl Kernel for AmxInt8 {
    const INT_PANELS: usize = PANELS;
    const INT_ROW_STEP: usize = STRIP;
    const INT_STRIP: usize = STRIP;

    type Scratch = Tiles;
    type Floats = Avx512Vnni;

    /// Few tokens multiply weights as they come to the first cache. For many, blocks that fit it take longer: their sums are stored and loaded again.
    fn int_depth(rows: usize) -> usize {
        if rows <= STRIP { INT_DEPTH } else { DEEP }
    }

    /// As many as stay in a core's L2 beside the weights while every panel is multiplied with them.
    fn int_rows(inp: usize) -> usize {
        (row_codes() / inp.max(1) / STRIP * STRIP).clamp(3 * STRIP, 16 * STRIP)
    }

    /// In bytes; zeros fill up whole tiles, if every token has codes to multiply them with.
    fn unpack<'a>(self, block: &mut IntBlock<'a>, bytes: &'a mut Buffer<Chunk>) {
        let depth = block.depth();
        let there = block.a.len() >= (block.rows - 1) * block.stride + depth.next_multiple_of(ROW_BYTES);
        let quads = depth / 4;
        let filled = if there { quads.next_multiple_of(ROWS) } else { quads };
        if block.rows <= FEW_ROWS || !block.nibbles && filled == quads {
            return;
        }
        bytes.resize(block.count * filled);
        for (panel, bytes) in block.panels[..block.count].iter_mut().zip(bytes.chunks_exact_mut(filled)) {
            if block.nibbles {
                // SAFETY: the token proves AVX-512 F and BW.
                unsafe { expand(panel, block.levels, bytes) };
            } else {
                bytes[..quads].copy_from_slice(panel);
            }
            bytes[quads..].fill(Chunk([0; 64]));
            *panel = bytes;
        }
        block.nibbles = false;
    }

    fn floats(self) -> Avx512Vnni {
        self.avx512
    }

    fn int_block(self, block: &IntBlock, tiles: &mut Tiles, acc: &mut [[i32; PANEL]]) {
        let (rows, panels) = (block.rows, block.panels());
        if rows <= FEW_ROWS {
            return self.avx512.int_block(block, &mut Buffer::default(), acc);
        }
        let quads = panels[0].len();
        assert!(rows <= STRIP && !block.nibbles);
        assert!(panels.iter().all(|p| p.len() == quads) && panels.len() <= PANELS);
        assert!(acc.len() == panels.len() * rows && block.a.len() >= (rows - 1) * block.stride + 4 * quads);
        let whole = quads / ROWS;
        // What is left of the inputs is one step of shorter tiles.
        for work in [
            Work { block, first: 0, steps: whole, step: ROWS, begin: block.begin },
            Work {
                block,
                first: whole * ROWS,
                steps: 1,
                step: quads % ROWS,
                begin: block.begin && whole == 0,
            },
        ] {
            if work.steps * work.step == 0 {
                continue;
            }
            tiles.shape(self, rows, work.step);
            // SAFETY: the tiles have their shape; rows and inputs lie within the block by the assertions above.
            unsafe {
                match (rows > ROWS, panels.len()) {
                    (true, 2) => work.run::<2, 2>(acc),
                    (true, _) => work.run::<2, 1>(acc),
                    (false, 2) => work.run::<1, 2>(acc),
                    (false, _) => work.run::<1, 1>(acc),
                }
            }
        }
    }

    fn float_block(self, block: &FloatBlock, scratch: &mut Buffer<f32>, acc: &mut [[f32; PANEL]]) {
        self.avx512.float_block(block, scratch, acc);
    }

    fn fold(self, group: Term, sum: &mut [[f32; PANEL]], begin: bool) {
        self.avx512.fold(group, sum, begin);
    }

    fn finish(self, main: Term, tail: Option<Term>, to: Columns) {
        self.avx512.finish(main, tail, to);
    }

    fn store(self, sum: &[[f32; PANEL]], scale: &[f32], to: Columns) {
        self.avx512.store(sum, scale, to);
    }
}

/// A strip's block times some of its inputs.
struct Work<'a> {
    block: &'a IntBlock<'a>,
    /// The first quad of inputs.
    first: usize,
    /// Tiles of inputs, and the quads of each.
    steps: usize,
    step: usize,
    /// Whether sums begin with these inputs.
    begin: bool,
}

impl Work<'_> {
    /// R tiles of rows and P panels.
    ///
    /// # Safety
    /// Tiles must have the shape of the block's rows and of `step`; rows and inputs must lie within the block, and `acc` have as many rows as the block for each panel.
    unsafe fn run<const R: usize, const P: usize>(&self, acc: &mut [[i32; PANEL]]) {
        let rows = self.block.rows;
        let last = P - 1;
        // SAFETY: every load and store is of a tile's rows as configured: of codes, of whole chunks, and of sums of `acc`.
        unsafe {
            let a = self.block.a.as_ptr().add(4 * self.first);
            let sums = acc.as_mut_ptr();
            asm!(
                "test {begin:e}, {begin:e}",
                "jz 3f",
                "tilezero tmm0",
                ".if {p} == 2",
                "tilezero tmm1",
                ".endif",
                ".if {r} == 2",
                "tilezero tmm2",
                ".if {p} == 2",
                "tilezero tmm3",
                ".endif",
                ".endif",
                "jmp 2f",
                "3:",
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
                // Steps of inputs.
                "2:",
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
                "dec {steps}",
                "jnz 2b",
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
                sums0 = in(reg) sums,
                sums1 = in(reg) sums.add(last * rows),
                a0 = inout(reg) a => _,
                a1 = inout(reg) a.wrapping_add(ROWS * self.block.stride) => _,
                w0 = inout(reg) self.block.panels[0].as_ptr().add(self.first) => _,
                w1 = inout(reg) self.block.panels[last].as_ptr().add(self.first) => _,
                stride = in(reg) self.block.stride,
                line = in(reg) ROW_BYTES,
                steps = inout(reg) self.steps => _,
                begin = in(reg) u32::from(self.begin),
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
pub(crate) fn tile_loop(token: AmxInt8, rounds: usize) -> f64 {
    let mut tiles = Tiles::default();
    tiles.shape(token, STRIP, ROWS);
    // SAFETY: the token proves AMX; memory is not read.
    unsafe {
        asm!(
            "2:",
            "tdpbusd tmm0, tmm4, tmm6",
            "tdpbusd tmm1, tmm4, tmm7",
            "tdpbusd tmm2, tmm5, tmm6",
            "tdpbusd tmm3, tmm5, tmm7",
            "dec {left}",
            "jnz 2b",
            left = inout(reg) rounds.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
    (rounds * 4 * ROWS * PANEL * ROW_BYTES * 2) as f64
}
