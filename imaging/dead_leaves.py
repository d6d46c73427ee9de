"""Generated images of random overlapping shapes, for training where no photos are available.

Occlusion makes edges of every contrast, direction and curvature, and radii distributed as r^-3
give them the statistics of natural images at every scale (Lee, Mumford and Huang, "Occlusion
models for natural images", 2001). Restoration networks trained on such images come close to
networks trained on photos (Achddou et al., 2021).
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

DEAD_LEAVES = "dead-leaves"  # given instead of a folder
COUNT = {"train": 91, "test": 5}


def dead_leaves(role: str, count: int | None = None, size: int = 252) -> dict[str, Image.Image]:
    """Generate images, the same each time for the same arguments.

    Parameters
    ----------
    role : "train" or "test"; the two share no image
    count : number of images (default: COUNT[role])
    size : width and height in pixels

    Returns
    -------
    RGB images by name
    """
    seeds = ([int(role == "test"), i] for i in range(count or COUNT[role]))
    return {f"leaves{seed[1] + 1}": draw_leaves(np.random.default_rng(seed), size) for seed in seeds}


def draw_leaves(rng: np.random.Generator, size: int, shapes: int = 3500, supersampling: int = 3) -> Image.Image:
    """Draw one image of ellipses and polygons, larger at first and then reduced for smooth edges."""
    smallest, largest = 2.0, 120.0  # radii in pixels
    u = rng.random(shapes)
    radii = (u / smallest**2 + (1 - u) / largest**2) ** -0.5 * supersampling
    stretch = np.exp(rng.uniform(-1.2, 1.2, shapes))
    centers = rng.uniform(0, size * supersampling, (shapes, 2))
    gray = rng.uniform(30, 225) + rng.normal(0, 45, (shapes, 1))
    colors = np.clip(gray + rng.normal(0, 30, 3) + rng.normal(0, 30, (shapes, 3)), 0, 255).astype(np.uint8)
    corners = rng.choice([3, 4, 5, 6, 32], shapes)
    phases, turns = rng.uniform(0, 2 * math.pi, (2, shapes))
    canvas = Image.new("RGB", (size * supersampling, size * supersampling), tuple(colors[0].tolist()))
    draw = ImageDraw.Draw(canvas)
    for i in range(shapes):
        angles = phases[i] + np.arange(corners[i]) * (2 * math.pi / corners[i])
        x, y = radii[i] * stretch[i] * np.cos(angles), radii[i] / stretch[i] * np.sin(angles)
        cos, sin = np.cos(turns[i]), np.sin(turns[i])
        points = centers[i] + np.stack([x * cos - y * sin, x * sin + y * cos], 1)  # (corners, 2)
        draw.polygon(points.ravel().tolist(), fill=tuple(colors[i].tolist()))
    return canvas.reduce(supersampling).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.7)))
