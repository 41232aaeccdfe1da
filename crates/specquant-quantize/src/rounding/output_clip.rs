//! AWQ's clip search (arXiv 2306.00978; llm-awq, `auto_clip.py`): a channel's, or a group's, largest weight is shrunk by the factor
//! `p = 1 - i/grid` for which its contribution to the output on calibration tokens changes least. Its constants are grid = 20 and
//! max_shrink = 0.5. Unlike the search by the weights' own error ([`weight_scales`](super::weight_scales)), weights of silent inputs do not count.

use super::{ClipSearch, Grid, dequantize, round_to_nearest, weight_scales};

/// Scales of the weights `w: [out, inp]` as `[out, groups]`, by the error of `x wᵀ`. x: `[rows, inp]`.
///
/// # Panics
/// If the slices do not have these shapes, or the grid does not fit them.
pub fn output_scales(
    w: &[f32],
    out: usize,
    inp: usize,
    grid: &Grid,
    clip: &ClipSearch,
    x: &[f32],
    rows: usize,
) -> Vec<f32> {
    assert_eq!(x.len(), rows * inp, "inputs are [rows, in]");
    let unclipped = ClipSearch { enabled: false, ..clip.clone() };
    let largest = weight_scales(w, out, inp, grid, &unclipped);
    let (len, groups) = (grid.group_len(inp), grid.groups(inp));
    let mut best = largest.clone();
    let columns = |from: &[f32], group: usize| -> Vec<f32> {
        from.chunks_exact(inp).flat_map(|row| &row[group * len..(group + 1) * len]).copied().collect()
    };
    let whole = Grid { group_size: len, ..*grid };
    for group in 0..groups {
        let (w, x) = (columns(w, group), columns(x, group));
        let largest: Vec<f32> = largest.iter().skip(group).step_by(groups).copied().collect();
        let mut least = vec![f64::INFINITY; out];
        for i in 0..((clip.max_shrink * clip.grid as f32) as usize).max(1) {
            let p = 1.0 - i as f32 / clip.grid.max(1) as f32;
            if p <= 0.0 {
                break;
            }
            let scales: Vec<f32> = largest.iter().map(|s| s * p).collect();
            let codes = round_to_nearest(&w, out, len, &scales, &whole);
            let mut error = dequantize(&codes, out, len, &scales, &whole);
            error.iter_mut().zip(&w).for_each(|(q, w)| *q -= w);
            let mut outputs = vec![0.0; rows * out];
            specquant_kernels::matmul_nt(&x, &error, &mut outputs, rows, len, out, false);
            for channel in 0..out {
                let sum: f64 = outputs.iter().skip(channel).step_by(out).map(|e| f64::from(*e).powi(2)).sum();
                if sum < least[channel] {
                    least[channel] = sum;
                    best[channel * groups + group] = scales[channel];
                }
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounding::testing::{correlated, gaussian};

    /// By the definition, one channel and group at a time, in f64.
    #[test]
    fn the_factor_of_least_output_error_is_chosen() {
        let (out, inp, rows) = (5, 48, 60);
        let mut w = gaussian(out * inp, 1);
        w[3] = 6.0;
        let x = correlated(rows, inp, 2);
        let clip = ClipSearch { grid: 20, max_shrink: 0.5, ..Default::default() };
        for group_size in [0, 16] {
            let grid = Grid { group_size, ..Grid::default() };
            let len = grid.group_len(inp);
            let got = output_scales(&w, out, inp, &grid, &clip, &x, rows);
            let mut shrunk = 0;
            for (at, group) in w.chunks(len).enumerate() {
                let first = at * len % inp;
                let largest = group.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 7.0;
                let error = |scale: f32| -> f64 {
                    let q = |v: f32| (v / scale).round_ties_even().clamp(-8.0, 7.0) * scale - v;
                    let output = |x: &[f32]| -> f64 {
                        group.iter().zip(&x[first..]).map(|(v, x)| f64::from(q(*v)) * f64::from(*x)).sum()
                    };
                    x.chunks(inp).map(|x| output(x).powi(2)).sum()
                };
                let tries = (0..10).map(|i| largest * (1.0 - i as f32 / 20.0));
                let least = tries.map(error).fold(f64::INFINITY, f64::min);
                assert!(error(got[at]) <= least * (1.0 + 1e-4), "{at}: {} {least}", error(got[at]));
                shrunk += usize::from(got[at] < largest * 0.99);
            }
            assert!(shrunk > 0);
        }
    }
}
