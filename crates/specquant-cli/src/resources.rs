//! Whether memory and disk space are there for a run, and what would make it fit.

use std::fs;
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
    let free = Free {
        memory: system::available_memory().filter(|_| !ignore),
        disk: system::free_disk(output).map(|disk| disk.saturating_add(begun(output))),
    };
    fitting(source, recipe, output, &free, spill)
}

/// Whether the disk of `output` has room for all of several runs, each with its destination, that were looked at one by one: what they leave there, and what
/// the most demanding needs on top. free: bytes that can still be written there.
pub fn check_disk_of_all(runs: &[(&Plan, &Path)], output: &Path, free: Option<u64>) -> anyhow::Result<()> {
    let left: u64 = runs.iter().map(|(plan, _)| plan.output_bytes).sum();
    let needs = left + runs.iter().map(|(plan, _)| plan.disk_bytes - plan.output_bytes).max().unwrap_or(0);
    let there: u64 = runs.iter().map(|(_, destination)| begun(destination)).sum();
    let disk = free.map(|disk| disk.saturating_add(there));
    match disk.filter(|disk| runs.len() > 1 && *disk < needs) {
        Some(disk) => anyhow::bail!(
            "{}: {} checkpoints would take {} of disk space, and {} are free; choose fewer --recipes, or another -o",
            output.display(),
            runs.len(),
            human(needs),
            human(disk)
        ),
        None => Ok(()),
    }
}

/// Bytes of what an earlier run has written of a checkpoint: that has its room.
fn begun(destination: &Path) -> u64 {
    q::Destination::new(destination).partial().map_or(0, |partial| file_bytes(&partial))
}

/// Bytes of the files of a directory and those in it; 0 where there is none.
fn file_bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => file_bytes(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    });
    bytes.sum()
}

/// The plan that `free` is enough for.
fn fitting(
    source: &Source,
    recipe: &Recipe,
    output: &Path,
    free: &Free,
    spill: bool,
) -> anyhow::Result<Plan> {
    let plan = q::plan(source, recipe)?;
    let plan = if spill { plan.spilled() } else { plan };
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
    lines.push(match remedies(source, recipe, free) {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;
    use specquant_bench::{ARCHS, synthesize};

    #[test]
    fn too_little_of_either_is_refused_and_states_go_to_the_disk_where_that_helps() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        synthesize(ARCHS.iter().find(|arch| arch.name == "tiny").unwrap(), 2, 1, &model).unwrap();
        let (source, mut recipe) = (Source::open(&model).unwrap(), Recipe::load("gptq").unwrap());
        // Hidden states are most of it.
        (recipe.calibration.samples, recipe.calibration.sequence_length) = (4096, 512);
        let choose = |memory, disk, spill| {
            let free = Free { memory, disk };
            fitting(&source, &recipe, Path::new("out"), &free, spill).map_err(|e| e.to_string())
        };
        let plan = q::plan(&source, &recipe).unwrap();
        let spilled = plan.clone().spilled();
        assert!(spilled.peak_bytes < plan.peak_bytes && spilled.disk_bytes > plan.disk_bytes);
        assert_eq!(choose(None, None, false), Ok(plan.clone()));
        assert_eq!(choose(Some(plan.peak_bytes), Some(plan.disk_bytes), false), Ok(plan.clone()));
        assert_eq!(choose(None, None, true), Ok(spilled.clone()));
        assert_eq!(choose(Some(plan.peak_bytes - 1), Some(spilled.disk_bytes), false), Ok(spilled.clone()));
        let both = choose(Some(plan.peak_bytes - 1), Some(spilled.disk_bytes - 1), false).unwrap_err();
        assert!(both.contains("of memory at its peak") && both.contains("--samples 2048"), "{both}");
        let disk = choose(None, Some(plan.disk_bytes - 1), false).unwrap_err();
        assert!(disk.contains("out would take") && disk.contains("are free"), "{disk}");
        assert!(!disk.contains("of memory"), "{disk}");
    }

    #[test]
    fn several_checkpoints_need_room_for_all() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        synthesize(ARCHS.iter().find(|arch| arch.name == "tiny").unwrap(), 2, 1, &model).unwrap();
        let source = Source::open(&model).unwrap();
        let [a, b] = ["rtn", "gptq"].map(|name| q::plan(&source, &Recipe::load(name).unwrap()).unwrap());
        let (out, [to_a, to_b]) = (dir.path(), ["a", "b"].map(|name| dir.path().join(name)));
        let runs = [(&a, &*to_a), (&b, &*to_b)];
        let on_top = (a.disk_bytes - a.output_bytes).max(b.disk_bytes - b.output_bytes);
        let needs = a.output_bytes + b.output_bytes + on_top;
        assert!(
            check_disk_of_all(&runs, out, Some(needs)).is_ok() && check_disk_of_all(&runs, out, None).is_ok()
        );
        let why = check_disk_of_all(&runs, out, Some(needs - 7)).unwrap_err().to_string();
        assert!(why.contains("2 checkpoints would take"), "{why}");
        // What an earlier run has written of one has its room.
        fs::create_dir(dir.path().join("b.partial")).unwrap();
        fs::write(dir.path().join("b.partial/shard"), [0; 7]).unwrap();
        assert!(check_disk_of_all(&runs, out, Some(needs - 7)).is_ok());
        // One by itself was looked at before.
        assert!(check_disk_of_all(&runs[..1], out, Some(0)).is_ok());
    }

    #[test]
    fn what_is_there_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        fs::write(dir.path().join("in/a"), [0; 7]).unwrap();
        fs::write(dir.path().join("b"), [0; 5]).unwrap();
        assert_eq!((file_bytes(dir.path()), file_bytes(&dir.path().join("none"))), (12, 0));
    }
}
