//! A whole model: embeddings, blocks, head, and the batch that runs through them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use smallvec::SmallVec;
use specquant_kernels as kernels;
use specquant_kernels::{Buffer, KvCache, KvFormat};

use crate::block::{Block, FEW_SPANS, KvCenter, RopeTable, Site, Span};
use crate::checkpoint::QuantizationConfig;
use crate::linear::{DenseLinear, DenseWeight, Linear};
use crate::stored_branch::read_basis;
use crate::stored_linear::{read_bias, read_linear};
use crate::stored_transform::{read_act_clip, read_key_transform, read_transform};
use crate::{Error, InputTransform, MappedMatrix, ModelConfig, Result, Rotations, Source};

/// Rows of logits computed at a time: `64 × 49152` f32 are 12 MiB, which the thread's free buffers keep.
const LOGIT_ROWS: usize = 64;
/// Values that one thread looks at.
const FINITE_VALUES: usize = 1 << 16;

/// Token embeddings, read a row at a time from the memory map.
pub struct Embedding(MappedMatrix);

impl Embedding {
    /// Reads `model.embed_tokens`.
    ///
    /// # Errors
    /// When the tensor is missing or has another shape.
    pub fn read(source: &Source) -> Result<Self> {
        let config = source.config();
        MappedMatrix::read(source, "model.embed_tokens", [config.vocab_size, config.hidden_size])
            .map(Embedding)
    }

    /// What goes into the first block for `ids`: their rows times [`ModelConfig::embedding_scale`], `[ids, hidden]`.
    ///
    /// # Errors
    /// As [`Embedding::rows`].
    pub fn lookup(&self, ids: &[u32], config: &ModelConfig) -> Result<Buffer<f32>> {
        let mut x = self.rows(ids, config.hidden_size)?;
        config.scale_embeddings(&mut x);
        Ok(x)
    }

    /// The rows of `ids` as the matrix has them, `[ids, hidden]`.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id outside the vocabulary; [`Error::NotFinite`] for a row that is damaged.
    pub fn rows(&self, ids: &[u32], hidden: usize) -> Result<Buffer<f32>> {
        let Embedding(matrix) = self;
        let vocab = matrix.rows();
        let mut x = Buffer::new(ids.len() * hidden);
        for (&id, row) in ids.iter().zip(x.chunks_exact_mut(hidden)) {
            let i = id as usize;
            if i >= vocab {
                return Err(Error::TokenId { id, vocab });
            }
            matrix.rows_f32(i..i + 1, row)?;
            if let (MappedMatrix::Float(view), Some(col)) = (matrix, row.iter().position(|x| !x.is_finite()))
            {
                return Err(view.not_finite(i, col, row[col]));
            }
        }
        Ok(x)
    }
}

/// Final norm and vocabulary projection.
pub struct Head {
    /// RMSNorm weight, `[hidden]`.
    pub norm: Vec<f32>,
    /// `[vocab, hidden]`; the embedding itself where they are tied.
    pub linear: Linear,
}

impl Head {
    /// Reads `model.norm` and `lm_head` (or the tied embedding).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn read(source: &Source) -> Result<Self> {
        let config = source.config();
        let name = if config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let weight = DenseWeight::Mapped(MappedMatrix::read(source, name, [vocab, hidden])?);
        let bias = read_bias(source, name, vocab)?;
        let linear = Linear::Dense(DenseLinear { out: vocab, inp: hidden, weight, bias });
        Ok(Head { norm: norm(source, "model.norm.weight", hidden)?, linear })
    }
}

/// A norm weight of the given width.
fn norm(source: &Source, name: &str, width: usize) -> Result<Vec<f32>> {
    let view = source.tensor(name)?;
    if view.shape != [width] {
        let file = source.path().display();
        return Err(Error::Checkpoint(format!(
            "{file}: tensor {name} has shape {:?} instead of [{width}]",
            view.shape
        )));
    }
    view.to_f32()
}

impl Block {
    /// Reads block `index`. Dense weights stay on the memory map.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, or is out of range.
    pub fn read(source: &Source, index: usize, quant: Option<&QuantizationConfig>) -> Result<Self> {
        let c = source.config();
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let (wide, narrow) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let prefix = format!("model.layers.{index}");
        let center = |name: &str| norm(source, &format!("{prefix}.self_attn.{name}"), narrow);
        let centered = ["k_center", "v_center"].map(|name| source.has(&format!("{prefix}.self_attn.{name}")));
        let kv_center = match centered.contains(&true) {
            true => Some(KvCenter { keys: center("k_center")?, values: center("v_center")? }),
            false => None,
        };
        let (mut inputs, mut bases) = ([const { None }; 4], [const { None }; 4]);
        let mut schemes = [quant.map(|q| q.scheme); 4];
        for site in Site::ALL {
            let (i, n) = (site as usize, c.site_width(site));
            inputs[i] = read_transform(source, quant, &prefix, site, n)?;
            let kept = inputs[i].as_ref().map_or(0, InputTransform::kept);
            bases[i] = read_basis(source, quant, &prefix, site, n - kept)?;
            if let Some(scheme) = &mut schemes[i] {
                scheme.act_clip = read_act_clip(source, &prefix, site)?.unwrap_or(scheme.act_clip);
            }
        }
        let linear = |name: &str, shape, site: Site| {
            let i = site as usize;
            let quant = schemes[i].as_ref().zip(quant.map(|q| q.branch_basis));
            read_linear(
                source,
                quant,
                &format!("{prefix}.{name}"),
                shape,
                bases[i].as_ref(),
                inputs[i].as_ref(),
            )
        };
        let norms = c.norm_shapes().into_iter();
        let norms = norms.map(|(name, width)| norm(source, &format!("{prefix}.{name}.weight"), width));
        let mut norms = norms.collect::<Result<Vec<_>>>()?.into_iter();
        let mut next = || norms.next().unwrap_or_default();
        Ok(Block {
            // In the order of `norm_shapes`.
            input_norm: next(),
            mlp_norm: next(),
            out_norms: c.post_norms.then(|| [next(), next()]),
            q_norm: c.qk_norm.then(&mut next),
            k_norm: c.qk_norm.then(&mut next),
            q: linear("self_attn.q_proj", [wide, hidden], Site::Qkv)?,
            k: linear("self_attn.k_proj", [narrow, hidden], Site::Qkv)?,
            v: linear("self_attn.v_proj", [narrow, hidden], Site::Qkv)?,
            o: linear("self_attn.o_proj", [hidden, wide], Site::O)?,
            gate: linear("mlp.gate_proj", [inner, hidden], Site::GateUp)?,
            up: linear("mlp.up_proj", [inner, hidden], Site::GateUp)?,
            down: linear("mlp.down_proj", [hidden, inner], Site::Down)?,
            window: c.sliding_window.get(index).copied().flatten(),
            rotations: Rotations {
                keys: read_key_transform(source, quant, &prefix, c.head_dim)?,
                ..quant.map_or_else(Rotations::default, |q| Rotations::new(&q.online_rotations, c))
            },
            inputs,
            kv_center,
        })
    }
}

/// A loaded model.
pub struct Model {
    /// Architecture.
    pub config: ModelConfig,
    /// Present in a SpecQuant checkpoint.
    pub quantization: Option<QuantizationConfig>,
    embedding: Embedding,
    blocks: Vec<Block>,
    head: Head,
    /// Of layers without a window, and of those with one where they differ.
    inv_freq: (Vec<f32>, Option<Vec<f32>>),
    kv_format: KvFormat,
    any_order: bool,
}

/// The tokens of one sequence so far, as keys and values.
pub struct Sequence {
    caches: Vec<KvCache>,
}

impl Sequence {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.caches.first().map_or(0, KvCache::len)
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.caches.iter_mut().for_each(|c| c.truncate(len));
    }

    /// Bytes of the cache.
    pub fn bytes(&self) -> usize {
        self.caches.iter().map(KvCache::bytes).sum()
    }
}

/// Dense models up to this size are widened for decoding.
const WIDEN_BYTES: usize = 4 << 30;

impl Model {
    /// Opens a Hugging Face directory, a GGUF file or a SpecQuant checkpoint.
    ///
    /// # Errors
    /// Everything that is wrong with the files; see [`Error`].
    pub fn open(path: &Path) -> Result<Self> {
        Model::load(&Source::open(path)?)
    }

    /// Builds the model that `source` holds.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, or is out of range.
    pub fn load(source: &Source) -> Result<Self> {
        let quantization = QuantizationConfig::from_config(source.config_json(), source.path())?;
        let config = source.config().clone();
        let blocks: Vec<Result<Block>> = (0..config.num_layers)
            .into_par_iter()
            .map(|i| Block::read(source, i, quantization.as_ref()))
            .collect();
        // Of several errors the first, whatever the threads did.
        let blocks = blocks.into_iter().collect::<Result<_>>()?;
        let kv_format = quantization.as_ref().map_or(KvFormat::F32, |q| q.scheme.kv_format());
        Ok(Model {
            embedding: Embedding::read(source)?,
            blocks,
            head: Head::read(source)?,
            inv_freq: (config.inv_freq(false), config.local_rope_theta.map(|_| config.inv_freq(true))),
            kv_format,
            any_order: false,
            quantization,
            config,
        })
    }

    /// As [`Model::load`], for a model that is to run for long: dense weights are widened once, as long as that takes no more than 4 GiB, a
    /// constant, so that what a model writes for its calibration does not depend on the machine's memory.
    ///
    /// # Errors
    /// As [`Model::load`], and when a weight is not finite.
    pub fn load_for_decoding(source: &Source) -> Result<Self> {
        let mut model = Model::load(source)?;
        if model.widened_bytes() <= WIDEN_BYTES {
            model.widen()?;
        }
        Ok(model)
    }

    /// Packs every dense weight now instead of widening it at each use: faster, for 4 bytes a weight while that is done, of int8 ones 1.
    ///
    /// # Errors
    /// When a weight is not finite.
    pub fn widen(&mut self) -> Result<()> {
        let blocks = self.blocks.iter_mut().flat_map(Block::linears_mut);
        blocks.chain([&mut self.head.linear]).try_for_each(Linear::pack)
    }

    /// Bytes that [`Model::widen`] would take.
    pub fn widened_bytes(&self) -> usize {
        let linears = self.blocks.iter().flat_map(|b| b.linears().map(|(_, l)| l)).chain([&self.head.linear]);
        let bytes = |l: &Linear| match l {
            Linear::Dense(DenseLinear {
                weight: DenseWeight::Mapped(MappedMatrix::Int8 { .. }),
                out,
                inp,
                ..
            }) => out * inp,
            Linear::Dense(d) => 4 * d.out * d.inp,
            Linear::Quantized(_) => 0,
        };
        linears.map(bytes).sum()
    }

    /// Changes the rotary frequencies, in radians per position. By default they are those of the configuration in f32; an engine that
    /// casts the whole model to 16 bits rounds them too, and comparing with it needs its values.
    pub fn map_inv_freq(&mut self, f: impl Fn(f32) -> f32) {
        let (full, local) = &mut self.inv_freq;
        full.iter_mut().chain(local.iter_mut().flatten()).for_each(|freq| *freq = f(*freq));
    }

    /// Replaces the storage of KV caches that are made from now on.
    pub fn set_kv_format(&mut self, format: KvFormat) {
        self.kv_format = format;
    }

    /// Storage of KV caches.
    pub fn kv_format(&self) -> KvFormat {
        self.kv_format
    }

    /// Whether sequences that are made from now on add up in the order that suits the processor ([`KvCache::with_any_order`]): prompts are faster with
    /// AVX-512 VNNI and AMX. What rounds to 4 bits at every layer makes of another last bit another text, as good as the one of other processors but not the same; so that this
    /// is for writing text, not for measuring a model.
    pub fn set_any_order(&mut self, any: bool) {
        self.any_order = any;
    }

    /// An empty sequence.
    pub fn sequence(&self) -> Sequence {
        let (heads, width) = (self.config.num_kv_heads, self.config.head_dim);
        let cache = || KvCache::new(self.kv_format, heads, width).with_any_order(self.any_order);
        Sequence { caches: self.blocks.iter().map(|_| cache()).collect() }
    }

    /// Runs the next tokens of several sequences and returns their final hidden states, normalized, `[all tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id outside the vocabulary; then no sequence has changed.
    pub fn hidden(&self, batch: &mut [(&mut Sequence, &[u32])]) -> Result<Buffer<f32>> {
        let tokens = batch.iter().map(|(_, ids)| ids.len()).sum();
        self.hidden_of(batch, &Vec::from_iter(0..tokens))
    }

    /// As [`Model::hidden`], of some of the tokens only, `[rows, hidden]`: the others need no more of the last block than its
    /// keys and values. rows: token numbers within the batch.
    ///
    /// # Errors
    /// As [`Model::hidden`].
    ///
    /// # Panics
    /// When a row is not in the batch.
    pub fn hidden_of(&self, batch: &mut [(&mut Sequence, &[u32])], rows: &[usize]) -> Result<Buffer<f32>> {
        let hidden = self.forward(batch, rows);
        if batch.iter().any(|(_, ids)| ids.len() > 1) {
            kernels::trim_buffers();
        }
        hidden
    }

    /// [`Model::hidden_of`], which gives a prompt's memory back.
    fn forward(&self, batch: &mut [(&mut Sequence, &[u32])], rows: &[usize]) -> Result<Buffer<f32>> {
        let mut ids = Buffer::new(batch.iter().map(|(_, ids)| ids.len()).sum());
        let each = batch.iter().flat_map(|(_, ids)| ids.iter());
        ids.iter_mut().zip(each).for_each(|(to, id)| *to = *id);
        let mut x = self.embedding.lookup(&ids, &self.config)?;
        if ids.is_empty() {
            return Ok(x);
        }
        let positions = batch.iter().flat_map(|(sequence, ids)| sequence.len()..sequence.len() + ids.len());
        let (full, local) = &self.inv_freq;
        let local = local.as_ref().map(|freq| RopeTable::new(freq, positions.clone()));
        let full = RopeTable::new(full, positions);
        for (layer, block) in self.blocks.iter().enumerate() {
            let mut spans: SmallVec<[Span; FEW_SPANS]> = batch
                .iter_mut()
                .filter(|(_, ids)| !ids.is_empty())
                .map(|(sequence, ids)| Span { rows: ids.len(), cache: &mut sequence.caches[layer] })
                .collect();
            let rope = local.as_ref().filter(|_| block.window.is_some()).unwrap_or(&full);
            let observe = &mut |_: Site, _: &[f32]| ();
            let mut attended = block.attention(&self.config, rope, &x, &mut spans, observe)?;
            if layer + 1 == self.blocks.len() && !rows.iter().copied().eq(0..ids.len()) {
                if rows.is_empty() {
                    return Ok(Buffer::default());
                }
                attended = gather(&attended, attended.len() / ids.len(), rows);
                x = gather(&x, self.config.hidden_size, rows);
            }
            block.finish(&self.config, &mut x, &attended, observe)?;
        }
        let mut normed = Buffer::new(x.len());
        kernels::rms_norm(&x, &self.head.norm, self.config.rms_norm_eps, &mut normed);
        Ok(normed)
    }

    /// Logits of some rows of [`Model::hidden`]. hidden: `[rows, hidden]`; returns `[rows, vocab]`.
    ///
    /// # Errors
    /// When a mapped weight cannot be widened.
    pub fn logits(&self, hidden: &[f32]) -> Result<Buffer<f32>> {
        if hidden.is_empty() {
            return Ok(Buffer::default());
        }
        self.head.linear.forward(hidden, hidden.len() / self.config.hidden_size)
    }

    /// `f(row, logits)` of every row of `hidden`, in order; a few rows of logits at a time, so that a long window's logits are never
    /// all in memory, on all threads.
    ///
    /// # Errors
    /// When a mapped weight cannot be widened.
    pub fn map_logits<T: Send>(
        &self,
        hidden: &[f32],
        f: impl Fn(usize, &[f32]) -> T + Sync,
    ) -> Result<Vec<T>> {
        let mut results = Vec::with_capacity(hidden.len() / self.config.hidden_size);
        for rows in hidden.chunks(LOGIT_ROWS * self.config.hidden_size) {
            let (first, logits) = (results.len(), self.logits(rows)?);
            let rows = logits.par_chunks_exact(self.config.vocab_size).enumerate();
            results.par_extend(rows.map(|(i, row)| f(first + i, row)));
        }
        Ok(results)
    }

    /// The logits after the last token of each sequence, `[batch, vocab]`.
    ///
    /// # Errors
    /// As [`Model::hidden`]; [`Error::NoTokens`] when an entry has none; [`Error::NotFiniteStates`].
    pub fn next_logits(&self, batch: &mut [(&mut Sequence, &[u32])]) -> Result<Buffer<f32>> {
        if batch.iter().any(|(_, ids)| ids.is_empty()) {
            return Err(Error::NoTokens);
        }
        let ends = batch.iter().scan(0, |end, (_, ids)| {
            *end += ids.len();
            Some(*end - 1)
        });
        let last = self.hidden_of(batch, &SmallVec::<[usize; FEW_SPANS]>::from_iter(ends))?;
        let logits = self.logits(&last)?;
        // A finite state can still overflow in the head.
        if all_finite(&last) && all_finite(&logits) { Ok(logits) } else { Err(Error::NotFiniteStates) }
    }

    /// Decoder blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }
}

/// Some rows of `x`, `[rows, width]`.
fn gather(x: &[f32], width: usize, rows: &[usize]) -> Buffer<f32> {
    let mut gathered = Buffer::new(rows.len() * width);
    let each = gathered.chunks_exact_mut(width).zip(rows);
    each.for_each(|(to, row)| to.copy_from_slice(&x[row * width..][..width]));
    gathered
}

/// Without a branch, which makes it vector code.
pub(crate) fn finite_part(x: &[f32]) -> bool {
    x.iter().fold(true, |finite, v| finite & v.is_finite())
}

fn all_finite(x: &[f32]) -> bool {
    let finite = AtomicBool::new(true);
    kernels::for_each_index(x.len().div_ceil(FINITE_VALUES), |i| {
        let part = &x[i * FINITE_VALUES..x.len().min((i + 1) * FINITE_VALUES)];
        if !finite_part(part) {
            finite.store(false, Ordering::Relaxed);
        }
    });
    finite.into_inner()
}
