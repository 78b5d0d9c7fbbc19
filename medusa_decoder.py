"""Decoding with Medusa heads: one pass of the backbone checks a whole tree of guesses (arXiv 2401.10774, 2.1, 2.3).

    decoder = Decoder(model, choices, batch_size=1, max_length=2048)
    for new_tokens in decoder.run([prompt_ids], max_new_tokens=256, eos={2}):
        ...

Each pass: the root (a token the backbone has chosen) and the tree's guesses go through the backbone at once, each
seeing the text so far and its own ancestors; the deepest guess whose way from the root is right is accepted, with the
backbone's own token after it; its keys and values move to where they belong; the heads at that place guess anew.
All of it has a fixed shape and happens on the device, so on a GPU a pass is one CUDA graph. Without a tree it is plain
decoding by the same code.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from errors import BadInput
from medusa_model import MedusaModel, cap
from medusa_tree import Choices, check, layout

ATTENTION = "medusa_tree"


def tree_attention(module, query, key, value, attention_mask, scaling, softcap=None, sliding_window=None, **kwargs):
    """Attention of a pass: query `[B, H, n, D]`, key and value `[B, H_kv, S, D]` (the whole cache), attention_mask
    `[B, 1, n, S]` bool -> `[B, n, H, D]`. Without a mask (prefill): causal, through torch's own kernels.

    The query heads that share keys become rows of one product, so that keys are read once and never repeated.
    """
    batch, heads, length, size = query.shape
    if attention_mask is None:
        if softcap is None and (sliding_window is None or length <= sliding_window):
            return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
        place = torch.arange(length, device=query.device)
        distance = place[:, None] - place
        attention_mask, distance = (distance >= 0)[None, None], distance[None]
    else:
        distance = kwargs.get("distance")
    if sliding_window is not None:
        attention_mask = attention_mask & (distance < sliding_window)[:, None]
    groups = heads // key.shape[1]
    scores = query.reshape(batch, -1, groups * length, size) @ key.mT * scaling
    if softcap is not None:
        scores = cap(scores, softcap)
    scores = scores.view(batch, -1, groups, length, key.shape[2]).float()
    scores = scores.masked_fill(~attention_mask[:, :, None], -torch.inf).softmax(-1).to(value.dtype)
    out = scores.view(batch, -1, groups * length, key.shape[2]) @ value
    return out.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, tree_attention)


@contextmanager
def attending_to_trees(backbone):
    """Puts `tree_attention` into the backbone, which knows nothing of padding masks, and takes it out again."""
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)


class TreeCache(Cache):
    """Keys and values of all layers in one tensor `[layers, 2, B, H_kv, S, D]`, so that moving the accepted ones is
    one operation. Each row of the batch has a length of its own: `slots` `[B, n]` says where a pass writes."""

    def __init__(self, num_layers: int, max_length: int):
        super().__init__(layers=[])
        self.num_layers, self.max_length = num_layers, max_length
        self.states = self.slots = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Writes `[B, H_kv, n, D]` and returns the whole cache; in a prefill (no slots) what it was given."""
        if self.states is None:
            batch, heads, _, size = key_states.shape
            shape = (self.num_layers, 2, batch, heads, self.max_length, size)
            self.states = key_states.new_zeros(shape)
        mine = self.states[layer_idx]
        if self.slots is None:
            mine[0, :, :, : key_states.shape[2]] = key_states
            mine[1, :, :, : key_states.shape[2]] = value_states
            return key_states, value_states
        index = self.slots[:, None, :, None].expand_as(key_states)
        mine[0].scatter_(2, index, key_states)
        mine[1].scatter_(2, index, value_states)
        return mine[0], mine[1]

    def move(self, source: torch.Tensor, target: torch.Tensor):
        """Copies what is at the places source `[B, m]` to target `[B, m]`, in all layers."""
        shape = [*self.states.shape[:4], source.shape[1], self.states.shape[5]]
        source, target = (places[None, None, :, None, :, None].expand(shape) for places in (source, target))
        self.states.scatter_(4, target, self.states.gather(4, source))


class Sampling(NamedTuple):
    """How the backbone chooses a token. temperature 0: the most likely. Otherwise it draws from
    softmax(logits / temperature), and a guess is accepted if it is the token drawn: the distribution is exactly that
    of plain sampling. typical: a guess is accepted if its probability exceeds min(epsilon, delta * exp(-entropy)),
    and the token after the last accepted one is drawn from those that would be (paper, section 2.3.1): more guesses
    pass, and the distribution is another one."""

    temperature: float = 0.0
    typical: bool = False
    epsilon: float = 0.09
    delta: float = 0.3


GREEDY = Sampling()


class Decoder:
    """Decodes up to batch_size prompts at once with one tree.

    max_length: prompt and new tokens of a row together. graph: on a GPU, capture a pass as a CUDA graph. Raises
    BadInput if the tree is deeper than the heads, or max_length more than the backbone's context.
    """

    def __init__(
        self,
        model: MedusaModel,
        choices: Choices,
        batch_size: int,
        max_length: int,
        sampling: Sampling = GREEDY,
        graph: bool = True,
    ):
        self.model, self.sampling = model.eval(), sampling
        self.choices = check(choices, len(model.medusa_heads))
        device = self.device = model.lm_head.weight.device
        self.tree = type(layout(self.choices))(*(tensor.to(device) for tensor in layout(self.choices)))
        self.nodes, self.most = len(self.tree.depth), self.tree.path.shape[1]  # tokens a pass checks, and yields
        config = model.backbone.config.get_text_config()
        if max_length > config.max_position_embeddings:
            raise BadInput(
                f"{max_length} tokens (prompt and answer) do not fit into the context of the backbone, "
                f"{config.max_position_embeddings} tokens: shorten the prompt or lower --max_new_tokens"
            )
        self.sliding = getattr(config, "sliding_window", None) is not None
        self.max_length = max_length
        places = -(-(max_length + self.nodes + self.most) // 64) * 64  # a pass writes all its nodes behind the text
        self.cache = TreeCache(config.num_hidden_layers, places)
        self.places = torch.arange(places, device=device)
        # What a pass reads and leaves: fixed memory, so that a CUDA graph can replay it.
        self.tokens = torch.zeros(batch_size, self.nodes, dtype=torch.int64, device=device)  # root and guesses
        self.length = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)  # tokens in the cache
        self.active = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
        self.out = torch.zeros(batch_size, self.most + 1, dtype=torch.int64, device=device)  # count, then tokens
        ranks = [[choice[depth] for choice in self.choices if len(choice) > depth] for depth in range(self.most - 1)]
        self.ranks = [max(ranks) + 1 for ranks in ranks]  # how many guesses of each head the tree uses
        place = [sum(self.ranks[: len(choice) - 1]) + choice[-1] for choice in self.choices]
        self.place = torch.tensor(place, dtype=torch.int64, device=device)  # of each node among all these guesses
        self.graph = None
        self.use_graph = graph and device.type == "cuda"

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Reads the prompts, at most batch_size of them, and returns the backbone's next token of each."""
        batch = len(self.tokens)
        prompts = prompts + [[0]] * (batch - len(prompts))
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        # Padding goes on the right: causal attention never sees it, and the first pass overwrites it.
        ids = torch.zeros(batch, int(lengths.max()), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self.cache.slots = None
        ids = ids.to(self.device)
        hidden = self.model.backbone.get_decoder()(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1], device=self.device)[None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.length.copy_(lengths)
        hidden = hidden[torch.arange(batch, device=self.device), self.length[:, 0] - 1]
        chosen, _ = self.choose(self.logits(hidden[:, None]))
        self.tokens[:, :1] = chosen
        self.guess(hidden)
        return chosen[:, 0].tolist()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return cap(self.model.lm_head(hidden), self.model.softcap)

    def guess(self, hidden: torch.Tensor):
        """Fills the tree from the heads' best tokens at hidden `[B, H]`, where the root was chosen."""
        heads = zip(self.model.medusa_heads, self.ranks, strict=False)  # a tree need not use all heads
        best = [head(hidden).topk(count).indices for head, count in heads]
        if best:
            self.tokens[:, 1:] = torch.cat(best, 1)[:, self.place]

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """logits `[B, n, V]` -> the token the backbone puts behind each node `[B, n]`, and, for typical acceptance,
        log-probabilities `[B, n, V]`, -inf where a token would not be accepted."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1), None
        logp = (logits.float() / self.sampling.temperature).log_softmax(-1)
        if self.sampling.typical:
            entropy = -(logp.exp() * logp).nansum(-1, keepdim=True)
            bound = (self.sampling.delta * (-entropy).exp()).clamp(max=self.sampling.epsilon)
            logp = logp.masked_fill(logp <= bound.log(), -torch.inf)
        noise = -torch.empty_like(logp).exponential_().log()  # Gumbel: the argmax is a draw from softmax(logp)
        return (logp + noise).argmax(-1), logp if self.sampling.typical else None

    def step(self):
        """One pass: reads `tokens` and `length`, advances both, leaves in `out` how many tokens each row got and
        which."""
        tree, cache, batch = self.tree, self.cache, len(self.tokens)
        behind = self.places - self.length  # [B, S]
        within = (behind >= 0) & (behind < self.nodes)
        mine = tree.ancestors[:, behind.clamp(0, self.nodes - 1)].transpose(0, 1)  # [B, n, S]
        mask = (behind < 0)[:, None] | (mine & within[:, None])
        cache.slots = self.length + torch.arange(self.nodes, device=self.device)
        hidden = self.model.backbone.get_decoder()(
            input_ids=self.tokens,
            position_ids=self.length + tree.depth,
            attention_mask=mask[:, None],
            past_key_values=cache,
            use_cache=True,
            **self.window(behind),
        ).last_hidden_state
        chosen, logp = self.choose(self.logits(hidden))
        if logp is None:
            right = self.tokens == chosen[:, tree.parent]
        else:  # log-probability of each node under its parent
            likely = logp[:, tree.parent].gather(2, self.tokens[:, :, None])[:, :, 0]
            right = likely > -torch.inf
        right[:, 0] = True  # the root
        accepted = ~(~right[:, None] & tree.ancestors).any(2)
        score = torch.where(accepted, tree.depth, -1).float()
        if logp is not None:  # several guesses of one depth can be typical: the most likely way is taken
            likely[:, 0] = 0
            total = torch.where(tree.ancestors, likely[:, None], 0).sum(2)
            score = score + torch.sigmoid(total)
        best = score.argmax(1, keepdim=True)  # [B, 1]
        way, root, count = tree.path[best[:, 0]], chosen.gather(1, best), tree.depth[best]
        new = self.tokens.gather(1, way).roll(-1, 1)  # the accepted guesses, and behind them the backbone's token
        self.out[:, 1:] = new.scatter(1, count, root)
        self.out[:, :1] = count + 1
        cache.move(cache.slots.gather(1, way), self.length + torch.arange(self.most, device=self.device))
        self.length += (count + 1) * self.active
        self.tokens[:, :1] = root
        self.guess(hidden[torch.arange(batch, device=self.device), best[:, 0]])

    def window(self, behind: torch.Tensor) -> dict:
        """For models with a sliding window: how far each node is from each place, `[B, n, S]`."""
        if not self.sliding:
            return {}
        depth = self.tree.depth
        place = torch.where(behind < 0, behind, depth[behind.clamp(0, self.nodes - 1)])
        return {"distance": depth[:, None] - place[:, None]}

    def capture(self):
        """Records `step` as a CUDA graph. What it does meanwhile is undone: the cache behind `length` is nobody's."""
        state = self.tokens.clone(), self.length.clone()
        self.active.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # cuBLAS and Triton set themselves up
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()
        for tensor, value in zip((self.tokens, self.length), state, strict=True):
            tensor.copy_(value)

    @torch.inference_mode()
    def run(
        self, prompts: list[list[int]], max_new_tokens: int, eos: set[int] = frozenset()
    ) -> Iterator[list[list[int]]]:
        """Yields what each pass adds to each row, first the prefill (one token each), until every row has an EOS,
        max_new_tokens tokens, or no more room. A row that has ended gets nothing. Raises BadInput for a prompt that
        leaves no room."""
        room = [min(max_new_tokens, self.max_length - len(prompt)) for prompt in prompts]
        for number, prompt in enumerate(prompts, 1):
            if not 0 < len(prompt) < self.max_length:
                raise BadInput(
                    f"prompt {number} has {len(prompt)} tokens, and there is room for {self.max_length} with the "
                    "answer: shorten it"
                )

        def cut(row: int, tokens: list[int]) -> list[int]:
            """What counts of new tokens: nothing behind an EOS or the room. Ends the row there."""
            tokens = tokens[: room[row]]
            end = next((i + 1 for i, token in enumerate(tokens) if token in eos), None)
            room[row] = 0 if end else room[row] - len(tokens)
            return tokens[:end]

        with attending_to_trees(self.model.backbone):
            first = self.prefill(prompts)
            if self.use_graph and self.graph is None:
                self.capture()
            yield [cut(row, [first[row]]) for row in range(len(prompts))]
            active = None
            while any(room):
                if [bool(left) for left in room] != active:
                    active = [bool(left) for left in room]
                    self.active.copy_(torch.tensor([active + [False] * (len(self.active) - len(prompts))]).t())
                if self.graph:
                    self.graph.replay()
                else:
                    self.step()
                found = self.out.tolist()
                yield [cut(row, found[row][1 : 1 + found[row][0]]) for row in range(len(prompts))]

    @torch.inference_mode()
    def step_ms(self, prompt: list[int], passes: int) -> float:
        """Mean time of one pass in ms, with the prompt in the cache of every row."""
        with attending_to_trees(self.model.backbone):
            self.prefill([prompt] * len(self.tokens))
            if self.use_graph and self.graph is None:
                self.capture()
            self.active.zero_()  # the length stays
            step = self.graph.replay if self.graph else self.step
            step()
            self.out.tolist()  # waits
            start = time.perf_counter()
            for _ in range(passes):
                step()
                self.out.tolist()
            return (time.perf_counter() - start) / passes * 1000


def answer_all(
    model: MedusaModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    eos: set[int],
    temperature: float = 0.0,
) -> Iterator[list[int]]:
    """Plain decoding, batch by batch, of all prompts in one cache as long as the longest: yields each one's new
    tokens, in order, an EOS included if it was reached. Heads are not used."""
    if not prompts:
        return
    longest = max(map(len, prompts)) + max_new_tokens
    decoder = Decoder(model, [], min(batch_size, len(prompts)), longest, Sampling(temperature))
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers = [[] for _ in batch]
        for new in decoder.run(batch, max_new_tokens, eos):
            for answer, tokens in zip(answers, new, strict=True):
                answer += tokens
        yield from answers
