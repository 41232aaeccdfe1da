//! The branch of a quantized layer, and the basis that its site's layers share, between the disk and the kernels.

use std::sync::Arc;

use half::f16;
use specquant_kernels::{Basis, BranchCoeffs};

use crate::checkpoint::{StoredTensor, le_bytes};
use crate::stored_linear::Reader;
use crate::{BranchBasis, Dtype, QuantizationConfig, Result, Site, Source};

/// The coefficients of a layer's branch as they lie on disk.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredBranch {
    /// What the items are.
    pub basis: BranchBasis,
    /// Items of every output channel, `[out]`.
    pub counts: Vec<u16>,
    /// Which items, `[Σ counts]`, for [`BranchBasis::FourierTop`]; empty otherwise: the first ones.
    pub indices: Vec<u16>,
    /// `[Σ counts, coeffs per item]`, channel by channel, the most important item first.
    pub coeffs: Vec<f16>,
}

/// How much of every channel's branch is loaded: "runtime truncation" (arXiv 2511.11663, section "Implementation details"). What is left out
/// is missing from the sum; the rounded residual does not make up for it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Truncation {
    /// Everything.
    #[default]
    None,
    /// At most that many items.
    Items(usize),
    /// The shortest prefix of the items that holds this share of the channel's stored energy.
    Energy(f32),
}

impl StoredBranch {
    /// Its tensors in the layer named `prefix`.
    pub(crate) fn tensors(&self, prefix: &str) -> Vec<StoredTensor> {
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        let u16s = |suffix: &str, values: &[u16]| StoredTensor {
            name: name(suffix),
            dtype: safetensors::Dtype::U16,
            shape: vec![values.len()],
            bytes: le_bytes(values, u16::to_le_bytes),
        };
        let mut tensors = Vec::new();
        if self.counts.windows(2).any(|w| w[0] != w[1]) {
            tensors.push(u16s("branch_counts", &self.counts));
        }
        if !self.indices.is_empty() {
            tensors.push(u16s("branch_indices", &self.indices));
        }
        let width = self.basis.coeffs_per_item();
        let shape = vec![self.coeffs.len() / width, width];
        tensors.push(StoredTensor::f16(name("branch_coeffs"), shape, &self.coeffs));
        tensors
    }

    /// The coefficients that `truncation` leaves, for the kernel.
    pub(crate) fn pack(
        &self,
        basis: &Basis,
        truncation: Truncation,
    ) -> Result<BranchCoeffs, specquant_kernels::KernelError> {
        let (n, width) = (basis.in_features(), self.basis.coeffs_per_item());
        let items: usize = self.counts.iter().map(|&k| usize::from(k)).sum();
        for (what, got, want) in [
            ("branch coefficients", self.coeffs.len(), items * width),
            ("branch indices", self.indices.len(), if self.indices.is_empty() { 0 } else { items }),
        ] {
            if got != want {
                return Err(specquant_kernels::KernelError::Length { what, got, want });
            }
        }
        let (mut counts, mut rows, mut coeffs) =
            (Vec::with_capacity(self.counts.len()), Vec::new(), Vec::new());
        let mut at = 0;
        for &count in &self.counts {
            let items = at..at + usize::from(count);
            at = items.end;
            let kept = truncation.keep(&self.coeffs[items.start * width..items.end * width], width);
            let before = rows.len();
            for (i, item) in items.take(kept).enumerate() {
                let index = self.indices.get(item).map_or(i, |&i| usize::from(i));
                let coeff = &self.coeffs[item * width..(item + 1) * width];
                if !self.basis.is_fourier() {
                    rows.push(index as u32);
                    coeffs.push(coeff[0]);
                    continue;
                }
                rows.push((2 * index).saturating_sub(1) as u32);
                coeffs.push(coeff[0]);
                // The sine of DC and of the Nyquist frequency is zero everywhere and has no row.
                if index > 0 && 2 * index != n {
                    rows.push(2 * index as u32);
                    coeffs.push(coeff[1]);
                }
            }
            counts.push(rows.len() - before);
        }
        BranchCoeffs::pack(basis.len(), &counts, &rows, &coeffs)
    }
}

impl Truncation {
    /// Items kept of a channel with these coefficients, `[items, width]`.
    fn keep(self, coeffs: &[f16], width: usize) -> usize {
        let items = coeffs.len() / width;
        match self {
            Truncation::None => items,
            Truncation::Items(k) => k.min(items),
            Truncation::Energy(share) => {
                let energy = |item: &[f16]| item.iter().map(|c| c.to_f64().powi(2)).sum::<f64>();
                let total: f64 = coeffs.chunks_exact(width).map(energy).sum();
                let mut held = 0.0;
                coeffs
                    .chunks_exact(width)
                    .take_while(|item| {
                        let short = held < f64::from(share) * total;
                        held += energy(item);
                        short
                    })
                    .count()
            }
        }
    }
}

impl Reader<'_> {
    fn u16s(&self, suffix: &str, len: usize) -> Result<Vec<u16>> {
        let view = self.tensor(suffix)?;
        self.expect(&view, suffix, Dtype::U16, &[len])?;
        Ok(view.bytes().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect())
    }

    /// The branch of a layer with `out` output channels, if there is one.
    ///
    /// # Errors
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) names the tensor and what is wrong with it.
    pub(crate) fn branch(&self, out: usize, basis: Option<BranchBasis>) -> Result<Option<StoredBranch>> {
        let has = |suffix: &str| self.source.has(&self.name(suffix));
        let present: Vec<&str> =
            ["branch_coeffs", "branch_counts", "branch_indices"].into_iter().filter(|s| has(s)).collect();
        let (Some(basis), true) = (basis, !present.is_empty()) else {
            // A branch that nothing declares would be left out of the sum without a word.
            return match present.first() {
                Some(suffix) => {
                    Err(self.fail(suffix, "is there, but config.json names no branch_basis".to_owned()))
                }
                None => Ok(None),
            };
        };
        let view = self.tensor("branch_coeffs")?;
        let width = basis.coeffs_per_item();
        let items = view.shape.first().copied().unwrap_or(0);
        let counts = if has("branch_counts") {
            self.u16s("branch_counts", out)?
        } else {
            match u16::try_from(items / out.max(1)) {
                Ok(each) if usize::from(each) * out == items => vec![each; out],
                _ => {
                    let why = format!("has {items} items for {out} channels, and no branch_counts beside it");
                    return Err(self.fail("branch_coeffs", why));
                }
            }
        };
        let total = counts.iter().map(|&k| usize::from(k)).sum();
        self.expect(&view, "branch_coeffs", Dtype::F16, &[total, width])?;
        let indices = match basis {
            BranchBasis::FourierTop => self.u16s("branch_indices", total)?,
            _ => Vec::new(),
        };
        let coeffs: Vec<f16> =
            view.bytes().chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
        // Here, because a truncation might hide it.
        if let Some(i) = coeffs.iter().position(|c| !c.is_finite()) {
            let why = format!("holds {} in row {}, which is not finite", coeffs[i], i / width);
            return Err(self.fail("branch_coeffs", why));
        }
        Ok(Some(StoredBranch { basis, counts, indices, coeffs }))
    }
}

/// The tensors of a site's basis, for `prefix` such as `model.layers.0`: none where the basis is computed.
pub fn basis_tensors(basis: &Basis, prefix: &str, site: Site) -> Vec<StoredTensor> {
    let name = |suffix: &str| format!("{prefix}.{}.{suffix}", site.name());
    match basis {
        Basis::Fourier(_) | Basis::Dct(_) => Vec::new(),
        Basis::Inputs { indices, .. } => vec![StoredTensor {
            name: name("branch_inputs"),
            dtype: safetensors::Dtype::I32,
            shape: vec![indices.len()],
            bytes: le_bytes(indices, u32::to_le_bytes),
        }],
        Basis::Dense { n, rows } => {
            let half: Vec<f16> = rows.iter().map(|&v| f16::from_f32(v)).collect();
            vec![StoredTensor::f16(name("branch_basis"), vec![basis.len(), *n], &half)]
        }
    }
}

/// The basis of a site's branches, `n` inputs wide; none where its layers have no branch.
pub(crate) fn read_basis(
    source: &Source,
    quant: Option<&QuantizationConfig>,
    prefix: &str,
    site: Site,
    n: usize,
) -> Result<Option<Arc<Basis>>> {
    let Some(kind) = quant.and_then(|q| q.branch_basis) else { return Ok(None) };
    let prefix = format!("{prefix}.{}", site.name());
    let reader = Reader { source, prefix: &prefix };
    let basis = match kind {
        BranchBasis::Fourier | BranchBasis::FourierTop => Basis::Fourier(n),
        BranchBasis::Dct => Basis::Dct(n),
        BranchBasis::Rows if source.has(&reader.name("branch_inputs")) => {
            let view = reader.tensor("branch_inputs")?;
            reader.expect(&view, "branch_inputs", Dtype::I32, &[view.shape.iter().product()])?;
            let indices: Vec<u32> =
                view.bytes().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            if let Some(i) = indices.iter().find(|&&i| i as usize >= n) {
                return Err(reader.fail("branch_inputs", format!("names input {i} of {n}")));
            }
            Basis::Inputs { n, indices }
        }
        BranchBasis::Svd | BranchBasis::Wsvd if source.has(&reader.name("branch_basis")) => {
            let view = reader.tensor("branch_basis")?;
            reader.expect(
                &view,
                "branch_basis",
                Dtype::F16,
                &[view.shape.first().copied().unwrap_or(0), n],
            )?;
            Basis::Dense { n, rows: view.to_f32()? }
        }
        _ => return Ok(None),
    };
    Ok(Some(Arc::new(basis)))
}
