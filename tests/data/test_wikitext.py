"""wikitext from local files like the hub's with a tokenizer made here, and the errors without files or hub."""

import math

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from programs import go_offline
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import EvalPrediction, PreTrainedTokenizerFast

from hf_compressm.data import load_task
from hf_compressm.data.wikitext import ROWS, TITLE
from hf_compressm.runs.pretraining import parse_run, run_pretraining

SPLITS = ("train", "validation", "test")
EOS, UNKNOWN = 0, 1
WORDS = ["<eos>", "<unk>", "\n", "=", *(f"w{number}" for number in range(30))]
IDS = {word: number for number, word in enumerate(WORDS)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """The folder of a tokenizer whose tokens are words, signs and line breaks."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token="<eos>", unk_token="<unk>")


def save_tokenizer(folder, words=IDS, **special) -> str:
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n"), "isolated")]
    )
    PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)
    return str(folder)


def article(rng, paragraphs: int = 6) -> list[str]:
    """Rows as in the data set: a title, and paragraphs under headings, between empty rows."""
    rows = ["", " = w0 w1 = \n", ""]
    for _ in range(paragraphs):
        words = " ".join(f"w{number}" for number in rng.integers(2, 30, 20))
        rows += [" = = w2 = = \n", "", f" {words} \n", ""]
    return rows


def write_folder(folder, articles=(8, 2, 3), column="text", ending=".parquet") -> dict[str, list[str]]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = {split: sum((article(rng) for _ in range(n)), []) for split, n in zip(SPLITS, articles, strict=True)}
    for split in SPLITS:
        if ending == ".parquet":
            parquet.write_table(pyarrow.table({column: rows[split]}), folder / f"{split}-00000-of-00001.parquet")
        else:
            # As in the data set, an empty line is an empty row, which leaves no token
            (folder / f"{split}.txt").write_text("".join(rows[split]))
    return rows


def expected_stream(rows: list[str]) -> list[int]:
    stream = []
    for row in rows:
        is_title = row.startswith(" = ") and not row.startswith(" = = ")
        stream += [EOS] if is_title else []
        stream += [IDS[word] for word in row.replace("\n", " \n ").split(" ") if word]
    return stream


@pytest.mark.parametrize("ending", [".parquet", ".txt"])
def test_splits_are_the_articles_one_after_the_other(tmp_path, tokenizer, ending):
    rows = write_folder(tmp_path / "data", ending=ending)
    task = load_task("wikitext", data_dir=tmp_path / "data", tokenizer=tokenizer, length=16)
    for split, articles in zip(SPLITS, (8, 2, 3), strict=True):
        stream = expected_stream(rows[split])
        batch = getattr(task, split)[:]
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["input_ids"].shape == (len(stream) // 16, 16) and torch.equal(batch["input_ids"], batch["labels"])
        assert batch["input_ids"].flatten().tolist() == stream[: len(stream) // 16 * 16]
        assert (batch["input_ids"] == EOS).sum() == articles and (batch["input_ids"] != UNKNOWN).all()


def test_ids_beyond_16_bits_survive(tmp_path):
    folder = save_tokenizer(
        tmp_path / "tokenizer", IDS | {"w2": 70_000}, eos_token="<eos>", unk_token="<unk>", pad_token="w3"
    )
    write_folder(tmp_path / "data")
    task = load_task("wikitext", data_dir=tmp_path / "data", tokenizer=folder, length=16)
    assert task.test[:]["input_ids"].max() == 70_000 and task.model_kwargs["vocab_size"] == 70_001


def test_the_folder_of_the_hub_with_both_configs(tmp_path, tokenizer):
    sizes = {"wikitext-2-raw-v1": (1, 1, 1), "wikitext-103-raw-v1": (5, 1, 1)}
    for config, articles in sizes.items():
        write_folder(tmp_path / "data" / config, articles)
    found = {
        config: len(
            load_task("wikitext", data_dir=tmp_path / "data", config=config, tokenizer=tokenizer, length=8).train
        )
        for config in sizes
    }
    assert found["wikitext-103-raw-v1"] > 4 * found["wikitext-2-raw-v1"]


def test_long_splits_are_packed_in_groups(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("hf_compressm.data.wikitext.ROWS", 10)
    rows = write_folder(tmp_path / "data")["train"]
    assert ROWS == 10_000
    train = load_task("wikitext", data_dir=tmp_path / "data", tokenizer=tokenizer, length=16).train
    groups = [expected_stream(rows[start : start + 10]) for start in range(0, len(rows), 10)]
    kept = [token for group in groups for token in group[: len(group) // 16 * 16]]
    assert train[:]["input_ids"].flatten().tolist() == kept


@pytest.mark.parametrize(
    "row, is_title",
    [
        (" = Valkyria Chronicles III = \n", True),
        (" = 2011 – 12 season = \n", True),
        (" = = Gameplay = = \n", False),
        (" = = = Downloadable content = = = \n", False),
        (" The value = 3 = \n", False),
        ("", False),
        (" = unfinished \n", False),
    ],
)
def test_titles(row, is_title):
    assert bool(TITLE.fullmatch(row)) == is_title


def test_the_second_load_reads_the_cache(tmp_path, tokenizer, monkeypatch):
    write_folder(tmp_path / "data")
    options = {"data_dir": tmp_path / "data", "tokenizer": tokenizer, "length": 16}
    first = load_task("wikitext", **options).train[:]["input_ids"]
    # A call of the tokenizer would fail now; replacing `_pack` itself would change what the cache is looked up by.
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", None)
    assert torch.equal(load_task("wikitext", **options).train[:]["input_ids"], first)
    with pytest.raises(TypeError):
        load_task("wikitext", **(options | {"length": 17}))


def test_model_kwargs_and_choices(tmp_path, tokenizer):
    write_folder(tmp_path / "data")
    task = load_task("wikitext", data_dir=tmp_path / "data", tokenizer=tokenizer, length=16)
    assert task.model_kwargs == {
        "vocab_size": len(WORDS),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    assert (task.problem, task.metric_for_best_model, task.greater_is_better) == ("causal_lm", "nats_per_token", False)


def test_metrics_of_a_uniform_guess(tmp_path, tokenizer):
    write_folder(tmp_path / "data")
    task = load_task("wikitext", data_dir=tmp_path / "data", tokenizer=tokenizer, length=16)
    labels = task.test[:]["labels"]
    scores = task.preprocess_logits_for_metrics(torch.zeros(*labels.shape, len(WORDS)), labels)
    found = task.compute_metrics(EvalPrediction(scores.numpy(), labels.numpy()))
    # float32 holds 7 digits
    assert found["nats_per_token"] == pytest.approx(math.log(len(WORDS)), rel=1e-6)
    assert found["perplexity"] == pytest.approx(len(WORDS), rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"config": "wikitext-2"}, "wikitext-2-raw-v1, wikitext-103-raw-v1.*got 'wikitext-2'"),
        ({"length": 1}, "length at least 2; got .* and 1"),
        ({"length": 5000}, "'train'.*too few tokens for one sequence of 5000; choose a smaller length"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, tokenizer, options, message):
    write_folder(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        load_task("wikitext", data_dir=tmp_path / "data", tokenizer=tokenizer, **options)


def test_missing_columns_splits_and_mixed_files_are_named(tmp_path, tokenizer):
    write_folder(tmp_path / "a", column="page")
    with pytest.raises(ValueError, match=r"'train'.*no column \['text'\].*\['page'\]"):
        load_task("wikitext", data_dir=tmp_path / "a", tokenizer=tokenizer)
    write_folder(tmp_path / "b")
    (tmp_path / "b" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"validation-\*\.parquet.*or.*\.txt.*found \['test', 'train'\]"):
        load_task("wikitext", data_dir=tmp_path / "b", tokenizer=tokenizer)
    (tmp_path / "b" / "validation.txt").write_text(" = w0 = \n")
    with pytest.raises(ValueError, match=r"end in \.parquet and \.txt; keep one kind"):
        load_task("wikitext", data_dir=tmp_path / "b", tokenizer=tokenizer)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    folder = save_tokenizer(tmp_path / "tokenizer", unk_token="<unk>")
    with pytest.raises(ValueError, match="has no EOS token.*set its eos_token"):
        load_task("wikitext", data_dir=tmp_path, tokenizer=folder)


def test_without_the_hub_the_errors_say_what_to_do(tmp_path, tokenizer, monkeypatch):
    go_offline(monkeypatch, tmp_path)
    with pytest.raises(ConnectionError) as raised:
        load_task("wikitext")
    assert isinstance(raised.value.__cause__, OSError)
    for part in ("tokenizer 'gpt2'", "`tokenizer`", "save_pretrained", "HF_HOME"):
        assert part in str(raised.value)
    with pytest.raises(ConnectionError) as raised:
        load_task("wikitext", tokenizer=tokenizer)
    of_data = str(raised.value)
    for part in ("Salesforce/wikitext", "--data_dir", *(f"{split}-*.parquet" for split in SPLITS), "'text'", "HF_HOME"):
        assert part in of_data


MODELS = {
    "mimo_ssm": "{hidden_size: 8, num_hidden_layers: 2, state_sizes: 12, r_min: 0.5}",
    "compressm_mamba": "{hidden_size: 8, num_hidden_layers: 2, state_size: 12}",
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODELS)
def test_a_short_run(tmp_path, tokenizer, model_type):
    write_folder(tmp_path / "data")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"task: wikitext\ndata_dir: {tmp_path / 'data'}\ntask_options: {{tokenizer: {tokenizer}, length: 32}}\n"
        f"model_type: {model_type}\nmodel: {MODELS[model_type]}\noutput_dir: {tmp_path / 'out'}\nmax_steps: 12\n"
        "per_device_train_batch_size: 8\nreport_to: none\nsave_strategy: 'no'\nuse_cpu: true\ndisable_tqdm: true\n"
        "policy: target\ntarget_state_size: 5\nwindow_end: 0.5\n"
    )
    result = run_pretraining(parse_run([str(file)]))
    assert result.sizes_before == [12, 12] and sum(result.sizes_after) <= 10
    assert result.metrics["test_perplexity"] == pytest.approx(math.exp(result.metrics["test_nats_per_token"]))
    # Trainer's loss is a mean over batches of equal size but the last
    assert result.metrics["test_nats_per_token"] == pytest.approx(result.metrics["test_loss"], rel=0.02)
