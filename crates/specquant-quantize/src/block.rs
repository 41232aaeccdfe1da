//! One decoder block: statistics, smoothing search and folds, then its seven layers.

use serde::Serialize;
use specquant_model::{Block, DenseLinear, DenseWeight, Linear, ModelConfig, Site, StoredLinear};

use crate::layer::{self, RoundingReport, Weight};
use crate::recipe::{Recipe, Rounding, Searched};
use crate::rounding::{Factor, Hessian, factorize};
use crate::transforms::smooth;
use crate::{Error, Result};

/// What calibration learns about the input of a [`Site`].
pub struct SiteStats {
    /// Largest magnitude per channel, `[in]`.
    pub max: Vec<f32>,
    /// Sum of magnitudes per channel, `[in]`.
    sum: Vec<f64>,
    /// Rows seen.
    rows: usize,
    /// Σ x xᵀ, if GPTQ needs it.
    hessian: Option<Hessian>,
    /// Every `stride`-th row, for searches and reports, `[sampled, in]`.
    sample: Vec<f32>,
    stride: usize,
}

impl SiteStats {
    /// Empty statistics of a site with `inp` channels that will see `total_rows` rows.
    pub fn new(inp: usize, total_rows: usize, search_tokens: usize, with_hessian: bool) -> Self {
        SiteStats {
            max: vec![0.0; inp],
            sum: vec![0.0; inp],
            rows: 0,
            hessian: with_hessian.then(|| Hessian::new(inp)),
            sample: Vec::new(),
            stride: total_rows.div_ceil(search_tokens).max(1),
        }
    }

    /// Adds rows. x: `[rows, in]`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] names the first broken channel of `module`.
    pub fn add(&mut self, x: &[f32], module: &str) -> Result<()> {
        let inp = self.max.len();
        for row in x.chunks_exact(inp) {
            if self.rows % self.stride == 0 {
                self.sample.extend_from_slice(row);
            }
            self.rows += 1;
            for (channel, (&x, (max, sum))) in
                row.iter().zip(self.max.iter_mut().zip(&mut self.sum)).enumerate()
            {
                if !x.is_finite() {
                    return Err(Error::NotFinite {
                        module: module.to_owned(),
                        what: "the calibration input",
                        channel: Some(channel),
                    });
                }
                *max = max.max(x.abs());
                *sum += f64::from(x.abs());
            }
        }
        if let Some(hessian) = &mut self.hessian {
            hessian.add(x);
        }
        Ok(())
    }

    /// The same statistics of the smoothed input `x / λ`.
    fn smooth(&mut self, lambda: &[f32]) {
        for (channel, &l) in lambda.iter().enumerate() {
            self.max[channel] /= l;
            self.sum[channel] /= f64::from(l);
        }
        self.sample
            .chunks_exact_mut(lambda.len())
            .for_each(|row| row.iter_mut().zip(lambda).for_each(|(x, l)| *x /= l));
        if let Some(hessian) = &mut self.hessian {
            hessian.rescale(&lambda.iter().map(|l| 1.0 / l).collect::<Vec<_>>());
        }
    }

    fn mean_abs(&self) -> Vec<f32> {
        self.sum.iter().map(|s| (s / self.rows.max(1) as f64) as f32).collect()
    }

    fn sampled_rows(&self) -> usize {
        self.sample.len() / self.max.len()
    }
}

/// What is reported of a layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// Full Hugging Face name.
    pub name: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Stored bits per weight: codes, scales, bins, coefficients.
    pub bits_per_weight: f64,
    /// Migration strength; absent without smoothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smoothing_strength: Option<f32>,
    /// Mean number of kept bins; absent without a branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_k: Option<f64>,
    /// Largest number of kept bins of a channel; absent without a branch.
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
    alpha: f32,
    config: &ModelConfig,
) -> (Vec<f32>, Vec<f32>) {
    let mut lambda = smooth::factors(&stats.max, weight_max, alpha);
    let kv_lambda = match site {
        Site::O => smooth::share_in_groups(&mut lambda, config.num_heads, config.num_kv_heads),
        _ => Vec::new(),
    };
    (lambda, kv_lambda)
}

/// Chooses a site's migration strength by the output error of its layers as they would be quantized; `None` is no smoothing.
fn search_strength(
    block: &mut Block,
    site: Site,
    stats: &SiteStats,
    weight_max: &[f32],
    recipe: &Recipe,
    config: &ModelConfig,
) -> Result<Option<f32>> {
    let rows = stats.sampled_rows();
    let mean_abs = stats.mean_abs();
    let mut layers = Vec::new();
    for (name, linear) in site_layers(block, site) {
        let want = linear.forward(&stats.sample, rows)?;
        let (out, inp) = (linear.out_features(), linear.in_features());
        if let Some((w, bias)) = dense(linear) {
            layers.push((name, out, inp, w.clone(), bias.clone(), want));
        }
    }
    let mut best = (f64::INFINITY, None);
    let strengths = (0..=20).map(|i| Some(i as f32 / 20.0));
    for alpha in [None].into_iter().chain(strengths) {
        let lambda = alpha.map_or_else(
            || vec![1.0; stats.max.len()],
            |a| site_factors(stats, weight_max, site, a, config).0,
        );
        let mut x = stats.sample.clone();
        x.chunks_exact_mut(lambda.len())
            .for_each(|row| row.iter_mut().zip(&lambda).for_each(|(x, l)| *x /= l));
        let mean_abs: Vec<f32> = mean_abs.iter().zip(&lambda).map(|(m, l)| m / l).collect();
        let mut error = 0.0;
        for (name, out, inp, w, bias, want) in &layers {
            let mut scaled = w.clone();
            smooth::scale_columns(&mut scaled, &lambda);
            let weight = Weight { name, out: *out, inp: *inp, values: &scaled, bias: bias.as_deref() };
            error += layer::trial_error(&weight, recipe, &mean_abs, 0.0, &x, want, rows)?;
        }
        if error < best.0 {
            best = (error, alpha);
        }
    }
    Ok(best.1)
}

/// Quantizes the block in place. `block` holds owned dense weights; `stats` is in the order of [`Site::ALL`].
///
/// Returns each layer's stored form and report, in the order of [`Block::linears`].
///
/// # Errors
/// When something is not finite or cannot be packed.
pub fn quantize_block(
    block: &mut Block,
    prefix: &str,
    stats: &mut [SiteStats; 4],
    recipe: &Recipe,
    config: &ModelConfig,
) -> Result<Vec<(LayerReport, StoredLinear)>> {
    let mut strengths = [None; 4];
    if let Some(recipe_smooth) = &recipe.smooth {
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
                Searched::Search(_) => search_strength(block, site, &stats[i], &weight_max, recipe, config)?,
            };
            if let Some(alpha) = strengths[i] {
                let (lambda, kv_lambda) = site_factors(&stats[i], &weight_max, site, alpha, config);
                for (_, linear) in site_layers(block, site) {
                    if let Some((w, _)) = dense(linear) {
                        smooth::scale_columns(w, &lambda);
                    }
                }
                fold(block, site, &lambda, &kv_lambda);
                stats[i].smooth(&lambda);
            }
        }
    }

    let mut done = Vec::new();
    for (i, site) in Site::ALL.into_iter().enumerate() {
        let stats = &stats[i];
        let (rows, mean_abs) = (stats.sampled_rows(), stats.mean_abs());
        let factor: Option<Factor> = match (&recipe.rounding, &stats.hessian) {
            (Rounding::Gptq(gptq), Some(hessian)) => Some(factorize(hessian, gptq)),
            _ => None,
        };
        for (name, linear) in site_layers(block, site) {
            let name = format!("{prefix}.{name}");
            let (out, inp) = (linear.out_features(), linear.in_features());
            let want = linear.forward(&stats.sample, rows)?;
            let Some((w, bias)) = dense(linear) else { continue };
            let weight = Weight { name: &name, out, inp, values: w, bias: bias.as_deref() };
            let (stored, rounding, temperature) =
                layer::finish(&weight, recipe, &mean_abs, factor.as_ref(), (&stats.sample, &want, rows))?;
            let quantized = stored.to_linear(&name, &recipe.scheme)?;
            let branched = !stored.coeffs.is_empty();
            let report = LayerReport {
                shape: [out, inp],
                bits_per_weight: stored.stored_bits() as f64 / (out * inp) as f64,
                smoothing_strength: strengths[i],
                mean_k: branched.then(|| stored.coeffs.len() as f64 / 2.0 / out as f64),
                max_k: branched.then(|| stored.bins.iter().copied().max().unwrap_or(0)),
                temperature: branched.then_some(temperature),
                relative_error: layer::output_error(&quantized, &stats.sample, &want, rows)?,
                rounding,
                name,
            };
            *linear = quantized;
            done.push((report, stored));
        }
    }
    Ok(done)
}
