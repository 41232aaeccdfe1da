//! `specquant demo`: quantize, then measure the original and the result, each in a process of its own.

use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::json;
use specquant_eval::{Protocol, perplexity};
use specquant_kernels::kernel_name;
use specquant_model::{Levels, Model, Sampler, Sampling, generate};
use specquant_quantize as q;

use crate::args::{DemoArgs, MeasureArgs};
use crate::quantize::{Checked, Wanted};
use crate::system::{self, human};
use crate::ui::{Progress, table};

/// Written for this purpose; in no training or calibration set.
const TEXT: &str = include_str!("../../../assets/demo-text.txt");
/// Tokens of an evaluation window.
const WINDOW: usize = 512;
/// Tokens of the speed measurement: a prompt, then decoding.
const PREFILL_TOKENS: usize = 512;
const DECODE_TOKENS: usize = 48;
const PROMPT: &str = "The tide rises and falls because";

/// What is measured of a model.
#[derive(Serialize, Deserialize)]
struct Measurement {
    perplexity: f64,
    stderr: f64,
    tokens: usize,
    prefill: f64,
    decode: f64,
    rss: Option<u64>,
    kernel: String,
    sample: String,
}

pub fn measure(args: MeasureArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.model.threads)?;
    let source = args.model.open()?;
    let tokenizer = source.tokenizer()?;
    let mut model = Model::load_for_decoding(&source)?;
    model.set_any_order(true);
    let greedy = || Sampler::new(Sampling::GREEDY);
    let prompt = tokenizer.encode(PROMPT, true)?;
    let mut sample = Vec::new();
    generate(&model, &mut model.sequence(), &prompt, 40, &mut greedy(), |id| {
        sample.push(id);
        !model.config.eos_token_ids.contains(&id)
    })?;

    let ids = tokenizer.encode(TEXT, true)?;
    let speed_ids = &ids[..PREFILL_TOKENS.min(ids.len())];
    let mut sequence = model.sequence();
    let started = Instant::now();
    model.next_logits(&mut [(&mut sequence, speed_ids)])?;
    let prefill = speed_ids.len() as f64 / started.elapsed().as_secs_f64();
    let started = Instant::now();
    generate(&model, &mut sequence, &ids[..1], DECODE_TOKENS, &mut greedy(), |_| true)?;
    let decode = DECODE_TOKENS as f64 / started.elapsed().as_secs_f64();
    // Memory while decoding: weights, cache and working space, before the evaluation's windows.
    let rss = system::rss();
    // As everywhere.
    model.set_any_order(false);
    let mut progress = Progress::new("evaluating", 1, false);
    let protocol = Protocol { window: WINDOW, ..Protocol::default() };
    let result = perplexity(&model, &ids, &protocol, None, &mut |done, of, so_far| {
        if done == 1 {
            progress = Progress::new("evaluating", of as u64, false);
        }
        progress.set(done as u64, &format!("perplexity {so_far:.3}"));
    })?;
    let scheme = model.quantization.as_ref().map(|q| q.scheme);
    let measurement = Measurement {
        perplexity: result.perplexity,
        stderr: result.stderr,
        tokens: result.tokens,
        prefill,
        decode,
        rss,
        kernel: scheme.map_or("dense f32".to_owned(), |s| {
            kernel_name(s.act_bits, s.weight_bits, s.levels == Levels::Gaussian)
        }),
        sample: tokenizer.decode(&sample, true)?,
    };
    writeln!(std::io::stdout(), "{}", json!(measurement))?;
    Ok(ExitCode::SUCCESS)
}

/// Measures a model in a new process, so that its memory is its own.
fn measure_apart(model: &Path, threads: Option<usize>) -> anyhow::Result<Measurement> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("measure").arg("-m").arg(model);
    if let Some(n) = threads {
        command.arg("--threads").arg(n.to_string());
    }
    let output =
        command.stderr(std::process::Stdio::inherit()).output().context("cannot start the measurement")?;
    anyhow::ensure!(output.status.success(), "measuring {} failed", model.display());
    Ok(serde_json::from_slice(&output.stdout)?)
}

pub fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    // A demo that was interrupted goes on, unless it was another.
    let unfinished = q::Unfinished::Resume;
    let mut checked = Checked::new(Wanted {
        model: &args.model,
        recipe: &args.recipe,
        overrides: &args.overrides,
        destination: q::Destination { unfinished, ..q::Destination::replacing(&args.output) },
        ignore_memory: args.ignore_memory,
        quiet: false,
    })?;
    let quantizing = Instant::now();
    let report = match checked.run() {
        Err(e) if matches!(e.downcast_ref(), Some(q::Error::Differs { .. })) => {
            checked.destination.unfinished = q::Unfinished::Discard;
            checked.run()
        }
        result => result,
    }?;
    let quantizing = quantizing.elapsed().as_secs_f64();
    let (source, recipe, plan) = checked.into_parts();
    let c = source.config();
    let embedded = c.vocab_size * c.hidden_size * if c.tie_word_embeddings { 1 } else { 2 };
    let f16_bytes = 2 * (plan.weights + embedded) as u64;
    drop(source);

    let (full, small) =
        (measure_apart(&args.model, recipe.threads)?, measure_apart(&args.output, recipe.threads)?);
    let row = |name: String, m: &Measurement, bits: String, size: String| {
        vec![
            name,
            format!("{:.3} ± {:.2}", m.perplexity, m.stderr),
            bits,
            size,
            m.rss.map_or("-".to_owned(), human),
            format!("{:.0}", m.prefill),
            format!("{:.1}", m.decode),
            m.kernel.clone(),
        ]
    };
    let head =
        ["model", "perplexity", "bits/weight", "checkpoint", "memory", "prefill t/s", "decode t/s", "kernel"];
    let rows = vec![
        head.map(str::to_owned).to_vec(),
        row("source, in f32".to_owned(), &full, "16".to_owned(), format!("{} (f16)", human(f16_bytes))),
        row(
            format!("{} {}", recipe.name, recipe.scheme),
            &small,
            format!("{:.3}", report.bits_per_weight),
            human(report.tensor_bytes),
        ),
    ];
    let mut out = std::io::stdout();
    writeln!(out, "\n{}", table(&rows))?;
    writeln!(
        out,
        "perplexity: assets/demo-text.txt, {} tokens in windows of {WINDOW}, ± standard error; calibration: {}",
        small.tokens,
        recipe
            .calibration
            .file
            .as_ref()
            .map_or("text written by the model itself".to_owned(), |f| f.display().to_string()),
    )?;
    writeln!(
        out,
        "bits/weight: linear layers of the blocks, scales and branches counted; the source (GGUF: its own rounding included) runs in f32"
    )?;
    writeln!(
        out,
        "memory: resident while decoding; speed: {PREFILL_TOKENS} tokens of prompt, then {DECODE_TOKENS} decoded, one sequence\n"
    )?;
    for (name, m) in [("source, in f32", &full), ("quantized", &small)] {
        writeln!(out, "[{name}] {PROMPT}{}\n", m.sample)?;
    }
    writeln!(
        out,
        "quantized in {quantizing:.0} s, demo in {:.0} s, peak memory of the quantizer {}; the model is in {}",
        started.elapsed().as_secs_f64(),
        system::peak_rss().map_or("unknown".to_owned(), human),
        args.output.display()
    )?;
    writeln!(out, "talk to it: specquant chat -m {}", args.output.display())?;
    Ok(ExitCode::SUCCESS)
}
