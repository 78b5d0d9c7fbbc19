"""EfficiencyCallback: the peak of a GPU, the useful FLOPs of a step, and a clock that runs only while it trains."""

import logging

import pytest
import torch
from conftest import make_backbone
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl

from callback import EfficiencyCallback, FlopCount, peak_tflops
from conversations.batches import Collator
from medusa_model import MedusaConfig, MedusaModel
from model.lora import add_lora
from training.arguments import TrainingArguments
from training.trainer import MedusaTrainer, batch_counts

CPU = torch.device("cpu")


class Run:
    """Calls an EfficiencyCallback as the Trainer does, with a clock that only moves when told to."""

    def __init__(self, monkeypatch, rows=(5, 4, 3), tokens=60, slots=80, pairs=100, **kwargs):
        self.seconds, self.counts = 0.0, torch.tensor([*rows, tokens, slots, pairs])
        monkeypatch.setattr(EfficiencyCallback, "now", lambda _: self.seconds)
        flops = kwargs.pop("flops", FlopCount(1.0, 1.0, [1.0] * len(rows), 1))
        self.meter = EfficiencyCallback(flops, CPU, **{"warmup_steps": 1} | kwargs)
        self.meter.on_train_begin(None, None, None)

    def step(self, seconds=2.0, data=0.0, log=0.0, evaluate=0.0, save=0.0):
        """`data`: seconds until the batch is there; the last three: seconds spent on it after the step, 0: not due."""
        self.seconds += data
        self.meter.count(self.counts)
        self.meter.on_step_begin(None, None, None)
        self.seconds += seconds
        control = TrainerControl(should_log=log > 0, should_evaluate=evaluate > 0, should_save=save > 0)
        self.meter.on_step_end(None, None, control)
        for pause, hook in ((log, "on_log"), (evaluate, "on_evaluate"), (save, "on_save")):
            if pause:
                self.seconds += pause
                getattr(self.meter, hook)(None, None, control)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 3060", None),
        ("NVIDIA L40", None),  # neither an L4 nor an L40S
    ],
)
def test_peak_by_device_name(name, peak, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_tflops(name) == peak
    assert EfficiencyCallback(None, torch.device("cuda")).peak == peak
    assert [record.levelno for record in caplog.records] == ([] if peak else [logging.WARNING])


@pytest.mark.parametrize("frozen", [True, False], ids=["stage1", "stage2"])
def test_flops_of_llama3_8b(frozen):
    vocab, hidden = 128256, 4096
    shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=14336, **shape)
    with torch.device("meta"):  # the shapes alone: 8B weights would be 32 GB
        model = MedusaModel.from_backbone(LlamaForCausalLM(config), MedusaConfig(medusa_num_heads=2))
    if frozen:
        model.freeze_backbone()
    flops = FlopCount.of(model)
    assert flops.per_token == pytest.approx(13.96e9, rel=1e-3)
    assert flops.per_pair == 4 * 32 * 32 * 128 == 524288
    assert flops.backbone_passes == (1 if frozen else 3)
    head = 6 * (vocab * hidden + hidden * hidden + hidden)
    assert flops.per_row == [0 if frozen else 6 * vocab * hidden, head, head]


@pytest.mark.parametrize(("kind", "products"), [("ce", 6), ("kl", 8)])
def test_flops_of_a_draft_vocabulary(kind, products):
    """Head and teacher have 40 tokens, not 320; a ResBlock has no teacher."""
    model = MedusaModel.from_backbone(make_backbone(), MedusaConfig(medusa_num_heads=2), token_map=torch.arange(40))
    model.medusa_loss = kind
    assert FlopCount.of(model).per_row == [6 * 320 * 32, *[products * 40 * 32 + 6 * (32 * 32 + 32)] * 2]


def test_flops_of_heads_that_read_their_path():
    """Embeddings need no gradient; a table is looked up; a teacher is as wide as the hidden state."""
    flops = {}
    for kind in ("markov", "hydra"):
        config = MedusaConfig(medusa_num_heads=2, medusa_head_type=kind, medusa_rank=8)
        model = MedusaModel.from_backbone(make_backbone(), config)
        model.medusa_loss = "kl"
        flops[kind] = FlopCount.of(model).per_row[1:]
    block, projection, teacher = 6 * (32 * 32 + 32), 6 * 320 * 32, 2 * 320 * 32
    assert flops["markov"] == [block + projection + 6 * 320 * 8 + teacher] * 2
    assert flops["hydra"] == [block + 4 * k * 32 * 32 + projection + teacher for k in (1, 2)]


def test_flops_of_a_step_by_hand():
    flops = FlopCount(per_token=10.0, per_pair=3.0, per_row=[1000.0, 100.0], backbone_passes=3)
    assert flops.step(rows=[2, 7], tokens=5, pairs=11) == 3 * (10 * 5 + 3 * 11) + 2 * 1000 + 7 * 100


@pytest.mark.parametrize(
    ("layers", "kind"), [(0, "medusa"), (1, "medusa"), (2, "medusa"), (1, "markov"), (2, "markov"), (2, "hydra")]
)
def test_flops_equal_those_torch_counts(layers, kind):
    """Stage 2, every token a row. Eager attention multiplies all T x T pairs, the causal half that we call useful and
    the other one, so it is compared on T x T pairs, and apart: its products are the only batched ones (bmm). Torch
    does not count the addition of a bias, we count 6 a row and bias as for any other weight."""
    batch, length, heads, hidden = 2, 16, 3, 32
    config = MedusaConfig(medusa_num_heads=heads, medusa_num_layers=layers, medusa_head_type=kind)
    model = MedusaModel.from_backbone(make_backbone(attn_implementation="eager"), config)
    ids = torch.randint(320, (batch, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    *rows, tokens, _, pairs = batch_counts({"labels": ids, "attention_mask": torch.ones_like(ids)}, heads).tolist()
    flops = FlopCount.of(model)
    biases = 6 * hidden * layers * sum(rows[1:])
    assert flops.step(rows, tokens, pairs=0) - biases == counted["aten.mm"] + counted.get("aten.addmm", 0)
    attention = flops.step([0] * (heads + 1), 0, pairs=batch * length**2)
    assert attention == pytest.approx(counted["aten.bmm"], rel=1e-3)  # transformers 5.17 does RoPE with a bmm too
    assert pairs == batch * length * (length + 1) / 2


@pytest.mark.parametrize("preserves", [False, True])
def test_flops_with_adapters_are_about_those_torch_counts(preserves):
    """Within 2 %: the gradients of the adapters' own weights are not counted, and that of the first layer's input is,
    though nobody needs it."""
    model = MedusaModel.from_backbone(make_backbone(attn_implementation="eager"), MedusaConfig(medusa_num_heads=1))
    add_lora(model.backbone, 1, 2)
    model.preserves = preserves
    ids = torch.randint(320, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    *rows, tokens, _, _ = batch_counts({"labels": ids, "attention_mask": torch.ones_like(ids)}, 1).tolist()
    flops = FlopCount.of(model)
    assert flops.step(rows, tokens, 0) == pytest.approx(counted["aten.mm"] + counted.get("aten.addmm", 0), rel=0.02)
    assert flops.step([0, 0], 0, 2 * 16**2) == pytest.approx(counted["aten.bmm"], rel=1e-3)


def test_mfu(monkeypatch):
    """2 steps of 5e14 FLOPs in 4 s on 2 devices of 250 TFLOP/s."""
    flops = FlopCount(per_token=5e14 / 60, per_pair=0.0, per_row=[0.0] * 3, backbone_passes=1)
    run = Run(monkeypatch, flops=flops, peak=250, world_size=2)
    for log in (1, 0, 1):
        run.step(2.0, log=log)
    assert run.meter.summary()["useful_tflops"] == pytest.approx(125)
    assert run.meter.summary()["mfu"] == pytest.approx(0.5)


def test_no_mfu_without_a_peak(monkeypatch):
    run = Run(monkeypatch)
    run.step(log=1)
    figures = run.meter.window()
    assert "mfu" not in figures and figures["useful_tflops"] > 0


@pytest.mark.parametrize("warmup_steps", [0, 1, 3])
def test_summary_leaves_warm_up_out(warmup_steps, monkeypatch):
    run = Run(monkeypatch, warmup_steps=warmup_steps)
    for _ in range(warmup_steps):
        run.step(90.0)
    run.step(2.0)
    run.step(4.0, log=1)
    assert run.meter.summary()["step_time_s"] == 3
    assert run.meter.window()["step_time_s"] == (warmup_steps * 90 + 6) / (warmup_steps + 2)  # a log hides nothing


@pytest.mark.parametrize("pause", [{"log": 50}, {"evaluate": 50}, {"save": 50}, {"log": 5, "evaluate": 50, "save": 9}])
def test_pauses_are_not_in_the_time_and_waiting_for_data_is(pause, monkeypatch):
    run = Run(monkeypatch)
    run.step(9.0)
    run.step(2.0, data=3.0, **pause)
    run.step(2.0, data=3.0)
    run.step(2.0, data=3.0, **pause)
    assert run.meter.summary()["step_time_s"] == 5


def test_window_starts_anew(monkeypatch):
    run = Run(monkeypatch)
    run.step(8.0, log=1)
    assert run.meter.window()["step_time_s"] == 8
    run.step(2.0, log=1)
    assert run.meter.window()["step_time_s"] == 2


@pytest.mark.parametrize(("rows", "counted"), [((5, 4, 3), 7), ((5,), 5)], ids=["heads", "lm_head-alone"])
def test_tokens_slots_and_rows_are_told_apart(rows, counted, monkeypatch):
    run = Run(monkeypatch, rows=rows, tokens=60, slots=80)
    run.step(2.0, log=1)
    figures = run.meter.window()
    assert (figures["tokens_per_s"], figures["padded_tokens_per_s"], figures["rows_per_s"]) == (30, 40, counted / 2)


def test_memory_on_a_cpu_is_the_process(monkeypatch):
    memory = Run(monkeypatch).meter.window()
    assert memory.keys() == {"peak_process_gib"}
    assert 0.1 < memory["peak_process_gib"] < 100  # torch alone takes 0.2; a wrong unit is off by 1024


def test_in_a_real_trainer(monkeypatch, tmp_path):
    """The Trainer's own order of hooks: a step takes 1 s and its batch 0.5 s; evaluating and saving 1000 s each."""
    clock = {"seconds": 0.0}

    def slow(seconds, function):
        def wrapped(*args, **kwargs):
            clock["seconds"] += seconds
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(EfficiencyCallback, "now", lambda _: clock["seconds"])
    model = MedusaModel.from_backbone(make_backbone(), MedusaConfig(medusa_num_heads=1))
    data = [{"input_ids": list(range(16)), "labels": list(range(16))} for _ in range(40)]
    steps = {"max_steps": 6, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    meter = EfficiencyCallback(FlopCount.of(model), CPU, warmup_steps=1)
    trainer = MedusaTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), **steps, per_device_train_batch_size=2, report_to="none", use_cpu=True),
        train_dataset=data,
        eval_dataset=data[:2],
        data_collator=slow(0.5, Collator(0)),
        meter=meter,
    )
    trainer.training_step = slow(1.0, trainer.training_step)
    trainer.evaluation_loop = slow(1000, trainer.evaluation_loop)
    trainer._save_checkpoint = slow(1000, trainer._save_checkpoint)
    trainer.train()
    logged = [log["step_time_s"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [1.25, 1.5, 1.5]  # the very first batch is made before the clock starts
    assert meter.summary()["step_time_s"] == 1.5
    assert clock["seconds"] > 4000


def test_steps_before_a_pause_at_the_end_of_an_epoch_have_their_time(monkeypatch):
    """--logging_strategy epoch sets its flag after the last step has ended."""
    run = Run(monkeypatch)
    for _ in range(4):
        run.step(seconds=2.0)
    run.meter.on_epoch_end(None, None, TrainerControl(should_log=True))
    assert run.meter.window()["step_time_s"] == 2.0


def test_the_last_steps_have_their_time_in_the_summary(monkeypatch):
    run = Run(monkeypatch)
    for log in (0, 1.0, 0, 0):
        run.step(seconds=2.0, log=log)
    run.meter.on_log(None, None, None)  # as the Trainer does with its own summary before it ends
    run.meter.on_train_end(None, None, None)
    assert run.meter.summary()["step_time_s"] == 2.0


def test_a_second_training_starts_anew(monkeypatch):
    run = Run(monkeypatch)
    run.step(seconds=9.0, log=1.0)
    run.meter.on_train_begin(None, None, None)
    run.step(seconds=2.0, log=1.0)
    assert run.meter.window()["step_time_s"] == 2.0


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"])
def test_parts_and_slower_namesakes_have_no_known_peak(name):
    assert peak_tflops(name) is None
