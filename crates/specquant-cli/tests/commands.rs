//! Every command, run as a user runs it, on models of a few hundred kilobytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the lints' exception covers #[test] functions only

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command as StdCommand, Stdio};

use common::*;
use serde_json::{Value, json};

/// SpecQuant without its searches, with few bins.
const FIXED: [&str; 6] = ["--mean-k", "4", "--smoothing-strength", "0.5", "--temperature", "0.5"];

/// Runs a command that must succeed and parses its stdout.
fn json_of(command: &mut assert_cmd::Command) -> Value {
    let output = command.assert().success().get_output().clone();
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stdout)))
}

fn inspect(model: &Path) -> Value {
    json_of(specquant().args(["inspect", "--json"]).arg(model))
}

fn perplexity(lab: &Lab, model: &Path) -> Value {
    let text = lab.file("text.txt", TEXT);
    let mut command = specquant();
    command.args(["eval", "ppl", "--json", "--window", "96", "-m"]).arg(model).arg("--text").arg(text);
    json_of(&mut command)
}

fn generate(model: &Path) -> Value {
    let flags = ["--prompt", "The harbour was", "--max-new-tokens", "12", "--temperature", "0", "--json"];
    json_of(specquant().arg("generate").arg("-m").arg(model).args(flags))
}

/// Quantizes, inspects, evaluates and generates; returns the report of inspect.
fn works(lab: &Lab, model: &Path, name: &str, flags: &[&str]) -> Value {
    let out = lab.quantized(model, name, flags);
    let report = inspect(&out);
    assert_eq!(report["integrity"], "ok", "{report:#}");
    let result = perplexity(lab, &out);
    assert!(result["perplexity"].as_f64().unwrap() > 1.0, "{result:#}");
    assert_eq!(result["scheme"], report["report"]["scheme"].as_str().unwrap(), "{result:#}");
    assert_eq!(generate(&out)["token_ids"], generate(&out)["token_ids"]);
    report
}

fn layer_names(report: &Value) -> Vec<&str> {
    report["report"]["layers"].as_array().unwrap().iter().map(|l| l["name"].as_str().unwrap()).collect()
}

#[test]
fn every_family_by_the_published_recipe() {
    for name in ["llama-sharded", "qwen2", "qwen3", "mistral", "llama-tied-bf16", "llama3-rope-scaled"] {
        let lab = Lab::new();
        let model = lab.model(name);
        // Calibrated on text of its own.
        let report = works(&lab, &model, "self", &["--mean-k", "4"]);
        let names = layer_names(&report);
        assert_eq!(names.len(), 14, "{names:?}");
        for layer in ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"] {
            assert!(names.contains(&format!("model.layers.1.{layer}").as_str()), "{names:?}");
        }
        for layer in report["report"]["layers"].as_array().unwrap() {
            assert_eq!(layer["mean_k"], 4.0, "{layer}");
            assert!(layer["relative_error"].as_f64().unwrap() < 0.2, "{layer}");
            assert!(layer["bits_per_weight"].as_f64().unwrap() > 4.0, "{layer}");
        }
        assert_eq!(report["quantization"]["quant_method"], "specquant");
        assert_eq!(report["quantization"]["recipe"]["branch"]["mean_k"], 4);
        assert_eq!(report["architecture"]["tied_embeddings"], ["qwen2", "llama-tied-bf16"].contains(&name));
        // And on a file.
        let text = lab.file("calibration.txt", TEXT);
        let flags = [&FIXED[..], &["--calibration", text.to_str().unwrap()]].concat();
        works(&lab, &model, "file", &flags);
        // The tokenizer travels.
        let tokenizer = |dir: &Path| fs::read(dir.join("tokenizer.json")).unwrap();
        assert_eq!(tokenizer(&model), tokenizer(&lab.out("file")));
    }
}

#[test]
fn schemes_and_storage() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let bits = |report: &Value| report["report"]["bits_per_weight"].as_f64().unwrap();
    for (scheme, recipe, low, high) in [
        ("W4A4KV4", "gptq", 4.0, 4.3),
        ("W8A8KV8", "rtn", 8.0, 8.3),
        ("W4A16", "smooth-gptq", 4.0, 4.3),
        ("W3A8", "smoothquant", 3.0, 3.3),
    ] {
        let report = works(&lab, &model, scheme, &["--recipe", recipe, "--scheme", scheme]);
        assert!((low..high).contains(&bits(&report)), "{scheme}: {}", bits(&report));
        assert_eq!(layer_names(&report).len(), 14);
    }
    // Weights that stay: no layer is quantized, only the cache.
    let report = works(&lab, &model, "W16A16KV4", &["--recipe", "rtn", "--scheme", "W16A16KV4"]);
    assert_eq!((layer_names(&report).len(), bits(&report)), (0, 16.0));

    let report = works(&lab, &model, "int8", &["--recipe", "rtn", "--embeddings", "int8"]);
    assert_eq!(report["tensors"]["I8"]["count"], 2, "{}", report["tensors"]);
    let report = works(&lab, &model, "grouped", &["--recipe", "gptq", "--group-size", "16"]);
    assert!((5.0..5.1).contains(&bits(&report)), "{}", bits(&report));
    let tied = lab.model("llama-tied-bf16");
    let report = works(&lab, &tied, "tied", &["--recipe", "rtn", "--embeddings", "int8"]);
    assert_eq!(report["tensors"]["I8"]["count"], 1, "{}", report["tensors"]);
}

#[test]
fn eight_bits_cost_little_and_perplexity_is_documented() {
    let lab = Lab::new();
    for name in ["llama-sharded", "llama3-rope-scaled", "qwen3", "mistral"] {
        let model = lab.model(name);
        let full = perplexity(&lab, &model);
        for key in ["perplexity", "stderr", "tokens", "protocol", "window_nll", "model", "scheme"] {
            assert!(full.get(key).is_some(), "{key}: {full:#}");
        }
        let windows = full["window_nll"].as_array().unwrap();
        assert!(windows.len() > 1 && full["tokens"] == 95 * windows.len(), "{full:#}");
        assert!(full["protocol"].as_str().unwrap().contains("windows of 96 tokens"));
        let mean = windows.iter().map(|w| w.as_f64().unwrap()).sum::<f64>() / windows.len() as f64;
        let full = full["perplexity"].as_f64().unwrap();
        assert!((full / mean.exp() - 1.0).abs() < 1e-12);
        let out = lab.quantized(&model, name, &["--recipe", "gptq", "--scheme", "W8A8KV8"]);
        let eight = perplexity(&lab, &out)["perplexity"].as_f64().unwrap();
        println!("{name}: {full:.3} in full precision, {eight:.3} at W8A8KV8");
        assert!((eight / full - 1.0).abs() < 0.03, "{name}: {eight} instead of {full}");
    }
    let text = lab.file("text.txt", TEXT);
    let mut command = specquant();
    let command = command.args(["eval", "ppl", "--json", "--window", "96", "--windows", "1", "-m"]);
    let one = json_of(command.arg(lab.model("qwen2")).arg("--text").arg(text));
    assert_eq!((&one["tokens"], &one["stderr"]), (&json!(95), &json!(0.0)));
}

#[test]
fn generation_repeats_itself() {
    let lab = Lab::new();
    let model = lab.model("qwen3"); // it has no end-of-sequence token
    let greedy = generate(&model);
    assert_eq!(greedy["token_ids"].as_array().unwrap().len(), 12, "{greedy:#}");
    assert!(greedy["prompt_tokens"].as_u64().unwrap() > 5);
    for key in ["text", "prefill_tokens_per_second", "decode_tokens_per_second"] {
        assert!(greedy.get(key).is_some(), "{key}: {greedy:#}");
    }
    assert_eq!(greedy["token_ids"], generate(&model)["token_ids"]);
    let sample = |seed: &str| {
        let flags = ["--prompt", "The", "--max-new-tokens", "20", "--temperature", "1", "--json"];
        let mut command = specquant();
        json_of(command.arg("generate").arg("-m").arg(&model).args(flags).args(["--seed", seed]))
    };
    assert_eq!(sample("3")["token_ids"], sample("3")["token_ids"]);
    assert_ne!(sample("3")["token_ids"], sample("4")["token_ids"]);
    // Without --json the prompt and what follows it, and nothing else, are on stdout.
    let flags = ["--prompt", "The harbour was", "--max-new-tokens", "12", "--temperature", "0"];
    let text = format!("The harbour was{}\n", greedy["text"].as_str().unwrap());
    specquant().arg("generate").arg("-m").arg(&model).args(flags).assert().success().stdout(text);
}

#[test]
fn quantize_reports_and_a_dry_run_writes_nothing() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let out = lab.out("quantized");
    let run = |flags: &[&str]| {
        let mut command = specquant();
        command
            .arg("quantize")
            .arg("-m")
            .arg(&model)
            .arg("-o")
            .arg(&out)
            .args(QUICK)
            .args(FIXED)
            .args(published(flags))
            .args(flags);
        command
    };
    let before = tree(lab.path());
    let plan = json_of(&mut run(&["--plan", "--json"]));
    assert_eq!((&plan["plan"]["blocks"], &plan["plan"]["layers"]), (&json!(2), &json!(14)));
    assert_eq!(plan["recipe"]["branch"]["mean_k"], 4);
    let stderr = run(&["--plan"]).assert().success().stdout("").get_output().stderr.clone();
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(stderr.contains("2 blocks, 14 linear layers") && stderr.contains("peak memory"), "{stderr}");
    let spilled = json_of(&mut run(&["--plan", "--spill", "--json"]))["plan"].take();
    let states = 2 * 64 * 96 * 4;
    for (key, more, less) in
        [("peak_bytes", &plan["plan"], &spilled), ("disk_bytes", &spilled, &plan["plan"])]
    {
        assert_eq!(more[key].as_u64().unwrap() - less[key].as_u64().unwrap(), states, "{key}");
    }
    let trial = json_of(&mut run(&["--dry-run", "--json"]));
    assert_eq!((&trial["plan"], &trial["recipe"]), (&plan["plan"], &plan["recipe"]));
    assert_eq!(trial["first_block"]["tuning_seconds"], 0.0);
    let said = |command: &mut assert_cmd::Command| {
        let output = command.assert().success().get_output().stdout.clone();
        String::from_utf8(output).unwrap()
    };
    let text = said(&mut run(&["--dry-run"]));
    assert!(text.contains("all 2 blocks, extrapolated: ") && !text.contains("tuning"), "{text}");
    let mut tuned = specquant();
    tuned.args(["quantize", "--dry-run", "--spill", "--keep", "8", "-m"]).arg(&model).arg("-o").arg(&out);
    let text = said(tuned.args(QUICK));
    assert!(text.contains(" for tuning the whole model at the end"), "{text}");
    let with_tuning = json_of(tuned.arg("--json"));
    let time = |key: &str| with_tuning["first_block"][key].as_f64().unwrap();
    let sum = time("once_seconds") + 2.0 * time("block_seconds") + time("tuning_seconds");
    assert!(time("tuning_seconds") > 0.0 && (time("seconds") - sum).abs() < 1e-6, "{with_tuning:#}");
    assert!(before == tree(lab.path()));

    let result = json_of(&mut run(&["--json"]));
    assert_eq!(result["report"]["layers"].as_array().unwrap().len(), 14);
    assert_eq!(result["plan"], plan["plan"]);
    let bytes = |from: &Value, key: &str| from[key].as_u64().unwrap();
    assert_eq!(bytes(&trial["first_block"], "tensor_bytes"), bytes(&result["report"], "tensor_bytes"));
    // Where hidden states lie changes no byte of the result.
    let spilled = lab.quantized(&model, "spilled", &[&FIXED[..], &["--spill"]].concat());
    assert_same(&out, &spilled);
    fs::remove_dir_all(spilled).unwrap();
    for key in ["output", "seconds", "peak_rss_bytes"] {
        assert!(!result[key].is_null(), "{key}");
    }
    let stored: Value = serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(result["report"], stored);
    let (said, got) =
        (plan["plan"]["output_bytes"].as_f64().unwrap(), stored["tensor_bytes"].as_f64().unwrap());
    assert!((said / got - 1.0).abs() < 0.1, "{said} bytes planned, {got} written");

    // The plain form: plan and progress on stderr, the result on stdout. And our own checkpoint may be replaced.
    fs::write(out.join("stale"), "").unwrap();
    let output = run(&["--overwrite", "--seed", "1"]).assert().success().get_output().clone();
    let (stdout, stderr) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(stdout.starts_with("wrote ") && stdout.contains("bits per weight"), "{stdout}");
    assert!(
        stderr.contains("plan: ") && stderr.contains("block 1/2") && stderr.contains("block 2/2"),
        "{stderr}"
    );
    assert!(!out.join("stale").exists());
    assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1, "something else was left");
    assert_eq!(inspect(&out)["integrity"], "ok");
}

/// Once, and not to a program that reads JSON.
#[test]
fn short_calibration_text_is_told() {
    let lab = Lab::new();
    let (model, text) = (lab.model("llama-sharded"), lab.file("text.txt", TEXT));
    for (flags, times) in [(&[][..], 1), (&["--json"][..], 0)] {
        let mut command = specquant();
        command.args(["quantize", "--plan", "--recipe", "rtn", "--samples", "100", "-m"]).arg(&model);
        command.arg("-o").arg(lab.out("planned")).arg("--calibration").arg(&text).args(flags);
        let stderr = String::from_utf8(command.assert().success().get_output().stderr.clone()).unwrap();
        assert_eq!(stderr.matches("there are no more").count(), times, "{stderr}");
    }
}

/// On the terminal at the end, in report.json and in the model card: a text that is too short, and 6 heads, for which there is no Hadamard matrix.
#[test]
fn what_is_done_otherwise_is_told() {
    let lab = Lab::new();
    let (model, text, out) = (lab.model("llama-sharded"), lab.file("text.txt", TEXT), lab.out("quantized"));
    let mut command = specquant();
    command
        .args(["quantize", "--recipe", "quarot", "--samples", "100", "-m"])
        .arg(&model)
        .arg("-o")
        .arg(&out);
    let stderr = command.arg("--calibration").arg(&text).assert().success().get_output().stderr.clone();
    let stderr = String::from_utf8(stderr).unwrap();
    let (plan, end) = stderr.split_once("warning: done other than the recipe says").unwrap();
    let report: Value = serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    let found = report["fallbacks"].as_array().unwrap();
    for fallback in found {
        let line = format!("{}: {}", fallback["layer"].as_str().unwrap(), fallback["what"].as_str().unwrap());
        assert!(end.contains(&format!("\n  {line}\n")), "{line}\n{stderr}");
        assert!(card.contains(&format!("\n- {line}\n")), "{line}\n{card}");
    }
    for words in ["across the heads before o_proj: rotated 2 values", "calibration text: "] {
        assert!(plan.contains(words) && end.contains(words), "{stderr}");
    }
}

#[test]
fn one_seed_gives_one_checkpoint() {
    let lab = Lab::new();
    let run = |model: &Path, name: &str, flags: &[&str]| {
        let out = lab.out(name);
        let common = ["--samples", "2", "--sequence-length", "64", "--search-tokens", "32", "--seed", "7"];
        let mut command = specquant();
        command
            .arg("quantize")
            .arg("-m")
            .arg(model)
            .arg("-o")
            .arg(&out)
            .args(common)
            .args(published(flags))
            .args(flags);
        command.assert().success();
        out
    };
    for (i, name) in ["llama-sharded", "qwen2"].into_iter().enumerate() {
        let model = lab.model(name);
        let searched = ["--mean-k", "4"];
        let a = run(&model, &format!("a{i}"), &[&searched[..], &["--threads", "2"]].concat());
        let b = run(&model, &format!("b{i}"), &[&searched[..], &["--threads", "2"]].concat());
        let c = run(&model, &format!("c{i}"), &[&searched[..], &["--threads", "1"]].concat());
        assert_same(&a, &b);
        assert_same(&a, &c);
    }
    // Another seed, another text, another checkpoint.
    let model = lab.path().join("models/qwen2");
    let other = lab.quantized(&model, "other", &["--mean-k", "4", "--seed", "8"]);
    assert!(tree(&lab.out("a1")) != tree(&other));
}

#[test]
fn a_recipe_file_equals_its_flags() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let text = lab.file("text.txt", TEXT);
    let text = text.to_str().unwrap();
    let flags = [
        "--recipe specquant --scheme W4A8KV4 --group-size 16 --act-clip 0.9 --kv-clip 0.97 --smoothing-strength 0.4 --mean-k 3",
        "--max-k 6 --score entropy --temperature 0.5 --embeddings int8 --samples 3 --sequence-length 48",
        "--search-tokens 40 --seed 5 --threads 1 --calibration",
    ];
    let mut command = specquant();
    command.arg("quantize").arg("-m").arg(&model).arg("-o").arg(lab.out("flags"));
    command.args(flags.iter().flat_map(|f| f.split(' '))).arg(text).assert().success();
    let recipe = format!(
        "name = 'specquant'\nseed = 5\nthreads = 2\nembeddings = 'int8'\n\
         [scheme]\nweight_bits = 4\nact_bits = 8\nkv_bits = 4\ngroup_size = 16\nact_clip = 0.9\nkv_clip = 0.97\n\
         [smooth]\nsmoothing_strength = 0.4\n\
         [branch]\nmean_k = 3\nmax_k = 6\nscore = 'entropy'\ntemperature = 0.5\n\
         [rounding]\nkind = 'gptq'\n\
         [calibration]\nfile = '{text}'\nsamples = 3\nsequence_length = 48\nsearch_tokens = 40\n"
    );
    let recipe = lab.file("recipe.toml", recipe);
    let mut command = specquant();
    command.arg("quantize").arg("-m").arg(&model).arg("-o").arg(lab.out("file"));
    command.arg("--recipe").arg(recipe).assert().success();
    assert_same(&lab.out("flags"), &lab.out("file"));
}

#[test]
fn inspect_lists_layers_and_finds_damage() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let report = inspect(&model);
    assert_eq!((&report["integrity"], &report["quantization"]), (&json!("ok"), &Value::Null));
    assert_eq!(
        (&report["architecture"]["family"], &report["tensors"]["F16"]["count"]),
        (&json!("llama"), &json!(21))
    );
    let out = lab.quantized(&model, "quantized", &FIXED);
    let table = specquant().arg("inspect").arg(&out).assert().success().get_output().stdout.clone();
    let table = String::from_utf8(table).unwrap();
    for word in ["W4A4KV4 by recipe specquant", "1.mlp.down_proj", "96x176", "alpha", "integrity: ok"] {
        assert!(table.contains(word), "{word}: {table}");
    }
    // A scale that is not a number: found, named, exit code 1.
    let name = "model.layers.0.mlp.up_proj.weight_scale";
    edit_tensor(&shard_of(&out, name), name, |t| t.bytes[..2].copy_from_slice(&[0, 0x7e]));
    let output = specquant().arg("inspect").arg(&out).assert().code(1).get_output().clone();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("FAILED") && table.contains(name) && table.contains("row 0"), "{table}");
}

#[test]
fn doctor_knows_the_machine() {
    let report = json_of(specquant().args(["doctor", "--json", "--threads", "1"]));
    for key in ["version", "cpu", "features", "isa", "kernels", "threads", "memory", "ceilings"] {
        assert!(report.get(key).is_some(), "{key}: {report:#}");
    }
    assert_eq!(report["threads"], 1);
    for key in ["int8_gops", "f32_gflops", "read_gb_per_s"] {
        assert!(report["ceilings"][key].as_f64().unwrap() > 0.0, "{key}: {report:#}");
    }
    assert!(report["isa"]["available"].as_array().unwrap().contains(&report["isa"]["active"]));
    assert!(report["kernels"]["W4A4"].is_string());
    let scalar = json_of(specquant().args(["doctor", "--json"]).env("SPECQUANT_ISA", "scalar"));
    assert_eq!(scalar["isa"]["active"], "scalar");
}

#[test]
fn help_is_shown_when_nothing_is_asked() {
    let output = specquant().assert().code(2).stdout("").get_output().clone();
    let help = String::from_utf8(output.stderr).unwrap();
    for command in ["quantize", "eval", "generate", "chat", "inspect", "doctor", "demo"] {
        assert!(help.contains(&format!("  {command} ")), "{command}: {help}");
    }
    let version = specquant().arg("--version").assert().success().get_output().stdout.clone();
    assert!(String::from_utf8(version).unwrap().contains(env!("CARGO_PKG_VERSION")));
}

/// As `specquant ... | true` and `specquant ... 2>&1 | true` run it.
#[test]
fn a_closed_pipe_is_no_panic() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let (path, out) = (model.to_str().unwrap(), lab.out("quantized"));
    let quantize = ["quantize", "-m", path, "-o", out.to_str().unwrap(), "--recipe", "rtn"];
    let closed = |args: &[&str], stderr_too: bool| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = StdCommand::new(assert_cmd::cargo::cargo_bin!("specquant"));
        command.args(args).stdin(Stdio::null()).stdout(writer.try_clone().unwrap());
        command.stderr(if stderr_too { Stdio::from(writer) } else { Stdio::piped() });
        let output = command.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!stderr.contains("panicked") && !stderr.contains("error:"), "{args:?}: {stderr}");
        output.status.code()
    };
    for stderr_too in [false, true] {
        assert_eq!(closed(&["inspect", path], stderr_too), Some(0));
        assert_eq!(closed(&["doctor", "--threads", "1"], stderr_too), Some(0));
        assert_eq!(closed(&["generate", "-m", path, "--prompt", "Hello"], stderr_too), Some(0));
        assert_eq!(closed(&[&quantize[..], &QUICK].concat(), stderr_too), Some(0));
        assert_eq!(inspect(&out)["integrity"], "ok");
        fs::remove_dir_all(&out).unwrap();
        assert_eq!(closed(&["inspect", "/absent/model"], true), Some(2));
    }
}

#[test]
fn chat_answers_lines() {
    let lab = Lab::new();
    let model = lab.model("qwen3");
    let template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}\
        {% if add_generation_prompt %}<assistant> {% endif %}";
    fs::write(model.join("chat_template.jinja"), template).unwrap();
    let chat = |input: &str, flags: &[&str]| {
        let mut command = specquant();
        command.args(["chat", "--temperature", "0", "--max-new-tokens", "6", "-m"]).arg(&model).args(flags);
        let output = command.write_stdin(input).assert().success().get_output().clone();
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let first = chat("Good morning\n", &[]);
    assert!(first.ends_with('\n'));
    let two = chat("Good morning\nAnd now?\n", &[]);
    assert!(two.starts_with(&first) && two.len() > first.len(), "{first:?} {two:?}");
    assert_eq!(two, chat("Good morning\nAnd now?\n", &[]));
    // An empty line ends, and no line at all is no error.
    assert_eq!(chat("Good morning\n\nAnd now?\n", &[]), first);
    assert_eq!(chat("", &[]), "");
    assert_ne!(chat("Good morning\n", &["--system", "You count sheep."]), first);
    // The template travels with the quantized model.
    let out = lab.quantized(&model, "quantized", &["--recipe", "gptq", "--scheme", "W8A8KV8"]);
    assert_eq!(fs::read_to_string(out.join("chat_template.jinja")).unwrap(), template);
    let mut command = specquant();
    command.args(["chat", "--temperature", "0", "--max-new-tokens", "6", "-m"]).arg(&out);
    command.write_stdin("Good morning\n").assert().success();
}

/// What `demo` prints of a model is what `eval ppl` says, although it writes its answer in whatever order of sums is fastest.
#[test]
fn demo_measures_as_eval_does() {
    let lab = Lab::new();
    let model = lab.path().join("synth");
    specquant().args(["synth", "--arch", "tiny", "-o"]).arg(&model).assert().success();
    let calibration = lab.file("text.txt", TEXT);
    let flags = ["-r", "quarot", "--calibration", calibration.to_str().unwrap()];
    let out = lab.quantized(&model, "quantized", &flags);
    let measured = json_of(specquant().args(["measure", "-m"]).arg(&out));
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo-text.txt");
    let mut eval = specquant();
    eval.args(["eval", "ppl", "--json", "--window", "512", "-m"]).arg(&out).arg("--text").arg(text);
    assert_eq!(measured["perplexity"], json_of(&mut eval)["perplexity"]);
}

/// A model of random weights can be quantized like any other.
#[test]
fn synth_writes_models() {
    let lab = Lab::new();
    let out = lab.path().join("synth");
    let synth = |flags: &[&str]| {
        let mut command = specquant();
        command.arg("synth").args(flags).arg("-o").arg(&out);
        command
    };
    for (flags, word) in [
        (
            &["--arch", "gpt5"][..],
            "--arch gpt5: choose one of llama2-7b, llama2-13b, llama2-70b, llama3-8b, tiny",
        ),
        (&["--arch", "tiny", "--layers", "0"], "--layers 0"),
    ] {
        let output = synth(flags).assert().code(2).get_output().clone();
        assert!(String::from_utf8_lossy(&output.stderr).contains(word), "{output:?}");
        assert!(!out.exists());
    }
    let tiny = ["--arch", "tiny", "--layers", "3"];
    let said = synth(&tiny).assert().success().get_output().stdout.clone();
    assert!(String::from_utf8(said).unwrap().contains("3 layers"));
    let again = synth(&tiny).assert().code(2).get_output().stderr.clone();
    assert!(String::from_utf8(again).unwrap().contains("exists already"));
    let text = lab.file("text.txt", TEXT);
    let quantized =
        lab.quantized(&out, "quantized", &["-r", "gptq", "--calibration", text.to_str().unwrap()]);
    let report: Value = serde_json::from_slice(&fs::read(quantized.join("report.json")).unwrap()).unwrap();
    assert_eq!(report["layers"].as_array().unwrap().len(), 21);
}
