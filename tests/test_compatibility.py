"""One package on several versions of transformers: caches by every name, no keyword passed over, checks at import."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from selective_models import IDS, own
from stock_models import CONFIGS
from transformers import AutoModelForCausalLM, Cache, DynamicCache, Mamba2Config, Mamba2ForCausalLM, Trainer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from hf_compressm import MimoSSMConfig, compatibility, from_stock, to_stock, use_fast_ops
from hf_compressm.compatibility import CACHE_KEYWORDS, HARMLESS_KEYWORDS, PACKED_KEYWORDS
from hf_compressm.models import MimoSSMForCausalLM, convert
from hf_compressm.surgery import find_mixers

FAMILIES = sorted(CONFIGS)


def model_of(kind):
    torch.manual_seed(0)
    if kind == "mimo_ssm":
        return MimoSSMForCausalLM(
            MimoSSMConfig(vocab_size=50, hidden_size=8, num_hidden_layers=2, state_sizes=4)
        ).eval()
    if kind in ("mamba", "mamba2"):
        return own(kind)
    stock = AutoModelForCausalLM.from_config(CONFIGS[kind.removeprefix("fast_")]()).eval()
    use_fast_ops(stock)
    return stock


SELECTIVE = ["mamba", "mamba2", *(f"fast_{family}" for family in FAMILIES)]


@pytest.mark.parametrize("name", CACHE_KEYWORDS)
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mimo_ssm"])
@torch.no_grad()
def test_models_go_on_from_a_cache_by_each_name(kind, name):
    for model in (model_of(kind), model_of(kind).backbone):
        if kind == "mimo_ssm" and name == "cache_params":  # a name that no version of transformers uses for it
            continue
        key = "logits" if hasattr(model, "lm_head") else "last_hidden_state"
        whole, first = model(IDS)[key], model(IDS[:, :9], use_cache=True)
        cache = next(first[field] for field in CACHE_KEYWORDS if field in first)
        assert torch.allclose(model(IDS[:, 9:], **{name: cache})[key], whole[:, 9:], atol=3e-6)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mimo_ssm"])
def test_two_different_caches_are_refused(kind):
    model = model_of(kind)
    old = "past_key_values" if kind == "mimo_ssm" else "cache_params"
    one, other = (model(IDS, use_cache=True) for _ in range(2))
    caches = [next(output[field] for field in CACHE_KEYWORDS if field in output) for output in (one, other)]
    model(IDS[:, :1], **{"cache": caches[0], old: caches[0]})
    with pytest.raises(TypeError, match="was given a cache as cache and another as"):
        model(IDS[:, :1], **{"cache": caches[0], old: caches[1]})


@pytest.mark.parametrize("kind", SELECTIVE)
@torch.no_grad()
def test_mixers_take_a_cache_by_either_name(kind):
    model = model_of(kind)
    mixer = find_mixers(model)[0].mixer
    x = torch.randn(2, 7, model.config.hidden_size)
    whole = mixer(x)
    for name in ("cache", "cache_params"):
        cache = DynamicCache(config=model.config)
        parts = [mixer(part, **{name: cache}) for part in (x[:, :3], x[:, 3:4], x[:, 4:])]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5), name


@pytest.mark.parametrize("kind", SELECTIVE)
def test_mixers_pass_over_no_keyword_that_means_something(kind):
    model = model_of(kind)
    mixer = find_mixers(model)[0].mixer
    x = torch.randn(2, 3, model.config.hidden_size)
    expected = mixer(x)
    assert torch.equal(mixer(x, **dict.fromkeys(HARMLESS_KEYWORDS, True)), expected)
    assert torch.equal(mixer(x, unheard_of=None), expected)
    for name in ("initial_state", "past_key_values", "inference_params"):
        with pytest.raises(TypeError, match=f"does not know the keyword {name}"):
            mixer(x, **{name: x})
    for name in PACKED_KEYWORDS:
        with pytest.raises(ValueError, match=rf"packed into one.*\({name}\)") as refused:
            mixer(x, **{name: x})
        assert ("enable=False" in str(refused.value)) == kind.startswith("fast_")


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_models_hand_their_mixers_nothing_that_is_refused(family):
    model, seen = model_of(f"fast_{family}"), set()
    for site in find_mixers(model):
        site.mixer.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    model.train()(
        IDS, labels=IDS, num_items_in_batch=torch.tensor(5), output_hidden_states=True, output_attentions=True
    )
    model.eval().generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert seen - HARMLESS_KEYWORDS - {"hidden_states", "attention_mask", "cache", "cache_params"} == set()
    assert seen & {"cache", "cache_params"}


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "installed, message",
    [("5.16.1", "too old: hf_compressm is tested with 5.17 to 5.24"), ("4.57.6", "too old"), ("5.17.0", None)],
)
def test_an_old_transformers_is_refused(monkeypatch, installed, message):
    monkeypatch.setattr(compatibility, "version", lambda name: installed)
    with nullcontext() if message is None else pytest.raises(RuntimeError, match=message):
        compatibility.check_transformers()


@pytest.mark.parametrize("installed", ["5.25.0", "5.25.0.dev0", "6.0.1"])
def test_a_newer_transformers_is_warned_about_where_it_fits(monkeypatch, installed):
    monkeypatch.setattr(compatibility, "version", lambda name: installed)
    with pytest.warns(UserWarning, match=f"transformers {installed} is newer than what was tested.*<5.25"):
        compatibility.check_transformers()


def _renamed(self, hidden_states, memory=None, attention_mask=None, **kwargs):
    """As a version would have it that renames the cache once more."""


@pytest.mark.parametrize("installed", ["5.24.0", "5.25.0"])
def test_changed_interfaces_stop_the_import(monkeypatch, installed):
    monkeypatch.setattr(compatibility, "version", lambda name: installed)
    monkeypatch.setattr(Mamba2Mixer, "forward", _renamed)
    with pytest.raises(RuntimeError, match=r"does not fit: Mamba2Mixer.forward takes memory, whose meaning is unknown"):
        compatibility.check_transformers()
    monkeypatch.undo()
    monkeypatch.delattr(Cache, "update_recurrent_state")
    monkeypatch.setattr(Trainer, "_get_output_dir", lambda self: None)
    with pytest.raises(RuntimeError, match=r"no cache_utils.*recurrent_state; trainer.*_get_output_dir takes no trial"):
        compatibility.check_transformers()


def test_fast_ops_refuse_mixers_with_new_parameters(monkeypatch):
    model = AutoModelForCausalLM.from_config(CONFIGS["bamba"]())
    monkeypatch.setattr(type(find_mixers(model)[0].mixer), "forward", _renamed)
    with pytest.raises(RuntimeError, match="use_fast_ops does not fit transformers .*: no knowledge of memory"):
        use_fast_ops(model)


def test_stock_mamba2_whose_norm_passes_over_groups_is_not_converted(monkeypatch):
    config = Mamba2Config(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=2)
    stock, ours = Mamba2ForCausalLM(config), own("mamba2", n_groups=2)
    monkeypatch.setattr(convert, "mamba2_norm_is_by_group", lambda: False)
    for work in (lambda: from_stock(stock), lambda: to_stock(ours)):
        with pytest.raises(ValueError, match="n_groups=2, which the installed transformers normalises all at once"):
            work()
    config.n_groups = 1
    assert from_stock(Mamba2ForCausalLM(config)) is not None


def test_a_peft_without_its_classes_is_noticed(monkeypatch):
    peft = pytest.importorskip("peft")
    layer = compatibility.peft_class("tuners.lora.layer", "Linear")
    assert layer is peft.tuners.lora.layer.Linear
    monkeypatch.delattr(peft.tuners.lora.layer, "Linear")
    with pytest.raises(RuntimeError, match="has no tuners.lora.layer.Linear, by which adapters are found"):
        compatibility.peft_class("tuners.lora.layer", "Linear")


def test_bounds_are_the_same_everywhere():
    """pyproject.toml is what pip and CI go by; the check at import, constraints and README agree with it."""
    low, high = compatibility.LOWEST, compatibility.NEWEST
    required = (ROOT / "pyproject.toml").read_text()
    assert f'"transformers>={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"' in required
    pinned = re.search(r"^transformers==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert low <= tuple(map(int, pinned.groups())) <= high
    readme = (ROOT / "README.md").read_text()
    assert f"transformers {low[0]}.{low[1]} to {high[0]}.{high[1]}" in readme
    assert ".ci/versions" in (ROOT / ".ci" / "run").read_text()
    for node in (ROOT / "tests" / "versions.txt").read_text().split():
        path, _, test = node.partition("::")
        assert f"def {test}" in (ROOT / path).read_text(), node
