"""Linear maps in closed form: of previews, of translators, and of linear starts."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGE = 1e-4
"""In units of the features' mean variance: enough for a dead channel."""


def ridge_regression(parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """W, b that minimize sum_i n_i |W x_i + b - y_i|^2 + lambda |W|^2, in closed form.

    W = cov(y, x) (cov(x) + lambda I)^-1 and b = mean(y) - W mean(x) (Hoerl and Kennard, 1970), the bias unpenalized. Data
    of any size: a part is forgotten once its sums of products are taken.

    Args:
        parts: features x, (N, C), targets y, (N, K), and weights n, (N,), if not all 1; of any dtype, on any device.

    Returns:
        float32 (K, C) and (K,), on the CPU.
    """
    products, origin = 0.0, None
    for x, y, *weights in parts:
        rows = torch.cat([x, y], 1).cpu().double()
        origin = rows.mean(0) if origin is None else origin  # so that no large mean drowns a small variance
        rows = F.pad(rows - origin, (0, 1), value=1)
        products = products + rows.T @ (weights[0].cpu().double().unsqueeze(1) * rows if weights else rows)
        num_features = x.shape[1]
    moments = products / products[-1, -1]
    mean = moments[-1, :-1]
    covariance = moments[:-1, :-1] - torch.outer(mean, mean)
    of_x, of_both = covariance[:num_features, :num_features], covariance[:num_features, num_features:]
    strength = RIDGE * of_x.diagonal().mean().clamp_min(1e-12)
    weight = torch.linalg.solve(of_x + strength * torch.eye(num_features, dtype=torch.float64), of_both).T
    mean_x, mean_y = (mean + origin).tensor_split([num_features])
    return weight.float(), (mean_y - weight @ mean_x).float()
