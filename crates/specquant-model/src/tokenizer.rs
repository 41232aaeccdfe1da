//! Text to token ids and back, exactly as Hugging Face's `tokenizers` does it, and chat templates.

mod bounds;
mod chat;
mod from_gguf;
mod guard;

use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde_json::Value;

use crate::{Error, Result};
pub use chat::Message;
pub(crate) use from_gguf::side_files as gguf_side_files;
use guard::guarded;

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";

/// A tokenizer with the chat template and the special tokens of its model.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    specials: SpecialTokens,
    template: Option<String>,
}

/// The special tokens that templates may name.
#[derive(Debug, Default, Clone)]
struct SpecialTokens {
    bos: Option<String>,
    eos: Option<String>,
    pad: Option<String>,
    unk: Option<String>,
}

impl Tokenizer {
    /// Reads tokenizer.json of a model directory, and from tokenizer_config.json, special_tokens_map.json and chat_template.jinja
    /// what is there.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when tokenizer.json is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for name in [TOKENIZER, CONFIG, SPECIAL_TOKENS, TEMPLATE] {
            let path = dir.join(name);
            if path.is_file() {
                files.push((name.to_owned(), std::fs::read(&path).map_err(Error::io(&path))?));
            }
        }
        Self::from_files(dir, &files)
    }

    /// The same from files in memory, as [`crate::Source::side_files`] gives them. `path` is for messages.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn from_files(path: &Path, files: &[(String, Vec<u8>)]) -> Result<Self> {
        let file = |name: &str| files.iter().find(|(n, _)| n == name).map(|(_, bytes)| &bytes[..]);
        let json = |name: &str| {
            let parsed = file(name).map(serde_json::from_slice::<Value>).transpose();
            parsed
                .map_err(|cause| Error::Json { path: path.join(name), cause })
                .map(Option::unwrap_or_default)
        };
        let bytes = file(TOKENIZER).ok_or_else(|| {
            Error::tokenizer(
                path,
                "has no tokenizer.json; save the model's fast tokenizer there: AutoTokenizer.from_pretrained(..).save_pretrained(..)",
            )
        })?;
        let at = path.join(TOKENIZER);
        // The library panics on some malformed JSON; this does not.
        serde_json::from_slice::<IgnoredAny>(bytes)
            .map_err(|cause| Error::Json { path: at.clone(), cause })?;
        let inner = guarded(|| {
            let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
            // Left over from training, these would cut or pad every text.
            inner.with_truncation(None)?.with_padding(None);
            Ok::<_, tokenizers::Error>(inner)
        });
        let inner = inner.map_err(|why| {
            Error::tokenizer(&at, format!("cannot be used as a tokenizer: {why}; get the file again"))
        })?;

        let (config, map) = (json(CONFIG)?, json(SPECIAL_TOKENS)?);
        let special = |key: &str| [&config, &map].into_iter().find_map(|json| token_text(json.get(key)?));
        let specials = SpecialTokens {
            bos: special("bos_token"),
            eos: special("eos_token"),
            pad: special("pad_token"),
            unk: special("unk_token"),
        };
        let template = match file(TEMPLATE) {
            Some(bytes) => Some(String::from_utf8(bytes.to_vec()).map_err(|_| Error::ChatTemplate {
                path: path.join(TEMPLATE),
                problem: "is not UTF-8".into(),
            })?),
            None => configured_template(&config),
        };
        Ok(Tokenizer { inner, path: path.to_owned(), specials, template })
    }

    /// Token ids of `text`. With `add_special`, what the tokenizer's post-processor adds (a BOS token for many models, nothing for
    /// others); without, for text that carries them already, such as a rendered chat. Special tokens in `text` are recognized.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], for a vocabulary without an unknown token that lacks a piece of the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special)).map_err(|e| self.error(&e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`. Ids outside the vocabulary give nothing.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|e| self.error(&e))
    }

    /// Decodes a generation token by token: the closure returns the text that an id completes, `None` while a character is
    /// incomplete.
    pub fn decoder(&self, skip_special: bool) -> impl FnMut(u32) -> Result<Option<String>> + '_ {
        let mut stream = self.inner.decode_stream(skip_special);
        move |id| guarded(|| stream.step(id)).map_err(|e| self.error(&e))
    }

    fn error(&self, why: &str) -> Error {
        Error::tokenizer(&self.path, format!("tokenizer: {why}"))
    }

    /// Number of tokens, added ones included. The model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Beginning of sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.token_to_id(self.specials.bos.as_deref()?)
    }

    /// The BOS token, if every text starts with it. A model that was trained so (Gemma, LLaMA 2) is another model without.
    pub fn first_id(&self) -> Option<u32> {
        let first = self.encode("", true).ok()?.first().copied();
        first.filter(|id| Some(*id) == self.bos_id())
    }

    /// End of sequence. The model's configuration may name more tokens that end a generation.
    pub fn eos_id(&self) -> Option<u32> {
        self.token_to_id(self.specials.eos.as_deref()?)
    }

    /// Whether the model has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Renders a conversation. The template writes its own special tokens: encode the result with `add_special = false`.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`]; [`Error::ChatTemplate`] when the template does not parse or refuses the messages.
    pub fn chat_prompt(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template =
            self.template.as_ref().ok_or_else(|| Error::NoChatTemplate { path: self.path.clone() })?;
        chat::render(template, messages, &self.specials, add_generation_prompt)
            .map_err(|problem| Error::ChatTemplate { path: self.path.clone(), problem })
    }
}

/// A token is written as text or as an object with `content`.
fn token_text(json: &Value) -> Option<String> {
    json.as_str().or_else(|| json.get("content")?.as_str()).map(str::to_owned)
}

/// `chat_template` of tokenizer_config.json: a text, or a list of named ones, of which "default" is meant for plain chats.
fn configured_template(config: &Value) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|t| t.get("name").is_some_and(|n| n == "default"))?;
            default.get("template")?.as_str().map(str::to_owned)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Single letters, one merge, and leftovers of training.
    fn tiny(config: Value, extra: &[(&str, &str)]) -> Result<Tokenizer> {
        let tokenizer = json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [{"id": 4, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "<s>": 4}, "merges": [["a", "b"]]},
        });
        let mut files = vec![
            (TOKENIZER.to_owned(), tokenizer.to_string().into_bytes()),
            (CONFIG.to_owned(), config.to_string().into_bytes()),
        ];
        files.extend(extra.iter().map(|(n, t)| ((*n).to_owned(), t.as_bytes().to_vec())));
        Tokenizer::from_files(Path::new("dir"), &files)
    }

    #[test]
    fn encodes_whole_texts() {
        let t = tiny(json!({"bos_token": {"content": "<s>"}, "eos_token": null}), &[]).unwrap();
        assert_eq!(t.encode("<s>abcab", true).unwrap(), [4, 3, 2, 3]);
        assert_eq!(t.decode(&[4, 3, 2, 77], true).unwrap(), "abc");
        assert_eq!((t.bos_id(), t.eos_id(), t.vocab_size()), (Some(4), None, 5));
        let mut decode = t.decoder(true);
        assert_eq!(decode(3).unwrap().as_deref(), Some("ab"));
    }

    /// Only a BOS token counts, and only where the post-processor adds it.
    #[test]
    fn what_every_text_starts_with() {
        let with = |bos: Option<&str>, template: Value| {
            let tokenizer = json!({
                "added_tokens": [{"id": 4, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true}],
                "post_processor": {"type": "TemplateProcessing", "single": template, "pair": template,
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}}},
                "model": {"type": "BPE", "vocab": {"a": 0, "<s>": 4}, "merges": []},
            });
            let config = json!({ "bos_token": bos });
            let files = [(TOKENIZER, tokenizer), (CONFIG, config)];
            let files = files.map(|(name, json)| (name.to_owned(), json.to_string().into_bytes()));
            Tokenizer::from_files(Path::new("dir"), &files).unwrap().first_id()
        };
        let (text, bos) = (
            json!({"Sequence": {"id": "A", "type_id": 0}}),
            json!({"SpecialToken": {"id": "<s>", "type_id": 0}}),
        );
        assert_eq!(with(Some("<s>"), json!([bos, text])), Some(4));
        assert_eq!(with(None, json!([bos, text])), None);
        assert_eq!(with(Some("<s>"), json!([text])), None);
        assert_eq!(tiny(json!({"bos_token": "<s>"}), &[]).unwrap().first_id(), None);
    }

    #[test]
    fn where_templates_come_from() {
        let user = [Message { role: "user".into(), content: "hi".into() }];
        let render = |t: Result<Tokenizer>| t.unwrap().chat_prompt(&user, false);
        let text = json!({"chat_template": "C {{ messages[0].content }}"});
        assert_eq!(render(tiny(text.clone(), &[])).unwrap(), "C hi");
        assert_eq!(render(tiny(text, &[(TEMPLATE, "J")])).unwrap(), "J");
        let named = json!({"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]});
        assert_eq!(render(tiny(named, &[])).unwrap(), "D");
        let err = render(tiny(json!({}), &[])).unwrap_err().to_string();
        assert!(err.contains("no chat template") && err.contains("plain text generation"), "{err}");
    }

    #[test]
    fn damaged_files_are_named() {
        let err = Tokenizer::from_files(Path::new("dir"), &[]).unwrap_err().to_string();
        assert!(err.contains("no tokenizer.json") && err.contains("save_pretrained"), "{err}");
        for bytes in [&b"{"[..], b"{}", b"[1]", br#"{"model": {"type": "BPE"}, "decoder": {"type": "#] {
            let err =
                Tokenizer::from_files(Path::new("dir"), &[(TOKENIZER.into(), bytes.to_vec())]).unwrap_err();
            assert!(err.to_string().contains("dir/tokenizer.json"), "{err}");
        }
        let err = tiny(json!({}), &[(SPECIAL_TOKENS, "{")]).unwrap_err().to_string();
        assert!(err.contains("special_tokens_map.json"), "{err}");
    }

    /// Found by fuzzing: the library panics at each of these, the first when it reads the file, the others when it is used.
    #[test]
    fn what_the_library_panics_at_is_an_error() {
        let with = |part: &str, value: Value| {
            let mut tokenizer = json!({"model": {"type": "BPE", "vocab": {"a": 0, "<s>": 1}, "merges": []}});
            tokenizer[part] = value;
            let text = tokenizer.to_string().replace("LONE", "\\ud800");
            Tokenizer::from_files(Path::new("dir"), &[(TOKENIZER.to_owned(), text.into_bytes())])
        };
        let lone = with("decoder", json!({"type": "Strip", "content": "LONE", "start": 1, "stop": 0}));
        assert!(lone.unwrap_err().to_string().contains("tokenizer.json"));
        let bos = json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}]);
        let template =
            json!({"type": "TemplateProcessing", "single": bos, "pair": bos, "special_tokens": {}});
        let error = with("post_processor", template).unwrap().encode("a", true).unwrap_err().to_string();
        assert!(error.contains("dir: tokenizer"), "{error}");
        let strips =
            with("decoder", json!({"type": "Strip", "content": "a", "start": 0, "stop": 9})).unwrap();
        assert!(strips.decode(&[0], false).is_err());
        assert!(strips.decoder(false)(0).is_err());
    }
}
