use super::*;
use crate::KvFormat;
use crate::ops::{affordable, test_noise as noise};

/// Attention in f64 over what the cache reads back as.
fn naive(q: &[f32], t: usize, heads: usize, cache: &KvCache, scale: f32, window: Option<usize>) -> Vec<f64> {
    let (d, group, len) = (cache.head_dim(), heads / cache.kv_heads(), cache.len());
    let [mut kb, mut vb] = [(); 2].map(|()| vec![0.0; len * d]);
    let mut out = vec![0.0; q.len()];
    for h in 0..heads {
        let k = cache.tile(KvSide::Keys, h / group, 0..len, &mut kb).to_vec();
        let v = cache.tile(KvSide::Values, h / group, 0..len, &mut vb).to_vec();
        for i in 0..t {
            let p = len - t + i;
            let q = &q[(i * heads + h) * d..][..d];
            let seen = (p + 1).saturating_sub(window.unwrap_or(usize::MAX))..p + 1;
            let score = |j: usize| {
                let dot: f64 = q.iter().zip(&k[j * d..]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                dot * f64::from(scale)
            };
            let max = seen.clone().map(score).fold(f64::MIN, f64::max);
            let e: Vec<f64> = seen.clone().map(|j| (score(j) - max).exp()).collect();
            let sum: f64 = e.iter().sum();
            for (e, j) in e.iter().zip(seen) {
                for c in 0..d {
                    out[(i * heads + h) * d + c] += e / sum * f64::from(v[j * d + c]);
                }
            }
        }
    }
    out
}

fn filled(format: KvFormat, len: usize, kv_heads: usize, d: usize) -> KvCache {
    let mut cache = KvCache::new(format, kv_heads, d);
    cache.append(&noise(len * kv_heads * d, 11), &noise(len * kv_heads * d, 12));
    cache
}

fn run(q: &[f32], t: usize, heads: usize, cache: &KvCache, window: Option<usize>) -> Vec<f32> {
    let mut out = vec![f32::NAN; q.len()];
    attention(q, t, heads, cache, 1.7, window, &mut out);
    out
}

/// With the pairs of an instruction set, if it has any.
fn any_order(
    isa: Isa,
    q: &[f32],
    t: usize,
    heads: usize,
    cache: &KvCache,
    window: Option<usize>,
) -> Vec<f32> {
    let mut out = vec![f32::NAN; q.len()];
    let cache = cache.clone().with_any_order(true);
    attention_with(isa, q, t, heads, &cache, 1.7, window, &mut out);
    out
}

/// Largest difference, and largest magnitude of b.
fn difference(a: &[f32], b: &[f32]) -> (f32, f32) {
    let largest = |m: f32, v: f32| m.max(v.abs());
    (a.iter().zip(b).map(|(a, b)| a - b).fold(0.0, largest), b.iter().copied().fold(0.0, largest))
}

/// (queries, cache length, heads, kv heads, head_dim, window)
const CASES: [(usize, usize, usize, usize, usize, Option<usize>); 15] = [
    (1, 1, 1, 1, 1, None),
    (20, 20, 2, 1, 3, Some(9)),
    (5, 5, 2, 1, 7, None),
    (64, 64, 9, 3, 16, None),
    (65, 130, 6, 2, 5, None),
    (2, 300, 4, 4, 8, None),
    (1, 300, 9, 3, 16, None),
    (1, 1300, 6, 2, 9, None),
    (1, 1300, 6, 2, 9, Some(700)),
    (1, 1300, 6, 2, 9, Some(5)),
    (700, 700, 3, 1, 4, None),
    (700, 700, 4, 2, 4, Some(1)),
    (700, 700, 4, 2, 4, Some(130)),
    (300, 700, 32, 1, 3, Some(257)),
    (300, 301, 2, 2, 64, Some(1000)),
];

#[test]
fn matches_f64_in_every_shape() {
    for (t, len, heads, kv_heads, d, window) in
        affordable(CASES, |(t, len, heads, _, d, _)| t * len * heads * d / 4)
    {
        let cache = filled(KvFormat::F32, len, kv_heads, d);
        let q: Vec<f32> = noise(t * heads * d, 13).iter().map(|v| v * 3.0).collect();
        let got = run(&q, t, heads, &cache, window);
        for (e, (a, b)) in got.iter().zip(naive(&q, t, heads, &cache, 1.7, window)).enumerate() {
            assert!(
                (f64::from(*a) - b).abs() < 2e-5,
                "{t} {len} {heads} {kv_heads} {d} {window:?} at {e}: {a} {b}"
            );
        }
    }
}

#[test]
fn matches_f64_in_every_format() {
    let ints = (2..=8).map(|bits| KvFormat::Int { bits, clip: 0.95, intact: 0 });
    for format in [KvFormat::F32, KvFormat::F16].into_iter().chain(ints) {
        for (t, d) in [(1, 16), (70, 16), (70, 9)] {
            let cache = filled(format, 200, 2, d);
            let q = noise(t * 6 * d, 13);
            let got = run(&q, t, 6, &cache, None);
            for (a, b) in got.iter().zip(naive(&q, t, 6, &cache, 1.7, None)) {
                assert!((f64::from(*a) - b).abs() < 1e-5, "{format:?} {t} {d}: {a} {b}");
            }
        }
    }
}

/// A lone query, some of whose keys and values lie as computed, others in codes.
#[test]
fn one_query_over_intact_tokens() {
    let (len, d) = (300, 64);
    for intact in [4, 130] {
        for format in [KvFormat::Gaussian { intact }, KvFormat::Int { bits: 4, clip: 0.95, intact }] {
            let cache = filled(format, len, 2, d);
            for window in [None, Some(298), Some(200), Some(3)] {
                let q = noise(6 * d, 13);
                let got = run(&q, 1, 6, &cache, window);
                for (a, b) in got.iter().zip(naive(&q, 1, 6, &cache, 1.7, window)) {
                    assert!((f64::from(*a) - b).abs() < 2e-5, "{format:?} {window:?}: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn appending_in_pieces_changes_little_and_decode_agrees_with_prefill() {
    let (len, heads, kv_heads, d) = (200, 6, 2, 16);
    let width = kv_heads * d;
    let (k, v) = (noise(len * width, 1), noise(len * width, 2));
    let q = noise(len * heads * d, 3);
    for format in [KvFormat::F32, KvFormat::Int { bits: 4, clip: 1.0, intact: 0 }] {
        for window in [None, Some(50)] {
            let mut whole = KvCache::new(format, kv_heads, d);
            whole.append(&k, &v);
            let want = run(&q, len, heads, &whole, window);
            let mut cache = KvCache::new(format, kv_heads, d);
            let mut at = 0;
            for step in [1, 1, 2, 63, 1, 100, 31, 1] {
                let next = at + step;
                cache.append(&k[at * width..next * width], &v[at * width..next * width]);
                let got = run(&q[at * heads * d..next * heads * d], step, heads, &cache, window);
                for (a, b) in got.iter().zip(&want[at * heads * d..]) {
                    assert!((a - b).abs() < 1e-5, "{format:?} {window:?} at {at}: {a} {b}");
                }
                at = next;
            }
            assert_eq!(at, len);
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for (t, len, heads, kv_heads, d, window) in CASES {
        let mut cache = filled(KvFormat::Int { bits: 4, clip: 1.0, intact: 0 }, len, kv_heads, d);
        let q = noise(t * heads * d, 13);
        for any_order in [false, true] {
            cache = cache.with_any_order(any_order);
            let in_pool = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| run(&q, t, heads, &cache, window))
            };
            assert_eq!(in_pool(1), in_pool(2));
        }
    }
}

/// Where there are pairs, what any order allows comes near what the fixed one gives; elsewhere they are the same.
#[test]
fn any_order_changes_little() {
    let mut formats = vec![];
    for intact in [0, 3, 130] {
        formats.push(KvFormat::Gaussian { intact });
        formats.extend([3, 4].map(|bits| KvFormat::Int { bits, clip: 0.95, intact }));
    }
    let shapes = [
        (64, 64, 9, 3, 64, None),
        (33, 300, 4, 2, 32, None),
        (200, 500, 2, 2, 128, Some(90)),
        (2, 150, 3, 1, 96, None),
        (130, 131, 1, 1, 256, Some(20)),
        (40, 40, 2, 1, 33, None),
    ];
    for ((t, len, heads, kv_heads, d, window), format) in
        shapes.into_iter().flat_map(|shape| formats.iter().map(move |format| (shape, *format)))
    {
        let q = noise(t * heads * d, 5);
        let cache = filled(format, len, kv_heads, d);
        let fixed = run(&q, t, heads, &cache, window);
        for isa in Isa::available() {
            let (error, size) = difference(&any_order(isa, &q, t, heads, &cache, window), &fixed);
            // Scores of some 20 with an error of 2⁻¹⁶ of them each.
            assert!(error <= 4e-4 * size, "{isa:?} {format:?} {t} of {len}, {d} wide: {error} of {size}");
        }
    }
}

/// What rounding to steps of the largest suffers from most: a key far above all others, and a query of which one value is.
#[test]
fn any_order_where_one_number_is_large() {
    let (t, d) = (130, 64);
    for isa in Isa::available() {
        let mut keys: Vec<f32> = noise(t * d, 1).iter().map(|v| v * 0.05).collect();
        keys[0] = 1.0;
        let mut values = vec![-1.0; t * d];
        values[..d].fill(1.0);
        let mut cache = KvCache::new(KvFormat::Gaussian { intact: 0 }, 1, d);
        cache.append(&keys, &values);
        let mut q = vec![0.0; t * d];
        // The first key leads by 11: the others, of weight e⁻¹¹ each, are lost, as many as there are.
        q.chunks_mut(d).for_each(|q| q[0] = 11.0 / 1.7);
        let (error, _) = difference(&any_order(isa, &q, t, 1, &cache, None), &run(&q, t, 1, &cache, None));
        assert!(error < 4e-3, "{isa:?}, a large key: {error}");

        let cache = filled(KvFormat::Gaussian { intact: 0 }, t, 1, d);
        let mut q = noise(t * d, 3);
        q.chunks_mut(d).for_each(|q| q[5] = 100.0 * q[5].signum());
        let (error, size) = difference(&any_order(isa, &q, t, 1, &cache, None), &run(&q, t, 1, &cache, None));
        assert!(error < 1e-2 * size, "{isa:?}, a large value: {error} of {size}");
    }
}

/// Of one query, and no other.
#[test]
fn queries_that_are_not_finite() {
    let (t, d) = (40, 64);
    let cache = filled(KvFormat::Gaussian { intact: 0 }, t, 1, d);
    for (isa, bad) in
        Isa::available().into_iter().flat_map(|isa| [f32::NAN, f32::INFINITY].map(|bad| (isa, bad)))
    {
        let mut q = noise(t * d, 3);
        q[7 * d + 9] = bad;
        let out = any_order(isa, &q, t, 1, &cache, None);
        for (i, row) in out.chunks(d).enumerate() {
            assert!(row.iter().all(|v| v.is_nan() == (i == 7)), "{isa:?} {bad}: {row:?}");
        }
    }
}

/// The largest sums that there are, of both signs: one that wraps would make the least of keys the greatest.
#[test]
fn pairs_do_not_overflow() {
    for d in [64, 512] {
        let t = 130;
        let signs = |i: usize| if i.is_multiple_of(2) { 1.0 } else { -1.0 };
        let keys: Vec<f32> = (0..t * d).map(|i| signs(i / d)).collect();
        let values: Vec<f32> = (0..t * d).map(|i| signs(i / d) * (1.0 + (i / d) as f32)).collect();
        let mut cache = KvCache::new(KvFormat::Gaussian { intact: 0 }, 1, d);
        cache.append(&keys, &values);
        let q = vec![2.0 / d as f32; t * d];
        let fixed = run(&q, t, 1, &cache, None);
        for isa in Isa::available() {
            let (error, _) = difference(&any_order(isa, &q, t, 1, &cache, None), &fixed);
            assert!(error < 1e-2, "{isa:?} {d}: {error}");
        }
    }
}

#[test]
fn twins_agree_bit_for_bit() {
    let (rows, n, d) = (6, 45, 19);
    let scores = noise(rows * n, 1);
    let (mut a, mut b) = (scores.clone(), scores);
    let mut memory = [(); 2].map(|()| (vec![0.0; rows * d], vec![0.0; 2 * rows]));
    let [(o1, m1), (o2, m2)] = &mut memory;
    let (mut s1, mut s2) = (State::new(o1, m1), State::new(o2, m2));
    s1.out.copy_from_slice(&noise(rows * d, 3));
    s2.out.copy_from_slice(s1.out);
    // Rows that have seen keys before, of smaller and of larger scores, and rows that have not.
    for state in [&mut s1, &mut s2] {
        state.max[..4].copy_from_slice(&[-0.5, 2.0, -0.5, 0.1]);
        state.sum[..4].fill(1.5);
    }
    absorb(&mut a, n, 10, 30, 2, 15, &mut s1);
    absorb_body(&mut b, n, 10, 30, 2, 15, &mut s2);
    assert!(s1.max[0] > -0.5 && s1.max[1] == 2.0 && s1.max[5] > f32::NEG_INFINITY);
    assert_eq!((&a, &s1.max, &s1.sum, &s1.out), (&b, &s2.max, &s2.sum, &s2.out));
}

#[test]
fn nan_is_not_swallowed() {
    let mut cache = filled(KvFormat::F32, 20, 1, 4);
    cache.append(&[f32::NAN; 4], &[1.0; 4]);
    assert!(run(&[1.0; 4], 1, 1, &cache, None).iter().all(|v| v.is_nan()));
    assert!(run(&[1.0; 8], 2, 1, &cache, None)[4..].iter().all(|v| v.is_nan()));
    // In codes, one key and one value of a head; and where the window hides them.
    let mut cache = filled(KvFormat::Gaussian { intact: 4 }, 200, 1, 64);
    cache.append(&[f32::NAN; 64], &[f32::NAN; 64]);
    let mut cache = cache.with_any_order(true);
    assert!(run(&[1.0; 128], 2, 1, &cache, None)[64..].iter().all(|v| v.is_nan()));
    cache.append(&noise(300 * 64, 1), &noise(300 * 64, 2));
    assert!(run(&[1.0; 640], 10, 1, &cache, Some(100)).iter().all(|v| v.is_finite()));
}
