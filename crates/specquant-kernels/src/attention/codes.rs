//! The products of a single query with keys and values where they lie: 4-bit codes are looked up in registers, to the same bits as if they were widened
//! first ([`KvCache::tile`](crate::KvCache::tile)) and then multiplied ([`super::rows`]).

#[cfg(target_arch = "x86_64")]
pub(super) use x86::Kernel;

/// No other architecture has such code.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Clone, Copy)]
pub(super) enum Kernel {}

#[cfg(not(target_arch = "x86_64"))]
impl Kernel {
    pub(super) fn new(_: crate::Isa, _: usize) -> Option<Self> {
        None
    }

    pub(super) fn dot_rows(self, _: &[f32], _: &crate::kv::Codes, _: &mut [f32], _: usize) {
        match self {}
    }

    pub(super) fn add_values(self, _: &[f32], _: usize, _: &crate::kv::Codes, _: &mut [f32]) {
        match self {}
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use crate::Isa;
    use crate::attention::KEYS;
    use crate::isa::Avx512Vnni;
    use crate::kv::Codes;
    use crate::lanes::{Fold, Lanes};
    use std::arch::x86_64::*;

    /// Head widths that there is code for.
    const WIDTHS: [usize; 3] = [64, 128, 256];

    /// The kernels for one of [`WIDTHS`], on a processor that has them.
    #[derive(Clone, Copy)]
    pub(in crate::attention) struct Kernel {
        token: Avx512Vnni,
        d: usize,
    }

    impl Kernel {
        /// For heads of `d` values; nothing where the processor or the width has no such code.
        pub(in crate::attention) fn new(isa: Isa, d: usize) -> Option<Self> {
            let token = if isa == Isa::Avx512Vnni { Avx512Vnni::new() } else { None };
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
            let (token, d) = (self.token, self.d);
            let tables = Tables::new(keys, d);
            assert!(
                q.len().is_multiple_of(d)
                    && scores.len() >= (q.len() / d).saturating_sub(1) * stride + tables.keys
            );
            // SAFETY: the token proves AVX-512; lengths are checked.
            unsafe {
                match d {
                    64 => dot_rows::<4>(token, q, &tables, scores, stride),
                    128 => dot_rows::<8>(token, q, &tables, scores, stride),
                    _ => dot_rows::<16>(token, q, &tables, scores, stride),
                }
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
            let d = self.d;
            let tables = Tables::new(values, d);
            assert!(
                out.len().is_multiple_of(d)
                    && p.len() >= (out.len() / d).saturating_sub(1) * stride + tables.keys
            );
            let mut first = 0;
            while first < out.len() / d {
                let (p, out) = (&p[first * stride..], &mut out[first * d..]);
                // As many sums as registers hold.
                let rows = (16 * 16 / d).min(out.len() / d);
                // SAFETY: the token proves AVX-512; lengths are checked.
                unsafe {
                    match (d, rows) {
                        (64, 1) => add_values::<4, 1>(p, stride, &tables, out),
                        (64, 2) => add_values::<4, 2>(p, stride, &tables, out),
                        (64, 3) => add_values::<4, 3>(p, stride, &tables, out),
                        (64, _) => add_values::<4, 4>(p, stride, &tables, out),
                        (128, 1) => add_values::<8, 1>(p, stride, &tables, out),
                        (128, _) => add_values::<8, 2>(p, stride, &tables, out),
                        _ => add_values::<16, 1>(p, stride, &tables, out),
                    }
                }
                first += rows;
            }
        }
    }

    /// Codes, and what they stand for at each key: scale · (level − zero).
    struct Tables<'a> {
        codes: &'a [u8],
        keys: usize,
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
                codes: codes.codes,
                keys,
                levels: codes.levels.map(f32::from),
                scale: [0.0; KEYS],
                zero: [0.0; KEYS],
            };
            crate::ops::widen_f16(codes.scale, &mut tables.scale[..keys]);
            tables.zero.iter_mut().zip(codes.zero).for_each(|(to, zero)| *to = f32::from(*zero));
            tables
        }

        /// The C vectors of a key.
        ///
        /// # Safety
        /// `key` must be one of the keys, of 16 C codes.
        #[target_feature(enable = "avx512f")]
        unsafe fn widened<const C: usize>(&self, key: usize) -> [__m512; C] {
            let mut vectors = [_mm512_setzero_ps(); C];
            // SAFETY: 16 levels; a key has 8 C bytes, of which the low halves come first. Looking up takes the lowest four bits of an index.
            unsafe {
                let levels =
                    _mm512_sub_ps(_mm512_loadu_ps(self.levels.as_ptr()), _mm512_set1_ps(self.zero[key]));
                let table = _mm512_mul_ps(levels, _mm512_set1_ps(self.scale[key]));
                let codes = self.codes.as_ptr().add(key * 8 * C);
                for b in 0..C / 2 {
                    let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(16 * b).cast()));
                    vectors[b] = _mm512_permutexvar_ps(codes, table);
                    vectors[C / 2 + b] = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table);
                }
            }
            vectors
        }
    }

    /// # Safety
    /// q has whole rows of 16 C values, and scores a place for each of them and each key.
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn dot_rows<const C: usize>(
        token: Avx512Vnni,
        q: &[f32],
        tables: &Tables,
        scores: &mut [f32],
        stride: usize,
    ) {
        for first in (0..tables.keys).step_by(4) {
            let count = (tables.keys - first).min(4);
            let mut keys = [[_mm512_setzero_ps(); C]; 4];
            for (i, key) in keys.iter_mut().enumerate().take(count) {
                // SAFETY: first + i is a key.
                *key = unsafe { tables.widened::<C>(first + i) };
            }
            for (row, q) in q.chunks_exact(16 * C).enumerate() {
                let mut sums = [Lanes::<16>::zero(token); 4];
                for (c, q) in q.as_chunks::<16>().0.iter().enumerate() {
                    let q = token.load(q);
                    for i in 0..4 {
                        sums[i] = token.mul_add(q, [keys[i][c]], sums[i]);
                    }
                }
                let sums = token.fold_four(sums);
                scores[row * stride + first..][..count].copy_from_slice(&sums[..count]);
            }
        }
    }

    /// # Safety
    /// out has R rows of 16 C values, and p a value for each of them and each key.
    #[target_feature(enable = "avx512f")]
    unsafe fn add_values<const C: usize, const R: usize>(
        p: &[f32],
        stride: usize,
        tables: &Tables,
        out: &mut [f32],
    ) {
        let mut sums = [[_mm512_setzero_ps(); C]; R];
        // SAFETY: R rows of C vectors; every key is one.
        unsafe {
            for r in 0..R {
                for c in 0..C {
                    sums[r][c] = _mm512_loadu_ps(out.as_ptr().add((r * C + c) * 16));
                }
            }
            for key in 0..tables.keys {
                let values = tables.widened::<C>(key);
                for r in 0..R {
                    let p = _mm512_set1_ps(p[r * stride + key]);
                    for c in 0..C {
                        sums[r][c] = _mm512_fmadd_ps(values[c], p, sums[r][c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    _mm512_storeu_ps(out.as_mut_ptr().add((r * C + c) * 16), sums[r][c]);
                }
            }
        }
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
            for (format, d) in formats.into_iter().flat_map(|format| WIDTHS.map(|d| (format, d))) {
                let Some(kernel) = Kernel::new(Isa::Avx512Vnni, d) else { return };
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
                    assert_eq!(a, b, "{format:?} {d} {rows} {keys:?}");
                    let [mut x, mut y] = [(); 2].map(|()| noise(rows * d, 4));
                    let v = cache.tile(KvSide::Values, 0, keys.clone(), &mut buf);
                    rows::add_values(Isa::Scalar, &a, stride, v, &mut x, d);
                    let codes = cache.codes(KvSide::Values, 0, keys.clone()).unwrap();
                    kernel.add_values(&b, stride, &codes, &mut y);
                    assert_eq!(x, y, "{format:?} {d} {rows} {keys:?}");
                }
            }
        }
    }
}
