"""Started by test_fsdp_adapters.py on several ranks: LoRA or DoRA is trained with cuts, saved, and goes on.

Each job is a mapping: `folder`, `format` of FSDP2's checkpoints (none: plain DDP), `resume` (a checkpoint), `dora`.
What is left of each, whole, goes to FOLDER/result.pt, and the model to FOLDER/model and FOLDER/base.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from fsdp_training import data, whole
from gloo_fsdp import grant_fsdp
from peft import LoraConfig, get_peft_model
from selective_models import OWN, make
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, save_base_model
from hf_compressm.surgery import history, state_sizes, unwrap_optimizer
from hf_compressm.training import DurableCheckpoints, whole_model


def train(job):
    given = {
        **{"output_dir": job["folder"], "max_steps": 8, "per_device_train_batch_size": 2, "logging_steps": 1},
        **{"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 4, "report_to": "none", "use_cpu": True},
        **{"disable_tqdm": True, "seed": 0},
    }
    if "format" in job:
        given |= {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "fsdp_state_dict_type": job["format"]}}
    torch.manual_seed(0)
    options = {"use_dora": job.get("dora", False), "task_type": "CAUSAL_LM"}
    config = LoraConfig(r=4, target_modules=["x_proj", "in_proj"], lora_dropout=0.0, **options)
    model = get_peft_model(make(OWN, "mamba"), config).train()
    callbacks = [CompreSSMCallback(policy="target", target_state_size=2, cut_steps=[2, 6]), DurableCheckpoints()]
    trainer = Trainer(model, TrainingArguments(**given), train_dataset=data("mamba"), callbacks=callbacks)
    error = ""
    try:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    except (OSError, ValueError) as problem:
        error = str(problem)
    state = unwrap_optimizer(trainer.optimizer).state
    named = dict(trainer.model.named_parameters())
    result = {
        "error": error,
        "weights": {name: whole(p) for name, p in named.items()},
        "moments": {f"{n} {k}": whole(v) for n, p in named.items() for k, v in state.get(p, {}).items() if v.ndim},
        "sizes": state_sizes(trainer.model),
        "history": history(trainer.model),
    }
    if not error:
        save_base_model(trainer.model, os.path.join(job["folder"], "base"))
        with whole_model(trainer):
            trainer.save_model(os.path.join(job["folder"], "model"))
    os.makedirs(job["folder"], exist_ok=True)
    torch.save(result, os.path.join(job["folder"], f"result{trainer.args.process_index}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    grant_fsdp()
    for each in json.loads(sys.argv[1]):
        train(each)
    dist.destroy_process_group()
