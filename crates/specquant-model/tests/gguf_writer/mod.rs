//! GGUF files of our own making, for the tests of the reader and for fuzzing.

use half::f16;

/// Writes the container as ggml/docs/gguf.md describes it.
#[derive(Clone, Default)]
pub struct Writer {
    pub keys: Vec<(String, u32, Vec<u8>)>,
    pub tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

pub fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

pub fn array(kind: u32, items: &[Vec<u8>]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes(), &items.concat()].concat()
}

impl Writer {
    pub fn raw(&mut self, key: &str, kind: u32, value: Vec<u8>) -> &mut Self {
        self.keys.retain(|(k, ..)| k != key);
        self.keys.push((key.into(), kind, value));
        self
    }
    pub fn uint(&mut self, key: &str, n: u32) -> &mut Self {
        self.raw(key, 4, n.to_le_bytes().into())
    }
    pub fn float(&mut self, key: &str, x: f32) -> &mut Self {
        self.raw(key, 6, x.to_le_bytes().into())
    }
    pub fn flag(&mut self, key: &str, x: bool) -> &mut Self {
        self.raw(key, 7, vec![u8::from(x)])
    }
    pub fn text(&mut self, key: &str, s: &str) -> &mut Self {
        self.raw(key, 8, text(s))
    }
    pub fn texts(&mut self, key: &str, items: &[&str]) -> &mut Self {
        self.raw(key, 9, array(8, &items.iter().map(|s| text(s)).collect::<Vec<_>>()))
    }
    pub fn i32s(&mut self, key: &str, items: &[i32]) -> &mut Self {
        self.raw(key, 9, array(5, &items.iter().map(|n| n.to_le_bytes().into()).collect::<Vec<_>>()))
    }
    pub fn f32s(&mut self, key: &str, items: &[f32]) -> &mut Self {
        self.raw(key, 9, array(6, &items.iter().map(|n| n.to_le_bytes().into()).collect::<Vec<_>>()))
    }

    /// Row-major `[shape]`; blocks get varied bytes and small scales.
    pub fn tensor(&mut self, name: &str, shape: &[u64], kind: u32) -> &mut Self {
        let (elements, size) = [
            (0, 1, 4),
            (1, 1, 2),
            (30, 1, 2),
            (2, 32, 18),
            (3, 32, 20),
            (6, 32, 22),
            (7, 32, 24),
            (8, 32, 34),
        ]
        .iter()
        .find(|k| k.0 == kind)
        .map_or((1, 4), |k| (k.1, k.2));
        let count = shape.iter().product::<u64>() as usize;
        let mut bytes: Vec<u8> = (0..count / elements * size).map(|i| (i * 37 % 251) as u8).collect();
        for (i, block) in bytes.chunks_exact_mut(size).enumerate() {
            match kind {
                0 => block.copy_from_slice(&(i as f32 * 0.25).to_le_bytes()),
                1 => block.copy_from_slice(&f16::from_f32(i as f32 * 0.25).to_le_bytes()),
                30 => block.copy_from_slice(&half::bf16::from_f32(i as f32).to_le_bytes()),
                _ => block[..2].copy_from_slice(&f16::from_f32(0.5 + i as f32).to_le_bytes()),
            }
            if matches!(kind, 3 | 7) {
                block[2..4].copy_from_slice(&f16::from_f32(-1.0).to_le_bytes());
            }
        }
        self.tensors.retain(|(n, ..)| n != name);
        self.tensors.push((name.into(), shape.iter().rev().copied().collect(), kind, bytes));
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.keys {
            out.extend([&text(key)[..], &kind.to_le_bytes(), value].concat());
        }
        let mut offset = 0u64;
        for (name, dims, kind, bytes) in &self.tensors {
            out.extend(text(name));
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = (offset + bytes.len() as u64).next_multiple_of(32);
        }
        for (.., bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        out
    }
}

/// One block, 32 wide: two query heads of 16, one key/value head; a tensor of most types.
pub fn tiny(arch: &str) -> Writer {
    let mut w = Writer::default();
    w.text("general.architecture", arch)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "qwen2");
    for (key, n) in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
    ] {
        w.uint(&format!("{arch}.{key}"), n);
    }
    w.float(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5).uint("tokenizer.ggml.eos_token_id", 3);
    w.texts("tokenizer.ggml.tokens", &["a", "b", "ab", "<|e|>"])
        .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 3]);
    w.texts("tokenizer.ggml.merges", &["a b"]);
    w.tensor("token_embd.weight", &[4, 32], 1).tensor("output_norm.weight", &[32], 0);
    for (name, shape, kind) in [
        ("attn_norm.weight", &[32][..], 0),
        ("attn_q.weight", &[32, 32], 8),
        ("attn_k.weight", &[16, 32], 2),
        ("attn_v.weight", &[16, 32], 3),
        ("attn_output.weight", &[32, 32], 6),
        ("ffn_norm.weight", &[32], 0),
        ("ffn_gate.weight", &[32, 32], 7),
        ("ffn_up.weight", &[32, 32], 30),
        ("ffn_down.weight", &[32, 32], 8),
    ] {
        w.tensor(&format!("blk.0.{name}"), shape, kind);
    }
    w
}
