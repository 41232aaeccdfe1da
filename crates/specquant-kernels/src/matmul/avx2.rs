//! AVX2 kernels.
//!
//! Integer: `vpmaddubsw` multiplies unsigned activation codes with signed weight codes and adds pairs in i16. As many steps
//! stay in i16 as cannot overflow (u4 × s4: 136, u8 × s4: 8), then `vpmaddwd` widens. u8 × s8 would overflow in the first step
//! and takes `vpmaddwd` on widened codes; for u7 times levels see [`levels`]. Nibbles are looked up among their 16 levels. Up to 4 tokens unpack
//! nibbles in registers, where several steps stay in i16; otherwise tokens share one unpacking.
//!
//! Float: a 32-bit lane holds a channel's quad; codes become floats where they stand in the lane (see [`widen`]).

mod levels;

use super::{Columns, FloatBlock, IntBlock, Kernel, Term, finish, fold, i16_steps, store as store_sums};
use crate::Buffer;
use crate::isa::Avx2;
use crate::weights::{Chunk, PANEL, UNIFORM_LEVELS};
use std::arch::x86_64::*;

/// Tokens of a rectangle at most: to unpack weights, and to cut them into runs, costs more than with other instruction sets. Codes of a block are 150 kB then.
const INT_ROWS: usize = 192;

impl Kernel for Avx2 {
    type Scratch = Buffer<Chunk>;
    type Floats = Avx2;
    const INT_STRIP: usize = INT_ROWS;

    fn int_rows(_: usize) -> usize {
        INT_ROWS
    }

    fn floats(self) -> Avx2 {
        self
    }

    fn int_block(self, block: &IntBlock, scratch: &mut Buffer<Chunk>, acc: &mut [[i32; PANEL]]) {
        block.clear(acc);
        for (panel, acc) in block.panels().iter().zip(acc.chunks_exact_mut(block.rows)) {
            let depth = panel.len() * if block.nibbles { 8 } else { 4 };
            check(block.a.len(), block.stride, block.rows, depth, acc.len());
            // SAFETY: the token proves AVX2; `check` has proved that every token has the codes that the chunks ask for.
            unsafe { int_block(block, panel, scratch, acc) }
        }
    }

    fn float_block(self, block: &FloatBlock, scratch: &mut Buffer<f32>, acc: &mut [[f32; PANEL]]) {
        check_float(block, acc.len());
        // SAFETY: the token proves AVX2 and FMA; `check_float` has proved that every token has `depth` values.
        unsafe {
            if block.nibbles && *block.levels != UNIFORM_LEVELS {
                // The trick that widens nibbles where they stand takes them for numbers; bytes it takes as they are.
                let mut bytes = Buffer::default();
                expand(block.w, block.levels, &mut bytes);
                float_block::<false>(&FloatBlock { w: &bytes, nibbles: false, ..*block }, scratch, acc);
            } else if block.nibbles {
                float_block::<true>(block, scratch, acc);
            } else {
                float_block::<false>(block, scratch, acc);
            }
        }
    }

    fn fold(self, group: Term, sum: &mut [[f32; PANEL]], begin: bool) {
        #[target_feature(enable = "avx2")]
        fn fold_avx2(group: Term, sum: &mut [[f32; PANEL]], begin: bool) {
            if begin { fold(group, sum, true) } else { fold(group, sum, false) }
        }
        // SAFETY: the token proves AVX2.
        unsafe { fold_avx2(group, sum, begin) }
    }

    fn finish(self, main: Term, tail: Option<Term>, to: Columns) {
        #[target_feature(enable = "avx2")]
        fn finish_avx2(main: Term, tail: Option<Term>, to: Columns) {
            finish(main, tail, to);
        }
        // SAFETY: the token proves AVX2.
        unsafe { finish_avx2(main, tail, to) }
    }

    fn store(self, sum: &[[f32; PANEL]], scale: &[f32], to: Columns) {
        #[target_feature(enable = "avx2")]
        fn store_avx2(sum: &[[f32; PANEL]], scale: &[f32], to: Columns) {
            store_sums(sum, scale, to);
        }
        // SAFETY: the token proves AVX2.
        unsafe { store_avx2(sum, scale, to) }
    }
}

/// Asserts that `rows` rows of `depth` values lie `stride` apart in a buffer, and have accumulators.
pub(super) fn check(len: usize, stride: usize, rows: usize, depth: usize, acc: usize) {
    assert!(rows > 0 && acc == rows && len >= (rows - 1) * stride + depth);
}

/// [`check`] of a float block, whose chunks are as many as its depth asks for.
pub(super) fn check_float(block: &FloatBlock, acc: usize) {
    check(block.x.len(), block.stride, block.rows, block.depth, acc);
    assert_eq!(block.w.len(), block.depth.div_ceil(8) * if block.nibbles { 1 } else { 2 });
}

/// Unsafe contract of the functions below: `a` points to rows that lie `stride` apart, as many as `acc` has (or R), and each
/// has as many values as the chunks have inputs.
#[target_feature(enable = "avx2")]
unsafe fn int_block(block: &IntBlock, w: &[Chunk], scratch: &mut Buffer<Chunk>, acc: &mut [[i32; PANEL]]) {
    let (a, stride) = (block.a.as_ptr(), block.stride);
    let steps = i16_steps(block.a_max, block.w_max);
    // SAFETY: forwarded.
    unsafe {
        if !block.nibbles {
            for_tiles(w, a, stride, steps, acc);
        } else if steps < 2 && levels::fits(block.a_max, block.w_max) {
            levels::int_block(w, block.levels, a, stride, scratch, acc);
        } else if block.rows <= 4 && steps >= 2 {
            match block.rows {
                1 => nibbles::<1>(w, block.levels, a, stride, steps, acc),
                2 => nibbles::<2>(w, block.levels, a, stride, steps, acc),
                3 => nibbles::<3>(w, block.levels, a, stride, steps, acc),
                _ => nibbles::<4>(w, block.levels, a, stride, steps, acc),
            }
        } else {
            expand(w, block.levels, scratch);
            for_tiles(scratch, a, stride, steps, acc);
        }
    }
}

#[target_feature(enable = "avx2")]
unsafe fn for_tiles(w: &[Chunk], a: *const u8, stride: usize, steps: usize, acc: &mut [[i32; PANEL]]) {
    for (i, acc) in acc.chunks_mut(4).enumerate() {
        // SAFETY: forwarded; the tile's rows start 4 i rows on.
        unsafe {
            let a = a.add(4 * i * stride);
            match (acc.len(), steps) {
                (4, 0) => wide::<4>(w, a, stride, acc),
                (3, 0) => wide::<3>(w, a, stride, acc),
                (2, 0) => wide::<2>(w, a, stride, acc),
                (_, 0) => wide::<1>(w, a, stride, acc),
                (4, _) => narrow::<4>(w, a, stride, steps, acc),
                (3, _) => narrow::<3>(w, a, stride, steps, acc),
                (2, _) => narrow::<2>(w, a, stride, steps, acc),
                _ => narrow::<1>(w, a, stride, steps, acc),
            }
        }
    }
}

#[target_feature(enable = "avx2")]
pub(super) fn load(chunk: &Chunk) -> [__m256i; 2] {
    // SAFETY: a chunk is 64 aligned bytes.
    unsafe {
        [_mm256_load_si256(chunk.0.as_ptr().cast()), _mm256_load_si256(chunk.0.as_ptr().add(32).cast())]
    }
}

#[target_feature(enable = "avx2")]
fn store_chunk(chunk: &mut Chunk, v: [__m256i; 2]) {
    // SAFETY: a chunk is 64 aligned bytes.
    unsafe {
        _mm256_store_si256(chunk.0.as_mut_ptr().cast(), v[0]);
        _mm256_store_si256(chunk.0.as_mut_ptr().add(32).cast(), v[1]);
    }
}

/// Bytes of weights that are fetched before they are used: the processor's own prefetching stops at every page.
const AHEAD: usize = 4096;

/// Asks for what lies [`AHEAD`] of a chunk.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn fetch_ahead(chunk: &Chunk) {
    // No access: an address beyond the weights does no harm.
    _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(chunk).cast::<i8>().wrapping_add(AHEAD));
}

/// The levels in both 128-bit lanes, to be looked up.
#[target_feature(enable = "avx2")]
pub(super) fn table(levels: &[i8; 16]) -> __m256i {
    // SAFETY: 16 bytes from an array of 16.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(levels.as_ptr().cast()) })
}

/// What the quads in the low and in the high nibbles stand for.
#[target_feature(enable = "avx2")]
pub(super) fn unpack(chunk: &Chunk, table: __m256i) -> [[__m256i; 2]; 2] {
    let mask = _mm256_set1_epi8(15);
    let v = load(chunk);
    let [mut low, mut high] = [v; 2];
    for h in 0..2 {
        low[h] = _mm256_shuffle_epi8(table, _mm256_and_si256(v[h], mask));
        high[h] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16::<4>(v[h]), mask));
    }
    [low, high]
}

/// Nibble chunks to byte chunks.
#[target_feature(enable = "avx2")]
pub(super) fn expand(w: &[Chunk], levels: &[i8; 16], bytes: &mut Buffer<Chunk>) {
    let table = table(levels);
    bytes.resize(2 * w.len());
    for (chunk, pair) in w.iter().zip(bytes.as_chunks_mut::<2>().0) {
        fetch_ahead(chunk);
        for (quad, to) in unpack(chunk, table).into_iter().zip(pair) {
            store_chunk(to, quad);
        }
    }
}

/// A quad of activation codes in every 32-bit lane.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn quad(a: *const u8) -> __m256i {
    // SAFETY: the caller's row has 4 codes there.
    _mm256_set1_epi32(unsafe { a.cast::<i32>().read_unaligned() })
}

#[target_feature(enable = "avx2")]
pub(super) fn add_to(acc: &mut [i32; PANEL], v: [__m256i; 2]) {
    for (half, v) in acc.as_chunks_mut::<8>().0.iter_mut().zip(v) {
        // SAFETY: 8 lanes from and to an array of 8.
        unsafe {
            let p = half.as_mut_ptr().cast();
            _mm256_storeu_si256(p, _mm256_add_epi32(_mm256_loadu_si256(p), v));
        }
    }
}

/// Byte chunks, `steps` quads at a time in i16.
#[target_feature(enable = "avx2")]
unsafe fn narrow<const R: usize>(
    w: &[Chunk],
    a: *const u8,
    stride: usize,
    steps: usize,
    acc: &mut [[i32; PANEL]],
) {
    let (begin, ones) = ([_mm256_setzero_si256(); 2], _mm256_set1_epi16(1));
    for (s, part) in w.chunks(steps).enumerate() {
        // SAFETY: forwarded; the part's quads start 4 · steps · s codes on.
        let sums = unsafe { i16_sums::<R>(begin, part, a.add(4 * steps * s), stride) };
        for (acc, [a, b]) in acc.iter_mut().zip(sums) {
            add_to(acc, [_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)]);
        }
    }
}

/// Sums of two products in every lane, from `begin` on, with byte chunks: what they come to is an i16.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn i16_sums<const R: usize>(
    begin: [__m256i; 2],
    w: &[Chunk],
    a: *const u8,
    stride: usize,
) -> [[__m256i; 2]; R] {
    let mut sum = [begin; R];
    for (q, chunk) in w.iter().enumerate() {
        let w = load(chunk);
        for r in 0..R {
            // SAFETY: the row has as many quads as there are chunks.
            let x = unsafe { quad(a.add(r * stride + 4 * q)) };
            for h in 0..2 {
                sum[r][h] = _mm256_add_epi16(sum[r][h], _mm256_maddubs_epi16(x, w[h]));
            }
        }
    }
    sum
}

/// Nibble chunks, `steps` quads at a time in i16, unpacked in registers.
#[target_feature(enable = "avx2")]
unsafe fn nibbles<const R: usize>(
    w: &[Chunk],
    levels: &[i8; 16],
    a: *const u8,
    stride: usize,
    steps: usize,
    acc: &mut [[i32; PANEL]],
) {
    let ones = _mm256_set1_epi16(1);
    let table = table(levels);
    let steps = steps / 2; // a chunk is two quads; u8 × s4 has 8 steps, others more
    for (s, part) in w.chunks(steps).enumerate() {
        let mut sum = [[_mm256_setzero_si256(); 2]; R];
        for (j, chunk) in part.iter().enumerate() {
            fetch_ahead(chunk);
            for (q, w) in unpack(chunk, table).into_iter().enumerate() {
                for r in 0..R {
                    // SAFETY: the row has two quads for each chunk.
                    let x = unsafe { quad(a.add(r * stride + 8 * (s * steps + j) + 4 * q)) };
                    for h in 0..2 {
                        sum[r][h] = _mm256_add_epi16(sum[r][h], _mm256_maddubs_epi16(x, w[h]));
                    }
                }
            }
        }
        for r in 0..R {
            let [a, b] = sum[r];
            add_to(&mut acc[r], [_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)]);
        }
    }
}

/// Byte chunks in i32: even and odd inputs of a quad are widened to i16 pairs.
#[target_feature(enable = "avx2")]
unsafe fn wide<const R: usize>(w: &[Chunk], a: *const u8, stride: usize, acc: &mut [[i32; PANEL]]) {
    let low = _mm256_set1_epi16(255);
    let mut sum = [[_mm256_setzero_si256(); 2]; R];
    for (q, chunk) in w.iter().enumerate() {
        let w = load(chunk);
        let [mut even, mut odd] = [w; 2];
        for h in 0..2 {
            even[h] = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(w[h]));
            odd[h] = _mm256_srai_epi16::<8>(w[h]);
        }
        for r in 0..R {
            // SAFETY: the row has as many quads as there are chunks.
            let x = unsafe { quad(a.add(r * stride + 4 * q)) };
            let (x0, x1) = (_mm256_and_si256(x, low), _mm256_srli_epi16::<8>(x));
            for h in 0..2 {
                let v = _mm256_add_epi32(_mm256_madd_epi16(x0, even[h]), _mm256_madd_epi16(x1, odd[h]));
                sum[r][h] = _mm256_add_epi32(sum[r][h], v);
            }
        }
    }
    for r in 0..R {
        add_to(&mut acc[r], sum[r]);
    }
}

/// 16 channels of f32.
type Wide = [__m256; 2];

/// The codes of 8 inputs, as f32: group `j` of the chunks.
///
/// A code `u` that is made unsigned and stands at bit `p` of its lane, under the exponent of 2^(23 − p), is the float
/// 2^(23 − p) + u: a mask, an exponent and a subtraction, all exact, where shifts and conversions would share one port.
#[inline]
#[target_feature(enable = "avx2")]
fn widen<const NIBBLES: bool>(w: &[Chunk], j: usize) -> [Wide; 8] {
    /// The codes at bit P.
    #[target_feature(enable = "avx2")]
    fn codes<const P: u32, const BITS: u32>(v: [__m256i; 2]) -> Wide {
        let mask = _mm256_set1_epi32(((1 << BITS) - 1) << P);
        let base = (1u32 << (23 - P)) as f32;
        let exponent = _mm256_set1_epi32(base.to_bits() as i32);
        let offset = _mm256_set1_ps(base + (1u32 << (BITS - 1)) as f32);
        let mut wide = [offset; 2];
        for h in 0..2 {
            let v = _mm256_or_si256(_mm256_and_si256(v[h], mask), exponent);
            wide[h] = _mm256_sub_ps(_mm256_castsi256_ps(v), offset);
        }
        wide
    }
    #[target_feature(enable = "avx2")]
    fn upper([a, b]: [__m256i; 2]) -> [__m256i; 2] {
        [_mm256_srli_epi32::<16>(a), _mm256_srli_epi32::<16>(b)]
    }
    /// Signed bytes, made unsigned.
    #[target_feature(enable = "avx2")]
    fn flipped(chunk: &Chunk) -> [__m256i; 2] {
        let flip = _mm256_set1_epi8(i8::MIN);
        let [a, b] = load(chunk);
        [_mm256_xor_si256(a, flip), _mm256_xor_si256(b, flip)]
    }
    // The upper halves of the lanes would reach into the exponent.
    if NIBBLES {
        let u = load(&w[j]);
        let v = upper(u);
        [
            codes::<0, 4>(u),
            codes::<8, 4>(u),
            codes::<0, 4>(v),
            codes::<8, 4>(v),
            codes::<4, 4>(u),
            codes::<12, 4>(u),
            codes::<4, 4>(v),
            codes::<12, 4>(v),
        ]
    } else {
        let [t, v] = [flipped(&w[2 * j]), flipped(&w[2 * j + 1])];
        let [u, w] = [upper(t), upper(v)];
        [
            codes::<0, 8>(t),
            codes::<8, 8>(t),
            codes::<0, 8>(u),
            codes::<8, 8>(u),
            codes::<0, 8>(v),
            codes::<8, 8>(v),
            codes::<0, 8>(w),
            codes::<8, 8>(w),
        ]
    }
}

/// The weights of a block of this depth as f32, `[depth, 16]`, in the two halves that sum on their own.
#[target_feature(enable = "avx2")]
pub(super) fn widened<'a, const NIBBLES: bool>(
    w: &[Chunk],
    depth: usize,
    scratch: &'a mut Buffer<f32>,
) -> (&'a [[f32; PANEL]], &'a [[f32; PANEL]]) {
    scratch.resize(depth.next_multiple_of(8) * PANEL);
    for (j, to) in scratch.as_chunks_mut::<{ 8 * PANEL }>().0.iter_mut().enumerate() {
        for (to, w) in to.as_chunks_mut::<PANEL>().0.iter_mut().zip(widen::<NIBBLES>(w, j)) {
            // SAFETY: 16 lanes to an array of 16.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), w[0]);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), w[1]);
            }
        }
    }
    scratch.as_chunks::<PANEL>().0[..depth].split_at(8 * half(depth))
}

#[target_feature(enable = "avx2,fma")]
unsafe fn float_block<const NIBBLES: bool>(
    block: &FloatBlock,
    scratch: &mut Buffer<f32>,
    acc: &mut [[f32; PANEL]],
) {
    let (x, stride, depth) = (block.x.as_ptr(), block.stride, block.depth);
    // SAFETY: forwarded: every row has `depth` values.
    unsafe {
        match acc.len() {
            1 => return float_few::<1, NIBBLES>(block, acc),
            2 => return float_few::<2, NIBBLES>(block, acc),
            3 => return float_few::<3, NIBBLES>(block, acc),
            _ => {}
        }
        let (first, second) = widened::<NIBBLES>(block.w, depth, scratch);
        for (i, acc) in acc.chunks_mut(TILE).enumerate() {
            let x = x.add(TILE * i * stride);
            for (w, x) in [(first, x), (second, x.add(first.len()))] {
                match acc.len() {
                    TILE => float_tile::<TILE>(w, x, stride, acc),
                    5 => float_tile::<5>(w, x, stride, acc),
                    4 => float_tile::<4>(w, x, stride, acc),
                    3 => float_tile::<3>(w, x, stride, acc),
                    2 => float_tile::<2>(w, x, stride, acc),
                    _ => float_tile::<1>(w, x, stride, acc),
                }
            }
        }
    }
}

/// Rows of a float tile: 12 accumulators, two registers of weights and one of x.
const TILE: usize = 6;

/// Groups of 8 inputs in the first half of a block. The halves sum on their own, so that few rows have more chains of additions.
fn half(depth: usize) -> usize {
    depth / 16
}

/// Widened weights `[depth, 16]`.
#[target_feature(enable = "avx2,fma")]
unsafe fn float_tile<const R: usize>(
    w: &[[f32; PANEL]],
    x: *const f32,
    stride: usize,
    acc: &mut [[f32; PANEL]],
) {
    let mut sum = [[_mm256_setzero_ps(); 2]; R];
    for (k, w) in w.iter().enumerate() {
        // SAFETY: 16 weights; the row has as many values as there are weights.
        unsafe {
            let w = [_mm256_loadu_ps(w.as_ptr()), _mm256_loadu_ps(w.as_ptr().add(8))];
            for r in 0..R {
                fma(&mut sum[r], _mm256_broadcast_ss(&*x.add(r * stride + k)), w);
            }
        }
    }
    store(&sum, acc);
}

/// Few rows: weights are widened in registers.
#[target_feature(enable = "avx2,fma")]
unsafe fn float_few<const R: usize, const NIBBLES: bool>(block: &FloatBlock, acc: &mut [[f32; PANEL]]) {
    let (half, groups) = (half(block.depth), block.depth / 8);
    let mut sums = [[[_mm256_setzero_ps(); 2]; R]; 2];
    let group = |sum: &mut [Wide; R], j: usize| {
        for (i, w) in widen::<NIBBLES>(block.w, j).into_iter().enumerate() {
            for r in 0..R {
                // SAFETY: the row has the block's depth, which ends after group j.
                let x = unsafe { _mm256_broadcast_ss(&*block.x.as_ptr().add(r * block.stride + 8 * j + i)) };
                fma(&mut sum[r], x, w);
            }
        }
    };
    let [first, second] = &mut sums;
    if R <= 2 {
        for j in 0..half {
            group(first, j);
            group(second, half + j);
        }
    } else {
        // One half after the other: the accumulators of both would not fit the registers.
        (0..half).for_each(|j| group(first, j));
        (half..2 * half).for_each(|j| group(second, j));
    }
    (2 * half..groups).for_each(|j| group(second, j));
    if !block.depth.is_multiple_of(8) {
        let w = widen::<NIBBLES>(block.w, groups);
        for (k, w) in (8 * groups..block.depth).zip(w) {
            for r in 0..R {
                fma(&mut second[r], _mm256_set1_ps(block.x[r * block.stride + k]), w);
            }
        }
    }
    for sum in &sums {
        store(sum, acc);
    }
}

#[target_feature(enable = "avx2,fma")]
fn fma(sum: &mut Wide, x: __m256, w: Wide) {
    *sum = [_mm256_fmadd_ps(x, w[0], sum[0]), _mm256_fmadd_ps(x, w[1], sum[1])];
}

/// Adds to the accumulators.
#[target_feature(enable = "avx2")]
fn store<const R: usize>(sum: &[Wide; R], acc: &mut [[f32; PANEL]]) {
    for (sum, acc) in sum.iter().zip(acc) {
        for (half, v) in acc.as_chunks_mut::<8>().0.iter_mut().zip(sum) {
            // SAFETY: 8 lanes from and to an array of 8.
            unsafe { _mm256_storeu_ps(half.as_mut_ptr(), _mm256_add_ps(_mm256_loadu_ps(half.as_ptr()), *v)) };
        }
    }
}
