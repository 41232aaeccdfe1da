//! Peak memory of a run, predicted: the largest of the moments at which much is held at once. docs/reliability.md compares it with measurements.

#[cfg(feature = "learn")]
use specquant_kernels::Hadamard;
use specquant_kernels::columns_at_once;
use specquant_model::{BranchBasis, ModelConfig, ROWS_AT_ONCE, Site};

use crate::calibration::GENERATION_BATCH;
use crate::learn::Learn;
use crate::plan::site_outputs;
use crate::recipe::{Embeddings, Recipe, Rounding, Searched};
#[cfg(feature = "learn")]
use crate::transforms::rotate::online;

/// Memory that does not depend on the model: code, tokenizer, allocator.
const BASE_BYTES: usize = 40 << 20;

/// Peak bytes. shapes: of one block's layers; block_bytes: of a quantized block; states: bytes of hidden states in memory.
pub(crate) fn peak(
    config: &ModelConfig,
    recipe: &Recipe,
    shapes: &[(String, [usize; 2])],
    block_bytes: usize,
    states: usize,
) -> usize {
    // The allocator holds on to some of what was freed; hidden states are no business of its.
    let with_rest = |moment: usize| moment + moment / 20;
    let moments = [
        with_rest(generation(config, recipe, shapes)),
        with_rest(vocabulary(config, recipe)),
        with_rest(rotations(config, recipe, shapes)),
        with_rest(block(config, recipe, shapes)) + states,
        with_rest(tuning(config, recipe, shapes, block_bytes)),
    ];
    BASE_BYTES + moments.into_iter().max().unwrap_or(0)
}

/// f32 values of a row on its way through a block.
fn wide(config: &ModelConfig) -> usize {
    4 * config.hidden_size + 3 * config.intermediate_size + 3 * config.num_heads * config.head_dim
}

/// f32 values of the rows that calibration runs through a block together: residual stream, angles, queries, keys and values, what attention puts out, and what
/// lies between layers; the cache of their sequences; and what is packed of the widest layer.
fn passing(config: &ModelConfig, shapes: &[(String, [usize; 2])], rows: usize, longest: usize) -> usize {
    let at_once = ROWS_AT_ONCE.min(rows);
    let head = (1 + 2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
    let cached = longest.max(at_once) * 2 * config.num_kv_heads * config.head_dim;
    let packed = shapes.iter().map(|(_, [out, inp])| columns_at_once(*out) * inp).max().unwrap_or(0);
    at_once * (config.hidden_size + head + wide(config)) + cached + packed
}

fn weights(shapes: &[(String, [usize; 2])]) -> usize {
    shapes.iter().map(|(_, [out, inp])| out * inp).sum()
}

/// Weights of the widest layer.
fn widest(shapes: &[(String, [usize; 2])]) -> usize {
    shapes.iter().map(|(_, [out, inp])| out * inp).max().unwrap_or(0)
}

/// The model writes text.
fn generation(config: &ModelConfig, recipe: &Recipe, shapes: &[(String, [usize; 2])]) -> usize {
    if recipe.calibration.file.is_some() {
        return 0;
    }
    let text = recipe.text();
    let cached = GENERATION_BATCH.min(text.samples) * text.sequence_length;
    let kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * cached;
    // The model that writes is the source, tied as it is; and the head as it was read, while it is packed.
    let copies = if config.tie_word_embeddings { 2 } else { 3 };
    4 * (config.num_layers * weights(shapes) + copies * config.vocab_size * config.hidden_size) + 2 * kv
}

/// Embeddings and head on their way to the disk: as f32 and in 16 bits, or in 16 bits twice.
fn vocabulary(config: &ModelConfig, recipe: &Recipe) -> usize {
    let tied = config.tie_word_embeddings && recipe.rotate.is_none_or(|r| !r.residual);
    let stored = if recipe.embeddings == Embeddings::Int8 { 1 } else { 2 };
    config.vocab_size * config.hidden_size * (6 + if tied { 0 } else { stored })
}

/// A block is calibrated and quantized.
fn block(config: &ModelConfig, recipe: &Recipe, shapes: &[(String, [usize; 2])]) -> usize {
    let rows = recipe.calibration.samples * recipe.calibration.sequence_length;
    let searched = rows.min(recipe.calibration.search_tokens);
    let second_moments = recipe.needs_hessian();
    let whole = 4 * weights(shapes);
    let square = |site: Site| config.site_width(site).pow(2);
    // A lower triangle in f64.
    let hessian = |site: Site| if second_moments { 4 * square(site) } else { 0 };
    let all_hessians: usize = Site::ALL.into_iter().map(hessian).sum();
    // What a row leaves behind at every site, and what it takes on its way.
    let kept = 4 * searched * Site::ALL.map(|site| config.site_width(site)).iter().sum::<usize>();
    let observing =
        whole + all_hessians + kept + 4 * passing(config, shapes, rows, recipe.calibration.sequence_length);

    let of_site = |site: Site| 4 * site_outputs(shapes, site) * config.site_width(site);
    let widest_of = |site: Site| {
        let of = shapes.iter().filter(|(name, _)| site.layers().iter().any(|layer| name.ends_with(layer)));
        of.map(|(_, [out, inp])| 4 * out * inp).max().unwrap_or(0)
    };
    // A layer that is rounded: its codes and its two packed forms.
    let rounding = widest_of;
    let branch = |site: Site| {
        let (outs, inp) = (site_outputs(shapes, site), config.site_width(site));
        recipe.branch.as_ref().map_or(0, |b| {
            // Of a layer, what the branch leaves to round.
            of_site(site)
                + widest_of(site)
                + match b.basis {
                    // A fit in f64, of the layers of a site together; weighted, by a second moment that was scaled.
                    BranchBasis::Svd => 8 * outs * inp,
                    BranchBasis::Wsvd => 8 * inp * (outs + inp),
                    // A transform without a fast form at run time is a matrix.
                    BranchBasis::FourierTop => 4 * inp * inp,
                    _ => 0,
                }
        })
    };
    // A trial of a migration strength: the site's layers scaled, one of them rounded, a branch.
    let searches = recipe.smooth.is_some_and(|s| matches!(s.smoothing_strength, Searched::Search(_)));
    let trial = |site: Site| {
        let copied = if recipe.branch_needs_hessian() { hessian(site) } else { 0 };
        whole + all_hessians + copied + of_site(site) + rounding(site) + branch(site)
    };
    let searching = Site::ALL.into_iter().map(|site| if searches { trial(site) } else { 0 }).max();

    // Sites that are done hold their codes twice, as they will be stored and packed, and no second moment; the others wait as they are.
    let (mut done, mut waiting, mut most) = (0, whole + all_hessians, 0);
    for site in Site::ALL {
        // In the memory of the whole matrix, where it was one.
        let kept = match (&recipe.branch, &recipe.input) {
            (None, _) => 0,
            (Some(_), None) => hessian(site),
            (Some(_), Some(_)) => 2 * hessian(site),
        };
        // In the place of the second moment: the whole matrix, which is rotated or becomes its factor, whose part that is used, in f32, comes on top.
        let n = config.site_width(site);
        let used = match &recipe.rounding {
            Rounding::Gptq(gptq) => 2 * n * (n + gptq.block_size.min(n)),
            Rounding::Rtn {} => 0,
        };
        let whole_matrix = if used > 0 || recipe.input.is_some() { 2 * hessian(site) } else { 0 };
        // A layer at a time takes the place of what it was.
        let transformed = if recipe.input.is_some() { widest_of(site) } else { 0 };
        let rest = waiting - hessian(site) + kept;
        let rounded = used + transformed + rounding(site) + branch(site);
        most = most.max(done + rest + (whole_matrix + used).max(rounded));
        let stored = if recipe.scheme.weight_bits > 4 { 8 } else { 4 };
        done += of_site(site) * stored / 16;
        waiting -= of_site(site) + hessian(site);
    }
    most.max(observing).max(searching.unwrap_or(0)).max(learning(config, recipe, shapes))
}

/// Learning on one block. OmniQuant: the weights, a copy, rounded and their gradients, the widest layer's while it is added up. FlatQuant: the weights,
/// transformed, rounded and the gradients of each. Both: the sequences that are learned from, before the block and behind it, and what the backward pass
/// needs of those of a step.
#[cfg(feature = "learn")]
fn learning(config: &ModelConfig, recipe: &Recipe, shapes: &[(String, [usize; 2])]) -> usize {
    let calibration = &recipe.calibration;
    let sequences =
        |samples: usize, length: usize| 2 * samples.min(calibration.samples) * length * config.hidden_size;
    4 * match &recipe.learn {
        Some(Learn::OmniQuant(settings)) => {
            let length = settings.sequence_length.min(calibration.sequence_length);
            4 * weights(shapes) + widest(shapes) + sequences(settings.samples, length) + graph(config, length)
        }
        Some(Learn::FlatQuant(settings)) => {
            let batch = settings.batch_size.min(settings.samples).min(calibration.samples);
            let length = settings.sequence_length.min(calibration.sequence_length);
            let row = (8 * wide(config)).saturating_add((3 * config.num_heads).saturating_mul(length));
            let kept = (batch * length).saturating_mul(row).min(MOST);
            9 * weights(shapes) + sequences(settings.samples, length) + kept
        }
        _ => 0,
    }
}

/// Rotations learned on the whole model: its weights, embeddings and head; every block's input; logits; a rotation of the residual stream, its gradients
/// and what moves it along the manifold; the one of `down_proj`'s input as a matrix, twice; and one block's graph, with rounded weights only where the
/// recipe rounds to nearest.
#[cfg(feature = "learn")]
fn rotations(config: &ModelConfig, recipe: &Recipe, shapes: &[(String, [usize; 2])]) -> usize {
    let Some(Learn::SpinQuant(settings)) = &recipe.learn else { return 0 };
    let length = settings.sequence_length.min(recipe.calibration.sequence_length);
    let vocabularies = if config.tie_word_embeddings { 1 } else { 2 };
    let rotation = recipe.rotate.and_then(|rotate| online(&rotate, config).down);
    let down = rotation.map_or(0, |_| Hadamard::new(config.intermediate_size).block());
    let rounded = if matches!(recipe.rounding, Rounding::Gptq(_)) { 0 } else { 3 * weights(shapes) };
    4 * (config.num_layers * (weights(shapes) + length * config.hidden_size)
        + config.vocab_size * (vocabularies * config.hidden_size + 2 * LOGIT_ROWS)
        + 14 * config.hidden_size.pow(2)
        + 2 * down.pow(2)
        + rounded
        + graph(config, length))
}

/// Values that the backward pass of a block needs of its forward pass of a sequence, one of each operation.
#[cfg(feature = "learn")]
fn graph(config: &ModelConfig, length: usize) -> usize {
    let row =
        12 * config.hidden_size + 14 * config.num_heads * config.head_dim + 7 * config.intermediate_size;
    let scores = (4 * config.num_heads).saturating_mul(length);
    length.saturating_mul(row.saturating_add(scores)).min(MOST)
}

/// More values than there is memory for, of which some do not overflow.
#[cfg(feature = "learn")]
const MOST: usize = usize::MAX >> 8;

/// Such recipes are refused.
#[cfg(not(feature = "learn"))]
fn learning(_: &ModelConfig, _: &Recipe, _: &[(String, [usize; 2])]) -> usize {
    0
}

/// Such recipes are refused.
#[cfg(not(feature = "learn"))]
fn rotations(_: &ModelConfig, _: &Recipe, _: &[(String, [usize; 2])]) -> usize {
    0
}

/// The quantized model and what is learned of it, with the moments of Adam; the heads: the source's, and ours as it was read, packed, and packed
/// transposed; every block's input; logits; and one block at work, of the source or of the quantized model, with what its backward pass needs.
fn tuning(
    config: &ModelConfig,
    recipe: &Recipe,
    shapes: &[(String, [usize; 2])],
    block_bytes: usize,
) -> usize {
    let Some(Learn::Tune(_)) = recipe.learn else { return 0 };
    let keep = recipe.input.map_or(0, |input| input.keep);
    let length = recipe.calibration.sequence_length;
    let learned: usize = shapes.iter().map(|(_, [out, _])| out * (1 + keep)).sum();
    let outs: usize = shapes.iter().map(|(_, [out, _])| out).sum();
    let norms = config.norm_shapes().len();
    let passed = length * ((6 + 2 * norms) * config.hidden_size + 4 * config.intermediate_size + 2 * outs)
        + length * (5 * QUERIES * rayon::current_num_threads() + 3 * config.num_heads * config.head_dim)
        // The widest layer, widened and packed.
        + 2 * widest(shapes);
    let reading = weights(shapes) + TEACHER_ROWS.max(length) * wide(config);
    let all = config.num_layers * (7 * learned + length * config.hidden_size)
        + 4 * config.vocab_size * config.hidden_size
        + 2 * LOGITS.max(LOGIT_ROWS * config.vocab_size);
    config.num_layers * block_bytes + 4 * (all + passed.max(reading))
}

/// Logits that tuning has at a time, from either model.
const LOGITS: usize = 1 << 23;
/// Rows of them at least; SpinQuant has as many.
const LOGIT_ROWS: usize = 64;
/// Rows that tuning (specquant-learn, `tune.rs`) runs through the source together.
const TEACHER_ROWS: usize = 2048;
/// Queries whose attention a thread has at a time.
const QUERIES: usize = 128;

#[cfg(all(test, feature = "learn"))]
mod tests {
    use super::*;
    use crate::testing::tiny;

    fn of(config: &ModelConfig, recipe: &Recipe) -> usize {
        peak(config, recipe, &config.linear_shapes(0), 0, 0)
    }

    /// What learning takes grows with what is learned from, and never beyond what can be said.
    #[test]
    fn learning_takes_memory() {
        let source = tiny("llama-sharded");
        let config = source.config();
        let deeper = ModelConfig { num_layers: 4 * config.num_layers, ..config.clone() };
        for name in ["omniquant", "flatquant", "spinquant"] {
            let mut recipe = Recipe::load(name).unwrap();
            // Text that the model writes takes all blocks, too.
            recipe.calibration.file = Some("text".into());
            (recipe.calibration.samples, recipe.calibration.sequence_length) = (4, 64);
            let taught = of(config, &recipe);
            let untaught = of(config, &Recipe { learn: None, ..recipe.clone() });
            assert!(taught > untaught, "{name}: {taught} and {untaught}");
            let grows = of(&deeper, &recipe) > taught;
            assert_eq!(grows, name == "spinquant", "{name} learns on all blocks at once, or on one");
            recipe.calibration.sequence_length = 128;
            let longer = of(config, &recipe);
            assert!(longer > taught, "{name}: {longer} and {taught}");
            if name != "spinquant" {
                recipe.calibration.samples = 8;
                assert!(of(config, &recipe) > longer, "{name} keeps its sequences");
            }
            match recipe.learn.as_mut() {
                Some(Learn::OmniQuant(settings)) => settings.sequence_length = usize::MAX,
                Some(Learn::FlatQuant(settings)) => settings.sequence_length = usize::MAX,
                Some(Learn::SpinQuant(settings)) => settings.sequence_length = usize::MAX,
                _ => (),
            }
            (recipe.calibration.samples, recipe.calibration.sequence_length) = (1, 1 << 30);
            assert!(of(config, &recipe) > 1 << 40, "{name}");
        }
    }
}
