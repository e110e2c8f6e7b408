import dataclasses
import re
import subprocess
import sys

import numpy
import pytest

from labpkg.planning.shapes import ModelShape

SMALL = ModelShape(
    num_layers=2,
    width=12,
    num_heads=4,
    num_kv_heads=4,
    ffn_width=20,
    vocab_size=50,
    sequence_length=9,
    tied=True,
    gated_mlp=False,
)


def test_parameters_by_hand():
    block = 4 * 12 * 12 + 2 * 12 * 20 + 2 * 12
    assert SMALL.num_parameters == 50 * 12 + 9 * 12 + 2 * block + 12


def test_untied_output_adds_one_matrix():
    untied = dataclasses.replace(SMALL, tied=False)
    assert untied.num_parameters - SMALL.num_parameters == 50 * 12
    assert untied.flops_per_token == SMALL.flops_per_token


def test_gate_adds_one_matrix_per_layer():
    gated = dataclasses.replace(SMALL, gated_mlp=True)
    assert gated.num_parameters - SMALL.num_parameters == 2 * 12 * 20
    assert gated.flops_per_token - SMALL.flops_per_token == 6 * 2 * 12 * 20


def test_grouped_heads_narrow_keys_and_values():
    grouped = dataclasses.replace(SMALL, num_kv_heads=1)
    saved = 2 * 2 * 12 * (12 - 3)  # layers, keys and values, width, narrower rows
    assert SMALL.num_parameters - grouped.num_parameters == saved


def test_llama_2_7b_is_found_up_to_its_rotary_positions():
    llama = ModelShape(
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=32,
        ffn_width=11008,
        vocab_size=32000,
        sequence_length=4096,
        tied=False,
        gated_mlp=True,
    )
    assert llama.head_width == 128
    # 6,738,415,616 is the published count (Touvron et al. 2023, arXiv:2307.09288).
    assert llama.num_parameters - 4096 * 4096 == 6_738_415_616


def test_positions_that_are_learned_have_parameters():
    rotary = dataclasses.replace(SMALL, learned_positions=False)
    assert SMALL.num_parameters - rotary.num_parameters == 9 * 12
    assert rotary.flops_per_token == SMALL.flops_per_token


def test_flops_by_hand():
    block = 4 * 12 * 12 + 2 * 12 * 20
    forward = 2 * (2 * block + 50 * 12) + 2 * 4 * 9 * 12
    assert SMALL.flops_per_token == 3 * forward


@pytest.mark.parametrize("field", ["num_layers", "ffn_width", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 12.0, float("nan"), "12", None])
def test_sizes_are_whole_numbers_above_zero(field, value):
    with pytest.raises(
        ValueError, match=rf"{field}={re.escape(repr(value))} must be a whole number"
    ):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize("field", ["tied", "gated_mlp", "learned_positions"])
def test_choices_are_true_or_false(field):
    with pytest.raises(ValueError, match=f"{field}='no' must be True or False"):
        dataclasses.replace(SMALL, **{field: "no"})


def test_whole_numbers_of_other_libraries_are_sizes():
    assert dataclasses.replace(SMALL, num_layers=numpy.int64(2)) == SMALL


def test_sizes_that_do_not_divide_raise():
    with pytest.raises(ValueError, match="width=12 is not divisible by num_heads=5"):
        dataclasses.replace(SMALL, num_heads=5, num_kv_heads=5)
    with pytest.raises(ValueError, match="not divisible by num_kv_heads=3"):
        dataclasses.replace(SMALL, num_kv_heads=3)


def test_planning_needs_no_torch():
    code = (
        "import sys, labpkg.planning.shapes, labpkg.planning.cost;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
