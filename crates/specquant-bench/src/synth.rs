//! Models that are made up: the shapes of known architectures, random weights with outlier channels, as many layers as asked for. Memory, time and
//! size of a quantization depend on the shapes alone.
//!
//! Weights are spread evenly, with the deviation 1/√in. A few channels of every norm are twenty times as large as the others, and a few hidden units of every MLP
//! ten times, where trained models have their outliers. Tensors are written as they are made, a row at a time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};
use specquant_model::ModelConfig;

use crate::made::Noise;

/// The shapes of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arch {
    /// As it is asked for.
    pub name: &'static str,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    rope_theta: f64,
    context: usize,
    /// Decoder blocks of the real one.
    pub layers: usize,
}

/// The known ones.
#[rustfmt::skip]
pub const ARCHS: [Arch; 5] = [
    Arch { name: "llama2-7b", hidden: 4096, intermediate: 11008, heads: 32, kv_heads: 32, vocab: 32000, rope_theta: 1e4, context: 4096, layers: 32 },
    Arch { name: "llama2-13b", hidden: 5120, intermediate: 13824, heads: 40, kv_heads: 40, vocab: 32000, rope_theta: 1e4, context: 4096, layers: 40 },
    Arch { name: "llama2-70b", hidden: 8192, intermediate: 28672, heads: 64, kv_heads: 8, vocab: 32000, rope_theta: 1e4, context: 4096, layers: 80 },
    Arch { name: "llama3-8b", hidden: 4096, intermediate: 14336, heads: 32, kv_heads: 8, vocab: 128256, rope_theta: 5e5, context: 8192, layers: 32 },
    Arch { name: "tiny", hidden: 128, intermediate: 352, heads: 4, kv_heads: 2, vocab: 512, rope_theta: 1e4, context: 2048, layers: 2 },
];

/// Bytes of a safetensors file at most, as transformers has it; a larger tensor has a file of its own.
const SHARD_BYTES: u64 = 5_000_000_000;
/// One channel in so many is an outlier.
const OUTLIER_EVERY: usize = 256;

impl Arch {
    fn config(&self, layers: usize) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.hidden / self.heads,
            "vocab_size": self.vocab, "max_position_embeddings": self.context, "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta, "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false,
            "bos_token_id": null, "eos_token_id": null,
        })
    }
}

/// Writes a model of `layers` blocks to the new directory `dir`, whose parent exists; returns the bytes of its tensors.
///
/// # Errors
/// When the disk refuses; then nothing is left.
pub fn synthesize(arch: &Arch, layers: usize, seed: u64, dir: &Path) -> io::Result<u64> {
    let config_json = arch.config(layers);
    let config = ModelConfig::from_hf_json(&config_json, dir).map_err(io::Error::other)?;
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = dir.with_file_name(name);
    fs::create_dir(&partial)?;
    let write = || -> io::Result<u64> {
        let shards = shards(config.expected_tensors());
        let (mut map, mut total) = (Map::new(), 0);
        for (i, shard) in shards.iter().enumerate() {
            let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
            total += write_shard(&partial.join(&file), shard, seed)?;
            map.extend(shard.iter().map(|(name, _)| (name.clone(), json!(file))));
        }
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        let texts = [
            ("model.safetensors.index.json", index),
            ("config.json", config_json.clone()),
            ("tokenizer.json", tokenizer()),
        ];
        texts.iter().try_for_each(|(name, json)| fs::write(partial.join(name), format!("{json:#}\n")))?;
        fs::rename(&partial, dir)?;
        Ok(total)
    };
    write().inspect_err(|_| drop(fs::remove_dir_all(&partial)))
}

type Shape = (String, Vec<usize>);

fn bytes(shape: &[usize]) -> u64 {
    2 * shape.iter().product::<usize>() as u64
}

/// Tensors in files of at most [`SHARD_BYTES`].
fn shards(tensors: Vec<Shape>) -> Vec<Vec<Shape>> {
    let (mut shards, mut size) = (vec![Vec::new()], 0);
    for (name, shape) in tensors {
        if size > 0 && size + bytes(&shape) > SHARD_BYTES {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes(&shape);
        shards.last_mut().into_iter().for_each(|shard| shard.push((name.clone(), shape.clone())));
    }
    shards
}

fn write_shard(path: &Path, tensors: &[Shape], seed: u64) -> io::Result<u64> {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += bytes(shape);
        let entry = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string();
    // The data begins at a multiple of 8.
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for (name, shape) in tensors {
        // Its values depend on its name alone, not on how many layers there are.
        let hash = name.bytes().fold(seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        write_tensor(&mut file, name, shape, &mut Noise(hash))?;
    }
    file.into_inner()?.sync_all()?;
    Ok(end)
}

fn write_tensor(to: &mut impl Write, name: &str, shape: &[usize], noise: &mut Noise) -> io::Result<()> {
    let width = shape.last().copied().unwrap_or(1);
    let norm = shape.len() == 1;
    // Of an even distribution over [−a, a] the deviation is a / √3.
    let scale = (3.0 / width as f32).sqrt();
    for row in 0..shape.iter().product::<usize>() / width.max(1) {
        let mut values = noise.values(width);
        if norm {
            let outlier = |i: usize| if i % OUTLIER_EVERY == 7 { 20.0 } else { 1.0 };
            values.iter_mut().enumerate().for_each(|(i, v)| *v = (1.0 + 0.1 * *v) * outlier(i));
        } else {
            let unit = if name.contains(".up_proj.") && row % OUTLIER_EVERY == 11 { 10.0 } else { 1.0 };
            values.iter_mut().for_each(|v| *v *= scale * unit);
        }
        let bytes: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        to.write_all(&bytes)?;
    }
    Ok(())
}

/// A token for every byte: what any text can be read with.
fn tokenizer() -> Value {
    // GPT-2's bijection of bytes and printable characters.
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=255u8).filter(|&b| !printable(b)).zip(256u32..);
    let others: BTreeMap<u8, char> = others.filter_map(|(b, c)| Some((b, char::from_u32(c)?))).collect();
    let char_of = |b: u8| others.get(&b).copied().unwrap_or(char::from(b)).to_string();
    let vocab: Map<String, Value> = (0..=255u8).map(|b| (char_of(b), json!(b))).collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use specquant_model::Source;

    #[test]
    fn made_up_models_are_models() {
        let dir = tempfile::tempdir().unwrap();
        let tiny = &ARCHS[4];
        let bytes = synthesize(tiny, 3, 0, &dir.path().join("three")).unwrap();
        synthesize(tiny, 1, 0, &dir.path().join("one")).unwrap();
        let (three, one) = (
            Source::open(&dir.path().join("three")).unwrap(),
            Source::open(&dir.path().join("one")).unwrap(),
        );
        assert_eq!((three.config().num_layers, three.tensor_bytes()), (3, bytes));
        three.check_finite().unwrap();
        // Text of any kind is tokens, and back.
        let tokenizer = three.tokenizer().unwrap();
        let text = "The tide — 潮 — rises.\n";
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, false).unwrap(), true).unwrap(), text);
        // Layers are the same, however many there are, and have outliers.
        for name in one.names() {
            assert_eq!(one.tensor(name).unwrap().bytes(), three.tensor(name).unwrap().bytes(), "{name}");
        }
        let norm = three.tensor("model.layers.2.input_layernorm.weight").unwrap().to_f32().unwrap();
        assert!(norm[7] > 17.0 && norm[8] < 1.2);
        assert!(synthesize(tiny, 1, 0, &dir.path().join("no/parent")).is_err());
    }

    #[test]
    fn shards_roll() {
        let tensors: Vec<Shape> = (0..5).map(|i| (i.to_string(), vec![1_000_000, 1_000])).collect();
        let sizes: Vec<usize> = shards(tensors).iter().map(Vec::len).collect();
        assert_eq!(sizes, [2, 2, 1]);
        assert_eq!(shards(vec![("a".into(), vec![3_000_000, 1_000])]).len(), 1);
    }
}
