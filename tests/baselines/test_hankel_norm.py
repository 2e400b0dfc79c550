"""The sum of Hankel singular values: its value, its gradient, and the Trainer's loss with it."""

import pytest
import torch
from helpers import arguments, small_data, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MambaConfig, MambaForCausalLM, Trainer

from hf_compressm.baselines import HankelNormCallback, hankel_nuclear_norm
from hf_compressm.baselines.hankel_norm import layer_systems, sum_of_singular_values
from hf_compressm.layers.lru import LRU
from hf_compressm.reduction import (
    DiagonalSystem,
    controllability_gramian,
    hankel_singular_values,
    observability_gramian,
)
from hf_compressm.surgery import measure_model


def system(seed, N=6, H=3, M=2, radius=0.9, rank=None):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.complex128, generator=generator)

    angles = 3 * torch.rand(N, dtype=torch.float64, generator=generator)
    moduli = radius * torch.rand(N, dtype=torch.float64, generator=generator).sqrt()
    B = normal(N, H)
    if rank is not None:
        B[rank:] = 0  # states that nothing drives
    return torch.polar(moduli, angles), B, normal(M, N)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), N=st.integers(1, 12), radius=st.sampled_from([0.5, 0.99, 0.999999]))
def test_value_is_the_sum_of_the_singular_values(seed, N, radius):
    found = system(seed, N, radius=radius)
    expected = hankel_singular_values(DiagonalSystem(*found)).sum()
    # The jitter of 1e-13 can raise a singular value by its root.
    torch.testing.assert_close(hankel_nuclear_norm(*found), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_gradient(seed):
    found = [tensor.requires_grad_() for tensor in system(seed, N=4, H=4, M=4)]
    assert torch.autograd.gradcheck(hankel_nuclear_norm, found, atol=1e-5, rtol=1e-4)


def test_gradient_equals_that_through_the_decomposition():
    found = [tensor.requires_grad_() for tensor in system(1, N=5, H=5, M=5)]
    poles, B, C = found
    P = (B @ B.mH) / (1 - poles[:, None] * poles.conj())
    Q = (C.mH @ C) / (1 - poles.conj()[:, None] * poles)
    value = torch.linalg.svdvals(torch.linalg.cholesky(Q).mH @ torch.linalg.cholesky(P)).sum()
    expected = torch.autograd.grad(value, found)
    for got, wanted in zip(torch.autograd.grad(hankel_nuclear_norm(*found), found), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_equal_singular_values_and_states_that_nothing_drives():
    poles = torch.tensor([0.5, 0.5], dtype=torch.complex128)
    eye = torch.eye(2, dtype=torch.complex128)
    found = [poles.requires_grad_(), eye.clone().requires_grad_(), eye.clone().requires_grad_()]
    value = hankel_nuclear_norm(*found)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(2 / 0.75, dtype=torch.float64), rtol=1e-6, atol=0)
    # sigma = |b c| / (1 - |pole|^2) of each state alone.
    expected = torch.full((2,), 2 * 0.5 / 0.75**2, dtype=torch.complex128)
    torch.testing.assert_close(found[0].grad, expected, rtol=1e-5, atol=1e-8)
    idle = [tensor.requires_grad_() for tensor in system(0, N=6, rank=3)]
    hankel_nuclear_norm(*idle).backward()
    assert all(tensor.grad.isfinite().all() for tensor in idle)


def test_a_batch_is_many_systems():
    several = [system(seed) for seed in range(3)]
    found = hankel_nuclear_norm(*(torch.stack(parts) for parts in zip(*several, strict=True)))
    torch.testing.assert_close(found, torch.stack([hankel_nuclear_norm(*one) for one in several]))


def test_a_gramian_that_rounding_has_made_indefinite():
    poles, B, C = system(0, N=8, H=2)
    P, Q = controllability_gramian(poles, B), observability_gramian(poles, C)
    values, vectors = torch.linalg.eigh(P)
    P = P - (values[0] + 1e-10 * values[-1]) * vectors[:, :1] @ vectors[:, :1].mH
    assert torch.linalg.cholesky_ex(P).info > 0
    expected = torch.linalg.eigvals(P @ Q).real.clamp(min=0).sqrt().sum()
    # The eigenvalue that was pushed below zero is worth up to its root.
    torch.testing.assert_close(sum_of_singular_values(P, Q), expected, rtol=1e-4, atol=0)


def test_bad_systems_are_refused():
    poles, B, C = system(0)
    with pytest.raises(ValueError, match="inside the unit circle; the largest is 1.5"):
        hankel_nuclear_norm(torch.full_like(poles, 1.5), B, C)
    with pytest.raises(ValueError, match="inside the unit circle"):
        hankel_nuclear_norm(poles * float("nan"), B, C)
    with pytest.raises(ValueError, match="not finite|NaN"):
        hankel_nuclear_norm(poles, B * float("nan"), C)
    with pytest.raises(ValueError, match="weight of the Hankel norm must be a positive number; got 0"):
        HankelNormCallback(0)


def test_layers_are_seen_as_the_surgery_sees_them():
    model = small_model()
    layers = [module for module in model.modules() if isinstance(module, LRU)]
    expected = [measured.spectrum().sum() for measured in measure_model(model).values()]
    found = hankel_nuclear_norm(*layer_systems(layers))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0)


def trained(folder, callbacks=(), **settings):
    model = small_model(norm="layer", dropout=0.0)
    trainer = Trainer(model, arguments(folder, **settings), train_dataset=small_data(), callbacks=list(callbacks))
    trainer.train()
    return model, trainer


def total(model):
    return sum(float(measured.spectrum().sum()) for measured in measure_model(model).values())


def test_the_trainer_lowers_the_norm_and_logs_it(tmp_path):
    plain, _ = trained(tmp_path)
    model, trainer = trained(tmp_path, [HankelNormCallback(0.1)], logging_steps=5)
    assert total(model) < 0.8 * total(plain)
    values = [entry["hankel_norm"] for entry in trainer.state.log_history if "hankel_norm" in entry]
    assert len(values) == 4 and values[-1] < values[0]
    # Evaluation is the model's own loss, and the hook is gone.
    assert not model._forward_hooks


def test_it_counts_once_a_step_under_accumulation(tmp_path):
    once, _ = trained(tmp_path, [HankelNormCallback(0.05)], max_steps=4, per_device_train_batch_size=8)
    split, _ = trained(
        tmp_path, [HankelNormCallback(0.05)], max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    for one, other in zip(once.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)  # float32 sums in another order


def test_models_without_such_layers_are_refused(tmp_path):
    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=small_data(), callbacks=[HankelNormCallback(1.0)])
    with pytest.raises(ValueError, match="MambaForCausalLM has no LRU layer"):
        trainer.train()
