//! Perplexity of a text, and a model's distance to another one on it.
//!
//! The default protocol is that of the W4A4 papers (QuaRot eval_utils.py, FlatQuant eval_utils.py): the text is tokenized once,
//! cut into non-overlapping windows of 2048 tokens, the tail is dropped, every window starts without context, and
//! `exp(mean over windows of the mean negative log-likelihood of its 2047 predicted tokens)` is reported.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use specquant_kernels::log_sum_exp;
use specquant_model::{Model, argmax};

use crate::distance::{Distance, Token, kl_divergence};
use crate::stats::{Difference, Estimate, paired_weighted, weighted};
use crate::{Error, Result};

/// Rows of logits in memory at a time, of the model and of its reference.
const LOGIT_ROWS: usize = 128;

/// How a text is cut and scored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Protocol {
    /// Tokens of a window, a BOS token included.
    pub window: usize,
    /// Tokens from the start of a window to that of the next; 0 for no overlap. Where windows overlap, only what the earlier ones have
    /// not scored is scored (Hugging Face, "Perplexity of fixed-length models").
    pub stride: usize,
    /// Score at most so many windows, from the start; 0 for all.
    pub max_windows: usize,
    /// Starts every window with this token.
    pub window_bos: Option<u32>,
    /// Whether the text starts with a BOS token; for the description only.
    pub starts_with_bos: bool,
}

impl Default for Protocol {
    fn default() -> Self {
        Protocol { window: 2048, stride: 0, max_windows: 0, window_bos: None, starts_with_bos: false }
    }
}

/// Part of a text: the model reads `ids`, and `ids[first..]` are scored.
struct Window {
    ids: Vec<u32>,
    first: usize,
}

impl Protocol {
    /// Windows that will be scored of a text.
    ///
    /// # Errors
    /// [`Error::TooShort`]; [`Error::Setting`] for a window below 2 or a stride above it.
    pub fn count(&self, ids: &[u32]) -> Result<usize> {
        Ok(self.windows(ids)?.0.len())
    }

    /// The windows to score, and the number of those that the text has.
    fn windows(&self, ids: &[u32]) -> Result<(Vec<Window>, usize)> {
        let each = usize::from(self.window_bos.is_some());
        if self.window < 2 {
            return Err(Error::Setting(format!(
                "--window {}: a window has at least 2 tokens, one of them predicted",
                self.window
            )));
        }
        let content = self.window - each;
        let stride = if self.stride == 0 { content } else { self.stride };
        if stride > content {
            return Err(Error::Setting(format!(
                "--stride {stride}: more than the {content} tokens of text in a window; text between windows would be left out"
            )));
        }
        if ids.len() < content {
            return Err(Error::TooShort { tokens: ids.len(), window: content });
        }
        let available = (ids.len() - content) / stride + 1;
        let count = if self.max_windows == 0 { available } else { available.min(self.max_windows) };
        let window = |i: usize| {
            let text = &ids[i * stride..i * stride + content];
            let ids: Vec<u32> = self.window_bos.iter().chain(text).copied().collect();
            let fresh = if i == 0 { content } else { stride };
            // The first token has nothing before it.
            Window { first: (ids.len() - fresh).max(1), ids }
        };
        Ok(((0..count).map(window).collect(), available))
    }

    /// In words.
    fn describe(&self, count: usize, available: usize) -> String {
        let each = usize::from(self.window_bos.is_some());
        let kind = match self.stride {
            s if s == 0 || s == self.window - each => "non-overlapping ".to_owned(),
            s => format!("overlapping (stride {s}) "),
        };
        let bos = match (self.window_bos, self.starts_with_bos) {
            (Some(_), _) => "BOS at the start of every window",
            (None, true) => "BOS at the start of the text",
            (None, false) => "no BOS",
        };
        format!(
            "token-level, {count} of {available} {kind}windows of {} tokens, tail dropped, {bos}",
            self.window
        )
    }
}

/// A perplexity with its uncertainty, and the distance to a reference if there is one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// exp of the mean negative log-likelihood of the predicted tokens.
    #[serde(deserialize_with = "null_is_infinite")]
    pub perplexity: f64,
    /// Standard error of the perplexity over windows, by the delta method: perplexity × sd(window means) / √windows. 0 for one window, which
    /// says nothing about it.
    #[serde(deserialize_with = "null_is_infinite")]
    pub stderr: f64,
    /// Predicted tokens.
    pub tokens: usize,
    /// Mean negative log-likelihood of every window, in nats a token.
    pub window_nll: Vec<f64>,
    /// Predicted tokens of every window, by which it counts.
    pub window_tokens: Vec<usize>,
    /// What was computed, in words.
    pub protocol: String,
    /// The same as settings.
    pub settings: Protocol,
    /// Distance to the reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distance: Option<Distance>,
}

/// JSON has no infinity and writes null.
fn null_is_infinite<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::INFINITY))
}

impl Perplexity {
    /// Difference of log-perplexity, this minus `other`, paired over windows.
    pub fn log_difference(&self, other: &Perplexity) -> Difference {
        paired_weighted(&self.window_nll, &other.window_nll, &self.window_tokens)
    }
}

/// A model whose predictions others are held against: its final hidden states, from which its logits are computed again for each of
/// them. 4 bytes × hidden size a predicted token, against 4 bytes × vocabulary for the logits.
pub struct Reference {
    model: Model,
    hidden: Vec<Vec<f32>>,
    ids: Vec<u32>,
    settings: Protocol,
    /// Its own perplexity.
    pub perplexity: Perplexity,
}

impl Reference {
    /// Runs `model` over the text. Arguments as of [`perplexity`].
    ///
    /// # Errors
    /// As [`perplexity`].
    pub fn new(
        model: Model,
        ids: &[u32],
        protocol: &Protocol,
        progress: &mut dyn FnMut(usize, usize, f64),
    ) -> Result<Reference> {
        let mut hidden = Vec::new();
        let perplexity = run(&model, ids, protocol, None, Some(&mut hidden), progress)?;
        Ok(Reference { model, hidden, ids: ids.to_vec(), settings: protocol.clone(), perplexity })
    }

    /// Bytes that the hidden states of a text take. ids: of the whole text.
    ///
    /// # Errors
    /// As [`perplexity`], for a protocol that does not fit the text.
    pub fn bytes(hidden_size: usize, ids: &[u32], protocol: &Protocol) -> Result<u64> {
        let (windows, _) = protocol.windows(ids)?;
        Ok(windows.iter().map(|w| ((w.ids.len() - w.first) * hidden_size * 4) as u64).sum())
    }
}

/// Scores `ids`, of the model and, with a reference, of both.
///
/// ids: the whole text. progress: called after every window with (windows done, windows in all, perplexity so far).
///
/// # Errors
/// [`Error::TooShort`]; [`Error::Setting`] for a window below 2 or a stride above it; [`Error::Incomparable`] when the reference was run on
/// another text or has another vocabulary; and [`Error::NotFinite`].
pub fn perplexity(
    model: &Model,
    ids: &[u32],
    protocol: &Protocol,
    reference: Option<&Reference>,
    progress: &mut dyn FnMut(usize, usize, f64),
) -> Result<Perplexity> {
    if let Some(r) = reference {
        let (own, theirs) = (model.config.vocab_size, r.model.config.vocab_size);
        if own != theirs {
            return Err(Error::Incomparable(format!(
                "the model has {own} tokens and its reference {theirs}; compare models of one vocabulary"
            )));
        }
        if r.ids != ids || r.settings != *protocol {
            return Err(Error::Incomparable(
                "the model's tokenizer cuts the text into other tokens than the reference's; compare models of one tokenizer"
                    .to_owned(),
            ));
        }
    }
    run(model, ids, protocol, reference, None, progress)
}

fn run(
    model: &Model,
    ids: &[u32],
    protocol: &Protocol,
    reference: Option<&Reference>,
    mut keep: Option<&mut Vec<Vec<f32>>>,
    progress: &mut dyn FnMut(usize, usize, f64),
) -> Result<Perplexity> {
    let (windows, available) = protocol.windows(ids)?;
    let width = model.config.hidden_size;
    let (mut window_nll, mut window_tokens) = (Vec::new(), Vec::new());
    let mut tokens: Vec<Vec<Token>> = Vec::new();
    for (i, window) in windows.iter().enumerate() {
        let hidden = model.hidden(&mut [(&mut model.sequence(), &window.ids)])?;
        // Row t predicts token t + 1.
        let hidden = &hidden[(window.first - 1) * width..(window.ids.len() - 1) * width];
        let targets = &window.ids[window.first..];
        let scored = match reference {
            None => model.map_logits(hidden, |row, logits| Token::new(targets[row], logits))?,
            Some(reference) => score_both(model, hidden, reference, &reference.hidden[i], targets)?,
        };
        if !scored.iter().all(|t| t.nll.is_finite() && t.kl.is_finite()) {
            return Err(Error::NotFinite { place: format!("window {i}") });
        }
        window_nll.push(scored.iter().map(|t| t.nll).sum::<f64>() / scored.len() as f64);
        window_tokens.push(scored.len());
        if reference.is_some() {
            tokens.push(scored);
        }
        if let Some(keep) = &mut keep {
            keep.push(hidden.to_vec());
        }
        progress(i + 1, windows.len(), weighted(&window_nll, &window_tokens).mean.exp());
    }
    let Estimate { mean, stderr } = weighted(&window_nll, &window_tokens);
    let perplexity = mean.exp();
    let distance = reference.map(|r| {
        let delta = paired_weighted(&window_nll, &r.perplexity.window_nll, &window_tokens);
        Distance::new(&tokens, windows.iter().map(|w| w.first), protocol.window, delta)
    });
    Ok(Perplexity {
        perplexity,
        stderr: perplexity * stderr,
        tokens: window_tokens.iter().sum(),
        window_nll,
        window_tokens,
        protocol: protocol.describe(windows.len(), available),
        settings: protocol.clone(),
        distance,
    })
}

/// Scores the rows of a window by both models. hidden: `[rows, hidden]` of each.
fn score_both(
    model: &Model,
    hidden: &[f32],
    reference: &Reference,
    reference_hidden: &[f32],
    targets: &[u32],
) -> Result<Vec<Token>> {
    let vocab = model.config.vocab_size;
    let chunks = hidden
        .chunks(LOGIT_ROWS * model.config.hidden_size)
        .zip(reference_hidden.chunks(LOGIT_ROWS * reference.model.config.hidden_size))
        .zip(targets.chunks(LOGIT_ROWS));
    let mut scored = Vec::with_capacity(targets.len());
    for ((hidden, reference_hidden), targets) in chunks {
        let (logits, theirs) = (model.logits(hidden)?, reference.model.logits(reference_hidden)?);
        let rows = logits.par_chunks_exact(vocab).zip(theirs.par_chunks_exact(vocab)).zip(targets);
        scored.par_extend(rows.map(|((logits, theirs), &target)| Token {
            kl: kl_divergence(theirs, logits),
            same_choice: argmax(logits) == argmax(theirs),
            ..Token::new(target, logits)
        }));
    }
    Ok(scored)
}

impl Token {
    /// A token that no reference is held against.
    fn new(target: u32, logits: &[f32]) -> Token {
        let nll = log_sum_exp(logits) - f64::from(logits[target as usize]);
        Token { nll, kl: 0.0, same_choice: true }
    }
}
