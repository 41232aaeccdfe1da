//! The lock on a checkpoint in the making.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{Destination, Unfinished, is_ours, replaced_name};
use crate::Result;
use crate::progress::{Progress, STATE, remove_others};

/// `NAME.partial`, locked against other runs. Dropped without a commit in it, it goes.
pub(super) struct Claim {
    pub partial: PathBuf,
    /// Of the directory itself, until it is closed, by the end of the process at the latest.
    _lock: Option<File>,
    pub finished: bool,
}

impl Claim {
    /// Makes `NAME.partial` this run's, and checks that the checkpoint can go where it shall.
    pub fn new(destination: &Destination) -> Result<Self> {
        let fail = |why: String| destination.refusal(why);
        let partial = destination.partial()?;
        // Or gone meanwhile, by a run that was done with it.
        let empty = || match fs::read_dir(&partial) {
            Ok(mut entries) => entries.next().is_none(),
            Err(e) => e.kind() == ErrorKind::NotFound,
        };
        if partial.symlink_metadata().is_ok() && !partial.join(STATE).exists() && !empty() {
            let it = partial.display();
            return Err(fail(format!("needs {it} while it is written, and that exists; move it away")));
        }
        let mut rounds = 0;
        let lock = loop {
            rounds += 1;
            match fs::create_dir_all(&partial) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists && !partial.exists() && rounds < ROUNDS => {
                    continue;
                }
                made => made.map_err(|e| {
                    fail(format!("cannot be created: {e}; choose a directory you can write to"))
                })?,
            }
            let lock = match File::open(&partial) {
                Ok(lock) => lock,
                // Removed by a run that was done with it.
                Err(e) if e.kind() == ErrorKind::NotFound && rounds < ROUNDS => continue,
                // Systems that cannot lock a directory do without.
                Err(_) => break None,
            };
            if let Err(TryLockError::WouldBlock) = lock.try_lock() {
                return Err(fail(
                    "another run is writing it; wait for that, or choose another -o".to_owned(),
                ));
            }
            if is_still(&partial, &lock) || rounds == ROUNDS {
                break Some(lock);
            }
        };
        let claim = Claim { partial, _lock: lock, finished: false };
        // With the lock: a run that has just finished has its name by now.
        if destination.path.symlink_metadata().is_ok() {
            if !destination.overwrite {
                // Empty, it is all that a run left which was killed in its last moment.
                let _ = fs::remove_dir(destination.path.join(STATE));
                let why = match destination.unfinished {
                    Unfinished::Resume => "is complete; nothing is left to resume",
                    _ => "exists already; choose another -o, or add --overwrite to replace it",
                };
                return Err(fail(why.to_owned()));
            }
            if !is_ours(&destination.path) {
                return Err(fail(
                    "is not a SpecQuant checkpoint, so --overwrite does not touch it; choose another -o"
                        .to_owned(),
                ));
            }
        }
        let old = replaced_name(&claim.partial);
        // A run that was killed at the very end has moved it there itself.
        let moved =
            destination.unfinished == Unfinished::Resume && !destination.path.exists() && is_ours(&old);
        if destination.overwrite && old.symlink_metadata().is_ok() && !moved {
            return Err(fail(format!(
                "needs the name {} for a moment, and that exists; move it away",
                old.display()
            )));
        }
        if destination.unfinished == Unfinished::Keep && Progress::exists(&claim.partial) {
            return Err(fail(format!(
                "was begun by a run that did not finish: continue that with --resume, or start anew with --overwrite ({} holds what it did)",
                claim.partial.display()
            )));
        }
        Ok(claim)
    }
}

/// Attempts to lock a directory that others remove: more than there are others.
const ROUNDS: usize = 1000;

/// Whether a path names what was opened there: who had the lock before may have removed that, and another have made a new one.
#[cfg(unix)]
fn is_still(path: &Path, opened: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    matches!((fs::metadata(path), opened.metadata()), (Ok(there), Ok(opened)) if same(&there, &opened))
}

#[cfg(not(unix))]
fn is_still(_: &Path, _: &File) -> bool {
    true
}

/// Empties an unfinished checkpoint; what tells that it is ours goes last.
pub(super) fn clear(partial: &Path) -> Result<()> {
    remove_others(partial, &[STATE])?;
    remove_others(partial, &[])
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.finished && !Progress::exists(&self.partial) {
            let _ = clear(&self.partial).map(|()| fs::remove_dir(&self.partial));
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// Two runs at one place: what the one has opened is removed by the other, and a third makes it anew.
    #[test]
    fn a_lock_on_what_was_removed_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.partial");
        fs::create_dir(&path).unwrap();
        let opened = File::open(&path).unwrap();
        assert!(is_still(&path, &opened));
        fs::remove_dir(&path).unwrap();
        assert!(!is_still(&path, &opened));
        fs::create_dir(&path).unwrap();
        assert!(!is_still(&path, &opened) && is_still(&path, &File::open(&path).unwrap()));
    }
}
