"""Checkpoints that a kill at any moment leaves usable, runs that go on exactly, and faults that are one line."""

import shutil
import signal

import pytest
import torch
from conftest import logged, saved_state, weights
from lab import CASES, HSDP, HYDRA, STAGE_1, STAGE_2, STATES, STEPS, Run, assert_close, assert_identical
from quantised import needs

from common.errors import BadInput

pytestmark = pytest.mark.processes

# ---- going on from a checkpoint ----


@pytest.mark.parametrize(
    ("before", "after", "case", "step"),
    [
        ("one process", "one process", "stage 1", 6),  # step 3 is in the first epoch, 6 in the second
        ("FSDP2", "FSDP2", "stage 1", 3),
        ("FSDP2", "FSDP2", "stage 2", 6),
        ("FSDP2", "FSDP2", "tied, stage 2", 3),
        ("FSDP2", "FSDP2", "accumulation, stage 2", 3),
        ("FSDP2", "FSDP2", "packing, stage 1", 3),
        ("FSDP2", "FSDP2", "lazy", 6),
        ("FSDP2", "FSDP2", "few tokens, stage 1", 3),
        ("FSDP1", "FSDP2", "few tokens, stage 2", 6),
        ("one process", "DDP", "few tokens, stage 2", 3),
        ("FSDP2", "FSDP2", "states", 3),
        ("one process", "DDP", "states", 6),
        ("FSDP2", "one process", "stage 2", 6),
        ("FSDP2", "one process", "tied, stage 2", 3),
        ("one process", "FSDP2", "stage 1", 6),
        ("one process", "FSDP2", "stage 2", 3),
        ("FSDP1", "FSDP1", "stage 2", 3),
        ("FSDP1", "one process", "stage 2", 6),
        ("one process", "FSDP1", "stage 2", 3),
        ("FSDP1", "FSDP2", "stage 1", 3),
        ("DDP", "DDP", "stage 2", 6),
        ("DDP", "FSDP2", "stage 1", 6),
        (HSDP, "FSDP2", "stage 2", 3),
        ("FSDP2", "FSDP2", "markov, fresh", 3),
        ("FSDP2", "one process", "markov, stage 2", 6),
        ("FSDP2", "FSDP2", "lora", 3),
        ("FSDP2", "one process", "lora, tied", 6),
        ("FSDP2", "FSDP2", "hydra, packing", 3),
        ("FSDP1", "FSDP2", "hydra, stage 2", 3),
    ],
)
def test_resumed_equals_never_stopped(before, after, case, step, lab):
    want, out = lab.never_stopped(before, case).out, lab.stopped(before, case, step)
    run = lab.run(after, CASES[case] | {"--resume_from_checkpoint": True}, out=out)
    assert f"resuming from {out}/checkpoint-{step}\n" in run.logs[0]
    assert_close(out, want, rel=1e-5, atol=1e-6 if before == after else 1e-5)
    a, b = (saved_state(run / f"checkpoint-{STEPS}") for run in (out, want))
    assert any("exp_avg_sq" in name for name in b)
    if before == after:
        assert_identical(weights(out) | a, weights(want) | b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


PARTS = "torch.distributed.checkpoint.filesystem.FileSystemWriter"
MOMENTS = {  # what is about to run when the process is killed: its n-th call, and the newest complete checkpoint
    "training.trainer.MedusaTrainer.training_step": (5, 3),
    "training.checkpoints.save_state": (2, 3),
    f"{PARTS}.write_data": (2, 3),  # this rank's part is missing
    f"{PARTS}.finish": (2, 3),  # all parts are there, but not the list of them
    "training.checkpoints.publish": (2, 3),  # all is there, under the name of an incomplete one
    "training.checkpoints.rotate_checkpoints": (2, 6),  # two checkpoints, though one was to be kept
    "training.checkpoints.publish_files": (1, 8),  # trained to the end, but without the finished files
}


@pytest.mark.parametrize(
    ("kind", "rank", "call"),
    [(kind, 0, call) for kind in ("one process", "FSDP2") for call in MOMENTS]
    + [("FSDP2", 1, call) for call in list(MOMENTS)[:3]],
)
def test_killed_at_any_moment(kind, rank, call, lab):
    nth, step = MOMENTS[call]
    case = "stage 2" if kind == "FSDP2" and rank == 0 else "stage 1"
    flags = CASES[case] | {"--save_total_limit": 1}
    killed = lab.launch(kind, flags, at={"call": call, "nth": nth, "signal": signal.SIGKILL}, on=rank)
    assert killed.codes[rank] == -signal.SIGKILL
    assert not weights(killed.out)  # so it was killed before the end
    incomplete = list(killed.out.glob("incomplete-*"))
    assert incomplete or rank == 1 or call.split(".")[-1] in ("training_step", "rotate_checkpoints")
    resumed = lab.run(kind, flags | {"--resume_from_checkpoint": True}, out=killed.out)
    assert f"resuming from {killed.out}/checkpoint-{step}\n" in resumed.logs[0]
    assert all(f"{path} was being written when a run ended, and is ignored" in resumed.logs[0] for path in incomplete)
    assert_identical(weights(killed.out), weights(lab.never_stopped(kind, case).out))
    assert [path.name for path in killed.out.iterdir() if "-" in path.name] == [f"checkpoint-{STEPS}"]


# ---- faults: one line and exit status 1 on each rank, and what was saved stays ----


def assert_one_line(run: Run, text: str):
    assert run.codes == [1] * len(run.codes)
    for log in run.logs:
        assert "Traceback" not in log
        lines = [line for line in log.splitlines() if "error: " in line]  # behind a progress bar, if there is one
        assert len(lines) == 1 and text in lines[0], log[-2000:]


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaLayer,MedusaHead"}, "LlamaLayer"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}, "add MedusaHead"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "1000"}, "TRANSFORMER_BASED_WRAP"),
    ],
)
def test_units_that_would_not_be_heads_and_layers(environment, text, lab):
    assert_one_line(lab.launch("FSDP2", STAGE_1, environment=environment), text)


def test_heads_of_another_type_are_units_of_another_name(lab):
    run = lab.launch("FSDP2", HYDRA, environment={"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,MedusaHead"})
    assert_one_line(run, "MedusaHead, but the model has no such class: write LlamaDecoderLayer,HydraHead, or leave it")


@pytest.mark.parametrize("optim", ["adafactor", pytest.param("adamw_8bit", marks=needs("bitsandbytes"))])
def test_an_optimiser_that_cannot_have_shards(lab, optim):
    assert_one_line(lab.launch("FSDP2", STAGE_1 | {"--optim": optim}), f"--optim {optim} cannot work on FSDP")


def test_muon_needs_fsdp2(lab):
    assert_one_line(lab.launch("FSDP1", STAGE_1 | {"--optim": "muon"}), "--optim muon needs FSDP2")


def test_ranks_with_different_data(lab):
    run = lab.launch("FSDP2", STAGE_1, rank_1={"--data_path": "other.jsonl"})
    assert_one_line(run, "rank 1 has another training set than rank 0")
    run = lab.launch("FSDP2", STAGE_1, rank_1={"--eval_holdout": 6})
    assert_one_line(run, "rank 1 has another training set than rank 0")
    other = {"--eval_holdout": 0, "--eval_data_path": lab.root / "other.jsonl"}
    mine = {"--eval_data_path": lab.root / "no_rows.jsonl"}
    run = lab.launch("FSDP2", STAGE_1 | other, rank_1=mine)
    assert_one_line(run, "rank 1 has another evaluation set than rank 0")


@pytest.mark.parametrize("kind", ["FSDP2", "DDP"])
def test_states_of_another_model(kind, lab):
    """Under FSDP2 the second process reads no weights, and refuses all the same."""
    run = lab.launch(kind, STAGE_1 | STATES | {"--states_path": "tied-states"})
    assert_one_line(run, "has other embeddings, last norm or lm_head: it is not the same model")
    assert not run.out.exists() or not list(run.out.iterdir())


def test_nodes_that_do_not_share_the_output_directory(lab):
    run = lab.launch("FSDP2", STAGE_1, rank_1={"--output_dir": lab.root / "elsewhere"})
    assert_one_line(run, "rank 1 does not see the directory")
    assert not list(run.out.iterdir())


def test_offloading_where_it_would_do_nothing(lab):
    flags = STAGE_2 | {"--gradient_checkpointing": True, "--offload_activations": True}
    for kind in ("FSDP1", "DDP"):
        assert_one_line(
            lab.launch(kind, flags), f"--offload_activations needs FSDP2 or one process, and this is {kind}"
        )


def test_resuming_from_a_checkpoint_that_is_not_the_last(lab):
    """Later ones would be taken for the newest by the next resume, though they are of a branch that was left."""
    out = lab.stopped("one process", "stage 1", 6)
    resume = STAGE_1 | {"--resume_from_checkpoint": out / "checkpoint-3"}
    assert_one_line(lab.launch("one process", resume, out=out), "checkpoint-6, later than checkpoint-3")
    shutil.move(out / "checkpoint-6", lab.root / "moved-away")
    lab.run("one process", resume, out=out)
    assert_identical(weights(out), weights(lab.never_stopped("one process", "stage 1").out))


def test_resuming_with_other_data(lab):
    out = lab.stopped("one process", "stage 1", 6)
    other = STAGE_1 | {"--resume_from_checkpoint": True, "--model_max_length": 32}
    assert_one_line(lab.launch("one process", other, out=out), "checkpoint-6 was trained on other data")


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("FSDP2", "state/__1_0.distcp"),
        ("one process", "state/__0_0.distcp"),
        ("one process", "scheduler.pt"),
        ("one process", "rng_state.pth"),
        ("one process", "medusa_lm_head.safetensors"),
    ],
)
def test_a_damaged_checkpoint(kind, file, lab):
    out = lab.stopped(kind, "stage 1", 6)
    path = out / "checkpoint-6" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    resume = STAGE_1 | {"--resume_from_checkpoint": True}
    assert_one_line(lab.launch(kind, resume, out=out), "checkpoint-6")


@pytest.mark.parametrize(
    ("kind", "rank", "call", "nth", "name"),
    [
        ("one process", 0, "training.checkpoints.save_state", 2, "checkpoint-6"),
        ("FSDP2", 0, "training.checkpoints.save_state", 2, "checkpoint-6"),
        ("FSDP2", 1, "training.checkpoints.save_state", 2, "checkpoint-6"),
        ("FSDP2", 0, "training.trainer.MedusaTrainer._write_weights", 2, "checkpoint-6"),
        ("FSDP2", 0, "training.trainer.MedusaTrainer.save_model", 1, "model"),
    ],
)
def test_a_full_disk(kind, rank, call, nth, name, lab):
    """In effect: from that call on, the system refuses to let a file grow beyond what heads and states need."""
    full = lab.launch(kind, STAGE_1, at={"call": call, "nth": nth, "file_size": 50_000}, on=rank)
    assert_one_line(full, f"could not write incomplete-{name}")
    step = STEPS if name == "model" else 3
    assert not list(full.out.glob("incomplete-*"))
    assert (full.out / f"checkpoint-{step}").exists() and not (full.out / f"checkpoint-{step + 3}").exists()
    resumed = lab.run(kind, STAGE_1 | {"--resume_from_checkpoint": True}, out=full.out)
    assert f"resuming from {full.out}/checkpoint-{step}\n" in resumed.logs[0]
    assert not (full.out / f"checkpoint-{STEPS + 1}").exists()
    assert_identical(weights(full.out), weights(lab.never_stopped(kind, "stage 1").out))


def test_ctrl_c(lab):
    at = {"call": "training.trainer.MedusaTrainer.training_step", "nth": 5, "signal": signal.SIGINT}
    run = lab.launch("one process", STAGE_1, at=at)
    assert run.codes == [130]
    assert "Traceback" not in run.logs[0] and "interrupted: go on" in run.logs[0]
    assert [path.name for path in run.out.glob("*checkpoint-*")] == ["checkpoint-3"]


def test_sigterm_of_one_rank_stops_all_after_the_same_step(lab):
    at = {"call": "training.trainer.MedusaTrainer.training_step", "nth": 2, "signal": signal.SIGTERM}
    run = lab.launch("FSDP2", STAGE_2, at=at, on=1)
    assert run.codes == [143, 143], run.logs[0][-2000:]
    assert all("Traceback" not in log and "stopped by SIGTERM: go on" in log for log in run.logs)
    assert "checkpoint after step 4" in run.logs[0]  # noticed after step 2
    lab.run("FSDP2", STAGE_2 | {"--resume_from_checkpoint": True}, out=run.out)
    assert_identical(weights(run.out), weights(lab.never_stopped("FSDP2", "stage 2").out))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_that_cannot_be_resumed(stage, train):
    common = ("--medusa_only_heads", stage == 1, "--max_steps", 2, "--save_steps", 1)
    train(*common, "--save_only_model", True, output="weights")
    with pytest.raises(BadInput, match="--save_only_model"):
        train(*common, "--resume_from_checkpoint", True, output="weights")
    train(*common, output="all")
    with pytest.raises(BadInput, match="4 conversations in an optimiser step, not 8"):
        train(*common, "--resume_from_checkpoint", True, "--gradient_accumulation_steps", 2, output="all")


# ---- heads to start from ----


def test_stage_2_starts_from_the_heads_of_stage_1(lab):
    first = lab.never_stopped("FSDP2", "stage 1").out
    evaluated = {"--eval_on_start": True, "--max_steps": 1}
    second = lab.run("FSDP2", STAGE_2 | evaluated | {"--medusa_heads_path": first}).out
    untrained = lab.run("FSDP2", STAGE_2 | evaluated | {"--medusa_heads_path": None}).out
    for k in (1, 2):
        loss = logged(first, f"eval_head_{k}_loss")[-1]
        assert logged(second, f"eval_head_{k}_loss")[0] == pytest.approx(loss, rel=1e-6)
        assert logged(untrained, f"eval_head_{k}_loss")[0] != pytest.approx(loss, rel=1e-2)
    third = lab.run("FSDP2", STAGE_2 | evaluated | {"--medusa_heads_path": second}).out  # a stage 2 directory
    for k in (1, 2):
        loss = logged(second, f"eval_head_{k}_loss")[-1]
        assert logged(third, f"eval_head_{k}_loss")[0] != pytest.approx(loss, rel=1e-6)  # another backbone
        assert logged(third, f"eval_head_{k}_loss")[0] == pytest.approx(loss, rel=0.1)


def test_heads_that_do_not_fit(lab, train):
    heads = lab.root / "heads"
    for flags, message in (
        (("--medusa_num_heads", 3), "medusa_num_heads 2, not 3"),
        (("--medusa_num_layers", 2), "medusa_num_layers 1, not 2"),
        (("--medusa_heads_path", lab.root / "model"), "no Medusa heads in .*model"),
        (("--medusa_return", False), "--medusa_heads_path goes with heads"),
    ):
        with pytest.raises(BadInput, match=message):
            train("--medusa_heads_path", heads, *flags)


def test_more_processes_than_gpus(train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="2 processes were started here, but there are 1 GPUs"):
        train()
