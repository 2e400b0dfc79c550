"""The model card: its metadata and figures come from the run's files, and nothing else is claimed."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from made_up_runs import cut, write_run
from transformers import Trainer
from typer.testing import CliRunner

from hf_compressm import cli
from hf_compressm.report import keep_card, read_run, render_card, write_card
from hf_compressm.runs.pretraining import build_model, build_trainer, parse_run

ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "task": {"name": "wikitext", "problem": "causal_lm", "input": "tokens", "options": {"length": 64}},
    "training": {"seed": 3, "learning_rate": 0.1},
    "hardware": {"processes": 2, "gpus": ["NVIDIA H100", "NVIDIA H100"]},
    "versions": {"torch": "2.13.0"},
}


def described(folder: Path, model_type: str, **task) -> Path:
    """A made-up run with cuts, test results and facts."""
    write_run(folder, history=[cut(10, 16, 8)], model_type=model_type, step=100, max_steps=100)
    (folder / "run.json").write_text(json.dumps(RUN | {"task": RUN["task"] | task}))
    (folder / "test_results.json").write_text(
        json.dumps({"test_loss": 1.25, "test_perplexity": 3.49, "test_runtime": 7.5, "test_samples_per_second": 9.0})
    )
    (folder / "train_results.json").write_text(json.dumps({"train_runtime": 65.0}))
    return folder


def test_a_run_writes_its_card(finished_run):
    card = ModelCard.load(finished_run / "README.md")
    tested = json.loads((finished_run / "test_results.json").read_text())
    compression = json.loads((finished_run / "compression.json").read_text())
    facts = json.loads((finished_run / "run.json").read_text())
    data = card.data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-classification"
    assert data.metrics == ["accuracy"] and data.datasets is None and data.base_model is None
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == {"accuracy", "loss"}
    for key, result in results.items():
        assert result.metric_value == pytest.approx(tested[f"test_{key}"], abs=1e-6)
        assert (result.dataset_name, result.dataset_split) == ("digits", "test")
    for index, (before, after) in enumerate(zip(compression["sizes_before"], compression["sizes_after"], strict=True)):
        assert f"| `backbone.layers.{index}.mixer` | {before} | {after} |" in card.text
    assert f"{facts['parameters_before']:,} parameters at the start" in card.text
    assert facts["versions"]["torch"] in card.text and "24 optimizer steps" in card.text
    assert f"]({'singular_values.svg'})" in card.text and (finished_run / "singular_values.svg").exists()
    assert "nan" not in card.text.lower().split() and "None" not in card.text and "{{" not in card.text
    assert str(finished_run) not in card.content and str(finished_run.parent) not in card.content
    assert not re.search(r"\n{3,}", card.text)


def test_code_in_a_card_compiles_and_names_the_model(finished_run):
    text = ModelCard.load(write_card(finished_run, finished_run.parent / "named", name="me/tiny")).text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2 and all('from_pretrained("me/tiny"' in block for block in blocks)
    for block in blocks:
        compile(block, "card", "exec")
    assert "trust_remote_code=True" in blocks[1]


@pytest.mark.parametrize(
    ("model_type", "ways"),
    [
        ("compressm_gated_deltanet", 2),
        ("compressm_minimax", 2),
        ("compressm_mamba", 3),
        ("compressm_mamba2", 2),
        ("mimo_ssm", 2),
        ("mamba", 1),
    ],
)
def test_the_ways_to_load_depend_on_the_architecture(tmp_path, model_type, ways):
    text = str(render_card(read_run(described(tmp_path / "run", model_type))))
    assert text.count("```python") == ways and ("to_stock" in text) == (model_type == "compressm_mamba")
    assert text.count("AutoModelForCausalLM.from_pretrained") == min(ways, 2)


def test_what_the_hub_knows_is_named_for_it(tmp_path):
    run = read_run(described(tmp_path / "run", "compressm_mamba", hub_dataset="Salesforce/wikitext", local=False))
    card = render_card(run, name="me/model", base_model="state-spaces/mamba-130m-hf", plot="plot.svg")
    data = card.data.to_dict()
    assert data["datasets"] == ["Salesforce/wikitext"] and data["base_model"] == "state-spaces/mamba-130m-hf"
    assert data["metrics"] == ["perplexity"] and data["pipeline_tag"] == "text-generation"
    assert data["model-index"][0]["name"] == "model"
    assert {metric["type"] for metric in data["model-index"][0]["results"][0]["metrics"]} == {"loss", "perplexity"}
    assert "2 processes on 2 x NVIDIA H100" in card.text and "1 min 5 s" in card.text and "seed 3" in card.text


def test_full_size_is_compared_where_it_is_known(tmp_path):
    small, full = described(tmp_path / "small", "mimo_ssm"), write_run(tmp_path / "full", state_sizes=[16, 16])
    (full / "run.json").write_text(json.dumps(RUN))
    (full / "test_results.json").write_text(json.dumps({"test_loss": 1.125}))
    done = CliRunner().invoke(cli.app, ["card", str(small), "-o", str(tmp_path / "out"), "--full-size", str(full)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| loss | 1.2500 | 1.1250 |" in text and "| perplexity | 3.4900 |  |" in text
    assert "| states per layer | 8 | 16 |" in text and "not measured here" not in text
    (full / "run.json").write_text(json.dumps(RUN | {"task": {"name": "mqar"}}))
    with pytest.raises(ValueError, match="do not compare"):
        write_card(small, tmp_path / "out", full_size=full)


def test_what_was_not_recorded_is_left_out(tmp_path):
    text = str(render_card(read_run(write_run(tmp_path / "bare", step=5, max_steps=10, history=[cut(2, 8, 4)]))))
    assert "Training was not finished" in text and "after 5 of 10 steps" in text
    for absent in (
        "## Results",
        "model-index",
        "Hardware",
        "training time",
        "None",
        "seed",
        "per second",
        "Loss before",
    ):
        assert absent not in text


def test_jinja_in_a_run_is_text(tmp_path):
    record = cut(2, 8, 4)
    record["layers"][0]["name"] = "{{ 7 * 7 }}{% raw %}"
    assert "{{ 7 * 7 }}" in str(render_card(read_run(write_run(tmp_path / "odd", history=[record]))))


def test_the_trainers_own_card_does_not_replace_it(tmp_path):
    config = ROOT / "configs" / "runs" / "digits_narrow.yaml"
    run = parse_run([str(config), "--output_dir", str(tmp_path), "--use_cpu", "true", "--max_steps", "10"])
    task = pytest.importorskip("hf_compressm.data").load_task("digits")
    trainer, _ = build_trainer(run, task, build_model(run, task))
    assert type(trainer) is Trainer
    keep_card(trainer)
    trainer.save_model()
    trainer.create_model_card(model_name="tiny", tags=["x"])  # as push_to_hub calls it
    text = (tmp_path / "README.md").read_text()
    assert "# tiny" in text and "generated automatically" not in text


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*/README.md")), ids=lambda path: path.parent.name)
def test_shipped_cards_are_whole(path):
    card = ModelCard.load(path)
    assert card.data.eval_results and "## How to load it" in card.text
    for image in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card.text):
        assert (path.parent / image).read_text().startswith("<svg")
