//! The binary, killed at random moments, interrupted, and refused by the disk: what lies there is whole or recognizably unfinished, and
//! `--resume` comes to the bytes of an undisturbed run. `SPECQUANT_KILLS` sets the number of kills.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the lints' exception covers #[test] functions only

mod common;

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::*;

/// Long enough to be hit: the model writes its text, and is tuned.
const FLAGS: [&str; 10] = [
    "--recipe",
    "tuned.toml",
    "--samples",
    "4",
    "--sequence-length",
    "64",
    "--search-tokens",
    "32",
    "--threads",
    "2",
];
const RECIPE: &str = "name = 'tuned'\nkv_center = true\nsearch_act_clip = true\n\
    [scheme]\nweight_bits = 4\nact_bits = 4\nkv_bits = 4\nlevels = 'gaussian'\n\
    [rotate]\nkind = 'hadamard'\nresidual = false\n\
    [input]\nrotation = 'dct'\nkeep = 4\n\
    [rounding]\nkind = 'gptq'\n\
    [learn]\nmethod = 'tune'\nsteps = 40\n";

struct Runs {
    lab: Lab,
    model: PathBuf,
}

impl Runs {
    fn new() -> Runs {
        let lab = Lab::new();
        let model = lab.model("llama-sharded");
        lab.file("tuned.toml", RECIPE);
        Runs { lab, model }
    }

    fn command(&self, out: &Path, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_specquant"));
        command.current_dir(self.lab.path()).arg("quantize").arg("-m").arg(&self.model).arg("-o").arg(out);
        command.args(FLAGS).args(flags).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn whole(&self) -> (PathBuf, Duration) {
        let (out, started) = (self.lab.out("whole"), Instant::now());
        assert!(self.command(&out, &[]).status().unwrap().success());
        (out, started.elapsed())
    }
}

fn stderr(child: Child) -> (std::process::ExitStatus, String) {
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8(output.stderr).unwrap())
}

fn partial(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap().to_owned();
    name.push(".partial");
    out.with_file_name(name)
}

/// Whole, or not there and what is beside it says that it is unfinished.
fn assert_whole_or_unfinished(out: &Path, whole: &Path) {
    if out.exists() {
        // Killed between its name and the end, it may still hold the state.
        let state = out.join(".specquant-unfinished");
        if !state.exists() {
            assert_same(out, whole);
        }
        specquant().arg("inspect").arg(out).assert().success();
    } else if partial(out).exists() {
        let empty = fs::read_dir(partial(out)).unwrap().next().is_none();
        assert!(empty || partial(out).join(".specquant-unfinished").exists());
    }
}

/// A generator good enough to choose moments.
fn random(state: &mut u64) -> f64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 11) as f64 / (1u64 << 53) as f64
}

#[test]
fn killed_at_random_moments() {
    let kills = std::env::var("SPECQUANT_KILLS").map_or(5, |n| n.parse().unwrap());
    let runs = Runs::new();
    let (whole, took) = runs.whole();
    let (mut seed, mut hit, mut round) = (7, 0, 0);
    while hit < kills {
        let out = runs.lab.out(&format!("killed{round}"));
        round += 1;
        // Every run is killed again and again until it gets to its end.
        while !out.exists() {
            let mut child = runs.command(&out, &["--resume"]).spawn().unwrap();
            std::thread::sleep(took.mul_f64(random(&mut seed)));
            let _ = child.kill();
            let (status, stderr) = stderr(child);
            match status.signal() {
                Some(_) => hit += 1,
                None => assert!(status.success(), "{stderr}"),
            }
            assert_whole_or_unfinished(&out, &whole);
            if hit >= kills {
                break;
            }
        }
        if !out.exists() || out.join(".specquant-unfinished").exists() {
            let output = runs.command(&out, &["--resume"]).output().unwrap();
            let message = String::from_utf8_lossy(&output.stderr);
            // Only in the very last moment nothing is left that tells whose the checkpoint is.
            assert!(output.status.success() || message.contains("nothing is left to resume"), "{message}");
        }
        assert_same(&out, &whole);
        assert!(!partial(&out).exists());
    }
    println!("{hit} kills in {round} runs of {took:?}");
}

/// Where a run says what it has reached.
fn progress(out: &Path) -> PathBuf {
    partial(out).join(".specquant-unfinished/progress.json")
}

/// Waits until something is committed.
fn wait_for_progress(out: &Path) {
    let progress = progress(out);
    let started = Instant::now();
    while !progress.exists() {
        assert!(started.elapsed() < Duration::from_secs(60), "no progress");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn send(child: &Child, signal: &str) {
    assert!(Command::new("kill").arg(signal).arg(child.id().to_string()).status().unwrap().success());
}

#[test]
fn signals_locks_and_changes() {
    let runs = Runs::new();
    let (whole, _) = runs.whole();
    let out = runs.lab.out("stopped");
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        // From the beginning: what is committed is then this run's, which therefore has the lock.
        let _ = fs::remove_dir_all(partial(&out));
        let child = runs.command(&out, &["--resume"]).spawn().unwrap();
        wait_for_progress(&out);
        // A second run must not write there. Stopped, the first cannot finish meanwhile.
        send(&child, "-STOP");
        let second = runs.command(&out, &["--overwrite"]).output().unwrap();
        let message = String::from_utf8(second.stderr).unwrap();
        assert_eq!(second.status.code(), Some(2), "{message}");
        assert!(message.contains("another run is writing"), "{message}");
        send(&child, signal);
        send(&child, "-CONT");
        let (status, stderr) = stderr(child);
        assert_eq!(status.code(), Some(code), "{stderr}");
        assert!(stderr.contains("To continue") && stderr.contains("--resume"), "{stderr}");
    }
    let refused = |flags: &[&str]| {
        let output = runs.command(&out, flags).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let message = refused(&[]);
    assert!(message.contains("--resume") && message.contains("--overwrite"), "{message}");
    let message = refused(&["--resume", "--seed", "5", "--keep", "3"]);
    assert!(message.contains("differs in recipe.input.keep, recipe.seed;"), "{message}");
    assert!(runs.command(&out, &["--resume"]).status().unwrap().success());
    assert_same(&out, &whole);
    let message = refused(&["--resume"]);
    assert!(message.contains("nothing is left to resume"), "{message}");
}

/// Killed when the checkpoint has its name and holds the state still: the same run tidies up, and another leaves everything as it is.
#[test]
fn killed_behind_the_rename() {
    let runs = Runs::new();
    let (whole, _) = runs.whole();
    let out = runs.lab.out("named");
    let mut child = runs.command(&out, &[]).spawn().unwrap();
    wait_for_progress(&out);
    child.kill().unwrap();
    child.wait().unwrap();
    let reached = fs::read(progress(&out)).unwrap();
    assert!(runs.command(&out, &["--resume"]).status().unwrap().success());
    let state = out.join(".specquant-unfinished");
    fs::create_dir(&state).unwrap();
    fs::write(state.join("progress.json"), &reached).unwrap();
    let output = |flags: &[&str]| {
        let output = runs.command(&out, flags).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, message) = output(&["--resume", "--seed", "5"]);
    assert!(code == Some(2) && message.contains("nothing is left to resume"), "{message}");
    assert!(state.join("progress.json").exists());
    let (code, message) = output(&["--resume"]);
    assert_eq!(code, Some(0), "{message}");
    assert_same(&out, &whole);
    assert!(!partial(&out).exists());
    // In the very last moment an empty directory is all that is left.
    fs::create_dir(&state).unwrap();
    let (code, message) = output(&["--resume"]);
    assert!(code == Some(2) && message.contains("nothing is left to resume"), "{message}");
    assert_same(&out, &whole);
}

/// A file that may not grow further is how a full disk looks to the one who writes.
#[test]
fn refused_by_the_disk() {
    let runs = Runs::new();
    let (whole, _) = runs.whole();
    let mut sizes: Vec<u64> = tree(&whole).iter().map(|(_, bytes)| bytes.len() as u64).collect();
    sizes.sort_unstable();
    let largest = sizes[sizes.len() - 1];
    for (i, bytes) in [1024, largest / 4, largest / 2, largest - 1024].into_iter().enumerate() {
        let out = runs.lab.out(&format!("full{i}"));
        let mut command = Command::new("sh");
        let inner = runs.command(&out, &["--resume"]);
        // In blocks of 512 bytes; ignored, the signal becomes the error EFBIG.
        let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", bytes / 512);
        command.arg0("sh").args(["-c", &script, "sh"]).arg(inner.get_program()).args(inner.get_args());
        let output = command.current_dir(runs.lab.path()).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("cannot be written") && message.matches("error:").count() == 1, "{message}");
        assert_whole_or_unfinished(&out, &whole);
        assert!(!out.exists());
        let kept = partial(&out).exists();
        assert_eq!(kept, message.contains("add --resume"), "{message}");
        assert!(runs.command(&out, &["--resume"]).status().unwrap().success());
        assert_same(&out, &whole);
    }
}

/// A file system in memory; none without the right to mount one.
struct Tmpfs(PathBuf);

impl Tmpfs {
    const BYTES: usize = 64 << 20;

    fn mount(at: PathBuf) -> Option<Tmpfs> {
        fs::create_dir(&at).unwrap();
        let size = format!("size={}", Tmpfs::BYTES);
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&at).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Tmpfs(at))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A file system that is really full, at four stages of the run.
#[test]
fn no_space_left() {
    let runs = Runs::new();
    let Some(disk) = Tmpfs::mount(runs.lab.path().join("disk")) else {
        println!("skipped: no tmpfs can be mounted; run this as root");
        return;
    };
    let (whole, _) = runs.whole();
    let total: usize = tree(&whole).iter().map(|(_, bytes)| bytes.len().next_multiple_of(4096)).sum();
    for (i, free) in [16384, total / 3, total * 2 / 3, total - 4096].into_iter().enumerate() {
        let (out, filler) = (disk.0.join(format!("full{i}")), disk.0.join("filler"));
        fs::write(&filler, vec![0; Tmpfs::BYTES - free]).unwrap();
        let refused = runs.command(&out, &["--resume"]).output().unwrap();
        let message = String::from_utf8(refused.stderr).unwrap();
        assert!(message.contains("of disk space, and") && !partial(&out).exists(), "{message}");
        // As if an earlier run had written nearly all of it: the file has that size and takes no room.
        fs::create_dir_all(partial(&out).join(".specquant-unfinished")).unwrap();
        fs::File::create(partial(&out).join("old")).unwrap().set_len(1 << 30).unwrap();
        let output = runs.command(&out, &["--resume"]).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("No space left on device"), "{message}");
        assert!(message.matches("error:").count() == 1, "{message}");
        assert_whole_or_unfinished(&out, &whole);
        assert!(!out.exists());
        assert_eq!(partial(&out).exists(), message.contains("add --resume"), "{message}");
        fs::remove_file(&filler).unwrap();
        assert!(runs.command(&out, &["--resume"]).status().unwrap().success());
        assert_same(&out, &whole);
        fs::remove_dir_all(&out).unwrap();
    }
}

/// Every flush of a run fails once, and the disk is full behind every eighth of what it writes: a library that is preloaded does that to the binary.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn every_flush_and_any_write_may_fail() {
    let runs = Runs::new();
    let text = runs.lab.file("text.txt", TEXT);
    let faults = runs.lab.path().join("faults.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults/preload.rs");
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition", "2024", "--crate-type", "cdylib", source, "-o"]).arg(&faults);
    assert!(rustc.status().unwrap().success());
    let command = |out: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_specquant"));
        command.args(["quantize", "--resume", "--recipe", "gptq", "--calibration"]).arg(&text);
        command.args(&FLAGS[2..]).arg("-m").arg(&runs.model).arg("-o").arg(out);
        command
    };
    let whole = runs.lab.out("whole");
    assert!(command(&whole).output().unwrap().status.success());
    let bytes: usize = tree(&whole).iter().map(|(_, content)| content.len()).sum();
    // Whether a run was there to fail so late.
    let fails = |kind: &str, at: usize, why: &str| {
        let out = runs.lab.out(&format!("{kind}{at}"));
        let output = command(&out).env("LD_PRELOAD", &faults).env(kind, at.to_string()).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        let failed = !output.status.success();
        if failed {
            assert_eq!(output.status.code(), Some(2), "{kind}={at}: {message}");
            assert!(
                message.contains(why) && message.matches("error:").count() == 1,
                "{kind}={at}: {message}"
            );
            assert_whole_or_unfinished(&out, &whole);
            let again = partial(&out).exists();
            assert_eq!(again, message.contains("add --resume"), "{kind}={at}: {message}");
            let output = command(&out).output().unwrap();
            assert!(output.status.success(), "{kind}={at}: {}", String::from_utf8_lossy(&output.stderr));
        }
        assert_same(&out, &whole);
        assert!(!partial(&out).exists());
        fs::remove_dir_all(&out).unwrap();
        failed
    };
    // A directory's is missed without harm, so that the first that does no harm is not the last.
    let flushes: Vec<bool> = (1..=50).map(|n| fails("FAULT_FSYNC", n, "Input/output error")).collect();
    assert!(!flushes[40..].contains(&true), "there are more: {flushes:?}");
    let flushes = flushes.iter().filter(|failed| **failed).count();
    let writes = (0..).take_while(|n| fails("FAULT_WRITE", n * bytes / 8, "No space left on device")).count();
    println!("{flushes} flushes and {writes} writes failed");
    assert!(flushes > 8 && writes > 8);
}

/// `compare --resume` and `demo` continue the quantization that they were killed in.
#[test]
fn compare_and_demo_resume() {
    let runs = Runs::new();
    let (whole, _) = runs.whole();
    let text = runs.lab.file("text.txt", TEXT);
    let (model, text, dir) = (runs.model.to_str().unwrap(), text.to_str().unwrap(), runs.lab.out("compared"));
    let (compared, demo) = (dir.to_str().unwrap(), runs.lab.out("demo"));
    let compare = ["compare", model, "--text", text, "--window", "96", "-o", compared, "--recipes", FLAGS[1]];
    let demo_args = ["demo", "-m", model, "-o", demo.to_str().unwrap(), "--recipe", FLAGS[1]];
    for (args, resume, out) in
        [(&compare[..], "--resume", dir.join("checkpoints/tuned")), (&demo_args[..], "", demo.clone())]
    {
        let command = |more: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_specquant"));
            command.current_dir(runs.lab.path()).args(args).args(&FLAGS[2..]);
            command.args((!more.is_empty()).then_some(more)).stdout(Stdio::null()).stderr(Stdio::piped());
            command
        };
        let mut child = command("").spawn().unwrap();
        wait_for_progress(&out);
        child.kill().unwrap();
        let (status, message) = stderr(child);
        assert_eq!(status.signal(), Some(9), "{message}");
        assert!(!out.exists() && progress(&out).exists());
        // It is read, and not begun anew: damaged, it is refused.
        let reached = fs::read(progress(&out)).unwrap();
        fs::write(progress(&out), "{").unwrap();
        let refused = command(resume).output().unwrap();
        let message = String::from_utf8(refused.stderr).unwrap();
        assert!(refused.status.code() == Some(2) && message.contains("cannot be read"), "{message}");
        fs::write(progress(&out), reached).unwrap();
        let output = command(resume).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_same(&out, &whole);
    }
}
