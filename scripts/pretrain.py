"""Train a state-space model that shrinks while it trains.

    accelerate launch scripts/pretrain.py configs/runs/digits_mimo_ssm.yaml
    accelerate launch scripts/pretrain.py configs/runs/digits_mimo_ssm.yaml --tau 0.05 --seed 1 --output_dir outputs/s1
    accelerate launch scripts/pretrain.py configs/runs/digits_mimo_ssm.yaml --no_compress --output_dir outputs/full
    accelerate launch scripts/pretrain.py configs/runs/digits_mimo_ssm.yaml --model '{"state_sizes": 64}'
    accelerate launch scripts/pretrain.py configs/runs/digits_mimo_ssm.yaml --resume_from_checkpoint true

The file holds fields of RunArguments, TrainingArguments and CompressionConfig, and a mapping `model` with fields of the
model's config. Every field is an option too; `--help` lists them. The output folder gets the model and its config,
train_results.json, test_results.json and compression.json, which holds the history of cuts.
"""

import sys

from hf_compressm.runs.pretraining import execute, parse_run, summary


def main(argv: list[str]) -> None:
    try:
        run = parse_run(argv)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    result = execute(run)
    if run.training.process_index == 0:
        print(f"\n{summary(result)}\nsaved to {run.training.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
