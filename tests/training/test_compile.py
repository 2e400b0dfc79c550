"""torch.compile across many cuts: one recompile for each shape, none left to eager mode, the losses of eager mode."""

import pytest
import torch
from datasets import Dataset
from helpers import arguments, small_data, small_model
from selective_models import IDS, own
from torch._dynamo.utils import counters
from transformers import Trainer

from hf_compressm import CompreSSMCallback, state_sizes

CUTS = list(range(2, 14))
IDS_DATA = Dataset.from_dict({"input_ids": IDS[:, :8].tolist() * 32, "labels": IDS[:, :8].tolist() * 32}).with_format(
    "torch"
)
KIND = {"problem_type": "single_label_classification"}  # which transformers' loss otherwise sets, and so recompiles
MODELS = {
    "mimo_ssm": (lambda: small_model(state_sizes=40, layers=1, **KIND), small_data(length=6)),
    "compressm_mamba": (lambda: own("mamba", state_sizes=24, num_hidden_layers=1, hidden_size=16), IDS_DATA),
}


def losses_and_sizes(folder, kind, **settings):
    make, data = MODELS[kind]
    sizes = []

    class Sizes(CompreSSMCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            sizes.append(tuple(state_sizes(model)))  # of this step's forward pass
            super().on_step_end(args, state, control, model=model, **kwargs)

    callback = Sizes(cut_steps=CUTS, policy="fraction", keep_fraction=0.25, min_change=0.0, calibration_batches=2)
    settings = {"max_steps": 15, "logging_steps": 1, "per_device_train_batch_size": 4} | settings
    trainer = Trainer(make(), arguments(folder, **settings), train_dataset=data, callbacks=[callback])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], sizes


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_twelve_cuts_compiled(kind, tmp_path):
    eager, expected = losses_and_sizes(tmp_path / "eager", kind)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):  # its default, fewer than the cuts
        compiled, sizes = losses_and_sizes(
            tmp_path / "compiled", kind, torch_compile=True, torch_compile_backend="aot_eager"
        )
    assert sizes == expected and len(set(sizes)) == len(CUTS) + 1
    # Each shape's frame was compiled whole: beyond the limit it would not be, and with a graph break in pieces.
    assert counters["stats"]["unique_graphs"] == len(set(sizes)) and not counters["graph_break"]
    assert counters["frames"]["ok"] == counters["frames"]["total"] == len(set(sizes))
    assert torch.allclose(torch.tensor(compiled), torch.tensor(eager), rtol=1e-5, atol=0), (compiled, eager)
