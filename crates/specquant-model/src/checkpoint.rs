//! The SpecQuant checkpoint: a Hugging Face directory whose linear layers are stored as integer codes and branch coefficients.
//!
//! `config.json` carries a `quantization_config` ([`QuantizationConfig`]); the safetensors hold, for a linear layer `P` of shape
//! `[out, in]`,
//!
//! | tensor | dtype, shape | meaning |
//! |---|---|---|
//! | `P.weight_packed` | U8 `[out, ceil(bits · in / 8)]`; in less r where r inputs are kept | up to 4 bits: code + 2^(bits−1), the first input in the lowest bits |
//! | | | with `scheme.levels = "gaussian"` the code is the number of a level of [`specquant_kernels::GAUSSIAN_LEVELS`], less 8 |
//! | `P.weight_packed` | I8 `[out, in]` | 5 to 8 bits |
//! | `P.weight_bits` | U8 `[out]` | where channels differ: the bits of each; then `weight_packed` is U8 `[bytes]`, row after row |
//! | `P.weight_scale` | F16 `[out, groups]` | weight = code × scale; F32 where f16 would lose precision |
//! | `P.branch_counts` | U16 `[out]` | items (Fourier bins, or single rows of the basis) that each output channel keeps; absent where all keep as many |
//! | `P.branch_indices` | U16 `[Σcounts]` | which items, for the basis `fourier-top`; the first ones otherwise |
//! | `P.branch_coeffs` | F16 `[Σcounts, 2 or 1]` | (cos, sin) of a Fourier bin, or the coefficient of a row, channel by channel, the most important first |
//! | `P.kept_packed` | I8 `[out, r]` | the columns that read the r kept coordinates of a transformed input; `weight_packed` has the others |
//! | `P.kept_scale` | F16 `[out, 1]` | as `weight_scale` |
//! | `P.bias` | F32 `[out]` | where the model has one |
//!
//! and for the layers that read one input (`model.layers.N.qkv`, `.o`, `.gate_up`, `.down`) what a basis that is not computed consists of:
//! `branch_basis` F16 `[r, in]` (`svd`, `wsvd`) or `branch_inputs` I32 `[r]` (`rows`). Where `input_rotation` is given, the input is rotated (`hadamard`: by
//! the cosine transform where there is no Hadamard matrix of its width) and goes through the Householder reflections of the vectors `reflections` I8 `[r, in]`,
//! which need no scale; its first r coordinates are divided by `kept_norm` F32 `[r]`. Where `input_rotation` is `kronecker`, an input x is multiplied by A ⊗ B, `kronecker_left` F16 `[n₁, n₁]` and
//! `kronecker_right` F16 `[n₂, n₂]` with n₁ n₂ = in, one of which may be absent for the identity. `act_clip` F32 `[1]` is the input's own clip ratio, in place of the scheme's.
//! `model.layers.N.self_attn.k_center` and `.v_center` F32 `[kv_heads · head_dim]` are subtracted from keys (after RoPE and rotation) and values before they are
//! cached. `model.layers.N.self_attn.k_transform` F16 `[head_dim, head_dim]` is the matrix that keys are multiplied by after RoPE, and queries by its inverse
//! transpose.
//!
//! Everything else keeps its Hugging Face name and meaning: norms in F32 (smoothing and rotations are folded into the weights; those of Gemma
//! less 1, see [`crate::ModelConfig::norm_tensor`]), embeddings and `lm_head` in 16 bit or as `weight_packed` I8 + `weight_scale`.

use std::path::Path;

use half::f16;
use serde::{Deserialize, Serialize};

use crate::{Error, InputRotation, OnlineRotations, Result, Scheme};

/// Version of this layout.
pub const FORMAT_VERSION: u32 = 4;

/// What the directions of a branch are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BranchBasis {
    /// The lowest Fourier bins of every output channel (SpecQuant).
    Fourier,
    /// The largest Fourier bins of every output channel.
    FourierTop,
    /// The lowest frequencies of the cosine transform.
    Dct,
    /// Single inputs: outlier channels in 16 bits.
    Rows,
    /// The leading singular directions of the weight (SVDQuant).
    Svd,
    /// Those of the weight as its inputs weigh it.
    Wsvd,
}

impl BranchBasis {
    /// Every basis.
    pub const ALL: [BranchBasis; 6] = [
        BranchBasis::Fourier,
        BranchBasis::FourierTop,
        BranchBasis::Dct,
        BranchBasis::Rows,
        BranchBasis::Svd,
        BranchBasis::Wsvd,
    ];

    /// As it is written in recipes and checkpoints.
    pub fn name(self) -> &'static str {
        match self {
            BranchBasis::Fourier => "fourier",
            BranchBasis::FourierTop => "fourier-top",
            BranchBasis::Dct => "dct",
            BranchBasis::Rows => "rows",
            BranchBasis::Svd => "svd",
            BranchBasis::Wsvd => "wsvd",
        }
    }

    /// Whether an item is a Fourier bin, of two coefficients.
    pub fn is_fourier(self) -> bool {
        matches!(self, BranchBasis::Fourier | BranchBasis::FourierTop)
    }

    /// Whether all channels keep the same directions, so that a branch has a rank; otherwise every channel has items of its own.
    pub fn is_shared(self) -> bool {
        matches!(self, BranchBasis::Rows | BranchBasis::Svd | BranchBasis::Wsvd)
    }

    /// Whether the directions come from the singular values of the weight, so that they can be fitted again.
    pub fn is_low_rank(self) -> bool {
        matches!(self, BranchBasis::Svd | BranchBasis::Wsvd)
    }

    /// Coefficients of an item.
    pub fn coeffs_per_item(self) -> usize {
        if self.is_fourier() { 2 } else { 1 }
    }
}

/// The `quantization_config` of config.json.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizationConfig {
    /// Always "specquant".
    pub quant_method: String,
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// Version of the program that wrote the checkpoint.
    pub specquant_version: String,
    /// Bits and granularity.
    pub scheme: Scheme,
    /// Directions of the 16-bit branch; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch_basis: Option<BranchBasis>,
    /// Rotations that could not be folded into weights.
    #[serde(default)]
    pub online_rotations: OnlineRotations,
    /// Rotation of the input of every linear layer, behind its kept coordinates, or that it has a learned transform; absent without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_rotation: Option<InputRotation>,
    /// The whole recipe, as the quantizer was given it.
    pub recipe: serde_json::Value,
}

impl QuantizationConfig {
    /// The `quantization_config` of a config.json, if it is ours. `dir` is where it lies, for messages.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it is ours but cannot be understood.
    pub fn from_config(config: &serde_json::Value, dir: &Path) -> Result<Option<Self>> {
        let Some(value) = config.get("quantization_config").filter(|v| v["quant_method"] == "specquant")
        else {
            return Ok(None);
        };
        let fail = |why: String| {
            let file = dir.join("config.json");
            Error::Checkpoint(format!(
                "{}: quantization_config: {why}; quantize the model again",
                file.display()
            ))
        };
        let quant: Self = serde_json::from_value(value.clone()).map_err(|e| fail(e.to_string()))?;
        if quant.format_version != FORMAT_VERSION {
            return Err(fail(format!(
                "checkpoint format {} is not the {FORMAT_VERSION} that this version reads",
                quant.format_version
            )));
        }
        quant.scheme.validate().map_err(|e| fail(e.to_string()))?;
        Ok(Some(quant))
    }
}

/// A tensor ready to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensor {
    /// Hugging Face name.
    pub name: String,
    /// Element type on disk.
    pub dtype: safetensors::Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub bytes: Vec<u8>,
}

impl StoredTensor {
    /// An F32 tensor.
    pub fn f32(name: String, shape: Vec<usize>, values: &[f32]) -> Self {
        StoredTensor {
            name,
            dtype: safetensors::Dtype::F32,
            shape,
            bytes: le_bytes(values, f32::to_le_bytes),
        }
    }

    /// An F16 tensor.
    pub fn f16(name: String, shape: Vec<usize>, values: &[f16]) -> Self {
        StoredTensor {
            name,
            dtype: safetensors::Dtype::F16,
            shape,
            bytes: le_bytes(values, f16::to_le_bytes),
        }
    }
}

pub(crate) fn le_bytes<T: Copy, const N: usize>(values: &[T], to: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&v| to(v)).collect()
}

/// Whether f16 holds every scale to its full 11 bits; if not they are stored in f32.
pub fn scales_fit_f16(scales: &[f32]) -> bool {
    scales.iter().all(|s| (f16::MIN_POSITIVE.to_f32()..=f16::MAX.to_f32()).contains(s))
}

/// The scales that the disk will hold, so that rounding sees what the engine will multiply by.
pub fn storable_scales(scales: Vec<f32>) -> Vec<f32> {
    if !scales_fit_f16(&scales) {
        return scales;
    }
    scales.into_iter().map(|s| f16::from_f32(s).to_f32()).collect()
}
