//! Per-channel smoothing: outliers move from the activation into the weight.
//!
//! With a positive factor per input channel, `y = x Wᵀ = (x diag(λ)⁻¹)(W diag(λ))ᵀ`; the factor of channel i is
//! `λ_i = max|x_i|^α / max|w_i|^(1-α)` over all layers that share the input (SmoothQuant, arXiv 2211.10438, Eq. 4;
//! SpecQuant, arXiv 2511.11663, section "Migrate outliers from activation to weight"). `diag(λ)⁻¹` costs nothing at run time: it
//! folds into whatever produced the input, a norm or a linear layer whose output channels are the input channels.
//!
//! SmoothQuant folds the two norms only. `v_proj → o_proj` is exact as well, because attention mixes tokens and not channels; with
//! grouped queries the heads that read one KV head must share their factors, so the largest is taken. `up_proj → down_proj` is
//! exact because SwiGLU is linear in `up`.

/// Factors are kept at or above this (SmoothQuant, smooth.py: `clamp(min=1e-5)`).
pub const MIN_FACTOR: f32 = 1e-5;

/// `λ`, `[in]`.
///
/// act_max, weight_max: `[in]`, the largest magnitudes of the input and of the weights that read it. A channel that is never
/// active, or that nothing reads, keeps λ = 1.
pub fn factors(act_max: &[f32], weight_max: &[f32], alpha: f32) -> Vec<f32> {
    let factor = |(&x, &w): (&f32, &f32)| {
        if x <= 0.0 || w <= 0.0 {
            return 1.0;
        }
        let lambda = f64::from(x.max(MIN_FACTOR)).powf(alpha.into())
            / f64::from(w.max(MIN_FACTOR)).powf(1.0 - f64::from(alpha));
        (lambda as f32).max(MIN_FACTOR)
    };
    act_max.iter().zip(weight_max).map(factor).collect()
}

/// Makes the factors of query heads that read one KV head equal, to the largest of them.
///
/// lambda: `[heads * head_dim]`, changed in place; returns those of the KV heads, `[kv_heads * head_dim]`.
pub fn share_in_groups(lambda: &mut [f32], heads: usize, kv_heads: usize) -> Vec<f32> {
    let head_dim = lambda.len() / heads;
    let group = heads / kv_heads;
    let mut shared = vec![0.0_f32; kv_heads * head_dim];
    for (i, &l) in lambda.iter().enumerate() {
        let slot = &mut shared[i / head_dim / group * head_dim + i % head_dim];
        *slot = slot.max(l);
    }
    for (i, l) in lambda.iter_mut().enumerate() {
        *l = shared[i / head_dim / group * head_dim + i % head_dim];
    }
    shared
}

/// `W diag(λ)`. w: `[out, in]`; lambda: `[in]`.
pub fn scale_columns(w: &mut [f32], lambda: &[f32]) {
    for row in w.chunks_exact_mut(lambda.len()) {
        row.iter_mut().zip(lambda).for_each(|(w, l)| *w *= l);
    }
}

/// `diag(λ)⁻¹ W`, the fold into a producing layer. w: `[out, in]`; lambda: `[out]`. A norm or a bias is the case in = 1.
pub fn divide_rows(w: &mut [f32], lambda: &[f32]) {
    let inp = w.len() / lambda.len();
    for (row, l) in w.chunks_exact_mut(inp).zip(lambda) {
        row.iter_mut().for_each(|w| *w /= l);
    }
}

/// Largest magnitude of every column over several matrices. ws: `[out_i, in]` each; returns `[in]`.
pub fn column_max(ws: &[&[f32]], inp: usize) -> Vec<f32> {
    let mut max = vec![0.0_f32; inp];
    for row in ws.iter().flat_map(|w| w.chunks_exact(inp)) {
        max.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(w.abs()));
    }
    max
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_follow_the_formula_and_skip_silent_channels() {
        let lambda = factors(&[16.0, 0.0, 4.0, 1.0], &[0.25, 1.0, 4.0, 0.0], 0.5);
        assert_eq!(lambda, [8.0, 1.0, 1.0, 1.0]);
        assert_eq!(factors(&[16.0], &[0.5], 1.0), [16.0]);
        assert_eq!(factors(&[16.0], &[0.5], 0.0), [2.0]);
        assert!(factors(&[1e-30], &[1e30], 0.5)[0] >= MIN_FACTOR);
    }

    #[test]
    fn products_are_unchanged() {
        let (x, w, lambda) =
            ([1.0_f32, -2.0, 3.0], [0.5_f32, 1.0, -1.0, 2.0, 0.25, 4.0], [2.0_f32, 0.5, 4.0]);
        let dot = |x: &[f32], w: &[f32]| -> f32 { x.iter().zip(w).map(|(a, b)| a * b).sum() };
        let mut scaled = w;
        scale_columns(&mut scaled, &lambda);
        let mut smoothed = x;
        divide_rows(&mut smoothed, &lambda);
        for row in 0..2 {
            assert_eq!(dot(&x, &w[row * 3..][..3]), dot(&smoothed, &scaled[row * 3..][..3]));
        }
    }

    #[test]
    fn query_heads_of_one_kv_head_share_their_factors() {
        // 4 heads of 2 channels, 2 KV heads.
        let mut lambda = vec![1.0, 5.0, 3.0, 2.0, 7.0, 1.0, 6.0, 9.0];
        let shared = share_in_groups(&mut lambda, 4, 2);
        assert_eq!(shared, [3.0, 5.0, 7.0, 9.0]);
        assert_eq!(lambda, [3.0, 5.0, 3.0, 5.0, 7.0, 9.0, 7.0, 9.0]);
    }
}
