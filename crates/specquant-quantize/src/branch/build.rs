//! From a recipe's branch to the coefficients of the layers that share an input, at a common price.

use std::sync::Arc;

use half::f16;
use specquant_kernels::Basis;
use specquant_model::{BranchBasis, StoredBranch};

use super::{BranchError, Score, allocate, dct, fourier, low_rank, rows};
use crate::layer::{Input, Weight};
use crate::recipe::{Branch, Searched};
use crate::rounding::Hessian;
use crate::{Error, Result};

/// A layer's branch, and the weight `[out, in]` that it stands for: what the engine will compute, rounding included.
pub struct LayerBranch {
    /// Coefficients.
    pub stored: StoredBranch,
    /// `[out, in]`.
    pub weight: Vec<f32>,
}

/// The branches of the layers that share an input.
pub struct SiteBranch {
    /// The directions.
    pub basis: Arc<Basis>,
    /// In the order of the layers.
    pub layers: Vec<LayerBranch>,
}

/// Bits of a Fourier bin: two f16. All budgets are counted in it.
const BIN_BITS: usize = 32;

/// Items that every channel (for the stored bases: every layer) is to get on average, so that the branch takes as many bits as `mean_k` lowest
/// Fourier bins per channel, indices and stored directions included; or the rank that the recipe names.
///
/// outs: output channels of all layers that share the input of `inp` channels.
pub fn asked(branch: &Branch, outs: usize, inp: usize) -> usize {
    let budget = BIN_BITS * branch.mean_k * outs;
    match branch.basis {
        BranchBasis::Fourier => branch.mean_k,
        BranchBasis::FourierTop => branch.mean_k * BIN_BITS / (BIN_BITS + 16),
        BranchBasis::Dct => branch.mean_k * BIN_BITS / 16,
        _ if branch.rank > 0 => branch.rank,
        BranchBasis::Rows => budget / (16 * outs + 32),
        BranchBasis::Svd | BranchBasis::Wsvd => budget / (16 * (outs + inp)),
    }
}

/// Those of [`asked`] that there are.
pub fn items(branch: &Branch, outs: usize, inp: usize) -> usize {
    let asked = asked(branch, outs, inp);
    if branch.basis.is_fourier() { asked } else { asked.min(inp) }
}

/// Bits that the branches of such layers take in all, about: a temperature other than 0 is assumed to make channels differ.
pub fn bits(branch: &Branch, outs: usize, inp: usize) -> usize {
    let items = items(branch, outs, inp);
    let ragged = if branch.temperature == Searched::Fixed(0.0) { 0 } else { 16 * outs };
    match branch.basis {
        _ if items == 0 => 0,
        BranchBasis::Fourier => outs * BIN_BITS * items + ragged,
        BranchBasis::FourierTop => outs * (BIN_BITS + 16) * items + ragged,
        BranchBasis::Dct => outs * 16 * items + ragged,
        BranchBasis::Rows => items * (16 * outs + 32),
        BranchBasis::Svd | BranchBasis::Wsvd => items * 16 * (outs + inp),
    }
}

/// Items of every channel of `w` at temperature `t`, `[out]`.
fn counts(w: &Weight, branch: &Branch, input: &Input, t: f32) -> Vec<u16> {
    let score = if t > 0.0 { branch.score } else { Score::Uniform };
    let scores = score.of(w.values, w.out, w.inp, input.mean_abs);
    let per_bin = items(branch, w.out, w.inp);
    let all = if branch.basis.is_fourier() { w.inp / 2 + 1 } else { w.inp };
    let most = match branch.max_k {
        0 => all,
        // In items of this basis, as the mean is.
        k => (k.saturating_mul(per_bin) / branch.mean_k.max(1)).max(per_bin).min(all),
    };
    allocate(&scores, t, per_bin, most)
}

/// Splits the branch off the layers that share an input. temperatures: of every layer's allocation, where channels differ.
///
/// # Errors
/// When a coefficient is not finite in f16.
pub fn build(weights: &[Weight], branch: &Branch, input: &Input, temperatures: &[f32]) -> Result<SiteBranch> {
    let (inp, outs) = (input.mean_abs.len(), weights.iter().map(|w| w.out).sum());
    let named = |w: &Weight| {
        let module = w.name.to_owned();
        move |cause: BranchError| Error::Branch { module, cause }
    };
    let uniform = |w: &Weight, rank: usize, coeffs: Vec<f16>| StoredBranch {
        basis: branch.basis,
        counts: vec![rank as u16; w.out],
        indices: Vec::new(),
        coeffs,
    };
    let mut layers = Vec::new();
    let basis = match branch.basis {
        BranchBasis::Fourier | BranchBasis::FourierTop | BranchBasis::Dct => {
            for (w, &t) in weights.iter().zip(temperatures) {
                let counts = counts(w, branch, input, t);
                let split = match branch.basis {
                    BranchBasis::Fourier => fourier::truncate,
                    BranchBasis::FourierTop => fourier::truncate_top,
                    _ => dct::truncate,
                };
                let stored = split(w.values, w.out, w.inp, &counts).map_err(named(w))?;
                let weight = match branch.basis {
                    BranchBasis::Dct => dct::reconstruct(&stored, &Basis::Dct(inp), w.out),
                    _ => fourier::reconstruct(&stored, w.out, w.inp),
                };
                layers.push(LayerBranch { stored, weight });
            }
            if branch.basis == BranchBasis::Dct { Basis::Dct(inp) } else { Basis::Fourier(inp) }
        }
        BranchBasis::Rows => {
            let energy = input.hessian.map_or_else(
                || input.mean_abs.iter().map(|x| f64::from(*x).powi(2)).collect(),
                Hessian::diagonal,
            );
            let indices = rows::select(weights, &energy, items(branch, outs, inp));
            for w in weights {
                let mut coeffs = Vec::with_capacity(w.out * indices.len());
                for (channel, row) in w.values.chunks_exact(inp).enumerate() {
                    for (item, &i) in indices.iter().enumerate() {
                        coeffs.push(super::coefficient(row[i as usize], channel, item).map_err(named(w))?);
                    }
                }
                let mut weight = vec![0.0; w.out * inp];
                let rows = weight.chunks_exact_mut(inp).zip(coeffs.chunks(indices.len().max(1)));
                rows.for_each(|(row, c)| {
                    indices.iter().zip(c).for_each(|(&i, c)| row[i as usize] = c.to_f32())
                });
                layers.push(LayerBranch { stored: uniform(w, indices.len(), coeffs), weight });
            }
            Basis::Inputs { n: inp, indices }
        }
        BranchBasis::Svd | BranchBasis::Wsvd => {
            // One left factor for all layers that share the input (deepcompressor: `exclusive: false`).
            let all: Vec<f32> = weights.iter().flat_map(|w| w.values).copied().collect();
            let hessian = match branch.basis {
                BranchBasis::Wsvd => input.hessian.map(Hessian::normalized),
                _ => None,
            };
            let r = items(branch, outs, inp);
            let whole = weights.first().map(named);
            let (rows, coeffs) = low_rank(&all, outs, inp, r, hessian.as_deref())
                .map_err(|cause| whole.map_or(Error::Recipe(cause.to_string()), |named| named(cause)))?;
            let basis = Basis::Dense { n: inp, rows };
            let (r, mut rest) = (basis.len(), coeffs.as_slice());
            for w in weights {
                let mine = rest.split_off(..w.out * r).unwrap_or(&[]);
                let stored = uniform(w, r, mine.to_vec());
                let weight = dct::reconstruct(&stored, &basis, w.out);
                layers.push(LayerBranch { stored, weight });
            }
            basis
        }
    };
    Ok(SiteBranch { basis: Arc::new(basis), layers })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Recipe;
    use crate::rounding::testing::{correlated, gaussian};

    const INP: usize = 96;

    fn branch(basis: BranchBasis, mean_k: usize) -> Branch {
        Branch {
            basis,
            mean_k,
            temperature: crate::Searched::Fixed(0.0),
            ..Recipe::load("specquant").unwrap().branch.unwrap()
        }
    }

    /// A branch of 8 bins of every basis, over two layers of 40 and 24 channels.
    fn with_all(check: impl Fn(BranchBasis, &[Weight], &Input, &SiteBranch)) {
        let x = correlated(300, INP, 4);
        let mut hessian = Hessian::new(INP);
        hessian.add(&x);
        let mean_abs: Vec<f32> =
            (0..INP).map(|i| x.iter().skip(i).step_by(INP).map(|v| v.abs()).sum::<f32>() / 300.0).collect();
        let (a, b) = (gaussian(40 * INP, 1), gaussian(24 * INP, 2));
        let weights = [("a", 40, &a), ("b", 24, &b)].map(|(name, out, values)| Weight {
            name,
            out,
            inp: INP,
            values,
            bias: None,
            clip: None,
        });
        let input = Input { mean_abs: &mean_abs, hessian: Some(&hessian), sample: &x, rows: 300 };
        for basis in BranchBasis::ALL {
            check(basis, &weights, &input, &build(&weights, &branch(basis, 8), &input, &[0.0; 2]).unwrap());
        }
    }

    #[test]
    fn every_basis_keeps_to_the_same_budget() {
        with_all(|basis, weights, _, site| {
            let bits: usize = weights
                .iter()
                .zip(&site.layers)
                .map(|(w, l)| {
                    assert_eq!(l.stored.counts.len(), w.out);
                    16 * (l.stored.coeffs.len() + l.stored.indices.len())
                })
                .sum();
            let stored = match site.basis.as_ref() {
                Basis::Dense { rows, .. } => 16 * rows.len(),
                Basis::Inputs { indices, .. } => 32 * indices.len(),
                _ => 0,
            };
            let (got, budget) = (bits + stored, 32 * 8 * 64);
            // Whole items only: the last one may not fit any more.
            assert!(got <= budget && got + 16 * (64 + INP) > budget, "{basis:?}: {got} of {budget}");
        });
    }

    /// The weight that rounding subtracts is the one that the kernel multiplies by.
    #[test]
    fn the_engine_computes_what_was_split_off() {
        with_all(|basis, weights, input, site| {
            let linears = weights.iter().zip(&site.layers).map(|(w, l)| {
                let stored = specquant_model::StoredLinear {
                    out: w.out,
                    inp: w.inp,
                    bits: 4,
                    channel_bits: Vec::new(),
                    levels: specquant_model::Levels::Uniform,
                    group_size: w.inp,
                    codes: vec![0; w.out * w.inp],
                    scales: vec![1.0; w.out],
                    kept: None,
                    branch: Some(l.stored.clone()),
                    bias: None,
                };
                let scheme = "W4A16".parse().unwrap();
                stored.to_linear(w.name, &scheme, Some(&site.basis), Default::default()).unwrap()
            });
            for ((linear, w), l) in linears.zip(weights).zip(&site.layers) {
                let got = linear.forward(input.sample, input.rows).unwrap();
                let mut want = vec![0.0; got.len()];
                specquant_kernels::matmul_nt(
                    input.sample,
                    &l.weight,
                    &mut want,
                    input.rows,
                    INP,
                    w.out,
                    false,
                );
                let (mut e, mut n) = (0.0, 0.0);
                got.iter().zip(&want).for_each(|(g, w)| {
                    e += f64::from(g - w).powi(2);
                    n += f64::from(*w).powi(2);
                });
                assert!((e / n).sqrt() < 1e-5, "{basis:?}: {}", (e / n).sqrt());
            }
        });
    }
}
