//! What the operating system says: memory, threads, terminals.

use anyhow::Context;

/// A line of a /proc file in bytes; `None` where there is no /proc.
fn proc_bytes(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Largest resident memory that this process has had.
pub fn peak_rss() -> Option<u64> {
    proc_bytes("/proc/self/status", "VmHWM:")
}

/// Resident memory of this process.
pub fn rss() -> Option<u64> {
    proc_bytes("/proc/self/status", "VmRSS:")
}

/// Memory of the machine.
pub fn total_memory() -> Option<u64> {
    proc_bytes("/proc/meminfo", "MemTotal:")
}

/// Memory that can be had without swapping.
pub fn available_memory() -> Option<u64> {
    proc_bytes("/proc/meminfo", "MemAvailable:")
}

/// More threads than any machine has cores only cost.
const MAX_THREADS: usize = 1024;

/// Sets the number of worker threads; all cores if `None`.
pub fn set_threads(threads: Option<usize>) -> anyhow::Result<()> {
    match threads {
        None => Ok(()),
        Some(0) => anyhow::bail!("--threads 0: give at least 1, or leave it out for all cores"),
        Some(n) if n > MAX_THREADS => anyhow::bail!("--threads {n}: give at most {MAX_THREADS}"),
        Some(n) => rayon::ThreadPoolBuilder::new()
            .num_threads(n)
            .build_global()
            .context("cannot start the worker threads"),
    }
}

/// Bytes as MB or GB, decimal.
pub fn human(bytes: u64) -> String {
    let mb = bytes as f64 / 1e6;
    if mb >= 1000.0 { format!("{:.2} GB", mb / 1000.0) } else { format!("{mb:.0} MB") }
}
