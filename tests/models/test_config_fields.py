"""Every field of the stock configs has its effect in this package's classes, under the fast ops and in the rankings.

Fields are changed all at once: one that is not honoured changes outputs, whatever the others are. The tables in
`config_fields.py` hold all fields; a field that a newer transformers adds fails the first test.
"""

import copy
import dataclasses

import pytest
import torch
from config_fields import EVERY_CONFIG, FIELDS, NO_LIMIT, OWN_FIELDS
from selective_models import IDS, OWN, STOCK, make
from stock_models import CONFIGS, given_to_scan, lively
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_compressm import from_stock, to_stock, use_fast_ops
from hf_compressm.surgery import find_mixers, selective_signals


def rounds(table):
    """Sets of fields for each kind, as many as its longest list of values: each value of each field is in one."""
    for kind, fields in table.items():
        tried = {field: values for field, values in fields.items() if not isinstance(values, str)}
        for turn in range(max(map(len, tried.values()))):
            chosen = {field: values[turn % len(values)] for field, values in tried.items()}
            yield pytest.param(kind, chosen, id=f"{kind}-{turn}")


@pytest.mark.parametrize("family", CONFIGS)
def test_no_field_of_a_stock_config_is_unknown(family):
    fields = {field.name for field in dataclasses.fields(CONFIGS[family]())}
    assert not fields - FIELDS[family].keys() - EVERY_CONFIG.keys()
    if family in OWN_FIELDS:
        assert not fields - OWN_FIELDS[family].keys()


def close(found, expected, tolerance):
    return (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)


def logits_of(output):
    return output[0] if isinstance(output, tuple) else output.logits


def in_steps(model, ids):
    """Logits of ids read in three parts, the last token by token."""
    cache, found = {}, []
    for part in (ids[:, :9], ids[:, 9:12], *ids[:, 12:16].split(1, dim=1)):
        output = model(part, use_cache=True, return_dict=True, **cache)
        name = next(name for name in ("cache", "cache_params", "past_key_values") if name in output)
        cache = {name: output[name]}
        found.append(output.logits)
    return torch.cat(found, dim=1)


def stock_model(family, chosen):
    fields = CONFIGS[family]().to_dict()
    for derived in ("model_type", "transformers_version", "dtype"):
        fields.pop(derived)
    if "expand" in chosen:
        fields.pop("intermediate_size")
    torch.manual_seed(0)
    return lively(AutoModelForCausalLM.from_config(type(CONFIGS[family]())(**(fields | chosen))).eval())


@pytest.mark.parametrize("family, chosen", list(rounds(FIELDS)))
def test_fast_ops_and_rankings_honour_the_fields(family, chosen):
    model = stock_model(family, chosen)
    ids, mask = IDS % 50, torch.ones_like(IDS)
    mask[0, :5] = 0
    fast = copy.deepcopy(model)
    use_fast_ops(fast)
    gradients = []
    for each in (model, fast):
        each.zero_grad()
        logits = each(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.square().mean().backward()
        gradients.append((logits.detach(), {name: p.grad for name, p in each.named_parameters()}))
    assert close(gradients[1][0], gradients[0][0], 1e-4)
    for name, grad in gradients[0][1].items():
        assert grad is None or close(gradients[1][1][name], grad, 1e-3), name
    with torch.no_grad():
        # transformers' single step passes over limits of the time step, so its whole forward is the measure.
        assert close(in_steps(fast, ids), model(ids[:, :16], use_cache=False).logits, 1e-3)
        site = find_mixers(model)[0]
        hidden, mask_of_mixer, expected = given_to_scan(model, site.mixer, ids, mask)
        signals = selective_signals(site.mixer, hidden, mask_of_mixer)
    for name, value in expected.items():
        assert close(getattr(signals, name), value, 1e-4), name


@pytest.mark.parametrize("kind, chosen", list(rounds(OWN_FIELDS)))
def test_conversions_honour_the_fields(kind, chosen):
    stock = lively(make(STOCK, kind, **chosen))
    ours = from_stock(stock)
    back = to_stock(ours)
    ids, results = IDS % stock.config.vocab_size, []
    for model in (stock, ours, back):
        for field in chosen:
            assert model.config.to_dict()[field] == stock.config.to_dict()[field], field
        assert model.config.num_labels == stock.config.num_labels
        assert model.generation_config.to_dict() == stock.generation_config.to_dict()
        model.train()
        logits = logits_of(model(ids))
        logits.square().mean().backward()
        model.eval()
        with torch.no_grad():
            results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}, in_steps(model, ids)))
    logits, gradients, _ = results[0]
    for found, found_gradients, _ in results[1:]:
        assert close(found, logits, 1e-4)
        assert all(close(found_gradients[name], grad, 1e-3) for name, grad in gradients.items())
    assert close(results[1][2], logits[:, :16], 1e-3)
    hidden = torch.randn(2, 12, stock.config.hidden_size)
    signals = [selective_signals(find_mixers(model)[0].mixer, hidden) for model in (stock, ours)]
    for name, expected in vars(signals[0]).items():
        assert close(getattr(signals[1], name), expected, 1e-4), name
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options["attention_mask"] = torch.ones_like(ids[:, :5])  # else tokens like pad_token_id are taken for padding
    if chosen.get("time_step_limit", NO_LIMIT) == NO_LIMIT:  # see above
        stock.config.return_dict = ours.config.return_dict = True
        expected, found = (model.generate(ids[:, :5], **options) for model in (stock, ours))
        assert torch.equal(found.sequences, expected.sequences)
    fresh, own = make(STOCK, kind, **chosen), make(OWN, kind, **chosen)
    assert all(torch.equal(p, own.get_parameter(name)) for name, p in fresh.named_parameters())


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_generation_settings_are_a_copy(kind):
    stock = make(STOCK, kind)
    stock.generation_config.max_new_tokens = 3
    ours = from_stock(stock)
    ours.generation_config.max_new_tokens = 5
    assert stock.generation_config.max_new_tokens == 3
    assert to_stock(ours).generation_config is not ours.generation_config


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_what_cannot_be_honoured_is_refused(kind):
    _, config, extra = OWN[kind]
    for activation in ("prelu", "xielu", "unknown"):
        with pytest.raises(ValueError, match=rf"hidden_act must be an activation .*gelu.*; got '{activation}'"):
            make(OWN, kind, hidden_act=activation)
    stock = make(STOCK, kind, hidden_act="prelu")
    with pytest.raises(ValueError, match="got 'prelu'"):
        from_stock(stock)
    before = [type(module) for module in stock.modules()]
    with pytest.raises(ValueError, match="layers.0.mixer, 'prelu', has parameters that transformers' forward never"):
        use_fast_ops(stock)
    assert [type(module) for module in stock.modules()] == before
    stock = make(STOCK, kind)
    stock.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match=r"quantized weights \(bitsandbytes\)"):
        from_stock(stock)
    if kind == "mamba":
        with pytest.raises(ValueError, match="time_step_init_scheme must be one of random, constant; got 'const'"):
            make(OWN, kind, time_step_init_scheme="const")


def test_padding_with_states_is_refused_where_the_activation_of_zero_is_not_zero():
    for kind in ("mamba", "mamba2"):
        model = make(OWN, kind, hidden_act="sigmoid")
        assert close(to_stock(model)(IDS).logits, model(IDS).logits, 1e-4)
        if kind == "mamba":
            assert close(to_stock(model, state_size=16)(IDS).logits, model(IDS).logits, 1e-4)
        else:
            with pytest.raises(ValueError, match="hidden_act='sigmoid' those that would be added are not zero"):
                to_stock(model, state_size=16)
