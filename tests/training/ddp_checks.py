"""Started by test_distributed.py under torchrun: checks that need several processes but no Trainer."""

import copy

import delta_models
import own_delta_models
import own_minimax_models
import torch
import torch.distributed as dist
from selective_models import IDS, OWN, make
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from hf_compressm import Target
from hf_compressm.surgery import CutSettings, ReductionError, apply_plan, make_plan
from hf_compressm.surgery.processes import ProcessTeam, decided_by_rank_0
from hf_compressm.training import rebuild_reducer, verify_replicas


def expect(error, message, work):
    try:
        work()
    except error as raised:
        assert message in str(raised), raised
    else:
        raise AssertionError(f"no {error.__name__}: {message}")


def gather(model, ids):
    return ProcessTeam().gather(model, {"input_ids": ids}, None, fast_ops=True)


def only_rank_0_may_fail(rank):
    def fail():
        raise ValueError(f"decided on rank {rank}")

    assert decided_by_rank_0(lambda: rank) == 0
    expect(ValueError, "decided on rank 0", lambda: decided_by_rank_0(fail))


def one_bad_rank_stops_all(rank):
    model = make(OWN, "mamba")
    with torch.no_grad():
        if rank == 1:
            model.backbone.embeddings.weight[:] = torch.nan
    expect(ReductionError, "NaN", lambda: gather(model, IDS))


def statistics_are_those_of_all_batches(rank):
    model = make(OWN, "mamba")
    together = gather(model, IDS[rank : rank + 1])
    name, found = next(iter(together.items()))
    whole = gather(model, IDS)[name]
    assert found.tokens * dist.get_world_size() == whole.tokens
    assert torch.allclose(2 * found.states, whole.states)


MATRIX_STATES = {
    "qwen3_5": lambda: delta_models.make("qwen3_5"),
    "olmo_hybrid": lambda: delta_models.make("olmo_hybrid"),
    "own": own_delta_models.own,
    "own_minimax": own_minimax_models.own,
}
"""Hybrids with attention: stock ones lose key channels, this package's get two matrices."""


def cuts_of_matrix_states_are_those_of_one_process(rank, make_model):
    model = make_model()
    alone, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = CutSettings(Target(4))
    plan = make_plan(model, settings=settings, calibration={"input_ids": IDS[rank : rank + 1]}, team=ProcessTeam())
    expected = make_plan(alone, settings=settings, calibration={"input_ids": IDS})
    assert plan.cuts and [one.new_size for one in plan.layers] == [one.new_size for one in expected.layers]
    apply_plan(model, optimizer, plan)
    apply_plan(alone, None, expected)
    verify_replicas(model, optimizer)
    for (name, one), two in zip(model.named_parameters(), alone.parameters(), strict=True):
        # Sums over ranks are rounded otherwise than one sum; a basis is a function of them.
        assert torch.allclose(one, two, atol=1e-4), name


def training_goes_on_equal_after_a_cut(rank, make_model=lambda: make(OWN, "mamba2"), **options):
    model = make_model().train()
    ddp = DistributedDataParallel(model, **options)
    ddp.register_comm_hook(None, fp16_compress_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(8):
        if step in (3, 5):
            plan = make_plan(model, calibration={"input_ids": IDS}, team=ProcessTeam())
            apply_plan(model, optimizer, plan)
            rebuild_reducer(ddp)
            assert plan.cuts or step == 5
        ddp(IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        verify_replicas(model, optimizer)
    assert len(ddp._comm_hooks) == 1


def a_difference_is_named(rank):
    model = make(OWN, "mamba")
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log[3, 2] += 1e-6 * rank
    expect(RuntimeError, "rank 1 and rank 0 differ in backbone.layers.1.mixer.A_log", lambda: verify_replicas(model))


def buffers_are_each_ranks_own(rank):
    model = make(OWN, "mamba")
    model.register_buffer("running_mean", torch.full((3,), float(rank)))
    verify_replicas(model)


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    for check in (only_rank_0_may_fail, one_bad_rank_stops_all, statistics_are_those_of_all_batches):
        check(rank)
    for make_model in MATRIX_STATES.values():
        cuts_of_matrix_states_are_those_of_one_process(rank, make_model)
        training_goes_on_equal_after_a_cut(rank, make_model)
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        training_goes_on_equal_after_a_cut(rank, **options)
    a_difference_is_named(rank)
    buffers_are_each_ranks_own(rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
