"""Adapters, hooks and parametrisations take effect on every layer of a mixer, whoever uses its weight."""

import copy

import peft
import pytest
import torch
from lora_models import BATCHES, KINDS, METHODS, close, config, logits, stir
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from hf_compressm import compress, state_sizes, use_fast_ops
from hf_compressm.layers.mixer import convolve
from hf_compressm.surgery import find_mixers, selective_signals

OWN = ["own-mamba", "own-mamba2"]
MAMBA = ["own-mamba", "mamba", "falcon_mamba", "jamba"]
STOCK = ["mamba", "falcon_mamba", "jamba", "mamba2", "bamba"]
LINEAR = [(kind, "dt_proj") for kind in MAMBA]
LINEAR += [(kind, target) for kind in KINDS if kind != "mamba2-bias" for target in ("in_proj", "x_proj", "out_proj")]
LINEAR = [(kind, target) for kind, target in LINEAR if target != "x_proj" or kind in MAMBA]
REFUSED_BY_PEFT = {(kind, "out_proj") for kind in ("mamba", "mamba2", "falcon_mamba")}
LINEAR = [case for case in LINEAR if case not in REFUSED_BY_PEFT]


def base(kind):
    """A model that runs by this package's ops, whose states and time steps matter."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    with torch.no_grad():
        for site in find_mixers(model):
            site.mixer.in_proj.weight.mul_(4)
            for name in ("x_proj", "dt_proj"):
                if hasattr(site.mixer, name):
                    getattr(site.mixer, name).weight.mul_(4)
            for bias in (getattr(site.mixer, "dt_bias", None), getattr(site.mixer, "dt_proj", site.mixer.in_proj).bias):
                if bias is not None:
                    bias.zero_()
    if kind in STOCK:
        use_fast_ops(model)
    if kind == "jamba":
        model.set_experts_implementation("eager")  # the other one knows no float64
    return model


def wrapped(kind, settings):
    model = get_peft_model(base(kind), settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval().double()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "target"), LINEAR)
def test_the_adapter_does_what_it_does_once_merged(kind, target, method):
    model = wrapped(kind, config(target_modules=[target], **METHODS[method]))
    merged = copy.deepcopy(model).merge_and_unload()
    with model.disable_adapter():
        without = logits(model)
    assert close(logits(model), logits(merged)) and not close(logits(model), without, 1e-3)


@pytest.mark.parametrize(("kind", "target"), LINEAR)
def test_gradients_are_those_of_the_merged_weight(kind, target):
    model = wrapped(kind, config(target_modules=[target]))
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_()
    for each in (model, merged):
        each(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    layers = [module for name, module in model.named_modules() if name.endswith(f".{target}")]
    plain = [module for name, module in merged.named_modules() if name.endswith(f".{target}")]
    for layer, linear in zip(layers, plain, strict=True):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        W, scale = linear.weight.grad, layer.scaling["default"]
        assert W.abs().max() > 0
        assert close(B.grad, scale * W @ A.T, 1e-3) and close(A.grad, scale * B.T @ W, 1e-3)


OTHERS = {
    "ia3": lambda: peft.IA3Config(target_modules=["dt_proj"], feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(target_modules=["dt_proj"], r=2),
    "loha": lambda: peft.LoHaConfig(target_modules=["dt_proj"], r=2),
    "lokr": lambda: peft.LoKrConfig(target_modules=["dt_proj"], r=2),
    "oft": lambda: peft.OFTConfig(target_modules=["dt_proj"], r=1, oft_block_size=0),
    "parameters of dt_proj": lambda: config(target_modules=[], target_parameters=["dt_proj.weight"]),
    "A_log": lambda: config(target_modules=[], target_parameters=["mixer.A_log"]),
    "the convolution's own copy": lambda: config(target_modules=["in_proj"], modules_to_save=["conv1d"]),
    "own copies": lambda: config(target_modules=["in_proj"], modules_to_save=["dt_proj"]),
}


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("kind", ["own-mamba", "mamba"])
def test_other_methods(kind, method):
    model = wrapped(kind, OTHERS[method]())
    merged = copy.deepcopy(model).merge_and_unload()
    with model.disable_adapter():
        without = logits(model)
    assert close(logits(model), logits(merged)) and not close(logits(model), without, 1e-3)


@pytest.mark.parametrize("kind", [*OWN, "jamba", "bamba"])
def test_lora_on_the_convolution(kind):
    """PEFT merges no convolution in groups, so the right value is written out."""
    rank = find_mixers(base(kind))[0].mixer.conv1d.groups
    model = wrapped(kind, config(target_modules=["conv1d"], r=rank, lora_alpha=rank))
    mixer = find_mixers(model)[0].mixer
    layer, signal = mixer.conv1d, torch.randn(2, 9, rank, dtype=torch.float64)
    inner, A, B = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    padded = F.pad(signal.mT, (inner.kernel_size[0] - 1, 0))
    plain = F.conv1d(padded, inner.weight, inner.bias, groups=rank)
    wanted = plain + F.conv1d(F.conv1d(padded, A), B, groups=rank)
    assert close(convolve(mixer, signal), F.silu(wanted).mT)
    with model.disable_adapter():
        assert close(convolve(mixer, signal), F.silu(plain).mT)
        without = logits(model)
    assert not close(logits(model), without, 1e-3)
    with torch.no_grad():
        ids = BATCHES[0]["input_ids"]
        cache = model(input_ids=ids[:, :-1], use_cache=True)
        cache = getattr(cache, "cache_params", None) or cache.past_key_values
        name = "past_key_values" if kind in ("jamba", "bamba") else "cache_params"
        last = model(input_ids=ids[:, -1:], **{name: cache}).logits
    assert close(last[:, 0], logits(model)[:, -1], 1e-3)


def doubled(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return lambda w: 2 * w, lambda b: 2 * b


def halved_input(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    return lambda w: w / 2, lambda b: b


def weight_normed(layer):
    nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(3)
    return lambda w: 3 * w, lambda b: b


def parametrised(layer):
    class Third(nn.Module):
        def forward(self, weight):
            return weight / 3

    nn.utils.parametrize.register_parametrization(layer, "weight", Third())
    return lambda w: w / 3, lambda b: b


def replaced_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return lambda w: 2 * w, lambda b: 2 * b


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("change", [doubled, halved_input, weight_normed, parametrised, replaced_forward])
@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "dt_proj") for kind in MAMBA), *((kind, "conv1d") for kind in [*OWN, "mamba", "mamba2"])],
)
def test_what_is_around_a_layer_takes_effect(kind, name, change):
    model, wanted = base(kind).double(), base(kind).double()
    for site, other in zip(find_mixers(model), find_mixers(wanted), strict=True):
        on_weight, on_bias = change(getattr(site.mixer, name))
        plain = getattr(other.mixer, name)
        plain.weight.data, plain.bias.data = on_weight(plain.weight.data), on_bias(plain.bias.data)
    assert close(logits(model), logits(wanted))
    hidden = torch.randn(1, 12, 32, dtype=torch.float64)
    found, right = (selective_signals(find_mixers(each)[0].mixer, hidden) for each in (model, wanted))
    assert all(close(getattr(found, part), getattr(right, part)) for part in ("u", "dt", "A", "B", "C"))


ALL = {
    "own-mamba": ["in_proj", "x_proj", "dt_proj", "out_proj"],
    "own-mamba2": ["in_proj", "out_proj"],
    "mamba": ["in_proj", "x_proj", "dt_proj"],
    "falcon_mamba": ["in_proj", "x_proj", "dt_proj"],
    "jamba": "all-linear",
    "mamba2": ["in_proj"],
    "bamba": "all-linear",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ALL)
def test_a_cut_with_adapters_everywhere_is_the_cut_of_the_merged_model(kind, method):
    model = get_peft_model(base(kind), config(target_modules=ALL[kind], **METHODS[method])).eval()
    stir(model.double(), scale=0.05)
    plain = copy.deepcopy(model).merge_and_unload()
    for each in (model, plain):
        compress(each, BATCHES, target=4, refit_steps=0)
    assert state_sizes(model) == state_sizes(plain) and sum(state_sizes(model)) == 4 * len(state_sizes(model))
    assert close(logits(model), logits(plain))


@pytest.mark.parametrize("target", ["dt_proj", "conv1d"])
def test_an_adapter_that_stock_code_passes_over_is_refused(target):
    torch.manual_seed(0)
    model = KINDS["jamba"]()
    rank = find_mixers(model)[0].mixer.conv1d.groups
    model = get_peft_model(model, config(target_modules=[target], r=rank)).eval()
    stir(model)
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)  # transformers' own code
    with pytest.raises(ValueError, match=rf"{target} has an adapter on it without effect.*use_fast_ops"):
        compress(model, BATCHES, target=4)
    assert torch.equal(logits(model), before)
    use_fast_ops(model)
    compress(model, BATCHES, target=4, refit_steps=2)
    assert max(state_sizes(model)) == 4


@pytest.mark.parametrize("kind", OWN)
def test_an_adapter_around_the_map_of_continuous_values(kind):
    from selective_models import COMMON, HEADS

    from hf_compressm import (
        CompreSSMMamba2Config,
        CompreSSMMamba2ForSequenceClassification,
        CompreSSMMambaConfig,
        CompreSSMMambaForSequenceClassification,
    )

    own = {
        "own-mamba": (CompreSSMMambaForSequenceClassification, CompreSSMMambaConfig, {}),
        "own-mamba2": (CompreSSMMamba2ForSequenceClassification, CompreSSMMamba2Config, HEADS),
    }
    cls, config_class, extra = own[kind]
    torch.manual_seed(0)
    model = cls(config_class(**(COMMON | extra | {"num_channels": 2})))
    model = get_peft_model(model, config(target_modules=["embeddings"], task_type="SEQ_CLS")).eval()
    stir(model)
    values = torch.randn(2, 10, 2)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        assert close(model(input_values=values).logits, merged(input_values=values).logits)


@pytest.mark.parametrize("prenorm", [True, False])
def test_an_own_copy_of_a_batch_norm_leaves_padding_out(prenorm):
    from helpers import small_model

    model = small_model(norm="batch", prenorm=prenorm, dropout=0.0)
    model = get_peft_model(model, config(target_modules=["embeddings"], modules_to_save=["norm"], task_type="SEQ_CLS"))
    stir(model)
    merged = copy.deepcopy(model).merge_and_unload()
    values, mask = torch.randn(4, 12, 1), torch.ones(4, 12)
    mask[:2, :5] = 0
    for each in (model, merged):
        each.train()
    found, wanted, unmasked = (
        each(input_values=values, attention_mask=mask).logits
        for each, mask in ((model, mask), (merged, mask), (merged, None))
    )
    assert close(found, wanted) and not close(found, unmasked, 1e-3)
