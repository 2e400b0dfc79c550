"""The shipped launch files: accelerate's own loader and launcher accept them."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
# file: (distributed type, machines, processes, on the CPU)
EXPECTED = {
    "cpu.yaml": ("NO", 1, 1, True),
    "single_gpu.yaml": ("NO", 1, 1, False),
    "multi_gpu.yaml": ("MULTI_GPU", 1, 2, False),
    "multi_node.yaml": ("MULTI_GPU", 2, 16, False),
    "fsdp2.yaml": ("FSDP", 1, 2, False),
    "hsdp.yaml": ("FSDP", 1, 4, False),
}
PRECISION = {"NO": "no", "MULTI_GPU": "no", "FSDP": "bf16"}


def test_every_file_is_checked():
    assert {file.name for file in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_loads(name):
    config = load_config_from_file(str(FOLDER / name))
    assert isinstance(config, ClusterConfig)
    found = (config.distributed_type.value, config.num_machines, config.num_processes, config.use_cpu)
    assert found == EXPECTED[name]
    assert config.mixed_precision == PRECISION[found[0]], "no, unquoted, YAML reads as False"


@pytest.mark.parametrize("name", EXPECTED)
def test_the_launcher_takes_the_file_and_the_command_line_wins(name):
    command = ["--config_file", str(FOLDER / name), "--machine_rank", "0", "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    kind, machines, processes, on_cpu = EXPECTED[name]
    assert (args.num_machines, args.num_processes, args.use_cpu) == (machines, processes, on_cpu)
    assert args.multi_gpu == (kind == "MULTI_GPU") and args.mixed_precision == PRECISION[kind]

    command[2:2] = ["--num_processes", "4"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert args.num_processes == 4
