import os
import time
from pathlib import Path

import pytest
import torch

from labpkg.foundations.text import ByteWindows, file_text, stdlib_text


def test_windows_stay_on_the_cpu():
    with torch.device("meta"):
        assert ByteWindows(b"abcdef", sequence_length=2)[1][0].device.type == "cpu"


def test_windows_are_the_text_shifted_by_one():
    text = bytes(range(1, 24))
    windows = ByteWindows(text, sequence_length=5)
    assert len(windows) == 4  # 22 targets hold four windows of 5
    for i in range(4):
        x, y = windows[i]
        assert bytes(x.tolist()) == text[5 * i : 5 * i + 5]
        assert bytes(y.tolist()) == text[5 * i + 1 : 5 * i + 6]
    x, y = windows[torch.tensor([2, 0])]
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x, torch.stack([windows[2][0], windows[0][0]]))
    assert torch.equal(y, torch.stack([windows[2][1], windows[0][1]]))
    with pytest.raises(IndexError):
        windows[4]


def test_windows_fit_to_the_last_byte():
    assert len(ByteWindows(b"abcdef", sequence_length=5)) == 1
    assert len(ByteWindows(b"abcde" * 2 + b"f", sequence_length=5)) == 2
    with pytest.raises(ValueError, match="5 bytes are too short"):
        ByteWindows(b"abcde", sequence_length=5)
    with pytest.raises(ValueError, match="sequence_length=0"):
        ByteWindows(b"abcde", sequence_length=0)
    with pytest.raises(ValueError, match=r"text is a str, .* call text\.encode\(\)"):
        ByteWindows("abcde", sequence_length=2)


def test_stdlib_text_is_source_split_by_file():
    began = time.process_time()
    train = stdlib_text("train", sequence_length=64)
    validation = stdlib_text("validation", sequence_length=64)
    assert time.process_time() - began < 2.0
    assert train.text.dtype == torch.uint8
    texts = [bytes(data.text.numpy()) for data in (train, validation)]
    assert sum(map(len, texts)) > 5_000_000
    assert 0.05 < len(texts[1]) / sum(map(len, texts)) < 0.2
    assert [Path(os.__file__).read_bytes() in text for text in texts].count(True) == 1
    assert not any(Path(torch.__file__).read_bytes() in text for text in texts)


def test_the_split_of_a_file_never_changes():
    # Pinned: python's own hash() would differ from process to process.
    validation = bytes(stdlib_text("validation").text.numpy())
    for name in ("os.py", "json/decoder.py", "tarfile.py", "xml/etree/ElementTree.py"):
        source = (Path(os.__file__).parent / name).read_bytes()
        assert (source in validation) == name.startswith(("tarfile", "xml"))


def test_file_text_is_split_by_position(tmp_path):
    path = tmp_path / "text.bin"
    path.write_bytes(bytes(range(200)))
    train = file_text(path, "train", sequence_length=10)
    validation = file_text(path, "validation", sequence_length=10)
    assert bytes(train.text.numpy()) == bytes(range(180))
    assert bytes(validation.text.numpy()) == bytes(range(180, 200))


def test_bad_files_raise(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none\.txt.*No such file"):
        file_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"cannot read .*Is a directory"):
        file_text(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    for split in ("train", "validation"):
        with pytest.raises(
            ValueError, match=f"empty', {split} part: the text is empty"
        ):
            file_text(tmp_path / "empty", split)
    (tmp_path / "short").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="short', validation part: 100 bytes"):
        file_text(tmp_path / "short", "validation")


def test_an_unknown_split_raises():
    with pytest.raises(ValueError, match="split='dev' is unknown; choose train or"):
        stdlib_text("dev")
