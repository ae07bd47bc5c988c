"""SettingError: fields, messages for Python and for another face, pickling."""

import pickle

import pytest

from latent_codec.errors import SettingError


def flags(setting: str, value: str | None) -> str:
    return f"--{setting.replace('_', '-')}" + ("" if value is None else f" {value}")


def test_message_names_the_setting_what_was_expected_what_came_and_what_to_do():
    error = SettingError("tile", "at least 64", 3, advice="pass `tile=512`, or leave out `tile`")

    assert str(error) == "tile: expected at least 64, got 3; pass `tile=512`, or leave out `tile`"
    assert (
        error.describe(flags) == "--tile: expected at least 64, got 3; pass --tile 512, or leave out --tile"
    )


@pytest.mark.parametrize(
    "error", [SettingError("a.b", "x", None), SettingError("seed", "an integer", advice="say one")]
)
def test_pickled_error_says_the_same(error):
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is SettingError and isinstance(again, ValueError)
    assert str(again) == str(error) and again.got is error.got
