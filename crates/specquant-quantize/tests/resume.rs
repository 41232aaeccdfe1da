//! A run that stops anywhere, continued, comes to the bytes of one that did not, by every built-in recipe.
#![allow(clippy::unwrap_used, clippy::panic)] // the lints' exception covers #[test] functions only

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use specquant_model::Source;
#[cfg(feature = "learn")]
use specquant_quantize::Learn;
use specquant_quantize::{BUILT_IN, Destination, Error, Recipe, Unfinished, run};

fn tiny(name: &str) -> Source {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/tiny");
    Source::open(&golden.join(name)).unwrap()
}

fn texts(seed: usize) -> Vec<Vec<u32>> {
    (0..3).map(|t| (0..48).map(|i| ((seed + t * 131 + i * i * 7) % 320) as u32).collect()).collect()
}

/// A built-in recipe, with few steps of learning.
fn quick(name: &str) -> Recipe {
    let mut recipe = Recipe::load(name).unwrap();
    recipe.calibration.search_tokens = 32;
    if let Some(branch) = &mut recipe.branch {
        (branch.mean_k, branch.max_k, branch.rank) =
            (branch.mean_k.min(4), branch.max_k.min(8), branch.rank.min(2));
    }
    if let Some(input) = &mut recipe.input {
        input.keep = 4;
    }
    #[cfg(feature = "learn")]
    match &mut recipe.learn {
        Some(Learn::OmniQuant(c)) => (c.epochs, c.samples) = (1, 2),
        Some(Learn::FlatQuant(c)) => (c.epochs, c.samples, c.batch_size) = (1, 2, 2),
        Some(Learn::SpinQuant(c)) => (c.steps, c.samples_per_step) = (3, 1),
        Some(Learn::Tune(c)) => c.steps = 90,
        None => {}
    }
    recipe
}

fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

#[test]
fn every_recipe_goes_on_where_it_stopped() {
    let known = |text: &str| cfg!(feature = "learn") || !text.contains("[learn]");
    let source = tiny("llama-sharded");
    let dir = tempfile::tempdir().unwrap();
    for (name, _) in BUILT_IN.into_iter().filter(|(_, text)| known(text)) {
        let (recipe, whole) = (quick(name), Destination::new(dir.path().join(format!("{name}-whole"))));
        let mut events = 0;
        let texts = texts(1);
        run(&source, &recipe, Some(&texts), &whole, &mut |_| events += 1).unwrap();
        // The one holds its hidden states in memory, the other on the disk.
        let stopped = Destination {
            unfinished: Unfinished::Resume,
            spill: true,
            ..Destination::new(dir.path().join(format!("{name}-stopped")))
        };
        // Unwinding leaves no more behind than a killed process does, for nothing is written on the way out.
        let stop_after = |n: usize| {
            let mut seen = 0;
            let attempt = || {
                run(&source, &recipe, Some(&texts), &stopped, &mut |_| {
                    seen += 1;
                    assert!(seen < n, "stopped on purpose");
                })
            };
            catch_unwind(AssertUnwindSafe(attempt))
        };
        // Twice, at the first event and at the last but one; the blocks are two.
        assert!(stop_after(1).is_err() && stop_after(events - 1).is_err(), "{name}");
        assert!(!stopped.path.exists() && stopped.partial().unwrap().exists(), "{name}");
        let report = stop_after(usize::MAX).unwrap().unwrap();
        assert_eq!(files(&whole.path), files(&stopped.path), "{name}");
        assert_eq!(report.layers.len(), 14);
        assert!(!stopped.partial().unwrap().exists());
    }
}

#[test]
fn another_run_is_not_continued() {
    let dir = tempfile::tempdir().unwrap();
    let destination =
        Destination { unfinished: Unfinished::Resume, ..Destination::new(dir.path().join("model")) };
    let (source, recipe) = (tiny("llama-sharded"), quick("gptq"));
    let stopped = catch_unwind(AssertUnwindSafe(|| {
        run(&source, &recipe, Some(&texts(1)), &destination, &mut |_| panic!("stopped on purpose"))
    }));
    assert!(stopped.is_err());
    let before = files(&destination.partial().unwrap().join(".specquant-unfinished"));
    let differs = |source: &Source, recipe: &Recipe, seed: usize| match run(
        source,
        recipe,
        Some(&texts(seed)),
        &destination,
        &mut |_| (),
    )
    .unwrap_err()
    {
        Error::Differs { fields, .. } => fields,
        e => panic!("{e}"),
    };
    let mut other = recipe.clone();
    (other.seed, other.calibration.search_tokens) = (9, 16);
    assert_eq!(differs(&source, &other, 1), "recipe.calibration.search_tokens, recipe.seed");
    assert_eq!(differs(&source, &recipe, 2), "calibration_sha256");
    assert_eq!(differs(&tiny("qwen3"), &recipe, 1), "model_files.generation_config.json, model_sha256");
    // The same tensors beside another file that is copied.
    let copy = dir.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(source.path()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(copy.join("generation_config.json"), r#"{"temperature": 0.5}"#).unwrap();
    assert_eq!(differs(&Source::open(&copy).unwrap(), &recipe, 1), "model_files.generation_config.json");
    // Begun by another version.
    let progress = destination.partial().unwrap().join(".specquant-unfinished/progress.json");
    let ours = std::fs::read_to_string(&progress).unwrap();
    let version = concat!("\"specquant_version\":\"", env!("CARGO_PKG_VERSION"), "\"");
    assert!(ours.contains(version), "{ours}");
    std::fs::write(&progress, ours.replace(version, "\"specquant_version\":\"0.0.9\"")).unwrap();
    assert_eq!(differs(&source, &recipe, 1), "specquant_version");
    std::fs::write(&progress, ours).unwrap();
    assert_eq!(before, files(&destination.partial().unwrap().join(".specquant-unfinished")));
    run(&source, &recipe, Some(&texts(1)), &destination, &mut |_| ()).unwrap();
}
