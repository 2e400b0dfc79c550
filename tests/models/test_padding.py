"""Padding leaves no trace in this package's models: outputs, gradients and caches are those of the real tokens."""

import copy

import pytest
import torch
from selective_models import own
from stock_models import CONFIGS, lively
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from hf_compressm import MimoSSMConfig, MimoSSMForCausalLM, use_fast_ops
from hf_compressm.surgery import selective_signals

SIDES = pytest.mark.parametrize("side", ["right", "left", "both", "scattered"])
MODELS = {
    "mamba": lambda **fields: lively(own("mamba", **fields)),
    "mamba-bias": lambda: lively(own("mamba", use_bias=True, conv_kernel=6, hidden_act="gelu")),
    "mamba2": lambda **fields: lively(own("mamba2", **fields)),
    "mamba2-bias": lambda: lively(own("mamba2", use_bias=True, conv_kernel=1, time_step_limit=(0.05, 0.5))),
    "mimo": lambda: mimo(),
    "mimo-batch": lambda **fields: mimo(norm="batch", prenorm=False, **fields),
}
ONE_LAYER = {"num_hidden_layers": 1, "state_sizes": [5]}
KINDS = pytest.mark.parametrize("kind", MODELS)


def mimo(**fields):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_sizes": [5, 9], "r_min": 0.8}
    torch.manual_seed(0)
    model = MimoSSMForCausalLM(MimoSSMConfig(**(sizes | fields))).eval()
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def texts(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 50, (length,), generator=generator) for length in lengths]


def padded(rows, length, side):
    """Token ids (B, length) with padding of a token that exists, and the mask."""
    ids, mask = torch.full((len(rows), length), 7), torch.zeros(len(rows), length, dtype=torch.long)
    generator = torch.Generator().manual_seed(5)
    for index, row in enumerate(rows):
        free = length - len(row)
        places = torch.arange(len(row)) + {"right": 0, "left": free, "both": free // 2, "scattered": 0}[side]
        if side == "scattered":
            places = torch.randperm(length, generator=generator)[: len(row)].sort().values
        ids[index, places], mask[index, places] = row, 1
    return ids, mask


def cache_of(output):
    name = next(name for name in ("cache", "cache_params", "past_key_values") if name in output)
    return {name: output[name]}


@KINDS
@SIDES
@torch.no_grad()
def test_going_on_from_a_padded_prefill_equals_each_text_alone(kind, side):
    model = MODELS[kind]().double()
    parts = [texts((7, 1, 0, 12, 3), 1), texts((2, 5, 0, 0, 4), 2), texts((1, 1, 1, 1, 1), 3)]
    outputs, masks, cache = [], [], {}
    for rows, length in zip(parts, (14, 6, 1), strict=True):
        ids, mask = padded(rows, length, side)
        masks.append(mask)
        outputs.append(model(ids, attention_mask=torch.cat(masks, 1).float(), use_cache=True, **cache))
        cache = cache_of(outputs[-1])
    for index in range(5):
        found = torch.cat([o.logits[index][m[index].bool()] for o, m in zip(outputs, masks, strict=True)])
        alone = model(torch.cat([part[index] for part in parts])[None], use_cache=False).logits[0]
        assert torch.allclose(found, alone, atol=1e-6)


@KINDS
@SIDES
@torch.no_grad()
def test_a_single_step_may_be_padding(kind, side):
    model = MODELS[kind]().double()
    rows = texts((4, 4), 1)
    ids, mask = padded(rows, 6, side)
    cache = cache_of(model(ids, attention_mask=mask, use_cache=True))
    step = torch.tensor([[1], [0]])
    model(torch.tensor([[11], [12]]), attention_mask=torch.cat([mask, step], 1), use_cache=True, **cache)
    found = model(torch.tensor([[13], [13]]), use_cache=True, **cache).logits[:, -1]
    for row, extra, logits in zip(rows, ([11, 13], [13]), found, strict=True):
        alone = model(torch.cat([row, torch.tensor(extra)])[None], use_cache=False).logits[0, -1]
        assert torch.allclose(logits, alone, atol=1e-6)


@KINDS
@torch.no_grad()
def test_the_first_step_may_be_padding(kind):
    model = MODELS[kind]().double()
    cache = cache_of(model(torch.tensor([[11], [12]]), attention_mask=torch.tensor([[1], [0]]), use_cache=True))
    found = model(torch.tensor([[13], [13]]), use_cache=True, **cache).logits[:, -1]
    for text, logits in zip(([11, 13], [13]), found, strict=True):
        assert torch.allclose(logits, model(torch.tensor([text]), use_cache=False).logits[0, -1], atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "mimo-batch"])  # training it mixes sequences
@pytest.mark.parametrize("side", ["both", "scattered"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients_are_those_of_each_text_alone(kind, side, use_cache):
    rows = texts((7, 1, 12, 3), 1)
    ids, mask = padded(rows, 13, side)
    model = MODELS[kind]().double()
    logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
    (logits.sin() * mask[..., None]).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row in rows:
        model(row[None], use_cache=False).logits.sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-4, rtol=1e-4), name  # mamba's logits are float32


@KINDS
def test_generation_from_right_padded_prompts(kind):
    model, rows = MODELS[kind](), texts((3, 8), 4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = {}
    for side in ("left", "right"):
        ids, mask = padded(rows, 8, side)
        found[side] = model.generate(ids, attention_mask=mask, **options)[1, 8:]  # the row that is full
    assert torch.equal(found["left"], found["right"])
    ids, mask = padded(rows, 8, "left")
    left = model.generate(ids, attention_mask=mask, **options)[:, 8:]
    for row, tokens in zip(rows, left, strict=True):
        assert torch.equal(model.generate(row[None], **options)[0, len(row) :], tokens)


@KINDS
@torch.no_grad()
def test_a_mask_of_ones_changes_no_bit_and_a_wrong_one_is_refused(kind):
    model = MODELS[kind]()
    ids = torch.stack(texts((9, 9), 1))
    expected = model(ids).logits
    assert torch.equal(model(ids, attention_mask=torch.ones(2, 9)).logits, expected)
    assert torch.equal(model(ids, attention_mask=torch.ones(2, 12)).logits, expected)
    for shape in ((2, 8), (1, 9), (2, 1, 9)):
        with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, L\) = \(2, 9\)"):
            model(ids, attention_mask=torch.ones(shape))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mimo-batch"])
@torch.no_grad()
def test_compiled_models_pass_over_padding_too(kind):
    model = MODELS[kind](**ONE_LAYER)
    ids, mask = padded(texts((7, 1, 0, 12), 1), 13, "scattered")
    expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba-bias", "mamba2", "mamba2-bias"])
@SIDES
@torch.no_grad()
def test_signals_of_real_tokens_are_those_without_padding(kind, side):
    model = MODELS[kind]()
    mixer = model.backbone.layers[0].mixer
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    ids, mask = padded([torch.arange(6)], 9, side)
    signals = selective_signals(mixer, hidden[ids.clamp(max=5)], mask)
    alone = selective_signals(mixer, hidden[None])
    for name in ("u", "dt", "B", "C"):
        assert torch.allclose(getattr(signals, name)[mask.bool()], getattr(alone, name)[0], atol=1e-5), name
    assert not signals.u[~mask.bool()].any() and not signals.dt[~mask.bool()].any()


@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_fast_ops_treat_padding_as_transformers_does(family):
    torch.manual_seed(0)
    config = CONFIGS[family]()
    if hasattr(config, "time_step_min"):
        config.time_step_min = 1e-9  # of which transformers' single step knows nothing
    model = lively(AutoModelForCausalLM.from_config(config).eval())
    fast = copy.deepcopy(model)
    use_fast_ops(fast)
    ids = torch.randint(0, 64, (2, 12))
    mask = pad(torch.ones(2, 8, dtype=torch.long), (0, 4))
    found = []
    for each in (model, fast):
        first = each(ids, attention_mask=mask, use_cache=True)
        second = each(ids[:, :1], attention_mask=pad(mask, (0, 1), value=1), use_cache=True, **cache_of(first))
        found.append(torch.cat([first.logits[:, :8], second.logits], 1))
    assert (found[1] - found[0]).abs().max() < 1e-3 * found[0].abs().max()
