//! Opening a model: a Hugging Face directory, a GGUF file or a SpecQuant checkpoint (which is a Hugging Face directory).
//! Whatever the format, tensors have Hugging Face's names and row order, and everything that the configuration says about them is
//! checked when the model is opened, before a weight is read.

mod gguf;
mod gguf_model;
mod gguf_quants;
#[cfg(test)]
mod gguf_tests;
mod safetensors_dir;
#[cfg(test)]
mod tests;
mod view;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rayon::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::config::token_ids;
use crate::{Error, ModelConfig, Problems, Result, Tokenizer, Truncation};
pub(crate) use gguf::Gguf;
pub(crate) use gguf_model::token_id;
use safetensors_dir::Tensors;
pub use view::{Dtype, TensorView};

/// An opened model: configuration, named tensors on memory maps, and the files that travel with it.
#[derive(Debug, Clone)]
pub struct Source {
    path: PathBuf,
    config: ModelConfig,
    config_json: Value,
    tensors: Tensors,
    is_gguf: bool,
    truncation: Truncation,
    /// Once somebody has asked for it: all tensors are read for it.
    fingerprint: OnceLock<String>,
}

impl Source {
    /// Opens a directory with config.json and safetensors, or a GGUF file.
    ///
    /// # Errors
    /// Whatever can be known to be wrong without reading a weight: missing shards, truncated files, an unsupported model type, and
    /// in one list every tensor that is missing, unexpected, of another shape or of an unsupported type.
    pub fn open(path: &Path) -> Result<Source> {
        let meta = std::fs::metadata(path).map_err(|e| Error::NotAModel {
            path: path.to_owned(),
            problem: format!(
                "cannot read it ({e}); give a Hugging Face directory, a GGUF file or a SpecQuant checkpoint"
            ),
        })?;
        let source = if meta.is_dir() { Self::open_dir(path)? } else { Self::open_gguf(path)? };
        source.validate()?;
        Ok(source)
    }

    fn open_dir(dir: &Path) -> Result<Source> {
        let config_path = dir.join("config.json");
        if !config_path.exists() {
            let gguf = std::fs::read_dir(dir)
                .map_err(Error::io(dir))?
                .flatten()
                .map(|e| e.path())
                .find(|p| p.extension().is_some_and(|e| e == "gguf"));
            let problem = match gguf {
                Some(file) => {
                    format!("has no config.json; to open the GGUF file in it, give {}", file.display())
                }
                None => "has no config.json; give a Hugging Face model directory or a GGUF file".into(),
            };
            return Err(Error::NotAModel { path: dir.to_owned(), problem });
        }
        let config_json = safetensors_dir::read_json(&config_path)?;
        let mut config = ModelConfig::from_hf_json(&config_json, &config_path)?;
        let generation = dir.join("generation_config.json");
        if generation.exists() {
            let json = safetensors_dir::read_json(&generation)?;
            let ids = json.get("eos_token_id").and_then(token_ids).unwrap_or_default();
            for id in ids {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
            }
        }
        let mut tensors = safetensors_dir::tensors(dir)?;
        let offset = config.family.norm_offset();
        for (_, view) in tensors.iter_mut().filter(|(name, _)| name.ends_with("norm.weight")) {
            *view = view.clone().plus(offset);
        }
        let mut source = Source {
            path: dir.to_owned(),
            config,
            config_json,
            tensors,
            is_gguf: false,
            truncation: Truncation::None,
            fingerprint: OnceLock::new(),
        };
        source.settle_tying();
        Ok(source)
    }

    fn open_gguf(path: &Path) -> Result<Source> {
        if path.extension().is_some_and(|e| e == "safetensors") {
            let problem = "is a weight file; give the directory that holds it and config.json".into();
            return Err(Error::NotAModel { path: path.to_owned(), problem });
        }
        let map = view::map(path)?;
        let gguf = Gguf::parse(path, &map)?;
        let config = gguf_model::config(&gguf, &map)?;
        let tensors = gguf_model::tensors(&gguf, &path.into(), &map, &config);
        let config_json = config.to_hf_json();
        Ok(Source {
            path: path.to_owned(),
            config,
            config_json,
            tensors,
            is_gguf: true,
            truncation: Truncation::None,
            fingerprint: OnceLock::new(),
        })
    }

    /// Whether the output matrix is the embedding matrix is for the tensors to say, not for the flag alone. No lm_head at all: tied,
    /// whatever the flag. Flag set but lm_head present: tied if they are the same bytes; if they differ each keeps its own, as in
    /// transformers 5 (`PreTrainedModel.tie_weights`; transformers 4 dropped the lm_head silently).
    fn settle_tying(&mut self) {
        const HEAD: &str = "lm_head.weight";
        let embedding = self.tensors.get("model.embed_tokens.weight");
        let tied = match (self.tensors.get(HEAD), embedding) {
            (Some(head), Some(embedding)) => {
                self.config.tie_word_embeddings
                    && (head.dtype == embedding.dtype && head.shape == embedding.shape)
                    && head.bytes() == embedding.bytes()
            }
            // A quantized head has other names.
            (None, _) => !self.has("lm_head.weight_packed"),
            (Some(_), None) => false,
        };
        if tied {
            self.tensors.remove(HEAD);
        }
        self.config.tie_word_embeddings = tied;
        self.config_json["tie_word_embeddings"] = json!(tied);
    }

    /// Holds the tensors against the configuration. In a SpecQuant checkpoint, quantized matrices (`P.weight_packed`) are left to
    /// its reader.
    fn validate(&self) -> Result<()> {
        let mut problems = Problems::default();
        let quantized = self.is_quantized();
        let mut expected = std::collections::BTreeSet::new();
        for (name, shape) in self.config.expected_tensors() {
            match self.tensors.get(&name) {
                None if quantized && name.ends_with(".weight") && self.has(&format!("{name}_packed")) => {
                    // Every width of the model is one of these: nothing is made in a size that no tensor has.
                    let scales = self.tensors.get(&format!("{name}_scale"));
                    let got = scales.map(|t| &t.shape[..]).unwrap_or_default();
                    if got.first() != shape.first() {
                        problems.push(format!(
                            "{name}_scale has shape {got:?}, but the configuration asks for {} channels; quantize the model again",
                            shape[0]
                        ));
                    }
                }
                None => problems.push(format!("{name} {shape:?} is missing")),
                Some(t) if t.shape != shape => {
                    problems.push(format!(
                        "{name} has shape {:?}, but the configuration asks for {shape:?} ({})",
                        t.shape,
                        t.file().display()
                    ));
                }
                Some(t) if !t.dtype.widens() => problems.push(format!(
                    "{name} in {} is stored as {}; supported: {}",
                    t.file().display(),
                    t.dtype.name(),
                    Dtype::widening_names()
                )),
                Some(_) => {}
            }
            expected.insert(name);
        }
        // A weight that the forward pass would ignore means that it computes another model. Old checkpoints store the rotary
        // frequencies, which follow from the configuration.
        let surplus = self
            .names()
            .filter(|n| !quantized && !expected.contains(*n) && !n.ends_with(".rotary_emb.inv_freq"));
        surplus
            .for_each(|n| problems.push(format!("{n} is not a tensor of this model type and configuration")));
        if problems.is_empty() { Ok(()) } else { Err(Error::Tensors { path: self.path.clone(), problems }) }
    }

    /// A model of `n` blocks, each of them the first: what takes as long as some blocks of this one, where there is but one yet.
    pub fn repeating_first_block(&self, n: usize) -> Source {
        const FIRST: &str = "model.layers.0.";
        let mut made = self.clone();
        made.config.num_layers = n;
        made.config.sliding_window = vec![self.config.sliding_window.first().copied().flatten(); n];
        made.config_json["num_hidden_layers"] = json!(n);
        if let Some(types) = made.config_json.get_mut("layer_types").and_then(Value::as_array_mut) {
            *types = vec![types.first().cloned().unwrap_or_default(); n];
        }
        for (name, view) in &self.tensors {
            let Some(suffix) = name.strip_prefix(FIRST) else { continue };
            let others = (1..n).map(|i| (format!("model.layers.{i}.{suffix}"), view.clone()));
            made.tensors.extend(others);
        }
        made.fingerprint = OnceLock::new();
        made
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// config.json as read (with `tie_word_embeddings` as the tensors have it), or synthesized from GGUF metadata.
    pub fn config_json(&self) -> &Value {
        &self.config_json
    }

    /// Whether this is a SpecQuant checkpoint.
    pub fn is_quantized(&self) -> bool {
        self.config_json
            .get("quantization_config")
            .is_some_and(|q| q.get("quant_method").is_some_and(|m| m == "specquant"))
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors, sorted. No `lm_head.weight` where the embeddings are tied.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor by its Hugging Face name.
    ///
    /// # Errors
    /// [`Error::NoTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorView> {
        let missing = || Error::NoTensor { path: self.path.clone(), tensor: name.to_owned() };
        self.tensors.get(name).cloned().ok_or_else(missing)
    }

    /// Reads every floating-point tensor.
    ///
    /// # Errors
    /// [`Error::NotFinite`] names the first value that is NaN or infinite.
    pub fn check_finite(&self) -> Result<()> {
        let tensors: Vec<&TensorView> = self.tensors.values().collect();
        let found: Vec<Result<()>> = tensors.par_iter().map(|t| t.check_finite()).collect();
        found.into_iter().collect()
    }

    /// Models loaded from here leave out a part of every branch.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when there is no branch.
    pub fn truncate_branches(&mut self, truncation: Truncation) -> Result<()> {
        let quant = crate::QuantizationConfig::from_config(&self.config_json, &self.path)?;
        if truncation != Truncation::None && quant.and_then(|q| q.branch_basis).is_none() {
            let why = "has no 16-bit branch that could be truncated; leave out --k-run and --truncate";
            return Err(Error::Checkpoint(format!("{}: {why}", self.path.display())));
        }
        self.truncation = truncation;
        self.fingerprint = OnceLock::new();
        Ok(())
    }

    /// How much of every branch is used.
    pub fn truncation(&self) -> Truncation {
        self.truncation
    }

    /// SHA-256, in hexadecimal, of all that determines what the model computes: configuration, tensors (names, types, shapes, bytes),
    /// tokenizer and truncation. It does not depend on the path or on how the tensors are spread over files.
    ///
    /// # Errors
    /// As [`Source::side_files`].
    pub fn fingerprint(&self) -> Result<String> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(known.clone());
        }
        let tensors: Vec<(&String, &TensorView)> = self.tensors.iter().collect();
        let digest = |(name, t): &(&String, &TensorView)| {
            let digest = Sha256::new()
                .chain_update(format!("{name} {} {:?}\0", t.dtype.name(), t.shape))
                .chain_update(t.bytes())
                .finalize();
            t.release();
            digest
        };
        let digests: Vec<_> = tensors.par_iter().map(digest).collect();
        let mut whole = Sha256::new().chain_update(self.config_json.to_string());
        if self.truncation != Truncation::None {
            whole.update(format!("{:?}", self.truncation));
        }
        digests.iter().for_each(|d| whole.update(d));
        let files = self.side_files()?;
        files.iter().filter(|(name, _)| name == "tokenizer.json").for_each(|(_, bytes)| whole.update(bytes));
        Ok(self.fingerprint.get_or_init(|| crate::digest::hex(&whole.finalize())).clone())
    }

    /// Gives the memory that holds what has been read back to the system, so that reading one part after another takes no more than one part.
    pub fn release(&self) {
        self.tensors.values().for_each(TensorView::release);
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.bytes().len() as u64).sum()
    }

    /// Name and content of the files that belong to the model besides config.json and weights: tokenizer, chat template, generation
    /// settings. For a GGUF file they are synthesized from its metadata.
    ///
    /// # Errors
    /// An unreadable file; for GGUF, [`Error::Tokenizer`] when its tokenizer has no equivalent.
    pub fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        if !self.is_gguf {
            return safetensors_dir::side_files(&self.path);
        }
        let map = view::map(&self.path)?;
        crate::tokenizer::gguf_side_files(&Gguf::parse(&self.path, &map)?, &self.config)
    }

    /// The tokenizer with its chat template.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when it is missing, damaged or of an unsupported kind.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        if !self.is_gguf {
            return Tokenizer::open(&self.path);
        }
        Tokenizer::from_files(&self.path, &self.side_files()?)
    }
}
