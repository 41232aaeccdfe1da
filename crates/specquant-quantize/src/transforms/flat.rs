//! FlatQuant's learned transforms (arXiv 2410.09426) in a block, which then computes what it did.
//!
//! Diagonals fold into the norms and `up_proj`, the transform of the heads of v into `v_proj` and out of `o_proj`; the transform of keys runs in the
//! block after RoPE, those of inputs in front of their quantizers (see specquant-learn, `flatquant`, for the formulas).

use specquant_kernels::{Kronecker, transposed};
use specquant_learn::FlatBlock;
use specquant_model::{Block, InputTransform, KeyTransform, ModelConfig, Site, storable_matrix};

use crate::block::apply_scales;
use crate::{Error, Result};

/// Applies what folds into norms and weights, which are dense and owned, and the transform of keys, and returns those of the inputs, in the order of
/// [`Site::ALL`], whose weights are still without them.
///
/// # Errors
/// When a matrix cannot be inverted.
pub fn apply(
    block: &mut Block,
    model: &ModelConfig,
    index: usize,
    flat: FlatBlock,
) -> Result<[InputTransform; 4]> {
    let singular = |what: &str| {
        Error::Recipe(format!(
            "learn: the transform of model.layers.{index}.{what} became singular; lower learn.lr"
        ))
    };
    for (site, scales) in Site::ALL.into_iter().zip(&flat.scales) {
        if let Some(scales) = scales {
            // An input is multiplied by d, where smoothing divides.
            apply_scales(block, site, &scales.iter().map(|d| 1.0 / d).collect::<Vec<f32>>(), model);
        }
    }
    let head_dim = model.head_dim;
    let values = Kronecker::new(head_dim, Vec::new(), flat.values);
    let inverse = values.inverse_transposed().ok_or_else(|| singular("self_attn.v_proj"))?;
    if let Some((w, bias)) = block.v.dense_mut() {
        let out = model.num_kv_heads * head_dim;
        let inp = w.len() / out;
        let mut columns = transposed(w, out, inp);
        values.apply(&mut columns, inp * model.num_kv_heads);
        *w = transposed(&columns, inp, out).into_vec();
        if let Some(bias) = bias {
            values.apply(bias, model.num_kv_heads);
        }
    }
    if let Some((w, _)) = block.o.dense_mut() {
        let heads = w.len() / head_dim;
        inverse.apply(w, heads);
    }
    if let Some(keys) = flat.keys {
        let keys = KeyTransform::new(storable_matrix(keys), head_dim);
        block.rotations.keys = Some(keys.ok_or_else(|| singular("self_attn.k_proj"))?);
    }
    let mut inputs = Vec::new();
    for (site, (left, right)) in Site::ALL.into_iter().zip(flat.inputs) {
        let (left, right) = (storable_matrix(left), storable_matrix(right));
        let kronecker = Kronecker::new(model.site_width(site), left, right);
        inputs.push(InputTransform::kronecker(kronecker).ok_or_else(|| singular(site.name()))?);
    }
    inputs.try_into().map_err(|_| singular("inputs"))
}

#[cfg(test)]
mod tests {
    use specquant_model::{Embedding, Linear};

    use super::*;
    use crate::testing::{TINY, dense_block, forward, ids, relative, tiny};

    /// Values around 0.
    fn noise(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104729 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    /// Neither orthonormal nor nearly singular.
    fn matrix(n: usize, seed: usize) -> Vec<f32> {
        let mut m: Vec<f32> = noise(n * n, seed).into_iter().map(|v| v / (n as f32).sqrt()).collect();
        m.iter_mut().step_by(n + 1).for_each(|v| *v += 1.5);
        m
    }

    fn flat(model: &ModelConfig) -> FlatBlock {
        let scales = |site: Site| {
            let noise = noise(model.site_width(site), 9);
            (site != Site::O).then(|| noise.into_iter().map(|v| 1.5 + v).collect())
        };
        let input = |site: Site| {
            let (n1, n2) = Kronecker::widths(model.site_width(site));
            match site {
                Site::O => (matrix(model.num_heads, 1), Vec::new()),
                _ => (matrix(n1, 2), matrix(n2, 3)),
            }
        };
        FlatBlock {
            inputs: Site::ALL.map(input),
            scales: Site::ALL.map(scales),
            values: matrix(model.head_dim, 4),
            keys: Some(matrix(model.head_dim, 5)),
            weight_clip: [const { Vec::new() }; 7],
            act_clip: None,
            losses: Vec::new(),
        }
    }

    /// Grouped queries, biases, norms on q and k, a sliding window and odd widths all meet a transform here, none of them orthonormal.
    #[test]
    fn a_transformed_block_computes_what_it_did() {
        for name in TINY {
            let source = tiny(name);
            let config = source.config();
            let embedding = Embedding::read(&source).unwrap();
            let mut plain = embedding.lookup(&ids(config), config).unwrap();
            let (mut block, mut transformed) = (dense_block(&source, 0), plain.clone());
            forward(&block, config, &mut plain, &mut |_, _| ());
            let inputs = apply(&mut block, config, 0, flat(config)).unwrap();
            // What is stored of them is what the weights were transformed by.
            for (site, input) in Site::ALL.into_iter().zip(inputs) {
                let stored = input.as_kronecker().unwrap();
                assert_eq!(stored.left(), storable_matrix(stored.left().to_vec()));
                for linear in block.site_mut(site) {
                    let out = linear.out_features();
                    let (w, _) = linear.dense_mut().unwrap();
                    *w = input.apply_to_weight(w, out).rest.into_vec();
                }
                block.inputs[site as usize] = Some(input);
            }
            assert!(block.rotations.keys.is_some());
            forward(&block, config, &mut transformed, &mut |_, _| ());
            let difference = relative(&transformed, &plain);
            assert!(difference < 1e-4, "{name}: {difference}");
            assert!(block.linears().iter().all(|(_, linear)| matches!(linear, Linear::Dense(_))));
        }
    }

    #[test]
    fn a_singular_transform_is_named() {
        let source = tiny("qwen2");
        let config = source.config();
        let mut broken = flat(config);
        broken.inputs[3].1.fill(0.0);
        let error = apply(&mut dense_block(&source, 0), config, 7, broken).unwrap_err().to_string();
        assert!(error.contains("model.layers.7.down") && error.contains("learn.lr"), "{error}");
    }
}
