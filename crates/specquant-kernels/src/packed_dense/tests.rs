use super::*;
use proptest::prelude::*;

fn values(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37 + seed * 101) as f32 * 0.713).sin()).collect()
}

/// In f64, by the definition; and the sum of the magnitudes, against which an error is to be held.
fn naive(x: &[f32], w: &[f32], m: usize, k: usize, n: usize) -> Vec<(f64, f64)> {
    let dot = |i: usize, j: usize| {
        let products = (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(w[j * k + l]));
        products.fold((0.0, 0.0), |(sum, magnitude), p| (sum + p, magnitude + p.abs()))
    };
    (0..m * n).map(|c| dot(c / n, c % n)).collect()
}

fn check(m: usize, k: usize, n: usize) {
    let (x, w) = (values(m, m * k), values(n, n * k));
    let packed = PackedDense::pack(&w, n, k);
    let transposed: Vec<f32> = (0..k * n).map(|i| w[i % n * k + i / n]).collect();
    assert_eq!(PackedDense::pack_transposed(&transposed, n, k).panels, packed.panels);
    assert_eq!((packed.out_features(), packed.in_features()), (n, k));
    assert_eq!(packed.unpack(), w);
    let want = naive(&x, &w, m, k, n);
    for isa in Isa::available() {
        let mut y = vec![f32::NAN; m * n];
        matmul_packed_with(isa, &x, &packed, &mut y, m, false);
        for (c, (got, (want, magnitude))) in y.iter().zip(&want).enumerate() {
            let error = (f64::from(*got) - want).abs();
            assert!(error <= 1e-5 * magnitude, "{isa:?} [{m}, {k}] x [{n}]: {c}: {got} instead of {want}");
        }
        let mut twice = y.clone();
        matmul_packed_with(isa, &x, &packed, &mut twice, m, true);
        for ((got, y), (_, magnitude)) in twice.iter().zip(&y).zip(&want) {
            assert!(f64::from(got - 2.0 * y).abs() <= 1e-5 * magnitude, "{isa:?} [{m}, {k}] x [{n}], added");
        }
        // Every row alone gives the same bits.
        for i in 0..m.min(3) {
            let mut row = vec![f32::NAN; n];
            matmul_packed_with(isa, &x[i * k..(i + 1) * k], &packed, &mut row, 1, false);
            assert_eq!(row, y[i * n..(i + 1) * n], "{isa:?} row {i}");
        }
    }
}

#[test]
fn edges() {
    for (m, k, n) in [
        (1, 1, 1),
        (12, 384, 32),
        (13, 385, 33),
        (205, 100, 300),
        (3, 0, 5),
        (0, 4, 4),
        (25, 1024, 17),
        (2, 1536, 48),
    ] {
        check(m, k, n);
    }
}

#[test]
fn fewer_bits_where_they_are_exact() {
    for (m, k, n) in [(1, 576, 70), (13, 300, 33), (3, 0, 2)] {
        let (x, w) = (values(m, m * k), values(n, n * k));
        let rounded = |f: fn(f32) -> f32| w.iter().map(|&w| f(w)).collect::<Vec<f32>>();
        let f16s = rounded(|w| f16::from_f32(w).to_f32());
        let bf16s = rounded(|w| bf16::from_f32(1e-6 * w).to_f32());
        let bytes = rounded(|w| (127.0 * w).round());
        for (w, size) in [(bytes, 1), (f16s, 2), (bf16s, 2), (w, 4)] {
            let (wide, compact) = (PackedDense::pack(&w, n, k), PackedDense::pack(&w, n, k).compact());
            assert_eq!(compact.bytes(), n.next_multiple_of(PANEL) * k * size);
            for isa in Isa::available() {
                let [mut y, mut z] = [(); 2].map(|()| vec![0.5; m * n]);
                matmul_packed_with(isa, &x, &wide, &mut y, m, true);
                matmul_packed_with(isa, &x, &compact, &mut z, m, true);
                assert_eq!(y, z, "{isa:?}");
            }
        }
    }
}

#[test]
fn int8_rows_are_their_codes_times_a_scale() {
    for (m, k, n) in [(1, 576, 70), (13, 400, 33), (205, 50, 300), (2, 0, 3)] {
        let codes: Vec<i8> = (0..n * k).map(|i| (i * 89 % 255) as u8 as i8).collect();
        let scales: Vec<f32> = values(n, n).iter().map(|s| s.abs()).collect();
        let bytes: Vec<u8> = codes.iter().map(|c| *c as u8).collect();
        let w: Vec<f32> = codes.iter().enumerate().map(|(i, c)| f32::from(*c) * scales[i / k]).collect();
        let mut x = values(m, m * k);
        // Outliers make the steps of 16 bits coarse.
        x.iter_mut().step_by(97).for_each(|x| *x *= 30.0);
        let want = naive(&x, &w, m, k, n);
        for isa in Isa::available() {
            let packed = PackedDense::pack_int8_for(isa, &bytes, scales.clone(), n, k);
            assert_eq!(packed.unpack(), w);
            let integers = matches!(packed.panels, Panels::Int(_));
            assert_eq!(integers, digits::pay(isa) && k > 0);
            if !integers {
                assert_eq!(packed.bytes(), n.next_multiple_of(PANEL) * k + 4 * n);
            }
            let mut y = vec![f32::NAN; m * n];
            matmul_packed_with(isa, &x, &packed, &mut y, m, false);
            for (i, (got, (want, magnitude))) in y.iter().zip(&want).enumerate() {
                let row = &x[i / n * k..][..k];
                let largest = row.iter().fold(0.0f32, |a, v| a.max(v.abs()));
                let weights: f32 = w[i % n * k..][..k].iter().map(|w| w.abs()).sum();
                let step = if integers { f64::from(largest * weights) / 65_534.0 } else { 0.0 };
                let error = (f64::from(*got) - want).abs();
                assert!(error <= step + 1e-5 * magnitude, "{isa:?} [{m}, {k}] x [{n}]");
            }
            // A row's result is its own.
            let mut last = vec![f32::NAN; n];
            matmul_packed_with(isa, &x[(m - 1) * k..], &packed, &mut last, 1, false);
            assert_eq!(last, y[(m - 1) * n..], "{isa:?}");
        }
    }
}

#[test]
fn int8_products_of_what_is_no_number_are_none() {
    let packed = PackedDense::pack_int8(&[1, 2, 255, 3, 4, 5], vec![1.0, 0.5], 2, 3);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut y = vec![0.0; 4];
        matmul_packed(&[1.0, bad, 0.0, 0.0, 0.0, 0.0], &packed, &mut y, 2);
        assert!(y[..2].iter().all(|y| !y.is_finite()), "{y:?}");
        assert_eq!(y[2..], [0.0; 2]);
    }
    for small in [f32::MIN_POSITIVE, 1e-45, 3e38] {
        let mut y = vec![f32::NAN; 2];
        matmul_packed(&[0.0, 0.0, small], &packed, &mut y, 1);
        assert!((y[0] + small).abs() <= small / 1e4 + f32::MIN_POSITIVE, "{small}: {y:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_shape(m in 1usize..40, k in 1usize..900, n in 1usize..120) {
        check(m, k, n);
    }
}
