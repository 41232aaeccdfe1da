//! The same inputs write the same bytes: on one thread and two, with every instruction set, and again. What a checkpoint computes is the same with every
//! instruction set, to a tolerance.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use common::{Lab, QUICK, TEXT, specquant, tree};
use serde_json::Value;

/// What the machine has, worst first; the binary refuses what it has not.
fn instruction_sets() -> Vec<&'static str> {
    let there =
        |isa: &&str| specquant().env("SPECQUANT_ISA", isa).arg("doctor").output().unwrap().status.success();
    ["scalar", "neondot", "avx2", "avxvnni", "avx512vnni", "amxint8"].into_iter().filter(there).collect()
}

/// A built-in recipe that learns, with a few steps; others as they are.
fn recipe(lab: &Lab, name: &str) -> String {
    let few = match name {
        "spectral-tuned" | "spinquant" => "steps = 3",
        "omniquant" | "flatquant" => "epochs = 1",
        _ => return name.to_owned(),
    };
    let built_in = format!("{}/../specquant-quantize/recipes/{name}.toml", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(built_in).unwrap();
    let (before, after) = text.split_once("\nmethod = ").unwrap();
    let file = lab.file(&format!("{name}.toml"), format!("{before}\n{few}\nmethod = {after}"));
    file.to_str().unwrap().to_owned()
}

/// The files of the checkpoint that a program writes.
fn quantized(
    mut program: Command,
    model: &Path,
    recipe: &str,
    text: &Path,
    threads: &str,
    out: &Path,
) -> Vec<(PathBuf, Vec<u8>)> {
    program.args(["quantize", "-m"]).arg(model).arg("-o").arg(out);
    program
        .args(["--recipe", recipe, "--calibration"])
        .arg(text)
        .args(&QUICK[..6])
        .args(["--threads", threads]);
    if recipe.contains("spectral") {
        program.args(["--keep", "8"]);
    }
    program.assert().success();
    tree(out)
}

/// Libraries choose instructions by themselves, whatever `SPECQUANT_ISA` says: an emulated processor has no AVX-512.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn a_processor_without_avx512_writes_the_same() {
    const EMULATOR: &str = "qemu-x86_64-static";
    if std::process::Command::new(EMULATOR).arg("--version").output().is_err() {
        println!("skipped: there is no {EMULATOR}; install Debian's qemu-user-static");
        return;
    }
    let lab = Lab::new();
    let (model, text) = (lab.model("llama-sharded"), lab.file("text.txt", TEXT));
    for name in ["gptq", "spectral"] {
        let mut emulated = Command::new(EMULATOR);
        emulated.args(["-cpu", "max", env!("CARGO_BIN_EXE_specquant")]);
        let [native, emulated] = [("native", specquant()), ("emulated", emulated)].map(|(case, program)| {
            quantized(program, &model, name, &text, "2", &lab.out(&format!("{name}-{case}")))
        });
        assert!(native == emulated, "{name}: the emulated processor writes other files");
    }
}

#[test]
fn threads_instruction_sets_and_repetition_change_no_byte() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let text = lab.file("text.txt", TEXT);
    let isas = instruction_sets();
    println!("{isas:?}");
    let mut differences = Vec::new();
    let learning = ["spectral-tuned", "omniquant", "spinquant", "flatquant"];
    for name in ["rtn", "gptq", "specquant", "spectral", "quarot", "svdquant"].into_iter().chain(learning) {
        let recipe = recipe(&lab, name);
        let written = |case: &str, isa: &str, threads: &str| {
            let mut command = specquant();
            command.env("SPECQUANT_ISA", isa);
            quantized(command, &model, &recipe, &text, threads, &lab.out(&format!("{name}-{case}")))
        };
        let best = isas[isas.len() - 1];
        let first = written("first", best, "2");
        assert!(first == written("again", best, "2"), "{name}: two runs write different files");
        assert!(first == written("one", best, "1"), "{name}: 1 and 2 threads write different files");
        for isa in &isas[..isas.len() - 1] {
            let other = written(isa, isa, "2");
            let files = first.iter().zip(&other).filter(|(a, b)| a != b).map(|((file, _), _)| file.display());
            differences.extend(files.map(|file| format!("{name}, {best} and {isa}: {file}")));
        }
    }
    assert!(differences.is_empty(), "{differences:#?}");
}

/// Mean negative log-likelihoods, which are f32 sums at the end of everything, agree to this, relatively.
const TOLERANCE: f64 = 1e-5;

#[test]
fn instruction_sets_agree_on_what_a_checkpoint_computes() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let text = lab.file("text.txt", TEXT);
    let isas = instruction_sets();
    let mut models = vec![model.clone()];
    for recipe in ["rtn", "specquant", "spectral"] {
        let keep: &[&str] = if recipe == "spectral" { &["--keep", "8"] } else { &[] };
        models.push(lab.quantized(&model, recipe, &[&["--recipe", recipe], keep].concat()));
    }
    for model in models {
        let perplexity = |isa: &&str| -> f64 {
            let mut command = specquant();
            command.env("SPECQUANT_ISA", isa).args(["eval", "ppl", "--json", "--window", "96", "--text"]);
            let output =
                command.arg(&text).arg("-m").arg(&model).assert().success().get_output().stdout.clone();
            let result: Value = serde_json::from_slice(&output).unwrap();
            result["perplexity"].as_f64().unwrap()
        };
        let all: Vec<f64> = isas.iter().map(perplexity).collect();
        println!("{}: {all:?}", model.display());
        let first = all[0].ln();
        assert!(all.iter().all(|p| (p.ln() / first - 1.0).abs() < TOLERANCE), "{isas:?}: {all:?}");
    }
}
