"""Checks that several ops make of their tensors."""

from __future__ import annotations

from torch import Tensor


def check_devices(**tensors: Tensor | None) -> None:
    """Check that tensors, of any shape, share a device.

    Args:
        tensors: by the name that the message shall use; None where an optional one is left out.

    Raises:
        ValueError: if two of them are on different devices; the message names both.
    """
    (first, reference), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(
                f"all tensors must be on one device; {first} is on {reference.device} and {name} on {tensor.device}"
            )


def check_real(**tensors: Tensor | None) -> None:
    """Check that tensors, of any shape, have real floating-point dtypes.

    Args:
        tensors: as in `check_devices`.

    Raises:
        ValueError: if one has another dtype; the message names it.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a real floating-point dtype, got {tensor.dtype}")
