"""A prediction as a sum that can be read: each term with its formula and its source.

Standard library only. Chapters: planning/memory, planning/planner.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Term(NamedTuple):
    """One summand of a prediction.

    Attributes:
        name: What it is, such as `gradients`.
        value: Bytes or seconds.
        formula: How it is computed, in letters of the notation, with the numbers in.
        source: Where the formula or its constants come from.
    """

    name: str
    value: float
    formula: str
    source: str


def total(terms: Iterable[Term]) -> float:
    """Return the sum of terms, which all have one unit.

    Args:
        terms: The summands.
    """
    return math.fsum(term.value for term in terms)
