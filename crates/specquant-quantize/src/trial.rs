//! What a run would take, by the first block of it.

use std::time::Instant;

use serde::Serialize;
use serde_json::Map;
use specquant_model::Source;

use crate::Result;
use crate::learn::{self, Learn, TuneConfig};
use crate::output::{Destination, Output};
use crate::recipe::Recipe;
use crate::run::{Begun, Event, begin, blocks, check, write_config};

/// What a run would take, by its first block.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trial {
    /// Seconds of what is done once: reading all of the model for its checksum, writing text, learning rotations, embeddings and head.
    pub once_seconds: f64,
    /// Seconds of the first block.
    pub block_seconds: f64,
    /// Seconds of the steps of tuning at the end, by a few of models of one block and of four; 0 for a recipe that does not tune.
    pub tuning_seconds: f64,
    /// Seconds of all that, and of the other blocks if they take as long.
    pub seconds: f64,
    /// Bytes of all tensors, if the other blocks have as many.
    pub tensor_bytes: u64,
}

/// Does what [`run`](crate::run) would do up to the end of the first block, in a directory beside `destination` that is removed, and a few steps of tuning
/// with that block.
///
/// # Errors
/// As [`run`](crate::run).
pub fn first_block(
    source: &Source,
    recipe: &Recipe,
    texts: Option<&[Vec<u32>]>,
    destination: &Destination,
    progress: &mut dyn FnMut(Event),
) -> Result<Trial> {
    let texts = check(source, recipe, texts)?;
    let of = source.config().num_layers;
    let mut output = Output::open(&destination.trial()?, Map::new(), of + 1)?;
    let mut work = || -> Result<Trial> {
        let started = Instant::now();
        // As a run does.
        source.check_finite()?;
        source.fingerprint()?;
        let begun = begin(source, recipe, texts, &mut output, progress)?;
        let (once, once_bytes) = (started.elapsed().as_secs_f64(), output.bytes());
        let started = Instant::now();
        blocks(source, recipe, &begun, 1, &mut output, progress)?;
        let block = started.elapsed().as_secs_f64();
        let tuning = match &recipe.learn {
            Some(Learn::Tune(settings)) => tuning_seconds(source, recipe, settings, &begun, &mut output)?,
            _ => 0.0,
        };
        Ok(Trial {
            once_seconds: once,
            block_seconds: block,
            tuning_seconds: tuning,
            seconds: once + of as f64 * block + tuning,
            tensor_bytes: once_bytes + of as u64 * (output.bytes() - once_bytes),
        })
    };
    let trial = work();
    output.discard();
    trial
}

/// A step of models of one block and of some, all of them the first, tells what every block adds to the rest.
fn tuning_seconds(
    source: &Source,
    recipe: &Recipe,
    settings: &TuneConfig,
    begun: &Begun,
    output: &mut Output,
) -> Result<f64> {
    const SOME: usize = 4;
    write_config(&source.repeating_first_block(1), recipe, begun, output)?;
    output.write_index()?;
    let checkpoint = Source::open(output.path())?;
    let step = |layers| {
        let (teacher, student) =
            (source.repeating_first_block(layers), checkpoint.repeating_first_block(layers));
        learn::step_seconds(&teacher, &student, settings, &begun.texts)
    };
    let (one, some) = (step(1)?, step(SOME)?);
    let block = ((some - one) / (SOME - 1) as f64).max(0.0);
    let others = source.config().num_layers as f64 - 1.0;
    Ok(learn::steps(settings) as f64 * (one + others * block))
}
