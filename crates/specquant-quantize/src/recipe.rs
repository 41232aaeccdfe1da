//! A recipe: which transform, branch and rounding, at which widths, calibrated on what.
//!
//! Every method of the paper's Table 1 is one point of *transform × branch × rounding × scheme*; a recipe (TOML) names a
//! point, and a method name is a built-in recipe. Every option of `specquant quantize` is a key here, and the recipe as run is
//! stored in the checkpoint.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use specquant_model::{BranchBasis, Levels, RotationKind, Scheme};

use crate::branch::Score;
use crate::learn::Learn;
use crate::rounding::{ClipSearch, GptqConfig};
use crate::{Error, Result};

/// The built-in recipes: name and text.
pub const BUILT_IN: [(&str, &str); 16] = [
    ("spectral", include_str!("../recipes/spectral.toml")),
    ("spectral-tuned", include_str!("../recipes/spectral-tuned.toml")),
    ("specquant", include_str!("../recipes/specquant.toml")),
    ("svdquant", include_str!("../recipes/svdquant.toml")),
    ("quarot", include_str!("../recipes/quarot.toml")),
    ("spinquant", include_str!("../recipes/spinquant.toml")),
    ("spinquant-paper", include_str!("../recipes/spinquant-paper.toml")),
    ("flatquant", include_str!("../recipes/flatquant.toml")),
    ("flatquant-paper", include_str!("../recipes/flatquant-paper.toml")),
    ("omniquant", include_str!("../recipes/omniquant.toml")),
    ("omniquant-paper", include_str!("../recipes/omniquant-paper.toml")),
    ("awq", include_str!("../recipes/awq.toml")),
    ("gptq", include_str!("../recipes/gptq.toml")),
    ("smooth-gptq", include_str!("../recipes/smooth-gptq.toml")),
    ("smoothquant", include_str!("../recipes/smoothquant.toml")),
    ("rtn", include_str!("../recipes/rtn.toml")),
];

/// A full description of a quantization run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Shown in reports.
    pub name: String,
    /// Bit widths, granularity and run-time clip ratios.
    #[serde(default)]
    pub scheme: Scheme,
    /// Rotation of the residual stream, of heads, and of the inputs of `o_proj` and `down_proj`; none if absent. It comes before smoothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotate: Option<Rotate>,
    /// Smoothing; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smooth: Option<Smooth>,
    /// Change of coordinates of every layer's input at run time; none if absent. It comes after smoothing, before the branch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<InputChange>,
    /// Whether every input gets the clip ratio of activations under which its quantized layers are nearest to full precision on the calibration text, in place
    /// of the scheme's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub search_act_clip: bool,
    /// Whether keys and values are cached as their difference from the mean ones of the calibration text. Attention is the same without the mean of
    /// the keys, which moves all scores of a query alike; the mean of the values is added to what it returns.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kv_center: bool,
    /// The 16-bit branch; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<Branch>,
    /// What is learned by gradients; nothing if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learn: Option<Learn>,
    /// How the residual becomes integers.
    pub rounding: Rounding,
    /// Search for the clip ratio of weight scales.
    #[serde(default)]
    pub weight_clip: ClipSearch,
    /// Storage of embeddings and `lm_head`.
    #[serde(default)]
    pub embeddings: Embeddings,
    /// The tokens that statistics and Hessians come from.
    #[serde(default)]
    pub calibration: Calibration,
    /// Seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// Worker threads; all cores if absent. The result does not depend on it, so it is not stored.
    #[serde(default, skip_serializing)]
    pub threads: Option<usize>,
}

/// A number, or the word "search".
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Searched {
    /// This value.
    Fixed(f32),
    /// The best of a grid, by the error of the quantized layers' outputs.
    Search(SearchWord),
}

/// The word "search".
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SearchWord {
    /// See [`Searched::Search`].
    Search,
}

/// "search".
pub const SEARCH: Searched = Searched::Search(SearchWord::Search);

impl std::str::FromStr for Searched {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "search" => Ok(SEARCH),
            number => number
                .parse()
                .map(Searched::Fixed)
                .map_err(|_| format!("\"{number}\" is neither a number nor \"search\"")),
        }
    }
}

/// Rotations (QuaRot, arXiv 2404.00456).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotate {
    /// Kind of the orthonormal transforms.
    pub kind: RotationKind,
    /// Whether the residual stream is rotated, folded into weights, and with it the inputs of `o_proj` and `down_proj` at run time. Otherwise only the
    /// heads of v are, folded as well.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub residual: bool,
    /// Whether the heads of q and k are rotated too, after RoPE, which spreads outliers of the KV cache.
    #[serde(default = "yes")]
    pub qk: bool,
}

/// The change of coordinates of every layer's input.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputChange {
    /// Rotation of the input, before directions are kept.
    pub rotation: RotationKind,
    /// Directions of every input that keep 8 bits, in the activation and in the weight.
    #[serde(default)]
    pub keep: usize,
}

/// Per-channel smoothing: the factors λ that inputs are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Smooth {
    /// How λ follows from the statistics.
    #[serde(default)]
    pub method: SmoothMethod,
    /// Migration strength α in [0, 1] (SmoothQuant's name), or the word "search": over 0, 0.05 … 1 and no smoothing at all.
    pub smoothing_strength: Searched,
    /// Also fold v_proj → o_proj and up_proj → down_proj. SmoothQuant folds only the two norms.
    #[serde(default = "yes")]
    pub all_sites: bool,
}

/// How smoothing factors follow from the statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SmoothMethod {
    /// `max|x|^α / max|w|^(1-α)` (arXiv 2211.10438, Eq. 4).
    #[default]
    SmoothQuant,
    /// `mean|x|^α`, normalized by the geometric mean of its extremes (arXiv 2306.00978; llm-awq, `auto_scale.py`). The search tries 0, 0.05 … 0.95.
    Awq,
}

fn yes() -> bool {
    true
}

fn is_yes(value: &bool) -> bool {
    *value
}

/// The 16-bit branch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Branch {
    /// Which directions are kept.
    pub basis: BranchBasis,
    /// k̄: complex coefficients kept per output channel, on average (paper, section "Implementation details": 16 at 4 bits). The other bases
    /// get as many bits as that many Fourier bins take, indices and stored directions included.
    pub mean_k: usize,
    /// For `svd`, `wsvd` and `rows`: the rank, in place of the budget of `mean_k`; 0 for that.
    pub rank: usize,
    /// The most that one channel keeps, in the unit of `mean_k`; 0 for everything. It is also the width of the projection that
    /// all channels share at run time, 2·max_k − 1, which the paper does not bound.
    pub max_k: usize,
    /// What a channel's share of the budget follows, in bases that give every channel its own.
    pub score: Score,
    /// Shares are softmax(T · z-score); 0 is uniform. The search tries 0, 0.25, 0.5 and 1.
    pub temperature: Searched,
    /// For `svd` and `wsvd`: how many fits are tried at most, each to what rounding the residual of the one before left.
    pub iterations: usize,
    /// Whether the branch's bits are taken from the residual.
    pub overhead: Overhead,
}

impl Default for Branch {
    /// A Fourier branch of no size, all channels alike, at most twice the paper's mean in one of them.
    fn default() -> Self {
        Branch {
            basis: BranchBasis::Fourier,
            mean_k: 0,
            rank: 0,
            max_k: 32,
            score: Score::Uniform,
            temperature: Searched::Fixed(0.0),
            iterations: 0,
            overhead: Overhead::Plain,
        }
    }
}

/// Who pays for the bits of a branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overhead {
    /// They come on top.
    #[default]
    Plain,
    /// The least sensitive channels of the residual get one bit less, so that the layer takes no more bits than without a branch (paper, section
    /// "Implementation details").
    Matched,
}

/// How weights become integers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Rounding {
    /// To nearest, half to even.
    Rtn {},
    /// With second-order error feedback (arXiv 2210.17323).
    Gptq(GptqConfig),
}

/// Storage of embeddings and `lm_head`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Embeddings {
    /// bf16 if the source is bf16, else f16.
    #[default]
    #[serde(rename = "16bit")]
    Half,
    /// Symmetric int8, a scale per row.
    Int8,
}

/// Where calibration tokens come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// A text or jsonl file, of which the first 8 MiB are read; if absent the model writes its own text (LLM-QAT, arXiv 2305.17888).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Number of sequences.
    #[serde(default = "default_samples")]
    pub samples: usize,
    /// Tokens of each.
    #[serde(default = "default_length")]
    pub sequence_length: usize,
    /// Tokens, of all those, on which searches compare outputs.
    #[serde(default = "default_search_tokens")]
    pub search_tokens: usize,
}

fn default_samples() -> usize {
    16
}

fn default_length() -> usize {
    512
}

fn default_search_tokens() -> usize {
    256
}

/// Calibration tokens at most; far more than helps.
const MAX_TOKENS: usize = 1 << 31;

impl Default for Calibration {
    fn default() -> Self {
        Calibration {
            file: None,
            samples: default_samples(),
            sequence_length: default_length(),
            search_tokens: default_search_tokens(),
        }
    }
}

impl Recipe {
    /// A built-in recipe by name, or the recipe in a TOML file.
    ///
    /// # Errors
    /// [`Error::Recipe`] for an unknown name, an unreadable file, an unknown key, or a value out of range.
    pub fn load(name_or_file: &str) -> Result<Self> {
        if let Some((_, text)) = BUILT_IN.iter().find(|(name, _)| *name == name_or_file) {
            return Recipe::parse(text, name_or_file);
        }
        let names = BUILT_IN.map(|(name, _)| name).join(", ");
        let text = std::fs::read_to_string(Path::new(name_or_file)).map_err(|e| {
            Error::Recipe(format!(
                "\"{name_or_file}\" is neither a built-in recipe ({names}) nor a readable file: {e}"
            ))
        })?;
        Recipe::parse(&text, name_or_file)
    }

    /// Whether the branch is chosen by the second moment of the inputs.
    pub fn branch_needs_hessian(&self) -> bool {
        self.branch.as_ref().is_some_and(|b| matches!(b.basis, BranchBasis::Rows | BranchBasis::Wsvd))
    }

    /// Whether anything needs the second moment of the inputs.
    pub fn needs_hessian(&self) -> bool {
        matches!(self.rounding, Rounding::Gptq(_))
            || self.branch_needs_hessian()
            || self.input.is_some_and(|input| input.keep > 0)
    }

    /// The calibration text that a run can use: more sequences than statistics are made of where there is something to learn from them.
    pub fn text(&self) -> Calibration {
        let samples = self.learn.as_ref().map_or(0, Learn::sequences).max(self.calibration.samples);
        Calibration { samples, ..self.calibration.clone() }
    }

    fn parse(text: &str, origin: &str) -> Result<Self> {
        let recipe: Recipe = toml::from_str(text).map_err(|e| Error::Recipe(format!("{origin}: {e}")))?;
        recipe.validate()?;
        Ok(recipe)
    }

    /// Checks every value that no model is needed for.
    ///
    /// # Errors
    /// [`Error::Recipe`] names the key and its range.
    pub fn validate(&self) -> Result<()> {
        // All of it at once: nobody wants to mend one and be told of the next.
        let mut wrong: Vec<String> = self.scheme.validate().err().iter().map(ToString::to_string).collect();
        let mut refuse = |why: String| wrong.push(why);
        if let Some(Smooth { smoothing_strength: Searched::Fixed(a), .. }) = self.smooth
            && !(0.0..=1.0).contains(&a)
        {
            refuse(format!("smooth.smoothing_strength = {a}: choose 0 to 1, or \"search\""));
        }
        if let (Some(Rotate { residual: true, .. }), Some(Smooth { all_sites: true, .. })) =
            (self.rotate, self.smooth)
        {
            refuse(
                "rotate and smooth.all_sites = true: the inputs of o_proj and down_proj are rotated after the layers that smoothing would \
                 fold into; set smooth.all_sites = false"
                    .to_owned(),
            );
        }
        if let Some(branch) = &self.branch {
            branch.validate(self.scheme.weight_bits).map_err(why).unwrap_or_else(&mut refuse);
        }
        let smooth_o = self.smooth.is_some_and(|s| s.all_sites);
        if self.kv_center && smooth_o {
            refuse(
                "kv_center and smooth.all_sites = true: smoothing the input of o_proj would move the mean value; set smooth.all_sites = false"
                    .to_owned(),
            );
        }
        if let (Some(_), Some(Smooth { smoothing_strength: Searched::Search(_), .. })) =
            (self.input, self.smooth)
        {
            refuse(
                "smooth.smoothing_strength = \"search\" does not see what [input] does behind it: give a number, or leave out [smooth]"
                    .to_owned(),
            );
        }
        if self.scheme.levels == Levels::Gaussian {
            let learned = matches!(self.learn, Some(Learn::FlatQuant(_)));
            let rotated = self.input.is_some() || self.rotate.is_some_and(|r| r.residual) || learned;
            let why = match (&self.branch, &self.learn) {
                _ if !rotated => "without a rotation inputs are far from Gaussian: add [input] or [rotate]",
                _ if self.scheme.kv_clip.is_some() && self.scheme.kv_bits == 4 => {
                    "the cache chooses the scale of every row, so there is no kv_clip (--kv-clip)"
                }
                (Some(Branch { overhead: Overhead::Matched, .. }), _) => {
                    "branch.overhead = \"matched\" gives some channels 3 bits, for which there are no levels"
                }
                (_, Some(Learn::OmniQuant(_) | Learn::FlatQuant(_) | Learn::SpinQuant(_))) => {
                    "what [learn] learns is learned for evenly spaced codes"
                }
                _ => "",
            };
            if !why.is_empty() {
                refuse(format!("scheme.levels = \"gaussian\": {why}; set levels = \"uniform\""));
            }
        }
        if let Some(learn) = &self.learn {
            learn.validate(self).map_err(why).unwrap_or_else(&mut refuse);
        }
        if let Rounding::Gptq(g) = &self.rounding
            && (!(g.dampening_frac > 0.0 && g.dampening_frac <= 1.0) || g.block_size == 0)
        {
            refuse("rounding: dampening_frac lies in (0, 1] and block_size is at least 1".to_owned());
        }
        let clip = &self.weight_clip;
        if clip.enabled
            && (!(1..=MAX_TRIES).contains(&clip.grid)
                || !(0.0..1.0).contains(&clip.max_shrink)
                || clip.norm.is_nan()
                || clip.norm <= 0.0)
        {
            refuse(format!(
                "weight_clip: grid lies in 1 to {MAX_TRIES}, max_shrink in [0, 1), and norm is positive"
            ));
        }
        let c = &self.calibration;
        let samples = self.text().samples;
        if samples.checked_mul(c.sequence_length).is_none_or(|tokens| tokens > MAX_TOKENS) {
            refuse(format!(
                "calibration: {samples} samples × {} tokens of sequence_length is more than {MAX_TOKENS} tokens",
                c.sequence_length
            ));
        }
        if c.samples == 0 || c.sequence_length < 2 || c.search_tokens == 0 {
            refuse(
                "calibration: samples and search_tokens are at least 1, sequence_length at least 2"
                    .to_owned(),
            );
        }
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(Error::Recipe(wrong.join("\n"))),
        }
    }
}

impl Branch {
    fn validate(&self, weight_bits: u8) -> Result<()> {
        let refuse = |why: String| Err(Error::Recipe(why));
        let &Branch { basis, mean_k, rank, max_k, score, temperature, iterations, overhead } = self;
        let (name, shared) = (basis.name(), basis.is_shared());
        if let Searched::Fixed(t) = temperature
            && !(0.0..=100.0).contains(&t)
        {
            return refuse(format!("branch.temperature = {t}: choose 0 (uniform) to 100, or \"search\""));
        }
        if max_k > 0 && max_k < mean_k && !shared {
            return refuse(format!(
                "branch.max_k = {max_k} is less than branch.mean_k = {mean_k}: raise it (--max-k), or 0 for no bound"
            ));
        }
        if rank > 0 && !shared {
            return refuse(format!(
                "branch.rank: the basis {name} keeps bins of every channel; give branch.mean_k (--mean-k)"
            ));
        }
        if mean_k > MAX_ITEMS || rank > MAX_ITEMS {
            return refuse(format!("branch: mean_k and rank are at most {MAX_ITEMS}"));
        }
        if shared && (score != Score::Uniform || temperature != Searched::Fixed(0.0)) {
            return refuse(format!(
                "branch.score and branch.temperature: all channels share the directions of the basis {name}; set score = \"uniform\" (--score) and \
                 temperature = 0 (--temperature)"
            ));
        }
        if iterations > MAX_TRIES {
            return refuse(format!("branch.iterations is at most {MAX_TRIES}"));
        }
        if iterations > 1 && !basis.is_low_rank() {
            return refuse(format!("branch.iterations: only svd and wsvd are fitted again, not {name}"));
        }
        if overhead == Overhead::Matched && !(3..=4).contains(&weight_bits) {
            return refuse(format!(
                "branch.overhead = \"matched\" gives some channels {weight_bits} − 1 bits, which needs weights of 3 or 4 bits"
            ));
        }
        Ok(())
    }
}

/// What is wrong, without what the whole recipe's error begins with.
fn why(e: Error) -> String {
    match e {
        Error::Recipe(why) => why,
        other => other.to_string(),
    }
}

/// Steps of a search at most: far more than help, and few enough that the search ends.
const MAX_TRIES: usize = 1000;

/// No layer keeps as many directions.
const MAX_ITEMS: usize = 1 << 14;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_recipes_parse_are_named_after_themselves_and_survive_a_round_trip() {
        let known = |text: &str| cfg!(feature = "learn") || !text.contains("[learn]");
        for (name, _) in BUILT_IN.into_iter().filter(|(_, text)| known(text)) {
            let recipe = Recipe::load(name).unwrap();
            assert_eq!(recipe.name, name);
            let json = serde_json::to_value(&recipe).unwrap();
            assert_eq!(serde_json::from_value::<Recipe>(json).unwrap(), recipe, "{name}");
        }
    }

    /// Before anything is quantized.
    #[cfg(feature = "learn")]
    #[test]
    fn settings_of_the_tuning_are_refused_by_name() {
        let base = "name = \"x\"\n[rounding]\nkind = \"rtn\"\n[learn]\nmethod = \"tune\"\n";
        for (text, word) in [
            ("steps = 0", "steps"),
            ("kept_lr = -1e-3", "kept_lr"),
            ("steps = 1000000\n[calibration]\nsequence_length = 4096", "tokens"),
        ] {
            let error = Recipe::parse(&format!("{base}{text}"), "test").unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn unknown_keys_names_and_ranges_are_refused_by_name() {
        let base = "name = \"x\"\n[rounding]\nkind = \"rtn\"\n";
        for (text, word) in [
            (format!("{base}[smooth]\nsmoothing_strength = 2.0"), "smoothing_strength"),
            (format!("{base}blok_size = 3"), "blok_size"),
            (format!("{base}[calibration]\nsamples = 4611686018427387904"), "tokens"),
            (format!("{base}[smooth]\nalpha = 0.5"), "alpha"),
            (format!("{base}[calibration]\nsamples = 0"), "samples"),
            (format!("{base}[scheme]\nweight_bits = 1\nact_bits = 4\nkv_bits = 4"), "W1"),
            (format!("{base}[weight_clip]\nmax_shrink = 1.5"), "max_shrink"),
            (format!("{base}[weight_clip]\ngrid = 65536"), "grid"),
            (format!("{base}[branch]\nbasis = \"svd\"\nrank = 8\niterations = 65536"), "iterations"),
            (format!("{base}[branch]\nrank = 8"), "mean_k"),
            (format!("{base}[branch]\nbasis = \"svd\"\nrank = 8\nscore = \"act\""), "share"),
            (format!("{base}[branch]\nbasis = \"dct\"\nmean_k = 8\niterations = 5"), "svd"),
            (format!("{base}[branch]\nbasis = \"walsh\"\nmean_k = 8"), "fourier-top"),
            (
                format!(
                    "{base}[scheme]\nweight_bits = 8\nact_bits = 8\nkv_bits = 8\n[branch]\nmean_k = 8\noverhead = \"matched\""
                ),
                "3 or 4",
            ),
            (format!("{base}[rotate]\nkind = \"hadamard\"\n[smooth]\nsmoothing_strength = 0.5"), "all_sites"),
            ("name = \"x\"".to_owned(), "rounding"),
        ] {
            let error = Recipe::parse(&text, "test.toml").unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let error = Recipe::load("no-such-recipe").unwrap_err().to_string();
        assert!(error.contains("no-such-recipe") && error.contains("awq, gptq"), "{error}");
    }
}
