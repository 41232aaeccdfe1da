use super::*;
use crate::net::tests::random;

const DIM: usize = 8;

/// Σ y · gy of attention, one query after another, in f64.
fn naive(attention: &Attention, qkv: [&[f64]; 3], gy: &[f32], tokens: usize) -> (Vec<f64>, f64) {
    let mut y = vec![0.0; gy.len()];
    for (row, y) in y.chunks_exact_mut(DIM).enumerate() {
        let (head, query) = (row / tokens, row % tokens);
        let kv = head / (attention.heads / attention.kv_heads) * tokens;
        let keys = attention.window.map_or(0, |w| (query + 1).saturating_sub(w))..query + 1;
        let vector = |side: usize, at: usize| &qkv[side][at * DIM..][..DIM];
        let dot = |k: &[f64]| vector(Q, row).iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
        let weights: Vec<f64> =
            keys.clone().map(|key| (f64::from(attention.scale) * dot(vector(K, kv + key))).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (key, weight) in keys.zip(weights) {
            y.iter_mut().zip(vector(V, kv + key)).for_each(|(y, v)| *y += weight / sum * v);
        }
    }
    let value = y.iter().zip(gy).map(|(y, g)| y * f64::from(*g)).sum();
    (y, value)
}

/// Over several parts, the last of which is short, and windows shorter and longer than one.
#[test]
fn values_and_gradients_are_those_of_one_query_after_another() {
    let tokens = 2 * QUERIES + 44;
    for window in [None, Some(16), Some(200)] {
        let attention = Attention { heads: 4, kv_heads: 2, head_dim: DIM, scale: 0.4, window };
        let qkv = [4, 2, 2].map(|heads| random(heads * tokens * DIM, heads as u64));
        let gy = random(4 * tokens * DIM, 7);
        let buffers = qkv.each_ref().map(|x| Buffer::from(x.as_slice()));
        let wide = qkv.each_ref().map(|x| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
        let (want, _) = naive(&attention, wide.each_ref().map(|x| x.as_slice()), &gy, tokens);
        for (got, want) in attention.forward(&buffers, tokens).iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-5, "{window:?}: {got}, not {want}");
        }
        let gradients = attention.backward(&buffers, &gy, tokens);
        for side in [Q, K, V] {
            let direction = random(qkv[side].len(), 9);
            let at = |step: f64| {
                let mut moved = wide.clone();
                moved[side].iter_mut().zip(&direction).for_each(|(x, d)| *x += step * f64::from(*d));
                naive(&attention, moved.each_ref().map(|x| x.as_slice()), &gy, tokens).1
            };
            let want = (at(1e-4) - at(-1e-4)) / 2e-4;
            let got: f64 = gradients[side].iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
            let length = gradients[side].iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
            assert!((got - want).abs() < 1e-4 * length, "{window:?}, {side}: {got}, not {want}");
        }
    }
}
