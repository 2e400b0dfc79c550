"""Published scores of key channels: pivots by hand, cuts of every family, and what each layer allows."""

import pytest
import torch
from delta_models import KEYS
from delta_models import make as delta_model
from own_delta_models import own as own_model
from scipy.linalg import qr

from hf_compressm import state_sizes
from hf_compressm.baselines import gather_rival_statistics, rival_cut, rival_selection
from hf_compressm.baselines.key_scores import qr_pivots
from hf_compressm.surgery import find_mixers, history


def batches(count=3):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(2, 50, (4, 24), generator=generator)} for _ in range(count)]


def test_pivots_are_those_of_a_qr_decomposition():
    signals = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, 13)
    _, _, expected = qr(signals.numpy(), mode="economic", pivoting=True)
    assert qr_pivots(signals.T @ signals, 12) == expected.tolist()


def test_of_dependent_columns_each_is_taken_once():
    signals = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(1, 2)
    assert sorted(qr_pivots(signals.T @ signals, 6)) == list(range(6))


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "olmo_hybrid"])
def test_rank_revealing_qr_sees_queries_and_keys_before_their_normalisation(family):
    model = delta_model(family)
    site = find_mixers(model)[0]
    seen = []
    hook = site.mixer.conv1d.register_forward_hook(lambda layer, args, out: seen.append(out.detach()))
    found = gather_rival_statistics(model, batches(1))[site.name]
    hook.remove()
    keys = site.mixer.num_k_heads * KEYS
    convolved = torch.nn.functional.silu(seen[0][..., :24]).mT[..., : 2 * keys].double()
    rows = convolved.unflatten(-1, (2, site.mixer.num_k_heads, KEYS)).flatten(0, 1)
    expected = torch.einsum("tphm,tphn->hmn", rows, rows)
    torch.testing.assert_close(found.raw, expected, rtol=1e-4, atol=1e-6)
    assert rival_selection("drrqr", found, 4) == [sorted(qr_pivots(moment, 4)) for moment in found.raw]


@pytest.mark.parametrize("method", ["first", "random", "ghost", "drrqr"])
def test_a_stock_model_is_cut(method):
    model = delta_model("qwen3_5")
    rival_cut(model, method, 4, batches(), generator=torch.Generator().manual_seed(0))
    assert state_sizes(model) == [4, 4] and model.config.linear_key_head_dim == 4
    assert history(model)[-1]["score"] == method
    assert model(**batches(1)[0]).logits.isfinite().all()


@pytest.mark.parametrize("method", ["first", "random", "ghost"])
def test_an_own_model_is_cut(method):
    model = own_model()
    rival_cut(model, method, 3, batches(), generator=torch.Generator().manual_seed(0))
    assert set(state_sizes(model)) == {3}
    assert model(**batches(1)[0]).logits.isfinite().all()


def test_a_score_that_a_layer_does_not_have_is_named_with_those_that_it_has():
    with pytest.raises(ValueError, match="'sparse_ssm'; allowed for this layer are first, random, ghost, drrqr"):
        rival_cut(delta_model("qwen3_5"), "sparse_ssm", 4, batches())
    with pytest.raises(ValueError, match="'drrqr'; allowed for this layer are first, random, ghost$"):
        rival_cut(own_model(), "drrqr", 4, batches())
