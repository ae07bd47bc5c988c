"""The files that shards of latents are written to: webdataset tars, Parquet, and latent files (safetensors).

Equal samples give equal bytes, with equal versions of the libraries: no time, user, host or order of a hash table is in them.

    webdataset    KEY.latents.npy (KEY.mean.npy and KEY.logvar.npy; KEY.indices.npy), KEY.json, KEY.cls, KEY.txt, others
    parquet       a row for each sample; arrays are nested lists, which `datasets` gives back as arrays
    safetensors   a latent file, as `latent_codec.latents.latent_files` reads it
"""

import io
import json
import tarfile
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.latents.latent_files import latent_file
from latent_codec.latents.plan import Container
from latent_codec.latents.samples import Sample
from latent_codec.latents.shard_readers import ORIGIN

_INDEX_DTYPE = np.dtype("<i4")


def facts_of(sample: Sample) -> dict:
    """What a sample says of itself, ready for JSON."""
    return {
        "name": sample.name,
        "size": list(sample.original),
        "resized": list(sample.frame.resized),
        "crop": list(sample.frame.window),
        "bucket": list(sample.frame.size),
        "flipped": sample.frame.flipped,
        "label": sample.label,
    } | ({"origin": sample.origin.to_json()} if sample.origin else {})


def as_array(tensor: Tensor) -> np.ndarray:
    """Little-endian; indices as int32."""
    array = tensor.numpy()
    if array.dtype.kind == "i":
        return array.astype(_INDEX_DTYPE)
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def to_webdataset(samples: Sequence[Sample], codec: LatentCodec) -> bytes:
    """A tar of each sample's members, in its order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, sample in zip(unique_keys(samples), samples):
            for suffix, content in sorted(_members(sample).items()):
                member = tarfile.TarInfo(f"{key}.{suffix}")  # whose time, user and group are 0
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _members(sample: Sample) -> dict[str, bytes]:
    """Contents by suffix."""
    own = {f"{name}.npy": _npy(as_array(tensor)) for name, tensor in sample.arrays.items()}
    own["json"] = json.dumps(facts_of(sample), sort_keys=True, default=str).encode()
    if type(sample.label) is int:
        own["cls"] = str(sample.label).encode()
    others = {
        f"source.{suffix}" if suffix in own else suffix: content
        for suffix, content in sample.sidecars.items()
    }
    return others | own


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def unique_keys(samples: Sequence[Sample]) -> list[str]:
    """Their keys; of several samples with one key all but the first get a number."""
    taken: dict[str, int] = {}
    keys = []
    for sample in samples:
        count = taken[sample.key] = taken.get(sample.key, 0) + 1
        keys.append(sample.key if count == 1 else f"{sample.key}~{count}")
    return keys


def to_parquet(samples: Sequence[Sample], codec: LatentCodec) -> bytes:
    """A table with a row for each sample."""
    import pyarrow as pa
    from pyarrow import parquet

    extra: list[dict[str, str]] = [
        {suffix: text.decode(errors="replace") for suffix, text in each.sidecars.items() if suffix != "txt"}
        for each in samples
    ]
    for entries, sample in zip(extra, samples):  # not a column, which other shards would lack
        if sample.origin is not None:
            entries[ORIGIN] = json.dumps(sample.origin.to_json(), sort_keys=True)
    integers, attributes = zip(
        *((each.label, None) if isinstance(each.label, int) else (None, each.label) for each in samples)
    )
    sizes = pa.list_(pa.int32())
    columns = {"key": _strings(unique_keys(samples)), "name": _strings([each.name for each in samples])}
    for name in samples[0].arrays:
        columns[name] = _nested([as_array(each.arrays[name]) for each in samples])
    columns |= {
        "height": pa.array([each.original[0] for each in samples], pa.int32()),
        "width": pa.array([each.original[1] for each in samples], pa.int32()),
        "resized": pa.array([list(each.frame.resized) for each in samples], sizes),
        "crop": pa.array([list(each.frame.window) for each in samples], sizes),
        "bucket": pa.array([list(each.frame.size) for each in samples], sizes),
        "flipped": pa.array([each.frame.flipped for each in samples], pa.bool_()),
        "label": pa.array(integers, pa.int64()),
        "attributes": _strings([_json_or_none(each) for each in attributes]),
        "caption": _strings([each.caption for each in samples]),
        "extra": _strings([_json_or_none(each or None) for each in extra]),
    }
    file = io.BytesIO()
    parquet.write_table(
        pa.table(columns),
        file,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        row_group_size=100,
    )
    return file.getvalue()


def _nested(arrays: Sequence[np.ndarray]):
    """Arrays (C, h, w), or (h, w), of any sizes, as one column of nested lists."""
    import pyarrow as pa

    values = pa.array(np.concatenate([array.ravel() for array in arrays]))
    for axis in reversed(range(arrays[0].ndim)):
        # How many lists of this depth there are in each array, and how long they are.
        lengths = np.concatenate(
            [np.full(int(np.prod(array.shape[:axis])), array.shape[axis], np.int32) for array in arrays]
        )
        values = pa.ListArray.from_arrays(np.concatenate([[0], lengths.cumsum()]).astype(np.int32), values)
    return values


def _strings(values: Sequence[str | None]):
    """A column of texts; bytes that are no UTF-8, as file names may have, are replaced."""
    import pyarrow as pa

    return pa.array(
        [
            None if each is None else each.encode(errors="surrogateescape").decode(errors="replace")
            for each in values
        ],
        pa.string(),
    )


def _json_or_none(found) -> str | None:
    return None if found is None else json.dumps(found, sort_keys=True, default=str)


def to_safetensors(samples: Sequence[Sample], codec: LatentCodec) -> bytes:
    """A latent file; captions are an entry of its metadata, as labels are."""
    arrays = [list(sample.arrays.values()) for sample in samples]
    is_discrete = not samples[0].arrays.keys() & {"latents"}
    return latent_file(
        [(tensors if is_discrete else tensors[0]) for tensors in arrays],
        codec=codec,
        names=[sample.name for sample in samples],
        sizes=[sample.frame.size for sample in samples],
        labels=[sample.label for sample in samples],
        captions=[sample.caption for sample in samples],
        origins=[sample.origin for sample in samples],
    )


WRITERS: dict[Container, Callable[[Sequence[Sample], LatentCodec], bytes]] = {
    "webdataset": to_webdataset,
    "parquet": to_parquet,
    "safetensors": to_safetensors,
}
