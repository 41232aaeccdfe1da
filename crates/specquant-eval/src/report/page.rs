//! The comparison as one HTML page that needs no network.

use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value, context};
use serde::Serialize;

use super::{Comparison, percent};
use crate::stats::estimate;
use crate::svg::{self, Axis, Chart, Mark, Points, Row, Series, short};
use crate::{Error, Result};

const PAGE: &str = include_str!("page.html");

/// As the page's template wants it.
#[derive(Serialize)]
struct Figure {
    title: &'static str,
    text: &'static str,
    svg: String,
}

/// A plot, and what it says.
struct Plot {
    title: &'static str,
    text: &'static str,
    chart: Chart,
    /// Whether the chart itself does not name the models.
    legend: bool,
}

impl Comparison {
    /// The page.
    ///
    /// # Errors
    /// [`Error::Setting`] if the template fails, which its test excludes.
    pub fn html(&self) -> Result<String> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        let figure = |p: Plot| Figure { title: p.title, text: p.text, svg: p.chart.inline() };
        let figures: Vec<Figure> = self.charts().into_iter().map(figure).collect();
        let render = || {
            environment.render_str(
                PAGE,
                context! {
                    style => Value::from_safe_string(svg::STYLE.to_owned()),
                    title => self.title(),
                    lead => match self.records.len() {
                        1 => "",
                        _ => "Every model ran on the same windows and documents. The first is the reference of the others.",
                    },
                    models => self.records.iter().map(|r| r.name.clone()).collect::<Vec<_>>(),
                    classes => (0..self.records.len()).map(svg::class).collect::<Vec<_>>(),
                    summary => self.summary(),
                    by_task => self.by_task(),
                    pairs => self.pairs(),
                    facts => Value::from(Serde(&self.facts)),
                    charts => Value::from(Serde(figures)),
                },
            )
        };
        render().map_err(|e| Error::Setting(format!("the page cannot be made: {e}")))
    }

    /// The page's plots as files, each with its title.
    pub fn plots(&self) -> Vec<(&'static str, String)> {
        let names: Vec<&str> = self.records.iter().map(|r| r.name.as_str()).collect();
        let plot = |p: Plot| (p.title, p.chart.standalone(if p.legend { &names } else { &[] }));
        self.charts().into_iter().map(plot).collect()
    }

    fn charts(&self) -> Vec<Plot> {
        [self.perplexities(), self.accuracies(), self.divergence(), self.sizes()]
            .into_iter()
            .flatten()
            .collect()
    }

    fn perplexities(&self) -> Option<Plot> {
        let rows: Option<Vec<Row>> = self
            .records
            .iter()
            .enumerate()
            .map(|(i, r)| {
                let p = r.perplexity.as_ref()?;
                // The error of the logarithm, so that the bar stays positive.
                let factor = (p.stderr / p.perplexity).exp();
                let bar = (p.perplexity / factor, p.perplexity * factor);
                let title = format!("{}: {:.3} ± {:.3}", r.name, p.perplexity, p.stderr);
                let marks = vec![Mark { series: i, value: p.perplexity, bar, title }];
                Some(Row { label: r.name.clone(), marks, chance: None, note: short(p.perplexity) })
            })
            .collect();
        let rows = rows?;
        let ends = rows.iter().flat_map(|r| &r.marks).flat_map(|m| [m.bar.0, m.bar.1]);
        let chart =
            svg::dots(&rows, &Axis::around(ends, true), "perplexity (log scale)", "Perplexity by model");
        let text = "Lower is better. Bars: one standard error over windows. The windows are the same for all models, so differences are \
                    surer than the bars look; see every pair below.";
        Some(Plot { title: "Perplexity", text, chart, legend: false })
    }

    fn accuracies(&self) -> Option<Plot> {
        if !self.has_tasks() {
            return None;
        }
        let row = |t: usize| {
            let marks = self.records.iter().enumerate().map(|(i, r)| {
                let e = estimate(r.tasks[t].paper().iter().copied());
                let bar = (100.0 * (e.mean - e.stderr), 100.0 * (e.mean + e.stderr));
                Mark { series: i, value: 100.0 * e.mean, bar, title: format!("{}: {} %", r.name, percent(e)) }
            });
            let task = &self.records[0].tasks[t];
            Row {
                label: task.task.to_owned(),
                marks: marks.collect(),
                chance: Some(100.0 * task.chance),
                note: String::new(),
            }
        };
        let rows: Vec<Row> = (0..self.records[0].tasks.len()).map(row).collect();
        let ends = rows.iter().flat_map(|r| r.marks.iter().flat_map(|m| [m.bar.0, m.bar.1]).chain(r.chance));
        let chart = svg::dots(&rows, &Axis::around(ends, false), "accuracy, %", "Accuracy by task");
        let text = "acc_norm where lm-eval reports it, else acc. Bars: one standard error over documents. Dashed: guessing.";
        Some(Plot { title: "Accuracy by task", text, chart, legend: true })
    }

    fn divergence(&self) -> Option<Plot> {
        let series: Vec<Series> = self
            .records
            .iter()
            .enumerate()
            .skip(1)
            .filter_map(|(i, r)| {
                let ranges = &r.perplexity.as_ref()?.distance.as_ref()?.kl_by_position;
                let point = |p: &crate::PositionRange| {
                    let middle = (p.positions.0 + p.positions.1) as f64 / 2.0;
                    let title = format!(
                        "{}, positions {} to {}: {:.4} nats",
                        r.name, p.positions.0, p.positions.1, p.kl
                    );
                    (middle, p.kl, title)
                };
                Some(Series {
                    series: i,
                    points: ranges.iter().filter(|p| p.kl > 0.0).map(point).collect(),
                    label: String::new(),
                    drawn: Points::Joined,
                })
            })
            .collect();
        // Where nothing differs there is nothing to draw on a logarithmic scale.
        let points = || series.iter().flat_map(|s| &s.points);
        points().next()?;
        let (x, y) = (Axis::around(points().map(|p| p.0), false), Axis::around(points().map(|p| p.1), true));
        let titles = ("position in the window, tokens", "KL(reference ‖ model), nats (log scale)");
        let chart = svg::plane(&series, &x, &y, titles, "Divergence by position");
        let text = "How far the next-token distributions are from the reference's. A line that climbs means that errors of the KV cache add up.";
        Some(Plot { title: "Divergence by position", text, chart, legend: true })
    }

    fn sizes(&self) -> Option<Plot> {
        let series: Option<Vec<Series>> = self
            .records
            .iter()
            .enumerate()
            .map(|(i, r)| {
                let megabytes = r.info.tensor_bytes as f64 / 1e6;
                let p = r.perplexity.as_ref()?.perplexity;
                let title = format!("{}: {megabytes:.0} MB, perplexity {p:.3}", r.name);
                Some(Series {
                    series: i,
                    points: vec![(megabytes, p, title)],
                    label: r.name.clone(),
                    drawn: Points::Loose,
                })
            })
            .collect();
        let series = series?;
        let points = || series.iter().flat_map(|s| &s.points);
        let (x, y) = (Axis::around(points().map(|p| p.0), false), Axis::around(points().map(|p| p.1), true));
        let titles = ("size of all tensors, MB", "perplexity (log scale)");
        let chart = svg::plane(&series, &x, &y, titles, "Size against perplexity");
        let text = "Lower and further left is better. The size counts everything stored: codes, scales, branch and embeddings.";
        Some(Plot { title: "Size against quality", text, chart, legend: false })
    }
}
