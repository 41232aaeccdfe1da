//! A comparison of models: tables, one HTML page, and JSON.

mod page;

use serde_json::{Map, Value, json};

use crate::evaluate::{TaskResult, averages};
use crate::perplexity::Perplexity;
use crate::results::RunInfo;
use crate::stats::{Difference, Estimate, estimate, paired};
use crate::svg;
use crate::tasks::TASKS;

/// One model's results.
#[derive(Debug, Clone)]
pub struct Record {
    /// What it is called here.
    pub name: String,
    /// What was evaluated, and how.
    pub info: RunInfo,
    /// On the text, if there was one; with its distance to the first model.
    pub perplexity: Option<Perplexity>,
    /// In the order of the tasks; empty if there were none.
    pub tasks: Vec<TaskResult>,
}

/// Models on the same text and the same documents. The first is the reference of all others.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// At least one; all with the same windows and documents.
    pub records: Vec<Record>,
    /// How it was measured, for the reader: name and value.
    pub facts: Vec<(String, String)>,
}

/// Rows of cells, the first of which is the header.
pub type Table = Vec<Vec<String>>;

impl Record {
    /// Difference of the papers' average to another model's, paired over documents within each task.
    fn average_difference(&self, other: &Record) -> Option<Difference> {
        let tasks = self.tasks.iter().zip(&other.tasks);
        Difference::average(&tasks.map(|(a, b)| paired(a.paper(), b.paper())).collect::<Vec<_>>())
    }

    /// Difference of log-perplexity to another model's, paired over windows.
    fn log_perplexity_difference(&self, other: &Record) -> Option<Difference> {
        Some(self.perplexity.as_ref()?.log_difference(other.perplexity.as_ref()?))
    }
}

/// A percentage with its standard error.
fn percent(e: Estimate) -> String {
    format!("{:.2} ± {:.2}", 100.0 * e.mean, 100.0 * e.stderr)
}

/// Text that Markdown shows as it is, in one table cell.
fn cell(text: &str) -> String {
    text.replace(['\n', '\r'], " ").replace('&', "&amp;").replace('<', "&lt;").replace('|', "\\|")
}

/// The file of a plot with this title.
pub fn plot_file(title: &str) -> String {
    format!("{}.svg", title.to_lowercase().replace(' ', "-"))
}

/// A table in Markdown. align: of all columns but the first, `"--:"` for numbers, `"---"` for text.
pub fn markdown_table(table: &Table, align: &str) -> String {
    let mut text = String::new();
    for (i, row) in table.iter().enumerate() {
        let cells: Vec<String> = row.iter().map(|c| cell(c)).collect();
        text += &format!("| {} |\n", cells.join(" | "));
        if i == 0 {
            text += &format!("|---{}|\n", format!("|{align}").repeat(row.len().saturating_sub(1)));
        }
    }
    text
}

impl Comparison {
    /// "Avg9" for all nine tasks.
    fn average_name(&self) -> String {
        let n = self.records.first().map_or(0, |r| r.tasks.len());
        if n == TASKS.len() { "Avg9".to_owned() } else { format!("Avg of {n}") }
    }

    fn has_text(&self) -> bool {
        self.records.iter().all(|r| r.perplexity.is_some())
    }

    fn has_tasks(&self) -> bool {
        self.records.iter().all(|r| !r.tasks.is_empty())
    }

    /// One row a model.
    pub fn summary(&self) -> Table {
        let average = self.average_name();
        // A model alone has nothing to differ from.
        let several = self.records.len() > 1;
        let mut header = vec!["model".to_owned(), "bits/weight".to_owned(), "MB".to_owned()];
        if self.has_text() {
            header.push("perplexity".to_owned());
        }
        if self.has_text() && several {
            header.extend(["Δ log-ppl", "KL mean", "KL 99%", "top-1 %"].map(str::to_owned));
        }
        if self.has_tasks() {
            header.push(format!("{average} %"));
            header.extend(several.then(|| format!("Δ {average}")));
            header.push("acc avg %".to_owned());
        }
        let mut rows = vec![header];
        for (i, r) in self.records.iter().enumerate() {
            let bits = r.info.bits_per_weight.map_or("–".to_owned(), |b| format!("{b:.2}"));
            let mut row = vec![r.name.clone(), bits, svg::short(r.info.tensor_bytes as f64 / 1e6)];
            let none = || "–".to_owned();
            if let (true, Some(p)) = (self.has_text(), &r.perplexity) {
                let error = if p.window_nll.len() > 1 { format!("{:.2}", p.stderr) } else { "?".to_owned() };
                row.push(format!("{:.2} ± {error}", p.perplexity));
                if several {
                    let d = p.distance.as_ref().filter(|_| i > 0);
                    row.push(d.map_or_else(none, |d| d.delta_log_perplexity.show(1.0, 4)));
                    row.push(d.map_or_else(none, |d| {
                        format!("{} ± {}", svg::short(d.kl.mean), svg::short(d.kl.stderr))
                    }));
                    row.push(d.map_or_else(none, |d| svg::short(d.kl_p99)));
                    row.push(d.map_or_else(none, |d| percent(d.top1_agreement)));
                }
            }
            if self.has_tasks() {
                let a = averages(&r.tasks);
                row.push(percent(a.paper));
                if several {
                    let delta = r.average_difference(&self.records[0]).filter(|_| i > 0);
                    row.push(delta.map_or_else(none, |d| d.show(100.0, 2)));
                }
                row.push(percent(a.acc));
            }
            rows.push(row);
        }
        rows
    }

    /// One row a task and for the averages, one column a model and one for chance.
    pub fn by_task(&self) -> Option<Table> {
        if !self.has_tasks() {
            return None;
        }
        let first = &self.records[0].tasks;
        let names = self.records.iter().map(|r| r.name.clone());
        let mut rows = vec![
            ["task".to_owned(), "documents".to_owned()]
                .into_iter()
                .chain(names)
                .chain(["chance".to_owned()])
                .collect(),
        ];
        for (t, task) in first.iter().enumerate() {
            let mut lines = vec![(
                if task.acc_norm.is_some() { "acc_norm" } else { "acc" },
                TaskResult::paper as fn(&TaskResult) -> &[f64],
            )];
            if task.acc_norm.is_some() {
                lines.push(("acc", |r| &r.acc));
            }
            for (metric, values) in lines {
                let cells =
                    self.records.iter().map(|r| percent(estimate(values(&r.tasks[t]).iter().copied())));
                let start = [format!("{} {metric}", task.task), task.acc.len().to_string()];
                rows.push(
                    start.into_iter().chain(cells).chain([format!("{:.1}", 100.0 * task.chance)]).collect(),
                );
            }
            if task.perplexity.is_some() {
                let cell = |r: &Record| {
                    r.tasks[t].perplexity.map_or(String::new(), |p| {
                        format!("{} ± {}", svg::short(p.mean), svg::short(p.stderr))
                    })
                };
                let start = [format!("{} perplexity", task.task), task.acc.len().to_string()];
                rows.push(
                    start.into_iter().chain(self.records.iter().map(cell)).chain([String::new()]).collect(),
                );
            }
        }
        let averages: Vec<_> = self.records.iter().map(|r| averages(&r.tasks)).collect();
        let chance = format!("{:.1}", 100.0 * averages[0].chance);
        let average = format!("{} (acc_norm, else acc)", self.average_name());
        for (name, value) in [
            (average, averages.iter().map(|a| a.paper).collect::<Vec<_>>()),
            ("average of acc".to_owned(), averages.iter().map(|a| a.acc).collect()),
        ] {
            rows.push(
                [name, String::new()]
                    .into_iter()
                    .chain(value.into_iter().map(percent))
                    .chain([chance.clone()])
                    .collect(),
            );
        }
        Some(rows)
    }

    /// Every pair of models: the differences with their intervals.
    pub fn pairs(&self) -> Option<Table> {
        let n = self.records.len();
        if n < 2 {
            return None;
        }
        let mut header = vec!["pair".to_owned()];
        if self.has_text() {
            header.push("Δ log-perplexity".to_owned());
        }
        if self.has_tasks() {
            header.push(format!("Δ {} %", self.average_name()));
        }
        let mut rows = vec![header];
        for (i, b) in self.records.iter().enumerate() {
            for a in &self.records[i + 1..] {
                let mut row = vec![format!("{} − {}", a.name, b.name)];
                row.extend(a.log_perplexity_difference(b).map(|d| d.show(1.0, 4)));
                row.extend(a.average_difference(b).map(|d| d.show(100.0, 2)));
                rows.push(row);
            }
        }
        Some(rows)
    }

    /// Everything in numbers.
    pub fn json(&self) -> Value {
        let model = |r: &Record| {
            let tasks = r.tasks.iter().map(|t| {
                let mut value = json!({ "documents": t.acc.len(), "chance": t.chance, "acc": estimate(t.acc.iter().copied()) });
                if let Some(norm) = &t.acc_norm {
                    value["acc_norm"] = json!(estimate(norm.iter().copied()));
                }
                if let Some(p) = t.perplexity {
                    value["perplexity"] = json!(p);
                }
                (t.task.to_owned(), value)
            });
            json!({
                "name": r.name, "model": r.info.model, "model_sha256": r.info.model_sha256, "scheme": r.info.scheme,
                "bits_per_weight": r.info.bits_per_weight, "tensor_bytes": r.info.tensor_bytes,
                "perplexity": r.perplexity,
                "tasks": tasks.collect::<Map<_, _>>(),
                "averages": (!r.tasks.is_empty()).then(|| averages(&r.tasks)),
            })
        };
        let mut pairs = Vec::new();
        for (i, b) in self.records.iter().enumerate() {
            for a in &self.records[i + 1..] {
                pairs.push(json!({
                    "first": a.name, "second": b.name,
                    "delta_log_perplexity": a.log_perplexity_difference(b),
                    "delta_average": a.average_difference(b),
                }));
            }
        }
        json!({
            "specquant_version": env!("CARGO_PKG_VERSION"),
            "facts": self.facts.iter().map(|(k, v)| (k.clone(), json!(v))).collect::<Map<_, _>>(),
            "models": self.records.iter().map(model).collect::<Vec<_>>(),
            "pairs": pairs,
        })
    }

    /// The tables and how they were made, in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = format!("# {}\n", self.title());
        let tables =
            [("Summary", Some(self.summary())), ("Tasks, %", self.by_task()), ("Every pair", self.pairs())];
        for (name, table) in tables.into_iter().filter_map(|(n, t)| Some((n, t?))) {
            text += &format!("\n## {name}\n\n");
            text += &markdown_table(&table, "--:");
        }
        for (title, _) in self.plots() {
            text += &format!("\n![{title}]({})\n", plot_file(title));
        }
        text += "\n± in the columns Δ is half of the 95% confidence interval of the paired difference; ≈ marks one that holds zero, and ? where one window or document gives none. Elsewhere ± is \
                 the standard error, over windows or documents, which the models share.\n\n## How this was measured\n\n";
        for (name, value) in &self.facts {
            match name.as_str() {
                "command" => {
                    text += &format!("- {name}: `{}`\n", value.replace('`', "'").replace(['\n', '\r'], " "))
                }
                _ => text += &format!("- {name}: {}\n", cell(value)),
            }
        }
        text
    }

    fn title(&self) -> String {
        let reference = self.records.first().map_or("", |r| r.name.as_str());
        let kind = if self.records.len() > 1 { "Comparison with" } else { "Results of" };
        format!("{kind} {reference}")
    }
}
