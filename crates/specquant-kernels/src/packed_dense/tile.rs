//! A product of a few rows and panels in registers.

use super::PANEL;
use crate::isa::Scalar;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512Vnni};
use half::{bf16, f16};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Bytes of weights that are fetched before they are used, where few rows pass over them: the processor's own prefetching stops at every page.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 2048;
/// Rows of a tile up to which products wait for memory rather than for arithmetic.
#[cfg(target_arch = "x86_64")]
const FETCHING: usize = 8;

/// How a weight is stored. Widening is exact.
pub(crate) trait Weight: Copy + Send + Sync {
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

/// What a tile multiplies.
pub(crate) struct Part<'a, W> {
    /// First of the rows, `pitch` apart.
    pub x: &'a [f32],
    pub pitch: usize,
    /// First of the panels, `panel_stride` apart.
    pub w: &'a [W],
    pub panel_stride: usize,
    /// Inputs to sum over.
    pub depth: usize,
    /// Whether the sums start at zero rather than at what the output holds.
    pub begin: bool,
}

impl<W> Part<'_, W> {
    /// Panics unless `rows` rows and `panels` panels of `depth` inputs are there.
    fn check(&self, rows: usize, panels: usize) {
        assert!(self.depth > 0 && rows > 0 && panels > 0);
        assert!(self.x.len() >= (rows - 1) * self.pitch + self.depth);
        assert!(self.w.len() >= (panels - 1) * self.panel_stride + self.depth * PANEL);
    }
}

/// Where a tile goes: rows of `width` floats from `y` on, `ldy` apart.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub y: *mut f32,
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // the scalar tile has one row
    pub ldy: usize,
    pub width: usize,
}

/// A product of a few rows and panels.
pub(crate) trait Tile: Copy + Sync {
    /// Panels of a full tile.
    const PANELS: usize;
    /// Panels of one row's tile, a power of two: as many chains of additions as it takes to hide how long one addition takes.
    const WIDE: usize;
    /// Heights that there is code for, the largest first; the last is 1.
    const HEIGHTS: [usize; 5];

    /// Adds the product of some rows and panels to `y`, or writes it there.
    ///
    /// # Safety
    /// `to` must be valid for reading and writing `rows` rows. `rows` must be one of [`Tile::HEIGHTS`], and `panels` 1 or [`Tile::PANELS`], of one
    /// row a power of two up to [`Tile::WIDE`].
    unsafe fn tile<W: Weight>(self, part: &Part<W>, rows: usize, panels: usize, to: Place);
}

impl Tile for Scalar {
    const PANELS: usize = 1;
    const WIDE: usize = 1;
    const HEIGHTS: [usize; 5] = [1; 5];

    unsafe fn tile<W: Weight>(self, part: &Part<W>, rows: usize, panels: usize, to: Place) {
        let Place { y, width, .. } = to;
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
    ($token:ty, $name:ident, $features:literal, $panels:literal, $wide:literal, $heights:expr, $reg:ty, $lanes:literal,
     $zero:ident, $weights:ident, $load:ident, $store:ident, $splat:ident, $fma:ident) => {
        impl Tile for $token {
            const PANELS: usize = $panels;
            const WIDE: usize = $wide;
            const HEIGHTS: [usize; 5] = $heights;

            unsafe fn tile<W: Weight>(self, part: &Part<W>, rows: usize, panels: usize, to: Place) {
                let Place { y, ldy, width } = to;
                part.check(rows, panels);
                let whole = width == panels * PANEL;
                // Columns that the output does not have go to the side.
                let mut side = [0.0f32; 12 * 2 * PANEL];
                let (to, ld) = if whole { (y, ldy) } else { (side.as_mut_ptr(), panels * PANEL) };
                // SAFETY: the token proves the instruction set; `check` has proved x and w; y is the caller's, and the side has room for 12
                // rows of two panels, or one of eight.
                unsafe {
                    if !whole && !part.begin {
                        (0..rows).for_each(|r| {
                            std::ptr::copy_nonoverlapping(y.add(r * ldy), to.add(r * ld), width)
                        });
                    }
                    macro_rules! call {
                        ($r:literal, $p:literal) => {
                            $name::<W, $r, { $p * PANEL / $lanes }>(part, to, ld)
                        };
                        ($r:literal) => {
                            if panels == 1 { call!($r, 1) } else { call!($r, $panels) }
                        };
                    }
                    match (rows, panels) {
                        (12, _) => call!(12),
                        (8, _) => call!(8),
                        (6, _) => call!(6),
                        (4, _) => call!(4),
                        (3, _) => call!(3),
                        (2, _) => call!(2),
                        (_, 1) => call!(1, 1),
                        (_, 2) => call!(1, 2),
                        (_, 4) => call!(1, 4),
                        _ => call!(1, $wide),
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
                        if R <= FETCHING {
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
    8,
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
    4,
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
