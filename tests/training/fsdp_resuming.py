"""Started by test_fsdp_resume.py under torchrun: trainings under FSDP2, one after the other, that save and resume.

Each job is a mapping: `folder`, `format` of FSDP2's checkpoints (none: plain DDP), `resume` (a checkpoint), `best`,
`compiled`. What is left of each, whole, goes to FOLDER/result.pt.
"""

import argparse
import json
import os

import torch
import torch.distributed as dist
from fsdp_training import data, whole
from gloo_fsdp import grant_fsdp
from selective_models import OWN, make
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_compressm import CompreSSMCallback
from hf_compressm.surgery import history, state_sizes, unwrap_optimizer
from hf_compressm.training import DurableCheckpoints


class WorseAtTheEnd(TrainerCallback):
    """Lets the first evaluation be the best, whatever the model does."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


def train(job):
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    given = {
        **{"output_dir": job["folder"], "max_steps": 12, "per_device_train_batch_size": 4 // world, "logging_steps": 1},
        **{"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 6, "report_to": "none", "use_cpu": True},
        **{"disable_tqdm": True, "lr_scheduler_type": "linear", "seed": 0},
    }
    if job.get("best"):
        given |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 6}
    if "format" in job:
        settings = {"fsdp_version": 2, "fsdp_state_dict_type": job["format"]}
        given |= {"fsdp": True, "fsdp_config": settings}
    if job.get("compiled"):
        given |= {"torch_compile": True, "torch_compile_backend": "eager"}
    callback = CompreSSMCallback(policy="target", target_state_size=2, cut_steps=[4, 9])
    torch.manual_seed(0)
    model = make(OWN, "mamba").train()
    trainer = Trainer(
        model,
        TrainingArguments(**given),
        train_dataset=data("mamba"),
        eval_dataset=data("mamba").select(range(4)),
        callbacks=[WorseAtTheEnd(), callback, DurableCheckpoints()],
    )
    result = {"error": ""}
    try:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    except (OSError, ValueError) as error:
        result["error"] = str(error)
    trained, optimizer = trainer.model, unwrap_optimizer(trainer.optimizer)
    if not result["error"]:
        state = {name: optimizer.state[p] for name, p in trained.named_parameters()}
        result |= {
            "weights": {name: whole(p) for name, p in trained.named_parameters()},
            "moments": {f"{n} {k}": whole(v) for n, entries in state.items() for k, v in entries.items() if v.ndim},
            "sizes": state_sizes(trained),
            "history": history(trained),
            "sharded": any(isinstance(p, DTensor) for p in trained.parameters()),
        }
    os.makedirs(job["folder"], exist_ok=True)
    torch.save(result, os.path.join(job["folder"], f"result{trainer.args.process_index}.pt"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", help="a JSON list")
    torch.set_num_threads(1)
    grant_fsdp()
    for job in json.loads(parser.parse_args().jobs):
        train(job)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
