use specquant_kernels::Kronecker;
use specquant_model::Source;

use super::*;
use crate::net::tests::tiny;
use crate::omniquant::tests::{Owned, inputs};

fn fast() -> FlatQuantConfig {
    FlatQuantConfig {
        epochs: 20,
        samples: 3,
        sequence_length: 20,
        batch_size: 2,
        ..FlatQuantConfig::default()
    }
}

fn run(source: &Source, config: &FlatQuantConfig) -> FlatBlock {
    let c = source.config();
    let (block, inputs) = (Owned::read(source, 1), inputs(c.hidden_size));
    let max = Site::ALL.map(|site| vec![1.0; c.site_width(site)]);
    let mut seen = 0;
    let progress = &mut |epoch, _| {
        assert_eq!(epoch, seen);
        seen += 1;
    };
    let max = max.each_ref().map(Vec::as_slice);
    let learned = flatquant(&block.weights(), c, 1, &inputs, max, config, progress).unwrap();
    assert_eq!((seen, learned.losses.len()), (config.epochs, config.epochs));
    learned
}

/// At the start and after learning: the transforms cancel, whatever they are.
#[test]
fn with_sixteen_bits_transforms_leave_the_block_alone() {
    for name in ["qwen2", "qwen3", "llama-tied-bf16"] {
        let config = FlatQuantConfig { weight_bits: 16, act_bits: 16, epochs: 3, ..fast() };
        for kv_bits in [8, 16] {
            let learned = run(&tiny(name), &FlatQuantConfig { kv_bits, ..config.clone() });
            let quantized = run(&tiny(name), &fast()).losses[0];
            let most = if kv_bits == 16 { 1e-6 } else { 1e-2 };
            assert!(learned.losses.iter().all(|l| *l < most * quantized), "{name}: {:?}", learned.losses);
            assert_eq!((learned.keys.is_none(), learned.act_clip.is_none()), (kv_bits == 16, true));
        }
    }
}

#[test]
fn the_loss_goes_down() {
    for name in ["qwen2", "qwen3", "llama-tied-bf16"] {
        let source = tiny(name);
        let c = source.config();
        let learned = run(&source, &fast());
        let (first, last) = (learned.losses[0], learned.losses[19]);
        assert!(last < 0.8 * first, "{name}: {:?}", learned.losses);
        for (site, (left, right)) in Site::ALL.into_iter().zip(&learned.inputs) {
            // Panics where widths do not fit.
            let kronecker = Kronecker::new(c.site_width(site), left.clone(), right.clone());
            assert!(kronecker.inverse_transposed().is_some());
            assert_eq!(right.is_empty(), site == Site::O);
        }
        assert!(learned.scales[1].is_none() && learned.scales[3].as_ref().unwrap().iter().any(|d| *d != 1.0));
        for (clip, (name, shape)) in learned.weight_clip.iter().zip(c.linear_shapes(1)) {
            assert_eq!(clip.len(), shape[0]);
            assert!(clip.iter().all(|c| *c > 0.3 && *c < 1.0) && clip[0] != clip[1], "{name}: {clip:?}");
        }
        assert!(learned.act_clip.unwrap().iter().all(|c| *c > 0.3 && *c < 1.0));
    }
}

#[test]
fn twice_the_same_and_another_seed_another_start() {
    let source = tiny("llama-tied-bf16");
    let config = FlatQuantConfig { epochs: 2, ..fast() };
    let first = run(&source, &config);
    assert_eq!(first, run(&source, &config));
    assert_ne!(first.values, run(&source, &FlatQuantConfig { seed: 1, ..config }).values);
}

#[test]
fn what_does_not_fit_is_refused() {
    let source = tiny("qwen3");
    let c = source.config();
    let (block, sequences) = (Owned::read(&source, 0), inputs(c.hidden_size));
    let max = Site::ALL.map(|site| vec![1.0; c.site_width(site)]);
    let max = max.each_ref().map(Vec::as_slice);
    let message = |inputs: &[Vec<f32>], max, config| {
        flatquant(&block.weights(), c, 0, inputs, max, &config, &mut |_, _| ()).unwrap_err().to_string()
    };
    let check = |found: String, want: &str| assert!(found.starts_with(want), "{found}");
    check(message(&[], max, fast()), "no text of at least 1 tokens");
    check(message(&[vec![0.0; 100]], max, fast()), "input 0 has 100 values");
    check(message(&sequences, [max[0], max[1], max[2], &[1.0]], fast()), "act_max of down has 1 values");
    for (config, want) in [
        (FlatQuantConfig { epochs: 0, ..fast() }, "epochs is 0"),
        (FlatQuantConfig { batch_size: 0, ..fast() }, "batch_size is 0"),
        (FlatQuantConfig { lr: -1.0, ..fast() }, "lr is -1"),
        (FlatQuantConfig { alpha: 1.5, ..fast() }, "alpha is 1.5"),
        (FlatQuantConfig { act_bits: 9, ..fast() }, "act_bits is 9"),
    ] {
        check(message(&sequences, max, config), want);
    }
}
