//! `specquant generate`.

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::json;
use specquant_model::{Model, Sampler, Sampling, generate};

use crate::args::{GenerateArgs, SamplingArgs};
use crate::system;
use crate::ui::note;

/// The sampler that the flags describe.
pub fn sampling(args: &SamplingArgs) -> anyhow::Result<Sampling> {
    anyhow::ensure!(args.temperature >= 0.0, "--temperature {}: give 0 or more", args.temperature);
    anyhow::ensure!(args.top_p > 0.0 && args.top_p <= 1.0, "--top-p {}: give a number in (0, 1]", args.top_p);
    Ok(Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed })
}

pub fn run(args: GenerateArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.model.threads)?;
    let sampling = sampling(&args.sampling)?;
    let source = args.model.open()?;
    let tokenizer = source.tokenizer()?;
    let prompt = tokenizer.encode(&args.prompt, true)?;
    anyhow::ensure!(!prompt.is_empty(), "--prompt is empty; give some text to continue");
    let mut model = Model::load_for_decoding(&source)?;
    model.set_any_order(true);
    let (mut out, mut decode) = (std::io::stdout(), tokenizer.decoder(true));
    let (mut ids, mut text, mut failure) = (Vec::new(), String::new(), None);
    let started = Instant::now();
    let mut first = started;
    let mut sequence = model.sequence();
    generate(
        &model,
        &mut sequence,
        &prompt,
        args.sampling.max_new_tokens,
        &mut Sampler::new(sampling),
        |id| {
            // The prompt is shown once the model turns out to be able to continue it.
            let before = if ids.is_empty() { args.prompt.as_str() } else { "" };
            if ids.is_empty() {
                first = Instant::now();
            }
            ids.push(id);
            let ends = model.config.eos_token_ids.contains(&id);
            let news = if ends { Ok(None) } else { decode(id) };
            let shown = news.map_err(anyhow::Error::from).and_then(|news| {
                let news = news.unwrap_or_default();
                if !args.json {
                    write!(out, "{before}{news}")?;
                    out.flush()?;
                }
                text.push_str(&news);
                Ok(())
            });
            failure = shown.err();
            failure.is_none() && !ends
        },
    )?;
    if let Some(e) = failure {
        return Err(e);
    }
    if ids.is_empty() && !args.json {
        write!(out, "{}", args.prompt)?;
    }
    let prefill = prompt.len() as f64 / (first - started).as_secs_f64();
    let decode_rate = ids.len().saturating_sub(1) as f64 / first.elapsed().as_secs_f64();
    if args.json {
        let result = json!({
            "text": text, "token_ids": ids, "prompt_tokens": prompt.len(),
            "prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode_rate,
        });
        writeln!(out, "{result:#}")?;
    } else {
        writeln!(out)?;
        note!("[prefill {prefill:.1} tokens/s, decode {decode_rate:.1} tokens/s]");
    }
    Ok(ExitCode::SUCCESS)
}
