"""Comparisons that anyone can rerun: suites of tasks, methods and seeds; `scripts/reproduce.py` is the way in."""
