"""Draw the picture of the README with matplotlib: a printed page with an owl."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, PathPatch, Polygon, Rectangle
from matplotlib.path import Path as Curve
from PIL import Image

WIDTH, HEIGHT = 540, 360  # size of the HR image
INK, PAPER, RUST, GOLD = "#1c1a17", "#f6efe0", "#a8431f", "#e0a526"
PAGE = """The owl sees at dusk
what the day has left
unsaid: each barb of
every feather."""
SMALL = """Three sizes of print, with hairlines, serifs and
arcs: what a small copy loses comes back."""


def draw_scene(fine: int = 4) -> Image.Image:
    """Draw the scene ``fine`` times as large and reduce it, so that edges are smooth."""
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100 * fine, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")
    axes.set_facecolor(PAPER)
    draw_owl(axes, 132, 178)
    draw_page(axes, 276)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawing = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    return drawing.reduce(fine)


def draw_owl(axes, x, y):
    draw_sky(axes)
    draw_branch(axes)
    draw_body(axes, x, y)
    for side in (-1, 1):
        draw_wing(axes, x, y, side)
    axes.add_patch(Ellipse((x, y - 34), 142, 112, color="#6d4a2f", zorder=9))
    for side in (-1, 1):
        draw_ear(axes, x, y, side)
        draw_eye(axes, x + side * 32, y - 34)
    axes.add_patch(Polygon([(x - 8, y - 26), (x + 8, y - 26), (x, y + 2)], color="#d98d2b", ec=INK, lw=0.6, zorder=16))
    for side in (-1, 1):
        for toe in (-8, 0, 8):
            axes.add_patch(
                Ellipse((x + side * 24 + toe, y + 139), 7, 16, facecolor="#d98d2b", edgecolor=INK, lw=0.5, zorder=17)
            )
    axes.add_patch(Rectangle((14, 14), 240, 332, fill=False, ec=INK, lw=0.9, zorder=20))


def draw_sky(axes):
    """Draw a vertical gradient, the moon and stars."""
    depth = np.linspace(0, 1, 256)[:, None, None]
    sky = (1 - depth) * np.array([18, 32, 58]) + depth * np.array([236, 150, 92])
    axes.imshow(sky.astype(np.uint8), extent=(14, 254, 346, 14), aspect="auto", interpolation="bicubic", zorder=0)
    axes.add_patch(Circle((206, 66), 27, color="#f9e7b4", zorder=1))
    rng = np.random.default_rng(4)
    stars = rng.uniform((20, 18, 0.3), (248, 130, 1.0), (40, 3))
    for sx, sy, r in stars:
        axes.add_patch(Circle((sx, sy), r, color="white", zorder=1))


def draw_branch(axes):
    axes.add_patch(
        Polygon([(14, 318), (120, 310), (254, 322), (254, 334), (120, 324), (14, 332)], color="#3a2417", zorder=3)
    )
    for i in range(9):
        axes.plot([14, 120, 254], [320 + i * 1.3, 311.5 + i * 1.3, 323.5 + i * 1.1], color="#6b4630", lw=0.35, zorder=3)


def draw_body(axes, x, y):
    axes.add_patch(Ellipse((x, y + 58), 128, 184, color="#6d4a2f", zorder=4))
    axes.add_patch(Ellipse((x, y + 74), 88, 146, color="#d9bd92", zorder=5))
    for row in range(9):  # breast feathers
        for column in range(-4, 5):
            cx, cy = x + column * 10 + (row % 2) * 5, y + 26 + row * 13
            if ((cx - x) / 42) ** 2 + ((cy - y - 74) / 70) ** 2 < 0.92:
                t = np.linspace(0.15 * np.pi, 0.85 * np.pi, 20)
                axes.plot(cx + 6 * np.cos(t), cy + 7 * np.sin(t), color="#7a4e2b", lw=0.75, zorder=6)
                axes.plot([cx, cx], [cy, cy + 6], color="#7a4e2b", lw=0.4, zorder=6)


def draw_wing(axes, x, y, side):
    wing = Curve(
        [
            (x + side * 40, y + 4),
            (x + side * 84, y + 40),
            (x + side * 74, y + 140),
            (x + side * 30, y + 150),
            (x + side * 54, y + 100),
            (x + side * 50, y + 50),
            (x + side * 40, y + 4),
        ],
        [1, 4, 4, 4, 4, 4, 4],
    )
    patch = PathPatch(wing, facecolor="#4b311e", edgecolor=INK, lw=0.6, zorder=7)
    axes.add_patch(patch)
    for i in range(26):
        a = i / 25
        (line,) = axes.plot(
            [x + side * (40 + 4 * a), x + side * (78 - 30 * a)],
            [y + 6 + 120 * a, y + 40 + 112 * a],
            color="#b98a5a",
            lw=0.45,
            zorder=8,
        )
        line.set_clip_path(patch)


def draw_ear(axes, x, y, side):
    axes.add_patch(
        Polygon([(x + side * 66, y - 48), (x + side * 62, y - 108), (x + side * 22, y - 80)], color="#6d4a2f", zorder=9)
    )
    axes.add_patch(
        Polygon([(x + side * 60, y - 62), (x + side * 58, y - 96), (x + side * 34, y - 79)], color="#c9a36f", zorder=9)
    )


def draw_eye(axes, x, y):
    axes.add_patch(Circle((x, y), 35, color="#ead6ae", zorder=10))
    for angle in np.linspace(0, 2 * np.pi, 72, endpoint=False):  # facial disc
        inner, outer = 20, 34
        axes.plot(
            [x + inner * np.cos(angle), x + outer * np.cos(angle)],
            [y + inner * np.sin(angle), y + outer * np.sin(angle)],
            color="#7a4e2b",
            lw=0.45,
            zorder=11,
        )
    for radius, color in ((20, INK), (18, GOLD), (16.5, "#f3c649"), (11, INK)):
        axes.add_patch(Circle((x, y), radius, color=color, zorder=12))
    for angle in np.linspace(0, 2 * np.pi, 48, endpoint=False):
        axes.plot(
            [x + 11 * np.cos(angle), x + 17 * np.cos(angle)],
            [y + 11 * np.sin(angle), y + 17 * np.sin(angle)],
            color="#b5701a",
            lw=0.35,
            zorder=13,
        )
    axes.add_patch(Circle((x, y), 10.5, color=INK, zorder=14))
    axes.add_patch(Circle((x - 4, y - 5), 3.4, color="white", zorder=15))


def draw_page(axes, x):
    serif = {"family": "STIXGeneral", "color": INK, "va": "baseline"}

    def text(dy, words, size, **more):
        axes.text(x, dy, words, fontsize=size * 0.72, **(serif | more))

    text(58, "Night & Owl", 46, weight="bold")
    axes.plot([x, 526], [70, 70], color=INK, lw=1.3)
    axes.plot([x, 526], [74, 74], color=INK, lw=0.45)
    text(95, "A page of print, no. 27", 20, style="italic", color=RUST)
    axes.text(x, 103, PAGE, fontsize=24 * 0.72, linespacing=1.2, **(serif | {"va": "top"}))
    axes.text(x, 231, SMALL, fontsize=13 * 0.72, linespacing=1.2, **(serif | {"va": "top"}))
    # a fan of lines, a spiral and a ruler, all coarse enough to remain visible in the LR image
    for i, angle in enumerate(np.linspace(0, np.pi, 17)):
        inner, outer = 14, 46
        axes.plot(
            [x + 48 + inner * np.cos(angle), x + 48 + outer * np.cos(angle)],
            [340 - inner * np.sin(angle), 340 - outer * np.sin(angle)],
            color=RUST if i % 4 == 0 else INK,
            lw=0.8,
        )
    t = np.linspace(0, 6 * np.pi, 700)
    axes.plot(x + 140 + 1.7 * t * np.cos(t), 308 + 1.7 * t * np.sin(t), color=INK, lw=1.0)
    for i in range(9):
        axes.plot([x + 190 + 7 * i] * 2, [340, 336 - (14 if i % 4 == 0 else 8)], color=INK, lw=0.8)
    for i in range(6):
        axes.add_patch(Rectangle((x + 190 + 9.4 * i, 276), 9.4, 28, color=str(0.08 + 0.15 * i)))
    axes.plot([x + 190, x + 246.4, x + 246.4, x + 190, x + 190], [276, 276, 304, 304, 276], color=INK, lw=0.5)
