"""A codec as the network inside ComfyUI's VAE object.

pixels [-1, 1] (B, C, H, W) --codec.encode--> latents --samples_of--> samples, as ComfyUI passes them from node to node
pixels [-1, 1] (B, C, H, W) <--codec.decode-- latents <--latents_of-- samples
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from latent_codec.codec import LatentCodec
from latent_codec.families import LatentSpace

ENCODING, DECODING = 14, 17
"""Values held at once per pixel and channel of the layers at the image's resolution.

ComfyUI counts 1,767 values per pixel for Stable Diffusion's encoder and 2,178 for its decoder, whose layers have 128 channels there.
"""


def samples_of(latents: Tensor, space: LatentSpace) -> Tensor:
    """Latents of a codec -> what ComfyUI passes from node to node.

    ComfyUI passes raw latents, (B, c, h, w), which each model's own format scales; of video models with an axis of frames,
    (B, c, 1, h, w). Latents that are packed for the denoiser (FLUX.2) are passed as the denoiser knows them.
    """
    if space.raw_channels != space.channels:
        return latents
    raw_latents = space.denormalize(latents)
    return raw_latents.unsqueeze(2) if space.frame_axis else raw_latents


def latents_of(samples: Tensor, space: LatentSpace) -> Tensor:
    """Undo `samples_of`; of video models samples without frames are taken, too.

    Raises:
        ValueError: for more than one frame.
    """
    if samples.ndim == 5:
        if samples.shape[2] != 1:
            raise ValueError(f"expected latents of one frame, got {samples.shape[2]} frames")
        samples = samples[:, :, 0]
    return samples if space.raw_channels != space.channels else space.normalize(samples)


class CodecNetwork(nn.Module):
    """What ComfyUI's VAE object calls, moves between devices and asks for its weights.

    Args:
        codec: computes in its own dtype, on whatever device ComfyUI has moved the network to.
        on_progress: called with (layers begun, layers in all) as each layer of the encoder or decoder begins.
        check: called before each layer of each tile; what it raises ends the work.
    """

    def __init__(
        self,
        codec: LatentCodec,
        on_progress: Callable[[int, int], None] = lambda begun, total: None,
        check: Callable[[], None] = lambda: None,
    ):
        super().__init__()
        self.codec, self.on_progress, self.check = codec, on_progress, check
        self.autoencoder = codec.autoencoder

    def encode(self, images: Tensor, tile: int | None = None) -> Tensor:
        """Images (B, 1, 3 or 4, H, W) in [-1, 1] -> samples; the mean of a posterior."""
        with self._reporting(decoder=False):
            return samples_of(self.codec.encode(images, tile=tile), self.codec.latent_space)

    def decode(self, samples: Tensor, tile: int | None = None) -> Tensor:
        """Samples -> images (B, 3 or 4, H, W) in [-1, 1]; gray ones as color, which ComfyUI's nodes expect."""
        latents = latents_of(samples, self.codec.latent_space)
        with self._reporting(decoder=True):
            images = self.codec.decode(latents, output_type="pt", tile=tile)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images

    @property
    def image_channels(self) -> int:
        """Of what `decode` gives."""
        return max(self.codec.channels, 3)

    def values_to_encode(self, height: int, width: int) -> int:
        """About as many values are held at once while an image is encoded."""
        first = next(each for each in self.autoencoder.modules() if _is_layer(each))
        return ENCODING * first.weight.shape[0] * height * width

    def values_to_decode(self, height: int, width: int) -> int:
        """The same for latents of `height` rows and `width` columns."""
        channels = self.codec.family.last_layer.weight.shape[1]
        return DECODING * channels * height * width * self.codec.latent_space.downsampling_factor**2

    @contextmanager
    def _reporting(self, decoder: bool) -> Iterator[None]:
        """Call `check` and `on_progress` as layers of the encoder, or of the decoder, begin."""
        layers = [
            module
            for name, module in self.autoencoder.named_modules()
            if _is_layer(module) and self.codec.is_of_decoder(f"{name}.") == decoder
        ]
        begun: set[nn.Module] = set()

        def begin(layer: nn.Module, _) -> None:
            self.check()
            if layer not in begun:
                begun.add(layer)
                self.on_progress(len(begun), len(layers))

        hooks = [layer.register_forward_pre_hook(begin) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a convolution or a linear layer."""
    return getattr(getattr(module, "weight", None), "ndim", 0) > 1 and not isinstance(module, nn.Embedding)
