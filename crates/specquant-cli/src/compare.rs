//! `specquant compare`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context;
use serde_json::{Value, json};
use specquant_eval::{
    Comparison, Perplexity, Record, Reference, TaskData, results_json, sanitized, sha256, write_results,
    write_whole,
};
use specquant_kernels::Isa;
use specquant_model::Source;
use specquant_quantize::Recipe;

use crate::args::CompareArgs;
use crate::tasks::{self, run_info};
use crate::ui::{note, table};
use crate::{eval, quantize, system};

/// A model to be compared.
struct Entry {
    name: String,
    path: PathBuf,
    source: Source,
}

/// File names, with as much of the path before them as makes them unique.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for path in paths {
        let (last, parent) = (tasks::model_name(path), path.parent().map(tasks::model_name));
        let longer = parent.map(|p| format!("{p}/{last}"));
        let candidates = [Some(last.clone()), longer].into_iter().flatten();
        let numbered = (2..).map(|n| format!("{last} ({n})"));
        names.extend(candidates.chain(numbered).find(|name| !names.contains(name)));
    }
    names
}

/// Quantizes the first model by a recipe, or finds that an earlier run has done so.
fn quantized(name: &str, args: &CompareArgs, source: &Source) -> anyhow::Result<PathBuf> {
    let recipe: Recipe = quantize::recipe(name, &args.overrides)?;
    let path = args.output.join("checkpoints").join(sanitized(&recipe.name));
    if path.exists() && args.resume {
        let config = Source::open(&path)?.config_json().clone();
        anyhow::ensure!(
            config["quantization_config"]["recipe"] == json!(recipe),
            "{} was made with other settings than these; remove it, or choose another -o",
            path.display()
        );
        return Ok(path);
    }
    if !args.json {
        note!("quantizing by {} {}", recipe.name, recipe.scheme);
    }
    std::fs::create_dir_all(args.output.join("checkpoints"))
        .with_context(|| format!("cannot create {}", args.output.display()))?;
    quantize::quantize(source, &recipe, &path, false, args.json)?;
    Ok(path)
}

/// A perplexity that an earlier run has measured under the same conditions.
fn stored(path: &Path, identity: &Value, resume: bool) -> anyhow::Result<Option<Perplexity>> {
    let Ok(bytes) = std::fs::read(path) else { return Ok(None) };
    anyhow::ensure!(
        resume,
        "{} exists: an earlier comparison wrote it; continue that with --resume, or choose another -o",
        path.display()
    );
    let damaged = || format!("{} is damaged; remove it", path.display());
    let value: Value = serde_json::from_slice(&bytes).with_context(damaged)?;
    let keys = identity.as_object().into_iter().flatten();
    let differing: Vec<_> =
        keys.filter(|(k, v)| value["identity"].get(k) != Some(v)).map(|(k, _)| k.as_str()).collect();
    anyhow::ensure!(
        differing.is_empty(),
        "{} belongs to a run that differs in {}; choose another -o, or remove it",
        path.display(),
        differing.join(", ")
    );
    Ok(Some(serde_json::from_value(value["perplexity"].clone()).with_context(damaged)?))
}

/// Perplexity of every model, and the distance of all to the first.
fn perplexities(args: &CompareArgs, entries: &[Entry]) -> anyhow::Result<Vec<Perplexity>> {
    let text = eval::read(&args.text)?;
    let mut reference: Option<Reference> = None;
    let mut results = Vec::new();
    let first = entries[0].source.fingerprint()?;
    for (i, entry) in entries.iter().enumerate() {
        let prose = eval::encode(&text, &args.text, args.tasks.bos, &entry.source)?;
        let identity = json!({
            "specquant_version": env!("CARGO_PKG_VERSION"),
            "model_sha256": entry.source.fingerprint()?,
            "reference_sha256": first,
            "text_sha256": sha256(text.as_bytes()),
            "settings": prose.protocol,
        });
        let dir = args.output.join(sanitized(&entry.name));
        let path = dir.join("perplexity.json");
        let result = match stored(&path, &identity, args.resume)? {
            Some(result) => result,
            None => {
                if !args.json {
                    note!("perplexity of {}", entry.name);
                }
                if reference.is_none() {
                    let prose = eval::encode(&text, &args.text, args.tasks.bos, &entries[0].source)?;
                    reference = Some(eval::reference(&entries[0].source, &prose, &args.text, args.json)?);
                }
                let result = match (&reference, i) {
                    (Some(reference), 0) => reference.perplexity.clone(),
                    _ => eval::measure(&entry.source, &prose, &args.text, reference.as_ref(), args.json)
                        .with_context(|| entry.name.clone())?,
                };
                std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
                let value = json!({ "identity": identity, "perplexity": result });
                write_whole(&path, |file| writeln!(file, "{value:#}"))?;
                result
            }
        };
        results.push(result);
    }
    Ok(results)
}

/// The command line, with the last part of every path, which is what matters to another reader.
fn command() -> String {
    let word = |arg: String| {
        let path = Path::new(&arg);
        let last = path.file_name().filter(|_| arg.contains('/') && !arg.starts_with('-'));
        last.map_or(arg.clone(), |l| l.to_string_lossy().into_owned())
    };
    std::env::args().map(word).collect::<Vec<_>>().join(" ")
}

fn facts(
    args: &CompareArgs,
    data: &[TaskData],
    perplexities: Option<&Vec<Perplexity>>,
) -> Vec<(String, String)> {
    let mut facts = Vec::new();
    let file = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if let (Some(path), Some(p)) = (&args.text.text, perplexities.and_then(|p| p.first())) {
        facts.push(("text".to_owned(), file(path)));
        facts.push(("protocol".to_owned(), p.protocol.clone()));
    }
    if !data.is_empty() {
        let documents: usize = data.iter().map(|d| d.documents.len()).sum();
        let available: usize = data.iter().map(|d| d.available).sum();
        facts.push((
            "tasks".to_owned(),
            format!("{documents} of {available} documents of {} tasks, zero-shot, prompts and scores of lm-evaluation-harness 0.4", data.len()),
        ));
    }
    facts.push((
        "engine".to_owned(),
        format!(
            "specquant {}, {} kernels, {} threads",
            env!("CARGO_PKG_VERSION"),
            Isa::active().name(),
            rayon::current_num_threads()
        ),
    ));
    facts.push(("command".to_owned(), command()));
    facts
}

pub fn run(args: CompareArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.overrides.threads)?;
    anyhow::ensure!(
        args.text.text.is_some() || args.tasks.data.is_some(),
        "nothing to compare by: give a text with --text FILE, tasks with --data DIR, or both"
    );
    // Whatever can be wrong is known before the first hour of work.
    let data = if args.tasks.data.is_some() { tasks::read(&args.tasks)? } else { Vec::new() };
    if args.text.text.is_some() {
        eval::read(&args.text)?;
    }
    let first = Source::open(&args.models[0])?;
    let mut paths = args.models.clone();
    for recipe in &args.recipes {
        quantize::recipe(recipe, &args.overrides)?;
    }
    for recipe in &args.recipes {
        paths.push(quantized(recipe, &args, &first)?);
    }
    let entries = names(&paths).into_iter().zip(paths).map(|(name, path)| {
        let source = Source::open(&path)?;
        Ok(Entry { name, path, source })
    });
    let entries = entries.collect::<anyhow::Result<Vec<_>>>()?;
    let perplexities = args.text.text.as_ref().map(|_| perplexities(&args, &entries)).transpose()?;

    let mut data = data;
    let mut records = Vec::new();
    for (i, entry) in entries.iter().enumerate() {
        let perplexity = perplexities.as_ref().map(|p| p[i].clone());
        let dir = args.output.join(sanitized(&entry.name));
        let started = SystemTime::now();
        let prepared = tasks::prepare(&args.tasks, data, &entry.source)?;
        let mut results = Vec::new();
        if !prepared.data.is_empty() {
            if !args.json {
                note!("tasks of {}", entry.name);
            }
            let journal = tasks::journal(&dir, &entry.source, &args.tasks, prepared.max_length, args.resume)?;
            let model = system::load_for_decoding(&entry.source)?;
            results = tasks::score(&model, &prepared, Some(journal), args.json)
                .with_context(|| entry.name.clone())?;
        }
        let mut info = run_info(&entry.path, &entry.source, &args.tasks, prepared.max_length, started)?;
        info.model.clone_from(&entry.name);
        let json = results_json(&info, &prepared.data, &results, perplexity.as_ref());
        write_results(&dir, &json, &prepared.data, &results, started)?;
        data = prepared.data;
        records.push(Record { name: entry.name.clone(), info, perplexity, tasks: results });
    }

    let comparison = Comparison { records, facts: facts(&args, &data, perplexities.as_ref()) };
    let json = comparison.json();
    let html = comparison.html()?;
    write_whole(&args.output.join("comparison.json"), |file| writeln!(file, "{json:#}"))?;
    write_whole(&args.output.join("README.md"), |file| write!(file, "{}", comparison.markdown()))?;
    let page = args.output.join("index.html");
    write_whole(&page, |file| write!(file, "{html}"))?;
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{json:#}")?;
    } else {
        let tables = [Some(comparison.summary()), comparison.by_task(), comparison.pairs()];
        for rows in tables.into_iter().flatten() {
            writeln!(out, "{}", table(&rows))?;
        }
        writeln!(out, "wrote {}", page.display())?;
    }
    Ok(ExitCode::SUCCESS)
}
