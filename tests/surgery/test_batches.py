"""What a batch's fields come to in calibration, and packed sequences against the same sequences one by one."""

import pytest
import torch
from selective_models import IDS, OWN, STOCK, make
from short_rows import check_equal, one_by_one, rows_of
from stock_models import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM

from hf_compressm import compress, state_sizes
from hf_compressm.surgery import gather_statistics
from hf_compressm.surgery.batches import model_inputs

LENGTHS = [5, 1, 9, 17, 3, 3]


def packed(rows, kind):
    """One row that holds all, as collators make it."""
    lengths = torch.tensor([len(row) for row in rows])
    ends = lengths.cumsum(0)
    starts = torch.cat([torch.tensor([0]), ends]).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    index = torch.repeat_interleave(torch.arange(len(rows)), lengths)[None].int()
    length = int(lengths.max())
    fields = {
        "position_ids": {"position_ids": positions},
        "seq_idx": {"seq_idx": index},
        "cu_seq_lens": {
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": length,
            "max_length_k": length,
        },
    }
    fields["all"] = {name: value for part in fields.values() for name, value in part.items()}
    return {"input_ids": torch.cat(rows)[None], "labels": torch.cat(rows)[None]} | fields[kind]


PACKINGS = pytest.mark.parametrize("kind", ["position_ids", "seq_idx", "cu_seq_lens", "all"])


@PACKINGS
@pytest.mark.parametrize("table", [STOCK, OWN], ids=["stock", "own"])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_packed_rows_are_ranked_with_their_boundaries(table, name, kind):
    model, rows = make(table, name), rows_of(LENGTHS)
    check_equal(gather_statistics(model, packed(rows, kind)), gather_statistics(model, one_by_one(rows)))


@PACKINGS
@pytest.mark.parametrize("family", ["bamba", "jamba", "falcon_h1", "zamba2"])
def test_packed_rows_of_hybrids(family, kind):
    torch.manual_seed(0)
    model, rows = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval(), rows_of(LENGTHS)
    check_equal(gather_statistics(model, packed(rows, kind)), gather_statistics(model, one_by_one(rows)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_and_padded_rows(side):
    model, rows = make(STOCK, "mamba"), rows_of(LENGTHS)
    first, second = (packed(part, "position_ids") for part in (rows[:3], rows[3:]))
    width, batch = 30, {name: torch.zeros(2, 30, dtype=torch.long) for name in ("input_ids", "position_ids")}
    batch["attention_mask"] = torch.zeros(2, width)
    for i, part in enumerate((first, second)):
        size = part["input_ids"].shape[1]
        place = slice(width - size, width) if side == "left" else slice(0, size)
        for name in ("input_ids", "position_ids"):
            batch[name][i, place] = part[name][0]
        batch["attention_mask"][i, place] = 1
    check_equal(gather_statistics(model, batch), gather_statistics(model, one_by_one(rows)))


def test_positions_of_padded_rows_are_no_packing():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    batch = {"input_ids": IDS[:, :5], "attention_mask": mask, "position_ids": positions}
    (found,) = model_inputs(make(STOCK, "mamba"), batch)
    assert torch.equal(found["input_ids"], batch["input_ids"]) and torch.equal(found["attention_mask"], mask)


def test_packing_at_most_doubles_the_work():
    rows = rows_of([1] * 40 + [2, 3] * 20 + [300])
    parts = list(model_inputs(make(STOCK, "mamba"), packed(rows, "position_ids")))
    assert sum(part["input_ids"].numel() for part in parts) <= 2 * sum(map(len, rows))
    assert sum(int(part["attention_mask"].sum()) for part in parts) == sum(map(len, rows))


@pytest.mark.parametrize(
    "extra",
    [
        {"weights": torch.ones(2)},
        {"weight": torch.ones(2), "activation": "none", "bias": None},  # names that reach hybrids' convolutions
        {"token_type_ids": torch.zeros_like(IDS), "completion_mask": torch.ones_like(IDS)},
        {"position_ids": torch.arange(20).expand(2, -1), "special_tokens_mask": torch.zeros_like(IDS)},
        {"text": ["a", "b"], "num_items_in_batch": 40},
    ],
)
@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba", "jamba", "nemotron_h", "granitemoehybrid"])
def test_fields_that_forward_does_not_name_are_passed_over(family, extra):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    plain = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    check_equal(gather_statistics(model, plain | extra | {"labels": IDS}), gather_statistics(model, plain))


class Wrapped(nn.Module):
    """A module of a user's own around a model, with an input of its own name."""

    def __init__(self):
        super().__init__()
        self.inner = make(STOCK, "mamba")
        self.seen = []


class NeedsLabels(Wrapped):
    def forward(self, tokens, labels):
        self.seen.append(sorted({"tokens": tokens, "labels": labels}))
        return self.inner(tokens).logits.sum()


class TakesAll(Wrapped):
    def forward(self, input_ids=None, **fields):
        self.seen.append(sorted(fields))
        return self.inner(input_ids)


@pytest.mark.parametrize(
    "cls, batch, seen",
    [
        (NeedsLabels, {"tokens": IDS, "labels": IDS, "weights": IDS}, ["labels", "tokens"]),
        (TakesAll, {"input_ids": IDS, "labels": IDS, "weights": IDS}, ["weights"]),
    ],
)
def test_modules_of_ones_own(cls, batch, seen):
    model = cls().eval()
    compress(model, [batch], target=4, refit_steps=0)
    assert state_sizes(model) == [4, 4, 4] and model.seen == [seen]


def test_what_is_passed_over_is_said_once(caplog):
    from transformers.utils import logging

    model = make(STOCK, "mamba")
    logging.enable_propagation()
    try:
        for _ in range(2):
            gather_statistics(model, {"input_ids": IDS, "loss_weights": torch.ones(2)})
    finally:
        logging.disable_propagation()
    assert caplog.text.count("States are ranked without loss_weights, which MambaForCausalLM.forward") == 1
