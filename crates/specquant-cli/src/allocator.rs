//! Where memory comes from.

use std::alloc::{GlobalAlloc, Layout, System};

use mimalloc::MiMalloc;

/// Bytes from which on the system is asked: it hands out untouched pages, moves them when they grow, and takes them back at once. mimalloc keeps them for a
/// while, and copies what grows: with it alone the matrices of LLaMA-2-7B's blocks make `spectral` take 2.5 GB in the place of 1.8 (`scripts/memory.sh spectral:1`).
const LARGE: usize = 32 << 20;

/// [`MiMalloc`], but for what is large.
pub struct Allocator;

impl Allocator {
    fn of(layout: &Layout) -> &'static dyn GlobalAlloc {
        if layout.size() > LARGE { &System } else { &MiMalloc }
    }
}

// SAFETY: the size of a layout, which whoever asks for memory names again when it is freed, decides which of two allocators both calls reach.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: forwarded.
        unsafe { Self::of(&layout).alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: forwarded.
        unsafe { Self::of(&layout).alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: forwarded.
        unsafe { Self::of(&layout).dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if (layout.size() > LARGE) == (size > LARGE) {
            // SAFETY: forwarded.
            return unsafe { Self::of(&layout).realloc(memory, layout, size) };
        }
        // SAFETY: the caller says that this layout is one.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        // SAFETY: both places hold what is copied and do not overlap.
        unsafe {
            let to = self.alloc(new);
            if !to.is_null() {
                std::ptr::copy_nonoverlapping(memory, to, size.min(layout.size()));
                self.dealloc(memory, layout);
            }
            to
        }
    }
}

#[cfg(test)]
mod tests {
    use super::LARGE;

    /// From one allocator to the other, and back.
    #[test]
    fn what_grows_and_shrinks_stays() {
        let mut values: Vec<u64> = (0..1000).collect();
        for len in [LARGE / 8 + 1, LARGE / 4, 2000, 1000] {
            values.resize(len, 7);
            values.shrink_to_fit();
            assert!(values[..1000].iter().copied().eq(0..1000));
            assert!(values[1000..].iter().all(|&v| v == 7));
        }
        let zeros = vec![0u8; LARGE + 1];
        assert!(zeros.iter().all(|&v| v == 0));
    }
}
