"""The feature extractor: filling, normalising, padding, shapes, and saving beside a model."""

import numpy as np
import pytest
import torch
from helpers import run_without_the_package
from transformers import AutoFeatureExtractor

from hf_compressm import MimoSSMConfig, MimoSSMForSequenceClassification
from hf_compressm.cli import main
from hf_compressm.models import CompreSSMMambaConfig, CompreSSMMambaForSequenceClassification, MimoSSMFeatureExtractor
from hf_compressm.models.feature_extractor import fill_missing, pad_series, steps_mask

NAN = float("nan")


def test_the_last_value_stands_in_for_a_missing_one():
    values = np.array([[NAN, 1.0], [2.0, NAN], [NAN, NAN], [4.0, 5.0]])
    assert fill_missing(values, np.array([9.0, 9.0])).tolist() == [[9, 1], [2, 1], [2, 1], [4, 5]]


def test_channels_are_normalised_and_indicators_follow():
    extractor = MimoSSMFeatureExtractor(2, mean=[1, 2], std=[2, 4], indicators=True)
    found = extractor.features([[3.0, NAN], [NAN, 6.0]])
    assert extractor.num_channels == 4 and found.dtype == np.float32
    assert found.tolist() == [[1, 0, 0, 1], [1, 1, 1, 0]]


@pytest.mark.parametrize(
    "values, shape",
    [
        (np.zeros(5), (1, 5, 1)),
        (np.zeros((3, 5)), (3, 5, 1)),
        (np.zeros((5, 1)), (1, 5, 1)),
        (np.zeros((3, 5, 1)), (3, 5, 1)),
        ([np.zeros(5), np.zeros((2, 1))], (2, 5, 1)),
        ([0.0, 1.0], (1, 2, 1)),
    ],
)
def test_shapes_that_are_taken_for_one_channel(values, shape):
    batch = MimoSSMFeatureExtractor(1)(values)
    assert batch["input_values"].shape == shape and batch["attention_mask"].shape == shape[:2]


def test_padding_on_either_side():
    rows = [torch.ones(3, 2), torch.ones(1, 2)]
    assert steps_mask(rows).tolist() == [[1, 1, 1], [1, 0, 0]]
    assert steps_mask(rows, "left").tolist() == [[1, 1, 1], [0, 0, 1]]
    assert torch.equal(pad_series(rows, "left")[..., 0].long(), steps_mask(rows, "left"))
    batch = MimoSSMFeatureExtractor(2, padding_side="left")([np.ones((3, 2)), np.ones((1, 2))], return_tensors="np")
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]] and isinstance(batch["input_values"], np.ndarray)


@pytest.mark.parametrize("arguments", [{"mean": [0.0]}, {"std": [1.0, 0.0]}])
def test_wrong_statistics_are_refused(arguments):
    with pytest.raises(ValueError, match="must have feature_size = 2 entries, std positive"):
        MimoSSMFeatureExtractor(2, **arguments)


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"must have shape \(L, 2\); got \(5, 3\)"):
        MimoSSMFeatureExtractor(2)(np.zeros((5, 3)))


def test_predictions_in_the_datas_own_unit():
    extractor = MimoSSMFeatureExtractor(1, target_mean=[10.0], target_std=[2.0])
    assert extractor.denormalise(torch.ones(3, 1)).tolist() == [[12.0]] * 3
    assert extractor.denormalise(np.zeros((1, 1))).tolist() == [[10.0]]
    assert MimoSSMFeatureExtractor(1).denormalise(3.0) == 3.0


@pytest.mark.parametrize(
    "config, cls",
    [
        (
            MimoSSMConfig(num_channels=1, hidden_size=8, num_hidden_layers=1, state_sizes=4),
            MimoSSMForSequenceClassification,
        ),
        (
            CompreSSMMambaConfig(num_channels=1, hidden_size=8, num_hidden_layers=1, state_size=4),
            CompreSSMMambaForSequenceClassification,
        ),
    ],
)
def test_saved_with_a_model_and_one_channel_without_an_axis(tmp_path, config, cls):
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path)
    MimoSSMFeatureExtractor(1, mean=[3.0], std=[0.5], channels=["a"]).save_pretrained(tmp_path)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(extractor) is MimoSSMFeatureExtractor and extractor.mean == [3.0] and extractor.channels == ["a"]
    model = cls.from_pretrained(tmp_path).eval()
    values = extractor(np.linspace(0, 5, 12).reshape(2, 6))["input_values"]
    assert torch.equal(model(input_values=values[..., 0]).logits, model(input_values=values).logits)


LOADING = """
import torch
from transformers import AutoFeatureExtractor, AutoModelForSequenceClassification

extractor = AutoFeatureExtractor.from_pretrained("model", trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained("model", trust_remote_code=True).eval()
for each in (extractor, model):
    assert type(each).__module__.startswith("transformers_modules."), type(each)
values = torch.load("values.pt")
torch.save(model(**extractor(list(values))).logits, "logits.pt")
extractor.save_pretrained("again")
AutoFeatureExtractor.from_pretrained("again", trust_remote_code=True)
"""


@pytest.mark.slow
def test_it_travels_with_its_model(tmp_path):
    torch.manual_seed(0)
    config = MimoSSMConfig(num_channels=4, hidden_size=8, num_hidden_layers=1, state_sizes=4)
    model, values = MimoSSMForSequenceClassification(config).eval(), torch.randn(3, 6, 2)
    values[1, 2:4, 0] = NAN
    extractor = MimoSSMFeatureExtractor(2, mean=[1.0, 2.0], std=[0.5, 3.0], indicators=True)
    for each in (model, extractor):
        each.save_pretrained(tmp_path / "model")
    torch.save(values, tmp_path / "values.pt")
    run_without_the_package(LOADING, tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(**extractor(values)).logits)
    # What was saved there loads with the package too, as the package's own class.
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path / "again")) is MimoSSMFeatureExtractor


def test_its_code_is_pushed_and_that_of_a_derived_class_is_left_to_its_author(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(MimoSSMFeatureExtractor, "push_to_hub", lambda self, name, **k: pushed.append((name, k)))
    MimoSSMFeatureExtractor().save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/model", private=True)
    assert {path.name for path in tmp_path.iterdir()} == {"feature_extraction_mimo_ssm.py", "preprocessor_config.json"}
    assert pushed == [("someone/model", {"private": True})]

    class Mine(MimoSSMFeatureExtractor):
        pass

    Mine().save_pretrained(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["preprocessor_config.json"]


def test_it_goes_where_its_model_goes(tmp_path):
    config = MimoSSMConfig(num_channels=1, hidden_size=8, num_hidden_layers=1, state_sizes=4)
    MimoSSMForSequenceClassification(config).save_pretrained(tmp_path / "model")
    MimoSSMFeatureExtractor(1, mean=[3.0]).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "feature_extraction_mimo_ssm.py").unlink()  # as in folders of earlier versions
    model, shared, cut = (str(tmp_path / name) for name in ("model", "shared", "cut"))
    for words in (
        ["export", model, shared, "--to", "remote-code"],
        ["compress", model, "--output", cut, "--target", "2"],
    ):
        with pytest.raises(SystemExit, match="^0$"):
            main(words)
    for name in ("shared", "cut"):
        assert AutoFeatureExtractor.from_pretrained(tmp_path / name).mean == [3.0]
        assert (tmp_path / name / "feature_extraction_mimo_ssm.py").is_file()
