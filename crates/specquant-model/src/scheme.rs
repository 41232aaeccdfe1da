//! How many bits weights, activations and the KV cache get: `W4A4KV4`, `W4A16`, `W8A8KV8`, `W3A8` ...

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use specquant_kernels::KvFormat;

use crate::Error;

/// What the codes of 4-bit weights, activations and KV caches stand for. Other widths are uniform.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Levels {
    /// Evenly spaced numbers, as in nearly all of the literature: −8 … 7 for weights, 0 … 15 less a zero point for activations.
    #[default]
    Uniform,
    /// 16 numbers of up to 8 bits, nearer to each other around zero, which represent a Gaussian with the least error
    /// ([`specquant_kernels::GAUSSIAN_LEVELS`]); weights and activations that are rotated are nearly that. CPUs multiply bytes in any case.
    Gaussian,
}

/// Bit widths and granularity of a quantized model. 16 means "not quantized".
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheme {
    /// Bits of a weight code: 2 to 8, symmetric per output channel or per group; 16 leaves the linears dense.
    pub weight_bits: u8,
    /// Bits of an activation code: 2 to 8, per token, asymmetric where levels are uniform; 16 keeps activations in floating point.
    pub act_bits: u8,
    /// Bits of a KV cache code: 2 to 8, per token and head, asymmetric where levels are uniform, K after RoPE; 16 stores f16.
    pub kv_bits: u8,
    /// What 4-bit codes of weights, activations and the KV cache stand for.
    #[serde(default, skip_serializing_if = "is_uniform")]
    pub levels: Levels,
    /// Inputs that share a weight scale; 0 is a scale per output channel.
    #[serde(default)]
    pub group_size: usize,
    /// Clip ratio on an activation row's minimum and maximum (SpinQuant: 1.0).
    #[serde(default = "one")]
    pub act_clip: f32,
    /// Clip ratio on a cached row's minimum and maximum. By default 0.95 up to 4 bits (QuaRot, section 5) and 1 above, where
    /// clipping loses more than the finer step gains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_clip: Option<f32>,
    /// Tokens at the beginning of a sequence whose keys and values stay in f32 where others are quantized.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub kv_intact: usize,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// Tokens that may be left intact.
const MAX_INTACT: usize = 1024;

fn is_uniform(levels: &Levels) -> bool {
    *levels == Levels::Uniform
}

fn one() -> f32 {
    1.0
}

impl Default for Scheme {
    /// `W4A4KV4`, the paper's headline setting.
    fn default() -> Self {
        Scheme {
            weight_bits: 4,
            act_bits: 4,
            kv_bits: 4,
            levels: Levels::Uniform,
            group_size: 0,
            act_clip: one(),
            kv_clip: None,
            kv_intact: 0,
        }
    }
}

impl Scheme {
    /// Checks every width and ratio.
    ///
    /// # Errors
    /// [`Error::Scheme`] names the first value out of range.
    pub fn validate(&self) -> Result<(), Error> {
        for (what, bits) in [("W", self.weight_bits), ("A", self.act_bits), ("KV", self.kv_bits)] {
            if !(2..=8).contains(&bits) && bits != 16 {
                return Err(Error::Scheme(format!(
                    "{what}{bits}: a width is 2 to 8 bits, or 16 for unquantized"
                )));
            }
        }
        if self.weight_bits == 16 && self.act_bits != 16 {
            return Err(Error::Scheme(format!(
                "W16A{}: the integer product needs integer weights; quantize them too, or leave activations at 16 bits",
                self.act_bits
            )));
        }
        if self.kv_intact > MAX_INTACT {
            return Err(Error::Scheme(format!(
                "kv_intact = {}: that many tokens are no few any more; {MAX_INTACT} at most, or KV16 for all",
                self.kv_intact
            )));
        }
        for (what, clip) in [("act_clip", self.act_clip), ("kv_clip", self.kv_clip())] {
            if !(clip > 0.0 && clip <= 1.0) {
                return Err(Error::Scheme(format!("{what} = {clip}: a clip ratio lies in (0, 1]")));
            }
        }
        Ok(())
    }

    /// Group size of a linear with `inp` inputs: `inp` itself for per-channel scales.
    pub fn group(&self, inp: usize) -> usize {
        if self.group_size == 0 { inp } else { self.group_size }
    }

    /// What codes of `bits` stand for.
    pub fn levels(&self, bits: u8) -> Levels {
        if bits == 4 { self.levels } else { Levels::Uniform }
    }

    /// Clip ratio of the KV cache, given or by its bits.
    pub fn kv_clip(&self) -> f32 {
        self.kv_clip.unwrap_or(if self.kv_bits <= 4 { 0.95 } else { 1.0 })
    }

    /// Storage of the KV cache.
    pub fn kv_format(&self) -> KvFormat {
        let intact = self.kv_intact;
        match self.kv_bits {
            16 => KvFormat::F16,
            bits if self.levels(bits) == Levels::Gaussian => KvFormat::Gaussian { intact },
            bits => KvFormat::Int { bits, clip: self.kv_clip(), intact },
        }
    }

    /// The widths of `text` (`W4A8KV4`, `w4a16`) with the granularity and clips of `self`. A missing part is 16.
    ///
    /// # Errors
    /// [`Error::Scheme`] when `text` has another form or a width is out of range.
    pub fn with_widths(&self, text: &str) -> Result<Scheme, Error> {
        let bad = || {
            Error::Scheme(format!(
                "\"{text}\" is not a scheme: write W<bits>A<bits>KV<bits>, such as W4A4KV4, W4A16 or W8A8KV8"
            ))
        };
        let upper = text.to_ascii_uppercase();
        let rest = upper.strip_prefix('W').ok_or_else(bad)?;
        let (weight, rest) = split_number(rest).ok_or_else(bad)?;
        let mut scheme = Scheme { weight_bits: weight, act_bits: 16, kv_bits: 16, ..*self };
        let mut rest = rest;
        if let Some(tail) = rest.strip_prefix('A') {
            (scheme.act_bits, rest) = split_number(tail).ok_or_else(bad)?;
        }
        if let Some(tail) = rest.strip_prefix("KV") {
            (scheme.kv_bits, rest) = split_number(tail).ok_or_else(bad)?;
        }
        if !rest.is_empty() {
            return Err(bad());
        }
        scheme.validate()?;
        Ok(scheme)
    }
}

fn split_number(text: &str) -> Option<(u8, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..end].parse().ok()?, &text[end..]))
}

impl FromStr for Scheme {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Scheme::default().with_widths(text)
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "W{}A{}KV{}", self.weight_bits, self.act_bits, self.kv_bits)?;
        if self.group_size > 0 { write!(f, "-g{}", self.group_size) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_are_read_as_written() {
        for (text, want) in [
            ("W4A4KV4", (4, 4, 4)),
            ("w4a16", (4, 16, 16)),
            ("W8A8KV8", (8, 8, 8)),
            ("W3A8", (3, 8, 16)),
            ("W16A16KV4", (16, 16, 4)),
        ] {
            let s: Scheme = text.parse().unwrap();
            assert_eq!((s.weight_bits, s.act_bits, s.kv_bits), want, "{text}");
        }
        for text in
            ["", "4A4", "W", "W4A", "W4A4KV", "W4B4", "W1A4", "W9", "W4A4KV4x", "W4A12", "W256A4", "W16A4"]
        {
            assert!(text.parse::<Scheme>().is_err(), "{text:?} was taken for a scheme");
        }
    }

    #[test]
    fn widths_are_replaced_and_the_rest_is_kept() {
        let base = Scheme { group_size: 64, act_clip: 0.9, ..Scheme::default() };
        let s = base.with_widths("W8A8").unwrap();
        assert_eq!(s, Scheme { weight_bits: 8, act_bits: 8, kv_bits: 16, ..base });
        assert_eq!(s.to_string(), "W8A8KV16-g64");
    }
}
