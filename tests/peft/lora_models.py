"""Small models with adapters on the projections that lose rows; adapters that do something."""

import torch
from peft import LoraConfig, get_peft_model
from selective_models import OWN, STOCK, make
from stock_models import CONFIGS
from transformers import AutoModelForCausalLM

BATCHES = [
    {"input_ids": torch.randint(1, 50, (4, 24), generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)
]
KINDS = {
    "own-mamba": lambda: make(OWN, "mamba"),
    "own-mamba2": lambda: make(OWN, "mamba2"),
    "mamba": lambda: make(STOCK, "mamba"),
    "mamba2": lambda: make(STOCK, "mamba2"),
    "jamba": lambda: AutoModelForCausalLM.from_config(CONFIGS["jamba"]()).eval(),
    "falcon_mamba": lambda: AutoModelForCausalLM.from_config(CONFIGS["falcon_mamba"]()).eval(),
    "bamba": lambda: AutoModelForCausalLM.from_config(CONFIGS["bamba"]()).eval(),
    "mamba2-bias": lambda: AutoModelForCausalLM.from_config(CONFIGS["mamba2"]()).eval(),
}
METHODS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def config(**settings) -> LoraConfig:
    """Adapters on the projections of the mixers."""
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["in_proj", "x_proj"]} | settings))


@torch.no_grad()
def stir(model, seed: int = 0, scale: float = 0.2) -> None:
    """Give the adapters values, as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        if "lora_magnitude_vector" in name:
            parameter.mul_(1 + scale * torch.rand(parameter.shape, generator=generator))


def adapted(kind: str, seed: int = 0, **settings):
    """A model with stirred adapters."""
    torch.manual_seed(seed)
    model = get_peft_model(KINDS[kind](), config(**settings))
    stir(model, seed)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=BATCHES[0]["input_ids"], use_cache=False).logits


def close(a, b, tolerance=1e-5):
    return float((a - b).detach().abs().max()) <= tolerance * float(b.abs().max())
