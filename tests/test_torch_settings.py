"""A codec, a prior and a preview answer the same, bit for bit, whatever the program around them has set."""

import contextlib

import pytest
import test_bitstream
import test_codec
import test_hierarchical_prior_pipeline
import test_prior_pipeline
import torch
from safetensors.torch import load_file
from test_autoencoder_tiny_gn import tiny as tiny_gn

from latent_codec import LatentCodec
from latent_codec.bitstream import compress, decompress, fit_static, load_entropy_model
from latent_codec.components.codec_folders import ASSETS
from latent_codec.components.prior_folders import load_prior
from latent_codec.components.weight_files import WEIGHTS
from latent_codec.conversion.writing import write_foreign
from latent_codec.evaluation.drop_in_audit import audit_drop_in
from latent_codec.latents.latent_files import load_latents, save_latents
from latent_codec.models.context_network import grid_places
from latent_codec.pipelines.folders import load_pipeline
from latent_codec.previews import LatentPreviewer
from latent_codec.torch_settings import ignoring_caller_settings

SHIPPED = ["default", "default-16", "default-rd", "default-vq"]
OTHERS = {f"class {build.__name__}": build for build in test_codec.MODELS} | {"class tiny_gn": tiny_gn}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def in_bfloat16_on_meta():
    with default_dtype(torch.bfloat16), default_device("meta"), torch.autocast("cpu", torch.bfloat16):
        yield


SETTINGS = {
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "deterministic": deterministic,
    "all": in_bfloat16_on_meta,
}
SOME = ["default float64", "inference mode", "all"]
"""For what takes long: the last one combines most of SETTINGS."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What `LatentCodec.from_pretrained` takes, for each of SHIPPED, KINDS and OTHERS; those of KINDS with an entropy model."""
    root, found = tmp_path_factory.mktemp("codecs"), {}
    for name in (*SHIPPED, *test_bitstream.KINDS, *OTHERS):
        if name in SHIPPED:
            found[name] = name
            continue
        if name in test_bitstream.KINDS:
            codec = test_bitstream.build(name)
        else:
            codec = LatentCodec(OTHERS[name](), name=name)
        found[name] = root / name
        codec.save_pretrained(found[name])
        if name in test_bitstream.KINDS:
            fit_static(codec, [test_bitstream.make_image(40, 48, seed) for seed in range(4)]).save(
                found[name]
            )
    return found


def image() -> torch.Tensor:
    with ignoring_caller_settings():
        return torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float32) * 2 - 1


def answers(codec: LatentCodec, folder) -> dict:
    """Everything that a codec says of an image, and of itself."""
    kind, photo = type(codec.autoencoder).__name__, image()
    latents = codec.encode(photo)
    found = {
        "dtype": codec.dtype,
        "space": codec.latent_space,
        "fingerprints": (codec.space_fingerprint, codec.fingerprint),
        "parameters": codec.num_parameters,
        "latents": latents,
        "image": codec.decode(latents, size=(40, 48), output_type="pt"),
        "pil": codec.decode(latents)[0].tobytes(),
        "parts": [*codec.autoencoder.parameters(), *codec.autoencoder.buffers()],
    }
    posterior = codec.posterior(photo)
    if posterior is not None:
        found["posterior"] = [posterior.mean, posterior.var]
        seeded = torch.Generator().manual_seed(0)
        found["sampled"] = codec.encode(photo, sample=True, generator=seeded)
    if kind in ("AutoencoderKL", "AutoencoderVQ"):
        found["tiled"] = codec.decode(codec.encode(photo, tile=16), tile=16, output_type="pt")
    if codec.is_discrete:
        found["indices"] = codec.encode_indices(photo)
        found["of indices"] = codec.decode_indices(found["indices"], output_type="pt")
    found["preview"] = LatentPreviewer.full(codec, max_side=2 * codec.family.side_multiple)(latents)
    if codec.folder is not None and (codec.folder / "entropy.safetensors").is_file():
        model = load_entropy_model(codec.folder, codec=codec)
        found["bytes"] = compress(codec, photo, entropy_model=model)
        found["decompressed"] = decompress(codec, found["bytes"], entropy_model=model, output_type="pt")
        found["bits"] = decompress(codec, found["bytes"], entropy_model=model, latents=True)
    folder.mkdir(exist_ok=True)
    path = folder / "latents.safetensors"
    save_latents(path, latents, codec=codec, names=["image"], sizes=[(40, 48)])
    stored = load_latents(path, codec=codec)
    found["latent file"] = [stored.latents, stored.space_fingerprint, stored.fingerprint]
    codec.save_pretrained(folder / "codec")
    found["saved config"] = (folder / "codec" / "config.json").read_text()
    with ignoring_caller_settings():
        found["saved weights"] = load_file(folder / "codec" / WEIGHTS)
    return found


def opened(name) -> LatentCodec:
    codec = LatentCodec.from_pretrained(name)
    codec.name = "codec"
    return codec


def assert_same(found, expected, where="") -> None:
    """Equal to the bit, dtypes and devices included."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.device, found.shape) == (
            expected.dtype,
            expected.device,
            expected.shape,
        ), where
        assert not found.is_inference(), where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict | list | tuple):
        keys = expected if isinstance(expected, dict) else range(len(expected))
        assert len(found) == len(expected), where
        for key in keys:
            assert_same(found[key], expected[key], f"{where} {key}")
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def plain(folders, tmp_path_factory):
    """What each codec answers where nothing is set."""
    root, found = tmp_path_factory.mktemp("plain"), {}

    def of(name):
        if name not in found:
            found[name] = answers(opened(folders[name]), root / name)
        return found[name]

    return of


@pytest.mark.parametrize(
    "name, setting",
    [
        *(("kl", setting) for setting in SETTINGS),
        *(
            (name, setting)
            for name in (*test_bitstream.KINDS, *SHIPPED, *OTHERS)
            if name != "kl"
            for setting in SOME
        ),
    ],
)
def test_a_codec_opened_and_used_under_any_setting_is_the_plain_one(name, setting, folders, plain, tmp_path):
    expected = plain(name)
    with SETTINGS[setting]():
        found = answers(opened(folders[name]), tmp_path)
    assert_same(found, expected)


def compiled_parts(autoencoder):
    for name, part in list(autoencoder.named_children()):
        if name in ("encoder", "decoder", "quant_conv"):
            setattr(autoencoder, name, torch.compile(part, backend="eager", dynamic=False))
        elif isinstance(part, torch.nn.ModuleList):  # of a HierarchicalVQ, which has no forward
            part[0] = torch.compile(part[0], backend="eager", dynamic=False)
    return autoencoder


def compiled_blocks(autoencoder):
    for part in list(autoencoder.modules()):
        for name, block in list(part.named_children()):
            if type(block).__name__ in ("ResnetBlock2D", "ResidualBlock", "AutoencoderTinyBlock"):
                part._modules[name] = torch.compile(block, backend="eager", dynamic=False)
    return autoencoder


def compiled_in_place(autoencoder):
    autoencoder.compile(backend="eager", dynamic=False)
    return autoencoder


def compiled_methods(autoencoder):
    autoencoder.decode = torch.compile(autoencoder.decode, backend="eager", dynamic=False)
    return autoencoder


COMPILED = {
    "parts": compiled_parts,
    "blocks": compiled_blocks,
    "whole": lambda autoencoder: torch.compile(autoencoder, backend="eager", dynamic=False),
    "whole and parts": lambda autoencoder: torch.compile(
        compiled_parts(autoencoder), backend="eager", dynamic=False
    ),
    "in place": compiled_in_place,
    "a method": compiled_methods,
}


TRACED = [("kl", "whole and parts"), ("hierarchical", "parts")]
"""Tracing takes seconds; the others show that a codec is found behind each kind of wrapper."""


@pytest.fixture
def untraced():
    """torch.compile wraps as always, and its wrappers call what they wrap."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name, how", [(name, how) for name in test_bitstream.KINDS for how in COMPILED])
def test_a_codec_behind_each_wrapper_of_compile_is_the_plain_one(
    name, how, folders, plain, tmp_path, untraced
):
    assert_compiled_is_plain(name, how, folders, plain, tmp_path)


@pytest.mark.parametrize("name, how", TRACED)
def test_a_compiled_codec_is_the_plain_one(name, how, folders, plain, tmp_path):
    assert_compiled_is_plain(name, how, folders, plain, tmp_path)


def assert_compiled_is_plain(name, how, folders, plain, tmp_path):
    expected = plain(name)
    codec = opened(folders[name])
    codec.autoencoder = COMPILED[how](codec.autoencoder)
    assert_same(answers(codec, tmp_path), expected)
    assert LatentCodec.from_pretrained(tmp_path / "codec").fingerprint == codec.fingerprint
    given = LatentCodec(COMPILED[how](opened(folders[name]).autoencoder))
    assert (given.latent_space, given.fingerprint) == (expected["space"], expected["fingerprints"][1])


def test_a_compiled_codec_compares_and_converts_as_the_plain_one(tmp_path):
    config = {"block_out_channels": (32, 32, 32)}  # 32 groups, as latent-diffusion's code has them
    codec, plain_codec = (LatentCodec(test_codec.kl(norm_num_groups=32, **config)) for _ in range(2))
    compiled_parts(codec.autoencoder)
    report = audit_drop_in(codec, plain_codec)
    assert report.encoder.num_equal == report.encoder.num_tensors > 0
    for each, file in ((codec, "compiled.safetensors"), (plain_codec, "plain.safetensors")):
        write_foreign(each.autoencoder, "ldm", tmp_path / file)
    compiled, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("compiled", "plain"))
    assert_same(compiled, expected)


PIPELINES = {
    **{
        kind: lambda kind=kind: test_prior_pipeline.pipeline(kind, torch.float32)
        for kind in test_prior_pipeline.KINDS
    },
    "levels": lambda: test_hierarchical_prior_pipeline.pipeline(dtype=torch.float32),
}


def drawn(pipe) -> list:
    """What a pipeline draws, and what its callback sees half-way."""
    seen = []

    def look(step, num_steps, grids, done):
        if step == num_steps // 2:
            seen.append([grids[-1].clone(), done.clone()])
            seen.append(pipe.partial_images(grids, done)[0].tobytes())

    keep = {"keep": 1} if pipe.classifier is not None else {}
    result = pipe(
        [0, 2], 2, **keep, generator=torch.Generator().manual_seed(0), output_type="pt", callback=look
    )
    return [seen, result.images, result.indices, result.class_labels, result.probabilities]


@pytest.fixture(scope="module")
def plain_pipelines(tmp_path_factory):
    """The folder of each of PIPELINES, and what it draws where nothing is set."""
    root, found = tmp_path_factory.mktemp("pipelines"), {}

    def of(name):
        if name not in found:
            PIPELINES[name]().save_pretrained(root / name)
            found[name] = root / name, drawn(load_pipeline(root / name))
        return found[name]

    return of


@pytest.mark.parametrize("setting", SOME)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_opened_and_sampled_under_any_setting_is_the_plain_one(name, setting, plain_pipelines):
    folder, expected = plain_pipelines(name)
    with SETTINGS[setting]():
        found = drawn(load_pipeline(folder))
    # The callback clones what it sees, which in the caller's inference mode makes its tensors.
    assert_same(found[1:], expected[1:])
    assert found[0][1::2] == expected[0][1::2]
    for mine, theirs in zip(found[0][::2], expected[0][::2]):
        assert all(map(torch.equal, mine, theirs))


def drawn_by_the_shipped_pipeline() -> list:
    labels = torch.tensor([3, 7], device="cpu")
    prior = load_prior(ASSETS / "fashion-mnist" / "prior")
    pipe = load_pipeline("fashion-mnist")
    seeded = torch.Generator().manual_seed(0)
    images = pipe([5], 1, generator=seeded, output_type="pt").images
    return [images, prior.sample((2, 3, 4), generator=seeded, class_labels=labels)]


def previews() -> list:
    with ignoring_caller_settings():
        torch.manual_seed(0)
        latents = torch.randn(2, 4, 6, 5, dtype=torch.float32)
        indices = torch.randint(-1, 16, (1, 4, 5))
    linear = LatentPreviewer.from_pretrained("default", kind="linear")
    best = LatentPreviewer.from_pretrained("default")
    palette = LatentPreviewer.from_pretrained("default-vq", kind="linear")
    return [
        linear(latents[:, : linear.latent_channels]),
        best(latents[:, : best.latent_channels]),
        palette.indices(indices),
    ]


@pytest.mark.parametrize("answer", [drawn_by_the_shipped_pipeline, previews])
def test_what_is_shipped_answers_under_any_setting_as_it_does_plainly(answer):
    expected = answer()
    for setting in SOME:
        with SETTINGS[setting]():
            found = answer()
        assert_same(found, expected, setting)


def test_what_is_cached_under_a_setting_serves_a_later_training():
    grid_places.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        places = grid_places(8, 6, 1)
    features = torch.zeros(3, 4, requires_grad=True)
    features[:, places[0] % 4].sum().backward()  # an index of inference mode could not be kept for this
    assert features.grad.sum() == 3 * len(places[0])


def test_a_callback_runs_under_the_callers_settings():
    prior = test_prior_pipeline.codec_and_prior("pixels")[1]
    seen = []

    def look(indices, done):
        seen.append((torch.is_autocast_enabled("cpu"), torch.empty(0).device.type, torch.is_grad_enabled()))

    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        labels = torch.zeros(1, dtype=torch.int64, device="cpu")
        prior.sample((1, 3, 1, 2), class_labels=labels, callback=look)
    assert seen == [(True, "meta", False)] * 2


def test_settings_come_back_after_a_codec_and_after_an_error():
    codec = LatentCodec(test_codec.kl())
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.enable_grad():
        for images in (image(), "not there.png"):
            with contextlib.suppress(ValueError):
                codec.encode(images)
            assert torch.is_autocast_enabled("cpu") and torch.empty(0).is_meta and torch.is_grad_enabled()
