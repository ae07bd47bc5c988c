"""What goes wrong while a data set is encoded: nothing is lost, and each fault is one line."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import fails, files_in, write_idx
from helpers.processes import Process, run_forked
from PIL import Image

from latent_codec import AutoencoderVQ, LatentCodec
from latent_codec.cli import main
from latent_codec.images.sources import open_source
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.plan import EncodingOptions
from latent_codec.latents.shards import DataSetFolder

NUM_IMAGES = 24
OPTIONS = EncodingOptions(container="webdataset", images_per_shard=4)

ENCODE = """
import sys
from latent_codec.cli import main
sys.exit(main(["encode", "digits", "--codec", "codec", "--format", "webdataset", "--shard", "4", "--latents", "--batch-size", "1", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with digits/, 24 images of 16x16, codec/ and whole/, the data set of all of them."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "digits").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 16, 16), dtype=np.uint8)
    write_idx(folder / "digits/train-images-idx3-ubyte", noise)
    torch.manual_seed(0)
    model = AutoencoderVQ(
        in_channels=1,
        out_channels=1,
        num_vq_embeddings=16,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    model.save_pretrained(folder / "codec")
    encode(folder, "whole")
    return folder


def encode(place: Path, out: str, **settings) -> dict:
    codec = LatentCodec.from_pretrained(place / "codec")
    data = open_source(place / "digits")
    # One by one, as in the other processes: batches of another size may round otherwise.
    index, _ = encode_data_set(codec, data, place / out, OPTIONS, batch_size=1, **settings)
    return index


def assert_whole(place: Path, out: str) -> None:
    """To the byte what an undisturbed run gives, and nothing else."""
    assert files_in(place / out) == files_in(place / "whole")


def test_two_runs_at_once_on_one_output(place):
    runs = [Process(ENCODE, "--out", "both", cwd=place) for _ in range(2)]
    ended = [run.result() for run in runs]
    assert [each.returncode for each in ended] == [0, 0], ended
    assert ended[0].stdout == ended[1].stdout
    assert_whole(place, "both")


def test_killed_run_leaves_no_processes_and_goes_on_where_it_was(place):
    """kill -9 while three processes decode and shards are written."""
    run = Process(ENCODE, "--out", "killed", "--num-workers", "2", cwd=place)
    shards = place / "killed" / "shards"
    while len(list(shards.glob("*.json"))) < 2 and run.poll() is None:
        time.sleep(0.01)
    workers = [int(each) for each in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    os.kill(run.pid, signal.SIGKILL)
    assert run.result().returncode == -signal.SIGKILL
    assert not (place / "killed" / "index.json").exists()
    complete = {path: path.stat().st_mtime_ns for path in shards.glob("*.json")}
    assert 2 <= len(complete) < NUM_IMAGES // 4

    encode(place, "killed")
    assert {path: path.stat().st_mtime_ns for path in complete} == complete
    assert_whole(place, "killed")
    deadline = time.monotonic() + 20  # they look for their parent every few seconds
    while any(is_running(each) for each in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(each) for each in workers)


def error_of(done) -> str:
    """The one line that says what went wrong; others are of progress."""
    (line,) = (
        line for line in done.stderr.splitlines() if not line.startswith(("loading", "opening", "encoding"))
    )
    return line


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_worker_that_is_killed_is_one_line(place):
    """As the system does it where memory is short."""
    code = f"""
import os, signal
from latent_codec.images import sources

def killed(self, index):
    if index == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, index)

read, sources.IdxImages._image = sources.IdxImages._image, killed
{ENCODE}"""
    done = run_forked(code, "--out", "worker", "--num-workers", "1", check=False, cwd=place)
    assert done.returncode == 2
    assert "a process that decodes images ended before its work was done" in error_of(done)
    encode(place, "worker")
    assert_whole(place, "worker")


def test_full_disk_is_one_line_and_the_run_goes_on_later(place):
    """A limit on the size of files stands for a full disk: markers find room, shards do not."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))\n{ENCODE}"
    done = run_forked(code, "--out", "full", check=False, cwd=place)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"latent-codec encode: full/shards/0000\S+\.tar: File too large", error_of(done))
    assert files_in(place / "full") == {}
    encode(place, "full")
    assert_whole(place, "full")


def test_shard_that_is_cut_short_or_gone_is_written_again(place, caplog):
    index = encode(place, "damaged")
    shards = [place / "damaged/shards" / each["name"] for each in index["shards"]]
    before = {path: path.stat().st_mtime_ns for path in shards}
    shards[1].write_bytes(shards[1].read_bytes()[:-512])
    shards[2].unlink()
    shards[3].with_suffix(".json").write_bytes(b"{")
    encode(place, "damaged")
    assert caplog.messages == [f"written anew: {shards[1].name} is damaged"]
    assert [path.stat().st_mtime_ns != before[path] for path in shards[:5]] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert_whole(place, "damaged")


def test_shard_that_another_run_has_written_is_passed_over(place):
    codec, source = LatentCodec.from_pretrained(place / "codec"), open_source(place / "digits")
    encode(place, "other")
    other = {path.name: path.read_bytes() for path in (place / "other/shards").iterdir()}
    last = sorted(other)[-2:]
    shards = place / "passed/shards"
    shards.mkdir(parents=True)

    def meanwhile(counts):
        if counts.done == 1:
            for name in last:
                (shards / name).write_bytes(other[name])
            os.utime(shards / last[0], ns=(10**18, 10**18))

    _, counts = encode_data_set(
        codec, source, place / "passed", OPTIONS, batch_size=1, num_workers=0, on_progress=meanwhile
    )
    assert counts.done == NUM_IMAGES - 4
    assert (shards / last[0]).stat().st_mtime_ns == 10**18
    assert_whole(place, "passed")


def test_writers_that_race_keep_data_and_marker_of_one_of_them(place):
    """Bytes may differ, as with another number of threads: marker and shard are of one writer all the same."""
    from latent_codec.latents.plan import Shard
    from latent_codec.latents.shards import EncodedShard

    folder, shard = DataSetFolder(place / "race"), Shard("00000-abcdef01", 0, 1)
    writers = [
        threading.Thread(
            target=folder.commit,
            args=(EncodedShard(shard, bytes([number]) * 10**6, {"number": number, "bytes": 10**6}), OPTIONS),
        )
        for number in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    marker = json.loads((place / "race/shards/00000-abcdef01.json").read_bytes())
    assert (place / "race/shards/00000-abcdef01.tar").read_bytes() == bytes([marker["number"]]) * 10**6
    assert len(list((place / "race/shards").iterdir())) == 2


def test_unreadable_images_are_counted_by_reason(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    for number in range(3):
        Image.fromarray(noise).save(f"photos/{number}.png")
    Path("photos/1.png").write_bytes(Path("photos/0.png").read_bytes()[:100])
    Path("photos/3.png").write_bytes(b"")
    argv = ["encode", "photos", "--codec", str(place / "codec"), "--format", "parquet", "--json"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["skipped"] * 2
    assert "1.png: damaged or cut short" in err and "3.png: the file is empty" in err
    facts = json.loads(out.splitlines()[-1])
    assert facts["event"] == "done" and facts["out"] == "latents"
    assert (facts["images"], facts["samples"], facts["skipped"], facts["shards"]) == (2, 2, 2, 1)
    assert facts["failures"] == {"damaged or cut short": 1, "the file is empty": 1}
    (marker,) = DataSetFolder("latents").markers().values()
    assert [name for name, _ in marker["skipped"]] == ["1.png", "3.png"]

    other = fails(capsys, *argv[:4], "--format", "parquet", "--flip")
    assert "latents holds indices of place" in other and "flip False, not" in other
    assert "expected mean where indices are stored" in fails(
        capsys, *argv, "--indices", "--posterior", "both"
    )
    assert "--size: expected a multiple of 2" in fails(capsys, *argv, "--size", "15", "--out", "x")
    assert "--buckets: expected a size; add --size 512" in fails(capsys, *argv, "--buckets")


def test_disk_that_goes_away_is_an_error_and_no_shard_of_unreadable_images(place, tmp_path):
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "a.png")
    source = open_source(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="no such file, nor any other of the 1 images of this shard"):
        encode_data_set(LatentCodec.from_pretrained(place / "codec"), source, tmp_path / "out", OPTIONS)
    assert not list((tmp_path / "out").rglob("*.json"))
