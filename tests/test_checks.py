"""What is accepted from a file: fields and tensors, each refused in one line that names it."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from training.files import checks

# -- fields ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, checks.T_LIMIT + 1, 10**9, 8.0, True, "8", None, [8], math.nan])
def test_time_steps_are_whole_numbers_in_their_range(value):
    with pytest.raises(ValueError, match=rf"^T is .*, not a whole number from 1 to {checks.T_LIMIT}$"):
        checks.whole_number("T", value, 1, checks.T_LIMIT)
    assert checks.whole_number("T", 8, 1, checks.T_LIMIT) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1.0", None, 2.5, 1j, torch.ones(())])
def test_numbers_are_finite_and_in_their_range(value):
    with pytest.raises(ValueError, match=r"^seconds is .*, not a finite number from 0 to 2$"):
        checks.number("seconds", value, 0, 2)
    assert [checks.number("seconds", value, 0, 2) for value in (0, 2.0)] == [0, 2.0]


@pytest.mark.parametrize("value", ["two\nlines", "x" * 1001, b"bytes", 1, "\x1b[31m"])
def test_texts_are_short_and_of_one_line(value):
    with pytest.raises(ValueError, match=r"^run is .*, not a text of one line") as caught:
        checks.text("run", value)
    assert len(str(caught.value)) < 200
    assert checks.text("run", "lr-1e-4") == "lr-1e-4"


def test_texts_for_a_message():
    assert checks.short("fc.1\x1b[31m\n") == "fc.1?[31m?"
    assert checks.short("x" * 101) == "x" * 97 + "..."
    assert checks.short("x" * 100) == "x" * 100


def test_keys_are_all_and_only_those_expected():
    checks.keys("layers", ["a", "b"], ("b", "a"))
    with pytest.raises(ValueError, match=r"^layers lacks b$"):
        checks.keys("layers", ["a"], ["a", "b"])
    with pytest.raises(ValueError, match=r"^layers has the unknown 1, b$"):
        checks.keys("layers", ["a", "b", 1], ["a"])


# -- tensors ---------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


with warnings.catch_warnings(action="ignore"):  # deprecated, but torch.load still makes them
    QUANTISED = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


ODD = {
    "values .* not finite": torch.tensor([[1.0, math.nan, 0.0], [0.0, 0.0, 0.0]]),
    "values that are not finite": torch.tensor([[1.0, -math.inf, 0.0], [0.0, 0.0, 0.0]]),
    r"a view with strides \[0, 0\]": torch.ones(1).expand(2, 3),
    r"a view with strides \[1, 1\]": torch.ones(4).as_strided((2, 3), (1, 1)),
    r"a view with strides \[1, 2\]": torch.ones(3, 2).t(),
    "of 400 bytes, not 24": torch.ones(100)[:6].view(2, 3),
    "not a dense tensor": torch.ones(2, 3).to_sparse(),
    "on meta": torch.ones(2, 3, device="meta"),
    "torch.qint8": QUANTISED,
    "of type Subclass": torch.ones(2, 3).as_subclass(Subclass),
    "of type ndarray": np.ones((2, 3), np.float32),
    "of type list": [[1.0] * 3] * 2,
    r"float64 \[2, 3\], not float32 \[2, 3\]": torch.ones(2, 3, dtype=torch.float64),
    r"float32 \[3, 2\], not float32 \[2, 3\]": torch.ones(3, 2),
}


@pytest.mark.parametrize("message", ODD)
def test_odd_tensors(message):
    with pytest.raises(ValueError, match=f"^w is .*{message}|^w has {message}"):
        checks.tensor("w", ODD[message], (2, 3), torch.float32)


def test_views_that_negate_are_not_plain():
    negative = torch.ones(2, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    for value in (negative, torch.ones(2, dtype=torch.complex64).conj()):
        with pytest.raises(ValueError, match="is a view"):
            checks.tensor("w", value)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 3),
        nn.Parameter(torch.ones(2)),
        torch.zeros(()),
        torch.zeros(0, 4),
        torch.tensor([1, -1], dtype=torch.int8),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(1, 3).t(),  # a stride along an axis of length 1 means nothing
    ],
)
def test_plain_tensors(value):
    assert checks.tensor("w", value) is value
    assert checks.tensor("w", value, value.shape, value.dtype) is value


def test_the_tensors_of_a_state():
    expected = {"a": torch.empty(2, device="meta"), "b": torch.empty(2, device="meta")}
    checks.tensors("the state", {"b": torch.ones(2), "a": torch.ones(2)}, expected)
    shared = torch.ones(2)
    with pytest.raises(ValueError, match=r"^b shares its memory with a$"):
        checks.tensors("the state", {"a": shared, "b": shared.view(2)}, expected)
    with pytest.raises(ValueError, match=r"^the state lacks b$"):
        checks.tensors("the state", {"a": shared}, expected)
    with pytest.raises(ValueError, match=r"^a is float32 \[3\], not float32 \[2\]$"):
        checks.tensors("the state", {"a": torch.ones(3), "b": shared}, expected)
