use std::collections::BTreeMap;
use std::fs;

use super::*;
use crate::Unfinished;
use crate::progress::tests::FLUSHES;
use crate::testing::tiny;

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

/// A disk that fails to flush one file, whichever: the checkpoint is not there, what is beside it is known to be unfinished, and
/// continued it has the bytes of an undisturbed one.
#[test]
fn every_flush_may_fail() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama-sharded");
    let mut recipe = Recipe::load("gptq").unwrap();
    recipe.calibration.search_tokens = 32;
    let texts: Vec<Vec<u32>> =
        (0..2).map(|t| (0..40).map(|i| (t * 131 + i * i * 7) % 320).collect()).collect();
    let run = |destination: &Destination| run(&source, &recipe, Some(&texts), destination, &mut |_| ());
    let whole = Destination::new(dir.path().join("whole"));
    run(&whole).unwrap();
    let mut failed = 0;
    loop {
        let path = dir.path().join(format!("failed{failed}"));
        let destination = Destination { unfinished: Unfinished::Resume, ..Destination::new(&path) };
        FLUSHES.set(failed);
        let result = run(&destination);
        let spared = FLUSHES.replace(usize::MAX) < usize::MAX / 2;
        let Err(error) = result else {
            assert!(spared, "the failure was ignored");
            break;
        };
        let message = error.to_string();
        assert!(message.contains("cannot be written") && message.contains("Input/output error"), "{message}");
        let partial = destination.partial().unwrap();
        assert!(!path.exists(), "{message}");
        // What is there can be continued, and says so.
        let kept = partial.join(".specquant-unfinished/progress.json").exists();
        assert_eq!((kept, kept), (partial.exists(), message.contains("add --resume")), "{message}");
        run(&destination).unwrap();
        assert_eq!(files(&path), files(&whole.path), "{message}");
        assert!(!partial.exists());
        failed += 1;
    }
    // The ends, two blocks with their states and commits, and the files around them.
    println!("{failed} flushes failed, one at a time");
    assert!(failed > 12, "{failed}");
}
