//! A dense matrix on the memory map: embeddings, head, and layers that are not quantized.

use std::ops::Range;

use specquant_kernels::PackedDense;

use crate::stored_linear::Reader;
use crate::{Dtype, Error, Result, Source, TensorView};

/// A matrix, `[rows, cols]`, widened to f32 where it is used.
pub enum MappedMatrix {
    /// In a float or GGUF type.
    Float(TensorView),
    /// Int8 codes and a scale per row.
    Int8 {
        /// `[rows, cols]`.
        codes: TensorView,
        /// `[rows]`.
        scales: Vec<f32>,
    },
}

impl MappedMatrix {
    /// The embedding or head called `name`: int8 rows where there are any, a float type otherwise.
    ///
    /// # Errors
    /// When the tensor is missing or has another shape.
    pub fn read(source: &Source, name: &str, shape: [usize; 2]) -> Result<Self> {
        let reader = Reader { source, prefix: name };
        if source.has(&reader.name("weight_packed")) {
            let codes = reader.tensor("weight_packed")?;
            reader.expect(&codes, "weight_packed", Dtype::I8, &shape)?;
            let scales = reader.scales("weight_scale", [shape[0], 1])?;
            if let Some(row) = scales.iter().position(|s| *s < 0.0 || !(128.0 * s).is_finite()) {
                let why = format!("is {} in row {row}, where codes cannot stand for numbers", scales[row]);
                return Err(reader.fail("weight_scale", why));
            }
            reader.branch(shape[0], None)?; // there is none, or it is refused
            return Ok(MappedMatrix::Int8 { codes, scales });
        }
        let view = source.tensor(&format!("{name}.weight"))?;
        if view.shape != shape {
            return Err(Error::Checkpoint(format!(
                "{}: tensor {name}.weight has shape {:?} instead of {shape:?}",
                source.path().display(),
                view.shape
            )));
        }
        Ok(MappedMatrix::Float(view))
    }

    fn view(&self) -> &TensorView {
        match self {
            MappedMatrix::Float(view) | MappedMatrix::Int8 { codes: view, .. } => view,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.view().rows()
    }

    /// Values of a row.
    pub fn cols(&self) -> usize {
        self.view().cols()
    }

    /// Some rows as f32, `[rows.len(), cols]`.
    ///
    /// # Errors
    /// As [`TensorView::rows_f32`].
    pub fn rows_f32(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        match self {
            MappedMatrix::Float(view) => view.rows_f32(rows, out),
            MappedMatrix::Int8 { codes, scales } => {
                let cols = self.cols();
                let found =
                    codes.bytes().get(rows.start * cols..rows.end * cols).zip(scales.get(rows.clone()));
                let Some((codes, scales)) = found.filter(|(codes, _)| codes.len() == out.len()) else {
                    return Err(self.view().no_such_rows(rows, out.len()));
                };
                let each = out.chunks_exact_mut(cols).zip(codes.chunks_exact(cols)).zip(scales);
                for ((out, codes), scale) in each {
                    out.iter_mut().zip(codes).for_each(|(x, &c)| *x = f32::from(c as i8) * scale);
                }
                Ok(())
            }
        }
    }

    /// All of it as f32.
    ///
    /// # Errors
    /// When a value is not finite.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match self {
            MappedMatrix::Float(view) => view.to_f32(),
            MappedMatrix::Int8 { .. } => {
                let mut all = vec![0.0; self.rows() * self.cols()];
                self.rows_f32(0..self.rows(), &mut all)?;
                Ok(all)
            }
        }
    }

    /// Packed for products, in as few bits as hold it exactly.
    ///
    /// # Errors
    /// As [`MappedMatrix::to_f32`].
    pub fn pack(&self) -> Result<PackedDense> {
        match self {
            MappedMatrix::Float(view) => {
                Ok(PackedDense::pack(&view.to_f32()?, self.rows(), self.cols()).compact())
            }
            MappedMatrix::Int8 { codes, scales } => {
                Ok(PackedDense::pack_int8(codes.bytes(), scales.clone(), self.rows(), self.cols()))
            }
        }
    }
}
