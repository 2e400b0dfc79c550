"""Write two small data sets of the kinds that people bring: a text, and measurements of machines.

    python examples/make_data.py                # to examples/data
    python examples/make_data.py OTHER_FOLDER

`topics.jsonl` has a page of Python's own help in each line, in the column `text`: some 80 documents of English about a
programming language, which every Python carries (`pydoc_data.topics`; licence of Python).

`machines.csv` has a row for each second of 300 simulated machines, 40 to 60 seconds each: `machine`, `second`, the
measurements `vibration` and `temperature`, of which 2% are missing, the machine's `state` (fine, unbalanced or worn),
its `wear` from 0 to 1, and for each second whether there was a `knock`. All of it is drawn from one seed.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

STATES = ("fine", "unbalanced", "worn")
COLUMNS = ("machine", "second", "vibration", "temperature", "knock", "state", "wear")
MACHINES = 300
MISSING = 0.02


def main(folder: Path) -> None:
    """Write both files into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = (json.dumps({"topic": topic, "text": text}) for topic, text in sorted(topics.items()))
    (folder / "topics.jsonl").write_text("\n".join(pages) + "\n", encoding="utf-8")
    with (folder / "machines.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        rng = np.random.default_rng(0)
        for number in range(MACHINES):
            writer.writerows(machine(rng, f"m{number:03}", STATES[number % len(STATES)]))


def machine(rng: np.random.Generator, name: str, state: str) -> Iterator[tuple]:
    """The rows of one machine: an unbalanced one shakes at its rate of rotation, a worn one knocks and is warm."""
    length, wear = int(rng.integers(40, 61)), float(rng.uniform(0.5, 1) if state == "worn" else rng.uniform(0, 0.5))
    seconds = np.arange(length)
    shaking = 1.5 if state == "unbalanced" else 0.5
    vibration = shaking * np.sin(rng.uniform(0.8, 1.2) * seconds + rng.uniform(0, 2 * np.pi)) + rng.normal(
        0, 0.5, length
    )
    knock = (rng.uniform(size=length) < (0.2 if state == "worn" else 0.02)).astype(int)
    vibration += 3 * knock - np.append(0, 2 * knock[:-1])  # a knock swings back a second later
    temperature = 40 + 15 * wear * (1 - np.exp(-seconds / 15)) + rng.normal(0, 0.5, length)
    for second in seconds:
        measured = (f"{values[second]:.3f}" if rng.uniform() >= MISSING else "" for values in (vibration, temperature))
        yield (name, int(second), *measured, int(knock[second]), state, f"{wear:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
