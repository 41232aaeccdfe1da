//! Orthonormal transforms that run on activations because they could not be folded into weights (QuaRot, arXiv 2404.00456).

use serde::{Deserialize, Serialize};
use specquant_kernels::Hadamard;

use crate::ModelConfig;

/// Kind of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RotationKind {
    /// Walsh-Hadamard, see [`specquant_kernels::Hadamard`].
    Hadamard,
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
    pub down: Option<Hadamard>,
    /// Of `o_proj`'s input, `[heads]`, for every position within a head.
    pub heads: Option<Hadamard>,
    /// Of each head of q and k, `[head_dim]`.
    pub qk: Option<Hadamard>,
}

impl Rotations {
    /// Of a model's widths.
    pub fn new(online: &OnlineRotations, config: &ModelConfig) -> Self {
        let plan = |kind: Option<RotationKind>, n| kind.map(|RotationKind::Hadamard| Hadamard::new(n));
        Rotations {
            down: plan(online.down, config.intermediate_size),
            heads: plan(online.heads, config.num_heads),
            qk: plan(online.qk, config.head_dim),
        }
    }
}
