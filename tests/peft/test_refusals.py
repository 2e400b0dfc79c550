"""What cannot follow a cut is refused by name before anything is changed, in training before the first step."""

import subprocess
import sys

import peft
import pytest
import torch
from helpers import arguments
from lora_models import BATCHES, KINDS, adapted, config, logits
from peft import get_peft_model
from transformers import Trainer

from hf_compressm import CompreSSMCallback, compress, save_base_model, state_sizes
from hf_compressm.surgery import ParameterChange, find_mixers

X = {"target_modules": ["x_proj"]}
REFUSED = {
    r"ia3.*factor for each output": lambda: peft.IA3Config(**X, feedforward_modules=[]),
    r"vera.*shares its matrices": lambda: peft.VeraConfig(**X, r=2),
    r"loha.*entry by entry": lambda: peft.LoHaConfig(**X, r=2),
    r"lokr.*Kronecker": lambda: peft.LoKrConfig(**X, r=2),
    r"adalora.*changes its ranks": lambda: peft.AdaLoraConfig(**X, total_step=10),
    r"shira.*only LoRA": lambda: peft.ShiraConfig(**X, r=1),
    r"x_proj.*modules_to_save.*kept twice": lambda: config(target_modules=["in_proj"], modules_to_save=["x_proj"]),
    r"mixer.*modules_to_save.*kept twice": lambda: config(target_modules=["embeddings"], modules_to_save=["mixer"]),
    r"ParamWrapper": lambda: config(target_modules=[], target_parameters=["x_proj.weight"]),
    r"A_log.*target_parameters": lambda: config(target_modules=[], target_parameters=["mixer.A_log"]),
    r"ALoraLinearVariant.*variant of LoRA": lambda: config(**X, alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
    r"lora_bias": lambda: config(**X, lora_bias=True),
}


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
@pytest.mark.parametrize("message", REFUSED)
def test_methods_that_cannot_follow(message):
    model = get_peft_model(KINDS["own-mamba"](), REFUSED[message]()).eval()
    before = logits(model)
    with pytest.raises(ValueError, match=f"{message}.*merge the adapter"):
        compress(model, BATCHES, target=4)
    assert torch.equal(logits(model), before)


def test_training_is_refused_before_its_first_step(tmp_path):
    model = get_peft_model(KINDS["own-mamba"](), peft.LoHaConfig(**X, r=2))
    run = Trainer(model, arguments(tmp_path), train_dataset=[{}], callbacks=[CompreSSMCallback()])
    with pytest.raises(ValueError, match="x_proj .*LoHa"):
        run.train()


def test_dora_beside_other_adapters_and_out_of_use():
    model = adapted("own-mamba", use_dora=True)
    with model.disable_adapter(), pytest.raises(ValueError, match="merged, disabled or inactive"):
        compress(model, BATCHES, target=4)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged, disabled or inactive"):
        compress(model, BATCHES, target=4)
    model.unmerge_adapter()
    model.add_adapter("plain", config())
    with pytest.raises(ValueError, match=r"DoRA \('default'\) beside other adapters.*all of them share"):
        compress(model, BATCHES, target=4)


def test_quantised_weights():
    model = adapted("mamba")
    layer = model.base_model.model.backbone.layers[1].mixer.x_proj
    layer.base_layer.weight = torch.nn.Parameter(torch.zeros(18, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.1.mixer.x_proj.*quantised weight \(torch.int8\)"):
        compress(model, BATCHES, target=4)


def test_a_mixer_adapter_that_does_not_say_how_rows_are_mapped(monkeypatch):
    model = adapted("own-mamba")
    adapter = find_mixers(model)[0].adapter
    reduce = type(adapter).reduce

    def silent(self, *args):
        found = reduce(self, *args)
        changes = {name: ParameterChange(c.value, c.gradient) for name, c in found.changes.items()}
        return type(found)(changes, residual=found.residual)

    monkeypatch.setattr(type(adapter), "reduce", silent)
    with pytest.raises(ValueError, match="mixer.x_proj.weight has LoRA on it, but its ParameterChange has no `rows`"):
        compress(model, BATCHES, target=4)
    assert state_sizes(model) == [8, 8, 8]


def test_saving_the_base_of_what_has_none(tmp_path):
    with pytest.raises(ValueError, match="is not a PeftModel"):
        save_base_model(KINDS["mamba"](), tmp_path)
    model = adapted("mamba")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into .*unmerge_adapter"):
        save_base_model(model, tmp_path)


def test_peft_is_optional():
    code = "import sys; sys.modules['peft'] = None; import hf_compressm, hf_compressm.cli, hf_compressm.runs.finetuning"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
