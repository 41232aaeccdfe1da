//! Prose for calibration and perplexity, from the forms in which it is published.

use std::io::Read;
use std::path::Path;

/// What a line of jsonl should be.
const FORM: &str = "; every line of a .jsonl file is an object such as {\"text\": \"Some prose.\"}";

/// The text of a file, by its extension:
///
/// - `.jsonl`: `text` of every line, joined by empty lines;
/// - `.raw` (wiki.test.raw and its kin): every line is a row of the data set, and rows are joined by empty lines, as in
///   `"\n\n".join(dataset["text"])` of GPTQ's and QuaRot's data_utils.py. A row that is not blank keeps its line end, as on the
///   Hugging Face hub, and a blank one is empty;
/// - anything else: as it is.
///
/// # Errors
/// What is wrong, as a sentence about the file.
pub fn read_text(path: &Path) -> Result<String, String> {
    prose(path, std::fs::read_to_string(path).map_err(unreadable)?)
}

/// The same of the file's first lines, `bytes` of them at most.
///
/// # Errors
/// As [`read_text`].
pub fn read_first_text(path: &Path, bytes: usize) -> Result<String, String> {
    let mut raw = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(bytes as u64 + 1).read_to_end(&mut raw).map_err(unreadable)?;
    if raw.len() > bytes {
        raw.truncate(bytes);
        let whole_lines = raw.iter().rposition(|b| *b == b'\n').map(|at| at + 1);
        if whole_lines.is_none() && path.extension().is_some_and(|e| e == "jsonl") {
            return Err(format!("has a first line of more than {bytes} bytes{FORM}"));
        }
        // One line that does not end: whole characters of it.
        let end =
            whole_lines.unwrap_or_else(|| bytes - raw.utf8_chunks().last().map_or(0, |c| c.invalid().len()));
        raw.truncate(end);
    }
    prose(path, String::from_utf8(raw).map_err(unreadable)?)
}

fn unreadable(why: impl std::fmt::Display) -> String {
    format!("cannot be read as UTF-8 text: {why}")
}

/// What the lines of a file of this name are.
fn prose(path: &Path, raw: String) -> Result<String, String> {
    let text = match path.extension().and_then(|e| e.to_str()) {
        Some("jsonl") => {
            let lines = raw.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
            let texts = lines.map(|(i, line)| {
                let value: serde_json::Value =
                    serde_json::from_str(line).map_err(|_| format!("line {} is not JSON{FORM}", i + 1))?;
                let text = value.get("text").and_then(|t| t.as_str());
                text.map(str::to_owned).ok_or_else(|| format!("line {} has no string \"text\"{FORM}", i + 1))
            });
            texts.collect::<Result<Vec<_>, _>>()?.join("\n\n")
        }
        Some("raw") => {
            let row = |line: &str| if line.trim().is_empty() { String::new() } else { format!("{line}\n") };
            raw.lines().map(row).collect::<Vec<_>>().join("\n\n")
        }
        _ => raw,
    };
    if text.trim().is_empty() {
        return Err("is empty; name a file with a few pages of ordinary text".to_owned());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(suffix: &str, text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::Builder::new().suffix(suffix).tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn jsonl_lines_are_joined_and_bad_ones_named() {
        let good = file(".jsonl", "{\"text\": \"one\"}\n\n{\"text\": \"two\", \"id\": 3}\n");
        assert_eq!(read_text(good.path()).unwrap(), "one\n\ntwo");
        let bad = file(".jsonl", "{\"text\": \"one\"}\n{\"content\": \"two\"}\n");
        assert!(read_text(bad.path()).unwrap_err().contains("line 2"));
    }

    #[test]
    fn the_first_lines_and_no_part_of_one() {
        let lines = file(".jsonl", "{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
        let first = |bytes| read_first_text(lines.path(), bytes).unwrap();
        assert_eq!([first(16), first(31), first(32), first(99)], ["one", "one", "one\n\ntwo", "one\n\ntwo"]);
        // Characters of two bytes without a line end.
        let long = file(".txt", "ääää");
        assert_eq!(read_first_text(long.path(), 5).unwrap(), "ää");
        assert!(read_first_text(lines.path(), 9).unwrap_err().contains("first line of more than 9 bytes"));
        assert!(read_first_text(file(".txt", "   \nprose").path(), 4).unwrap_err().contains("empty"));
    }

    #[test]
    fn empty_text_is_refused() {
        for (suffix, text) in [(".txt", " \n\n"), (".jsonl", ""), (".txt", ""), (".raw", " \n \n")] {
            assert!(read_text(file(suffix, text).path()).unwrap_err().contains("empty"));
        }
    }

    #[test]
    fn wikitext_rows_are_joined_as_the_data_set_is() {
        let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/wikitext2");
        let joined = std::fs::read_to_string(shared.join("wiki.test.hf_joined.txt")).unwrap();
        assert!(read_text(&shared.join("wiki.test.raw")).unwrap() == joined);
    }
}
