//! GGUF files: small ones written here, whole, damaged and unsupported; and the real SmolLM2.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::{Error, Message};

#[path = "../../tests/gguf_writer/mod.rs"]
mod gguf_writer;
use gguf_writer::{Writer, tiny};

impl Writer {
    fn open(&self) -> Result<(tempfile::TempDir, Source)> {
        open_bytes(&self.build())
    }

    fn error(&self, parts: &[&str]) {
        says(&self.open().map(|(_, s)| s).unwrap_err(), parts);
    }

    fn tokenizer(&self) -> Result<Tokenizer> {
        let (_dir, source) = self.open()?;
        source.tokenizer()
    }
}

fn open_bytes(bytes: &[u8]) -> Result<(tempfile::TempDir, Source)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    fs::write(&path, bytes).unwrap();
    Source::open(&path).map(|s| (dir, s))
}

fn says(err: &Error, parts: &[&str]) {
    let err = err.to_string();
    for part in parts {
        assert!(err.contains(part), "{err:?} lacks {part:?}");
    }
}

#[test]
fn a_small_file_reads() {
    let (_dir, source) = tiny("llama").open().unwrap();
    let config = source.config();
    assert_eq!((config.vocab_size, config.head_dim, config.rope_theta), (4, 16, 1e4));
    assert!(config.tie_word_embeddings && config.eos_token_ids == [3] && config.bos_token_id.is_none());
    assert_eq!(&ModelConfig::from_hf_json(source.config_json(), Path::new("x")).unwrap(), config);
    for name in source.names() {
        source.tensor(name).unwrap().to_f32().unwrap();
    }
    let up = source.tensor("model.layers.0.mlp.up_proj.weight").unwrap();
    assert_eq!((up.dtype, &up.shape[..]), (Dtype::BF16, &[32, 32][..]));

    // Rows of q and k come in Hugging Face's order: row p*8 + j of a head lies at 2j + p.
    let q = source.tensor("model.layers.0.self_attn.q_proj.weight").unwrap();
    let mut stored = vec![0.0; 32 * 32];
    gguf_quants::dequantize(Dtype::Q8_0, q.bytes(), &mut stored);
    let rows = q.to_f32().unwrap();
    for (head, p, j) in [(0, 0, 0), (0, 1, 0), (0, 0, 5), (1, 1, 7)] {
        let (hf, ggml) = (head * 16 + p * 8 + j, head * 16 + 2 * j + p);
        assert_eq!(rows[hf * 32..][..32], stored[ggml * 32..][..32]);
    }
    let t = source.tokenizer().unwrap();
    assert_eq!(t.encode("ab<|e|>a", true).unwrap(), [2, 3, 0]);
    assert_eq!(t.eos_id(), Some(3));
    assert!(matches!(t.chat_prompt(&[], true), Err(Error::NoChatTemplate { .. })));
}

#[test]
fn other_architectures() {
    let mut w = tiny("qwen2");
    for (name, n) in [("q", 32), ("k", 16), ("v", 16)] {
        w.tensor(&format!("blk.0.attn_{name}.bias"), &[n], 0);
    }
    w.tensor("output.weight", &[4, 32], 8);
    let (_dir, source) = w.open().unwrap();
    assert!(
        source.config().attention_bias && !source.config().attention_out_bias && source.has("lm_head.weight")
    );
    // Not permuted: the file's order is Hugging Face's.
    let bias = source.tensor("model.layers.0.self_attn.q_proj.bias").unwrap().to_f32().unwrap();
    assert!(bias.iter().enumerate().all(|(i, b)| *b == i as f32 * 0.25));

    let mut w = tiny("qwen3");
    w.tensor("blk.0.attn_q_norm.weight", &[16], 0).tensor("blk.0.attn_k_norm.weight", &[16], 0);
    assert!(w.open().unwrap().1.config().qk_norm);
    tiny("qwen3").error(&["self_attn.q_norm.weight [16] is missing"]);
    tiny("gemma").error(&["\"gemma\"", "llama (Mistral included), qwen2, qwen3, gemma3"]);
}

#[test]
fn gemma3() {
    let mut w = tiny("gemma3");
    w.error(&["gemma3.attention.sliding_window is missing"]);
    w.uint("gemma3.attention.sliding_window", 8)
        .uint("gemma3.block_count", 2)
        .uint("gemma3.attention.key_length", 16);
    w.uint("gemma3.attention.sliding_window_pattern", 2).float("gemma3.rope.freq_base", 1e6);
    for layer in [0, 1] {
        for (name, shape, kind, _) in tiny("gemma3").tensors {
            if let Some(name) = name.strip_prefix("blk.0.") {
                let shape: Vec<u64> = shape.into_iter().rev().collect();
                w.tensor(&format!("blk.{layer}.{name}"), &shape, kind);
            }
        }
        for (name, n) in
            [("attn_q_norm", 16), ("attn_k_norm", 16), ("post_attention_norm", 32), ("post_ffw_norm", 32)]
        {
            w.tensor(&format!("blk.{layer}.{name}.weight"), &[n], 0);
        }
    }
    let (_dir, source) = w.open().unwrap();
    let config = source.config();
    assert_eq!(config.sliding_window, [Some(8), None]);
    assert_eq!((config.rope_theta, config.local_rope_theta), (1e6, Some(1e4)));
    assert_eq!((config.query_pre_attn_scalar, config.embedding_scale), (Some(16), 32f32.sqrt()));
    assert_eq!(&ModelConfig::from_hf_json(source.config_json(), Path::new("x")).unwrap(), config);
    // Norms are what they multiply by, with nothing to add.
    let norm = source.tensor("model.layers.1.pre_feedforward_layernorm.weight").unwrap().to_f32().unwrap();
    assert_eq!(norm[..3], [0.0, 0.25, 0.5]);
    w.float("gemma3.final_logit_softcapping", 30.0)
        .error(&["final_logit_softcapping is 30", "not supported"]);
}

#[test]
fn refusals_name_the_remedy() {
    let with = |f: &dyn Fn(&mut Writer)| {
        let mut w = tiny("llama");
        f(&mut w);
        w
    };
    with(&|w| _ = w.uint("llama.expert_count", 8)).error(&["mixtures of experts"]);
    with(&|w| _ = w.uint("split.count", 3)).error(&["llama-gguf-split --merge"]);
    with(&|w| _ = w.uint("llama.rope.dimension_count", 8)).error(&["llama.rope.dimension_count is 8", "16"]);
    with(&|w| _ = w.text("llama.rope.scaling.type", "yarn")).error(&["\"yarn\"", "linear"]);
    with(&|w| _ = w.text("llama.block_count", "x")).error(&["llama.block_count is not a whole number"]);
    with(&|w| w.keys.retain(|k| k.0 != "llama.block_count")).error(&["llama.block_count is missing"]);
    with(&|w| _ = w.tensor("blk.0.ffn_up.weight", &[32, 64], 8))
        .error(&["mlp.up_proj.weight has shape [32, 64]"]);
    with(&|w| _ = w.tensor("blk.0.ffn_up.weight", &[32, 32], 10)).error(&[
        "m.gguf",
        "mlp.up_proj",
        "Q2_K",
        "Q4_K",
    ]);
    with(&|w| _ = w.tensor("blk.0.extra.weight", &[32], 0)).error(&["blk.0.extra.weight is not a tensor of"]);
    with(&|w| _ = w.uint("general.alignment", 3)).error(&["alignment"]);
    let version = |v: u32| {
        let mut bytes = tiny("llama").build();
        bytes[4..8].copy_from_slice(&v.to_le_bytes());
        open_bytes(&bytes)
    };
    assert!(version(2).is_ok());
    says(&version(1).unwrap_err(), &["GGUF version 1", "supported are 2 and 3"]);
    says(&version(0x0300_0000).unwrap_err(), &["big-endian"]);
    says(&open_bytes(b"PK\x03\x04 not a model").unwrap_err(), &["does not start with GGUF"]);
    // Counts that no file holds are refused before anything is allocated.
    for at in [8, 16] {
        let mut bytes = tiny("llama").build();
        bytes[at..at + 8].copy_from_slice(&(u64::MAX / 3).to_le_bytes());
        says(&open_bytes(&bytes).unwrap_err(), &["announces", "more than fit"]);
    }
}

#[test]
fn rope_factors_of_llama3() {
    let mut w = tiny("llama");
    w.float("llama.rope.freq_base", 500_000.0).uint("llama.rope.dimension_count", 16);
    let scaling = crate::RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let mut config = w.open().unwrap().1.config().clone();
    let plain = config.inv_freq(false);
    config.rope_scaling = scaling;
    let factors: Vec<u8> =
        plain.iter().zip(config.inv_freq(false)).flat_map(|(p, s)| (p / s).to_le_bytes()).collect();
    w.tensors.push(("rope_freqs.weight".into(), vec![8], 0, factors));
    let (_dir, source) = w.open().unwrap();
    assert_eq!(source.config().rope_scaling, scaling);
    assert!(!source.has("rope_freqs.weight"));
    w.tensor("rope_freqs.weight", &[8], 0).error(&["rope_freqs.weight", "Hugging Face directory"]);
}

#[test]
fn truncation_at_every_byte_is_an_error() {
    let bytes = tiny("llama").build();
    let path = Path::new("m.gguf");
    assert!(Gguf::parse(path, &bytes).is_ok());
    for n in 0..bytes.len() {
        let err = Gguf::parse(path, &bytes[..n]).map(|_| ()).unwrap_err();
        says(&err, &["m.gguf", "truncated or damaged"]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever a damaged header says, there is an error or a model; never a panic or an allocation beyond the file's size.
    #[test]
    fn damage_never_panics(at in any::<prop::sample::Index>(), what in prop_oneof![
        (0..8u8).prop_map(|bit| vec![1 << bit]),
        any::<u64>().prop_map(|n| n.to_le_bytes().into()),
        Just(vec![0xff; 8]),
    ]) {
        let mut bytes = tiny("llama").build();
        let at = at.index(1400);
        bytes[at..].iter_mut().zip(&what).for_each(|(b, x)| *b ^= x);
        if let Ok((_dir, source)) = open_bytes(&bytes) {
            for name in source.names() {
                let _ = source.tensor(name).unwrap().to_f32();
            }
            if let Ok(t) = source.tokenizer() {
                let _ = t.encode("abba<|e|>", true);
            }
        }
    }
}

#[test]
fn tokenizers_that_cannot_be() {
    let error = |f: &dyn Fn(&mut Writer), parts: &[&str]| {
        let mut w = tiny("llama");
        f(&mut w);
        says(&w.tokenizer().unwrap_err(), parts);
    };
    error(
        &|w| _ = w.text("tokenizer.ggml.pre", "tekken"),
        &["m.gguf", "\"tekken\"", "smollm, llama-bpe, qwen2"],
    );
    error(&|w| _ = w.text("tokenizer.ggml.model", "bert"), &["\"bert\"", "gpt2, llama"]);
    error(&|w| _ = w.texts("tokenizer.ggml.merges", &["a c"]), &["merge \"a c\""]);
    error(&|w| _ = w.texts("tokenizer.ggml.tokens", &["a", "b", "a", "c"]), &["\"a\" twice", "0 and 2"]);
    error(&|w| _ = w.i32s("tokenizer.ggml.token_type", &[1]), &["4 tokens but 1 token types"]);
    error(&|w| _ = w.uint("tokenizer.ggml.bos_token_id", 9), &["bos_token_id is 9", "4 tokens"]);
    error(&|w| w.keys.retain(|k| k.0 != "tokenizer.ggml.tokens"), &["no tokenizer"]);
}

#[test]
fn sentence_piece_vocabulary() {
    let mut w = tiny("llama");
    let tokens =
        ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "c", "▁a", "ab", "bc", "▁ab", "[x]"];
    let scores = [0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -9.0, -3.0, -2.0, -1.0, -4.0, 0.0];
    w.text("tokenizer.ggml.model", "llama")
        .texts("tokenizer.ggml.tokens", &tokens)
        .f32s("tokenizer.ggml.scores", &scores);
    w.i32s("tokenizer.ggml.token_type", &[2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1, 1, 1, 4]);
    w.uint("tokenizer.ggml.bos_token_id", 1)
        .uint("tokenizer.ggml.eos_token_id", 2)
        .uint("tokenizer.ggml.unknown_token_id", 0);
    w.tensor("token_embd.weight", &[14, 32], 1);
    let t = w.tokenizer().unwrap();
    let id = |token: &str| tokens.iter().position(|t| *t == token).unwrap() as u32;
    // "▁abc": b+c has the best score, so a+b never happens; then "▁a" forms.
    assert_eq!(t.encode("abc", false).unwrap(), [id("▁a"), id("bc")]);
    // BOS is added unless the file says otherwise; a space is put in front; é falls apart into bytes.
    assert_eq!(t.encode("ab é", true).unwrap(), [1, id("▁ab"), id("▁"), id("<0xC3>"), id("<0xA9>")]);
    assert_eq!(t.encode("zz", false).unwrap(), [id("▁"), 0]);
    assert_eq!(t.encode("b[x]</s>", false).unwrap(), [id("▁"), id("b"), id("[x]"), 2]);
    assert_eq!(t.decode(&t.encode("ab éa c", true).unwrap(), true).unwrap(), "ab éa c");
    assert_eq!((t.bos_id(), t.eos_id(), t.vocab_size()), (Some(1), Some(2), 14));

    let t = w
        .flag("tokenizer.ggml.add_space_prefix", false)
        .flag("tokenizer.ggml.add_bos_token", false)
        .tokenizer()
        .unwrap();
    assert_eq!(t.encode("ab a", true).unwrap(), [id("ab"), id("▁a")]);
    assert_eq!(t.decode(&[id("ab"), id("▁a")], true).unwrap(), "ab a");
    w.f32s("tokenizer.ggml.scores", &[1.0]);
    says(&w.tokenizer().unwrap_err(), &["14 tokens but 1 scores"]);
}

/// Each pre-tokenizer splits as its model's published tokenizer.json does.
#[test]
fn pre_tokenizers() {
    let tokens = ["1", "2", "12", "'", "S", "'S", "a", "Ġ", "Ġa", "!", "Ċ", "<|b|>"];
    let mut w = tiny("llama");
    w.texts("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3]);
    w.texts("tokenizer.ggml.merges", &["1 2", "' S", "Ġ a"]).tensor("token_embd.weight", &[12, 32], 1);
    w.uint("tokenizer.ggml.bos_token_id", 11);
    let mut split = |pre: &str, text: &str| {
        let t = w.text("tokenizer.ggml.pre", pre).tokenizer().unwrap();
        t.encode(text, true).unwrap().iter().map(|id| tokens[*id as usize]).collect::<Vec<_>>().join("|")
    };
    assert_eq!(split("default", "12'S a"), "12|'|S|Ġa");
    assert_eq!(split("gpt-2", "1212"), "12|12");
    assert_eq!(split("smollm", "12 a"), "1|2|Ġa");
    // Digits by threes, contractions in either case, and a BOS by default.
    assert_eq!(split("llama-bpe", "2112'S a"), "<|b|>|2|1|1|2|'S|Ġa");
    assert_eq!(split("qwen2", "12'S a!\n"), "1|2|'S|Ġa|!|Ċ");
}

/// The real model: SPECQUANT_SMOLLM2, or its place in the user's cache.
fn smollm2() -> Source {
    let path = std::env::var_os("SPECQUANT_SMOLLM2").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").unwrap())
            .join(".cache/specquant/SmolLM2-135M-Instruct.Q4_1.gguf")
    });
    Source::open(&path).unwrap()
}

fn shared(name: &str) -> String {
    fs::read_to_string(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared")).join(name)).unwrap()
}

#[test]
fn smollm2_opens() {
    let source = smollm2();
    let c = source.config();
    assert_eq!((c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim), (30, 576, 9, 3, 64));
    assert_eq!((c.rope_theta, c.rms_norm_eps, c.max_position_embeddings), (1e5, 1e-5, 8192));
    assert!(c.tie_word_embeddings && c.bos_token_id == Some(1) && c.eos_token_ids == [2]);
    assert_eq!(source.names().count(), 272);
    assert_eq!(source.tensor("model.embed_tokens.weight").unwrap().dtype, Dtype::Q8_0);
    assert!(source.tensor("model.layers.29.self_attn.q_proj.weight").unwrap().to_f32().is_ok());
    let files = source.side_files().unwrap();
    let names: Vec<_> = files.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(
        names,
        ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
    );
}

#[test]
fn smollm2_tokenizes_like_hugging_face() {
    let t = smollm2().tokenizer().unwrap();
    let golden: Value = serde_json::from_str(&shared("golden/logits/logits.json")).unwrap();
    let prompts = golden["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 3);
    for prompt in prompts {
        let text = prompt["text"].as_str().unwrap();
        let ids = t.encode(text, true).unwrap();
        assert_eq!(json!(ids), prompt["token_ids"], "{}", prompt["name"]);
        assert_eq!(t.decode(&ids, false).unwrap(), text);
        if prompt["messages"].is_array() {
            let messages: Vec<Message> = serde_json::from_value(prompt["messages"].clone()).unwrap();
            assert_eq!(t.chat_prompt(&messages, true).unwrap(), text);
        }
        let greedy: Vec<u32> = serde_json::from_value(prompt["token_ids"].clone()).unwrap();
        let mut decode = t.decoder(false);
        let streamed: String = greedy.iter().filter_map(|id| decode(*id).unwrap()).collect();
        assert_eq!(streamed, text);
    }
}

/// The golden ids are of a tokenizer without the splitting of digits; their SHA-256 was compared once, this is their FNV-1a hash.
#[test]
fn smollm2_tokenizes_wikitext() {
    let source = smollm2();
    let mut files = source.side_files().unwrap();
    let text = shared("data/wikitext2/wiki.test.hf_joined.txt");
    let golden: Value = serde_json::from_str(&shared("golden/ppl/wikitext2_hf_tokenizer.json")).unwrap();
    let split = source.tokenizer().unwrap().encode(&text, true).unwrap();
    assert_eq!(split.len(), 304_978);

    let mut tokenizer: Value = serde_json::from_slice(&files[0].1).unwrap();
    tokenizer["pre_tokenizer"] = tokenizer["pre_tokenizer"]["pretokenizers"][1].clone();
    files[0].1 = tokenizer.to_string().into_bytes();
    let ids = Tokenizer::from_files(source.path(), &files).unwrap().encode(&text, true).unwrap();
    assert_eq!(json!(ids.len()), golden["n_tokens"]);
    assert_eq!(json!(ids[..16]), golden["first_16_token_ids"]);
    assert_eq!(ids.iter().zip(&split).position(|(a, b)| a != b), Some(66_557));
    let bytes = ids.iter().flat_map(|id| id.to_le_bytes());
    let fnv = bytes.fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    assert_eq!(fnv, 1_765_491_833_613_532_305);
}
