//! What must hold of every run, checked through the public interface on models with two blocks and random weights.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use safetensors::{Dtype, tensor::TensorView};
use specquant_kernels::{KvCache, KvFormat, rms_norm};
use specquant_model::{
    Block, BranchBasis, Embedding, Head, Levels, Model, RopeTable, Site, Source, Span, Truncation,
};
use specquant_quantize::branch::{self, LayerBranch};
use specquant_quantize::layer::{self, Input, Round, Weight};
use specquant_quantize::rounding::{ClipSearch, GptqConfig, Hessian, factorize};
use specquant_quantize::{
    BUILT_IN, Destination, Overhead, Recipe, Report, Searched, SiteStats, quantize_block, run,
};

const TINY: [&str; 7] =
    ["llama-tied-bf16", "llama3-rope-scaled", "llama-sharded", "mistral", "qwen2", "qwen3", "gemma3"];
/// Of every tiny model.
const VOCAB: u32 = 320;

fn tiny(name: &str) -> PathBuf {
    let tiny = if name == "gemma3" { "../specquant-model/tests" } else { "../../../shared/golden/tiny" };
    Path::new(env!("CARGO_MANIFEST_DIR")).join(tiny).join(name)
}

fn texts(seed: u64) -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..4).map(|_| (0..48).map(|_| rng.random_range(0..VOCAB)).collect()).collect()
}

fn recipe(name: &str, scheme: &str) -> Recipe {
    let mut recipe = Recipe::load(name).unwrap();
    recipe.scheme = recipe.scheme.with_widths(scheme).unwrap();
    recipe
}

fn quantize(source: &Path, recipe: &Recipe, texts: &[Vec<u32>], destination: &Path) -> Report {
    run(&Source::open(source).unwrap(), recipe, Some(texts), &Destination::new(destination), &mut |_| ())
        .unwrap()
}

/// Logits of all texts, `[tokens, vocab]`.
fn logits(model: &Model, texts: &[Vec<u32>]) -> Vec<f32> {
    let mut sequences: Vec<_> = texts.iter().map(|_| model.sequence()).collect();
    let mut batch: Vec<_> = sequences.iter_mut().zip(texts.iter().map(Vec::as_slice)).collect();
    model.logits(&model.hidden(&mut batch).unwrap()).unwrap().into_vec()
}

/// ‖got − want‖ / ‖want‖.
fn relative(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
}

/// Every file of a directory, by name.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entry = |e: fs::DirEntry| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap());
    fs::read_dir(dir).unwrap().map(|e| entry(e.unwrap())).collect()
}

/// Those that hold tensors.
fn shards(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    files(dir).into_iter().filter(|(name, _)| name.ends_with(".safetensors")).collect()
}

/// A tiny model in f32 with its tensors (name, shape, values) and its config.json changed.
fn edited(
    name: &str,
    dir: &Path,
    mut tensor: impl FnMut(&str, &mut Vec<usize>, &mut Vec<f32>),
    config: impl FnOnce(&mut serde_json::Value),
) -> PathBuf {
    let source = Source::open(&tiny(name)).unwrap();
    let read = |name: &str| {
        let view = source.tensor(name).unwrap();
        let (mut shape, mut values) = (view.shape.clone(), view.to_f32().unwrap());
        tensor(name, &mut shape, &mut values);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (name.to_owned(), shape, bytes)
    };
    let tensors: Vec<_> = source.names().map(read).collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let path = dir.join(format!("edited-{name}"));
    fs::create_dir(&path).unwrap();
    safetensors::serialize_to_file(views, None, &path.join("model.safetensors")).unwrap();
    let mut json = source.config_json().clone();
    config(&mut json);
    fs::write(path.join("config.json"), json.to_string()).unwrap();
    path
}

/// The codes then hold nothing but what f16 coefficients (11 bits) lose of a weight, and only 1/15 of that is lost again: a relative
/// error near 2^-13 / 15 a layer. Weights are cut to an intermediate size of 96, so that every layer has the 49 bins of mean_k.
#[test]
fn all_frequency_bins_and_16_bit_activations_give_full_precision() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama-tied-bf16", "llama3-rope-scaled", "llama-sharded", "mistral", "qwen2"] {
        let cut = |name: &str, shape: &mut Vec<usize>, values: &mut Vec<f32>| {
            if name.contains("gate_proj") || name.contains("up_proj") {
                shape[0] = 96;
                values.truncate(96 * 96);
            } else if name.contains("down_proj") {
                *values = values.chunks(shape[1]).flat_map(|row| row[..96].to_vec()).collect();
                shape[1] = 96;
            }
        };
        let path = edited(name, dir.path(), cut, |c| c["intermediate_size"] = 96.into());
        let mut recipe = recipe("specquant", "W4A16");
        recipe.smooth = None;
        let branch = recipe.branch.as_mut().unwrap();
        (branch.mean_k, branch.max_k) = (96 / 2 + 1, 0);
        let destination = dir.path().join(name);
        let report = quantize(&path, &recipe, &texts(1), &destination);
        assert!(report.layers.iter().all(|l| l.mean_k == Some(49.0)), "{name}");

        // The cache is in f16 at 16 bits; here only the layers are compared.
        let mut quantized = Model::open(&destination).unwrap();
        quantized.set_kv_format(KvFormat::F32);
        let texts = texts(2);
        let error = relative(&logits(&quantized, &texts), &logits(&Model::open(&path).unwrap(), &texts));
        println!("{name}: {error:e}");
        assert!(error < 1e-4, "{name}: {error}");
    }
}

#[test]
fn no_bins_and_no_smoothing_is_plain_gptq() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama-sharded", "qwen2"] {
        let gptq = dir.path().join(format!("{name}-gptq"));
        quantize(&tiny(name), &recipe("gptq", "W4A4KV4"), &texts(1), &gptq);
        for (case, mean_k) in [("no-branch", None), ("no-bins", Some(0))] {
            let mut recipe = recipe("specquant", "W4A4KV4");
            recipe.smooth = None;
            match mean_k {
                Some(k) => recipe.branch.as_mut().unwrap().mean_k = k,
                None => recipe.branch = None,
            }
            let destination = dir.path().join(format!("{name}-{}-{case}", recipe.name));
            let report = quantize(&tiny(name), &recipe, &texts(1), &destination);
            assert!(report.layers.iter().all(|l| l.mean_k.is_none() && l.smoothing_strength.is_none()));
            assert!(report.layers.iter().all(|l| l.rounding.dampening_frac.is_some()));
            assert!(shards(&gptq) == shards(&destination), "{name}, {case}: the shards differ from GPTQ's");
        }
    }
}

#[test]
fn gptq_with_the_identity_rounds_a_residual_to_nearest() {
    let source = Source::open(&tiny("mistral")).unwrap();
    let scheme = recipe("gptq", "W4A4").scheme;
    for (name, [out, inp]) in source.config().linear_shapes(0) {
        let values = source.tensor(&format!("{name}.weight")).unwrap().to_f32().unwrap();
        let weight = Weight { name: &name, out, inp, values: &values, bias: None, clip: None };
        let factor = factorize(Hessian::identity(inp), &GptqConfig::default());
        let stored = branch::truncate(&values, out, inp, &vec![5; out]).unwrap();
        let low = LayerBranch { weight: branch::reconstruct(&stored, out, inp), stored };
        let (input, clip) =
            (Input { mean_abs: &[], hessian: None, sample: &[], rows: 0 }, ClipSearch::default());
        let rounded =
            |round| layer::quantize(&weight, &scheme, Some(&low), &[], &clip, round, &input).unwrap().0;
        assert!(rounded(Round::Gptq(&factor)) == rounded(Round::Nearest), "{name}");
    }
}

/// Quantizes in memory what [`run`] writes, and feeds every block what the quantized blocks before it put out.
#[test]
fn the_checkpoint_read_back_gives_the_logits_of_the_blocks_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let texts = texts(1);
    let rows: usize = texts.iter().map(Vec::len).sum();
    for (name, method, scheme) in [
        ("llama-tied-bf16", "specquant", "W4A4KV4"),
        ("mistral", "specquant", "W4A4KV4"),
        ("qwen2", "specquant", "W3A8KV8"),
        ("qwen3", "smoothquant", "W8A8"),
        ("gemma3", "rtn", "W4A8KV8"),
    ] {
        let recipe = recipe(method, scheme);
        let destination = dir.path().join(name);
        let report = quantize(&tiny(name), &recipe, &texts, &destination);

        let source = Source::open(&tiny(name)).unwrap();
        let written = Source::open(&destination).unwrap();
        let config = source.config();
        let embedding = Embedding::read(&written).unwrap();
        let mut x: Vec<f32> =
            texts.iter().flat_map(|ids| embedding.lookup(ids, config).unwrap().into_vec()).collect();
        let forward = |block: &Block, kv, x: &mut [f32], observe: &mut dyn FnMut(Site, &[f32])| {
            let freq = config.inv_freq(block.window.is_some());
            let rope = RopeTable::new(&freq, texts.iter().flat_map(|t| 0..t.len()));
            let mut caches: Vec<_> =
                texts.iter().map(|_| KvCache::new(kv, config.num_kv_heads, config.head_dim)).collect();
            let mut spans: Vec<_> =
                texts.iter().zip(&mut caches).map(|(t, cache)| Span { rows: t.len(), cache }).collect();
            block.forward(config, &rope, x, &mut spans, observe).unwrap();
        };
        let mut reports = Vec::new();
        for index in 0..config.num_layers {
            let mut b = Block::read(&source, index, None).unwrap();
            b.linears_mut().into_iter().for_each(|l| l.widen().unwrap());
            let mut stats = [&b.q, &b.o, &b.gate, &b.down].map(|l| {
                SiteStats::new(l.in_features(), rows, recipe.calibration.search_tokens, method == "specquant")
            });
            forward(&b, KvFormat::F32, &mut x.clone(), &mut |site, x| {
                stats[site as usize].add(x, "site").unwrap();
            });
            let prefix = format!("model.layers.{index}");
            let layers =
                quantize_block(&mut b, &prefix, &mut stats, &Default::default(), &recipe, config).unwrap();
            reports.extend(layers.layers.into_iter().map(|(report, _)| report));
            forward(&b, recipe.scheme.kv_format(), &mut x, &mut |_, _| ());
        }
        assert_eq!(reports, report.layers, "{name}");

        let head = Head::read(&written).unwrap();
        let mut normed = vec![0.0; x.len()];
        rms_norm(&x, &head.norm, config.rms_norm_eps, &mut normed);
        let in_memory = head.linear.forward(&normed, rows).unwrap();
        let read_back = logits(&Model::load(&written).unwrap(), &texts);
        let bits = |x: &[f32]| -> Vec<u32> { x.iter().map(|v| v.to_bits()).collect() };
        assert!(bits(&in_memory) == bits(&read_back), "{name}: error {}", relative(&read_back, &in_memory));
    }
}

/// Adding a method is adding a file and a line; this is what then has to work.
#[test]
fn every_built_in_recipe_runs_and_its_result_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let known = |text: &str| cfg!(feature = "learn") || !text.contains("[learn]");
    for (name, _) in BUILT_IN.into_iter().filter(|(_, text)| known(text)) {
        for model in ["llama-tied-bf16", "qwen2", "gemma3"] {
            let destination = dir.path().join(format!("{model}-{name}"));
            if model == "gemma3" && recipe(name, "W4A4KV4").rotate.is_some_and(|r| r.residual) {
                let source = Source::open(&tiny(model)).unwrap();
                let (recipe, texts) = (recipe(name, "W4A4KV4"), texts(1));
                let error = run(&source, &recipe, Some(&texts), &Destination::new(&destination), &mut |_| ())
                    .unwrap_err()
                    .to_string();
                assert!(error.contains("o_proj and down_proj") && error.contains("spectral"), "{error}");
                assert!(!destination.exists());
                continue;
            }
            let report = quantize(&tiny(model), &recipe(name, "W4A4KV4"), &texts(1), &destination);
            assert!(
                report.layers.iter().all(|l| l.relative_error.is_finite() && l.relative_error < 0.5),
                "{name}"
            );
            let texts = texts(2);
            let got = logits(&Model::open(&destination).unwrap(), &texts);
            let error = relative(&got, &logits(&Model::open(&tiny(model)).unwrap(), &texts));
            println!("{model} {name}: {error:.3}, {:.3} bits", report.bits_per_weight);
            assert!(error < 0.9, "{model} {name}: {error}");
        }
    }
}

/// Mean KL divergence from the first model's predictions to the second's.
#[cfg(feature = "learn")]
fn divergence(full: &Model, other: &Model, texts: &[Vec<u32>]) -> f64 {
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
        row.iter().map(|v| f64::from(*v) - sum.ln()).collect()
    };
    let vocab = VOCAB as usize;
    let (p, q) = (logits(full, texts), logits(other, texts));
    let rows = p.chunks_exact(vocab).zip(q.chunks_exact(vocab));
    let kl = rows.map(|(p, q)| {
        log_softmax(p).into_iter().zip(log_softmax(q)).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    });
    kl.sum::<f64>() / (p.len() / vocab) as f64
}

/// The loss is the engine's, it falls, and what is stored is what has learned.
#[cfg(feature = "learn")]
#[test]
fn tuning_brings_the_checkpoint_nearer_to_its_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut total = [0.0; 2];
    for name in ["llama-tied-bf16", "mistral", "qwen2", "qwen3"] {
        let full = Model::open(&tiny(name)).unwrap();
        let mut tuned = recipe("spectral-tuned", "W4A4KV4");
        tuned.input.iter_mut().for_each(|input| input.keep = 8);
        let plain = Recipe { learn: None, ..tuned.clone() };
        let [before, after] = [(plain, "plain"), (tuned, "tuned")].map(|(recipe, kind)| {
            let destination = dir.path().join(format!("{name}-{kind}"));
            let report = quantize(&tiny(name), &recipe, &texts(1), &destination);
            let model = Model::open(&destination).unwrap();
            (
                report,
                divergence(&full, &model, &texts(1)),
                divergence(&full, &model, &texts(1)[..1]),
                destination,
            )
        });
        println!("{name}: {:.4} -> {:.4}, {:?}", before.1, after.1, &after.0.tuning_losses[..2]);
        // Of the first text; values at the edge of two codes may fall to either side.
        let first = after.0.tuning_losses[0];
        assert!((first / before.2 - 1.0).abs() < 0.1, "{name}: {first}, the engine has {}", before.2);
        assert!(after.1 < before.1, "{name}: {} before, {} after", before.1, after.1);
        total.iter_mut().zip([before.1, after.1]).for_each(|(sum, kl)| *sum += kl);
        assert_eq!(
            (before.0.bits_per_weight, before.0.tensor_bytes),
            (after.0.bits_per_weight, after.0.tensor_bytes)
        );
        // The codes have stayed.
        let [before, after] = [before.3, after.3].map(|path| Source::open(&path).unwrap());
        assert!(before.names().eq(after.names()));
        for tensor in before.names().filter(|name| name.ends_with(".weight_packed")) {
            assert!(
                before.tensor(tensor).unwrap().bytes() == after.tensor(tensor).unwrap().bytes(),
                "{tensor}"
            );
        }
    }
    // One model alone may gain little: its divergence is that of a few roundings.
    assert!(total[1] < 0.8 * total[0], "{} before, {} after", total[0], total[1]);
}

/// Every basis with smoothing, with rotation, with either rounding.
#[test]
fn methods_compose() {
    let dir = tempfile::tempdir().unwrap();
    let texts = texts(1);
    for (i, basis) in BranchBasis::ALL.into_iter().enumerate() {
        let base = ["quarot", "smoothquant", "spectral"][i % 3];
        let mut recipe = recipe(base, "W4A8KV8");
        // Of 64 inputs, so that the others can pay for a branch.
        recipe.input.iter_mut().for_each(|input| input.keep = 8);
        let mut branch = Recipe::load("specquant").unwrap().branch.unwrap();
        (branch.basis, branch.score, branch.temperature) =
            (basis, branch::Score::Uniform, Searched::Fixed(0.0));
        recipe.branch = Some(branch);
        let plain = dir.path().join(format!("{}-plain", basis.name()));
        let report = quantize(&tiny("qwen3"), &recipe, &texts, &plain);
        assert!(report.layers.iter().all(|l| l.mean_k.is_some()), "{basis:?}");
        let full = logits(&Model::open(&tiny("qwen3")).unwrap(), &texts);
        let error = relative(&logits(&Model::open(&plain).unwrap(), &texts), &full);
        assert!(error < 0.5, "{basis:?}: {error}");

        // Without its branch the same checkpoint is worse, and with all of it the same.
        let truncated = |t| {
            let mut source = Source::open(&plain).unwrap();
            source.truncate_branches(t).unwrap();
            relative(&logits(&Model::load(&source).unwrap(), &texts), &full)
        };
        assert_eq!(truncated(Truncation::Items(usize::MAX)), error);
        assert_eq!(truncated(Truncation::Energy(1.0)), error);
        let (none, half) = (truncated(Truncation::Items(0)), truncated(Truncation::Energy(0.5)));
        assert!(none > error && half > error, "{basis:?}: {none} {half} {error}");

        // Paid for by the residual, it takes what the layer takes without a branch.
        recipe.scheme.levels = Levels::Uniform;
        let branch = recipe.branch.as_mut().unwrap();
        (branch.mean_k, branch.overhead) = (2, Overhead::Matched);
        let matched = quantize(&tiny("qwen3"), &recipe, &texts, &dir.path().join(basis.name()));
        recipe.branch = None;
        let none =
            quantize(&tiny("qwen3"), &recipe, &texts, &dir.path().join(format!("{}-none", basis.name())));
        for (with, without) in matched.layers.iter().zip(&none.layers) {
            let row = 1.0 / without.shape[0] as f64;
            assert!(
                with.bits_per_weight <= without.bits_per_weight + 1e-9
                    && with.bits_per_weight > without.bits_per_weight - row - 0.01,
                "{basis:?} {}: {} {}",
                with.name,
                with.bits_per_weight,
                without.bits_per_weight
            );
        }
    }
}

#[test]
fn threads_and_repetition_change_no_byte_and_other_text_does() {
    let dir = tempfile::tempdir().unwrap();
    for (name, recipe) in [("llama3-rope-scaled", "specquant"), ("qwen2", "specquant"), ("qwen2", "spectral")]
    {
        let recipe = crate::recipe(recipe, "W4A4KV4");
        let written = |case: &str, threads: usize, seed: u64| {
            let destination = dir.path().join(format!("{name}-{}-{case}", recipe.name));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| quantize(&tiny(name), &recipe, &texts(seed), &destination));
            files(&destination)
        };
        let (one, two, again, other) =
            (written("1", 1, 1), written("2", 2, 1), written("again", 2, 1), written("other", 2, 2));
        assert!(one == two, "{name}: 1 and 2 threads write different files");
        assert!(two == again, "{name}: two runs write different files");
        assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
        let second_shard = "model-00002-of-00003.safetensors";
        assert!(one[second_shard] != other[second_shard], "{name}: the calibration text has no effect");
    }
}

#[test]
fn eight_bits_stay_close_for_every_family() {
    let dir = tempfile::tempdir().unwrap();
    for name in TINY {
        let destination = dir.path().join(name);
        quantize(&tiny(name), &recipe("specquant", "W8A8KV8"), &texts(1), &destination);
        let (texts, full) = (texts(2), Model::open(&tiny(name)).unwrap());
        let error = relative(&logits(&Model::open(&destination).unwrap(), &texts), &logits(&full, &texts));
        println!("{name}: {error:.5}");
        // Eight bits of weights are 0.010 of it, of activations the rest.
        assert!(error < 0.02, "{name}: {error}");
    }
}

#[test]
fn a_run_that_fails_leaves_nothing_and_an_existing_directory_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let broken = "model.layers.1.mlp.down_proj.weight";
    let nan = |name: &str, _: &mut Vec<usize>, values: &mut Vec<f32>| {
        if name == broken {
            values[176 + 5] = f32::NAN;
        }
    };
    let path = edited("qwen3", dir.path(), nan, |_| ());
    let parent = dir.path().join("out");
    fs::create_dir(&parent).unwrap();
    let attempt = |source: &Path, texts: &[Vec<u32>]| {
        let source = Source::open(source).unwrap();
        let (recipe, mut blocks) = (recipe("specquant", "W4A4KV4"), 0);
        let result =
            run(&source, &recipe, Some(texts), &Destination::new(parent.join("model")), &mut |_| blocks += 1);
        (result.map(|_| ()).map_err(|e| e.to_string()), blocks)
    };

    let (result, blocks) = attempt(&path, &texts(1));
    let message = result.unwrap_err();
    assert!(message.contains(broken) && blocks == 0, "after {blocks} blocks: {message}");
    let message = attempt(&tiny("qwen3"), &[vec![1, 2, VOCAB]]).0.unwrap_err();
    assert!(message.contains("320"), "{message}");
    let message = attempt(&tiny("qwen3"), &[]).0.unwrap_err();
    assert!(message.contains("calibration"), "{message}");
    assert_eq!(fs::read_dir(&parent).unwrap().count(), 0);

    fs::create_dir(parent.join("model")).unwrap();
    fs::write(parent.join("model/precious"), "x").unwrap();
    let (result, blocks) = attempt(&tiny("qwen3"), &texts(1));
    let message = result.unwrap_err();
    assert!(message.contains("exists already") && blocks == 0, "{message}");
    assert_eq!(files(&parent.join("model")), BTreeMap::from([("precious".to_owned(), b"x".to_vec())]));
    assert_eq!(fs::read_dir(&parent).unwrap().count(), 1);
}

/// A report by the layer's name.
fn layer<'a>(report: &'a Report, name: &str) -> &'a specquant_quantize::LayerReport {
    report.layers.iter().find(|l| l.name.ends_with(name)).unwrap()
}

#[test]
fn silent_channels_and_zero_rows_are_reported_and_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let silence = |name: &str, shape: &mut Vec<usize>, values: &mut Vec<f32>| match name {
        // Channel 5 of q, k and v is never active.
        "model.layers.0.input_layernorm.weight" => values[5] = 0.0,
        // An output of zeros; from gate_proj, it silences channel 7 of down_proj.
        "model.layers.0.self_attn.q_proj.weight" => values[3 * shape[1]..4 * shape[1]].fill(0.0),
        "model.layers.0.mlp.gate_proj.weight" => values[7 * shape[1]..8 * shape[1]].fill(0.0),
        // Nothing reads channel 9 of q, k and v.
        "model.layers.1.self_attn.q_proj.weight"
        | "model.layers.1.self_attn.k_proj.weight"
        | "model.layers.1.self_attn.v_proj.weight" => {
            values.chunks_exact_mut(shape[1]).for_each(|row| row[9] = 0.0)
        }
        _ => (),
    };
    for name in ["llama-sharded", "qwen2"] {
        let path = edited(name, dir.path(), silence, |_| ());
        for (method, scheme) in [("specquant", "W8A8KV8"), ("specquant", "W4A4KV4"), ("gptq", "W4A4KV4")] {
            let destination = dir.path().join(format!("{name}-{method}-{scheme}"));
            let report = quantize(&path, &recipe(method, scheme), &texts(1), &destination);
            for layer in &report.layers {
                let dead = match layer.name.trim_start_matches("model.layers.") {
                    "0.self_attn.q_proj" | "0.self_attn.k_proj" | "0.self_attn.v_proj"
                    | "0.mlp.down_proj" => 1,
                    _ => 0,
                };
                let got = (layer.rounding.dead_columns, &layer.rounding.fallback);
                assert_eq!(got, (dead, &None), "{name}, {method}: {}", layer.name);
                assert!(layer.relative_error.is_finite());
            }
            let (texts, full) = (texts(2), Model::open(&path).unwrap());
            let error =
                relative(&logits(&Model::open(&destination).unwrap(), &texts), &logits(&full, &texts));
            println!("{name}, {method} {scheme}: {error:.4}");
            assert!(error < if scheme == "W8A8KV8" { 0.02 } else { 0.5 }, "{name}, {method}: {error}");
        }
    }
}

#[test]
fn constant_and_zero_activations_are_survived_and_the_fallback_is_named() {
    let dir = tempfile::tempdir().unwrap();
    // Equal tokens attend to equal values: every row of every input is the same, and no Hessian has a rank above 1.
    let same = vec![vec![17; 32]; 2];
    let constant = dir.path().join("constant");
    let report = quantize(&tiny("mistral"), &recipe("specquant", "W4A4KV4"), &same, &constant);
    assert!(report.layers.iter().all(|l| l.relative_error.is_finite() && l.rounding.fallback.is_none()));
    assert!(logits(&Model::open(&constant).unwrap(), &texts(2)).iter().all(|v| v.is_finite()));

    let zero = |name: &str, _: &mut Vec<usize>, values: &mut Vec<f32>| {
        if name == "model.layers.1.input_layernorm.weight" {
            values.fill(0.0);
        }
    };
    let path = edited("mistral", dir.path(), zero, |_| ());
    for strength in [None, Some(0.5)] {
        let mut recipe = recipe("specquant", "W8A8KV8");
        if let Some(alpha) = strength {
            recipe.smooth.as_mut().unwrap().smoothing_strength = Searched::Fixed(alpha);
        }
        let destination = dir.path().join(format!("zero-{strength:?}"));
        let report = quantize(&path, &recipe, &texts(1), &destination);
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            let fallback = &layer(&report, &format!("1.self_attn.{name}")).rounding.fallback;
            assert!(fallback.as_deref().is_some_and(|f| f.contains("zero")), "{name}: {fallback:?}");
        }
        assert_eq!(report.layers.iter().filter(|l| l.rounding.fallback.is_some()).count(), 4);
        let card = fs::read_to_string(destination.join("README.md")).unwrap();
        assert!(card.contains("rounded to nearest") && card.contains("model.layers.1.self_attn.o_proj"));
        let (texts, full) = (texts(2), Model::open(&path).unwrap());
        let error = relative(&logits(&Model::open(&destination).unwrap(), &texts), &logits(&full, &texts));
        println!("zero attention, strength {strength:?}: {error:.4}");
        assert!(error < 0.02, "{error}");
    }
}
