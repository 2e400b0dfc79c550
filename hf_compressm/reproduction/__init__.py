"""Run suites of comparisons: tasks, methods and seeds. `scripts/reproduce.py` is the program."""
