//! What tests of folds and rotations share: small models of every family, run block by block.

use std::path::Path;

use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use specquant_kernels::{KvCache, KvFormat, rms_norm};
use specquant_model::{Block, Head, Linear, ModelConfig, RopeTable, Site, Source, Span};

/// Models with GQA, biases on q, k and v, norms on q and k, sliding windows, tied and untied heads.
pub const TINY: [&str; 7] =
    ["llama-tied-bf16", "llama3-rope-scaled", "llama-sharded", "mistral", "qwen2", "qwen3", "gemma3"];

/// One of them.
pub fn tiny(name: &str) -> Source {
    let tiny = if name == "gemma3" { "../specquant-model/tests" } else { "../../../shared/golden/tiny" };
    Source::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join(tiny).join(name)).unwrap()
}

/// 40 tokens.
pub fn ids(config: &ModelConfig) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    (0..40).map(|_| rng.random_range(0..config.vocab_size as u32)).collect()
}

/// A block with weights that can be changed.
pub fn dense_block(source: &Source, index: usize) -> Block {
    let mut b = Block::read(source, index, None).unwrap();
    b.linears_mut().into_iter().try_for_each(Linear::widen).unwrap();
    b
}

/// Moves one sequence through a block. x: `[tokens, hidden]`.
pub fn forward(block: &Block, config: &ModelConfig, x: &mut [f32], observe: &mut dyn FnMut(Site, &[f32])) {
    let rows = x.len() / config.hidden_size;
    let mut cache = KvCache::new(KvFormat::F32, config.num_kv_heads, config.head_dim);
    let rope = RopeTable::new(&config.inv_freq(block.window.is_some()), 0..rows);
    block.forward(config, &rope, x, &mut [Span { rows, cache: &mut cache }], observe).unwrap();
}

/// Logits of final hidden states.
pub fn logits(head: &Head, config: &ModelConfig, x: &[f32]) -> Vec<f32> {
    let mut normed = vec![0.0; x.len()];
    rms_norm(x, &head.norm, config.rms_norm_eps, &mut normed);
    head.linear.forward(&normed, x.len() / config.hidden_size).unwrap().into_vec()
}

/// ‖got − want‖ / ‖want‖.
pub fn relative(got: &[f32], want: &[f32]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
}
