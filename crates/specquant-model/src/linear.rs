//! A linear layer, dense or quantized, and the work that layers with one input share.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use specquant_kernels as kernels;
use specquant_kernels::{
    ActFormat, ActQuantizer, Basis, BranchCoeffs, BranchPart, Buffer, PackedDense, PackedWeights,
    QuantizedActs,
};

use crate::{InputTransform, Levels, MappedMatrix, Result};

/// Output channels widened at a time: 128 × 4096 f32 are 2 MiB, about a core's L2.
const PANEL: usize = 128;
/// Up to this many rows, panels of output channels run in parallel; above, rows do.
const FEW_ROWS: usize = 32;

/// A dense weight matrix, `[out, in]`.
pub enum DenseWeight {
    /// On the memory map, widened to f32 by panels whenever it is used.
    Mapped(MappedMatrix),
    /// Widened once.
    Owned(Vec<f32>),
    /// Packed once for products: what a model that runs for long has.
    Packed(PackedDense),
}

/// `y = x Wᵀ + b` in f32.
pub struct DenseLinear {
    /// Output features.
    pub out: usize,
    /// Input features.
    pub inp: usize,
    /// `[out, in]`.
    pub weight: DenseWeight,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

/// The part of a layer that stays in floating point, `(x Pᵀ) Cᵀ`.
pub struct Branch {
    /// P; layers with one input share it.
    pub basis: Arc<Basis>,
    /// C.
    pub coeffs: BranchCoeffs,
}

/// The columns of a weight that read the kept coordinates of an [`InputTransform`].
pub struct Kept {
    /// `[out, r]`.
    pub weights: PackedWeights,
    /// Bits of an activation code; 16, which leaves the coordinates in f32, where the layer's others are 16.
    pub act_bits: u8,
}

/// `y = Q_a(x) Q_w(R)ᵀ + (x Pᵀ) Cᵀ + b` (arXiv 2511.11663, Eq. 16).
pub struct QuantLinear {
    /// The rounded residual, `[out, in]`; without the kept coordinates.
    pub weights: PackedWeights,
    /// What reads the kept coordinates.
    pub kept: Option<Kept>,
    /// Bits of an activation code; 16 leaves the input in f32.
    pub act_bits: u8,
    /// What activation codes stand for.
    pub act_levels: Levels,
    /// Clip ratio of the activation quantizer.
    pub act_clip: f32,
    /// The branch, fed by the unquantized input.
    pub branch: Option<Branch>,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

/// A linear layer.
pub enum Linear {
    /// Full precision.
    Dense(DenseLinear),
    /// Integer weights.
    Quantized(QuantLinear),
}

/// Some rows of a mapped weight as f32.
fn widened(view: &MappedMatrix, rows: Range<usize>, inp: usize) -> Result<Vec<f32>> {
    let mut out = vec![0.0; rows.len() * inp];
    view.rows_f32(rows, &mut out)?;
    Ok(out)
}

impl DenseLinear {
    /// x: `[rows, in]`; y: `[rows, out]`, overwritten.
    fn forward(&self, x: &[f32], rows: usize, y: &mut [f32]) -> Result<()> {
        match &self.weight {
            DenseWeight::Owned(w) => kernels::matmul_nt(x, w, y, rows, self.inp, self.out, false),
            DenseWeight::Packed(w) => kernels::matmul_packed(x, w, y, rows),
            DenseWeight::Mapped(view) if rows == 1 => {
                y.par_chunks_mut(PANEL).enumerate().try_for_each(|(p, y)| {
                    let w = widened(view, p * PANEL..p * PANEL + y.len(), self.inp)?;
                    kernels::matmul_nt(x, &w, y, 1, self.inp, y.len(), false);
                    Ok(())
                })?
            }
            DenseWeight::Mapped(view) => {
                let panel = |start: usize| -> Result<(usize, Vec<f32>)> {
                    let width = PANEL.min(self.out - start);
                    let w = widened(view, start..start + width, self.inp)?;
                    let mut part = vec![0.0; rows * width];
                    if rows <= FEW_ROWS {
                        kernels::matmul_nt(x, &w, &mut part, rows, self.inp, width, false);
                    } else {
                        let w = PackedDense::pack(&w, width, self.inp);
                        kernels::matmul_packed(x, &w, &mut part, rows);
                    }
                    Ok((start, part))
                };
                let starts: Vec<usize> = (0..self.out).step_by(PANEL).collect();
                if rows <= FEW_ROWS {
                    let parts: Vec<_> = starts.into_par_iter().map(panel).collect::<Result<_>>()?;
                    parts.iter().for_each(|(start, part)| scatter(part, rows, *start, self.out, y));
                } else {
                    for start in starts {
                        let (start, part) = panel(start)?;
                        scatter(&part, rows, start, self.out, y);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Copies `part` `[rows, width]` to columns `start..` of `y` `[rows, out]`.
fn scatter(part: &[f32], rows: usize, start: usize, out: usize, y: &mut [f32]) {
    let width = part.len() / rows;
    for (row, part) in part.chunks_exact(width).enumerate() {
        y[row * out + start..][..width].copy_from_slice(part);
    }
}

impl Linear {
    fn branch(&self) -> Option<&Branch> {
        match self {
            Linear::Dense(_) => None,
            Linear::Quantized(l) => l.branch.as_ref(),
        }
    }

    fn bias(&self) -> Option<&[f32]> {
        match self {
            Linear::Dense(l) => l.bias.as_deref(),
            Linear::Quantized(l) => l.bias.as_deref(),
        }
    }

    /// Whether it is widened anew whenever it is used.
    pub(crate) fn is_mapped(&self) -> bool {
        matches!(self, Linear::Dense(DenseLinear { weight: DenseWeight::Mapped(_), .. }))
    }

    /// Output features.
    pub fn out_features(&self) -> usize {
        match self {
            Linear::Dense(l) => l.out,
            Linear::Quantized(l) => l.weights.out_features(),
        }
    }

    /// Input features.
    pub fn in_features(&self) -> usize {
        match self {
            Linear::Dense(l) => l.inp,
            Linear::Quantized(l) => {
                l.weights.in_features() + l.kept.as_ref().map_or(0, |k| k.weights.in_features())
            }
        }
    }

    /// Weight `[out, in]` and bias `[out]` of a dense layer that was widened and not packed; nothing of any other.
    pub fn dense(&self) -> Option<(&[f32], Option<&[f32]>)> {
        match self {
            Linear::Dense(DenseLinear { weight: DenseWeight::Owned(w), bias, .. }) => {
                Some((w, bias.as_deref()))
            }
            _ => None,
        }
    }

    /// [`Linear::dense`], to be changed.
    pub fn dense_mut(&mut self) -> Option<(&mut Vec<f32>, Option<&mut Vec<f32>>)> {
        match self {
            Linear::Dense(DenseLinear { weight: DenseWeight::Owned(w), bias, .. }) => {
                Some((w, bias.as_mut()))
            }
            _ => None,
        }
    }

    /// Widens a dense weight on the memory map to f32 in memory; anything else stays as it is.
    ///
    /// # Errors
    /// When a weight is not finite.
    pub fn widen(&mut self) -> Result<()> {
        if let Linear::Dense(DenseLinear { weight, .. }) = self
            && let DenseWeight::Mapped(view) = weight
        {
            *weight = DenseWeight::Owned(view.to_f32()?);
        }
        Ok(())
    }

    /// Packs a dense weight for products, in f32 unless fewer bits hold it exactly; anything else stays as it is.
    ///
    /// # Errors
    /// When a weight is not finite.
    pub fn pack(&mut self) -> Result<()> {
        if let Linear::Dense(DenseLinear { weight, out, inp, .. }) = self {
            *weight = match weight {
                DenseWeight::Mapped(matrix) => DenseWeight::Packed(matrix.pack()?),
                DenseWeight::Owned(w) => DenseWeight::Packed(PackedDense::pack(w, *out, *inp).compact()),
                DenseWeight::Packed(_) => return Ok(()),
            };
        }
        Ok(())
    }

    /// One layer on an input of its own. x: `[rows, in]`; returns `[rows, out]`.
    ///
    /// # Errors
    /// When a mapped weight cannot be widened.
    pub fn forward(&self, x: &[f32], rows: usize) -> Result<Buffer<f32>> {
        self.forward_transformed(x, rows, None)
    }

    /// As [`Linear::forward`], with the transform that the layer was made for.
    ///
    /// # Errors
    /// When a mapped weight cannot be widened.
    pub fn forward_transformed(
        &self,
        x: &[f32],
        rows: usize,
        transform: Option<&InputTransform>,
    ) -> Result<Buffer<f32>> {
        let mut y = Buffer::new(rows * self.out_features());
        forward_shared([self], x, rows, transform, [&mut y])?;
        Ok(y)
    }
}

/// The kernels' name of what activation codes of `bits` bits stand for.
fn act_format(bits: u8, levels: Levels) -> ActFormat {
    match levels {
        Levels::Gaussian => ActFormat::Gaussian,
        Levels::Uniform => ActFormat::Uniform { bits },
    }
}

/// Quantizes inputs x `[rows, in]` per token to below 16 bits, as a [`QuantLinear`] does.
///
/// # Panics
/// If there are no rows, or not whole ones.
pub fn quantize_input(x: &[f32], rows: usize, bits: u8, levels: Levels, clip: f32) -> QuantizedActs {
    kernels::quantize_acts_to(
        x,
        rows,
        ActQuantizer { cols: x.len() / rows, format: act_format(bits, levels), clip },
    )
}

/// Runs layers that read the same input, x: `[rows, in]`, and overwrites their outputs, `[rows, out]` each.
///
/// The input is transformed once, quantized once if all layers quantize it alike, and projected once on a basis that the layers share, on as many of its
/// rows as any of them uses.
///
/// # Errors
/// When a mapped weight cannot be widened.
pub fn forward_shared<const N: usize>(
    layers: [&Linear; N],
    x: &[f32],
    rows: usize,
    transform: Option<&InputTransform>,
    mut outputs: [&mut [f32]; N],
) -> Result<()> {
    debug_assert!(layers.iter().all(|l| x.len() == rows * l.in_features()));
    let branches = layers.map(Linear::branch);
    let split;
    let (x, kept) = match (transform, integer_input(&layers)) {
        (Some(transform), Some((format, clip, kept_bits))) if branches.iter().all(Option::is_none) => {
            // Nobody asks for the transformed input itself.
            let [codes, kept] = transform.apply_quantized(x, rows, (format, clip), kept_bits.unwrap_or(8));
            let kept = kept_bits.map(|_| &kept);
            multiply_codes(layers, &codes, kept, [None; N], outputs.each_mut());
            add_biases(layers, outputs);
            return Ok(());
        }
        (Some(transform), _) => {
            split = transform.apply(x, rows);
            (&split.rest[..], &split.kept[..])
        }
        (None, _) => (x, &[][..]),
    };
    // Once for each basis, with the first layer that has it.
    let alike = |a: &Branch, b: &Branch| Arc::ptr_eq(&a.basis, &b.basis);
    let first = |of: &Branch| branches.iter().position(|b| b.is_some_and(|b| alike(b, of)));
    let projected: [Option<Buffer<f32>>; N] = std::array::from_fn(|i| {
        let branch = branches[i].filter(|b| first(b) == Some(i))?;
        let ranks = branches.iter().flatten().filter(|b| alike(b, branch)).map(|b| b.coeffs.rank());
        Some(branch.basis.project(x, rows, ranks.max().unwrap_or(0)))
    });
    let parts = std::array::from_fn(|i| {
        let branch = branches[i]?;
        let p = projected[first(branch)?].as_deref()?;
        Some(BranchPart { p, stride: p.len() / rows.max(1), coeffs: &branch.coeffs })
    });
    multiply(layers, x, kept, rows, parts, outputs.each_mut())?;
    add_biases(layers, outputs);
    Ok(())
}

fn add_biases<const N: usize>(layers: [&Linear; N], outputs: [&mut [f32]; N]) {
    for (layer, y) in layers.into_iter().zip(outputs) {
        if let Some(bias) = layer.bias() {
            y.chunks_exact_mut(bias.len())
                .for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
        }
    }
}

/// What the layers quantize their input to, its clip ratio and the bits of their kept coordinates, if all multiply integers and agree on that.
fn integer_input(layers: &[&Linear]) -> Option<(ActFormat, f32, Option<u8>)> {
    // By its bits, for even what is not a number equals itself then.
    let input = |l: &&Linear| match l {
        Linear::Quantized(l) if l.act_bits < 16 => {
            let format = act_format(l.act_bits, l.act_levels);
            Some((format, l.act_clip.to_bits(), l.kept.as_ref().map(|k| k.act_bits)))
        }
        _ => None,
    };
    let first = layers.first().and_then(input);
    let agreed = first.filter(|_| layers.iter().all(|l| input(l) == first));
    agreed.map(|(format, clip, kept_bits)| (format, f32::from_bits(clip), kept_bits))
}

/// The layers' products and branches, without bias. x: `[rows, in]`, kept: `[rows, r]`, the two parts of the transformed input.
fn multiply<const N: usize>(
    layers: [&Linear; N],
    x: &[f32],
    kept: &[f32],
    rows: usize,
    branches: [Option<BranchPart>; N],
    outputs: [&mut &mut [f32]; N],
) -> Result<()> {
    if let Some((format, clip, kept_bits)) = integer_input(&layers) {
        let codes = kernels::quantize_acts_to(x, rows, ActQuantizer { cols: x.len() / rows, format, clip });
        let kept = kept_bits.map(|bits| kernels::quantize_acts(kept, rows, kept.len() / rows, bits, 1.0));
        multiply_codes(layers, &codes, kept.as_ref(), branches, outputs);
        return Ok(());
    }
    // One by one.
    for ((layer, branch), y) in layers.into_iter().zip(branches).zip(outputs) {
        match layer {
            Linear::Dense(l) => l.forward(x, rows, y)?,
            Linear::Quantized(l) if l.act_bits == 16 => {
                kernels::matmul_float(x, rows, &l.weights, y);
                if let Some(Kept { weights, .. }) = &l.kept {
                    kernels::add_matmul_float(kept, rows, weights, y);
                }
                if let Some(branch) = branch {
                    kernels::add_branch(branch, rows, y);
                }
            }
            Linear::Quantized(_) => multiply([layer], x, kept, rows, [branch], [y])?,
        }
    }
    Ok(())
}

/// The products of layers that [`integer_input`] says something of.
fn multiply_codes<const N: usize>(
    layers: [&Linear; N],
    codes: &QuantizedActs,
    kept_codes: Option<&QuantizedActs>,
    branches: [Option<BranchPart>; N],
    outputs: [&mut &mut [f32]; N],
) {
    let parts = layers.map(|layer| {
        let Linear::Quantized(l) = layer else { unreachable!("a dense layer has no integer input") };
        let kept = l.kept.as_ref().map_or(&l.weights, |k| &k.weights);
        [(codes, &l.weights), (kept_codes.unwrap_or(codes), kept)]
    });
    let used = if kept_codes.is_some() { 2 } else { 1 };
    let mut others = branches.into_iter().zip(outputs);
    let products = parts.each_ref().map(|parts| {
        let (branch, y) = others.next().map_or((None, &mut [][..]), |(branch, y)| (branch, y));
        kernels::IntProduct { parts: &parts[..used], branch, y }
    });
    kernels::matmul_int_all(products);
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    fn layer(out: usize, inp: usize, act_bits: u8, branch: Option<(&Arc<Basis>, usize)>) -> Linear {
        let codes: Vec<i8> = (0..out * inp).map(|i| (i * 31 % 15) as i8 - 7).collect();
        let branch = branch.map(|(basis, rank)| {
            let rows: Vec<u32> = (0..out).flat_map(|_| 0..rank as u32).collect();
            let coeffs: Vec<f16> = values(out * rank, rank).into_iter().map(f16::from_f32).collect();
            let coeffs = BranchCoeffs::pack(inp, &vec![rank; out], &rows, &coeffs).unwrap();
            Branch { basis: Arc::clone(basis), coeffs }
        });
        Linear::Quantized(QuantLinear {
            weights: PackedWeights::pack(&codes, &vec![0.01; out], out, inp, 4, inp).unwrap(),
            kept: None,
            act_bits,
            act_levels: Levels::Uniform,
            act_clip: 1.0,
            branch,
            bias: Some(values(out, 9)),
        })
    }

    /// Layers that share an input and some of their bases, at other ranks, are what each is alone.
    #[test]
    fn sharing_changes_nothing() {
        let inp = 48;
        let bases = [Basis::Fourier(inp), Basis::Dct(inp)].map(Arc::new);
        for act_bits in [4, 16] {
            let layers = [
                layer(17, inp, act_bits, Some((&bases[0], 5))),
                layer(40, inp, 4, Some((&bases[1], 7))),
                Linear::Dense(DenseLinear {
                    out: 20,
                    inp,
                    weight: DenseWeight::Owned(values(20 * inp, 4)),
                    bias: None,
                }),
                layer(33, inp, act_bits, Some((&bases[0], 12))),
                layer(8, inp, 4, None),
            ];
            for rows in [1, 30] {
                let x = values(rows * inp, rows);
                let mut together = layers.each_ref().map(|l| vec![0.0; rows * l.out_features()]);
                let outputs = together.each_mut().map(Vec::as_mut_slice);
                forward_shared(layers.each_ref(), &x, rows, None, outputs).unwrap();
                for (layer, y) in layers.iter().zip(&together) {
                    assert_eq!(**y, layer.forward(&x, rows).unwrap()[..], "{act_bits} bits, {rows} rows");
                }
            }
        }
    }
}
