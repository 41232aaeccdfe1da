//! The run: plan, calibrate, and one block after another from the source to the disk.
//!
//! Block n is calibrated on the outputs of the quantized blocks before it. Only one block's weights are in memory at a time,
//! widened to f32; a finished block is a finished shard.

use std::path::Path;

use serde::Serialize;
use serde_json::json;
use specquant_kernels::{KvCache, KvFormat, KvSide};
use specquant_model::{
    Block, FORMAT_VERSION, InputRotation, KvCenter, Linear, ModelConfig, OnlineRotations, QuantizationConfig,
    RopeTable, Site, Source, Span, StoredTensor, act_clip_tensor, basis_tensors, key_transform_tensor,
    transform_tensors,
};

use crate::block::{LayerReport, quantize_block};
use crate::fallback::{Fallback, fallbacks};
use crate::learn::{self, Learn, Learned};
use crate::output::Output;
use crate::recipe::Recipe;
use crate::transforms::rotate::{self, Orthogonal};
use crate::vocabulary::{HalfType, round_row, vocabulary_tensors};
use crate::{Error, Result, SiteStats, card, plan};

/// Rows that run through a block together.
pub(crate) const BATCH_ROWS: usize = 2048;

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
    /// Stored bits per weight over all linear layers of the blocks: codes, scales, kept directions, branches.
    pub bits_per_weight: f64,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// KL divergence from the full model before every step of the tuning, in nats a token, on one sequence each; absent without tuning.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tuning_losses: Vec<f64>,
    /// What was done other than the recipe says.
    pub fallbacks: Vec<Fallback>,
    /// Every layer, in the order of the model.
    pub layers: Vec<LayerReport>,
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
    let half_dtype = HalfType::of(source.tensor("model.embed_tokens.weight")?.dtype);

    let rotation = Rotation::new(source, recipe, texts, progress)?;
    let residual = rotation.as_ref().and_then(|r| r.residual.as_ref());
    let mut norm = source.tensor("model.norm.weight")?.to_f32()?;
    let vocabulary = |from: &str, name: &str, change: &dyn Fn(&mut [f32])| {
        vocabulary_tensors(source, from, name, recipe.embeddings, half_dtype, change)
    };
    let mut ends = vocabulary("model.embed_tokens", "model.embed_tokens", &|x| {
        residual.iter().for_each(|r| r.rotate_rows(x));
    })?;
    // A rotated head has the final norm folded in, so it is no longer the embedding.
    let tied = config.tie_word_embeddings && residual.is_none();
    if !tied {
        let from = if config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        ends.extend(vocabulary(from, "lm_head", &|x| {
            if let Some(residual) = residual {
                rotate::fold_norm(x, &norm);
                residual.rotate_rows(x);
            }
        })?);
    }
    if residual.is_some() {
        norm.fill(1.0);
    }
    ends.push(config.norm_tensor("model.norm.weight".to_owned(), &norm));
    output.write_shard(&ends)?;
    drop(ends);

    let embedding = specquant_model::Embedding::read(source)?;
    let calibrating = &texts[..texts.len().min(recipe.calibration.samples)];
    let mut states = calibrating
        .iter()
        .map(|ids| {
            let mut x = embedding.rows(ids, config.hidden_size)?;
            residual.iter().for_each(|r| r.rotate_rows(&mut x));
            x.chunks_exact_mut(config.hidden_size)
                .for_each(|row| round_row(row, recipe.embeddings, half_dtype));
            config.scale_embeddings(&mut x);
            Ok(x)
        })
        .collect::<Result<Vec<_>>>()?;
    // What full precision makes of the same texts, for methods that compare with it.
    let compares = matches!(recipe.learn, Some(Learn::OmniQuant(_) | Learn::FlatQuant(_)));
    let mut full = compares.then(|| states.clone());
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
        calibration_tokens: calibrating.iter().map(Vec::len).sum(),
        bits_per_weight: if weights > 0.0 { bits / weights } else { 16.0 },
        tensor_bytes: 0,
        tuning_losses: Vec::new(),
        fallbacks: fallbacks(recipe, &layers),
        layers,
    };
    let quantization = QuantizationConfig {
        quant_method: "specquant".to_owned(),
        format_version: FORMAT_VERSION,
        specquant_version: report.specquant_version.clone(),
        scheme: recipe.scheme,
        branch_basis: recipe.branch.as_ref().map(|b| b.basis),
        input_rotation: match recipe.learn {
            Some(Learn::FlatQuant(_)) => Some(InputRotation::Kronecker),
            _ => recipe.input.map(|input| input.rotation.into()),
        },
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
    if let Some(Learn::Tune(settings)) = &recipe.learn {
        output.write_index()?;
        let mut tell = |step, of, loss| {
            report.tuning_losses.push(loss);
            progress(Event::Learning { step, of, loss });
        };
        drop(states);
        let checkpoint = Source::open(output.path())?;
        let tensors = learn::tuned_tensors(source, &checkpoint, settings, texts, &mut tell)?;
        // Not every system lets a file be replaced that is mapped.
        drop(checkpoint);
        output.replace(tensors)?;
    }
    report.tensor_bytes = output.bytes();
    output.write("report.json", format!("{:#}\n", json!(report)).as_bytes())?;
    output.write("README.md", card::render(source, recipe, &report).as_bytes())?;
    output.finish()?;
    Ok(report)
}

/// What a recipe's rotation comes to in a model.
struct Rotation {
    residual: Option<Orthogonal>,
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
        if let Some(Learn::SpinQuant(settings)) = &recipe.learn {
            // R2 alone rotates the heads: nothing across them (SpinQuant, section 3).
            let online = OnlineRotations { heads: None, ..online };
            let mut tell = |step, of, loss| progress(Event::Learning { step, of, loss });
            let (residual, heads) = learn::rotations(source, recipe, settings, &online, texts, &mut tell)?;
            return Ok(Some(Rotation { residual: Some(residual), heads, online }));
        }
        Ok(Some(Rotation {
            residual: rotate
                .residual
                .then(|| Orthogonal::random(rotate.kind, config.hidden_size, recipe.seed)),
            heads: vec![Orthogonal::plain(rotate.kind, config.head_dim)],
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
        rotate::rotate_block(&mut block, config, r.residual.as_ref(), r.head(index), &r.online);
    }
    let mut reports = Vec::new();
    let mut tensors = Vec::new();
    if recipe.scheme.weight_bits < 16 {
        let learned = match (&recipe.learn, full) {
            (Some(Learn::OmniQuant(settings)), Some(full)) => {
                learn::scales_and_clips(&mut block, config, index, recipe, settings, full, states)?
            }
            (Some(Learn::FlatQuant(settings)), Some(full)) => {
                learn::transforms(&mut block, config, index, recipe, settings, full)?
            }
            _ => Learned::default(),
        };
        // Statistics come from the full-precision block on the quantized blocks' outputs; the states themselves stay.
        let sampled = recipe.calibration.search_tokens;
        let (mut stats, center) =
            observe(&block, config, index, &mut states.to_vec(), sampled, recipe.needs_hessian())?;
        block.kv_center = recipe.kv_center.then_some(center);
        let done = quantize_block(&mut block, &prefix, &mut stats, &learned, recipe, config)?;
        for (report, stored) in done.layers {
            tensors.extend(stored.tensors(&report.name));
            reports.push(report);
        }
        for (site, basis) in Site::ALL.into_iter().zip(done.bases) {
            tensors.extend(basis.iter().flat_map(|b| basis_tensors(b, &prefix, site)));
        }
        for (site, clip) in Site::ALL.into_iter().zip(done.act_clips) {
            tensors.extend(clip.map(|clip| act_clip_tensor(clip, &prefix, site)));
        }
        for (site, input) in Site::ALL.into_iter().zip(&block.inputs) {
            tensors.extend(input.iter().flat_map(|input| transform_tensors(input, &prefix, site)));
        }
        tensors.extend(block.rotations.keys.iter().map(|keys| key_transform_tensor(keys, &prefix)));
    } else {
        let names = block.linears().map(|(name, _)| name);
        for (name, linear) in names.into_iter().zip(block.linears_mut()) {
            let shape = vec![linear.out_features(), linear.in_features()];
            if let Some((w, bias)) = linear.dense_mut() {
                tensors.push(half.tensor(format!("{prefix}.{name}.weight"), shape, w)?);
                w.iter_mut().for_each(|v| *v = half.round(*v));
                if let Some(bias) = bias {
                    tensors.push(StoredTensor::f32(format!("{prefix}.{name}.bias"), vec![bias.len()], bias));
                }
            }
        }
    }
    run_block(&block, config, recipe.scheme.kv_format(), states, &mut |_, _| (), &mut |_| ())?;
    if let Some(KvCenter { keys, values }) = &block.kv_center {
        for (name, center) in [("k_center", keys), ("v_center", values)] {
            tensors.push(StoredTensor::f32(format!("{prefix}.self_attn.{name}"), vec![center.len()], center));
        }
    }
    for ((name, _), values) in config.norm_shapes().into_iter().zip(block.norms()) {
        tensors.push(config.norm_tensor(format!("{prefix}.{name}.weight"), values));
    }
    Ok((tensors, reports))
}

/// Moves whole sequences through block `index` in full precision, and returns what its inputs were like, and its mean key and value. states: `[tokens, hidden]` each;
/// sampled: tokens to keep.
///
/// # Errors
/// When an input is not finite.
pub fn observe(
    block: &Block,
    config: &ModelConfig,
    index: usize,
    states: &mut [Vec<f32>],
    sampled: usize,
    with_hessian: bool,
) -> Result<([SiteStats; 4], KvCenter)> {
    let rows = states.iter().map(|s| s.len() / config.hidden_size).sum();
    let mut stats =
        Site::ALL.map(|site| SiteStats::new(config.site_width(site), rows, sampled, with_hessian));
    let mut observed = Ok(());
    let mut observe = |site, x: &[f32]| {
        if observed.is_ok() {
            observed = stats[site as usize].add(x, &format!("model.layers.{index} {site:?}"));
        }
    };
    let width = config.num_kv_heads * config.head_dim;
    let (mut keys, mut values) = (vec![0.0f64; width], vec![0.0f64; width]);
    run_block(block, config, KvFormat::F32, states, &mut observe, &mut |cache| {
        for (side, sums) in [(KvSide::Keys, &mut keys), (KvSide::Values, &mut values)] {
            for (head, sums) in sums.chunks_exact_mut(config.head_dim).enumerate() {
                let mut buffer = Vec::new();
                for row in cache.tile(side, head, 0..cache.len(), &mut buffer).chunks_exact(config.head_dim) {
                    sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(*v));
                }
            }
        }
    })?;
    observed?;
    let mean = |sums: Vec<f64>| sums.into_iter().map(|sum| (sum / rows.max(1) as f64) as f32).collect();
    Ok((stats, KvCenter { keys: mean(keys), values: mean(values) }))
}

/// Runs whole sequences through one block, a few at a time, each with a fresh cache, which `finished` sees at the end. states: `[tokens, hidden]`
/// each.
fn run_block(
    block: &Block,
    config: &ModelConfig,
    kv: KvFormat,
    states: &mut [Vec<f32>],
    observe: &mut dyn FnMut(Site, &[f32]),
    finished: &mut dyn FnMut(&KvCache),
) -> Result<()> {
    let hidden = config.hidden_size;
    let longest = states.iter().map(|s| s.len() / hidden).max().unwrap_or(1).max(1);
    let inv_freq = config.inv_freq(block.window.is_some());
    for batch in states.chunks_mut((BATCH_ROWS / longest).max(1)) {
        let rows: Vec<usize> = batch.iter().map(|s| s.len() / hidden).collect();
        let rope = RopeTable::new(&inv_freq, rows.iter().flat_map(|&n| 0..n));
        let mut x = batch.concat();
        let mut caches: Vec<KvCache> =
            rows.iter().map(|_| KvCache::new(kv, config.num_kv_heads, config.head_dim)).collect();
        let mut spans: Vec<Span> =
            rows.iter().zip(&mut caches).map(|(&rows, cache)| Span { rows, cache }).collect();
        block.forward(config, &rope, &mut x, &mut spans, observe)?;
        caches.iter().for_each(&mut *finished);
        let mut rest = x.as_slice();
        for state in batch {
            let (head, tail) = rest.split_at(state.len());
            state.copy_from_slice(head);
            rest = tail;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TINY, dense_block, forward, ids, relative, tiny};

    /// GQA, norms on q and k and a sliding window all meet a center here.
    #[test]
    fn a_center_of_keys_and_values_changes_nothing() {
        for name in TINY {
            let source = tiny(name);
            let config = source.config();
            let embedding = specquant_model::Embedding::read(&source).unwrap();
            let mut plain = embedding.lookup(&ids(config), config).unwrap();
            let (mut block, mut centered) = (dense_block(&source, 0), plain.clone());
            let (_, center) = observe(&block, config, 0, &mut [plain.clone()], 1, false).unwrap();
            assert!(center.keys.iter().chain(&center.values).any(|v| v.abs() > 1e-4), "{name}");
            forward(&block, config, &mut plain, &mut |_, _| ());
            block.kv_center = Some(center);
            forward(&block, config, &mut centered, &mut |_, _| ());
            let difference = relative(&centered, &plain);
            assert!(difference < 1e-5, "{name}: {difference}");
        }
    }
}
