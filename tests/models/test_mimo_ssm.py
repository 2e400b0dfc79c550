"""MimoSSM models: padding, caches and generation, saving and loading, losses, training with the Trainer."""

import copy
import json
import logging

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_compressm.layers import LRU
from hf_compressm.models import (
    MimoSSMCache,
    MimoSSMConfig,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMModel,
)

V, B, L = 19, 3, 11


def config(**kwargs):
    # With the usual small initial scale all logits of an untrained model would be near zero.
    defaults = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "state_sizes": [5, 3]}
    return MimoSSMConfig(**{**defaults, "initializer_range": 1.0, **kwargs})


def token_ids(*shape):
    return torch.randint(0, V - 1, shape or (B, L))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def lm():
    return MimoSSMForCausalLM(config()).eval()


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


# Saving and loading


@pytest.mark.parametrize(
    "auto, cls",
    [
        (AutoModel, MimoSSMModel),
        (AutoModelForCausalLM, MimoSSMForCausalLM),
        (AutoModelForSequenceClassification, MimoSSMForSequenceClassification),
    ],
)
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_save_and_load(tmp_path, auto, cls, norm):
    model = cls(config(norm=norm, num_labels=3)).train()
    ids = token_ids()
    model(ids)
    model.eval().save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is cls and not loaded.training
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert [layer.mixer.state_size for layer in getattr(loaded, "backbone", loaded).layers] == [5, 3]


def test_backbone_of_a_causal_lm_becomes_a_classifier(tmp_path, lm):
    lm.save_pretrained(tmp_path)
    model = MimoSSMForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(model.backbone.layers[1].mixer.B_im, lm.backbone.layers[1].mixer.B_im)
    assert model.score.weight.isfinite().all() and model.score.weight.std() > 0


def test_missing_mixer_weights_alone_are_initialised(tmp_path, lm):
    gone = ["backbone.layers.0.mixer.theta_log", *(k for k in lm.state_dict() if "layers.1.mixer" in k)]
    lm.save_pretrained(tmp_path, state_dict={k: v for k, v in lm.state_dict().items() if k not in gone})
    loaded = MimoSSMForCausalLM.from_pretrained(tmp_path, r_min=0.5, r_max=0.6, max_phase=0.01)
    for name, value in lm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) == (name not in gone), name
    first, second = (layer.mixer.system() for layer in loaded.backbone.layers)
    assert (first[0].angle().abs() <= 0.01 + 1e-6).all() and (second[0].angle().abs() <= 0.01 + 1e-6).all()
    assert ((second[0].abs() >= 0.5 - 1e-6) & (second[0].abs() <= 0.6 + 1e-6)).all()


def test_checkpoint_of_other_sizes_is_refused_by_name(tmp_path, lm):
    lm.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"backbone\.layers\.1\.mixer\.B_re is \(3, 8\).*\(4, 8\) in the model"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config(state_sizes=[5, 4]))
    model, info = MimoSSMForCausalLM.from_pretrained(
        tmp_path, config=config(state_sizes=[5, 4]), ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 7 and model.backbone.layers[1].mixer.state_size == 4


def test_tied_weights(tmp_path):
    tied = MimoSSMForCausalLM(config(tie_word_embeddings=True)).eval()
    assert tied.lm_head.weight is tied.backbone.embeddings.weight
    tied.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    ids = token_ids()
    assert torch.equal(loaded(ids).logits, tied(ids).logits)
    loaded.resize_token_embeddings(V + 4)
    assert loaded(ids).logits.shape[-1] == loaded.config.vocab_size == V + 4
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    untied = MimoSSMForCausalLM(config())
    assert untied.lm_head.weight is not untied.backbone.embeddings.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype, lm):
    lm.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert half.backbone.layers[0].out_proj.weight.dtype == dtype
    assert half.backbone.layers[0].mixer.nu_log.dtype == half.backbone.layers[0].mixer.theta_log.dtype == torch.float32
    ids = token_ids()
    outputs = half(ids)
    assert outputs.logits.dtype == dtype and outputs.past_key_values.states[0].dtype == torch.complex64
    exact = lm(ids).logits
    assert (outputs.logits - exact).norm() < 0.05 * exact.norm()
    half.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())
    values = torch.randn(B, L, 2)
    for norm in ("layer", "batch"):
        model = MimoSSMModel(config(vocab_size=None, num_channels=2, norm=norm)).to(dtype).train()
        assert model(input_values=values, attention_mask=torch.ones(B, L)).last_hidden_state.dtype == dtype


# Gradient checkpointing


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_gradient_checkpointing_equals_plain(norm, reentrant):
    plain = MimoSSMForCausalLM(config(norm=norm, dropout=0.3)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert checkpointed.is_gradient_checkpointing and checkpointed.backbone.layers[0].gradient_checkpointing
    ids = token_ids()
    mask = torch.ones(B, L)
    mask[0, :4] = 0
    losses = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        outputs = model(ids, attention_mask=mask, labels=ids, use_cache=True)
        assert outputs.past_key_values.get_seq_length() == L
        outputs.loss.backward()
        losses.append(outputs.loss)
    close(*losses)
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    for a, b in zip(plain.buffers(), checkpointed.buffers(), strict=True):
        close(a, b)


# Cache and generation


def test_cache_equals_full_forward(lm):
    ids = token_ids()
    full = lm(ids).logits
    cache, pieces = None, []
    for piece in ids.split([4, 1, 1, 5], 1):
        outputs = lm(piece, past_key_values=cache)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    close(torch.cat(pieces, 1), full)
    assert cache.get_seq_length() == L and [s.shape for s in cache.states] == [(B, 5), (B, 3)]
    assert cache.batch_size == B and len(cache) == 2 and cache.get_max_length() == -1
    before = [s.clone() for s in cache.states]
    lm(ids[:, :2], past_key_values=cache, use_cache=False)
    assert cache.get_seq_length() == L and all(map(torch.equal, before, cache.states))


@torch.no_grad()
def test_cache_rows(lm):
    ids = token_ids()
    cache, next_ids = lm(ids).past_key_values, token_ids(B, 1)
    expected = lm(next_ids, past_key_values=copy.deepcopy(cache)).logits
    order = torch.tensor([2, 0, 0, 1])
    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(order)
    close(lm(next_ids[order], past_key_values=reordered).logits, expected[order])
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    close(
        lm(next_ids.repeat_interleave(2, 0), past_key_values=repeated).logits,
        expected.repeat_interleave(2, 0),
    )
    with pytest.raises(RuntimeError, match="rolled back"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized and cache.batch_size == -1
    close(lm(ids, past_key_values=cache).logits, lm(ids).logits)


def test_cache_of_another_kind_is_refused(lm):
    with pytest.raises(TypeError, match="must be a MimoSSMCache"):
        lm(token_ids(), past_key_values=DynamicCache())


def greedy(model, ids, steps, mask=None):
    """Reference: the whole sequence anew for every token."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(steps):
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
    return ids


OPTIONS = {"pad_token_id": V - 1, "eos_token_id": None}


def test_generate_greedy_is_recurrent(lm):
    ids, lengths = token_ids(), []
    handle = lm.backbone.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    generated = lm.generate(ids, max_new_tokens=7, do_sample=False, **OPTIONS)
    handle.remove()
    assert lengths == [L] + [1] * 6
    assert torch.equal(generated, greedy(lm, ids, 7))
    assert torch.equal(lm.generate(ids, max_new_tokens=7, do_sample=False, use_cache=False, **OPTIONS), generated)
    chunked = lm.generate(
        ids,
        max_new_tokens=7,
        do_sample=False,
        prefill_chunk_size=4,
        past_key_values=MimoSSMCache(2),
        **OPTIONS,
    )
    assert torch.equal(chunked, generated)


def test_generate_scores_equal_full_forward(lm):
    ids = token_ids()
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2}):
        result = lm.generate(
            ids, max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **options, **OPTIONS
        )
        full = lm(result.sequences).logits
        close(torch.stack(result.logits, 1), full[:, L - 1 : -1])


def test_generate_sampling_does_not_depend_on_the_cache(lm):
    ids, results = token_ids(), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(lm.generate(ids, max_new_tokens=7, do_sample=True, use_cache=use_cache, **OPTIONS))
    assert torch.equal(*results)


def test_generate_beam_search(lm):
    ids = token_ids()
    options = {"max_new_tokens": 6, "num_beams": 4, "do_sample": False, "num_return_sequences": 2, **OPTIONS}
    cached, anew = (
        lm.generate(ids, use_cache=use_cache, return_dict_in_generate=True, output_scores=True, **options)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, anew.sequences)
    close(cached.sequences_scores, anew.sequences_scores)
    # Otherwise no beam changed places and reordering was not tested.
    assert any((row[row >= 0] != row[row >= 0][0]).any() for row in cached.beam_indices % 4)


def test_generate_with_left_padding(lm):
    ids = token_ids()
    mask = torch.ones_like(ids)
    for row, n in enumerate([0, 5, 10]):
        ids[row, :n], mask[row, :n] = V - 1, 0
    for inputs in ({"attention_mask": mask}, {}):
        generated = lm.generate(ids, max_new_tokens=5, do_sample=False, **inputs, **OPTIONS)
        for row, n in enumerate([0, 5, 10]):
            assert torch.equal(generated[row, n:], greedy(lm, ids[row : row + 1, n:], 5)[0])


def test_generate_goes_on_from_a_returned_cache(lm):
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"do_sample": False, "return_dict_in_generate": True, **OPTIONS}
    whole = lm.generate(ids, attention_mask=mask, max_new_tokens=9, **options).sequences
    first = lm.generate(ids, attention_mask=mask, max_new_tokens=5, **options)
    assert first.past_key_values.get_seq_length() == L + 4
    longer = torch.cat([mask, mask.new_ones(B, 5)], 1)
    lengths = []
    handle = lm.backbone.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    rest = lm.generate(
        first.sequences,
        attention_mask=longer,
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        **options,
    )
    handle.remove()
    assert torch.equal(rest.sequences, whole) and lengths == [1] * 4


# Training


class Losses(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train(model, rows, tmp_path, **kwargs):
    arguments = TrainingArguments(
        tmp_path,
        **{
            "max_steps": 5,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            **kwargs,
        },
    )
    losses = Losses()
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[losses])
    trainer.train()
    return trainer, losses.losses


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


def test_trainer_classification(tmp_path):
    model = MimoSSMForSequenceClassification(config(vocab_size=None, num_channels=1, num_labels=2, dropout=0.0))
    values = torch.randn(16, L, 1)
    rows = [{"input_values": v, "labels": int(v.mean() > 0)} for v in values]
    trainer, losses = train(model, rows, tmp_path, max_steps=12)
    assert losses[-1] < losses[0]
    prediction = trainer.predict(rows)
    assert prediction.predictions.shape == (16, 2) and "eval_loss" in trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    close(loaded(input_values=values).logits, torch.tensor(prediction.predictions))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_trainer_causal_lm(tmp_path):
    ids = token_ids(8, L)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer, losses = train(MimoSSMForCausalLM(config(dropout=0.0)), rows, tmp_path, gradient_checkpointing=True)
    assert losses[-1] < losses[0] and trainer.evaluate()["eval_loss"] < losses[0]
    assert trainer.predict(rows).predictions.shape == (8, L, V)


@pytest.mark.parametrize("kind", ["causal", "regression"])
def test_trainer_gradient_accumulation_equals_a_large_batch(tmp_path, kind):
    if kind == "causal":
        model = MimoSSMForCausalLM(config(dropout=0.0))
        labels = token_ids(8, L)
        labels[:5, 3:] = -100
        rows = [{"input_ids": x, "labels": y} for x, y in zip(token_ids(8, L), labels, strict=True)]
    else:
        model = MimoSSMForSequenceClassification(config(dropout=0.0, num_labels=1))
        rows = [{"input_ids": x, "labels": float(x[0])} for x in token_ids(8, L)]
    runs = []
    for batch, accumulated in ((8, 1), (2, 4)):
        trainer, losses = train(
            copy.deepcopy(model),
            rows,
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
        )
        runs.append((losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-3)
    close(runs[0][1], runs[1][1], 1e-3)
