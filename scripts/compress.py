"""Compress a trained model: the command `hf-compressm compress`, without installing it.

    python scripts/compress.py MODEL --data stdlib_bytes --target-state-size 8 --output outputs/small --evaluate
    python scripts/compress.py MODEL --data mqar --task-options '{"num_kv_pairs": 8}' --tau 0.05 --output outputs/small
    python scripts/compress.py state-spaces/mamba-130m-hf --data corpus.txt --target-state-size 8 --output outputs/small
    python scripts/compress.py outputs/digits --fraction 0.25 --output outputs/small
    python scripts/compress.py outputs/mamba --data corpus.parquet --tau 0.1 --to-stock --output outputs/plain

MODEL is a folder or a name on the hub: a causal language model or sequence classifier of this package or of
transformers (Mamba, FalconMamba, Mamba-2, Bamba, Jamba and kin). Data are a registered task, or text that is read with
the model's own tokenizer; MIMO SSM models need none. `--help` lists all options. The output folder gets the model, its
config, tokenizer and compression.json, which holds the settings and what each layer lost.
"""

import sys

from hf_compressm.cli import main

if __name__ == "__main__":
    main(["compress", *sys.argv[1:]])
