//! `specquant reproduce` on a small model: every configuration, the whole report.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the lints' exception covers #[test] functions only

mod common;

use std::fs;
use std::path::Path;

use common::{Lab, TEXT, refuse, specquant, tree};

/// Enough tokens for two windows of 2048; the tokenizer has little more than a token a byte.
fn text(lab: &Lab, name: &str) -> std::path::PathBuf {
    lab.file(name, TEXT.repeat(14))
}

fn reproduce(lab: &Lab, out: &Path, flags: &[&str]) -> assert_cmd::Command {
    let mut command = specquant();
    let (text, calibration) = (text(lab, "text.txt"), text(lab, "calibration.txt"));
    command.arg("reproduce").arg(lab.path().join("models/llama-sharded")).arg("--text").arg(text);
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/tasks");
    command.args(["--data", data, "--limit", "2"]);
    command
        .arg("--calibration")
        .arg(calibration)
        .args(["--quick", "--threads", "2", "-o"])
        .arg(out)
        .args(flags);
    command
}

#[test]
fn the_report_is_whole_and_an_interrupted_run_goes_on() {
    let lab = Lab::new();
    lab.model("llama-sharded");
    let out = lab.out("report");
    reproduce(&lab, &out, &[]).assert().success();
    let readme = fs::read_to_string(out.join("README.md")).unwrap();
    let row = |start: &str| readme.lines().any(|l| l.starts_with(&format!("| {start} |")));
    // Those that take several scores, and permuted models, are for the whole run.
    let claims = (1..=12).filter(|i| ![6, 11].contains(i));
    for start in claims.map(|i| format!("T{i}")).chain(["H1", "L1"].map(str::to_owned)) {
        assert!(row(&start), "claim {start}: {readme}");
    }
    for start in [
        "source, in f32",
        "rtn",
        "smoothquant",
        "gptq",
        "quarot",
        "smooth-gptq",
        "specquant",
        "fourier",
        "rows",
    ] {
        assert!(row(start), "{start}: {readme}");
    }
    assert!(readme.contains("over the first 18 of"), "{readme}");
    assert!(!readme.contains("NaN") && !readme.contains(lab.path().to_str().unwrap()), "{readme}");
    // Every figure that is shown is there, and is drawn.
    let shown: Vec<&str> = readme
        .split("](")
        .skip(1)
        .filter_map(|l| l.split(')').next())
        .filter(|l| l.ends_with(".svg"))
        .collect();
    assert_eq!(shown.len(), 7, "{shown:?}");
    for file in &shown {
        let svg = fs::read_to_string(out.join(file)).unwrap();
        assert!(
            svg.starts_with("<svg xmlns") && svg.contains("<polyline") && !svg.contains("NaN"),
            "{file}: {svg}"
        );
    }
    // No checkpoint stays.
    let entries: Vec<_> = fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(entries.len(), 4, "{entries:?}");

    // What is missing or damaged is measured again, to the same figures; the rest is not.
    let before = tree(&out);
    let measured = |name: &str| {
        let entries = fs::read_dir(out.join("measurements")).unwrap().map(|e| e.unwrap().path());
        let file = |p: &std::path::PathBuf| p.file_name().unwrap().to_str().unwrap().to_owned();
        entries.into_iter().find(|p| file(p).starts_with(name) && !file(p).contains("tasks")).unwrap()
    };
    let (gone, cut) = (measured("gptq-W4A4KV4-"), measured("rtn-W4A4KV16-"));
    fs::remove_file(&gone).unwrap();
    fs::write(&cut, "{").unwrap();
    let output = reproduce(&lab, &out, &["--resume"]).assert().success().get_output().stderr.clone();
    let stderr = String::from_utf8(output).unwrap();
    assert_eq!(stderr.lines().filter(|l| l.contains("perplexity")).count(), 2, "{stderr}");
    // Times differ: those of quantization are lines of the measurements, and a column of the report's first table.
    let timeless = |text: &[u8]| {
        let text = String::from_utf8_lossy(text).into_owned();
        let (claims, _) = text.split_once("## Methods").unwrap_or((&text, ""));
        claims.lines().filter(|l| !l.contains("seconds")).collect::<Vec<_>>().join("\n")
    };
    let after = tree(&out);
    assert_eq!(before.len(), after.len());
    for ((path, was), (same, is)) in before.iter().zip(&after) {
        assert_eq!(path, same);
        assert!(timeless(was) == timeless(is), "{}", path.display());
    }
    // Other conditions are other measurements, and a directory is taken up only if asked.
    let output =
        reproduce(&lab, &out, &["--resume", "--windows", "1"]).assert().success().get_output().stderr.clone();
    let stderr = String::from_utf8(output).unwrap();
    assert!(stderr.lines().filter(|l| l.contains("perplexity")).count() > 20, "{stderr}");
    let output = reproduce(&lab, &out, &[]).assert().code(2).get_output().stderr.clone();
    assert!(String::from_utf8(output).unwrap().contains("--resume"));
}

#[test]
fn what_is_wrong_is_said_before_anything_is_measured() {
    let lab = Lab::new();
    lab.model("llama-sharded");
    let path = |p: &Path| p.to_str().unwrap().to_owned();
    let model = path(&lab.path().join("models/llama-sharded"));
    let (long, short) = (path(&text(&lab, "long.txt")), path(&lab.file("short.txt", TEXT)));
    let (out, full) = (path(&lab.out("report")), path(&lab.out("precious")));
    fs::create_dir(&full).unwrap();
    // Under the name that the command's own checkpoint would have.
    fs::create_dir(Path::new(&full).join("checkpoint")).unwrap();
    fs::write(Path::new(&full).join("checkpoint/precious"), "x").unwrap();
    let refused = |text: &str, calibration: &str, out: &str, words: &[&str]| {
        refuse(&lab, ["reproduce", &model, "--text", text, "--calibration", calibration, "-o", out], words)
    };
    refused(&short, &long, &out, &["2048"]);
    refused("none.txt", &long, &out, &["none.txt"]);
    refused(&long, "none.txt", &out, &["none.txt"]);
    refused(&long, &long, &full, &["not empty"]);
}
