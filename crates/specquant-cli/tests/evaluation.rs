//! `eval ppl --reference`, `eval tasks` and `compare`, run as a user runs them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the lints' exception covers #[test] functions only

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command as StdCommand;

use common::*;
use serde_json::{Value, json};

/// A data directory with two tasks of `n` documents.
fn data(lab: &Lab, n: usize) -> PathBuf {
    let dir = lab.path().join("data");
    fs::create_dir_all(&dir).unwrap();
    let word = |i: usize| ["tide", "mast", "gull", "rope", "storm"][i % 5];
    let piqa = |i: usize| {
        let goal = format!("{} {}", "Why the sea? ".repeat(i % 7), word(i));
        json!({ "goal": goal, "sol1": word(i + 1), "sol2": format!("{} {}", word(i + 2), word(i)), "label": i % 2 })
    };
    let lambada =
        |i: usize| json!({ "text": format!("The {} and the {} of {}", word(i), word(i * 3), word(i + 1)) });
    let lines = |row: &dyn Fn(usize) -> Value| (0..n).map(|i| row(i).to_string() + "\n").collect::<String>();
    fs::write(dir.join("piqa.jsonl"), lines(&piqa)).unwrap();
    fs::write(dir.join("lambada_openai.jsonl"), lines(&lambada)).unwrap();
    dir
}

fn tasks(model: &Path, data: &Path, flags: &[&str]) -> assert_cmd::Command {
    let mut command = specquant();
    command
        .args(["eval", "tasks", "--tasks", "piqa,lambada_openai", "-m"])
        .arg(model)
        .arg("--data")
        .arg(data);
    command.args(flags);
    command
}

fn json_of(command: &mut assert_cmd::Command) -> Value {
    let output = command.assert().success().get_output().clone();
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stdout)))
}

/// The files of a directory whose names start and end so.
fn files(dir: &Path, start: &str, end: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let named = |p: &PathBuf| {
        let name = p.file_name().unwrap().to_str().unwrap();
        name.starts_with(start) && name.ends_with(end)
    };
    let mut found: Vec<_> = all.filter(named).collect();
    found.sort();
    found
}

#[test]
fn tasks_write_lm_evals_files_and_go_on_where_they_stopped() {
    let lab = Lab::new();
    let (model, data) = (lab.model("llama-sharded"), data(&lab, 150));
    let out = lab.out("results");
    let flags = ["-o", out.to_str().unwrap(), "--json"];
    let whole = json_of(&mut tasks(&model, &data, &flags));
    let dir = out.join("llama-sharded");
    let written: Value =
        serde_json::from_slice(&fs::read(&files(&dir, "results_", ".json")[0]).unwrap()).unwrap();
    assert_eq!(written, whole);
    // Every key that lm-eval 0.4.13 writes.
    for key in [
        "results",
        "group_subtasks",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
        "config",
        "git_hash",
        "date",
        "pretty_env_info",
        "transformers_version",
        "task_hashes",
        "model_source",
        "model_name",
        "model_name_sanitized",
        "system_instruction",
        "system_instruction_sha",
        "fewshot_as_multiturn",
        "chat_template",
        "chat_template_sha",
        "total_evaluation_time_seconds",
    ] {
        assert!(whole.get(key).is_some(), "{key}");
    }
    let piqa = &whole["results"]["piqa"];
    assert_eq!((&piqa["alias"], &piqa["sample_len"]), (&json!("piqa"), &json!(150)));
    let samples: Vec<Value> = fs::read_to_string(&files(&dir, "samples_piqa_", ".jsonl")[0])
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(samples.len(), 150);
    for (key, metric) in [("acc,none", "acc"), ("acc_norm,none", "acc_norm")] {
        let mean = samples.iter().map(|s| s[metric].as_f64().unwrap()).sum::<f64>() / 150.0;
        assert!((piqa[key].as_f64().unwrap() - mean).abs() < 1e-12, "{key}: {piqa}");
    }
    assert!(whole["results"]["lambada_openai"]["perplexity,none"].as_f64().unwrap() > 1.0);
    assert!(whole["specquant"]["average_acc_norm_or_acc"]["stderr"].as_f64().unwrap() > 0.0);

    // Half of the journal is lost; without --resume nothing is touched.
    let journal = dir.join("journal.jsonl");
    let bytes = fs::read(&journal).unwrap();
    fs::write(&journal, &bytes[..bytes.len() / 2]).unwrap();
    let mut again = tasks(&model, &data, &flags);
    let stderr = String::from_utf8(again.assert().code(2).get_output().stderr.clone()).unwrap();
    assert!(stderr.contains("--resume") && stderr.contains("journal.jsonl"), "{stderr}");
    let mut resumed = json_of(tasks(&model, &data, &flags).arg("--resume"));
    let mut whole = whole;
    for value in [&mut resumed, &mut whole] {
        value["date"] = json!(0);
        value["total_evaluation_time_seconds"] = json!("");
    }
    assert_eq!(resumed, whole);

    // Another model, policy or data is not mixed in.
    let other = lab.out("other/llama-sharded");
    fs::create_dir_all(other.parent().unwrap()).unwrap();
    fs::rename(lab.model("mistral"), &other).unwrap();
    for (command, words) in [
        (tasks(&other, &data, &flags), "model_sha256"),
        (tasks(&model, &data, &[&flags[..], &["--bos", "never"]].concat()), "bos"),
        (tasks(&model, &self::data(&lab, 10), &flags), "other data"),
    ] {
        let mut command = command;
        let stderr =
            String::from_utf8(command.arg("--resume").assert().code(2).get_output().stderr.clone()).unwrap();
        assert!(stderr.contains(words), "{stderr}");
    }
}

#[test]
fn tasks_say_what_is_wrong_before_they_start() {
    let lab = Lab::new();
    let (model, good) = (lab.model("qwen3"), data(&lab, 4));
    let path = |p: &Path| p.to_str().unwrap().to_owned();
    let with = |data: &Path, flags: &[&str]| {
        let start = ["eval", "tasks", "-m", &path(&model), "--data", &path(data)].map(str::to_owned);
        start.into_iter().chain(flags.iter().map(|f| (*f).to_owned())).collect::<Vec<_>>()
    };
    refuse(
        &lab,
        with(&good, &["--tasks", "piqa,boolq"]),
        &["boolq.jsonl", "missing", "load_dataset('aps/super_glue', 'boolq'"],
    );
    refuse(&lab, with(&good, &["--tasks", "piqa,mmlu"]), &["mmlu", "arc_easy"]);
    refuse(&lab, with(&good, &["--tasks", "piqa", "--shots", "5"]), &["--shots 5", "zero-shot"]);
    refuse(&lab, ["eval", "tasks", "-m", &path(&model)], &["--data", "load_dataset"]);
    refuse(
        &lab,
        with(&good, &["--tasks", "piqa", "--max-length", "2"]),
        &["piqa.jsonl, line 1", "choice 1", "--max-length"],
    );
    let bad = lab.path().join("bad");
    fs::create_dir(&bad).unwrap();
    let row = json!({ "goal": "g", "sol1": "a", "sol2": "b", "label": 0 }).to_string();
    fs::write(bad.join("piqa.jsonl"), format!("{row}\n{}\n", row.replace("sol2", "sol3"))).unwrap();
    refuse(&lab, with(&bad, &["--tasks", "piqa"]), &["piqa.jsonl, line 2", "\"sol2\" is missing", "sol3"]);
    // Only the rows asked for are read.
    specquant().args(with(&bad, &["--tasks", "piqa", "--limit", "1"])).assert().success();
}

#[test]
fn requests_are_dumped_with_their_tokens() {
    let lab = Lab::new();
    let (model, data) = (lab.model("qwen2"), data(&lab, 3));
    let out = lab.out("requests.jsonl");
    tasks(&model, &data, &["--dump-requests", out.to_str().unwrap()]).assert().success().stdout("");
    let text = fs::read_to_string(&out).unwrap();
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 3 * 2 + 3);
    assert_eq!(lines[1]["context"], "Question:  tide\nAnswer:");
    assert_eq!((&lines[1]["continuation"], &lines[1]["choice"]), (&json!(" gull tide"), &json!(1)));
    // A byte a token.
    assert_eq!(lines[1]["context_tokens"].as_array().unwrap().len(), "Question:  tide\nAnswer:".len());
    assert_eq!(lines[8]["continuation"], " rope");
}

#[test]
fn distance_to_a_reference_is_printed() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let four = lab.quantized(&model, "four", &["--recipe", "rtn", "--scheme", "W4A4KV4"]);
    let eight = lab.quantized(&model, "eight", &["--recipe", "rtn", "--scheme", "W8A8KV8"]);
    let text = lab.file("text.txt", TEXT);
    let measure = |path: &Path| {
        let mut command = specquant();
        command.args(["eval", "ppl", "--window", "96", "--text"]).arg(&text).arg("-m").arg(path);
        command.arg("--reference").arg(&model);
        command
    };
    let kl = |path: &Path| json_of(measure(path).arg("--json"))["distance"]["kl"]["mean"].as_f64().unwrap();
    let (four_kl, eight_kl) = (kl(&four), kl(&eight));
    assert!(eight_kl > 0.0 && four_kl > 10.0 * eight_kl, "{four_kl} at 4 bits, {eight_kl} at 8");
    let stdout = String::from_utf8(measure(&eight).assert().success().get_output().stdout.clone()).unwrap();
    for words in ["Δ log-perplexity", "95% interval", "KL divergence mean", "top-1 agreement"] {
        assert!(stdout.contains(words), "{stdout}");
    }
}

fn chromium() -> PathBuf {
    let named = ["chromium", "chromium-browser", "google-chrome"].map(PathBuf::from);
    let candidates = std::env::var_os("CHROMIUM").map(PathBuf::from).into_iter().chain(named);
    let works = |p: &PathBuf| StdCommand::new(p).arg("--version").output().is_ok_and(|o| o.status.success());
    candidates
        .into_iter()
        .find(works)
        .expect("install chromium (Debian: apt-get install chromium), or set CHROMIUM to it")
}

/// The page as a browser sees it in a window of that width.
fn rendered(lab: &Lab, page: &Path, width: u32) -> String {
    let profile = lab.path().join(format!("profile-{width}"));
    let output = StdCommand::new(chromium())
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
        ])
        .args(["--disable-background-networking", "--disable-component-update", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("--window-size={width},2000"))
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn models_and_recipes_are_compared_on_a_page_that_a_browser_shows() {
    let lab = Lab::new();
    let (model, data) = (lab.model("llama-sharded"), data(&lab, 30));
    let text = lab.file("text.txt", TEXT);
    let eight = lab.quantized(&model, "eight <8>", &["--recipe", "rtn", "--scheme", "W8A8KV8"]);
    let out = lab.out("compared");
    let compare_on = |calibration: &str, flags: &[&str]| {
        let mut command = specquant();
        command.arg("compare").arg(&model).arg(&eight).args([
            "--recipes",
            "rtn,gptq",
            "--tasks",
            "piqa,lambada_openai",
        ]);
        command.arg("--text").arg(&text).args(["--window", "96", "--data"]).arg(&data).arg("-o").arg(&out);
        command.arg("--calibration").arg(lab.file(calibration, TEXT));
        command.args(QUICK).args(flags);
        command
    };
    let compare = |flags: &[&str]| compare_on("calibration.txt", flags);
    let result = json_of(compare(&[]).arg("--json"));
    let names: Vec<&str> =
        result["models"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["llama-sharded", "eight <8>", "rtn", "gptq"]);
    assert_eq!(result["pairs"].as_array().unwrap().len(), 6);
    let kl = |m: usize| result["models"][m]["perplexity"]["distance"]["kl"]["mean"].as_f64();
    assert!(kl(0).is_none() && kl(1).unwrap() < kl(2).unwrap(), "{result:#}");
    // The pair's difference is that of the perplexities.
    let ppl = |m: usize| result["models"][m]["perplexity"]["perplexity"].as_f64().unwrap().ln();
    let delta = result["pairs"][1]["delta_log_perplexity"]["mean"].as_f64().unwrap();
    assert!((delta - (ppl(2) - ppl(0))).abs() < 1e-9 && result["pairs"][1]["first"] == "rtn");
    for name in ["llama-sharded", "eight __8__", "rtn", "gptq"] {
        let dir = out.join(name);
        assert_eq!(files(&dir, "results_", ".json").len(), 1, "{name}");
        assert_eq!(files(&dir, "samples_", ".jsonl").len(), 2, "{name}");
    }
    // What is there is not measured again, and not overwritten unasked.
    let stderr = String::from_utf8(compare(&[]).assert().code(2).get_output().stderr.clone()).unwrap();
    assert!(stderr.contains("exists"), "{stderr}");
    let again = json_of(compare_on("moved.txt", &["--resume"]).arg("--json"));
    assert_eq!(again["models"], result["models"]);
    let stderr =
        String::from_utf8(compare(&["--resume", "--seed", "5"]).assert().code(2).get_output().stderr.clone())
            .unwrap();
    assert!(stderr.contains("differs in recipe.seed; remove it"), "{stderr}");

    let markdown = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(markdown.contains("| rtn |") && markdown.contains("piqa acc_norm"), "{markdown}");
    assert!(!markdown.contains(lab.path().to_str().unwrap()), "a path of this machine: {markdown}");
    for file in
        ["perplexity.svg", "accuracy-by-task.svg", "divergence-by-position.svg", "size-against-quality.svg"]
    {
        assert!(markdown.contains(&format!("({file})")), "{markdown}");
        assert!(fs::read_to_string(out.join(file)).unwrap().ends_with("</svg>\n"), "{file}");
    }
    let page = fs::read_to_string(out.join("index.html")).unwrap();
    assert!(!page.contains("http"), "the page asks the network for something");
    // A script in a copy reports what a reader would trip over: text cut off at the right, or charts without marks.
    let probe = "<script>document.body.dataset.found = [document.documentElement.scrollWidth - innerWidth,\
        document.querySelectorAll('svg').length, document.querySelectorAll('svg circle').length,\
        Math.min(...[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width))].join(' ')</script>";
    let copy = lab.file("probe.html", page.replace("</body>", &format!("{probe}</body>")));
    for width in [1280, 390] {
        let dom = rendered(&lab, &copy, width);
        let found = dom.split("data-found=\"").nth(1).unwrap().split('"').next().unwrap();
        let found: Vec<f64> = found.split(' ').map(|n| n.parse().unwrap()).collect();
        println!("{width}: {found:?}");
        assert!(found[0] <= 0.0, "{width}: wider than the window by {}", found[0]);
        // Perplexity 4, accuracy 2 × 4, divergence 3 × 16, size 4.
        assert_eq!((found[1], found[2]), (4.0, 64.0), "{width}");
        assert!(found[3] > 300.0, "{width}: a chart is {} wide", found[3]);
        assert!(dom.contains("eight &lt;8&gt;"));
    }
}

#[test]
fn comparisons_say_what_is_wrong_before_they_start() {
    let lab = Lab::new();
    let model = lab.model("mistral");
    let path = |p: &Path| p.to_str().unwrap().to_owned();
    let text = path(&lab.file("text.txt", TEXT));
    let out = path(&lab.out("compared"));
    let refused = |flags: &[&str], words: &[&str]| {
        refuse(&lab, ["compare", &path(&model), "-o", &out].into_iter().chain(flags.iter().copied()), words)
    };
    let (none, again) = (path(&lab.path().join("none")), path(&model.join(".")));
    refused(&[], &["--text", "--data"]);
    refused(&["--text", &text, "--recipes", "rtn,nosuch"], &["nosuch"]);
    refused(&["--text", &text, &none], &["none"]);
    refused(&["--text", &text, &again], &["twice"]);
    refused(&["--text", &text, "--scheme", "W4A4"], &["--recipes"]);
    for flags in [["--limit", "3"], ["--tasks", "piqa"], ["--shots", "2"]] {
        refused(&[&["--text", &text], &flags[..]].concat(), &["--data"]);
    }
    // Nothing of the user's is overwritten.
    let mine = lab.out("mine");
    fs::create_dir(&mine).unwrap();
    fs::write(mine.join("README.md"), "Mine.").unwrap();
    for flags in [&[][..], &["--resume"]] {
        let args = ["compare", &path(&model), "--text", &text, "-o", &path(&mine)].map(str::to_owned);
        refuse(&lab, args.into_iter().chain(flags.iter().map(|f| (*f).to_owned())), &["mine", "not empty"]);
    }
}

#[test]
fn comparisons_continue_only_what_is_the_same() {
    let lab = Lab::new();
    let (model, other) = (lab.model("llama-sharded"), lab.model("mistral"));
    let data = data(&lab, 5);
    let text = lab.file("text.txt", TEXT);
    let out = lab.out("compared");
    let compare = |model: &Path, flags: &[&str]| {
        let mut command = specquant();
        command.arg("compare").arg(model).arg("-o").arg(&out).args(QUICK).args(flags);
        command
    };
    let on_tasks = ["--recipes", "rtn", "--tasks", "piqa", "--data", data.to_str().unwrap()];
    let on_text = ["--window", "96", "--text", text.to_str().unwrap(), "--recipes", "rtn"];
    compare(&model, &on_tasks).assert().success();
    let fails = |model: &Path, flags: &[&str], words: &str| {
        let output = compare(model, &[flags, &["--resume"]].concat()).assert().code(2).get_output().clone();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(words), "{stderr}");
    };
    // The checkpoint is the first model's.
    fails(&other, &on_tasks, "differs in source_sha256");
    fails(&model, &[&on_tasks[..], &["--bos", "always"]].concat(), "differs in bos");
    compare(&model, &[&on_text[..], &["--resume"]].concat()).assert().success();
    fails(&model, &[&on_text[..], &["--stride", "48"]].concat(), "differs in settings");
    let longer = lab.file("text.txt", TEXT.repeat(2));
    assert_eq!(longer, text);
    fails(&model, &on_text, "differs in token_ids_sha256");
}
