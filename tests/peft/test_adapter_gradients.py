"""A cut in the middle of accumulation, with adapters: gradients of lora_A, lora_B and magnitudes go on."""

import copy

import pytest
import torch
from lora_models import BATCHES, METHODS, adapted

from hf_compressm import Fraction
from hf_compressm.surgery import CutSettings, apply_plan, find_mixers, make_plan

KINDS = ["own-mamba", "mamba", "mamba2"]


@torch.no_grad()
def silence(model) -> None:
    """The later half of the states is hardly read: rows of exact zeros have no direction, which DoRA asks for."""
    for site in find_mixers(model):
        mixer, half = site.mixer, torch.arange(site.state_size // 2, site.state_size)
        if hasattr(mixer, "x_proj"):
            layer = mixer.x_proj
            places = layer.base_layer.weight.shape[0] - site.state_size + half
            for rows in (layer.base_layer.weight, layer.lora_B["default"].weight):
                rows[places] *= 1e-7
            for magnitude in layer.lora_magnitude_vector.values():
                magnitude.weight[places] *= 1e-7
        else:
            rows = torch.cat([group * site.state_size + half for group in range(mixer.n_groups)])
            places = mixer.intermediate_size + mixer.n_groups * site.state_size + rows
            mixer.conv1d.weight[places] = mixer.conv1d.bias[places] = 0


def accumulate(model, *indices):
    for index in indices:
        model(**BATCHES[index], labels=BATCHES[index]["input_ids"]).loss.backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_across_a_cut(kind, method):
    model = adapted(kind, **METHODS[method]).double()
    silence(model)
    plan = make_plan(model, settings=CutSettings(Fraction(0.5)), calibration=BATCHES)
    small = copy.deepcopy(model)
    apply_plan(small, None, plan)
    accumulate(small, 0, 1)
    accumulate(model, 0)
    apply_plan(model, None, plan)
    accumulate(model, 1)
    wanted = dict(small.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        if parameter.requires_grad:
            right = wanted[name].grad
            assert (parameter.grad - right).norm() < 1e-3 * right.norm() + 1e-12, name
