//! The low end of the cosine transform (DCT-II) of every output channel: as SpecQuant's Fourier branch, without the jump between the
//! last and the first input that a periodic transform sees.

use specquant_kernels::{Basis, matmul_nt};
use specquant_model::{BranchBasis, StoredBranch};

use super::{BranchError, coefficient};

/// Keeps the lowest `counts[j]` frequencies of output channel j of `w: [out, inp]`.
///
/// # Errors
/// If a coefficient does not fit f16.
///
/// # Panics
/// If the slices do not have these shapes, or a channel has fewer frequencies.
pub fn truncate(w: &[f32], out: usize, inp: usize, counts: &[u16]) -> Result<StoredBranch, BranchError> {
    let rank = counts.iter().copied().max().map_or(0, usize::from);
    let all = Basis::Dct(inp).project(w, out, rank);
    let mut coeffs = Vec::new();
    for (channel, (values, &count)) in all.chunks(rank.max(1)).zip(counts).enumerate() {
        for (item, &value) in values[..usize::from(count)].iter().enumerate() {
            coeffs.push(coefficient(value, channel, item)?);
        }
    }
    Ok(StoredBranch { basis: BranchBasis::Dct, counts: counts.to_vec(), indices: Vec::new(), coeffs })
}

/// The weight `[out, inp]` that the coefficients of the first rows of `basis` stand for.
///
/// # Panics
/// If the basis has fewer rows than a channel has coefficients.
pub fn reconstruct(branch: &StoredBranch, basis: &Basis, out: usize) -> Vec<f32> {
    let (inp, rank) = (basis.in_features(), branch.counts.iter().copied().max().map_or(0, usize::from));
    let mut w = vec![0.0; out * inp];
    if rank == 0 {
        return w;
    }
    // C [out, rank], with zeros where a channel keeps less, times P [rank, in].
    let mut coeffs = vec![0.0; out * rank];
    let mut rest = branch.coeffs.iter();
    for (row, &count) in coeffs.chunks_exact_mut(rank).zip(&branch.counts) {
        row.iter_mut().zip(rest.by_ref().take(usize::from(count))).for_each(|(x, c)| *x = c.to_f32());
    }
    let rows = basis.rows(rank);
    let transposed: Vec<f32> = (0..inp).flat_map(|i| rows.iter().skip(i).step_by(inp).copied()).collect();
    matmul_nt(&coeffs, &transposed, &mut w, out, rank, inp, false);
    w
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounding::testing::gaussian;

    #[test]
    fn what_is_left_out_is_the_energy_of_the_other_frequencies() {
        let (out, inp) = (4, 45);
        let w = gaussian(out * inp, 1);
        let basis = Basis::Dct(inp);
        let counts = [0u16, 1, 9, 45];
        let branch = truncate(&w, out, inp, &counts).unwrap();
        assert_eq!(branch.coeffs.len(), 55);
        let back = reconstruct(&branch, &basis, out);
        let rows = basis.rows(inp);
        for (channel, &count) in counts.iter().enumerate() {
            let w = &w[channel * inp..][..inp];
            let others = rows
                .chunks(inp)
                .skip(usize::from(count))
                .map(|row| row.iter().zip(w).map(|(a, b)| f64::from(a * b)).sum::<f64>().powi(2));
            let want: f64 = others.sum();
            let got: f64 = w.iter().zip(&back[channel * inp..]).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            assert!((got - want).abs() < 1e-3 * want + 1e-4, "{channel}: {got} {want}");
        }
    }
}
