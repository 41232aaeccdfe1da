//! The files of a model in one string of bytes, which libFuzzer can damage: each behind a line that names it.

use std::path::Path;

/// Files that an input may consist of. Others are left out, so that no input writes elsewhere than into its directory.
pub const NAMES: [&str; 12] = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "report.json",
    "README.md",
];

const MARK: &[u8] = b"\n--- file ";

/// One string of files.
pub fn join<'a>(files: impl IntoIterator<Item = &'a (String, Vec<u8>)>) -> Vec<u8> {
    let mut all = Vec::new();
    for (name, bytes) in files {
        all.extend([MARK, name.as_bytes(), b"\n", bytes].concat());
    }
    all
}

/// The files of a string, by name; a name that comes again replaces the former.
pub fn split(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    let starts: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at..].starts_with(MARK)).collect();
    for (i, &start) in starts.iter().enumerate() {
        let part = &bytes[start + MARK.len()..starts.get(i + 1).copied().unwrap_or(bytes.len())];
        let Some(line) = part.iter().position(|&b| b == b'\n') else { continue };
        let name = NAMES.into_iter().find(|name| name.as_bytes() == &part[..line]);
        if let Some(name) = name {
            files.retain(|(other, _)| other != name);
            files.push((name.to_owned(), part[line + 1..].to_vec()));
        }
    }
    files
}

/// Makes `dir` hold these files and no others of [`NAMES`].
///
/// # Errors
/// When the disk refuses.
pub fn write(dir: &Path, files: &[(String, Vec<u8>)]) -> std::io::Result<()> {
    for name in NAMES {
        match std::fs::remove_file(dir.join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    files.iter().try_for_each(|(name, bytes)| write_new(&dir.join(name), bytes))
}

/// Writes a file after removing it: some file systems flush a file that is cut to nothing and written again to the disk, which takes longer than
/// anything else here.
///
/// # Errors
/// When the disk refuses.
pub fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let _ = std::fs::remove_file(path);
    std::fs::write(path, bytes)
}

/// The files of `dir` that are of [`NAMES`].
///
/// # Errors
/// When one cannot be read.
pub fn read(dir: &Path) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let there = NAMES.into_iter().filter(|name| dir.join(name).exists());
    there.map(|name| Ok((name.to_owned(), std::fs::read(dir.join(name))?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_back_and_others_do_not() {
        let file = |name: &str, text: &str| (name.to_owned(), text.as_bytes().to_vec());
        let files =
            [file("config.json", "{}\n"), file("model.safetensors", "\0\n--- file"), file("README.md", "")];
        let bytes = join(&files);
        assert_eq!(split(&bytes), files);
        let hostile = join(&[file("../escape", "x"), file("config.json", "1"), file("config.json", "2")]);
        assert_eq!(split(&hostile), [file("config.json", "2")]);
        assert!(split(b"no file at all").is_empty());
    }
}
