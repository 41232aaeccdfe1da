//! A decoder block as candle operations: one forward pass, whose linear layers and quantizers each method brings along.

use candle_core::{Result, Tensor};
use specquant_model::{Activation, ModelConfig, Site};

use crate::ops::{CausalSoftmax, RmsNorm, Rope, exp_one_by_one, frozen, rows};

/// Linear layers, in the order of [`ModelConfig::linear_shapes`].
pub(crate) const Q: usize = 0;
pub(crate) const K: usize = 1;
pub(crate) const V: usize = 2;
pub(crate) const O: usize = 3;
pub(crate) const GATE: usize = 4;
pub(crate) const UP: usize = 5;
pub(crate) const DOWN: usize = 6;

/// A linear layer's constants.
pub(crate) struct Dense {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

impl Dense {
    /// `x Wᵀ + b`. x: `[rows, in]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        add_bias(frozen(x, &self.weight)?, self.bias.as_ref())
    }
}

/// y: `[rows, out]`; bias: `[out]`.
pub(crate) fn add_bias(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    bias.map_or(Ok(y.clone()), |b| y.broadcast_add(b))
}

/// What differs between methods.
pub(crate) trait Parts {
    /// What the linear layers of a site read. x: `[tokens, in]`; at [`Site::Qkv`] and [`Site::GateUp`] normalized, but not yet
    /// multiplied by the norm's weight.
    fn site(&self, site: Site, x: &Tensor) -> Result<Tensor>;

    /// Linear layer [`Q`] to [`DOWN`].
    fn linear(&self, index: usize, x: &Tensor) -> Result<Tensor>;

    /// What attention sees of a query, a key (both after the rotary embedding) or a value: index [`Q`], [`K`] or [`V`].
    /// x: `[tokens, heads, head_dim]`.
    fn cached(&self, index: usize, x: Tensor) -> Result<Tensor>;

    /// Norm weights of the heads of [`Q`] and [`K`], `[head_dim]`.
    fn head_norm(&self, index: usize) -> Option<&Tensor>;

    /// Norm weights of what [`O`] and [`DOWN`] put out, `[hidden]`.
    fn out_norm(&self, index: usize) -> Option<&Tensor>;
}

/// The shape of a block.
#[derive(Clone)]
pub(crate) struct Geometry {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f32,
    scale: f32,
    activation: Activation,
    window: Option<usize>,
    rope: Rope,
}

impl Geometry {
    /// Of block `layer`, for sequences up to `positions` tokens.
    pub fn new(config: &ModelConfig, layer: usize, positions: usize) -> Self {
        let window = config.sliding_window.get(layer).copied().flatten();
        Geometry {
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            eps: config.rms_norm_eps,
            scale: config.attention_scale(),
            activation: config.activation,
            window,
            rope: Rope::new(&config.inv_freq(window.is_some()), positions, 1),
        }
    }

    /// As this one, for another layer of a model whose layers all have one rotary base.
    pub fn with_layer(&self, config: &ModelConfig, layer: usize) -> Self {
        Geometry { window: config.sliding_window.get(layer).copied().flatten(), ..self.clone() }
    }

    /// The block's output. x: `[tokens, hidden]`, a sequence from its start.
    pub fn forward(&self, parts: &impl Parts, x: &Tensor) -> Result<Tensor> {
        let normed = parts.site(Site::Qkv, &self.norm(x)?)?;
        let heads = |index: usize| -> Result<Tensor> {
            let heads = if index == Q { self.heads } else { self.kv_heads };
            let y = parts.linear(index, &normed)?.reshape((x.dim(0)?, heads, self.head_dim))?;
            let y = match parts.head_norm(index) {
                Some(weight) => self.norm(&y)?.broadcast_mul(weight)?,
                None => y,
            };
            let y = if index == V { y } else { rows(&y, Rope { heads, ..self.rope.clone() })? };
            parts.cached(index, y)
        };
        let attended = self.attend(&heads(Q)?, &heads(K)?, &heads(V)?)?;
        let out = |index: usize, x: &Tensor| match parts.out_norm(index) {
            Some(weight) => self.norm(&parts.linear(index, x)?)?.broadcast_mul(weight),
            None => parts.linear(index, x),
        };
        let x = (x + out(O, &parts.site(Site::O, &attended)?)?)?;
        let normed = parts.site(Site::GateUp, &self.norm(&x)?)?;
        let gate = parts.linear(GATE, &normed)?;
        let gate = match self.activation {
            Activation::Silu => gate.silu()?,
            // Candle's `gelu` is the tanh approximation.
            Activation::GeluTanh => gate.gelu()?,
        };
        let inner = (gate * parts.linear(UP, &normed)?)?;
        x + out(DOWN, &parts.site(Site::Down, &inner)?)?
    }

    fn norm(&self, x: &Tensor) -> Result<Tensor> {
        rows(x, RmsNorm { eps: self.eps })
    }

    /// q: `[tokens, heads, head_dim]`; k, v: `[tokens, kv_heads, head_dim]`; returns `[tokens, heads * head_dim]`.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (tokens, heads, dim) = q.dims3()?;
        let group = heads / self.kv_heads;
        // The queries of one group are rows of one product with its KV head.
        let q = q.reshape((tokens, self.kv_heads, group, dim))?.permute((1, 2, 0, 3))?;
        let q = q.reshape((self.kv_heads, group * tokens, dim))?;
        let k = k.transpose(0, 1)?.contiguous()?;
        let v = v.transpose(0, 1)?.contiguous()?;
        let weights = rows(
            &q.matmul(&k.t()?)?,
            CausalSoftmax {
                tokens,
                first_query: 0,
                first_key: 0,
                scale: self.scale,
                window: self.window,
                exp: exp_one_by_one,
            },
        )?;
        let y = weights.matmul(&v)?.reshape((self.kv_heads, group, tokens, dim))?;
        y.permute((2, 0, 1, 3))?.reshape((tokens, heads * dim))
    }
}
