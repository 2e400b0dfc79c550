"""Sharded models on one rank, in this process: a cut right after an evaluation, and an optimizer that is refused."""

import pytest
import torch
import torch.distributed as dist
from selective_models import IDS, OWN, make
from torch.distributed.fsdp import fully_shard
from transformers import Adafactor

from hf_compressm import compress, state_sizes
from hf_compressm.training.distributed import refuse_optimizer


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_an_evaluation_leaves_gathered_is_cut(one_rank):
    model = make(OWN, "mamba").train()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model(IDS)
    compress(model, {"input_ids": IDS}, target=4, optimizer=optimizer, refit_steps=0)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert sum(state_sizes(model)) == 4 * 3 and all(id(parameter) in held for parameter in model.parameters())


def test_adafactor_of_transformers_is_refused_where_it_would_fail(one_rank):
    model = make(OWN, "mamba").train()
    refuse_optimizer(model, Adafactor(model.parameters()))
    fully_shard(model)
    refuse_optimizer(model, torch.optim.AdamW(model.parameters()))
    optimizer = Adafactor(model.parameters())
    with pytest.raises(NotImplementedError, match="cannot step parameters that FSDP2 shards"):
        refuse_optimizer(model, optimizer)
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):  # once this passes, the refusal can go
        optimizer.step()
