//! Buffers that are used again. Memory fresh from the system has to be zeroed page by page, which takes as long as a block's integer products; and a
//! token is a thousand small buffers, each the size of one a token before.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::thread::LocalKey;

/// Larger buffers go back to the system: what 512 rows of the widest layers take is below it.
const LARGEST: usize = 32 << 20;
/// What a few tokens need is smaller: see [`trim_buffers`].
const SMALL: usize = 1 << 20;
/// Buffers of a type that a thread keeps at most.
const MOST: usize = 32;

/// Buffers that nobody on this thread uses at the moment.
pub type Free<T> = RefCell<Vec<Vec<T>>>;

/// What a [`Buffer`] can hold.
pub trait Element: Copy + 'static {
    /// What new memory is filled with.
    const ZERO: Self;
    /// The thread's free buffers.
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
element!(usize, 0);

/// A `Vec` of fixed length whose memory is used again when it is dropped.
pub struct Buffer<T: Element>(Vec<T>);

impl<T: Element> Buffer<T> {
    /// `len` values, whatever they are.
    pub fn new(len: usize) -> Self {
        if len == 0 {
            return Buffer(Vec::new());
        }
        let mut buffer = T::free().with_borrow_mut(|free| take(free, len)).unwrap_or_default();
        // What was used before is not cleared.
        if buffer.capacity() < len {
            buffer = Vec::with_capacity(len);
        }
        buffer.resize(len, T::ZERO);
        Buffer(buffer)
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Buffer::new(len);
        buffer.fill(T::ZERO);
        buffer
    }

    /// The values alone.
    pub fn into_vec(mut self) -> Vec<T> {
        std::mem::take(&mut self.0)
    }
}

/// Gives this thread's large free buffers back to the system: for the end of a prompt, whose memory decoding does not need.
pub fn trim_buffers() {
    fn trim<T: Element>() {
        T::free().with_borrow_mut(|free| free.retain(|buffer| buffer.capacity() * size_of::<T>() <= SMALL));
    }
    trim::<f32>();
    trim::<u8>();
}

/// The smallest free buffer that is large enough; where none is, the largest, in whose place comes a new one.
fn take<T>(free: &mut Vec<Vec<T>>, len: usize) -> Option<Vec<T>> {
    let mut found = None;
    // From the last one used.
    for (i, buffer) in free.iter().enumerate().rev() {
        let (capacity, best) = (buffer.capacity(), found.map_or(0, |(_, best)| best));
        let better = if best < len { capacity > best } else { (len..best).contains(&capacity) };
        if better {
            found = Some((i, capacity));
        }
        if capacity == len {
            break;
        }
    }
    found.map(|(i, _)| free.swap_remove(i))
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        if buffer.capacity() == 0 || buffer.capacity() * size_of::<T>() > LARGEST {
            return;
        }
        // A thread that ends has no free buffers any more.
        let _ = T::free().try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < MOST {
                free.push(buffer);
            }
        });
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<'a, T: Element> IntoIterator for &'a Buffer<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<T: Element> From<Vec<T>> for Buffer<T> {
    fn from(values: Vec<T>) -> Self {
        Buffer(values)
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
        Buffer(Vec::new())
    }
}

impl<T: Element> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        Buffer::from(&**self)
    }
}

impl<T: Element + PartialEq> PartialEq for Buffer<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<T: Element + std::fmt::Debug> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        self.0.fmt(f)
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
        assert!(Buffer::<u32>::zeros(150).iter().all(|v| *v == 0));
    }

    #[test]
    fn large_and_many_are_not_kept() {
        drop(Buffer::<i32>::new(LARGEST / 4 + 1));
        assert_eq!(i32::free().with_borrow(|free| free.len()), 0);
        drop(Vec::from_iter((0..2 * MOST).map(|_| Buffer::<i32>::new(3))));
        assert_eq!(i32::free().with_borrow(|free| free.len()), MOST);
        drop((Buffer::<u8>::new(SMALL), Buffer::<u8>::new(SMALL + 1)));
        trim_buffers();
        assert_eq!(u8::free().with_borrow(|free| Vec::from_iter(free.iter().map(Vec::len))), [SMALL]);
        let whole = Buffer::<i32>::new(3).into_vec();
        assert_eq!((whole.len(), i32::free().with_borrow(|free| free.len())), (3, MOST - 1));
    }
}
