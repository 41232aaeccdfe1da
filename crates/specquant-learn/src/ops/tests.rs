use candle_core::Var;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::clipped::ClippedWeight;

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n = shape.iter().product();
    tensor((0..n).map(|_| rng.random_range(-2.0..2.0)).collect(), shape).unwrap()
}

/// Over five tokens.
fn softmax(scale: f32, window: Option<usize>) -> CausalSoftmax {
    CausalSoftmax { tokens: 5, first_query: 0, first_key: 0, scale, window, exp: exp_one_by_one }
}

/// Σ f(x)·c by x, and by central differences in a random direction: (found, expected).
fn slopes(x: &Tensor, f: impl Fn(&Tensor) -> Tensor) -> (f32, f32) {
    let var = Var::from_tensor(x).unwrap();
    let y = f(&var);
    let c = random(y.dims(), 90);
    let loss = |y: Tensor| (y * &c).unwrap().sum_all().unwrap();
    let grads = loss(y).backward().unwrap();
    let direction = random(x.dims(), 91);
    let found = (grads.get(&var).unwrap() * &direction).unwrap().sum_all().unwrap();
    let at = |step: f64| loss(f(&(x + (&direction * step).unwrap()).unwrap())).to_scalar::<f32>().unwrap();
    (found.to_scalar().unwrap(), (at(1e-3) - at(-1e-3)) / 2e-3)
}

fn close(a: &Tensor, b: &Tensor, tolerance: f32) {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (to_vec(a).unwrap(), to_vec(b).unwrap());
    let scale = b.iter().fold(0.0f32, |m, b| m.max(b.abs()));
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        assert!((a - b).abs() <= tolerance * scale, "{i}: {a} instead of {b}");
    }
}

#[test]
fn smooth_operations_have_the_slopes_of_finite_differences() {
    let eps = 1e-5;
    let rope = Rope::new(&[1.0, 0.3, 0.1, 0.01], 5, 3);
    let w = random(&[7, 8], 4);
    let weights = |window| move |x: &Tensor| rows(x, softmax(0.4, window)).unwrap();
    type Case<'a> = (&'a str, &'a [usize], &'a dyn Fn(&Tensor) -> Tensor);
    let cases: [Case; 5] = [
        ("norm", &[4, 9], &|x| rows(x, RmsNorm { eps }).unwrap()),
        ("softmax", &[3, 5, 5], &weights(None)),
        ("softmax in a window", &[3, 5, 5], &weights(Some(2))),
        ("rope", &[5, 3, 8], &|x| rows(x, rope.clone()).unwrap()),
        ("frozen", &[4, 8], &|x| frozen(x, &w).unwrap()),
    ];
    for (name, shape, f) in cases {
        let (found, expected) = slopes(&random(shape, 1), f);
        assert!((found - expected).abs() < 1e-2 * (1.0 + expected.abs()), "{name}: {found}, not {expected}");
    }
}

#[test]
fn softmax_sees_the_past_only_and_sums_to_one() {
    let y = rows(&random(&[2, 5, 5], 2), softmax(1.0, Some(3))).unwrap();
    for (row, y) in to_vec(&y).unwrap().chunks(5).enumerate() {
        let query = row % 5;
        for (key, y) in y.iter().enumerate() {
            assert_eq!(*y > 0.0, key <= query && key + 3 > query, "query {query}, key {key}");
        }
        assert!((y.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }
}

#[test]
fn fake_quantizers_equal_their_codes_scaled_back() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for (bits, clip) in [(4, 1.0), (4, 0.9), (8, 1.0), (2, 0.5), (3, 0.95)] {
        for row in 0..50 {
            // Rows of one sign, of zeros, and around other means than zero, too.
            let shift = [0.0, 3.0, -3.0, 1.0][row % 4];
            let x: Vec<f32> =
                (0..33).map(|_| if row == 0 { 0.0 } else { rng.random_range(-2.0..2.0) + shift }).collect();
            let steps = 2f32.powi(bits.into()) - 1.0;
            let max = x.iter().copied().fold(0.0, f32::max) * clip;
            let min = x.iter().copied().fold(0.0, f32::min) * clip;
            let scale = if max == min { 1.0 } else { (max - min) / steps };
            let zero = (-min / scale).round_ties_even();
            let code = |x: f32| ((x / scale).round_ties_even() + zero).clamp(0.0, steps);
            let mut y = vec![0.0; x.len()];
            FakeQuant { bits, clip, through_range: false }.forward(0, &x, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let want = (code(*x) - zero) * scale;
                assert!((y - want).abs() <= 2e-6 * (max - min), "{bits} bits, {x}: {y}, not {want}");
            }

            let top = 2f32.powi(i32::from(bits) - 1) - 1.0;
            let scale = x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / top;
            FakeQuantWeight { bits }.forward(0, &x, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let want = if scale == 0.0 { 0.0 } else { (x / scale).round_ties_even() * scale };
                assert_eq!(*y, want, "{bits} bits, {x}");
            }
        }
    }
}

#[test]
fn rounding_is_half_to_even() {
    for i in -4000..4000 {
        let v = i as f32 / 16.0;
        assert_eq!(round(v), v.round_ties_even(), "{v}");
    }
}

#[test]
fn spinquant_passes_gradients_straight_through() {
    let x = Var::from_tensor(&random(&[3, 8], 5)).unwrap();
    let c = random(&[3, 8], 6);
    for y in [
        rows(&x, FakeQuant { bits: 4, clip: 0.7, through_range: false }).unwrap(),
        rows(&x, FakeQuantWeight { bits: 4 }).unwrap(),
    ] {
        let grads = (y * &c).unwrap().sum_all().unwrap().backward().unwrap();
        close(grads.get(&x).unwrap(), &c, 0.0);
    }
}

/// OmniQuant's `round_ste`, on candle's graph.
fn round_ste(x: &Tensor) -> Tensor {
    let rounded: Vec<f32> = to_vec(x).unwrap().into_iter().map(f32::round_ties_even).collect();
    let correction = (tensor(rounded, x.dims()).unwrap() - x.detach()).unwrap();
    (x + correction).unwrap()
}

/// torch's `clamp`: the gradient passes on both bounds, too (candle halves it there).
fn clamp(x: &Tensor, lo: f32, hi: f32) -> Tensor {
    let inside: Vec<f32> =
        to_vec(x).unwrap().iter().map(|v| f32::from(u8::from((lo..=hi).contains(v)))).collect();
    let inside = tensor(inside, x.dims()).unwrap();
    let constant = (x.detach().clamp(lo, hi).unwrap() - (&inside * x.detach()).unwrap()).unwrap();
    (x * inside).unwrap().add(&constant).unwrap()
}

#[test]
fn omniquant_gradients_equal_automatic_ones_through_the_range() {
    for (seed, clip, shift) in [(7, 1.0, 0.0), (8, 0.8, 0.0), (9, 1.0, 3.0), (10, 0.8, -3.0)] {
        let x = (random(&[1, 40], seed) + shift).unwrap();
        let c = random(&[1, 40], 11);
        let (a, b) = (Var::from_tensor(&x).unwrap(), Var::from_tensor(&x).unwrap());
        let y = rows(&a, FakeQuant { bits: 4, clip, through_range: true }).unwrap();
        let grads = (&y * &c).unwrap().sum_all().unwrap().backward().unwrap();

        // quantizer.py, line by line; a bound of the range that is 0 has no gradient.
        let zero = tensor(vec![0.0], (1, 1)).unwrap();
        let max = b.max_keepdim(1).unwrap().maximum(&zero).unwrap();
        let min = b.min_keepdim(1).unwrap().minimum(&zero).unwrap();
        let scale = ((max - &min).unwrap() * (f64::from(clip) / 15.0)).unwrap();
        let zero_point = (min.detach() * f64::from(-clip)).unwrap().div(&scale.detach()).unwrap();
        let zero_point = zero_point.to_vec2::<f32>().unwrap()[0][0].round_ties_even();
        let codes = (round_ste(&b.broadcast_div(&scale).unwrap()) + f64::from(zero_point)).unwrap();
        let codes = (clamp(&codes, 0.0, 15.0) - f64::from(zero_point)).unwrap();
        let want = codes.broadcast_mul(&scale).unwrap();
        let wanted = (&want * &c).unwrap().sum_all().unwrap().backward().unwrap();
        close(&y, &want, 1e-5);
        close(grads.get(&a).unwrap(), wanted.get(&b).unwrap(), 1e-4);
    }
}

#[test]
fn clipped_weights_and_their_gradients_equal_automatic_ones() {
    // More rows than a task takes.
    let (out, inp) = (70, 12);
    let w = random(&[out, inp], 12);
    let positive = |n: usize, seed: u64| ((random(&[n], seed) * 0.2).unwrap() + 0.6).unwrap();
    let c = random(&[out, inp], 13);
    for bits in [3, 4, 16] {
        let var = |n, seed| Var::from_tensor(&positive(n, seed)).unwrap();
        let (before, after, ratio) = (var(inp, 14), var(out, 15), var(out, 16));
        let y = ClippedWeight { weight: w.clone(), bits }.apply(&before, &after, &ratio).unwrap();
        let grads = (&y * &c).unwrap().sum_all().unwrap().backward().unwrap();

        let column = |v: &Tensor| v.reshape((out, 1)).unwrap();
        let u = w.broadcast_mul(&before).unwrap().broadcast_div(&column(&after)).unwrap();
        let want = if bits == 16 {
            u
        } else {
            let top = ((1 << (bits - 1)) - 1) as f32;
            let max = u.abs().unwrap().max_keepdim(1).unwrap();
            let scale = ((column(&ratio) * max).unwrap() / f64::from(top)).unwrap();
            let codes = round_ste(&u.broadcast_div(&scale).unwrap());
            clamp(&codes, -top - 1.0, top).broadcast_mul(&scale).unwrap()
        };
        let wanted = (&want * &c).unwrap().sum_all().unwrap().backward().unwrap();
        close(&y, &want, 1e-5);
        close(grads.get(&before).unwrap(), wanted.get(&before).unwrap(), 1e-4);
        close(grads.get(&after).unwrap(), wanted.get(&after).unwrap(), 1e-4);
        if bits < 16 {
            close(grads.get(&ratio).unwrap(), wanted.get(&ratio).unwrap(), 1e-4);
        }
    }
}
