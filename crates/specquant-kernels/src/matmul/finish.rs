//! What becomes of a group's integer sums: numbers, added up over groups and parts, and written to a rectangle of the result. Instruction sets compile it for
//! themselves, or have their own to the same bits.

use super::Part;
use super::grid::Rect;
use crate::weights::PANEL;
use std::ops::Range;

/// A panel's integer sums over a group of some tokens, and what makes numbers of them: `scale · channel_scale · (acc − zero · colsum)`.
pub(super) struct Term<'a> {
    pub acc: &'a [[i32; PANEL]],
    /// Of the channels.
    pub channel_scale: &'a [f32; PANEL],
    /// Sums of the channels' codes.
    pub colsum: &'a [i32; PANEL],
    /// Zero points of the tokens.
    pub zero: &'a [i32],
    /// Scales of the tokens.
    pub scale: &'a [f32],
}

impl<'a> Term<'a> {
    /// Of group `group` and the rows `strip` from `row` on.
    #[inline(always)]
    pub fn new(
        (a, w): &Part<'a>,
        panel: usize,
        group: usize,
        row: usize,
        strip: &Range<usize>,
        acc: &'a [[i32; PANEL]],
    ) -> Self {
        let (channel_scale, colsum) = w.scales(panel, group);
        let tokens = row + strip.start..row + strip.end;
        Term { acc, channel_scale, colsum, zero: &a.zero[tokens.clone()], scale: &a.scale[tokens] }
    }
}

/// Where a panel's sums of some tokens go: the columns of a rectangle from `col` on; those that it does not have are dropped.
pub(super) struct Columns<'a, 'y> {
    pub rect: &'a mut Rect<'y>,
    /// Of the first token.
    pub row: usize,
    pub col: usize,
    /// Whether they are added to what is there.
    pub accumulate: bool,
}

/// Adds a group's product to `sum`, or begins with it.
#[inline(always)]
pub(super) fn fold(group: Term, sum: &mut [[f32; PANEL]], begin: bool) {
    for (i, sum) in sum.iter_mut().enumerate() {
        let product = product(&group, i);
        for c in 0..PANEL {
            sum[c] = if begin { product[c] } else { sum[c] + product[c] };
        }
    }
}

/// Writes the products of parts of one group times the tokens' scales.
#[inline(always)]
pub(super) fn finish(main: Term, tail: Option<Term>, to: Columns) {
    let Columns { rect, row, col, accumulate } = to;
    for i in 0..main.acc.len() {
        let mut sum = scaled(&product(&main, i), main.scale[i]);
        if let Some(tail) = &tail {
            let more = scaled(&product(tail, i), tail.scale[i]);
            for c in 0..PANEL {
                sum[c] += more[c];
            }
        }
        store_row(sum, &mut rect.row_mut(row + i)[col..], accumulate);
    }
}

/// Writes a panel's sums times the tokens' scales.
#[inline(always)]
pub(super) fn store(sum: &[[f32; PANEL]], scale: &[f32], to: Columns) {
    let Columns { rect, row, col, accumulate } = to;
    for (i, (sum, scale)) in sum.iter().zip(scale).enumerate() {
        store_row(scaled(sum, *scale), &mut rect.row_mut(row + i)[col..], accumulate);
    }
}

/// Token i's product of a group, without the token's scale.
#[inline(always)]
fn product(term: &Term, i: usize) -> [f32; PANEL] {
    let (acc, zero, mut product) = (&term.acc[i], term.zero[i], [0.; PANEL]);
    for c in 0..PANEL {
        product[c] = term.channel_scale[c] * (acc[c] - zero * term.colsum[c]) as f32;
    }
    product
}

#[inline(always)]
fn scaled(sum: &[f32; PANEL], scale: f32) -> [f32; PANEL] {
    let mut row = [0.; PANEL];
    for c in 0..PANEL {
        row[c] = scale * sum[c];
    }
    row
}

/// A row of its own: what may overlap with y is computed one channel after the other.
#[inline(always)]
fn store_row(mut row: [f32; PANEL], y: &mut [f32], accumulate: bool) {
    let width = y.len().min(PANEL);
    if accumulate {
        match y.first_chunk::<PANEL>() {
            Some(y) => (0..PANEL).for_each(|c| row[c] += y[c]),
            None => (0..width).for_each(|c| row[c] += y[c]),
        }
    }
    match y.first_chunk_mut() {
        Some(y) => *y = row,
        None => y[..width].copy_from_slice(&row[..width]),
    }
}
