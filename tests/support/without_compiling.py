"""Runs a script as `python FILE` does, without the collective that DeepSpeed would compile for it on a CPU."""

from __future__ import annotations

import os
import runpy
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
