//! Attention and its gradient, some queries at a time, with the keys that any of them sees: few more than half the products of whole matrices, and
//! what lies between them stays in the caches. Sums are built in the order of whole matrices, whose other terms are zeros
//! (but in the last part where it has [`matmul_nt`]'s few rows).

use std::ops::Range;

use specquant_kernels::{
    Buffer, exp_in_place, for_each_chunk, for_each_chunk_pair, matmul_nn, matmul_nt, transposed,
};

use crate::block::{K, Q, V};
use crate::ops::{CausalSoftmax, backward_into, forward_into};

/// Queries at a time.
const QUERIES: usize = 128;

/// Causal attention of grouped heads. Everything is heads first: `[heads, tokens, head_dim]`.
pub(super) struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Keys that a query sees, itself included; all before it if `None`.
    pub window: Option<usize>,
}

/// Some queries.
struct Part {
    queries: Range<usize>,
    keys: Range<usize>,
    softmax: CausalSoftmax,
    /// `[queries, keys]`.
    scores: Buffer<f32>,
    /// Their softmax.
    weights: Buffer<f32>,
}

impl Part {
    /// Adds (wᵀ y)ᵀ as yᵀ w, where only what is narrow is transposed. w: `[queries, keys]`; y: `[tokens, head_dim]`; to: `[head_dim, tokens]`.
    fn add_against(&self, w: &[f32], y: &[f32], to: &mut [f32]) {
        let Part { queries, keys, .. } = self;
        let (tokens, count) = (self.softmax.tokens, keys.len());
        let dim = y.len() / tokens;
        let y = transposed(rows(y, queries, dim), queries.len(), dim);
        let mut sums = Buffer::new(dim * count);
        for (sums, to) in sums.chunks_exact_mut(count).zip(to.chunks_exact(tokens)) {
            sums.copy_from_slice(&to[keys.clone()]);
        }
        matmul_nn(&y, w, &mut sums, dim, queries.len(), count, true);
        for (sums, to) in sums.chunks_exact(count).zip(to.chunks_exact_mut(tokens)) {
            to[keys.clone()].copy_from_slice(sums);
        }
    }
}

impl Attention {
    /// Query, key and value, `[tokens, head_dim]`, of a query head.
    fn head<'a>(&self, qkv: &'a [Buffer<f32>; 3], head: usize, tokens: usize) -> [&'a [f32]; 3] {
        let size = tokens * self.head_dim;
        let kv = head / (self.heads / self.kv_heads);
        [&qkv[Q][head * size..][..size], &qkv[K][kv * size..][..size], &qkv[V][kv * size..][..size]]
    }

    /// What queries and keys of a head, `[tokens, head_dim]` each, make of each other.
    fn parts<'a>(&'a self, q: &'a [f32], k: &'a [f32]) -> impl Iterator<Item = Part> + 'a {
        let (dim, tokens) = (self.head_dim, q.len() / self.head_dim);
        (0..tokens).step_by(QUERIES).map(move |first| {
            let queries = first..tokens.min(first + QUERIES);
            let keys = self.window.map_or(0, |window| (first + 1).saturating_sub(window))..queries.end;
            let softmax = CausalSoftmax {
                tokens,
                first_query: first,
                first_key: keys.start,
                scale: self.scale,
                window: self.window,
                exp: exp_in_place,
            };
            let mut scores = Buffer::new(queries.len() * keys.len());
            let (q, k) = (rows(q, &queries, dim), rows(k, &keys, dim));
            matmul_nt(q, k, &mut scores, queries.len(), dim, keys.len(), false);
            let mut weights = Buffer::zeros(scores.len());
            forward_into(&softmax, &scores, keys.len(), &mut weights);
            Part { queries, keys, softmax, scores, weights }
        })
    }

    /// What every head reads of the values.
    pub fn forward(&self, qkv: &[Buffer<f32>; 3], tokens: usize) -> Buffer<f32> {
        let dim = self.head_dim;
        let mut y = Buffer::new(qkv[Q].len());
        for_each_chunk(&mut y, tokens * dim, |head, y| {
            let [q, k, v] = self.head(qkv, head, tokens);
            for Part { queries, keys, weights, .. } in self.parts(q, k) {
                let y = &mut y[queries.start * dim..queries.end * dim];
                matmul_nn(&weights, rows(v, &keys, dim), y, queries.len(), keys.len(), dim, false);
            }
        });
        y
    }

    /// Gradients by query, key and value. gy: by what [`Attention::forward`] returns.
    pub fn backward(&self, qkv: &[Buffer<f32>; 3], gy: &[f32], tokens: usize) -> [Buffer<f32>; 3] {
        let (dim, size) = (self.head_dim, tokens * self.head_dim);
        let (mut by_q, mut by_kv) = (Buffer::new(gy.len()), Buffer::new(2 * gy.len()));
        for_each_chunk_pair((&mut by_q, size), (&mut by_kv, 2 * size), |head, by_q, by_kv| {
            let [q, k, v] = self.head(qkv, head, tokens);
            let gy = &gy[head * size..][..size];
            // Transposed, `[head_dim, tokens]`.
            let (mut by_k, mut by_v) = (Buffer::zeros(size), Buffer::zeros(size));
            for part in self.parts(q, k) {
                let Part { queries, keys, softmax, scores, weights } = &part;
                part.add_against(weights, gy, &mut by_v);
                let mut by_weights = Buffer::new(weights.len());
                let gy = rows(gy, queries, dim);
                matmul_nt(gy, rows(v, keys, dim), &mut by_weights, queries.len(), dim, keys.len(), false);
                let mut by_scores = Buffer::zeros(weights.len());
                backward_into(softmax, [scores, weights, &by_weights], keys.len(), &mut by_scores);
                let by_q = &mut by_q[queries.start * dim..queries.end * dim];
                matmul_nn(&by_scores, rows(k, keys, dim), by_q, queries.len(), keys.len(), dim, false);
                part.add_against(&by_scores, q, &mut by_k);
            }
            by_kv[..size].copy_from_slice(&transposed(&by_k, dim, tokens));
            by_kv[size..].copy_from_slice(&transposed(&by_v, dim, tokens));
        });
        let group = self.heads / self.kv_heads;
        let summed = |part: usize| {
            let mut sums = Buffer::new(qkv[K].len());
            for_each_chunk(&mut sums, size, |kv, sums| {
                let of_head = |head: usize| &by_kv[(2 * head + part) * size..][..size];
                sums.copy_from_slice(of_head(kv * group));
                for head in kv * group + 1..(kv + 1) * group {
                    sums.iter_mut().zip(of_head(head)).for_each(|(sum, x)| *sum += x);
                }
            });
            sums
        };
        [by_q, summed(0), summed(1)]
    }
}

/// Some rows of x `[.., width]`.
fn rows<'a>(x: &'a [f32], rows: &Range<usize>, width: usize) -> &'a [f32] {
    &x[rows.start * width..rows.end * width]
}

#[cfg(test)]
mod tests;
