"""Stock models with this package's ops: outputs, gradients and generation as before, and everything else untouched."""

import copy
import pickle

import pytest
import torch
from stock_models import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer

import hf_compressm.ops.selective_scan as selective_scan
from hf_compressm import compress, state_sizes, use_fast_ops
from hf_compressm.models import fast_ops
from hf_compressm.surgery import find_mixers

FAMILIES = pytest.mark.parametrize("family", sorted(CONFIGS))
IDS = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[0, :7] = PADDED[1, :2] = 0
STARTS_ANEW = {"mamba", "falcon_mamba", "jamba"}
"""Families whose PyTorch code forgets the state when several tokens come behind a cache."""


def pair(family, **fields):
    """The stock model, and a copy of it with this package's ops."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.update(fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(2)
    for site in find_mixers(model):  # stock initial values make the state-space path vanish beside the others
        for name, parameter in site.mixer.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.data.normal_(std=2 * parameter[0].numel() ** -0.5, generator=generator)
            elif name in ("dt_bias", "dt_proj.bias", "conv1d.bias"):
                parameter.data.normal_(generator=generator)
    fast = copy.deepcopy(model)
    assert use_fast_ops(fast) == [site.name for site in find_mixers(model)]
    return model, fast


def close(found, expected, tolerance=2e-5):
    return (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)


@FAMILIES
@pytest.mark.parametrize("mask", [None, PADDED], ids=["full", "padded"])
def test_outputs_and_gradients_are_those_of_the_stock_model(family, mask):
    results = []
    for model in pair(family):
        model.train()
        torch.manual_seed(0)
        output = model(IDS, attention_mask=mask, labels=IDS)
        output.loss.backward()
        results.append((output.logits, {name: p.grad for name, p in model.named_parameters()}))
    (expected, grads), (found, fast_grads) = results
    real = slice(None) if mask is None else mask.bool()
    assert close(found[real], expected[real])
    for name, grad in grads.items():
        assert (grad is None) == (fast_grads[name] is None), name
        assert grad is None or close(fast_grads[name], grad, 1e-4), name


@FAMILIES
def test_labels_that_are_shifted_already_reach_the_loss_as_before(family):
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    stock, fast = pair(family)
    expected = stock(input_ids=IDS, labels=IDS, shift_labels=shifted).loss
    assert close(fast(input_ids=IDS, labels=IDS, shift_labels=shifted).loss, expected)


@FAMILIES
def test_generation_is_that_of_the_stock_model(family):
    model, fast = pair(family)
    for mask in (None, PADDED):
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        expected, found = (m.generate(IDS, **options) for m in (model, fast))
        assert torch.equal(found.sequences, expected.sequences)
        assert all(close(f, e, 1e-4) for f, e in zip(found.logits, expected.logits, strict=True))


@FAMILIES
@torch.no_grad()
def test_several_tokens_go_on_from_a_cache(family):
    model, fast = pair(family)

    def in_parts(model):
        options, outputs = {}, []
        for part in (IDS[:, :5], IDS[:, 5:6], IDS[:, 6:15], IDS[:, 15:17], IDS[:, 17:18], IDS[:, 18:]):
            output = model(part, use_cache=True, **options)
            options = {name: output[name] for name in ("cache_params", "past_key_values") if name in output}
            outputs.append(output.logits)
        return torch.cat(outputs, dim=1)

    whole = model(IDS, use_cache=False).logits
    assert close(in_parts(fast), whole, 1e-4)
    assert close(in_parts(model), whole, 1e-4) == (family not in STARTS_ANEW)


@FAMILIES
def test_gradients_flow_through_single_tokens_behind_a_cache(family):
    _, model = pair(family)
    names = [f"{site.name}.{name}" for site in find_mixers(model) for name, _ in site.mixer.named_parameters()]
    parameters = [model.get_parameter(name) for name in names]

    def gradients(parts):
        options, logits = {}, []
        for part in parts:
            output = model(part, use_cache=len(parts) > 1, **options)
            options = {name: output[name] for name in ("cache_params", "past_key_values") if name in output}
            logits.append(output.logits)
        return torch.autograd.grad(torch.cat(logits, 1).sin().sum(), parameters)

    ids = IDS[:, :9]
    for name, found, expected in zip(names, gradients(ids.split(1, 1)), gradients([ids]), strict=True):
        assert close(found, expected, 3e-3), name  # Bamba counts positions from 0 again behind a cache


@FAMILIES
def test_a_checkpoint_and_a_copy(family, tmp_path):
    model, fast = pair(family)
    expected = fast(IDS).logits
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert [type(m).__name__ for m in fast.modules()] == [type(m).__name__ for m in model.modules()]
    assert all(isinstance(f, type(m)) for f, m in zip(fast.modules(), model.modules(), strict=True))
    fast.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert close(loaded(IDS).logits, expected)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in fast.modules()]
        for parameter in twin.parameters():
            parameter.data.zero_()
        assert torch.equal(fast(IDS).logits, expected) and not torch.equal(twin(IDS).logits, expected)


@FAMILIES
def test_switching_off_and_twice(family):
    model, fast = pair(family)
    use_fast_ops(fast)
    assert type(find_mixers(fast)[0].mixer).__bases__[0] is type(find_mixers(model)[0].mixer)
    use_fast_ops(fast, enable=False)
    use_fast_ops(fast, enable=False)
    assert [type(m) for m in fast.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(fast(IDS).logits, model(IDS).logits)


@FAMILIES
def test_compression(family):
    records, results = [], []
    for model in pair(family):
        records.append(compress(model, {"input_ids": IDS}, target=8, refit_steps=0))
        assert set(state_sizes(model)) == {8}
        results.append(model(IDS).logits)
    assert close(results[1], results[0], 1e-3)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_ops_of_this_package_run(family, monkeypatch):
    _, fast = pair(family)
    calls = []
    for name in ("selective_scan", "ssd_scan", "selective_state_update", "ssd_state_update"):
        op = getattr(fast_ops, name)
        monkeypatch.setattr(fast_ops, name, lambda *args, op=op, name=name, **kw: calls.append(name) or op(*args, **kw))
    fast.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    kind = {"mamba": "selective", "mamba2": "ssd"}[family]
    assert calls == [f"{kind}_scan"] * 2 + [f"{kind}_state_update"] * 4
    assert selective_scan.selective_scan.__module__.startswith("hf_compressm.ops")


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1"])
def test_half_precision_and_other_activations(family):
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.hidden_act = "gelu"
    model = AutoModelForCausalLM.from_config(config).eval()
    fast = copy.deepcopy(model)
    use_fast_ops(fast)
    assert close(fast(IDS).logits, model(IDS).logits)
    expected, found = model.bfloat16()(IDS).logits, fast.bfloat16()(IDS).logits
    assert found.dtype == expected.dtype and close(found.float(), expected.float(), 0.05)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_compiles_without_graph_breaks(name):
    _, fast = pair(name, num_hidden_layers=1)
    expected = fast(IDS, use_cache=False).logits
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert close(compiled(IDS, use_cache=False).logits, expected)


def test_hooks_and_replaced_projections_are_heeded():
    _, fast = pair("mamba2")
    expected, mixer, seen = fast(IDS).logits, find_mixers(fast)[0].mixer, []
    handle = mixer.in_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert close(fast(IDS).logits, expected) and len(seen) == 1
    handle.remove()
    mixer.out_proj = nn.Sequential(mixer.out_proj, nn.Dropout(0.0))
    assert close(fast(IDS).logits, expected)


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match="Linear has no mixer.*MambaMixer"):
        use_fast_ops(nn.Linear(2, 2))
    _, fast = pair("mamba")
    with pytest.raises(ValueError, match="packed into one"):
        find_mixers(fast)[0].mixer(torch.zeros(1, 3, 32), seq_idx=torch.zeros(1, 3))
    model, _ = pair("mamba")
    mixer = find_mixers(model)[1].mixer
    mixer.forward = mixer.forward
    with pytest.raises(ValueError, match=r"backbone.layers.1.mixer has been replaced"):
        use_fast_ops(model)
    assert all(type(site.mixer) is MambaMixer for site in find_mixers(model))
    del mixer.forward
    for site in find_mixers(model):
        del site.mixer.activation
    monkeypatch.delattr("transformers.cache_utils.Cache.update_recurrent_state")
    with pytest.raises(RuntimeError, match=r"no MambaMixer.activation, cache_utils.Cache.update_recurrent_state"):
        use_fast_ops(model)
    assert all(type(site.mixer) is MambaMixer for site in find_mixers(model))
