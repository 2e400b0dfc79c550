"""Forecasts: losses from every position, scales, missing values, recurrence in constant memory, cuts and saving."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import arguments
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForTimeSeriesPrediction, Trainer

from hf_compressm import CompreSSMCallback, MimoSSMConfig, MimoSSMForForecasting, compress, state_sizes
from hf_compressm.models import MimoSSMCache
from hf_compressm.runs.healing import add_lora

QUANTILES = [0.1, 0.5, 0.9]


def make(**fields):
    torch.manual_seed(0)
    sizes = {"num_channels": 2, "hidden_size": 8, "num_hidden_layers": 2, "state_sizes": 6, "prediction_length": 3}
    return MimoSSMForForecasting(MimoSSMConfig(**(sizes | fields))).eval()


def context(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double() * 3 + 5


def pinball(found, wanted):
    """(Q, ...) and (...): the definition, written out."""
    losses = []
    for level, row in zip(QUANTILES, found, strict=True):
        error = wanted - row
        losses.append(torch.where(error > 0, level * error, (level - 1) * error))
    return torch.stack(losses).mean()


def test_the_loss_is_that_of_the_next_steps_from_every_position():
    model, series = make(quantiles=QUANTILES).double(), context(2, 10, 2)
    given, labels = series[:, :7], series[:, 7:]
    found = model(input_values=given, labels=labels)
    # An untrained head's quantiles cross: outputs are in order, what is trained is each level's own.
    raw = model.score(model.backbone(input_values=given).last_hidden_state).unflatten(-1, (3, 3, 2))
    expected = [pinball(raw[:, t].transpose(0, 1), series[:, t + 1 : t + 4]) for t in range(7)]
    torch.testing.assert_close(found.loss, torch.stack(expected).mean())
    torch.testing.assert_close(found.logits, raw[:, -1].sort(1).values)
    assert found.logits.shape == (2, 3, 3, 2)
    torch.testing.assert_close(model(input_values=given).logits, found.logits)
    half = model(input_values=given, labels=labels, num_items_in_batch=2 * labels.numel()).loss
    torch.testing.assert_close(half, found.loss / 2)


def test_the_mean_of_some_channels():
    model, series = make(prediction_channel_indices=[1], prediction_length=2).double(), context(2, 9, 2)
    found = model(input_values=series[:, :7], labels=series[:, 7:, 1])
    raw = model.score(model.backbone(input_values=series[:, :7]).last_hidden_state)
    wanted = torch.stack([series[:, t + 1 : t + 3, 1] for t in range(7)], 1)
    torch.testing.assert_close(found.loss, (raw - wanted).square().mean())
    assert found.logits.shape == (2, 2, 1)


@pytest.mark.parametrize("scaling", ["mean", "std"])
def test_forecasts_follow_the_unit_of_the_series(scaling):
    model, x = make(quantiles=QUANTILES, scaling=scaling).double(), context(2, 12, 2)
    shift = torch.tensor([4.0, -7.0]) if scaling == "std" else 0
    found = model.forecast(x * 100 + shift, 8)
    torch.testing.assert_close(found, model.forecast(x, 8) * 100 + shift, rtol=1e-9, atol=1e-9)
    future = context(2, 3, 2)
    scaled = model(input_values=x * 100 + shift, labels=future * 100 + shift).loss
    torch.testing.assert_close(scaled, model(input_values=x, labels=future).loss)
    constant = model.forecast(torch.full((1, 5, 2), 3.0))
    assert constant.isfinite().all()


def test_a_scale_is_that_of_the_context_not_of_what_follows():
    model, x = make(scaling="std").double(), context(2, 12, 2)
    one, other = (model(input_values=x, labels=labels) for labels in (torch.zeros(2, 3, 2), torch.ones(2, 3, 2) * 99))
    assert torch.equal(one.logits, other.logits) and not torch.equal(one.loss, other.loss)


@pytest.mark.parametrize("fields", [{}, {"quantiles": QUANTILES, "scaling": "std"}, {"scaling": "mean"}])
@pytest.mark.parametrize("block", [1, 3])
def test_recurrent_forecasts_are_those_of_full_forwards(fields, block):
    model, x = make(prediction_length=block, **fields).double(), context(2, 12, 2)
    found = model.forecast(x, 7)
    # The full forward has the scale of the context alone: its forecasts are compared in that unit.
    model(input_values=x, past_key_values=(cache := MimoSSMCache(2)), use_cache=True)
    location, scale = cache.scaling
    plain = copy.deepcopy(model)
    plain.config.scaling = None
    scaled, parts = (x - location) / scale, []
    while len(parts) * block < 7:
        logits = plain(input_values=scaled, use_cache=False).logits
        parts.append(logits)
        scaled = torch.cat([scaled, logits[:, 1] if "quantiles" in fields else logits], 1)
    expected = torch.cat(parts, -2)[..., :7, :]
    if "quantiles" in fields:
        location, scale = location[:, None], scale[:, None]
    torch.testing.assert_close(found, expected * scale + location, rtol=1e-10, atol=1e-10)


def test_reading_on_from_a_cache_is_reading_at_once():
    model, x = make(quantiles=QUANTILES).double(), context(2, 12, 2)
    cache = MimoSSMCache(2)
    model(input_values=x[:, :5], past_key_values=cache, use_cache=True)
    for t in range(5, 12):
        step = model(input_values=x[:, t : t + 1], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(step.logits, model(input_values=x).logits, rtol=1e-10, atol=1e-10)


def test_memory_does_not_grow_with_the_horizon():
    model, lengths, bytes_of_states = make(quantiles=QUANTILES, scaling="std"), [], []

    def watch(module, args, kwargs, output):
        lengths.append(kwargs["input_values"].shape[1])
        cache = next(value for value in output.values() if isinstance(value, MimoSSMCache))
        bytes_of_states.append(sum(state.nbytes for state in cache.states))

    model.backbone.register_forward_hook(watch, with_kwargs=True)
    model.forecast(context(1, 50, 2).float(), 300)
    assert lengths == [50, *[3] * 99] and set(bytes_of_states) == {2 * 6 * 8}


def test_padding_on_either_side_leaves_no_trace():
    model, x, labels = make(quantiles=QUANTILES, scaling="std").double(), context(1, 8, 2), context(1, 3, 2)
    junk = torch.full((1, 4, 2), 1e3, dtype=torch.double)
    expected = model(input_values=x, labels=labels)
    for order in ((junk, x), (x, junk)):
        mask = torch.cat([torch.full((1, len(part[0])), float(part is x)) for part in order], 1)
        found = model(input_values=torch.cat(order, 1), attention_mask=mask, labels=labels)
        torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits))
        forecast = model.forecast(torch.cat(order, 1), 9, attention_mask=mask)
        torch.testing.assert_close(forecast, model.forecast(x, 9))


def test_missing_values_count_neither_for_the_loss_nor_for_the_scale():
    model, x, labels = make(scaling="std").double(), context(2, 8, 2), context(2, 3, 2)
    missing, observed = x.clone(), torch.ones_like(x)
    missing[0, 3, 1], observed[0, 3, 1] = torch.nan, 0
    labels[1, 2, 0] = torch.nan
    found = model(input_values=missing, labels=labels)
    assert found.loss.isfinite() and found.logits.isfinite().all()
    location = x.masked_fill(observed == 0, 0).sum(1) / observed.sum(1)
    filled = torch.where(observed == 1, x, location[:, None])
    marked = model(input_values=filled, observed_mask=observed, labels=labels)
    torch.testing.assert_close((marked.loss, marked.logits), (found.loss, found.logits))
    whole = model(input_values=filled, labels=labels)
    assert (whole.loss - found.loss).abs() > 1e-3
    found.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_missing_value_is_no_target():
    model, series = make().double(), context(1, 11, 2)
    series[0, 3, 1] = torch.nan
    raw = model.score(model.backbone(input_values=series[:, :8].nan_to_num(0)).last_hidden_state).unflatten(-1, (3, 2))
    wanted = torch.stack([series[:, t + 1 : t + 4] for t in range(8)], 1)
    loss = model(input_values=series[:, :8], labels=series[:, 8:]).loss
    torch.testing.assert_close(loss, (raw - wanted).square().nanmean())


def test_other_channels_are_needed_beyond_one_block():
    model, x = make(num_channels=3, prediction_channel_indices=[2, 0]).double(), context(2, 8, 3)
    assert model.forecast(x).shape == (2, 3, 2)
    future = context(2, 7, 1)
    found = model.forecast(x, 7, future_values=future)
    first = model.forecast(x)
    read = torch.stack([first[..., 1], future[:, :3, 0], first[..., 0]], 2)
    torch.testing.assert_close(found[:, 3:6], model(input_values=torch.cat([x, read], 1)).logits)
    with pytest.raises(ValueError, match=r"give future_values of shape \(2, 7, 1\); got None"):
        model.forecast(x, 7)


def test_one_channel_is_taken_without_an_axis():
    model, x = make(num_channels=1, quantiles=QUANTILES), context(2, 8, 1).float()
    expected = model(input_values=x[:, :5], labels=x[:, 5:], observed_mask=torch.ones(2, 5, 1))
    found = model(input_values=x[:, :5, 0], labels=x[:, 5:, 0], observed_mask=torch.ones(2, 5))
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)


def test_a_cache_keeps_the_scales_of_its_rows():
    model, x = make(scaling="mean"), context(3, 8, 2).float()
    model(input_values=x, past_key_values=(cache := MimoSSMCache(2)), use_cache=True)
    first = cache.scaling[1]
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(cache.scaling[1], first[[2, 0]])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert torch.equal(cache.scaling[1], first[[0, 2, 2, 0]])
    cache.reset()
    assert cache.scaling is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prediction_length": 0}, "prediction_length must be an integer >= 1, got 0"),
        ({"quantiles": [0.5, 0.1]}, r"quantiles must be increasing numbers in \(0, 1\)"),
        ({"quantiles": [0.5, 1.0]}, r"quantiles must be increasing numbers in \(0, 1\)"),
        ({"quantiles": []}, r"quantiles must be increasing numbers in \(0, 1\)"),
        ({"scaling": "max"}, "scaling must be None or one of mean, std"),
        ({"prediction_channel_indices": [2]}, r"different channels in \[0, num_channels\); got \[2\]"),
        ({"num_channels": None, "vocab_size": 5}, "reads measurements: set config.num_channels"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_bad_inputs_are_refused():
    model, x = make(), context(2, 8, 2)
    for given, message in (
        ({}, "give input_values"),
        ({"input_values": x[..., :1]}, r"input_values must have shape \(B, L, 2\)"),
        ({"input_values": x, "labels": x}, r"labels must have shape \(B, prediction_length, K\) = \(2, 3, 2\)"),
        ({"input_values": x, "observed_mask": x[:, :3]}, "observed_mask must have the shape of input_values"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**given)
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        model.forecast(x, 0)


def rows(count=16):
    steps = torch.arange(15.0)
    waves = [torch.sin(steps[:, None] * 0.7 + torch.tensor([i, i + 1.0])) for i in range(count)]
    return [{"input_values": wave[:12], "labels": wave[12:]} for wave in waves]


def test_trained_cut_and_saved(tmp_path):
    model = make(quantiles=QUANTILES, scaling="std")
    callback = CompreSSMCallback(policy="target", target_state_size=3, window_end=0.9)
    trainer = Trainer(
        model,
        arguments(tmp_path / "run", max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=10),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[callback],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert state_sizes(model) == [3, 3] and trainer.evaluate()["eval_loss"] < before
    assert trainer.predict(rows(4)).predictions.shape == (4, 3, 3, 2)
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path / "saved").eval()
    assert type(again) is MimoSSMForForecasting and again.config.quantiles == QUANTILES
    x = torch.stack([row["input_values"] for row in rows(2)])
    torch.testing.assert_close(again.forecast(x, 10), model.eval().forecast(x, 10))


def test_compress_keeps_what_the_state_kept():
    model, x = make(quantiles=QUANTILES), torch.stack([row["input_values"] for row in rows(4)])
    with torch.no_grad():
        for layer in model.backbone.layers:  # only half of the states are read
            layer.mixer.C_re[:, 3:] = layer.mixer.C_im[:, 3:] = 0
    expected = model.forecast(x, 6)
    compress(model, target=3)
    assert state_sizes(model) == [3, 3]
    torch.testing.assert_close(model.forecast(x, 6), expected, rtol=1e-3, atol=1e-3)


def test_healing_trains_the_head_beside_lora():
    model = add_lora(make(quantiles=QUANTILES), SimpleNamespace(problem="forecasting"), {"r": 2})
    trained = {name.split(".modules_to_save")[0].rpartition(".")[2] for name, p in model.named_parameters()
               if p.requires_grad and "lora" not in name}  # fmt: skip
    assert trained == {"score"} and any("lora" in name for name, _ in model.named_parameters())
    x = torch.stack([row["input_values"] for row in rows(2)])
    assert model(input_values=x, labels=x[:, :3]).loss.isfinite()


def test_lora_around_it_trains_and_cuts(tmp_path):
    model = get_peft_model(
        make(quantiles=QUANTILES), LoraConfig(target_modules=["out_proj", "score"], init_lora_weights=False)
    )
    args = arguments(tmp_path, max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, label_names=["labels"])
    callback = CompreSSMCallback(policy="target", target_state_size=3, window_end=0.9)
    Trainer(model, args, train_dataset=rows(), callbacks=[callback]).train()
    assert state_sizes(model) == [3, 3]
    x = torch.stack([row["input_values"] for row in rows(2)])
    expected = model.eval().forecast(x, 7)
    torch.testing.assert_close(model.merge_and_unload().forecast(x, 7), expected, rtol=1e-4, atol=1e-5)
