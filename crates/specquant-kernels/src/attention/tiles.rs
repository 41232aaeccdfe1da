//! Attention of many queries to 4-bit codes by AMX's tiles of bfloat16: 16 times as many products a cycle as AVX-512 does in f32, half of them for what the other half leaves.
//!
//! What codes stand for is exact in bfloat16: levels of 8 bits. Queries and softmax weights are each the sum of two such numbers, 16 bits of
//! mantissa, and multiplied twice. Sums are those of f32, in another order, so that a score is off by some 2⁻¹⁶ of the sum of its products' magnitudes.
//!
//! The instruction adds, of two rows of pairs, both products. A byte of codes is such a pair: elements i and i + d/2 of a key, so that queries
//! are paired alike; and of values the pairs are two keys, 16 apart. Scales of keys multiply scores, those of values the weights.

#[cfg(not(target_arch = "x86_64"))]
pub(super) use super::absent::Kernel;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::Kernel;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::{Job, KEYS, State, absorb};
    use crate::buffer::element;
    use crate::isa::AmxInt8;
    use crate::kv::Codes;
    use crate::ops::widen_f16;
    use crate::tiles::{ROWS, STRIP, Tiles};
    use crate::{Buffer, Isa, KvSide};
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::ops::Range;

    /// A row of a tile: 16 pairs of bfloat16, the first of a pair in the low half.
    #[derive(Clone, Copy)]
    #[repr(C, align(64))]
    struct Pairs([u32; ROWS]);

    element!(Pairs, Pairs([0; ROWS]));

    /// The kernel for heads of d values, on a processor that has it.
    #[derive(Clone, Copy)]
    pub(in crate::attention) struct Kernel {
        token: AmxInt8,
        d: usize,
    }

    impl Kernel {
        /// Nothing where the processor has no tiles, or a head is not whole tiles of pairs.
        pub(in crate::attention) fn new(isa: Isa, d: usize) -> Option<Self> {
            let token = AmxInt8::new().filter(|_| isa == Isa::AmxInt8 && d.is_multiple_of(2 * ROWS));
            token.map(|token| Kernel { token, d })
        }

        /// Adds some keys of a kv head, all of them in codes, to the state of the query rows q [rows, d], the first of which stands at `position`.
        ///
        /// # Safety
        /// That there is a kernel proves the instructions that this is compiled for.
        ///
        /// # Panics
        /// If the keys do not lie in codes, or lengths do not follow from the shapes.
        #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
        pub(in crate::attention) unsafe fn absorb_codes(
            self,
            job: &Job,
            q: &[f32],
            head: usize,
            keys: Range<usize>,
            position: usize,
            state: &mut State,
        ) {
            let Kernel { token, d } = self;
            assert!(q.len() == state.out.len() && q.len() == state.max.len() * d);
            let rows = state.max.len();
            let mut queries = Halves::new(rows, d);
            let mut q_sums = Buffer::new(rows);
            for (r, q) in q.chunks_exact(d).enumerate() {
                queries.set(r, q, d / 2);
                q_sums[r] = q.iter().sum();
            }
            let mut pairs = Buffer::new(2 * d * GROUPS / 2);
            let (key_pairs, value_pairs) = pairs.split_at_mut(d * GROUPS / 2);
            let (mut scores, mut sums) = (Buffer::new(STRIP * KEYS), Buffer::new(STRIP * d));
            let mut weights = Halves::new(STRIP, KEYS);
            let mut tiles = Tiles::default();
            tiles.shape(token, STRIP, ROWS);
            for from in keys.clone().step_by(KEYS) {
                let keys = from..(from + KEYS).min(keys.end);
                let codes = |side| job.cache.codes(side, head, keys.clone());
                let both = codes(KvSide::Keys).zip(codes(KvSide::Values));
                let all =
                    both.as_ref().is_some_and(|(k, v)| [k, v].iter().all(|c| c.scale.len() == keys.len()));
                assert!(all, "attention: not all of these keys and values lie in codes");
                let Some((k, v)) = both else { return };
                expand_keys(&k, d, key_pairs);
                expand_values(&v, d, value_pairs);
                let (k, v) = (Side::new(&k), Side::new(&v));
                for first in (0..rows).step_by(STRIP) {
                    let strip = first..(first + STRIP).min(rows);
                    let (start, last) =
                        (position + first / job.group, position + (strip.end - 1) / job.group);
                    if last < from || keys.end <= (start + 1).saturating_sub(job.window) {
                        continue;
                    }
                    // Keys that any of the strip's queries sees, and what fills up the last pair of tiles.
                    let n = ((last + 1).min(keys.end) - from).next_multiple_of(STRIP);
                    let scores = &mut scores[..STRIP * n];
                    for (at, keys) in key_pairs.chunks_exact(d).enumerate().take(n / STRIP) {
                        // SAFETY: the tiles have their shape.
                        unsafe { product(queries.from(first), keys, &mut scores[at * STRIP..], n) };
                    }
                    for (row, sum) in scores.chunks_exact_mut(n).zip(&q_sums[first..]) {
                        k.scale(row, *sum);
                    }
                    let mut state = State {
                        max: &mut state.max[strip.clone()],
                        sum: &mut state.sum[strip.clone()],
                        out: &mut state.out[strip.start * d..strip.end * d],
                    };
                    absorb(
                        &mut scores[..strip.len() * n],
                        n,
                        from,
                        position,
                        first,
                        job.group,
                        job.window,
                        &mut state,
                    );
                    weights.steps = n / STRIP;
                    for (r, row) in scores.chunks_exact_mut(n).enumerate().take(strip.len()) {
                        v.scale(row, 0.0);
                        weights.set(r, row, ROWS);
                    }
                    for (at, values) in value_pairs.chunks_exact(KEYS).enumerate() {
                        // SAFETY: the tiles have their shape.
                        unsafe { product(weights.from(0), values, &mut sums[at * STRIP..], d) };
                    }
                    let rows =
                        state.out.chunks_exact_mut(d).zip(sums.chunks_exact(d)).zip(scores.chunks_exact(n));
                    for ((out, sums), p) in rows {
                        let zero = v.zeros(p);
                        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum - zero);
                    }
                }
            }
        }
    }

    /// Groups of keys of a tile's columns.
    const GROUPS: usize = KEYS / ROWS;

    /// Rows of numbers as sums of two in bfloat16, in pairs; whole strips.
    struct Halves {
        high: Buffer<Pairs>,
        low: Buffer<Pairs>,
        /// [`Pairs`] of a row.
        steps: usize,
    }

    impl Halves {
        /// Zeros, for `rows` rows of `width` numbers.
        fn new(rows: usize, width: usize) -> Self {
            let steps = width / STRIP;
            let [high, low] = [(); 2].map(|()| Buffer::zeros(rows.next_multiple_of(STRIP) * steps));
            Halves { high, low, steps }
        }

        /// Sets a row; numbers that are `apart` make a pair.
        #[inline(always)]
        fn set(&mut self, row: usize, x: &[f32], apart: usize) {
            let row = row * self.steps..(row + 1) * self.steps;
            let to = self.high[row.clone()].iter_mut().zip(&mut self.low[row]);
            let both = x.chunks_exact(2 * apart).flat_map(|x| {
                let (first, second) = x.split_at(apart);
                first.as_chunks::<ROWS>().0.iter().zip(second.as_chunks::<ROWS>().0)
            });
            for ((high, low), (first, second)) in to.zip(both) {
                for i in 0..ROWS {
                    let (a, b) = (first[i].to_bits(), second[i].to_bits());
                    // What is cut off is exact in f32, and rounded to 8 bits itself.
                    let rest = |x: f32, bits: u32| {
                        (x - f32::from_bits(bits & 0xffff_0000)).to_bits().wrapping_add(0x8000)
                    };
                    high.0[i] = a >> 16 | b & 0xffff_0000;
                    low.0[i] = rest(first[i], a) >> 16 | rest(second[i], b) & 0xffff_0000;
                }
            }
        }

        /// The strip that begins with a row.
        fn from(&self, row: usize) -> [&[Pairs]; 2] {
            [&self.high, &self.low].map(|half| &half[row * self.steps..][..STRIP * self.steps])
        }
    }

    /// Scales and zero points of some keys or values; what is not there has a scale of 0.
    struct Side {
        scale: [f32; KEYS],
        zero: [f32; KEYS],
        /// Whether any is not 0.
        zeros: bool,
    }

    impl Side {
        fn new(codes: &Codes) -> Self {
            let mut side = Side { scale: [0.0; KEYS], zero: [0.0; KEYS], zeros: !codes.zero.is_empty() };
            widen_f16(codes.scale, &mut side.scale[..codes.scale.len()]);
            side.zero.iter_mut().zip(codes.zero).for_each(|(to, zero)| *to = f32::from(*zero));
            side
        }

        /// (x − zero · sum) · scale, for a row of sums of products with codes, and the sum of what they were multiplied with.
        #[inline(always)]
        fn scale(&self, row: &mut [f32], sum: f32) {
            for ((x, scale), zero) in row.iter_mut().zip(&self.scale).zip(&self.zero) {
                *x = (*x - zero * sum) * scale;
            }
        }

        /// What the zero points of values contribute to every element.
        #[inline(always)]
        fn zeros(&self, row: &[f32]) -> f32 {
            if !self.zeros {
                return 0.0;
            }
            let mut sums = [0.0; ROWS];
            for (x, zero) in row.as_chunks::<ROWS>().0.iter().zip(self.zero.as_chunks::<ROWS>().0) {
                (0..ROWS).for_each(|i| sums[i] += x[i] * zero[i]);
            }
            sums.iter().sum()
        }
    }

    /// What the 16 codes stand for, in the low and in the high half of a pair.
    #[target_feature(enable = "avx512f")]
    fn tables(levels: &[i8; 16]) -> [__m512i; 2] {
        let high = levels.map(|level| f32::from(level).to_bits());
        // SAFETY: 16 numbers of 32 bits.
        let high = unsafe { _mm512_loadu_si512(high.as_ptr().cast()) };
        [_mm512_srli_epi32::<16>(high), high]
    }

    /// 16 pairs of levels: of the lowest four bits of `a` and of `b`.
    #[target_feature(enable = "avx512f")]
    fn look_up(tables: [__m512i; 2], a: __m512i, b: __m512i, to: &mut Pairs) {
        let pair =
            _mm512_or_si512(_mm512_permutexvar_epi32(a, tables[0]), _mm512_permutexvar_epi32(b, tables[1]));
        // SAFETY: 64 bytes, aligned so.
        unsafe { _mm512_store_si512(to.0.as_mut_ptr().cast(), pair) };
    }

    /// 16 bytes of codes of a key; zeros where there is no such key.
    #[target_feature(enable = "sse2")]
    fn bytes(codes: &Codes, d: usize, key: usize, from: usize) -> __m128i {
        match codes.codes.get(key * d / 2 + from..).and_then(|codes| codes.first_chunk::<16>()) {
            // SAFETY: 16 bytes are there.
            Some(codes) => unsafe { _mm_loadu_si128(codes.as_ptr().cast()) },
            None => _mm_setzero_si128(),
        }
    }

    /// Keys: for every group of 16, row i has byte i of each.
    #[target_feature(enable = "avx512f")]
    fn expand_keys(codes: &Codes, d: usize, pairs: &mut [Pairs]) {
        let tables = tables(&codes.levels);
        let groups = codes.scale.len().next_multiple_of(STRIP) / ROWS;
        for (group, pairs) in pairs.chunks_exact_mut(d / 2).enumerate().take(groups) {
            for (i, pairs) in pairs.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
                let mut rows = [_mm_setzero_si128(); ROWS];
                for (k, row) in rows.iter_mut().enumerate() {
                    *row = bytes(codes, d, group * ROWS + k, i * ROWS);
                }
                // Each round interleaves what lies 8 rows apart; four of them transpose.
                for _ in 0..4 {
                    let old = rows;
                    for k in 0..ROWS / 2 {
                        rows[2 * k] = _mm_unpacklo_epi8(old[k], old[k + ROWS / 2]);
                        rows[2 * k + 1] = _mm_unpackhi_epi8(old[k], old[k + ROWS / 2]);
                    }
                }
                for (row, pair) in rows.into_iter().zip(pairs) {
                    let codes = _mm512_cvtepu8_epi32(row);
                    look_up(tables, codes, _mm512_srli_epi32::<4>(codes), pair);
                }
            }
        }
    }

    /// Values: for every group of 16 elements, row 16 i + j has keys 32 i + j and 32 i + 16 + j.
    #[target_feature(enable = "avx512f")]
    fn expand_values(codes: &Codes, d: usize, pairs: &mut [Pairs]) {
        let tables = tables(&codes.levels);
        let groups = codes.scale.len().div_ceil(STRIP);
        // Elements of the first half, and of the second.
        let (first, second) = pairs.split_at_mut(d / STRIP * KEYS / 2);
        for row in 0..groups * ROWS {
            let key = row / ROWS * STRIP + row % ROWS;
            for i in 0..d / STRIP {
                let a = _mm512_cvtepu8_epi32(bytes(codes, d, key, i * ROWS));
                let b = _mm512_cvtepu8_epi32(bytes(codes, d, key + ROWS, i * ROWS));
                let at = i * KEYS / 2 + row;
                look_up(tables, a, b, &mut first[at]);
                look_up(tables, _mm512_srli_epi32::<4>(a), _mm512_srli_epi32::<4>(b), &mut second[at]);
            }
        }
    }

    /// A strip of 32 columns of y, whose rows lie `pitch` apart: the product of a strip's rows, both halves, and two groups of 16 columns,
    /// which lie one after the other.
    ///
    /// # Safety
    /// The machine must have AMX, and its tiles be whole.
    unsafe fn product([high, low]: [&[Pairs]; 2], columns: &[Pairs], y: &mut [f32], pitch: usize) {
        let steps = high.len() / STRIP;
        let group = columns.len() / 2;
        assert!(steps > 0 && low.len() == high.len() && steps * ROWS <= group);
        assert!(high.len() == STRIP * steps && y.len() >= (STRIP - 1) * pitch + STRIP);
        let second = ROWS * steps;
        // SAFETY: tiles of rows are 16 rows of `steps` pairs; those of columns `steps` times 16 pairs; y has 32 rows of 32 columns.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{c0} + 1*{line}]",
                "tileloadd tmm4, [{h0} + 1*{row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{c1} + 1*{line}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{h1} + 1*{row}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm4, [{l0} + 1*{row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{l1} + 1*{row}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {h0}, 64",
                "add {h1}, 64",
                "add {l0}, 64",
                "add {l1}, 64",
                "add {c0}, 1024",
                "add {c1}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{y0} + 1*{pitch}], tmm0",
                "tilestored [{y0} + 1*{pitch} + 64], tmm1",
                "tilestored [{y1} + 1*{pitch}], tmm2",
                "tilestored [{y1} + 1*{pitch} + 64], tmm3",
                h0 = inout(reg) high.as_ptr() => _,
                h1 = inout(reg) high.as_ptr().add(second) => _,
                l0 = inout(reg) low.as_ptr() => _,
                l1 = inout(reg) low.as_ptr().add(second) => _,
                c0 = inout(reg) columns.as_ptr() => _,
                c1 = inout(reg) columns.as_ptr().add(group) => _,
                row = in(reg) steps * size_of::<Pairs>(),
                line = in(reg) size_of::<Pairs>(),
                steps = inout(reg) steps => _,
                y0 = in(reg) y.as_mut_ptr(),
                y1 = in(reg) y.as_mut_ptr().add(ROWS * pitch),
                pitch = in(reg) pitch * size_of::<f32>(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
