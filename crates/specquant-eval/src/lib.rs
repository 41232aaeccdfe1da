//! Evaluation of SpecQuant models: perplexity by the protocol of the W4A4 papers, distance to full precision, and zero-shot tasks with
//! the prompts and scores of lm-evaluation-harness.

mod error;
mod evaluate;
mod journal;
mod perplexity;
mod requests;
mod score;
mod stats;
mod tasks;

pub use error::*;
pub use evaluate::*;
pub use journal::*;
pub use perplexity::*;
pub use requests::*;
pub use score::*;
pub use stats::*;
pub use tasks::*;
