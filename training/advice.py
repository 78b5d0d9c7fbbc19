"""`train.py --plan`: the plan that the flags ask for, whether it fits, and what to change if it does not."""

import copy
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from common import terminal
from common.errors import BadInput
from model.bits import PACKAGES
from training.build import heads_config
from training.fsdp import is_version_1
from training.optimiser import optim_name
from training.plan import GIB, PARTS, Moment, Run, Step, tightest
from training.sizes import backbone_sizes
from training.states import read_index

SPARE = 0.03  # of the plan: memory in pieces that nothing fits into, and what a plan is wrong by (mostly below 1 %)
# Outside of PyTorch's memory: CUDA's context and kernels, and NCCL's buffers by its settings. Not measured yet.
CUDA, NCCL = GIB, GIB
DRAFT, RANK, MOST_GPUS = 32768, 16, 64  # of the advice


def show(model_args, data_args, training_args):
    """Prints the plan. Raises BadInput, with advice, if the run does not fit into the GPU that is here, or that
    --plan_gib describes."""
    run = run_of(model_args, data_args, training_args)
    tell = print if training_args.process_index == 0 else lambda text: None
    tell(table(run))
    card = training_args.plan_gib and training_args.plan_gib * GIB
    if card is None and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(training_args.device).total_memory
    if card is not None and needed(run) > card:
        raise BadInput(advice(run, card))
    takes = "CUDA takes" if run.gpus == 1 else "CUDA and NCCL take"
    judged = f" of {card / GIB:.1f}: it fits." if card else "; --plan_gib says how much there is."
    tell(f"With what {takes}, and {SPARE:.0%} to spare, a GPU needs {needed(run) / GIB:.1f} GiB{judged}")


def run_of(model_args, data_args, training_args) -> Run:
    """Raises BadInput for a model or a setting whose memory is not known."""
    check_known(model_args, training_args)
    name, stage_1 = model_args.model_name_or_path, training_args.medusa_only_heads
    where = {"cache_dir": training_args.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    targets = training_args.lora_target_modules or ()
    backbone = backbone_sizes(name, training_args.lora_rank, targets, **where)
    config = None
    if model_args.num_heads:
        config = heads_config(model_args)
        config.medusa_vocab_size = model_args.medusa_vocab_size
        config.set_sizes(backbone.vocab, backbone.hidden, backbone.name)
    length, recomputed = data_args.model_max_length, 0
    if length is None:
        length = read_index(Path(data_args.states_path))["model_max_length"]
    if training_args.gradient_checkpointing and not stage_1:
        recomputed = training_args.gradient_checkpointing_layers or backbone.depth
    if recomputed > backbone.depth:
        raise BadInput(f"--gradient_checkpointing_layers {recomputed}: the backbone has {backbone.depth} layers")
    return Run(
        backbone=backbone,
        heads=config,
        stage_1=stage_1,
        batch=training_args.per_device_train_batch_size,
        length=length,
        evaluated=training_args.per_device_eval_batch_size * data_args.evaluates,
        gpus=gpus(training_args),
        trained=2 if model_args.dtype == "bfloat16" else 4,
        computed=2 if training_args.bf16 else 4,
        accumulation=training_args.gradient_accumulation_steps,
        recomputed=recomputed,
        offloads=training_args.offload_activations,
        stored=data_args.states_path is not None,
        packs=data_args.packing,
        teaches=training_args.medusa_loss != "ce",
        preserves=training_args.preserves,
        settled=model_args.medusa_heads_path is not None or training_args.resume_from_checkpoint is not None,
    )


def gpus(training_args) -> int:
    """How many share the model: of several nodes that hold copies of it, those of one."""
    if training_args.plan_gpus is not None:
        return training_args.plan_gpus
    return int(os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", 0)) or training_args.world_size


def check_known(model_args, training_args):
    """Raises BadInput for a way to train that plans are not of."""
    several, sharded = gpus(training_args) > 1, parse_flag_from_env("ACCELERATE_USE_FSDP")
    optim = optim_name(training_args)
    unknown = (
        (not model_args.use_liger, "--use_liger False: it knows the memory of Liger's kernels only"),
        (
            optim != "adamw_torch_fused",
            f"--optim {optim}: it knows the default only, adamw_torch_fused",
        ),
        (
            training_args.bits in PACKAGES,
            f"--backbone_dtype {training_args.bits}: it knows backbones of bfloat16 and float32 only",
        ),
        (
            training_args.world_size > 1 and (not sharded or is_version_1()),
            "it knows one GPU and FSDP2 only, not DDP and FSDP1: launch with configs/fsdp2.yaml",
        ),
        (
            model_args.dtype == "bfloat16" and not training_args.bf16,
            "--dtype bfloat16: it knows its memory only together with --bf16 True",
        ),
        (
            several and model_args.dtype == "bfloat16",
            "--dtype bfloat16 has no effect under FSDP, which keeps a shard of fp32 weights: leave it out",
        ),
    )
    for applies, sentence in unknown:
        if applies:
            raise BadInput(f"--plan: {sentence}")


def needed(run: Run) -> float:
    """Bytes that a GPU must have."""
    return tightest(run).total * (1 + SPARE) + CUDA + NCCL * (run.gpus > 1)


def table(run: Run) -> str:
    """What is there at each moment, the tightest first. Of the backbone's layers the one that matters."""
    b, kinds = run.backbone, dict[str, Moment]()
    for moment in sorted(Step(run).moments(), key=lambda moment: -moment.total):
        kinds.setdefault(moment.name.split(" of layer ")[0], moment)
    rows = [
        {"GiB, when": moment.name}
        | {part: f"{moment.parts[part] / GIB:.2f}" for part in PARTS}
        | {"together": f"{moment.total / GIB:.2f}"}
        for moment in kinds.values()
    ]
    heads = f"{run.heads.medusa_num_heads} {run.heads.medusa_head_type} heads" if run.heads else "no heads"
    what = f"{b.name}, {b.weights / 1e9:.2f} B weights; {heads}; stage {1 if run.stage_1 else 2}; "
    what += f"{run.batch} x {run.length} tokens on {'one GPU' if run.gpus == 1 else f'each of {run.gpus} GPUs'}"
    return f"{what}\n\n{terminal.markdown(rows)}\n"


def advice(run: Run, card: float) -> str:
    """What is tightest, and with which flags, or on how many GPUs, the run fits. Flags that are each enough alone come
    first; if none is, as many as it takes, those that save most first."""
    moment = tightest(run)
    part = max(PARTS, key=lambda name: moment.parts[name])
    said = f"the run needs {needed(run) / GIB:.1f} GiB of a GPU that has {card / GIB:.1f}. It is tightest when "
    said += f"{moment.name}, and its largest part is the {part} ({moment.parts[part] / GIB:.1f} GiB). "
    alone = [next((changed for changed in kind if needed(changed) <= card), None) for kind in changes(run)]
    *flags, gpus = alone
    found = [changed for changed in flags if changed is not None]
    best = run
    while not found and (better := [changed for kind in [*changes(best)][:-1] for changed in kind]):
        best = min(better, key=needed)
        found = [best] * (needed(best) <= card)
    found += [] if gpus is None else [gpus]
    if found:
        each = [f"{difference(run, changed)} ({needed(changed) / GIB:.1f} GiB)" for changed in found]
        return said + "It fits with " + ", or ".join(each)
    return said + f"No flag helps: with {difference(run, best)} it still needs {needed(best) / GIB:.1f} GiB"


def changes(run: Run) -> Iterator[list[Run]]:
    """Kinds of changes, the smallest first, GPUs last: of each the runs to try, in order. None if it is made already,
    so that changes of changes come to an end."""

    def with_(applies: bool, **fields) -> list[Run]:
        return [dataclasses.replace(run, **fields)] if applies else []

    halves = [2**i for i in range(1, run.batch.bit_length())]
    yield [
        dataclasses.replace(run, batch=run.batch // by, accumulation=run.accumulation * by)
        for by in halves
        if run.batch % by == 0
    ]
    depth, keeps = run.backbone.depth, not run.stage_1 and not run.offloads
    yield [dataclasses.replace(run, recomputed=n) for n in range(run.recomputed + 1, depth + 1) if keeps]
    yield with_(keeps and run.recomputed in (0, depth), recomputed=depth, offloads=True)
    yield with_(run.evaluated > run.batch, evaluated=run.batch)
    heads, vocab = copy.deepcopy(run.heads), 0
    if heads is not None:
        vocab = heads.sizes[1]
        heads.medusa_vocab_size = DRAFT
    yield with_(vocab > DRAFT and not run.settled, heads=heads)
    yield with_(run.stage_1 and not run.stored and not run.packs, stored=True)
    yield with_(run.casts, trained=run.computed)
    adapted = dataclasses.replace(run.backbone, adapters=RANK * run.backbone.a_rank)
    yield with_(run.trains_all and run.heads is not None, backbone=adapted)
    more = [2**i for i in range(1, MOST_GPUS.bit_length()) if run.gpus < 2**i]
    yield [dataclasses.replace(run, gpus=n, trained=4) for n in more]


def difference(run: Run, other: Run) -> str:
    """The flags that make one of the other."""
    flags = {
        f"--per_device_train_batch_size {other.batch} --gradient_accumulation_steps {other.accumulation}": "batch",
        f"--per_device_eval_batch_size {other.evaluated}": "evaluated",
        "--states_path (docs/states.md)": "stored",
        f"--dtype {'bfloat16' if other.trained == 2 else 'float32'}": "trained",
        f"--lora_rank {RANK}": "backbone",
        f"{other.gpus} GPUs": "gpus",
    }
    found = [text for text, name in flags.items() if getattr(run, name) != getattr(other, name)]
    if (run.recomputed, run.offloads) != (other.recomputed, other.offloads):
        found.append("--gradient_checkpointing True")
        if other.offloads:
            found.append("--offload_activations True")
        elif run.recomputed or other.recomputed < run.backbone.depth:
            found.append(f"--gradient_checkpointing_layers {other.recomputed}")
    if run.heads and other.heads and run.heads.medusa_vocab_size != other.heads.medusa_vocab_size:
        found.append(f"--medusa_vocab_size {other.heads.medusa_vocab_size}")
    return " ".join(found)
