import math
from itertools import takewhile
from typing import Any

import pytest
import torch
from packaging.version import Version

from labpkg import check
from labpkg.check import setup_exercises
from labpkg.processes.mesh import choose_placement
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.setup_exercises"
}


def threads_per_rank(num_cores, num_ranks):
    return 1 if num_ranks > num_cores else math.floor(num_cores / num_ranks)


def rank_variables(rank, ranks_per_node, num_nodes):
    node, local_rank = divmod(rank, ranks_per_node)
    return num_nodes * ranks_per_node, node, local_rank


def new_enough(found, oldest):
    return Version(found.split("+")[0]) >= Version(oldest)


def ranks_per_gpu(num_ranks, num_gpus, asked):
    counts = [0] * num_gpus
    if asked or num_ranks <= num_gpus:
        for rank in range(num_ranks):
            counts[rank % num_gpus] += 1
    return counts


def visible_gpus(value, num_gpus):
    if value is None:
        return list(range(num_gpus))
    numbers = [int(text) for text in value.split(",") if text]
    return list(takewhile(lambda gpu: 0 <= gpu < num_gpus, numbers))


RIGHT = [threads_per_rank, rank_variables, new_enough, ranks_per_gpu, visible_gpus]


@pytest.mark.parametrize("answer", RIGHT)
def test_right_answers_pass(answer):
    result = EXERCISES[answer.__name__](answer)
    assert result, result.message
    assert result.cases >= 10


def parts(version, build=False):
    version = version if build else version.split("+")[0]
    return [int(part) for part in version.replace("+cu", ".").split(".")]


WRONG = [
    ("threads_per_rank", lambda c, n: c, "default: each rank takes all cores"),
    ("threads_per_rank", lambda c, n: n, "returns its argument"),
    ("threads_per_rank", lambda c, n: c // n, "0 threads cannot work"),
    ("threads_per_rank", lambda c, n: math.ceil(c / n), "rounded up"),
    ("threads_per_rank", lambda c, n: max(1.0, c / n), "round down"),
    ("threads_per_rank", lambda c, n: 1, "leaves cores idle"),
    ("threads_per_rank", lambda c, n: max(1, n // c), "not the ranks among"),
    ("rank_variables", lambda r, k, m: r, "returns its argument"),
    ("rank_variables", lambda r, k, m: (k * m, r % k, r // k), "the order is"),
    ("rank_variables", lambda r, k, m: (k, r // k, r % k), "of all nodes"),
    ("rank_variables", lambda r, k, m: (k * m, r // k, r), "starts again at 0"),
    ("rank_variables", lambda r, k, m: (k * m, r % m, r // m), "node by node"),
    ("rank_variables", lambda r, k, m: (k * m, 1 + r // k, r % k), "start at 0"),
    ("new_enough", lambda f, o: f, "returns its argument"),
    ("new_enough", lambda f, o: f >= o, "as text"),
    ("new_enough", lambda f, o: f.split(".") >= o.split("."), "as text"),
    ("new_enough", lambda f, o: float(f[:4]) >= float(o[:4]), "the decimal number"),
    ("new_enough", lambda f, o: Version(f) > Version(o), "the same version"),
    ("new_enough", lambda f, o: not new_enough(f, o), "`oldest` is at least `found`"),
    ("new_enough", lambda f, o: parts(f)[0] >= parts(o)[0], "only the first number"),
    ("new_enough", lambda f, o: parts(f) >= parts(o), "a missing number counts"),
    (
        "new_enough",
        lambda f, o: [*parts(f, build="cu" in f), 0] >= parts(o),
        "names the build",
    ),
    (
        "new_enough",
        lambda f, o: all(map(int.__ge__, [*parts(f), 0], parts(o))),
        "only if all before it are equal",
    ),
    ("ranks_per_gpu", lambda n, G, asked: n, "returns its argument"),
    ("ranks_per_gpu", lambda n, G, asked: ranks_per_gpu(n, G, G > 0), "use the CPU"),
    (
        "ranks_per_gpu",
        lambda n, G, asked: (
            ranks_per_gpu(n, G, True) if asked else [1] * min(n, G) + [0] * (G - n)
        ),
        "one kind of device",
    ),
    (
        "ranks_per_gpu",
        lambda n, G, asked: ranks_per_gpu(n, G, False),
        "a request shares them",
    ),
    (
        "ranks_per_gpu",
        lambda n, G, asked: [n // G] * G if asked or n == G else [0] * G,
        "more GPUs than ranks is fine",
    ),
    (
        "ranks_per_gpu",
        lambda n, G, asked: (
            torch.bincount(torch.arange(n) // math.ceil(n / G), minlength=G).tolist()
            if G and (asked or n <= G)
            else [0] * G
        ),
        "ranks take turns",
    ),
    (
        "ranks_per_gpu",
        lambda n, G, asked: [n * (asked or n <= G)] * (G > 0) + [0] * (G - 1),
        "every rank on GPU 0",
    ),
    ("visible_gpus", lambda v, G: v, "returns its argument"),
    ("visible_gpus", lambda v, G: sorted(visible_gpus(v, G)), "not the smallest"),
    (
        "visible_gpus",
        lambda v, G: list(range(len(visible_gpus(v, G)))),
        "return the machine's",
    ),
    ("visible_gpus", lambda v, G: visible_gpus(v or "", G), "not set is not empty"),
    ("visible_gpus", lambda v, G: visible_gpus(v or None, G), "an empty text hides"),
    (
        "visible_gpus",
        lambda v, G: [int(gpu) for gpu in v.split(",")] if v else visible_gpus(v, G),
        "-1 is no GPU",
    ),
    (
        "visible_gpus",
        lambda v, G: (
            [int(gpu) for gpu in v.split(",") if 0 <= int(gpu) < G]
            if v
            else visible_gpus(v, G)
        ),
        "the list ends at the first number",
    ),
    (
        "visible_gpus",
        lambda v, G: visible_gpus(v, G if v is None else 99),
        "does not have ends the list",
    ),
    ("visible_gpus", lambda v, G: len(visible_gpus(v, G)), "how many"),
    ("visible_gpus", lambda v, G: list(map(str, visible_gpus(v, G))), "not text"),
    (
        "visible_gpus",
        lambda v, G: (
            visible_gpus(v, G)
            if v is None or "-" in v
            else visible_gpus(",".join(v.replace(",", "")), G)
        ),
        "two digits",
    ),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


@pytest.mark.parametrize("case", setup_exercises._RANKS_PER_GPU.cases, ids=str)
def test_the_library_places_ranks_alike(case, monkeypatch):
    num_ranks, num_gpus, asked = case
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    place = choose_placement(num_ranks, device="cuda" if asked else None)
    assert (place.device == "cuda") == (sum(ranks_per_gpu(*case)) == num_ranks)


@pytest.mark.parametrize("case", setup_exercises._VISIBLE_GPUS.cases, ids=str)
def test_torch_reads_the_variable_alike(case, monkeypatch):
    value, num_gpus = case
    if value is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    there = takewhile(lambda gpu: gpu < num_gpus, torch.cuda._parse_visible_devices())
    assert list(there) == visible_gpus(value, num_gpus)
