//! Results in lm-evaluation-harness' files: `results_*.json` and `samples_*.jsonl` (lm_eval/loggers/evaluation_tracker.py, 0.4.13), so that
//! whatever reads those reads ours. What lm-eval has no place for is under the key `specquant`.

use std::fs::{self, TryLockError};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::evaluate::{TaskResult, averages};
use crate::perplexity::Perplexity;
use crate::requests::Bos;
use crate::stats::estimate;
use crate::tasks::{Metric, TASKS, TaskData};
use crate::{Error, Result};
use specquant_model::sha256;

/// What was evaluated, and how.
#[derive(Debug, Clone)]
pub struct RunInfo {
    /// File or directory name of the model.
    pub model: String,
    /// Of [`specquant_model::Source::fingerprint`].
    pub model_sha256: String,
    /// Scheme of a SpecQuant checkpoint.
    pub scheme: Option<String>,
    /// Stored bits per weight of a checkpoint's linear layers.
    pub bits_per_weight: Option<f64>,
    /// Bytes of the model's tensors.
    pub tensor_bytes: u64,
    /// BOS policy.
    pub bos: Bos,
    /// Tokens that the model read at most.
    pub max_length: usize,
    /// Documents per task; 0 for all.
    pub limit: usize,
    /// Worker threads.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub kernels: &'static str,
    /// When the evaluation started.
    pub started: SystemTime,
    /// How long scoring took, without loading the model and reading the data.
    pub duration: Duration,
}

/// The results as lm-eval's `results_*.json` has them.
pub fn results_json(
    info: &RunInfo,
    data: &[TaskData],
    results: &[TaskResult],
    perplexity: Option<&Perplexity>,
) -> Value {
    let per_task = |value: &dyn Fn(&TaskData, &TaskResult) -> Value| -> Value {
        data.iter().zip(results).map(|(d, r)| (r.task.to_owned(), value(d, r))).collect::<Map<_, _>>().into()
    };
    let mut specquant = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model_sha256": info.model_sha256,
        "scheme": info.scheme,
        "bits_per_weight": info.bits_per_weight,
        "tensor_bytes": info.tensor_bytes,
        "kernels": info.kernels,
        "threads": info.threads,
        "bos": info.bos,
        "max_length": info.max_length,
    });
    if !results.is_empty() {
        let a = averages(results);
        let name = if results.len() == TASKS.len() { "avg9" } else { "average" };
        specquant["chance"] = per_task(&|_, r| json!(r.chance));
        specquant[format!("{name}_acc_norm_or_acc")] = json!(a.paper);
        specquant[format!("{name}_acc")] = json!(a.acc);
        specquant[format!("{name}_chance")] = json!(a.chance);
    }
    if let Some(perplexity) = perplexity {
        specquant["perplexity"] = json!(perplexity);
    }
    let seconds = info.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    json!({
        "results": per_task(&|_, r| metrics(r)),
        "group_subtasks": {},
        "configs": per_task(&|d, _| config(d)),
        "versions": per_task(&|d, _| json!(d.task.version)),
        "n-shot": per_task(&|_, _| json!(0)),
        "higher_is_better": per_task(&|_, r| {
            names(r).into_iter().map(|n| (n.to_owned(), json!(n != "perplexity"))).collect::<Map<_, _>>().into()
        }),
        "n-samples": per_task(&|d, r| json!({ "original": d.available, "effective": r.acc.len() })),
        "config": {
            "model": "specquant",
            "model_args": format!("pretrained={},dtype={}", info.model, info.scheme.as_deref().unwrap_or("float32")),
            "batch_size": "auto",
            "batch_sizes": [],
            "device": "cpu",
            "use_cache": null,
            "limit": (info.limit > 0).then_some(info.limit),
            "bootstrap_iters": 0,
            "gen_kwargs": null,
        },
        "git_hash": null,
        "date": seconds,
        "pretty_env_info": format!("specquant {}, {} kernels, {} threads", env!("CARGO_PKG_VERSION"), info.kernels, info.threads),
        "transformers_version": null,
        "task_hashes": per_task(&|d, _| json!(task_hash(d))),
        "model_source": "specquant",
        "model_name": info.model,
        "model_name_sanitized": sanitized(&info.model),
        "system_instruction": null,
        "system_instruction_sha": null,
        "fewshot_as_multiturn": false,
        "chat_template": null,
        "chat_template_sha": null,
        "total_evaluation_time_seconds": info.duration.as_secs_f64().to_string(),
        "specquant": specquant,
    })
}

/// Names of a task's metrics, in lm-eval's order.
fn names(r: &TaskResult) -> Vec<&'static str> {
    let mut names = vec!["acc"];
    if r.perplexity.is_some() {
        names.insert(0, "perplexity");
    }
    if r.acc_norm.is_some() {
        names.push("acc_norm");
    }
    names
}

fn metrics(r: &TaskResult) -> Value {
    let mut value = json!({ "name": r.task, "alias": r.task, "sample_len": r.acc.len() });
    for name in names(r) {
        let e = match name {
            "perplexity" => r.perplexity.unwrap_or_else(|| estimate([].into_iter())),
            "acc_norm" => estimate(r.paper().iter().copied()),
            _ => estimate(r.acc.iter().copied()),
        };
        value[format!("{name},none")] = json!(e.mean);
        // lm-eval has no error of a single item.
        value[format!("{name}_stderr,none")] = if r.acc.len() > 1 { json!(e.stderr) } else { json!("N/A") };
    }
    value
}

fn config(d: &TaskData) -> Value {
    let file = d.path.file_name().map(|n| n.to_string_lossy().into_owned());
    json!({
        "task": d.task.name,
        "dataset_path": d.task.dataset.path,
        "dataset_name": d.task.dataset.config,
        "test_split": d.task.dataset.split,
        "num_fewshot": 0,
        "output_type": match d.task.metric {
            Metric::Choice { .. } => "multiple_choice",
            Metric::Greedy => "loglikelihood",
        },
        "target_delimiter": " ",
        "metadata": { "version": d.task.version, "data_file": file, "data_sha256": d.sha256 },
    })
}

/// The hashes of a sample: of its row, of its first prompt, and of its answer (lm_eval/evaluator.py).
fn hashes(d: &TaskData, i: usize) -> [String; 3] {
    let document = &d.documents[i];
    let prompt = document.requests.first().map_or("", |r| r.context.as_str());
    let row = serde_json::to_string_pretty(&d.rows[i]).unwrap_or_default();
    [&row, prompt, &document.target].map(|text| sha256(text.as_bytes()))
}

fn task_hash(d: &TaskData) -> String {
    let all: String = (0..d.documents.len()).flat_map(|i| hashes(d, i)).collect();
    sha256(all.as_bytes())
}

/// One line of `samples_*.jsonl`.
fn sample(d: &TaskData, r: &TaskResult, i: usize) -> Value {
    let document = &d.documents[i];
    let arguments = document.requests.iter().enumerate();
    let arguments = arguments
        .map(|(j, q)| (format!("gen_args_{j}"), json!({ "arg_0": q.context, "arg_1": q.continuation })));
    let truth = |b: bool| if b { "True" } else { "False" };
    let responses: Vec<_> =
        r.scores[i].iter().map(|s| [s.loglik.to_string(), truth(s.greedy).to_owned()]).collect();
    let [doc_hash, prompt_hash, target_hash] = hashes(d, i);
    let mut value = json!({
        "doc_id": i,
        "doc": d.rows[i],
        "target": document.target,
        "arguments": arguments.collect::<Map<_, _>>(),
        "resps": responses.iter().map(|r| [r]).collect::<Vec<_>>(),
        "filtered_resps": responses,
        "filter": "none",
        "metrics": names(r),
        "doc_hash": doc_hash,
        "prompt_hash": prompt_hash,
        "target_hash": target_hash,
    });
    if r.perplexity.is_some() {
        value["perplexity"] = json!(r.scores[i].iter().map(|s| s.loglik).sum::<f64>());
    }
    value["acc"] = json!(r.acc[i]);
    if let Some(acc_norm) = &r.acc_norm {
        value["acc_norm"] = json!(acc_norm[i]);
    }
    value
}

/// Writes `results_TIME.json` and, per task, `samples_TASK_TIME.jsonl` into `dir`; returns the former's path.
///
/// # Errors
/// [`Error::Io`]; then no file of a final name is incomplete.
pub fn write_results(
    dir: &Path,
    results_json: &Value,
    data: &[TaskData],
    results: &[TaskResult],
    started: SystemTime,
) -> Result<PathBuf> {
    let time = timestamp(started);
    for (d, r) in data.iter().zip(results) {
        write_whole(&dir.join(format!("samples_{}_{time}.jsonl", r.task)), |file| {
            (0..r.acc.len()).try_for_each(|i| writeln!(file, "{}", sample(d, r, i)))
        })?;
    }
    let path = dir.join(format!("results_{time}.json"));
    write_whole(&path, |file| writeln!(file, "{results_json:#}"))?;
    Ok(path)
}

/// Makes `dir` the directory of a report, or finds that it is one: the file `mark` tells. kind: of report, for messages. No other run can claim it
/// until the file that is returned is closed.
///
/// # Errors
/// [`Error::Setting`] when it is such a directory already and `resume` is false, or anything else that is not empty, or another run's; [`Error::Io`].
pub fn claim_directory(dir: &Path, mark: &str, kind: &str, resume: bool) -> Result<fs::File> {
    let refuse = |why: String| Err(Error::Setting(format!("{} {why}", dir.display())));
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let mark = dir.join(mark);
    let ours = mark.exists();
    if ours && !resume {
        return refuse(format!(
            "exists: an earlier {kind} wrote it; continue that with --resume, or choose another -o"
        ));
    }
    if !ours && fs::read_dir(dir).map_err(Error::io(dir))?.next().is_some() {
        return refuse(format!(
            "is not empty and no {kind}'s; choose another -o, so that nothing of yours is overwritten"
        ));
    }
    let file = fs::File::create(&mark).map_err(Error::io(&mark))?;
    // A file system without locks is no reason to refuse.
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        return refuse("is being written by another run; wait for it, or choose another -o".to_owned());
    }
    Ok(file)
}

/// Writes a file under a temporary name beside it, flushes it to the disk, and gives it its name. A symbolic link keeps pointing to it; what is
/// no file, such as a pipe or /dev/stdout, is written to directly.
///
/// # Errors
/// [`Error::Io`].
pub fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<fs::File>) -> std::io::Result<()>,
) -> Result<()> {
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if path.metadata().is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        let mut file =
            BufWriter::new(fs::OpenOptions::new().write(true).open(path).map_err(Error::io(path))?);
        return write(&mut file).and_then(|()| file.flush()).map_err(Error::io(path));
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let finish = || -> std::io::Result<()> {
        let mut file = BufWriter::new(fs::File::create(&partial)?);
        write(&mut file)?;
        file.into_inner()?.sync_all()?;
        fs::rename(&partial, path)
    };
    finish().map_err(|cause| {
        let _ = fs::remove_file(&partial);
        Error::Io { path: path.to_owned(), cause }
    })
}

/// A model's name as a directory's (lm-eval `sanitize_model_name`); never "." or "..".
pub fn sanitized(model: &str) -> String {
    let mut name = String::new();
    for c in model.chars() {
        match "\"<>:/|\\?*[]".contains(c) {
            false => name.push(c),
            true if name.ends_with("__") => {}
            true => name.push_str("__"),
        }
    }
    if name.trim_matches('.').is_empty() { "__".to_owned() } else { name }
}

/// `2026-11-24T11-34-04.926798`, in UTC.
fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86400, since.as_secs() % 86400);
    // Days to a date of the Gregorian calendar, years counted from March (Howard Hinnant, "chrono-compatible date algorithms").
    let shifted = days + 719_468;
    let era_day = shifted % 146_097;
    let era_year = (era_day - era_day / 1460 + era_day / 36_524 - era_day / 146_096) / 365;
    let year_day = era_day - (365 * era_year + era_year / 4 - era_year / 100);
    let month = (5 * year_day + 2) / 153;
    let day = year_day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = shifted / 146_097 * 400 + era_year + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}-{minute:02}-{second:02}.{:06}", since.subsec_micros())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::Score;
    use crate::tasks::Task;

    #[test]
    fn times_and_names() {
        for (seconds, want) in [
            (0, "1970-01-01T00-00-00.000000"),
            (951_782_400, "2000-02-29T00-00-00.000000"),
            (1_795_520_044, "2026-11-24T11-34-04.000000"),
            (4_107_542_399, "2100-02-28T23-59-59.000000"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), want);
        }
        assert_eq!(sanitized("org/model:4[x]"), "org__model__4__x__");
        assert_eq!((sanitized(".."), sanitized(".hidden")), ("__".to_owned(), ".hidden".to_owned()));
    }

    /// The hashes and the sample's fields that lm-eval 0.4.13 wrote for this row.
    #[test]
    fn samples_are_those_of_lm_eval() {
        let dir = tempfile::tempdir().unwrap();
        let row = r#"{"id":"Mercury_417466","question":"Which statement best explains why photosynthesis is the foundation of most food webs?","choices":{"text":["Sunlight is the source of energy for nearly all ecosystems.","Most ecosystems are found on land instead of in water.","Carbon dioxide is more available than other gases.","The producers in all ecosystems are plants."],"label":["A","B","C","D"]},"answerKey":"A"}"#;
        fs::write(dir.path().join("arc_easy.jsonl"), row).unwrap();
        let data = TaskData::read(Task::named("arc_easy").unwrap(), dir.path(), 0).unwrap();
        let scores = [-0.1, -0.5, -0.7, -0.55].map(|loglik| Score { loglik, greedy: false }).to_vec();
        let result = TaskResult::new(&data, vec![scores]);
        let sample = sample(&data, &result, 0);
        for (key, want) in [
            ("doc_hash", json!("b91fe1a8fdc40a80b9364f6256ac729d010ba076b02e75a362c2cf7ad3303bdf")),
            ("prompt_hash", json!("f804da9f5e214341d08d56228bb255177a0e5740f82e61b45887fcb5dc5c08ce")),
            ("target_hash", json!("5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9")),
            ("target", json!("0")),
            ("metrics", json!(["acc", "acc_norm"])),
            ("acc", json!(1.0)),
            ("acc_norm", json!(1.0)),
        ] {
            assert_eq!(sample[key], want, "{key}");
        }
        assert_eq!(sample["resps"][3], json!([["-0.55", "False"]]));
        assert_eq!(sample["filtered_resps"][3], json!(["-0.55", "False"]));
        assert_eq!(
            sample["arguments"]["gen_args_3"]["arg_1"],
            " The producers in all ecosystems are plants."
        );
    }
}
