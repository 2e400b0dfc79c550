"""Labels for each step: losses with padding, cuts, saving, and the task that uses them."""

import pytest
import torch
from own_delta_models import config as delta_config
from own_minimax_models import config as minimax_config
from torch.nn.functional import cross_entropy
from transformers import AutoModelForTokenClassification

from hf_compressm import compress, state_sizes
from hf_compressm.models import CompreSSMMamba2Config, CompreSSMMambaConfig, MimoSSMConfig

CONFIGS = {
    "mimo_ssm": lambda **k: MimoSSMConfig(num_channels=2, hidden_size=8, num_hidden_layers=2, state_sizes=6, **k),
    "mamba": lambda **k: CompreSSMMambaConfig(num_channels=2, hidden_size=8, num_hidden_layers=2, state_size=6, **k),
    "mamba2": lambda **k: CompreSSMMamba2Config(
        num_channels=2, hidden_size=8, num_hidden_layers=2, state_size=6, num_heads=2, head_dim=8, n_groups=1, **k
    ),
    # One layer of softmax attention between two that are cut.
    "gated_deltanet": lambda **k: delta_config(num_channels=2, state_sizes=6, **k),
    "minimax": lambda **k: minimax_config(num_channels=2, state_sizes=6, **k),
}


@pytest.fixture(params=CONFIGS)
def make(request):
    torch.manual_seed(0)
    return lambda **fields: AutoModelForTokenClassification.from_config(CONFIGS[request.param](**fields)).eval()


def test_classes_of_steps_are_causal_and_padding_does_not_count(make):
    model, x = make(num_labels=3), torch.randn(2, 7, 2)
    labels, mask = torch.randint(0, 3, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    labels[1, 5:], mask[1, 5:] = -100, 0
    output = model(input_values=x, attention_mask=mask, labels=labels)
    assert output.logits.shape == (2, 7, 3) and type(model).__name__.endswith("ForTokenClassification")
    torch.testing.assert_close(output.loss, cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    changed = x.clone()
    changed[1, 5:] = 99
    torch.testing.assert_close(model(input_values=changed, attention_mask=mask, labels=labels).loss, output.loss)
    torch.testing.assert_close(model(input_values=x[:1, :4]).logits, output.logits[:1, :4])
    total = model(input_values=x, attention_mask=mask, labels=labels, num_items_in_batch=24).loss
    torch.testing.assert_close(total, output.loss * 12 / 24)


def test_values_of_steps(make):
    model, x = make(num_labels=1), torch.randn(2, 5, 2)
    labels = torch.randn(2, 5)
    labels[0, 3], labels[1, 0] = -100, float("nan")
    output = model(input_values=x, labels=labels)
    counted = torch.ones(2, 5, dtype=torch.bool)
    counted[0, 3] = counted[1, 0] = False
    torch.testing.assert_close(output.loss, (output.logits[..., 0] - labels)[counted].square().mean())
    torch.testing.assert_close(model(input_values=x, labels=labels[..., None]).loss, output.loss)
    assert model.config.problem_type == "regression"
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_cut_and_saved(make, tmp_path):
    model, x = make(num_labels=3), torch.randn(4, 12, 2)
    compress(model, [{"input_values": x}], target=3)
    assert state_sizes(model) == [3, 3]
    model.save_pretrained(tmp_path)
    again = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    torch.testing.assert_close(again(input_values=x).logits, model(input_values=x).logits)
    assert "AutoModelForTokenClassification" in again.config.auto_map
