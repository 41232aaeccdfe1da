//! The layers that share an input: branch, residual, rounding.

use std::borrow::Cow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use specquant_kernels::Basis;
use specquant_model::{Linear, Scheme, StoredLinear, Truncation, storable_scales};

use crate::branch::{self, LayerBranch, Score, SiteBranch};
use crate::recipe::{Overhead, Recipe, Rounding, Searched};
use crate::rounding::{self, ClipObjective, ClipSearch, Factor, Grid, Hessian};
use crate::{Error, Result};

/// A layer's weight with its transforms applied.
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
    /// Clip ratios that were learned, `[out]`; they take the place of the recipe's search.
    pub clip: Option<&'a [f32]>,
}

/// What is known about the input of some layers, transforms applied.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// Mean magnitude of every channel, `[in]`.
    pub mean_abs: &'a [f32],
    /// Its second moment, if it was collected.
    pub hessian: Option<&'a Hessian>,
    /// Some calibration tokens, `[rows, in]`.
    pub sample: &'a [f32],
    /// Number of these tokens.
    pub rows: usize,
}

/// How the residual is rounded this time.
#[derive(Clone, Copy)]
pub enum Round<'a> {
    /// To nearest.
    Nearest,
    /// By GPTQ, with the factor of the input's Hessian.
    Gptq(&'a Factor),
}

/// What the rounding reports about a layer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
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

/// Clip grid for searches: coarse, 10 ratios down to 0.55 by squared error, where the recipe's own goes by the weights too; none where the
/// recipe clips not at all, or by the outputs, after everything else is chosen (llm-awq).
fn search_clip(recipe: &Recipe) -> ClipSearch {
    let clip = &recipe.weight_clip;
    let enabled = clip.enabled && clip.objective == ClipObjective::Weight;
    ClipSearch { enabled, grid: 20, max_shrink: 0.5, norm: 2.0, objective: ClipObjective::Weight }
}

/// Temperatures of the allocation search, uniform first.
const TEMPERATURES: [f32; 4] = [0.0, 0.25, 0.5, 1.0];

/// Scales of some output channels, `[rows, groups]`: by ratios that were learned, or by the recipe's search. part: `[rows, in]`, what is to be
/// rounded of them.
fn channel_scales(
    w: &Weight,
    part: &[f32],
    rows: &[usize],
    grid: &Grid,
    clip: &ClipSearch,
    input: &Input,
) -> Vec<f32> {
    let (out, inp) = (rows.len(), w.inp);
    match (w.clip, clip.objective) {
        (Some(ratios), _) => {
            let whole = ClipSearch { enabled: false, ..clip.clone() };
            let mut scales = rounding::weight_scales(part, out, inp, grid, &whole);
            let of_rows = scales.chunks_exact_mut(grid.groups(inp)).zip(rows);
            of_rows.for_each(|(scales, &row)| scales.iter_mut().for_each(|s| *s *= ratios[row]));
            scales
        }
        (None, ClipObjective::Output) if clip.enabled => {
            // Attention scores forgive no clipping (llm-awq, `auto_clip.py`, skips q and k).
            let sharp = w.name.ends_with("q_proj") || w.name.ends_with("k_proj");
            let clip = ClipSearch { max_shrink: if sharp { 0.0 } else { clip.max_shrink }, ..clip.clone() };
            rounding::output_scales(part, out, inp, grid, &clip, input.sample, input.rows)
        }
        _ => rounding::weight_scales(part, out, inp, grid, clip),
    }
}

/// Rounds what the branch leaves of a layer, and returns the layer as it will lie on disk.
///
/// narrow: channels that get one bit less, `[out]`; empty for none.
///
/// # Errors
/// When a scale is not finite.
pub fn quantize(
    w: &Weight,
    scheme: &Scheme,
    branch: Option<&LayerBranch>,
    narrow: &[bool],
    clip: &ClipSearch,
    round: Round,
    input: &Input,
) -> Result<(StoredLinear, RoundingReport)> {
    let residual: Cow<[f32]> = match branch {
        Some(branch) => w.values.iter().zip(&branch.weight).map(|(w, b)| w - b).collect(),
        None => Cow::Borrowed(w.values),
    };
    let group_size = scheme.group(w.inp);
    let groups = w.inp / group_size;
    let mut codes = vec![0i8; residual.len()];
    let mut scales = vec![0.0f32; w.out * groups];
    let mut report = RoundingReport::default();
    for (bits, one_less) in [(scheme.weight_bits, false), (scheme.weight_bits - 1, true)] {
        let is_narrow = |row: usize| narrow.get(row).copied().unwrap_or(false);
        let rows: Vec<usize> = (0..w.out).filter(|&row| is_narrow(row) == one_less).collect();
        if rows.is_empty() {
            continue;
        }
        let part: Cow<[f32]> = match rows.len() == w.out {
            true => Cow::Borrowed(&residual),
            false => rows.iter().flat_map(|row| &residual[row * w.inp..(row + 1) * w.inp]).copied().collect(),
        };
        let grid = Grid { bits, group_size, levels: scheme.levels };
        let found = channel_scales(w, &part, &rows, &grid, clip, input);
        let part_scales = storable_scales(found);
        if let Some(i) = part_scales.iter().position(|s| !s.is_finite()) {
            let channel = Some(rows[i / groups]);
            return Err(Error::NotFinite { module: w.name.to_owned(), what: "a weight scale", channel });
        }
        let part_codes = match round {
            Round::Nearest => rounding::round_to_nearest(&part, rows.len(), w.inp, &part_scales, &grid),
            Round::Gptq(factor) => {
                let result = rounding::gptq(&part, rows.len(), w.inp, &part_scales, &grid, factor);
                report = RoundingReport {
                    dampening_frac: Some(result.dampening_frac),
                    dead_columns: result.dead_columns,
                    fallback: result.fallback,
                };
                result.codes
            }
        };
        for (i, row) in rows.into_iter().enumerate() {
            codes[row * w.inp..(row + 1) * w.inp].copy_from_slice(&part_codes[i * w.inp..(i + 1) * w.inp]);
            scales[row * groups..(row + 1) * groups]
                .copy_from_slice(&part_scales[i * groups..(i + 1) * groups]);
        }
    }
    let channel_bits = match narrow.contains(&true) {
        true => narrow.iter().map(|&narrow| scheme.weight_bits - u8::from(narrow)).collect(),
        false => Vec::new(),
    };
    let stored = StoredLinear {
        out: w.out,
        inp: w.inp,
        bits: scheme.weight_bits,
        channel_bits,
        levels: scheme.levels(scheme.weight_bits),
        group_size,
        codes,
        scales,
        kept: None,
        branch: branch.filter(|b| !b.stored.coeffs.is_empty()).map(|b| b.stored.clone()),
        bias: w.bias.map(<[f32]>::to_vec),
    };
    Ok((stored, report))
}

/// Squared error of the layer's output, by the engine that will run it, relative to the output's energy.
///
/// x: `[rows, in]`, transformed like the weight; want: `[rows, out]`, the full-precision output.
///
/// # Errors
/// When the layer cannot be packed.
pub fn output_error(layer: &Linear, x: &[f32], want: &[f32], rows: usize) -> Result<f64> {
    Ok(relative_error(&layer.forward(x, rows)?, want))
}

/// ‖got − want‖² / ‖want‖².
pub fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let (mut error, mut energy) = (0.0, 0.0);
    for (g, w) in got.iter().zip(want) {
        error += f64::from(g - w).powi(2);
        energy += f64::from(*w).powi(2);
    }
    if energy > 0.0 { error / energy } else { error }
}

/// The sum of [`output_error`] over quick versions of the layers: nearest rounding, a coarse clip grid, a branch without refinement.
///
/// wants: the full-precision output of each, `[rows, out]`; temperatures: of each one's allocation.
///
/// # Errors
/// As [`quantize`].
pub fn trial_error(
    weights: &[Weight],
    recipe: &Recipe,
    input: &Input,
    wants: &[&[f32]],
    temperatures: &[f32],
) -> Result<f64> {
    let site = recipe.branch.as_ref().map(|b| branch::build(weights, b, input, temperatures)).transpose()?;
    let mut error = 0.0;
    for (i, w) in weights.iter().enumerate() {
        let (branch, basis) = site.as_ref().map_or((None, None), |s| (Some(&s.layers[i]), Some(&s.basis)));
        let (stored, _) =
            quantize(w, &recipe.scheme, branch, &[], &search_clip(recipe), Round::Nearest, input)?;
        let linear = stored.to_linear(w.name, &recipe.scheme, basis, Truncation::None)?;
        error += output_error(&linear, input.sample, wants[i], input.rows)?;
    }
    Ok(error)
}

/// A finished layer.
pub struct Done {
    /// As it lies on disk.
    pub stored: StoredLinear,
    /// Of its rounding.
    pub rounding: RoundingReport,
    /// Of the allocation of its branch.
    pub temperature: f32,
}

/// The layers that share an input as the recipe wants them, with the basis of their branches if they have any.
///
/// factor: of the input's Hessian, for GPTQ; wants: as in [`trial_error`].
///
/// # Errors
/// As [`quantize`].
pub fn finish(
    weights: &[Weight],
    recipe: &Recipe,
    input: &Input,
    factor: Option<&Factor>,
    wants: &[&[f32]],
) -> Result<(Option<Arc<Basis>>, Vec<Done>)> {
    let mut temperatures = vec![0.0; weights.len()];
    let mut site = None;
    if let Some(config) = &recipe.branch {
        for (i, t) in temperatures.iter_mut().enumerate() {
            *t = temperature(&weights[i], recipe, input, wants[i])?;
        }
        site = Some(branch::build(weights, config, input, &temperatures)?);
        if config.iterations > 1 {
            site = site.map(|s| refine(s, weights, recipe, input, wants)).transpose()?;
        }
    }
    let round = match (&recipe.rounding, factor) {
        (Rounding::Gptq(_), Some(factor)) => Round::Gptq(factor),
        _ => Round::Nearest,
    };
    let outs: usize = weights.iter().map(|w| w.out).sum();
    let mut done = Vec::new();
    for (i, w) in weights.iter().enumerate() {
        let branch = site.as_ref().map(|s| &s.layers[i]);
        let narrow = match (&recipe.branch, &site) {
            (Some(config), Some(site)) if config.overhead == Overhead::Matched => {
                let shared = shared_bits(&site.basis) * w.out / outs;
                narrow_channels(w, recipe, &site.layers[i], input, shared)
            }
            _ => Vec::new(),
        };
        let (stored, rounding) =
            quantize(w, &recipe.scheme, branch, &narrow, &recipe.weight_clip, round, input)?;
        done.push(Done { stored, rounding, temperature: temperatures[i] });
    }
    let used = |s: &SiteBranch| s.layers.iter().any(|l| !l.stored.coeffs.is_empty());
    Ok((site.filter(used).map(|s| s.basis), done))
}

/// The temperature of a layer's allocation, given or the best of a few.
fn temperature(w: &Weight, recipe: &Recipe, input: &Input, want: &[f32]) -> Result<f32> {
    let Some(branch) = &recipe.branch else { return Ok(0.0) };
    match branch.temperature {
        Searched::Fixed(t) => Ok(t),
        Searched::Search(_) if branch.score == Score::Uniform || branch.mean_k == 0 => Ok(0.0),
        Searched::Search(_) => {
            let mut best = (f64::INFINITY, 0.0);
            for t in TEMPERATURES {
                let error = trial_error(std::slice::from_ref(w), recipe, input, &[want], &[t])?;
                if error < best.0 {
                    best = (error, t);
                }
            }
            Ok(best.1)
        }
    }
}

/// SVDQuant's iteration: the branch takes what the rounding of the residual left, as long as that lowers the error of the outputs
/// (deepcompressor, `calib/lowrank.py`: `num_iters`, `early_stop`).
fn refine(
    first: SiteBranch,
    weights: &[Weight],
    recipe: &Recipe,
    input: &Input,
    wants: &[&[f32]],
) -> Result<SiteBranch> {
    let Some(config) = &recipe.branch else { return Ok(first) };
    let clip = search_clip(recipe);
    let (mut best, mut least, mut candidate) = (None, f64::INFINITY, first);
    for left in (0..config.iterations).rev() {
        let (mut error, mut rest) = (0.0, Vec::new());
        for (i, w) in weights.iter().enumerate() {
            let branch = &candidate.layers[i];
            let (stored, _) = quantize(w, &recipe.scheme, Some(branch), &[], &clip, Round::Nearest, input)?;
            let linear =
                stored.to_linear(w.name, &recipe.scheme, Some(&candidate.basis), Truncation::None)?;
            error += output_error(&linear, input.sample, wants[i], input.rows)?;
            let grid =
                Grid { bits: stored.bits, group_size: stored.group_size, levels: recipe.scheme.levels };
            let rounded = rounding::dequantize(&stored.codes, w.out, w.inp, &stored.scales, &grid);
            rest.push(w.values.iter().zip(rounded).map(|(w, q)| w - q).collect::<Vec<f32>>());
        }
        if error >= least {
            break;
        }
        least = error;
        if left == 0 {
            return Ok(candidate);
        }
        let rest: Vec<Weight> =
            weights.iter().zip(&rest).map(|(w, values)| Weight { values, ..*w }).collect();
        let next = branch::build(&rest, config, input, &vec![0.0; rest.len()])?;
        best = Some(std::mem::replace(&mut candidate, next));
    }
    Ok(best.unwrap_or(candidate))
}

/// Bits of a basis that is stored.
pub fn shared_bits(basis: &Basis) -> usize {
    match basis {
        Basis::Fourier(_) | Basis::Dct(_) => 0,
        Basis::Inputs { indices, .. } => 32 * indices.len(),
        Basis::Dense { rows, .. } => 16 * rows.len(),
    }
}

/// Bits that a channel of `inp` inputs gives up with one bit a weight: rows are whole bytes.
pub fn narrowing_saves(inp: usize, bits: u8) -> usize {
    let row = |bits: u8| (inp * usize::from(bits)).next_multiple_of(8);
    row(bits) - row(bits - 1)
}

/// The channels that get one bit less, so that the layer takes no more bits than without its branch: those whose output suffers least,
/// by the rounding error that they add under nearest rounding, weighed by the energy of the inputs. shared: the layer's share of the basis.
fn narrow_channels(
    w: &Weight,
    recipe: &Recipe,
    branch: &LayerBranch,
    input: &Input,
    shared: usize,
) -> Vec<bool> {
    if branch.stored.coeffs.is_empty() {
        return Vec::new();
    }
    let scheme = &recipe.scheme;
    let residual: Vec<f32> = w.values.iter().zip(&branch.weight).map(|(w, b)| w - b).collect();
    let energy: Vec<f64> = match input.hessian {
        Some(hessian) => hessian.diagonal(),
        None => input.mean_abs.iter().map(|x| f64::from(*x).powi(2)).collect(),
    };
    let errors = |bits: u8| -> Vec<f64> {
        let grid = Grid { bits, group_size: scheme.group(w.inp), levels: scheme.levels };
        let scales = rounding::weight_scales(&residual, w.out, w.inp, &grid, &search_clip(recipe));
        let codes = rounding::round_to_nearest(&residual, w.out, w.inp, &scales, &grid);
        let rounded = rounding::dequantize(&codes, w.out, w.inp, &scales, &grid);
        let rows = residual.chunks_exact(w.inp).zip(rounded.chunks_exact(w.inp));
        let error = |(r, q): (&[f32], &[f32])| {
            r.iter().zip(q).zip(&energy).map(|((r, q), e)| f64::from(r - q).powi(2) * e).sum()
        };
        rows.map(error).collect()
    };
    let (wide, thin) = (errors(scheme.weight_bits), errors(scheme.weight_bits - 1));
    let mut order: Vec<usize> = (0..w.out).collect();
    order.sort_by(|&a, &b| (thin[a] - wide[a]).total_cmp(&(thin[b] - wide[b]))); // stable
    let stored = &branch.stored;
    let ragged = stored.counts.windows(2).any(|c| c[0] != c[1]);
    // The table of the channels' bits is overhead too.
    let extra = 16 * (stored.coeffs.len() + stored.indices.len() + if ragged { w.out } else { 0 })
        + 8 * w.out
        + shared;
    let mut narrow = vec![false; w.out];
    order
        .iter()
        .take(extra.div_ceil(narrowing_saves(w.inp, scheme.weight_bits).max(1)))
        .for_each(|&row| narrow[row] = true);
    narrow
}
