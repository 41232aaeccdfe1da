//! A quantized block and its gradient, written out: candle's graph of the same took twice the time, most of it outside of products.
//!
//! Forward runs the engine's integer products on the codes; only the way back needs weights in f32, one layer's at a time.

use specquant_kernels::{
    Buffer, KvCache, KvFormat, KvSide, PackedWeights, for_each_chunk, for_each_chunk_pair, matmul_float,
    matmul_int, matmul_nn, matmul_nt, quantize_acts, transposed,
};
use specquant_model::{
    Activation, Block, InputTransform, KEPT_BITS, KvCenter, Levels, Linear, ModelConfig, QuantLinear,
    Rotation, Site, SplitInput, quantize_input,
};

use super::attention::Attention;
use super::{MIN_FACTOR, Param, TuneConfig, TunedBlock};
use crate::block::{K, Q, V};
use crate::error::{Error, Result};
use crate::ops::{FakeQuantWeight, RmsNorm, Rope, activation, backward, forward};

/// Values that one thread takes at least.
const GRAIN: usize = 1 << 14;

/// Columns that one thread sums at least.
const COLUMNS: usize = 64;

/// Changes every value of `y` by that of `x`.
fn zip(y: &mut [f32], x: &[f32], f: impl Fn(&mut f32, f32) + Sync) {
    for_each_chunk(y, GRAIN, |i, y| y.iter_mut().zip(&x[i * GRAIN..]).for_each(|(y, x)| f(y, *x)));
}

fn add(y: &mut [f32], x: &[f32]) {
    zip(y, x, |y, x| *y += x);
}

/// Multiplies every row by `factors`. x: `[rows, factors]`.
pub(super) fn scaled(x: &[f32], factors: &[f32]) -> Buffer<f32> {
    let mut y = Buffer::new(x.len());
    let some = GRAIN.div_ceil(factors.len()) * factors.len();
    for_each_chunk(&mut y, some, |i, y| {
        let rows = y.chunks_exact_mut(factors.len()).zip(x[i * some..].chunks_exact(factors.len()));
        rows.for_each(|(y, x)| y.iter_mut().zip(x).zip(factors).for_each(|((y, x), f)| *y = x * f));
    });
    y
}

/// Σ over rows of x · y, by column. x, y: `[rows, columns]`.
pub(super) fn column_products(x: &[f32], y: &[f32], columns: usize) -> Vec<f32> {
    let mut sums = vec![0.0; columns];
    for_each_chunk(&mut sums, COLUMNS, |i, sums| {
        for (x, y) in x.chunks_exact(columns).zip(y.chunks_exact(columns)) {
            let products = x[i * COLUMNS..].iter().zip(&y[i * COLUMNS..]);
            sums.iter_mut().zip(products).for_each(|(sum, (x, y))| *sum += x * y);
        }
    });
    sums
}

/// A linear layer's constants.
struct Frozen {
    /// `[out, in - r]`.
    weights: PackedWeights,
    bias: Option<Vec<f32>>,
}

/// A block: constants and what is learned.
pub(super) struct Layer {
    attention: Attention,
    hidden: usize,
    norm: RmsNorm,
    /// Whether attention and MLP have norms behind them.
    post_norms: bool,
    activation: Activation,
    rope: Rope,
    linears: Vec<Frozen>,
    inputs: Vec<FakeInput>,
    cache: FakeCache,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
    /// Four norms, the last two of them empty where nothing is behind attention and MLP; seven factors, seven kept columns.
    pub params: Vec<Param>,
}

/// Where the parts of [`Layer::params`] begin.
const OUT_NORMS: usize = 2;
pub(super) const FACTORS: usize = OUT_NORMS + 2;
pub(super) const KEPT: usize = FACTORS + 7;
/// The linear layers of a site, as in [`Site::ALL`].
const LAYERS: [std::ops::Range<usize>; 4] = [0..3, 3..4, 4..6, 6..7];

/// What a site's layers did.
struct SiteSaved {
    /// The kept coordinates of their input, quantized, `[tokens, r]`.
    kept: Buffer<f32>,
    /// Products with the 4-bit weights, before the factors, `[tokens, out]` each.
    products: Vec<Buffer<f32>>,
    /// The kept columns, rounded, `[out, r]` each.
    columns: Vec<Buffer<f32>>,
}

/// What a norm did.
struct NormSaved {
    /// `[rows, width]`.
    input: Buffer<f32>,
    /// Without its weight.
    output: Buffer<f32>,
}

/// What the backward pass needs of the forward pass.
pub(super) struct Saved {
    norms: [NormSaved; 2],
    /// Of what attention and MLP put out, where they have one.
    out_norms: [Option<NormSaved>; 2],
    /// Of the heads of Q and K, where they have one.
    head_norms: [Option<NormSaved>; 2],
    sites: [SiteSaved; 4],
    /// Query, key and value as attention saw them, heads first: `[heads, tokens, head_dim]`.
    qkv: [Buffer<f32>; 3],
    gate: Buffer<f32>,
    up: Buffer<f32>,
}

impl Layer {
    /// longest: tokens of a sequence at most.
    pub fn new(
        block: Block,
        model: &ModelConfig,
        longest: usize,
        kv: KvFormat,
        config: &TuneConfig,
    ) -> Result<Self> {
        let Block { q, k, v, o, gate, up, down, input_norm, mlp_norm, out_norms, q_norm, k_norm, .. } = block;
        if block.rotations.down.is_some() || block.rotations.heads.is_some() {
            return Err(Error::Untunable("rotations of whole inputs"));
        }
        let learned = |t: &Option<InputTransform>| t.as_ref().is_some_and(|t| t.as_kronecker().is_some());
        if block.rotations.keys.is_some() || block.inputs.iter().any(learned) {
            return Err(Error::Untunable("learned transforms"));
        }
        let [after_attention, after_mlp] = out_norms.unwrap_or_default();
        let norms = [input_norm, mlp_norm, after_attention, after_mlp];
        let mut params = Vec::from(norms.map(|norm| Param::norm(norm, model, config.norm_lr)));
        let (mut linears, mut inputs, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        let sites = [vec![q, k, v], vec![o], vec![gate, up], vec![down]];
        for ((site, layers), transform) in Site::ALL.into_iter().zip(sites).zip(block.inputs) {
            for (i, layer) in layers.into_iter().enumerate() {
                let Linear::Quantized(layer) = layer else { return Err(Error::NotQuantized) };
                if layer.branch.is_some() {
                    return Err(Error::Untunable("branches"));
                }
                if i == 0 {
                    inputs.push(FakeInput::new(model.site_width(site), transform.clone(), &layer));
                }
                let columns = layer.kept.as_ref().map_or(Vec::new(), |kept| kept.weights.dequantize());
                kept.push(Param::new(columns, config.kept_lr, f32::NEG_INFINITY));
                let factors = vec![1.0; layer.weights.out_features()];
                params.push(Param::new(factors, config.scale_lr, MIN_FACTOR));
                linears.push(Frozen { weights: layer.weights, bias: layer.bias });
            }
        }
        params.extend(kept);
        Ok(Layer {
            attention: Attention {
                heads: model.num_heads,
                kv_heads: model.num_kv_heads,
                head_dim: model.head_dim,
                scale: model.attention_scale(),
                window: block.window,
            },
            hidden: model.hidden_size,
            norm: RmsNorm { eps: model.rms_norm_eps },
            post_norms: model.post_norms,
            activation: model.activation,
            rope: Rope::new(&model.inv_freq(block.window.is_some()), longest, 1),
            linears,
            inputs,
            cache: FakeCache {
                center: block
                    .kv_center
                    .map_or(Default::default(), |KvCenter { keys, values }| [keys, values]),
                rotation: block.rotations.qk,
                kv,
                heads: model.num_kv_heads,
                head_dim: model.head_dim,
            },
            q_norm,
            k_norm,
            params,
        })
    }

    pub fn learned(self) -> TunedBlock {
        let mut values = self.params.into_iter().map(|p| p.values);
        let mut next = || values.next().unwrap_or_default();
        let norms: [Vec<f32>; FACTORS] = std::array::from_fn(|_| next());
        TunedBlock {
            norms: norms.into_iter().filter(|norm| !norm.is_empty()).collect(),
            factors: std::array::from_fn(|_| next()),
            kept: std::array::from_fn(|_| next()),
        }
    }

    /// The block's output, `[tokens, hidden]`. x: the same, a sequence from its start.
    pub fn forward(&self, x: &[f32]) -> (Buffer<f32>, Saved) {
        let (tokens, dim) = (x.len() / self.hidden, self.attention.head_dim);
        let (normed, before) = self.normed(x, 0);
        let (mut qkv, qkv_saved) = self.site(Site::Qkv, &normed);
        let mut head_norms = [None, None];
        for (index, weight) in [(Q, &self.q_norm), (K, &self.k_norm)] {
            if let Some(weight) = weight {
                let input = std::mem::take(&mut qkv[index]);
                let output = forward(&self.norm, &input, dim);
                qkv[index] = scaled(&output, weight);
                head_norms[index] = Some(NormSaved { input, output });
            }
            qkv[index] = forward(&self.rope(index), &qkv[index], dim);
        }
        let [keys, values] = self.cache.round(&qkv[K], &qkv[V]);
        let qkv = [heads_first(&qkv[Q], tokens, self.attention.heads, dim), keys, values];
        let attended = self.attention.forward(&qkv, tokens);
        let (o, o_saved) = self.site(Site::O, &tokens_first(&attended, tokens, self.attention.heads, dim));
        let mut x = Buffer::from(x);
        let (o, behind_attention) = self.behind(o, 0);
        add(&mut x, &o);

        let (normed, after) = self.normed(&x, 1);
        let (mut inner, gate_up_saved) = self.site(Site::GateUp, &normed);
        let up = inner.pop().unwrap_or_default();
        let gate = inner.pop().unwrap_or_default();
        let mut inner = up.clone();
        zip(&mut inner, &gate, |y, g| *y *= activation(self.activation, g).0);
        let (down, down_saved) = self.site(Site::Down, &inner);
        let (down, behind_mlp) = self.behind(down, 1);
        add(&mut x, &down);
        let sites = [qkv_saved, o_saved, gate_up_saved, down_saved];
        let out_norms = [behind_attention, behind_mlp];
        (x, Saved { norms: [before, after], out_norms, head_norms, sites, qkv, gate, up })
    }

    /// What attention (0) or MLP (1) adds to the residual stream: its only output, normalized where there is a norm for it.
    fn behind(&self, outputs: Vec<Buffer<f32>>, which: usize) -> (Buffer<f32>, Option<NormSaved>) {
        let output = outputs.into_iter().next().unwrap_or_default();
        if !self.post_norms {
            return (output, None);
        }
        let (normed, saved) = self.normed(&output, OUT_NORMS + which);
        (normed, Some(saved))
    }

    /// The gradient by the output that [`Layer::behind`] was given, where it is another than `g`.
    fn behind_backward(
        &self,
        which: usize,
        saved: &Saved,
        g: &[f32],
        by_params: &mut [Vec<f32>],
    ) -> Option<Buffer<f32>> {
        let norm = saved.out_norms[which].as_ref()?;
        Some(self.norm_backward(OUT_NORMS + which, norm, g, by_params))
    }

    /// The gradients by the input, `[tokens, hidden]`, and by what is learned, given that by the output.
    pub fn backward(&self, saved: &Saved, gy: &[f32]) -> (Buffer<f32>, Vec<Vec<f32>>) {
        let (tokens, dim) = (gy.len() / self.hidden, self.attention.head_dim);
        let mut by_params = vec![Vec::new(); self.params.len()];
        let g = self.behind_backward(1, saved, gy, &mut by_params);
        let g = g.as_deref().unwrap_or(gy);
        let mut g_gate = self.site_backward(Site::Down, &saved.sites[3], &[g], &mut by_params);
        let mut g_up = Buffer::new(g_gate.len());
        for_each_chunk_pair((&mut g_gate, GRAIN), (&mut g_up, GRAIN), |i, g_gate, g_up| {
            let (gate, up) = (&saved.gate[i * GRAIN..], &saved.up[i * GRAIN..]);
            for ((g_gate, g_up), (gate, up)) in g_gate.iter_mut().zip(g_up).zip(gate.iter().zip(up)) {
                let (value, slope) = activation(self.activation, *gate);
                (*g_up, *g_gate) = (*g_gate * value, *g_gate * up * slope);
            }
        });
        let g = self.site_backward(Site::GateUp, &saved.sites[2], &[&g_gate, &g_up], &mut by_params);
        let mut gx = self.norm_backward(1, &saved.norms[1], &g, &mut by_params);
        add(&mut gx, gy);

        let g = self.behind_backward(0, saved, &gx, &mut by_params);
        let g = g.as_deref().unwrap_or(&gx);
        let g = self.site_backward(Site::O, &saved.sites[1], &[g], &mut by_params);
        let g = heads_first(&g, tokens, self.attention.heads, dim);
        let mut g = self.attention.backward(&saved.qkv, &g, tokens);
        for index in [Q, K, V] {
            g[index] = tokens_first(&g[index], tokens, self.heads_of(index), dim);
        }
        for (index, weight) in [(Q, &self.q_norm), (K, &self.k_norm)] {
            g[index] = backward(&self.rope(index), [&g[index]; 3], dim);
            if let (Some(weight), Some(norm)) = (weight, &saved.head_norms[index]) {
                let by_output = scaled(&g[index], weight);
                g[index] = backward(&self.norm, [&norm.input, &norm.output, &by_output], dim);
            }
        }
        let g = self.site_backward(Site::Qkv, &saved.sites[0], &[&g[Q], &g[K], &g[V]], &mut by_params);
        let g = self.norm_backward(0, &saved.norms[0], &g, &mut by_params);
        add(&mut gx, &g);
        (gx, by_params)
    }

    fn heads_of(&self, index: usize) -> usize {
        if index == Q { self.attention.heads } else { self.attention.kv_heads }
    }

    fn rope(&self, index: usize) -> Rope {
        Rope { heads: self.heads_of(index), ..self.rope.clone() }
    }

    fn normed(&self, x: &[f32], index: usize) -> (Buffer<f32>, NormSaved) {
        let output = forward(&self.norm, x, self.hidden);
        (scaled(&output, &self.params[index].values), NormSaved { input: Buffer::from(x), output })
    }

    fn norm_backward(
        &self,
        index: usize,
        saved: &NormSaved,
        g: &[f32],
        by_params: &mut [Vec<f32>],
    ) -> Buffer<f32> {
        by_params[index] = column_products(g, &saved.output, self.hidden);
        let g = scaled(g, &self.params[index].values);
        backward(&self.norm, [&saved.input, &saved.output, &g], self.hidden)
    }

    /// The outputs of a site's layers. x: `[tokens, in]`.
    fn site(&self, site: Site, x: &[f32]) -> (Vec<Buffer<f32>>, SiteSaved) {
        let input = &self.inputs[site as usize];
        let (tokens, r) = (x.len() / input.width, input.kept());
        let SplitInput { kept, rest } = input.coordinates(x, tokens);
        let kept = input.round_kept(kept, tokens);
        let mut saved = SiteSaved { kept, products: Vec::new(), columns: Vec::new() };
        let codes =
            (input.bits < 16).then(|| quantize_input(&rest, tokens, input.bits, input.levels, input.clip));
        let outputs = LAYERS[site as usize].clone().map(|index| {
            let Frozen { weights, bias } = &self.linears[index];
            let out = weights.out_features();
            let mut products = Buffer::new(tokens * out);
            match &codes {
                Some(codes) => matmul_int(codes, weights, &mut products),
                None => matmul_float(&rest, tokens, weights, &mut products),
            }
            let mut y = scaled(&products, &self.params[FACTORS + index].values);
            let mut columns = Buffer::default();
            if r > 0 {
                columns = forward(&FakeQuantWeight { bits: KEPT_BITS }, &self.params[KEPT + index].values, r);
                matmul_nt(&saved.kept, &columns, &mut y, tokens, r, out, true);
            }
            if let Some(bias) = bias {
                for_each_chunk(&mut y, out, |_, row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
            }
            saved.products.push(products);
            saved.columns.push(columns);
            y
        });
        (outputs.collect(), saved)
    }

    /// The gradient by the site's input, before its quantizer, which counts as the identity. gy: of each layer's output.
    fn site_backward(
        &self,
        site: Site,
        saved: &SiteSaved,
        gy: &[&[f32]],
        by_params: &mut [Vec<f32>],
    ) -> Buffer<f32> {
        let input = &self.inputs[site as usize];
        let (r, width) = (input.kept(), input.width - input.kept());
        let tokens = gy[0].len() / self.linears[LAYERS[site as usize].start].weights.out_features();
        let mut rest = Buffer::default();
        let mut kept = Buffer::zeros(tokens * r);
        let kept_first = transposed(&saved.kept, tokens, r);
        for ((i, index), gy) in LAYERS[site as usize].clone().enumerate().zip(gy) {
            let weights = &self.linears[index].weights;
            let out = weights.out_features();
            by_params[FACTORS + index] = column_products(gy, &saved.products[i], out);
            if r > 0 {
                let mut by_columns = Buffer::new(r * out);
                matmul_nn(&kept_first, gy, &mut by_columns, r, tokens, out, false);
                by_params[KEPT + index] = transposed(&by_columns, r, out).into_vec();
                matmul_nn(gy, &saved.columns[i], &mut kept, tokens, out, r, true);
            }
            let mut wide = Buffer::new(out * width);
            weights.dequantize_into(&mut wide);
            let gy = scaled(gy, &self.params[FACTORS + index].values);
            let mut by_rest = Buffer::new(tokens * width);
            matmul_nn(&gy, &wide, &mut by_rest, tokens, out, width, false);
            if i == 0 {
                rest = by_rest;
            } else {
                add(&mut rest, &by_rest);
            }
        }
        match &input.transform {
            // A gradient changes coordinates as a weight does.
            Some(transform) => transform.undo_weight(SplitInput { kept, rest }, tokens),
            None => rest,
        }
    }
}

/// `[tokens, heads, dim]` to `[heads, tokens, dim]`.
fn heads_first(x: &[f32], tokens: usize, heads: usize, dim: usize) -> Buffer<f32> {
    let mut y = Buffer::new(x.len());
    for_each_chunk(&mut y, tokens * dim, |head, y| {
        let rows = y.chunks_exact_mut(dim).zip(x.chunks_exact(heads * dim));
        rows.for_each(|(y, x)| y.copy_from_slice(&x[head * dim..][..dim]));
    });
    y
}

/// `[heads, tokens, dim]` to `[tokens, heads, dim]`.
fn tokens_first(x: &[f32], tokens: usize, heads: usize, dim: usize) -> Buffer<f32> {
    let mut y = Buffer::new(x.len());
    let some = GRAIN.div_ceil(heads * dim);
    for_each_chunk(&mut y, some * heads * dim, |i, y| {
        for (row, token) in y.chunks_exact_mut(heads * dim).zip(i * some..) {
            let parts = row.chunks_exact_mut(dim).zip(x.chunks_exact(tokens * dim));
            parts.for_each(|(y, x)| y.copy_from_slice(&x[token * dim..][..dim]));
        }
    });
    y
}

/// The quantizer of a site's input.
struct FakeInput {
    width: usize,
    transform: Option<InputTransform>,
    bits: u8,
    levels: Levels,
    clip: f32,
}

impl FakeInput {
    fn new(width: usize, transform: Option<InputTransform>, layer: &QuantLinear) -> Self {
        let QuantLinear { act_bits: bits, act_levels: levels, act_clip: clip, .. } = *layer;
        FakeInput { width, transform, bits, levels, clip }
    }

    fn kept(&self) -> usize {
        self.transform.as_ref().map_or(0, InputTransform::kept)
    }

    /// x: `[tokens, in]`.
    fn coordinates(&self, x: &[f32], tokens: usize) -> SplitInput {
        match &self.transform {
            Some(transform) => transform.apply(x, tokens),
            None => SplitInput { kept: Buffer::default(), rest: Buffer::from(x) },
        }
    }

    /// What the quantizer leaves of kept coordinates, `[tokens, r]`.
    fn round_kept(&self, mut kept: Buffer<f32>, tokens: usize) -> Buffer<f32> {
        if !kept.is_empty() && self.bits < 16 {
            let codes = quantize_acts(&kept, tokens, self.kept(), self.bits.max(KEPT_BITS), 1.0);
            kept.copy_from_slice(&codes.dequantize());
        }
        kept
    }
}

/// What a cache gives back of keys and values, rotated back.
struct FakeCache {
    /// Of keys and of values, `[kv_heads * head_dim]`; empty where there is none.
    center: [Vec<f32>; 2],
    /// Of keys.
    rotation: Option<Rotation>,
    kv: KvFormat,
    heads: usize,
    head_dim: usize,
}

impl FakeCache {
    /// keys, values: `[tokens, kv_heads, head_dim]`; returns `[kv_heads, tokens, head_dim]` of each. The mean key is added again: softmax does not see it.
    fn round(&self, keys: &[f32], values: &[f32]) -> [Buffer<f32>; 2] {
        let FakeCache { center, rotation, kv, heads, head_dim } = self;
        let (tokens, dim) = (keys.len() / (heads * head_dim), *head_dim);
        let mut sides = [Buffer::from(keys), Buffer::from(values)];
        rotation.iter().for_each(|r| r.apply(&mut sides[0], tokens * heads));
        for (x, center) in sides.iter_mut().zip(center).filter(|(_, center)| !center.is_empty()) {
            for_each_chunk(x, center.len(), |_, row| row.iter_mut().zip(center).for_each(|(x, c)| *x -= c));
        }
        let mut cache = KvCache::new(*kv, *heads, dim);
        cache.append(&sides[0], &sides[1]);
        for ((x, center), side) in sides.iter_mut().zip(center).zip([KvSide::Keys, KvSide::Values]) {
            for_each_chunk(x, tokens * dim, |head, x| {
                let mut buffer = Buffer::new(x.len());
                x.copy_from_slice(cache.tile(side, head, 0..tokens, &mut buffer));
                let center = center.get(head * dim..(head + 1) * dim).unwrap_or_default();
                x.chunks_exact_mut(dim).for_each(|row| row.iter_mut().zip(center).for_each(|(x, c)| *x += c));
            });
        }
        rotation.iter().for_each(|r| r.apply_transposed(&mut sides[0], tokens * heads));
        sides
    }
}
