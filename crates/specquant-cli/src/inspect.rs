//! `specquant inspect`.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;
use serde_json::{Value, json};
use specquant_model::{Model, ModelConfig, QuantizationConfig, Source};
use specquant_quantize::branch;

use crate::args::InspectArgs;
use crate::system::human;
use crate::ui::table;

fn architecture(c: &ModelConfig) -> Value {
    json!({
        "family": c.family.model_type(),
        "layers": c.num_layers, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "heads": c.num_heads, "kv_heads": c.num_kv_heads, "head_dim": c.head_dim, "vocab_size": c.vocab_size,
        "tied_embeddings": c.tie_word_embeddings,
    })
}

/// Number and bytes of the tensors of each type.
fn types(source: &Source) -> anyhow::Result<BTreeMap<String, (usize, u64)>> {
    let mut types = BTreeMap::new();
    for name in source.names() {
        let view = source.tensor(name)?;
        let entry: &mut (usize, u64) = types.entry(format!("{:?}", view.dtype)).or_default();
        entry.0 += 1;
        entry.1 += view.bytes().len() as u64;
    }
    Ok(types)
}

/// The spectrum of a kind of layer, over all blocks.
#[derive(Default, Serialize)]
struct Spectrum {
    channels: usize,
    /// Mean over output channels of the share of energy in the lowest 20% of frequencies; white noise has 0.2.
    low_frequency_energy: f64,
    /// Mean spectral entropy, 1 for equal energy in every bin.
    entropy: f64,
}

/// Of every kind of dense layer; the paper's premise is that the first figure is 0.92.
fn spectrum(source: &Source) -> anyhow::Result<BTreeMap<String, Spectrum>> {
    let mut kinds: BTreeMap<String, Spectrum> = BTreeMap::new();
    let config = source.config();
    for (name, [out, inp]) in (0..config.num_layers).flat_map(|i| config.linear_shapes(i)) {
        let weight = format!("{name}.weight");
        if !source.has(&weight) {
            continue;
        }
        let w = source.tensor(&weight)?.to_f32()?;
        let kind = kinds.entry(name.rsplit('.').next().unwrap_or(&name).to_owned()).or_default();
        kind.channels += out;
        let sum = |values: Vec<f32>| values.into_iter().map(f64::from).sum::<f64>();
        kind.low_frequency_energy += sum(branch::low_frequency_energy(&w, out, inp, 0.2));
        kind.entropy += sum(branch::spectral_entropy(&w, out, inp)) / ((inp / 2 + 1) as f64).ln();
    }
    for kind in kinds.values_mut() {
        kind.low_frequency_energy /= kind.channels as f64;
        kind.entropy /= kind.channels as f64;
    }
    Ok(kinds)
}

/// Reads every tensor as the engine would: lengths, ranges, finiteness.
fn check(source: &Source) -> anyhow::Result<()> {
    Model::load(source)?;
    source.check_finite()?;
    source.tokenizer()?;
    Ok(())
}

/// Columns of the table of layers: title, key of report.json, decimals.
const COLUMNS: [(&str, &str, usize); 8] = [
    ("bits", "bits_per_weight", 3),
    ("kept", "kept", 0),
    ("clip", "act_clip", 2),
    ("k mean", "mean_k", 1),
    ("k max", "max_k", 0),
    ("alpha", "smoothing_strength", 2),
    ("T", "temperature", 2),
    ("error", "relative_error", 5),
];

/// `--verify`: every problem on a line of its own.
fn verify(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let problems = specquant_model::verify(&args.model)?;
    let mut out = std::io::stdout();
    if args.json {
        let problems: Vec<&str> = problems.iter().collect();
        writeln!(out, "{:#}", json!({ "model": args.model, "problems": problems }))?;
    } else if problems.is_empty() {
        writeln!(out, "{}: no damage found", args.model.display())?;
    } else {
        problems.iter().try_for_each(|problem| writeln!(out, "{problem}"))?;
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

pub fn run(args: InspectArgs) -> anyhow::Result<ExitCode> {
    if args.verify {
        return verify(&args);
    }
    let source = Source::open(&args.model)?;
    let types = types(&source)?;
    let quant = QuantizationConfig::from_config(source.config_json(), source.path())?;
    let report: Option<Value> = match quant {
        None => None,
        Some(_) => {
            let path = args.model.join("report.json");
            let text = std::fs::read(&path)
                .with_context(|| format!("cannot read {}; quantize the model again", path.display()))?;
            Some(
                serde_json::from_slice(&text)
                    .with_context(|| format!("{} is not valid JSON", path.display()))?,
            )
        }
    };
    let spectrum = args.spectrum.then(|| spectrum(&source)).transpose()?;
    let integrity = check(&source);
    let code = if integrity.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(1) };
    let mut out = std::io::stdout();
    if args.json {
        let value = json!({
            "model": args.model,
            "architecture": architecture(source.config()),
            "tensors": types.iter().map(|(t, (n, bytes))| (t.clone(), json!({ "count": n, "bytes": bytes }))).collect::<serde_json::Map<_, _>>(),
            "quantization": quant,
            "report": report,
            "spectrum": spectrum,
            "integrity": integrity.as_ref().map_or_else(|e| format!("{e:#}"), |()| "ok".to_owned()),
        });
        writeln!(out, "{value:#}")?;
        return Ok(code);
    }
    let c = source.config();
    writeln!(
        out,
        "{}: {}, {} blocks, hidden {}, mlp {}, {} heads ({} kv) of {}, vocabulary {}{}",
        args.model.display(),
        c.family.model_type(),
        c.num_layers,
        c.hidden_size,
        c.intermediate_size,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        c.vocab_size,
        if c.tie_word_embeddings { ", tied" } else { "" }
    )?;
    let shown: Vec<String> =
        types.iter().map(|(t, (n, bytes))| format!("{n} {t} ({})", human(*bytes))).collect();
    writeln!(out, "tensors: {}", shown.join(", "))?;
    if let (Some(quant), Some(report)) = (&quant, &report) {
        writeln!(
            out,
            "quantized: {} by recipe {}, {:.3} bits per weight, {} calibration tokens, specquant {}\n",
            quant.scheme,
            quant.recipe["name"].as_str().unwrap_or("?"),
            report["bits_per_weight"].as_f64().unwrap_or(f64::NAN),
            report["calibration_tokens"],
            quant.specquant_version
        )?;
        let layers = || report["layers"].as_array().into_iter().flatten();
        // What no layer has is no column.
        let columns: Vec<_> =
            COLUMNS.iter().filter(|(_, key, _)| layers().any(|l| l.get(key).is_some())).collect();
        let mut head = vec!["layer".to_owned(), "shape".to_owned()];
        head.extend(columns.iter().map(|(title, ..)| (*title).to_owned()));
        let mut rows = vec![head];
        for layer in layers() {
            let fallback = if layer.get("fallback").is_some() { " (nearest)" } else { "" };
            let name = layer["name"].as_str().unwrap_or("?").trim_start_matches("model.layers.");
            let mut row =
                vec![format!("{name}{fallback}"), format!("{}x{}", layer["shape"][0], layer["shape"][1])];
            row.extend(columns.iter().map(|(_, key, digits)| {
                layer[key].as_f64().map_or("-".to_owned(), |v| format!("{v:.digits$}"))
            }));
            rows.push(row);
        }
        write!(out, "{}", table(&rows))?;
    }
    if let Some(spectrum) = &spectrum {
        let mut rows = vec![["layer", "channels", "lowest 20%", "entropy"].map(str::to_owned).to_vec()];
        for (kind, s) in spectrum {
            rows.push(vec![
                kind.clone(),
                s.channels.to_string(),
                format!("{:.4}", s.low_frequency_energy),
                format!("{:.4}", s.entropy),
            ]);
        }
        write!(out, "{}", table(&rows))?;
    }
    match integrity {
        Ok(()) => writeln!(out, "integrity: ok, every tensor read and in range")?,
        Err(e) => writeln!(out, "integrity: FAILED: {e:#}")?,
    }
    Ok(code)
}
