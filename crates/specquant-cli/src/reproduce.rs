//! `specquant reproduce`.

use std::io::Write;
use std::process::ExitCode;

use specquant_model::Source;
use specquant_reproduce::{Event, Settings, reproduce};

use crate::args::ReproduceArgs;
use crate::system;
use crate::ui::{Progress, command};

pub fn run(args: ReproduceArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.threads)?;
    let source = Source::open(&args.model)?;
    let settings = Settings {
        windows: args.windows.unwrap_or(if args.quick { 2 } else { 8 }),
        text: args.text,
        data: args.data,
        limit: args.limit,
        calibration: args.calibration,
        quick: args.quick,
        output: args.output,
        resume: args.resume,
        command: command(),
    };
    let mut progress: Option<Progress> = None;
    let report = reproduce(&source, &settings, &mut |Event { done, of, stored, news }| {
        let progress = progress.get_or_insert_with(|| Progress::new("measured", of as u64, false));
        if stored {
            progress.skip(done as u64);
        } else {
            progress.step(done as u64, news);
        }
    })?;
    drop(progress);
    writeln!(std::io::stdout(), "wrote {}", report.display())?;
    Ok(ExitCode::SUCCESS)
}
