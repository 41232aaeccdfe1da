//! Whether a finished checkpoint still is what was written: checksums, shapes, and numbers that are finite. Everything that is wrong is found, not the
//! first of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use crate::stored_branch::read_basis;
use crate::stored_linear::read_linear;
use crate::stored_transform::{read_act_clip, read_key_transform, read_transform};
use crate::{
    Block, Embedding, Error, Hashing, Head, InputTransform, Problems, QuantizationConfig, Result, Site,
    Source,
};

/// The file of a checkpoint that lists the SHA-256 of every other one; `sha256sum --check` reads it too.
pub const CHECKSUMS: &str = "SHA256SUMS";

/// What [`CHECKSUMS`] is to hold for `dir`: a line for every file in it that is not hidden, by name. Files whose sum is `known` are not read.
///
/// # Errors
/// When a file cannot be read.
pub fn checksums(dir: &Path, known: &BTreeMap<String, String>) -> Result<String> {
    Ok(sums(dir, known)?.into_iter().map(|(name, sum)| format!("{sum}  {name}\n")).collect())
}

fn sums(dir: &Path, known: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
    let mut sums = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        if path.is_file() && name != CHECKSUMS && !name.starts_with('.') {
            let sum = match known.get(name) {
                Some(sum) => sum.clone(),
                None => {
                    let mut hashing = Hashing::new(std::io::sink());
                    File::open(&path)
                        .and_then(|mut file| std::io::copy(&mut file, &mut hashing))
                        .map_err(Error::io(&path))?;
                    hashing.finish().1
                }
            };
            sums.insert(name.to_owned(), sum);
        }
    }
    Ok(sums)
}

/// Everything that is wrong with the model at `path`: of a SpecQuant checkpoint its checksums, and of any model shapes, ranges, numbers that are not
/// finite, and the tokenizer.
///
/// # Errors
/// When the path cannot be read at all.
pub fn verify(path: &Path) -> Result<Problems> {
    let mut found = Found::default();
    if path.join(CHECKSUMS).exists() {
        compare_sums(path, &mut found)?;
    }
    match Source::open(path) {
        Err(e @ Error::NotAModel { .. }) => return Err(e),
        Err(e) => found.add(e.to_string()),
        Ok(source) => {
            if source.is_quantized() && !path.join(CHECKSUMS).exists() {
                found.add(format!(
                    "{} has no {CHECKSUMS}, with which its bits could be compared; an earlier version wrote it, or the file was lost: quantize \
                     the model again",
                    path.display()
                ));
            }
            check_tensors(&source, &mut found);
            found.note(source.tokenizer());
        }
    }
    Ok(found.0)
}

/// Complaints, each once.
#[derive(Default)]
struct Found(Problems);

impl Found {
    fn add(&mut self, problem: String) {
        if !self.0.iter().any(|known| known == problem) {
            self.0.push(problem);
        }
    }

    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|e| self.add(e.to_string())).ok()
    }
}

fn compare_sums(dir: &Path, found: &mut Found) -> Result<()> {
    let file = dir.join(CHECKSUMS);
    let text = std::fs::read(&file).map_err(Error::io(&file))?;
    let mut there = sums(dir, &BTreeMap::new())?;
    for (i, line) in String::from_utf8_lossy(&text).lines().enumerate() {
        let Some((want, name)) = line.split_once("  ").filter(|(sum, _)| sum.len() == 64) else {
            found.add(format!("{}: line {} is not a checksum and a file name", file.display(), i + 1));
            continue;
        };
        match there.remove(name) {
            Some(got) if got == want => {}
            Some(got) => found.add(format!(
                "{} is not what was written: its SHA-256 is {got} instead of {want}; copy it again, or quantize the model again",
                dir.join(name).display()
            )),
            None => found.add(format!("{} is missing; copy it again", dir.join(name).display())),
        }
    }
    let strangers =
        there.into_keys().filter(|name| name.ends_with(".safetensors") || name.ends_with(".json"));
    strangers
        .for_each(|name| found.add(format!("{} is not listed in {CHECKSUMS}", dir.join(name).display())));
    Ok(())
}

fn check_tensors(source: &Source, found: &mut Found) {
    for view in source.names().filter_map(|name| source.tensor(name).ok()).filter(|t| t.dtype.widens()) {
        let negative = |values: Vec<f32>| values.iter().position(|v| *v < 0.0);
        let values = found.note(view.to_f32());
        if let Some(i) = values.filter(|_| view.name().ends_with("_scale")).and_then(negative) {
            found.add(format!("{}: tensor {} is negative at {i}", view.file().display(), view.name()));
        }
    }
    let config = source.config();
    let quant = QuantizationConfig::from_config(source.config_json(), source.path());
    let Some(quant) = found.note(quant) else { return };
    for index in 0..config.num_layers {
        check_layers(source, index, quant.as_ref(), found);
        // What is not a linear layer or its input.
        found.note(Block::read(source, index, quant.as_ref()));
    }
    found.note(Embedding::read(source));
    found.note(Head::read(source));
}

/// The linear layers of a block and what their inputs go through, each by itself.
fn check_layers(source: &Source, index: usize, quant: Option<&QuantizationConfig>, found: &mut Found) {
    let (config, prefix) = (source.config(), format!("model.layers.{index}"));
    let shapes: BTreeMap<String, [usize; 2]> = config.linear_shapes(index).into_iter().collect();
    for site in Site::ALL {
        let n = config.site_width(site);
        let input = found.note(read_transform(source, quant, &prefix, site, n)).flatten();
        let kept = input.as_ref().map_or(0, InputTransform::kept);
        let basis = found.note(read_basis(source, quant, &prefix, site, n - kept)).flatten();
        found.note(read_act_clip(source, &prefix, site));
        for name in site.layers().iter().map(|layer| format!("{prefix}.{layer}")) {
            let scheme = quant.map(|q| (&q.scheme, q.branch_basis));
            if let Some(shape) = shapes.get(&name) {
                found.note(read_linear(source, scheme, &name, *shape, basis.as_ref(), input.as_ref()));
            }
        }
    }
    found.note(read_key_transform(source, quant, &prefix, config.head_dim));
}
