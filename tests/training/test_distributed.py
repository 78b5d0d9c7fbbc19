"""Two processes train as one does: losses, gradients and weights."""

import pytest
import torch
from conftest import logged, weights
from lab import CASES, CLIP, EACH, HSDP, INTERPRETED, NO_DIFFERENCE, STAGE_1, STEPS, assert_close, figures
from quantised import needs

pytestmark = pytest.mark.processes
# FSDP1 and DDP train all heads at once, by the same code as one process; here are what each adds, weights in units and
# gradients that are averaged: every kind of weight, and rows or gradients that one rank does not have.
FEW = {
    "FSDP1": ("stage 1", "stage 2", "tied, stage 2", "accumulation, stage 2", "no rows, stage 2", "kl, stage 1")
    + (
        "few tokens, stage 2",
        "states",
        "all rows",
        "markov, fresh",
        "hydra, stage 2",
        "hydra, states, tied",
        "prefix, stage 1",
    ),
    "DDP": ("stage 1", "stage 2", "tied, stage 1", "no rows, stage 2", "best, stage 1", "kl, stage 2")
    + (
        "few tokens, stage 1",
        "states, kl, tied",
        "markov, stage 2",
        "hydra, stage 1",
        "hydra, tied, stage 2",
        "prefix, stage 2",
    ),
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [("FSDP2", case) for case in CASES]
    + [(kind, case) for kind in FEW for case in FEW[kind]]
    + [(HSDP, "stage 1"), (HSDP, "states"), (HSDP, "accumulation, stage 2"), (HSDP, "tied, stage 2")]
    + [(HSDP, "hydra, stage 2")]
    + [("one process", case) for case in NO_DIFFERENCE],
)
def test_equals_one_process(kind, case, lab):
    got, want = lab.never_stopped(kind, case).out, lab.never_stopped("one process", NO_DIFFERENCE.get(case, case)).out
    assert_close(got, want)
    assert len(set(logged(want))) == len(logged(want)) == CASES[case].get("--max_steps", STEPS)
    assert min(logged(want, "grad_norm")) > CLIP  # so it was clipped
    if case.startswith("no rows"):
        assert ["head_3_loss" in entry for entry in figures(got)] == [True, True, False, True]
    if "few tokens" in case:
        maps = [[tensor for name, tensor in weights(out).items() if "token_map" in name] for out in (got, want)]
        assert torch.equal(*maps[0], *maps[1]) and len(maps[0][0]) == 24
        log = "".join(lab.never_stopped(kind, case).logs)
        assert log.count("of the training labels") == log.count("of the evaluation labels") == 1  # not once a process
    if case.startswith("best"):
        *while_training, of_the_best = logged(got, "eval_loss")
        assert of_the_best == pytest.approx(max(while_training)) and of_the_best > while_training[-1]


@pytest.mark.parametrize(("kind", "processes"), [("one process", 1), ("FSDP2", 2), ("DDP", 2)])
def test_figures_are_of_one_device(kind, processes, lab):
    """The useful work of a step, over its time, of each of the processes; tokens/s are of all together."""

    def per_step(kind: str, name: str) -> float:
        out = lab.never_stopped(kind, "stage 2").out
        return logged(out, name)[-1] * logged(out, "step_time_s")[-1]

    assert per_step(kind, "useful_tflops") * processes == pytest.approx(per_step("one process", "useful_tflops"))
    assert per_step(kind, "tokens_per_s") == pytest.approx(per_step("one process", "tokens_per_s"))


@pytest.mark.parametrize(
    ("stored", "online"),
    [("states", "stage 1"), ("states, accumulation", "accumulation, stage 1"), ("states, kl", "kl, stage 1")]
    + [("markov, states", "markov, stage 1"), ("hydra, states", "hydra, stage 1")],
)
def test_from_stored_states_as_online(stored, online, lab):
    assert_close(lab.never_stopped("FSDP2", stored).out, lab.never_stopped("one process", online).out)


@pytest.mark.parametrize("kind", ["FSDP2", "FSDP1", "DDP"])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_should_train_moves_and_the_rest_stays(stage, kind, lab):
    out = lab.never_stopped(kind, f"stage {stage}").out
    heads = {f"medusa_lm_head.safetensors:{name.split(':')[1]}": t for name, t in weights(lab.root / "heads").items()}
    before = {"": heads} if stage == 1 else {"medusa_heads/": heads, "": weights(lab.root / "model")}
    before = {prefix + name: tensor for prefix, part in before.items() for name, tensor in part.items()}
    after = weights(out)
    assert after.keys() == before.keys()  # in stage 1 the backbone is not written
    assert not [name for name in after if torch.equal(after[name], before[name])]


@pytest.mark.parametrize("stage", [1, 2])
def test_every_gradient_equals_that_of_one_process(stage, lab):
    def gradients(kind):
        file = str(lab.root / f"gradients-{kind}-{stage}")
        lab.run(kind, CASES[f"stage {stage}"] | {"--max_steps": 3}, gradients=file)
        return [torch.load(f"{file}.{step}", weights_only=True) for step in (1, 2, 3)]

    for got, want in zip(gradients("FSDP2"), gradients("one process"), strict=True):
        assert got.keys() == want.keys() and len(got) == (6 if stage == 1 else 6 + 21)
        for name in got:
            assert want[name].abs().max() > 1e-3
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_equals_bf16_of_one_process(stage, lab):
    flags = CASES[f"stage {stage}"] | {"--bf16": True}
    got, want = lab.run("FSDP2", flags).out, lab.run("one process", flags).out
    assert logged(got) == pytest.approx(logged(want), rel=2e-2)
    assert logged(got) != pytest.approx(logged(lab.never_stopped("FSDP2", f"stage {stage}").out), rel=1e-5)
    # In the first step the weights are the same: only the order of sums differs. Rounded to bf16, losses would be up
    # to 4e-3 apart.
    for k in range(2 - stage, 3):
        assert logged(got, f"head_{k}_loss")[0] == pytest.approx(logged(want, f"head_{k}_loss")[0], rel=3e-4)
    tensors = weights(got).values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize("case", ["markov, stage 2", "hydra, tied, stage 2", "hydra, states"])
@pytest.mark.parametrize("kind", ["FSDP2", "FSDP1", "DDP"])
def test_bf16_of_heads_that_read_their_path(kind, case, lab):
    """FSDP casts weights, and what heads read, to bf16; autocast casts where it multiplies, and a loss is then up to
    2e-3 from fp32's, for any type of heads."""
    got, want = (lab.run(name, CASES[case] | {"--bf16": True}).out for name in (kind, "one process"))
    for key in ("head_1_loss", "head_2_loss"):
        assert logged(got, key)[0] == pytest.approx(logged(want, key)[0], rel=3e-3)
    assert logged(got) == pytest.approx(logged(want), rel=2e-2)


def test_one_process_of_a_node_reads_the_backbone(lab):
    reads = lambda run: ["reads the backbone" in log for log in run.logs]  # noqa: E731
    assert reads(lab.never_stopped("FSDP2", "stage 2")) == [True, False]
    tied = lab.never_stopped("FSDP2", "tied, stage 2")
    assert reads(tied) == [True, True] and "every process reads the backbone itself" in tied.logs[0]
    each = lab.run("FSDP2", CASES["stage 2"], environment=EACH)
    assert reads(each) == [True, True]
    assert_close(each.out, lab.never_stopped("one process", "stage 2").out)


@pytest.mark.interpreter
def test_an_fp8_backbone_is_sharded_like_another(lab):
    flags = STAGE_1 | {"--fp8_backbone": True, "--bf16": True, "--use_liger": False, "--max_steps": 1}
    flags |= {"--model_max_length": 40, "--eval_holdout": 0, "--eval_strategy": "no"}  # seconds, not a minute
    slow = {"environment": {"TRITON_INTERPRET": "1"}, "timeout": INTERPRETED}
    one, two = (lab.run(kind, flags, **slow) for kind in ("one process", "FSDP2"))
    assert all("fp8: 14 linear layers" in run.logs[0] for run in (one, two))
    assert_close(two.out, one.out, rel=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["FSDP2", "FSDP1"])
def test_a_config_may_name_layers_that_stored_states_leave_out(kind, lab):
    named = lab.run(
        kind, CASES["states"], environment={"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,MedusaHead"}
    )
    assert_close(named.out, lab.never_stopped("one process", "states").out)


@pytest.mark.parametrize("kind", ["FSDP2", "FSDP1", "DDP"])
def test_bf16_from_stored_states(kind, lab):
    """Here they are of an fp32 backbone: nearer to each other than to those of a bf16 one."""
    bf16 = {"--bf16": True}
    got, want = (lab.run(name, CASES["states, kl"] | bf16).out for name in (kind, "one process"))
    online = lab.run("one process", CASES["kl, stage 1"] | bf16).out
    for key in ("head_1_loss", "head_2_loss"):
        assert logged(got, key)[0] == pytest.approx(logged(want, key)[0], rel=3e-4)
        assert logged(got, key)[0] == pytest.approx(logged(online, key)[0], rel=1e-2)
    assert logged(got) == pytest.approx(logged(want), rel=2e-2)
    assert logged(got) == pytest.approx(logged(online), rel=5e-2)


@pytest.mark.parametrize("kind", ["FSDP2", "DDP"])
@pytest.mark.parametrize(
    "bits", [pytest.param("int8", marks=needs("torchao")), pytest.param("nf4", marks=needs("bitsandbytes"))]
)
def test_a_backbone_in_few_bits_beside_sharded_heads(lab, bits, kind):
    flags = STAGE_1 | {"--backbone_dtype": bits, "--max_steps": 3, "--eval_strategy": "no", "--save_strategy": "no"}
    one, two = lab.run("one process", flags), lab.run(kind, flags)
    assert_close(two.out, one.out)
