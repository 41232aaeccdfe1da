//! What is done to a layer's input and weight before they are rounded, leaving their product unchanged.

pub mod awq;
#[cfg(feature = "learn")]
pub mod flat;
pub mod keep;
pub mod rotate;
pub mod smooth;
