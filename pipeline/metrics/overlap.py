"""Counts of agreement, and the scores that follow from them.

Counts add up over images; scores do not. Where both masks are empty a score has no value: it is
null and `both_empty` says why, never 1 and never NaN.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.metrics.source import METRICS, Mask, Metric, Spacing

_COLUMNS = {
    "tp": pa.int64(),
    "fp": pa.int64(),
    "fn": pa.int64(),
    "dice": pa.float64(),
    "iou": pa.float64(),
    "both_empty": pa.bool_(),
}


def overlap(mask: Mask, reference: Mask | None, spacing: Spacing) -> dict[str, Any]:
    """True and false positives, false negatives, Dice 2tp/(2tp+fp+fn), IoU tp/(tp+fp+fn).

    Sources: Dice 1945, Jaccard 1912.
    """
    if reference is None:
        return dict.fromkeys(_COLUMNS)
    tp = int(np.count_nonzero(mask & reference))
    fp = int(np.count_nonzero(mask)) - tp
    fn = int(np.count_nonzero(reference)) - tp
    empty = tp + fp + fn == 0
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "dice": None if empty else 2 * tp / (2 * tp + fp + fn),
        "iou": None if empty else tp / (tp + fp + fn),
        "both_empty": empty,
    }


METRICS.register("overlap")(Metric(columns=_COLUMNS, compute=overlap))
