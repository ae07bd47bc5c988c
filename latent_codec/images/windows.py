"""Windows: what part of the Hounsfield units is shown from black to white. For looking at images, not for encoding them."""

from latent_codec.errors import SettingError

WINDOWS = {
    "abdomen": (60, 400),
    "angiography": (300, 600),
    "bone": (400, 1800),
    "brain": (40, 80),
    "liver": (30, 150),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "soft-tissue": (50, 400),
    "stroke": (40, 40),
    "subdural": (75, 215),
}
"""Center and width in HU, as radiologists usually set them."""


def window_range(window: str) -> tuple[float, float]:
    """The values that are black and white in a window: one of `WINDOWS`, or "CENTER,WIDTH" in an image's own unit.

    Raises:
        SettingError: for anything else.
    """
    try:
        center, width = WINDOWS.get(window) or map(float, window.split(","))
    except ValueError:
        center = width = float("nan")
    if not (abs(center) < 1e30 and 0 < width < 1e30):
        raise SettingError("window", f"CENTER,WIDTH or one of {', '.join(WINDOWS)}", window)
    return center - width / 2, center + width / 2
