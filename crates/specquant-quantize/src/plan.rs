//! What can be known before a weight is read: whether the recipe fits the model, and what the run will cost.

use serde::Serialize;
use specquant_kernels::Kronecker;
use specquant_model::{Site, Source};

use crate::fallback::{self, Fallback};
use crate::learn::Learn;
use crate::recipe::{Embeddings, Overhead, Recipe, Rounding};
use crate::{Error, Result, branch, layer, memory};

/// What will happen, known before a weight is read.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Decoder blocks.
    pub blocks: usize,
    /// Linear layers to quantize.
    pub layers: usize,
    /// Their weights.
    pub weights: usize,
    /// Calibration tokens asked for.
    pub calibration_tokens: usize,
    /// Peak memory in bytes, estimated, without the pages of files that the system keeps mapped.
    pub peak_bytes: u64,
    /// Whether the hidden states of the calibration text lie in a mapped file, and not in memory.
    pub spill: bool,
    /// Bytes of the checkpoint's tensors, estimated.
    pub output_bytes: u64,
    /// Peak bytes on disk: the checkpoint, and what a run that continues it would need.
    pub disk_bytes: u64,
    /// Estimated bits per weight of the linear layers.
    pub bits_per_weight: f64,
    /// What will be done other than the recipe says, as far as the model's widths tell.
    pub fallbacks: Vec<Fallback>,
    /// Bytes of the hidden states.
    #[serde(skip)]
    states_bytes: u64,
    /// Peak memory without them.
    #[serde(skip)]
    spilled_peak_bytes: u64,
}

impl Plan {
    /// The same run with hidden states on the disk.
    pub fn spilled(self) -> Plan {
        match self.spill {
            true => self,
            false => Plan {
                peak_bytes: self.spilled_peak_bytes,
                disk_bytes: self.disk_bytes + self.states_bytes,
                spill: true,
                ..self
            },
        }
    }
}

/// What keeps the recipe from this model, a line each.
fn problems(source: &Source, recipe: &Recipe, shapes: &[(String, [usize; 2])]) -> Vec<String> {
    let config = source.config();
    let mut problems = Vec::new();
    if source.config_json().get("quantization_config").is_some_and(|q| !q.is_null()) {
        problems.push(format!(
            "  {} is quantized already: give the full-precision model",
            source.path().display()
        ));
    }
    if config.post_norms && recipe.rotate.is_some_and(|r| r.residual) {
        problems.push(
            "  the residual stream cannot be rotated: this model normalizes what o_proj and down_proj put out before it is added, and \
             the weights of those norms, which differ from channel to channel, stand between these layers and the stream that they would \
             have to rotate; use a recipe that rotates every layer's input behind its norm (--recipe spectral), or set rotate.residual = \
             false in the recipe's file"
                .to_owned(),
        );
    }
    let scheme = &recipe.scheme;
    let keep = recipe.input.map_or(0, |input| input.keep);
    for (name, [_, inp]) in shapes {
        let (inp, name) = (*inp, name.trim_start_matches("model.layers.0."));
        if keep >= inp {
            problems.push(format!(
                "  {name}: input.keep = {keep} leaves nothing of its {inp} inputs; lower it (--keep)"
            ));
            continue;
        }
        let inp = inp - keep;
        let group = scheme.group(inp);
        if !inp.is_multiple_of(group) || (group < inp && !group.is_multiple_of(8)) {
            let less = if keep > 0 { format!(" less {keep} kept ones (--keep)") } else { String::new() };
            let fits: Vec<String> = (16..inp.min(257))
                .step_by(8)
                .filter(|g| inp.is_multiple_of(*g))
                .map(|g| g.to_string())
                .collect();
            problems.push(format!("  {name}: group size {group} does not divide its {inp} inputs{less} into groups of a multiple of 8; these would: {}, or 0", fits.join(", ")));
        }
        let bins = inp / 2 + 1;
        if let Some(b) = recipe.branch.as_ref().filter(|b| b.basis.is_fourier() && b.mean_k > bins) {
            problems.push(format!(
                "  {name}: has {bins} frequency bins, fewer than branch.mean_k = {}; lower it (--mean-k)",
                b.mean_k
            ));
        }
    }
    if scheme.weight_bits == 16
        && *recipe
            != (Recipe {
                rotate: None,
                smooth: None,
                input: None,
                kv_center: false,
                search_act_clip: false,
                branch: None,
                rounding: Rounding::Rtn {},
                ..recipe.clone()
            })
    {
        problems.push(format!("  {scheme} leaves the weights alone, so rotations, smoothing, branch and GPTQ have nothing to do: use --recipe rtn"));
    }
    for (site, b) in Site::ALL.into_iter().flat_map(|site| recipe.branch.iter().map(move |b| (site, b))) {
        let (outs, inp) = (site_outputs(shapes, site), config.site_width(site).saturating_sub(keep));
        if b.mean_k > 0 && branch::items(b, outs, inp) == 0 {
            problems.push(format!(
                "  {}: {} Fourier bins per channel are too few bits for a branch of the basis {}; raise --mean-k",
                site.name(),
                b.mean_k,
                b.basis.name()
            ));
        }
        if b.basis.is_fourier() && inp / 2 >= usize::from(u16::MAX) {
            problems.push(format!(
                "  {}: {inp} inputs have more frequency bins than can be numbered",
                site.name()
            ));
        }
        if b.overhead != Overhead::Matched {
            continue;
        }
        // The table of bits costs 8 a channel.
        let saved = layer::narrowing_saves(inp, scheme.weight_bits).saturating_sub(8);
        let (most, need) = (outs * saved, branch::bits(b, outs, inp));
        if need > most {
            problems.push(format!(
                "  {}: the branch takes {need} bits, but one bit less for every channel saves only {most}; lower its size (--mean-k, --rank), or \
                 let it come on top (--overhead plain)",
                site.name()
            ));
        }
    }
    problems
}

/// Checks the recipe against the model and predicts the cost.
///
/// # Errors
/// [`Error::Unfit`] lists every layer that the recipe does not fit; also for a model that is quantized already.
pub fn plan(source: &Source, recipe: &Recipe) -> Result<Plan> {
    recipe.validate()?;
    let config = source.config();
    let scheme = &recipe.scheme;
    let shapes = config.linear_shapes(0);
    let problems = problems(source, recipe, &shapes);
    if !problems.is_empty() {
        return Err(Error::Unfit(problems.join("\n")));
    }

    let keep = recipe.input.map_or(0, |input| input.keep);
    // Bits of a site's layers with the basis that they share.
    let bits = |site: Site| {
        let (outs, whole) = (site_outputs(&shapes, site), config.site_width(site));
        let inp = whole - keep;
        let kept = if keep > 0 { outs * (8 * keep + 16) + keep * (8 * whole + 32) } else { 0 };
        let learned = matches!(recipe.learn, Some(Learn::FlatQuant(_)));
        let matrices = match site {
            _ if !learned => 0,
            Site::O => config.num_heads.pow(2),
            _ => {
                let (n1, n2) = Kronecker::widths(whole);
                let keys = if site == Site::Qkv && scheme.kv_bits < 16 { config.head_dim } else { 0 };
                n1.pow(2) + n2.pow(2) + keys.pow(2)
            }
        };
        let code_bits = match scheme.weight_bits {
            bits @ ..=4 => (usize::from(bits) * inp).next_multiple_of(8),
            16 => 16 * inp,
            _ => 8 * inp,
        };
        let groups = if scheme.weight_bits == 16 { 0 } else { inp / scheme.group(inp) };
        let plain = recipe.branch.as_ref().filter(|b| b.overhead == Overhead::Plain);
        let branch = plain.map_or(0, |b| branch::bits(b, outs, inp));
        (outs * (code_bits + 16 * groups) + kept + 16 * matrices + branch) as f64
    };
    let block_weights: usize = shapes.iter().map(|(_, [out, inp])| out * inp).sum();
    let block_bits: f64 = Site::ALL.into_iter().map(bits).sum();
    let tied = config.tie_word_embeddings && recipe.rotate.is_none_or(|r| !r.residual);
    let vocab_weights = config.vocab_size * config.hidden_size * if tied { 1 } else { 2 };
    let vocab_bytes = vocab_weights * if recipe.embeddings == Embeddings::Int8 { 1 } else { 2 };
    let tokens = recipe.calibration.samples * recipe.calibration.sequence_length;
    let text = recipe.text();

    let output = (config.num_layers as f64 * block_bits / 8.0) as u64 + vocab_bytes as u64;
    // Hidden states behind two blocks, with those in full precision where a method compares with them; or the state of tuning, twice, and
    // a shard that is replaced.
    let streams = if matches!(recipe.learn, Some(Learn::OmniQuant(_) | Learn::FlatQuant(_))) { 2 } else { 1 };
    let stream = 4 * tokens * config.hidden_size;
    let states = 2 * streams * stream;
    // As they are held; a method that compares has a copy more of what full precision makes of them, from before the block.
    let held = if streams > 1 { 3 } else { 1 } * stream;
    let tuned = match recipe.learn {
        Some(Learn::Tune(_)) => {
            let learned: usize = shapes.iter().map(|(_, [out, _])| out * (1 + keep)).sum();
            2 * 24 * config.num_layers * learned + vocab_bytes
        }
        _ => 0,
    };
    let peak = |states| memory::peak(config, recipe, &shapes, (block_bits / 8.0) as usize, states);
    Ok(Plan {
        blocks: config.num_layers,
        layers: config.num_layers * shapes.len(),
        weights: config.num_layers * block_weights,
        calibration_tokens: text.samples * text.sequence_length,
        peak_bytes: peak(held) as u64,
        spill: false,
        output_bytes: output,
        disk_bytes: output + states.max(tuned) as u64,
        bits_per_weight: block_bits / block_weights as f64,
        fallbacks: fallback::rotations(recipe, config),
        states_bytes: held as u64,
        spilled_peak_bytes: peak(0) as u64,
    })
}

/// Output channels of all layers that read a site. shapes: of one block's layers.
pub(crate) fn site_outputs(shapes: &[(String, [usize; 2])], site: Site) -> usize {
    let of_site = |name: &str| site.layers().iter().any(|layer| name.ends_with(layer));
    shapes.iter().filter(|(name, _)| of_site(name)).map(|(_, [out, _])| out).sum()
}
