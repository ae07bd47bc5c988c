"""PixelSNAIL: the prior over codebook indices, whose every position looks back at all before it."""

from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers asks the module for it
from torch import nn

from latent_codec.models.autoregressive import AutoregressivePrior
from latent_codec.models.causal import CausalAttention, GatedResidual
from latent_codec.models.pixelcnn import CategoricalHead, CodeEmbedding


class PixelSNAIL(AutoregressivePrior):
    """Causal convolutions and attention in turn (Chen et al., arXiv:1712.09763, figure 2).

        indices -embed-+--shift_down---> vertical   --[GatedResidual x layers]-------------------+--> ...
                       |                                |                                        |  x blocks
                       +--shift_right--> horizontal --[GatedResidual x layers]--CausalAttention--+--> head --> logits

    Convolutions have the two stacks of PixelCNN++ instead of the paper's one: nothing of the neighborhood is out of
    sight, and half or more of the work of a position is its row's, done once. Attention knows each position's place
    as a share of the grid's sides, so that it runs on any size and is at its best near those it was trained on.

    Args:
        codebook_size: number of codewords.
        hidden_channels: width of both stacks.
        num_blocks: how often attention follows the convolutions.
        num_layers: gated residual layers per block.
        kernel_size: odd, 3 or more.
        attention_channels, num_heads: of queries, keys and values, over all heads.
        dropout: share of values left out while training, in the middle of every residual layer.
        num_classes, condition_codebook_size, condition_channels, num_condition_blocks: as in AutoregressivePrior.
        sample_size, most_frequent, space_fingerprint: as in AutoregressivePrior.

    Raises:
        ValueError: where these do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 512,
        hidden_channels: int = 128,
        num_blocks: int = 2,
        num_layers: int = 4,
        kernel_size: int = 3,
        attention_channels: int = 128,
        num_heads: int = 4,
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
        if codebook_size < 2:
            raise ValueError(f"codebook_size is {codebook_size}; a prior needs 2 codes or more.")
        self.num_values = codebook_size
        self.embed = CodeEmbedding(codebook_size, hidden_channels)
        context_channels = self._make_context()
        self.layers = nn.ModuleList()
        for _ in range(num_blocks):
            for _ in range(num_layers):
                self.layers.append(GatedResidual(hidden_channels, kernel_size, context_channels, dropout))
            self.layers.append(CausalAttention(hidden_channels, attention_channels, num_heads, dropout))
        self.head = CategoricalHead(hidden_channels, 1, codebook_size)
