"""Regions of an image: connected parts, parts grown by a margin, and cuts of touching things."""

# Axes: S side of the image, P pixels of a region, k parts

from __future__ import annotations

import numpy as np

MAX_PARTS = 4  # as many things as a scene may have
KMEANS_ROUNDS = 10

Mask = np.ndarray  # bool [S, S]


def large_parts(classes: np.ndarray, min_pixels: float) -> list[Mask]:
    """Masks of the connected parts, of at least `min_pixels`, within one class other than 0.

    classes: int [S, S]. Pixels are connected over edges, not corners.
    """
    labels = _connected(classes)
    found, counts = np.unique(labels[classes > 0], return_counts=True)
    return [labels == label for label in found[counts >= min_pixels]]


def _connected(classes: np.ndarray) -> np.ndarray:
    """Label each pixel with the smallest index of the part of its class that it belongs to.

    Every pixel takes the smallest label among its neighbours, then the label which that one has:
    a few rounds, and no need of scipy.
    """
    same_as_left = classes[:, 1:] == classes[:, :-1]
    same_as_above = classes[1:] == classes[:-1]
    edges = ((same_as_left, np.s_[:, 1:], np.s_[:, :-1]), (same_as_above, np.s_[1:], np.s_[:-1]))
    labels = np.arange(classes.size).reshape(classes.shape)
    while True:
        lower = labels.copy()
        for same, a, b in edges:
            smaller = np.where(same, np.minimum(lower[a], lower[b]), labels.size)
            # one after the other: the slices overlap
            lower[a] = np.minimum(lower[a], smaller)
            lower[b] = np.minimum(lower[b], smaller)
        lower = lower.ravel()[lower]
        if (lower == labels).all():
            return labels
        labels = lower


def with_margin(cores: list[Mask], allowed: Mask, steps: int) -> list[Mask]:
    """Grow all cores at once by `steps` pixels into `allowed`; none grows into another."""
    labels = np.zeros(allowed.shape, dtype=np.int64)
    for number, core in enumerate(cores, 1):
        labels[core] = number
    for _ in range(steps):  # one ring of pixels at a time, so that cores meet halfway
        padded = np.pad(labels, 1)
        vertical = np.maximum(padded[:-2, 1:-1], padded[2:, 1:-1])
        horizontal = np.maximum(padded[1:-1, :-2], padded[1:-1, 2:])
        free = (labels == 0) & allowed
        labels = np.where(free, np.maximum(vertical, horizontal), labels)
    return [labels == number for number in range(1, len(cores) + 1)]


def cuts_by_place(region: Mask) -> list[list[Mask]]:
    """Cut a region into 2, 3 and 4 parts of about one width, by k-means.

    It starts from points far apart, not from random ones, so that the cuts are always the same.
    """
    rows, columns = np.nonzero(region)
    points = np.stack([rows, columns], axis=1).astype(np.float32)  # [P, 2]
    from_centre = np.square(points - points.mean(axis=0)).sum(axis=1)
    starts = [points[from_centre.argmax()]]
    cuts = []
    for _ in range(1, MAX_PARTS):
        from_nearest_start = _squared_distances(points, np.array(starts)).min(axis=1)
        starts.append(points[from_nearest_start.argmax()])
        part_of = _k_means(points, np.array(starts))
        labels = np.full(region.shape, -1)
        labels[rows, columns] = part_of
        cuts.append([labels == part for part in range(len(starts))])
    return cuts


def _k_means(points: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Assign points [P, 2] to parts [P], starting from means [k, 2]."""
    for _ in range(KMEANS_ROUNDS):
        part_of = _squared_distances(points, means).argmin(axis=1)
        moved = []
        for part, mean in enumerate(means):
            own = part_of == part
            moved.append(points[own].mean(axis=0) if own.any() else mean)  # no mean of nothing
        means = np.array(moved)
    return part_of


def _squared_distances(points: np.ndarray, means: np.ndarray) -> np.ndarray:
    """[P, k] from points [P, 2] and means [k, 2]."""
    return np.square(points[:, None] - means[None]).sum(axis=2)
