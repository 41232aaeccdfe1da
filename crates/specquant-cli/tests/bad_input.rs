//! Bad input: exit code 2, one message that names the file, the tensor and the remedy, and nothing written.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the lints' exception covers #[test] functions only

mod common;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use common::*;
use safetensors::Dtype;
use serde_json::{Value, json};

const UP: &str = "model.layers.1.mlp.up_proj.weight";
const NAN_F16: [u8; 2] = [0x00, 0x7e];

/// Arguments of `generate`.
fn generate(model: &Path) -> Vec<String> {
    let model = model.to_str().unwrap();
    ["generate", "-m", model, "--prompt", "The harbour", "--max-new-tokens", "4"].map(str::to_owned).to_vec()
}

#[test]
fn missing_shard() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    fs::remove_file(model.join("model-00007-of-00009.safetensors")).unwrap();
    let words =
        ["model.safetensors.index.json", "model-00007-of-00009.safetensors", "missing", UP, "download"];
    refuse_quantize(&lab, &model, &[], &words);
    refuse(&lab, generate(&model), &words);
}

#[test]
fn truncated_safetensors() {
    let lab = Lab::new();
    let model = lab.model("llama-tied-bf16");
    let file = model.join("model.safetensors");
    // Within the data, within the header, within the length of the header, and nothing at all.
    for bytes in [300_000, 1000, 5, 0] {
        truncate(&file, bytes);
        refuse_quantize(&lab, &model, &[], &["model.safetensors", "truncated", "download"]);
        refuse(&lab, generate(&model), &["model.safetensors", "truncated", "download"]);
    }
    let sharded = lab.model("llama-sharded");
    truncate(&shard_of(&sharded, UP), 20_000);
    refuse_quantize(&lab, &sharded, &[], &["model-00007-of-00009.safetensors", "truncated", "download"]);
}

/// `scripts/fetch-model.sh` puts it there.
fn smollm2() -> PathBuf {
    let cache = || {
        Path::new(&std::env::var("HOME").unwrap()).join(".cache/specquant/SmolLM2-135M-Instruct.Q4_1.gguf")
    };
    std::env::var("SPECQUANT_SMOLLM2").map_or_else(|_| cache(), PathBuf::from)
}

#[test]
fn truncated_gguf() {
    let path = smollm2();
    let mut start = Vec::new();
    let file = fs::File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.take(4_000_000).read_to_end(&mut start).unwrap();
    let lab = Lab::new();
    // Nothing, within the magic, the counts, the metadata, the vocabulary, and the tensors.
    for bytes in [0, 3, 20, 1000, 300_000, 4_000_000] {
        let cut = lab.file("cut.gguf", &start[..bytes]);
        refuse_quantize(&lab, &cut, &[], &["cut.gguf", "truncated", "download"]);
        refuse(&lab, generate(&cut), &["cut.gguf", "truncated", "download"]);
    }
    let other = lab.file("other.gguf", "This is no model at all, whatever its name says.");
    refuse_quantize(&lab, &other, &[], &["other.gguf", "GGUF"]);
}

#[test]
fn wrong_dtype() {
    for (dtype, width) in [(Dtype::I64, 8), (Dtype::F64, 8), (Dtype::F8_E4M3, 1), (Dtype::I8, 1)] {
        let lab = Lab::new();
        let model = lab.model("llama-sharded");
        let shard = shard_of(&model, UP);
        edit_tensor(&shard, UP, |t| {
            t.dtype = dtype;
            t.bytes = vec![0; t.shape.iter().product::<usize>() * width];
        });
        let name = format!("{dtype:?}");
        let words = [shard.to_str().unwrap(), UP, &name, "supported: F32, F16, BF16"];
        refuse_quantize(&lab, &model, &[], &words);
        refuse(&lab, generate(&model), &words);
    }
}

#[test]
fn shape_that_disagrees_with_the_config() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let shard = shard_of(&model, UP);
    edit_tensor(&shard, UP, |t| t.shape = vec![96, 176]);
    let words = [shard.to_str().unwrap(), UP, "[96, 176]", "[176, 96]", "from one revision"];
    refuse_quantize(&lab, &model, &[], &words);
    refuse(&lab, generate(&model), &words);

    let model = lab.model("llama-tied-bf16");
    edit_json(&model.join("config.json"), |c| c["num_hidden_layers"] = json!(3));
    let missing = ["llama-tied-bf16", "model.layers.2.mlp.up_proj.weight", "missing", "from one revision"];
    refuse_quantize(&lab, &model, &[], &missing);
    edit_json(&model.join("config.json"), |c| c["num_hidden_layers"] = json!(1));
    refuse_quantize(&lab, &model, &[], &["llama-tied-bf16", UP, "not a tensor of", "from one revision"]);
}

#[test]
fn unusable_config() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let config = model.join("config.json");
    edit_json(&config, |c| c["model_type"] = json!("mamba"));
    let words = [config.to_str().unwrap(), "\"mamba\"", "supported: llama"];
    refuse_quantize(&lab, &model, &[], &words);
    refuse(&lab, generate(&model), &words);
    edit_json(&config, |c| {
        c["model_type"] = json!("llama");
        c["hidden_size"] = json!("large");
    });
    refuse_quantize(&lab, &model, &[], &[config.to_str().unwrap(), "hidden_size"]);
    fs::write(&config, "{\"model_type\": \"lla").unwrap();
    refuse_quantize(&lab, &model, &[], &[config.to_str().unwrap(), "not valid JSON"]);
    fs::remove_file(&config).unwrap();
    refuse_quantize(&lab, &model, &[], &["llama-sharded", "no config.json", "give a"]);
}

#[test]
fn nan_weights() {
    // Element 40 · 96 + 7 of the matrices, 7 of the norm.
    for (name, at, place) in [
        (UP, 40 * 96 + 7, "row 40, column 7"),
        ("model.layers.1.self_attn.k_proj.weight", 0, "row 0, column 0"),
        ("model.layers.0.input_layernorm.weight", 7, "column 7"),
        ("model.norm.weight", 95, "column 95"),
        ("model.embed_tokens.weight", 40 * 96 + 7, "row 40, column 7"),
        ("lm_head.weight", 319 * 96, "row 319, column 0"),
    ] {
        let lab = Lab::new();
        let model = lab.model("llama-sharded");
        let shard = shard_of(&model, name);
        edit_tensor(&shard, name, |t| t.bytes[2 * at..2 * at + 2].copy_from_slice(&NAN_F16));
        let text = lab.file("text.txt", TEXT);
        let text = text.to_str().unwrap();
        let words = [shard.to_str().unwrap(), name, "NaN", place, "damaged", "get it again"];
        // With a text from outside the model's own is not what reveals it.
        refuse_quantize(&lab, &model, &[], &words);
        refuse_quantize(&lab, &model, &["--calibration", text], &words);
        let report = specquant().args(["inspect", "--json"]).arg(&model).output().unwrap();
        let report: serde_json::Value = serde_json::from_slice(&report.stdout).unwrap();
        assert!(report["integrity"].as_str().unwrap().contains(place), "{report}");
        // Row 40 of the embeddings is the token "(", which occurs in neither text.
        if name != "model.embed_tokens.weight" {
            refuse(&lab, generate(&model), &words);
            let model = model.to_str().unwrap();
            let eval = ["eval", "ppl", "--json", "-m", model, "--text", text, "--window", "64"];
            refuse(&lab, eval, &words);
        }
    }
    // A token whose embedding is broken is noticed when it is used.
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let (name, at) = ("model.embed_tokens.weight", usize::from(b'h') * 96 + 3);
    edit_tensor(&shard_of(&model, name), name, |t| t.bytes[2 * at..2 * at + 2].copy_from_slice(&NAN_F16));
    refuse(&lab, generate(&model), &[name, "row 104, column 3", "get it again"]);
}

#[test]
fn calibration_text_without_text() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let calibrate = |file: &Path, words: &[&str]| {
        refuse_quantize(&lab, &model, &["--calibration", file.to_str().unwrap()], words);
    };
    calibrate(&lab.file("empty.txt", ""), &["empty.txt", "is empty", "ordinary text"]);
    calibrate(&lab.file("blank.txt", " \n\n\t\n"), &["blank.txt", "is empty", "ordinary text"]);
    calibrate(&lab.file("empty.jsonl", "\n"), &["empty.jsonl", "is empty", "ordinary text"]);
    calibrate(&lab.file("one.txt", "x"), &["one.txt", "no tokens to calibrate on", "ordinary text"]);
    let form = "every line of a .jsonl file is";
    let bad = lab.file("bad.jsonl", "{\"text\": \"A line.\"}\n{\"text\": \"Another\n");
    calibrate(&bad, &["bad.jsonl", "line 2", form]);
    let bad = lab.file("other.jsonl", "{\"text\": \"A line.\"}\n\n{\"content\": \"Another.\"}\n");
    calibrate(&bad, &["other.jsonl", "line 3", "\"text\"", form]);
    calibrate(&lab.file("latin1.txt", b"caf\xe9"), &["latin1.txt", "UTF-8"]);
    calibrate(&lab.path().join("absent.txt"), &["absent.txt", "No such file"]);
    let model = model.to_str().unwrap();
    let text = lab.file("empty-eval.txt", "");
    let eval = ["eval", "ppl", "-m", model, "--text", text.to_str().unwrap()];
    refuse(&lab, eval, &["empty-eval.txt", "is empty", "ordinary text"]);
}

#[test]
fn unwritable_output() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let file = lab.file("file", "not a directory");
    let below = file.join("below");
    let args = ["quantize", "--json", "-m", model.to_str().unwrap(), "-o"];
    for (out, word) in [(below.to_str().unwrap(), "cannot be created"), ("/", "not the name of a directory")]
    {
        refuse(&lab, args.into_iter().chain([out]).chain(QUICK), &[out, word, "directory"]);
    }
}

#[test]
fn existing_output() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let out = lab.out("quantized");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious"), "thesis").unwrap();
    // `refuse` compares every file before and after.
    let words = [out.to_str().unwrap(), "exists already", "-o", "--overwrite"];
    refuse_quantize(&lab, &model, &[], &words);
    let words = [out.to_str().unwrap(), "not a SpecQuant checkpoint", "-o"];
    refuse_quantize(&lab, &model, &["--overwrite"], &words);
    // Somebody else's model, even.
    fs::write(out.join("config.json"), "{\"model_type\": \"llama\"}").unwrap();
    refuse_quantize(&lab, &model, &["--overwrite"], &words);
    // Nor is the name that the unfinished checkpoint would have taken from anybody.
    fs::rename(&out, lab.out("quantized.partial")).unwrap();
    refuse_quantize(&lab, &model, &["--overwrite"], &["quantized.partial", "exists", "move it away"]);
}

#[test]
fn vocabulary_mismatch() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    // 259 tokens and these are one more than the 320 that the model embeds.
    let added: Vec<String> = (0..62).map(|i| format!("<extra_{i}>")).collect();
    fs::write(model.join("tokenizer.json"), tokenizer(&added).to_string()).unwrap();
    let words = [model.to_str().unwrap(), "321 tokens", "320", "same revision"];
    refuse_quantize(&lab, &model, &[], &words);
    let model = model.to_str().unwrap();
    let generate = ["generate", "--json", "-m", model, "--prompt", "a <extra_61> b"];
    refuse(&lab, generate, &["token id 320", "vocabulary of 320", "revision"]);
}

#[test]
fn unusable_tokenizer() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let file = model.join("tokenizer.json");
    fs::write(&file, "{\"version\": \"1.0\"").unwrap();
    refuse_quantize(&lab, &model, &[], &[file.to_str().unwrap(), "not valid JSON"]);
    fs::remove_file(&file).unwrap();
    let words = [model.to_str().unwrap(), "no tokenizer.json", "save_pretrained"];
    refuse_quantize(&lab, &model, &[], &words);
    refuse(&lab, generate(&model), &words);
}

#[test]
fn nonsense_flags() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    for (flags, words) in [
        (["--scheme", "W9A4"], &["W9", "2 to 8 bits"][..]),
        (["--scheme", "foo"], &["\"foo\"", "W4A4KV4"]),
        (["--scheme", "W16A4"], &["W16A4", "16 bits"]),
        (["--mean-k", "9999"], &["9999", "49 frequency bins", "k_proj", "--mean-k"]),
        (["--max-k", "8"], &["max_k = 8", "mean_k = 16", "--max-k"]),
        (["--group-size", "7"], &["group size 7", "down_proj", "these would: 16, 88, or 0"]),
        (["--act-clip", "0"], &["act_clip = 0", "(0, 1]"]),
        (["--kv-clip", "1.5"], &["kv_clip = 1.5", "(0, 1]"]),
        (["--smoothing-strength", "3"], &["smoothing_strength = 3", "0 to 1"]),
        (["--smoothing-strength", "strong"], &["--smoothing-strength", "\"strong\"", "search"]),
        (["--temperature", "101"], &["temperature = 101", "0 (uniform) to 100"]),
        (["--score", "vibes"], &["--score", "vibes", "entropy"]),
        (["--basis", "walsh"], &["--basis", "walsh", "fourier-top"]),
        (["--rank", "8"], &["branch.rank", "fourier", "--mean-k"]),
        (["--overhead", "free"], &["--overhead", "free", "matched"]),
        (["--overhead", "matched"], &["the branch takes", "--mean-k", "--overhead plain"]),
        (["--embeddings", "int3"], &["--embeddings", "int3", "int8"]),
        (
            ["--recipe", "nosuch"],
            &[
                "\"nosuch\"",
                "spectral, spectral-tuned, specquant, svdquant, quarot, spinquant, spinquant-paper, flatquant, flatquant-paper, omniquant, omniquant-paper, awq, gptq, smooth-gptq, smoothquant, rtn",
            ],
        ),
        (["--bits", "4"], &["--bits"]),
    ] {
        refuse_quantize(&lab, &model, &flags, words);
    }
    // These appear in QUICK, and no flag may be given twice.
    let out = lab.out("quantized");
    let args = ["quantize", "--json", "-m", model.to_str().unwrap(), "-o", out.to_str().unwrap()];
    for (flags, words) in [
        (["--threads", "0"], &["--threads 0", "at least 1"][..]),
        (["--samples", "0"], &["samples", "at least 1"]),
        (["--sequence-length", "1"], &["sequence_length at least 2"]),
        (["--seed", "-5"], &["-5"]),
    ] {
        refuse(&lab, args.into_iter().chain(flags), words);
    }
    refuse(&lab, ["doctor", "--threads", "0"], &["--threads 0", "at least 1"]);
    let generate = |flags: [&'static str; 2]| generate(&model).into_iter().chain(flags.map(str::to_owned));
    refuse(&lab, generate(["--temperature", "NaN"]), &["--temperature", "0 or more"]);
    refuse(&lab, generate(["--top-p", "0"]), &["--top-p", "(0, 1]"]);
    refuse(&lab, generate(["--threads", "0"]), &["--threads 0", "at least 1"]);
}

#[test]
fn bad_recipe_files() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    for (text, words) in [
        ("name = \"x\"\nbits = 4\n[rounding]\nkind = \"rtn\"\n", &["recipe.toml", "`bits`"][..]),
        ("name = \"x\"\n[rounding]\nkind = \"rtn\"\n[scheme]\nwidth = 4\n", &["recipe.toml", "`width`"]),
        ("name = \"x\"\n", &["recipe.toml", "rounding"]),
        ("name = \"x\n", &["recipe.toml", "line 1"]),
        ("name = \"x\"\n[rounding]\nkind = \"floor\"\n", &["recipe.toml", "floor", "rtn", "gptq"]),
    ] {
        let recipe = lab.file("recipe.toml", text);
        refuse_quantize(&lab, &model, &["--recipe", recipe.to_str().unwrap()], words);
    }
}

#[test]
fn a_branch_that_is_not_there_cannot_be_truncated() {
    let lab = Lab::new();
    let ours = lab.quantized(&lab.model("llama-sharded"), "ours", &["--recipe", "rtn"]);
    for flags in [["--k-run", "4"], ["--truncate", "0.5"]] {
        let mut command = generate(&ours);
        command.extend(flags.map(str::to_owned));
        refuse(&lab, command, &[ours.to_str().unwrap(), "no 16-bit branch", flags[0]]);
    }
    let mut command = generate(&ours);
    command.extend(["--truncate", "2"].map(str::to_owned));
    refuse(&lab, command, &["--truncate 2", "0 to 1"]);
}

#[test]
fn models_that_are_quantized_already() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let ours = lab.quantized(&model, "ours", &["--recipe", "rtn"]);
    refuse_quantize(&lab, &ours, &[], &[ours.to_str().unwrap(), "quantized already", "full-precision model"]);
    edit_json(&model.join("config.json"), |c| {
        c["quantization_config"] = json!({"quant_method": "awq", "bits": 4});
    });
    let words = ["config.json", "already quantized by \"awq\"", "original"];
    refuse_quantize(&lab, &model, &[], &words);
}

#[test]
fn a_damaged_checkpoint_of_ours() {
    let lab = Lab::new();
    let source = lab.model("llama-sharded");
    let flags = ["--mean-k", "4", "--smoothing-strength", "0.5", "--temperature", "1"];
    let fresh = lab.quantized(&source, "fresh", &flags);
    let copy = || {
        let copy = lab.path().join("copy");
        let _ = fs::remove_dir_all(&copy);
        fs::create_dir(&copy).unwrap();
        for (name, content) in tree(&fresh) {
            fs::write(copy.join(name), content).unwrap();
        }
        copy
    };
    let layer = "model.layers.1.mlp.up_proj";
    let damage = |suffix: &str, edit: &dyn Fn(&mut Tensor), words: &[&str]| {
        let (model, name) = (copy(), format!("{layer}.{suffix}"));
        edit_tensor(&shard_of(&model, &name), &name, edit);
        refuse(&lab, generate(&model), &[&[name.as_str(), model.to_str().unwrap()], words].concat());
    };
    let again = "quantize the model again";
    damage("branch_counts", &|t| (t.shape, t.bytes) = (vec![100], vec![0; 200]), &["[100]", "[176]", again]);
    damage("branch_counts", &|t| t.dtype = Dtype::I16, &["I16", "U16", again]);
    damage("branch_coeffs", &|t| t.shape = vec![t.shape[0] * 2, 1], &["[1408, 1]", "[704, 2]", again]);
    damage("weight_packed", &|t| t.shape = vec![96, 88], &["[96, 88]", "[176, 48]", again]);
    damage("weight_scale", &|t| t.bytes[8..10].copy_from_slice(&NAN_F16), &["NaN", "row 4", "again"]);

    // The bins ask for other coefficients than there are; a coefficient is not a number.
    let model = copy();
    let name = format!("{layer}.branch_counts");
    edit_tensor(&shard_of(&model, &name), &name, |t| t.bytes[0] += 1);
    refuse(&lab, generate(&model), &[&format!("{layer}.branch_coeffs"), "[705, 2]", again]);
    let model = copy();
    let name = format!("{layer}.branch_coeffs");
    edit_tensor(&shard_of(&model, &name), &name, |t| t.bytes[..2].copy_from_slice(&NAN_F16));
    refuse(&lab, generate(&model), &[layer, "finite", again]);

    let model = copy();
    let shard = shard_of(&model, &format!("{layer}.weight_packed"));
    truncate(&shard, fs::metadata(&shard).unwrap().len() as usize - 100);
    refuse(&lab, generate(&model), &[shard.to_str().unwrap(), "truncated"]);
    fs::remove_file(&shard).unwrap();
    refuse(&lab, generate(&model), &[shard.file_name().unwrap().to_str().unwrap(), "missing"]);

    for (key, value, words) in [
        ("branch_basis", json!(null), &["branch_co", "names no branch_basis", again][..]),
        ("branch_basis", json!("dct"), &["branch_coeffs", "F16 [384, 1]", again]),
        ("branch_basis", json!("walsh"), &["walsh", "fourier-top"]),
        ("online_rotations", json!({"down": "wavelet"}), &["wavelet", "hadamard"]),
        ("scheme", json!({"weight_bits": 9, "act_bits": 4, "kv_bits": 4}), &["W9", "2 to 8"][..]),
        (
            "scheme",
            json!({"weight_bits": 8, "act_bits": 8, "kv_bits": 8}),
            &["weight_packed", "instead of I8"],
        ),
        (
            "scheme",
            json!({"weight_bits": 4, "act_bits": 4, "kv_bits": 4, "group_size": 7}),
            &["weight_scale", "[96, 13]"],
        ),
        ("scheme", json!("W4A4KV4"), &["quantization_config", "config.json"]),
        ("format_version", json!(77), &["format 77", "config.json"]),
    ] {
        let model = copy();
        edit_json(&model.join("config.json"), |c| c["quantization_config"][key] = value);
        refuse(&lab, generate(&model), &[&[model.to_str().unwrap(), again], words].concat());
    }
}

#[test]
fn a_damaged_transform_of_inputs() {
    let lab = Lab::new();
    let fresh = lab.quantized(&lab.model("llama-sharded"), "fresh", &["--recipe", "spectral", "--keep", "8"]);
    let site = "model.layers.1.gate_up";
    let again = "quantize the model again";
    for (name, edit, words) in [
        (
            format!("{site}.reflections"),
            &(|t: &mut Tensor| (t.shape, t.bytes) = (vec![4, 96], vec![1; 384])) as &dyn Fn(&mut Tensor),
            &["kept_norm", "F32 [8]", "[4]", again][..],
        ),
        (format!("{site}.reflections"), &|t| t.dtype = Dtype::U8, &["reflections", "U8", "I8", again]),
        (
            format!("{site}.reflections"),
            &|t| (t.shape, t.bytes) = (vec![96, 96], vec![1; 9216]),
            &["reflections", "keeps 96 of 96", again],
        ),
        (format!("{site}.kept_norm"), &|t| t.bytes[..4].fill(0), &["kept_norm", "positive", again]),
        (
            format!("{site}.act_clip"),
            &|t| t.bytes.copy_from_slice(&2f32.to_le_bytes()),
            &["act_clip", "2.0", again],
        ),
        (
            "model.layers.1.mlp.up_proj.kept_packed".to_owned(),
            &|t| (t.shape, t.bytes) = (vec![176, 4], vec![1; 704]),
            &["kept_packed", "[176, 8]", again],
        ),
        (
            "model.layers.1.self_attn.v_center".to_owned(),
            &|t| (t.shape, t.bytes) = (vec![4], vec![0; 16]),
            &["v_center", "shape [4]"],
        ),
    ] {
        let model = lab.path().join("copy");
        let _ = fs::remove_dir_all(&model);
        fs::create_dir(&model).unwrap();
        for (name, content) in tree(&fresh) {
            fs::write(model.join(name), content).unwrap();
        }
        edit_tensor(&shard_of(&model, &name), &name, edit);
        refuse(&lab, generate(&model), words);
    }
    let too_many = ["--recipe", "spectral", "--keep", "96"];
    refuse_quantize(&lab, &lab.model("llama-sharded"), &too_many, &["q_proj", "input.keep = 96", "--keep"]);
    let without = ["--recipe", "gptq", "--keep", "8"];
    refuse_quantize(&lab, &lab.model("llama-sharded"), &without, &["--keep", "gptq", "spectral"]);
}

#[test]
fn texts_and_prompts_too_short() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let model = model.to_str().unwrap();
    let text = lab.file("short.txt", TEXT);
    let text = text.to_str().unwrap();
    let eval = ["eval", "ppl", "-m", model, "--text", text];
    refuse(&lab, eval, &["short.txt", "fewer than one window of 2048", "--window"]);
    let window = eval.into_iter().chain(["--window", "1"]);
    refuse(&lab, window, &["--window 1", "at least 2"]);
    refuse(&lab, ["generate", "-m", model, "--prompt", ""], &["--prompt is empty", "give"]);
    refuse(&lab, ["chat", "-m", model], &[model, "no chat template", "generation"]);
}

#[test]
fn models_that_are_not_there() {
    let lab = Lab::new();
    let absent = lab.path().join("absent");
    let words = [absent.to_str().unwrap(), "No such file", "give a Hugging Face directory"];
    refuse_quantize(&lab, &absent, &[], &words);
    refuse(&lab, generate(&absent), &words);
    let path = absent.to_str().unwrap();
    refuse(&lab, ["inspect", path], &words);
    refuse(&lab, ["chat", "-m", path], &words);
    // Before minutes of measuring.
    refuse(&lab, ["bench", path], &words);
    let text = lab.file("text.txt", TEXT);
    refuse(&lab, ["bench", "-o", lab.path().to_str().unwrap()], &["not empty", "no benchmark's", "-o"]);
    refuse(&lab, ["eval", "ppl", "-m", path, "--text", text.to_str().unwrap()], &words);
    let empty = lab.path().join("empty");
    fs::create_dir(&empty).unwrap();
    refuse_quantize(&lab, &empty, &[], &["empty", "no config.json", "give a"]);
    let model = lab.model("llama-tied-bf16");
    fs::remove_file(model.join("model.safetensors")).unwrap();
    refuse_quantize(&lab, &model, &[], &["llama-tied-bf16", "neither model.safetensors nor", "download"]);
}

/// A calibration that no machine has the memory for: refused with settings that would fit, before anything is written.
#[test]
fn too_little_memory() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let text = lab.file("text.txt", TEXT);
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    let out = lab.out("quantized");
    let many = ["--samples", "4000000", "--sequence-length", "512", "--calibration", text];
    let words = ["of memory at its peak", "are available", "these would fit: --samples ", "--ignore-memory"];
    let quantize = ["quantize", "--json", "-r", "rtn", "-m", model, "-o", out.to_str().unwrap()];
    let message = refuse(&lab, quantize.iter().chain(&many), &words);
    // What it names fits: the same run with that many samples is planned without complaint.
    let samples =
        message.split("fit: --samples ").nth(1).unwrap().split([';', '\n']).next().unwrap().to_owned();
    let fitting = ["--plan", "--samples", &samples, "--sequence-length", "512", "--calibration", text];
    specquant().args(quantize.iter().chain(&fitting)).assert().success();
    let demo = ["demo", "-r", "rtn", "-m", model, "-o", out.to_str().unwrap()];
    refuse(&lab, demo.iter().chain(&many), &words);
    let compare = ["compare", model, "--text", text, "--recipes", "rtn", "-o", out.to_str().unwrap()];
    refuse(&lab, compare.iter().chain(&many), &words);
}

/// As many tokens as the model embeds, one of which has a number beyond.
#[test]
fn token_that_is_not_embedded() {
    let lab = Lab::new();
    let (model, text) = (lab.model("llama-sharded"), lab.file("text.txt", TEXT.replace(' ', "<far>")));
    let path = model.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let far = json!({ "id": 4000, "content": "<far>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false });
    tokenizer["model"]["vocab"]["<far>"] = json!(4000);
    match tokenizer.get_mut("added_tokens").and_then(Value::as_array_mut) {
        Some(added) => added.push(far),
        None => tokenizer["added_tokens"] = json!([far]),
    }
    fs::write(&path, tokenizer.to_string()).unwrap();
    refuse_quantize(&lab, &model, &["--calibration", text.to_str().unwrap()], &["<far>", "4000", "320"]);
}

/// A recipe that does not fit, no such calibration text, an output that is not ours: told together, and also when only a plan is asked for.
#[test]
fn everything_that_is_wrong_at_once() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let model = model.to_str().unwrap();
    let (out, text) = (lab.file("mine", "my own file"), lab.out("no-such-text.txt"));
    let run = ["quantize", "-r", "gptq", "-m", model, "-o", out.to_str().unwrap()];
    let wrong = ["--group-size", "7", "--calibration", text.to_str().unwrap()];
    let words = ["group size 7", "mine", "no-such-text.txt"];
    refuse(&lab, run.iter().chain(&wrong), &words);
    refuse(&lab, run.iter().chain(&wrong).chain(&["--plan"]), &words);
    refuse(&lab, run.iter().chain(&wrong).chain(&["--dry-run"]), &words);
    assert_eq!(fs::read_to_string(&out).unwrap(), "my own file");
    // A recipe that contradicts itself twice; a model that is not there.
    let recipe =
        "name = \"x\"\n[calibration]\nsamples = 0\n[rounding]\nkind = \"gptq\"\ndampening_frac = 7.0\n";
    let recipe = lab.file("recipe.toml", recipe);
    let (recipe, mine, out) = (recipe.to_str().unwrap(), out.to_str().unwrap(), "other");
    let run = ["quantize", "-r", recipe, "-m", model, "-o", mine];
    refuse(&lab, run, &["dampening_frac", "samples", "mine"]);
    let run = ["quantize", "-r", "no-such-recipe", "-m", "no-such-model", "-o", out];
    refuse(&lab, run.iter().chain(&wrong[2..]), &["no-such-recipe", "no-such-model", "no-such-text.txt"]);
    // Of a comparison: each recipe, the models, the text, the tasks.
    let recipes = format!("no-such-recipe,{recipe},gptq,rtn");
    let run =
        ["compare", model, "no-such-model", "-o", out, "--recipes", &recipes, "--text", "no-such-prose.txt"];
    let settings = ["--data", "no-such-tasks", "--calibration", text.to_str().unwrap(), "--group-size", "7"];
    let words = [
        "no-such-recipe",
        "dampening_frac",
        "samples",
        "gptq",
        "rtn",
        "group size 7",
        "no-such-text.txt",
        "no-such-model",
        "no-such-prose.txt",
        "no-such-tasks",
    ];
    refuse(&lab, run.iter().chain(&settings), &words);
}
