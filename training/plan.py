"""What a run takes on each GPU, from config.json and the flags alone, before anything is loaded (`--plan`).

A training step has a few moments at which much memory is held at once. For each of them the parts are added up, and
the largest sum is the peak. docs/distributed.md says what is held when; tests/training/test_plan.py compares it with
every peak that was measured. A plan is of training with Liger's kernels and fused AdamW, on one GPU or sharded over
several by FSDP2. training/advice.py makes a `Run` of flags and says what to change.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from model.config import MedusaConfig
from model.loss import CHUNK_ROWS, chunk_mem_const
from training.sizes import BackboneSizes, head_sizes

GIB = 2**30
PARTS = ("backbone", "heads", "optimiser", "gradients", "activations", "buffers")
MOMENTS_OF_ADAM = 2
REDUCED = 4  # bytes of a gradient while FSDP2 adds up those of all GPUs: fp32 (training/fsdp.py)
# cuBLAS keeps this once it has run. Measured: between steps 0.06 to 0.07 GiB more than weights and moments are held,
# on 1 of 2 to 64 GPUs and in both stages (2026-11-23_memory_h100.csv).
CUBLAS = 2**26


@dataclass(frozen=True)
class Run:
    """What memory depends on."""

    backbone: BackboneSizes
    heads: MedusaConfig | None  # with its sizes; None: --medusa_return False
    stage_1: bool
    batch: int  # conversations at once on a GPU
    length: int  # tokens of each
    evaluated: int = 0  # conversations at once in an evaluation; 0: there is none
    gpus: int = 1  # that share the model
    trained: int = 4  # bytes of a weight that trains, and of each of its moments
    computed: int = 2  # bytes of an activation, and of a frozen weight
    accumulation: int = 1  # batches before the optimiser's step
    recomputed: int = 0  # layers, from the first on, that keep their input only
    offloads: bool = False  # and keep it on the CPU
    stored: bool = False  # hidden states are read, so there are no layers
    packs: bool = False
    teaches: bool = False  # --medusa_loss kl or lk
    preserves: bool = False  # --preserve_coefficient
    settled: bool = False  # what heads guess follows from those that the run starts from

    @property
    def trains_all(self) -> bool:
        return not self.stage_1 and not self.backbone.adapters

    @property
    def casts(self) -> bool:
        """Whether weights are kept in more bits than they compute in, and copied. (Shards are copied by FSDP2.)"""
        return self.gpus == 1 and self.trained != self.computed


class Moment(NamedTuple):
    """When in a step, and bytes by part."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def chunk_rows(rows: int, vocab: int, hidden: int) -> int:
    """How many rows have logits at once: Liger cuts their number by V / (C H), and rounds up to a power of two."""
    cut = -(-vocab // (chunk_mem_const(rows, vocab, hidden, CHUNK_ROWS) * hidden))
    return min(rows, 1 << (-(-rows // cut) - 1).bit_length())


def tightest(run: Run) -> Moment:
    return max(Step(run).moments(), key=lambda moment: moment.total)


class Step:
    """The moments of a training step. Attributes are numbers of weights, or bytes of one GPU.

    unit: bytes of the batch's hidden states in the dtype of products; stream: of those between layers. Embeddings in
    fp32 make them fp32, if one GPU trains them; as shards they arrive in bf16.
    """

    def __init__(self, run: Run):
        b, config, c = run.backbone, run.heads, run.computed
        self.run, self.sizes = run, head_sizes(config) if config else []
        self.tokens = run.batch * run.length
        self.unit = self.tokens * b.hidden * c
        self.fp32_stream = run.casts and run.trains_all
        self.stream = self.tokens * b.hidden * (run.trained if self.fp32_stream else c)
        self.depth = 0 if run.stored else b.depth
        self.weights = b.weights - b.layers if run.stored else b.weights
        self.prefix = b.layer if config and config.medusa_prefix_layer else 0
        self.trained = 0 if run.stage_1 else b.adapters or b.weights  # of the backbone
        self.layer = self.trained and (b.adapters // b.depth or b.layer)  # of these in a layer
        self.tied = 0 if b.lm_head else b.embeddings
        # Whose gradients come before the backbone's. On several GPUs that of tied embeddings waits for the backbone's.
        self.first = (b.lm_head or self.tied * (run.gpus == 1)) if run.trains_all else 0
        self.units = [self.first, *self.sizes]
        self.kept: list[float] = [0 if run.offloads else self.stream] * run.recomputed
        self.kept += [self.whole_layer()] * (self.depth - run.recomputed)
        # What is there from the backbone's forward pass to its backward pass: of each layer, what the last norm reads
        # and writes, and the gradient of that.
        self.seen = self.stream + (0 if run.stage_1 else sum(self.kept) + 2 * self.stream) + run.preserves * self.unit
        if self.prefix:  # what the layer keeps, its output, and the gradient of that
            self.seen += 6 * self.unit + self.tokens * c * b.products + c * self.prefix * run.casts

    def whole_layer(self) -> float:
        """What a layer keeps for its backward pass: LLaMA-3-8B 17 H numbers a token. What norms read, what linear
        layers read and write, attention's output."""
        run, b = self.run, self.run.backbone
        behind_norms = 2 * self.unit
        if self.fp32_stream or b.adapters:  # each linear layer makes a copy of its own
            behind_norms = b.readers * self.unit
        kept = b.norms * self.stream + behind_norms + self.tokens * run.computed * b.products
        kept += self.unit if b.adapters else 0  # attention's output, and a copy of it
        if run.packs:  # each layer has attention's mask in the dtype of products, and keys and values repeated
            kept += run.computed * run.batch * run.length**2 + self.tokens * run.computed * b.repeated
        return kept + (run.computed * b.layer if self.fp32_stream else 0)  # the weights' copies

    def at(self, name: str, done: float | None, new=0.0, activations=0.0, buffers=0.0) -> Moment:
        """done: of how many weights the gradients are there, each GPU's share; None: of none, whatever accumulates.
        new: bytes of gradients that are not shared yet."""
        run, n, w = self.run, self.run.gpus, self.run.trained
        heads = sum(self.sizes) + self.prefix
        frozen = 0 if run.trains_all else self.weights
        if run.accumulation > 1 and done is not None:
            done = self.trained + heads
        kept = (frozen * run.computed + self.trained * w) / n, heads * w / n
        moments = MOMENTS_OF_ADAM * (self.trained + heads) * w / n
        now = (moments, (done or 0) * w / n + new, activations, buffers + CUBLAS)
        return Moment(name, dict(zip(PARTS, (*kept, *now), strict=True)))

    def whole(self, weights: float) -> float:
        """Bytes of a unit while it runs, beside its shard, or beside its fp32 weights."""
        return weights * self.run.computed if self.run.gpus > 1 or self.run.casts else 0

    def arriving(self, weights: float) -> float:
        """Bytes of a unit's gradient while it is added up over the GPUs, or turned into fp32."""
        run = self.run
        added = REDUCED / run.gpus * (run.accumulation > 1)  # its share, beside the one it is added to
        return self.whole(weights) and weights * (run.computed + (REDUCED + added if run.gpus > 1 else run.trained))

    def moments(self) -> Iterator[Moment]:
        yield from self.of_the_forward_pass()
        yield from self.of_the_losses()
        if not self.run.stage_1:
            yield from self.of_the_backward_pass()

    def of_the_forward_pass(self) -> Iterator[Moment]:
        run, b, c = self.run, self.run.backbone, self.run.computed
        shared = run.gpus > 1
        gathers = self.depth or run.teaches or (run.heads and run.heads.medusa_head_type == "hydra")
        if shared and gathers:  # they arrive in a buffer, and are copied from there
            yield self.at("the embeddings are gathered", 0, 0, self.stream, 2 * c * b.embeddings)

        def running(batch: int) -> float:
            """Embeddings, the layer's input, residual, what is normed; gate, up and their product."""
            mask = (1 + c) * batch * run.length**2 * run.packs  # as bool, and in the dtype of products
            return batch * run.length * c * (4 * b.hidden + b.mlp) + mask

        weights = 2 * c * b.layer if shared else 0  # a layer's and the next one's
        casts = c * b.layers if self.fp32_stream else 0  # autocast keeps its copies until the pass ends
        if self.depth and run.stage_1:
            yield self.at("a layer of the backbone runs", 0, 0, running(run.batch), weights)
        if casts and run.recomputed:
            yield self.at("the backbone's forward pass ends", 0, 0, self.seen + running(run.batch), casts)
        if self.depth and run.evaluated:
            yield self.at("an evaluation", None, 0, running(run.evaluated), weights + casts)

    def of_the_losses(self) -> Iterator[Moment]:
        """Of the heads the last one: the gradients of those before it are there."""
        run, b, config = self.run, self.run.backbone, self.run.heads
        if not run.stage_1:
            yield from self.of_a_loss("the lm_head's", 0, self.first, b.vocab)
        if config:
            blocks, path = config.medusa_num_layers, 0.0
            if config.medusa_head_type == "hydra":  # embeddings of the text, and of each row's path
                path = (1 + len(self.sizes)) * self.unit
            if config.medusa_head_type == "markov":  # a row beside its token's numbers
                path = self.unit + self.tokens * run.computed * config.medusa_rank
            last, before = self.sizes[-1], sum(self.units) - self.sizes[-1]
            yield from self.of_a_loss("a head's", before, last, config.sizes[1], blocks, path, run.teaches)
        if self.prefix:
            busy = self.seen + self.tokens * run.computed * b.widest + 2 * self.unit
            new = self.arriving(self.prefix)
            yield self.at("the prefix layer's backward pass", sum(self.units), new, busy, self.whole(self.prefix))
        if run.preserves:
            yield from self.of_a_loss("--preserve_coefficient's", sum(self.units), 0, b.vocab, teaches=True)

    def of_a_loss(
        self, whose: str, before: int, trained: int, vocab: int, blocks=0, path=0.0, teaches=False
    ) -> Iterator[Moment]:
        """before: weights whose gradients are there; trained: those of this head; vocab: tokens that it guesses; path:
        bytes of what it reads of the path to its guess."""
        run, b, c, unit, shared = self.run, self.run.backbone, self.run.computed, self.unit, self.run.gpus > 1
        # Rows, what each ResBlock multiplies and puts out, and the gradient of what the projection reads.
        rows = self.stream + unit + blocks * (self.stream + unit) + path
        rows += (1 + blocks) * unit if self.fp32_stream else 0  # and copies of what is multiplied
        logits, others = chunk_rows(self.tokens, vocab, b.hidden), 0.0
        if teaches:  # the teacher's rows and logits, its weight, and of that the rows of a draft vocabulary
            rows, logits = rows + unit, 2 * min(self.tokens, CHUNK_ROWS)
            others += self.whole(b.vocab * b.hidden) if shared or run.trains_all else 0
            others += c * vocab * b.hidden * (vocab < b.vocab)
        elif not trained and shared:  # an lm_head that does not train
            others += c * b.vocab * b.hidden
        if shared and run.trains_all:
            others += 2 * c * self.tied  # whole, with a gradient that waits
        buffers = self.whole(trained) + c * vocab * logits + others
        yield self.at(f"{whose} loss is computed", before, c * trained, self.seen + rows, buffers)
        if trained:
            done, rows = before + trained * shared, 0 if shared else rows - unit
            yield self.at(f"{whose} gradient is added up", done, self.arriving(trained), self.seen + rows, others)

    def of_the_backward_pass(self) -> Iterator[Moment]:
        """Layer by layer: what it keeps or computes again, the gradients of its output and of the MLP's product."""
        run, b, c = self.run, self.run.backbone, self.run.computed
        shared, heads = run.gpus > 1, sum(self.units) + self.prefix
        for j in range(self.depth):
            done = heads + (self.depth - 1 - j) * self.layer
            busy = self.seen - sum(self.kept[j:]) - self.stream + self.whole_layer()
            busy += self.unit * (1 + run.offloads) + self.tokens * c * b.widest
            weights = c * b.layer * (2 if j else 1) * shared  # its own and the next one's
            adding = REDUCED * self.layer * (j < self.depth - 1) * shared  # the gradient of the layer before
            new: float = c * b.widest * b.hidden * run.trains_all
            yield self.at(f"the backward pass of layer {j + 1}", done, new, busy, weights + adding)
        if run.trains_all:
            new = self.arriving(b.embeddings) if shared else run.trained * self.tied
            everything = self.trained + sum(self.sizes) + self.prefix
            yield self.at("the embeddings' gradient is added up", everything, new, 2 * self.stream)
