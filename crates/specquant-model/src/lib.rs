//! LLaMA-family models on a CPU: readers for Hugging Face directories and GGUF files, tokenizer and chat template, one forward
//! pass in which a linear layer is dense or quantized, KV cache, sampling, and the SpecQuant checkpoint.

mod block;
mod checkpoint;
mod config;
mod digest;
mod error;
mod generate;
mod linear;
mod matrix;
mod model;
mod rotation;
mod scheme;
mod source;
mod stored_branch;
mod stored_linear;
mod stored_transform;
mod text;
mod tokenizer;
mod verify;

pub use block::*;
pub use checkpoint::*;
pub use config::*;
pub use digest::*;
pub use error::*;
pub use generate::*;
pub use linear::*;
pub use matrix::*;
pub use model::*;
pub use rotation::*;
pub use scheme::*;
pub use source::*;
pub use stored_branch::*;
pub use stored_linear::*;
pub use stored_transform::*;
pub use text::*;
pub use tokenizer::*;
pub use verify::*;
