//! What can be wrong with a model on disk, a tokenizer or a chat template. Every message names the file, and the tensor, field or
//! token where there is one, and says what to do about it.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A condition that stops the loading or the use of a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read a file.
    #[error("cannot read {path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The path holds no model in a format that is read here.
    #[error("{path}: {problem}")]
    NotAModel {
        /// What was to be opened.
        path: PathBuf,
        /// What is missing, and the remedy.
        problem: String,
    },
    /// A JSON file does not parse.
    #[error("{path} is not valid JSON: {cause}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's message, with line and column.
        cause: serde_json::Error,
    },
    /// The model's configuration lacks fields or has values that cannot be; all of them are listed.
    #[error("{path}: {problems}")]
    Config {
        /// config.json, or the GGUF file.
        path: PathBuf,
        /// One line a field.
        problems: Problems,
    },
    /// A model type (GGUF: architecture) that this toolkit does not compute.
    #[error("{path}: model type {model_type:?} is not supported; supported: {supported}")]
    ModelType {
        /// config.json, or the GGUF file.
        path: PathBuf,
        /// What was found.
        model_type: String,
        /// What would work.
        supported: String,
    },
    /// The weights were quantized by another tool.
    #[error(
        "{path}: the model is already quantized by {method:?}; quantization needs the original (16 or 32-bit) checkpoint"
    )]
    AlreadyQuantized {
        /// config.json.
        path: PathBuf,
        /// `quantization_config.quant_method`.
        method: String,
    },
    /// The shard index names a file that is not there.
    #[error(
        "{index} names the shard {shard}, which is missing ({tensors} tensors, {first} among them); download it again"
    )]
    MissingShard {
        /// model.safetensors.index.json.
        index: PathBuf,
        /// The file's name.
        shard: String,
        /// Number of tensors that should be in it.
        tensors: usize,
        /// One of them.
        first: String,
    },
    /// The shard index promises a tensor that its shard lacks.
    #[error(
        "{file} lacks the tensor {tensor}, which {index} places there; download both files again from one revision"
    )]
    NotInShard {
        /// The index.
        index: PathBuf,
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A weight file is truncated, damaged or of an unsupported version.
    #[error("{path}: {problem}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What broke, and the remedy.
        problem: String,
    },
    /// Tensors are missing, have another shape than the configuration asks for, or are stored in an unsupported type; all are listed.
    #[error(
        "{path}: the tensors do not match the configuration (take both from one revision of the model): {problems}"
    )]
    Tensors {
        /// The model.
        path: PathBuf,
        /// One line a tensor.
        problems: Problems,
    },
    /// A tensor that was asked for is not in the model.
    #[error("{path} has no tensor {tensor}; the model is incomplete, get it again")]
    NoTensor {
        /// The model.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor's type cannot be widened to f32.
    #[error(
        "{file}: tensor {tensor} is stored as {dtype}, which cannot be widened to f32; supported: {supported}"
    )]
    Dtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
        /// What would work.
        supported: String,
    },
    /// Rows that the tensor does not have, or a buffer of another size than the rows.
    #[error("{file}: rows {rows:?} of tensor {tensor} {shape:?} do not fill a buffer of {buffer} values")]
    Rows {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The rows asked for.
        rows: Range<usize>,
        /// Length of the buffer.
        buffer: usize,
    },
    /// A weight is NaN or infinite.
    #[error(
        "{file}: tensor {tensor} holds {value} at row {row}, column {col}; the checkpoint is damaged, get it again"
    )]
    NotFinite {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row of the first such value.
        row: usize,
        /// Its column.
        col: usize,
        /// The value.
        value: f32,
    },
    /// The tokenizer is missing, damaged or of an unsupported kind, or it refused an input.
    #[error("{path}: {problem}")]
    Tokenizer {
        /// The tokenizer's file, or the GGUF file.
        path: PathBuf,
        /// What is wrong, and the remedy.
        problem: String,
    },
    /// The model has no chat template.
    #[error(
        "{path} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); use plain text generation"
    )]
    NoChatTemplate {
        /// The model.
        path: PathBuf,
    },
    /// The chat template does not parse, or refuses the messages.
    #[error("chat template of {path}: {problem}")]
    ChatTemplate {
        /// The model.
        path: PathBuf,
        /// The template engine's message.
        problem: String,
    },
    /// A scheme with a width or ratio out of range.
    #[error("scheme: {0}")]
    Scheme(String),
    /// A SpecQuant checkpoint that contradicts itself.
    #[error("{0}")]
    Checkpoint(String),
    /// Codes, scales or coefficients that the kernels refuse.
    #[error("{name}: {cause}; quantize the model again")]
    Kernel {
        /// The layer.
        name: String,
        /// What is wrong.
        cause: specquant_kernels::KernelError,
    },
    /// A token id outside the vocabulary.
    #[error(
        "token id {id} is outside the model's vocabulary of {vocab}; tokenizer and model do not belong together, take both from one revision"
    )]
    TokenId {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The forward pass overflowed, or a weight is NaN.
    #[error(
        "the model's hidden states or logits are not finite; the checkpoint is damaged, `specquant inspect` may say where"
    )]
    NotFiniteStates,
    /// A sequence without tokens to continue.
    #[error("there is no token to continue; give a prompt that is not empty")]
    NoTokens,
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        |cause| Error::Io { path: path.to_owned(), cause }
    }

    pub(crate) fn corrupt(path: &Path, problem: impl Into<String>) -> Error {
        Error::Corrupt { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn tokenizer(path: &Path, problem: impl Into<String>) -> Error {
        Error::Tokenizer { path: path.to_owned(), problem: problem.into() }
    }
}

/// A list of complaints, shown ten at most.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems(Vec<String>);

impl Problems {
    const SHOWN: usize = 10;

    /// Adds one.
    pub fn push(&mut self, problem: impl Into<String>) {
        self.0.push(problem.into());
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [only] = &self.0[..] {
            return f.write_str(only);
        }
        write!(f, "{} problems", self.0.len())?;
        for problem in self.0.iter().take(Self::SHOWN) {
            write!(f, "\n  - {problem}")?;
        }
        match self.0.len().checked_sub(Self::SHOWN) {
            Some(more @ 1..) => write!(f, "\n  and {more} more"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_capped() {
        let mut problems = Problems::default();
        problems.push("a");
        assert_eq!(problems.to_string(), "a");
        (0..11).for_each(|i| problems.push(format!("p{i}")));
        let text = problems.to_string();
        assert!(text.starts_with("12 problems\n  - a\n  - p0\n"), "{text}");
        assert!(text.ends_with("- p8\n  and 2 more"), "{text}");
    }
}
