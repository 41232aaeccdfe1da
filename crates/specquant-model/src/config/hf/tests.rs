use super::*;
use serde_json::json;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/golden/tiny");

/// The small Gemma 3 lies in this repository (`tests/gemma3/make.py`).
fn golden(name: &str) -> ModelConfig {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let path = if name == "gemma3" { &own } else { Path::new(TINY) }.join(name).join("config.json");
    let json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    ModelConfig::from_hf_json(&json, &path).unwrap()
}

fn parse_json(json: Value) -> Result<ModelConfig> {
    ModelConfig::from_hf_json(&json, Path::new("dir/config.json"))
}

fn minimal(model_type: &str) -> Value {
    json!({"model_type": model_type, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 256})
}

fn with(model_type: &str, fields: Value) -> Value {
    let mut json = minimal(model_type);
    json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    json
}

#[test]
fn golden_configs() {
    let base = golden("llama-sharded");
    let expect = ModelConfig {
        family: Family::Llama,
        hidden_size: 96,
        intermediate_size: 176,
        num_layers: 2,
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 16,
        vocab_size: 320,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        local_rope_theta: None,
        sliding_window: vec![None; 2],
        attention_bias: false,
        attention_out_bias: false,
        mlp_bias: false,
        qk_norm: false,
        post_norms: false,
        activation: Activation::Silu,
        query_pre_attn_scalar: None,
        embedding_scale: 1.0,
        tie_word_embeddings: false,
        max_position_embeddings: 512,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    };
    assert_eq!(base, expect);
    assert_eq!(golden("llama-tied-bf16"), ModelConfig { tie_word_embeddings: true, ..base.clone() });
    let window = ModelConfig { family: Family::Mistral, sliding_window: vec![Some(16); 2], ..base.clone() };
    assert_eq!(golden("mistral"), window);
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 32,
    };
    let llama3 = ModelConfig { rope_theta: 5e5, rope_scaling: scaling, ..base.clone() };
    assert_eq!(golden("llama3-rope-scaled"), llama3);
    let no_ids = ModelConfig { bos_token_id: None, eos_token_ids: vec![], ..base };
    let qwen2 = ModelConfig {
        family: Family::Qwen2,
        attention_bias: true,
        tie_word_embeddings: true,
        ..no_ids.clone()
    };
    assert_eq!(golden("qwen2"), qwen2);
    assert_eq!(
        golden("qwen3"),
        ModelConfig { family: Family::Qwen3, head_dim: 32, qk_norm: true, ..no_ids.clone() }
    );
    let gemma3 = ModelConfig {
        family: Family::Gemma3,
        num_heads: 4,
        head_dim: 32,
        rope_theta: 1e6,
        rope_scaling: RopeScaling::Linear { factor: 4.0 },
        local_rope_theta: Some(1e4),
        sliding_window: vec![Some(16), None],
        qk_norm: true,
        post_norms: true,
        activation: Activation::GeluTanh,
        query_pre_attn_scalar: Some(48),
        embedding_scale: 96f32.sqrt(),
        tie_word_embeddings: true,
        bos_token_id: Some(2),
        eos_token_ids: vec![1],
        ..no_ids
    };
    assert_eq!(golden("gemma3"), gemma3);
    // The layout of transformers 4, with its defaults.
    let old = with(
        "gemma3_text",
        json!({"hidden_size": 96, "intermediate_size": 176, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 32,
            "vocab_size": 320, "max_position_embeddings": 512, "query_pre_attn_scalar": 48, "sliding_window": 16,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "sliding_window_pattern": 2}),
    );
    assert_eq!(parse_json(old).unwrap(), gemma3);
}

#[test]
fn written_configs_read_back() {
    for name in
        ["llama-sharded", "llama-tied-bf16", "llama3-rope-scaled", "mistral", "qwen2", "qwen3", "gemma3"]
    {
        let config = golden(name);
        assert_eq!(parse_json(config.to_hf_json()).unwrap(), config, "{name}");
    }
    let mut qwen = golden("qwen3");
    qwen.sliding_window = vec![None, Some(8)];
    qwen.rope_scaling = RopeScaling::Linear { factor: 2.0 };
    qwen.eos_token_ids = vec![5, 6];
    assert_eq!(parse_json(qwen.to_hf_json()).unwrap(), qwen);
}

#[test]
fn both_rope_layouts_and_all_types() {
    let llama3 = json!({"factor": 32.0, "low_freq_factor": 1, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let old = |kind: &str| {
        let mut s = llama3.clone();
        s[kind] = json!("llama3");
        parse_json(with("llama", json!({"rope_theta": 5e5, "rope_scaling": s}))).unwrap()
    };
    let mut new = llama3.clone();
    new["rope_type"] = json!("llama3");
    new["rope_theta"] = json!(5e5);
    let new = parse_json(with("llama", json!({"rope_parameters": new}))).unwrap();
    assert_eq!(new, old("rope_type"));
    assert_eq!(new, old("type"));
    assert!(matches!(new.rope_scaling, RopeScaling::Llama3 { original_max_position_embeddings: 8192, .. }));
    let linear =
        parse_json(with("llama", json!({"rope_scaling": {"type": "linear", "factor": 4.0}}))).unwrap();
    let plain = parse_json(minimal("llama")).unwrap();
    assert_eq!(plain.rope_theta, 1e4);
    for (a, b) in linear.inv_freq(false).iter().zip(plain.inv_freq(true)) {
        assert_eq!(*a, b / 4.0);
    }
    let err =
        parse_json(with("llama", json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}))).unwrap_err();
    assert!(err.to_string().contains("\"yarn\"") && err.to_string().contains("llama3"), "{err}");
}

/// Values of transformers' `_compute_llama3_parameters` at its three regimes, worked by hand.
#[test]
fn llama3_frequencies() {
    let s = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let at = |turns: f64| {
        s.scale(turns * std::f64::consts::TAU / 8192.0) / (turns * std::f64::consts::TAU / 8192.0)
    };
    assert!((at(0.5) - 0.125).abs() < 1e-12);
    assert!((at(5.0) - 1.0).abs() < 1e-12);
    assert!((at(2.5) - 0.5625).abs() < 1e-12);
}

#[test]
fn windows_of_the_families() {
    let of = |t, fields| parse_json(with(t, fields)).unwrap().sliding_window;
    assert_eq!(of("mistral", json!({})), vec![Some(4096); 4]);
    assert_eq!(of("mistral", json!({"sliding_window": null})), vec![None; 4]);
    assert_eq!(of("llama", json!({"sliding_window": 8})), vec![None; 4]);
    assert_eq!(of("qwen2", json!({"sliding_window": 8, "max_window_layers": 0})), vec![None; 4]);
    let half = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2});
    assert_eq!(of("qwen2", half), vec![None, None, Some(8), Some(8)]);
    let types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"];
    let named = json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": types});
    assert_eq!(of("qwen3", named), vec![None, Some(8), None, Some(8)]);
    let gemma = json!({"num_hidden_layers": 7, "sliding_window": 8});
    assert_eq!(of("gemma3_text", gemma), [8, 8, 8, 8, 8, 0, 8].map(|w| Some(w).filter(|w| *w > 0)));
}

#[test]
fn eos_biases_and_head_dim() {
    let c =
        parse_json(with("llama", json!({"eos_token_id": [1, 2], "attention_bias": true, "mlp_bias": true})))
            .unwrap();
    assert_eq!(c.eos_token_ids, [1, 2]);
    assert!(c.attention_bias && c.attention_out_bias && c.mlp_bias);
    assert_eq!((c.head_dim, c.num_kv_heads), (16, 4));
    assert_eq!(c.expected_tensors().len(), 3 + 4 * (2 + 14));
    assert_eq!(parse_json(minimal("qwen3")).unwrap().head_dim, 128);
}

#[test]
fn refusals_name_what_is_wrong() {
    let says = |json: Value, parts: &[&str]| {
        let err = parse_json(json).unwrap_err().to_string();
        for part in parts {
            assert!(err.contains(part), "{err:?} lacks {part:?}");
        }
    };
    says(minimal("gemma"), &["dir/config.json", "\"gemma\"", "llama, mistral, qwen2, qwen3, gemma3_text"]);
    let gemma = json!({"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "hidden_activation": "relu",
        "use_bidirectional_attention": true, "query_pre_attn_scalar": 0, "rope_local_base_freq": 0.5,
        "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}});
    says(
        with("gemma3_text", gemma),
        &[
            "final_logit_softcapping 30",
            "attn_logit_softcapping 50",
            "\"relu\"",
            "bidirectional",
            "scalar is 0",
            "local_base_freq is 0.5",
            "sliding_attention",
            "7 problems",
        ],
    );
    says(json!([]), &["(none)"]);
    says(
        with("llama", json!({"quantization_config": {"quant_method": "gptq"}})),
        &["already", "\"gptq\"", "original"],
    );
    assert!(parse_json(with("llama", json!({"quantization_config": {"quant_method": "specquant"}}))).is_ok());
    says(with("llama", json!({"hidden_act": "gelu"})), &["gelu", "silu"]);
    says(with("llama", json!({"num_key_value_heads": 3})), &["num_key_value_heads 3"]);
    says(
        with("llama", json!({"hidden_size": 65})),
        &["num_attention_heads 4 does not divide hidden_size 65"],
    );
    says(with("llama", json!({"num_hidden_layers": 1u64 << 60})), &["num_hidden_layers"]);
    says(
        with("llama", json!({"num_attention_heads": 0, "hidden_size": 1u64 << 63})),
        &["num_attention_heads is 0"],
    );
    says(with("llama", json!({"head_dim": 15})), &["head_dim is 15", "even"]);
    says(
        with("llama", json!({"rms_norm_eps": 0, "rope_theta": -1})),
        &["rms_norm_eps", "rope_theta", "2 problems"],
    );
    says(
        json!({"model_type": "llama", "vocab_size": "x"}),
        &["hidden_size is missing", "vocab_size is \"x\""],
    );
}

/// Its bytes are part of a model's fingerprint, by which stored comparisons know it.
#[test]
fn keys_of_written_configs_keep_their_places() {
    let json = golden("llama-sharded").to_hf_json();
    let keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
    let want = "architectures model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size \
                hidden_act rms_norm_eps rope_theta rope_scaling max_position_embeddings tie_word_embeddings bos_token_id eos_token_id attention_bias mlp_bias";
    assert_eq!(keys.join(" "), want);
}
