//! Times GPTQ on the seven layers of a decoder block of LLaMA-2-7B's shape, Hessians given: factorization and rounding to 4 bits, per channel.
//! Prints seconds. `benches/peers/peers.py` runs it beside torch: `cargo run --release -p specquant-quantize --example gptq_speed`

use specquant_quantize::rounding::{ClipSearch, GptqConfig, Grid, Hessian, factorize, gptq, weight_scales};
use std::time::Instant;

/// Inputs of the Hessians, fewer than channels: damping makes them definite.
const ROWS: usize = 512;

/// Numbers in [-1, 1).
struct Noise(u64);

impl Noise {
    fn values(&mut self, n: usize) -> Vec<f32> {
        let mut next = || {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }
}

fn main() {
    let (hidden, inner) = (4096, 11008);
    let mut noise = Noise(88_172_645_463_325_252);
    let (grid, clip) = (Grid::default(), ClipSearch { enabled: false, ..ClipSearch::default() });
    let mut total = 0.0;
    // Inputs, and the outputs of the layers that read them.
    for (inp, outs) in
        [(hidden, &[hidden; 3][..]), (hidden, &[hidden]), (hidden, &[inner; 2]), (inner, &[hidden])]
    {
        let mut hessian = Hessian::new(inp);
        hessian.add(&noise.values(ROWS * inp));
        let weights: Vec<Vec<f32>> = outs.iter().map(|out| noise.values(out * inp)).collect();
        let scales = |(w, out): (&Vec<f32>, &usize)| weight_scales(w, *out, inp, &grid, &clip);
        let scales: Vec<Vec<f32>> = weights.iter().zip(outs).map(scales).collect();
        let begun = Instant::now();
        let factor = factorize(hessian, &GptqConfig::default());
        for ((w, out), scales) in weights.iter().zip(outs).zip(&scales) {
            std::hint::black_box(gptq(w, *out, inp, scales, &grid, &factor));
        }
        total += begun.elapsed().as_secs_f64();
    }
    println!("{total}");
}
