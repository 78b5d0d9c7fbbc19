"""`train.py --plan`: what it prints, when it fails, and that its advice is right."""

import json
import re
import shlex

import pytest
import setting
import torch
import transformers
from odd import MAKE

import train
from common.errors import BadInput
from training.advice import CUDA, NCCL, SPARE, needed, run_of
from training.arguments import parse
from training.build import choose_head_type
from training.plan import GIB, PARTS, tightest


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """LLaMA-3-8B's config.json, and nothing else."""
    directory = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(**setting.LLAMA3_8B).save_pretrained(directory)
    return str(directory)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def flags_of(model: str, **flags) -> list[str]:
    common = {"model_name_or_path": model, "data_path": "chats.jsonl", "output_dir": "/proc/nowhere", "bf16": True}
    common |= {"medusa_only_heads": True, "per_device_train_batch_size": 4}
    return [str(word) for name, value in (common | flags).items() for word in (f"--{name}", value)]


@pytest.fixture
def plan(monkeypatch, capsys):
    """Runs train.py --plan -> what it printed. The data do not exist, and nothing can be written."""

    def run(model: str, **flags) -> str:
        monkeypatch.setattr("sys.argv", ["train.py", *flags_of(model, **flags), "--plan"])
        train.main()
        return capsys.readouterr().out

    return run


def run_from(*words):
    model, data, training = parse(list(words))
    choose_head_type(model)
    return run_of(model, data, training)


def gib_of(sentence: str) -> float:
    """What the sentence says that a GPU needs."""
    return float(re.search(r"needs ([\d.]+) GiB", sentence)[1])


def test_a_table_of_moments_and_parts(plan, llama):
    said = plan(llama, plan_gib=80)
    assert said.startswith("LlamaForCausalLM, 8.03 B weights; 5 medusa heads; stage 1; 4 x 2048 tokens on one GPU\n")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert lines[0] == ["GiB, when", *PARTS, "together"]
    rows = [[float(cell) for cell in line[1:]] for line in lines[2:]]
    assert len(rows) == 3 and all(sum(row[:-1]) == pytest.approx(row[-1], abs=0.04) for row in rows)
    assert [row[-1] for row in rows] == sorted((row[-1] for row in rows), reverse=True)  # the tightest first
    run = run_from(*flags_of(llama))
    assert rows[0][-1] == round(tightest(run).total / GIB, 2)
    assert said.splitlines()[-1] == (
        f"With what CUDA takes, and 3% to spare, a GPU needs {needed(run) / GIB:.1f} GiB of 80.0: it fits."
    )
    assert needed(run) == tightest(run).total * (1 + SPARE) + CUDA


def test_without_a_gpu_and_its_size_nothing_is_judged(plan, llama):
    assert plan(llama).endswith("--plan_gib says how much there is.\n")


def test_several_gpus_share_the_model(plan, llama):
    said = plan(llama, plan_gpus=8, plan_gib=24)
    assert "4 x 2048 tokens on each of 8 GPUs" in said and "CUDA and NCCL take" in said
    run = run_from(*flags_of(llama), "--plan", "--plan_gpus", "8")
    assert needed(run) == tightest(run).total * (1 + SPARE) + CUDA + NCCL


def test_the_memory_of_the_gpu_that_is_here(plan, llama, monkeypatch):
    monkeypatch.setattr("training.advice.torch.cuda.is_available", lambda: True)
    here = type("Properties", (), {"total_memory": 44 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: here)
    with pytest.raises(BadInput, match=r"a GPU that has 44\.0"):
        plan(llama)
    assert plan(llama, plan_gib=80).endswith("of 80.0: it fits.\n")


LONG = {"model_max_length": 8192}
FITS_NOT = [
    {"plan_gib": 48},
    {"plan_gib": 40, "per_device_train_batch_size": 16, "model_max_length": 8192, "dtype": "bfloat16"},
    {"plan_gib": 79, "medusa_only_heads": False, "plan_gpus": 4, "model_max_length": 8192},
    {"plan_gib": 79, "medusa_only_heads": False, "plan_gpus": 2},
    {"plan_gib": 48, "medusa_only_heads": False, "lora_rank": 8, "model_max_length": 8192},
    {
        "plan_gib": 33,
        "medusa_only_heads": False,
        "gradient_checkpointing": True,
        "plan_gpus": 8,
        "model_max_length": 8192,
    },
    {"plan_gib": 20, "per_device_eval_batch_size": 64, "eval_holdout": 10, "plan_gpus": 8},
    {"plan_gib": 20},
    {"plan_gib": 24, "per_device_train_batch_size": 2, "medusa_only_heads": False},
]


@pytest.mark.parametrize("flags", FITS_NOT, ids=str)
def test_advice_is_right(flags, plan, llama, tmp_path):
    """Each of the alternatives, given as flags, fits, and needs what the sentence says."""
    with pytest.raises(BadInput) as raised:
        plan(llama, **flags)
    said = str(raised.value)
    before = run_from(*flags_of(llama, **flags), "--plan")
    assert gib_of(said) == round(needed(before) / GIB, 1) > flags["plan_gib"] and "\n" not in said
    assert len(said) < 500
    moment = tightest(before)
    assert f"It is tightest when {moment.name}" in said
    largest = max(moment.parts, key=lambda part: moment.parts[part])
    assert f"its largest part is the {largest} ({moment.parts[largest] / GIB:.1f} GiB)" in said
    alternatives = said.split("It fits with ")[1].split(", or ")
    for alternative in alternatives:
        change, promised = re.fullmatch(r"(.*) \(([\d.]+) GiB\)", alternative).groups()
        gpus = re.search(r"(\d+) GPUs", change)
        words = change.replace(gpus[0], f"--plan_gpus {gpus[1]}") if gpus else change
        base = flags_of(llama, **flags)
        if "--states_path" in words:
            (tmp_path / "index.json").write_text(json.dumps(STORED | {"model_max_length": before.length}))
            words = words.replace("--states_path (docs/states.md)", f"--states_path {tmp_path}")
            base = without(base, "--data_path", "--model_max_length", "--eval_holdout")
        after = run_from(*base, *shlex.split(words), "--plan")
        assert after != before
        assert round(needed(after) / GIB, 1) == float(promised) and needed(after) <= flags["plan_gib"] * GIB


STORED = {"model_name_or_path": "m", "model": "", "hidden_size": 4096, "dtype": "bfloat16", "model_max_length": 2048}
STORED |= {
    "date": "2026-11-27",
    "shards": {"train": [], "eval": []},
    "chat_template": "",
    "chat_template_kwargs": None,
}


def without(words: list[str], *names: str) -> list[str]:
    return [word for i, word in enumerate(words) if not {word, words[i - 1]} & set(names)]


def alternatives(raised) -> list[str]:
    """Without the memory they need."""
    return re.sub(r" \([\d.]+ GiB\)", "", str(raised.value).split("It fits with ")[1]).split(", or ")


def test_the_smallest_change_comes_first(plan, llama):
    flags = {"medusa_only_heads": False, "plan_gpus": 4, "model_max_length": 4096, "per_device_train_batch_size": 16}
    with pytest.raises(BadInput) as raised:
        plan(llama, plan_gib=79, **flags)
    first, second, *_ = alternatives(raised)
    assert first == "--per_device_train_batch_size 1 --gradient_accumulation_steps 16"  # 2 would not fit
    layers = re.fullmatch("--gradient_checkpointing True --gradient_checkpointing_layers ([0-9]+)", second)[1]
    checkpointed = flags | {"gradient_checkpointing": True}
    plan(llama, plan_gib=79, **checkpointed, gradient_checkpointing_layers=layers)
    with pytest.raises(BadInput) as raised:  # as few as memory allows is fastest
        plan(llama, plan_gib=79, **checkpointed, gradient_checkpointing_layers=int(layers) - 1)
    assert second.split()[2:] == alternatives(raised)[1].split()[2:]


def test_heads_that_are_there_keep_their_vocabulary(plan, llama):
    with pytest.raises(BadInput) as raised:
        plan(llama, plan_gib=48)
    assert "--medusa_vocab_size 32768" in alternatives(raised)
    with pytest.raises(BadInput) as raised:
        plan(llama, plan_gib=48, medusa_heads_path="elsewhere")
    assert alternatives(raised) == ["--states_path (docs/states.md)", "--dtype bfloat16", "2 GPUs"]


def test_changes_that_need_each_other(plan, llama):
    """None alone is enough for a small GPU; together those that save most are."""
    with pytest.raises(BadInput) as raised:
        plan(llama, plan_gib=20)
    assert alternatives(raised) == ["--states_path (docs/states.md) --medusa_vocab_size 32768", "4 GPUs"]


def test_where_no_flag_helps(plan, llama):
    with pytest.raises(BadInput, match=r"No flag helps: with .*--states_path.* it still needs [\d.]+ GiB$"):
        plan(llama, plan_gib=2)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("mixtral", "MixtralForCausalLM is a mixture of experts, and what its experts hold at once is not known"),
        ("gpt2", "the layers of GPT2LMHeadModel are not made of linear layers"),
        ("bloom", "takes no position_ids"),
    ],
)
def test_models_that_are_not_known(kind, sentence, plan, tmp_path):
    MAKE[kind]().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=sentence):
        plan(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "nobody_knows"}, "cannot load the backbone .*nobody_knows"),
        ({"hidden_size": "wide"}, "its config.json gives"),
        ({"quantization_config": {"quant_method": "fp8"}}, "are quantised, and it knows bf16 and fp32 ones only"),
    ],
)
def test_configs_that_are_not_known(change, sentence, plan, tmp_path):
    MAKE["llama"]().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=sentence) as raised:
        plan(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"use_liger": False}, "--plan: --use_liger False: it knows the memory of Liger's kernels only"),
        ({"optim": "sgd"}, "--plan: --optim sgd: it knows the default only, adamw_torch_fused"),
        ({"dtype": "bfloat16", "bf16": False}, "--plan: --dtype bfloat16: it knows .* together with --bf16 True"),
        ({"dtype": "bfloat16", "plan_gpus": 2}, "--plan: --dtype bfloat16 has no effect under FSDP"),
        ({"plan_gpus": 0}, "--plan_gpus 0: more than 0"),
        ({"plan_gib": "nan"}, "--plan_gib nan: more than 0"),
        (
            {"medusa_only_heads": False, "gradient_checkpointing": True, "gradient_checkpointing_layers": 33},
            "--gradient_checkpointing_layers 33: the backbone has 32 layers",
        ),
    ],
)
def test_settings_that_are_not_known(flags, sentence, plan, llama):
    with pytest.raises(BadInput, match=sentence):
        plan(llama, **flags)


@pytest.mark.parametrize("flag", ["plan_gpus", "plan_gib"])
def test_flags_of_a_plan_go_with_it(flag, llama):
    with pytest.raises(BadInput, match=f"--{flag} goes with --plan"):
        parse(flags_of(llama, **{flag: 2}))


def test_what_the_launcher_says(llama, monkeypatch):
    """Of nodes that hold copies of each other, one's GPUs share the model. DDP and FSDP1 are not known."""
    words = flags_of(llama)
    monkeypatch.setattr("training.arguments.TrainingArguments.world_size", 16)
    with pytest.raises(BadInput, match="one GPU and FSDP2 only"):
        run_from(*words)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(BadInput, match="one GPU and FSDP2 only"):
        run_from(*words)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert run_from(*words).gpus == 16
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "8")
    assert run_from(*words).gpus == 8


def test_every_flag_arrives(llama, tmp_path):
    heads = {"medusa_num_heads": 3, "medusa_num_layers": 2, "medusa_head_type": "markov", "medusa_rank": 64}
    heads |= {"medusa_prefix_layer": True, "medusa_loss": "kl", "lora_rank": 8, "preserve_coefficient": 1}
    sizes = {"packing": True, "model_max_length": 512, "gradient_accumulation_steps": 4, "eval_holdout": 5}
    sizes |= {"per_device_eval_batch_size": 6, "dtype": "bfloat16", "medusa_only_heads": False}
    recomputed = {"gradient_checkpointing": True, "gradient_checkpointing_layers": 7}
    run = run_from(*flags_of(llama, **heads, **sizes, **recomputed))
    config = run.heads
    assert (config.medusa_num_heads, config.medusa_num_layers, config.medusa_rank) == (3, 2, 64)
    assert config.medusa_head_type == "markov" and config.medusa_prefix_layer
    assert (run.batch, run.length, run.evaluated, run.accumulation, run.recomputed) == (4, 512, 6, 4, 7)
    assert run.teaches and run.packs and run.preserves and run.backbone.adapters == 8 * run.backbone.a_rank
    assert (run.trained, run.computed, run.gpus) == (2, 2, 1) and not run.stage_1 and not run.stored
    fp32 = run_from(*flags_of(llama, bf16=False, medusa_only_heads=False, medusa_return=False))
    assert fp32.computed == fp32.trained == 4 and fp32.heads is None and fp32.evaluated == 0 == fp32.recomputed


def test_of_several_processes_the_first_one_prints(plan, llama, monkeypatch):
    monkeypatch.setattr("training.arguments.TrainingArguments.process_index", 1)
    assert plan(llama, plan_gib=80) == ""
