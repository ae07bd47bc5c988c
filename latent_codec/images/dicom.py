"""DICOM files as volumes: the files of a series put in order by their place in the patient, frames of one file as slices.

Needs pydicom: `pip install "latent-codec[medical]"`. Of a header only numbers of geometry and of the values are kept.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latent_codec.images.decoding import ImageError, printable, without_warnings
from latent_codec.images.files import Waiting
from latent_codec.images.origins import ValueRange
from latent_codec.images.volume_names import DICOM_SUFFIXES
from latent_codec.images.volumes import CT_RANGE, DTYPES, NO_PIXELS, Volume, damaged, is_affine

logger = logging.getLogger(__name__)

_TAGS = [
    *("SOPClassUID", "SeriesInstanceUID", "InstanceNumber", "Modality", "Rows", "Columns", "NumberOfFrames"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "PixelRepresentation"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "DoseGridScaling", "PixelPaddingValue"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing"),
    *("SpacingBetweenSlices", "SliceThickness", "GridFrameOffsetVector"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
"""What is read of a header. The series tells which files belong together and is then forgotten."""

_PLUGINS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or unpack them: gdcmconv --raw"
_TOLERANCE = 0.01
"""Of the distance between slices, by which it may vary in a volume."""


@dataclass(frozen=True, kw_only=True)
class DicomVolume(Volume):
    """Frames of a DICOM file, or the files of a series."""

    scales: tuple[tuple[float, float], ...] = ()
    """Slope and intercept of each file, or of each frame, where they differ; its voxels are then float32 in its unit."""

    @property
    def reads_slices(self) -> bool:
        return self.axis == 2 and len(self.files) == self.shape[2]

    def voxels(self) -> np.ndarray:
        if len(self.files) == 1:
            return self._scaled(_frames(self.files[0], self), range(self.shape[2]))
        return np.concatenate([self._voxels_of(number) for number in range(self.shape[2])], axis=2)

    def _voxels_of(self, number: int) -> np.ndarray:
        return self._scaled(_frames(self.files[number], self), [number])

    def _scaled(self, voxels: np.ndarray, numbers: Iterable[int]) -> np.ndarray:
        if not self.scales:
            return voxels
        slopes, intercepts = np.array([self.scales[number] for number in numbers]).T
        return (voxels * slopes + intercepts).astype(np.float32)


def _frames(path: Path, volume: DicomVolume) -> np.ndarray:
    """Voxels of a file as stored: (columns, rows, frames).

    Raises:
        ImageError: in one line that says what to do.
    """
    import pydicom
    from pydicom.pixels import apply_modality_lut

    try:
        with _quiet():
            dataset = pydicom.dcmread(path, force=True)
            syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
            if syntax is None:  # files without a header have the syntax that they can be read by
                implicit, little = dataset.original_encoding
                syntax = (
                    pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
                )
                syntax = syntax if little else pydicom.uid.ExplicitVRBigEndian
                dataset.file_meta = getattr(dataset, "file_meta", None) or pydicom.dataset.FileMetaDataset()
                dataset.file_meta.TransferSyntaxUID = syntax
            packed = f"its pixels are packed as {printable(syntax.name)}, which needs a plugin of pydicom: {_PLUGINS}"
            if not _is_unpacked(syntax):
                raise ImageError(f"{path}: {packed}")
            try:
                pixels = dataset.pixel_array
            except RuntimeError as error:  # of every plugin that might unpack it
                raise ImageError(f"{path}: {packed if syntax.is_encapsulated else damaged(error)}") from error
            if "ModalityLUTSequence" in dataset:
                pixels = apply_modality_lut(pixels, dataset)
    except ImageError:
        raise
    except Exception as error:  # pydicom raises what it trips over
        raise ImageError(f"{path}: {damaged(error)}") from error
    pixels = pixels if pixels.ndim == 3 else pixels[None]
    wanted = (volume.shape[2] if len(volume.files) == 1 else 1, volume.shape[1], volume.shape[0])
    if pixels.shape != wanted:
        raise ImageError(f"{path}: damaged: expected {wanted} frames, rows and columns, got {pixels.shape}")
    return pixels.transpose(2, 1, 0)


def _is_unpacked(syntax: Any) -> bool:
    """Whether an installed package unpacks a transfer syntax."""
    from pydicom.pixels import get_decoder

    try:
        return not syntax.is_encapsulated or get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back pydicom's remarks, which quote headers."""
    found = logging.getLogger("pydicom")
    level = found.level
    found.setLevel(logging.CRITICAL + 1)
    try:
        with without_warnings():
            yield
    finally:
        found.setLevel(level)


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What a file says of its pixels."""

    path: Path
    relative: Path
    version: int
    series: str = ""
    number: int = 0
    rows: int = 1
    columns: int = 1
    positions: tuple[tuple[float, ...] | None, ...] = (None,)
    """Of each frame's first voxel, mm."""
    orientation: tuple[float, ...] | None = None
    """Directions of its rows and columns."""
    spacing: tuple[float, float] = (1.0, 1.0)
    """Between rows and between columns, mm."""
    thickness: float = 1.0
    dtype: str = "uint8"
    scales: tuple[tuple[float, float], ...] = ((1.0, 0.0),)
    """Of each frame."""
    unit: str = ""
    inverted: bool = False
    padding: float | None = None
    usual_range: tuple[float, float] | None = None
    problem: str | None = None

    @property
    def normal(self) -> np.ndarray | None:
        if self.orientation is None:
            return None
        return np.cross(self.orientation[:3], self.orientation[3:])


def dicom_volumes(
    listing: Sequence[tuple[Path, Path]],
    *,
    axis: int = 2,
    value_range: ValueRange | None = None,
) -> tuple[list[tuple[int, DicomVolume]], list[tuple[Path, str]]]:
    """Make volumes of DICOM files.

    Args:
        listing: each path, and the path relative to the folder that it was found in.

    Returns:
        The volumes, each with the place of its first file in `listing`; and files without an image, with what they are.
    """
    import pydicom  # noqa: F401  (which takes longer than many headers)

    progress, headers, left_out = Waiting("reading DICOM headers: %d files"), [], []
    for count, (path, relative) in enumerate(listing, 1):
        header = _read_header(path, relative)
        progress.say(count)
        if isinstance(header, str):
            left_out.append((relative, header))
        else:
            headers.append(header)
    places = {path: place for place, (path, _) in reversed(list(enumerate(listing)))}
    groups: dict[Any, list[_Header]] = defaultdict(list)
    for header in headers:
        groups[_series_of(header)].append(header)
    folders: dict[Path, int] = defaultdict(int)
    for group in groups.values():
        for folder in {each.path.parent for each in group}:
            folders[folder] += 1
    volumes = []
    for group in groups.values():
        stacks = _stacks(group)
        if len(stacks) > 1:
            name = printable(str(group[0].path.parent))
            logger.warning(
                "Note: a series of %d files in %s is %d volumes: of several times, or unevenly spaced",
                len(group),
                name,
                len(stacks),
            )
        for stack in stacks:
            name = _name(stack, alone=folders[stack[0].path.parent] == 1)
            place = min(places[each.path] for each in stack)
            volumes.append((place, _volume(stack, name, axis, value_range)))
    return volumes, left_out


def _series_of(header: _Header) -> Any:
    """Equal for files whose frames may be slices of one volume."""
    can_stack = header.series and header.orientation and header.positions[0] and len(header.positions) == 1
    if header.problem or not can_stack:
        return header.path
    direction = tuple(round(each, 4) for each in header.orientation or ())
    shape = header.rows, header.columns, header.spacing, header.dtype, header.unit, header.inverted
    return header.series, header.relative.parent, direction, shape


def _stacks(group: list[_Header]) -> list[list[_Header]]:
    """Cut a series into runs of even distances, each in order; files at one place are of several times."""
    if len(group) == 1:
        return [group]
    normal = group[0].normal
    places = {each.path: float(np.dot(each.positions[0], normal)) for each in group}  # type: ignore[arg-type]
    times: list[list[_Header]] = []
    seen: dict[float, int] = defaultdict(int)
    for header in sorted(group, key=lambda each: (each.number, str(each.path))):
        where = round(places[header.path], 3)
        if seen[where] == len(times):
            times.append([])
        times[seen[where]].append(header)
        seen[where] += 1
    stacks = []
    for time in times:
        run: list[_Header] = []
        for header in sorted(time, key=lambda each: places[each.path]):
            if len(run) > 1:
                step = (places[run[-1].path] - places[run[0].path]) / (len(run) - 1)
                if abs(places[header.path] - places[run[-1].path] - step) > _TOLERANCE * step + 1e-3:
                    stacks.append(run)
                    run = []
            run.append(header)
        stacks.append(run)
    return stacks


def _name(stack: list[_Header], alone: bool) -> str:
    """The folder of a series that has it to itself, else its first file, without suffix."""
    first = stack[0].relative
    if len(stack) > 1 and alone:
        folder = first.parent.as_posix() if first.parent != Path() else stack[0].path.parent.resolve().name
        if folder:
            return folder
    return (first.with_suffix("") if first.suffix.lower() in DICOM_SUFFIXES else first).as_posix()


def _volume(stack: list[_Header], name: str, axis: int, value_range: ValueRange | None) -> DicomVolume:
    first = stack[0]
    scales = [scale for each in stack for scale in each.scales]
    is_even = len(set(scales)) == 1
    count = len(stack) if len(stack) > 1 or first.problem else len(first.positions)
    return DicomVolume(
        name=name,
        files=tuple(each.path for each in stack),
        shape=(first.columns, first.rows, count),
        dtype=first.dtype if is_even else "float32",
        slope=scales[0][0] if is_even else 1.0,
        intercept=scales[0][1] if is_even else 0.0,
        scales=() if is_even else tuple(scales),
        affine=_affine(stack),
        unit=first.unit,
        inverted=first.inverted,
        padding=first.padding if is_even else None,
        value_range=value_range,
        usual_range=first.usual_range,
        axis=axis,
        problem=first.problem,
        version=max(each.version for each in stack),
    )


def _affine(stack: list[_Header]) -> tuple[float, ...]:
    """From (column, row, slice) to the patient in NIfTI's directions; DICOM's first two run the other way."""
    first = stack[0]
    positions = [place for each in stack for place in each.positions]
    down, across = first.spacing
    if first.orientation is None or first.normal is None:
        matrix = np.diag([across, down, first.thickness, 1])[:3]
    else:
        start = np.array(positions[0] or (0, 0, 0))
        step = first.normal * first.thickness
        if len(positions) > 1 and None not in positions:
            step = (np.array(positions[-1]) - start) / (len(positions) - 1)
        directions = np.array(first.orientation[:3]) * across, np.array(first.orientation[3:]) * down
        matrix = np.column_stack([*directions, step, start])
    matrix = np.diag([-1, -1, 1]) @ matrix
    numbers = tuple(float(each) for each in (matrix + 0.0).ravel())
    return numbers if is_affine(numbers) else (-across, 0, 0, 0, 0, -down, 0, 0, 0, 0, first.thickness, 0)


def _read_header(path: Path, relative: Path) -> _Header | str:
    """What a file says of its pixels, or what it is where it has none."""
    import pydicom

    try:
        version = path.stat().st_mtime_ns
        with _quiet():
            found = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=_TAGS)
            if "Rows" not in found or "Columns" not in found:
                return NO_PIXELS
            return _header_of(found, path, relative, version)
    except Exception as error:  # pydicom raises what it trips over
        return _Header(path=path, relative=relative, version=0, problem=damaged(error))


def _header_of(found: Any, path: Path, relative: Path, version: int) -> _Header:
    rows, columns = int(found.Rows), int(found.Columns)
    frames = int(found.get("NumberOfFrames") or 1)
    modality, photometric = str(found.get("Modality", "")), str(found.get("PhotometricInterpretation", ""))
    bits, stored = int(found.get("BitsAllocated", 16)), int(found.get("BitsStored", 16))
    is_signed = found.get("PixelRepresentation", 0) == 1
    samples = int(found.get("SamplesPerPixel", 1))
    problem = None
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2", ""):
        kind = printable(photometric)[:20] or f"{samples} samples a pixel"
        problem = f"DICOM in color ({kind}), and only gray is read: save its frames as PNG, as `dcm2img` does"
    elif not (1 <= rows <= 32767 and 1 <= columns <= 32767 and 1 <= frames <= 32767):
        problem = f"damaged: it announces {frames} frames of {rows}x{columns} pixels"
    if bits < 8:
        dtype = "uint8"
    elif bits >= 32 and "PixelRepresentation" not in found:  # as integers have it
        dtype = f"float{bits}"
    else:
        dtype = f"{'int' if is_signed else 'uint'}{bits}"
    if dtype not in DTYPES:
        problem = problem or f"its pixels have {bits} bits, and 1, 8, 16 and 32 are read"
    groups = [_group(found, "SharedFunctionalGroupsSequence", 0)] + [
        _group(found, "PerFrameFunctionalGroupsSequence", number) for number in range(frames)
    ]
    scales = tuple(_scale(found, groups[0], groups[number + 1], modality) for number in range(frames))
    spacing = _numbers(found, groups, "PixelMeasuresSequence", "PixelSpacing", 2) or _floats(
        found.get("ImagerPixelSpacing"), 2
    )
    thickness = _numbers(found, groups, "PixelMeasuresSequence", "SpacingBetweenSlices", 1) or _numbers(
        found, groups, "PixelMeasuresSequence", "SliceThickness", 1
    )
    orientation = _numbers(found, groups, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    is_ct = modality == "CT"
    is_small = (
        stored <= 8 and not is_signed and set(scales) == {(1.0, 0.0)} and "ModalityLUTSequence" not in found
    )
    return _Header(
        path=path,
        relative=relative,
        version=version,
        series=str(found.get("SeriesInstanceUID", "")),
        number=int(found.get("InstanceNumber") or 0),
        rows=rows,
        columns=columns,
        positions=_positions(found, groups, frames, orientation),
        orientation=orientation,
        spacing=(abs(spacing[0]) or 1.0, abs(spacing[1]) or 1.0) if spacing else (1.0, 1.0),
        thickness=abs(thickness[0]) or 1.0 if thickness else 1.0,
        dtype="uint16" if "ModalityLUTSequence" in found else dtype,
        scales=scales if len(set(scales)) > 1 else scales[:1],
        unit="HU" if is_ct else "Gy" if modality == "RTDOSE" else "",
        inverted=photometric == "MONOCHROME1",
        padding=_padding(found, is_signed),
        usual_range=CT_RANGE if is_ct else (0.0, float(2**stored - 1)) if is_small else None,
        problem=problem,
    )


def _group(found: Any, sequence: str, number: int) -> Any:
    items = found.get(sequence) or []
    return items[number] if number < len(items) else {}


def _floats(found: Any, count: int) -> tuple[float, ...] | None:
    """Finite numbers, where there are `count` of them."""
    try:
        listed = [found] if isinstance(found, int | float | str) else list(found)
        numbers = tuple(float(each) for each in listed)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _numbers(
    found: Any, groups: Sequence[Any], sequence: str, name: str, count: int
) -> tuple[float, ...] | None:
    """An entry of the file, or of the functional groups of a file with several frames: the shared one, then the first frame's."""
    for place in (found, *(_group(each, sequence, 0) for each in groups[:2])):
        if (numbers := _floats(place.get(name), count)) is not None:
            return numbers
    return None


def _positions(
    found: Any, groups: Sequence[Any], frames: int, orientation: tuple[float, ...] | None
) -> tuple[tuple[float, ...] | None, ...]:
    """Of each frame; those of dose grids are offsets along the normal."""
    start = _floats(found.get("ImagePositionPatient"), 3)
    if frames == 1 and start is not None:
        return (start,)
    offsets = _floats(found.get("GridFrameOffsetVector"), frames)
    if start is not None and offsets is not None and orientation is not None:
        normal = np.cross(orientation[:3], orientation[3:])
        return tuple(tuple((np.array(start) + normal * (each - offsets[0])).tolist()) for each in offsets)
    return tuple(
        _floats(_group(groups[number + 1], "PlanePositionSequence", 0).get("ImagePositionPatient"), 3)
        for number in range(frames)
    )


def _scale(found: Any, shared: Any, frame: Any, modality: str) -> tuple[float, float]:
    """Slope and intercept of a frame: value = slope * voxel + intercept."""
    if "ModalityLUTSequence" in found:
        return 1.0, 0.0
    if modality == "RTDOSE":
        scaling = _floats(found.get("DoseGridScaling"), 1)
        return (scaling[0] if scaling and scaling[0] else 1.0), 0.0
    places = [_group(each, "PixelValueTransformationSequence", 0) for each in (frame, shared)] + [found]
    for place in places:
        slope, intercept = (_floats(place.get(name), 1) for name in ("RescaleSlope", "RescaleIntercept"))
        if slope is not None or intercept is not None:
            return (slope[0] if slope and slope[0] else 1.0), (intercept[0] if intercept else 0.0)
    return 1.0, 0.0


def _padding(found: Any, is_signed: bool) -> float | None:
    """As stored; a number that was written with the other sign is corrected, as some writers get it wrong."""
    value = found.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    bits = int(found.get("BitsAllocated", 16))
    if is_signed and value >= 2 ** (bits - 1):
        value -= 2**bits
    if not is_signed and value < 0:
        value += 2**bits
    return float(value)
