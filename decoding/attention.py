"""What decoding puts into a transformers model: attention over a draft tree, a cache for it, fast products."""

from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common.errors import BadInput
from decoding.blocks import few_rows_block
from decoding.in_order import attention_in_order
from decoding.kernels import tree_attention, write
from decoding.products import FewRowsLinear, Products
from decoding.tree import Layout
from medusa_model import MedusaModel
from model.heads import ResBlock
from model.loss import cap

ATTENTION = "medusa_tree"


def attend(module, query, key, value, attention_mask, scaling, softcap=None, sliding_window=None, **kwargs):
    """Attention of a pass: query `[B, H, n, D]`, key and value `[B, H_kv, S, D]` (the whole cache) -> `[B, n, H, D]`.

    With `tree` (length, ancestors, depth): a Triton kernel. With `in_order` (length, path, depth, nodes): another one,
        whose results do not depend on the tree.
    With attention_mask `[B, 1, n, S']` bool: the same in torch; reads the first S' keys. The query heads that share
        keys become rows of one product, so keys are read once and never repeated. A sliding window also needs
        `distance` `[B, n, S']`, in tokens, from each key to each node.
    With neither: the prefill, causal, by torch's own kernels where they can.
    Raises BadInput for attention sinks.
    """
    if kwargs.get("s_aux") is not None:
        raise BadInput("this backbone has attention sinks, and decoding does not know them: its text would be wrong")
    batch, heads, length, size = query.shape
    if "tree" in kwargs:
        filled, ancestors, depth = kwargs["tree"]
        return tree_attention(query, key, value, filled, ancestors, depth, scaling, softcap, sliding_window), None
    if "in_order" in kwargs:
        filled, path, depth, nodes = kwargs["in_order"]
        out = attention_in_order(query, key, value, filled, path, depth, nodes, scaling, softcap, sliding_window)
        return out, None
    if attention_mask is None:
        if softcap is None and (sliding_window is None or length <= sliding_window):
            return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
        position = torch.arange(length, device=query.device)
        kwargs["distance"] = (position[:, None] - position)[None]
        attention_mask = (kwargs["distance"] >= 0)[:, None]
    else:
        key, value = (states[:, :, : attention_mask.shape[-1]] for states in (key, value))
    if sliding_window is not None:
        attention_mask = attention_mask & (kwargs["distance"] < sliding_window)[:, None]
    groups = heads // key.shape[1]
    scores = query.reshape(batch, -1, groups * length, size) @ key.mT * scaling
    if softcap is not None:
        scores = cap(scores, softcap)
    scores = scores.view(batch, -1, groups, length, key.shape[2]).float()
    scores = scores.masked_fill(~attention_mask[:, :, None], -torch.inf).softmax(-1).to(value.dtype)
    out = scores.view(batch, -1, groups * length, key.shape[2]) @ value
    return out.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def tree_view(tree: Layout, length: torch.Tensor, places: torch.Tensor, kernels: bool) -> dict:
    """What each node of a tree may attend to, as `attend` takes it: the text, its ancestors and itself. tree: of each
    row of a batch. length `[B, 1]`: of the text. places int64 `[S]`: of the cache, 0, 1, ..."""
    if kernels:
        return {"attention_mask": None, "tree": (length, tree.ancestors, tree.depth)}
    nodes = tree.depth.shape[1]
    # A CPU reads only the filled part of the cache. With a GPU the host does not know how long that is.
    filled = int(length.max()) + nodes if length.device.type == "cpu" else None
    behind = places[:filled] - length  # [B, S]: 0 at the root, below 0 in the text
    node = behind.clamp(0, nodes - 1)
    mine = tree.ancestors.gather(2, node[:, None].expand(-1, nodes, -1))
    mine &= ((behind >= 0) & (behind < nodes))[:, None]
    mask = (behind < 0)[:, None] | mine  # [B, n, S]
    # How many tokens each node is after each position, for backbones with a sliding window.
    distance = tree.depth[:, :, None] - torch.where(behind < 0, behind, tree.depth.gather(1, node))[:, None]
    return {"attention_mask": mask[:, None], "distance": distance}


AttentionInterface.register(ATTENTION, attend)


@contextmanager
def decoding(model: MedusaModel, products: list[Products], blocks: list[ResBlock]):
    """Puts `attend` and the products of `sharing` into backbone and prefix layer, one launch into heads' blocks. Takes
    them out at the end: `attend` ignores padding masks, so nothing else may run with it."""
    attention = model.backbone.config._attn_implementation
    if attention == ATTENTION:
        raise RuntimeError("a decoder of this model has not ended yet: exhaust or close its run() first")
    parts = [model.backbone] if model.prefix is None else [model.backbone, model.prefix]
    for part in parts:
        part.set_attn_implementation(ATTENTION)
    if model.backbone.config._attn_implementation != ATTENTION:  # transformers only warns
        name = type(model.backbone).__name__
        raise BadInput(f"{name} takes no other attention than its own, and decoding needs one for draft trees")
    for together in products:
        for layer in together.layers:
            layer.__class__ = FewRowsLinear
            cast(FewRowsLinear, layer).products = together
    for block in blocks:
        block.forward = partial(few_rows_block, block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part in parts:
            part.set_attn_implementation(attention)
        for together in products:
            for layer in together.layers:
                layer.__class__ = nn.Linear
                del layer.products
        for block in blocks:
            del block.forward


class TreeCache(Cache):
    """Keys and values of all layers in one tensor `[layers, 2, B, H_kv, S, D]`, so that one operation moves those of
    the accepted guesses. `length` `[B, 1]` is how many tokens each row holds; a pass writes after them. None: prefill.
    """

    def __init__(self, num_layers: int, max_length: int, kernels: bool):
        super().__init__(layers=[])
        self.num_layers, self.max_length, self.kernels = num_layers, max_length, kernels
        self.states: torch.Tensor | None = None
        self.length: torch.Tensor | None = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Writes `[B, H_kv, n, D]`. Returns the layer's whole cache, or in a prefill what it was given."""
        batch, heads, count, size = key_states.shape
        if self.states is None:
            self.states = key_states.new_zeros(self.num_layers, 2, batch, heads, self.max_length, size)
        keys, values = self.states[layer_idx]
        if self.length is None:
            keys[:, :, :count], values[:, :, :count] = key_states, value_states
            return key_states, value_states
        if self.kernels:
            write(key_states, value_states, keys, values, self.length)
        else:
            places = self.length + torch.arange(count, device=keys.device)
            rows = torch.arange(batch, device=keys.device)[:, None]
            keys[rows, :, places] = key_states.transpose(1, 2)
            values[rows, :, places] = value_states.transpose(1, 2)
        return keys, values

    def move(self, source: torch.Tensor, target: torch.Tensor):
        """Copies positions source `[B, m]` to positions target `[B, m]`, in all layers."""
        assert self.states is not None
        bits = self.states.view(torch.int16)  # torch 2.13 on a CPU would copy a bf16 tensor twice to scatter into it
        shape = [*bits.shape[:4], source.shape[1], bits.shape[5]]
        source, target = (places[None, None, :, None, :, None].expand(shape) for places in (source, target))
        bits.scatter_(4, target, bits.gather(4, source))
