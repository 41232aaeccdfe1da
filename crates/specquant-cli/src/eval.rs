//! `specquant eval`, and `eval ppl`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use serde_json::json;
use specquant_eval::{Distance, Encoder, Error, Perplexity, Protocol, Reference, perplexity};
use specquant_model::{Model, Source, read_text};

use crate::args::{BosArg, EvalArgs, EvalCommand, PplArgs, TextArgs};
use crate::system::{self, human};
use crate::tasks::{self, bos};
use crate::ui::{Progress, note};

pub fn run(args: EvalArgs) -> anyhow::Result<ExitCode> {
    match args.what {
        EvalCommand::Ppl(args) => ppl(args),
        EvalCommand::Tasks(args) => tasks::run(args),
    }
}

/// A text in a model's tokens, and how it is cut.
#[derive(PartialEq)]
pub struct Prose {
    pub ids: Vec<u32>,
    pub protocol: Protocol,
}

/// Reads the text.
pub fn read(args: &TextArgs) -> anyhow::Result<String> {
    let path = args.text.as_deref().context("give the evaluation text with --text FILE")?;
    read_text(path).map_err(anyhow::Error::msg).with_context(|| format!("evaluation text {}", path.display()))
}

/// Turns it into token ids of a model.
pub fn encode(text: &str, args: &TextArgs, when: BosArg, source: &Source) -> anyhow::Result<Prose> {
    let tokenizer = source.tokenizer()?;
    let protocol = Protocol {
        window: args.window,
        stride: args.stride,
        max_windows: args.windows,
        ..Protocol::default()
    };
    let (ids, protocol) = Encoder::new(&tokenizer, source.config(), bos(when), 0)?.prose(text, protocol)?;
    let longest = source.config().max_position_embeddings;
    // A text that is too short for the window is an error, soon.
    if args.window > longest && protocol.count(&ids).is_ok() {
        note!(
            "note: --window {} is more than the {longest} tokens that {} is made for",
            args.window,
            source.path().display()
        );
    }
    Ok(Prose { ids, protocol })
}

/// Says which weight or which file an error is about.
fn explain(error: Error, source: &Source, args: &TextArgs) -> anyhow::Error {
    let text = || format!("evaluation text {}", args.text.as_deref().unwrap_or(Path::new("")).display());
    match error {
        // The weights, which are not checked when they are used, can say where.
        Error::NotFinite { .. } => source.check_finite().err().map_or(error.into(), anyhow::Error::from),
        Error::TooShort { .. } => anyhow::Error::from(error).context(text()),
        error => error.into(),
    }
}

/// A bar over the windows, with the perplexity so far.
fn progress(
    what: &'static str,
    prose: &Prose,
    quiet: bool,
) -> specquant_eval::Result<impl FnMut(usize, usize, f64) + use<>> {
    let mut bar = Progress::new(what, prose.protocol.count(&prose.ids)? as u64, quiet);
    Ok(move |done, _, so_far| bar.step(done as u64, &format!("perplexity {so_far:.4}")))
}

/// Runs the model that others will be compared with.
pub fn reference(source: &Source, prose: &Prose, args: &TextArgs, quiet: bool) -> anyhow::Result<Reference> {
    let hidden = source.config().hidden_size;
    let bytes =
        Reference::bytes(hidden, &prose.ids, &prose.protocol).map_err(|e| explain(e, source, args))?;
    if let Some(free) = system::available_memory().filter(|free| *free < bytes) {
        anyhow::bail!(
            "the reference's hidden states take {} but {} of memory are free; choose fewer --windows",
            human(bytes),
            human(free)
        );
    }
    let model = Model::load_for_decoding(source)?;
    progress("reference window", prose, quiet)
        .and_then(|mut bar| Reference::new(model, &prose.ids, &prose.protocol, &mut bar))
        .map_err(|e| explain(e, source, args))
}

/// Runs a model over the text.
pub fn measure(
    source: &Source,
    prose: &Prose,
    args: &TextArgs,
    reference: Option<&Reference>,
    quiet: bool,
) -> anyhow::Result<Perplexity> {
    let model = Model::load_for_decoding(source)?;
    progress("window", prose, quiet)
        .and_then(|mut bar| perplexity(&model, &prose.ids, &prose.protocol, reference, &mut bar))
        .map_err(|e| explain(e, source, args))
}

fn ppl(args: PplArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.model.threads)?;
    let text = read(&args.text)?;
    let source = args.model.open()?;
    let prose = encode(&text, &args.text, args.bos, &source)?;
    let theirs = args.reference.as_deref().map(|path| -> anyhow::Result<Reference> {
        let theirs = Source::open(path)?;
        let same = theirs.config().vocab_size == source.config().vocab_size
            && encode(&text, &args.text, args.bos, &theirs)? == prose;
        anyhow::ensure!(
            same,
            "--reference {}: its tokenizer or vocabulary is not the model's, so their predictions cannot be compared",
            path.display()
        );
        reference(&theirs, &prose, &args.text, args.json)
    });
    let theirs = theirs.transpose()?;
    let result = measure(&source, &prose, &args.text, theirs.as_ref(), args.json)?;
    let scheme = tasks::scheme(&source)?;
    let mut out = std::io::stdout();
    if args.json {
        let mut value = json!(result);
        value["model"] = json!(args.model.model);
        value["scheme"] = json!(scheme);
        if let Some(theirs) = &theirs {
            value["reference"] =
                json!({ "model": args.reference, "perplexity": theirs.perplexity.perplexity });
        }
        writeln!(out, "{value:#}")?;
    } else {
        let error = match result.window_nll.len() {
            1 => "(one window has no standard error)".to_owned(),
            _ => format!("± {:.5}", result.stderr),
        };
        writeln!(out, "perplexity {:.5} {error} over {} tokens", result.perplexity, result.tokens)?;
        writeln!(
            out,
            "model {} ({})",
            args.model.model.display(),
            scheme.as_deref().unwrap_or("full precision, f32")
        )?;
        writeln!(out, "protocol: {}", result.protocol)?;
        if let (Some(distance), Some(reference), Some(theirs)) = (&result.distance, &args.reference, &theirs)
        {
            writeln!(
                out,
                "reference {}: perplexity {:.5}",
                reference.display(),
                theirs.perplexity.perplexity
            )?;
            write!(out, "{}", describe(distance))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The distance in words.
fn describe(d: &Distance) -> String {
    let delta = &d.delta_log_perplexity;
    let interval = delta.half_width.map_or("one window has no interval".to_owned(), |h| {
        format!("95% interval {:+.4} to {:+.4}", delta.mean - h, delta.mean + h)
    });
    format!(
        "Δ log-perplexity {:+.4} ± {:.4}, paired over windows ({interval})\n\
         KL divergence mean {:.5} ± {:.5}, 99th percentile {:.4} nats\n\
         top-1 agreement {:.2} ± {:.2} %\n",
        delta.mean,
        delta.stderr,
        d.kl.mean,
        d.kl.stderr,
        d.kl_p99,
        100.0 * d.top1_agreement.mean,
        100.0 * d.top1_agreement.stderr,
    )
}
