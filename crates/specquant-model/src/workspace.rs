//! Buffers that are used again: memory fresh from the system has to be zeroed page by page, which takes as long as a block's integer products.

/// Buffers that nobody uses at the moment.
#[derive(Debug, Default)]
pub struct Workspace {
    free: Vec<Vec<f32>>,
}

impl Workspace {
    /// None yet.
    pub fn new() -> Self {
        Workspace::default()
    }

    /// A buffer of `len` values, of any content.
    pub fn take(&mut self, len: usize) -> Vec<f32> {
        // The smallest that is large enough, else the largest, which then grows.
        let fits = |v: &Vec<f32>| {
            (v.capacity() < len, if v.capacity() < len { usize::MAX - v.capacity() } else { v.capacity() })
        };
        let best = (0..self.free.len()).min_by_key(|&i| fits(&self.free[i]));
        let mut buffer = best.map(|i| self.free.swap_remove(i)).unwrap_or_default();
        if buffer.capacity() < len {
            // Not copied, as it would be by growing.
            buffer = Vec::with_capacity(len);
        }
        buffer.resize(len, 0.0);
        buffer
    }

    /// Takes a buffer back.
    pub fn give(&mut self, buffer: Vec<f32>) {
        self.free.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back() {
        let mut workspace = Workspace::new();
        let (a, b) = (workspace.take(100), workspace.take(10));
        let places = [a.as_ptr(), b.as_ptr()];
        workspace.give(a);
        workspace.give(b);
        let small = workspace.take(10);
        assert_eq!(small.as_ptr(), places[1]);
        let again = workspace.take(60);
        assert_eq!((again.as_ptr(), again.len()), (places[0], 60));
        workspace.give(again);
        assert_eq!(workspace.take(200).len(), 200);
        assert!(workspace.free.is_empty());
    }
}
