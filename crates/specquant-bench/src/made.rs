//! Weights and inputs that are made up. Speed depends on how often each level occurs (see the kernels for AVX2), not on values otherwise.

use half::f16;
use specquant_kernels::{
    Basis, BranchCoeffs, GAUSSIAN_LEVELS, KernelError, NEAREST_LEVEL, PackedDense, PackedWeights,
    Reflections, fourier_rows,
};
use specquant_model::{
    Branch, DenseLinear, DenseWeight, Error, InputTransform, Kept, Levels, Linear, QuantLinear, Result,
    RotationKind,
};
use std::sync::Arc;

/// A generator of evenly spread bits (Knuth's multiplier): the same for the same seed.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    /// Roughly Gaussian (the sum of four evenly spread numbers), with a standard deviation of 1.
    fn gaussian(&mut self) -> f32 {
        let sum: u32 = (self.bits() as u32).to_le_bytes().into_iter().map(u32::from).sum();
        (sum as f32 - 510.0) / 147.8
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 32
    }

    /// In [−1, 1).
    pub(crate) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.bits() as i32 as f32 / (1u64 << 31) as f32).collect()
    }
}

fn named(cause: KernelError) -> Error {
    Error::Kernel { name: "a made-up layer".to_owned(), cause }
}

/// Codes of `bits` bits, `[out, inp]`, a scale a channel.
pub(crate) fn weights(
    noise: &mut Noise,
    out: usize,
    inp: usize,
    bits: u8,
    levels: Levels,
) -> Result<PackedWeights> {
    let scales = vec![0.02 / (inp as f32).sqrt(); out];
    let packed = if levels == Levels::Gaussian {
        // The outermost level stands for 2.73 standard deviations.
        let unit = f32::from(GAUSSIAN_LEVELS[15]) / 2.73;
        let codes =
            (0..out * inp).map(|_| NEAREST_LEVEL[((noise.gaussian() * unit) as i8 as i32 + 128) as usize]);
        let codes: Vec<i8> = codes.collect();
        PackedWeights::pack_levels(&codes, &scales, out, inp, inp, &GAUSSIAN_LEVELS)
    } else {
        let codes: Vec<i8> = (0..out * inp).map(|_| noise.bits() as i8 >> (8 - bits)).collect();
        PackedWeights::pack(&codes, &scales, out, inp, bits, inp)
    };
    packed.map_err(named)
}

/// What a layer is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// f32, packed.
    Dense,
    /// 4-bit weights and activations and nothing else.
    Plain,
    /// The paper's: a branch of so many Fourier bins in every channel.
    SpecQuant(usize),
    /// The default recipe: so many directions of the input at 8 bits, the input rotated before, levels that suit a Gaussian.
    Spectral(usize),
}

impl Kind {
    /// What comes before a layer's input of width n.
    pub(crate) fn transform(self, noise: &mut Noise, n: usize) -> Option<InputTransform> {
        let Kind::Spectral(keep) = self else { return None };
        let vectors = noise.values(keep * n).into_iter().map(|v| (v * 127.0).round()).collect();
        Some(InputTransform::new(Reflections::new(n, vectors), vec![1.0; keep], RotationKind::Hadamard))
    }

    /// The directions of the branch of the layers that read an input of width n.
    pub(crate) fn basis(self, n: usize) -> Option<Arc<Basis>> {
        matches!(self, Kind::SpecQuant(_)).then(|| Arc::new(Basis::Fourier(n)))
    }

    /// A layer. basis: of [`Kind::basis`].
    pub(crate) fn linear(
        self,
        noise: &mut Noise,
        out: usize,
        inp: usize,
        basis: Option<&Arc<Basis>>,
    ) -> Result<Linear> {
        if self == Kind::Dense {
            let weight = DenseWeight::Packed(PackedDense::pack(&noise.values(out * inp), out, inp));
            return Ok(Linear::Dense(DenseLinear { out, inp, weight, bias: None }));
        }
        let (keep, levels) = match self {
            Kind::Spectral(keep) => (keep, Levels::Gaussian),
            _ => (0, Levels::Uniform),
        };
        let kept = match keep {
            0 => None,
            keep => Some(Kept { weights: weights(noise, out, keep, 8, Levels::Uniform)?, act_bits: 8 }),
        };
        let branch = match (self, basis) {
            (Kind::SpecQuant(k), Some(basis)) => {
                let r = fourier_rows(inp, k);
                let rows: Vec<u32> = (0..out).flat_map(|_| 0..r as u32).collect();
                let coeffs =
                    BranchCoeffs::pack(inp, &vec![r; out], &rows, &vec![f16::from_f32(0.01); r * out]);
                Some(Branch { basis: basis.clone(), coeffs: coeffs.map_err(named)? })
            }
            _ => None,
        };
        Ok(Linear::Quantized(QuantLinear {
            weights: weights(noise, out, inp - keep, 4, levels)?,
            kept,
            act_bits: 4,
            act_levels: levels,
            act_clip: 0.9,
            branch,
            bias: None,
        }))
    }
}
