//! `specquant eval tasks`.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use serde_json::json;
use specquant_eval::{
    Bos, Encoder, Journal, Query, RunInfo, TASKS, Task, TaskData, TaskResult, averages, encode, estimate,
    evaluate, results_json, sanitized, tokens, write_results, write_whole,
};
use specquant_kernels::Isa;
use specquant_model::{Model, QuantizationConfig, Source, Truncation};

use crate::args::{BosArg, TaskArgs, TasksArgs};
use crate::system;
use crate::ui::{Progress, note, table};

/// The tasks' documents as token ids, all encoded before anything is scored, so that what is wrong is known at once.
pub struct Queries {
    /// Per task, per document.
    pub tasks: Vec<Vec<Vec<Query>>>,
    /// Tokens that the model reads at most.
    pub max_length: usize,
}

pub fn bos(arg: BosArg) -> Bos {
    match arg {
        BosArg::Window => Bos::Window,
        BosArg::Auto => Bos::Auto,
        BosArg::Always => Bos::Always,
        BosArg::Never => Bos::Never,
    }
}

/// Reads the data of the tasks asked for.
pub fn read(args: &TaskArgs) -> anyhow::Result<Vec<TaskData>> {
    anyhow::ensure!(
        args.shots == 0,
        "--shots {}: only zero-shot prompts are supported, as in the papers' tables; leave it out",
        args.shots
    );
    let mut tasks = Vec::new();
    for name in args.tasks.iter().map(|name| name.trim()) {
        match name {
            "all" => tasks.extend(TASKS),
            _ => tasks.push(Task::named(name)?),
        }
    }
    let dir = args.data.as_deref().with_context(|| {
        let first = tasks.first().map_or(String::new(), |t| t.fetch_command(Path::new("DIR")));
        format!("give the directory of the tasks' data with --data DIR; to fill it, for example: {first}")
    })?;
    let mut data = Vec::new();
    for task in tasks {
        if data.iter().all(|d: &TaskData| d.task.name != task.name) {
            #[cfg(feature = "hub")]
            if args.download && task.data_file(dir).is_none() {
                note!("downloading {}", task.dataset.path);
                task.download(dir, &specquant_eval::Hub::from_env())?;
            }
            data.push(TaskData::read(task, dir, args.limit)?);
        }
    }
    Ok(data)
}

/// Turns them into token ids of a model.
pub fn encode_all(args: &TaskArgs, data: &[TaskData], source: &Source) -> anyhow::Result<Queries> {
    let longest = source.config().max_position_embeddings;
    if args.max_length > longest {
        note!(
            "note: --max-length {} is more than the {longest} tokens that {} is made for",
            args.max_length,
            source.path().display()
        );
    }
    let tokenizer = source.tokenizer()?;
    let encoder = Encoder::new(&tokenizer, source.config(), bos(args.bos), args.max_length)?;
    let tasks = data.iter().map(|d| encode(d, &encoder)).collect::<Result<_, _>>()?;
    Ok(Queries { tasks, max_length: encoder.max_length() })
}

/// Opens the journal of a model's run.
pub fn journal(
    dir: &Path,
    model_sha256: &str,
    args: &TaskArgs,
    max_length: usize,
    resume: bool,
) -> anyhow::Result<Journal> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let identity = json!({
        "specquant_version": env!("CARGO_PKG_VERSION"),
        "model_sha256": model_sha256,
        "bos": bos(args.bos),
        "max_length": max_length,
    });
    Ok(Journal::open(&dir.join("journal.jsonl"), &identity, resume)?)
}

/// Scores all tasks.
pub fn score(
    model: &Model,
    data: &[TaskData],
    queries: &Queries,
    mut journal: Option<&mut Journal>,
    quiet: bool,
) -> anyhow::Result<Vec<TaskResult>> {
    let total: usize = queries.tasks.iter().flatten().map(|q| tokens(q)).sum();
    let mut progress = Progress::new("token", total as u64, quiet);
    let mut done = 0;
    let mut results = Vec::new();
    for (data, queries) in data.iter().zip(&queries.tasks) {
        let result = evaluate(model, data, queries, journal.as_deref_mut(), &mut |tokens, known| {
            done += tokens as u64;
            match known {
                true => progress.skip(done),
                false => progress.set(done, data.task.name),
            }
        })?;
        results.push(result);
    }
    Ok(results)
}

/// A mean with its standard error, in percent.
pub fn percent(x: &[f64]) -> String {
    let e = estimate(x.iter().copied());
    let error = if x.len() > 1 { format!("{:.2}", 100.0 * e.stderr) } else { "?".to_owned() };
    format!("{:.2} ± {error}", 100.0 * e.mean)
}

/// One row a task, and the two averages.
fn describe(results: &[TaskResult]) -> String {
    let header = ["task", "documents", "acc %", "acc_norm %", "perplexity", "chance %"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for r in results {
        let perplexity = r.perplexity.map_or(String::new(), |p| format!("{:.3} ± {:.3}", p.mean, p.stderr));
        rows.push(vec![
            r.task.to_owned(),
            r.acc.len().to_string(),
            percent(&r.acc),
            r.acc_norm.as_ref().map_or(String::new(), |x| percent(x)),
            perplexity,
            format!("{:.1}", 100.0 * r.chance),
        ]);
    }
    let a = averages(results);
    let all = if results.len() == TASKS.len() {
        "Avg9".to_owned()
    } else {
        format!("average of {}", results.len())
    };
    table(&rows)
        + &format!(
            "{all} (acc_norm where lm-eval reports it, else acc): {:.2} ± {:.2} %\naverage of acc: {:.2} ± {:.2} %; chance: {:.2} %\n",
            100.0 * a.paper.mean,
            100.0 * a.paper.stderr,
            100.0 * a.acc.mean,
            100.0 * a.acc.stderr,
            100.0 * a.chance,
        )
}

/// Writes every request: strings, and token ids as the model gets them.
fn dump(data: &[TaskData], queries: &Queries, path: &Path) -> anyhow::Result<()> {
    write_whole(path, |file| {
        for (data, queries) in data.iter().zip(&queries.tasks) {
            for (d, (document, queries)) in data.documents.iter().zip(queries).enumerate() {
                for (i, (request, query)) in document.requests.iter().zip(queries).enumerate() {
                    let (context, continuation) = query.ids.split_at(query.ids.len() - query.scored);
                    let line = json!({
                        "task": data.task.name, "doc": d, "choice": i, "gold": document.gold,
                        "context": request.context, "continuation": request.continuation,
                        "context_tokens": context, "continuation_tokens": continuation,
                    });
                    writeln!(file, "{line}")?;
                }
            }
        }
        Ok(())
    })?;
    Ok(())
}

/// What a model is called in results: the name of its directory or GGUF file.
pub fn model_name(model: &Path) -> String {
    // A path such as "." has none of its own.
    let full = model.canonicalize().unwrap_or_else(|_| model.to_owned());
    let name =
        if full.extension().is_some_and(|e| e == "gguf") { full.file_stem() } else { full.file_name() };
    name.map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned())
}

/// The scheme of a SpecQuant checkpoint, and how much of its branches is used.
pub fn scheme(source: &Source) -> anyhow::Result<Option<String>> {
    let config = QuantizationConfig::from_config(source.config_json(), source.path())?;
    let cut = match source.truncation() {
        Truncation::None => String::new(),
        Truncation::Items(k) => format!(" k-run {k}"),
        Truncation::Energy(share) => format!(" truncate {share}"),
    };
    Ok(config.map(|q| format!("{}{cut}", q.scheme)))
}

/// What results say about the run.
pub fn run_info(
    path: &Path,
    source: &Source,
    model_sha256: String,
    args: &TaskArgs,
    max_length: usize,
    started: SystemTime,
    duration: Duration,
) -> anyhow::Result<RunInfo> {
    let scheme = scheme(source)?;
    let report: Option<serde_json::Value> =
        fs::read(path.join("report.json")).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    Ok(RunInfo {
        model: model_name(path),
        model_sha256,
        // A part of the branches has other bits than the whole.
        bits_per_weight: scheme
            .as_ref()
            .and(report)
            .filter(|_| source.truncation() == Truncation::None)
            .and_then(|r| r["bits_per_weight"].as_f64()),
        scheme,
        tensor_bytes: source.tensor_bytes(),
        bos: bos(args.bos),
        max_length,
        limit: args.limit,
        threads: rayon::current_num_threads(),
        kernels: Isa::active().name(),
        started,
        duration,
    })
}

pub fn run(args: TasksArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.model.threads)?;
    let data = read(&args.tasks)?;
    let path = &args.model.model;
    let source = args.model.open()?;
    let queries = encode_all(&args.tasks, &data, &source)?;
    if let Some(path) = &args.dump_requests {
        dump(&data, &queries, path)?;
        return Ok(ExitCode::SUCCESS);
    }
    let sha256 = source.fingerprint()?;
    let dir = args.output.as_ref().map(|dir| dir.join(sanitized(&model_name(path))));
    let journal = dir.as_ref().map(|dir| journal(dir, &sha256, &args.tasks, queries.max_length, args.resume));
    let mut journal = journal.transpose()?;
    let model = Model::load_for_decoding(&source)?;
    let started = SystemTime::now();
    let results = score(&model, &data, &queries, journal.as_mut(), args.json)?;
    let duration = started.elapsed().unwrap_or_default();
    let info = run_info(path, &source, sha256, &args.tasks, queries.max_length, started, duration)?;
    let json = results_json(&info, &data, &results, None);
    let mut out = std::io::stdout();
    if let Some(dir) = &dir {
        let path = write_results(dir, &json, &data, &results, started)?;
        if !args.json {
            note!("wrote {}", path.display());
        }
    }
    if args.json {
        writeln!(out, "{json:#}")?;
    } else {
        write!(out, "{}", describe(&results))?;
    }
    Ok(ExitCode::SUCCESS)
}
