"""train.py from end to end on a CPU: what it leaves behind, what each flag changes, and bad input in one sentence."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, TRITON, logged, make_backbone, make_tokenizer
from safetensors.torch import load_file

import train as script
from common.errors import BadInput
from medusa_model import MedusaModel
from training import build

TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
RUN = {"train_command.txt", "trainer_state.json"}
HEADS = {"config.json", "medusa_lm_head.safetensors"}
BACKBONE = {"config.json", "generation_config.json", "model.safetensors"}
STATE = {"state/.metadata", "state/__0_0.distcp"}
RESUME = STATE | {"rng_state.pth", "run.json", "scheduler.pt", "trainer_state.json"}


def files(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.processes
@TRITON
@pytest.mark.parametrize("stage", [1, 2])
def test_the_command_line_leaves_exactly_these_files(stage, model_dir, data_file, tmp_path):
    """A process of its own, as a user starts it; the golden losses of this run are in tests/golden."""
    out = tmp_path / "out"
    root = ROOT
    command = [
        sys.executable, root / "train.py", "--model_name_or_path", model_dir, "--data_path", data_file,
        "--output_dir", out, "--medusa_only_heads", str(stage == 1), "--medusa_num_heads", "2",
        "--eval_holdout", "8", "--model_max_length", "64", "--max_steps", "4", "--per_device_train_batch_size", "4",
        "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2",
        "--learning_rate", "1e-2", "--cache_dir", tmp_path / "cache",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "head loss: liger" in done.stderr and "one head after the other" in done.stderr
    weights = HEADS if stage == 1 else BACKBONE | {f"medusa_heads/{name}" for name in HEADS | TOKENIZER}
    kept = HEADS | TOKENIZER if stage == 1 else set()  # stage 2's weights are in state/ until the end
    checkpoints = {f"checkpoint-{n}/{name}" for n in (2, 4) for name in kept | RESUME}
    assert files(out) == weights | TOKENIZER | RUN | checkpoints
    assert "--medusa_num_heads 2" in (out / "train_command.txt").read_text()
    MedusaModel.from_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(out)
    if stage == 2:
        transformers.AutoModelForCausalLM.from_pretrained(out)

    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    keys = ("loss", "grad_norm", "head_0_loss", "head_1_loss", "head_2_loss", "eval_loss", "eval_head_2_loss")
    figures = [{key: round(entry[key], 4) for key in keys if key in entry} for entry in history]
    golden = root / "tests" / "golden" / f"stage_{stage}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in figures) + "\n]\n")
    for got, want in zip(figures, json.loads(golden.read_text()), strict=True):
        assert got == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (("--medusa_num_layers", 2), "head_1_loss"),
        (("--medusa_decay_coefficient", 0.5), "loss"),
        (("--medusa_heads_coefficient", 0.5), "loss"),
        (("--medusa_scheduler", "linear"), "loss"),
        (("--medusa_scheduler", "sine"), "loss"),
        (("--medusa_lr_multiplier", 3), "head_1_loss"),
        (("--model_max_length", 32), "head_1_loss"),
        (("--lazy_preprocess", True), "head_1_loss"),  # other batches: nothing to group by
        (("--dtype", "bfloat16"), "head_1_loss"),
    ],
)
def test_each_flag_changes_what_it_says(flags, changes, train):
    common = ("--max_steps", 3, "--medusa_only_heads", True)
    plain, changed = train(*common, output="plain"), train(*common, *flags, output="changed")
    assert logged(changed, changes)[1:] != pytest.approx(logged(plain, changes)[1:], rel=1e-4)


def test_the_dtype_flag_is_what_weights_are_kept_in(train):
    for dtype in ("float32", "bfloat16"):
        out = train("--max_steps", 1, "--medusa_only_heads", True, "--dtype", dtype, output=dtype)
        tensors = load_file(out / "medusa_lm_head.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


def test_chat_template_flag(train, tmp_path):
    tokenizer = make_tokenizer("llama3", template=None)
    backbone = tmp_path / "no-template"
    make_backbone().save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    common = ("--model_name_or_path", backbone, "--max_steps", 1)
    with pytest.raises(BadInput, match="--chat_template"):
        train(*common)
    template = ROOT / "templates" / "llama3.jinja"
    out = train(*common, "--chat_template", template)
    saved = transformers.AutoTokenizer.from_pretrained(out).chat_template
    assert saved.strip() == template.read_text().strip()


def test_trust_remote_code_is_only_passed_when_asked_for(train, monkeypatch):
    seen = []
    load = build.load_backbone
    monkeypatch.setattr(
        build, "load_backbone", lambda *a, **kw: seen.append(kw["trust_remote_code"]) or load(*a, **kw)
    )
    train("--max_steps", 1, output="a")
    train("--max_steps", 1, "--trust_remote_code", True, output="b")
    assert seen == [False, True]


def test_standard_trainer_features(train):
    """Clipping, evaluation, best model, save limit, token count and TensorBoard go through the HF Trainer."""
    out = train(
        "--max_steps", 6, "--save_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2, "--eval_holdout", 0.2,
        "--save_total_limit", 2,
        "--include_num_input_tokens_seen", True, "--report_to", "tensorboard", "--max_grad_norm", 1e-3,
        "--lr_scheduler_type", "cosine", "--warmup_steps", 0.5, "--medusa_only_heads", True,
    )  # fmt: skip
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert len(logged(out, "eval_head_2_top1")) == 4  # three while training, one at the end
    assert logged(out, "num_input_tokens_seen")[-1] > 0
    assert list(out.rglob("events.out.tfevents.*"))
    rates = logged(out, "learning_rate")
    assert max(rates) > rates[0] and max(rates) > rates[-1]
    for key in (
        "step_time_s",
        "tokens_per_s",
        "padded_tokens_per_s",
        "rows_per_s",
        "useful_tflops",
        "peak_allocated_gib" if torch.cuda.is_available() else "peak_process_gib",
    ):
        assert all(value > 0 for value in logged(out, key)) and len(logged(out, key)) == 6


# ---- bad input: one sentence, exit status 1, nothing half-written ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data_path", "nothing.jsonl"), r"no file or directory .nothing\.jsonl"),
        (("--model_name_or_path", "./nothing"), r"\./nothing"),
        (("--medusa_num_heads", 0), "--medusa_num_heads 0"),
        (("--model_max_length", 3), "--model_max_length 3"),
        (("--model_max_length", 1000), "256 positions"),
        (("--resume_from_checkpoint", True), "no complete checkpoint"),
        (("--resume_from_checkpoint", "elsewhere"), "elsewhere: there is no such directory"),
        (("--chat_template", "nothing.jinja"), r"nothing\.jinja"),
        (("--model_max_length", 4, "--lazy_preprocess", True), "none of the first 20 conversations"),
    ],
)
def test_bad_flags_leave_nothing_behind(flags, message, train, tmp_path):
    with pytest.raises(BadInput, match=message):
        train(*flags)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_model(train, tmp_path):
    make_backbone(vocab_size=300).save_pretrained(tmp_path / "small")
    make_tokenizer("llama3").save_pretrained(tmp_path / "small")
    with pytest.raises(BadInput, match=r"tokenizer has 3.. tokens.*300"):
        train("--model_name_or_path", tmp_path / "small")


def test_an_output_directory_of_another_run_is_not_written_over(train, tmp_path):
    other = tmp_path / "other"
    make_backbone().save_pretrained(other)
    make_tokenizer("llama3").save_pretrained(other)
    out = train("--max_steps", 1, "--medusa_only_heads", True)
    before = files(out)
    with pytest.raises(BadInput, match="already holds checkpoint-1"):
        train("--max_steps", 1, "--medusa_only_heads", True)
    for flags, message in (
        (("--medusa_num_heads", 3), "--medusa_num_heads 2, not 3"),
        (("--medusa_num_layers", 2), "--medusa_num_layers 1, not 2"),
        (("--medusa_only_heads", False), "--medusa_only_heads True, not False"),
        (("--model_name_or_path", other), "trained with --model_name_or_path .*backbone, not .*other"),
        (("--output_dir", out.parent / "new", "--resume_from_checkpoint", out / "checkpoint-1"), "another run's"),
    ):
        with pytest.raises(BadInput, match=message):
            train("--max_steps", 2, "--medusa_only_heads", True, "--resume_from_checkpoint", True, *flags)
    assert files(out) == before


@pytest.mark.processes
def test_an_error_is_one_line_and_exit_status_1(model_dir, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n{"messages": [\n')
    command = [sys.executable, script.__file__, "--model_name_or_path", model_dir, "--data_path", "bad.jsonl"]
    done = subprocess.run(
        [*command, "--output_dir", "out", "--cache_dir", "cache", "--model_max_length", "64"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "error: " in done.stderr and "bad.jsonl, line 2" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
