"""MimoSSM models: saving and loading, half precision, gradient checkpointing."""

import copy

import pytest
import torch
from mimo_models import B, L, V, close, config, token_ids
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from hf_compressm.models import (
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMModel,
)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_poles_of_a_new_model_in_half_precision_are_float32(dtype):
    model = AutoModelForCausalLM.from_config(config(), dtype=dtype)
    found = {name.rpartition(".")[2]: parameter.dtype for name, parameter in model.named_parameters()}
    assert found["nu_log"] == found["theta_log"] == torch.float32 and found["B_re"] == dtype
    assert model(token_ids()).logits.isfinite().all()
