//! Limits on what an input may do: no panic, bounded memory, bounded time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use crate::{Outcome, Target, write_new};

/// Bytes in use, and how many there may be.
static USED: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The system's allocator, which ends the process where an input takes more memory than [`execute`] allows. To be a program's
/// `#[global_allocator]`.
pub struct Limited;

impl Limited {
    fn count(size: usize) {
        let used = USED.fetch_add(size, Relaxed) + size;
        let limit = LIMIT.load(Relaxed);
        if used > limit {
            // The complaint needs memory too.
            LIMIT.store(usize::MAX, Relaxed);
            eprintln!(
                "an allocation of {size} bytes makes {used}, where {limit} are allowed\n{}",
                std::backtrace::Backtrace::force_capture()
            );
            std::process::abort();
        }
    }
}

// SAFETY: every call is passed on to the system's allocator as it is; counting does not touch the memory.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Limited::count(layout.size());
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Limited::count(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new: usize) -> *mut u8 {
        Limited::count(new);
        USED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new) }
    }
}

/// Weights are widened from 2 bits to 32, and held in two layouts for a while.
const TIMES_INPUT: usize = 64;
/// Time of the processor, of all threads together, that an input may take, whatever else the machine does; those of valid ones are milliseconds.
const MOST: Duration = Duration::from_secs(10);

/// As the main thread has it.
const STACK: usize = 8 << 20;

/// What an input must not do.
#[derive(Debug)]
pub enum Find {
    /// The message and where.
    Panic(String),
    /// It took so much of the processor's time.
    Slow(Duration),
    /// It was refused, but not told why.
    Silent,
}

impl fmt::Display for Find {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Find::Panic(message) => write!(f, "panic: {message}"),
            Find::Slow(time) => write!(f, "took {time:.1?}"),
            Find::Silent => write!(f, "refused without a message"),
        }
    }
}

/// Of this process, which runs one input at a time; elsewhere than on Unix the clock's.
fn processor_time() -> Duration {
    #[cfg(unix)]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }
    #[cfg(not(unix))]
    std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default()
}

/// Runs an input within the limits. In a program with the allocator [`Limited`] one that takes too much memory ends the process: the input is then
/// in `dir`, where it is stored as `last-input` before it runs.
///
/// # Errors
/// What the input did that it must not do.
pub fn execute(target: &Target, dir: &Path, input: &[u8]) -> Result<Outcome, Find> {
    static PANIC: Mutex<String> = Mutex::new(String::new());
    let _ = write_new(&dir.join("last-input"), input);
    std::panic::set_hook(Box::new(|info| {
        if let Ok(mut message) = PANIC.lock() {
            *message = info.to_string();
        }
    }));
    LIMIT.store(USED.load(Relaxed) + target.memory + TIMES_INPUT * input.len(), Relaxed);
    let started = processor_time();
    // A thread of its own: the tokenizers library keeps a cache for every tokenizer until the thread ends, which is no input's fault.
    let outcome = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK);
        thread.spawn_scoped(scope, || (target.run)(dir, input)).map(|thread| thread.join())
    });
    let time = processor_time().saturating_sub(started);
    LIMIT.store(usize::MAX, Relaxed);
    let _ = std::panic::take_hook();
    let outcome = outcome.map_err(|e| Find::Panic(format!("no thread: {e}")))?;
    let outcome = outcome.map_err(|_| Find::Panic(PANIC.lock().map(|m| m.clone()).unwrap_or_default()))?;
    match &outcome {
        _ if time > MOST => Err(Find::Slow(time)),
        Err(e) if e.to_string().trim().is_empty() => Err(Find::Silent),
        _ => Ok(outcome),
    }
}
