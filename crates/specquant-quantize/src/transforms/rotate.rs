//! Rotations: outliers are spread over all channels before anything is rounded (QuaRot, Ashkboos et al., arXiv 2404.00456).
//!
//! An orthonormal Q changes nothing where it meets its transpose. The residual stream x becomes x Q: RMSNorm commutes with Q once
//! its weight γ is folded into the layers after it, so embeddings, `o_proj` and `down_proj` write x Q, and q, k, v, gate, up and the head read it with
//! W diag(γ) Q. Within attention, a transform of the heads of v is undone in `o_proj`. What cannot be folded runs on the activations
//! ([`OnlineRotations`]): across the heads before `o_proj`, over the whole width before `down_proj`, and on q and k after RoPE, whose
//! product it leaves alone (section 4; constants and places as in QuaRot's `rotation_utils.py`).
//!
//! Two lines of that code are left out: the mean of every embedding is not subtracted, which would change an RMSNorm model, and the
//! head is untied from the embeddings first, because only one of them has γ folded in. Here transforms are in f32, n log n.

use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rayon::prelude::*;
use specquant_kernels::{Hadamard, transposed};
use specquant_model::{Block, Linear, ModelConfig, OnlineRotations, Rotation, RotationKind, Rotations};

use crate::recipe::Rotate;

/// An orthonormal Q [n, n].
pub enum Orthogonal {
    /// x becomes x diag(signs) H.
    Signed {
        /// ±1, `[n]`.
        signs: Vec<f32>,
        /// H.
        plan: Rotation,
    },
    /// x becomes x Q.
    Dense {
        /// Width n.
        n: usize,
        /// Q, `[n, n]`.
        matrix: Vec<f32>,
    },
}

impl Orthogonal {
    /// The transform of width `n`.
    pub fn plain(kind: RotationKind, n: usize) -> Self {
        Orthogonal::Signed { signs: vec![1.0; n], plan: Rotation::new(kind, n) }
    }

    /// The same with random signs.
    pub fn random(kind: RotationKind, n: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let signs = (0..n).map(|_| if rng.random::<bool>() { 1.0 } else { -1.0 }).collect();
        Orthogonal::Signed { signs, plan: Rotation::new(kind, n) }
    }

    /// Width n.
    pub fn width(&self) -> usize {
        match self {
            Orthogonal::Signed { signs, .. } => signs.len(),
            Orthogonal::Dense { n, .. } => *n,
        }
    }

    /// Q, `[n, n]`.
    pub fn matrix(&self) -> Vec<f32> {
        let n = self.width();
        let mut matrix = vec![0.0; n * n];
        matrix.iter_mut().step_by(n + 1).for_each(|v| *v = 1.0);
        self.rotate_rows(&mut matrix);
        matrix
    }

    /// X Q for X `[rows, n]`, in place: what reads or is the residual stream.
    pub fn rotate_rows(&self, x: &mut [f32]) {
        match self {
            Orthogonal::Signed { signs, plan } => {
                let n = signs.len();
                x.par_chunks_exact_mut(n)
                    .for_each(|row| row.iter_mut().zip(signs).for_each(|(v, s)| *v *= s));
                plan.apply(x, x.len() / n);
            }
            Orthogonal::Dense { n, matrix } => x.chunks_mut(DENSE_ROWS * n).for_each(|x| {
                let before = x.to_vec();
                specquant_kernels::matmul_nn(&before, matrix, x, before.len() / n, *n, *n, false);
            }),
        }
    }

    /// Qᵀ W for W `[n, in]`, in place: what writes the residual stream.
    fn rotate_columns(&self, w: &mut Vec<f32>) {
        let n = self.width();
        let inp = w.len() / n;
        let mut columns = transposed(w, n, inp);
        self.rotate_rows(&mut columns);
        *w = transposed(&columns, inp, n).into_vec();
    }
}

/// Rows that go through a dense product together.
const DENSE_ROWS: usize = 4096;

/// The rotations that a recipe leaves to run time. A width without a Hadamard matrix (9 heads) is not mixed by it; heads are by nothing else.
pub fn online(rotate: &Rotate, config: &ModelConfig) -> OnlineRotations {
    let mixes = |kind, n| kind == RotationKind::Dct || Hadamard::new(n).block() > 1;
    let kind = |n| Some(rotate.kind).filter(|&kind| mixes(kind, n));
    OnlineRotations {
        down: kind(config.intermediate_size).filter(|_| rotate.residual),
        heads: Some(RotationKind::Hadamard).filter(|&kind| rotate.residual && mixes(kind, config.num_heads)),
        qk: kind(config.head_dim).filter(|_| rotate.qk),
    }
}

/// Multiplies the columns of w `[out, in]` by a norm's weight `[in]`.
pub fn fold_norm(w: &mut [f32], norm: &[f32]) {
    w.par_chunks_exact_mut(norm.len()).for_each(|row| row.iter_mut().zip(norm).for_each(|(w, n)| *w *= n));
}

/// The rotation of the residual stream, with the norms folded.
fn rotate_residual(block: &mut Block, residual: &Orthogonal) {
    for (norm, layers) in [
        (&mut block.input_norm, vec![&mut block.q, &mut block.k, &mut block.v]),
        (&mut block.mlp_norm, vec![&mut block.gate, &mut block.up]),
    ] {
        for (w, _) in layers.into_iter().filter_map(Linear::dense_mut) {
            fold_norm(w, norm);
            residual.rotate_rows(w);
        }
        norm.fill(1.0);
    }
    for (w, bias) in [&mut block.o, &mut block.down].into_iter().filter_map(Linear::dense_mut) {
        residual.rotate_columns(w);
        if let Some(bias) = bias {
            residual.rotate_rows(bias);
        }
    }
}

/// Rotates a block whose weights are dense and owned, so that it maps the rotated residual stream as it mapped the plain one. residual: of
/// that stream, if it is rotated; head: of every head of v.
pub fn rotate_block(
    block: &mut Block,
    config: &ModelConfig,
    residual: Option<&Orthogonal>,
    head: &Orthogonal,
    online: &OnlineRotations,
) {
    let rotations = Rotations::new(online, config);
    if let Some(residual) = residual {
        rotate_residual(block, residual);
    }
    if let Some((w, bias)) = block.v.dense_mut() {
        let out = config.num_kv_heads * config.head_dim;
        let inp = w.len() / out;
        let mut columns = transposed(w, out, inp);
        head.rotate_rows(&mut columns);
        *w = transposed(&columns, inp, out).into_vec();
        if let Some(bias) = bias {
            head.rotate_rows(bias);
        }
    }
    if let Some((w, _)) = block.o.dense_mut() {
        let rows = w.len() / (config.num_heads * config.head_dim);
        head.rotate_rows(w);
        if let Some(heads) = &rotations.heads {
            heads.apply_across(w, rows, config.head_dim);
        }
    }
    if let (Some((w, _)), Some(down)) = (block.down.dense_mut(), &rotations.down) {
        let rows = w.len() / config.intermediate_size;
        down.apply(w, rows);
    }
    block.rotations = rotations;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TINY, dense_block, forward, ids, logits, relative, tiny};
    use specquant_model::{Embedding, Head};

    /// GQA, biases, norms on q and k, a sliding window and a tied head all meet a rotation here.
    #[test]
    fn a_rotated_model_gives_the_same_logits() {
        for (i, name) in TINY.into_iter().enumerate() {
            let source = tiny(name);
            let config = source.config();
            // Only heads can be rotated there.
            if config.post_norms {
                continue;
            }
            let kind = if i % 3 == 0 { RotationKind::Dct } else { RotationKind::Hadamard };
            let rotate = Rotate { kind, residual: true, qk: true };
            let hadamard = Orthogonal::random(kind, config.hidden_size, 3);
            // As learned rotations come: dense, in every other model.
            let residual = match i % 2 {
                0 => Orthogonal::Dense { n: config.hidden_size, matrix: hadamard.matrix() },
                _ => hadamard,
            };
            let (head, online) = (Orthogonal::plain(kind, config.head_dim), online(&rotate, config));
            let mut plain = Embedding::read(&source).unwrap().lookup(&ids(config), config).unwrap();
            let mut rotated = plain.clone();
            residual.rotate_rows(&mut rotated);
            for index in 0..config.num_layers {
                let mut block = dense_block(&source, index);
                forward(&block, config, &mut plain, &mut |_, _| ());
                rotate_block(&mut block, config, Some(&residual), &head, &online);
                assert!(block.rotations.down.is_some() && block.rotations.qk.is_some());
                forward(&block, config, &mut rotated, &mut |_, _| ());
                let mut expected = plain.clone();
                residual.rotate_rows(&mut expected);
                let difference = relative(&rotated, &expected);
                assert!(difference < 1e-4, "{name}, block {index}: {difference}");
            }
            let mut head = Head::read(&source).unwrap();
            let want = logits(&head, config, &plain);
            head.linear.widen().unwrap();
            let (w, _) = head.linear.dense_mut().unwrap();
            fold_norm(w, &head.norm);
            residual.rotate_rows(w);
            head.norm.fill(1.0);
            let difference = relative(&logits(&head, config, &rotated), &want);
            assert!(difference < 1e-4, "{name}: {difference}");
        }
    }
}
