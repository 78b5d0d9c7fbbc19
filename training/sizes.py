"""How many numbers a backbone and its heads have, and keep of each token, from their modules without weights."""

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from common.errors import BadInput
from model.backbone import decoder_layers, has_experts, head_size, meta_backbone
from model.config import MedusaConfig
from model.path_heads import make_heads


@dataclass(frozen=True)
class BackboneSizes:
    """All but the names are numbers of weights, or numbers (activations) that one token has in a layer."""

    name: str
    weights: int  # all of them; tied ones once
    embeddings: int
    lm_head: int  # 0 if it is the embeddings
    layers: int  # of all layers together
    depth: int  # how many layers
    hidden: int  # H
    vocab: int  # V
    norms: int  # of a layer
    readers: int  # linear layers that read the stream through a norm
    products: int  # what a layer's linear layers read and write, without the stream: LLaMA-3-8B 13 H
    mlp: int  # of these, those of the MLP: gate, up and their product, 10.5 H
    widest: int  # what the MLP's last product reads: 3.5 H
    repeated: int  # keys and values for as many heads as queries have, where attention needs a mask
    a_rank: int  # weights of adapters of rank 1 in all linear layers
    adapters: int = 0  # weights of --lora_rank

    @property
    def layer(self) -> int:
        return self.layers // max(1, self.depth)


def backbone_sizes(name_or_path: str, rank: int | None = None, targets=(), **where) -> BackboneSizes:
    """From config.json. rank, targets: of adapters. where: cache_dir and trust_remote_code. Raises BadInput for a
    model that cannot have heads, or whose memory is not known."""
    backbone = meta_backbone(name_or_path, **where)
    kind = type(backbone).__name__
    if has_experts(backbone):
        raise BadInput(f"--plan: {kind} is a mixture of experts, and what its experts hold at once is not known")
    if getattr(backbone.config, "quantization_config", None) is not None:
        raise BadInput(f"--plan: the weights of {name_or_path} are quantised, and it knows bf16 and fp32 ones only")
    lm_head, embeddings = backbone.get_output_embeddings().weight, backbone.get_input_embeddings().weight
    vocab, hidden = cast(torch.Tensor, lm_head).shape
    weights = numbers(backbone)
    layers = list(decoder_layers(backbone))
    linear = {n: m for n, m in layers[0].named_modules() if isinstance(m, nn.Linear)}
    if len(linear) < 4:  # two that read, two that write
        raise BadInput(f"--plan: the layers of {kind} are not made of linear layers, so what they keep is not known")
    parts = dict(layers[0].named_modules())
    widths = {n: m.out_features if m.in_features == hidden else m.in_features for n, m in linear.items()}
    config = backbone.config.get_text_config()
    heads = config.num_attention_heads
    found = BackboneSizes(
        name=kind,
        weights=weights,
        embeddings=cast(torch.Tensor, embeddings).numel(),
        lm_head=0 if lm_head is embeddings else cast(torch.Tensor, lm_head).numel(),
        layers=sum(map(numbers, layers)),
        depth=len(layers),
        hidden=hidden,
        vocab=vocab,
        norms=sum("Norm" in type(m).__name__ for m in layers[0].children()),
        readers=len(linear) - 2,
        # Queries and keys that are normed (Qwen 3) are kept from before it too.
        products=sum(width * (1 + (name[:-5] + "_norm" in parts)) for name, width in widths.items()),
        mlp=sum(width for name, width in widths.items() if "att" not in name),
        widest=max(m.in_features for m in linear.values()),
        repeated=2 * (heads - (getattr(config, "num_key_value_heads", None) or heads)) * head_size(config),
        a_rank=len(layers) * sum(m.in_features + m.out_features for m in linear.values()),
    )
    if rank is None:
        return found
    from model.lora import add_lora  # not at the top: peft takes a second to import, and few need it

    add_lora(backbone, rank, 1, targets=targets)
    return dataclasses.replace(found, adapters=numbers(backbone) - weights)


def numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def head_sizes(config: MedusaConfig) -> list[int]:
    """The number of weights of heads 1 to K."""
    with torch.device("meta"):
        return [numbers(head) for head in make_heads(config)]
