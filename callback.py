"""EfficiencyCallback: how fast a run is, how much memory it takes, and how much of the GPU it uses.

MFU here is useful work over the GPU's dense peak. Useful work is what the step must compute, counted by hand below. It
excludes recomputation, padding, and the heads' work on positions without a target, so that these lower the MFU.
"""

import logging
import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

GIB = 2**30

# Dense bf16 TFLOP/s (no sparsity) by the vendor's data sheets. The longest name that the device's name contains wins.
PEAK_TFLOPS = {
    "A100": 312,
    "H100": 989,  # SXM: "NVIDIA H100 80GB HBM3"
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200": 989,
    "H200 NVL": 835,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "B200": 2250,
}


def peak_tflops(device_name: str) -> float | None:
    """The peak of a GPU by its name, or None if it is not in the table."""
    words = f" {device_name} ".replace("-", " ")
    if " Laptop " in words or " MIG " in words:  # a slower chip of the same name, or a part of one
        return None
    names = [name for name in PEAK_TFLOPS if f" {name} " in words]
    return PEAK_TFLOPS[max(names, key=len)] if names else None


@dataclass
class FlopCount:
    """Useful FLOPs of a step. A product of `[m, k]` and `[k, n]` is 2 m k n; backward is twice the forward.

    per_token: one forward, 2 per weight of the decoder's linear layers. For dense models: experts are not counted.
    per_pair: 4 x layers x heads x head_dim, for query x key and weight x value of one attended token.
    per_row: 6 per weight of a head (forward, d_hidden, d_weight), index = head; head 0 is the lm_head. Stage 1 does
        not need the first ResBlock's d_hidden, but it is counted too: at most 1 % of a head. Weights that multiply the
        embeddings of a path (hydra) count 4, as those need no gradient; a markov head's table is in no product. 2 more
        per weight of the teacher if the lm_head teaches: it has as many tokens as the head. (With a draft vocabulary,
        rows whose target is outside of it count too, though they cost nothing: a few in a hundred.)
    backbone_passes: 1 for a frozen backbone (forward only), 3 for one that trains, 2 for one with adapters (3 with
        --preserve_coefficient). A prefix layer always trains, and is in per_token and per_pair so often that it comes
        to 3.
    """

    per_token: float
    per_pair: float
    per_row: list[float]
    backbone_passes: int

    @classmethod
    def of(cls, model) -> "FlopCount":
        """For a MedusaModel; LLaMA-3-8B: 13.96 GFLOP a token, 0.52 MFLOP a pair, 3.25 GFLOP a row."""
        decoder, config = model.backbone.get_decoder(), model.backbone.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        lm_head = 0 if model.backbone_frozen else 6.0 * model.lm_head.weight.numel()
        teaches, passes = model.medusa_loss != "ce", 1 if model.backbone_frozen else 3
        layers: float = config.num_hidden_layers
        if not model.backbone_frozen and not model.lm_head.weight.requires_grad:  # adapters
            # No gradient of the backbone's own weights. That of its activations is as much as the forward pass, and in
            # attention, where no weights are, twice that. To preserve, one more forward pass, and three more products.
            passes = 2 + model.preserves
            layers *= (passes + 1) / passes
            lm_head *= (4 + 6 * model.preserves) / 6

        def weights(module) -> int:
            """By their sizes: in few bits a weight has fewer numbers than that, or another name."""
            linear = (m for m in module.modules() if hasattr(m, "in_features") and not hasattr(m, "base_layer"))
            convolutions = (m for m in module.modules() if isinstance(m, Conv1D))
            return sum(m.in_features * m.out_features for m in linear) + sum(m.weight.numel() for m in convolutions)

        prefix = 0.0
        if model.prefix is not None:  # it trains, whether the backbone does or not
            prefix, layers = weights(model.prefix) * 3 / passes, layers + 3 / passes
        return cls(
            per_token=2.0 * (weights(decoder) + prefix),
            per_pair=4.0 * layers * config.num_attention_heads * head_dim,
            per_row=[
                lm_head,
                *(
                    cls.of_head(head, model.lm_head.in_features)
                    + 2.0 * teaches * head.projection.out_features * model.lm_head.in_features
                    for head in model.medusa_heads
                ),
            ],
            backbone_passes=passes,
        )

    @staticmethod
    def of_head(head, hidden_size: int) -> float:
        linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
        embeddings = linear[0].in_features - hidden_size if head.reads_embeds else 0
        weights = sum(parameter.numel() for module in linear for parameter in module.parameters())
        return 6.0 * weights - 2.0 * embeddings * hidden_size

    def step(self, rows: list[int], tokens: int, pairs: int) -> float:
        backbone = self.backbone_passes * (self.per_token * tokens + self.per_pair * pairs)
        return backbone + sum(flops * n for flops, n in zip(self.per_row, rows, strict=True))


def peak_process_gib() -> float:
    """The most CPU memory this process has had at once."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def pauses(control) -> bool:
    """Whether logging, evaluation or a checkpoint comes next."""
    return control.should_log or control.should_evaluate or control.should_save


class EfficiencyCallback(TrainerCallback):
    """Measures between two logs. The time includes waiting for data, but not evaluation, checkpoints and logging.

    warmup_steps: steps after the start (or a resume) that `summary()` leaves out, because compilation, autotuning and
        allocator growth happen there.
    peak: TFLOP/s of one device; default: from the table, by the device's name.
    world_size: the number of devices. `count` gets the counts of all ranks; MFU is per device.
    """

    def __init__(self, flops: FlopCount, device: torch.device, warmup_steps=3, peak=None, world_size=1):
        self.flops, self.device, self.warmup_steps, self.world_size = flops, device, warmup_steps, world_size
        self.peak = peak
        if device.type == "cuda" and peak is None:
            self.peak = peak_tflops(torch.cuda.get_device_name(device))
            if self.peak is None:
                name = torch.cuda.get_device_name(device)
                logger.warning("unknown GPU %s: no MFU; the useful TFLOP/s are logged all the same", name)
        self.reset()

    def reset(self):
        self.steps_seen, self.counts, self.pending = 0, None, []
        self.since_log, self.total = Meter(), Meter()
        self.started: float | None = None

    def count(self, counts: torch.Tensor):
        """Takes the counts of the coming step, int64 `[K+4]`: rows of head 0..K, tokens, token slots with padding,
        attention pairs. They are read only when the clock is read, so that the CPU need not wait for the GPU here."""
        self.counts = counts

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or the clock says when work was launched, not when it was done
        return time.perf_counter()

    def read_clock(self):
        """Adds up the steps since the last reading and their time, and starts a new interval."""
        now = self.now()
        if self.pending:
            *rows, tokens, slots, pairs = torch.stack(self.pending).sum(0).tolist()
            flops = self.flops.step(rows, tokens, pairs)
            assert self.started is not None  # since the first step began
            steps = len(self.pending)
            meter = Meter(now - self.started, steps, tokens, slots, sum(rows[1:]) or rows[0], flops)
            self.since_log.add(meter)
            if self.steps_seen > self.warmup_steps:
                self.total.add(meter)
        self.started, self.pending = now, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.reset()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.started is None:
            self.started = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps_seen += 1
        self.pending.append(self.counts)
        if self.steps_seen == self.warmup_steps or pauses(control):
            self.read_clock()  # only where it must be read: reading it drains the GPU's queue

    def on_epoch_end(self, args, state, control, **kwargs):
        if pauses(control):
            self.read_clock()

    def restart(self, args, state, control, **kwargs):
        self.read_clock()  # steps are pending only where training ends between two logs

    on_log = on_evaluate = on_save = restart

    def on_train_end(self, args, state, control, **kwargs):
        self.read_clock()
        if self.total.steps:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in self.summary().items())
            logger.info("without the first %d steps: %s", self.warmup_steps, figures)

    def window(self) -> dict[str, float]:
        """Figures since the last call, and the peak memory since training began."""
        figures, self.since_log = self.figures(self.since_log), Meter()
        return figures | self.memory()

    def summary(self) -> dict[str, float]:
        """The same over the whole run without its warm-up steps."""
        return self.figures(self.total) | self.memory()

    def figures(self, meter: "Meter") -> dict[str, float]:
        if not meter.seconds:
            return {}
        tflops = meter.flops / meter.seconds / 1e12 / self.world_size
        figures = {
            "step_time_s": meter.seconds / meter.steps,
            "tokens_per_s": meter.tokens / meter.seconds,
            "padded_tokens_per_s": meter.slots / meter.seconds,
            "rows_per_s": meter.rows / meter.seconds,
            "useful_tflops": tflops,
        }
        return figures | ({"mfu": tflops / self.peak} if self.peak else {})

    def memory(self) -> dict[str, float]:
        if self.device.type == "cuda":
            return {
                "peak_allocated_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
                "peak_reserved_gib": torch.cuda.max_memory_reserved(self.device) / GIB,
            }
        return {"peak_process_gib": peak_process_gib()}


@dataclass
class Meter:
    """Sums over steps. tokens: without padding; slots: with padding; rows: of the heads (or of the lm_head alone)."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    slots: int = 0
    rows: int = 0
    flops: float = 0.0

    def add(self, step: "Meter"):
        self.seconds += step.seconds
        self.steps += step.steps
        self.tokens += step.tokens
        self.slots += step.slots
        self.rows += step.rows
        self.flops += step.flops
