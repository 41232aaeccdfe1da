//! The wider branch beside the 4-bit product: which part of a smoothed weight is kept in 16 bits.
//!
//! SpecQuant (arXiv 2511.11663, section 3) keeps the lowest `k_j` frequencies of every output channel j, seen as a signal over the input
//! channels; the residual is what gets rounded. [`allocate`] chooses the `k_j` from the importance of the channels, [`truncate`] takes the
//! coefficients, [`reconstruct`] gives the weight they stand for. The other bases spend the same bits differently; [`build()`] knows them all.

mod build;
mod dct;
mod fourier;
mod importance;
mod low_rank;
mod rows;

pub use build::*;
pub use fourier::*;
pub use importance::*;
pub use low_rank::low_rank;

use half::f16;

/// A branch that cannot be built.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BranchError {
    /// A channel is to keep more bins than its spectrum has.
    #[error(
        "output channel {channel} is to keep {bins} frequency bins, but {inp} input channels have only {limit}: lower \
         the bins per channel"
    )]
    TooManyBins {
        /// The output channel.
        channel: usize,
        /// What was asked for.
        bins: usize,
        /// Input channels.
        inp: usize,
        /// Bins there are: `inp / 2 + 1`.
        limit: usize,
    },
    /// A coefficient is not finite, or too large for f16.
    #[error(
        "branch item {item} of channel {channel} is {value}, which f16 (at most 65504) cannot hold: lower the \
         smoothing strength, or check the weight for bad values"
    )]
    NotRepresentable {
        /// The output channel; of a stored basis the input channel.
        channel: usize,
        /// The frequency bin, 0 being the mean, or the row of the basis.
        item: usize,
        /// The coefficient.
        value: f32,
    },
}

/// `value` as it will be stored.
fn coefficient(value: f32, channel: usize, item: usize) -> Result<f16, BranchError> {
    let coeff = f16::from_f32(value);
    if coeff.is_finite() { Ok(coeff) } else { Err(BranchError::NotRepresentable { channel, item, value }) }
}
