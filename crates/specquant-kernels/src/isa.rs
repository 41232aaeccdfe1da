//! Which instruction sets this machine has, and which one the kernels use.
//!
//! Every instruction set has a token type ([`Scalar`], `NeonDot`, `Avx2`, `AvxVnni`, `Avx512Vnni`, `AmxInt8`) whose `new` answers `None` on a machine without
//! it. Kernels are methods of tokens, so that a kernel for an absent instruction set cannot be called.

use std::sync::OnceLock;

/// An instruction set that the kernels are written for. Ordered: later is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, for every machine: the reference that the others are tested against.
    Scalar,
    /// AArch64 with NEON's dot products (`sdot`), which integer products use; all else is plain Rust, which has NEON anyway.
    NeonDot,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// [`Isa::Avx2`] with 256-bit VNNI (`vpdpbusd`), which integer products use: Intel's desktop processors from Alder Lake on, which lack AVX-512.
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI (`vpdpbusd`; `vpdpwssd`, which prompts' attention may use,
    /// [`KvCache::with_any_order`](crate::KvCache::with_any_order)), and everything that [`Isa::Avx2`] asks for.
    Avx512Vnni,
    /// [`Isa::Avx512Vnni`] with AMX's tiles of 8-bit integers (`tdpbusd`), which integer products of more than a few tokens use, and of bfloat16, which
    /// prompts' attention may use: Intel's server processors from Sapphire Rapids on, under Linux.
    AmxInt8,
}

impl Isa {
    /// Every instruction set the code is written for, worst first.
    pub const ALL: [Isa; 6] =
        [Isa::Scalar, Isa::NeonDot, Isa::Avx2, Isa::AvxVnni, Isa::Avx512Vnni, Isa::AmxInt8];

    /// The instruction sets of this machine, worst first; [`Isa::Scalar`] is always there.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The instruction set that the kernels use: the best one, or the one that the environment variable `SPECQUANT_ISA` names
    /// (`scalar`, `neondot`, `avx2`, `avxvnni`, `avx512vnni` or `amxint8`). A name that is unknown, or whose instruction set is absent, counts for nothing.
    /// Read once.
    pub fn active() -> Isa {
        static ACTIVE: OnceLock<Isa> = OnceLock::new();
        *ACTIVE.get_or_init(|| choose(std::env::var("SPECQUANT_ISA").ok().as_deref()))
    }

    /// The name in `SPECQUANT_ISA` and at the start of kernel names.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::NeonDot => "neondot",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::AmxInt8 => "amxint8",
        }
    }

    /// The one whose kernels everything but integer products uses: what floats are computed with.
    pub fn vectors(self) -> Isa {
        match self {
            Isa::Scalar | Isa::NeonDot => Isa::Scalar,
            Isa::Avx2 | Isa::AvxVnni => Isa::Avx2,
            Isa::Avx512Vnni | Isa::AmxInt8 => Isa::Avx512Vnni,
        }
    }

    fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => AvxVnni::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Avx512Vnni::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::AmxInt8 => AmxInt8::new().is_some(),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => NeonDot::new().is_some(),
            // Another architecture's.
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }
}

fn choose(wish: Option<&str>) -> Isa {
    let available = Isa::available();
    let named =
        wish.and_then(|wish| available.iter().find(|isa| isa.name().eq_ignore_ascii_case(wish.trim())));
    named.or(available.last()).copied().unwrap_or(Isa::Scalar)
}

/// Token of [`Isa::Scalar`].
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

/// Token of [`Isa::Avx2`]: proof that the machine has it.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    pub(crate) fn new() -> Option<Self> {
        let there = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        there.then_some(Avx2(()))
    }
}

/// Token of [`Isa::AvxVnni`]: proof that the machine has it. What is no integer product uses `avx2`.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct AvxVnni {
    pub(crate) avx2: Avx2,
}

#[cfg(target_arch = "x86_64")]
impl AvxVnni {
    pub(crate) fn new() -> Option<Self> {
        Avx2::new().filter(|_| is_x86_feature_detected!("avxvnni")).map(|avx2| AvxVnni { avx2 })
    }
}

/// Token of [`Isa::NeonDot`]: proof that the machine has it.
#[cfg(target_arch = "aarch64")]
#[derive(Clone, Copy)]
pub(crate) struct NeonDot(());

#[cfg(target_arch = "aarch64")]
impl NeonDot {
    pub(crate) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("dotprod").then_some(NeonDot(()))
    }
}

/// Token of [`Isa::Avx512Vnni`]: proof that the machine has it. What has no AVX-512 kernel of its own uses `avx2`.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512Vnni {
    pub(crate) avx2: Avx2,
}

#[cfg(target_arch = "x86_64")]
impl Avx512Vnni {
    pub(crate) fn new() -> Option<Self> {
        let there = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        Avx2::new().filter(|_| there).map(|avx2| Avx512Vnni { avx2 })
    }
}

/// Token of [`Isa::AmxInt8`]: proof that the machine has it, and that the system lets this process use it. What is no integer product uses `avx512`.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct AmxInt8 {
    pub(crate) avx512: Avx512Vnni,
}

#[cfg(target_arch = "x86_64")]
impl AmxInt8 {
    pub(crate) fn new() -> Option<Self> {
        static GRANTED: OnceLock<bool> = OnceLock::new();
        Avx512Vnni::new().filter(|_| *GRANTED.get_or_init(tiles_granted)).map(|avx512| AmxInt8 { avx512 })
    }
}

/// Whether the processor multiplies tiles of bytes and of bfloat16, and Linux has let all threads of this process use them, now and later. It asks to be asked,
/// for tiles make the saved state of a thread 8 kB larger (Linux, Documentation/arch/x86/xstate.rst).
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles_granted() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const AMX_INT8: u32 = 1 << 25;
    const ALL: u32 = AMX_BF16 | AMX_TILE | AMX_INT8;
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: x86-64 has the instruction; Rust asks for the word until 1.90.
    #[allow(unused_unsafe)]
    let features = unsafe { if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx } };
    // SAFETY: the call changes nothing but what this process may use; a system that does not know it says so.
    let ask = || unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
    features & ALL == ALL && ask() == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn tiles_granted() -> bool {
    false
}

/// Evaluates an expression with `$k` bound to the token of `$isa`, or to [`Scalar`] if the machine lacks it. Instruction sets that only integer
/// products have kernels of their own for count as what they build on.
macro_rules! with_token {
    ($isa:expr, $k:ident => $body:expr) => {{
        #[cfg(target_arch = "x86_64")]
        {
            let isa = $crate::Isa::vectors($isa);
            if let Some($k) = $crate::isa::Avx512Vnni::new().filter(|_| isa == $crate::Isa::Avx512Vnni) {
                $body
            } else if let Some($k) = $crate::isa::Avx2::new().filter(|_| isa == $crate::Isa::Avx2) {
                $body
            } else {
                let $k = $crate::isa::Scalar;
                $body
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $isa;
            let $k = $crate::isa::Scalar;
            $body
        }
    }};
}
pub(crate) use with_token;

/// As [`with_token`] with the token of every instruction set, for products with quantized weights and what limits them.
macro_rules! with_every_token {
    ($isa:expr, $k:ident => $body:expr) => {{
        let isa = $isa;
        #[cfg(target_arch = "x86_64")]
        {
            if let Some($k) = $crate::isa::AmxInt8::new().filter(|_| isa == $crate::Isa::AmxInt8) {
                $body
            } else if let Some($k) = $crate::isa::AvxVnni::new().filter(|_| isa == $crate::Isa::AvxVnni) {
                $body
            } else {
                $crate::isa::with_token!(isa, $k => $body)
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            if let Some($k) = $crate::isa::NeonDot::new().filter(|_| isa == $crate::Isa::NeonDot) {
                $body
            } else {
                $crate::isa::with_token!(isa, $k => $body)
            }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            $crate::isa::with_token!(isa, $k => $body)
        }
    }};
}
pub(crate) use with_every_token;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_chosen_unless_an_available_one_is_named() {
        let available = Isa::available();
        let best = *available.last().unwrap();
        assert_eq!(available[0], Isa::Scalar);
        assert!(available.is_sorted());
        assert_eq!(choose(None), best);
        assert_eq!(choose(Some("no-such-isa")), best);
        assert_eq!(choose(Some(" Scalar ")), Isa::Scalar);
        for isa in Isa::ALL {
            assert_eq!(choose(Some(isa.name())), if available.contains(&isa) { isa } else { best });
        }
        assert!(available.contains(&Isa::active()));
    }
}
