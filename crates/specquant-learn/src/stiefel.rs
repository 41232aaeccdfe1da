//! Steps on the manifold of orthonormal matrices.
//!
//! Cayley SGD (Li et al., arXiv 2002.01113, algorithm 1) as SpinQuant runs it (train_utils/optimizer.py, class `SGDG`, momentum 0): with
//! X = Rᵀ and the Euclidean gradient G of the loss by R,
//!
//! ```text
//! V = −Gᵀ      Ŵ = V Xᵀ − ½ X (Xᵀ V Xᵀ)      W = Ŵ − Ŵᵀ      α = min(lr, 1 / (‖W‖₁ + 1e-8))
//! Y = X + α V,   five times:  Y ← X + α W ½ (X + Y)      R ← Yᵀ
//! ```
//!
//! The fixed point is the Cayley transform (I − α/2 W)⁻¹ (I + α/2 W) X. Before a step the rows of R are normalized.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::ops::{tensor, to_vec};

/// One step. r, gradient: `[n, n]`; `retract` makes the rows of r exactly orthonormal first.
pub(crate) fn cayley_step(r: &Tensor, gradient: &Tensor, lr: f64, retract: bool) -> Result<Tensor> {
    let norms = (r.sqr()?.sum_keepdim(1)?.sqrt()? + 1e-8)?;
    let mut r = r.broadcast_div(&norms)?;
    if retract {
        r = orthonormal(&r)?;
    }
    let x = r.t()?;
    let v = gradient.t()?.neg()?;
    let mx = v.matmul(&r)?;
    let w = (&mx - (x.matmul(&r.matmul(&mx)?)? * 0.5)?)?;
    let w = (&w - w.t()?)?;
    let norm = f64::from(w.abs()?.sum(0)?.max(0)?.to_scalar::<f32>()?);
    let alpha = lr.min(1.0 / (norm + 1e-8));
    let mut y = (&x + (v * alpha)?)?;
    for _ in 0..5 {
        y = (&x + (w.matmul(&(&x + y)?)? * (0.5 * alpha))?)?;
    }
    y.t()?.contiguous()
}

/// The rows made orthonormal: the Q of a QR decomposition of the transpose whose R has a positive diagonal. r: `[n, n]`, near to it
/// already.
pub(crate) fn orthonormal(r: &Tensor) -> Result<Tensor> {
    let n = r.dim(1)?;
    let mut rows: Vec<f64> = to_vec(r)?.into_iter().map(f64::from).collect();
    // Modified Gram-Schmidt, in f64; on rows that are nearly orthonormal it loses nothing.
    for i in 0..n {
        let (done, rest) = rows.split_at_mut((i + 1) * n);
        let row = &mut done[i * n..];
        let norm = row.iter().map(|a| a * a).sum::<f64>().sqrt();
        row.iter_mut().for_each(|a| *a /= norm);
        rest.par_chunks_exact_mut(n).for_each(|other| {
            let dot: f64 = row.iter().zip(other.iter()).map(|(a, b)| a * b).sum();
            other.iter_mut().zip(row.iter()).for_each(|(b, a)| *b -= dot * a);
        });
    }
    tensor(rows.into_iter().map(|v| v as f32).collect(), (n, n))
}

/// Largest entry of |R Rᵀ − I|. r: `[n, n]`.
pub(crate) fn deviation(r: &Tensor) -> Result<f32> {
    let n = r.dim(0)?;
    let product = to_vec(&r.matmul(&r.t()?)?)?;
    let off = |(i, v): (usize, &f32)| (v - f32::from(u8::from(i % (n + 1) == 0))).abs();
    Ok(product.iter().enumerate().map(off).fold(0.0, f32::max))
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn random(n: usize, seed: u64) -> Tensor {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        tensor((0..n * n).map(|_| rng.random_range(-1.0..1.0)).collect(), (n, n)).unwrap()
    }

    #[test]
    fn in_the_plane_a_step_turns_by_the_cayley_angle() {
        let identity = tensor(vec![1.0, 0.0, 0.0, 1.0], (2, 2)).unwrap();
        for (g, lr) in [(0.2f32, 0.5), (0.2, 1.5), (40.0, 1.5)] {
            let gradient = tensor(vec![0.0, g, -g, 0.0], (2, 2)).unwrap();
            let r = to_vec(&cayley_step(&identity, &gradient, lr, false).unwrap()).unwrap();
            let step = f64::from(g) * lr.min(1.0 / f64::from(g));
            let angle = (2.0 * (step / 2.0).atan()) as f32;
            // Five iterations leave (step / 2)⁶ or so.
            let tolerance = 1e-6 + (step as f32 / 2.0).powi(6);
            assert!((r[0] - angle.cos()).abs() < tolerance, "{g} {lr}: {r:?}, angle {angle}");
            // Against the gradient.
            assert!((r[1] + angle.sin()).abs() < tolerance, "{g} {lr}: {r:?}, angle {angle}");
        }
    }

    #[test]
    fn a_hundred_steps_descend_and_stay_orthonormal() {
        for n in [16, 64] {
            let target = orthonormal(&random(n, 1)).unwrap();
            let mut r = orthonormal(&random(n, 2)).unwrap();
            // ‖R − target‖² / 2, whose gradient on the manifold is −target.
            let distance = |r: &Tensor| {
                (r - &target).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
            };
            let start = distance(&r);
            let gradient = (target.neg().unwrap() / (n as f64).sqrt()).unwrap();
            for step in 0..100 {
                let lr = 1.5 * 0.5 * (1.0 + (std::f64::consts::PI * f64::from(step) / 100.0).cos());
                r = cayley_step(&r, &gradient, lr, false).unwrap();
                let deviation = deviation(&r).unwrap();
                assert!(deviation < 1e-4, "n = {n}, step {step}: {deviation}");
            }
            assert!(distance(&r) < 0.7 * start, "{n}: {} of {start}", distance(&r));
        }
    }

    #[test]
    fn retraction_makes_rows_orthonormal_and_moves_them_little() {
        let r = orthonormal(&random(64, 3)).unwrap();
        assert!(deviation(&r).unwrap() < 1e-6);
        let bent = (&r + (random(64, 4) * 1e-3).unwrap()).unwrap();
        assert!(deviation(&bent).unwrap() > 1e-4);
        let back = orthonormal(&bent).unwrap();
        assert!(deviation(&back).unwrap() < 1e-6);
        let moved = to_vec(&(back - &r).unwrap()).unwrap().into_iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(moved < 5e-3, "{moved}");
    }
}
