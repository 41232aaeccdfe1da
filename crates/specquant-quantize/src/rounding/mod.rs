//! Rounding: from float weights to signed integer codes.
//!
//! All weights are `[out, in]` row-major f32, as Hugging Face stores them. Codes are symmetric,
//! `w ≈ code · scale`, with `code` in `[-2^(b-1), 2^(b-1) - 1]` and one scale for each output channel or for each group
//! of input channels of it. The steps are separate, so that a recipe can combine them:
//!
//! 1. [`weight_scales`] chooses the scales, with or without the clip search, or [`output_scales`] does;
//! 2. [`round_to_nearest`] or [`gptq`] chooses the codes under those scales.
//!
//! Nothing here depends on the number of threads: work is cut in fixed pieces and every sum has a fixed order. Loops are
//! compiled a second time for AVX2, but never with fused multiply-add, so both versions give the same bits.

mod factor;
mod gptq;
mod hessian;
mod output_clip;
mod rtn;
mod scales;

use specquant_kernels::NEAREST_LEVEL;

pub use factor::*;
pub use gptq::*;
pub use hessian::*;
pub use output_clip::*;
pub use rtn::*;
pub use scales::*;

/// Defines a function that runs an `#[inline(always)]` body compiled for AVX2 where the machine has it.
macro_rules! with_avx2 {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$meta])*
        fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn wide($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                if std::is_x86_feature_detected!("avx2") {
                    // SAFETY: `wide` needs nothing but AVX2, which this machine was just found to have.
                    return unsafe { wide($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}
use with_avx2;

/// 1.5 * 2^23: adding it leaves no bits for a fraction.
const MAGIC: f32 = 12_582_912.0;

/// Rounds half to even. Only for |x| < 2^22, which clamped codes always are; unlike `round_ties_even` it needs no more
/// than SSE2 to be vectorized.
#[inline(always)]
fn round_half_even(x: f32) -> f32 {
    (x + MAGIC) - MAGIC
}

/// `clamp` as two selects, which become one `maxps` and one `minps`.
#[inline(always)]
fn limit(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    if x < high { x } else { high }
}

/// The level nearest to a code of −128 to 127: a weight is rounded in two steps, to whole units and then by a table.
#[inline(always)]
fn nearest_level(code: f32) -> f32 {
    f32::from(NEAREST_LEVEL[(code as i32 + 128) as usize & 255])
}

#[cfg(test)]
pub(crate) mod testing {
    use rand::{Rng, SeedableRng};

    /// `n` standard normal values.
    pub fn gaussian(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..n)
            .map(|_| {
                let (a, b): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
                ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
            })
            .collect()
    }

    /// `[rows, dim]` activations whose channels are correlated and of very different sizes, as in a real model.
    pub fn correlated(rows: usize, dim: usize, seed: u64) -> Vec<f32> {
        let (z, mix) = (gaussian(rows * dim, seed), gaussian(dim * dim, seed + 1));
        let mut x = vec![0.0; rows * dim];
        for r in 0..rows {
            for j in 0..dim {
                let shared: f32 = (0..dim).map(|i| z[r * dim + i] * mix[i * dim + j]).sum();
                x[r * dim + j] =
                    (shared / (dim as f32).sqrt() + 0.3 * z[r * dim + j]) * (1.0 + (j % 5) as f32);
            }
        }
        x
    }

    /// Runs `f` in a pool of that many threads.
    pub fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
    }
}
