"""Cut a trained state-space model and heal it with LoRA.

    accelerate launch scripts/finetune.py configs/runs/finetune/stdlib_mamba.yaml --model outputs/stdlib_mamba
    accelerate launch scripts/finetune.py --model state-spaces/mamba-130m-hf --data corpus.txt --target_state_size 8 \\
        --max_steps 200 --learning_rate 1e-3 --lora '{"r": 8, "use_dora": true}' --output_dir outputs/healed
    accelerate launch scripts/finetune.py CONFIG --no_merge --output_dir outputs/adapter
    accelerate launch scripts/finetune.py CONFIG --push_to_hub --hub_model_id NAME/MODEL

The file holds fields of FinetuneArguments and TrainingArguments, and mappings `lora` (fields of peft.LoraConfig) and
`task_options`. Every field is an option too; `--help` lists them. Without an amount to cut the model keeps its size.
The output folder gets the merged model, its config, and finetuning.json with the scores before the cut, after it, and
healed. Errors are as in pretrain.py.
"""

import sys

from hf_compressm.runs.arguments import errors_as_lines
from hf_compressm.runs.finetuning import parse_finetune, run_finetuning, summary


def main(argv: list[str]) -> None:
    with errors_as_lines(argv) as words:
        run = parse_finetune(words)
        result = run_finetuning(run)
    if run.training.process_index == 0:
        print(f"\n{summary(result)}\nsaved to {run.training.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
