//! Where the tests find models and reference values.
#![allow(dead_code)] // each test file uses a part

use std::path::{Path, PathBuf};

use serde_json::Value;
use specquant_model::Model;

pub fn shared() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared")
}

/// `scripts/fetch-model.sh` puts it there.
pub fn smollm2() -> PathBuf {
    let cache = || {
        Path::new(&std::env::var("HOME").unwrap()).join(".cache/specquant/SmolLM2-135M-Instruct.Q4_1.gguf")
    };
    std::env::var("SPECQUANT_SMOLLM2").map_or_else(|_| cache(), PathBuf::from)
}

pub fn tiny(name: &str) -> Model {
    Model::open(&shared().join("golden/tiny").join(name)).unwrap()
}

/// A reference file, or its lines.
pub fn golden(name: &str) -> Value {
    let path = shared().join("golden").join(name);
    serde_json::from_slice(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        .unwrap()
}

pub fn golden_lines(name: &str) -> Vec<Value> {
    let path = shared().join("golden").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// `n` token ids with no period.
pub fn ids(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i + 7 * i) % 317).collect()
}
