//! Speed and memory: integer products by shape, attention over the cache, decoder blocks of the shapes in the paper's Table 2, and whole models; each beside the same in f32 and
//! beside what the machine can do, all in one run.
//!
//! A time is the best of several calls that take turns with what they are compared with, for other programs only ever make a call slower. A
//! multiply-accumulate counts as two operations.

mod attention;
mod blocks;
mod made;
mod models;
mod plot;
mod products;
mod synth;

pub use attention::AttentionRow;
pub use blocks::{BlockRow, Shape};
pub use models::ModelRow;
pub use plot::roofline;
pub use products::{Product, ProductRow};
pub use synth::{ARCHS, Arch, synthesize};

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use specquant_kernels::{Isa, cpu_name, measure_ceilings};
use specquant_model::{Result, Source};

/// A part of a [`Report`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Products by shape.
    Products,
    /// Attention over the cache.
    Attention,
    /// Decoder blocks.
    Blocks,
    /// Whole models.
    Models,
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Every shape of the paper's Table 2, up to 8192 tokens a sequence, where otherwise two of them take part.
    pub full: bool,
    /// Models and checkpoints to run whole; the first is what the others are compared with.
    pub models: Vec<PathBuf>,
    /// Least time for every figure, in seconds.
    pub seconds: f64,
    /// The parts to measure; all of them if there are none.
    pub only: Vec<Part>,
}

impl Settings {
    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

/// Everything measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What the machine can do.
    pub machine: Machine,
    /// Products.
    pub products: Vec<ProductRow>,
    /// Attention over the cache.
    pub attention: Vec<AttentionRow>,
    /// Decoder blocks.
    pub blocks: Vec<BlockRow>,
    /// Whole models.
    pub models: Vec<ModelRow>,
}

/// The machine and its limits, measured.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// The processor, as the system names it, or its architecture.
    pub cpu: String,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Threads of all other figures.
    pub threads: usize,
    /// 8-bit multiply-accumulates from registers, 10⁹ operations a second.
    pub int8_gops: f64,
    /// The same in f32.
    pub f32_gflops: f64,
    /// Reading memory, 10⁹ bytes a second.
    pub read_gbs: f64,
}

/// A part of the work, for whoever waits.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Parts done.
    pub done: usize,
    /// Of so many.
    pub of: usize,
    /// The one that comes now.
    pub name: &'a str,
}

/// Measures everything; `progress` is told what comes next.
///
/// # Errors
/// When a model cannot be opened or run.
pub fn run(settings: &Settings, progress: &mut dyn FnMut(Step)) -> Result<Report> {
    // What cannot be opened is said before the minutes that the rest takes.
    settings.models.iter().try_for_each(|path| Source::open(path).map(drop))?;
    let products = if settings.wants(Part::Products) { &products::SHAPES[..] } else { &[] };
    let heads = if settings.wants(Part::Attention) { Shape::all(settings.full) } else { Vec::new() };
    let shapes = if settings.wants(Part::Blocks) { Shape::all(settings.full) } else { Vec::new() };
    let models = if settings.wants(Part::Models) { &settings.models[..] } else { &[] };
    let of = 1 + products.len() + heads.len() + shapes.len() + models.len();
    let mut done = 0;
    let mut tell = |name: &str| {
        progress(Step { done, of, name });
        done += 1;
    };
    tell("limits of the machine");
    let threads = rayon::current_num_threads();
    let ceilings = measure_ceilings(threads, (6.0 * settings.seconds).min(6.0));
    let machine = Machine {
        cpu: cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        isa: Isa::active().name(),
        threads,
        int8_gops: ceilings.int8_gops,
        f32_gflops: ceilings.f32_gflops,
        read_gbs: ceilings.read_gbs,
    };
    let mut report = Report {
        machine,
        products: Vec::new(),
        attention: Vec::new(),
        blocks: Vec::new(),
        models: Vec::new(),
    };
    for &shape in products {
        tell(&format!("product {} x {}", shape[0], shape[1]));
        report.products.extend(products::measure(shape, settings));
    }
    for shape in &heads {
        tell(&format!("attention of {}", shape.name));
        report.attention.extend(attention::measure(shape, settings));
    }
    for shape in &shapes {
        tell(&format!("block of {}", shape.name));
        report.blocks.extend(blocks::measure(shape, settings)?);
    }
    for path in models {
        tell(&path.display().to_string());
        report.models.push(models::measure(path, settings)?);
    }
    Ok(report)
}

/// Seconds in which a warm-up is lost, and other programs' work evens out.
const LONG: f64 = 20.0;

/// Shortest time of each of some calls, in seconds: they take turns, twice each at least after one that warms up, until each has had `seconds` on average. Who has
/// had more than twice that waits for the others, so that a slow call does not keep them from being called often. Calls that take [`LONG`] together are
/// called once.
fn best<const N: usize>(seconds: f64, mut calls: [&mut dyn FnMut(); N]) -> [f64; N] {
    let (mut least, mut spent, mut first) = ([f64::INFINITY; N], [0.0f64; N], [0.0; N]);
    let seconds = seconds.clamp(0.0, 1e6);
    for round in 0.. {
        let waits = |spent: f64| round > 2 && spent >= 2.0 * seconds;
        let others = spent.iter().filter(|spent| !waits(**spent));
        if round > 2 && others.clone().sum::<f64>() >= seconds * others.count() as f64 {
            break;
        }
        for (i, call) in calls.iter_mut().enumerate() {
            if waits(spent[i]) {
                continue;
            }
            let begun = Instant::now();
            call();
            let took = begun.elapsed().as_secs_f64();
            match round {
                0 => first[i] = took,
                _ => (spent[i], least[i]) = (spent[i] + took, least[i].min(took)),
            }
        }
        if round == 0 && first.iter().sum::<f64>() >= LONG {
            return first;
        }
    }
    least
}
