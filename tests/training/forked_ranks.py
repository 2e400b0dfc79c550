"""Run programs on several ranks, as forks of one process that has imported everything, since importing takes longest.

Started as a program this is that process: it reads jobs in JSON, one a line, and answers each with an exit code.
"""

import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def run_ranks(processes, program, *arguments, environment=None, timeout=600):
    """What a program prints that runs, with these arguments, in so many processes, as torchrun starts them.

    Raises:
        AssertionError: with what it prints, if it fails or takes longer than `timeout` seconds.
    """
    file, log = tempfile.mkstemp(suffix=".log")
    os.close(file)
    job = {"processes": processes, "words": [str(program), *map(str, arguments)], "log": log, "timeout": timeout}
    server = _server()
    server.stdin.write(json.dumps(job | {"environment": dict(environment or os.environ)}) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    output = Path(log).read_text()
    Path(log).unlink()
    assert answer.strip() == "0", f"{answer}: {output[-6000:]}"
    return output


@functools.cache
def _server():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, **pipes)  # ends with its stdin


def serve():
    sys.path.insert(0, str(ROOT / "scripts/benchmarks"))
    import forked
    import peft  # noqa: F401  programs need it

    forked.import_all()
    for line in sys.stdin:
        job = json.loads(line)
        process = forked.start_ranks(job["processes"], functools.partial(work, job), Path(job["log"]))
        process.join(job["timeout"])
        forked.kill(process)
        print(process.exitcode, flush=True)


def work(job):
    os.environ |= job["environment"] | {name: os.environ[name] for name in RENDEZVOUS}
    sys.argv = job["words"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")

if __name__ == "__main__":
    serve()
