"""Cards say what the run knows: own data are no data set of the hub, a cut after training is none of training."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from made_up_runs import cut, write_run
from selective_models import OWN, STOCK, make
from transformers import AutoModelForCausalLM

from hf_compressm.hub import Form, export
from hf_compressm.reduction import SizeConstraints
from hf_compressm.report import read_run, readdressed, render_card, render_report, write_card
from hf_compressm.runs.arguments import DataSource
from hf_compressm.runs.compression import CompressionJob, compress_saved_model
from hf_compressm.runs.description import public
from hf_compressm.runs.pretraining import parse_run, run_pretraining
from hf_compressm.surgery import Target


@pytest.fixture
def byte_model(tmp_path):
    """Function that saves a byte-level model and returns its folder."""

    def save(table=OWN):
        make(table, "mamba", vocab_size=256).save_pretrained(tmp_path / "trained")
        return tmp_path / "trained"

    return save


def cut_after_training(model: Path, tmp_path: Path, **options) -> Path:
    """The folder of a model that was cut by the command's own function."""
    (tmp_path / "corpus.txt").write_text("".join(f"value_{i % 7} = function({i})\n" for i in range(300)))
    data = DataSource(name=str(tmp_path / "corpus.txt"), batches=2, batch_size=2, length=32)
    job = {"policy": Target(3), "constraints": SizeConstraints(), "data": data, "refit_steps": 0, "device": "cpu"}
    compress_saved_model(CompressionJob(model=str(model), output=tmp_path / "cut", **(job | options)))
    return tmp_path / "cut"


@pytest.mark.slow
def test_own_data_are_not_named_as_those_of_the_hub(tmp_path):
    words = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    tokens = words.Tokenizer(words.models.WordLevel({"?": 0, "<eos>": 1, "a": 2, "b": 3}, "?"))
    tokens.pre_tokenizer = words.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="?", eos_token="<eos>").save_pretrained(tmp_path / "tok")
    (tmp_path / "private").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "private" / f"{split}-0.txt").write_text("a b b a\n" * 100)
    options = {"tokenizer": str(tmp_path / "tok"), "length": 16}
    model = {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    run = parse_run(
        [
            *("--task", "wikitext", "--data_dir", str(tmp_path / "private"), "--task_options", json.dumps(options)),
            *("--model_type", "compressm_mamba", "--model", json.dumps(model), "--output_dir", str(tmp_path / "run")),
            *("--max_steps", "2", "--cut_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true"),
        ]
    )
    run_pretraining(run)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.datasets is None and card.data.eval_results is None
    assert "local data, read as `wikitext`" in card.text and "Salesforce" not in card.content
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    task = facts["task"]
    assert task["local"] and task["tokenizer"] == {"name": "tok", "class": task["tokenizer"]["class"], "vocabulary": 4}
    assert task["data"]["data_dir"] == "private" and task["data"]["sequences"]["train"] > 0
    assert str(tmp_path) not in json.dumps(facts) + card.content


def test_a_hub_data_set_in_a_record_that_does_not_say_where_it_was_from_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", history=[cut(10, 16, 8)], model_type="compressm_mamba")
    task = {"name": "wikitext", "problem": "causal_lm", "hub_dataset": "Salesforce/wikitext"}
    (folder / "test_results.json").write_text(json.dumps({"test_loss": 1.0}))
    for local, named in ((None, False), (True, False), (False, True)):
        said = {} if local is None else {"local": local}
        (folder / "run.json").write_text(json.dumps({"task": task | said}))
        content = str(render_card(read_run(folder)))
        assert ("Salesforce" in content) == ("model-index" in content) == named


@pytest.mark.parametrize("table", [OWN, STOCK], ids=["own", "stock"])
@pytest.mark.parametrize("evaluate", [True, False])
def test_a_cut_of_a_trained_model_names_its_base_and_what_was_measured(tmp_path, byte_model, table, evaluate):
    folder = cut_after_training(byte_model(table), tmp_path, evaluate=evaluate)
    card = ModelCard.load(folder / "README.md")
    assert "cut from `trained`: 8 states per layer before the cut, 3 after it" in card.text
    assert ("| | before the cut | after the cut |" in card.text) == evaluate
    assert ("Nothing was measured after the cut." in card.text) != evaluate
    assert "| after training | 8 → 3 |" in card.text and card.data.base_model is None
    for claim in ("lost states", "not finished", "0 steps", "## Training", "It was trained", "Losses are"):
        assert claim not in card.text, claim
    record = json.loads((folder / "compression.json").read_text())
    assert record["settings"]["model"] == "trained" and record["settings"]["data"]["name"] == "corpus.txt"
    assert all(
        str(tmp_path) not in (folder / name).read_text() for name in ("compression.json", "run.json", "README.md")
    )


def test_a_cut_of_a_model_of_the_hub_names_it_in_the_metadata(tmp_path, byte_model):
    folder = cut_after_training(byte_model(), tmp_path)
    facts = json.loads((folder / "run.json").read_text())
    facts["base"] = {"name": "me/large", "on_hub": True}
    (folder / "run.json").write_text(json.dumps(facts))
    card = ModelCard.load(write_card(folder, tmp_path / "out"))
    assert card.data.base_model == "me/large" and "[me/large](https://huggingface.co/me/large)" in card.text


def test_a_model_with_nothing_but_a_history_is_not_called_unfinished(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mimo_ssm", "compression_history": [cut(5, 16, 8)]}))
    text = str(render_card(read_run(folder)))
    assert "not finished" not in text and "0 steps" not in text and "lost states while it trained" in text


@pytest.mark.parametrize("change", [{"selection": "random"}, {"policy": "score"}])
def test_states_that_were_not_ranked_are_not_said_to_be(tmp_path, change):
    for name, record in (("ranked", cut(5, 16, 8)), ("other", cut(5, 16, 8) | change)):
        text = str(render_card(read_run(write_run(tmp_path / name, history=[record]))))
        assert ("largest Hankel singular values, chosen" in text) == (name == "ranked")


def test_an_export_for_stock_transformers_has_its_own_advice_and_tag(tmp_path, byte_model):
    folder = cut_after_training(byte_model(), tmp_path, policy=Target(3.5))
    export(str(folder), tmp_path / "stock", Form.STOCK)
    card = ModelCard.load(tmp_path / "stock" / "README.md")
    assert "mamba" in card.data.tags and "compressm_mamba" not in card.content
    assert card.text.count("```python") == 1 and "trust_remote_code" not in card.text
    assert ("are padded to" in card.text) == (len(set(read_run(folder).sizes_after())) > 1)
    assert "cut from `trained`" in card.text and "## Limits" in card.text
    code = card.text.split("```python")[1].split("```")[0].replace('"cut"', repr(str(tmp_path / "stock")))
    names: dict = {}
    exec(code, names)  # the advice itself
    assert isinstance(names["model"], type(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")))


def test_a_card_by_another_hand_keeps_what_it_says(tmp_path):
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "state_size": 8, "num_hidden_layers": 2}
    for text in ("{}", "# Mine\n\nBy hand.\n", "---\ntags: compressm_mamba\n---\n", "---\n: [\n---\nx\n"):
        assert readdressed(text, config, "me/model", "compressm_mamba", [8, 4]) == text
    mine = "# Mine\n\n## How to load it\n\nold\n\n## Use\n\nmine\n"
    text = readdressed(mine, config, "me/model", "compressm_mamba", [8, 4])
    assert text.startswith("# Mine") and text.endswith("\n\n## Use\n\nmine\n") and "old" not in text
    assert 'AutoModelForCausalLM.from_pretrained("me/model")' in text and "padded to 8" in text


def test_paths_of_this_machine_stay_here(tmp_path):
    kept = ["gpt2", "Qwen/Qwen3-0.6B", 3, None, "wikitext-103-raw-v1"]
    assert public(kept) == kept
    assert public({"a": [str(tmp_path / "data"), "../x/y.txt", "/home/me/*.txt", "~/z"], "b": tmp_path}) == {
        "a": ["data", "y.txt", "*.txt", "z"],
        "b": tmp_path.name,
    }


def test_the_report_of_a_cut_after_training_says_what_it_is(tmp_path, byte_model):
    page = render_report(read_run(cut_after_training(byte_model(), tmp_path, evaluate=True)))
    assert "Cut from trained after its training" in page and "No log of the training" not in page
    assert "Scores on held-out data" in page and '<th scope="col">before the cut</th>' in page
    assert "Measurements: 1; the first after training of 8 states, the last after training of 8." in page
