//! The whole model with rotations and fake quantizers, and the gradient of its loss by the rotations.

use candle_core::{Result as Candle, Tensor, Var};
use rayon::prelude::*;
use specquant_model::{Site, Source};

use crate::SpinQuantConfig;
use crate::block::{DOWN, Dense, GATE, Geometry, K, O, Parts, Q, UP, V, add_bias};
use crate::error::{Error, Result};
use crate::ops::{FakeQuant, FakeQuantWeight, RmsNorm, frozen, rotate, rows, tensor, to_vec};

/// Rows of logits at a time.
const LOGIT_ROWS: usize = 64;

/// A model's constants, in f32.
pub(crate) struct Net<'a> {
    config: &'a SpinQuantConfig,
    eps: f32,
    /// Token embeddings, `[vocab, hidden]`.
    embedding: Tensor,
    layers: Vec<Layer>,
    /// Weight of the last norm, `[hidden]`.
    norm: Tensor,
    /// `[vocab, hidden]`.
    head: Tensor,
    /// R3ᵀ, `[head_dim, head_dim]`.
    r3t: Option<Tensor>,
    /// R4ᵀ, `[b, b]`.
    r4t: Option<Tensor>,
}

/// A block's constants. The weights of its two norms are multiplied into the columns of the layers that follow them, R4 into
/// `down_proj`.
struct Layer {
    geometry: Geometry,
    linears: Vec<Dense>,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
}

/// `x R`, for each run of b channels, where R is no variable. x: `[.., n]`; rt: Rᵀ, `[b, b]`.
fn rotate_fixed(x: &Tensor, rt: &Tensor) -> Candle<Tensor> {
    frozen(&x.reshape(((), rt.dim(0)?))?, rt)?.reshape(x.shape())
}

impl<'a> Net<'a> {
    /// Reads a model, for sequences up to `longest` tokens. r3: `[head_dim, head_dim]`; r4: `[b, b]`, b divides the intermediate size.
    pub fn load(
        source: &Source,
        config: &'a SpinQuantConfig,
        longest: usize,
        r3: Option<&[f32]>,
        r4: Option<&[f32]>,
    ) -> Result<Self> {
        let model = source.config();
        if source.is_quantized() {
            let (path, method) = (source.path().to_owned(), "specquant".to_owned());
            return Err(specquant_model::Error::AlreadyQuantized { path, method }.into());
        }
        if model.post_norms {
            return Err(Error::PostNorms);
        }
        let vector = |name: &str| -> Result<Vec<f32>> { Ok(source.tensor(name)?.to_f32()?) };
        let matrix = |name: &str, shape: [usize; 2]| -> Result<Tensor> { Ok(tensor(vector(name)?, &shape)?) };
        let transposed = |r: Option<&[f32]>| -> Result<Option<Tensor>> {
            let square =
                |r: &[f32]| tensor(r.to_vec(), (r.len().isqrt(), r.len().isqrt()))?.t()?.contiguous();
            Ok(r.map(square).transpose()?)
        };
        let (r3t, r4t) = (transposed(r3)?, transposed(r4)?);

        let geometry = Geometry::new(model, 0, longest);
        let mut layers = Vec::with_capacity(model.num_layers);
        for layer in 0..model.num_layers {
            let prefix = format!("model.layers.{layer}");
            let before_attention = vector(&format!("{prefix}.input_layernorm.weight"))?;
            let before_mlp = vector(&format!("{prefix}.post_attention_layernorm.weight"))?;
            let mut linears = Vec::new();
            for (index, (name, shape)) in model.linear_shapes(layer).into_iter().enumerate() {
                let mut weight = vector(&format!("{name}.weight"))?;
                let norm = match index {
                    Q | K | V => Some(&before_attention),
                    GATE | UP => Some(&before_mlp),
                    _ => None,
                };
                if let Some(norm) = norm {
                    let rows = weight.chunks_exact_mut(shape[1]);
                    rows.for_each(|row| row.iter_mut().zip(norm).for_each(|(w, n)| *w *= n));
                }
                let mut weight = tensor(weight, &shape)?;
                if let (DOWN, Some(r4t)) = (index, &r4t) {
                    weight = rotate_fixed(&weight, r4t)?;
                }
                let bias = match model.has_bias(&name) {
                    true => Some(tensor(vector(&format!("{name}.bias"))?, shape[0])?),
                    false => None,
                };
                linears.push(Dense { weight, bias });
            }
            let head_norm = |name: &str| -> Result<Option<Tensor>> {
                if !model.qk_norm {
                    return Ok(None);
                }
                Ok(Some(tensor(vector(&format!("{prefix}.self_attn.{name}.weight"))?, model.head_dim)?))
            };
            layers.push(Layer {
                geometry: geometry.with_layer(model, layer),
                linears,
                q_norm: head_norm("q_norm")?,
                k_norm: head_norm("k_norm")?,
            });
        }

        let shape = [model.vocab_size, model.hidden_size];
        let embedding = matrix("model.embed_tokens.weight", shape)?;
        let head = match model.tie_word_embeddings {
            true => embedding.clone(),
            false => matrix("lm_head.weight", shape)?,
        };
        let norm = tensor(vector("model.norm.weight")?, model.hidden_size)?;
        Ok(Net { config, eps: model.rms_norm_eps, embedding, layers, norm, head, r3t, r4t })
    }

    /// The embeddings of `tokens`, not rotated, `[tokens, hidden]`.
    fn embed(&self, tokens: &[u32]) -> Candle<Tensor> {
        self.embedding.index_select(&Tensor::new(tokens, self.embedding.device())?, 0)
    }

    /// What the head multiplies, `[tokens, hidden]`: normalized, and rotated back. x: `[tokens, hidden]`.
    fn last(&self, x: &Tensor, r1: &Tensor) -> Candle<Tensor> {
        rotate(&rows(x, RmsNorm { eps: self.eps })?, &r1.t()?)?.broadcast_mul(&self.norm)
    }

    fn block(&self, layer: &Layer, x: &Tensor, r1: &Tensor, r2: &Tensor) -> Candle<Tensor> {
        layer.geometry.forward(&Rotated { net: self, layer, r1, r2 }, x)
    }

    /// Block `layer` under R1 and R2.
    #[cfg(test)]
    pub fn block_of(&self, layer: usize, x: &Tensor, r1: &Tensor, r2: &Tensor) -> Tensor {
        self.block(&self.layers[layer], x, r1, r2).unwrap()
    }

    /// The mean cross-entropy of predicting each token of a sequence from those before it, in nats, and its gradient by every
    /// rotation. tokens: at least two, within the vocabulary; rotations: R1, then R2 of every layer; the gradients in the same order.
    pub fn gradients(&self, tokens: &[u32], rotations: &[Tensor]) -> Result<(f64, Vec<Tensor>)> {
        let (targets, tokens) = (&tokens[1..], &tokens[..tokens.len() - 1]);
        let (r1, r2) = (Var::from_tensor(&rotations[0])?, &rotations[1..]);
        let embedded = self.embed(tokens)?;
        // Forward, keeping every block's input only.
        let mut x = embedded.matmul(&rotations[0])?;
        let mut inputs = Vec::with_capacity(self.layers.len());
        for (layer, r2) in self.layers.iter().zip(r2) {
            let y = self.block(layer, &x, &rotations[0], r2)?;
            inputs.push(std::mem::replace(&mut x, y));
        }
        // Backward, a block at a time: the gradient of Σ y·g by what y depends on, g being the loss's gradient by y.
        let x = Var::from_tensor(&x)?;
        let last = self.last(&x, &r1)?;
        let (loss, g) = cross_entropy(&last.detach(), &self.head, targets)?;
        let grads = (last * g)?.sum_all()?.backward()?;
        // A gradient is made of tensors that depend on variables, and would keep all of them alive: what is summed up over steps must not.
        let of = |grads: &candle_core::backprop::GradStore, v: &Tensor| match grads.get(v) {
            Some(g) => Ok(g.detach()),
            None => v.zeros_like(),
        };
        let mut by_r1 = of(&grads, &r1)?;
        let mut g = of(&grads, &x)?;
        let mut by_r2 = Vec::with_capacity(r2.len());
        for ((layer, r2), x) in self.layers.iter().zip(r2).zip(inputs).rev() {
            let (x, r2) = (Var::from_tensor(&x)?, Var::from_tensor(r2)?);
            let grads = (self.block(layer, &x, &r1, &r2)? * g)?.sum_all()?.backward()?;
            by_r1 = (by_r1 + of(&grads, &r1)?)?;
            by_r2.push(of(&grads, &r2)?);
            g = of(&grads, &x)?;
        }
        by_r1 = (by_r1 + embedded.t()?.matmul(&g)?)?;
        Ok((loss, std::iter::once(by_r1).chain(by_r2.into_iter().rev()).collect()))
    }
}

/// The mean cross-entropy in nats, and its gradient by `x`. x: `[tokens, hidden]`; head: `[vocab, hidden]`; targets: `[tokens]`.
/// The logits of a few rows exist at a time.
fn cross_entropy(x: &Tensor, head: &Tensor, targets: &[u32]) -> Result<(f64, Tensor)> {
    let (count, vocab) = (targets.len(), head.dim(0)?);
    let (mut loss, mut gradients) = (0.0, Vec::new());
    for (chunk, targets) in targets.chunks(LOGIT_ROWS).enumerate() {
        let logits = x.narrow(0, chunk * LOGIT_ROWS, targets.len())?.matmul(&head.t()?)?;
        let mut values = to_vec(&logits)?;
        let losses = values.par_chunks_exact_mut(vocab).zip(targets).map(|(row, &target)| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let at_target = f64::from(row[target as usize] - max);
            row.iter_mut().for_each(|v| *v = (*v - max).exp());
            let sum: f64 = row.iter().map(|&v| f64::from(v)).sum();
            let scale = (1.0 / (sum * count as f64)) as f32;
            row.iter_mut().for_each(|v| *v *= scale);
            row[target as usize] -= 1.0 / count as f32;
            sum.ln() - at_target
        });
        // Collected first: a parallel sum would depend on the number of threads.
        loss += losses.collect::<Vec<f64>>().iter().sum::<f64>() / count as f64;
        gradients.push(tensor(values, logits.shape().clone())?.matmul(head)?);
    }
    Ok((loss, Tensor::cat(&gradients, 0)?))
}

/// A block under rotations.
struct Rotated<'a> {
    net: &'a Net<'a>,
    layer: &'a Layer,
    /// `[hidden, hidden]`.
    r1: &'a Tensor,
    /// `[head_dim, head_dim]`.
    r2: &'a Tensor,
}

impl Rotated<'_> {
    fn quantize(&self, x: Tensor, bits: u8, clip: f32) -> Candle<Tensor> {
        if bits == 16 { Ok(x) } else { rows(&x, FakeQuant { bits, clip, through_range: false }) }
    }

    /// The rotations of a layer's input and output.
    fn sides(&self, index: usize) -> (Option<&Tensor>, Option<&Tensor>) {
        match index {
            V => (Some(self.r1), Some(self.r2)),
            O => (Some(self.r2), Some(self.r1)),
            DOWN => (None, Some(self.r1)),
            _ => (Some(self.r1), None),
        }
    }
}

impl Parts for Rotated<'_> {
    fn site(&self, site: Site, x: &Tensor) -> Candle<Tensor> {
        let config = self.net.config;
        let x = match (site, &self.net.r4t) {
            (Site::Down, Some(r4t)) => rotate_fixed(x, r4t)?,
            _ => x.clone(),
        };
        let x = self.quantize(x, config.act_bits, config.act_clip)?;
        match site {
            // Full-precision weights stay as they are, and the input turns back to them.
            Site::Qkv | Site::GateUp if config.weight_bits == 16 => rotate(&x, &self.r1.t()?),
            Site::O if config.weight_bits == 16 => rotate(&x, &self.r2.t()?),
            _ => Ok(x),
        }
    }

    fn linear(&self, index: usize, x: &Tensor) -> Candle<Tensor> {
        let dense = &self.layer.linears[index];
        let (before, after) = self.sides(index);
        if self.net.config.weight_bits == 16 {
            let y = dense.forward(x)?;
            return after.map_or(Ok(y.clone()), |r| rotate(&y, r));
        }
        let mut weight = dense.weight.clone();
        let mut bias = dense.bias.clone();
        if let Some(r) = after {
            weight = rotate(&weight.t()?, r)?.t()?;
            bias = bias.map(|b| rotate(&b, r)).transpose()?;
        }
        if let Some(r) = before {
            weight = rotate(&weight, r)?;
        }
        let weight = rows(&weight, FakeQuantWeight { bits: self.net.config.weight_bits })?;
        add_bias(x.matmul(&weight.t()?)?, bias.as_ref())
    }

    fn cached(&self, index: usize, x: Tensor) -> Candle<Tensor> {
        let config = self.net.config;
        let x = match (index, &self.net.r3t) {
            (Q | K, Some(r3t)) => rotate_fixed(&x, r3t)?,
            _ => x,
        };
        if index == Q { Ok(x) } else { self.quantize(x, config.kv_bits, config.kv_clip) }
    }

    fn head_norm(&self, index: usize) -> Option<&Tensor> {
        match index {
            Q => self.layer.q_norm.as_ref(),
            K => self.layer.k_norm.as_ref(),
            _ => None,
        }
    }

    /// [`Net::load`] refuses a model that has one.
    fn out_norm(&self, _: usize) -> Option<&Tensor> {
        None
    }
}

#[cfg(test)]
pub(crate) mod tests;
