"""Backbones of other kinds than LLaMA, tiny and random: what their logits, layers, places or masks are is the case."""

import torch
import transformers
from transformers import PreTrainedModel

IDS = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1}
SIZES = IDS | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
GPT2 = IDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
MAKE = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "gemma2": lambda: transformers.Gemma2Config(**LLAMA, head_dim=16, final_logit_softcapping=3.0),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=256),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=256, word_embed_proj_dim=64),
    "falcon": lambda: transformers.FalconConfig(**SIZES),
    "bloom": lambda: transformers.BloomConfig(**IDS, hidden_size=64, n_layer=2, n_head=4),
    "mpt": lambda: transformers.MptConfig(**IDS, d_model=64, n_layers=2, n_heads=4, max_seq_len=256),
    "mamba": lambda: transformers.MambaConfig(**IDS, hidden_size=64, num_hidden_layers=2, state_size=4),
    "xlstm": lambda: transformers.xLSTMConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_heads=4),
    "falcon_h1": lambda: transformers.FalconH1Config(**LLAMA, **MAMBA, lm_head_multiplier=0.1),
    "falcon_h1 x 1": lambda: transformers.FalconH1Config(**LLAMA, **MAMBA),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        **SIZES, intermediate_size=48, lru_width=64, attention_window_size=64, logits_soft_cap=3.0
    ),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **LLAMA, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
}


def make_odd(name: str, dtype=torch.float32) -> PreTrainedModel:
    """Its matrices are 5 times as large as usual, so that what is different shows."""
    backbone = transformers.AutoModelForCausalLM.from_config(MAKE[name](), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return backbone
