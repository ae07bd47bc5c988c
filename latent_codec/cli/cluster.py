"""Group images by their features, without labels.

k-means groups the images of DATA by their features (`latent-codec features
--help` says what these are). In --out it leaves a row of images per cluster
(clusters.png), from the nearest to its center to the farthest; a map of
thumbnails, near each other where their features are (map.png); and the cluster
of each image (clusters.json). Frames have the color of the cluster.

Where images have labels it prints purity, the share of images that are of the
most frequent class of their cluster, and the normalized mutual information
(NMI) of clusters and classes, 0 to 1.

Examples:
  latent-codec cluster photos/ --clusters 6
  latent-codec cluster fashion_mnist/ --codec garments --limit 5000
  latent-codec cluster faces.tar --codec runs/faces --label Male --map pca
"""

import argparse

from latent_codec.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, least=2)
    parser.add_argument(
        "--clusters",
        type=int,
        dest="num_clusters",
        metavar="K",
        help="find K clusters (default: as many as there are classes, else 10)",
    ).least = 2
    arguments.add_label_argument(parser, 'default: "class", labels that are numbers, if there are')
    parser.add_argument(
        "--map",
        choices=("tsne", "pca"),
        default="tsne",
        help="place the map's thumbnails by t-SNE, which keeps neighbors, or by PCA, which keeps distances "
        "(default: %(default)s)",
    )
    arguments.add_feature_arguments(parser)
    arguments.add_codec_arguments(parser)
    arguments.add_out_argument(parser, "latent-codec-out/cluster", "images and figures")
    arguments.add_seed_argument(parser, "seed of all that is random")
    arguments.add_json_argument(parser)
