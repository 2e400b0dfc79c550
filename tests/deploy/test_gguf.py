"""GGUF files: every tensor and field as llama.cpp reads them, and what cannot be written."""

import json
import sys

import numpy as np
import pytest
import torch
from selective_models import STOCK, make, own
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_compressm import cli, to_stock
from hf_compressm.deploy import save_gguf, write_gguf

HEADS = {"num_heads": 8, "head_dim": 16}


def call(capsys, *argv):
    """Exit code, standard output and standard error of the command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in argv])
    return stopped.value.code or 0, *capsys.readouterr()


def byte_level(**special):
    """A small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["states that shrink, states that stay"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def read(path):
    """Tensors, as float32 arrays, and fields of a GGUF file."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}, kinds


def expected_tensors(model):
    """The file's tensors, written out here by llama.cpp's names."""
    config, state = model.config, {name: tensor.float() for name, tensor in model.state_dict().items()}
    mamba2, groups = config.model_type == "mamba2", getattr(config, "n_groups", 1)
    found = {
        "token_embd.weight": state["backbone.embeddings.weight"],
        "output_norm.weight": state["backbone.norm_f.weight"],
    }
    if not config.tie_word_embeddings:
        found["output.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        old, new = f"backbone.layers.{layer}", f"blk.{layer}"
        mixer = {name.removeprefix(f"{old}.mixer."): tensor for name, tensor in state.items() if name.startswith(old)}
        A, D = -torch.exp(mixer["A_log"]), mixer["D"]
        found |= {
            f"{new}.attn_norm.weight": state[f"{old}.norm.weight"],
            f"{new}.ssm_in.weight": mixer["in_proj.weight"],
            f"{new}.ssm_conv1d.weight": mixer["conv1d.weight"].squeeze(1),
            f"{new}.ssm_conv1d.bias": mixer["conv1d.bias"],
            f"{new}.ssm_out.weight": mixer["out_proj.weight"],
            f"{new}.ssm_a": A.unsqueeze(1) if mamba2 else A,
            f"{new}.ssm_d": D.unsqueeze(1) if mamba2 else D,
        }
        if mamba2:
            found |= {
                f"{new}.ssm_dt.bias": mixer["dt_bias"],
                f"{new}.ssm_norm.weight": mixer["norm.weight"].reshape(groups, -1),
            }
        else:
            found |= {
                f"{new}.ssm_x.weight": mixer["x_proj.weight"],
                f"{new}.ssm_dt.weight": mixer["dt_proj.weight"],
                f"{new}.ssm_dt.bias": mixer["dt_proj.bias"],
            }
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [("mamba", {}), ("mamba", {"tie_word_embeddings": False}), ("mamba2", HEADS)],
)
def test_every_tensor_comes_back(kind, fields, dtype, tmp_path):
    pytest.importorskip("gguf")
    model = make(STOCK, kind, hidden_size=64, **fields).to(dtype)
    write_gguf(model, None, tmp_path / "model.gguf")
    found, _, kinds = read(tmp_path / "model.gguf")
    expected = expected_tensors(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
    stored = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert kinds["blk.0.ssm_in.weight"] == kinds["token_embd.weight"] == stored
    exact = ("ssm_a", "ssm_d", "ssm_conv1d.weight", "attn_norm.weight", "ssm_dt.bias")
    assert {kinds[f"blk.1.{name}"] for name in exact} == {"F32"}


def test_fields_say_what_llama_cpp_asks_for(tmp_path):
    pytest.importorskip("gguf")
    model = make(STOCK, "mamba2", hidden_size=64, **HEADS)
    write_gguf(model, None, tmp_path / "model.gguf")
    fields = read(tmp_path / "model.gguf")[1]
    groups = model.config.n_groups
    assert fields["general.architecture"] == "mamba2" and fields["tokenizer.ggml.model"] == "none"
    sizes = {"conv_kernel": 4, "inner_size": 128, "state_size": 8, "time_step_rank": 8, "group_count": groups}
    assert {name: fields[f"mamba2.ssm.{name}"] for name in sizes} == sizes
    assert fields["mamba2.block_count"] == 3 and fields["mamba2.vocab_size"] == 50
    mamba = make(STOCK, "mamba", hidden_size=64)
    write_gguf(mamba, None, tmp_path / "mamba.gguf")
    fields = read(tmp_path / "mamba.gguf")[1]
    assert fields["mamba.ssm.time_step_rank"] == 4 and fields["mamba.ssm.dt_b_c_rms"] is False
    assert fields["mamba.attention.layer_norm_rms_epsilon"] == pytest.approx(mamba.config.layer_norm_epsilon)


def test_a_byte_level_vocabulary_is_written(tmp_path):
    pytest.importorskip("gguf")
    tokenizer = byte_level(pad_token="<pad>")
    write_gguf(make(STOCK, "mamba", vocab_size=300), tokenizer, tmp_path / "model.gguf")
    fields = read(tmp_path / "model.gguf")[1]
    tokens = fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.model"] == "gpt2" and len(tokens) == len(fields["tokenizer.ggml.token_type"]) == 300
    assert all(tokens[number] == token for token, number in tokenizer.get_vocab().items())
    assert tokens[299] == "[PAD299]" and fields["tokenizer.ggml.token_type"][:2] == [3, 1]
    assert fields["tokenizer.ggml.merges"][0].count(" ") == 1
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.padding_token_id"] == 0


@pytest.mark.parametrize(
    ("special", "size", "end"), [({"eos_token": "<end>"}, 270, 0), ({}, 300, 270), ({"pad_token": "<pad>"}, 270, 0)]
)
def test_texts_end_at_no_ordinary_token(special, size, end, tmp_path):
    pytest.importorskip("gguf")
    tokenizer = byte_level(**special)
    write_gguf(make(STOCK, "mamba", vocab_size=size), tokenizer, tmp_path / "model.gguf")
    end = end if special else len(tokenizer)
    assert read(tmp_path / "model.gguf")[1]["tokenizer.ggml.eos_token_id"] == end


def test_the_command_pads_and_writes(tmp_path, capsys):
    pytest.importorskip("gguf")
    model = own("mamba", hidden_size=64, state_sizes=[3, 12, 5])
    model.save_pretrained(tmp_path / "model")
    code, printed, errors = call(
        capsys, "export", tmp_path / "model", tmp_path / "out", "--to", "gguf", "--for", "llama.cpp"
    )
    text = f"MambaForCausalLM, gguf, without a vocabulary, states 16 16 16\nsaved to {tmp_path / 'out'}\n"
    assert (code, printed) == (0, text), errors
    tensors, fields, _ = read(tmp_path / "out/model.gguf")
    assert fields["mamba.ssm.state_size"] == 16
    expected = expected_tensors(to_stock(model, 16))
    assert all(np.array_equal(tensors[name], tensor.numpy()) for name, tensor in expected.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["state_size"] == 16
    assert save_gguf(str(tmp_path / "model"), tmp_path / "small").state_sizes == [12] * 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "gguf", "--for", "vllm"], "error: GGUF is what llama.cpp reads; for vllm use --to stock"),
        (["--to", "gguf", "--for", "llamacpp"], "error: unknown runtime 'llamacpp'; did you mean 'llama.cpp'?"),
        (["--to", "onnx", "--for", "vllm"], "error: --for is for --to stock or gguf, not for --to onnx"),
        (["--to", "remote-code", "--for", "vllm"], "error: --for is for --to stock or gguf, not for --to remote-code"),
        (["--to", "stock", "--for", "llama.cpp"], "error: llama.cpp needs a Mamba with intermediate_size a multiple"),
    ],
)
def test_what_cannot_be_written_is_one_line(argv, message, tmp_path, capsys):
    pytest.importorskip("gguf")
    own("mamba").save_pretrained(tmp_path / "model")
    code, _, errors = call(capsys, "export", tmp_path / "model", tmp_path / "out", *argv)
    assert code == 2 and errors.splitlines()[-1].startswith(message) and not (tmp_path / "out").exists()


def test_other_models_are_refused(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="a CompreSSMMambaForCausalLM cannot be written as GGUF"):
        write_gguf(own("mamba"), None, path)
    with pytest.raises(ValueError, match="the model is in torch.float64"):
        write_gguf(make(STOCK, "mamba").double(), None, path)
    with pytest.raises(ValueError, match="use_bias = False; this one has True"):
        write_gguf(make(STOCK, "mamba", use_bias=True), None, path)
    tokenizer = byte_level()
    with pytest.raises(ValueError, match="neither an end-of-text nor a padding token"):
        write_gguf(make(STOCK, "mamba", vocab_size=len(tokenizer)), tokenizer, path)


def test_a_missing_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    own("mamba").save_pretrained(tmp_path / "model")
    code, _, errors = call(capsys, "export", tmp_path / "model", tmp_path / "out", "--to", "gguf")
    assert code == 2 and errors.splitlines()[-1] == "error: GGUF files need gguf: pip install 'hf-compressm[gguf]'"
