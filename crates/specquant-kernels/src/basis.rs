//! Directions that the wider branch keeps of an input, and its coordinates along them.
//!
//! SpecQuant's own basis is the low end of the discrete Fourier transform (arXiv 2511.11663, Eqs. 5 and 10). Keeping the first k bins of the DFT of a weight row of
//! n inputs is a projection onto the span of
//!
//! ```text
//! 1/√n,   √(2/n) cos(2πmi/n),   √(2/n) sin(2πmi/n)   (m = 1 .. k−1),   and for even n at m = n/2:  (−1)^i/√n
//! ```
//!
//! an orthonormal basis of at most 2k−1 rows. The paper's Eq. 10 leaves out the real part and the factors 1/n at DC and Nyquist and
//! 2/n elsewhere; the orthonormal basis carries them. The cosine transform, single inputs and stored directions (low-rank
//! branches) are other bases of the same product.
//!
//! Cosines and sines mirror: a row of either transform is the same at i and at i's mirror image, or the negative. So an input is folded first, into sums and differences of
//! what mirrors, and each kind of rows is multiplied with one of them: half the work.

use crate::buffer::Buffer;
use crate::dense::matmul_nt;
use crate::ops::twin;
use crate::parallel::for_each_chunk;
use crate::weights::PANEL;
use crate::{PackedDense, matmul_packed};
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The directions P [r, n] that inputs are projected on, the most useful first.
#[derive(Debug, Clone, PartialEq)]
pub enum Basis {
    /// The real Fourier basis of n inputs by rising frequency, n rows: DC, cos 1, sin 1, cos 2, … An even n ends with the Nyquist
    /// frequency, which has no sine.
    Fourier(usize),
    /// The cosine transform DCT-II of n inputs by rising frequency, n rows.
    Dct(usize),
    /// Single inputs.
    Inputs {
        /// Width n.
        n: usize,
        /// Their numbers, below n.
        indices: Vec<u32>,
    },
    /// Any directions.
    Dense {
        /// Width n.
        n: usize,
        /// [r, n].
        rows: Vec<f32>,
    },
}

impl Basis {
    /// Input width n.
    pub fn in_features(&self) -> usize {
        match self {
            Basis::Fourier(n) | Basis::Dct(n) | Basis::Inputs { n, .. } | Basis::Dense { n, .. } => *n,
        }
    }

    /// Rows there are.
    pub fn len(&self) -> usize {
        match self {
            Basis::Fourier(n) | Basis::Dct(n) => *n,
            Basis::Inputs { indices, .. } => indices.len(),
            Basis::Dense { n, rows } => rows.len() / (*n).max(1),
        }
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Resident bytes; those of computed bases are shared by all that have them.
    pub fn bytes(&self) -> usize {
        match self {
            Basis::Fourier(_) | Basis::Dct(_) => 0,
            Basis::Inputs { indices, .. } => size_of_val(indices.as_slice()),
            Basis::Dense { rows, .. } => size_of_val(rows.as_slice()),
        }
    }

    /// x Pᵀ for the first `r` rows of P: the coordinates of every row of x. x: [rows, n]; the result: [rows, r].
    ///
    /// # Panics
    /// If x is not [rows, n], or there are fewer than r rows.
    pub fn project(&self, x: &[f32], rows: usize, r: usize) -> Buffer<f32> {
        let n = self.in_features();
        assert_eq!(x.len(), rows * n, "project: x is not [{rows}, {n}]");
        assert!(r <= self.len(), "project: {r} of {} basis rows", self.len());
        let mut p = Buffer::new(rows * r);
        match self {
            _ if r == 0 => {}
            Basis::Inputs { indices, .. } => {
                for (p, x) in p.chunks_exact_mut(r).zip(x.chunks_exact(n)) {
                    p.iter_mut().zip(indices).for_each(|(p, i)| *p = x[*i as usize]);
                }
            }
            Basis::Dense { rows: basis, .. } => matmul_nt(x, &basis[..r * n], &mut p, rows, n, r, false),
            Basis::Fourier(_) | Basis::Dct(_) => {
                let folded = self.folded(r);
                let at_once = FOLDED_ROWS.min(rows.div_ceil(rayon::current_num_threads())).max(1);
                for_each_chunk(&mut p, at_once * r, |i, p| {
                    let x = &x[i * at_once * n..][..p.len() / r * n];
                    folded.project(x, p, r);
                });
            }
        }
        p
    }

    /// The first `r` rows of P, [r, n]. Those of a computed basis are in f64 precision until they are rounded.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn rows(&self, r: usize) -> Cow<'_, [f32]> {
        assert!(r <= self.len(), "{r} of {} basis rows", self.len());
        match self {
            Basis::Dense { n, rows } => Cow::Borrowed(&rows[..r * n]),
            Basis::Inputs { n, indices } => {
                let mut rows = vec![0.0; r * n];
                rows.chunks_exact_mut((*n).max(1)).zip(indices).for_each(|(row, &i)| row[i as usize] = 1.0);
                Cow::Owned(rows)
            }
            Basis::Fourier(n) | Basis::Dct(n) => {
                let mut rows = vec![0.0; r * n];
                let each = rows.par_chunks_exact_mut((*n).max(1)).enumerate();
                each.for_each(|(row, out)| self.compute(row, out));
                Cow::Owned(rows)
            }
        }
    }

    /// Row `row` of a computed basis, of which `out.len()` values are asked for.
    fn compute(&self, row: usize, out: &mut [f32]) {
        let (fourier, n) = (matches!(self, Basis::Fourier(_)), self.in_features());
        let (m, sine) = if fourier { (row.div_ceil(2), self.is_odd(row)) } else { (row, false) };
        let constant = m == 0 || fourier && 2 * m == n;
        let norm = (if constant { 1.0 } else { 2.0 } / n as f64).sqrt();
        for (i, v) in out.iter_mut().enumerate() {
            // The exact remainder keeps the angle small, hence accurate.
            let turns = if fourier {
                (m * i % n) as f64 / n as f64
            } else {
                (m * (2 * i + 1) % (4 * n)) as f64 / (4 * n) as f64
            };
            let angle = turns * std::f64::consts::TAU;
            *v = (norm * if sine { angle.sin() } else { angle.cos() }) as f32;
        }
    }

    /// Whether a row of a computed basis is its own negative when it is mirrored: the sines of one transform, every other row of the other.
    fn is_odd(&self, row: usize) -> bool {
        if matches!(self, Basis::Fourier(_)) { row > 0 && row.is_multiple_of(2) } else { row % 2 == 1 }
    }

    /// At least the first `r` rows of a computed basis. Kept for the life of the process, as a model has few widths.
    fn folded(&self, r: usize) -> Arc<Folded> {
        type Cache = Mutex<HashMap<(bool, usize, usize), Arc<Folded>>>;
        static CACHE: OnceLock<Cache> = OnceLock::new();
        let n = self.in_features();
        // As many even rows as odd ones, and one more, in whole panels; doubled from one to the next, so that all ranks together take twice the memory of the largest.
        let most = ((r + 1).next_power_of_two().max(2 * PANEL) - 1).min(n);
        let key = (matches!(self, Basis::Fourier(_)), n, most);
        // A panic elsewhere cannot leave the map half-written, so a poisoned lock is as good as new.
        let cache = || CACHE.get_or_init(Cache::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = cache().get(&key) {
            return Arc::clone(known);
        }
        // Not under the lock: the rows are computed in parallel, and a worker may take up other work that wants it.
        let folded = Arc::new(Folded::new(self, most));
        Arc::clone(cache().entry(key).or_insert(folded))
    }
}

/// Rows that are folded and multiplied at a time, at most: a tile, which stays in a core's L2 beside 4096 folded inputs of 31 basis rows.
const FOLDED_ROWS: usize = 12;

/// The first rows of a computed basis, halved: what lies behind the mirror is what lies before it, or the negative.
struct Folded {
    /// Width n.
    n: usize,
    /// Whether i mirrors to n − i, and 0 to itself, rather than to n − 1 − i.
    fourier: bool,
    /// The rows that stay what they are when mirrored, and the others, `[.., n / 2 or so]`.
    halves: [PackedDense; 2],
}

impl Folded {
    fn new(basis: &Basis, rows: usize) -> Self {
        let (fourier, n) = (matches!(basis, Basis::Fourier(_)), basis.in_features());
        let half = if fourier { n / 2 + 1 } else { n.div_ceil(2) };
        let halves = [false, true].map(|odd| {
            let mine: Vec<usize> = (0..rows).filter(|row| basis.is_odd(*row) == odd).collect();
            let mut values = vec![0.0; mine.len() * half];
            values.par_chunks_exact_mut(half).zip(&mine).for_each(|(out, row)| basis.compute(*row, out));
            PackedDense::pack(&values, mine.len(), half)
        });
        Folded { n, fourier, halves }
    }

    /// The first r coordinates of some rows. x: [.., n]; p: [.., r].
    fn project(&self, x: &[f32], p: &mut [f32], r: usize) {
        let (n, rows) = (self.n, p.len() / r);
        let half = self.halves[0].in_features();
        let mut folded = Buffer::new(2 * rows * half);
        let (sums, differences) = folded.split_at_mut(rows * half);
        let each = sums.chunks_exact_mut(half).zip(differences.chunks_exact_mut(half));
        for (x, (sums, differences)) in x.chunks_exact(n).zip(each) {
            fold(x, self.fourier, sums, differences);
        }
        let counts = self.halves.each_ref().map(PackedDense::out_features);
        let mut products = Buffer::new(rows * (counts[0] + counts[1]));
        let (even, odd) = products.split_at_mut(rows * counts[0]);
        matmul_packed(sums, &self.halves[0], even, rows);
        matmul_packed(differences, &self.halves[1], odd, rows);
        // DC, which has no sine; then even and odd rows take turns.
        let lead = usize::from(self.fourier);
        for (t, p) in p.chunks_exact_mut(r).enumerate() {
            let even = &even[t * counts[0]..][..counts[0]];
            let odd = &odd[t * counts[1]..][..counts[1]];
            let (first, others) = p.split_at_mut(lead);
            first.copy_from_slice(&even[..lead]);
            others.iter_mut().step_by(2).zip(&even[lead..]).for_each(|(p, v)| *p = *v);
            others.iter_mut().skip(1).step_by(2).zip(odd).for_each(|(p, v)| *p = *v);
        }
    }
}

twin! {
    /// Sums and differences of what mirrors; what is its own mirror image stands alone.
    fn fold = fold_body(x: &[f32], fourier: bool, sums: &mut [f32], differences: &mut [f32])
}

#[inline(always)]
fn fold_body(x: &[f32], fourier: bool, sums: &mut [f32], differences: &mut [f32]) {
    let half = sums.len();
    let lead = usize::from(fourier);
    // Of the n − lead values that mirror each other, the middle one, if there is one, mirrors itself.
    let pairs = (x.len() - lead) / 2;
    for i in (0..lead).chain(lead + pairs..half) {
        (sums[i], differences[i]) = (x[i], 0.0);
    }
    let front = &x[lead..][..pairs];
    let back = &x[x.len() - pairs..];
    let (sums, differences) = (&mut sums[lead..][..pairs], &mut differences[lead..][..pairs]);
    for i in 0..pairs {
        let (a, b) = (front[i], back[pairs - 1 - i]);
        sums[i] = a + b;
        differences[i] = a - b;
    }
}

/// Rows of [`Basis::Fourier`] that the lowest `k` bins span: 2k − 1, less one if the last is the Nyquist frequency; 0 for no bins.
pub fn fourier_rows(n: usize, k: usize) -> usize {
    (2 * k).saturating_sub(1).min(n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_noise as noise;
    use std::f64::consts::TAU;

    /// Real and imaginary part of bin m, by definition.
    fn dft(x: &[f32], m: usize) -> (f64, f64) {
        let w = -TAU * m as f64 / x.len() as f64;
        x.iter().enumerate().fold((0.0, 0.0), |(re, im), (i, &v)| {
            let (s, c) = (w * i as f64).sin_cos();
            (re + f64::from(v) * c, im + f64::from(v) * s)
        })
    }

    fn assert_orthonormal(rows: &[f32], n: usize) {
        for (i, a) in rows.chunks(n).enumerate() {
            for (j, b) in rows.chunks(n).enumerate() {
                let dot: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let want = if i == j { 1.0 } else { 0.0 };
                assert!((dot - want).abs() < 1e-6, "n {n}: {i}·{j} = {dot}");
            }
        }
    }

    #[test]
    fn computed_bases_are_orthonormal_and_the_full_ones_preserve_energy() {
        for n in [1, 2, 3, 8, 9, 30, 64, 65] {
            for basis in [Basis::Fourier(n), Basis::Dct(n)] {
                assert_eq!((basis.len(), basis.in_features(), basis.bytes()), (n, n, 0));
                assert_orthonormal(&basis.rows(n), n);
                let x = noise(n, n as u64);
                let energy = |v: &[f32]| v.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
                assert!((energy(&basis.project(&x, 1, n)) - energy(&x)).abs() < 1e-5);
                assert_eq!(basis.rows(n.div_ceil(2))[..], basis.rows(n)[..n.div_ceil(2) * n]);
            }
        }
        assert!(Arc::ptr_eq(&Basis::Dct(30).folded(4), &Basis::Dct(30).folded(8)));
        // All ranks share a few tables.
        let sizes = (1..=1000).map(|r| Basis::Dct(1000).folded(r).halves[0].out_features());
        assert_eq!(sizes.collect::<std::collections::BTreeSet<_>>().len(), 6);
        assert_eq!([0, 1, 16].map(|k| fourier_rows(30, k)), [0, 1, 30]);
        assert_eq!(fourier_rows(31, 16), 31);
        let basis = Basis::Fourier(30);
        assert!(basis.project(&[], 0, 2).is_empty() && basis.project(&[1.0; 30], 1, 0).is_empty());
    }

    #[test]
    fn fourier_coordinates_are_the_scaled_dft() {
        for n in [24, 25] {
            let x = noise(n, 2);
            let p = Basis::Fourier(n).project(&x, 1, n);
            for m in 0..=n / 2 {
                let (re, im) = dft(&x, m);
                let norm =
                    if m == 0 || 2 * m == n { (1.0 / n as f64).sqrt() } else { (2.0 / n as f64).sqrt() };
                assert!((f64::from(p[(2 * m).saturating_sub(1)]) - re * norm).abs() < 1e-5);
                if m > 0 && 2 * m != n {
                    assert!((f64::from(p[2 * m]) + im * norm).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn cosine_coordinates_are_those_of_scipy() {
        // scipy.fft.dct([1, 2, 4, 8], type=2, norm="ortho")
        let want = [7.5, -5.114_166_5, 1.5, -0.587_623_4];
        for (got, want) in Basis::Dct(4).project(&[1.0, 2.0, 4.0, 8.0], 1, 4).iter().zip(want) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }

    #[test]
    fn inputs_and_stored_directions_are_taken_as_they_are() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let inputs = Basis::Inputs { n: 3, indices: vec![2, 0] };
        assert_eq!(inputs.project(&x, 2, 2)[..], [3.0, 1.0, 6.0, 4.0]);
        assert_eq!(inputs.project(&x, 2, 1)[..], [3.0, 6.0]);
        let dense = Basis::Dense { n: 3, rows: inputs.rows(2).into_owned() };
        assert_eq!((dense.len(), dense.project(&x, 2, 2)), (2, inputs.project(&x, 2, 2)));
    }
}
