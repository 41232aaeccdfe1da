//! What is learned by gradients: the tuning of a quantized model on its source's predictions, differentiated by hand, and the parts of three baselines that
//! need gradients, SpinQuant's rotations, OmniQuant's scales and clip ratios and FlatQuant's transforms, which candle differentiates. Slices in, vectors out.

mod adam;
mod block;
mod clipped;
mod error;
mod flatquant;
mod net;
mod omniquant;
mod ops;
mod spinquant;
mod stiefel;
mod tune;

pub use error::{Error, Result};
pub use flatquant::{FlatBlock, FlatQuantConfig, flatquant};
pub use omniquant::{BlockWeights, Learned, OmniQuantConfig, omniquant};
pub use spinquant::{Rotations, SpinQuantConfig, Start, spinquant};
pub use tune::{TuneConfig, Tuned, TunedBlock, Tuning, tune};
