"""Stock to own and back: no change of outputs, and a result that needs nothing of this package."""

import subprocess
import sys

import pytest
import torch
from selective_models import COMMON, HEADS, IDS, OWN, STOCK, make, own
from transformers import FalconMambaConfig, FalconMambaForCausalLM, Mamba2Model, MambaModel

from hf_compressm import CompreSSMMambaModel, compress, from_stock, state_sizes, to_stock

KINDS = pytest.mark.parametrize("kind", ["mamba", "mamba2"])


@KINDS
def test_round_trip_keeps_outputs_and_generation(kind, tmp_path):
    stock = make(STOCK, kind, tie_word_embeddings=True)
    stock.save_pretrained(tmp_path)
    settings = {"max_new_tokens": 8, "do_sample": False}
    for source in (stock, tmp_path):
        ours = from_stock(source)
        back = to_stock(ours.eval())
        assert type(ours) is OWN[kind][0] and type(back) is type(stock)
        for model in (ours, back):
            assert torch.allclose(model(IDS).logits, stock(IDS).logits, atol=1e-5)
            assert torch.equal(model.generate(IDS[:, :5], **settings), stock.generate(IDS[:, :5], **settings))
            assert model.lm_head.weight is model.get_input_embeddings().weight
        assert all(torch.equal(p, back.get_parameter(name)) for name, p in stock.named_parameters())
        assert not {id(p) for p in stock.parameters()} & {id(p) for p in back.parameters()}


def test_base_models_and_dtypes_are_kept():
    for cls, config, extra in ((MambaModel, STOCK["mamba"][1], {}), (Mamba2Model, STOCK["mamba2"][1], HEADS)):
        stock = cls(config(**COMMON, **extra)).bfloat16().eval()
        back = to_stock(from_stock(stock))
        assert torch.equal(back(IDS).last_hidden_state, stock(IDS).last_hidden_state)
        assert {p.dtype for p in from_stock(stock).parameters()} == {torch.bfloat16}


def test_uneven_mamba_is_padded_without_loss():
    model = own("mamba")
    for size in (None, 16):
        stock = to_stock(model, state_size=size)
        assert set(state_sizes(stock)) == {size or max(state_sizes(model))} == {stock.config.state_size}
        assert torch.allclose(stock(IDS).logits, model(IDS).logits, atol=1e-5)
    with pytest.raises(ValueError, match="at least that of the largest layer"):
        to_stock(model, state_size=2)


def test_mamba2_that_selects_states_is_exported_and_one_that_mixes_them_is_not():
    model = make(OWN, "mamba2", state_sizes=[3, 8, 5])
    rows = torch.eye(8)[[1, 4, 6]].expand(2, 3, 8).clone()
    mixer = model.backbone.layers[0].mixer
    mixer.read_in, mixer.read_out = torch.nn.Parameter(rows), torch.nn.Parameter(rows.clone())
    stock = to_stock(model)
    assert state_sizes(stock) == [8, 8, 8] and torch.allclose(stock(IDS).logits, model(IDS).logits, atol=1e-5)
    mixer.read_out.data *= 1.01
    with pytest.raises(ValueError, match=r"layers.0.mixer mixes its states .* compress the stock Mamba2ForCausalLM"):
        to_stock(model)


def test_what_cannot_be_converted_is_refused(tmp_path):
    falcon = FalconMambaForCausalLM(FalconMambaConfig(**COMMON))
    with pytest.raises(TypeError, match="FalconMambaForCausalLM has no counterpart .* MambaForCausalLM"):
        from_stock(falcon)
    falcon.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of class FalconMambaForCausalLM; supported are"):
        from_stock(tmp_path)
    with pytest.raises(TypeError, match="MambaForCausalLM has no stock counterpart"):
        to_stock(make(STOCK, "mamba"))
    with pytest.raises(ValueError, match="num_channels"):
        to_stock(CompreSSMMambaModel(OWN["mamba"][1](**COMMON, num_channels=2)))


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hf_compressm"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, expected = torch.load(folder + "/expected.pt")
    print(type(model).__name__, model.config.state_size, float((model(ids).logits - expected).abs().max()) < 1e-5)
"""


@pytest.mark.multi_process
def test_compressed_checkpoints_load_without_this_package(tmp_path):
    expected = []
    for kind in STOCK:
        model = make(OWN, kind) if kind == "mamba" else make(STOCK, kind)
        compress(model, {"input_ids": IDS}, target=4, refit_steps=0)
        stock = to_stock(model) if kind == "mamba" else model
        stock.save_pretrained(tmp_path / kind)
        torch.save((IDS, model(IDS).logits), tmp_path / kind / "expected.pt")
        expected += [type(stock).__name__, str(max(state_sizes(model))), "True"]
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *(str(tmp_path / kind) for kind in STOCK)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected
