"""A row becomes a job, with the defaults that the list of columns promises."""

import pytest

from labpkg.planning.configuration import Configuration
from labpkg.planning.job_columns import (
    JOB_COLUMNS,
    make_configuration,
    misspelled,
    read_flag,
    read_job,
    read_number,
    read_value,
    require_columns,
)
from labpkg.planning.shapes import ModelShape

REQUIRED = {
    "layers": "16",
    "width": "2048",
    "heads": "32",
    "vocab": "131072",
    "seq": "4096",
    "nodes": "1",
    "gpus_per_node": "1",
    "mbs": "2",
    "grad_acc": "4",
}


def job(**cells):
    return make_configuration(read_job({**REQUIRED, **cells}))


def test_the_columns_are_those_that_are_documented():
    documented = (
        *("layers", "width", "heads", "vocab", "seq", "nodes", "gpus_per_node"),
        *("mbs", "grad_acc", "kv_heads", "ffn", "tied", "gated_mlp", "dp", "tp", "pp"),
        *("cp", "vp", "sp", "zero", "recompute", "precision", "schedule", "hardware"),
    )
    assert documented == JOB_COLUMNS


def test_required_columns_are_enough():
    model = ModelShape(
        num_layers=16,
        width=2048,
        num_heads=32,
        num_kv_heads=32,
        ffn_width=8192,
        vocab_size=131072,
        sequence_length=4096,
        tied=False,
        gated_mlp=False,
    )
    expected = Configuration(
        model=model,
        gpus_per_node=1,
        micro_batch_size=2,
        grad_accum_steps=4,
        sequence_parallel=False,
    )
    assert job() == expected
    assert job(kv_heads=" ", ffn="", dp="", schedule="", other="x") == expected


def test_every_column_arrives():
    names = "kv_heads ffn tied gated_mlp nodes gpus_per_node dp tp pp cp vp sp zero"
    cells = ["8", "1024", "1", "True", "4", "8.0", "2", "4", "2", "2", "3", "0", "3"]
    full = job(
        **dict(zip(names.split(), cells, strict=True)),
        recompute="Full",
        precision="FP16",
        schedule="interleaved",
        hardware="a100",
    )
    model = full.model
    assert (model.num_kv_heads, model.ffn_width, model.tied) == (8, 1024, True)
    assert model.gated_mlp
    assert not model.learned_positions
    assert (full.dp, full.tp, full.pp, full.cp) == (2, 4, 2, 2)
    assert (full.world_size, full.num_virtual_stages, full.zero) == (32, 3, 3)
    assert (full.recompute, full.precision) == ("full", "fp16")
    assert full.schedule == "interleaved"
    assert full.sequence_parallel is False


def test_sequence_parallelism_follows_tp():
    two = {"gpus_per_node": "2", "tp": "2"}
    assert job(**two).sequence_parallel is True
    assert job(**two, sp="0").sequence_parallel is False
    assert job(sp="1").cuts_sequence  # of one rank, where it changes nothing


def test_more_stages_on_a_rank_interleave():
    four = {"gpus_per_node": "4", "pp": "4", "vp": "2"}
    assert job(**four).schedule == "interleaved"
    assert job(**four, schedule="zb-v").schedule == "zb-v"
    for schedule in ("gpipe", "zb-h1"):
        with pytest.raises(ValueError, match="has 1 stages on each rank, but vp=2"):
            job(**four, schedule=schedule)


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"layers": ""}, "column layers: blank, but there is no default"),
        ({"mbs": "-1"}, "column mbs: -1 is below 1; choose 1 to 1000000000"),
        ({"mbs": "0"}, "column mbs: 0 is below 1"),
        ({"mbs": "1e12"}, "column mbs: 1e12 is above 1000000000"),
        ({"layers": "1e9"}, "column layers: 1e9 is above 100000"),
        ({"mbs": "1e999"}, "column mbs: 1e999 is above"),
        ({"mbs": "2.5"}, "column mbs: '2.5' is not a whole number"),
        ({"width": "4k"}, "column width: '4k' is not a whole number"),
        ({"seq": "4,096"}, "column seq: '4,096' is not a whole number"),
        ({"seq": "1_000"}, "column seq: '1_000' is not a whole"),
        ({"tp": "nan"}, "column tp: 'nan' is not a whole"),
        ({"zero": "4"}, "column zero: 4 is above 3; choose 0 to 3"),
        ({"tied": "2"}, "column tied: '2' is neither 0 nor 1"),
        ({"recompute": "some"}, "column recompute: 'some' is unknown; choose one of"),
        ({"precision": "fp8"}, "choose one of bf16, fp16, fp32"),
        ({"schedule": "1b1f"}, "choose one of gpipe, 1f1b, interleaved"),
        ({"dp": "2"}, "dp=2 x tp=1 x pp=1 x cp=1 = 2 ranks, but nodes=1 x gpus"),
        ({"heads": "7"}, "width=2048 is not divisible by heads=7"),
        ({"kv_heads": "5"}, "heads=32 is not divisible by kv_heads=5"),
        ({"gpus_per_node": "3", "tp": "3"}, "heads=32 is not divisible by tp=3"),
        ({"gpus_per_node": "64", "pp": "64"}, "pp=64 x vp=1 stages are more than"),
    ],
)
def test_an_impossible_job_is_refused_in_the_words_of_the_table(cells, says):
    with pytest.raises(ValueError) as refused:
        job(**cells)
    assert says in str(refused.value)


def test_all_wrong_cells_are_named_once():
    with pytest.raises(ValueError) as refused:
        job(heads="x", width="", layers=" ", mbs="0", kv_heads="y")
    parts = str(refused.value).split("; column ")
    names = [part.removeprefix("column ").split(":")[0] for part in parts]
    assert names == ["layers, width", "heads", "mbs", "kv_heads"]


def test_a_single_value_has_its_default():
    assert read_value("ffn", {"width": "10"}) == 40
    assert read_value("ffn", {"width": "10", "ffn": "16"}) == 16
    assert read_value("sp", {}) is False
    assert read_value("sp", {"tp": "2"}) is True
    with pytest.raises(ValueError, match="blank, but"):
        read_value("kv_heads", {})


def test_numbers_and_flags():
    assert [read_number(t) for t in ("12", " 1.5 ", "-.5", "2e3", "+1.")] == [
        *(12, 1.5, -0.5, 2000, 1)
    ]
    for text in ("", "nan", "inf", "1_0", "0x10", "80GB", "1 2", "١"):
        with pytest.raises(ValueError, match="is not a number"):
            read_number(text)
    assert all(map(read_flag, ("1", "true", "Yes", "1.0")))
    assert not any(map(read_flag, ("0", "FALSE", "no", "0.0")))
    with pytest.raises(ValueError, match=r"'1\.5' is neither 0 nor 1"):
        read_flag("1.5")


def test_missing_columns_are_named_with_the_nearest():
    require_columns(REQUIRED, "t.csv")
    columns = [name for name in REQUIRED if name not in ("mbs", "layers", "vocab")]
    with pytest.raises(ValueError) as refused:
        require_columns([*columns, "Layers", "vocab_"], "t.csv")
    assert str(refused.value).startswith(
        "t.csv has no column layers, vocab, mbs (did you mean 'Layers' for layers, "
        "'vocab_' for vocab?); required are layers, width"
    )


def test_an_almost_right_column_is_noted():
    columns = [*REQUIRED, "Recompute", "gated mlp", "model", "note", "tp", "TP", ""]
    assert misspelled(columns) == [
        "column 'Recompute' is carried along, not read; did you mean 'recompute'?",
        "column 'gated mlp' is carried along, not read; did you mean 'gated_mlp'?",
    ]
