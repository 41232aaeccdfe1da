//! The run: plan, calibrate, and one block after another from the source to the disk.
//!
//! Block n is calibrated on the outputs of the quantized blocks before it. Only one block's weights are in memory at a time,
//! widened to f32; a finished block is a finished shard. Behind each the run can be continued.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;
use specquant_model::{
    FORMAT_VERSION, InputRotation, Model, OnlineRotations, QuantizationConfig, Source, StoredTensor, sha256,
};

use crate::block::LayerReport;
use crate::fallback::{self, Fallback, fallbacks};
use crate::learn::{self, Learn, TuneConfig};
use crate::output::{self, Destination, Output};
use crate::pipeline::{Rotation, one_block};
use crate::progress::{Progress, identity, read_numbers, write_numbers};
use crate::recipe::Recipe;
use crate::states::States;
use crate::transforms::rotate;
use crate::vocabulary::{HalfType, round_row, vocabulary_tensors};
use crate::{Error, Result, calibration, card, plan};

/// Progress of a run.
pub enum Event<'a> {
    /// An earlier run has done this much.
    Resumed {
        /// Finished blocks.
        blocks: usize,
        /// Steps of tuning.
        steps: usize,
    },
    /// The model writes text to calibrate on.
    Writing {
        /// Tokens that are written.
        done: usize,
        /// Tokens to write.
        of: usize,
    },
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tuning_losses: Vec<f64>,
    /// What was done other than the recipe says.
    pub fallbacks: Vec<Fallback>,
    /// Every layer, in the order of the model.
    pub layers: Vec<LayerReport>,
}

impl Report {
    /// Of a finished checkpoint.
    fn read(checkpoint: &Path) -> Result<Report> {
        let path = checkpoint.join("report.json");
        let fail = |why: String| Error::Output { path: path.clone(), why: format!("cannot be read: {why}") };
        let bytes = std::fs::read(&path).map_err(|e| fail(e.to_string()))?;
        serde_json::from_slice(&bytes).map_err(|e| fail(e.to_string()))
    }
}

/// Of the program.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Time that goes into saving the state of tuning, as a share of all.
const SAVING: f64 = 0.05;

/// Quantizes the model of `source` into `destination`.
///
/// texts: calibration sequences of token ids, see [`crate::calibration`]; `None` for text that the model writes itself.
///
/// Every finished block is on disk, beside what the next one needs: a run that stops at any moment, be it killed, can be continued with
/// [`Unfinished::Resume`](crate::Unfinished), and comes to the same bytes.
///
/// # Errors
/// Everything that [`Error`] lists. Nothing is left then, except where another run can continue: [`Error::Unfinished`].
pub fn run(
    source: &Source,
    recipe: &Recipe,
    texts: Option<&[Vec<u32>]>,
    destination: &Destination,
    progress: &mut dyn FnMut(Event),
) -> Result<Report> {
    let texts = check(source, recipe, texts)?;
    // Now, and not in the block that it is in.
    source.check_finite()?;
    let identity = identity(source, recipe, texts.map(|texts| sha256(json!(texts).to_string().as_bytes())))?;
    if output::finished(destination, &identity)? {
        return Report::read(&destination.path);
    }
    let of = source.config().num_layers;
    let mut output = Output::open(destination, identity, of + 1)?;
    let (blocks, steps) = (output.progress.blocks(), output.progress.losses.len());
    if blocks + steps > 0 {
        progress(Event::Resumed { blocks, steps });
    }
    let partial = output.path().to_owned();
    let result = match work(source, recipe, texts, &mut output, progress) {
        Ok(report) => output.finish().map(|()| report),
        Err(cause) => {
            if !cause.may_pass() {
                output.discard();
            }
            Err(cause)
        }
    };
    result.map_err(|cause| match Progress::read(&partial) {
        Ok(Some(kept)) => Error::Unfinished { cause: Box::new(cause), partial, blocks: kept.blocks(), of },
        _ => cause,
    })
}

/// The calibration sequences, if they and the recipe fit the model.
pub(crate) fn check<'a>(
    source: &Source,
    recipe: &Recipe,
    texts: Option<&'a [Vec<u32>]>,
) -> Result<Option<&'a [Vec<u32>]>> {
    plan(source, recipe)?;
    let keeps_weights = recipe.scheme.weight_bits == 16;
    if !keeps_weights && texts.is_some_and(|texts| texts.iter().all(Vec::is_empty)) {
        return Err(Error::Recipe(
            "calibration: no tokens were given; give at least one sequence".to_owned(),
        ));
    }
    Ok(if keeps_weights { Some(&[]) } else { texts })
}

/// What all blocks need.
pub(crate) struct Begun {
    /// All calibration sequences.
    pub texts: Vec<Vec<u32>>,
    /// The first so many are what blocks are calibrated on.
    calibrating: usize,
    rotation: Option<Rotation>,
    /// Whether the checkpoint's head is its embedding.
    tied: bool,
    half: HalfType,
}

/// What is done before the first block, except where an earlier run has done it.
pub(crate) fn begin(
    source: &Source,
    recipe: &Recipe,
    texts: Option<&[Vec<u32>]>,
    output: &mut Output,
    progress: &mut dyn FnMut(Event),
) -> Result<Begun> {
    let texts = match texts {
        Some(texts) => texts.to_vec(),
        None => written_text(source, recipe, output, progress)?,
    };
    let half = HalfType::of(source.tensor("model.embed_tokens.weight")?.dtype);
    let rotation = Rotation::new(source, recipe, &texts, output, progress)?;
    // A rotated head has the final norm folded in, so it is no longer the embedding.
    let tied = source.config().tie_word_embeddings && rotation.as_ref().is_none_or(|r| r.residual.is_none());
    if output.progress.shards.is_empty() {
        output.write_shard(&ends(source, recipe, rotation.as_ref(), tied, half)?)?;
        output.commit()?;
        source.release();
    }
    let calibrating = texts.len().min(recipe.calibration.samples);
    Ok(Begun { texts, calibrating, rotation, tied, half })
}

/// What [`run`] does, from where an earlier run has stopped.
fn work(
    source: &Source,
    recipe: &Recipe,
    texts: Option<&[Vec<u32>]>,
    output: &mut Output,
    progress: &mut dyn FnMut(Event),
) -> Result<Report> {
    let begun = begin(source, recipe, texts, output, progress)?;
    blocks(source, recipe, &begun, source.config().num_layers, output, progress)?;

    let layers = output.progress.layers.clone();
    let weights: f64 = layers.iter().map(|l| (l.shape[0] * l.shape[1]) as f64).sum();
    let bits: f64 = layers.iter().map(|l| l.bits_per_weight * (l.shape[0] * l.shape[1]) as f64).sum();
    let whole = fallback::rotations(recipe, source.config()).into_iter();
    let short = fallback::short_text(recipe, &begun.texts);
    let mut report = Report {
        specquant_version: VERSION.to_owned(),
        scheme: recipe.scheme.to_string(),
        calibration_tokens: begun.texts[..begun.calibrating].iter().map(Vec::len).sum(),
        bits_per_weight: if weights > 0.0 { bits / weights } else { 16.0 },
        tensor_bytes: 0,
        tuning_losses: Vec::new(),
        fallbacks: whole.chain(short).chain(fallbacks(recipe, &layers)).collect(),
        layers,
    };
    for (name, bytes) in source.side_files()? {
        output.write(&name, &bytes)?;
    }
    write_config(source, recipe, &begun, output)?;
    if let Some(Learn::Tune(settings)) = &recipe.learn {
        tune(source, settings, &begun.texts, output, progress)?;
        report.tuning_losses.clone_from(&output.progress.losses);
    }
    report.tensor_bytes = output.bytes();
    output.write("report.json", format!("{:#}\n", json!(report)).as_bytes())?;
    output.write("README.md", card::render(source, recipe, &report).as_bytes())?;
    Ok(report)
}

/// config.json: the source's, and what was done.
pub(crate) fn write_config(
    source: &Source,
    recipe: &Recipe,
    begun: &Begun,
    output: &mut Output,
) -> Result<()> {
    let quantization = QuantizationConfig {
        quant_method: "specquant".to_owned(),
        format_version: FORMAT_VERSION,
        specquant_version: VERSION.to_owned(),
        scheme: recipe.scheme,
        branch_basis: recipe.branch.as_ref().map(|b| b.basis),
        input_rotation: match recipe.learn {
            Some(Learn::FlatQuant(_)) => Some(InputRotation::Kronecker),
            _ => recipe.input.map(|input| input.rotation.into()),
        },
        online_rotations: begun.rotation.as_ref().map_or_else(OnlineRotations::default, |r| r.online),
        recipe: json!(recipe),
    };
    let mut config_json = source.config_json().clone();
    config_json["quantization_config"] = json!(quantization);
    config_json["tie_word_embeddings"] = json!(begun.tied);
    output.write("config.json", format!("{config_json:#}\n").as_bytes())
}

/// The text that the model writes, or has written.
fn written_text(
    source: &Source,
    recipe: &Recipe,
    output: &mut Output,
    progress: &mut dyn FnMut(Event),
) -> Result<Vec<Vec<u32>>> {
    const KEPT: &str = "text";
    if let Some(bytes) = output.kept(KEPT)? {
        return serde_json::from_slice(&bytes)
            .map_err(|e| Error::Output { path: output.path().to_owned(), why: e.to_string() });
    }
    let text = recipe.text();
    let of = text.samples * text.sequence_length;
    let (model, bos) = (Model::load_for_decoding(source)?, source.tokenizer()?.first_id());
    let tell = &mut |done| progress(Event::Writing { done, of });
    let written = calibration::self_generated(model, bos, &text, recipe.seed, tell)?;
    source.release();
    output.keep(KEPT, |to| Ok(serde_json::to_writer(to, &written)?))?;
    output.commit()?;
    Ok(written)
}

/// Embeddings, final norm and head.
fn ends(
    source: &Source,
    recipe: &Recipe,
    rotation: Option<&Rotation>,
    tied: bool,
    half_dtype: HalfType,
) -> Result<Vec<StoredTensor>> {
    let config = source.config();
    let residual = rotation.and_then(|r| r.residual.as_ref());
    let mut norm = source.tensor("model.norm.weight")?.to_f32()?;
    let vocabulary = |from: &str, name: &str, change: &dyn Fn(&mut [f32])| {
        vocabulary_tensors(source, from, name, recipe.embeddings, half_dtype, change)
    };
    let mut ends = vocabulary("model.embed_tokens", "model.embed_tokens", &|x| {
        residual.iter().for_each(|r| r.rotate_rows(x));
    })?;
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
    Ok(ends)
}

/// Every block up to `until` that is not finished yet, and with each the hidden states behind it.
pub(crate) fn blocks(
    source: &Source,
    recipe: &Recipe,
    begun: &Begun,
    until: usize,
    output: &mut Output,
    progress: &mut dyn FnMut(Event),
) -> Result<()> {
    const KEPT: &str = "states";
    let (config, of) = (source.config(), source.config().num_layers);
    let done = output.progress.blocks();
    if done >= until {
        return Ok(());
    }
    let (texts, rotation) = (&begun.texts[..begun.calibrating], begun.rotation.as_ref());
    // What full precision makes of the same texts, for methods that compare with it, is kept behind the states.
    let compares = matches!(recipe.learn, Some(Learn::OmniQuant(_) | Learn::FlatQuant(_)));
    let spill = output.spill();
    let mut states = States::new(texts.iter().map(|ids| ids.len() * config.hidden_size), spill.as_deref())?;
    let mut full;
    if let Some(bytes) = output.kept(KEPT)? {
        full = compares.then(|| states.copy()).transpose()?;
        let mut rest = bytes.as_chunks::<4>().0;
        for values in [Some(&mut states), full.as_mut()].into_iter().flatten().map(States::values_mut) {
            let Some((numbers, after)) = rest.split_at_checked(values.len()) else {
                let why = "the hidden states are not those of this text; start anew with --overwrite";
                return Err(Error::Output { path: output.path().to_owned(), why: why.to_owned() });
            };
            values.iter_mut().zip(numbers).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
            rest = after;
        }
    } else {
        let embedding = specquant_model::Embedding::read(source)?;
        for (i, ids) in texts.iter().enumerate() {
            let mut x = embedding.rows(ids, config.hidden_size)?;
            rotation.and_then(|r| r.residual.as_ref()).iter().for_each(|r| r.rotate_rows(&mut x));
            x.chunks_exact_mut(config.hidden_size)
                .for_each(|row| round_row(row, recipe.embeddings, begun.half));
            config.scale_embeddings(&mut x);
            let range = states.range(i);
            states.values_mut()[range].copy_from_slice(&x);
        }
        source.release();
        full = compares.then(|| states.copy()).transpose()?;
    }
    for index in done..until {
        let (tensors, layers) =
            one_block(source, index, recipe, rotation, &mut states, full.as_mut(), begun.half)?;
        output.write_shard(&tensors)?;
        drop(tensors);
        source.release();
        if index + 1 < of {
            output.keep(KEPT, |to| {
                let all = [Some(&states), full.as_ref()].into_iter().flatten();
                all.into_iter().try_for_each(|states| write_numbers(to, states.values(), f32::to_le_bytes))
            })?;
        } else {
            output.progress.kept.remove(KEPT);
        }
        output.progress.layers.extend_from_slice(&layers);
        output.commit()?;
        progress(Event::Block { index, of, layers: &layers });
    }
    Ok(())
}

/// Tunes the whole checkpoint, from where an earlier run has stopped.
fn tune(
    source: &Source,
    settings: &TuneConfig,
    texts: &[Vec<u32>],
    output: &mut Output,
    progress: &mut dyn FnMut(Event),
) -> Result<()> {
    const KEPT: &str = "tuning";
    const TUNED: &str = "tuned";
    output.write_index()?;
    let tensors = match output.kept(TUNED)? {
        Some(bytes) => {
            output::tensors(&bytes).map_err(|e| Error::Output { path: output.path().to_owned(), why: e })?
        }
        None => {
            let state = output.kept(KEPT)?.map(|bytes| read_numbers(&bytes, f64::from_le_bytes));
            let begun = state.map(|state| (output.progress.losses.len(), state));
            let checkpoint = Source::open(output.path())?;
            let (mut losses, mut saved, mut cost) =
                (output.progress.losses.clone(), Instant::now(), Duration::ZERO);
            let mut step = |taken: learn::Step| {
                for &loss in taken.losses {
                    progress(Event::Learning { step: losses.len(), of: learn::steps(settings), loss });
                    losses.push(loss);
                }
                if saved.elapsed().mul_f64(SAVING) >= cost {
                    let started = Instant::now();
                    let state = (taken.state)();
                    output.keep(KEPT, |to| write_numbers(to, &state, f64::to_le_bytes))?;
                    output.progress.losses.clone_from(&losses);
                    output.commit()?;
                    (saved, cost) = (Instant::now(), started.elapsed());
                }
                Ok(())
            };
            let tensors = learn::tuned_tensors(source, &checkpoint, settings, texts, begun, &mut step)?;
            // Not every system lets a file be replaced that is mapped.
            drop(checkpoint);
            let bytes = output.serialized(TUNED, &tensors)?;
            output.keep(TUNED, |to| to.write_all(&bytes))?;
            output.progress.kept.remove(KEPT);
            output.progress.losses = losses;
            output.commit()?;
            tensors
        }
    };
    output.replace(tensors)
}

#[cfg(test)]
mod tests;
