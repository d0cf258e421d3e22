"""Runs the few-shot recipe with its command line, while accelerate takes the CPU for an accelerator: FSDP2 shards."""

import runpy

from backend_launch import TESTS
from backend_run import cpu_as_accelerator
from torch import distributed as dist

if __name__ == "__main__":
    dist.init_process_group("gloo")
    with cpu_as_accelerator():
        runpy.run_path(str(TESTS.parent / "recipes" / "roberta_fewshot.py"), run_name="__main__")
