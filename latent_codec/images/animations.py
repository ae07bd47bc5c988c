"""Animations: frames, as PIL images of one size, in one file."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from latent_codec.files import replacing

MILLISECONDS = 100
"""For which a frame is shown."""
LAST_MILLISECONDS = 1000
"""For which the last one is."""


def check_animation(path: str | os.PathLike) -> None:
    """Refuse a name that `write_animation` cannot write.

    Raises:
        ValueError: for another suffix than .webp and .mp4, or .mp4 where there is no ffmpeg.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".webp", ".mp4"):
        raise ValueError(f"{path}: an animation needs a name that ends in .webp or .mp4")
    if suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise ValueError(
            f"{path}: MP4 is written by ffmpeg, which is not installed here; write .webp instead"
        )


def write_animation(
    frames: Sequence[Image],
    path: str | os.PathLike,
    *,
    milliseconds: int = MILLISECONDS,
    last_milliseconds: int = LAST_MILLISECONDS,
) -> None:
    """Write an animated WebP, which plays again and again, or an MP4 (H.264), whole or not at all.

    Args:
        frames: of one size; an MP4 loses the last row or column of odd sides.

    Raises:
        ValueError: as `check_animation`, or if ffmpeg fails.
        OSError: where the system cannot write.
    """
    check_animation(path)
    first, *rest = frames
    with replacing(path) as partial:
        if Path(path).suffix.lower() == ".webp":
            durations = [milliseconds] * len(rest) + [last_milliseconds]
            first.save(partial, format="WEBP", save_all=True, append_images=rest, duration=durations, loop=0)
            return
        held = [frames[-1]] * (last_milliseconds // milliseconds - 1)
        _encode_h264([*frames, *held], partial, frames_per_second=1000 / milliseconds)


def _encode_h264(frames: Sequence[Image], path: Path, *, frames_per_second: float) -> None:
    width, height = frames[0].size
    command = ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", f"{frames_per_second:g}", "-i", "-"]
    command += ["-vf", "crop=trunc(iw/2)*2:trunc(ih/2)*2", "-pix_fmt", "yuv420p", "-f", "mp4", str(path)]
    done = subprocess.run(
        command, input=b"".join(frame.convert("RGB").tobytes() for frame in frames), capture_output=True
    )
    if done.returncode:
        raise ValueError(f"ffmpeg cannot write an MP4: {done.stderr.decode(errors='replace').strip()}")
