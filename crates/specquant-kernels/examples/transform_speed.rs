//! Speed of what an input goes through before it is multiplied: rotations, reflections, quantizers.
//!
//! `cargo run --release -p specquant-kernels --example transform_speed`
//!
//! Microseconds a row, the best of several runs on all of rayon's threads, for one row and for 256 in blocks of 16, which stay in a core's cache as
//! they do in the engine (where the quantizers find them there, too).

use specquant_kernels::{Dct, Hadamard, Reflections, for_each_chunk, quantize_acts, quantize_acts_gaussian};
use std::time::Instant;

/// Shortest time of one call, in microseconds.
fn best(mut f: impl FnMut()) -> f64 {
    let time = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..40).map(|_| time(&mut f)).fold(f64::MAX, f64::min) * 1e6
}

fn main() {
    const KEEP: usize = 32;
    println!(
        "{:>6} {:>5} {:>9} {:>9} {:>15} {:>9} {:>12}",
        "width", "rows", "hadamard", "cosine", "32 reflections", "4 bits", "16 levels"
    );
    for rows in [1, 256] {
        for n in [576, 1536, 4096, 5120, 11008, 14336] {
            let (hadamard, cosine) = (Hadamard::new(n), Dct::new(n));
            let vectors = (0..KEEP * n).map(|i| ((i * 7919 + 13) % 255) as f32 - 127.0).collect();
            let reflections = Reflections::new(n, vectors);
            let mut x: Vec<f32> = (0..rows * n).map(|i| (i % 17) as f32 - 8.0).collect();
            let mut blocks = |f: &(dyn Fn(&mut [f32], usize) + Sync)| {
                best(|| for_each_chunk(&mut x, 16 * n, |_, x| f(x, x.len() / n))) / rows as f64
            };
            let [h, c, r] = [
                blocks(&|x, rows| hadamard.apply(x, rows)),
                blocks(&|x, rows| cosine.apply(x, rows)),
                blocks(&|x, rows| reflections.apply(x, rows)),
            ];
            let plain = best(|| drop(quantize_acts(&x, rows, n, 4, 0.9))) / rows as f64;
            let levels = best(|| drop(quantize_acts_gaussian(&x, rows, n, 0.9))) / rows as f64;
            println!("{n:>6} {rows:>5} {h:>9.2} {c:>9.2} {r:>15.2} {plain:>9.2} {levels:>12.2}");
        }
    }
}
