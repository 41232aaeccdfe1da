//! Decoding allocates nothing once its buffers exist.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use specquant_model::{Model, Sequence, Source};
use specquant_quantize::{Destination, Recipe, run};

/// Blocks of memory that any thread has asked for.
static ASKED: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: the system's allocator; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Appends a token to every sequence.
fn step(model: &Model, sequences: &mut [Sequence], token: u32) {
    let ids = [token];
    let mut batch: Vec<(&mut Sequence, &[u32])> = Vec::with_capacity(sequences.len());
    batch.extend(sequences.iter_mut().map(|sequence| (sequence, &ids[..])));
    let before = ASKED.load(Ordering::Relaxed);
    drop(model.next_logits(&mut batch).unwrap());
    STEP.store(ASKED.load(Ordering::Relaxed) - before, Ordering::Relaxed);
}

/// What the last step asked for.
static STEP: AtomicUsize = AtomicUsize::new(0);

/// Widths of the model are 96 and 256: of both there are Hadamard matrices. (The cosine transform makes its buffers anew.)
#[test]
fn decoding_allocates_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/tiny/llama-tied-bf16");
    let source = Source::open(&tiny).unwrap();
    let texts: Vec<Vec<u32>> = (0..4).map(|t| (0..48).map(|i| (t * 83 + i * 31) % 320).collect()).collect();
    for name in ["rtn", "specquant", "quarot", "svdquant", "spectral"] {
        let mut recipe = Recipe::load(name).unwrap();
        recipe.scheme = recipe.scheme.with_widths("W4A4KV4").unwrap();
        let destination = dir.path().join(name);
        run(&source, &recipe, Some(&texts), &Destination::new(&destination), &mut |_| ()).unwrap();
        let mut model = Model::open(&destination).unwrap();
        model.widen().unwrap();
        for sequences in [1, 3] {
            let mut sequences: Vec<Sequence> = (0..sequences).map(|_| model.sequence()).collect();
            // As many tokens as memory grows to hold twice as many; then the sizes of all buffers are found.
            for token in 0..33 {
                step(&model, &mut sequences, token);
            }
            let counts: Vec<usize> = (33..60)
                .map(|token| {
                    step(&model, &mut sequences, token);
                    STEP.load(Ordering::Relaxed)
                })
                .collect();
            assert!(counts.iter().all(|n| *n == 0), "{name}, {} sequences: {counts:?}", sequences.len());
        }
    }
}
