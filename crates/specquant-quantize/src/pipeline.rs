//! The run: plan, calibrate, and one block after another from the source to the disk.
//!
//! Block n is calibrated on the outputs of the quantized blocks before it. Only one block's weights are in memory at a time,
//! widened to f32; a finished block is a finished shard.

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;
use specquant_kernels::{KvCache, KvFormat};
use specquant_model::{
    Block, DenseLinear, DenseWeight, Dtype, FORMAT_VERSION, Linear, ModelConfig, OnlineRotations,
    QuantizationConfig, RopeTable, Site, Source, Span, StoredTensor, basis_tensors, storable_scales,
};

use crate::block::{LayerReport, quantize_block};
use crate::calibration::GENERATION_BATCH;
use crate::output::Output;
use crate::recipe::{Embeddings, Overhead, Recipe, Rounding};
use crate::transforms::rotate::{self, Orthogonal};
use crate::{Error, Result, SiteStats, branch, card, layer};
#[cfg(feature = "learn")]
use crate::{Learn, learn};

/// Rows that run through a block together.
const BATCH_ROWS: usize = 2048;

/// Memory that does not depend on the model: code, tokenizer, allocator.
const BASE_BYTES: usize = 100 << 20;

/// What will happen, known before a weight is read.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Decoder blocks.
    pub blocks: usize,
    /// Linear layers to quantize.
    pub layers: usize,
    /// Their weights.
    pub weights: usize,
    /// Calibration tokens asked for.
    pub calibration_tokens: usize,
    /// Peak memory in bytes, estimated, without the pages of the source file that the system keeps mapped.
    pub peak_bytes: u64,
    /// Bytes of the checkpoint's tensors, estimated.
    pub output_bytes: u64,
    /// Estimated bits per weight of the linear layers.
    pub bits_per_weight: f64,
}

/// Progress of a run.
pub enum Event<'a> {
    /// A step of learning over the whole model is done.
    Learning {
        /// Its number, from 0.
        step: usize,
        /// Number of steps.
        of: usize,
        /// What is minimized.
        loss: f64,
    },
    /// A block is done.
    Block {
        /// Its number, from 0.
        index: usize,
        /// Number of blocks.
        of: usize,
        /// Its layers.
        layers: &'a [LayerReport],
    },
}

/// What a run did; written as report.json. It holds nothing that differs between equal runs, such as times or paths.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Version of the program.
    pub specquant_version: String,
    /// Bits and granularity.
    pub scheme: String,
    /// Calibration tokens used.
    pub calibration_tokens: usize,
    /// Stored bits per weight over all linear layers of the blocks: codes, scales, branches.
    pub bits_per_weight: f64,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Every layer, in the order of the model.
    pub layers: Vec<LayerReport>,
}

/// Checks the recipe against the model and predicts the cost.
///
/// # Errors
/// [`Error::Unfit`] lists every layer that the recipe does not fit; also for a model that is quantized already.
pub fn plan(source: &Source, recipe: &Recipe) -> Result<Plan> {
    recipe.validate()?;
    let config = source.config();
    let mut problems = Vec::new();
    if source.config_json().get("quantization_config").is_some_and(|q| !q.is_null()) {
        problems.push(format!(
            "  {} is quantized already: give the full-precision model",
            source.path().display()
        ));
    }
    let scheme = &recipe.scheme;
    let shapes = config.linear_shapes(0);
    for (name, [_, inp]) in &shapes {
        let (inp, name) = (*inp, name.trim_start_matches("model.layers.0."));
        let group = scheme.group(inp);
        if !inp.is_multiple_of(group) || (group < inp && !group.is_multiple_of(8)) {
            let fits: Vec<String> =
                (16..inp.min(257)).step_by(8).filter(|g| inp % g == 0).map(|g| g.to_string()).collect();
            problems.push(format!("  {name}: group size {group} does not divide its {inp} inputs into groups of a multiple of 8; these would: {}, or 0", fits.join(", ")));
        }
        let bins = inp / 2 + 1;
        if let Some(b) = recipe.branch.as_ref().filter(|b| b.basis.is_fourier() && b.mean_k > bins) {
            problems.push(format!(
                "  {name}: has {bins} frequency bins, fewer than branch.mean_k = {}; lower it (--mean-k)",
                b.mean_k
            ));
        }
    }
    if scheme.weight_bits == 16
        && *recipe
            != (Recipe {
                rotate: None,
                smooth: None,
                branch: None,
                rounding: Rounding::Rtn {},
                ..recipe.clone()
            })
    {
        problems.push(format!("  {scheme} leaves the weights alone, so rotation, smoothing, branch and GPTQ have nothing to do: use --recipe rtn"));
    }
    for (site, b) in Site::ALL.into_iter().flat_map(|site| recipe.branch.iter().map(move |b| (site, b))) {
        let (outs, inp) = (site_outputs(&shapes, site), config.site_width(site));
        if b.mean_k > 0 && branch::items(b, outs, inp) == 0 {
            problems.push(format!(
                "  {}: {} Fourier bins per channel are too few bits for a branch of the basis {}; raise --mean-k",
                site.name(),
                b.mean_k,
                b.basis.name()
            ));
        }
        if b.basis.is_fourier() && inp / 2 >= usize::from(u16::MAX) {
            problems.push(format!(
                "  {}: {inp} inputs have more frequency bins than can be numbered",
                site.name()
            ));
        }
        if b.overhead != Overhead::Matched {
            continue;
        }
        // The table of bits costs 8 a channel.
        let saved = layer::narrowing_saves(inp, scheme.weight_bits).saturating_sub(8);
        let (most, need) = (outs * saved, branch::bits(b, outs, inp));
        if need > most {
            problems.push(format!(
                "  {}: the branch takes {need} bits, but one bit less for every channel saves only {most}; lower its size (--mean-k, --rank), or \
                 let it come on top (--overhead plain)",
                site.name()
            ));
        }
    }
    if !problems.is_empty() {
        return Err(Error::Unfit(problems.join("\n")));
    }

    // Bits of a site's layers with the basis that they share.
    let bits = |site: Site| {
        let (outs, inp) = (site_outputs(&shapes, site), config.site_width(site));
        let code_bits = match scheme.weight_bits {
            bits @ ..=4 => (usize::from(bits) * inp).next_multiple_of(8),
            16 => 16 * inp,
            _ => 8 * inp,
        };
        let groups = if scheme.weight_bits == 16 { 0 } else { inp / scheme.group(inp) };
        let plain = recipe.branch.as_ref().filter(|b| b.overhead == Overhead::Plain);
        let branch = plain.map_or(0, |b| branch::bits(b, outs, inp));
        (outs * (code_bits + 16 * groups) + branch) as f64
    };
    let block_weights: usize = shapes.iter().map(|(_, [out, inp])| out * inp).sum();
    let block_bits: f64 = Site::ALL.into_iter().map(bits).sum();
    let tied = config.tie_word_embeddings && recipe.rotate.is_none();
    let vocab_weights = config.vocab_size * config.hidden_size * if tied { 1 } else { 2 };
    let vocab_bytes = vocab_weights * if recipe.embeddings == Embeddings::Int8 { 1 } else { 2 };
    let tokens = recipe.calibration.samples * recipe.calibration.sequence_length;

    // The largest of three moments: the model writing text, the embeddings on their way to the disk, a block at work.
    let generation = match recipe.calibration.file {
        Some(_) => 0,
        None => {
            let cached =
                GENERATION_BATCH.min(recipe.calibration.samples) * recipe.calibration.sequence_length;
            let kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * cached;
            // The model that writes is the source, tied as it is.
            let copies = if config.tie_word_embeddings { 1 } else { 2 };
            let vocabulary = copies * config.vocab_size * config.hidden_size;
            4 * (config.num_layers * block_weights + vocabulary + kv)
        }
    };
    let vocabulary = config.vocab_size * config.hidden_size * 6 + if tied { 0 } else { vocab_bytes / 2 };
    let hessians: usize = match recipe.needs_hessian() {
        false => 0,
        true => {
            let squares = Site::ALL.map(|s| config.site_width(s).pow(2));
            8 * (squares.iter().sum::<usize>() + 2 * squares.iter().max().unwrap_or(&0))
        }
    };
    let widest_site = shapes.iter().map(|(_, [out, inp])| out * inp).max().unwrap_or(0) * 2;
    let wide = 4 * config.hidden_size + 3 * config.intermediate_size + 3 * config.num_heads * config.head_dim;
    let work = 4
        * (block_weights + 4 * widest_site + 2 * tokens * config.hidden_size + BATCH_ROWS.min(tokens) * wide);
    let peak = BASE_BYTES + generation.max(vocabulary).max(hessians + work);
    Ok(Plan {
        blocks: config.num_layers,
        layers: config.num_layers * shapes.len(),
        weights: config.num_layers * block_weights,
        calibration_tokens: tokens,
        peak_bytes: peak as u64,
        output_bytes: (config.num_layers as f64 * block_bits / 8.0) as u64 + vocab_bytes as u64,
        bits_per_weight: block_bits / block_weights as f64,
    })
}

/// Output channels of all layers that read a site. shapes: of one block's layers.
fn site_outputs(shapes: &[(String, [usize; 2])], site: Site) -> usize {
    let of_site = |name: &str| site.layers().iter().any(|layer| name.ends_with(layer));
    shapes.iter().filter(|(name, _)| of_site(name)).map(|(_, [out, _])| out).sum()
}

/// Quantizes the model of `source` into the directory `destination`.
///
/// texts: calibration sequences of token ids, see [`crate::calibration`].
///
/// # Errors
/// Everything that [`Error`] lists; then nothing is left at the destination.
pub fn run(
    source: &Source,
    recipe: &Recipe,
    texts: &[Vec<u32>],
    destination: &Path,
    overwrite: bool,
    progress: &mut dyn FnMut(Event),
) -> Result<Report> {
    plan(source, recipe)?;
    if recipe.scheme.weight_bits < 16 && texts.iter().all(Vec::is_empty) {
        return Err(Error::Recipe(
            "calibration: no tokens were given; give at least one sequence".to_owned(),
        ));
    }
    let config = source.config();
    let mut output = Output::create(destination, overwrite, config.num_layers + 1)?;
    let half_dtype = match source.tensor("model.embed_tokens.weight")?.dtype {
        Dtype::BF16 => HalfType::Bf16,
        _ => HalfType::F16,
    };

    let rotation = Rotation::new(source, recipe, texts, progress)?;
    let mut norm = source.tensor("model.norm.weight")?.to_f32()?;
    let vocabulary = |from: &str, name: &str, change: &dyn Fn(&mut [f32])| {
        vocabulary_tensors(source, from, name, recipe.embeddings, half_dtype, change)
    };
    let mut ends = vocabulary("model.embed_tokens", "model.embed_tokens", &|x| {
        rotation.iter().for_each(|r| r.residual.rotate_rows(x));
    })?;
    // A rotated head has the final norm folded in, so it is no longer the embedding.
    let tied = config.tie_word_embeddings && rotation.is_none();
    if !tied {
        let from = if config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        ends.extend(vocabulary(from, "lm_head", &|x| {
            if let Some(rotation) = &rotation {
                rotate::fold_norm(x, &norm);
                rotation.residual.rotate_rows(x);
            }
        })?);
    }
    if rotation.is_some() {
        norm.fill(1.0);
    }
    ends.push(StoredTensor::f32("model.norm.weight".to_owned(), vec![norm.len()], &norm));
    output.write_shard(&ends)?;
    drop(ends);

    let embedding = specquant_model::Embedding::read(source)?;
    let mut states = texts
        .iter()
        .map(|ids| {
            let mut x = embedding.lookup(ids, config.hidden_size)?;
            rotation.iter().for_each(|r| r.residual.rotate_rows(&mut x));
            x.chunks_exact_mut(config.hidden_size)
                .for_each(|row| round_row(row, recipe.embeddings, half_dtype));
            Ok(x)
        })
        .collect::<Result<Vec<_>>>()?;
    // What full precision makes of the same texts, for methods that compare with it.
    #[cfg(feature = "learn")]
    let mut full = matches!(recipe.learn, Some(Learn::OmniQuant(_))).then(|| states.clone());
    #[cfg(not(feature = "learn"))]
    let mut full: Option<Vec<Vec<f32>>> = None;
    let mut layers = Vec::new();
    for index in 0..config.num_layers {
        let (tensors, reports) = one_block(
            source,
            index,
            recipe,
            rotation.as_ref(),
            &mut states,
            full.as_deref_mut(),
            half_dtype,
        )?;
        output.write_shard(&tensors)?;
        progress(Event::Block { index, of: config.num_layers, layers: &reports });
        layers.extend(reports);
    }

    let weights: f64 = layers.iter().map(|l| (l.shape[0] * l.shape[1]) as f64).sum();
    let bits: f64 = layers.iter().map(|l| l.bits_per_weight * (l.shape[0] * l.shape[1]) as f64).sum();
    let mut report = Report {
        specquant_version: env!("CARGO_PKG_VERSION").to_owned(),
        scheme: recipe.scheme.to_string(),
        calibration_tokens: texts.iter().map(Vec::len).sum(),
        bits_per_weight: if weights > 0.0 { bits / weights } else { 16.0 },
        tensor_bytes: 0,
        layers,
    };
    report.tensor_bytes = output.bytes();
    let quantization = QuantizationConfig {
        quant_method: "specquant".to_owned(),
        format_version: FORMAT_VERSION,
        specquant_version: report.specquant_version.clone(),
        scheme: recipe.scheme,
        branch_basis: recipe.branch.as_ref().map(|b| b.basis),
        online_rotations: rotation.as_ref().map_or_else(OnlineRotations::default, |r| r.online),
        recipe: json!(recipe),
    };
    let mut config_json = source.config_json().clone();
    config_json["quantization_config"] = json!(quantization);
    config_json["tie_word_embeddings"] = json!(tied);
    for (name, bytes) in source.side_files()? {
        output.write(&name, &bytes)?;
    }
    output.write("config.json", format!("{config_json:#}\n").as_bytes())?;
    output.write("report.json", format!("{:#}\n", json!(report)).as_bytes())?;
    output.write("README.md", card::render(source, recipe, &report).as_bytes())?;
    output.finish()?;
    Ok(report)
}

/// What a recipe's rotation comes to in a model.
struct Rotation {
    residual: Orthogonal,
    /// Of the heads of v: one for all layers, or one for each.
    heads: Vec<Orthogonal>,
    online: OnlineRotations,
}

impl Rotation {
    fn new(
        source: &Source,
        recipe: &Recipe,
        texts: &[Vec<u32>],
        progress: &mut dyn FnMut(Event),
    ) -> Result<Option<Self>> {
        let Some(rotate) = &recipe.rotate else { return Ok(None) };
        let config = source.config();
        let online = rotate::online(rotate, config);
        #[cfg(feature = "learn")]
        if let Some(Learn::SpinQuant(settings)) = &recipe.learn {
            // R2 alone rotates the heads: nothing across them (SpinQuant, section 3).
            let online = OnlineRotations { heads: None, ..online };
            let of = settings.steps;
            let mut tell = |step, loss| progress(Event::Learning { step, of, loss });
            let (residual, heads) = learn::rotations(source, recipe, settings, &online, texts, &mut tell)?;
            return Ok(Some(Rotation { residual, heads, online }));
        }
        let _ = (texts, progress);
        Ok(Some(Rotation {
            residual: Orthogonal::random_hadamard(config.hidden_size, recipe.seed),
            heads: vec![Orthogonal::hadamard(config.head_dim)],
            online,
        }))
    }

    fn head(&self, layer: usize) -> &Orthogonal {
        &self.heads[layer.min(self.heads.len() - 1)]
    }
}

/// Calibrates and quantizes one block, and moves the hidden states through the result.
fn one_block(
    source: &Source,
    index: usize,
    recipe: &Recipe,
    rotation: Option<&Rotation>,
    states: &mut [Vec<f32>],
    full: Option<&mut [Vec<f32>]>,
    half: HalfType,
) -> Result<(Vec<StoredTensor>, Vec<LayerReport>)> {
    let config = source.config();
    let prefix = format!("model.layers.{index}");
    let mut block = Block::read(source, index, None)?;
    block.linears_mut().into_iter().try_for_each(Linear::widen)?;
    if let Some(r) = rotation {
        rotate::rotate_block(&mut block, config, &r.residual, r.head(index), &r.online);
    }
    let mut reports = Vec::new();
    let mut tensors = Vec::new();
    if recipe.scheme.weight_bits < 16 {
        let rows = states.iter().map(|s| s.len() / config.hidden_size).sum();
        let with_hessian = recipe.needs_hessian();
        let clips = learn_block(&mut block, index, recipe, config, states, full)?;
        let mut stats = Site::ALL.map(|site| {
            SiteStats::new(config.site_width(site), rows, recipe.calibration.search_tokens, with_hessian)
        });
        // Statistics come from the full-precision block on the quantized blocks' outputs; the states themselves stay.
        let mut observed = Ok(());
        run_block(&block, config, KvFormat::F32, &mut states.to_vec(), &mut |site, x| {
            if observed.is_ok() {
                observed = stats[site as usize].add(x, &format!("{prefix} {site:?}"));
            }
        })?;
        observed?;
        let done = quantize_block(&mut block, &prefix, &mut stats, &clips, recipe, config)?;
        for (report, stored) in done.layers {
            tensors.extend(stored.tensors(&report.name));
            reports.push(report);
        }
        for (site, basis) in Site::ALL.into_iter().zip(done.bases) {
            tensors.extend(basis.iter().flat_map(|b| basis_tensors(b, &prefix, site)));
        }
    } else {
        let names = block.linears().map(|(name, _)| name);
        for (name, linear) in names.into_iter().zip(block.linears_mut()) {
            if let Linear::Dense(DenseLinear { weight: DenseWeight::Owned(w), bias, out, inp }) = linear {
                tensors.push(half.tensor(format!("{prefix}.{name}.weight"), vec![*out, *inp], w)?);
                w.iter_mut().for_each(|v| *v = half.round(*v));
                if let Some(bias) = bias {
                    tensors.push(StoredTensor::f32(format!("{prefix}.{name}.bias"), vec![*out], bias));
                }
            }
        }
    }
    run_block(&block, config, recipe.scheme.kv_format(), states, &mut |_, _| ())?;
    let norms = [
        ("input_layernorm", Some(&block.input_norm)),
        ("post_attention_layernorm", Some(&block.post_norm)),
        ("self_attn.q_norm", block.q_norm.as_ref()),
        ("self_attn.k_norm", block.k_norm.as_ref()),
    ];
    for (name, values) in norms {
        if let Some(values) = values {
            tensors.push(StoredTensor::f32(format!("{prefix}.{name}.weight"), vec![values.len()], values));
        }
    }
    Ok((tensors, reports))
}

/// OmniQuant's part of a block: scales are folded in, clip ratios returned by the layers' names. `full` moves through the block.
#[cfg(feature = "learn")]
fn learn_block(
    block: &mut Block,
    index: usize,
    recipe: &Recipe,
    config: &ModelConfig,
    states: &[Vec<f32>],
    full: Option<&mut [Vec<f32>]>,
) -> Result<HashMap<String, Vec<f32>>> {
    let (Some(Learn::OmniQuant(settings)), Some(full)) = (&recipe.learn, full) else {
        return Ok(HashMap::new());
    };
    let before = full.to_vec();
    let mut stats = Site::ALL.map(|site| SiteStats::new(config.site_width(site), 1, 1, false));
    let mut observed = Ok(());
    run_block(block, config, KvFormat::F32, full, &mut |site, x| {
        if observed.is_ok() {
            observed = stats[site as usize].add(x, &format!("model.layers.{index} {site:?}"));
        }
    })?;
    observed?;
    learn::scales_and_clips(block, config, index, recipe, settings, (&before, states), &stats)
}

#[cfg(not(feature = "learn"))]
fn learn_block(
    _: &mut Block,
    _: usize,
    _: &Recipe,
    _: &ModelConfig,
    _: &[Vec<f32>],
    _: Option<&mut [Vec<f32>]>,
) -> Result<HashMap<String, Vec<f32>>> {
    Ok(HashMap::new())
}

/// Runs whole sequences through one block, a few at a time, each with a fresh cache. states: `[tokens, hidden]` each.
fn run_block(
    block: &Block,
    config: &ModelConfig,
    kv: KvFormat,
    states: &mut [Vec<f32>],
    observe: &mut dyn FnMut(Site, &[f32]),
) -> Result<()> {
    let hidden = config.hidden_size;
    let longest = states.iter().map(|s| s.len() / hidden).max().unwrap_or(1).max(1);
    let inv_freq = config.inv_freq();
    for batch in states.chunks_mut((BATCH_ROWS / longest).max(1)) {
        let rows: Vec<usize> = batch.iter().map(|s| s.len() / hidden).collect();
        let rope = RopeTable::new(&inv_freq, rows.iter().flat_map(|&n| 0..n));
        let mut x = batch.concat();
        let mut caches: Vec<KvCache> =
            rows.iter().map(|_| KvCache::new(kv, config.num_kv_heads, config.head_dim)).collect();
        let mut spans: Vec<Span> =
            rows.iter().zip(&mut caches).map(|(&rows, cache)| Span { rows, cache }).collect();
        block.forward(config, &rope, &mut x, &mut spans, observe)?;
        let mut rest = x.as_slice();
        for state in batch {
            let (head, tail) = rest.split_at(state.len());
            state.copy_from_slice(head);
            rest = tail;
        }
    }
    Ok(())
}

/// The 16-bit type that embeddings and unquantized weights are kept in.
#[derive(Debug, Clone, Copy, PartialEq)]
enum HalfType {
    F16,
    Bf16,
}

impl HalfType {
    /// The value that the 16 bits hold.
    fn round(self, value: f32) -> f32 {
        match self {
            HalfType::F16 => f16::from_f32(value).to_f32(),
            HalfType::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// Fails when a value is beyond the type's range.
    fn tensor(self, name: String, shape: Vec<usize>, values: &[f32]) -> Result<StoredTensor> {
        let (dtype, to): (_, fn(f32) -> [u8; 2]) = match self {
            HalfType::F16 => (safetensors::Dtype::F16, |v| f16::from_f32(v).to_le_bytes()),
            HalfType::Bf16 => (safetensors::Dtype::BF16, |v| bf16::from_f32(v).to_le_bytes()),
        };
        if let Some(i) = values.par_iter().position_first(|&v| !self.round(v).is_finite()) {
            let channel = Some(i / shape.last().copied().unwrap_or(1).max(1));
            return Err(Error::NotFinite { module: name, what: "a weight in 16 bits", channel });
        }
        let mut bytes = vec![0; 2 * values.len()];
        bytes.par_chunks_exact_mut(2).zip(values).for_each(|(b, &v)| b.copy_from_slice(&to(v)));
        Ok(StoredTensor { name, dtype, shape, bytes })
    }
}

/// Symmetric int8 codes of a row of embeddings and their scale, `max / 127`.
fn int8_row(row: &[f32]) -> (f32, Vec<i8>) {
    let max = row.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let scale = storable_scales(vec![(max / 127.0).max(f16::MIN_POSITIVE.to_f32())])[0];
    (scale, row.iter().map(|v| (v / scale).round_ties_even().clamp(-127.0, 127.0) as i8).collect())
}

/// Rounds a row of embeddings to what the checkpoint will hold.
fn round_row(row: &mut [f32], embeddings: Embeddings, half: HalfType) {
    match embeddings {
        Embeddings::Int8 => {
            let (scale, codes) = int8_row(row);
            row.iter_mut().zip(codes).for_each(|(v, c)| *v = f32::from(c) * scale);
        }
        Embeddings::Half => row.iter_mut().for_each(|v| *v = half.round(*v)),
    }
}

/// The tensors of an embedding or head called `name`, `[vocab, hidden]`: those of `from` after a change.
fn vocabulary_tensors(
    source: &Source,
    from: &str,
    name: &str,
    embeddings: Embeddings,
    half: HalfType,
    change: &dyn Fn(&mut [f32]),
) -> Result<Vec<StoredTensor>> {
    let view = source.tensor(&format!("{from}.weight"))?;
    let mut values = view.to_f32()?;
    change(&mut values);
    if embeddings == Embeddings::Half {
        return Ok(vec![half.tensor(format!("{name}.weight"), view.shape.clone(), &values)?]);
    }
    let (vocab, hidden) = (view.shape[0], view.shape[1]);
    let rows: Vec<(f32, Vec<i8>)> = values.par_chunks_exact(hidden).map(int8_row).collect();
    let (scales, codes): (Vec<f32>, Vec<Vec<i8>>) = rows.into_iter().unzip();
    let stored = specquant_model::StoredLinear {
        out: vocab,
        inp: hidden,
        bits: 8,
        group_size: hidden,
        codes: codes.concat(),
        scales,
        channel_bits: Vec::new(),
        branch: None,
        bias: None,
    };
    Ok(stored.tensors(name))
}
