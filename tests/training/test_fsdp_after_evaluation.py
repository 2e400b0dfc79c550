"""A cut right after an evaluation, which leaves the outermost unit of a sharded model gathered."""

import pytest
import torch
import torch.distributed as dist
from selective_models import IDS, OWN, make
from torch.distributed.fsdp import fully_shard

from hf_compressm import compress, state_sizes


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
