"""Drawings for Pathfinder, by a rule of our own: dashed paths that bend and never touch, and two
discs at ends of paths, of the same path or not.

A path starts anywhere and goes on in steps of STEP pixels, each turned by up to TURN against the
one before; it stays GAP pixels from other paths. The first half of each step is drawn. Two paths
are of the full length, whichever the answer, and others half as long. Discs that are not joined are
as far from each other as the two that could be, but for CLOSE, so that one has to follow a path to
tell."""

import itertools
import math
import random

import numpy as np

STEP, TURN, GAP, MARGIN, RADIUS = 2.0, 0.6, 3.0, 1.5, 1.5  # pixels; TURN in radians
CLOSE = 0.5  # pixels
STARTS, TRIES = 30, 10_000
Point = tuple[float, float]


def draw(rng: random.Random, size: int, points: int, distractors: int) -> tuple[np.ndarray, int]:
    """Grey levels uint8 [size, size], and 1 where a path joins the discs, else 0.

    Raises ValueError if none of TRIES drawings had room for its paths."""
    paths, discs, joined = layout(rng, size, points, distractors)
    return _painted(size, paths, discs), int(joined)


def layout(
    rng: random.Random, size: int, points: int, distractors: int
) -> tuple[list[list[Point]], tuple[Point, Point], bool]:
    """Paths, the places of the two discs, and whether a path joins them."""
    for _ in range(TRIES):
        paths: list[list[Point]] = []
        for length in (points, points, *(max(points // 2, 2),) * distractors):
            path = _path(rng, size, length, paths)
            if path is None:
                break
            paths.append(path)
            if len(paths) == 2 and not _alike(*paths):
                break
        else:
            joined, apart = (paths[0][0], paths[0][-1]), _alike(*paths[:2])
            answer = rng.random() < 0.5
            if apart is not None:
                return paths, joined if answer else apart, answer
    raise ValueError(
        f"no drawing of size={size} had room for paths of points={points} with"
        f" distractors={distractors} in {TRIES} tries"
    )


def _alike(one: list[Point], other: list[Point]) -> tuple[Point, Point] | None:
    """Ends of the two paths that are as far from each other as those of the first, but for CLOSE;
    None if there are none."""
    wanted = math.dist(one[0], one[-1])
    pairs = itertools.product((one[0], one[-1]), (other[0], other[-1]))
    nearest = min(pairs, key=lambda pair: abs(math.dist(*pair) - wanted))
    return nearest if abs(math.dist(*nearest) - wanted) <= CLOSE else None


def _path(
    rng: random.Random, size: int, length: int, others: list[list[Point]]
) -> list[Point] | None:
    """Points of a path that is clear of the others; None if none of STARTS beginnings had room."""
    taken = [point for other in others for point in other]

    def free(point: Point, own: list[Point]) -> bool:
        inside = all(MARGIN <= x <= size - 1 - MARGIN for x in point)
        return (
            inside
            and all(math.dist(point, there) >= GAP for there in taken)
            and all(math.dist(point, there) >= GAP for there in own[:-1])
        )

    for _ in range(STARTS):
        angle = rng.uniform(0, 2 * math.pi)
        path: list[Point] = [(rng.uniform(0, size - 1), rng.uniform(0, size - 1))]
        while len(path) < length and free(path[-1], path[:-1]):
            y, x = path[-1]
            path.append((y + STEP * math.sin(angle), x + STEP * math.cos(angle)))
            angle += rng.uniform(-TURN, TURN)
        if len(path) == length and free(path[-1], path[:-1]):
            return path
    return None


def _painted(size: int, paths: list[list[Point]], discs: tuple[Point, Point]) -> np.ndarray:
    starts = np.array([point for path in paths for point in path[:-1]])
    ends = np.array([point for path in paths for point in path[1:]])
    dash = (ends - starts) / 2
    pixels = np.moveaxis(np.indices((size, size)), 0, -1)[:, :, None]  # [Y, X, 1, 2]
    along = ((pixels - starts) * dash).sum(-1) / (dash * dash).sum(-1)
    nearest = starts + np.clip(along, 0, 1)[..., None] * dash
    ink = np.clip(1 - np.linalg.norm(pixels - nearest, axis=-1), 0, 1).max(-1)
    from_disc = np.linalg.norm(pixels - np.array(discs), axis=-1).min(-1)
    ink = np.maximum(ink, np.clip(RADIUS + 0.5 - from_disc, 0, 1))
    return np.round(255 * ink).astype(np.uint8)
