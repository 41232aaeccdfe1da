//! The products of a single query with a tile of the cache. Sums have one order, so that every instruction set gives the same bits.

#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512Vnni};
use crate::isa::{Isa, Scalar, with_token};
use crate::lanes::Fold;

/// Floats of a vector.
const LANES: usize = 16;
/// Vectors of an output row that stay in registers while a tile of values passes.
const WIDE: usize = 4;

/// scores [rows of q, rows of k] = q · kᵀ. q: [.., d]; k: [.., d]; rows of scores lie `stride` apart.
pub(super) fn dot_rows(isa: Isa, q: &[f32], k: &[f32], scores: &mut [f32], stride: usize, d: usize) {
    with_token!(isa, token => token.dot_rows(q, k, scores, stride, d));
}

/// out [rows, d] += p [rows, n] · v [n, d]; rows of p lie `stride` apart.
pub(super) fn add_values(isa: Isa, p: &[f32], stride: usize, v: &[f32], out: &mut [f32], d: usize) {
    with_token!(isa, token => token.add_values(p, stride, v, out, d));
}

trait Kernel: Copy {
    fn dot_rows(self, q: &[f32], k: &[f32], scores: &mut [f32], stride: usize, d: usize);
    fn add_values(self, p: &[f32], stride: usize, v: &[f32], out: &mut [f32], d: usize);
}

impl Kernel for Scalar {
    fn dot_rows(self, q: &[f32], k: &[f32], scores: &mut [f32], stride: usize, d: usize) {
        dot_rows_with(self, q, k, scores, stride, d);
    }

    fn add_values(self, p: &[f32], stride: usize, v: &[f32], out: &mut [f32], d: usize) {
        add_values_with(self, p, stride, v, out, d);
    }
}

/// [`Kernel`] of a token, compiled for its instructions.
#[cfg(target_arch = "x86_64")]
macro_rules! kernel {
    ($token:ty, $features:literal) => {
        impl Kernel for $token {
            fn dot_rows(self, q: &[f32], k: &[f32], scores: &mut [f32], stride: usize, d: usize) {
                #[target_feature(enable = $features)]
                fn compiled(
                    token: $token,
                    q: &[f32],
                    k: &[f32],
                    scores: &mut [f32],
                    stride: usize,
                    d: usize,
                ) {
                    dot_rows_with(token, q, k, scores, stride, d);
                }
                // SAFETY: the token proves the instruction set.
                unsafe { compiled(self, q, k, scores, stride, d) }
            }

            fn add_values(self, p: &[f32], stride: usize, v: &[f32], out: &mut [f32], d: usize) {
                #[target_feature(enable = $features)]
                fn compiled(token: $token, p: &[f32], stride: usize, v: &[f32], out: &mut [f32], d: usize) {
                    add_values_with(token, p, stride, v, out, d);
                }
                // SAFETY: as above.
                unsafe { compiled(self, p, stride, v, out, d) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernel!(Avx2, "avx2,fma");
#[cfg(target_arch = "x86_64")]
kernel!(Avx512Vnni, "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl");

#[inline(always)]
fn dot_rows_with<S: Fold>(s: S, q: &[f32], k: &[f32], scores: &mut [f32], stride: usize, d: usize) {
    for (q, scores) in q.chunks_exact(d).zip(scores.chunks_mut(stride)) {
        // Four keys together: a sum across lanes costs more than the products, and four take little longer than one.
        for (scores, k) in scores.chunks_mut(4).zip(k.chunks(4 * d)) {
            let last = k.len() / d - 1;
            let sums = dot_four(s, q, [0, 1, 2, 3].map(|i: usize| &k[i.min(last) * d..][..d]));
            put(&sums, &mut scores[..=last]);
        }
    }
}

/// Writes the scores of four keys, or of the first that are there.
#[inline(always)]
pub(super) fn put(sums: &[f32; 4], to: &mut [f32]) {
    match to.first_chunk_mut() {
        // Of a length that the compiler knows: no call.
        Some(to) => *to = *sums,
        None => to.copy_from_slice(&sums[..to.len()]),
    }
}

#[inline(always)]
fn dot_four<S: Fold>(s: S, q: &[f32], k: [&[f32]; 4]) -> [f32; 4] {
    let mut sums = [s.zero(); 4];
    let (whole, tail) = q.as_chunks::<LANES>();
    if !tail.is_empty() {
        let padded = |x: &[f32]| {
            let mut wide = [0.0; LANES];
            wide[..tail.len()].copy_from_slice(&x[x.len() - tail.len()..]);
            s.load(&wide)
        };
        let q = padded(q);
        for i in 0..4 {
            sums[i] = s.mul_add(q, padded(k[i]), sums[i]);
        }
    }
    let k = k.map(|k| k.as_chunks::<LANES>().0);
    for (c, q) in whole.iter().enumerate() {
        let q = s.load(q);
        for i in 0..4 {
            sums[i] = s.mul_add(q, s.load(&k[i][c]), sums[i]);
        }
    }
    s.fold_four(sums)
}

#[inline(always)]
fn add_values_with<S: Fold>(s: S, p: &[f32], stride: usize, v: &[f32], out: &mut [f32], d: usize) {
    for (p, out) in p.chunks(stride).zip(out.chunks_exact_mut(d)) {
        let whole = out.as_chunks::<LANES>().0.len();
        let mut c = 0;
        while c + WIDE <= whole {
            add_block::<S, WIDE>(s, p, v, out, c * LANES);
            c += WIDE;
        }
        while c < whole {
            add_block::<S, 1>(s, p, v, out, c * LANES);
            c += 1;
        }
        for i in whole * LANES..d {
            for (p, v) in p.iter().zip(v.chunks_exact(d)) {
                out[i] = p.mul_add(v[i], out[i]);
            }
        }
    }
}

/// W vectors of a row of output, from element `at`.
#[inline(always)]
fn add_block<S: Fold, const W: usize>(s: S, p: &[f32], v: &[f32], out: &mut [f32], at: usize) {
    let d = out.len();
    let out = out[at..].as_chunks_mut::<LANES>().0;
    let mut sums = [s.zero(); W];
    for i in 0..W {
        sums[i] = s.load(&out[i]);
    }
    for (p, v) in p.iter().zip(v.chunks_exact(d)) {
        let v = v[at..].as_chunks::<LANES>().0;
        for i in 0..W {
            sums[i] = s.add_scaled(sums[i], s.load(&v[i]), *p);
        }
    }
    for i in 0..W {
        s.store(sums[i], &mut out[i]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_noise as noise;

    #[test]
    fn every_instruction_set_gives_the_sums_in_f64_and_the_same_bits() {
        for (rows, n, d) in
            [(1, 1, 1), (2, 3, 7), (3, 45, 64), (1, 128, 80), (6, 9, 19), (4, 6, 128), (2, 5, 256)]
        {
            let (q, k, p) = (noise(rows * d, 1), noise(n * d, 2), noise(rows * n, 3));
            let start = noise(rows * d, 4);
            let (mut scores, mut out) = (vec![f32::NAN; rows * n], start.clone());
            dot_rows(Isa::Scalar, &q, &k, &mut scores, n, d);
            add_values(Isa::Scalar, &p, n, &k, &mut out, d);
            for (e, got) in scores.iter().enumerate() {
                let (q, k) = (&q[e / n * d..][..d], &k[e % n * d..][..d]);
                let want: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                assert!((f64::from(*got) - want).abs() < 1e-4, "scores {rows} {n} {d} at {e}: {got} {want}");
            }
            for (e, got) in out.iter().enumerate() {
                let weighted = (0..n).map(|j| f64::from(p[e / d * n + j]) * f64::from(k[j * d + e % d]));
                let want = f64::from(start[e]) + weighted.sum::<f64>();
                assert!((f64::from(*got) - want).abs() < 1e-4, "values {rows} {n} {d} at {e}: {got} {want}");
            }
            for isa in Isa::available() {
                let (mut same, mut also) = (vec![f32::NAN; rows * n], start.clone());
                dot_rows(isa, &q, &k, &mut same, n, d);
                add_values(isa, &p, n, &k, &mut also, d);
                assert_eq!((&same, &also), (&scores, &out), "{isa:?} {rows} {n} {d}");
            }
        }
    }
}
