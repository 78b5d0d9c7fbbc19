"""Decoding with Medusa heads: one pass of the backbone checks a whole tree of guesses (arXiv 2401.10774, 2.1, 2.3).

    decoder = Decoder(model, choices, batch_size=1, max_length=2048)
    for new_tokens in decoder.run([prompt_ids], max_new_tokens=256, eos={2}):
        ...

A pass:
1. The root, a token that the backbone has chosen, and the guesses of the draft tree go through the backbone at once.
   Each attends to the text so far and to its own ancestors.
2. A guess is right if the backbone chooses it after its parent. The deepest guess that is right with all its ancestors
   is accepted with them. The backbone's own token after it is the next root.
3. Keys and values of the accepted guesses move to their positions in the text. The heads guess again from there.

Shapes are fixed and nothing leaves the device: on a GPU a pass is one CUDA graph. An empty tree is plain decoding.
"""

import logging
import time
from collections.abc import Iterator, Set
from itertools import count

import torch

from common.errors import BadInput
from decoding.attention import TreeCache, decoding, tree_view
from decoding.growing import Adaptive, Growing
from decoding.guessing import LevelByLevel, best_tokens
from decoding.in_order import PASS_ROWS, check_can_agree
from decoding.kernels import can_run
from decoding.prefixed import Prefixed
from decoding.products import AllHeads, Products, sharing
from decoding.sampling import GREEDY, Sampling, choose
from decoding.tree import Choices, Layout, check, filled_up, for_rows, layout, ranks
from medusa_model import MedusaModel
from model.backbone import context_length, head_size, rope_follows_length
from model.heads import ResBlock
from model.loss import cap

logger = logging.getLogger(__name__)


class Decoder:
    """Decodes up to batch_size prompts at once, with one tree or (Adaptive) with those that each pass grows.

    max_length: prompt plus new tokens of a row. graph: on a GPU, capture a pass as a CUDA graph. agree: the same text
    with every tree, to the token, in bf16 too (decoding/in_order.py). Raises BadInput for a tree deeper than the
    heads, a rank outside the heads' vocabulary, a max_length beyond the backbone's context, and where texts cannot
    agree.
    """

    def __init__(
        self,
        model: MedusaModel,
        choices: Choices | Adaptive,
        batch_size: int,
        max_length: int,
        sampling: Sampling = GREEDY,
        graph: bool = True,
        agree: bool = False,
    ):
        self.model, self.sampling, self.agree = model.eval(), sampling, agree
        device = self.device = model.lm_head.weight.device
        config = model.backbone.config.get_text_config()
        self.kernels, rope_moves = can_run(device, head_size(config)), rope_follows_length(config)
        self.growing: Growing | None = None
        self.ranks = 0  # guesses of each head, where they are the same behind all parents
        if isinstance(choices, Adaptive):
            self.growing = Growing(model, choices)
            tree = Layout(*(part[0] for part in self.growing.room(1)))
        else:
            choices = check(choices, len(model.medusa_heads))
            self.ranks = ranks(choices, config.vocab_size if model.token_map is None else len(model.token_map))
            tree = layout(choices)
        self.real = len(tree.depth)  # rows of a pass that are nodes
        if agree:
            check_can_agree(tree, self.kernels, sampling.temperature == 0, rope_moves, self.growing is not None)
            tree = filled_up(tree, PASS_ROWS)
        self.nodes, self.most = len(tree.depth), tree.path.shape[1]  # rows of a pass; tokens it can yield
        self.tree = self.growing.room(batch_size) if self.growing else for_rows(tree, batch_size, device)
        self.max_length, self.context = max_length, context_length(model.backbone)
        if max_length > self.context:
            raise BadInput(
                f"{max_length} tokens (prompt and answer) do not fit into the context of the backbone, "
                f"{self.context} tokens: shorten the prompt or lower --max_new_tokens"
            )
        # A pass writes all its nodes after the text; a row that has ended may run one pass more (see `passes`).
        places = -(-(max_length + self.nodes + 2 * self.most) // 64) * 64
        self.cache = TreeCache(config.num_hidden_layers, places, self.kernels)
        heads = self.heads = model.medusa_heads[: self.most - 1]  # those that the tree uses
        self.products: list[Products] = []
        self.blocks: list[ResBlock] = []
        self.all_heads: AllHeads | None = None
        depends = not self.growing and any(head.reads_path for head in heads)
        self.by_level = LevelByLevel(model, heads, Layout(*(part[0] for part in self.tree))) if depends else None
        if device.type == "cuda":
            model.use_liger_in_backbone()
            self.products = sharing(model.backbone)
            if self.by_level or self.growing:
                self.products += sharing(heads)  # behind one parent of one text: one row
                self.blocks = [block for block in heads.modules() if isinstance(block, ResBlock)]
            elif batch_size == 1 and len(heads) and next(heads.parameters()).dtype == model.lm_head.weight.dtype:
                self.all_heads = AllHeads(heads)
        self.places, self.row = torch.arange(places, device=device), torch.arange(batch_size, device=device)[:, None]
        self.prefixed: Prefixed | None = None
        if model.prefix is not None and self.most > 1:
            self.prefixed = Prefixed(model, batch_size, self.most, self.places, self.kernels)
            self.products += sharing(model.prefix) if device.type == "cuda" else []
        # What a pass reads and writes: always the same memory, so that a CUDA graph can replay it.
        self.tokens = torch.zeros(batch_size, self.nodes, dtype=torch.int64, device=device)  # root and guesses
        self.length = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)  # tokens in the cache
        self.active = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
        self.out = torch.zeros(batch_size, self.most + 1, dtype=torch.int64, device=device)  # count, then tokens
        self.graph: torch.cuda.CUDAGraph | None = None
        self.use_graph = graph and device.type == "cuda"
        if self.use_graph and rope_moves:
            logger.warning("RoPE that changes with the text's length: no CUDA graph, so a pass takes longer")
            self.use_graph = False

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Reads the prompts, at most batch_size of them, and returns the backbone's next token for each."""
        prompts = prompts + [[0]] * (len(self.tokens) - len(prompts))
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        # Padding goes on the right: causal attention never sees it, and passes overwrite it before they read there.
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self.cache.length = None
        ids = ids.to(self.device)
        hidden = self.model.backbone.get_decoder()(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1], device=self.device)[None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.length.copy_(lengths)
        last = self.row, self.length - 1
        chosen, _ = choose(self.logits(hidden[last]), self.sampling)
        self.tokens[:, :1] = chosen
        seen = self.prefixed.prefill(hidden) if self.prefixed else hidden
        self.guess(seen[last][:, 0])
        return chosen[:, 0].tolist()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return cap(self.model.lm_head(hidden), self.model.softcap)

    def guess(self, hidden: torch.Tensor):
        """Fills the tree with the heads' best tokens behind the root. hidden `[B, H]`: what heads read where that was
        chosen."""
        if self.growing:
            self.growing(hidden, self.tokens, self.tree)
        elif self.by_level:
            self.by_level(hidden, self.tokens)
        elif self.ranks:
            logits = (
                self.all_heads(hidden) if self.all_heads else torch.stack([head(hidden) for head in self.heads], 1)
            )
            best = best_tokens(logits, self.ranks, self.model.token_map)  # [B, heads, ranks]
            self.tokens[:, 1:] = best[:, self.tree.depth[0, 1:] - 1, self.tree.rank[0, 1:]]

    def read(self) -> torch.Tensor:
        """The backbone on `tokens`, each node behind the text and its own ancestors: `[B, n, H]`."""
        self.cache.length = self.length
        return self.model.backbone.get_decoder()(
            input_ids=self.tokens,
            # Guesses may reach past the end of the context; no token that `run` yields does.
            position_ids=(self.length + self.tree.depth).clamp(max=self.context - 1),
            past_key_values=self.cache,
            use_cache=True,
            **self.view(),
        ).last_hidden_state

    def step(self):
        """One pass: advances `tokens` and `length`; `out` gets each row's count of new tokens, then the tokens."""
        tree, row, hidden = self.tree, self.row, self.read()
        chosen, logp = choose(self.logits(hidden), self.sampling)
        if logp is None:
            right = self.tokens == chosen.gather(1, tree.parent)
        else:  # log-probability of each node under its parent
            likely = logp[row, tree.parent, self.tokens]
            right = likely > -torch.inf
        right[:, 0] = True  # the root
        accepted = ~(~right[:, None] & tree.ancestors).any(2)
        depth = torch.where(accepted, tree.depth, -1)
        if logp is not None:  # several guesses of one depth can be typical: the likeliest path is taken
            likely[:, 0] = 0
            total = torch.where(tree.ancestors, likely[:, None], 0).sum(2)
            depth = total.masked_fill(depth < depth.amax(1, keepdim=True), -torch.inf)
        best = depth.argmax(1, keepdim=True)  # [B, 1]
        way, root, guessed = tree.path[row, best][:, 0], chosen.gather(1, best), tree.depth.gather(1, best)
        new = self.tokens.gather(1, way).roll(-1, 1)  # the accepted guesses; the backbone's token goes after them
        self.out[:, 1:] = new.scatter(1, guessed, root)
        self.out[:, :1] = guessed + 1
        self.cache.move(self.length + way, self.length + torch.arange(self.most, device=self.device))
        if self.prefixed:
            seen = self.prefixed.follow(hidden[row, way], self.length, self.context)[row, guessed]
        else:
            seen = hidden[row, best]
        self.length += (guessed + 1) * self.active
        self.tokens[:, :1] = root
        self.guess(seen[:, 0])

    def view(self) -> dict:
        """What each node may attend to, as `attend` takes it."""
        tree = self.tree
        if self.agree:
            return {"attention_mask": None, "in_order": (self.length, tree.path, tree.depth, self.real)}
        return tree_view(tree, self.length, self.places, self.kernels)

    def capture(self):
        """Records `step` as a CUDA graph. Undoes its passes, but for the cache past `length`, which nothing reads."""
        with torch.random.fork_rng([self.device]):
            state = [self.tokens, self.length, *(self.tree if self.growing else ())]
            before = [tensor.clone() for tensor in state]
            self.active.zero_()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # cuBLAS and Triton set up in their first calls
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

    def passes(self) -> Iterator[list[list[int]]]:
        """Yields `out` of each pass, without end. On a GPU the next one already runs: it needs no input."""
        while self.graph is None:
            self.step()
            yield self.out.tolist()
        landed = [torch.empty_like(self.out, device="cpu", pin_memory=True) for _ in range(2)]
        events = [torch.cuda.Event() for _ in range(2)]
        for number in count():
            self.graph.replay()
            landed[number % 2].copy_(self.out, non_blocking=True)
            events[number % 2].record()
            if number:
                events[(number - 1) % 2].synchronize()
                yield landed[(number - 1) % 2].tolist()

    @torch.inference_mode()
    def run(
        self, prompts: list[list[int]], max_new_tokens: int, eos: Set[int] = frozenset()
    ) -> Iterator[list[list[int]]]:
        """Yields the tokens that each pass adds to each row; the first item is the prefill's, one token per row. A row
        ends at an EOS, at max_new_tokens or at max_length, and gets empty lists until all rows have ended. Raises
        BadInput for a prompt that leaves no room."""
        check_room(prompts, self.max_length)
        room = [min(max_new_tokens, self.max_length - len(prompt)) for prompt in prompts]

        def cut(row: int, tokens: list[int]) -> list[int]:
            """The new tokens up to an EOS or the end of the room. Ends the row there."""
            tokens = tokens[: room[row]]
            end = next((i + 1 for i, token in enumerate(tokens) if token in eos), None)
            room[row] = 0 if end else room[row] - len(tokens)
            return tokens[:end]

        with decoding(self.model, self.products, self.blocks):
            first = self.prefill(prompts)
            if self.use_graph and self.graph is None:
                self.capture()
            yield [cut(row, [first[row]]) for row in range(len(prompts))]
            active, passes = None, self.passes()
            while any(room):
                if [bool(left) for left in room] != active:
                    active = [bool(left) for left in room]
                    self.active.copy_(torch.tensor([active + [False] * (len(self.active) - len(prompts))]).t())
                found = next(passes)
                yield [cut(row, found[row][1 : 1 + found[row][0]]) for row in range(len(prompts))]

    @torch.inference_mode()
    def step_ms(self, prompt: list[int], passes: int) -> float:
        """Mean time of a pass in ms, with the prompt in the cache of every row."""
        with decoding(self.model, self.products, self.blocks):
            self.prefill([prompt] * len(self.tokens))
            if self.use_graph and self.graph is None:
                self.capture()
            self.active.zero_()  # so `length` stays as it is
            done = self.passes()
            next(done)
            start = time.perf_counter()
            for _ in range(passes):
                next(done)
            return (time.perf_counter() - start) / passes * 1000


def check_room(prompts: list[list[int]], context: int):
    """Raises BadInput, with its number, for the first prompt that leaves no room for an answer."""
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise BadInput(f"prompt {number} is empty: write something")
        if len(prompt) >= context:
            raise BadInput(
                f"prompt {number} has {len(prompt)} tokens, but there is room for {context} with the answer: shorten "
                "it"
            )
