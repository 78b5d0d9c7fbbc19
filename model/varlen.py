"""Attention of variable length: conversations of packed rows as segments of one long row, without a mask.

With a mask, attention leaves the flash kernels and also computes the pairs of different conversations. Here torch's
`varlen_attn` gets the places where segments begin, once a batch, and `attend` is put under transformers' public
interface. What does not fit keeps transformers' way: a block-diagonal mask for packed rows, which `use_varlen` says.
"""

import inspect
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model.backbone import head_size

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

VARLEN = "medusa_varlen"
# They hand the segments to every layer and have nothing but scores, a causal mask and a softmax there (tested).
TESTED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")


def misfit(config, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel does not fit a backbone of this config that computes in dtype on device; None: it fits."""
    config = config.get_text_config()
    if device.type != "cuda":
        return f"there is no kernel for {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel does not know {str(dtype)[6:]}"
    if varlen_attn is None or not {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys():
        return f"torch {torch.__version__} does not have it"
    return misfit_of_config(config)


def misfit_of_config(config) -> str | None:
    """The same, of the architecture alone."""
    if config.model_type not in TESTED:
        return f"it was not tested with {config.model_type}"
    if config._attn_implementation != "sdpa":
        return f"the backbone was loaded with {config._attn_implementation} attention"
    layers = getattr(config, "layer_types", None) or []
    if any(kind != "full_attention" for kind in layers) or (not layers and getattr(config, "sliding_window", None)):
        return "the backbone has a sliding window"
    if getattr(config, "attention_dropout", 0):
        return "the backbone has dropout in its attention"
    size = head_size(config)
    return f"the kernel does not know heads of {size} numbers" if size > 256 or size % 8 else None


def use_varlen(backbone: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
    """Puts it into a backbone that will read packed rows, or says in the log why not. Returns whether it did."""
    if (reason := misfit(backbone.config, device, dtype)) is None:
        backbone.set_attn_implementation(VARLEN)
        logger.info("packed rows: attention of variable length")
    else:
        logger.info("packed rows: attention with a mask, slower than of variable length; %s", reason)
    return reason is None


def starts_of(position_ids: torch.Tensor) -> torch.Tensor:
    """position_ids `[B, T]`, which restart at 0 -> int32 `[N + 1]`: where each of N segments begins in `[B * T]`, and
    the end. A row begins one in any case; padding (all 0) is segments of one token. Waits for the device once."""
    begins = position_ids == 0
    begins[:, 0] = True
    return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).int()


def places(backbone: PreTrainedModel, position_ids: torch.Tensor | None) -> dict:
    """What the backbone is told of the tokens' places `[B, T]`: with this attention the segments too, by transformers'
    names. The longest segment is taken to be a row: the kernel skips what one lacks, and nothing waits for it."""
    told: dict = {"position_ids": position_ids}
    if position_ids is not None and backbone.config.get_text_config()._attn_implementation == VARLEN:
        starts, longest = starts_of(position_ids), position_ids.shape[1]
        told |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return told


def varlen_in_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """`varlen_attn` of causal segments in plain torch, segment by segment, for tests and CPUs: `[N, H, D]` each."""
    assert window_size == (-1, 0) and torch.equal(cu_seq_q, cu_seq_k)
    sizes = cu_seq_q.diff().tolist()
    parts = zip(*(states.transpose(0, 1).split(sizes, 1) for states in (query, key, value)), strict=True)
    out = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in parts]
    return torch.cat(out, 1).transpose(0, 1)


def attend(module: nn.Module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """query `[B, H, T, D]`, key and value `[B, H_kv, T, D]` -> `[B, T, H, D]`, causal. Without segments every row is
    one. Raises ValueError for masks, sliding windows, soft-capped scores and sinks: none may be left out silently."""
    if attention_mask is not None or any(kwargs.get(key) for key in ("sliding_window", "softcap", "dropout")):
        raise ValueError("attention of variable length knows no masks, windows, soft caps or dropout")
    if kwargs.get("s_aux") is not None:
        raise ValueError("attention of variable length knows no attention sinks")
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    if groups > 1:  # torch 2.11 and 2.13 differ in how they are told of groups
        key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    q, k, v = (states.transpose(1, 2).reshape(-1, heads, size).to(value.dtype) for states in (query, key, value))
    kernel: Callable = varlen_attn if query.is_cuda else varlen_in_torch
    out = kernel(q, k, v, cu_seq_lens_q, cu_seq_lens_q, length, length, scale=scaling, window_size=(-1, 0))
    return out.view(batch, length, heads, size), None


AttentionInterface.register(VARLEN, attend)
