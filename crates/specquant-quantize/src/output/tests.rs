use super::*;

fn open(destination: &Destination, shards: usize) -> Result<Output> {
    Output::open(destination, Map::new(), shards)
}

fn one(name: &str, values: &[f32]) -> [StoredTensor; 1] {
    [StoredTensor::f32(name.into(), vec![values.len()], values)]
}

#[test]
fn nothing_is_left_of_an_output_without_a_commit() {
    let dir = tempfile::tempdir().unwrap();
    let mut output = open(&Destination::new(dir.path().join("out")), 1).unwrap();
    output.write_shard(&one("a", &[1.0])).unwrap();
    drop(output);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn an_existing_directory_is_kept_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("out");
    fs::create_dir(&dst).unwrap();
    fs::write(dst.join("precious"), "x").unwrap();
    let error = open(&Destination::new(&dst), 0).err().unwrap().to_string();
    assert!(error.contains("--overwrite"), "{error}");
    let replacing = Destination::replacing(&dst);
    let error = open(&replacing, 0).err().unwrap().to_string();
    assert!(error.contains("not a SpecQuant checkpoint") && dst.join("precious").exists(), "{error}");
    fs::write(dst.join("config.json"), r#"{"quantization_config": {"quant_method": "specquant"}}"#).unwrap();
    open(&replacing, 0).unwrap().finish().unwrap();
    assert!(!dst.join("precious").exists() && dst.join("model.safetensors.index.json").exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn shards_read_back_through_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("out");
    let mut output = open(&Destination::new(&dst), 2).unwrap();
    output.write_shard(&one("a", &[1.0, 2.0])).unwrap();
    output.write_shard(&one("b", &[3.0])).unwrap();
    assert_eq!(output.bytes(), 12);
    output.finish().unwrap();
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(dst.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["weight_map"]["b"], "model-00002-of-00002.safetensors");
    let bytes = fs::read(dst.join("model-00001-of-00002.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("a").unwrap().data(), [0, 0, 128, 63, 0, 0, 0, 64]);
}

#[test]
fn a_later_run_finds_what_was_committed() {
    let dir = tempfile::tempdir().unwrap();
    let fresh = Destination::new(dir.path().join("out"));
    let resumed = Destination { unfinished: Unfinished::Resume, ..fresh.clone() };
    let error = |destination: &Destination| open(destination, 2).err().unwrap().to_string();
    // There is nothing to resume: it begins.
    let mut output = open(&resumed, 2).unwrap();
    output.write_shard(&one("a", &[1.0, 2.0])).unwrap();
    output.commit().unwrap();
    output.write_shard(&one("b", &[3.0])).unwrap();
    for destination in [&fresh, &resumed, &Destination::replacing(&fresh.path)] {
        assert!(error(destination).contains("another run"), "{}", error(destination));
    }
    drop(output);
    assert!(error(&fresh).contains("--resume"), "{}", error(&fresh));

    let other = Map::from_iter([("model_sha256".to_owned(), json!("x"))]);
    let differs = Output::open(&resumed, other, 2).err().unwrap().to_string();
    assert!(differs.contains("model_sha256"), "{differs}");

    // The second shard was written and never committed; of the first, a tensor is being replaced.
    let mut output = open(&resumed, 2).unwrap();
    assert_eq!((output.progress.shards.len(), output.bytes()), (1, 8));
    output.write_shard(&one("b", &[4.0])).unwrap();
    output.commit().unwrap();
    output.replace(one("a", &[5.0, 6.0]).into()).unwrap();
    drop(output);
    let shard = dir.path().join("out.partial/model-00001-of-00002.safetensors");
    let intact = fs::read(&shard).unwrap();
    fs::write(&shard, [&intact[..intact.len() - 1], &[9]].concat()).unwrap();
    assert!(error(&resumed).contains("has changed"), "{}", error(&resumed));
    fs::write(&shard, intact).unwrap();
    let output = open(&resumed, 2).unwrap();
    assert_eq!((output.progress.shards.len(), output.bytes()), (2, 12));
    output.finish().unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    // Two shards, the index, and the checksums.
    assert_eq!(fs::read_dir(&fresh.path).unwrap().count(), 4);
    assert!(error(&resumed).contains("nothing is left to resume"), "{}", error(&resumed));
}

/// A shard that is larger than one may be has several files, and is still one to a run that continues.
#[test]
fn shards_roll() {
    let dir = tempfile::tempdir().unwrap();
    let fresh = Destination::new(dir.path().join("out"));
    let resumed = Destination { unfinished: Unfinished::Resume, ..fresh.clone() };
    let tensor = |name: &str, n: usize| StoredTensor::f32(name.into(), vec![n], &vec![1.0; n]);
    // 40 bytes are above the limit by themselves; 12 + 4 are not.
    let ends = [tensor("a", 3), tensor("b", 1), tensor("c", 10), tensor("d", 4), tensor("e", 1)];
    let mut output = open(&resumed, 2).unwrap();
    output.shard_bytes = 16;
    output.write_shard(&ends).unwrap();
    output.commit().unwrap();
    assert_eq!((output.progress.blocks(), output.bytes()), (0, 76));
    drop(output);
    let mut output = open(&resumed, 2).unwrap();
    output.shard_bytes = 16;
    assert_eq!((output.progress.blocks(), output.bytes()), (0, 76));
    output.write_shard(&[tensor("block", 2)]).unwrap();
    assert_eq!(output.progress.blocks(), 1);
    // A part is replaced like any other file.
    output.replace(one("c", &[2.0; 10]).into()).unwrap();
    output.finish().unwrap();
    let index = fs::read(fresh.path.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let files =
        ["", ".part2", ".part3", ".part4"].map(|part| format!("model-00001-of-00002{part}.safetensors"));
    for (name, part) in [("a", 0), ("b", 0), ("c", 1), ("d", 2), ("e", 3)] {
        assert_eq!(index["weight_map"][name], files[part], "{name}");
        let bytes = fs::read(fresh.path.join(&files[part])).unwrap();
        let stored = tensors(&bytes).unwrap();
        let values = &stored.iter().find(|t| t.name == name).unwrap().bytes;
        assert!(stored.iter().map(|t| t.bytes.len()).sum::<usize>() <= if name == "c" { 40 } else { 16 });
        assert_eq!(values[..4], if name == "c" { 2.0f32 } else { 1.0 }.to_le_bytes(), "{name}");
    }
    assert_eq!(index["weight_map"]["block"], "model-00002-of-00002.safetensors");
}

/// A run that was killed behind the rename: what it replaced goes, what it did not stays, and so does what it had not finished.
#[test]
fn only_what_was_replaced_goes() {
    for (replaced, whole) in [(true, true), (false, true), (true, false)] {
        let dir = tempfile::tempdir().unwrap();
        let fresh = Destination::new(dir.path().join("out"));
        open(&fresh, 0).unwrap().finish().unwrap();
        let config = r#"{"quantization_config": {"quant_method": "specquant"}}"#;
        let old = dir.path().join("out.replaced");
        fs::create_dir(&old).unwrap();
        fs::write(old.join("config.json"), config).unwrap();
        let state = fresh.path.join(STATE);
        fs::create_dir(&state).unwrap();
        fs::write(state.join("states.0"), "x").unwrap();
        Progress { replaced, ..Progress::default() }.commit(&fresh.path).unwrap();
        fs::write(state.join("states.0"), "x").unwrap();
        if !whole {
            fs::remove_file(fresh.path.join(specquant_model::CHECKSUMS)).unwrap();
        }
        let resumed = Destination { unfinished: Unfinished::Resume, ..fresh.clone() };
        assert!(!finished(&fresh, &Map::new()).unwrap());
        let other = Map::from_iter([("model_sha256".to_owned(), json!("x"))]);
        assert!(!finished(&resumed, &other).unwrap() && state.join("states.0").exists());
        assert_eq!(check_output(&resumed).is_ok(), whole);
        assert_eq!(finished(&resumed, &Map::new()).unwrap(), whole);
        assert_eq!((state.exists(), old.exists()), (!whole, !(replaced && whole)));
    }
}

/// Every run makes the directory, locks it and removes it, so that one may lock what another has just removed and a third made anew.
#[test]
fn two_never_have_it_at_a_time() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let dir = tempfile::tempdir().unwrap();
    let destination = Destination::new(dir.path().join("out"));
    let (inside, claimed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let attempts = || {
        for _ in 0..500 {
            let claim = match Claim::new(&destination) {
                Ok(claim) => claim,
                Err(e) => {
                    assert!(e.to_string().contains("another run is writing it"), "{e}");
                    continue;
                }
            };
            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two runs have the directory");
            std::thread::yield_now();
            assert!(claim.partial.exists());
            claimed.fetch_add(1, Ordering::SeqCst);
            inside.fetch_sub(1, Ordering::SeqCst);
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(attempts)).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    assert!(claimed.into_inner() > 0);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
