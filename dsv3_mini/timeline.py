"""The ops of a schedule, simulated or executed, drawn as boxes over time.

Generated from chapters/08_dualpipe.ipynb; edit the chapter, not this file.
"""

from collections import defaultdict
from collections.abc import Iterable

from dsv3_mini.schedule import Span

# Why does a pipeline idle?


def draw_timeline(ax, spans: Iterable[Span], numbers: bool = True) -> None:
    """Draw ops as boxes, a row for each rank: F blue, B orange, I light orange, W green; a pair is split across.

    Numbers are micro-batches; those of direction 1 have a prime.
    """
    colors = {"F": "#0072B2", "B": "#E69F00", "I": "#F6CF7F", "W": "#009E73"}
    spans, boxes = list(spans), defaultdict(list)
    for span in spans:
        height, width = 0.86 / len(span.op), span.end - span.start
        for i, chunk in enumerate(span.op):
            bottom = span.rank - 0.43 + i * height
            boxes[chunk.kind, bottom, height].append((span.start, width))
            if numbers:
                style = dict(fontsize=6.5, ha="center", va="center", color="white" if chunk.kind in "FW" else "black")
                text = f"{chunk.idx}\N{PRIME}" if chunk.direction else chunk.idx
                ax.text(span.start + width / 2, bottom + height / 2, text, **style)
    for (kind, bottom, height), ranges in boxes.items():
        ax.broken_barh(ranges, (bottom, height), facecolor=colors[kind], edgecolor="white", linewidth=0.5)
    n_ranks = 1 + max(span.rank for span in spans)
    limits = dict(xlim=(0, max(span.end for span in spans)), ylim=(n_ranks - 0.5, -0.5))
    ax.set(yticks=range(n_ranks), ylabel="rank", **limits)
    ax.grid(False)
    ax.set_rasterization_zorder(5)  # in an SVG, hundreds of boxes weigh less as pixels
