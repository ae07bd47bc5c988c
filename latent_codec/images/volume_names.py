"""Which files are DICOM or NIfTI, and whether the package that reads them is there (extra `[medical]`)."""

import os
from importlib.util import find_spec
from typing import BinaryIO

NIFTI_SUFFIXES = (".nii", ".nii.gz")
DICOM_SUFFIXES = (".dcm", ".dicom")
NIFTI, DICOM = NIFTI_SUFFIXES[0], DICOM_SUFFIXES[0]


def is_nifti_name(name: str) -> bool:
    return name.lower().endswith(NIFTI_SUFFIXES)


def is_volume_name(name: str) -> bool:
    """Whether a file is DICOM or NIfTI by its suffix."""
    return name.lower().endswith((*NIFTI_SUFFIXES, *DICOM_SUFFIXES))


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file starts as DICOM does, whatever its suffix; it is then at its start again."""
    start = file.read(132)
    file.seek(0)
    return start[128:] == b"DICM"


def missing_package(name: str | os.PathLike) -> str | None:
    """What to do before a file with this name, DICOM or NIfTI, can be read; None: nothing."""
    kind, package = ("NIfTI", "nibabel") if is_nifti_name(os.fspath(name)) else ("DICOM", "pydicom")
    if find_spec(package) is not None:
        return None
    return f'{kind} is read by {package}: pip install "latent-codec[medical]"'
