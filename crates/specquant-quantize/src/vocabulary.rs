//! Embeddings, `lm_head` and weights that are not quantized, on their way to the disk: in 16 bits or int8 per row.

use half::{bf16, f16};
use rayon::prelude::*;
use specquant_model::{Dtype, Source, StoredLinear, StoredTensor, storable_scales};

use crate::recipe::Embeddings;
use crate::{Error, Result};

/// The 16-bit type that embeddings and unquantized weights are kept in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HalfType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl HalfType {
    /// That of a source whose embeddings have this type.
    pub fn of(dtype: Dtype) -> Self {
        if dtype == Dtype::BF16 { HalfType::Bf16 } else { HalfType::F16 }
    }

    /// The value that the 16 bits hold.
    pub fn round(self, value: f32) -> f32 {
        match self {
            HalfType::F16 => f16::from_f32(value).to_f32(),
            HalfType::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// Fails when a value is beyond the type's range.
    pub fn tensor(self, name: String, shape: Vec<usize>, values: &[f32]) -> Result<StoredTensor> {
        let (dtype, to): (_, fn(f32) -> [u8; 2]) = match self {
            HalfType::F16 => (safetensors::Dtype::F16, |v| f16::from_f32(v).to_le_bytes()),
            HalfType::Bf16 => (safetensors::Dtype::BF16, |v| bf16::from_f32(v).to_le_bytes()),
        };
        if let Some(i) = values.par_iter().position_first(|&v| !self.round(v).is_finite()) {
            let channel = Some(i / shape.last().copied().unwrap_or(1).max(1));
            return Err(Error::NotFinite { module: name, what: "a weight in 16 bits", channel });
        }
        let mut bytes = vec![0; 2 * values.len()];
        bytes.par_chunks_exact_mut(2).zip(values).for_each(|(b, &v)| b.copy_from_slice(&to(v)));
        Ok(StoredTensor { name, dtype, shape, bytes })
    }
}

/// Symmetric int8 codes of a row of embeddings and their scale, `max / 127`.
fn int8_row(row: &[f32]) -> (f32, Vec<i8>) {
    let max = row.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    // Zeros have any scale. Rows below 0.008 put the scales of all into f32, and the least into zeros.
    let scale = if max == 0.0 { f16::MIN_POSITIVE.to_f32() } else { (max / 127.0).max(1e-32) };
    let scale = storable_scales(vec![scale])[0];
    (scale, row.iter().map(|v| (v / scale).round_ties_even().clamp(-127.0, 127.0) as i8).collect())
}

/// Rounds a row of embeddings to what the checkpoint will hold.
pub fn round_row(row: &mut [f32], embeddings: Embeddings, half: HalfType) {
    match embeddings {
        Embeddings::Int8 => {
            let (scale, codes) = int8_row(row);
            row.iter_mut().zip(codes).for_each(|(v, c)| *v = f32::from(c) * scale);
        }
        Embeddings::Half => row.iter_mut().for_each(|v| *v = half.round(*v)),
    }
}

/// The tensors of an embedding or head called `name`, `[vocab, hidden]`: those of `from` after a change.
pub fn vocabulary_tensors(
    source: &Source,
    from: &str,
    name: &str,
    embeddings: Embeddings,
    half: HalfType,
    change: &dyn Fn(&mut [f32]),
) -> Result<Vec<StoredTensor>> {
    let view = source.tensor(&format!("{from}.weight"))?;
    let mut values = view.to_f32()?;
    change(&mut values);
    if embeddings == Embeddings::Half {
        return Ok(vec![half.tensor(format!("{name}.weight"), view.shape.clone(), &values)?]);
    }
    let (vocab, hidden) = (view.shape[0], view.shape[1]);
    let rows: Vec<(f32, Vec<i8>)> = values.par_chunks_exact(hidden).map(int8_row).collect();
    let (scales, codes): (Vec<f32>, Vec<Vec<i8>>) = rows.into_iter().unzip();
    let stored = StoredLinear {
        out: vocab,
        inp: hidden,
        bits: 8,
        group_size: hidden,
        codes: codes.concat(),
        scales,
        channel_bits: Vec::new(),
        levels: specquant_model::Levels::Uniform,
        kept: None,
        branch: None,
        bias: None,
    };
    Ok(stored.tensors(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_any_size_keep_their_codes() {
        let row = [1.0f32, -0.4, 0.2, 0.0];
        let (_, codes) = int8_row(&row);
        for size in [1.0, 1e-3, 1e-6, 1e-25] {
            let (scale, small) = int8_row(&row.map(|v| v * size));
            assert_eq!(small, codes, "{size}");
            assert!((scale / (size / 127.0) - 1.0).abs() < 1e-3, "{size}: {scale}");
        }
        assert_eq!(int8_row(&[0.0; 3]), (f16::MIN_POSITIVE.to_f32(), vec![0; 3]));
        assert_eq!(int8_row(&[1e-40; 3]).1, [0; 3]);
    }
}
