//! FlatQuant: an invertible transform of every layer's input, and clip ratios, learned block by block.
//!
//! arXiv 2410.09426, section 3; constants from its code (train_utils.py, trans_utils.py, model_tools/llama_utils.py, args_utils.py,
//! scripts/llama-3/llama-3-8b/w4a4kv4.sh). Parameters of a block minimize the squared distance between its output in full precision and quantized,
//! both on the inputs that full precision brings it, so that blocks are learned independently:
//!
//! ```text
//! inputs of q/k/v, gate/up, down:   x' = (x ∘ d) (P₁ ⊗ P₂)      W' = (W / d) (P₁⁻ᵀ ⊗ P₂⁻ᵀ)      n₁ n₂ = n, nearly equal
//! heads of v, input of o:           v' = v Pᵥ,  x' = x (Pₒ ⊗ I)   W' = W (Pₒ⁻ᵀ ⊗ Pᵥ⁻ᵀ)             Pₒ mixes heads
//! heads of k and q, after RoPE:     k' = k Pₖ,  q' = q Pₖ⁻ᵀ
//! P = U diag(s) Vᵀ,   P⁻ᵀ = U diag(1/s) Vᵀ,   U, V = Cayley(parameter)
//! scales of weights (a row each) and of activations (an input each) are multiplied by sigmoid(c), c ← 4
//! d ← max|W|^(1−α) / max|x|ᵅ,  s ← 1,  parameters of U and V ← random orthonormal matrices
//! ```
//!
//! d folds into the norm before a site or the rows of `up_proj`, Pᵥ into `v_proj`. AdamW with the rate 5e-3, ten times that for clips, falling to a
//! thousandth as a cosine; four sequences a step.
//!
//! Deviations: activations are asymmetric here, with one clip ratio for both ends and one for all layers that read an input; weights, which are
//! symmetric there as well, have one for both ends; the cache's clip ratio is the scheme's and not learned, as there is one for the model; f32, where
//! the code mixes in fp16. A row of v is clipped behind Pᵥ, not before. A width that n₁ + n₂ of equal parity cannot make (where
//! `get_decompose_dim` finds nothing) is split as nearly as it can be.

mod ops;
mod params;

use candle_core::{Result as Candle, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use specquant_model::{ModelConfig, Site};

use crate::block::{DOWN, Geometry, K, O, Parts, Q, V, add_bias};
use crate::error::{Error, Result, check_bits, check_len, check_positive};
use crate::omniquant::{Block, BlockWeights};
use crate::ops::{FakeQuant, rotate, rows, tensor, to_vec};
use ops::{Clipped, Codes, kronecker};
use params::{Layout, Params, Square};

/// Settings of [`flatquant`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlatQuantConfig {
    /// Passes over the sequences.
    pub epochs: usize,
    /// Sequences used, the first ones.
    pub samples: usize,
    /// Sequences of a step of the optimizer.
    pub batch_size: usize,
    /// Tokens used of a sequence, the first ones.
    pub sequence_length: usize,
    /// Learning rate of transforms and diagonals.
    pub lr: f64,
    /// Learning rate of clip ratios.
    pub clip_lr: f64,
    /// α of the initial diagonals.
    pub alpha: f32,
    /// Seed of the first transforms.
    #[serde(skip)]
    pub seed: u64,
    /// Bits of the weights, symmetric per output channel.
    #[serde(skip)]
    pub weight_bits: u8,
    /// Bits of the linear layers' inputs, asymmetric per token.
    #[serde(skip)]
    pub act_bits: u8,
    /// Bits of keys and values, asymmetric per token and head.
    #[serde(skip)]
    pub kv_bits: u8,
    /// Clip ratio of keys and values.
    #[serde(skip)]
    pub kv_clip: f32,
}

impl Default for FlatQuantConfig {
    /// Sized for a CPU; the rest as published.
    fn default() -> Self {
        FlatQuantConfig { samples: 16, sequence_length: 256, batch_size: 2, epochs: 15, ..Self::paper() }
    }
}

impl FlatQuantConfig {
    /// As published: 15 epochs over 128 sequences of 2048 tokens.
    pub fn paper() -> Self {
        FlatQuantConfig {
            epochs: 15,
            samples: 128,
            batch_size: 4,
            sequence_length: 2048,
            lr: 5e-3,
            clip_lr: 5e-2,
            alpha: 0.3,
            seed: 0,
            weight_bits: 4,
            act_bits: 4,
            kv_bits: 4,
            kv_clip: 1.0,
        }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::Config`] names the first one out of range.
    pub fn validate(&self) -> Result<()> {
        let counts = [
            ("epochs", self.epochs),
            ("samples", self.samples),
            ("batch_size", self.batch_size),
            ("sequence_length", self.sequence_length),
        ];
        for (name, count) in counts {
            check_positive(name, count as f64, 1e6, "1 to a million")?;
        }
        check_positive("lr", self.lr, 1.0, "in (0, 1]")?;
        check_positive("clip_lr", self.clip_lr, 1.0, "in (0, 1]")?;
        if !(0.0..=1.0).contains(&self.alpha) {
            let value = self.alpha.to_string();
            return Err(Error::Config { name: "alpha", value, allowed: "between 0 and 1" });
        }
        check_positive("kv_clip", self.kv_clip.into(), 1.0, "in (0, 1]")?;
        check_bits("weight_bits", self.weight_bits)?;
        check_bits("act_bits", self.act_bits)?;
        check_bits("kv_bits", self.kv_bits)
    }
}

/// What [`flatquant`] learned.
#[derive(Debug, Clone, PartialEq)]
pub struct FlatBlock {
    /// P₁ `[n₁, n₁]` and P₂ `[n₂, n₂]` of every site, in the order of [`Site::ALL`]; at [`Site::O`] Pₒ `[heads, heads]` and nothing.
    pub inputs: [(Vec<f32>, Vec<f32>); 4],
    /// d of every site, `[in]`, which its input is multiplied by; nothing at [`Site::O`].
    pub scales: [Option<Vec<f32>>; 4],
    /// Pᵥ, `[head_dim, head_dim]`.
    pub values: Vec<f32>,
    /// Pₖ, `[head_dim, head_dim]`; nothing where keys are not quantized.
    pub keys: Option<Vec<f32>>,
    /// Clip ratio of every output channel of the transformed weight, in (0, 1): `[out]` of q, k, v, o, gate, up, down.
    pub weight_clip: [Vec<f32>; 7],
    /// Clip ratio of every site's transformed input, in (0, 1); nothing where activations are not quantized.
    pub act_clip: Option<[f32; 4]>,
    /// Mean squared error of every epoch, its steps' average.
    pub losses: Vec<f64>,
}

/// Learns the parameters of block `layer`.
///
/// inputs: the residual stream before the block in full precision, `[tokens, hidden]` a sequence from its start. act_max: the largest magnitudes of
/// the inputs of all sites in full precision, in the order of [`Site::ALL`], `[in]`. `progress` is told every epoch's number, from 0, and its loss.
///
/// # Errors
/// [`Error::Config`] and [`Error::Shape`] for what is given; [`Error::NoText`] without a sequence; [`Error::NotFinite`] when the loss
/// overflows.
pub fn flatquant(
    weights: &BlockWeights,
    model: &ModelConfig,
    layer: usize,
    inputs: &[impl AsRef<[f32]>],
    act_max: [&[f32]; 4],
    config: &FlatQuantConfig,
    progress: &mut dyn FnMut(usize, f64),
) -> Result<FlatBlock> {
    config.validate()?;
    let block = Block::new(weights, model, layer)?;
    let samples = samples(inputs, model.hidden_size, config)?;
    let longest = samples.iter().map(|x| x.dims()[0]).max().unwrap_or_default();
    let geometry = Geometry::new(model, layer, longest);
    let samples = samples
        .into_iter()
        .map(|x| Ok((geometry.forward(&block, &x)?, x)))
        .collect::<Result<Vec<(Tensor, Tensor)>>>()?;

    let mut rng = ChaCha8Rng::seed_from_u64(config.seed.wrapping_add(layer as u64));
    let (mut params, layout) = Params::new(weights, model, layer, act_max, config, &mut rng)?;
    let batches = samples.chunks(config.batch_size);
    let steps = config.epochs * batches.len();
    let mut losses = Vec::new();
    for epoch in 0..config.epochs {
        let mut mean = 0.0;
        for (number, batch) in batches.clone().enumerate() {
            let vars = params.vars()?;
            let flat = Flat::new(&block, model, config, &layout, &vars)?;
            let mut loss = tensor(vec![0.0], ())?;
            for (target, x) in batch {
                loss = (loss + (geometry.forward(&flat, x)? - target)?.sqr()?.mean_all()?)?;
            }
            let value = f64::from(loss.to_scalar::<f32>()?) / batch.len() as f64;
            if !value.is_finite() {
                return Err(Error::NotFinite { what: "the loss", value, step: epoch });
            }
            mean += value / batches.len() as f64;
            // Divided by its own value, as there: the optimizer's ε then means the same in every block.
            let gradients = (loss / (value * batch.len() as f64).max(f64::MIN_POSITIVE))?.backward()?;
            let progress = (epoch * batches.len() + number) as f64 / steps as f64;
            params.step(&vars, &gradients, progress)?;
        }
        losses.push(mean);
        progress(epoch, mean);
    }
    learned(&params, &layout, config, losses)
}

/// The sequences to learn from, `[tokens, hidden]`.
fn samples(inputs: &[impl AsRef<[f32]>], hidden: usize, config: &FlatQuantConfig) -> Result<Vec<Tensor>> {
    let mut all = Vec::new();
    for (i, x) in inputs.iter().take(config.samples).enumerate() {
        let x = x.as_ref();
        let tokens = x.len() / hidden;
        check_len(format!("input {i}"), x.len(), &[tokens, hidden])?;
        let tokens = tokens.min(config.sequence_length);
        if tokens > 0 {
            all.push(tensor(x[..tokens * hidden].to_vec(), (tokens, hidden))?);
        }
    }
    if all.is_empty() { Err(Error::NoText(1)) } else { Ok(all) }
}

fn learned(
    params: &Params,
    layout: &Layout,
    config: &FlatQuantConfig,
    losses: Vec<f64>,
) -> Result<FlatBlock> {
    if let Some(bad) = params.not_finite() {
        return Err(Error::NotFinite { what: "a parameter", value: bad.into(), step: config.epochs });
    }
    let vars = params.vars()?;
    let matrix = |square: &Square| -> Result<Vec<f32>> { Ok(to_vec(&square.matrices(&vars)?.0)?) };
    let ratios = |index: usize| -> Result<Vec<f32>> { Ok(to_vec(&sigmoid(&vars[index])?)?) };
    let mut inputs = [const { (Vec::new(), Vec::new()) }; 4];
    for (input, (left, right)) in inputs.iter_mut().zip(&layout.inputs) {
        *input = (matrix(left)?, right.as_ref().map(matrix).transpose()?.unwrap_or_default());
    }
    let mut weight_clip = [const { Vec::new() }; 7];
    for (clip, &index) in weight_clip.iter_mut().zip(&layout.weight_clip) {
        *clip = ratios(index)?;
    }
    let mut act_clip = [1.0; 4];
    for (clip, &index) in act_clip.iter_mut().zip(&layout.act_clip) {
        *clip = ratios(index)?[0];
    }
    Ok(FlatBlock {
        inputs,
        scales: layout.diagonals.map(|index| index.map(|index| params.values(index).to_vec())),
        values: matrix(&layout.values)?,
        keys: layout.keys.as_ref().map(matrix).transpose()?,
        weight_clip,
        act_clip: (config.act_bits < 16).then_some(act_clip),
        losses,
    })
}

fn sigmoid(x: &Tensor) -> Candle<Tensor> {
    ((x.neg()?.exp()? + 1.0)?).recip()
}

/// The block quantized, for one step.
struct Flat<'a> {
    block: &'a Block,
    config: &'a FlatQuantConfig,
    heads: usize,
    /// d of every site, times the norm's weight where a norm is before it, `[in]`.
    scales: [Option<Tensor>; 4],
    /// P₁ and P₂ of every site.
    inputs: Vec<(Tensor, Option<Tensor>)>,
    /// Pₖ and its inverse transpose.
    keys: Option<(Tensor, Tensor)>,
    /// Clip ratio of every site, `[1]`.
    act_clip: Vec<Tensor>,
    /// Transformed and quantized weights `[out, in]` and biases `[out]`.
    linears: Vec<(Tensor, Option<Tensor>)>,
}

impl<'a> Flat<'a> {
    fn new(
        block: &'a Block,
        model: &ModelConfig,
        config: &'a FlatQuantConfig,
        layout: &Layout,
        vars: &[Tensor],
    ) -> Candle<Self> {
        let (values, values_inverse) = layout.values.matrices(vars)?;
        let (mut inputs, mut inverses) = (Vec::new(), Vec::new());
        for (left, right) in &layout.inputs {
            let (left, left_inverse) = left.matrices(vars)?;
            let right = right.as_ref().map(|right| right.matrices(vars)).transpose()?;
            let (right, right_inverse) = match right {
                Some((right, inverse)) => (Some(right), inverse),
                None => (None, values_inverse.clone()),
            };
            inputs.push((left, right));
            inverses.push((left_inverse, right_inverse));
        }
        let mut linears = Vec::new();
        for (index, dense) in block.linears.iter().enumerate() {
            let site = match index {
                Q | K | V => Site::Qkv,
                O => Site::O,
                DOWN => Site::Down,
                _ => Site::GateUp,
            } as usize;
            let mut weight = match layout.diagonals[site] {
                Some(d) => dense.weight.broadcast_div(&vars[d])?,
                None => dense.weight.clone(),
            };
            let (left, right) = &inverses[site];
            weight = kronecker(&weight, left, right)?;
            let mut bias = dense.bias.clone();
            if index == V {
                weight = rotate(&weight.t()?.contiguous()?, &values)?.t()?;
                bias = bias.map(|b| rotate(&b, &values)).transpose()?;
            }
            if config.weight_bits < 16 {
                let ratio = sigmoid(&vars[layout.weight_clip[index]])?;
                let clipped = Clipped { bits: config.weight_bits, codes: Codes::Signed };
                weight = clipped.apply(&weight, &ratio)?;
            }
            linears.push((weight, bias));
        }
        let scale = |site: Site, norm: Option<&Tensor>| -> Candle<Option<Tensor>> {
            let Some(d) = layout.diagonals[site as usize] else { return Ok(None) };
            Ok(Some(norm.map_or(Ok(vars[d].clone()), |norm| norm * &vars[d])?))
        };
        let scales = [
            scale(Site::Qkv, Some(&block.norms[0]))?,
            scale(Site::O, None)?,
            scale(Site::GateUp, Some(&block.norms[1]))?,
            scale(Site::Down, None)?,
        ];
        Ok(Flat {
            block,
            config,
            heads: model.num_heads,
            scales,
            inputs,
            keys: layout.keys.as_ref().map(|keys| keys.matrices(vars)).transpose()?,
            act_clip: layout.act_clip.iter().map(|&c| sigmoid(&vars[c])).collect::<Candle<_>>()?,
            linears,
        })
    }
}

impl Parts for Flat<'_> {
    fn site(&self, site: Site, x: &Tensor) -> Candle<Tensor> {
        let mut x = x.clone();
        if let Some(scale) = &self.scales[site as usize] {
            x = x.broadcast_mul(scale)?;
        }
        let (left, right) = &self.inputs[site as usize];
        x = match right {
            Some(right) => kronecker(&x, left, right)?,
            // Across heads.
            None => {
                let (tokens, width) = x.dims2()?;
                let heads = x.reshape((tokens, self.heads, width / self.heads))?.transpose(1, 2)?;
                let mixed = rotate(&heads.contiguous()?, left)?;
                mixed.transpose(1, 2)?.contiguous()?.reshape((tokens, width))?
            }
        };
        if self.config.act_bits == 16 {
            return Ok(x);
        }
        let clipped = Clipped { bits: self.config.act_bits, codes: Codes::Unsigned };
        clipped.apply(&x, &self.act_clip[site as usize])
    }

    fn linear(&self, index: usize, x: &Tensor) -> Candle<Tensor> {
        let (weight, bias) = &self.linears[index];
        add_bias(x.matmul(&weight.t()?)?, bias.as_ref())
    }

    fn cached(&self, index: usize, x: Tensor) -> Candle<Tensor> {
        let x = match (index, &self.keys) {
            (Q, Some((_, inverse))) => rotate(&x.contiguous()?, inverse)?,
            (K, Some((keys, _))) => rotate(&x.contiguous()?, keys)?,
            _ => x,
        };
        if index == Q || self.config.kv_bits == 16 {
            return Ok(x);
        }
        rows(&x, FakeQuant { bits: self.config.kv_bits, clip: self.config.kv_clip, through_range: true })
    }

    fn head_norm(&self, index: usize) -> Option<&Tensor> {
        self.block.head_norm(index)
    }

    fn out_norm(&self, index: usize) -> Option<&Tensor> {
        self.block.out_norm(index)
    }
}

#[cfg(test)]
mod tests;
