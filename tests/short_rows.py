"""Rows of given lengths, batches of them, and whether two statistics tell the same."""

import torch

from hf_compressm.surgery.adapters.selective import SelectiveMeasurement


def rows_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 50, (length,), generator=generator) for length in lengths]


def padded(rows, side, width=None, dtype=torch.long):
    """A batch of rows padded on the left, the right, or both sides."""
    width = width or max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        start = {"right": 0, "left": width - len(row), "both": (width - len(row)) // 2}[side]
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask.to(dtype)}


def one_by_one(rows):
    return [{"input_ids": row[None]} for row in rows]


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert (found[name].tokens, found[name].looked) == (one.tokens, one.looked)
        for part in ("states", "read_outs", "drives"):
            value, right = getattr(found[name], part), getattr(one, part)
            assert (value - right).abs().max() <= 1e-4 * right.abs().max(), (name, part)
        spectra = [SelectiveMeasurement.of(statistics).spectrum() for statistics in (found[name], one)]
        assert torch.allclose(*spectra, rtol=1e-3, atol=1e-4 * float(spectra[1].max()))
