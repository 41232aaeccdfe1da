//! `specquant inspect --verify` on checkpoints that were whole and are not any more.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::path::Path;

use common::{Lab, edit_json, edit_tensor, shard_of, specquant, tree, truncate};
use serde_json::{Value, json};

/// Exit code and problems.
fn verify(model: &Path) -> (i32, Vec<String>) {
    let output = specquant().args(["inspect", "--verify", "--json"]).arg(model).output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let problems = json["problems"].as_array().unwrap().iter().map(|p| p.as_str().unwrap().to_owned());
    (output.status.code().unwrap(), problems.collect())
}

#[test]
fn all_damage_is_listed_at_once() {
    let lab = Lab::new();
    let source = lab.model("llama-sharded");
    let whole = lab.quantized(&source, "whole", &["--recipe", "spectral", "--keep", "8"]);
    assert_eq!(verify(&whole), (0, vec![]));
    assert_eq!(verify(&source), (0, vec![]), "a source needs no checksums");

    // The standard tool agrees with ours.
    let mut tool = std::process::Command::new("sha256sum");
    tool.args(["--check", "--quiet", "SHA256SUMS"]).current_dir(&whole);
    assert!(tool.status().unwrap().success());

    let copy = |name: &str| {
        let copy = lab.path().join(name);
        fs::create_dir(&copy).unwrap();
        tree(&whole).into_iter().for_each(|(file, content)| fs::write(copy.join(file), content).unwrap());
        copy
    };
    // One bit of a code, which no range check can notice.
    let model = copy("bit");
    let shard = shard_of(&model, "model.layers.1.mlp.up_proj.weight_packed");
    edit_tensor(&shard, "model.layers.1.mlp.up_proj.weight_packed", |t| t.bytes[100] ^= 1);
    let (code, problems) = verify(&model);
    assert!(code == 1 && problems.len() == 1 && problems[0].contains("SHA-256"), "{problems:?}");
    assert!(problems[0].contains(shard.to_str().unwrap()), "{problems:?}");

    // Two layers of one block, a transform, a norm, a tokenizer, a file: none hides another.
    let model = copy("many");
    let block = "model.layers.0";
    let edit = |name: &str, edit: &dyn Fn(&mut common::Tensor)| {
        let name = format!("{block}.{name}");
        edit_tensor(&shard_of(&model, &name), &name, edit);
    };
    edit("self_attn.q_proj.weight_scale", &|t| t.bytes[..2].copy_from_slice(&[0x00, 0x7e]));
    edit("self_attn.v_proj.weight_scale", &|t| t.bytes[1] |= 0x80);
    edit("mlp.up_proj.kept_packed", &|t| t.shape = vec![t.shape[0] / 2, t.shape[1] * 2]);
    edit("o.act_clip", &|t| t.bytes.copy_from_slice(&2f32.to_le_bytes()));
    edit("input_layernorm.weight", &|t| t.bytes[..4].copy_from_slice(&f32::INFINITY.to_le_bytes()));
    fs::write(model.join("tokenizer.json"), "{").unwrap();
    fs::remove_file(model.join("report.json")).unwrap();
    let (code, problems) = verify(&model);
    let all = problems.join("\n");
    for words in [
        ["q_proj.weight_scale", "NaN"],
        ["v_proj.weight_scale", "negative"],
        ["up_proj.kept_packed", "[176, 8]"],
        ["o.act_clip", "(0, 1]"],
        ["input_layernorm.weight", "inf"],
        ["tokenizer.json", "SHA-256"],
        ["tokenizer.json", "not valid JSON"],
        ["report.json", "missing"],
    ] {
        assert!(problems.iter().any(|p| words.iter().all(|w| p.contains(w))), "{words:?} is not in\n{all}");
    }
    let mut once = problems.clone();
    once.sort();
    once.dedup();
    assert!(code == 1 && once.len() == problems.len(), "{all}");
    let text = specquant().args(["inspect", "--verify"]).arg(&model).output().unwrap();
    assert_eq!(String::from_utf8(text.stdout).unwrap().trim_end(), all);

    // What cannot be opened is compared with its checksums all the same.
    let model = copy("cut");
    truncate(&shard, 1000);
    fs::copy(&shard, model.join(shard.file_name().unwrap())).unwrap();
    edit_json(&model.join("config.json"), |c| c["hidden_size"] = json!("large"));
    let all = verify(&model).1.join("\n");
    for word in ["SHA-256", "hidden_size", "config.json", shard.file_name().unwrap().to_str().unwrap()] {
        assert!(all.contains(word), "{word} is not in\n{all}");
    }
    let model = copy("unlisted");
    fs::write(model.join("SHA256SUMS"), "no sums\n").unwrap();
    assert!(verify(&model).1.iter().any(|p| p.contains("line 1 is not a checksum")));
    fs::remove_file(model.join("SHA256SUMS")).unwrap();
    assert!(verify(&model).1.iter().any(|p| p.contains("has no SHA256SUMS")));
}
