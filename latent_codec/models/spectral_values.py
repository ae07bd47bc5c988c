"""Largest singular values of convolutions, for spectral regularization (NVAE, arXiv:2007.03898, section 3.2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LargestSingularValues(nn.Module):
    """The largest singular value of every convolution's weight, as a matrix (out, in x k x k), by power iteration.

    Weights of one shape are iterated together; each call goes one step on from the vectors of the last (equation 4 of spectral
    normalization, arXiv:1802.05957). Of a depthwise convolution, whose matrix is block-diagonal, the largest is that of one
    channel, its norm, exactly.

    Args:
        network: its convolutions; not registered, so that its weights are in checkpoints once.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
        depthwise = [
            module.weight
            for module in network.modules()
            if isinstance(module, nn.Conv2d) and module.groups > 1
        ]
        self._depthwise = depthwise
        self._by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for weight in weights:
            if not any(weight is each for each in depthwise):
                self._by_shape.setdefault(tuple(weight.flatten(1).shape), []).append(weight)
        generator = torch.Generator().manual_seed(0)
        for (rows, columns), members in self._by_shape.items():
            start = torch.randn(len(members), rows, generator=generator)
            self.register_buffer(f"left_{rows}x{columns}", F.normalize(start, dim=1))

    def forward(self, num_steps: int = 1) -> Tensor:
        """One value per convolution, with gradients for their weights; estimates from below."""
        found = [weight.flatten(1).norm(dim=1).max()[None] for weight in self._depthwise]
        for (rows, columns), members in self._by_shape.items():
            matrices = torch.stack([weight.flatten(1).float() for weight in members])
            left = self.get_buffer(f"left_{rows}x{columns}")
            with torch.no_grad():
                for _ in range(num_steps):
                    right = F.normalize(torch.einsum("nij,ni->nj", matrices, left), dim=1)
                    left.copy_(F.normalize(torch.einsum("nij,nj->ni", matrices, right), dim=1))
            found.append(torch.einsum("ni,nij,nj->n", left.clone(), matrices, right))
        return torch.cat(found)
