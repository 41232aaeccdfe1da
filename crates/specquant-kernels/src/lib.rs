//! Integer and spectral CPU kernels of SpecQuant: slices in, slices out.
//!
//! A quantized linear layer computes (arXiv 2511.11663, Eq. 16)
//!
//! ```text
//! y = Q_a(x) · Q_w(R)ᵀ + (x Pᵀ) · Cᵀ
//! ```
//!
//! with a 4-bit integer product of the residual weight `R` ([`matmul_int`]) and a wider branch in few directions
//! ([`Basis::project`], [`add_branch`]). This crate holds these products, the quantizers that feed them, and the float operations
//! around them. It knows no tensors, no files and no models.
//!
//! Every kernel has a scalar twin that its tests compare it with; the instruction set is chosen at run time ([`Isa`]).

mod acts;
mod attention;
mod basis;
mod buffer;
mod ceilings;
mod dct;
mod dense;
mod error;
mod fft;
mod hadamard;
mod isa;
mod kronecker;
mod kv;
mod lanes;
mod matmul;
mod ops;
mod packed_dense;
mod parallel;
mod reflections;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod weights;

pub use acts::*;
pub use attention::*;
pub use basis::*;
pub use buffer::{Buffer, Element, trim_buffers};
pub use ceilings::*;
pub use dct::*;
pub use dense::*;
pub use error::*;
pub use hadamard::*;
pub use isa::*;
pub use kronecker::*;
pub use kv::*;
pub use matmul::*;
pub use ops::*;
pub use packed_dense::*;
pub use parallel::*;
pub use reflections::*;
pub use weights::*;
