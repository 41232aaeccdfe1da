//! The operations that candle lacks, or computes in many passes: functions of rows with a backward pass of their own, and products
//! with a matrix that is not learned.

use std::sync::Arc;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Storage, Tensor};
use specquant_kernels::{Buffer, GELU_CUBIC, GELU_SLOPE, for_each_chunk};
use specquant_model::Activation;

/// Values that one thread takes at least; below, spawning costs more than it saves.
const GRAIN: usize = 1 << 14;

/// Lower bound of a scale, so that a row of zeros quantizes to zeros instead of dividing by zero.
pub(crate) const MIN_SCALE: f32 = 1e-20;

/// The storage of a tensor on the CPU.
fn cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(s) => Ok(s),
        _ => candle_core::bail!("a tensor is not on the CPU"),
    }
}

/// The values of a contiguous tensor.
pub(crate) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a tensor is not contiguous")
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Calls `f` with a tensor's values.
pub(crate) fn with_slice<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    f(slice(cpu(&storage)?, layout)?)
}

/// A tensor's values.
pub(crate) fn to_vec(t: &Tensor) -> Result<Vec<f32>> {
    with_slice(t, |s| Ok(s.to_vec()))
}

/// A tensor of values.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// A function of rows, the last dimension of a tensor.
pub(crate) trait RowOp: Send + Sync + 'static {
    /// For candle's messages.
    const NAME: &'static str;

    /// Writes y = f(x) of row number `row`.
    fn forward(&self, row: usize, x: &[f32], y: &mut [f32]);

    /// Writes the gradient by x, given x, y = f(x) and the gradient by y.
    fn backward(&self, row: usize, x: &[f32], y: &[f32], gy: &[f32], gx: &mut [f32]);
}

/// Writes y = f(x) of every row. x, y: `[.., width]`.
pub(crate) fn forward_into<T: RowOp>(op: &T, x: &[f32], width: usize, y: &mut [f32]) {
    let rows = GRAIN.div_ceil(width);
    for_each_chunk(y, rows * width, |task, y| {
        let x = x[task * rows * width..].chunks_exact(width);
        for ((y, x), row) in y.chunks_exact_mut(width).zip(x).zip(task * rows..) {
            op.forward(row, x, y);
        }
    });
}

/// y = f(x) of every row, for an `op` that writes whole rows. x: `[.., width]`.
pub(crate) fn forward<T: RowOp>(op: &T, x: &[f32], width: usize) -> Buffer<f32> {
    let mut y = Buffer::new(x.len());
    forward_into(op, x, width, &mut y);
    y
}

/// Writes the gradient by x, given x, y = f(x) and the gradient by y. All: `[.., width]`.
pub(crate) fn backward_into<T: RowOp>(op: &T, [x, y, gy]: [&[f32]; 3], width: usize, gx: &mut [f32]) {
    let rows = GRAIN.div_ceil(width);
    for_each_chunk(gx, rows * width, |task, gx| {
        let [x, y, gy] = [x, y, gy].map(|x| x[task * rows * width..].chunks_exact(width));
        for ((gx, ((x, y), gy)), row) in gx.chunks_exact_mut(width).zip(x.zip(y).zip(gy)).zip(task * rows..) {
            op.backward(row, x, y, gy, gx);
        }
    });
}

/// The gradient by x as of [`backward_into`], for an `op` that writes whole rows.
pub(crate) fn backward<T: RowOp>(op: &T, inputs: [&[f32]; 3], width: usize) -> Buffer<f32> {
    let mut gx = Buffer::new(inputs[0].len());
    backward_into(op, inputs, width, &mut gx);
    gx
}

/// Applies `op` to the rows of `x`.
pub(crate) fn rows<T: RowOp>(x: &Tensor, op: T) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Rows(op))
}

/// Within rayon's pool, which candle's products use: two pools in turns would keep each other from the processors.
struct Rows<T>(T);

impl<T: RowOp> CustomOp1 for Rows<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = layout.dims().last().copied().unwrap_or(1).max(1);
        let x = slice(storage, layout)?;
        let mut y = vec![0.0; x.len()];
        rayon::scope(|_| forward_into(&self.0, x, width, &mut y));
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        let width = x.dims().last().copied().unwrap_or(1).max(1);
        let mut gx = vec![0.0; x.elem_count()];
        with_slice(x, |x| {
            with_slice(y, |y| {
                with_slice(gy, |gy| {
                    rayon::scope(|_| backward_into(&self.0, [x, y, gy], width, &mut gx));
                    Ok(())
                })
            })
        })?;
        Ok(Some(tensor(gx, x.shape().clone())?))
    }
}

/// Rounds half to even. |v| < 2²², where adding 1.5 · 2²³ leaves no fraction; `f32::round_ties_even` is a call into the C library
/// where the compiler may not assume SSE4.1.
pub(crate) fn round(v: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (v + MAGIC) - MAGIC
}

/// Fake quantization of a row, asymmetric: `specquant_kernels::quantize_acts` and back.
///
/// ```text
/// scale = clip · (max(0, max x) − min(0, min x)) / (2ᵇ − 1)      zero = round(−clip · min(0, min x) / scale)
/// y = scale · (clamp(round(x / scale) + zero, 0, 2ᵇ − 1) − zero)
/// ```
pub(crate) struct FakeQuant {
    /// 2 to 8.
    pub bits: u8,
    /// Multiplies minimum and maximum.
    pub clip: f32,
    /// Which straight-through estimator. `false`: the gradient passes unchanged, clipped or not (SpinQuant, quant_utils.py,
    /// `AsymSTEQuantize`). `true`: only the rounding counts as the identity, so the gradient stops where a code is clamped and also
    /// reaches minimum and maximum through the scale (OmniQuant, quantizer.py, `round_ste`; its zero point is a constant).
    pub through_range: bool,
}

impl FakeQuant {
    /// (scale, zero), and where they come from: (min, max).
    fn params(&self, x: &[f32]) -> (f32, f32, f32, f32) {
        let (min, max) = x.iter().fold((0.0f32, 0.0f32), |(min, max), &v| (min.min(v), max.max(v)));
        let scale = (self.clip * (max - min) / self.steps()).max(MIN_SCALE);
        let zero = (-self.clip * min / scale).round_ties_even().min(self.steps());
        (scale, zero, min, max)
    }

    fn steps(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }
}

impl RowOp for FakeQuant {
    const NAME: &'static str = "fake-quant";

    fn forward(&self, _: usize, x: &[f32], y: &mut [f32]) {
        let (scale, zero, ..) = self.params(x);
        let (lo, hi) = (-zero, self.steps() - zero);
        // The zero point is an integer: clamping before the rounding gives the same code.
        x.iter().zip(y).for_each(|(&x, y)| *y = scale * round((x / scale).max(lo).min(hi)));
    }

    fn backward(&self, _: usize, x: &[f32], _: &[f32], gy: &[f32], gx: &mut [f32]) {
        if !self.through_range {
            gx.copy_from_slice(gy);
            return;
        }
        let (scale, zero, min, max) = self.params(x);
        let (lo, hi) = (-zero, self.steps() - zero);
        let mut by_scale = 0.0;
        for ((&x, &gy), gx) in x.iter().zip(gy).zip(gx.iter_mut()) {
            let v = x / scale;
            let code = round(v.max(lo - 1.0).min(hi + 1.0));
            let inside = lo <= code && code <= hi;
            *gx = if inside { gy } else { 0.0 };
            by_scale += gy * if inside { code - v } else { code.max(lo).min(hi) };
        }
        let by_max = by_scale * self.clip / self.steps();
        share(x, gx, max, by_max);
        share(x, gx, min, -by_max);
    }
}

/// Adds the gradient of an extreme value to where it is attained (torch's amax and amin share it equally among equals). Zero is no
/// value's: it is the bound of the range.
fn share(x: &[f32], gx: &mut [f32], extreme: f32, gradient: f32) {
    if extreme != 0.0 {
        let count = x.iter().filter(|&&x| x == extreme).count() as f32;
        let at = x.iter().zip(gx).filter(|(x, _)| **x == extreme);
        at.for_each(|(_, gx)| *gx += gradient / count);
    }
}

/// Fake quantization of a weight's row, symmetric, with the straight-through gradient:
/// `scale = max|x| / (2ᵇ⁻¹ − 1)`, `y = scale · round(x / scale)` (SpinQuant, quant_utils.py, `WeightQuantizer`, `STEQuantize`).
pub(crate) struct FakeQuantWeight {
    /// 2 to 8.
    pub bits: u8,
}

impl RowOp for FakeQuantWeight {
    const NAME: &'static str = "fake-quant-weight";

    fn forward(&self, _: usize, x: &[f32], y: &mut [f32]) {
        let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let scale = (max / ((1u32 << (self.bits - 1)) - 1) as f32).max(MIN_SCALE);
        x.iter().zip(y).for_each(|(x, y)| *y = scale * round(x / scale));
    }

    fn backward(&self, _: usize, _: &[f32], _: &[f32], gy: &[f32], gx: &mut [f32]) {
        gx.copy_from_slice(gy);
    }
}

/// `x / √(mean x² + ε)`, an RMS norm without its weight.
pub(crate) struct RmsNorm {
    pub eps: f32,
}

impl RmsNorm {
    fn factor(&self, x: &[f32]) -> f32 {
        let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        1.0 / (mean + self.eps).sqrt()
    }
}

impl RowOp for RmsNorm {
    const NAME: &'static str = "rms-norm";

    fn forward(&self, _: usize, x: &[f32], y: &mut [f32]) {
        let factor = self.factor(x);
        x.iter().zip(y).for_each(|(x, y)| *y = x * factor);
    }

    fn backward(&self, _: usize, x: &[f32], y: &[f32], gy: &[f32], gx: &mut [f32]) {
        let factor = self.factor(x);
        let along = y.iter().zip(gy).map(|(y, g)| y * g).sum::<f32>() / y.len() as f32;
        y.iter().zip(gy).zip(gx).for_each(|((y, gy), gx)| *gx = factor * (gy - y * along));
    }
}

/// 1 / (1 + e^−x).
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Value and derivative of an MLP's activation. GELU: x σ(z) with z = 2 √(2/π) (x + 0.044715 x³), as [`specquant_kernels::gelu_mul`] has it.
pub(crate) fn activation(kind: Activation, x: f32) -> (f32, f32) {
    // z and x · dz/dx.
    let (z, slope) = match kind {
        Activation::Silu => (x, x),
        Activation::GeluTanh => {
            let (linear, cube) = (GELU_SLOPE * x, GELU_SLOPE * GELU_CUBIC * x * x * x);
            (linear + cube, linear + 3.0 * cube)
        }
    };
    let s = sigmoid(z);
    (x * s, s * (1.0 + slope * (1.0 - s)))
}

/// Softmax of `scale · x` over the keys that a query sees. x: `[.., tokens, tokens]`, queries by keys, or some rows and columns of it.
/// Writes what is seen and nothing else.
pub(crate) struct CausalSoftmax {
    pub tokens: usize,
    /// The first query, where there is only a part of one matrix.
    pub first_query: usize,
    /// The first key.
    pub first_key: usize,
    pub scale: f32,
    /// Keys that a query sees, itself included; all before it if `None`.
    pub window: Option<usize>,
    /// eˣ of every value, in place: [`exp_one_by_one`], or the kernels' vectorized one, which differs in the last bits.
    pub exp: fn(&mut [f32]),
}

/// The system's exponential, which OmniQuant's and SpinQuant's published results here were learned with.
pub(crate) fn exp_one_by_one(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = x.exp());
}

impl CausalSoftmax {
    fn visible(&self, row: usize) -> std::ops::Range<usize> {
        let end = (self.first_query + row) % self.tokens + 1;
        let start = self.window.map_or(0, |w| end.saturating_sub(w));
        start - self.first_key..end - self.first_key
    }
}

impl RowOp for CausalSoftmax {
    const NAME: &'static str = "causal-softmax";

    fn forward(&self, row: usize, x: &[f32], y: &mut [f32]) {
        let keys = self.visible(row);
        let max = x[keys.clone()].iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (x, y) = (&x[keys.clone()], &mut y[keys]);
        y.iter_mut().zip(x).for_each(|(y, x)| *y = self.scale * (x - max));
        (self.exp)(y);
        let sum: f32 = y.iter().sum();
        y.iter_mut().for_each(|y| *y /= sum);
    }

    fn backward(&self, row: usize, _: &[f32], y: &[f32], gy: &[f32], gx: &mut [f32]) {
        let keys = self.visible(row);
        let mean: f32 = keys.clone().map(|key| y[key] * gy[key]).sum();
        keys.for_each(|key| gx[key] = self.scale * y[key] * (gy[key] - mean));
    }
}

/// Rotary embedding of heads, halves paired as Hugging Face pairs them. x: `[tokens, heads, head_dim]`.
#[derive(Clone)]
pub(crate) struct Rope {
    pub heads: usize,
    /// Cosine and sine of the angles, `[positions, head_dim / 2]`.
    pub angles: Arc<(Vec<f32>, Vec<f32>)>,
}

impl Rope {
    /// Angles of positions 0 to `positions`. inv_freq: `[head_dim / 2]`, radians per position.
    pub fn new(inv_freq: &[f32], positions: usize, heads: usize) -> Self {
        let angles = (0..positions).flat_map(|p| inv_freq.iter().map(move |f| f * p as f32));
        Rope { heads, angles: Arc::new(angles.map(|a| (a.cos(), a.sin())).unzip()) }
    }

    fn turn(&self, row: usize, sign: f32, x: &[f32], y: &mut [f32]) {
        let half = x.len() / 2;
        let position = row / self.heads * half;
        let (cos, sin) = (&self.angles.0[position..][..half], &self.angles.1[position..][..half]);
        for i in 0..half {
            let (c, s) = (cos[i], sign * sin[i]);
            y[i] = x[i] * c - x[i + half] * s;
            y[i + half] = x[i + half] * c + x[i] * s;
        }
    }
}

impl RowOp for Rope {
    const NAME: &'static str = "rope";

    fn forward(&self, row: usize, x: &[f32], y: &mut [f32]) {
        self.turn(row, 1.0, x, y);
    }

    fn backward(&self, row: usize, _: &[f32], _: &[f32], gy: &[f32], gx: &mut [f32]) {
        self.turn(row, -1.0, gy, gx);
    }
}

/// `x Wᵀ` where W is no variable. x: `[rows, in]`; w: `[out, in]`. Candle's product would also compute, and keep, the gradient by W.
pub(crate) fn frozen(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Frozen(w.clone()))
}

struct Frozen(Tensor);

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = Storage::Cpu(CpuStorage::F32(slice(storage, layout)?.to_vec()));
        let x = Tensor::from_storage(x, layout.shape().clone(), BackpropOp::none(), false);
        let y = x.matmul(&self.0.t()?)?;
        Ok((CpuStorage::F32(to_vec(&y)?), y.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(gy.matmul(&self.0)?))
    }
}

/// `x R`, R applied to each run of b channels. x: `[rows, n]`, b divides n; r: `[b, b]`.
pub(crate) fn rotate(x: &Tensor, r: &Tensor) -> Result<Tensor> {
    let b = r.dim(0)?;
    x.reshape(((), b))?.matmul(r)?.reshape(x.shape())
}

#[cfg(test)]
mod tests;
