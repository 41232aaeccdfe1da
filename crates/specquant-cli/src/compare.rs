//! `specquant compare`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context;
use serde_json::{Value, json};
use specquant_eval::{
    Comparison, Journal, Perplexity, Record, Reference, TaskData, claim_directory, plot_file, results_json,
    sanitized, write_results, write_whole,
};
use specquant_kernels::Isa;
use specquant_model::{FORMAT_VERSION, Model, Source, sha256};
use specquant_quantize as q;

use crate::args::{CompareArgs, Overrides};
use crate::eval::Prose;
use crate::resources::{check_disk_of_all, check_resources};
use crate::tasks::{self, Queries, run_info};
use crate::ui::{self, Wrong, note, table};
use crate::{eval, quantize, system};

/// Tells a directory that a comparison writes to from any other.
const MARK: &str = ".specquant-comparison";
/// Quantized models go here.
const CHECKPOINTS: &str = "checkpoints";

/// A model to be compared, with everything that can be known to be wrong known to be right.
struct Entry {
    name: String,
    path: PathBuf,
    source: Source,
    sha256: String,
    dir: PathBuf,
    text: Option<TextJob>,
    tasks: Option<TaskJob>,
}

/// A text in the model's tokens.
struct TextJob {
    prose: Prose,
    /// What the result depends on.
    identity: Value,
    /// A result that an earlier run has measured.
    stored: Option<Perplexity>,
}

/// The tasks in the model's tokens.
struct TaskJob {
    queries: Queries,
    journal: Journal,
}

/// Names for results: those of files, with as much of the path before them as makes them unique, also as directories.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for path in paths {
        let full = path.canonicalize().unwrap_or_else(|_| path.clone());
        let last = tasks::model_name(path);
        let longer =
            full.parent().and_then(Path::file_name).map(|p| format!("{}/{last}", p.to_string_lossy()));
        let candidates = [Some(last.clone()), longer].into_iter().flatten();
        let numbered = (2..).map(|n| format!("{last} ({n})"));
        let free = |name: &String| {
            let dir = sanitized(name);
            dir != CHECKPOINTS && names.iter().all(|n| sanitized(n) != dir)
        };
        names.extend(candidates.chain(numbered).find(free));
    }
    names
}

/// A recipe that the first model is quantized by.
struct Quantization {
    recipe: q::Recipe,
    /// None where an earlier run has done it.
    plan: Option<q::Plan>,
    /// The calibration sequences of the recipe's file, if it has one; none where an earlier run has done it.
    texts: Option<Vec<Vec<u32>>>,
    checkpoint: PathBuf,
    /// What the checkpoint depends on, and where that is noted.
    identity: Value,
    record: PathBuf,
}

impl Quantization {
    /// Looks at all that can be known before it is done.
    fn new(
        args: &CompareArgs,
        recipe: q::Recipe,
        source: &Source,
        source_sha256: &str,
        wrong: &mut Wrong,
    ) -> Quantization {
        let (dir, name) = (args.output.join(CHECKPOINTS), sanitized(&recipe.name));
        let (checkpoint, record) = (dir.join(&name), dir.join(format!("{name}.json")));
        let (mut plan, mut texts) = (None, None);
        if !checkpoint.exists() {
            plan = wrong.of(check_resources(source, &recipe, &checkpoint, args.ignore_memory, false));
            texts = wrong.of(quantize::prepare(source, &recipe)).flatten();
        }
        let calibration = recipe
            .calibration
            .file
            .as_ref()
            .map(|file| q::calibration::read(file).map(|text| sha256(text.as_bytes())));
        let calibration = wrong.of(calibration.transpose()).flatten();
        // The calibration text is what it says, wherever it lies; threads change nothing.
        let mut settings = recipe.clone();
        settings.calibration.file = None;
        settings.threads = None;
        let identity = json!({ "specquant_version": env!("CARGO_PKG_VERSION"), "format_version": FORMAT_VERSION, "source_sha256": source_sha256, "calibration_sha256": calibration, "recipe": settings });
        Quantization { recipe, plan, texts, checkpoint, identity, record }
    }

    /// Whether what an earlier run has made of it, whole or in part, is what this one would.
    fn is_continued(&self) -> anyhow::Result<()> {
        let Quantization { checkpoint, identity, record, .. } = self;
        let partial = q::Destination::new(checkpoint).partial()?;
        if let Some(begun) = [checkpoint, &partial].into_iter().find(|path| path.exists()) {
            let made = fs::read(record).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
            let Some(made) = made else {
                anyhow::bail!(
                    "{} is there without a readable {}; remove it, or choose another -o",
                    begun.display(),
                    record.display()
                );
            };
            let differing = q::differing_fields(&made, identity);
            anyhow::ensure!(
                differing.is_empty(),
                "{} is of a run that differs in {}; remove it, or choose another -o",
                begun.display(),
                differing.join(", ")
            );
        }
        Ok(())
    }

    /// Quantizes the model, except where an earlier run has done so.
    fn run(&self, args: &CompareArgs, source: &Source) -> anyhow::Result<()> {
        let Quantization { recipe, plan, texts, checkpoint, identity, record } = self;
        if checkpoint.exists() {
            return Ok(());
        }
        if !args.json {
            note!("quantizing by {} {}", recipe.name, recipe.scheme);
            if let Some(texts) = texts {
                quantize::tell(q::short_text(recipe, texts).as_slice());
            }
        }
        let dir = args.output.join(CHECKPOINTS);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        // Before the checkpoint, which then is never there without it.
        write_whole(record, |file| writeln!(file, "{identity:#}"))?;
        let destination = q::Destination {
            unfinished: q::Unfinished::Resume,
            spill: plan.as_ref().is_some_and(|plan| plan.spill),
            ..q::Destination::new(checkpoint)
        };
        q::check_output(&destination)?;
        quantize::run_told(source, recipe, texts.as_deref(), &destination, args.json).map(drop)
    }
}

/// Reads what an earlier run has measured under the same conditions.
fn stored(path: &Path, identity: &Value) -> anyhow::Result<Option<Perplexity>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| path.display().to_string()),
    };
    let damaged = || format!("{} is damaged; remove it", path.display());
    let value: Value = serde_json::from_slice(&bytes).with_context(damaged)?;
    let differing = q::differing_fields(&value["identity"], identity);
    anyhow::ensure!(
        differing.is_empty(),
        "{} belongs to a run that differs in {}; choose another -o, or remove it",
        path.display(),
        differing.join(", ")
    );
    Ok(Some(serde_json::from_value(value["perplexity"].clone()).with_context(damaged)?))
}

/// Opens a model and prepares its jobs. `first`: the reference, if this is another model.
fn prepare(
    args: &CompareArgs,
    (name, path): (String, PathBuf),
    text: Option<&str>,
    data: &[TaskData],
    first: Option<&Entry>,
) -> anyhow::Result<Entry> {
    let source = Source::open(&path)?;
    let sha256 = source.fingerprint()?;
    let dir = args.output.join(sanitized(&name));
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let text = text.map(|text| -> anyhow::Result<TextJob> {
        let prose = eval::encode(text, &args.text, args.tasks.bos, &source)?;
        if let Some(Entry { source: theirs, text: Some(job), name, .. }) = first {
            let same = source.config().vocab_size == theirs.config().vocab_size && prose == job.prose;
            anyhow::ensure!(
                same,
                "its tokenizer or vocabulary is not that of {name}, so their predictions cannot be compared on a text; leave out --text, or compare \
                 models of one family"
            );
        }
        let bytes: Vec<u8> = prose.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let identity = json!({
            "specquant_version": env!("CARGO_PKG_VERSION"),
            "model_sha256": sha256,
            "reference_sha256": first.map_or(&sha256, |f| &f.sha256),
            "token_ids_sha256": specquant_model::sha256(&bytes),
            "settings": prose.protocol,
        });
        let stored = stored(&dir.join("perplexity.json"), &identity)?;
        Ok(TextJob { prose, identity, stored })
    });
    let text = text.transpose()?;
    let tasks = (!data.is_empty()).then(|| -> anyhow::Result<TaskJob> {
        let queries = tasks::encode_all(&args.tasks, data, &source)?;
        let mut journal = tasks::journal(&dir, &sha256, &args.tasks, queries.max_length, true)?;
        data.iter().try_for_each(|d| journal.begin(d))?;
        Ok(TaskJob { queries, journal })
    });
    let tasks = tasks.transpose()?;
    Ok(Entry { name, path, source, sha256, dir, text, tasks })
}

/// Measures the perplexities that no earlier run has, and the distances to the first model.
fn perplexities(args: &CompareArgs, entries: &[Entry]) -> anyhow::Result<Vec<Option<Perplexity>>> {
    let missing = |e: &Entry| e.text.as_ref().is_some_and(|job| job.stored.is_none());
    let Some(first) = entries.first() else { return Ok(Vec::new()) };
    // The first model's hidden states are needed by the others only.
    let reference = match &first.text {
        Some(job) if entries[1..].iter().any(missing) => {
            Some(eval::reference(&first.source, &job.prose, &args.text, args.json)?)
        }
        _ => None,
    };
    let mut results = Vec::new();
    for (i, entry) in entries.iter().enumerate() {
        let Some(job) = &entry.text else {
            results.push(None);
            continue;
        };
        let measured = match (&job.stored, &reference) {
            (Some(stored), _) => {
                results.push(Some(stored.clone()));
                continue;
            }
            (None, Some(reference)) if i == 0 => reference.perplexity.clone(),
            (None, reference) => {
                if !args.json {
                    note!("perplexity of {}", entry.name);
                }
                let reference: Option<&Reference> = reference.as_ref().filter(|_| i > 0);
                eval::measure(&entry.source, &job.prose, &args.text, reference, args.json)
                    .with_context(|| entry.name.clone())?
            }
        };
        let value = json!({ "identity": job.identity, "perplexity": measured });
        write_whole(&entry.dir.join("perplexity.json"), |file| writeln!(file, "{value:#}"))?;
        results.push(Some(measured));
    }
    Ok(results)
}

fn facts(args: &CompareArgs, data: &[TaskData], first: Option<&Perplexity>) -> Vec<(String, String)> {
    let mut facts = Vec::new();
    if let (Some(path), Some(p)) = (&args.text.text, first) {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        facts.push(("text".to_owned(), file));
        facts.push(("protocol".to_owned(), p.protocol.clone()));
    }
    if !data.is_empty() {
        let documents: usize = data.iter().map(|d| d.documents.len()).sum();
        let available: usize = data.iter().map(|d| d.available).sum();
        facts.push((
            "tasks".to_owned(),
            format!(
                "{documents} of {available} documents of {} tasks, zero-shot, prompts and scores of lm-evaluation-harness 0.4",
                data.len()
            ),
        ));
    }
    let version = env!("CARGO_PKG_VERSION");
    facts.push(("engine".to_owned(), format!("specquant {version}, {} kernels", Isa::active().name())));
    facts.push(("command".to_owned(), ui::command()));
    facts
}

/// Refuses what would have no effect or would be done twice.
fn check(args: &CompareArgs) -> anyhow::Result<()> {
    anyhow::ensure!(
        args.text.text.is_some() || args.tasks.data.is_some(),
        "nothing to compare by: give a text with --text FILE, tasks with --data DIR, or both"
    );
    let threads = args.overrides.threads;
    anyhow::ensure!(
        !args.recipes.is_empty() || args.overrides == Overrides { threads, ..Overrides::default() },
        "the flags of a recipe have no effect without --recipes"
    );
    let full: Vec<_> = args.models.iter().map(|m| m.canonicalize().unwrap_or_else(|_| m.clone())).collect();
    if let Some(i) = (0..full.len()).find(|&i| full[..i].contains(&full[i])) {
        anyhow::bail!("{} is given twice", args.models[i].display());
    }
    Ok(())
}

/// What is compared: texts, tasks, the model that is quantized, and how.
struct Job {
    data: Vec<TaskData>,
    text: Option<String>,
    first: Source,
    quantizations: Vec<Quantization>,
}

impl Job {
    /// Reads all that is there before the first hour of work, and tells all that is wrong with it.
    fn read(args: &CompareArgs) -> anyhow::Result<Job> {
        let mut wrong = Wrong::default();
        let data = args.tasks.data.as_ref().and_then(|_| wrong.of(tasks::read(&args.tasks)));
        let text = args.text.text.as_ref().and_then(|_| wrong.of(eval::read(&args.text)));
        let mut sources = args.models.iter().map(|model| wrong.of(Source::open(model)));
        let first = sources.next().flatten();
        sources.for_each(drop);
        let sha256 = first.as_ref().and_then(|source| wrong.of(source.fingerprint()));
        let (mut names, mut quantizations) = (Vec::new(), Vec::new());
        for name in &args.recipes {
            let Some(recipe) = wrong.of(quantize::recipe(name, &args.overrides)) else { continue };
            let name = sanitized(&recipe.name);
            if names.contains(&name) {
                let why = "give each a name of its own";
                wrong.say(format!("--recipes: two of them are called {:?}; {why}", recipe.name));
            }
            names.push(name);
            if let (Some(source), Some(sha256)) = (&first, &sha256) {
                quantizations.push(Quantization::new(args, recipe, source, sha256, &mut wrong));
            }
        }
        let planned =
            quantizations.iter().filter_map(|q: &Quantization| Some((q.plan.as_ref()?, &*q.checkpoint)));
        wrong.of(check_disk_of_all(
            &planned.collect::<Vec<_>>(),
            &args.output,
            system::free_disk(&args.output),
        ));
        match first {
            Some(first) if wrong.is_nothing() => {
                Ok(Job { data: data.unwrap_or_default(), text, first, quantizations })
            }
            _ => Err(wrong.into_error()),
        }
    }
}

pub fn run(args: CompareArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.overrides.threads)?;
    check(&args)?;
    let Job { data, text, first, quantizations } = Job::read(&args)?;
    let _claim = claim_directory(&args.output, MARK, "comparison", args.resume)?;
    let mut wrong = Wrong::default();
    for quantization in &quantizations {
        wrong.of(quantization.is_continued());
    }
    anyhow::ensure!(wrong.is_nothing(), wrong.into_error());
    let mut paths = args.models.clone();
    paths.extend(quantizations.iter().map(|q| q.checkpoint.clone()));
    let mut entries: Vec<Entry> = Vec::new();
    for (i, (name, path)) in names(&paths).into_iter().zip(paths).enumerate() {
        // After the models that are given were looked at.
        if i == args.models.len() {
            quantizations.iter().try_for_each(|q| q.run(&args, &first))?;
        }
        let model = name.clone();
        let entry = prepare(&args, (name, path), text.as_deref(), &data, entries.first()).context(model)?;
        entries.push(entry);
    }

    let perplexities = perplexities(&args, &entries)?;
    let mut records = Vec::new();
    for (entry, perplexity) in entries.into_iter().zip(perplexities) {
        let (mut results, mut started, mut max_length) = (Vec::new(), SystemTime::now(), 0);
        if let Some(TaskJob { queries, mut journal }) = entry.tasks {
            if !args.json {
                note!("tasks of {}", entry.name);
            }
            max_length = queries.max_length;
            let model = Model::load_for_decoding(&entry.source)?;
            started = SystemTime::now();
            results = tasks::score(&model, &data, &queries, Some(&mut journal), args.json)
                .with_context(|| entry.name.clone())?;
        }
        let duration = started.elapsed().unwrap_or_default();
        let mut info =
            run_info(&entry.path, &entry.source, entry.sha256, &args.tasks, max_length, started, duration)?;
        info.model.clone_from(&entry.name);
        let json = results_json(&info, &data, &results, perplexity.as_ref());
        write_results(&entry.dir, &json, &data, &results, started)?;
        records.push(Record { name: entry.name, info, perplexity, tasks: results });
    }

    let first = records.first().and_then(|r| r.perplexity.as_ref());
    let facts = facts(&args, &data, first);
    let comparison = Comparison { records, facts };
    let json = comparison.json();
    let html = comparison.html()?;
    write_whole(&args.output.join("comparison.json"), |file| writeln!(file, "{json:#}"))?;
    write_whole(&args.output.join("README.md"), |file| write!(file, "{}", comparison.markdown()))?;
    for (title, svg) in comparison.plots() {
        write_whole(&args.output.join(plot_file(title)), |file| write!(file, "{svg}"))?;
    }
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
