"""MimoSSM models: configuration, blocks, inputs, padding and losses."""

import copy
import json

import pytest
import torch
from mimo_models import B, L, V, close, config, token_ids
from torch import nn
from transformers import (
    AutoConfig,
)

from hf_compressm.layers import LRU
from hf_compressm.models import (
    MimoSSMCache,
    MimoSSMConfig,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMModel,
)

# Configuration


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_channels": 2}, "not both"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"hidden_size": 0}, "hidden_size must be"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"state_sizes": [5]}, "state_sizes must be"),
        ({"state_sizes": [5, 0]}, "state_sizes must be"),
        ({"state_sizes": [5, 2.0]}, "state_sizes must be"),
        ({"state_sizes": 0}, "state_sizes must be"),
        ({"r_min": 0.99}, "r_min < r_max"),
        ({"r_max": 1.01}, "r_min < r_max"),
        ({"max_phase": 0.0}, "max_phase"),
        ({"max_phase": 6.3}, "max_phase"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm": "rms"}, "layer, batch"),
        ({"pooling": "max"}, "mean, last"),
        ({"hidden_act": "gelo"}, "hidden_act"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"initializer_range": -1.0}, "initializer_range"),
    ],
)
def test_config_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(**kwargs)


def test_config_defaults_and_round_trip(tmp_path):
    assert MimoSSMConfig().state_sizes == [256] * 4
    assert config(state_sizes=7).state_sizes == [7, 7]
    history = [{"event": "cut", "step": 3, "layers": [{"old_size": 8, "new_size": 5}]}]
    written = config(compression_history=history, num_labels=4, pad_token_id=1, tie_word_embeddings=True)
    written.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, MimoSSMConfig) and read.to_diff_dict() == written.to_diff_dict()
    assert read.compression_history == history and read.num_labels == 4 and read.state_sizes == [5, 3]
    assert json.loads((tmp_path / "config.json").read_text())["state_sizes"] == [5, 3]


def test_building_a_model_checks_its_config():
    for cls in (MimoSSMModel, MimoSSMForSequenceClassification):
        with pytest.raises(ValueError, match="both are None"):
            cls(MimoSSMConfig())
    with pytest.raises(ValueError, match="set config.vocab_size"):
        MimoSSMForCausalLM(config(vocab_size=None, num_channels=2))
    changed = config()
    changed.state_sizes = [4]
    with pytest.raises(ValueError, match="state_sizes must be"):
        MimoSSMModel(changed)


# Forward


def test_initialisation():
    model = MimoSSMForCausalLM(config(vocab_size=200, hidden_size=64, initializer_range=0.03, r_min=0.9, r_max=0.95))
    assert model.lm_head.weight.std().item() == pytest.approx(0.03, rel=0.1)
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.03, rel=0.1)
    for layer in model.backbone.layers:
        assert layer.out_proj.weight.std().item() == pytest.approx(1 / 8, rel=0.1)
        modulus = layer.mixer.system()[0].abs()
        assert modulus.min() >= 0.9 and modulus.max() <= 0.95
    assert [layer.mixer.state_size for layer in model.backbone.layers] == [5, 3]
    assert all(isinstance(layer.mixer, LRU) for layer in model.backbone.layers)


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_block_is_what_its_docstring_says(norm, prenorm):
    model = MimoSSMModel(config(norm=norm, prenorm=prenorm)).eval()
    if norm == "batch":
        for module in [m for m in model.modules() if hasattr(m, "running_mean")]:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)

    def normalise(module, x):
        if norm == "layer":
            return nn.functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-5)
        return nn.functional.batch_norm(
            x.mT, module.running_mean, module.running_var, module.weight, module.bias, eps=1e-5
        ).mT

    ids = token_ids()
    x = model.embeddings(ids)
    for layer in model.layers:
        y = layer.mixer(normalise(layer.norm, x) if prenorm else x)[0]
        a, b = nn.functional.linear(nn.functional.gelu(y), layer.out_proj.weight, layer.out_proj.bias).chunk(2, -1)
        x = x + a * b.sigmoid()
        x = x if prenorm else normalise(layer.norm, x)
    close(model(ids).last_hidden_state, normalise(model.norm, x) if prenorm else x)
    assert (model.norm is None) == (not prenorm)


def test_dropout_acts_twice_and_only_in_training():
    block = MimoSSMModel(config(dropout=0.5)).layers[0]
    x = torch.randn(B, 100, 8)
    inner = []
    block.out_proj.register_forward_pre_hook(lambda _, args: inner.append(args[0]))
    for training in (True, False):
        branch = block.train(training)(x, None, None)[0] - x
        for dropped in (inner[-1], branch):
            assert (dropped == 0).float().mean().item() == pytest.approx(0.5 * training, abs=0.05)


def test_inputs():
    channels = config(vocab_size=None, num_channels=2)
    continuous, discrete = MimoSSMModel(channels).eval(), MimoSSMModel(config()).eval()
    values, ids = torch.randn(B, L, 2), token_ids()
    assert continuous.main_input_name == "input_values" and discrete.main_input_name == "input_ids"
    assert continuous(input_values=values).last_hidden_state.shape == (B, L, 8)
    for model, inputs in [(continuous, {"input_values": values}), (discrete, {"input_ids": ids})]:
        embeds = model.get_input_embeddings()(next(iter(inputs.values())))
        close(model(inputs_embeds=embeds).last_hidden_state, model(**inputs).last_hidden_state)
    for model, inputs, message in [
        (continuous, {"input_ids": ids}, "reads input_values"),
        (discrete, {"input_values": values}, "reads input_ids"),
        (continuous, {"input_values": values[..., :1]}, "must have shape"),
        (continuous, {"input_values": values[..., 0]}, "must have shape"),
        (discrete, {}, "exactly one"),
        (discrete, {"input_ids": ids, "inputs_embeds": values}, "exactly one"),
        (
            discrete,
            {"input_ids": ids, "attention_mask": torch.ones(B, L - 1)},
            "attention_mask must have shape",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**inputs)


def test_tuple_output_and_hidden_states(lm):
    ids = token_ids()
    full = lm(ids, labels=ids, output_hidden_states=True)
    parts = lm(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert isinstance(parts, tuple) and len(parts) == 4
    assert torch.equal(parts[0], full.loss) and torch.equal(parts[1], full.logits)
    assert isinstance(parts[2], MimoSSMCache) and len(parts[3]) == 3
    close(full.hidden_states[0], lm.backbone.embeddings(ids))
    close(lm.lm_head(full.hidden_states[-1]), full.logits)
    assert lm(ids, use_cache=False).past_key_values is None and lm(ids).hidden_states is None
    lm.config.return_dict = False
    assert isinstance(lm(ids), tuple)
    lm.train()
    assert len(lm(ids)) == 1


def test_logits_to_keep(lm):
    ids = token_ids()
    full = lm(ids).logits
    close(lm(ids, logits_to_keep=2).logits, full[:, -2:])
    close(lm(ids, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]])


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, pooling, prenorm, norm):
    model = MimoSSMForSequenceClassification(config(pooling=pooling, prenorm=prenorm, norm=norm, num_labels=3)).eval()
    lengths = [L, 6, 1]
    ids, padded, mask = token_ids(), token_ids(), torch.zeros(B, L, dtype=torch.long)
    for row, n in enumerate(lengths):
        place = slice(L - n, L) if side == "left" else slice(0, n)
        padded[row, place], mask[row, place] = ids[row, :n], 1
    logits = model(padded, attention_mask=mask).logits
    states = model.backbone(padded, attention_mask=mask).last_hidden_state
    for row, n in enumerate(lengths):
        close(logits[row], model(ids[row : row + 1, :n]).logits[0])
        close(states[row][mask[row].bool()], model.backbone(ids[row : row + 1, :n]).last_hidden_state[0])
    assert not torch.allclose(logits, model(padded).logits, atol=1e-3)


def test_pooling_is_over_features():
    ids = token_ids()
    for pooling in ("mean", "last"):
        model = MimoSSMForSequenceClassification(config(pooling=pooling)).eval()
        states = model.backbone(ids).last_hidden_state
        close(model(ids).logits, model.score(states.mean(1) if pooling == "mean" else states[:, -1]))


def test_batch_norm_leaves_padding_out():
    model = MimoSSMModel(config(norm="batch", dropout=0.0)).train()
    padded_model = copy.deepcopy(model)
    ids = token_ids()
    padded = torch.cat([token_ids(B, 4), ids], 1)
    mask = torch.cat([torch.zeros(B, 4), torch.ones(B, L)], 1)
    for _ in range(2):
        plain = model(ids).last_hidden_state
        close(padded_model(padded, attention_mask=mask).last_hidden_state[:, 4:], plain)
    for (name, a), (_, b) in zip(model.named_buffers(), padded_model.named_buffers(), strict=True):
        close(a, b)
        assert not torch.allclose(a, torch.zeros_like(a)) and not torch.allclose(a, torch.ones_like(a)), name
    reference = nn.BatchNorm1d(8)
    x = torch.randn(B, L, 8)
    fresh = MimoSSMModel(config(norm="batch")).layers[0].norm.train()
    for _ in range(3):
        close(fresh(x, None), reference(x.mT).mT)
    close(fresh.running_mean, reference.running_mean)
    close(fresh.running_var, reference.running_var)
    close(fresh.eval()(x, None), reference.eval()(x.mT).mT)


# Losses


def test_causal_lm_loss_is_shifted_and_scaled(lm):
    ids = token_ids()
    labels = ids.clone()
    labels[:, :3] = -100
    logits = lm(ids).logits[:, 2:-1]
    expected = nn.functional.cross_entropy(logits.reshape(-1, V), ids[:, 3:].reshape(-1), reduction="sum")
    count = B * (L - 3)
    close(lm(ids, labels=labels).loss, expected / count)
    close(lm(ids, labels=labels, num_items_in_batch=torch.tensor(2 * count)).loss, expected / (2 * count))


@pytest.mark.parametrize(
    "problem, num_labels, labels, loss",
    [
        ("single_label_classification", 3, torch.randint(0, 3, (6,)), nn.functional.cross_entropy),
        (
            "multi_label_classification",
            3,
            torch.rand(6, 3).round(),
            nn.functional.binary_cross_entropy_with_logits,
        ),
        ("regression", 1, torch.randn(6), lambda x, y: nn.functional.mse_loss(x[:, 0], y)),
        ("regression", 2, torch.randn(6, 2), nn.functional.mse_loss),
    ],
)
def test_classification_losses(problem, num_labels, labels, loss):
    model = MimoSSMForSequenceClassification(config(num_labels=num_labels)).eval()
    if problem == "regression" and num_labels > 1:
        model.config.problem_type = problem
    ids = token_ids(6, L)
    outputs = model(ids, labels=labels)
    assert model.config.problem_type == problem and outputs.logits.shape == (6, num_labels)
    close(outputs.loss, loss(outputs.logits, labels))
    items = torch.tensor(labels.numel())
    parts = [
        model(ids[rows], labels=labels[rows], num_items_in_batch=items).loss for rows in (slice(0, 2), slice(2, 6))
    ]
    close(sum(parts), outputs.loss)
