"""Runs of train.py on one, two and four processes, for test_distributed.py and test_resume.py.

The processes are forked from one that has imported everything (worker.py), talk over gloo and use the CPU.
"""

import json
import multiprocessing
import shutil
import time
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import worker
from conftest import (
    make_backbone,
    make_conversations,
    make_tokenizer,
    randomise,
    rendezvous,
    weights,
    write_jsonl,
)
from transformers import set_seed

import store_states
from medusa_model import MedusaConfig, MedusaModel

HSDP = "FSDP2, 2 copies of 2 shards"  # what configs/fsdp2_multi_node.yaml makes of two nodes of two
# Processes and FSDP's version, by what the log calls it.
KINDS = {"one process": (1, 0), "FSDP2": (2, 2), "FSDP1": (2, 1), "DDP": (2, 0), HSDP: (4, 2)}
EACH = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_SYNC_MODULE_STATES": "false"}
FIRST = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true"}
SIZES = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
SIZES |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
# Who reads the weights; accelerate's FSDP1 cannot send them without a GPU.
READS = {"FSDP2": FIRST, HSDP: FIRST | SIZES, "FSDP1": EACH}
NONE = {}
CLIP, STEPS = 0.02, 8
TIMEOUT = 300  # seconds; a run takes one or two, but on a busy machine more
INTERPRETED = 600  # with Triton's interpreter it takes half a minute


class Run(NamedTuple):
    out: Path
    codes: list[int]
    logs: list[str]


class Lab:
    """Makes inputs and runs. A run that several tests look at is made once."""

    def __init__(self, root: Path):
        set_seed(0)
        self.root, self.done, self.count = root, {}, 0
        for name, tied in (("model", False), ("tied", True)):
            make_backbone(tied=tied).save_pretrained(root / name)
            make_tokenizer("llama3").save_pretrained(root / name)
        for name in ("heads", "markov-heads", "hydra-heads", "prefix-heads"):
            config = MedusaConfig(medusa_num_heads=2, medusa_rank=8, medusa_prefix_layer=name == "prefix-heads")
            config.medusa_head_type = name.split("-")[0] if name in ("markov-heads", "hydra-heads") else "medusa"
            model = MedusaModel.from_backbone(make_backbone(), config)
            model.freeze_backbone()
            randomise(model.medusa_heads)
            if model.prefix is not None:
                randomise(model.prefix, 0.1)
            model.save_pretrained(root / name)
        # 38 to train on, 5 to evaluate on. 38 = 4 x 8 + 6: the second rank's last batch of an epoch is half empty.
        write_jsonl(root / "chats.jsonl", make_conversations(43))
        write_jsonl(root / "other.jsonl", make_conversations(43, seed=1))
        write_no_rows(root)
        for model in ("model", "tied"):
            flags = {"--model_name_or_path": root / model, "--output": root / f"{model}-states"}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", ["store_states.py", *self.store_argv("", None, flags)])
                store_states.main()

    def store_argv(self, kind, out, flags: dict) -> list[str]:
        """Of store_states.py; flags has its --output."""
        all_flags = {
            "--model_name_or_path": self.root / "model", "--data_path": self.root / "chats.jsonl",
            "--cache_dir": self.root / "cache", "--eval_holdout": 5, "--model_max_length": 64,
            "--medusa_num_heads": 2, "--dtype": "float32",
        } | flags  # fmt: skip
        return [str(word) for pair in all_flags.items() for word in pair]

    def argv(self, kind: str, out: Path, flags: dict) -> list[str]:
        each = 8 // KINDS[kind][0] if "--gradient_accumulation_steps" not in flags else 4 // KINDS[kind][0]
        all_flags = {
            "--model_name_or_path": "model", "--data_path": "chats.jsonl", "--medusa_heads_path": "heads",
            "--eval_holdout": 5, "--medusa_num_heads": 2, "--model_max_length": 64, "--output_dir": out,
            "--per_device_train_batch_size": each, "--per_device_eval_batch_size": each, "--max_steps": STEPS,
            "--save_steps": 3, "--eval_strategy": "steps", "--eval_steps": 3, "--logging_steps": 1,
            "--learning_rate": 1e-2, "--medusa_lr_multiplier": 0.5, "--weight_decay": 0.1, "--max_grad_norm": CLIP,
            "--medusa_scheduler": "linear", "--adam_epsilon": 1e-4, "--cache_dir": "cache",
        } | flags  # fmt: skip
        paths = ("--model_name_or_path", "--data_path", "--medusa_heads_path", "--cache_dir", "--chat_template")
        for name in (*paths, "--states_path"):
            if all_flags.get(name) is not None:
                all_flags[name] = self.root / all_flags[name]
        return [str(word) for pair in all_flags.items() if pair[1] is not None for word in pair]

    def launch(
        self, kind, flags, out=None, at=None, on=0, environment=NONE, rank_1=NONE, timeout=TIMEOUT, argv=None, **kwargs
    ) -> Run:
        """at, on: what befalls rank `on` (worker.py). rank_1: flags of that rank alone. timeout: seconds, after which
        the test fails. argv: makes the command line (default: train.py's)."""
        self.count += 1
        out = out or self.root / f"run-{self.count}"
        world, fsdp = KINDS[kind]
        common = rendezvous() | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        processes, logs = [], [self.root / f"run-{self.count}.{rank}.log" for rank in range(world)]
        for rank, log in enumerate(logs):
            log.touch()  # it is read even if the process is killed before it begins
            variables = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            variables |= READS.get(kind, {}) | environment
            words = (argv or self.argv)(kind, out, flags | (rank_1 if rank == 1 else {}))
            args = (words, log, variables, fsdp, at if rank == on else None)
            processes.append(FORK.Process(target=worker.run, args=args, kwargs=kwargs))
            processes[-1].start()
        if late := wait(processes, timeout):
            pytest.fail("\n".join([late, *(log.read_text()[-3000:] for log in logs)]))
        return Run(out, [process.exitcode for process in processes], [log.read_text() for log in logs])

    def run(self, kind, flags, **kwargs) -> Run:
        """One that must go well, and must have run as `kind`."""
        run = self.launch(kind, flags, **kwargs)
        assert run.codes == [0] * KINDS[kind][0], "\n".join(log[-3000:] for log in run.logs)
        assert f"({kind})" in run.logs[0]
        return run

    def never_stopped(self, kind, case) -> Run:
        if (kind, case) not in self.done:
            self.done[kind, case] = self.run(kind, CASES[case])
        return self.done[kind, case]

    def stopped(self, kind, case, step) -> Path:
        """What a run leaves that is stopped soon after checkpoint-`step`."""
        out = self.root / f"stopped-{self.count}"
        shutil.copytree(self.never_stopped(kind, case).out, out)
        for path in out.iterdir():
            if path.name.startswith("checkpoint-") and int(path.name.split("-")[1]) <= step:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return out


FORK = multiprocessing.get_context("forkserver")


def wait(processes, timeout=TIMEOUT) -> str:
    """As a launcher does: if a process fails, the others have little time left (to report the same), and if it is
    killed none. -> which ones took more than `timeout` seconds and were killed, as a sentence, or nothing."""
    deadline = end = time.monotonic() + timeout
    late = []
    while alive := [process.sentinel for process in processes if process.is_alive()]:
        left = [0 if process.exitcode < 0 else 10 for process in processes if process.exitcode]
        deadline = min([deadline, *(time.monotonic() + seconds for seconds in left)])
        if not connection.wait(alive, max(0, deadline - time.monotonic())):
            if deadline == end:
                late = [f"rank {rank}" for rank, process in enumerate(processes) if process.is_alive()]
            break
    for process in processes:
        process.kill()
        process.join()
    if not late:
        return ""
    were = "was still running after {0:g} s and was" if len(late) == 1 else "were still running after {0:g} s and were"
    return f"{' and '.join(late)} {were.format(timeout)} killed: the machine may be busy"


def open_lab(root: Path) -> Lab:
    here = Path(__file__).parent
    FORK.set_forkserver_preload(["worker"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{here}:{here.parent}")  # the preload knows no other
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        forkserver.ensure_running()
    return Lab(root)


def write_no_rows(root: Path):
    """Conversations whose fourth token is the last label within 12 tokens: nothing for head 3 (shift 4) to guess.

    In this order, 4 to a rank: rank 0 has none, rank 1 has none, both have none, both have some.
    """
    template = "{% for message in messages %}{{ message['content'] + '<|eot_id|>' }}{% endfor %}"
    (root / "plain.jinja").write_text(template)
    roles = ("user", "assistant") * 2
    short, long = (
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}
        for texts in (("a", "a", "a" * 20, "a"), ("a a", "a a a a"))
    )
    order = [short] * 4 + [long] * 4 + [long] * 4 + [short] * 4 + [short] * 8 + [long] * 8
    write_jsonl(root / "no_rows.jsonl", order)


STAGE_1, STAGE_2 = {"--medusa_only_heads": True}, {"--medusa_only_heads": False}
LORA = {"--lora_rank": 4, "--preserve_coefficient": 3.0}
NO_ROWS = {
    "--data_path": "no_rows.jsonl", "--chat_template": "plain.jinja", "--train_sampling_strategy": "sequential",
    "--model_max_length": 12, "--medusa_num_heads": 3, "--medusa_heads_path": None, "--max_steps": 4,
    "--eval_holdout": 0, "--eval_strategy": "no",
}  # fmt: skip
STATES = {"--states_path": "model-states", "--data_path": None, "--eval_holdout": None}
TIED_STATES = STATES | {"--model_name_or_path": "tied", "--states_path": "tied-states"}
BEST = {"--load_best_model_at_end": True, "--greater_is_better": True}  # the highest loss, so that it is not the last
FEW_TOKENS = {"--medusa_vocab_size": 24, "--medusa_heads_path": None}
MARKOV = {"--medusa_head_type": "markov", "--medusa_rank": 8, "--medusa_heads_path": "markov-heads"}
HYDRA = {"--medusa_head_type": "hydra", "--medusa_heads_path": "hydra-heads"}
PREFIX, TIED = {"--medusa_heads_path": "prefix-heads"}, {"--model_name_or_path": "tied"}
CASES = {
    "stage 1": STAGE_1,
    "stage 2": STAGE_2,
    "tied, stage 1": STAGE_1 | {"--model_name_or_path": "tied"},
    "tied, stage 2": STAGE_2 | {"--model_name_or_path": "tied"},
    "accumulation, stage 1": STAGE_1 | {"--gradient_accumulation_steps": 2},
    "accumulation, stage 2": STAGE_2 | {"--gradient_accumulation_steps": 2},
    "tied, accumulation": STAGE_2 | {"--model_name_or_path": "tied", "--gradient_accumulation_steps": 2},
    "packing, stage 1": STAGE_1 | {"--packing": True, "--model_max_length": 96},
    "packing, stage 2": STAGE_2 | {"--packing": True, "--model_max_length": 96},
    "lazy": STAGE_2 | {"--lazy_preprocess": True},
    "no rows, stage 1": STAGE_1 | NO_ROWS,
    "no rows, stage 2": STAGE_2 | NO_ROWS,
    "an empty batch": STAGE_1 | {"--eval_holdout": 7},  # 36 = 4 x 8 + 4: rank 1's last batch holds repeated ones only
    "both repeat": STAGE_2 | {"--eval_holdout": 8},  # 35 = 4 x 8 + 3
    "drop last": STAGE_1 | {"--dataloader_drop_last": True},
    "no heads": {"--medusa_return": False, "--medusa_heads_path": None},
    "checkpointing": STAGE_2 | {"--gradient_checkpointing": True},
    "some recomputed": STAGE_2 | {"--gradient_checkpointing": True, "--gradient_checkpointing_layers": 1},
    "offload": STAGE_2 | {"--gradient_checkpointing": True, "--offload_activations": True},
    "best, stage 1": STAGE_1 | BEST,
    "best, stage 2": STAGE_2 | BEST,
    "kl, stage 1": STAGE_1 | BEST | {"--medusa_loss": "kl", "--medusa_heads_coefficient": 1},  # with evaluation
    "all rows": STAGE_1 | {"--medusa_loss": "kl", "--medusa_rows": "all"},
    "kl, stage 2": STAGE_2 | {"--medusa_loss": "kl"},
    "states": STAGE_1 | STATES,
    "states, accumulation": STAGE_1 | STATES | {"--gradient_accumulation_steps": 2},
    "states, few tokens": STAGE_1 | STATES | FEW_TOKENS,
    "states, kl": STAGE_1 | STATES | BEST | {"--medusa_loss": "kl", "--medusa_heads_coefficient": 1},
    "states, kl, tied": STAGE_1 | TIED_STATES | {"--medusa_loss": "kl", "--medusa_heads_coefficient": 1},
    "kl, tied, stage 2": STAGE_2 | {"--medusa_loss": "kl", "--model_name_or_path": "tied"},
    "few tokens, stage 1": STAGE_1 | BEST | FEW_TOKENS,
    "few tokens, stage 2": STAGE_2 | FEW_TOKENS | {"--medusa_loss": "kl"},
    "few tokens, tied, stage 2": STAGE_2 | FEW_TOKENS | {"--model_name_or_path": "tied"},
    "markov, stage 1": STAGE_1 | MARKOV | BEST,
    "markov, stage 2": STAGE_2 | MARKOV | {"--medusa_loss": "kl"},
    "markov, fresh": STAGE_1 | MARKOV | {"--medusa_heads_path": None},
    "markov, states": STAGE_1 | MARKOV | STATES | BEST,
    "hydra, stage 1": STAGE_1 | HYDRA | BEST,
    "hydra, stage 2": STAGE_2 | HYDRA | {"--gradient_accumulation_steps": 2},
    "hydra, tied, stage 2": STAGE_2 | HYDRA | {"--medusa_loss": "kl", "--model_name_or_path": "tied"},
    "hydra, no rows": STAGE_2 | NO_ROWS | {"--medusa_head_type": "hydra"},
    "hydra, packing": STAGE_1 | HYDRA | {"--packing": True, "--model_max_length": 96},
    "hydra, few tokens": STAGE_1 | HYDRA | FEW_TOKENS | {"--medusa_loss": "lk", "--medusa_heads_coefficient": 2},
    "hydra, states": STAGE_1 | HYDRA | STATES | BEST,
    "prefix, stage 1": STAGE_1 | PREFIX | BEST,
    "prefix, stage 2": STAGE_2 | PREFIX | {"--gradient_accumulation_steps": 2, "--medusa_loss": "kl"},
    "prefix, tied, packing": STAGE_2 | PREFIX | TIED | {"--packing": True, "--model_max_length": 96},
    "prefix, checkpointing": STAGE_2 | PREFIX | {"--gradient_checkpointing": True},
    "prefix, states": STAGE_1 | PREFIX | STATES | {"--medusa_loss": "kl", "--medusa_heads_coefficient": 1},
    "lora": STAGE_2 | LORA | {"--gradient_accumulation_steps": 2, "--gradient_checkpointing": True},
    "lora, tied": STAGE_2 | LORA | TIED | {"--medusa_loss": "kl", "--lora_target_modules": "q_proj"},
    "hydra, states, tied": STAGE_1 | HYDRA | TIED_STATES | {"--medusa_loss": "kl", "--medusa_heads_coefficient": 1},
}
NO_DIFFERENCE = dict.fromkeys(
    ("checkpointing", "some recomputed", "offload"), "stage 2"
)  # compared with a run without


def figures(out: Path) -> list[dict]:
    """What is logged of each step and evaluation, without the times."""
    names = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    found = [{k: v for k, v in entry.items() if k in names or "head_" in k} for entry in history]
    return [entry for entry in found if len(entry) > 1]


def assert_close(got: Path, want: Path, rel=1e-5, atol=1e-5):
    """Logs and final weights."""
    for a, b in zip(figures(got), figures(want), strict=True):
        assert a == pytest.approx(b, rel=rel, abs=rel)
    a, b = weights(got), weights(want)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_identical(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
