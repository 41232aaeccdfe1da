//! `specquant quantize`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::json;
use specquant_model::{BranchBasis, Source};
use specquant_quantize as q;
use specquant_quantize::{Embeddings, Event, LayerReport, Overhead, Plan, Recipe, Report, Rounding, Smooth};

use crate::args::{EmbeddingsArg, OverheadArg, Overrides, QuantizeArgs, ScoreArg, Strength};
use crate::interrupt::{self, After};
use crate::resources::check_resources;
use crate::system::{self, human};
use crate::ui::{Progress, Wrong, note};

/// The recipe with the flags' values in place of its own.
pub fn recipe(name: &str, flags: &Overrides) -> anyhow::Result<Recipe> {
    let mut r = Recipe::load(name)?;
    if let Some(text) = &flags.scheme {
        r.scheme = r.scheme.with_widths(text)?;
    }
    macro_rules! replace {
        ($($flag:ident => $key:expr),* $(,)?) => { $(if let Some(value) = flags.$flag.clone() { $key = value; })* };
    }
    replace! {
        group_size => r.scheme.group_size,
        levels => r.scheme.levels,
        act_clip => r.scheme.act_clip,
        kv_intact => r.scheme.kv_intact,
        samples => r.calibration.samples,
        sequence_length => r.calibration.sequence_length,
        search_tokens => r.calibration.search_tokens,
        seed => r.seed,
    }
    // A ratio that was asked for is not searched.
    r.search_act_clip &= flags.act_clip.is_none();
    if flags.calibration.is_some() {
        r.calibration.file.clone_from(&flags.calibration);
    }
    if flags.kv_clip.is_some() {
        r.scheme.kv_clip = flags.kv_clip;
    }
    if flags.threads.is_some() {
        r.threads = flags.threads;
    }
    match flags.smoothing_strength {
        Some(Strength::Off) => r.smooth = None,
        Some(Strength::On(s)) => {
            r.smooth = Some(Smooth {
                method: r.smooth.map_or_else(Default::default, |s| s.method),
                smoothing_strength: s,
                all_sites: r.smooth.map_or(r.rotate.is_none(), |s| s.all_sites),
            })
        }
        None => {}
    }
    if let Some(keep) = flags.keep {
        let Some(input) = &mut r.input else {
            anyhow::bail!(
                "--keep: the recipe {} does not transform inputs; choose spectral, or add [input] rotation = \"hadamard\" to a recipe file",
                r.name
            );
        };
        input.keep = keep;
    }
    branch(&mut r, flags)?;
    match flags.embeddings {
        Some(EmbeddingsArg::Half) => r.embeddings = Embeddings::Half,
        Some(EmbeddingsArg::Int8) => r.embeddings = Embeddings::Int8,
        None => {}
    }
    r.validate()?;
    Ok(r)
}

/// The branch with the flags' values in place of its own.
fn branch(r: &mut Recipe, flags: &Overrides) -> anyhow::Result<()> {
    let Overrides { basis, mean_k, rank, max_k, score, temperature, overhead, .. } = flags;
    let sized = mean_k.is_some() || rank.is_some();
    if sized && mean_k.unwrap_or(0) == 0 && rank.unwrap_or(0) == 0 {
        r.branch = None;
        return Ok(());
    }
    let shaped = basis.is_some() || score.is_some() || temperature.is_some() || overhead.is_some();
    if !sized && !shaped && max_k.is_none() {
        return Ok(());
    }
    let mut branch = r.branch.unwrap_or_default();
    if let Some(basis) = *basis {
        branch.basis = basis;
        // What only the former basis has does not come along.
        if !basis.is_low_rank() {
            branch.iterations = 0;
        }
        if basis.is_shared() {
            (branch.score, branch.temperature) = (q::branch::Score::Uniform, q::Searched::Fixed(0.0));
        } else {
            branch.rank = 0;
        }
    }
    if sized {
        branch.rank = rank.unwrap_or(0);
        branch.mean_k = mean_k.unwrap_or(branch.mean_k);
    }
    anyhow::ensure!(
        branch.mean_k > 0 || branch.rank > 0,
        "this recipe has no branch: give it a size with --mean-k K, or --rank R for the bases svd, wsvd and rows"
    );
    if let Some(max_k) = *max_k {
        branch.max_k = max_k;
    } else if branch.max_k > 0 && branch.max_k < branch.mean_k {
        // A bound that came along with the recipe gives way to a larger mean.
        branch.max_k = branch.mean_k.saturating_mul(2);
    }
    if let Some(score) = score {
        branch.score = match score {
            ScoreArg::Act => q::branch::Score::ActivationAware,
            ScoreArg::Entropy => q::branch::Score::Entropy,
            ScoreArg::Absmean => q::branch::Score::AbsMean,
            ScoreArg::Absmax => q::branch::Score::AbsMax,
            ScoreArg::L2 => q::branch::Score::L2,
            ScoreArg::Uniform => q::branch::Score::Uniform,
        };
        // A score decides nothing at temperature 0, which a branch made by flags has.
        if *score != ScoreArg::Uniform && branch.temperature == q::Searched::Fixed(0.0) {
            branch.temperature = q::SEARCH;
        }
    }
    branch.temperature = temperature.unwrap_or(branch.temperature);
    branch.overhead = match overhead {
        Some(OverheadArg::Plain) => Overhead::Plain,
        Some(OverheadArg::Matched) => Overhead::Matched,
        None => branch.overhead,
    };
    r.branch = Some(branch);
    Ok(())
}

/// The plan, for people.
fn describe(plan: &Plan, recipe: &Recipe) -> String {
    let rotate = match (&recipe.rotate, &recipe.learn) {
        (Some(_), _) => "rotation, ",
        (None, Some(q::Learn::FlatQuant(_))) => "learned transforms, ",
        (None, _) => "",
    };
    let smooth = if recipe.smooth.is_some() { "smoothing, " } else { "" };
    let branch = recipe.branch.map_or(String::new(), |b| {
        let name = b.basis.name();
        match b.rank {
            0 if b.basis == BranchBasis::Fourier => format!("{} Fourier bins per channel, ", b.mean_k),
            0 => format!("a {name} branch of the size of {} Fourier bins per channel, ", b.mean_k),
            rank => format!("a {name} branch of rank {rank}, "),
        }
    });
    let rounding = match recipe.rounding {
        Rounding::Rtn {} => "nearest rounding",
        Rounding::Gptq(_) => "GPTQ",
    };
    let tuned = match recipe.learn {
        Some(q::Learn::Tune(_)) => {
            ", tuning, which takes most of the time (the recipe spectral does without)"
        }
        _ => "",
    };
    format!(
        "plan: {} {}: {rotate}{smooth}{branch}{rounding}{tuned}\n  {} blocks, {} linear layers, {:.1} M weights at {:.3} bits\n  \
         calibration {} tokens, predicted peak memory {}{}, output about {}",
        recipe.name,
        recipe.scheme,
        plan.blocks,
        plan.layers,
        plan.weights as f64 / 1e6,
        plan.bits_per_weight,
        plan.calibration_tokens,
        human(plan.peak_bytes),
        if plan.spill { " (hidden states on the disk)" } else { "" },
        human(plan.output_bytes),
    )
}

/// A run that shows what happens, and at its end lists what was done other than the recipe says.
pub fn run_told(
    source: &Source,
    recipe: &Recipe,
    texts: Option<&[Vec<u32>]>,
    destination: &q::Destination,
    quiet: bool,
) -> anyhow::Result<Report> {
    let report = q::run(source, recipe, texts, destination, &mut bars(source, quiet))?;
    if !report.fallbacks.is_empty() {
        note!(
            "warning: done other than the recipe says, as report.json and README.md of the checkpoint list too:"
        );
        tell(&report.fallbacks);
    }
    Ok(report)
}

/// A line for each.
pub fn tell(fallbacks: &[q::Fallback]) {
    for q::Fallback { layer, what } in fallbacks {
        note!("  {layer}: {what}");
    }
}

/// The calibration sequences of the recipe's file, if it has one; also checks the tokenizer.
pub fn prepare(source: &Source, recipe: &Recipe) -> anyhow::Result<Option<Vec<Vec<u32>>>> {
    let tokenizer = source.tokenizer()?;
    let (have, known) = (tokenizer.vocab_size(), source.config().vocab_size);
    anyhow::ensure!(
        have <= known,
        "{}: the tokenizer has {have} tokens but the model embeds {known}; take both from the same revision of the model",
        source.path().display()
    );
    let c = recipe.text();
    let Some(file) = c.file.as_ref().filter(|_| recipe.scheme.weight_bits < 16) else { return Ok(None) };
    let texts = q::calibration::from_file(file, &tokenizer, &c, recipe.seed)?;
    if let Some(id) = texts.iter().flatten().find(|id| **id as usize >= known) {
        let token = tokenizer.id_to_token(*id).unwrap_or_default();
        anyhow::bail!(
            "{}: the tokenizer's token {token:?} is number {id}, and the model embeds {known}; take both from the same revision of the model",
            source.path().display()
        );
    }
    Ok(Some(texts))
}

/// Shows what happens.
fn bars(source: &Source, quiet: bool) -> impl FnMut(Event) + use<> {
    let blocks = source.config().num_layers as u64;
    let (mut bars, mut skipped) = ([const { None::<Progress> }; 3], (0, 0));
    move |event| {
        let [writing, block, learning] = &mut bars;
        match event {
            Event::Resumed { blocks, steps } => skipped = (blocks as u64, steps as u64),
            Event::Writing { done, of } => {
                let writing = writing.get_or_insert_with(|| Progress::new("writing text", of as u64, quiet));
                writing.set(done as u64, "tokens");
            }
            Event::Learning { step, of, loss } => {
                let learning = learning.get_or_insert_with(|| Progress::new("learning", of as u64, quiet));
                skip(learning, &mut skipped.1);
                learning.set(step as u64 + 1, &format!("loss {loss:.4}"));
            }
            Event::Block { index, layers, .. } => {
                *writing = None;
                let block = block.get_or_insert_with(|| Progress::new("block", blocks, quiet));
                skip(block, &mut skipped.0);
                block.step(index as u64 + 1, &news(layers));
            }
        }
    }
}

/// Quantizes the first block, and says what all of them would take.
fn dry_run(checked: &Checked) -> anyhow::Result<()> {
    let Checked { source, recipe, plan, destination, texts, quiet, watch } = checked;
    interrupt::explain(After::Remove(destination.trial()?.partial()?));
    let (mut bars, mut peak) = (bars(source, *quiet), None);
    let mut progress = |event: Event| {
        if matches!(event, Event::Block { .. }) {
            peak = watch.peak();
        }
        bars(event);
    };
    let trial = q::first_block(source, recipe, texts.as_deref(), destination, &mut progress)?;
    if *quiet {
        let result =
            json!({ "plan": plan, "recipe": recipe, "first_block": trial, "peak_anonymous_bytes": peak });
        writeln!(std::io::stdout(), "{result:#}")?;
        return Ok(());
    }
    let tuning = match trial.tuning_seconds {
        0.0 => String::new(),
        time => {
            format!(", {} for tuning the whole model at the end, by a few steps of that block", seconds(time))
        }
    };
    writeln!(
        std::io::stdout(),
        "first block: {}, and {} for what is done once{tuning}\nall {} blocks, extrapolated: {}, peak memory {} (predicted {}), {} of tensors (predicted {})",
        seconds(trial.block_seconds),
        seconds(trial.once_seconds),
        plan.blocks,
        seconds(trial.seconds),
        peak.map_or("unknown".to_owned(), human),
        human(plan.peak_bytes),
        human(trial.tensor_bytes),
        human(plan.output_bytes),
    )?;
    if trial.tuning_seconds > 0.0 {
        writeln!(std::io::stdout(), "memory of tuning is not in what was measured, but in the prediction")?;
    }
    Ok(())
}

/// A time for people.
fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 600.0 => format!("{s:.0} s"),
        s if s < 36000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.0} h", s / 3600.0),
    }
}

/// Tells a bar, once, what an earlier run has done.
fn skip(bar: &mut Progress, done: &mut u64) {
    if *done > 0 {
        bar.skip(std::mem::take(done));
    }
}

/// A finished block in a line.
fn news(layers: &[LayerReport]) -> String {
    let worst = layers.iter().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error));
    let mean = layers.iter().map(|l| l.relative_error).sum::<f64>() / layers.len().max(1) as f64;
    worst.map_or(String::new(), |w| {
        let short = w.name.rsplit('.').next().unwrap_or(&w.name);
        format!(
            "{:.3} bits, error mean {mean:.4}, largest {:.4} ({short})",
            w.bits_per_weight, w.relative_error
        )
    })
}

/// A run that is asked for.
pub struct Wanted<'a> {
    pub model: &'a Path,
    pub recipe: &'a str,
    pub overrides: &'a Overrides,
    pub destination: q::Destination,
    pub ignore_memory: bool,
    /// For `--json`, whose result is all that is printed.
    pub quiet: bool,
}

/// A run, everything of which that can be known before a weight is read is right.
pub struct Checked {
    source: Source,
    recipe: Recipe,
    plan: Plan,
    pub destination: q::Destination,
    texts: Option<Vec<Vec<u32>>>,
    quiet: bool,
    /// Of memory since before the text was read.
    watch: system::Watch,
}

impl Checked {
    /// Looks at all that can be known before a weight is read, and tells all that is wrong. Prints the plan, also of what is refused.
    pub fn new(wanted: Wanted) -> anyhow::Result<Checked> {
        let watch = system::Watch::new();
        let Wanted { model, recipe: name, overrides, mut destination, ignore_memory, quiet } = wanted;
        let mut wrong = Wrong::default();
        let (recipe, source) = (wrong.of(recipe(name, overrides)), wrong.of(Source::open(model)));
        let text = recipe.as_ref().map_or(&overrides.calibration, |recipe| &recipe.calibration.file).clone();
        let (Some(recipe), Some(source)) = (recipe, source) else {
            text.map(|file| wrong.of(q::calibration::read(&file)));
            // The place of a new checkpoint is tried by making directories, which nobody would need.
            if destination.path.exists() {
                wrong.of(q::check_output(&destination));
            }
            return Err(wrong.into_error());
        };
        wrong.of(system::set_threads(recipe.threads));
        let describe = |plan: &Plan| {
            if !quiet {
                note!("{}", describe(plan, &recipe));
                tell(&plan.fallbacks);
            }
        };
        // Said before it is refused, too.
        let plan = wrong.of(q::plan(&source, &recipe)).and_then(|plan| {
            let (output, spill) = (&destination.path, destination.spill);
            let checked = wrong.of(check_resources(&source, &recipe, output, ignore_memory, spill));
            describe(checked.as_ref().unwrap_or(&plan));
            checked
        });
        // After the resources: what an earlier run has begun has its room, and an empty place is tidied up by this.
        wrong.of(q::check_output(&destination));
        let texts = wrong.of(prepare(&source, &recipe));
        if let Some(Some(texts)) = texts.as_ref().filter(|_| !quiet) {
            tell(q::short_text(&recipe, texts).as_slice());
        }
        let (Some(plan), Some(texts), true) = (plan, texts, wrong.is_nothing()) else {
            return Err(wrong.into_error());
        };
        destination.spill = plan.spill;
        Ok(Checked { source, recipe, plan, destination, texts, quiet, watch })
    }

    /// What is of use behind the run.
    pub fn into_parts(self) -> (Source, Recipe, Plan) {
        (self.source, self.recipe, self.plan)
    }

    /// Does it.
    pub fn run(&self) -> anyhow::Result<Report> {
        run_told(&self.source, &self.recipe, self.texts.as_deref(), &self.destination, self.quiet)
    }
}

pub fn run(args: QuantizeArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let checked = Checked::new(Wanted {
        model: &args.model,
        recipe: &args.recipe,
        overrides: &args.overrides,
        destination: q::Destination {
            path: args.output.clone(),
            overwrite: args.overwrite,
            unfinished: match (args.resume, args.overwrite) {
                (true, _) => q::Unfinished::Resume,
                (false, true) => q::Unfinished::Discard,
                (false, false) => q::Unfinished::Keep,
            },
            spill: args.spill,
        },
        ignore_memory: args.ignore_memory,
        quiet: args.json,
    })?;
    if args.dry_run {
        dry_run(&checked)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Checked { recipe, plan, watch, .. } = &checked;
    if args.plan {
        if args.json {
            writeln!(std::io::stdout(), "{:#}", json!({ "plan": plan, "recipe": recipe }))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let report = checked.run()?;
    let seconds = started.elapsed().as_secs_f64();
    let peak = system::peak_rss();
    if args.json {
        let result = json!({ "output": args.output, "seconds": seconds, "peak_rss_bytes": peak, "peak_anonymous_bytes": watch.peak(), "plan": plan, "report": report });
        writeln!(std::io::stdout(), "{result:#}")?;
    } else {
        writeln!(
            std::io::stdout(),
            "wrote {}: {:.3} bits per weight, {} of tensors, in {seconds:.0} s, peak memory {} (predicted {}), {} with mapped files",
            args.output.display(),
            report.bits_per_weight,
            human(report.tensor_bytes),
            watch.peak().map_or("unknown".to_owned(), human),
            human(plan.peak_bytes),
            peak.map_or("unknown".to_owned(), human),
        )?;
    }
    Ok(ExitCode::SUCCESS)
}
