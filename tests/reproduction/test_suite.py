"""Suites from YAML: what is read, what is refused, and when a run counts as another one."""

from pathlib import Path

import pytest
import yaml
from suites import METHODS, RUNS, write_suite

from hf_compressm.reproduction.suite import as_record, from_record, jobs, load_suite, make_job_run, select

SUITES = sorted((Path(__file__).resolve().parents[2] / "configs" / "suites").glob("*.yaml"))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_shipped_suites_parse(path):
    suite = load_suite(path)
    assert suite.description and len(jobs(suite)) > 20
    others = {"language": set(), "linear_attention": {"distillation", "score", "after_training"}}
    rivals = others.get(path.stem, {"distillation", "hankel_norm"})
    assert {"full", "compressed", "scratch"} | rivals <= {job.method.kind for job in jobs(suite)}


def test_jobs_go_seed_by_seed_and_after_what_they_need(tmp_path):
    suite = load_suite(write_suite(tmp_path, seeds=2))
    found = [job.key for job in jobs(suite)]
    assert found == [("narrow", name, seed) for seed in (0, 1) for name in METHODS]
    assert jobs(suite)[2].needs == [("narrow", "small", 0)]
    for job in jobs(suite):
        assert from_record(as_record(job)) == job


def test_options_of_task_and_method_override_the_run_file(tmp_path):
    methods = METHODS | {
        "tau": {"method": "compressed", "options": {"policy": "energy", "target_state_size": None, "tau": 0.3}}
    }
    suite = load_suite(write_suite(tmp_path, methods))
    found = {job.method.name: make_job_run(job, tmp_path) for job in jobs(suite)}
    assert [found[name].arguments.compress for name in ("full", "small", "scratch", "tau")] == [
        False,
        True,
        False,
        True,
    ]
    assert found["small"].compression.target_state_size == 4 and found["full"].compression.target_state_size == 6
    assert found["tau"].compression.target_state_size is None and found["tau"].compression.tau == 0.3
    assert found["full"].model == {"hidden_size": 8, "num_hidden_layers": 1, "state_sizes": 16} | {
        key: found["full"].model[key] for key in ("norm", "r_min", "r_max", "dropout")
    }
    with_sizes = make_job_run(jobs(suite)[2], tmp_path, {"state_sizes": [3]})
    assert with_sizes.model["state_sizes"] == [3] and with_sizes.training.max_steps == 20


def test_the_fingerprint_follows_what_decides_the_outcome_and_nothing_else(tmp_path):
    def fingerprints(**changes):
        return {job.method.name: job.fingerprint() for job in jobs(load_suite(write_suite(tmp_path, **changes)))}

    first = fingerprints()
    assert first == fingerprints(description="other words")
    assert len(set(first.values())) == len(METHODS)
    assert not set(first.values()) & set(fingerprints(options={"max_steps": 21}).values())
    other = fingerprints(methods=METHODS | {"small": {"method": "compressed", "options": {"target_state_size": 5}}})
    assert first["full"] == other["full"]
    assert first["small"] != other["small"] and first["scratch"] != other["scratch"]


def test_a_part_of_a_suite_keeps_what_it_needs(tmp_path):
    suite = load_suite(write_suite(tmp_path, seeds=3))
    part = select(suite, methods=["scratch"], seeds=2, data={"narrow": "folder"})
    assert [job.key[1:] for job in jobs(part)] == [("small", 0), ("scratch", 0), ("small", 1), ("scratch", 1)]
    assert part.tasks[0].options["data_dir"] == "folder"
    with pytest.raises(ValueError, match="'narow'; did you mean 'narrow'"):
        select(suite, tasks=["narow"])
    with pytest.raises(ValueError, match="seeds must be an integer >= 1; got 0"):
        select(suite, seeds=0)


BAD = {
    "unknown key": ({"seedz": 1}, "unknown key 'seedz'; did you mean 'seeds'"),
    "no tasks": ({"tasks": {}}, "has no tasks"),
    "seeds": ({"seeds": 0}, "seeds must be an integer >= 1; got 0"),
    "no config": ({"tasks": {"a": {"methods": METHODS}}}, "a needs `config`"),
    "no methods": ({"tasks": {"a": {"config": str(RUNS / "digits_narrow.yaml")}}}, "a has no methods"),
    "kind": ({"full": {"method": "ful"}}, "method must be one of full, compressed.*; got 'ful'"),
    "missing": ({"full": METHODS["full"], "s": {"method": "scratch"}}, "method scratch needs sizes_of"),
    "argument": ({"full": {"method": "full", "alpha": 1}}, "unknown key 'alpha'"),
    "reference": ({"s": {"method": "scratch", "sizes_of": "small"}}, "needs 'small', which is no method further up"),
    "fewer seeds": (
        {"small": METHODS["small"] | {"seeds": 1}, "s": {"method": "scratch", "sizes_of": "small", "seeds": 2}},
        "has 2 seeds, but 'small', which it needs, has 1",
    ),
    "option": ({"full": {"method": "full", "options": {"taw": 1}}}, "full: .*unknown option 'taw'"),
    "value": ({"full": {"method": "full", "options": {"learning_rate": -1}}}, "learning_rate must be at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_suites_are_refused_with_the_place(tmp_path, name):
    change, message = BAD[name]
    path = write_suite(tmp_path)
    content = yaml.safe_load(path.read_text())
    if change.keys() & {"seedz", "tasks", "seeds"}:
        content |= change
    else:
        content["tasks"]["narrow"]["methods"] = change
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match=message) as error:
        load_suite(path)
    assert "tiny.yaml" in str(error.value)
