//! GGUF containers, versions 2 and 3 (ggml/docs/gguf.md). Nothing in the file is trusted: every count and offset is checked against
//! the bytes that are there before anything is allocated.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::Dtype;
use crate::{Error, Result};

/// One metadata value. Strings and arrays stay where they are in the file.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    /// Element type, count, bytes.
    Array(u32, usize, Range<usize>),
}

/// A tensor's entry in the header.
#[derive(Debug, Clone)]
pub(crate) struct TensorInfo {
    pub dtype: Dtype,
    /// Slowest dimension first: the reverse of the file's order.
    pub shape: Vec<usize>,
    /// Bytes in the file; empty for a type of unknown size.
    pub range: Range<usize>,
}

/// A parsed header.
pub(crate) struct Gguf<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a scalar type.
fn scalar_size(kind: u32) -> Option<usize> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        U32 | I32 | F32 => 4,
        10..=12 => 8,
        _ => return None,
    })
}

/// A reading position; complaints say where and what.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

type Parsed<T> = std::result::Result<T, String>;

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: u64, what: &str) -> Parsed<Range<usize>> {
        match usize::try_from(n).ok().filter(|n| *n <= self.left()) {
            Some(n) => {
                self.at += n;
                Ok(self.at - n..self.at)
            }
            None => Err(format!(
                "ends within {what} (at byte {}, which needs {n} more, but {} are left)",
                self.at,
                self.left()
            )),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Parsed<[u8; N]> {
        let range = self.take(N as u64, what)?;
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[range]);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Parsed<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Parsed<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Parsed<Range<usize>> {
        let n = self.u64(what)?;
        self.take(n, what)
    }

    fn name(&mut self, what: &str) -> Parsed<String> {
        let at = self.at;
        let range = self.text(what)?;
        let name = std::str::from_utf8(&self.bytes[range]);
        name.map(str::to_owned).map_err(|_| format!("has {what} at byte {at} that is not UTF-8"))
    }

    /// A number of things that take at least `least` bytes each.
    fn count(&mut self, least: usize, what: &str) -> Parsed<usize> {
        let n = self.u64(what)?;
        usize::try_from(n)
            .ok()
            .filter(|n| *n <= self.left() / least)
            .ok_or_else(|| format!("announces {n} {what}, more than fit in the {} bytes left", self.left()))
    }

    fn value(&mut self, kind: u32, key: &str) -> Parsed<Value> {
        Ok(match kind {
            STRING => Value::Text(self.text(key)?),
            ARRAY => {
                let kind = self.u32(key)?;
                let least = if kind == STRING { Some(8) } else { scalar_size(kind) };
                let least = least.ok_or_else(|| format!("{key}: arrays of type {kind} are not supported"))?;
                let count = self.count(least, &format!("elements of {key}"))?;
                let start = self.at;
                if kind == STRING {
                    for _ in 0..count {
                        self.text(key)?;
                    }
                } else {
                    self.take((count * least) as u64, key)?;
                }
                Value::Array(kind, count, start..self.at)
            }
            _ => {
                let size = scalar_size(kind).ok_or_else(|| format!("{key} has the unknown type {kind}"))?;
                let range = self.take(size as u64, key)?;
                scalar(kind, &self.bytes[range])
            }
        })
    }
}

/// A scalar from its bytes, as many as [`scalar_size`] says.
fn scalar(kind: u32, bytes: &[u8]) -> Value {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let n = u64::from_le_bytes(wide);
    let unused = 64 - 8 * bytes.len() as u32;
    match kind {
        1 | 3 | I32 | 11 => Value::Signed((n << unused) as i64 >> unused),
        F32 => Value::Float(f64::from(f32::from_bits(n as u32))),
        7 => Value::Bool(n != 0),
        12 => Value::Float(f64::from_bits(n)),
        _ => Value::Unsigned(n),
    }
}

impl<'a> Gguf<'a> {
    /// Parses the header of `bytes`, the whole file `path`, and checks that every tensor lies within it.
    pub fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        Self::read(path, bytes).map_err(|what| {
            Error::corrupt(
                path,
                format!("{what}; the file is truncated or damaged, or no GGUF of version 2 or 3; download it again"),
            )
        })
    }

    fn read(path: &'a Path, bytes: &'a [u8]) -> Parsed<Self> {
        let mut c = Cursor { bytes, at: 0 };
        if &c.array::<4>("the magic number")? != b"GGUF" {
            return Err("does not start with GGUF".into());
        }
        match c.u32("the version")? {
            2 | 3 => {}
            v if matches!(v.swap_bytes(), 1..=3) => {
                return Err("is a big-endian GGUF file, which is not supported".into());
            }
            v => return Err(format!("is GGUF version {v}; supported are 2 and 3 (convert the model again)")),
        }
        // A tensor: name length, number of dimensions, type, offset. A key: its length, type, one byte of value.
        let tensor_count = c.u64("the number of tensors")?;
        let key_count = c.count(13, "metadata keys")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = c.name("a metadata key")?;
            let kind = c.u32(&key)?;
            let value = c.value(kind, &key)?;
            if metadata.contains_key(&key) {
                return Err(format!("has the metadata key {key} twice"));
            }
            metadata.insert(key, value);
        }
        if tensor_count > (c.left() / 24) as u64 {
            return Err(format!(
                "announces {tensor_count} tensors, more than fit in the {} bytes left",
                c.left()
            ));
        }
        let mut entries = Vec::new();
        for _ in 0..tensor_count {
            let name = c.name("a tensor's name")?;
            let what = format!("the entry of tensor {name}");
            let n_dims = c.u32(&what)?;
            if n_dims > 4 {
                return Err(format!("gives tensor {name} {n_dims} dimensions; the format has 4 at most"));
            }
            let mut dims = (0..n_dims).map(|_| c.u64(&what)).collect::<Parsed<Vec<u64>>>()?;
            dims.reverse();
            entries.push((name, dims, c.u32(&what)?, c.u64(&what)?));
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
            Some(other) => return Err(format!("has the alignment {other:?}; it must be a power of two")),
        };
        let data = (c.at as u64).next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, dims, kind, offset) in entries {
            let info = tensor(&name, &dims, kind, offset, data, alignment, bytes.len())?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(format!("has the tensor {name} twice"));
            }
        }
        Ok(Gguf { path, bytes, metadata, tensors })
    }

    pub fn path(&self) -> &'a Path {
        self.path
    }

    fn get<T>(&self, key: &str, what: &str, read: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        let wrong = || {
            Error::corrupt(self.path, format!("metadata key {key} is not {what}; convert the model again"))
        };
        self.metadata.get(key).map(|v| read(v).ok_or_else(wrong)).transpose()
    }

    /// A whole number that is not negative.
    pub fn uint(&self, key: &str) -> Result<Option<u64>> {
        self.get(key, "a whole number", |v| match v {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        })
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", |v| if let Value::Float(x) = v { Some(*x) } else { None })
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "a flag", |v| if let Value::Bool(x) = v { Some(*x) } else { None })
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key, "UTF-8 text", |v| match v {
            Value::Text(range) => std::str::from_utf8(&self.bytes[range.clone()]).ok(),
            _ => None,
        })
    }

    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.get(key, "a list of UTF-8 texts", |v| match v {
            Value::Array(STRING, count, range) => {
                let mut c = Cursor { bytes: &self.bytes[..range.end], at: range.start };
                (0..*count).map(|_| std::str::from_utf8(&self.bytes[c.text(key).ok()?]).ok()).collect()
            }
            _ => None,
        })
    }

    /// A list of numbers of `kind`.
    fn numbers<T>(&self, key: &str, kind: u32, what: &str, read: fn([u8; 4]) -> T) -> Result<Option<Vec<T>>> {
        self.get(key, what, |v| match v {
            Value::Array(k, _, range) if *k == kind => {
                let words = self.bytes[range.clone()].chunks_exact(4);
                Some(words.map(|b| read([b[0], b[1], b[2], b[3]])).collect())
            }
            _ => None,
        })
    }

    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.numbers(key, I32, "a list of 32-bit integers", i32::from_le_bytes)
    }

    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.numbers(key, F32, "a list of 32-bit floats", f32::from_le_bytes)
    }
}

fn tensor(
    name: &str,
    dims: &[u64],
    kind: u32,
    offset: u64,
    data: u64,
    alignment: u64,
    len: usize,
) -> Parsed<TensorInfo> {
    let shape: Vec<usize> = dims.iter().map(|d| usize::try_from(*d).unwrap_or(usize::MAX)).collect();
    let dtype = dtype(kind);
    if !offset.is_multiple_of(alignment) {
        return Err(format!(
            "places tensor {name} at offset {offset}, which is not a multiple of {alignment}"
        ));
    }
    let Some(count) = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)) else {
        return Err(format!("gives tensor {name} the absurd shape {shape:?}"));
    };
    let Some((elements, size)) = dtype.block() else {
        return Ok(TensorInfo { dtype, shape, range: 0..0 });
    };
    let cols = shape.last().copied().unwrap_or(1);
    if !cols.is_multiple_of(elements) {
        return Err(format!(
            "stores rows of {cols} of tensor {name} in {} blocks of {elements}",
            dtype.name()
        ));
    }
    let bytes = (count / elements).checked_mul(size);
    let start = data.checked_add(offset).and_then(|s| usize::try_from(s).ok());
    let range = start.zip(bytes).and_then(|(s, n)| Some(s..s.checked_add(n)?)).filter(|r| r.end <= len);
    let range = range.ok_or_else(|| {
        format!(
            "ends within tensor {name} ({} {shape:?} at offset {offset} of the data, file of {len} bytes)",
            dtype.name()
        )
    })?;
    Ok(TensorInfo { dtype, shape, range })
}

/// ggml's tensor types (ggml.h, `enum ggml_type`).
fn dtype(kind: u32) -> Dtype {
    match kind {
        0 => Dtype::F32,
        1 => Dtype::F16,
        2 => Dtype::Q4_0,
        3 => Dtype::Q4_1,
        6 => Dtype::Q5_0,
        7 => Dtype::Q5_1,
        8 => Dtype::Q8_0,
        12 => Dtype::Q4K,
        13 => Dtype::Q5K,
        14 => Dtype::Q6K,
        24 => Dtype::I8,
        26 => Dtype::I32,
        30 => Dtype::BF16,
        9 => Dtype::Other("Q8_1"),
        10 => Dtype::Other("Q2_K"),
        11 => Dtype::Other("Q3_K"),
        15 => Dtype::Other("Q8_K"),
        16..=23 | 29 => Dtype::Other("an IQ type"),
        25 => Dtype::Other("I16"),
        27 => Dtype::Other("I64"),
        28 => Dtype::Other("F64"),
        34 | 35 => Dtype::Other("a ternary type"),
        39 => Dtype::Other("MXFP4"),
        _ => Dtype::Other("a type that this version does not know"),
    }
}
