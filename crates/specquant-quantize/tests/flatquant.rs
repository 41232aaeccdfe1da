//! The recipe `flatquant` on models with two blocks and random weights, through the public interface.
#![cfg(feature = "learn")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use specquant_model::{Levels, Model, RotationKind, Source};
use specquant_quantize::{Destination, InputChange, Recipe, Report, Rotate, Rounding, Smooth, plan, run};

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/tiny").join(name)
}

fn texts(seed: u64) -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..4).map(|_| (0..48).map(|_| rng.random_range(0..320)).collect()).collect()
}

fn recipe(name: &str, scheme: &str) -> Recipe {
    let mut recipe = Recipe::load(name).unwrap();
    recipe.scheme = recipe.scheme.with_widths(scheme).unwrap();
    recipe
}

fn quantize(model: &str, recipe: &Recipe, destination: &Path) -> Report {
    run(
        &Source::open(&tiny(model)).unwrap(),
        recipe,
        Some(&texts(1)),
        &Destination::new(destination),
        &mut |_| (),
    )
    .unwrap()
}

fn logits(model: &Model, texts: &[Vec<u32>]) -> Vec<f32> {
    let mut sequences: Vec<_> = texts.iter().map(|_| model.sequence()).collect();
    let mut batch: Vec<_> = sequences.iter_mut().zip(texts.iter().map(Vec::as_slice)).collect();
    model.logits(&model.hidden(&mut batch).unwrap()).unwrap().into_vec()
}

/// ‖got − want‖ / ‖want‖ of the logits of a text that nothing was calibrated on.
fn error(checkpoint: &Path, model: &str) -> f64 {
    let [got, want] = [checkpoint, &tiny(model)].map(|path| logits(&Model::open(path).unwrap(), &texts(2)));
    let square = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>();
    (square(&mut got.iter().zip(&want).map(|(g, w)| g - w)) / square(&mut want.iter().copied())).sqrt()
}

/// Random weights have no outliers for a transform to spread, so that little is to be gained here.
#[test]
fn it_is_nearer_than_nearest_rounding_alone() {
    let dir = tempfile::tempdir().unwrap();
    for model in ["llama3-rope-scaled", "mistral", "qwen2", "qwen3"] {
        let [flat, plain] = ["flatquant", "rtn"].map(|name| {
            let destination = dir.path().join(format!("{model}-{name}"));
            quantize(model, &recipe(name, "W4A4KV4"), &destination);
            error(&destination, model)
        });
        println!("{model}: {flat:.3}, nearest rounding {plain:.3}");
        assert!(flat < 0.98 * plain, "{model}: {flat}, nearest rounding {plain}");
    }
}

/// Bits of weights, scales and matrices as the files have them.
#[test]
fn bits_per_weight_count_the_matrices() {
    let dir = tempfile::tempdir().unwrap();
    for (scheme, keys) in [("W4A4KV4", true), ("W4A8", false), ("W4A16", false), ("W8A8KV8", true)] {
        let (model, recipe) = ("qwen2", recipe("flatquant", scheme));
        let destination = dir.path().join(scheme);
        let report = quantize(model, &recipe, &destination);
        assert!(report.layers.iter().all(|l| l.act_clip.is_some() != scheme.ends_with("A16")), "{scheme}");
        let checkpoint = Source::open(&destination).unwrap();
        let parts = ["weight_packed", "weight_scale", "kronecker_left", "kronecker_right", "k_transform"];
        let counted =
            |name: &&str| name.starts_with("model.layers") && parts.iter().any(|p| name.ends_with(p));
        let bytes: usize = checkpoint
            .names()
            .filter(counted)
            .map(|name| checkpoint.tensor(name).unwrap().bytes().len())
            .sum();
        let weights: usize = report.layers.iter().map(|l| l.shape[0] * l.shape[1]).sum();
        let bits = 8.0 * bytes as f64 / weights as f64;
        let planned = plan(&Source::open(&tiny(model)).unwrap(), &recipe).unwrap().bits_per_weight;
        // A site's matrices are shared out among its layers in whole bits.
        assert!(
            (report.bits_per_weight - bits).abs() < 1e-3,
            "{scheme}: {} of {bits}",
            report.bits_per_weight
        );
        assert!((planned - bits).abs() < 1e-9, "{scheme}: {planned} of {bits}");
        assert_eq!(checkpoint.names().any(|name| name.ends_with("k_transform")), keys, "{scheme}");
        let most = if scheme.starts_with("W8") { 0.03 } else { 0.5 };
        assert!(error(&destination, model) < most, "{scheme}: {}", error(&destination, model));
    }
}

#[test]
fn threads_change_no_byte_and_gptq_may_follow() {
    let dir = tempfile::tempdir().unwrap();
    let files = |dir: &Path| -> BTreeMap<String, Vec<u8>> {
        let entry = |e: fs::DirEntry| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap());
        fs::read_dir(dir).unwrap().map(|e| entry(e.unwrap())).collect()
    };
    let mut recipe = recipe("flatquant", "W4A4KV4");
    let [one, two] = [1, 2].map(|threads| {
        let destination = dir.path().join(threads.to_string());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| quantize("llama-tied-bf16", &recipe, &destination));
        files(&destination)
    });
    assert!(one == two, "1 and 2 threads write different files");
    recipe.rounding = Rounding::Gptq(Default::default());
    let (nearest, gptq) = (dir.path().join("1"), dir.path().join("gptq"));
    let report = quantize("llama-tied-bf16", &recipe, &gptq);
    assert!(report.layers.iter().all(|l| l.rounding.fallback.is_none()));
    let [nearest, gptq] = [nearest, gptq].map(|path| error(&path, "llama-tied-bf16"));
    assert!(gptq < 1.05 * nearest, "{gptq}, nearest rounding {nearest}");
}

#[test]
fn what_makes_no_sense_is_refused_with_the_reason() {
    type Change = fn(&mut Recipe);
    let changes: [(Change, &str); 9] = [
        (
            |r| r.rotate = Some(Rotate { kind: RotationKind::Hadamard, residual: true, qk: true }),
            "neither rotate",
        ),
        (|r| r.input = Some(InputChange { rotation: RotationKind::Dct, keep: 0 }), "input"),
        (
            |r| {
                r.smooth =
                    Recipe::load("smoothquant").unwrap().smooth.map(|s| Smooth { all_sites: false, ..s })
            },
            "smooth",
        ),
        (|r| r.kv_center = true, "kv_center"),
        (|r| r.search_act_clip = true, "search_act_clip"),
        (|r| r.scheme.act_clip = 0.9, "--act-clip"),
        (|r| r.scheme.group_size = 16, "--group-size 0"),
        (|r| r.scheme.levels = Levels::Gaussian, "evenly spaced"),
        (|r| (r.scheme.weight_bits, r.scheme.act_bits) = (16, 16), "16 bits"),
    ];
    for (change, word) in changes {
        let mut recipe = recipe("flatquant", "W4A4KV4");
        change(&mut recipe);
        let error = recipe.validate().unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("recipe.toml");
    for (line, word) in
        [("epochs = 0", "epochs is 0"), ("lr = 7.0", "lr is 7"), ("weight_bits = 3", "weight_bits")]
    {
        let text =
            format!("name = \"x\"\n[rounding]\nkind = \"rtn\"\n[learn]\nmethod = \"flatquant\"\n{line}");
        fs::write(&file, text).unwrap();
        let error = Recipe::load(file.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains(word), "{line}: {error}");
    }
}

/// Type, shape and bytes of a tensor.
type Content = (Dtype, Vec<usize>, Vec<u8>);

/// Writes a checkpoint's tensor anew, as `edit` changes it.
fn damage(checkpoint: &Path, name: &str, edit: &dyn Fn(&mut Content)) {
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(checkpoint.join("model.safetensors.index.json")).unwrap()).unwrap();
    let shard = checkpoint.join(index["weight_map"][name].as_str().unwrap());
    let bytes = fs::read(&shard).unwrap();
    let old = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> = old
        .iter()
        .map(|(tensor, view)| {
            let mut content = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            if tensor == name {
                edit(&mut content);
            }
            (tensor, content)
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &shard).unwrap();
}

#[test]
fn damaged_matrices_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let fresh = dir.path().join("fresh");
    quantize("llama-sharded", &recipe("flatquant", "W4A4KV4"), &fresh);
    let copy = || {
        let copy = dir.path().join("copy");
        let _ = fs::remove_dir_all(&copy);
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(&fresh).unwrap().map(Result::unwrap) {
            fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
        copy
    };
    let refused = |checkpoint: &Path, words: &[&str]| {
        let error = Model::open(checkpoint).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    };
    type Edit<'a> = &'a dyn Fn(&mut Content);
    let cases: [(&str, Edit, &[&str]); 7] = [
        ("gate_up.kronecker_left", &|t| t.0 = Dtype::BF16, &["gate_up.kronecker_left", "BF16", "F16"]),
        (
            "gate_up.kronecker_left",
            &|t| (t.1, t.2) = (vec![5, 5], vec![1; 50]),
            &["gate_up.kronecker_left", "5 and", "96", "again"],
        ),
        ("down.kronecker_right", &|t| t.1 = vec![t.2.len() / 2, 1], &["down.kronecker_right", "instead of"]),
        ("qkv.kronecker_right", &|t| t.2.fill(0), &["qkv.kronecker_left", "singular"]),
        ("o.kronecker_left", &|t| t.2[..2].copy_from_slice(&[0, 0x7e]), &["o.kronecker_left", "NaN"]),
        ("self_attn.k_transform", &|t| (t.1, t.2) = (vec![2, 2], vec![1; 8]), &["k_transform", "2 rows"]),
        ("self_attn.k_transform", &|t| t.2.fill(0), &["k_transform", "singular"]),
    ];
    for (name, edit, words) in cases {
        let checkpoint = copy();
        damage(&checkpoint, &format!("model.layers.1.{name}"), edit);
        refused(&checkpoint, words);
    }
    for (rotation, words) in [
        (serde_json::Value::Null, &["kronecker_left", "names no input_rotation"][..]),
        ("dct".into(), &["kronecker_left", "names another input_rotation"]),
        ("walsh".into(), &["walsh", "kronecker"]),
    ] {
        let checkpoint = copy();
        let path = checkpoint.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["quantization_config"]["input_rotation"] = rotation;
        fs::write(&path, config.to_string()).unwrap();
        refused(&checkpoint, words);
    }
}
