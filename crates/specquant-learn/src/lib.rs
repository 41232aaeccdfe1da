//! The parts of two baselines that need gradients: SpinQuant's rotations and OmniQuant's scales and clip ratios. Slices in, vectors
//! out; candle differentiates within.

mod adam;
mod block;
mod clipped;
mod error;
mod net;
mod omniquant;
mod ops;
mod spinquant;
mod stiefel;
mod tune;

pub use error::{Error, Result};
pub use omniquant::{BlockWeights, Learned, OmniQuantConfig, omniquant};
pub use spinquant::{Rotations, SpinQuantConfig, Start, spinquant};
pub use tune::{TuneConfig, Tuned, TunedBlock, tune};
