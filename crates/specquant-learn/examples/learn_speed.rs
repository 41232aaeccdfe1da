//! What learning costs: a step of SpinQuant on a LLaMA model, and a pass of OmniQuant over 8 sequences on its first block.
//!
//!     cargo run --release -p specquant-learn --example learn_speed -- MODEL TEXT [TOKENS] [STEPS]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a measurement that cannot go on stops"
)]

use std::path::Path;
use std::time::Instant;

use specquant_learn::{BlockWeights, OmniQuantConfig, SpinQuantConfig, Start, omniquant, spinquant};
use specquant_model::{ModelConfig, Source};

/// Sylvester's Hadamard matrix on runs of the largest power of two in `n`, orthonormal, with signs that vary.
fn blocks(n: usize, seed: usize) -> Vec<f32> {
    let b = 1 << n.trailing_zeros();
    let entry = |i: usize, j: usize| {
        let odd = (i & j).count_ones() as usize + (j * 2654435761 + seed) / 65536;
        let sign = if odd.is_multiple_of(2) { 1.0 } else { -1.0 };
        if i / b == j / b { sign / (b as f32).sqrt() } else { 0.0 }
    };
    (0..n * n).map(|k| entry(k / n, k % n)).collect()
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let row = |x: &[f32]| {
        let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        x.iter().zip(weight).map(|(x, w)| x * w / (mean + eps).sqrt()).collect::<Vec<f32>>()
    };
    x.chunks_exact(weight.len()).flat_map(row).collect()
}

fn column_max(x: &[f32], width: usize) -> Vec<f32> {
    let mut max = vec![0.0f32; width];
    x.chunks_exact(width).for_each(|row| max.iter_mut().zip(row).for_each(|(m, x)| *m = m.max(x.abs())));
    max
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, text, rest @ ..] = &args[..] else {
        panic!("usage: learn_speed MODEL TEXT [TOKENS] [STEPS]")
    };
    let number = |i: usize, default: usize| rest.get(i).map_or(default, |n| n.parse().unwrap());
    let (tokens, steps) = (number(0, 256), number(1, 3));
    let source = Source::open(Path::new(model)).unwrap();
    let c: &ModelConfig = source.config();
    let text = std::fs::read_to_string(text).unwrap();
    let cut: String = text.chars().take(8 * tokens * steps.max(8)).collect();
    let ids = source.tokenizer().unwrap().encode(&cut, false).unwrap();

    let start = Start {
        r1: blocks(c.hidden_size, 0),
        r2: (0..c.num_layers).map(|layer| blocks(c.head_dim, 65536 * layer)).collect(),
        r3: Some(blocks(c.head_dim, 0)),
        r4: Some(blocks(1 << c.intermediate_size.trailing_zeros(), 0)),
    };
    let config = SpinQuantConfig { steps, sequence_length: tokens, ..SpinQuantConfig::default() };
    let mut clock = Instant::now();
    let progress = &mut |step, loss| {
        println!("spinquant step {step}: loss {loss:.6}, {:.2} s", clock.elapsed().as_secs_f64());
        clock = Instant::now();
    };
    spinquant(&source, std::slice::from_ref(&ids), &config, start, progress).unwrap();

    // The first block's inputs are embeddings: both streams are the same there.
    let get = |name: &str| source.tensor(name).unwrap().to_f32().unwrap();
    let (embedding, norm) = (get("model.embed_tokens.weight"), get("model.layers.0.input_layernorm.weight"));
    let h = c.hidden_size;
    let inputs: Vec<Vec<f32>> = ids
        .chunks_exact(tokens)
        .take(8)
        .map(|ids| ids.iter().flat_map(|id| &embedding[*id as usize * h..][..h]).copied().collect())
        .collect();
    let post = get("model.layers.0.post_attention_layernorm.weight");
    let names = c.linear_shapes(0);
    let linears: Vec<Vec<f32>> = names.iter().map(|(name, _)| get(&format!("{name}.weight"))).collect();
    let weights = BlockWeights {
        input_norm: &norm,
        mlp_norm: &post,
        out_norms: None,
        q_norm: None,
        k_norm: None,
        linears: std::array::from_fn(|i| (linears[i].as_slice(), None)),
    };
    // A stand-in for the maxima of a calibration: only the first is exact.
    let qkv = column_max(&rms_norm(&inputs.concat(), &norm, c.rms_norm_eps), h);
    let (o, gate_up) = (
        vec![0.5; c.num_heads * c.head_dim],
        column_max(&rms_norm(&inputs.concat(), &post, c.rms_norm_eps), h),
    );
    let config =
        OmniQuantConfig { samples: 8, epochs: 1, sequence_length: tokens, ..OmniQuantConfig::default() };
    let mut clock = Instant::now();
    let progress = &mut |epoch, loss| {
        println!(
            "omniquant epoch {epoch} of {} sequences: loss {loss:.4e}, {:.2} s",
            inputs.len(),
            clock.elapsed().as_secs_f64()
        );
        clock = Instant::now();
    };
    omniquant(&weights, c, 0, &inputs, &inputs, [&qkv, &o, &gate_up], &config, progress).unwrap();
}
