"""What of a parameter survives a cut, which parameters are refused, and cuts in torch's inference mode."""

import copy
import functools
import logging
from types import SimpleNamespace

import accelerate
import pytest
import torch
from helpers import arguments, small_model
from selective_models import IDS, OWN, STOCK, make
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import Trainer

from hf_compressm import CompreSSMCallback, Fraction, compress, state_sizes
from hf_compressm.baselines import rival_cut
from hf_compressm.surgery import (
    CutSettings,
    Snapshot,
    apply_plan,
    check_parameters,
    find_mixers,
    make_plan,
    refit,
    resize_mixers,
)

BATCHES = [{"input_ids": IDS}]
KINDS = {
    "lru": lambda: small_model(dropout=0.0),
    "own-mamba": lambda: make(OWN, "mamba"),
    "own-mamba2": lambda: make(OWN, "mamba2", state_sizes=6),
    "mamba": lambda: make(STOCK, "mamba"),
    "mamba2": lambda: make(STOCK, "mamba2"),
}
ALL = pytest.mark.parametrize("kind", KINDS)
MADE = functools.cache(lambda kind: KINDS[kind]())


def fresh(kind):
    """A copy of a model that is made once: much faster than to make it."""
    return copy.deepcopy(MADE(kind))


def inputs(kind):
    if kind != "lru":
        return {"input_ids": IDS, "labels": IDS}
    generator = torch.Generator().manual_seed(0)
    return {"input_values": torch.randn(4, 12, 1, generator=generator), "labels": torch.tensor([0, 1, 2, 0])}


def calibration(kind):
    return None if kind == "lru" else BATCHES


def step(model, kind, optimizer):
    model(**inputs(kind)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}


@pytest.mark.parametrize("mode", MODES)
@ALL
def test_a_cut_without_gradients_is_the_cut_with_them_and_can_be_trained_on(kind, mode):
    models = []
    for context in (torch.enable_grad, MODES[mode]):
        model = fresh(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step(model, kind, optimizer)
        with context():
            compress(model, calibration(kind), policy=Fraction(0.5), optimizer=optimizer, refit_steps=3)
        assert not any(parameter.is_inference() for parameter in model.parameters())
        assert all(p.requires_grad for p in model.parameters())
        for _ in range(2):
            step(model, kind, optimizer)
        models.append(model)
    assert state_sizes(models[0]) == state_sizes(models[1]) and same(*models)


@ALL
def test_plans_scores_and_undoing_in_inference_mode(kind):
    models = []
    for context in (torch.enable_grad, torch.inference_mode):
        model = fresh(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step(model, kind, optimizer)
        with context():
            snapshot = Snapshot.take(model, optimizer)
            plan = make_plan(model, settings=CutSettings(Fraction(0.5)), calibration=calibration(kind))
            apply_plan(model, optimizer, plan)
            snapshot.restore(model, optimizer)
            rival_cut(model, "first", 5, calibration(kind), optimizer)
        step(model, kind, optimizer)
        with context():
            resize_mixers(model, {find_mixers(model)[0].name: 4} if kind != "mamba" else {}, optimizer)
            for parameter in model.parameters():
                parameter.data = torch.zeros_like(parameter)
        models.append(model)
    assert same(*models)


@ALL
def test_a_model_made_in_inference_mode(kind):
    with torch.inference_mode():
        model = KINDS[kind]()
    plain = KINDS[kind]()
    for each in (model, plain):
        compress(each, calibration(kind), policy=Fraction(0.5), refit_steps=3)
    assert same(model, plain)
    with torch.inference_mode():
        model = KINDS[kind]()
    before = state_sizes(model)
    with pytest.raises(ValueError, match=r"mixer\..* was made in torch.inference_mode, so it cannot be trained"):
        compress(model, calibration(kind), policy=Fraction(0.5), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert state_sizes(model) == before


def replaced(model):
    """The first parameter that a cut replaces of every layer, its name, and the module that holds it."""
    for site in find_mixers(model):
        for name in site.parameters():
            path, _, attribute = name.rpartition(".")
            yield site, name, site.mixer.get_submodule(path), attribute


class Marked(nn.Parameter):
    """A parameter of a class of its own."""


def put(owner, attribute, value):
    del owner._parameters[attribute]
    owner.register_parameter(attribute, value)


def as_int8(owner, attribute):
    put(owner, attribute, nn.Parameter(getattr(owner, attribute).detach().to(torch.int8), requires_grad=False))


def as_packed(owner, attribute):
    weight = getattr(owner, attribute).detach()
    put(owner, attribute, nn.Parameter(weight.to(torch.uint8).reshape(-1, 1), requires_grad=False))


def as_float8(owner, attribute):
    put(owner, attribute, nn.Parameter(getattr(owner, attribute).detach().to(torch.float8_e4m3fn)))


def as_buffer(owner, attribute):
    weight = owner._parameters.pop(attribute).detach()
    owner.register_buffer("qweight", weight.to(torch.int32))


def as_class(owner, attribute):
    put(owner, attribute, Marked(getattr(owner, attribute).detach()))


def as_meta(owner, attribute):
    put(owner, attribute, nn.Parameter(getattr(owner, attribute).detach().to("meta")))


def with_mask(owner, attribute):
    getattr(owner, attribute).mask = torch.ones_like(getattr(owner, attribute))


def with_optimizer(owner, attribute):
    getattr(owner, attribute)._in_backward_optimizers = [None]


def parametrised(owner, attribute):
    parametrize.register_parametrization(owner, attribute, nn.Identity())


def weight_normed(owner, attribute):
    nn.utils.weight_norm(owner, attribute, dim=None)


def pruned(owner, attribute):
    prune.identity(owner, attribute)


CHANGES = {
    as_int8: r"is a quantised weight \(torch.int8\), a Parameter: its rows cannot be removed or mixed",
    as_packed: r"is a quantised weight \(torch.uint8\), a Parameter|without a plain weight",
    as_float8: r"is a quantised weight \(torch.float8_e4m3fn\), a Parameter",
    as_buffer: "is no parameter of its layer|has a layer without a plain weight",
    as_class: r"is a test_parameters.Marked, no plain nn.Parameter",
    as_meta: "is on the meta device and holds no values.*device_map",
    with_mask: "has the attribute 'mask', a tensor with an entry for each",
    with_optimizer: "has an optimizer of its own that steps in the backward pass",
    parametrised: "is no parameter but computed for every call.*remove_parametrizations",
    weight_normed: "is no parameter but computed for every call.*remove_weight_norm",
    pruned: "is no parameter but computed for every call.*prune.remove",
}


CUTS = [
    lambda model, batches: compress(model, batches, policy=Fraction(0.5)),
    lambda model, batches: make_plan(model, settings=CutSettings(Fraction(0.5)), calibration=batches),
    lambda model, batches: rival_cut(model, "first", 4, batches),
    lambda model, batches: check_parameters(model),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("change", CHANGES)
@ALL
def test_what_cannot_be_cut_is_refused_by_name_before_anything_changes(kind, change, tmp_path):
    count = len(list(replaced(MADE(kind))))
    for index in {0, count - 1}:
        model = fresh(kind)
        site, name, owner, attribute = list(replaced(model))[index]
        if change is weight_normed and getattr(owner, attribute).ndim < 2:
            continue
        change(owner, attribute)
        sizes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        for cut in CUTS:
            with pytest.raises(ValueError, match=CHANGES[change]) as caught:
                cut(model, calibration(kind))
            assert site.name in str(caught.value)
        assert sizes == {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("change", [as_int8, as_class, with_mask, pruned])
def test_training_is_refused_before_its_first_step(tmp_path, change):
    model = make(OWN, "mamba")
    _, _, owner, attribute = next(replaced(model))
    change(owner, attribute)
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=3),
        train_dataset=[{"input_ids": row, "labels": row} for row in IDS],
        callbacks=[CompreSSMCallback(cut_steps=[1])],
    )
    with pytest.raises(ValueError, match=CHANGES[change]):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["lru", "own-mamba", "own-mamba2", "mamba", "mamba2"])
@pytest.mark.parametrize("where", ["cpu", "disk", "meta"])
def test_offloaded_models_are_refused(kind, where, tmp_path):
    model = fresh(kind)
    wanted = fresh(kind)(**inputs(kind)).loss
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        model.to("meta")
    if where != "meta" and "mamba" in kind:
        assert torch.allclose(model(**inputs(kind)).loss, wanted)  # every layer is brought in for its call
    with pytest.raises(ValueError, match="is on the meta device and holds no values.*compress it then, and offload"):
        compress(model, calibration(kind), policy=Fraction(0.5))


@ALL
def test_a_dispatched_model_that_is_all_there_is_cut(kind):
    model, plain = fresh(kind), fresh(kind)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    for each in (model, plain):
        compress(each, calibration(kind), policy=Fraction(0.5), refit_steps=2)
    with torch.no_grad():
        assert torch.allclose(model(**inputs(kind)).logits, plain(**inputs(kind)).logits, atol=1e-6)


@ALL
def test_attributes_of_parameters_survive_cuts_and_undone_ones(kind):
    model = KINDS[kind]()
    marks = {}
    for site in find_mixers(model):
        for index, (name, parameter) in enumerate(site.parameters().items()):
            parameter._no_weight_decay = parameter._is_hf_initialized = True
            parameter._optim, parameter.tensor_model_parallel = {"lr": 1e-3 * index}, index % 2 == 0
            parameter.tp_plan, parameter.scale = "colwise", torch.tensor(0.5)
            marks[site.name, name] = dict(vars(parameter))

    def found():
        return {(s.name, name): dict(vars(p)) for s in find_mixers(model) for name, p in s.parameters().items()}

    snapshot = Snapshot.take(model)
    compress(model, calibration(kind), policy=Fraction(0.5), refit_steps=2)
    assert found() == marks and all(len(kept) == 6 for kept in marks.values())
    snapshot.restore(model)
    assert found() == marks


@ALL
def test_hooks_of_parameters_survive_cuts(kind):
    model, wanted = KINDS[kind](), KINDS[kind]()
    seen, handles = [], []
    for site in find_mixers(model):
        for parameter in site.parameters().values():
            handles.append(parameter.register_hook(lambda gradient: 2 * gradient))
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.shape))))
    for each in (model, wanted):
        compress(each, calibration(kind), policy=Fraction(0.5), refit_steps=0)
        each(**inputs(kind)).loss.backward()
    cut = {id(p): p for site in find_mixers(model) for p in site.parameters().values()}
    assert sorted(seen) == sorted(tuple(p.shape) for p in cut.values())
    for found, plain in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(found.grad, (1 + (id(found) in cut)) * plain.grad, rtol=1e-5, atol=1e-9)
    for handle in handles:
        handle.remove()
    for each in (model, wanted):
        each.zero_grad()
        each(**inputs(kind)).loss.backward()
    assert len(seen) == len(cut)
    for found, plain in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(found.grad, plain.grad, rtol=1e-5, atol=1e-9)


def bitsandbytes(model, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model.save_pretrained(tmp_path / "model")
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=settings, dtype=torch.float32)


def torchao(model, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quanto(model, tmp_path):
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def dynamic(model, tmp_path):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


QUANTISED = {
    "bitsandbytes 8": lambda model, folder: bitsandbytes(model, folder, 8),
    "bitsandbytes 4": lambda model, folder: bitsandbytes(model, folder, 4),
    "torchao": torchao,
    "quanto": quanto,
    "torch's own": dynamic,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("library", QUANTISED)
@pytest.mark.parametrize("kind", ["own-mamba", "mamba", "mamba2"])
def test_models_of_quantisation_libraries(kind, library, tmp_path):
    model = QUANTISED[library](KINDS[kind](), tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.mixer.*(quantised|quantisation).*compress it then") as caught:
        compress(model, BATCHES, target=4)
    assert (
        "x_proj" in str(caught.value) or "in_proj" in str(caught.value) or "without a plain weight" in str(caught.value)
    )


@pytest.mark.parametrize("library", [name for name in QUANTISED if name != "torch's own"])
def test_quantised_layers_that_a_cut_leaves_alone(library, tmp_path, caplog):
    """This package's Mamba-2 gets two matrices beside its projections, of the dtype that those compute in."""
    model = QUANTISED[library](make(OWN, "mamba2"), tmp_path)
    with caplog.at_level(logging.WARNING):
        compress(model, BATCHES, target=4, refit_steps=0)
    mixer = find_mixers(model)[0].mixer
    assert state_sizes(model) == [4, 4, 4] and mixer.read_in.dtype == torch.float32
    assert model(input_ids=IDS).logits.isfinite().all()


def test_a_refit_that_cannot_copy_the_mixer_says_so(monkeypatch):
    model = make(OWN, "mamba")

    def refuse(*_):
        raise RuntimeError("no clone()")

    monkeypatch.setattr(refit, "copy", SimpleNamespace(deepcopy=refuse))
    with pytest.raises(ValueError, match=r"mixer cannot be copied to refit it \(no clone\(\)\). Give refit_steps=0"):
        compress(model, BATCHES, target=4)
    assert state_sizes(model) == [8, 8, 8]
