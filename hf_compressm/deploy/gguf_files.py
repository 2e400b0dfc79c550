"""Write a stock Mamba or Mamba-2 as a GGUF file, with the names of llama.cpp's `conversion/mamba.py` (0c1e57098)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Mamba2ForCausalLM, MambaForCausalLM

from ..files import check_output, new_folder
from ..models import to_stock
from ..models.runtimes import check_rules, check_runtime, to_stock_for
from ..models.saved import is_stock, load_checkpoint, load_tokenizer
from ..surgery import state_sizes

GGUF_NAME, RUNTIME = "model.gguf", "llama.cpp"
CONTEXT = 2**20
"""What llama.cpp's conversion writes as the length of the context; recurrent models have none."""
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}


@dataclass(frozen=True)
class GgufExport:
    """What was written.

    Attributes:
        architecture: name of the model's class.
        state_sizes: states of each layer.
        vocabulary: "with its vocabulary", or "without a vocabulary" if the tokenizer is not a byte-level BPE: then the
            runtime takes and gives token ids only.
        files: names of all files.
    """

    architecture: str
    state_sizes: list[int]
    vocabulary: str
    files: list[str]


def save_gguf(model: str, output: str | Path, overwrite: bool = False, runtime: str | None = None) -> GgufExport:
    """Write a saved model as `model.gguf`, in its own dtype, beside config and tokenizer; after an error nothing.

    Args:
        model: folder or hub name of a Mamba or Mamba-2 language model, own or stock.
        output: folder to write.
        overwrite: replace a model that the folder already holds.
        runtime: "llama.cpp" to pad layers to the next number of states that its kernel for GPUs takes; None for the
            model's own, which its CPU kernel takes.

    Raises:
        ValueError: as `write_gguf`; if the model has no stock form, or a runtime takes none like it.
        OSError: if there is no such model, or the folder is in use.
        ImportError: without the package gguf.
    """
    if runtime is not None:
        check_runtime(runtime)
        if runtime != RUNTIME:
            raise ValueError(f"GGUF is what {RUNTIME} reads; for {runtime} use --to stock")
    import_gguf()
    folder = check_output(Path(output), model, overwrite)
    loaded = _stock(load_checkpoint(model), runtime)
    tokenizer = load_tokenizer(model)
    with new_folder(folder) as partial:
        write_gguf(loaded, tokenizer, partial / GGUF_NAME)
        loaded.config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        files = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
    vocabulary = "with its vocabulary" if is_byte_level(tokenizer) else "without a vocabulary"
    return GgufExport(type(loaded).__name__, state_sizes(loaded), vocabulary, files)


def _stock(model: Any, runtime: str | None) -> Any:
    if runtime is not None:
        return to_stock_for(runtime, model)
    try:
        return model if is_stock(model) else to_stock(model)
    except TypeError as error:
        raise ValueError(str(error)) from error


def import_gguf() -> Any:
    """Import gguf, which is an extra.

    Raises:
        ImportError: if it is not installed, with the command that installs it.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need gguf: pip install 'hf-compressm[gguf]'") from error
    return gguf


def write_gguf(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Write weights, config and vocabulary to one file.

    Matrices keep the model's dtype; vectors, and tensors that llama.cpp's kernels read as float32, become float32.

    Args:
        model: a stock MambaForCausalLM or Mamba2ForCausalLM, in float32, float16 or bfloat16.
        tokenizer: its tokenizer, of which only a byte-level BPE is written; None for none.
        path: file to write.

    Raises:
        ValueError: if the model is of another class or dtype, or has what llama.cpp's own graph lacks; if the
            tokenizer has no token that may stand for the end of texts.
        ImportError: without the package gguf.
    """
    gguf = import_gguf()
    if type(model) not in (MambaForCausalLM, Mamba2ForCausalLM):
        raise ValueError(
            f"a {type(model).__name__} cannot be written as GGUF; only MambaForCausalLM and Mamba2ForCausalLM can, and "
            "what becomes one"
        )
    if model.dtype not in _KINDS:
        raise ValueError(f"GGUF is written in {', '.join(map(str, _KINDS))}; the model is in {model.dtype}")
    check_rules(RUNTIME, model.config, only_values=True)
    writer = gguf.GGUFWriter(path, model.config.model_type)
    kind = _KINDS[model.dtype]
    _add_config(writer, model.config)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    _add_vocabulary(gguf, writer, tokenizer, model.config)
    for name, tensor in gguf_tensors(model):
        stored = kind if _in_model_dtype(name, tensor) else "F32"
        data, stored_as = tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType[stored]
        writer.add_tensor(name, gguf.quants.quantize(data, stored_as), raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names in a GGUF file, and tensors in the shapes that they have there, of a stock Mamba or Mamba-2."""
    names = import_gguf().get_tensor_name_map(_architecture(model.config.model_type), model.config.num_hidden_layers)
    tied, groups = model.config.tie_word_embeddings, getattr(model.config, "n_groups", 1)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        name = name.replace("dt_bias", "dt_proj.bias")
        stem, _, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        found = names.get_name(stem)
        tensor = tensor.detach().cpu()
        if stem.endswith(".A_log"):
            tensor = -torch.exp(tensor.float())
        if stem.endswith((".A_log", ".D")) and model.config.model_type == "mamba2":
            tensor = tensor[:, None]
        if stem.endswith(".conv1d") and suffix == "weight":
            tensor = tensor[:, 0]
        if stem.endswith(".mixer.norm"):
            tensor = tensor.reshape(groups, -1)
        yield f"{found}.{suffix}" if suffix else found, tensor


def _architecture(model_type: str) -> Any:
    return import_gguf().MODEL_ARCH[model_type.upper()]


def _in_model_dtype(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is stored in the model's dtype, as llama.cpp's conversion has it."""
    return tensor.ndim > 1 and name.endswith(".weight") and not name.endswith(("norm.weight", "conv1d.weight"))


def _add_config(writer: Any, config: Any) -> None:
    inner = int(config.expand * config.hidden_size)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config.state_size)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    if config.model_type == "mamba2":
        writer.add_ssm_time_step_rank(inner // config.head_dim)
        writer.add_ssm_group_count(config.n_groups)
    else:
        writer.add_ssm_time_step_rank(config.time_step_rank)
        writer.add_ssm_dt_b_c_rms(False)


def is_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer is a byte-level BPE, the kind that llama.cpp calls gpt2."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    return (content.get("model") or {}).get("type") == "BPE" and '"ByteLevel"' in json.dumps(
        content.get("pre_tokenizer")
    )


def _add_vocabulary(gguf: Any, writer: Any, tokenizer: Any, config: Any) -> None:
    if not is_byte_level(tokenizer):
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(config.vocab_size)
        return
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    by_id, added = {number: token for token, number in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([_token_type(gguf, number, by_id, added) for number in range(config.vocab_size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if special["eos"] is None:
        # Where the file names none, llama.cpp ends texts at token 11.
        special["eos"] = _never_generated(tokenizer, by_id, config)
    for name, number in special.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)


def _never_generated(tokenizer: Any, by_id: dict[int, str], config: Any) -> int:
    """An id that no text contains, for a vocabulary without an end of texts."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    unused = [number for number in range(config.vocab_size) if number not in by_id]
    if not unused:
        raise ValueError(
            "the tokenizer has neither an end-of-text nor a padding token, and llama.cpp would end texts at token 11; "
            "set tokenizer.eos_token or pad_token, and save it again"
        )
    return unused[0]


def _token_type(gguf: Any, number: int, by_id: dict[int, str], added: dict[int, Any]) -> Any:
    if number not in by_id:
        return gguf.TokenType.UNUSED
    if number not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
