//! Sharing the work of one kernel among threads that wait awake.
//!
//! Decoding a token is hundreds of products of some microseconds each, one after another. A pool whose threads sleep between them takes longer to wake
//! them than the products take (`examples/parallel_speed.rs`, two cores: 12 to 15 µs from outside rayon's pool, 0.2 µs here). So these threads look for the next job
//! for a while before they sleep, and a job never waits for one that is asleep: who comes late finds nothing left to do.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use rayon::prelude::*;

/// How long a thread looks for the next job before it sleeps: longer than what a decoder does alone between two products.
const AWAKE: Duration = Duration::from_micros(200);
/// Looks at the job between two at the clock.
const LOOKS: u32 = 64;
/// Set in [`Team::state`] while threads may join the job. Below it is the number of those that have; above it, the number of the job.
const OPEN: u64 = 1 << 31;

/// Runs `task(0)` to `task(tasks - 1)`, each once, on all threads, and returns when all are done. Which thread runs which, and in what order, is open.
///
/// From within a task everything runs on the thread that asks. From within rayon's pool, and while another thread has the team, rayon shares the work.
///
/// # Panics
/// When a task does, after the others are done.
pub fn for_each_index(tasks: usize, task: impl Fn(usize) + Sync) {
    if tasks <= 1 || AT_WORK.get() {
        return (0..tasks).for_each(task);
    }
    if rayon::current_thread_index().is_none()
        && let Ok(team) = TEAM.try_lock()
    {
        return team.run(tasks, &task);
    }
    (0..tasks).into_par_iter().for_each(&task);
}

/// Runs `task(i, chunk)` for every chunk of `len` elements of `x`, the last of which may be shorter, as [`for_each_index`] does.
///
/// # Panics
/// If `len` is 0, and when a task does.
pub fn for_each_chunk<T: Send>(x: &mut [T], len: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    let (whole, start) = (x.len(), Shared(x.as_mut_ptr()));
    for_each_index(whole.div_ceil(len), |i| {
        let at = i * len;
        // SAFETY: chunks do not overlap, lie within x, and every one is taken once; x is borrowed until all tasks are done.
        let chunk = unsafe { std::slice::from_raw_parts_mut(start.get().add(at), len.min(whole - at)) };
        task(i, chunk);
    });
}

/// As [`for_each_chunk`] for chunks of two slices that belong together, `a_len` elements of one and `b_len` of the other.
///
/// # Panics
/// If a length is 0 or the slices do not have as many chunks as each other, and when a task does.
pub fn for_each_chunk_pair<A: Send, B: Send>(
    (a, a_len): (&mut [A], usize),
    (b, b_len): (&mut [B], usize),
    task: impl Fn(usize, &mut [A], &mut [B]) + Sync,
) {
    let (whole, start) = (a.len(), Shared(a.as_mut_ptr()));
    assert_eq!(whole.div_ceil(a_len), b.len().div_ceil(b_len), "chunks of two slices");
    for_each_chunk(b, b_len, |i, b| {
        let at = i * a_len;
        // SAFETY: as in for_each_chunk, which takes every i once; there are as many chunks here.
        let a = unsafe { std::slice::from_raw_parts_mut(start.get().add(at), a_len.min(whole - at)) };
        task(i, a, b);
    });
}

/// Memory that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub(crate) *mut T);

impl<T> Shared<T> {
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: a pointer; who follows it answers for what it does.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

thread_local! {
    /// Whether this thread is in a task.
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
}

/// As many threads as rayon has, the caller among them.
static TEAM: LazyLock<Mutex<&'static Team>> =
    LazyLock::new(|| Mutex::new(Team::start(rayon::current_num_threads().saturating_sub(1))));

/// What is to be done.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

/// A cache line of its own, so that threads do not wait for each other's.
#[repr(align(128))]
struct Line<T>(T);

struct Team {
    /// See [`OPEN`].
    state: AtomicU64,
    /// Written by the caller while the job is closed and nobody is in it, read by those who have joined.
    job: UnsafeCell<Option<Job>>,
    /// The next task that nobody has taken, of every thread's share: neighbours are for one thread, as the memory that they use is.
    next: Vec<Line<AtomicUsize>>,
    /// Threads that sleep or are about to.
    asleep: AtomicUsize,
    /// The first panic of a job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    threads: Mutex<Vec<Thread>>,
}

// SAFETY: `job` is the only part that is not Sync; `state` orders its writing before its reading, and what it points to is Sync.
unsafe impl Sync for Team {}
// SAFETY: as above.
unsafe impl Send for Team {}

impl Team {
    /// Starts `helpers` threads, which last as long as the process.
    fn start(helpers: usize) -> &'static Team {
        let team: &'static Team = Box::leak(Box::new(Team {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: (0..=helpers).map(|_| Line(AtomicUsize::new(0))).collect(),
            asleep: AtomicUsize::new(0),
            panic: Mutex::new(None),
            threads: Mutex::new(Vec::new()),
        }));
        let started = (0..helpers).map_while(|i| {
            // Where the system has no more threads to give, fewer do.
            let thread =
                thread::Builder::new().name(format!("specquant-{i}")).spawn(move || team.help(i + 1));
            thread.ok().map(|handle| handle.thread().clone())
        });
        *team.threads.lock().unwrap_or_else(PoisonError::into_inner) = started.collect();
        team
    }

    /// [`for_each_index`]. The caller holds the team's lock.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes, and nobody follows the pointer after this function has returned.
        let task = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync + 'static)>(task)
        };
        let job = Job { task, tasks };
        // SAFETY: the last job was closed and left by all before the lock was free.
        unsafe { *self.job.get() = Some(job) };
        for (i, next) in self.next.iter().enumerate() {
            next.0.store(self.share(i, tasks), Ordering::Relaxed);
        }
        let number = (self.state.load(Ordering::Relaxed) >> 32) + 1;
        // Before `asleep` is read: a thread that is about to sleep counts itself first and then looks here.
        self.state.store(number << 32 | OPEN, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) > 0 {
            let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
            threads.iter().for_each(Thread::unpark);
        }
        self.work(job, 0);
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0;
        while self.state.load(Ordering::Acquire) & (OPEN - 1) > 0 {
            looks += 1;
            // Long tasks, or a thread that has lost its processor.
            if looks < 1 << 14 { std::hint::spin_loop() } else { thread::yield_now() }
        }
        let panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// The first task of a thread's share.
    fn share(&self, thread: usize, tasks: usize) -> usize {
        thread * tasks / self.next.len()
    }

    /// Takes tasks until there are none: those of thread `own`, then what others have not got to.
    fn work(&self, job: Job, own: usize) {
        AT_WORK.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| {
            for thread in (own..self.next.len()).chain(0..own) {
                let end = self.share(thread + 1, job.tasks);
                loop {
                    let i = self.next[thread].0.fetch_add(1, Ordering::Relaxed);
                    if i >= end {
                        break;
                    }
                    // SAFETY: the caller of `run` waits for all who have joined the job.
                    unsafe { (*job.task)(i) };
                }
            }
        }));
        AT_WORK.set(false);
        if let Err(panic) = result {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// What a thread of the team does: joins one job after another.
    fn help(&self, own: usize) {
        let mut last = 0;
        let mut since = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let state = self.state.load(Ordering::Acquire);
                let join = || {
                    let joined =
                        self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed);
                    joined.is_ok()
                };
                if state & OPEN > 0 && state >> 32 != last && join() {
                    last = state >> 32;
                    // SAFETY: written before the job was opened.
                    if let Some(job) = unsafe { *self.job.get() } {
                        self.work(job, own);
                    }
                    self.state.fetch_sub(1, Ordering::AcqRel);
                    since = Instant::now();
                }
                std::hint::spin_loop();
            }
            if since.elapsed() > AWAKE {
                self.asleep.fetch_add(1, Ordering::SeqCst);
                let state = self.state.load(Ordering::SeqCst);
                if state & OPEN == 0 || state >> 32 == last {
                    thread::park();
                }
                self.asleep.fetch_sub(1, Ordering::SeqCst);
                since = Instant::now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    fn each_once(tasks: usize) {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        for_each_index(tasks, |i| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        });
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{tasks} tasks");
    }

    #[test]
    fn every_task_runs_once() {
        for tasks in [0, 1, 2, 3, 100] {
            each_once(tasks);
        }
        // Many short jobs, with pauses in which threads fall asleep.
        for i in 0..3000 {
            each_once(2 + i % 7);
            if i % 500 == 0 {
                thread::sleep(3 * AWAKE);
            }
        }
    }

    #[test]
    fn chunks_cover_a_slice() {
        for (len, chunk) in [(0, 3), (1, 3), (9, 3), (100, 7)] {
            let mut x = vec![0; len];
            for_each_chunk(&mut x, chunk, |i, part| {
                part.iter_mut().zip(0..).for_each(|(x, j)| *x += i * chunk + j)
            });
            assert!(x.into_iter().eq(0..len));
        }
    }

    #[test]
    fn callers_do_not_wait_for_each_other() {
        thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| (0..500).for_each(|_| each_once(5)));
            }
        });
        (0..8).into_par_iter().for_each(|_| each_once(9));
        // A task that shares out work of its own.
        let done = AtomicUsize::new(0);
        for_each_index(4, |_| {
            for_each_index(3, |_| {
                done.fetch_add(1, Ordering::Relaxed);
            })
        });
        assert_eq!(done.into_inner(), 12);
    }

    #[test]
    fn a_panic_reaches_the_caller_when_the_others_are_done() {
        let others = AtomicBool::new(false);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            for_each_index(64, |i| match i {
                3 => panic!("task 3"),
                _ => others.store(true, Ordering::Relaxed),
            })
        }));
        assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"task 3"));
        assert!(others.into_inner());
        each_once(10);
    }
}
