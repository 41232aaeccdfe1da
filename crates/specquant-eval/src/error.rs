//! What can stop an evaluation.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A condition that stops an evaluation; the message says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text has fewer tokens than one window.
    #[error(
        "the text has {tokens} tokens, fewer than one window of {window}; give a longer text or a smaller --window"
    )]
    TooShort {
        /// Tokens in the text.
        tokens: usize,
        /// Tokens of a window.
        window: usize,
    },
    /// A setting out of range.
    #[error("{0}")]
    Setting(String),
    /// A logit is not finite.
    #[error("the model's logits are not finite in window {window}; the checkpoint is damaged")]
    NotFinite {
        /// Number of the window, from 0.
        window: usize,
    },
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] specquant_model::Error),
}
