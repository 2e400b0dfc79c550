"""The classifier of pairs: what it computes, saving and loading, which class Auto classes choose, and cuts."""

import pytest
import torch
from helpers import arguments
from transformers import AutoModelForSequenceClassification, Trainer

from hf_compressm import (
    CompressionConfig,
    CompreSSMCallback,
    CompreSSMMambaConfig,
    MimoSSMConfig,
    MimoSSMForSequenceClassification,
    MimoSSMForSequencePairClassification,
    state_sizes,
)
from hf_compressm.models.heads import new_model
from hf_compressm.models.saved import load_model

B, L, V = 3, 10, 20


def config(**fields):
    sizes = {"hidden_size": 6, "num_hidden_layers": 2, "state_sizes": [5, 7], "num_labels": 2, "r_min": 0.5}
    return MimoSSMConfig(**({"vocab_size": V} | sizes | fields))


@pytest.fixture
def model():
    return MimoSSMForSequencePairClassification(config()).eval()


def pairs(seed: int = 0):
    return torch.randint(1, V, (B, 2, L), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_logits_are_those_of_both_features_their_product_and_their_difference(norm):
    model = MimoSSMForSequencePairClassification(config(norm=norm)).eval()
    ids = pairs()
    first, second = (model.backbone(ids[:, side]).last_hidden_state.mean(1) for side in (0, 1))
    features = torch.cat([first, second, first * second, first - second], dim=1)
    expected = model.score(torch.nn.functional.gelu(model.dense(features)))
    assert torch.allclose(model(ids).logits, expected, atol=1e-6)
    assert not torch.allclose(model(ids.flip(1)).logits, expected, atol=1e-3)


def test_padding_changes_nothing(model):
    ids, labels = pairs(), torch.tensor([0, 1, 1])
    mask = torch.ones_like(ids)
    mask[0, 0, 7:] = mask[2, 1, 3:] = 0
    padded = model(ids, attention_mask=mask, labels=labels)
    others = model(ids.masked_fill(mask == 0, 4), attention_mask=mask)
    assert torch.allclose(others.logits, padded.logits, atol=1e-6)
    first, second = model.backbone(ids[:1, 0, :7]), model.backbone(ids[:1, 1])
    first, second = (outputs.last_hidden_state.mean(1) for outputs in (first, second))
    features = torch.cat([first, second, first * second, first - second], dim=1)
    assert torch.allclose(model.score(model.act(model.dense(features))), padded.logits[:1], atol=1e-6)
    assert torch.allclose(padded.loss, torch.nn.functional.cross_entropy(padded.logits, labels))


def test_continuous_input_and_hidden_states():
    model = MimoSSMForSequencePairClassification(config(vocab_size=None, num_channels=3)).eval()
    outputs = model(input_values=torch.randn(B, 2, L, 3), output_hidden_states=True)
    assert outputs.logits.shape == (B, 2) and outputs.hidden_states[-1].shape == (2 * B, L, 6)


@pytest.mark.parametrize("shape", [(B, L), (B, 3, L)])
def test_other_shapes_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"input_ids must hold pairs, with shape \(B, 2, L\)"):
        model(torch.ones(shape, dtype=torch.int64))


def test_auto_classes_take_the_class_that_was_saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForSequenceClassification.from_pretrained(tmp_path), load_model(str(tmp_path), "cpu")):
        assert type(loaded) is MimoSSMForSequencePairClassification
        assert torch.equal(loaded.eval()(pairs()).logits, model(pairs()).logits)
    fresh = AutoModelForSequenceClassification.from_config(config())
    assert type(fresh) is MimoSSMForSequenceClassification
    fresh.save_pretrained(tmp_path / "single")
    single = AutoModelForSequenceClassification.from_pretrained(tmp_path / "single")
    assert type(single) is MimoSSMForSequenceClassification


def test_the_kind_of_task_decides():
    assert type(new_model("sequence_pair_classification", config())) is MimoSSMForSequencePairClassification
    assert type(new_model("sequence_classification", config())) is MimoSSMForSequenceClassification
    with pytest.raises(ValueError, match="compressm_mamba has no model that reads pairs of sequences"):
        new_model("sequence_pair_classification", CompreSSMMambaConfig(hidden_size=8, num_hidden_layers=1))


def test_states_are_cut_while_it_trains(tmp_path):
    model = new_model("sequence_pair_classification", config(norm="batch"))
    data = [
        {"input_ids": ids, "labels": torch.tensor(number % 2)} for number, ids in enumerate(pairs().repeat(4, 1, 1))
    ]
    callback = CompreSSMCallback(CompressionConfig(policy="target", target_state_size=3, window_end=0.5))
    Trainer(model, arguments(tmp_path, max_steps=8), train_dataset=data, callbacks=[callback]).train()
    assert sum(state_sizes(model)) == 6
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert state_sizes(loaded) == state_sizes(model)
    assert torch.equal(loaded(pairs()).logits, model.eval()(pairs()).logits)
