//! Means, their standard errors, and differences of models on the same items.

use serde::{Deserialize, Serialize};

/// A mean with its uncertainty.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Standard error of the mean: sample standard deviation / √n. 0 for one item.
    pub stderr: f64,
}

/// Mean and standard error of `x` (lm-eval `mean_stderr`).
pub fn estimate(x: impl Iterator<Item = f64> + Clone) -> Estimate {
    let n = x.clone().count() as f64;
    let mean = x.clone().sum::<f64>() / n;
    let variance = x.map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    Estimate { mean, stderr: (variance / n).sqrt() }
}

/// Mean of `x` with weights, and its standard error as that of a ratio estimator: of residuals that count by their weights. With equal weights
/// it is [`estimate`].
pub fn weighted(x: &[f64], weights: &[usize]) -> Estimate {
    let total: usize = weights.iter().sum();
    let mean = x.iter().zip(weights).map(|(x, &w)| x * w as f64).sum::<f64>() / total as f64;
    let usual = total as f64 / weights.len() as f64;
    let residuals = x.iter().zip(weights).map(|(x, &w)| (x - mean) * w as f64 / usual);
    Estimate { mean, stderr: estimate(residuals).stderr }
}

/// A difference of two models, measured item by item, with its confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Mean difference.
    pub mean: f64,
    /// Its standard error.
    pub stderr: f64,
    /// Half the width of the 95% confidence interval; none for fewer than two items.
    pub half_width: Option<f64>,
}

impl Difference {
    /// Whether zero lies outside the interval.
    pub fn is_significant(&self) -> bool {
        self.half_width.is_some_and(|h| self.mean.abs() > h)
    }

    /// Mean of differences on independent samples, such as tasks: their variances add up. None of none.
    pub fn average(parts: &[Difference]) -> Option<Difference> {
        let n = parts.len() as f64;
        let widths = parts.iter().map(|d| d.half_width.map(|h| h.powi(2))).collect::<Option<Vec<_>>>();
        (!parts.is_empty()).then(|| Difference {
            mean: parts.iter().map(|d| d.mean).sum::<f64>() / n,
            stderr: parts.iter().map(|d| d.stderr.powi(2)).sum::<f64>().sqrt() / n,
            half_width: widths.map(|w| w.iter().sum::<f64>().sqrt() / n),
        })
    }

    /// `+1.23 ± 0.45`, the half width of the 95% interval, and ≈ where zero is inside or where there is no interval.
    pub fn show(&self, scale: f64, digits: usize) -> String {
        let mean = self.mean * scale;
        match self.half_width {
            None => format!("≈ {mean:+.digits$} ± ?"),
            Some(h) => {
                let sign = if self.is_significant() { "" } else { "≈ " };
                format!("{sign}{mean:+.digits$} ± {:.digits$}", h * scale)
            }
        }
    }
}

/// The paired difference `a - b`: what both models have in common, such as a hard document, drops out.
pub fn paired(a: &[f64], b: &[f64]) -> Difference {
    paired_weighted(a, b, &vec![1; a.len()])
}

/// The same for items that count by their weights, as in [`weighted`].
pub fn paired_weighted(a: &[f64], b: &[f64], weights: &[usize]) -> Difference {
    debug_assert!(a.len() == b.len() && a.len() == weights.len());
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let Estimate { mean, stderr } = weighted(&differences, weights);
    let half_width = (a.len() > 1).then(|| stderr * student_t(a.len() - 1));
    Difference { mean, stderr, half_width }
}

/// 97.5% quantile of Student's t distribution. A table up to 30 degrees of freedom; above, the first terms of the expansion by
/// Cornish and Fisher (Abramowitz and Stegun 26.7.5), within 1e-4 there.
pub fn student_t(freedom: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
        2.045, 2.042,
    ];
    const Z: f64 = 1.959_964;
    match freedom {
        0 => f64::INFINITY,
        1..=30 => TABLE[freedom - 1],
        n => {
            let n = n as f64;
            Z + (Z.powi(3) + Z) / (4.0 * n) + (5.0 * Z.powi(5) + 16.0 * Z.powi(3) + 3.0 * Z) / (96.0 * n * n)
        }
    }
}

/// Mean of independent estimates, such as the tasks of an average.
pub fn average(parts: impl Iterator<Item = Estimate> + Clone) -> Estimate {
    let n = parts.clone().count() as f64;
    Estimate {
        mean: parts.clone().map(|p| p.mean).sum::<f64>() / n,
        stderr: parts.map(|p| p.stderr.powi(2)).sum::<f64>().sqrt() / n,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_and_differences() {
        let e = estimate([1.0, 2.0, 3.0, 6.0].into_iter());
        // Sample variance 14/3.
        assert!((e.mean - 3.0).abs() < 1e-12 && (e.stderr - (14.0 / 12.0f64).sqrt()).abs() < 1e-12);
        assert_eq!(estimate([5.0].into_iter()), Estimate { mean: 5.0, stderr: 0.0 });
        // Items differ a lot, models do not: the pairing sees it.
        let d = paired(&[1.0, 100.0, 1000.0], &[0.5, 99.4, 999.6]);
        assert!((d.mean - 0.5).abs() < 1e-9 && d.is_significant(), "{d:?}");
        assert!((d.half_width.unwrap() - 4.303 * 0.1 / 3f64.sqrt()).abs() < 1e-6, "{d:?}");
        assert!(!paired(&[1.0], &[0.0]).is_significant());
        // Three tokens of 1 and one of 5; by hand, residuals -1·3/2 and 3·1/2.
        let w = weighted(&[1.0, 5.0], &[3, 1]);
        assert!((w.mean - 2.0).abs() < 1e-12 && (w.stderr - 1.5).abs() < 1e-12, "{w:?}");
        let x = [1.0, 2.0, 4.0];
        let (a, b) = (weighted(&x, &[7, 7, 7]), estimate(x.into_iter()));
        assert!((a.mean - b.mean).abs() < 1e-12 && (a.stderr - b.stderr).abs() < 1e-12);
        assert!((student_t(31) - 2.0395).abs() < 1e-3 && (student_t(1000) - 1.9623).abs() < 1e-4);
    }
}
