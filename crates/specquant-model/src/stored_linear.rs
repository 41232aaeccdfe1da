//! A quantized linear layer between the disk and the kernels: packing, and reading with every check.

use std::sync::Arc;

use half::f16;
use specquant_kernels::{Basis, GAUSSIAN_LEVELS, PackedWeights, UNIFORM_LEVELS};

use crate::checkpoint::{StoredTensor, scales_fit_f16};
use crate::linear::{Branch, DenseLinear, DenseWeight, Kept, Linear, QuantLinear};
use crate::{
    BranchBasis, Dtype, Error, InputTransform, Levels, MappedMatrix, Result, Scheme, Source, StoredBranch,
    TensorView, Truncation,
};

/// A quantized linear layer as it lies on disk.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredLinear {
    /// Output features.
    pub out: usize,
    /// Input features, without the kept coordinates.
    pub inp: usize,
    /// Bits of a code, 2 to 8; the largest of [`StoredLinear::channel_bits`].
    pub bits: u8,
    /// Bits of each channel's codes, `[out]`, at most 4; empty where all have [`StoredLinear::bits`].
    pub channel_bits: Vec<u8>,
    /// What 4-bit codes stand for.
    pub levels: Levels,
    /// Inputs that share a scale.
    pub group_size: usize,
    /// `[out, in]`.
    pub codes: Vec<i8>,
    /// `[out, in / group_size]`.
    pub scales: Vec<f32>,
    /// The columns that read kept coordinates.
    pub kept: Option<StoredKept>,
    /// The part in 16 bits.
    pub branch: Option<StoredBranch>,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

/// The columns of a weight that read the kept coordinates of its [`InputTransform`].
#[derive(Debug, Clone, PartialEq)]
pub struct StoredKept {
    /// `[out, r]`, 8 bits.
    pub codes: Vec<i8>,
    /// `[out]`.
    pub scales: Vec<f32>,
}

/// Bits of kept coordinates and of the weights that read them.
pub const KEPT_BITS: u8 = 8;

/// Appends a row of codes, `bits` each, to a stream of bytes that starts anew with every row.
fn pack_row(codes: &[i8], bits: u8, bytes: &mut Vec<u8>) {
    let (mut word, mut filled) = (0u32, 0);
    for &code in codes {
        word |= ((i32::from(code) + (1 << (bits - 1))) as u32) << filled;
        filled += u32::from(bits);
        while filled >= 8 {
            bytes.push(word as u8);
            word >>= 8;
            filled -= 8;
        }
    }
    if filled > 0 {
        bytes.push(word as u8);
    }
}

/// The inverse of [`pack_row`], with what a code stands for in its place: `levels[code + 8]`, for codes of 4 bits or fewer.
fn unpack_row(bytes: &[u8], bits: u8, inp: usize, levels: &[i8; 16], codes: &mut Vec<i8>) {
    if bits == 4 {
        let begin = codes.len();
        codes.resize(begin + 2 * bytes.len(), 0);
        for (pair, byte) in codes[begin..].as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
            *pair = [levels[usize::from(byte & 15)], levels[usize::from(byte >> 4)]];
        }
        codes.truncate(begin + inp);
        return;
    }
    let (mut word, mut filled, mut bytes) = (0u32, 0, bytes.iter());
    let zero = 8 - (1 << (bits - 1));
    for _ in 0..inp {
        while filled < u32::from(bits) {
            word |= u32::from(bytes.next().copied().unwrap_or(0)) << filled;
            filled += 8;
        }
        codes.push(levels[(word & ((1 << bits) - 1)) as usize + zero]);
        word >>= bits;
        filled -= u32::from(bits);
    }
}

/// The code under which a Gaussian level is stored: its number, less 8.
fn level_code(level: &i8) -> i8 {
    GAUSSIAN_LEVELS.binary_search(level).unwrap_or_default() as i8 - 8
}

/// Bytes of a packed row.
fn row_bytes(inp: usize, bits: u8) -> usize {
    (inp * usize::from(bits)).div_ceil(8)
}

impl StoredLinear {
    /// The tensors of the layer named `prefix`.
    pub fn tensors(&self, prefix: &str) -> Vec<StoredTensor> {
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        let mut tensors = Vec::new();
        let tensor =
            |suffix: &str, dtype, shape, bytes| StoredTensor { name: name(suffix), dtype, shape, bytes };
        if self.bits > 4 {
            let bytes = self.codes.iter().map(|&c| c as u8).collect();
            tensors.push(tensor("weight_packed", safetensors::Dtype::I8, vec![self.out, self.inp], bytes));
        } else {
            let mut bytes = Vec::new();
            for (channel, row) in self.codes.chunks(self.inp).enumerate() {
                let bits = self.channel_bits.get(channel).copied().unwrap_or(self.bits);
                match self.levels {
                    Levels::Uniform => pack_row(row, bits, &mut bytes),
                    // The number of the level, as a code.
                    Levels::Gaussian => {
                        pack_row(&row.iter().map(level_code).collect::<Vec<_>>(), bits, &mut bytes)
                    }
                }
            }
            let shape = match self.channel_bits.is_empty() {
                true => vec![self.out, row_bytes(self.inp, self.bits)],
                false => vec![bytes.len()],
            };
            tensors.push(tensor("weight_packed", safetensors::Dtype::U8, shape, bytes));
            if !self.channel_bits.is_empty() {
                let bits = self.channel_bits.clone();
                tensors.push(tensor("weight_bits", safetensors::Dtype::U8, vec![self.out], bits));
            }
        }
        tensors.extend(self.scale_tensors(prefix));
        tensors.extend(self.branch.iter().flat_map(|branch| branch.tensors(prefix)));
        if let Some(bias) = &self.bias {
            tensors.push(StoredTensor::f32(name("bias"), vec![self.out], bias));
        }
        tensors
    }

    /// Those of [`StoredLinear::tensors`] that lie beside the codes: scales, and kept columns with theirs.
    pub fn scale_tensors(&self, prefix: &str) -> Vec<StoredTensor> {
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        let scales = |suffix: &str, scales: &[f32]| {
            let (name, shape) = (name(suffix), vec![self.out, scales.len() / self.out]);
            if scales_fit_f16(scales) {
                let half: Vec<f16> = scales.iter().map(|&s| f16::from_f32(s)).collect();
                StoredTensor::f16(name, shape, &half)
            } else {
                StoredTensor::f32(name, shape, scales)
            }
        };
        let mut tensors = vec![scales("weight_scale", &self.scales)];
        if let Some(kept) = &self.kept {
            let bytes = kept.codes.iter().map(|&c| c as u8).collect();
            let shape = vec![self.out, kept.codes.len() / self.out];
            let (name, dtype) = (name("kept_packed"), safetensors::Dtype::I8);
            tensors.push(StoredTensor { name, dtype, shape, bytes });
            tensors.push(scales("kept_scale", &kept.scales));
        }
        tensors
    }

    /// Reads the layer named `prefix` of shape `[out, inp]`, of whose inputs the first `kept` are kept, checking every length and range.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] names the tensor and what is wrong with it.
    pub fn read(
        source: &Source,
        prefix: &str,
        [out, inp]: [usize; 2],
        kept: usize,
        scheme: &Scheme,
        basis: Option<BranchBasis>,
    ) -> Result<Self> {
        let reader = Reader { source, prefix };
        let inp = inp - kept;
        let (bits, group_size) = (scheme.weight_bits, scheme.group(inp));
        let packed = reader.tensor("weight_packed")?;
        let mut channel_bits = Vec::new();
        let uniform = source.has(&reader.name("weight_bits")) || scheme.levels(bits) == Levels::Uniform;
        let (levels, table) = match uniform {
            true => (Levels::Uniform, &UNIFORM_LEVELS),
            false => (Levels::Gaussian, &GAUSSIAN_LEVELS),
        };
        let mut codes = Vec::new(); // as long as the tensor turns out to be
        if bits > 4 {
            reader.expect(&packed, "weight_packed", Dtype::I8, &[out, inp])?;
            codes.extend(packed.bytes().iter().map(|&b| b as i8));
        } else if source.has(&reader.name("weight_bits")) {
            let view = reader.tensor("weight_bits")?;
            reader.expect(&view, "weight_bits", Dtype::U8, &[out])?;
            channel_bits = view.bytes().to_vec();
            if let Some(row) = channel_bits.iter().position(|b| !(2..=bits).contains(b)) {
                let why =
                    format!("gives channel {row} {} bits, where 2 to {bits} are possible", channel_bits[row]);
                return Err(reader.fail("weight_bits", why));
            }
            let total = channel_bits.iter().map(|&b| row_bytes(inp, b)).sum();
            reader.expect(&packed, "weight_packed", Dtype::U8, &[total])?;
            let mut rest = packed.bytes();
            for &bits in &channel_bits {
                let (row, after) = rest.split_at(row_bytes(inp, bits));
                unpack_row(row, bits, inp, table, &mut codes);
                rest = after;
            }
        } else {
            let width = row_bytes(inp, bits);
            reader.expect(&packed, "weight_packed", Dtype::U8, &[out, width])?;
            // A row of an odd width brings one more along for a moment.
            codes.reserve_exact(out * inp + 1);
            packed.bytes().chunks(width.max(1)).for_each(|row| unpack_row(row, bits, inp, table, &mut codes));
        }
        let scales = reader.scales("weight_scale", [out, inp / group_size])?;
        let kept = match kept {
            0 => None,
            r => {
                let view = reader.tensor("kept_packed")?;
                reader.expect(&view, "kept_packed", Dtype::I8, &[out, r])?;
                let codes = view.bytes().iter().map(|&b| b as i8).collect();
                Some(StoredKept { codes, scales: reader.scales("kept_scale", [out, 1])? })
            }
        };
        let branch = reader.branch(out, basis)?;
        let bias = read_bias(source, prefix, out)?;
        Ok(StoredLinear {
            out,
            inp,
            bits,
            channel_bits,
            levels,
            group_size,
            codes,
            scales,
            kept,
            branch,
            bias,
        })
    }

    /// The layer in the kernels' layout. basis: the directions that its branch refers to.
    ///
    /// # Errors
    /// [`Error::Kernel`] when codes, scales or coefficients are out of range; `prefix` names the layer.
    pub fn to_linear(
        &self,
        prefix: &str,
        scheme: &Scheme,
        basis: Option<&Arc<Basis>>,
        truncation: Truncation,
    ) -> Result<Linear> {
        let named = |cause| Error::Kernel { name: prefix.to_owned(), cause };
        let (codes, scales, group_size) = (&self.codes, &self.scales, self.group_size);
        let weights = match self.levels {
            Levels::Uniform => PackedWeights::pack(codes, scales, self.out, self.inp, self.bits, group_size),
            Levels::Gaussian => {
                PackedWeights::pack_levels(codes, scales, self.out, self.inp, group_size, &GAUSSIAN_LEVELS)
            }
        };
        let weights = weights.map_err(named)?;
        let kept = self.kept.as_ref().map(|kept| {
            let r = kept.codes.len() / self.out;
            let weights = PackedWeights::pack(&kept.codes, &kept.scales, self.out, r, KEPT_BITS, r)?;
            Ok(Kept { weights, act_bits: scheme.act_bits.max(KEPT_BITS) })
        });
        let kept = kept.transpose().map_err(named)?;
        let branch = match (&self.branch, basis) {
            (None, _) => None,
            (Some(branch), Some(basis)) => Some(Branch {
                coeffs: branch.pack(basis, truncation).map_err(named)?,
                basis: Arc::clone(basis),
            }),
            (Some(_), None) => {
                return Err(Error::Checkpoint(format!(
                    "{prefix}: has branch coefficients, but its input has no basis; quantize the model again"
                )));
            }
        };
        Ok(Linear::Quantized(QuantLinear {
            weights,
            kept,
            act_bits: scheme.act_bits,
            act_levels: scheme.levels(scheme.act_bits),
            act_clip: scheme.act_clip,
            branch,
            bias: self.bias.clone(),
        }))
    }
}

/// The tensors of one layer in a file, and complaints about them.
pub(crate) struct Reader<'a> {
    pub(crate) source: &'a Source,
    pub(crate) prefix: &'a str,
}

impl Reader<'_> {
    pub(crate) fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.prefix)
    }

    pub(crate) fn tensor(&self, suffix: &str) -> Result<TensorView> {
        self.source.tensor(&self.name(suffix))
    }

    pub(crate) fn fail(&self, suffix: &str, why: String) -> Error {
        let file = self.source.path().display();
        Error::Checkpoint(format!("{file}: tensor {}.{suffix} {why}; quantize the model again", self.prefix))
    }

    pub(crate) fn expect(
        &self,
        view: &TensorView,
        suffix: &str,
        dtype: Dtype,
        shape: &[usize],
    ) -> Result<()> {
        if view.dtype == dtype && view.shape == shape {
            return Ok(());
        }
        let (got, want) = (view.dtype.name(), dtype.name());
        Err(self.fail(suffix, format!("is {got} {:?} instead of {want} {shape:?}", view.shape)))
    }

    pub(crate) fn scales(&self, suffix: &str, shape: [usize; 2]) -> Result<Vec<f32>> {
        let view = self.tensor(suffix)?;
        if view.shape != shape {
            return Err(self.fail(suffix, format!("has shape {:?} instead of {shape:?}", view.shape)));
        }
        view.to_f32()
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
    quant: Option<(&Scheme, Option<BranchBasis>)>,
    prefix: &str,
    [out, inp]: [usize; 2],
    basis: Option<&Arc<Basis>>,
    transform: Option<&InputTransform>,
) -> Result<Linear> {
    let (kept, transformed) = (transform.map_or(0, InputTransform::kept), transform.is_some());
    if let Some((scheme, kind)) = quant.filter(|_| source.has(&format!("{prefix}.weight_packed"))) {
        return StoredLinear::read(source, prefix, [out, inp], kept, scheme, kind)?.to_linear(
            &format!("{}: {prefix}", source.path().display()),
            scheme,
            basis,
            source.truncation(),
        );
    }
    if let Some(suffix) =
        ["kept_packed", "weight_packed"].into_iter().find(|s| source.has(&format!("{prefix}.{s}")))
    {
        // Part of a quantized layer: what is missing is named.
        let reader = Reader { source, prefix };
        return Err(reader.fail(suffix, "is there, but not the rest of a quantized layer".to_owned()));
    }
    let weight = source.tensor(&format!("{prefix}.weight"))?;
    if transformed {
        let reader = Reader { source, prefix };
        return Err(reader.fail("weight", "is not quantized, but its input is transformed".to_owned()));
    }
    if weight.shape != [out, inp] {
        let file = source.path().display();
        return Err(Error::Checkpoint(format!(
            "{file}: tensor {prefix}.weight has shape {:?} instead of [{out}, {inp}]",
            weight.shape
        )));
    }
    let bias = read_bias(source, prefix, out)?;
    Ok(Linear::Dense(DenseLinear {
        out,
        inp,
        weight: DenseWeight::Mapped(MappedMatrix::Float(weight)),
        bias,
    }))
}
