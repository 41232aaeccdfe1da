//! A decoder block, on prompts (the rows of the paper's Table 2: one block, 4 sequences) and on one token after them, on a CPU.

use serde::Serialize;
use serde_json::json;
use specquant_kernels::{KvCache, KvFormat, read_once};
use specquant_model::{
    Block, KvCenter, Linear, ModelConfig, Result, RopeTable, Rotation, RotationKind, Rotations, Site, Span,
};
use std::path::Path;

use crate::made::{Kind, Noise};
use crate::{Machine, Settings, best};

/// Prompts that are read together, as in Table 2.
const PROMPTS: usize = 4;
/// Sequences that are decoded side by side, and tokens that each has cached before.
const DECODED: [usize; 3] = [1, 8, 32];
const BEFORE: usize = 128;

/// A decoder block's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// The model it is of.
    pub name: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
}

impl Shape {
    /// The models of Table 2, and SmolLM2; two of them unless `full`.
    pub(crate) fn all(full: bool) -> Vec<Shape> {
        let shape = |name, hidden, intermediate, heads, kv_heads| Shape {
            name,
            hidden,
            intermediate,
            heads,
            kv_heads,
        };
        let small = [shape("SmolLM2-135M", 576, 1536, 9, 3), shape("LLaMA-2-7B", 4096, 11008, 32, 32)];
        let large = [
            shape("LLaMA-3-8B", 4096, 14336, 32, 8),
            shape("LLaMA-2-13B", 5120, 13824, 40, 40),
            shape("LLaMA-30B", 6656, 17920, 52, 52),
        ];
        small.into_iter().chain(large.into_iter().filter(|_| full)).collect()
    }
}

/// One block on sequences of one length.
#[derive(Debug, Clone, Serialize)]
pub struct BlockRow {
    /// Its shape.
    pub shape: Shape,
    /// Sequences.
    pub batch: usize,
    /// Tokens of each that are cached already: 0 where prompts are read.
    pub before: usize,
    /// Tokens of each that pass through the block: 1 where sequences are decoded.
    pub tokens: usize,
    /// In f32, seconds.
    pub dense: f64,
    /// W4A4KV4 with nothing added.
    pub plain: f64,
    /// The paper's recipe, 16 bins a channel.
    pub specquant: f64,
    /// The default recipe.
    pub spectral: f64,
    /// Reading as many bytes as its weights and what is cached before have, and nothing else; 0 for prompts, which arithmetic bounds.
    pub read: f64,
    /// Weights of its linear layers.
    pub weights: usize,
    /// Bytes of weights and cache at 16 bits.
    pub f16_bytes: usize,
    /// Bytes of weights and cache of the default recipe, resident.
    pub spectral_bytes: usize,
    /// The same of the paper's recipe.
    pub specquant_bytes: usize,
}

impl BlockRow {
    /// Tokens a second of the default recipe, of all sequences together.
    pub fn tokens_per_second(&self) -> f64 {
        (self.batch * self.tokens) as f64 / self.spectral
    }

    /// Those of [`tokens_per_second`](Self::tokens_per_second) of one sequence, times how much; all: the rows of a report.
    pub fn times_one(&self, all: &[BlockRow]) -> Option<f64> {
        let alike =
            |row: &&BlockRow| (row.shape, row.before, row.tokens) == (self.shape, self.before, self.tokens);
        let one = all.iter().filter(alike).find(|row| row.batch == 1)?;
        Some(self.tokens_per_second() / one.tokens_per_second())
    }

    /// How near the default recipe comes to what the machine allows: integer arithmetic of the linear layers, or reading all weights and the cache once,
    /// which was measured in turns with it, for the speed of memory changes with what others do.
    pub fn of_the_limit(&self, machine: &Machine) -> f64 {
        let arithmetic = 2e-9 * (self.weights * self.batch * self.tokens) as f64 / machine.int8_gops;
        arithmetic.max(self.read) / self.spectral
    }
}

/// The same block in four forms.
struct Forms {
    config: ModelConfig,
    /// f32, plain, the paper's, the default recipe's, and the format of each one's cache.
    blocks: [(Block, KvFormat); 4],
}

pub(crate) fn measure(shape: &Shape, settings: &Settings) -> Result<Vec<BlockRow>> {
    let config = config(shape)?;
    let int = KvFormat::Int { bits: 4, clip: 0.95, intact: 0 };
    let forms = Forms {
        blocks: [
            (block(&config, Kind::Dense)?, KvFormat::F32),
            (block(&config, Kind::Plain)?, int),
            (block(&config, Kind::SpecQuant(16))?, int),
            (block(&config, Kind::Spectral(32))?, KvFormat::Gaussian { intact: 4 }),
        ],
        config,
    };
    let lengths: &[usize] = if settings.full { &[256, 512, 1024, 2048, 4096, 8192] } else { &[256, 1024] };
    let prompts = lengths.iter().map(|&tokens| (PROMPTS, 0, tokens));
    let decoded = DECODED.map(|batch| (batch, BEFORE, 1));
    let cases = prompts.chain(decoded);
    cases.map(|(batch, before, tokens)| forms.row(shape, batch, before, tokens, settings)).collect()
}

impl Forms {
    fn row(
        &self,
        shape: &Shape,
        batch: usize,
        before: usize,
        tokens: usize,
        settings: &Settings,
    ) -> Result<BlockRow> {
        let config = &self.config;
        let inv_freq = config.inv_freq(false);
        let mut noise = Noise(11);
        let x = noise.values(batch * tokens * config.hidden_size);
        let (mut failed, mut cached) = (Ok(()), [0; 4]);
        let [dense_block, _, specquant_block, spectral_block] =
            self.blocks.each_ref().map(|(block, _)| block);
        let rope = RopeTable::new(&inv_freq, (0..batch).flat_map(|_| before..before + tokens));
        let pass = |which: usize, caches: &mut [KvCache]| {
            let mut x = x.clone();
            let mut spans: Vec<Span> = caches.iter_mut().map(|cache| Span { rows: tokens, cache }).collect();
            let done = self.blocks[which].0.forward(config, &rope, &mut x, &mut spans, &mut |_, _| ());
            cached[which] = caches.iter().map(KvCache::bytes).sum();
            caches.iter_mut().for_each(|cache| cache.truncate(before));
            if failed.is_ok() {
                failed = done;
            }
        };
        let width = config.num_kv_heads * config.head_dim;
        let [keys, values] = [(); 2].map(|()| noise.values(before * width));
        let mut caches = self.blocks.each_ref().map(|(_, format)| -> Vec<KvCache> {
            let cache = || {
                let mut cache =
                    KvCache::new(*format, config.num_kv_heads, config.head_dim).with_any_order(true);
                cache.append(&keys, &values);
                cache
            };
            (0..batch).map(|_| cache()).collect()
        });
        let pass = std::cell::RefCell::new(pass);
        let [a, b, c, d] = &mut caches;
        let bytes_read = bytes(spectral_block) + d.iter().map(KvCache::bytes).sum::<usize>();
        let [a, b, c, d]: [&mut dyn FnMut(); 4] = [
            &mut || pass.borrow_mut()(0, a),
            &mut || pass.borrow_mut()(1, b),
            &mut || pass.borrow_mut()(2, c),
            &mut || pass.borrow_mut()(3, d),
        ];
        let [dense, plain, specquant, spectral, read] = if before > 0 {
            let memory: Vec<u64> = (0..bytes_read as u64 / 8).collect();
            best(settings.seconds, [a, b, c, d, &mut || read_once(&memory)])
        } else {
            let [a, b, c, d] = best(settings.seconds, [a, b, c, d]);
            [a, b, c, d, 0.0]
        };
        failed?;
        let weights = dense_block.linears().iter().map(|(_, l)| l.in_features() * l.out_features()).sum();
        Ok(BlockRow {
            shape: *shape,
            batch,
            before,
            tokens,
            dense,
            plain,
            specquant,
            spectral,
            read,
            weights,
            f16_bytes: 2 * weights + cached[0] / 2,
            spectral_bytes: bytes(spectral_block) + cached[3],
            specquant_bytes: bytes(specquant_block) + cached[2],
        })
    }
}

fn config(shape: &Shape) -> Result<ModelConfig> {
    let json = json!({
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": true,
    });
    ModelConfig::from_hf_json(&json, Path::new(shape.name))
}

fn block(config: &ModelConfig, kind: Kind) -> Result<Block> {
    let mut noise = Noise(3);
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (wide, narrow) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let inputs = Site::ALL.map(|site| kind.transform(&mut noise, config.site_width(site)));
    let bases = Site::ALL.map(|site| kind.basis(config.site_width(site)));
    let mut linear = |out, inp, site: Site| kind.linear(&mut noise, out, inp, bases[site as usize].as_ref());
    let spectral = matches!(kind, Kind::Spectral(_));
    let qk = spectral.then(|| Rotation::new(RotationKind::Hadamard, config.head_dim));
    Ok(Block {
        q: linear(wide, hidden, Site::Qkv)?,
        k: linear(narrow, hidden, Site::Qkv)?,
        v: linear(narrow, hidden, Site::Qkv)?,
        o: linear(hidden, wide, Site::O)?,
        gate: linear(inner, hidden, Site::GateUp)?,
        up: linear(inner, hidden, Site::GateUp)?,
        down: linear(hidden, inner, Site::Down)?,
        input_norm: vec![1.0; hidden],
        mlp_norm: vec![1.0; hidden],
        out_norms: None,
        q_norm: None,
        k_norm: None,
        window: None,
        rotations: Rotations { qk, ..Rotations::default() },
        inputs,
        kv_center: spectral.then(|| KvCenter { keys: vec![0.0; narrow], values: vec![0.0; narrow] }),
    })
}

/// Resident bytes of a quantized block's weights and transforms.
fn bytes(block: &Block) -> usize {
    let linear = |l: &Linear| match l {
        Linear::Dense(l) => 4 * l.out * l.inp,
        Linear::Quantized(l) => {
            let kept = l.kept.as_ref().map_or(0, |k| k.weights.bytes());
            l.weights.bytes() + kept + l.branch.as_ref().map_or(0, |b| b.coeffs.bytes())
        }
    };
    let linears: usize = block.linears().iter().map(|(_, l)| linear(l)).sum();
    let transforms = block.inputs.iter().flatten().map(|t| t.reflections().bytes());
    linears + transforms.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rows_say() {
        let shape = Shape::all(false)[0];
        let row = |batch, tokens, spectral, read| BlockRow {
            shape,
            batch,
            before: 128,
            tokens,
            dense: 1.0,
            plain: 1.0,
            specquant: 1.0,
            spectral,
            read,
            weights: 1_000_000,
            f16_bytes: 2_000_000,
            spectral_bytes: 0,
            specquant_bytes: 0,
        };
        let machine = Machine {
            cpu: String::new(),
            isa: "",
            threads: 1,
            int8_gops: 100.0,
            f32_gflops: 10.0,
            read_gbs: 10.0,
        };
        // 2 million operations take 20 µs, 32 times as many 640 µs.
        let all = [row(1, 1, 1e-4, 5e-5), row(32, 1, 8e-4, 5e-5)];
        assert!((all[0].of_the_limit(&machine) - 0.5).abs() < 1e-9);
        assert!((all[1].of_the_limit(&machine) - 0.8).abs() < 1e-9);
        assert!((all[1].times_one(&all).unwrap() - 4.0).abs() < 1e-9);
        assert_eq!(all[1].times_one(&all[1..]), None);
    }
}
