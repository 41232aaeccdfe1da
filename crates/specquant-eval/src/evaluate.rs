//! A model's results on tasks.

use rayon::prelude::*;
use serde::Serialize;
use specquant_model::Model;

use crate::journal::Journal;
use crate::requests::{Encoder, Query};
use crate::score::{Score, batches, score, tokens};
use crate::stats::{Estimate, average, estimate};
use crate::tasks::{Metric, TaskData};
use crate::{Error, Result};

/// What a model did with the documents of a task.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskResult {
    /// lm-eval's name.
    pub task: &'static str,
    /// Scores of every document's requests.
    pub scores: Vec<Vec<Score>>,
    /// 1 for every document where the best choice, or the greedy continuation, is right.
    pub acc: Vec<f64>,
    /// The same for the best choice per character, where lm-eval reports it.
    pub acc_norm: Option<Vec<f64>>,
    /// exp of the mean negative log-likelihood of a continuation, with its standard error (delta method), for [`Metric::Greedy`].
    pub perplexity: Option<Estimate>,
    /// Accuracy of guessing.
    pub chance: f64,
}

impl TaskResult {
    /// The metrics of these scores.
    pub fn new(data: &TaskData, scores: Vec<Vec<Score>>) -> Self {
        let right = |d: usize, value: &dyn Fn(usize, &Score) -> f64| {
            f64::from(best(scores[d].iter().enumerate().map(|(i, s)| value(i, s))) == data.documents[d].gold)
        };
        let documents = 0..scores.len();
        let (mut acc_norm, mut perplexity) = (None, None);
        let acc = match data.task.metric {
            Metric::Choice { norm } => {
                // Division by zero gives -∞, as in numpy: an empty choice is never the best.
                let per_character =
                    |d: usize| right(d, &|i, s| s.loglik / data.documents[d].lengths[i] as f64);
                acc_norm = norm.then(|| documents.clone().map(per_character).collect());
                documents.map(|d| right(d, &|_, s| s.loglik)).collect()
            }
            Metric::Greedy => {
                let nll = estimate(scores.iter().flatten().map(|s| -s.loglik));
                let mean = nll.mean.exp();
                perplexity = Some(Estimate { mean, stderr: mean * nll.stderr });
                scores.iter().map(|s| f64::from(s.iter().all(|s| s.greedy))).collect()
            }
        };
        TaskResult { task: data.task.name, scores, acc, acc_norm, perplexity, chance: data.chance() }
    }

    /// Per document, the metric that the papers average: `acc_norm` where lm-eval reports it, else `acc` (QuaRot's main.py).
    pub fn paper(&self) -> &[f64] {
        self.acc_norm.as_ref().unwrap_or(&self.acc)
    }
}

/// The number of the largest value, the first of equals (numpy's argmax).
fn best(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (i, value) in values.enumerate() {
        if i == 0 || value > best.1 {
            best = (i, value);
        }
    }
    best.0
}

/// The two averages over tasks in use.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Averages {
    /// Mean over tasks of acc_norm where lm-eval reports it, else acc: "Avg9" for all nine tasks.
    pub paper: Estimate,
    /// Mean over tasks of acc.
    pub acc: Estimate,
    /// Mean over tasks of the accuracy of guessing.
    pub chance: f64,
}

/// Averages of some results.
pub fn averages(results: &[TaskResult]) -> Averages {
    let mean = |x: &[f64]| estimate(x.iter().copied());
    Averages {
        paper: average(results.iter().map(|r| mean(r.paper()))),
        acc: average(results.iter().map(|r| mean(&r.acc))),
        chance: results.iter().map(|r| r.chance).sum::<f64>() / results.len() as f64,
    }
}

/// A task's documents as token ids.
///
/// # Errors
/// [`Error::Data`] with the line of a document that cannot be scored.
pub fn encode(data: &TaskData, encoder: &Encoder) -> Result<Vec<Vec<Query>>> {
    let document = |d: usize| -> Result<Vec<Query>> {
        let requests = data.documents[d].requests.iter().enumerate();
        let query = |(i, request)| {
            encoder.query(request).map_err(|problem| Error::Data {
                path: data.path.clone(),
                line: Some(data.lines[d]),
                problem: format!("choice {} {problem}", i + 1),
            })
        };
        requests.map(query).collect()
    };
    // Of several errors, the first.
    (0..data.documents.len()).into_par_iter().map(document).collect::<Vec<_>>().into_iter().collect()
}

/// Scores the documents of a task, or takes from the journal what it has.
///
/// progress: called after every batch with its tokens, and whether they were in the journal.
///
/// # Errors
/// As [`score`], and when the journal cannot be written.
pub fn evaluate(
    model: &Model,
    data: &TaskData,
    queries: &[Vec<Query>],
    mut journal: Option<&mut Journal>,
    progress: &mut dyn FnMut(usize, bool),
) -> Result<TaskResult> {
    let task = data.task.name;
    let mut scores: Vec<Vec<Score>> = vec![Vec::new(); queries.len()];
    if let Some(journal) = &mut journal {
        journal.begin(data)?;
    }
    for batch in batches(queries) {
        let known = |&d: &usize| journal.as_ref()?.get(task, d, queries[d].len()).cloned();
        let known = batch.iter().map(known).collect::<Option<Vec<_>>>();
        let was_known = known.is_some();
        let scored = match known {
            Some(known) => known,
            None => {
                let documents: Vec<&[Query]> = batch.iter().map(|&d| &queries[d][..]).collect();
                let scored = score(model, &documents).map_err(|e| match e {
                    Error::NotFinite { .. } => Error::NotFinite { place: format!("a document of {task}") },
                    e => e,
                })?;
                if let Some(journal) = &mut journal {
                    let lines: Vec<_> = batch.iter().copied().zip(scored.iter().cloned()).collect();
                    journal.add(task, &lines)?;
                }
                scored
            }
        };
        progress(batch.iter().map(|&d| tokens(&queries[d])).sum(), was_known);
        for (d, s) in batch.into_iter().zip(scored) {
            scores[d] = s;
        }
    }
    Ok(TaskResult::new(data, scores))
}
