"""A prefix layer: one more decoder layer between the backbone's last hidden states and the heads (Hydra++, arXiv
2402.05109, section 3.3).

The backbone's last state was made to say the next token. The layer can gather from the whole text what the tokens
after that depend on, once for all heads. Head 0, the `lm_head`, and the teacher read the backbone's states as ever.

It is a layer of the backbone's own kind, as a decoder with that one layer: so attention masks, positions, packing and
caches are those of the backbone. Its two output projections start at zero. So a fresh layer changes nothing, and
untrained heads guess as without it.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from common.errors import BadInput
from model.backbone import use_liger

PREFIX = "prefix."  # of the names of its tensors
OUTPUTS = ("o_proj", "down_proj")  # of attention and MLP, in LLaMA and its kin


def make_prefix(backbone: PreTrainedModel, dtype: torch.dtype, device) -> PreTrainedModel:
    """A fresh layer, the same on every process. Raises BadInput for a backbone whose layers are of another build."""
    decoder_class, name = type(backbone.get_decoder()), type(backbone).__name__
    config = copy.deepcopy(backbone.config.get_text_config())
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # where numbers are drawn, they are the same
            torch.default_generator.manual_seed(0)
            prefix, states = decoder_class(config), torch.randn(1, 4, config.hidden_size)
        prefix.set_input_embeddings(nn.Identity())
        prefix.norm = nn.Identity()  # of what is normed already
        where = "cuda" if torch.cuda.is_available() else "cpu"  # Liger's kernels, once they are in, run nowhere else
        prefix.to(where, torch.float32)
        with torch.no_grad():
            for part in OUTPUTS:
                for module in (module for name, module in prefix.named_modules() if name.endswith(part)):
                    module.weight.zero_()
            same = torch.equal(run_prefix(prefix, states.to(where)), states.to(where))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"--medusa_prefix_layer does not know the layers of {name}: leave it out") from error
    if not same:
        raise BadInput(f"--medusa_prefix_layer: a fresh layer of {name} would change the hidden states: leave it out")
    return prefix.to(device, dtype)


def use_liger_in_prefix(prefix: PreTrainedModel):
    use_liger(prefix)
    prefix.norm = nn.Identity()  # Liger has put its own forward into it


def run_prefix(prefix: PreTrainedModel, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
    """hidden `[B, T, H]` -> `[B, T, H]`. kwargs: as for the backbone's decoder."""
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(next(prefix.parameters()).dtype)  # the backbone may be bf16 and the layer fp32
    return prefix(inputs_embeds=hidden, **({"use_cache": False} | kwargs)).last_hidden_state


def load_prefix(prefix: PreTrainedModel | None, tensors: dict[str, torch.Tensor], source):
    """Loads the layer's tensors. source: their file. Raises BadInput unless they are those of this layer."""
    mine = {} if prefix is None else prefix.state_dict()
    for problem, names in (("lacks tensor", mine.keys() - tensors.keys()), ("has", tensors.keys() - mine.keys())):
        if names:
            whose = f"the prefix layer of {type(prefix).__name__}" if prefix else "heads without a prefix layer"
            raise BadInput(f"{source} {problem} {PREFIX}{min(names)}, and should hold {whose}")
    for name, tensor in tensors.items():
        if tensor.shape != mine[name].shape:
            shapes = f"shape {list(tensor.shape)}, and this backbone's layer has {list(mine[name].shape)}"
            raise BadInput(f"{source}: {PREFIX}{name} has {shapes}: the heads are of another backbone")
    if prefix is not None:
        prefix.load_state_dict(tensors)
