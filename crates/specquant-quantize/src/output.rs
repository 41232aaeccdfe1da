//! The directory being written: invisible under its final name until it is complete.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::json;
use specquant_model::StoredTensor;

use crate::{Error, Result};

/// Tells an unfinished checkpoint of ours from somebody's directory of that name.
const MARK: &str = ".specquant-unfinished";

/// A checkpoint in the making. Everything goes to `NAME.partial` beside the destination; [`Output::finish`] renames it. Dropped
/// before that, it removes what it wrote.
pub struct Output {
    destination: PathBuf,
    partial: PathBuf,
    overwrite: bool,
    shards: usize,
    written: usize,
    index: BTreeMap<String, String>,
    bytes: u64,
    finished: bool,
}

impl Output {
    /// Prepares `destination` for `shards` safetensors files.
    ///
    /// # Errors
    /// [`Error::Output`] when the destination exists and `overwrite` is false, or nothing can be written there.
    pub fn create(destination: &Path, overwrite: bool, shards: usize) -> Result<Self> {
        let fail = |why: String| Error::Output { path: destination.to_owned(), why };
        let name = destination
            .file_name()
            .ok_or_else(|| fail("is not the name of a directory; give -o DIRECTORY".to_owned()))?;
        if destination.symlink_metadata().is_ok() {
            if !overwrite {
                return Err(fail(
                    "exists already; choose another -o, or add --overwrite to replace it".to_owned(),
                ));
            }
            if !is_ours(destination) {
                return Err(fail(
                    "is not a SpecQuant checkpoint, so --overwrite does not touch it; choose another -o"
                        .to_owned(),
                ));
            }
        }
        let mut partial_name = name.to_owned();
        partial_name.push(".partial");
        let partial = destination.with_file_name(partial_name);
        let old = replaced_name(&partial);
        if overwrite && old.symlink_metadata().is_ok() {
            return Err(fail(format!(
                "needs the name {} for a moment, and that exists; move it away",
                old.display()
            )));
        }
        if partial.symlink_metadata().is_ok() {
            let stale = partial.join(MARK).exists()
                || fs::read_dir(&partial).is_ok_and(|mut entries| entries.next().is_none());
            if !stale {
                let it = partial.display();
                return Err(fail(format!("needs {it} while it is written, and that exists; move it away")));
            }
            // Left by a run that was killed; nothing in it is complete.
            fs::remove_dir_all(&partial)
                .map_err(|e| fail(format!("cannot remove the unfinished {}: {e}", partial.display())))?;
        }
        fs::create_dir_all(&partial)
            .and_then(|()| fs::write(partial.join(MARK), ""))
            .map_err(|e| fail(format!("cannot be created: {e}; choose a directory you can write to")))?;
        let destination = destination.to_owned();
        Ok(Output {
            destination,
            partial,
            overwrite,
            shards,
            written: 0,
            index: BTreeMap::new(),
            bytes: 0,
            finished: false,
        })
    }

    /// Where the checkpoint lies until it is finished.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Writes the next shard.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses.
    pub fn write_shard(&mut self, tensors: &[StoredTensor]) -> Result<()> {
        self.written += 1;
        let file = format!("model-{:05}-of-{:05}.safetensors", self.written, self.shards);
        self.write_tensors(&file, tensors)
    }

    /// Replaces tensors that have been written, a shard at a time.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses.
    pub fn replace(&mut self, tensors: Vec<StoredTensor>) -> Result<()> {
        let mut new: BTreeMap<String, StoredTensor> =
            tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
        let files =
            new.keys().map(|name| self.index.get(name).cloned().ok_or_else(|| self.fail(name, "it is new")));
        for file in files.collect::<Result<BTreeSet<String>>>()? {
            let unread = |e: &dyn std::fmt::Display| Error::Output {
                path: self.partial.join(&file),
                why: format!("cannot be read again: {e}"),
            };
            let bytes = fs::read(self.partial.join(&file)).map_err(|e| unread(&e))?;
            let old = SafeTensors::deserialize(&bytes).map_err(|e| unread(&e))?;
            let tensors = old.iter().map(|(name, view)| {
                new.remove(name).unwrap_or_else(|| StoredTensor {
                    name: name.to_owned(),
                    dtype: view.dtype(),
                    shape: view.shape().to_vec(),
                    bytes: view.data().to_vec(),
                })
            });
            let mut tensors: Vec<StoredTensor> = tensors.collect();
            tensors.sort_by(|a, b| a.name.cmp(&b.name));
            self.bytes -= old.iter().map(|(_, view)| view.data().len() as u64).sum::<u64>();
            self.write_tensors(&file, &tensors)?;
        }
        Ok(())
    }

    fn write_tensors(&mut self, file: &str, tensors: &[StoredTensor]) -> Result<()> {
        let views = tensors.iter().map(|t| {
            let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes);
            view.map(|v| (t.name.as_str(), v)).map_err(|e| self.fail(file, e))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        let path = self.partial.join(file);
        let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
        safetensors::serialize_to_file(views, metadata, &path).map_err(|e| self.fail(file, e))?;
        // safetensors writes through a private temporary file; the shard gets the permissions of any other file here.
        let permissions = fs::metadata(self.partial.join(MARK)).map(|m| m.permissions());
        permissions.and_then(|p| fs::set_permissions(&path, p)).map_err(|e| self.fail(file, e))?;
        File::open(&path).and_then(|f| f.sync_all()).map_err(|e| self.fail(file, e))?;
        for tensor in tensors {
            self.index.insert(tensor.name.clone(), file.to_owned());
            self.bytes += tensor.bytes.len() as u64;
        }
        Ok(())
    }

    /// Writes a whole file and flushes it to the disk.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let write = || -> std::io::Result<()> {
            let mut file = File::create(self.partial.join(name))?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(|e| self.fail(name, e))
    }

    /// Bytes of the tensors written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn fail(&self, name: &str, why: impl std::fmt::Display) -> Error {
        Error::Output { path: self.partial.join(name), why: format!("cannot be written: {why}") }
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
        debug_assert_eq!(self.written, self.shards);
        self.write_index()?;
        let sums = specquant_model::checksums(&self.partial)?;
        self.write(specquant_model::CHECKSUMS, sums.as_bytes())?;
        let moved = |e: std::io::Error| Error::Output {
            path: self.destination.clone(),
            why: format!("cannot be moved into place: {e}"),
        };
        // What is in the directory lasts before the mark goes; not every system can do that with directories.
        let _ = File::open(&self.partial).and_then(|d| d.sync_all());
        fs::remove_file(self.partial.join(MARK)).map_err(moved)?;
        let _ = File::open(&self.partial).and_then(|d| d.sync_all());
        let old = replaced_name(&self.partial);
        let replaces = self.overwrite && self.destination.exists();
        if replaces {
            fs::rename(&self.destination, &old).map_err(moved)?;
        }
        if let Err(e) = fs::rename(&self.partial, &self.destination) {
            if replaces {
                let _ = fs::rename(&old, &self.destination);
            }
            // Everything is written; only the name is missing.
            self.finished = true;
            let why = format!(
                "cannot be moved into place: {e}; the finished checkpoint is {}",
                self.partial.display()
            );
            return Err(Error::Output { path: self.destination.clone(), why });
        }
        self.finished = true;
        if replaces {
            let _ = if old.is_dir() { fs::remove_dir_all(&old) } else { fs::remove_file(&old) };
        }
        // The rename itself lasts once the directory that holds it is on disk; not every file system can do that.
        if let Some(parent) = self.destination.parent() {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            let _ = File::open(parent).and_then(|d| d.sync_all());
        }
        Ok(())
    }
}

/// Finds out before the long part whether `destination` can be written.
///
/// # Errors
/// As [`run`](crate::run) would report it at the end.
pub fn check_output(destination: &Path, overwrite: bool) -> Result<()> {
    Output::create(destination, overwrite, 0).map(drop)
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

impl Drop for Output {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_of_an_unfinished_output() {
        let dir = tempfile::tempdir().unwrap();
        let dst = dir.path().join("out");
        let mut output = Output::create(&dst, false, 1).unwrap();
        output.write_shard(&[StoredTensor::f32("a".into(), vec![1], &[1.0])]).unwrap();
        drop(output);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_existing_directory_is_kept_unless_told_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        let dst = dir.path().join("out");
        fs::create_dir(&dst).unwrap();
        fs::write(dst.join("precious"), "x").unwrap();
        let error = Output::create(&dst, false, 0).err().unwrap().to_string();
        assert!(error.contains("--overwrite"), "{error}");
        let error = Output::create(&dst, true, 0).err().unwrap().to_string();
        assert!(error.contains("not a SpecQuant checkpoint") && dst.join("precious").exists(), "{error}");
        fs::write(dst.join("config.json"), r#"{"quantization_config": {"quant_method": "specquant"}}"#)
            .unwrap();
        Output::create(&dst, true, 0).unwrap().finish().unwrap();
        assert!(!dst.join("precious").exists() && dst.join("model.safetensors.index.json").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn shards_read_back_through_the_index() {
        let dir = tempfile::tempdir().unwrap();
        let dst = dir.path().join("out");
        let mut output = Output::create(&dst, false, 2).unwrap();
        output.write_shard(&[StoredTensor::f32("a".into(), vec![2], &[1.0, 2.0])]).unwrap();
        output.write_shard(&[StoredTensor::f32("b".into(), vec![1], &[3.0])]).unwrap();
        assert_eq!(output.bytes(), 12);
        output.finish().unwrap();
        let index: serde_json::Value =
            serde_json::from_slice(&fs::read(dst.join("model.safetensors.index.json")).unwrap()).unwrap();
        assert_eq!(index["weight_map"]["b"], "model-00002-of-00002.safetensors");
        let bytes = fs::read(dst.join("model-00001-of-00002.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.tensor("a").unwrap().data(), [0, 0, 128, 63, 0, 0, 0, 64]);
    }
}
