"""FSDP on one GPU (a group of one rank, NCCL) against no FSDP on the same GPU. CI has no GPU: run by hand."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, logged, make_backbone, make_conversations, make_tokenizer, weights, write_jsonl

pytestmark = [pytest.mark.gpu, pytest.mark.processes]
CASES = {
    "stage 1": (True, "untied"),
    "stage 2": (False, "untied"),
    "stage 1, tied": (True, "tied"),
    "stage 2, tied": (False, "tied"),
    "stage 1, bf16": (True, "untied", "--bf16", "True"),
    "stage 1, few tokens": (True, "untied", "--medusa_vocab_size", "24"),
    "stage 2, few tokens": (False, "untied", "--medusa_vocab_size", "24", "--medusa_loss", "kl"),
    "lora": (False, "untied", "--lora_rank", "4", "--preserve_coefficient", "2"),
    "lora, tied": (False, "tied", "--lora_rank", "4", "--preserve_coefficient", "2"),
    "lora, bf16": (False, "untied", "--lora_rank", "4", "--preserve_coefficient", "2", "--bf16", "True"),
    "stage 2, bf16": (False, "untied", "--bf16", "True", "--gradient_checkpointing", "True"),
}


def start(directory: Path, fsdp: int, runs: list):
    """Runs train.py several times in one new process, as the only rank of an FSDP group or (0) without any."""
    spec = directory / "runs.json"
    spec.write_text(json.dumps(runs))
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29533"}
    variables |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(fsdp), "FSDP_USE_ORIG_PARAMS": "true"}
    variables |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    found = {"PYTHONPATH": ":".join([str(ROOT), f"{ROOT}/tests", *sys.path])}
    done = subprocess.run(
        [sys.executable, __file__, spec],
        env=os.environ | found | (variables if fsdp else {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpu")
    for tied in (True, False):
        torch.manual_seed(0)
        for part in (make_backbone(tied=tied), make_tokenizer("llama3")):
            part.save_pretrained(directory / ("tied" if tied else "untied"))
    write_jsonl(directory / "chats.jsonl", make_conversations(48))
    return directory


def flags(base: Path, output: str, case: str, *more) -> list[str]:
    stage_1, model, *others = CASES[case]
    return [
        "--model_name_or_path", f"{base / model}", "--data_path", f"{base / 'chats.jsonl'}", "--medusa_num_heads", "2",
        "--output_dir", f"{base / output / case}", "--cache_dir", f"{base / 'cache'}", "--model_max_length", "64",
        "--medusa_only_heads", f"{stage_1}", "--per_device_train_batch_size", "8", "--eval_holdout", "8",
        "--logging_steps", "1", "--learning_rate", "1e-2", "--max_steps", "4", "--max_grad_norm", "0.5",
        "--save_steps", "2", *others, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", params=[2, 1])
def runs(request, base):
    """-> (directory without FSDP, directory with FSDP, its log)."""
    if not (base / "plain").exists():
        start(base, 0, [flags(base, "plain", case) for case in CASES])
    cases = [case for case in CASES if works(request.param, case)]
    log = start(base, request.param, [flags(base, f"fsdp{request.param}", case) for case in cases])
    return base / "plain", base / f"fsdp{request.param}", request.param, log


def works(version: int, case: str) -> bool:
    """FSDP1 does not shard in a group of one, and then stumbles over a tied pair that is frozen (torch 2.11, 2.13:
    `as_params=True type(prim_param)`). With two ranks it works: tests/test_distributed.py."""
    return (version, case) != (1, "stage 1, tied") and not (version == 1 and case.startswith("lora"))  # refused


@pytest.mark.parametrize("case", CASES)
def test_fsdp_equals_no_fsdp(case, runs):
    plain, sharded, version, log = runs
    if not works(version, case):
        pytest.skip("FSDP1 in a group of one")
    assert f"(FSDP{version})" in log
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if "bf16" in case else {"rtol": 1e-4, "atol": 1e-5}
    for key in ("loss", "grad_norm", "eval_head_0_loss", "eval_head_2_loss", "head_1_loss"):
        a, b = (torch.tensor(logged(run / case, key)) for run in (plain, sharded))
        torch.testing.assert_close(a, b, **tolerance)
    a, b = weights(plain / case), weights(sharded / case)
    assert a.keys() == b.keys()
    if "bf16" not in case:  # Adam turns the sign of a rounding error into a step of the whole learning rate
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_resume_goes_on_exactly(base, runs):
    _, sharded, version, _ = runs
    again = f"again{version}"
    for case in ("stage 1", "stage 2"):
        shutil.copytree(sharded / case / "checkpoint-2", base / again / case / "checkpoint-2")
    more = ("--resume_from_checkpoint", "True")
    log = start(base, version, [flags(base, again, case, *more) for case in ("stage 1", "stage 2")])
    assert log.count("resuming from") == 2
    for case in ("stage 1", "stage 2"):
        a, b = weights(sharded / case), weights(base / again / case)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":  # the process that start() starts
    import train

    for words in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = ["train.py", *words]
        train.main()
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
