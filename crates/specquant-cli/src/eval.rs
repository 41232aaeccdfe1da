//! `specquant eval`.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use serde_json::json;
use specquant_eval::{Error, Protocol, perplexity};
use specquant_model::Source;

use crate::args::{EvalArgs, EvalCommand, PplArgs};
use crate::system;
use crate::ui::Progress;

pub fn run(args: EvalArgs) -> anyhow::Result<ExitCode> {
    match args.what {
        EvalCommand::Ppl(args) => ppl(args),
        EvalCommand::Tasks(args) => crate::tasks::run(args),
    }
}

fn ppl(args: PplArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.model.threads)?;
    let text = specquant_model::read_text(&args.text)
        .map_err(anyhow::Error::msg)
        .with_context(|| format!("evaluation text {}", args.text.display()))?;
    let source = Source::open(&args.model.model)?;
    let model = system::load_for_decoding(&source)?;
    let ids = source.tokenizer()?.encode(&text, true)?;
    let protocol = Protocol { window: args.window, max_windows: args.windows };
    let mut progress = Progress::new("window", 0, args.json);
    let result = perplexity(&model, &ids, &protocol, &mut |done, of, so_far| {
        if done == 1 {
            progress = Progress::new("window", of as u64, args.json);
        }
        progress.step(done as u64, &format!("perplexity {so_far:.4}"));
    })
    .or_else(|e| match e {
        // The weights, which are not checked when they are used, can say where.
        Error::NotFinite { .. } => source.check_finite().map_err(anyhow::Error::from).and(Err(e.into())),
        Error::TooShort { .. } => Err(e).with_context(|| format!("evaluation text {}", args.text.display())),
        e => Err(e.into()),
    })?;
    drop(progress);
    let scheme = model.quantization.as_ref().map(|q| q.scheme.to_string());
    let mut out = std::io::stdout();
    if args.json {
        let mut value = json!(result);
        value["model"] = json!(args.model.model);
        value["scheme"] = json!(scheme);
        writeln!(out, "{value:#}")?;
    } else {
        writeln!(
            out,
            "perplexity {:.5} ± {:.5} over {} tokens",
            result.perplexity, result.stderr, result.tokens
        )?;
        writeln!(
            out,
            "model {} ({})",
            args.model.model.display(),
            scheme.as_deref().unwrap_or("full precision, f32")
        )?;
        writeln!(out, "protocol: {}", result.protocol)?;
    }
    Ok(ExitCode::SUCCESS)
}
