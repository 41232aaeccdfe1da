//! Scales of the symmetric weight grid, and the clip search that shrinks them.
//!
//! A scale is `max|w| / (2^(b-1) - 1)` over an output channel (or a group of its inputs), so without clipping the lowest
//! code is never used. With a [`ClipSearch`], the maximum is shrunk by the factor `p = 1 - i/grid` which minimizes
//! `Σ |q(w) - w|^2.4`: a few outliers are clipped so that all other weights get a finer grid. This is
//! `WeightQuantizer.find_params` of QuaRot (`fake_quant/quant_utils.py`), with its constants. The power is evaluated by
//! polynomials (relative error below 5e-5), which can only matter between shrink factors that are equally good.

use super::{MAGIC, limit, nearest_level, round_half_even, with_avx2};
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use specquant_model::Levels;

/// The symmetric signed integer grid of weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Grid {
    /// Bits of a code, 2..=8.
    pub bits: u8,
    /// Input channels which share a scale; 0, or the whole width, means one scale for each output channel.
    pub group_size: usize,
    /// What codes of 4 bits stand for: themselves, or a level each, which the code then is.
    pub levels: Levels,
}

impl Default for Grid {
    /// 4 bits, one scale for each output channel.
    fn default() -> Self {
        Self { bits: 4, group_size: 0, levels: Levels::Uniform }
    }
}

impl Grid {
    /// Whether codes are levels of unequal distances.
    pub(super) fn is_gaussian(&self) -> bool {
        self.levels == Levels::Gaussian && self.bits == 4
    }

    /// Highest code, `2^(b-1) - 1`, or the highest level.
    ///
    /// # Panics
    /// If `bits` is not in 2..=8.
    pub fn max_code(&self) -> f32 {
        assert!((2..=8).contains(&self.bits), "a grid of {} bits; 2 to 8 are possible", self.bits);
        if self.is_gaussian() { 127.0 } else { ((1i32 << (self.bits - 1)) - 1) as f32 }
    }

    /// Lowest code, `-2^(b-1)`.
    pub fn min_code(&self) -> f32 {
        -self.max_code() - 1.0
    }

    /// Input channels to a scale, for a layer of `inp` inputs.
    ///
    /// # Panics
    /// If the group size does not divide `inp`.
    pub fn group_len(&self, inp: usize) -> usize {
        let len = if self.group_size == 0 { inp } else { self.group_size };
        assert!(len > 0 && inp.is_multiple_of(len), "groups of {len} do not divide {inp} input channels");
        len
    }

    /// Scales to an output channel, for a layer of `inp` inputs.
    pub fn groups(&self, inp: usize) -> usize {
        inp / self.group_len(inp)
    }
}

/// The search for the clipping of weights. Defaults are those of QuaRot's `--w_clip`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClipSearch {
    /// Search at all; otherwise the scale covers the largest weight.
    pub enabled: bool,
    /// Steps from 1 down to 0.
    pub grid: usize,
    /// Share of these steps that is tried: with 0.8 of 100, factors 1.00, 0.99, ... 0.21.
    pub max_shrink: f32,
    /// Exponent of the error.
    pub norm: f32,
    /// Which error.
    pub objective: ClipObjective,
}

/// The error that a clip search minimizes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClipObjective {
    /// Of the weights: [`weight_scales`].
    #[default]
    Weight,
    /// Of the outputs on calibration tokens: [`output_scales`](super::output_scales).
    Output,
}

impl Default for ClipSearch {
    fn default() -> Self {
        Self { enabled: true, grid: 100, max_shrink: 0.8, norm: 2.4, objective: ClipObjective::Weight }
    }
}

/// Smallest maximum a row or group is taken to have, so that a scale's reciprocal is finite. (QuaRot clamps it at 1e-5, which makes zeros of what is smaller.)
const MIN_ABS_MAX: f32 = 1e-30;
const LANES: usize = 16;
/// Weights between two looks at whether a shrink factor has lost already.
const CHUNK: usize = 256 / LANES;

/// Scales of the weights `w: [out, inp]` as `[out, groups]`, always positive, in f32.
///
/// The weights must be finite.
///
/// # Panics
/// If `w` is not `out * inp` long, or the grid does not fit it.
pub fn weight_scales(w: &[f32], out: usize, inp: usize, grid: &Grid, clip: &ClipSearch) -> Vec<f32> {
    assert_eq!(w.len(), out * inp, "weights are [out, in]");
    let max_code = grid.max_code();
    if out == 0 || inp == 0 {
        return Vec::new();
    }
    w.par_chunks_exact(grid.group_len(inp))
        .map_init(Vec::new, |unit, group| {
            let abs_max = match group.iter().fold(0.0f32, |m, &v| m.max(v.abs())) {
                // Zeros have any scale, if there is a code of zero: one that leaves the layer's scales in f16.
                0.0 if !grid.is_gaussian() => max_code * f16::MIN_POSITIVE.to_f32(),
                abs_max => abs_max.max(MIN_ABS_MAX),
            };
            let shrink = match (clip.enabled, grid.is_gaussian()) {
                (false, _) => 1.0,
                (true, false) => best_shrink(group, abs_max, clip_error, max_code, clip, unit),
                (true, true) => best_shrink(group, abs_max, level_error, max_code, clip, unit),
            };
            abs_max * shrink / max_code
        })
        .collect()
}

/// The shrink factor of least error; of equal ones the largest. `unit` is a buffer to reuse.
fn best_shrink(
    w: &[f32],
    abs_max: f32,
    error_of: fn(&[[f32; LANES]], f32, f32, f32) -> f32,
    max_code: f32,
    clip: &ClipSearch,
    unit: &mut Vec<[f32; LANES]>,
) -> f32 {
    // In units of the maximum all errors are at most about 1, so no power can overflow. Padding has no error.
    unit.clear();
    unit.extend(w.chunks(LANES).map(|part| {
        let mut lanes = [0.0; LANES];
        lanes.iter_mut().zip(part).for_each(|(lane, &v)| *lane = v / abs_max);
        lanes
    }));
    let tries = (clip.max_shrink * clip.grid as f32) as usize;
    let (mut best, mut least) = (1.0, f64::INFINITY);
    for p in (0..tries.max(1)).map(|i| 1.0 - i as f32 / clip.grid.max(1) as f32) {
        if p <= 0.0 {
            break;
        }
        let mut error = 0.0;
        for chunk in unit.chunks(CHUNK) {
            error += f64::from(error_of(chunk, p / max_code, max_code, clip.norm));
            if error >= least {
                break;
            }
        }
        if error < least {
            (best, least) = (p, error);
        }
    }
    best
}

with_avx2! {
    /// `Σ |q(u) - u|^norm` under a scale.
    fn clip_error(u: &[[f32; LANES]], scale: f32, max_code: f32, norm: f32) -> f32 = clip_error_body
}

with_avx2! {
    /// The same, where codes are levels.
    fn level_error(u: &[[f32; LANES]], scale: f32, max_code: f32, norm: f32) -> f32 = level_error_body
}

#[inline(always)]
fn clip_error_body(u: &[[f32; LANES]], scale: f32, max_code: f32, norm: f32) -> f32 {
    error_sum(u, scale, max_code, norm, |code| code)
}

#[inline(always)]
fn level_error_body(u: &[[f32; LANES]], scale: f32, max_code: f32, norm: f32) -> f32 {
    error_sum(u, scale, max_code, norm, nearest_level)
}

#[inline(always)]
fn error_sum(u: &[[f32; LANES]], scale: f32, max_code: f32, norm: f32, nearest: impl Fn(f32) -> f32) -> f32 {
    let inverse = 1.0 / scale;
    let mut sums = [0.0f32; LANES];
    for lanes in u {
        for l in 0..LANES {
            let code = nearest(round_half_even(limit(lanes[l] * inverse, -max_code - 1.0, max_code)));
            sums[l] += power((lanes[l] - code * scale).abs(), norm);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            sums[l] += sums[l + width];
        }
        width /= 2;
    }
    sums[0]
}

/// `x^norm` for x in [0, 2], as `2^(norm · log2 x)`; relative error below 5e-5. The polynomials interpolate
/// `log2(1 + r) / r` on [√½ - 1, √2 - 1] and `2^f` on [-½, ½] at Chebyshev nodes.
#[inline(always)]
fn power(x: f32, norm: f32) -> f32 {
    // As integers: the exponent e for which the mantissa lies in [√½, √2). Wrapping, for a check of overflow would keep the
    // loop from being vectorized.
    let bits = (if x > 1e-12 { x } else { 1e-12 }).to_bits() as i32;
    let e = bits.wrapping_sub(0x3f35_04f3) >> 23;
    let r = f32::from_bits(bits.wrapping_sub(e << 23) as u32) - 1.0;
    let log = e as f32
        + r * (1.442_700_4
            + r * (-0.721_195_76
                + r * (0.479_925_57 + r * (-0.366_925_77 + r * (0.316_898_2 - r * 0.202_289_26)))));
    let y = limit(norm * log, -126.0, 126.0);
    // Adding MAGIC rounds, and leaves the integer in the low bits: a cast would have to saturate.
    let shifted = y + MAGIC;
    let f = y - (shifted - MAGIC);
    let n = shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as i32;
    let fraction = 1.0 + f * (0.693_121_1 + f * (0.240_223_5 + f * (0.055_921_976 + f * 0.009_666_368)));
    fraction * f32::from_bits((n.wrapping_add(127) << 23) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounding::testing::{gaussian, with_threads};

    /// `find_params` of QuaRot for the symmetric case, one row, in f64.
    fn naive_scale(w: &[f32], max_code: f64, clip: &ClipSearch) -> (f64, impl Fn(f64) -> f64) {
        let abs_max = w.iter().fold(0.0f64, |m, &v| m.max(f64::from(v).abs())).max(1e-5);
        let (w, norm) = (w.to_vec(), f64::from(clip.norm));
        let error = move |scale: f64| -> f64 {
            let q = |v: f64| (v / scale).round_ties_even().clamp(-max_code - 1.0, max_code) * scale;
            w.iter().map(|&v| (q(f64::from(v)) - f64::from(v)).abs().powf(norm)).sum()
        };
        let mut best = (f64::INFINITY, abs_max / max_code);
        for i in 0..(clip.max_shrink * clip.grid as f32) as usize {
            let scale = (1.0 - i as f64 / clip.grid as f64) * abs_max / max_code;
            if error(scale) < best.0 {
                best = (error(scale), scale);
            }
        }
        (best.1, error)
    }

    #[test]
    fn search_finds_what_the_reference_finds() {
        let clip = ClipSearch::default();
        for (bits, group_size) in [(4, 0), (3, 0), (8, 0), (4, 30), (2, 10)] {
            let grid = Grid { bits, group_size, ..Grid::default() };
            let (out, inp) = (8, 330);
            let mut w = gaussian(out * inp, 7);
            w[5] = 9.0; // an outlier worth clipping
            w.iter_mut().for_each(|v| *v *= 0.02);
            let scales = weight_scales(&w, out, inp, &grid, &clip);
            for (group, &got) in w.chunks(grid.group_len(inp)).zip(&scales) {
                let (want, error) = naive_scale(group, f64::from(grid.max_code()), &clip);
                // Another factor may be chosen only if it is as good to within the accuracy of the power.
                let equal = (f64::from(got) / want - 1.0).abs() < 1e-6;
                assert!(equal || error(f64::from(got)) < error(want) * 1.0002, "{grid:?}: {got} {want}");
            }
        }
    }

    #[test]
    fn search_clips_an_outlier_and_can_be_off() {
        let mut w = gaussian(4096, 8);
        w[0] = 20.0;
        let grid = Grid::default();
        let off = ClipSearch { enabled: false, ..Default::default() };
        assert_eq!(weight_scales(&w, 1, 4096, &grid, &off), [20.0 / 7.0]);
        assert!(weight_scales(&w, 1, 4096, &grid, &ClipSearch::default())[0] < 0.6 * 20.0 / 7.0);
    }

    #[test]
    fn power_is_accurate() {
        for norm in [1.0f32, 2.0, 2.4, 3.0] {
            for i in 0..100_000 {
                let x = 10f32.powf(-8.0 + 8.3 * i as f32 / 1e5);
                let want = f64::from(x).powf(f64::from(norm));
                let relative = f64::from(power(x, norm)) / want - 1.0;
                assert!(relative.abs() < 5e-5, "{x}^{norm}: {relative}");
            }
        }
        assert!(power(0.0, 2.4) < 1e-28);
    }

    #[test]
    fn both_versions_give_the_same_bits() {
        let u: Vec<[f32; LANES]> =
            gaussian(64 * LANES, 9).as_chunks().0.iter().map(|c| c.map(|v| v / 4.0)).collect();
        for p in [1.0, 0.7, 0.3] {
            let (fast, plain) = (clip_error(&u, p / 7.0, 7.0, 2.4), clip_error_body(&u, p / 7.0, 7.0, 2.4));
            assert_eq!(fast.to_bits(), plain.to_bits());
        }
    }

    #[test]
    fn same_scales_for_any_number_of_threads() {
        let w = gaussian(24 * 128, 10);
        let run = || {
            weight_scales(
                &w,
                24,
                128,
                &Grid { bits: 4, group_size: 32, ..Grid::default() },
                &ClipSearch::default(),
            )
        };
        assert_eq!(with_threads(1, run), with_threads(2, run));
    }

    #[test]
    fn zeros_have_a_scale_and_the_smallest_weights_their_levels() {
        for grid in [Grid::default(), Grid { levels: Levels::Gaussian, ..Grid::default() }] {
            let of = |w: &[f32]| weight_scales(w, 2, w.len() / 2, &grid, &ClipSearch::default());
            match grid.is_gaussian() {
                false => assert_eq!(of(&[0.0; 64]), [f16::MIN_POSITIVE.to_f32(); 2]),
                // No level is zero.
                true => assert!(of(&[0.0; 64]).iter().all(|s| s.is_normal() && 127.0 * s <= 1e-30)),
            }
            let w = gaussian(2 * 96, 3);
            let (large, size) = (of(&w), 2f32.powi(-80));
            assert_eq!(
                of(&w.iter().map(|v| v * size).collect::<Vec<_>>()),
                Vec::from_iter(large.iter().map(|s| s * size))
            );
            assert!(of(&[1e-44; 64]).iter().all(|s| s.is_normal() && s.recip().is_finite()));
        }
    }

    #[test]
    fn grids_and_their_settings() {
        assert_eq!((Grid::default().min_code(), Grid::default().max_code()), (-8.0, 7.0));
        assert_eq!(
            (Grid { bits: 4, group_size: 8, ..Grid::default() }.groups(32), Grid::default().groups(32)),
            (4, 1)
        );
        assert_eq!(
            toml::from_str::<Grid>("bits = 3").unwrap(),
            Grid { bits: 3, group_size: 0, ..Grid::default() }
        );
        assert!(toml::from_str::<ClipSearch>("enable = true").is_err());
        assert_eq!(toml::from_str::<ClipSearch>("").unwrap(), ClipSearch::default());
    }
}
