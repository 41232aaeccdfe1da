//! Attention over the cache in its formats, beside the same over a cache in f16.

use serde::Serialize;
use specquant_kernels::{KvCache, KvFormat, attention};

use crate::made::Noise;
use crate::{Settings, Shape, best};

/// Tokens in the cache, and queries: a decoded token, or a piece of a prompt.
const CASES: [(usize, usize); 4] = [(1024, 1), (4096, 1), (1024, 512), (4096, 512)];

/// Attention of some queries over one cache.
#[derive(Debug, Clone, Serialize)]
pub struct AttentionRow {
    /// Whose heads.
    pub shape: Shape,
    /// Tokens in the cache.
    pub tokens: usize,
    /// The last of them, which ask.
    pub queries: usize,
    /// Over keys and values in f16, seconds.
    pub f16: f64,
    /// In evenly spaced 4-bit codes.
    pub uniform: f64,
    /// In 16 levels that suit a Gaussian, the default recipe's.
    pub levels: f64,
    /// Bytes of the cache in f16 and in levels.
    pub bytes: [usize; 2],
}

pub(crate) fn measure(shape: &Shape, settings: &Settings) -> Vec<AttentionRow> {
    let (heads, kv_heads, d) = (shape.heads, shape.kv_heads, shape.hidden / shape.heads);
    let formats =
        [KvFormat::F16, KvFormat::Int { bits: 4, clip: 0.95, intact: 0 }, KvFormat::Gaussian { intact: 4 }];
    let one = |(tokens, queries): (usize, usize)| {
        let mut noise = Noise(5);
        let [keys, values] = [(); 2].map(|()| noise.values(tokens * kv_heads * d));
        let q = noise.values(queries * heads * d);
        let caches = formats.map(|format| {
            let mut cache = KvCache::new(format, kv_heads, d).with_any_order(true);
            cache.append(&keys, &values);
            cache
        });
        let mut out = vec![0.0; q.len()];
        let out = std::cell::RefCell::new(&mut out);
        let scale = 1.0 / (d as f32).sqrt();
        let run = |cache: &KvCache| attention(&q, queries, heads, cache, scale, None, &mut out.borrow_mut());
        let [a, b, c] = &caches;
        let [f16, uniform, levels] =
            best(settings.seconds / 2.0, [&mut || run(a), &mut || run(b), &mut || run(c)]);
        AttentionRow {
            shape: *shape,
            tokens,
            queries,
            f16,
            uniform,
            levels,
            bytes: [caches[0].bytes(), caches[2].bytes()],
        }
    };
    CASES.into_iter().map(one).collect()
}
