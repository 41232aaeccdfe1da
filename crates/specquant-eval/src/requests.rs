//! Requests as token ids, cut where lm-eval cuts them (`lm_eval/api/model.py`, `_encode_pair` and `loglikelihood`; 0.4.13).

use serde::Serialize;
use specquant_model::{ModelConfig, Tokenizer};

use crate::perplexity::Protocol;
use crate::tasks::Request;
use crate::tasks::python::is_space;
use crate::{Error, Result};

/// Whether a text starts with the model's BOS token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bos {
    /// As the model's tokenizer is set up, which is what transformers and lm-eval do.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
    /// At the start of every window of a perplexity; everywhere else as [`Bos::Always`].
    Window,
}

/// A request in token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// Context and continuation; at least one token of context.
    pub ids: Vec<u32>,
    /// How many of the last ids are the continuation; at least one.
    pub scored: usize,
}

impl Query {
    /// What the model reads: everything but the last token, which is only predicted.
    pub fn fed(&self) -> &[u32] {
        &self.ids[..self.ids.len() - 1]
    }
}

/// Turns texts into token ids.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    bos: Bos,
    bos_token: Option<(u32, String)>,
    prefix: Option<u32>,
    max_length: usize,
}

impl<'a> Encoder<'a> {
    /// `max_length`: the tokens that the model reads at most; 0 for what its configuration allows.
    ///
    /// # Errors
    /// [`Error::Setting`] for [`Bos::Always`] without a BOS token.
    pub fn new(tokenizer: &'a Tokenizer, config: &ModelConfig, bos: Bos, max_length: usize) -> Result<Self> {
        let id = config.bos_token_id.or_else(|| tokenizer.bos_id());
        let bos_token = id.and_then(|id| Some((id, tokenizer.id_to_token(id)?)));
        let must = matches!(bos, Bos::Always | Bos::Window);
        if must && bos_token.is_none() {
            return Err(Error::Setting("this model has no BOS token: choose --bos auto or never".to_owned()));
        }
        let max_length = if max_length == 0 { config.max_position_embeddings } else { max_length };
        let prefix = id.or_else(|| tokenizer.eos_id()).or_else(|| config.eos_token_ids.first().copied());
        Ok(Encoder { tokenizer, bos, bos_token, prefix, max_length })
    }

    /// Tokens that the model reads at most.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Token ids of a text, with a BOS token according to the policy; never with two.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let starts = self.bos_token.as_ref().is_some_and(|(_, token)| text.starts_with(token.as_str()));
        let mut ids = self.tokenizer.encode(text, self.bos == Bos::Auto && !starts)?;
        if let (Bos::Always | Bos::Window, Some((bos, _))) = (self.bos, &self.bos_token)
            && ids.first() != Some(bos)
        {
            ids.insert(0, *bos);
        }
        Ok(ids)
    }

    /// Token ids of a text whose perplexity is wanted, and `protocol` with the BOS policy in it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn prose(&self, text: &str, protocol: Protocol) -> Result<(Vec<u32>, Protocol)> {
        if let (Bos::Window, Some((bos, _))) = (self.bos, &self.bos_token) {
            let ids = self.tokenizer.encode(text, false)?;
            return Ok((ids, Protocol { window_bos: Some(*bos), ..protocol }));
        }
        let ids = self.encode(text)?;
        let starts_with_bos = self.bos_token.as_ref().is_some_and(|(bos, _)| ids.first() == Some(bos));
        Ok((ids, Protocol { starts_with_bos, ..protocol }))
    }

    /// The request in token ids: the context's, then those of both together from the length of the context's on. White space
    /// at the end of the context goes to the continuation. What exceeds the window is dropped from the left.
    ///
    /// # Errors
    /// A sentence about the request: nothing to score, or more than a window of it.
    pub fn query(&self, request: &Request) -> Result<Query, String> {
        let text = |e: Error| e.to_string();
        let context = request.context.trim_end_matches(is_space);
        let moved = &request.context[context.len()..];
        let (mut ids, scored) = if context.is_empty() {
            // Nothing but white space, which lm-eval would score after an empty context.
            let continuation = format!("{moved}{}", request.continuation);
            let ids = self.tokenizer.encode(&continuation, false).map_err(|e| e.to_string())?;
            match self.prefix {
                Some(prefix) if ids.first() != Some(&prefix) => {
                    let scored = ids.len();
                    ([&[prefix], &ids[..]].concat(), scored)
                }
                Some(_) => {
                    let scored = ids.len() - 1;
                    (ids, scored)
                }
                None => return Err("has no context, and the model has no BOS token to start from".to_owned()),
            }
        } else {
            let whole = self.encode(&format!("{context}{moved}{}", request.continuation)).map_err(text)?;
            let mut ids = self.encode(context).map_err(text)?;
            // Where a token reaches over the boundary, the context keeps its own, as in lm-eval.
            let continuation = whole.get(ids.len()..).unwrap_or_default();
            ids.extend(continuation);
            (ids, continuation.len())
        };
        if scored == 0 {
            return Err(format!(
                "has an empty continuation, {:?}: there is nothing to score",
                request.continuation
            ));
        }
        if scored > self.max_length {
            return Err(format!(
                "has a continuation of {scored} tokens, more than the window of {}; raise --max-length, if the model allows it",
                self.max_length
            ));
        }
        // Of the last token no logits are needed, so one more than the window fits.
        let surplus = ids.len().saturating_sub(self.max_length.saturating_add(1));
        ids.drain(..surplus);
        Ok(Query { ids, scored })
    }
}
