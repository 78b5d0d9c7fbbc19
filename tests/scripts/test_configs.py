"""configs/: accelerate reads every key of each."""

import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}
FSDP2 = FSDP | {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
FSDP1 = FSDP | {
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
}
HSDP = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}


@pytest.mark.parametrize(
    ("name", "launcher", "flags", "wanted"),
    [
        ("fsdp2", "multi_gpu_launcher", ("--num_processes", "8"), FSDP2),
        ("fsdp1", "multi_gpu_launcher", ("--num_processes", "8"), FSDP1),
        ("fsdp2_multi_node", "multi_gpu_launcher", ("--num_processes", "16"), FSDP2 | HSDP),
        ("single_gpu", "simple_launcher", (), {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ("cpu", "multi_gpu_launcher", ("--num_processes", "2"), {"ACCELERATE_MIXED_PRECISION": "no"}),
    ],
)
def test_accelerate_reads_each_config(launch, name, launcher, flags, wanted):
    words = ("--config_file", f"configs/{name}.yaml", "--main_process_port", "0", *flags, "train.py")
    taken, args, environment = launch(*words)
    assert taken == launcher and {key: environment.get(key) for key in wanted} == wanted
    assert ("ACCELERATE_USE_FSDP" in environment) == ("FSDP_VERSION" in wanted)
    assert ("ACCELERATE_USE_PARALLELISM_CONFIG" in environment) == (name == "fsdp2_multi_node")
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment  # the model names its units itself
    assert args.num_machines == (2 if name == "fsdp2_multi_node" else 1) and not args.downcast_bf16


def test_every_config_is_tested_and_has_no_key_that_accelerate_ignores():
    """Of the sections it takes any key, and passes over those it does not know."""
    assert [path.stem for path in CONFIGS] == ["cpu", "fsdp1", "fsdp2", "fsdp2_multi_node", "single_gpu"]
    options = vars(accelerate_launch.launch_command_parser().parse_args(["train.py"]))
    for path in CONFIGS:
        config = yaml.safe_load(path.read_text())
        for section in ("fsdp_config", "parallelism_config"):
            assert set(config.get(section, {})) <= set(options), path
        # A default of the launcher that is not None hides the file's value (rdzv_backend, same_network).
        apart = {"mixed_precision", "distributed_type", "fsdp_config", "parallelism_config"}
        assert all(options.get(key) is None for key in set(config) - apart), path
        assert path.read_text().startswith("# ")


def test_the_number_of_gpus_is_not_in_a_config_that_several_share(launch):
    for name in ("fsdp2", "fsdp1", "fsdp2_multi_node", "cpu"):
        with pytest.raises(ValueError, match="num_processes"):
            launch("--config_file", f"configs/{name}.yaml", "train.py")
