//! One decoder block: smoothing search and folds, then its seven layers.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Serialize;
use specquant_kernels::Basis;
use specquant_model::{Block, DenseLinear, DenseWeight, Linear, ModelConfig, Site, StoredLinear, Truncation};

use crate::layer::{self, Input, RoundingReport, Weight};
use crate::recipe::{Recipe, Rounding, Searched, SmoothMethod};
use crate::rounding::{Factor, factorize};
use crate::transforms::{awq, smooth};
use crate::{Result, SiteStats};

/// What is reported of a layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// Full Hugging Face name.
    pub name: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Stored bits per weight: codes, scales, counts, indices, coefficients, and the layer's share of a stored basis.
    pub bits_per_weight: f64,
    /// Migration strength; absent without smoothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smoothing_strength: Option<f32>,
    /// Mean number of items (Fourier bins, directions) of the branch; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_k: Option<f64>,
    /// Largest number of items of a channel; absent without a branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_k: Option<u16>,
    /// Temperature of the allocation; absent without a branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// ‖y − ŷ‖² / ‖y‖² of the layer by itself, on sampled calibration tokens, through the integer engine.
    pub relative_error: f64,
    /// Of the rounding.
    #[serde(flatten)]
    pub rounding: RoundingReport,
}

/// A dense layer's weight and bias, or nothing if it is quantized already.
fn dense(linear: &mut Linear) -> Option<(&mut Vec<f32>, &mut Option<Vec<f32>>)> {
    match linear {
        Linear::Dense(DenseLinear { weight: DenseWeight::Owned(w), bias, .. }) => Some((w, bias)),
        _ => None,
    }
}

/// The layers that read a site, with their names within the block.
fn site_layers(block: &mut Block, site: Site) -> Vec<(&'static str, &mut Linear)> {
    let layers: Vec<&mut Linear> = match site {
        Site::Qkv => vec![&mut block.q, &mut block.k, &mut block.v],
        Site::O => vec![&mut block.o],
        Site::GateUp => vec![&mut block.gate, &mut block.up],
        Site::Down => vec![&mut block.down],
    };
    site.layers().iter().copied().zip(layers).collect()
}

/// Divides whatever produces the input of `site` by λ, so that the site's layers see `x / λ`.
fn fold(block: &mut Block, site: Site, lambda: &[f32], kv_lambda: &[f32]) {
    let divide = |linear: &mut Linear, lambda: &[f32]| {
        if let Some((w, bias)) = dense(linear) {
            smooth::divide_rows(w, lambda);
            if let Some(bias) = bias {
                smooth::divide_rows(bias, lambda);
            }
        }
    };
    match site {
        Site::Qkv => smooth::divide_rows(&mut block.input_norm, lambda),
        Site::GateUp => smooth::divide_rows(&mut block.post_norm, lambda),
        Site::O => divide(&mut block.v, kv_lambda),
        Site::Down => divide(&mut block.up, lambda),
    }
}

/// Smoothing factors of a site at migration strength `alpha`, `[in]`, and those of its KV heads where they are shared.
fn site_factors(
    stats: &SiteStats,
    weight_max: &[f32],
    site: Site,
    method: SmoothMethod,
    alpha: f32,
    config: &ModelConfig,
) -> (Vec<f32>, Vec<f32>) {
    let mut lambda = match method {
        SmoothMethod::SmoothQuant => smooth::factors(&stats.max, weight_max, alpha),
        SmoothMethod::Awq => awq::factors(&stats.mean_abs(), alpha),
    };
    let kv_lambda = match site {
        Site::O => smooth::share_in_groups(&mut lambda, config.num_heads, config.num_kv_heads),
        _ => Vec::new(),
    };
    (lambda, kv_lambda)
}

/// A layer's name, shape, weight, bias and full-precision output.
type Candidate = (&'static str, usize, usize, Vec<f32>, Option<Vec<f32>>, Vec<f32>);

/// Chooses a site's migration strength by the output error of its layers as they would be quantized; `None` is no smoothing.
fn search_strength(
    block: &mut Block,
    site: Site,
    stats: &SiteStats,
    weight_max: &[f32],
    method: SmoothMethod,
    recipe: &Recipe,
    config: &ModelConfig,
) -> Result<Option<f32>> {
    let rows = stats.sampled_rows();
    let mean_abs = stats.mean_abs();
    let mut layers: Vec<Candidate> = Vec::new();
    for (name, linear) in site_layers(block, site) {
        let want = linear.forward(&stats.sample, rows)?;
        let (out, inp) = (linear.out_features(), linear.in_features());
        if let Some((w, bias)) = dense(linear) {
            layers.push((name, out, inp, w.clone(), bias.clone(), want));
        }
    }
    let wants: Vec<&[f32]> = layers.iter().map(|l| l.5.as_slice()).collect();
    let mut best = (f64::INFINITY, None);
    let most = if method == SmoothMethod::Awq { 19 } else { 20 };
    let strengths = (0..=most).map(|i| Some(i as f32 / 20.0));
    for alpha in [None].into_iter().chain(strengths) {
        let lambda = alpha.map_or_else(
            || vec![1.0; stats.max.len()],
            |a| site_factors(stats, weight_max, site, method, a, config).0,
        );
        let mut x = stats.sample.clone();
        x.chunks_exact_mut(lambda.len())
            .for_each(|row| row.iter_mut().zip(&lambda).for_each(|(x, l)| *x /= l));
        let mean_abs: Vec<f32> = mean_abs.iter().zip(&lambda).map(|(m, l)| m / l).collect();
        let inverse: Vec<f32> = lambda.iter().map(|l| 1.0 / l).collect();
        // GPTQ is no part of a trial, but some branches need the input's second moment.
        let hessian = stats.hessian.as_ref().filter(|_| recipe.branch_needs_hessian()).map(|h| {
            let mut h = h.clone();
            h.rescale(&inverse);
            h
        });
        let scaled: Vec<Vec<f32>> = layers
            .iter()
            .map(|(_, _, _, w, _, _)| {
                let mut w = w.clone();
                smooth::scale_columns(&mut w, &lambda);
                w
            })
            .collect();
        let weights: Vec<Weight> = layers
            .iter()
            .zip(&scaled)
            .map(|((name, out, inp, _, bias, _), values)| Weight {
                name,
                out: *out,
                inp: *inp,
                values,
                bias: bias.as_deref(),
                clip: None,
            })
            .collect();
        let input = Input { mean_abs: &mean_abs, hessian: hessian.as_ref(), sample: &x, rows };
        let error = layer::trial_error(&weights, recipe, &input, &wants, &vec![0.0; weights.len()])?;
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
        let inp = stats[i].max.len();
        let weights = site_layers(block, site);
        let weights: Vec<&[f32]> =
            weights.into_iter().filter_map(|(_, l)| dense(l)).map(|(w, _)| w.as_slice()).collect();
        let weight_max = smooth::column_max(&weights, inp);
        strengths[i] = match recipe_smooth.smoothing_strength {
            Searched::Fixed(alpha) => Some(alpha),
            Searched::Search(_) => {
                search_strength(block, site, &stats[i], &weight_max, recipe_smooth.method, recipe, config)?
            }
        };
        if let Some(alpha) = strengths[i] {
            let (lambda, kv_lambda) =
                site_factors(&stats[i], &weight_max, site, recipe_smooth.method, alpha, config);
            for (_, linear) in site_layers(block, site) {
                if let Some((w, _)) = dense(linear) {
                    smooth::scale_columns(w, &lambda);
                }
            }
            fold(block, site, &lambda, &kv_lambda);
            stats[i].smooth(&lambda);
        }
    }
    Ok(strengths)
}

/// A quantized block.
pub struct QuantizedBlock {
    /// Each layer's report and stored form, in the order of [`Block::linears`].
    pub layers: Vec<(LayerReport, StoredLinear)>,
    /// The bases of the branches, in the order of [`Site::ALL`].
    pub bases: [Option<Arc<Basis>>; 4],
}

/// Multiplies what reads a site by λ `[in]`, and divides what produces it. At [`Site::O`], heads that read one KV head must have equal
/// factors.
#[cfg(feature = "learn")]
pub(crate) fn apply_scales(block: &mut Block, site: Site, lambda: &[f32], config: &ModelConfig) {
    for (_, linear) in site_layers(block, site) {
        if let Some((w, _)) = dense(linear) {
            smooth::scale_columns(w, lambda);
        }
    }
    let shared = match site {
        Site::O => smooth::share_in_groups(&mut lambda.to_vec(), config.num_heads, config.num_kv_heads),
        _ => Vec::new(),
    };
    fold(block, site, lambda, &shared);
}

/// Quantizes the block in place. `block` holds owned dense weights; `stats` is in the order of [`Site::ALL`]; clips: learned clip ratios, by the
/// layer's full name.
///
/// # Errors
/// When something is not finite or cannot be packed.
pub fn quantize_block(
    block: &mut Block,
    prefix: &str,
    stats: &mut [SiteStats; 4],
    clips: &HashMap<String, Vec<f32>>,
    recipe: &Recipe,
    config: &ModelConfig,
) -> Result<QuantizedBlock> {
    let strengths = smooth_block(block, stats, recipe, config)?;
    let (mut done, mut bases) = (Vec::new(), [const { None }; 4]);
    for (i, site) in Site::ALL.into_iter().enumerate() {
        let stats = &stats[i];
        let (rows, mean_abs) = (stats.sampled_rows(), stats.mean_abs());
        let input =
            Input { mean_abs: &mean_abs, hessian: stats.hessian.as_ref(), sample: &stats.sample, rows };
        let factor: Option<Factor> = match (&recipe.rounding, &stats.hessian) {
            (Rounding::Gptq(gptq), Some(hessian)) => Some(factorize(hessian, gptq)),
            _ => None,
        };
        let names: Vec<String> = site.layers().iter().map(|name| format!("{prefix}.{name}")).collect();
        let mut linears: Vec<&mut Linear> = site_layers(block, site).into_iter().map(|(_, l)| l).collect();
        let wants =
            linears.iter().map(|l| Ok(l.forward(&stats.sample, rows)?)).collect::<Result<Vec<_>>>()?;
        let wants: Vec<&[f32]> = wants.iter().map(Vec::as_slice).collect();
        let weights: Vec<Weight> = linears
            .iter_mut()
            .zip(&names)
            .filter_map(|(linear, name)| {
                let (out, inp) = (linear.out_features(), linear.in_features());
                let (w, bias) = dense(linear)?;
                let clip = clips.get(name.as_str()).map(Vec::as_slice);
                Some(Weight { name, out, inp, values: w, bias: bias.as_deref(), clip })
            })
            .collect();
        let (basis, finished) = layer::finish(&weights, recipe, &input, factor.as_ref(), &wants)?;
        let outs: usize = weights.iter().map(|w| w.out).sum();
        drop(weights);
        for (l, layer::Done { stored, rounding, temperature }) in finished.into_iter().enumerate() {
            let quantized = stored.to_linear(&names[l], &recipe.scheme, basis.as_ref(), Truncation::None)?;
            let (out, inp) = (stored.out, stored.inp);
            let shared = basis.as_ref().map_or(0, |b| layer::shared_bits(b) * out / outs);
            let items = stored.branch.as_ref().map(|b| {
                let total: usize = b.counts.iter().map(|&k| usize::from(k)).sum();
                (total as f64 / out as f64, b.counts.iter().copied().max().unwrap_or(0))
            });
            let report = LayerReport {
                name: names[l].clone(),
                shape: [out, inp],
                bits_per_weight: (stored.stored_bits() + shared) as f64 / (out * inp) as f64,
                smoothing_strength: strengths[i],
                mean_k: items.map(|(mean, _)| mean),
                max_k: items.map(|(_, most)| most),
                temperature: items.map(|_| temperature),
                relative_error: layer::output_error(&quantized, &stats.sample, wants[l], rows)?,
                rounding,
            };
            *linears[l] = quantized;
            done.push((report, stored));
        }
        bases[i] = basis.filter(|_| done.iter().rev().take(names.len()).any(|(_, s)| s.branch.is_some()));
    }
    Ok(QuantizedBlock { layers: done, bases })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;
    use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    use specquant_kernels::{KvCache, KvFormat, rms_norm};
    use specquant_model::{Embedding, Head, RopeTable, Source, Span};
    use std::path::Path;

    fn dense_block(source: &Source, index: usize) -> Block {
        let mut b = Block::read(source, index, None).unwrap();
        b.linears_mut().into_iter().try_for_each(Linear::widen).unwrap();
        b
    }

    fn forward(block: &Block, config: &ModelConfig, x: &mut [f32]) -> [SiteStats; 4] {
        let rows = x.len() / config.hidden_size;
        let wide = config.num_heads * config.head_dim;
        let widths = [config.hidden_size, wide, config.hidden_size, config.intermediate_size];
        let mut stats = widths.map(|inp| SiteStats::new(inp, rows, rows, true));
        let mut cache = KvCache::new(KvFormat::F32, config.num_kv_heads, config.head_dim);
        let rope = RopeTable::new(&config.inv_freq(), 0..rows);
        let spans = &mut [Span { rows, cache: &mut cache }];
        block
            .forward(config, &rope, x, spans, &mut |site, x| stats[site as usize].add(x, "test").unwrap())
            .unwrap();
        stats
    }

    fn relative(got: &[f32], want: &[f32]) -> f64 {
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
    }

    /// GQA, biases on q, k and v, q/k norms and a sliding window all meet a fold here.
    #[test]
    fn folding_changes_neither_logits_nor_what_statistics_predict() {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/tiny");
        for name in ["llama-tied-bf16", "llama3-rope-scaled", "llama-sharded", "mistral", "qwen2", "qwen3"] {
            let source = Source::open(&tiny.join(name)).unwrap();
            let config = source.config();
            let mut recipe = Recipe::load("smooth-gptq").unwrap();
            recipe.smooth.as_mut().unwrap().smoothing_strength = Searched::Fixed(0.5);

            let mut rng = ChaCha8Rng::seed_from_u64(4);
            let ids: Vec<u32> = (0..40).map(|_| rng.random_range(0..config.vocab_size as u32)).collect();
            let mut plain = Embedding::read(&source).unwrap().lookup(&ids, config.hidden_size).unwrap();
            let mut folded = plain.clone();
            for index in 0..config.num_layers {
                let mut block = dense_block(&source, index);
                let norm = block.input_norm.clone();
                let mut stats = forward(&block, config, &mut plain);
                let strengths = smooth_block(&mut block, &mut stats, &recipe, config).unwrap();
                assert_eq!(strengths, [Some(0.5); 4]);
                assert!(relative(&block.input_norm, &norm) > 0.1, "{name}: nothing was folded");
                let seen = forward(&block, config, &mut folded);
                for (site, (predicted, seen)) in Site::ALL.iter().zip(stats.iter().zip(&seen)) {
                    for (what, a, b) in [
                        ("max", &predicted.max, &seen.max),
                        ("mean", &predicted.mean_abs(), &seen.mean_abs()),
                        ("sample", &predicted.sample, &seen.sample),
                    ] {
                        let difference = relative(a, b);
                        assert!(difference < 1e-4, "{name}, block {index}, {site:?}, {what}: {difference}");
                    }
                    let hessian = |s: &SiteStats| -> Vec<f32> {
                        s.hessian.as_ref().unwrap().normalized().iter().map(|&v| v as f32).collect()
                    };
                    let difference = relative(&hessian(predicted), &hessian(seen));
                    assert!(difference < 1e-4, "{name}, block {index}, {site:?}, Hessian: {difference}");
                }
            }
            let head = Head::read(&source).unwrap();
            let logits = |x: &[f32]| {
                let mut normed = vec![0.0; x.len()];
                rms_norm(x, &head.norm, config.rms_norm_eps, &mut normed);
                head.linear.forward(&normed, ids.len()).unwrap()
            };
            let difference = relative(&logits(&folded), &logits(&plain));
            // Factors are no powers of two, so each fold rounds in the last bit: about 1e-6 is expected, 1e-3 was promised.
            assert!(difference < 1e-5, "{name}: {difference}");
        }
    }
}
