import dataclasses

import pytest

from labpkg.planning.models import MODEL_SHAPES, find_model

# Numbers of parameters of the published weights (Hugging Face, model pages).
WITHOUT_BIASES = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
}
# GPT-2: Keras' registry of presets. MPT: MosaicML's table of training benchmarks.
WITH_BIASES = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "mpt-125m": 125_311_488,
    "mpt-350m": 355_985_408,
    "mpt-760m": 760_470_528,
    "mpt-1b": 1_315_950_592,
    "mpt-3b": 2_651_837_440,
    "mpt-7b": 6_658_859_008,
    "mpt-13b": 12_853_954_560,
    "mpt-30b": 29_975_214_080,
    "mpt-70b": 64_862_437_376,
}
# What the papers call them: Brown et al. 2020; Korthikanti et al. 2022.
NAMED = {
    "gpt3-175b": 175e9,
    "megatron-22b": 22e9,
    "megatron-175b": 175e9,
    "megatron-530b": 530e9,
    "megatron-1t": 1e12,
}


def test_every_model_is_held_to_a_published_number():
    assert set(MODEL_SHAPES) == {*WITHOUT_BIASES, *WITH_BIASES, *NAMED}


@pytest.mark.parametrize("name", WITHOUT_BIASES)
def test_parameters_are_exactly_those_published(name):
    assert MODEL_SHAPES[name].num_parameters == WITHOUT_BIASES[name]


@pytest.mark.parametrize("name", WITH_BIASES)
def test_biases_are_all_that_is_missing(name):
    shape = MODEL_SHAPES[name]
    biases = (11 * shape.num_layers + 1) * shape.width
    assert shape.num_parameters + biases == WITH_BIASES[name]
    assert biases / shape.num_parameters < 1e-3


@pytest.mark.parametrize("name", NAMED)
def test_parameters_are_those_of_the_name(name):
    assert MODEL_SHAPES[name].num_parameters == pytest.approx(NAMED[name], rel=1e-2)


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_heads_are_as_wide_as_published(name):
    # Parameters do not tell, unless keys and values have fewer heads.
    narrow = {"gpt2": 64, "gpt2-medium": 64, "gpt2-large": 64, "gpt2-xl": 64}
    narrow |= {"mpt-125m": 64, "mpt-350m": 64, "megatron-22b": 96}
    wide = {"megatron-530b": 160, "megatron-1t": 160}
    assert MODEL_SHAPES[name].head_width == {**narrow, **wide}.get(name, 128)


def test_vocabularies_of_models_named_by_their_size():
    # GPT-3 has the one of GPT-2; Megatron's is padded to whole tiles.
    assert MODEL_SHAPES["gpt3-175b"].vocab_size == 50257
    for name in ("megatron-22b", "megatron-175b", "megatron-530b", "megatron-1t"):
        assert MODEL_SHAPES[name].vocab_size == 51200


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("gpt2-xl", 1024),
        ("gpt3-175b", 2048),
        ("llama-65b", 2048),
        ("llama2-70b", 4096),
        ("llama3-405b", 8192),
        ("mistral-7b", 8192),
        ("mpt-30b", 2048),
        ("megatron-1t", 2048),
    ],
)
def test_sequences_are_as_long_as_in_training(name, length):
    assert MODEL_SHAPES[name].sequence_length == length


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama2-70b", "llama2-70b"),
        ("llama-70b", "llama2-70b"),
        ("Llama 2 70B", "llama2-70b"),
        ("llama-8b", "llama3-8b"),
        ("llama-30b", "llama-33b"),
        ("llama-405b", "llama3-405b"),
        ("Llama-3.1-405B", "llama3-405b"),
        ("llama_3_8b", "llama3-8b"),
        ("GPT-2", "gpt2"),
        ("gpt-2-xl", "gpt2-xl"),
        ("gpt3", "gpt3-175b"),
        ("GPT2 small", "gpt2"),
        (" Mistral 7B ", "mistral-7b"),
    ],
)
def test_names_are_found_however_they_are_spelled(name, found):
    assert find_model(name) is MODEL_SHAPES[found]


def test_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"'llama-71b' is unknown.*llama-7b.*sizes"):
        find_model("llama-71b")
    with pytest.raises(ValueError, match=r"gpt2, .*megatron-1t"):
        find_model("~")


def test_the_list_cannot_be_changed():
    with pytest.raises(TypeError):
        MODEL_SHAPES["mine"] = MODEL_SHAPES["gpt2"]  # pyright: ignore[reportIndexIssue]
    longer = dataclasses.replace(MODEL_SHAPES["llama3-8b"], sequence_length=131072)
    assert longer.num_parameters == MODEL_SHAPES["llama3-8b"].num_parameters
