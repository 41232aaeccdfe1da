//! Hadamard matrices whose order is no power of two: square, of ±1, with orthogonal rows. Three constructions give every order
//! that the widths of LLaMA-like models ask for.
//!
//! - Paley I and II (R. E. A. C. Paley, "On orthogonal matrices", J. Math. Phys. 12, 1933). Let χ be the quadratic character
//!   modulo an odd prime q: 0 for 0, 1 for the other squares, −1 for the rest; Q\[i, j\] = χ(i − j), q × q; and S the matrix
//!   `[0 1; −1 Q]` if q ≡ 3 mod 4 or `[0 1; 1 Q]` if q ≡ 1 mod 4, bordered with ones. In the first case S + I has order q + 1.
//!   In the second, `[1 −1; −1 −1]` for the zeros of S and `s·[1 1; 1 −1]` for its s = ±1 give order 2(q + 1).
//! - Williamson (J. Williamson, "Hadamard's determinant theorem and the sum of four squares", Duke Math. J. 11, 1944): four
//!   symmetric circulant t × t matrices with A² + B² + C² + D² = 4t·I give `[A B C D; −B A −D C; −C D A −B; −D −C B A]` of
//!   order 4t.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Largest order that is built. Mixing K values costs K/4 additions for each of them: beyond this, two smaller orders are better.
const MAX_ORDER: usize = 256;

/// Inputs that one lookup stands for.
pub(super) const GROUP: usize = 4;
/// Outputs that are summed side by side.
pub(super) const OUTPUTS: usize = 4;
/// Groups of inputs that are looked up in a row: their tables, 16 × 16 floats each, take half of an L1 cache of 32 KiB.
pub(super) const GROUPS: usize = 16;

/// First rows of Williamson's A, B, C and D, + for 1 and - for −1, where neither of Paley's constructions with a prime reaches
/// the order. 156 is `had.156.will` of N. J. A. Sloane's "A Library of Hadamard Matrices". The others come from a search for two
/// pairs of symmetric rows whose autocorrelations cancel; the orders were first reached by Paley with prime powers (52, 100),
/// Williamson (172), Baumert, Golomb & Hall (92: Bull. AMS 68, 1962) and Baumert (116: Bull. AMS 72, 1966).
const WILLIAMSON: [[&str; 4]; 6] = [
    ["+--++++++++--", "+++-+-++-+-++", "+-++--++--++-", "+-+++----+++-"],
    [
        "+--+-+-++++++++++-+-+--",
        "+--++-+-+-++++-+-+-++--",
        "+++---++--++++--++---++",
        "+--+--+++------+++--+--",
    ],
    [
        "+-++---++++++++++++---++-",
        "+-+---+---++++++---+---+-",
        "+-+--+-++--++++--++-+--+-",
        "++--+--++-+----+-++--+--+",
    ],
    [
        "+--+-++---++++++++++---++-+--",
        "+-+-++---+--++++++--+---++-+-",
        "+++-++-++++---++---++++-++-++",
        "+-+-+----++-++--++-++----+-+-",
    ],
    [
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ],
    [
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++---++++-+--+--++--------++--+--+-++++---+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
    ],
];

/// How a matrix is made.
enum Construction {
    Paley1(usize),
    Paley2(usize),
    Williamson([&'static str; 4]),
}

fn is_prime(q: usize) -> bool {
    q > 1 && (2..).take_while(|d| d * d <= q).all(|d| !q.is_multiple_of(d))
}

/// The construction of order k = 4·odd, if there is one.
fn construction(k: usize) -> Option<Construction> {
    if k % 8 != 4 || !(12..=MAX_ORDER).contains(&k) {
        return None;
    }
    // k − 1 ≡ 3 and k/2 − 1 ≡ 1 modulo 4, as the two constructions ask.
    if is_prime(k - 1) {
        return Some(Construction::Paley1(k - 1));
    }
    if is_prime(k / 2 - 1) {
        return Some(Construction::Paley2(k / 2 - 1));
    }
    WILLIAMSON.into_iter().find(|rows| rows[0].len() == k / 4).map(Construction::Williamson)
}

/// Whether there is a matrix of order k = 4·odd, 12 and up.
pub(super) fn is_available(k: usize) -> bool {
    construction(k).is_some()
}

/// A Hadamard matrix, and how to sum with it.
#[derive(Debug)]
pub(super) struct Order {
    /// Its order, a multiple of 4.
    pub k: usize,
    /// [k, k] of ±1.
    signs: Vec<i8>,
    /// The signs that x·H and x·Hᵀ take of x: [inputs / 64, outputs / 4, inputs / 4 (16, fewer in the last), 4 outputs], a byte each,
    /// whose bit 4 + i is set where the group's input i is subtracted: in a table of 16 lines of 16 sums, the first sum's number.
    codes: [Vec<u32>; 2],
}

impl Order {
    /// The matrix of order k; `None` if there is none. Kept for the life of the process, as a model has few widths.
    pub fn get(k: usize) -> Option<Arc<Order>> {
        static CACHE: OnceLock<Mutex<HashMap<usize, Arc<Order>>>> = OnceLock::new();
        let construction = construction(k)?;
        // A panic elsewhere cannot leave the map half-written, so a poisoned lock is as good as new.
        let mut cache = CACHE.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(cache.entry(k).or_insert_with(|| Arc::new(Order::new(k, &construction)))))
    }

    fn new(k: usize, construction: &Construction) -> Self {
        let signs = match construction {
            Construction::Paley1(q) => {
                let s = bordered(*q, -1);
                square(k, |i, j| if i == j { 1 } else { s(i, j) })
            }
            Construction::Paley2(q) => {
                let s = bordered(*q, 1);
                square(k, |i, j| match (s(i / 2, j / 2), i % 2, j % 2) {
                    (0, 0, 0) => 1,
                    (0, ..) => -1,
                    (s, 1, 1) => -s,
                    (s, ..) => s,
                })
            }
            Construction::Williamson(rows) => {
                let t = k / 4;
                // Which of A, B, C and D stands in a block of the array, and with which sign: the products of i, j and k.
                let sign = [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]];
                square(k, |i, j| {
                    let (a, b) = (i / t, j / t);
                    let plus = rows[a ^ b].as_bytes()[(j % t + t - i % t) % t] == b'+';
                    if plus { sign[a][b] } else { -sign[a][b] }
                })
            }
        };
        let codes = [codes(k, |i, j| signs[i * k + j]), codes(k, |i, j| signs[j * k + i])];
        Order { k, signs, codes }
    }

    /// The sign at row i, column j.
    pub fn sign(&self, i: usize, j: usize) -> i8 {
        self.signs[i * self.k + j]
    }

    /// For the loops over GROUPS groups of inputs, outputs and groups, in this order: which of its table each group adds.
    pub fn codes(&self, transposed: bool) -> &[u32] {
        &self.codes[usize::from(transposed)]
    }
}

fn square(k: usize, at: impl Fn(usize, usize) -> i8) -> Vec<i8> {
    (0..k * k).map(|e| at(e / k, e % k)).collect()
}

/// Paley's S, with `corner` in the first column.
fn bordered(q: usize, corner: i8) -> impl Fn(usize, usize) -> i8 {
    let mut chi = vec![-1; q];
    (0..q).for_each(|i| chi[i * i % q] = 1);
    chi[0] = 0;
    move |i, j| match (i, j) {
        (0, 0) => 0,
        (0, _) => 1,
        (_, 0) => corner,
        _ => chi[(i + q - j) % q],
    }
}

/// See [`Order`]; `sign(i, j)` is that of input i in output j.
fn codes(k: usize, sign: impl Fn(usize, usize) -> i8) -> Vec<u32> {
    let mut codes = Vec::with_capacity(k * k / (GROUP * OUTPUTS));
    for first in (0..k).step_by(GROUP * GROUPS) {
        for output in (0..k).step_by(OUTPUTS) {
            for input in (first..k.min(first + GROUP * GROUPS)).step_by(GROUP) {
                let negative = |i, o| u32::from(sign(input + i, output + o) < 0);
                let bits = (0..GROUP * OUTPUTS).map(|e| (e % GROUP, e / GROUP));
                codes.push(bits.fold(0, |code, (i, o)| code | negative(i, o) << (8 * o + GROUP + i)));
            }
        }
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rows_of_every_order_are_orthogonal() {
        let orders: Vec<usize> = (0..2 * MAX_ORDER).filter(|&k| is_available(k)).collect();
        // All of 4·odd up to 256, but for 188, 236 and 244.
        let all = (12..=MAX_ORDER).step_by(8).filter(|k| ![188, 236, 244].contains(k));
        assert_eq!(orders, all.collect::<Vec<_>>());
        for k in orders {
            let h = Order::get(k).unwrap();
            assert!(Arc::ptr_eq(&h, &Order::get(k).unwrap()));
            for i in 0..k {
                for j in 0..k {
                    assert_eq!(h.sign(i, j).abs(), 1);
                    let dot: i32 = (0..k).map(|e| i32::from(h.sign(i, e)) * i32::from(h.sign(j, e))).sum();
                    assert_eq!(dot, if i == j { k as i32 } else { 0 }, "order {k}: rows {i} and {j}");
                }
            }
        }
        for k in [0, 1, 2, 4, 8, 10, 20 * 2, 188, 260, usize::MAX] {
            assert!(Order::get(k).is_none() && !is_available(k), "{k}");
        }
    }

    /// Paley's construction of order 12 as printed in textbooks: rows of the quadratic residues 1, 3, 4, 5, 9 modulo 11.
    #[test]
    fn order_12_holds_the_residues_modulo_11() {
        let h = Order::get(12).unwrap();
        assert!((0..12).all(|j| h.sign(0, j) == 1) && (1..12).all(|i| h.sign(i, 0) == -1));
        for i in 1..12 {
            for j in 1..12 {
                let residue = [0, 1, 3, 4, 5, 9].contains(&((i + 11 - j) % 11));
                assert_eq!(h.sign(i, j), if residue { 1 } else { -1 }, "{i} {j}");
            }
        }
    }

    #[test]
    fn williamson_matrices_are_symmetric_circulants_with_squares_adding_up() {
        for rows in WILLIAMSON {
            let t = rows[0].len();
            for s in 0..t {
                let corr = rows.iter().map(|row| {
                    let r: Vec<i32> = row.bytes().map(|c| if c == b'+' { 1 } else { -1 }).collect();
                    assert!(r.len() == t && row.bytes().all(|c| b"+-".contains(&c)));
                    assert_eq!(r[s], r[(t - s) % t], "{row} is not symmetric");
                    (0..t).map(|i| r[i] * r[(i + s) % t]).sum::<i32>()
                });
                assert_eq!(corr.sum::<i32>(), if s == 0 { 4 * t as i32 } else { 0 }, "t = {t}, shift {s}");
            }
        }
    }
}
