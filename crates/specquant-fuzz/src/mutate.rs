//! Damage to an input: to its bytes, to numbers in its text, to fields of its JSON, to tensors of its safetensors files.

use half::f16;
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use crate::files::{join, split};

/// What a number in a text becomes.
const NUMBERS: [&str; 20] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "16",
    "255",
    "256",
    "65536",
    "1048576",
    "2147483647",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e308",
    "1e999",
    "-0.0",
    "1e-45",
    "NaN",
];

/// What a field of JSON becomes.
fn values() -> Vec<Value> {
    let mut deep = json!([]);
    (0..100).for_each(|_| deep = json!([deep]));
    vec![
        json!(null),
        json!(true),
        json!(0),
        json!(1),
        json!(-1),
        json!(3),
        json!(127),
        json!(1_000_000),
        json!(u32::MAX),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(0.5),
        json!(-1e300),
        json!(1e-320),
        json!(""),
        json!("x"),
        json!("\u{0}é漢"),
        json!("a".repeat(300)),
        json!([]),
        json!([0, 0]),
        json!({}),
        json!({"a": {"b": [null]}}),
        json!(vec![0; 300]),
        deep,
    ]
}

/// The input of a number: the same for the same seed. Up to four damages on top of each other.
pub fn damaged(seeds: &[Vec<u8>], number: u64) -> Vec<u8> {
    let rng = &mut ChaCha8Rng::seed_from_u64(number);
    let Some(mut input) = seeds.choose(rng).cloned() else { return Vec::new() };
    for _ in 0..1 << rng.random_range(0..3u32) {
        input = match rng.random_range(0..10) {
            0..2 => bytes(input, rng),
            2..4 => number_in_text(input, rng),
            4 => crossed(input, seeds, rng),
            _ => structured(input, rng),
        };
    }
    input
}

/// Every field of JSON and every tensor of every seed, damaged in every way that is known, one at a time.
pub fn every_field(seeds: &[Vec<u8>]) -> impl Iterator<Item = Vec<u8>> {
    seeds.iter().flat_map(|seed| {
        let files = split(seed);
        (0..files.len()).flat_map(move |at| {
            let files = files.clone();
            variants(&files[at].0, &files[at].1).map(move |bytes| {
                let mut files = files.clone();
                files[at].1 = bytes;
                join(&files)
            })
        })
    })
}

fn variants(name: &str, bytes: &[u8]) -> Box<dyn Iterator<Item = Vec<u8>>> {
    let bytes = bytes.to_vec();
    if name.ends_with(".json") {
        let Ok(json) = serde_json::from_slice::<Value>(&bytes) else { return Box::new(std::iter::empty()) };
        // The vocabulary's tokens are all alike.
        let fields = paths(&json)
            .into_iter()
            .filter(|path| path.matches("/vocab/").count() == 0 || path.ends_with("/vocab/a"));
        let all = fields.flat_map(|path| {
            let values = values().into_iter().map(Some).chain([None]);
            values.map(move |value| (path.clone(), value))
        });
        return Box::new(
            all.map(move |(path, value)| replaced(json.clone(), &path, value).to_string().into_bytes()),
        );
    }
    if name.ends_with(".safetensors") {
        let tensors = SafeTensors::deserialize(&bytes).map_or(0, |t| t.len());
        let all = (0..tensors).flat_map(|tensor| (0..TENSOR_DAMAGES).map(move |how| (tensor, how)));
        return Box::new(all.filter_map(move |(tensor, how)| {
            tensor_damaged(&bytes, tensor, how, &mut ChaCha8Rng::seed_from_u64(how as u64))
        }));
    }
    Box::new(std::iter::empty())
}

/// JSON pointers of all values.
fn paths(json: &Value) -> Vec<String> {
    let mut all = Vec::new();
    let mut todo = vec![(String::new(), json)];
    while let Some((path, value)) = todo.pop() {
        match value {
            Value::Object(map) => todo.extend(
                map.iter()
                    .map(|(key, v)| (format!("{path}/{}", key.replace('~', "~0").replace('/', "~1")), v)),
            ),
            Value::Array(list) => {
                todo.extend(list.iter().enumerate().map(|(i, v)| (format!("{path}/{i}"), v)))
            }
            _ => {}
        }
        all.push(path);
    }
    all
}

/// JSON with a value in place of another, or without it.
fn replaced(mut json: Value, path: &str, value: Option<Value>) -> Value {
    match (value, path.rsplit_once('/')) {
        (Some(value), _) => json.pointer_mut(path).into_iter().for_each(|at| *at = value.clone()),
        (None, Some((parent, key))) => match json.pointer_mut(parent) {
            Some(Value::Object(map)) => _ = map.shift_remove(&key.replace("~1", "/").replace("~0", "~")),
            Some(Value::Array(list)) => {
                _ = key.parse().ok().filter(|i| *i < list.len()).map(|i: usize| list.remove(i))
            }
            _ => {}
        },
        (None, None) => json = Value::Null,
    }
    json
}

fn bytes(mut input: Vec<u8>, rng: &mut ChaCha8Rng) -> Vec<u8> {
    if input.is_empty() {
        return input;
    }
    // Mostly near the beginning, where headers are.
    let end = if rng.random_bool(0.5) { input.len() } else { input.len().min(2000) };
    let at = rng.random_range(0..end);
    let length = rng.random_range(0..64).min(input.len() - at);
    match rng.random_range(0..6) {
        0 => input[at] ^= 1 << rng.random_range(0..8),
        1 => input[at] = rng.random(),
        2 => {
            let word =
                [0, 1, u64::MAX, 1 << 31, 1 << 63, 0x7c00, rng.random()].choose(rng).copied().unwrap_or(0);
            input[at..].iter_mut().zip(word.to_le_bytes()).for_each(|(b, w)| *b = w);
        }
        3 => input.truncate(at),
        4 => _ = input.drain(at..at + length),
        _ => {
            let part = input[at..at + length].to_vec();
            let to = rng.random_range(0..=input.len());
            input.splice(to..to, part);
        }
    }
    input
}

/// Another number in place of one.
fn number_in_text(mut input: Vec<u8>, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let starts: Vec<usize> = (0..input.len())
        .filter(|&i| input[i].is_ascii_digit() && (i == 0 || !input[i - 1].is_ascii_alphanumeric()))
        .take(4000)
        .collect();
    if let (Some(&start), Some(number)) = (starts.choose(rng), NUMBERS.choose(rng)) {
        let length = input[start..].iter().take_while(|b| b.is_ascii_digit() || **b == b'.').count();
        input.splice(start..start + length, number.bytes());
    }
    input
}

/// The beginning of one input and the end of another, or a file of another.
fn crossed(input: Vec<u8>, seeds: &[Vec<u8>], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let Some(other) = seeds.choose(rng) else { return input };
    let (mut files, others) = (split(&input), split(other));
    if let (Some(file), false) = (others.choose(rng), files.is_empty()) {
        files.retain(|(name, _)| *name != file.0);
        files.push(file.clone());
        return join(&files);
    }
    let (a, b) = (rng.random_range(0..=input.len()), rng.random_range(0..=other.len()));
    [&input[..a], &other[b..]].concat()
}

/// A field or a tensor, if there are any.
fn structured(input: Vec<u8>, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut files = split(&input);
    if files.is_empty() {
        return bytes(number_in_text(input, rng), rng);
    }
    let at = rng.random_range(0..files.len());
    let (name, content) = &mut files[at];
    if name.ends_with(".safetensors") {
        let tensors = SafeTensors::deserialize(content).map_or(0, |t| t.len());
        if tensors > 0 {
            let (tensor, how) = (rng.random_range(0..tensors), rng.random_range(0..TENSOR_DAMAGES));
            if let Some(bytes) = tensor_damaged(content, tensor, how, rng) {
                *content = bytes;
            }
        }
    } else if let Ok(json) = serde_json::from_slice::<Value>(content) {
        let (paths, values) = (paths(&json), values());
        if let (Some(path), Some(value)) = (paths.choose(rng), values.choose(rng)) {
            let value = rng.random_bool(0.9).then(|| value.clone());
            *content = replaced(json, path, value).to_string().into_bytes();
        }
    }
    join(&files)
}

/// Ways of [`tensor_damaged`].
const TENSOR_DAMAGES: usize = 22;

/// A safetensors file whose header is consistent and one of whose tensors is not what it should be; nothing for what cannot be written.
fn tensor_damaged(file: &[u8], tensor: usize, how: usize, rng: &mut ChaCha8Rng) -> Option<Vec<u8>> {
    let stored = SafeTensors::deserialize(file).ok()?;
    let mut all: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = stored
        .iter()
        .map(|(n, v)| (n.to_owned(), v.dtype(), v.shape().to_vec(), v.data().to_vec()))
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let others: Vec<String> = all.iter().map(|t| t.0.clone()).collect();
    let (name, dtype, shape, data) = all.get_mut(tensor)?;
    let fill = |data: &mut Vec<u8>, pattern: &[u8]| {
        data.iter_mut().zip(pattern.iter().cycle()).for_each(|(b, p)| *b = *p);
    };
    // Numbers of the tensor's own type.
    let number = |x: f32| match *dtype {
        Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::BF16 => x.to_bits().to_le_bytes()[2..].to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    match how {
        0..5 => {
            let first = shape.first_mut()?;
            *first = [0, 1, *first + 1, first.saturating_sub(1), 2 * *first][how];
        }
        5..9 => {
            let last = shape.last_mut()?;
            *last = [0, 1, *last + 1, 2 * *last][how - 5];
        }
        9 => shape.reverse(),
        10 => *shape = vec![shape.iter().product()],
        11 => shape.clear(),
        12 => {
            *dtype = [Dtype::F32, Dtype::F64, Dtype::I8, Dtype::U8, Dtype::U16, Dtype::I32, Dtype::BOOL]
                [rng.random_range(0..7)]
        }
        13 => fill(data, &[0xff]),
        14 => fill(data, &[0]),
        15 => fill(data, &[0x80]),
        16 => fill(data, &number(f32::MAX)),
        17 => fill(data, &number(f32::INFINITY)),
        18 => fill(data, &number(1e-40)),
        19 => data.iter_mut().for_each(|b| *b = rng.random()),
        20 => {
            *name = others
                .choose(rng)
                .filter(|other| *other != name)
                .cloned()
                .unwrap_or_else(|| format!("{name}x"))
        }
        _ => name.clear(),
    }
    let bits = shape.iter().product::<usize>() * dtype.bitsize();
    data.resize(bits / 8, 1);
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|t| !t.0.is_empty() && seen.insert(t.0.clone()));
    let views = all.iter().map(|(n, d, s, b)| Some((n.as_str(), TensorView::new(*d, s.clone(), b).ok()?)));
    safetensors::serialize(views.collect::<Option<Vec<_>>>()?, None).ok()
}
