"""Every method of a suite, run for a few steps in this process."""

import pytest
from suites import METHODS, write_suite

from hf_compressm.reproduction.dry_run import dry_suite
from hf_compressm.reproduction.methods import run_job
from hf_compressm.reproduction.suite import jobs, load_suite

RIVALS = {
    "distilled": {"method": "distillation", "sizes_of": "small", "teacher": "full", "alpha": 0.3, "temperature": 3.0},
    "regularised": {"method": "hankel_norm", "weight": 0.01, "sizes_of": "small"},
    "by LAST": {"method": "score", "score": "last", "sizes_of": "small", "cut_steps": [3]},
    "by AIRE": {"method": "score", "score": "aire", "sizes_of": "small"},
    "after": {"method": "after_training", "of": "full", "sizes_of": "small"},
    "after by AIRE": {"method": "after_training", "of": "full", "sizes_of": "small", "score": "aire"},
    "ranking": {"method": "rank_stability"},
    "scratch as regularised": {"method": "scratch", "sizes_of": "regularised"},
    "scratch as after": {"method": "scratch", "sizes_of": "after"},
}


def run_all(suite, folder):
    done = {}
    for job in jobs(suite):
        names = {key: name for key, name in job.method.arguments.items() if key in ("sizes_of", "teacher", "of")}
        needed = {key: done[name] | {"folder": str(folder / name)} for key, name in names.items()}
        (folder / job.method.name).mkdir(exist_ok=True, parents=True)
        done[job.method.name] = run_job(job, folder / job.method.name, needed)
    return done


@pytest.mark.slow
def test_every_kind(tmp_path):
    done = run_all(load_suite(write_suite(tmp_path, METHODS | RIVALS)), tmp_path)
    uncut = [name for name, record in done.items() if record["sizes"] != [4]]
    assert uncut == ["full", "ranking"]
    assert done["full"]["sizes"] == done["ranking"]["sizes"] == done["regularised"]["before_cut"]["sizes"] == [16]
    assert done["small"]["cuts"][-1]["loss_after"] != done["small"]["cuts"][-1]["loss_before"]
    assert [cut["step"] for cut in done["by AIRE"]["cuts"]] == [cut["step"] for cut in done["small"]["cuts"]]
    # The recorder measures, and changes nothing.
    assert done["ranking"]["score"] == done["full"]["score"] and done["ranking"]["loss"] == done["full"]["loss"]
    assert done["ranking"]["stability"]
    for name in ("distilled", "after"):
        assert done[name]["seconds_needed"] == pytest.approx(done[name]["seconds"] + done["full"]["seconds"])
    assert done["scratch"]["seconds_needed"] == done["scratch"]["seconds"]
    # Same initial weights, same data, other loss.
    assert done["distilled"]["loss"] != done["scratch"]["loss"]


@pytest.mark.slow
def test_stock_layers_with_matrix_valued_states(tmp_path):
    names = ("by LAST", "by AIRE", "after", "after by AIRE", "scratch as after")
    methods = METHODS | {name: RIVALS[name] for name in names}
    for name in names:
        methods[name] = {k: "drrqr" if k == "score" else v for k, v in methods[name].items()}
    model = {"hidden_size": 32, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    options = {"max_steps": 4, "window_start": 0.0, "multiple_of": 1, "model": model}
    options["task_options"] = {"num_train": 128, "num_validation": 8, "num_test": 8}
    done = run_all(load_suite(write_suite(tmp_path, methods, options, config="recall_qwen3_5")), tmp_path)
    assert all(record["sizes"] == [8 if name == "full" else 4] * 2 for name, record in done.items())


@pytest.mark.slow
def test_a_dry_run_takes_two_steps(tmp_path):
    methods = METHODS | {name: RIVALS[name] for name in ("by LAST", "ranking")}
    suite = dry_suite(load_suite(write_suite(tmp_path, methods, seeds=3)), tmp_path / "stand_ins")
    assert [job.method.name for job in jobs(suite)] == [*methods]
    done = run_all(suite, tmp_path)
    for name in ("small", "by LAST"):
        assert [cut["step"] for cut in done[name]["cuts"]] == [1], name
    assert done["scratch"]["sizes"] == done["small"]["sizes"]
