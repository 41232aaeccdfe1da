//! Hostile input. A [`Target`] reads one kind of input with the code that users run and goes on as far as the input lets it; nothing that it is
//! fed may make it panic, run for long or take memory out of proportion. Three things feed the same targets: the bounded run of `cargo test`
//! (`tests/bounded.rs`), the long one of `make soak` (`main.rs`), and libFuzzer (`fuzz/` beside the workspace).

mod files;
#[allow(dead_code, clippy::unwrap_used, reason = "the tests of specquant-model use the rest of it")]
#[path = "../../specquant-model/tests/gguf_writer/mod.rs"]
mod gguf_writer;
mod mutate;
mod seeds;
mod targets;
mod watch;

pub use files::*;
pub use mutate::*;
pub use seeds::*;
pub use targets::*;
pub use watch::*;
