//! One linear layer: branch, residual, rounding.

use serde::Serialize;
use specquant_model::{Linear, Scheme, StoredLinear, storable_scales};

use crate::branch::{self, Score};
use crate::recipe::{Fourier, Recipe, Rounding, Searched};
use crate::rounding::{self, ClipSearch, Factor, Grid};
use crate::{Error, Result};

/// A layer's weight with its smoothing applied.
pub struct Weight<'a> {
    /// Full Hugging Face name, for errors and reports.
    pub name: &'a str,
    /// Output features.
    pub out: usize,
    /// Input features.
    pub inp: usize,
    /// `[out, in]`.
    pub values: &'a [f32],
    /// `[out]`.
    pub bias: Option<&'a [f32]>,
}

/// How the residual is rounded this time.
pub enum Round<'a> {
    /// To nearest.
    Nearest,
    /// By GPTQ, with the factor of the input's Hessian.
    Gptq(&'a Factor),
}

/// What the rounding reports about a layer.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RoundingReport {
    /// GPTQ's dampening, as a fraction of the Hessian's mean diagonal; absent for nearest rounding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dampening_frac: Option<f64>,
    /// Input channels that were never active.
    pub dead_columns: usize,
    /// Why GPTQ was given up for nearest rounding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
}

/// Coarse clip grid for searches: 10 ratios down to 0.55, by squared error. The final rounding uses the recipe's own.
const SEARCH_CLIP: ClipSearch = ClipSearch { enabled: true, grid: 20, max_shrink: 0.5, norm: 2.0 };
/// Temperatures of the allocation search, uniform first.
const TEMPERATURES: [f32; 4] = [0.0, 0.25, 0.5, 1.0];

/// The bins that every output channel keeps at temperature `t`, `[out]`.
fn allocate(w: &Weight, fourier: &Fourier, mean_abs: &[f32], t: f32) -> Vec<u16> {
    let scores = match fourier.score {
        Score::ActivationAware if t > 0.0 => branch::activation_score(w.values, w.out, w.inp, mean_abs),
        Score::Entropy if t > 0.0 => branch::spectral_entropy(w.values, w.out, w.inp),
        _ => vec![0.0; w.out],
    };
    let bins = w.inp / 2 + 1;
    let most = if fourier.max_k == 0 { bins } else { fourier.max_k.min(bins) };
    branch::allocate(&scores, t, fourier.mean_k, most)
}

/// Splits off the lowest `bins` of every channel, rounds the residual, and returns the layer as it will lie on disk.
///
/// # Errors
/// When a coefficient or a scale is not finite.
pub fn quantize(
    w: &Weight,
    scheme: &Scheme,
    bins: Vec<u16>,
    clip: &ClipSearch,
    round: Round,
) -> Result<(StoredLinear, RoundingReport)> {
    let branched = bins.iter().any(|&k| k > 0);
    let truncated = branched
        .then(|| branch::truncate(w.values, w.out, w.inp, &bins))
        .transpose()
        .map_err(|cause| Error::Branch { module: w.name.to_owned(), cause })?;
    let mut residual = w.values.to_vec();
    if let Some(t) = &truncated {
        residual.iter_mut().zip(branch::reconstruct(t, w.out, w.inp)).for_each(|(r, low)| *r -= low);
    }
    let grid = Grid { bits: scheme.weight_bits, group_size: scheme.group(w.inp) };
    let scales = storable_scales(rounding::weight_scales(&residual, w.out, w.inp, &grid, clip));
    if let Some(i) = scales.iter().position(|s| !s.is_finite()) {
        let channel = Some(i / (w.inp / grid.group_size));
        return Err(Error::NotFinite { module: w.name.to_owned(), what: "a weight scale", channel });
    }
    let (codes, report) = match round {
        Round::Nearest => {
            (rounding::round_to_nearest(&residual, w.out, w.inp, &scales, &grid), RoundingReport::default())
        }
        Round::Gptq(factor) => {
            let result = rounding::gptq(&residual, w.out, w.inp, &scales, &grid, factor);
            let report = RoundingReport {
                dampening_frac: Some(result.dampening_frac),
                dead_columns: result.dead_columns,
                fallback: result.fallback,
            };
            (result.codes, report)
        }
    };
    let (bins, coeffs) = truncated.map_or((Vec::new(), Vec::new()), |t| (t.bins, t.coeffs));
    let (out, inp, bits, group_size) = (w.out, w.inp, scheme.weight_bits, grid.group_size);
    Ok((
        StoredLinear {
            out,
            inp,
            bits,
            group_size,
            codes,
            scales,
            bins,
            coeffs,
            bias: w.bias.map(<[f32]>::to_vec),
        },
        report,
    ))
}

/// Squared error of the layer's output, by the engine that will run it, relative to the output's energy.
///
/// x: `[rows, in]`, smoothed like the weight; want: `[rows, out]`, the full-precision output.
///
/// # Errors
/// When the layer cannot be packed.
pub fn output_error(layer: &Linear, x: &[f32], want: &[f32], rows: usize) -> Result<f64> {
    let got = layer.forward(x, rows)?;
    let (mut error, mut energy) = (0.0, 0.0);
    for (g, w) in got.iter().zip(want) {
        error += f64::from(g - w).powi(2);
        energy += f64::from(*w).powi(2);
    }
    Ok(if energy > 0.0 { error / energy } else { error })
}

/// [`output_error`] of a quick version of the layer: nearest rounding, a coarse clip grid, uniform or given bins.
///
/// # Errors
/// As [`quantize`].
pub fn trial_error(
    w: &Weight,
    recipe: &Recipe,
    mean_abs: &[f32],
    t: f32,
    x: &[f32],
    want: &[f32],
    rows: usize,
) -> Result<f64> {
    let bins = recipe.branch.as_ref().map_or(Vec::new(), |f| allocate(w, f, mean_abs, t));
    let (stored, _) = quantize(w, &recipe.scheme, bins, &SEARCH_CLIP, Round::Nearest)?;
    output_error(&stored.to_linear(w.name, &recipe.scheme)?, x, want, rows)
}

/// The layer as the recipe wants it, with the temperature that was chosen.
///
/// mean_abs: `[in]`, mean magnitude of the smoothed input; x, want: as in [`output_error`]; factor: of the smoothed input's
/// Hessian, for GPTQ.
///
/// # Errors
/// As [`quantize`].
pub fn finish(
    w: &Weight,
    recipe: &Recipe,
    mean_abs: &[f32],
    factor: Option<&Factor>,
    (x, want, rows): (&[f32], &[f32], usize),
) -> Result<(StoredLinear, RoundingReport, f32)> {
    let mut temperature = 0.0;
    if let Some(fourier) = &recipe.branch {
        temperature = match fourier.temperature {
            Searched::Fixed(t) => t,
            Searched::Search(_) if fourier.score == Score::Uniform || fourier.mean_k == 0 => 0.0,
            Searched::Search(_) => {
                let mut best = (f64::INFINITY, 0.0);
                for t in TEMPERATURES {
                    let error = trial_error(w, recipe, mean_abs, t, x, want, rows)?;
                    if error < best.0 {
                        best = (error, t);
                    }
                }
                best.1
            }
        };
    }
    let bins = recipe.branch.as_ref().map_or(Vec::new(), |f| allocate(w, f, mean_abs, temperature));
    let round = match (&recipe.rounding, factor) {
        (Rounding::Gptq(_), Some(factor)) => Round::Gptq(factor),
        _ => Round::Nearest,
    };
    let (stored, report) = quantize(w, &recipe.scheme, bins, &recipe.weight_clip, round)?;
    Ok((stored, report, temperature))
}
