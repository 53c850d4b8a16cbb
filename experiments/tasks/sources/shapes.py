"""Points on the surfaces of labelled shapes, with noise, occlusion, clutter and rotation.

Shapes are about the origin, within a ball of radius 1 or a little more, and points on them are
spread evenly, but for the torus and the helix, which are even in their angles."""

import math
from collections.abc import Callable

import numpy as np

TURNS, TUBE = 2.0, 0.12  # of the helix
CLUTTER = "clutter"
Points = np.ndarray  # float64 [n, 3]


def _sphere(u: np.ndarray) -> Points:
    z, angle = 2 * u[:, 0] - 1, 2 * np.pi * u[:, 1]
    r = np.sqrt(1 - z**2)
    return np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=1)


def _cube(u: np.ndarray) -> Points:
    side = np.sqrt(1 / 3)
    face = (6 * u[:, 0]).astype(int)
    on_face = side * (2 * u[:, 1:3] - 1)
    height = np.where(face % 2, side, -side)
    points = np.concatenate([on_face, height[:, None]], axis=1)
    return np.stack([np.roll(points, shift, axis=1) for shift in range(3)])[
        face // 2, range(len(u))
    ]


def _disc(u: np.ndarray, radius: float, height: float) -> Points:
    r, angle = radius * np.sqrt(u[:, 1]), 2 * np.pi * u[:, 2]
    return np.stack([r * np.cos(angle), r * np.sin(angle), np.full(len(u), height)], axis=1)


def _tube(u: np.ndarray) -> Points:
    angle = 2 * np.pi * u[:, 1]
    return np.stack([0.6 * np.cos(angle), 0.6 * np.sin(angle), 0.8 * (2 * u[:, 2] - 1)], axis=1)


def _cylinder(u: np.ndarray) -> Points:
    """The tube with two lids, of 0.6^2 pi each beside 2 pi 0.6 1.6."""
    lid = 0.36 / (0.72 + 1.92)
    points = _tube(u)
    for height, chosen in ((-0.8, u[:, 0] < lid), (0.8, u[:, 0] > 1 - lid)):
        points[chosen] = _disc(u[chosen], 0.6, height)
    return points


def _cone(u: np.ndarray) -> Points:
    """Radius 0.7 and height 1.6: a base of pi 0.7^2, a side of pi 0.7 times its slant."""
    slant = math.hypot(0.7, 1.6)
    share, angle = np.sqrt(u[:, 1]), 2 * np.pi * u[:, 2]  # of the way from the tip
    points = np.stack(
        [0.7 * share * np.cos(angle), 0.7 * share * np.sin(angle), 0.8 - 1.6 * share], axis=1
    )
    base = u[:, 0] < 0.7 / (0.7 + slant)
    points[base] = _disc(u[base], 0.7, -0.8)
    return points


def _pyramid(u: np.ndarray) -> Points:
    """A square base with corners at a distance of 0.8, four sides that meet at the tip."""
    half, height = 0.8 / math.sqrt(2), 1.5
    sides = 4 * half * math.hypot(half, height)
    base = u[:, 0] < 4 * half**2 / (4 * half**2 + sides)
    share = np.sqrt(u[:, 1])
    side = (4 * (u[:, 2] * 4 % 1)).astype(int)
    across = share * half * (2 * ((16 * u[:, 2]) % 1) - 1)
    quarter = np.pi / 2 * side
    x = share * half * np.cos(quarter) - across * np.sin(quarter)
    y = share * half * np.sin(quarter) + across * np.cos(quarter)
    points = np.stack([x, y, 0.75 - height * share], axis=1)
    flat = half * (2 * u[:, 1:3] - 1)
    points[base] = np.concatenate([flat, np.full((len(u), 1), -0.75)], axis=1)[base]
    return points


def _torus(u: np.ndarray) -> Points:
    around, about = 2 * np.pi * u[:, 0], 2 * np.pi * u[:, 1]
    r = 0.7 + 0.28 * np.cos(about)
    return np.stack([r * np.cos(around), r * np.sin(around), 0.28 * np.sin(about)], axis=1)


def _helix(u: np.ndarray) -> Points:
    around, about = 2 * np.pi * TURNS * u[:, 0], 2 * np.pi * u[:, 1]
    r = 0.6 + TUBE * np.cos(about)
    z = 1.6 * (u[:, 0] - 0.5) + TUBE * np.sin(about)
    return np.stack([r * np.cos(around), r * np.sin(around), z], axis=1)


# By name: points of uniform numbers [n, 3].
SHAPES: dict[str, Callable[[np.ndarray], Points]] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "tube": _tube,
    "cone": _cone,
    "pyramid": _pyramid,
    "torus": _torus,
    "helix": _helix,
}


def rotation(random: np.random.Generator) -> np.ndarray:
    """A rotation [3, 3], all equally likely: that of a quaternion on the sphere."""
    w, x, y, z = (q := random.standard_normal(4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def draw_cloud(
    random: np.random.Generator,
    grid: tuple[int, int, int],
    *,
    shapes: int,
    radius: tuple[float, float],
    noise: float,
    occlusion: float,
    clutter: float,
    rotated: bool,
) -> tuple[Points, np.ndarray]:
    """Points [n, 3] in cells of the grid, all within it, and their labels [n]: places in SHAPES,
    len(SHAPES) for clutter, which comes last.

    shapes      how many there are, of any kind, anywhere
    radius      from and to, in cells, at most half of the grid's least extent
    noise       standard deviation in cells, along each axis
    occlusion   of each shape a part is missing, cut off by a plane: a share of up to this
    clutter     points anywhere in the grid, as a share of the others
    rotated     in any direction; or all upright"""
    parts, labels = [], []
    extent = np.array(grid, np.float64)
    for _ in range(shapes):
        kind = int(random.integers(len(SHAPES)))
        scale = random.uniform(*radius)
        # Two points or so for each cell of the surface of a ball.
        count = max(int(8 * math.pi * scale**2), 8)
        points = list(SHAPES.values())[kind](random.random((count, 3)))
        if rotated:
            points = points @ rotation(random).T
        kept = max(int(count * (1 - occlusion * random.random())), 1)
        direction = random.standard_normal(3)
        points = points[np.argsort(points @ direction, kind="stable")[:kept]]
        room = np.maximum(extent - 2 * scale, 0)
        centre = (extent - room) / 2 + room * random.random(3)
        points = centre + scale * points + noise * random.standard_normal((kept, 3))
        parts.append(points)
        labels.append(np.full(kept, kind))
    stray = int(clutter * sum(map(len, parts)))
    parts.append(extent * random.random((stray, 3)))
    labels.append(np.full(stray, len(SHAPES)))
    # A shape is within the grid, but for its noise.
    return np.clip(np.concatenate(parts), 0, extent - 1e-3), np.concatenate(labels)
