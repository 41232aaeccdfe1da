//! Dense f32 products with packed weights.
//!
//! Weights lie in panels of 16 output columns, input by input, so that a tile of a few rows and two panels streams through both without a
//! copy: 12 × 32 sums in AVX-512's registers, 6 × 16 in AVX2's. The sum of one output is built in one order, which depends on the depth
//! alone: not on the number of rows, nor on that of threads.

#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512Vnni};
use crate::isa::{Isa, Scalar, with_token};
use crate::parallel::{Shared, for_each_chunk, for_each_index};
use half::{bf16, f16};
use rayon::prelude::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::ops::Range;

/// Output columns of a panel: the lanes of an AVX-512 register.
const PANEL: usize = 16;
/// Rows of one task.
const TASK_ROWS: usize = 192;
/// Panels of one task, and of one where there are too few rows for several.
const TASK_PANELS: usize = 16;
const FEW_TASK_PANELS: usize = 4;
/// Bytes of weights that are fetched before they are used, where one row passes over them: the processor's own prefetching stops at every page.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 2048;
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
    /// `[ceil(n / 16), k, 16]`; columns from n on are zero.
    panels: Panels,
}

/// Values of a [`PackedDense`].
#[derive(Debug, Clone, PartialEq)]
enum Panels {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    I8(Vec<i8>),
}

impl PackedDense {
    /// Packs `w`, `[n, k]` row-major.
    ///
    /// # Panics
    /// If the length does not follow from the shape.
    pub fn pack(w: &[f32], n: usize, k: usize) -> Self {
        assert_eq!(Some(w.len()), n.checked_mul(k), "dense weight: {} values are not [{n}, {k}]", w.len());
        let mut panels = vec![0.0; n.div_ceil(PANEL) * k * PANEL];
        if k > 0 {
            let each = panels.par_chunks_exact_mut(k * PANEL).zip(w.par_chunks(PANEL * k));
            each.for_each(|(panel, rows)| pack_rows(rows, k, panel));
        }
        PackedDense { n, k, panels: Panels::F32(panels) }
    }

    /// Packs the transpose of `w`, `[k, n]` row-major.
    ///
    /// # Panics
    /// If the length does not follow from the shape.
    pub fn pack_transposed(w: &[f32], n: usize, k: usize) -> Self {
        assert_eq!(Some(w.len()), n.checked_mul(k), "dense weight: {} values are not [{k}, {n}]", w.len());
        let mut panels = vec![0.0; n.div_ceil(PANEL) * k * PANEL];
        if k > 0 {
            let each = panels.par_chunks_exact_mut(k * PANEL).enumerate();
            each.for_each(|(i, panel)| pack_columns(w, n, i, panel));
        }
        PackedDense { n, k, panels: Panels::F32(panels) }
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
        match &self.panels {
            Panels::F32(panels) => size_of_val(panels.as_slice()),
            Panels::F16(panels) => size_of_val(panels.as_slice()),
            Panels::Bf16(panels) => size_of_val(panels.as_slice()),
            Panels::I8(panels) => size_of_val(panels.as_slice()),
        }
    }
}

/// How a weight is stored. Widening is exact.
trait Weight: Copy + Send + Sync {
    fn widen(self) -> f32;

    /// 8 weights, widened.
    ///
    /// # Safety
    /// `from` must be valid for reading 8 of them, and the machine have AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(from: *const Self) -> __m256;

    /// 16 weights, widened.
    ///
    /// # Safety
    /// `from` must be valid for reading 16 of them, and the machine have AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16(from: *const Self) -> __m512;
}

/// Loads of one type: 8 and 16 weights from `$from`.
macro_rules! weight {
    ($type:ty, $widen:expr, $from:ident => $load8:expr, $load16:expr) => {
        impl Weight for $type {
            #[inline(always)]
            fn widen(self) -> f32 {
                $widen(self)
            }

            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            unsafe fn load8($from: *const Self) -> __m256 {
                // SAFETY: the caller's.
                unsafe { $load8 }
            }

            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            unsafe fn load16($from: *const Self) -> __m512 {
                // SAFETY: the caller's.
                unsafe { $load16 }
            }
        }
    };
}
weight!(f32, |w| w, from => _mm256_loadu_ps(from), _mm512_loadu_ps(from));
weight!(f16, f16::to_f32, from => _mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())));
weight!(bf16, bf16::to_f32, from =>
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))),
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()))))
);

weight!(i8, f32::from, from =>
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))),
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))
);

/// Up to 16 rows of w, `[.., k]`, as a panel, `[k, 16]`; lanes without a row stay as they are.
fn pack_rows(rows: &[f32], k: usize, panel: &mut [f32]) {
    // In blocks, so that what is written stays in the first cache until it is whole.
    for (b, panel) in panel.chunks_mut(PANEL * PANEL).enumerate() {
        for (lane, row) in rows.chunks_exact(k).enumerate() {
            let row = &row[b * PANEL..];
            panel.iter_mut().skip(lane).step_by(PANEL).zip(row).for_each(|(p, w)| *p = *w);
        }
    }
}

/// Columns 16 i to 16 i + 15 of w `[k, n]` as a panel, `[k, 16]`; lanes without a column stay as they are.
fn pack_columns(w: &[f32], n: usize, i: usize, panel: &mut [f32]) {
    let columns = i * PANEL..n.min((i + 1) * PANEL);
    for (lanes, row) in panel.chunks_exact_mut(PANEL).zip(w.chunks_exact(n)) {
        lanes[..columns.len()].copy_from_slice(&row[columns.clone()]);
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
/// As [`matmul_packed`].
pub fn add_matmul_packed(x: &[f32], w: &PackedDense, y: &mut [f32], m: usize) {
    matmul_packed_with(Isa::active(), x, w, y, m, true);
}

/// [`matmul_packed`] with the kernel of an instruction set, or the scalar one if this machine lacks it.
///
/// # Panics
/// As [`matmul_packed`].
#[doc(hidden)]
pub fn matmul_packed_with(isa: Isa, x: &[f32], w: &PackedDense, y: &mut [f32], m: usize, accumulate: bool) {
    match &w.panels {
        Panels::F32(panels) => matmul_panels(isa, x, panels, [w.n, w.k], y, m, accumulate),
        Panels::F16(panels) => matmul_panels(isa, x, panels, [w.n, w.k], y, m, accumulate),
        Panels::Bf16(panels) => matmul_panels(isa, x, panels, [w.n, w.k], y, m, accumulate),
        Panels::I8(panels) => matmul_panels(isa, x, panels, [w.n, w.k], y, m, accumulate),
    }
}

fn matmul_panels<W: Weight>(
    isa: Isa,
    x: &[f32],
    panels: &[W],
    [n, k]: [usize; 2],
    y: &mut [f32],
    m: usize,
    accumulate: bool,
) {
    // Checked: a product that wraps would let the tiles write beside y.
    assert_eq!(Some(x.len()), m.checked_mul(k), "packed product: x is not [{m}, {k}]");
    assert_eq!(Some(y.len()), m.checked_mul(n), "packed product: y is not [{m}, {n}]");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            y.fill(0.0);
        }
        return;
    }
    // Rows a multiple of a page apart share one set of the L1 cache; a few floats between them spread them out.
    let pitch = if k.is_multiple_of(1024) && m > 1 { k + PANEL } else { k };
    let spread: Vec<f32>;
    let x = if pitch == k {
        x
    } else {
        let mut copy = vec![0.0; m * pitch];
        for_each_chunk(&mut copy, pitch, |i, row| row[..k].copy_from_slice(&x[i * k..][..k]));
        spread = copy;
        &spread
    };
    let columns = n.div_ceil(PANEL);
    let task_panels = if m <= TASK_ROWS && columns < MANY_PANELS { FEW_TASK_PANELS } else { TASK_PANELS };
    let (row_blocks, column_blocks) = (m.div_ceil(TASK_ROWS), columns.div_ceil(task_panels));
    let (product, out) = (Product { x, pitch, panels, n, k, accumulate }, Shared(y.as_mut_ptr()));
    let task = |t: usize| {
        let rows = t / column_blocks * TASK_ROWS..m.min((t / column_blocks + 1) * TASK_ROWS);
        let columns = t % column_blocks * task_panels..columns.min((t % column_blocks + 1) * task_panels);
        // SAFETY: y is [m, n], and only this task touches these rows and columns.
        with_token!(isa, token => unsafe { product.block(token, rows, columns, out.get()) });
    };
    let tasks = row_blocks * column_blocks;
    if tasks == 1 || m * k * n < SMALL {
        (0..tasks).for_each(task);
    } else {
        for_each_index(tasks, task);
    }
}

/// y [m, n] = x [m, k] · w [n, k]ᵀ on this thread. scratch: any.
pub(crate) fn tile_nt(
    x: &[f32],
    w: &[f32],
    y: &mut [f32],
    m: usize,
    k: usize,
    n: usize,
    scratch: &mut Vec<f32>,
) {
    assert!(x.len() == m * k && w.len() == n * k && y.len() == m * n);
    scratch.resize(n.div_ceil(PANEL) * k * PANEL, 0.0);
    for (panel, rows) in scratch.chunks_exact_mut(k * PANEL).zip(w.chunks(PANEL * k)) {
        pack_rows(rows, k, panel);
    }
    whole(Product { x, pitch: k, panels: scratch, n, k, accumulate: false }, y, m);
}

/// y [m, n] += x [m, k] · w [k, n] on this thread. scratch: any.
pub(crate) fn tile_nn_add(
    x: &[f32],
    w: &[f32],
    y: &mut [f32],
    m: usize,
    k: usize,
    n: usize,
    scratch: &mut Vec<f32>,
) {
    assert!(x.len() == m * k && w.len() == n * k && y.len() == m * n);
    scratch.resize(n.div_ceil(PANEL) * k * PANEL, 0.0);
    for (i, panel) in scratch.chunks_exact_mut(k * PANEL).enumerate() {
        pack_columns(w, n, i, panel);
    }
    whole(Product { x, pitch: k, panels: scratch, n, k, accumulate: true }, y, m);
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
struct Product<'a, W> {
    x: &'a [f32],
    pitch: usize,
    panels: &'a [W],
    n: usize,
    k: usize,
    /// Whether it is added to y.
    accumulate: bool,
}

impl<W: Weight> Product<'_, W> {
    /// Some rows, and the columns of some panels.
    ///
    /// # Safety
    /// y must be valid for reading and writing these rows and columns of `[.., n]`, and nobody else may touch them.
    unsafe fn block<T: Tile>(&self, token: T, rows: Range<usize>, columns: Range<usize>, y: *mut f32) {
        let (n, k) = (self.n, self.k);
        let part = |depth: usize, first: usize| {
            let count = T::PANELS.min(columns.end - first);
            let mut row = rows.start;
            while row < rows.end {
                let height = T::HEIGHTS.into_iter().find(|h| *h <= rows.end - row).unwrap_or(1);
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
                unsafe { token.tile(&part, height, count, width, y.add(row * n + first * PANEL), n) };
                row += height;
            }
        };
        let (depths, firsts) = ((0..k).step_by(DEPTH), columns.clone().step_by(T::PANELS));
        if rows.len() <= T::HEIGHTS[0] {
            // Weights in the order in which they lie.
            firsts.for_each(|first| depths.clone().for_each(|depth| part(depth, first)));
        } else {
            depths.for_each(|depth| firsts.clone().for_each(|first| part(depth, first)));
        }
    }
}

/// What a tile multiplies.
struct Part<'a, W> {
    /// First of the rows, `pitch` apart.
    x: &'a [f32],
    pitch: usize,
    /// First of the panels, `panel_stride` apart.
    w: &'a [W],
    panel_stride: usize,
    /// Inputs to sum over.
    depth: usize,
    /// Whether the sums start at zero rather than at what the output holds.
    begin: bool,
}

impl<W> Part<'_, W> {
    /// Panics unless `rows` rows and `panels` panels of `depth` inputs are there.
    fn check(&self, rows: usize, panels: usize) {
        assert!(self.depth > 0 && rows > 0 && panels > 0);
        assert!(self.x.len() >= (rows - 1) * self.pitch + self.depth);
        assert!(self.w.len() >= (panels - 1) * self.panel_stride + self.depth * PANEL);
    }
}

/// A product of a few rows and panels.
trait Tile: Copy + Sync {
    /// Panels of a full tile.
    const PANELS: usize;
    /// Heights that there is code for, the largest first; the last is 1.
    const HEIGHTS: [usize; 5];

    /// Adds the product of `rows` (one of [`Tile::HEIGHTS`]) rows and `panels` panels to `y`, or writes it there.
    ///
    /// # Safety
    /// `y` must be valid for reading and writing `rows` rows of `width` floats, `ldy` apart.
    unsafe fn tile<W: Weight>(
        self,
        part: &Part<W>,
        rows: usize,
        panels: usize,
        width: usize,
        y: *mut f32,
        ldy: usize,
    );
}

impl Tile for Scalar {
    const PANELS: usize = 1;
    const HEIGHTS: [usize; 5] = [1; 5];

    unsafe fn tile<W: Weight>(
        self,
        part: &Part<W>,
        rows: usize,
        panels: usize,
        width: usize,
        y: *mut f32,
        _: usize,
    ) {
        part.check(rows, panels);
        // SAFETY: the caller's.
        let y = unsafe { std::slice::from_raw_parts_mut(y, width) };
        let mut sums = [0.0f32; PANEL];
        if !part.begin {
            sums[..width].copy_from_slice(y);
        }
        for (x, w) in part.x[..part.depth].iter().zip(part.w.chunks_exact(PANEL)) {
            // Rounded once, as the others do it, so that all give the same bits.
            sums.iter_mut().zip(w).for_each(|(s, w)| *s = x.mul_add(w.widen(), *s));
        }
        y.copy_from_slice(&sums[..width]);
    }
}

/// The tiles of one instruction set: `$load`, `$store`, `$splat`, `$fma` on registers `$reg` of `$lanes` floats, `$regs` of them a panel.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_tile {
    ($token:ty, $name:ident, $features:literal, $panels:literal, $heights:expr, $reg:ty, $lanes:literal,
     $zero:ident, $weights:ident, $load:ident, $store:ident, $splat:ident, $fma:ident) => {
        impl Tile for $token {
            const PANELS: usize = $panels;
            const HEIGHTS: [usize; 5] = $heights;

            unsafe fn tile<W: Weight>(
                self,
                part: &Part<W>,
                rows: usize,
                panels: usize,
                width: usize,
                y: *mut f32,
                ldy: usize,
            ) {
                part.check(rows, panels);
                let whole = width == panels * PANEL;
                // Columns that the output does not have go to the side.
                let mut side = [0.0f32; 12 * 2 * PANEL];
                let (to, ld) = if whole { (y, ldy) } else { (side.as_mut_ptr(), panels * PANEL) };
                // SAFETY: the token proves the instruction set; `check` has proved x and w; y is the caller's, and the side has room for 12
                // rows of two panels.
                unsafe {
                    if !whole && !part.begin {
                        (0..rows).for_each(|r| {
                            std::ptr::copy_nonoverlapping(y.add(r * ldy), to.add(r * ld), width)
                        });
                    }
                    macro_rules! call {
                        ($r:literal) => {
                            match panels {
                                1 => $name::<W, $r, { PANEL / $lanes }>(part, to, ld),
                                _ => $name::<W, $r, { $panels * PANEL / $lanes }>(part, to, ld),
                            }
                        };
                    }
                    match rows {
                        12 => call!(12),
                        8 => call!(8),
                        6 => call!(6),
                        4 => call!(4),
                        3 => call!(3),
                        2 => call!(2),
                        _ => call!(1),
                    }
                    if !whole {
                        (0..rows).for_each(|r| {
                            std::ptr::copy_nonoverlapping(to.add(r * ld), y.add(r * ldy), width)
                        });
                    }
                }
            }
        }

        /// R rows, V registers a row.
        ///
        /// # Safety
        /// As [`Tile::tile`], for the instruction set and for what [`Part::check`] proves.
        #[target_feature(enable = $features)]
        unsafe fn $name<W: Weight, const R: usize, const V: usize>(part: &Part<W>, y: *mut f32, ldy: usize) {
            let (x, w) = (part.x.as_ptr(), part.w.as_ptr());
            let mut sums: [[$reg; V]; R] = [[$zero(); V]; R];
            // SAFETY: the caller's.
            unsafe {
                if !part.begin {
                    for r in 0..R {
                        for v in 0..V {
                            sums[r][v] = $load(y.add(r * ldy + v * $lanes));
                        }
                    }
                }
                for l in 0..part.depth {
                    let mut weights: [$reg; V] = [$zero(); V];
                    for v in 0..V {
                        let (panel, at) = (v * $lanes / PANEL, v * $lanes % PANEL);
                        let from = w.wrapping_add(panel * part.panel_stride + l * PANEL + at);
                        if R == 1 {
                            _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(AHEAD));
                        }
                        weights[v] = W::$weights(from);
                    }
                    for r in 0..R {
                        let input = $splat(*x.add(r * part.pitch + l));
                        for v in 0..V {
                            sums[r][v] = $fma(input, weights[v], sums[r][v]);
                        }
                    }
                }
                for r in 0..R {
                    for v in 0..V {
                        $store(y.add(r * ldy + v * $lanes), sums[r][v]);
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
x86_tile!(
    Avx512Vnni,
    avx512_tile,
    "avx512f",
    2,
    [12, 8, 4, 2, 1],
    __m512,
    16,
    _mm512_setzero_ps,
    load16,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps
);
#[cfg(target_arch = "x86_64")]
x86_tile!(
    Avx2,
    avx2_tile,
    "avx2,fma,f16c",
    1,
    [6, 4, 3, 2, 1],
    __m256,
    8,
    _mm256_setzero_ps,
    load8,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(seed: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 + seed * 101) as f32 * 0.713).sin()).collect()
    }

    /// In f64, by the definition; and the sum of the magnitudes, against which an error is to be held.
    fn naive(x: &[f32], w: &[f32], m: usize, k: usize, n: usize) -> Vec<(f64, f64)> {
        let dot = |i: usize, j: usize| {
            let products = (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(w[j * k + l]));
            products.fold((0.0, 0.0), |(sum, magnitude), p| (sum + p, magnitude + p.abs()))
        };
        (0..m * n).map(|c| dot(c / n, c % n)).collect()
    }

    fn check(m: usize, k: usize, n: usize) {
        let (x, w) = (values(m, m * k), values(n, n * k));
        let packed = PackedDense::pack(&w, n, k);
        let transposed: Vec<f32> = (0..k * n).map(|i| w[i % n * k + i / n]).collect();
        assert_eq!(PackedDense::pack_transposed(&transposed, n, k).panels, packed.panels);
        assert_eq!((packed.out_features(), packed.in_features()), (n, k));
        let want = naive(&x, &w, m, k, n);
        for isa in Isa::available() {
            let mut y = vec![f32::NAN; m * n];
            matmul_packed_with(isa, &x, &packed, &mut y, m, false);
            for (c, (got, (want, magnitude))) in y.iter().zip(&want).enumerate() {
                let error = (f64::from(*got) - want).abs();
                assert!(
                    error <= 1e-5 * magnitude,
                    "{isa:?} [{m}, {k}] x [{n}]: {c}: {got} instead of {want}"
                );
            }
            let mut twice = y.clone();
            matmul_packed_with(isa, &x, &packed, &mut twice, m, true);
            for ((got, y), (_, magnitude)) in twice.iter().zip(&y).zip(&want) {
                assert!(
                    f64::from(got - 2.0 * y).abs() <= 1e-5 * magnitude,
                    "{isa:?} [{m}, {k}] x [{n}], added"
                );
            }
            // Every row alone gives the same bits.
            for i in 0..m.min(3) {
                let mut row = vec![f32::NAN; n];
                matmul_packed_with(isa, &x[i * k..(i + 1) * k], &packed, &mut row, 1, false);
                assert_eq!(row, y[i * n..(i + 1) * n], "{isa:?} row {i}");
            }
        }
    }

    #[test]
    fn edges() {
        for (m, k, n) in [
            (1, 1, 1),
            (12, 384, 32),
            (13, 385, 33),
            (205, 100, 300),
            (3, 0, 5),
            (0, 4, 4),
            (25, 1024, 17),
            (2, 1536, 48),
        ] {
            check(m, k, n);
        }
    }

    #[test]
    fn fewer_bits_where_they_are_exact() {
        for (m, k, n) in [(1, 576, 70), (13, 300, 33), (3, 0, 2)] {
            let (x, w) = (values(m, m * k), values(n, n * k));
            let rounded = |f: fn(f32) -> f32| w.iter().map(|&w| f(w)).collect::<Vec<f32>>();
            let f16s = rounded(|w| f16::from_f32(w).to_f32());
            let bf16s = rounded(|w| bf16::from_f32(1e-6 * w).to_f32());
            let bytes = rounded(|w| (127.0 * w).round());
            for (w, size) in [(bytes, 1), (f16s, 2), (bf16s, 2), (w, 4)] {
                let (wide, compact) = (PackedDense::pack(&w, n, k), PackedDense::pack(&w, n, k).compact());
                assert_eq!(compact.bytes(), n.next_multiple_of(PANEL) * k * size);
                for isa in Isa::available() {
                    let [mut y, mut z] = [(); 2].map(|()| vec![0.5; m * n]);
                    matmul_packed_with(isa, &x, &wide, &mut y, m, true);
                    matmul_packed_with(isa, &x, &compact, &mut z, m, true);
                    assert_eq!(y, z, "{isa:?}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn any_shape(m in 1usize..40, k in 1usize..900, n in 1usize..120) {
            check(m, k, n);
        }
    }
}
