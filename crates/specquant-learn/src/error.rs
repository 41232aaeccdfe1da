//! What can go wrong while learning.

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A condition that stops the learning.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model cannot be read.
    #[error(transparent)]
    Model(#[from] specquant_model::Error),
    /// A setting out of range.
    #[error("{name} is {value}; it must be {allowed}")]
    Config {
        /// The setting.
        name: &'static str,
        /// What was given.
        value: String,
        /// What would do.
        allowed: &'static str,
    },
    /// A matrix or vector of another size than the model asks for.
    #[error("{what} has {found} values instead of {wanted} {shape:?}")]
    Shape {
        /// Which one.
        what: String,
        /// Its length.
        found: usize,
        /// The length it must have.
        wanted: usize,
        /// The shape behind that length.
        shape: Vec<usize>,
    },
    /// A rotation that is none.
    #[error("{what} is not orthonormal: a product of two of its rows is off by {error:.1e}")]
    NotOrthonormal {
        /// Which one.
        what: String,
        /// Largest deviation of R Rᵀ from the identity.
        error: f32,
    },
    /// Nothing to learn from.
    #[error("no text of at least {0} tokens to learn from; give more calibration text")]
    NoText(usize),
    /// The loss, or a result, is NaN or infinite.
    #[error("{what} is {value} at step {step}; {}", if *step == 0 { "the model itself overflows" } else { "lower the learning rate" })]
    NotFinite {
        /// What it is.
        what: &'static str,
        /// Its value.
        value: f64,
        /// Step or epoch.
        step: usize,
    },
    /// A residual stream that cannot be rotated.
    #[error(
        "a model with norms behind o_proj and down_proj has no rotation of its residual stream: their weights, which differ from channel to channel, \
         stand between these layers and the stream"
    )]
    PostNorms,
    /// A layer in full precision where the codes of a quantized one are to stay.
    #[error("the model to be tuned is not quantized")]
    NotQuantized,
    /// A part of a quantized model that tuning does not know.
    #[error("the model to be tuned has {0}, which tuning does not know")]
    Untunable(&'static str),
    /// The tensor library refused an operation.
    #[error("tensor operation: {0}")]
    Tensor(String),
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Error::Tensor(e.to_string())
    }
}

/// Fails unless `found` is the product of `shape`.
pub(crate) fn check_len(what: impl Into<String>, found: usize, shape: &[usize]) -> Result<()> {
    let wanted = shape.iter().product();
    if found == wanted {
        return Ok(());
    }
    Err(Error::Shape { what: what.into(), found, wanted, shape: shape.to_vec() })
}

/// Fails unless `bits` is a width that the quantizers know.
pub(crate) fn check_bits(name: &'static str, bits: u8) -> Result<()> {
    if (2..=8).contains(&bits) || bits == 16 {
        return Ok(());
    }
    Err(Error::Config { name, value: bits.to_string(), allowed: "2 to 8, or 16 for unquantized" })
}

/// Fails unless `value` lies in (0, max].
pub(crate) fn check_positive(name: &'static str, value: f64, max: f64, allowed: &'static str) -> Result<()> {
    if value > 0.0 && value <= max {
        return Ok(());
    }
    Err(Error::Config { name, value: value.to_string(), allowed })
}
