//! Buffers that are used again. Memory fresh from the system has to be zeroed page by page, which takes as long as a block's integer products; and a
//! token is a thousand small buffers, each the size of one a token before.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::thread::LocalKey;

/// Larger buffers go back to the system: the queries of a prompt of 4096 tokens, 4096 wide.
const LARGEST: usize = 64 << 20;
/// What a few tokens need is smaller: see [`trim_buffers`].
const SMALL: usize = 1 << 20;
/// Buffers of a type that a thread keeps at most: more than a block has at once while it is tuned.
const MOST: usize = 64;

/// Buffers that nobody on this thread uses at the moment.
pub type Free<T> = RefCell<Vec<Vec<T>>>;

/// What a [`Buffer`] can hold.
pub trait Element: Copy + 'static {
    /// What new memory is filled with.
    const ZERO: Self;
    /// The thread's free buffers.
    #[doc(hidden)]
    fn free() -> &'static LocalKey<Free<Self>>;
}

/// Implements [`Element`].
macro_rules! element {
    ($type:ty, $zero:expr) => {
        impl $crate::buffer::Element for $type {
            const ZERO: Self = $zero;

            fn free() -> &'static std::thread::LocalKey<$crate::buffer::Free<Self>> {
                thread_local! {
                    static FREE: $crate::buffer::Free<$type> = const { std::cell::RefCell::new(Vec::new()) };
                }
                &FREE
            }
        }
    };
}
pub(crate) use element;

element!(f32, 0.0);
element!(i32, 0);
element!(u8, 0);
element!(u32, 0);

/// A cache line, at which buffers of numbers begin: what crosses lines is read at half the speed, and where rows are whole lines either none
/// of them does or all do.
const LINE: usize = 64;

/// A slice of fixed length whose memory is used again when it is dropped.
pub struct Buffer<T: Element> {
    /// At least `start + len` values; what is around them stays, so that nothing is cleared.
    memory: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Element> Buffer<T> {
    /// `len` values, whatever they are.
    pub fn new(len: usize) -> Self {
        if len == 0 {
            return Buffer::default();
        }
        let spare = if size_of::<T>() < LINE { LINE / size_of::<T>() } else { 0 };
        let least = len + spare;
        let free = T::free().with_borrow_mut(|free| take(free, least));
        let memory = free.filter(|memory| memory.len() >= least).unwrap_or_else(|| vec![T::ZERO; least]);
        // Miri may answer that there is no such place.
        let start = Some(memory.as_ptr().align_offset(LINE)).filter(|start| *start <= spare).unwrap_or(0);
        Buffer { memory, start, len }
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Buffer::new(len);
        buffer.fill(T::ZERO);
        buffer
    }

    /// Makes it `len` values, whatever they are.
    pub fn resize(&mut self, len: usize) {
        if self.start + len > self.memory.len() {
            *self = Buffer::new(len);
        }
        self.len = len;
    }

    /// The values alone.
    pub fn into_vec(mut self) -> Vec<T> {
        let mut values = std::mem::take(&mut self.memory);
        values.truncate(self.start + self.len);
        values.drain(..self.start);
        // Who keeps them keeps no more than them.
        if values.capacity() > 2 * self.len {
            values.shrink_to_fit();
        }
        values
    }
}

/// Gives this thread's large free buffers of floats and codes, of which there can be large ones, back to the system: for the end of a prompt, whose memory
/// decoding does not need.
pub fn trim_buffers() {
    fn trim<T: Element>() {
        T::free().with_borrow_mut(|free| free.retain(|memory| memory.len() * size_of::<T>() <= SMALL + LINE));
    }
    trim::<f32>();
    trim::<u8>();
}

/// The smallest free buffer that is large enough; where none is, the largest, in whose place comes a new one.
fn take<T>(free: &mut Vec<Vec<T>>, len: usize) -> Option<Vec<T>> {
    let mut found = None;
    // From the last one used.
    for (i, memory) in free.iter().enumerate().rev() {
        let best = found.map_or(0, |(_, best)| best);
        let better = if best < len { memory.len() > best } else { (len..best).contains(&memory.len()) };
        if better {
            found = Some((i, memory.len()));
        }
        if memory.len() == len {
            break;
        }
    }
    found.map(|(i, _)| free.swap_remove(i))
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        if memory.is_empty() || memory.len() * size_of::<T>() > LARGEST + LINE {
            return;
        }
        // A thread that ends has no free buffers any more.
        let _ = T::free().try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < MOST {
                free.push(memory);
            }
        });
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.memory[self.start..][..self.len]
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..][..self.len]
    }
}

impl<'a, T: Element> IntoIterator for &'a Buffer<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<T: Element> From<Vec<T>> for Buffer<T> {
    fn from(memory: Vec<T>) -> Self {
        let len = memory.len();
        Buffer { memory, start: 0, len }
    }
}

impl<T: Element> From<&[T]> for Buffer<T> {
    fn from(values: &[T]) -> Self {
        let mut buffer = Buffer::new(values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

impl<T: Element> Default for Buffer<T> {
    fn default() -> Self {
        Buffer { memory: Vec::new(), start: 0, len: 0 }
    }
}

impl<T: Element> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        Buffer::from(&**self)
    }
}

impl<T: Element + PartialEq> PartialEq for Buffer<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Element + std::fmt::Debug> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_and_fits_best() {
        let (a, b) = (Buffer::<u32>::new(100), Buffer::<u32>::new(10));
        let places = [a.as_ptr(), b.as_ptr()];
        drop((a, b));
        let small = Buffer::<u32>::new(10);
        assert_eq!(small.as_ptr(), places[1]);
        let again = Buffer::<u32>::new(60);
        assert_eq!((again.as_ptr(), again.len()), (places[0], 60));
        drop(again);
        // The largest is too small, and a new one takes its place.
        assert_eq!(Buffer::<u32>::new(200).len(), 200);
        assert_eq!(u32::free().with_borrow(|free| free.len()), 1);
        let mut ones = Buffer::<u32>::zeros(150);
        assert!(ones.iter().all(|v| *v == 0));
        ones.fill(1);
        ones.resize(3);
        assert_eq!((ones.clone().into_vec(), ones.len()), (vec![1; 3], 3));
        ones.resize(1000);
        assert_eq!(ones.len(), 1000);
        assert_eq!(ones.as_ptr() as usize % LINE, 0);
    }

    #[test]
    fn large_and_many_are_not_kept() {
        drop(Buffer::<i32>::new(LARGEST / 4 + 1));
        assert_eq!(i32::free().with_borrow(|free| free.len()), 0);
        drop(Vec::from_iter((0..2 * MOST).map(|_| Buffer::<i32>::new(3))));
        assert_eq!(i32::free().with_borrow(|free| free.len()), MOST);
        drop((Buffer::<u8>::new(SMALL), Buffer::<u8>::new(SMALL + 1)));
        trim_buffers();
        assert_eq!(u8::free().with_borrow(|free| Vec::from_iter(free.iter().map(Vec::len))), [SMALL + LINE]);
        let whole = Buffer::<i32>::new(3).into_vec();
        assert_eq!((whole.len(), i32::free().with_borrow(|free| free.len())), (3, MOST - 1));
    }
}
