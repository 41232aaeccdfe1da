//! The tokenizer of a GGUF file, written as Hugging Face's files, so that it can travel with a checkpoint and is then read like any
//! other. Sources: transformers `convert_slow_tokenizer.py` (SentencePiece: `LlamaConverter`, `generate_merges`; byte-level BPE:
//! `GPT2Converter`, `Qwen2Converter`), the tokenizer.json of SmolLM2 and Llama 3, and llama.cpp `llama-vocab.cpp` for defaults.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::source::{Gguf, token_id};
use crate::{Error, ModelConfig, Result};

// tokenizer.ggml.token_type (llama.h, `enum llama_token_type`).
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Deriving merges looks at every way to split a token; real ones have tens of characters.
const MAX_TOKEN_BYTES: usize = 4096;

/// The vocabulary of the file.
struct Vocab<'a> {
    path: &'a Path,
    tokens: Vec<&'a str>,
    types: Vec<i32>,
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocab<'a> {
    fn read(gguf: &Gguf<'a>) -> Result<Self> {
        let path = gguf.path();
        let tokens = gguf.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
        if tokens.is_empty() {
            return Err(Error::tokenizer(
                path,
                "has no tokenizer (tokenizer.ggml.tokens); open the Hugging Face directory instead",
            ));
        }
        let types = gguf.i32s("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
        if types.len() != tokens.len() {
            let problem = format!("has {} tokens but {} token types", tokens.len(), types.len());
            return Err(Error::tokenizer(path, problem));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in (0u32..).zip(&tokens) {
            if let Some(first) = ids.insert(*token, id) {
                return Err(Error::tokenizer(
                    path,
                    format!("has the token {token:?} twice, with ids {first} and {id}"),
                ));
            }
            if token.len() > MAX_TOKEN_BYTES {
                return Err(Error::tokenizer(
                    path,
                    format!("has a token (id {id}) of {} bytes", token.len()),
                ));
            }
        }
        Ok(Vocab { path, tokens, types, ids })
    }

    /// The text of `tokenizer.ggml.{kind}_token_id`.
    fn special(&self, gguf: &Gguf<'_>, kind: &str) -> Result<Option<(u32, &'a str)>> {
        let Some(id) = token_id(gguf, kind)? else { return Ok(None) };
        match self.tokens.get(id as usize) {
            Some(token) => Ok(Some((id, token))),
            None => {
                let problem = format!(
                    "tokenizer.ggml.{kind}_token_id is {id}, but there are {} tokens",
                    self.tokens.len()
                );
                Err(Error::tokenizer(self.path, problem))
            }
        }
    }

    fn map(&self) -> Value {
        (0u32..).zip(&self.tokens).map(|(id, t)| ((*t).to_owned(), json!(id))).collect::<Map<_, _>>().into()
    }

    fn added_tokens(&self, is_special: impl Fn(i32) -> bool) -> Value {
        let all = (0u32..).zip(self.tokens.iter().zip(&self.types));
        let added = all.filter(|(_, (_, kind))| is_special(**kind) || **kind == USER_DEFINED);
        let entry = |(id, (token, kind)): (u32, (&&str, &i32))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": is_special(*kind)})
        };
        added.map(entry).collect()
    }
}

/// tokenizer.json, tokenizer_config.json, generation_config.json and, if there is a template, chat_template.jinja.
pub(crate) fn side_files(gguf: &Gguf<'_>, config: &ModelConfig) -> Result<Vec<(String, Vec<u8>)>> {
    let vocab = Vocab::read(gguf)?;
    let kind = gguf.text("tokenizer.ggml.model")?.unwrap_or("(none)");
    let pre = gguf.text("tokenizer.ggml.pre")?;
    let (mut tokenizer, default_bos) = match kind {
        "gpt2" => (
            byte_level(gguf, &vocab, pre.unwrap_or("default"))?,
            matches!(pre, Some("llama-bpe" | "llama3" | "llama-v3")),
        ),
        "llama" => (sentence_piece(gguf, &vocab)?, true),
        other => {
            let problem = format!("tokenizer.ggml.model {other:?} is not supported; supported: gpt2, llama");
            return Err(Error::tokenizer(gguf.path(), problem));
        }
    };
    let (bos, eos) = (vocab.special(gguf, "bos")?, vocab.special(gguf, "eos")?);
    let add = |key: &str, default: bool| {
        Ok::<_, Error>(gguf.flag(&format!("tokenizer.ggml.{key}"))?.unwrap_or(default))
    };
    let add_bos = add("add_bos_token", default_bos)? && bos.is_some();
    let add_eos = add("add_eos_token", false)? && eos.is_some();
    tokenizer["post_processor"] = post_processor(bos.filter(|_| add_bos), eos.filter(|_| add_eos));

    let text = |token: Option<(u32, &str)>| token.map(|(_, t)| t.to_owned());
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(bos),
        "eos_token": text(eos),
        "pad_token": text(vocab.special(gguf, "padding")?),
        "unk_token": text(vocab.special(gguf, "unknown")?),
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": false,
    });
    let generation = json!({
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids,
        "pad_token_id": token_id(gguf, "padding")?,
    });
    let pretty = |json: &Value| format!("{json:#}\n").into_bytes();
    let mut files = vec![
        (super::TOKENIZER.to_owned(), tokenizer.to_string().into_bytes()),
        (super::CONFIG.to_owned(), pretty(&tokenizer_config)),
        ("generation_config.json".to_owned(), pretty(&generation)),
    ];
    if let Some(template) = gguf.text("tokenizer.chat_template")? {
        files.push((super::TEMPLATE.to_owned(), template.as_bytes().to_vec()));
    }
    Ok(files)
}

/// Byte-level BPE (GPT-2's), with the pre-tokenizer that `pre` names. A file without a name is read as GPT-2's; llama.cpp's own
/// default splits runs of punctuation and digits a little differently.
fn byte_level(gguf: &Gguf<'_>, vocab: &Vocab<'_>, pre: &str) -> Result<Value> {
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |pattern: &str| {
        let split =
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
    };
    let pre_tokenizer = match pre {
        "smollm" => {
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes(true)]})
        }
        "llama-bpe" | "llama3" | "llama-v3" => split(LLAMA3_SPLIT),
        "qwen2" | "deepseek-r1-qwen" => split(QWEN2_SPLIT),
        "default" | "gpt-2" => bytes(true),
        other => {
            let problem = format!(
                "pre-tokenizer {other:?} (tokenizer.ggml.pre) is not supported; supported: default, gpt-2, smollm, llama-bpe, qwen2; \
                 open the Hugging Face directory instead"
            );
            return Err(Error::tokenizer(gguf.path(), problem));
        }
    };
    let key = "tokenizer.ggml.merges";
    let merges =
        gguf.texts(key)?.ok_or_else(|| Error::tokenizer(gguf.path(), format!("has no merges ({key})")))?;
    let pair = |merge: &&str| {
        let (left, right) = merge.split_once(' ').filter(|(l, r)| !l.is_empty() && !r.is_empty())?;
        (vocab.ids.contains_key(left)
            && vocab.ids.contains_key(right)
            && vocab.ids.contains_key(&*format!("{left}{right}")))
        .then(|| json!([left, right]))
    };
    let bad = |m: &&str| {
        Error::tokenizer(
            gguf.path(),
            format!("merge {m:?} does not join two tokens of the vocabulary into a third"),
        )
    };
    let merges = merges.iter().map(|m| pair(m).ok_or_else(|| bad(m))).collect::<Result<Vec<_>>>()?;
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocab.added_tokens(|kind| kind == CONTROL),
        "normalizer": if pre == "qwen2" { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": pre_tokenizer,
        "decoder": bytes(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false,
            // Llama 3 keeps words that are tokens whole, even if no merge leads to them.
            "ignore_merges": matches!(pre, "llama-bpe" | "llama3" | "llama-v3"),
            "vocab": vocab.map(), "merges": merges,
        },
    }))
}

/// SentencePiece BPE (LLaMA 1 and 2, Mistral): merges follow from the scores, unknown characters become bytes.
fn sentence_piece(gguf: &Gguf<'_>, vocab: &Vocab<'_>) -> Result<Value> {
    let scores = gguf.f32s("tokenizer.ggml.scores")?.unwrap_or_default();
    if scores.len() != vocab.tokens.len() || scores.iter().any(|s| s.is_nan()) {
        let problem = format!(
            "has {} tokens but {} scores, or some that are no numbers",
            vocab.tokens.len(),
            scores.len()
        );
        return Err(Error::tokenizer(gguf.path(), problem));
    }
    let unknown = match vocab.special(gguf, "unknown")? {
        Some((_, token)) => Some(token),
        None => vocab.types.iter().position(|t| *t == UNKNOWN).map(|id| vocab.tokens[id]),
    };
    // The space that SentencePiece puts before a text, and takes away again in decoding.
    let prefix = gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocab.added_tokens(|kind| kind == CONTROL || kind == UNKNOWN),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab.map(), "merges": merges(vocab, &scores),
        },
    }))
}

/// Every way to join two tokens into a third, best score first; ties: longer parts first, then smaller ids (`generate_merges`).
fn merges<'a>(vocab: &Vocab<'a>, scores: &[f32]) -> Vec<(&'a str, &'a str)> {
    struct Merge<'a> {
        score: f32,
        chars: (usize, usize),
        ids: (u32, u32),
        parts: (&'a str, &'a str),
    }
    let mut all = Vec::new();
    let normal = |id: usize| vocab.types[id] == NORMAL;
    for (id, &token) in vocab.tokens.iter().enumerate().filter(|(id, _)| normal(*id)) {
        let length = token.chars().count();
        for (chars, (at, _)) in token.char_indices().enumerate().skip(1) {
            let parts = token.split_at(at);
            let (Some(&l), Some(&r)) = (vocab.ids.get(parts.0), vocab.ids.get(parts.1)) else { continue };
            if normal(l as usize) && normal(r as usize) {
                all.push(Merge { score: scores[id], chars: (chars, length - chars), ids: (l, r), parts });
            }
        }
    }
    all.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.chars.cmp(&a.chars)).then(a.ids.cmp(&b.ids)));
    all.into_iter().map(|m| m.parts).collect()
}

/// Adds BOS before and EOS after every text, where the model wants them.
fn post_processor(bos: Option<(u32, &str)>, eos: Option<(u32, &str)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let special = |token: Option<(u32, &str)>, kind: u32| {
        token.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": kind}}))
    };
    let sequence = |id: &str, kind: u32| {
        let text = json!({"Sequence": {"id": id, "type_id": kind}});
        [special(bos, kind), Some(text), special(eos, kind)].into_iter().flatten()
    };
    let known = [bos, eos].into_iter().flatten();
    let known: Map<_, _> =
        known.map(|(id, t)| (t.to_owned(), json!({"id": t, "ids": [id], "tokens": [t]}))).collect();
    json!({
        "type": "TemplateProcessing",
        "single": sequence("A", 0).collect::<Value>(),
        "pair": sequence("A", 0).chain(sequence("B", 1)).collect::<Value>(),
        "special_tokens": known,
    })
}
