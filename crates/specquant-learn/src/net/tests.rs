use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use specquant_model::Model;

use super::*;
use crate::stiefel::orthonormal;

pub(crate) fn tiny(name: &str) -> Source {
    let dir = if name == "gemma3" { "../specquant-model/tests" } else { "../../../shared/golden/tiny" };
    Source::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join(dir).join(name)).unwrap()
}

pub(crate) fn tokens(count: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(3..320)).collect()
}

pub(crate) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

pub(crate) fn rotation(n: usize, seed: u64) -> Tensor {
    orthonormal(&tensor(random(n * n, seed), (n, n)).unwrap()).unwrap()
}

pub(crate) fn identity(n: usize) -> Tensor {
    Tensor::eye(n, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap()
}

/// R1 and every R2.
fn rotations(source: &Source, of: impl Fn(usize, u64) -> Tensor) -> Vec<Tensor> {
    let c = source.config();
    let r2 = (0..c.num_layers).map(|layer| of(c.head_dim, layer as u64 + 1));
    std::iter::once(of(c.hidden_size, 0)).chain(r2).collect()
}

const FLOAT: fn() -> SpinQuantConfig =
    || SpinQuantConfig { act_bits: 16, kv_bits: 16, sequence_length: 64, ..SpinQuantConfig::default() };

fn logits(net: &Net, tokens: &[u32], rotations: &[Tensor]) -> Vec<f32> {
    let mut x = net.embed(tokens).unwrap().matmul(&rotations[0]).unwrap();
    for (layer, r2) in net.layers.iter().zip(&rotations[1..]) {
        x = net.block(layer, &x, &rotations[0], r2).unwrap();
    }
    to_vec(&net.last(&x, &rotations[0]).unwrap().matmul(&net.head.t().unwrap()).unwrap()).unwrap()
}

/// ‖a − b‖ / ‖b‖.
fn relative(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let square = |v: f32| v * v;
    let error: f32 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (error / b.iter().map(|b| square(*b)).sum::<f32>()).sqrt()
}

#[test]
fn the_float_forward_equals_the_model_under_any_rotations() {
    for name in ["llama-tied-bf16", "llama3-rope-scaled", "llama-sharded", "mistral", "qwen2", "qwen3"] {
        let source = tiny(name);
        let c = source.config();
        // Longer than mistral's window of 16.
        let tokens = tokens(40, 1);
        let model = Model::load(&source).unwrap();
        let hidden = model.hidden(&mut [(&mut model.sequence(), &tokens)]).unwrap();
        let want = model.logits(&hidden).unwrap();

        let config = FLOAT();
        let net = Net::load(&source, &config, 64, None, None).unwrap();
        let error = relative(&logits(&net, &tokens, &rotations(&source, |n, _| identity(n))), &want);
        assert!(error < 1e-4, "{name}: {error}");

        let turned = rotations(&source, rotation);
        let r3 = to_vec(&rotation(c.head_dim, 50)).unwrap();
        for b in [c.intermediate_size, 16] {
            let r4 = to_vec(&rotation(b, 51)).unwrap();
            let net = Net::load(&source, &config, 64, Some(&r3), Some(&r4)).unwrap();
            let error = relative(&logits(&net, &tokens, &turned), &want);
            assert!(error < 1e-3, "{name}, R4 of {b}: {error}");
            // Rotated 8-bit weights take another path to nearly the same.
            let config = SpinQuantConfig { weight_bits: 8, ..FLOAT() };
            let net = Net::load(&source, &config, 64, Some(&r3), Some(&r4)).unwrap();
            let error = relative(&logits(&net, &tokens, &turned), &want);
            assert!(error < 0.05, "{name}, 8-bit weights: {error}");
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    for (name, weight_bits) in [("qwen2", 16), ("qwen3", 16), ("llama-sharded", 16)] {
        let source = tiny(name);
        let config = SpinQuantConfig { weight_bits, ..FLOAT() };
        let net = Net::load(&source, &config, 64, None, None).unwrap();
        let (at, tokens) = (rotations(&source, rotation), tokens(24, 2));
        let (_, gradients) = net.gradients(&tokens, &at).unwrap();
        for i in 0..at.len() {
            let n = at[i].dim(0).unwrap();
            let direction = tensor(random(n * n, 60), (n, n)).unwrap();
            let slope = (&gradients[i] * &direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            let loss = |step: f64| {
                let mut moved = at.clone();
                moved[i] = (&at[i] + (&direction * step).unwrap()).unwrap();
                net.gradients(&tokens, &moved).unwrap().0
            };
            let want = (loss(2e-3) - loss(-2e-3)) / 4e-3;
            let error = (f64::from(slope) - want).abs();
            assert!(error < 1e-3 + 0.02 * want.abs(), "{name}, rotation {i}: {slope} instead of {want}");
        }
    }
}

#[test]
fn in_full_precision_no_rotation_is_better_than_another() {
    let source = tiny("llama-tied-bf16");
    let config = FLOAT();
    let net = Net::load(&source, &config, 64, None, None).unwrap();
    let at = rotations(&source, rotation);
    let (_, gradients) = net.gradients(&tokens(24, 3), &at).unwrap();
    // Nothing hangs on them: a gradient that remembers how it was made keeps a whole pass in memory, and a sum of them every pass.
    assert!(gradients.iter().all(|g| !g.track_op()));
    for (r, g) in at.iter().zip(&gradients) {
        // The gradient along the manifold is the skew part of G Rᵀ.
        let m = g.matmul(&r.t().unwrap()).unwrap();
        let skew = (&m - m.t().unwrap()).unwrap();
        let size = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        assert!(size(&skew) < 1e-3 * size(&m).max(1e-2), "{} of {}", size(&skew), size(&m));
    }
}

#[test]
fn cross_entropy_is_that_of_the_logits() {
    // More rows than are computed at a time.
    let (rows, hidden, vocab) = (70, 8, 30);
    let x = Var::from_tensor(&tensor(random(rows * hidden, 4), (rows, hidden)).unwrap()).unwrap();
    let head = tensor(random(vocab * hidden, 5), (vocab, hidden)).unwrap();
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 7 % vocab as u32).collect();
    let (loss, gradient) = cross_entropy(&x, &head, &targets).unwrap();

    let logits = x.matmul(&head.t().unwrap()).unwrap();
    let ids = Tensor::from_vec(targets, (rows, 1), x.device()).unwrap();
    let at_target = logits.gather(&ids, 1).unwrap().squeeze(1).unwrap();
    let want = (logits.log_sum_exp(1).unwrap() - at_target).unwrap().mean_all().unwrap();
    let grads = want.backward().unwrap();
    assert!((loss - f64::from(want.to_scalar::<f32>().unwrap())).abs() < 1e-5);
    let error = relative(&to_vec(&gradient).unwrap(), &to_vec(grads.get(&x).unwrap()).unwrap());
    assert!(error < 1e-5, "{error}");
}
