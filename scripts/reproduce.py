"""Run a suite of comparisons: tasks x methods x seeds, and write their table and plots.

    python scripts/reproduce.py configs/suites/cpu.yaml --workers 2 --threads 1
    python scripts/reproduce.py configs/suites/cpu.yaml --tasks digits --methods full "tau 0.12"
    python scripts/reproduce.py configs/suites/paper.yaml --dry-run
    python scripts/reproduce.py configs/suites/cpu.yaml --table-only

Each run is a process of its own. Finished runs are not repeated: start the same command again after an interruption.
The output folder gets results.jsonl, one line a run; table.md, mean and standard deviation over seeds, states, and
training time relative to full size; and an SVG for each task (with matplotlib, the extra `plots`). --data-dir TASK=DIR
reads a task's data from a local folder; --dry-run lets every run of one seed build its model and data and take two
steps, on random stand-in files where a task reads files.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from hf_compressm.files import check_folder
from hf_compressm.reproduction.dry_run import dry_suite
from hf_compressm.reproduction.runner import Runner, current, read_records
from hf_compressm.reproduction.suite import Suite, jobs, load_suite, select
from hf_compressm.reproduction.summary import results_table
from hf_compressm.runs.arguments import TRACEBACK_HELP, OneLineParser, errors_as_lines


def parse(words: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=TRACEBACK_HELP
    )
    parser.add_argument("suite", help="YAML file; see hf_compressm.reproduction.suite.load_suite")
    parser.add_argument("--output", help="folder for the results (default: outputs/suites/NAME)")
    parser.add_argument("--workers", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--threads", type=int, help="torch threads of each run (default: cores / workers)")
    parser.add_argument("--tasks", nargs="+", help="run only these")
    parser.add_argument("--methods", nargs="+", help="run only these, and those that they need")
    parser.add_argument("--seeds", type=int, help="run at most this many")
    parser.add_argument("--data-dir", nargs="+", default=[], metavar="TASK=DIR", help="local data of a task")
    parser.add_argument("--dry-run", action="store_true", help="take two steps of every run, on random files")
    parser.add_argument("--table-only", action="store_true", help="write table and plots of what there is")
    return parser.parse_args(words)


def run_suite(options: argparse.Namespace) -> tuple[Suite, Runner, list[dict[str, Any]]]:
    suite = load_suite(options.suite)
    output = Path(options.output or f"outputs/suites/{suite.name}{'_dry' if options.dry_run else ''}")
    data = dict(entry.partition("=")[::2] for entry in options.data_dir)
    suite = select(suite, options.tasks, options.methods, 1 if options.dry_run else options.seeds, data)
    check_folder(output)
    if options.dry_run:
        suite = dry_suite(suite, output / "stand_ins")
    runner = Runner(output, options.workers, options.threads)
    if not options.table_only:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the runs end too
        runner.run(jobs(suite))
    return suite, runner, current(read_records(runner.results), jobs(suite))


def main(argv: list[str]) -> None:
    with errors_as_lines(argv) as words:
        suite, runner, records = run_suite(parse(words))
    table, output = results_table(suite, records), runner.results.parent
    (output / "table.md").write_text(table)
    print(table)
    try:
        from hf_compressm.reproduction.plots import write_plots

        write_plots(suite, records, output)
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
    if runner.failed:
        lines = [f"{task}, {method}, seed {seed}: {why}" for (task, method, seed), why in runner.failed.items()]
        raise SystemExit("failed:\n" + "\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
