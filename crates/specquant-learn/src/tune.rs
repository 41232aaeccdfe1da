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
//! Memory holds the quantized model, what is learned of it, and one block's activations: the inputs of all blocks stay from the forward pass, and each block runs once
//! more before its gradient (Chen et al., arXiv 1604.06174). The teacher reads its weights from its file, block by block, for a few sequences at once.

use serde::{Deserialize, Serialize};
use specquant_kernels::{
    Buffer, KvFormat, PackedDense, exp_in_place, for_each_chunk, for_each_chunk_pair, matmul_packed,
    trim_buffers,
};
use specquant_model::{Block, Embedding, Head, Linear, Model, ModelConfig, QuantizationConfig, Source};

use crate::adam::Adam;
use crate::error::{Error, Result, check_len, check_positive};
use crate::ops::{RmsNorm, backward, forward};
use block::{Layer, column_products, scaled};

mod attention;
mod block;

/// Logits at a time, of each of the two models, so that the head's weights are read once for many tokens.
const LOGITS: usize = 1 << 23;
/// Rows of them at least.
const LOGIT_ROWS: usize = 64;
/// Tokens that the teacher reads at once.
const TEACHER_ROWS: usize = 2048;
/// The factor of a scale at least: scales are positive.
const MIN_FACTOR: f32 = 0.01;

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
    /// Learning rate of the norms' weights, of their root mean square; of each weight itself in a model with norms behind attention and MLP.
    pub norm_lr: f64,
}

impl Default for TuneConfig {
    fn default() -> Self {
        TuneConfig { steps: 128, scale_lr: 5e-4, kept_lr: 1e-3, norm_lr: 5e-4 }
    }
}

impl TuneConfig {
    /// Checks every setting.
    ///
    /// # Errors
    /// [`Error::Config`] names the first that is out of range.
    pub fn validate(&self) -> Result<()> {
        check_positive("steps", self.steps as f64, MAX_STEPS, "1 to a million")?;
        for (name, rate) in
            [("scale_lr", self.scale_lr), ("kept_lr", self.kept_lr), ("norm_lr", self.norm_lr)]
        {
            if !(rate >= 0.0 && rate.is_finite()) {
                let allowed = "finite and not negative; 0 learns nothing";
                return Err(Error::Config { name, value: rate.to_string(), allowed });
            }
        }
        Ok(())
    }
}

/// Steps at most.
const MAX_STEPS: f64 = 1e6;

/// What was learned of a block.
#[derive(Debug, Clone, PartialEq)]
pub struct TunedBlock {
    /// Weights of the norms, `[hidden]` each: those before attention and MLP, and those of what they put out where there are such. In the order
    /// of [`specquant_model::ModelConfig::norm_shapes`].
    pub norms: Vec<Vec<f32>>,
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
    least: f32,
    /// What a value's learning rate is relative to, each its own; empty: one rate for all.
    units: Vec<f32>,
}

impl Param {
    /// lr: of the values' root mean square; least: what values do not fall below.
    fn new(values: Vec<f32>, lr: f64, least: f32) -> Self {
        let mean = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len().max(1) as f64;
        let optimizer = Adam::new(lr * mean.sqrt(), values.len());
        Param { values, optimizer, least, units: Vec::new() }
    }

    /// A norm's weight. Gemma's differ by three orders of magnitude within a norm, so that steps relative to their root mean square, which is right for
    /// others, would be as large as most of the values: there each learns relative to its own size.
    fn norm(values: Vec<f32>, model: &ModelConfig, lr: f64) -> Self {
        if !model.post_norms {
            return Param::new(values, lr, f32::NEG_INFINITY);
        }
        let optimizer = Adam::new(lr, values.len());
        Param { units: values.iter().map(|w| w.abs()).collect(), values, optimizer, least: f32::NEG_INFINITY }
    }

    fn step(&mut self, rate: f64, gradient: &[f32]) {
        if self.units.is_empty() {
            self.optimizer.step(rate, &mut self.values, gradient);
        } else {
            // Adam does not see the size of a gradient: a step of a factor is a step of what it multiplies, times that.
            let mut steps = vec![0.0; self.values.len()];
            self.optimizer.step(rate, &mut steps, gradient);
            self.values
                .iter_mut()
                .zip(steps)
                .zip(&self.units)
                .for_each(|((v, step), unit)| *v += step * unit);
        }
        // `max` would turn a NaN into the least, and hide it.
        self.values.iter_mut().filter(|v| **v < self.least).for_each(|v| *v = self.least);
    }
}

/// Tunes the checkpoint `student` on what `teacher` predicts; step i on `texts[i]`, from the first again after the last. `progress` is told step and loss.
///
/// # Errors
/// As [`Tuning`]'s.
pub fn tune(
    teacher: &Source,
    student: &Source,
    texts: &[Vec<u32>],
    config: &TuneConfig,
    progress: &mut dyn FnMut(usize, f64),
) -> Result<Tuned> {
    let mut tuning = Tuning::new(teacher, student, texts, config)?;
    while tuning.advance(progress)? {}
    tuning.finish()
}

/// [`tune`] under way: it can be stopped, and continued from its state.
pub struct Tuning<'a> {
    teacher: Teacher,
    net: Net,
    /// The text of every step.
    order: Vec<&'a [u32]>,
    /// Steps whose texts the teacher reads at once.
    batch: usize,
    step: usize,
}

impl<'a> Tuning<'a> {
    /// As [`tune`], before the first step.
    ///
    /// # Errors
    /// [`Error::Config`] for settings out of range; [`Error::NoText`] where every text is empty; [`Error::NotQuantized`] and [`Error::Untunable`] for a student
    /// that is no quantized model, or not one of codes, kept columns and norms alone; [`Error::Model`] when a model cannot be read.
    pub fn new(
        teacher: &Source,
        student: &Source,
        texts: &'a [Vec<u32>],
        config: &TuneConfig,
    ) -> Result<Self> {
        config.validate()?;
        let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).filter(|t| !t.is_empty()).collect();
        let longest = texts.iter().map(|t| t.len()).max().ok_or(Error::NoText(1))?;
        let net = Net::load(student, longest, config)?;
        let teacher = Teacher::load(teacher)?;
        let order = texts.iter().cycle().take(config.steps).copied().collect();
        Ok(Tuning { teacher, net, order, batch: (TEACHER_ROWS / longest).max(1), step: 0 })
    }

    /// Takes the next steps, and tells `progress` the number and the loss of each; `false` if none is left.
    ///
    /// # Errors
    /// [`Error::Model`] when a model cannot be run; [`Error::NotFinite`] when the loss overflows.
    pub fn advance(&mut self, progress: &mut dyn FnMut(usize, f64)) -> Result<bool> {
        let steps = self.order.len();
        let texts = &self.order[self.step..steps.min(self.step + self.batch)];
        // What a step leaves is large, and the teacher's buffers are of other sizes.
        trim_buffers();
        for (tokens, want) in texts.iter().zip(self.teacher.read(texts)?) {
            let loss = self.net.step(&self.teacher, tokens, &want, rate(self.step, steps))?;
            if !loss.is_finite() {
                return Err(Error::NotFinite { what: "the loss", value: loss, step: self.step });
            }
            progress(self.step, loss);
            self.step += 1;
        }
        Ok(self.step < steps)
    }

    fn params(&self) -> impl Iterator<Item = &Param> {
        self.net.layers.iter().flat_map(|layer| &layer.params).chain([&self.net.norm])
    }

    /// All that the next steps depend on: of every parameter its values, and the two moments of Adam.
    pub fn state(&self) -> Vec<f64> {
        let mut state = Vec::new();
        for param in self.params() {
            state.extend(param.values.iter().map(|v| f64::from(*v)));
            state.extend(param.optimizer.moments());
        }
        state
    }

    /// Goes on behind `step` steps, from the [`Tuning::state`] between two calls of [`Tuning::advance`].
    ///
    /// # Errors
    /// [`Error::Shape`] for the state of another model.
    pub fn restore(&mut self, step: usize, state: &[f64]) -> Result<()> {
        let values: usize = self.params().map(|param| 3 * param.values.len()).sum();
        check_len("the state of the tuning", state.len(), &[values])?;
        self.step = step.min(self.order.len());
        let mut rest = state;
        let params = self.net.layers.iter_mut().flat_map(|layer| &mut layer.params);
        for param in params.chain([&mut self.net.norm]) {
            let (values, after) = rest.split_at(param.values.len());
            let (moments, after) = after.split_at(2 * values.len());
            param.values.iter_mut().zip(values).for_each(|(to, v)| *to = *v as f32);
            param.optimizer.restore(step, moments);
            rest = after;
        }
        Ok(())
    }

    /// What was learned.
    ///
    /// # Errors
    /// [`Error::NotFinite`] when it overflows.
    pub fn finish(self) -> Result<Tuned> {
        if let Some(value) = self.params().flat_map(|param| &param.values).find(|v| !v.is_finite()) {
            let value = f64::from(*value);
            return Err(Error::NotFinite { what: "what was learned", value, step: self.step });
        }
        let blocks = self.net.layers.into_iter().map(Layer::learned).collect();
        Ok(Tuned { blocks, norm: self.net.norm.values })
    }
}

/// The model that is learned from.
struct Teacher {
    model: Model,
    /// `[vocab, hidden]`, without the norm before it.
    head: Linear,
}

impl Teacher {
    fn load(source: &Source) -> Result<Self> {
        let Head { linear: mut head, .. } = Head::read(source)?;
        head.pack()?;
        Ok(Teacher { model: Model::load(source)?, head })
    }

    /// The last hidden states of some texts, `[tokens, hidden]` each.
    fn read(&mut self, texts: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let mut sequences: Vec<_> = texts.iter().map(|_| self.model.sequence()).collect();
        let mut batch: Vec<_> = sequences.iter_mut().zip(texts.iter().copied()).collect();
        let hidden = self.model.hidden(&mut batch)?;
        let mut rest = &*hidden;
        let split = |text: &&[u32]| {
            let (first, after) = rest.split_at(text.len() * self.model.config.hidden_size);
            rest = after;
            first.to_vec()
        };
        Ok(texts.iter().map(split).collect())
    }
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
    model: ModelConfig,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: Param,
    head: BothWays,
}

/// A matrix `[out, in]`, packed for products with it and with its transpose.
struct BothWays {
    forward: PackedDense,
    backward: PackedDense,
}

impl BothWays {
    fn pack(w: &[f32], out: usize, inp: usize) -> Self {
        BothWays {
            forward: PackedDense::pack(w, out, inp),
            backward: PackedDense::pack_transposed(w, inp, out),
        }
    }
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
        let head = linear.dense_mut().map(|(w, _)| std::mem::take(w)).unwrap_or_default();
        let hidden = model.hidden_size;
        Ok(Net {
            model: model.clone(),
            embedding: Embedding::read(source)?,
            layers,
            norm: Param::norm(norm, model, config.norm_lr),
            head: BothWays::pack(&head, model.vocab_size, hidden),
        })
    }

    /// One step of the optimizer at `rate` of the learning rates; the loss before it. want: of [`Teacher::read`].
    fn step(&mut self, teacher: &Teacher, tokens: &[u32], want: &[f32], rate: f64) -> Result<f64> {
        let (norm, hidden) = (RmsNorm { eps: self.model.rms_norm_eps }, self.model.hidden_size);
        let mut x = self.embedding.lookup(tokens, &self.model)?;
        let mut passed = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let (y, _) = layer.forward(&x);
            passed.push(std::mem::replace(&mut x, y));
        }
        let normed = forward(&norm, &x, hidden);
        let last = scaled(&normed, &self.norm.values);
        let (loss, g) = divergence(&self.head, &teacher.head, want, &last)?;
        // The logits are larger than anything that a block needs.
        trim_buffers();
        let by_normed = scaled(&g, &self.norm.values);
        self.norm.step(rate, &column_products(&g, &normed, hidden));
        let mut g = backward(&norm, [&x, &normed, &by_normed], hidden);
        for (layer, x) in self.layers.iter_mut().zip(passed).rev() {
            let (_, saved) = layer.forward(&x);
            let (gx, by_params) = layer.backward(&saved, &g);
            for_each_chunk(&mut layer.params, 1, |i, param| param[0].step(rate, &by_params[i]));
            g = gx;
        }
        Ok(loss)
    }
}

/// Mean KL divergence, and its gradient by `got`. want: the teacher's hidden states, got: ours, `[tokens, hidden]` both;
/// head: ours, `[vocab, hidden]`.
fn divergence(head: &BothWays, teacher: &Linear, want: &[f32], got: &[f32]) -> Result<(f64, Buffer<f32>)> {
    let (vocab, hidden) = (teacher.out_features(), teacher.in_features());
    let count = got.len() / hidden;
    let (mut losses, mut gradient) = (vec![0.0; count], Buffer::new(got.len()));
    let some = (LOGITS / vocab).max(LOGIT_ROWS);
    let chunks = want.chunks(some * hidden).zip(got.chunks(some * hidden));
    for (((want, got), gradient), losses) in
        chunks.zip(gradient.chunks_mut(some * hidden)).zip(losses.chunks_mut(some))
    {
        let rows = got.len() / hidden;
        let want = teacher.forward(want, rows)?;
        let mut logits = Buffer::new(rows * vocab);
        matmul_packed(got, &head.forward, &mut logits, rows);
        for_each_chunk_pair((&mut logits, vocab), (losses, 1), |row, q, kl| {
            let (mut log_p, mut log_r) = (Buffer::from(&want[row * vocab..][..vocab]), Buffer::from(&*q));
            let (p, r) = (log_softmax(&mut log_p), log_softmax(&mut log_r));
            let logs = log_p.iter().zip(&log_r);
            kl[0] = p.iter().zip(logs).map(|(p, (log_p, log_r))| f64::from(p * (log_p - log_r))).sum();
            q.iter_mut()
                .zip(p.iter().zip(&r))
                .for_each(|(gradient, (p, r))| *gradient = (r - p) / count as f32);
        });
        matmul_packed(&logits, &head.backward, gradient, rows);
    }
    // In one order, whatever the number of threads.
    Ok((losses.iter().sum::<f64>() / count as f64, gradient))
}

/// Softmax of x, whose logarithm takes the place of x.
fn log_softmax(x: &mut [f32]) -> Buffer<f32> {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|x| *x -= max);
    let mut powers = Buffer::from(&*x);
    exp_in_place(&mut powers);
    let sum: f64 = powers.iter().map(|p| f64::from(*p)).sum();
    let (factor, log_sum) = ((1.0 / sum) as f32, sum.ln() as f32);
    powers.iter_mut().for_each(|p| *p *= factor);
    x.iter_mut().for_each(|l| *l -= log_sum);
    powers
}

#[cfg(test)]
mod tests;
