"""Started under torchrun by test_fsdp_scripts.py, with a script and its arguments: runs it with FSDP2 on CPUs."""

import runpy
import sys

from gloo_fsdp import grant_fsdp

if __name__ == "__main__":
    grant_fsdp()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
