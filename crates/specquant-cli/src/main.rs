//! The `specquant` command: flags, progress and tables around the library crates.
//!
//! Exit codes: 0 success, 1 an integrity check failed, 2 bad input or a failed run, with one message on stderr; 130 after Ctrl-C and 143 after
//! SIGTERM.

mod args;
mod bench;
mod chat;
mod compare;
mod demo;
mod doctor;
mod eval;
mod generate;
mod inspect;
mod interrupt;
mod quantize;
mod reproduce;
mod resources;
mod synth;
mod system;
mod tasks;
mod ui;

use std::process::ExitCode;

use args::{Args, Command};
use clap::Parser;
use interrupt::After;
use specquant_kernels::Isa;
use ui::note;

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    system::give_memory_back();
    let args = Args::parse();
    match run(args) {
        Ok(code) => code,
        // A reader such as `head` that has seen enough is no error.
        Err(e)
            if e.downcast_ref::<std::io::Error>()
                .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) =>
        {
            ExitCode::SUCCESS
        }
        Err(e) => {
            note!("error: {e:#}");
            ExitCode::from(2)
        }
    }
}

/// A wish that cannot be granted is an error, not a benchmark of something else.
fn check_isa() -> anyhow::Result<()> {
    let Some(wish) = std::env::var_os("SPECQUANT_ISA") else { return Ok(()) };
    let available = Isa::available().into_iter().map(Isa::name).collect::<Vec<_>>().join(", ");
    anyhow::ensure!(
        wish.to_string_lossy().trim().eq_ignore_ascii_case(Isa::active().name()),
        "SPECQUANT_ISA={}: this machine has {available}",
        wish.to_string_lossy()
    );
    Ok(())
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    check_isa()?;
    match &args.command {
        // It knows what it writes.
        Command::Quantize(a) if a.dry_run => {}
        Command::Quantize(_) | Command::Compare(_) | Command::Reproduce(_) => {
            interrupt::explain(After::Resume)
        }
        Command::Demo(_) => interrupt::explain(After::Again),
        _ => {}
    }
    match args.command {
        Command::Quantize(a) => quantize::run(*a),
        Command::Eval(a) => eval::run(a),
        Command::Compare(a) => compare::run(*a),
        Command::Reproduce(a) => reproduce::run(a),
        Command::Bench(a) => bench::run(a),
        Command::Generate(a) => generate::run(a),
        Command::Chat(a) => chat::run(a),
        Command::Inspect(a) => inspect::run(a),
        Command::Doctor(a) => doctor::run(a),
        Command::Demo(a) => demo::run(a),
        Command::Synth(a) => synth::run(a),
        Command::Measure(a) => demo::measure(a),
    }
}
