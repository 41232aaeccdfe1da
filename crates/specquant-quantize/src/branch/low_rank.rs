//! The low-rank branch of SVDQuant (arXiv 2411.05007) and its activation-weighted form.
//!
//! The best approximation of rank r to a weight W [out, in], where an input of second moment H weighs the error as `tr((W − L) H (W − L)ᵀ)`,
//! is `L = U Uᵀ W` with U the leading r eigenvectors of `W H Wᵀ` (the truncated SVD of `W H^½`, put back; no inverse is needed). `H = 1`
//! gives the plain SVD. So the basis is `P = Uᵀ W`, with rows of unit length, and the coefficients are U times their lengths.
//!
//! U is found by subspace iteration with a start from a fixed stream of random numbers (Halko et al., arXiv 0909.4061): the layers of a model
//! have a few leading directions, and a search needs hundreds of these.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par, Side};
use half::f16;
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rayon::prelude::*;

use super::{BranchError, coefficient};

/// Directions iterated beyond those asked for.
const OVERSAMPLING: usize = 8;
/// Applications of `W H Wᵀ`. Each multiplies the energy missed by the fourth power of σ_{q+1} / σ_r.
const ITERATIONS: usize = 6;

/// Rows of a product that one task computes.
const PANEL: usize = 64;

/// a · b, a fixed panel of rows to a task, so that any number of threads adds up in the same order.
fn product(a: MatRef<f64>, b: MatRef<f64>) -> Mat<f64> {
    let starts: Vec<usize> = (0..a.nrows()).step_by(PANEL).collect();
    let panel = |first: usize| {
        let rows = PANEL.min(a.nrows() - first);
        let mut c = Mat::zeros(rows, b.ncols());
        matmul(c.as_mut(), Accum::Replace, a.subrows(first, rows), b, 1.0, Par::Seq);
        c
    };
    let panels: Vec<Mat<f64>> = starts.into_par_iter().map(panel).collect();
    Mat::from_fn(a.nrows(), b.ncols(), |i, j| panels[i / PANEL][(i % PANEL, j)])
}

/// A rank-r approximation: P `[r, in]`, as it will be read back, and C `[out, r]`.
pub type LowRank = (Vec<f32>, Vec<f16>);

/// The best rank-`r` branch of `w: [out, inp]`, weighed by `hessian: [inp, inp]` if given.
///
/// # Errors
/// If a value does not fit f16.
///
/// # Panics
/// If the slices do not have these shapes.
pub fn low_rank(
    w: &[f32],
    out: usize,
    inp: usize,
    r: usize,
    hessian: Option<&[f64]>,
) -> Result<LowRank, BranchError> {
    assert_eq!(w.len(), out * inp, "weights are [out, in]");
    let r = r.min(out).min(inp);
    let q = (r + OVERSAMPLING).min(out).min(inp);
    let w = Mat::from_fn(out, inp, |i, j| f64::from(w[i * inp + j]));
    let hessian = hessian.map(|h| MatRef::from_row_major_slice(h, inp, inp));
    // H Wᵀ Y, without the H where there is none.
    let weighed = |y: MatRef<f64>| {
        let z = product(w.transpose(), y);
        match hessian {
            Some(h) => product(h, z.as_ref()),
            None => z,
        }
    };
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut y = Mat::from_fn(out, q, |_, _| rng.random::<f64>() - 0.5);
    for _ in 0..ITERATIONS {
        y = y.qr().compute_thin_Q();
        y = product(w.as_ref(), weighed(y.as_ref()).as_ref());
    }
    y = y.qr().compute_thin_Q();
    // Within the subspace: eigenvectors of Yᵀ W H Wᵀ Y, in rising order.
    let small = product(product(w.transpose(), y.as_ref()).transpose(), weighed(y.as_ref()).as_ref());
    let u = match small.self_adjoint_eigen(Side::Lower) {
        Ok(eigen) => product(y.as_ref(), eigen.U().subcols(q - r, r)),
        // Only for values that are not finite, which the conversion below reports.
        Err(_) => y.subcols(0, r).to_owned(),
    };
    let p = product(u.transpose(), w.as_ref());
    let (mut rows, mut coeffs) = (Vec::with_capacity(r * inp), vec![f16::ZERO; out * r]);
    for item in 0..r {
        let from = r - 1 - item; // the largest first
        let length = p.row(from).iter().map(|v| v * v).sum::<f64>().sqrt();
        let inverse = if length > 0.0 { 1.0 / length } else { 0.0 };
        for (channel, v) in p.row(from).iter().enumerate() {
            rows.push(coefficient((v * inverse) as f32, channel, item)?.to_f32());
        }
        for channel in 0..out {
            coeffs[channel * r + item] = coefficient((u[(channel, from)] * length) as f32, channel, item)?;
        }
    }
    Ok((rows, coeffs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounding::Hessian;
    use crate::rounding::testing::{correlated, gaussian, with_threads};

    #[test]
    fn same_bits_for_any_number_of_threads() {
        let w = gaussian(150 * 90, 5);
        let run = || low_rank(&w, 150, 90, 6, None).unwrap();
        assert_eq!(with_threads(1, run), with_threads(2, run));
    }

    fn error(w: &[f32], inp: usize, r: usize, (rows, coeffs): &LowRank, h: Option<&[f64]>) -> f64 {
        let mut total = 0.0;
        for (w, c) in w.chunks(inp).zip(coeffs.chunks(r)) {
            let value = |i: usize| {
                c.iter().enumerate().map(|(k, c)| f64::from(c.to_f32() * rows[k * inp + i])).sum::<f64>()
            };
            let e: Vec<f64> = (0..inp).map(|i| f64::from(w[i]) - value(i)).collect();
            for i in 0..inp {
                total += match h {
                    Some(h) => e[i] * (0..inp).map(|j| h[i * inp + j] * e[j]).sum::<f64>(),
                    None => e[i] * e[i],
                };
            }
        }
        total
    }

    /// Eckart-Young: what is left is the energy of the other singular values, of W and of W H^½.
    #[test]
    fn errors_are_those_of_the_truncated_svd() {
        let (out, inp, r) = (40, 24, 5);
        let w = gaussian(out * inp, 1);
        let mut hessian = Hessian::new(inp);
        hessian.add(&correlated(200, inp, 2));
        let h = hessian.normalized();
        let factor = MatRef::from_row_major_slice(&h, inp, inp).llt(Side::Lower).unwrap();
        let matrix = Mat::from_fn(out, inp, |i, j| f64::from(w[i * inp + j]));
        for (h, target) in [(None, matrix.clone()), (Some(h.as_slice()), &matrix * factor.L())] {
            let s = target.singular_values().unwrap();
            let want: f64 = s[r..].iter().map(|s| s * s).sum();
            let found = low_rank(&w, out, inp, r, h).unwrap();
            let got = error(&w, inp, r, &found, h);
            assert!(got > want * 0.999 && got < want * 1.02, "{got} {want}");
        }
        let plain = low_rank(&w, out, inp, r, None).unwrap();
        let weighed = low_rank(&w, out, inp, r, Some(&h)).unwrap();
        assert!(error(&w, inp, r, &weighed, Some(&h)) < error(&w, inp, r, &plain, Some(&h)));
    }

    #[test]
    fn full_rank_gives_the_weight_and_zeros_give_zeros() {
        let w = gaussian(6 * 9, 3);
        assert!(error(&w, 9, 6, &low_rank(&w, 6, 9, 6, None).unwrap(), None) < 1e-4);
        let (rows, coeffs) = low_rank(&[0.0; 12], 3, 4, 2, None).unwrap();
        assert!(rows.iter().all(|v| v.is_finite()) && coeffs.iter().all(|c| *c == f16::ZERO));
    }

    #[test]
    fn what_f16_cannot_hold_is_an_error() {
        let w = [1e6f32, 0.0, 0.0, 1.0];
        assert!(matches!(low_rank(&w, 2, 2, 1, None), Err(BranchError::NotRepresentable { .. })));
        assert!(low_rank(&[f32::NAN; 4], 2, 2, 1, None).is_err());
    }
}
