//! The paper's tables, figures and claims (arXiv 2511.11663), measured on a model.
//!
//! [`reproduce`] quantizes the model in every configuration that a table or a claim needs, runs each through the integer engine over a text,
//! studies single layers, and writes a report: Markdown, SVG figures, and the raw measurements, a file each, by which an interrupted
//! run continues. A configuration is described by [`Run`], the list of them by [`Plan`]; what is made of the measurements is a pure function of them.

mod allocation;
mod claims;
mod error;
mod figures;
mod lab;
mod latency;
mod layers;
mod permute;
mod plan;
mod report;

pub use allocation::Allocation;
pub use error::*;
pub use lab::{Answers, Measured};
pub use latency::{GENERATED, Latency, PROMPT, Speed};
pub use layers::{ALPHA, LayerStudy, Layers, MEAN_K, RATIOS, Residual, Spectrum};
pub use plan::*;

use std::fs;
use std::path::PathBuf;

use specquant_eval::{claim_directory, write_whole};
use specquant_model::{Site, Source};

/// What to measure, and where.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Text that perplexities are measured on.
    pub text: PathBuf,
    /// Text that calibration tokens are taken from.
    pub calibration: PathBuf,
    /// Windows of 2048 tokens that are scored; 0 for all.
    pub windows: usize,
    /// Directory of the zero-shot tasks' data; without it Table 1 has no accuracies.
    pub data: Option<PathBuf>,
    /// Documents of every task, the first ones; 0 for all.
    pub limit: usize,
    /// Fewer methods, seeds and calibration tokens.
    pub quick: bool,
    /// Directory of the report; it is made.
    pub output: PathBuf,
    /// Whether measurements that lie there are used.
    pub resume: bool,
    /// The command, for the report.
    pub command: String,
}

/// A configuration, or a study, has been measured.
pub struct Event<'a> {
    /// Number of steps done, this one included.
    pub done: usize,
    /// Number of steps.
    pub of: usize,
    /// Whether an earlier run has measured it.
    pub stored: bool,
    /// What came out.
    pub news: &'a str,
}

/// Tells a report's directory from any other.
const MARK: &str = ".specquant-reproduction";

/// Measures everything and writes the report; returns its path.
///
/// # Errors
/// [`Error`]. What has been measured until then stays for a run with `resume`.
pub fn reproduce(source: &Source, settings: &Settings, tell: &mut dyn FnMut(Event)) -> Result<PathBuf> {
    let widths = Site::ALL.map(|site| source.config().site_width(site));
    let mut plan = Plan::new(settings, widths.into_iter().min().unwrap_or(0) / 2 + 1)?;
    plan.matched = plan.matched.filter(|run| specquant_quantize::plan(source, &run.recipe).is_ok());
    if source.config().post_norms {
        // Their residual stream cannot be rotated; the report then has neither those rows nor the claim about them.
        let rotates = |run: &Run| run.recipe.rotate.is_some_and(|r| r.residual);
        plan.methods.retain(|(_, runs)| !runs.iter().flatten().any(rotates));
    }
    let mut lab = lab::Lab::new(source, settings)?;
    let runs = plan.runs();
    for run in &runs {
        specquant_quantize::plan(source, &run.recipe)?;
    }
    let _claim = claim_directory(&settings.output, MARK, "reproduction", settings.resume)?;
    let asked = match settings.data {
        Some(_) => {
            plan.methods.iter().flat_map(|(_, runs)| runs.iter().flatten()).map(Run::identity).collect()
        }
        None => Vec::new(),
    };
    let of = runs.len() + 3 + if asked.is_empty() { 0 } else { asked.len() + 1 };
    let mut done = 0;
    let mut step = |stored: bool, news: &str| {
        done += 1;
        tell(Event { done, of, stored, news });
    };
    let full = lab.full_precision()?;
    step(full.1, &format!("full precision: perplexity {:.2}", full.0.perplexity));
    let mut answers = Vec::new();
    if !asked.is_empty() {
        let (found, stored) = lab.answers(None)?;
        step(stored, &format!("full precision: accuracy {:.1}%", 100.0 * found.average().mean));
        answers.push((serde_json::Value::Null, found));
    }
    let layers = Layers::study(&mut lab, source, settings)?;
    step(layers.1, "layers: spectra and residuals");
    let mut evidence = report::Evidence {
        plan: &plan,
        results: Vec::new(),
        failures: Vec::new(),
        answers,
        full: full.0,
        layers: layers.0,
        speed: None,
    };
    // Timed where its checkpoint is at hand.
    let timed = plan.sweep.last().map(|(_, run)| run.identity());
    for run in runs {
        let (measured, mut stored) = match lab.measure(run) {
            Ok(measured) => measured,
            // A method that breaks down is a result; the others go on.
            Err(e) if e.is_breakdown() => {
                step(false, &format!("{}: {e}", lab::label(run)));
                evidence.failures.push((lab::label(run), e.to_string()));
                continue;
            }
            Err(e) => return Err(e),
        };
        let p = &measured.perplexity;
        let news = format!(
            "{}: perplexity {:.2}, {:.3} bits",
            measured.label, p.perplexity, measured.bits_per_weight
        );
        if asked.contains(&run.identity()) {
            let (found, answered) = lab.answers(Some(run))?;
            stored &= answered;
            step(answered, &format!("{}: accuracy {:.1}%", measured.label, 100.0 * found.average().mean));
            evidence.answers.push((run.identity(), found));
        }
        evidence.results.push((run.identity(), measured));
        if timed.as_ref() == Some(&run.identity()) {
            let (measured, stored) = lab.latency(run, &plan)?;
            step(stored, "latency");
            evidence.speed = Some(measured);
        }
        if !stored {
            // Whoever stops the run has a report of what there is.
            write(&evidence, settings, source)?;
        }
        step(stored, &news);
    }
    write(&evidence, settings, source)
}

/// Writes figures and text; returns the latter's path.
fn write(evidence: &report::Evidence, settings: &Settings, source: &Source) -> Result<PathBuf> {
    let figures = settings.output.join("figures");
    fs::create_dir_all(&figures).map_err(|cause| Error::Io { path: figures.clone(), cause })?;
    let path = settings.output.join("README.md");
    let mut files: Vec<(PathBuf, String)> =
        figures::all(evidence).into_iter().map(|(name, svg)| (settings.output.join(name), svg)).collect();
    files.push((path.clone(), report::markdown(evidence, settings, source)));
    for (path, content) in files {
        write_whole(&path, |file| std::io::Write::write_all(file, content.as_bytes()))?;
    }
    Ok(path)
}
