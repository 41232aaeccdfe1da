use std::path::PathBuf;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Quantization failed.
    #[error(transparent)]
    Quantize(#[from] specquant_quantize::Error),
    /// Evaluation failed.
    #[error(transparent)]
    Evaluate(#[from] specquant_eval::Error),
    /// A model is not what it should be.
    #[error(transparent)]
    Model(#[from] specquant_model::Error),
    /// A file cannot be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        cause: std::io::Error,
    },
    /// A text cannot be used.
    #[error("{}: {why}", path.display())]
    Text {
        /// The text.
        path: PathBuf,
        /// Why not.
        why: String,
    },
}

impl Error {
    /// Whether a configuration broke down, and not the machine or the files.
    pub(crate) fn is_breakdown(&self) -> bool {
        use specquant_quantize::Error as Quantize;
        matches!(
            self,
            Error::Quantize(Quantize::NotFinite { .. } | Quantize::Branch { .. })
                | Error::Evaluate(specquant_eval::Error::NotFinite { .. })
        )
    }
}

/// Shorthand.
pub type Result<T> = std::result::Result<T, Error>;
