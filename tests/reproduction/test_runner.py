"""The runner: processes, what is done is not done again, failures, damaged files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from suites import METHODS, write_suite

from hf_compressm.reproduction.runner import Runner, append_record, current, read_records
from hf_compressm.reproduction.suite import jobs, load_suite
from hf_compressm.reproduction.summary import results_table

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reproduce.py"


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_suite_from_the_shell_and_again(tmp_path):
    # The second run asks for more states than there are, which only training can tell.
    methods = METHODS | {
        "too large": {"method": "compressed", "options": {"target_state_size": 99}},
        "lost": {"method": "scratch", "sizes_of": "too large"},
    }
    command = [
        sys.executable,
        str(SCRIPT),
        str(write_suite(tmp_path, methods)),
        "--workers",
        "2",
        "--threads",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "narrow, too large, seed 0: exit code 1" in done.stderr and "target_state_size is 99" in done.stderr
    assert "narrow, lost, seed 0: needs narrow, too large, seed 0, which failed" in done.stderr
    records = {record["method"]: record for record in read_records(tmp_path / "out" / "results.jsonl")}
    assert records.keys() == METHODS.keys()
    assert [records[name]["sizes"] for name in METHODS] == [[16], [4], [4]]
    assert records["small"]["cuts"] and not records["scratch"]["cuts"]
    assert all(0 <= record["score"] <= 1 and record["steps_per_second"] > 0 for record in records.values())
    assert str(tmp_path) not in json.dumps(records)
    assert "| small | " in done.stdout and (tmp_path / "out" / "table.md").read_text() in done.stdout
    assert (tmp_path / "out" / "narrow.svg").exists()

    suite = load_suite(write_suite(tmp_path, METHODS))
    runner = Runner(tmp_path / "out")
    runner.start = None  # nothing is left to be started
    runner.run(jobs(suite))
    assert not runner.failed and runner.done.keys() == {job.key for job in jobs(suite)}


def record_of(job, **rest):
    return {
        "task": job.task.name,
        "method": job.method.name,
        "seed": job.seed,
        "fingerprint": job.fingerprint(),
        **rest,
    }


class Instant(Runner):
    """Runs that are over at once, to test the order and the bookkeeping alone."""

    def start(self, job, slots):
        assert all(key in self.done for key in job.needs)
        self.started = [*getattr(self, "started", []), job.method.name]
        return record_of(job)


def test_a_line_cut_short_by_a_kill_is_run_again(tmp_path):
    found = jobs(load_suite(write_suite(tmp_path)))
    runner = Instant(tmp_path / "out", workers=2)
    runner.run(found)
    assert sorted(runner.started) == sorted(METHODS)
    with runner.results.open("r+") as file:
        file.truncate(len(file.read()) - 20)
    again = Instant(tmp_path / "out")
    again.run(found)
    assert again.started == [runner.started[-1]]
    assert len(read_records(again.results)) == len(METHODS)


def test_what_a_change_touches_is_run_again(tmp_path):
    Instant(tmp_path / "out").run(jobs(load_suite(write_suite(tmp_path))))
    changed = METHODS | {"small": {"method": "compressed", "options": {"target_state_size": 5}}}
    runner = Instant(tmp_path / "out")
    found = jobs(load_suite(write_suite(tmp_path, changed)))
    assert [r["method"] for r in current(read_records(runner.results), found)] == ["full"]
    runner.run(found)
    assert runner.started == ["small", "scratch"] and len(read_records(runner.results)) == 3


def test_a_damaged_results_file_is_refused_by_line(tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(path, {"task": "a", "method": "b", "seed": 0})
    path.write_text('{"task": 1}\n' + path.read_text())
    with pytest.raises(ValueError, match="line 1, is not a record"):
        read_records(path)
    with pytest.raises(ValueError, match="workers must be at least 1; got 0"):
        Runner(tmp_path, workers=0).run([])


def test_the_table(tmp_path):
    suite = load_suite(write_suite(tmp_path, seeds=2))
    environment = {
        "versions": {"torch": "2"},
        "hardware": {"processes": 1, "machine": "x", "cpu_cores": 2, "threads": 1},
    }
    records = [
        record_of(
            job,
            kind=job.method.kind,
            metric="accuracy",
            score=0.5 + 0.1 * job.seed,
            loss=1.0,
            sizes=[4, 8],
            seconds=10.0 if job.method.kind == "full" else 5.0,
            seconds_needed=10.0 if job.method.kind == "full" else 15.0,
            cuts=[],
            environment=environment,
        )
        for job in jobs(suite)
    ]
    table = results_table(suite, records)
    assert "| small | 55.00 ± 7.07 | 1.0000 ± 0.0000 | 6.0 | 5.0 | 0.50 | 1.50 | 2 |" in table
    assert table.count("Measured on") == 1 and "torch 2" in table
