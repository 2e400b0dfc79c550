"""The causal convolution against PyTorch's, with all gradients."""

import pytest
import torch
from ops import interpreter

from hf_compressm.ops.causal_conv import causal_conv, causal_conv_step, naive_causal_conv


def inputs(batch, length, channels, taps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (batch, length, channels), "weight": (channels, taps), "bias": (channels,)}
    return {k: torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for k, s in shapes.items()}


@pytest.mark.parametrize("sizes", [(2, 150, 17, 4), (1, 1, 16, 1), (3, 2, 18, 4), (2, 66, 40, 2), (1, 5, 33, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_kernels_equal_the_reference_with_all_gradients(sizes, with_bias):
    tensors = {k: v.requires_grad_() for k, v in inputs(*sizes).items() if with_bias or k != "bias"}
    y = naive_causal_conv(**tensors)
    expected = [y, *torch.autograd.grad(y.sin().sum(), list(tensors.values()))]
    with interpreter.poisoned():
        y = causal_conv(**tensors, backend="cpu")
        found = [y, *torch.autograd.grad(y.sin().sum(), list(tensors.values()))]
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("taps", [1, 2, 4, 6])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_step_is_the_last_one_of_the_sequence(taps, with_bias):
    tensors = {k: v.requires_grad_() for k, v in inputs(3, 9, 5, taps).items() if with_bias or k != "bias"}
    expected = naive_causal_conv(**tensors)[:, -1]
    found = causal_conv_step(tensors["x"][:, -taps:].transpose(1, 2), *list(tensors.values())[1:])
    assert torch.allclose(found, expected, atol=1e-12)
    pairs = [torch.autograd.grad(y.sin().sum(), list(tensors.values())) for y in (found, expected)]
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(*pairs, strict=True))
    half = [t.detach().bfloat16() for t in tensors.values()]
    found = causal_conv_step(half[0][:, -taps:].transpose(1, 2), *half[1:])
    expected = naive_causal_conv(*(t.double() for t in half))[:, -1]
    assert found.dtype == torch.bfloat16 and torch.allclose(found.double(), expected, rtol=2**-8, atol=1e-6)


def test_strides_and_half_precision():
    tensors = inputs(2, 20, 24, 4, torch.float32)
    wide = torch.randn(2, 20, 50)
    for x in (wide[..., 5:29], wide.transpose(1, 2)[:, 3:23, :].contiguous().repeat(1, 1, 2)[..., 1:25]):
        assert torch.allclose(
            causal_conv(x, tensors["weight"], tensors["bias"], backend="cpu"),
            naive_causal_conv(x, tensors["weight"], tensors["bias"]),
            atol=1e-5,
        )
    x = torch.randn(24, 20, 2).permute(2, 1, 0)
    expected = naive_causal_conv(x, tensors["weight"], tensors["bias"])
    found = causal_conv(x.bfloat16(), tensors["weight"].bfloat16(), tensors["bias"].bfloat16(), backend="cpu")
    assert found.dtype == torch.bfloat16 and (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("with_bias", [False, True])
def test_custom_ops(with_bias):
    tensors = [v.requires_grad_() for v in inputs(2, 9, 17, 4, torch.float32).values()]
    tensors[2] = tensors[2] if with_bias else None
    torch.library.opcheck(torch.ops.hf_compressm.causal_conv.default, tuple(tensors))
    fixed = [None if v is None else v.detach() for v in tensors]
    torch.library.opcheck(torch.ops.hf_compressm.causal_conv_backward.default, (torch.randn(2, 9, 17), *fixed))


def test_compiles_without_graph_breaks():
    tensors = {k: v.requires_grad_() for k, v in inputs(2, 9, 17, 4, torch.float32).items()}
    compiled = torch.compile(causal_conv, fullgraph=True, backend="aot_eager")
    pairs = [torch.autograd.grad(f(**tensors).sin().sum(), list(tensors.values())) for f in (causal_conv, compiled)]
    for one, other in zip(*pairs, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_bad_input(monkeypatch):
    tensors = inputs(2, 9, 5, 4)
    with pytest.raises(ValueError, match=r"weight \(C, K\)"):
        causal_conv(tensors["x"], tensors["weight"][:3])
    with pytest.raises(ValueError, match=r"bias must be \(5,\)"):
        causal_conv(tensors["x"], tensors["weight"], torch.zeros(4))
    long = torch.randn(5, 7, dtype=torch.float64)
    assert torch.equal(causal_conv(tensors["x"], long), naive_causal_conv(tensors["x"], long))
    with pytest.raises(ValueError, match="K <= 4 and C >= 16"):
        causal_conv(tensors["x"], long, backend="cpu")
    with pytest.raises(
        ValueError, match="unknown backend 'triton' of causal_conv; allowed are naive, cpu, causal_conv1d"
    ):
        causal_conv(**tensors, backend="triton")
    monkeypatch.setenv("HF_COMPRESSM_CAUSAL_CONV", "cpu")
    with pytest.raises(ValueError, match="K <= 4 and C >= 16"):
        causal_conv(tensors["x"], long)
