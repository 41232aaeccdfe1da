//! Logits and continuations against transformers 5.23 (float32), for every family and for the real model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use specquant_kernels::KvFormat;
use specquant_model::{Model, Sampler, Sampling, Source, generate};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden")
}

/// `scripts/fetch-model.sh` puts it there.
fn smollm2() -> PathBuf {
    let cache = || {
        Path::new(&std::env::var("HOME").unwrap()).join(".cache/specquant/SmolLM2-135M-Instruct.Q4_1.gguf")
    };
    std::env::var("SPECQUANT_SMOLLM2").map_or_else(|_| cache(), PathBuf::from)
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

const TINY: [&str; 7] =
    ["llama-tied-bf16", "llama3-rope-scaled", "llama-sharded", "mistral", "qwen2", "qwen3", "gemma3"];

fn tiny_case(name: &str) -> (Model, Vec<u32>, Vec<f32>) {
    // The small Gemma 3 lies in this repository, with the program that made it.
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let dir = if name == "gemma3" { own } else { golden().join("tiny") }.join(name);
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let ids = expected
        .tensor("input_ids")
        .unwrap()
        .data()
        .chunks_exact(8)
        .map(|b| b[0] as u32 + 256 * b[1] as u32)
        .collect();
    let mut model = Model::open(&dir).unwrap();
    // The expected logits come from a model cast to its 16-bit type and back, which left its rotary frequencies rounded to that
    // type. A model loaded as float32 has them in f32 (the small Gemma and the real models below do).
    let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let round: fn(f32) -> f32 = if name == "gemma3" {
        |f| f
    } else if config.contains("bfloat16") {
        |f| half::bf16::from_f32(f).to_f32()
    } else {
        |f| half::f16::from_f32(f).to_f32()
    };
    model.map_inv_freq(round);
    (model, ids, f32s(expected.tensor("logits").unwrap().data()))
}

#[test]
fn every_family_gives_the_logits_of_transformers() {
    for name in TINY {
        let (mut model, ids, want) = tiny_case(name);
        for widened in [false, true] {
            if widened {
                model.widen().unwrap();
            }
            let hidden = model.hidden(&mut [(&mut model.sequence(), &ids)]).unwrap();
            let difference = max_difference(&model.logits(&hidden).unwrap(), &want);
            assert!(difference < 2e-4, "{name}, widened {widened}: {difference}");
        }
    }
}

#[test]
fn pieces_and_batches_give_the_logits_of_one_run() {
    for name in TINY {
        let (model, ids, want) = tiny_case(name);
        let vocab = model.config.vocab_size;
        // Two sequences in one batch, fed in pieces of different lengths; the first is rolled back once.
        let (mut a, mut b) = (model.sequence(), model.sequence());
        model.hidden(&mut [(&mut a, &ids[..7]), (&mut b, &ids[..1])]).unwrap();
        model.hidden(&mut [(&mut a, &ids[20..25])]).unwrap();
        a.truncate(7);
        let hidden = model.hidden(&mut [(&mut a, &ids[7..]), (&mut b, &ids[1..30])]).unwrap();
        let logits = model.logits(&hidden).unwrap();
        let (in_a, in_b) = logits.split_at((ids.len() - 7) * vocab);
        assert!(max_difference(in_a, &want[7 * vocab..]) < 2e-4, "{name}");
        assert!(max_difference(in_b, &want[vocab..30 * vocab]) < 2e-4, "{name}");
        assert_eq!((a.len(), b.len()), (ids.len(), 30));
        // Of some rows only, out of both sequences, and of none.
        a.truncate(7);
        b.truncate(1);
        let (rows, in_a) = ([0, 3, ids.len() - 7 + 2], ids.len() - 7);
        let hidden = model.hidden_of(&mut [(&mut a, &ids[7..]), (&mut b, &ids[1..30])], &rows).unwrap();
        let logits = model.logits(&hidden).unwrap();
        for (logits, position) in logits.chunks_exact(vocab).zip([7, 10, rows[2] - in_a + 1]) {
            let want = &want[position * vocab..(position + 1) * vocab];
            assert!(max_difference(logits, want) < 2e-4, "{name}, position {position}");
        }
        let nothing = model.hidden_of(&mut [(&mut a, &ids[..3])], &[]).unwrap();
        assert!(nothing.is_empty() && a.len() == ids.len() + 3);
    }
}

#[test]
fn a_short_cache_of_eight_bits_stays_close() {
    let (mut model, ids, want) = tiny_case("llama-sharded");
    let norm = want.iter().map(|v| v * v).sum::<f32>().sqrt();
    let mut error = |format| {
        model.set_kv_format(format);
        let hidden = model.hidden(&mut [(&mut model.sequence(), &ids)]).unwrap();
        let got = model.logits(&hidden).unwrap();
        got.iter().zip(&want).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt() / norm
    };
    let (half, eight, four) = (
        error(KvFormat::F16),
        error(KvFormat::Int { bits: 8, clip: 1.0, intact: 0 }),
        error(KvFormat::Int { bits: 4, clip: 1.0, intact: 0 }),
    );
    assert!(
        half < 1e-3 && half < eight && eight < 0.02 && eight < four,
        "f16 {half}, 8 bits {eight}, 4 bits {four}"
    );
}

#[test]
fn unknown_token_ids_are_refused_and_change_nothing() {
    let (model, ids, _) = tiny_case("qwen2");
    let mut sequence = model.sequence();
    let error = model.hidden(&mut [(&mut sequence, &[ids[0], 320])]).unwrap_err().to_string();
    assert!(error.contains("320") && sequence.is_empty(), "{error}");
    assert!(model.next_logits(&mut [(&mut sequence, &[])]).is_err());
}

#[test]
fn smollm2_gives_the_token_ids_logits_and_continuations_of_transformers() {
    let source = Source::open(&smollm2()).expect("run scripts/fetch-model.sh first");
    let tokenizer = source.tokenizer().unwrap();
    let model = Model::load(&source).unwrap();
    let bytes = std::fs::read(golden().join("logits/logits_gguf_f32.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let texts: serde_json::Value =
        serde_json::from_slice(&std::fs::read(golden().join("logits/logits.json")).unwrap()).unwrap();
    for prompt in texts["prompts"].as_array().unwrap() {
        let name = prompt["name"].as_str().unwrap();
        let tensor = |suffix: &str| expected.tensor(&format!("{name}.{suffix}")).unwrap().data().to_vec();
        let i32s = |bytes: Vec<u8>| -> Vec<u32> {
            bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let ids = tokenizer.encode(prompt["text"].as_str().unwrap(), true).unwrap();
        assert_eq!(ids, i32s(tensor("token_ids")), "{name}");

        let hidden = model.hidden(&mut [(&mut model.sequence(), &ids)]).unwrap();
        let logits = model.logits(&hidden).unwrap();
        let vocab = model.config.vocab_size;
        let last = max_difference(&logits[logits.len() - vocab..], &f32s(&tensor("last_logits")));
        assert!(last < 2e-3, "{name}: last logits differ by {last}");
        let (top_ids, top_logits) = (i32s(tensor("top10_ids")), f32s(&tensor("top10_logits")));
        for (i, (id, want)) in top_ids.iter().zip(&top_logits).enumerate() {
            let got = logits[i / 10 * vocab + *id as usize];
            assert!(
                (got - want).abs() < 2e-3,
                "{name}, position {}, id {id}: {got} instead of {want}",
                i / 10
            );
        }

        let want: Vec<u32> = prompt["greedy"]["token_ids_32_no_stop"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap() as u32)
            .collect();
        let mut got = Vec::new();
        generate(
            &model,
            &mut model.sequence(),
            &ids,
            want.len(),
            &mut Sampler::new(Sampling::GREEDY),
            |id| {
                got.push(id);
                true
            },
        )
        .unwrap();
        assert_eq!(got, want, "{name}");
    }
}

/// Against sentencepiece and transformers on Gemma 3 270M (`gemma3/real.py`), which `scripts/fetch-model.sh gemma3` fetches.
#[test]
fn gemma3_gives_the_token_ids_of_sentencepiece_and_the_logits_of_transformers() {
    let Ok(path) = std::env::var("SPECQUANT_GEMMA3") else {
        println!(
            "skipped: SPECQUANT_GEMMA3 does not name the model; scripts/fetch-model.sh gemma3 prints its path"
        );
        return;
    };
    let source = Source::open(Path::new(&path)).unwrap();
    let tokenizer = source.tokenizer().unwrap();
    let mut model = Model::load(&source).unwrap();
    model.widen().unwrap();
    let expected: serde_json::Value = serde_json::from_str(include_str!("gemma3/real.json")).unwrap();
    let ids = |v: &serde_json::Value| -> Vec<u32> {
        v.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let check =
        |what: &str, logits: &[f32], at: &serde_json::Value, top_ids: &str, top: &str, i: Option<usize>| {
            let of = |key: &str| i.map_or_else(|| at[key].clone(), |i| at[key][i].clone());
            for (id, want) in ids(&of(top_ids)).into_iter().zip(of(top).as_array().unwrap()) {
                let (got, want) = (logits[id as usize], want.as_f64().unwrap() as f32);
                assert!((got - want).abs() < 5e-3, "{what}, id {id}: {got} instead of {want}");
            }
        };
    for case in expected["texts"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let want = ids(&case["ids"]);
        let got = tokenizer.encode(text, true).unwrap();
        assert_eq!((got[0], &got[1..]), (2, &want[..]), "{text:?}");
        assert_eq!(tokenizer.decode(&want, false).unwrap(), text);
        if !want.is_empty() {
            let logits = model.next_logits(&mut [(&mut model.sequence(), &got)]).unwrap();
            check(text, &logits, case, "top_ids", "top_logits", None);
        }
    }
    // Beyond the windows of 512, the last tokens one by one.
    let long = &expected["long"];
    let tokens = ids(&long["ids"]);
    let mut sequence = model.sequence();
    let hidden = model.hidden(&mut [(&mut sequence, &tokens[..1150])]).unwrap();
    for (i, position) in ids(&long["positions"]).into_iter().enumerate().filter(|(_, p)| *p < 1150) {
        let width = model.config.hidden_size;
        let logits = model.logits(&hidden[position as usize * width..][..width]).unwrap();
        check(&format!("position {position}"), &logits, long, "top_ids", "top_logits", Some(i));
    }
    let mut last = Vec::new();
    for token in &tokens[1150..] {
        last = model.next_logits(&mut [(&mut sequence, &[*token])]).unwrap().into_vec();
    }
    check("the last position", &last, long, "top_ids", "top_logits", Some(11));

    let (want, mut got) = (ids(&expected["greedy"]), Vec::new());
    let prompt = tokenizer.encode("Hello, world!", true).unwrap();
    let sampler = &mut Sampler::new(Sampling::GREEDY);
    generate(&model, &mut model.sequence(), &prompt, want.len(), sampler, |id| {
        got.push(id);
        true
    })
    .unwrap();
    assert_eq!(got, want);
}
