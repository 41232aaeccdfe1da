//! The key/value cache of one sequence and one layer, in floats or in 2 to 8 bits.
//!
//! Low-bit caches are quantized per token and head, asymmetrically, with the head as the group (QuaRot's
//! `quant_utils.py`, `ActQuantizer` over `head_dim`; arXiv 2511.11663, setting 4-4-4):
//!
//! ```text
//! lo = clip · min(x, 0),  hi = clip · max(x, 0),  scale = f16((hi − lo) / (2^bits − 1)),  zero = round(−lo / scale)
//! q = clamp(round_half_even(x / scale) + zero, 0, 2^bits − 1),   x ≈ scale · (q − zero)
//! ```
//!
//! The first few tokens can be left intact: attention falls back on them when nothing else matters ("sinks", arXiv 2309.17453), so that every query
//! suffers from the rounding of their keys (IntactKV, arXiv 2403.01241).
//!
//! Every head's tokens lie one after another, so that attention streams through one head at a time. Codes of up to 4 bits
//! share a byte: the low nibble holds element i of the head's first half (rounded up), the high one element i of the second.

mod gaussian;
mod uniform;

use crate::Buffer;
use crate::for_each_chunk;
use crate::ops::{LANES, widen_f16};
use crate::weights::GAUSSIAN_LEVELS;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// How a cache stores keys and values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KvFormat {
    /// As computed.
    F32,
    /// Rounded to half precision.
    F16,
    /// Asymmetric integers per token and head.
    Int {
        /// Bits of a code, 2 to 8; up to 4 are stored in a nibble, more in a byte.
        bits: u8,
        /// Multiplies the range before quantization; 1 keeps it, QuaRot takes 0.95.
        clip: f32,
        /// Tokens at the beginning that stay as computed.
        intact: usize,
    },
    /// 4 bits, per token and head, that stand for 16 levels which suit a Gaussian: what a rotated head less its mean nearly is.
    Gaussian {
        /// Tokens at the beginning that stay as computed.
        intact: usize,
    },
}

impl KvFormat {
    /// Bytes of the codes of one token of one head.
    fn code_bytes(self, head_dim: usize) -> usize {
        match self {
            KvFormat::F32 => 4 * head_dim,
            KvFormat::F16 => 2 * head_dim,
            KvFormat::Int { bits: ..=4, .. } | KvFormat::Gaussian { .. } => head_dim.div_ceil(2),
            KvFormat::Int { .. } => head_dim,
        }
    }

    /// Tokens at the beginning that stay as computed, though others do not.
    fn intact(self) -> usize {
        match self {
            KvFormat::F32 | KvFormat::F16 => 0,
            KvFormat::Int { intact, .. } | KvFormat::Gaussian { intact } => intact,
        }
    }
}

/// Keys or values of one head.
#[derive(Debug, Clone)]
struct Head {
    plane: Plane,
    /// The first tokens as computed; `plane` has them too, so that tokens are counted alike.
    intact: Vec<f32>,
}

/// Tokens of one head in codes of 4 bits or fewer, two a byte: scale · (level of the code − zero).
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // only x86 has kernels that multiply them where they lie
pub(crate) struct Codes<'a> {
    /// `[tokens, head_dim / 2]`.
    pub codes: &'a [u8],
    pub scale: &'a [f16],
    /// Nothing where it is 0 everywhere.
    pub zero: &'a [u8],
    pub levels: [i8; 16],
}

/// The tokens of one head in a format.
#[derive(Debug, Clone)]
enum Plane {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Int { codes: Vec<u8>, scale: Vec<f16>, zero: Vec<u8> },
    Gaussian { codes: Vec<u8>, scale: Vec<f16> },
}

/// Keys (after the rotary embedding) and values of one sequence in one layer.
#[derive(Debug, Clone)]
pub struct KvCache {
    format: KvFormat,
    head_dim: usize,
    len: usize,
    /// Keys of every head, then values of every head.
    heads: Vec<Head>,
    any_order: bool,
}

/// Which half of the cache to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvSide {
    /// Keys, after the rotary embedding.
    Keys,
    /// Values.
    Values,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Panics
    /// If `head_dim` is 0, bits are not 2 to 8, or the clip is not in (0, 1].
    pub fn new(format: KvFormat, kv_heads: usize, head_dim: usize) -> Self {
        assert!(head_dim > 0, "a KV cache needs a head_dim above 0");
        let plane = match format {
            KvFormat::F32 => Plane::F32(Vec::new()),
            KvFormat::F16 => Plane::F16(Vec::new()),
            KvFormat::Int { bits, clip, .. } => {
                assert!(
                    (2..=8).contains(&bits),
                    "{bits} bits for a KV cache are not supported: choose 2 to 8"
                );
                assert!(clip > 0.0 && clip <= 1.0, "KV clip {clip} is not in (0, 1]");
                Plane::Int { codes: Vec::new(), scale: Vec::new(), zero: Vec::new() }
            }
            KvFormat::Gaussian { .. } => Plane::Gaussian { codes: Vec::new(), scale: Vec::new() },
        };
        let heads = vec![Head { plane, intact: Vec::new() }; 2 * kv_heads];
        Self { format, head_dim, len: 0, heads, any_order: false }
    }

    /// Whether [`attention`](crate::attention) of many queries to codes of up to 4 bits may add up in the order, and with factors of 16 bits, that suit
    /// the instruction set: AMX multiplies tiles of bfloat16 then, AVX-512 VNNI pairs of i16. If not, as at first, its results are the same on all instruction sets. For what writes text, not for
    /// what quantizes or measures a model, whose states must not depend on the machine.
    pub fn with_any_order(self, any_order: bool) -> Self {
        KvCache { any_order, ..self }
    }

    /// Whether sums may have any order.
    pub(crate) fn any_order(&self) -> bool {
        self.any_order
    }

    /// Appends the keys and values of some tokens: k, v: [t, kv_heads · head_dim] each.
    ///
    /// What a token is stored as does not depend on the tokens that it comes with. A head of a token that holds a number that is
    /// not finite reads back as NaN, so that it cannot pass unseen.
    ///
    /// # Panics
    /// If k or v is not whole tokens, or they differ in length.
    pub fn append(&mut self, k: &[f32], v: &[f32]) {
        let (heads, head_dim, format) = (self.kv_heads(), self.head_dim, self.format);
        let width = heads * head_dim;
        assert_eq!(k.len(), v.len(), "KV cache: keys and values differ in length");
        if k.is_empty() {
            return;
        }
        assert!(
            width > 0 && k.len().is_multiple_of(width),
            "KV cache: {} is not whole tokens of {width}",
            k.len()
        );
        let at_once = if k.len() < 1 << 14 { 2 * heads } else { 1 };
        for_each_chunk(&mut self.heads, at_once, |first, part| {
            for (to, i) in part.iter_mut().zip(first * at_once..) {
                to.append(format, [k, v][i / heads], width, i % heads, head_dim);
            }
        });
        self.len += k.len() / width;
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the cache holds no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all but the first `len` tokens; nothing happens if there are no more than that.
    pub fn truncate(&mut self, len: usize) {
        let code_bytes = self.format.code_bytes(self.head_dim);
        for head in &mut self.heads {
            head.intact.truncate(len * self.head_dim);
            match &mut head.plane {
                Plane::F32(x) => x.truncate(len * self.head_dim),
                Plane::F16(x) => x.truncate(len * self.head_dim),
                Plane::Int { codes, scale, zero } => {
                    codes.truncate(len * code_bytes);
                    scale.truncate(len);
                    zero.truncate(len);
                }
                Plane::Gaussian { codes, scale } => {
                    codes.truncate(len * code_bytes);
                    scale.truncate(len);
                }
            }
        }
        self.len = self.len.min(len);
    }

    /// Bytes of the tokens in the cache: codes, scales and zeros, and what is left intact.
    pub fn bytes(&self) -> usize {
        let side = match self.format {
            KvFormat::F32 | KvFormat::F16 => 0,
            KvFormat::Int { .. } => 3,
            KvFormat::Gaussian { .. } => 2,
        };
        let coded = self.len * (self.format.code_bytes(self.head_dim) + side);
        self.heads.len() * (coded + 4 * self.format.intact().min(self.len) * self.head_dim)
    }

    /// Those of some tokens of one head that lie in codes of 4 bits or fewer, the last ones: the first may be left intact. Nothing where they lie otherwise.
    pub(crate) fn codes(&self, side: KvSide, head: usize, tokens: Range<usize>) -> Option<Codes<'_>> {
        let Head { plane, intact } = self.head(side, head);
        let tokens = tokens.start.max((intact.len() / self.head_dim).min(tokens.end))..tokens.end;
        let bytes = self.format.code_bytes(self.head_dim);
        let places = tokens.start * bytes..tokens.end * bytes;
        match plane {
            Plane::Gaussian { codes, scale } => {
                let (codes, scale) = (&codes[places], &scale[tokens]);
                Some(Codes { codes, scale, zero: &[], levels: GAUSSIAN_LEVELS })
            }
            Plane::Int { codes, scale, zero } if matches!(self.format, KvFormat::Int { bits: ..=4, .. }) => {
                let (codes, scale, zero) = (&codes[places], &scale[tokens.clone()], &zero[tokens]);
                Some(Codes { codes, scale, zero, levels: std::array::from_fn(|i| i as i8) })
            }
            _ => None,
        }
    }

    fn head(&self, side: KvSide, head: usize) -> &Head {
        let heads = self.kv_heads();
        assert!(head < heads, "KV cache: there is no head {head}");
        &self.heads[if side == KvSide::Keys { head } else { heads + head }]
    }

    /// Heads of keys and values.
    pub fn kv_heads(&self) -> usize {
        self.heads.len() / 2
    }

    /// Elements of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// How keys and values are stored.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Some tokens of one head as f32, [tokens, head_dim]: borrowed if they lie in f32, else dequantized into `buf`, which has room for them.
    ///
    /// # Panics
    /// If there is no such head or token, or too little room.
    pub fn tile<'a>(
        &'a self,
        side: KvSide,
        head: usize,
        tokens: Range<usize>,
        buf: &'a mut [f32],
    ) -> &'a [f32] {
        let Head { plane, intact } = self.head(side, head);
        let elements = tokens.start * self.head_dim..tokens.end * self.head_dim;
        if let Some(intact) = intact.get(elements.clone()) {
            return intact;
        }
        let buf = &mut buf[..elements.len()];
        match plane {
            Plane::F32(x) => return &x[elements],
            Plane::F16(x) => widen_f16(&x[elements], buf),
            Plane::Int { codes, scale, zero } => {
                let bytes = self.format.code_bytes(self.head_dim);
                let codes = &codes[tokens.start * bytes..tokens.end * bytes];
                let packed = matches!(self.format, KvFormat::Int { bits: ..=4, .. });
                uniform::dequantize(
                    codes,
                    packed,
                    &scale[tokens.clone()],
                    &zero[tokens.clone()],
                    self.head_dim,
                    buf,
                );
            }
            Plane::Gaussian { codes, scale } => {
                let bytes = self.format.code_bytes(self.head_dim);
                let codes = &codes[tokens.start * bytes..tokens.end * bytes];
                gaussian::dequantize(codes, &scale[tokens.clone()], self.head_dim, buf);
            }
        }
        if let Some(intact) = intact.get(tokens.start * self.head_dim..) {
            let n = intact.len().min(buf.len());
            buf[..n].copy_from_slice(&intact[..n]);
        }
        buf
    }
}

impl Head {
    /// As [`Plane::append`].
    fn append(&mut self, format: KvFormat, x: &[f32], width: usize, head: usize, head_dim: usize) {
        let missing = format.intact() - self.intact.len() / head_dim;
        let first = x.chunks_exact(width).take(missing);
        first.for_each(|token| self.intact.extend_from_slice(&token[head * head_dim..][..head_dim]));
        self.plane.append(format, x, width, head, head_dim);
    }
}

impl Plane {
    /// Appends one head of every token of x, whose tokens are `width` apart.
    fn append(&mut self, format: KvFormat, x: &[f32], width: usize, head: usize, head_dim: usize) {
        let rows = || x.chunks_exact(width).map(|token| &token[head * head_dim..][..head_dim]);
        match self {
            Plane::F32(all) => {
                all.reserve(x.len() / width * head_dim);
                rows().for_each(|row| all.extend_from_slice(row));
            }
            Plane::F16(all) => {
                let mut at = all.len();
                all.resize(at + x.len() / width * head_dim, f16::ZERO);
                for row in rows() {
                    all[at..at + head_dim].convert_from_f32_slice(row);
                    at += head_dim;
                }
            }
            Plane::Int { codes, scale, zero } => {
                let KvFormat::Int { bits, clip, .. } = format else { return };
                let (bytes, at, old) = (format.code_bytes(head_dim), codes.len(), scale.len());
                let t = x.len() / width;
                codes.resize(at + t * bytes, 0);
                zero.resize(old + t, 0);
                let mut scales = Buffer::zeros(t);
                uniform::quantize(
                    x,
                    width,
                    head * head_dim,
                    head_dim,
                    bits,
                    clip,
                    &mut codes[at..],
                    &mut scales,
                    &mut zero[old..],
                );
                scale.extend(scales.iter().copied().map(f16::from_f32));
            }
            Plane::Gaussian { codes, scale } => {
                let (bytes, at) = (format.code_bytes(head_dim), codes.len());
                codes.resize(at + x.len() / width * bytes, 0);
                let rows = rows().zip(codes[at..].chunks_exact_mut(bytes));
                scale.extend(rows.map(|(row, codes)| gaussian::quantize(row, codes)));
            }
        }
    }
}

/// Lowest and highest number of a row, at most and at least 0; NaN if any number is not finite.
#[inline(always)]
fn range(x: &[f32]) -> (f32, f32) {
    let (mut lo, mut hi, mut bad) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    let (whole, tail) = x.as_chunks::<LANES>();
    for x in whole {
        for l in 0..LANES {
            lo[l] = if x[l] < lo[l] { x[l] } else { lo[l] };
            hi[l] = if x[l] > hi[l] { x[l] } else { hi[l] };
            // 0 for every finite number, NaN for the others.
            bad[l] += x[l] * 0.0;
        }
    }
    for (l, &v) in tail.iter().enumerate() {
        lo[l] = lo[l].min(v);
        hi[l] = hi[l].max(v);
        bad[l] += v * 0.0;
    }
    // Halves: one lane after the other they would wait for each other.
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lo[l] = if lo[l + width] < lo[l] { lo[l + width] } else { lo[l] };
            hi[l] = if hi[l + width] > hi[l] { hi[l + width] } else { hi[l] };
            bad[l] += bad[l + width];
        }
        width /= 2;
    }
    (lo[0] + bad[0], hi[0] + bad[0])
}

#[cfg(test)]
mod tests;
