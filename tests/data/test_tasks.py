"""The registry: what `load_task` accepts, refuses and hands on."""

import pytest
from datasets import Dataset

from hf_compressm.data import Task, classification_metrics, load_task, register_task, task_names
from hf_compressm.data import task as registry


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))


def make_task(name: str, **model_kwargs) -> Task:
    data = Dataset.from_dict({"labels": [0, 1]})
    return Task(
        name=name,
        train=data,
        validation=data,
        test=data,
        model_kwargs=model_kwargs,
        compute_metrics=classification_metrics,
        metric_for_best_model="accuracy",
        problem="sequence_classification",
    )


def test_shipped_tasks_are_registered():
    assert {"digits", "smnist", "scifar"} <= set(task_names())


def test_unknown_name_lists_what_exists():
    with pytest.raises(ValueError, match=r"unknown task 'mnist'.*digits.*scifar.*smnist"):
        load_task("mnist")


def test_one_decorated_function_adds_a_task():
    @register_task("toy")
    def toy(*, data_dir=None, seed=7, length=3):
        return make_task("toy", data_dir=data_dir, seed=seed, length=length)

    assert load_task("toy").model_kwargs == {"data_dir": None, "seed": 0, "length": 3}
    given = load_task("toy", data_dir="here", seed=5, length=9).model_kwargs
    assert given == {"data_dir": "here", "seed": 5, "length": 9}
    assert "toy" in task_names()


def test_options_have_the_types_of_their_annotations():
    @register_task("typed")
    def typed(*, label: str | None = None, rate: float = 1.0, switch: bool = False, many: "list[str] | None" = None):
        return make_task("typed")

    for fine in ({"label": None}, {"rate": 2}, {"switch": True}, {"many": 3}):  # a list is for the task to check
        load_task("typed", **fine)
    for wrong, kinds in (({"label": 3}, "str or nothing"), ({"rate": "x"}, "float"), ({"switch": 1}, "bool")):
        with pytest.raises(ValueError, match=f"must be of type {kinds}; got"):
            load_task("typed", **wrong)


def test_what_is_no_task_is_refused():
    @register_task("nothing")
    def nothing():
        return None

    with pytest.raises(ValueError, match="task 'nothing' must return a Task; it returned a NoneType"):
        load_task("nothing")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'digits' is already registered"):
        register_task("digits")(make_task)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("digits", {"data_dir": "somewhere"}, "'digits' does not take data_dir; it takes: nothing"),
        ("smnist", {"lenght": 3}, "'smnist' does not take lenght; it takes: data_dir"),
    ],
)
def test_arguments_that_a_task_does_not_have_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task(name, **arguments)
