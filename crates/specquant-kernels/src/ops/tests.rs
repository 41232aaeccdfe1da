use super::test_noise as noise;
use super::*;

#[test]
fn exp_is_accurate_over_the_whole_range() {
    let mut x: Vec<f32> = (0..400_000).map(|i| -104.0 + i as f32 * (192.7 / 400_000.0)).collect();
    let input = x.clone();
    exp_in_place(&mut x);
    for (&y, &x) in x.iter().zip(&input) {
        let want = f64::from(x).exp();
        let rounded = want as f32;
        let ulp = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
        assert!(
            (f64::from(y) - want).abs() <= 2.0 * ulp,
            "exp({x}) = {y}, not {want}: {} ulp",
            (f64::from(y) - want).abs() / ulp
        );
    }
    for v in input {
        let want = if v < -87.0 { 0.0 } else { exp(v) };
        assert!(v > 0.0 || exp_nonpositive(v) == want, "{v}");
    }
    assert!(exp_nonpositive(f32::NEG_INFINITY) == 0.0 && exp_nonpositive(f32::NAN).is_nan());
    let mut edge = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 88.9, -200.0, f32::MIN_POSITIVE];
    exp_in_place(&mut edge);
    assert_eq!(&edge[..4], &[1.0, 1.0, f32::INFINITY, 0.0]);
    assert!(edge[4].is_nan());
    assert_eq!(&edge[5..], &[f32::INFINITY, 0.0, 1.0]);
}

#[test]
fn twins_agree_bit_for_bit() {
    for n in [1, 7, 16, 33, 576] {
        let x: Vec<f32> = noise(n * 3, n as u64).iter().map(|v| v * 20.0).collect();
        let w = noise(n, 9);
        let (mut a, mut b) = (x.clone(), x.clone());
        exp_chunk(&mut a);
        exp_body(&mut b);
        assert_eq!(a, b);
        let (mut a, mut b) = (x.clone(), x.clone());
        softmax(&mut a);
        softmax_body(&mut b);
        assert_eq!(a, b);
        rms_norm(&x, &w, 1e-5, &mut a);
        rms_norm_body(&x, &w, 1e-5, &mut b);
        assert_eq!(a, b);
        let (mut a, mut b) = (x.clone(), x.clone());
        let up = noise(n * 3, 5);
        silu_mul(&mut a, &up);
        silu_mul_body(&mut b, &up);
        assert_eq!(a, b);
        let (mut a, mut b) = (x.clone(), x.clone());
        gelu_mul(&mut a, &up);
        gelu_mul_body(&mut b, &up);
        assert_eq!(a, b);
        assert_eq!(log_sum_exp(&x).to_bits(), log_sum_exp_body(&x).to_bits());
    }
}

#[test]
fn every_f16_widens() {
    let x: Vec<f16> = (0..=u16::MAX).chain([1, 2, 3]).map(f16::from_bits).collect();
    let mut out = vec![0.0; x.len()];
    widen_f16(&x, &mut out);
    for (x, y) in x.iter().zip(out) {
        assert!(x.to_f32() == y || x.is_nan() && y.is_nan());
    }
}

#[test]
fn log_sum_exp_matches_f64() {
    for (n, scale) in [(1, 1.0), (5, 3.0), (49_152, 10.0), (49_153, 0.01), (1000, 80.0)] {
        let x: Vec<f32> = noise(n, 3).iter().map(|v| v * scale + 7.0).collect();
        let max = x.iter().fold(f64::MIN, |m, &v| m.max(f64::from(v)));
        let want = max + x.iter().map(|&v| (f64::from(v) - max).exp()).sum::<f64>().ln();
        assert!((log_sum_exp(&x) - want).abs() < 1e-6, "{n} {scale}: {} {want}", log_sum_exp(&x));
    }
    assert_eq!(log_sum_exp(&[]), f64::NEG_INFINITY);
    assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 3]), f64::NEG_INFINITY);
    assert_eq!(log_sum_exp(&[1.0, f32::INFINITY]), f64::INFINITY);
    assert!(log_sum_exp(&[f32::NAN, 1.0]).is_nan());
}

#[test]
fn softmax_sums_to_one_and_matches_f64() {
    let x: Vec<f32> = noise(77, 4).iter().map(|v| v * 30.0).collect();
    let mut y = x.clone();
    softmax(&mut y);
    let lse = log_sum_exp(&x);
    for (y, x) in y.iter().zip(&x) {
        assert!((f64::from(*y) - (f64::from(*x) - lse).exp()).abs() < 1e-6);
    }
    assert!((y.iter().map(|&v| f64::from(v)).sum::<f64>() - 1.0).abs() < 1e-6);
}

#[test]
fn rms_norm_silu_and_gelu_match_f64() {
    let (rows, n) = (41, 577);
    let (x, w) = (noise(rows * n, 1), noise(n, 2));
    let mut out = vec![0.0; x.len()];
    rms_norm(&x, &w, 1e-5, &mut out);
    for r in 0..rows {
        let row = &x[r * n..][..n];
        let mean = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n as f64;
        for i in 0..n {
            let want = f64::from(row[i]) / (mean + 1e-5).sqrt() * f64::from(w[i]);
            assert!((f64::from(out[r * n + i]) - want).abs() < 1e-6);
        }
    }
    let mut gate: Vec<f32> = x.iter().map(|v| v * 100.0).collect();
    let before = gate.clone();
    let up = noise(x.len(), 8);
    silu_mul(&mut gate, &up);
    for i in 0..gate.len() {
        let g = f64::from(before[i]);
        let want = g / (1.0 + (-g).exp()) * f64::from(up[i]);
        assert!((f64::from(gate[i]) - want).abs() <= 1e-6 * want.abs().max(1e-3));
    }
    // Where its tails matter, and far beyond: nothing overflows to NaN.
    let before: Vec<f32> = x.iter().map(|v| v * 8.0).chain([1e20, -1e20, 0.0]).collect();
    let up: Vec<f32> = up.into_iter().chain([1.0, 1.0, 1.0]).collect();
    let mut gate = before.clone();
    gelu_mul(&mut gate, &up);
    for i in 0..gate.len() {
        let g = f64::from(before[i]);
        let tanh = ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh();
        let want = 0.5 * g * (1.0 + tanh) * f64::from(up[i]);
        assert!((f64::from(gate[i]) - want).abs() <= 2e-6 * want.abs().max(1e-3), "{g}: {} {want}", gate[i]);
    }
}

#[test]
fn rope_turns_half_split_pairs() {
    let mut x = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
    let (c, s) = ([0.6, 0.0], [0.8, 1.0]);
    rope(&mut x, 2, 4, &c, &s);
    let want = [0.6 - 2.4, -4.0, 1.8 + 0.8, 2.0, 3.0 - 5.6, -8.0, 4.2 + 4.0, 6.0];
    for (a, b) in x.iter().zip(want) {
        assert!((a - b).abs() < 1e-6, "{x:?}");
    }
}
