//! `specquant doctor`.

use std::io::Write;
use std::process::ExitCode;

use serde_json::json;
use specquant_kernels::{Isa, cpu_name, kernel_name, measure_ceilings};

use crate::args::DoctorArgs;
use crate::system::{self, human};

/// The features that kernels exist for, and whether this CPU has them.
fn features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    return vec![
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avxvnni", is_x86_feature_detected!("avxvnni")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        // Where the system grants it as well: it has to be asked.
        ("amx-int8", Isa::available().contains(&Isa::AmxInt8)),
    ];
    #[cfg(target_arch = "aarch64")]
    return vec![("dotprod", std::arch::is_aarch64_feature_detected!("dotprod"))];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Vec::new()
}

pub fn run(args: DoctorArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.threads)?;
    let threads = rayon::current_num_threads();
    let ceilings = measure_ceilings(threads, 0.3);
    let products = [(4, 4), (8, 4), (8, 8), (16, 4), (16, 8)];
    let kernels: Vec<(String, String)> =
        products.map(|(a, w)| (format!("W{w}A{a}"), kernel_name(a, w, false))).into();
    let available: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
    let mut out = std::io::stdout();
    if args.json {
        let value = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpu": cpu_name(),
            "features": features().into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "isa": { "active": Isa::active().name(), "available": available },
            "kernels": kernels.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "threads": threads,
            "memory": { "total_bytes": system::total_memory(), "available_bytes": system::available_memory() },
            "ceilings": { "int8_gops": ceilings.int8_gops, "f32_gflops": ceilings.f32_gflops, "read_gb_per_s": ceilings.read_gbs },
        });
        writeln!(out, "{value:#}")?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(out, "specquant {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(out, "cpu       {} ({threads} threads)", cpu_name().as_deref().unwrap_or("unknown"))?;
    let shown: Vec<String> =
        features().iter().map(|(name, has)| format!("{name} {}", if *has { "yes" } else { "no" })).collect();
    writeln!(out, "features  {}", shown.join(", "))?;
    writeln!(
        out,
        "kernels   {} of {}; SPECQUANT_ISA chooses another",
        Isa::active().name(),
        available.join(", ")
    )?;
    for (product, kernel) in &kernels {
        writeln!(out, "          {product:<6} {kernel}")?;
    }
    if let (Some(total), Some(free)) = (system::total_memory(), system::available_memory()) {
        writeln!(out, "memory    {} in all, {} available", human(total), human(free))?;
    }
    writeln!(
        out,
        "ceilings  int8 {:.0} GOP/s, f32 {:.0} GFLOP/s, memory read {:.1} GB/s (measured now)",
        ceilings.int8_gops, ceilings.f32_gflops, ceilings.read_gbs
    )?;
    Ok(ExitCode::SUCCESS)
}
