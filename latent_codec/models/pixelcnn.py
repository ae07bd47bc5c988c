"""PixelCNN: the convolutional prior, over codebook indices, pixels and the latents of a continuous codec."""

from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers asks the module for it
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.errors import SettingError
from latent_codec.models.autoregressive import AutoregressivePrior
from latent_codec.models.causal import GatedLayer, PointwiseConv
from latent_codec.models.likelihoods import discretized_logistic, scale_values
from latent_codec.models.quantizers import at_least_float32
from latent_codec.models.scalar_quantizer import ScalarQuantizer


class PixelCNN(AutoregressivePrior):
    """The Gated PixelCNN (van den Oord et al., arXiv:1606.05328), on grids of any size.

        indices --embed--+--shift_down---> vertical   --+             +--> vertical   --> ... (unused at the end)
                         |                              | GatedLayer  |
                         +--shift_right--> horizontal --+  x layers --+--> horizontal --head--> logits

    What the indices are decides the embedding and the head:

    - "codes": indices of a codebook, (B, h, w).
    - "pixels": values 0..255 of 1 or more channels, (B, C, h, w): red, green given red, blue given both, each
      a choice among 256. An image in [-1, 1] has the indices round(127.5 (image + 1)).
    - "latents": symbols of scalar-quantized latents, (B, C, h, w), channels in order, each a discretized mixture of
      logistics (PixelCNN++, arXiv:1701.05517, section 2.1). `encode_latents` and `decode_latents` convert.

    A position's earlier channels enter only in the head, after the layers, so that a position is computed once.

    Args:
        data: what the indices are.
        codebook_size: of the indices; not used by the others.
        data_channels: of pixels or latents; 1 for indices.
        latent_steps, latent_minimum, latent_maximum, latent_dead_zone: of the latents' ScalarQuantizer, in the unit
            of the latents that come.
        num_mixtures: logistics per channel of a latent.
        hidden_channels: width of both stacks.
        num_layers: depth; a layer sees `kernel_size` // 2 further on every side that is past.
        kernel_size: odd, 3 or more.
        dropout: share of gated values left out while training.
        num_classes, condition_codebook_size, condition_channels, num_condition_blocks: as in AutoregressivePrior.
        sample_size, most_frequent, space_fingerprint: as in AutoregressivePrior.

    Raises:
        ValueError: where these do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        data: Literal["codes", "pixels", "latents"] = "codes",
        codebook_size: int = 512,
        data_channels: int = 1,
        latent_steps: tuple[float, ...] | None = None,
        latent_minimum: int = -128,
        latent_maximum: int = 127,
        latent_dead_zone: float = 1.0,
        num_mixtures: int = 10,
        hidden_channels: int = 128,
        num_layers: int = 12,
        kernel_size: int = 5,
        num_classes: int | None = None,
        condition_codebook_size: int | None = None,
        condition_channels: int | None = None,
        num_condition_blocks: int = 2,
        dropout: float = 0.0,
        sample_size: tuple[int, int] | None = None,
        most_frequent: tuple[int, ...] | None = None,
        space_fingerprint: str | None = None,
    ):
        super().__init__()
        self.has_channels, self.data_channels = data != "codes", data_channels
        self.quantizer: ScalarQuantizer | None = None
        """Of latents; None for other data."""
        if data == "codes":
            if data_channels != 1:
                raise ValueError(f"data_channels is {data_channels}; codes have 1.")
            self.num_values = codebook_size
            self.embed = CodeEmbedding(codebook_size, hidden_channels)
        elif data == "pixels":
            self.num_values = 256
            self.embed = ValueEmbedding(data_channels, hidden_channels, self.num_values)
        elif data == "latents":
            if latent_steps is None or len(latent_steps) != data_channels:
                expected = f"{data_channels}, one per channel, as ScalarQuantizer.from_latents finds them"
                raise SettingError("latent_steps", expected, latent_steps)
            self.quantizer = ScalarQuantizer(
                steps=latent_steps, minimum=latent_minimum, maximum=latent_maximum, dead_zone=latent_dead_zone
            )
            self.num_values = self.quantizer.num_levels
            self.embed = ValueEmbedding(data_channels, hidden_channels, self.num_values)
        else:
            raise ValueError(f'data is {data!r}; expected "codes", "pixels" or "latents"')
        if self.num_values < 2:
            raise ValueError(f"indices have {self.num_values} value; a prior needs 2 or more.")
        context_channels = self._make_context()
        self.layers = nn.ModuleList(
            GatedLayer(hidden_channels, kernel_size, context_channels, dropout) for _ in range(num_layers)
        )
        if data == "latents":
            self.head = MixtureHead(hidden_channels, data_channels, self.num_values, num_mixtures)
        else:
            self.head = CategoricalHead(hidden_channels, data_channels, self.num_values)

    def encode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> indices: the quantizer's levels, counted from its lowest.

        Raises:
            ValueError: where the data are not latents, and as ScalarQuantizer.encode.
        """
        return self._latents_quantizer().encode(latents) - self.config.latent_minimum

    def decode_latents(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The inverse of `encode_latents`, up to rounding."""
        return self._latents_quantizer().decode(indices + self.config.latent_minimum, dtype)

    def _latents_quantizer(self) -> ScalarQuantizer:
        if self.quantizer is None:
            raise ValueError(f'expected a PixelCNN over "latents", got one over {self.config.data}')
        return self.quantizer


class CodeEmbedding(nn.Embedding):
    """Codes (..., 1) -> vectors (..., dim)."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values[..., 0])

    def write(self, values: Tensor, out: Tensor) -> None:
        torch.index_select(self.weight, 0, values[:, 0], out=out)


class ValueEmbedding(nn.Linear):
    """Values 0..num_values - 1 of all channels, (..., C) -> (..., dim), linear in the values brought to -1..1.

    Its bias tells a value in the middle from the nothing outside the grid.
    """

    def __init__(self, data_channels: int, dim: int, num_values: int):
        super().__init__(data_channels, dim)
        self.num_values = num_values

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(scale_values(values, self.num_values, self.weight.dtype))

    def write(self, values: Tensor, out: Tensor) -> None:
        out.copy_(self(values))


class ChannelHead(nn.Module):
    """Features of a position -> the distribution of its channels, each given the earlier ones.

        features --elu, 1x1--> hidden[c] --+--elu, 1x1--> outputs[c]
        earlier channels' values --hints---+

    Args:
        channels: of the features and of each channel's hidden layer.
        data_channels: C.
        num_outputs: per channel, what a subclass makes a distribution of.
        hints: one per channel but the last: values -> what they tell every later channel, concatenated.
    """

    def __init__(self, channels: int, data_channels: int, num_outputs: int, hints: list[nn.Module]):
        super().__init__()
        self.hidden = PointwiseConv(channels, data_channels * channels)
        self.hints = nn.ModuleList(hints)
        self.outputs = nn.ModuleList(PointwiseConv(channels, num_outputs) for _ in range(data_channels))

    def logits(self, features: Tensor, values: Tensor) -> Tensor:
        """Features (B, channels, h, w), values (B, C, h, w) -> logits (B, num_values, C, h, w)."""
        return torch.stack([self.to_logits(output) for output in self._raw_outputs(features, values)], 2)

    def log_prob(self, features: Tensor, values: Tensor) -> Tensor:
        """The log-probability of `values`, summed over channels: (B, h, w)."""
        outputs = self._raw_outputs(features, values)
        each = [self.to_log_prob(output, value) for output, value in zip(outputs, values.unbind(1))]
        return torch.stack(each).sum(0)

    def begin(self, batch: int) -> "ChannelHeadCache":
        return ChannelHeadCache(self, batch)

    def hint(self, channel: int, values: Tensor) -> Tensor:
        """Hints from `values` (...) of a channel to the later ones: (..., later channels * channels)."""
        raise NotImplementedError

    def to_logits(self, outputs: Tensor) -> Tensor:
        """A channel's outputs (B, num_outputs, ...) -> logits (B, num_values, ...), float32 or float64."""
        raise NotImplementedError

    def to_log_prob(self, outputs: Tensor, values: Tensor) -> Tensor:
        """A channel's outputs (B, num_outputs, ...) and values (B, ...) -> their log-probability (B, ...)."""
        raise NotImplementedError

    def _raw_outputs(self, features: Tensor, values: Tensor) -> list[Tensor]:
        hidden = self.hidden(F.elu(features)).chunk(len(self.outputs), 1)
        outputs = [self.outputs[0](F.elu(hidden[0]))]
        told: list[Tensor] = []
        for channel in range(1, len(self.outputs)):
            latest = self.hint(channel - 1, values[:, channel - 1]).movedim(-1, 1)
            latest = latest.chunk(len(self.outputs) - channel, 1)
            told = [before + now for before, now in zip(told[1:], latest)] if told else list(latest)
            outputs.append(self.outputs[channel](F.elu(hidden[channel] + told[0])))
        return outputs


class ChannelHeadCache:
    """A head at one position: the hidden layers, which `logits` completes channel by channel, in order."""

    def __init__(self, head: ChannelHead, batch: int):
        self.head = head
        self.width = head.hidden.in_channels
        self.hidden_matrix, self.hidden_bias = head.hidden.matrix(), head.hidden.bias
        self.output_matrices = [output.matrix() for output in head.outputs]
        self.output_biases = [output.bias for output in head.outputs]
        self.hidden = self.hidden_matrix.new_empty(batch, head.hidden.out_channels)
        self.hidden_of = self.hidden.split(self.width, 1)

    def enter(self, features: Tensor) -> None:
        """Take the features (B, channels) of a position, which are changed."""
        torch.addmm(self.hidden_bias, F.elu_(features), self.hidden_matrix, out=self.hidden)

    def logits(self, values: Tensor, channel: int) -> Tensor:
        """Logits (B, num_values) of `channel`, given the values (B, C) of those before it; once for each in turn."""
        if channel:
            self.hidden[:, channel * self.width :] += self.head.hint(channel - 1, values[:, channel - 1])
        hidden = F.elu_(self.hidden_of[channel])
        outputs = torch.addmm(self.output_biases[channel], hidden, self.output_matrices[channel])
        return self.head.to_logits(outputs)


class CategoricalHead(ChannelHead):
    """One logit per value."""

    def __init__(self, channels: int, data_channels: int, num_values: int):
        later = range(data_channels - 1, 0, -1)
        hints: list[nn.Module] = [nn.Embedding(num_values, count * channels) for count in later]
        super().__init__(channels, data_channels, num_values, hints)

    def hint(self, channel: int, values: Tensor) -> Tensor:
        return self.hints[channel](values)

    def to_logits(self, outputs: Tensor) -> Tensor:
        return at_least_float32(outputs)

    def to_log_prob(self, outputs: Tensor, values: Tensor) -> Tensor:
        return -F.cross_entropy(at_least_float32(outputs), values, reduction="none")


class MixtureHead(ChannelHead):
    """A discretized mixture of logistics per channel (PixelCNN++, arXiv:1701.05517, section 2.1).

    Each channel has its own mixture weights, and all that describes it may depend on earlier channels; the paper
    shares the weights and shifts only the means (section 2.2).
    """

    def __init__(self, channels: int, data_channels: int, num_values: int, num_mixtures: int):
        later = range(data_channels - 1, 0, -1)
        hints: list[nn.Module] = [nn.Linear(1, count * channels, bias=False) for count in later]
        super().__init__(channels, data_channels, 3 * num_mixtures, hints)
        self.num_values = num_values

    def hint(self, channel: int, values: Tensor) -> Tensor:
        hint = self.hints[channel]
        return hint(scale_values(values, self.num_values, hint.weight.dtype)[..., None])

    def to_logits(self, outputs: Tensor) -> Tensor:
        values = torch.arange(self.num_values, device=outputs.device).view(-1, *[1] * (outputs.ndim - 2))
        return self.to_log_prob(outputs[:, :, None], values[None])

    def to_log_prob(self, outputs: Tensor, values: Tensor) -> Tensor:
        outputs = at_least_float32(outputs)
        weights, means, log_scales = outputs.chunk(3, 1)
        log_probs = discretized_logistic(values[:, None], means, log_scales, self.num_values)
        return torch.logsumexp(weights.log_softmax(1) + log_probs, 1)
