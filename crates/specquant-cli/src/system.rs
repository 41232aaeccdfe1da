//! What the operating system says: memory, threads, terminals.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;

/// A line of a /proc file in bytes; `None` where there is no /proc.
fn proc_bytes(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// mimalloc's option `purge_delay`, in milliseconds, for which libmimalloc-sys has no name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = libmimalloc_sys::mi_option_use_numa_nodes - 1;

/// From now on memory that is freed is the system's at once. Otherwise mimalloc keeps it for a second, and what matrices of hundreds of megabytes lay in is
/// still there beside those that come after them. `MIMALLOC_PURGE_DELAY` says otherwise.
pub fn give_memory_back() {
    // SAFETY: it sets a number that is read at every purge.
    unsafe { libmimalloc_sys::mi_option_set_default(PURGE_DELAY, 0) };
}

/// Largest resident memory that this process has had.
pub fn peak_rss() -> Option<u64> {
    proc_bytes("/proc/self/status", "VmHWM:")
}

/// Resident memory of this process.
pub fn rss() -> Option<u64> {
    proc_bytes("/proc/self/status", "VmRSS:")
}

/// The largest anonymous memory (without mapped files) that this process has from now on, read every 10 ms.
pub struct Watch(Arc<AtomicU64>);

impl Watch {
    /// Begins to look.
    pub fn new() -> Watch {
        let watch = Watch(Arc::new(AtomicU64::new(0)));
        let most = Arc::downgrade(&watch.0);
        std::thread::spawn(move || {
            while let (Some(most), Some(now)) = (most.upgrade(), proc_bytes("/proc/self/status", "RssAnon:"))
            {
                most.fetch_max(now, Ordering::Relaxed);
                drop(most);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        watch
    }

    /// The largest so far; `None` where the system does not say.
    pub fn peak(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|bytes| *bytes > 0)
    }
}

/// Memory of the machine.
pub fn total_memory() -> Option<u64> {
    proc_bytes("/proc/meminfo", "MemTotal:")
}

/// Memory that can be had without swapping, on the machine and within the limits of the control groups (containers) that this process is in.
pub fn available_memory() -> Option<u64> {
    let machine = proc_bytes("/proc/meminfo", "MemAvailable:")?;
    Some(group_memory(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup")).fold(machine, u64::min))
}

/// What every control group leaves, those above ours included. Version 2 has one hierarchy, version 1 one of memory.
fn group_memory(groups: &Path, root: &Path) -> impl Iterator<Item = u64> {
    let text = std::fs::read_to_string(groups).unwrap_or_default();
    let mut left = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let (root, limit, usage, cached) = match controllers {
            "" => (root.to_owned(), "memory.max", "memory.current", "inactive_file "),
            c if c.split(',').any(|c| c == "memory") => (
                root.join("memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file ",
            ),
            _ => continue,
        };
        // In a container its own group is mounted as the root, under whatever path.
        let group = root.join(group.trim_start_matches('/'));
        for dir in group.ancestors().take_while(|dir| dir.starts_with(&root)) {
            let read = |file: &str| std::fs::read_to_string(dir.join(file)).ok();
            let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
            let (Some(limit), Some(usage)) = (number(limit), number(usage)) else { continue };
            // Pages of files that nobody uses now go first when memory is short.
            let cached = read("memory.stat").and_then(|stat| {
                stat.lines().find_map(|line| line.strip_prefix(cached)?.trim().parse::<u64>().ok())
            });
            left.push((limit + cached.unwrap_or(0)).saturating_sub(usage));
        }
    }
    left.into_iter()
}

/// Bytes that can still be written to the file system that `path`, which need not exist yet, is on.
#[cfg(unix)]
pub fn free_disk(path: &Path) -> Option<u64> {
    let full = std::path::absolute(path).ok()?;
    let stat = full.ancestors().find_map(|dir| rustix::fs::statvfs(dir).ok())?;
    Some(stat.f_bavail * stat.f_frsize)
}

/// Bytes that can still be written; not known on this system.
#[cfg(not(unix))]
pub fn free_disk(_: &Path) -> Option<u64> {
    None
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The default by which the option is told from its neighbours; unit tests do not run `main`.
    #[test]
    fn the_option_is_the_delay() {
        if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
            // SAFETY: it reads a number.
            assert_eq!(unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) }, 1000);
            give_memory_back();
            // SAFETY: as before.
            assert_eq!(unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) }, 0);
        }
    }

    #[test]
    fn control_groups_limit_memory() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let left = |groups: &str| {
            write("groups", groups);
            group_memory(&dir.path().join("groups"), dir.path()).collect::<Vec<_>>()
        };
        assert!(left("0::/\n").is_empty());
        write("a/b/memory.max", "max\n");
        write("a/b/memory.current", "70\n");
        write("a/memory.max", "100\n");
        write("a/memory.current", "80\n");
        write("a/memory.stat", "active_file 3\ninactive_file 15\n");
        assert_eq!(left("0::/a/b\n"), [35]);
        write("memory/c/memory.limit_in_bytes", "50");
        write("memory/c/memory.usage_in_bytes", "60");
        assert_eq!(left("5:cpu,memory:/c\n4:pids:/c\n"), [0]);
    }
}
