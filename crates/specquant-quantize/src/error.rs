//! What can stop a quantization run.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A condition that stops the run; the message says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The recipe is wrong by itself.
    #[error("recipe: {0}")]
    Recipe(String),
    /// The recipe does not fit the model.
    #[error("the recipe does not fit this model:\n{0}")]
    Unfit(String),
    /// The calibration text is unusable.
    #[error("calibration text {path}: {why}")]
    Calibration {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the remedy.
        why: String,
    },
    /// The output cannot be written.
    #[error("{path}: {why}")]
    Output {
        /// The path.
        path: PathBuf,
        /// What is wrong, and the remedy.
        why: String,
    },
    /// Memory for the hidden states cannot be had.
    #[error(
        "hidden states of {bytes} bytes do not fit into memory ({cause}); --spill keeps them on the disk, lower --samples makes them fewer"
    )]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// What the system says.
        cause: std::io::Error,
    },
    /// A run that cannot be continued, because it would become another.
    #[error(
        "{path} is of a run that differs in {fields}; give what it was begun with, or start anew with --overwrite"
    )]
    Differs {
        /// The unfinished checkpoint.
        path: PathBuf,
        /// What differs.
        fields: String,
    },
    /// A run that stopped and can be continued.
    #[error(
        "{cause}\n{partial} keeps what is finished, {blocks} of {of} blocks; when that is remedied, add --resume to continue"
    )]
    Unfinished {
        /// Why it stopped.
        cause: Box<Error>,
        /// The unfinished checkpoint.
        partial: PathBuf,
        /// Finished blocks.
        blocks: usize,
        /// Blocks of the model.
        of: usize,
    },
    /// A value that is not finite appeared.
    #[error("{module}: {what} is not finite{}; the model's weights or the calibration text are broken there", .channel.map(|c| format!(" (channel {c})")).unwrap_or_default())]
    NotFinite {
        /// Layer or site.
        module: String,
        /// What was computed.
        what: &'static str,
        /// Channel, if one is to blame.
        channel: Option<usize>,
    },
    /// The branch could not be built.
    #[error("{module}: {cause}")]
    Branch {
        /// The layer.
        module: String,
        /// What is wrong.
        cause: crate::branch::BranchError,
    },
    /// Learning failed.
    #[cfg(feature = "learn")]
    #[error(transparent)]
    Learn(#[from] specquant_learn::Error),
    /// The model could not be read or run.
    #[error(transparent)]
    Model(#[from] specquant_model::Error),
}

impl Error {
    /// The same error of a layer that was named within its block `prefix`.
    pub(crate) fn within(self, prefix: &str) -> Self {
        let full = |module: String| format!("{prefix}.{module}");
        match self {
            Error::NotFinite { module, what, channel } => {
                Error::NotFinite { module: full(module), what, channel }
            }
            Error::Branch { module, cause } => Error::Branch { module: full(module), cause },
            other => other,
        }
    }

    /// Whether the same run may get further the next time: it was not the model, the recipe or the text that stopped it.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Error::Output { .. } | Error::Memory { .. } | Error::Model(specquant_model::Error::Io { .. }) => {
                true
            }
            #[cfg(feature = "learn")]
            Error::Learn(_) => true,
            _ => false,
        }
    }
}
