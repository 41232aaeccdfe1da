use super::*;
use crate::ops::affordable;
use proptest::prelude::*;

/// A small generator: the same numbers for the same seed.
struct Lcg(u64);

impl Lcg {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn float(&mut self) -> f32 {
        self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.
    }
}

fn random_weights(rng: &mut Lcg, out: usize, inp: usize, bits: u8, group: usize) -> PackedWeights {
    let half = 1 << (bits - 1);
    let codes: Vec<i8> = (0..out * inp).map(|_| (rng.below(2 * half) as i64 - half as i64) as i8).collect();
    let scales: Vec<f32> = (0..out * (inp / group)).map(|_| 0.01 + rng.below(1000) as f32 / 1e4).collect();
    PackedWeights::pack(&codes, &scales, out, inp, bits, group).unwrap()
}

fn random_acts(rng: &mut Lcg, rows: usize, inp: usize, bits: u8) -> QuantizedActs {
    let x: Vec<f32> = (0..rows * inp).map(|_| rng.float() + 0.3).collect();
    crate::quantize_acts(&x, rows, inp, bits, 0.9)
}

/// x [rows, in] times w [out, in], in f64; with the sums of magnitudes, which errors are relative to.
fn naive(x: &[f32], w: &[f32], rows: usize, out: usize, inp: usize) -> Vec<(f64, f64)> {
    let dot = |t: usize, n: usize| {
        let products = (0..inp).map(|k| f64::from(x[t * inp + k]) * f64::from(w[n * inp + k]));
        products.fold((0., 0.), |(sum, size), p| (sum + p, size + p.abs()))
    };
    (0..rows * out).map(|i| dot(i / out, i % out)).collect()
}

fn assert_close(y: &[f32], want: &[(f64, f64)], what: &str) {
    for (i, (y, (want, size))) in y.iter().zip(want).enumerate() {
        assert!((f64::from(*y) - want).abs() <= 1e-5 * size, "{what}: {y} for {want} at {i}");
    }
}

/// Every instruction set: integer products bit-equal to the scalar ones, all near the naive product of the dequantized.
fn check_all(a: &QuantizedActs, w: &PackedWeights) {
    let (rows, out, inp) = (a.rows, w.out_features(), w.in_features());
    let (x, dense) = (a.dequantize(), w.dequantize());
    let want = naive(&x, &dense, rows, out, inp);
    let mut scalar = vec![f32::NAN; rows * out];
    matmul_int_with(Isa::Scalar, [IntProduct { parts: &[(a, w)], branch: None, y: &mut scalar }]);
    for isa in Isa::available() {
        let what =
            format!("{} u{}s{} {rows}x{inp}x{out} group {}", isa.name(), a.bits, w.bits(), w.group_size());
        let mut y = vec![f32::NAN; rows * out];
        matmul_int_with(isa, [IntProduct { parts: &[(a, w)], branch: None, y: &mut y }]);
        assert!(y.iter().zip(&scalar).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}");
        assert_close(&y, &want, &what);
        // Two of them are exactly twice as much.
        matmul_int_with(isa, [IntProduct { parts: &[(a, w), (a, w)], branch: None, y: &mut y }]);
        assert!(y.iter().zip(&scalar).all(|(a, b)| *a == 2.0 * b), "{what}");
        y.fill(f32::NAN);
        matmul_float_with(isa, &x, rows, w, &mut y, false);
        assert_close(&y, &want, &what);
        let once = y.clone();
        matmul_float_with(isa, &x, rows, w, &mut y, true);
        assert!(y.iter().zip(&once).all(|(a, b)| *a == 2.0 * b), "{what}");
    }
}

#[test]
fn widths_of_models() {
    let mut rng = Lcg(1);
    for (inp, out) in [(1, 17), (7, 16), (9, 5), (63, 33), (576, 40), (1536, 19), (4096, 18), (11008, 17)] {
        for rows in [1, 2, 3, 5, 17] {
            for (act_bits, bits) in [(4, 4), (8, 4), (8, 8)] {
                let w = random_weights(&mut rng, out, inp, bits, inp);
                check_all(&random_acts(&mut rng, rows, inp, act_bits), &w);
            }
        }
    }
    let w = random_weights(&mut rng, 48, 128, 4, 32);
    check_all(&random_acts(&mut rng, 150, 128, 4), &w);
}

/// Heights and depths that fill the largest tiles, and those that leave every kind of rest.
#[test]
fn many_tokens() {
    let mut rng = Lcg(7);
    for (inp, out, group) in
        [(64, 32, 64), (8, 16, 8), (72, 33, 72), (144, 33, 72), (1500, 48, 1500), (384, 80, 128)]
    {
        for rows in [8, 9, 16, 24, 31, 32, 33, 47, 49, 64, 97, 300] {
            for (act_bits, bits) in [(4, 4), (8, 8)] {
                let w = random_weights(&mut rng, out, inp, bits, group);
                check_all(&random_acts(&mut rng, rows, inp, act_bits), &w);
            }
        }
    }
}

/// Every way in which tokens are cut into tiles, with two panels and with one.
#[test]
fn every_number_of_tokens() {
    let mut rng = Lcg(8);
    for bits in [4, 8] {
        let w = random_weights(&mut rng, 40, 80, bits, 80);
        (1..=40).for_each(|rows| check_all(&random_acts(&mut rng, rows, 80, bits), &w));
    }
}

#[test]
fn levels_are_looked_up() {
    let mut rng = Lcg(2);
    let shapes = [(7, 16, 7), (576, 40, 576), (128, 48, 32), (4096, 18, 4096)];
    // Miri is ten thousand times slower.
    for (inp, out, group) in shapes.into_iter().take(if cfg!(miri) { 1 } else { 4 }) {
        let codes: Vec<i8> = (0..out * inp).map(|_| crate::GAUSSIAN_LEVELS[rng.below(16) as usize]).collect();
        let scales = vec![0.02; out * inp / group];
        let w = PackedWeights::pack_levels(&codes, &scales, out, inp, group, &crate::GAUSSIAN_LEVELS);
        let w = w.unwrap();
        assert_eq!(w.unpack(), codes);
        for rows in affordable([1, 3, 5, 10, 17, 200], |rows| 100 * rows) {
            let x: Vec<f32> = (0..rows * inp).map(|_| rng.float()).collect();
            check_all(&crate::quantize_acts_gaussian(&x, rows, inp, 0.9), &w);
            check_all(&random_acts(&mut rng, rows, inp, 4), &w);
            check_all(&random_acts(&mut rng, rows, inp, 8), &w);
        }
    }
    assert_eq!(i16_steps(126, 127), 1);
}

#[test]
fn extreme_codes_do_not_overflow() {
    let (inp, out) = (4096, 17);
    for bits in 2..=8u8 {
        let half = 1i32 << (bits - 1);
        for code in [-half, half - 1] {
            let w = PackedWeights::pack(&vec![code as i8; out * inp], &vec![1.; out], out, inp, bits, inp)
                .unwrap();
            for act_bits in 2..=8 {
                for rows in [1, 3, 6, 33] {
                    let top = code_max(act_bits);
                    let a = QuantizedActs {
                        rows,
                        cols: inp,
                        stride: inp,
                        bits: act_bits,
                        codes: vec![top as u8; rows * inp].into(),
                        scale: vec![1.; rows].into(),
                        zero: vec![0; rows].into(),
                    };
                    for isa in Isa::available() {
                        let mut y = vec![0.; rows * out];
                        matmul_int_with(isa, [IntProduct { parts: &[(&a, &w)], branch: None, y: &mut y }]);
                        let want = (top * code * inp as i32) as f32;
                        assert!(y.iter().all(|&y| y == want), "{isa:?} u{act_bits}s{bits}: {} {want}", y[0]);
                    }
                }
            }
        }
    }
    assert_eq!((i16_steps(15, 8), i16_steps(255, 8), i16_steps(255, 128)), (136, 8, 0));
}

/// Sums of levels are widened as late as these allow.
#[test]
fn extreme_levels_do_not_overflow() {
    let (inp, out) = (1000, 17);
    // Inputs that lie in one lane, of one sign or of both.
    for signs in [[127, 127, 127, 127], [-127, -127, -127, -127], [127, 127, -127, -127], [127, 6, 6, -6]] {
        let codes: Vec<i8> = (0..out * inp).map(|i| signs[i % inp % 4]).collect();
        let w = PackedWeights::pack_levels(&codes, &vec![1.; out], out, inp, inp, &crate::GAUSSIAN_LEVELS);
        let w = w.unwrap();
        for (rows, even, odd) in [(1, 127, 127), (9, 127, 127), (20, 127, 0), (20, 0, 127), (20, 0, 0)] {
            let code = |k: usize| if k % 4 < 2 { even } else { odd };
            let a = QuantizedActs {
                rows,
                cols: inp,
                stride: inp,
                bits: 7,
                codes: (0..rows * inp).map(|i| code(i % inp)).collect::<Vec<u8>>().into(),
                scale: vec![1.; rows].into(),
                zero: vec![0; rows].into(),
            };
            let want: i32 = (0..inp).map(|k| i32::from(code(k)) * i32::from(signs[k % 4])).sum();
            for isa in Isa::available() {
                let mut y = vec![0.; rows * out];
                matmul_int_with(isa, [IntProduct { parts: &[(&a, &w)], branch: None, y: &mut y }]);
                assert!(
                    y.iter().all(|&y| y == want as f32),
                    "{isa:?} {signs:?} {even} {odd}: {} {want}",
                    y[0]
                );
            }
        }
    }
}

#[test]
fn results_depend_neither_on_threads_nor_on_other_tokens() {
    let mut rng = Lcg(3);
    let (rows, inp, out) = (70, 600, 500);
    let w = random_weights(&mut rng, out, inp, 4, 40);
    let a = random_acts(&mut rng, rows, inp, 4);
    let x = a.dequantize();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (mut y, mut z) = (vec![0.; rows * out], vec![0.; rows * out]);
        pool.install(|| {
            matmul_int(&a, &w, &mut y);
            matmul_float(&x, rows, &w, &mut z);
        });
        (y, z)
    };
    let (y, z) = run(1);
    assert_eq!((&y, &z), (&run(2).0, &run(2).1));
    let mut last = vec![0.; out];
    matmul_float(&x[(rows - 1) * inp..], 1, &w, &mut last);
    assert_eq!(last, z[(rows - 1) * out..]);
}

/// A part in groups and one of a single scale a channel, in either order, add up to what each gives alone.
#[test]
fn parts_of_different_groups_add_up() {
    let mut rng = Lcg(6);
    for (rows, out) in [(3, 40), (30, 19)] {
        let grouped = random_weights(&mut rng, out, 64, 4, 16);
        let whole = random_weights(&mut rng, out, 32, 8, 32);
        let (a, b) = (random_acts(&mut rng, rows, 64, 4), random_acts(&mut rng, rows, 32, 8));
        for isa in Isa::available() {
            let product = |parts: &[(&QuantizedActs, &PackedWeights)]| {
                let mut y = vec![f32::NAN; rows * out];
                matmul_int_with(isa, [IntProduct { parts, branch: None, y: &mut y }]);
                y
            };
            let (first, second) = (product(&[(&a, &grouped)]), product(&[(&b, &whole)]));
            let sum: Vec<f32> = first.iter().zip(&second).map(|(a, b)| a + b).collect();
            assert_eq!(product(&[(&a, &grouped), (&b, &whole)]), sum, "{isa:?}");
            assert_eq!(product(&[(&b, &whole), (&a, &grouped)]), sum, "{isa:?}");
        }
    }
}

/// A part of several blocks of depth, one of a single block and one in groups, for few tokens and for more than are finished together; each in the order of the parts.
#[test]
fn parts_of_different_depths_add_up() {
    for (rows, isa) in [1, 4, 8, 9, 33, 203]
        .into_iter()
        .flat_map(|rows| Isa::available().into_iter().map(move |isa| (rows, isa)))
    {
        let (mut rng, out) = (Lcg(7), 50);
        let mut part = |inp: usize, bits: u8, group: usize| {
            (random_acts(&mut rng, rows, inp, bits), random_weights(&mut rng, out, inp, bits, group))
        };
        let deep = 2 * INT_DEPTH + 40;
        let parts = [part(deep, 4, deep), part(72, 8, 72), part(24, 4, 8), part(544, 4, 544)];
        let product = |isa, parts: &[&(QuantizedActs, PackedWeights)]| {
            let mut y = vec![f32::NAN; rows * out];
            let parts: Vec<_> = parts.iter().map(|(a, w)| (a, w)).collect();
            matmul_int_with(isa, [IntProduct { parts: &parts, branch: None, y: &mut y }]);
            y
        };
        for (a, b) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
            let (first, second) = (product(Isa::Scalar, &[&parts[a]]), product(Isa::Scalar, &[&parts[b]]));
            let sum: Vec<f32> = first.iter().zip(&second).map(|(a, b)| a + b).collect();
            assert_eq!(product(isa, &[&parts[a], &parts[b]]), sum, "{isa:?} {rows} {a} {b}");
            let third = product(Isa::Scalar, &[&parts[1]]);
            let sum: Vec<f32> = sum.iter().zip(&third).map(|(a, b)| a + b).collect();
            assert_eq!(
                product(isa, &[&parts[a], &parts[b], &parts[1]]),
                sum,
                "{isa:?} {rows} {a} {b}, then 1"
            );
        }
    }
}

#[test]
fn empty_products() {
    let w = PackedWeights::pack(&[], &[], 0, 8, 4, 8).unwrap();
    matmul_int(&random_acts(&mut Lcg(4), 2, 8, 4), &w, &mut []);
    let w = random_weights(&mut Lcg(5), 3, 8, 4, 8);
    matmul_int(&crate::quantize_acts(&[], 0, 8, 4, 1.), &w, &mut []);
    matmul_float(&[], 0, &w, &mut []);
}

#[test]
#[should_panic(expected = "activations have 16 columns, the weights 8 inputs")]
fn wrong_width() {
    let w = random_weights(&mut Lcg(5), 3, 8, 4, 8);
    matmul_int(&random_acts(&mut Lcg(4), 2, 16, 4), &w, &mut [0.; 6]);
}

#[test]
fn names() {
    let isa = Isa::active();
    let narrow = if isa == Isa::Avx2 { "i16acc" } else { "i32acc" };
    assert_eq!(kernel_name(4, 4, false), format!("{}-u4s4-{narrow}", isa.name()));
    assert_eq!(kernel_name(4, 4, true), format!("{}-u4s4-levels", isa.name()));
    assert_eq!(kernel_name(8, 8, false), format!("{}-u8s8-i32acc", isa.name()));
    assert_eq!(kernel_name(16, 4, false), format!("{}-f32s4-fma", isa.vectors().name()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_shape(
        rows in 1usize..80, out in 1usize..50, groups in 1usize..4, group in 1usize..200,
        bits in 2u8..=8, act_bits in 2u8..=8, seed in any::<u64>()
    ) {
        let (inp, group) = if groups == 1 { (group, group) } else { (groups * group.next_multiple_of(8), group.next_multiple_of(8)) };
        let mut rng = Lcg(seed);
        let w = random_weights(&mut rng, out, inp, bits, group);
        check_all(&random_acts(&mut rng, rows, inp, act_bits), &w);
    }
}
