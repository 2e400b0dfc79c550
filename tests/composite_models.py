"""Small models whose mixers belong to another config than the model's own, or to none."""

import torch
from stock_models import CONFIGS
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_compressm import MimoSSMConfig, MimoSSMModel

HYBRIDS = ("jamba", "bamba", "zamba2", "nemotron_h", "falcon_h1", "granitemoehybrid")
IDS = torch.randint(0, 60, (4, 32), generator=torch.Generator().manual_seed(0))


def multimodal(family: str, **fields) -> LlavaForConditionalGeneration:
    """A Llava whose language model is a hybrid: `config.text_config` is that of `model.language_model`."""
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=4
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=CONFIGS[family](), image_token_index=63, **fields)
    return LlavaForConditionalGeneration(config).eval()


def mimo_config(state_sizes=16, **fields) -> MimoSSMConfig:
    return MimoSSMConfig(
        num_channels=1, hidden_size=6, num_hidden_layers=2, state_sizes=state_sizes, r_min=0.3, r_max=0.95, **fields
    )


def mimo(state_sizes=16, seed: int = 0, **fields) -> MimoSSMModel:
    torch.manual_seed(seed)
    return MimoSSMModel(mimo_config(state_sizes, **fields)).eval()


def mamba_config(state_size: int = 16, **fields) -> MambaConfig:
    return MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=state_size, **fields)


def mamba(state_size: int = 16, seed: int = 0) -> MambaModel:
    torch.manual_seed(seed)
    return MambaModel(mamba_config(state_size)).eval()


class Classifier(nn.Module):
    """A plain module around a model that reads (B, L, 1), as people write it: no config of its own."""

    def __init__(self, body: nn.Module, labels: int = 3):
        super().__init__()
        self.body = body
        self.head = nn.Linear(6, labels)

    def forward(self, input_values, labels=None):
        hidden = self.body(input_values=input_values)[0].mean(1)
        logits = self.head(hidden)
        return SequenceClassifierOutput(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


class Pair(nn.Module):
    """Two models side by side; stock ones read tokens."""

    def __init__(self, left: nn.Module, right: nn.Module):
        super().__init__()
        self.left, self.right = left, right

    def forward(self, input_ids=None, input_values=None):
        found = []
        for model in (self.left, self.right):
            given = {"input_values": input_values} if isinstance(model, MimoSSMModel) else {"input_ids": input_ids}
            found.append(model(**given)[0])
        return found


class PairConfig(PreTrainedConfig):
    """A config with one for each of two models, as in encoder-decoders."""

    model_type = "pair_of_models"
    sub_configs = {"left": MimoSSMConfig, "right": MambaConfig}

    def __init__(self, left=None, right=None, **kwargs):
        self.left = MimoSSMConfig(**left) if isinstance(left, dict) else left or mimo_config()
        self.right = MambaConfig(**right) if isinstance(right, dict) else right or mamba_config()
        super().__init__(**kwargs)


class PairModel(PreTrainedModel):
    """Two models with configs of their own within one; `copied` gives them copies of these."""

    config_class = PairConfig
    copied = False

    def __init__(self, config):
        super().__init__(config)
        copy = (lambda part: type(part)(**part.to_dict())) if self.copied else (lambda part: part)
        self.left, self.right = MimoSSMModel(copy(config.left)), MambaModel(copy(config.right))
        self.post_init()

    def forward(self, input_ids, input_values):
        return self.left(input_values=input_values)[0], self.right(input_ids=input_ids)[0]


class CopyingPairModel(PairModel):
    copied = True
