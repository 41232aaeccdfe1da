//! `specquant eval tasks`.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde_json::json;
use specquant_eval::{
    Bos, Encoder, Journal, Query, TASKS, Task, TaskData, TaskResult, averages, encode, estimate, evaluate,
};
use specquant_model::{Model, Source};

use crate::args::{BosArg, TaskArgs, TasksArgs};
use crate::system;
use crate::ui::{Progress, table};

/// The tasks' documents, all read and encoded before anything is scored, so that what is missing is known at once.
pub struct Prepared {
    pub data: Vec<TaskData>,
    pub queries: Vec<Vec<Vec<Query>>>,
    /// Tokens that the model reads at most.
    pub max_length: usize,
}

pub fn bos(arg: BosArg) -> Bos {
    match arg {
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
    let all = args.tasks.iter().any(|t| t == "all");
    let named = || args.tasks.iter().map(|name| Task::named(name)).collect::<Result<Vec<_>, _>>();
    let tasks = if all { TASKS.to_vec() } else { named()? };
    let dir = args.data.as_deref().with_context(|| {
        let first = tasks.first().map_or(String::new(), |t| t.fetch_command(Path::new("DIR")));
        format!("give the directory of the tasks' data with --data DIR; to fill it, for example: {first}")
    })?;
    let mut data = Vec::new();
    for task in tasks {
        if data.iter().all(|d: &TaskData| d.task.name != task.name) {
            data.push(TaskData::read(task, dir, args.limit)?);
        }
    }
    Ok(data)
}

/// Turns them into token ids of this model.
pub fn prepare(args: &TaskArgs, data: Vec<TaskData>, source: &Source) -> anyhow::Result<Prepared> {
    let tokenizer = source.tokenizer()?;
    let encoder = Encoder::new(&tokenizer, source.config(), bos(args.bos), args.max_length)?;
    let queries = data.iter().map(|d| encode(d, &encoder)).collect::<Result<_, _>>()?;
    Ok(Prepared { data, queries, max_length: encoder.max_length() })
}

/// Opens the journal of a model's run.
pub fn journal(
    dir: &Path,
    source: &Source,
    args: &TaskArgs,
    max_length: usize,
    resume: bool,
) -> anyhow::Result<Journal> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let identity = json!({
        "specquant_version": env!("CARGO_PKG_VERSION"),
        "model_sha256": source.fingerprint()?,
        "bos": bos(args.bos),
        "max_length": max_length,
    });
    Ok(Journal::open(&dir.join("journal.jsonl"), &identity, resume)?)
}

/// Scores all tasks.
pub fn score(
    model: &Model,
    prepared: &Prepared,
    mut journal: Option<Journal>,
    quiet: bool,
) -> anyhow::Result<Vec<TaskResult>> {
    let total = prepared.data.iter().map(|d| d.documents.len() as u64).sum();
    let mut progress = Progress::new("document", total, quiet);
    let mut done = 0;
    let mut results = Vec::new();
    for (data, queries) in prepared.data.iter().zip(&prepared.queries) {
        let result = evaluate(model, data, queries, journal.as_mut(), &mut |documents| {
            done += documents as u64;
            progress.set(done, data.task.name);
        })?;
        results.push(result);
    }
    Ok(results)
}

/// A mean with its standard error, in percent.
pub fn percent(x: &[f64]) -> String {
    let e = estimate(x.iter().copied());
    format!("{:.2} ± {:.2}", 100.0 * e.mean, 100.0 * e.stderr)
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
fn dump(prepared: &Prepared, path: &Path) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(fs::File::create(path)?);
        for (data, queries) in prepared.data.iter().zip(&prepared.queries) {
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
        file.flush()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Where the results of a model go: a directory of its name, cleaned as lm-eval does (`sanitize_model_name`).
pub fn model_dir(output: &Path, model: &Path) -> PathBuf {
    let name = model.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy());
    let bad = |c: char| "\"<>:/|\\?*[]".contains(c);
    output.join(name.replace(bad, "__"))
}

pub fn run(args: TasksArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.model.threads)?;
    let data = read(&args.tasks)?;
    let source = Source::open(&args.model.model)?;
    let prepared = prepare(&args.tasks, data, &source)?;
    if let Some(path) = &args.dump_requests {
        dump(&prepared, path)?;
        return Ok(ExitCode::SUCCESS);
    }
    let journal = args.output.as_ref().map(|dir| {
        journal(&model_dir(dir, &args.model.model), &source, &args.tasks, prepared.max_length, args.resume)
    });
    let journal = journal.transpose()?;
    let model = system::load_for_decoding(&source)?;
    let results = score(&model, &prepared, journal, args.json)?;
    write!(std::io::stdout(), "{}", describe(&results))?;
    Ok(ExitCode::SUCCESS)
}
