//! Memory does not grow with the layers of a model. `scripts/memory.sh` measures the same at the shapes of real ones.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use common::{Lab, QUICK, TEXT, specquant};
use serde_json::Value;

/// Bytes that sixty layers may take more than four: the noise of two runs, which the allocator's large pages make, and not half of what would be if the
/// weights of every block stayed, 0.7 MB.
const MORE: u64 = 16 << 20;

#[test]
fn sixty_layers_take_what_four_take() {
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
    let (four, sixty) = (peak("4"), peak("60"));
    println!("4 layers: {four} bytes, 60: {sixty}");
    assert!(sixty < four + MORE, "4 layers take {four} bytes, 60 take {sixty}");
}
