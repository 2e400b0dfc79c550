"""What cannot be right with layers of matrix-valued states: an error that says so, before anything is changed."""

import importlib.util

import delta_models
import own_delta_models
import own_minimax_models
import pytest
import torch
import xlstm_models
from datasets import Dataset
from helpers import arguments
from transformers import AutoModelForCausalLM, KimiLinearConfig, MiniMaxConfig, Trainer

from hf_compressm import CompreSSMCallback, SizeConstraints, compress, state_sizes, use_fast_ops
from hf_compressm.surgery import check_parameters, find_mixers

IDS = torch.randint(1, 50, (8, 16), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS}
KINDS = {name: lambda name=name: delta_models.make(name) for name in delta_models.CONFIGS}
OWN = {"own": own_delta_models.own, "own_minimax": own_minimax_models.own}
KINDS |= OWN | {"xlstm": xlstm_models.make}
TARGETS = dict.fromkeys(OWN, 4) | {"xlstm": 32}
ALL = pytest.mark.parametrize("kind", KINDS)
SOME = pytest.mark.parametrize("kind", ["qwen3_5", *OWN, "xlstm"])


def cut(kind, model, **options):
    compress(model, BATCH, target=TARGETS.get(kind, 8), **{"refit_steps": 0} | options)


def training(kind, model, folder, ids=IDS, **settings):
    """A Trainer with a cut due after its first step."""
    defaults = {"policy": "target", "target_state_size": TARGETS.get(kind, 8), "cut_steps": [1], "refit_steps": 2}
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format("torch")
    args = arguments(folder, max_steps=2, per_device_train_batch_size=4)
    return Trainer(model.train(), args, train_dataset=data, callbacks=[CompreSSMCallback(**defaults | settings)])


def assert_refused_before_training(trainer, message):
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def read_out(site):
    return site.mixer.get_submodule(site.adapter.read_out).weight


@SOME
def test_fewer_tokens_than_key_channels(kind, tmp_path):
    model = KINDS[kind]()
    size = state_sizes(model)[0]
    few = IDS.flatten()[None, : size - 1]
    with pytest.raises(ValueError, match=f"{size - 1} real tokens cannot rank the {size} states"):
        compress(model, {"input_ids": few}, target=TARGETS.get(kind, 8))
    if kind != "xlstm":  # transformers' xLSTM knows no padding
        padded = torch.cat([torch.zeros_like(few), few], dim=1)
        with pytest.raises(ValueError, match=f"{size - 1} real tokens cannot rank the {size} states"):
            compress(model, {"input_ids": padded, "attention_mask": padded.sign()}, target=TARGETS.get(kind, 8))
    assert state_sizes(model)[0] == size
    trainer = training(kind, model, tmp_path, few[:, :5], calibration_batches=1)
    assert_refused_before_training(trainer, "training batches hold .* real tokens, which cannot rank")


@ALL
def test_a_cache_from_before_a_cut(kind):
    """Where this package's code runs its message says why; transformers' own code at least never goes on."""
    model = KINDS[kind]()
    ids = IDS[:2]
    name = "cache_params" if kind == "xlstm" else "past_key_values"
    with torch.no_grad():
        caches = [model(input_ids=ids, use_cache=True)[name] for _ in range(4)]
        cut(kind, model)
        if kind in OWN:
            fast, slow = caches, []
        elif kind == "xlstm":
            fast, slow = [], caches
        else:
            fast, slow = caches[:2], caches[2:]
        for cache, length in zip(slow, (1, 3), strict=False):
            with pytest.raises((RuntimeError, ValueError), match="[Ss]izes? of tensor|has wrong shape"):
                model(input_ids=ids[:, :length], use_cache=True, **{name: cache})
        if fast and kind not in OWN:
            use_fast_ops(model)
        for cache, length in zip(fast, (1, 3), strict=False):
            with pytest.raises(ValueError, match="A cache from before a cut does not fit the model after it"):
                model(input_ids=ids[:, :length], use_cache=True, **{name: cache})
        new = model(input_ids=ids, use_cache=True)[name]
        model(input_ids=ids[:, :1], use_cache=True, **{name: new})


@pytest.mark.parametrize("kind", delta_models.CONFIGS)
def test_a_cache_from_before_a_cut_of_values(kind):
    model = KINDS[kind]()
    use_fast_ops(model)
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        compress(model, BATCH, value_size=4, refit_steps=0)
        with pytest.raises(ValueError, match="have 16 key and 8 value channels, and the layer has 16 and 4. A cache"):
            model(input_ids=IDS[:, :1], use_cache=True, past_key_values=cache)


@ALL
def test_a_frozen_mixer(kind, tmp_path):
    model = KINDS[kind]()
    site = find_mixers(model)[1]
    site.mixer.requires_grad_(False)
    name = site.name.replace(".", r"\.")
    assert_refused_before_training(training(kind, model, tmp_path), rf"{name}\.\S+ is frozen")
    sizes = state_sizes(model)
    cut(kind, model)
    assert sum(state_sizes(model)) <= sum(sizes) / 2


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - OWN.keys()))  # its cuts leave projections as they are
def test_a_frozen_projection(kind, tmp_path):
    model = KINDS[kind]()
    site = find_mixers(model)[0]
    name = next(name for name in site.shapes(site.state_size) if name != site.frozen_read_out)
    site.mixer.get_parameter(name).requires_grad_(False)
    assert_refused_before_training(training(kind, model, tmp_path), rf"{name} is frozen")


@ALL
def test_a_frozen_output_projection_keeps_its_value(kind, tmp_path):
    model = KINDS[kind]()
    for site in find_mixers(model):
        read_out(site).requires_grad_(False)
    before, sizes = [read_out(site).clone() for site in find_mixers(model)], state_sizes(model)
    training(kind, model, tmp_path).train()
    after = [read_out(site) for site in find_mixers(model)]
    assert sum(state_sizes(model)) <= sum(sizes) / 2
    assert all(map(torch.equal, before, after)) and not any(weight.requires_grad for weight in after)


@SOME
def test_who_freezes_all_or_nothing_has_the_output_projection_refitted(kind):
    for trainable in (True, False):
        model = KINDS[kind]().requires_grad_(trainable)
        before = [read_out(site).clone() for site in find_mixers(model)]
        cut(kind, model, refit_steps=40)
        assert not any(map(torch.equal, before, map(read_out, find_mixers(model))))
    model = KINDS[kind]()
    read_out(find_mixers(model)[0]).requires_grad_(False)
    before = [read_out(site).clone() for site in find_mixers(model)]
    cut(kind, model, refit_steps=40)
    assert [torch.equal(*pair) for pair in zip(before, map(read_out, find_mixers(model)), strict=True)] == [True, False]


@ALL
@pytest.mark.parametrize("whole", [False, True])
def test_a_shared_projection_or_mixer(kind, whole, tmp_path):
    model = KINDS[kind]()
    first, last = (site for site in find_mixers(model))
    if whole:
        path, _, name = last.name.rpartition(".")
        setattr(model.get_submodule(path), name, first.mixer)
    else:
        setattr(last.mixer, last.adapter.read_out, first.mixer.get_submodule(first.adapter.read_out))
    with pytest.raises(ValueError, match="is shared by"):
        check_parameters(model)
    assert_refused_before_training(training(kind, model, tmp_path), "is shared by .* Give each layer its own parameter")
    with pytest.raises(ValueError, match="is shared by"):
        cut(kind, model)


@pytest.mark.parametrize("kind", delta_models.CONFIGS)
def test_sizes_that_the_installed_convolution_kernel_cannot_run(kind, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "causal_conv1d" or find_spec(name))
    model = KINDS[kind]()  # 4 key heads and 32 value channels: an even number of key channels is needed
    message = "causal_conv1d is installed .* with 3 states. Set multiple_of=2, or leave it out"
    assert_refused_before_training(training(kind, model, tmp_path, multiple_of=3), message)
    with pytest.raises(ValueError, match=message):
        compress(model, BATCH, target=9, constraints=SizeConstraints(multiple_of=3))
    compress(model, BATCH, target=7, refit_steps=0)
    assert state_sizes(model) == [6, 6]


def test_sizes_that_the_cache_cannot_hold(tmp_path):
    trainer = training("xlstm", KINDS["xlstm"](), tmp_path, multiple_of=16)
    assert_refused_before_training(trainer, "multiples of 64 keys of all 2 heads together")


def test_keys_that_the_config_ties_to_values_or_to_softmax_attention(tmp_path):
    common = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "intermediate_size": 16}
    delta = {"linear_num_heads": 2, "linear_head_dim": 16, "layer_types": ["linear_attention"], "pad_token_id": 0}
    fixed = {"num_hidden_layers": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    tied = {
        "for the size of keys and values": KimiLinearConfig(**common, **delta, num_hidden_layers=1),
        "for this layer and for softmax attention": MiniMaxConfig(**common, **fixed),
    }
    for reason, config in tied.items():
        with pytest.raises(ValueError, match=f"has no layer that can be compressed. .*{reason}"):
            training("tied", AutoModelForCausalLM.from_config(config), tmp_path)
