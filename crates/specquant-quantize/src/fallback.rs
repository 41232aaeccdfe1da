//! What a run did other than its recipe says, because the numbers, the model's widths or the text left no choice.

use serde::{Deserialize, Serialize};
use specquant_kernels::Hadamard;
use specquant_model::{ModelConfig, RotationKind, Site};

use crate::block::LayerReport;
use crate::learn::Learn;
use crate::recipe::{Recipe, Rounding};

/// A fallback: listed in report.json, in the model card, and on the terminal at the end of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fallback {
    /// The layer's full Hugging Face name, or the part of every block, or of the run, that it is about.
    pub layer: String,
    /// What was done instead, and why.
    pub what: String,
}

/// Rotations for whose widths [`Hadamard`] has no matrix: known before a weight is read.
pub fn rotations(recipe: &Recipe, config: &ModelConfig) -> Vec<Fallback> {
    let hadamard = |kind| kind == RotationKind::Hadamard;
    let mut found = Vec::new();
    let mut tell = |place: &str, n: usize, instead: &dyn Fn(usize) -> String| {
        let block = Hadamard::new(n).block();
        if block < n {
            let what = format!("{}: there is no Hadamard matrix of order {n} here", instead(block));
            found.push(Fallback { layer: place.to_owned(), what });
        }
    };
    if let Some(rotate) = recipe.rotate {
        let in_blocks = |block| match block {
            1 => "not rotated".to_owned(),
            block => format!("rotated {block} values at a time instead of all together"),
        };
        // Learned rotations are dense, and nothing goes across the heads then.
        let learned = matches!(recipe.learn, Some(Learn::SpinQuant(_)));
        let plain = hadamard(rotate.kind);
        for (place, n, used) in [
            ("residual stream", config.hidden_size, rotate.residual && plain && !learned),
            ("heads of v_proj", config.head_dim, plain && !learned),
            ("across the heads before o_proj", config.num_heads, rotate.residual && !learned),
            ("input of down_proj", config.intermediate_size, rotate.residual && plain),
            ("heads of q_proj and k_proj", config.head_dim, rotate.qk && plain),
        ] {
            if used {
                tell(place, n, &in_blocks);
            }
        }
    }
    if recipe.input.is_some_and(|input| hadamard(input.rotation)) {
        for site in Site::ALL {
            tell(&format!("input of {}", site.layers().join(", ")), config.site_width(site), &|_| {
                "rotated by the cosine transform".to_owned()
            });
        }
    }
    found
}

/// A calibration text that holds fewer tokens than the recipe asks for.
pub fn short_text(recipe: &Recipe, texts: &[Vec<u32>]) -> Option<Fallback> {
    let c = recipe.text();
    let (tokens, asked) = (texts.iter().map(Vec::len).sum::<usize>(), c.samples * c.sequence_length);
    let short = recipe.scheme.weight_bits < 16 && tokens < asked;
    short.then(|| Fallback {
        layer: "calibration text".to_owned(),
        what: format!("{tokens} tokens instead of {asked}: there are no more"),
    })
}

/// Those of some layers, in their order.
pub fn fallbacks(recipe: &Recipe, layers: &[LayerReport]) -> Vec<Fallback> {
    let of = |layer: &LayerReport| {
        let rounding = &layer.rounding;
        let asked = match &recipe.rounding {
            Rounding::Gptq(gptq) => gptq.dampening_frac,
            Rounding::Rtn {} => f64::INFINITY,
        };
        let nearest =
            rounding.fallback.as_ref().map(|why| format!("rounded to nearest instead of by GPTQ: {why}"));
        let raised = rounding.dampening_frac.filter(|frac| rounding.fallback.is_none() && *frac > asked);
        let raised = raised.map(|frac| {
            format!("damping raised from {asked} to {frac}: its Hessian is not positive definite with less")
        });
        let dead = (rounding.dead_columns > 0).then(|| {
            let (n, inp) = (rounding.dead_columns, layer.shape[1]);
            format!("{n} of {inp} input channels are zero in all of the calibration text, and their weights became zero")
        });
        let clamped = layer.items_asked.map(|asked| {
            let got = layer.mean_k.unwrap_or(0.0);
            format!("the branch keeps {got} items per channel instead of {asked}: the layer has no more")
        });
        let what = [nearest, raised, dead, clamped].into_iter().flatten();
        what.map(|what| Fallback { layer: layer.name.clone(), what }).collect::<Vec<_>>()
    };
    layers.iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::RoundingReport;

    #[test]
    fn every_kind_is_listed_and_what_the_recipe_asked_for_is_not() {
        let layer = |rounding: RoundingReport, items_asked| LayerReport {
            name: "model.layers.0.mlp.up_proj".to_owned(),
            shape: [8, 4],
            bits_per_weight: 4.0,
            smoothing_strength: None,
            kept: None,
            act_clip: None,
            mean_k: Some(3.0),
            max_k: None,
            items_asked,
            temperature: None,
            relative_error: 0.0,
            rounding,
        };
        let gptq =
            |dampening_frac| RoundingReport { dampening_frac: Some(dampening_frac), ..Default::default() };
        let recipe = Recipe::load("gptq").unwrap();
        let found = |rounding, asked| -> Vec<String> {
            fallbacks(&recipe, &[layer(rounding, asked)]).into_iter().map(|f| f.what).collect()
        };
        assert!(found(gptq(0.01), None).is_empty());
        assert!(found(RoundingReport::default(), None).is_empty());
        assert!(found(gptq(0.1), None)[0].contains("damping raised from 0.01 to 0.1"));
        let nearest = RoundingReport { fallback: Some("no reason".to_owned()), ..gptq(1.0) };
        assert_eq!(found(nearest, None), ["rounded to nearest instead of by GPTQ: no reason"]);
        let dead = found(RoundingReport { dead_columns: 2, ..gptq(0.01) }, Some(32));
        assert!(
            dead[0].contains("2 of 4 input channels")
                && dead[1].contains("3 items per channel instead of 32"),
            "{dead:?}"
        );
    }
}
