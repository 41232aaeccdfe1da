//! The report, as a pure function of what was measured.

use std::fmt::Write;

use serde_json::Value;
use specquant_eval::{Perplexity, estimate, markdown_table, svg};
use specquant_kernels::Isa;
use specquant_model::{BranchBasis, Source};
use specquant_quantize::branch::Score;

use crate::claims::{self, change, change_over_seeds, score_name, seeds};
use crate::latency;
use crate::layers::MEAN_K;
use crate::{Answers, Latency, Layers, Measured, Plan, Run, SCHEMES, Settings, figures};

/// Everything that was measured.
pub struct Evidence<'a> {
    /// What was to be measured.
    pub plan: &'a Plan,
    /// By [`Run::identity`].
    pub results: Vec<(Value, Measured)>,
    /// Configurations that broke down, and how.
    pub failures: Vec<(String, String)>,
    /// On the zero-shot tasks, by [`Run::identity`]; null for the model itself.
    pub answers: Vec<(Value, Answers)>,
    /// The model itself.
    pub full: Perplexity,
    /// Of single layers.
    pub layers: Layers,
    /// Of the checkpoint with the most bins.
    pub speed: Option<Latency>,
}

impl Evidence<'_> {
    /// Of one configuration.
    pub fn of(&self, run: &Run) -> Option<&Measured> {
        let identity = run.identity();
        self.results.iter().find(|(known, _)| *known == identity).map(|(_, m)| m)
    }

    /// On the zero-shot tasks, of a configuration or of the model itself.
    pub fn answers_of(&self, run: Option<&Run>) -> Option<&Answers> {
        let identity = run.map_or(Value::Null, Run::identity);
        self.answers.iter().find(|(known, _)| *known == identity).map(|(_, a)| a)
    }
}

/// A number for a table.
pub(crate) fn number(v: f64) -> String {
    match v {
        v if v.is_nan() => "–".to_owned(),
        v if v.is_infinite() => "∞".to_owned(),
        v if v.abs() >= 1000.0 => format!("{v:.0}"),
        v if v.abs() >= 100.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

fn kl(m: &Measured) -> String {
    m.perplexity.distance.as_ref().map_or("–".to_owned(), |d| svg::short(d.kl.mean))
}

fn ppl(m: &Measured) -> String {
    number(m.perplexity.perplexity)
}

/// A table of numbers in Markdown.
fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    markdown_table(&with_header(header, rows), "--:")
}

fn with_header(header: &[&str], rows: &[Vec<String>]) -> Vec<Vec<String>> {
    let header = header.iter().map(|c| (*c).to_owned()).collect();
    [header].into_iter().chain(rows.iter().cloned()).collect()
}

/// The paper's Table 1, setting 4-4-4, LLaMA-3 8B: perplexity and accuracy.
const PAPER: [(&str, &str); 6] = [
    ("rtn", "7e2 / 33.18"),
    ("smoothquant", "1e3 / 32.96"),
    ("gptq", "6e2 / 33.71"),
    ("omniquant", "4e2 / 32.33"),
    ("quarot", "8.18 / 61.38"),
    ("spinquant", "7.35 / 64.10"),
];
/// Its own row.
const PAPER_OWN: &str = "7.33 / 64.75";

fn table1(e: &Evidence) -> String {
    let mut rows = vec![vec!["source, in f32".to_owned()]];
    for _ in SCHEMES {
        rows[0].extend([number(e.full.perplexity), "0".to_owned()]);
    }
    rows[0].extend(["–".to_owned(), "–".to_owned(), "6.14 / 68.09 (16-16-16)".to_owned()]);
    for (name, runs) in &e.plan.methods {
        let mut row = vec![name.clone()];
        for run in runs {
            let measured = run.as_ref().and_then(|r| e.of(r));
            row.extend(measured.map_or(["–".to_owned(), "–".to_owned()], |m| [ppl(m), kl(m)]));
        }
        let last = runs.iter().flatten().next_back().and_then(|r| e.of(r));
        row.push(last.map_or("–".to_owned(), |m| format!("{:.2}", m.bits_per_weight)));
        let seconds = last.and_then(|m| m.quantize_cpu_seconds);
        row.push(seconds.map_or("–".to_owned(), |s| format!("{s:.0}")));
        let paper = PAPER.iter().find(|(n, _)| n == name).map(|(_, p)| *p);
        row.push(paper.unwrap_or(if name == "specquant" { PAPER_OWN } else { "–" }).to_owned());
        rows.push(row);
    }
    let mut header = vec!["method".to_owned()];
    header.extend(SCHEMES.iter().flat_map(|(s, _)| [format!("{s} ppl"), "KL".to_owned()]));
    header.extend(
        ["bits/weight", "CPU seconds", "paper: LLaMA-3 8B, 4-4-4, ppl / accuracy"].map(str::to_owned),
    );
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let mut text = table(&header, &rows);
    text += "\nBits are those of weights, activations and KV cache. KL is the mean divergence of the next-token distribution from the source's, in nats. \
             Bits per weight count codes, scales, counts, coefficients and stored directions; they and the processors' time of quantization are those of the last setting in the row.";
    text += " AWQ is for weights alone, and SpinQuant learns its rotations against quantized activations; flatquant, svdquant and smooth-gptq are no rows of the paper, spectral and spectral-tuned are our own.\n\n";
    for (i, (setting, _)) in SCHEMES.iter().enumerate() {
        let mut order: Vec<(&str, &Measured)> = e
            .plan
            .methods
            .iter()
            .filter_map(|(name, runs)| Some((name.as_str(), e.of(runs[i].as_ref()?)?)))
            .collect();
        order.sort_by(|a, b| a.1.perplexity.perplexity.total_cmp(&b.1.perplexity.perplexity));
        let mut words: Vec<String> = Vec::new();
        for (at, (name, m)) in order.iter().enumerate() {
            let told = at.checked_sub(1).map(|before| change(m, order[before].1).is_significant());
            words.push(match told {
                None => format!("**{name}**"),
                Some(true) => format!("< {name}"),
                Some(false) => format!("≈ {name}"),
            });
        }
        let _ = writeln!(text, "- {setting}, best first: {}", words.join(" "));
    }
    let fallen: Vec<String> = e
        .results
        .iter()
        .filter(|(_, m)| m.fallbacks > 0)
        .map(|(_, m)| format!("{} ({} layers)", m.label, m.fallbacks))
        .collect();
    if !fallen.is_empty() {
        let _ = writeln!(text, "\nRounded to nearest where GPTQ failed: {}.", fallen.join(", "));
    }
    if !e.failures.is_empty() {
        let list: Vec<String> = e.failures.iter().map(|(label, why)| format!("{label}: {why}")).collect();
        let _ = writeln!(text, "\nBroke down: {}.", list.join("; "));
    }
    text += "\n≈: the 95% interval of the paired difference to the one before holds zero.\n";
    let alphas =
        e.plan.alphas.iter().filter_map(|(alpha, run)| Some(format!("{} at α = {alpha}", ppl(e.of(run)?))));
    let alphas: Vec<String> = alphas.collect();
    if !alphas.is_empty() {
        let _ = writeln!(
            text,
            "\nSmoothQuant's α, tuned by its authors for each model: at 4-4-16 perplexity {}.",
            alphas.join(", ")
        );
    }
    text
}

/// Table 1's accuracies.
fn accuracies(e: &Evidence) -> String {
    let Some(full) = e.answers_of(None) else { return String::new() };
    let percent = |a: &Answers| {
        let average = a.average();
        format!("{:.2} ± {:.2}", 100.0 * average.mean, 100.0 * average.stderr)
    };
    let mut rows = vec![vec!["source, in f32".to_owned(), percent(full), percent(full), percent(full)]];
    for (name, runs) in &e.plan.methods {
        let cell = |run: &Option<Run>| {
            let found = e.answers_of(Some(run.as_ref()?))?;
            let lost = found.difference(full)?;
            Some(format!("{} ({})", percent(found), lost.show(100.0, 2)))
        };
        let cells = runs.iter().map(|run| cell(run).unwrap_or_else(|| "–".to_owned()));
        rows.push([name.clone()].into_iter().chain(cells).collect());
    }
    let documents: usize = full.tasks.iter().map(|(_, _, right)| right.len()).sum();
    let header: Vec<&str> =
        ["average of nine tasks, %"].into_iter().chain(SCHEMES.iter().map(|(s, _)| *s)).collect();
    format!(
        "\n{}\nAccuracy, per character where lm-eval has such a metric, over the first {documents} of {} documents, equally many of each task; guessing gives {:.1}%. In brackets the difference to the source, paired over \
         documents within each task.\n",
        table(&header, &rows),
        full.available,
        100.0 * full.chance()
    )
}

fn table3(e: &Evidence) -> String {
    let mark = |b: bool| if b { "✓" } else { "" }.to_owned();
    let mut rows = Vec::new();
    for c in &e.plan.grid {
        let Some(m) = e.of(&c.run) else { continue };
        let paper = match (c.smooth, c.truncate, c.gptq) {
            (false, false, false) => "8e3",
            (true, false, false) => "1e3",
            (false, true, false) => "27.75 (rounding not said)",
            (true, true, true) => "7.25",
            _ => "–",
        };
        rows.push(vec![
            mark(c.smooth),
            mark(c.truncate),
            if c.gptq { "GPTQ" } else { "nearest" }.to_owned(),
            ppl(m),
            kl(m),
            svg::short(m.layer_error),
            paper.to_owned(),
        ]);
    }
    table(&["smooth", "truncate", "rounding", "ppl", "KL", "layer error", "paper: LLaMA-3 8B"], &rows)
        + "\nAt 4-4-16. The layer error is the mean over layers of ‖y − ŷ‖² / ‖y‖², each on its own inputs. The paper's second row is its SmoothQuant row of \
           Table 1, rounded to nearest, while its last one has GPTQ: it never removes truncation alone.\n"
}

fn table4(e: &Evidence) -> String {
    let Some(first) = e.plan.sweep.first().and_then(|(_, run)| e.of(run)) else { return String::new() };
    let dense = e.speed.as_ref().and_then(|s| s.by_k.first());
    let mut rows = Vec::new();
    for (k, run) in &e.plan.sweep {
        let Some(m) = e.of(run) else { continue };
        let speed = e.speed.as_ref().and_then(|s| s.by_k.iter().find(|(at, _)| at == k));
        let over = |f: fn(&crate::Speed) -> f64| match (speed, dense) {
            (Some((_, s)), Some((_, d))) => format!("{:+.1}%", 100.0 * (f(s) / f(d) - 1.0)),
            _ => "–".to_owned(),
        };
        rows.push(vec![
            k.to_string(),
            format!("{:.2}%", 100.0 * (m.bits_per_weight - first.bits_per_weight) / 4.0),
            over(|s| s.prefill),
            over(|s| s.decode),
            ppl(m),
            kl(m),
            if *k == 0 { "–".to_owned() } else { change(m, first).show(1.0, 3) },
        ]);
    }
    table(&["k", "size", "prefill time", "decode time", "ppl", "KL", "Δ log-ppl to k = 0"], &rows)
        + "\nAt 4-4-16, k bins for every channel. Size is the branch's against the 4-bit codes, as in the paper (2.7, 5.5 and 11.2% there): 2k values of 16 bits a channel, \
           a larger share the narrower the layer. Times are the best of five turns on this machine, whole model, \
           one checkpoint loaded with fewer and fewer bins.\n"
}

fn k_run(e: &Evidence) -> String {
    let mut rows = Vec::new();
    let whole = e.plan.sweep.last().map(|(k, run)| (*k, run));
    for (k, run) in e.plan.k_run.iter().map(|(k, run)| (*k, run)).chain(whole) {
        let Some(m) = e.of(run) else { continue };
        let own = e.plan.sweep.iter().find(|(at, _)| *at == k).and_then(|(_, run)| e.of(run));
        rows.push(vec![k.to_string(), ppl(m), kl(m), own.map_or("–".to_owned(), ppl)]);
    }
    if rows.is_empty() {
        return String::new();
    }
    table(&["k loaded", "ppl", "KL", "ppl of a checkpoint made for it"], &rows)
        + "\nThe checkpoint of the largest k, loaded with `--k-run`. The residual was rounded for all of the bins and does not make up for those left out.\n\n\
           ![Perplexity against bins loaded](figures/k-run.svg)\n"
}

fn table5(e: &Evidence) -> String {
    let uniform = seeds(e, Score::Uniform);
    let mut rows = Vec::new();
    for (score, _) in &e.plan.scores {
        let (Some(found), Some(uniform)) = (seeds(e, *score), &uniform) else { continue };
        let logs = found.iter().map(|m| m.perplexity.perplexity.ln());
        let mean = estimate(logs.collect::<Vec<_>>().into_iter());
        let each: Vec<String> = found.iter().map(|m| ppl(m)).collect();
        rows.push(vec![
            score_name(*score).to_owned(),
            number(mean.mean.exp()),
            each.join(", "),
            if *score == Score::Uniform {
                "–".to_owned()
            } else {
                change_over_seeds(&found, uniform).show(1.0, 3)
            },
            match score {
                Score::AbsMean => "6.32",
                Score::AbsMax => "6.45",
                Score::L2 => "6.31",
                Score::Entropy => "6.30",
                _ => "–",
            }
            .to_owned(),
        ]);
    }
    table(
        &["score", "ppl, geometric mean", "by calibration seed", "Δ log-ppl to uniform", "paper: LLaMA-2 7B"],
        &rows,
    ) + "\nAt 4-4-16, 16 bins a channel on average, 1 to 32, shared by softmax of the standardized score; α = 0.5 everywhere, 8 calibration sequences, to tell scores apart \
           and nothing else. ± is half of the 95% interval over seeds. The paper's column is for a \"20% compression ratio\" of which it does not say how it was quantized, and where \
           the uncompressed model has 6.33; it is not comparable but in its order.\n"
}

fn bases(e: &Evidence) -> String {
    let study = |basis: BranchBasis| {
        let smoothed: Vec<_> = e.layers.layers.iter().filter(|l| l.smoothed).collect();
        let kept: Vec<f64> = smoothed.iter().filter_map(|l| Some(1.0 - l.of(basis)?.energy)).collect();
        (!kept.is_empty()).then(|| format!("{:.1}%", 100.0 * kept.iter().sum::<f64>() / kept.len() as f64))
    };
    let mut rows = Vec::new();
    for (basis, run) in &e.plan.bases {
        let Some(m) = e.of(run) else { continue };
        rows.push(vec![
            basis.name().to_owned(),
            format!("{:.2}", m.bits_per_weight),
            study(*basis).unwrap_or_else(|| "–".to_owned()),
            ppl(m),
            kl(m),
            svg::short(m.layer_error),
        ]);
    }
    let mut text = table(&["basis", "bits/weight", "energy kept", "ppl", "KL", "layer error"], &rows);
    let _ = write!(
        text,
        "\nAt 4-4-16, smoothing searched with the branch in place, GPTQ on the residual; the bits of {MEAN_K} Fourier bins per channel, indices and stored directions \
         included. Energy kept: of layers by themselves, each with directions of its own, smoothed with α = 0.5; mean over those studied. In the runs the layers that share an input share \
         directions.\n"
    );
    let plain = e.plan.grid.iter().find(|c| c.smooth && c.truncate && c.gptq);
    if let (Some(matched), Some(plain)) =
        (e.plan.matched.as_ref().and_then(|run| e.of(run)), plain.and_then(|c| e.of(&c.run)))
    {
        let _ = write!(
            text,
            "\nWith the bits of its branch taken from the residual (`--overhead matched`, 3 bits for the least sensitive channels), SpecQuant has {:.2} bits a weight \
             and perplexity {}, against {:.2} bits and {} with the branch on top: Δ log-perplexity {}.\n",
            matched.bits_per_weight,
            ppl(matched),
            plain.bits_per_weight,
            ppl(plain),
            change(matched, plain).show(1.0, 3)
        );
    }
    text
}

/// What another draw of calibration tokens changes.
fn over_seeds(e: &Evidence) -> String {
    match seeds(e, Score::ActivationAware) {
        Some(runs) if runs.len() > 1 => {
            let logs: Vec<f64> = runs.iter().map(|m| m.perplexity.perplexity.ln()).collect();
            let deviation = estimate(logs.iter().copied()).stderr * (logs.len() as f64).sqrt();
            format!(
                "from one to another, log-perplexity varies by {deviation:.3} (standard deviation over {} seeds in Table 5)",
                logs.len()
            )
        }
        _ => "one draw a configuration".to_owned(),
    }
}

/// Spectra by kind of layer.
fn spectra(e: &Evidence) -> String {
    let percent = |s: &crate::layers::Spread| format!("{:.2} ± {:.2}%", 100.0 * s.mean, 100.0 * s.deviation);
    let row = |s: &crate::Spectrum| {
        let entropy = format!("{:.4} ± {:.4}", s.entropy.mean, s.entropy.deviation);
        vec![s.kind.clone(), s.channels.to_string(), percent(&s.low), percent(&s.permuted), entropy]
    };
    let rows: Vec<Vec<String>> = e.layers.spectra.iter().map(row).collect();
    table(
        &["layer", "channels", "energy in the lowest 20%", "inputs in random order", "spectral entropy"],
        &rows,
    ) + "\nAlong the inputs of every output channel, all blocks; ± is the standard deviation over channels. Entropy is 1 for equal energy in every bin; white Gaussian noise has 20% \
           and 1 − 0.42 / ln(bins).\n"
}

/// How the weights of linear layers are stored.
fn stored_types(source: &Source) -> Vec<String> {
    let config = source.config();
    let names = (0..config.num_layers).flat_map(|i| config.linear_shapes(i));
    let mut types: Vec<String> = names
        .filter_map(|(name, _)| Some(format!("{:?}", source.tensor(&format!("{name}.weight")).ok()?.dtype)))
        .collect();
    types.sort_unstable();
    types.dedup();
    types
}

/// The whole report.
pub fn markdown(e: &Evidence, settings: &Settings, source: &Source) -> String {
    let name = |path: &std::path::Path| {
        path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
    };
    let model = name(source.path());
    let claims = claims::all(e);
    let rows: Vec<Vec<String>> = claims
        .iter()
        .map(|c| vec![c.id.to_owned(), c.claim.to_owned(), c.found.clone(), c.verdict.words().to_owned()])
        .collect();
    let claims = markdown_table(&with_header(&["", "claim", "measured", "verdict"], &rows), "---");
    let seconds: f64 = {
        // Runs of one checkpoint share its time.
        let own = e.plan.runs().into_iter().filter(|run| run.k_run.is_none());
        own.filter_map(|run| e.of(run)).filter_map(|m| m.quantize_cpu_seconds).sum()
    };
    let types = stored_types(source);
    let facts = [
        format!(
            "model: {model}, perplexity {:.3} in f32; its linear layers are stored as {}{}",
            e.full.perplexity,
            types.join(", "),
            if types.iter().all(|t| ["F32", "F16", "BF16"].contains(&t.as_str())) {
                ""
            } else {
                ", and everything here is relative to what that widens to, not to the model that it was made from"
            }
        ),
        format!("text: {}; {}", name(&settings.text), e.full.protocol),
        format!(
            "calibration: {}, at random places by seed; {} configurations, quantized in {:.0} minutes of processor time together, on {} with {} threads now",
            name(&settings.calibration),
            e.results.len(),
            seconds / 60.0,
            latency::cpu(),
            latency::threads()
        ),
        format!("engine: specquant {}, {} kernels; every perplexity and accuracy runs through the integer engine; studies of single layers round in f32", env!("CARGO_PKG_VERSION"), Isa::active().name()),
        format!("command: `{}`", settings.command),
        "raw data: a file for each configuration in [measurements](measurements), with everything that it depends on".to_owned(),
    ];
    let mut text = format!(
        "# SpecQuant (arXiv 2511.11663) on {model}\n\nThe paper's tables, figures and claims, measured{}. Differences come with 95% intervals, paired over windows; ≈ marks one \
         that holds zero. They cover the choice of the text, not that of calibration tokens: {}.{}\n\n## Claims and checks\n\n{claims}\n",
        if settings.quick {
            " quickly (`--quick`: fewer methods, settings, scores, seeds, bins and calibration tokens, and so no claims T6 and T11)"
        } else {
            ""
        },
        over_seeds(e),
        match (e.results.len(), e.plan.runs().len()) {
            (some, all) if some < all => {
                format!(" **Unfinished: {some} of {all} configurations are measured; `--resume` goes on.**")
            }
            _ => String::new(),
        }
    );
    for (title, body) in [
        ("Methods (Table 1)", table1(e) + &accuracies(e)),
        ("What smoothing, truncation and rounding do (Table 3)", table3(e)),
        ("How many bins (Table 4)", table4(e)),
        ("Truncation at load time", k_run(e)),
        ("Importance scores (Table 5)", table5(e)),
        ("Spectra of the weights", spectra(e)),
        ("Other bases at the same bits", bases(e)),
        ("Figures", figures::markdown(e)),
    ] {
        let _ = write!(text, "## {title}\n\n{body}\n");
    }
    text += "## How this was measured\n\n";
    for fact in facts {
        let _ = writeln!(text, "- {fact}");
    }
    text
}
