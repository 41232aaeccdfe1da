//! Quantized weights in the layout that every integer kernel reads.
//!
//! A *panel* is 16 output channels. Its codes stand in *chunks* of 64 bytes:
//!
//! - 5 to 8 bits: a chunk holds 4 consecutive inputs (a *quad*) of 16 channels, byte `4c + i` is input `i` of channel `c`, signed.
//! - 2 to 4 bits: a chunk holds two quads, the first in the low nibbles and the second in the high nibbles, each a number of 16 levels: −8 … 7, or
//!   any others ([`PackedWeights::pack_levels`]); kernels look them up as they unpack.
//!
//! So a chunk is a 512-bit register whose 32-bit lanes are channels: what `vpdpbusd` and `vpmaddubsw` + `vpmaddwd` sum into.
//! Inputs are padded to a multiple of 8 with code 0, channels to a multiple of 16. Scales and sums of codes stand as
//! `[panel, group, 16]`.

use crate::buffer::element;
use crate::{KernelError, for_each_chunk};
use rayon::prelude::*;

/// Output channels of a panel.
pub(crate) const PANEL: usize = 16;
/// Bits that a code has at most if two share a byte.
const NIBBLE: u8 = 4;

/// 64 bytes of codes, aligned to a cache line.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Chunk(pub(crate) [u8; 64]);

element!(Chunk, Chunk([0; 64]));

/// The levels of plain 4-bit codes.
pub const UNIFORM_LEVELS: [i8; 16] = [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7];

/// The 16 levels that represent a Gaussian weight with the least squared error (Max, IRE Trans. Inf. Theory 6, 1960: ± 0.1284, 0.3881, 0.6568, 0.9424,
/// 1.2562, 1.6181, 2.0690, 2.7326 standard deviations), in units of 1/127 of the largest. Evenly spaced ones have 1.21 times their error.
pub const GAUSSIAN_LEVELS: [i8; 16] =
    [-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127];

/// For every number from `first` on, the number of the level nearest to it; half-way the one away from zero.
pub(crate) const fn nearest_levels<const N: usize>(levels: &[i8; 16], first: i32) -> [u8; N] {
    let mut nearest = [0; N];
    let mut at = 0;
    while at < N {
        let value = first + at as i32;
        let (mut best, mut i) = (0, 1);
        while i < 16 {
            let (old, new) = (levels[best] as i32 - value, levels[i] as i32 - value);
            if new.abs() < old.abs() || new.abs() == old.abs() && value > 0 {
                best = i;
            }
            i += 1;
        }
        nearest[at] = best as u8;
        at += 1;
    }
    nearest
}

/// For every number of −128 to 127, the nearest of [`GAUSSIAN_LEVELS`]; zero, half-way between two levels, becomes the negative one.
pub const NEAREST_LEVEL: [i8; 256] = {
    let (numbers, mut levels, mut i) = (nearest_levels::<256>(&GAUSSIAN_LEVELS, -128), [0; 256], 0);
    while i < levels.len() {
        levels[i] = GAUSSIAN_LEVELS[numbers[i] as usize];
        i += 1;
    }
    levels
};

/// Weight matrix `[out, in]` of signed integer codes with one scale per output channel and group of inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedWeights {
    out: usize,
    inp: usize,
    bits: u8,
    group_size: usize,
    /// Of an input.
    groups: usize,
    /// What nibbles stand for.
    levels: [i8; 16],
    /// Largest magnitude that a code can have.
    largest: i32,
    chunks: Vec<Chunk>,
    panel_chunks: usize,
    scales: Vec<Scales>,
}

/// What a panel's channels have in a group: their scales, and the sums of their codes, which an activation's zero point is multiplied with.
pub(crate) type Scales = ([f32; PANEL], [i32; PANEL]);

impl PackedWeights {
    /// Packs codes and scales.
    ///
    /// - `codes`: `[out, inp]`, within the signed range of `bits` (2 to 8).
    /// - `scales`: `[out, inp / group_size]`, finite and not negative.
    /// - `group_size`: `inp` for one scale per channel; otherwise a divisor of `inp` and a multiple of 8.
    pub fn pack(
        codes: &[i8],
        scales: &[f32],
        out: usize,
        inp: usize,
        bits: u8,
        group_size: usize,
    ) -> Result<Self, KernelError> {
        if !(2..=8).contains(&bits) {
            return Err(KernelError::Bits { what: "weights", bits });
        }
        let max = ((1i32 << (bits - 1)) - 1) as i8;
        // Of 8 bits every code is one.
        if bits < 8
            && let Some(i) = codes.iter().position(|&q| q > max || q < -max - 1)
        {
            return Err(KernelError::CodeRange {
                code: codes[i],
                row: i / inp.max(1),
                col: i % inp.max(1),
                bits,
            });
        }
        Self::build(codes, scales, [out, inp], bits, group_size, UNIFORM_LEVELS)
    }

    /// As [`pack`](Self::pack) at 4 bits, for codes that are 16 other numbers than −8 … 7: `levels`, in rising order.
    pub fn pack_levels(
        codes: &[i8],
        scales: &[f32],
        out: usize,
        inp: usize,
        group_size: usize,
        levels: &[i8; 16],
    ) -> Result<Self, KernelError> {
        let numbers = numbers(levels);
        let is_none = |q: &i8| numbers[usize::from(*q as u8)] == NO_LEVEL;
        // To stop at the first of them takes three times as long as to look at all.
        if codes.iter().fold(false, |none, q| none | is_none(q))
            && let Some(i) = codes.iter().position(is_none)
        {
            return Err(KernelError::CodeRange {
                code: codes[i],
                row: i / inp.max(1),
                col: i % inp.max(1),
                bits: 4,
            });
        }
        Self::build(codes, scales, [out, inp], 4, group_size, *levels)
    }

    /// Codes are in range.
    fn build(
        codes: &[i8],
        scales: &[f32],
        [out, inp]: [usize; 2],
        bits: u8,
        group_size: usize,
        levels: [i8; 16],
    ) -> Result<Self, KernelError> {
        if group_size == 0
            || inp == 0
            || !inp.is_multiple_of(group_size)
            || (group_size != inp && !group_size.is_multiple_of(8))
        {
            return Err(KernelError::GroupSize { group_size, inp });
        }
        // Beyond it, products with 8-bit activations could overflow an i32.
        let largest = largest(bits, &levels);
        let limit = i32::MAX as usize / (255 * largest as usize);
        if group_size > limit {
            return Err(KernelError::Depth { group_size, bits, limit });
        }
        let groups = inp / group_size;
        check_len("codes", codes.len(), out, inp)?;
        check_len("scales", scales.len(), out, groups)?;
        if let Some(index) = scales.iter().position(|s| !s.is_finite() || *s < 0.) {
            return Err(KernelError::NotFinite { what: "scale", index, value: scales[index].to_string() });
        }

        let (panels, nibbles) = (out.div_ceil(PANEL), bits <= NIBBLE);
        let panel_chunks = chunk_of(nibbles, inp.next_multiple_of(8));
        // Padding: a level near zero; there are no activations to multiply it with.
        let empty = Chunk([if nibbles { 0x88 } else { 0 }; 64]);
        let mut w = PackedWeights {
            out,
            inp,
            bits,
            group_size,
            groups,
            levels,
            largest,
            chunks: vec![empty; panels * panel_chunks],
            panel_chunks,
            scales: vec![Default::default(); panels * groups],
        };
        let numbers = numbers(&levels);
        let rows = codes.par_chunks(PANEL * inp).zip(scales.par_chunks(PANEL * groups));
        let to = w.chunks.par_chunks_mut(panel_chunks).zip(w.scales.par_chunks_mut(groups));
        to.zip(rows).for_each(|((chunks, to_scales), (codes, scales))| {
            for (c, (row, scales)) in codes.chunks_exact(inp).zip(scales.chunks_exact(groups)).enumerate() {
                for ((row, scale), to) in row.chunks_exact(group_size).zip(scales).zip(&mut *to_scales) {
                    to.0[c] = *scale;
                    to.1[c] = row.iter().map(|q| i32::from(*q)).sum();
                }
                if nibbles {
                    let number = |q: i8| numbers[usize::from(q as u8)];
                    let (eights, rest) = row.as_chunks::<8>();
                    for (chunk, q) in chunks.iter_mut().zip(eights) {
                        let bytes = std::array::from_fn(|i| number(q[i]) | number(q[i + 4]) << 4);
                        chunk.0.as_chunks_mut::<4>().0[c] = bytes;
                    }
                    if let (false, Some(chunk)) = (rest.is_empty(), chunks.get_mut(eights.len())) {
                        let bytes = &mut chunk.0[4 * c..4 * c + 4];
                        for (i, q) in rest.iter().enumerate() {
                            let b = &mut bytes[i % 4];
                            *b = if i < 4 { *b & 0xf0 | number(*q) } else { *b & 0x0f | number(*q) << 4 };
                        }
                    }
                } else {
                    for (chunk, quad) in chunks.iter_mut().zip(row.chunks(4)) {
                        let bytes = &mut chunk.0[4 * c..4 * c + quad.len()];
                        bytes.iter_mut().zip(quad).for_each(|(b, q)| *b = *q as u8);
                    }
                }
            }
        });
        Ok(w)
    }

    /// The codes: `[out, in]`.
    pub fn unpack(&self) -> Vec<i8> {
        let mut codes = vec![0; self.out * self.inp];
        let rows = codes.par_chunks_exact_mut(self.inp.max(1)).enumerate();
        rows.for_each(|(n, row)| row.iter_mut().enumerate().for_each(|(k, code)| *code = self.code(n, k)));
        codes
    }

    /// The weights that codes and scales stand for: `[out, in]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut w = vec![0.0; self.out * self.inp];
        self.dequantize_into(&mut w);
        w
    }

    /// As [`dequantize`](Self::dequantize).
    ///
    /// # Panics
    /// If `w` is not `[out, in]`.
    pub fn dequantize_into(&self, w: &mut [f32]) {
        assert_eq!(w.len(), self.out * self.inp, "weights: w is not [{}, {}]", self.out, self.inp);
        let values = self.levels.map(f32::from);
        for_each_chunk(w, self.inp * PANEL, |panel, rows| {
            let chunks = &self.chunks[panel * self.panel_chunks..][..self.panel_chunks];
            for (c, row) in rows.chunks_exact_mut(self.inp).enumerate() {
                let quad = |chunk: &Chunk| std::array::from_fn::<u8, 4, _>(|i| chunk.0[4 * c + i]);
                if self.nibbles() {
                    for (row, quad) in row.chunks_mut(8).zip(chunks.iter().map(quad)) {
                        let codes = quad.iter().map(|b| b & 15).chain(quad.iter().map(|b| b >> 4));
                        row.iter_mut().zip(codes).for_each(|(w, code)| *w = values[usize::from(code)]);
                    }
                } else {
                    for (row, quad) in row.chunks_mut(4).zip(chunks.iter().map(quad)) {
                        row.iter_mut().zip(quad).for_each(|(w, code)| *w = f32::from(code as i8));
                    }
                }
                for (g, row) in row.chunks_exact_mut(self.group_size).enumerate() {
                    let scale = self.scales(panel, g).0[c];
                    row.iter_mut().for_each(|w| *w *= scale);
                }
            }
        });
    }

    fn code(&self, n: usize, k: usize) -> i8 {
        let (chunk, byte, shift) = self.place(n / PANEL, n % PANEL, k);
        let b = self.chunks[chunk].0[byte];
        shift.map_or(b as i8, |s| self.levels[usize::from(b >> s & 15)])
    }

    /// Output channels.
    pub fn out_features(&self) -> usize {
        self.out
    }

    /// Inputs.
    pub fn in_features(&self) -> usize {
        self.inp
    }

    /// Bit width of a code.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// What nibbles stand for.
    pub(crate) fn levels(&self) -> &[i8; 16] {
        &self.levels
    }

    /// Largest magnitude that a code can have.
    pub(crate) fn largest(&self) -> i32 {
        self.largest
    }

    /// Inputs that share a scale; [`in_features`](Self::in_features) for one scale per channel.
    pub fn group_size(&self) -> usize {
        self.group_size
    }

    /// Resident bytes of codes, scales and sums.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.chunks) + size_of_val(&*self.scales)
    }

    /// Whether a code takes a nibble and not a byte.
    pub(crate) fn nibbles(&self) -> bool {
        self.bits <= NIBBLE
    }

    pub(crate) fn groups(&self) -> usize {
        self.groups
    }

    /// The chunks of the inputs from `k` to `end` in a panel; `k` is a multiple of 8, `end` too or the end of the padded input.
    pub(crate) fn chunks(&self, panel: usize, k: usize, end: usize) -> &[Chunk] {
        let end = chunk_of(self.nibbles(), end.next_multiple_of(8));
        &self.chunks[panel * self.panel_chunks..][chunk_of(self.nibbles(), k)..end]
    }

    /// Of a panel and group.
    pub(crate) fn scales(&self, panel: usize, group: usize) -> &Scales {
        &self.scales[panel * self.groups + group]
    }

    /// Chunk, byte and shift (for nibbles) of a code.
    fn place(&self, panel: usize, c: usize, k: usize) -> (usize, usize, Option<u32>) {
        let chunk = panel * self.panel_chunks + chunk_of(self.nibbles(), k);
        let shift = if k % 8 < 4 { 0 } else { 4 };
        (chunk, 4 * c + k % 4, self.nibbles().then_some(shift))
    }
}

/// The chunk of a panel that holds input k.
fn chunk_of(nibbles: bool, k: usize) -> usize {
    k >> if nibbles { 3 } else { 2 }
}

/// In [`numbers`], of what is no level.
const NO_LEVEL: u8 = 255;

/// The number of the level that each byte is as an i8.
fn numbers(levels: &[i8; 16]) -> [u8; 256] {
    let mut numbers = [NO_LEVEL; 256];
    levels.iter().zip(0..).for_each(|(level, number)| numbers[usize::from(*level as u8)] = number);
    numbers
}

/// Largest magnitude of a code; of fewer than 4 bits only some of the levels are used.
fn largest(bits: u8, levels: &[i8; 16]) -> i32 {
    let of_levels = levels.iter().fold(0, |m, l| m.max(i32::from(*l).abs()));
    if bits == 4 { of_levels } else { 1 << (bits - 1) }
}

fn check_len(what: &'static str, got: usize, rows: usize, cols: usize) -> Result<(), KernelError> {
    // Saturating: a product that overflows is no buffer's length.
    let want = rows.saturating_mul(cols);
    if got == want { Ok(()) } else { Err(KernelError::Length { what, got, want }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip(
            out in 0usize..40, groups in 1usize..4, group in 1usize..5, odd in 0usize..8, bits in 2u8..=8, seed in any::<u64>()
        ) {
            let (inp, group) = if odd == 0 { (groups * group * 8, group * 8) } else { (group * 8 + odd, group * 8 + odd) };
            let mut s = seed;
            let mut next = || {
                s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (s >> 33) as usize
            };
            let codes: Vec<i8> = (0..out * inp).map(|_| ((next() % (1 << bits)) as i32 - (1 << (bits - 1))) as i8).collect();
            let scales: Vec<f32> = (0..out * (inp / group)).map(|_| next() as f32).collect();
            let w = PackedWeights::pack(&codes, &scales, out, inp, bits, group).unwrap();
            prop_assert_eq!(w.unpack(), codes.clone());
            let dequantized = w.dequantize();
            for (i, q) in codes.iter().enumerate() {
                let scale = scales[i / inp * (inp / group) + i % inp / group];
                prop_assert_eq!(dequantized[i], scale * f32::from(*q));
            }
            prop_assert_eq!((w.out_features(), w.in_features(), w.bits(), w.group_size()), (out, inp, bits, group));
        }
    }

    #[test]
    fn four_bits_take_half_a_byte() {
        let w = PackedWeights::pack(&[1; 32 * 64], &[1.; 32], 32, 64, 4, 64).unwrap();
        assert_eq!(w.bytes(), 32 * 64 / 2 + 32 * 8);
        assert_eq!(w.chunks.as_ptr() as usize % 64, 0);
        let w = PackedWeights::pack(&[1; 32 * 64], &[1.; 32], 32, 64, 5, 64).unwrap();
        assert_eq!(w.bytes(), 32 * 64 + 32 * 8);
    }

    #[test]
    fn bad_input_is_named() {
        let err = |codes: &[i8], scales: &[f32], out, inp, bits, group| {
            PackedWeights::pack(codes, scales, out, inp, bits, group).unwrap_err()
        };
        let (q, s) = ([0; 16], [1.; 2]);
        assert_eq!(err(&q, &s, 2, 8, 1, 8), KernelError::Bits { what: "weights", bits: 1 });
        assert_eq!(err(&q, &s, 2, 8, 9, 8), KernelError::Bits { what: "weights", bits: 9 });
        for group in [0, 3, 4, 16] {
            assert_eq!(err(&q, &s, 2, 8, 4, group), KernelError::GroupSize { group_size: group, inp: 8 });
        }
        for group in [0, 8] {
            assert_eq!(err(&[], &[], 3, 0, 4, group), KernelError::GroupSize { group_size: group, inp: 0 });
        }
        assert_eq!(err(&q[1..], &s, 2, 8, 4, 8), KernelError::Length { what: "codes", got: 15, want: 16 });
        assert_eq!(err(&q, &s[1..], 2, 8, 4, 8), KernelError::Length { what: "scales", got: 1, want: 2 });
        let deep = KernelError::Depth { group_size: 65_794, bits: 8, limit: 65_793 };
        assert_eq!(err(&[], &[], 0, 65_794, 8, 65_794), deep);
        assert!(deep.to_string().contains("65793"), "{deep}");
        assert!(PackedWeights::pack(&[], &[], usize::MAX, 8, 4, 8).is_err());
        for bits in 2..=7u8 {
            for code in [1i8 << (bits - 1), -(1i8 << (bits - 1)) - 1] {
                let mut q = q;
                q[11] = code;
                assert_eq!(err(&q, &s, 2, 8, bits, 8), KernelError::CodeRange { code, row: 1, col: 3, bits });
            }
        }
        for (bad, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-1., "-1")] {
            let want = KernelError::NotFinite { what: "scale", index: 1, value: text.into() };
            assert_eq!(err(&q, &[1., bad], 2, 8, 4, 8), want);
        }
    }
}
