//! What the tests of the binary share: small models in temporary directories, ways to damage them, and the look of a refusal.

// Each test file uses a part of this.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Flags that make a calibration tiny.
pub const QUICK: [&str; 8] =
    ["--samples", "2", "--sequence-length", "64", "--search-tokens", "32", "--threads", "2"];
/// What quantizes by the published method, unless the flags name another recipe: most tests are about its parts.
pub fn published(flags: &[&str]) -> &'static [&'static str] {
    let named = flags.iter().any(|flag| *flag == "--recipe" || *flag == "-r");
    if named { &[] } else { &["--recipe", "specquant"] }
}

/// A few hundred bytes, so a few hundred tokens.
pub const TEXT: &str = "The harbour was quiet before the storm. Two boats lay at the wall, and their ropes creaked.\n\
    An old man mended his nets; he had done so for forty years, and he did not look up when the rain began.\n\
    \"It will pass,\" he said to the gulls, \"or it will not.\" Behind him the church clock struck seven times.\n\
    By nine the wind had turned, and the boats swung round to face the open sea, as they always do.\n";

/// The binary under test.
pub fn specquant() -> Command {
    assert_cmd::cargo::cargo_bin_cmd!("specquant")
}

/// A temporary directory: `models` and files to read, `out` to write to.
pub struct Lab {
    dir: TempDir,
}

impl Lab {
    pub fn new() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("out")).unwrap();
        Lab { dir }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A copy of one of the golden models, with a tokenizer.
    pub fn model(&self, name: &str) -> PathBuf {
        let golden =
            Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/golden/tiny")).join(name);
        let copy = self.path().join("models").join(name);
        fs::create_dir_all(&copy).unwrap();
        for entry in fs::read_dir(&golden).unwrap_or_else(|e| panic!("{}: {e}", golden.display())) {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap();
            if file != "expected.safetensors" {
                // Not fs::copy, which would keep a read-only mode.
                fs::write(copy.join(file), fs::read(&path).unwrap()).unwrap();
            }
        }
        fs::write(copy.join("tokenizer.json"), tokenizer(&[]).to_string()).unwrap();
        copy
    }

    /// A file with this content.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Where an output may go.
    pub fn out(&self, name: &str) -> PathBuf {
        self.path().join("out").join(name)
    }

    /// Quantizes a model quickly, and returns the checkpoint.
    pub fn quantized(&self, model: &Path, name: &str, flags: &[&str]) -> PathBuf {
        let out = self.out(name);
        let mut command = specquant();
        command.arg("quantize").arg("-m").arg(model).arg("-o").arg(&out);
        command.args(QUICK).args(published(flags)).args(flags).assert().success();
        out
    }
}

/// GPT-2's bijection of bytes and printable characters.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + before).unwrap()
}

/// A byte-level BPE of 256 bytes and three merges, with `added` special tokens after them.
pub fn tokenizer(added: &[String]) -> Value {
    let mut vocab: serde_json::Map<String, Value> =
        (0..=255).map(|b: u8| (byte_char(b).to_string(), json!(b))).collect();
    let merges = [["t", "h"], ["th", "e"], ["Ġ", "a"]];
    for merge in merges {
        vocab.insert(merge.concat(), json!(vocab.len()));
    }
    let special = |(i, text): (usize, &String)| {
        json!({"id": vocab.len() + i, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let added: Vec<Value> = added.iter().enumerate().map(special).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges},
    })
}

/// A tensor on its way from one file to another.
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// Rewrites one tensor of a safetensors file.
pub fn edit_tensor(file: &Path, name: &str, edit: impl FnOnce(&mut Tensor)) {
    let raw = fs::read(file).unwrap();
    let mut tensors: Vec<Tensor> = SafeTensors::deserialize(&raw)
        .unwrap()
        .iter()
        .map(|(name, view)| Tensor {
            name: name.to_owned(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        })
        .collect();
    edit(tensors.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("no {name}")));
    let views = tensors
        .iter()
        .map(|t| (t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(file, bytes).unwrap();
}

/// The shard of a sharded model that holds `tensor`.
pub fn shard_of(model: &Path, tensor: &str) -> PathBuf {
    let index: Value =
        serde_json::from_slice(&fs::read(model.join("model.safetensors.index.json")).unwrap()).unwrap();
    model.join(index["weight_map"][tensor].as_str().unwrap())
}

/// Rewrites a JSON file.
pub fn edit_json(file: &Path, edit: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    edit(&mut json);
    fs::write(file, json.to_string()).unwrap();
}

/// Cuts a file to its first `bytes`.
pub fn truncate(file: &Path, bytes: usize) {
    let content = fs::read(file).unwrap();
    fs::write(file, &content[..bytes]).unwrap();
}

/// Every file below `dir` with its content, by relative path.
pub fn tree(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                files.push((path.strip_prefix(dir).unwrap().join(""), Vec::new()));
                todo.push(path);
            } else {
                files.push((path.strip_prefix(dir).unwrap().to_owned(), fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

/// Asserts that two directories hold the same files.
pub fn assert_same(a: &Path, b: &Path) {
    let (a, b) = (tree(a), tree(b));
    let names = |t: &[(PathBuf, Vec<u8>)]| t.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b));
    for ((name, a), (_, b)) in a.iter().zip(&b) {
        assert!(a == b, "{} differs", name.display());
    }
}

/// Runs a command that must refuse: exit code 2, nothing on stdout, one message on stderr that holds `words`, behind the plan if it prints one, and nothing
/// written or lost. Returns the message.
pub fn refuse<S: AsRef<OsStr>>(lab: &Lab, args: impl IntoIterator<Item = S>, words: &[&str]) -> String {
    let before = tree(lab.path());
    let mut command = specquant();
    command.args(args);
    let output = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
    let (stdout, stderr) = (stdout.unwrap(), stderr.unwrap());
    println!("{stderr}");
    assert_eq!(output.status.code(), Some(2), "{command:?}\n{stderr}");
    assert_eq!(stdout, "", "{command:?}");
    let first = stderr.starts_with("error:") || stderr.starts_with("plan:") && stderr.contains("\nerror:");
    assert!(first && stderr.matches("error:").count() == 1, "{command:?}\n{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "no {word:?} in\n{stderr}");
    }
    let names = |t: &[(PathBuf, Vec<u8>)]| t.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    let after = tree(lab.path());
    assert_eq!(names(&before), names(&after), "{command:?}");
    assert!(before == after, "a file changed: {command:?}");
    stderr
}

/// [`refuse`] for `quantize` of `model` to a new directory. `--json` keeps the plan off stderr.
pub fn refuse_quantize(lab: &Lab, model: &Path, flags: &[&str], words: &[&str]) -> String {
    let out = lab.out("quantized");
    let mut args: Vec<&OsStr> = ["quantize", "--json", "-m"].map(OsStr::new).to_vec();
    args.extend([model.as_os_str(), OsStr::new("-o"), out.as_os_str()]);
    args.extend(QUICK.iter().chain(published(flags)).chain(flags).map(OsStr::new));
    refuse(lab, args, words)
}
