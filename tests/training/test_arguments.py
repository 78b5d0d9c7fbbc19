"""training/arguments.py and refusals.py: every refusal names its flag, before anything loads."""

import re

import pytest

from common.errors import BadInput
from training.arguments import TrainingArguments, parse
from training.refusals import RENAMED


def parse_with(*flags):
    return parse(["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "out", *flags])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--medusa_num_heads 0", "--medusa_num_heads 0: at least 1"),
        ("--medusa_num_layers -1", "--medusa_num_layers -1"),
        ("--medusa_return False --medusa_only_heads True", "--medusa_return False .* --medusa_only_heads True"),
        ("--model_max_length 6", "--model_max_length 6: head 5 looks 6 tokens ahead, so at least 7"),
        ("--medusa_num_heads 2 --model_max_length 3", "--model_max_length 3: .* at least 4"),
        ("--lazy_preprocess True --packing True", "--lazy_preprocess and --packing"),
        ("--eval_data_path e --eval_holdout 3", "--eval_holdout excludes --eval_data_path"),
        ("--eval_holdout -1", "--eval_holdout -1"),
        ("--eval_strategy steps", "--eval_strategy .* add --eval_data_path, --eval_split or --eval_holdout"),
        ("--eval_strategy epoch", "--eval_strategy .* add --eval_data_path, --eval_split or --eval_holdout"),
        ("--do_eval True", "--do_eval .* add --eval_data_path, --eval_split or --eval_holdout"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor"),
        ("--torch_compile True", "--torch_compile"),
        ("--gradient_checkpointing_layers 4", "--gradient_checkpointing_layers goes with"),
        (
            "--gradient_checkpointing True --gradient_checkpointing_layers 4 --medusa_only_heads True",
            "--gradient_checkpointing_layers goes with",
        ),
        ("--gradient_checkpointing True --gradient_checkpointing_layers 0", "_layers 0: at least 1"),
        (
            "--gradient_checkpointing True --gradient_checkpointing_layers 4 --offload_activations True",
            "leave --gradient_checkpointing_layers out",
        ),
        ("--fp8_backbone True --bf16 True", "--backbone_dtype fp8 .*stage 1"),
        ("--fp8_backbone True --medusa_only_heads True", "--backbone_dtype fp8 .* --bf16 True"),
        ("--backbone_dtype fp8 --bf16 True --lora_rank 4", "--backbone_dtype fp8 .*stage 1"),
        ("--backbone_dtype nf4", "--backbone_dtype nf4 .*do not train: .*stage 1.*, or --lora_rank"),
        ("--backbone_dtype bfloat16 --medusa_only_heads True", "--backbone_dtype bfloat16 goes with --bf16 True"),
        ("--backbone_dtype nf4 --fp8_backbone True", "--fp8_backbone is --backbone_dtype fp8, and not nf4"),
        ("--backbone_dtype fp4", "--backbone_dtype.*: invalid choice"),
        ("--optim mouse", "mouse"),
        ("--model_name_or_path=", "--model_name_or_path is empty"),
        ("--chat_template no.jinja", "--chat_template no.jinja"),
        ("--medusa_return False --medusa_vocab_size 9", "--medusa_vocab_size is of heads"),
        ("--medusa_vocab_size 0", "--medusa_vocab_size 0: at least 1"),
        ("--medusa_vocab_size 9 --lazy_preprocess True", "--medusa_vocab_size .* --lazy_preprocess"),
    ],
)
def test_refused(flags, named):
    with pytest.raises(BadInput, match=named):
        parse_with(*flags.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--medusa_num_layers 0",
        "--medusa_num_heads 2 --model_max_length 4",
        "--packing True",
        "--lazy_preprocess True",
        "--eval_strategy steps --eval_holdout 0.1",
        "--eval_strategy epoch --eval_data_path e",
        "--medusa_return False",
        "--gradient_checkpointing True --gradient_checkpointing_layers 4",
        "--fp8_backbone True --medusa_only_heads True --bf16 True",
        "--backbone_dtype fp8 --fp8_backbone True --medusa_only_heads True --bf16 True",
        "--backbone_dtype nf4 --medusa_only_heads True",
        "--backbone_dtype int8 --lora_rank 4",
        "--backbone_dtype bfloat16 --bf16 True",
        "--optim muon",
        "--warmup_steps 0.1",  # what --warmup_ratio is told to become
    ],
)
def test_the_nearest_that_works_is_accepted(flags):
    parse_with(*flags.split())


@pytest.mark.parametrize("joined", [False, True], ids=["space", "equals"])
@pytest.mark.parametrize("old", RENAMED)
def test_renamed_flag_names_the_new_one(old, joined):
    with pytest.raises(BadInput) as error:
        parse_with(*([f"{old}=1"] if joined else [old, "1"]))
    assert str(error.value) == f"{old} is not supported here; use {RENAMED[old]}"


@pytest.mark.parametrize("new", [new for new in RENAMED.values() if new.startswith("--")])
def test_the_new_flag_exists(new, capsys):
    with pytest.raises(SystemExit):
        parse_with("--help")
    assert new.split()[0] in re.findall(r"--\w+", capsys.readouterr().out)


def test_defaults():
    model, data, training = parse_with()
    assert (model.medusa_num_heads, model.medusa_num_layers, model.medusa_return) == (5, 1, True)
    assert (model.use_liger, model.dtype, model.chat_template, model.trust_remote_code) == (
        True,
        "float32",
        None,
        False,
    )
    assert (data.eval_data_path, data.eval_holdout, data.model_max_length) == (None, 0, 2048)
    assert not (data.packing or data.lazy_preprocess)
    assert (training.medusa_heads_coefficient, training.medusa_decay_coefficient) == (0.2, 0.8)
    assert training.medusa_scheduler == "constant"
    assert not training.medusa_only_heads


@pytest.mark.parametrize(
    ("flags", "backbone", "heads"),
    [
        ("--medusa_only_heads True", 1e-3, 1e-3),
        ("--medusa_only_heads False", 1e-5, 5e-4),
        ("--medusa_only_heads True --learning_rate 3e-3", 3e-3, 3e-3),
        ("--medusa_only_heads False --learning_rate 2e-5", 2e-5, 5e-4),
        ("--medusa_only_heads False --learning_rate 1e-3", 1e-3, 1e-3),
        ("--medusa_only_heads False --medusa_lr_multiplier 10", 1e-5, 1e-4),
    ],
)
def test_each_stage_has_learning_rates_of_its_own(flags, backbone, heads):
    training = parse_with(*flags.split())[2]
    assert training.learning_rate == backbone
    assert training.learning_rate * training.medusa_lr_multiplier == pytest.approx(heads)


def test_the_output_directory_can_name_the_stage():
    for stage_1, name in ((True, "out/heads_1"), (False, "out/heads_2")):
        flags = ("--output_dir", "out/heads_{stage}", "--medusa_only_heads", str(stage_1))
        assert parse_with(*flags)[2].output_dir == name


def test_what_is_there_to_evaluate_on_is_evaluated_unless_told_otherwise():
    for flags, wanted in (
        ("", False),
        ("--eval_holdout 3", True),
        ("--eval_data_path e", True),
        ("--eval_holdout 3 --do_eval False", False),
        ("--eval_holdout 3 --do_eval False --eval_strategy steps", True),  # as transformers has it
    ):
        assert parse_with(*flags.split())[2].do_eval is wanted


def test_columns_and_nan_losses_are_kept_from_the_trainer():
    *_, training = parse_with("--remove_unused_columns", "True", "--logging_nan_inf_filter", "True")
    assert not training.remove_unused_columns and not training.logging_nan_inf_filter


def test_bf16_on_a_cpu_is_accepted(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    *_, training = parse_with("--bf16", "True")
    assert training.bf16 and training.device.type == "cpu"


@pytest.mark.parametrize("flag", ["--gradient_checkpointing", "--activation_checkpointing"])
def test_a_frozen_backbone_is_not_recomputed(flag, tmp_path):
    if flag == "--activation_checkpointing" and not hasattr(TrainingArguments, "activation_checkpointing"):
        pytest.skip("this transformers has only the old name")
    base = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", str(tmp_path), flag, "True"]
    for frozen in (True, False):
        training = parse([*base, "--medusa_only_heads", str(frozen)])[2]
        assert training.gradient_checkpointing is not frozen
        assert getattr(training, "activation_checkpointing", not frozen) is not frozen


def test_an_unknown_flag_is_one_sentence(tmp_path):
    known = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", str(tmp_path)]
    with pytest.raises(BadInput, match="--medusa_heads_number"):
        parse([*known, "--medusa_heads_number", "3"])


@pytest.mark.parametrize(
    "flags",
    [
        ("--torch_empty_cache_steps", "2"),
        ("--bf16_full_eval", "True"),
        ("--medusa_only_heads", "True", "--neftune_noise_alpha", "5"),
        ("--push_to_hub", "True", "--hub_strategy", "every_save"),
        ("--medusa_lr_multiplier", "-1"),
        ("--medusa_only_heads", "True", "--medusa_heads_coefficient", "0"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, tmp_path):
    base = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", str(tmp_path)]
    name = next(flag for flag in reversed(flags) if flag.startswith("--") and flag != "--hub_strategy")
    with pytest.raises(BadInput, match=name):
        parse([*base, *flags])


def test_bf16_of_the_launcher_is_bf16_of_the_script(monkeypatch, tmp_path):
    """accelerate would compute in bf16 all the same, but the frozen backbone would be kept in fp32."""
    assert not TrainingArguments(output_dir=str(tmp_path)).bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert TrainingArguments(output_dir=str(tmp_path)).bf16
