"""Write small data sets of the kinds that people bring: a text, measurements of machines, and hourly demand.

    python examples/make_data.py                # to examples/data
    python examples/make_data.py OTHER_FOLDER

`topics.jsonl` has a page of Python's own help in each line, in the column `text`: some 80 documents of English about a
programming language, which every Python carries (`pydoc_data.topics`; licence of Python).

`machines.csv` has a row for each second of 300 simulated machines, 40 to 60 seconds each: `machine`, `second`, the
measurements `vibration` and `temperature`, of which 2% are missing, the machine's `state` (fine, unbalanced or worn),
its `wear` from 0 to 1, and for each second whether there was a `knock`.

`demand.csv` has a row for each hour of 60 days in 4 simulated buildings, some of which are missing: `building`, `hour`,
the electrical `demand` in kW, which follows the hour, the day of the week and the weather, and the `temperature`
outside. All of it is drawn from one seed.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

STATES = ("fine", "unbalanced", "worn")
COLUMNS = ("machine", "second", "vibration", "temperature", "knock", "state", "wear")
MACHINES = 300
MISSING = 0.02
BUILDINGS = 4
DAYS = 60


def main(folder: Path) -> None:
    """Write the files into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = (json.dumps({"topic": topic, "text": text}) for topic, text in sorted(topics.items()))
    (folder / "topics.jsonl").write_text("\n".join(pages) + "\n", encoding="utf-8")
    rng = np.random.default_rng(0)
    machines = (machine(rng, f"m{number:03}", STATES[number % len(STATES)]) for number in range(MACHINES))
    write_table(folder / "machines.csv", COLUMNS, machines)
    rng = np.random.default_rng(0)
    buildings = (building(rng, f"b{number}") for number in range(BUILDINGS))
    write_table(folder / "demand.csv", ("building", "hour", "demand", "temperature"), buildings)


def write_table(path: Path, columns: tuple[str, ...], parts: Iterable[Iterator[tuple]]) -> None:
    """A csv file of all rows of all parts."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for rows in parts:
            writer.writerows(rows)


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


def building(rng: np.random.Generator, name: str) -> Iterator[tuple]:
    """The rows of one building: people come by day, less so at weekends, and heat against the cold."""
    hours = np.arange(24 * DAYS)
    weather = np.zeros(len(hours))
    for hour in hours[1:]:  # the weather changes slowly
        weather[hour] = 0.98 * weather[hour - 1] + rng.normal(0, 0.4)
    temperature = 8 + 4 * np.sin(2 * np.pi * (hours - 9) / 24) + 2 * weather
    people = np.clip(np.sin(np.pi * (hours % 24 - 7) / 12), 0, None) * np.where(hours // 24 % 7 < 5, 1, 0.3)
    size = rng.uniform(20, 200)
    demand = size * (0.5 + people + 0.04 * np.clip(18 - temperature, 0, None) + rng.normal(0, 0.05, len(hours)))
    start = np.datetime64("2026-01-05T00:00")
    for hour in hours:
        if rng.uniform() >= MISSING:
            yield (name, start + np.timedelta64(hour, "h"), f"{demand[hour]:.2f}", f"{temperature[hour]:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
