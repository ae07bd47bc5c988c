"""Where in a file the autoencoder is: prefixes of any name, entries of training checkpoints, averages, and all the rest."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_codec import HierarchicalVQ, LatentCodec
from latent_codec.cli import main
from latent_codec.components.weight_files import WEIGHTS
from latent_codec.conversion import ConversionError, from_diffusers, read_foreign
from latent_codec.conversion.checkpoints import open_checkpoint, open_entries
from latent_codec.conversion.foreign import recognize
from latent_codec.models.autoencoder_vq import AutoencoderVQ


def kl_state(seed=0):
    """A latent-diffusion KL autoencoder's state dict."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return from_diffusers(AutoencoderKL(block_out_channels=(32,), latent_channels=4), "ldm")


def vq_state():
    torch.manual_seed(0)
    return from_diffusers(
        AutoencoderVQ(block_out_channels=(32,), latent_channels=4, num_vq_embeddings=8), "taming"
    )


def vq_vae_2_state():
    torch.manual_seed(0)
    return from_diffusers(HierarchicalVQ(hidden_channels=8, embed_dim=4, codebook_sizes=8), "vq-vae-2")


def taesd_state():
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return from_diffusers(AutoencoderTiny(), "taesd")


STATES = {"kl": kl_state, "vq": vq_state, "vq-vae-2": vq_vae_2_state, "taesd": taesd_state}
OPTIMIZER = {
    "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}},
    "param_groups": [{"lr": 1e-4, "params": [0]}],
}


def plus_one(state):
    return {key: tensor + 1 for key, tensor in state.items()}


def assert_takes(foreign, state):
    """The component's weights are those of a state dict, to the bit."""
    expected = recognize(state).component().state_dict()
    found = foreign.component().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "my_wrapper.", "_orig_mod.model.first_stage_model.", "a.0.b."]
)
@pytest.mark.parametrize("kind", STATES)
def test_any_prefix_is_found_and_named(kind, prefix):
    state = STATES[kind]()
    foreign = recognize({prefix + key: tensor for key, tensor in state.items()} | {"n": torch.zeros(1)})
    assert foreign.prefix == prefix
    assert_takes(foreign, state)
    assert foreign.keys.left_out["n"] == f"outside {prefix}*, the rest of a whole model"


def test_prefix_comes_before_a_point():
    state = {f"my{key}": tensor for key, tensor in kl_state().items()}
    with pytest.raises(ConversionError, match="no autoencoder"):
        recognize(state)


def test_other_things_with_an_encoder_are_no_second_autoencoder():
    other = {"denoiser.encoder.0.weight": torch.zeros(2, 2), "denoiser.decoder.1.weight": torch.zeros(2, 2)}
    foreign = recognize({f"vae.{key}": tensor for key, tensor in kl_state().items()} | other)
    assert foreign.prefix == "vae."
    assert set(foreign.keys.left_out) == set(other)


def test_convert_names_the_prefix_and_gives_the_same_bits(tmp_path, capsys):
    state = kl_state()
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "new"), "--scale", "sd1"]) == 0
    assert "autoencoder under module" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "new"), str(tmp_path / "back.pt"), "--to", "ldm"]) == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("wrapper", ["model", "checkpoint.model", "state_dict.vae"])
def test_every_tensor_of_other_entries_is_counted(tmp_path, wrapper):
    state, checkpoint = kl_state(), {}
    outer, _, inner = wrapper.partition(".")
    checkpoint[outer] = {inner: state} if inner else state
    others = {
        "discriminator": {"main.0.weight": torch.zeros(3)},
        "optimizer": OPTIMIZER,
        "history": [torch.ones(2)],
    }
    torch.save({**checkpoint, **others, "steps": 3}, tmp_path / "a.pt")
    foreign = read_foreign(tmp_path / "a.pt")
    foreign.keys.check("a.pt")
    assert foreign.prefix == f"{wrapper}."
    assert_takes(foreign, state)
    counts = foreign.keys.counts()
    assert counts == {
        "mapped": len(state),
        "left out: discriminator.*, another entry of the file": 1,
        "left out: history.*, another entry of the file": 1,
        "left out: optimizer.*, another entry of the file": 2,
        "missing": 0,
        "unexpected": 0,
    }
    assert sum(counts.values()) == len(open_entries(tmp_path / "a.pt"))
    assert foreign.count_keys_by_name() | {"missing": 0} == counts


def test_entries_around_a_bare_state_dict_are_counted(tmp_path):
    torch.save({**kl_state(), "optimizer": OPTIMIZER}, tmp_path / "a.pt")
    foreign = read_foreign(tmp_path / "a.pt")
    assert foreign.keys.counts()["left out: optimizer.*, another entry of the file"] == 2
    assert not foreign.keys.unexpected


def test_modules_in_entries_of_their_own_are_one_autoencoder(tmp_path):
    state, modules = kl_state(), {}
    for key, tensor in state.items():
        module, _, rest = key.partition(".")
        modules.setdefault(module, {})[rest] = tensor
    torch.save(modules, tmp_path / "a.pt")
    assert_takes(read_foreign(tmp_path / "a.pt"), state)


@pytest.mark.parametrize(
    ("raw", "averaged"),
    [("model", "ema"), ("state_dict", "ema_state_dict"), ("vae", "vae_ema"), ("net", "averaged.module")],
)
def test_averaged_weights_are_named_and_chosen_by_entry(tmp_path, capsys, raw, averaged):
    state, path = kl_state(), tmp_path / "a.pt"
    outer, _, inner = averaged.partition(".")
    torch.save({outer: {inner: plus_one(state)} if inner else plus_one(state), raw: state}, path)
    foreign = read_foreign(path)
    assert (foreign.prefix, foreign.averages) == (f"{raw}.", (f"{averaged}.",))
    assert_takes(foreign, state)
    rule = f"left out: {averaged}.*, averaged weights of the autoencoder"
    assert foreign.keys.counts()[rule] == len(state)
    assert_takes(read_foreign(path, entry=averaged), plus_one(state))
    assert_takes(read_foreign(path, entry=outer), plus_one(state))
    with pytest.warns(UserWarning, match=f"averaged weights, too, under {averaged}"):
        LatentCodec.from_pretrained(path)
    assert main(["convert", str(path), str(tmp_path / "raw"), "--scale", "sd1"]) == 0
    assert f"--entry {averaged} takes those" in capsys.readouterr().err
    command = ["convert", str(path), str(tmp_path / "new"), "--scale", "sd1", "--entry", averaged, "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["prefix"] == averaged


def test_averaged_weights_alone_are_taken():
    state = kl_state()
    foreign = recognize({f"ema.module.{key}": tensor for key, tensor in state.items()})
    assert foreign.prefix == "ema.module." and foreign.averages == ()


def test_entries_without_wrapper_are_prefixes_in_safetensors_too(tmp_path):
    state = kl_state()
    both = {f"raw.{key}": tensor for key, tensor in state.items()}
    both |= {f"ema.{key}": tensor for key, tensor in plus_one(state).items()}
    save_file(both, tmp_path / "a.safetensors")
    assert_takes(read_foreign(tmp_path / "a.safetensors"), state)
    assert_takes(read_foreign(tmp_path / "a.safetensors", entry="ema"), plus_one(state))


def test_the_wrapper_may_be_named_in_the_entry(tmp_path):
    state = {f"vae.{key}": tensor for key, tensor in kl_state().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.ckpt")
    for entry in ("vae", "state_dict.vae", "state_dict"):
        foreign = read_foreign(tmp_path / "a.ckpt", entry=entry)
        assert (foreign.prefix, foreign.wrapper) == ("vae.", "state_dict")


def test_identical_twins_are_one_and_counted(tmp_path):
    state = kl_state()
    torch.save(
        {"model": state, "best": {key: each.clone() for key, each in state.items()}}, tmp_path / "a.pt"
    )
    foreign = read_foreign(tmp_path / "a.pt")
    assert foreign.prefix == "model." and foreign.averages == ()
    assert foreign.keys.counts()["left out: best.*, the same weights once more"] == len(state)


def test_two_that_differ_are_asked_about(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"first": kl_state(), "second": kl_state(1)}, path)
    with pytest.raises(
        ConversionError, match=r"two autoencoders, .* under first and .* under second; convert one"
    ):
        read_foreign(path)
    assert_takes(read_foreign(path, entry="second"), kl_state(1))
    with pytest.raises(ConversionError, match=r"no autoencoder in 'third'; it has .*first.*second"):
        read_foreign(path, entry="third")


def test_weights_that_differ_in_one_bit_are_no_twins():
    state = kl_state()
    other = {key: tensor.clone() for key, tensor in state.items()}
    other["quant_conv.bias"][0] = -0.0
    state["quant_conv.bias"][0] = 0.0
    both = {f"a.{key}": tensor for key, tensor in state.items()}
    with pytest.raises(ConversionError, match="two autoencoders"):
        recognize(both | {f"b.{key}": tensor for key, tensor in other.items()})


def test_halves_of_a_tiny_autoencoder_have_prefixes_too(tmp_path):
    state = taesd_state()
    for side, wrap in (("encoder", "module."), ("decoder", "_orig_mod.taesd.")):
        half = {
            wrap + key.removeprefix(f"{side}."): each for key, each in state.items() if key.startswith(side)
        }
        torch.save({"state_dict": half}, tmp_path / f"{side}.pt")
    assert_takes(read_foreign([tmp_path / "decoder.pt", tmp_path / "encoder.pt"]), state)
    assert_takes(read_foreign(tmp_path / "decoder.pt"), state)  # the other half is next to it
    (tmp_path / "encoder.pt").unlink()
    with pytest.raises(ConversionError, match="is the decoder of a tiny autoencoder"):
        read_foreign(tmp_path / "decoder.pt")


@pytest.mark.parametrize(
    "make", [lambda deep: {"a": deep}, lambda deep: [deep], lambda deep: {"a": deep, "b": deep}]
)
def test_containers_without_end_are_refused(tmp_path, make):
    deep = {"x": torch.zeros(1)}
    for _ in range(70):
        deep = make(deep)
    torch.save({"model": deep, "other": {"y": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="dicts in dicts without end"):
        open_entries(tmp_path / "a.pt")


def test_a_checkpoint_of_one_state_dict_is_the_same_either_way(tmp_path):
    torch.save({"state_dict": kl_state(), "epoch": 1, "args": {"lr": 1}}, tmp_path / "a.ckpt")
    one, all_of_it = open_checkpoint(tmp_path / "a.ckpt"), open_entries(tmp_path / "a.ckpt")
    assert list(one) == list(all_of_it) and one.wrapper == all_of_it.wrapper
    assert one.not_tensors == all_of_it.not_tensors == ("args", "epoch")


# ------------------------------------------------------------------------------------- what is known and not supported


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("AutoencoderKLTemporalDecoder", {"block_out_channels": (32,)}),
        ("AsymmetricAutoencoderKL", {}),
    ],
)
def test_other_classes_of_diffusers_are_named_under_a_prefix_too(class_name, config):
    import diffusers

    state = getattr(diffusers, class_name)(**config).state_dict()
    with pytest.raises(ConversionError, match=f"{class_name}.*not supported yet"):
        recognize({f"vae.{key}": tensor for key, tensor in state.items()})


# ------------------------------------------------------------------------------------- weights that cannot be right


def changed(kind):
    state = kl_state()
    key = "decoder.conv_in.weight"
    if kind == "int8":
        state[key] = state[key].to(torch.int8)
    elif kind == "complex":
        state[key] = state[key].to(torch.complex64)
    else:
        state[key].view(-1)[3] = {"nan": float("nan"), "infinite": float("-inf"), "large": 1e6}[kind]
    return state, key


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("int8", "is of dtype int8, expected floating-point"),
        ("complex", "is of dtype complex64"),
        ("nan", "holds NaN or infinity"),
        ("infinite", "holds NaN or infinity"),
        ("large", "beyond float16's 6.55e"),
    ],
)
def test_weights_that_cannot_be_right_are_refused_before_anything_is_written(tmp_path, capsys, kind, words):
    state, key = changed(kind)
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    before = set(tmp_path.iterdir())
    for destination in (["deep/new"], ["deep/new.safetensors", "--to", "ldm"]):
        flags = ["--scale", "sd1", "--dtype", "float16", *destination[1:]]
        assert main(["convert", str(path), str(tmp_path / destination[0]), *flags]) == 2
        message = capsys.readouterr().err
        import re

        assert re.search(words, message) and key.rpartition(".")[0] in message and message.count("\n") == 1
        assert set(tmp_path.iterdir()) == before


def test_a_codec_that_overflows_is_not_written_in_half_precision(tmp_path, capsys):
    state, _ = changed("large")
    save_file(state, tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "codec"), "--scale", "sd1"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags in (["new"], ["new.safetensors", "--to", "ldm"]):
        command = [
            "convert",
            str(tmp_path / "codec"),
            str(tmp_path / flags[0]),
            *flags[1:],
            "--dtype",
            "float16",
        ]
        assert main(command) == 2
        assert "beyond float16" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_float8_weights_convert(tmp_path):
    state = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in kl_state().items()}
    save_file(state, tmp_path / "a.safetensors")
    found = read_foreign(tmp_path / "a.safetensors").component(torch.float32).state_dict()
    assert torch.equal(found["quant_conv.weight"], state["quant_conv.weight"].float())
    assert load_file(tmp_path / "a.safetensors").keys() == state.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_checkpoint_of_several_entries_is_calibrated_in_the_precision_of_its_autoencoder(dtype, tmp_path):
    from PIL import Image

    state = {key: tensor.to(dtype) for key, tensor in kl_state().items()}
    rest = {"discriminator": {"main.0.weight": torch.zeros(3, dtype=torch.float64)}, "optimizer": OPTIMIZER}
    torch.save({"model": state, **rest}, tmp_path / "a.ckpt")
    Image.effect_noise((32, 32), 100).save(tmp_path / "a.png")
    out = tmp_path / "out"
    assert (
        main(["calibrate", str(tmp_path / "a.png"), "--codec", str(tmp_path / "a.ckpt"), "--out", str(out)])
        == 0
    )
    assert {each.dtype for each in load_file(out / WEIGHTS).values()} == {dtype}
