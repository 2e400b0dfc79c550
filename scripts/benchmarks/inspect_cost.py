"""Measure time and peak memory of `hf-compressm inspect` on a random model of Mamba-130m's shape, calibrated on text.

    python scripts/benchmarks/inspect_cost.py
    python scripts/benchmarks/inspect_cost.py --batches 8 --length 512

The model (24 layers, hidden size 768, 16 states, 50,280 tokens) and its tokenizer, which is trained on the source of
Python's standard library, are made first; what is measured is the command, from its start to its end.
"""

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from hf_compressm.report import describe_environment

VOCABULARY = 50280
PROGRAM = "from hf_compressm.cli import main; main()"


def make_model(folder: Path, layers: int) -> None:
    """A random Mamba of this depth, and a byte-level BPE tokenizer, in a folder."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=768, state_size=16, num_hidden_layers=layers)
    MambaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator([text().read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def text() -> Path:
    """A long file that every Python has."""
    return Path(sysconfig.get_paths()["stdlib"]) / "_pydecimal.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batches", type=int, help="Default: the command's own.")
    parser.add_argument("--batch-size", type=int, help="Default: the command's own.")
    parser.add_argument("--length", type=int, help="Default: the command's own.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_model(folder, given.layers)
        options = [
            f"--{key.replace('_', '-')}={value}" for key, value in vars(given).items() if value and key != "layers"
        ]
        command = [sys.executable, "-c", PROGRAM, "inspect", str(folder), "--data", str(text()), "--json", *options]
        began = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - began
    found = json.loads(done.stdout)["layers"]
    assert len(found) == given.layers and all(layer["states"] == 16 for layer in found)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, busy = used.ru_maxrss / 2**20, used.ru_utime + used.ru_stime
    environment = describe_environment()
    print(f"{len(found)} layers: {seconds:.1f} s, {busy:.1f} s of processor time, {peak:.2f} GiB at the most")
    print(json.dumps({"options": options, **environment}))


if __name__ == "__main__":
    main()
