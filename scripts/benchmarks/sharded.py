"""Compare cuts of parameters that FSDP2 shards with the same cuts under DDP, and long runs with one process.

    python scripts/benchmarks/sharded.py --processes 2 4
    python scripts/benchmarks/sharded.py --processes 2 4 --long

Small models of three families, this package's and transformers', train by an unmodified Trainer on CPU processes over
gloo: 12 steps with cuts to 8 and to 4 states, the same data in the same order. Each way to shard is compared with DDP:
the largest difference of any weight, and of either moment of AdamW, at the end. With `--long`: 200 steps with four
cuts, and the largest relative difference of the training loss from one process with the same global batch.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from common import machine_line
from forked import import_all, start_ranks
from tqdm.auto import tqdm

from hf_compressm.report.text_tables import markdown_table

BATCH = 16
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
MODELS = {
    "mimo_ssm": ("mimo_ssm", {"dropout": 0.0, "hidden_size": 16, "num_hidden_layers": 2, "state_sizes": 16}),
    "own Mamba": ("compressm_mamba", SIZES | {"state_size": 16}),
    "own Mamba-2": ("compressm_mamba2", SIZES | HEADS | {"state_size": 16}),
    "stock Mamba": ("mamba", SIZES | {"state_size": 16}),
    "stock Mamba-2": ("mamba2", SIZES | HEADS | {"state_size": 16}),
}
WAYS = {
    "not wrapped": {"auto_wrap_policy": "NO_WRAP"},
    "by block": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
    "HSDP 2x2": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
    "native": None,
}


def make_model(name, folder, way):
    """A model of the given seed; natively sharded ones are loaded, since only loading shards them."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kind, fields = MODELS[name]
    auto = AutoModelForSequenceClassification if kind == "mimo_ssm" else AutoModelForCausalLM
    fields = fields | ({"num_channels": 1, "num_labels": 10} if kind == "mimo_ssm" else {})
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **fields))
    if way != "native":
        return model
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return auto.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=dist.get_world_size()))


def make_data(name):
    from datasets import Dataset

    generator = torch.Generator().manual_seed(7)
    if MODELS[name][0] == "mimo_ssm":
        values = torch.randn(128, 16, 1, generator=generator)
        labels = torch.randint(10, (128,), generator=generator)
        return Dataset.from_dict({"input_values": values.tolist(), "labels": labels.tolist()})
    ids = torch.randint(1, 40, (128, 16), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def job(name: str, way: str, folder: str, steps: int, cuts: list[int]) -> None:
    """One run, in one of its processes."""
    import torch.distributed as dist
    from accelerate.parallelism_config import ParallelismConfig
    from cpu_fsdp import grant_fsdp
    from torch.distributed.tensor import DTensor
    from transformers import Trainer, TrainingArguments

    from hf_compressm import CompreSSMCallback
    from hf_compressm.surgery import state_sizes, unwrap_optimizer

    def whole(tensor):
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    world = int(os.environ["WORLD_SIZE"])
    if world == 1:  # as a program that was started without a launcher
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[variable]
    torch.set_num_threads(1)
    grant_fsdp()
    options = {}
    if way in WAYS and way != "native":
        options = {"fsdp": True, "fsdp_config": {"fsdp_version": 2, **WAYS[way]}}
    if way.startswith("HSDP"):
        options["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    arguments = TrainingArguments(
        **{"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": BATCH // world, "seed": 0},
        **{
            "learning_rate": 1e-3 if steps > 100 else 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
        },
        **{"report_to": "none", "use_cpu": True, "disable_tqdm": True, **options},
    )
    callback = CompreSSMCallback(policy="target", target_state_size=4, cut_steps=cuts)
    model = make_model(name, folder, way).train()
    trainer = Trainer(model, arguments, train_dataset=make_data(name), callbacks=[callback])
    trainer.train()
    trained, state = trainer.model, unwrap_optimizer(trainer.optimizer).state
    result = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": {key: whole(p) for key, p in trained.named_parameters()},
        "moments": {
            f"{key} {kind}": whole(value)
            for key, p in trained.named_parameters()
            for kind, value in state[p].items()
            if value.ndim
        },
        "sizes": state_sizes(trained),
        "sharded": any(isinstance(p, DTensor) for p in trained.parameters()),
    }
    if trainer.is_world_process_zero():
        torch.save(result, Path(folder, "result.pt"))
    if dist.is_initialized():
        dist.destroy_process_group()


def start(name: str, way: str, processes: int, steps: int, cuts: list[int]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        run = start_ranks(processes, lambda: job(name, way, folder, steps, cuts), log)
        run.join()
        result = Path(folder, "result.pt")
        if run.exitcode or not result.exists():
            raise RuntimeError(f"{name}, {way}, {processes} processes failed:\n{log.read_text()}")
        found = torch.load(result)
    if found["sharded"] != (way in WAYS):
        raise RuntimeError(f"{name}, {way}: parameters are {'' if found['sharded'] else 'not '}sharded")
    return found


def apart(one: dict, other: dict) -> float:
    """Largest difference of any entry of tensors by name."""
    if one.keys() != other.keys():
        raise RuntimeError(f"different names: {sorted(one.keys() ^ other.keys())}")
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def ways(processes: int) -> list[str]:
    return [way for way in WAYS if processes == 4 or not way.startswith("HSDP")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--long", action="store_true", help="200 steps with four cuts, against one process")
    options = parser.parse_args()
    import_all()
    steps, cuts = (200, [20, 60, 100, 140]) if options.long else (12, [4, 8])
    rows = []
    for name in tqdm(options.models):
        alone = start(name, "ddp", 1, steps, cuts) if options.long else None
        for processes in options.processes:
            against = alone or start(name, "ddp", processes, steps, cuts)
            for way in [way for way in ways(processes) if way in options.ways]:
                found = start(name, way, processes, steps, cuts)
                if found["sizes"] != against["sizes"]:
                    raise RuntimeError(f"{name}, {way}: states {found['sizes']}, not {against['sizes']}")
                losses = zip(found["losses"], against["losses"], strict=True)
                cells = [f"{max(abs(a - b) / b for a, b in losses):.1e}"]
                if not options.long:
                    cells += [f"{apart(found[kind], against[kind]):.1e}" for kind in ("weights", "moments")]
                rows.append([name, processes, way, *cells, found["sizes"]])
                tqdm.write(str(rows[-1]))
    columns = ["model", "processes", "sharded", "loss", *([] if options.long else ["weights", "moments"]), "states"]
    print(markdown_table(columns, rows))
    print(machine_line())


if __name__ == "__main__":
    main()
