//! AMX's eight tiles: what shape they have, and for how long.

use crate::isa::AmxInt8;
use std::arch::asm;

/// Rows of a tile, and bytes of a row.
pub(crate) const ROWS: usize = 16;
pub(crate) const ROW_BYTES: usize = 64;
/// Rows of two tiles.
pub(crate) const STRIP: usize = 2 * ROWS;

/// What `ldtilecfg` reads: rows and bytes a row of each of the eight tiles.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// tiles: rows and bytes a row of each.
    fn new(tiles: [[usize; 2]; 8]) -> Self {
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, [rows, row_bytes]) in tiles.into_iter().enumerate() {
            (config.rows[i], config.row_bytes[i]) = (rows as u8, row_bytes as u16);
        }
        config
    }
}

/// The shapes of this thread's tiles: to change them takes as long as some products. They are given up in the end, for tiles in use are
/// saved at every switch of threads.
#[derive(Default)]
pub(crate) struct Tiles {
    /// Rows of a strip, and quads of a step.
    shape: Option<(usize, usize)>,
}

impl Tiles {
    /// Makes them suit strips of `rows` and steps of `step` quads, up to [`STRIP`] and [`ROWS`]: sums in tiles 0 to 3, rows in 4 and 5, columns in 6 and 7.
    pub(crate) fn shape(&mut self, _: AmxInt8, rows: usize, step: usize) {
        if self.shape == Some((rows, step)) {
            return;
        }
        let halves = [rows.min(ROWS), rows.saturating_sub(ROWS)];
        let mut tiles = [[0; 2]; 8];
        for (r, rows) in halves.into_iter().enumerate().filter(|(_, rows)| *rows > 0) {
            tiles[2 * r..2 * r + 2].fill([rows, ROW_BYTES]);
            tiles[4 + r] = [rows, 4 * step];
        }
        tiles[6..].fill([step, ROW_BYTES]);
        let config = Config::new(tiles);
        // SAFETY: the token proves AMX; the processor reads the configuration.
        unsafe { asm!("ldtilecfg [{config}]", config = in(reg) &raw const config, options(nostack)) };
        self.shape = Some((rows, step));
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        if self.shape.is_some() {
            // SAFETY: there was AMX to shape them with.
            unsafe { asm!("tilerelease", options(nostack)) };
        }
    }
}
