//! One tensor on a memory map, and its widening to f32.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;

use super::gguf_quants;
use crate::model::finite_part;
use crate::{Error, Result};

/// How a tensor's elements are stored.
#[allow(non_camel_case_types)] // ggml's own names
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// ggml: 32 signed bytes and an f16 scale.
    Q8_0,
    /// ggml: 32 nibbles, offset by 8, and an f16 scale.
    Q4_0,
    /// ggml: 32 nibbles, f16 scale and minimum.
    Q4_1,
    /// ggml: 32 five-bit codes, offset by 16, and an f16 scale.
    Q5_0,
    /// ggml: 32 five-bit codes, f16 scale and minimum.
    Q5_1,
    /// ggml: 8 groups of 32 nibbles with six-bit scales and minima.
    Q4K,
    /// ggml: 8 groups of 32 five-bit codes with six-bit scales and minima.
    Q5K,
    /// ggml: 16 groups of 16 six-bit codes with eight-bit scales.
    Q6K,
    /// Unsigned byte.
    U8,
    /// Signed byte.
    I8,
    /// Unsigned 16 bits.
    U16,
    /// Signed 32 bits.
    I32,
    /// Anything else, by name; its bytes can be seen but not interpreted.
    Other(&'static str),
}

impl Dtype {
    const FLOATS: [Dtype; 11] = {
        use Dtype::*;
        [F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4K, Q5K, Q6K]
    };

    /// The name that safetensors or ggml gives it.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::Q8_0 => "Q8_0",
            Dtype::Q4_0 => "Q4_0",
            Dtype::Q4_1 => "Q4_1",
            Dtype::Q5_0 => "Q5_0",
            Dtype::Q5_1 => "Q5_1",
            Dtype::Q4K => "Q4_K",
            Dtype::Q5K => "Q5_K",
            Dtype::Q6K => "Q6_K",
            Dtype::U8 => "U8",
            Dtype::I8 => "I8",
            Dtype::U16 => "U16",
            Dtype::I32 => "I32",
            Dtype::Other(name) => name,
        }
    }

    /// Whether [`TensorView::rows_f32`] can widen it.
    pub fn widens(self) -> bool {
        Self::FLOATS.contains(&self)
    }

    /// Elements and bytes of a block, the unit that rows consist of; `None` where it is not known.
    pub(crate) fn block(self) -> Option<(usize, usize)> {
        Some(match self {
            Dtype::F32 | Dtype::I32 => (1, 4),
            Dtype::F16 | Dtype::BF16 | Dtype::U16 => (1, 2),
            Dtype::U8 | Dtype::I8 => (1, 1),
            Dtype::Q8_0 => (32, 34),
            Dtype::Q4_0 => (32, 18),
            Dtype::Q4_1 => (32, 20),
            Dtype::Q5_0 => (32, 22),
            Dtype::Q5_1 => (32, 24),
            Dtype::Q4K => (256, 144),
            Dtype::Q5K => (256, 176),
            Dtype::Q6K => (256, 210),
            Dtype::Other(_) => return None,
        })
    }

    /// The types that widen, for messages.
    pub(crate) fn widening_names() -> String {
        Self::FLOATS.map(Dtype::name).join(", ")
    }
}

/// A tensor of an opened model. Cloning is cheap: the bytes stay on the memory map.
///
/// The file must not be truncated or rewritten while it is open: the system would kill the process (SIGBUS).
#[derive(Debug, Clone)]
pub struct TensorView {
    /// How its elements are stored.
    pub dtype: Dtype,
    /// Shape, slowest dimension first; weights are `[out, in]`.
    pub shape: Vec<usize>,
    name: Arc<str>,
    file: Arc<Path>,
    map: Arc<Mmap>,
    range: Range<usize>,
    /// Head width, where rows within a head are stored in ggml's interleaved rotary order.
    interleaved: Option<usize>,
    /// Added to every element when it is widened.
    offset: f32,
}

impl TensorView {
    /// `range` must lie within the map; for a dtype with a known block, it must be what the shape takes.
    pub(super) fn new(
        name: &str,
        file: &Arc<Path>,
        map: &Arc<Mmap>,
        dtype: Dtype,
        shape: Vec<usize>,
        range: Range<usize>,
    ) -> Self {
        TensorView {
            dtype,
            shape,
            name: name.into(),
            file: file.clone(),
            map: map.clone(),
            range,
            interleaved: None,
            offset: 0.0,
        }
    }

    /// The same tensor, to be read with its rows (elements, for a bias) brought from ggml's rotary order into Hugging Face's.
    pub(super) fn interleaved(mut self, head_dim: usize) -> Self {
        self.interleaved = Some(head_dim);
        self
    }

    /// The same tensor, to be read with `offset` added to every element.
    pub(super) fn plus(mut self, offset: f32) -> Self {
        self.offset = offset;
        self
    }

    /// Its Hugging Face name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds it.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Bytes as stored. The rows of q and k of a GGUF file may be in another order here than [`TensorView::rows_f32`] gives, and norms may
    /// lack an offset.
    pub fn bytes(&self) -> &[u8] {
        self.map.get(self.range.clone()).unwrap_or_default()
    }

    /// Gives the pages of its bytes back to the system, which reads them again when they are asked for.
    pub fn release(&self) {
        #[cfg(unix)]
        // SAFETY: the map is of a file and is never written to, so what is dropped is what the file still holds.
        let _ = unsafe {
            self.map.unchecked_advise_range(
                memmap2::UncheckedAdvice::DontNeed,
                self.range.start,
                self.range.len(),
            )
        };
    }

    /// Rows: the product of all dimensions but the last; 1 for a vector.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, lead)| lead.iter().product())
    }

    /// Length of a row: the last dimension.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Widens `rows` into `out`: `[rows.len(), cols]`.
    ///
    /// # Errors
    /// [`Error::Dtype`] for integers and unknown types; [`Error::Rows`] if there are no such rows or `out` has another size.
    pub fn rows_f32(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let cols = self.cols();
        if rows.start > rows.end || rows.end > self.rows() || rows.len().checked_mul(cols) != Some(out.len())
        {
            return Err(self.no_such_rows(rows, out.len()));
        }
        let (true, Some((elements, size))) = (self.dtype.widens(), self.dtype.block()) else {
            return Err(Error::Dtype {
                file: self.file.to_path_buf(),
                tensor: self.name.to_string(),
                dtype: self.dtype.name().into(),
                supported: Dtype::widening_names(),
            });
        };
        if out.is_empty() {
            return Ok(());
        }
        let row_bytes = cols / elements * size;
        let bytes = self.bytes();
        match self.interleaved {
            Some(head_dim) if self.shape.len() == 1 => {
                // The elements of a bias are permuted as the rows of the matrix are.
                let mut stored = vec![0.0; cols];
                widen(self.dtype, &bytes[..row_bytes], &mut stored);
                out.iter_mut().enumerate().for_each(|(i, x)| *x = stored[stored_row(i, head_dim)]);
            }
            Some(head_dim) => {
                for (row, out) in rows.zip(out.chunks_exact_mut(cols)) {
                    widen(self.dtype, &bytes[stored_row(row, head_dim) * row_bytes..][..row_bytes], out);
                }
            }
            None => widen(self.dtype, &bytes[rows.start * row_bytes..rows.end * row_bytes], out),
        }
        if self.offset != 0.0 {
            out.iter_mut().for_each(|x| *x += self.offset);
        }
        Ok(())
    }

    /// What is said of rows that are not there, or of a buffer of another size than they have.
    pub(crate) fn no_such_rows(&self, rows: Range<usize>, buffer: usize) -> Error {
        Error::Rows {
            file: self.file.to_path_buf(),
            tensor: self.name.to_string(),
            shape: self.shape.clone(),
            rows,
            buffer,
        }
    }

    /// The whole tensor, widened: `[rows, cols]`.
    ///
    /// # Errors
    /// As [`TensorView::rows_f32`]; [`Error::NotFinite`] names the first value that is NaN or infinite.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let (rows, cols, chunk) = (self.rows(), self.cols(), self.chunk_rows());
        let mut all = vec![0.0; rows * cols];
        let chunks = all.par_chunks_mut((chunk * cols).max(1)).enumerate();
        let read: Vec<Result<()>> =
            chunks.map(|(i, out)| self.finite_rows(i * chunk..rows.min((i + 1) * chunk), out)).collect();
        read.into_iter().collect::<Result<()>>().map(|()| all)
    }

    /// Checks that no value is NaN or infinite, with the memory of a few rows; numbers that are not widened are none.
    ///
    /// # Errors
    /// [`Error::NotFinite`] names the first.
    pub(crate) fn check_finite(&self) -> Result<()> {
        let (rows, cols, chunk) = (self.rows(), self.cols(), self.chunk_rows());
        if !self.dtype.widens() || cols == 0 {
            return Ok(());
        }
        let mut values = vec![0.0; chunk.min(rows) * cols];
        for first in (0..rows).step_by(chunk) {
            let end = rows.min(first + chunk);
            self.finite_rows(first..end, &mut values[..(end - first) * cols])?;
        }
        self.release();
        Ok(())
    }

    /// [`TensorView::rows_f32`], and that all of it is finite.
    fn finite_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let (first, cols) = (rows.start, self.cols());
        self.rows_f32(rows, out)?;
        if finite_part(out) {
            return Ok(());
        }
        let i = out.iter().position(|x| !x.is_finite()).unwrap_or_default();
        Err(self.not_finite(first + i / cols, i % cols, out[i]))
    }

    /// Rows of a few hundred kilobytes.
    fn chunk_rows(&self) -> usize {
        (1_usize << 16).div_ceil(self.cols().max(1))
    }

    /// The complaint about a value that is NaN or infinite.
    pub(crate) fn not_finite(&self, row: usize, col: usize, value: f32) -> Error {
        Error::NotFinite { file: self.file.to_path_buf(), tensor: self.name.to_string(), row, col, value }
    }
}

/// Where ggml stores row `row` of q or k. Its converter (convert_hf_to_gguf.py, `LlamaModel.permute`) turns the two halves of a
/// head, which Hugging Face rotates against each other, into neighbouring pairs.
fn stored_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + 2 * (within % half) + within / half
}

fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F32 => {
            for (x, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        // Never through f16, whose range is smaller.
        Dtype::BF16 => out.iter_mut().zip(pairs()).for_each(|(x, b)| *x = bf16::from_le_bytes(b).to_f32()),
        Dtype::F16 => {
            // The bytes may be unaligned; the slice conversion uses the processor's instruction.
            let mut halves = [f16::ZERO; 1024];
            for (out, bytes) in out.chunks_mut(halves.len()).zip(bytes.chunks(2 * halves.len())) {
                let halves = &mut halves[..out.len()];
                halves
                    .iter_mut()
                    .zip(bytes.chunks_exact(2))
                    .for_each(|(h, b)| *h = f16::from_le_bytes([b[0], b[1]]));
                halves.convert_to_f32_slice(out);
            }
        }
        quantized => gguf_quants::dequantize(quantized, bytes, out),
    }
}

/// Maps a file into memory.
pub(super) fn map(path: &Path) -> Result<Arc<Mmap>> {
    let file = File::open(path).map_err(Error::io(path))?;
    if file.metadata().map_err(Error::io(path))?.is_dir() {
        return Err(Error::NotAModel {
            path: path.to_owned(),
            problem: "is a directory, not a weight file".into(),
        });
    }
    // SAFETY: the map is read-only and private to this process. The contract with the user (see TensorView) is that the file is not
    // changed meanwhile; every read is bounds-checked against the length of the map.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
    Ok(Arc::new(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(dtype: Dtype, shape: &[usize], bytes: &[u8]) -> (tempfile::TempDir, TensorView) {
        let dir = tempfile::tempdir().unwrap();
        let path: Arc<Path> = dir.path().join("w.bin").into();
        // One byte in front: nothing may rely on alignment.
        std::fs::write(&path, [&[0xff], bytes].concat()).unwrap();
        let map = map(&path).unwrap();
        let view = TensorView::new("w", &path, &map, dtype, shape.to_vec(), 1..1 + bytes.len());
        (dir, view)
    }

    #[test]
    fn floats_widen() {
        let values = [1.5f32, -2.0, 3.0e38, 0.0, 1e-7, 8.0];
        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let (_d, v) = view(Dtype::F32, &[2, 3], &f32s);
        assert_eq!(v.to_f32().unwrap(), values);
        let mut row = [0.0; 3];
        v.rows_f32(1..2, &mut row).unwrap();
        assert_eq!(row, values[3..]);

        // Beyond the range of f16.
        let bf: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let wide = view(Dtype::BF16, &[6], &bf).1.to_f32().unwrap();
        assert_eq!(wide, values.map(|v| bf16::from_f32(v).to_f32()));

        let many: Vec<f16> = (0..5000).map(|i| f16::from_f32(i as f32 * 0.37 - 900.0)).collect();
        let bytes: Vec<u8> = many.iter().flat_map(|v| v.to_le_bytes()).collect();
        let wide = view(Dtype::F16, &[50, 100], &bytes).1.to_f32().unwrap();
        assert!(wide.iter().zip(&many).all(|(a, b)| *a == b.to_f32()));
    }

    #[test]
    fn refuses_integers_wrong_rows_and_nonfinite() {
        let (_d, v) = view(Dtype::I8, &[2, 2], &[1, 2, 3, 4]);
        let err = v.to_f32().unwrap_err().to_string();
        assert!(err.contains("w.bin") && err.contains("tensor w") && err.contains("I8"), "{err}");
        assert_eq!(v.bytes(), [1, 2, 3, 4]);

        let (_d, v) = view(Dtype::F32, &[2, 2], &[0; 16]);
        assert!(matches!(v.rows_f32(1..3, &mut [0.0; 4]), Err(Error::Rows { .. })));
        assert!(matches!(v.rows_f32(0..1, &mut [0.0; 3]), Err(Error::Rows { .. })));

        let mut bytes = vec![0; 16];
        bytes[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
        let err = view(Dtype::F32, &[2, 2], &bytes).1.to_f32().unwrap_err().to_string();
        assert!(err.contains("NaN at row 1, column 0"), "{err}");
        assert!(view(Dtype::F32, &[0, 4], &[]).1.to_f32().unwrap().is_empty());
        assert!(view(Dtype::F32, &[4, 0], &[]).1.to_f32().unwrap().is_empty());
    }

    /// Against the converter's own words: reshape [heads, 2, half], swap the last two, flatten.
    #[test]
    fn rotary_order_is_undone() {
        let (heads, head_dim) = (3, 8);
        let half = head_dim / 2;
        let mut stored = vec![0.0f32; heads * head_dim];
        for h in 0..heads {
            for p in 0..2 {
                for j in 0..half {
                    stored[h * head_dim + j * 2 + p] = (h * head_dim + p * half + j) as f32;
                }
            }
        }
        let expect: Vec<f32> = (0..heads * head_dim).map(|i| i as f32).collect();
        let bytes: Vec<u8> = stored.iter().flat_map(|v| v.to_le_bytes()).collect();
        for shape in [&[24, 1][..], &[24][..]] {
            let (_d, v) = view(Dtype::F32, shape, &bytes);
            assert_eq!(v.interleaved(head_dim).to_f32().unwrap(), expect);
        }
    }
}
