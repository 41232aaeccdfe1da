//! OmniQuant: per-channel scales and clip ratios learned block by block.
//!
//! arXiv 2308.13137, sections 3.2 and 3.3; constants from its code (main.py, quantize/, scripts/Llama-2/Llama-2-7b/w4a4.sh). Two sets
//! of parameters minimize the squared distance between the block in full precision, on the inputs that full precision brings it,
//! and the quantized block, on the inputs that the quantized blocks before it bring:
//!
//! ```text
//! LET, s per input channel:    x' = x / s     W' = W diag(s)     s ← max|x|ᵅ / max|W_j|^(1−α)
//! LWC, γ per output channel:   scale = sigmoid(γ) · max|W'| / (2ᵇ⁻¹ − 1)     γ ← 4
//! ```
//!
//! The scales fold into what produces x: the norm before q/k/v, `v_proj` before `o_proj` (heads that read one KV head share theirs),
//! the norm before gate/up; nothing folds into `up_proj`. Adam, one sequence a step; s is kept at or above 1e-2.
//!
//! Deviations: weights are symmetric here, so that a row has one clip ratio instead of an upper and a lower one; keys are quantized
//! after the rotary embedding at the cache's width, and queries not at all, as at run time; the scale that q and k could share does
//! not exist under a rotary embedding; activations' ranges include 0, as everywhere here; f32, where the code uses fp16.
//! Following the code, the initial s takes max|W_j| over q_proj (o_proj, up_proj) alone.

use candle_core::{Result as Candle, Tensor, Var};
use serde::{Deserialize, Serialize};
use specquant_model::{ModelConfig, Site};

use crate::adam::Adam;
use crate::block::{Dense, GATE, Geometry, K, O, Parts, Q, UP, V, add_bias};
use crate::clipped::ClippedWeight;
use crate::error::{Error, Result, check_bits, check_len, check_positive};
use crate::ops::{FakeQuant, rows, tensor, to_vec};

/// Scales are kept at or above this (OmniQuant, transformation.py, `truncate_number`).
pub const MIN_SCALE: f32 = 1e-2;
/// Lower bound of the maxima that scales start from (omniquant.py).
const MIN_MAXIMUM: f32 = 1e-5;
/// γ at the start: sigmoid(4) = 0.982 (quantizer.py).
const GAMMA: f32 = 4.0;

/// Settings of [`omniquant`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OmniQuantConfig {
    /// Passes over the sequences.
    pub epochs: usize,
    /// Sequences used, the first ones; a step of the optimizer each.
    pub samples: usize,
    /// Tokens used of a sequence, the first ones.
    pub sequence_length: usize,
    /// Whether to learn (and use) scales.
    pub learn_scales: bool,
    /// Whether to learn clip ratios; otherwise they are 1.
    pub learn_clip: bool,
    /// α of the initial scales.
    pub alpha: f32,
    /// Learning rate of the scales.
    pub let_lr: f64,
    /// Learning rate of the clip ratios' γ.
    pub lwc_lr: f64,
    /// Bits of the weights, symmetric per output channel.
    pub weight_bits: u8,
    /// Bits of the linear layers' inputs, asymmetric per token.
    pub act_bits: u8,
    /// Bits of keys and values, asymmetric per token and head.
    pub kv_bits: u8,
    /// Clip ratio of the inputs. OmniQuant: 1.
    pub act_clip: f32,
    /// Clip ratio of keys and values. OmniQuant: 1.
    pub kv_clip: f32,
}

impl Default for OmniQuantConfig {
    /// Sized for a CPU: 8 sequences of 256 tokens, a 128th of the published tokens; the rest as published for W4A4.
    fn default() -> Self {
        OmniQuantConfig { samples: 8, sequence_length: 256, ..Self::paper() }
    }
}

impl OmniQuantConfig {
    /// As published: 20 epochs over 128 sequences of 2048 tokens (scripts/Llama-2/Llama-2-7b/w4a4.sh, main.py).
    pub fn paper() -> Self {
        OmniQuantConfig {
            epochs: 20,
            samples: 128,
            sequence_length: 2048,
            learn_scales: true,
            learn_clip: true,
            alpha: 0.75,
            let_lr: 1e-3,
            lwc_lr: 1e-2,
            weight_bits: 4,
            act_bits: 4,
            kv_bits: 4,
            act_clip: 1.0,
            kv_clip: 1.0,
        }
    }

    fn validate(&self) -> Result<()> {
        check_positive("samples", self.samples as f64, f64::MAX, "at least 1")?;
        check_positive("sequence_length", self.sequence_length as f64, f64::MAX, "at least 1")?;
        check_positive("let_lr", self.let_lr, f64::MAX, "positive and finite")?;
        check_positive("lwc_lr", self.lwc_lr, f64::MAX, "positive and finite")?;
        check_positive("act_clip", self.act_clip.into(), 1.0, "in (0, 1]")?;
        check_positive("kv_clip", self.kv_clip.into(), 1.0, "in (0, 1]")?;
        if !(0.0..=1.0).contains(&self.alpha) {
            return Err(Error::Config {
                name: "alpha",
                value: self.alpha.to_string(),
                allowed: "between 0 and 1",
            });
        }
        check_bits("weight_bits", self.weight_bits)?;
        check_bits("act_bits", self.act_bits)?;
        check_bits("kv_bits", self.kv_bits)
    }
}

/// A decoder block in full precision, row-major.
#[derive(Debug, Clone, Copy)]
pub struct BlockWeights<'a> {
    /// RMSNorm weight before attention, `[hidden]`.
    pub input_norm: &'a [f32],
    /// RMSNorm weight before the MLP, `[hidden]`.
    pub mlp_norm: &'a [f32],
    /// RMSNorm weights of what attention and MLP put out, `[hidden]` each (Gemma 3).
    pub out_norms: Option<[&'a [f32]; 2]>,
    /// RMSNorm weight of the heads of Q, `[head_dim]` (Qwen3).
    pub q_norm: Option<&'a [f32]>,
    /// RMSNorm weight of the heads of K, `[head_dim]` (Qwen3).
    pub k_norm: Option<&'a [f32]>,
    /// Weight `[out, in]` and bias `[out]`, in the order of [`ModelConfig::linear_shapes`]: q, k, v, o, gate, up, down.
    pub linears: [(&'a [f32], Option<&'a [f32]>); 7],
}

/// What [`omniquant`] learned.
#[derive(Debug, Clone, PartialEq)]
pub struct Learned {
    /// s of every site, in the order of [`Site::ALL`], `[in]`: the layers' weights are multiplied by it, their input is divided. Heads
    /// of `o_proj`'s input that read one KV head have equal ones. `None` where nothing is learned: at [`Site::Down`] always.
    pub scales: [Option<Vec<f32>>; 4],
    /// Clip ratio of every output channel, in (0, 1], of the scaled weight's largest magnitude: `[out]` of q, k, v, o, gate, up, down.
    pub clip: [Vec<f32>; 7],
    /// Mean squared error of every epoch, its steps' average.
    pub losses: Vec<f64>,
}

/// Learns the parameters of block `layer`.
///
/// fp_inputs, quant_inputs: the residual stream before the block, `[tokens, hidden]` a sequence from its start, of the same sequences:
/// as full precision computes it and as the quantized blocks before this one do. act_max: the largest magnitudes of the inputs of
/// [`Site::Qkv`] `[hidden]`, [`Site::O`] `[heads * head_dim]` and [`Site::GateUp`] `[hidden]`, in full precision. `progress` is told
/// every epoch's number, from 0, and its loss.
///
/// # Errors
/// [`Error::Config`] and [`Error::Shape`] for what is given; [`Error::NoText`] without a sequence; [`Error::NotFinite`] when the loss
/// overflows.
pub fn omniquant(
    weights: &BlockWeights,
    model: &ModelConfig,
    layer: usize,
    fp_inputs: &[impl AsRef<[f32]>],
    quant_inputs: &[impl AsRef<[f32]>],
    act_max: [&[f32]; 3],
    config: &OmniQuantConfig,
    progress: &mut dyn FnMut(usize, f64),
) -> Result<Learned> {
    config.validate()?;
    let block = Block::new(weights, model, layer)?;
    let samples = samples(fp_inputs, quant_inputs, model.hidden_size, config)?;
    let longest = samples.iter().map(|(fp, _)| fp.dims()[0]).max().unwrap_or_default();
    let geometry = Geometry::new(model, layer, longest);
    let samples = samples
        .into_iter()
        .map(|(fp, quantized)| Ok((geometry.forward(&block, &fp)?, quantized)))
        .collect::<Result<Vec<_>>>()?;

    let mut params = Params::new(weights, model, layer, act_max, config)?;
    let mut losses = Vec::new();
    for epoch in 0..config.epochs {
        let mut mean = 0.0;
        for (target, input) in &samples {
            let vars = params.vars()?;
            let quantized = Quantized::new(&block, model, config, &vars)?;
            let loss = (geometry.forward(&quantized, input)? - target)?.sqr()?.mean_all()?;
            let value = f64::from(loss.to_scalar::<f32>()?);
            if !value.is_finite() {
                return Err(Error::NotFinite { what: "the loss", value, step: epoch });
            }
            mean += value / samples.len() as f64;
            params.step(&vars, &loss.backward()?)?;
        }
        losses.push(mean);
        progress(epoch, mean);
    }
    params.learned(model, config, losses)
}

/// The sequences to learn from: inputs in full precision and quantized, `[tokens, hidden]`.
fn samples(
    fp: &[impl AsRef<[f32]>],
    quantized: &[impl AsRef<[f32]>],
    hidden: usize,
    config: &OmniQuantConfig,
) -> Result<Vec<(Tensor, Tensor)>> {
    check_len("the list of quantized inputs", quantized.len(), &[fp.len()])?;
    let mut all = Vec::new();
    for (i, (fp, quantized)) in fp.iter().zip(quantized).take(config.samples).enumerate() {
        let (fp, quantized) = (fp.as_ref(), quantized.as_ref());
        let tokens = fp.len() / hidden;
        check_len(format!("input {i} in full precision"), fp.len(), &[tokens, hidden])?;
        check_len(format!("quantized input {i}"), quantized.len(), &[tokens, hidden])?;
        let tokens = tokens.min(config.sequence_length);
        let first = |x: &[f32]| tensor(x[..tokens * hidden].to_vec(), (tokens, hidden));
        if tokens > 0 {
            all.push((first(fp)?, first(quantized)?));
        }
    }
    if all.is_empty() { Err(Error::NoText(1)) } else { Ok(all) }
}

/// A block's constants, and the block in full precision.
pub(crate) struct Block {
    /// Weights of the norms before attention and MLP, `[hidden]`.
    pub norms: [Tensor; 2],
    /// Of what they put out; none, or one each.
    out_norms: Vec<Tensor>,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    /// Q to DOWN.
    pub linears: Vec<Dense>,
}

impl Block {
    pub fn new(weights: &BlockWeights, model: &ModelConfig, layer: usize) -> Result<Self> {
        let vector = |what: &str, values: &[f32], n: usize| -> Result<Tensor> {
            check_len(what, values.len(), &[n])?;
            Ok(tensor(values.to_vec(), n)?)
        };
        let head_norm = |what: &str, values: Option<&[f32]>| match (model.qk_norm, values) {
            (false, _) => Ok(None),
            (true, values) => vector(what, values.unwrap_or_default(), model.head_dim).map(Some),
        };
        let out_norms = match model.post_norms {
            false => Vec::new(),
            true => weights.out_norms.unwrap_or_default().into(),
        };
        let out_norms = out_norms.into_iter().map(|norm: &[f32]| vector("out_norm", norm, model.hidden_size));
        let mut linears = Vec::new();
        for ((name, shape), (weight, bias)) in model.linear_shapes(layer).into_iter().zip(weights.linears) {
            check_len(name.clone(), weight.len(), &shape)?;
            let bias = bias.map(|b| vector(&format!("{name}.bias"), b, shape[0])).transpose()?;
            linears.push(Dense { weight: tensor(weight.to_vec(), &shape)?, bias });
        }
        Ok(Block {
            norms: [
                vector("input_norm", weights.input_norm, model.hidden_size)?,
                vector("mlp_norm", weights.mlp_norm, model.hidden_size)?,
            ],
            out_norms: out_norms.collect::<Result<_>>()?,
            q_norm: head_norm("q_norm", weights.q_norm)?,
            k_norm: head_norm("k_norm", weights.k_norm)?,
            linears,
        })
    }
}

impl Parts for Block {
    fn site(&self, site: Site, x: &Tensor) -> Candle<Tensor> {
        match site {
            Site::Qkv => x.broadcast_mul(&self.norms[0]),
            Site::GateUp => x.broadcast_mul(&self.norms[1]),
            Site::O | Site::Down => Ok(x.clone()),
        }
    }

    fn linear(&self, index: usize, x: &Tensor) -> Candle<Tensor> {
        self.linears[index].forward(x)
    }

    fn cached(&self, _: usize, x: Tensor) -> Candle<Tensor> {
        Ok(x)
    }

    fn head_norm(&self, index: usize) -> Option<&Tensor> {
        match index {
            Q => self.q_norm.as_ref(),
            K => self.k_norm.as_ref(),
            _ => None,
        }
    }

    fn out_norm(&self, index: usize) -> Option<&Tensor> {
        self.out_norms.get(usize::from(index != O))
    }
}

/// The parameters: s before q/k/v `[hidden]`, s of `v_proj`'s outputs `[kv_heads * head_dim]`, s before gate/up `[hidden]`, and γ of
/// the seven layers `[out]`.
struct Params {
    values: Vec<Vec<f32>>,
    /// `None` for what is not learned.
    optimizers: Vec<Option<Adam>>,
}

impl Params {
    fn new(
        weights: &BlockWeights,
        model: &ModelConfig,
        layer: usize,
        act_max: [&[f32]; 3],
        config: &OmniQuantConfig,
    ) -> Result<Self> {
        let (shapes, kv) = (model.linear_shapes(layer), model.num_kv_heads * model.head_dim);
        let mut values = Vec::new();
        for (max, index) in act_max.into_iter().zip([Q, O, UP]) {
            let inp = shapes[index].1[1];
            check_len(format!("act_max of {}", shapes[index].0), max.len(), &[inp])?;
            if !config.learn_scales {
                values.push(vec![1.0; if index == O { kv } else { inp }]);
                continue;
            }
            let mut weight_max = vec![MIN_MAXIMUM; inp];
            let rows = weights.linears[index].0.chunks_exact(inp);
            rows.for_each(|row| weight_max.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(w.abs())));
            let start = max.iter().zip(weight_max).map(|(x, w)| {
                (x.max(MIN_MAXIMUM).powf(config.alpha) / w.powf(1.0 - config.alpha)).max(MIN_SCALE)
            });
            let mut s = vec![0.0f32; if index == O { kv } else { inp }];
            for (i, start) in start.enumerate() {
                let i = if index == O { shared(i, model) } else { i };
                s[i] = s[i].max(start);
            }
            values.push(s);
        }
        values.extend(shapes.iter().map(|(_, shape)| vec![GAMMA; shape[0]]));
        let optimizer = |(i, v): (usize, &Vec<f32>)| match i < 3 {
            true => config.learn_scales.then(|| Adam::new(config.let_lr, v.len())),
            false => config.learn_clip.then(|| Adam::new(config.lwc_lr, v.len())),
        };
        let optimizers = values.iter().enumerate().map(optimizer).collect();
        Ok(Params { values, optimizers })
    }

    fn vars(&self) -> Candle<Vec<Tensor>> {
        let var = |(values, learned): (&Vec<f32>, &Option<Adam>)| -> Candle<Tensor> {
            let values = tensor(values.clone(), values.len())?;
            if learned.is_some() { Ok(Var::from_tensor(&values)?.into_inner()) } else { Ok(values) }
        };
        self.values.iter().zip(&self.optimizers).map(var).collect()
    }

    fn step(&mut self, vars: &[Tensor], gradients: &candle_core::backprop::GradStore) -> Candle<()> {
        for (i, ((values, optimizer), var)) in
            self.values.iter_mut().zip(&mut self.optimizers).zip(vars).enumerate()
        {
            if let (Some(optimizer), Some(gradient)) = (optimizer, gradients.get(var)) {
                optimizer.step(1.0, values, &to_vec(gradient)?);
                if i < 3 {
                    values.iter_mut().for_each(|s| *s = s.max(MIN_SCALE));
                }
            }
        }
        Ok(())
    }

    fn learned(mut self, model: &ModelConfig, config: &OmniQuantConfig, losses: Vec<f64>) -> Result<Learned> {
        if let Some(&bad) = self.values.iter().flatten().find(|v| !v.is_finite()) {
            return Err(Error::NotFinite { what: "a parameter", value: bad.into(), step: config.epochs });
        }
        let gammas = self.values.split_off(3);
        let clip = |g: &Vec<f32>| match config.learn_clip {
            true => g.iter().map(|g| 1.0 / (1.0 + (-g).exp())).collect(),
            false => vec![1.0; g.len()],
        };
        let mut scales = [const { None }; 4];
        if config.learn_scales {
            let heads = 0..model.num_heads * model.head_dim;
            let o = heads.map(|i| self.values[1][shared(i, model)]).collect();
            let [qkv, _, gate_up] = [0, 1, 2].map(|i| std::mem::take(&mut self.values[i]));
            scales = [Some(qkv), Some(o), Some(gate_up), None];
        }
        Ok(Learned { scales, clip: std::array::from_fn(|i| clip(&gammas[i])), losses })
    }
}

/// The channel of `v_proj` that input channel `i` of `o_proj` comes from.
fn shared(i: usize, model: &ModelConfig) -> usize {
    let group = model.num_heads / model.num_kv_heads;
    i / model.head_dim / group * model.head_dim + i % model.head_dim
}

/// The block quantized.
struct Quantized<'a> {
    block: &'a Block,
    config: &'a OmniQuantConfig,
    /// Norm weights over scales, `[hidden]`.
    norms: [Tensor; 2],
    /// By linear layer: scale of the inputs `[in]`, divisor of the outputs `[out]`, clip ratio `[out]`.
    factors: Vec<[Tensor; 3]>,
}

impl<'a> Quantized<'a> {
    fn new(
        block: &'a Block,
        model: &ModelConfig,
        config: &'a OmniQuantConfig,
        vars: &[Tensor],
    ) -> Candle<Self> {
        let [qkv, v, gate_up] = [&vars[0], &vars[1], &vars[2]];
        let heads = (0..model.num_heads * model.head_dim).map(|i| shared(i, model) as u32);
        let o = v.index_select(&Tensor::new(heads.collect::<Vec<_>>(), v.device())?, 0)?;
        let mut factors = Vec::new();
        for (index, dense) in block.linears.iter().enumerate() {
            let (out, inp) = dense.weight.dims2()?;
            let ones = |n: usize| tensor(vec![1.0; n], n);
            let before = match index {
                Q | K | V => qkv.clone(),
                O => o.clone(),
                GATE | UP => gate_up.clone(),
                _ => ones(inp)?,
            };
            let after = if index == V { v.clone() } else { ones(out)? };
            let ratio = match config.learn_clip {
                true => ((vars[3 + index].neg()?.exp()? + 1.0)?).recip()?,
                false => ones(out)?,
            };
            factors.push([before, after, ratio]);
        }
        let norms = [(&block.norms[0] / qkv)?, (&block.norms[1] / gate_up)?];
        Ok(Quantized { block, config, norms, factors })
    }

    fn quantize(&self, x: Tensor, bits: u8, clip: f32) -> Candle<Tensor> {
        if bits == 16 { Ok(x) } else { rows(&x, FakeQuant { bits, clip, through_range: true }) }
    }
}

impl Parts for Quantized<'_> {
    fn site(&self, site: Site, x: &Tensor) -> Candle<Tensor> {
        let x = match site {
            Site::Qkv => x.broadcast_mul(&self.norms[0])?,
            Site::GateUp => x.broadcast_mul(&self.norms[1])?,
            Site::O | Site::Down => x.clone(),
        };
        self.quantize(x, self.config.act_bits, self.config.act_clip)
    }

    fn linear(&self, index: usize, x: &Tensor) -> Candle<Tensor> {
        let Dense { weight, bias } = &self.block.linears[index];
        let [before, after, ratio] = &self.factors[index];
        let weight = ClippedWeight { weight: weight.clone(), bits: self.config.weight_bits };
        let bias = bias.as_ref().map(|b| b / after).transpose()?;
        add_bias(x.matmul(&weight.apply(before, after, ratio)?.t()?)?, bias.as_ref())
    }

    fn cached(&self, index: usize, x: Tensor) -> Candle<Tensor> {
        if index == Q { Ok(x) } else { self.quantize(x, self.config.kv_bits, self.config.kv_clip) }
    }

    fn head_norm(&self, index: usize) -> Option<&Tensor> {
        self.block.head_norm(index)
    }

    fn out_norm(&self, index: usize) -> Option<&Tensor> {
        self.block.out_norm(index)
    }
}

#[cfg(test)]
pub(crate) mod tests;
