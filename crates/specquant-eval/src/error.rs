//! What can stop an evaluation.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A condition that stops an evaluation; the message says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text has fewer tokens than one window.
    #[error(
        "the text has {tokens} tokens, fewer than one window of {window}; give a longer text or a smaller --window"
    )]
    TooShort {
        /// Tokens in the text.
        tokens: usize,
        /// Tokens of text in a window.
        window: usize,
    },
    /// A setting out of range.
    #[error("{0}")]
    Setting(String),
    /// A number that the model computed is not finite.
    #[error("the model's logits are not finite in {place}; the checkpoint is damaged")]
    NotFinite {
        /// Window or document.
        place: String,
    },
    /// Two models cannot be compared token by token.
    #[error("{0}")]
    Incomparable(String),
    /// A task's data are not there.
    #[error("{path} is missing; to get it: {command}")]
    MissingData {
        /// The file.
        path: PathBuf,
        /// What fetches it.
        command: String,
    },
    /// A task's data could not be downloaded.
    #[cfg(feature = "hub")]
    #[error("cannot download {url}: {cause}; check the network, or set HF_ENDPOINT to a mirror")]
    Download {
        /// Address.
        url: String,
        /// What the network or the server said.
        cause: String,
    },
    /// A task's data are not what they should be.
    #[error("{path}{}: {problem}", line.map_or(String::new(), |l| format!(", line {l}")))]
    Data {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: Option<usize>,
        /// What is wrong with it, and the remedy.
        problem: String,
    },
    /// An earlier run cannot be continued, or is in the way.
    #[error("{path}: {problem}")]
    Journal {
        /// The journal.
        path: PathBuf,
        /// Why, and the remedy.
        problem: String,
    },
    /// The operating system refused to read or write.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] specquant_model::Error),
}

impl Error {
    /// For `map_err`: a system error at a file.
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Error + use<'_> {
        move |cause| Error::Io { path: path.to_owned(), cause }
    }
}
