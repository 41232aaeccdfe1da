//! Single layers: spectra of the weights, and what a branch leaves of them to be rounded.

use serde::{Deserialize, Serialize};
use serde_json::json;
use specquant_model::{Block, BranchBasis, Embedding, Linear, ModelConfig, Site, Source};
use specquant_quantize::branch;
use specquant_quantize::layer::{Input, Weight};
use specquant_quantize::rounding::{
    ClipObjective, ClipSearch, Grid, dequantize, round_to_nearest, weight_scales,
};
use specquant_quantize::transforms::smooth;
use specquant_quantize::{Branch, SiteStats, States, observe};

use crate::allocation::Allocation;
use crate::lab::Lab;
use crate::permute;
use crate::{Result, Settings};

/// Migration strength of the smoothing in this study.
pub const ALPHA: f32 = 0.5;
/// Fourier bins per channel that the branches get the bits of.
pub const MEAN_K: usize = 16;
/// Calibration sequences that activations are observed on.
const SAMPLES: usize = 4;
/// Shares of the parameters that figures 5 and 6 keep.
pub const RATIOS: [f64; 3] = [0.2, 0.5, 0.8];

/// Mean and standard deviation over output channels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub deviation: f64,
}

/// The spectra of one kind of layer, along the inputs, over all blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spectrum {
    /// `q_proj` and so on.
    pub kind: String,
    /// Output channels.
    pub channels: usize,
    /// Share of a channel's energy in its lowest 20% of frequencies.
    pub low: Spread,
    /// The same with the inputs in a random order.
    pub permuted: Spread,
    /// Spectral entropy, 1 for equal energy in every bin.
    pub entropy: Spread,
}

/// What is left to be rounded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Residual {
    /// Share of the weight's energy that it has.
    pub energy: f64,
    /// Largest magnitude over root mean square.
    pub peak: f64,
    /// Squared error of rounding it to 4 bits, nearest, per channel with the clip search, relative to the weight's energy.
    pub rounding_error: f64,
}

/// A layer without a branch, and with one of every basis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerStudy {
    /// Full name.
    pub name: String,
    /// Whether the weight is smoothed, with α = [`ALPHA`].
    pub smoothed: bool,
    /// Without a branch.
    pub plain: Residual,
    /// With the bits of [`MEAN_K`] Fourier bins per channel.
    pub by_basis: Vec<(BranchBasis, Residual)>,
    /// What [`MEAN_K`] bins per channel catch, shared out in different ways.
    #[serde(default)]
    pub allocation: Allocation,
}

impl LayerStudy {
    /// Of a basis.
    pub fn of(&self, basis: BranchBasis) -> Option<&Residual> {
        self.by_basis.iter().find(|(b, _)| *b == basis).map(|(_, r)| r)
    }
}

/// Largest magnitudes per input channel, for figures 1 and 4, of the site whose activations have the largest outlier.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Magnitudes {
    /// The layers.
    pub name: String,
    /// Of the activations: the largest channel over the median one.
    pub outlier: f32,
    /// Of the activations, before smoothing and after.
    pub activations: [Vec<f32>; 2],
    /// Of the weights.
    pub weights: [Vec<f32>; 2],
    /// Of the smoothed weights' residual after a Fourier branch, one of SVD, and one of whole input rows.
    pub residuals: Vec<(BranchBasis, Vec<f32>)>,
}

/// How weights and their approximations are distributed up to 6 times their root mean square, for figures 5 and 6.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// The layer.
    pub name: String,
    /// Magnitudes at the middle of the bins, in units of the weights' root mean square.
    pub at: Vec<f64>,
    /// Density of the weights.
    pub original: Vec<f64>,
    /// Of the approximation by a basis that keeps a share of the parameters.
    pub approximations: Vec<(BranchBasis, f64, Vec<f64>)>,
}

/// The truncation error of Fourier series, computed directly and by the paper's Eq. 11.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Parseval {
    /// Largest relative difference of ‖w − w'‖² and `1/N Σ_{m=k}^{N-k} |F_m|²`, over channels.
    pub corrected: f64,
    /// Mean ratio of the bound as printed, `√(Σ_{m=k}^{N-1} |A_m|²)`, to ‖w − w'‖.
    pub printed: f64,
    /// The layer whose channels were tried.
    pub layer: String,
    /// Number of these channels.
    pub channels: usize,
    /// Energy that a branch with every bin leaves, from f16 alone.
    pub all_bins: f64,
}

/// Everything that is learned from single layers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Layers {
    /// Of every kind of layer.
    pub spectra: Vec<Spectrum>,
    /// Of all layers of some blocks, plain and smoothed.
    pub layers: Vec<LayerStudy>,
    /// Of one site.
    pub magnitudes: Magnitudes,
    /// Of the first MLP layer, and of the first attention layer.
    pub distributions: Vec<Distribution>,
    /// Of some channels.
    pub parseval: Parseval,
}

fn spread(x: &[f64]) -> Spread {
    let n = x.len().max(1) as f64;
    let mean = x.iter().sum::<f64>() / n;
    Spread { mean, deviation: (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt() }
}

fn energy(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum()
}

fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// r: `[out, inp]`; whole: energy of the weight.
fn residual(r: &[f32], out: usize, inp: usize, whole: f64) -> Residual {
    let grid = Grid::default();
    let clip =
        ClipSearch { enabled: true, grid: 20, max_shrink: 0.5, norm: 2.0, objective: ClipObjective::Weight };
    let scales = weight_scales(r, out, inp, &grid, &clip);
    let rounded = dequantize(&round_to_nearest(r, out, inp, &scales, &grid), out, inp, &scales, &grid);
    let own = energy(r);
    let most = r.iter().fold(0.0f32, |a, x| a.max(x.abs()));
    let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
    Residual {
        energy: ratio(own, whole),
        peak: ratio(f64::from(most), (own / r.len() as f64).sqrt()),
        rounding_error: ratio(energy(&difference(r, &rounded)), whole),
    }
}

/// What a branch stands for of a weight, `[out, inp]`: all channels alike, with the bits of `mean_k` Fourier bins, and directions of its own.
fn build(weight: &Weight, basis: BranchBasis, mean_k: usize, input: &Input) -> Result<Vec<f32>> {
    let branch = Branch { basis, mean_k, max_k: 0, ..Branch::default() };
    let built = branch::build(std::slice::from_ref(weight), &branch, input, &[0.0])?;
    Ok(built.layers.into_iter().next().map_or_else(Vec::new, |l| l.weight))
}

/// An input of which nothing is known: Fourier and SVD look at the weight alone.
fn unknown(zeros: &[f32]) -> Input<'_> {
    Input { mean_abs: zeros, hessian: None, sample: &[], rows: 0 }
}

/// The bases studied.
const BASES: [BranchBasis; 5] =
    [BranchBasis::Fourier, BranchBasis::FourierTop, BranchBasis::Dct, BranchBasis::Rows, BranchBasis::Svd];

/// Largest magnitude of every column of some weights.
fn column_max(ws: &[Vec<f32>], inp: usize) -> Vec<f32> {
    smooth::column_max(&ws.iter().map(Vec::as_slice).collect::<Vec<_>>(), inp)
}

fn dense(linears: &[&Linear]) -> Vec<Vec<f32>> {
    linears.iter().filter_map(|l| l.dense()).map(|(w, _)| w.to_vec()).collect()
}

/// λ of a site at [`ALPHA`], as SpecQuant would fold it.
fn factors(stats: &SiteStats, ws: &[Vec<f32>], site: Site, config: &ModelConfig) -> Vec<f32> {
    let mut lambda = smooth::factors(&stats.max, &column_max(ws, stats.max.len()), ALPHA);
    if site == Site::O {
        smooth::share_in_groups(&mut lambda, config.num_heads, config.num_kv_heads);
    }
    lambda
}

impl Layers {
    /// Studies the model, or takes what an earlier run has found.
    ///
    /// # Errors
    /// When a weight cannot be read or is not finite.
    pub(crate) fn study(lab: &mut Lab, source: &Source, settings: &Settings) -> Result<(Self, bool)> {
        let blocks = blocks(source.config().num_layers, settings.quick);
        lab.stored(
            "layers",
            json!({ "blocks": blocks, "alpha": ALPHA, "mean_k": MEAN_K, "samples": SAMPLES, "ratios": RATIOS, "allocations": true }),
            |_| {
                let mut found = Layers { spectra: spectra(source)?, ..Layers::default() };
                found.parseval = parseval(source)?;
                found.distributions = vec![
                    distribution(source, "model.layers.0.mlp.gate_proj")?,
                    distribution(source, "model.layers.0.self_attn.q_proj")?,
                ];
                found.walk(source, settings, &blocks)?;
                Ok(found)
            },
        )
    }

    /// Studies the layers of `blocks` with the activations that full precision brings them.
    fn walk(&mut self, source: &Source, settings: &Settings, blocks: &[usize]) -> Result<()> {
        let config = source.config();
        let calibration = specquant_quantize::Calibration { samples: SAMPLES, ..Default::default() };
        let tokenizer = source.tokenizer()?;
        let texts =
            specquant_quantize::calibration::from_file(&settings.calibration, &tokenizer, &calibration, 0)?;
        let embedding = Embedding::read(source)?;
        let states = texts.iter().map(|ids| Ok(embedding.lookup(ids, config)?.into_vec()));
        let states = states.collect::<specquant_model::Result<Vec<_>>>()?;
        let mut states = States::from_sequences(&states)?;
        let Some(&last) = blocks.last() else { return Ok(()) };
        for index in 0..=last {
            let mut block = Block::read(source, index, None)?;
            block.linears_mut().into_iter().try_for_each(Linear::widen)?;
            let (stats, _) = observe(&block, config, index, &mut states, true, 1, true)?;
            if !blocks.contains(&index) {
                continue;
            }
            for (site, stats) in Site::ALL.into_iter().zip(stats) {
                self.site(index, site, &block.site(site), stats, config)?;
            }
        }
        Ok(())
    }

    fn site(
        &mut self,
        index: usize,
        site: Site,
        linears: &[&Linear],
        mut stats: SiteStats,
        config: &ModelConfig,
    ) -> Result<()> {
        let inp = stats.max.len();
        let names: Vec<String> = site.layers().iter().map(|n| format!("model.layers.{index}.{n}")).collect();
        let mut ws = dense(linears);
        let lambda = factors(&stats, &ws, site, config);
        let mut drawn = Magnitudes {
            name: format!("{} in block {index}", site.layers().join(" and ")),
            outlier: outlier(&stats.max),
            activations: [stats.max.clone(), stats.max.iter().zip(&lambda).map(|(x, l)| x / l).collect()],
            weights: [column_max(&ws, inp), Vec::new()],
            residuals: Vec::new(),
        };
        for smoothed in [false, true] {
            if smoothed {
                ws.iter_mut().for_each(|w| smooth::scale_columns(w, &lambda));
                stats.smooth(&lambda);
                drawn.weights[1] = column_max(&ws, inp);
            }
            let mean_abs = stats.mean_abs();
            let input = stats.input(&mean_abs);
            let mut left = BASES.map(|basis| (basis, Vec::new()));
            for (values, name) in ws.iter().zip(&names) {
                let w = Weight { name, out: values.len() / inp, inp, values, bias: None, clip: None };
                let whole = energy(values);
                let mut study = LayerStudy {
                    name: name.clone(),
                    smoothed,
                    plain: residual(values, w.out, inp, whole),
                    by_basis: Vec::new(),
                    allocation: Allocation::of(&w, &input, MEAN_K).unwrap_or_default(),
                };
                for (basis, left) in &mut left {
                    let r = difference(values, &build(&w, *basis, MEAN_K, &input)?);
                    study.by_basis.push((*basis, residual(&r, w.out, inp, whole)));
                    left.push(r);
                }
                self.layers.push(study);
            }
            let shown = [BranchBasis::Fourier, BranchBasis::Rows, BranchBasis::Svd];
            let left = left.into_iter().filter(|(basis, _)| shown.contains(basis));
            drawn.residuals = left.map(|(basis, left)| (basis, column_max(&left, inp))).collect();
        }
        if drawn.outlier > self.magnitudes.outlier {
            self.magnitudes = drawn;
        }
        Ok(())
    }
}

/// The largest over the median.
fn outlier(x: &[f32]) -> f32 {
    let mut sorted = x.to_vec();
    sorted.sort_by(f32::total_cmp);
    sorted.last().copied().unwrap_or(0.0)
        / sorted.get(x.len() / 2).copied().unwrap_or(1.0).max(f32::MIN_POSITIVE)
}

/// The blocks whose layers are studied.
fn blocks(n: usize, quick: bool) -> Vec<usize> {
    let parts = if quick { 2 } else { 4 };
    let mut blocks: Vec<usize> =
        (0..=parts).map(|i| i * n.saturating_sub(1) / parts).chain([n / 2]).collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

/// Of all layers.
fn spectra(source: &Source) -> Result<Vec<Spectrum>> {
    let config = source.config();
    let mut kinds: Vec<(String, [Vec<f64>; 3])> = Vec::new();
    for (name, [out, inp]) in (0..config.num_layers).flat_map(|i| config.linear_shapes(i)) {
        let w = source.tensor(&format!("{name}.weight"))?.to_f32()?;
        let shuffled = permute::columns(&w, &permute::order(inp, 0));
        let most = ((inp / 2 + 1) as f64).ln();
        let wide = |x: Vec<f32>, unit: f64| x.into_iter().map(move |x| f64::from(x) / unit);
        let kind = name.rsplit('.').next().unwrap_or(&name);
        let at = kinds.iter().position(|(k, _)| k == kind).unwrap_or(kinds.len());
        if at == kinds.len() {
            kinds.push((kind.to_owned(), Default::default()));
        }
        let [low, null, entropy] = &mut kinds[at].1;
        low.extend(wide(branch::low_frequency_energy(&w, out, inp, 0.2), 1.0));
        null.extend(wide(branch::low_frequency_energy(&shuffled, out, inp, 0.2), 1.0));
        entropy.extend(wide(branch::spectral_entropy(&w, out, inp), most));
    }
    let finished = |(kind, [low, null, entropy]): (String, [Vec<f64>; 3])| Spectrum {
        kind,
        channels: low.len(),
        low: spread(&low),
        permuted: spread(&null),
        entropy: spread(&entropy),
    };
    Ok(kinds.into_iter().map(finished).collect())
}

/// Channels that Eq. 11 is tried on; a transform by its definition takes N² steps.
const TRIED: usize = 8;

fn parseval(source: &Source) -> Result<Parseval> {
    let name = "model.layers.0.self_attn.q_proj";
    let w = source.tensor(&format!("{name}.weight"))?.to_f32()?;
    let inp = source.config().hidden_size;
    let w = &w[..TRIED.min(w.len() / inp) * inp];
    let out = w.len() / inp;
    let weight = Weight { name, out, inp, values: w, bias: None, clip: None };
    let zeros = vec![0.0; inp];
    let k = MEAN_K.min(inp / 4);
    let kept = build(&weight, BranchBasis::Fourier, k, &unknown(&zeros))?;
    let all = build(&weight, BranchBasis::Fourier, inp, &unknown(&zeros))?;
    let n = inp as f64;
    let (mut corrected, mut printed) = (0.0f64, 0.0);
    for (row, approximation) in w.chunks_exact(inp).zip(kept.chunks_exact(inp)) {
        let power = |m: usize| {
            let angle = |i: usize| std::f64::consts::TAU * (i * m % inp) as f64 / n;
            let sum = |f: fn(f64) -> f64| {
                row.iter().enumerate().map(|(i, w)| f64::from(*w) * f(angle(i))).sum::<f64>()
            };
            sum(f64::cos).powi(2) + sum(f64::sin).powi(2)
        };
        let error = energy(&difference(row, approximation));
        let by_formula = (k..=inp - k).map(power).sum::<f64>() / n;
        corrected = corrected.max((error - by_formula).abs() / error);
        printed += ((k..inp).map(power).sum::<f64>() / error).sqrt() / out as f64;
    }
    let all_bins = energy(&difference(w, &all)) / energy(w);
    Ok(Parseval { corrected, printed, layer: name.to_owned(), channels: out, all_bins })
}

/// Width of a bin of a distribution, and their number.
const BIN: (f64, usize) = (0.1, 60);

fn density(w: &[f32], unit: f64) -> Vec<f64> {
    let mut counts = vec![0.0; BIN.1];
    for w in w {
        if let Some(count) = counts.get_mut((f64::from(w.abs()) / unit / BIN.0) as usize) {
            *count += 1.0;
        }
    }
    counts.iter().map(|c| c / (w.len() as f64 * BIN.0)).collect()
}

fn distribution(source: &Source, name: &str) -> Result<Distribution> {
    let view = source.tensor(&format!("{name}.weight"))?;
    let (out, inp) = (view.shape[0], view.shape[1]);
    let w = view.to_f32()?;
    let unit = (energy(&w) / w.len() as f64).sqrt();
    let weight = Weight { name, out, inp, values: &w, bias: None, clip: None };
    let mut approximations = Vec::new();
    for basis in [BranchBasis::Fourier, BranchBasis::Svd] {
        for ratio in RATIOS {
            let mean_k = (ratio * inp as f64 / 2.0) as usize;
            let built = build(&weight, basis, mean_k, &unknown(&vec![0.0; inp]))?;
            approximations.push((basis, ratio, density(&built, unit)));
        }
    }
    let at = (0..BIN.1).map(|i| (i as f64 + 0.5) * BIN.0).collect();
    Ok(Distribution { name: name.to_owned(), at, original: density(&w, unit), approximations })
}
