"""The program in docs/scale.md does what it says: an average of weights follows a cut."""

import re
from pathlib import Path

import torch
from helpers import arguments, small_data, small_model
from transformers import Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, state_sizes

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text()


def test_the_average_follows_a_cut(tmp_path):
    names = {"TrainerCallback": TrainerCallback}
    exec(re.search(r"```python\n(class Ema.*?)```", PAGE, re.DOTALL).group(1), names)
    ema, model = names["Ema"](0.9), small_model()
    callbacks = [CompreSSMCallback(cut_steps=[2, 4], policy="fraction", keep_fraction=0.3), ema]
    Trainer(model, arguments(tmp_path, max_steps=6), train_dataset=small_data(), callbacks=callbacks).train()
    assert state_sizes(model) == [4, 4] and ema.changes == 2
    assert ema.average.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert ema.average[name].shape == parameter.shape and not torch.equal(ema.average[name], parameter)
