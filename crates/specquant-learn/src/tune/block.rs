//! A quantized block and its gradient, written out: candle's graph of the same took twice the time, most of it outside of products.
//!
//! Forward runs the engine's integer products on the codes; only the way back needs weights in f32, one layer's at a time.

use rayon::prelude::*;
use specquant_kernels::{
    KvCache, KvFormat, KvSide, PackedDense, PackedWeights, exp_in_place, matmul_float, matmul_int, matmul_nn,
    matmul_nt, matmul_packed, quantize_acts, transposed,
};
use specquant_model::{
    Activation, Block, InputTransform, KEPT_BITS, KvCenter, Levels, Linear, ModelConfig, QuantLinear,
    Rotation, Site, SplitInput, quantize_input,
};

use super::{MIN_FACTOR, Param, TuneConfig, TunedBlock};
use crate::block::{K, Q, V};
use crate::error::{Error, Result};
use crate::ops::{CausalSoftmax, FakeQuantWeight, RmsNorm, Rope, activation, backward, forward};

/// Values that one thread takes at least.
const GRAIN: usize = 1 << 14;

/// Changes every value of `y` by that of `x`.
fn zip(y: &mut [f32], x: &[f32], f: impl Fn(&mut f32, f32) + Sync) {
    let chunks = y.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN));
    chunks.for_each(|(y, x)| y.iter_mut().zip(x).for_each(|(y, x)| f(y, *x)));
}

fn add(y: &mut [f32], x: &[f32]) {
    zip(y, x, |y, x| *y += x);
}

/// Multiplies every row by `factors`. x: `[rows, factors]`.
pub(super) fn scaled(x: &[f32], factors: &[f32]) -> Vec<f32> {
    let mut y = x.to_vec();
    let rows = y.par_chunks_exact_mut(factors.len()).with_min_len(GRAIN / factors.len());
    rows.for_each(|row| row.iter_mut().zip(factors).for_each(|(y, f)| *y *= f));
    y
}

/// Σ over rows of x · y, by column. x, y: `[rows, columns]`.
pub(super) fn column_products(x: &[f32], y: &[f32], columns: usize) -> Vec<f32> {
    let mut sums = vec![0.0; columns];
    for (x, y) in x.chunks_exact(columns).zip(y.chunks_exact(columns)) {
        sums.iter_mut().zip(x).zip(y).for_each(|((sum, x), y)| *sum += x * y);
    }
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
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    hidden: usize,
    norm: RmsNorm,
    /// Whether attention and MLP have norms behind them.
    post_norms: bool,
    activation: Activation,
    /// What scores are multiplied by.
    scale: f32,
    window: Option<usize>,
    rope: Rope,
    linears: Vec<Frozen>,
    inputs: Vec<FakeInput>,
    keys: FakeCached,
    values: FakeCached,
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
    kept: Vec<f32>,
    /// Products with the 4-bit weights, before the factors, `[tokens, out]` each.
    products: Vec<Vec<f32>>,
    /// The kept columns, rounded, `[out, r]` each.
    columns: Vec<Vec<f32>>,
}

/// What a norm did.
struct NormSaved {
    /// `[rows, width]`.
    input: Vec<f32>,
    /// Without its weight.
    output: Vec<f32>,
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
    qkv: [Vec<f32>; 3],
    gate: Vec<f32>,
    up: Vec<f32>,
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
        let KvCenter { keys, values } =
            block.kv_center.unwrap_or(KvCenter { keys: Vec::new(), values: Vec::new() });
        let (heads, head_dim) = (model.num_kv_heads, model.head_dim);
        Ok(Layer {
            heads: model.num_heads,
            kv_heads: heads,
            head_dim,
            hidden: model.hidden_size,
            norm: RmsNorm { eps: model.rms_norm_eps },
            post_norms: model.post_norms,
            activation: model.activation,
            scale: model.attention_scale(),
            window: block.window,
            rope: Rope::new(&model.inv_freq(block.window.is_some()), longest, 1),
            linears,
            inputs,
            keys: FakeCached {
                side: KvSide::Keys,
                center: keys,
                rotation: block.rotations.qk,
                kv,
                heads,
                head_dim,
            },
            values: FakeCached { side: KvSide::Values, center: values, rotation: None, kv, heads, head_dim },
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
    pub fn forward(&self, x: &[f32]) -> (Vec<f32>, Saved) {
        let tokens = x.len() / self.hidden;
        let (normed, before) = self.normed(x, 0);
        let (mut qkv, qkv_saved) = self.site(Site::Qkv, normed);
        let mut head_norms = [None, None];
        for (index, weight) in [(Q, &self.q_norm), (K, &self.k_norm)] {
            if let Some(weight) = weight {
                let input = std::mem::take(&mut qkv[index]);
                let output = forward(&self.norm, &input, self.head_dim);
                qkv[index] = scaled(&output, weight);
                head_norms[index] = Some(NormSaved { input, output });
            }
            qkv[index] = forward(&self.rope(index), &qkv[index], self.head_dim);
        }
        qkv[K] = self.keys.round(&qkv[K]);
        qkv[V] = self.values.round(&qkv[V]);
        let heads_first =
            |index: usize| heads_first(&qkv[index], tokens, self.heads_of(index), self.head_dim);
        let qkv = [heads_first(Q), heads_first(K), heads_first(V)];
        let attended = self.attend(&qkv, tokens);
        let (o, o_saved) = self.site(Site::O, tokens_first(&attended, tokens, self.heads, self.head_dim));
        let mut x = x.to_vec();
        let (o, behind_attention) = self.behind(o, 0);
        add(&mut x, &o);

        let (normed, after) = self.normed(&x, 1);
        let (mut inner, gate_up_saved) = self.site(Site::GateUp, normed);
        let up = inner.pop().unwrap_or_default();
        let gate = inner.pop().unwrap_or_default();
        let mut inner = up.clone();
        zip(&mut inner, &gate, |y, g| *y *= activation(self.activation, g).0);
        let (down, down_saved) = self.site(Site::Down, inner);
        let (down, behind_mlp) = self.behind(down, 1);
        add(&mut x, &down);
        let sites = [qkv_saved, o_saved, gate_up_saved, down_saved];
        let out_norms = [behind_attention, behind_mlp];
        (x, Saved { norms: [before, after], out_norms, head_norms, sites, qkv, gate, up })
    }

    /// What attention (0) or MLP (1) adds to the residual stream: its only output, normalized where there is a norm for it.
    fn behind(&self, outputs: Vec<Vec<f32>>, which: usize) -> (Vec<f32>, Option<NormSaved>) {
        let output = outputs.into_iter().next().unwrap_or_default();
        if !self.post_norms {
            return (output, None);
        }
        let (normed, saved) = self.normed(&output, OUT_NORMS + which);
        (normed, Some(saved))
    }

    /// The gradient by the output that [`Layer::behind`] was given.
    fn behind_backward(
        &self,
        which: usize,
        saved: &Saved,
        g: &[f32],
        by_params: &mut [Vec<f32>],
    ) -> Vec<f32> {
        match &saved.out_norms[which] {
            Some(norm) => self.norm_backward(OUT_NORMS + which, norm, g.to_vec(), by_params),
            None => g.to_vec(),
        }
    }

    /// The gradients by the input, `[tokens, hidden]`, and by what is learned, given that by the output.
    pub fn backward(&self, saved: &Saved, gy: Vec<f32>) -> (Vec<f32>, Vec<Vec<f32>>) {
        let tokens = gy.len() / self.hidden;
        let mut by_params = vec![Vec::new(); self.params.len()];
        let g = self.behind_backward(1, saved, &gy, &mut by_params);
        let g_inner = self.site_backward(Site::Down, &saved.sites[3], &[&g], &mut by_params);
        let (mut g_gate, mut g_up) = (g_inner.clone(), g_inner);
        zip(&mut g_up, &saved.gate, |g, gate| *g *= activation(self.activation, gate).0);
        zip(&mut g_gate, &saved.up, |g, up| *g *= up);
        zip(&mut g_gate, &saved.gate, |g, gate| *g *= activation(self.activation, gate).1);
        let g = self.site_backward(Site::GateUp, &saved.sites[2], &[&g_gate, &g_up], &mut by_params);
        let mut gx = self.norm_backward(1, &saved.norms[1], g, &mut by_params);
        add(&mut gx, &gy);

        let g = self.behind_backward(0, saved, &gx, &mut by_params);
        let g = self.site_backward(Site::O, &saved.sites[1], &[&g], &mut by_params);
        let g = heads_first(&g, tokens, self.heads, self.head_dim);
        let mut g = self.attend_backward(&saved.qkv, &g, tokens);
        for index in [Q, K, V] {
            g[index] = tokens_first(&g[index], tokens, self.heads_of(index), self.head_dim);
        }
        for (index, weight) in [(Q, &self.q_norm), (K, &self.k_norm)] {
            g[index] = backward(&self.rope(index), &g[index], &g[index], &g[index], self.head_dim);
            if let (Some(weight), Some(norm)) = (weight, &saved.head_norms[index]) {
                let by_output = scaled(&g[index], weight);
                g[index] = backward(&self.norm, &norm.input, &norm.output, &by_output, self.head_dim);
            }
        }
        let g = self.site_backward(Site::Qkv, &saved.sites[0], &[&g[Q], &g[K], &g[V]], &mut by_params);
        let g = self.norm_backward(0, &saved.norms[0], g, &mut by_params);
        add(&mut gx, &g);
        (gx, by_params)
    }

    fn heads_of(&self, index: usize) -> usize {
        if index == Q { self.heads } else { self.kv_heads }
    }

    fn rope(&self, index: usize) -> Rope {
        Rope { heads: self.heads_of(index), ..self.rope.clone() }
    }

    fn normed(&self, x: &[f32], index: usize) -> (Vec<f32>, NormSaved) {
        let output = forward(&self.norm, x, self.hidden);
        (scaled(&output, &self.params[index].values), NormSaved { input: x.to_vec(), output })
    }

    fn norm_backward(
        &self,
        index: usize,
        saved: &NormSaved,
        g: Vec<f32>,
        by_params: &mut [Vec<f32>],
    ) -> Vec<f32> {
        by_params[index] = column_products(&g, &saved.output, self.hidden);
        let g = scaled(&g, &self.params[index].values);
        backward(&self.norm, &saved.input, &saved.output, &g, self.hidden)
    }

    /// The outputs of a site's layers. x: `[tokens, in]`.
    fn site(&self, site: Site, x: Vec<f32>) -> (Vec<Vec<f32>>, SiteSaved) {
        let input = &self.inputs[site as usize];
        let (tokens, r) = (x.len() / input.width, input.kept());
        let SplitInput { kept, rest } = input.coordinates(x, tokens);
        let mut saved = SiteSaved {
            kept: input.round_kept(kept.into_vec(), tokens),
            products: Vec::new(),
            columns: Vec::new(),
        };
        let codes =
            (input.bits < 16).then(|| quantize_input(&rest, tokens, input.bits, input.levels, input.clip));
        let outputs = LAYERS[site as usize].clone().map(|index| {
            let Frozen { weights, bias } = &self.linears[index];
            let out = weights.out_features();
            let mut products = vec![0.0; tokens * out];
            match &codes {
                Some(codes) => matmul_int(codes, weights, &mut products),
                None => matmul_float(&rest, tokens, weights, &mut products),
            }
            let mut y = scaled(&products, &self.params[FACTORS + index].values);
            let mut columns = Vec::new();
            if r > 0 {
                columns = forward(&FakeQuantWeight { bits: KEPT_BITS }, &self.params[KEPT + index].values, r);
                matmul_nt(&saved.kept, &columns, &mut y, tokens, r, out, true);
            }
            if let Some(bias) = bias {
                let rows = y.par_chunks_exact_mut(out);
                rows.for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
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
    ) -> Vec<f32> {
        let input = &self.inputs[site as usize];
        let r = input.kept();
        let tokens = gy[0].len() / self.linears[LAYERS[site as usize].start].weights.out_features();
        let mut rest = vec![0.0; tokens * (input.width - r)];
        let mut kept = vec![0.0; tokens * r];
        let kept_first = transposed(&saved.kept, tokens, r);
        for ((i, index), gy) in LAYERS[site as usize].clone().enumerate().zip(gy) {
            let weights = &self.linears[index].weights;
            let out = weights.out_features();
            by_params[FACTORS + index] = column_products(gy, &saved.products[i], out);
            if r > 0 {
                let mut by_columns = vec![0.0; r * out];
                matmul_nn(&kept_first, gy, &mut by_columns, r, tokens, out, false);
                by_params[KEPT + index] = transposed(&by_columns, r, out);
                matmul_nn(gy, &saved.columns[i], &mut kept, tokens, out, r, true);
            }
            let weights = PackedDense::pack_transposed(&weights.dequantize(), input.width - r, out);
            let mut by_rest = vec![0.0; rest.len()];
            let gy = scaled(gy, &self.params[FACTORS + index].values);
            matmul_packed(&gy, &weights, &mut by_rest, tokens);
            add(&mut rest, &by_rest);
        }
        match &input.transform {
            // A gradient changes coordinates as a weight does.
            Some(transform) => {
                transform.undo_weight(SplitInput { kept: kept.into(), rest: rest.into() }, tokens)
            }
            None => rest,
        }
    }

    /// Attention weights of the queries of head `head`, `[tokens, tokens]`. q, k: `[tokens, head_dim]`.
    fn weights(&self, q: &[f32], k: &[f32], tokens: usize) -> (Vec<f32>, Vec<f32>, CausalSoftmax) {
        let softmax = CausalSoftmax { tokens, scale: self.scale, window: self.window, exp: exp_in_place };
        let mut scores = vec![0.0; tokens * tokens];
        matmul_nt(q, k, &mut scores, tokens, self.head_dim, tokens, false);
        let weights = forward(&softmax, &scores, tokens);
        (scores, weights, softmax)
    }

    /// A query head and its KV head: query, key, value, `[tokens, head_dim]` each.
    fn head<'a>(&self, qkv: &'a [Vec<f32>; 3], head: usize, tokens: usize) -> [&'a [f32]; 3] {
        let size = tokens * self.head_dim;
        let kv = head / (self.heads / self.kv_heads);
        [&qkv[Q][head * size..][..size], &qkv[K][kv * size..][..size], &qkv[V][kv * size..][..size]]
    }

    /// `[heads, tokens, head_dim]`.
    fn attend(&self, qkv: &[Vec<f32>; 3], tokens: usize) -> Vec<f32> {
        let mut y = vec![0.0; qkv[Q].len()];
        y.par_chunks_exact_mut(tokens * self.head_dim).enumerate().for_each(|(head, y)| {
            let [q, k, v] = self.head(qkv, head, tokens);
            let (_, weights, _) = self.weights(q, k, tokens);
            matmul_nn(&weights, v, y, tokens, tokens, self.head_dim, false);
        });
        y
    }

    /// Gradients by query, key and value, heads first. gy: `[heads, tokens, head_dim]`.
    fn attend_backward(&self, qkv: &[Vec<f32>; 3], gy: &[f32], tokens: usize) -> [Vec<f32>; 3] {
        let (dim, size) = (self.head_dim, tokens * self.head_dim);
        let by_head: Vec<[Vec<f32>; 3]> = gy
            .par_chunks_exact(size)
            .enumerate()
            .map(|(head, gy)| {
                let [q, k, v] = self.head(qkv, head, tokens);
                let (scores, weights, softmax) = self.weights(q, k, tokens);
                let mut g = [vec![0.0; size], Vec::new(), Vec::new()];
                // Wᵀ y as (yᵀ W)ᵀ, where only what is narrow is transposed.
                let against = |y: &[f32], weights: &[f32]| {
                    let mut product = vec![0.0; size];
                    matmul_nn(&transposed(y, tokens, dim), weights, &mut product, dim, tokens, tokens, false);
                    transposed(&product, dim, tokens)
                };
                g[V] = against(gy, &weights);
                let mut by_weights = vec![0.0; tokens * tokens];
                matmul_nt(gy, v, &mut by_weights, tokens, dim, tokens, false);
                let by_scores = backward(&softmax, &scores, &weights, &by_weights, tokens);
                matmul_nn(&by_scores, k, &mut g[Q], tokens, tokens, dim, false);
                g[K] = against(q, &by_scores);
                g
            })
            .collect();
        let mut g = [Vec::with_capacity(gy.len()), vec![0.0; qkv[K].len()], vec![0.0; qkv[V].len()]];
        for (head, parts) in by_head.iter().enumerate() {
            let kv = head / (self.heads / self.kv_heads) * size;
            g[Q].extend_from_slice(&parts[Q]);
            add(&mut g[K][kv..kv + size], &parts[K]);
            add(&mut g[V][kv..kv + size], &parts[V]);
        }
        g
    }
}

/// `[tokens, heads, dim]` to `[heads, tokens, dim]`.
fn heads_first(x: &[f32], tokens: usize, heads: usize, dim: usize) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for head in 0..heads {
        (0..tokens).for_each(|token| y.extend_from_slice(&x[(token * heads + head) * dim..][..dim]));
    }
    y
}

/// `[heads, tokens, dim]` to `[tokens, heads, dim]`.
fn tokens_first(x: &[f32], tokens: usize, heads: usize, dim: usize) -> Vec<f32> {
    heads_first(x, heads, tokens, dim)
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
    fn coordinates(&self, x: Vec<f32>, tokens: usize) -> SplitInput {
        match &self.transform {
            Some(transform) => transform.apply(&x, tokens),
            None => SplitInput { kept: Vec::new().into(), rest: x.into() },
        }
    }

    /// What the quantizer leaves of kept coordinates, `[tokens, r]`.
    fn round_kept(&self, kept: Vec<f32>, tokens: usize) -> Vec<f32> {
        if kept.is_empty() || self.bits == 16 {
            return kept;
        }
        quantize_acts(&kept, tokens, self.kept(), self.bits.max(KEPT_BITS), 1.0).dequantize()
    }
}

/// What a cache gives back of keys or values, rotated back.
struct FakeCached {
    side: KvSide,
    /// `[kv_heads * head_dim]`, or empty.
    center: Vec<f32>,
    rotation: Option<Rotation>,
    kv: KvFormat,
    heads: usize,
    head_dim: usize,
}

impl FakeCached {
    /// x: `[tokens, kv_heads, head_dim]`. The mean key is added again: softmax does not see it.
    fn round(&self, x: &[f32]) -> Vec<f32> {
        let (width, n) = (self.heads * self.head_dim, x.len() / self.head_dim);
        let mut x = x.to_vec();
        let add_center = |x: &mut [f32], sign: f32| {
            if !self.center.is_empty() {
                let rows = x.chunks_exact_mut(width);
                rows.for_each(|row| row.iter_mut().zip(&self.center).for_each(|(x, c)| *x += sign * c));
            }
        };
        self.rotation.iter().for_each(|r| r.apply(&mut x, n));
        add_center(&mut x, -1.0);
        let mut cache = KvCache::new(self.kv, self.heads, self.head_dim);
        match self.side {
            KvSide::Keys => cache.append(&x, &vec![0.0; x.len()]),
            KvSide::Values => cache.append(&vec![0.0; x.len()], &x),
        }
        let mut buffer = vec![0.0; cache.len() * self.head_dim];
        for head in 0..self.heads {
            let tile = cache.tile(self.side, head, 0..cache.len(), &mut buffer).chunks_exact(self.head_dim);
            let to = x.chunks_exact_mut(self.head_dim).skip(head).step_by(self.heads);
            to.zip(tile).for_each(|(to, row)| to.copy_from_slice(row));
        }
        add_center(&mut x, 1.0);
        self.rotation.iter().for_each(|r| r.apply_transposed(&mut x, n));
        x
    }
}
