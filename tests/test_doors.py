"""Every door has a sentence: whatever a user gives that cannot work is one line, before hours of work, and nothing is
left behind. A row is a script, flags that change a call that works, and what the sentence says."""

import json
import os
import resource
import subprocess
import sys
from datetime import date as Date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_backbone, make_conversations, make_tokenizer, write_jsonl
from transformers import set_seed

import distill
import evaluate
import generate
import store_states
import train
from common import errors, files
from common.errors import BadInput
from medusa_model import MedusaConfig, MedusaModel
from training.data import check_steps

SCRIPTS = {"train": train, "store": store_states, "evaluate": evaluate, "generate": generate, "distill": distill}
NOWHERE = "/proc/nowhere"  # nobody can write there, root included


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, its heads, one whose tokenizer is too large, conversations, prompts and answers to them."""
    set_seed(0)
    root = tmp_path_factory.mktemp("doors")
    for name, vocab_size in (("model", 320), ("other", 320), ("small", 300)):
        backbone = make_backbone(vocab_size=vocab_size)
        backbone.generation_config.eos_token_id = 1
        backbone.save_pretrained(root / name)
        make_tokenizer("llama3").save_pretrained(root / name)
    config = MedusaConfig(medusa_num_heads=1, base_model_name_or_path=str(root / "model"))
    model = MedusaModel.from_backbone(make_backbone(), config)
    model.freeze_backbone()
    model.save_pretrained(root / "heads")
    make_tokenizer("llama3").save_pretrained(root / "heads")
    write_jsonl(root / "chats.jsonl", make_conversations(12))
    write_jsonl(root / "one.jsonl", make_conversations(1))
    (root / "prompts.txt").write_text("why\nhow\n")
    (root / "others.txt").write_text("why\ncold moon\n")
    call(root, "distill", {})
    return root


def call(root: Path, script: str, flags: dict):
    """Runs a script's `main` with the flags of a call that works, but for those given. None: the flag is left out."""
    model = {"--model_name_or_path": "model"}
    cut = {"--model_max_length": 64}
    defaults = {
        "train": model | cut | {"--output_dir": "out", "--max_steps": 1, "--cache_dir": "cache"}
        | {"--data_path": "chats.jsonl", "--medusa_num_heads": 1, "--medusa_only_heads": True},
        "store": model | cut | {"--data_path": "chats.jsonl", "--output": "states", "--cache_dir": "cache"},
        "evaluate": {"": "heads", "--data_path": "chats.jsonl", "--max_new_tokens": 0},
        "generate": {"": "heads", "--prompt": "why", "--max_new_tokens": 3},
        "distill": model | {"--prompts": "prompts.txt", "--output": "answers.jsonl", "--max_prompt_length": 60}
        | {"--max_new_tokens": 3},
    }  # fmt: skip
    pairs = (defaults[script] | flags).items()
    words = [str(word) for pair in pairs if pair[1] is not None for word in pair if word != ""]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", [f"{script}.py", *words])
        patch.delenv("TRITON_INTERPRET", raising=False)
        SCRIPTS[script].main()


DOORS = [
    # ---- where a run writes ----
    ("train", {"--output_dir": NOWHERE}, "--output_dir /proc/nowhere: cannot write into /proc"),
    ("train", {"--output_dir": "chats.jsonl"}, r"--output_dir .*chats\.jsonl is a file, not a directory"),
    ("train", {"--output_dir": "chats.jsonl/below"}, r"--output_dir .*chats\.jsonl is a file, not a directory"),
    ("train", {"--cache_dir": NOWHERE}, "--cache_dir /proc/nowhere: cannot write into /proc"),
    ("train", {"--cache_dir": "prompts.txt"}, r"--cache_dir .*prompts\.txt is a file, not a directory"),
    ("store", {"--output": NOWHERE}, "--output /proc/nowhere: cannot write into /proc"),
    ("store", {"--output": "chats.jsonl"}, r"--output .*chats\.jsonl is a file"),
    ("evaluate", {"--output_json": f"{NOWHERE}/a.json"}, "--output_json /proc/nowhere: cannot write into /proc"),
    ("generate", {"--output_json": f"{NOWHERE}/a.json"}, "--output_json /proc/nowhere: cannot write into /proc"),
    ("distill", {"--output": f"{NOWHERE}/a.jsonl"}, "--output /proc/nowhere: cannot write into /proc"),
    ("distill", {"--output": "model"}, "--output model is a directory: name a .jsonl file"),
    # ---- what is reported ----
    ("train", {"--report_to": "wandb"}, "--report_to wandb: .* pip install -r requirements-wandb.txt"),
    ("train", {"--report_to": "mlflow"}, "--report_to mlflow: .* pip install mlflow"),
    ("train", {"--report_to": "paper"}, "--report_to paper: transformers knows .*tensorboard"),
    ("train", {"--metric_for_best_model": "bleu"}, "model bleu is not measured: loss, and .* of heads 0 to 1 are"),
    ("train", {"--metric_for_best_model": "eval_head_2_top1"}, "eval_head_2_top1 is not measured"),
    # ---- numbers that train nothing, or not what they say ----
    ("train", {"--per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: 1 or more"),
    ("train", {"--per_device_eval_batch_size": 0}, "--per_device_eval_batch_size 0: 1 or more"),
    ("train", {"--gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0: 1 or more"),
    ("train", {"--max_steps": -1, "--num_train_epochs": 0}, "--num_train_epochs 0 trains nothing"),
    ("train", {"--medusa_num_layers": 99999999999}, "--medusa_num_layers 99999999999: from 0 to 100"),
    ("train", {"--dataloader_num_workers": 99999}, r"--dataloader_num_workers 99999: the machine has \d+ processors"),
    ("train", {"--dataloader_persistent_workers": True}, "for workers that load data: give --dataloader_num"),
    ("train", {"--medusa_num_heads": 99999999999}, "head 99999999999 looks"),
    ("train", {"--lr_scheduler_kwargs": "no"}, "--lr_scheduler_kwargs no is no JSON object"),
    ("train", {"--learning_rate": "nan"}, "--learning_rate nan: 0 or more"),
    ("train", {"--medusa_heads_coefficient": "inf"}, "--medusa_heads_coefficient inf: 0 or more"),
    ("train", {"--adam_beta2": 1}, "--adam_beta2 1: at least 0, and below 1"),
    ("train", {"--eval_holdout": 1.5}, "--eval_holdout 1.5: a share below 1, or a number of conversations"),
    ("train", {"--eval_holdout": "inf"}, "--eval_holdout inf: a share below 1, or a number of conversations"),
    ("evaluate", {"--eval_holdout": 1.5}, "--eval_holdout 1.5: a share below 1, or a number of conversations"),
    ("train", {"--dataloader_drop_last": True, "--per_device_train_batch_size": 64}, "drop_last True leaves no step"),
    # ---- plans ----
    ("train", {"--plan_gpus": 2}, "--plan_gpus goes with --plan"),
    ("train", {"--plan": True, "--plan_gib": 0.5}, r"the run needs 1\.\d GiB of a GPU that has 0\.5\. It is"),
    # ---- adapters ----
    ("train", {"--medusa_only_heads": False, "--lora_rank": 0}, "--lora_rank 0: at least 1"),
    ("train", {"--preserve_coefficient": 1}, "--preserve_coefficient is of adapters: it goes with --lora_rank"),
    ("evaluate", {"--original": "model"}, "--original model: heads is of stage 1, whose backbone is what it was"),
    # ---- model and tokenizer ----
    ("train", {"--model_name_or_path": "small"}, r"tokenizer has \d+ tokens, but small has embeddings for 300"),
    ("store", {"--model_name_or_path": "small"}, r"tokenizer has \d+ tokens, but small has embeddings for 300"),
    ("train", {"--model_max_length": 300}, "--model_max_length 300: the backbone knows 256 positions"),
    ("evaluate", {"--model_max_length": 300}, "--model_max_length 300: the backbone knows 256 positions"),
    # ---- answers of another run ----
    ("distill", {"--prompts": "others.txt"}, "answers to other prompts: its prompt 2 is not the one"),
    ("distill", {"--system": "be warm"}, "answers to other prompts: its prompt 1 is not the one"),
    ("distill", {"--model_name_or_path": "other"}, "answers made with model .*/model, not .*/other"),
    ("distill", {"--temperature": 1}, r"answers made with seed None, not 0|temperature 0\.0, not 1\.0"),
    ("distill", {"--max_new_tokens": 4}, "answers made with max_new_tokens 3, not 4"),
    ("distill", {"--max_prompt_length": 61}, "answers made with max_prompt_length 60, not 61"),
]  # fmt: skip


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize(("script", "flags", "sentence"), DOORS)
def test_door(script, flags, sentence, place, monkeypatch):
    def read(*args, **kwargs):
        pytest.fail("weights were read before the sentence came")

    if script in ("train", "store"):  # their models take minutes to load
        monkeypatch.setattr("model.backbone.AutoModelForCausalLM.from_pretrained", read)
    before = names(place)
    with pytest.raises(BadInput, match=sentence) as raised:
        call(place, script, flags)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert names(place) == before


def test_the_same_without_the_flags_works(place, monkeypatch):
    """So the sentences are about the flags. distill.py goes on with its answers."""
    answers = (place / "answers.jsonl").read_text()
    call(place, "distill", {})
    assert (place / "answers.jsonl").read_text() == answers
    found = json.loads(answers.splitlines()[0])["distilled"]
    want = {"model": str(place / "model"), "temperature": 0, "max_new_tokens": 3, "max_prompt_length": 60}
    assert found == want | {"date": Date.today().isoformat()}
    call(place, "generate", {"--output_json": "new/figures.json"})
    call(place, "evaluate", {"--output_json": "new/accuracy.json"})  # the default length is the context's 256
    call(place, "evaluate", {"--output_json": "new/accuracy.json", "--model_max_length": 256})
    rest = {"--eval_holdout": 2, "--metric_for_best_model": "head_1_top1", "--eval_strategy": "steps"}
    call(place, "train", rest | {"--eval_steps": 1, "--save_steps": 1, "--load_best_model_at_end": True})
    assert {"new/accuracy.json", "new/figures.json", "out/medusa_lm_head.safetensors"} <= names(place)


def test_answers_of_an_earlier_version(place):
    record = json.loads((place / "answers.jsonl").read_text().splitlines()[0])
    del record["distilled"]
    write_jsonl(place / "old.jsonl", [record])
    with pytest.raises(BadInput, match="is of an earlier version, which does not say how"):
        call(place, "distill", {"--output": "old.jsonl"})


def test_a_full_disk_is_noticed_before(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # what a full disk does to a file
    try:
        with pytest.raises(BadInput, match=r"--output_dir .*cannot write into .*: choose another"):
            files.check_can_write(tmp_path / "a/b", "--output_dir")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    files.check_can_write(tmp_path / "a/b", "--output_dir")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "ranks", "sentence"),
    [
        (3, 4, "3 rows to train on for 4 processes"),
        (7, 4, "fewer than the 8 that 4 x --per_device_train_batch_size 2"),
    ],
)
def test_too_few_rows(rows, ranks, sentence):
    training = SimpleNamespace(world_size=ranks, train_batch_size=2, dataloader_drop_last=True)
    with pytest.raises(BadInput, match=sentence):
        check_steps(training, range(rows))
    check_steps(training, range(8))


@pytest.mark.processes
def test_several_ranks_say_it_once(place, tmp_path):
    """Under the launcher of scripts/: two ranks, one conversation. No traceback, of theirs or of the launcher's."""
    words = ["--model_name_or_path", place / "model", "--data_path", place / "one.jsonl", "--output_dir", "out"]
    words += ["--model_max_length", 64, "--max_steps", 1, "--cache_dir", "cache"]
    command = [sys.executable, ROOT / "scripts/launch.py", "--quiet", "--config_file", ROOT / "configs/cpu.yaml"]
    command += ["--num_processes", 2, "--main_process_port", 0, ROOT / "train.py", *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.count("error: 1 rows to train on for 2 processes") == done.stderr.count("error") == 1
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_a_later_rank_waits_for_the_first(monkeypatch):
    """The launcher ends it meanwhile. If it is alive afterwards, the first rank has not failed."""
    slept = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    monkeypatch.setattr(errors.signal, "signal", lambda *args: slept.append("may be ended"))
    for rank in (0, 2):
        for launched in (False, True):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            if launched:
                monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
            else:
                monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
            with pytest.raises(SystemExit, match="error: like this"):
                errors.end("like this")
            assert slept == (["may be ended", 4] if rank and launched else [])


def test_a_rank_that_a_signal_ended(capsys):
    sys.path.insert(0, str(ROOT / "scripts"))
    from launch import ChildFailedError, end

    for code, status, said in ((-9, 137, "rank 3 was ended by SIGKILL (out of memory"), (1, 1, "")):
        failure = SimpleNamespace(exitcode=code, timestamp=1)
        error = ChildFailedError.__new__(ChildFailedError)
        error.failures = {3: failure}
        with pytest.raises(SystemExit) as stop:
            end(error)
        assert stop.value.code == status and said in capsys.readouterr().err
    assert torch.cuda.is_available() or not torch.distributed.is_initialized()
