"""`generate` with torch.compile compiles whole graphs, few of them, and none for later tokens or prompts."""

import pytest
import torch
from own_models import Own, V
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import CompileConfig

GREEDY = {"do_sample": False, "pad_token_id": 0}
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def ids(length):
    return torch.randint(1, V, (2, length))


def tokens(count):
    return GREEDY | {"max_new_tokens": count, "min_new_tokens": count}


@pytest.mark.parametrize("family", ["CompreSSMMamba", "CompreSSMMamba2"])
def test_steps_of_generate_are_one_graph(family):
    model = Own(f"{family}ForCausalLM").model().eval()
    prompts = [ids(5), ids(9)]
    expected = [model.generate(prompt, **tokens(6)) for prompt in prompts]
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers' own switch for the CPU
    for prompt, right in zip(prompts, expected, strict=True):
        found = model.generate(prompt, **tokens(6), cache_implementation="static", compile_config=config)
        assert torch.equal(found, right)
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("family", ["CompreSSMMamba", "CompreSSMMamba2", "MimoSSM"])
def test_a_compiled_forward_is_compiled_no_more_after_a_few_graphs(family):
    model = Own(f"{family}ForCausalLM").model().eval()
    expected, counter = model.generate(prompt := ids(5), **tokens(6)), CompileCounter()
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    assert torch.equal(model.generate(prompt, **tokens(6)), expected)
    model.generate(ids(7), **tokens(6))  # now the length is dynamic
    seen = counter.frame_count
    assert 3 <= seen <= 4
    model.generate(ids(9), **tokens(20))
    assert counter.frame_count == seen
