//! A recipe: which transform, branch and rounding, at which widths, calibrated on what.
//!
//! Every method of the paper's Table 1 is one point of *transform × branch × rounding × scheme*; a recipe (TOML) names a
//! point, and a method name is a built-in recipe. Every option of `specquant quantize` is a key here, and the recipe as run is
//! stored in the checkpoint.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use specquant_model::Scheme;

use crate::branch::Score;
use crate::rounding::{ClipSearch, GptqConfig};
use crate::{Error, Result};

/// The built-in recipes: name and text.
pub const BUILT_IN: [(&str, &str); 5] = [
    ("specquant", include_str!("../recipes/specquant.toml")),
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
    /// Smoothing; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smooth: Option<Smooth>,
    /// The 16-bit branch; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<Fourier>,
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

/// Per-channel smoothing, `λ = max|x|^α / max|w|^(1-α)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Smooth {
    /// Migration strength α in [0, 1] (SmoothQuant's name). The search runs over 0, 0.05 … 1 and no smoothing at all.
    pub smoothing_strength: Searched,
    /// Also fold v_proj → o_proj and up_proj → down_proj. SmoothQuant folds only the two norms.
    #[serde(default = "yes")]
    pub all_sites: bool,
}

fn yes() -> bool {
    true
}

/// The low-frequency Fourier branch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fourier {
    /// k̄: complex coefficients kept per output channel, on average (paper, section "Implementation details": 16 at 4 bits).
    pub mean_k: usize,
    /// The most that one channel keeps; 0 for all of its floor(in/2)+1 bins. It is also the width of the projection that
    /// all channels share at run time, 2·max_k − 1, which the paper does not bound.
    #[serde(default = "default_max_k")]
    pub max_k: usize,
    /// What a channel's share of the budget follows.
    pub score: Score,
    /// Shares are softmax(T · z-score); 0 is uniform. The search tries 0, 0.25, 0.5 and 1.
    pub temperature: Searched,
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
    /// A text or jsonl file; if absent the model writes its own text (LLM-QAT, arXiv 2305.17888).
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

/// [`Fourier::max_k`] unless a recipe says otherwise: twice the paper's mean.
pub const DEFAULT_MAX_K: usize = 32;

fn default_max_k() -> usize {
    DEFAULT_MAX_K
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
        self.scheme.validate()?;
        let refuse = |why: String| Err(Error::Recipe(why));
        if let Some(Smooth { smoothing_strength: Searched::Fixed(a), .. }) = self.smooth
            && !(0.0..=1.0).contains(&a)
        {
            return refuse(format!("smooth.smoothing_strength = {a}: choose 0 to 1, or \"search\""));
        }
        if let Some(Fourier { mean_k, max_k, temperature, .. }) = self.branch {
            if let Searched::Fixed(t) = temperature
                && !(0.0..=100.0).contains(&t)
            {
                return refuse(format!("branch.temperature = {t}: choose 0 (uniform) to 100, or \"search\""));
            }
            if max_k > 0 && max_k < mean_k {
                return refuse(format!(
                    "branch.max_k = {max_k} is less than branch.mean_k = {mean_k}: raise it (--max-k), or 0 for no bound"
                ));
            }
        }
        if let Rounding::Gptq(g) = &self.rounding
            && (!(g.dampening_frac > 0.0 && g.dampening_frac <= 1.0) || g.block_size == 0)
        {
            return refuse("rounding: dampening_frac lies in (0, 1] and block_size is at least 1".to_owned());
        }
        let clip = &self.weight_clip;
        if clip.enabled
            && (clip.grid == 0
                || !(0.0..1.0).contains(&clip.max_shrink)
                || clip.norm.is_nan()
                || clip.norm <= 0.0)
        {
            return refuse(
                "weight_clip: grid is at least 1, max_shrink lies in [0, 1) and norm is positive".to_owned(),
            );
        }
        let c = &self.calibration;
        if c.samples.checked_mul(c.sequence_length).is_none_or(|tokens| tokens > MAX_TOKENS) {
            return refuse(format!(
                "calibration: samples × sequence_length is more than {MAX_TOKENS} tokens"
            ));
        }
        if c.samples == 0 || c.sequence_length < 2 || c.search_tokens == 0 {
            return refuse(
                "calibration: samples and search_tokens are at least 1, sequence_length at least 2"
                    .to_owned(),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_recipes_parse_are_named_after_themselves_and_survive_a_round_trip() {
        for (name, _) in BUILT_IN {
            let recipe = Recipe::load(name).unwrap();
            assert_eq!(recipe.name, name);
            let json = serde_json::to_value(&recipe).unwrap();
            assert_eq!(serde_json::from_value::<Recipe>(json).unwrap(), recipe, "{name}");
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
            ("name = \"x\"".to_owned(), "rounding"),
        ] {
            let error = Recipe::parse(&text, "test.toml").unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let error = Recipe::load("no-such-recipe").unwrap_err().to_string();
        assert!(error.contains("no-such-recipe") && error.contains("specquant, gptq"), "{error}");
    }
}
