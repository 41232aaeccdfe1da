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
//! This file cuts the product into rectangles of `y`, which threads share, and blocks of depth that fit the first cache; an
//! instruction set's file ([`scalar`], `avx2`, `avxvnni`, `avx512`, `amx`, `neon`) multiplies one block. The cuts depend on the shape and the
//! instruction set and every float sum has a fixed order, so that results depend neither on the number of threads nor, for integer products,
//! on the instruction set; nor does a token's result depend on the other tokens.

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
use crate::parallel::for_each_index;
use crate::weights::{Chunk, PANEL};
use crate::{Buffer, Isa, PackedWeights, QuantizedActs};
use grid::{Grid, Rect, blocks, panels};
use std::ops::Range;

/// Tokens of a rectangle at most: what the unpacking of a block of weights is shared by. A multiple of the rows of every tile.
const ROWS: usize = 96;
/// Rows of the tallest tile.
const TILE_ROWS: usize = 12;
/// Panels that an instruction set may take side by side.
const PANELS: usize = 2;
/// Inputs of a block: unpacked, 32 channels take 24 kB. Blocks of a group lie multiples of what AMX takes at once apart.
const INT_DEPTH: usize = 768;
const INT_STEP: usize = 64;
/// Inputs of a block: 16 channels of widened weights take 8 kB.
const FLOAT_DEPTH: usize = 128;

/// An integer product, or the sum of some for an input in parts of different widths, and where it goes.
pub struct IntProduct<'a> {
    /// Quantized activations and weights.
    pub parts: &'a [(&'a QuantizedActs, &'a PackedWeights)],
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
    matmul_int_all([IntProduct { parts: &[(a, w)], y }]);
}

/// Several integer products, whose work threads share as if they were one.
///
/// # Panics
/// If the input widths of a part differ, a product's parts differ in rows or outputs, or a buffer has the wrong length.
pub fn matmul_int_all<const N: usize>(products: [IntProduct; N]) {
    matmul_int_with(Isa::active(), products);
}

/// [`matmul_int_all`] on a given instruction set, for tests.
#[doc(hidden)]
pub fn matmul_int_with<const N: usize>(isa: Isa, products: [IntProduct; N]) {
    with_every_token!(isa, kernel => int_products(kernel, products));
}

fn int_products<K: Kernel, const N: usize>(kernel: K, products: [IntProduct; N]) {
    let grids = products.map(|IntProduct { parts, y }| {
        let (rows, out) = parts.first().map_or((0, 0), |(a, w)| (a.rows, w.out_features()));
        for (a, w) in parts {
            let inp = w.in_features();
            assert_eq!(a.cols, inp, "activations have {} columns, the weights {inp} inputs", a.cols);
            assert!(a.stride >= inp.next_multiple_of(8), "stride of the activations");
            assert_eq!(a.codes.len(), a.rows * a.stride, "codes of the activations");
            assert!(a.scale.len() == a.rows && a.zero.len() == a.rows, "scales of the activations");
            assert!(a.rows == rows && w.out_features() == out, "parts of one product");
        }
        let inp = parts.iter().map(|(_, w)| w.in_features()).sum();
        (parts, Grid::new(y, [rows, out, inp], K::INT_ROWS, K::INT_TILE_ROWS))
    });
    for_each_index(grids.iter().map(|(_, grid)| grid.len()).sum(), |mut i| {
        for (parts, grid) in &grids {
            if i < grid.len() {
                // SAFETY: every rectangle is taken once.
                return int_rect(kernel, parts, unsafe { grid.rect(i) });
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
    /// Tokens of a rectangle of an integer product at most, and of the tallest tile.
    const INT_ROWS: usize = ROWS;
    const INT_TILE_ROWS: usize = TILE_ROWS;
    /// Tokens of a rectangle whose sums are finished together, so that they are still in the first cache.
    const INT_STRIP: usize = ROWS;
    /// What [`int_block`](Self::int_block) has for itself, from one to the next of a rectangle.
    type Scratch: Default;
    /// The block as [`int_block`](Self::int_block) likes to have it for every strip; `bytes` may hold its panels.
    fn unpacked<'a>(self, block: IntBlock<'a>, bytes: &'a mut Buffer<Chunk>) -> IntBlock<'a> {
        let _ = bytes;
        block
    }
    /// Adds the block's integer products to `acc`.
    fn int_block(self, block: &IntBlock, scratch: &mut Self::Scratch, acc: &mut [[i32; PANEL]]);
    /// Adds the block's float products to `acc`, inputs in ascending order.
    fn float_block(self, block: &FloatBlock, scratch: &mut Buffer<f32>, acc: &mut [[f32; PANEL]]);
    /// Adds a panel's group to the sum, which is `sum += scale · (acc − zero · colsum)`, or begins the sum with it; and clears `acc`.
    fn fold(self, group: Group, acc: &mut [[i32; PANEL]], sum: &mut [[f32; PANEL]], begin: bool) {
        fold(group, acc, sum, begin);
    }
    /// [`fold`](Self::fold) and [`store`](Self::store) of a product of one group, in one pass.
    fn finish(self, group: Group, acc: &mut [[i32; PANEL]], to: Columns) {
        finish(group, acc, to);
    }
    /// Writes a panel's sums times the tokens' scales.
    fn store(self, sum: &[[f32; PANEL]], to: Columns) {
        store(sum, to);
    }
}

/// What the sums of a panel's group are scaled with.
#[derive(Clone, Copy)]
struct Group<'a> {
    /// Of the channels.
    scale: &'a [f32; PANEL],
    /// Sums of the channels' codes.
    colsum: &'a [i32; PANEL],
    /// Zero points of the tokens.
    zero: &'a [i32],
}

/// Where a panel's sums of some tokens go: the columns of a rectangle from `col` on; those that it does not have are dropped.
struct Columns<'a, 'y> {
    rect: &'a mut Rect<'y>,
    /// Of the first token.
    row: usize,
    col: usize,
    /// Of the tokens.
    scale: &'a [f32],
    /// Whether they are added to what is there.
    accumulate: bool,
}

/// Some inputs of some tokens times the weights of a panel or two.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // the scalar sums are wide
struct IntBlock<'a> {
    /// Codes of the first token from the block's first input on, then every `stride` the next token's.
    a: &'a [u8],
    stride: usize,
    rows: usize,
    /// Whole chunks of every panel, as many of each; their depth is a multiple of 8, and every token has as many codes. Only the first `count` are there.
    panels: [&'a [Chunk]; PANELS],
    count: usize,
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
    /// The panels that are there.
    #[inline(always)]
    fn panels(&self) -> &[&'a [Chunk]] {
        &self.panels[..self.count]
    }

    /// The same weights times some of the tokens.
    #[inline(always)]
    fn of(&self, rows: &Range<usize>) -> IntBlock<'a> {
        IntBlock { a: &self.a[rows.start * self.stride..], rows: rows.len(), ..*self }
    }
}

fn int_rect<K: Kernel>(kernel: K, parts: &[(&QuantizedActs, &PackedWeights)], mut rect: Rect) {
    let (row, rows) = (rect.row, rect.rows);
    let strips = || (0..rows).step_by(K::INT_STRIP).map(|at| at..(at + K::INT_STRIP).min(rows));
    // Sums of a strip's tokens and one panel, then of the same tokens and the next panel. One block's strip takes the place of the one before.
    let (mut acc, mut sums) = (Buffer::default(), Buffer::default());
    let (mut bytes, mut scratch) = (Buffer::default(), K::Scratch::default());
    for (col, range) in panels(&rect, K::INT_PANELS) {
        let count = range.len();
        for (i, (a, w)) in parts.iter().enumerate() {
            let group = |panel, g, rows: Range<usize>| {
                let (scale, colsum) = w.group(panel, g);
                Group { scale, colsum, zero: &a.zero[row..][rows] }
            };
            let one_block = w.group_size() <= INT_DEPTH;
            let height = if one_block { K::INT_STRIP.min(rows) } else { rows };
            if acc.len() < count * height * PANEL {
                acc = Buffer::zeros(count * height * PANEL);
            }
            let acc = acc.as_chunks_mut::<PANEL>().0;
            if w.groups() > 1 {
                sums.resize(count * rows * PANEL);
            }
            let sums = sums.as_chunks_mut::<PANEL>().0;
            for g in 0..w.groups() {
                for (k, end) in blocks(g * w.group_size(), w.group_size(), INT_DEPTH, INT_STEP) {
                    let mut panels = [&[][..]; PANELS];
                    panels.iter_mut().zip(range.clone()).for_each(|(to, p)| *to = w.chunks(p, k, end));
                    let block = IntBlock {
                        a: &a.codes[row * a.stride + k..],
                        stride: a.stride,
                        rows,
                        panels,
                        count,
                        nibbles: w.nibbles(),
                        levels: w.levels(),
                        a_max: code_max(a.bits),
                        w_max: w.largest(),
                    };
                    let block = kernel.unpacked(block, &mut bytes);
                    for strip in strips() {
                        let first = if one_block { 0 } else { count * strip.start };
                        let acc = &mut acc[first..][..count * strip.len()];
                        kernel.int_block(&block.of(&strip), &mut scratch, acc);
                        if end < (g + 1) * w.group_size() {
                            continue;
                        }
                        let each = acc.chunks_exact_mut(strip.len()).zip(range.clone()).enumerate();
                        for (j, (acc, panel)) in each {
                            let group = group(panel, g, strip.clone());
                            if w.groups() > 1 {
                                let at = count * strip.start + j * strip.len();
                                kernel.fold(group, acc, &mut sums[at..][..strip.len()], g == 0);
                            } else {
                                kernel.finish(group, acc, columns(&mut rect, a, &strip, col + j * PANEL, i));
                            }
                        }
                    }
                }
            }
            if w.groups() > 1 {
                for strip in strips() {
                    let sums = sums[count * strip.start..count * strip.end].chunks_exact(strip.len());
                    for (j, sums) in sums.enumerate() {
                        kernel.store(sums, columns(&mut rect, a, &strip, col + j * PANEL, i));
                    }
                }
            }
        }
    }
}

/// Where the sums of a strip of tokens of a rectangle and of one panel go; behind the first part of a product they are added.
#[inline(always)]
fn columns<'a, 'y>(
    rect: &'a mut Rect<'y>,
    a: &'a QuantizedActs,
    strip: &Range<usize>,
    col: usize,
    part: usize,
) -> Columns<'a, 'y> {
    let scale = &a.scale[rect.row..][strip.clone()];
    Columns { rect, row: strip.start, col, scale, accumulate: part > 0 }
}

fn float_rect(kernel: impl Kernel, x: &[f32], w: &PackedWeights, mut rect: Rect, accumulate: bool) {
    let (row, rows, stride) = (rect.row, rect.rows, w.in_features());
    let mut scratch = Buffer::default();
    let (mut acc, mut sums) = ([[0.; PANEL]; ROWS], [[0.; PANEL]; ROWS]);
    let (acc, sums) = (&mut acc[..rows], &mut sums[..rows]);
    for (col, panel) in panels(&rect, 1) {
        sums.fill([0.; PANEL]);
        for g in 0..w.groups() {
            let (scale, _) = w.group(panel.start, g);
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
        kernel.store(sums, Columns { rect: &mut rect, row: 0, col, scale: &[1.; ROWS][..rows], accumulate });
    }
}

#[inline(always)]
fn fold(group: Group, acc: &mut [[i32; PANEL]], sum: &mut [[f32; PANEL]], begin: bool) {
    for ((acc, sum), &zero) in acc.iter_mut().zip(sum).zip(group.zero) {
        let product = product(acc, zero, &group);
        for c in 0..PANEL {
            sum[c] = if begin { product[c] } else { sum[c] + product[c] };
        }
    }
}

#[inline(always)]
fn finish(group: Group, acc: &mut [[i32; PANEL]], to: Columns) {
    let Columns { rect, row, col, scale, accumulate } = to;
    for (i, ((acc, &zero), scale)) in acc.iter_mut().zip(group.zero).zip(scale).enumerate() {
        store_row(&product(acc, zero, &group), *scale, &mut rect.row_mut(row + i)[col..], accumulate);
    }
}

#[inline(always)]
fn store(sum: &[[f32; PANEL]], to: Columns) {
    let Columns { rect, row, col, scale, accumulate } = to;
    for (i, (sum, scale)) in sum.iter().zip(scale).enumerate() {
        store_row(sum, *scale, &mut rect.row_mut(row + i)[col..], accumulate);
    }
}

/// One token's sums of a group, scaled; acc is cleared.
#[inline(always)]
fn product(acc: &mut [i32; PANEL], zero: i32, group: &Group) -> [f32; PANEL] {
    let mut product = [0.; PANEL];
    for c in 0..PANEL {
        product[c] = group.scale[c] * (acc[c] - zero * group.colsum[c]) as f32;
        acc[c] = 0;
    }
    product
}

#[inline(always)]
fn store_row(sum: &[f32; PANEL], scale: f32, y: &mut [f32], accumulate: bool) {
    // In an array of its own first: what may overlap with y is computed one channel after the other.
    let mut row = [0.; PANEL];
    for c in 0..PANEL {
        row[c] = scale * sum[c];
    }
    let width = y.len().min(PANEL);
    if accumulate {
        match y.first_chunk::<PANEL>() {
            Some(y) => (0..PANEL).for_each(|c| row[c] += y[c]),
            None => (0..width).for_each(|c| row[c] += y[c]),
        }
    }
    match y.first_chunk_mut() {
        Some(y) => *y = row,
        None => y[..width].copy_from_slice(&row[..width]),
    }
}

#[cfg(test)]
mod tests;
