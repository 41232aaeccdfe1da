//! Whether memory and disk space are there for a run, and what would make it fit.

use std::path::Path;

use specquant_model::Source;
use specquant_quantize as q;
use specquant_quantize::{Plan, Recipe};

use crate::system::{self, human};

/// What a run can have; `None` where the system does not say, or it does not matter.
struct Free {
    memory: Option<u64>,
    disk: Option<u64>,
}

impl Free {
    fn holds(&self, plan: &Plan) -> bool {
        let within = |free: Option<u64>, bytes| free.is_none_or(|free| bytes <= free);
        within(self.memory, plan.peak_bytes) && within(self.disk, plan.disk_bytes)
    }
}

/// The plan, if the memory and the disk space that it needs are there; with hidden states on the disk if that is asked for (`spill`), or makes it
/// fit. ignore: whether memory does not matter.
pub fn check_resources(
    source: &Source,
    recipe: &Recipe,
    output: &Path,
    ignore: bool,
    spill: bool,
) -> anyhow::Result<Plan> {
    let plan = q::plan(source, recipe)?;
    let plan = if spill { plan.spilled() } else { plan };
    // What an earlier run has written needs no more room.
    let begun = q::Destination::new(output).partial().is_ok_and(|partial| partial.exists());
    let free = Free {
        memory: system::available_memory().filter(|_| !ignore),
        disk: system::free_disk(output).filter(|_| !begun),
    };
    for plan in [plan.clone(), plan.clone().spilled()] {
        if free.holds(&plan) {
            return Ok(plan);
        }
    }
    let mut lines = Vec::new();
    if let Some(memory) = free.memory.filter(|memory| *memory < plan.peak_bytes) {
        let (needs, memory) = (human(plan.peak_bytes), human(memory));
        lines.push(format!(
            "{} would need {needs} of memory at its peak, and {memory} are available (--ignore-memory runs it all the same)",
            recipe.name
        ));
    }
    if let Some(disk) = free.disk.filter(|disk| *disk < plan.disk_bytes) {
        let (needs, disk) = (human(plan.disk_bytes), human(disk));
        lines.push(format!("{} would take {needs} of disk space, and {disk} are free", output.display()));
    }
    lines.push(match remedies(source, recipe, &free) {
        found if found.is_empty() => "no single setting makes it fit: combine lower --samples and --sequence-length with a recipe that needs less, such as rtn".to_owned(),
        found => format!("these would fit: {}", found.join("; or ")),
    });
    anyhow::bail!(lines.join("\n"))
}

/// Flags under which the run would fit, each by itself; if none does, those of the calibration together.
fn remedies(source: &Source, recipe: &Recipe, free: &Free) -> Vec<String> {
    let fits =
        |r: &Recipe| q::plan(source, r).is_ok_and(|plan| free.holds(&plan) || free.holds(&plan.spilled()));
    let with = |samples: usize, length: usize| {
        let mut r = recipe.clone();
        (r.calibration.samples, r.calibration.sequence_length) = (samples, length);
        r
    };
    let q::Calibration { samples, sequence_length, .. } = recipe.calibration;
    // Halves: that is precise enough, and round.
    let halves = |n: usize, least: usize| {
        std::iter::successors(Some(n / 2), |n| Some(n / 2)).take_while(move |n| *n >= least)
    };
    let mut found = Vec::new();
    found.extend(
        halves(samples, 1).find(|n| fits(&with(*n, sequence_length))).map(|n| format!("--samples {n}")),
    );
    let shorter = halves(sequence_length, 64).find(|n| fits(&with(samples, *n)));
    found.extend(shorter.map(|n| format!("--sequence-length {n}")));
    if found.is_empty() {
        let both = halves(samples, 1).zip(halves(sequence_length, 64));
        let both = both.into_iter().find(|(samples, length)| fits(&with(*samples, *length)));
        found.extend(both.map(|(samples, length)| format!("--samples {samples} --sequence-length {length}")));
    }
    if recipe.calibration.file.is_none() {
        let mut r = recipe.clone();
        r.calibration.file = Some("text".into());
        found.extend(
            fits(&r).then(|| "--calibration FILE, so that the model writes no text of its own".to_owned()),
        );
    }
    for name in ["spectral", "rtn"] {
        let other = Recipe::load(name).map(|r| Recipe {
            calibration: recipe.calibration.clone(),
            scheme: recipe.scheme,
            embeddings: recipe.embeddings,
            ..r
        });
        if recipe.name != name && other.is_ok_and(|r| fits(&r)) {
            found.push(format!("--recipe {name}"));
            break;
        }
    }
    found
}
