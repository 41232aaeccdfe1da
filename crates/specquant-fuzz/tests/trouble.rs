//! Numerical trouble is a report and not a surprise: models and calibration texts that break arithmetic, by every kind of recipe. A run ends with a
//! checkpoint whose logits are finite and a list of what was done other than the recipe says, or with an error that names the place.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};

use half::f16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use specquant_fuzz::{config, dense, texts, write};
use specquant_model::{Model, Source};
use specquant_quantize::{Destination, Event, Recipe, Report, plan, run};

/// Of every kind of transform, branch and rounding.
const RECIPES: [&str; 7] = ["rtn", "gptq", "smoothquant", "specquant", "svdquant", "quarot", "spectral"];

/// A built-in recipe in sizes that fit models 32 wide.
fn recipe(name: &str) -> Recipe {
    let mut recipe = Recipe::load(name).unwrap();
    recipe
        .branch
        .iter_mut()
        .for_each(|b| (b.mean_k, b.max_k, b.rank) = (b.mean_k.min(4), b.max_k.min(8), b.rank.min(4)));
    recipe.input.iter_mut().for_each(|input| input.keep = 4);
    recipe
}

/// A random model in f32 whose tensors (name, shape, values) and configuration were changed.
fn model(dir: &Path, config: &Value, mut edit: impl FnMut(&str, &[usize], &mut [f32])) -> PathBuf {
    let mut files = dense(config, 1);
    for (_, bytes) in files.iter_mut().filter(|(name, _)| name.ends_with(".safetensors")) {
        let stored = SafeTensors::deserialize(bytes).unwrap();
        let tensor = |(name, view): (&str, TensorView<'_>)| {
            let halves = view.data().chunks_exact(2);
            let mut values: Vec<f32> = halves.map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
            if name.ends_with("norm.weight") {
                values.iter_mut().for_each(|v| *v += 1.0);
            }
            edit(name, view.shape(), &mut values);
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (name.to_owned(), view.shape().to_vec(), bytes)
        };
        let all: Vec<(String, Vec<usize>, Vec<u8>)> = stored.iter().map(tensor).collect();
        let views = all.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
        *bytes = safetensors::serialize(views, None).unwrap();
    }
    std::fs::create_dir_all(dir).unwrap();
    write(dir, &files).unwrap();
    dir.to_owned()
}

fn quantize(source: &Path, recipe: &Recipe, texts: &[Vec<u32>], out: &Path) -> Result<Report, String> {
    let source = Source::open(source).map_err(|e| e.to_string())?;
    run(&source, recipe, Some(texts), &Destination::replacing(out), &mut |_| ()).map_err(|e| e.to_string())
}

/// Logits after each of the texts.
fn logits(model: &Path) -> Result<Vec<f32>, String> {
    let model = Model::open(model).map_err(|e| e.to_string())?;
    let next = |ids: &Vec<u32>| {
        let logits = model.next_logits(&mut [(&mut model.sequence(), ids)]);
        logits.map(|logits| logits.into_vec()).map_err(|e| e.to_string())
    };
    Ok(texts().iter().map(next).collect::<Result<Vec<_>, _>>()?.concat())
}

fn relative(got: &[f32], want: &[f32]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
}

/// Every recipe on a model: finite logits, finite errors, and every fallback where it belongs. Returns the reports.
fn survives(dir: &Path, source: &Path, texts: &[Vec<u32>]) -> Vec<Report> {
    let each = |name: &&str| {
        let out = dir.join(name);
        let report = quantize(source, &recipe(name), texts, &out).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(logits(&out).unwrap().iter().all(|v| v.is_finite()), "{name}");
        assert!(report.layers.iter().all(|l| l.relative_error.is_finite()), "{name}");
        let json: Value = serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap();
        assert_eq!(json["fallbacks"], json!(report.fallbacks), "{name}");
        let card = std::fs::read_to_string(out.join("README.md")).unwrap();
        assert!(
            report.fallbacks.iter().all(|f| card.contains(&format!("- {}: {}", f.layer, f.what))),
            "{name}"
        );
        report
    };
    RECIPES.iter().map(each).collect()
}

#[test]
fn one_token_of_calibration() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(&dir.path().join("source"), &config("qwen2", 2), |_, _, _| ());
    survives(dir.path(), &source, &[vec![17]]);
}

#[test]
fn the_same_token_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(&dir.path().join("source"), &config("llama", 2), |_, _, _| ());
    survives(dir.path(), &source, &[vec![17; 24], vec![17; 24]]);
}

#[test]
fn dead_channels_and_rows_of_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(&dir.path().join("source"), &config("llama", 1), |name, shape, values| match name {
        "model.layers.0.input_layernorm.weight" => values[5] = 0.0,
        "model.layers.0.mlp.gate_proj.weight" => values[7 * shape[1]..8 * shape[1]].fill(0.0),
        "model.layers.0.self_attn.o_proj.weight" => values.fill(0.0),
        _ => {}
    });
    let reports = survives(dir.path(), &source, &texts());
    let gptq = &reports[1].fallbacks;
    let of =
        |layer: &str| gptq.iter().filter(|f| f.layer.ends_with(layer)).map(|f| &*f.what).collect::<Vec<_>>();
    assert!(
        of("q_proj")[0].contains("1 of 32 input channels") && of("down_proj")[0].contains("1 of 48"),
        "{gptq:?}"
    );
    // Rotations leave no channel dead.
    assert!(
        reports[5].fallbacks.iter().all(|f| !f.what.contains("input channels")),
        "{:?}",
        reports[5].fallbacks
    );
}

/// Of a millionth of the others: what f16 scales cannot hold; and below what f32 holds in full.
#[test]
fn tiny_and_denormal_weights() {
    for (size, name) in [(1e-6f32, "tiny"), (1e-38, "denormal")] {
        let dir = tempfile::tempdir().unwrap();
        let source = model(&dir.path().join(name), &config("llama", 2), |name, _, values| {
            if name.contains("layers.0") && !name.contains("norm") {
                values.iter_mut().for_each(|v| *v *= size);
            }
        });
        let reports = survives(dir.path(), &source, &texts());
        // Small as they are, they keep their levels: below 1e-30 alone they become zeros.
        let tiny =
            reports.iter().flat_map(|r| &r.layers).filter(|l| size > 1e-30 && l.name.contains("layers.0"));
        for layer in tiny {
            assert!(layer.relative_error < 0.5, "{}: {}", layer.name, layer.relative_error);
        }
    }
}

/// Single channels ten thousand times as large as the others, in inputs, weights and embeddings.
#[test]
fn huge_outliers() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(&dir.path().join("source"), &config("llama", 2), |name, shape, values| match name {
        "model.layers.0.input_layernorm.weight" | "model.layers.1.post_attention_layernorm.weight" => {
            values[3] = 1e4
        }
        "model.layers.0.mlp.down_proj.weight" => values[4 * shape[1]] = 1e4,
        "model.embed_tokens.weight" => {
            values.chunks_exact_mut(shape[1]).for_each(|row| row[9] = 1e4 * row[9].abs().max(0.1))
        }
        _ => {}
    });
    survives(dir.path(), &source, &texts());
}

/// What no recipe can go on from is refused by name, and nothing is left behind.
#[test]
fn infinities_and_what_overflows() {
    let dir = tempfile::tempdir().unwrap();
    for (name, value, words) in [
        (
            "model.layers.1.mlp.up_proj.weight",
            f32::INFINITY,
            &["model.layers.1.mlp.up_proj.weight", "inf"][..],
        ),
        (
            "model.layers.0.input_layernorm.weight",
            f32::NEG_INFINITY,
            &["model.layers.0.input_layernorm.weight", "inf"],
        ),
        // Beyond f16, in which embeddings are stored.
        ("model.embed_tokens.weight", 1e5, &["model.embed_tokens.weight", "16 bits"]),
        // Finite by itself, but not squared.
        ("model.layers.0.mlp.down_proj.weight", 3e38, &["model.layers."]),
    ] {
        let source = model(&dir.path().join("source"), &config("llama", 2), |tensor, _, values| {
            if tensor == name {
                values[3] = value;
            }
        });
        for method in RECIPES {
            let out = dir.path().join("out");
            let error = match quantize(&source, &recipe(method), &texts(), &out) {
                Ok(_) => logits(&out).err(),
                Err(error) => {
                    assert!(
                        !out.exists() && std::fs::read_dir(dir.path()).unwrap().count() == 1,
                        "{name}, {method}"
                    );
                    Some(error)
                }
            };
            println!("{name}, {method}: {error:?}");
            // A rotation may spread what is too large to be stored, and clipping may cut it off; an infinity stays one.
            match error {
                Some(error) => assert!(words.iter().all(|w| error.contains(w)), "{name}, {method}: {error}"),
                None => assert!(value.is_finite(), "{name}, {method}: quantized all the same"),
            }
            let _ = std::fs::remove_dir_all(&out);
        }
    }
    // Before any work is done: the last block's, and text would be written first.
    let source = model(&dir.path().join("last"), &config("llama", 2), |tensor, _, values| {
        if tensor == "model.layers.1.mlp.down_proj.weight" {
            values[5] = f32::NAN;
        }
    });
    let (mut events, out) = (0, dir.path().join("out"));
    let opened = Source::open(&source).unwrap();
    let error = run(&opened, &recipe("rtn"), None, &Destination::new(&out), &mut |_: Event| events += 1);
    assert!(error.unwrap_err().to_string().contains("model.layers.1.mlp.down_proj.weight"));
    assert_eq!((events, out.exists()), (0, false));
    // A head that overflows is declared, and not sampled from.
    let source = model(&dir.path().join("head"), &config("llama", 1), |tensor, _, values| {
        if tensor == "lm_head.weight" {
            values.fill(3e38);
        }
    });
    assert!(logits(&source).unwrap_err().contains("logits are not finite"));
}

/// Eight bits stay near full precision in shapes that are no powers of two: SmolLM's 9 heads on 3, Qwen's 14 on 2, the widths 4864 of Qwen2 and 11008
/// of LLaMA-2-7B, a vocabulary of 32003. (Of that width the Hessian of GPTQ alone would take a gigabyte, so that these are rounded to nearest.)
#[test]
fn odd_shapes() {
    for (heads, kv_heads, head_dim, inner, vocab) in [
        (9, 3, 8, 48, 48),
        (14, 2, 4, 48, 48),
        (4, 2, 8, 4864, 48),
        (4, 2, 8, 11008, 48),
        (4, 2, 8, 48, 32003),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config("qwen2", 1);
        for (key, value) in [
            ("hidden_size", heads * head_dim),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("head_dim", head_dim),
            ("intermediate_size", inner),
            ("vocab_size", vocab),
        ] {
            config[key] = json!(value);
        }
        let source = model(&dir.path().join("source"), &config, |_, _, _| ());
        let want = logits(&source).unwrap();
        assert_eq!(want.len(), texts().len() * vocab);
        // Widths without a Hadamard matrix: 9 and 14 heads.
        let unrotated = |method: &str, layer: &str, what: &str| {
            let fallbacks = plan(&Source::open(&source).unwrap(), &recipe(method)).unwrap().fallbacks;
            fallbacks.iter().any(|f| f.layer.contains(layer) && f.what.contains(what))
        };
        assert_eq!(
            unrotated("quarot", "across the heads", "not rotated: there is no Hadamard matrix of order 9"),
            heads == 9
        );
        assert_eq!(unrotated("quarot", "across the heads", "rotated 2 values at a time"), heads == 14);
        assert!(!unrotated("quarot", "input of down_proj", "rotated") && !unrotated("rtn", "", ""));
        for method in RECIPES {
            let mut recipe = recipe(method);
            // A Hessian 11008 wide takes its time: by one recipe.
            if inner > 1000 && method != "gptq" {
                recipe.rounding = Recipe::load("rtn").unwrap().rounding;
                if method == "spectral" {
                    recipe.input.as_mut().unwrap().keep = 0;
                }
            }
            recipe.scheme = recipe.scheme.with_widths("W8A8KV8").unwrap();
            recipe.embeddings =
                if method == "rtn" { specquant_quantize::Embeddings::Int8 } else { recipe.embeddings };
            let out = dir.path().join(method);
            quantize(&source, &recipe, &texts(), &out)
                .unwrap_or_else(|e| panic!("{heads} heads, {inner}, {method}: {e}"));
            let error = relative(&logits(&out).unwrap(), &want);
            println!("{heads} heads, {inner} wide, {vocab} tokens, {method}: {error:.4}");
            assert!(error < 0.05, "{heads} heads, {inner} wide, {vocab} tokens, {method}: {error}");
        }
    }
}
