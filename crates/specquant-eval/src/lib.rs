//! Evaluation of SpecQuant models: perplexity by the protocol of the W4A4 papers, distance to full precision, and zero-shot tasks with
//! the prompts and scores of lm-evaluation-harness.

mod distance;
mod error;
mod evaluate;
mod journal;
mod perplexity;
mod report;
mod requests;
mod results;
mod score;
mod stats;
pub mod svg;
mod tasks;

pub use distance::{Distance, PositionRange};
pub use error::*;
pub use evaluate::*;
pub use journal::*;
pub use perplexity::*;
pub use report::*;
pub use requests::*;
pub use results::*;
pub use score::*;
pub use stats::*;
pub use tasks::*;
