//! What it costs to share work: a job of one empty task for every thread, by `for_each_index` and by rayon from outside its pool, one after
//! another and with 20 µs of other work between them, as a decoder has. Microseconds a job, the best of several rounds.

use rayon::prelude::*;
use specquant_kernels::for_each_index;
use std::hint::black_box;
use std::time::{Duration, Instant};

const JOBS: u32 = 2000;

fn microseconds(pause: Duration, job: impl Fn()) -> f64 {
    let round = || {
        let mut took = Duration::ZERO;
        for _ in 0..JOBS {
            let started = Instant::now();
            while started.elapsed() < pause {}
            let started = Instant::now();
            job();
            took += started.elapsed();
        }
        took.as_secs_f64() / f64::from(JOBS) * 1e6
    };
    (0..5).map(|_| round()).fold(f64::INFINITY, f64::min)
}

fn main() {
    let threads = rayon::current_num_threads();
    println!("{threads} threads\npause between jobs, us  for_each_index  rayon");
    for pause in [0, 20] {
        let pause_for = Duration::from_micros(pause);
        let ours = microseconds(pause_for, || {
            for_each_index(threads, |i| {
                black_box(i);
            })
        });
        let rayon = microseconds(pause_for, || {
            (0..threads).into_par_iter().for_each(|i| {
                black_box(i);
            })
        });
        println!("{pause:22}  {ours:14.2}  {rayon:5.2}");
    }
}
