//! Dense f32 products with packed weights.
//!
//! Weights lie in panels of 16 output columns, input by input, so that a tile of a few rows and two panels streams through both without a
//! copy: 12 × 32 sums in AVX-512's registers, 6 × 16 in AVX2's. The sum of one output is built in one order, which depends on the depth
//! alone: not on the number of rows, nor on that of threads.

mod digits;
mod tile;

use crate::PackedWeights;
use crate::buffer::Buffer;
use crate::isa::{Isa, with_token};
use crate::parallel::{Shared, for_each_chunk, for_each_index};
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;
use tile::{Part, Place};
pub(crate) use tile::{Tile, Weight};

/// Output columns of a panel: the lanes of an AVX-512 register.
const PANEL: usize = 16;
/// Rows of one task.
const TASK_ROWS: usize = 192;
/// Panels of one task, and of one where there are too few rows for several.
const TASK_PANELS: usize = 16;
const FEW_TASK_PANELS: usize = 4;
/// Panels that are always many.
const MANY_PANELS: usize = 1024;
/// Depth that is summed before the sums go to memory: a pair of panels of it is 48 KiB, and stays in a core's L2 beside the rows.
const DEPTH: usize = 384;
/// Multiply-adds below which a second thread does not pay.
const SMALL: usize = 1 << 17;

/// A dense weight matrix, `[n, k]`, packed for [`matmul_packed`].
#[derive(Debug, Clone)]
pub struct PackedDense {
    n: usize,
    k: usize,
    panels: Panels,
    /// `[n]`: what the sums are multiplied with; nothing where `None`.
    scales: Option<Vec<f32>>,
}

/// Values of a [`PackedDense`], `[ceil(n / 16), k, 16]`; columns from n on are zero.
#[derive(Debug, Clone, PartialEq)]
enum Panels {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    I8(Vec<i8>),
    /// Codes and their scales, for integer products.
    Int(PackedWeights),
}

impl PackedDense {
    /// Packs `w`, `[n, k]` row-major.
    ///
    /// # Panics
    /// If the length does not follow from the shape.
    pub fn pack(w: &[f32], n: usize, k: usize) -> Self {
        assert_eq!(Some(w.len()), n.checked_mul(k), "dense weight: {} values are not [{n}, {k}]", w.len());
        let mut panels = vec![0.0; n.div_ceil(PANEL) * k * PANEL];
        pack_into(&mut panels, w, k);
        PackedDense { n, k, panels: Panels::F32(panels), scales: None }
    }

    /// Packs the transpose of `w`, `[k, n]` row-major.
    ///
    /// # Panics
    /// If the length does not follow from the shape.
    pub fn pack_transposed(w: &[f32], n: usize, k: usize) -> Self {
        assert_eq!(Some(w.len()), n.checked_mul(k), "dense weight: {} values are not [{k}, {n}]", w.len());
        let mut panels = vec![0.0; n.div_ceil(PANEL) * k * PANEL];
        pack_transposed_into(&mut panels, w, n, k, 0);
        PackedDense { n, k, panels: Panels::F32(panels), scales: None }
    }

    /// Packs int8 codes, `[n, k]` row-major, which stand for their values times the scale of their row, `[n]`.
    ///
    /// Where a processor multiplies bytes fast (VNNI, AMX, NEON's dot products), rows of the other factor are rounded to 16 bits of their largest value, and
    /// their sums of products are exact; elsewhere they are those of f32.
    ///
    /// # Panics
    /// If a length does not follow from the shape.
    pub fn pack_int8(codes: &[u8], scales: Vec<f32>, n: usize, k: usize) -> Self {
        PackedDense::pack_int8_for(Isa::active(), codes, scales, n, k)
    }

    fn pack_int8_for(isa: Isa, codes: &[u8], scales: Vec<f32>, n: usize, k: usize) -> Self {
        assert_eq!(
            Some(codes.len()),
            n.checked_mul(k),
            "dense weight: {} codes are not [{n}, {k}]",
            codes.len()
        );
        assert_eq!(scales.len(), n, "dense weight: scales");
        if digits::pay(isa) {
            // SAFETY: an i8 is a u8 in every respect but what it stands for.
            let signed = unsafe { std::slice::from_raw_parts(codes.as_ptr().cast(), codes.len()) };
            // What these weights do not take, floats do: too many inputs, or none.
            if let Ok(weights) = PackedWeights::pack(signed, &scales, n, k, 8, k) {
                return PackedDense { n, k, panels: Panels::Int(weights), scales: None };
            }
        }
        let mut panels = vec![0; n.div_ceil(PANEL) * k * PANEL];
        if k > 0 {
            let each = panels.par_chunks_exact_mut(k * PANEL).zip(codes.par_chunks(PANEL * k));
            each.for_each(|(panel, rows)| pack_rows(rows, k, panel, |code| code as i8));
        }
        PackedDense { n, k, panels: Panels::I8(panels), scales: Some(scales) }
    }

    /// In 8 or 16 bits if i8, f16 or bf16 holds every value exactly: a product of few rows takes as long as reading the weights. Results
    /// stay the same to the last bit.
    pub fn compact(self) -> Self {
        let Panels::F32(wide) = &self.panels else { return self };
        let all = |exact: fn(f32) -> bool| wide.par_chunks(1 << 16).all(|w| w.iter().all(|&w| exact(w)));
        let panels = if all(|w| f32::from(w as i8) == w) {
            Panels::I8(wide.par_iter().map(|&w| w as i8).collect())
        } else if all(|w| f16::from_f32(w).to_f32() == w) {
            Panels::F16(wide.par_iter().map(|&w| f16::from_f32(w)).collect())
        } else if all(|w| bf16::from_f32(w).to_f32() == w) {
            Panels::Bf16(wide.par_iter().map(|&w| bf16::from_f32(w)).collect())
        } else {
            return self;
        };
        PackedDense { panels, ..self }
    }

    /// What was packed, `[n, k]` row-major.
    pub fn unpack(&self) -> Vec<f32> {
        fn values<W: Weight>(panels: &[W], n: usize, k: usize) -> Vec<f32> {
            let at = |row: usize, col: usize| (row / PANEL * k + col) * PANEL + row % PANEL;
            (0..n).flat_map(|row| (0..k).map(move |col| panels[at(row, col)].widen())).collect()
        }
        let (n, k) = (self.n, self.k);
        let mut w = match &self.panels {
            Panels::F32(panels) => values(panels, n, k),
            Panels::F16(panels) => values(panels, n, k),
            Panels::Bf16(panels) => values(panels, n, k),
            Panels::I8(panels) => values(panels, n, k),
            Panels::Int(weights) => weights.dequantize(),
        };
        if let Some(scales) = &self.scales {
            w.chunks_exact_mut(k.max(1))
                .zip(scales)
                .for_each(|(row, s)| row.iter_mut().for_each(|w| *w *= s));
        }
        w
    }

    /// Output features.
    pub fn out_features(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn in_features(&self) -> usize {
        self.k
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        let panels = match &self.panels {
            Panels::F32(panels) => size_of_val(panels.as_slice()),
            Panels::F16(panels) => size_of_val(panels.as_slice()),
            Panels::Bf16(panels) => size_of_val(panels.as_slice()),
            Panels::I8(panels) => size_of_val(panels.as_slice()),
            Panels::Int(weights) => weights.bytes(),
        };
        panels + self.scales.as_ref().map_or(0, |s| size_of_val(s.as_slice()))
    }
}

/// The panels, `[ceil(n / 16), k, 16]`, of w `[n, k]`; lanes beyond n stay as they are.
fn pack_into(panels: &mut [f32], w: &[f32], k: usize) {
    for_each_chunk(panels, (k * PANEL).max(1), |i, panel| {
        let rows = i * PANEL * k..w.len().min((i + 1) * PANEL * k);
        pack_rows(&w[rows], k, panel, |w| w);
    });
}

/// As [`pack_into`], of w `[k, n]`, from panel `first` on.
fn pack_transposed_into(panels: &mut [f32], w: &[f32], n: usize, k: usize, first: usize) {
    for_each_chunk(panels, (k * PANEL).max(1), |i, panel| pack_columns(w, n, first + i, panel));
}

/// Up to 16 rows of w, `[.., k]`, as a panel, `[k, 16]`; lanes without a row stay as they are.
fn pack_rows<T: Copy, W>(rows: &[T], k: usize, panel: &mut [W], weight: fn(T) -> W) {
    // In blocks, so that what is written stays in the first cache until it is whole.
    for (b, panel) in panel.chunks_mut(PANEL * PANEL).enumerate() {
        for (lane, row) in rows.chunks_exact(k).enumerate() {
            let row = &row[b * PANEL..];
            panel.iter_mut().skip(lane).step_by(PANEL).zip(row).for_each(|(p, w)| *p = weight(*w));
        }
    }
}

/// Columns 16 i to 16 i + 15 of w `[k, n]` as a panel, `[k, 16]`; lanes without a column stay as they are.
fn pack_columns(w: &[f32], n: usize, i: usize, panel: &mut [f32]) {
    let columns = i * PANEL..n.min((i + 1) * PANEL);
    for (lanes, row) in panel.as_chunks_mut::<PANEL>().0.iter_mut().zip(w.chunks_exact(n)) {
        match row[columns.clone()].first_chunk() {
            // Of a length that the compiler knows: no call.
            Some(whole) => *lanes = *whole,
            None => lanes[..columns.len()].copy_from_slice(&row[columns.clone()]),
        }
    }
}

/// y [m, n] = x [m, k] · wᵀ. A row's result depends neither on the other rows nor on the number of threads.
///
/// # Panics
/// If a length does not follow from the shape.
pub fn matmul_packed(x: &[f32], w: &PackedDense, y: &mut [f32], m: usize) {
    matmul_packed_with(Isa::active(), x, w, y, m, false);
}

/// Adds the product of [`matmul_packed`] to y.
///
/// # Panics
/// As [`matmul_packed`], and for a weight of scaled codes, whose sums cannot start at what y holds.
pub fn add_matmul_packed(x: &[f32], w: &PackedDense, y: &mut [f32], m: usize) {
    matmul_packed_with(Isa::active(), x, w, y, m, true);
}

/// [`matmul_packed`] with the kernel of an instruction set, or the scalar one if this machine lacks it.
///
/// # Panics
/// As [`matmul_packed`].
#[doc(hidden)]
pub fn matmul_packed_with(isa: Isa, x: &[f32], w: &PackedDense, y: &mut [f32], m: usize, accumulate: bool) {
    let (shape, scales) = ([w.n, w.k], w.scales.as_deref());
    match &w.panels {
        Panels::F32(panels) => matmul_panels(isa, x, Right { panels, shape, scales }, y, m, accumulate),
        Panels::F16(panels) => matmul_panels(isa, x, Right { panels, shape, scales }, y, m, accumulate),
        Panels::Bf16(panels) => matmul_panels(isa, x, Right { panels, shape, scales }, y, m, accumulate),
        Panels::I8(panels) => matmul_panels(isa, x, Right { panels, shape, scales }, y, m, accumulate),
        Panels::Int(weights) => {
            assert!(!accumulate, "{SCALED}");
            check(x, y, shape, m);
            digits::multiply(isa, x, weights, y, m);
        }
    }
}

/// y [m, n] = x [m, k] · w, or y plus that, with w `[n, k]`, or `[k, n]` if `transposed`, packed for this product alone: some columns at a time, for a wide
/// layer's weights take hundreds of megabytes.
pub(crate) fn matmul_once(
    x: &[f32],
    (w, transposed): (&[f32], bool),
    y: &mut [f32],
    [m, k, n]: [usize; 3],
    accumulate: bool,
) {
    assert_eq!(Some(w.len()), n.checked_mul(k), "dense product: w does not hold {n} x {k}");
    check(x, y, [n, k], m);
    if empty(y, [m, k, n], accumulate) {
        return;
    }
    let (pitch, copy) = spread(x, m, k);
    let x = copy.as_deref().unwrap_or(x);
    let at_once = columns_at_once(n);
    let mut panels = Buffer::new(at_once.div_ceil(PANEL) * k * PANEL);
    for first in (0..n).step_by(at_once) {
        let width = at_once.min(n - first);
        let panels = &mut panels[..width.div_ceil(PANEL) * k * PANEL];
        if transposed {
            pack_transposed_into(panels, w, n, k, first / PANEL);
        } else {
            pack_into(panels, &w[first * k..][..width * k], k);
        }
        let product = Product { x, pitch, panels, n: width, k, ldy: n, accumulate };
        product.all(Isa::active(), m, None, &mut y[first..]);
    }
}

/// Columns, of n, that a weight multiplied once is packed by at a time: those of a task for every thread, of many rows.
pub fn columns_at_once(n: usize) -> usize {
    n.min(TASK_PANELS * PANEL * rayon::current_num_threads())
}

/// What [`add_matmul_packed`] says of weights of codes.
const SCALED: &str = "packed product: a sum of scaled codes is not added to anything";

/// Checks lengths: a product that wraps would let the tiles write beside y.
fn check(x: &[f32], y: &[f32], [n, k]: [usize; 2], m: usize) {
    assert_eq!(Some(x.len()), m.checked_mul(k), "packed product: x is not [{m}, {k}]");
    assert_eq!(Some(y.len()), m.checked_mul(n), "packed product: y is not [{m}, {n}]");
}

/// What is multiplied with.
struct Right<'a, W> {
    /// `[ceil(n / 16), k, 16]`; what columns from n on hold does not tell.
    panels: &'a [W],
    /// n, k.
    shape: [usize; 2],
    scales: Option<&'a [f32]>,
}

fn matmul_panels<W: Weight>(
    isa: Isa,
    x: &[f32],
    Right { panels, shape: [n, k], scales }: Right<W>,
    y: &mut [f32],
    m: usize,
    accumulate: bool,
) {
    assert!(scales.is_none() || !accumulate, "{SCALED}");
    check(x, y, [n, k], m);
    if empty(y, [m, k, n], accumulate) {
        return;
    }
    let (pitch, copy) = spread(x, m, k);
    let x = copy.as_deref().unwrap_or(x);
    Product { x, pitch, panels, n, k, ldy: n, accumulate }.all(isa, m, scales, y);
}

/// Whether there is nothing to multiply, of which the sums are zero.
fn empty(y: &mut [f32], shape: [usize; 3], accumulate: bool) -> bool {
    let empty = shape.contains(&0);
    if empty && !accumulate {
        y.fill(0.0);
    }
    empty
}

/// How far apart the rows of x `[m, k]` should lie, and a copy in which they do, if that is not k: rows a multiple of a page apart share one set of the L1
/// cache; a few floats between them spread them out.
fn spread(x: &[f32], m: usize, k: usize) -> (usize, Option<Buffer<f32>>) {
    if !k.is_multiple_of(1024) || m == 1 {
        return (k, None);
    }
    let pitch = k + PANEL;
    let mut copy = Buffer::new(m * pitch);
    for_each_chunk(&mut copy, pitch, |i, row| row[..k].copy_from_slice(&x[i * k..][..k]));
    (pitch, Some(copy))
}

/// y [m, n] = x [m, k] · w [n, k]ᵀ on this thread.
pub(crate) fn tile_nt(x: &[f32], w: &[f32], y: &mut [f32], m: usize, k: usize, n: usize) {
    assert!(x.len() == m * k && w.len() == n * k && y.len() == m * n);
    let mut panels = Buffer::new(n.div_ceil(PANEL) * k * PANEL);
    for (panel, rows) in panels.chunks_exact_mut(k * PANEL).zip(w.chunks(PANEL * k)) {
        pack_rows(rows, k, panel, |w| w);
    }
    whole(Product { x, pitch: k, panels: &panels, n, k, ldy: n, accumulate: false }, y, m);
}

/// y [m, n] += x [m, k] · w [k, n] on this thread.
pub(crate) fn tile_nn_add(x: &[f32], w: &[f32], y: &mut [f32], m: usize, k: usize, n: usize) {
    assert!(x.len() == m * k && w.len() == n * k && y.len() == m * n);
    let mut panels = Buffer::new(n.div_ceil(PANEL) * k * PANEL);
    for (i, panel) in panels.chunks_exact_mut(k * PANEL).enumerate() {
        pack_columns(w, n, i, panel);
    }
    whole(Product { x, pitch: k, panels: &panels, n, k, ldy: n, accumulate: true }, y, m);
}

/// All of y [m, n], which the caller has checked; on this thread.
fn whole(product: Product<f32>, y: &mut [f32], m: usize) {
    assert_eq!(y.len(), m * product.n);
    // SAFETY: y is all there and borrowed for writing.
    with_token!(Isa::active(), token => unsafe {
        product.block(token, 0..m, 0..product.n.div_ceil(PANEL), y.as_mut_ptr())
    });
}

/// A product of rows, `pitch` apart, with panels `[ceil(n / 16), k, 16]`.
pub(crate) struct Product<'a, W> {
    pub x: &'a [f32],
    pub pitch: usize,
    pub panels: &'a [W],
    pub n: usize,
    pub k: usize,
    /// How far apart the rows of y lie.
    pub ldy: usize,
    /// Whether it is added to y.
    pub accumulate: bool,
}

impl<W: Weight> Product<'_, W> {
    /// All of the product on all threads. y: its first value and all that lies up to the last one; scales: of columns.
    fn all(&self, isa: Isa, m: usize, scales: Option<&[f32]>, y: &mut [f32]) {
        let (n, k, ldy) = (self.n, self.k, self.ldy);
        assert!(n <= ldy && y.len() >= (m - 1) * ldy + n);
        let columns = n.div_ceil(PANEL);
        let few = m <= TASK_ROWS && columns < MANY_PANELS;
        let task_panels = if few { FEW_TASK_PANELS } else { TASK_PANELS };
        let (row_blocks, column_blocks) = (m.div_ceil(TASK_ROWS), columns.div_ceil(task_panels));
        let out = Shared(y.as_mut_ptr());
        let task = |t: usize| {
            let rows = t / column_blocks * TASK_ROWS..m.min((t / column_blocks + 1) * TASK_ROWS);
            let columns = t % column_blocks * task_panels..columns.min((t % column_blocks + 1) * task_panels);
            // SAFETY: y is [m, n] of rows ldy apart, and only this task touches these rows and columns.
            with_token!(isa, token => unsafe { self.block(token, rows.clone(), columns.clone(), out.get()) });
            if let Some(scales) = scales {
                let columns = columns.start * PANEL..n.min(columns.end * PANEL);
                for row in rows {
                    // SAFETY: as before.
                    let y = unsafe {
                        let first = out.get().add(row * ldy + columns.start);
                        std::slice::from_raw_parts_mut(first, columns.len())
                    };
                    y.iter_mut().zip(&scales[columns.clone()]).for_each(|(y, s)| *y *= s);
                }
            }
        };
        let tasks = row_blocks * column_blocks;
        if tasks == 1 || m * k * n < SMALL {
            (0..tasks).for_each(task);
        } else {
            for_each_index(tasks, task);
        }
    }

    /// Some rows, and the columns of some panels.
    ///
    /// # Safety
    /// y must be valid for reading and writing these rows, `ldy` apart, and columns, and nobody else may touch them.
    pub(crate) unsafe fn block<T: Tile>(
        &self,
        token: T,
        rows: Range<usize>,
        columns: Range<usize>,
        y: *mut f32,
    ) {
        let (n, k, ldy) = (self.n, self.k, self.ldy);
        let part = |depth: usize, first: usize, count: usize| {
            let mut row = rows.start;
            while row < rows.end {
                let left = rows.end - row;
                // Better two halves than a whole tile and one of so few rows that its sums wait for each other.
                let halved = (T::HEIGHTS[0] < left && left <= T::HEIGHTS[0] + 2).then(|| left.div_ceil(2));
                let height = halved.filter(|h| T::HEIGHTS.contains(h));
                let height = height.or(T::HEIGHTS.into_iter().find(|h| *h <= left)).unwrap_or(1);
                let x = &self.x[row * self.pitch + depth..];
                let begin = depth == 0 && !self.accumulate;
                let w = &self.panels[(first * k + depth) * PANEL..];
                let part = Part {
                    x,
                    pitch: self.pitch,
                    w,
                    panel_stride: k * PANEL,
                    depth: DEPTH.min(k - depth),
                    begin,
                };
                let width = (count * PANEL).min(n - first * PANEL);
                // SAFETY: rows row..row + height and columns from first · 16 on, `width` of them, are among the caller's.
                unsafe {
                    let to = Place { y: y.add(row * ldy + first * PANEL), ldy, width };
                    token.tile(&part, height, count, to);
                };
                row += height;
            }
        };
        let depths = (0..k).step_by(DEPTH);
        let wide = if rows.len() == 1 { T::WIDE } else { T::PANELS };
        let all_columns = |depths: Range<usize>| {
            let mut first = columns.start;
            while first < columns.end {
                let count = wide.min(1 << (columns.end - first).ilog2());
                depths.clone().step_by(DEPTH).for_each(|depth| part(depth, first, count));
                first += count;
            }
        };
        if rows.len() <= T::HEIGHTS[0] {
            // Weights in the order in which they lie.
            all_columns(0..k);
        } else {
            depths.for_each(|depth| all_columns(depth..depth + 1));
        }
    }
}

#[cfg(test)]
mod tests;
