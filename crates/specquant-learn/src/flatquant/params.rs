//! FlatQuant's parameters: where they start, and how they are stepped.

use candle_core::{Result as Candle, Tensor, Var, backprop::GradStore};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use specquant_kernels::Kronecker;
use specquant_model::{ModelConfig, Site};

use super::FlatQuantConfig;
use super::ops::cayley;
use crate::adam::Adam;
use crate::error::{Result, check_len};
use crate::omniquant::BlockWeights;
use crate::ops::{tensor, to_vec};
use crate::stiefel::orthonormal;

/// Lower bound of the maxima and the diagonals that learning starts from (llama_utils.py, `get_init_scale`).
const MIN_MAXIMUM: f32 = 1e-5;
/// c at the start: sigmoid(4) = 0.982 (flat_linear.py, quant_utils.py).
const CLIP: f32 = 4.0;
/// Share of the rate that a parameter loses in a step: torch's default for AdamW.
const WEIGHT_DECAY: f64 = 0.01;
/// The last learning rate, as a share of that of the transforms (train_utils.py, `eta_min`).
const LAST_RATE: f64 = 1e-3;

/// The parameters of an invertible matrix U diag(s) Vᵀ.
pub(super) struct Square {
    u: usize,
    v: usize,
    s: usize,
}

impl Square {
    /// P and P⁻ᵀ, `[n, n]`.
    pub fn matrices(&self, vars: &[Tensor]) -> Candle<(Tensor, Tensor)> {
        let (u, v) = (cayley(&vars[self.u])?, cayley(&vars[self.v])?.t()?);
        let s = &vars[self.s];
        Ok((u.broadcast_mul(s)?.matmul(&v)?, u.broadcast_div(s)?.matmul(&v)?))
    }
}

/// Which parameter is what.
pub(super) struct Layout {
    /// P₁ and P₂ of every site, in the order of [`Site::ALL`]; at [`Site::O`] Pₒ alone.
    pub inputs: [(Square, Option<Square>); 4],
    /// d of every site.
    pub diagonals: [Option<usize>; 4],
    /// Pᵥ.
    pub values: Square,
    /// Pₖ, where keys are quantized.
    pub keys: Option<Square>,
    /// c of every layer's rows.
    pub weight_clip: [usize; 7],
    /// c of every site's input.
    pub act_clip: [usize; 4],
}

/// A parameter tensor.
struct Param {
    values: Vec<f32>,
    shape: Vec<usize>,
    lr: f64,
    optimizer: Adam,
}

/// All of a block's.
pub(super) struct Params {
    all: Vec<Param>,
    /// The last learning rate.
    last: f64,
}

impl Params {
    pub fn new(
        weights: &BlockWeights,
        model: &ModelConfig,
        layer: usize,
        act_max: [&[f32]; 4],
        config: &FlatQuantConfig,
        rng: &mut ChaCha8Rng,
    ) -> Result<(Self, Layout)> {
        let shapes = model.linear_shapes(layer);
        let mut params = Params { all: Vec::new(), last: config.lr * LAST_RATE };
        let mut diagonals = [None; 4];
        for (i, (site, max)) in Site::ALL.into_iter().zip(act_max).enumerate() {
            let inp = model.site_width(site);
            check_len(format!("act_max of {}", site.name()), max.len(), &[inp])?;
            if site == Site::O {
                continue;
            }
            let mut weight_max = vec![0.0f32; inp];
            for ((name, _), (w, _)) in shapes.iter().zip(weights.linears) {
                if site.layers().iter().any(|layer| name.ends_with(layer)) {
                    let rows = w.chunks_exact(inp);
                    rows.for_each(|row| {
                        weight_max.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(w.abs()))
                    });
                }
            }
            let start = max.iter().zip(weight_max).map(|(x, w)| {
                (w.powf(1.0 - config.alpha) / x.max(MIN_MAXIMUM).powf(config.alpha)).max(MIN_MAXIMUM)
            });
            diagonals[i] = Some(params.add(start.collect(), vec![inp], config.lr));
        }
        let (head_dim, heads) = (model.head_dim, model.num_heads);
        let mut square = |n: usize| params.square(n, config.lr, rng);
        let mut site = |n: usize| -> Result<(Square, Option<Square>)> {
            let (n1, n2) = Kronecker::widths(n);
            Ok((square(n1)?, Some(square(n2)?)))
        };
        let [qkv, gate_up, down] = [Site::Qkv, Site::GateUp, Site::Down].map(|s| site(model.site_width(s)));
        let o = (square(heads)?, None);
        let inputs = [qkv?, o, gate_up?, down?];
        let values = square(head_dim)?;
        let keys = if config.kv_bits < 16 { Some(square(head_dim)?) } else { None };
        let mut clip = |n: usize| params.add(vec![CLIP; n], vec![n], config.clip_lr);
        let weight_clip = std::array::from_fn(|i| clip(shapes[i].1[0]));
        let act_clip = std::array::from_fn(|_| clip(1));
        Ok((params, Layout { inputs, diagonals, values, keys, weight_clip, act_clip }))
    }

    fn add(&mut self, values: Vec<f32>, shape: Vec<usize>, lr: f64) -> usize {
        let optimizer = Adam::new(lr, values.len());
        self.all.push(Param { values, shape, lr, optimizer });
        self.all.len() - 1
    }

    /// U and V from random orthonormal matrices, s = 1.
    fn square(&mut self, n: usize, lr: f64, rng: &mut ChaCha8Rng) -> Result<Square> {
        let mut random = || -> Result<Vec<f32>> {
            Ok(to_vec(&orthonormal(&tensor((0..n * n).map(|_| normal(rng)).collect(), (n, n))?)?)?)
        };
        let (u, v) = (random()?, random()?);
        let (u, v) = (self.add(u, vec![n, n], lr), self.add(v, vec![n, n], lr));
        Ok(Square { u, v, s: self.add(vec![1.0; n], vec![n], lr) })
    }

    pub fn vars(&self) -> Candle<Vec<Tensor>> {
        let var = |p: &Param| Ok(Var::from_tensor(&tensor(p.values.clone(), p.shape.clone())?)?.into_inner());
        self.all.iter().map(var).collect()
    }

    pub fn values(&self, index: usize) -> &[f32] {
        &self.all[index].values
    }

    /// A value that is none.
    pub fn not_finite(&self) -> Option<f32> {
        self.all.iter().flat_map(|p| &p.values).copied().find(|v| !v.is_finite())
    }

    /// A step of AdamW (torch: the decay first). progress: the share of all steps that are done.
    pub fn step(&mut self, vars: &[Tensor], gradients: &GradStore, progress: f64) -> Candle<()> {
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        for (param, var) in self.all.iter_mut().zip(vars) {
            let Some(gradient) = gradients.get(var) else { continue };
            let lr = self.last + (param.lr - self.last) * cosine;
            let decay = (1.0 - lr * WEIGHT_DECAY) as f32;
            param.values.iter_mut().for_each(|v| *v *= decay);
            param.optimizer.step(lr / param.lr, &mut param.values, &to_vec(gradient)?);
        }
        Ok(())
    }
}

/// A standard normal value (Box and Muller).
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    ((-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}
