"""train.py from end to end on a CPU: what it leaves behind, what moves, and what must not make a difference."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, logged, make_backbone, make_conversations, make_tokenizer, saved_state, weights, write_jsonl
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

import train as script
from common.errors import BadInput
from medusa_model import MedusaModel
from training import build
from training.arguments import TrainingArguments
from training.trainer import MedusaTrainer

TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
RUN = {"train_command.txt", "trainer_state.json"}
HEADS = {"config.json", "medusa_lm_head.safetensors"}
BACKBONE = {"config.json", "generation_config.json", "model.safetensors"}
STATE = {"state/.metadata", "state/__0_0.distcp"}
RESUME = STATE | {"rng_state.pth", "run.json", "scheduler.pt", "trainer_state.json"}


def files(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(a[name], b[name]), name


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
    weights = HEADS if stage == 1 else BACKBONE | {f"medusa_heads/{name}" for name in HEADS}
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
    ("flags", "moves", "stays"),
    [
        (("--medusa_only_heads", True), "medusa_heads", "backbone"),
        (("--medusa_only_heads", False), "both", None),
        (("--medusa_only_heads", False, "--medusa_lr_multiplier", 0.0), "backbone", "medusa_heads"),
        (("--medusa_only_heads", False, "--medusa_heads_coefficient", 0.0), "backbone", "medusa_heads"),
        (("--medusa_return", False), "backbone", None),
    ],
)
def test_what_should_train_moves_and_the_rest_stays_bit_identical(flags, moves, stays, train, monkeypatch):
    kept = {}
    start = MedusaTrainer.train

    def remember(self, **kwargs):
        kept["before"] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        result = start(self, **kwargs)
        kept["after"] = dict(self.model.named_parameters())
        return result

    monkeypatch.setattr(MedusaTrainer, "train", remember)
    train("--max_steps", 2, *flags)
    for name, before in kept["before"].items():
        same = torch.equal(before, kept["after"][name])
        assert same == (stays is not None and name.startswith(stays)), name
    assert any(name.startswith("medusa_heads") for name in kept["before"]) == (flags[0] != "--medusa_return")
    assert moves == "both" or not all(
        torch.equal(before, kept["after"][name]) for name, before in kept["before"].items() if name.startswith(moves)
    )


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("flags", [("--use_liger", False), ("--bf16", True), ("--bf16", True, "--use_liger", False)])
def test_liger_equals_torch_through_the_whole_trainer(stage, flags, train):
    common = ("--max_steps", 4, "--medusa_only_heads", stage == 1, "--max_grad_norm", 0.5, "--medusa_num_layers", 2)
    want = logged(train(*common, output="want"))
    got = logged(train(*common, *flags, output="got", liger=True))
    assert got == pytest.approx(want, rel=2e-2 if "--bf16" in flags else 1e-5)
    assert ("--bf16" in flags) == (got != pytest.approx(want, rel=1e-5))  # bf16 did compute in bf16


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_makes_no_difference(stage, train):
    """Conversations are uneven: the mean of the micro-batches' means would be another number."""
    # Adam divides by the gradient's size: where that is a rounding error, a small epsilon makes a step of it.
    common = ("--max_steps", 4, "--medusa_only_heads", stage == 1, "--adam_epsilon", 1e-4)
    one = train(*common, "--per_device_train_batch_size", 8, output="one")
    four = train(*common, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, output="four")
    assert logged(four) == pytest.approx(logged(one), rel=1e-4)
    assert logged(four, "head_2_top1") == logged(one, "head_2_top1")
    assert logged(four, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-4)
    assert_same(weights(four), weights(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_one_head_after_the_other_equals_all_at_once(stage, train, monkeypatch):
    common = ("--max_steps", 4, "--medusa_only_heads", stage == 1, "--gradient_accumulation_steps", 2)
    one_by_one = train(*common, output="one_by_one")
    start = MedusaTrainer.train

    def plain(self, **kwargs):
        self.one_by_one = False
        return start(self, **kwargs)

    monkeypatch.setattr(MedusaTrainer, "train", plain)
    plain = train(*common, output="plain")
    assert logged(plain) == pytest.approx(logged(one_by_one), rel=1e-5)
    assert logged(plain, "head_1_top1") == pytest.approx(logged(one_by_one, "head_1_top1"))
    assert_same(weights(plain), weights(one_by_one), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_packed_equals_unpacked(stage, train, model_dir, tmp_path):
    """One step over the same 24 conversations, once as 24 rows and once packed into fewer."""
    data = write_jsonl(tmp_path / "few.jsonl", make_conversations(24, seed=3))
    common = ("--data_path", data, "--max_steps", 1, "--medusa_only_heads", stage == 1, "--model_max_length", 200)
    packed = train(*common, "--packing", True, "--per_device_train_batch_size", 24, output="packed")
    unpacked = train(*common, "--per_device_train_batch_size", 24, output="unpacked")
    for key in ("loss", "head_1_loss", "head_2_loss", "grad_norm"):
        assert logged(packed, key) == pytest.approx(logged(unpacked, key), rel=1e-4)
    assert logged(packed, "head_2_top1") == logged(unpacked, "head_2_top1")
    assert logged(packed, "padded_tokens_per_s") != logged(unpacked, "padded_tokens_per_s")


@pytest.mark.parametrize(
    "flags",
    [
        ("--medusa_only_heads", True),
        ("--medusa_only_heads", False, "--gradient_accumulation_steps", 2),
        ("--medusa_only_heads", True, "--packing", True),
        ("--medusa_only_heads", True, "--lazy_preprocess", True),
        ("--medusa_return", False),
    ],
)
def test_resumed_equals_never_stopped_bit_for_bit(flags, train, tmp_path, monkeypatch):
    """Stopped in the second epoch, in the middle: weights, Adam, schedules, data order and logs go on the same."""
    common = (*flags, "--num_train_epochs", 3, "--save_steps", 1, "--medusa_scheduler", "linear", "--eval_holdout", 6)
    common += ("--eval_strategy", "steps", "--eval_steps", 2)
    whole = train(*common, output="whole")
    steps = len(logged(whole))
    stop_at = steps // 2 + 1
    assert steps % 3 == 0 and stop_at % (steps // 3) != 0  # not at the end of an epoch

    class Killed(Exception):
        pass

    start = MedusaTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == stop_at:
            raise Killed
        return start(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MedusaTrainer, "training_step", killed)
        with pytest.raises(Killed):
            train(*common, output="stopped")
    (tmp_path / "stopped" / f"checkpoint-{stop_at + 1}").mkdir()  # what a kill while writing can leave
    resumed = train(*common, "--resume_from_checkpoint", True, output="stopped")
    assert_same(weights(resumed), weights(whole))
    for key in ("loss", "learning_rate", "grad_norm", "head_1_loss", "eval_loss"):
        assert logged(resumed, key) == logged(whole, key)
    a, b = (saved_state(run / f"checkpoint-{steps}") for run in (resumed, whole))
    assert any("exp_avg_sq" in name for name in b)
    assert_same(a, b)


def test_gradient_checkpointing_changes_no_number(train):
    common = ("--max_steps", 2, "--medusa_only_heads", False)
    recomputed = train(*common, "--gradient_checkpointing", True, output="recomputed")
    assert_same(weights(recomputed), weights(train(*common, output="kept")), rtol=1e-4, atol=1e-5)


def test_only_the_first_layers_are_recomputed(train, monkeypatch):
    forward, calls = LlamaMLP.forward, []

    def counted(self, x):
        calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    common = ("--max_steps", 2, "--medusa_only_heads", False, "--gradient_checkpointing", True)
    half = train(*common, "--gradient_checkpointing_layers", 1, output="half")
    first, second = calls[:2]
    assert calls == [first, second, first] * 2 and first is not second  # the first one again in the backward pass
    assert_same(weights(half), weights(train(*common, output="all")), rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="the backbone has 2 layers"):
        train(*common, "--gradient_checkpointing_layers", 3, output="too-many")


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


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(train, tmp_path, monkeypatch):
    """Also with accumulation, where the NaN is in the first of two micro-batches."""
    loss, calls = MedusaModel.head_loss, []

    def spoiled(self, k, *args):
        out = loss(self, k, *args)
        if k == 2 and trainer_step() == 3 and not calls:
            calls.append(k)
            out = out._replace(loss_sum=out.loss_sum * torch.nan)
        return out

    trainers = []
    init = MedusaTrainer.__init__
    monkeypatch.setattr(
        MedusaTrainer, "__init__", lambda self, *a, **kw: (init(self, *a, **kw), trainers.append(self))[0]
    )
    trainer_step = lambda: trainers[-1].state.global_step  # noqa: E731
    monkeypatch.setattr(MedusaModel, "head_loss", spoiled)
    with pytest.raises(FloatingPointError, match="step 4: the loss of head 2 is nan"):
        train("--max_steps", 6, "--save_steps", 2, "--medusa_only_heads", True, "--gradient_accumulation_steps", 2)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    MedusaModel.from_pretrained(tmp_path / "out" / "checkpoint-2")


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path):
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        train("--max_steps", 1, "--medusa_only_heads", True, "--learning_rate", 1e39)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


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


@pytest.mark.parametrize("stage", [1, 2])
def test_load_best_model_at_end(stage, train):
    """Best is made to mean the highest loss, so that it is not the last checkpoint."""
    out = train(
        "--max_steps", 6, "--save_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1, "--eval_holdout", 8,
        "--load_best_model_at_end", True, "--medusa_only_heads", stage == 1, "--greater_is_better", True,
    )  # fmt: skip
    best = json.loads((out / "trainer_state.json").read_text())["best_global_step"]
    assert best < 6
    if stage == 1:
        assert_same(weights(out), weights(out / f"checkpoint-{best}"))
    else:
        saved = saved_state(out / f"checkpoint-{best}")
        for name, tensor in weights(out).items():
            file, name = name.split(":")
            prefix = "model.backbone." if file == "model.safetensors" else "model.medusa_heads."
            assert torch.equal(tensor, saved[prefix + name])


def test_one_process_uses_one_of_several_gpus(monkeypatch, tmp_path):
    """The Trainer would wrap the model in DataParallel and draw a batch for each GPU it sees."""
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    assert TrainingArguments(output_dir=str(tmp_path))._n_gpu == 1


# ---- bad input: one sentence, exit status 1, nothing half-written ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data_path", "nothing.jsonl"), r"no data file nothing\.jsonl"),
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


def test_an_error_is_one_line_and_exit_status_1(model_dir, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n{"messages": [\n')
    command = [sys.executable, script.__file__, "--model_name_or_path", model_dir, "--data_path", "bad.jsonl"]
    done = subprocess.run(
        [*command, "--output_dir", "out", "--cache_dir", "cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "error: " in done.stderr and "bad.jsonl, line 2" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
