"""The chunked scan of Mamba-2 against a recurrence in float64, with all gradients, and its single step."""

import pytest
import torch

from hf_compressm.ops.ssd_scan import ssd_scan, ssd_state_update


def recurrence(x, dt, A, B, C, D, dt_bias, initial_state, limit):
    """Step by step, as the equations stand."""
    step = torch.nn.functional.softplus(dt + dt_bias).clamp(*limit)
    repeat = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)
    state, outputs = initial_state, []
    for t in range(x.shape[1]):
        drive = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = (step[:, t] * A).exp()[..., None, None] * state + drive
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def inputs(batch, length, heads, width, groups, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": draw(batch, length, heads, width),
        "dt": draw(batch, length, heads),
        "A": -draw(heads).exp(),
        "B": draw(batch, length, groups, size),
        "C": draw(batch, length, groups, size),
        "D": draw(heads),
        "dt_bias": draw(heads),
        "initial_state": draw(batch, heads, width, size),
    }


SIZES = [(2, 63, 4, 3, 2, 5), (1, 1, 2, 1, 1, 1), (2, 65, 3, 8, 3, 17), (1, 7, 6, 5, 2, 3), (3, 64, 2, 4, 1, 128)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("chunk", [1, 16, 64, 100])
def test_chunks_equal_the_recurrence_with_all_gradients(sizes, chunk):
    results = []
    for function in (recurrence, ssd_scan):
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs(*sizes).items()}
        if function is recurrence:
            y, final = recurrence(*leaves.values(), (0.01, 2.0))
        else:
            options = {"dt_softplus": True, "dt_limit": (0.01, 2.0), "chunk_size": chunk, "return_final_state": True}
            y, final = ssd_scan(**leaves, **options)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        loss = (y * weights).sum() + (final * final.detach().cos()).sum()
        results.append([y, final, *torch.autograd.grad(loss, list(leaves.values()))])
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-10, rtol=1e-9)


def test_single_steps_make_up_the_scan():
    tensors = inputs(2, 9, 4, 3, 2, 5)
    y, final = ssd_scan(**tensors, dt_softplus=True, return_final_state=True)
    state = tensors["initial_state"].clone()
    fixed = {name: tensors[name] for name in ("A", "D", "dt_bias")}
    for t in range(9):
        moving = {name: tensors[name][:, t] for name in ("x", "dt", "B", "C")}
        assert torch.allclose(ssd_state_update(state, **moving, **fixed, dt_softplus=True), y[:, t], atol=1e-12)
    assert torch.allclose(state, final, atol=1e-12)


def test_half_precision_and_strong_decay():
    tensors = inputs(2, 40, 4, 8, 1, 16, torch.float32)
    tensors["A"] = tensors["A"] * 1e4
    wide = ssd_scan(**tensors, dt_softplus=True)
    assert wide.isfinite().all()
    half = {k: v.bfloat16() if k in ("x", "dt", "B", "C") else v for k, v in tensors.items()}
    found = ssd_scan(**half, dt_softplus=True)
    assert found.dtype == torch.bfloat16 and (found.float() - wide).abs().max() / wide.abs().max() < 0.05


def test_shapes_are_checked():
    tensors = inputs(2, 9, 4, 3, 2, 5)
    with pytest.raises(ValueError, match="G a divisor of 4"):
        ssd_scan(**(tensors | {"B": torch.zeros(2, 9, 3, 5), "C": torch.zeros(2, 9, 3, 5)}))
    with pytest.raises(ValueError, match=r"dt must be \(2, 9, 4\)"):
        ssd_scan(**(tensors | {"dt": torch.zeros(2, 9, 3)}))
