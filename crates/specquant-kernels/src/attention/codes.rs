//! The products of a single query with keys and values where they lie: 4-bit codes are looked up in registers, to the same bits as if they were widened
//! first ([`KvCache::tile`](crate::KvCache::tile)) and then multiplied ([`super::rows`]).

#[cfg(not(target_arch = "x86_64"))]
pub(super) use super::absent::Kernel;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::Kernel;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use crate::Isa;
    use crate::attention::KEYS;
    use crate::attention::rows::put;
    use crate::isa::{Avx2, Avx512Vnni};
    use crate::kv::Codes;
    use crate::lanes::Fold;
    use std::arch::x86_64::*;

    /// Head widths that there is code for.
    const WIDTHS: [usize; 3] = [64, 128, 256];

    /// The kernels for one of [`WIDTHS`], on a processor that has them.
    #[derive(Clone, Copy)]
    pub(in crate::attention) struct Kernel {
        token: Token,
        d: usize,
    }

    #[derive(Clone, Copy)]
    enum Token {
        Avx2(Avx2),
        Avx512Vnni(Avx512Vnni),
    }

    impl Kernel {
        /// For heads of `d` values; nothing where the processor or the width has no such code.
        pub(in crate::attention) fn new(isa: Isa, d: usize) -> Option<Self> {
            let token = match isa.vectors() {
                Isa::Avx512Vnni => Avx512Vnni::new().map(Token::Avx512Vnni),
                Isa::Avx2 => Avx2::new().map(Token::Avx2),
                _ => None,
            };
            token.filter(|_| WIDTHS.contains(&d)).map(|token| Kernel { token, d })
        }

        /// scores [rows of q, keys] = q · kᵀ; rows of scores lie `stride` apart.
        ///
        /// # Panics
        /// If lengths do not follow from q [rows, d] and the keys, of which there are [`KEYS`] at most.
        pub(in crate::attention) fn dot_rows(
            self,
            q: &[f32],
            keys: &Codes,
            scores: &mut [f32],
            stride: usize,
        ) {
            assert!(q.len().is_multiple_of(self.d));
            let tables = Tables::new(keys, self.d);
            match self.token {
                Token::Avx2(token) => token.dot_rows(q, &tables, scores, stride),
                Token::Avx512Vnni(token) => token.dot_rows(q, &tables, scores, stride),
            }
        }

        /// out [rows, d] += p [rows, keys] · v; rows of p lie `stride` apart.
        ///
        /// # Panics
        /// If lengths do not follow from the shapes.
        pub(in crate::attention) fn add_values(
            self,
            p: &[f32],
            stride: usize,
            values: &Codes,
            out: &mut [f32],
        ) {
            assert!(out.len().is_multiple_of(self.d));
            let tables = Tables::new(values, self.d);
            match self.token {
                Token::Avx2(token) => token.add_values(p, stride, &tables, out),
                Token::Avx512Vnni(token) => token.add_values(p, stride, &tables, out),
            }
        }
    }

    /// Codes, and what they stand for at each key: scale · (level − zero).
    struct Tables<'a> {
        /// [keys, d / 32] × 16 bytes, whose low halves are the first d / 2 of a key.
        codes: &'a [[u8; 16]],
        keys: usize,
        d: usize,
        levels: [f32; 16],
        scale: [f32; KEYS],
        zero: [f32; KEYS],
    }

    impl<'a> Tables<'a> {
        fn new(codes: &Codes<'a>, d: usize) -> Self {
            let keys = codes.scale.len();
            assert!(
                keys <= KEYS
                    && codes.codes.len() == keys * d / 2
                    && (codes.zero.is_empty() || codes.zero.len() == keys)
            );
            let mut tables = Tables {
                codes: codes.codes.as_chunks().0,
                keys,
                d,
                levels: codes.levels.map(f32::from),
                scale: [0.0; KEYS],
                zero: [0.0; KEYS],
            };
            crate::ops::widen_f16(codes.scale, &mut tables.scale[..keys]);
            tables.zero.iter_mut().zip(codes.zero).for_each(|(to, zero)| *to = f32::from(*zero));
            tables
        }

        /// What the 16 codes stand for at a key.
        #[inline(always)]
        fn table<S: Fold>(&self, s: S, key: usize) -> S::V {
            let levels = s.sub(s.load(&self.levels), s.load(&[self.zero[key]; 16]));
            s.scale(levels, self.scale[key])
        }

        /// C chunks of 16 bytes of a key.
        #[inline(always)]
        fn chunks<const C: usize>(&self, key: usize, from: usize) -> &[[u8; 16]; C] {
            let start = key * (self.d / 32) + from;
            &self.codes[start..start + C].as_chunks().0[0]
        }
    }

    /// What codes are looked up with.
    trait LookUp: Fold {
        /// The values of the low halves of 16 bytes, and of the high ones.
        fn look_up(self, table: Self::V, codes: &[u8; 16]) -> [Self::V; 2];
    }

    impl LookUp for Avx512Vnni {
        #[inline(always)]
        fn look_up(self, [table]: Self::V, codes: &[u8; 16]) -> [Self::V; 2] {
            // SAFETY: the token proves AVX-512. Looking up takes the lowest four bits of an index.
            unsafe {
                let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
                let high = _mm512_srli_epi32::<4>(codes);
                [[_mm512_permutexvar_ps(codes, table)], [_mm512_permutexvar_ps(high, table)]]
            }
        }
    }

    impl LookUp for Avx2 {
        #[inline(always)]
        fn look_up(self, table: Self::V, codes: &[u8; 16]) -> [Self::V; 2] {
            // SAFETY: the token proves AVX2; two times eight bytes are there.
            unsafe {
                let a = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().cast()));
                let b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().add(8).cast()));
                let [low_a, low_b] = [permuted(table, a), permuted(table, b)];
                let [high_a, high_b] = [_mm256_srli_epi32::<4>(a), _mm256_srli_epi32::<4>(b)];
                [[low_a, low_b], [permuted(table, high_a), permuted(table, high_b)]]
            }
        }
    }

    /// What the lowest four bits of each index choose of a table: three of them a lane, the fourth the half.
    ///
    /// # Safety
    /// Needs AVX2.
    #[inline(always)]
    unsafe fn permuted([low, high]: [__m256; 2], index: __m256i) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
            let (low, high) = (_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index));
            _mm256_blendv_ps(low, high, half)
        }
    }

    /// The kernels, compiled for a token's instructions.
    trait Compiled {
        fn dot_rows(self, q: &[f32], tables: &Tables, scores: &mut [f32], stride: usize);
        fn add_values(self, p: &[f32], stride: usize, tables: &Tables, out: &mut [f32]);
    }

    /// [`Compiled`] of a token. For each width: the chunks of 32 values, and the numbers of rows of output, most first, whose sums fit into the registers.
    macro_rules! compiled {
        ($token:ty, $features:literal, [$($d:pat => ($chunks:literal, [$($rows:literal),*])),*]) => {
            impl Compiled for $token {
                fn dot_rows(self, q: &[f32], tables: &Tables, scores: &mut [f32], stride: usize) {
                    #[target_feature(enable = $features)]
                    fn compiled(s: $token, q: &[f32], tables: &Tables, scores: &mut [f32], stride: usize) {
                        match tables.d {
                            64 => dot_rows::<$token, 2>(s, q, tables, scores, stride),
                            128 => dot_rows::<$token, 4>(s, q, tables, scores, stride),
                            _ => dot_rows::<$token, 8>(s, q, tables, scores, stride),
                        }
                    }
                    // SAFETY: the token proves the instruction set.
                    unsafe { compiled(self, q, tables, scores, stride) }
                }

                fn add_values(self, p: &[f32], stride: usize, tables: &Tables, out: &mut [f32]) {
                    #[target_feature(enable = $features)]
                    fn compiled(s: $token, p: &[f32], stride: usize, tables: &Tables, out: &mut [f32]) {
                        let d = tables.d;
                        let mut first = 0;
                        while first < out.len() / d {
                            let (p, out) = (&p[first * stride..], &mut out[first * d..]);
                            first += match (d, out.len() / d) {
                                $($(($d, $rows..) => add_values::<$token, $chunks, $rows>(s, p, stride, tables, out),)*)*
                                _ => unreachable!("widths and rows are listed"),
                            };
                        }
                    }
                    // SAFETY: as above.
                    unsafe { compiled(self, p, stride, tables, out) }
                }
            }
        };
    }

    compiled!(Avx2, "avx2,fma", [_ => (1, [3, 2, 1])]);
    compiled!(
        Avx512Vnni,
        "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl",
        [64 => (2, [4, 3, 2, 1]), 128 => (4, [2, 1]), _ => (8, [1])]
    );

    /// q: rows of 32 C values.
    #[inline(always)]
    fn dot_rows<S: LookUp, const C: usize>(
        s: S,
        q: &[f32],
        tables: &Tables,
        scores: &mut [f32],
        stride: usize,
    ) {
        for first in (0..tables.keys).step_by(4) {
            let count = (tables.keys - first).min(4);
            let mut keys = [[[s.zero(); C]; 2]; 4];
            for (i, halves) in keys.iter_mut().enumerate().take(count) {
                let table = tables.table(s, first + i);
                let codes = tables.chunks::<C>(first + i, 0);
                for c in 0..C {
                    [halves[0][c], halves[1][c]] = s.look_up(table, &codes[c]);
                }
            }
            let [k0, k1, k2, k3] = &keys;
            for (row, q) in q.chunks_exact(32 * C).enumerate() {
                // Four variables: an array might lie in memory.
                let [mut a, mut b, mut c, mut d] = [s.zero(); 4];
                for (side, q) in q.as_chunks::<16>().0.chunks_exact(C).enumerate() {
                    for i in 0..C {
                        let q = s.load(&q[i]);
                        a = s.mul_add(q, k0[side][i], a);
                        b = s.mul_add(q, k1[side][i], b);
                        c = s.mul_add(q, k2[side][i], c);
                        d = s.mul_add(q, k3[side][i], d);
                    }
                }
                let sums = s.fold_four([a, b, c, d]);
                put(&sums, &mut scores[row * stride + first..][..count]);
            }
        }
    }

    /// The first R rows of out, C chunks of both halves at a time. Answers R.
    #[inline(always)]
    fn add_values<S: LookUp, const C: usize, const R: usize>(
        s: S,
        p: &[f32],
        stride: usize,
        tables: &Tables,
        out: &mut [f32],
    ) -> usize {
        let half = tables.d / 32;
        let out = out.as_chunks_mut::<16>().0;
        let at = |row: usize, side: usize, chunk: usize| row * 2 * half + side * half + chunk;
        for from in (0..half).step_by(C) {
            let mut sums = [[[s.zero(); C]; 2]; R];
            for r in 0..R {
                for side in 0..2 {
                    for c in 0..C {
                        sums[r][side][c] = s.load(&out[at(r, side, from + c)]);
                    }
                }
            }
            for key in 0..tables.keys {
                let table = tables.table(s, key);
                let codes = tables.chunks::<C>(key, from);
                for c in 0..C {
                    let values = s.look_up(table, &codes[c]);
                    for r in 0..R {
                        let p = p[r * stride + key];
                        for side in 0..2 {
                            sums[r][side][c] = s.add_scaled(sums[r][side][c], values[side], p);
                        }
                    }
                }
            }
            for r in 0..R {
                for side in 0..2 {
                    for c in 0..C {
                        s.store(sums[r][side][c], &mut out[at(r, side, from + c)]);
                    }
                }
            }
        }
        R
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::attention::rows;
        use crate::ops::test_noise as noise;
        use crate::{KvCache, KvFormat, KvSide};

        #[test]
        fn codes_give_the_bits_of_widened_ones() {
            let formats = [
                KvFormat::Gaussian { intact: 0 },
                KvFormat::Int { bits: 4, clip: 0.95, intact: 0 },
                KvFormat::Int { bits: 3, clip: 1.0, intact: 0 },
            ];
            let cases = formats.into_iter().flat_map(|format| WIDTHS.map(|d| (format, d)));
            let cases = cases.flat_map(|case| [Isa::Avx2, Isa::Avx512Vnni].map(|isa| (isa, case)));
            for (isa, (format, d)) in cases {
                let Some(kernel) = Kernel::new(isa, d) else { continue };
                let mut cache = KvCache::new(format, 1, d);
                cache.append(&noise(150 * d, 1), &noise(150 * d, 2));
                for (rows, keys) in [(1, 0..1), (2, 3..10), (3, 20..148), (5, 7..95), (9, 2..4)] {
                    let (n, stride) = (keys.len(), keys.len() + 3);
                    let (q, mut buf) = (noise(rows * d, 3), vec![0.0; n * d]);
                    let [mut a, mut b] = [(); 2].map(|()| vec![7.0; rows * stride]);
                    let k = cache.tile(KvSide::Keys, 0, keys.clone(), &mut buf);
                    rows::dot_rows(Isa::Scalar, &q, k, &mut a, stride, d);
                    let codes = cache.codes(KvSide::Keys, 0, keys.clone()).unwrap();
                    kernel.dot_rows(&q, &codes, &mut b, stride);
                    assert_eq!(a, b, "{isa:?} {format:?} {d} {rows} {keys:?}");
                    let [mut x, mut y] = [(); 2].map(|()| noise(rows * d, 4));
                    let v = cache.tile(KvSide::Values, 0, keys.clone(), &mut buf);
                    rows::add_values(Isa::Scalar, &a, stride, v, &mut x, d);
                    let codes = cache.codes(KvSide::Values, 0, keys.clone()).unwrap();
                    kernel.add_values(&b, stride, &codes, &mut y);
                    assert_eq!(x, y, "{isa:?} {format:?} {d} {rows} {keys:?}");
                }
            }
        }
    }
}
