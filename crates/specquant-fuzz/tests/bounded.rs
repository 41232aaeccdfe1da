//! The bounded run: valid inputs run, and damaged ones are refused or run, within the limits. The same inputs every time.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a find ends the test")]

use specquant_fuzz::{Limited, TARGETS, Target, damaged, every_field, execute};

#[global_allocator]
static GLOBAL: Limited = Limited;

/// Damaged inputs of each target.
const EACH: u64 = 300;
/// Of the inputs in which one field or tensor is damaged, every so many; a prime, so that fields take turns. `make soak` feeds all of them.
const FIELDS: usize = 23;

/// One test, because the limits are those of the whole process.
#[test]
fn nothing_panics_or_takes_memory_or_time_out_of_proportion() {
    let dir = tempfile::tempdir().unwrap();
    for target in TARGETS {
        let dir = dir.path().join(target.name);
        std::fs::create_dir(&dir).unwrap();
        let seeds = (target.seeds)();
        let feed = |target: &Target, what: String, input: &[u8]| {
            let outcome = execute(target, &dir, input);
            outcome.unwrap_or_else(|find| {
                let kept = std::env::temp_dir().join(format!("specquant-find-{}", target.name));
                std::fs::write(&kept, input).unwrap();
                panic!("{}, {what}: {find}\nthe input is {}", target.name, kept.display())
            })
        };
        for (i, seed) in seeds.iter().enumerate() {
            feed(&target, format!("seed {i}"), seed)
                .unwrap_or_else(|e| panic!("{}, seed {i}: {e}", target.name));
        }
        let (mut ran, mut refused) = (0, 0);
        let fields =
            every_field(seeds).enumerate().step_by(FIELDS).map(|(i, input)| (format!("field {i}"), input));
        for (what, input) in fields.chain((0..EACH).map(|n| (format!("number {n}"), damaged(seeds, n)))) {
            match feed(&target, what, &input) {
                Ok(()) => ran += 1,
                Err(_) => refused += 1,
            }
        }
        println!("{}: {ran} ran, {refused} were refused", target.name);
        assert!(ran > 0 && refused > 0, "{}: the damage is too small or too large", target.name);
    }
}
