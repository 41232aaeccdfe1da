//! What this machine can do at best, measured: the lines that a kernel's speed is compared with.
//!
//! The compute loops hold everything in registers; the memory loop reads a buffer larger than the caches. A figure counts a
//! multiply-accumulate as two operations.

use crate::Isa;
#[cfg(target_arch = "aarch64")]
use crate::isa::NeonDot;
#[cfg(target_arch = "x86_64")]
use crate::isa::{AmxInt8, Avx2, Avx512Vnni, AvxVnni};
use crate::isa::{Scalar, with_every_token};
use crate::parallel::for_each_index;
use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Larger than the caches of today's desktop processors (bytes).
const BUFFER: usize = 128 << 20;

/// Measured limits of this machine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// The instruction set of the compute loops.
    pub isa: Isa,
    /// Threads of the figures without `_single`.
    pub threads: usize,
    /// 8-bit multiply-accumulates in 10⁹ operations a second. AVX2: `vpmaddubsw` + `vpaddw`, what the 4-bit kernel consists
    /// of; AVX-512: `vpdpbusd`; AMX: `tdpbusd`.
    pub int8_gops: f64,
    /// [`int8_gops`](Self::int8_gops) of one thread.
    pub int8_gops_single: f64,
    /// f32 multiply-adds, in 10⁹ operations a second.
    pub f32_gflops: f64,
    /// [`f32_gflops`](Self::f32_gflops) of one thread.
    pub f32_gflops_single: f64,
    /// Reading memory, in 10⁹ bytes a second.
    pub read_gbs: f64,
    /// [`read_gbs`](Self::read_gbs) of one thread.
    pub read_gbs_single: f64,
}

/// The processor, where the system tells its name.
pub fn cpu_name() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Measures the limits of the active instruction set with one and with `threads` threads, for about `seconds` in all (and at
/// least one pass of each loop).
pub fn measure_ceilings(threads: usize, seconds: f64) -> Ceilings {
    measure_with(Isa::active(), threads.max(1), seconds, BUFFER)
}

fn measure_with(isa: Isa, threads: usize, seconds: f64, bytes: usize) -> Ceilings {
    let time = Duration::from_secs_f64((seconds / 6.).clamp(0., 1e6));
    // Written once, so that the pages are there and differ.
    let buffer: Vec<u64> = (0..bytes as u64 / 8).collect();
    let int8 = |n| rate(n, time, |_| with_every_token!(isa, k => k.int8(ROUNDS)));
    let float = |n| rate(n, time, |_| with_every_token!(isa, k => k.float(ROUNDS)));
    let read = |n| {
        let share = buffer.len().div_ceil(n);
        rate(n, time, |i| buffer.chunks(share).nth(i).map_or(0., read))
    };
    Ceilings {
        isa,
        threads,
        int8_gops: int8(threads),
        int8_gops_single: int8(1),
        f32_gflops: float(threads),
        f32_gflops_single: float(1),
        read_gbs: read(threads),
        read_gbs_single: read(1),
    }
}

/// Rounds of a compute loop between two looks at the clock.
const ROUNDS: usize = 20_000;

/// 10⁹ operations a second of `threads` threads that call `work(thread)`, which answers its operations, until `time` is over.
fn rate(threads: usize, time: Duration, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let run = |i| {
        barrier.wait();
        let (start, mut done) = (Instant::now(), 0.);
        loop {
            done += work(i);
            let elapsed = start.elapsed();
            if elapsed >= time {
                return done / elapsed.as_secs_f64().max(1e-9) / 1e9;
            }
        }
    };
    let run = &run;
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|i| scope.spawn(move || run(i))).collect();
        let first = run(0);
        others.into_iter().filter_map(|thread| thread.join().ok()).fold(first, |sum, rate| sum + rate)
    })
}

/// Reads all of `buffer` once, on all threads.
pub fn read_once(buffer: &[u64]) {
    let share = buffer.len().div_ceil(rayon::current_num_threads()).max(1);
    for_each_index(buffer.len().div_ceil(share), |i| {
        read(&buffer[i * share..buffer.len().min((i + 1) * share)]);
    });
}

/// Reads all; returns the bytes. Independent sums, so that nothing waits for an addition.
fn read(buffer: &[u64]) -> f64 {
    let mut sums = [0u64; 16];
    for part in buffer.as_chunks::<16>().0 {
        for (sum, v) in sums.iter_mut().zip(part) {
            *sum = sum.wrapping_add(*v);
        }
    }
    black_box(sums);
    size_of_val(buffer) as f64
}

/// Register-only loops; each returns its operations.
trait Loops {
    fn int8(self, rounds: usize) -> f64;
    fn float(self, rounds: usize) -> f64;
}

impl Loops for Scalar {
    fn int8(self, rounds: usize) -> f64 {
        let (mut acc, a, w) = ([1i32; 16], black_box([3u8; 16]), black_box([-5i8; 16]));
        for _ in 0..rounds {
            for i in 0..16 {
                acc[i] = (acc[i] as u8 ^ a[i]) as i32 * i32::from(w[i]) + acc[i] / 2;
            }
        }
        black_box(acc);
        (rounds * 16 * 2) as f64
    }

    fn float(self, rounds: usize) -> f64 {
        let (mut acc, x, y) = ([1f32; 32], black_box(0.5), black_box(1.));
        for _ in 0..rounds {
            for v in &mut acc {
                *v = *v * x + y;
            }
        }
        black_box(acc);
        (rounds * 32 * 2) as f64
    }
}

#[cfg(target_arch = "x86_64")]
impl Loops for Avx2 {
    fn int8(self, rounds: usize) -> f64 {
        // SAFETY: the token proves AVX2.
        unsafe { x86::int8_avx2(rounds) }
    }

    fn float(self, rounds: usize) -> f64 {
        // SAFETY: the token proves AVX2 and FMA.
        unsafe { x86::float_avx2(rounds) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Loops for Avx512Vnni {
    fn int8(self, rounds: usize) -> f64 {
        // SAFETY: the token proves AVX-512 F and VNNI.
        unsafe { x86::int8_avx512(rounds) }
    }

    fn float(self, rounds: usize) -> f64 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { x86::float_avx512(rounds) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Loops for AvxVnni {
    fn int8(self, rounds: usize) -> f64 {
        // SAFETY: the token proves AVX2 and AVX-VNNI.
        unsafe { x86::int8_avxvnni(rounds) }
    }

    fn float(self, rounds: usize) -> f64 {
        self.avx2.float(rounds)
    }
}

#[cfg(target_arch = "x86_64")]
impl Loops for AmxInt8 {
    fn int8(self, rounds: usize) -> f64 {
        crate::matmul::tile_loop(self, rounds)
    }

    fn float(self, rounds: usize) -> f64 {
        self.avx512.float(rounds)
    }
}

#[cfg(target_arch = "aarch64")]
impl Loops for NeonDot {
    fn int8(self, rounds: usize) -> f64 {
        crate::matmul::dot_loop(self, rounds)
    }

    fn float(self, rounds: usize) -> f64 {
        Scalar.float(rounds)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// The product feeds on its own sum, or a compiler would compute it once.
    #[target_feature(enable = "avx2")]
    pub(super) fn int8_avx2(rounds: usize) -> f64 {
        let (w, plus) = (_mm256_set1_epi8(black_box(-5)), _mm256_set1_epi16(black_box(77)));
        let mut acc = [_mm256_set1_epi8(black_box(3)); 12];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = _mm256_add_epi16(_mm256_maddubs_epi16(*v, w), plus);
            }
        }
        black_box(acc);
        (rounds * 12 * 32 * 2) as f64
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn float_avx2(rounds: usize) -> f64 {
        let (x, y) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(1.)));
        let mut acc = [_mm256_set1_ps(black_box(3.)); 12];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = _mm256_fmadd_ps(*v, x, y);
            }
        }
        black_box(acc);
        (rounds * 12 * 8 * 2) as f64
    }

    #[target_feature(enable = "avx2,avxvnni")]
    pub(super) fn int8_avxvnni(rounds: usize) -> f64 {
        let (a, w) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(-5)));
        let mut acc = [_mm256_set1_epi8(black_box(3)); 12];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = _mm256_dpbusd_avx_epi32(*v, a, w);
            }
        }
        black_box(acc);
        (rounds * 12 * 32 * 2) as f64
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8_avx512(rounds: usize) -> f64 {
        let (a, w) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-5)));
        let mut acc = [_mm512_set1_epi8(black_box(3)); 16];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = _mm512_dpbusd_epi32(*v, a, w);
            }
        }
        black_box(acc);
        (rounds * 16 * 64 * 2) as f64
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn float_avx512(rounds: usize) -> f64 {
        let (x, y) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(1.)));
        let mut acc = [_mm512_set1_ps(black_box(3.)); 16];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = _mm512_fmadd_ps(*v, x, y);
            }
        }
        black_box(acc);
        (rounds * 16 * 16 * 2) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_has_positive_limits() {
        for isa in Isa::available() {
            for threads in [1, 2] {
                let c = measure_with(isa, threads, 0.03, 1 << 20);
                assert_eq!((c.isa, c.threads), (isa, threads));
                for v in [
                    c.int8_gops,
                    c.int8_gops_single,
                    c.f32_gflops,
                    c.f32_gflops_single,
                    c.read_gbs,
                    c.read_gbs_single,
                ] {
                    assert!(v.is_finite() && v > 0., "{c:?}");
                }
            }
        }
        assert_eq!(measure_with(Isa::Scalar, 3, f64::NAN.max(0.), 64).threads, 3);
    }
}
