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
        // The smallest that is large enough; where none is, a new one takes the place of the largest.
        let large = |v: &Vec<f32>| v.capacity() >= len;
        let fit =
            (0..self.free.len()).filter(|&i| large(&self.free[i])).min_by_key(|&i| self.free[i].capacity());
        let largest = || (0..self.free.len()).max_by_key(|&i| self.free[i].capacity());
        let found = fit.or_else(largest).map(|i| self.free.swap_remove(i)).filter(large);
        let mut buffer = found.unwrap_or_else(|| Vec::with_capacity(len));
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
