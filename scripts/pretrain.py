"""Train a state-space model that shrinks while it trains.

    accelerate launch scripts/pretrain.py configs/runs/digits_mimo_ssm.yaml
    accelerate launch scripts/pretrain.py configs/runs/digits_mimo_ssm.yaml --tau 0.05 --seed 1 --output_dir outputs/s1
    accelerate launch scripts/pretrain.py configs/runs/digits_mimo_ssm.yaml --no_compress --output_dir outputs/full
    accelerate launch scripts/pretrain.py configs/runs/digits_mimo_ssm.yaml --model '{"state_sizes": 64}'
    accelerate launch scripts/pretrain.py configs/runs/digits_mimo_ssm.yaml --resume_from_checkpoint true
    python scripts/pretrain.py --list-tasks
    python scripts/pretrain.py --help text
    accelerate launch scripts/pretrain.py CONFIG.yaml --import my_tasks.py

The file holds fields of RunArguments, TrainingArguments and CompressionConfig, and a mapping `model` with fields of the
model's config. Every field is an option too; `--help` lists them. `--help TASK` lists the options of a task, which are
under `task_options`. The output folder gets the model and its config, train_results.json, test_results.json and
compression.json, which holds the history of cuts.

If something that was given is wrong, standard error says what in one line and the exit code is 2; `--traceback` also
shows where.
"""

import sys

from hf_compressm.runs.arguments import errors_as_lines
from hf_compressm.runs.pretraining import parse_run, run_pretraining, summary


def main(argv: list[str]) -> None:
    with errors_as_lines(argv) as words:
        run = parse_run(words)
        result = run_pretraining(run)
    if run.training.process_index == 0:
        print(f"\n{summary(result)}\nsaved to {run.training.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
