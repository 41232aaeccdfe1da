//! A task's data file.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use specquant_model::sha256;

use super::{Document, Task};
use crate::{Error, Result};

/// The documents of a task, with the rows that they were made of.
#[derive(Debug)]
pub struct TaskData {
    /// The task.
    pub task: &'static Task,
    /// In the order of the file.
    pub documents: Vec<Document>,
    /// As read, one a document.
    pub rows: Vec<Map<String, Value>>,
    /// Line in the file of every document, from 1.
    pub lines: Vec<usize>,
    /// The file.
    pub path: PathBuf,
    /// SHA-256 of the whole file, in hexadecimal.
    pub sha256: String,
    /// Documents in the whole file.
    pub available: usize,
}

/// A row, and its line in the file, from 1.
type NumberedRow = (usize, Map<String, Value>);

impl TaskData {
    /// Reads `DIR/FILE.jsonl`, or with the feature `parquet` and without that file `DIR/FILE.parquet`; the first `limit` documents if it is
    /// not 0.
    ///
    /// # Errors
    /// [`Error::MissingData`] with the command that fetches it; [`Error::Data`] with the line.
    pub fn read(task: &'static Task, dir: &Path, limit: usize) -> Result<TaskData> {
        let path = task.data_file(dir).ok_or_else(|| Error::MissingData {
            path: dir.join(format!("{}.jsonl", task.file)),
            command: task.fetch_command(dir),
        })?;
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let mut data = TaskData {
            task,
            documents: Vec::new(),
            rows: Vec::new(),
            lines: Vec::new(),
            sha256: sha256(&bytes),
            path,
            available: 0,
        };
        let limit = if limit == 0 { usize::MAX } else { limit };
        let is_parquet = data.path.extension().is_some_and(|e| e == "parquet");
        let read = if is_parquet { parquet_rows } else { jsonl_rows };
        let at =
            |(line, problem): (Option<usize>, String)| Error::Data { path: data.path.clone(), line, problem };
        let (rows, available) = read(bytes, limit).map_err(at)?;
        if rows.is_empty() {
            return Err(at((
                None,
                format!("has no rows; remove it, and to get it anew: {}", task.fetch_command(dir)),
            )));
        }
        for (line, row) in rows {
            data.documents.push((task.parse)(&Fields(&row)).map_err(|problem| at((Some(line), problem)))?);
            data.rows.push(row);
            data.lines.push(line);
        }
        data.available = available;
        Ok(data)
    }

    /// Accuracy of guessing: the mean of one over the number of choices.
    pub fn chance(&self) -> f64 {
        match self.task.metric {
            super::Metric::Greedy => 0.0,
            super::Metric::Choice { .. } => {
                let guess = |d: &Document| 1.0 / d.requests.len() as f64;
                self.documents.iter().map(guess).sum::<f64>() / self.documents.len() as f64
            }
        }
    }
}

/// The first rows of a jsonl file, and the number of all.
fn jsonl_rows(bytes: Vec<u8>, limit: usize) -> Result<(Vec<NumberedRow>, usize), (Option<usize>, String)> {
    let text = String::from_utf8(bytes).map_err(|_| (None, "is not UTF-8 text".to_owned()))?;
    let text = text.trim_start_matches('\u{feff}');
    let filled = || text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
    let row = |(i, line): (usize, &str)| {
        let bad = |e: serde_json::Error| {
            // serde's own position counts within the line.
            let why = e.to_string();
            (Some(i + 1), format!("is not a JSON object: {}", why.split(" at line ").next().unwrap_or(&why)))
        };
        Ok((i + 1, serde_json::from_str(line).map_err(bad)?))
    };
    Ok((filled().take(limit).map(row).collect::<Result<_, _>>()?, filled().count()))
}

/// The same of a parquet file.
#[cfg(feature = "parquet")]
fn parquet_rows(bytes: Vec<u8>, limit: usize) -> Result<(Vec<NumberedRow>, usize), (Option<usize>, String)> {
    use parquet::file::reader::{FileReader, SerializedFileReader};

    let damaged = |e| (None, format!("cannot be read as parquet: {e}"));
    let reader = SerializedFileReader::new(bytes::Bytes::from(bytes)).map_err(damaged)?;
    let available = usize::try_from(reader.metadata().file_metadata().num_rows()).unwrap_or(0);
    let rows = reader.get_row_iter(None).map_err(damaged)?.take(limit).enumerate();
    let row = |(i, row): (usize, parquet::errors::Result<parquet::record::Row>)| match row
        .map_err(damaged)?
        .to_json_value()
    {
        Value::Object(row) => Ok((i + 1, row)),
        other => Err((Some(i + 1), format!("is {other}, not a row of named columns"))),
    };
    Ok((rows.map(row).collect::<Result<_, _>>()?, available))
}

/// Without the feature no parquet file is ever chosen.
#[cfg(not(feature = "parquet"))]
fn parquet_rows(_: Vec<u8>, _: usize) -> Result<(Vec<NumberedRow>, usize), (Option<usize>, String)> {
    Err((None, "is parquet, which this build does not read".to_owned()))
}

impl Task {
    /// The data file in `dir`, if there is one that this build reads.
    pub fn data_file(&self, dir: &Path) -> Option<PathBuf> {
        let kinds = ["jsonl", "parquet"];
        let read = if cfg!(feature = "parquet") { &kinds[..] } else { &kinds[..1] };
        read.iter().map(|kind| dir.join(format!("{}.{kind}", self.file))).find(|path| path.exists())
    }

    /// A shell command that writes the data file into `dir`.
    pub fn fetch_command(&self, dir: &Path) -> String {
        let super::Dataset { path, config, split } = &self.dataset;
        let file = dir.join(format!("{}.jsonl", self.file));
        if cfg!(feature = "hub") {
            return "add --download to this command".to_owned();
        }
        format!(
            "pip install datasets && python3 -c \"from datasets import load_dataset; load_dataset('{path}', '{config}', split='{split}')\
             .to_json('{}')\"",
            file.display()
        )
    }
}

/// One row of data, by the fields' names.
pub struct Fields<'a>(pub &'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Result<&'a Value, String> {
        self.0.get(name).ok_or_else(|| {
            let there: Vec<_> = self.0.keys().map(String::as_str).collect();
            format!("the field {name:?} is missing; there are {there:?}")
        })
    }

    /// A string.
    pub(crate) fn text(&self, name: &str) -> Result<&'a str, String> {
        self.get(name)?.as_str().ok_or_else(|| format!("the field {name:?} is not a string"))
    }

    /// A list of strings.
    pub(crate) fn texts(&self, name: &str) -> Result<Vec<&'a str>, String> {
        let list = self.get(name)?.as_array().filter(|l| !l.is_empty());
        let list = list.ok_or_else(|| format!("the field {name:?} is not a list of strings"))?;
        let text =
            |v: &'a Value| v.as_str().ok_or_else(|| format!("the field {name:?} holds {v}, not a string"));
        list.iter().map(text).collect()
    }

    /// An object.
    pub(crate) fn object(&self, name: &str) -> Result<Fields<'a>, String> {
        self.get(name)?.as_object().map(Fields).ok_or_else(|| format!("the field {name:?} is not an object"))
    }

    /// A whole number, as a number or as a string of digits.
    pub(crate) fn number(&self, name: &str) -> Result<usize, String> {
        let value = self.get(name)?;
        let digits = value.as_str().and_then(|s| s.trim().parse::<u64>().ok());
        let number = value.as_u64().or(digits).or_else(|| value.as_bool().map(u64::from));
        let number = number.and_then(|n| usize::try_from(n).ok());
        number.ok_or_else(|| format!("the field {name:?} is {value}, not a label such as 0 or \"0\""))
    }

    /// `choices: {text: [...], label: [...]}` and `answerKey`, one of the labels (letters in some rows, digits in others): the choices
    /// and the number of the right one.
    pub(crate) fn labelled_choices(&self) -> Result<(Vec<&'a str>, usize), String> {
        let choices = self.object("choices")?;
        let (texts, labels) = (choices.texts("text")?, choices.texts("label")?);
        let key = self.text("answerKey")?.trim_start();
        if labels.len() != texts.len() {
            return Err(format!("there are {} choices but {} labels", texts.len(), labels.len()));
        }
        let gold = labels.iter().position(|l| *l == key);
        Ok((texts, gold.ok_or_else(|| format!("the answerKey {key:?} is none of the labels {labels:?}"))?))
    }
}
