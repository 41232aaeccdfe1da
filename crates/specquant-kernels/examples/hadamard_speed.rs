//! Speed of the Walsh-Hadamard transforms beside a copy of the same values, in one run.
//!
//! `cargo run --release -p specquant-kernels --example hadamard_speed`
//!
//! Each figure is the best of several runs, on all of rayon's threads (`RAYON_NUM_THREADS=1`: on one). The transform is in place, the copy goes
//! elsewhere in chunks of as many values as a task of the transform has; the ratio is the transform's time over the copy's. GB/s
//! count the values once in and once out.

use rayon::prelude::*;
use specquant_kernels::{Hadamard, Isa};
use std::time::{Duration, Instant};

/// Shortest time of one call, in seconds.
fn best(mut f: impl FnMut()) -> f64 {
    f();
    let (start, mut best, mut runs) = (Instant::now(), f64::MAX, 0);
    while runs < 5 || start.elapsed() < Duration::from_millis(200) {
        let call = Instant::now();
        f();
        best = best.min(call.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn print(name: &str, plan: &Hadamard, rows: usize, inner: usize) {
    let len = rows * plan.width() * inner;
    let mut x: Vec<f32> = (0..len).map(|i| (i % 1013) as f32 - 506.0).collect();
    let mut y = vec![0.0; len];
    let copy =
        best(|| x.par_chunks(1 << 14).zip(y.par_chunks_mut(1 << 14)).for_each(|(x, y)| y.copy_from_slice(x)));
    let time = best(|| plan.apply_across(&mut x, rows, inner));
    let (ns, gb) = (1e9 / len as f64, 8e-9 * len as f64);
    println!(
        "{name:>12} {:>10} {rows:>5}  {:>7.3} {:>6.1}  {:>7.3} {:>6.1}  {:>5.2}",
        plan.to_string(),
        time * ns,
        gb / time,
        copy * ns,
        gb / copy,
        time / copy
    );
}

fn main() {
    println!("isa {}, {} threads", Isa::active().name(), rayon::current_num_threads());
    println!("{:>12} {:>10} {:>5}  transform       copy", "width", "plan", "rows");
    println!("{:>30} {:>7} {:>6}  {:>7} {:>6}  {:>5}", "", "ns", "GB/s", "ns", "GB/s", "ratio");
    for n in
        [64, 128, 576, 896, 960, 1536, 2048, 4096, 4864, 8192, 8960, 11008, 13824, 14336, 18944, 28672, 29568]
    {
        let plan = Hadamard::new(n);
        print(&n.to_string(), &plan, 1, 1);
        print(&n.to_string(), &plan, (1 << 22) / n, 1);
    }
    for (heads, head_dim) in [(12, 64), (14, 64), (32, 64), (32, 128), (40, 128)] {
        let plan = Hadamard::new(heads);
        print(&format!("{heads} x {head_dim}"), &plan, 1, head_dim);
        print(&format!("{heads} x {head_dim}"), &plan, (1 << 22) / heads / head_dim, head_dim);
    }
}
