"""A run judges its backbone: what cannot be trained is one sentence before data or the first step, sharded or not."""

import pytest
from conftest import logged, make_tokenizer
from lab import STAGE_1
from odd import make_odd

import train as script
from common.errors import BadInput
from training import trainer


@pytest.fixture
def odd(train, tmp_path):
    """Trains a backbone of another kind."""

    def run(name, *flags):
        make_odd(name).save_pretrained(tmp_path / name)
        make_tokenizer("llama3").save_pretrained(tmp_path / name)
        return train("--model_name_or_path", tmp_path / name, "--max_steps", 1, *flags, output=f"out-{name}")

    return run


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_moe", "opt"])
def test_other_names_and_experts_train(name, odd):
    out = odd(name, "--medusa_only_heads", True, "--packing", name != "opt")
    assert 0 < logged(out, "head_1_loss")[0] < 100 and logged(out, "useful_tflops")[0] > 0


def test_gpt2_in_stage_2(odd):
    flags = ("--gradient_checkpointing", True, "--gradient_checkpointing_layers", 1)
    assert logged(odd("gpt2", "--medusa_only_heads", False, *flags), "head_0_loss")[0] > 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_refused_in_stage_2(name, odd):
    with pytest.raises(BadInput, match=r"mixture of experts.* --medusa_only_heads True"):
        odd(name, "--medusa_only_heads", False)


@pytest.mark.parametrize("name", ["bloom", "mamba", "mpt"])
def test_what_cannot_work_is_refused_before_data_are_read(name, odd, monkeypatch):
    monkeypatch.setattr(script, "load_data", lambda *args: pytest.fail("data were read"))
    with pytest.raises(BadInput, match="takes no position_ids"):
        odd(name, "--medusa_only_heads", True)


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        ("falcon_h1", (), r"logits of FalconH1ForCausalLM are not lm_head\(hidden\)"),
        ("recurrent_gemma", (), r"logits of RecurrentGemmaForCausalLM are not lm_head\(hidden\)"),
        ("opt", ("--packing", True), "--packing: conversations that share a row see each other in OPTForCausalLM"),
    ],
)
def test_others_are_refused_before_the_first_step(name, flags, sentence, odd, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer.MedusaTrainer, "training_step", lambda *args: pytest.fail("a step was made"))
    with pytest.raises(BadInput, match=sentence):
        odd(name, "--medusa_only_heads", True, *flags)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["FSDP2", "FSDP1"])
def test_a_sharded_model_is_judged_too(kind, lab):
    """Each rank has half of it. OPT has what FSDP shards in units, and its packed conversations see each other."""
    if not (lab.root / "opt").exists():
        make_odd("opt").save_pretrained(lab.root / "opt")
        make_tokenizer("llama3").save_pretrained(lab.root / "opt")
    flags = {"--model_name_or_path": "opt", "--packing": True, "--medusa_heads_path": None}
    run = lab.launch(kind, STAGE_1 | flags)
    assert run.codes == [1, 1], run.logs[0][-3000:]
    for log in run.logs:
        assert log.count("see each other in OPTForCausalLM") == 1 and "Traceback" not in log
