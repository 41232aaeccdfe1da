//! Prose for calibration and perplexity, from the forms in which it is published.

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
    let raw = std::fs::read_to_string(path).map_err(|e| format!("cannot be read as UTF-8 text: {e}"))?;
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
