//! What can be wrong with the input of a packer.

/// A condition that the packers refuse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// A buffer's length does not follow from the shape.
    #[error("{what} has {got} elements where the shape asks for {want}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length that the shape asks for.
        want: usize,
    },
    /// A code lies outside the signed range of its bit width.
    #[error("code {code} at output channel {row}, input {col} does not fit {bits} signed bits")]
    CodeRange {
        /// The code.
        code: i8,
        /// Output channel.
        row: usize,
        /// Input channel.
        col: usize,
        /// Bit width.
        bits: u8,
    },
    /// A scale or coefficient is not finite, or a scale is negative.
    #[error("{what} at index {index} is {value}; it must be finite{}", if *.what == "scale" { " and not negative" } else { "" })]
    NotFinite {
        /// Which buffer.
        what: &'static str,
        /// Index in the buffer.
        index: usize,
        /// The value, as text.
        value: String,
    },
    /// An unsupported bit width.
    #[error("{bits} bits for {what} are not supported: choose 2 to 8")]
    Bits {
        /// Which operand.
        what: &'static str,
        /// The width asked for.
        bits: u8,
    },
    /// The group size does not divide the input width, or is not a multiple of 8.
    #[error(
        "group size {group_size} does not fit input width {inp}: it must divide it and be a multiple of 8"
    )]
    GroupSize {
        /// The group size asked for.
        group_size: usize,
        /// Input width.
        inp: usize,
    },
    /// A group is so long that its integer products could overflow 32 bits.
    #[error(
        "{group_size} inputs per scale at {bits} bits can overflow a 32-bit sum: use groups of at most {limit} or fewer bits"
    )]
    Depth {
        /// Inputs per scale.
        group_size: usize,
        /// Bit width of the weights.
        bits: u8,
        /// Inputs that are safe with 8-bit activations.
        limit: usize,
    },
    /// A coefficient of a direction that the basis does not have.
    #[error("a branch coefficient belongs to basis row {row}, but there are only {len}")]
    BasisRow {
        /// The row.
        row: usize,
        /// Rows of the basis.
        len: usize,
    },
}
