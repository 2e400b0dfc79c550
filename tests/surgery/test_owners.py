"""Sizes and history in the config that a mixer belongs to: composites, wrappers, several models in one, no config."""

import copy
import dataclasses
import io
from types import SimpleNamespace

import pytest
import torch
from composite_models import (
    HYBRIDS,
    IDS,
    Classifier,
    CopyingPairModel,
    Pair,
    PairConfig,
    PairModel,
    mamba,
    mamba_config,
    mimo,
    mimo_config,
    multimodal,
)
from torch import nn
from transformers import AutoModel, LlavaForConditionalGeneration, MambaModel, PreTrainedConfig, PreTrainedModel

from hf_compressm import Energy, Fraction, SizeConstraints, Target, compress, save_base_model, state_sizes
from hf_compressm.baselines import rival_cut
from hf_compressm.layers.lru import LRU
from hf_compressm.surgery import (
    CutSettings,
    Snapshot,
    append_history,
    apply_plan,
    find_mixers,
    find_owners,
    history,
    last_sizes,
    make_plan,
    original_sizes,
    set_history,
    short,
)

TOKENS = {"input_ids": IDS}
BATCH = {**TOKENS, "input_values": torch.randn(4, 32, 1, generator=torch.Generator().manual_seed(0))}


def walk(model, policy, attempts: int = 4, calibration=None) -> list[int]:
    """Sizes after so many cuts that share the way to the policy's goal, as the callback makes them."""
    constraints = SizeConstraints(minimum_change=0)
    for left in range(attempts, 0, -1):
        plan = make_plan(model, settings=CutSettings(policy, constraints), attempts_left=left, calibration=calibration)
        apply_plan(model, None, plan, step=attempts - left)
    return state_sizes(model)


# Composite models of transformers


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_multimodal_model_is_saved_and_loaded_at_its_new_size(family, tmp_path):
    model = multimodal(family)
    text = model.config.text_config
    before = set(vars(model.config))
    record = compress(model, TOKENS, target=4, refit_steps=0)
    assert set(state_sizes(model)) == {4}
    assert model.model.language_model.config is text and vars(model.config).keys() == before
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    told = model.generate(input_ids=IDS[:, :5], max_new_tokens=5, do_sample=False)

    model.save_pretrained(tmp_path / "whole")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, wanted, rtol=0, atol=1e-6)
    assert torch.equal(loaded.generate(input_ids=IDS[:, :5], max_new_tokens=5, do_sample=False), told)
    assert history(model) == [record] and history(loaded) == [short(record)]

    model.model.language_model.save_pretrained(tmp_path / "text")
    part = AutoModel.from_pretrained(tmp_path / "text")
    assert state_sizes(part) == state_sizes(model) and original_sizes(part) == original_sizes(model)
    assert [layer["name"] for layer in history(part)[0]["layers"]] == [site.name for site in find_mixers(part)]


def test_a_second_cut_of_a_loaded_multimodal_model_goes_on_with_its_history(tmp_path):
    model = multimodal("bamba")
    compress(model, TOKENS, policy=Fraction(0.5), refit_steps=0, step=3)
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    compress(loaded, TOKENS, policy=Fraction(0.25), refit_steps=0, step=7)
    assert state_sizes(loaded) == [4, 4] and original_sizes(loaded) == [16, 16]
    assert [record["step"] for record in history(loaded)] == [3, 7]


@pytest.mark.parametrize("cls", [PairModel, CopyingPairModel])
def test_two_models_within_one_with_a_config_each_or_copies_of_them(cls, tmp_path):
    torch.manual_seed(0)
    model = cls(PairConfig()).eval()
    record = compress(model, BATCH, policy=Fraction(0.5), refit_steps=0)
    assert state_sizes(model) == [8, 8, 8, 8]
    for left, right in ((model.config.left, model.config.right), (model.left.config, model.right.config)):
        assert left.state_sizes == [8, 8] and right.state_size == 8
        assert not hasattr(left, "state_size") and not hasattr(right, "state_sizes")
    assert not {"state_size", "state_sizes", "compression_history"} & vars(model.config).keys()
    with torch.no_grad():
        wanted = model(**BATCH)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**BATCH), wanted, rtol=0, atol=1e-6)
    assert history(loaded) == [short(record)]
    again = compress(loaded, BATCH, policy=Fraction(0.25), refit_steps=0)  # copies that were cut together stay so
    assert state_sizes(loaded) == [4] * 4 and history(loaded) == [short(record), again]
    assert loaded.config.left.state_sizes == [4, 4] and loaded.config.right.state_size == 4


def test_a_copy_of_the_whole_config_is_kept_in_line(tmp_path):
    class Wrapped(PreTrainedModel):
        config_class = type(mimo_config())

        def __init__(self, config):
            super().__init__(config)
            self.body = AutoModel.from_config(copy.deepcopy(config))
            self.post_init()

    model = Wrapped(mimo_config())
    compress(model, policy=Fraction(0.5))
    assert model.config.state_sizes == model.body.config.state_sizes == [8, 8]
    model.save_pretrained(tmp_path)
    assert state_sizes(Wrapped.from_pretrained(tmp_path)) == [8, 8]


def test_mixers_directly_in_a_model_that_only_its_inner_config_describes():
    class Outer(PreTrainedModel):
        config_class = PairConfig

        def __init__(self, config):
            super().__init__(config)
            self.layers = nn.ModuleList(LRU(6, size) for size in config.left.state_sizes)

    model = Outer(PairConfig())
    compress(model, policy=Fraction(0.5))
    assert model.config.left.state_sizes == [8, 8] and "state_sizes" not in vars(model.config)
    assert len(history(model)) == len(model.config.left.compression_history) == 1


# Wrappers


class WithDict(Classifier):
    """As Lightning's modules have it: a config that is a mapping, and not of transformers."""

    def __init__(self, body):
        super().__init__(body)
        self.config = {"state_sizes": [16, 16], "lr": 1e-3}


def distributed(model):
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture
def one_process():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["head"]))


WRAPPERS = {
    "plain module": Classifier,
    "module with a mapping": WithDict,
    "module in a module": lambda model: Classifier(nn.Sequential(model)[0]),
    "DataParallel": nn.DataParallel,
    "DDP": distributed,
    "compiled": torch.compile,
    "DDP around a plain module": lambda model: distributed(Classifier(model)),
    "peft around a plain module": lambda model: adapted(Classifier(model)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_share_of_the_states_is_of_those_at_the_start_whatever_is_around_the_model(kind, one_process):
    inner = mimo(128)
    model = WRAPPERS[kind](inner)
    assert walk(model, Fraction(0.25)) == [32, 32] == inner.config.state_sizes
    assert original_sizes(model) == [128, 128] and len(history(model)) == 4
    assert [record["step"] for record in history(model)] == [record["step"] for record in history(inner)]
    names = [site.name for site in find_mixers(model)]
    assert all([layer["name"] for layer in record["layers"]] == names for record in history(model))
    config = getattr(model, "config", None)
    assert config is inner.config or config in (None, {"state_sizes": [16, 16], "lr": 1e-3}, {"model_type": "custom"})


def test_the_wrapped_model_is_saved_and_loaded_by_itself(tmp_path):
    model = Classifier(mimo())
    compress(model, policy=Fraction(0.5))
    model.body.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert state_sizes(loaded) == loaded.config.state_sizes == [8, 8]
    assert [layer["name"] for layer in history(loaded)[0]["layers"]] == [site.name for site in find_mixers(loaded)]


def test_a_base_that_cannot_save_itself_is_refused_by_name(tmp_path):
    model = adapted(Classifier(mimo()))
    compress(model, policy=Fraction(0.5))
    with pytest.raises(ValueError, match="is a Classifier, which has no save_pretrained"):
        save_base_model(model, tmp_path)


# No config


def bare() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LRU(6, 128), nn.GELU(), LRU(6, 64))


@pytest.mark.parametrize(
    "through",
    [
        lambda model: model,
        copy.deepcopy,
        lambda model: torch.load(saved(model), weights_only=False),
        lambda model: nn.Sequential(model),
        lambda model: nn.DataParallel(model),
    ],
)
def test_layers_without_a_config_remember(through):
    model = bare()
    keys = [name for name, _ in model.named_parameters()]
    constraints = SizeConstraints(minimum_change=0)
    for left in (4, 3):
        plan = make_plan(model, settings=CutSettings(Fraction(0.25), constraints), attempts_left=left)
        apply_plan(model, None, plan, step=4 - left)
    model = through(model)
    for left in (2, 1):
        plan = make_plan(model, settings=CutSettings(Fraction(0.25), constraints), attempts_left=left)
        apply_plan(model, None, plan, step=4 - left)
    assert state_sizes(model) == [32, 16] and original_sizes(model) == [128, 64]
    assert [record["step"] for record in history(model)] == [0, 1, 2, 3]
    assert len(model.state_dict()) == len(keys)


def saved(model) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_a_single_layer_remembers():
    layer = LRU(6, 128)
    assert walk(layer, Fraction(0.25)) == [32] and original_sizes(layer) == [128]
    assert [record["layers"][0]["name"] for record in history(layer)] == [""] * 4


@dataclasses.dataclass(frozen=True)
class Frozen:
    state_sizes: tuple = (128, 64)


@pytest.mark.parametrize(
    ("config", "after"),
    [
        ({"state_sizes": [128, 64]}, {"state_sizes": [128, 64]}),
        (SimpleNamespace(lr=1), SimpleNamespace(lr=1)),
        (SimpleNamespace(state_sizes=[128, 64]), SimpleNamespace(state_sizes=[32, 16])),
        (Frozen(), Frozen()),
        ("tiny.yaml", "tiny.yaml"),
    ],
    ids=["mapping", "other fields", "with the field", "frozen", "a name"],
)
def test_a_config_that_is_not_of_transformers_gets_no_new_fields(config, after):
    model = bare()
    model.config = config
    assert walk(model, Fraction(0.25)) == [32, 16] and model.config == after
    assert original_sizes(model) == [128, 64] and len(history(model)) == 4


# Several models in one


def test_two_stock_models_of_different_sizes_are_each_cut_to_a_size_of_its_own(tmp_path):
    for policy in (Fraction(0.5), Target(12), Energy(0.3)):
        model = Pair(mamba(16), mamba(64, seed=1))
        compress(model, BATCH, policy=policy, refit_steps=0, constraints=SizeConstraints(minimum_change=0))
        sizes = state_sizes(model)
        left, right = sizes[:2], sizes[2:]
        assert len(set(left)) == len(set(right)) == 1 and left[0] < 16 and right[0] < 64, policy
        assert (model.left.config.state_size, model.right.config.state_size) == (left[0], right[0])
        for name in ("left", "right"):
            part = getattr(model, name)
            part.save_pretrained(tmp_path / name)
            loaded = MambaModel.from_pretrained(tmp_path / name)
            torch.testing.assert_close(loaded(IDS)[0], part(IDS)[0], rtol=0, atol=1e-6)
            assert original_sizes(loaded) == [16 if name == "left" else 64] * 2


def test_a_share_is_the_same_for_two_stock_models_as_for_each_alone():
    model = Pair(mamba(16), mamba(64, seed=1))
    assert walk(model, Fraction(0.25), calibration=BATCH) == [4, 4, 16, 16]


def test_own_and_stock_models_together():
    model = Pair(mimo([16, 12]), mamba(16))
    compress(model, BATCH, target=7, refit_steps=0, constraints=SizeConstraints(minimum_change=0))
    sizes = state_sizes(model)
    assert sizes[2] == sizes[3] == model.right.config.state_size and sizes[:2] == model.left.config.state_sizes
    assert 6 <= sum(sizes) / 4 <= 7
    with pytest.raises(ValueError, match="uniform=False cannot be met"):
        make_plan(model, settings=CutSettings(Target(5), SizeConstraints(uniform=False)), calibration=BATCH)


def test_a_score_cuts_two_stock_models_to_sizes_of_their_own():
    model = Pair(mamba(16), mamba(64, seed=1))
    names = [site.name for site in find_mixers(model)]
    rival_cut(model, "random", dict(zip(names, [4, 4, 8, 8], strict=True)), BATCH, generator=torch.Generator())
    assert state_sizes(model) == [4, 4, 8, 8]
    with pytest.raises(ValueError, match="holds one state size for all layers"):
        rival_cut(model, "random", dict(zip(names, [4, 4, 8, 6], strict=True)), BATCH, generator=torch.Generator())


@pytest.mark.parametrize("make", [mimo_config, mamba_config])
def test_two_models_that_share_a_config_stay_alike(make, tmp_path):
    torch.manual_seed(0)
    config = make()
    model = Pair(AutoModel.from_config(config), AutoModel.from_config(config))
    assert model.left.config is model.right.config
    compress(model, BATCH, policy=Energy(0.3), refit_steps=0)
    sizes = state_sizes(model)
    assert sizes[:2] == sizes[2:] and min(sizes) < 16
    for part in (model.left, model.right):
        part.save_pretrained(tmp_path)
        assert state_sizes(AutoModel.from_pretrained(tmp_path)) == sizes[:2]


def test_a_part_of_what_a_config_describes_is_refused():
    model = mimo()

    class Holder(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config, layer):
            super().__init__(config)
            self.layer = layer

    part = Holder(model.config, find_mixers(model)[0].mixer)
    with pytest.raises(ValueError, match=r"state_sizes has sizes of 2 layers, and it speaks of 1 here: layer\. Pass"):
        compress(part, policy=Fraction(0.5))
    assert state_sizes(model) == model.config.state_sizes == [16, 16]


# History


def test_parts_cut_alone_before_and_after_have_one_history_with_the_whole():
    model = Pair(mimo(32), mimo(24, seed=1))
    alone = compress(model.left, policy=Fraction(0.5), step=1)
    joint = compress(model, policy=Fraction(0.5), step=2)
    after = compress(model.right, policy=Fraction(0.25), step=3)
    records = history(model)
    assert [record["step"] for record in records] == [1, 2, 3] and records[1] == joint
    assert [record["step"] for record in history(model.left)] == [1, 2]
    assert [record["step"] for record in history(model.right)] == [2, 3]
    assert [layer["name"] for layer in records[0]["layers"]] == [f"left.{layer['name']}" for layer in alone["layers"]]
    assert [layer["name"] for layer in records[2]["layers"]] == [f"right.{layer['name']}" for layer in after["layers"]]
    assert original_sizes(model) == [32, 32, 24, 24]
    assert list(last_sizes(model, records).values()) == state_sizes(model) == [16, 16, 6, 6]


@pytest.mark.parametrize("make", [bare, lambda: Pair(mimo(), mimo(12, 1)), lambda: Classifier(mimo())])
def test_what_is_written_is_read_and_can_be_taken_back(make):
    model = make()
    record = compress(model, policy=Fraction(0.5), step=1)
    snapshot = Snapshot.take(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    records = [record, compress(model, policy=Fraction(0.25), step=2)]
    assert history(model) == records
    snapshot.restore(model)
    assert history(model) == [record] and all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    for owner in find_owners(model):
        assert all(config.state_sizes == [site.state_size for site in owner.sites] for config in owner.configs)
    set_history(model, [])
    assert history(model) == [] and original_sizes(model) == state_sizes(model)
    set_history(model, records)
    assert history(model) == records
    undo = {"event": "undo", "step": 3, "cut_step": 2, "layers": records[1]["layers"]}
    append_history(model, undo)
    assert history(model) == [*records, undo]


def test_a_history_that_an_earlier_version_wrote_to_the_outer_config_is_read_and_moved():
    model = multimodal("bamba")
    names = [site.name for site in find_mixers(model)]
    layers = [{"name": name, "old_size": 32, "new_size": 16} for name in names]
    old = {"event": "cut", "step": 1, "layers": layers}
    model.config.compression_history = [old]
    assert history(model) == [old] and original_sizes(model) == [32, 32]
    record = compress(model, TOKENS, policy=Fraction(0.25), refit_steps=0)
    assert state_sizes(model) == [8, 8] and history(model) == [old, record]
    assert not hasattr(model.config, "compression_history")
    assert len(model.config.text_config.compression_history) == 2


def test_names_follow_the_model_into_and_out_of_a_wrapper():
    model = mimo(32)
    compress(model, policy=Fraction(0.5))
    wrapped = Classifier(model)
    assert [layer["name"] for layer in history(wrapped)[0]["layers"]] == [site.name for site in find_mixers(wrapped)]
    other = Classifier(nn.Sequential(mimo(32)))
    set_history(other, history(wrapped))  # as a resumed run does whose model is wrapped otherwise
    assert [layer["name"] for layer in history(other)[0]["layers"]] == [site.name for site in find_mixers(other)]
