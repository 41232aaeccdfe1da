//! The paper's claims, one by one: what it says, what was measured, and whether they agree.

use specquant_eval::{Difference, paired};
use specquant_model::BranchBasis;
use specquant_quantize::branch::Score;

use crate::layers::{ALPHA, LayerStudy};
use crate::report::{Evidence, number};
use crate::{Measured, Run};

/// Whether a measurement agrees with a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It does.
    Holds,
    /// It holds in part, or not as stated.
    InPart,
    /// It does not.
    Fails,
    /// The measurement cannot tell.
    Open,
}

impl Verdict {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Verdict::Holds => "holds",
            Verdict::InPart => "holds in part",
            Verdict::Fails => "does not hold",
            Verdict::Open => "cannot be told",
        }
    }

    fn of(holds: bool) -> Self {
        if holds { Verdict::Holds } else { Verdict::Fails }
    }
}

/// One claim.
pub struct Claim {
    /// Short name.
    pub id: &'static str,
    /// What the paper says, and where.
    pub claim: &'static str,
    /// What was found.
    pub found: String,
    /// Whether they agree.
    pub verdict: Verdict,
}

/// Δ log-perplexity, `a` minus `b`, paired over windows.
pub(crate) fn change(a: &Measured, b: &Measured) -> Difference {
    a.perplexity.log_difference(&b.perplexity)
}

/// The same over calibration seeds: of every seed the mean over windows.
pub(crate) fn change_over_seeds(a: &[&Measured], b: &[&Measured]) -> Difference {
    let logs = |x: &[&Measured]| x.iter().map(|m| m.perplexity.perplexity.ln()).collect::<Vec<_>>();
    paired(&logs(a), &logs(b))
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x.get(x.len() / 2).copied().unwrap_or(f64::NAN)
}

/// All claims that there is evidence for.
pub fn all(e: &Evidence) -> Vec<Claim> {
    [
        spectrum(e),
        against_svd(e),
        parseval(e),
        ablation(e),
        monotone(e),
        entropy(e),
        adaptive(e),
        easier_residual(e),
        free_cache(e),
        speed(e),
        order_of_units(e),
        invariants(e),
        headline(e),
        literature(e),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn spectrum(e: &Evidence) -> Option<Claim> {
    let all: f64 = e.layers.spectra.iter().map(|s| s.channels as f64).sum();
    let mean = |f: &dyn Fn(&crate::Spectrum) -> f64| {
        e.layers.spectra.iter().map(|s| f(s) * s.channels as f64).sum::<f64>() / all
    };
    let (low, null, deviation) =
        (mean(&|s| s.low.mean), mean(&|s| s.permuted.mean), mean(&|s| s.low.deviation));
    Some(Claim {
        id: "T1",
        claim: "92.3 ± 3.7% of a weight channel's energy lies in its lowest 20% of frequencies (section 3)",
        found: format!(
            "{:.1} ± {:.1}% over {all:.0} channels; {:.1}% with the inputs in random order; white noise has 20%",
            100.0 * low,
            100.0 * deviation,
            100.0 * null
        ),
        verdict: Verdict::of(low > 0.9),
    })
}

/// Layers for which `better` holds, of all.
fn count(layers: &[&LayerStudy], better: impl Fn(&LayerStudy) -> Option<bool>) -> String {
    let n = layers.iter().filter(|l| better(l) == Some(true)).count();
    format!("{n} of {}", layers.len())
}

fn against_svd(e: &Evidence) -> Option<Claim> {
    let part = |smoothed: bool| e.layers.layers.iter().filter(|l| l.smoothed == smoothed).collect::<Vec<_>>();
    let wins = |layers: &[&LayerStudy]| {
        count(layers, |l| Some(l.of(BranchBasis::Fourier)?.energy < l.of(BranchBasis::Svd)?.energy))
    };
    let left = |layers: &[&LayerStudy], basis| {
        100.0 * median(layers.iter().filter_map(|l| Some(l.of(basis)?.energy)).collect())
    };
    let (plain, smooth) = (part(false), part(true));
    let never = [&plain, &smooth].iter().all(|l| wins(l).starts_with("0 "));
    Some(Claim {
        id: "T2",
        claim: "At equal storage the spectral approximation has a smaller error than SVD (Eq. 25)",
        found: format!(
            "Fourier beats SVD in {} layers, and in {} once they are smoothed (α = {ALPHA}). Energy left, median: {:.1}% against {:.1}%; smoothed {:.1}% against {:.1}%",
            wins(&plain),
            wins(&smooth),
            left(&plain, BranchBasis::Fourier),
            left(&plain, BranchBasis::Svd),
            left(&smooth, BranchBasis::Fourier),
            left(&smooth, BranchBasis::Svd)
        ),
        verdict: if never { Verdict::Fails } else { Verdict::InPart },
    })
}

fn parseval(e: &Evidence) -> Option<Claim> {
    let p = &e.layers.parseval;
    Some(Claim {
        id: "T3",
        claim: "The truncation error is bounded by the dropped coefficients (Eq. 11, Parseval)",
        found: format!(
            "as an equation with 1/N, and without the mirror images of what is kept: largest relative difference {:.0e}; as printed, the bound is {:.0} times the error",
            p.corrected, p.printed
        ),
        verdict: if p.corrected < 1e-4 { Verdict::InPart } else { Verdict::Fails },
    })
}

fn ablation(e: &Evidence) -> Option<Claim> {
    let cell = |smooth, truncate, gptq| {
        let found = |c: &&crate::Cell| (c.smooth, c.truncate, c.gptq) == (smooth, truncate, gptq);
        e.of(&e.plan.grid.iter().find(found)?.run)
    };
    let ppl = |m: &Measured| number(m.perplexity.perplexity);
    let mut words = Vec::new();
    let mut holds = true;
    for gptq in [false, true] {
        let [none, smooth, truncated, both] = [
            cell(false, false, gptq)?,
            cell(true, false, gptq)?,
            cell(false, true, gptq)?,
            cell(true, true, gptq)?,
        ];
        holds &= change(truncated, smooth).mean < 0.0 && change(both, truncated).mean < 0.0;
        words.push(format!(
            "{}: {} plain, {} smoothed, {} truncated, {} both; truncation adds {} to smoothing (Δ log)",
            if gptq { "GPTQ" } else { "nearest" },
            ppl(none),
            ppl(smooth),
            ppl(truncated),
            ppl(both),
            change(both, smooth).show(1.0, 3)
        ));
    }
    Some(Claim {
        id: "T4",
        claim: "Truncation alone beats smoothing alone by ten times (27 against 300 and more), both together give the result (Table 3)",
        found: words.join(". "),
        verdict: Verdict::of(holds),
    })
}

fn monotone(e: &Evidence) -> Option<Claim> {
    let steps: Vec<(usize, &Measured)> =
        e.plan.sweep.iter().map(|(k, run)| Some((*k, e.of(run)?))).collect::<Option<_>>()?;
    let changes: Vec<(usize, usize, Difference)> =
        steps.windows(2).map(|s| (s[0].0, s[1].0, change(s[1].1, s[0].1))).collect();
    let shown: Vec<String> =
        changes.iter().map(|(a, b, d)| format!("{a} → {b}: {}", d.show(1.0, 3))).collect();
    let down = changes.iter().filter(|(_, _, d)| d.mean < 0.0).count();
    let worse = changes.iter().any(|(_, _, d)| d.is_significant() && d.mean > 0.0);
    Some(Claim {
        id: "T5",
        claim: "Perplexity falls as more bins are kept (Table 4)",
        found: format!("Δ log-perplexity, k: {}", shown.join("; ")),
        verdict: match (down == changes.len(), worse) {
            (true, _) => Verdict::Holds,
            (_, true) => Verdict::Fails,
            _ => Verdict::InPart,
        },
    })
}

/// A score's runs over the seeds.
fn seeds<'a>(e: &'a Evidence, score: Score) -> Option<Vec<&'a Measured>> {
    let (_, runs) = e.plan.scores.iter().find(|(s, _)| *s == score)?;
    runs.iter().map(|run| e.of(run)).collect()
}

/// In the words of the table.
pub(crate) fn score_name(score: Score) -> &'static str {
    match score {
        Score::ActivationAware => "activation-aware (Eq. 12)",
        Score::Entropy => "spectral entropy",
        Score::AbsMean => "mean magnitude",
        Score::AbsMax => "largest magnitude",
        Score::L2 => "norm",
        Score::Uniform => "uniform",
    }
}

fn entropy(e: &Evidence) -> Option<Claim> {
    let own = seeds(e, Score::Entropy)?;
    let others = [Score::AbsMean, Score::AbsMax, Score::L2];
    let changes: Vec<(Score, Difference)> = others
        .into_iter()
        .map(|s| Some((s, change_over_seeds(&own, &seeds(e, s)?))))
        .collect::<Option<_>>()?;
    let shown: Vec<String> =
        changes.iter().map(|(s, d)| format!("{} to {}", d.show(1.0, 3), score_name(*s))).collect();
    let (best, told) =
        (changes.iter().all(|(_, d)| d.mean < 0.0), changes.iter().all(|(_, d)| d.is_significant()));
    Some(Claim {
        id: "T6",
        claim: "Spectral entropy is the best score to share the bins out by (Table 5)",
        found: format!(
            "Δ log-perplexity of entropy over {} calibration seeds: {}",
            own.len(),
            shown.join(", ")
        ),
        verdict: match (best, told) {
            (true, true) => Verdict::Holds,
            (false, _) if changes.iter().any(|(_, d)| d.is_significant() && d.mean > 0.0) => Verdict::Fails,
            _ => Verdict::Open,
        },
    })
}

fn adaptive(e: &Evidence) -> Option<Claim> {
    let uniform = seeds(e, Score::Uniform)?;
    let scores = [Score::ActivationAware, Score::Entropy];
    let changes: Vec<(Score, Difference)> = scores
        .into_iter()
        .map(|s| Some((s, change_over_seeds(&seeds(e, s)?, &uniform))))
        .collect::<Option<_>>()?;
    let shown: Vec<String> =
        changes.iter().map(|(s, d)| format!("{} {}", score_name(*s), d.show(1.0, 3))).collect();
    Some(Claim {
        id: "T7",
        claim: "Sharing the bins out by importance beats the same for every channel (section 3)",
        found: format!(
            "Δ log-perplexity to uniform over {} calibration seeds: {}",
            uniform.len(),
            shown.join(", ")
        ),
        verdict: if changes.iter().any(|(_, d)| d.is_significant() && d.mean < 0.0) {
            Verdict::Holds
        } else if changes.iter().all(|(_, d)| d.is_significant()) {
            Verdict::Fails
        } else {
            Verdict::Open
        },
    })
}

fn easier_residual(e: &Evidence) -> Option<Claim> {
    let smoothed: Vec<&LayerStudy> = e.layers.layers.iter().filter(|l| l.smoothed).collect();
    let ratio = |basis: BranchBasis, f: fn(&crate::Residual) -> f64| {
        median(smoothed.iter().filter_map(|l| Some(f(l.of(basis)?) / f(&l.plain))).collect())
    };
    let words: Vec<String> = [BranchBasis::Fourier, BranchBasis::Rows, BranchBasis::Svd]
        .map(|b| {
            format!(
                "{}: error of rounding × {:.2}, peak over rms × {:.2}",
                b.name(),
                ratio(b, |r| r.rounding_error),
                ratio(b, |r| r.peak)
            )
        })
        .into();
    let fourier = ratio(BranchBasis::Fourier, |r| r.rounding_error);
    let svd = ratio(BranchBasis::Svd, |r| r.rounding_error);
    Some(Claim {
        id: "T8",
        claim: "The branch takes the outliers that smoothing moves into the weight, better than SVD does (Fig. 4)",
        found: format!(
            "against the smoothed weight, median over {} layers: {}",
            smoothed.len(),
            words.join("; ")
        ),
        verdict: Verdict::of(fourier < 0.8 && fourier < svd),
    })
}

fn free_cache(e: &Evidence) -> Option<Claim> {
    let pairs = e.plan.methods.iter().filter_map(|(name, [_, wide, narrow])| {
        let (wide, narrow) = (e.of(wide.as_ref()?)?, e.of(narrow.as_ref()?)?);
        // Where nothing works, nothing can be told.
        (wide.perplexity.perplexity < 20.0 * e.full.perplexity).then(|| (name, change(narrow, wide)))
    });
    let pairs: Vec<(&String, Difference)> = pairs.collect();
    let shown: Vec<String> = pairs.iter().map(|(name, d)| format!("{name} {}", d.show(1.0, 3))).collect();
    let most = pairs.iter().map(|(_, d)| d.mean).fold(f64::NEG_INFINITY, f64::max);
    (!pairs.is_empty()).then(|| Claim {
        id: "T9",
        claim: "A 4-bit KV cache costs next to nothing: 7.25 → 7.33 on LLaMA-3 8B, 0.011 in log-perplexity (Table 1)",
        found: format!("Δ log-perplexity, 4-4-4 against 4-4-16: {}", shown.join(", ")),
        verdict: if most < 0.03 { Verdict::Holds } else { Verdict::Fails },
    })
}

fn speed(e: &Evidence) -> Option<Claim> {
    let speed = e.speed.as_ref()?;
    let at = speed.by_k.iter().find(|(k, _)| *k == 16).or(speed.by_k.last())?;
    let quantized = e.of(&e.plan.sweep.iter().find(|(k, _)| *k == at.0)?.1)?;
    let (prefill, decode) = (speed.dense.prefill / at.1.prefill, speed.dense.decode / at.1.decode);
    let memory = 16.0 / quantized.bits_per_weight;
    Some(Claim {
        id: "T10",
        claim: "Prefill twice as fast and 3 times less memory than FP16 (abstract, Table 2)",
        found: format!(
            "on this CPU ({} threads), the whole model against f32: prefill of {} tokens × {prefill:.2}, decoding × {decode:.2}; linear layers {memory:.2} times smaller than at 16 bits; embeddings stay at 16",
            speed.threads,
            crate::latency::PROMPT
        ),
        verdict: match (prefill >= 2.0, memory >= 3.0) {
            (true, true) => Verdict::Holds,
            (false, false) => Verdict::Fails,
            _ => Verdict::InPart,
        },
    })
}

fn order_of_units(e: &Evidence) -> Option<Claim> {
    let plain = e.of(&Run { permutation: None, ..e.plan.permuted.first()?.clone() })?;
    let changes: Vec<Difference> =
        e.plan.permuted.iter().map(|run| Some(change(e.of(run)?, plain))).collect::<Option<_>>()?;
    let shown: Vec<String> = changes.iter().map(|d| d.show(1.0, 3)).collect();
    let worse = changes.iter().filter(|d| d.is_significant() && d.mean > 0.0).count();
    Some(Claim {
        id: "T11",
        claim: "The order of a weight's inputs carries information, which is why low frequencies hold the energy (section 3)",
        found: format!(
            "with the units of every MLP in a random order, which changes no output of the model, Δ log-perplexity {}",
            shown.join(", ")
        ),
        verdict: Verdict::of(worse == changes.len()),
    })
}

fn invariants(e: &Evidence) -> Option<Claim> {
    let left = e.layers.parseval.all_bins;
    Some(Claim {
        id: "T12",
        claim: "With every bin kept nothing is left to round; without smoothing and branch the method is GPTQ",
        found: format!(
            "every bin in f16 leaves {left:.0e} of the energy; that an empty branch and no smoothing give GPTQ's checkpoint, and that folds and rotations keep the logits, are tests of specquant-quantize"
        ),
        verdict: Verdict::of(left < 1e-5),
    })
}

fn headline(e: &Evidence) -> Option<Claim> {
    let (_, [_, _, run]) = e.plan.methods.iter().find(|(n, _)| n == "specquant")?;
    let (own, full) = (e.answers_of(Some(run.as_ref()?))?, e.answers_of(None)?);
    let lost = own.difference(full)?;
    Some(Claim {
        id: "H1",
        claim: "1.5 points of zero-shot accuracy are lost at 4-4-4 (abstract; 3.3 in Table 1 for LLaMA-3 8B)",
        found: format!(
            "{:.1}% against {:.1}% in full precision, {} points; guessing gives {:.1}%",
            100.0 * own.average().mean,
            100.0 * full.average().mean,
            lost.show(100.0, 1),
            100.0 * full.chance()
        ),
        verdict: Verdict::of(lost.mean > -0.02),
    })
}

fn literature(e: &Evidence) -> Option<Claim> {
    let at = |name: &str| {
        let (_, [_, run, _]) = e.plan.methods.iter().find(|(n, _)| n == name)?;
        e.of(run.as_ref()?)
    };
    let [rotated, smoothed, nearest] = [at("quarot")?, at("smooth-gptq")?, at("rtn")?];
    let (first, second) = (change(rotated, smoothed), change(smoothed, nearest));
    Some(Claim {
        id: "L1",
        claim: "The order that the literature agrees on, at 4-4-16: rotation + GPTQ beats smoothing + GPTQ beats nearest rounding",
        found: format!(
            "Δ log-perplexity: quarot − smooth-gptq {}, smooth-gptq − rtn {}",
            first.show(1.0, 3),
            second.show(1.0, 3)
        ),
        verdict: Verdict::of([first, second].iter().all(|d| d.is_significant() && d.mean < 0.0)),
    })
}

#[cfg(test)]
mod tests {
    use specquant_eval::{Perplexity, Protocol};

    use super::*;
    use crate::plan::tests::settings;
    use crate::{Layers, Plan, Residual, Spectrum};

    /// A perplexity around exp(`nll`), harder in some windows than in others.
    fn perplexity(nll: f64) -> Perplexity {
        let window_nll: Vec<f64> = (0..6).map(|i| nll + f64::from(i % 3) * 0.2).collect();
        let mean = window_nll.iter().sum::<f64>() / 6.0;
        Perplexity {
            perplexity: mean.exp(),
            stderr: 0.1,
            tokens: 600,
            window_tokens: vec![100; 6],
            window_nll,
            protocol: String::new(),
            settings: Protocol::default(),
            distance: None,
        }
    }

    fn measured(nll: f64) -> Measured {
        Measured {
            label: String::new(),
            quantize_seconds: 1.0,
            bits_per_weight: 4.1,
            tensor_bytes: 1,
            layer_error: 0.1,
            fallbacks: 0,
            perplexity: perplexity(nll),
        }
    }

    /// Evidence in which a run has the log-perplexity that `nll` gives it.
    fn evidence<'a>(plan: &'a Plan, nll: &dyn Fn(&Run) -> f64) -> Evidence<'a> {
        let results = plan.runs().into_iter().map(|run| (run.identity(), measured(nll(run)))).collect();
        Evidence {
            plan,
            results,
            answers: Vec::new(),
            full: perplexity(3.0),
            layers: Layers::default(),
            speed: None,
        }
    }

    fn verdict(e: &Evidence, id: &str) -> Verdict {
        all(e).into_iter().find(|c| c.id == id).map(|c| c.verdict).unwrap()
    }

    #[test]
    fn verdicts_follow_the_measurements() {
        let plan = Plan::new(&settings(false), 289).unwrap();
        let k = |run: &Run| run.recipe.branch.map_or(0, |b| b.mean_k) as f64;
        // Every bin helps.
        let helps = evidence(&plan, &|run| 4.0 - k(run) / 100.0);
        assert_eq!(verdict(&helps, "T5"), Verdict::Holds);
        // No smoothing: the branch alone is worth more than smoothing.
        assert_eq!(verdict(&helps, "T4"), Verdict::Fails);
        let hurts = evidence(&plan, &|run| 4.0 + k(run) / 100.0);
        assert_eq!(verdict(&hurts, "T5"), Verdict::Fails);
        // As the paper has it.
        let paper = evidence(&plan, &|run| {
            9.0 - 2.0 * f64::from(u8::from(run.recipe.smooth.is_some())) - 4.0 * (k(run) / 16.0)
        });
        assert_eq!(verdict(&paper, "T4"), Verdict::Holds);
    }

    #[test]
    fn scores_are_told_apart_over_seeds_only_where_all_seeds_agree() {
        let plan = Plan::new(&settings(false), 289).unwrap();
        let score = |run: &Run| run.recipe.branch.map_or(Score::Uniform, |b| b.score);
        let noise = |run: &Run| (run.recipe.seed as f64 * 1.7).sin() * 0.01;
        let better =
            evidence(&plan, &|run| 4.0 + noise(run) - if score(run) == Score::Entropy { 0.1 } else { 0.0 });
        assert_eq!(verdict(&better, "T6"), Verdict::Holds);
        assert_eq!(verdict(&better, "T7"), Verdict::Holds);
        let noisy = evidence(&plan, &|run| {
            let own =
                if score(run) == Score::Entropy { (run.recipe.seed as f64 * 2.9).cos() * 0.2 } else { 0.0 };
            4.0 + noise(run) + own
        });
        assert_eq!(verdict(&noisy, "T6"), Verdict::Open);
    }

    #[test]
    fn order_of_the_literature_and_free_caches() {
        let plan = Plan::new(&settings(false), 289).unwrap();
        let nll = |run: &Run| {
            let kv = if run.recipe.scheme.kv_bits < 16 { 0.01 } else { 0.0 };
            kv + match run.recipe.name.as_str() {
                "quarot" => 3.5,
                "smooth-gptq" => 4.5,
                "rtn" => 7.0,
                _ => 5.0,
            }
        };
        let e = evidence(&plan, &nll);
        assert_eq!(verdict(&e, "L1"), Verdict::Holds);
        assert_eq!(verdict(&e, "T9"), Verdict::Holds);
        let reversed = evidence(&plan, &|run| 10.0 - nll(run));
        assert_eq!(verdict(&reversed, "L1"), Verdict::Fails);
    }

    #[test]
    fn layers_decide_about_spectra_and_residuals() {
        let plan = Plan::new(&settings(true), 289).unwrap();
        let mut e = evidence(&plan, &|_| 4.0);
        let residual = |energy: f64| Residual { energy, peak: 10.0 * energy, rounding_error: 0.01 * energy };
        let layer = |fourier: f64, smoothed| LayerStudy {
            name: String::new(),
            smoothed,
            plain: residual(1.0),
            by_basis: vec![
                (BranchBasis::Fourier, residual(fourier)),
                (BranchBasis::Rows, residual(0.6)),
                (BranchBasis::Svd, residual(0.5)),
            ],
        };
        let low = |mean| {
            let spread = crate::layers::Spread { mean, deviation: 0.01 };
            vec![Spectrum {
                kind: "q_proj".to_owned(),
                channels: 9,
                low: spread,
                permuted: spread,
                entropy: spread,
            }]
        };
        (e.layers.layers, e.layers.spectra) = (vec![layer(0.95, false), layer(0.95, true)], low(0.2));
        for id in ["T1", "T2", "T8"] {
            assert_eq!(verdict(&e, id), Verdict::Fails, "{id}");
        }
        (e.layers.layers, e.layers.spectra) = (vec![layer(0.1, false), layer(0.1, true)], low(0.93));
        assert_eq!(verdict(&e, "T1"), Verdict::Holds);
        assert_eq!(verdict(&e, "T2"), Verdict::InPart);
        assert_eq!(verdict(&e, "T8"), Verdict::Holds);
    }
}
