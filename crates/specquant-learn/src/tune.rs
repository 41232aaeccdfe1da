//! Tuning of a quantized model on the predictions of the model that it came from.
//!
//! The 4-bit codes stay. What is learned is what is stored beside them in more bits, and costs nothing more at run time than it did: a factor of
//! every output channel's scale, the columns that read the kept coordinates of an input, and the weights of the norms. They minimize, with Adam,
//!
//! ```text
//! Σ_t KL(p_t ‖ q_t) / T,    p, q: next-token probabilities of the model in full precision and of the quantized one
//! ```
//!
//! over whole sequences, through every block. The quantizers of activations, keys and values run as the engine's do, and the gradient passes through
//! them unchanged ("straight through", Bengio et al., arXiv 1308.3432); so it does through the rounding of the kept columns to 8 bits.
//! End-to-end tuning of quantization parameters is EfficientQAT's second phase (arXiv 2407.11062, section 3.3), on text instead of predictions;
//! here the kept columns make up a low-rank branch besides, whose other factor is fixed.
//!
//! The weights are held in f32 twice, as they are and transposed, and so is what the backward pass needs of every block: this is for models of which
//! memory holds eight bytes a weight.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use specquant_kernels::{KvFormat, matmul_packed};
use specquant_model::{Block, Embedding, Head, Linear, Model, QuantizationConfig, Source};

use crate::adam::Adam;
use crate::error::{Error, Result, check_positive};
use crate::ops::{RmsNorm, backward, forward};
use block::{BothWays, Layer, column_products, scaled};

mod block;

/// Rows of logits at a time.
const LOGIT_ROWS: usize = 64;

/// Settings of [`tune`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TuneConfig {
    /// Steps of the optimizer, a sequence each.
    pub steps: usize,
    /// Learning rate of the factors of scales.
    pub scale_lr: f64,
    /// Learning rate of the kept columns, of their root mean square.
    pub kept_lr: f64,
    /// Learning rate of the norms' weights, of their root mean square.
    pub norm_lr: f64,
}

impl Default for TuneConfig {
    fn default() -> Self {
        TuneConfig { steps: 128, scale_lr: 5e-4, kept_lr: 1e-3, norm_lr: 5e-4 }
    }
}

/// What was learned of a block.
#[derive(Debug, Clone, PartialEq)]
pub struct TunedBlock {
    /// Weights of the norms before attention and MLP, `[hidden]`.
    pub norms: [Vec<f32>; 2],
    /// What the scales of every output channel are multiplied by, `[out]`, in the order of [`specquant_model::ModelConfig::linear_shapes`].
    pub factors: [Vec<f32>; 7],
    /// The columns that read kept coordinates, `[out, r]`, before they are rounded to 8 bits; empty where nothing is kept.
    pub kept: [Vec<f32>; 7],
}

/// What [`tune`] learned.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuned {
    /// Every block.
    pub blocks: Vec<TunedBlock>,
    /// Weight of the last norm, `[hidden]`.
    pub norm: Vec<f32>,
}

/// A learned vector.
struct Param {
    values: Vec<f32>,
    optimizer: Adam,
}

impl Param {
    /// lr: of the values' root mean square.
    fn new(values: Vec<f32>, lr: f64) -> Self {
        let mean = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len().max(1) as f64;
        let optimizer = Adam::new(lr * mean.sqrt(), values.len());
        Param { values, optimizer }
    }

    fn step(&mut self, rate: f64, gradient: &[f32]) {
        self.optimizer.step(rate, &mut self.values, gradient);
    }
}

/// Tunes the checkpoint `student` on what `teacher` predicts; step i on `texts[i]`, from the first again after the last. `progress` is told step and loss.
///
/// # Errors
/// [`Error::NoText`] without a sequence of two tokens; [`Error::Model`] when a model cannot be read; [`Error::NotFinite`] when the loss overflows.
pub fn tune(
    teacher: &Model,
    student: &Source,
    texts: &[Vec<u32>],
    config: &TuneConfig,
    progress: &mut dyn FnMut(usize, f64),
) -> Result<Tuned> {
    for (name, value) in [
        ("steps", config.steps as f64),
        ("scale_lr", config.scale_lr),
        ("kept_lr", config.kept_lr),
        ("norm_lr", config.norm_lr),
    ] {
        check_positive(name, value, f64::MAX, "positive and finite")?;
    }
    let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).filter(|t| !t.is_empty()).collect();
    let longest = texts.iter().map(|t| t.len()).max().ok_or(Error::NoText(1))?;
    let mut net = Net::load(student, longest, config)?;
    for step in 0..config.steps {
        let tokens = texts[step % texts.len()];
        let loss = net.step(teacher, tokens, rate(step, config.steps))?;
        if !loss.is_finite() {
            return Err(Error::NotFinite { what: "the loss", value: loss, step });
        }
        progress(step, loss);
    }
    let blocks = net.layers.into_iter().map(Layer::learned).collect();
    Ok(Tuned { blocks, norm: net.norm.values })
}

/// Share of the learning rate at a step: it rises over the first twentieth and falls to nothing along half a cosine.
fn rate(step: usize, steps: usize) -> f64 {
    let warm = (steps / 20).max(1);
    let rise = ((step + 1) as f64 / warm as f64).min(1.0);
    let along = step as f64 / steps as f64;
    rise * 0.5 * (1.0 + (std::f64::consts::PI * along).cos())
}

/// A quantized model.
struct Net {
    eps: f32,
    hidden: usize,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: Param,
    /// `[vocab, hidden]`.
    head: BothWays,
}

impl Net {
    fn load(source: &Source, longest: usize, config: &TuneConfig) -> Result<Self> {
        let model = source.config();
        let quantization = QuantizationConfig::from_config(source.config_json(), source.path())?;
        let kv = quantization.as_ref().map_or(KvFormat::F32, |q| q.scheme.kv_format());
        let layers = (0..model.num_layers).map(|index| {
            Layer::new(Block::read(source, index, quantization.as_ref())?, model, longest, kv, config)
        });
        let layers = layers.collect::<Result<_>>()?;
        let Head { norm, mut linear } = Head::read(source)?;
        linear.widen()?;
        let head = match &linear {
            Linear::Quantized(head) => head.weights.dequantize(),
            dense => dense.dense().map(|(w, _)| w.to_vec()).unwrap_or_default(),
        };
        let hidden = model.hidden_size;
        Ok(Net {
            eps: model.rms_norm_eps,
            hidden,
            embedding: Embedding::read(source)?,
            layers,
            norm: Param::new(norm, config.norm_lr),
            head: BothWays::pack(&head, model.vocab_size, hidden),
        })
    }

    /// One step of the optimizer at `rate` of the learning rates; the loss before it.
    fn step(&mut self, teacher: &Model, tokens: &[u32], rate: f64) -> Result<f64> {
        let (norm, hidden) = (RmsNorm { eps: self.eps }, self.hidden);
        let mut x = self.embedding.lookup(tokens, hidden)?;
        let mut passed = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let (y, saved) = layer.forward(&x);
            passed.push(saved);
            x = y;
        }
        let normed = forward(&norm, &x, hidden);
        let last = scaled(&normed, &self.norm.values);
        let want = teacher.hidden(&mut [(&mut teacher.sequence(), tokens)])?;
        let (loss, g) = divergence(&self.head, teacher, &want, &last)?;
        let by_normed = scaled(&g, &self.norm.values);
        self.norm.step(rate, &column_products(&g, &normed, hidden));
        let mut g = backward(&norm, &x, &normed, &by_normed, hidden);
        for (layer, saved) in self.layers.iter_mut().zip(passed).rev() {
            let (gx, by_params) = layer.backward(&saved, g);
            for (param, gradient) in layer.params.iter_mut().zip(&by_params) {
                param.step(rate, gradient);
            }
            g = gx;
        }
        Ok(loss)
    }
}

/// Mean KL divergence, and its gradient by `got`. want: the teacher's hidden states, got: ours, `[tokens, hidden]` both;
/// head: ours, `[vocab, hidden]`.
fn divergence(head: &BothWays, teacher: &Model, want: &[f32], got: &[f32]) -> Result<(f64, Vec<f32>)> {
    let hidden = head.forward.in_features();
    let (count, vocab) = (got.len() / hidden, head.forward.out_features());
    let (mut loss, mut gradient) = (0.0, vec![0.0; got.len()]);
    let chunks = want.chunks(LOGIT_ROWS * hidden).zip(got.chunks(LOGIT_ROWS * hidden));
    for ((want, got), gradient) in chunks.zip(gradient.chunks_mut(LOGIT_ROWS * hidden)) {
        let rows = got.len() / hidden;
        let want = teacher.logits(want)?;
        let mut logits = vec![0.0; rows * vocab];
        matmul_packed(got, &head.forward, &mut logits, rows);
        let losses = logits.par_chunks_exact_mut(vocab).zip(want.par_chunks_exact(vocab));
        let losses = losses.map(|(q, p)| {
            let (log_p, log_q) = (log_sum_exp(p), log_sum_exp(q));
            let mut kl = 0.0;
            for (q, p) in q.iter_mut().zip(p) {
                let (lp, lq) = (p - log_p, *q - log_q);
                let weight = lp.exp();
                kl += f64::from(weight * (lp - lq));
                *q = (lq.exp() - weight) / count as f32;
            }
            kl
        });
        // Collected first: a parallel sum would depend on the number of threads.
        loss += losses.collect::<Vec<f64>>().iter().sum::<f64>() / count as f64;
        matmul_packed(&logits, &head.backward, gradient, rows);
    }
    Ok((loss, gradient))
}

/// ln Σ eˣ.
fn log_sum_exp(x: &[f32]) -> f32 {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = x.iter().map(|x| f64::from((x - max).exp())).sum();
    max + sum.ln() as f32
}

#[cfg(test)]
mod tests;
