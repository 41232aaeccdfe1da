//! Kept coordinates: the few directions that carry most of an input's energy are quantized to 8 bits, so that they no longer set the step of
//! the 4-bit rest.
//!
//! The r directions are the leading principal ones of the calibration inputs (ResQ, arXiv 2412.14363, section 4, keeps those of the residual
//! stream, an eighth of its width). [`InputTransform`](specquant_model::InputTransform) makes them the first r coordinates by as many Householder
//! reflections, which are orthonormal even if their vectors are rounded to 8 bits, as they are here. They are fitted one after another, each to
//! what the former ones left, so that what one lost to its rounding is found by the next.

use rayon::prelude::*;

/// Multiplications by the second moment that find one direction.
const ITERATIONS: usize = 16;

/// Reflections of an input, and the second moment of what is behind the coordinates that they keep.
pub struct Fit {
    /// The vectors, `[r, n]`, whole numbers up to 127.
    pub vectors: Vec<f32>,
    /// Second moment of each kept coordinate, `[r]`.
    pub kept: Vec<f64>,
    /// `[n - r, n - r]`.
    pub rest: Vec<f64>,
}

/// Fits `r` reflections to inputs of second moment `h: [n, n]`.
///
/// # Panics
/// If h is not n · n long or r is not below n.
pub fn fit(mut h: Vec<f64>, n: usize, r: usize) -> Fit {
    assert!(h.len() == n * n && r < n, "{r} directions of [{n}, {n}]");
    let mut vectors = vec![0.0f32; r * n];
    for (i, vector) in vectors.chunks_exact_mut(n).enumerate() {
        // Everything happens in the block behind the coordinates that are kept already.
        let v = reflector(leading(&h, n, i));
        vector[i..].iter_mut().zip(&v).for_each(|(to, &v)| *to = v as f32);
        reflect(&mut h, n, i, &v);
    }
    let kept = (0..r).map(|i| h[i * (n + 1)]).collect();
    for row in r..n {
        h.copy_within(row * n + r..(row + 1) * n, (row - r) * (n - r));
    }
    h.truncate((n - r) * (n - r));
    Fit { vectors, kept, rest: h }
}

/// The leading eigenvector, about, of the block of h behind row and column `first`.
fn leading(h: &[f64], n: usize, first: usize) -> Vec<f64> {
    let rows = || h.par_chunks_exact(n).skip(first).map(|row| &row[first..]);
    // The row of the largest diagonal is the image of one power iteration.
    let largest = (first..n).max_by(|&a, &b| h[a * (n + 1)].total_cmp(&h[b * (n + 1)])).unwrap_or(first);
    let mut p: Vec<f64> = h[largest * n + first..(largest + 1) * n].to_vec();
    for _ in 0..ITERATIONS {
        let length = p.iter().map(|v| v * v).sum::<f64>().sqrt();
        if length <= f64::MIN_POSITIVE {
            break;
        }
        p.iter_mut().for_each(|v| *v /= length);
        p = rows().map(|row| row.iter().zip(&p).map(|(h, p)| h * p).sum()).collect();
    }
    p
}

/// The vector, rounded, of the reflection that turns `p` into a multiple of the first unit vector.
fn reflector(mut p: Vec<f64>) -> Vec<f64> {
    let length = p.iter().map(|v| v * v).sum::<f64>().sqrt();
    p[0] += if p[0] < 0.0 { -length } else { length };
    let largest = p.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let scale = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    p.iter_mut().for_each(|v| *v = (*v * scale).round_ties_even());
    p
}

/// H h H for the reflection of a vector that is zero in its first places.
fn reflect(h: &mut [f64], n: usize, first: usize, v: &[f64]) {
    let length: f64 = v.iter().map(|v| v * v).sum();
    if length == 0.0 {
        return;
    }
    // With w = h v · 2/|v|² − v (vᵀ h v) · 2/|v|⁴:  H h H = h − v wᵀ − w vᵀ.
    let block = |row: &[f64]| row[first..].iter().zip(v).map(|(h, v)| h * v).sum::<f64>();
    let hv: Vec<f64> = h.par_chunks_exact(n).skip(first).map(block).collect();
    let along: f64 = hv.iter().zip(v).map(|(a, b)| a * b).sum::<f64>() / length;
    let w: Vec<f64> = hv.iter().zip(v).map(|(hv, v)| 2.0 / length * (hv - along * v)).collect();
    h.par_chunks_exact_mut(n).skip(first).enumerate().for_each(|(i, row)| {
        let (vi, wi) = (v[i], w[i]);
        row[first..].iter_mut().zip(v.iter().zip(&w)).for_each(|(h, (v, w))| *h -= vi * w + wi * v);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounding::Hessian;
    use crate::rounding::testing::{correlated, gaussian, with_threads};
    use specquant_kernels::Reflections;

    /// Inputs with a few strong directions, one of them a single channel a thousand times as strong.
    fn inputs(rows: usize, n: usize) -> Vec<f32> {
        let mut x = correlated(rows, n, 1);
        let strong = gaussian(3 * n, 2);
        let along = gaussian(rows * 3, 3);
        for (row, along) in x.chunks_mut(n).zip(along.chunks(3)) {
            for i in 0..n {
                row[i] += (0..3).map(|k| 20.0 * along[k] * strong[k * n + i]).sum::<f32>();
            }
            row[7] += 20_000.0 * along[0];
        }
        x
    }

    #[test]
    fn the_kept_coordinates_hold_what_principal_directions_hold() {
        let (rows, n, r) = (400, 60, 6);
        let x = inputs(rows, n);
        let mut hessian = Hessian::new(n);
        hessian.add(&x);
        let h = hessian.normalized();
        let fitted = fit(h.clone(), n, r);
        let mut turned = x.clone();
        Reflections::new(n, fitted.vectors).apply(&mut turned, rows);
        let energy: f64 = turned.chunks(n).flat_map(|row| &row[r..]).map(|v| f64::from(*v).powi(2)).sum();
        // The best that r directions can leave: the other eigenvalues; H is 2/rows Σ x xᵀ.
        let matrix = faer::MatRef::from_row_major_slice(&h, n, n);
        let eigenvalues = matrix.self_adjoint_eigenvalues(faer::Side::Lower).unwrap();
        let least: f64 = eigenvalues[..n - r].iter().sum::<f64>() * rows as f64 / 2.0;
        assert!(energy >= least * 0.999 && energy < 1.2 * least, "{energy} {least}");
        // And it is what the second moment of the rest says.
        let trace: f64 = fitted.rest.iter().step_by(n - r + 1).sum::<f64>() * rows as f64 / 2.0;
        assert!((trace / energy - 1.0).abs() < 1e-3, "{trace} {energy}");
    }

    #[test]
    fn zeros_and_threads() {
        let fitted = fit(vec![0.0; 25], 5, 2);
        assert!(fitted.vectors.iter().all(|&v| v == 0.0) && fitted.rest == [0.0; 9]);
        let mut h = Hessian::new(40);
        h.add(&inputs(100, 40));
        let run = || fit(h.normalized(), 40, 8).vectors;
        assert_eq!(with_threads(1, run), with_threads(2, run));
    }
}
