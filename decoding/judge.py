"""Does a pass over a draft tree give the backbone's own logits? Asked once, before anything is decoded.

Decoding gives the backbone's text only if each node of a tree sees what it would see in a plain text: the text so far
and its own ancestors, at their places. A backbone whose positions, masks or state are of a kind that decoding does not
know (ALiBi, recurrent layers) would write something else without a word.
"""

import torch

from common.errors import BadInput, first_line
from decoding.attention import decoding
from decoding.decoder import Decoder
from model.judge import OTHER_KERNELS, apart, name_of, random_text


def check_pass(decoder: Decoder):
    """Raises BadInput if the logits of the tree's nodes, with random guesses in it, are not those of plain texts that
    end in them. It takes a prefill of some tokens, a pass, and a forward of one short row for each node."""
    model, nodes = decoder.model, decoder.real
    text = random_text(model.config.vocab_size, rows=2 + nodes // 16).flatten().to(decoder.device)
    length = max(1, min(8, decoder.max_length, decoder.context - decoder.most))
    prompt, guesses = text[:length], text[length:][:nodes]
    devices = [decoder.device] if decoder.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices):  # the prefill draws a token, if tokens are drawn
        try:
            with decoding(model, decoder.products, decoder.blocks):
                decoder.prefill([prompt.tolist()])  # where trees grow, it grows one
                decoder.tokens[0, :nodes] = guesses
                found = decoder.logits(decoder.read())[0, :nodes]
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError) as error:
            raise BadInput(
                f"decoding cannot run {name_of(model)}: a pass over a draft tree ends with {type(error).__name__} "
                f"({first_line(error)}). Its layers keep something else than keys and values, so it is not supported"
            ) from error
        path, depth = decoder.tree.path[0, :nodes], decoder.tree.depth[0, :nodes]
        hidden = model.last_hidden_state(torch.cat([prompt.expand(nodes, -1), guesses[path]], 1))  # [nodes, T, H]
        want = decoder.logits(hidden[torch.arange(nodes, device=decoder.device), length + depth])
    part = apart(found, want).median().item()  # one node may part by itself: a token that goes to other experts
    if part > OTHER_KERNELS[model.lm_head.weight.dtype]:
        raise BadInput(
            f"decoding does not know how {name_of(model)} places or masks its tokens: logits of a pass over a draft "
            f"tree differ by {part:.2%} of their spread from those of the same text read plainly, so what it writes "
            "would be wrong: not supported"
        )
