//! One decoder block: smoothing search and folds, then its seven layers.

use std::borrow::Cow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use specquant_kernels::Basis;
use specquant_kernels::matmul_nt;
use specquant_model::{
    Block, InputTransform, KEPT_BITS, Linear, ModelConfig, Site, StoredKept, StoredTensor, Truncation,
    storable_scales,
};

use crate::branch;
use crate::layer::{self, Input, RoundingReport, Weight};
use crate::learn::Learned;
use crate::recipe::{Recipe, Rounding, Searched, SmoothMethod};
use crate::rounding::{self, ClipSearch, Factor, Grid, factorize};
use crate::transforms::{awq, smooth};
use crate::{Result, SiteStats};

/// What is reported of a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Full Hugging Face name.
    pub name: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Stored bits per weight: codes, scales, counts, indices, coefficients, and the layer's share of a stored basis and of
    /// its input's transform.
    pub bits_per_weight: f64,
    /// Migration strength; absent without smoothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smoothing_strength: Option<f32>,
    /// Kept coordinates of the input; absent without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<usize>,
    /// Clip ratio of the input, where it has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub act_clip: Option<f32>,
    /// Mean number of items (Fourier bins, directions) of the branch; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_k: Option<f64>,
    /// Largest number of items of a channel; absent without a branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_k: Option<u16>,
    /// Items per channel that the recipe asks for, where the layer has fewer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub items_asked: Option<usize>,
    /// Temperature of the allocation; absent without a branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// ‖y − ŷ‖² / ‖y‖² of the layer by itself, on sampled calibration tokens, through the integer engine.
    pub relative_error: f64,
    /// Of the rounding.
    #[serde(flatten)]
    pub rounding: RoundingReport,
}

/// The weights of dense layers.
fn weights<'a>(linears: &[&'a Linear], names: &[&'a str]) -> Vec<Weight<'a>> {
    let weight = |(linear, name): (&&'a Linear, &&'a str)| {
        let (values, bias) = linear.dense()?;
        Some(Weight { name, out: linear.out_features(), inp: linear.in_features(), values, bias, clip: None })
    };
    linears.iter().zip(names).filter_map(weight).collect()
}

/// What the layers put out on the sampled tokens, `[rows, out]` each.
fn outputs(linears: &[&Linear], input: &Input) -> Result<Vec<Vec<f32>>> {
    linears.iter().map(|l| Ok(l.forward(input.sample, input.rows)?.into_vec())).collect()
}

/// Multiplies what reads a site by λ `[in]` and divides what produces it, so that the block computes what it did. At [`Site::O`], heads that
/// read one KV head must have equal factors.
pub(crate) fn apply_scales(block: &mut Block, site: Site, lambda: &[f32], config: &ModelConfig) {
    for (w, _) in block.site_mut(site).into_iter().filter_map(Linear::dense_mut) {
        smooth::scale_columns(w, lambda);
    }
    let divide = |linear: &mut Linear, lambda: &[f32]| {
        if let Some((w, bias)) = linear.dense_mut() {
            smooth::divide_rows(w, lambda);
            if let Some(bias) = bias {
                smooth::divide_rows(bias, lambda);
            }
        }
    };
    match site {
        Site::Qkv => smooth::divide_rows(&mut block.input_norm, lambda),
        Site::GateUp => smooth::divide_rows(&mut block.mlp_norm, lambda),
        Site::O => {
            let shared = smooth::share_in_groups(&mut lambda.to_vec(), config.num_heads, config.num_kv_heads);
            divide(&mut block.v, &shared);
        }
        Site::Down => divide(&mut block.up, lambda),
    }
}

/// Smoothing factors of a site at migration strength `alpha`, `[in]`; equal for heads that read one KV head.
fn site_factors(
    stats: &SiteStats,
    weight_max: &[f32],
    site: Site,
    method: SmoothMethod,
    alpha: f32,
    config: &ModelConfig,
) -> Vec<f32> {
    let mut lambda = match method {
        SmoothMethod::SmoothQuant => smooth::factors(&stats.max, weight_max, alpha),
        SmoothMethod::Awq => awq::factors(&stats.mean_abs(), alpha),
    };
    if site == Site::O {
        smooth::share_in_groups(&mut lambda, config.num_heads, config.num_kv_heads);
    }
    lambda
}

/// Chooses a site's migration strength by the output error of its layers as they would be quantized; `None` is no smoothing.
/// factors: λ at a strength.
fn search_strength(
    block: &Block,
    site: Site,
    stats: &SiteStats,
    recipe: &Recipe,
    method: SmoothMethod,
    factors: impl Fn(f32) -> Vec<f32>,
) -> Result<Option<f32>> {
    let linears = block.site(site);
    let plain = weights(&linears, site.layers());
    let wants = outputs(&linears, &stats.input(&[]))?;
    let wants: Vec<&[f32]> = wants.iter().map(Vec::as_slice).collect();
    let mut best = (f64::INFINITY, None);
    let most = if method == SmoothMethod::Awq { 19 } else { 20 };
    let strengths = (0..=most).map(|i| Some(i as f32 / 20.0));
    for alpha in [None].into_iter().chain(strengths) {
        // GPTQ is no part of a trial, but some branches need the input's second moment.
        let mut trial = stats.trial(recipe.branch_needs_hessian());
        let mut scaled: Vec<Vec<f32>> = plain.iter().map(|w| w.values.to_vec()).collect();
        if let Some(alpha) = alpha {
            let lambda = factors(alpha);
            trial.smooth(&lambda);
            scaled.iter_mut().for_each(|w| smooth::scale_columns(w, &lambda));
        }
        let weights: Vec<Weight> =
            plain.iter().zip(&scaled).map(|(w, values)| Weight { values, ..*w }).collect();
        let mean_abs = trial.mean_abs();
        let temperatures = vec![0.0; weights.len()];
        let error = layer::trial_error(&weights, recipe, &trial.input(&mean_abs), &wants, &temperatures)?;
        if error < best.0 {
            best = (error, alpha);
        }
    }
    Ok(best.1)
}

/// Smooths the block as the recipe says and folds the factors away, so that the block computes what it did; `stats` become those of
/// the smoothed inputs. Returns the migration strength of every site, in the order of [`Site::ALL`].
fn smooth_block(
    block: &mut Block,
    stats: &mut [SiteStats; 4],
    recipe: &Recipe,
    config: &ModelConfig,
) -> Result<[Option<f32>; 4]> {
    let mut strengths = [None; 4];
    let Some(recipe_smooth) = &recipe.smooth else { return Ok(strengths) };
    for (i, site) in Site::ALL.into_iter().enumerate() {
        if !recipe_smooth.all_sites && matches!(site, Site::O | Site::Down) {
            continue;
        }
        let plain: Vec<&[f32]> =
            block.site(site).into_iter().filter_map(Linear::dense).map(|(w, _)| w).collect();
        let weight_max = smooth::column_max(&plain, stats[i].max.len());
        let method = recipe_smooth.method;
        let factors = |alpha| site_factors(&stats[i], &weight_max, site, method, alpha, config);
        strengths[i] = match recipe_smooth.smoothing_strength {
            Searched::Fixed(alpha) => Some(alpha),
            Searched::Search(_) => search_strength(block, site, &stats[i], recipe, method, factors)?,
        };
        if let Some(lambda) = strengths[i].map(factors) {
            apply_scales(block, site, &lambda, config);
            stats[i].smooth(&lambda);
        }
    }
    Ok(strengths)
}

/// A quantized block.
pub struct QuantizedBlock {
    /// Each layer's report and what is stored of it, in the order of [`Block::linears`].
    pub layers: Vec<(LayerReport, Vec<StoredTensor>)>,
    /// The bases of the branches, in the order of [`Site::ALL`].
    pub bases: [Option<Arc<Basis>>; 4],
    /// The clip ratios of activations that were searched or learned, in the order of [`Site::ALL`].
    pub act_clips: [Option<f32>; 4],
}

/// Quantizes the block in place. `block` holds owned dense weights; `stats` is in the order of [`Site::ALL`].
///
/// # Errors
/// When something is not finite or cannot be packed.
pub fn quantize_block(
    block: &mut Block,
    prefix: &str,
    stats: &mut [SiteStats; 4],
    learned: &Learned,
    recipe: &Recipe,
    config: &ModelConfig,
) -> Result<QuantizedBlock> {
    let strengths = smooth_block(block, stats, recipe, config).map_err(|e| e.within(prefix))?;
    let (mut done, mut bases, mut act_clips) = (Vec::new(), [const { None }; 4], [None; 4]);
    for (i, site) in Site::ALL.into_iter().enumerate() {
        let names: Vec<String> = site.layers().iter().map(|name| format!("{prefix}.{name}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let full_outputs = outputs(&block.site(site), &stats[i].input(&[]))?;
        let mut change = match (&learned.inputs[i], &recipe.input) {
            (Some(transform), _) => Some((transform.clone(), stats[i].transformed(transform))),
            (None, Some(change)) => Some(stats[i].transform(change)),
            (None, None) => None,
        };
        let rest = change.as_mut().map_or(&mut stats[i], |(_, rest)| rest);
        // A branch looks at the second moment again; nobody else does.
        let hessian = match recipe.branch {
            Some(_) => rest.input(&[]).hessian.map(Cow::Borrowed),
            None => rest.take_hessian().map(Cow::Owned),
        };
        let factor: Option<Factor> = match (&recipe.rounding, hessian) {
            (Rounding::Gptq(gptq), Some(hessian)) => Some(factorize(hessian.into_owned(), gptq)),
            _ => None,
        };
        let mut parts = Vec::new();
        if let Some((transform, rest)) = &change {
            let of = |layer| Parts::of(layer, transform, &rest.input(&[]));
            parts.extend(block.site_mut(site).into_iter().filter_map(of));
        }
        let sample = stats[i].input(&[]);
        let rest = change.as_ref().map_or(&stats[i], |(_, rest)| rest);
        let mean_abs = rest.mean_abs();
        let input = rest.input(&mean_abs);
        let linears = block.site(site);
        let mut weights = weights(&linears, &names);
        weights.iter_mut().for_each(|w| w.clip = learned.clips.get(w.name).map(Vec::as_slice));
        for (w, part) in weights.iter_mut().zip(&parts) {
            (w.inp, w.values) = (part.inp, &part.rest);
        }
        let wants: Vec<&[f32]> = match parts.is_empty() {
            true => full_outputs.iter().map(Vec::as_slice).collect(),
            false => parts.iter().map(|part| part.want.as_slice()).collect(),
        };
        let outs: usize = weights.iter().map(|w| w.out).sum();
        let (basis, mut finished) = layer::finish(&weights, recipe, &input, factor.as_ref(), &wants)?;
        let transform = change.as_ref().map(|(transform, _)| transform);
        let kept = transform.map(InputTransform::kept).filter(|&r| r > 0);
        let mut transform_bits = transform.map_or(0, InputTransform::stored_bits);
        if let (Site::Qkv, Some(keys)) = (site, &block.rotations.keys) {
            transform_bits += 16 * keys.matrix().len();
        }
        let mut quantized = Vec::new();
        for (l, done) in finished.iter_mut().enumerate() {
            done.stored.kept = parts.get_mut(l).and_then(|part| part.kept.take());
            quantized.push(done.stored.to_linear(
                names[l],
                &recipe.scheme,
                basis.as_ref(),
                Truncation::None,
            )?);
        }
        let errors = |quantized: &[Linear]| -> Result<Vec<f64>> {
            let error = |(linear, want): (&Linear, &Vec<f32>)| {
                let got = linear.forward_transformed(sample.sample, sample.rows, transform)?;
                Ok(layer::relative_error(&got, want))
            };
            quantized.iter().zip(&full_outputs).map(error).collect()
        };
        if let Some(clip) = learned.act_clips[i] {
            set_act_clip(&mut quantized, clip);
            act_clips[i] = Some(clip);
        } else if recipe.search_act_clip && recipe.scheme.act_bits < 16 {
            act_clips[i] = Some(search_act_clip(&mut quantized, errors)?);
        }
        let errors = errors(&quantized)?;
        for (l, layer::Done { stored, rounding, temperature }) in finished.into_iter().enumerate() {
            let (out, inp) = (stored.out, quantized[l].in_features());
            let shared = (basis.as_ref().map_or(0, |b| layer::shared_bits(b)) + transform_bits) * out / outs;
            // As it will lie on the disk: half of what the codes take, while the other sites come.
            let tensors = stored.tensors(names[l]);
            // A bias is not a weight.
            let counted = tensors.iter().filter(|t| !t.name.ends_with(".bias"));
            let stored_bits = 8 * counted.map(|t| t.bytes.len()).sum::<usize>();
            let items = stored.branch.as_ref().map(|b| {
                let total: usize = b.counts.iter().map(|&k| usize::from(k)).sum();
                (total as f64 / out as f64, b.counts.iter().copied().max().unwrap_or(0))
            });
            let asked = recipe
                .branch
                .as_ref()
                .filter(|_| items.is_some())
                .map(|b| branch::asked(b, outs, stored.inp));
            let report = LayerReport {
                name: names[l].to_owned(),
                shape: [out, inp],
                bits_per_weight: (stored_bits + shared) as f64 / (out * inp) as f64,
                smoothing_strength: strengths[i],
                kept,
                act_clip: act_clips[i],
                mean_k: items.map(|(mean, _)| mean),
                max_k: items.map(|(_, most)| most),
                items_asked: asked.filter(|&asked| items.is_some_and(|(mean, _)| mean < asked as f64)),
                temperature: items.map(|_| temperature),
                relative_error: errors[l],
                rounding,
            };
            done.push((report, tensors));
        }
        block.site_mut(site).into_iter().zip(quantized).for_each(|(to, linear)| *to = linear);
        block.inputs[i] = change.map(|(transform, _)| transform);
        bases[i] = basis;
        // Nobody asks for it again, and the sites to come need the room.
        stats[i].take_hessian();
    }
    Ok(QuantizedBlock { layers: done, bases, act_clips })
}

/// Clip ratios of activations that are tried. A rotated input is nearly Gaussian, for which 16 steps are best over ± 2.7 standard deviations, and the
/// largest of 500 values lies about 3.1 from the mean.
const ACT_CLIPS: [f32; 8] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65];

fn set_act_clip(layers: &mut [Linear], clip: f32) {
    for layer in layers {
        if let Linear::Quantized(layer) = layer {
            layer.act_clip = clip;
        }
    }
}

/// Gives the layers of a site the clip ratio of least error, and returns it. errors: of every layer.
fn search_act_clip(layers: &mut [Linear], errors: impl Fn(&[Linear]) -> Result<Vec<f64>>) -> Result<f32> {
    let mut best = (f64::INFINITY, 1.0);
    for clip in ACT_CLIPS {
        set_act_clip(layers, clip);
        let error: f64 = errors(layers)?.into_iter().sum();
        if error < best.0 {
            best = (error, clip);
        }
    }
    set_act_clip(layers, best.1);
    Ok(best.1)
}

/// Rounds the columns that read kept coordinates, `[out, r]`.
pub(crate) fn round_kept(values: &[f32], out: usize) -> StoredKept {
    let r = values.len() / out;
    let grid = Grid { bits: KEPT_BITS, ..Grid::default() };
    let whole = ClipSearch { enabled: false, ..ClipSearch::default() };
    let scales = storable_scales(rounding::weight_scales(values, out, r, &grid, &whole));
    StoredKept { codes: rounding::round_to_nearest(values, out, r, &scales, &grid), scales }
}

/// A weight behind an [`InputTransform`].
struct Parts {
    /// Columns of `rest`.
    inp: usize,
    /// `[out, inp]`, to be rounded.
    rest: Vec<f32>,
    /// What reads the kept coordinates, rounded to nearest: they hardly correlate with the others, so that nothing could make up for it.
    kept: Option<StoredKept>,
    /// What `rest` puts out on the sampled tokens, `[rows, out]`.
    want: Vec<f32>,
}

impl Parts {
    /// The parts of a dense layer, whose weight is gone then: both at a time would be much. input: of the coordinates that are not kept.
    fn of(layer: &mut Linear, transform: &InputTransform, input: &Input) -> Option<Self> {
        let out = layer.out_features();
        let (w, bias) = layer.dense_mut()?;
        let split = transform.apply_to_weight(&std::mem::take(w), out);
        let (r, inp) = (transform.kept(), transform.width() - transform.kept());
        let kept = (r > 0).then(|| round_kept(&split.kept, out));
        let mut want = vec![0.0; input.rows * out];
        matmul_nt(input.sample, &split.rest, &mut want, input.rows, inp, out, false);
        if let Some(bias) = bias {
            want.chunks_exact_mut(out).for_each(|y| y.iter_mut().zip(&*bias).for_each(|(y, b)| *y += b));
        }
        Some(Parts { inp, rest: split.rest.into_vec(), kept, want })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TINY, dense_block, forward, ids, logits, relative, tiny};
    use specquant_model::{Embedding, Head};

    fn observed(block: &Block, config: &ModelConfig, x: &mut [f32]) -> [SiteStats; 4] {
        let rows = x.len() / config.hidden_size;
        let mut stats = Site::ALL.map(|site| SiteStats::new(config.site_width(site), rows, rows, true));
        forward(block, config, x, &mut |site, x| stats[site as usize].add(x, "test").unwrap());
        stats
    }

    /// GQA, biases on q, k and v, q/k norms and a sliding window all meet a fold here.
    #[test]
    fn folding_changes_neither_logits_nor_what_statistics_predict() {
        for name in TINY {
            let source = tiny(name);
            let config = source.config();
            let mut recipe = Recipe::load("smooth-gptq").unwrap();
            recipe.smooth.as_mut().unwrap().smoothing_strength = Searched::Fixed(0.5);

            let mut plain = Embedding::read(&source).unwrap().lookup(&ids(config), config).unwrap();
            let mut folded = plain.clone();
            for index in 0..config.num_layers {
                let mut block = dense_block(&source, index);
                let norm = block.input_norm.clone();
                let mut stats = observed(&block, config, &mut plain);
                let strengths = smooth_block(&mut block, &mut stats, &recipe, config).unwrap();
                assert_eq!(strengths, [Some(0.5); 4]);
                assert!(relative(&block.input_norm, &norm) > 0.1, "{name}: nothing was folded");
                let seen = observed(&block, config, &mut folded);
                for (site, (predicted, seen)) in Site::ALL.iter().zip(stats.iter().zip(&seen)) {
                    let hessian = |s: &SiteStats| -> Vec<f32> {
                        s.input(&[]).hessian.unwrap().normalized().iter().map(|&v| v as f32).collect()
                    };
                    for (what, a, b) in [
                        ("max", &predicted.max[..], &seen.max[..]),
                        ("mean", &predicted.mean_abs(), &seen.mean_abs()),
                        ("sample", predicted.input(&[]).sample, seen.input(&[]).sample),
                        ("Hessian", &hessian(predicted), &hessian(seen)),
                    ] {
                        let difference = relative(a, b);
                        assert!(difference < 1e-4, "{name}, block {index}, {site:?}, {what}: {difference}");
                    }
                }
            }
            let head = Head::read(&source).unwrap();
            let difference = relative(&logits(&head, config, &folded), &logits(&head, config, &plain));
            // Factors are no powers of two, so each fold rounds in the last bit: about 1e-6 is expected, 1e-3 was promised.
            assert!(difference < 1e-5, "{name}: {difference}");
        }
    }
}
