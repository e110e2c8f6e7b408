"""Data, baseline and sample of a run."""

import itertools
import math
from collections import Counter

import pytest
import torch

import labpkg as lab
from labpkg.runs.config import TrainConfig
from labpkg.runs.tasks import bigram_loss, build_model, load_task, sample_text


def test_bigram_loss_equals_counting_by_hand():
    text, x, y = b"abracadabra", [97, 98, 122], [98, 114, 97]
    pairs, firsts = Counter(itertools.pairwise(text)), Counter(text[:-1])
    expected = -sum(
        math.log((pairs[a, b] + 1) / (firsts[a] + 256))
        for a, b in zip(x, y, strict=True)
    ) / len(x)
    data = torch.tensor(list(text), dtype=torch.uint8)
    loss = bigram_loss(data, torch.tensor(x), torch.tensor(y))
    assert loss == pytest.approx(expected, rel=1e-12)


def test_bigram_loss_counts_pairs_across_its_parts():
    text = torch.randint(256, (2**20 + 50,), dtype=torch.uint8)
    x, y = text[:-1].long(), text[1:].long()
    counts = torch.bincount(256 * x + y, minlength=2**16).view(256, 256) + 1.0
    expected = -(counts / counts.sum(1, keepdim=True)).log()[x, y].mean().item()
    assert bigram_loss(text, x, y) == pytest.approx(expected, rel=1e-6)


def test_the_task_of_a_file(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(bytes(range(256)) * 40)
    task = load_task(TrainConfig(data=str(file)))
    assert task.unit == "tokens"
    assert len(task.validation) == (1024 - 1) // 128
    before = task.fingerprint
    file.write_bytes(bytes(range(256)) * 39 + bytes(256))
    assert load_task(TrainConfig(data=str(file))).fingerprint == before  # validation
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert load_task(TrainConfig(data=str(file))).fingerprint != before


def test_the_bigram_baseline_of_the_standard_library_is_about_two_and_a_half_nats():
    assert 2.3 < load_task(TrainConfig()).baseline() < 2.7


def test_the_baseline_of_the_digits_is_that_of_ten_equal_classes():
    task = load_task(TrainConfig(data="digits"))
    assert task.baseline() == pytest.approx(math.log(10), abs=0.01)
    assert isinstance(build_model(TrainConfig(data="digits")), lab.MLP)


def test_a_language_model_writes_the_sample_of_a_seed():
    torch.manual_seed(0)
    model = lab.GPT(
        lab.GPTConfig(num_layers=1, width=8, num_heads=2, sequence_length=8)
    )
    device = torch.device("cpu")
    first = sample_text(model.generate, device=device, seed=3)
    assert first.startswith("def ")
    assert sample_text(model.generate, device=device, seed=3) == first
    assert sample_text(model.generate, device=device, seed=4) != first
