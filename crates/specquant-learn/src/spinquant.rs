//! SpinQuant: rotations learned on the quantized model's own loss.
//!
//! arXiv 2405.16406, section 3; constants and order of operations from its code (optimize_rotation.py, train_utils/). The residual
//! stream is rotated by R1 `[hidden, hidden]`, the values of every head by R2 `[head_dim, head_dim]`, one a layer; both fold into the
//! weights. Two fixed rotations may stay online: R3 on queries and keys after the rotary embedding, R4 before `down_proj`. Every
//! rotation leaves the full-precision function alone, but not the quantized one: R1 and R2 minimize its next-token cross-entropy
//! by Cayley SGD, the quantizers' gradient being the straight-through one.
//!
//! ```text
//! x ← E R1      q, k, v, gate, up: W γ R1      o, down: R1ᵀ W      head: W γ R1      γ: the weight of the norm before
//! v of a head: W_v ← R2ᵀ W_v     o: W_o ← W_o R2     down: W ← W R4, its input x ← x R4
//! ```
//!
//! With 16-bit weights, the default, no weight is rotated: `Q(x) (W R1)ᵀ = (Q(x) R1ᵀ) Wᵀ` moves R1 to the activations, which are
//! fewer than the weights as long as a sequence has fewer tokens than the layer has channels. The gradients by R1 and R2 are the same,
//! on the manifold and off it.
//!
//! Memory: the weights in f32, one block's graph (the backward pass computes a block again from its stored input) and one
//! `[tokens, hidden]` a block.
//!
//! Deviations: one gradient a step is the mean over `samples_per_step` sequences on one machine, not over 8 devices; f32, where the
//! code has bf16 and rotates weights in f64; the input of `o_proj` is quantized per token as everything else, not per head; weights,
//! if quantized at all, by their largest magnitude without a clip search; a last orthonormalization, since five fixed-point
//! iterations leave a small error and what folds into weights must not.

use candle_core::Tensor;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use specquant_model::{ModelConfig, Source};

use crate::error::{Error, Result, check_bits, check_len, check_positive};
use crate::net::Net;
use crate::ops::{tensor, to_vec};
use crate::stiefel::{cayley_step, deviation, orthonormal};

/// Settings of [`spinquant`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpinQuantConfig {
    /// Steps of gradient descent.
    pub steps: usize,
    /// Sequences whose gradients a step averages.
    pub samples_per_step: usize,
    /// Tokens of a sequence; longer texts are cut into several.
    pub sequence_length: usize,
    /// Learning rate of the first step; it falls to 0 as half a cosine. Paper: 1.5.
    pub learning_rate: f64,
    /// The gradient is scaled down to this Euclidean norm over all rotations (`transformers.TrainingArguments`, which SpinQuant's
    /// script leaves at 1).
    pub max_grad_norm: f64,
    /// Of the order of sequences and the random retractions.
    pub seed: u64,
    /// Bits of the weights in the loss. 16, full precision, where GPTQ is to follow (SpinQuant's README, "Note").
    pub weight_bits: u8,
    /// Bits of the linear layers' inputs, asymmetric per token.
    pub act_bits: u8,
    /// Bits of keys and values, asymmetric per token and head.
    pub kv_bits: u8,
    /// Clip ratio of the inputs. SpinQuant: 1.
    pub act_clip: f32,
    /// Clip ratio of keys and values. SpinQuant: 1.
    pub kv_clip: f32,
}

impl Default for SpinQuantConfig {
    /// Sized for a CPU: 50 sequences of 256 tokens, a 128th of the published tokens; the rest as published.
    fn default() -> Self {
        SpinQuantConfig {
            steps: 50,
            samples_per_step: 1,
            sequence_length: 256,
            learning_rate: 1.5,
            max_grad_norm: 1.0,
            seed: 0,
            weight_bits: 16,
            act_bits: 4,
            kv_bits: 4,
            act_clip: 1.0,
            kv_clip: 1.0,
        }
    }
}

impl SpinQuantConfig {
    /// As published: 100 steps of 8 sequences of 2048 tokens (scripts/10_optimize_rotation.sh).
    pub fn paper() -> Self {
        SpinQuantConfig { steps: 100, samples_per_step: 8, sequence_length: 2048, ..Self::default() }
    }

    fn validate(&self) -> Result<()> {
        for (name, value, least) in
            [("samples_per_step", self.samples_per_step, 1), ("sequence_length", self.sequence_length, 2)]
        {
            if value < least {
                return Err(Error::Config {
                    name,
                    value: value.to_string(),
                    allowed: "at least 1 sample of 2 tokens",
                });
            }
        }
        check_positive("learning_rate", self.learning_rate, f64::MAX, "positive and finite")?;
        check_positive("max_grad_norm", self.max_grad_norm, f64::MAX, "positive and finite")?;
        check_positive("act_clip", self.act_clip.into(), 1.0, "in (0, 1]")?;
        check_positive("kv_clip", self.kv_clip.into(), 1.0, "in (0, 1]")?;
        check_bits("weight_bits", self.weight_bits)?;
        check_bits("act_bits", self.act_bits)?;
        check_bits("kv_bits", self.kv_bits)
    }
}

/// Where learning starts, and the rotations that stay as they are. All are orthonormal, row-major, and multiply rows from the
/// right.
#[derive(Debug, Clone, Default)]
pub struct Start {
    /// `[hidden, hidden]`. Published: a random Hadamard matrix.
    pub r1: Vec<f32>,
    /// `[head_dim, head_dim]` for every layer. Published: random Hadamard matrices.
    pub r2: Vec<Vec<f32>>,
    /// On queries and keys after the rotary embedding, `[head_dim, head_dim]`. Published: the Hadamard matrix.
    pub r3: Option<Vec<f32>>,
    /// On the input of `down_proj`, `[b, b]` for each run of b channels; b divides the intermediate size, and is that size for a
    /// full rotation. Published: the Hadamard matrix.
    pub r4: Option<Vec<f32>>,
}

/// What [`spinquant`] learned.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotations {
    /// `[hidden, hidden]`, orthonormal.
    pub r1: Vec<f32>,
    /// `[head_dim, head_dim]` for every layer, orthonormal.
    pub r2: Vec<Vec<f32>>,
    /// Mean cross-entropy of every step before its update, in nats a token.
    pub losses: Vec<f64>,
}

/// Learns the rotations of a model.
///
/// texts: token ids, the longer the better; each is cut into sequences of `sequence_length` tokens, whose order the seed
/// decides; when all have been seen they are shuffled again. `progress` is told every step's number, from 0, and its loss.
///
/// # Errors
/// [`Error::Config`], [`Error::Shape`], [`Error::NotOrthonormal`] and [`Error::NoText`] for what is given; [`Error::Model`] for a
/// damaged model or a token id outside its vocabulary; [`Error::NotFinite`] when the loss overflows.
pub fn spinquant(
    source: &Source,
    texts: &[Vec<u32>],
    config: &SpinQuantConfig,
    start: Start,
    progress: &mut dyn FnMut(usize, f64),
) -> Result<Rotations> {
    config.validate()?;
    let sequences = cut(texts, config.sequence_length)?;
    let vocab = source.config().vocab_size;
    if let Some(&id) = sequences.iter().copied().flatten().find(|id| **id as usize >= vocab) {
        return Err(specquant_model::Error::TokenId { id, vocab }.into());
    }
    let mut rotations = start.check(source.config())?;
    let longest = sequences.iter().map(|s| s.len()).max().unwrap_or_default();
    let net = Net::load(source, config, longest, start.r3.as_deref(), start.r4.as_deref())?;
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    let mut order: Vec<usize> = Vec::new();
    let mut losses = Vec::new();
    for step in 0..config.steps {
        let (mut loss, mut gradients) = (0.0, Vec::new());
        for _ in 0..config.samples_per_step {
            if order.is_empty() {
                order = (0..sequences.len()).collect();
                order.shuffle(&mut rng);
            }
            let next = order.pop().unwrap_or_default();
            let (sample_loss, sample) = net.gradients(sequences[next], &rotations)?;
            loss += sample_loss / config.samples_per_step as f64;
            gradients = match gradients.is_empty() {
                true => sample,
                false => gradients.iter().zip(&sample).map(|(a, b)| a + b).collect::<Result<_, _>>()?,
            };
        }
        if !loss.is_finite() {
            return Err(Error::NotFinite { what: "the loss", value: loss, step });
        }
        losses.push(loss);
        progress(step, loss);

        // Sums over the samples are turned into means, and clipped.
        let mean = 1.0 / config.samples_per_step as f64;
        let norm = mean * norm(&gradients)?;
        if !norm.is_finite() {
            return Err(Error::NotFinite { what: "the gradient", value: norm, step });
        }
        let scale = mean * (config.max_grad_norm / (norm + 1e-6)).min(1.0);
        let done = step as f64 / config.steps as f64;
        let lr = config.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        for (r, g) in rotations.iter_mut().zip(&gradients) {
            // `random.randint(1, 101) == 1` of SGDG.
            *r = cayley_step(r, &(g * scale)?, lr, rng.random_range(1..=101) == 1)?;
        }
    }
    let exact = |r: &Tensor| -> Result<Vec<f32>> { Ok(to_vec(&orthonormal(r)?)?) };
    let mut learned = rotations.iter().map(exact).collect::<Result<Vec<_>>>()?.into_iter();
    Ok(Rotations { r1: learned.next().unwrap_or_default(), r2: learned.collect(), losses })
}

/// The Euclidean norm of several tensors together.
fn norm(tensors: &[Tensor]) -> Result<f64> {
    let square = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>();
    let squares = tensors.iter().map(square).collect::<Result<Vec<f32>, _>>()?;
    Ok(squares.into_iter().map(f64::from).sum::<f64>().sqrt())
}

/// Cuts texts into sequences. A remainder is left out, unless it is all there is of its text; one token predicts nothing.
fn cut(texts: &[Vec<u32>], length: usize) -> Result<Vec<&[u32]>> {
    let pieces = texts.iter().flat_map(|text| {
        let whole = text.len() / length * length;
        if whole == 0 { text.chunks(length) } else { text[..whole].chunks(length) }
    });
    let sequences: Vec<&[u32]> = pieces.filter(|piece| piece.len() >= 2).collect();
    if sequences.is_empty() { Err(Error::NoText(2)) } else { Ok(sequences) }
}

impl Start {
    /// Checks every matrix; returns R1 and every R2.
    fn check(&self, config: &ModelConfig) -> Result<Vec<Tensor>> {
        let (hidden, head, inner) = (config.hidden_size, config.head_dim, config.intermediate_size);
        check_len("r2", self.r2.len(), &[config.num_layers])?;
        let r2 = self.r2.iter().enumerate().map(|(layer, r)| (format!("r2 of layer {layer}"), r, head));
        let learned = std::iter::once(("r1".to_owned(), &self.r1, hidden)).chain(r2);
        let learned = learned.map(|(what, r, n)| rotation(what, r, n)).collect::<Result<Vec<_>>>()?;
        if let Some(r3) = &self.r3 {
            rotation("r3".into(), r3, head)?;
        }
        if let Some(r4) = &self.r4 {
            let b = r4.len().isqrt();
            if b == 0 || !inner.is_multiple_of(b) {
                check_len("r4", r4.len(), &[inner, inner])?;
            }
            rotation("r4".into(), r4, b)?;
        }
        Ok(learned)
    }
}

/// A rotation, `[n, n]`, as a tensor.
fn rotation(what: String, values: &[f32], n: usize) -> Result<Tensor> {
    check_len(what.clone(), values.len(), &[n, n])?;
    let r = tensor(values.to_vec(), (n, n))?;
    // A maximum passes over NaN.
    let error = if values.iter().all(|v| v.is_finite()) { deviation(&r)? } else { f32::NAN };
    if error <= 1e-3 { Ok(r) } else { Err(Error::NotOrthonormal { what, error }) }
}

#[cfg(test)]
mod tests {
    use specquant_model::Source;

    use super::*;
    use crate::net::tests::{rotation as random_rotation, tiny, tokens};

    fn start(source: &Source) -> Start {
        let c = source.config();
        let random = |n: usize, seed: u64| to_vec(&random_rotation(n, seed)).unwrap();
        Start {
            r1: random(c.hidden_size, 1),
            r2: (0..c.num_layers).map(|layer| random(c.head_dim, 2 + layer as u64)).collect(),
            r3: Some(random(c.head_dim, 90)),
            r4: Some(random(16, 91)),
        }
    }

    fn run(source: &Source, config: &SpinQuantConfig) -> Rotations {
        let mut seen = 0;
        let result = spinquant(source, &[tokens(70, 5)], config, start(source), &mut |step, loss| {
            assert!(step == seen && loss.is_finite());
            seen += 1;
        })
        .unwrap();
        assert_eq!(seen, config.steps);
        result
    }

    fn fast() -> SpinQuantConfig {
        SpinQuantConfig { steps: 20, samples_per_step: 2, sequence_length: 32, ..SpinQuantConfig::default() }
    }

    #[test]
    fn the_loss_goes_down_and_rotations_stay_rotations() {
        for (name, weight_bits) in [("llama-sharded", 16), ("qwen3", 4), ("qwen2", 16)] {
            let source = tiny(name);
            let (hidden, head) = (source.config().hidden_size, source.config().head_dim);
            let result = run(&source, &SpinQuantConfig { weight_bits, ..fast() });
            let mean = |l: &[f64]| l.iter().sum::<f64>() / l.len() as f64;
            let (first, last) = (mean(&result.losses[..3]), mean(&result.losses[17..]));
            assert!(last < first - 0.005, "{name}: {:?}", result.losses);
            let off = |r: &[f32], n: usize| deviation(&tensor(r.to_vec(), (n, n)).unwrap()).unwrap();
            assert!(off(&result.r1, hidden) < 1e-6);
            assert!(result.r2.iter().all(|r| off(r, head) < 1e-6));
            assert_ne!(result.r1, start(&source).r1);
        }
    }

    #[test]
    fn the_seed_decides() {
        let source = tiny("llama-tied-bf16");
        let config = SpinQuantConfig { steps: 3, samples_per_step: 1, ..fast() };
        let (a, b) = (run(&source, &config), run(&source, &config));
        assert_eq!(a, b);
        assert_ne!(a, run(&source, &SpinQuantConfig { seed: 1, ..config }));
    }

    #[test]
    fn texts_are_cut_into_whole_sequences() {
        let texts = [vec![1; 70], vec![2; 5], vec![3; 1], vec![]];
        let pieces = cut(&texts, 32).unwrap();
        assert_eq!(pieces.iter().map(|p| (p[0], p.len())).collect::<Vec<_>>(), [(1, 32), (1, 32), (2, 5)]);
        assert!(matches!(cut(&texts[2..], 32), Err(Error::NoText(2))));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let source = tiny("llama-tied-bf16");
        let message = |config: SpinQuantConfig, change: fn(&mut Start)| {
            let mut start = start(&source);
            change(&mut start);
            spinquant(&source, &[tokens(40, 5)], &config, start, &mut |_, _| ()).unwrap_err().to_string()
        };
        for (change, want) in [
            ((|s| s.r1.truncate(9)) as fn(&mut Start), "r1 has 9 values instead of 9216 [96, 96]"),
            (|s| s.r1[0] = f32::NAN, "r1 is not orthonormal"),
            (|s| s.r2.truncate(1), "r2 has 1 values instead of 2"),
            (|s| s.r2[1][0] += 0.5, "r2 of layer 1 is not orthonormal"),
            (|s| s.r3 = Some(vec![1.0]), "r3 has 1 values instead of 256"),
            (|s| s.r4 = Some(vec![1.0; 10]), "r4 has 10 values instead of 30976"),
            (|s| s.r4 = Some(vec![]), "r4 has 0 values"),
        ] {
            let found = message(fast(), change);
            assert!(found.starts_with(want), "{found}");
        }
        for (config, want) in [
            (SpinQuantConfig { act_bits: 1, ..fast() }, "act_bits is 1; it must be"),
            (SpinQuantConfig { sequence_length: 1, ..fast() }, "sequence_length is 1"),
            (SpinQuantConfig { samples_per_step: 0, ..fast() }, "samples_per_step is 0"),
            (SpinQuantConfig { learning_rate: f64::NAN, ..fast() }, "learning_rate is NaN"),
            (SpinQuantConfig { kv_clip: 1.5, ..fast() }, "kv_clip is 1.5"),
        ] {
            let found = message(config, |_| ());
            assert!(found.starts_with(want), "{found}");
        }
        let outside = spinquant(&source, &[vec![1, 9999]], &fast(), start(&source), &mut |_, _| ());
        assert!(outside.unwrap_err().to_string().starts_with("token id 9999"));
    }
}
