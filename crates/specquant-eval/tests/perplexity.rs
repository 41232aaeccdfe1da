//! Perplexity against transformers 5.23 on the real model, and against its definition on a small one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};

use specquant_eval::{Error, Protocol, perplexity};
use specquant_model::{Model, Source};

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

fn tiny() -> Model {
    Model::open(&shared().join("golden/tiny/llama-sharded")).unwrap()
}

/// `n` token ids with no period.
fn ids(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i + 7 * i) % 317).collect()
}

#[test]
fn smollm2_gives_the_windows_of_transformers_on_wikitext2() {
    let golden = std::fs::read(shared().join("golden/ppl/wikitext2_hf_tokenizer.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
    let text = std::fs::read_to_string(shared().join("data/wikitext2/wiki.test.hf_joined.txt")).unwrap();
    let source = Source::open(&smollm2()).expect("run scripts/fetch-model.sh first");
    let ids = source.tokenizer().unwrap().encode(&text, false).unwrap();
    // 8 fewer than in the golden file, whose tokenizer did not split off digits as the GGUF's pre-tokenizer "smollm" says; they first
    // differ at token 66557, after window 31.
    assert_eq!(ids.len(), 304_978);
    for (got, want) in ids.iter().zip(golden["first_16_token_ids"].as_array().unwrap()) {
        assert_eq!(u64::from(*got), want.as_u64().unwrap());
    }

    let mut model = Model::load(&source).unwrap();
    model.widen().unwrap();
    let protocol = Protocol { max_windows: 4, ..Protocol::default() };
    let got = perplexity(&model, &ids, &protocol, &mut |_, _, _| ()).unwrap();
    let want = golden["ppl_first_4"].as_f64().unwrap();
    println!("{} instead of {want}", got.perplexity);
    assert!((got.perplexity / want - 1.0).abs() < 1e-3, "{} instead of {want}", got.perplexity);
    assert_eq!((got.window_nll.len(), got.tokens), (4, 4 * 2047));
    for (i, got) in got.window_nll.iter().enumerate() {
        let want = golden["window_nll"][i].as_f64().unwrap();
        // A difference of nats is a ratio of perplexities.
        println!("window {i}: {:e}", got - want);
        assert!((got - want).abs() < 1e-3, "window {i}: {got} instead of {want}");
    }
    assert!(got.protocol.contains("4 of 148 "), "{}", got.protocol);
}

#[test]
fn it_is_the_definition() {
    let (model, ids, window) = (tiny(), ids(337), 100);
    let mut means = Vec::new();
    for ids in ids.chunks_exact(window) {
        let hidden = model.hidden(&mut [(&mut model.sequence(), ids)]).unwrap();
        let logits = model.logits(&hidden).unwrap();
        let rows = logits.chunks_exact(model.config.vocab_size);
        let nll = rows.zip(&ids[1..]).map(|(row, &next)| {
            let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            sum.ln() - f64::from(row[next as usize])
        });
        means.push(nll.sum::<f64>() / (window - 1) as f64);
    }
    let mean = means.iter().sum::<f64>() / 3.0;
    let variance = means.iter().map(|m| (m - mean).powi(2)).sum::<f64>() / 2.0;

    let mut calls = Vec::new();
    let protocol = Protocol { window, max_windows: 0 };
    let got =
        perplexity(&model, &ids, &protocol, &mut |done, of, so_far| calls.push((done, of, so_far))).unwrap();
    let close = |got: f64, want: f64| (got / want - 1.0).abs() < 1e-6;
    assert_eq!(got.window_nll.len(), 3);
    assert!(got.window_nll.iter().zip(&means).all(|(&got, &want)| close(got, want)), "{got:?}");
    assert!(close(got.perplexity, mean.exp()), "{got:?}");
    let stderr = mean.exp() * (variance / 3.0).sqrt();
    assert!((got.stderr / stderr - 1.0).abs() < 1e-4 && stderr > 0.0, "{got:?}, want {stderr}");
    assert_eq!(got.tokens, 3 * 99);
    assert_eq!(calls.iter().map(|c| (c.0, c.1)).collect::<Vec<_>>(), [(1, 3), (2, 3), (3, 3)]);
    assert_eq!(calls[0].2, got.window_nll[0].exp());
    assert_eq!(calls[2].2, got.perplexity);
}

#[test]
fn windows_are_counted_from_the_start_and_the_tail_is_dropped() {
    let (model, ids) = (tiny(), ids(100));
    let score = |ids: &[u32], window, max_windows| {
        perplexity(&model, ids, &Protocol { window, max_windows }, &mut |_, _, _| ()).unwrap()
    };
    let all = score(&ids, 30, 0);
    assert_eq!((all.window_nll.len(), all.tokens), (3, 3 * 29));
    assert!(all.protocol.contains("3 of 3 non-overlapping windows of 30 tokens"), "{}", all.protocol);
    assert_eq!(score(&ids[..90], 30, 7), all);
    let first = score(&ids, 30, 2);
    assert_eq!(first.window_nll, all.window_nll[..2]);
    assert!(first.protocol.contains("2 of 3 "), "{}", first.protocol);
    let one = score(&ids, 100, 0);
    assert_eq!((one.window_nll.len(), one.stderr, one.tokens), (1, 0.0, 99));
    assert_eq!(score(&ids, 2, 0).tokens, 50);
}

#[test]
fn short_texts_narrow_windows_and_unknown_ids_are_errors() {
    let (model, mut ids) = (tiny(), ids(29));
    let error = |ids: &[u32], window| {
        perplexity(&model, ids, &Protocol { window, max_windows: 0 }, &mut |_, _, _| ()).unwrap_err()
    };
    assert!(matches!(error(&ids, 30), Error::TooShort { tokens: 29, window: 30 }));
    assert!(matches!(error(&[], 2), Error::TooShort { tokens: 0, window: 2 }));
    for window in [0, 1] {
        let message = error(&ids, window).to_string();
        assert!(message.contains("--window") && message.contains("at least 2"), "{message}");
    }
    // Also where the id is only predicted, in the last place of the window.
    ids[28] = 320;
    assert!(error(&ids, 29).to_string().contains("320"));
}
