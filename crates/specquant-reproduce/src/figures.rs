//! The paper's figures 1, 4, 5 and 6 from our data, and quality against bins loaded.

use std::fmt::Write;

use specquant_eval::svg::{Axis, Points, Series, plane};
use specquant_model::BranchBasis;

use crate::layers::{ALPHA, Distribution, MEAN_K};
use crate::report::{Evidence, number};

/// Lines `(x, y)`, drawn with logarithmic y, and x if `log`.
fn lines(series: &[Vec<(f64, f64)>], log: bool, titles: (&str, &str), name: &str, names: &[&str]) -> String {
    // A logarithm ends at the first zero.
    let positive =
        |line: &Vec<(f64, f64)>| line.iter().copied().take_while(|(_, y)| *y > 0.0).collect::<Vec<_>>();
    let kept: Vec<Vec<(f64, f64)>> = series.iter().map(positive).collect();
    let all = || kept.iter().flatten();
    let (x, y) = (Axis::around(all().map(|p| p.0), log), Axis::around(all().map(|p| p.1), true));
    let drawn: Vec<Series> = kept
        .iter()
        .enumerate()
        .map(|(i, line)| Series {
            series: i,
            points: line.iter().map(|&(x, y)| (x, y, String::new())).collect(),
            label: String::new(),
            drawn: Points::Line,
        })
        .collect();
    plane(&drawn, &x, &y, titles, name).standalone(names)
}

/// Values by their number.
fn numbered(values: &[f32]) -> Vec<(f64, f64)> {
    values.iter().enumerate().map(|(i, v)| (i as f64, f64::from(*v))).collect()
}

/// Values from the largest down, by rank.
fn ranked(values: &[f32]) -> Vec<(f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted.iter().enumerate().map(|(i, v)| (i as f64 + 1.0, f64::from(*v))).collect()
}

fn distribution(d: &Distribution, name: &str) -> String {
    let curve = |y: &[f64]| d.at.iter().copied().zip(y.iter().copied()).collect::<Vec<_>>();
    let mut series = vec![curve(&d.original)];
    let mut names = vec!["original".to_owned()];
    for (basis, ratio, y) in &d.approximations {
        series.push(curve(y));
        names.push(format!("{} {:.0}%", basis.name(), 100.0 * ratio));
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    lines(
        &series,
        false,
        ("magnitude / root mean square of the weights", "density (log scale)"),
        name,
        &names,
    )
}

/// Perplexity against bins loaded, beside checkpoints made for as many.
fn k_run(e: &Evidence) -> Option<String> {
    let curve = |runs: &[(usize, crate::Run)]| -> Vec<(f64, f64, String)> {
        let point = |(k, run): &(usize, crate::Run)| {
            let p = e.of(run)?.perplexity.perplexity;
            Some((*k as f64, p, format!("k = {k}: {}", number(p))))
        };
        runs.iter().filter_map(point).collect()
    };
    let own = curve(&e.plan.sweep);
    own.first()?;
    let mut cut = curve(&e.plan.k_run);
    cut.extend(own.last().cloned());
    let all = || own.iter().chain(&cut);
    let (x, y) = (Axis::around(all().map(|p| p.0), false), Axis::around(all().map(|p| p.1), true));
    let series = [own.clone(), cut.clone()]
        .into_iter()
        .enumerate()
        .map(|(series, points)| Series { series, points, label: String::new(), drawn: Points::Joined })
        .collect::<Vec<_>>();
    let titles = ("bins per channel", "perplexity (log scale)");
    let chart = plane(&series, &x, &y, titles, "Perplexity against bins");
    Some(chart.standalone(&["made for as many", "loaded with --k-run"]))
}

/// Prefill time against bins.
fn latency(e: &Evidence) -> Option<String> {
    let speed = e.speed.as_ref()?;
    let points = |f: fn(&crate::Speed) -> f64| -> Vec<(f64, f64, String)> {
        let point = |(k, s): &(usize, crate::Speed)| {
            (*k as f64, 1000.0 * f(s), format!("k = {k}: {:.1} ms", 1000.0 * f(s)))
        };
        speed.by_k.iter().map(point).collect()
    };
    let series = [points(|s| s.prefill)]
        .into_iter()
        .enumerate()
        .map(|(series, points)| Series { series, points, label: String::new(), drawn: Points::Joined })
        .collect::<Vec<_>>();
    let all = || series.iter().flat_map(|s| &s.points);
    let (x, y) =
        (Axis::around(all().map(|p| p.0), false), Axis::around(all().map(|p| p.1).chain([0.0]), false));
    let titles = ("bins per channel", "prefill of 512 tokens, ms");
    Some(plane(&series, &x, &y, titles, "Time against bins").standalone(&[]))
}

/// File names and contents.
pub fn all(e: &Evidence) -> Vec<(String, String)> {
    let m = &e.layers.magnitudes;
    let channel = "input channel";
    let both = ["before smoothing", "after"];
    let mut files = vec![
        (
            "figure-1-activations",
            lines(
                &m.activations.each_ref().map(|v| numbered(v)),
                false,
                (channel, "largest |x| (log scale)"),
                "Activations",
                &both,
            ),
        ),
        (
            "figure-1-weights",
            lines(
                &m.weights.each_ref().map(|v| numbered(v)),
                false,
                (channel, "largest |w| (log scale)"),
                "Weights",
                &both,
            ),
        ),
    ];
    let mut left = vec![ranked(&m.weights[1])];
    let mut names = vec!["smoothed weight"];
    for (basis, values) in &m.residuals {
        left.push(ranked(values));
        names.push(match basis {
            BranchBasis::Fourier => "after Fourier",
            BranchBasis::Svd => "after SVD",
            _ => "after 16-bit rows",
        });
    }
    files.push((
        "figure-4",
        lines(
            &left,
            true,
            ("input channel, the largest first (log scale)", "largest |w| (log scale)"),
            "Residuals",
            &names,
        ),
    ));
    for (d, name) in e.layers.distributions.iter().zip(["figure-5", "figure-6"]) {
        files.push((name, distribution(d, &d.name)));
    }
    files.extend(k_run(e).map(|svg| ("k-run", svg)));
    files.extend(latency(e).map(|svg| ("latency", svg)));
    files.into_iter().map(|(name, svg)| (format!("figures/{name}.svg"), svg)).collect()
}

/// How many of the `n` largest of `a` are among the `n` largest of `b`.
fn shared(a: &[f32], b: &[f32], n: usize) -> usize {
    let largest = |x: &[f32]| {
        let mut order: Vec<usize> = (0..x.len()).collect();
        order.sort_by(|&i, &j| x[j].total_cmp(&x[i]));
        order.truncate(n);
        order
    };
    let b = largest(b);
    largest(a).iter().filter(|i| b.contains(i)).count()
}

/// Channels that captions look at.
const LARGEST: usize = 8;

/// The figures with what they show.
pub fn markdown(e: &Evidence) -> String {
    let m = &e.layers.magnitudes;
    let most = |x: &[f32]| number(f64::from(x.iter().fold(0.0f32, |a, x| a.max(*x))));
    let mut text = String::new();
    let mut figure = |file: &str, caption: &str| {
        let _ = write!(text, "![{caption}](figures/{file}.svg)\n\n{caption}\n\n");
    };
    figure(
        "figure-1-activations",
        &format!(
            "Figure 1. The largest magnitude of every input channel of {}, before smoothing (at most {}) and after (at most {}, α = {ALPHA}): of the inputs studied the one with the \
             largest outlier, {:.0} times the median channel.",
            m.name,
            most(&m.activations[0]),
            most(&m.activations[1]),
            m.outlier
        ),
    );
    figure(
        "figure-1-weights",
        &format!(
            "Figure 1, the weights that read them: at most {} before and {} after. Of the {LARGEST} channels with the largest activations {} are among the {LARGEST} with the largest \
             smoothed weights. A large input row of a weight is an impulse along the inputs, whose spectrum is flat.",
            most(&m.weights[0]),
            most(&m.weights[1]),
            shared(&m.activations[0], &m.weights[1], LARGEST)
        ),
    );
    let left: Vec<String> =
        m.residuals.iter().map(|(basis, values)| format!("{} with {}", most(values), basis.name())).collect();
    figure(
        "figure-4",
        &format!(
            "Figure 4. What is left to round of the smoothed weights after a branch with the bits of {MEAN_K} Fourier bins per channel: the largest magnitude of every input channel, \
             sorted. The largest of all is {} without a branch, {}.",
            most(&m.weights[1]),
            left.join(", ")
        ),
    );
    for (n, d) in [5, 6].iter().zip(&e.layers.distributions) {
        figure(
            &format!("figure-{n}"),
            &format!(
                "Figure {n}. Magnitudes of {}, up to 6 times their root mean square, and of its approximations with 20, 50 and 80% of its parameters.",
                d.name
            ),
        );
    }
    if e.speed.is_some() {
        figure("latency", "Prefill time of one checkpoint against the bins that are loaded (`--k-run`).");
    }
    text
}
