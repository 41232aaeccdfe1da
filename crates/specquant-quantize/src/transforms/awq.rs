//! AWQ's scales (Lin et al., arXiv 2306.00978): input channels that are large on average get finer weights.
//!
//! `λ_i = s_i / √(max s · min s)` with `s_i = max((mean|x_i|)^α, 1e-4)`; α is searched over 0, 0.05 … 0.95 (llm-awq, `auto_scale.py`, n_grid = 20).
//! The published code has dropped the paper's weight term. Folding is that of [`smooth`](super::smooth); like llm-awq for `o_proj`, but also
//! with grouped queries. Two deviations: the best α is that of the layers' own outputs, where llm-awq runs the whole attention or MLP, and no scaling at
//! all is tried too. As there, the search for α does not clip.

/// `λ`, `[in]`. mean_abs: `[in]`, mean magnitudes of the input. A channel that is never active has the floor 1e-4 for s, as there.
pub fn factors(mean_abs: &[f32], alpha: f32) -> Vec<f32> {
    let s: Vec<f32> = mean_abs.iter().map(|x| x.powf(alpha).max(1e-4)).collect();
    let (least, most) = s.iter().fold((f32::INFINITY, 0.0f32), |(a, b), &v| (a.min(v), b.max(v)));
    let middle = (least * most).sqrt();
    s.iter().map(|s| s / middle).collect()
}

#[cfg(test)]
mod tests {
    use super::factors;

    #[test]
    fn extremes_are_each_others_inverse() {
        assert_eq!(factors(&[4.0, 1.0, 0.25], 0.5), [2.0, 1.0, 0.5]);
        assert_eq!(factors(&[4.0, 1.0, 0.25], 0.0), [1.0; 3]);
        let lambda = factors(&[1.0, 0.0], 0.5);
        assert!((lambda[0] * lambda[1] - 1.0).abs() < 1e-6 && lambda[1] > 0.0);
    }
}
