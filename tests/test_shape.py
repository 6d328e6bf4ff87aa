"""Models' sizes; those that are read from a project's base are in test_doctor.py."""

import pytest

from prefbuild.shape import gguf_bits, guess_shape, shape_of_config


@pytest.mark.parametrize(
    ("name", "bits"),
    [("x.Q4_1.gguf", 5.0), ("m-q8_0.gguf", 8.5), ("m-BF16.gguf", 16.0), ("m.f32.gguf", 32.0), ("m-Q4_K_M.gguf", 4.5),
     ("m.gguf", 4.5)],
)  # fmt: skip
def test_a_ggufs_name_says_its_bits(name: str, bits: float) -> None:
    assert gguf_bits(name) == bits


def test_a_guess_adds_up() -> None:
    shape = guess_shape(7_000_000_000, "")
    assert 12 * shape.layers * shape.hidden**2 == pytest.approx(7e9, rel=0.05)


def test_linear_layers_are_those_of_the_architecture() -> None:
    config = {
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
        "head_dim": 3,
    }
    shape = shape_of_config({"text_config": config, "vocab_size": 5}, 1000)
    assert shape.linear == [(8, 12), (8, 6), (8, 6), (12, 8), (8, 20), (8, 20), (20, 8)]
    assert shape.linear_weights == shape.layers * (2 * 96 + 2 * 48 + 3 * 160)
