"""Adapters that are trained across cuts: nothing freezes silently, the base does, checkpoints go on."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import arguments, small_data, small_model
from lora_models import BATCHES, KINDS, METHODS, adapted, config, logits
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, compress, save_base_model, state_sizes
from hf_compressm.surgery import Snapshot, history

CUT = 3
TOKENS = Dataset.from_dict({"input_ids": BATCHES[0]["input_ids"].tolist()}).map(
    lambda row: {"labels": row["input_ids"]}
)


class Watch(TrainerCallback):
    """Copies the model and its moments right before and after the step of the cut, and after the last step."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step in (CUT, CUT + 2):
            moments = {n: optimizer.state[p] for n, p in model.named_parameters() if p.requires_grad}
            self.seen[state.global_step] = copy.deepcopy((dict(model.named_parameters()), moments))


def trainer(folder, model, callbacks=(), callback=None, **settings):
    callback = callback or CompreSSMCallback(cut_steps=[CUT], policy="fraction", keep_fraction=0.5, refit_steps=5)
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 2}
    return Trainer(
        model,
        arguments(folder, **(options | settings)),
        train_dataset=TOKENS.with_format("torch"),
        eval_dataset=TOKENS.with_format("torch"),
        callbacks=[callback, *callbacks],
    )


def causal(kind, method="lora"):
    return adapted(kind, task_type="CAUSAL_LM", **METHODS[method]).train()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["own-mamba", "own-mamba2", "mamba", "mamba2"])
def test_adapters_go_on_training_after_a_cut(tmp_path, kind, method):
    model, watch = causal(kind, method), Watch()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trainer(tmp_path, model, [watch]).train()
    assert max(state_sizes(model)) == 4 and len(history(model)) == 1
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names
    assert all("lora_" in name for name in names)
    (after_cut, moments), (later, later_moments) = watch.seen[CUT], watch.seen[CUT + 2]
    for name, parameter in later.items():
        moved = not torch.equal(parameter, after_cut[name])
        assert moved == (name in names), name
    for name in names:
        assert moments[name]["exp_avg"].shape == after_cut[name].shape
        assert float(moments[name]["step"]) == CUT and float(later_moments[name]["step"]) == CUT + 2
        assert moments[name]["exp_avg"].abs().sum() > 0 and (moments[name]["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_moments_of_lora_matrices_follow_their_gradients(method):
    """Redundant states are removed: the gradient of the smaller layer is what carrying the gradient gives."""
    model = adapted("own-mamba", **METHODS[method])
    mixers = [layer.mixer for layer in model.base_model.model.backbone.layers]
    with torch.no_grad():
        for mixer in mixers:  # states 4 to 7 do what 0 to 3 do
            rank, layer = mixer.dt_proj.weight.shape[1], mixer.x_proj
            mixer.A_log[:, 4:] = mixer.A_log[:, :4]
            rows = [layer.base_layer.weight, layer.lora_B["default"].weight]
            rows += [m.weight for m in layer.lora_magnitude_vector.values()]
            for part in rows:
                part[rank + 4 : rank + 8] = part[rank : rank + 4]
    batch = BATCHES[0] | {"labels": BATCHES[0]["input_ids"]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=1.0)
    model(**batch).loss.backward()
    optimizer.step()
    compress(model, BATCHES, target=4, optimizer=optimizer, refit_steps=0)
    optimizer.zero_grad()
    model(**batch).loss.backward()
    for mixer in mixers:
        rank = mixer.dt_proj.weight.shape[1]
        parameter = mixer.x_proj.lora_B["default"].weight
        carried, wanted = optimizer.state[parameter]["momentum_buffer"], parameter.grad
        # B's rows; those of C and of the time step are exact too, B's need the folded read-out.
        assert torch.allclose(carried[: rank + 4], wanted[: rank + 4], rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["own-mamba", "mamba2", "own-mamba2"])
def test_a_cut_can_be_undone(kind):
    model = adapted(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    optimizer.step()
    before, kept = logits(model), copy.deepcopy(optimizer.state_dict())
    snapshot = Snapshot.take(model, optimizer)
    compress(model, BATCHES, target=4, optimizer=optimizer, refit_steps=0)
    snapshot.restore(model, optimizer)
    assert state_sizes(model) == [8, 8, 8] and torch.equal(logits(model), before)
    for index, state in kept["state"].items():
        assert torch.equal(optimizer.state_dict()["state"][index]["exp_avg"], state["exp_avg"])
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)


def test_rollback_in_training(tmp_path):
    callback = CompreSSMCallback(
        cut_steps=[CUT],
        policy="fraction",
        keep_fraction=0.2,
        refit_steps=0,
        rollback=True,
        rollback_metric="eval_accuracy",
        rollback_greater_is_better=True,
    )
    model, scores = causal("own-mamba"), iter([1.0, 1.0, 0.0, 0.0, 0.0])
    run = trainer(tmp_path, model, callback=callback, eval_on_start=True)
    run.compute_metrics = lambda prediction: {"accuracy": next(scores)}
    run.train()
    assert [record["event"] for record in history(model)] == ["cut", "undo"] and state_sizes(model) == [8, 8, 8]


@pytest.mark.parametrize("kind", ["own-mamba", "own-mamba2", "mamba2"])
def test_resuming_across_a_cut_from_a_model_of_the_first_size(tmp_path, kind):
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path / "run", causal(kind), **saving).train()
    model = causal(kind)
    trainer(tmp_path / "again", model, **saving).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert len(history(model)) == 1 and max(state_sizes(model)) == 4
    ends = [tmp_path / run / "checkpoint-6" for run in ("run", "again")]
    one, two = (load_file(end / "adapter_model.safetensors") for end in ends)
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
    one, two = (load_file(end / "compression_state.safetensors") for end in ends)
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_resuming_without_the_base_is_refused(tmp_path):
    trainer(tmp_path, causal("own-mamba"), save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-4" / "compression_state.safetensors").unlink()
    with pytest.raises(ValueError, match="not the weights that they belong to"):
        trainer(tmp_path, causal("own-mamba")).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("greater", [True, False])
def test_the_best_model_brings_its_base_back(tmp_path, greater):
    model = causal("mamba")
    run = trainer(
        tmp_path,
        model,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=greater,  # the first or the last evaluation, before or after the cut
    )
    run.train()
    assert state_sizes(model) == [8 if run.state.best_global_step < CUT else 4] * 3
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["own-mamba", "own-mamba2", "mamba", "mamba2-bias"])
def test_saving_and_loading_at_the_new_size(tmp_path, kind, method):
    model = adapted(kind, task_type="CAUSAL_LM", target_modules=["in_proj", "x_proj"], **METHODS[method])
    compress(model, BATCHES, target=4, refit_steps=5)
    save_base_model(model, tmp_path / "base")
    model.save_pretrained(tmp_path / "lora")
    wanted = logits(model)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert state_sizes(loaded) == state_sizes(model) and torch.allclose(logits(loaded.eval()), wanted, atol=1e-5)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    merged = again.eval().merge_and_unload()
    assert torch.allclose(logits(merged), wanted, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), wanted, atol=1e-4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        if kind == "own-mamba2":
            pytest.skip("its projections keep their rows")
        PeftModel.from_pretrained(KINDS[kind](), tmp_path / "lora")


def test_a_classifier_whose_layers_have_no_lora_on_them(tmp_path):
    model = get_peft_model(small_model(), config(target_modules=["embeddings", "out_proj"], task_type="SEQ_CLS"))
    run = Trainer(
        model,
        arguments(tmp_path, max_steps=6),
        train_dataset=small_data(),
        callbacks=[CompreSSMCallback(cut_steps=[CUT], policy="fraction", keep_fraction=0.5)],
    )
    run.train()
    assert state_sizes(model) == [6, 6]
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "nu_log" in name)
