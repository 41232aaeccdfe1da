//! Times attention, dense products and exponentials at the shapes of SmolLM2-135M:
//! `cargo run --release -p specquant-kernels --example attention_speed`

use specquant_kernels::{
    BranchCoeffs, BranchPart, KvCache, KvFormat, add_branch, attention, exp_in_place, fourier_rows,
    log_sum_exp, matmul_nn, matmul_nt,
};
use std::time::Instant;

/// Least seconds of `times` runs.
fn best(times: usize, mut f: impl FnMut()) -> f64 {
    f();
    let one = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..times).map(|_| one(&mut f)).fold(f64::MAX, f64::min)
}

/// Numbers in [-1, 1).
fn noise(n: usize) -> Vec<f32> {
    let mut s = 88_172_645_463_325_252u64;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn main() {
    let (len, heads, kv_heads, d) = (2048, 9, 3, 64);
    let (q, k, v) = (noise(len * heads * d), noise(len * kv_heads * d), noise(len * kv_heads * d));
    let mut out = vec![0.0; q.len()];
    for format in [
        KvFormat::F32,
        KvFormat::F16,
        KvFormat::Int { bits: 8, clip: 1.0, intact: 0 },
        KvFormat::Int { bits: 4, clip: 1.0, intact: 0 },
        KvFormat::Gaussian { intact: 4 },
    ] {
        let mut cache = KvCache::new(format, kv_heads, d).with_any_order(true);
        let append = best(5, || {
            cache.truncate(0);
            cache.append(&k, &v);
        });
        let prefill = best(7, || attention(&q, len, heads, &cache, 0.125, None, &mut out));
        let step = heads * d;
        let mut decode = |len: usize| {
            let mut cache = KvCache::new(format, kv_heads, d).with_any_order(true);
            cache.append(&k[..len * kv_heads * d], &v[..len * kv_heads * d]);
            best(200, || attention(&q[..step], 1, heads, &cache, 0.125, None, &mut out[..step])) * 1e6
        };
        let decode = [300, 2048].map(&mut decode);
        let flops = 4.0 * (heads * d * len * (len + 1) / 2) as f64;
        println!(
            "attention {format:?}, {len} tokens: append {:.2} ms, prefill {:.1} ms ({:.1} GFLOP/s), decode {:.0} µs, after 300 tokens {:.0} µs",
            append * 1e3,
            prefill * 1e3,
            flops / prefill / 1e9,
            decode[1],
            decode[0]
        );
    }
    let (k, n) = (576, 1536);
    let w = noise(k * n);
    for m in [1, 2, 4, 8, 16, 64, 256, 2048] {
        let x = noise(m * k);
        let mut y = vec![0.0; m * n];
        let nt = best(10, || matmul_nt(&x, &w, &mut y, m, k, n, false));
        let nn = best(10, || matmul_nn(&x, &w, &mut y, m, k, n, false));
        let flops = 2.0 * (m * k * n) as f64 / 1e9;
        println!("dense {m} x {k} x {n}: nt {:.1} GFLOP/s, nn {:.1} GFLOP/s", flops / nt, flops / nn);
    }
    let (vocab, x) = (49_152, noise(k));
    let w = noise(vocab * k);
    let mut y = vec![0.0; vocab];
    let secs = best(10, || matmul_nt(&x, &w, &mut y, 1, k, vocab, false));
    println!(
        "dense 1 x {k} x {vocab}: {:.2} ms, {:.1} GB/s",
        secs * 1e3,
        (vocab * k * 4) as f64 / secs / 1e9
    );
    let secs = best(10, || assert!(std::hint::black_box(log_sum_exp(&y)).is_finite()));
    println!("log_sum_exp of {vocab}: {:.1} µs", secs * 1e6);
    let secs = best(10, || exp_in_place(&mut y[..8192]));
    println!("exp: {:.2} ns per element, one thread", secs * 1e9 / 8192.0);
    let (r, m) = (fourier_rows(k, 16), 2048);
    let coeffs: Vec<half::f16> = noise(n * r).into_iter().map(half::f16::from_f32).collect();
    let rows: Vec<u32> = (0..n).flat_map(|_| 0..r as u32).collect();
    let Ok(c) = BranchCoeffs::pack(k, &vec![r; n], &rows, &coeffs) else { return };
    let (p, mut y) = (noise(m * r), vec![0.0; m * n]);
    let many = best(10, || add_branch(BranchPart { p: &p, stride: r, coeffs: &c }, m, &mut y));
    let one = best(50, || add_branch(BranchPart { p: &p[..r], stride: r, coeffs: &c }, 1, &mut y[..n]));
    let rate = 2.0 * (m * r * n) as f64 / many / 1e9;
    println!("branch of 16 bins, {n} outputs: {m} rows {rate:.1} GFLOP/s, 1 row {:.1} µs", one * 1e6);
}
