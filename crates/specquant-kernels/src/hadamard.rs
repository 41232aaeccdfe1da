//! Orthonormal Walsh-Hadamard transforms of any width: the rotations that QuaRot (arXiv 2404.00456, Sections 3 and 4) applies to
//! activations before it quantizes them, and to weights so that the layer's result stays what it was.
//!
//! All entries of a Hadamard matrix are ±1, so that a transform spreads an outlier evenly over everything that it mixes. For a
//! power of two there is Sylvester's matrix, which butterflies apply in n log n additions. A width n = K·2^m asks for a matrix of
//! order K besides; [`Hadamard`] says which widths have one, and what the others get.
//!
//! Deviations from QuaRot's code: it copies its matrices of orders 12 to 172 from Sloane's library, and most of those made here
//! are others, which matters to nobody who transforms both activations and weights; and a width that has no plan there (4864,
//! 29568, 9 heads) is no error.

mod butterflies;
mod kernel;
mod orders;

use crate::{Isa, for_each_chunk};
use kernel::{Scratch, Steps, transform};
use orders::Order;
use std::fmt;
use std::sync::Arc;

/// Values per task; fewer are not worth a second thread.
const CHUNK: usize = 1 << 14;

/// The plan of an orthonormal transform of vectors of n values.
///
/// Its matrix consists of n / [`block`](Self::block) equal blocks on the diagonal,
///
/// ```text
/// H = (H_K ⊗ H_L) / √(K·L),   K·L = block,   H[a·L + b, a'·L + b'] = H_K[a, a'] · H_L[b, b'] / √block
/// ```
///
/// with L a power of two, Sylvester's `H_L[b, b'] = (−1)^popcount(b & b')`, and a Hadamard matrix H_K of order
/// [`order_k`](Self::order_k). H_L is symmetric; H_K need not be. For n = p·2^e with an odd p, it is the first of these that
/// exists:
///
/// 1. p = 1: K = 1, L = n.
/// 2. K = 4p by a construction of Paley or Williamson, L = n / K: for p up to 63, except 47, 59 and 61.
/// 3. p = q·r with q ≤ r as close to each other as can be: H_K = H_4r ⊗ H_4q, L = n / K.
/// 4. K = 1, L = 2^e, the largest power of two in n. If n is odd, this is the identity.
///
/// [`Display`](fmt::Display) writes the factors of a block, `28·512`, after the number of blocks if there are several,
/// `107 x 128`.
///
/// Each value costs log2 L additions, and about K/4 + 7 for every order K.
///
/// To rotate the input of a layer y = x Wᵀ, transform x and the rows of W alike: (x H)(W H)ᵀ = x Wᵀ. To give the output of a
/// layer the rotation, [`apply_across`](Self::apply_across) the rows of W `[out, in]`, with `inner` = in: x (Hᵀ W)ᵀ = y H.
#[derive(Debug, Clone)]
pub struct Hadamard {
    n: usize,
    /// L.
    low: usize,
    /// The factors of H_K, the innermost first.
    orders: Vec<Arc<Order>>,
}

impl Hadamard {
    /// The transform of vectors of `n` values.
    pub fn new(n: usize) -> Self {
        let power = if n == 0 { 1 } else { 1 << n.trailing_zeros() };
        let ks = odd_orders(n / power, power);
        let orders: Vec<_> = ks.into_iter().filter_map(Order::get).collect();
        // An order is four times an odd number.
        Hadamard { n, low: power >> (2 * orders.len()), orders }
    }

    /// Width n of the vectors.
    pub fn width(&self) -> usize {
        self.n
    }

    /// Neighbouring values that are mixed with each other: n, or a power of two that divides n. 1 for the identity.
    pub fn block(&self) -> usize {
        self.order_k() * self.low
    }

    /// K, the order of the factor that is no power of two; 1 if there is none.
    pub fn order_k(&self) -> usize {
        self.orders.iter().map(|order| order.k).product()
    }

    /// x ↦ x H for every row, in place. x: [rows, n]. The result depends neither on the other rows nor on the number of threads or
    /// the instruction set.
    ///
    /// # Panics
    /// If x is not [rows, n].
    pub fn apply(&self, x: &mut [f32], rows: usize) {
        self.run(x, rows, 1, false);
    }

    /// x ↦ x Hᵀ for every row, in place: undoes [`apply`](Self::apply). x: [rows, n].
    ///
    /// # Panics
    /// If x is not [rows, n].
    pub fn apply_transposed(&self, x: &mut [f32], rows: usize) {
        self.run(x, rows, 1, true);
    }

    /// [`apply`](Self::apply) along the second of three axes: x\[r, ·, i\] ↦ x\[r, ·, i\] H, in place. With n heads and `inner` =
    /// head_dim this mixes the heads (QuaRot's `online_partial_had`). x: [rows, n, inner]
    ///
    /// # Panics
    /// If x is not [rows, n, inner].
    pub fn apply_across(&self, x: &mut [f32], rows: usize, inner: usize) {
        self.run(x, rows, inner, false);
    }

    /// x\[r, ·, i\] ↦ x\[r, ·, i\] Hᵀ, in place: undoes [`apply_across`](Self::apply_across). x: [rows, n, inner].
    ///
    /// # Panics
    /// If x is not [rows, n, inner].
    pub fn apply_across_transposed(&self, x: &mut [f32], rows: usize, inner: usize) {
        self.run(x, rows, inner, true);
    }

    /// H, [n, n] row-major: 4n² bytes, for tests and for small n.
    pub fn matrix(&self) -> Vec<f32> {
        let (n, block, scale) = (self.n, self.block(), self.scale());
        let mut matrix = vec![0.0; n * n];
        for (i, row) in matrix.chunks_exact_mut(n.max(1)).enumerate() {
            for j in i / block * block..(i / block + 1) * block {
                row[j] = if self.is_negative(i % block, j % block) { -scale } else { scale };
            }
        }
        matrix
    }

    fn is_negative(&self, i: usize, j: usize) -> bool {
        let mut negative = ((i % self.low) & (j % self.low)).count_ones() % 2 == 1;
        let (mut i, mut j) = (i / self.low, j / self.low);
        for order in &self.orders {
            negative ^= order.sign(i % order.k, j % order.k) < 0;
            (i, j) = (i / order.k, j / order.k);
        }
        negative
    }

    fn scale(&self) -> f32 {
        (1.0 / (self.block() as f64).sqrt()) as f32
    }

    fn run(&self, x: &mut [f32], rows: usize, inner: usize, transposed: bool) {
        self.run_with(Isa::active(), x, rows, inner, transposed);
    }

    fn run_with(&self, isa: Isa, x: &mut [f32], rows: usize, inner: usize, transposed: bool) {
        let want = rows.checked_mul(self.n).and_then(|len| len.checked_mul(inner));
        assert_eq!(Some(x.len()), want, "Hadamard transform: x is not [{rows}, {}, {inner}]", self.n);
        let block = self.block();
        if block == 1 || x.is_empty() {
            return;
        }
        let steps = Steps { low: self.low, inner, orders: &self.orders, transposed, scale: self.scale() };
        let task = |x: &mut [f32]| transform(isa, x, &steps, &mut Scratch::new(&self.orders));
        let chunk = (CHUNK / (block * inner)).max(1) * block * inner;
        for_each_chunk(x, chunk, |_, x| task(x));
    }
}

impl fmt::Display for Hadamard {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let block = self.block();
        if block < self.n {
            write!(f, "{} x ", self.n / block)?;
        }
        for order in self.orders.iter().rev() {
            write!(f, "{}·", order.k)?;
        }
        write!(f, "{}", self.low)
    }
}

/// The orders for the odd factor p of a width p·`power`, the innermost first; none if there are none.
fn odd_orders(p: usize, power: usize) -> Vec<usize> {
    let is_available = |q: usize| q.checked_mul(4).is_some_and(orders::is_available);
    if power >= 4 && is_available(p) {
        return vec![4 * p];
    }
    let splits = |q: &usize| p.is_multiple_of(*q) && is_available(*q) && is_available(p / q);
    match (3..64).filter(|q| q * q <= p).rfind(splits) {
        // The inner one may have too few columns to fill a vector, so it is the smaller.
        Some(q) if power >= 16 => vec![4 * q, 4 * p / q],
        _ => vec![],
    }
}

#[cfg(test)]
mod tests;
