"""Say which images are unusual, and where.

It writes report.png, the most unusual images, those at the threshold and the
most usual, each over its heat map; scores.csv and anomalies.json, with the
scores of every image; and heat-maps/, the most unusual images next to theirs.
A heat map is the codec's error relative to that of normal images at equal
local gradient: gray where it is as usual, red where it is 8 times as much.

Scores are the error of the reconstruction, the -ELBO in bits per dim (of
codecs with a posterior), the Mahalanobis distance of the features, and
combined, the mean of their ranks among held-out normal images; larger is more
unusual. With labels there is the area under the ROC curve, with its 95 %
bootstrap interval.

Images that cannot be read are left out and named on stderr; the exit status
is then 2.

Examples:
  latent-codec anomaly score new/ --detector detector
  latent-codec anomaly score new/ --detector detector --by features
  latent-codec anomaly score fashion_mnist/ --detector shirts \\
    --label class --normal 6
"""

import argparse
from pathlib import Path

from latent_codec.cli import arguments
from latent_codec.cli.anomaly_fit import add_label_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, split="test")
    parser.add_argument(
        "--detector", required=True, type=Path, metavar="DIR", help="use what `anomaly fit` wrote here"
    )
    parser.add_argument(
        "--by",
        metavar="SCORE",
        choices=("combined", "reconstruction", "elbo", "features"),
        default="combined",
        help="decide by this score: combined, reconstruction, elbo or features (default: combined)",
    )
    add_label_arguments(parser, "measure against this label")
    parser.add_argument(
        "--heat-maps", type=int, default=16, metavar="N", help="write N heat maps (default: 16)"
    ).least = 0
    arguments.add_out_argument(parser, "latent-codec-out/anomaly", "report, scores and heat maps")
    arguments.add_codec_arguments(parser, default=None, meaning="the detector's, from where it was")
    arguments.add_json_argument(parser)
