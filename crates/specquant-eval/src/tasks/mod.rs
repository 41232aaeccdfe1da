//! Zero-shot tasks: documents in Hugging Face's fields, turned into requests with the prompts of lm-evaluation-harness 0.4.
//!
//! A request is a context and a continuation; a model scores it by the log-likelihood of the continuation after the context. A
//! multiple-choice document has a request per choice, and the model's answer is the choice of the highest score (`acc`), or of the
//! highest score per character (`acc_norm`).
//!
//! # Adding a task
//!
//! 1. A file here, named as lm-eval names the task: a [`Task`] with its data set, split and metrics, and a `parse` function that takes
//!    one row's [`Fields`] to a [`Document`], in lm-eval's exact words (its yaml file says them; cite it).
//! 2. A line in [`TASKS`].
//! 3. The test at the bottom of the file: a row written out by hand and the strings it must give; a missing field.
//! 4. Golden scores of the first 100 documents, made with lm-eval, which the golden test then finds by the task's name.
//! 5. Its row in the table of docs/evaluation.md, and `scripts/lm_eval_check.py`, which compares every string with lm-eval's own.

mod arc_challenge;
mod arc_easy;
mod boolq;
mod data;
mod hellaswag;
#[cfg(feature = "hub")]
mod hub;
mod lambada_openai;
mod openbookqa;
mod piqa;
pub(crate) mod python;
mod social_iqa;
mod winogrande;

pub use data::*;
#[cfg(feature = "hub")]
pub use hub::Hub;

use crate::{Error, Result};

/// Every task, in the order of the papers' tables.
pub const TASKS: [&Task; 9] = [
    &boolq::TASK,
    &hellaswag::TASK,
    &lambada_openai::TASK,
    &openbookqa::TASK,
    &piqa::TASK,
    &social_iqa::TASK,
    &winogrande::TASK,
    &arc_easy::TASK,
    &arc_challenge::TASK,
];

/// A zero-shot task.
#[derive(Debug)]
pub struct Task {
    /// lm-eval's name.
    pub name: &'static str,
    /// lm-eval's `metadata.version` of the definition that this one equals.
    pub version: f64,
    /// The data file is `FILE.jsonl`: the data set's name on the Hugging Face hub.
    pub file: &'static str,
    /// Where the data set is on the hub.
    pub dataset: Dataset,
    /// How documents are scored.
    pub metric: Metric,
    /// One row of data to a document; an error is a sentence about the row.
    pub parse: fn(&Fields) -> Result<Document, String>,
}

/// A split of a data set on the Hugging Face hub.
#[derive(Debug)]
pub struct Dataset {
    /// Repository.
    pub path: &'static str,
    /// Configuration ("default" if the data set has one only).
    pub config: &'static str,
    /// Split that is evaluated.
    pub split: &'static str,
}

/// What is computed of a document's scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// The best choice; `acc`, and `acc_norm` if lm-eval reports it for this task.
    Choice {
        /// Whether `acc_norm` is reported.
        norm: bool,
    },
    /// Whether greedy decoding writes the continuation (`acc`), and `perplexity` per continuation.
    Greedy,
}

/// A context and what may follow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The prompt.
    pub context: String,
    /// Scored after the context.
    pub continuation: String,
}

/// One row of data as requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// One per choice; a single one for [`Metric::Greedy`].
    pub requests: Vec<Request>,
    /// The number of the right choice.
    pub gold: usize,
    /// Length of every choice in characters, by which `acc_norm` divides. Not always the continuation's (WinoGrande).
    pub lengths: Vec<usize>,
    /// The right answer as lm-eval's samples have it: the number of the choice, or the text to be continued with.
    pub target: String,
}

impl Document {
    /// A context and its choices, each after a space (lm-eval's `target_delimiter`).
    pub(crate) fn choices(context: &str, choices: &[&str], gold: usize) -> Result<Document, String> {
        if gold >= choices.len() {
            return Err(format!("the answer is choice {} of {}", gold.saturating_add(1), choices.len()));
        }
        Ok(Document {
            requests: choices
                .iter()
                .map(|c| Request { context: context.to_owned(), continuation: format!(" {c}") })
                .collect(),
            gold,
            lengths: choices.iter().map(|c| c.chars().count()).collect(),
            target: gold.to_string(),
        })
    }
}

impl Task {
    /// The task of that name.
    ///
    /// # Errors
    /// [`Error::Setting`] lists the names.
    pub fn named(name: &str) -> Result<&'static Task> {
        TASKS.into_iter().find(|t| t.name == name).ok_or_else(|| {
            let names: Vec<_> = TASKS.iter().map(|t| t.name).collect();
            Error::Setting(format!("there is no task {name:?}; tasks: {}", names.join(", ")))
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::{Map, Value};

    /// Parses one row.
    pub fn parse(task: &Task, row: Value) -> Result<Document, String> {
        let Value::Object(row) = row else { panic!("{row} is not an object") };
        (task.parse)(&Fields(&row))
    }

    /// The strings of a row: contexts, continuations, and the right one.
    pub fn strings(task: &Task, row: Value) -> (Vec<String>, Vec<String>, usize) {
        let document = parse(task, row).unwrap();
        let (contexts, continuations) =
            document.requests.into_iter().map(|r| (r.context, r.continuation)).unzip();
        (contexts, continuations, document.gold)
    }

    #[test]
    fn names_are_unique_and_an_empty_row_is_an_error_that_names_a_field() {
        for (i, task) in TASKS.iter().enumerate() {
            assert!(TASKS[..i].iter().all(|t| t.name != task.name && t.file != task.file));
            assert_eq!(Task::named(task.name).unwrap().file, task.file);
            let problem = (task.parse)(&Fields(&Map::new())).unwrap_err();
            assert!(problem.contains("missing"), "{}: {problem}", task.name);
        }
        let message = Task::named("mmlu").unwrap_err().to_string();
        assert!(message.contains("boolq, hellaswag"), "{message}");
    }
}
