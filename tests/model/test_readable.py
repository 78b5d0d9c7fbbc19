"""model/readable.py: what is written is read right by older programs too, and by other users."""

import json
import os
import stat

import pytest
import transformers
from conftest import make_backbone, make_tokenizer

from medusa_model import MedusaConfig, MedusaModel
from model.heads_file import HEADS_FILE
from model.readable import make_readable, with_old_names

LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LLAMA_3["rope_type"] = "llama3"


@pytest.fixture
def umask_027():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_stage_2_backbone_has_the_names_of_transformers_4(tmp_path, umask_027):
    backbone = make_backbone(rope_parameters=LLAMA_3 | {"rope_theta": 500000.0})
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=1))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"] == LLAMA_3
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["rope_parameters"] == LLAMA_3 | {"rope_theta": 500000.0}
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == backbone.config.rope_parameters
    heads = tmp_path / "medusa_heads"
    assert json.loads((heads / "config.json").read_text())["medusa_fc_bias"] is True
    for path in (tmp_path / "config.json", tmp_path / "model.safetensors", heads / HEADS_FILE, heads / "config.json"):
        assert mode(path) == 0o640, path


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 1e5, "rope_type": "default"}, {"rope_theta": 1e5, "rope_scaling": None}),
        (
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
            {
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
        ),
        (
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
        ),
    ],
)
def test_old_names(rope, expected):
    config = {"rope_parameters": rope, "dtype": "bfloat16"}
    assert with_old_names(config) == config | expected | {"torch_dtype": "bfloat16"}
    assert with_old_names({"text_config": config})["text_config"] == with_old_names(config)
    assert with_old_names({"a": 1}) == {"a": 1}


def test_other_files_keep_their_modes(tmp_path, umask_027):
    made, outside = tmp_path / "made", tmp_path / "outside.safetensors"
    made.mkdir()
    for path, bits in (
        (made / "run.sh", 0o755),
        (made / "secret", 0o600),
        (outside, 0o600),
        (made / "a.safetensors", 0o600),
    ):
        path.touch()
        path.chmod(bits)
    (made / "link.safetensors").symlink_to(outside)
    make_readable(made)
    assert [mode(path) for path in (made / "run.sh", made / "secret", outside)] == [0o755, 0o600, 0o600]
    assert mode(made / "a.safetensors") == 0o640 and len(list(made.iterdir())) == 4


def test_a_tokenizer_has_a_class_that_transformers_4_knows(tmp_path):
    tokenizer = make_tokenizer("llama3")
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    before = json.loads(path.read_text())
    make_readable(tmp_path)
    assert json.loads(path.read_text()) == before | {"tokenizer_class": "PreTrainedTokenizerFast"}
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "What is a tree? A tree <|x|> is a plant."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
