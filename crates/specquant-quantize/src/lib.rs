//! Transforms, branches, rounding and the block-by-block pipeline of SpecQuant (arXiv 2511.11663).
//!
//! A quantized linear layer is a point of *transform × branch × rounding × scheme*. Each transform, branch and rounding is a file
//! of pure functions over slices; a [`Recipe`] names a combination; [`run`] applies it to a model, one decoder block at a time.

mod block;
pub mod branch;
pub mod calibration;
mod card;
mod error;
mod fallback;
pub mod layer;
mod learn;
mod memory;
mod output;
mod pipeline;
mod plan;
mod progress;
mod recipe;
pub mod rounding;
mod run;
mod states;
mod stats;
#[cfg(test)]
mod testing;
pub mod transforms;
mod trial;
mod vocabulary;

pub use block::*;
pub use error::*;
pub use fallback::*;
pub use learn::{FlatQuantConfig, Learn, Learned, OmniQuantConfig, SpinQuantConfig, TuneConfig};
pub use output::{Destination, Unfinished, check_output};
pub use pipeline::*;
pub use plan::*;
pub use progress::differing_fields;
pub use recipe::*;
pub use run::*;
pub use states::States;
pub use stats::*;
pub use trial::*;
