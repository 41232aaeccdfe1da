//! What has been scored so far, on disk: a run that is interrupted continues from here.
//!
//! One JSON object a line. The first names what all scores depend on; every task's first line names its data; every other line is a
//! scored document. Lines are added a batch at a time, and a last line that was cut off is dropped.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::score::Score;
use crate::tasks::TaskData;
use crate::{Error, Result};

/// A line of the journal after the first.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Document { task: String, doc: usize, loglik: Vec<f64>, greedy: Vec<bool> },
    Task { task: String, data_sha256: String },
}

/// Scores of documents, kept in a file as they come.
pub struct Journal {
    path: PathBuf,
    file: File,
    tasks: HashMap<String, String>,
    scores: HashMap<(String, usize), Vec<Score>>,
}

impl Journal {
    /// Opens the journal at `path` for a run that `identity` describes: an object whose every value changes the scores.
    ///
    /// With `resume` an older journal is continued, otherwise there must be none.
    ///
    /// # Errors
    /// [`Error::Journal`] when there is one and it is not to be continued, or belongs to another run (with the fields that differ);
    /// [`Error::Io`].
    pub fn open(path: &Path, identity: &Value, resume: bool) -> Result<Journal> {
        let fail = |problem: String| Error::Journal { path: path.to_owned(), problem };
        let mut file =
            OpenOptions::new().create(true).read(true).append(true).open(path).map_err(Error::io(path))?;
        // Until the file is closed. A file system without locks is no reason to refuse.
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(fail("another run is writing here; wait for it, or choose another -o".to_owned()));
        }
        let mut old = Vec::new();
        file.read_to_end(&mut old).map_err(Error::io(path))?;
        if !resume && !old.is_empty() {
            return Err(fail(
                "exists: an earlier run wrote it; continue that with --resume, or choose another -o, or remove it".to_owned(),
            ));
        }
        // What follows the last line end was being written when the run stopped.
        let whole = old.iter().rposition(|&b| b == b'\n').map_or(0, |end| end + 1);
        let mut lines = old[..whole].split_inclusive(|&b| b == b'\n').enumerate();
        let mut journal =
            Journal { path: path.to_owned(), file, tasks: HashMap::new(), scores: HashMap::new() };
        let damaged =
            |i: usize| fail(format!("line {} is not a journal's; remove the file and start anew", i + 1));
        if let Some((i, line)) = lines.next() {
            let found: Value = serde_json::from_slice(line).map_err(|_| damaged(i))?;
            let found = found.as_object().ok_or_else(|| damaged(i))?;
            let wanted = identity.as_object().ok_or_else(|| damaged(i))?;
            let differs = |key: &&String| found.get(*key) != wanted.get(*key);
            let differing: Vec<_> = wanted.keys().filter(differs).map(String::as_str).collect();
            if !differing.is_empty() {
                return Err(fail(format!(
                    "belongs to a run that differs in {}; choose another -o, or remove it to start anew",
                    differing.join(", ")
                )));
            }
        }
        for (i, line) in lines {
            match serde_json::from_slice(line).map_err(|_| damaged(i))? {
                Line::Task { task, data_sha256 } => {
                    journal.tasks.insert(task, data_sha256);
                }
                Line::Document { task, doc, loglik, greedy } => {
                    let scores = loglik.into_iter().zip(greedy);
                    let scores = scores.map(|(loglik, greedy)| Score { loglik, greedy }).collect();
                    journal.scores.insert((task, doc), scores);
                }
            }
        }
        if whole == 0 && !old.is_empty() && old[0] != b'{' {
            return Err(damaged(0));
        }
        journal.file.set_len(whole as u64).map_err(Error::io(path))?;
        if whole == 0 {
            journal.append(&[identity])?;
        }
        Ok(journal)
    }

    fn append(&mut self, lines: &[impl Serialize]) -> Result<()> {
        let lines = lines.iter().map(|l| json!(l).to_string() + "\n").collect::<String>();
        self.file.write_all(lines.as_bytes()).map_err(Error::io(&self.path))
    }

    /// Makes sure that the journal's scores of this task, if any, are of these data.
    ///
    /// # Errors
    /// [`Error::Journal`] when they are of other data; [`Error::Io`].
    pub fn begin(&mut self, data: &TaskData) -> Result<()> {
        let (task, data_sha256) = (data.task.name.to_owned(), data.sha256.clone());
        match self.tasks.get(&task) {
            Some(old) if *old != data_sha256 => Err(Error::Journal {
                path: self.path.clone(),
                problem: format!(
                    "its scores of {task} are of other data than {}; choose another -o, or remove it to start anew",
                    data.path.display()
                ),
            }),
            Some(_) => Ok(()),
            None => {
                self.tasks.insert(task.clone(), data_sha256.clone());
                self.append(&[Line::Task { task, data_sha256 }])
            }
        }
    }

    /// The scores of a document, if they are known and as many as it has requests.
    pub fn get(&self, task: &str, doc: usize, requests: usize) -> Option<&Vec<Score>> {
        self.scores.get(&(task.to_owned(), doc)).filter(|s| s.len() == requests)
    }

    /// Adds the scores of some documents.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, task: &str, scored: &[(usize, Vec<Score>)]) -> Result<()> {
        let line = |(doc, scores): &(usize, Vec<Score>)| Line::Document {
            task: task.to_owned(),
            doc: *doc,
            loglik: scores.iter().map(|s| s.loglik).collect(),
            greedy: scores.iter().map(|s| s.greedy).collect(),
        };
        self.append(&scored.iter().map(line).collect::<Vec<_>>())?;
        self.scores.extend(scored.iter().map(|(doc, scores)| ((task.to_owned(), *doc), scores.clone())));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continues_what_was_cut_off_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.jsonl");
        let identity = json!({"model": "a", "bos": "auto"});
        let scores =
            vec![Score { loglik: -0.1 - 1.0 / 3.0, greedy: true }, Score { loglik: -1e-17, greedy: false }];
        let mut journal = Journal::open(&path, &identity, false).unwrap();
        journal.add("t", &[(3, scores.clone()), (1, scores.clone())]).unwrap();
        drop(journal);
        // The last line loses its end.
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();

        let error = |identity: &Value, resume| match Journal::open(&path, identity, resume) {
            Err(e) => e.to_string(),
            Ok(_) => panic!("accepted"),
        };
        assert!(error(&identity, false).contains("--resume"));
        let other = json!({"model": "b", "bos": "never"});
        assert!(error(&other, true).contains("differs in model, bos"));

        let mut journal = Journal::open(&path, &identity, true).unwrap();
        assert_eq!(journal.get("t", 3, 2), Some(&scores));
        assert_eq!((journal.get("t", 1, 2), journal.get("t", 3, 3)), (None, None));
        journal.add("t", &[(1, scores.clone())]).unwrap();
        drop(journal);
        assert_eq!(std::fs::read(&path).unwrap(), bytes);

        for prose in ["prose\n", "prose"] {
            std::fs::write(&path, prose).unwrap();
            assert!(error(&identity, true).contains("line 1"));
            assert_eq!(std::fs::read_to_string(&path).unwrap(), prose);
        }
        let open = Journal::open(&dir.path().join("other.jsonl"), &identity, false).unwrap();
        let second = Journal::open(&dir.path().join("other.jsonl"), &identity, true);
        assert!(second.is_err_and(|e| e.to_string().contains("another run")));
        drop(open);
    }
}
