//! The kernels of [`super::codes`] and [`super::pairs`] where an architecture has none: they cannot be made.

use super::{Coded, State};
use crate::Isa;
use crate::kv::Codes;

#[derive(Clone, Copy)]
pub(super) enum Kernel {}

impl Kernel {
    pub(super) fn new(_: Isa, _: usize) -> Option<Self> {
        None
    }

    pub(super) fn dot_rows(self, _: &[f32], _: &Codes, _: &mut [f32], _: usize) {
        match self {}
    }

    pub(super) fn add_values(self, _: &[f32], _: usize, _: &Codes, _: &mut [f32]) {
        match self {}
    }

    pub(super) fn absorb_codes(self, _: &Coded, _: &mut State) {
        match self {}
    }
}
