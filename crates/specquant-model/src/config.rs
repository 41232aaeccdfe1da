//! A model's shape: what the forward pass needs to know, the tensors that follow from it, and its rotary frequencies.

mod hf;

pub(crate) use hf::{GEMMA_PATTERN, gemma_embedding_scale, gemma_windows, token_ids};

use std::path::Path;

use serde_json::{Value, json};

use crate::{Error, Problems, Result, Site, StoredTensor};

/// A decoder family; all are LLaMA's block with small additions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// LLaMA 1 to 3 and what shares its architecture (SmolLM2, TinyLlama, ...).
    Llama,
    /// Mistral: sliding window.
    Mistral,
    /// Qwen2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMS norms on the heads of q and k.
    Qwen3,
    /// Gemma 3, text only: norms on the outputs of attention and MLP too, GELU, windows in most layers, which have a rotary base of their own.
    Gemma3,
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 5] =
        [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3, Family::Gemma3];

    /// `model_type` in Hugging Face's config.json.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma3 => "gemma3_text",
        }
    }

    fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
            Family::Gemma3 => "Gemma3ForCausalLM",
        }
    }

    /// What Hugging Face's checkpoints, and so ours, leave out of every norm's weight: Gemma's are stored as w − 1 (transformers,
    /// `Gemma3RMSNorm`), in GGUF files as w. Everywhere else, w is what the normalized value is multiplied by.
    pub(crate) fn norm_offset(self) -> f32 {
        if self == Family::Gemma3 { 1.0 } else { 0.0 }
    }
}

/// What the gate of the MLP goes through before it multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e^−x).
    Silu,
    /// The tanh approximation of GELU, see [`specquant_kernels::gelu_mul`].
    GeluTanh,
}

/// How rotary frequencies are stretched for a longer context (transformers `modeling_rope_utils.py`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency is divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long waves are divided by `factor`, short ones kept, and those between interpolated.
    Llama3 {
        /// The divisor of long waves.
        factor: f64,
        /// Waves longer than the original context over this are long.
        low_freq_factor: f64,
        /// Waves shorter than the original context over this are short.
        high_freq_factor: f64,
        /// Context length of the pre-training.
        original_max_position_embeddings: usize,
    },
}

/// Shape and constants of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Rows of the embedding matrix.
    pub vocab_size: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their stretching.
    pub rope_scaling: RopeScaling,
    /// Base in layers with a sliding window, whose frequencies are not stretched. `None`: all layers are alike.
    pub local_rope_theta: Option<f64>,
    /// Per layer, how many keys a query sees at most, itself included. `None`: all.
    pub sliding_window: Vec<Option<usize>>,
    /// q, k and v have biases.
    pub attention_bias: bool,
    /// o has a bias.
    pub attention_out_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// Heads of q and k are RMS-normalized before the rotation (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// What attention and MLP put out is RMS-normalized before it is added to the residual stream (Gemma 3).
    pub post_norms: bool,
    /// What the gate of the MLP goes through.
    pub activation: Activation,
    /// Attention scores are divided by its square root; `None`: by that of `head_dim`.
    pub query_pre_attn_scalar: Option<usize>,
    /// What embeddings are multiplied by on their way into the first block, not in the head.
    pub embedding_scale: f32,
    /// The output matrix is the embedding matrix. Once a model is opened, this is what its tensors say.
    pub tie_word_embeddings: bool,
    /// Context length.
    pub max_position_embeddings: usize,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation: config.json's and generation_config.json's.
    pub eos_token_ids: Vec<u32>,
}

/// No dimension of a real model comes near; it keeps products of two of them far from overflow.
const MAX_DIM: usize = 1 << 24;
pub(crate) const MAX_LAYERS: usize = 4096;

impl ModelConfig {
    /// Reads Hugging Face's config.json (of `path`, for messages): both the layout of transformers 5 (`rope_parameters`) and the
    /// older one (`rope_theta`, `rope_scaling`).
    pub fn from_hf_json(json: &Value, path: &Path) -> Result<Self> {
        hf::parse(json, path)
    }

    /// config.json as transformers (4 and 5) would read it back.
    pub fn to_hf_json(&self) -> Value {
        // Keys keep their places: config.json's bytes are part of a model's fingerprint.
        let activation = match self.activation {
            Activation::Silu => ("hidden_act", "silu"),
            Activation::GeluTanh => ("hidden_activation", "gelu_pytorch_tanh"),
        };
        let mut json = json!({
            "architectures": [self.family.architecture()],
            "model_type": self.family.model_type(),
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            (activation.0): activation.1,
            "rms_norm_eps": widen(self.rms_norm_eps),
            "rope_theta": self.rope_theta,
            "rope_scaling": match self.rope_scaling {
                RopeScaling::None => Value::Null,
                RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
                RopeScaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings,
                } => json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_max_position_embeddings,
                }),
            },
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match &self.eos_token_ids[..] {
                [] => Value::Null,
                [one] => json!(one),
                many => json!(many),
            },
        });
        let window = self.sliding_window.iter().copied().flatten().next();
        let kind = |w: &Option<usize>| if w.is_some() { "sliding_attention" } else { "full_attention" };
        let layer_types = || json!(self.sliding_window.iter().map(kind).collect::<Vec<_>>());
        match self.family {
            Family::Llama => {
                json["attention_bias"] = json!(self.attention_bias);
                json["mlp_bias"] = json!(self.mlp_bias);
            }
            Family::Mistral => json["sliding_window"] = json!(window),
            Family::Qwen2 | Family::Qwen3 => {
                json["use_sliding_window"] = json!(window.is_some());
                json["sliding_window"] = json!(window);
                json["layer_types"] = layer_types();
            }
            Family::Gemma3 => {
                json["query_pre_attn_scalar"] = json!(self.query_pre_attn_scalar);
                json["rope_local_base_freq"] = json!(self.local_rope_theta);
                json["sliding_window"] = json!(window);
                json["layer_types"] = layer_types();
                json["attention_bias"] = json!(self.attention_bias);
            }
        }
        if self.family == Family::Qwen3 {
            json["attention_bias"] = json!(self.attention_bias);
        }
        json
    }

    /// Width of a site's input.
    pub fn site_width(&self, site: Site) -> usize {
        match site {
            Site::Qkv | Site::GateUp => self.hidden_size,
            Site::O => self.num_heads * self.head_dim,
            Site::Down => self.intermediate_size,
        }
    }

    /// Rows of the embedding matrix become what goes into the first block, in place.
    pub fn scale_embeddings(&self, x: &mut [f32]) {
        if self.embedding_scale != 1.0 {
            x.iter_mut().for_each(|x| *x *= self.embedding_scale);
        }
    }

    /// What the products of queries and keys are multiplied by.
    pub fn attention_scale(&self) -> f32 {
        1.0 / (self.query_pre_attn_scalar.unwrap_or(self.head_dim) as f32).sqrt()
    }

    /// Rotary frequencies in radians per position, after scaling, of the layers with or without a sliding window: `[head_dim / 2]`. Formulas: transformers `modeling_rope_utils.py`,
    /// `_compute_default_rope_parameters`, `_compute_linear_scaling_rope_parameters`, `_compute_llama3_parameters`.
    pub fn inv_freq(&self, windowed: bool) -> Vec<f32> {
        let (theta, scaling) = match self.local_rope_theta {
            Some(theta) if windowed => (theta, RopeScaling::None),
            _ => (self.rope_theta, self.rope_scaling),
        };
        let freq = |i: usize| theta.powf(-((2 * i) as f64) / self.head_dim as f64);
        (0..self.head_dim / 2).map(|i| scaling.scale(freq(i)) as f32).collect()
    }

    /// The norms of a block, in the order of [`crate::Block::norms`]: name within the block without `.weight`, and width. What LLaMA calls
    /// `post_attention_layernorm` stands before the MLP; Gemma's of that name is one of [`ModelConfig::post_norms`].
    pub fn norm_shapes(&self) -> Vec<(&'static str, usize)> {
        let names: &[&str] = match self.post_norms {
            false => &["input_layernorm", "post_attention_layernorm"],
            true => &[
                "input_layernorm",
                "pre_feedforward_layernorm",
                "post_attention_layernorm",
                "post_feedforward_layernorm",
            ],
        };
        let heads: &[&str] = if self.qk_norm { &["self_attn.q_norm", "self_attn.k_norm"] } else { &[] };
        let of =
            |names: &[&'static str], width| names.iter().map(move |name| (*name, width)).collect::<Vec<_>>();
        [of(names, self.hidden_size), of(heads, self.head_dim)].concat()
    }

    /// A norm's weight as a checkpoint stores it: see [`Family`] for what Gemma's leaves out.
    pub fn norm_tensor(&self, name: String, weight: &[f32]) -> StoredTensor {
        let offset = self.family.norm_offset();
        let stored: Vec<f32> = weight.iter().map(|w| w - offset).collect();
        StoredTensor::f32(name, vec![weight.len()], &stored)
    }

    /// The linear layers of block `layer`: name without `.weight`, and shape `[out, in]`.
    pub fn linear_shapes(&self, layer: usize) -> Vec<(String, [usize; 2])> {
        let (h, i) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        [
            ("self_attn.q_proj", [q, h]),
            ("self_attn.k_proj", [kv, h]),
            ("self_attn.v_proj", [kv, h]),
            ("self_attn.o_proj", [h, q]),
            ("mlp.gate_proj", [i, h]),
            ("mlp.up_proj", [i, h]),
            ("mlp.down_proj", [h, i]),
        ]
        .into_iter()
        .map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape))
        .collect()
    }

    /// Whether linears of this name (its last part: `q_proj`, ...) carry a bias.
    pub fn has_bias(&self, linear: &str) -> bool {
        match linear.rsplit('.').next().unwrap_or(linear) {
            "q_proj" | "k_proj" | "v_proj" => self.attention_bias,
            "o_proj" => self.attention_out_bias,
            "gate_proj" | "up_proj" | "down_proj" => self.mlp_bias,
            _ => false,
        }
    }

    /// Every tensor of an unquantized checkpoint, with its shape. `lm_head.weight` only if the embeddings are not tied.
    pub fn expected_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (h, v) = (self.hidden_size, self.vocab_size);
        let mut all =
            vec![("model.embed_tokens.weight".into(), vec![v, h]), ("model.norm.weight".into(), vec![h])];
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".into(), vec![v, h]));
        }
        for layer in 0..self.num_layers {
            let block = format!("model.layers.{layer}");
            let norms = self.norm_shapes().into_iter();
            all.extend(norms.map(|(name, width)| (format!("{block}.{name}.weight"), vec![width])));
            for (name, shape) in self.linear_shapes(layer) {
                if self.has_bias(&name) {
                    all.push((format!("{name}.bias"), vec![shape[0]]));
                }
                all.push((format!("{name}.weight"), shape.to_vec()));
            }
        }
        all
    }

    /// Checks everything that can be known without a tensor, adding to what the reader complained about.
    pub(crate) fn check(self, mut problems: Problems, path: &Path) -> Result<Self> {
        for (name, value, max) in [
            ("hidden_size", self.hidden_size, MAX_DIM),
            ("intermediate_size", self.intermediate_size, MAX_DIM),
            ("num_hidden_layers", self.num_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_heads, MAX_DIM),
            ("num_key_value_heads", self.num_kv_heads, MAX_DIM),
            ("head_dim", self.head_dim, MAX_DIM),
            ("vocab_size", self.vocab_size, MAX_DIM),
            ("max_position_embeddings", self.max_position_embeddings, usize::MAX),
        ] {
            if value == 0 || value > max {
                problems.push(format!("{name} is {value}; it must be between 1 and {max}"));
            }
        }
        if self.num_heads.checked_mul(self.head_dim).is_none_or(|n| n > MAX_DIM) {
            problems.push(format!("{} heads of {} are too wide", self.num_heads, self.head_dim));
        }
        if self.num_kv_heads == 0 || !self.num_heads.is_multiple_of(self.num_kv_heads) {
            problems.push(format!(
                "num_key_value_heads {} does not divide num_attention_heads {}",
                self.num_kv_heads, self.num_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            problems.push(format!("head_dim is {}; rotary embeddings need an even number", self.head_dim));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            problems.push(format!("rms_norm_eps is {}; it must be between 0 and 1", self.rms_norm_eps));
        }
        for (name, theta) in
            [("rope_theta", Some(self.rope_theta)), ("rope_local_base_freq", self.local_rope_theta)]
        {
            if let Some(theta) = theta.filter(|theta| !(*theta > 1.0 && theta.is_finite())) {
                problems.push(format!("{name} is {theta}; it must be above 1 and finite"));
            }
        }
        if self.query_pre_attn_scalar == Some(0) {
            problems.push("query_pre_attn_scalar is 0; scores are divided by its square root");
        }
        self.rope_scaling.check(&mut problems);
        if self.sliding_window.contains(&Some(0)) {
            problems.push("sliding_window is 0; leave it out (null) for full attention");
        }
        if problems.is_empty() { Ok(self) } else { Err(Error::Config { path: path.to_owned(), problems }) }
    }
}

impl RopeScaling {
    /// The scaled value of one frequency, in radians per position.
    pub(crate) fn scale(self, freq: f64) -> f64 {
        match self {
            RopeScaling::None => freq,
            RopeScaling::Linear { factor } => freq / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let turns = original_max_position_embeddings as f64 * freq / std::f64::consts::TAU;
                if turns < low_freq_factor {
                    freq / factor
                } else if turns > high_freq_factor {
                    freq
                } else {
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * freq / factor + smooth * freq
                }
            }
        }
    }

    fn check(self, problems: &mut Problems) {
        let mut positive = |name: &str, value: f64| {
            if !(value > 0.0 && value.is_finite()) {
                problems.push(format!("rope {name} is {value}; it must be positive and finite"));
            }
        };
        match self {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => positive("factor", factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: n,
            } => {
                positive("factor", factor);
                positive("low_freq_factor", low);
                positive("original_max_position_embeddings", n as f64);
                if !(high > low && high.is_finite()) {
                    problems
                        .push(format!("rope high_freq_factor {high} must be above low_freq_factor {low}"));
                }
            }
        }
    }
}

/// The f64 with the same shortest decimal form: 1e-5, not 9.999999747378752e-6.
fn widen(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}
