//! Perplexity of a text.
//!
//! The default protocol is that of the W4A4 papers (QuaRot eval_utils.py, FlatQuant eval_utils.py): the text is tokenized once,
//! cut into non-overlapping windows of 2048 tokens, the tail is dropped, every window starts without context, and
//! `exp(mean over windows of the mean negative log-likelihood of its 2047 predicted tokens)` is reported.

use serde::Serialize;
use specquant_kernels::log_sum_exp;
use specquant_model::Model;

use crate::{Error, Result};

/// How a text is cut and scored.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Protocol {
    /// Tokens of a window.
    pub window: usize,
    /// Score at most so many windows, from the start; 0 for all.
    pub max_windows: usize,
}

impl Default for Protocol {
    fn default() -> Self {
        Protocol { window: 2048, max_windows: 0 }
    }
}

/// A perplexity with its uncertainty.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Perplexity {
    /// exp of the mean over windows of their mean negative log-likelihood.
    pub perplexity: f64,
    /// Standard error of the perplexity over windows, by the delta method: perplexity × sd(window means) / √windows. 0 for one window.
    pub stderr: f64,
    /// Predicted tokens.
    pub tokens: usize,
    /// Mean negative log-likelihood of every window, in nats a token.
    pub window_nll: Vec<f64>,
    /// What was computed, in words.
    pub protocol: String,
}

/// Scores `ids`. progress: called after every window with (windows done, windows in all, perplexity so far).
///
/// # Errors
/// [`Error::TooShort`], [`Error::Setting`] for a window below 2, and [`Error::NotFinite`].
pub fn perplexity(
    model: &Model,
    ids: &[u32],
    protocol: &Protocol,
    progress: &mut dyn FnMut(usize, usize, f64),
) -> Result<Perplexity> {
    let window = protocol.window;
    if window < 2 {
        return Err(Error::Setting(format!(
            "--window {window}: a window has at least 2 tokens, one of them predicted"
        )));
    }
    let available = ids.len() / window;
    if available == 0 {
        return Err(Error::TooShort { tokens: ids.len(), window });
    }
    let count = if protocol.max_windows == 0 { available } else { available.min(protocol.max_windows) };
    let mut window_nll = Vec::with_capacity(count);
    for (i, ids) in ids.chunks_exact(window).take(count).enumerate() {
        let mut sequence = model.sequence();
        let hidden = model.hidden(&mut [(&mut sequence, ids)])?;
        let predicting = &hidden[..(window - 1) * model.config.hidden_size];
        let nll = model.map_logits(predicting, |row, logits| {
            log_sum_exp(logits) - f64::from(logits[ids[row + 1] as usize])
        })?;
        let nll: f64 = nll.into_iter().sum();
        if !nll.is_finite() {
            return Err(Error::NotFinite { place: format!("window {i}") });
        }
        window_nll.push(nll / (window - 1) as f64);
        progress(i + 1, count, mean(&window_nll).exp());
    }
    let starts = model.config.bos_token_id.is_some_and(|bos| ids.first() == Some(&bos));
    let bos = if starts { "BOS at the start of the text" } else { "no BOS" };
    let perplexity = mean(&window_nll).exp();
    let n = window_nll.len() as f64;
    let variance =
        window_nll.iter().map(|x| (x - mean(&window_nll)).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    Ok(Perplexity {
        perplexity,
        stderr: perplexity * (variance / n).sqrt(),
        tokens: count * (window - 1),
        window_nll,
        protocol: format!(
            "token-level, {count} of {available} non-overlapping windows of {window} tokens, tail dropped, {bos}"
        ),
    })
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}
