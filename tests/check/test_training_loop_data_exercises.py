from typing import Any

import pytest
import torch
from sklearn import metrics
from sklearn.preprocessing import StandardScaler

from labpkg import check
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.training_loop_data_exercises"
}


def standardize(train, test):
    mean, std = train.mean(0), train.std(0, correction=0)
    std[std == 0] = 1
    return (train - mean) / std, (test - mean) / std


def by_sklearn(train, test):
    scaler = StandardScaler().fit(train)
    return [torch.from_numpy(scaler.transform(part)) for part in (train, test)]


def divide(a, b):
    return a / b if b else 0.0


def binary_scores(predictions, targets):
    hits = int((predictions * targets).sum())
    precision = divide(hits, int(predictions.sum()))
    recall = divide(hits, int(targets.sum()))
    f1 = divide(2 * precision * recall, precision + recall)
    return (predictions == targets).double().mean(), precision, recall, f1


def scores_by_sklearn(predictions, targets):
    options: Any = {"average": "binary", "zero_division": 0}
    three = metrics.precision_recall_fscore_support(targets, predictions, **options)
    return metrics.accuracy_score(targets, predictions), *three[:3]


def merged_statistics(counts, means, variances):
    total, mean, squares = 0, torch.zeros_like(means[0]), torch.zeros_like(means[0])
    for count, m, v in zip(counts.tolist(), means, variances, strict=True):
        if count == 0:
            continue
        squares += count * v + (m - mean) ** 2 * total * count / (total + count)
        mean += (m - mean) * count / (total + count)
        total += count
    return mean, squares / total


RIGHT = [
    ("standardize", standardize),
    ("standardize", by_sklearn),
    ("binary_scores", binary_scores),
    ("binary_scores", scores_by_sklearn),
    ("binary_scores", lambda p, t: [*binary_scores(p, t)]),
    ("merged_statistics", merged_statistics),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def leaking(train, test):
    both = torch.cat([train, test])
    mean, std = both.mean(0), both.std(0, correction=0)
    std[std == 0] = 1
    return (train - mean) / std, (test - mean) / std


def each_its_own(train, test):
    return standardize(train, train)[0], standardize(test, test)[0]


def by_bessel(train, test):
    mean, std = train.mean(0), train.std(0)
    return (train - mean) / std, (test - mean) / std


def unguarded(train, test):
    mean, std = train.mean(0), train.std(0, correction=0)
    return (train - mean) / std, (test - mean) / std


def cancelling(train, test):
    mean = train.mean(0)
    std = (train.square().mean(0) - mean**2).clamp(min=0).sqrt()
    std[std == 0] = 1
    return (train - mean) / std, (test - mean) / std


def in_place(train, test):
    mean, std = train.mean(0), train.std(0, correction=0)
    train -= mean
    return train / std, (test - mean) / std


def change(answer, index, value):
    """Return an answer with one of its results replaced by value(results)."""

    def wrong(*arguments):
        results = list(answer(*arguments))
        results[index] = value(results)
        return results

    return wrong


def divides_by_zero(predictions, targets):
    hits = int((predictions * targets).sum())
    return 0.5, hits / int(predictions.sum()), hits / int(targets.sum()), 0.5


def tensor_ratios(predictions, targets):
    hits = (predictions * targets).sum()
    precision, recall = hits / predictions.sum(), hits / targets.sum()
    f1 = 2 * precision * recall / (precision + recall)
    return (predictions == targets).double().mean(), precision, recall, f1


def without_between(counts, means, variances):
    c = counts[counts > 0, None].double()
    mean = merged_statistics(counts, means, variances)[0]
    return mean, (c * variances[counts > 0]).sum(0) / c.sum()


def with_nan(counts, means, variances):
    c = counts[:, None] / counts.sum()
    mean = (c * means).sum(0)
    return mean, (c * (variances + (means - mean) ** 2)).sum(0)


def in_single(counts, means, variances):
    filled = counts > 0
    c = counts[filled, None] / counts.sum()  # integers: float32
    mean = (c * means[filled]).sum(0)
    return mean, (c * (variances[filled] + (means[filled] - mean) ** 2)).sum(0)


def of_squares(counts, means, variances):
    c = counts[counts > 0, None] / counts.sum()
    m, v = means[counts > 0], variances[counts > 0]
    mean = (c * m).sum(0)
    return mean, (c * (v + m**2)).sum(0) - mean**2


WRONG = [
    ("standardize", lambda a, b: a, "returns its argument"),
    ("standardize", leaking, "fit both on train alone"),
    ("standardize", each_its_own, "with its own mean and std"),
    ("standardize", by_bessel, "not over N - 1"),
    ("standardize", unguarded, "divide by 1 there"),
    ("standardize", in_place, "changes its argument train"),
    ("standardize", lambda a, b: (standardize(a, b)[0], b), "the test part is unchang"),
    ("standardize", lambda a, b: standardize(a, b)[0], "return a tuple of 2"),
    ("standardize", lambda a, b: standardize(a, b)[::-1], "subtract and divide, in"),
    ("standardize", cancelling, "subtract the mean before you square"),
    ("standardize", lambda a, b: 1 / 0, "raises ZeroDivisionError"),
    ("binary_scores", lambda p, t: p, "returns its argument"),
    ("binary_scores", lambda p, t: binary_scores(t, p), "precision and recall are"),
    ("binary_scores", lambda p, t: binary_scores(1 - p, 1 - t), "you count class 0"),
    (
        "binary_scores",
        change(binary_scores, 3, lambda s: (s[1] + s[2]) / 2),
        "harmonic",
    ),
    ("binary_scores", divides_by_zero, "and 0 where the divisor is 0"),
    ("binary_scores", tensor_ratios, "0/0 is nan"),
    ("binary_scores", lambda p, t: binary_scores(p, t)[0], "return a tuple of 4"),
    ("merged_statistics", lambda c, m, v: m, "returns its argument"),
    ("merged_statistics", lambda c, m, v: (m.mean(0), v.mean(0)), "treats every rank"),
    ("merged_statistics", without_between, "the means of the ranks differ too"),
    ("merged_statistics", with_nan, "0 x nan is nan"),
    ("merged_statistics", in_single, "is float32"),
    ("merged_statistics", of_squares, "difference of squares"),
    (
        "merged_statistics",
        change(merged_statistics, 1, lambda r: r[1].sqrt()),
        "not its root",
    ),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG
