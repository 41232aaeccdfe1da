//! The directory being written: invisible under its final name until it is complete.

mod claim;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use specquant_model::{StoredTensor, sha256};

use crate::progress::{FILE, Named, PART, Progress, STATE, differing, flush, remove_others, unwritten};
use crate::{Error, Result};
use claim::{Claim, clear};

/// Where a checkpoint goes, and what becomes of what lies there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// A directory; while it is written, what is finished of it lies in `NAME.partial` beside it.
    pub path: PathBuf,
    /// Whether a checkpoint of ours there is replaced, at the very end.
    pub overwrite: bool,
    /// What becomes of an unfinished run to the same place.
    pub unfinished: Unfinished,
    /// Whether the hidden states of the calibration text go to a mapped file there, and not into memory. The result is the same.
    pub spill: bool,
}

/// What becomes of an unfinished run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinished {
    /// It stays, and hinders this one.
    Keep,
    /// This one continues it.
    Resume,
    /// It is removed.
    Discard,
}

impl Destination {
    /// A directory that does not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Destination { path: path.into(), overwrite: false, unfinished: Unfinished::Keep, spill: false }
    }

    /// A directory in which everything of ours is replaced.
    pub fn replacing(path: impl Into<PathBuf>) -> Self {
        Destination { path: path.into(), overwrite: true, unfinished: Unfinished::Discard, spill: false }
    }

    /// Where the checkpoint lies until it is finished.
    ///
    /// # Errors
    /// [`Error::Output`] when the path does not end in a name.
    pub fn partial(&self) -> Result<PathBuf> {
        let name = self.path.file_name();
        let mut name = name
            .ok_or_else(|| self.refusal("is not the name of a directory; give -o DIRECTORY".to_owned()))?
            .to_owned();
        name.push(".partial");
        Ok(self.path.with_file_name(name))
    }

    /// Where a trial of the same run may write.
    ///
    /// # Errors
    /// As [`Destination::partial`].
    pub fn trial(&self) -> Result<Destination> {
        let path = self.partial()?.with_extension("dry-run");
        Ok(Destination { path, overwrite: false, unfinished: Unfinished::Discard, spill: self.spill })
    }

    fn refusal(&self, why: String) -> Error {
        Error::Output { path: self.path.clone(), why }
    }
}

/// Bytes of a shard's tensors at most, as transformers has it; a larger tensor has a file of its own.
const SHARD_BYTES: usize = 5_000_000_000;

/// A checkpoint in the making. Everything goes to `NAME.partial` beside the destination; [`Output::finish`] renames it. What is on
/// disk at a [`Output::commit`] stays until then, whatever happens, for a run that resumes.
pub(crate) struct Output {
    destination: Destination,
    claim: Claim,
    shards: usize,
    /// [`SHARD_BYTES`], but in tests.
    shard_bytes: usize,
    /// As it will be committed.
    pub progress: Progress,
    index: BTreeMap<String, String>,
    bytes: u64,
}

impl Output {
    /// Prepares `destination` for `shards` safetensors files, not counting further parts of large ones, of a run that `identity` describes, or finds them in part.
    ///
    /// # Errors
    /// [`Error::Output`] when the destination is taken or nothing can be written there; [`Error::Differs`] when an unfinished run
    /// that is to be continued is another.
    pub fn open(destination: &Destination, identity: Map<String, Value>, shards: usize) -> Result<Self> {
        let claim = Claim::new(destination)?;
        let partial = &claim.partial;
        let found = match destination.unfinished {
            Unfinished::Resume => Progress::read(partial)?,
            Unfinished::Keep | Unfinished::Discard => None,
        };
        let progress = match found {
            None => {
                clear(partial)?;
                fs::create_dir(partial.join(STATE)).map_err(|e| unwritten(partial.join(STATE), e))?;
                Progress { identity, ..Progress::default() }
            }
            Some(found) => {
                let fields = differing(&found.identity, &identity);
                if !fields.is_empty() {
                    let fields = fields.join(", ");
                    return Err(Error::Differs { path: partial.clone(), fields });
                }
                // The shard that was being written, and what the end writes in any case.
                let named = found.shards.iter().map(|s| s.file.as_str()).chain([STATE]);
                remove_others(partial, &named.collect::<Vec<_>>())?;
                found
            }
        };
        let (destination, index) = (destination.clone(), BTreeMap::new());
        let mut output =
            Output { destination, claim, shards, shard_bytes: SHARD_BYTES, progress, index, bytes: 0 };
        for shard in output.progress.shards.clone() {
            let bytes = shard.read(&output.claim.partial)?;
            let tensors = SafeTensors::deserialize(&bytes).map_err(|e| output.fail(&shard.file, e))?;
            for (name, view) in tensors.iter() {
                output.index.insert(name.to_owned(), shard.file.clone());
                output.bytes += view.data().len() as u64;
            }
        }
        Ok(output)
    }

    /// Where the checkpoint lies until it is finished.
    pub fn path(&self) -> &Path {
        &self.claim.partial
    }

    /// Where hidden states are spilled, if they shall be.
    pub fn spill(&self) -> Option<PathBuf> {
        self.destination.spill.then(|| self.claim.partial.join(STATE))
    }

    /// From now on a later run continues from here.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses.
    pub fn commit(&self) -> Result<()> {
        self.progress.commit(&self.claim.partial)
    }

    /// Writes a file that a later run needs; see [`Progress::keep`].
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses.
    pub fn keep(
        &mut self,
        what: &str,
        write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<()> {
        self.progress.keep(&self.claim.partial, what, write)
    }

    /// Reads such a file, if an earlier run has written it.
    ///
    /// # Errors
    /// [`Error::Output`] when it is damaged.
    pub fn kept(&self, what: &str) -> Result<Option<Mmap>> {
        self.progress.kept(&self.claim.partial, what)
    }

    /// Removes everything: no later run could get any further.
    pub fn discard(self) {
        let _ = clear(&self.claim.partial);
    }

    /// Writes the next shard, in several files where it is larger than one may be.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses.
    pub fn write_shard(&mut self, tensors: &[StoredTensor]) -> Result<()> {
        let number = self.progress.blocks_and_ends() + 1;
        for (i, part) in parts(tensors, self.shard_bytes).into_iter().enumerate() {
            let part_number = if i > 0 { format!("{PART}{}", i + 1) } else { String::new() };
            let file = format!("model-{number:05}-of-{:05}{part_number}.safetensors", self.shards);
            let bytes = self.serialized(&file, part)?;
            self.progress.shards.push(Named { file: file.clone(), sha256: vec![sha256(&bytes)] });
            self.write(&file, &bytes)?;
            self.add(&file, part);
        }
        Ok(())
    }

    fn add(&mut self, file: &str, tensors: &[StoredTensor]) {
        for tensor in tensors {
            self.index.insert(tensor.name.clone(), file.to_owned());
            self.bytes += tensor.bytes.len() as u64;
        }
    }

    /// Replaces tensors that have been written, a shard at a time. It may be done again after it was interrupted.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses.
    pub fn replace(&mut self, tensors: Vec<StoredTensor>) -> Result<()> {
        let mut new: BTreeMap<String, StoredTensor> =
            tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
        let files =
            new.keys().map(|name| self.index.get(name).cloned().ok_or_else(|| self.fail(name, "it is new")));
        let files = files.collect::<Result<BTreeSet<String>>>()?;
        for i in 0..self.progress.shards.len() {
            let Named { file, .. } = self.progress.shards[i].clone();
            if !files.contains(&file) {
                continue;
            }
            let bytes = self.progress.shards[i].read(&self.claim.partial)?;
            let mut tensors = self::tensors(&bytes).map_err(|e| self.fail(&file, e))?;
            for tensor in &mut tensors {
                self.bytes -= tensor.bytes.len() as u64;
                if let Some(new) = new.remove(&tensor.name) {
                    *tensor = new;
                }
            }
            let before = sha256(&bytes);
            // Not every system lets a file be replaced that is mapped.
            drop(bytes);
            let bytes = self.serialized(&file, &tensors)?;
            // One of the two will be found by a run that continues.
            self.progress.shards[i].sha256 = vec![before, sha256(&bytes)];
            self.commit()?;
            self.write(&file, &bytes)?;
            self.add(&file, &tensors);
        }
        Ok(())
    }

    /// The bytes of a safetensors file.
    pub fn serialized(&self, file: &str, tensors: &[StoredTensor]) -> Result<Vec<u8>> {
        let views = tensors.iter().map(|t| {
            let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes);
            view.map(|v| (t.name.as_str(), v)).map_err(|e| self.fail(file, e))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
        safetensors::serialize(views, metadata).map_err(|e| self.fail(file, e))
    }

    /// Writes a whole file and flushes it to the disk; until it is there, an older one stays.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (path, new) = (self.claim.partial.join(name), self.claim.partial.join(STATE).join("file.new"));
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(bytes)?;
            flush(&file)?;
            fs::rename(&new, &path)
        };
        write().map_err(|e| self.fail(name, e))
    }

    /// Bytes of the tensors written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn fail(&self, name: &str, why: impl std::fmt::Display) -> Error {
        unwritten(self.claim.partial.join(name), why)
    }

    /// Writes the index of what has been written, with which [`Output::path`] can be read as a checkpoint.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses.
    pub fn write_index(&self) -> Result<()> {
        let index = json!({ "metadata": { "total_size": self.bytes }, "weight_map": self.index });
        self.write("model.safetensors.index.json", format!("{index:#}\n").as_bytes())
    }

    /// Writes the index and gives the directory its name.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses; then the old destination, if any, is still there.
    pub fn finish(mut self) -> Result<()> {
        debug_assert_eq!(self.progress.blocks_and_ends(), self.shards);
        self.write_index()?;
        // The last of a shard's sums is of what it is now.
        let shards = self.progress.shards.iter();
        let known = shards.filter_map(|s| Some((s.file.clone(), s.sha256.last()?.clone()))).collect();
        let sums = specquant_model::checksums(&self.claim.partial, &known)?;
        self.write(specquant_model::CHECKSUMS, sums.as_bytes())?;
        let (partial, destination) = (self.claim.partial.clone(), self.destination.path.clone());
        let moved = |e: std::io::Error| {
            let why =
                format!("cannot be moved into place: {e}; the finished checkpoint is {}", partial.display());
            Error::Output { path: destination.clone(), why }
        };
        // What is in the directory lasts before it gets its name; not every system can do that with directories.
        let _ = File::open(&partial).and_then(|d| d.sync_all());
        let old = replaced_name(&partial);
        let replaces = self.destination.overwrite && destination.exists();
        if replaces {
            self.progress.replaced = true;
            self.commit()?;
            fs::rename(&destination, &old).map_err(moved)?;
        }
        if let Err(e) = fs::rename(&partial, &destination) {
            if replaces {
                let _ = fs::rename(&old, &destination);
            }
            return Err(moved(e));
        }
        self.claim.finished = true;
        tidy(&destination, self.progress.replaced.then_some(&old));
        // The rename itself lasts once the directory that holds it is on disk; not every file system can do that.
        if let Some(parent) = destination.parent() {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            let _ = File::open(parent).and_then(|d| d.sync_all());
        }
        Ok(())
    }
}

/// Tensors in files of at most `most` bytes, in order.
fn parts(tensors: &[StoredTensor], most: usize) -> Vec<&[StoredTensor]> {
    let (mut parts, mut first, mut bytes) = (Vec::new(), 0, 0);
    for (i, tensor) in tensors.iter().enumerate() {
        if i > first && bytes + tensor.bytes.len() > most {
            parts.push(&tensors[first..i]);
            (first, bytes) = (i, 0);
        }
        bytes += tensor.bytes.len();
    }
    parts.push(&tensors[first..]);
    parts
}

/// The tensors of a safetensors file, by name.
pub(crate) fn tensors(bytes: &[u8]) -> std::result::Result<Vec<StoredTensor>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let tensors = file.iter().map(|(name, view)| StoredTensor {
        name: name.to_owned(),
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        bytes: view.data().to_vec(),
    });
    let mut tensors: Vec<StoredTensor> = tensors.collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

/// What is left to be done when the checkpoint has its name. What says that it may be undone goes last. old: what it has replaced.
fn tidy(checkpoint: &Path, old: Option<&PathBuf>) {
    let state = checkpoint.join(STATE);
    let _ = remove_others(&state, &[FILE]);
    if let Some(old) = old.filter(|old| is_ours(old)) {
        let _ = fs::remove_dir_all(old);
    }
    let _ = remove_others(&state, &[]);
    let _ = fs::remove_dir(&state);
}

/// Whether a run was killed after its checkpoint had got its name, and this one is to continue it.
fn is_untidy(destination: &Destination) -> bool {
    let path = &destination.path;
    // The last file that is written: a directory with a state and without it was moved there by somebody.
    let whole = path.join(specquant_model::CHECKSUMS).exists();
    destination.unfinished == Unfinished::Resume && whole && Progress::exists(path)
}

/// Whether this very run was killed after its checkpoint had got its name; then what is left to be done is done.
pub(crate) fn finished(destination: &Destination, identity: &Map<String, Value>) -> Result<bool> {
    if !is_untidy(destination) {
        return Ok(false);
    }
    let found = Progress::read(&destination.path)?.filter(|found| found.identity == *identity);
    if let Some(found) = &found {
        let old = replaced_name(&destination.partial()?);
        tidy(&destination.path, found.replaced.then_some(&old));
    }
    Ok(found.is_some())
}

/// Finds out before the long part whether `destination` can be written.
///
/// # Errors
/// As [`run`](crate::run) would report it; a checkpoint that a run finished and was killed before it had tidied up passes: whether it was this
/// run's, only [`run`](crate::run) sees.
pub fn check_output(destination: &Destination) -> Result<()> {
    if is_untidy(destination) { Ok(()) } else { Claim::new(destination).map(drop) }
}

/// Where a replaced checkpoint waits until the new one has its name.
fn replaced_name(partial: &Path) -> PathBuf {
    partial.with_extension("replaced")
}

/// Whether a directory may be replaced: it is empty, or a checkpoint of ours.
fn is_ours(path: &Path) -> bool {
    let empty = fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    let config = || -> Option<serde_json::Value> {
        serde_json::from_slice(&fs::read(path.join("config.json")).ok()?).ok()
    };
    empty || config().is_some_and(|c| c["quantization_config"]["quant_method"] == "specquant")
}

#[cfg(test)]
mod tests;
