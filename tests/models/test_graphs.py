"""torch.export of whole models with any batch and length, in graphs that run without this package."""

import subprocess
import sys

import pytest
import torch
from own_models import FIELDS, Own, V
from selective_models import STOCK, make
from torch.export import Dim, export

from hf_compressm import compress, use_fast_ops
from hf_compressm.layers.lru import LRU
from hf_compressm.ops.backends import choose_backend

SHAPES = [(batch, length) for batch in (1, 3) for length in (1, 7, 32, 33, 200)]
SEQUENCES = {0: Dim("batch", min=1), 1: Dim("length", min=1)}
FAMILIES = [family for family in FIELDS if family in ("CompreSSMMamba", "CompreSSMMamba2", "MimoSSM")]
pytestmark = pytest.mark.slow


def exported(model, shape=(2, 9), **fixed):
    """The program of a model that reads ids and a mask."""
    inputs = {"input_ids": ids(*shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
    dynamic = dict.fromkeys(inputs, SEQUENCES) | dict.fromkeys(fixed)
    return export(model, (), inputs | fixed, dynamic_shapes=dynamic)


def ids(*shape):
    return torch.randint(1, V, shape)


def mask(batch, length):
    """Padding anywhere, and in each row at least one real token."""
    found = (torch.rand(batch, length) > 0.3).long()
    found[:, length // 2] = 1
    return found


def own_ops(program):
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    targets = [str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"]
    assert any("scan" in target for target in targets)
    return [target for target in targets if "hf_compressm" in target]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["ForCausalLM", "ForSequenceClassification"])
def test_one_graph_for_every_batch_and_length(family, head):
    model = Own(family + head).model().eval()
    settings = {"use_cache": False} if head == "ForCausalLM" else {}
    program = exported(model, **settings)
    assert not own_ops(program)
    run = program.module()
    for shape in SHAPES:
        inputs = {"input_ids": ids(*shape), "attention_mask": mask(*shape)}
        real = inputs["attention_mask"].bool() if head == "ForCausalLM" else slice(None)
        with torch.no_grad():
            found, expected = run(**inputs, **settings).logits, model(**inputs, **settings).logits
        torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", STOCK)
def test_stock_models_after_a_cut(kind):
    model = make(STOCK, kind, num_hidden_layers=1)
    compress(model, [{"input_ids": ids(4, 16)}], target=4, refit_steps=0)
    use_fast_ops(model)
    settings = {"use_cache": False}
    shapes = {"input_ids": SEQUENCES, "use_cache": None}
    run = export(model, (), {"input_ids": ids(2, 9)} | settings, dynamic_shapes=shapes).module()
    for shape in SHAPES:
        inputs = settings | {"input_ids": ids(*shape)}
        with torch.no_grad():
            found, expected = run(**inputs).logits, model(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


WITHOUT_THE_PACKAGE = """
import sys
import torch
sys.modules["hf_compressm"] = None  # any import of it fails
run = torch.export.load(sys.argv[1]).module()
ids, expected = torch.load(sys.argv[2])
torch.testing.assert_close(run(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=False)[0], expected)
"""


def test_a_saved_program_runs_without_the_package(tmp_path):
    model = Own("MimoSSMForSequenceClassification").model(num_hidden_layers=1, state_sizes=[3]).eval()
    given = ids(3, 20)
    torch.export.save(exported(model, return_dict=False), tmp_path / "model.pt2")
    torch.save((given, model(input_ids=given).logits), tmp_path / "expected.pt")
    files = tmp_path / "model.pt2", tmp_path / "expected.pt"
    subprocess.run([sys.executable, "-c", WITHOUT_THE_PACKAGE, *files], check=True)


class Continued(torch.nn.Module):
    """An LRU that goes on from a state and passes over padding."""

    def __init__(self):
        super().__init__()
        self.lru = LRU(6, 5).double()

    def forward(self, u, state, real):
        return self.lru(u, state, real)


@pytest.mark.parametrize("form", ["complex", "pairs"])
def test_states_of_an_lru_are_complex_or_pairs(form):
    model, batch = Continued(), {0: SEQUENCES[0]}
    u, state = torch.randn(3, 11, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.complex128)
    given = torch.view_as_real(state) if form == "pairs" else state
    real = mask(3, 11).bool()
    y, last = model(u, state, real)
    smaller = u[:2, :4].clone(), given[:2].clone(), real[:2, :4].clone()
    run = export(model, smaller, dynamic_shapes=(SEQUENCES, batch, SEQUENCES)).module()
    found, final = run(u, given, real)
    torch.testing.assert_close(found[real], y[real])
    assert final.is_complex() == (form == "complex")
    torch.testing.assert_close(torch.view_as_complex(final) if form == "pairs" else final, last)


def test_a_backend_that_was_asked_for_stays(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert choose_backend("ssd_scan", None, "cpu") == "naive" and choose_backend("ssd_scan", "cpu", "cpu") == "cpu"
    monkeypatch.setenv("HF_COMPRESSM_SSD_SCAN", "cpu")
    assert choose_backend("ssd_scan", None, "cpu") == "cpu"
