"""Autoregressive priors: the likelihood of an index map, and sampling one in raster order.

    p(x) = prod_p prod_c p(x[c, p] | all channels of the positions before p, x[< c, p], condition, label)

    indices --embed--> shifted down, right --layers--> features of each position, blind to it --head--> logits
                                             ^                                                   ^
                  condition, class labels ---+                       a position's earlier channels, if it has several

`logits` and `log_prob` compute all positions at once. `sample` goes through an `IncrementalSampler`, which
computes one position after the other from caches, by the same weights (models/causal.py).
"""

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.errors import SettingError
from latent_codec.models.causal import CausalContext, shift_down, shift_raster, shift_right
from latent_codec.models.own_weights import OwnWeights
from latent_codec.tensors import check_floating, check_range, check_shape
from latent_codec.torch_settings import ignoring_caller_settings

Generators = torch.Generator | Sequence[torch.Generator] | None


class AutoregressivePrior(OwnWeights, ModelMixin, ConfigMixin):
    """A stack of causal layers between an embedding of indices and a head that predicts them.

    A subclass makes `embed`, `layers` and `head` in its constructor, with the channels that `_make_context` gives.
    Indices are (B, h, w), or (B, C, h, w) where `has_channels`, and always 0 to `num_values` - 1.

    Args:
        num_classes: of the labels; None for a model without.
        condition_codebook_size: of the indices of a condition; None for none.
        condition_channels: of a condition of features; None for none.
        num_condition_blocks: residual blocks that read a condition, before and after it is brought to the grid.
        sample_size: (height, width) of the grids it was trained on, which pipelines sample by default.
        most_frequent: the commonest index of each channel, shown where a half-sampled grid has none yet; None: 0.
        space_fingerprint: of the codec whose indices it was trained on (LatentCodec.space_fingerprint).
    """

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    embed: nn.Module
    """int64 (..., C) -> (..., hidden_channels); `write(values, out)` does it for (B, C), into `out`."""
    layers: nn.ModuleList
    head: nn.Module
    has_channels = False
    """Whether indices have an axis of channels."""
    data_channels = 1
    """Indices per position."""
    num_values: int
    """Number of values of an index."""

    def _make_context(self) -> int:
        """Make what reads labels and a condition by the config; return the channels of `_context`: 0 without either."""
        config, channels = self.config, self.config.hidden_channels
        size, features = config.condition_codebook_size, config.condition_channels
        if size is not None and features is not None:
            raise ValueError("expected condition_codebook_size or condition_channels, got both; give one")
        self.class_embedding = self.condition_network = None
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_classes, channels)
        if size is not None or features is not None:
            entry = nn.Embedding(size, channels) if features is None else nn.Conv2d(features, channels, 1)
            self.condition_network = ConditionNetwork(entry, channels, config.num_condition_blocks)
        return 0 if self.class_embedding is None and self.condition_network is None else channels

    def logits(
        self, indices: Tensor, condition: Tensor | None = None, class_labels: Tensor | None = None
    ) -> Tensor:
        """Unnormalized log-probabilities of every value at every position, given the positions before it.

        Args:
            indices: int64 (B, h, w), or (B, C, h, w) where `has_channels`, in 0..num_values - 1.
            condition: indices of the level above, int64 (B, h', w'), or features (B, condition_channels, h', w'); h'
                and w' divide h and w.
            class_labels: int64 (B,), in 0..num_classes - 1.

        Returns:
            float32 (float64 from a float64 model), (B, num_values, *indices.shape[1:]).

        Raises:
            ValueError: for shapes, dtypes and ranges other than these, and for a condition or labels missing where the
                model has them, or given where it has none.
        """
        self.check_ranges(indices, condition, class_labels)
        values, features = self._features(indices, condition, class_labels)
        logits = self.head.logits(features, values)
        return logits if self.has_channels else logits[:, :, 0]

    def log_prob(
        self, indices: Tensor, condition: Tensor | None = None, class_labels: Tensor | None = None
    ) -> Tensor:
        """Log-probability in nats of each position given those before it, summed over its channels: (B, h, w).

        `-log_prob(...).mean()` is the loss to train by; divided by log(2) data_channels, bits per dim. Arguments
        and errors are those of `logits`.
        """
        self.check_ranges(indices, condition, class_labels)
        return self(indices, condition, class_labels)

    def forward(
        self, indices: Tensor, condition: Tensor | None = None, class_labels: Tensor | None = None
    ) -> Tensor:
        """`log_prob` of what `check_ranges` has passed: waits for no device, so that training need not."""
        values, features = self._features(indices, condition, class_labels)
        return self.head.log_prob(features, values)

    def check_ranges(
        self, indices: Tensor | None, condition: Tensor | None, class_labels: Tensor | None
    ) -> None:
        """Refuse indices and labels that the model does not have, which waits for the device that they are on.

        Raises:
            ValueError: for a value out of range. Shapes and dtypes are checked wherever they are used.
        """
        name, config = type(self).__name__, self.config
        for numbers, size, what, meaning in (
            (indices, self.num_values, "indices", f"values of this {name}: is it the codec's prior?"),
            (
                condition,
                config.condition_codebook_size,
                "the condition's indices",
                "of the level above this prior",
            ),
            (class_labels, config.num_classes, "class_labels", f"classes of this {name}"),
        ):
            if size is not None and numbers is not None and numbers.dtype == torch.int64:
                check_range(numbers, size, what, meaning)

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        condition: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generators = None,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        callback: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw grids of indices, position after position in raster order, channel after channel.

        With `known` and `known_mask`, known positions keep their indices and the rest are drawn in raster order,
        each given all positions before it, known or drawn. A known position *after* a hole therefore changes
        nothing in the hole: it only informs what is drawn after itself. Dropout is off.

        Args:
            shape: of the result: (B, h, w), or (B, C, h, w) where `has_channels`; h and w as you like.
            condition, class_labels: as for `logits`, for B grids.
            temperature: divides the logits; 0 takes the most probable value.
            top_k: draw among the N most probable values; None: among all.
            top_p: draw among the fewest most probable values whose probabilities sum to this; None: among all.
            generator: a random number generator, or one per grid. Each position consumes as many of its numbers, drawn or
                known, so that the same seed and arguments give the same indices, and those of a completion follow
                from what it keeps.
            known: indices of `shape`; only those under the mask are read.
            known_mask: bool (B, h, w) or (h, w): the positions whose indices are known.
            callback: called after each position with the indices so far, of `shape` and 0 where there are none
                yet, and with a bool mask (B, h, w) of the positions that are known or drawn. Both change as
                sampling goes on: copy what you keep.

        Returns:
            int64 of `shape`.

        Raises:
            ValueError: as `logits`, and for values of the other arguments that mean nothing.
        """
        batch, height, width = self._check_shape(shape)
        _check_sampling(temperature, top_k, top_p)
        if not isinstance(generator, torch.Generator | None) and len(generator) != batch:
            raise ValueError(f"expected one generator, or one per grid, {batch}, got {len(generator)}")
        with ignoring_caller_settings():
            indices, done = self._start(batch, height, width, known, known_mask)
            by_position = indices.permute(2, 3, 0, 1)  # views, which change with the grid
            keep = done.clone().permute(1, 2, 0)
            skips = keep.all(2).tolist()
            any_known = keep.any(2).tolist()
            with torch.inference_mode():  # which is faster; the indices stay ordinary tensors
                self.check_ranges(None, condition, class_labels)
                context = self._context(batch, height, width, condition, class_labels)
                sampler = IncrementalSampler(self, batch, height, width, context)
        for row, column in product(range(height), range(width)):
            with ignoring_caller_settings(), torch.inference_mode():
                if column == 0:
                    uniforms = draw_uniforms((width, self.data_channels), batch, generator, self.device)
                sampler.advance()
                values = by_position[row, column]
                for channel in range(0 if skips[row][column] else self.data_channels):
                    logits = filter_logits(sampler.logits(values, channel), temperature, top_k, top_p)
                    drawn = draw(logits, uniforms[column, channel])
                    if any_known[row][column]:
                        drawn = torch.where(keep[row, column], values[:, channel], drawn)
                    values[:, channel] = drawn
                sampler.append(values)
            if callback is not None:
                done[:, row, column] = True
                callback(indices if self.has_channels else indices[:, 0], done)
        return indices if self.has_channels else indices[:, 0]

    def _features(
        self, indices: Tensor, condition: Tensor | None, class_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Indices -> the same as (B, C, h, w), and features (B, hidden_channels, h, w) blind to their position."""
        values = self._check_indices(indices)
        batch, _, height, width = values.shape
        embedded = self.embed(values.movedim(1, -1)).movedim(-1, 1).contiguous()
        around = CausalContext(
            self._context(batch, height, width, condition, class_labels),
            shift_raster(embedded),
            self._background(height, width),
        )
        vertical, horizontal = shift_down(embedded), shift_right(embedded)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                vertical, horizontal = self._gradient_checkpointing_func(layer, vertical, horizontal, around)
            else:
                vertical, horizontal = layer(vertical, horizontal, around)
        return values, horizontal

    def _background(self, height: int, width: int) -> Tensor:
        """Coordinates from -1/2 to 1/2, (1, 2, h, w), as PixelSNAIL's attention sees them."""
        rows = torch.arange(height, dtype=self.dtype, device=self.device) / height - 0.5
        columns = torch.arange(width, dtype=self.dtype, device=self.device) / width - 0.5
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]

    def _context(
        self, batch: int, height: int, width: int, condition: Tensor | None, class_labels: Tensor | None
    ) -> Tensor | None:
        """Condition and labels as one map, (B, D, h, w), or (B, D, 1, 1) without a condition."""
        name = type(self).__name__
        parts = []
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                f"this {name} has no classes; leave class_labels out."
                if self.class_embedding is None
                else f"this {name} has {self.class_embedding.num_embeddings} classes; give class_labels, one per grid."
            )
        if class_labels is not None:
            check_shape(class_labels, "class_labels", (batch,), dtype=torch.int64)
            parts.append(self.class_embedding(class_labels)[:, :, None, None])
        if (condition is None) != (self.condition_network is None):
            raise ValueError(
                f"this {name} takes no condition; leave it out."
                if self.condition_network is None
                else f"this {name} was made for a condition, {self.condition_network.expected}; give one."
            )
        if condition is not None:
            parts.append(self.condition_network(condition, batch, height, width))
        return sum(parts[1:], parts[0]) if parts else None

    def _check_indices(self, indices: Tensor) -> Tensor:
        """Indices as (B, C, h, w), or an error that says what is wrong with them."""
        self._check_shape(indices.shape)
        if indices.dtype != torch.int64:
            raise ValueError(f"indices are {indices.dtype}; expected torch.int64.")
        return indices if self.has_channels else indices[:, None]

    def _check_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The shape's batch, height and width."""
        form = f"(B, {self.data_channels}, h, w)" if self.has_channels else "(B, h, w)"
        fits = len(shape) == (4 if self.has_channels else 3) and min(shape) > 0
        if not fits or (self.has_channels and shape[1] != self.data_channels):
            raise ValueError(f"indices of shape {tuple(shape)}; expected {form}, no side 0.")
        return shape[0], shape[-2], shape[-1]

    def _start(
        self, batch: int, height: int, width: int, known: Tensor | None, known_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The indices before sampling, (B, C, h, w) with 0 where unknown, and the mask (B, h, w) of known positions."""
        indices = torch.zeros(batch, self.data_channels, height, width, dtype=torch.int64, device=self.device)
        mask = torch.zeros(batch, height, width, dtype=torch.bool, device=self.device)
        if (known is None) != (known_mask is None):
            raise ValueError("known and known_mask belong together; give both or neither.")
        if known is None:
            return indices, mask
        expected = (batch, *([self.data_channels] if self.has_channels else []), height, width)
        check_shape(known, "known", expected, dtype=torch.int64)
        check_shape(known_mask, "known_mask", mask.shape, mask.shape[1:], dtype=torch.bool)
        mask |= known_mask.to(self.device)
        known = known.to(self.device).view_as(indices).masked_fill(~mask[:, None], 0)
        self.check_ranges(known, None, None)
        return known, mask


class ConditionNetwork(nn.Module):
    """Codes or features of a coarser grid -> a context for every position of the finer one.

        condition --embedding | 1x1--> residual blocks --nearest--> the finer grid --> residual blocks --> context

    Args:
        entry: nn.Embedding for indices, a 1x1 convolution for features.
        channels: of the context.
        num_blocks: residual blocks on either grid.
    """

    def __init__(self, entry: nn.Embedding | nn.Conv2d, channels: int, num_blocks: int):
        super().__init__()
        self.entry = entry
        self.coarse = nn.Sequential(*(ResidualBlock(channels) for _ in range(num_blocks)))
        self.fine = nn.Sequential(*(ResidualBlock(channels) for _ in range(num_blocks)))

    @property
    def expected(self) -> str:
        """Dtype, shape and range of a condition, in words."""
        if isinstance(self.entry, nn.Embedding):
            return f"indices (B, h', w'), int64 in 0..{self.entry.num_embeddings - 1}"
        return f"features (B, {self.entry.in_channels}, h', w')"

    def forward(self, condition: Tensor, batch: int, height: int, width: int) -> Tensor:
        self._check(condition, batch, height, width)
        if isinstance(self.entry, nn.Embedding):
            entered = self.entry(condition).movedim(-1, 1)
        else:
            entered = self.entry(condition.to(self.entry.weight.dtype))
        coarse = self.coarse(entered.contiguous())
        return self.fine(F.interpolate(coarse, (height, width), mode="nearest"))

    def _check(self, condition: Tensor, batch: int, height: int, width: int) -> None:
        if isinstance(self.entry, nn.Embedding):
            check_shape(condition, "the condition", (batch, "h'", "w'"), dtype=torch.int64)
        else:
            check_floating(condition, "the condition")
            check_shape(condition, "the condition", (batch, self.entry.in_channels, "h'", "w'"))
        rows, columns = condition.shape[-2:]
        if not rows or not columns or height % rows or width % columns:
            grid, got = f"{height}x{width}", f"{rows}x{columns}"
            raise ValueError(f"expected a condition whose sides divide the grid's, {grid}, got {got}")


class ResidualBlock(nn.Module):
    """x + conv3x3(elu(conv3x3(elu(x))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.elu(self.conv1(F.elu(x))))


class IncrementalSampler:
    """Samples grids in raster order: the logits of one position at a time, from caches.

        for each position: advance(); for each channel: logits(values, channel), choose values[:, channel]; append(values)

    Args:
        prior: the model, whose weights stay as they are meanwhile.
        batch, height, width: of the grids.
        context: (B, D, h, w), (B, D, 1, 1) or None.

    To be used without autograd.
    """

    def __init__(
        self, prior: AutoregressivePrior, batch: int, height: int, width: int, context: Tensor | None
    ):
        self._embed, self._layers = prior.embed, list(prior.layers)
        self._caches = [layer.begin(batch, height, width) for layer in self._layers]
        self._head = prior.head.begin(batch)
        self._height, self._width, self._position = height, width, -1
        self._context = None if context is None else context.permute(2, 1, 3, 0).contiguous()  # h, D, w, B
        self._background = prior._background(height, width).permute(2, 1, 3, 0)
        channels = prior.config.hidden_channels
        self._row = torch.zeros(width, batch, channels, dtype=prior.dtype, device=prior.device)
        """Embeddings of the current row as far as known; the row before it until the first is."""
        self._columns = self._row.unbind(0)
        self._last = torch.zeros_like(self._columns[0])
        """The last embedding of the row before, which precedes the first of this one."""
        self._nothing = torch.zeros_like(self._columns[0])
        self._stream = torch.empty_like(self._columns[0])

    def advance(self) -> None:
        """Compute the features of the next position, the first at the first call."""
        self._position += 1
        row, column = divmod(self._position, self._width)
        if column == 0:
            context = None if self._context is None else self._context[min(row, len(self._context) - 1)]
            around = CausalContext(context, self._row, self._background[row])
            self._last.copy_(self._columns[-1])
            vertical = self._row.permute(2, 0, 1).contiguous()
            for layer, cache in zip(self._layers, self._caches):
                vertical = layer.row(cache, vertical, around)
        left = self._columns[column - 1] if column else self._nothing
        self._stream.copy_(left)
        previous = left if column else self._last
        for layer, cache in zip(self._layers, self._caches):
            layer.advance(cache, column, self._stream, previous)
        self._head.enter(self._stream)

    def logits(self, values: Tensor, channel: int) -> Tensor:
        """Logits (B, num_values) of `channel`, given the values (B, C) of the channels before it."""
        return self._head.logits(values, channel)

    def append(self, values: Tensor) -> None:
        """Take the position's values, int64 (B, C)."""
        self._embed.write(values, self._columns[self._position % self._width])


def filter_logits(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (B, K) at a temperature, with -inf for values that top-k or top-p (nucleus, arXiv:1904.09751) leaves out.

    Top-k comes before top-p, which counts the probability of what is left.
    """
    if temperature == 0:
        top_k = 1
    elif temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[1]:
        kept, places = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter_(1, places, kept)
    if top_p is not None and top_p < 1:
        ordered, places = logits.sort(dim=1, descending=True)
        shares = ordered.softmax(1)
        beyond = shares.cumsum(1) - shares >= top_p  # what comes before is enough
        beyond[:, 0] = False
        logits = torch.empty_like(logits).scatter_(1, places, ordered.masked_fill(beyond, -math.inf))
    return logits


def draw_uniforms(shape: Sequence[int], batch: int, generator: Generators, device: torch.device) -> Tensor:
    """Uniform numbers in (0, 1], float64 (*shape, batch, 1), those of a grid from its own generator if it has one."""
    if isinstance(generator, torch.Generator | None):
        source = device if generator is None else generator.device
        uniforms = torch.rand(*shape, batch, dtype=torch.float64, generator=generator, device=source)
    else:
        each = [
            torch.rand(*shape, dtype=torch.float64, generator=one, device=one.device).to(device)
            for one in generator
        ]
        uniforms = torch.stack(each, -1)
    return 1 - uniforms.to(device)[..., None]


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The value (B,) at which the cumulative probability of `logits` (B, K) reaches `uniform`, (B, 1) in (0, 1].

    Values of probability 0 are never drawn: the sum does not rise at them, and is above 0 where it is first reached.
    """
    cumulative = logits.softmax(1).cumsum(1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:])[:, 0]


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise SettingError("temperature", "a number of at least 0", temperature)
    if top_k is not None and top_k < 1:
        raise SettingError("top_k", "an integer of at least 1, or None for all values", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise SettingError("top_p", "a probability above 0, up to 1, or None for all values", top_p)
