//! What an unfinished run has reached, on disk, so that another can continue it.
//!
//! The directory [`STATE`] lies beside the finished shards. `progress.json` in it names every file that counts, with its SHA-256, and is replaced as
//! a whole after all of them are on disk: whatever moment a run is killed at, what it names is complete, and what it does not name is
//! removed. The other files there hold what finished shards do not: the calibration text that the model wrote, learned rotations, the
//! hidden states behind the last finished block, and how far tuning has come.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use specquant_kernels::Isa;
use specquant_model::{FORMAT_VERSION, Hashing, Source, sha256};

use crate::block::LayerReport;
use crate::recipe::Recipe;
use crate::states::map;
use crate::{Error, Result};

/// Tells an unfinished checkpoint of ours from somebody's directory of that name.
pub(crate) const STATE: &str = ".specquant-unfinished";
pub(crate) const FILE: &str = "progress.json";
/// In the names of the second and further files of a shard.
pub(crate) const PART: &str = ".part";

/// A file and what it holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Named {
    pub file: String,
    /// SHA-256, in hexadecimal. A shard that is about to be replaced has two: either may be found.
    pub sha256: Vec<String>,
}

/// The content of `progress.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// What the result depends on.
    pub identity: Map<String, Value>,
    /// Finished safetensors files, in order: one for a block, more for a very large one.
    pub shards: Vec<Named>,
    /// Files in [`STATE`], by purpose.
    pub kept: BTreeMap<String, Named>,
    /// Of the finished blocks.
    pub layers: Vec<LayerReport>,
    /// Of the tuning's steps until the state that is kept of it.
    pub losses: Vec<f64>,
    /// Whether the checkpoint that lay at the destination is about to be moved aside, or was.
    #[serde(default)]
    pub replaced: bool,
}

/// Everything that the result depends on, by name.
///
/// texts_sha256: of the calibration tokens, where they are not written by the model.
///
/// # Errors
/// When the model's files cannot be read.
pub(crate) fn identity(
    source: &Source,
    recipe: &Recipe,
    texts_sha256: Option<String>,
) -> Result<Map<String, Value>> {
    let mut identity = Map::new();
    identity.insert("specquant_version".to_owned(), json!(env!("CARGO_PKG_VERSION")));
    identity.insert("format_version".to_owned(), json!(FORMAT_VERSION));
    // Sums in another order round otherwise.
    identity.insert("kernels".to_owned(), json!(Isa::active().vectors().name()));
    // Libraries choose by themselves.
    identity.insert(
        "available_kernels".to_owned(),
        json!(Isa::available().last().map(|isa| isa.vectors().name())),
    );
    identity.insert("model_sha256".to_owned(), json!(source.fingerprint()?));
    // They are copied, and name the token that texts begin with.
    let files = source.side_files()?.into_iter().map(|(name, bytes)| (name, json!(sha256(&bytes)))).collect();
    flatten("model_files", Value::Object(files), &mut identity);
    identity.insert("calibration_sha256".to_owned(), json!(texts_sha256));
    // The calibration text is what it says, wherever it lies.
    let mut recipe = recipe.clone();
    recipe.calibration.file = None;
    flatten("recipe", json!(recipe), &mut identity);
    Ok(identity)
}

/// `{"a": {"b": 1}}` as `a.b = 1`.
fn flatten(name: &str, value: Value, into: &mut Map<String, Value>) {
    match value {
        Value::Object(fields) => {
            fields.into_iter().for_each(|(key, value)| flatten(&format!("{name}.{key}"), value, into));
        }
        value => drop(into.insert(name.to_owned(), value)),
    }
}

/// Names of the fields, also of objects in objects, that differ.
pub fn differing_fields(a: &Value, b: &Value) -> Vec<String> {
    let [a, b] = [a, b].map(|value| {
        let mut fields = Map::new();
        value
            .as_object()
            .into_iter()
            .flatten()
            .for_each(|(key, value)| flatten(key, value.clone(), &mut fields));
        fields
    });
    differing(&a, &b).into_iter().map(str::to_owned).collect()
}

/// Names of the fields that differ.
pub(crate) fn differing<'a>(a: &'a Map<String, Value>, b: &'a Map<String, Value>) -> Vec<&'a str> {
    let mut names: Vec<&str> = a.keys().chain(b.keys()).map(String::as_str).collect();
    names.retain(|name| a.get(*name) != b.get(*name));
    names.sort_unstable();
    names.dedup();
    names
}

impl Progress {
    /// What the unfinished checkpoint `partial` has reached; `None` if nothing.
    ///
    /// # Errors
    /// [`Error::Output`] when it cannot be read.
    pub fn read(partial: &Path) -> Result<Option<Progress>> {
        let path = partial.join(STATE).join(FILE);
        let fail = |why: String| Error::Output {
            path: path.clone(),
            why: format!("cannot be read: {why}; start anew with --overwrite"),
        };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if !path.exists() && e.kind() != io::ErrorKind::PermissionDenied => return Ok(None),
            Err(e) => return Err(fail(e.to_string())),
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| fail(e.to_string()))
    }

    /// Finished blocks; the first shard is of no block.
    pub fn blocks(&self) -> usize {
        self.blocks_and_ends().saturating_sub(1)
    }

    /// Finished shards, of whatever number of files each.
    pub fn blocks_and_ends(&self) -> usize {
        self.shards.iter().filter(|shard| !shard.file.contains(PART)).count()
    }

    /// Whether there is something to read.
    pub fn exists(partial: &Path) -> bool {
        partial.join(STATE).join(FILE).exists()
    }

    /// Writes a file for a later run, in place of an older one for the same purpose, which stays until [`Progress::commit`].
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses.
    pub fn keep(
        &mut self,
        partial: &Path,
        what: &str,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        // Beside the older one, so that one of them is always whole.
        let taken = |file: &String| self.kept.values().any(|named| named.file == *file);
        let mut names = (0..).map(|n| format!("{what}.{n}")).filter(|name| !taken(name));
        let file = names.next().unwrap_or_default();
        let path = partial.join(STATE).join(&file);
        let finish = || -> io::Result<String> {
            let mut to = BufWriter::with_capacity(1 << 20, Hashing::new(File::create(&path)?));
            write(&mut to)?;
            let (file, sha256) = to.into_inner()?.finish();
            flush(&file)?;
            Ok(sha256)
        };
        let sha256 = finish().map_err(|e| unwritten(&path, e))?;
        self.kept.insert(what.to_owned(), Named { file, sha256: vec![sha256] });
        Ok(())
    }

    /// Reads what [`Progress::keep`] wrote; `None` if it wrote nothing for this purpose.
    ///
    /// # Errors
    /// [`Error::Output`] when the file is damaged.
    pub fn kept(&self, partial: &Path, what: &str) -> Result<Option<Mmap>> {
        self.kept.get(what).map(|named| named.read(&partial.join(STATE))).transpose()
    }

    /// From now on a later run continues from here. What is no longer needed is removed.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses; then it would continue from the commit before.
    pub fn commit(&self, partial: &Path) -> Result<()> {
        let state = partial.join(STATE);
        let (path, new) = (state.join(FILE), state.join("progress.new"));
        let write = || -> io::Result<()> {
            // Names of files last when their directories are on disk; not every system can do that.
            for dir in [partial, &state] {
                let _ = File::open(dir).and_then(|d| d.sync_all());
            }
            let mut file = File::create(&new)?;
            file.write_all(json!(self).to_string().as_bytes())?;
            flush(&file)?;
            fs::rename(&new, &path)?;
            let _ = File::open(&state).and_then(|d| d.sync_all());
            Ok(())
        };
        write().map_err(|e| unwritten(&path, e))?;
        let named: Vec<&str> = self.kept.values().map(|n| n.file.as_str()).chain([FILE]).collect();
        remove_others(&state, &named)
    }
}

impl Named {
    /// The file's bytes, mapped.
    ///
    /// # Errors
    /// [`Error::Output`] when they are not what was written.
    pub fn read(&self, dir: &Path) -> Result<Mmap> {
        let path = dir.join(&self.file);
        let damaged = |why: String| Error::Output {
            path: path.clone(),
            why: format!("{why}, so that the run cannot be continued; start anew with --overwrite"),
        };
        let bytes = map(&path).map_err(|e| damaged(format!("cannot be read: {e}")))?;
        match self.sha256.contains(&sha256(&bytes)) {
            true => Ok(bytes),
            false => Err(damaged("has changed since it was written".to_owned())),
        }
    }
}

/// Removes everything in `dir` but the entries `named`.
pub(crate) fn remove_others(dir: &Path, named: &[&str]) -> Result<()> {
    let entries = fs::read_dir(dir).map_err(|e| unwritten(dir, e))?;
    for entry in entries.filter_map(std::result::Result::ok) {
        let path = entry.path();
        if entry.file_name().to_str().is_some_and(|name| named.contains(&name)) {
            continue;
        }
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(|e| Error::Output { path: path.clone(), why: format!("cannot be removed: {e}") })?;
    }
    Ok(())
}

/// Waits until a file is on the disk.
pub(crate) fn flush(file: &File) -> io::Result<()> {
    #[cfg(test)]
    tests::maybe_fail()?;
    file.sync_all()
}

pub(crate) fn unwritten(path: impl Into<PathBuf>, why: impl std::fmt::Display) -> Error {
    Error::Output { path: path.into(), why: format!("cannot be written: {why}") }
}

/// Writes numbers in little-endian.
pub(crate) fn write_numbers<T: Copy, const N: usize>(
    to: &mut dyn Write,
    values: &[T],
    bytes: fn(T) -> [u8; N],
) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(4096 * N);
    for values in values.chunks(4096) {
        buffer.clear();
        values.iter().for_each(|&v| buffer.extend_from_slice(&bytes(v)));
        to.write_all(&buffer)?;
    }
    Ok(())
}

/// Reads what [`write_numbers`] wrote.
pub(crate) fn read_numbers<T, const N: usize>(bytes: &[u8], number: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|b| number(*b)).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// Files of this thread that can still be flushed before one fails; the next ones can again.
        pub static FLUSHES: Cell<usize> = const { Cell::new(usize::MAX) };
    }

    /// Fails as a broken disk does, when it is time.
    pub fn maybe_fail() -> io::Result<()> {
        let left = FLUSHES.replace(FLUSHES.get().wrapping_sub(1));
        // EIO
        if left == 0 { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) }
    }

    #[test]
    fn a_commit_is_all_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(STATE)).unwrap();
        assert!(Progress::read(dir.path()).unwrap().is_none());
        let mut progress = Progress::default();
        let keep = |progress: &mut Progress, text: &'static str| {
            progress.keep(dir.path(), "states", |to| to.write_all(text.as_bytes())).unwrap();
        };
        keep(&mut progress, "one");
        progress.commit(dir.path()).unwrap();
        // The next state is written, but not committed: the former one counts.
        keep(&mut progress, "two");
        let read = || {
            let progress = Progress::read(dir.path()).unwrap().unwrap();
            progress.kept(dir.path(), "states").map(|map| map.unwrap().to_vec()).map_err(|e| e.to_string())
        };
        assert_eq!(read().unwrap(), b"one");
        progress.commit(dir.path()).unwrap();
        assert_eq!(read().unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path().join(STATE)).unwrap().count(), 2);

        let file = dir.path().join(STATE).join(&progress.kept["states"].file);
        fs::write(&file, "tow").unwrap();
        assert!(read().unwrap_err().contains("has changed"));
        fs::write(dir.path().join(STATE).join(FILE), "{\"identity\":").unwrap();
        assert!(Progress::read(dir.path()).unwrap_err().to_string().contains("--overwrite"));
    }

    #[test]
    fn fields_that_differ_are_named() {
        let flat = |value| {
            let mut map = Map::new();
            flatten("recipe", value, &mut map);
            map
        };
        let a = flat(json!({ "seed": 1, "input": { "keep": 32, "rotation": "dct" }, "name": "x" }));
        let b = flat(
            json!({ "seed": 2, "input": { "keep": 16, "rotation": "dct" }, "kv_center": true, "name": "x" }),
        );
        assert_eq!(differing(&a, &b), ["recipe.input.keep", "recipe.kv_center", "recipe.seed"]);
    }

    #[test]
    fn numbers_come_back() {
        let values = [1.0f32, -0.0, f32::MIN_POSITIVE / 3.0, 1e30];
        let mut bytes = Vec::new();
        write_numbers(&mut bytes, &values, f32::to_le_bytes).unwrap();
        assert_eq!(read_numbers(&bytes, u32::from_le_bytes), values.map(f32::to_bits));
    }
}
