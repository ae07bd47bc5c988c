"""Context models: integers, every kernel alike, and files that they shorten without loss."""

from hashlib import sha256

import numpy as np
import pytest
import torch
from helpers.processes import run_forked
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_bitstream import build, make_image

from latent_codec.bitstream import (
    IndexContextEntropy,
    LatentContextEntropy,
    compress,
    decompress,
    fit_static,
    load_entropy_model,
    read,
    unpack,
)
from latent_codec.bitstream.coding import decode_tile, decode_values, encode_passes, encode_tile
from latent_codec.bitstream.context_tables import mixture_tables
from latent_codec.bitstream.integer_inference import Arithmetic, IntegerLayer, IntegerNetwork
from latent_codec.bitstream.quantization import quantize, reconstruct
from latent_codec.models.context_network import (
    LIMIT,
    MARGIN,
    NUM_PHASES,
    IndexContext,
    LatentContext,
    codeword_tree,
    freeze_shifts,
    grid_places,
    neighbor_offsets,
    phase_of,
)

SHAPES = [(1, 1), (1, 7), (5, 3), (8, 8), (17, 33)]


def latent_context(channels: int = 3, group: int = 1, seed: int = 0) -> LatentContext:
    """Random weights, larger than those of a new network, so that contexts matter."""
    torch.manual_seed(seed)
    units = [0.5 + channel / 4 for channel in range(channels)]
    context = LatentContext(units, [1.5 * unit for unit in units], num_steps=64, hidden=16, group=group)
    freeze_shifts(context)
    return context


def index_context(sizes: list[int], seed: int = 0) -> IndexContext:
    torch.manual_seed(seed)
    trees = [codeword_tree(torch.randn(size, 3)) for size in sizes]
    context = IndexContext(sizes, embedding=4, hidden=16, trees=trees)
    with torch.no_grad():
        for forks in context.forks:
            forks.weight *= 8
    freeze_shifts(context)
    return context


def test_a_training_step_waits_for_no_device():
    latents, indices = latent_context().to("meta"), index_context([8, 16]).to("meta")
    with torch.device("meta"):  # whose tensors have no values to wait for
        bits = latents(torch.ones(2, 3, 8, 8), torch.ones(2, 3)).sum()
        grids = [torch.ones(2, side, side, dtype=torch.int64) for side in (4, 8)]
        (bits + indices(grids).sum()).backward()


@pytest.fixture(scope="module")
def codecs():
    return {kind: build(kind) for kind in ("kl", "vq", "hierarchical")}


@pytest.fixture(scope="module")
def models(codecs):
    found = {"kl": LatentContextEntropy.export(latent_context(), codecs["kl"], 0.1)}
    for kind in ("vq", "hierarchical"):
        found[kind] = IndexContextEntropy.export(
            index_context(list(codecs[kind].codebook_sizes)), codecs[kind]
        )
    return found


def some_values(model, kind: str, sizes: list[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    if kind == "kl":
        found = np.round(rng.laplace(size=(3, *sizes[0])) * 3).astype(np.int64)
        found.reshape(-1)[:: max(found.size // 2, 1)] = 10**5  # escapes
        return [found]
    return [rng.integers(0, size, (1, *each)) for size, each in zip(model.codebook_sizes, sizes)]


@pytest.mark.parametrize("size", SHAPES)
def test_phases_cover_a_grid_and_neighbors_are_of_earlier_phases(size):
    height, width = size
    seen = []
    for phase in range(NUM_PHASES):
        positions, neighbors, siblings = grid_places(height, width, phase)
        seen += positions.tolist()
        rows, columns = (
            neighbors // (width + 2 * MARGIN) - MARGIN,
            neighbors % (width + 2 * MARGIN) - MARGIN,
        )
        assert neighbors.numel() == 0 or (phase_of(rows, columns) < phase).all()
        rows, columns = siblings // (width + 2 * MARGIN) - MARGIN, siblings % (width + 2 * MARGIN) - MARGIN
        assert (phase_of(rows, columns) == phase).all()
        assert torch.equal(rows[0] * width + columns[0], positions)
    assert sorted(seen) == list(range(height * width))


def test_neighbors_surround_a_position():
    for phase in range(1, NUM_PHASES):
        neighbors, siblings = neighbor_offsets(phase)
        assert len(neighbors) == 16 and len(siblings) == 4
        for nearest in (neighbors[:4], siblings):
            assert np.sum(nearest, axis=0).tolist() == [0, 0], nearest


@pytest.mark.parametrize("kind", ["kl", "vq", "hierarchical"])
@pytest.mark.parametrize("size", SHAPES)
def test_values_of_every_shape_come_back(models, kind, size):
    model = models[kind]
    sizes = [size, (2 * size[0], 2 * size[1])] if kind == "hierarchical" else [size]
    values = some_values(model, kind, sizes)
    sections = encode_tile(model, values, 20 if kind == "kl" else 0)
    found = decode_tile(model, sections, [each.shape for each in values], 20 if kind == "kl" else 0)
    for its, expected in zip(found.values, values):
        np.testing.assert_array_equal(its, expected)
    assert all(known.all() for known in found.known)


SETTINGS = {
    "2 threads": {"threads": 2},
    "1 thread": {"threads": 1},
    "oneDNN off": {"mkldnn": False},
    "int32": {"kernel": "int32"},
    "int32, 1 thread": {"kernel": "int32", "threads": 1},
    "bfloat16 products allowed": {"precision": "medium"},
    "TF32 products allowed": {"precision": "high"},
    "denormals flushed": {"flush": True},
    "values column by column": {"order": "F"},
    "values channels last": {"order": "channels last"},
    "deterministic algorithms": {"deterministic": True},
    "autocast to bfloat16": {"autocast": True},
    "inference mode": {"inference": True},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["kl", "vq", "hierarchical"])
def test_decoding_is_the_same_in_every_setting(models, kind, setting):
    model = models[kind]
    sizes = [(24, 40), (48, 80)] if kind == "hierarchical" else [(24, 40)]
    values = some_values(model, kind, sizes)
    sections = encode_tile(model, values, 20 if kind == "kl" else 0)
    shapes = [each.shape for each in values]
    expected = decode_tile(model, sections, shapes, 20 if kind == "kl" else 0)
    with in_setting(setting):
        model = model.on(kernel=setting.get("kernel", "float32"))
        found = decode_tile(model, sections, shapes, 20 if kind == "kl" else 0)
        again = encode_tile(
            model, [laid_out(each, setting.get("order")) for each in values], 20 if kind == "kl" else 0
        )
    assert again == sections
    for level in range(len(values)):
        np.testing.assert_array_equal(found.values[level], values[level])
        for name in ("cdf_index", "offsets"):
            np.testing.assert_array_equal(
                getattr(found.predictions[level], name), getattr(expected.predictions[level], name)
            )


def laid_out(values: np.ndarray, order: str | None) -> np.ndarray:
    """Equal values in another memory layout."""
    if order == "channels last":
        return np.ascontiguousarray(np.moveaxis(values, 0, -1)).transpose(2, 0, 1)
    return np.asarray(values, order=order)


class in_setting:
    """A setting of torch inside, and what was before it outside."""

    def __init__(self, setting: dict):
        self.setting = setting

    def __enter__(self):
        self.before = torch.get_num_threads(), torch.get_float32_matmul_precision()
        self.contexts = [
            torch.backends.mkldnn.flags(enabled=self.setting.get("mkldnn", True)),
            torch.autocast("cpu", torch.bfloat16, enabled=self.setting.get("autocast", False)),
            torch.inference_mode(self.setting.get("inference", False)),
        ]
        for context in self.contexts:
            context.__enter__()
        torch.set_num_threads(self.setting.get("threads", self.before[0]))
        torch.set_float32_matmul_precision(self.setting.get("precision", "highest"))
        torch.set_flush_denormal(self.setting.get("flush", False))
        torch.use_deterministic_algorithms(self.setting.get("deterministic", False))

    def __exit__(self, *error):
        torch.use_deterministic_algorithms(False)
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision(self.before[1])
        torch.set_num_threads(self.before[0])
        for context in reversed(self.contexts):
            context.__exit__(*error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["kl", "vq", "hierarchical"])
def test_a_gpu_decodes_the_same(models, kind):
    model = models[kind]
    sizes = [(24, 40), (48, 80)] if kind == "hierarchical" else [(24, 40)]
    values = some_values(model, kind, sizes)
    sections = encode_tile(model, values, 20 if kind == "kl" else 0)
    found = decode_tile(
        model.on("cuda"), sections, [each.shape for each in values], 20 if kind == "kl" else 0
    )
    for its, expected in zip(found.values, values):
        np.testing.assert_array_equal(its, expected)


def test_networks_compute_alike_for_one_position_and_for_many():
    """Columns are positions: how many are computed at a time changes none of them."""
    network = IntegerNetwork.from_mlp(latent_context().networks[3])
    x = torch.randint(-LIMIT, LIMIT + 1, (network.inputs, 256))
    whole = network(x, Arithmetic())
    for size in (1, 8, 100):
        parts = [network(part, Arithmetic()) for part in x.split(size, dim=1)]
        assert torch.equal(torch.cat(parts, 1), whole)


def test_exported_networks_are_those_that_were_trained():
    context = latent_context()
    generator = torch.Generator().manual_seed(1)
    for mlp in context.networks:
        x = torch.randint(-LIMIT, LIMIT + 1, (mlp.layers[0].in_features, 50), generator=generator)
        with torch.no_grad():
            trained = mlp(x.float())
        for kernel in ("float32", "int32"):
            found = IntegerNetwork.from_mlp(mlp)(x, Arithmetic(dtype=getattr(torch, kernel)))
            assert torch.equal(found.double(), trained.double())


def test_sums_that_could_reach_two_to_the_24_are_refused():
    size = 2**24 // (127 * 127)
    good = np.full((1, size), 127, np.int8), np.zeros(1, np.int32), np.zeros(1, np.int8)
    IntegerLayer(*good)
    with pytest.raises(ValueError, match="below 16777216"):
        IntegerLayer(np.full((1, size + 1), 127, np.int8), *good[1:])
    with pytest.raises(ValueError, match="below 16777216"):
        IntegerLayer(good[0], np.array([2**24 - size * 127 * 127], np.int32), good[2])


def test_a_network_that_is_not_rounded_is_not_exported(codecs):
    context = LatentContext([1.0] * 3, [1.0] * 3, num_steps=8, hidden=8)
    with pytest.raises(ValueError, match="frozen shifts"):
        LatentContextEntropy.export(context, codecs["kl"], 0.1)


@pytest.mark.parametrize("group", [1, 2, 5])
def test_channels_may_be_coded_in_groups(codecs, group):
    model = LatentContextEntropy.export(latent_context(5, group), codecs["kl"], 0.1)
    values = [np.random.default_rng(0).integers(-9, 9, (5, 9, 6))]
    sections = encode_tile(model, values, 30)
    assert len(sections) == 4
    assert len(model.predictor([(5, 9, 6)], 30).passes) == 1 + 4 * -(-5 // group)
    np.testing.assert_array_equal(decode_tile(model, sections, [(5, 9, 6)], 30).values[0], values[0])


@pytest.mark.parametrize("kind", ["kl", "vq", "hierarchical"])
def test_a_stored_model_is_the_same(models, kind, tmp_path):
    models[kind].save(tmp_path / "entropy.safetensors")
    again = load_entropy_model(tmp_path)
    assert type(again) is type(models[kind]) and again.fingerprint == models[kind].fingerprint
    assert models[kind].on(kernel="int32").fingerprint == again.fingerprint
    sizes = [(6, 6), (12, 12)] if kind == "hierarchical" else [(6, 6)]
    values = some_values(again, kind, sizes)
    assert encode_tile(again, values, 3) == encode_tile(models[kind], values, 3)


@pytest.mark.parametrize("kind", ["kl", "vq", "hierarchical"])
def test_a_model_with_another_number_in_it_is_another_model(models, kind):
    arrays = models[kind].arrays()
    names = {"space_fingerprint": models[kind].space_fingerprint, "codec_name": "other"}
    fingerprints = {models[kind].fingerprint}
    for name in ("networks.1.0.weights", "networks.1.1.biases", "starts"):
        changed = dict(arrays)
        changed[name] = arrays[name].copy()
        changed[name].reshape(-1)[1] += 1
        fingerprints.add(type(models[kind]).from_arrays(changed, **names).fingerprint)
    assert len(fingerprints) == 4


@pytest.mark.parametrize("kind", ["kl", "vq", "hierarchical"])
def test_damaged_models_are_refused(models, kind, tmp_path):
    path = tmp_path / "entropy.safetensors"
    models[kind].save(path)
    arrays = load_file(path)
    with safe_open(path, framework="np") as stored:
        metadata = stored.metadata()
    for name, array in arrays.items():
        for changed in (None, array[..., :0], array.astype(np.float64), array[..., :-1]):
            others = {key: each for key, each in arrays.items() if key != name}
            if changed is not None:
                if changed.shape == array.shape and changed.dtype == array.dtype:
                    continue  # there was nothing to cut off
                others[name] = np.ascontiguousarray(changed)
            save_file(others, path, metadata)
            with pytest.raises(ValueError, match="no entropy model"):
                load_entropy_model(path)
    save_file(arrays | {"surplus": np.zeros(1, np.float32)}, path, metadata)
    with pytest.raises(ValueError, match="surplus"):
        load_entropy_model(path)


@pytest.mark.parametrize("size", [2, 3, 5, 24, 64, 100])
def test_trees_hold_every_codeword_once_and_alike_ones_together(size):
    codewords = torch.linspace(-1, 1, size)[
        torch.randperm(size, generator=torch.Generator().manual_seed(0)), None
    ]
    tree = codeword_tree(codewords)
    assert len(tree) == 2 ** (size - 1).bit_length()
    present = [leaf for leaf in tree if leaf >= 0]
    assert sorted(present) == list(range(size))
    half = [codewords[leaf].item() for leaf in tree[: len(tree) // 2] if leaf >= 0]
    other = [codewords[leaf].item() for leaf in tree[len(tree) // 2 :] if leaf >= 0]
    assert max(half) < min(other) or max(other) < min(half)


def test_bits_of_a_network_are_those_of_its_files(models):
    """The training's loss is the length of the code, up to the tables' steps."""
    context = index_context([24])
    indices = torch.randint(0, 24, (1, 16, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = context([indices]).item()
    sections = encode_tile(models["vq"], [indices.numpy()])
    assert 8 * sum(map(len, sections)) == pytest.approx(expected, rel=0.05, abs=100)


def test_latents_bits_of_a_network_are_those_of_its_files(models):
    context = latent_context()
    latents = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(0))
    steps = context.step_sizes()[30]
    levels = torch.round(latents / steps[:, None, None])
    with torch.no_grad():
        expected = context(levels[None], steps[None]).sum().item()
    sections = encode_tile(models["kl"], [levels.numpy().astype(np.int64)], 30)
    assert 8 * sum(map(len, sections)) == pytest.approx(expected, rel=0.03)


def test_tables_are_the_mixture_they_stand_for():
    """Probabilities and means against samples that are quantized by rounding."""
    weights, scales = np.array([0.7, 0.3]), np.array([0.8, 1.6])
    found = mixture_tables(weights, scales, rate_weight=0)
    rng = np.random.default_rng(0)
    for deviation, fraction in ((24, 3), (40, 8), (56, 12)):
        spread = 2.0 ** (-5 + deviation / 8)
        drop = int(found["drops"][deviation])
        number = int(found["firsts"][deviation]) + (fraction >> drop)
        mean = (((fraction >> drop) << drop) + ((1 << drop) - 1) / 2) / 16 - 0.5
        samples = mean + spread * rng.standard_normal(400_000) * rng.choice(scales, 400_000, p=weights)
        levels = np.round(samples)
        start, minimum = found["tables"].offsets[number], found["tables"].minimums[number]
        for level in (-1, 0, 1):
            place = start + level - minimum
            share = (levels == level).mean()
            assert found["tables"].frequencies[place] / 2**16 == pytest.approx(share, abs=0.004)
            if share > 0.02:
                shift = (samples - levels)[levels == level].mean()
                assert found["shifts"][place] == pytest.approx(shift, abs=0.02)


def test_weighing_bits_shortens_files_more_than_it_costs(models):
    """Per bit saved, less is lost than by coarser steps."""
    model = models["kl"]
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((3, 32, 32)).astype(np.float32) * 0.5

    def rate_and_error(step_size_index: int, weight: float) -> tuple[float, float]:
        levels, coded = quantize(model, latents, step_size_index, weight)
        sections = encode_passes(model.tables, coded)
        assert sections == encode_tile(model, [levels], step_size_index)
        found = decode_tile(model, sections, [levels.shape], step_size_index)
        values = reconstruct(model, found.values[0], found.predictions[0], step_size_index)
        return sum(map(len, sections)), float(((values - latents) ** 2).mean())

    plain, weighed, coarser = rate_and_error(30, 0), rate_and_error(30, 0.12), rate_and_error(27, 0)
    assert weighed[0] < plain[0] and weighed[1] > plain[1]
    slope = (weighed[1] - plain[1]) / (plain[0] - weighed[0])
    assert slope < (coarser[1] - plain[1]) / (plain[0] - coarser[0])


def test_lost_layers_are_filled_with_what_is_expected(codecs, models):
    """The first section by itself is a preview: nearer to the whole than a grid of zeros."""
    codec, model = codecs["kl"], models["kl"]
    data = compress(codec, make_image(96, 96), entropy_model=model, quality=40)
    container = unpack(data)
    assert container.header.num_layers == 4 and container.header_bytes <= 64
    whole = decompress(codec, data, entropy_model=model, latents=True)
    known = []
    for count in (1, 2, 3):
        cut = data[: container.header_bytes + sum(container.lengths[:count])]
        with pytest.warns(UserWarning, match="decoded in part"):
            found = read(codec, cut, entropy_model=model, partial=True)
            latents = decompress(codec, cut, entropy_model=model, latents=True, partial=True)
        mask = torch.from_numpy(found.known[0])
        assert torch.equal(latents[0][mask], whole[0][mask])
        known.append(mask.float().mean().item())
    assert known == [pytest.approx(1 / 16), pytest.approx(1 / 4), pytest.approx(1 / 2)]


SCRIPT = """
import sys, hashlib, torch
torch.set_num_threads(2)
from latent_codec.bitstream import load_entropy_model, unpack
from latent_codec.bitstream.coding import decode_values
from latent_codec.bitstream.quantization import reconstruct
for kernel in ("float32", "int32"):
    model = load_entropy_model(sys.argv[1]).on(kernel=kernel)
    found = decode_values(model, unpack(open(sys.argv[1] + "/file.lcf", "rb").read()))
    print(hashlib.sha256(reconstruct(model, found.values[0], found.predictions[0], 20).tobytes()).hexdigest())
"""


def test_one_file_in_two_processes(codecs, models, tmp_path):
    """Another process, with another number of threads and (see helpers/processes.py) hash seed, finds the same latents to the bit."""
    codec, model = codecs["kl"], models["kl"]
    data = compress(codec, make_image(40, 56), entropy_model=model, quality=20)
    model.save(tmp_path / "entropy.safetensors")
    (tmp_path / "file.lcf").write_bytes(data)
    found = decode_values(model, unpack(data))
    expected = sha256(reconstruct(model, found.values[0], found.predictions[0], 20).tobytes()).hexdigest()
    assert run_forked(SCRIPT, tmp_path).stdout.split() == [expected] * 2


def test_codes_of_no_codeword_and_codewords_that_there_are_not(models):
    model = models["vq"]
    (tree,) = model.trees
    empty = np.flatnonzero(tree < 0)[:1]
    assert model.from_symbols([empty])[0].tolist() == [-1]
    with pytest.raises(ValueError, match="indices of 0 to 23 on level 0, got"):
        model.to_symbols([np.array([24])])


def test_lost_indices_are_always_codewords(models):
    """Of 24 codewords in a tree of 32 leaves: the most_probable way may end at a leaf without one."""
    for seed in range(8):
        context = index_context([24], seed)
        model = IndexContextEntropy.export(context, build("vq"))
        values = [np.random.default_rng(seed).integers(0, 24, (1, 20, 20))]
        sections = encode_tile(model, values)
        for count in range(len(sections)):
            found = decode_tile(model, [*sections[:count], *[None] * (4 - count)], [(1, 20, 20)])
            assert found.values[0].min() >= 0 and found.values[0].max() < 24
            np.testing.assert_array_equal(found.values[0][found.known[0]], values[0][found.known[0]])


def test_multipliers_that_could_overflow_are_refused(models):
    arrays, names = models["kl"].arrays(), {"space_fingerprint": "0" * 16, "codec_name": "other"}
    for name, value in (("feature_multipliers", 2**28 + 1), ("mean_multipliers", -1), ("firsts", 2**31 - 1)):
        changed = arrays | {name: np.full_like(arrays[name], value)}
        with pytest.raises(ValueError):
            LatentContextEntropy.from_arrays(changed, **names)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_files_are_never_above_their_target(codecs, kind):
    codec = codecs[kind]
    model = fit_static(codec, [make_image(40, 56, seed) for seed in range(8)])
    image = make_image(128, 96)
    if kind == "vq":
        data = compress(codec, image, entropy_model=model)
        assert len(compress(codec, image, entropy_model=model, target_bytes=len(data))) == len(data)
        with pytest.raises(ValueError, match="many rates"):
            compress(codec, image, entropy_model=model, target_bytes=len(data) - 1)
        return
    for target in (1200, 1333, 1777, 3000, 5000):
        size = len(compress(codec, image, entropy_model=model, target_bytes=target))
        assert 0.98 * target <= size <= target


def test_code_lengths_are_below_the_files(codecs, models):
    for kind in ("kl", "vq", "hierarchical"):
        codec, model = codecs[kind], models[kind]
        options = {"quality": 40} if kind == "kl" else {}
        data = compress(codec, make_image(128, 128), entropy_model=model, **options)
        container = unpack(data)
        decoded = read(codec, data, entropy_model=model)
        bits = decoded.code_length
        payload = 8 * sum(container.lengths)
        if container.header.entropy_fingerprint is not None:
            assert bits <= payload <= 1.005 * bits + 8 * 64
