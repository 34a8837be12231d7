"""Whether a training run diverged, judged by its loss without label smoothing, averaged over neighbouring log lines.

  non-finite  the loss or its gradient became infinite or NaN (after this update)
  loss-scale  the fp16 loss scale shrank to its minimum, at which fairseq stops (after this update)
  plateau     it ended no better than a model without input, and has not improved since this update
  collapsed   it made use of its input until this update, then rose back to where it makes none, and stayed
  exploded    it never made use of its input, and ended clearly above its lowest loss, which it had at this update
  slow        it ended no better than a model without input, but was still falling, or has too few updates to tell
  trained     none of these

A model without input ignores the source and the words before. It reaches the perplexity of the target words'
frequencies (unigram), and at best that of their frequencies at each position of the sentence (positional). A run that
ends above the second has learnt nothing from its input. Both are computed from the training targets.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Iterable

import numpy as np

DIVERGED = ("plateau", "collapsed", "exploded", "non-finite", "loss-scale")
FLAT = 0.05  # nats: a perplexity that falls by less than 5% in the last third of the updates has stopped falling
ENOUGH = 20  # points of the curve, to call what it ends in a plateau
CLEARLY = 0.2  # nats below the positional level, or above the lowest loss: more than noise


def context_free_perplexities(sentences: Iterable[np.ndarray], vocabulary: int) -> tuple[float, float]:
    """The lowest perplexities that models without input can reach on these targets: (unigram, positional).

    ``sentences`` are arrays of token ids [length], each with its sentence end. The first model knows every token's
    frequency, the second its frequency at each position (from the 256th on, taken together): the exponentials of the
    entropies H(token) and H(token | position).
    """
    counts, sentences = np.zeros((256, vocabulary), dtype=np.int64), iter(sentences)
    while chunk := list(itertools.islice(sentences, 100_000)):
        positions = np.concatenate([np.minimum(np.arange(len(sentence)), 255) for sentence in chunk])
        cells = positions * vocabulary + np.concatenate(chunk)
        counts += np.bincount(cells, minlength=counts.size).reshape(counts.shape)

    def entropy(frequencies: np.ndarray) -> float:
        shares = frequencies[frequencies > 0] / frequencies.sum()
        return float(-(shares * np.log(shares)).sum())

    return math.exp(entropy(counts.sum(0))), math.exp(entropy(counts) - entropy(counts.sum(1)))


def smooth(losses: list[float]) -> list[float]:
    """Mean over the neighbouring twentieth of the curve on either side."""
    half = len(losses) // 20
    return [statistics.fmean(losses[max(i - half, 0) : i + half + 1]) for i in range(len(losses))]


def final_loss(losses: list[float]) -> float:
    """Mean over the last tenth of the curve."""
    return statistics.fmean(losses[-max(len(losses) // 10, 1) :])


def judge(curve: list[tuple[int, float]], positional: float, error: str = "") -> tuple[str, int | None]:
    """The verdict on a training run, and the update that goes with it.

    ``curve`` holds (update, training loss in nats), ``positional`` is the positional perplexity, ``error`` the text of
    the FloatingPointError with which fairseq stopped, if it did. The verdicts are those of this module's docstring.
    """
    finite = list(itertools.takewhile(lambda point: math.isfinite(point[1]), curve))
    if error or len(finite) < len(curve):
        return "loss-scale" if "loss scale" in error else "non-finite", finite[-1][0] if finite else 0
    updates, losses = zip(*curve)
    smoothed, final, level = smooth(losses), final_loss(losses), math.log(positional)
    if final < level:
        return "trained", None
    if min(smoothed) < level - CLEARLY:
        return "collapsed", max(update for update, loss in zip(updates, smoothed) if loss < level)
    # the mean over the last tenth lags behind a loss that is falling steeply, the end of the smoothed curve does not
    if min(final, smoothed[-1]) > min(smoothed) + CLEARLY:
        return "exploded", updates[losses.index(min(losses))]
    if len(curve) < ENOUGH or smoothed[len(smoothed) * 2 // 3] - final > FLAT:
        return "slow", None
    return "plateau", next(update for update, loss in zip(updates, smoothed) if loss < final + FLAT)
