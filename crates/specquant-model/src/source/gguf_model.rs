//! What a GGUF file's metadata and tensor names mean, in Hugging Face's terms. Keys: ggml/docs/gguf.md; names: gguf-py
//! `tensor_mapping.py`; the order of q and k rows and the rope factors: llama.cpp `convert_hf_to_gguf.py`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use super::gguf::Gguf;
use super::safetensors_dir::Tensors;
use super::{Dtype, TensorView};
use crate::config::{GEMMA_PATTERN, gemma_embedding_scale, gemma_windows};
use crate::{Activation, Error, Family, ModelConfig, Problems, Result, RopeScaling};

const ROPE_FREQS: &str = "rope_freqs.weight";

/// ggml's name for a part of a block, and Hugging Face's.
const BLOCK_PARTS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The same where attention and MLP have norms behind them: `ffn_norm` is then another of Hugging Face's names.
const POST_NORMS: [(&str, &str); 3] = [
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// Hugging Face's name of a tensor; unknown ones keep theirs (and are reported with the other mismatches).
fn hf_name(name: &str, post_norms: bool) -> String {
    let own: &[_] = if post_norms { &POST_NORMS } else { &[] };
    let known = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => Some("model.norm.weight".to_owned()),
        "output.weight" => Some("lm_head.weight".to_owned()),
        _ => name.strip_prefix("blk.").and_then(|rest| {
            let (layer, rest) = rest.split_once('.')?;
            let (part, kind) = rest.split_once('.')?;
            let (_, part) = own.iter().chain(&BLOCK_PARTS).find(|(ggml, _)| *ggml == part)?;
            Some(format!("model.layers.{layer}.{part}.{kind}"))
        }),
    };
    known.unwrap_or_else(|| name.to_owned())
}

/// Views of all tensors but the rope factors, under Hugging Face's names.
pub(super) fn tensors(gguf: &Gguf<'_>, file: &Arc<Path>, map: &Arc<Mmap>, config: &ModelConfig) -> Tensors {
    let mut all = BTreeMap::new();
    for (name, info) in gguf.tensors.iter().filter(|(name, _)| *name != ROPE_FREQS) {
        let name = hf_name(name, config.post_norms);
        let mut view = TensorView::new(&name, file, map, info.dtype, info.shape.clone(), info.range.clone());
        // Only the converter of the llama architecture permutes. A tensor of another height fails the shape check afterwards.
        let rotary = name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj.");
        let height = info.shape.first().copied().unwrap_or(0);
        if config.family == Family::Llama && rotary && height.is_multiple_of(config.head_dim) {
            view = view.interleaved(config.head_dim);
        }
        all.insert(name, view);
    }
    all
}

/// The model's shape from the metadata. `bytes` is the whole file.
pub(super) fn config(gguf: &Gguf<'_>, bytes: &[u8]) -> Result<ModelConfig> {
    let path = gguf.path();
    let arch = gguf.text("general.architecture")?.unwrap_or("(none)");
    let family = match arch {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        "gemma3" => Family::Gemma3,
        other => {
            return Err(Error::ModelType {
                path: path.to_owned(),
                model_type: other.to_owned(),
                supported: "llama (Mistral included), qwen2, qwen3, gemma3".into(),
            });
        }
    };
    let mut problems = Problems::default();
    if gguf.uint("split.count")?.is_some_and(|n| n > 1) {
        problems.push("is one part of a split model; join the parts first: llama-gguf-split --merge");
    }
    let key = |k: &str| format!("{arch}.{k}");
    let optional = |k: &str| Ok::<_, Error>(gguf.uint(&key(k))?.and_then(|n| usize::try_from(n).ok()));
    if optional("expert_count")?.is_some_and(|n| n > 0) {
        problems.push(format!("{} is not 0: mixtures of experts are not supported", key("expert_count")));
    }
    let mut required = |k: &str| {
        let value = optional(k)?;
        if value.is_none() {
            problems.push(format!("metadata key {} is missing", key(k)));
        }
        Ok::<_, Error>(value.unwrap_or(1)) // passes the range checks; the absence has been said
    };
    let (hidden_size, num_heads) = (required("embedding_length")?, required("attention.head_count")?);
    let num_layers = required("block_count")?;
    let intermediate_size = required("feed_forward_length")?;
    let max_position_embeddings = required("context_length")?;
    let gemma = family == Family::Gemma3;
    let window = if gemma { Some(required("attention.sliding_window")?) } else { None };
    let head_dim = optional("attention.key_length")?.unwrap_or(hidden_size / num_heads.max(1));
    for k in ["attention.value_length", "rope.dimension_count"] {
        if let Some(n) = optional(k)?.filter(|n| *n != head_dim) {
            problems.push(format!("{} is {n}, but heads are {head_dim} wide; they must be equal", key(k)));
        }
    }
    let rope_theta = gguf.float(&key("rope.freq_base"))?.unwrap_or(10_000.0);
    let pattern = optional("attention.sliding_window_pattern")?.unwrap_or(GEMMA_PATTERN);
    for k in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = gguf.float(&key(k))?.filter(|cap| *cap != 0.0) {
            problems.push(format!("{} is {cap}; soft-capping is not supported", key(k)));
        }
    }
    // llama.cpp, as Google's code, scales by hidden / heads in the model of 27 B weights, which it knows by its 62 blocks, and by the heads'
    // width in all others (llama-model.cpp, LLM_ARCH_GEMMA3).
    let scalar = if num_layers == 62 { hidden_size / num_heads.max(1) } else { head_dim };
    let has = |name: &str| gguf.tensors.contains_key(name);
    let llama_bias = family == Family::Llama && has("blk.0.attn_q.bias");
    let embedding_rows = gguf.tensors.get("token_embd.weight").and_then(|t| t.shape.first().copied());
    let mut config = ModelConfig {
        family,
        hidden_size,
        intermediate_size,
        num_layers,
        num_heads,
        num_kv_heads: optional("attention.head_count_kv")?.unwrap_or(num_heads),
        head_dim,
        vocab_size: optional("vocab_size")?.or(embedding_rows).unwrap_or(0),
        rms_norm_eps: gguf.float(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(0.0) as f32,
        rope_theta,
        rope_scaling: RopeScaling::None,
        local_rope_theta: match gemma {
            true => Some(gguf.float(&key("rope.freq_base_swa"))?.unwrap_or(10_000.0)),
            false => None,
        },
        sliding_window: gemma_windows(window, pattern, num_layers.min(crate::config::MAX_LAYERS)),
        attention_bias: llama_bias || family == Family::Qwen2,
        attention_out_bias: llama_bias,
        mlp_bias: family == Family::Llama && has("blk.0.ffn_gate.bias"),
        qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
        post_norms: gemma,
        activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
        query_pre_attn_scalar: gemma.then_some(scalar),
        embedding_scale: if gemma { gemma_embedding_scale(hidden_size) } else { 1.0 },
        tie_word_embeddings: !has("output.weight"),
        max_position_embeddings,
        bos_token_id: token_id(gguf, "bos")?,
        eos_token_ids: Vec::new(),
    };
    // End of text, of a turn and of a tool call: each ends a generation.
    for kind in ["eos", "eot", "eom"] {
        config.eos_token_ids.extend(token_id(gguf, kind)?.filter(|id| !config.eos_token_ids.contains(id)));
    }
    match gguf.text(&key("rope.scaling.type"))?.unwrap_or("none") {
        "none" => {}
        "linear" => {
            let factor = gguf.float(&key("rope.scaling.factor"))?.unwrap_or(1.0);
            config.rope_scaling = RopeScaling::Linear { factor };
        }
        other => {
            problems.push(format!("rope scaling {other:?} is not supported; supported: none, linear, llama3"))
        }
    }
    let mut config = config.check(problems, path)?;
    if let Some(info) = gguf.tensors.get(ROPE_FREQS) {
        let factors: Option<Vec<f32>> = (info.dtype == Dtype::F32 && info.shape == [config.head_dim / 2])
            .then(|| {
                bytes[info.range.clone()]
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect()
            });
        let scaling = factors
            .and_then(|f| llama3_scaling(&config, &f))
            .filter(|_| config.rope_scaling == RopeScaling::None);
        config.rope_scaling = scaling.ok_or_else(|| {
            let mut problems = Problems::default();
            problems.push(format!(
                "tensor {ROPE_FREQS} does not hold the factors of Llama 3.1's rope scaling (original context 8192); \
                 open the Hugging Face directory instead"
            ));
            Error::Config { path: path.to_owned(), problems }
        })?;
    }
    Ok(config)
}

/// `tokenizer.ggml.{kind}_token_id`.
pub(crate) fn token_id(gguf: &Gguf<'_>, kind: &str) -> Result<Option<u32>> {
    let id = gguf.uint(&format!("tokenizer.ggml.{kind}_token_id"))?;
    Ok(id.and_then(|id| u32::try_from(id).ok()).filter(|id| *id != u32::MAX)) // -1 stands for none
}

/// The converter stores only what each frequency is divided by. Every released model has low and high factors 1 and 4 and the
/// original context 8192, so the longest wave tells the factor; the other divisors must then agree.
fn llama3_scaling(config: &ModelConfig, factors: &[f32]) -> Option<RopeScaling> {
    let factor = f64::from(*factors.last()?);
    let candidate = if factor == 1.0 {
        RopeScaling::None
    } else {
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }
    };
    let plain = ModelConfig { rope_scaling: RopeScaling::None, ..config.clone() }.inv_freq(false);
    let agree = plain.iter().zip(factors).all(|(freq, factor)| {
        let freq = f64::from(*freq);
        (freq / candidate.scale(freq) / f64::from(*factor) - 1.0).abs() < 1e-3
    });
    (agree && factor.is_finite()).then_some(candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, want) in [
            ("blk.12.attn_output.weight", "model.layers.12.self_attn.o_proj.weight"),
            ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
            ("output.weight", "lm_head.weight"),
            ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate_exps.weight"),
        ] {
            assert_eq!(hf_name(name, false), want);
        }
        for (post_norms, name, want) in [
            (false, "ffn_norm", "model.layers.3.post_attention_layernorm.weight"),
            (true, "ffn_norm", "model.layers.3.pre_feedforward_layernorm.weight"),
            (true, "post_attention_norm", "model.layers.3.post_attention_layernorm.weight"),
            (false, "post_attention_norm", "blk.3.post_attention_norm.weight"),
        ] {
            assert_eq!(hf_name(&format!("blk.3.{name}.weight"), post_norms), want);
        }
    }
}
