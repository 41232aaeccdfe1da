//! Parts of a recipe that are learned by gradients, in specquant-learn: the bridge between its plain vectors and the pipeline. Without the
//! feature `learn` such recipes parse, so that they can be named, and are refused.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use specquant_model::{InputTransform, RotationKind};

use crate::recipe::Recipe;
use crate::{Error, Result};

#[cfg(feature = "learn")]
pub use specquant_learn::{FlatQuantConfig, OmniQuantConfig, SpinQuantConfig, TuneConfig};

/// Settings, without the code that could use them.
#[cfg(not(feature = "learn"))]
pub type FlatQuantConfig = serde_json::Map<String, serde_json::Value>;
/// Settings, without the code that could use them.
#[cfg(not(feature = "learn"))]
pub type OmniQuantConfig = serde_json::Map<String, serde_json::Value>;
/// Settings, without the code that could use them.
#[cfg(not(feature = "learn"))]
pub type SpinQuantConfig = serde_json::Map<String, serde_json::Value>;
/// Settings, without the code that could use them.
#[cfg(not(feature = "learn"))]
pub type TuneConfig = serde_json::Map<String, serde_json::Value>;

/// What is learned, and how. Bits and clip ratios in the settings are replaced by those of the scheme.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase")]
pub enum Learn {
    /// Scales and clip ratios, block by block.
    OmniQuant(OmniQuantConfig),
    /// Transforms of inputs and heads and clip ratios, block by block.
    FlatQuant(FlatQuantConfig),
    /// Rotations of the residual stream and of the heads of v, on the whole model.
    SpinQuant(SpinQuantConfig),
    /// What is stored beside the codes, on the predictions of the whole model, after everything else.
    Tune(TuneConfig),
}

/// What was learned of a block before it is quantized.
#[derive(Default)]
pub struct Learned {
    /// Clip ratios of weights by the layer's full name, `[out]`; they take the place of the recipe's search.
    pub clips: HashMap<String, Vec<f32>>,
    /// Transforms of inputs, in the order of [`Site::ALL`](specquant_model::Site::ALL), which keep nothing.
    pub inputs: [Option<InputTransform>; 4],
    /// Clip ratios of those inputs.
    pub act_clips: [Option<f32>; 4],
}

/// Some steps of tuning.
pub(crate) struct Step<'a> {
    /// The loss before each.
    pub losses: &'a [f64],
    /// All that the next steps depend on.
    pub state: &'a dyn Fn() -> Vec<f64>,
}

const NOT_BUILT: &str =
    "this build cannot learn; build it with the feature learn (cargo build --release --features learn)";

impl Learn {
    /// Calibration sequences that it can use.
    pub(crate) fn sequences(&self) -> usize {
        match self {
            Learn::Tune(config) => steps(config),
            Learn::OmniQuant(_) | Learn::FlatQuant(_) | Learn::SpinQuant(_) => 0,
        }
    }

    /// Whether the rest of the recipe leaves a place for what is learned.
    pub(crate) fn validate(&self, recipe: &Recipe) -> Result<()> {
        let refuse = |why: &str| Err(Error::Recipe(format!("learn: {why}")));
        if cfg!(not(feature = "learn")) {
            return refuse(NOT_BUILT);
        }
        #[cfg(feature = "learn")]
        match self {
            Learn::Tune(config) => config.validate().or_else(|e| refuse(&e.to_string()))?,
            Learn::FlatQuant(config) => config.validate().or_else(|e| refuse(&e.to_string()))?,
            _ => (),
        }
        match self {
            Learn::SpinQuant(_)
                if recipe.rotate.is_none_or(|r| !r.residual || r.kind != RotationKind::Hadamard) =>
            {
                refuse("spinquant learns rotations: add [rotate] kind = \"hadamard\", with residual = true")
            }
            Learn::OmniQuant(_)
                if [
                    recipe.rotate.is_some(),
                    recipe.smooth.is_some(),
                    recipe.branch.is_some(),
                    recipe.input.is_some(),
                    recipe.kv_center,
                ]
                .contains(&true) =>
            {
                refuse(
                    "omniquant learns the scales and clips of the weight as a whole: it goes with neither rotate nor smooth, branch, input or kv_center",
                )
            }
            Learn::FlatQuant(_)
                if [
                    recipe.rotate.is_some(),
                    recipe.smooth.is_some(),
                    recipe.branch.is_some(),
                    recipe.input.is_some(),
                    recipe.kv_center,
                ]
                .contains(&true) =>
            {
                refuse(
                    "flatquant learns what every input and every head goes through: it goes with neither rotate nor smooth, branch, input or kv_center",
                )
            }
            Learn::FlatQuant(_) if recipe.search_act_clip || recipe.scheme.act_clip != 1.0 => refuse(
                "flatquant learns the clip ratios of activations: leave out search_act_clip, and scheme.act_clip (--act-clip)",
            ),
            Learn::FlatQuant(_) if recipe.scheme.group_size != 0 => refuse(
                "flatquant learns one clip ratio per output channel: set scheme.group_size = 0 (--group-size 0)",
            ),
            Learn::Tune(_) if recipe.branch.is_some() => refuse(
                "tune knows no branch: leave one of them out, or take a recipe that learns nothing, such as spectral",
            ),
            Learn::Tune(_) if recipe.rotate.is_some_and(|r| r.residual) => refuse(
                "tune knows no rotation of the residual stream: set rotate.residual = false, or leave learn out",
            ),
            Learn::OmniQuant(_) if recipe.scheme.group_size != 0 => refuse(
                "omniquant learns one clip ratio per output channel: set scheme.group_size = 0 (--group-size 0)",
            ),
            _ if recipe.scheme.weight_bits == 16 => refuse(
                "there is nothing to learn for weights of 16 bits: take a recipe that learns nothing, such as spectral",
            ),
            _ => Ok(()),
        }
    }
}

#[cfg(feature = "learn")]
mod run {
    use std::collections::HashMap;
    use std::time::{Duration, Instant};

    use specquant_kernels::Hadamard;
    use specquant_learn::{BlockWeights, Start, Tuning, flatquant, omniquant, spinquant};
    use specquant_model::{
        Block, ModelConfig, OnlineRotations, QuantizationConfig, RotationKind, Site, Source, StoredLinear,
        StoredTensor, storable_scales,
    };

    use super::{FlatQuantConfig, Learned, OmniQuantConfig, SpinQuantConfig, Step, TuneConfig};
    use crate::block::{apply_scales, round_kept};
    use crate::pipeline::observe;
    use crate::recipe::{Recipe, Rounding};
    use crate::transforms::flat;
    use crate::transforms::rotate::Orthogonal;
    use crate::{Result, States};

    /// Steps of a trial at most: more than the teacher reads at once, twice.
    const TRIAL_STEPS: usize = 5000;
    /// Times that are compared at most.
    const TRIALS: usize = 16;
    /// Time that is measured of a trial, and a little more.
    const TRIAL: Duration = Duration::from_secs(6);

    /// The learned rotations: of the residual stream, `[hidden, hidden]`, and of the heads of v of every layer, `[head_dim, head_dim]`.
    /// `progress` is told step, number of steps and loss.
    pub fn rotations(
        source: &Source,
        recipe: &Recipe,
        config: &SpinQuantConfig,
        online: &OnlineRotations,
        texts: &[Vec<u32>],
        progress: &mut dyn FnMut(usize, usize, f64),
    ) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
        let model = source.config();
        let (hidden, head_dim) = (model.hidden_size, model.head_dim);
        let scheme = &recipe.scheme;
        let config = SpinQuantConfig {
            seed: recipe.seed,
            // GPTQ is to follow: then weights are left alone (SpinQuant's README, "Note").
            weight_bits: if matches!(recipe.rounding, Rounding::Gptq(_)) { 16 } else { scheme.weight_bits },
            act_bits: scheme.act_bits,
            kv_bits: scheme.kv_bits,
            act_clip: scheme.act_clip,
            kv_clip: scheme.kv_clip(),
            ..config.clone()
        };
        let random = |n, stream: usize| {
            Orthogonal::random(RotationKind::Hadamard, n, recipe.seed.wrapping_add(stream as u64)).matrix()
        };
        let start = Start {
            r1: random(hidden, 0),
            r2: (0..model.num_layers).map(|layer| random(head_dim, 1 + layer)).collect(),
            r3: online.qk.map(|_| Hadamard::new(head_dim).matrix()),
            r4: online.down.map(|_| Hadamard::new(Hadamard::new(model.intermediate_size).block()).matrix()),
        };
        let mut tell = |step, loss| progress(step, config.steps, loss);
        let learned = spinquant(source, texts, &config, start, &mut tell)?;
        Ok((learned.r1, learned.r2))
    }

    /// A block with owned dense weights, as learning takes it.
    fn block_weights(block: &Block) -> BlockWeights<'_> {
        BlockWeights {
            input_norm: &block.input_norm,
            mlp_norm: &block.mlp_norm,
            out_norms: block.out_norms.as_ref().map(|norms| norms.each_ref().map(Vec::as_slice)),
            q_norm: block.q_norm.as_deref(),
            k_norm: block.k_norm.as_deref(),
            linears: block.linears().map(|(_, linear)| linear.dense().unwrap_or((&[], None))),
        }
    }

    /// Clip ratios by the layers' full names.
    fn named(block: &Block, index: usize, clips: [Vec<f32>; 7]) -> HashMap<String, Vec<f32>> {
        let names = block.linears().map(|(name, _)| format!("model.layers.{index}.{name}"));
        names.into_iter().zip(clips).collect()
    }

    /// Learns the scales of a block with owned dense weights, applies them, and returns the clip ratios.
    ///
    /// full, states: the residual stream before the block, in full precision and as the quantized blocks bring it; `full` moves through
    /// the block.
    pub fn scales_and_clips(
        block: &mut Block,
        model: &ModelConfig,
        index: usize,
        recipe: &Recipe,
        config: &OmniQuantConfig,
        full: &mut States,
        states: &States,
    ) -> Result<Learned> {
        let before = full.copy()?;
        let (full_stats, _) = observe(block, model, index, full, true, 1, false)?;
        let scheme = &recipe.scheme;
        let config = OmniQuantConfig {
            weight_bits: scheme.weight_bits,
            act_bits: scheme.act_bits,
            kv_bits: scheme.kv_bits,
            act_clip: scheme.act_clip,
            kv_clip: scheme.kv_clip(),
            ..config.clone()
        };
        let maxima = [Site::Qkv, Site::O, Site::GateUp].map(|site| full_stats[site as usize].max.as_slice());
        let weights = block_weights(block);
        let learned = omniquant(
            &weights,
            model,
            index,
            &before.sequences(),
            &states.sequences(),
            maxima,
            &config,
            &mut |_, _| (),
        )?;
        for (site, scales) in Site::ALL.into_iter().zip(&learned.scales) {
            if let Some(scales) = scales {
                apply_scales(block, site, scales, model);
            }
        }
        Ok(Learned { clips: named(block, index, learned.clip), ..Learned::default() })
    }

    /// Learns the transforms of a block with owned dense weights, applies those that fold into its weights and norms, and returns the others with the
    /// clip ratios; the transform of keys becomes the block's.
    ///
    /// full: the residual stream before the block in full precision; it moves through the block.
    pub fn transforms(
        block: &mut Block,
        model: &ModelConfig,
        index: usize,
        recipe: &Recipe,
        config: &FlatQuantConfig,
        full: &mut States,
    ) -> Result<Learned> {
        let before = full.copy()?;
        let (stats, _) = observe(block, model, index, full, true, 1, false)?;
        let scheme = &recipe.scheme;
        let config = FlatQuantConfig {
            seed: recipe.seed,
            weight_bits: scheme.weight_bits,
            act_bits: scheme.act_bits,
            kv_bits: scheme.kv_bits,
            kv_clip: scheme.kv_clip(),
            ..config.clone()
        };
        let maxima = stats.each_ref().map(|stats| stats.max.as_slice());
        let flat = flatquant(
            &block_weights(block),
            model,
            index,
            &before.sequences(),
            maxima,
            &config,
            &mut |_, _| (),
        )?;
        let clips = named(block, index, flat.weight_clip.clone());
        let act_clips = flat.act_clip.map_or([None; 4], |clips| clips.map(Some));
        let inputs = flat::apply(block, model, index, flat)?;
        Ok(Learned { clips, inputs: inputs.map(Some), act_clips })
    }

    /// Seconds of a step of tuning `checkpoint`, of which a few are taken: after the first, which fill buffers, the best of those that the teacher reads for at
    /// once, for the difference of two such times is to be multiplied.
    pub fn step_seconds(
        source: &Source,
        checkpoint: &Source,
        config: &TuneConfig,
        texts: &[Vec<u32>],
    ) -> Result<f64> {
        let config = TuneConfig { steps: TRIAL_STEPS, ..config.clone() };
        let mut tuning = Tuning::new(source, checkpoint, texts, &config)?;
        tuning.advance(&mut |_, _| ())?;
        let (trial, mut least) = (Instant::now(), f64::INFINITY);
        for _ in 0..TRIALS {
            let (started, mut steps) = (Instant::now(), 0);
            let more = tuning.advance(&mut |_, _| steps += 1)?;
            least = least.min(started.elapsed().as_secs_f64() / f64::from(steps.max(1)));
            if !more || trial.elapsed() >= TRIAL {
                break;
            }
        }
        Ok(least)
    }

    /// Tunes the quantized `checkpoint` on what `source` predicts, and returns the tensors that have changed.
    ///
    /// begun: steps that have been taken, and what `save` was given behind them.
    /// progress: told what happens; it may save the state, by which the tuning can be continued.
    pub fn tuned_tensors(
        source: &Source,
        checkpoint: &Source,
        config: &TuneConfig,
        texts: &[Vec<u32>],
        begun: Option<(usize, Vec<f64>)>,
        progress: &mut dyn FnMut(Step) -> Result<()>,
    ) -> Result<Vec<StoredTensor>> {
        let mut tuning = Tuning::new(source, checkpoint, texts, config)?;
        if let Some((step, state)) = begun {
            tuning.restore(step, &state)?;
        }
        loop {
            let mut losses = Vec::new();
            let more = tuning.advance(&mut |_, loss| losses.push(loss))?;
            progress(Step { losses: &losses, state: &|| tuning.state() })?;
            if !more {
                break;
            }
        }
        let tuned = tuning.finish()?;
        let model = checkpoint.config();
        let quantization = QuantizationConfig::from_config(checkpoint.config_json(), checkpoint.path())?;
        let scheme = quantization.map(|q| q.scheme).ok_or(specquant_learn::Error::NotQuantized)?;
        let mut tensors = vec![model.norm_tensor("model.norm.weight".to_owned(), &tuned.norm)];
        for (index, block) in tuned.blocks.iter().enumerate() {
            for ((name, _), norm) in model.norm_shapes().into_iter().zip(&block.norms) {
                tensors.push(model.norm_tensor(format!("model.layers.{index}.{name}.weight"), norm));
            }
            let learned = block.factors.iter().zip(&block.kept);
            for ((name, [out, inp]), (factors, kept)) in model.linear_shapes(index).into_iter().zip(learned) {
                let r = kept.len() / out;
                let mut stored = StoredLinear::read(checkpoint, &name, [out, inp], r, &scheme, None)?;
                let groups = stored.scales.len() / out;
                for (scales, factor) in stored.scales.chunks_exact_mut(groups).zip(factors) {
                    scales.iter_mut().for_each(|s| *s *= factor);
                }
                stored.scales = storable_scales(stored.scales);
                stored.kept = (r > 0).then(|| round_kept(kept, out));
                tensors.extend(stored.scale_tensors(&name));
            }
        }
        Ok(tensors)
    }
}

/// What [`Learn::validate`] has refused before.
#[cfg(not(feature = "learn"))]
mod run {
    use specquant_model::{Block, ModelConfig, OnlineRotations, Source, StoredTensor};

    use super::{FlatQuantConfig, Learned, NOT_BUILT, OmniQuantConfig, SpinQuantConfig, Step, TuneConfig};
    use crate::recipe::Recipe;
    use crate::{Error, Result, States};

    pub fn rotations(
        _: &Source,
        _: &Recipe,
        _: &SpinQuantConfig,
        _: &OnlineRotations,
        _: &[Vec<u32>],
        _: &mut dyn FnMut(usize, usize, f64),
    ) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
        Err(Error::Recipe(NOT_BUILT.to_owned()))
    }

    pub fn scales_and_clips(
        _: &mut Block,
        _: &ModelConfig,
        _: usize,
        _: &Recipe,
        _: &OmniQuantConfig,
        _: &mut States,
        _: &States,
    ) -> Result<Learned> {
        Err(Error::Recipe(NOT_BUILT.to_owned()))
    }

    pub fn transforms(
        _: &mut Block,
        _: &ModelConfig,
        _: usize,
        _: &Recipe,
        _: &FlatQuantConfig,
        _: &mut States,
    ) -> Result<Learned> {
        Err(Error::Recipe(NOT_BUILT.to_owned()))
    }

    pub fn step_seconds(_: &Source, _: &Source, _: &TuneConfig, _: &[Vec<u32>]) -> Result<f64> {
        Err(Error::Recipe(NOT_BUILT.to_owned()))
    }

    pub fn tuned_tensors(
        _: &Source,
        _: &Source,
        _: &TuneConfig,
        _: &[Vec<u32>],
        _: Option<(usize, Vec<f64>)>,
        _: &mut dyn FnMut(Step) -> Result<()>,
    ) -> Result<Vec<StoredTensor>> {
        Err(Error::Recipe(NOT_BUILT.to_owned()))
    }
}

/// Steps of tuning.
#[cfg(feature = "learn")]
pub(crate) fn steps(config: &TuneConfig) -> usize {
    config.steps
}

/// Such recipes are refused.
#[cfg(not(feature = "learn"))]
pub(crate) fn steps(_: &TuneConfig) -> usize {
    0
}

pub(crate) use run::{rotations, scales_and_clips, step_seconds, transforms, tuned_tensors};
