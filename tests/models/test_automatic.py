"""Fast ops that the package switches on by itself: where exact, for a while, and without a trace."""

import copy
import io
import pickle

import pytest
import torch
from stock_models import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM

from hf_compressm import compress, use_fast_ops
from hf_compressm.models import automatic, fast_ops
from hf_compressm.models.automatic import by_fast_ops, lent_mixers, switch_back, switch_on
from hf_compressm.surgery import find_mixers, gather_statistics

FAMILIES = pytest.mark.parametrize("family", sorted(CONFIGS))
IDS = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1))


def stock(family, **fields):
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.update(fields)
    return AutoModelForCausalLM.from_config(config).eval()


def classes(model):
    return [type(module) for module in model.modules()]


@pytest.fixture
def calls(monkeypatch):
    """Names of the scans of this package that ran."""
    found = []
    for name in ("selective_scan", "ssd_scan"):
        op = getattr(fast_ops, name)
        monkeypatch.setattr(fast_ops, name, lambda *a, op=op, name=name, **kw: found.append(name) or op(*a, **kw))
    return found


@FAMILIES
def test_on_within_a_block_and_off_behind_it_even_after_an_error(family, calls):
    model = stock(family)
    before, names, expected = classes(model), [type(m).__name__ for m in model.modules()], model(IDS).logits
    assert not calls
    with pytest.raises(KeyError), by_fast_ops(model):
        found = model(IDS).logits
        assert len(calls) == len(find_mixers(model))
        assert [type(m).__name__ for m in model.modules()] == names
        raise KeyError
    assert classes(model) == before and not any("lent" in name for m in model.modules() for name in vars(m))
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    with by_fast_ops(model, enable=False):
        assert classes(model) == before


def test_what_the_user_switched_on_stays_on():
    model = stock("mamba")
    use_fast_ops(model)
    with by_fast_ops(model):
        assert not lent_mixers(model)
    assert fast_ops.mixer_class(find_mixers(model)[0].mixer) is not type(find_mixers(model)[0].mixer)
    lent = stock("mamba")
    mixers = switch_on(lent)
    use_fast_ops(lent)  # from now on it is the user's choice
    switch_back(mixers)
    assert classes(lent) == classes(model)


@FAMILIES
def test_copies_and_pickles_meanwhile_are_stock_models(family):
    model = stock(family)
    before = classes(model)
    with by_fast_ops(model):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twins = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
        ]
        assert b"hf_compressm" not in pickle.dumps(model)
        assert lent_mixers(model)
    for twin in twins:
        assert classes(twin) == before and not lent_mixers(twin)
        assert torch.equal(twin(IDS).logits, model(IDS).logits)


def test_what_the_ops_do_not_do_is_left_to_the_stock_forward(calls):
    model = stock("mamba2")
    mixer = model.backbone.layers[0].mixer
    hidden = torch.randn(1, 12, 32)
    packed = {"seq_idx": torch.zeros(1, 12, dtype=torch.int32)}

    def packed_outcome():
        try:
            return mixer(hidden, **packed).tolist()
        except ValueError as error:  # newer versions of transformers want kernels for that
            return str(error)

    expected, of_packed = mixer(hidden), packed_outcome()
    with by_fast_ops(model):
        assert packed_outcome() == of_packed
        tangent = torch.func.jvp(mixer, (hidden,), (torch.ones_like(hidden),))[1]
        rows = torch.func.vmap(torch.func.grad(lambda x: mixer(x).sum()))(hidden[None])
        exported = torch.export.export(mixer, (hidden,)).module()
        assert not calls
        assert torch.allclose(exported(hidden), expected, atol=1e-6)
        assert torch.allclose(mixer(hidden), expected, atol=1e-5) and calls == ["ssd_scan"]
    assert tangent.shape == hidden.shape and rows.shape == (1, *hidden.shape)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_compiles_without_graph_breaks(family):
    model = stock(family, num_hidden_layers=1)
    expected = model(IDS, use_cache=False).logits
    with by_fast_ops(model):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        found = compiled(IDS, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_mixers_that_somebody_has_changed_are_left_alone():
    model = stock("mamba")
    first, second = (layer.mixer for layer in model.backbone.layers)
    first.forward = lambda *args, **kwargs: None
    assert switch_on(model) == [second]
    switch_back([second])
    second.dt_proj.register_forward_hook(lambda module, args, output: None)
    assert not switch_on(model)


def test_a_version_that_does_not_fit_is_said_and_nothing_switched(monkeypatch, caplog):
    monkeypatch.delattr("transformers.models.mamba.modeling_mamba.MambaMixer.forward.__wrapped__", raising=False)
    model = stock("mamba")
    before = classes(model)
    del model.backbone.layers[0].mixer.activation
    said = []
    monkeypatch.setattr(automatic.logger, "warning_once", said.append)
    with by_fast_ops(model):
        assert classes(model) == before
    assert "MambaMixer.activation" in said[0] and "transformers' own code runs instead" in said[0]


def test_it_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(automatic.logger, "warning_once", said.append)
    with by_fast_ops(nn.Linear(2, 2)):
        assert not said
    with by_fast_ops(stock("mamba")):
        assert len(said) == 1 and "fast_ops=False" in said[0]


@pytest.mark.parametrize("refit_steps", [0, 2])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_compress_runs_by_them_unless_told_not_to(family, refit_steps, calls):
    found = []
    for fast in (True, False):
        model = stock(family)
        before = classes(model)
        calls.clear()
        record = compress(model, {"input_ids": IDS}, target=8, refit_steps=refit_steps, fast_ops=fast)
        assert bool(calls) == fast and classes(model) == before
        assert [layer["new_size"] for layer in record["layers"]] == [8, 8]
        found.append(model(IDS).logits)
    assert torch.allclose(*found, atol=1e-4)
    gather_statistics(stock(family), {"input_ids": IDS}, fast_ops=False)
    calls.clear()
    gather_statistics(stock(family), {"input_ids": IDS})
    assert calls
