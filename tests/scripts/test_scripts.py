"""The LLaMA-3 scripts without a GPU: what they would start, under sh as under bash."""

import re
import shutil

import pytest
import setting
import transformers
from conftest import ROOT

from common.errors import BadInput
from training.advice import needed, run_of
from training.arguments import parse
from training.build import choose_head_type
from training.plan import GIB, tightest

SCRIPT, SLURM_SCRIPT = ROOT / "scripts/llama3_8b_medusa.sh", ROOT / "scripts/slurm_llama3_8b_medusa.sh"
SLURM_JOB = {"SLURM_JOB_ID": "1234567", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]"}
SCONTROL = 'test "$*" = "show hostnames gpu[07-08]" && printf "gpu07\\ngpu08\\n"'


def launcher_flags(done) -> list[str]:
    """The words a script gives to accelerate, up to train.py."""
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()[-1].split()
    assert words[0] == "scripts/launch.py"
    return words[1 : words.index("train.py") + 1]


def flags_of(done):
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()[-1].split()
    return parse(words[words.index("train.py") + 1 :])


def config_of(done) -> str:
    words = launcher_flags(done)
    return words[words.index("--config_file") + 1]


def is_one_error(done, *parts):
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and not done.stdout and len(lines) == 1 and lines[0].startswith("error: "), done
    for part in parts:
        assert part in lines[0]


# ---- what train.py is told ----
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_stage_1_on_one_gpu(start, shell):
    done = start(shell=shell, gpus=1)
    model, data, training = flags_of(done)
    assert config_of(done) == "configs/single_gpu.yaml" and "--quiet" in launcher_flags(done) and not done.stderr
    assert training.medusa_only_heads and training.learning_rate == 1e-3 and training.medusa_lr_multiplier == 1
    assert model.medusa_num_heads == 5 and training.bf16 and training.warmup_steps == 0.02
    assert data.eval_holdout == 500 and training.output_dir == "out/llama3_8b_medusa_stage1"


@pytest.mark.parametrize("flags", [("--medusa_only_heads", "False"), ("--medusa_only_heads=False",)])
def test_stage_2_has_learning_rates_of_its_own(start, flags):
    training = flags_of(start(*flags, gpus=4))[2]
    assert not training.medusa_only_heads and training.gradient_checkpointing
    assert training.learning_rate == 1e-5 and training.medusa_lr_multiplier == 50
    assert training.output_dir.endswith("stage2")


@pytest.mark.parametrize(
    ("flags", "stage"),
    [
        (("--medusa_only_heads", "TRUE"), 1),
        (("--medusa_only_heads", "y"), 1),
        (("--medusa_only_heads", "--packing", "True"), 1),
        (("--medusa-only-heads", "no"), 2),
        (("--medusa_only_heads", "0"), 2),
    ],
)
def test_every_spelling_the_parser_takes_means_the_same_to_the_script(start, flags, stage):
    training = flags_of(start(*flags, NUM_GPUS="1"))[2]
    assert training.medusa_only_heads == (stage == 1)
    assert training.learning_rate == (1e-3 if stage == 1 else 1e-5)


def test_appended_flags_and_variables_win(start):
    done = start("--medusa_num_heads", "3", "--learning_rate", "5e-4", NUM_GPUS="1", MODEL="mine", MAX_LENGTH="4096")
    model, data, training = flags_of(done)
    assert model.medusa_num_heads == 3 and training.learning_rate == 5e-4
    assert model.model_name_or_path == "mine" and data.model_max_length == 4096


def test_neither_true_nor_false(start):
    with pytest.raises(BadInput, match=r"--medusa_only_heads.*maybe"):
        flags_of(start("--medusa_only_heads", "maybe", NUM_GPUS="1"))


# ---- does it fit? ----
NODES = {"NUM_NODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "node0"}


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize(
    ("gpus", "variables", "sharing"),
    [(1, {}, 1), (4, {}, 4), (4, NODES, 4), (1, NODES, 3)],
)
def test_asks_first_whether_it_fits(start, shell, gpus, variables, sharing):
    """With the same flags as the run, for the GPUs that share the model: those of a node, if nodes hold copies."""
    done = start("--medusa_num_heads", "3", shell=shell, gpus=gpus, **variables)
    asked, started = done.stdout.splitlines()
    flags = started.split(" train.py ")[1]
    assert asked == f"train.py {flags} --plan --plan_gpus {sharing}" and flags.endswith("--medusa_num_heads 3")


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_what_does_not_fit_is_not_started(start, shell, tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$1" >&2\ntest "$1" != train.py\n')
    (tmp_path / "python").chmod(0o755)
    done = start(shell=shell, gpus=1, PYTHON=str(tmp_path / "python"))
    assert done.returncode == 1 and done.stderr.split() == ["train.py"]
    done = start(shell=shell, gpus=1, PYTHON=str(tmp_path / "python"), PLAN="no")
    assert done.returncode == 0 and done.stderr.split() == ["scripts/launch.py"]


@pytest.mark.parametrize("config", ["configs/fsdp1.yaml", "configs/cpu.yaml"])
def test_what_plans_are_not_of_is_started_at_once(start, config):
    assert len(start(gpus=2, CONFIG=config).stdout.splitlines()) == 1


def test_what_fits_where_in_the_readme(start, tmp_path):
    """The table's rows are what the script asks with their flags, and the smallest of these GPUs (GB) that it fits."""
    transformers.LlamaConfig(**setting.LLAMA3_8B).save_pretrained(tmp_path / "llama")
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \| ([\d.]+) \| (\d+) GB \|", text, re.MULTILINE)
    assert len(rows) == 9
    for gpus, what, peak, size in rows:
        flags = what.split("`")[1].split() if "`" in what else []
        asked = start(*flags, NUM_GPUS=gpus, MODEL=str(tmp_path / "llama")).stdout.splitlines()[0]
        model, data, training = parse(asked.split()[1:])
        choose_head_type(model)
        run = run_of(model, data, training)
        fits = next(gb for gb in (24, 40, 48, 80, 141) if needed(run) <= gb * 1e9)
        assert (f"{tightest(run).total / GIB:.1f}", fits) == (peak, int(size)), what


# ---- on how many GPUs and nodes, and with which config ----
@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, 4),
        ({"NUM_GPUS": "2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "1,2,3"}, 3),
    ],
)
def test_takes_the_gpus_that_are_there(start, launch, variables, processes):
    _, args, environment = launch(*launcher_flags(start(gpus=4, **variables)))
    assert args.num_processes == processes and args.num_machines == 1
    assert environment["FSDP_VERSION"] == "2" and "PARALLELISM_CONFIG_DP_SHARD_SIZE" not in environment


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"NUM_GPUS": "8"}, ("NUM_GPUS is 8", "only 4")),
        ({"NUM_GPUS": "3", "CUDA_VISIBLE_DEVICES": "0,2"}, ("NUM_GPUS is 3", "only 2")),
        ({"NUM_GPUS": "all"}, ("NUM_GPUS", "'all'")),
        ({"NUM_GPUS": "0"}, ("no NVIDIA GPU",)),
        ({"CONFIG": "configs/fsdp3.yaml"}, ("no file CONFIG=configs/fsdp3.yaml",)),
        ({"MASTER_PORT": "http"}, ("MASTER_PORT", "'http'")),
        ({"NUM_NODES": "two"}, ("NUM_NODES", "'two'")),
        ({"NUM_NODES": "0"}, ("NUM_NODES",)),
        ({"NODE_RANK": "1"}, ("NODE_RANK is 1", "NUM_NODES, 1")),
        ({"NUM_NODES": "2", "MASTER_ADDR": "node0"}, ("NODE_RANK", "MASTER_ADDR")),
        ({"NUM_NODES": "2", "NODE_RANK": "0"}, ("NODE_RANK", "MASTER_ADDR")),
        ({"NUM_NODES": "2", "NODE_RANK": "-1", "MASTER_ADDR": "node0"}, ("NODE_RANK", "'-1'")),
        ({"NUM_NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "node0"}, ("NODE_RANK is 2",)),
        ({"SLURM_NNODES": "2", "SLURM_NODEID": "0"}, ("MASTER_ADDR",)),
    ],
)
def test_settings_that_cannot_work_are_one_error(start, shell, variables, parts):
    is_one_error(start(shell=shell, gpus=4, **variables), *parts)


def test_without_a_gpu_it_says_so(start):
    is_one_error(start(), "no NVIDIA GPU")


def test_several_nodes(start, launch):
    done = start(gpus=4, NUM_NODES="3", NODE_RANK="1", MASTER_ADDR="node0", MASTER_PORT="29600")
    assert config_of(done) == "configs/fsdp2_multi_node.yaml"
    name, args, environment = launch(*launcher_flags(done))
    assert name == "multi_gpu_launcher" and args.rdzv_backend == "static" and args.rdzv_endpoint == "node0:29600"
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("3", "4", 1)
    assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    assert environment["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "3"
    assert environment["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "4"


def test_nodes_of_one_gpu_shard_over_all_of_them(start, launch):
    """accelerate refuses HSDP whose shard size is 1."""
    _, args, environment = launch(
        *launcher_flags(start(NUM_GPUS="1", NUM_NODES="4", NODE_RANK="3", MASTER_ADDR="node0"))
    )
    assert args.num_processes == 4 and environment["FSDP_VERSION"] == "2"
    assert "ACCELERATE_USE_PARALLELISM_CONFIG" not in environment


def test_a_config_of_ones_own(start, launch, tmp_path):
    own = tmp_path / "own.yaml"
    text = (ROOT / "configs/fsdp2_multi_node.yaml").read_text()
    own.write_text(text.replace("dp_shard_size: 8", "dp_shard_size: 2"))
    done = start(gpus=4, CONFIG=str(own), NUM_NODES="4", NODE_RANK="1", MASTER_ADDR="node0")
    assert config_of(done) == str(own)
    environment = launch(*launcher_flags(done))[2]
    assert environment["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "2"
    assert config_of(start(gpus=1, CONFIG="configs/fsdp1.yaml")) == "configs/fsdp1.yaml"


# ---- SLURM ----
def test_slurm_says_which_node_it_is(start, launch):
    done = start(gpus=8, programs={"scontrol": SCONTROL}, **SLURM_JOB)
    args = launch(*launcher_flags(done))[1]
    assert (args.num_machines, args.machine_rank, args.num_processes) == (2, 1, 16)
    assert args.rdzv_endpoint == "gpu07:29500"


def test_own_variables_win_over_those_of_slurm(start, launch):
    several = {"NUM_NODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "other"}
    args = launch(*launcher_flags(start(gpus=2, programs={"scontrol": SCONTROL}, **SLURM_JOB | several)))[1]
    assert (args.num_machines, args.machine_rank, args.rdzv_endpoint) == (4, 3, "other:29500")
    args = launch(*launcher_flags(start(gpus=2, **SLURM_JOB, NUM_NODES="1")))[1]
    assert (args.num_machines, args.machine_rank, args.num_processes) == (1, 0, 2)


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_batch_script_starts_one_task_a_node(start, launch, tmp_path, shell):
    """sbatch runs a copy from elsewhere, in no particular directory; srun runs the rest, here on the second node."""
    copy = shutil.copy(SLURM_SCRIPT, tmp_path / "slurm_script")
    srun = 'echo "$*" >&2; while [ "$1" != bash ]; do shift; done; exec env SLURM_NODEID=1 "$@"'
    job = SLURM_JOB | {"SLURM_NODEID": "0", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "48"}
    done = start(
        *("--medusa_num_heads", "3"),
        **{"script": copy, "cwd": tmp_path, "shell": shell, "gpus": 8},
        programs={"scontrol": SCONTROL, "srun": srun},
        **job,
    )
    args = launch(*launcher_flags(done))[1]
    assert (args.nnodes, args.node_rank, args.rdzv_endpoint) == ("2", 1, "gpu07:24567")
    assert flags_of(done)[0].medusa_num_heads == 3
    assert done.stderr.startswith("--ntasks-per-node=1 --cpus-per-task=48 --kill-on-bad-exit=1 bash scripts/")


def test_batch_script_that_cannot_work(start, tmp_path):
    is_one_error(start(script=SLURM_SCRIPT), "not a SLURM job")
    job = SLURM_JOB | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    is_one_error(start(script=SLURM_SCRIPT, **job), "from the repository's root", str(tmp_path))


def test_sbatch_finds_its_options():
    """Only before the first command, and one task a node: the script itself starts a process per GPU."""
    head = SLURM_SCRIPT.read_text().split("set -eu")[0]
    options = dict(line.removeprefix("#SBATCH --").split("=") for line in head.splitlines() if "#SBATCH" in line)
    assert options["ntasks-per-node"] == "1"
    assert options.keys() >= {"nodes", "gpus-per-node", "cpus-per-task", "time", "output"}
