"""Started under torchrun by test_fsdp_scripts.py: runs a script with FSDP2 granted on CPUs.

    torchrun --nproc_per_node 2 tests/training/fsdp_script.py SCRIPT [ARGUMENT ...]
"""

import runpy
import sys

from gloo_fsdp import grant_fsdp

if __name__ == "__main__":
    grant_fsdp()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
