//! `specquant synth`.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use specquant_bench::{ARCHS, synthesize};

use crate::args::SynthArgs;
use crate::system::human;

pub fn run(args: SynthArgs) -> anyhow::Result<ExitCode> {
    let names = ARCHS.map(|arch| arch.name).join(", ");
    let arch = ARCHS.iter().find(|arch| arch.name == args.arch);
    let arch = arch.with_context(|| format!("--arch {}: choose one of {names}", args.arch))?;
    let layers = args.layers.unwrap_or(arch.layers);
    anyhow::ensure!((1..=1000).contains(&layers), "--layers {layers}: choose 1 to 1000");
    let output = &args.output;
    anyhow::ensure!(output.file_name().is_some(), "{} is not the name of a directory", output.display());
    anyhow::ensure!(
        output.symlink_metadata().is_err(),
        "{} exists already; choose another -o",
        output.display()
    );
    let bytes = synthesize(arch, layers, args.seed, output)
        .with_context(|| format!("{} cannot be written", output.display()))?;
    writeln!(std::io::stdout(), "wrote {}: {layers} layers, {} of tensors", output.display(), human(bytes))?;
    Ok(ExitCode::SUCCESS)
}
