"""The callback inside an unmodified Trainer."""

import json
import math

import pytest
import torch
from datasets import IterableDataset
from helpers import arguments, small_data, small_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, state_sizes
from hf_compressm.surgery import find_mixers, history, short
from hf_compressm.training import create_optimizer


def make_trainer(folder, model=None, callback=None, callbacks=(), **settings):
    data = small_data()
    return Trainer(
        model=model or small_model(dropout=0.0),
        args=arguments(folder, **settings),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback or CompreSSMCallback(window_end=0.5, tau=0.2), *callbacks],
    )


class Events(TrainerCallback):
    """Records what trackers are handed."""

    def __init__(self):
        self.logs, self.sizes = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.sizes.append(sum(state_sizes(model)))


def test_a_run_shrinks_reports_and_saves(tmp_path, capsys):
    events = Events()
    trainer = make_trainer(tmp_path, callbacks=[events])
    held_before = list(trainer.model.parameters())
    trainer.train()
    model = trainer.model
    records = history(model)
    assert [record["step"] for record in records] == [s for s in (3, 5, 8, 10) if s in {r["step"] for r in records}]
    assert len(records) >= 2 and sum(state_sizes(model)) < 16
    assert events.sizes == sorted(events.sizes, reverse=True) and len(set(events.sizes)) == len(records) + 1

    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} != {id(p) for p in held_before}

    cut_logs = [log for log in events.logs if "compression/mean_state_size" in log]
    assert cut_logs[0]["compression/layer_0/state_size_before"] == 12
    assert cut_logs[0]["compression/layer_0/error_bound"] > 0 and cut_logs[0]["compression/seconds"] > 0
    assert any("compression/layer_1/singular_value_largest_removed" in entry for entry in trainer.state.log_history)

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[CompreSSM]")]
    assert len(lines) == 4 and "states [12, 12]" in lines[0] and "error bound" in lines[0]

    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert state_sizes(loaded) == state_sizes(model) and history(loaded) == [short(r) for r in records]


def test_the_log_keeps_the_loss_around_each_cut_and_spectra_where_none_was_made(tmp_path):
    """The logged loss is that of the very model and data, and measuring it changes nothing that training sees."""
    callback = CompreSSMCallback(tau=0.3, cut_steps=[11, 12], min_change=0.5, calibration_batches=8)
    trainer = make_trainer(tmp_path, model=small_model(dropout=0.3), callback=callback, max_steps=12, learning_rate=0.0)
    trainer.train()
    records = history(trainer.model)
    entry = next(entry for entry in trainer.state.log_history if "compression/loss_after" in entry)
    assert [record["step"] for record in records] == [entry["step"]] == [11]
    assert entry["compression/loss_after"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-4)  # all 64 items
    assert entry["compression/loss_before"] != entry["compression/loss_after"]
    assert entry["compression/steps_per_second_before"] > 0 and trainer.model.training is False
    (kept,) = [entry for entry in trainer.state.log_history if "compression/spectra" in entry]
    assert kept["step"] == 12 and [layer["states"] for layer in kept["compression/spectra"]] == state_sizes(
        trainer.model
    )
    again = json.loads(json.dumps(kept))["compression/spectra"][0]["singular_values"]
    assert again == sorted(again, reverse=True) and len(again) == state_sizes(trainer.model)[0]


def test_a_loss_that_cannot_be_had_is_left_out(tmp_path, caplog):
    class Odd(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if not torch.is_grad_enabled():
                raise ValueError("no loss today")
            return super().compute_loss(model, inputs, *args, **kwargs)

    callback = CompreSSMCallback(window_end=0.5, tau=0.2)
    trainer = Odd(small_model(), arguments(tmp_path), train_dataset=small_data(), callbacks=[callback])
    with caplog.at_level("WARNING"):
        trainer.train()
    assert sum(state_sizes(trainer.model)) < 24 and "not measured: no loss today" in caplog.text
    assert not any("compression/loss_before" in entry for entry in trainer.state.log_history)


def test_cut_logs_are_not_printed_but_reach_trackers(tmp_path, capsys):
    events = Events()
    make_trainer(tmp_path, callbacks=[events], logging_steps=5).train()
    printed = capsys.readouterr().out
    assert "'loss'" in printed and "compression/" not in printed
    assert any("compression/mean_state_size" in log for log in events.logs)


def test_cut_parameters_are_trained_on(tmp_path):
    class Watch(TrainerCallback):
        moved: set = set()

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 19:
                Watch.moved = {n for n, p in model.named_parameters() if not torch.equal(p, self.before[n])}

    trainer = make_trainer(tmp_path, callbacks=[Watch()], lr_scheduler_type="constant")
    trainer.train()
    assert Watch.moved == {name for name, _ in trainer.model.named_parameters()}


def test_an_own_group_for_state_space_parameters_survives_the_cut(tmp_path):
    model, args = small_model(), arguments(tmp_path, weight_decay=0.1)
    optimizer = create_optimizer(model, args, ssm_learning_rate=1e-4)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (1e-2, 0.1),
        (1e-2, 0.0),
        (1e-4, 0.0),
    ]
    trainer = Trainer(
        model,
        args,
        train_dataset=small_data(),
        optimizers=(optimizer, None),
        callbacks=[CompreSSMCallback(window_end=0.5)],
    )
    trainer.train()
    ssm = {id(p) for site in find_mixers(model) for p in site.parameters().values()}
    assert {id(p) for p in optimizer.param_groups[2]["params"]} == ssm
    with pytest.raises(ValueError, match="ssm_learning_rate must be positive"):
        create_optimizer(model, args, ssm_learning_rate=0)


def test_target_and_gradient_accumulation(tmp_path):
    callback = CompreSSMCallback(policy="target", target_state_size=3, window_end=0.5)
    trainer = make_trainer(tmp_path, callback=callback, gradient_accumulation_steps=2)
    trainer.train()
    assert sum(state_sizes(trainer.model)) == 6


def test_random_selection_repeats_and_leaves_the_global_generator_alone(tmp_path):
    def train(selection, seed=0):
        callback = CompreSSMCallback(
            policy="fraction", keep_fraction=0.5, selection=selection, selection_seed=seed, cut_steps=[4]
        )
        trainer = make_trainer(tmp_path, model=small_model(dropout=0.3), callback=callback)
        trainer.train()
        return torch.cat([p.flatten() for p in trainer.model.parameters()]), torch.rand(3)

    (one, draw_one), (two, draw_two), (other, _) = train("random"), train("random"), train("random", seed=1)
    largest, draw_largest = train("largest")
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(draw_one, draw_two) and torch.equal(draw_one, draw_largest) and len(largest) == len(one)


def test_nan_at_a_cut_skips_it_with_a_warning_and_goes_on(tmp_path, caplog):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    find_mixers(model)[0].mixer.C_re[0, 0] = math.nan

    trainer = make_trainer(tmp_path, callbacks=[Poison()])
    with caplog.at_level("WARNING"):
        trainer.train()
    assert trainer.state.global_step == 20 and state_sizes(trainer.model) == [12, 12]
    assert "Step 3: no cut" in caplog.text and "layers.0.mixer: " in caplog.text and "NaN" in caplog.text


class TestRollback:
    """A cut that hurts is undone at the next evaluation."""

    def train(self, folder, tolerance, greater=False, **settings):
        callback = CompreSSMCallback(
            policy="fraction",
            keep_fraction=0.3,
            cut_steps=[8, 14],
            rollback=True,
            rollback_tolerance=tolerance,
            rollback_greater_is_better=greater,
        )
        defaults = {"eval_strategy": "steps", "eval_steps": 4, "learning_rate": 3e-2, "max_steps": 24}
        trainer = make_trainer(folder, small_model(dropout=0.0), callback, **(defaults | settings))
        trainer.train()
        return trainer

    def test_a_cut_that_hurts_is_undone_and_none_follows(self, tmp_path, capsys):
        """The loss falls while training; told that higher is better, the callback sees it get worse."""
        trainer = self.train(tmp_path, tolerance=0.0, greater=True)
        events = [(record["event"], record["step"]) for record in history(trainer.model)]
        assert events == [("cut", 8), ("undo", 12)]
        assert state_sizes(trainer.model) == trainer.model.config.state_sizes == [12, 12]
        assert "undid the cut of step 8: eval_loss went from" in capsys.readouterr().out
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in trainer.model.parameters()}

    def test_a_tolerated_cut_stays(self, tmp_path):
        trainer = self.train(tmp_path, tolerance=10.0)
        assert [record["event"] for record in history(trainer.model)] == ["cut", "cut"]

    def test_it_needs_evaluation_and_a_metric_that_is_reported(self, tmp_path):
        with pytest.raises(ValueError, match="eval_strategy is 'no'"):
            self.train(tmp_path, 0.0, eval_strategy="no")
        callback = CompreSSMCallback(
            cut_steps=[6], policy="fraction", keep_fraction=0.5, rollback=True, rollback_metric="eval_f1"
        )
        trainer = make_trainer(tmp_path, callback=callback, eval_strategy="steps", eval_steps=4)
        with pytest.raises(ValueError, match="'eval_f1', which the evaluation does not report.*eval_loss"):
            trainer.train()


class TestStability:
    """The trigger that waits for the ranking of singular values to settle."""

    def test_it_cuts_once_when_settled(self, tmp_path):
        callback = CompreSSMCallback(
            trigger="stability",
            stability_interval=2,
            stability_patience=2,
            window_end=1.0,
            policy="fraction",
            keep_fraction=0.5,
            stability_threshold=0.5,
        )
        events = Events()
        trainer = make_trainer(tmp_path, callback=callback, callbacks=[events], learning_rate=1e-4)
        trainer.train()
        records = history(trainer.model)
        assert [record["step"] for record in records] == [6] and state_sizes(trainer.model) == [6, 6]
        scores = [log["compression/rank_stability"] for log in events.logs if "compression/rank_stability" in log]
        assert len(scores) == 2 and all(score >= 0.5 for score in scores)

    def test_it_says_so_when_the_ranking_never_settles(self, tmp_path, caplog):
        callback = CompreSSMCallback(trigger="stability", stability_interval=10, stability_patience=9, window_end=1.0)
        trainer = make_trainer(tmp_path, callback=callback)
        with caplog.at_level("WARNING"):
            trainer.train()
        assert state_sizes(trainer.model) == [12, 12] and "never settled" in caplog.text


class TestRefusals:
    """What cannot work stops before the first step."""

    def check(self, trainer, message, error=ValueError):
        with pytest.raises(error, match=message):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_a_model_without_compressible_layers(self, tmp_path):
        with pytest.raises(ValueError, match="no layer that can be compressed"):
            make_trainer(tmp_path, model=torch.nn.Linear(2, 2))

    def test_a_window_without_a_step(self, tmp_path):
        self.check(make_trainer(tmp_path, callback=CompreSSMCallback(), max_steps=5), "holds no step")

    def test_a_target_above_the_present_size(self, tmp_path):
        callback = CompreSSMCallback(policy="target", target_state_size=13, window_end=0.5)
        self.check(make_trainer(tmp_path, callback=callback), "target_state_size is 13, but the model has only 12")

    def test_a_minimum_above_the_present_size(self, tmp_path):
        callback = CompreSSMCallback(min_state_size=13, window_end=0.5)
        self.check(make_trainer(tmp_path, callback=callback), "min_state_size is 13")

    def test_uniform_with_uneven_layers(self, tmp_path):
        callback = CompreSSMCallback(uniform=True, window_end=0.5)
        self.check(make_trainer(tmp_path, small_model(state_sizes=[8, 9]), callback), "uniform=True needs")

    def test_a_frozen_parameter(self, tmp_path):
        model = small_model()
        find_mixers(model)[0].mixer.nu_log.requires_grad_(False)
        self.check(make_trainer(tmp_path, model), r"layers\.0\.mixer\.nu_log is frozen")

    def test_an_optimizer_whose_state_cannot_be_carried(self, tmp_path):
        model = small_model()
        trainer = Trainer(
            model,
            arguments(tmp_path),
            train_dataset=small_data(),
            callbacks=[CompreSSMCallback(window_end=0.5)],
            optimizers=(torch.optim.RMSprop(model.parameters()), None),
        )
        self.check(trainer, "RMSprop.*Supported optimizers", TypeError)

    def test_iterable_data_of_unknown_length(self, tmp_path):
        stream = IterableDataset.from_generator(lambda: iter(small_data()))
        with pytest.raises(ValueError, match="max_steps"):
            Trainer(
                small_model(),
                arguments(tmp_path, max_steps=-1),
                train_dataset=stream,
                callbacks=[CompreSSMCallback()],
            )

    def test_iterable_data_with_max_steps_works(self, tmp_path):
        stream = IterableDataset.from_generator(lambda: iter(list(small_data()) * 4))
        trainer = Trainer(
            small_model(),
            arguments(tmp_path),
            train_dataset=stream,
            callbacks=[CompreSSMCallback(window_end=0.5)],
        )
        trainer.train()
        assert sum(state_sizes(trainer.model)) < 24


def test_cuts_reach_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, report_to=["tensorboard"])
    trainer.train()
    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder)).Reload()
    sizes = [event.value for event in events.Scalars("train/compression/mean_state_size")]
    assert len(sizes) == 4 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 12
    assert "train/compression/layer_0/error_bound" in events.Tags()["scalars"]
    told = events.Tensors("compression/event/text_summary")
    texts = [event.tensor_proto.string_val[0].decode() for event in told]
    assert [event.step for event in told] == [record["step"] for record in history(trainer.model)]
    assert texts[0].startswith(f"Step {told[0].step}: states [12, 12] (mean 12.0) -> ")


def test_cuts_reach_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    trackio = pytest.importorskip("trackio")
    trainer = make_trainer(tmp_path, report_to=["trackio"], project="cuts", run_name="run")
    trainer.train()
    records = history(trainer.model)
    alerts = next(iter(trackio.Api().runs("cuts"))).alerts()
    assert sorted(alert["text"].split(":")[0] for alert in alerts) == sorted(f"Step {r['step']}" for r in records)
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("cuts", "run")
    sizes = {entry["train/global_step"]: entry.get("train/compression/mean_state_size") for entry in logs}
    assert all(sizes[r["step"]] == sum(layer["new_size"] for layer in r["layers"]) / 2 for r in records)


def test_a_model_loaded_from_a_compressed_checkpoint_resumes(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=12)
    trainer.train()
    folder = tmp_path / "checkpoint-12"
    again = make_trainer(tmp_path, model=AutoModelForSequenceClassification.from_pretrained(folder))
    again.train(resume_from_checkpoint=str(folder))
    assert history(again.model) == history(trainer.model) and state_sizes(again.model) == state_sizes(trainer.model)
