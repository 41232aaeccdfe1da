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
//! instruction set's file ([`scalar`], `avx2`, `avx512`) multiplies one block. The cuts depend on the shape alone and every
//! float sum has a fixed order, so that results depend neither on the number of threads nor, for integer products, on the
//! instruction set; nor does a token's result depend on the other tokens.

mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::isa::with_token;
use crate::parallel::{Shared, for_each_index};
use crate::weights::{Chunk, PANEL};
use crate::{Isa, PackedWeights, QuantizedActs};
use std::marker::PhantomData;
use std::ops::Range;

/// Tokens of a rectangle at most: what the unpacking of a block of weights is shared by. A multiple of the rows of every tile.
const ROWS: usize = 96;
/// Rows of the tallest tile.
const TILE_ROWS: usize = 12;
/// Panels that an instruction set may take side by side.
const PANELS: usize = 2;
/// Rows for which sums are kept in a small place: clearing a large one takes as long as such a product.
const FEW_ROWS: usize = 8;
/// Multiply-accumulates that a rectangle has at least, if the product has them: below, sharing costs more than it saves.
const GRAIN: usize = 1 << 17;
/// Inputs of a block: unpacked, 32 channels take 24 kB.
const INT_DEPTH: usize = 768;
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
        (parts, Grid::new(y, rows, out, inp))
    });
    with_token!(isa, kernel => for_each_index(grids.iter().map(|(_, grid)| grid.len()).sum(), |mut i| {
        for (parts, grid) in &grids {
            if i < grid.len() {
                // SAFETY: every rectangle is taken once.
                return int_rect(kernel, parts, unsafe { grid.rect(i) });
            }
            i -= grid.len();
        }
    }));
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
    let grid = Grid::new(y, rows, out, inp);
    with_token!(isa, kernel => for_each_index(grid.len(), |i| {
        // SAFETY: every rectangle is taken once.
        float_rect(kernel, x, w, unsafe { grid.rect(i) }, accumulate);
    }));
}

/// Name of the kernel that multiplies these bit widths, `{isa}-{operands}-{variant}`: `avx2-u4s4-i16acc`. More than 8
/// activation bits mean [`matmul_float`]. levels: whether 4-bit codes are looked up among levels of up to 8 bits.
pub fn kernel_name(act_bits: u8, weight_bits: u8, levels: bool) -> String {
    let isa = Isa::active();
    let variant = if act_bits > 8 {
        return format!("{}-f32s{weight_bits}-fma", isa.name());
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
    /// Adds the block's integer products to `acc`.
    fn int_block(self, block: &IntBlock, scratch: &mut Vec<Chunk>, acc: &mut [[i32; PANEL]]);
    /// Adds the block's float products to `acc`, inputs in ascending order.
    fn float_block(self, block: &FloatBlock, scratch: &mut Vec<f32>, acc: &mut [[f32; PANEL]]);
    /// Adds a panel's group to the sum, which is `sum += scale · (acc − zero · colsum)`, or begins the sum with it; and clears `acc`.
    fn fold(
        self,
        group: (&[f32; PANEL], &[i32; PANEL]),
        zero: &[i32],
        acc: &mut [[i32; PANEL]],
        sum: &mut [[f32; PANEL]],
        begin: bool,
    ) {
        fold(group, zero, acc, sum, begin);
    }
    /// Writes a panel's sums times the tokens' scales to the columns from `col` on, or adds them; columns that y does not have are
    /// dropped.
    fn store(self, sum: &[[f32; PANEL]], scale: &[f32], y: &mut Rect, col: usize, accumulate: bool) {
        store(sum, scale, y, col, accumulate);
    }
}

/// Some inputs of some tokens times the weights of a panel or two.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // the scalar sums are wide
struct IntBlock<'a> {
    /// Codes of the first token from the block's first input on, then every `stride` the next token's.
    a: &'a [u8],
    stride: usize,
    rows: usize,
    /// Whole chunks of every panel, as many of each; their depth is a multiple of 8, and every token has as many codes.
    panels: &'a [&'a [Chunk]],
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

/// A rectangle of y: some columns of some rows, which one task writes.
struct Rect<'a> {
    row: usize,
    col: usize,
    rows: usize,
    width: usize,
    /// Its first value; rows lie `stride` apart.
    start: *mut f32,
    stride: usize,
    y: PhantomData<&'a mut [f32]>,
}

impl Rect<'_> {
    /// Row i of the rectangle.
    #[inline(always)]
    fn row_mut(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows);
        // SAFETY: within y, and nobody else's by the contract of `Grid::rect`.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(i * self.stride), self.width) }
    }
}

/// How y `[rows, out]` is cut into rectangles, which start at multiples of [`PANEL`] columns.
struct Grid<'a> {
    rows: usize,
    out: usize,
    /// Of a rectangle.
    high: usize,
    wide: usize,
    /// Rectangles.
    down: usize,
    across: usize,
    start: Shared<f32>,
    y: PhantomData<&'a mut [f32]>,
}

impl<'a> Grid<'a> {
    /// inp: depth of the product.
    fn new(y: &'a mut [f32], rows: usize, out: usize, inp: usize) -> Self {
        assert_eq!(y.len(), rows * out, "y must be [rows, out]");
        let (start, empty) = (Shared(y.as_mut_ptr()), y.is_empty());
        if empty {
            return Grid { rows, out, high: 1, wide: 1, down: 0, across: 0, start, y: PhantomData };
        }
        let high = rows.div_ceil(rows.div_ceil(ROWS)).next_multiple_of(TILE_ROWS);
        let least = GRAIN / (high.min(rows) * inp);
        let across = (out / least.max(PANELS * PANEL)).max(1);
        let wide = out.div_ceil(across).next_multiple_of(PANELS * PANEL);
        let (down, across) = (rows.div_ceil(high), out.div_ceil(wide));
        Grid { rows, out, high, wide, down, across, start, y: PhantomData }
    }

    /// Rectangles.
    fn len(&self) -> usize {
        self.down * self.across
    }

    /// # Safety
    /// i < [`Grid::len`], and no rectangle may be there twice at a time.
    unsafe fn rect(&self, i: usize) -> Rect<'a> {
        let (row, col) = (i / self.across * self.high, i % self.across * self.wide);
        let (rows, width) = (self.high.min(self.rows - row), self.wide.min(self.out - col));
        // SAFETY: row < rows and col < out.
        let start = unsafe { self.start.get().add(row * self.out + col) };
        Rect { row, col, rows, width, start, stride: self.out, y: PhantomData }
    }
}

/// The blocks of a group: (start, end), of `depth` inputs at most, evenly, starting at multiples of 8.
fn blocks(start: usize, size: usize, depth: usize) -> impl Iterator<Item = (usize, usize)> {
    let even = size.div_ceil(size.div_ceil(depth)).next_multiple_of(8);
    (start..start + size).step_by(even).map(move |k| (k, (k + even).min(start + size)))
}

/// The panels of a rectangle, up to `step` at a time: (column within the rectangle, panels).
fn panels(rect: &Rect, step: usize) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
    let (first, end) = (rect.col / PANEL, rect.col / PANEL + rect.width.div_ceil(PANEL));
    (first..end).step_by(step).map(move |p| ((p - first) * PANEL, p..end.min(p + step)))
}

fn int_rect<K: Kernel>(kernel: K, parts: &[(&QuantizedActs, &PackedWeights)], rect: Rect) {
    if rect.rows <= FEW_ROWS {
        const N: usize = PANELS * FEW_ROWS;
        int_panels(kernel, parts, rect, &mut [[0; PANEL]; N], &mut [[0.; PANEL]; N]);
    } else {
        const N: usize = PANELS * ROWS;
        int_panels(kernel, parts, rect, &mut [[0; PANEL]; N], &mut [[0.; PANEL]; N]);
    }
}

/// acc: zeros; sums: anything; of every panel that is side by side with others, a row for each of the rectangle's.
fn int_panels<K: Kernel>(
    kernel: K,
    parts: &[(&QuantizedActs, &PackedWeights)],
    mut rect: Rect,
    acc: &mut [[i32; PANEL]],
    sums: &mut [[f32; PANEL]],
) {
    let (row, rows) = (rect.row, rect.rows);
    let mut scratch = Vec::new();
    for (col, range) in panels(&rect, K::INT_PANELS) {
        let (acc, sums) = (&mut acc[..range.len() * rows], &mut sums[..range.len() * rows]);
        for (i, (a, w)) in parts.iter().enumerate() {
            let zero = &a.zero[row..][..rows];
            for g in 0..w.groups() {
                for (k, end) in blocks(g * w.group_size(), w.group_size(), INT_DEPTH) {
                    let mut chunks = [&[][..]; PANELS];
                    chunks.iter_mut().zip(range.clone()).for_each(|(to, p)| *to = w.chunks(p, k, end));
                    let block = IntBlock {
                        a: &a.codes[row * a.stride + k..(row + rows) * a.stride],
                        stride: a.stride,
                        rows,
                        panels: &chunks[..range.len()],
                        nibbles: w.nibbles(),
                        levels: w.levels(),
                        a_max: code_max(a.bits),
                        w_max: w.largest(),
                    };
                    kernel.int_block(&block, &mut scratch, acc);
                }
                let each = acc.chunks_exact_mut(rows).zip(sums.chunks_exact_mut(rows)).zip(range.clone());
                each.for_each(|((acc, sum), panel)| kernel.fold(w.group(panel, g), zero, acc, sum, g == 0));
            }
            for (j, sum) in sums.chunks_exact(rows).enumerate() {
                kernel.store(sum, &a.scale[row..][..rows], &mut rect, col + j * PANEL, i > 0);
            }
        }
    }
}

fn float_rect(kernel: impl Kernel, x: &[f32], w: &PackedWeights, mut rect: Rect, accumulate: bool) {
    let (row, rows, stride) = (rect.row, rect.rows, w.in_features());
    let mut scratch = Vec::new();
    let (mut acc, mut sums) = ([[0.; PANEL]; ROWS], [[0.; PANEL]; ROWS]);
    let (acc, sums) = (&mut acc[..rows], &mut sums[..rows]);
    for (col, panel) in panels(&rect, 1) {
        sums.fill([0.; PANEL]);
        for g in 0..w.groups() {
            let (scale, _) = w.group(panel.start, g);
            for (k, end) in blocks(g * w.group_size(), w.group_size(), FLOAT_DEPTH) {
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
        kernel.store(sums, &[1.; ROWS][..rows], &mut rect, col, accumulate);
    }
}

#[inline(always)]
fn fold(
    (scale, colsum): (&[f32; PANEL], &[i32; PANEL]),
    zero: &[i32],
    acc: &mut [[i32; PANEL]],
    sum: &mut [[f32; PANEL]],
    begin: bool,
) {
    for ((acc, sum), &zero) in acc.iter_mut().zip(sum).zip(zero) {
        for c in 0..PANEL {
            let product = scale[c] * (acc[c] - zero * colsum[c]) as f32;
            sum[c] = if begin { product } else { sum[c] + product };
            acc[c] = 0;
        }
    }
}

#[inline(always)]
fn store(sum: &[[f32; PANEL]], scale: &[f32], y: &mut Rect, col: usize, accumulate: bool) {
    for (i, (sum, scale)) in sum.iter().zip(scale).enumerate() {
        let y = &mut y.row_mut(i)[col..];
        let width = y.len().min(PANEL);
        // A whole panel has a length that the compiler knows.
        match y.first_chunk_mut::<PANEL>() {
            Some(y) if accumulate => (0..PANEL).for_each(|c| y[c] += scale * sum[c]),
            Some(y) => (0..PANEL).for_each(|c| y[c] = scale * sum[c]),
            None if accumulate => (0..width).for_each(|c| y[c] += scale * sum[c]),
            None => (0..width).for_each(|c| y[c] = scale * sum[c]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A small generator: the same numbers for the same seed.
    struct Lcg(u64);

    impl Lcg {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            self.0 >> 33
        }
        fn below(&mut self, n: u64) -> u64 {
            self.next() % n
        }
        fn float(&mut self) -> f32 {
            self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.
        }
    }

    fn random_weights(rng: &mut Lcg, out: usize, inp: usize, bits: u8, group: usize) -> PackedWeights {
        let half = 1 << (bits - 1);
        let codes: Vec<i8> =
            (0..out * inp).map(|_| (rng.below(2 * half) as i64 - half as i64) as i8).collect();
        let scales: Vec<f32> =
            (0..out * (inp / group)).map(|_| 0.01 + rng.below(1000) as f32 / 1e4).collect();
        PackedWeights::pack(&codes, &scales, out, inp, bits, group).unwrap()
    }

    fn random_acts(rng: &mut Lcg, rows: usize, inp: usize, bits: u8) -> QuantizedActs {
        let x: Vec<f32> = (0..rows * inp).map(|_| rng.float() + 0.3).collect();
        crate::quantize_acts(&x, rows, inp, bits, 0.9)
    }

    /// x [rows, in] times w [out, in], in f64; with the sums of magnitudes, which errors are relative to.
    fn naive(x: &[f32], w: &[f32], rows: usize, out: usize, inp: usize) -> Vec<(f64, f64)> {
        let dot = |t: usize, n: usize| {
            let products = (0..inp).map(|k| f64::from(x[t * inp + k]) * f64::from(w[n * inp + k]));
            products.fold((0., 0.), |(sum, size), p| (sum + p, size + p.abs()))
        };
        (0..rows * out).map(|i| dot(i / out, i % out)).collect()
    }

    fn assert_close(y: &[f32], want: &[(f64, f64)], what: &str) {
        for (i, (y, (want, size))) in y.iter().zip(want).enumerate() {
            assert!((f64::from(*y) - want).abs() <= 1e-5 * size, "{what}: {y} for {want} at {i}");
        }
    }

    /// Every instruction set: integer products bit-equal to the scalar ones, all near the naive product of the dequantized.
    fn check_all(a: &QuantizedActs, w: &PackedWeights) {
        let (rows, out, inp) = (a.rows, w.out_features(), w.in_features());
        let (x, dense) = (a.dequantize(), w.dequantize());
        let want = naive(&x, &dense, rows, out, inp);
        let mut scalar = vec![f32::NAN; rows * out];
        matmul_int_with(Isa::Scalar, [IntProduct { parts: &[(a, w)], y: &mut scalar }]);
        for isa in Isa::available() {
            let what = format!(
                "{} u{}s{} {rows}x{inp}x{out} group {}",
                isa.name(),
                a.bits,
                w.bits(),
                w.group_size()
            );
            let mut y = vec![f32::NAN; rows * out];
            matmul_int_with(isa, [IntProduct { parts: &[(a, w)], y: &mut y }]);
            assert!(y.iter().zip(&scalar).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}");
            assert_close(&y, &want, &what);
            // Two of them are exactly twice as much.
            matmul_int_with(isa, [IntProduct { parts: &[(a, w), (a, w)], y: &mut y }]);
            assert!(y.iter().zip(&scalar).all(|(a, b)| *a == 2.0 * b), "{what}");
            y.fill(f32::NAN);
            matmul_float_with(isa, &x, rows, w, &mut y, false);
            assert_close(&y, &want, &what);
            let once = y.clone();
            matmul_float_with(isa, &x, rows, w, &mut y, true);
            assert!(y.iter().zip(&once).all(|(a, b)| *a == 2.0 * b), "{what}");
        }
    }

    #[test]
    fn widths_of_models() {
        let mut rng = Lcg(1);
        for (inp, out) in [(1, 17), (7, 16), (9, 5), (63, 33), (576, 40), (1536, 19), (4096, 18), (11008, 17)]
        {
            for rows in [1, 2, 3, 5, 17] {
                for (act_bits, bits) in [(4, 4), (8, 4), (8, 8)] {
                    let w = random_weights(&mut rng, out, inp, bits, inp);
                    check_all(&random_acts(&mut rng, rows, inp, act_bits), &w);
                }
            }
        }
        let w = random_weights(&mut rng, 48, 128, 4, 32);
        check_all(&random_acts(&mut rng, 150, 128, 4), &w);
    }

    #[test]
    fn levels_are_looked_up() {
        let mut rng = Lcg(2);
        let shapes = [(7, 16, 7), (576, 40, 576), (128, 48, 32), (4096, 18, 4096)];
        // Miri is ten thousand times slower.
        for (inp, out, group) in shapes.into_iter().take(if cfg!(miri) { 1 } else { 4 }) {
            let codes: Vec<i8> =
                (0..out * inp).map(|_| crate::GAUSSIAN_LEVELS[rng.below(16) as usize]).collect();
            let scales = vec![0.02; out * inp / group];
            let w = PackedWeights::pack_levels(&codes, &scales, out, inp, group, &crate::GAUSSIAN_LEVELS);
            let w = w.unwrap();
            assert_eq!(w.unpack(), codes);
            for rows in [1, 3, 5, 17] {
                let x: Vec<f32> = (0..rows * inp).map(|_| rng.float()).collect();
                check_all(&crate::quantize_acts_gaussian(&x, rows, inp, 0.9), &w);
                check_all(&random_acts(&mut rng, rows, inp, 4), &w);
                check_all(&random_acts(&mut rng, rows, inp, 8), &w);
            }
        }
        assert_eq!(i16_steps(126, 127), 1);
    }

    #[test]
    fn extreme_codes_do_not_overflow() {
        let (inp, out) = (4096, 17);
        for bits in 2..=8u8 {
            let half = 1i32 << (bits - 1);
            for code in [-half, half - 1] {
                let w =
                    PackedWeights::pack(&vec![code as i8; out * inp], &vec![1.; out], out, inp, bits, inp)
                        .unwrap();
                for act_bits in 2..=8 {
                    for rows in [1, 3, 6] {
                        let top = code_max(act_bits);
                        let a = QuantizedActs {
                            rows,
                            cols: inp,
                            stride: inp,
                            bits: act_bits,
                            codes: vec![top as u8; rows * inp],
                            scale: vec![1.; rows],
                            zero: vec![0; rows],
                        };
                        for isa in Isa::available() {
                            let mut y = vec![0.; rows * out];
                            matmul_int_with(isa, [IntProduct { parts: &[(&a, &w)], y: &mut y }]);
                            let want = (top * code * inp as i32) as f32;
                            assert!(
                                y.iter().all(|&y| y == want),
                                "{isa:?} u{act_bits}s{bits}: {} {want}",
                                y[0]
                            );
                        }
                    }
                }
            }
        }
        assert_eq!((i16_steps(15, 8), i16_steps(255, 8), i16_steps(255, 128)), (136, 8, 0));
    }

    #[test]
    fn results_depend_neither_on_threads_nor_on_other_tokens() {
        let mut rng = Lcg(3);
        let (rows, inp, out) = (70, 600, 500);
        let w = random_weights(&mut rng, out, inp, 4, 40);
        let a = random_acts(&mut rng, rows, inp, 4);
        let x = a.dequantize();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (mut y, mut z) = (vec![0.; rows * out], vec![0.; rows * out]);
            pool.install(|| {
                matmul_int(&a, &w, &mut y);
                matmul_float(&x, rows, &w, &mut z);
            });
            (y, z)
        };
        let (y, z) = run(1);
        assert_eq!((&y, &z), (&run(2).0, &run(2).1));
        let mut last = vec![0.; out];
        matmul_float(&x[(rows - 1) * inp..], 1, &w, &mut last);
        assert_eq!(last, z[(rows - 1) * out..]);
    }

    #[test]
    fn empty_products() {
        let w = PackedWeights::pack(&[], &[], 0, 8, 4, 8).unwrap();
        matmul_int(&random_acts(&mut Lcg(4), 2, 8, 4), &w, &mut []);
        let w = random_weights(&mut Lcg(5), 3, 8, 4, 8);
        matmul_int(&crate::quantize_acts(&[], 0, 8, 4, 1.), &w, &mut []);
        matmul_float(&[], 0, &w, &mut []);
    }

    #[test]
    #[should_panic(expected = "activations have 16 columns, the weights 8 inputs")]
    fn wrong_width() {
        let w = random_weights(&mut Lcg(5), 3, 8, 4, 8);
        matmul_int(&random_acts(&mut Lcg(4), 2, 16, 4), &w, &mut [0.; 6]);
    }

    #[test]
    fn names() {
        let isa = Isa::active();
        let narrow = if isa == Isa::Avx2 { "i16acc" } else { "i32acc" };
        assert_eq!(kernel_name(4, 4, false), format!("{}-u4s4-{narrow}", isa.name()));
        assert_eq!(kernel_name(4, 4, true), format!("{}-u4s4-levels", isa.name()));
        assert_eq!(kernel_name(8, 8, false), format!("{}-u8s8-i32acc", isa.name()));
        assert_eq!(kernel_name(16, 4, false), format!("{}-f32s4-fma", isa.name()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_shape(
            rows in 1usize..80, out in 1usize..50, groups in 1usize..4, group in 1usize..200,
            bits in 2u8..=8, act_bits in 2u8..=8, seed in any::<u64>()
        ) {
            let (inp, group) = if groups == 1 { (group, group) } else { (groups * group.next_multiple_of(8), group.next_multiple_of(8)) };
            let mut rng = Lcg(seed);
            let w = random_weights(&mut rng, out, inp, bits, group);
            check_all(&random_acts(&mut rng, rows, inp, act_bits), &w);
        }
    }
}
