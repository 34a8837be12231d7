"""Perplexities of many methods in panels side by side, for print and for colour-blind readers."""

from __future__ import annotations

import io
import math
from typing import Any, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

from admin_fairseq.analysis.figures import GREY, style


def panels(
    lines: dict[tuple[str, str], tuple[Sequence[float], Sequence[float]]],
    unigram: float,
    xlabel: str,
    ylabel: str,
    ticks: Sequence[float] = (),
) -> bytes:
    """A PNG with a panel for each title and a labelled line for each method; perplexity is logarithmic, to 4 x unigram.

    ``lines`` maps (title, method) to (x, y). With ``ticks`` the x axis is logarithmic too, has these ticks, and the
    points are marked, those without a finite y by a cross at the top.
    """
    titles, methods = (list(dict.fromkeys(key[i] for key in lines)) for i in (0, 1))
    values = [y for _, ys in lines.values() for y in ys if math.isfinite(y)] + [unigram]
    low, top = min(values) * 0.9, min(max(values) * 1.3, 4 * unigram)
    size = (1 + 4.4 * len(titles), 4.6)
    figure, axes = pyplot.subplots(1, len(titles), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, title in zip(axes[0], titles):
        axis.set(title=title, xlabel=xlabel, yscale="log", ylim=(low, top))
        ends: list[Any] = []
        any_lost = False
        for i, method in enumerate(methods):
            xs, ys = lines.get((title, method), ((), ()))
            look = style(i)
            axis.plot(xs, ys, linewidth=1.5, marker="o" if ticks else None, markersize=4, **look)
            points = [(x, y) for x, y in zip(xs, ys) if math.isfinite(y)]
            if points:
                ends.append((points[-1][0], min(points[-1][1], top), method, look))
            lost = [x for x, y in zip(xs, ys) if ticks and not math.isfinite(y)]
            if lost:
                axis.plot(lost, [0.97] * len(lost), "x", color=look["color"], transform=axis.get_xaxis_transform())
                any_lost = True
        if any_lost:
            axis.text(0.02, 0.97, "x  not finite", fontsize=8, va="center", transform=axis.transAxes)
        if ticks:
            axis.set(xscale="log", xticks=ticks)
            axis.set_xticklabels(_with_room(ticks))
            axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlim(axis.get_xlim())  # fixes it for the labels: autoscaling waits until it is asked
        axis.axhline(unigram, **GREY)
        ends.append((axis.get_xlim()[1], unigram, "unigram", GREY))
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        _label(axis, ends)
    axes[0][0].set_ylabel(ylabel)
    return _png(figure)


def _with_room(ticks: Sequence[float]) -> list[str]:
    """Labels of the ticks of a logarithmic axis, empty where one would touch the label before it."""
    labels: list[str] = []
    last, room = -math.inf, 0.16 * (math.log(max(ticks)) - math.log(min(ticks)))
    for tick in ticks:
        has_room = math.log(tick) - last >= room
        labels.append(f"{tick:g}" if has_room else "")
        last = math.log(tick) if has_room else last
    return labels


def _label(axis: Any, ends: list[tuple[float, float, str, dict[str, Any]]]) -> None:
    """Write (x, y, text, look) to the right of the panel, each near the height of its point, none over another."""
    inside, gap = axis.transData + axis.transAxes.inverted(), 0.045
    ends = sorted(((*inside.transform((x, y)), text, look) for x, y, text, look in ends), key=lambda end: end[1])
    up, down = [], []  # pushed apart from below and from above: the mean of both stays near the points
    for _, y, *_ in ends:
        up.append(max(y, up[-1] + gap) if up else y)
    for _, y, *_ in reversed(ends):
        down.append(min(y, down[-1] - gap) if down else y)
    for i, ((x, y, text, look), *both) in enumerate(zip(ends, up, reversed(down))):
        height = min(max(sum(both) / 2, i * gap), 1 - (len(ends) - 1 - i) * gap)
        # thin and grey: nobody should take it for a curve that goes on
        leader = {"arrowstyle": "-", "linewidth": 0.5, "color": "0.7", "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}
        axis.annotate(
            *(text, (x, y), (1.06, height), "axes fraction", "axes fraction", leader),
            fontsize=8,
            va="center",
            color=look["color"],
            annotation_clip=False,
        )


def against_depth(table: Sequence[dict[str, Any]]) -> bytes:
    """A PNG with tokens per second and peak memory by number of layers, a labelled line for each method.

    ``table`` has rows with depth, layers, method, max_tokens, tokens_per_s and memory_mb; of several batch sizes the
    first is drawn.
    """
    table = [row for row in table if row["max_tokens"] == table[0]["max_tokens"]]
    wanted = {"tokens_per_s": ("target tokens a second", 1), "memory_mb": ("peak memory, GiB", 1024)}
    wanted = {key: value for key, value in wanted.items() if any(row.get(key) for row in table)}
    size = (1 + 4.4 * len(wanted), 4.2)
    figure, axes = pyplot.subplots(1, len(wanted), figsize=size, squeeze=False, layout="constrained")
    depths = sorted({(row["layers"], row["depth"]) for row in table})
    for axis, (key, (label, unit)) in zip(axes[0], wanted.items()):
        axis.set(xlabel="layers (encoder-decoder)", ylabel=label)
        ends: list[Any] = []
        for i, method in enumerate(dict.fromkeys(row["method"] for row in table)):
            points = sorted(
                (row["layers"], row[key] / unit) for row in table if row["method"] == method and row.get(key)
            )
            look = style(i)
            axis.plot(*zip(*points), linewidth=1.5, marker="o", markersize=4, **look)
            ends.append((*points[-1], method, look))
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.set_xticks([layers for layers, _ in depths], [depth for _, depth in depths])
        axis.set_xlim(axis.get_xlim())
        _label(axis, ends)
    return _png(figure)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, dpi=150, format="png")
    pyplot.close(figure)
    return out.getvalue()
