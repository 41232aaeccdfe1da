//! Products of activations with quantized weights: 4-bit and 8-bit integer, and float activations.
//!
//! Asymmetric activation codes are unsigned and weight codes are signed, which is what `vpdpbusd` and `vpmaddubsw` take, so
//! that neither needs an offset. The integer product of a whole group (the whole depth, with one scale per channel) is exact in
//! an i32, and the zero points leave it in one go:
//!
//! ```text
//! y[t, n] = scale[t] · Σ_g scale[n, g] · (Σ_{k in g} a[t, k] · w[n, k] − zero[t] · Σ_{k in g} w[n, k])
//! ```
//!
//! This file cuts the product into rectangles of `y`, which threads share, and blocks of depth that fit a cache; an
//! instruction set's file ([`scalar`], `avx2`, `avxvnni`, `avx512`, `amx`, `neon`) multiplies one block. The cuts depend on the shape and the
//! instruction set and every float sum has a fixed order, so that results depend neither on the number of threads nor, for integer products,
//! on the instruction set; nor does a token's result depend on the other tokens.

mod branch;
mod finish;
mod grid;
mod scalar;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) use amx::tile_loop;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::dot_loop;

use crate::isa::with_every_token;
use crate::packed_dense::Tile;
use crate::parallel::for_each_index;
use crate::weights::{Chunk, PANEL};
use crate::{Buffer, Isa, PackedWeights, QuantizedActs};
use branch::add_to_panels;
pub use branch::{BranchCoeffs, BranchPart, add_branch};
use finish::{Columns, Term, finish, fold, store};
use grid::{Grid, Rect, blocks, panels};
use std::ops::Range;

/// Tokens of a rectangle at most: what the unpacking of a block of weights is shared by. A multiple of the rows of every tile.
const ROWS: usize = 96;
/// Rows of the tallest tile.
const TILE_ROWS: usize = 12;
/// Panels that an instruction set may take side by side.
const PANELS: usize = 2;
/// Inputs of a block: unpacked, 32 channels take 24 kB.
const INT_DEPTH: usize = 768;
/// Blocks of a group lie multiples of what AMX takes at once apart.
const INT_STEP: usize = 64;
/// Inputs of a block: 16 channels of widened weights take 8 kB.
const FLOAT_DEPTH: usize = 128;

/// An integer product, or the sum of some for an input in parts of different widths, and where it goes.
pub struct IntProduct<'a> {
    /// Quantized activations and weights.
    pub parts: &'a [(&'a QuantizedActs, &'a PackedWeights)],
    /// What is added to it in floating point.
    pub branch: Option<BranchPart<'a>>,
    /// `[rows, out]`, overwritten.
    pub y: &'a mut [f32],
}

/// Integer product: quantized activations times quantized weights.
///
/// `y`: `[a.rows, out]`, overwritten.
///
/// # Panics
/// As [`matmul_int_all`].
pub fn matmul_int(a: &QuantizedActs, w: &PackedWeights, y: &mut [f32]) {
    matmul_int_all([IntProduct { parts: &[(a, w)], branch: None, y }]);
}

/// Several integer products, whose work threads share as if they were one.
///
/// # Panics
/// If the input widths of a part differ, a product's parts and its branch differ in rows or outputs, or a buffer has the wrong length.
pub fn matmul_int_all<const N: usize>(products: [IntProduct; N]) {
    matmul_int_with(Isa::active(), products);
}

/// [`matmul_int_all`] on a given instruction set, for tests.
#[doc(hidden)]
pub fn matmul_int_with<const N: usize>(isa: Isa, products: [IntProduct; N]) {
    with_every_token!(isa, kernel => int_products(kernel, products));
}

fn int_products<K: Kernel, const N: usize>(kernel: K, products: [IntProduct; N]) {
    let grids = products.map(|IntProduct { parts, branch, y }| {
        let (rows, out) = parts.first().map_or((0, 0), |(a, w)| (a.rows, w.out_features()));
        for (a, w) in parts {
            let inp = w.in_features();
            assert_eq!(a.cols, inp, "activations have {} columns, the weights {inp} inputs", a.cols);
            assert!(a.stride >= inp.next_multiple_of(8), "stride of the activations");
            assert_eq!(a.codes.len(), a.rows * a.stride, "codes of the activations");
            assert!(a.scale.len() == a.rows && a.zero.len() == a.rows, "scales of the activations");
            assert!(a.rows == rows && w.out_features() == out, "parts of one product");
        }
        if let Some(branch) = &branch {
            branch.check(rows, out);
        }
        let inp = parts.iter().map(|(_, w)| w.in_features()).sum();
        (parts, branch, Grid::new(y, [rows, out, inp], K::int_rows(inp), K::INT_ROW_STEP))
    });
    for_each_index(grids.iter().map(|(.., grid)| grid.len()).sum(), |mut i| {
        for (parts, branch, grid) in &grids {
            if i < grid.len() {
                // SAFETY: every rectangle is taken once.
                return int_rect(kernel, parts, *branch, unsafe { grid.rect(i) });
            }
            i -= grid.len();
        }
    });
}

/// Product of float activations with quantized weights, whose codes are widened to f32 (for 16-bit activations).
///
/// `x`: `[rows, in]`; `y`: `[rows, out]`, overwritten. Scales are applied to the sum of a group.
///
/// # Panics
/// If `x` or `y` has the wrong length.
pub fn matmul_float(x: &[f32], rows: usize, w: &PackedWeights, y: &mut [f32]) {
    matmul_float_with(Isa::active(), x, rows, w, y, false);
}

/// Adds the product of [`matmul_float`] to `y`.
///
/// # Panics
/// As [`matmul_float`].
pub fn add_matmul_float(x: &[f32], rows: usize, w: &PackedWeights, y: &mut [f32]) {
    matmul_float_with(Isa::active(), x, rows, w, y, true);
}

/// [`matmul_float`] on a given instruction set, for tests.
#[doc(hidden)]
pub fn matmul_float_with(
    isa: Isa,
    x: &[f32],
    rows: usize,
    w: &PackedWeights,
    y: &mut [f32],
    accumulate: bool,
) {
    let (out, inp) = (w.out_features(), w.in_features());
    assert_eq!(x.len(), rows * inp, "x must be [rows, in]");
    assert_eq!(y.len(), rows * out, "y must be [rows, out]");
    let grid = Grid::new(y, [rows, out, inp], ROWS, TILE_ROWS);
    with_every_token!(isa, kernel => for_each_index(grid.len(), |i| {
        // SAFETY: every rectangle is taken once.
        float_rect(kernel, x, w, unsafe { grid.rect(i) }, accumulate);
    }));
}

/// Name of the kernel that multiplies these bit widths, `{isa}-{operands}-{variant}`: `avx2-u4s4-i16acc`. More than 8
/// activation bits mean [`matmul_float`]. levels: whether 4-bit codes are looked up among levels of up to 8 bits.
pub fn kernel_name(act_bits: u8, weight_bits: u8, levels: bool) -> String {
    let isa = Isa::active();
    let variant = if act_bits > 8 {
        return format!("{}-f32s{weight_bits}-fma", isa.vectors().name());
    } else if levels && weight_bits == 4 {
        "levels"
    } else if isa == Isa::Avx2 && i16_steps(code_max(act_bits), weight_max(weight_bits)) > 0 {
        "i16acc"
    } else {
        "i32acc"
    };
    format!("{}-u{act_bits}s{weight_bits}-{variant}", isa.name())
}

/// Largest activation code.
fn code_max(bits: u8) -> i32 {
    (1 << bits) - 1
}

/// Largest magnitude of a weight code.
fn weight_max(bits: u8) -> i32 {
    1 << (bits - 1)
}

/// How many sums of two products an i16 takes for certain.
fn i16_steps(a_max: i32, w_max: i32) -> usize {
    (i32::from(i16::MAX) / (2 * a_max * w_max)) as usize
}

/// One instruction set's multiplication of a block. `acc` and `sum` have a row of 16 channels per token of the block, the tokens of one
/// panel after those of another.
trait Kernel: Copy + Send + Sync {
    /// Panels that [`int_block`](Self::int_block) likes to have side by side, at most [`PANELS`].
    const INT_PANELS: usize = 1;
    /// What the tokens of a rectangle of an integer product are a multiple of.
    const INT_ROW_STEP: usize = TILE_ROWS;
    /// Tokens of a rectangle whose sums are finished together, so that they are still in the first cache.
    const INT_STRIP: usize = ROWS;
    /// What [`int_block`](Self::int_block) has for itself, from one to the next of a rectangle.
    type Scratch: Default;
    /// What multiplies floats beside it.
    type Floats: Tile;
    fn floats(self) -> Self::Floats;
    /// Inputs of a block of an integer product of so many tokens at most.
    fn int_depth(rows: usize) -> usize {
        let _ = rows;
        INT_DEPTH
    }
    /// Tokens of a rectangle of an integer product of so many inputs at most.
    fn int_rows(inp: usize) -> usize {
        let _ = inp;
        ROWS
    }
    /// Makes the block what [`int_block`](Self::int_block) likes to have for every strip; `bytes` may hold its panels.
    fn unpack<'a>(self, block: &mut IntBlock<'a>, bytes: &'a mut Buffer<Chunk>) {
        let _ = (block, bytes);
    }
    /// Adds the block's integer products to `acc`, or begins with them.
    fn int_block(self, block: &IntBlock, scratch: &mut Self::Scratch, acc: &mut [[i32; PANEL]]);
    /// Adds the block's float products to `acc`, inputs in ascending order.
    fn float_block(self, block: &FloatBlock, scratch: &mut Buffer<f32>, acc: &mut [[f32; PANEL]]);
    /// Adds a group's product, or begins with it.
    fn fold(self, group: Term, sum: &mut [[f32; PANEL]], begin: bool) {
        fold(group, sum, begin);
    }
    /// Writes the products of parts of one group times the tokens' scales, first the one's and to it the other's.
    fn finish(self, main: Term, tail: Option<Term>, to: Columns) {
        finish(main, tail, to);
    }
    /// Writes a panel's sums times the tokens' scales.
    fn store(self, sum: &[[f32; PANEL]], scale: &[f32], to: Columns) {
        store(sum, scale, to);
    }
}

/// Some inputs of some tokens times the weights of a panel or two.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // the scalar sums are wide
struct IntBlock<'a> {
    /// Codes of the first token from the block's first input on, then every `stride` the next token's.
    a: &'a [u8],
    stride: usize,
    rows: usize,
    /// Whole chunks of every panel, as many of each; their depth is a multiple of 8, and every token has as many codes, which may be the next token's
    /// where zeros fill them up. Only the first `count` are there.
    panels: [&'a [Chunk]; PANELS],
    count: usize,
    /// Whether sums begin with this block.
    begin: bool,
    nibbles: bool,
    /// What nibbles stand for.
    levels: &'a [i8; 16],
    /// Largest activation code and largest magnitude of a weight code: what decides when a narrow sum could overflow.
    a_max: i32,
    w_max: i32,
}

/// Some inputs of some tokens times one panel's weights.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
struct FloatBlock<'a> {
    /// Values of the first token from the block's first input on, then every `stride` the next token's.
    x: &'a [f32],
    stride: usize,
    rows: usize,
    /// Inputs; the chunks' depth is this, rounded up to a multiple of 8.
    depth: usize,
    w: &'a [Chunk],
    nibbles: bool,
    /// What nibbles stand for.
    levels: &'a [i8; 16],
}

impl<'a> IntBlock<'a> {
    /// Some inputs of a group, of `rows` tokens from `row` on, and of some panels.
    #[inline(always)]
    fn new(
        (a, w): &Part<'a>,
        panels: &Range<usize>,
        group: usize,
        inputs: Range<usize>,
        row: usize,
        rows: usize,
    ) -> Self {
        let chunks =
            |i| if i < panels.len() { w.chunks(panels.start + i, inputs.start, inputs.end) } else { &[] };
        IntBlock {
            a: &a.codes[row * a.stride + inputs.start..],
            stride: a.stride,
            rows,
            panels: std::array::from_fn(chunks),
            count: panels.len(),
            begin: inputs.start == group * w.group_size(),
            nibbles: w.nibbles(),
            levels: w.levels(),
            a_max: code_max(a.bits),
            w_max: w.largest(),
        }
    }

    /// The panels that are there.
    #[inline(always)]
    fn panels(&self) -> &[&'a [Chunk]] {
        &self.panels[..self.count]
    }

    /// Clears the sums if they begin here, for a kernel that adds.
    #[inline(always)]
    fn clear(&self, acc: &mut [[i32; PANEL]]) {
        if self.begin {
            acc.fill([0; PANEL]);
        }
    }

    /// Inputs, a multiple of what a chunk has.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn depth(&self) -> usize {
        self.panels[0].len() * if self.nibbles { 8 } else { 4 }
    }

    /// Has the same weights for some of the tokens, whose codes are all in `a`. Nothing is copied: what has just been written in small pieces takes long to read
    /// in larger ones.
    #[inline(always)]
    fn take(&mut self, a: &'a [u8], rows: &Range<usize>) {
        self.a = &a[rows.start * self.stride..];
        self.rows = rows.len();
    }
}

/// A part of a product: activations and weights.
type Part<'a> = (&'a QuantizedActs, &'a PackedWeights);

fn int_rect<K: Kernel>(kernel: K, parts: &[Part], branch: Option<BranchPart>, mut rect: Rect) {
    let (row, rows, depth) = (rect.row, rect.rows, K::int_depth(rect.rows));
    let strips = || (0..rows).step_by(K::INT_STRIP).map(|at| at..(at + K::INT_STRIP).min(rows));
    // Sums of a strip's tokens and one panel, then of the same tokens and the next panel. One block's strip takes the place of the one before.
    let (mut acc, mut tail_acc, mut sums) = (Buffer::default(), Buffer::default(), Buffer::default());
    let (mut bytes, mut tail_bytes, mut scratch) =
        (Buffer::default(), Buffer::default(), K::Scratch::default());
    for (col, range) in panels(&rect, K::INT_PANELS) {
        let count = range.len();
        let mut rest = parts;
        while let [part @ (a, w), others @ ..] = rest {
            // A second part of one block is multiplied behind the last block of the first, and finished together with that.
            let one_block = |w: &PackedWeights| w.group_size() <= depth;
            let accumulate = rest.len() < parts.len();
            let joins =
                |w: &PackedWeights, t: &PackedWeights| w.groups() == 1 && t.groups() == 1 && one_block(t);
            let tail = others.first().filter(|(_, t)| !accumulate && joins(w, t));
            rest = &others[usize::from(tail.is_some())..];
            let mut tail =
                tail.map(|part| (part, IntBlock::new(part, &range, 0, 0..part.1.in_features(), row, rows)));
            if let Some((_, block)) = &mut tail {
                kernel.unpack(block, &mut tail_bytes);
            }
            let tail_a = tail.as_ref().map_or(&[][..], |(_, block)| block.a);

            let height = if one_block(w) { K::INT_STRIP.min(rows) } else { rows };
            acc.resize(count * height * PANEL);
            let acc = acc.as_chunks_mut::<PANEL>().0;
            if tail.is_some() {
                tail_acc.resize(count * K::INT_STRIP.min(rows) * PANEL);
            }
            let tail_acc = tail_acc.as_chunks_mut::<PANEL>().0;
            if w.groups() > 1 {
                sums.resize(count * rows * PANEL);
            }
            let sums = sums.as_chunks_mut::<PANEL>().0;
            for g in 0..w.groups() {
                for (k, end) in blocks(g * w.group_size(), w.group_size(), depth, INT_STEP) {
                    let mut block = IntBlock::new(part, &range, g, k..end, row, rows);
                    kernel.unpack(&mut block, &mut bytes);
                    let a = block.a;
                    for strip in strips() {
                        let n = strip.len();
                        let first = if one_block(w) { 0 } else { count * strip.start };
                        let acc = &mut acc[first..][..count * n];
                        if end == w.in_features() {
                            rect.fetch(strip.clone(), col..col + count * PANEL);
                        }
                        block.take(a, &strip);
                        kernel.int_block(&block, &mut scratch, acc);
                        if end < (g + 1) * w.group_size() {
                            continue;
                        }
                        if w.groups() > 1 {
                            let sums = sums[count * strip.start..].chunks_exact_mut(n);
                            for ((acc, sums), panel) in acc.chunks_exact(n).zip(sums).zip(range.clone()) {
                                kernel.fold(Term::new(part, panel, g, row, &strip, acc), sums, g == 0);
                            }
                            continue;
                        }
                        if let Some((_, block)) = &mut tail {
                            block.take(tail_a, &strip);
                            kernel.int_block(block, &mut scratch, &mut tail_acc[..count * n]);
                        }
                        for (j, panel) in range.clone().enumerate() {
                            let main = Term::new(part, panel, 0, row, &strip, &acc[j * n..][..n]);
                            let tail = tail.as_ref().map(|(part, _)| {
                                Term::new(part, panel, 0, row, &strip, &tail_acc[j * n..][..n])
                            });
                            let (row, col) = (strip.start, col + j * PANEL);
                            kernel.finish(main, tail, Columns { rect: &mut rect, row, col, accumulate });
                        }
                    }
                }
            }
            if w.groups() > 1 {
                for strip in strips() {
                    let sums = sums[count * strip.start..count * strip.end].chunks_exact(strip.len());
                    for (j, sums) in sums.enumerate() {
                        let (row, col) = (strip.start, col + j * PANEL);
                        let scale = &a.scale[rect.row..][strip.clone()];
                        kernel.store(sums, scale, Columns { rect: &mut rect, row, col, accumulate });
                    }
                }
            }
        }
        if let Some(branch) = branch {
            add_to_panels(kernel.floats(), branch, &mut rect, col, range);
        }
    }
}

fn float_rect(kernel: impl Kernel, x: &[f32], w: &PackedWeights, mut rect: Rect, accumulate: bool) {
    let (row, rows, stride) = (rect.row, rect.rows, w.in_features());
    let mut scratch = Buffer::default();
    let (mut acc, mut sums) = ([[0.; PANEL]; ROWS], [[0.; PANEL]; ROWS]);
    let (acc, sums) = (&mut acc[..rows], &mut sums[..rows]);
    for (col, panel) in panels(&rect, 1) {
        sums.fill([0.; PANEL]);
        for g in 0..w.groups() {
            let (scale, _) = w.scales(panel.start, g);
            for (k, end) in blocks(g * w.group_size(), w.group_size(), FLOAT_DEPTH, 8) {
                let block = FloatBlock {
                    x: &x[row * stride + k..(row + rows) * stride],
                    stride,
                    rows,
                    depth: end - k,
                    w: w.chunks(panel.start, k, end),
                    nibbles: w.nibbles(),
                    levels: w.levels(),
                };
                // Blocks sum on their own first: the error grows with a block's depth, not with the whole one.
                acc.fill([0.; PANEL]);
                kernel.float_block(&block, &mut scratch, acc);
                for (sum, acc) in sums.iter_mut().zip(&*acc) {
                    for c in 0..PANEL {
                        sum[c] += scale[c] * acc[c];
                    }
                }
            }
        }
        kernel.store(sums, &[1.; ROWS][..rows], Columns { rect: &mut rect, row: 0, col, accumulate });
    }
}

#[cfg(test)]
mod tests;
