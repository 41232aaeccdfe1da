//! Memory is what was predicted, and grows neither with the layers of a model nor with the calibration text. `scripts/memory.sh` measures the same for other
//! recipes and models.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::path::Path;

use common::{Lab, QUICK, TEXT, specquant};
use serde_json::Value;

/// Bytes that 120 layers may take more than four: twice the noise of two runs, which the system's large pages make, and not half of what would be if the
/// weights of every block stayed, 0.7 MB.
const MORE: u64 = 32 << 20;

/// Quantizes a model of random weights; the JSON result.
fn quantized(lab: &Lab, [arch, layers, recipe]: [&str; 3], text: &Path, flags: &[&str]) -> Value {
    let (model, out) = (lab.path().join(format!("{arch}{layers}")), lab.out("quantized"));
    if !model.exists() {
        specquant().args(["synth", "--arch", arch, "--layers", layers, "-o"]).arg(&model).assert().success();
    }
    let mut command = specquant();
    command.args(["quantize", "--json", "--recipe", recipe, "-m"]).arg(&model).arg("-o").arg(&out);
    let output =
        command.arg("--calibration").arg(text).args(flags).assert().success().get_output().stdout.clone();
    fs::remove_dir_all(&out).unwrap();
    serde_json::from_slice(&output).unwrap()
}

fn peak(result: &Value) -> u64 {
    result["peak_anonymous_bytes"].as_u64().unwrap()
}

#[test]
fn many_layers_take_what_few_take() {
    let lab = Lab::new();
    let text = lab.file("text.txt", TEXT);
    let [few, many] = ["4", "120"].map(|n| peak(&quantized(&lab, ["tiny", n, "gptq"], &text, &QUICK)));
    println!("4 layers: {few} bytes, 120: {many}");
    assert!(many < few + MORE, "4 layers take {few} bytes, 120 take {many}");
}

/// The library that makes tokens of it would take a hundred times its size.
#[test]
fn a_long_text_takes_little_more_than_a_short_one() {
    let lab = Lab::new();
    let [short, long] = [1, 20 << 20].map(|bytes: usize| {
        let text = lab.file("text.txt", TEXT.repeat(bytes.div_ceil(TEXT.len())));
        peak(&quantized(&lab, ["tiny", "1", "rtn"], &text, &QUICK))
    });
    println!("a short text: {short} bytes, 20 MB: {long}");
    assert!(long < 300_000_000, "a short text takes {short} bytes, 20 MB take {long}");
}

/// One block of LLaMA-2-7B's shapes.
#[test]
fn what_is_predicted_is_what_is_taken() {
    let lab = Lab::new();
    let text = lab.file("text.txt", TEXT.repeat(8));
    let flags = ["--samples", "4", "--sequence-length", "256", "--search-tokens", "64", "--threads", "2"];
    let result = quantized(&lab, ["llama2-7b", "1", "rtn"], &text, &flags);
    let predicted = result["plan"]["peak_bytes"].as_u64().unwrap();
    let error = predicted as f64 / peak(&result) as f64 - 1.0;
    println!("predicted {predicted} bytes, measured {}: {error:+.3}", peak(&result));
    assert!(error.abs() < 0.15, "predicted {predicted} bytes, measured {}", peak(&result));
}
