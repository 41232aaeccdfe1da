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

/// Appends a token to every sequence; returns how many blocks of memory that took.
fn step(model: &Model, sequences: &mut [Sequence], token: u32) -> usize {
    let ids = [token];
    let mut batch: Vec<(&mut Sequence, &[u32])> = Vec::with_capacity(sequences.len());
    batch.extend(sequences.iter_mut().map(|sequence| (sequence, &ids[..])));
    let before = ASKED.load(Ordering::Relaxed);
    drop(model.next_logits(&mut batch).unwrap());
    ASKED.load(Ordering::Relaxed) - before
}

/// On one thread, as every thread has buffers of its own and takes part when it can. The widths, 96 and 176, have Hadamard matrices; the cosine transform makes
/// its buffers anew.
#[test]
fn decoding_allocates_nothing() {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let texts: Vec<Vec<u32>> = (0..4).map(|t| (0..48).map(|i| (t * 83 + i * 31) % 320).collect()).collect();
    let models = [
        ("llama-tied-bf16", "rtn"),
        ("llama-tied-bf16", "specquant"),
        ("llama-tied-bf16", "quarot"),
        ("llama-tied-bf16", "svdquant"),
        ("llama-tied-bf16", "spectral"),
        ("qwen3", "spectral"),
    ];
    for (source, name) in models {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/tiny").join(source);
        let source = Source::open(&tiny).unwrap();
        let mut recipe = Recipe::load(name).unwrap();
        recipe.scheme = recipe.scheme.with_widths("W4A4KV4").unwrap();
        let destination = dir.path().join(format!("{name} of {}", tiny.file_name().unwrap().display()));
        run(&source, &recipe, Some(&texts), &Destination::new(&destination), &mut |_| ()).unwrap();
        let mut model = Model::open(&destination).unwrap();
        model.widen().unwrap();
        for sequences in [1, 3] {
            let mut sequences: Vec<Sequence> = (0..sequences).map(|_| model.sequence()).collect();
            // Then the sizes of all buffers are found, and the caches have room for 64 tokens.
            for token in 0..33 {
                step(&model, &mut sequences, token);
            }
            let counts: Vec<usize> = (33..60).map(|token| step(&model, &mut sequences, token)).collect();
            assert!(counts.iter().all(|n| *n == 0), "{name}, {} sequences: {counts:?}", sequences.len());
        }
    }
}
