//! The real model at 8 bits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};

use specquant_eval::{Protocol, perplexity};
use specquant_model::{Model, Source};
use specquant_quantize::{Calibration, Destination, Recipe, calibration, run};

fn shared() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared")
}

/// `scripts/fetch-model.sh` puts it there.
fn smollm2() -> PathBuf {
    let cache = || {
        Path::new(&std::env::var("HOME").unwrap()).join(".cache/specquant/SmolLM2-135M-Instruct.Q4_1.gguf")
    };
    std::env::var("SPECQUANT_SMOLLM2").map_or_else(|_| cache(), PathBuf::from)
}

#[test]
fn eight_bits_cost_about_one_percent_of_perplexity() {
    let source = Source::open(&smollm2()).expect("run scripts/fetch-model.sh first");
    let tokenizer = source.tokenizer().unwrap();
    let mut recipe = Recipe::load("specquant").unwrap();
    recipe.scheme = recipe.scheme.with_widths("W8A8KV8").unwrap();
    recipe.calibration =
        Calibration { samples: 4, sequence_length: 256, search_tokens: 64, ..Calibration::default() };
    let text = shared().join("data/wikitext2/wiki.valid.raw");
    let texts = calibration::from_file(&text, &tokenizer, &recipe.calibration, 0).unwrap();
    assert_eq!(texts.iter().map(Vec::len).collect::<Vec<_>>(), [256; 4]);
    let dir = tempfile::tempdir().unwrap();
    let destination = dir.path().join("model");
    let report = run(&source, &recipe, Some(&texts), &Destination::new(&destination), &mut |_| ()).unwrap();
    assert_eq!((report.calibration_tokens, report.layers.len()), (1024, 7 * 30));

    let text = std::fs::read_to_string(shared().join("data/wikitext2/wiki.test.hf_joined.txt")).unwrap();
    let end = text.char_indices().nth(10_000).unwrap().0;
    let ids = tokenizer.encode(&text[..end], false).unwrap();
    let protocol = Protocol { window: 512, max_windows: 2, ..Protocol::default() };
    let score = |model: &Model| perplexity(model, &ids, &protocol, None, &mut |_, _, _| ()).unwrap();
    let mut full = Model::load(&source).unwrap();
    full.widen().unwrap();
    let (full, eight) = (score(&full), score(&Model::open(&destination).unwrap()));
    println!("{} at full precision, {} at {}", full.perplexity, eight.perplexity, report.scheme);
    assert_eq!(full.tokens, 2 * 511);
    // 0.8 to 1.3% with different calibration texts of this small size.
    assert!((eight.perplexity / full.perplexity - 1.0).abs() < 0.015, "{full:?}\n{eight:?}");
}
