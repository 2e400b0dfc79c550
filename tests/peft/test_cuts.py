"""A cut of a model with adapters: the same function as merging first and cutting then."""

import copy

import pytest
import torch
from lora_models import BATCHES, KINDS, METHODS, adapted, close, config, logits, stir
from peft import get_peft_model

from hf_compressm import MimoSSMConfig, MimoSSMForSequenceClassification, compress, state_sizes


def merged_first(model, **settings):
    plain = copy.deepcopy(model).merge_and_unload()
    compress(plain, BATCHES, target=4, **settings)
    return plain


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_cutting_and_merging_may_change_places(kind, method):
    model = adapted(kind, **METHODS[method])
    before = logits(model)
    wanted = merged_first(model, refit_steps=0)
    compress(model, BATCHES, target=4, refit_steps=0)
    assert state_sizes(model) == state_sizes(wanted) and max(state_sizes(model)) < 8
    assert close(logits(model), logits(wanted))
    assert not torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    assert type(merged) is type(wanted) and close(logits(merged), logits(wanted))
    for name, value in merged.state_dict().items():
        assert close(value, wanted.state_dict()[name], 1e-4), name


@pytest.mark.parametrize("kind", ["own-mamba", "mamba2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_refit_goes_to_the_base_weight(kind, method):
    model = adapted(kind, **METHODS[method])
    wanted = merged_first(model, refit_steps=20)
    compress(model, BATCHES, target=4, refit_steps=20)
    assert close(logits(model), logits(wanted), 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_statistics_see_the_adapted_function(method):
    model = adapted("mamba", **METHODS[method])
    with_adapter = compress(copy.deepcopy(model), BATCHES, target=4, refit_steps=0)
    with model.disable_adapter():
        without = compress(copy.deepcopy(model.unload()), BATCHES, target=4, refit_steps=0)
    first, second = (torch.tensor(record["layers"][0]["singular_values"]) for record in (with_adapter, without))
    assert not torch.allclose(first, second, rtol=1e-2)


def adapted_layer(model, name):
    return getattr(model.base_model.model.backbone.layers[0].mixer, name)


def matrices(layer) -> torch.Tensor:
    """The base weight and every lora_B, side by side: one map of rows must take all of them to what they become."""
    return torch.cat([layer.base_layer.weight, *(linear.weight for linear in layer.lora_B.values())], dim=1).detach()


def with_two_adapters(kind):
    model = adapted(kind)
    model.add_adapter("second", config(r=2, use_rslora=True))
    stir(model, seed=3)
    return model


@pytest.mark.parametrize("kind", ["own-mamba", "mamba"])
def test_mixed_rows_of_several_adapters_and_the_base(kind):
    model = with_two_adapters(kind)
    old = matrices(adapted_layer(model, "x_proj"))
    compress(model, BATCHES, target=4, refit_steps=0)
    new = matrices(adapted_layer(model, "x_proj"))
    assert len(new) < len(old) < old.shape[1]
    rows = torch.linalg.lstsq(old.T, new.T).solution
    assert close(rows.T @ old, new)
    for names in (["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        assert logits(model).isfinite().all()
    with model.disable_adapter():
        assert logits(model).isfinite().all()


def test_picked_rows_of_several_adapters_and_the_base():
    model = with_two_adapters("mamba2")
    old = matrices(adapted_layer(model, "in_proj"))
    compress(model, BATCHES, target=4, refit_steps=0)
    new = matrices(adapted_layer(model, "in_proj"))
    picked = torch.cdist(new[:, :32], old[:, :32]).argmin(1)
    assert len(set(picked.tolist())) == len(new) < len(old) and close(new, old[picked])


@pytest.mark.parametrize("kind", ["own-mamba", "mamba2"])
def test_merged_and_disabled_adapters(kind):
    model = adapted(kind)
    model.merge_adapter()
    wanted = merged_first(model, refit_steps=0)
    compress(model, BATCHES, target=4, refit_steps=0)
    assert close(logits(model), logits(wanted))
    model.unmerge_adapter()
    assert close(logits(model), logits(wanted), 1e-4)

    model = adapted(kind)
    base = copy.deepcopy(model).unload()
    compress(base, BATCHES, target=4, refit_steps=0)
    with model.disable_adapter():
        compress(model, BATCHES, target=4, refit_steps=0)
        assert close(logits(model), logits(base))


def test_adapters_elsewhere_and_flags_are_left_alone():
    model = adapted("own-mamba", target_modules=["x_proj", "out_proj", "embeddings"])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    kept = {name: p for name, p in model.named_parameters() if "x_proj" not in name and "A_log" not in name}
    compress(model, BATCHES, target=4, refit_steps=0)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in kept.items())
    layer = model.base_model.model.backbone.layers[0].mixer.x_proj
    assert layer.out_features == layer.base_layer.out_features == layer.lora_B["default"].out_features
    assert layer.base_layer.weight.shape[0] == layer.out_features


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_in_time_invariant_models(method):
    torch.manual_seed(0)
    base = MimoSSMForSequenceClassification(
        MimoSSMConfig(num_channels=1, num_labels=3, hidden_size=6, num_hidden_layers=2, state_sizes=12)
    )
    linears = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = sorted(linears - {"score"})
    model = get_peft_model(base, config(target_modules=targets, task_type="SEQ_CLS", **METHODS[method]))
    stir(model)
    inputs = {"input_values": torch.randn(2, 12, 1)}
    plain = copy.deepcopy(model.eval()).merge_and_unload()
    for each in (model, plain):
        compress(each, target=5)
    with torch.no_grad():
        assert close(model(**inputs).logits, plain(**inputs).logits)
