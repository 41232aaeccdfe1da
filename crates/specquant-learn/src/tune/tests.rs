use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use specquant_kernels::{PackedWeights, Reflections};
use specquant_model::{InputTransform, KvCenter, RopeTable, RotationKind, Site, Span};

use super::*;
use crate::net::tests::{random, tiny};

/// Coordinates that are kept of every input.
const KEEP: usize = 3;

/// Codes and scales, a scale per row.
fn round(w: &[f32], inp: usize, bits: u8) -> (Vec<i8>, Vec<f32>) {
    let most = ((1 << (bits - 1)) - 1) as f32;
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for row in w.chunks_exact(inp) {
        let scale = row.iter().fold(1e-9f32, |m, w| m.max(w.abs())) / most;
        codes.extend(row.iter().map(|w| (w / scale).round() as i8));
        scales.push(scale);
    }
    (codes, scales)
}

/// The first block of a small model, behind transforms, with 4-bit weights. act_bits: 16 leaves inputs alone.
fn block(source: &Source, act_bits: u8) -> Block {
    let config = source.config();
    let mut block = Block::read(source, 0, None).unwrap();
    for (i, site) in Site::ALL.into_iter().enumerate() {
        let n = config.site_width(site);
        let vectors = random(KEEP * n, i as u64).iter().map(|v| (v * 127.0).round()).collect();
        let norms = vec![1.0, 0.5, 2.0];
        let transform = InputTransform::new(Reflections::new(n, vectors), norms, RotationKind::Dct);
        for layer in block.site_mut(site) {
            layer.widen().unwrap();
            let (w, bias) = layer.dense().unwrap();
            let (out, bias) = (layer.out_features(), bias.map(<[f32]>::to_vec));
            let split = transform.apply_to_weight(w, out);
            let pack = |w: &[f32], inp: usize, bits: u8| {
                let (codes, scales) = round(w, inp, bits);
                PackedWeights::pack(&codes, &scales, out, inp, bits, inp).unwrap()
            };
            *layer = Linear::Quantized(specquant_model::QuantLinear {
                weights: pack(&split.rest, n - KEEP, 4),
                kept: Some(specquant_model::Kept {
                    weights: pack(&split.kept, KEEP, 8),
                    act_bits: act_bits.max(8),
                }),
                act_bits,
                act_levels: specquant_model::Levels::Uniform,
                act_clip: 0.9,
                branch: None,
                bias,
            });
        }
        block.inputs[i] = Some(transform);
    }
    let width = config.num_kv_heads * config.head_dim;
    block.kv_center = Some(KvCenter { keys: random(width, 8), values: random(width, 9) });
    block
}

fn layer(source: &Source, act_bits: u8, kv: KvFormat) -> Layer {
    Layer::new(block(source, act_bits), source.config(), 64, kv, &TuneConfig::default()).unwrap()
}

const MODELS: [&str; 5] = ["llama-tied-bf16", "mistral", "qwen2", "qwen3", "gemma3"];

/// Of both signs, and of different sizes.
fn states(source: &Source, seed: u64) -> Vec<f32> {
    random(40 * source.config().hidden_size, seed)
}

#[test]
fn the_forward_pass_is_the_engines() {
    for name in MODELS {
        let source = tiny(name);
        let config = source.config();
        for (act_bits, kv) in [(16, KvFormat::F32), (8, KvFormat::Int { bits: 8, clip: 1.0, intact: 0 })] {
            let x = states(&source, 1);
            let (got, _) = layer(&source, act_bits, kv).forward(&x);
            let mut want = x;
            let mut cache = specquant_kernels::KvCache::new(kv, config.num_kv_heads, config.head_dim);
            let rope = RopeTable::new(&config.inv_freq(config.sliding_window[0].is_some()), 0..40);
            let spans = &mut [Span { rows: 40, cache: &mut cache }];
            block(&source, act_bits).forward(config, &rope, &mut want, spans, &mut |_, _| ()).unwrap();
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| v * v).sum::<f32>().sqrt();
            let error =
                norm(&mut got.iter().zip(&want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied());
            // With quantized activations a value at the edge of two codes may fall to either side.
            let most = if act_bits == 16 { 1e-5 } else { 5e-3 };
            assert!(error < most, "{name}, {act_bits} bits: {error}");
        }
    }
}

/// Along random directions, against differences, with nothing quantized but the weights. Kept columns are rounded to 8 bits in between, which
/// only the mean over a long way does not see.
#[test]
fn the_gradient_is_what_differences_give() {
    for name in MODELS {
        let source = tiny(name);
        let mut layer = layer(&source, 16, KvFormat::F32);
        let (x, weights) = (states(&source, 1), states(&source, 2));
        let (_, saved) = layer.forward(&x);
        let (by_x, by_params) = layer.backward(&saved, &weights);
        let value = |layer: &Layer, x: &[f32]| -> f64 {
            layer.forward(x).0.iter().zip(&weights).map(|(y, w)| f64::from(y * w)).sum()
        };
        let along = |g: &[f32], d: &[f32]| -> f64 { g.iter().zip(d).map(|(g, d)| f64::from(g * d)).sum() };
        let moved =
            |x: &[f32], d: &[f32], h: f32| -> Vec<f32> { x.iter().zip(d).map(|(x, d)| x + h * d).collect() };
        let agree = |what: &str, got: f64, want: f64, within: f64| {
            assert!((got - want).abs() < within * want.abs().max(0.1), "{name}, {what}: {got}, not {want}");
        };

        // In the direction of the gradient, where it is largest.
        let direction = |g: &[f32]| -> Vec<f32> {
            let length = along(g, g).sqrt() as f32;
            g.iter().map(|g| g / length).collect()
        };
        let d = direction(&by_x);
        let h = 1e-2;
        let want =
            (value(&layer, &moved(&x, &d, h)) - value(&layer, &moved(&x, &d, -h))) / (2.0 * f64::from(h));
        agree("input", along(&by_x, &d), want, 0.01);

        for (i, gradient) in by_params.iter().enumerate() {
            let start = layer.params[i].values.clone();
            if start.is_empty() {
                assert!(!source.config().post_norms && i < block::FACTORS);
                continue;
            }
            let d = direction(gradient);
            let size = (along(&start, &start)).sqrt() as f32;
            let (h, within) = if i < block::KEPT { (0.01 * size, 0.02) } else { (0.2 * size, 0.15) };
            let mut at = |h: f32| {
                layer.params[i].values = moved(&start, &d, h);
                value(&layer, &x)
            };
            let want = (at(h) - at(-h)) / (2.0 * f64::from(h));
            agree(&format!("parameter {i}"), along(gradient, &d), want, within);
            layer.params[i].values = start;
        }
    }
}

#[test]
fn the_divergence_and_its_gradient_are_those_of_the_definition() {
    let source = tiny("llama-tied-bf16");
    let hidden = source.config().hidden_size;
    let (want, got) = (random(5 * hidden, 1), random(5 * hidden, 2));
    let Head { mut linear, .. } = Head::read(&source).unwrap();
    linear.widen().unwrap();
    let probabilities = |x: &[f32]| -> Vec<f64> {
        let logits = linear.forward(x, 1).unwrap();
        let powers: Vec<f64> = logits.iter().map(|v| f64::from(*v).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.into_iter().map(|p| p / sum).collect()
    };
    let definition = |got: &[f32]| -> f64 {
        let rows = want.chunks_exact(hidden).zip(got.chunks_exact(hidden));
        let kl = rows.map(|(want, got)| {
            let (p, q) = (probabilities(want), probabilities(got));
            p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum::<f64>()
        });
        kl.sum::<f64>() / 5.0
    };
    let head = BothWays::pack(linear.dense().unwrap().0, linear.out_features(), hidden);
    let (loss, gradient) = divergence(&head, &linear, &want, &got).unwrap();
    assert!((loss - definition(&got)).abs() < 1e-4 * loss, "{loss} {}", definition(&got));
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..8 {
        let i = rng.random_range(0..got.len());
        let at = |h: f32| {
            let mut moved = got.clone();
            moved[i] += h;
            definition(&moved)
        };
        let difference = (at(1e-2) - at(-1e-2)) / 2e-2;
        assert!(
            (difference - f64::from(gradient[i])).abs() < 1e-3 * loss,
            "{i}: {difference} {}",
            gradient[i]
        );
    }
}

/// Whatever their gradients' sizes: together with the others where weights are alike, by its own size where they are not.
#[test]
fn norms_learn_relative_to_what_they_are() {
    let weights = vec![0.01, 1.0, -700.0, 0.0];
    let moves = |name: &str| -> Vec<f32> {
        let mut param = Param::norm(weights.clone(), tiny(name).config(), 1e-3);
        param.step(1.0, &[3.0, -1e-3, 2.0, 1.0]);
        param.values.iter().zip(&weights).map(|(v, w)| v - w).collect()
    };
    let near = |got: Vec<f32>, want: [f32; 4]| {
        let error = |(got, want): (&f32, f32)| (got - want).abs() <= 0.01 * want.abs() + 1e-4 * f32::EPSILON;
        assert!(got.iter().zip(want).all(error), "{got:?}, not {want:?}");
    };
    near(moves("qwen3"), [-0.35, 0.35, -0.35, -0.35]);
    near(moves("gemma3"), [-1e-5, 1e-3, -0.7, 0.0]);
}

#[test]
fn the_rate_rises_then_falls() {
    let rates: Vec<f64> = (0..100).map(|step| rate(step, 100)).collect();
    assert!(rates[0] < rates[1] && rates[4] > 0.98 && rates[99] < 0.001);
    assert!(rates[5..].windows(2).all(|w| w[0] > w[1]));
    assert!(rate(0, 1) > 0.9);
}
