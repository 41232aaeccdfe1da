//! Dense f32 products.
//!
//! Products of many rows pack the weights as for [`matmul_packed`](crate::matmul_packed); products of a few rows, which are bound by
//! reading the weights once, are dot products. Neither depends on the number of threads.

use crate::ops::fold;
use crate::packed_dense::matmul_once;
use crate::{Buffer, for_each_chunk};

/// Up to this many rows go to dot products.
const FEW_ROWS: usize = 8;
/// Multiply-adds below which a second thread does not pay.
const SMALL: usize = 1 << 17;

/// y [m, n] = x [m, k] · w [n, k]ᵀ, added to y if `accumulate`. The result does not depend on the number of threads.
///
/// # Panics
/// If a length does not follow from the shape.
pub fn matmul_nt(x: &[f32], w: &[f32], y: &mut [f32], m: usize, k: usize, n: usize, accumulate: bool) {
    if m <= FEW_ROWS && k > 0 {
        check(x, w, y, m, k, n);
        return few_rows(x, w, y, m, k, n, accumulate);
    }
    matmul_once(x, (w, false), y, [m, k, n], accumulate);
}

/// y [m, n] = x [m, k] · w [k, n], added to y if `accumulate`. The result does not depend on the number of threads.
///
/// # Panics
/// If a length does not follow from the shape.
pub fn matmul_nn(x: &[f32], w: &[f32], y: &mut [f32], m: usize, k: usize, n: usize, accumulate: bool) {
    matmul_once(x, (w, true), y, [m, k, n], accumulate);
}

fn check(x: &[f32], w: &[f32], y: &[f32], m: usize, k: usize, n: usize) {
    assert_eq!(x.len(), m * k, "dense product: x is not [{m}, {k}]");
    assert_eq!(w.len(), n * k, "dense product: w does not hold {n} x {k}");
    assert_eq!(y.len(), m * n, "dense product: y is not [{m}, {n}]");
}

/// Columns that [`transposed`] takes at once: a cache line of every row.
const STRIP: usize = 16;

/// x `[rows, columns]` as `[columns, rows]`.
///
/// # Panics
/// If x is not `[rows, columns]`.
pub fn transposed(x: &[f32], rows: usize, columns: usize) -> Buffer<f32> {
    assert_eq!(x.len(), rows * columns, "transposed: x is not [{rows}, {columns}]");
    let mut t = Buffer::new(x.len());
    for_each_chunk(&mut t, (STRIP * rows).max(1), |strip, t| {
        for (row, x) in x.chunks_exact(columns).enumerate() {
            let strip = &x[strip * STRIP..][..t.len() / rows];
            t[row..].iter_mut().step_by(rows).zip(strip).for_each(|(t, x)| *t = *x);
        }
    });
    t
}

/// Output columns of one task of [`few_rows`]: enough to outweigh the start of a task, few enough to share.
const FEW_COLS: usize = 128;

fn few_rows(x: &[f32], w: &[f32], y: &mut [f32], m: usize, k: usize, n: usize, accumulate: bool) {
    // Computed as [n, m], whose chunks of columns are contiguous, then transposed.
    let mut yt = Buffer::new(m * n);
    if m * k * n < SMALL {
        dots(x, w, &mut yt, m, k);
    } else {
        for_each_chunk(&mut yt, FEW_COLS * m, |i, yt| {
            dots(x, &w[i * FEW_COLS * k..][..yt.len() / m * k], yt, m, k);
        });
    }
    for i in 0..m {
        for (j, y) in y[i * n..(i + 1) * n].iter_mut().enumerate() {
            *y = if accumulate { *y + yt[j * m + i] } else { yt[j * m + i] };
        }
    }
}

/// Eight running sums. A trait rather than loops over arrays, because the compiler does not keep eight arrays in registers.
trait Lanes: Copy {
    const ZERO: Self;
    /// self + x · w, lane by lane, rounded once.
    fn add_product(self, x: &[f32; 8], w: &[f32; 8]) -> Self;
    fn array(self) -> [f32; 8];
}

impl Lanes for [f32; 8] {
    const ZERO: Self = [0.0; 8];
    #[inline(always)]
    fn add_product(mut self, x: &[f32; 8], w: &[f32; 8]) -> Self {
        for l in 0..8 {
            self[l] = x[l].mul_add(w[l], self[l]);
        }
        self
    }
    #[inline(always)]
    fn array(self) -> [f32; 8] {
        self
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for Vec8 {
    // SAFETY: any bits are a vector of f32.
    const ZERO: Self = unsafe { std::mem::zeroed() };
    #[inline(always)]
    fn add_product(self, x: &[f32; 8], w: &[f32; 8]) -> Self {
        use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_loadu_ps};
        // SAFETY: both point at 8 floats; only `dots` names this type, in a function compiled for AVX2 and FMA.
        unsafe { _mm256_fmadd_ps(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(w.as_ptr()), self) }
    }
    #[inline(always)]
    fn array(self) -> [f32; 8] {
        // SAFETY: the same 32 bytes.
        unsafe { std::mem::transmute(self) }
    }
}

#[cfg(target_arch = "x86_64")]
type Vec8 = std::arch::x86_64::__m256;

/// Writes yt [.., m] at (b.., i..): dot products of W rows of w from b with M rows of x from i, each in 8 lanes and in the
/// same order whatever M and W are.
#[inline(always)]
fn dot_tile<L: Lanes, const M: usize, const W: usize>(
    x: &[f32],
    w: &[f32],
    yt: &mut [f32],
    i: usize,
    b: usize,
    m: usize,
    k: usize,
) {
    let mut acc = [[L::ZERO; M]; W];
    let xs: [_; M] = std::array::from_fn(|a| x[(i + a) * k..][..k].as_chunks::<8>());
    let ws: [_; W] = std::array::from_fn(|c| w[(b + c) * k..][..k].as_chunks::<8>());
    for l in 0..k / 8 {
        for c in 0..W {
            for a in 0..M {
                acc[c][a] = acc[c][a].add_product(&xs[a].0[l], &ws[c].0[l]);
            }
        }
    }
    for c in 0..W {
        for a in 0..M {
            let mut lanes = acc[c][a].array();
            for l in 0..k % 8 {
                lanes[l] = xs[a].1[l].mul_add(ws[c].1[l], lanes[l]);
            }
            yt[(b + c) * m + i + a] = fold(lanes);
        }
    }
}

/// yt [rows of w, m] = w · xᵀ, in tiles that fill the registers: 8 accumulators, or 4 where memory is the limit anyway.
#[inline(always)]
fn dots_body<L: Lanes>(x: &[f32], w: &[f32], yt: &mut [f32], m: usize, k: usize) {
    let n = w.len() / k;
    for b in (0..n).step_by(4) {
        let mut i = 0;
        while i < m {
            match (n - b >= 4, m - i >= 4) {
                (true, true) => {
                    dot_tile::<L, 4, 2>(x, w, yt, i, b, m, k);
                    dot_tile::<L, 4, 2>(x, w, yt, i, b + 2, m, k);
                }
                (true, false) => dot_tile::<L, 1, 4>(x, w, yt, i, b, m, k),
                (false, true) => {
                    for b in b..n {
                        dot_tile::<L, 4, 1>(x, w, yt, i, b, m, k);
                    }
                }
                (false, false) => {
                    for b in b..n {
                        dot_tile::<L, 1, 1>(x, w, yt, i, b, m, k);
                    }
                }
            }
            i += if m - i >= 4 { 4 } else { 1 };
        }
    }
}

fn dots(x: &[f32], w: &[f32], yt: &mut [f32], m: usize, k: usize) {
    #[cfg(target_arch = "x86_64")]
    if crate::Isa::active() >= crate::Isa::Avx2 {
        #[target_feature(enable = "avx2,fma")]
        fn avx2(x: &[f32], w: &[f32], yt: &mut [f32], m: usize, k: usize) {
            dots_body::<Vec8>(x, w, yt, m, k);
        }
        // SAFETY: `Isa::Avx2` and above are active only on a machine with AVX2 and FMA.
        return unsafe { avx2(x, w, yt, m, k) };
    }
    dots_body::<[f32; 8]>(x, w, yt, m, k);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_noise as noise;

    /// How the right operand lies in memory.
    #[derive(Clone, Copy)]
    enum Right {
        /// [n, k]: transposed, as weights are.
        Nk,
        /// [k, n].
        Kn,
    }

    fn naive(x: &[f32], w: &[f32], right: Right, m: usize, k: usize, n: usize) -> Vec<f64> {
        let at = |l: usize, j: usize| match right {
            Right::Nk => f64::from(w[j * k + l]),
            Right::Kn => f64::from(w[l * n + j]),
        };
        (0..m * n).map(|e| (0..k).map(|l| f64::from(x[e / n * k + l]) * at(l, e % n)).sum()).collect()
    }

    fn in_pool<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
    }

    const SHAPES: [(usize, usize, usize); 16] = [
        (1, 1, 1),
        (1, 576, 1537),
        (2, 33, 5),
        (3, 64, 130),
        (4, 7, 4),
        (5, 100, 1023),
        (7, 40, 41),
        (8, 300, 301),
        (9, 5, 3),
        (64, 64, 64),
        (255, 31, 513),
        (257, 65, 600),
        (513, 16, 70),
        (300, 576, 17),
        // More columns than one thread packs at a time.
        (20, 9, 1100),
        (10, 1024, 530),
    ];

    #[test]
    fn products_match_f64() {
        for (m, k, n) in SHAPES {
            let (x, w, y0) = (noise(m * k, 1), noise(n * k, 2), noise(m * n, 3));
            for right in [Right::Nk, Right::Kn] {
                let want = naive(&x, &w, right, m, k, n);
                let f = if let Right::Nk = right { matmul_nt } else { matmul_nn };
                for accumulate in [false, true] {
                    let mut y = y0.clone();
                    in_pool(1, || f(&x, &w, &mut y, m, k, n, accumulate));
                    for e in 0..m * n {
                        let want = want[e] + if accumulate { f64::from(y0[e]) } else { 0.0 };
                        let tol = 1e-6 * (k as f64).sqrt().max(1.0) * 4.0;
                        assert!((f64::from(y[e]) - want).abs() < tol, "{m}x{k}x{n} at {e}: {} {want}", y[e]);
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        for (m, k, n) in SHAPES {
            let (x, w) = (noise(m * k, 1), noise(n * k, 2));
            for f in [matmul_nt, matmul_nn] {
                let run = |threads| {
                    let mut y = vec![0.0; m * n];
                    in_pool(threads, || f(&x, &w, &mut y, m, k, n, false));
                    y
                };
                assert_eq!(run(1), run(2), "{m}x{k}x{n}");
            }
        }
    }

    #[test]
    fn dot_products_equal_their_twin_and_do_not_depend_on_the_batch() {
        let (k, n) = (133, 39);
        let (x, w) = (noise(8 * k, 1), noise(n * k, 2));
        let mut alone = vec![0.0; 8 * n];
        for i in 0..8 {
            matmul_nt(&x[i * k..][..k], &w, &mut alone[i * n..][..n], 1, k, n, false);
        }
        for m in 1..=8 {
            let (mut a, mut b) = (vec![0.0; m * n], vec![0.0; m * n]);
            dots(&x[..m * k], &w, &mut a, m, k);
            dots_body::<[f32; 8]>(&x[..m * k], &w, &mut b, m, k);
            assert_eq!(a, b);
            matmul_nt(&x[..m * k], &w, &mut a, m, k, n, false);
            assert_eq!(a, alone[..m * n]);
        }
    }

    #[test]
    fn transposed_twice_is_itself() {
        for (rows, columns) in [(0, 3), (3, 0), (1, 1), (5, 16), (7, 33), (40, 3)] {
            let x = noise(rows * columns, 1);
            let t = transposed(&x, rows, columns);
            assert!((0..x.len()).all(|i| t[i % columns * rows + i / columns] == x[i]), "{rows} x {columns}");
            assert_eq!(*transposed(&t, columns, rows), *x);
        }
    }

    #[test]
    fn empty_products() {
        let mut y = [5.0; 6];
        matmul_nt(&[], &[], &mut y, 2, 0, 3, true);
        assert_eq!(y, [5.0; 6]);
        matmul_nn(&[], &[], &mut y, 2, 0, 3, false);
        assert_eq!(y, [0.0; 6]);
        matmul_nt(&[], &[1.0; 4], &mut [], 0, 2, 2, false);
        matmul_nt(&[1.0; 4], &[], &mut [], 2, 2, 0, false);
    }
}
