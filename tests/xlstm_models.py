"""A small xLSTM of transformers, whose weights do something."""

import torch
from transformers import AutoModelForCausalLM, xLSTMConfig

KEYS = 64


def make(mode="single", seed=0):
    """The model in evaluation mode, with 2 heads of 64 keys each in 2 layers."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "qk_dim_factor": 2.0}
    kernels = {"weight_mode": mode, "chunk_size": 8, "autocast_kernel_dtype": "float32"}
    config = xLSTMConfig(**sizes, **kernels, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model
