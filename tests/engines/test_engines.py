"""What export.py writes, read by the engines' own code. Their sources are not in this repository: a case is skipped
unless its variable names a directory (docs/engines.md says how to get each).

    VLLM_SOURCE=... TGI_SOURCE=... MEDUSA_SOURCE=... TRANSFORMERS_4_34=... TRANSFORMERS_4_51=... pytest tests/engines
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_backbone, make_tokenizer, randomise
from transformers import AutoModelForCausalLM

from medusa_model import MedusaConfig, MedusaModel
from model import engines
from model.readable import make_readable

HERE = Path(__file__).parent


def place(variable: str) -> str:
    if variable not in os.environ:
        pytest.skip(f"{variable} names no directory")
    return os.environ[variable]


def ask(script: str, source: str, heads: Path, given: torch.Tensor, transformers: str | None = None):
    """What the script makes of a tensor, in a process of its own."""
    torch.save(given, heads.parent / "given.pt")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": transformers} if transformers else {}
    command = [sys.executable, HERE / script, source, heads, heads.parent / "given.pt", heads.parent / "out.pt"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(heads.parent / "out.pt"), done.stdout


def make(tmp_path, layers=1, token_map=None):
    """Heads over a backbone on disk."""
    torch.manual_seed(5)
    make_backbone().save_pretrained(tmp_path / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    config = MedusaConfig(medusa_num_heads=2, medusa_num_layers=layers)
    model = MedusaModel.from_backbone(backbone, config, token_map=token_map)
    randomise(model.medusa_heads)
    return model


def export(model, to, tmp_path) -> Path:
    config = model.config.to_dict() | {
        "medusa_head_type": "medusa",
        "base_model_name_or_path": str(tmp_path / "backbone"),
    }
    tensors = model.medusa_heads.state_dict()
    tensors |= {} if model.token_map is None else {"token_map": model.token_map}
    engines.write(engines.ENGINES[to], config, tensors, tmp_path / to)
    return tmp_path / to


def our_logits(model, hidden):
    with torch.inference_mode():
        return torch.stack([head.logits(hidden, None) for head in model.medusa_heads])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("to", ["vllm", "tgi"])
def test_vllm_reads_the_same_heads(to, layers, tmp_path):
    """Its own names, and those of this project's directories (tgi)."""
    source, model, hidden = place("VLLM_SOURCE"), make(tmp_path, layers), torch.randn(9, 32)
    directory = export(model, to, tmp_path)
    if to == "tgi":
        model.save_pretrained(directory, include_backbone=False)
    logits, said = ask("vllm_heads.py", source, directory, hidden)
    assert f"loaded {2 * (2 * layers + 1)}" in said
    torch.testing.assert_close(logits, our_logits(model, hidden), rtol=0, atol=1e-5)


def test_vllm_0_29_to_0_32_refuse_a_part_of_the_tokens(tmp_path):
    source, model = place("VLLM_SOURCE"), make(tmp_path, token_map=torch.tensor([3, 8, 21, 89]))
    with pytest.raises(AssertionError, match="4 rows, not 320"):
        ask("vllm_heads.py", source, export(model, "vllm", tmp_path), torch.randn(9, 32))


@pytest.mark.parametrize("layers", [1, 2])
def test_tgi_reads_the_same_heads(layers, tmp_path):
    source, model, hidden = place("TGI_SOURCE"), make(tmp_path, layers), torch.randn(9, 32)
    logits, _ = ask("tgi_heads.py", source, export(model, "tgi", tmp_path), hidden)
    torch.testing.assert_close(logits, our_logits(model, hidden), rtol=0, atol=1e-5)


def test_the_original_writes_the_backbones_text(tmp_path):
    source, old, model = place("MEDUSA_SOURCE"), place("TRANSFORMERS_4_34"), make(tmp_path)
    for head in model.medusa_heads:  # nearly copies of the lm_head: right wherever the text repeats a token
        head.load_state_dict({name: 0.01 * x for name, x in head.state_dict().items()})
        with torch.no_grad():
            head[-1].weight.copy_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "stage2")  # a config.json that transformers 4 understands
    (tmp_path / "stage2").rename(tmp_path / "backbone-2")
    (tmp_path / "backbone").rename(tmp_path / "before")
    (tmp_path / "backbone-2").rename(tmp_path / "backbone")
    prompt = torch.randint(10, 300, (1, 9))
    tokens, said = ask("original_text.py", source, export(model, "original", tmp_path), prompt, old)
    passes = int(said.split()[-2])
    assert "transformers 4.34" in said and len(tokens) > passes == 40
    want = model.backbone.generate(prompt, max_new_tokens=len(tokens), do_sample=False, eos_token_id=None)
    assert tokens.tolist() == want[0, 9:].tolist()


def test_transformers_4_reads_a_stage_2_backbone(tmp_path):
    """With LLaMA-3's RoPE, whose theta it would not find under today's names."""
    old = place("TRANSFORMERS_4_51")
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    backbone = make_backbone(rope_parameters=rope | {"rope_type": "llama3", "rope_theta": 500000.0})
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=1))
    directory = tmp_path / "stage2"
    model.save_pretrained(directory)
    tokenizer = make_tokenizer("llama3")
    tokenizer.save_pretrained(directory)
    make_readable(directory)
    ids = torch.randint(10, 300, (2, 200))
    (logits, words, template), said = ask("old_backbone.py", "-", directory, ids, old)
    assert "transformers 4.51" in said
    with torch.inference_mode():
        want = backbone(ids).logits
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)
    assert words == tokenizer("the cold moon and salt water")["input_ids"] and template == tokenizer.chat_template
