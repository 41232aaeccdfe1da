//! FlatQuant's operations, with backward passes of their own: orthonormal matrices by the Cayley transform, Kronecker products, and quantizers with a
//! learned clip ratio.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use specquant_kernels::{Kronecker, matmul_nt, transposed};

use crate::ops::{MIN_SCALE, round, slice, tensor, to_vec, with_slice};

/// Rows that one task takes; sums over rows are added in the order of the tasks, whatever the number of threads.
const ROWS: usize = 64;

/// Q = (I − A/2)⁻¹ (I + A/2), A = T − Tᵀ, T the part of x below the diagonal: orthonormal for every x `[n, n]` (torch's
/// `parametrizations.orthogonal` with `orthogonal_map = "cayley"`, as FlatQuant's trans_utils.py has it).
///
/// With M = (I − A/2)⁻¹, dQ = M dA (Q + I) / 2, so that the gradient by A is Mᵀ G (Q + I)ᵀ / 2. M = (Q + I) / 2 too, since
/// Q + I = M (I + A/2) + M (I − A/2) = 2 M.
pub(super) fn cayley(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Cayley)
}

struct Cayley;

impl CustomOp1 for Cayley {
    fn name(&self) -> &'static str {
        "cayley"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(storage, layout)?;
        let n = x.len().isqrt();
        let below = |i: usize, j: usize| if i > j { x[i * n + j] } else { 0.0 };
        let one = |i: usize, j: usize| f32::from(u8::from(i == j));
        let left = (0..n * n).map(|at| (at / n, at % n));
        let left = left.map(|(i, j)| one(i, j) - 0.5 * (below(i, j) - below(j, i))).collect();
        // I − A/2 has eigenvalues 1 ± iλ: it is never singular, unless something is not finite.
        let Some(inverse) = Kronecker::new(n, left, Vec::new()).inverse_transposed() else {
            candle_core::bail!("a parameter of an orthonormal matrix is not finite");
        };
        let m = transposed(inverse.left(), n, n);
        let q = m.iter().enumerate().map(|(at, m)| 2.0 * m - one(at / n, at % n)).collect();
        Ok((CpuStorage::F32(q), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, q: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let (n, q, g) = (x.dim(0)?, q.detach(), g.detach());
        let m = ((&q + Tensor::eye(n, q.dtype(), q.device())?)? * 0.5)?;
        let by_a = to_vec(&m.t()?.matmul(&g.contiguous()?)?.matmul(&m.t()?)?)?;
        let by_x = |at: usize| {
            let (i, j) = (at / n, at % n);
            if i > j { by_a[at] - by_a[j * n + i] } else { 0.0 }
        };
        Ok(Some(tensor((0..n * n).map(by_x).collect(), (n, n))?))
    }
}

/// x (A ⊗ B). x: `[rows, n]`; a: `[n₁, n₁]`; b: `[n₂, n₂]`, n = n₁ n₂.
pub(super) fn kronecker(x: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, KroneckerProduct)
}

/// The gradients: by x, G (Aᵀ ⊗ Bᵀ); by A, Σ X_r (G_r Bᵀ)ᵀ; by B, Σ (Aᵀ X_r)ᵀ G_r, over the rows r as matrices `[n₁, n₂]`.
struct KroneckerProduct;

impl CustomOp3 for KroneckerProduct {
    fn name(&self) -> &'static str {
        "kronecker"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, n) = x_layout.shape().dims2()?;
        let mut x = slice(x, x_layout)?.to_vec();
        let (a, b) = (slice(a, a_layout)?.to_vec(), slice(b, b_layout)?.to_vec());
        Kronecker::new(n, a, b).apply(&mut x, rows);
        Ok((CpuStorage::F32(x), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((rows, n), n1, n2) = (x.dims2()?, a.dim(0)?, b.dim(0)?);
        let (a, b) = (transposed(&to_vec(a)?, n1, n1).into_vec(), transposed(&to_vec(b)?, n2, n2).into_vec());
        let mut behind = to_vec(g)?;
        // G (Aᵀ ⊗ I), of which both the gradients by x and by B are made, then G (I ⊗ Bᵀ).
        let mut beside = behind.clone();
        Kronecker::new(n, a, Vec::new()).apply(&mut behind, rows);
        let right = Kronecker::new(n, Vec::new(), b);
        right.apply(&mut beside, rows);
        let by_a = with_slice(x, |x| {
            let tasks = x.par_chunks(ROWS * n).zip(beside.par_chunks(ROWS * n)).map(|(x, g)| {
                let mut sum = vec![0.0; n1 * n1];
                let rows = x.chunks_exact(n).zip(g.chunks_exact(n));
                rows.for_each(|(x, g)| matmul_nt(x, g, &mut sum, n1, n2, n1, true));
                sum
            });
            Ok(tasks.collect::<Vec<_>>())
        })?;
        let mut sum = vec![0.0; n1 * n1];
        by_a.iter().for_each(|part| sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part));
        let flat = (rows * n1, n2);
        let by_b = x.detach().reshape(flat)?.t()?.matmul(&tensor(behind.clone(), flat)?)?;
        right.apply(&mut behind, rows);
        Ok((Some(tensor(behind, (rows, n))?), Some(tensor(sum, (n1, n1))?), Some(by_b)))
    }
}

/// How rows are fake-quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codes {
    /// Symmetric: `scale = ratio · max|x| / (2ᵇ⁻¹ − 1)`, codes −2ᵇ⁻¹ … 2ᵇ⁻¹ − 1. Weights.
    Signed,
    /// Asymmetric: `scale = ratio · (max(0, max x) − min(0, min x)) / (2ᵇ − 1)`, codes 0 … 2ᵇ − 1 less a zero point. Activations.
    Unsigned,
}

/// Fake quantization of rows whose range is multiplied by a learned ratio.
///
/// Only the rounding counts as the identity in the gradient, which stops where a code is clamped, and reaches the ratio and the largest (and smallest)
/// value through the scale (FlatQuant, quant_utils.py, `round_ste`). The zero point is a constant.
pub(super) struct Clipped {
    /// 2 to 8.
    pub bits: u8,
    pub codes: Codes,
}

/// A row's quantizer.
struct Row {
    scale: f32,
    /// Least and largest code, less the zero point.
    codes: [f32; 2],
    /// Least and largest value; they are the range, or its ends.
    ends: [f32; 2],
    /// Derivative of the scale by the range's size times the ratio.
    step: f32,
    /// The range's size.
    range: f32,
}

impl Clipped {
    /// x: `[rows, width]`; ratio: `[rows]`, or `[1]` for all.
    pub fn apply(self, x: &Tensor, ratio: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op2(&ratio.contiguous()?, self)
    }

    fn row(&self, x: &[f32], ratio: f32) -> Row {
        let (min, max) = x.iter().fold((0.0f32, 0.0f32), |(min, max), &v| (min.min(v), max.max(v)));
        match self.codes {
            Codes::Signed => {
                let top = ((1u32 << (self.bits - 1)) - 1) as f32;
                let range = max.max(-min);
                let scale = (ratio * range / top).max(MIN_SCALE);
                Row { scale, codes: [-top - 1.0, top], ends: [min, max], step: 1.0 / top, range }
            }
            Codes::Unsigned => {
                let steps = ((1u32 << self.bits) - 1) as f32;
                let scale = (ratio * (max - min) / steps).max(MIN_SCALE);
                let zero = (-ratio * min / scale).round_ties_even().min(steps);
                let codes = [-zero, steps - zero];
                Row { scale, codes, ends: [min, max], step: 1.0 / steps, range: max - min }
            }
        }
    }

    fn forward(&self, x: &[f32], ratio: f32, y: &mut [f32]) {
        let Row { scale, codes: [lo, hi], .. } = self.row(x, ratio);
        x.iter().zip(y).for_each(|(x, y)| *y = scale * round((x / scale).max(lo).min(hi)));
    }

    /// Writes the gradient by x and returns that by the ratio.
    fn backward(&self, x: &[f32], ratio: f32, gy: &[f32], gx: &mut [f32]) -> f32 {
        let Row { scale, codes: [lo, hi], ends: [min, max], step, range } = self.row(x, ratio);
        let mut by_scale = 0.0;
        for ((&x, &gy), gx) in x.iter().zip(gy).zip(gx.iter_mut()) {
            let v = x / scale;
            let code = round(v.max(lo - 1.0).min(hi + 1.0));
            let inside = lo <= code && code <= hi;
            *gx = if inside { gy } else { 0.0 };
            by_scale += gy * if inside { code - v } else { code.max(lo).min(hi) };
        }
        let mut add = |end: f32, sign: f32| {
            if end != 0.0
                && let Some(at) = x.iter().position(|&x| x == end)
            {
                gx[at] += sign * by_scale * ratio * step;
            }
        };
        match self.codes {
            Codes::Unsigned => {
                add(max, 1.0);
                add(min, -1.0);
            }
            Codes::Signed if max >= -min => add(max, 1.0),
            Codes::Signed => add(min, -1.0),
        }
        by_scale * range * step
    }
}

/// The ratio of a row.
fn of_row(ratios: &[f32], row: usize) -> f32 {
    ratios[row.min(ratios.len() - 1)]
}

impl CustomOp2 for Clipped {
    fn name(&self) -> &'static str {
        "clipped"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        ratio: &CpuStorage,
        ratio_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = x_layout.shape().dims2()?;
        let (x, ratios) = (slice(x, x_layout)?, slice(ratio, ratio_layout)?);
        if ratios.len() != 1 && ratios.len() != rows {
            candle_core::bail!("{} clip ratios for {rows} rows", ratios.len());
        }
        let mut y = vec![0.0; x.len()];
        let tasks = y.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).enumerate();
        tasks.with_min_len(ROWS).for_each(|(row, (y, x))| self.forward(x, of_row(ratios, row), y));
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        ratio: &Tensor,
        _: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (rows, width) = x.dims2()?;
        let ratios = to_vec(ratio)?;
        let (mut gx, mut by_ratio) = (vec![0.0; rows * width], vec![0.0; rows]);
        with_slice(x, |x| {
            with_slice(gy, |gy| {
                let inputs = x.par_chunks_exact(width).zip(gy.par_chunks_exact(width));
                let outputs = gx.par_chunks_exact_mut(width).zip(&mut by_ratio);
                let tasks = outputs.zip(inputs).enumerate();
                tasks.with_min_len(ROWS).for_each(|(row, ((gx, by_ratio), (x, gy)))| {
                    *by_ratio = self.backward(x, of_row(&ratios, row), gy, gx);
                });
                Ok(())
            })
        })?;
        if ratios.len() == 1 {
            by_ratio = vec![by_ratio.iter().sum()];
        }
        let count = by_ratio.len();
        Ok((Some(tensor(gx, (rows, width))?), Some(tensor(by_ratio, count)?)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::ops::{FakeQuant, rows};
    use crate::stiefel::deviation;

    fn random(shape: &[usize], seed: u64) -> Tensor {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        tensor((0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect(), shape).unwrap()
    }

    fn sum(y: &Tensor, c: &Tensor) -> f64 {
        let (y, c) = (to_vec(y).unwrap(), to_vec(c).unwrap());
        y.iter().zip(&c).map(|(y, c)| f64::from(*y) * f64::from(*c)).sum()
    }

    /// Slopes of Σ f(xs)·c in a random direction of each x: by the backward pass, and by central differences in f64 sums.
    fn check(name: &str, step: f64, xs: &[Tensor], f: impl Fn(&[Tensor]) -> Tensor) {
        let vars: Vec<Var> = xs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
        let y = f(&vars.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>());
        let c = random(y.dims(), 90);
        let grads = (y * &c).unwrap().sum_all().unwrap().backward().unwrap();
        for (i, x) in xs.iter().enumerate() {
            let direction = random(x.dims(), 91 + i as u64);
            let found = sum(grads.get(&vars[i]).unwrap(), &direction);
            let at = |step: f64| {
                let mut xs = xs.to_vec();
                xs[i] = (x + (&direction * step).unwrap()).unwrap();
                sum(&f(&xs), &c)
            };
            let want = (at(step) - at(-step)) / (2.0 * step);
            assert!((found - want).abs() < 1e-2 * (1.0 + want.abs()), "{name}, {i}: {found}, not {want}");
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        check("cayley", 1e-2, &[random(&[7, 7], 1)], |x| cayley(&x[0]).unwrap());
        let xs = [random(&[150, 12], 2), random(&[3, 3], 3), random(&[4, 4], 4)];
        check("kronecker", 1e-2, &xs, |x| kronecker(&x[0], &x[1], &x[2]).unwrap());
        // As a transform of weights has them: behind the inverse transpose of an SVD.
        let xs = [random(&[3, 3], 5), random(&[3, 3], 6), (random(&[3], 7) + 2.0).unwrap()];
        let x = random(&[20, 3], 8);
        check("matrix", 1e-2, &xs, |v| {
            let scaled = cayley(&v[0]).unwrap().broadcast_div(&v[2]).unwrap();
            x.matmul(&scaled.matmul(&cayley(&v[1]).unwrap().t().unwrap()).unwrap()).unwrap()
        });
    }

    #[test]
    fn cayley_is_orthonormal() {
        for n in [1, 2, 9, 48] {
            let q = cayley(&random(&[n, n], 3)).unwrap();
            assert!(deviation(&q).unwrap() < 1e-5, "{n}");
        }
        let zero = to_vec(&cayley(&tensor(vec![0.0; 4], (2, 2)).unwrap()).unwrap()).unwrap();
        assert_eq!(zero, [1.0, 0.0, 0.0, 1.0]);
    }

    /// At 20 bits almost nothing is rounded, so that finite differences see what clipping does, and the straight-through gradient is exact but for
    /// the codes' own jumps.
    #[test]
    fn clipping_has_the_slope_of_the_clamped_values() {
        let x = random(&[5, 40], 3);
        for codes in [Codes::Signed, Codes::Unsigned] {
            let quantize = |x: &Tensor, ratio: &Tensor| Clipped { bits: 20, codes }.apply(x, ratio).unwrap();
            for count in [1, 5] {
                let ratios = tensor(vec![0.6; count], count).unwrap();
                check("ratio", 1e-3, std::slice::from_ref(&ratios), |v| quantize(&x, &v[0]));
                // The zero point, a constant in the gradient, moves with the ends of an asymmetric range.
                if codes == Codes::Signed {
                    check("both", 1e-3, &[x.clone(), ratios], |v| quantize(&v[0], &v[1]));
                }
            }
        }
    }

    /// With a ratio that is not learned it is OmniQuant's quantizer.
    #[test]
    fn activations_have_the_gradient_of_a_fixed_clip() {
        let (x, g) = (random(&[6, 64], 9), random(&[6, 64], 10));
        let gradient = |f: &dyn Fn(&Tensor) -> Tensor| {
            let var = Var::from_tensor(&x).unwrap();
            let grads = (f(&var) * &g).unwrap().sum_all().unwrap().backward().unwrap();
            to_vec(grads.get(&var).unwrap()).unwrap()
        };
        for clip in [1.0, 0.7] {
            let ratio = tensor(vec![clip], 1).unwrap();
            let found = gradient(&|x| Clipped { bits: 4, codes: Codes::Unsigned }.apply(x, &ratio).unwrap());
            let want = gradient(&|x| rows(x, FakeQuant { bits: 4, clip, through_range: true }).unwrap());
            for (found, want) in found.iter().zip(&want) {
                assert!((found - want).abs() < 1e-5, "{clip}: {found}, not {want}");
            }
        }
    }

    #[test]
    fn codes_are_those_of_the_engine() {
        let x = random(&[6, 64], 9);
        for ratio in [1.0, 0.7] {
            let one = tensor(vec![ratio], 1).unwrap();
            let got = Clipped { bits: 4, codes: Codes::Unsigned }.apply(&x, &one).unwrap();
            let want = specquant_kernels::quantize_acts(&to_vec(&x).unwrap(), 6, 64, 4, ratio).dequantize();
            for (got, want) in to_vec(&got).unwrap().iter().zip(&want) {
                assert!((got - want).abs() < 1e-5, "{got}, not {want}");
            }
        }
    }
}
