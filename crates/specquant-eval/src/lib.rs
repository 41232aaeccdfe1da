//! Evaluation of SpecQuant models: perplexity by the protocol of the W4A4 papers.

mod error;
mod perplexity;

pub use error::*;
pub use perplexity::*;
