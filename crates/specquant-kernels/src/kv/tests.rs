use super::*;
use crate::ops::test_noise as noise;

/// The formula of the module's documentation, number by number.
fn reference(x: &[f32], bits: u8, clip: f32) -> Vec<f32> {
    let top = ((1u32 << bits) - 1) as f32;
    let lo = x.iter().copied().fold(0.0, f32::min) * clip;
    let hi = x.iter().copied().fold(0.0, f32::max) * clip;
    let scale = f16::from_f32((hi - lo) / top).to_f32();
    let scale = if scale == 0.0 { 1.0 } else { scale };
    let zero = (-lo / scale).round_ties_even().min(top);
    let q = |v: f32| ((v / scale).round_ties_even() + zero).clamp(0.0, top);
    x.iter().map(|&v| scale * (q(v) - zero)).collect()
}

#[test]
fn every_format_reads_back_what_its_formula_says() {
    for head_dim in [1, 7, 16, 33, 64] {
        let (heads, t) = (3, 131);
        let width = heads * head_dim;
        let (k, v) = (noise(t * width, 1), noise(t * width, 2));
        let intact = 7;
        let ints = (2..=8).flat_map(|bits| [1.0, 0.9].map(|clip| KvFormat::Int { bits, clip, intact }));
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Gaussian { intact }].into_iter().chain(ints) {
            let mut cache = KvCache::new(format, heads, head_dim);
            cache.append(&k[..width], &v[..width]);
            cache.append(&k[width..], &v[width..]);
            assert_eq!(cache.len(), t);
            let mut buf = vec![0.0; t * head_dim];
            for (side, x) in [(KvSide::Keys, &k), (KvSide::Values, &v)] {
                for head in 0..heads {
                    let got = cache.tile(side, head, 5..t, &mut buf).to_vec();
                    for ((token, row), got) in x.chunks(width).enumerate().skip(5).zip(got.chunks(head_dim)) {
                        let row = &row[head * head_dim..][..head_dim];
                        let want: Vec<f32> = match format {
                            KvFormat::F32 => row.to_vec(),
                            _ if token < format.intact() => row.to_vec(),
                            KvFormat::F16 => row.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
                            KvFormat::Int { bits, clip, .. } => reference(row, bits, clip),
                            KvFormat::Gaussian { .. } => {
                                let (mut codes, mut want) = (vec![0; head_dim.div_ceil(2)], row.to_vec());
                                let scale = gaussian::quantize(row, &mut codes);
                                gaussian::dequantize(&codes, &[scale], head_dim, &mut want);
                                want
                            }
                        };
                        assert_eq!(got, want, "{format:?} {head_dim}");
                    }
                }
            }
            let per_head = match format {
                KvFormat::F32 => 4 * head_dim,
                KvFormat::F16 => 2 * head_dim,
                KvFormat::Gaussian { .. } => 2 + head_dim.div_ceil(2),
                KvFormat::Int { bits, .. } => 3 + if bits <= 4 { head_dim.div_ceil(2) } else { head_dim },
            };
            assert_eq!(cache.bytes(), 2 * heads * (t * per_head + 4 * format.intact() * head_dim));
            cache.truncate(t + 1);
            assert_eq!(cache.len(), t);
            for rest in [10, 3] {
                cache.truncate(rest);
                cache.append(&k[rest * width..], &v[rest * width..]);
                assert_eq!(cache.len(), t);
            }
            // The first tokens alone, all of them intact or not, lie within what the rest is read with.
            let whole = cache.tile(KvSide::Values, 2, 0..t, &mut buf).to_vec();
            for some in [0..0, 0..3, 2..7, 6..8, 7..9] {
                let want = &whole[some.start * head_dim..some.end * head_dim];
                assert_eq!(
                    cache.tile(KvSide::Values, 2, some.clone(), &mut buf),
                    want,
                    "{format:?} {some:?}"
                );
            }
            let all = cache.tile(KvSide::Keys, 1, 0..t, &mut buf).to_vec();
            let mut fresh = KvCache::new(format, heads, head_dim);
            fresh.append(&k, &v);
            assert_eq!(all, fresh.tile(KvSide::Keys, 1, 0..t, &mut buf));
        }
    }
}

/// In any lane, and in what no whole register holds.
#[test]
fn what_is_not_finite_is_found_everywhere() {
    let d = 40;
    for (at, bad) in (0..d).flat_map(|at| [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(|bad| (at, bad))) {
        let mut row = noise(d, 1);
        row[at] = bad;
        for format in [KvFormat::Gaussian { intact: 0 }, KvFormat::Int { bits: 4, clip: 1.0, intact: 0 }] {
            let mut cache = KvCache::new(format, 1, d);
            cache.append(&row, &row);
            let mut buf = vec![0.0; d];
            let got = cache.tile(KvSide::Keys, 0, 0..1, &mut buf);
            assert!(got.iter().all(|v| v.is_nan()), "{format:?} {bad} at {at}: {got:?}");
        }
    }
}

#[test]
fn degenerate_rows() {
    let format = KvFormat::Int { bits: 4, clip: 1.0, intact: 0 };
    let mut cache = KvCache::new(format, 1, 4);
    let rows = [
        [0.0; 4],
        [1e-30, -1e-30, 0.0, 0.0],
        [2.0, 2.0, 2.0, 2.0],
        [f32::NAN, 1.0, 2.0, 3.0],
        [1.0, f32::INFINITY, 2.0, 3.0],
        [-3e38, 3e38, 0.0, 1.0],
    ];
    cache.append(rows.as_flattened(), rows.as_flattened());
    let mut buf = [0.0; 24];
    let mut gaussian = KvCache::new(KvFormat::Gaussian { intact: 0 }, 1, 4);
    gaussian.append(rows.as_flattened(), rows.as_flattened());
    let got = gaussian.tile(KvSide::Values, 0, 0..6, &mut buf);
    assert!(got[..8].iter().all(|v| v.abs() < 1e-5), "{got:?}"); // no level is 0
    assert!(got[8..12].iter().all(|v| (v - 2.0).abs() < 0.2), "{got:?}");
    assert!(got[12..20].iter().all(|v| v.is_nan()), "{got:?}");
    assert!(got[20..].iter().all(|v| v.is_finite()), "{got:?}");
    let got = cache.tile(KvSide::Values, 0, 0..6, &mut buf);
    assert_eq!(&got[..8], &[0.0; 8]);
    assert!(got[8..12].iter().all(|v| (v - 2.0).abs() < 2e-3), "{got:?}");
    assert!(got[12..20].iter().all(|v| v.is_nan()), "{got:?}");
    assert!(got[20..].iter().all(|v| v.is_finite()), "{got:?}");
}
