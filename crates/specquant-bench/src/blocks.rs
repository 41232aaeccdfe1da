//! A decoder block on a prompt: the rows of the paper's Table 2 (one block, 4 sequences), on a CPU.

use serde::Serialize;
use serde_json::json;
use specquant_kernels::{KvCache, KvFormat};
use specquant_model::{
    Block, KvCenter, Linear, ModelConfig, Result, RopeTable, Rotation, RotationKind, Rotations, Site, Span,
};
use std::path::Path;

use crate::made::{Kind, Noise};
use crate::{Settings, best};

/// Sequences of a batch.
pub const BATCH: usize = 4;

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

/// One block on prompts of one length.
#[derive(Debug, Clone, Serialize)]
pub struct BlockRow {
    /// Its shape.
    pub shape: Shape,
    /// Tokens of each of the sequences.
    pub tokens: usize,
    /// In f32, seconds.
    pub dense: f64,
    /// W4A4KV4 with nothing added.
    pub plain: f64,
    /// The paper's recipe, 16 bins a channel.
    pub specquant: f64,
    /// The default recipe.
    pub spectral: f64,
    /// Bytes of weights and cache at 16 bits.
    pub f16_bytes: usize,
    /// Bytes of weights and cache of the default recipe, resident.
    pub spectral_bytes: usize,
    /// The same of the paper's recipe.
    pub specquant_bytes: usize,
}

pub(crate) fn measure(shape: &Shape, settings: &Settings) -> Result<Vec<BlockRow>> {
    let config = config(shape)?;
    let made = |kind| block(&config, kind);
    let (dense, plain) = (made(Kind::Dense)?, made(Kind::Plain)?);
    let (specquant, spectral) = (made(Kind::SpecQuant(16))?, made(Kind::Spectral(32))?);
    let lengths: &[usize] = if settings.full { &[256, 512, 1024, 2048, 4096, 8192] } else { &[256, 1024] };
    let inv_freq = config.inv_freq(false);
    let int = KvFormat::Int { bits: 4, clip: 0.95, intact: 0 };
    let mut rows = Vec::new();
    for &tokens in lengths {
        let x = Noise(11).values(BATCH * tokens * config.hidden_size);
        let rope = RopeTable::new(&inv_freq, (0..BATCH).flat_map(|_| 0..tokens));
        let mut failed = Ok(());
        let mut cached = [0; 4];
        let mut call = |which: usize, block: &Block, format| {
            let mut x = x.clone();
            let cache = || KvCache::new(format, config.num_kv_heads, config.head_dim).with_any_order(true);
            let mut caches: Vec<KvCache> = (0..BATCH).map(|_| cache()).collect();
            let mut spans: Vec<Span> = caches.iter_mut().map(|cache| Span { rows: tokens, cache }).collect();
            let done = block.forward(&config, &rope, &mut x, &mut spans, &mut |_, _| ());
            cached[which] = caches.iter().map(KvCache::bytes).sum();
            if failed.is_ok() {
                failed = done;
            }
        };
        let call = std::cell::RefCell::new(&mut call);
        let [dense_s, plain_s, specquant_s, spectral_s] = best(
            settings.seconds,
            [
                &mut || call.borrow_mut()(0, &dense, KvFormat::F32),
                &mut || call.borrow_mut()(1, &plain, int),
                &mut || call.borrow_mut()(2, &specquant, int),
                &mut || call.borrow_mut()(3, &spectral, KvFormat::Gaussian { intact: 4 }),
            ],
        );
        failed?;
        let weights: usize = dense.linears().iter().map(|(_, l)| l.in_features() * l.out_features()).sum();
        rows.push(BlockRow {
            shape: *shape,
            tokens,
            dense: dense_s,
            plain: plain_s,
            specquant: specquant_s,
            spectral: spectral_s,
            f16_bytes: 2 * weights + cached[0] / 2,
            spectral_bytes: bytes(&spectral) + cached[3],
            specquant_bytes: bytes(&specquant) + cached[2],
        });
    }
    Ok(rows)
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
