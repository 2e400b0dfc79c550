"""Started by test_fsdp.py under torchrun: one training by an unmodified Trainer with the callback, however distributed.

It writes what is left of it, whole, to OUTPUT/result.pt: losses, weights, moments, sizes and the history.
"""

import argparse
import json
import os
import tempfile

import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from gloo_fsdp import grant_fsdp
from helpers import small_data, small_model
from selective_models import OWN, STOCK, make
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_compressm import CompreSSMCallback
from hf_compressm.surgery import history, state_sizes, unwrap_optimizer

MODELS = {
    "mamba": lambda: make(OWN, "mamba"),
    "mamba2": lambda: make(OWN, "mamba2"),
    "lru": small_model,
    "stock-mamba": lambda: make(STOCK, "mamba"),
    "stock-mamba2": lambda: make(STOCK, "mamba2"),
}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def data(name):
    if name == "lru":
        return small_data(128)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 40, (128, 16), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def arguments(options):
    given = {
        **{"output_dir": options.output, "max_steps": 16, "per_device_train_batch_size": 4, "logging_steps": 1},
        **{"learning_rate": 1e-2, "save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": 0},
        **{"disable_tqdm": True, "lr_scheduler_type": "constant"},
    }
    given |= json.loads(options.arguments)
    if options.way in ("fsdp", "hsdp"):
        given |= {"fsdp": True, "fsdp_config": {"fsdp_version": 2} | json.loads(options.fsdp)}
    if options.way == "hsdp":
        given["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    return TrainingArguments(**given)


def sharded_while_loading(model):
    """Saved, and loaded again by transformers with its own sharding."""
    dist.init_process_group("gloo")
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    if dist.get_rank() == 0:
        model.save_pretrained(shared[0])
    dist.barrier()
    return type(model).from_pretrained(shared[0], distributed_config=DistributedConfig(fsdp_size=2)).train()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=["ddp", "fsdp", "hsdp", "native"])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("output")
    parser.add_argument("--arguments", default="{}", help="of the training, as JSON")
    parser.add_argument("--fsdp", default="{}", help="fsdp_config, as JSON")
    parser.add_argument("--callback", default="{}", help="settings of the callback, as JSON")
    parser.add_argument("--resume", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    grant_fsdp()
    settings = {"policy": "target", "target_state_size": 2, "window_start": 0.3, "window_end": 0.7, "attempts": 2}
    callback = CompreSSMCallback(**settings | json.loads(options.callback))
    torch.manual_seed(0)
    model = MODELS[options.model]().train()
    if options.way == "native":
        model = sharded_while_loading(model)
    trainer = Trainer(model, arguments(options), train_dataset=data(options.model), callbacks=[callback])
    trainer.train(resume_from_checkpoint=options.resume)
    trained, optimizer = trainer.model, unwrap_optimizer(trainer.optimizer)
    result = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": {name: whole(p) for name, p in trained.named_parameters()},
        "moments": {
            f"{name} {key}": whole(value)
            for name, p in trained.named_parameters()
            for key, value in optimizer.state[p].items()
            if value.ndim
        },
        "sizes": state_sizes(trained),
        "history": history(trained),
        "sharded": any(isinstance(p, DTensor) for p in trained.parameters()),
        "compiled": "_orig_mod" in trained._modules or any(m._compiled_call_impl for m in trained.modules()),
    }
    if trainer.is_world_process_zero():
        os.makedirs(options.output, exist_ok=True)
        torch.save(result, os.path.join(options.output, "result.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
