//! Memory does not grow with the layers of a model. `scripts/memory.sh` measures the same at the shapes of real ones.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use common::{Lab, QUICK, TEXT, specquant};
use serde_json::Value;

/// Bytes that 120 layers may take more than four: twice the noise of two runs, which the system's large pages make, and not half of what would be if the
/// weights of every block stayed, 0.7 MB.
const MORE: u64 = 32 << 20;

#[test]
fn many_layers_take_what_few_take() {
    let lab = Lab::new();
    let text = lab.file("text.txt", TEXT);
    let peak = |layers: &str| -> u64 {
        let (model, out) = (lab.path().join(layers), lab.out(layers));
        let mut synth = specquant();
        synth.args(["synth", "--arch", "tiny", "--layers", layers, "-o"]).arg(&model).assert().success();
        let mut command = specquant();
        command.args(["quantize", "--json", "--recipe", "gptq", "-m"]).arg(&model).arg("-o").arg(&out);
        command.arg("--calibration").arg(&text).args(QUICK);
        let output = command.assert().success().get_output().stdout.clone();
        let result: Value = serde_json::from_slice(&output).unwrap();
        result["peak_anonymous_bytes"].as_u64().unwrap()
    };
    let (few, many) = (peak("4"), peak("120"));
    println!("4 layers: {few} bytes, 120: {many}");
    assert!(many < few + MORE, "4 layers take {few} bytes, 120 take {many}");
}
