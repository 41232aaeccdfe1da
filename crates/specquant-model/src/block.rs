//! One decoder block: RMSNorm, grouped-query attention with RoPE, gated MLP.

use smallvec::SmallVec;
use specquant_kernels as kernels;
use specquant_kernels::{Buffer, KvCache};

use crate::linear::{Linear, forward_shared};
use crate::{Activation, InputTransform, ModelConfig, Result, Rotations};

/// Rows that go through a block's layers together, so that what lies between them stays small: of a block 4096 wide, some 30 MB. Attention has all rows at
/// once.
pub const ROWS_AT_ONCE: usize = 256;
/// Values that one thread changes at least; below, sharing costs more than it saves.
const ROW_VALUES: usize = 1 << 15;
/// Spans that are enough to keep all threads busy, and the tokens of a long one.
pub(crate) const FEW_SPANS: usize = 16;

/// A place in the block whose input feeds linear layers: the unit of smoothing, of activation statistics and of Hessians.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    /// Normalized input of `q_proj`, `k_proj` and `v_proj`.
    Qkv,
    /// Attention output, input of `o_proj`.
    O,
    /// Normalized input of `gate_proj` and `up_proj`.
    GateUp,
    /// Gated output, input of `down_proj`.
    Down,
}

impl Site {
    /// In the order in which a block meets them.
    pub const ALL: [Site; 4] = [Site::Qkv, Site::O, Site::GateUp, Site::Down];

    /// Name in checkpoints.
    pub fn name(self) -> &'static str {
        match self {
            Site::Qkv => "qkv",
            Site::O => "o",
            Site::GateUp => "gate_up",
            Site::Down => "down",
        }
    }

    /// The layers that read this input, by their Hugging Face names within the block.
    pub fn layers(self) -> &'static [&'static str] {
        match self {
            Site::Qkv => &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            Site::O => &["self_attn.o_proj"],
            Site::GateUp => &["mlp.gate_proj", "mlp.up_proj"],
            Site::Down => &["mlp.down_proj"],
        }
    }
}

/// A decoder block.
pub struct Block {
    /// RMSNorm weight before attention, `[hidden]`.
    pub input_norm: Vec<f32>,
    /// `[heads * head_dim, hidden]`.
    pub q: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub k: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub v: Linear,
    /// `[hidden, heads * head_dim]`.
    pub o: Linear,
    /// Per-head RMSNorm weight of Q, `[head_dim]` (Qwen3, Gemma 3).
    pub q_norm: Option<Vec<f32>>,
    /// Per-head RMSNorm weight of K, `[head_dim]` (Qwen3, Gemma 3).
    pub k_norm: Option<Vec<f32>>,
    /// RMSNorm weight before the MLP, `[hidden]`.
    pub mlp_norm: Vec<f32>,
    /// RMSNorm weights of what attention and MLP put out, before it is added to the residual stream, `[hidden]` each (Gemma 3).
    pub out_norms: Option<[Vec<f32>; 2]>,
    /// `[intermediate, hidden]`.
    pub gate: Linear,
    /// `[intermediate, hidden]`.
    pub up: Linear,
    /// `[hidden, intermediate]`.
    pub down: Linear,
    /// Keys that a query sees, itself included; all of them if `None`.
    pub window: Option<usize>,
    /// Transforms of activations that the weights are made for.
    pub rotations: Rotations,
    /// Transforms of the layers' inputs, in the order of [`Site::ALL`].
    pub inputs: [Option<InputTransform>; 4],
    /// What cached keys and values are the difference from.
    pub kv_center: Option<KvCenter>,
}

/// A mean key, as the cache has them, and a mean value, `[kv_heads * head_dim]` each.
///
/// What is left without them has a smaller range and so a finer step. The mean key may be forgotten: `q · (k − c)` is `q · k` less what is the same for all
/// keys of a query, and softmax does not see that. The weights of values sum to 1, so their mean is added to what attention returns.
#[derive(Debug, Clone, PartialEq)]
pub struct KvCenter {
    /// Of keys after RoPE and rotation.
    pub keys: Vec<f32>,
    /// Of values.
    pub values: Vec<f32>,
}

/// `f(i, row)` of every row of x `[rows, width]`, on all threads if there are many.
fn each_row(x: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let at_once = ROW_VALUES.div_ceil(width);
    kernels::for_each_chunk(x, at_once * width, |i, x| {
        x.chunks_exact_mut(width).zip(i * at_once..).for_each(|(row, i)| f(i, row));
    });
}

impl KvCenter {
    /// k, v: `[rows, kv_heads * head_dim]`.
    fn subtract(&self, k: &mut [f32], v: &mut [f32]) {
        for (x, center) in [(k, &self.keys), (v, &self.values)] {
            each_row(x, center.len(), |_, row| row.iter_mut().zip(center).for_each(|(x, c)| *x -= c));
        }
    }

    /// attended: `[rows, heads * head_dim]`.
    fn add_back(&self, attended: &mut [f32], config: &ModelConfig) {
        let group = config.num_heads / config.num_kv_heads;
        each_row(attended, config.num_heads * config.head_dim, |_, row| {
            for (head, x) in row.chunks_exact_mut(config.head_dim).enumerate() {
                let center = &self.values[head / group * config.head_dim..];
                x.iter_mut().zip(center).for_each(|(x, c)| *x += c);
            }
        });
    }
}

/// Rotation angles of consecutive rows, `[rows, head_dim / 2]` each.
pub struct RopeTable {
    cos: Buffer<f32>,
    sin: Buffer<f32>,
}

impl RopeTable {
    /// Angles of tokens at `positions`. inv_freq: `[head_dim / 2]`, radians per position.
    pub fn new(inv_freq: &[f32], positions: impl Iterator<Item = usize> + Clone) -> Self {
        // The product is rounded to f32 before the cosine, as in transformers' rotary embedding.
        let angles = positions.clone().flat_map(|p| inv_freq.iter().map(move |f| f * p as f32));
        let [mut cos, mut sin] = [(); 2].map(|()| Buffer::new(positions.clone().count() * inv_freq.len()));
        for (angle, (cos, sin)) in angles.zip(cos.iter_mut().zip(sin.iter_mut())) {
            (*cos, *sin) = (angle.cos(), angle.sin());
        }
        RopeTable { cos, sin }
    }
}

/// One sequence's share of a batch: its next `rows` tokens and the layer's cache.
pub struct Span<'a> {
    /// Number of tokens.
    pub rows: usize,
    /// Keys and values before these tokens; they are appended.
    pub cache: &'a mut KvCache,
}

impl Block {
    /// Linear layers with their Hugging Face names within the block.
    pub fn linears(&self) -> [(&'static str, &Linear); 7] {
        [
            ("self_attn.q_proj", &self.q),
            ("self_attn.k_proj", &self.k),
            ("self_attn.v_proj", &self.v),
            ("self_attn.o_proj", &self.o),
            ("mlp.gate_proj", &self.gate),
            ("mlp.up_proj", &self.up),
            ("mlp.down_proj", &self.down),
        ]
    }

    /// The layers of [`Block::linears`], to be changed.
    pub fn linears_mut(&mut self) -> [&mut Linear; 7] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down]
    }

    /// The weights of all norms, in the order of [`ModelConfig::norm_shapes`].
    pub fn norms(&self) -> impl Iterator<Item = &Vec<f32>> {
        let before = [&self.input_norm, &self.mlp_norm].into_iter();
        before.chain(self.out_norms.iter().flatten()).chain(&self.q_norm).chain(&self.k_norm)
    }

    /// The layers that read a site, in the order of [`Site::layers`].
    pub fn site(&self, site: Site) -> Vec<&Linear> {
        match site {
            Site::Qkv => vec![&self.q, &self.k, &self.v],
            Site::O => vec![&self.o],
            Site::GateUp => vec![&self.gate, &self.up],
            Site::Down => vec![&self.down],
        }
    }

    /// The layers of [`Block::site`], to be changed.
    pub fn site_mut(&mut self, site: Site) -> Vec<&mut Linear> {
        match site {
            Site::Qkv => vec![&mut self.q, &mut self.k, &mut self.v],
            Site::O => vec![&mut self.o],
            Site::GateUp => vec![&mut self.gate, &mut self.up],
            Site::Down => vec![&mut self.down],
        }
    }

    /// Adds the block's output to the residual stream.
    ///
    /// x: `[rows, hidden]`, the spans' tokens one after another; rope: one row a token; `observe` sees the input of every
    /// [`Site`], `[rows, in]`, before its transform and its quantizer.
    ///
    /// # Errors
    /// When a mapped weight cannot be widened.
    pub fn forward(
        &self,
        config: &ModelConfig,
        rope: &RopeTable,
        x: &mut [f32],
        spans: &mut [Span],
        observe: &mut dyn FnMut(Site, &[f32]),
    ) -> Result<()> {
        let attended = self.attention(config, rope, x, spans, observe)?;
        self.finish(config, x, &attended, observe)?;
        drop(attended);
        kernels::trim_buffers();
        Ok(())
    }

    /// The first half of [`Block::forward`]: appends to the spans' caches and returns the attention's output,
    /// `[rows, heads * head_dim]`.
    ///
    /// # Errors
    /// When a mapped weight cannot be widened.
    pub fn attention(
        &self,
        config: &ModelConfig,
        rope: &RopeTable,
        x: &[f32],
        spans: &mut [Span],
        observe: &mut dyn FnMut(Site, &[f32]),
    ) -> Result<Buffer<f32>> {
        let hidden = config.hidden_size;
        let rows = x.len() / hidden;
        let (wide, narrow) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let [mut q, mut k, mut v] = [wide, narrow, narrow].map(|width| Buffer::new(rows * width));
        let at_once = self.rows_at_once(rows);
        let outputs = q
            .chunks_mut(at_once * wide)
            .zip(k.chunks_mut(at_once * narrow))
            .zip(v.chunks_mut(at_once * narrow));
        for (x, ((q, k), v)) in x.chunks(at_once * hidden).zip(outputs) {
            let mut normed = Buffer::new(x.len());
            kernels::rms_norm(x, &self.input_norm, config.rms_norm_eps, &mut normed);
            observe(Site::Qkv, &normed);
            self.run([&self.q, &self.k, &self.v], Site::Qkv, &normed, [q, k, v])?;
        }
        position(&mut q, self.q_norm.as_deref(), config, config.num_heads, rope);
        position(&mut k, self.k_norm.as_deref(), config, config.num_kv_heads, rope);
        if let Some(rotation) = &self.rotations.qk {
            for x in [&mut q, &mut k] {
                let heads = x.len() / config.head_dim;
                rotation.apply(x, heads);
            }
        }
        self.rotations.keys.iter().for_each(|keys| keys.apply(&mut q, &mut k));
        let mut attended = Buffer::new(q.len());
        self.kv_center.iter().for_each(|center| center.subtract(&mut k, &mut v));
        self.attend(config, &q, &k, &v, spans, &mut attended);
        self.kv_center.iter().for_each(|center| center.add_back(&mut attended, config));
        if let Some(rotation) = &self.rotations.heads {
            rotation.apply_across(&mut attended, rows, config.head_dim);
        }
        Ok(attended)
    }

    /// The second half of [`Block::forward`], which knows no neighbours: of any rows of the residual stream and of the attention's
    /// output.
    ///
    /// # Errors
    /// When a mapped weight cannot be widened.
    pub fn finish(
        &self,
        config: &ModelConfig,
        x: &mut [f32],
        attended: &[f32],
        observe: &mut dyn FnMut(Site, &[f32]),
    ) -> Result<()> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let at_once = self.rows_at_once(x.len() / hidden);
        let parts = attended.chunks(at_once * config.num_heads * config.head_dim);
        for (x, attended) in x.chunks_mut(at_once * hidden).zip(parts) {
            let rows = x.len() / hidden;
            let [mut y, mut normed] = [(); 2].map(|()| Buffer::new(x.len()));
            let [mut gate, mut up] = [(); 2].map(|()| Buffer::new(rows * inner));
            observe(Site::O, attended);
            self.run([&self.o], Site::O, attended, [&mut y])?;
            self.add(config, x, &mut y, 0);

            kernels::rms_norm(x, &self.mlp_norm, config.rms_norm_eps, &mut normed);
            observe(Site::GateUp, &normed);
            self.run([&self.gate, &self.up], Site::GateUp, &normed, [&mut gate, &mut up])?;
            match config.activation {
                Activation::Silu => kernels::silu_mul(&mut gate, &up),
                Activation::GeluTanh => kernels::gelu_mul(&mut gate, &up),
            }
            if let Some(rotation) = &self.rotations.down {
                rotation.apply(&mut gate, rows);
            }
            observe(Site::Down, &gate);
            self.run([&self.down], Site::Down, &gate, [&mut y])?;
            self.add(config, x, &mut y, 1);
        }
        Ok(())
    }

    /// [`ROWS_AT_ONCE`], or all: weights that are widened at each use are used once.
    fn rows_at_once(&self, rows: usize) -> usize {
        let all = self.linears().iter().any(|(_, linear)| linear.is_mapped());
        if all { rows.max(1) } else { ROWS_AT_ONCE }
    }

    /// Adds the output y of attention (0) or MLP (1) to the residual stream x, behind its norm if it has one. x, y: `[rows, hidden]`.
    fn add(&self, config: &ModelConfig, x: &mut [f32], y: &mut [f32], which: usize) {
        if let Some(norms) = &self.out_norms {
            let raw = Buffer::from(&*y);
            kernels::rms_norm(&raw, &norms[which], config.rms_norm_eps, y);
        }
        let width = config.hidden_size;
        each_row(x, width, |i, x| x.iter_mut().zip(&y[i * width..]).for_each(|(x, y)| *x += *y));
    }

    /// The layers of a site on their input, `[rows, in]`; y: `[rows, out]` each.
    fn run<const N: usize>(
        &self,
        layers: [&Linear; N],
        site: Site,
        x: &[f32],
        y: [&mut [f32]; N],
    ) -> Result<()> {
        let rows = x.len() / layers[0].in_features();
        forward_shared(layers, x, rows, self.inputs[site as usize].as_ref(), y)
    }

    /// q: `[rows, heads * head_dim]`; k, v: `[rows, kv_heads * head_dim]`; out as q. Each span attends to its own cache only.
    fn attend(
        &self,
        config: &ModelConfig,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        spans: &mut [Span],
        out: &mut [f32],
    ) {
        let scale = config.attention_scale();
        let (wide, narrow) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        // Spans side by side: many short ones would each be too little work for all threads.
        let mut jobs = SmallVec::<[_; FEW_SPANS]>::new();
        let (mut first, mut rest) = (0, out);
        for span in spans {
            let rows = first..first + span.rows;
            let (out, after) = rest.split_at_mut(span.rows * wide);
            (first, rest) = (rows.end, after);
            jobs.push((rows, span, out));
        }
        // A few long ones share out their own work.
        let at_once = if jobs.len() < FEW_SPANS && first > FEW_SPANS * jobs.len() { jobs.len() } else { 1 };
        kernels::for_each_chunk(&mut jobs, at_once, |_, jobs| {
            for (rows, span, out) in jobs {
                let (kv, qo) = (rows.start * narrow..rows.end * narrow, rows.start * wide..rows.end * wide);
                span.cache.append(&k[kv.clone()], &v[kv]);
                kernels::attention(&q[qo], span.rows, config.num_heads, span.cache, scale, self.window, out);
            }
        });
    }
}

/// Normalizes (Qwen3, Gemma 3) and rotates the heads of every row. x: `[rows, heads * head_dim]`.
fn position(x: &mut [f32], norm: Option<&[f32]>, config: &ModelConfig, heads: usize, rope: &RopeTable) {
    if let Some(norm) = norm {
        let raw = Buffer::from(&*x);
        kernels::rms_norm(&raw, norm, config.rms_norm_eps, x);
    }
    let half = config.head_dim / 2;
    each_row(x, heads * config.head_dim, |i, row| {
        let [cos, sin] = [&rope.cos, &rope.sin].map(|angles| &angles[i * half..][..half]);
        kernels::rope(row, heads, config.head_dim, cos, sin);
    });
}
