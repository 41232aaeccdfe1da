//! Hugging Face's config.json, of transformers 4 and 5.

use std::path::Path;

use serde_json::Value;

use crate::{Activation, Error, Family, ModelConfig, Problems, Result, RopeScaling};

/// Reads fields, collecting complaints instead of stopping at the first. An absent field and null are the same.
struct Fields<'a> {
    json: &'a Value,
    problems: Problems,
}

impl<'a> Fields<'a> {
    fn get<T>(
        &mut self,
        json: &'a Value,
        key: &str,
        what: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Option<T> {
        let value = json.get(key).filter(|v| !v.is_null())?;
        let read = read(value);
        if read.is_none() {
            self.problems.push(format!("{key} is {value}; expected {what}"));
        }
        read
    }

    fn size(&mut self, key: &str) -> Option<usize> {
        self.get(self.json, key, "a whole number", |v| usize::try_from(v.as_u64()?).ok())
    }

    fn required_size(&mut self, key: &str) -> usize {
        let present = self.json.get(key).is_some_and(|v| !v.is_null());
        if !present {
            self.problems.push(format!("{key} is missing"));
        }
        // 1 passes the range checks: what is missing has been said already.
        self.size(key).unwrap_or(1)
    }

    fn flag(&mut self, key: &str) -> bool {
        self.get(self.json, key, "true or false", Value::as_bool).unwrap_or(false)
    }

    fn float(&mut self, json: &'a Value, key: &str) -> Option<f64> {
        self.get(json, key, "a number", Value::as_f64)
    }

    fn text(&mut self, json: &'a Value, key: &str) -> Option<&'a str> {
        self.get(json, key, "a string", Value::as_str)
    }
}

pub(super) fn parse(json: &Value, path: &Path) -> Result<ModelConfig> {
    let mut f = Fields { json, problems: Problems::default() };
    let family = family(json, path)?;
    refuse_quantized(json, path)?;

    let num_layers = f.required_size("num_hidden_layers");
    let num_heads = f.required_size("num_attention_heads");
    let hidden_size = f.required_size("hidden_size");
    let head_dim = match (f.size("head_dim"), family) {
        (Some(n), _) => n,
        // Qwen3Config's and Gemma3TextConfig's defaults; the others divide.
        (None, Family::Qwen3) => 128,
        (None, Family::Gemma3) => 256,
        (None, _) => {
            if num_heads == 0 || !hidden_size.is_multiple_of(num_heads) {
                f.problems.push(format!(
                    "num_attention_heads {num_heads} does not divide hidden_size {hidden_size}, and there is no head_dim"
                ));
            }
            hidden_size / num_heads.max(1)
        }
    };
    let gemma = family == Family::Gemma3;
    let (key, names): (_, &[&str]) = match gemma {
        true => ("hidden_activation", &["gelu_pytorch_tanh"]),
        false => ("hidden_act", &["silu", "swish"]),
    };
    if let Some(act) = f.text(json, key).filter(|a| !names.contains(a)) {
        f.problems.push(format!("{key} {act:?} is not supported; only {} is", names[0]));
    }
    let (rope_theta, rope_scaling, local_rope_theta) = if gemma { gemma_rope(&mut f) } else { rope(&mut f) };
    let sliding_window = windows(&mut f, family, num_layers);
    if gemma {
        refuse_unknown_gemma(&mut f);
    }
    let bias = matches!(family, Family::Llama | Family::Qwen3 | Family::Gemma3) && f.flag("attention_bias");
    let bos = f.get(json, "bos_token_id", "a token id", |v| u32::try_from(v.as_u64()?).ok());
    // Gemma has defaults for them; null is none.
    let absent = |key: &str| gemma && json.get(key).is_none();
    let eos = f.get(json, "eos_token_id", "a token id or a list of them", token_ids);
    let config = ModelConfig {
        family,
        hidden_size,
        intermediate_size: f.required_size("intermediate_size"),
        num_layers,
        num_heads,
        num_kv_heads: f.size("num_key_value_heads").unwrap_or(if gemma { 4 } else { num_heads }),
        head_dim,
        vocab_size: f.required_size("vocab_size"),
        rms_norm_eps: f.float(json, "rms_norm_eps").unwrap_or(1e-6) as f32,
        rope_theta,
        rope_scaling,
        local_rope_theta,
        sliding_window,
        attention_bias: bias || family == Family::Qwen2,
        attention_out_bias: bias,
        mlp_bias: family == Family::Llama && f.flag("mlp_bias"),
        qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
        post_norms: gemma,
        activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
        query_pre_attn_scalar: gemma.then(|| f.size("query_pre_attn_scalar").unwrap_or(256)),
        embedding_scale: if gemma { gemma_embedding_scale(hidden_size) } else { 1.0 },
        tie_word_embeddings: f
            .get(json, "tie_word_embeddings", "true or false", Value::as_bool)
            .unwrap_or(gemma),
        max_position_embeddings: f.required_size("max_position_embeddings"),
        bos_token_id: bos.or(absent("bos_token_id").then_some(2)),
        eos_token_ids: eos.or(absent("eos_token_id").then(|| vec![1])).unwrap_or_default(),
    };
    config.check(f.problems, path)
}

/// √hidden in f32, as llama.cpp and transformers in float32 have it. A transformers model of another type rounds it to that: 25.25 for
/// 25.298 in bfloat16 (`Gemma3TextScaledWordEmbedding`).
pub(crate) fn gemma_embedding_scale(hidden: usize) -> f32 {
    (hidden as f32).sqrt()
}

/// What Gemma's configuration could say that this program does not compute.
fn refuse_unknown_gemma(f: &mut Fields<'_>) {
    let json = f.json;
    for key in ["final_logit_softcapping", "attn_logit_softcapping"] {
        if let Some(cap) = f.float(json, key) {
            f.problems.push(format!("{key} {cap} is not supported; only null is, as in every Gemma 3"));
        }
    }
    if f.flag("use_bidirectional_attention") {
        f.problems.push("use_bidirectional_attention is not supported: such a model embeds texts and does not continue them");
    }
}

/// One id or a list of ids.
pub(crate) fn token_ids(value: &Value) -> Option<Vec<u32>> {
    let id = |v: &Value| u32::try_from(v.as_u64()?).ok();
    match value {
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    }
}

fn family(json: &Value, path: &Path) -> Result<Family> {
    let supported = || Family::ALL.map(Family::model_type).join(", ");
    let found = json.get("model_type").and_then(Value::as_str).unwrap_or("(none)");
    Family::ALL.into_iter().find(|f| f.model_type() == found).ok_or_else(|| Error::ModelType {
        path: path.to_owned(),
        model_type: found.to_owned(),
        supported: supported(),
    })
}

fn refuse_quantized(json: &Value, path: &Path) -> Result<()> {
    let Some(q) = ["quantization_config", "compression_config"]
        .iter()
        .find_map(|k| json.get(*k))
        .filter(|q| !q.is_null())
    else {
        return Ok(());
    };
    match q.get("quant_method").and_then(Value::as_str).unwrap_or("an unnamed method") {
        "specquant" => Ok(()),
        method => Err(Error::AlreadyQuantized { path: path.to_owned(), method: method.to_owned() }),
    }
}

/// transformers 5: `rope_parameters { rope_theta, rope_type, .. }`. Before: `rope_theta` and `rope_scaling { rope_type | type, .. }`.
fn rope(f: &mut Fields<'_>) -> (f64, RopeScaling, Option<f64>) {
    let json = f.json;
    let params = ["rope_parameters", "rope_scaling"]
        .iter()
        .filter_map(|k| json.get(*k))
        .find(|v| !v.is_null())
        .unwrap_or(&Value::Null);
    let (theta, scaling) = rope_of(f, params, 10_000.0);
    (theta, scaling, None)
}

/// transformers 5: `rope_parameters { full_attention { .. }, sliding_attention { .. } }`. Before: `rope_theta` and `rope_scaling` for the
/// layers without a window, `rope_local_base_freq` for the others. Defaults: `Gemma3TextConfig`.
fn gemma_rope(f: &mut Fields<'_>) -> (f64, RopeScaling, Option<f64>) {
    let json = f.json;
    let params = json.get("rope_parameters").filter(|v| !v.is_null());
    let of = |kind| params.and_then(|p| p.get(kind)).unwrap_or(&Value::Null);
    let (full, local) = (of("full_attention"), of("sliding_attention"));
    let scaled = if params.is_some() { full } else { json.get("rope_scaling").unwrap_or(&Value::Null) };
    let (theta, scaling) = rope_of(f, scaled, 1_000_000.0);
    if let Some(kind) = f.text(local, "rope_type").filter(|kind| *kind != "default") {
        f.problems.push(format!("rope type {kind:?} of sliding_attention is not supported; only default is"));
    }
    let local = f.float(local, "rope_theta").or_else(|| f.float(json, "rope_local_base_freq"));
    (theta, scaling, Some(local.unwrap_or(10_000.0)))
}

/// Base and stretching that `params`, or else config.json itself, names.
fn rope_of<'a>(f: &mut Fields<'a>, params: &'a Value, default_theta: f64) -> (f64, RopeScaling) {
    let json = f.json;
    let theta =
        f.float(params, "rope_theta").or_else(|| f.float(json, "rope_theta")).unwrap_or(default_theta);
    let partial = f.float(params, "partial_rotary_factor").or_else(|| f.float(json, "partial_rotary_factor"));
    if let Some(partial) = partial.filter(|p| *p != 1.0) {
        f.problems.push(format!("partial_rotary_factor {partial} is not supported; only 1 is"));
    }
    let kind = f.text(params, "rope_type").or_else(|| f.text(params, "type")).unwrap_or("default");
    let mut need = |key: &str| {
        f.float(params, key).unwrap_or_else(|| {
            f.problems.push(format!("rope type {kind:?} needs {key}"));
            1.0
        })
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor") },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor"),
            low_freq_factor: need("low_freq_factor"),
            high_freq_factor: need("high_freq_factor"),
            original_max_position_embeddings: need("original_max_position_embeddings") as usize,
        },
        other => {
            f.problems
                .push(format!("rope type {other:?} is not supported; supported: default, linear, llama3"));
            RopeScaling::None
        }
    };
    (theta, scaling)
}

/// Mistral: every layer, 4096 where config.json is silent (MistralConfig's default), none where it says null. Qwen: only with
/// `use_sliding_window`, in the layers that `layer_types` names or, before transformers 5, from `max_window_layers` on. Gemma 3: in the layers
/// that `layer_types` names or, before, in all but every sixth (`sliding_window_pattern`).
fn windows(f: &mut Fields<'_>, family: Family, layers: usize) -> Vec<Option<usize>> {
    // The range check reports an absurd number of layers; it must not be allocated before.
    let layers = layers.min(super::MAX_LAYERS);
    let json = f.json;
    let window = match family {
        Family::Llama => None,
        Family::Mistral if json.get("sliding_window").is_none() => Some(4096),
        Family::Mistral => f.size("sliding_window"),
        Family::Qwen2 | Family::Qwen3 if f.flag("use_sliding_window") => {
            Some(f.size("sliding_window").unwrap_or(4096))
        }
        Family::Qwen2 | Family::Qwen3 => None,
        Family::Gemma3 => Some(f.size("sliding_window").unwrap_or(4096)),
    };
    if matches!(family, Family::Llama | Family::Mistral) {
        return vec![window; layers];
    }
    let Some(types) = f.get(json, "layer_types", "a list", Value::as_array) else {
        if family == Family::Gemma3 {
            return gemma_windows(window, f.size("sliding_window_pattern").unwrap_or(GEMMA_PATTERN), layers);
        }
        let from = f.size("max_window_layers").unwrap_or(28);
        return (0..layers).map(|i| window.filter(|_| i >= from)).collect();
    };
    if types.len() != layers {
        f.problems.push(format!("layer_types has {} entries for {layers} layers", types.len()));
    }
    let mut read = |t: &Value| match t.as_str() {
        Some("full_attention") => None,
        Some("sliding_attention") => window,
        _ => {
            f.problems.push(format!(
                "layer type {t} is not supported; supported: full_attention, sliding_attention"
            ));
            None
        }
    };
    types.iter().take(layers).map(&mut read).collect()
}

/// Every sixth layer of a Gemma 3 has no window.
pub(crate) const GEMMA_PATTERN: usize = 6;

/// All layers have a window but every `pattern`th; 0: none is without.
pub(crate) fn gemma_windows(window: Option<usize>, pattern: usize, layers: usize) -> Vec<Option<usize>> {
    (1..=layers).map(|i| window.filter(|_| pattern == 0 || i % pattern != 0)).collect()
}

#[cfg(test)]
mod tests;
