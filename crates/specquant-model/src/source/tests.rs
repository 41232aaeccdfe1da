//! Hugging Face directories: golden ones, and small ones with everything that can be wrong.

use std::collections::BTreeMap;
use std::fs;

use half::bf16;
use proptest::prelude::*;
use safetensors::{Dtype as StDtype, SafeTensors};
use tempfile::TempDir;

use super::*;
use crate::Family;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/golden/tiny");

type Stored = BTreeMap<String, (StDtype, Vec<usize>, Vec<u8>)>;

fn config_json() -> Value {
    json!({"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 10, "max_position_embeddings": 64, "eos_token_id": 2})
}

/// All tensors that `config` asks for, F32, filled with a constant.
fn stored(config: &Value) -> Stored {
    let config = ModelConfig::from_hf_json(config, Path::new("config.json")).unwrap();
    let fill = |shape: &[usize]| 0.5f32.to_le_bytes().repeat(shape.iter().product());
    config.expected_tensors().into_iter().map(|(n, s)| (n, (StDtype::F32, s.clone(), fill(&s)))).collect()
}

fn safetensors_bytes(tensors: &Stored) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(n, (d, s, b))| (n, safetensors::tensor::TensorView::new(*d, s.clone(), b).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn write(config: &Value, tensors: &Stored) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    fs::write(dir.path().join("model.safetensors"), safetensors_bytes(tensors)).unwrap();
    dir
}

fn error(dir: &TempDir, parts: &[&str]) -> String {
    let err = Source::open(dir.path()).unwrap_err().to_string();
    for part in parts {
        assert!(err.contains(part), "{err:?} lacks {part:?}");
    }
    err
}

#[test]
fn golden_directories() {
    for name in ["llama-sharded", "llama-tied-bf16", "llama3-rope-scaled", "mistral", "qwen2", "qwen3"] {
        let dir = Path::new(TINY).join(name);
        let source = Source::open(&dir).unwrap();
        assert!(!source.is_quantized() && source.path() == dir);
        let tied = matches!(name, "llama-tied-bf16" | "qwen2");
        assert_eq!(source.config().tie_word_embeddings, tied, "{name}");
        assert_eq!(source.has("lm_head.weight"), !tied, "{name}");
        for tensor in source.names() {
            let view = source.tensor(tensor).unwrap();
            let want = if name == "llama-tied-bf16" { Dtype::BF16 } else { Dtype::F16 };
            assert_eq!((view.dtype, view.name()), (want, tensor));
            let all = view.to_f32().unwrap();
            let slow = view.bytes().chunks_exact(2).map(|b| match want {
                Dtype::BF16 => f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16),
                _ => half::f16::from_bits(u16::from_le_bytes([b[0], b[1]])).to_f32(),
            });
            assert!(all.iter().copied().eq(slow), "{tensor}");
        }
    }
    assert_eq!(Source::open(&Path::new(TINY).join("qwen3")).unwrap().config().family, Family::Qwen3);
    let sharded = Source::open(&Path::new(TINY).join("llama-sharded")).unwrap();
    let files = sharded
        .names()
        .map(|n| sharded.tensor(n).unwrap().file().to_owned())
        .collect::<std::collections::BTreeSet<_>>();
    assert_eq!(files.len(), 9);
    let err = sharded.tensor("nope").unwrap_err().to_string();
    assert!(err.contains("llama-sharded") && err.contains("nope"), "{err}");
}

#[test]
fn the_first_block_repeated_is_a_model() {
    for name in ["llama-sharded", "mistral", "qwen3"] {
        let source = Source::open(&Path::new(TINY).join(name)).unwrap();
        let made = source.repeating_first_block(5);
        made.validate().unwrap();
        let config = ModelConfig::from_hf_json(made.config_json(), Path::new("config.json")).unwrap();
        assert_eq!((config.num_layers, &config.sliding_window), (5, &made.config.sliding_window));
        for (name, _) in source.config.linear_shapes(0) {
            let first = source.tensor(&format!("{name}.weight")).unwrap();
            let last = made.tensor(&format!("{}.weight", name.replace("layers.0", "layers.4"))).unwrap();
            assert_eq!(first.bytes(), last.bytes(), "{name}");
        }
    }
}

#[test]
fn what_is_not_a_model() {
    let dir = tempfile::tempdir().unwrap();
    error(&dir, &["no config.json", "GGUF"]);
    fs::write(dir.path().join("m.gguf"), "").unwrap();
    error(&dir, &["m.gguf", "give"]);
    fs::write(dir.path().join("config.json"), "{").unwrap();
    error(&dir, &["config.json is not valid JSON"]);
    fs::write(dir.path().join("config.json"), config_json().to_string()).unwrap();
    error(&dir, &["neither model.safetensors nor model.safetensors.index.json"]);
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    error(&dir, &["pytorch_model.bin", "safe_serialization"]);
    let err = Source::open(&dir.path().join("absent")).unwrap_err().to_string();
    assert!(err.contains("cannot read") && err.contains("absent"), "{err}");
    fs::write(dir.path().join("model.safetensors"), "").unwrap();
    let err = Source::open(&dir.path().join("model.safetensors")).unwrap_err().to_string();
    assert!(err.contains("give the directory"), "{err}");
    error(&dir, &["model.safetensors: ends within its header (0 bytes)", "download"]);
    fs::write(dir.path().join("config.json"), json!({"model_type": "gpt2"}).to_string()).unwrap();
    error(&dir, &["config.json", "\"gpt2\"", "llama, mistral"]);
}

#[test]
fn all_tensor_problems_are_listed() {
    let mut tensors = stored(&config_json());
    let q = "model.layers.0.self_attn.q_proj.weight";
    tensors.insert(q.into(), (StDtype::F8_E4M3, vec![8, 8], vec![0; 64]));
    tensors.insert("model.layers.1.mlp.up_proj.weight".into(), (StDtype::F32, vec![8, 12], vec![0; 384]));
    tensors.insert("model.norm.weight".into(), (StDtype::I64, vec![8], vec![0; 64]));
    tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), (StDtype::F32, vec![8], vec![0; 32]));
    tensors
        .insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (StDtype::F32, vec![2], vec![0; 8]));
    tensors.remove("model.layers.1.mlp.down_proj.weight");
    let text = error(
        &write(&config_json(), &tensors),
        &[
            "5 problems",
            "q_proj.weight in ",
            "model.safetensors is stored as F8_E4M3",
            "model.norm.weight in ",
            "I64",
            "mlp.up_proj.weight has shape [8, 12], but the configuration asks for [12, 8]",
            "mlp.down_proj.weight [8, 12] is missing",
            "q_proj.bias is not a tensor of",
        ],
    );
    assert!(!text.contains("inv_freq"), "{text}");
    tensors.retain(|n, _| !n.contains("layers"));
    error(&write(&config_json(), &tensors), &["19 problems", "and 9 more"]);
}

#[test]
fn shards_go_through_the_index() {
    let tensors = stored(&config_json());
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("config.json"), config_json().to_string()).unwrap();
    let (a, b): (Stored, Stored) =
        tensors.iter().map(|(k, v)| (k.clone(), v.clone())).partition(|(n, _)| n.contains("layers.0"));
    fs::write(at("a.safetensors"), safetensors_bytes(&a)).unwrap();
    let index = |f: &dyn Fn(&str) -> Value| {
        let map: Value = tensors.keys().map(|n| (n.clone(), f(n))).collect::<serde_json::Map<_, _>>().into();
        fs::write(at("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    };
    index(&|n| json!(if a.contains_key(n) { "a.safetensors" } else { "b.safetensors" }));
    error(
        &dir,
        &["index.json names the shard b.safetensors, which is missing (12 tensors", "lm_head.weight"],
    );
    fs::write(at("b.safetensors"), safetensors_bytes(&b)).unwrap();
    // A stale single file beside the index is not looked at.
    fs::write(at("model.safetensors"), "stale").unwrap();
    assert_eq!(Source::open(dir.path()).unwrap().names().count(), tensors.len());

    index(&|n| json!(if n.contains("norm") { "a.safetensors" } else { "b.safetensors" }));
    error(&dir, &["safetensors lacks the tensor", "model.safetensors.index.json places there"]);
    for bad in [json!("../x.safetensors"), json!("/etc/passwd"), json!(""), json!(3)] {
        index(&|_| bad.clone());
        error(&dir, &["index.json", "which is not a file name"]);
    }
    fs::write(at("model.safetensors.index.json"), "{}").unwrap();
    error(&dir, &["weight_map"]);
}

#[test]
fn tying_is_settled_by_the_tensors() {
    let with_flag = |flag: bool| {
        let mut json = config_json();
        json["tie_word_embeddings"] = json!(flag);
        json
    };
    let tied = |flag: bool, tensors: &Stored| {
        let source = Source::open(write(&with_flag(flag), tensors).path()).unwrap();
        assert_eq!(source.config_json()["tie_word_embeddings"], json!(source.config().tie_word_embeddings));
        assert_eq!(source.has("lm_head.weight"), !source.config().tie_word_embeddings);
        source.config().tie_word_embeddings
    };
    let both = stored(&config_json());
    assert!(!tied(false, &both));
    assert!(tied(true, &both));
    let mut differ = both.clone();
    differ.get_mut("lm_head.weight").unwrap().2[0] ^= 1;
    assert!(!tied(true, &differ));
    let mut absent = both;
    absent.remove("lm_head.weight");
    assert!(tied(false, &absent));
    assert!(tied(true, &absent));
}

#[test]
fn quantized_checkpoints_leave_linears_to_their_reader() {
    let mut config = config_json();
    config["quantization_config"] = json!({"quant_method": "specquant"});
    let mut tensors = stored(&config);
    for (name, packed, out) in [("model.layers.0.mlp.up_proj", 48, 12), ("lm_head", 40, 10)] {
        tensors.remove(&format!("{name}.weight")).unwrap();
        tensors.insert(format!("{name}.weight_packed"), (StDtype::U8, vec![packed], vec![0; packed]));
        tensors.insert(format!("{name}.weight_scale"), (StDtype::F32, vec![out, 1], vec![0; 4 * out]));
    }
    let source = Source::open(write(&config, &tensors).path()).unwrap();
    assert!(source.is_quantized() && !source.config().tie_word_embeddings);
    assert_eq!(source.tensor("lm_head.weight_packed").unwrap().bytes().len(), 40);
    tensors.remove("model.layers.1.mlp.up_proj.weight");
    error(&write(&config, &tensors), &["layers.1.mlp.up_proj.weight [12, 8] is missing"]);
    // A width that no tensor has is refused before anything is made of that size.
    config["intermediate_size"] = json!(16_000_000);
    error(
        &write(&config, &tensors),
        &["layers.0.mlp.up_proj.weight_scale has shape [12, 1]", "16000000 channels"],
    );
}

#[test]
fn side_files_and_generation_config() {
    let dir = write(&config_json(), &stored(&config_json()));
    for name in [
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "tokenizer.model",
        "README.md",
        "readme.txt",
        "x.bin",
        ".hidden.json",
    ] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    fs::create_dir(dir.path().join("sub.json")).unwrap();
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [2, 7]}"#).unwrap();
    let source = Source::open(dir.path()).unwrap();
    assert_eq!(source.config().eos_token_ids, [2, 7]);
    let files = source.side_files().unwrap();
    let names: Vec<_> = files.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(
        names,
        ["chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer.model"]
    );
    assert_eq!(files[2].1, b"merges.txt");
}

#[test]
fn truncation_anywhere_is_an_error() {
    let dir = write(&config_json(), &stored(&config_json()));
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    assert!(SafeTensors::deserialize(&bytes).is_ok() && Source::open(dir.path()).is_ok());
    for n in (0..bytes.len()).step_by(7) {
        fs::write(&path, &bytes[..n]).unwrap();
        error(&dir, &["model.safetensors", "truncated or damaged"]);
    }
    fs::write(&path, [&bytes[..], &[0]].concat()).unwrap();
    error(&dir, &["not the size that its header describes"]);
}

proptest! {
    #[test]
    fn bit_flips_never_panic(at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let mut tensors = stored(&config_json());
        tensors.values_mut().take(3).for_each(|t| *t = (StDtype::BF16, t.1.clone(), bf16::ONE.to_le_bytes().repeat(t.2.len() / 4)));
        let dir = write(&config_json(), &tensors);
        let path = dir.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        // Mostly in the header: elsewhere only values change.
        let at = at.index(bytes.len().min(3000));
        bytes[at] ^= 1 << bit;
        fs::write(&path, &bytes).unwrap();
        if let Ok(source) = Source::open(dir.path()) {
            for name in source.names() {
                let _ = source.tensor(name).unwrap().to_f32();
            }
        }
    }
}
