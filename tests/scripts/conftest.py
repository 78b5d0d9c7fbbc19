"""What accelerate makes of a command line."""

import pytest
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from conftest import ROOT


@pytest.fixture
def launch(monkeypatch):
    """What accelerate makes of a command line: the launcher it takes, its arguments, the processes' environment."""
    monkeypatch.chdir(ROOT)

    def run(*words):
        taken = []

        def take(name, prepare):
            monkeypatch.setattr(accelerate_launch, name, lambda args: taken.append((name, args, prepare(args))))

        take("multi_gpu_launcher", prepare_multi_gpu_env)
        take("simple_launcher", lambda args: prepare_simple_launcher_cmd_env(args)[1])
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(words))
        return taken[0]

    return run
