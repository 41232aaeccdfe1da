//! The SpecQuant checkpoint: a Hugging Face directory whose linear layers are stored as integer codes and spectral coefficients.
//!
//! `config.json` carries a `quantization_config` ([`QuantizationConfig`]); the safetensors hold, for a linear layer `P` of shape
//! `[out, in]`,
//!
//! | tensor | dtype, shape | meaning |
//! |---|---|---|
//! | `P.weight_packed` | U8 `[out, ceil(in/2)]` | up to 4 bits: code + 8, even inputs in the low nibble |
//! | `P.weight_packed` | I8 `[out, in]` | 5 to 8 bits |
//! | `P.weight_scale` | F16 `[out, groups]` | weight = code × scale; F32 where f16 would lose precision |
//! | `P.spectral_bins` | U16 `[out]` | k, the number of kept low-frequency bins of each output channel |
//! | `P.spectral_coeffs` | F16 `[Σk, 2]` | (cos, sin) coefficients in the orthonormal real Fourier basis, channel by channel, low frequency first |
//! | `P.bias` | F32 `[out]` | where the model has one |
//!
//! Everything else keeps its Hugging Face name: norms in F32 (smoothing is folded into them), embeddings and `lm_head` in 16 bit
//! or as `weight_packed` I8 + `weight_scale`.

use std::path::Path;

use half::f16;
use serde::{Deserialize, Serialize};
use specquant_kernels::{PackedWeights, SpectralCoeffs};

use crate::linear::{DenseLinear, DenseWeight, Linear, QuantLinear};
use crate::{Dtype, Error, Result, Scheme, Source};

/// Version of this layout.
pub const FORMAT_VERSION: u32 = 1;

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

/// A quantized linear layer as it lies on disk.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredLinear {
    /// Output features.
    pub out: usize,
    /// Input features.
    pub inp: usize,
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Inputs that share a scale.
    pub group_size: usize,
    /// `[out, in]`.
    pub codes: Vec<i8>,
    /// `[out, in / group_size]`.
    pub scales: Vec<f32>,
    /// Kept bins per output channel, `[out]`; empty without a branch.
    pub bins: Vec<u16>,
    /// `[Σ bins, 2]`.
    pub coeffs: Vec<f16>,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
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

fn le_bytes<T: Copy, const N: usize>(values: &[T], to: fn(T) -> [u8; N]) -> Vec<u8> {
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

impl StoredLinear {
    /// The tensors of the layer named `prefix`.
    pub fn tensors(&self, prefix: &str) -> Vec<StoredTensor> {
        let (dtype, width, bytes) = if self.bits <= 4 {
            let nibble = |code: i8| (code + 8) as u8;
            let pair = |pair: &[i8]| nibble(pair[0]) | nibble(pair.get(1).copied().unwrap_or(0)) << 4;
            let packed = self.codes.chunks(self.inp).flat_map(|row| row.chunks(2).map(pair)).collect();
            (safetensors::Dtype::U8, self.inp.div_ceil(2), packed)
        } else {
            (safetensors::Dtype::I8, self.inp, self.codes.iter().map(|&c| c as u8).collect())
        };
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        let scale_shape = vec![self.out, self.inp / self.group_size];
        let scale = if scales_fit_f16(&self.scales) {
            let half: Vec<f16> = self.scales.iter().map(|&s| f16::from_f32(s)).collect();
            StoredTensor::f16(name("weight_scale"), scale_shape, &half)
        } else {
            StoredTensor::f32(name("weight_scale"), scale_shape, &self.scales)
        };
        let mut tensors = vec![
            StoredTensor { name: name("weight_packed"), dtype, shape: vec![self.out, width], bytes },
            scale,
        ];
        if !self.coeffs.is_empty() {
            tensors.push(StoredTensor {
                name: name("spectral_bins"),
                dtype: safetensors::Dtype::U16,
                shape: vec![self.out],
                bytes: le_bytes(&self.bins, u16::to_le_bytes),
            });
            tensors.push(StoredTensor::f16(
                name("spectral_coeffs"),
                vec![self.coeffs.len() / 2, 2],
                &self.coeffs,
            ));
        }
        if let Some(bias) = &self.bias {
            tensors.push(StoredTensor::f32(name("bias"), vec![self.out], bias));
        }
        tensors
    }

    /// Reads the layer named `prefix` of shape `[out, inp]`, checking every length and range.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] names the tensor and what is wrong with it.
    pub fn read(
        source: &Source,
        prefix: &str,
        out: usize,
        inp: usize,
        bits: u8,
        group_size: usize,
    ) -> Result<Self> {
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        let fail = |suffix: &str, why: String| {
            Error::Checkpoint(format!(
                "{}: tensor {prefix}.{suffix} {why}; quantize the model again",
                source.path().display()
            ))
        };
        let packed = source.tensor(&name("weight_packed"))?;
        let (dtype, width) = if bits <= 4 { (Dtype::U8, inp.div_ceil(2)) } else { (Dtype::I8, inp) };
        if packed.dtype != dtype || packed.shape != [out, width] {
            let got = format!("is {} {:?}", packed.dtype.name(), packed.shape);
            return Err(fail(
                "weight_packed",
                format!(
                    "{got} where {bits}-bit codes of a [{out}, {inp}] layer are {dtype:?} [{out}, {width}]"
                ),
            ));
        }
        let codes: Vec<i8> = if bits <= 4 {
            let row = |row: &[u8]| -> Vec<i8> {
                (0..inp).map(|i| ((row[i / 2] >> (4 * (i % 2))) & 15) as i8 - 8).collect()
            };
            packed.bytes().chunks(width).flat_map(row).collect()
        } else {
            packed.bytes().iter().map(|&b| b as i8).collect()
        };
        let scales = source.tensor(&name("weight_scale"))?;
        if scales.shape != [out, inp / group_size] {
            return Err(fail(
                "weight_scale",
                format!("has shape {:?} instead of [{out}, {}]", scales.shape, inp / group_size),
            ));
        }
        let scales = scales.to_f32()?;

        let (mut bins, mut coeffs) = (Vec::new(), Vec::new());
        if source.has(&name("spectral_coeffs")) || source.has(&name("spectral_bins")) {
            let view = source.tensor(&name("spectral_bins"))?;
            if view.dtype != Dtype::U16 || view.shape != [out] {
                return Err(fail(
                    "spectral_bins",
                    format!("is {} {:?} instead of U16 [{out}]", view.dtype.name(), view.shape),
                ));
            }
            bins = view.bytes().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
            let total: usize = bins.iter().map(|&k| usize::from(k)).sum();
            let view = source.tensor(&name("spectral_coeffs"))?;
            if view.dtype != Dtype::F16 || view.shape != [total, 2] {
                return Err(fail(
                    "spectral_coeffs",
                    format!(
                        "is {} {:?} where the bins ask for F16 [{total}, 2]",
                        view.dtype.name(),
                        view.shape
                    ),
                ));
            }
            coeffs = view.bytes().chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
        }
        let bias = read_bias(source, prefix, out)?;
        Ok(StoredLinear { out, inp, bits, group_size, codes, scales, bins, coeffs, bias })
    }

    /// The layer in the kernels' layout.
    ///
    /// # Errors
    /// [`Error::Kernel`] when codes, scales or coefficients are out of range; `prefix` names the layer.
    pub fn to_linear(&self, prefix: &str, scheme: &Scheme) -> Result<Linear> {
        let named = |cause| Error::Kernel { name: prefix.to_owned(), cause };
        let weights =
            PackedWeights::pack(&self.codes, &self.scales, self.out, self.inp, self.bits, self.group_size)
                .map_err(named)?;
        let branch = match self.coeffs.is_empty() {
            true => None,
            false => Some(SpectralCoeffs::pack(self.inp, &self.bins, &self.coeffs).map_err(named)?),
        };
        Ok(Linear::Quantized(QuantLinear {
            weights,
            act_bits: scheme.act_bits,
            act_clip: scheme.act_clip,
            branch,
            bias: self.bias.clone(),
        }))
    }

    /// Bits on disk, everything counted: codes, scales, bins and coefficients (a bias is not a weight).
    pub fn stored_bits(&self) -> usize {
        8 * self
            .tensors("")
            .iter()
            .filter(|t| !t.name.ends_with(".bias"))
            .map(|t| t.bytes.len())
            .sum::<usize>()
    }
}

/// Reads `prefix.bias`, `[out]`, if there is one.
pub(crate) fn read_bias(source: &Source, prefix: &str, out: usize) -> Result<Option<Vec<f32>>> {
    let name = format!("{prefix}.bias");
    if !source.has(&name) {
        return Ok(None);
    }
    let view = source.tensor(&name)?;
    if view.shape != [out] {
        return Err(Error::Checkpoint(format!(
            "{}: tensor {name} has shape {:?} instead of [{out}]",
            source.path().display(),
            view.shape
        )));
    }
    Ok(Some(view.to_f32()?))
}

/// The linear layer `prefix` of shape `[out, inp]`: quantized where the source holds codes, dense on the memory map otherwise.
pub(crate) fn read_linear(
    source: &Source,
    quant: Option<&QuantizationConfig>,
    prefix: &str,
    out: usize,
    inp: usize,
) -> Result<Linear> {
    if let Some(quant) = quant.filter(|_| source.has(&format!("{prefix}.weight_packed"))) {
        let scheme = &quant.scheme;
        return StoredLinear::read(source, prefix, out, inp, scheme.weight_bits, scheme.group(inp))?
            .to_linear(&format!("{}: {prefix}", source.path().display()), scheme);
    }
    let weight = source.tensor(&format!("{prefix}.weight"))?;
    if weight.shape != [out, inp] {
        let file = source.path().display();
        return Err(Error::Checkpoint(format!(
            "{file}: tensor {prefix}.weight has shape {:?} instead of [{out}, {inp}]",
            weight.shape
        )));
    }
    let bias = read_bias(source, prefix, out)?;
    Ok(Linear::Dense(DenseLinear { out, inp, weight: DenseWeight::Mapped(weight), bias }))
}
