//! What is to be measured, and for which table.

use serde_json::{Value, json};
use specquant_model::BranchBasis;
use specquant_quantize::branch::Score;
use specquant_quantize::rounding::GptqConfig;
use specquant_quantize::{Branch, Overhead, Recipe, Rounding, SEARCH, Searched, Smooth};

use crate::layers::MEAN_K;
use crate::{Result, Settings};

/// One configuration of the whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// How the model is quantized.
    pub recipe: Recipe,
    /// Items of every channel's branch that are loaded; all if `None`.
    pub k_run: Option<usize>,
    /// Seed of a function-preserving permutation of the hidden units of every MLP, made before anything else.
    pub permutation: Option<u64>,
}

impl Run {
    fn new(recipe: Recipe) -> Self {
        Run { recipe, k_run: None, permutation: None }
    }

    /// Everything that the result depends on but the model and the texts. The recipe's name is no such thing, nor where its calibration text
    /// lies.
    pub fn identity(&self) -> Value {
        let mut recipe = json!(self.recipe);
        if let Some(recipe) = recipe.as_object_mut() {
            recipe.remove("name");
            if let Some(calibration) = recipe.get_mut("calibration").and_then(Value::as_object_mut) {
                calibration.remove("file");
            }
        }
        json!({ "recipe": recipe, "k_run": self.k_run, "permutation": self.permutation })
    }
}

/// The paper's settings of its Table 1, bits of weights, activations and KV cache, and ours for them.
pub const SCHEMES: [(&str, &str); 3] = [("4-16-16", "W4A16"), ("4-4-16", "W4A4KV16"), ("4-4-4", "W4A4KV4")];
/// The setting that `quick` leaves out.
const WEIGHT_ONLY: &str = "4-16-16";
/// Recipes, the settings that they are shown at, and whether `quick` leaves them out. Of the paper's methods its own rows: AWQ is for weights
/// alone, OmniQuant has no row at 4-4-16; SpinQuant's rotations are learned against quantized activations here, so that there is nothing to learn
/// at 4-16-16, and FlatQuant its transforms. `svdquant`, `smooth-gptq`, `flatquant` and our own recipes are what the paper lacks.
const METHODS: [(&str, &[&str], bool); 13] = [
    ("rtn", &["4-16-16", "4-4-16", "4-4-4"], false),
    ("smoothquant", &["4-16-16", "4-4-16", "4-4-4"], false),
    ("gptq", &["4-16-16", "4-4-16", "4-4-4"], false),
    ("awq", &["4-16-16"], false),
    ("omniquant", &["4-16-16", "4-4-4"], true),
    ("quarot", &["4-16-16", "4-4-16", "4-4-4"], false),
    ("spinquant", &["4-4-16", "4-4-4"], true),
    ("flatquant", &["4-4-16", "4-4-4"], true),
    ("svdquant", &["4-4-16", "4-4-4"], true),
    ("smooth-gptq", &["4-16-16", "4-4-16", "4-4-4"], false),
    ("specquant", &["4-16-16", "4-4-16", "4-4-4"], false),
    ("spectral", &["4-16-16", "4-4-16", "4-4-4"], false),
    ("spectral-tuned", &["4-16-16", "4-4-16", "4-4-4"], true),
];
/// Methods of this table that need the feature `learn`.
const LEARNED: [&str; 4] = ["omniquant", "spinquant", "flatquant", "spectral-tuned"];
/// Calibration sequences where scores are compared, half of the default: many runs that differ in one thing.
const SCORE_SAMPLES: usize = 8;
/// The setting of the paper's ablations.
const ABLATION: &str = "W4A4KV16";

/// A cell of the ablation grid (Table 3).
pub struct Cell {
    /// Whether α is searched, or nothing is smoothed.
    pub smooth: bool,
    /// Whether the lowest 16 Fourier bins a channel are kept.
    pub truncate: bool,
    /// GPTQ, or nearest rounding.
    pub gptq: bool,
    /// The cell's run.
    pub run: Run,
}

/// All runs, by the table that shows them.
pub struct Plan {
    /// Table 1: a method and its run under every one of [`SCHEMES`], where it has one.
    pub methods: Vec<(String, [Option<Run>; 3])>,
    /// SmoothQuant at other migration strengths: its authors tuned α for each model.
    pub alphas: Vec<(f32, Run)>,
    /// Table 3.
    pub grid: Vec<Cell>,
    /// Table 4: k, the same for all channels.
    pub sweep: Vec<(usize, Run)>,
    /// The checkpoint of the largest k, loaded with fewer bins.
    pub k_run: Vec<(usize, Run)>,
    /// Table 5: by score, a run for every calibration seed.
    pub scores: Vec<(Score, Vec<Run>)>,
    /// Other bases with the bits of 16 Fourier bins.
    pub bases: Vec<(BranchBasis, Run)>,
    /// SpecQuant within the bits of plain 4-bit weights; narrow layers have too few of them.
    pub matched: Option<Run>,
    /// SpecQuant on a model with permuted MLP units, and the same without a branch: GPTQ, too, goes through the inputs in their order.
    pub permuted: Vec<(Run, Run)>,
}

impl Plan {
    /// bins: of the narrowest layer's spectrum, which bounds how many can be kept.
    ///
    /// # Errors
    /// When a built-in recipe does not load.
    pub fn new(settings: &Settings, bins: usize) -> Result<Self> {
        let quick = settings.quick;
        let recipe = |name: &str, scheme: &str| -> Result<Recipe> {
            let mut recipe = Recipe::load(name)?;
            recipe.scheme = recipe.scheme.with_widths(scheme)?;
            recipe.calibration.file = Some(settings.calibration.clone());
            if quick {
                recipe.calibration.samples = 4;
                recipe.calibration.search_tokens = 128;
            }
            Ok(recipe)
        };
        let with_branch = |recipe: &Recipe, change: &dyn Fn(&mut Branch)| {
            let mut recipe = recipe.clone();
            let branch = recipe.branch.get_or_insert_default();
            change(branch);
            if branch.mean_k == 0 && branch.rank == 0 {
                recipe.branch = None;
            }
            Run::new(recipe)
        };

        let mut methods = Vec::new();
        for (name, settings, slow) in METHODS {
            if (quick && slow) || (LEARNED.contains(&name) && !cfg!(feature = "learn")) {
                continue;
            }
            let mut runs = [const { None }; 3];
            for (run, (setting, scheme)) in runs.iter_mut().zip(SCHEMES) {
                if settings.contains(&setting) && !(quick && setting == WEIGHT_ONLY) {
                    *run = Some(Run::new(recipe(name, scheme)?));
                }
            }
            if runs.iter().any(Option::is_some) {
                methods.push((name.to_owned(), runs));
            }
        }

        let mut alphas = Vec::new();
        for alpha in if quick { &[][..] } else { &[0.3, 0.5, 0.7, 0.85] } {
            let mut recipe = recipe("smoothquant", ABLATION)?;
            if let Some(smooth) = &mut recipe.smooth {
                smooth.smoothing_strength = Searched::Fixed(*alpha);
            }
            alphas.push((*alpha, Run::new(recipe)));
        }

        let spec = recipe("specquant", ABLATION)?;
        let mut grid = Vec::new();
        for gptq in [false, true] {
            for (smooth, truncate) in [(false, false), (true, false), (false, true), (true, true)] {
                let mut recipe = spec.clone();
                recipe.smooth = smooth.then_some(Smooth {
                    smoothing_strength: SEARCH,
                    method: Default::default(),
                    all_sites: true,
                });
                recipe.branch = recipe.branch.filter(|_| truncate);
                recipe.rounding = if gptq { Rounding::Gptq(GptqConfig::default()) } else { Rounding::Rtn {} };
                grid.push(Cell { smooth, truncate, gptq, run: Run::new(recipe) });
            }
        }

        let uniform = |b: &mut Branch, k: usize| {
            (b.mean_k, b.max_k, b.score, b.temperature) = (k, 0, Score::Uniform, Searched::Fixed(0.0));
        };
        let ks: &[usize] = if quick { &[0, 16, 64] } else { &[0, 4, 8, 16, 32, 64] };
        let ks: Vec<usize> = ks.iter().copied().filter(|&k| k <= bins).collect();
        let sweep: Vec<(usize, Run)> =
            ks.iter().map(|&k| (k, with_branch(&spec, &|b| uniform(b, k)))).collect();
        let largest = ks.last().copied().unwrap_or(0);
        let full = with_branch(&spec, &|b| uniform(b, largest));
        let k_run = ks.iter().filter(|k| **k < largest).map(|&k| (k, Run { k_run: Some(k), ..full.clone() }));

        // One α and one temperature: what is compared is the score alone.
        let mut plain = spec.clone();
        plain.calibration.samples = plain.calibration.samples.min(SCORE_SAMPLES);
        if let Some(smooth) = &mut plain.smooth {
            smooth.smoothing_strength = Searched::Fixed(0.5);
        }
        let scores: &[Score] = match quick {
            // Those that the claims speak of.
            true => &[Score::Uniform, Score::Entropy, Score::ActivationAware],
            false => &[
                Score::Uniform,
                Score::AbsMean,
                Score::AbsMax,
                Score::L2,
                Score::Entropy,
                Score::ActivationAware,
            ],
        };
        let seeds = if quick { 2 } else { 5 };
        let of_score = |score: Score| {
            let t = if score == Score::Uniform { 0.0 } else { 1.0 };
            let runs = (0..seeds).map(|seed| {
                let mut run =
                    with_branch(&plain, &|b| (b.score, b.temperature) = (score, Searched::Fixed(t)));
                run.recipe.seed = seed;
                run
            });
            (score, runs.collect())
        };
        let bases: &[BranchBasis] = match quick {
            true => &[BranchBasis::Fourier, BranchBasis::Rows],
            false => &BranchBasis::ALL,
        };
        let bases = bases.iter().map(|&basis| {
            let run = with_branch(&spec, &|b| {
                uniform(b, MEAN_K);
                b.basis = basis;
            });
            (basis, run)
        });
        let permutations = if quick { 0 } else { 3 };
        Ok(Plan {
            methods,
            alphas,
            grid,
            k_run: k_run.collect(),
            sweep,
            scores: scores.iter().copied().map(of_score).collect(),
            bases: bases.collect(),
            matched: (!quick).then(|| with_branch(&spec, &|b| b.overhead = Overhead::Matched)),
            permuted: (0..permutations)
                .map(|seed| {
                    let permuted = |run: Run| Run { permutation: Some(seed), ..run };
                    (permuted(Run::new(spec.clone())), permuted(with_branch(&spec, &|b| b.mean_k = 0)))
                })
                .collect(),
        })
    }

    /// Every run once, those that share a checkpoint one after another; methods that take long come late, and the many runs of Table 5 last.
    pub fn runs(&self) -> Vec<&Run> {
        let slow = |name: &str| METHODS.iter().any(|(n, _, slow)| *n == name && *slow);
        let methods = |late: bool| {
            let these = self.methods.iter().filter(move |(name, _)| slow(name) == late);
            these.flat_map(|(_, runs)| runs.iter().flatten())
        };
        let all =
            methods(false).chain(self.alphas.iter().map(|(_, r)| r)).chain(self.grid.iter().map(|c| &c.run));
        let all = all.chain(self.sweep.iter().chain(&self.k_run).map(|(_, r)| r));
        let all = all.chain(self.bases.iter().map(|(_, r)| r)).chain(&self.matched);
        let all = all.chain(self.permuted.iter().flat_map(|(own, without)| [own, without]));
        let all = all.chain(methods(true)).chain(self.scores.iter().flat_map(|(_, runs)| runs));
        let mut runs: Vec<(Value, &Run)> = Vec::new();
        for run in all {
            let identity = run.identity();
            if runs.iter().all(|(known, _)| *known != identity) {
                runs.push((identity, run));
            }
        }
        runs.into_iter().map(|(_, run)| run).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn settings(quick: bool) -> Settings {
        Settings {
            text: "text.txt".into(),
            calibration: "calibration.txt".into(),
            windows: 2,
            data: None,
            limit: 0,
            quick,
            output: "out".into(),
            resume: false,
            command: "specquant reproduce".to_owned(),
        }
    }

    #[test]
    fn every_configuration_is_valid_and_listed_once() {
        for quick in [false, true] {
            let plan = Plan::new(&settings(quick), 289).unwrap();
            let runs = plan.runs();
            for run in &runs {
                run.recipe.validate().unwrap();
            }
            let identities: Vec<String> = runs.iter().map(|r| r.identity().to_string()).collect();
            let method = |name: &str| {
                let (_, [_, run, _]) = plan.methods.iter().find(|(n, _)| n == name).unwrap();
                run.as_ref().unwrap().identity()
            };
            for (cell, name) in [(0, "rtn"), (4, "gptq"), (5, "smooth-gptq"), (7, "specquant")] {
                assert_eq!(plan.grid[cell].run.identity(), method(name), "{name}");
            }
            assert_eq!(plan.sweep[0].1.identity(), method("smooth-gptq"));
            // Cells of the grid that are methods of Table 1 by another name, the branch without bins, and the Fourier basis.
            let shared =
                [&plan.grid[4].run, &plan.grid[5].run, &plan.grid[7].run, &plan.sweep[0].1, &plan.bases[0].1];
            for run in shared {
                let own = run.identity().to_string();
                assert_eq!(identities.iter().filter(|i| **i == own).count(), 1);
            }
            // What shares a checkpoint stands together, so that it is made once.
            let checkpoints = runs.iter().map(|r| Run { k_run: None, ..(*r).clone() }.identity());
            let mut seen: Vec<Value> = checkpoints.collect();
            seen.dedup();
            let made = seen.len();
            seen.sort_by_key(Value::to_string);
            seen.dedup();
            assert_eq!(seen.len(), made);
        }
    }

    #[test]
    fn an_identity_is_what_the_result_depends_on() {
        let run = Plan::new(&settings(false), 289).unwrap().matched.unwrap();
        let mut same = run.clone();
        same.recipe.name = "another".to_owned();
        same.recipe.calibration.file = Some("/elsewhere/calibration.txt".into());
        same.recipe.threads = Some(1);
        assert_eq!(same.identity(), run.identity());
        for change in [
            &|r: &mut Run| r.recipe.seed = 1,
            &|r: &mut Run| r.k_run = Some(3),
            &|r: &mut Run| r.permutation = Some(0),
            &|r: &mut Run| r.recipe.calibration.samples += 1,
        ] as [&dyn Fn(&mut Run); 4]
        {
            let mut other = run.clone();
            change(&mut other);
            assert_ne!(other.identity(), run.identity());
        }
    }
}
