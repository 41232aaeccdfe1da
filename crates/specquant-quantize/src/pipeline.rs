//! One block from the source to tensors to be stored: rotated, calibrated on the outputs of the quantized blocks before it, quantized.

use std::ops::Range;

use specquant_kernels::{KvCache, KvFormat, KvSide};
use specquant_model::{
    Block, KvCenter, Linear, ModelConfig, OnlineRotations, ROWS_AT_ONCE, RopeTable, Site, Source, Span,
    StoredTensor, act_clip_tensor, basis_tensors, key_transform_tensor, transform_tensors,
};

use crate::block::{LayerReport, quantize_block};
use crate::learn::{self, Learn, Learned};
use crate::output::Output;
use crate::progress::{read_numbers, write_numbers};
use crate::recipe::Recipe;
use crate::run::Event;
use crate::transforms::rotate::{self, Orthogonal};
use crate::vocabulary::HalfType;
use crate::{Result, SiteStats, States};

/// What a recipe's rotation comes to in a model.
pub(crate) struct Rotation {
    pub residual: Option<Orthogonal>,
    /// Of the heads of v: one for all layers, or one for each.
    heads: Vec<Orthogonal>,
    pub online: OnlineRotations,
}

impl Rotation {
    /// Learned ones are kept, for they take as long as all blocks.
    pub fn new(
        source: &Source,
        recipe: &Recipe,
        texts: &[Vec<u32>],
        output: &mut Output,
        progress: &mut dyn FnMut(Event),
    ) -> Result<Option<Self>> {
        let Some(rotate) = &recipe.rotate else { return Ok(None) };
        let config = source.config();
        let online = rotate::online(rotate, config);
        if let Some(Learn::SpinQuant(settings)) = &recipe.learn {
            // R2 alone rotates the heads: nothing across them (SpinQuant, section 3).
            let online = OnlineRotations { heads: None, ..online };
            let (hidden, head) = (config.hidden_size, config.head_dim);
            let mut matrices = match output.kept("rotations")? {
                Some(bytes) => read_numbers(&bytes, f32::from_le_bytes),
                None => {
                    let mut tell = |step, of, loss| progress(Event::Learning { step, of, loss });
                    let (residual, heads) =
                        learn::rotations(source, recipe, settings, &online, texts, &mut tell)?;
                    let matrices = [vec![residual], heads].concat().concat();
                    output.keep("rotations", |to| write_numbers(to, &matrices, f32::to_le_bytes))?;
                    output.commit()?;
                    matrices
                }
            };
            let heads = matrices.split_off(hidden * hidden);
            let dense = |n, matrix| Orthogonal::Dense { n, matrix };
            return Ok(Some(Rotation {
                residual: Some(dense(hidden, matrices)),
                heads: heads.chunks_exact(head * head).map(|m| dense(head, m.to_vec())).collect(),
                online,
            }));
        }
        Ok(Some(Rotation {
            residual: rotate
                .residual
                .then(|| Orthogonal::random(rotate.kind, config.hidden_size, recipe.seed)),
            heads: vec![Orthogonal::plain(rotate.kind, config.head_dim)],
            online,
        }))
    }

    fn head(&self, layer: usize) -> &Orthogonal {
        &self.heads[layer.min(self.heads.len() - 1)]
    }
}

/// Calibrates and quantizes one block, and moves the hidden states through the result.
pub(crate) fn one_block(
    source: &Source,
    index: usize,
    recipe: &Recipe,
    rotation: Option<&Rotation>,
    states: &mut States,
    full: Option<&mut States>,
    half: HalfType,
) -> Result<(Vec<StoredTensor>, Vec<LayerReport>)> {
    let config = source.config();
    let prefix = format!("model.layers.{index}");
    let mut block = Block::read(source, index, None)?;
    block.linears_mut().into_iter().try_for_each(Linear::widen)?;
    if let Some(r) = rotation {
        rotate::rotate_block(&mut block, config, r.residual.as_ref(), r.head(index), &r.online);
    }
    let mut reports = Vec::new();
    let mut tensors = Vec::new();
    if recipe.scheme.weight_bits < 16 {
        let learned = match (&recipe.learn, full) {
            (Some(Learn::OmniQuant(settings)), Some(full)) => {
                learn::scales_and_clips(&mut block, config, index, recipe, settings, full, states)?
            }
            (Some(Learn::FlatQuant(settings)), Some(full)) => {
                learn::transforms(&mut block, config, index, recipe, settings, full)?
            }
            _ => Learned::default(),
        };
        // Statistics come from the full-precision block on the quantized blocks' outputs; the states themselves stay.
        let sampled = recipe.calibration.search_tokens;
        let (mut stats, center) =
            observe(&block, config, index, states, false, sampled, recipe.needs_hessian())?;
        block.kv_center = recipe.kv_center.then_some(center);
        let done = quantize_block(&mut block, &prefix, &mut stats, &learned, recipe, config)?;
        for (report, layer) in done.layers {
            tensors.extend(layer);
            reports.push(report);
        }
        for (site, basis) in Site::ALL.into_iter().zip(done.bases) {
            tensors.extend(basis.iter().flat_map(|b| basis_tensors(b, &prefix, site)));
        }
        for (site, clip) in Site::ALL.into_iter().zip(done.act_clips) {
            tensors.extend(clip.map(|clip| act_clip_tensor(clip, &prefix, site)));
        }
        for (site, input) in Site::ALL.into_iter().zip(&block.inputs) {
            tensors.extend(input.iter().flat_map(|input| transform_tensors(input, &prefix, site)));
        }
        tensors.extend(block.rotations.keys.iter().map(|keys| key_transform_tensor(keys, &prefix)));
    } else {
        let names = block.linears().map(|(name, _)| name);
        for (name, linear) in names.into_iter().zip(block.linears_mut()) {
            let shape = vec![linear.out_features(), linear.in_features()];
            if let Some((w, bias)) = linear.dense_mut() {
                tensors.push(half.tensor(format!("{prefix}.{name}.weight"), shape, w)?);
                w.iter_mut().for_each(|v| *v = half.round(*v));
                if let Some(bias) = bias {
                    tensors.push(StoredTensor::f32(format!("{prefix}.{name}.bias"), vec![bias.len()], bias));
                }
            }
        }
    }
    run_block(&block, config, recipe.scheme.kv_format(), states, true, &mut |_, _| (), &mut |_| ())?;
    if let Some(KvCenter { keys, values }) = &block.kv_center {
        for (name, center) in [("k_center", keys), ("v_center", values)] {
            tensors.push(StoredTensor::f32(format!("{prefix}.self_attn.{name}"), vec![center.len()], center));
        }
    }
    for ((name, _), values) in config.norm_shapes().into_iter().zip(block.norms()) {
        tensors.push(config.norm_tensor(format!("{prefix}.{name}.weight"), values));
    }
    Ok((tensors, reports))
}

/// Runs whole sequences through block `index` in full precision, and returns what its inputs were like, and its mean key and value.
///
/// states: `[tokens, hidden]` each; moves: whether they become what the block puts out; sampled: tokens to keep.
///
/// # Errors
/// When an input is not finite.
pub fn observe(
    block: &Block,
    config: &ModelConfig,
    index: usize,
    states: &mut States,
    moves: bool,
    sampled: usize,
    with_hessian: bool,
) -> Result<([SiteStats; 4], KvCenter)> {
    let rows = states.values().len() / config.hidden_size;
    let mut stats =
        Site::ALL.map(|site| SiteStats::new(config.site_width(site), rows, sampled, with_hessian));
    let mut observed = Ok(());
    let mut observe = |site, x: &[f32]| {
        if observed.is_ok() {
            observed = stats[site as usize].add(x, &format!("model.layers.{index} {site:?}"));
        }
    };
    let width = config.num_kv_heads * config.head_dim;
    let (mut keys, mut values) = (vec![0.0f64; width], vec![0.0f64; width]);
    run_block(block, config, KvFormat::F32, states, moves, &mut observe, &mut |cache| {
        for (side, sums) in [(KvSide::Keys, &mut keys), (KvSide::Values, &mut values)] {
            for (head, sums) in sums.chunks_exact_mut(config.head_dim).enumerate() {
                let mut buffer = vec![0.0; cache.len() * config.head_dim];
                for row in cache.tile(side, head, 0..cache.len(), &mut buffer).chunks_exact(config.head_dim) {
                    sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(*v));
                }
            }
        }
    })?;
    observed?;
    let mean = |sums: Vec<f64>| sums.into_iter().map(|sum| (sum / rows.max(1) as f64) as f32).collect();
    Ok((stats, KvCenter { keys: mean(keys), values: mean(values) }))
}

/// Runs whole sequences through one block, at most [`ROWS_AT_ONCE`] rows at a time (some short sequences, or the next part of a long one), each with a fresh cache, which `finished` sees at the end.
/// states, moves: as in [`observe`].
fn run_block(
    block: &Block,
    config: &ModelConfig,
    kv: KvFormat,
    states: &mut States,
    moves: bool,
    observe: &mut dyn FnMut(Site, &[f32]),
    finished: &mut dyn FnMut(&KvCache),
) -> Result<()> {
    let hidden = config.hidden_size;
    let ranges: Vec<Range<usize>> = (0..states.len()).map(|i| states.range(i)).collect();
    let longest = ranges.iter().map(|range| range.len() / hidden).max().unwrap_or(1).max(1);
    let inv_freq = config.inv_freq(block.window.is_some());
    for batch in ranges.chunks((ROWS_AT_ONCE / longest).max(1)) {
        let new_cache = || KvCache::new(kv, config.num_kv_heads, config.head_dim);
        let mut caches: Vec<KvCache> = batch.iter().map(|_| new_cache()).collect();
        let all = batch[0].start..batch[batch.len() - 1].end;
        // Several sequences are one part; a batch of more parts is one sequence.
        for start in all.clone().step_by(ROWS_AT_ONCE * hidden) {
            let part = start..all.end.min(start + ROWS_AT_ONCE * hidden);
            let tokens = |range: &Range<usize>| {
                let before = start.saturating_sub(range.start) / hidden;
                before..(part.end.min(range.end) - range.start) / hidden
            };
            let rope = RopeTable::new(&inv_freq, batch.iter().flat_map(tokens));
            let mut spans: Vec<Span> = batch
                .iter()
                .zip(&mut caches)
                .map(|(range, cache)| Span { rows: tokens(range).len(), cache })
                .collect();
            let mut x = states.values()[part.clone()].to_vec();
            block.forward(config, &rope, &mut x, &mut spans, observe)?;
            if moves {
                states.values_mut()[part].copy_from_slice(&x);
            }
        }
        caches.iter().for_each(&mut *finished);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TINY, dense_block, forward, ids, relative, tiny};

    /// Parts of a long sequence and several short ones together are what each sequence is by itself, to the bit. (Up to 8 rows are another product.)
    #[test]
    fn sequences_run_in_parts_and_together() {
        for name in TINY {
            let source = tiny(name);
            let config = source.config();
            let embedding = specquant_model::Embedding::read(&source).unwrap();
            let long = ids(config).repeat(ROWS_AT_ONCE / 40 + 2);
            for lengths in [vec![ROWS_AT_ONCE + 33, 100], vec![70, 90, 40, 200, 200]] {
                let embed = |&n: &usize| embedding.lookup(&long[..n], config).unwrap().into_vec();
                let sequences: Vec<Vec<f32>> = lengths.iter().map(embed).collect();
                let block = dense_block(&source, 0);
                let mut states = States::from_sequences(&sequences).unwrap();
                let (stats, _) = observe(&block, config, 0, &mut states, true, usize::MAX, false).unwrap();
                let mut seen = Site::ALL.map(|_| Vec::new());
                for (mut x, got) in sequences.into_iter().zip(states.sequences()) {
                    forward(&block, config, &mut x, &mut |site, x| seen[site as usize].extend_from_slice(x));
                    assert!(got == x, "{name}, {lengths:?}");
                }
                for (stats, seen) in stats.iter().zip(seen) {
                    assert!(stats.input(&[]).sample == seen, "{name}, {lengths:?}");
                }
            }
        }
    }

    /// GQA, norms on q and k and a sliding window all meet a center here.
    #[test]
    fn a_center_of_keys_and_values_changes_nothing() {
        for name in TINY {
            let source = tiny(name);
            let config = source.config();
            let embedding = specquant_model::Embedding::read(&source).unwrap();
            let mut plain = embedding.lookup(&ids(config), config).unwrap().into_vec();
            let (mut block, mut centered) = (dense_block(&source, 0), plain.clone());
            let mut states = States::from_sequences(std::slice::from_ref(&plain)).unwrap();
            let (_, center) = observe(&block, config, 0, &mut states, false, 1, false).unwrap();
            assert_eq!(states.values(), plain);
            assert!(center.keys.iter().chain(&center.values).any(|v| v.abs() > 1e-4), "{name}");
            forward(&block, config, &mut plain, &mut |_, _| ());
            block.kv_center = Some(center);
            forward(&block, config, &mut centered, &mut |_, _| ());
            let difference = relative(&centered, &plain);
            assert!(difference < 1e-5, "{name}: {difference}");
        }
    }
}
