"""Tiny models, tokenizers and conversations, made here: no test needs a network or a download."""

import json
import os
import random
import socket
import sys
from pathlib import Path

# Of products this small a second thread is of no use, and on a busy machine the first waits for it and spins. Also in
# all processes that tests start; torch reads it when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: runs Liger's real kernel on the CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import datasets
import liger_kernel.transformers.functional  # noqa: F401  (while the variable is set)
import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

ROOT = Path(__file__).parent.parent
SPECIAL = {  # beginning of text, end of turn, and what else a template writes
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "chatml": ("<|im_start|>", "<|im_end|>", []),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"]),
    "gemma": ("<bos>", "<end_of_turn>", ["<start_of_turn>"]),
}
WORDS = [
    "the",
    "a",
    "bread",
    "moon",
    "rises",
    "warm",
    "cold",
    "why",
    "how",
    "because",
    "salt",
    "water",
    "stone",
    "green",
    "river",
    "old",
    "new",
    "sings",
]


def make_tokenizer(style: str, template: str | None = "file") -> PreTrainedTokenizerFast:
    """A small byte-level BPE with the special tokens of `style`; its pad token is its EOS, as in many models."""
    bos, eos, more = SPECIAL[style]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[bos, eos, *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)
    if template == "file":
        template = (ROOT / "templates" / f"{style}.jinja").read_text()
    fast.chat_template = template
    return fast


def make_backbone(tied=False, vocab_size=320, **kwargs) -> LlamaForCausalLM:
    """Two LLaMA layers of 32, random; different every seed."""
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # far from zero, so that a wrong gradient shows
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, **config | kwargs))


def randomise(heads: torch.nn.Module, std=0.2):
    """Untrained ResBlocks are zero and would hide that they are not run."""
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=std)


def make_conversations(count: int, seed=0, longest=12) -> list[dict]:
    """Chat records of uneven lengths, one to three exchanges each."""
    rng = random.Random(seed)
    say = lambda: " ".join(rng.choices(WORDS, k=rng.randint(2, longest)))  # noqa: E731
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": roles[i % 2], "content": say()} for i in range(2 * rng.randint(1, 3))]}
        for _ in range(count)
    ]


def rendezvous() -> dict[str, str]:
    """Where the processes of a group meet, as environment variables: a port of this machine that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def write_jsonl(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# Of a case that runs a Triton kernel on whatever is there: a GPU, or Triton's interpreter.
TRITON = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.interpreter


def can_run_here(item) -> bool:
    """`gpu` beside `interpreter` is a kernel on the GPU: the one mark is its device's, the other its own."""
    gpu, interpreter = (item.get_closest_marker(name) is not None for name in ("gpu", "interpreter"))
    return gpu or not interpreter if torch.cuda.is_available() else not gpu


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for its mark
def pytest_collection_modifyitems(config, items):
    """Deselects what needs a GPU where there is none, and what needs Triton's interpreter where there is a GPU. What
    looks at the lab's runs stays in one of pytest-xdist's workers, or each would make them."""
    here = [item for item in items if can_run_here(item)]
    config.hook.pytest_deselected(items=[item for item in items if not can_run_here(item)])
    items[:] = here
    for item in items:
        if "lab" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("lab"))


@pytest.fixture(autouse=True)
def _reproducible(tmp_path, monkeypatch):
    """Same seed for each test, and a cache of its own for datasets."""
    set_seed(0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of no use here, and half of the time of a short run
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request):
    """Where a Triton kernel runs."""
    return request.param


# Relative, of kernels for decoding. bf16 has 8 bits: at most 2^-9 from rounding what comes out, as much from a softmax
# before it, and twice that in Triton's interpreter, which cuts where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def assert_near(got, want):
    """In norm, over all of it and over the worst row. want: float64."""
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=want.norm() / want.numel() ** 0.5)
    assert error.max() < TOLERANCE[got.dtype]


@pytest.fixture
def model_dir(tmp_path):
    """A tiny LLaMA and its tokenizer on disk."""
    directory = tmp_path / "backbone"
    make_backbone().save_pretrained(directory)
    make_tokenizer("llama3").save_pretrained(directory)
    return str(directory)


@pytest.fixture
def train(monkeypatch, model_dir, data_file, tmp_path):
    """Runs train.py in this process: `train("--max_steps", 3, ...)` -> the output directory."""
    import train as script

    def run(*flags, output="out", liger=False) -> Path:
        if not liger:  # plain torch in chunks: Triton's interpreter takes a hundred times as long
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        argv = {
            "--model_name_or_path": model_dir,
            "--data_path": data_file,
            "--output_dir": tmp_path / output,
            "--cache_dir": tmp_path / "cache",
            "--medusa_num_heads": 2,
            "--model_max_length": 64,
            "--per_device_train_batch_size": 4,
            "--logging_steps": 1,
            "--learning_rate": 1e-2,
        } | dict(zip(flags[::2], flags[1::2], strict=True))
        words = [str(word) for pair in argv.items() if pair[1] is not None for word in pair]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        script.main()
        return Path(argv["--output_dir"])

    return run


@pytest.fixture
def train_both_ways(train, monkeypatch):
    """Trains one head after the other, and again with all heads forward and then one backward: -> both outputs."""
    from training.trainer import MedusaTrainer

    def run(*flags) -> tuple[Path, Path]:
        one_by_one, start = train(*flags, output="one_by_one"), MedusaTrainer.train

        def plain(self, **kwargs):
            self.one_by_one = False
            return start(self, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(MedusaTrainer, "train", plain)
            return one_by_one, train(*flags, output="plain")

    return run


@pytest.fixture
def store(monkeypatch, model_dir, data_file, tmp_path):
    """Runs store_states.py in this process, with the conversations that `train` has: -> the directory of states."""
    import store_states as script

    def run(*flags, output="states") -> Path:
        argv = {
            "--model_name_or_path": model_dir,
            "--data_path": data_file,
            "--output": tmp_path / output,
            "--cache_dir": tmp_path / "cache",
            "--medusa_num_heads": 2,
            "--model_max_length": 64,
        } | dict(zip(flags[::2], flags[1::2], strict=True))
        words = [str(word) for pair in argv.items() if pair[1] is not None for word in pair]
        monkeypatch.setattr(sys, "argv", ["store_states.py", *words])
        script.main()
        return Path(argv["--output"])

    return run


def logged(directory, key="loss") -> list[float]:
    """One figure of every training log of a run."""
    history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def weights(directory) -> dict[str, torch.Tensor]:
    """All weights a run left in its output directory."""
    return {
        f"{path.relative_to(directory)}:{name}": tensor
        for path in sorted(directory.glob("*.safetensors")) + sorted(directory.glob("medusa_heads/*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same(a, b, **tolerance):
    """Tensors by name; bit for bit where no tolerance is given."""
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(a[name], b[name]), name


def saved_state(checkpoint) -> dict[str, torch.Tensor]:
    """What is in a checkpoint's state/: weights (`model.*`) and Adam's moments (`optimizer.*`), whole."""
    whole = checkpoint.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint / "state", whole)
    state = torch.load(whole, weights_only=True)
    whole.unlink()
    found = ((f"{part}.{name}", value) for part, values in state.items() for name, value in values.items())
    return {name: value for name, value in found if isinstance(value, torch.Tensor)}


@pytest.fixture
def data_file(tmp_path):
    """48 conversations of uneven length."""
    return write_jsonl(tmp_path / "chats.jsonl", make_conversations(48))


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Runs on several processes; what one test has run, another can look at."""
    from lab import open_lab

    return open_lab(tmp_path_factory.mktemp("lab"))
