use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use specquant_kernels::{KvCache, KvFormat};
use specquant_model::{RopeTable, Source, Span};

use super::*;
use crate::SpinQuantConfig;
use crate::net::Net;
use crate::net::tests::{identity, tiny};

/// A block's tensors, widened.
pub(crate) struct Owned {
    norms: [Vec<f32>; 2],
    out_norms: Option<[Vec<f32>; 2]>,
    head_norms: Option<[Vec<f32>; 2]>,
    linears: Vec<(Vec<f32>, Option<Vec<f32>>)>,
}

impl Owned {
    pub fn read(source: &Source, layer: usize) -> Self {
        let c = source.config();
        let get = |name: &str| source.tensor(name).unwrap().to_f32().unwrap();
        let own = |name: &str| get(&format!("model.layers.{layer}.{name}.weight"));
        let linears = c.linear_shapes(layer).into_iter().map(|(name, _)| {
            let bias = c.has_bias(&name).then(|| get(&format!("{name}.bias")));
            (get(&format!("{name}.weight")), bias)
        });
        Owned {
            norms: ["input_layernorm", c.norm_shapes()[1].0].map(own),
            out_norms: c
                .post_norms
                .then(|| ["post_attention_layernorm", "post_feedforward_layernorm"].map(own)),
            head_norms: c.qk_norm.then(|| ["self_attn.q_norm", "self_attn.k_norm"].map(own)),
            linears: linears.collect(),
        }
    }

    pub fn weights(&self) -> BlockWeights<'_> {
        let head_norm = |i: usize| self.head_norms.as_ref().map(|n| n[i].as_slice());
        BlockWeights {
            input_norm: &self.norms[0],
            mlp_norm: &self.norms[1],
            out_norms: self.out_norms.as_ref().map(|norms| norms.each_ref().map(Vec::as_slice)),
            q_norm: head_norm(0),
            k_norm: head_norm(1),
            linears: std::array::from_fn(|i| (self.linears[i].0.as_slice(), self.linears[i].1.as_deref())),
        }
    }
}

/// Three sequences with a few strong channels.
pub(crate) fn inputs(hidden: usize) -> Vec<Vec<f32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let strength = |i: usize| if i % 17 == 3 { 12.0 } else { 1.0 };
    [20, 13, 24]
        .map(|t| (0..t * hidden).map(|i| strength(i % hidden) * rng.random_range(-1.0..1.0)).collect())
        .to_vec()
}

fn run(source: &Source, config: &OmniQuantConfig) -> Learned {
    let c = source.config();
    let (block, inputs) = (Owned::read(source, 1), inputs(c.hidden_size));
    let max = |width: usize| (0..width).map(|i| if i % 17 == 3 { 5.0 } else { 0.5 }).collect::<Vec<f32>>();
    let (hidden, heads) = (max(c.hidden_size), max(c.num_heads * c.head_dim));
    let mut seen = 0;
    let progress = &mut |epoch, _| {
        assert_eq!(epoch, seen);
        seen += 1;
    };
    let maxima = [&hidden[..], &heads, &hidden];
    let learned = omniquant(&block.weights(), c, 1, &inputs, &inputs, maxima, config, progress).unwrap();
    assert_eq!((seen, learned.losses.len()), (config.epochs, config.epochs));
    learned
}

fn fast() -> OmniQuantConfig {
    OmniQuantConfig { epochs: 15, samples: 3, sequence_length: 20, ..OmniQuantConfig::default() }
}

#[test]
fn the_full_precision_block_is_that_of_the_whole_model() {
    for name in ["qwen2", "qwen3", "llama-tied-bf16"] {
        let source = tiny(name);
        let c = source.config();
        let config = SpinQuantConfig { act_bits: 16, kv_bits: 16, ..SpinQuantConfig::default() };
        let net = Net::load(&source, &config, 64, None, None).unwrap();
        let block = Block::new(&Owned::read(&source, 1).weights(), c, 1).unwrap();
        let x = tensor(inputs(c.hidden_size).swap_remove(0), (20, c.hidden_size)).unwrap();
        let found = to_vec(&Geometry::new(c, 1, 20).forward(&block, &x).unwrap()).unwrap();
        let want = to_vec(&net.block_of(1, &x, &identity(c.hidden_size), &identity(c.head_dim))).unwrap();
        let error = found.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < 1e-4, "{name}: {error}");
    }
}

/// Gemma's, whose residual stream SpinQuant refuses, is the engine's: with a window and without.
#[test]
fn a_block_with_norms_behind_its_layers_is_that_of_the_engine() {
    let source = tiny("gemma3");
    let (c, rows) = (source.config(), 24);
    let config = SpinQuantConfig::default();
    assert!(matches!(Net::load(&source, &config, 64, None, None), Err(Error::PostNorms)));
    for layer in 0..2 {
        let mut want = inputs(c.hidden_size).swap_remove(2);
        let x = tensor(want.clone(), (rows, c.hidden_size)).unwrap();
        let block = Block::new(&Owned::read(&source, layer).weights(), c, layer).unwrap();
        let found = to_vec(&Geometry::new(c, layer, rows).forward(&block, &x).unwrap()).unwrap();
        let block = specquant_model::Block::read(&source, layer, None).unwrap();
        let rope = RopeTable::new(&c.inv_freq(block.window.is_some()), 0..rows);
        let mut cache = KvCache::new(KvFormat::F32, c.num_kv_heads, c.head_dim);
        let spans = &mut [Span { rows, cache: &mut cache }];
        block.forward(c, &rope, &mut want, spans, &mut |_, _| ()).unwrap();
        let error = found.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < 1e-4, "{layer}: {error}");
    }
}

#[test]
fn with_sixteen_bits_scales_leave_the_block_alone() {
    for name in ["qwen2", "qwen3", "llama-tied-bf16", "gemma3"] {
        let config = OmniQuantConfig { weight_bits: 16, act_bits: 16, kv_bits: 16, epochs: 1, ..fast() };
        let learned = run(&tiny(name), &config);
        assert!(learned.losses[0] < 1e-8, "{name}: {:?}", learned.losses);
        // Far from 1, so that something was tested.
        let scales = learned.scales[0].as_ref().unwrap();
        assert!(scales.iter().any(|s| (s - 1.0).abs() > 0.5), "{scales:?}");
    }
}

#[test]
fn the_loss_goes_down() {
    for name in ["qwen2", "qwen3", "llama-tied-bf16", "gemma3"] {
        let source = tiny(name);
        let c = source.config();
        let learned = run(&source, &OmniQuantConfig { let_lr: 1e-2, ..fast() });
        let (first, last) = (learned.losses[0], learned.losses[14]);
        assert!(last < 0.95 * first, "{name}: {:?}", learned.losses);
        for (scales, width) in
            learned.scales.iter().zip([c.hidden_size, c.num_heads * c.head_dim, c.hidden_size])
        {
            let scales = scales.as_ref().unwrap();
            assert_eq!(scales.len(), width);
            assert!(scales.iter().all(|s| *s >= MIN_SCALE));
        }
        assert_eq!(learned.scales[3], None);
        // The heads of one group share the scales of their KV head.
        let (o, group) = (learned.scales[1].as_ref().unwrap(), c.num_heads / c.num_kv_heads);
        for (head, scales) in o.chunks_exact(c.head_dim).enumerate() {
            assert_eq!(scales, &o[head / group * group * c.head_dim..][..c.head_dim]);
        }
        let shapes = c.linear_shapes(1);
        for (clip, (name, shape)) in learned.clip.iter().zip(shapes) {
            assert_eq!(clip.len(), shape[0]);
            assert!(clip.iter().all(|c| (0.5..1.0).contains(c)) && clip[0] != clip[1], "{name}: {clip:?}");
        }
    }
}

#[test]
fn only_what_is_asked_for_is_learned_and_twice_the_same() {
    let source = tiny("llama-tied-bf16");
    let config = OmniQuantConfig { epochs: 2, learn_scales: false, act_bits: 16, ..fast() };
    let clip_only = run(&source, &config);
    assert!(clip_only.scales.iter().all(Option::is_none));
    assert_eq!(clip_only, run(&source, &config));
    let scales_only = run(&source, &OmniQuantConfig { learn_clip: false, epochs: 2, ..fast() });
    assert!(scales_only.clip.iter().flatten().all(|c| *c == 1.0));
    assert!(scales_only.scales[0].is_some());
}

#[test]
fn what_does_not_fit_is_refused() {
    let source = tiny("qwen3");
    let c = source.config();
    let block = Owned::read(&source, 0);
    let sequences = inputs(c.hidden_size);
    let (hidden, heads) = (vec![1.0; c.hidden_size], vec![1.0; c.num_heads * c.head_dim]);
    let maxima = [&hidden[..], &heads, &hidden];
    let message = |weights: &BlockWeights, fp: &[Vec<f32>], quantized: &[Vec<f32>], maxima, config| {
        omniquant(weights, c, 0, fp, quantized, maxima, &config, &mut |_, _| ()).unwrap_err().to_string()
    };
    let weights = block.weights();
    let check = |found: String, want: &str| assert!(found.starts_with(want), "{found}");
    let short = BlockWeights { input_norm: &[1.0], ..weights };
    check(message(&short, &sequences, &sequences, maxima, fast()), "input_norm has 1 values instead of 96");
    let mut linears = weights.linears;
    linears[5].0 = &[1.0];
    let short = BlockWeights { linears, ..weights };
    check(message(&short, &sequences, &sequences, maxima, fast()), "model.layers.0.mlp.up_proj has 1 values");
    let bare = BlockWeights { q_norm: None, ..weights };
    check(message(&bare, &sequences, &sequences, maxima, fast()), "q_norm has 0 values instead of 32");
    check(
        message(&weights, &sequences, &sequences[..1], maxima, fast()),
        "the list of quantized inputs has 1",
    );
    let uneven = [vec![0.0; 100]];
    check(message(&weights, &uneven, &uneven, maxima, fast()), "input 0 in full precision has 100 values");
    check(message(&weights, &[], &[], maxima, fast()), "no text of at least 1 tokens");
    let maxima_short = [&hidden[..], &heads[..3], &hidden];
    check(
        message(&weights, &sequences, &sequences, maxima_short, fast()),
        "act_max of model.layers.0.self_attn.o_proj",
    );
    let config = OmniQuantConfig { alpha: 2.0, ..fast() };
    check(message(&weights, &sequences, &sequences, maxima, config), "alpha is 2");
    let config = OmniQuantConfig { weight_bits: 9, ..fast() };
    check(message(&weights, &sequences, &sequences, maxima, config), "weight_bits is 9");
}
