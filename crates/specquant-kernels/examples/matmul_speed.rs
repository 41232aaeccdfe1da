//! Speed of the integer products, and of the f32 product with packed weights, beside the dense f32 product, in one run.
//!
//! `cargo run --release -p specquant-kernels --example matmul_speed`
//!
//! Each figure is the best of several runs, on all of rayon's threads; a multiply-accumulate counts as two operations. The
//! ratio is the speed over that of the dense product of the same shape. The weights of a shape are multiplied over and over:
//! small ones stay in the caches.

use specquant_kernels::*;
use std::time::{Duration, Instant};

/// Shortest time of one call, in seconds.
fn best(mut f: impl FnMut()) -> f64 {
    f();
    let (start, mut best, mut runs) = (Instant::now(), f64::MAX, 0);
    while runs < 5 || start.elapsed() < Duration::from_millis(300) {
        let call = Instant::now();
        f();
        best = best.min(call.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn main() {
    let threads = rayon::current_num_threads();
    println!("isa {}, {threads} threads; {:?}", Isa::active().name(), measure_ceilings(threads, 2.));
    println!("{:>12} {:>5}  {:>10}  GOP/s and ratio to it", "in x out", "rows", "dense f32");
    for (inp, out) in [(576, 576), (576, 1536), (1536, 576), (4096, 4096), (4096, 11008), (11008, 4096)] {
        let mut seed = 1u32;
        let mut float = || {
            seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
            (seed >> 8) as f32 / (1 << 23) as f32 - 1.
        };
        let pack = |w: &[f32], bits: u8| {
            let half = f32::from(1u16 << (bits - 1));
            let codes: Vec<i8> = w.iter().map(|v| (v * (half - 0.5)).floor() as i8).collect();
            PackedWeights::pack(&codes, &vec![1. / half; out], out, inp, bits, inp)
        };
        let dense: Vec<f32> = (0..out * inp).map(|_| float()).collect();
        let (Ok(w4), Ok(w8)) = (pack(&dense, 4), pack(&dense, 8)) else { return };
        // Levels as often as a Gaussian has them: a sum of four evenly spread numbers is nearly one, the outermost level 2.73 standard deviations.
        let mut level = || {
            let sum: f32 = (0..4).map(|_| float()).sum();
            NEAREST_LEVEL[((sum / 1.155 * 127. / 2.73) as i8 as i32 + 128) as usize]
        };
        let codes: Vec<i8> = (0..out * inp).map(|_| level()).collect();
        let scales = vec![0.01; out];
        let Ok(levels) = PackedWeights::pack_levels(&codes, &scales, out, inp, inp, &GAUSSIAN_LEVELS) else {
            return;
        };
        let packed = PackedDense::pack(&dense, out, inp);
        for rows in [1, 4, 16, 512] {
            let x: Vec<f32> = (0..rows * inp).map(|_| float()).collect();
            let (a4, a8) = (quantize_acts(&x, rows, inp, 4, 1.), quantize_acts(&x, rows, inp, 8, 1.));
            let al = quantize_acts_gaussian(&x, rows, inp, 1.);
            // As the engine has it, at the beginning of a cache line.
            let mut y = Buffer::zeros(rows * out);
            let gop = 2e-9 * (rows * inp * out) as f64;
            let base = gop / best(|| matmul_nt(&x, &dense, &mut y, rows, inp, out, false));
            print!("{:>12} {rows:>5}  {base:>10.1}", format!("{inp} x {out}"));
            let print =
                |name, seconds: f64| print!("  {name} {:.1} ({:.2})", gop / seconds, gop / seconds / base);
            print("packed f32", best(|| matmul_packed(&x, &packed, &mut y, rows)));
            print("W4A4", best(|| matmul_int(&a4, &w4, &mut y)));
            print("levels", best(|| matmul_int(&al, &levels, &mut y)));
            print("W4A8", best(|| matmul_int(&a8, &w4, &mut y)));
            print("W8A8", best(|| matmul_int(&a8, &w8, &mut y)));
            print("W4A16", best(|| matmul_float(&x, rows, &w4, &mut y)));
            let quantize = best(|| drop(quantize_acts(&x, rows, inp, 4, 1.)));
            println!("  quantize A4 {:.3} ms", quantize * 1e3);
        }
    }
}
