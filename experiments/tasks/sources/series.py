"""Series of several variates with dates: files as they were published, any CSV with a column of
dates, and waves that are generated.

A row is a moment. Where something is wrong with a file, the message names the file and the row, as
the number of its line."""

import csv
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from experiments.tasks.sources.random_streams import normals, uniforms
from experiments.training.memory import check_held

DAY, HOUR = np.timedelta64(1, "D"), np.timedelta64(1, "h")
# Beside ISO 8601: how the forecasting papers' copy of the exchange rates has its dates.
OTHER_DATES = ("%Y/%m/%d %H:%M", "%Y/%m/%d")


@dataclass(frozen=True)
class Published:
    """A published set: `files` by which it is known; `rows` of training, validation and test, ()
    for 70, 10 and 20 %; `start`, the day of the first row of a file without dates, whose rows are
    days; where it is to be had."""

    files: tuple[str, ...]
    rows: tuple[int, ...]
    start: str
    address: str


# Zhou et al., AAAI 2021, arXiv 2012.07436: 12, 4 and 4 months of 30 days.
ETT = "https://github.com/zhouhaoyi/ETDataset"
_HOURS = (8_640, 2_880, 2_880)
_QUARTERS = (34_560, 11_520, 11_520)
# Lai et al., SIGIR 2018, arXiv 1703.07015. Its file has no dates; the forecasting papers number its
# rows as days from the first of 1990 on, weekends included.
RATES = "https://github.com/laiguokun/multivariate-time-series-data"
PUBLISHED = {
    "ETTh1": Published(("ETTh1.csv",), _HOURS, "", ETT),
    "ETTh2": Published(("ETTh2.csv",), _HOURS, "", ETT),
    "ETTm1": Published(("ETTm1.csv",), _QUARTERS, "", ETT),
    "ETTm2": Published(("ETTm2.csv",), _QUARTERS, "", ETT),
    "exchange": Published(
        ("exchange_rate.csv", "exchange_rate.txt.gz", "exchange_rate.txt"), (), "1990-01-01", RATES
    ),
}


@dataclass(frozen=True)
class Series:
    """names [V] of the variates; dates [n], datetime64[s]; values [n, V], float64. sha256 is of the
    file, or of the values that were generated; `rows` as in `Published`."""

    origin: str
    sha256: str
    names: tuple[str, ...]
    dates: np.ndarray
    values: np.ndarray
    rows: tuple[int, ...] = ()


def published(name: str, data_dir: str, date_column: str) -> Series:
    """The set `name` of PUBLISHED in the folder `data_dir`.

    Raises ValueError if it is not there, and as `read_series`."""
    known, folder = PUBLISHED[name], Path(data_dir).expanduser()
    found = [folder / file for file in known.files if (folder / file).is_file()]
    if not found:
        raise ValueError(
            f"task.data_dir must be a directory with {' or '.join(known.files)} for {name};"
            f" {folder} {'has none' if folder.is_dir() else 'is no directory'}. It is in"
            f" {known.address}"
        )
    return read_series(found[0], date_column, rows=known.rows, start=known.start)


def read_series(
    path: Path,
    date_column: str = "date",
    *,
    gaps: bool = False,
    rows: tuple[int, ...] = (),
    start: str = "",
) -> Series:
    """The series of a file of comma-separated columns, gzipped or not, whose first line names them.
    All columns but `date_column` are variates.

    gaps     whether moments may be missing
    start    the day of the first row of a file without names and dates, whose rows are days; "":
             there must be dates

    Raises ValueError for a file that is not there or empty, cells that are missing or no finite
    numbers, and dates that are none, twice there, not in order or, unless `gaps`, not evenly
    spaced."""
    if not path.is_file():
        raise ValueError(f"task.dataset must name a file; there is no {path}")
    content = path.read_bytes()
    lines = _lines(path, content)
    number, header = next(lines, (1, []))
    if all(map(_is_number, header)):
        if not (start and header):
            raise ValueError(f"{path}, row 1 must name the columns; got {','.join(header)[:60]!r}")
        names, dated = tuple(f"variate_{i}" for i in range(len(header))), None
        table = [(number, header), *lines]
    else:
        if date_column not in header:
            raise ValueError(
                f"{path}, row {number} must name a column {date_column!r} (task.date_column); its"
                f" columns are {', '.join(header)}"
            )
        if twice := [name for name in header if header.count(name) > 1]:
            raise ValueError(f"{path}, row {number} must name each column once; got {twice[0]!r}")
        dated = header.index(date_column)
        names = tuple(name for place, name in enumerate(header) if place != dated)
        table = list(lines)
    if len(table) < 2 or not names:
        raise ValueError(f"{path} must have two rows of numbers or more; got {len(table)}")
    values = np.stack([_numbers(path, row, names, dated) for row in table])
    if dated is None:
        dates = np.datetime64(start, "s") + np.arange(len(table)) * DAY
    else:
        dates = np.array([_date(path, number, row[dated]) for number, row in table])
        _check_dates(path, [number for number, _ in table], dates, gaps)
    digest = hashlib.sha256(content).hexdigest()
    return Series(path.name, digest, names, dates, values, rows)


def _lines(path: Path, content: bytes) -> Iterator[tuple[int, list[str]]]:
    """(number, cells) of every line that is not empty."""
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        text = content.decode("utf-8-sig")
    except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no text in UTF-8: {error}") from error
    reader = csv.reader(io.StringIO(text))
    for row in reader:
        if row:
            yield reader.line_num, [cell.strip() for cell in row]


def _numbers(
    path: Path, row: tuple[int, list[str]], names: Sequence[str], dated: int | None
) -> np.ndarray:
    number, cells = row
    columns = len(names) + (dated is not None)
    if len(cells) != columns:
        raise ValueError(f"{path}, row {number} must have {columns} cells; got {len(cells)}")
    cells = [cell for place, cell in enumerate(cells) if place != dated]
    try:
        values = np.array(cells, np.float64)
    except ValueError:
        values = np.array([np.nan])
    if not np.isfinite(values).all():
        name, cell = next(
            (name, cell) for name, cell in zip(names, cells, strict=True) if not _is_number(cell)
        )
        raise ValueError(f"{path}, row {number}: {name} must be a finite number; got {cell!r}")
    return values


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def _date(path: Path, number: int, cell: str) -> np.datetime64:
    try:
        moment = datetime.fromisoformat(cell)
    except ValueError:
        for form in OTHER_DATES:
            try:
                moment = datetime.strptime(cell, form)
                break
            except ValueError:
                continue
        else:
            raise ValueError(
                f"{path}, row {number} must have a date like 2016-07-01 00:00:00; got {cell!r}"
            ) from None
    if moment.tzinfo is not None:
        raise ValueError(f"{path}, row {number} must have a date without time zone; got {cell!r}")
    return np.datetime64(moment, "s")


def usual_step(dates: np.ndarray) -> np.timedelta64:
    """How far apart most rows are: the median."""
    steps = np.sort(np.diff(dates))
    return steps[len(steps) // 2]


def _check_dates(path: Path, numbers: list[int], dates: np.ndarray, gaps: bool) -> None:
    steps, usual = np.diff(dates), usual_step(dates)
    zero = np.timedelta64(0, "s")
    wrong = np.flatnonzero((steps <= zero) | ((steps != usual) & ~np.bool_(gaps)))
    if not len(wrong):
        return
    place = int(wrong[0])
    step, before = steps[place], f"row {numbers[place]}"
    here = f"{path}, row {numbers[place + 1]}: the date {dates[place + 1]}".replace("T", " ")
    if step == zero:
        raise ValueError(f"{here} is that of {before} again")
    if step < zero:
        raise ValueError(f"{here} is before that of {before}; rows must be in order of time")
    raise ValueError(
        f"{here} comes {step.item()} after {before}, where rows are {usual.item()} apart; fill the"
        " gap, or set task.gaps=True to take rows as they follow each other"
    )


def calendar_features(dates: np.ndarray) -> np.ndarray:
    """[n, 4] float32 in [-1/2, 1/2]: hour of the day, day of the week (Monday first), of the month
    and of the year; as the forecasting papers have them for hours."""
    days = dates.astype("datetime64[D]")
    months, years = days.astype("datetime64[M]"), days.astype("datetime64[Y]")
    features = (
        (dates - days) // HOUR / 23,
        (days.astype(np.int64) + 3) % 7 / 6,  # the first of 1970 was a Thursday
        (days - months.astype("datetime64[D]")) // DAY / 30,
        (days - years.astype("datetime64[D]")) // DAY / 365,
    )
    return (np.stack(features, axis=1) - 0.5).astype(np.float32)


WAVES = (24.0, 168.0, 57.0, 12.0)  # periods, hours


def waves(variates: int, rows: int = 8_000) -> Series:
    """Hours of `variates` that mix the same few waves, each with lags of its own, and noise that
    lasts: what one variate does now, others did before.

    x_v(t) = sum_k a_vk sin(2 pi (t - l_vk) / p_k) + n_v(t),  n_v(t) = 0.7 n_v(t - 1) + 0.3 e_v(t)
    """
    check_held("a series of config.task.waves variates", 4 * 8 * rows * variates)
    sources = len(WAVES)
    uniform = uniforms("forecasting/waves", np.arange(variates), 2 * sources + rows + rows % 2)
    lag_vk, share_vk = 24 * uniform[:, :sources], uniform[:, sources : 2 * sources]
    values = np.zeros((rows, variates))
    for k, period in enumerate(WAVES):  # each alone, so that no array is several times as large
        phase = 2 * np.pi * (np.arange(rows)[:, None] - lag_vk[:, k]) / period
        values += share_vk[:, k] * np.sin(phase)
    noise = np.zeros(variates)
    for t, drawn in enumerate(0.3 * normals(uniform[:, 2 * sources :]).T[:rows]):
        noise = 0.7 * noise + drawn
        values[t] += noise
    dates = np.datetime64("2020-01-01", "s") + np.arange(rows) * HOUR
    names = tuple(f"wave_{i}" for i in range(variates))
    return Series("waves", hashlib.sha256(values.tobytes()).hexdigest(), names, dates, values)
