"""Writes real.json: what sentencepiece (0.2.3) and transformers (5.24, torch 2.15, float32) make of a few texts with Gemma 3 270M.

    python real.py gemma-3-270m-q4_k_m.gguf wiki.test.raw      needs gguf, protobuf, sentencepiece, torch and transformers

The tokenizer is a SentencePiece model made of the file's tokens, scores and types; the weights are those that gguf-py dequantizes, its norms less 1.
"""
import json
import sys
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from sentencepiece import sentencepiece_model_pb2 as proto
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

TEXTS = [
    "Hello, world!", "The  quick   brown\tfox\n\njumps over   13 lazy dogs.\n", " leading space and trailing ", "", "a",
    "Zażółć gęślą jaźń — «naïve» façade", "日本語のテキストとemoji 😀👩‍👩‍👧‍👦 🇵🇱 end", "\u0000\u0001\x7f control \u200b\u2028 x",
    "fn main() {\n    println!(\"{}\", 1_000.5e-3);\n\n\n}\r\n", "𒀀𒁀 𐎠 rare \U000e0001 \U0010ffff", "     \n   \n", "<0x41> literal byte token",
    "mixed\u00a0nbsp\u3000ideographic",
]
reader = GGUFReader(sys.argv[1])
field = lambda key: reader.fields[f"tokenizer.ggml.{key}"].contents()

model = proto.ModelProto()
for token, score, kind in zip(field("tokens"), field("scores"), field("token_type")):
    # Spaces of user-defined tokens (type 4) are written out in the file.
    model.pieces.add(piece=token.replace(" ", "▁") if kind == 4 else token, score=score, type=kind)
model.pieces[3].type = 2
trainer, normalizer = model.trainer_spec, model.normalizer_spec
trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, len(model.pieces)
trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, 2, 3
trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = "<pad>", "<eos>", "<bos>", "<unk>"
normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = "identity", False, False, True
tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

PARTS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
weights = {}
for tensor in reader.tensors:
    name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}.get(tensor.name)
    if name is None:
        _, layer, part, _ = tensor.name.split(".")
        name = f"model.layers.{layer}.{PARTS[part]}.weight"
    values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    weights[name] = values - 1 if "norm" in name else values
gemma = Gemma3ForCausalLM(Gemma3TextConfig(
    vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
    head_dim=256, query_pre_attn_scalar=256, sliding_window=512, max_position_embeddings=32768, bos_token_id=2, eos_token_id=1,
)).float().eval()
found = gemma.load_state_dict(weights, strict=False)
assert found.missing_keys == ["lm_head.weight"] and not found.unexpected_keys
gemma.tie_weights()


def top(logits, n):
    best = logits.topk(n)
    return best.indices.tolist(), [round(x, 4) for x in best.values.tolist()]


with torch.no_grad():
    texts = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        case = {"text": text, "ids": ids}
        if ids:
            case["top_ids"], case["top_logits"] = top(gemma(torch.tensor([[2] + ids])).logits[0, -1], 10)
        texts.append(case)
    # Longer than the windows of 512.
    ids = [2] + tokenizer.encode(Path(sys.argv[2]).read_text())[:1199]
    logits = gemma(torch.tensor([ids])).logits[0]
    positions = list(range(99, 1200, 100))
    best = [top(logits[p], 5) for p in positions]
    nll = -torch.log_softmax(logits.double(), -1)[torch.arange(1199), torch.tensor(ids[1:])].mean().item()
    long = {"ids": ids, "positions": positions, "top_ids": [b[0] for b in best], "top_logits": [b[1] for b in best], "mean_nll": nll}
    start = torch.tensor([[2] + texts[0]["ids"]])
    greedy = gemma.generate(start, max_new_tokens=24, do_sample=False)[0, start.shape[1]:].tolist()
with open(Path(__file__).parent / "real.json", "w") as file:
    json.dump({"texts": texts, "long": long, "greedy": greedy}, file, separators=(",", ":"))
