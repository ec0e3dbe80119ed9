"""Every script in examples/, run as its first lines say, finds the fault that it has planted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import deepspeed_support as support
import fork_server
from paths import TESTS

FOLDER = Path(__file__).parent.parent / "examples"
WEIGHT = ["weights_nonfinite", "parameter 0.weight[3, 5]: 1 NaN of 128 values"]
EXPECTED = {
    "plain_pytorch": WEIGHT,
    "with_accelerate": WEIGHT,
    "with_ddp": [*WEIGHT, "rank 1"],
    "with_deepspeed": WEIGHT,
    "with_fsdp2": ["input_nonfinite", "input[2, 5]: 1 NaN of 32 values", "rank 1"],
    "with_grad_scaler": WEIGHT,
    "with_hf_and_deepspeed": WEIGHT,
    "with_hf_trainer": WEIGHT,
    "with_lightning": ["weights_nonfinite", "parameter net.0.weight[3, 5]: 1 NaN of 128 values"],
    "with_trackers": ["step,loss,loss_scale", "\n3,", ",0,1,0\n"],
}
LAUNCHED = {"with_ddp"}  # by torchrun, for which every process is a fresh one: one script proves that
OF_TWO_RANKS = {"with_fsdp2"}
OWN_TESTS = {"demo"}


def test_every_script_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == EXPECTED.keys() | OWN_TESTS


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - OF_TWO_RANKS))
def test_a_script(name, tmp_path):
    port = support.free_port()
    # The launcher starts fresh processes; of the others, one does.
    python = [sys.executable] if name == "plain_pytorch" or name in LAUNCHED else fork_server.command()
    launcher = (
        ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"] if name in LAUNCHED else []
    )
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    }
    runner = [str(TESTS / "support" / "without_compiling.py")] if "deepspeed" in name else []
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(port), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*python, *launcher, *runner, str(FOLDER / f"{name}.py")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert_told(done.stdout, name)


@pytest.mark.parametrize("name", sorted(OF_TWO_RANKS))
def test_a_script_on_two_ranks(name, tmp_path):
    path, port = FOLDER / f"{name}.py", support.free_port()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": tmp_path}
    ranks = [support.start_rank(path, rank, 2, port, **streams) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert_told("".join(written for written, _ in outputs), name)


def assert_told(output, name):
    for text in EXPECTED[name]:
        assert text in output
