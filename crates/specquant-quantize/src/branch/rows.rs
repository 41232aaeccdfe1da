//! Outlier channels in 16 bits: the branch is a few input channels of the weight as they are (LLM.int8(), arXiv 2208.07339; Atom, arXiv
//! 2310.19102). Smoothing moves activation outliers exactly there.
//!
//! Only the weight side is kept: as in the paper's two-branch form, the quantized activation holds these inputs too, and their range.
//! LLM.int8() and Atom take them out of it.
//!
//! The channels are those that matter most to the output, by `E[x_i²] · Σ_j w_ji²` over all layers that share the input.

use crate::layer::Weight;

/// The `r` input channels of most weight, the most important first. input_energy: `[in]`, mean squares of the input up to a factor.
pub fn select(weights: &[Weight], input_energy: &[f64], r: usize) -> Vec<u32> {
    let mut energy = vec![0.0f64; input_energy.len()];
    for row in weights.iter().flat_map(|w| w.values.chunks_exact(w.inp)) {
        energy.iter_mut().zip(row).for_each(|(e, w)| *e += f64::from(*w).powi(2));
    }
    energy.iter_mut().zip(input_energy).for_each(|(e, x)| *e *= x);
    let mut order: Vec<u32> = (0..energy.len() as u32).collect();
    order.sort_by(|&a, &b| energy[b as usize].total_cmp(&energy[a as usize])); // stable
    order.truncate(r);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_channels_of_most_output_energy_are_chosen() {
        let values = [1.0, 3.0, 2.0, 0.0, 1.0, 0.0, 2.0, 9.0];
        let weight = Weight { name: "w", out: 2, inp: 4, values: &values, bias: None, clip: None };
        // Column energies 2, 9, 8, 81 times those of the input.
        assert_eq!(select(&[weight], &[1.0, 1.0, 2.0, 0.0], 3), [2, 1, 0]);
    }
}
