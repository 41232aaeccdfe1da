//! What is fed: one function for every kind of input.

use std::error::Error;
use std::path::Path;

use specquant_eval::{TASKS, TaskData};
use specquant_model::{
    Message, Model, QuantizationConfig, Sampler, Sampling, Source, Tokenizer, Truncation, generate, read_text,
};
use specquant_quantize as q;
use tempfile::TempDir;

use crate::{files, seeds};

/// What became of an input that the target survived: it ran to its end, or was refused with this message.
pub type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

/// A kind of input.
pub struct Target {
    /// Its name, also of the cargo-fuzz target.
    pub name: &'static str,
    /// Reads an input. The directory is the target's own and may hold files of the input before.
    pub run: fn(&Path, &[u8]) -> Outcome,
    /// Valid inputs to start from.
    pub seeds: fn() -> &'static [Vec<u8>],
    /// Bytes of memory that an input may take besides a multiple of its own.
    pub memory: usize,
}

/// For vocabularies, kernels' tables and libraries.
const FILES: usize = 32 << 20;
/// What the fuel of a chat template pays for, several times over: texts grow by doubling, and are written out for people.
const TEXTS: usize = 512 << 20;

/// Every kind.
pub const TARGETS: [Target; 7] = [
    Target { name: "model", run: model_directory, seeds: seeds::models, memory: FILES },
    Target { name: "checkpoint", run: model_directory, seeds: seeds::checkpoints, memory: FILES },
    Target { name: "gguf", run: gguf, seeds: seeds::ggufs, memory: FILES },
    Target { name: "tokenizer", run: tokenizer, seeds: seeds::tokenizers, memory: TEXTS },
    Target { name: "template", run: template, seeds: seeds::templates, memory: TEXTS },
    Target { name: "recipe", run: recipe, seeds: seeds::recipes, memory: FILES },
    Target { name: "tasks", run: tasks, seeds: seeds::tasks, memory: FILES },
];

/// A target by name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}

/// For libFuzzer: a directory that lasts as long as the thread.
pub fn run(name: &str, bytes: &[u8]) {
    thread_local!(static DIR: Option<TempDir> = tempfile::tempdir().ok());
    DIR.with(|dir| {
        if let (Some(dir), Some(target)) = (dir, target(name)) {
            let _ = (target.run)(dir.path(), bytes);
        }
    });
}

/// The files of a Hugging Face directory or of a checkpoint.
fn model_directory(dir: &Path, bytes: &[u8]) -> Outcome {
    files::write(dir, &files::split(bytes))?;
    run_model(dir)
}

fn gguf(dir: &Path, bytes: &[u8]) -> Outcome {
    let path = dir.join("model.gguf");
    files::write_new(&path, bytes)?;
    run_model(&path)
}

/// All that a user can do with a model: look at it, tokenize, and continue a text.
fn run_model(path: &Path) -> Outcome {
    let mut source = Source::open(path)?;
    let tokenizer = source.tokenizer();
    let text = tokenizer.as_ref().map(|t| t.encode("the harbour", true));
    let vocab = source.config().vocab_size as u32;
    let known = |ids: &Vec<u32>| !ids.is_empty() && ids.iter().all(|id| *id < vocab);
    let ids = text.ok().and_then(Result::ok).filter(known).unwrap_or_else(|| vec![0; 3]);
    let model = Model::load(&source)?;
    source.check_finite()?;
    continue_text(&model, &ids)?;
    if QuantizationConfig::from_config(source.config_json(), path)?.is_some_and(|q| q.branch_basis.is_some())
    {
        for truncation in [Truncation::Items(1), Truncation::Energy(0.5)] {
            source.truncate_branches(truncation)?;
            continue_text(&Model::load(&source)?, &ids)?;
        }
    }
    source.fingerprint()?;
    tokenizer?;
    Ok(())
}

/// # Panics
/// When logits are returned that are not finite.
fn continue_text(model: &Model, ids: &[u32]) -> Outcome {
    let mut sequence = model.sequence();
    let logits = model.next_logits(&mut [(&mut sequence, ids)])?;
    assert!(logits.iter().all(|v| v.is_finite()), "logits that are not finite, and no error");
    let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 0.9, seed: 1 };
    generate(model, &mut sequence, &ids[..1], 2, &mut Sampler::new(sampling), |_| true)?;
    Ok(())
}

/// tokenizer.json, or that and the files beside it.
fn tokenizer(_: &Path, bytes: &[u8]) -> Outcome {
    let tokenizer = Tokenizer::from_files(Path::new("input"), &files::split(bytes))?;
    for text in ["", "the harbour was quiet", "<s>a\u{0}é漢😀  \r\n<|im_end|>"] {
        let ids = tokenizer.encode(text, true)?;
        tokenizer.decode(&ids, true)?;
        let mut decoder = tokenizer.decoder(false);
        ids.into_iter().try_for_each(|id| decoder(id).map(drop))?;
    }
    tokenizer.decode(&[0, 1, 77, u32::MAX], false)?;
    let _ = (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.first_id(), tokenizer.vocab_size());
    if tokenizer.has_chat_template() {
        tokenizer.chat_prompt(&conversation(), true)?;
    }
    Ok(())
}

fn conversation() -> [Message; 3] {
    [("system", "You are terse."), ("user", "Is it \"quiet\"?"), ("assistant", "<|im_end|> No.\n")]
        .map(|(role, content)| Message { role: role.into(), content: content.into() })
}

/// A chat template.
fn template(_: &Path, bytes: &[u8]) -> Outcome {
    let mut files = files::split(&seeds::tokenizers()[0]);
    files.retain(|(name, _)| name == "tokenizer.json");
    files.push(("chat_template.jinja".to_owned(), bytes.to_vec()));
    let tokenizer = Tokenizer::from_files(Path::new("input"), &files)?;
    tokenizer.chat_prompt(&conversation(), true)?;
    Ok(())
}

/// A recipe in TOML. One that fits a tiny model is run, and what it wrote is read.
fn recipe(dir: &Path, bytes: &[u8]) -> Outcome {
    let (file, out) = (dir.join("recipe.toml"), dir.join("out"));
    files::write_new(&file, bytes)?;
    let recipe = q::Recipe::load(&file.to_string_lossy())?;
    let source = Source::open(seeds::recipe_model())?;
    q::plan(&source, &recipe)?;
    // How long learning takes is for its recipe to say.
    if recipe.learn.is_some() {
        return Ok(());
    }
    q::run(&source, &recipe, Some(&seeds::texts()), &q::Destination::replacing(&out), &mut |_| ())?;
    let run = run_model(&out);
    std::fs::remove_dir_all(&out)?;
    run
}

/// Task data of the nine tasks, and calibration text: what one of them reads has run.
fn tasks(dir: &Path, bytes: &[u8]) -> Outcome {
    let (mut refused, mut ran) = (None, false);
    for task in TASKS {
        let file = dir.join(format!("{}.jsonl", task.file));
        files::write_new(&file, bytes)?;
        let read = TaskData::read(task, dir, 0);
        ran |= read_text(&file).is_ok() || read.as_ref().is_ok_and(|data| data.chance().is_finite());
        refused = refused.or(read.err());
        std::fs::remove_file(&file)?;
    }
    match refused {
        Some(e) if !ran => Err(e.into()),
        _ => Ok(()),
    }
}
