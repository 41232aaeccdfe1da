//! What calibration learns about the inputs of linear layers.

use specquant_kernels::Reflections;
use specquant_model::InputTransform;

use crate::layer::Input;
use crate::recipe::InputChange;
use crate::rounding::Hessian;
use crate::transforms::keep;
use crate::{Error, Result};

/// Norm of a kept coordinate at least, as a share of the largest.
const LEAST_NORM: f32 = 1e-3;

/// What calibration learns about the input of a [`Site`](specquant_model::Site).
pub struct SiteStats {
    /// Largest magnitude per channel, `[in]`.
    pub max: Vec<f32>,
    /// Sum of magnitudes per channel, `[in]`.
    sum: Vec<f64>,
    /// Rows seen.
    rows: usize,
    /// Σ x xᵀ, if rounding or branch need it.
    hessian: Option<Hessian>,
    /// Every `stride`-th row, for searches and reports, `[sampled, in]`.
    sample: Vec<f32>,
    stride: usize,
}

impl SiteStats {
    /// Empty statistics of a site with `inp` channels that will see `total_rows` rows.
    pub fn new(inp: usize, total_rows: usize, search_tokens: usize, with_hessian: bool) -> Self {
        SiteStats {
            max: vec![0.0; inp],
            sum: vec![0.0; inp],
            rows: 0,
            hessian: with_hessian.then(|| Hessian::new(inp)),
            sample: Vec::new(),
            stride: total_rows.div_ceil(search_tokens).max(1),
        }
    }

    /// Adds rows. x: `[rows, in]`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] names the first broken channel of `module`.
    pub fn add(&mut self, x: &[f32], module: &str) -> Result<()> {
        let inp = self.max.len();
        for row in x.chunks_exact(inp) {
            if self.rows.is_multiple_of(self.stride) {
                self.sample.extend_from_slice(row);
            }
            self.rows += 1;
            for (channel, (&x, (max, sum))) in
                row.iter().zip(self.max.iter_mut().zip(&mut self.sum)).enumerate()
            {
                if !x.is_finite() {
                    return Err(Error::NotFinite {
                        module: module.to_owned(),
                        what: "the calibration input",
                        channel: Some(channel),
                    });
                }
                *max = max.max(x.abs());
                *sum += f64::from(x.abs());
            }
        }
        if let Some(hessian) = &mut self.hessian {
            hessian.add(x);
        }
        Ok(())
    }

    /// A copy to try a transform on, with the second moment only if it is asked for.
    pub(crate) fn trial(&self, with_hessian: bool) -> Self {
        SiteStats {
            max: self.max.clone(),
            sum: self.sum.clone(),
            rows: self.rows,
            hessian: self.hessian.as_ref().filter(|_| with_hessian).cloned(),
            sample: self.sample.clone(),
            stride: self.stride,
        }
    }

    /// What the layers are quantized by. mean_abs: of [`SiteStats::mean_abs`].
    pub fn input<'a>(&'a self, mean_abs: &'a [f32]) -> Input<'a> {
        Input { mean_abs, hessian: self.hessian.as_ref(), sample: &self.sample, rows: self.sampled_rows() }
    }

    /// The same statistics of the smoothed input `x / λ`.
    pub fn smooth(&mut self, lambda: &[f32]) {
        for (channel, &l) in lambda.iter().enumerate() {
            self.max[channel] /= l;
            self.sum[channel] /= f64::from(l);
        }
        self.sample
            .chunks_exact_mut(lambda.len())
            .for_each(|row| row.iter_mut().zip(lambda).for_each(|(x, l)| *x /= l));
        if let Some(hessian) = &mut self.hessian {
            hessian.rescale(&lambda.iter().map(|l| 1.0 / l).collect::<Vec<_>>());
        }
    }

    /// Hands the second moment over: it takes as much memory as a layer's weights and more.
    pub(crate) fn take_hessian(&mut self) -> Option<Hessian> {
        self.hessian.take()
    }

    /// The transform of this input that `change` asks for, and the statistics of what it does not keep, the second moment among them, which is
    /// then no longer here.
    pub fn transform(&mut self, change: &InputChange) -> (InputTransform, SiteStats) {
        let n = self.max.len();
        let rotation = InputTransform::new(Reflections::new(n, Vec::new()), Vec::new(), change.rotation);
        let hessian =
            self.take_hessian().map(|h| h.rotated(|x| rotation.apply(&x, x.len() / n).rest.into_vec()));
        let (vectors, norms, hessian) = match (hessian, change.keep.min(n - 1)) {
            (Some(hessian), r @ 1..) => {
                let keep::Fit { vectors, kept, rest } = keep::fit(hessian.into_normalized(), n, r);
                // H is twice the second moment. A coordinate that this text hardly uses must not become the largest on another.
                let norm = |h: f64| (h.max(0.0) / 2.0).sqrt() as f32;
                let largest = kept.iter().fold(0.0f32, |m, &h| m.max(norm(h)));
                let least = if largest > 0.0 { largest * LEAST_NORM } else { 1.0 };
                let norms = kept.into_iter().map(|h| norm(h).max(least)).collect();
                (vectors, norms, Some(Hessian::from_matrix(n - r, rest)))
            }
            (hessian, _) => (Vec::new(), Vec::new(), hessian),
        };
        let transform = InputTransform::new(Reflections::new(n, vectors), norms, change.rotation);
        let stats = self.behind(&transform, hessian);
        (transform, stats)
    }

    /// The statistics of the transformed input; the second moment goes there. transform: one that keeps nothing.
    pub fn transformed(&mut self, transform: &InputTransform) -> SiteStats {
        let n = self.max.len();
        let hessian =
            self.take_hessian().map(|h| h.rotated(|x| transform.apply(&x, x.len() / n).rest.into_vec()));
        self.behind(transform, hessian)
    }

    /// The statistics of what `transform` does not keep, which has this second moment; the others come from the sample.
    fn behind(&self, transform: &InputTransform, hessian: Option<Hessian>) -> SiteStats {
        let rest = self.max.len() - transform.kept();
        let sample = transform.apply(&self.sample, self.sampled_rows()).rest;
        let of_sample = |f: &dyn Fn(f32, f32) -> f32| {
            let mut values = vec![0.0f32; rest];
            for row in sample.chunks_exact(rest) {
                values.iter_mut().zip(row).for_each(|(value, x)| *value = f(*value, x.abs()));
            }
            values
        };
        let sum = of_sample(&|sum, x| sum + x).into_iter().map(f64::from).collect();
        SiteStats {
            max: of_sample(&f32::max),
            sum,
            rows: self.sampled_rows(),
            hessian,
            sample: sample.into_vec(),
            stride: self.stride,
        }
    }

    /// Mean magnitudes, `[in]`.
    pub fn mean_abs(&self) -> Vec<f32> {
        self.sum.iter().map(|s| (s / self.rows.max(1) as f64) as f32).collect()
    }

    /// Rows of the sample.
    pub(crate) fn sampled_rows(&self) -> usize {
        self.sample.len() / self.max.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounding::testing::correlated;
    use specquant_kernels::Kronecker;
    use specquant_model::RotationKind;

    /// Statistics that are transformed are those of transformed inputs.
    #[test]
    fn a_transform_carries_over() {
        let (rows, n) = (200, 40);
        let x = correlated(rows, n, 3);
        let mut stats = SiteStats::new(n, rows, rows, true);
        stats.add(&x, "test").unwrap();
        for (keep, rotation) in [(0, RotationKind::Dct), (6, RotationKind::Dct), (8, RotationKind::Hadamard)]
        {
            let (transform, rest) = stats.trial(true).transform(&InputChange { rotation, keep });
            let split = transform.apply(&x, rows);
            let mut seen = SiteStats::new(n - keep, rows, rows, true);
            seen.add(&split.rest, "test").unwrap();
            assert_eq!((&rest.sample, &rest.max), (&seen.sample, &seen.max));
            let hessian = |s: &SiteStats| s.hessian.as_ref().unwrap().normalized();
            let (got, want) = (hessian(&rest), hessian(&seen));
            let size = want.iter().step_by(n - keep + 1).sum::<f64>() / (n - keep) as f64;
            for (got, want) in got.iter().zip(&want) {
                assert!((got - want).abs() < 1e-4 * size, "keep {keep}: {got} {want}");
            }
            // What is kept has the size of 1.
            for i in 0..keep {
                let square: f32 = split.kept.iter().skip(i).step_by(keep).map(|v| v * v).sum();
                assert!((square / rows as f32 - 1.0).abs() < 1e-2, "{i}: {square}");
            }
        }
    }

    /// The same for a transform that is no rotation.
    #[test]
    fn a_learned_transform_carries_over() {
        let (rows, n) = (200, 40);
        let x = correlated(rows, n, 3);
        let mut stats = SiteStats::new(n, rows, rows, true);
        stats.add(&x, "test").unwrap();
        let matrix =
            |n: usize| (0..n * n).map(move |i| (i as f32).sin() + if i % (n + 1) == 0 { 2.0 } else { 0.0 });
        let kronecker = Kronecker::new(n, matrix(5).collect(), matrix(8).collect());
        let transform = InputTransform::kronecker(kronecker).unwrap();
        let mut seen = SiteStats::new(n, rows, rows, true);
        seen.add(&transform.apply(&x, rows).rest, "test").unwrap();
        let got = stats.trial(true).transformed(&transform);
        assert_eq!((&got.sample, &got.max), (&seen.sample, &seen.max));
        let [got, want] = [&got, &seen].map(|s| s.hessian.as_ref().unwrap().normalized());
        let size = want.iter().step_by(n + 1).sum::<f64>() / n as f64;
        got.iter()
            .zip(&want)
            .for_each(|(got, want)| assert!((got - want).abs() < 1e-4 * size, "{got} {want}"));
    }

    /// More directions than tokens: those that this text does not have must not be blown up on another.
    #[test]
    fn directions_without_energy_keep_a_scale() {
        let (rows, n) = (3, 24);
        let mut stats = SiteStats::new(n, rows, rows, true);
        stats.add(&correlated(rows, n, 5), "test").unwrap();
        let (transform, _) = stats.transform(&InputChange { rotation: RotationKind::Dct, keep: 8 });
        let largest = transform.norms().iter().fold(0.0f32, |m, v| m.max(*v));
        assert!(transform.norms().iter().all(|norm| *norm >= LEAST_NORM * largest && *norm > 0.0));
    }
}
