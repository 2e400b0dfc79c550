"""Score a saved model, or a PEFT adapter on its base, on a task; prints JSON.

    python scripts/evaluate_model.py outputs/stdlib_mamba --data stdlib_bytes
    python scripts/evaluate_model.py outputs/digits --data digits --split validation --output scores.json
    python scripts/evaluate_model.py state-spaces/mamba-130m-hf --data corpus.txt --length 256
    torchrun --nproc_per_node 2 scripts/evaluate_model.py outputs/stdlib_mamba --data stdlib_bytes
    accelerate launch --multi_gpu scripts/evaluate_model.py outputs/stdlib_mamba --data stdlib_bytes

Metrics are those of the task, computed with `evaluate`; each process takes its own part of the split, and nothing is
counted twice. `--help` lists all options. Errors are as in pretrain.py.
"""

import json
import sys

from accelerate import PartialState

from hf_compressm.runs.arguments import errors_as_lines
from hf_compressm.runs.evaluation import parse_evaluation, run_evaluation


def main(argv: list[str]) -> None:
    with errors_as_lines(argv) as words:
        result = run_evaluation(parse_evaluation(words))
    if PartialState().is_main_process:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
