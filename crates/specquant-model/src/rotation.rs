//! Orthonormal transforms that run on activations because they could not be folded into weights (QuaRot, arXiv 2404.00456).

use serde::{Deserialize, Serialize};
use specquant_kernels::{
    ActFormat, ActQuantizer, Buffer, Dct, Hadamard, Kronecker, QuantizedActs, Reflections, for_each_chunk,
    for_each_chunk_pair, quantize_tokens,
};

use crate::ModelConfig;

/// Values that go through all steps of an input's transform together, but 16 rows at least: 256 KiB, which stay in a core's L2, as 16 rows of 11008 do.
const BLOCK_VALUES: usize = 1 << 16;
/// Values that one thread quantizes at least, where there is one such block.
const TASK_VALUES: usize = 1 << 14;

/// Kind of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RotationKind {
    /// Walsh-Hadamard, see [`specquant_kernels::Hadamard`]; some widths have one in blocks only.
    Hadamard,
    /// The cosine transform, see [`specquant_kernels::Dct`], which every width has.
    Dct,
}

/// Where a model rotates activations at run time. The weights that read them are rotated likewise, so that nothing changes but the
/// rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OnlineRotations {
    /// The input of `down_proj`, over its whole width.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub down: Option<RotationKind>,
    /// The input of `o_proj`, across its heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<RotationKind>,
    /// Every head of q and k, after RoPE: only the KV cache's rounding sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk: Option<RotationKind>,
}

/// The transforms of [`OnlineRotations`] for one model.
#[derive(Debug, Clone, Default)]
pub struct Rotations {
    /// Of `down_proj`'s input, `[intermediate]`.
    pub down: Option<Rotation>,
    /// Of `o_proj`'s input, `[heads]`, for every position within a head.
    pub heads: Option<Hadamard>,
    /// Of each head of q and k, `[head_dim]`.
    pub qk: Option<Rotation>,
    /// Of the same, where it was learned.
    pub keys: Option<KeyTransform>,
}

/// An invertible transform P of each head of k after RoPE, and what undoes it in the product with q: q P⁻ᵀ.
#[derive(Debug, Clone)]
pub struct KeyTransform {
    keys: Kronecker,
    queries: Kronecker,
}

impl KeyTransform {
    /// P: `[head_dim, head_dim]`; nothing if it is singular.
    ///
    /// # Panics
    /// If it is not square.
    pub fn new(matrix: Vec<f32>, head_dim: usize) -> Option<Self> {
        let keys = Kronecker::new(head_dim, Vec::new(), matrix);
        keys.inverse_transposed().map(|queries| KeyTransform { keys, queries })
    }

    /// P, `[head_dim, head_dim]`.
    pub fn matrix(&self) -> &[f32] {
        self.keys.right()
    }

    /// q: `[rows, heads * head_dim]`; k: `[rows, kv_heads * head_dim]`.
    pub(crate) fn apply(&self, q: &mut [f32], k: &mut [f32]) {
        for (transform, x) in [(&self.queries, q), (&self.keys, k)] {
            let heads = x.len() / transform.width();
            transform.apply(x, heads);
        }
    }
}

impl Rotations {
    /// Of a model's widths.
    pub fn new(online: &OnlineRotations, config: &ModelConfig) -> Self {
        let plan = |kind: Option<RotationKind>, n| kind.map(|kind| Rotation::new(kind, n));
        Rotations {
            down: plan(online.down, config.intermediate_size),
            // Mixing whole heads is done by Hadamard matrices alone.
            heads: online.heads.map(|_| Hadamard::new(config.num_heads)),
            qk: plan(online.qk, config.head_dim),
            keys: None,
        }
    }
}

/// What an [`InputTransform`] does to all coordinates first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InputRotation {
    /// See [`RotationKind::Hadamard`].
    Hadamard,
    /// See [`RotationKind::Dct`].
    Dct,
    /// Nothing is kept, and every input has a learned matrix of its own, see [`Kronecker`].
    Kronecker,
}

impl From<RotationKind> for InputRotation {
    fn from(kind: RotationKind) -> Self {
        match kind {
            RotationKind::Hadamard => InputRotation::Hadamard,
            RotationKind::Dct => InputRotation::Dct,
        }
    }
}

/// What the input of some layers goes through in front of them: a rotation, which spreads outliers over all coordinates, and then a change of
/// coordinates whose first few carry most of the energy and are quantized to more bits than the others; or a learned matrix in place of both. The weights went
/// through the same, or through the matrix's inverse transpose, so that nothing changes but the rounding.
///
/// Without it those few directions would set the range, and so the step, of all others (ResQ, arXiv 2412.14363, which folds such a change of
/// coordinates into the residual stream; here every input has its own, fitted behind its norm).
///
/// The rotation comes first because it then has the model's width, for which there is a fast one, and not that of what is not kept.
#[derive(Debug, Clone)]
pub struct InputTransform {
    /// What comes first.
    mix: Mix,
    /// x becomes x H: r reflections for r coordinates to keep.
    reflections: Reflections,
    /// What the kept coordinates are divided by, `[r]`.
    norms: Vec<f32>,
}

/// What happens to all coordinates.
#[derive(Debug, Clone)]
enum Mix {
    /// The same in inputs and weights.
    Rotation(Rotation),
    /// K, and K⁻ᵀ for the weights.
    Kronecker(Box<[Kronecker; 2]>),
}

impl Mix {
    /// x: `[rows, n]` of inputs, in place.
    fn apply(&self, x: &mut [f32], rows: usize) {
        match self {
            Mix::Rotation(rotation) => rotation.apply(x, rows),
            Mix::Kronecker(pair) => pair[0].apply(x, rows),
        }
    }

    /// w: `[rows, n]` of weights, in place.
    fn apply_to_weight(&self, w: &mut [f32], rows: usize) {
        match self {
            Mix::Rotation(rotation) => rotation.apply(w, rows),
            Mix::Kronecker(pair) => pair[1].apply(w, rows),
        }
    }

    /// Undoes [`Mix::apply`].
    fn undo(&self, x: &mut [f32], rows: usize) {
        match self {
            Mix::Rotation(rotation) => rotation.apply_transposed(x, rows),
            Mix::Kronecker(pair) => pair[1].transposed().apply(x, rows),
        }
    }

    /// Undoes [`Mix::apply_to_weight`].
    fn undo_weight(&self, w: &mut [f32], rows: usize) {
        match self {
            Mix::Rotation(rotation) => rotation.apply_transposed(w, rows),
            Mix::Kronecker(pair) => pair[0].transposed().apply(w, rows),
        }
    }
}

/// A rotation of some width.
#[derive(Debug, Clone)]
pub enum Rotation {
    /// See [`RotationKind::Hadamard`].
    Hadamard(Hadamard),
    /// See [`RotationKind::Dct`].
    Dct(Dct),
}

impl Rotation {
    /// Of vectors of `n` values, n > 0.
    pub fn new(kind: RotationKind, n: usize) -> Self {
        match kind {
            RotationKind::Hadamard => Rotation::Hadamard(Hadamard::new(n)),
            RotationKind::Dct => Rotation::Dct(Dct::new(n)),
        }
    }

    /// x ↦ x Q for every row, in place. x: `[rows, n]`.
    pub fn apply(&self, x: &mut [f32], rows: usize) {
        match self {
            Rotation::Hadamard(hadamard) => hadamard.apply(x, rows),
            Rotation::Dct(dct) => dct.apply(x, rows),
        }
    }

    /// x ↦ x Qᵀ for every row, in place: undoes [`Rotation::apply`]. x: `[rows, n]`.
    pub fn apply_transposed(&self, x: &mut [f32], rows: usize) {
        match self {
            Rotation::Hadamard(hadamard) => hadamard.apply_transposed(x, rows),
            Rotation::Dct(dct) => dct.apply_transposed(x, rows),
        }
    }
}

/// A transformed input in its two parts.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitInput {
    /// The coordinates that are kept at more bits, `[rows, r]`.
    pub kept: Buffer<f32>,
    /// The others, `[rows, n - r]`.
    pub rest: Buffer<f32>,
}

impl InputTransform {
    /// A rotation, then the reflections, whose first coordinates are kept. norms: what the kept ones are divided by, `[r]`, positive. Where there is no Hadamard
    /// matrix of this width, which would mix in blocks only, it is the cosine transform. (So another order that is constructed changes the format.)
    ///
    /// # Panics
    /// If there is not one norm for every reflection.
    pub fn new(reflections: Reflections, norms: Vec<f32>, rotation: RotationKind) -> Self {
        assert_eq!(norms.len(), reflections.len(), "a norm for every kept coordinate");
        let n = reflections.width();
        let rotation = match Rotation::new(rotation, n) {
            Rotation::Hadamard(h) if h.block() < n => Rotation::new(RotationKind::Dct, n),
            rotation => rotation,
        };
        let mix = Mix::Rotation(rotation);
        InputTransform { mix, reflections, norms }
    }

    /// x ↦ x K, which keeps nothing; or nothing if K is singular.
    pub fn kronecker(kronecker: Kronecker) -> Option<Self> {
        let inverse = kronecker.inverse_transposed()?;
        let reflections = Reflections::new(kronecker.width(), Vec::new());
        let mix = Mix::Kronecker(Box::new([kronecker, inverse]));
        Some(InputTransform { mix, reflections, norms: Vec::new() })
    }

    /// K of a transform that is one.
    pub fn as_kronecker(&self) -> Option<&Kronecker> {
        match &self.mix {
            Mix::Kronecker(pair) => Some(&pair[0]),
            Mix::Rotation(_) => None,
        }
    }

    /// Bits on disk, see [`transform_tensors`](crate::transform_tensors).
    pub fn stored_bits(&self) -> usize {
        let matrices = self.as_kronecker().map_or(0, |k| 16 * (k.left().len() + k.right().len()));
        (8 * self.width() + 32) * self.kept() + matrices
    }

    /// Number r of kept coordinates.
    pub fn kept(&self) -> usize {
        self.reflections.len()
    }

    /// Width n of the input.
    pub fn width(&self) -> usize {
        self.reflections.width()
    }

    /// The change of coordinates that comes last.
    pub fn reflections(&self) -> &Reflections {
        &self.reflections
    }

    /// What the kept coordinates of an input are divided by, `[r]`, so that one step fits them all.
    pub fn norms(&self) -> &[f32] {
        &self.norms
    }

    /// Inputs x `[rows, n]`.
    ///
    /// # Panics
    /// If x is not `[rows, n]`.
    pub fn apply(&self, x: &[f32], rows: usize) -> SplitInput {
        self.split(x, rows, Mix::apply, |kept, norm| kept / norm)
    }

    /// Rows of a weight W `[out, n]` that reads such inputs.
    ///
    /// # Panics
    /// If w is not `[out, n]`.
    pub fn apply_to_weight(&self, w: &[f32], out: usize) -> SplitInput {
        self.split(w, out, Mix::apply_to_weight, |kept, norm| kept * norm)
    }

    /// Undoes [`InputTransform::apply`]: `[rows, n]`.
    ///
    /// # Panics
    /// If the parts are not `[rows, r]` and `[rows, n - r]`.
    pub fn undo(&self, split: SplitInput, rows: usize) -> Buffer<f32> {
        let mut x = self.join(split, rows, |kept, norm| kept * norm);
        self.mix.undo(&mut x, rows);
        x
    }

    /// Undoes [`InputTransform::apply_to_weight`]: `[out, n]`.
    ///
    /// # Panics
    /// If the parts are not `[out, r]` and `[out, n - r]`.
    pub fn undo_weight(&self, split: SplitInput, out: usize) -> Buffer<f32> {
        let mut w = self.join(split, out, |kept, norm| kept / norm);
        self.mix.undo_weight(&mut w, out);
        w
    }

    fn join(
        &self,
        SplitInput { kept, rest }: SplitInput,
        rows: usize,
        scaled: fn(f32, f32) -> f32,
    ) -> Buffer<f32> {
        let (n, r) = (self.width(), self.kept());
        assert!(
            kept.len() == rows * r && rest.len() == rows * (n - r),
            "input transform: the parts are not [{rows}, {r}] and [{rows}, {}]",
            n - r
        );
        if r == 0 {
            return rest;
        }
        let mut x = Buffer::new(rows * n);
        let some = (BLOCK_VALUES / n).max(1);
        for_each_chunk(&mut x, some * n, |i, x| {
            let parts =
                kept[i * some * r..].chunks_exact(r).zip(rest[i * some * (n - r)..].chunks_exact(n - r));
            for (x, (kept, rest)) in x.chunks_exact_mut(n).zip(parts) {
                let each = x.iter_mut().zip(kept).zip(&self.norms);
                each.for_each(|((x, kept), norm)| *x = scaled(*kept, *norm));
                x[r..].copy_from_slice(rest);
            }
        });
        self.reflections.apply_transposed(&mut x, rows);
        x
    }

    /// x: `[rows, n]`, rows of inputs or of a weight; `scaled` is what norms do to them.
    fn split(
        &self,
        x: &[f32],
        rows: usize,
        mix: fn(&Mix, &mut [f32], usize),
        scaled: fn(f32, f32) -> f32,
    ) -> SplitInput {
        let (n, r) = (self.width(), self.kept());
        assert_eq!(x.len(), rows * n, "input transform: x is not [{rows}, {n}]");
        let (mut kept, mut rest) = (Buffer::new(rows * r), Buffer::new(rows * (n - r)));
        let block = self.rows_at_once(rows);
        if r == 0 {
            for_each_chunk(&mut rest, block * n, |i, rest| {
                rest.copy_from_slice(&x[i * block * n..][..rest.len()]);
                mix(&self.mix, rest, rest.len() / n);
            });
            return SplitInput { kept, rest };
        }
        for_each_chunk_pair((&mut kept, block * r), (&mut rest, block * (n - r)), |i, kept, rest| {
            let rows = kept.len() / r;
            let x = self.changed(&x[i * block * n..][..rows * n], rows, mix, scaled);
            let parts = kept.chunks_exact_mut(r).zip(rest.chunks_exact_mut(n - r));
            for (row, (kept, rest)) in x.chunks_exact(n).zip(parts) {
                kept.copy_from_slice(&row[..r]);
                rest.copy_from_slice(&row[r..]);
            }
        });
        SplitInput { kept, rest }
    }

    /// As [`InputTransform::apply`], with both parts quantized per token while they lie in a core's cache: first what is not kept, by
    /// `format` and `clip`, then the kept coordinates, evenly to `kept_bits`.
    ///
    /// # Panics
    /// If x is not `[rows, n]`, or `kept_bits` not 2 to 8.
    pub fn apply_quantized(
        &self,
        x: &[f32],
        rows: usize,
        (format, clip): (ActFormat, f32),
        kept_bits: u8,
    ) -> [QuantizedActs; 2] {
        let (n, r) = (self.width(), self.kept());
        assert_eq!(x.len(), rows * n, "input transform: x is not [{rows}, {n}]");
        let parts = [
            ActQuantizer { cols: n - r, format, clip },
            ActQuantizer { cols: r, format: ActFormat::Uniform { bits: kept_bits }, clip: 1.0 },
        ];
        let transformed = |x, rows| self.changed(x, rows, Mix::apply, |kept, norm| kept / norm);
        let put_all = |x: &[f32], put: &mut dyn FnMut([&[f32]; 2])| {
            for row in x.chunks_exact(n) {
                let (kept, rest) = row.split_at(r);
                put([rest, kept]);
            }
        };
        let at_once = self.rows_at_once(rows);
        if rows <= at_once {
            // One block, whose steps are shared one by one.
            let x = transformed(x, rows);
            return quantize_tokens(rows, TASK_VALUES.div_ceil(n), parts, |tokens, put| {
                put_all(&x[tokens.start * n..tokens.end * n], put);
            });
        }
        quantize_tokens(rows, at_once, parts, |tokens, put| {
            put_all(&transformed(&x[tokens.start * n..tokens.end * n], tokens.len()), put);
        })
    }

    /// x `[rows, n]` in the new coordinates, the kept ones first.
    fn changed(
        &self,
        x: &[f32],
        rows: usize,
        mix: fn(&Mix, &mut [f32], usize),
        scaled: fn(f32, f32) -> f32,
    ) -> Buffer<f32> {
        let mut x = Buffer::from(x);
        mix(&self.mix, &mut x, rows);
        self.reflections.apply(&mut x, rows);
        for row in x.chunks_exact_mut(self.width()) {
            row.iter_mut().zip(&self.norms).for_each(|(kept, norm)| *kept = scaled(*kept, *norm));
        }
        x
    }

    /// Rows that go through all steps together.
    fn rows_at_once(&self, rows: usize) -> usize {
        let share = rows.div_ceil(rayon::current_num_threads());
        (BLOCK_VALUES / self.width()).min(share).max(1).next_multiple_of(16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_that_are_large_or_have_no_hadamard_matrix() {
        for (n, keep, cosine) in
            [(70_000, 0, true), (70_000, 2, true), (1 << 17, 1, false), (13_696, 1, true), (4096, 32, false)]
        {
            let vectors = (0..keep * n).map(|i| (i % 7) as f32 - 3.0).collect();
            let transform =
                InputTransform::new(Reflections::new(n, vectors), vec![1.0; keep], RotationKind::Hadamard);
            assert_eq!(matches!(transform.mix, Mix::Rotation(Rotation::Dct(_))), cosine, "{n}");
            let x: Vec<f32> = (0..2 * n).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
            let split = transform.apply(&x, 2);
            assert_eq!((split.kept.len(), split.rest.len()), (2 * keep, 2 * (n - keep)));
            // A row alone gives the same bits.
            let alone = transform.apply(&x[n..], 1);
            assert_eq!((&alone.kept[..], &alone.rest[..]), (&split.kept[keep..], &split.rest[n - keep..]));
            let back = transform.undo(split, 2);
            assert!(back.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-4), "{n} {keep}");
        }
    }

    /// Whatever is kept and however the rest is rotated, inputs and weights that went through it multiply to what they did.
    #[test]
    fn products_are_unchanged() {
        let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0;
        let (rows, out, n) = (3, 5, 60);
        let x: Vec<f32> = (0..rows * n).map(value).collect();
        let w: Vec<f32> = (0..out * n).map(|i| value(i + 17)).collect();
        let product = |x: &[f32], w: &[f32], n: usize| {
            let mut y = vec![0.0; rows * out];
            if n > 0 {
                specquant_kernels::matmul_nt(x, w, &mut y, rows, n, out, false);
            }
            y
        };
        let want = product(&x, &w, n);
        // Far from orthonormal, and from singular.
        let matrix = |n: usize| {
            (0..n * n)
                .map(|i| value(i + 3) * 0.3 + if i % (n + 1) == 0 { 1.5 } else { 0.0 })
                .collect::<Vec<f32>>()
        };
        let kinds = [
            (Some(RotationKind::Dct), 0),
            (Some(RotationKind::Dct), 7),
            (Some(RotationKind::Hadamard), 4),
            (None, 0),
        ];
        for (kind, keep) in kinds {
            let vectors = (0..keep * n).map(|i| (value(i + 5) * 127.0).round()).collect();
            let norms = (0..keep).map(|i| 0.5 + i as f32).collect();
            let transform = match kind {
                Some(kind) => InputTransform::new(Reflections::new(n, vectors), norms, kind),
                None => InputTransform::kronecker(Kronecker::new(n, matrix(6), matrix(10))).unwrap(),
            };
            let (a, b) = (transform.apply(&x, rows), transform.apply_to_weight(&w, out));
            // Quantized at once, or one after the other.
            let codes = transform.apply_quantized(&x, rows, (ActFormat::Gaussian, 0.9), 8);
            assert_eq!(codes[0], specquant_kernels::quantize_acts_gaussian(&a.rest, rows, n - keep, 0.9));
            assert_eq!(codes[1], specquant_kernels::quantize_acts(&a.kept, rows, keep, 8, 1.0));
            assert_eq!((a.kept.len(), b.rest.len()), (rows * keep, out * (n - keep)));
            let (kept, rest) = (product(&a.kept, &b.kept, keep), product(&a.rest, &b.rest, n - keep));
            for ((kept, rest), want) in kept.iter().zip(&rest).zip(&want) {
                assert!((kept + rest - want).abs() < 1e-4, "{kind:?} {keep}: {kept} + {rest}, not {want}");
            }
            for (got, want) in [(transform.undo(a, rows), &x), (transform.undo_weight(b, out), &w)] {
                assert_eq!(got.len(), want.len());
                for (got, want) in got.iter().zip(want) {
                    assert!((got - want).abs() < 1e-5, "{kind:?} {keep}, undone: {got}, not {want}");
                }
            }
        }
    }
}
