//! Products of activations with quantized weights.

use serde::Serialize;
use specquant_kernels::{PackedDense, matmul_float, matmul_int, matmul_packed, quantize_acts};
use specquant_model::{Levels, quantize_input};

use crate::made::{Noise, weights};
use crate::{Settings, best};

/// Inputs and outputs: SmolLM2-135M's, LLaMA-2-7B's.
pub(crate) const SHAPES: [[usize; 2]; 5] =
    [[576, 576], [576, 1536], [1536, 576], [4096, 4096], [11008, 4096]];
/// Tokens.
const ROWS: [usize; 5] = [1, 8, 32, 512, 2048];

/// What is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Product {
    /// f32 weights.
    F32,
    /// 4-bit weights, 4-bit activations.
    W4A4,
    /// The same with levels that suit a Gaussian.
    W4A4Levels,
    /// 4-bit weights, 8-bit activations.
    W4A8,
    /// 8-bit weights and activations.
    W8A8,
    /// 4-bit weights, f32 activations.
    W4A16,
}

impl Product {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Product::F32 => "f32",
            Product::W4A4 => "W4A4",
            Product::W4A4Levels => "W4A4 levels",
            Product::W4A8 => "W4A8",
            Product::W8A8 => "W8A8",
            Product::W4A16 => "W4A16",
        }
    }

    /// Bytes of a weight.
    pub fn weight_bytes(self) -> f64 {
        match self {
            Product::F32 => 4.0,
            Product::W8A8 => 1.0,
            _ => 0.5,
        }
    }
}

/// A product of one shape.
#[derive(Debug, Clone, Serialize)]
pub struct ProductRow {
    /// What is multiplied.
    pub product: Product,
    /// Tokens, inputs, outputs.
    pub rows: usize,
    /// Inputs.
    pub inp: usize,
    /// Outputs.
    pub out: usize,
    /// Of one call, without quantizing the activations.
    pub seconds: f64,
    /// Of quantizing them.
    pub quantize_seconds: f64,
    /// Of the product in f32.
    pub f32_seconds: f64,
}

impl ProductRow {
    /// 10⁹ operations a second, the activations' quantizer included.
    pub fn gops(&self) -> f64 {
        2e-9 * (self.rows * self.inp * self.out) as f64 / (self.seconds + self.quantize_seconds)
    }

    /// 10⁹ bytes of weights a second.
    pub fn gbs(&self) -> f64 {
        1e-9 * self.product.weight_bytes() * (self.inp * self.out) as f64 / self.seconds
    }
}

pub(crate) fn measure([inp, out]: [usize; 2], settings: &Settings) -> Vec<ProductRow> {
    let mut noise = Noise(7);
    let dense = PackedDense::pack(&noise.values(out * inp), out, inp);
    let made = |noise: &mut Noise, bits, levels| weights(noise, out, inp, bits, levels);
    // Weights of its own for every product: those of a neighbour in turn would still lie in the caches.
    let (Ok(w4), Ok(w4a8), Ok(w4a16), Ok(levels), Ok(w8)) = (
        made(&mut noise, 4, Levels::Uniform),
        made(&mut noise, 4, Levels::Uniform),
        made(&mut noise, 4, Levels::Uniform),
        made(&mut noise, 4, Levels::Gaussian),
        made(&mut noise, 8, Levels::Uniform),
    ) else {
        return Vec::new(); // made-up weights are never out of range
    };
    let mut all = Vec::new();
    for rows in ROWS.into_iter().filter(|rows| settings.full || *rows <= 512) {
        let x = noise.values(rows * inp);
        let (a4, a8) = (quantize_acts(&x, rows, inp, 4, 1.0), quantize_acts(&x, rows, inp, 8, 1.0));
        let al = quantize_input(&x, rows, 4, Levels::Gaussian, 1.0);
        let [mut y0, mut y1, mut y2, mut y3, mut y4, mut y5] = [const { Vec::new() }; 6];
        for y in [&mut y0, &mut y1, &mut y2, &mut y3, &mut y4, &mut y5] {
            *y = vec![0.0; rows * out];
        }
        let [f32_seconds, q4, q8, ql, s4, sl, s48, s88, s416] = best(
            settings.seconds / 4.0,
            [
                &mut || matmul_packed(&x, &dense, &mut y0, rows),
                &mut || drop(quantize_acts(&x, rows, inp, 4, 1.0)),
                &mut || drop(quantize_acts(&x, rows, inp, 8, 1.0)),
                &mut || drop(quantize_input(&x, rows, 4, Levels::Gaussian, 1.0)),
                &mut || matmul_int(&a4, &w4, &mut y1),
                &mut || matmul_int(&al, &levels, &mut y2),
                &mut || matmul_int(&a8, &w4a8, &mut y3),
                &mut || matmul_int(&a8, &w8, &mut y4),
                &mut || matmul_float(&x, rows, &w4a16, &mut y5),
            ],
        );
        let row = |product, seconds, quantize_seconds| ProductRow {
            product,
            rows,
            inp,
            out,
            seconds,
            quantize_seconds,
            f32_seconds,
        };
        all.extend([
            row(Product::F32, f32_seconds, 0.0),
            row(Product::W4A4, s4, q4),
            row(Product::W4A4Levels, sl, ql),
            row(Product::W4A8, s48, q8),
            row(Product::W8A8, s88, q8),
            row(Product::W4A16, s416, 0.0),
        ]);
    }
    all
}
