//! The paper's claims, one by one: what it says, what was measured, and whether they agree.

use specquant_eval::{Difference, paired, paired_weighted};
use specquant_model::BranchBasis;
use specquant_quantize::branch::Score;

use crate::allocation::Allocation;
use crate::layers::{ALPHA, LayerStudy, MEAN_K};
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
    let spectra = &e.layers.spectra;
    let all: f64 = spectra.iter().map(|s| s.channels as f64).sum();
    let mean = |f: &dyn Fn(&crate::Spectrum) -> f64| {
        spectra.iter().map(|s| f(s) * s.channels as f64).sum::<f64>() / all
    };
    let (low, null) = (mean(&|s| s.low.mean), mean(&|s| s.permuted.mean));
    // Over all channels: within the kinds of layers and between them.
    let deviation = mean(&|s| s.low.deviation.powi(2) + (s.low.mean - low).powi(2)).sqrt();
    let most = spectra.iter().map(|s| s.low.mean).fold(0.0, f64::max);
    (all > 0.0).then(|| Claim {
        id: "T1",
        claim: "92.3 ± 3.7% of a weight channel's energy lies in its lowest 20% of frequencies (section 3)",
        found: format!(
            "{:.1} ± {:.1}% (standard deviation over {all:.0} channels), at most {:.1}% in a kind of layers; {:.1}% with the inputs in random order; white noise has 20%",
            100.0 * low,
            100.0 * deviation,
            100.0 * most,
            100.0 * null
        ),
        verdict: Verdict::of(most > 0.9),
    })
}

/// How many of some are so.
fn count<T>(of: &[&T], so: impl Fn(&T) -> Option<bool>) -> usize {
    of.iter().filter(|x| so(x) == Some(true)).count()
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
    let (won, of) = (wins(&plain) + wins(&smooth), plain.len() + smooth.len());
    (of > 0).then(|| Claim {
        id: "T2",
        claim: "At equal storage the spectral approximation has a smaller error than SVD (Eq. 25)",
        found: format!(
            "Fourier beats SVD in {} of {} layers, and in {} of {} once they are smoothed (α = {ALPHA}). Energy left, median: {:.1}% against {:.1}%; smoothed {:.1}% against {:.1}%",
            wins(&plain),
            plain.len(),
            wins(&smooth),
            smooth.len(),
            left(&plain, BranchBasis::Fourier),
            left(&plain, BranchBasis::Svd),
            left(&smooth, BranchBasis::Fourier),
            left(&smooth, BranchBasis::Svd)
        ),
        verdict: match won {
            0 => Verdict::Fails,
            _ if won == of => Verdict::Holds,
            _ => Verdict::InPart,
        },
    })
}

fn parseval(e: &Evidence) -> Option<Claim> {
    let p = &e.layers.parseval;
    (p.channels > 0).then(|| Claim {
        id: "T3",
        claim: "The truncation error is bounded by the dropped coefficients (Eq. 11)",
        found: format!(
            "on {} channels of {}: the bound as printed is {:.0} times the error. With 1/N and without the mirror images of what is kept it is no bound but the error itself (Parseval): largest \
             relative difference of the squares {:.0e}",
            p.channels, p.layer, p.printed, p.corrected
        ),
        verdict: Verdict::of(p.printed >= 1.0 && p.corrected < 1e-4),
    })
}

fn ablation(e: &Evidence) -> Option<Claim> {
    let cell = |smooth, truncate, gptq| {
        let found = |c: &&crate::Cell| (c.smooth, c.truncate, c.gptq) == (smooth, truncate, gptq);
        e.of(&e.plan.grid.iter().find(found)?.run)
    };
    let ppl = |m: &Measured| number(m.perplexity.perplexity);
    let mut words = Vec::new();
    let mut verdict = Verdict::Holds;
    for gptq in [false, true] {
        let [none, smooth, truncated, both] = [
            cell(false, false, gptq)?,
            cell(true, false, gptq)?,
            cell(false, true, gptq)?,
            cell(true, true, gptq)?,
        ];
        let (gain, rest) = (change(truncated, smooth), change(both, truncated));
        let of_this = match (below_zero(&gain), gain.mean <= -(10f64.ln()) && below_zero(&rest)) {
            (true, true) => Verdict::Holds,
            (true, false) => Verdict::InPart,
            _ => Verdict::Fails,
        };
        if of_this != Verdict::Holds && verdict != Verdict::Fails {
            verdict = of_this;
        }
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
        verdict,
    })
}

/// Whether a difference is surely negative.
fn below_zero(d: &Difference) -> bool {
    d.is_significant() && d.mean < 0.0
}

fn monotone(e: &Evidence) -> Option<Claim> {
    let steps: Vec<(usize, &Measured)> =
        e.plan.sweep.iter().map(|(k, run)| Some((*k, e.of(run)?))).collect::<Option<_>>()?;
    let changes: Vec<(usize, usize, Difference)> =
        steps.windows(2).map(|s| (s[0].0, s[1].0, change(s[1].1, s[0].1))).collect();
    let shown: Vec<String> =
        changes.iter().map(|(a, b, d)| format!("{a} → {b}: {}", d.show(1.0, 3))).collect();
    let whole = change(steps.last()?.1, steps.first()?.1);
    let worse = changes.iter().any(|(_, _, d)| d.is_significant() && d.mean > 0.0);
    (!changes.is_empty()).then(|| Claim {
        id: "T5",
        claim: "Perplexity falls as more bins are kept (Table 4)",
        found: format!(
            "Δ log-perplexity, α searched for every k: {}; from first to last {}",
            shown.join("; "),
            whole.show(1.0, 3)
        ),
        verdict: match (below_zero(&whole), worse) {
            (true, false) => Verdict::Holds,
            (true, true) => Verdict::InPart,
            (false, _) if whole.is_significant() => Verdict::Fails,
            (false, _) => Verdict::Open,
        },
    })
}

/// A score's runs over the seeds.
pub(crate) fn seeds<'a>(e: &'a Evidence, score: Score) -> Option<Vec<&'a Measured>> {
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
            "Δ log-perplexity to uniform over {} calibration seeds: {}{}",
            uniform.len(),
            shown.join(", "),
            reach(e)
        ),
        verdict: {
            let better = changes.iter().any(|(_, d)| below_zero(d));
            let worse = changes.iter().any(|(_, d)| d.is_significant() && d.mean > 0.0);
            match (better, worse) {
                (true, false) => Verdict::Holds,
                (true, true) => Verdict::InPart,
                (false, true) => Verdict::Fails,
                (false, false) => Verdict::Open,
            }
        },
    })
}

/// How far any sharing out could go.
fn reach(e: &Evidence) -> String {
    let smoothed: Vec<Allocation> =
        e.layers.layers.iter().filter(|l| l.smoothed).map(|l| l.allocation).collect();
    if smoothed.is_empty() {
        return String::new();
    }
    let share = |f: fn(&Allocation) -> f64| 100.0 * median(smoothed.iter().map(f).collect());
    format!(
        ". {MEAN_K} lowest bins in every channel catch {:.1}% of the activation-weighted energy of a smoothed weight (median over {} layers), as many shared out by Eq. 12 {:.1}%, \
         in the best numbers at most {:.1}%, and the best bins of any frequency (reverse water-filling) {:.1}%",
        share(|a| a.uniform),
        smoothed.len(),
        share(|a| a.adaptive),
        share(|a| a.best_lowest),
        share(|a| a.best)
    )
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
    let better = |f: fn(&crate::Residual) -> f64| {
        count(&smoothed, |l| Some(f(l.of(BranchBasis::Fourier)?) < f(l.of(BranchBasis::Svd)?)))
    };
    let (error, peak) = (better(|r| r.rounding_error), better(|r| r.peak));
    let n = smoothed.len();
    (n > 0).then(|| Claim {
        id: "T8",
        claim: "The branch takes the outliers that smoothing moves into the weight, better than SVD does (Fig. 4)",
        found: format!(
            "against the smoothed weight, median over {n} layers: {}. Fourier leaves a smaller error of rounding than SVD in {error} of them, a smaller peak in {peak}",
            words.join("; ")
        ),
        verdict: match (2 * error > n, 2 * peak > n) {
            (true, true) => Verdict::Holds,
            (false, false) => Verdict::Fails,
            _ => Verdict::InPart,
        },
    })
}

/// What the paper's own table has for LLaMA-3 8B: ln(7.33 / 7.25).
const FREE: f64 = 0.011;

fn free_cache(e: &Evidence) -> Option<Claim> {
    let of = |(name, [_, wide, narrow]): &(String, [Option<Run>; 3])| {
        let (wide, narrow) = (e.of(wide.as_ref()?)?, e.of(narrow.as_ref()?)?);
        // Where nothing works, nothing can be told.
        let usable = name == "specquant" || wide.perplexity.perplexity < 20.0 * e.full.perplexity;
        usable.then(|| (name.clone(), change(narrow, wide)))
    };
    let pairs: Vec<(String, Difference)> = e.plan.methods.iter().filter_map(of).collect();
    let own = pairs.iter().find(|(name, _)| name == "specquant")?.1;
    let half = own.half_width.unwrap_or(f64::INFINITY);
    let shown: Vec<String> = pairs.iter().map(|(name, d)| format!("{name} {}", d.show(1.0, 3))).collect();
    Some(Claim {
        id: "T9",
        claim: "A 4-bit KV cache costs SpecQuant next to nothing: 7.25 → 7.33 on LLaMA-3 8B, 0.011 in log-perplexity (Table 1)",
        found: format!(
            "Δ log-perplexity, 4-4-4 against 4-4-16: {}; methods above 20 times the source's perplexity are left out",
            shown.join(", ")
        ),
        verdict: match (own.mean + half <= 3.0 * FREE, own.mean - half > 3.0 * FREE) {
            (true, _) => Verdict::Holds,
            (_, true) => Verdict::Fails,
            _ => Verdict::Open,
        },
    })
}

fn speed(e: &Evidence) -> Option<Claim> {
    let speed = e.speed.as_ref()?;
    let at = speed.by_k.iter().find(|(k, _)| *k == MEAN_K).or(speed.by_k.last())?;
    let quantized = e.of(&e.plan.sweep.iter().find(|(k, _)| *k == at.0)?.1)?;
    let (prefill, decode) = (speed.dense.prefill / at.1.prefill, speed.dense.decode / at.1.decode);
    let memory = 16.0 / quantized.bits_per_weight;
    Some(Claim {
        id: "T10",
        claim: "Prefill twice as fast and 3 times less memory than FP16 (abstract, Table 2)",
        found: format!(
            "on {} ({} threads), the whole model against its source in f32, as there is no FP16 arithmetic here: prefill of {} tokens × {prefill:.2}, decoding × {decode:.2}; linear layers \
             {memory:.2} times smaller than at 16 bits, embeddings stay at 16",
            speed.cpu,
            speed.threads,
            crate::latency::PROMPT
        ),
        verdict: match (prefill >= 2.0, memory >= 3.0) {
            // Against f32, not against FP16.
            (true, true) => Verdict::InPart,
            (false, false) => Verdict::Fails,
            _ => Verdict::InPart,
        },
    })
}

/// What the branch changes in log-perplexity, window by window.
fn gain(own: &Measured, without: &Measured) -> Vec<f64> {
    let windows = own.perplexity.window_nll.iter().zip(&without.perplexity.window_nll);
    windows.map(|(a, b)| a - b).collect()
}

fn order_of_units(e: &Evidence) -> Option<Claim> {
    let mut gains = Vec::new();
    for (own, without) in &e.plan.permuted {
        let plain = |run: &Run| e.of(&Run { permutation: None, ..run.clone() });
        let weights = &plain(own)?.perplexity.window_tokens;
        let given = gain(plain(own)?, plain(without)?);
        let random = gain(e.of(own)?, e.of(without)?);
        let nothing = vec![0.0; given.len()];
        gains.push((
            paired_weighted(&given, &nothing, weights),
            paired_weighted(&random, &nothing, weights),
            paired_weighted(&random, &given, weights),
        ));
    }
    let down = e.layers.spectra.iter().find(|s| s.kind == "down_proj")?;
    let shown: Vec<String> = gains.iter().map(|(_, random, _)| random.show(1.0, 3)).collect();
    let same_spectrum = (down.low.mean - down.permuted.mean).abs() < 0.1 * down.permuted.mean;
    let less = gains.iter().all(|(_, _, d)| d.is_significant() && d.mean > 0.0);
    Some(Claim {
        id: "T11",
        claim: "The order of a weight's inputs carries information, which is why low frequencies hold the energy (section 3)",
        found: format!(
            "in down_proj {:.1}% of the energy is in the lowest 20% of frequencies, {:.1}% with its inputs in a random order. The branch changes log-perplexity by {} in the given order, and by {} \
             with the units of every MLP reordered, which changes no output of the model",
            100.0 * down.low.mean,
            100.0 * down.permuted.mean,
            gains.first()?.0.show(1.0, 3),
            shown.join(", ")
        ),
        verdict: match (same_spectrum, less) {
            (true, false) => Verdict::Fails,
            (false, true) => Verdict::Holds,
            _ => Verdict::Open,
        },
    })
}

fn invariants(e: &Evidence) -> Option<Claim> {
    let p = &e.layers.parseval;
    let left = p.all_bins;
    (p.channels > 0).then(|| Claim {
        id: "T12",
        claim: "With every bin kept nothing is left to round; without smoothing and branch the method is GPTQ",
        found: format!(
            "on {} channels of {} every bin in f16 leaves {left:.0e} of the energy; the rest are tests of specquant-quantize (all_frequency_bins_and_16_bit_activations_give_full_precision, \
             no_bins_and_no_smoothing_is_plain_gptq)",
            p.channels, p.layer
        ),
        verdict: Verdict::of(left < 1e-5),
    })
}

/// The abstract's figure.
const LOST: f64 = 0.015;

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
        verdict: {
            let half = lost.half_width.unwrap_or(f64::INFINITY);
            let average = full.average();
            let able = average.mean - full.chance() > 2.0 * average.stderr;
            match (lost.mean - half >= -LOST, lost.mean + half < -LOST) {
                (true, _) if able => Verdict::Holds,
                (_, true) => Verdict::Fails,
                _ => Verdict::Open,
            }
        },
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
        verdict: match [first, second] {
            both if both.iter().all(below_zero) => Verdict::Holds,
            both if both.iter().any(|d| d.is_significant() && d.mean > 0.0) => Verdict::Fails,
            _ => Verdict::Open,
        },
    })
}

#[cfg(test)]
mod tests;
