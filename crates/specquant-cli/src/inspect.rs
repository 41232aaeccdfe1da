//! `specquant inspect`.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use serde_json::{Value, json};
use specquant_model::{Model, ModelConfig, QuantizationConfig, Source};

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

/// Reads every tensor as the engine would: lengths, ranges, finiteness.
fn check(source: &Source) -> anyhow::Result<()> {
    Model::load(source)?;
    source.check_finite()?;
    source.tokenizer()?;
    Ok(())
}

pub fn run(args: InspectArgs) -> anyhow::Result<ExitCode> {
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
        let mut rows = vec![
            ["layer", "shape", "bits", "k mean", "k max", "alpha", "T", "error"].map(str::to_owned).to_vec(),
        ];
        let number =
            |v: &Value, digits: usize| v.as_f64().map_or("-".to_owned(), |v| format!("{v:.digits$}"));
        for layer in report["layers"].as_array().into_iter().flatten() {
            let fallback = if layer.get("fallback").is_some() { " (nearest)" } else { "" };
            rows.push(vec![
                format!(
                    "{}{fallback}",
                    layer["name"].as_str().unwrap_or("?").trim_start_matches("model.layers.")
                ),
                format!("{}x{}", layer["shape"][0], layer["shape"][1]),
                number(&layer["bits_per_weight"], 3),
                number(&layer["mean_k"], 1),
                number(&layer["max_k"], 0),
                number(&layer["smoothing_strength"], 2),
                number(&layer["temperature"], 2),
                number(&layer["relative_error"], 5),
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
