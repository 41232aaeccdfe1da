//! Valid inputs, small enough that nearly every byte of them matters. They are made here and not stored, so that they follow the formats.
//!
//! # Panics
//! All functions, when a seed is not what it should be: the formats have changed, or the temporary directory cannot be written.
#![allow(clippy::unwrap_used, clippy::panic, reason = "without a seed there is nothing to fuzz")]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use half::f16;
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use specquant_model::{ModelConfig, Source};
use specquant_quantize::{Destination, Recipe, run};

use crate::files::{join, read, write};
use crate::gguf_writer;

/// Files by name.
pub type Files = Vec<(String, Vec<u8>)>;

/// Tokens of the tiny models.
const VOCAB: usize = 48;

/// Two calibration sequences.
pub fn texts() -> Vec<Vec<u32>> {
    (0..2).map(|s| (0..24).map(|i| (i * 7 + s * 5) % VOCAB as u32).collect()).collect()
}

fn file(name: &str, bytes: impl Into<Vec<u8>>) -> (String, Vec<u8>) {
    (name.to_owned(), bytes.into())
}

/// config.json of a tiny model.
pub fn config(family: &str, layers: usize) -> Value {
    let mut config = json!({
        "model_type": family, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": [2, 3],
    });
    match family {
        "gemma3_text" => {
            config["sliding_window"] = json!(8);
            config["layer_types"] = json!(vec!["sliding_attention"; layers]);
            config["query_pre_attn_scalar"] = json!(8);
        }
        "llama" => {
            config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
        }
        _ => {}
    }
    config
}

fn noise(n: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    (0..n).flat_map(|_| f16::from_f32(rng.random_range(-0.3f32..0.3)).to_le_bytes()).collect()
}

/// A dense model of random weights with this config.json, in as many files as asked for.
pub fn dense(config: &Value, shards: usize) -> Files {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let shapes = ModelConfig::from_hf_json(config, Path::new("config.json")).unwrap().expected_tensors();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> =
        shapes.into_iter().map(|(n, s)| (n, s.clone(), noise(s.iter().product(), &mut rng))).collect();
    let mut files = vec![file("config.json", format!("{config:#}"))];
    let mut index = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let name = match shards {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{shards:05}.safetensors", i + 1),
        };
        let view = |(n, s, b): &'_ (String, Vec<usize>, Vec<u8>)| (n.clone(), (s.clone(), b.clone()));
        let parts: Vec<_> = part.iter().map(view).collect();
        let views = parts.iter().map(|(n, (s, b))| (n, TensorView::new(Dtype::F16, s.clone(), b).unwrap()));
        files.push((name.clone(), safetensors::serialize(views, None).unwrap()));
        index.extend(part.iter().map(|(tensor, ..)| (tensor.clone(), json!(name))));
    }
    if shards > 1 {
        let index = json!({"metadata": {"total_size": 0}, "weight_map": index});
        files.push(file("model.safetensors.index.json", index.to_string()));
    }
    files.push(file("tokenizer.json", byte_pairs().to_string()));
    files
}

fn vocabulary() -> serde_json::Map<String, Value> {
    let letters = "abcdefghijklmnopqrstuvwxyz .Ġ<>";
    let words = ["th", "the", "Ġa", "har", "<s>", "<|im_end|>"];
    let tokens = letters.chars().map(String::from).chain(words.map(str::to_owned));
    tokens.enumerate().map(|(id, token)| (token, json!(id))).collect()
}

fn byte_pairs() -> Value {
    let vocab = vocabulary();
    let added: Vec<Value> = ["<s>", "<|im_end|>"]
        .iter()
        .map(|t| {
            json!({"id": vocab[*t], "content": t, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
        })
        .collect();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|\\s+(?!\\S)"}, "behavior": "Isolated", "invert": false}, bytes]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocab["<s>"]], "tokens": ["<s>"]}}},
        "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [["t", "h"], ["th", "e"], ["Ġ", "a"]]},
    })
}

/// As sentence_piece in specquant-model writes it, with what other tools add.
fn sentence_pieces() -> Value {
    let mut all = byte_pairs();
    all["truncation"] =
        json!({"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 2});
    all["padding"] = json!({"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": 4, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "a"});
    all["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "Strip", "strip_left": true, "strip_right": false},
        {"type": "Lowercase"}, {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}]});
    all["pre_tokenizer"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    all["decoder"] = json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    all["model"]["byte_fallback"] = json!(true);
    all["model"]["unk_token"] = json!("<s>");
    all
}

fn other_models() -> [Value; 3] {
    let vocab = vocabulary();
    let pieces: Vec<Value> = vocab.keys().map(|token| json!([token, -1.5])).collect();
    let with = |model: Value| {
        let mut all = byte_pairs();
        all["model"] = model;
        all["pre_tokenizer"] = json!({"type": "Whitespace"});
        all
    };
    [
        with(json!({"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": false})),
        with(
            json!({"type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab}),
        ),
        with(json!({"type": "WordLevel", "unk_token": "<s>", "vocab": vocab})),
    ]
}

/// What chat templates of well-known models consist of.
const TEMPLATES: [&str; 4] = [
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ bos_token }}{%- if messages[0].role == 'system' %}{% set system = messages[0].content|trim %}{% set loop_messages = messages[1:] %}{% else %}\
     {% set loop_messages = messages %}{% endif %}{% for m in loop_messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
     {{ raise_exception('roles must alternate') }}{% endif %}[INST] {{ m.content.strip() }} [/INST]{{ eos_token }}{% endfor %}",
    "{% macro show(x, n=3) %}{{ x|tojson(indent=2) }}{{ x * n }}{% endmacro %}{% set ns = namespace(i=0) %}{% for m in messages if m.content %}\
     {% set ns.i = ns.i + m.content|length %}{{ show([m.role, m.content[::-1], ns.i]) }}{% endfor %}{{ strftime_now('%d %b %Y') }}",
    "{% generation %}{{ messages|map(attribute='role')|join(', ') }}{{ 'a-b'.split('-')[1].upper().replace('B', 'c') }}\
     {{ '{}: {:>8}'.format(1, 'x') }}{{ ','.join(['a', 'b']) }}{{ range(3)|list }}{% endgeneration %}",
];

/// Chat templates.
pub fn templates() -> &'static [Vec<u8>] {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS.get_or_init(|| TEMPLATES.map(|t| t.as_bytes().to_vec()).into())
}

/// Tokenizers, the first one byte-level as most models have it.
pub fn tokenizers() -> &'static [Vec<u8>] {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>", "pad_token": null,
            "chat_template": [{"name": "default", "template": TEMPLATES[0]}]});
        let beside = |tokenizer: Value| {
            join(&[
                file("tokenizer.json", tokenizer.to_string()),
                file("tokenizer_config.json", config.to_string()),
                file("special_tokens_map.json", json!({"unk_token": "<s>"}).to_string()),
            ])
        };
        [byte_pairs(), sentence_pieces()].into_iter().chain(other_models()).map(beside).collect()
    })
}

/// Dense Hugging Face directories.
pub fn models() -> &'static [Vec<u8>] {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let all = [("llama", 1, 1), ("llama", 2, 2), ("qwen3", 1, 1), ("gemma3_text", 1, 1)];
        all.map(|(family, layers, shards)| join(&dense(&config(family, layers), shards))).into()
    })
}

/// GGUF files.
pub fn ggufs() -> &'static [Vec<u8>] {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let byte_level = gguf_writer::tiny("llama");
        let mut pieces = byte_level.clone();
        pieces.text("tokenizer.ggml.model", "llama").f32s("tokenizer.ggml.scores", &[0.0, -1.0, -2.0, 0.0]);
        pieces.text("tokenizer.chat_template", TEMPLATES[0]).float("llama.rope.freq_base", 1e4);
        vec![byte_level.build(), pieces.build()]
    })
}

/// Recipes in TOML: the built-in ones that learn nothing, in sizes that suit the tiny model, and some that name every key.
pub fn recipes() -> &'static [Vec<u8>] {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS.get_or_init(|| RECIPES.map(|text| text.as_bytes().to_vec()).into())
}

const RECIPES: [&str; 9] = [
    "name = \"rtn\"\n[scheme]\nweight_bits = 4\nact_bits = 4\nkv_bits = 4\n[rounding]\nkind = \"rtn\"\n",
    "name = \"gptq\"\nembeddings = \"int8\"\nseed = 3\nthreads = 2\n[scheme]\nweight_bits = 3\nact_bits = 8\nkv_bits = 16\ngroup_size = 16\n\
     act_clip = 0.9\n[rounding]\nkind = \"gptq\"\ndampening_frac = 0.01\nblock_size = 16\nactorder = true\n[weight_clip]\nenabled = true\ngrid = 20\n\
     max_shrink = 0.5\nnorm = 2.0\nobjective = \"output\"\n[calibration]\nsamples = 2\nsequence_length = 24\nsearch_tokens = 8\n",
    "name = \"specquant\"\n[scheme]\nweight_bits = 4\nact_bits = 4\nkv_bits = 4\nkv_clip = 0.9\n[smooth]\nsmoothing_strength = \"search\"\n[branch]\n\
     basis = \"fourier\"\nmean_k = 4\nmax_k = 8\nscore = \"act\"\ntemperature = 0.5\n[rounding]\nkind = \"gptq\"\n[calibration]\nsearch_tokens = 4\n",
    "name = \"top\"\n[branch]\nbasis = \"fourier-top\"\nmean_k = 2\n[rounding]\nkind = \"rtn\"\n",
    "name = \"rows\"\n[scheme]\nweight_bits = 8\nact_bits = 8\nkv_bits = 8\n[branch]\nbasis = \"rows\"\nrank = 3\n[rounding]\nkind = \"rtn\"\n",
    "name = \"svdquant\"\n[smooth]\nsmoothing_strength = 0.5\n[branch]\nbasis = \"svd\"\nrank = 3\niterations = 3\n[rounding]\nkind = \"gptq\"\n",
    "name = \"matched\"\n[branch]\nbasis = \"rows\"\nrank = 1\noverhead = \"matched\"\n[rounding]\nkind = \"gptq\"\n",
    "name = \"quarot\"\n[rotate]\nkind = \"hadamard\"\nresidual = true\n[rounding]\nkind = \"gptq\"\n",
    "name = \"spectral\"\nembeddings = \"int8\"\nkv_center = true\nsearch_act_clip = true\n[scheme]\nweight_bits = 4\nact_bits = 4\nkv_bits = 4\nlevels = \"gaussian\"\n\
     kv_intact = 4\n[rotate]\nkind = \"hadamard\"\nresidual = false\n[input]\nrotation = \"hadamard\"\nkeep = 4\n[rounding]\nkind = \"gptq\"\n",
];

/// The directory of the model that recipes are tried on.
pub fn recipe_model() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap().keep();
        write(&dir, &dense(&config("qwen2", 1), 1)).unwrap();
        dir
    })
}

/// Checkpoints of ours: what every recipe writes, and one with learned transforms.
pub fn checkpoints() -> &'static [Vec<u8>] {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let source = Source::open(recipe_model()).unwrap();
        let mut all: Vec<Files> = Vec::new();
        for text in RECIPES {
            let (file, out) = (dir.path().join("recipe.toml"), dir.path().join("out"));
            std::fs::write(&file, text).unwrap();
            let recipe = Recipe::load(&file.to_string_lossy()).unwrap_or_else(|e| panic!("{e}"));
            run(&source, &recipe, Some(&texts()), &Destination::replacing(&out), &mut |_| ())
                .unwrap_or_else(|e| panic!("{text}: {e}"));
            all.push(read(&out).unwrap());
        }
        let learned = kronecker(&all[0]);
        all.push(learned);
        all.iter().map(join).collect()
    })
}

/// A checkpoint whose inputs go through learned matrices, made of one whose inputs do not.
fn kronecker(plain: &Files) -> Files {
    let mut files = plain.clone();
    for (name, bytes) in &mut files {
        if name == "config.json" {
            let mut json: Value = serde_json::from_slice(bytes).unwrap();
            json["quantization_config"]["input_rotation"] = json!("kronecker");
            *bytes = json.to_string().into_bytes();
        } else if name == "model.safetensors.index.json" {
            let mut json: Value = serde_json::from_slice(bytes).unwrap();
            for (tensor, _) in MATRICES {
                json["weight_map"][format!("model.layers.0.{tensor}")] =
                    json!("model-00002-of-00002.safetensors");
            }
            *bytes = json.to_string().into_bytes();
        } else if name.starts_with("model-00002") {
            *bytes = with_matrices(bytes);
        }
    }
    files
}

/// Learned matrices and their widths: 32 = 4 · 8, 48 = 6 · 8.
const MATRICES: [(&str, usize); 9] = [
    ("qkv.kronecker_left", 4),
    ("qkv.kronecker_right", 8),
    ("o.kronecker_left", 4),
    ("o.kronecker_right", 8),
    ("gate_up.kronecker_left", 4),
    ("gate_up.kronecker_right", 8),
    ("down.kronecker_left", 6),
    ("down.kronecker_right", 8),
    ("self_attn.k_transform", 8),
];

fn with_matrices(bytes: &[u8]) -> Vec<u8> {
    let stored = SafeTensors::deserialize(bytes).unwrap();
    let matrix = |n: usize| -> Vec<u8> {
        let value = |i: usize| if i.is_multiple_of(n + 1) { 1.0 } else { (i as f32).sin() / 8.0 };
        (0..n * n).flat_map(|i| f16::from_f32(value(i)).to_le_bytes()).collect()
    };
    let added: Vec<(String, usize, Vec<u8>)> =
        MATRICES.iter().map(|(name, n)| (format!("model.layers.0.{name}"), *n, matrix(*n))).collect();
    let views =
        added.iter().map(|(name, n, b)| (name.clone(), TensorView::new(Dtype::F16, vec![*n; 2], b).unwrap()));
    let old = stored.iter().map(|(name, view)| (name.to_owned(), view));
    safetensors::serialize(old.chain(views), None).unwrap()
}

/// Rows of the nine tasks, and of calibration text.
pub fn tasks() -> &'static [Vec<u8>] {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let labelled = json!({"id": "a", "question_stem": "The sun is", "question": "The sun is", "choices": {"text": ["hot", "cold"],
            "label": ["A", "B"]}, "answerKey": "A"});
        let rows = [
            json!({"question": "is it so", "passage": "It is so.", "answer": true, "label": 1, "idx": 3}),
            json!({"ind": 1, "activity_label": "Cook", "ctx_a": "A man", "ctx_b": "stirs [title] it", "ctx": "A man stirs", "endings": ["a.", "b", "c", "d"],
                "label": "2", "activity": "x"}),
            json!({"text": "In my palm is a clear stone"}),
            labelled,
            json!({"goal": "open", "sol1": "turn", "sol2": "pull", "label": 0}),
            json!({"context": "Al ran.", "question": "Why?", "answerA": "fear", "answerB": "joy", "answerC": "rain", "label": "3"}),
            json!({"sentence": "The box _ was big.", "option1": "one", "option2": "two", "answer": "1"}),
        ];
        rows.iter().map(|row| format!("{row}\n{row}\n").into_bytes()).collect()
    })
}
