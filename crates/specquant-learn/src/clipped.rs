//! OmniQuant's weight: scaled, clipped and fake-quantized in one operation, with the gradients of all three parameters.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::ops::{MIN_SCALE, round, slice, tensor, with_slice};

/// Rows that one task takes; the sums over rows are added in the order of the tasks, whatever the number of threads.
const ROWS: usize = 64;

/// With a constant weight W `[out, in]` and per row o:
///
/// ```text
/// u_j = W_oj · before_j / after_o       scale = ratio_o · max_j |u_j| / (2ᵇ⁻¹ − 1)
/// y_j = scale · clamp(round(u_j / scale), −2ᵇ⁻¹, 2ᵇ⁻¹ − 1)
/// ```
///
/// Only the rounding counts as the identity in the gradient (quantizer.py, `round_ste`): it stops where a code is clamped, and
/// reaches `ratio` and the largest |u| through the scale.
pub(crate) struct ClippedWeight {
    /// `[out, in]`, contiguous.
    pub weight: Tensor,
    /// 2 to 8, or 16 for y = u.
    pub bits: u8,
}

/// A row's parameters.
struct Row<'a> {
    w: &'a [f32],
    before: &'a [f32],
    after: f32,
    ratio: f32,
}

impl ClippedWeight {
    /// The quantized weight, `[out, in]`. before: `[in]`; after, ratio: `[out]`.
    pub fn apply(self, before: &Tensor, after: &Tensor, ratio: &Tensor) -> Result<Tensor> {
        before.apply_op3(after, ratio, self)
    }

    /// Largest code.
    fn top(&self) -> f32 {
        ((1u32 << (self.bits - 1)) - 1) as f32
    }

    fn forward(&self, row: &Row, y: &mut [f32]) {
        let factor = 1.0 / row.after;
        let scaled = row.w.iter().zip(row.before).map(|(w, b)| w * b * factor);
        y.iter_mut().zip(scaled).for_each(|(y, u)| *y = u);
        if self.bits < 16 {
            let top = self.top();
            let scale = scale(row.ratio, max_abs(y), top);
            y.iter_mut().for_each(|y| *y = scale * round((*y / scale).max(-top - 1.0).min(top)));
        }
    }

    /// Adds to `by_before` and returns the gradients by `after` and `ratio`. u: scratch, `[in]`.
    fn backward(&self, row: &Row, gy: &[f32], u: &mut [f32], by_before: &mut [f32]) -> (f32, f32) {
        let factor = 1.0 / row.after;
        let scaled = row.w.iter().zip(row.before).map(|(w, b)| w * b * factor);
        u.iter_mut().zip(scaled).for_each(|(u, v)| *u = v);
        let (mut by_after, mut by_ratio) = (0.0, 0.0);
        let mut add = |j: usize, u: f32, gu: f32| {
            by_before[j] += gu * row.w[j] * factor;
            by_after -= gu * u * factor;
        };
        if self.bits == 16 {
            (0..gy.len()).for_each(|j| add(j, u[j], gy[j]));
            return (by_after, 0.0);
        }
        let (top, max) = (self.top(), max_abs(u));
        let scale = scale(row.ratio, max, top);
        let mut by_scale = 0.0;
        for (j, &u) in u.iter().enumerate() {
            let v = u / scale;
            let code = round(v.max(-top - 2.0).min(top + 1.0));
            if -top - 1.0 <= code && code <= top {
                add(j, u, gy[j]);
                by_scale += gy[j] * (code - v);
            } else {
                by_scale += gy[j] * code.max(-top - 1.0).min(top);
            }
        }
        by_ratio += by_scale * max / top;
        if let Some(j) = u.iter().position(|u| u.abs() == max && max > 0.0) {
            add(j, u[j], by_scale * row.ratio / top * u[j].signum());
        }
        (by_after, by_ratio)
    }
}

fn max_abs(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |max, x| max.max(x.abs()))
}

fn scale(ratio: f32, max: f32, top: f32) -> f32 {
    (ratio * max / top).max(MIN_SCALE)
}

impl CustomOp3 for ClippedWeight {
    fn name(&self) -> &'static str {
        "clipped-weight"
    }

    fn cpu_fwd(
        &self,
        before: &CpuStorage,
        before_layout: &Layout,
        after: &CpuStorage,
        after_layout: &Layout,
        ratio: &CpuStorage,
        ratio_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let before = slice(before, before_layout)?;
        let (after, ratio) = (slice(after, after_layout)?, slice(ratio, ratio_layout)?);
        let inp = before.len();
        let mut y = vec![0.0; self.weight.elem_count()];
        with_slice(&self.weight, |w| {
            let rows = y.par_chunks_exact_mut(inp).zip(w.par_chunks_exact(inp)).enumerate();
            rows.with_min_len(ROWS).for_each(|(o, (y, w))| {
                self.forward(&Row { w, before, after: after[o], ratio: ratio[o] }, y);
            });
            Ok(())
        })?;
        Ok((CpuStorage::F32(y), self.weight.shape().clone()))
    }

    fn bwd(
        &self,
        before: &Tensor,
        after: &Tensor,
        ratio: &Tensor,
        _: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (out, inp) = self.weight.dims2()?;
        let (mut by_after, mut by_ratio) = (vec![0.0; out], vec![0.0; out]);
        let (before, after, ratio) =
            (before.to_vec1::<f32>()?, after.to_vec1::<f32>()?, ratio.to_vec1::<f32>()?);
        let partial: Vec<Vec<f32>> = with_slice(&self.weight, |w| {
            with_slice(gy, |gy| {
                let grads = by_after.par_chunks_mut(ROWS).zip(by_ratio.par_chunks_mut(ROWS)).enumerate();
                let tasks = grads.map(|(task, (by_after, by_ratio))| {
                    let (mut u, mut by_before) = (vec![0.0; inp], vec![0.0; inp]);
                    for i in 0..by_after.len() {
                        let o = task * ROWS + i;
                        let (w, gy) = (&w[o * inp..][..inp], &gy[o * inp..][..inp]);
                        let row = Row { w, before: &before, after: after[o], ratio: ratio[o] };
                        (by_after[i], by_ratio[i]) = self.backward(&row, gy, &mut u, &mut by_before);
                    }
                    by_before
                });
                Ok(tasks.collect())
            })
        })?;
        let mut by_before = vec![0.0; inp];
        partial.iter().for_each(|part| by_before.iter_mut().zip(part).for_each(|(sum, p)| *sum += p));
        Ok((Some(tensor(by_before, inp)?), Some(tensor(by_after, out)?), Some(tensor(by_ratio, out)?)))
    }
}
