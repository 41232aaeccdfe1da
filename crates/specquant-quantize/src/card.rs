//! The model card that travels with a checkpoint.

use std::fmt::Write;

use specquant_model::Source;

use crate::fallback::Fallback;
use crate::recipe::Recipe;
use crate::run::Report;

/// README.md of the checkpoint.
pub fn render(source: &Source, recipe: &Recipe, report: &Report) -> String {
    let config = source.config();
    let base = source.path().file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let mut worst: Vec<_> = report.layers.iter().collect();
    worst.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error));
    let (tuned, when) = match report.tuning_losses.len() {
        0 => (String::new(), ""),
        steps => (
            format!(" Then tuned for {steps} steps, a sequence each, on the predictions of its source."),
            ", before they were tuned",
        ),
    };
    let mut card = format!(
        "---\nlibrary_name: specquant\ntags: [specquant, {scheme}]\n---\n\n# {base}, {scheme} by SpecQuant\n\n\
         Quantized by `specquant {version}` with the recipe `{name}`: {blocks} blocks, {bits:.3} bits per weight in the linear \
         layers (codes, scales, kept directions, branch), {mib:.1} MiB of tensors, calibrated on {tokens} tokens.{tuned}\n\n\
         Run it: `specquant generate -m DIR --prompt \"...\"`. Per-layer figures are in report.json, the whole recipe in config.json.\n\n\
         ## Layers with the largest output error{when}\n\n| layer | relative error |\n|---|--:|\n",
        scheme = report.scheme,
        version = report.specquant_version,
        name = recipe.name,
        blocks = config.num_layers,
        bits = report.bits_per_weight,
        mib = report.tensor_bytes as f64 / (1 << 20) as f64,
        tokens = report.calibration_tokens,
    );
    for layer in worst.iter().take(5) {
        let _ = writeln!(card, "| {} | {:.4} |", layer.name, layer.relative_error);
    }
    if !report.fallbacks.is_empty() {
        card.push_str("\n## Done other than the recipe says\n\n");
        for Fallback { layer, what } in &report.fallbacks {
            let _ = writeln!(card, "- {layer}: {what}");
        }
    }
    card
}
