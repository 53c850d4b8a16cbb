"""Fits find what was planted, with bands that hold it; what cannot be fitted is refused."""

import json
import math
import re
import runpy
import subprocess
import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.sweeps.lr_sensitivity import LEARNING_RATES, draw, sensitivity
from experiments.sweeps.scaling_law import (
    BAND,
    Points,
    bootstrap,
    fit,
    fit_power_law,
    points,
    predict,
)
from experiments.training.checkout import CHECKOUT

LAW = np.array([1.69, 406.4, 410.7, 0.34, 0.28])


def planted(noise: float, sizes: int = 4, seed: int = 0) -> Points:
    """Losses of LAW on a grid of sizes, with relative noise."""
    N, D = np.meshgrid(np.geomspace(1e6, 1e9, sizes), np.geomspace(1e8, 1e11, sizes))
    N, D = N.ravel(), D.ravel()
    random = np.random.default_rng(seed)
    return Points(N, D, predict(LAW, N, D) * np.exp(noise * random.normal(size=N.size)))


ORIGIN = {"commit": "0" * 40, "dirty": False, "device": "cpu"}
ORIGIN |= {"device_count": 1, "platform": "cpu"}


def rows(data: Points) -> list[dict[str, Any]]:
    return [
        {
            **ORIGIN,
            "scale": "cpu",
            "row": "GLA",
            "column": f"{D:g}",
            "config_hash": f"{N:g} {D:g}",
            "parameters": N,
            "tokens": D,
            "evaluations": {"validation": {"loss": [loss - 0.01, loss + 0.01]}},
        }
        for N, D, loss in np.array(data).T.tolist()
    ]


def test_without_noise_the_planted_law_is_found():
    np.testing.assert_allclose(fit(planted(noise=0.0)), LAW, rtol=1e-4)


@pytest.mark.slow
def test_planted_exponents_lie_within_their_bands():
    inside = []
    for seed in range(5):
        data = planted(noise=0.002, seed=seed)
        law = fit(data)
        low, high = np.percentile(bootstrap(data, law), BAND, axis=0)
        assert np.all((low < law) & (law < high))
        assert np.all(high[3:] - low[3:] < 0.05), "a band that excludes nothing"
        inside += ((low < LAW) & (high > LAW))[3:].tolist()
    # Nine of ten, if bands are what they say.
    assert sum(inside) >= 8


def test_one_run_that_went_wrong_hardly_moves_the_law():
    data = planted(noise=0.0)
    loss = data.loss.copy()
    loss[5] *= 1.5
    np.testing.assert_allclose(fit(data._replace(loss=loss))[3:], LAW[3:], rtol=0.02)


def test_a_power_law_has_its_exponent_in_its_band():
    x = np.geomspace(1e5, 1e9, 6)
    noise = np.random.default_rng(1).normal(size=6) * 0.005
    alpha, low, high = fit_power_law(x, (8.8e13 / x) ** 0.076 * np.exp(noise))
    assert low < 0.076 < high and low < alpha < high and high - low < 0.01


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (planted(0.0, sizes=2), "at least 6 runs .* got 4 runs with 2 and 2"),
        (Points(*np.array(planted(0.0))[:, :4]), "got 4 runs with 4 and 1"),
        (planted(0.0)._replace(loss=np.zeros(16)), "must be positive .* 1e.06, 1e.08, 0"),
    ],
)
def test_what_has_no_law_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        fit(data)


def test_rows_become_points_and_one_without_the_metric_is_named():
    data = planted(0.0)
    np.testing.assert_allclose(points(rows(data), "validation/loss"), data)
    broken = rows(data)
    broken[3]["evaluations"]["validation"]["loss"] = [1.0, None]
    with pytest.raises(ValueError, match=r"GLA / 1e\+08 has .* \[1.0, None\] for"):
        points(broken, "validation/loss")
    with pytest.raises(ValueError, match=r"None for 'test/loss', of .* validation"):
        points(broken, "test/loss")
    old = rows(data)
    del old[0]["tokens"]
    with pytest.raises(ValueError, match=r"must have tokens .* has None tokens"):
        points(old, "validation/loss")


def test_rows_of_several_commits_are_fitted_together_only_when_asked(tmp_path):
    several = rows(planted(0.002))
    several[2] |= {"commit": "f" * 40, "dirty": True}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, several)))
    command = [sys.executable, "-m", "experiments.sweeps.scaling_law", f"--rows={file}"]
    command += ["--metric=validation/loss", f"--out={tmp_path / 'law.png'}"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "law.png").exists()
    assert re.search(r"one commit .* --mixed .* f{10}\+changes on 1 x cpu", done.stderr)
    done = subprocess.run([*command, "--mixed"], cwd=CHECKOUT, capture_output=True)
    assert done.returncode == 0


def test_a_sensitivity_is_of_one_commit():
    cells = runpy.run_path(str(CHECKOUT / "experiments/sweeps/lr_sensitivity.py"))["cells"]
    cells = [cell for cell in cells("tiny") if cell.row == cells("tiny")[0].row]
    losses = {"evaluations": {"validation": {"loss": [1.0]}}}

    def label(*commits: str) -> str:
        _, axes = plt.subplots()
        rows = [{**ORIGIN, **losses, "commit": commit} for commit in commits]
        draw(axes, list(zip(cells, rows, strict=False)), initial_loss=5.0)
        text = axes.get_legend().get_texts()[0].get_text()
        plt.close("all")
        return text

    assert label("a", "a").endswith(": 0.000 (2 rates)")
    assert label("a", "b").endswith(": several commits or machines")


@pytest.mark.slow
def test_the_command_prints_ours_beside_the_published_and_draws(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows(planted(0.002)))))
    command = [sys.executable, "-m", "experiments.sweeps.scaling_law", f"--rows={file}"]
    command += ["--metric=validation/loss"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'law.png'}"], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "over 16 runs" in done.stdout and "published 0.34, 0.3478" in done.stdout
    assert "in parameters, most tokens: alpha" in done.stdout
    assert (tmp_path / "law.png").stat().st_size > 10_000


def test_sensitivity_counts_divergence_as_the_initial_loss():
    losses = {1e-3: 2.0, 1e-2: 1.0, 1e-1: None, 1.0: 80.0, 10.0: math.nan}
    assert sensitivity(losses, initial_loss=5.0) == pytest.approx(18 / 5 - 1)
    assert sensitivity(dict.fromkeys(LEARNING_RATES, 1.5), 5.0) == 0
    with pytest.raises(ValueError, match=r"at least two learning rates .* \[0.1\]"):
        sensitivity({0.1: 1.0}, 5.0)


@pytest.mark.parametrize("name", ["scaling_law", "lr_sensitivity"])
def test_the_sweeps_are_sweeps_and_draw_what_there_is(name):
    sweep = runpy.run_path(str(CHECKOUT / "experiments/sweeps" / f"{name}.py"))

    def loss(cell):
        return 1 + 9 / cell.overrides["model.width"] + 30 / cell.overrides["steps"]

    for scale in sweep["SCALES"]:
        cells = sweep["cells"](scale)
        assert len({str(cell.make_config()) for cell in cells}) == len(cells)
        for count in (1, len(cells)):
            _, axes = plt.subplots()
            results = [
                (
                    cell,
                    {
                        **ORIGIN,
                        "row": cell.row,
                        "column": cell.column,
                        "parameters": cell.overrides["model.width"] ** 2,
                        "tokens": 128 * cell.make_config().steps,
                        "evaluations": {"validation": {"loss": [loss(cell)]}},
                    },
                )
                for cell in cells[:count]
            ]
            sweep["draw"](axes, results)
            assert len(axes.get_legend().get_texts()) >= 1
            plt.close("all")
