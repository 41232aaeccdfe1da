//! What is done to a layer's input and weight before they are rounded, leaving their product unchanged.

pub mod smooth;
