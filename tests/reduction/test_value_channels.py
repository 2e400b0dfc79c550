"""The gain of a norm over fewer channels, against the norm itself."""

import torch

from hf_compressm.reduction.value_channels import norm_gain


def test_the_gain_is_that_of_the_norm():
    generator = torch.Generator().manual_seed(0)
    # Channels of different size that rise and fall together: then the gain is the same for every token.
    o = torch.randn(500, 1, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 2, 8, dtype=torch.float64)
    kept = [1, 2, 4]
    full = o / o.square().mean(1, keepdim=True).sqrt()
    fewer = o[:, kept] / o[:, kept].square().mean(1, keepdim=True).sqrt()
    gain = norm_gain(full.square().mean(0), kept)
    assert torch.allclose(fewer, gain * full[:, kept])
    assert not torch.allclose(fewer, full[:, kept], rtol=0.1)


def test_nothing_changes_where_all_channels_stay_or_none_has_power():
    power = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    assert norm_gain(power, [2, 0, 1]) == 1
    assert norm_gain(power, [2]) == 1
