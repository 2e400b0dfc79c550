"""Started by test_fsdp.py under torchrun: cuts of sharded models in hand-written loops, and what must not go wrong."""

import copy
import sys

import delta_models
import own_delta_models
import torch
import torch.distributed as dist
from ddp_checks import expect
from fsdp_training import whole
from peft import LoraConfig, get_peft_model
from selective_models import IDS, OWN, STOCK, make
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from hf_compressm import SizeConstraints, compress
from hf_compressm.surgery import ReductionError, find_mixers, make_plan, resize_mixers, shards, state_sizes
from hf_compressm.surgery.processes import ProcessTeam
from hf_compressm.training import verify_replicas

MODELS = {
    "own mamba": lambda: make(OWN, "mamba"),
    "own mamba2": lambda: make(OWN, "mamba2"),
    "stock mamba": lambda: make(STOCK, "mamba"),
    "stock mamba2": lambda: make(STOCK, "mamba2"),
    "own gated delta": own_delta_models.own,
    "stock qwen3_5": lambda: delta_models.make("qwen3_5"),
}
FREE = SizeConstraints(multiple_of=1)


def shard(model, wrap="block", **options):
    """Shard each block with a mixer, each mixer, or nothing, and then the rest."""
    for site in find_mixers(model):
        path = {"block": site.name.rpartition(".")[0], "mixer": site.name}.get(wrap)
        if path is not None:
            fully_shard(model.get_submodule(path), **options)
    return fully_shard(model, **options)


def trained(model, sizes, steps=8, ids=IDS, refit_steps=0, **options):
    """The model and its optimizer after some steps with a cut before each of those named."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options |= {"optimizer": optimizer, "constraints": FREE, "refit_steps": refit_steps}
    for step in range(steps):
        if step in sizes:
            compress(model, {"input_ids": ids}, target=sizes[step], **options)
            verify_replicas(model, optimizer)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def difference(sharded, plain):
    """The largest one of any weight or moment."""
    (model, optimizer), (other, its_optimizer) = sharded, plain
    assert state_sizes(model) == state_sizes(other)
    worst = 0.0
    for (name, one), (its_name, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == its_name
        pairs = [(one, two)]
        pairs += [(optimizer.state[one][key], value) for key, value in its_optimizer.state.get(two, {}).items()]
        worst = max([worst, *(float((whole(a) - b.detach()).abs().max()) for a, b in pairs)])
    return worst


def cuts_are_those_of_one_process(name, wrap, sizes=None, build=None, **options):
    sizes = sizes or {3: 4, 5: 2}
    model = (build or MODELS[name])().train()
    alone = copy.deepcopy(model)
    sharding = {name: options.pop(name) for name in ("mesh", "reshard_after_forward") if name in options}
    found = trained(shard(model, wrap, **sharding), sizes, **options)
    worst = difference(found, trained(alone, sizes, **options))
    assert worst <= 2e-6, f"{name} {wrap}: {worst}"


def adapted(dora):
    def build():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["x_proj", "in_proj"], use_dora=dora, lora_dropout=0.0)
        return get_peft_model(make(OWN, "mamba"), config)

    return build


def a_replaced_parameter_is_noticed(trained_before):
    model = shard(make(OWN, "mamba").train())
    if trained_before:
        model(IDS, labels=IDS).loss.backward()
        model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters())
    mixer = find_mixers(model)[0].mixer
    held = mixer.A_log
    mixer.A_log = nn.Parameter(held.full_tensor())
    expect(RuntimeError, "A_log is not the parameter that FSDP gathers", lambda: verify_replicas(model, optimizer))
    mixer.A_log = held
    verify_replicas(model, optimizer)
    optimizer.param_groups[0]["params"].pop()
    expect(RuntimeError, "is trained but not in the optimizer", lambda: verify_replicas(model, optimizer))


def replicas_that_differ_are_noticed(mesh):
    model = shard(make(OWN, "mamba").train(), mesh=mesh)
    verify_replicas(model)
    if dist.get_rank() == 3:
        with torch.no_grad():
            find_mixers(model)[1].mixer.A_log.to_local()[0, 0] += 1e-6
    expect(RuntimeError, "rank 3 and rank 1 differ in backbone.layers.1.mixer.A_log", lambda: verify_replicas(model))


def a_rank_that_fails_ends_all(rank):
    model = shard(make(OWN, "mamba"))
    bad = IDS.clone()
    if rank == 1:
        bad[0, 3] = 10_000  # an index error in the embedding, after the first gathering
    for _ in range(2):
        expect(IndexError, "index out of range", lambda: make_plan(model, calibration=[{"input_ids": bad}]))
    hook = None
    if rank == 1:  # in the middle of the model
        hook = find_mixers(model)[1].mixer.register_forward_pre_hook(fail)
    expect(ReductionError, "in the middle", lambda: make_plan(model, calibration=[{"input_ids": IDS}] * 2))
    if hook is not None:
        hook.remove()
    expect(
        TypeError if rank < 0 else ValueError, "", lambda: make_plan(model, calibration=[{"wrong": IDS}] * (rank + 1))
    )
    assert make_plan(model, calibration=[{"input_ids": IDS}]).layers  # and afterwards it works


def a_rank_that_fails_in_code_that_hides_errors_ends_all(rank):
    model = shard(make(OWN, "mamba"))
    calls = []

    def run(batch):
        calls.append(batch)
        model(input_ids=batch["other"].clamp(max=10_000 if rank == 1 else 40))

    batches = [{"other": torch.full_like(IDS, 10_000)}]
    team = ProcessTeam(otherwise=lambda model: run)
    for _ in range(2):  # the error of a batch that forward does not take hides that of the call
        expect(ValueError, "input_ids", lambda: team.gather(model, batches, None, fast_ops=True))
    assert len(calls) == 2
    batches = [{"input_ids": IDS}]
    assert team.gather(model, batches, None, fast_ops=True)


def fail(*_):
    raise ReductionError("in the middle")


def all_ranks_run_as_many_batches_as_one_has(rank):
    model = shard(make(OWN, "mamba"))
    batches = [{"input_ids": IDS}] * (3 if rank == 0 else 2)
    found = ProcessTeam().gather(model, batches, None, fast_ops=True)
    assert {statistics.tokens for statistics in found.values()} == {2 * IDS.numel() * dist.get_world_size()}
    few = [{"input_ids": IDS}] * rank
    expect(ValueError, "it yielded no batch", lambda: make_plan(model, calibration=few))


def what_cannot_be_cut_is_refused():
    model = shard(make(OWN, "mamba").train())
    optimizer = torch.optim.AdamW(model.parameters())
    model.set_requires_gradient_sync(False)
    model(IDS, labels=IDS).loss.backward()
    options = {"target": 4, "constraints": FREE, "refit_steps": 0}
    cut = {"input_ids": IDS}
    expect(
        ValueError, "accumulated without being reduced", lambda: compress(model, cut, optimizer=optimizer, **options)
    )
    assert state_sizes(model) == [8, 8, 8]
    by_columns = make(OWN, "mamba")
    fully_shard(by_columns, shard_placement_fn=lambda p: Shard(p.ndim - 1) if p.shape[-1] % 8 == 0 else None)
    expect(ValueError, "is sharded along dimension 1", lambda: compress(by_columns, **options))
    ignoring = make(OWN, "mamba")
    fully_shard(ignoring, ignored_params={find_mixers(ignoring)[0].mixer.A_log})
    expect(ValueError, "nothing reduces its gradient", lambda: compress(ignoring, **options))


def gradients_and_hooks_follow(rank):
    model, alone = make(OWN, "mamba").train(), make(OWN, "mamba").train()
    shard(model)
    calls = []
    for one in (model, alone):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        find_mixers(one)[0].mixer.A_log.tag = "kept"
        for part in (0, 1):
            one(IDS, labels=IDS).loss.backward()
            if part == 0:
                compress(one, {"input_ids": IDS}, target=4, optimizer=optimizer, constraints=FREE, refit_steps=0)
        assert find_mixers(one)[0].mixer.A_log.tag == "kept"
        calls.append({name: whole(p.grad) for name, p in one.named_parameters()})
    for name, gradient in calls[0].items():
        assert torch.allclose(gradient, calls[1][name], atol=1e-6), name


def values_are_cut(rank):
    model = delta_models.make("qwen3_5").train()
    alone = copy.deepcopy(model)
    shard(model)
    for one in (model, alone):
        compress(one, {"input_ids": IDS}, value_size=4, constraints=FREE, refit_steps=0)
    for (name, one), two in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(whole(one), two, atol=1e-6), name


def mixers_are_resized():
    model = shard(make(OWN, "mamba2").train())
    optimizer = torch.optim.AdamW(model.parameters())
    for size in (4, 8, 2):
        resize_mixers(model, {site.name: size for site in find_mixers(model)}, optimizer, ProcessTeam())
        verify_replicas(model, optimizer)
        for site in find_mixers(model):
            assert site.state_size == size
            assert all(isinstance(p, DTensor) and whole(p).isnan().all() for p in site.parameters().values())


def private_names_are_checked():
    model = shard(make(OWN, "mamba"))
    shards.check_torch(model)
    before = shards.PRIVATE["FSDPParam"]
    try:
        shards.PRIVATE["FSDPParam"] = (*before, "gone")
        expect(RuntimeError, "has no FSDPParam.gone, which", lambda: shards.check_torch(model))
    finally:
        shards.PRIVATE["FSDPParam"] = before


def two_ranks(rank):
    what_cannot_be_cut_is_refused()
    gradients_and_hooks_follow(rank)
    values_are_cut(rank)
    mixers_are_resized()
    private_names_are_checked()
    for name in MODELS:
        cuts_are_those_of_one_process(name, "block")
    cuts_are_those_of_one_process("own mamba2", "block", reshard_after_forward=False)
    for wrap in ("none", "mixer"):
        cuts_are_those_of_one_process("own mamba2", wrap)
        cuts_are_those_of_one_process("stock mamba2", wrap)
    # Mixers that are sharded by themselves stay on transformers' own code.
    cuts_are_those_of_one_process("stock mamba", "mixer", refit_steps=3, fast_ops=False)
    for dora in (False, True):
        cuts_are_those_of_one_process(f"LoRA, DoRA {dora}", "block", build=adapted(dora))
    for trained_before in (False, True):
        a_replaced_parameter_is_noticed(trained_before)
    a_rank_that_fails_ends_all(rank)
    a_rank_that_fails_in_code_that_hides_errors_ends_all(rank)
    all_ranks_run_as_many_batches_as_one_has(rank)


def four_ranks(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    cuts_are_those_of_one_process("own mamba2", "block", mesh=mesh)
    cuts_are_those_of_one_process("own mamba2", "none", refit_steps=0)  # with fewer rows than ranks
    replicas_that_differ_are_noticed(mesh)


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    {2: two_ranks, 4: four_ranks}[dist.get_world_size()](dist.get_rank())
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
