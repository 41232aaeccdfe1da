//! How the output of a product is cut into rectangles, the depth into blocks.

use super::PANELS;
use crate::parallel::Shared;
use crate::weights::PANEL;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::marker::PhantomData;
use std::ops::Range;

/// Multiply-accumulates that a rectangle has at least, if the product has them: below, sharing costs more than it saves.
const GRAIN: usize = 1 << 17;

/// Bytes of results that do not stay in a core's L2 until they are read.
#[cfg(target_arch = "x86_64")]
const LARGE: usize = 1 << 21;
/// Values of a cache line.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 16;

/// A rectangle of y: some columns of some rows, which one task writes.
pub(super) struct Rect<'a> {
    pub row: usize,
    pub col: usize,
    pub rows: usize,
    pub width: usize,
    /// Its first value.
    start: *mut f32,
    /// How far apart rows lie.
    pub stride: usize,
    /// Bytes of y.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // nothing is fetched elsewhere
    total: usize,
    y: PhantomData<&'a mut [f32]>,
}

impl Rect<'_> {
    /// Asks for what is about to be written over, if it is not in a core's L2 anyway, so that the core need not wait for it then: rows lie so far apart that
    /// the processor does not see it coming.
    #[inline(always)]
    pub(super) fn fetch(&mut self, rows: Range<usize>, columns: Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        for row in if self.total > LARGE { rows } else { 0..0 } {
            let row = self.row_mut(row);
            let end = columns.end.min(row.len());
            for line in row[columns.start.min(end)..end].chunks(LINE) {
                // SAFETY: it reads nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (rows, columns);
    }

    /// A column's value in the first row.
    pub(super) fn at(&mut self, col: usize) -> *mut f32 {
        assert!(col < self.width && self.rows > 0);
        // SAFETY: within y.
        unsafe { self.start.add(col) }
    }

    /// Row i of the rectangle.
    #[inline(always)]
    pub(super) fn row_mut(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows);
        // SAFETY: within y, and nobody else's by the contract of `Grid::rect`.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(i * self.stride), self.width) }
    }
}

/// How y `[rows, out]` is cut into rectangles, which start at multiples of [`PANEL`] columns.
pub(super) struct Grid<'a> {
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
    /// inp: depth of the product; most: rows of a rectangle at most, a multiple of `step` as they all are.
    pub(super) fn new(y: &'a mut [f32], [rows, out, inp]: [usize; 3], most: usize, step: usize) -> Self {
        assert_eq!(y.len(), rows * out, "y must be [rows, out]");
        let (start, empty) = (Shared(y.as_mut_ptr()), y.is_empty());
        if empty {
            return Grid { rows, out, high: 1, wide: 1, down: 0, across: 0, start, y: PhantomData };
        }
        let high = rows.div_ceil(rows.div_ceil(most)).next_multiple_of(step);
        let least = GRAIN / (high.min(rows) * inp);
        let across = (out / least.max(PANELS * PANEL)).max(1);
        let wide = out.div_ceil(across).next_multiple_of(PANELS * PANEL);
        let (down, across) = (rows.div_ceil(high), out.div_ceil(wide));
        Grid { rows, out, high, wide, down, across, start, y: PhantomData }
    }

    /// Rectangles.
    pub(super) fn len(&self) -> usize {
        self.down * self.across
    }

    /// # Safety
    /// i < [`Grid::len`], and no rectangle may be there twice at a time.
    pub(super) unsafe fn rect(&self, i: usize) -> Rect<'a> {
        let (row, col) = (i / self.across * self.high, i % self.across * self.wide);
        let (rows, width) = (self.high.min(self.rows - row), self.wide.min(self.out - col));
        // SAFETY: row < rows and col < out.
        let start = unsafe { self.start.get().add(row * self.out + col) };
        let total = size_of::<f32>() * self.rows * self.out;
        Rect { row, col, rows, width, start, stride: self.out, total, y: PhantomData }
    }
}

/// The blocks of a group: (start, end), of `depth` inputs at most, evenly, starting multiples of `step`, which is one of 8, after `start`.
pub(super) fn blocks(
    start: usize,
    size: usize,
    depth: usize,
    step: usize,
) -> impl Iterator<Item = (usize, usize)> {
    // One block is all that most products have, and a division takes as long as many products do.
    let even = if size <= depth { size } else { size.div_ceil(size.div_ceil(depth)).next_multiple_of(step) };
    let (mut next, end) = (start, start + size);
    std::iter::from_fn(move || {
        let k = next;
        next = (k + even).min(end);
        (k < end).then_some((k, next))
    })
}

/// The panels of a rectangle, up to `step` at a time: (column within the rectangle, panels).
pub(super) fn panels(rect: &Rect, step: usize) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
    let (first, end) = (rect.col / PANEL, rect.col / PANEL + rect.width.div_ceil(PANEL));
    (first..end).step_by(step).map(move |p| ((p - first) * PANEL, p..end.min(p + step)))
}
