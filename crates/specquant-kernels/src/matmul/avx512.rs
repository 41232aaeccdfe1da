//! AVX-512 kernel: `vpdpbusd` multiplies a chunk (a quad of inputs of 16 channels) with a token's quad and adds to 16 i32 lanes.
//!
//! Up to twelve tokens and two panels at a time: 24 sums in registers, and 14 loads for 24 products, of which two a cycle are done of either.
//! Nibbles are unpacked in registers by the first tokens, one panel at a time, which keep the bytes for the others; a lone token splits its sum into four chains.
//!
//! Float products of many tokens take twelve of them and a panel, which the AVX2 code widens; few use the AVX2 code, to the same bits.

use super::avx2::{self, check_float, fetch_ahead};
use super::{Columns, FloatBlock, IntBlock, Kernel, PANELS, TILE_ROWS, Term};
use crate::Buffer;
use crate::isa::Avx512Vnni;
use crate::weights::{Chunk, PANEL, UNIFORM_LEVELS};
use std::arch::x86_64::*;

/// Rows of the tallest tile that keeps what it unpacks: the compiler runs out of registers for taller ones.
const KEPT_ROWS: usize = 10;
/// From as many tokens on float products are this file's.
const FLOAT_ROWS: usize = 6;

impl Kernel for Avx512Vnni {
    const INT_PANELS: usize = PANELS;
    const INT_ROW_STEP: usize = 1;
    /// What a strip has unpacked: a rectangle is one strip.
    type Scratch = Buffer<Chunk>;
    type Floats = Avx512Vnni;

    fn floats(self) -> Avx512Vnni {
        self
    }

    fn int_block(self, block: &IntBlock, bytes: &mut Buffer<Chunk>, acc: &mut [[i32; PANEL]]) {
        let (rows, panels) = (block.rows, block.panels());
        let depth = block.depth();
        assert!(panels.iter().all(|p| p.len() == panels[0].len()) && panels.len() <= PANELS);
        assert!(rows > 0 && acc.len() == panels.len() * rows);
        assert!(block.a.len() >= (rows - 1) * block.stride + depth);
        // SAFETY: the token proves AVX-512 F, BW and VNNI; every token has the chunks' codes.
        unsafe { int_block(block, bytes, acc) }
    }

    fn float_block(self, block: &FloatBlock, scratch: &mut Buffer<f32>, acc: &mut [[f32; PANEL]]) {
        if block.rows < FLOAT_ROWS {
            return self.avx2.float_block(block, scratch, acc);
        }
        check_float(block, acc.len());
        // SAFETY: the token proves AVX2 and AVX-512 F; `check_float` has proved that every token has `depth` values.
        unsafe { float_block(block, scratch, acc) }
    }

    fn fold(self, group: Term, sum: &mut [[f32; PANEL]], begin: bool) {
        // SAFETY: the token proves AVX-512 F.
        unsafe { fold(group, sum, begin) }
    }

    fn finish(self, main: Term, tail: Option<Term>, to: Columns) {
        // SAFETY: the token proves AVX-512 F.
        unsafe {
            match tail {
                Some(tail) => finish([main, tail], to),
                None => finish([main], to),
            }
        }
    }

    fn store(self, sum: &[[f32; PANEL]], scale: &[f32], to: Columns) {
        // SAFETY: the token proves AVX-512 F.
        unsafe { store(sum, scale, to) }
    }
}

#[target_feature(enable = "avx512f")]
fn fold(group: Term, sum: &mut [[f32; PANEL]], begin: bool) {
    let group = Loaded::new(&group, sum.len());
    for (i, sum) in sum.iter_mut().enumerate() {
        let product = group.product(i);
        let before = sum.as_ptr();
        // SAFETY: 16 lanes from and to an array of 16.
        unsafe {
            let total = if begin { product } else { _mm512_add_ps(_mm512_loadu_ps(before), product) };
            _mm512_storeu_ps(sum.as_mut_ptr(), total);
        }
    }
}

#[target_feature(enable = "avx512f")]
fn finish<const N: usize>(terms: [Term; N], to: Columns) {
    let Columns { rect, row, col, accumulate } = to;
    let rows = terms[0].acc.len();
    let mut loaded = [Loaded::new(&terms[0], rows); N];
    for n in 1..N {
        loaded[n] = Loaded::new(&terms[n], rows);
    }
    for i in 0..rows {
        let mut sum = _mm512_setzero_ps();
        for (n, term) in loaded.iter().enumerate() {
            let scaled = _mm512_mul_ps(_mm512_set1_ps(term.scale[i]), term.product(i));
            sum = if n == 0 { scaled } else { _mm512_add_ps(sum, scaled) };
        }
        store_row(sum, &mut rect.row_mut(row + i)[col..], accumulate);
    }
}

#[target_feature(enable = "avx512f")]
fn store(sum: &[[f32; PANEL]], scale: &[f32], to: Columns) {
    let Columns { rect, row, col, accumulate } = to;
    for (i, (sum, scale)) in sum.iter().zip(scale).enumerate() {
        // SAFETY: 16 lanes from an array of 16.
        let sum = unsafe { _mm512_mul_ps(_mm512_set1_ps(*scale), _mm512_loadu_ps(sum.as_ptr())) };
        store_row(sum, &mut rect.row_mut(row + i)[col..], accumulate);
    }
}

/// A [`Term`] of some tokens, with what its channels have in registers.
#[derive(Clone, Copy)]
struct Loaded<'a> {
    acc: &'a [[i32; PANEL]],
    channel_scale: __m512,
    colsum: __m512i,
    zero: &'a [i32],
    scale: &'a [f32],
}

impl<'a> Loaded<'a> {
    #[target_feature(enable = "avx512f")]
    fn new(term: &Term<'a>, rows: usize) -> Self {
        Loaded {
            acc: &term.acc[..rows],
            // SAFETY: 16 lanes from an array of 16.
            channel_scale: unsafe { _mm512_loadu_ps(term.channel_scale.as_ptr()) },
            // SAFETY: as above.
            colsum: unsafe { _mm512_loadu_si512(term.colsum.as_ptr().cast()) },
            zero: &term.zero[..rows],
            scale: &term.scale[..rows],
        }
    }

    /// Token i's sums of a group, scaled.
    #[target_feature(enable = "avx512f")]
    fn product(&self, i: usize) -> __m512 {
        let offset = _mm512_mullo_epi32(_mm512_set1_epi32(self.zero[i]), self.colsum);
        // SAFETY: 16 lanes from an array of 16.
        let sum = _mm512_sub_epi32(unsafe { _mm512_loadu_si512(self.acc[i].as_ptr().cast()) }, offset);
        _mm512_mul_ps(self.channel_scale, _mm512_cvtepi32_ps(sum))
    }
}

/// A token's numbers, to the lanes that y has.
#[target_feature(enable = "avx512f")]
fn store_row(mut v: __m512, y: &mut [f32], accumulate: bool) {
    let mask = if y.len() < PANEL { (1u16 << y.len()) - 1 } else { u16::MAX };
    // SAFETY: of y, only the lanes that it has.
    unsafe {
        if accumulate {
            v = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y.as_ptr()), v);
        }
        _mm512_mask_storeu_ps(y.as_mut_ptr(), mask, v);
    }
}

/// Unsafe contract of the functions below: `a` points to rows that lie `stride` apart, as many as `acc` has for each panel (or R), and each
/// has as many codes as a panel's chunks have inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn int_block(block: &IntBlock, bytes: &mut Buffer<Chunk>, acc: &mut [[i32; PANEL]]) {
    let (a, stride, rows, begin) = (block.a.as_ptr(), block.stride, block.rows, block.begin);
    let (mut panels, mut row) = (block.panels, 0);
    if block.nibbles {
        let tiles = rows.div_ceil(TILE_ROWS);
        row = if tiles == 1 { rows } else { rows.div_ceil(tiles).min(KEPT_ROWS) };
        let quads = block.depth() / 4;
        bytes.resize(if tiles == 1 { 0 } else { block.count * quads });
        let mut kept = bytes.chunks_exact_mut(quads);
        for (panel, acc) in panels[..block.count].iter_mut().zip(acc.chunks_exact_mut(rows)) {
            let (w, levels, acc) = (*panel, block.levels, &mut acc[..row]);
            macro_rules! tiles {
                ($($height:literal $chains:literal),*; $($first:literal $first_chains:literal),*) => {
                    // SAFETY: forwarded.
                    unsafe {
                        match (row, kept.next()) {
                            (1, None) => nibbles(w, levels, a, acc, begin),
                            $(($height, None) => {
                                nibble_tile::<$height, $chains, false>(w, levels, a, stride, acc, begin, &mut [])
                            })*
                            $(($first, Some(bytes)) => {
                                nibble_tile::<$first, $first_chains, true>(w, levels, a, stride, acc, begin, bytes);
                                *panel = bytes;
                            })*
                            _ => unreachable!("one tile has 1 to {TILE_ROWS} rows, the first of some 7 to {KEPT_ROWS}"),
                        }
                    }
                };
            }
            tiles!(2 2, 3 2, 4 2, 5 2, 6 2, 7 2, 8 2, 9 1, 10 1, 11 1, 12 1; 7 2, 8 2, 9 1, 10 1);
        }
    }
    for tiles in (1..=(rows - row).div_ceil(TILE_ROWS)).rev() {
        let (height, fetch) = ((rows - row).div_ceil(tiles), row == 0);
        macro_rules! tiles {
            ($($height:literal $chains:literal),*) => {
                // SAFETY: forwarded; the tile's rows start `row` rows on.
                unsafe {
                    let a = a.add(row * stride);
                    match (height, block.count) {
                        $(
                            ($height, 1) => tile::<$height, $chains, 1>(panels, a, stride, acc, row, rows, begin, fetch),
                            ($height, _) => tile::<$height, $chains, 2>(panels, a, stride, acc, row, rows, begin, fetch),
                        )*
                        _ => unreachable!("a tile has 1 to {TILE_ROWS} rows"),
                    }
                }
            };
        }
        tiles!(1 4, 2 2, 3 2, 4 1, 5 1, 6 1, 7 1, 8 1, 9 1, 10 1, 11 1, 12 1);
        row += height;
    }
}

#[target_feature(enable = "avx512f")]
fn load(chunk: &Chunk) -> __m512i {
    // SAFETY: a chunk is 64 aligned bytes.
    unsafe { _mm512_load_si512(chunk.0.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn store_chunk(quad: __m512i, to: &mut Chunk) {
    // SAFETY: a chunk is 64 aligned bytes.
    unsafe { _mm512_store_si512(to.0.as_mut_ptr().cast(), quad) };
}

/// The levels in every 128-bit lane, to be looked up.
#[target_feature(enable = "avx512f")]
fn table(levels: &[i8; 16]) -> __m512i {
    // SAFETY: 16 bytes from an array of 16.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(levels.as_ptr().cast()) })
}

/// What the quads in the low and in the high nibbles stand for.
#[target_feature(enable = "avx512f,avx512bw")]
fn unpack(chunk: &Chunk, table: __m512i) -> [__m512i; 2] {
    let mask = _mm512_set1_epi8(15);
    let v = load(chunk);
    let high = _mm512_srli_epi16::<4>(v);
    [
        _mm512_shuffle_epi8(table, _mm512_and_si512(v, mask)),
        _mm512_shuffle_epi8(table, _mm512_and_si512(high, mask)),
    ]
}

/// Nibble chunks to twice as many byte chunks.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn expand(w: &[Chunk], levels: &[i8; 16], bytes: &mut [Chunk]) {
    let table = table(levels);
    for (chunk, pair) in w.iter().zip(bytes.as_chunks_mut::<2>().0) {
        fetch_ahead(chunk);
        for (quad, to) in unpack(chunk, table).into_iter().zip(pair) {
            store_chunk(quad, to);
        }
    }
}

/// A quad of activation codes in every 32-bit lane.
#[target_feature(enable = "avx512f")]
unsafe fn quad(a: *const u8) -> __m512i {
    // SAFETY: the caller's row has 4 codes there.
    _mm512_set1_epi32(unsafe { a.cast::<i32>().read_unaligned() })
}

/// Of some chains of sums.
#[target_feature(enable = "avx512f")]
fn total<const CHAINS: usize>(sums: &[__m512i; CHAINS]) -> __m512i {
    let mut total = sums[0];
    for sum in &sums[1..] {
        total = _mm512_add_epi32(total, *sum);
    }
    total
}

#[target_feature(enable = "avx512f")]
fn add_to(acc: &mut [i32; PANEL], v: __m512i, begin: bool) {
    let p: *mut __m512i = acc.as_mut_ptr().cast();
    // SAFETY: 16 lanes from and to an array of 16.
    unsafe {
        let sum = if begin { v } else { _mm512_add_epi32(_mm512_loadu_si512(p.cast_const()), v) };
        _mm512_storeu_si512(p, sum);
    }
}

/// Byte chunks of the first P panels times R tokens, the ones from `row` on of the `rows` that acc has for each panel, with so many chains of sums for each
/// token and panel. fetch: whether chunks are asked for ahead.
#[target_feature(enable = "avx512f,avx512vnni")]
#[allow(clippy::too_many_arguments)]
unsafe fn tile<const R: usize, const CHAINS: usize, const P: usize>(
    panels: [&[Chunk]; PANELS],
    a: *const u8,
    stride: usize,
    acc: &mut [[i32; PANEL]],
    row: usize,
    rows: usize,
    begin: bool,
    fetch: bool,
) {
    let quads = panels[0].len();
    let panels: [&[Chunk]; P] = std::array::from_fn(|p| &panels[p][..quads]);
    let mut sum = [[[_mm512_setzero_si512(); CHAINS]; R]; P];
    let mut w = [_mm512_setzero_si512(); P];
    for first in (0..quads).step_by(CHAINS) {
        for chain in 0..CHAINS {
            let q = first + chain;
            if q >= quads {
                break;
            }
            for p in 0..P {
                if fetch {
                    fetch_ahead(&panels[p][q]);
                }
                w[p] = load(&panels[p][q]);
            }
            for r in 0..R {
                // SAFETY: the row has as many quads as there are chunks.
                let x = unsafe { quad(a.add(r * stride + 4 * q)) };
                for p in 0..P {
                    sum[p][r][chain] = _mm512_dpbusd_epi32(sum[p][r][chain], x, w[p]);
                }
            }
        }
    }
    for p in 0..P {
        for r in 0..R {
            add_to(&mut acc[p * rows + row + r], total(&sum[p][r]), begin);
        }
    }
}

/// Nibble chunks of a panel times R tokens, unpacked in registers, with one or two chains of sums for each token; KEEP: and stored to `bytes`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn nibble_tile<const R: usize, const CHAINS: usize, const KEEP: bool>(
    w: &[Chunk],
    levels: &[i8; 16],
    a: *const u8,
    stride: usize,
    acc: &mut [[i32; PANEL]],
    begin: bool,
    bytes: &mut [Chunk],
) {
    let table = table(levels);
    let mut sum = [[_mm512_setzero_si512(); CHAINS]; R];
    assert!(!KEEP || bytes.len() == 2 * w.len());
    let bytes = bytes.as_mut_ptr();
    for (j, chunk) in w.iter().enumerate() {
        fetch_ahead(chunk);
        let quads = unpack(chunk, table);
        if KEEP {
            // SAFETY: there are two byte chunks for each, by the assertion above; to check it here makes the compiler keep codes on the stack.
            unsafe {
                store_chunk(quads[0], &mut *bytes.add(2 * j));
                store_chunk(quads[1], &mut *bytes.add(2 * j + 1));
            }
        }
        for (i, w) in quads.into_iter().enumerate() {
            for r in 0..R {
                // SAFETY: the row has two quads for each chunk.
                let x = unsafe { quad(a.add(r * stride + 8 * j + 4 * i)) };
                sum[r][i % CHAINS] = _mm512_dpbusd_epi32(sum[r][i % CHAINS], x, w);
            }
        }
    }
    for r in 0..R {
        add_to(&mut acc[r], total(&sum[r]), begin);
    }
}

/// Nibble chunks of a panel times one token, unpacked in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn nibbles(w: &[Chunk], levels: &[i8; 16], a: *const u8, acc: &mut [[i32; PANEL]], begin: bool) {
    let table = table(levels);
    let mut sum = [_mm512_setzero_si512(); 4];
    let (pairs, last) = w.as_chunks::<2>();
    for (j, pair) in pairs.iter().enumerate() {
        for chunk in pair {
            fetch_ahead(chunk);
        }
        let [u, v] = [unpack(&pair[0], table), unpack(&pair[1], table)];
        for (i, w) in [u[0], u[1], v[0], v[1]].into_iter().enumerate() {
            // SAFETY: the row has four quads for each pair of chunks.
            sum[i] = _mm512_dpbusd_epi32(sum[i], unsafe { quad(a.add(16 * j + 4 * i)) }, w);
        }
    }
    for chunk in last {
        for (i, w) in unpack(chunk, table).into_iter().enumerate() {
            // SAFETY: the row has two quads for each chunk.
            sum[i] = _mm512_dpbusd_epi32(sum[i], unsafe { quad(a.add(16 * pairs.len() + 4 * i)) }, w);
        }
    }
    add_to(&mut acc[0], total(&sum), begin);
}

/// Float products, summed in the order of the AVX2 code.
///
/// # Safety
/// Every row of the block must have `depth` values.
#[target_feature(enable = "avx2,avx512f")]
unsafe fn float_block(block: &FloatBlock, scratch: &mut Buffer<f32>, acc: &mut [[f32; PANEL]]) {
    let (depth, stride, mut bytes) = (block.depth, block.stride, Buffer::default());
    let (first, second) = if !block.nibbles {
        avx2::widened::<false>(block.w, depth, scratch)
    } else if *block.levels == UNIFORM_LEVELS {
        avx2::widened::<true>(block.w, depth, scratch)
    } else {
        avx2::expand(block.w, block.levels, &mut bytes);
        avx2::widened::<false>(&bytes, depth, scratch)
    };
    let mut row = 0;
    while row < acc.len() {
        macro_rules! tiles {
            ($($height:literal),*) => {
                match acc.len() - row {
                    $($height.. => {
                        // SAFETY: forwarded; the tile's rows start `row` rows on, and the second half's values behind the first's.
                        unsafe {
                            let x = block.x.as_ptr().add(row * stride);
                            float_tile::<$height>(first, x, stride, &mut acc[row..]);
                            float_tile::<$height>(second, x.add(first.len()), stride, &mut acc[row..]);
                        }
                        row += $height;
                    })*
                    0 => {}
                }
            };
        }
        tiles!(12, 8, 6, 4, 2, 1);
    }
}

/// Widened weights, `[depth, 16]`, times R rows, added to the first R of acc.
///
/// # Safety
/// `x` must point to R rows, `stride` apart, of as many values as there are weights.
#[target_feature(enable = "avx512f")]
unsafe fn float_tile<const R: usize>(
    w: &[[f32; PANEL]],
    x: *const f32,
    stride: usize,
    acc: &mut [[f32; PANEL]],
) {
    let mut sum = [_mm512_setzero_ps(); R];
    for (k, w) in w.iter().enumerate() {
        // SAFETY: 16 weights; the row has as many values as there are weights.
        unsafe {
            let w = _mm512_loadu_ps(w.as_ptr());
            for r in 0..R {
                sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(*x.add(r * stride + k)), w, sum[r]);
            }
        }
    }
    for (sum, acc) in sum.iter().zip(acc) {
        // SAFETY: 16 lanes from and to an array of 16.
        unsafe { _mm512_storeu_ps(acc.as_mut_ptr(), _mm512_add_ps(_mm512_loadu_ps(acc.as_ptr()), *sum)) };
    }
}
