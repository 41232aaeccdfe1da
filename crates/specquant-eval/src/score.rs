//! Log-likelihoods of continuations, with everything computed once that requests have in common.
//!
//! The requests of a document mostly share their context, and often the start of their continuations. Sorted by token ids they are a
//! walk through a prefix tree: from one request to the next, the cache is cut back to the common prefix and only the rest is
//! run. The documents of a batch walk side by side, so that every product still has hundreds of rows. There is no padding.

use specquant_model::{Model, Sequence, argmax};

use specquant_kernels::log_sum_exp;

use crate::requests::Query;
use crate::{Error, Result};

/// Tokens of a batch, over all steps of the walk. Batches follow from the documents and this number alone, so that an interrupted run that is
/// continued computes the same numbers.
const BATCH_TOKENS: usize = 2048;

/// What a continuation scored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Natural logarithm of the continuation's probability after the context.
    pub loglik: f64,
    /// Whether every token of it is the model's first choice.
    pub greedy: bool,
}

/// Length of the common prefix.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// A document's queries in the order in which they are walked.
struct Walk<'a> {
    queries: &'a [Query],
    /// Query numbers, sorted by ids.
    order: Vec<usize>,
    /// `shared[i]`: tokens that `order[i]` has in common with its predecessor.
    shared: Vec<usize>,
}

impl<'a> Walk<'a> {
    fn new(queries: &'a [Query]) -> Self {
        let mut order: Vec<usize> = (0..queries.len()).collect();
        order.sort_by(|&a, &b| queries[a].fed().cmp(queries[b].fed()));
        let mut shared = vec![0; order.len().min(1)];
        shared.extend(order.windows(2).map(|w| common(queries[w[0]].fed(), queries[w[1]].fed())));
        Walk { queries, order, shared }
    }

    /// Tokens to be run in all.
    fn tokens(&self) -> usize {
        self.order.iter().zip(&self.shared).map(|(&q, shared)| self.queries[q].fed().len() - shared).sum()
    }

    /// What step `step` feeds, and where it starts.
    fn piece(&self, step: usize) -> Option<(usize, &'a [u32])> {
        let &q = self.order.get(step)?;
        let from = self.shared[step];
        Some((from, &self.queries[q].fed()[from..]))
    }

    /// The queries that pass through `position` of step `step` and are scored there, with the token that they expect next.
    fn expected(&self, step: usize, position: usize) -> impl Iterator<Item = (usize, u32)> {
        let same = self.shared[step + 1..].iter().take_while(move |&&shared| shared > position).count();
        self.order[step..=step + same].iter().filter_map(move |&q| {
            let query = &self.queries[q];
            (position + 1 >= query.ids.len() - query.scored).then(|| (q, query.ids[position + 1]))
        })
    }
}

/// Tokens that scoring a document's queries runs.
pub fn tokens(queries: &[Query]) -> usize {
    Walk::new(queries).tokens()
}

/// Documents to score together, by number; every document is in one batch. The longest come first, so that what does not fit into
/// memory fails at once and the time left is not underestimated.
pub fn batches(documents: &[Vec<Query>]) -> Vec<Vec<usize>> {
    let tokens: Vec<usize> = documents.iter().map(|queries| self::tokens(queries)).collect();
    let mut order: Vec<usize> = (0..documents.len()).collect();
    order.sort_by_key(|&d| std::cmp::Reverse(tokens[d]));
    let (mut batches, mut filled) = (Vec::<Vec<usize>>::new(), usize::MAX);
    for d in order {
        if filled.saturating_add(tokens[d]) > BATCH_TOKENS {
            batches.push(Vec::new());
            filled = 0;
        }
        if let Some(batch) = batches.last_mut() {
            batch.push(d);
        }
        filled += tokens[d];
    }
    batches
}

/// Scores the queries of some documents, side by side.
///
/// # Errors
/// A token outside the model's vocabulary; [`Error::NotFinite`] when a score is not a number.
pub fn score(model: &Model, documents: &[&[Query]]) -> Result<Vec<Vec<Score>>> {
    let vocab = model.config.vocab_size;
    // Also of the tokens that are only predicted.
    let ids = documents.iter().copied().flatten().flat_map(|q| &q.ids);
    if let Some(&id) = ids.max().filter(|id| **id as usize >= vocab) {
        return Err(specquant_model::Error::TokenId { id, vocab }.into());
    }
    let walks: Vec<Walk> = documents.iter().map(|queries| Walk::new(queries)).collect();
    let mut sequences: Vec<Sequence> = walks.iter().map(|_| model.sequence()).collect();
    let perfect = Score { loglik: 0.0, greedy: true };
    let mut scores: Vec<Vec<Score>> = documents.iter().map(|queries| vec![perfect; queries.len()]).collect();
    for step in 0..walks.iter().map(|w| w.order.len()).max().unwrap_or(0) {
        let mut entries: Vec<(&mut Sequence, &[u32])> = Vec::new();
        // Of every row whose logits are wanted: its number, and (document, query, token) that it predicts.
        let (mut rows, mut row) = (Vec::new(), 0);
        for (d, (walk, sequence)) in walks.iter().zip(&mut sequences).enumerate() {
            let Some((from, piece)) = walk.piece(step) else { continue };
            sequence.truncate(from);
            for position in from..from + piece.len() {
                let expected: Vec<_> =
                    walk.expected(step, position).map(|(q, token)| (d, q, token)).collect();
                if !expected.is_empty() {
                    rows.push((row, expected));
                }
                row += 1;
            }
            entries.push((sequence, piece));
        }
        let wanted: Vec<usize> = rows.iter().map(|(row, _)| *row).collect();
        let hidden = model.hidden_of(&mut entries, &wanted)?;
        let found = model.map_logits(&hidden, |i, logits| {
            let (total, best) = (log_sum_exp(logits), argmax(logits));
            let score = |&(d, q, token): &(usize, usize, u32)| {
                (d, q, f64::from(logits[token as usize]) - total, token == best)
            };
            rows[i].1.iter().map(score).collect::<Vec<_>>()
        })?;
        for (d, q, loglik, greedy) in found.into_iter().flatten() {
            scores[d][q].loglik += loglik;
            scores[d][q].greedy &= greedy;
        }
    }
    if scores.iter().flatten().any(|s| !s.loglik.is_finite()) {
        return Err(Error::NotFinite { place: "a document".to_owned() });
    }
    Ok(scores)
}
