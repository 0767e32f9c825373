"""Point clouds drawn in the plane, by PCA and t-SNE: one figure a space, one column a checkpoint."""

from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from hacl_megatron.evaluation.likelihood.representations import PointCloud

KINDS = (("images", "tab:blue", "o"), ("captions", "tab:green", "^"), ("hallucinated", "tab:red", "x"))
MAX_POINTS = 1500
"""Pairs drawn of a larger set: more would cover one another."""


def project(cloud: PointCloud, method: str) -> dict[str, np.ndarray]:
    """Each kind's points in the plane, [n, 2], by `PCA` or `t-SNE` of all of them together; the same every time."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    parts = {name: getattr(cloud, name) for name, _, _ in KINDS}
    everything = np.concatenate([*parts.values()])
    if method == "PCA":
        plane = PCA(2, random_state=0).fit_transform(everything)
    else:
        perplexity = min(30.0, (len(everything) - 1) / 3)
        plane = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(everything)
    cuts = np.cumsum([len(part) for part in parts.values()])[:-1]
    return dict(zip(parts, np.split(plane, cuts), strict=True))


def thinned(cloud: PointCloud) -> PointCloud:
    """At most `MAX_POINTS` pairs, evenly spaced, with their hallucinated captions."""
    number = len(cloud.images)
    if number <= MAX_POINTS:
        return cloud
    kept = np.linspace(0, number - 1, MAX_POINTS).astype(np.int64)
    own = np.isin(cloud.owners, kept)
    return PointCloud(
        images=cloud.images[kept],
        captions=cloud.captions[kept],
        hallucinated=cloud.hallucinated[own],
        owners=np.searchsorted(kept, cloud.owners[own]),
    )


def figure(space: str, clouds: Mapping[str, PointCloud], measures: Mapping[str, Mapping[str, Any]]) -> Figure:
    """PCA above, t-SNE below, a column for each of `clouds` (such as before and after), with its numbers."""
    drawn, axes = plt.subplots(2, len(clouds), figsize=(5.2 * len(clouds) + 0.4, 10), squeeze=False)
    for column, (name, cloud) in enumerate(clouds.items()):
        cloud, numbers = thinned(cloud), measures[name]
        for axis, method in zip(axes[:, column], ("PCA", "t-SNE"), strict=True):
            points = project(cloud, method)
            for kind, colour, marker in KINDS:
                axis.scatter(*points[kind].T, s=14, c=colour, marker=marker, alpha=0.55, linewidths=0.8, label=kind)
            if method == "PCA":
                axis.set_aspect("equal", "datalim")  # its distances mean something
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_ylabel(method)
        axes[0, column].set_title(
            f"{name}\nmodality gap {numbers['modality gap']:.3f}, caption-hallucination distance "
            f"{numbers['caption-hallucination distance']:.3f}\nhallucination accuracy "
            f"{numbers['hallucination accuracy']:.3f}, AUC {numbers['hallucination AUC']:.3f}",
            fontsize=9,
        )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    drawn.suptitle(f"{space} at EOS" if space == "hidden states" else f"{space} (projected by the heads)")
    drawn.tight_layout(rect=(0, 0.03, 1, 0.99))
    return drawn
