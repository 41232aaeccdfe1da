//! Round to nearest: every weight to its nearest code, half to even (`torch.round`), clamped to the grid.

use super::{Grid, NEAREST_LEVEL, limit, round_half_even, with_avx2};
use rayon::prelude::*;

/// Codes `[out, inp]` of the weights `w: [out, inp]` under `scales: [out, groups]`.
///
/// # Panics
/// If the slices do not have these shapes, or the grid does not fit them.
pub fn round_to_nearest(w: &[f32], out: usize, inp: usize, scales: &[f32], grid: &Grid) -> Vec<i8> {
    assert_eq!(w.len(), out * inp, "weights are [out, in]");
    assert_eq!(scales.len(), out * grid.groups(inp), "scales are [out, groups]");
    let (max_code, len) = (grid.max_code(), grid.group_len(inp));
    let mut codes = vec![0; w.len()];
    codes.par_chunks_exact_mut(len).zip(w.par_chunks_exact(len)).zip(scales).for_each(
        |((codes, w), &scale)| {
            round_group(w, scale, max_code, codes);
            if grid.is_gaussian() {
                codes.iter_mut().for_each(|code| *code = NEAREST_LEVEL[(i16::from(*code) + 128) as usize]);
            }
        },
    );
    codes
}

/// The weights `[out, inp]` that `codes: [out, inp]` and `scales: [out, groups]` stand for.
///
/// # Panics
/// If the slices do not have these shapes, or the grid does not fit them.
pub fn dequantize(codes: &[i8], out: usize, inp: usize, scales: &[f32], grid: &Grid) -> Vec<f32> {
    assert_eq!(codes.len(), out * inp, "codes are [out, in]");
    assert_eq!(scales.len(), out * grid.groups(inp), "scales are [out, groups]");
    let len = grid.group_len(inp);
    let mut w = vec![0.0; codes.len()];
    w.par_chunks_exact_mut(len).zip(codes.par_chunks_exact(len)).zip(scales).for_each(
        |((w, codes), &scale)| {
            w.iter_mut().zip(codes).for_each(|(w, &c)| *w = f32::from(c) * scale);
        },
    );
    w
}

with_avx2! {
    fn round_group(w: &[f32], scale: f32, max_code: f32, codes: &mut [i8]) = round_group_body
}

#[inline(always)]
fn round_group_body(w: &[f32], scale: f32, max_code: f32, codes: &mut [i8]) {
    for (code, &v) in codes.iter_mut().zip(w) {
        // Through i32: a saturating cast from f32 to i8 is not vectorized.
        *code = round_half_even(limit(v / scale, -max_code - 1.0, max_code)) as i32 as i8;
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ClipSearch, testing::gaussian, weight_scales};
    use super::*;
    use specquant_model::Levels;

    #[test]
    fn rounds_half_to_even_and_clamps() {
        let w = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.4, 99.0, -7.6, -99.0];
        let codes = round_to_nearest(&w, 1, 10, &[1.0], &Grid::default());
        assert_eq!(codes, [0, 2, 2, 0, -2, -2, 7, 7, -8, -8]);
        let w = [1.0f32, 300.0, -300.0, 0.0];
        assert_eq!(
            round_to_nearest(&w, 1, 4, &[1.0], &Grid { bits: 8, group_size: 0, ..Grid::default() }),
            [1, 127, -128, 0]
        );
        assert_eq!(
            round_to_nearest(&w, 1, 4, &[1.0], &Grid { bits: 2, group_size: 0, ..Grid::default() }),
            [1, 1, -2, 0]
        );
    }

    #[test]
    fn without_clipping_the_lowest_code_is_never_used() {
        let (w, grid) = (gaussian(40 * 64, 1), Grid { bits: 4, group_size: 16, ..Grid::default() });
        let off = ClipSearch { enabled: false, ..Default::default() };
        let scales = weight_scales(&w, 40, 64, &grid, &off);
        let codes = round_to_nearest(&w, 40, 64, &scales, &grid);
        assert!(codes.chunks(16).all(|c| c.iter().map(|c| c.unsigned_abs()).max() == Some(7)));
        let back = dequantize(&codes, 40, 64, &scales, &grid);
        for (i, (w, q)) in w.iter().zip(&back).enumerate() {
            assert!((w - q).abs() <= 0.500_001 * scales[i / 16]);
        }
    }

    /// Levels for a Gaussian: what rounding and GPTQ return are levels, and of Gaussian weights they leave less error than even steps.
    #[test]
    fn gaussian_levels() {
        use super::super::{GptqConfig, Hessian, factorize, gptq, testing::correlated};
        use specquant_kernels::GAUSSIAN_LEVELS;
        let (out, inp) = (40, 256);
        let w = gaussian(out * inp, 1);
        let mut hessian = Hessian::new(inp);
        hessian.add(&correlated(600, inp, 2));
        let factor = factorize(hessian.clone(), &GptqConfig::default());
        let results = [Levels::Uniform, Levels::Gaussian].map(|levels| {
            let grid = Grid { levels, ..Grid::default() };
            let scales = weight_scales(&w, out, inp, &grid, &ClipSearch { norm: 2.0, ..Default::default() });
            let codes = round_to_nearest(&w, out, inp, &scales, &grid);
            let rounded = dequantize(&codes, out, inp, &scales, &grid);
            let error: f32 = w.iter().zip(&rounded).map(|(w, q)| (w - q).powi(2)).sum();
            let by_gptq = gptq(&w, out, inp, &scales, &grid, &factor);
            if levels == Levels::Gaussian {
                assert!(codes.iter().chain(&by_gptq.codes).all(|code| GAUSSIAN_LEVELS.contains(code)));
                // No level is nearer by more than the first of two roundings moves the boundary.
                for (i, (w, q)) in w.iter().zip(&rounded).enumerate() {
                    let scale = scales[i / inp];
                    let least = GAUSSIAN_LEVELS.iter().map(|&l| (f32::from(l) * scale - w).abs());
                    assert!((w - q).abs() <= least.fold(f32::MAX, f32::min) + 1.01 * scale);
                }
            }
            (error, by_gptq.loss)
        });
        let [(even, even_loss), (gaussian, gaussian_loss)] = results;
        assert!(gaussian < 0.88 * even && gaussian_loss < 0.9 * even_loss, "{results:?}");
    }

    #[test]
    fn agrees_with_the_standard_library() {
        let w = gaussian(1000, 2);
        let codes = round_to_nearest(&w, 1, 1000, &[0.3], &Grid::default());
        for (&v, &code) in w.iter().zip(&codes) {
            assert_eq!(code, (v / 0.3).round_ties_even().clamp(-8.0, 7.0) as i8);
        }
    }
}
