//! `specquant bench`.

use std::io::Write;
use std::process::ExitCode;

use specquant_bench::{
    AttentionRow, BlockRow, ModelRow, Part, Product, ProductRow, Report, Settings, roofline, run as measure,
};
use specquant_eval::{claim_directory, write_whole};

use crate::args::{BenchArgs, PartArg};
use crate::system;
use crate::ui::{Progress, command, table};

pub fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.threads)?;
    anyhow::ensure!(
        args.seconds > 0.0 && args.seconds <= 3600.0,
        "--seconds is {}; take 0.1 to 3600",
        args.seconds
    );
    // Before the work: a README.md of somebody else's is not to be overwritten.
    let claim = args.output.iter().map(|dir| claim_directory(dir, ".specquant-bench", "benchmark", true));
    let _claim = claim.collect::<specquant_eval::Result<Vec<_>>>()?;
    let only = args.only.iter().map(|part| match part {
        PartArg::Products => Part::Products,
        PartArg::Attention => Part::Attention,
        PartArg::Blocks => Part::Blocks,
        PartArg::Models => Part::Models,
    });
    let settings =
        Settings { full: args.full, models: args.models, seconds: args.seconds, only: only.collect() };
    let mut progress: Option<Progress> = None;
    let report = measure(&settings, &mut |step| {
        let progress = progress.get_or_insert_with(|| Progress::new("measured", step.of as u64, args.json));
        progress.step(step.done as u64, step.name);
    })?;
    drop(progress);
    let (json, tables) = (serde_json::to_string_pretty(&report)?, text(&report));
    if let Some(dir) = &args.output {
        let plot = (!report.products.is_empty()).then(|| roofline(&report));
        let shown = if plot.is_some() { "![Roofline](roofline.svg)\n\n" } else { "" };
        let page = format!(
            "# Speed\n\n{shown}```\n{tables}```\n\nMade by `{}`; [raw data](bench.json).\n",
            command()
        );
        let files =
            [("README.md", Some(&page)), ("bench.json", Some(&json)), ("roofline.svg", plot.as_ref())];
        for (name, content) in files.into_iter().filter_map(|(name, content)| Some((name, content?))) {
            write_whole(&dir.join(name), |file| file.write_all(content.as_bytes()))?;
        }
    }
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{json}")?;
    } else {
        write!(out, "{tables}")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(report: &Report) -> String {
    let m = &report.machine;
    let mut text = format!(
        "{}, {} threads, {}\nlimits: int8 {:.0} GOP/s, f32 {:.0} GFLOP/s, memory read {:.1} GB/s\n",
        m.cpu, m.threads, m.isa, m.int8_gops, m.f32_gflops, m.read_gbs
    );
    if !report.products.is_empty() {
        text += "\nproducts, with the quantizer of their activations; of the limit: arithmetic, or memory where few tokens are bound by it\n";
        text += &table(&products(report));
    }
    if !report.attention.is_empty() {
        text += "\nattention over a cache of 4 bits, times faster than in f16; memory, times less\n";
        text += &table(&attention(&report.attention));
    }
    if !report.blocks.is_empty() {
        text += "\none decoder block on prompts, times faster than in f32; of the limit: spectral's linear layers of integer arithmetic; memory of weights and cache, times less than at 16 bits\n";
        text += &table(&blocks(report, false));
        text += "\none decoder block on the next token of each sequence, times faster than in f32; of the limit: as above, or of reading as many bytes as weights and cache have, measured in turns; spectral's tokens a second, times one sequence's\n";
        text += &table(&blocks(report, true));
    }
    if !report.models.is_empty() {
        text += "\nwhole models, tokens a second; in brackets, times the first one's\n";
        text += &table(&models(&report.models));
    }
    text
}

fn cells<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).into()
}

fn products(report: &Report) -> Vec<Vec<String>> {
    let machine = &report.machine;
    let mut rows =
        vec![cells(["in x out", "tokens", "product", "GOP/s", "weight GB/s", "of the limit", "times f32"])];
    rows.extend(report.products.iter().map(|row: &ProductRow| {
        let top = if matches!(row.product, Product::F32 | Product::W4A16) {
            machine.f32_gflops
        } else {
            machine.int8_gops
        };
        // The lower of the two roofs over this product.
        let memory = machine.read_gbs * 2.0 * row.rows as f64 / row.product.weight_bytes();
        vec![
            format!("{} x {}", row.inp, row.out),
            row.rows.to_string(),
            row.product.name().to_owned(),
            format!("{:.0}", row.gops()),
            format!("{:.1}", row.gbs()),
            format!("{:.0}%", 100.0 * row.gops() / top.min(memory)),
            format!("{:.2}", row.f32_seconds / (row.seconds + row.quantize_seconds)),
        ]
    }));
    rows
}

fn attention(all: &[AttentionRow]) -> Vec<Vec<String>> {
    let mut rows =
        vec![cells(["heads of", "cached", "queries", "f16 µs", "uniform codes", "levels", "memory"])];
    rows.extend(all.iter().map(|row| {
        vec![
            row.shape.name.to_owned(),
            row.tokens.to_string(),
            row.queries.to_string(),
            format!("{:.0}", 1e6 * row.f16),
            format!("{:.2}", row.f16 / row.uniform),
            format!("{:.2}", row.f16 / row.levels),
            format!("{:.2}", row.bytes[0] as f64 / row.bytes[1] as f64),
        ]
    }));
    rows
}

/// Blocks on prompts, or on single tokens behind what is cached.
fn blocks(report: &Report, decoded: bool) -> Vec<Vec<String>> {
    let (first, last) = match decoded {
        false => (["prompts", "tokens each"], ["specquant memory", "spectral memory"]),
        true => (["sequences", "cached"], ["tokens/s", "times one"]),
    };
    let times =
        ["f32 ms", "spectral ms", "plain W4A4", "specquant", "spectral", "over plain", "of the limit"];
    let head = ["block of"].into_iter().chain(first).chain(times).chain(last);
    let mut rows = vec![head.map(str::to_owned).collect()];
    rows.extend(report.blocks.iter().filter(|row| decoded == (row.before > 0)).map(|row: &BlockRow| {
        let faster = |seconds: f64| format!("{:.2}", row.dense / seconds);
        let over = |seconds: f64| format!("{:+.0}%", 100.0 * (seconds / row.plain - 1.0));
        let less = |bytes: usize| format!("{:.2}", row.f16_bytes as f64 / bytes as f64);
        let one = || row.times_one(&report.blocks).map_or("-".to_owned(), |times| format!("{times:.2}"));
        let (length, last) = match decoded {
            false => (row.tokens, [less(row.specquant_bytes), less(row.spectral_bytes)]),
            true => (row.before, [format!("{:.0}", row.tokens_per_second()), one()]),
        };
        let mut cells = vec![
            row.shape.name.to_owned(),
            row.batch.to_string(),
            length.to_string(),
            format!("{:.2}", 1e3 * row.dense),
            format!("{:.2}", 1e3 * row.spectral),
            faster(row.plain),
            faster(row.specquant),
            faster(row.spectral),
            format!("{}, {}", over(row.specquant), over(row.spectral)),
            format!("{:.0}%", 100.0 * row.of_the_limit(&report.machine)),
        ];
        cells.extend(last);
        cells
    }));
    rows
}

fn models(all: &[ModelRow]) -> Vec<Vec<String>> {
    let Some(first) = all.first() else { return Vec::new() };
    let mut head = cells(["model", "scheme", "loaded in s"]);
    head.extend(first.prefill.iter().map(|(n, _)| format!("prompt {n}")));
    head.extend(first.decode.iter().map(|(n, _)| format!("decode {n}")));
    let mut rows = vec![head];
    for model in all {
        let name = model
            .path
            .file_name()
            .map_or_else(|| model.path.display().to_string(), |n| n.to_string_lossy().into_owned());
        let mut row = vec![name, model.scheme.clone(), format!("{:.2}", model.load_seconds)];
        for (of, measured) in [(&first.prefill, &model.prefill), (&first.decode, &model.decode)] {
            row.extend(of.iter().map(|(n, base)| {
                let found = measured.iter().find(|(m, _)| m == n);
                found.map_or("-".to_owned(), |(_, speed)| format!("{speed:.0} ({:.2})", speed / base))
            }));
        }
        rows.push(row);
    }
    rows
}
