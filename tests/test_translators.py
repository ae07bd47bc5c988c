"""Translators: latents of one codec to another's, linear in closed form and with a network, in files and in pipelines."""

import json

import pytest
import torch
from helpers.autoencoders import build
from helpers.training import write_images

from latent_codec import LatentCodec, LatentDataset, LatentTranslator, TranslatedVAE
from latent_codec.cli import main
from latent_codec.images.sources import open_source
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.latent_files import load_latents, save_latents
from latent_codec.latents.plan import EncodingOptions
from latent_codec.latents.translating import translate_data_set, translate_file
from latent_codec.models.latent_translator import CodecIdentity
from latent_codec.pipelines.tiny_pipeline import build_tiny_pipeline
from latent_codec.training.config import TrainingConfig, load_config
from latent_codec.training.loop import train
from latent_codec.training.report import read_metrics
from latent_codec.training.translator_task import build_translator, fit_in_closed_form, reusable_layers

SETTINGS = (
    "model.arguments={width=8, num_blocks=1}",
    "data.height=32",
    "optimizer.batch_size=2",
    "run.steps=3",
    "run.log_every=1",
    "translator.crops=4",
    "translator.linear_crops=4",
    "translator.reuse_layers=false",
)


def codec_of(name: str, called: str, **config) -> LatentCodec:
    return LatentCodec(build(name, **config), name=called)


@pytest.fixture(scope="module")
def kl() -> LatentCodec:
    return codec_of("AutoencoderKL", "kl")


@pytest.fixture(scope="module")
def vq() -> LatentCodec:
    return codec_of("AutoencoderVQ", "vq")


@pytest.fixture(scope="module")
def coarse() -> LatentCodec:
    """Of factor 8, where the others have 4."""
    blocks = {"block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4}
    return codec_of("AutoencoderKL", "coarse", **blocks, up_block_types=("UpDecoderBlock2D",) * 4)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), size=(40, 40))


def entries_of(codec: LatentCodec, **space) -> dict:
    """What a translator's config has of a codec, with another latent space."""
    entries = CodecIdentity.of(codec).to_config()
    return entries | {"latent_space": entries["latent_space"] | space}


def translator_between(source: LatentCodec, target: LatentCodec, **arguments) -> LatentTranslator:
    torch.manual_seed(0)
    small = {"width": 8, "num_blocks": 1} | arguments
    return LatentTranslator(entries_of(source), entries_of(target), **small).eval()


@pytest.mark.parametrize(
    "factor, upscale, sides", [(4, 1, (5, 7)), (8, 1, (3, 4)), (4, 2, (10, 14)), (2, 1, (10, 14))]
)
def test_latents_of_any_factor_become_those_of_the_same_image(kl, factor, upscale, sides):
    source, target = entries_of(kl), entries_of(kl, channels=6, downsampling_factor=factor)
    translator = LatentTranslator(source, target, upscale=upscale, width=8, num_blocks=1)
    latents = torch.randn(2, 4, 5, 7, requires_grad=True)
    translated = translator(latents)
    assert translated.shape == (2, 6, *sides)
    assert torch.equal(translated, translator.linearly(latents))  # the network starts at nothing
    translated.sum().backward()
    assert latents.grad.abs().min() > 0


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_linear_map_is_the_best_in_closed_form(kl, factor):
    target = entries_of(kl, channels=3, downsampling_factor=factor)
    translator = LatentTranslator(entries_of(kl), target, width=8, num_blocks=1).eval()
    rule = LatentTranslator(entries_of(kl), target, num_blocks=0).eval()  # to be found again
    latents = [torch.randn(2, 4, 12, 10, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    with torch.no_grad():
        fit_in_closed_form(translator, [(each, 5 * rule(each)) for each in latents])
        unseen = torch.randn(1, 4, 6, 6)
        torch.testing.assert_close(translator(unseen), 5 * rule(unseen), atol=0.02, rtol=0)  # ridge
        noise = [2 * torch.randn(rule(each).shape) for each in latents]
        fit_in_closed_form(translator, list(zip(latents, noise)))
    num_features, num_rows = 4 * translator.folded**2 * 9, 16 * 12 * 10 / translator.folded**2
    assert translator.residual_std.sub(2 * (1 - num_features / num_rows) ** 0.5).abs().max() < 0.2


def test_the_networks_last_layer_begins_with_what_is_not_linear(kl):
    translator = translator_between(kl, kl, width=16)
    rule = translator_between(kl, kl, width=16)
    torch.nn.init.normal_(rule.network[-1].weight)
    latents = torch.randn(41, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        *known, (given, wanted) = [(each[None], rule(each[None])) for each in latents]
        fit_in_closed_form(translator, known[:2])
        assert not translator.network[-1].weight.any()  # which are too few
        fit_in_closed_form(translator, known)
        errors = [(each(given) - wanted).square().mean() for each in (translator, translator.linearly)]
    assert errors[0] < 0.9 * errors[1]


@pytest.fixture(scope="module")
def run(kl, vq, images, tmp_path_factory):
    """A run from kl to vq, of a folder that holds both."""
    folder = tmp_path_factory.mktemp("run")
    for codec in (kl, vq):
        codec.save_pretrained(folder / codec.name)
    fit(folder, images, "whole")
    return folder


def fit(
    folder, images, out: str, *overrides: str, minutes: float | None = None, **ends
) -> dict[str, torch.Tensor]:
    ends = {"codec": str(folder / "kl"), "target": str(folder / "vq")} | ends
    config = load_config("translator", [*SETTINGS, "translator.image_weight=0.5", *overrides], **ends)
    source = open_source(images)
    train(config, build_translator(config, source), source, folder / out, max_minutes=minutes)
    return LatentTranslator.from_pretrained(folder / out / "translator").state_dict()


def test_a_run_that_was_stopped_ends_at_the_same_translator(run, images, kl, vq):
    translator = LatentTranslator.from_pretrained(run / "whole" / "translator")
    assert (translator.source.name, translator.target.name) == ("kl", "vq")
    translator.check_source(kl)
    translator.check_target(vq)
    first, *_, last = read_metrics(run / "whole")
    assert first["mse"] == pytest.approx(first["linear_mse"], rel=1e-4) and "image" in last
    begun = fit(run, images, "parts", minutes=1e-9)
    whole, parts = translator.state_dict(), fit(run, images, "parts")
    assert all(torch.equal(each, parts[key]) for key, each in whole.items())
    assert torch.equal(begun["linear.weight"], whole["linear.weight"])
    assert not torch.equal(begun["network.2.weight"], whole["network.2.weight"])


def test_the_network_learns_what_is_not_linear(run, images):
    learned = (
        "run.steps=20",
        "optimizer.learning_rate=1e-2",
        "optimizer.warmup_steps=0",
        "translator.image_weight=0",
    )
    fit(run, images, "longer", *learned)
    last = read_metrics(run / "longer")[-1]
    assert last["mse"] < 0.98 * last["linear_mse"]


def test_a_translator_goes_on_from_another_and_refuses_other_codecs(run, images, coarse, capsys):
    pretrained = f"model.pretrained={run / 'whole'}"
    fit(run, images, "again", pretrained, "model.arguments={}", "run.steps=1")
    coarse.save_pretrained(run / "coarse")
    with pytest.raises(ValueError, match=r"gives latents of vq \(space .*\), not of coarse \(space"):
        fit(run, images, "other", pretrained, "model.arguments={}", target=str(run / "coarse"))
    named = {"model": {"class_name": "LatentTranslator"}, "translator": {"codec": str(run / "kl")}}
    assert main(["info", str(run / "whole"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["source"], facts["target_channels"]) == ("translator", "kl", 3)
    assert facts["target_space_fingerprint"] == LatentCodec.from_pretrained(run / "vq").space_fingerprint
    with pytest.raises(ValueError, match=r"translator\.target: expected the name or folder"):
        build_translator(TrainingConfig.from_dict(named), open_source(images))


def seen_by(module: torch.nn.Module, work) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module is given and gives, while `work` runs."""
    found = []
    hook = module.register_forward_hook(lambda _, inputs, output: found.append((inputs[0], output)))
    work()
    hook.remove()
    return found[-1]


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderTinyGN"])
def test_a_decoders_head_is_what_it_does_on_the_latents_grid(name):
    codec = codec_of(name, "some")
    latents = torch.randn(1, codec.latent_space.channels, 4, 6)
    head = codec.family.decoder_head
    _, expected = seen_by(head[-1], lambda: codec.decode(latents, output_type="pt"))
    with torch.no_grad():
        torch.testing.assert_close(head(codec.latent_space.denormalize(latents)), expected)
    assert expected.shape[2:] == (4, 6)


@pytest.mark.parametrize(
    "name", ["AutoencoderKL", "AutoencoderVQ", "VQModel", "AutoencoderTiny", "AutoencoderTinyGN"]
)
def test_an_encoders_tail_is_what_it_does_on_the_latents_grid(name):
    codec = codec_of(name, "some")
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    tail = codec.family.encoder_tail
    features, _ = seen_by(tail[0], lambda: codec.encode(image))
    channels, factor = codec.latent_space.channels, codec.latent_space.downsampling_factor
    assert features.shape[2:] == (32 // factor, 48 // factor)
    with torch.no_grad():
        latents = codec.latent_space.normalize(tail(features)[:, :channels])
    torch.testing.assert_close(latents, codec.encode(image))


def test_a_translator_begins_with_the_codecs_own_layers(run, images, kl, vq):
    reusing = ("translator.reuse_layers=true", "model.arguments.num_blocks=0")
    ends = {"codec": str(run / "kl"), "target": str(run / "vq")}
    translator = build_translator(
        load_config("translator", [*SETTINGS, *reusing], **ends), open_source(images)
    )
    for own, begun in ((kl.family.decoder_head, translator.head), (vq.family.encoder_tail, translator.tail)):
        assert all(torch.equal(each, begun.state_dict()[key]) for key, each in own.state_dict().items())
    frozen = ("run.steps=1", "optimizer.learning_rate=1e-9", "translator.image_side=4")
    fit(run, images, "reused", *reusing, *frozen)
    (first,) = read_metrics(run / "reused")
    assert "linear_mse" not in first and first["image"] > 0
    image = open_source(images).image(0)[None, :, :32, :32]
    wanted = vq.encode(kl.decode(kl.encode(image), output_type="pt"))
    assert first["mse"] < 0.5 * wanted.var()  # the linear map gives the tail what the encoder gives it
    reopened = LatentTranslator.from_pretrained(run / "reused" / "translator")
    assert reopened.head is not None and reopened.config.source_autoencoder["_class_name"] == "AutoencoderKL"


def test_layers_that_are_not_told_apart_are_not_reused(kl, vq):
    entries = entries_of(vq), entries_of(kl)
    with pytest.raises(ValueError, match="layers of AutoencoderVQ's decoder are not told apart"):
        LatentTranslator(
            *entries, source_autoencoder=dict(vq.autoencoder.config) | {"_class_name": "AutoencoderVQ"}
        )
    assert set(reusable_layers(vq, kl)) == {"tail"}
    assert set(reusable_layers(kl, vq)) == {"head", "tail"}
    packed = codec_of("AutoencoderKLFlux2", "packed")
    assert set(reusable_layers(packed, kl)) == {"tail"} and set(reusable_layers(kl, packed)) == {"head"}


def test_latents_are_translated_and_decoded_by_the_other_codec(kl, vq):
    translator = translator_between(kl, vq)
    latents = kl.encode(torch.rand(2, 3, 20, 24) * 2 - 1)
    translated = kl.translate(latents, translator)
    assert translated.shape == (2, vq.latent_space.channels, 5, 6) and not translated.requires_grad
    assert [each.shape for each in kl.translate([latents, latents[:1]], translator)][1][0] == 1
    with pytest.raises(
        ValueError, match=r"translates latents of kl \(space .*\), not of vq \(space .*; train one for vq"
    ):
        vq.translate(latents, translator)
    with pytest.raises(ValueError, match="expected latents of kl"):
        kl.translate(latents[:, :3], translator)


def test_codecs_that_cannot_be_translated_are_named(kl, vq):
    gray = codec_of("AutoencoderKL", "gray", in_channels=1, out_channels=1)
    with pytest.raises(
        ValueError, match=r"number of channels, got kl \(space .*\) with 3 and gray \(space .*\) with 1"
    ):
        translator_between(kl, gray)
    with pytest.raises(ValueError, match=r"got kl .* with 4 px and vq .* with 14 px"):
        LatentTranslator(entries_of(kl), entries_of(vq, downsampling_factor=14))


def test_a_pipeline_decodes_through_a_translator(kl, vq):
    pipe = build_tiny_pipeline(kl, size=16)
    call = {"prompt": "a", "num_inference_steps": 1, "height": 16, "width": 16}
    pipe.set_progress_bar_config(disable=True)

    def draw(output_type: str) -> torch.Tensor:
        return pipe(**call, output_type=output_type, generator=torch.Generator().manual_seed(0)).images

    own, latents = draw("pt"), draw("latent")
    translator = translator_between(kl, vq)
    pipe.vae = TranslatedVAE(kl, translator, vq)
    assert (
        pipe.vae.config.scaling_factor == kl.autoencoder.config.scaling_factor
        and pipe.vae.dtype == torch.float32
    )
    torch.testing.assert_close(draw("latent"), latents)
    raw = latents / kl.autoencoder.config.scaling_factor
    expected = vq.decode(kl.translate(kl.latent_space.normalize(raw), translator), output_type="pt")
    torch.testing.assert_close(draw("pt"), (expected + 1) / 2)
    assert not torch.allclose(draw("pt"), own)
    pipe.to(torch.bfloat16)
    assert translator.dtype == vq.dtype == torch.bfloat16 and draw("pt").isfinite().all()
    pipe.to(torch.float32)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(
        pipe.vae.encode(image).latent_dist.mode(), kl.autoencoder.encode(image).latent_dist.mode()
    )
    with pytest.raises(ValueError, match=r"gives latents of vq .*, not of kl"):
        TranslatedVAE(kl, translator, kl)


def command(run, source, out) -> list[str]:
    return ["translate", str(source), "--translator", str(run / "whole"), "--out", str(out)]


def test_files_are_translated_and_say_whose_they_are(kl, vq, images, run, tmp_path, capsys):
    assert main(["encode", str(images), "--codec", str(run / "kl"), "--out", str(tmp_path / "kl")]) == 0
    argv = command(run, tmp_path / "kl", tmp_path / "vq")
    assert main(argv) == 0
    written = sorted((tmp_path / "vq").rglob("*.safetensors"))
    found = load_latents(written[0], codec=LatentCodec.from_pretrained(run / "vq"))
    before = load_latents(tmp_path / "kl" / written[0].relative_to(tmp_path / "vq"))
    assert (found.names, found.sizes, found.codec_name) == (before.names, before.sizes, "vq")
    translator = LatentTranslator.from_pretrained(run / "whole" / "translator")
    torch.testing.assert_close(found.latents[0], kl.translate(before.latents[0], translator))
    capsys.readouterr()
    assert (
        main(["decode", str(written[0]), "--codec", str(run / "vq"), "--out", str(tmp_path / "decoded")]) == 0
    )
    assert main([*command(run, written[0], tmp_path / "no"), "--json"]) == 2
    said = capsys.readouterr().err
    assert "holds latents of vq (space" in said and "this translator takes latents of kl (space" in said
    assert "Traceback" not in said and not (tmp_path / "no").exists()


def test_finer_latents_are_cut_to_the_image_and_an_upscaler_enlarges_it(kl, coarse, tmp_path):
    latents = coarse.encode(torch.rand(1, 3, 20, 30) * 2 - 1)
    save_latents(tmp_path / "a.safetensors", latents, codec=coarse, names=["a"], sizes=[(20, 30)])
    found = load_latents(tmp_path / "a.safetensors")
    translate_file(found, tmp_path / "b.safetensors", translator_between(coarse, kl))
    assert load_latents(tmp_path / "b.safetensors", codec=kl).latents[0].shape[2:] == (5, 8)
    translate_file(found, tmp_path / "c.safetensors", translator_between(coarse, coarse, upscale=2))
    large = load_latents(tmp_path / "c.safetensors", codec=coarse)
    assert large.sizes == [(40, 60)] and large.latents[0].shape[2:] == (5, 8)
    coarse.decode(large.latents[0], size=large.sizes[0])
    with pytest.raises(ValueError, match=r"would replace the latents"):
        translate_file(found, tmp_path / "a.safetensors", translator_between(coarse, kl))


@pytest.mark.parametrize("container, posterior", [("webdataset", "both"), ("safetensors", "mean")])
def test_a_data_set_becomes_one_of_the_other_codec(kl, vq, images, run, tmp_path, container, posterior):
    options = EncodingOptions(container=container, posterior=posterior, images_per_shard=4)
    encode_data_set(kl, open_source(images), tmp_path / "kl", options)
    argv = command(run, tmp_path / "kl", tmp_path / "vq")
    assert main(argv) == 0
    before, after = LatentDataset(tmp_path / "kl", sample=False), LatentDataset(tmp_path / "vq", codec=vq)
    assert len(after) == len(before) == 6 and len(after.index.shards) == 2
    assert all(damage is None for _, damage in after.verify())
    translator = LatentTranslator.from_pretrained(run / "whole" / "translator")
    for number in (0, 5):
        old, new = before[number], after[number]
        assert old["name"] == new["name"] and old["size"].tolist() == new["size"].tolist()
        torch.testing.assert_close(new["latents"][None], kl.translate(old["latents"][None], translator))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "vq").rglob("*")}
    assert main(argv) == 0  # which finds it complete
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "vq").rglob("*")}
    translator.linear.bias.data += 1
    with pytest.raises(ValueError, match=r"holds another data set"):
        translate_data_set(before, tmp_path / "vq", translator)
    with pytest.raises(ValueError, match=r"holds latents of vq .* takes latents of kl"):
        translate_data_set(after, tmp_path / "again", translator)
