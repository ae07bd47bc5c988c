"""The layout of convolutions' weights in memory, by which a network computes faster and to the same values up to rounding."""

import torch
from torch import nn


def use_channels_last(network: nn.Module) -> None:
    """Lay out a network's convolution weights channels last, in place, where that was measured to compute faster.

    That is float32 on a CPU, without gradients: AutoencoderKL and the previews' TinyDecoder take about a fifth less time,
    VQ and tiny autoencoders 5 to 15 % less (tests/benchmarks/test_channels_last.py); a training step takes no less. A
    convolution passes its layout on to the features, so that those of the whole network are channels last; tiles are
    always (feature_maps.py). Values stay, and with them fingerprints and files. Other devices and dtypes are not changed.
    """
    for weight in network.parameters():
        is_measured = weight.ndim == 4 and weight.dtype == torch.float32 and weight.device.type == "cpu"
        if is_measured and not weight.is_contiguous(memory_format=torch.channels_last):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
