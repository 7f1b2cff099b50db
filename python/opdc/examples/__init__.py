"""Notebooks that show opdc at work, with what they share: the look of their figures.

`five_minutes.ipynb`: the losses on one position, in pictures. `from_scratch.ipynb`: on-policy
distillation of a small language model, step by step. `behaviour_policy.ipynb`: who writes the
rollouts. They run offline on one core, in Jupyter, with what `pip install '.[demo,trl]'` brings.
"""

from __future__ import annotations

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
except ImportError as error:
    raise ImportError("opdc.examples needs matplotlib: pip install '.[demo]'") from error

# One colour for each role, in all figures.
STUDENT, TEACHER, BLEND = "#1f5fa8", "#d9822b", "#3a8f5c"
QUIET = "#a7adb5"  # what stands behind: a start, a reference
INK = "#30343a"  # text and axes
# From nothing to much; and from less through nothing to more.
SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#8fb4dc", STUDENT, "#0b2545"])
SIGNED = LinearSegmentedColormap.from_list("signed", ["#b3361e", "#f3f3f3", STUDENT])


def set_style() -> None:
    """Matplotlib's defaults for the figures of the notebooks."""
    plt.rcParams.update(
        {
            "axes.axisbelow": True,
            "axes.edgecolor": INK,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.labelcolor": INK,
            "axes.labelsize": 9,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": INK,
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "font.size": 9,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.8,
            "savefig.bbox": "tight",
            "xtick.color": INK,
            "xtick.labelsize": 8,
            "ytick.color": INK,
            "ytick.labelsize": 8,
        }
    )


def name_ids(axes: Axes, words: list[str], axis: str = "x") -> None:
    """Write words at the places 0, 1, … of an axis."""
    if axis == "x":
        axes.set_xticks(range(len(words)), words, rotation=60, ha="right", rotation_mode="anchor")
    else:
        axes.set_yticks(range(len(words)), words)
