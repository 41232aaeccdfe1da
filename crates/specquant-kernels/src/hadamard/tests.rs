use super::*;
use crate::ops::{affordable, test_noise as noise};
use proptest::prelude::*;

/// x\[r, ·, i\] H, or Hᵀ, by the definition, in f64. x: [rows, n, inner].
fn naive(plan: &Hadamard, x: &[f32], inner: usize, transposed: bool) -> Vec<f64> {
    let (n, matrix) = (plan.width(), plan.matrix());
    let mut y = vec![0.0; x.len()];
    for (y, x) in y.chunks_mut(n * inner).zip(x.chunks(n * inner)) {
        for from in 0..n {
            for to in 0..n {
                let h = f64::from(matrix[if transposed { to * n + from } else { from * n + to }]);
                for i in 0..inner {
                    y[to * inner + i] += h * f64::from(x[from * inner + i]);
                }
            }
        }
    }
    y
}

/// Compares every instruction set with the definition and the first, and takes the result back.
fn check(n: usize, rows: usize, inner: usize) {
    let plan = Hadamard::new(n);
    let x = noise(rows * n * inner, n as u64);
    for transposed in [false, true] {
        let want = naive(&plan, &x, inner, transposed);
        let mut first: Option<Vec<f32>> = None;
        for isa in Isa::available() {
            let mut y = x.clone();
            plan.run_with(isa, &mut y, rows, inner, transposed);
            for (e, (got, want)) in y.iter().zip(&want).enumerate() {
                // Values have magnitude 1, and so have the sums: a transform keeps the length.
                let error = (f64::from(*got) - want).abs();
                assert!(error < 1e-5, "{plan} inner {inner} {isa:?} at {e}: {got}, not {want}");
            }
            assert_eq!(first.get_or_insert_with(|| y.clone()), &y, "{plan} inner {inner} {isa:?}");
            plan.run_with(isa, &mut y, rows, inner, !transposed);
            let back = y.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(back, "{plan} inner {inner} {isa:?}: the transpose does not invert");
        }
    }
}

/// The widths of hidden states, feed-forward layers and heads of LLaMA, Qwen, Mistral, SmolLM, Phi, Gemma and their kin.
const WIDTHS: [(usize, &str); 58] = [
    (64, "64"),
    (80, "20·4"),
    (96, "12·8"),
    (128, "128"),
    (576, "36·16"),
    (896, "28·32"),
    (960, "60·16"),
    (1152, "36·32"),
    (1536, "12·128"),
    (1600, "100·16"),
    (2048, "2048"),
    (2304, "36·64"),
    (2560, "20·128"),
    (2816, "44·64"),
    (3072, "12·256"),
    (3584, "28·128"),
    (4096, "4096"),
    (4608, "36·128"),
    (4864, "76·64"),
    (5120, "20·256"),
    (5632, "44·128"),
    (5760, "180·32"),
    (6144, "12·512"),
    (6656, "52·128"),
    (6912, "108·64"),
    (8192, "8192"),
    (8960, "140·64"),
    (9216, "36·256"),
    (9728, "76·128"),
    (10240, "20·512"),
    (10944, "76·36·4"),
    (11008, "172·64"),
    (12288, "12·1024"),
    (13696, "107 x 128"),
    (13824, "108·128"),
    (14336, "28·512"),
    (14784, "84·44·4"),
    (16384, "16384"),
    (17408, "68·256"),
    (17920, "140·128"),
    (18944, "148·128"),
    (19968, "156·128"),
    (21504, "84·256"),
    (24576, "12·2048"),
    (25600, "100·256"),
    (27648, "108·256"),
    (28672, "28·1024"),
    (29568, "84·44·8"),
    (36864, "36·1024"),
    (53248, "52·1024"),
    // Counts of heads.
    (9, "9 x 1"),
    (12, "12·1"),
    (14, "7 x 2"),
    (15, "15 x 1"),
    (20, "20·1"),
    (32, "32"),
    (40, "20·2"),
    (56, "28·2"),
];

#[test]
fn every_width_has_its_plan_and_follows_the_definition() {
    for (n, want) in WIDTHS {
        let plan = Hadamard::new(n);
        assert_eq!((plan.width(), plan.to_string().as_str()), (n, want));
        let block = plan.block();
        assert!(n.is_multiple_of(block) && block.is_multiple_of(plan.order_k()));
        let x = noise(n, 5);
        for transposed in [false, true] {
            let h = |i: usize, j: usize| {
                let (i, j) = if transposed { (j, i) } else { (i, j) };
                let sign = if plan.is_negative(i % block, j % block) { -1.0 } else { 1.0 };
                if i / block == j / block { sign * plan.scale() } else { 0.0 }
            };
            let mut y = x.clone();
            plan.run(&mut y, 1, 1, transposed);
            for at in [0, 1 % n, n / 2 + n / 3, n - 1] {
                // A unit vector becomes a row of the matrix, exactly.
                let mut unit = vec![0.0; n];
                unit[at] = 1.0;
                plan.run(&mut unit, 1, 1, transposed);
                for (i, v) in unit.into_iter().enumerate() {
                    assert_eq!(v, h(at, i), "{plan}: {at}, {i}");
                }
                // Noise becomes products with its columns.
                let mut product = 0.0;
                for (i, x) in x.iter().enumerate() {
                    product += f64::from(h(i, at)) * f64::from(*x);
                }
                assert!((f64::from(y[at]) - product).abs() < 1e-5, "{plan}: {at}: {} {product}", y[at]);
            }
        }
    }
}

/// A ⊗ B of square matrices.
fn kronecker(a: &[f32], b: &[f32]) -> Vec<f32> {
    let (m, n) = (a.len().isqrt(), b.len().isqrt());
    let at = |i: usize, j: usize| a[i / n * m + j / n] * b[i % n * n + j % n];
    (0..m * n * m * n).map(|e| at(e / (m * n), e % (m * n))).collect()
}

#[test]
fn the_matrix_is_a_kronecker_product_of_hadamard_matrices() {
    let order = |k: usize| {
        let order = Order::get(k).unwrap();
        (0..k * k).map(|e| f32::from(order.sign(e / k, e % k))).collect::<Vec<_>>()
    };
    let sylvester = |n: usize| (0..n.ilog2()).fold(vec![1.0], |h, _| kronecker(&[1.0, 1.0, 1.0, -1.0], &h));
    let identity = |n: usize| (0..n * n).map(|e| f32::from(e / n == e % n)).collect::<Vec<_>>();
    for (n, want) in [
        (1, identity(1)),
        (8, sylvester(8)),
        (7, identity(7)),
        (14, kronecker(&identity(7), &sylvester(2))),
        (12, order(12)),
        (96, kronecker(&order(12), &sylvester(8))),
        (576, kronecker(&order(36), &sylvester(16))),
        (47 * 8, kronecker(&identity(47), &sylvester(8))),
        // 65 = 5 · 13.
        (65 * 16, kronecker(&order(52), &order(20))),
        (65 * 8, kronecker(&identity(65), &sylvester(8))),
    ] {
        let plan = Hadamard::new(n);
        let scale = (plan.block() as f32).sqrt();
        let got: Vec<f32> = plan.matrix().into_iter().map(|v| (v * scale).round()).collect();
        assert!(got == want, "{plan}");
        assert!(plan.matrix().iter().all(|v| v.abs() == 0.0 || v.abs() == plan.scale()));
        // Rows of ±1 within a block are orthogonal, in exact integers.
        for i in 0..n {
            for j in 0..n {
                let dot: f32 = (0..n).map(|e| want[i * n + e] * want[j * n + e]).sum();
                assert_eq!(dot, if i == j { plan.block() as f32 } else { 0.0 }, "{plan}: {i} {j}");
            }
        }
    }
}

#[test]
fn transforms_are_products_with_the_matrix() {
    let large = [80, 96, 128, 156, 160, 172, 184, 200, 256, 344, 512, 576, 896, 960, 1040];
    for n in affordable((1..=66).chain(large), |n| 8 * n * n) {
        check(n, 2, 1);
    }
}

#[test]
fn across_heads_every_position_is_transformed_by_itself() {
    let shapes = [
        (32, 64),
        (12, 64),
        (14, 64),
        (9, 64),
        (8, 80),
        (128, 64),
        (20, 3),
        (8, 3),
        (4, 2),
        (40, 24),
        (1, 5),
        (8, 4096),
    ];
    for (heads, head_dim) in affordable(shapes, |(heads, head_dim)| 3 * heads * heads * head_dim) {
        check(heads, 3, head_dim);
    }
}

#[test]
fn every_number_of_threads_gives_the_same_bits() {
    for (n, rows, inner) in [(576, 131, 1), (64, 700, 1), (11008, 5, 1), (14, 41, 64), (12, 50, 64)] {
        let (plan, x) = (Hadamard::new(n), noise(rows * n * inner, 3));
        let run = |threads| {
            let mut y = x.clone();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| plan.apply_across(&mut y, rows, inner));
            y
        };
        let y = run(1);
        assert!(y == run(2) && y == run(5));
        // And so does every row alone.
        for (x, y) in x.chunks(n * inner).zip(y.chunks(n * inner)).skip(rows - 3) {
            let mut x = x.to_vec();
            plan.apply_across(&mut x, 1, inner);
            assert_eq!(x, y);
        }
    }
}

#[test]
fn rotated_inputs_and_weights_give_the_layer_back() {
    let (n, out, rows) = (960, 28, 5);
    let (x, w) = (noise(rows * n, 1), noise(out * n, 2));
    let product = |x: &[f32], w: &[f32]| {
        let mut y = vec![0.0; rows * out];
        crate::matmul_nt(x, w, &mut y, rows, n, out, false);
        y
    };
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
    let y = product(&x, &w);
    let (input, output) = (Hadamard::new(n), Hadamard::new(out));
    let (mut rotated_x, mut rotated_w, mut rotated_y) = (x.clone(), w.clone(), y.clone());
    input.apply(&mut rotated_x, rows);
    input.apply(&mut rotated_w, out);
    assert!(close(&product(&rotated_x, &rotated_w), &y));
    let mut folded = w.clone();
    output.apply_across(&mut folded, 1, n);
    output.apply(&mut rotated_y, rows);
    assert!(close(&product(&x, &folded), &rotated_y));
    output.apply_transposed(&mut rotated_y, rows);
    output.apply_across_transposed(&mut folded, 1, n);
    assert!(close(&rotated_y, &y) && close(&folded, &w));
}

#[test]
fn nothing_stays_nothing_and_odd_widths_stay_as_they_are() {
    let plan = Hadamard::new(0);
    plan.apply(&mut [], 5);
    assert_eq!((plan.width(), plan.block(), plan.matrix().len()), (0, 1, 0));
    Hadamard::new(64).apply(&mut [], 0);
    Hadamard::new(64).apply_across(&mut [], 3, 0);
    for n in [1, 9, 15, usize::MAX] {
        let plan = Hadamard::new(n);
        assert_eq!((plan.block(), plan.order_k()), (1, 1));
    }
    let (x, plan) = (noise(45, 1), Hadamard::new(15));
    let mut y = x.clone();
    plan.apply(&mut y, 3);
    assert_eq!(x, y);
}

#[test]
#[should_panic(expected = "x is not [2, 64, 1]")]
fn a_wrong_shape_is_refused() {
    Hadamard::new(64).apply(&mut [0.0; 64], 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_shape(n in 1usize..400, rows in 0usize..4, inner in 1usize..20) {
        check(n, rows, inner);
        check(n, rows, 1);
    }
}
