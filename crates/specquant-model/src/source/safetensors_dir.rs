//! Hugging Face directories: config.json and one safetensors file, or shards and their index.

use std::collections::BTreeMap;
use std::path::{Component, Path};
use std::sync::Arc;

use safetensors::{Dtype as StDtype, SafeTensorError, SafeTensors};
use serde_json::Value;

use super::view::{self, Dtype, TensorView};
use crate::{Error, Result};

pub(super) type Tensors = BTreeMap<String, TensorView>;

/// Reads a JSON file.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|cause| Error::Json { path: path.to_owned(), cause })
}

/// The tensors of a directory. The index decides where there is one: files that it does not name are not opened.
pub(super) fn tensors(dir: &Path) -> Result<Tensors> {
    let (index, single) = (dir.join("model.safetensors.index.json"), dir.join("model.safetensors"));
    if index.exists() {
        sharded(dir, &index)
    } else if single.exists() {
        file(&single)
    } else {
        let bin = ["pytorch_model.bin", "pytorch_model.bin.index.json"].iter().any(|f| dir.join(f).exists());
        let problem = if bin {
            "has PyTorch weights (pytorch_model.bin) but no safetensors; convert it with save_pretrained(.., safe_serialization=True)"
        } else {
            "has neither model.safetensors nor model.safetensors.index.json; download the weights"
        };
        Err(Error::NotAModel { path: dir.to_owned(), problem: problem.into() })
    }
}

fn sharded(dir: &Path, index: &Path) -> Result<Tensors> {
    let json = read_json(index)?;
    let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
        return Err(Error::corrupt(index, "has no weight_map; download it again"));
    };
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        // A plain file name: an index must not lead out of its directory.
        let mut parts = Path::new(shard.as_str().unwrap_or_default()).components();
        let (Some(shard), Some(Component::Normal(_)), None) = (shard.as_str(), parts.next(), parts.next())
        else {
            return Err(Error::corrupt(
                index,
                format!("places {tensor} in {shard}, which is not a file name"),
            ));
        };
        shards.entry(shard).or_default().push(tensor);
    }
    // All shards first: opening the present ones can take a while.
    for (shard, names) in &shards {
        if !dir.join(shard).is_file() {
            return Err(Error::MissingShard {
                index: index.to_owned(),
                shard: (*shard).to_owned(),
                tensors: names.len(),
                first: names.first().copied().unwrap_or_default().to_owned(),
            });
        }
    }
    let mut all = Tensors::new();
    for (shard, names) in shards {
        let path = dir.join(shard);
        let mut found = file(&path)?;
        for name in names {
            let Some(view) = found.remove(name) else {
                return Err(Error::NotInShard {
                    index: index.to_owned(),
                    file: path,
                    tensor: name.to_owned(),
                });
            };
            all.insert(name.to_owned(), view);
        }
    }
    Ok(all)
}

/// The tensors of one file.
fn file(path: &Path) -> Result<Tensors> {
    let map = view::map(path)?;
    let bytes: &[u8] = &map;
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| corrupt(path, bytes, &e))?;
    let start = 8 + header; // the length field and the header
    let file: Arc<Path> = path.into();
    let views = metadata.tensors().into_iter().map(|(name, info)| {
        let (from, to) = info.data_offsets;
        let view = TensorView::new(
            &name,
            &file,
            &map,
            dtype(info.dtype),
            info.shape.clone(),
            start + from..start + to,
        );
        (name, view)
    });
    Ok(views.collect())
}

fn corrupt(path: &Path, bytes: &[u8], error: &SafeTensorError) -> Error {
    let what = match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            format!("has {} bytes, which is not the size that its header describes", bytes.len())
        }
        SafeTensorError::InvalidHeaderLength | SafeTensorError::HeaderTooSmall => {
            format!("ends within its header ({} bytes)", bytes.len())
        }
        SafeTensorError::HeaderTooLarge => {
            "is not a safetensors file (its first 8 bytes give an absurd header length)".into()
        }
        SafeTensorError::InvalidOffset(tensor) => {
            format!("gives tensor {tensor} offsets that overlap or leave a gap")
        }
        SafeTensorError::TensorInvalidInfo => {
            "describes a tensor whose size does not follow from its shape".into()
        }
        other => format!("has a damaged header ({other})"),
    };
    Error::corrupt(path, format!("{what}; the file is truncated or damaged, download it again"))
}

fn dtype(d: StDtype) -> Dtype {
    match d {
        StDtype::F32 => Dtype::F32,
        StDtype::F16 => Dtype::F16,
        StDtype::BF16 => Dtype::BF16,
        StDtype::U8 => Dtype::U8,
        StDtype::I8 => Dtype::I8,
        StDtype::U16 => Dtype::U16,
        StDtype::I32 => Dtype::I32,
        StDtype::BOOL => Dtype::Other("BOOL"),
        StDtype::I16 => Dtype::Other("I16"),
        StDtype::U32 => Dtype::Other("U32"),
        StDtype::I64 => Dtype::Other("I64"),
        StDtype::U64 => Dtype::Other("U64"),
        StDtype::F64 => Dtype::Other("F64"),
        StDtype::F8_E4M3 => Dtype::Other("F8_E4M3"),
        StDtype::F8_E5M2 => Dtype::Other("F8_E5M2"),
        StDtype::F8_E8M0 => Dtype::Other("F8_E8M0"),
        StDtype::F4 => Dtype::Other("F4"),
        _ => Dtype::Other("a type that this version does not know"),
    }
}

/// Every non-weight file at the top level, sorted by name: tokenizer, templates, generation settings, licences. Not config.json,
/// which the writer of a checkpoint makes anew, nor an index, which would be stale.
pub(super) fn side_files(dir: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        let kind = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let wanted = ["json", "jinja", "txt", "model"].contains(&kind)
            && name != "config.json"
            && !name.ends_with(".index.json")
            && !name.starts_with('.')
            && !name.to_ascii_lowercase().starts_with("readme");
        // is_file follows links: a Hugging Face cache consists of them.
        if wanted && path.is_file() {
            files.push((name.to_owned(), std::fs::read(&path).map_err(Error::io(&path))?));
        }
    }
    files.sort();
    Ok(files)
}
