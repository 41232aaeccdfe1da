//! `specquant-fuzz`: the long run of `make soak`, a corpus for libFuzzer, and one input again.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use specquant_fuzz::{Limited, TARGETS, Target, damaged, every_field, execute, target};

#[global_allocator]
static GLOBAL: Limited = Limited;

const USAGE: &str =
    "specquant-fuzz soak SECONDS DIR [TARGET]   feed damaged inputs to every target in turn; finds go to DIR
specquant-fuzz seeds DIR                   write valid inputs to DIR/TARGET, for cargo fuzz
specquant-fuzz run TARGET FILE             feed one input";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args[..] {
        ["soak", seconds, dir] => {
            seconds.parse().map_err(Into::into).and_then(|s| soak(s, dir.as_ref(), &TARGETS))
        }
        ["soak", seconds, dir, name] => match (seconds.parse(), target(name)) {
            (Ok(seconds), Some(target)) => soak(seconds, dir.as_ref(), &[target]),
            _ => Err(USAGE.into()),
        },
        ["seeds", dir] => seeds(dir.as_ref()),
        ["run", name, file] => {
            target(name).ok_or(USAGE.into()).and_then(|target| run(&target, file.as_ref()))
        }
        _ => Err(USAGE.into()),
    };
    match result {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(2)
        }
    }
}

type Finds = Result<usize, Box<dyn std::error::Error>>;

/// Every target for an equal share of the time: first every field and tensor damaged by itself, then inputs that are numbered from the clock, so that
/// no two runs are alike.
fn soak(seconds: u64, dir: &Path, targets: &[Target]) -> Finds {
    let share = Duration::from_secs(seconds) / targets.len() as u32;
    let first = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs() << 24;
    let mut finds = 0;
    for target in targets {
        let (scratch, seeds) = (dir.join("scratch").join(target.name), (target.seeds)());
        std::fs::create_dir_all(&scratch)?;
        let (started, mut executions, mut ran) = (Instant::now(), 0u64, 0u64);
        for input in every_field(seeds).chain((first..).map(|number| damaged(seeds, number))) {
            if started.elapsed() >= share {
                break;
            }
            match execute(target, &scratch, &input) {
                Ok(outcome) => ran += u64::from(outcome.is_ok()),
                Err(find) => {
                    finds += 1;
                    let file = dir.join(format!("{}-{}", target.name, first + executions));
                    std::fs::write(&file, &input)?;
                    println!("{}: {find}", file.display());
                }
            }
            executions += 1;
        }
        let time = started.elapsed().as_secs();
        println!("{}: {executions} inputs in {time} s, {ran} ran, the others were refused", target.name);
    }
    println!("{finds} finds");
    Ok(finds)
}

fn seeds(dir: &Path) -> Finds {
    for target in TARGETS {
        let dir = dir.join(target.name);
        std::fs::create_dir_all(&dir)?;
        for (i, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(dir.join(format!("seed-{i}")), seed)?;
        }
    }
    Ok(0)
}

fn run(target: &Target, file: &Path) -> Finds {
    let dir = tempfile::tempdir()?;
    (target.seeds)();
    match execute(target, dir.path(), &std::fs::read(file)?) {
        Ok(Ok(())) => println!("ran"),
        Ok(Err(e)) => println!("refused: {e}"),
        Err(find) => {
            println!("{find}");
            return Ok(1);
        }
    }
    Ok(0)
}
