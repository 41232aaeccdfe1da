"""Writes the small random Gemma 3 beside this file, and what transformers (5.24, torch 2.15) makes of it in float32.

    python make.py      needs torch and transformers

Two layers, one with a sliding window of 16 and one without; grouped queries; an attention scale that is not that of the heads' width;
norms far from 1. expected.safetensors: input_ids [40] i64, logits [40, 320] f32.
"""
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

here = Path(__file__).parent
torch.manual_seed(3)
config = Gemma3TextConfig(
    vocab_size=320, hidden_size=96, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, query_pre_attn_scalar=48, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
    max_position_embeddings=512, pad_token_id=0, bos_token_id=2, eos_token_id=1, dtype="bfloat16",
)
config.rope_parameters["full_attention"].update(rope_type="linear", factor=4.0)
model = Gemma3ForCausalLM(config)
with torch.no_grad():
    for name, p in model.named_parameters():
        p.normal_(std=0.4 if "norm" in name else 0.15)
model.to(torch.bfloat16).save_pretrained(here)
model = Gemma3ForCausalLM.from_pretrained(here, dtype=torch.float32, attn_implementation="eager").eval()
ids = torch.randint(3, 320, (1, 40))
with torch.no_grad():
    logits = model(ids).logits[0]
print(logits.std(), logits.abs().max())
save_file({"input_ids": ids[0], "logits": logits.contiguous()}, here / "expected.safetensors")
