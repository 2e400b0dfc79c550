"""Put the rows of a series at equal steps of time: sorted, each once, with missing rows where time has gaps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

TOLERANCE = 0.01
"""Of a step: times of measurements may differ by this from equal steps."""
LONGEST = 10
"""A series may become longer by this factor when its gaps are filled."""


def at_equal_steps(rows: Any, time: str, place: str) -> Any:
    """Return the rows of one series in the order of time, with empty rows where steps are missing.

    Steps are the smallest difference of two times; where dates are at one day of the month, or at its end, they are
    months.

    Args:
        rows: a pandas DataFrame.
        time: name of the column with numbers or ISO 8601 dates, none missing.
        place: the file and sequence, for errors.

    Raises:
        ValueError: if times are there twice, are neither numbers nor dates or are not at equal steps.
    """
    rows = rows.assign(**{time: _times(rows[time], time, place)}).sort_values(time, kind="stable")
    times = rows[time]
    if times.duplicated().any():
        raise ValueError(
            f"{place}: {time} {times[times.duplicated()].iloc[0]} is there more than once; name the column that tells "
            "series apart as group"
        )
    steps = _steps(times)
    if steps is None or steps[-1] >= LONGEST * len(rows):
        apart = times.diff().dropna()
        raise ValueError(
            f"{place}: {time} is not at equal steps, its rows are {apart.min()} to {apart.max()} apart; without time "
            "the rows count as steps in the order of the file"
        )
    return rows.set_axis(steps).reindex(np.arange(steps[-1] + 1))


def _times(values: Any, name: str, place: str) -> Any:
    if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_datetime64_any_dtype(values):
        return values
    try:
        return pd.to_datetime(values, format="ISO8601", utc=True).dt.tz_convert(None)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{place}: {name!r} holds neither numbers nor dates of the form 2026-01-31 or 2026-01-31 12:00"
        ) from error


def _steps(times: Any) -> np.ndarray | None:
    """The step of each time, integers from 0; None if there are none that fit."""
    if len(times) < 2:
        return np.zeros(len(times), dtype=np.int64)
    seconds = (times - times.iloc[0]) / (times.diff().min())
    steps = np.rint(np.asarray(seconds, dtype=np.float64))
    if np.abs(np.asarray(seconds, dtype=np.float64) - steps).max() <= TOLERANCE:
        return steps.astype(np.int64)
    if not pd.api.types.is_datetime64_any_dtype(times):
        return None
    dates = times.dt
    if not (dates.is_month_end.all() or dates.day.nunique() == 1):
        return None
    months = (dates.year * 12 + dates.month).to_numpy().astype(np.int64)
    return (months - months[0]) // np.gcd.reduce(np.diff(months))
