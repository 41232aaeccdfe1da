//! GPTQ (Frantar et al., arXiv 2210.17323): rounding that lets later columns make up for the errors of earlier ones.
//!
//! Input columns are rounded one after the other. The error of each is spread over the columns still to come so that the
//! layer's output on the calibration inputs changes least, i.e. greedily in `tr((W - Q) H (W - Q)ᵀ)`. Constants and order
//! are those of QuaRot's `fake_quant/gptq_utils.py`: damping 0.01 of the mean diagonal, blocks of 128 columns, no
//! activation order, dead columns set to zero, scales fixed from the original weights before the loop (also those of
//! groups: "static groups").
//!
//! The reference multiplies by the upper Cholesky factor of H⁻¹. Here `H = U Uᵀ` is factorized directly, U upper
//! triangular: then `tr(...) = Σ_j U_jj² |W_j + Σ_{i<j} (W_i - Q_i) U_ij/U_jj - Q_j|²`, so every column is rounded after
//! the sum over i<j was added to it. Both are the same algorithm (QuIP, arXiv 2307.13304, theorem 6), but this needs no
//! inverse. Rows are independent: each task takes a few of them through all columns, with the sums over former blocks as
//! one matrix product per block.

use super::{Factor, Grid, limit, nearest_level, round_half_even, round_to_nearest, with_avx2};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Settings of [`gptq`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GptqConfig {
    /// Share of the mean diagonal of H that is added to its diagonal. Grows when the factorization fails.
    pub dampening_frac: f64,
    /// Columns between two matrix products. Has an effect on speed only, up to the last bit of a sum.
    pub block_size: usize,
    /// Round columns in the order of falling diagonal of H.
    pub actorder: bool,
}

impl Default for GptqConfig {
    /// Those of QuaRot, SpinQuant and FlatQuant.
    fn default() -> Self {
        Self { dampening_frac: 0.01, block_size: 128, actorder: false }
    }
}

/// What [`gptq`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct GptqOutput {
    /// `[out, in]`.
    pub codes: Vec<i8>,
    /// `tr((W - Q) H (W - Q)ᵀ)` with the damped H, W without its dead columns. (This equals the sum of squared `err` in
    /// the reference, which reports half of it.) After a fallback, with H = 1.
    pub loss: f64,
    /// Damping used.
    pub dampening_frac: f64,
    /// Input channels that no calibration input used, and whose codes are zero therefore.
    pub dead_columns: usize,
    /// Why the weights were rounded to nearest instead, if they were.
    pub fallback: Option<String>,
}

/// Output channels that go through the columns together, side by side in vector registers.
const ROWS: usize = 32;
type Lanes = [f32; ROWS];

/// Codes of the weights `w: [out, inp]` under `scales: [out, groups]`, for inputs with the factorized Hessian.
///
/// # Panics
/// If the slices do not have these shapes, the grid does not fit them, or the factor is not of `inp` channels.
pub fn gptq(w: &[f32], out: usize, inp: usize, scales: &[f32], grid: &Grid, factor: &Factor) -> GptqOutput {
    assert_eq!(factor.dim, inp, "the factor is of another number of input channels");
    assert_eq!(w.len(), out * inp, "weights are [out, in]");
    assert_eq!(scales.len(), out * grid.groups(inp), "scales are [out, groups]");
    let (codes, loss) = if factor.fallback.is_some() {
        let codes = round_to_nearest(w, out, inp, scales, grid);
        let q = super::dequantize(&codes, out, inp, scales, grid);
        let loss = w.iter().zip(&q).map(|(w, q)| f64::from(w - q).powi(2)).sum();
        (codes, loss)
    } else {
        let groups = grid.groups(inp);
        let mut codes = vec![0i8; w.len()];
        let losses: Vec<f64> = codes
            .par_chunks_mut(ROWS * inp)
            .zip(w.par_chunks(ROWS * inp))
            .zip(scales.par_chunks(ROWS * groups))
            .map(|((codes, w), scales)| round_rows(w, inp, scales, grid, factor, codes))
            .collect();
        (codes, losses.iter().sum())
    };
    GptqOutput {
        codes,
        loss,
        dampening_frac: factor.dampening_frac,
        dead_columns: factor.dead_columns,
        fallback: factor.fallback.clone(),
    }
}

/// Takes up to [`ROWS`] rows of W through all columns; returns their loss.
fn round_rows(w: &[f32], inp: usize, scales: &[f32], grid: &Grid, factor: &Factor, codes: &mut [i8]) -> f64 {
    let (groups, group_len) = (grid.groups(inp), grid.group_len(inp));
    let transpose = |from: &[f32], width: usize, column: usize, fill: f32| -> Lanes {
        let mut lanes = [fill; ROWS];
        lanes.iter_mut().zip(from.chunks_exact(width)).for_each(|(lane, row)| *lane = row[column]);
        lanes
    };
    // Lanes without a row have weights of zero, and next to no scale, as no level need be zero.
    let scales: Vec<Lanes> = (0..groups).map(|g| transpose(scales, groups, g, 1e-30)).collect();
    let mut errors = vec![[0.0; ROWS]; inp]; // W - Q
    let mut loss = 0.0;
    for (block, first) in (0..inp).step_by(factor.block_size).enumerate() {
        let columns = &factor.order[first..inp.min(first + factor.block_size)];
        let weights: Vec<Lanes> = columns
            .iter()
            .map(|&c| if factor.dead[c] { [0.0; ROWS] } else { transpose(w, inp, c, 0.0) })
            .collect();
        let mut targets = weights.clone();
        if first > 0 {
            let (feedback, width) = (&factor.feedback[block], first + columns.len());
            matmul(
                MatMut::from_row_major_slice_mut(targets.as_flattened_mut(), columns.len(), ROWS),
                Accum::Add,
                MatRef::from_row_major_slice(feedback, columns.len(), width).subcols(0, first),
                MatRef::from_row_major_slice(errors[..first].as_flattened(), first, ROWS),
                1.0,
                Par::Seq,
            );
        }
        for (j, &column) in columns.iter().enumerate() {
            let feedback = &factor.row(first + j)[first..];
            let (done, rest) = errors[first..].split_at_mut(j);
            let scale = &scales[column / group_len];
            let mut code = [0; ROWS];
            let squares = round_column(
                &weights[j],
                &targets[j],
                feedback,
                done,
                scale,
                grid.max_code(),
                grid.is_gaussian(),
                &mut code,
                &mut rest[0],
            );
            loss += factor.pivots[first + j] * f64::from(squares);
            for (row, code) in codes.chunks_exact_mut(inp).zip(code) {
                row[column] = code;
            }
        }
    }
    loss
}

with_avx2! {
    /// Rounds one column of the rows: `target` plus the feedback of the errors of former columns of the block. Writes its
    /// codes and error, returns the sum of squares of what rounding changed.
    fn round_column(
        weight: &Lanes,
        target: &Lanes,
        feedback: &[f32],
        done: &[Lanes],
        scale: &Lanes,
        max_code: f32,
        gaussian: bool,
        code: &mut [i8; ROWS],
        error: &mut Lanes,
    ) -> f32 = round_column_body
}

#[inline(always)]
fn round_column_body(
    weight: &Lanes,
    target: &Lanes,
    feedback: &[f32],
    done: &[Lanes],
    scale: &Lanes,
    max_code: f32,
    gaussian: bool,
    code: &mut [i8; ROWS],
    error: &mut Lanes,
) -> f32 {
    let mut target = *target;
    for (&f, errors) in feedback.iter().zip(done) {
        for l in 0..ROWS {
            target[l] += f * errors[l];
        }
    }
    let mut squares = [0.0; ROWS];
    let mut rounded = [0.0; ROWS];
    for l in 0..ROWS {
        rounded[l] = round_half_even(limit(target[l] / scale[l], -max_code - 1.0, max_code));
    }
    if gaussian {
        rounded = rounded.map(nearest_level);
    }
    for l in 0..ROWS {
        let q = rounded[l];
        code[l] = q as i32 as i8;
        error[l] = weight[l] - q * scale[l];
        squares[l] = (target[l] - q * scale[l]).powi(2);
    }
    let mut width = ROWS / 2;
    while width > 0 {
        for l in 0..width {
            squares[l] += squares[l + width];
        }
        width /= 2;
    }
    squares[0]
}

#[cfg(test)]
mod tests {
    use super::super::testing::{correlated, gaussian, with_threads};
    use super::super::{ClipSearch, Hessian, dequantize, factorize, weight_scales};
    use super::*;

    fn hessian(rows: usize, dim: usize, seed: u64) -> Hessian {
        let mut h = Hessian::new(dim);
        h.add(&correlated(rows, dim, seed));
        h
    }

    /// Lower Cholesky factor, row-major.
    fn naive_cholesky(a: &[f64], n: usize) -> Vec<f64> {
        let mut l = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let s = a[i * n + j] - (0..j).map(|k| l[i * n + k] * l[j * n + k]).sum::<f64>();
                l[i * n + j] = if i == j { s.sqrt() } else { s / l[j * n + j] };
            }
        }
        l
    }

    /// The reference: Hinv = upper Cholesky factor of H⁻¹, then column by column, everything in f64.
    fn naive_gptq(
        w: &[f32],
        out: usize,
        n: usize,
        scales: &[f32],
        grid: &Grid,
        h: &[f64],
        order: &[usize],
    ) -> (Vec<i8>, f64) {
        let damp = 0.01 * (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64;
        let mut a: Vec<f64> = (0..n * n).map(|at| h[order[at / n] * n + order[at % n]]).collect();
        (0..n).for_each(|i| a[i * n + i] += damp);
        let l = naive_cholesky(&a, n);
        let mut inverse = vec![0.0; n * n]; // of l
        for c in 0..n {
            for i in c..n {
                let s: f64 = (c..i).map(|k| l[i * n + k] * inverse[k * n + c]).sum();
                inverse[i * n + c] = (if i == c { 1.0 } else { 0.0 } - s) / l[i * n + i];
            }
        }
        let h_inverse: Vec<f64> = (0..n * n)
            .map(|at| (0..n).map(|k| inverse[k * n + at / n] * inverse[k * n + at % n]).sum())
            .collect();
        let u = naive_cholesky(&h_inverse, n); // its transpose
        let (mut codes, mut loss) = (vec![0; out * n], 0.0);
        for r in 0..out {
            let mut row: Vec<f64> = order.iter().map(|&c| f64::from(w[r * n + c])).collect();
            for i in 0..n {
                let s = f64::from(scales[r * grid.groups(n) + order[i] / grid.group_len(n)]);
                let q = (row[i] / s)
                    .round_ties_even()
                    .clamp(f64::from(grid.min_code()), f64::from(grid.max_code()));
                codes[r * n + order[i]] = q as i8;
                let err = (row[i] - q * s) / u[i * n + i];
                loss += err * err;
                for j in i..n {
                    row[j] -= err * u[j * n + i];
                }
            }
        }
        (codes, loss)
    }

    /// `tr((W - Q) H (W - Q)ᵀ)`
    fn proxy_loss(w: &[f32], q: &[f32], n: usize, h: &[f64]) -> f64 {
        let row = |d: Vec<f64>| (0..n * n).map(|at| d[at / n] * h[at] * d[at % n]).sum::<f64>();
        let rows = w.chunks(n).zip(q.chunks(n));
        rows.map(|(w, q)| row(w.iter().zip(q).map(|(w, q)| f64::from(w - q)).collect())).sum()
    }

    #[test]
    fn identity_is_round_to_nearest() {
        let (out, inp, grid) = (45, 200, Grid { bits: 4, group_size: 50, ..Grid::default() });
        let w = gaussian(out * inp, 1);
        let scales = weight_scales(&w, out, inp, &grid, &ClipSearch::default());
        let factor = factorize(Hessian::identity(inp), &GptqConfig { block_size: 32, ..Default::default() });
        let got = gptq(&w, out, inp, &scales, &grid, &factor);
        assert_eq!(got.codes, round_to_nearest(&w, out, inp, &scales, &grid));
        assert_eq!((got.fallback, got.dead_columns), (None, 0));
    }

    #[test]
    fn agrees_with_the_unblocked_reference() {
        let settings =
            [(40, 33, 8, 0, false), (40, 33, 8, 11, true), (7, 64, 128, 16, false), (70, 48, 5, 0, true)];
        for (case, (out, inp, block_size, group_size, actorder)) in settings.into_iter().enumerate() {
            let (grid, cfg) = (
                Grid { group_size, ..Grid::default() },
                GptqConfig { block_size, actorder, ..Default::default() },
            );
            let w = gaussian(out * inp, 10 + case as u64);
            let scales = weight_scales(&w, out, inp, &grid, &ClipSearch::default());
            let h = hessian(300, inp, 20 + case as u64);
            let mut order: Vec<usize> = (0..inp).collect();
            if actorder {
                order.sort_by(|&a, &b| h.diagonal()[b].total_cmp(&h.diagonal()[a]));
            }
            let (want, want_loss) = naive_gptq(&w, out, inp, &scales, &grid, &h.normalized(), &order);
            let got = gptq(&w, out, inp, &scales, &grid, &factorize(h.clone(), &cfg));
            // A tie that rounds the other way changes the rest of its row.
            let other_rows = got.codes.chunks(inp).zip(want.chunks(inp)).filter(|(a, b)| a != b).count();
            assert!(other_rows <= 1, "case {case}: {other_rows} rows differ");
            assert!((got.loss / want_loss - 1.0).abs() < 1e-2, "case {case}: {} {want_loss}", got.loss);
        }
    }

    /// The widths of down_proj in Qwen2-0.5B and LLaMA-2-7B: outputs on the inputs themselves, computed without a Hessian.
    #[test]
    fn wide_layers_beat_round_to_nearest() {
        for inp in [4864, 11008] {
            let (out, rows, grid) = (16, 64, Grid::default());
            // Eight directions that all channels share, and channels of different sizes.
            let (along, of, own) = (gaussian(rows * 8, 1), gaussian(8 * inp, 2), gaussian(rows * inp, 3));
            let value = |at: usize| {
                let (row, j) = (at / inp, at % inp);
                let shared: f32 = (0..8).map(|k| along[row * 8 + k] * of[k * inp + j]).sum();
                (shared + own[at]) * (1.0 + (j % 5) as f32)
            };
            let x: Vec<f32> = (0..rows * inp).map(value).collect();
            let w = gaussian(out * inp, 4);
            let scales = weight_scales(&w, out, inp, &grid, &ClipSearch::default());
            let mut h = Hessian::new(inp);
            h.add(&x);
            let got = gptq(&w, out, inp, &scales, &grid, &factorize(h, &GptqConfig::default()));
            assert_eq!((got.dampening_frac, got.dead_columns, got.fallback), (0.01, 0, None));
            let error = |codes: &[i8]| -> f64 {
                let q = dequantize(codes, out, inp, &scales, &grid);
                let rows =
                    x.chunks(inp).flat_map(|x| w.chunks(inp).zip(q.chunks(inp)).map(move |wq| (x, wq)));
                let output = |(x, (w, q)): (&[f32], (&[f32], &[f32]))| -> f64 {
                    x.iter().zip(w.iter().zip(q)).map(|(x, (w, q))| f64::from(x * (w - q))).sum()
                };
                rows.map(|row| output(row).powi(2)).sum()
            };
            let (gptq, nearest) = (error(&got.codes), error(&round_to_nearest(&w, out, inp, &scales, &grid)));
            println!("{inp} wide: {gptq:.3e}, nearest {nearest:.3e}");
            assert!(gptq < 0.2 * nearest, "{inp} wide: {gptq} {nearest}");
        }
    }

    #[test]
    fn beats_round_to_nearest_in_the_proxy_loss() {
        for seed in 0..5 {
            let (out, inp, grid) = (33, 96, Grid::default());
            let w = gaussian(out * inp, 30 + seed);
            let scales = weight_scales(&w, out, inp, &grid, &ClipSearch::default());
            let h = hessian(64, inp, 40 + seed); // fewer inputs than channels: singular without damping
            let got = gptq(&w, out, inp, &scales, &grid, &factorize(h.clone(), &GptqConfig::default()));
            let loss = |codes: &[i8], h: &[f64]| {
                proxy_loss(&w, &dequantize(codes, out, inp, &scales, &grid), inp, h)
            };
            let nearest = loss(&round_to_nearest(&w, out, inp, &scales, &grid), &h.normalized());
            assert!(loss(&got.codes, &h.normalized()) < 0.7 * nearest);
            let mut damped = h.normalized();
            let damp = 0.01 * h.diagonal().iter().sum::<f64>() / inp as f64;
            (0..inp).for_each(|i| damped[i * inp + i] += damp);
            let want = loss(&got.codes, &damped);
            assert!((got.loss / want - 1.0).abs() < 1e-3, "{} {want}", got.loss);
        }
    }

    #[test]
    fn dead_columns_get_zero_codes() {
        let (out, inp, grid) = (5, 12, Grid::default());
        let mut x = correlated(50, inp, 50);
        x.chunks_mut(inp).for_each(|x| (x[3], x[11]) = (0.0, 0.0));
        let mut h = Hessian::new(inp);
        h.add(&x);
        let w = gaussian(out * inp, 51);
        let scales = weight_scales(&w, out, inp, &grid, &ClipSearch::default());
        let got = gptq(&w, out, inp, &scales, &grid, &factorize(h.clone(), &GptqConfig::default()));
        assert_eq!((got.dead_columns, got.dampening_frac), (2, 0.01));
        assert!(got.codes.chunks(inp).all(|c| c[3] == 0 && c[11] == 0 && c.iter().any(|&c| c != 0)));
    }

    #[test]
    fn falls_back_to_nearest_with_a_reason() {
        let (out, inp, grid) = (3, 8, Grid::default());
        let mut h = Hessian::new(inp);
        h.add(&[f32::INFINITY; 8]);
        let w = gaussian(out * inp, 60);
        let scales = weight_scales(&w, out, inp, &grid, &ClipSearch::default());
        let got = gptq(&w, out, inp, &scales, &grid, &factorize(h.clone(), &GptqConfig::default()));
        assert_eq!(got.codes, round_to_nearest(&w, out, inp, &scales, &grid));
        assert!(got.fallback.unwrap().contains("not finite") && got.loss > 0.0);
    }

    #[test]
    fn same_codes_for_any_number_of_threads() {
        let (out, inp, grid) = (100, 160, Grid { bits: 3, group_size: 32, ..Grid::default() });
        let w = gaussian(out * inp, 70);
        let scales = weight_scales(&w, out, inp, &grid, &ClipSearch::default());
        let factor = factorize(hessian(400, inp, 71), &GptqConfig { block_size: 48, ..Default::default() });
        let run = || gptq(&w, out, inp, &scales, &grid, &factor);
        assert_eq!(with_threads(1, run), with_threads(2, run));
    }

    #[test]
    fn both_versions_give_the_same_bits() {
        let values: Vec<Lanes> = gaussian(12 * ROWS, 80).as_chunks().0.to_vec();
        let (scale, feedback) = ([0.21; ROWS], &values[2][..10]);
        let (mut code, mut error) = ([0; ROWS], [0.0; ROWS]);
        let sum = round_column(
            &values[0],
            &values[1],
            feedback,
            &values[2..],
            &scale,
            7.0,
            false,
            &mut code,
            &mut error,
        );
        let fast = (sum.to_bits(), code, error.map(f32::to_bits));
        let sum = round_column_body(
            &values[0],
            &values[1],
            feedback,
            &values[2..],
            &scale,
            7.0,
            false,
            &mut code,
            &mut error,
        );
        assert_eq!(fast, (sum.to_bits(), code, error.map(f32::to_bits)));
    }
}
