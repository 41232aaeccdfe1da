//! The hidden states of the calibration text, between two blocks.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapMut};

use crate::progress::unwritten;
use crate::{Error, Result};

/// Hidden states of some sequences, `[tokens, hidden]` each, one after another in f32: in memory, or in a mapped file, whose pages the
/// system writes to the disk and takes back when memory is short.
pub struct States {
    map: MmapMut,
    /// Where each sequence ends, in values.
    ends: Vec<usize>,
    /// The directory of the file.
    spill: Option<PathBuf>,
}

impl States {
    /// Zeros.
    ///
    /// lengths: values of each sequence; spill: a directory for the file that holds them, which has no name there and goes with this
    /// value, however that ends; `None` for memory.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk has no room for the file; [`Error::Memory`] when there is none in memory.
    pub fn new(lengths: impl IntoIterator<Item = usize>, spill: Option<&Path>) -> Result<Self> {
        let mut total = 0;
        let add = |length| {
            total += length;
            total
        };
        let ends: Vec<usize> = lengths.into_iter().map(add).collect();
        // A map cannot be empty.
        let bytes = 4 * total.max(1);
        let map = match spill {
            None => MmapMut::map_anon(bytes).map_err(|cause| Error::Memory { bytes, cause })?,
            Some(dir) => file(&dir.join("spill"), bytes).map_err(|e| unwritten(dir.join("spill"), e))?,
        };
        Ok(States { map, ends, spill: spill.map(Path::to_owned) })
    }

    /// These values, in memory.
    ///
    /// # Errors
    /// As [`States::new`].
    pub fn from_sequences(sequences: &[Vec<f32>]) -> Result<Self> {
        let mut states = States::new(sequences.iter().map(Vec::len), None)?;
        states.values_mut().copy_from_slice(&sequences.concat());
        Ok(states)
    }

    /// A copy, held like this.
    ///
    /// # Errors
    /// As [`States::new`].
    pub fn copy(&self) -> Result<Self> {
        let mut copy = States::new((0..self.len()).map(|i| self.range(i).len()), self.spill.as_deref())?;
        copy.values_mut().copy_from_slice(self.values());
        Ok(copy)
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Where sequence `i` lies in [`States::values`].
    pub fn range(&self, i: usize) -> Range<usize> {
        let start = if i > 0 { self.ends[i - 1] } else { 0 };
        start..self.ends[i]
    }

    /// The sequences.
    pub fn sequences(&self) -> Vec<&[f32]> {
        (0..self.len()).map(|i| &self.values()[self.range(i)]).collect()
    }

    /// All of them, one after another.
    pub fn values(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.map)[..self.ends.last().copied().unwrap_or(0)]
    }

    /// All of them, one after another.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.map)[..self.ends.last().copied().unwrap_or(0)]
    }
}

/// A mapped file of zeros. They are written and not just promised: a disk that is full says so here, not by a signal later.
fn file(path: &Path, bytes: usize) -> io::Result<MmapMut> {
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    // Whatever happens, nothing is left of it. Not every system can do that with an open file; there the next commit does.
    let _ = fs::remove_file(path);
    io::copy(&mut io::Read::take(io::repeat(0), bytes as u64), &mut file)?;
    // SAFETY: the file has no name, so that no other process can change it.
    unsafe { MmapMut::map_mut(&file) }
}

/// A file of an unfinished checkpoint, as it is read to be continued.
pub(crate) fn map(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the map is only read, and the lock on the directory keeps other runs from changing it.
    unsafe { Mmap::map(&file) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_a_file_hold_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let mut spilled = States::new([3, 0, 2], Some(dir.path())).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(spilled.values(), [0.0; 5]);
        spilled.values_mut().copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        let copy = spilled.copy().unwrap();
        assert!(copy.spill.is_some());
        let memory = States::from_sequences(&[vec![1.0, 2.0, 3.0], vec![], vec![4.0, 5.0]]).unwrap();
        for states in [&spilled, &copy, &memory] {
            assert_eq!(states.sequences(), [&[1.0, 2.0, 3.0][..], &[], &[4.0, 5.0]]);
        }
        assert_eq!(States::new([], None).unwrap().values(), [0.0; 0]);
        let nowhere = States::new([1], Some(&dir.path().join("none"))).err().unwrap().to_string();
        assert!(nowhere.contains("cannot be written"), "{nowhere}");
    }
}
