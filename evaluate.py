"""How good are the embeddings? Retrieval and clustering metrics, the structure of the embedding space, pictures.

In reading order: retrieval, clustering, structure, uncertainty (what the norm knows), the table, the pictures, the
comparison of finished runs over their seeds. Everything is exact, needs no pairwise matrix in memory at once (Stanford
Online Products' 60,502 test images fit beside 2 GiB), and runs where the embeddings are.

    python evaluate.py --checkpoint runs/NAME/best.pt --pictures
    python evaluate.py --checkpoint runs/NAME/best.pt --embeddings photos.npz --images my_photos
    python evaluate.py --compare runs/A-seed* runs/B-seed* --baseline runs/A-seed0 --out comparison.md
"""
import argparse
import csv
import json
import math
import re
import warnings
from functools import partial
from pathlib import Path

import data                                               # before torch: see its first lines
import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid, save_image

from data import UserError, progress

CHUNK = 2 ** 25    # entries of an (N, N) matrix held at a time: 128 MiB in float32
TIE = 1e-6         # cosines closer than this are equal: float32 products differ by nearly as much with their place in
                   # the matrix, and a network that has collapsed must not live on its rounding errors


def check(embeddings, labels=None, pairs=False):
    """(embeddings in float32 or float64 without gradient, labels renumbered 0 .. C-1), or a UserError, with `pairs` also
    where no class has two images."""
    if embeddings.dim() != 2 or embeddings.shape[0] < 2 or embeddings.shape[1] < 1:
        raise UserError(f"embeddings of shape {tuple(embeddings.shape)} cannot be evaluated: give (N, D) with N >= 2")
    if bad := int((~embeddings.isfinite()).any(1).sum()):
        raise UserError(f"{bad} of {len(embeddings)} embeddings hold NaN or infinity: the network has diverged, "
                        "try a smaller learning rate")
    embeddings = embeddings.detach().to(torch.promote_types(embeddings.dtype, torch.float32))
    if labels is None:
        return embeddings
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        raise UserError(f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit {len(embeddings)} "
                        "embeddings: give one integer for each")
    labels = labels.to(embeddings.device).unique(return_inverse=True)[1]
    if pairs and labels.bincount().max() < 2:
        raise UserError("no class has two images, so there is nothing to compare: evaluate on other data")
    return embeddings, labels


def usual_ks(dataset):
    """The k for which papers report Recall@k on a data set."""
    return (1, 10, 100, 1000) if dataset == "sop" else (1, 2, 4, 8)


def check_ks(ks):
    if not ks or any(not isinstance(k, int) or k < 1 for k in ks):
        raise UserError(f"k = {list(ks)} cannot be evaluated: give positive whole numbers")


# ------------------------------------------------------------------------------------------------------ retrieval

def comparisons(embeddings, labels, what, similarity=None):
    """For chunks of queries: similarity to the relatives (same class, not the query itself) and to the strangers, by
    cosine (0 between a zero vector and all others) or by `similarity`, a function of (B, D) and (N, D) to (B, N).

    Yields relatives (B, M), closest first, filled up with -inf, and strangers (B, N), -inf where no stranger is.
    """
    order, counts = labels.argsort(stable=True), labels.bincount()    # order: the members of class 0, of class 1, ...
    first = counts.cumsum(0) - counts                                 # where a class begins in order
    queries = order[counts[labels[order]] > 1]
    if len(queries) < len(labels):
        warnings.warn(f"{len(labels) - len(queries)} of {len(labels)} images are alone in their class and are left out "
                      "as queries")
    rows = CHUNK // len(labels) // (8 if similarity else 1)            # a kernel needs room for its intermediate steps
    if similarity is None:
        embeddings, similarity = F.normalize(embeddings, dim=1), lambda queries, others: queries @ others.T
    chunks = queries.split(max(1, rows))           # by class: M is the largest class of the chunk, not of the data set
    for query in progress(chunks, len(chunks), what):
        label = labels[query]
        slot = torch.arange(int(counts[label].max()), device=label.device)
        member = order[(first[label].unsqueeze(1) + slot).clamp(max=len(order) - 1)]        # (B, M + 1)
        absent = (slot >= counts[label].unsqueeze(1)) | (member == query.unsqueeze(1))      # always true for one slot
        member = torch.where(absent, query.unsqueeze(1), member)
        near = similarity(embeddings[query], embeddings)                                    # (B, N)
        relatives = near.gather(1, member).masked_fill(absent, -math.inf)
        yield relatives.sort(dim=1, descending=True).values[:, :-1], near.scatter_(1, member, -math.inf)


def recall_at_k(embeddings, labels, ks, similarity=None):
    """Recall@k {k: fraction of queries with a relative among the k most similar} of (N, D) embeddings.

    No sorting: it is a hit when fewer than k strangers are at least as close as the closest relative. A tie counts
    against the query, so that a network which maps all images to one point scores 0 (an argsort may give it 100 %).
    Images alone in their class are no queries (warning). Raises UserError if no query is left.
    """
    check_ks(ks)
    ahead = []
    for relatives, strangers in comparisons(*check(embeddings, labels, pairs=True), "recall: queries", similarity):
        closest = relatives[:, :1]
        strangers.ge_(closest - TIE * closest.abs().clamp(min=1))    # ones and zeros in floats: adding those up is ten
        ahead.append(strangers.sum(1))                               # times faster than adding booleans
    ahead = torch.cat(ahead)
    return {k: (ahead < k).double().mean().item() for k in ks}


def mean_average_precisions(embeddings, labels, ks):
    """A list of mAP@k, one for each k of `ks`, in a single pass; k = None stands for R, the query's own number."""
    check_ks([k for k in ks if k is not None] or [1])
    totals, queries = [0.0] * len(ks), 0
    for relatives, strangers in comparisons(*check(embeddings, labels, pairs=True), "mAP: queries"):
        present = relatives > -math.inf
        R = present.sum(1, keepdim=True)
        # The j-th closest relative is at position j + strangers at least as close; the k closest of them are enough.
        cap = min(strangers.shape[1], max(relatives.shape[1] if k is None else k for k in ks))
        closest = strangers.topk(cap).values                                                          # (B, cap)
        j = torch.arange(1, relatives.shape[1] + 1, device=R.device)
        position = j + torch.searchsorted(-closest, TIE - relatives, right=True)                      # (B, M)
        for i, k in enumerate(ks):
            limit = R if k is None else torch.full_like(R, k)
            precision = torch.where(present & (position <= limit), j / position, 0.0)
            totals[i] += (precision.sum(1, keepdim=True, dtype=torch.float64) / R.minimum(limit)).sum().item()
        queries += len(R)
    return [total / queries for total in totals]


def mean_average_precision(embeddings, labels, k=1000):
    """mAP@k in [0, 1] by cosine: the precision at each relative within the k nearest, summed, over min(R, k).

    R is the query's number of relatives. (The authors' mAP@1000 divides by the class's size with the query in it.) Ties,
    queries without relatives and errors as in `recall_at_k`.
    """
    return mean_average_precisions(embeddings, labels, [k])[0]


def map_at_r(embeddings, labels):
    """MAP@R in [0, 1]: mAP@k with k = R (Musgrave et al. 2020, "A Metric Learning Reality Check")."""
    return mean_average_precisions(embeddings, labels, [None])[0]


# ----------------------------------------------------------------------------------------------------- clustering

def k_means(embeddings, k, seed=0, iterations=100):
    """(N,) clusters of (N, D) points: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd until nothing changes."""
    x = embeddings - embeddings.mean(0)            # distances stay, and their expansion |x|^2 - 2xc + |c|^2 loses less
    square = x.square().sum(1)
    uniform = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)     # on any device
    chosen, nearest = [], torch.ones_like(square)
    for i in progress(range(k), k, "k-means: centres"):
        cumulative = nearest.double().cumsum(0)                                   # draws in proportion to distance^2
        at = torch.searchsorted(cumulative, cumulative[-1:] * uniform[i], right=True).clamp(max=len(x) - 1)
        distance = (square - 2 * (x @ x[at[0]]) + square[at]).clamp(min=0)
        nearest = distance if i == 0 else nearest.minimum(distance)
        chosen.append(at)
    centres, clusters = x[torch.cat(chosen)], None
    for _ in progress(range(iterations), iterations, "k-means: at most"):
        parts = [torch.addmm(centres.square().sum(1), part, centres.T, alpha=-2).min(1)             # (B, k) -> (B,)
                 for part in x.split(max(1, CHUNK // k))]
        previous, clusters = clusters, torch.cat([part.indices for part in parts])
        if previous is not None and torch.equal(clusters, previous):
            break
        counts = clusters.bincount(minlength=k)
        centres = torch.zeros_like(centres).index_add_(0, clusters, x) / counts.clamp(min=1).unsqueeze(1)
        empty = (counts == 0).nonzero().flatten()
        if len(empty):                             # an empty cluster begins anew at the point worst served
            centres[empty] = x[(square + torch.cat([part.values for part in parts])).topk(len(empty)).indices]
    return clusters


def partition_scores(clusters, labels):
    """{"nmi", "f1"} in [0, 1] of two (N,) partitions.

    NMI = 2 I(labels; clusters) / (H(labels) + H(clusters)). F1 (Song et al. 2016) is over pairs of images: a pair in
    one cluster is right if it is in one class. Only the non-empty cells of the contingency table are ever stored.
    """
    clusters, labels = clusters.unique(return_inverse=True)[1], labels.unique(return_inverse=True)[1]
    joint = clusters * (labels.max() + 1) + labels
    sizes = [part.unique(return_counts=True)[1].double() for part in (clusters, labels, joint)]
    entropy = [-(n / n.sum() * (n / n.sum()).log()).sum().item() for n in sizes]
    pairs = [(n * (n - 1) / 2).sum().item() for n in sizes]
    # Two partitions without any information, or any pair, are the same partition: 1.
    nmi = 2 * (entropy[0] + entropy[1] - entropy[2]) / (entropy[0] + entropy[1]) if entropy[0] + entropy[1] > 0 else 1.0
    f1 = 2 * pairs[2] / (pairs[0] + pairs[1]) if pairs[0] + pairs[1] > 0 else 1.0
    return {"nmi": min(1.0, max(0.0, nmi)), "f1": f1}


def clustering(embeddings, labels, seed=0):
    """{"nmi", "f1"} of k-means with k = the number of classes, by Euclidean distance on (N, D) embeddings as given."""
    embeddings, labels = check(embeddings, labels)
    return partition_scores(k_means(embeddings, int(labels.max()) + 1, seed), labels)


# ------------------------------------------------------------------------------------------------------ structure

def uniformity(embeddings):
    """G2 = log mean_{i<j} exp(-2 ||x_i - x_j||^2), at most 0, of (N, D) embeddings as given (Wang and Isola 2020).

    The lower, the more evenly the embeddings fill the sphere; 0 means that all of them are one point.
    """
    x = check(embeddings)
    x = x - x.mean(0)                              # distances stay, and their expansion loses fewer digits
    square, size, rows = x.square().sum(1), max(1, CHUNK // len(x)), []
    for start in progress(range(0, len(x), size), math.ceil(len(x) / size), "uniformity: rows"):
        part = slice(start, start + size)
        energy = torch.addmm(square[start:], x[part], x[start:].T, alpha=-2).add_(square[part].unsqueeze(1))
        energy = energy.clamp_(min=0).mul_(-2)                                                  # (B, N - start)
        below = torch.ones(len(energy), len(energy), dtype=torch.bool, device=x.device).tril()  # i >= j
        energy[:, :len(energy)].masked_fill_(below, -math.inf)
        rows.append(energy.logsumexp(1).double())  # logarithms: distant points would underflow to log 0
    return torch.cat(rows).logsumexp(0).item() - math.log(len(x) * (len(x) - 1) / 2)


def spectral_decay(embeddings):
    """rho = KL(uniform || normalised singular values of the (N, D) embedding matrix as given), at least 0.

    0 if all min(N, D) directions carry the same; the larger, the fewer of them are in use (Roth et al. 2020,
    "Revisiting Training Strategies and Generalization Performance in Deep Metric Learning"). A singular value below
    float32's resolution of the largest (1.2e-7) counts as that much, so that an unused direction costs a finite sum.
    """
    # Those of the (D, D) factor R of QR, which is small. Not from the Gram matrix: its eigenvalues are squares, and the
    # small singular values weigh most here.
    values = torch.linalg.svdvals(torch.linalg.qr(check(embeddings).double(), mode="r").R)
    values = values.clamp(min=max(values[0].item() * torch.finfo(torch.float32).eps, 1e-300))
    return max(0.0, -math.log(len(values)) - (values / values.sum()).log().mean().item())


def class_sums(embeddings, labels):
    """Per class: the sum of its unit vectors (C, D), the sum of their squares (C,), their number (C,); in float64."""
    x = F.normalize(embeddings.double(), dim=1)
    counts = labels.bincount()
    sums = x.new_zeros(len(counts), x.shape[1]).index_add_(0, labels, x)
    return sums, x.new_zeros(len(counts)).index_add_(0, labels, x.square().sum(1)), counts


def mean_cosine_distance(sums, squares, counts):
    """Mean over all pairs of n unit vectors: 1 - (||sum x||^2 - sum ||x||^2) / (n (n - 1))."""
    return 1 - (sums.square().sum(-1) - squares) / (counts * (counts - 1))


def density(embeddings, labels):
    """pi_density: mean over classes of the mean cosine distance within a class, over that between the class means.

    Within: classes of two images or more. Between: all pairs of normalised class means, clamped at 1e-12 for a network
    that has collapsed. At least 0, small for tight classes far apart; nan with a single class or no pair in any.
    """
    sums, squares, counts = class_sums(*check(embeddings, labels))
    paired = counts > 1
    within = mean_cosine_distance(sums[paired], squares[paired], counts[paired]).clamp(min=0).mean()
    means = F.normalize(sums, dim=1)
    between = mean_cosine_distance(means.sum(0), means.square().sum(), torch.tensor(len(means))).clamp(min=1e-12)
    return (within / between).item()               # a single class: 0 / 0 pairs, which is nan


def concentration_variance(embeddings, labels):
    """sigma^2_kappa: variance over classes (of two images or more) of their von Mises-Fisher concentration.

    kappa = R (D - R^2) / (1 - R^2) with the mean resultant length R (Banerjee et al. 2005), 1 - R^2 at least 1e-6.
    The estimator of the NIR paper is not known, so compare these values with each other only. R is never near 0 for
    few images (about 1 / sqrt(n) for n random ones): small classes look more concentrated than they are.
    """
    sums, _, counts = class_sums(*check(embeddings, labels))
    R = sums[counts > 1].norm(dim=1) / counts[counts > 1]
    kappa = R * (sums.shape[1] - R.square()) / (1 - R.square()).clamp(min=1e-6)
    return kappa.var(correction=0).item()


def uncertainty(embeddings, labels, ambiguity=None):
    """Does the norm of an (N, D) embedding, not normalised, say how certain it is? ({name: number}, error curve).

    norm_auroc: chance that of two images the one whose nearest neighbour (by cosine) is right has the larger norm.
    norm_clarity: Spearman correlation of the norm with 1 - ambiguity (N,), where that is known.
    The curve is [(fraction rejected, error of the others)]: images of the lowest norm are rejected first.
    """
    embeddings, labels = check(embeddings, labels)
    directions = F.normalize(embeddings, dim=1)
    chunks = torch.arange(len(labels), device=labels.device).split(max(1, CHUNK // len(labels)))
    nearest = [(directions[own] @ directions.T).scatter_(1, own.unsqueeze(1), -math.inf).argmax(1) for own in chunks]
    right, norm = (labels[torch.cat(nearest)] == labels).cpu().numpy(), embeddings.norm(dim=1).cpu().numpy()
    values = {"norm_auroc": math.nan}
    if 0 < right.sum() < len(right):
        wins = scipy.stats.mannwhitneyu(norm[right], norm[~right]).statistic
        values["norm_auroc"] = float(wins) / float(right.sum() * (~right).sum())
    if ambiguity is not None:
        values["norm_clarity"] = float(scipy.stats.spearmanr(norm, 1 - ambiguity.cpu().numpy()).statistic)
    wrong = ~right[norm.argsort(kind="stable")]
    return values, [(i / 20, float(wrong[len(wrong) * i // 20:].mean())) for i in range(20)]


def all_metrics(embeddings, labels, ks=(1, 2, 4, 8), seed=0):
    """All of the above as {name: number}, for the L2-normalised (N, D) embeddings; `seed` is that of k-means."""
    embeddings, labels = check(embeddings, labels)
    embeddings = F.normalize(embeddings, dim=1)
    metrics = {f"recall@{k}": value for k, value in recall_at_k(embeddings, labels, ks).items()}
    metrics["map@1000"], metrics["map@r"] = mean_average_precisions(embeddings, labels, [1000, None])
    return {**metrics, **clustering(embeddings, labels, seed), "uniformity": uniformity(embeddings),
            "spectral_decay": spectral_decay(embeddings), "density": density(embeddings, labels),
            "concentration_variance": concentration_variance(embeddings, labels)}


# ---------------------------------------------------------------------------------------------------------- table

def style(name, size=1.0):
    """(factor, format, unit) of a metric: fractions in percent, the rest, and gradient shares below 0.1 %, as it is."""
    if name not in ("nmi", "f1") and not name.startswith(("recall@", "map@", "test_recall@", "val_recall@", "grad_share_")):
        return 1, ".4g", ""
    return (1, ".2g", "") if name.startswith("grad_share_") and abs(size) < 1e-3 else (100, ".1f", " %")


def spread(name, values, paired=False):
    """Text "mean ± sample deviation" of a metric's values, or of paired differences "mean [low, high]", Student's 95 %
    interval. A value that is missing is nan; then the number of the others is told, too."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 1 + paired:
        return "-"
    factor, digits, unit = style(name, np.mean(known))
    mean, text = factor * np.mean(known), ""
    if len(known) > 1:
        deviation = factor * np.std(known, ddof=1)
        half = scipy.stats.t.ppf(0.975, len(known) - 1) * deviation / math.sqrt(len(known))
        text = f" [{mean - half:+{digits}}, {mean + half:+{digits}}]" if paired else f" ± {deviation:{digits.replace('4', '2')}}"
    return f"{mean:{'+' * paired}{digits}}{text}{unit}" + (f" (n = {len(known)})" if len(known) < len(values) else "")


def table(columns):
    """Plain text of {title: metrics}: a row per metric, fractions in percent, "-" where a column lacks the metric."""
    return aligned(columns, lambda name, metrics: spread(name, [metrics.get(name, math.nan)]))


def aligned(columns, cell):
    """Plain text of {title: {name: value}}: a row per name, whose cells are `cell(name, column)`."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [["", *columns]] + [[name, *(cell(name, column) for column in columns.values())] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


# ------------------------------------------------------------------------------------------------------- pictures

RIGHT, WRONG, NEUTRAL = (0.1, 0.7, 0.2), (0.85, 0.1, 0.1), (0.6, 0.6, 0.6)
BORDER = 4


def framed(image, colour):
    """A picture (3, H, W) in [0, 1] with a border, its shorter side brought to 64 .. 112 pixels."""
    image, side = image.detach().float().cpu(), min(image.shape[1:])
    scale = math.ceil(64 / side) if side < 64 else min(1.0, 112 / side)     # whole multiples keep small pixels square
    image = F.interpolate(image[None], scale_factor=scale, mode="nearest" if side < 64 else "area")[0]
    frame = torch.tensor(colour).view(3, 1, 1).repeat(1, image.shape[1] + 2 * BORDER, image.shape[2] + 2 * BORDER)
    frame[:, BORDER:-BORDER, BORDER:-BORDER] = image
    return frame


def save_retrieval(path, image, embeddings, labels, num_queries=10, neighbours=5, seed=0):
    """A picture file: each row a random query (grey border) and its nearest images, green if right, red if wrong.

    `image(i)` gives picture i, (3, H, W) in [0, 1], all of one size; it is called for those shown alone. Queries have
    a relative; UserError if there is none.
    """
    embeddings, labels = check(embeddings, labels, pairs=True)
    possible = (labels.bincount()[labels] > 1).nonzero().flatten().cpu()
    rng = torch.Generator().manual_seed(seed)
    queries = possible[torch.randperm(len(possible), generator=rng)[:num_queries]].to(labels.device)
    embeddings = F.normalize(embeddings, dim=1)
    cosine = (embeddings[queries] @ embeddings.T).scatter_(1, queries.unsqueeze(1), -math.inf)     # not itself
    nearest = cosine.topk(min(neighbours, len(labels) - 1)).indices                                # (Q, neighbours)
    tiles = []
    for query, found in zip(queries, nearest):
        right = labels[found] == labels[query]
        tiles.append(framed(image(int(query)), NEUTRAL))
        tiles += [framed(image(i), RIGHT if ok else WRONG) for i, ok in zip(found.tolist(), right.tolist())]
    save_image(make_grid(tiles, nrow=1 + nearest.shape[1], pad_value=1), path)


def save_norm_extremes(path, image, embeddings, labels, classes=8, each=3):
    """A picture file: each row a class, its `each` images of lowest norm at the left, of highest at the right.

    Takes the un-normalised (N, D) embeddings, and `image` as in `save_retrieval`. The classes are evenly spaced among
    those with enough images; UserError if all classes have one image.
    """
    embeddings, labels = check(embeddings, labels, pairs=True)
    counts, norms = labels.bincount(), embeddings.norm(dim=1)
    each = min(each, int(counts.max()) // 2)
    shown = (counts >= 2 * each).nonzero().flatten()
    low, high, rows = [], [], min(classes, len(shown))
    for i in range(rows):
        members = (labels == shown[i * len(shown) // rows]).nonzero().flatten()
        members = members[norms[members].argsort()].tolist()
        low += [framed(image(m), NEUTRAL) for m in members[:each]]
        high += [framed(image(m), NEUTRAL) for m in members[-each:]]
    left, right = (make_grid(tiles, nrow=each, pad_value=1) for tiles in (low, high))
    save_image(torch.cat([left, torch.ones(3, left.shape[1], 6 * BORDER), right], dim=2), path)


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def save_curves(path, curves, label="Recall@1, %", size=(720, 420)):
    """A PNG file of {group: [a list of values by epoch for each seed]}: a colour per group, a thin line per seed, a thick
    one for the mean over the epochs that all its seeds have. Groups beyond the tenth take the first colours again."""
    values = [v for runs in curves.values() for run in runs for v in run]
    epochs, low, high = max(len(run) for runs in curves.values() for run in runs), min(values), max(values)
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if s >= (high - low) / 8 or s == 20)
    low, high = step * math.floor(low / step), step * max(math.ceil(high / step), math.floor(low / step) + 1)
    width, height = 2 * size[0], 2 * size[1]                                              # drawn twice as large: smooth
    left, top, right, bottom = 124, 28, width - 28, height - 88
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    text = partial(draw.text, font=ImageFont.load_default(26), fill="black")

    def at(epoch, value):                          # epochs from 1, in pixels
        return (left + (right - left) * (epoch - 1) / max(1, epochs - 1),
                bottom - (bottom - top) * (value - low) / (high - low))
    for value in np.arange(low, high + step / 2, step):
        draw.line([at(1, value), at(epochs, value)], fill="#dddddd", width=2)
        text((left - 16, at(1, value)[1]), f"{value:g}" if step >= 1 else f"{value:.1f}", anchor="rm")
    for epoch in range(1, epochs + 1, max(1, math.ceil(epochs / 15))):
        x, y = at(epoch, low)
        draw.line([x, y, x, y + 10], fill="black", width=2)
        text((x, y + 30), str(epoch), anchor="mm")
    draw.line([at(1, high), at(1, low), at(epochs, low)], fill="black", width=2)
    text(((left + right) / 2, height - 20), "epoch", anchor="mm")
    text((left + 16, top + 16), label, anchor="lm")
    for i, (name, runs) in enumerate(curves.items()):
        colour, mean = COLOURS[i % len(COLOURS)], [float(np.mean(column)) for column in zip(*runs)]
        for run, thickness in (*((run, 1) for run in runs), (mean, 6)):
            points = [at(epoch, value) for epoch, value in enumerate(run, start=1)]
            draw.line(points if len(points) > 1 else points * 2, fill=colour, width=thickness, joint="curve")
        text((right - 16, bottom - 24 - 34 * (len(curves) - 1 - i)), f"{name} (n = {len(runs)})", anchor="rm", fill=colour)
    picture.resize(size, Image.Resampling.LANCZOS).save(path, format="png")


# ----------------------------------------------------------------------------------------------------- comparison

HEADLINE = ("recall@1", "map@r", "nmi")
# Runs are grouped by all of args.json but these, which do not change what is computed or are the repetition itself.
CIRCUMSTANCES = ("seed", "out", "resume", "device", "workers", "data_root", "command", "torch", "commit")


def read_run(folder):
    """A finished run as {"folder", "args", "kind", "settings", "numbers"}; UserError says why it is none.

    `numbers` are results.json's of the last epoch, log.csv's last row, and all its rows as COLUMN@EPOCH. Of equal names
    the first counts: recall@1 and test_recall@1 are whole names.
    """
    file, log, last = "args.json", [], {}
    try:
        args = {"seed": 0, "val_fraction": 0.0, **json.loads((folder / file).read_text())}
        args["seed"], epochs, file = int(args["seed"]), max(1, int(args["epochs"])), "log.csv"
        log = [{name: float(value) for name, value in row.items()}
               for row in csv.DictReader((folder / file).read_text().splitlines())]
        numbers, file = {f"{name}@{row['epoch']:.0f}": row[name] for row in log for name in row}, "results.json"
        last = {name: float(value) for name, value in json.loads((folder / file).read_text())["last"].items()}
    except (FileNotFoundError, NotADirectoryError):
        if file == "args.json":
            raise UserError("missing: no " + ("args.json" if folder.is_dir() else "such folder")) from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, csv.Error) as error:
        raise UserError(f"broken: {file}, {type(error).__name__}: {error}") from None
    if not last or len(log) < epochs:
        raise UserError(f"unfinished: {len(log)} of {epochs} epochs" + (", no results" if len(log) >= epochs else ""))
    settings = {key: value for key, value in args.items() if key not in CIRCUMSTANCES and value is not None}
    dataset = args.get("dataset")
    if dataset == "folder":                        # its name is the data set's
        dataset = f"folder {Path(str(args.get('data_root'))).name}"
    return {"folder": folder, "args": args, "settings": json.dumps(settings, sort_keys=True),
            "kind": f"{dataset}, {epochs} epochs, val_fraction {args['val_fraction']}",
            "numbers": {**numbers, **log[-1], **last},
            "curve": [100 * row.get("val_recall@1", row.get("test_recall@1", math.nan)) for row in log]}


def group_names(groups):
    """For each list of runs the name of its first folder without the seed; where two lists would be called the same,
    also the settings in which they differ."""
    short, names = [], []
    for run, *_ in groups:
        seed = rf"[-_/](s(eed)?[-_]?)?{run['args']['seed']}(-\d+)?$"           # as in NAME-seed0, NAME-seed0-2, NAME/0
        short.append(Path(re.sub(seed, "", str(run["folder"].absolute()))).name)
    settings = [json.loads(runs[0]["settings"]) for runs in groups]
    for name, own in zip(short, settings):
        rivals = [other for n, other in zip(short, settings) if n == name]
        differ = [key for key in sorted(set().union(*rivals)) if any(r.get(key) != own.get(key) for r in rivals)]
        names.append(" ".join([name, *(f"{key}={own.get(key)}" for key in differ)]))
    return names


def compare(folders, baseline=None, metrics=HEADLINE, curves=None):
    """Markdown: commands, a table with a row for each group of runs that differ by seed alone, and what was left out.

    `metrics` are names as in `read_run`. `baseline`, any run of a group, makes that group the first row, to which the
    others' differences in the first metric are shown, paired by seed. `curves` is a file for `save_curves` of Recall@1.
    UserError if the baseline is no finished run, if no run has a metric, or if no run is left.
    """
    runs, left_out, groups = [], [], {}
    for folder in {Path(f).resolve(): Path(f) for f in [baseline, *folders] if f}.values():
        try:
            runs.append(read_run(folder))
        except UserError as error:
            if baseline and not runs:
                raise UserError(f"--baseline {baseline} is no finished run ({error}): give one that is") from None
            left_out.append(f"{folder} ({error})")
    kinds = [run["kind"] for run in runs]
    usual = kinds[0] if baseline else max(kinds, key=kinds.count, default=None)
    for run in runs:
        group, seed = groups.setdefault(run["settings"], {}) if run["kind"] == usual else {}, run["args"]["seed"]
        if run["kind"] != usual:
            left_out.append(f"{run['folder']} (unlike: {run['kind']}; not {usual})")
        elif seed in group:
            left_out.append(f"{run['folder']} (same seed as {group[seed]['folder']})")
        else:
            group[seed] = run
    runs = [run for group in groups.values() for run in group.values()]
    if not runs:
        raise UserError(f"no finished run to compare: {'; '.join(left_out)}")
    there = {name: name.rpartition("@")[0] for run in runs for name in run["numbers"]}
    if unknown := [name for name in metrics if name not in there]:
        raise UserError(f"no run has the metric {', '.join(unknown)}: there is " + ", ".join(
            name for name, column in there.items() if column not in there) + " and log.csv's COLUMN@EPOCH")

    groups = dict(zip(group_names([list(group.values()) for group in groups.values()]), groups.values()))
    if curves:
        with data.clear_errors(f"writing {curves}", "give another file with --curves"):
            save_curves(curves, {name: [run["curve"] for run in group.values()] for name, group in groups.items()})
    lines, rows, first, base = [], [["", "n", *metrics]], metrics[0], next(iter(groups))
    if baseline:
        rows[0].append(f"{first} minus {base} [95 %]")
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for name, group in groups.items():
        command = re.sub(r"(seed[ =-]?)\d+", r"\1N", str(next(iter(group.values()))["args"].get("command", "")))
        lines.append(f"- {name}, seed {', '.join(map(str, group))}: {f'`{command}`' if command else 'command not recorded'}")
        values = {key: [run["numbers"].get(key, math.nan) for run in group.values()] for key in metrics}
        rows.append([name, str(len(group)), *(spread(key, values[key]) for key in metrics)])
        if baseline:
            known = {seed: run["numbers"].get(first, math.nan) for seed, run in groups[base].items()}
            pairs = [value - known.get(seed, math.nan) for seed, value in zip(group, values[first])]
            rows[-1].append("-" if name == base else spread(first, pairs, paired=True))
    for key in ("torch", "commit"):
        lines.append(f"- {key}: {', '.join(dict.fromkeys(str(run['args'].get(key, 'unknown')) for run in runs))}")
    lines += ["", *(f"| {' | '.join(row)} |" for row in rows), *([""] if left_out else [])]
    return "\n".join(lines + [f"- left out: {reason}" for reason in left_out]) + "\n"


# ----------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    import common                                  # here, not above: common's training loop uses this file's metrics
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="best.pt or last.pt of a run; its settings are used")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="folders of finished runs: a table over their seeds")
    add = p.add_argument
    add("--data_root", help="where the data set is now (default: where it was)")
    add("--pictures", action="store_true", help="write retrieval.png and norms.png beside the checkpoint")
    add("--retrieval", choices=("cosine", "elk"), default="cosine",
        help="elk: Recall@k by the kernel of the embeddings' vMF distributions beside it (default: cosine)")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--workers", type=common.not_negative(int), help="processes that load images (default: as in the run)")
    add("--embeddings", metavar="FILE.npz", help="write the test images' embeddings, labels, class_names, paths, norms")
    add("--images", metavar="FOLDER", help="with --embeddings: of all pictures below it, and nothing else")
    add = p.add_argument_group("with --compare").add_argument
    add("--baseline", metavar="RUN", help="a run of the group to which the others' differences are shown")
    add("--metrics", nargs="+", metavar="NAME", help="of results.json, or of log.csv: grad_share_nir (last epoch), "
        f"grad_share_nir@1 (first), ...; differences are those of the first (default: {' '.join(HEADLINE)})")
    add("--out", metavar="FILE.md", help="write the table there, too")
    add("--curves", metavar="FILE.png", help="draw Recall@1 by epoch")
    given = p.parse_args(argv)
    if given.checkpoint and (given.baseline or given.metrics or given.out or given.curves):
        p.error("--baseline, --metrics, --out and --curves belong to --compare")
    if given.compare and (given.pictures or given.retrieval != "cosine" or given.data_root):
        p.error("--pictures, --retrieval and --data_root belong to --checkpoint")
    if given.compare and given.embeddings or given.images and not given.embeddings:
        p.error("--images belongs to --embeddings, and that to --checkpoint")
    if given.images and (given.pictures or given.retrieval != "cosine" or given.data_root):
        p.error("--images is not the data set: leave --data_root, --pictures and --retrieval out")
    if given.embeddings and not Path(given.embeddings).absolute().parent.is_dir():
        raise UserError(f"--embeddings {given.embeddings} would lie in a folder that does not exist: make it first")
    if given.compare:
        text = compare(given.compare, given.baseline, given.metrics or HEADLINE, given.curves)
        print(text)
        if given.out:
            common.save_file(given.out, text)
            print(f"table written to {given.out}")
        return
    checkpoint = common.load_checkpoint(given.checkpoint, "--checkpoint")
    changed = {key: value for key, value in vars(given).items() if value is not None}
    args = argparse.Namespace(**{**checkpoint["args"], **changed})
    device, folder = common.make_device(args.device), Path(given.checkpoint).parent
    test = data.load_pictures(given.images) if given.images else common.load_splits(args)[2]
    embeddings = common.embed(common.build_network(args, checkpoint, device), test, args, device)
    if given.embeddings:
        paths = [str(i if isinstance(image, np.ndarray) else image) for i, image in enumerate(test.images)]
        arrays = {"embeddings": embeddings.float().cpu().numpy(), "labels": test.labels.numpy(), "paths": np.array(paths),
                  "class_names": np.array(test.class_names), "norms": embeddings.float().norm(dim=1).cpu().numpy()}
        common.save_file(given.embeddings, lambda file: np.savez(file, **arrays))
        print(f"embeddings of {len(paths)} images written to {given.embeddings}")
    if given.images:
        return
    ks = usual_ks(args.dataset)
    certainty, curve = uncertainty(embeddings, test.labels, test.ambiguity)
    metrics = {"epoch": checkpoint["epoch"], **all_metrics(embeddings, test.labels, ks), **certainty}
    if given.retrieval == "elk":
        import prob_dml

        def kernel(queries, embeddings):
            return prob_dml.SIMILARITIES["elk"](queries, embeddings, embeddings.norm(dim=1, keepdim=True), 1, "exact", None)
        metrics.update({f"recall@{k} elk": v for k, v in recall_at_k(embeddings, test.labels, ks, kernel).items()})
    print(table({Path(given.checkpoint).name: metrics}))
    common.save_file(folder / "metrics.json", json.dumps(metrics, indent=1))
    common.save_file(folder / "rejection.csv", common.csv_text([{"rejected": part, "error": error} for part, error in curve]))
    if given.pictures:
        shown = data.Images(test, data.test_transform(args.image_size, args.augment))

        def image(i):                              # as the network sees it
            return shown[i][0] / 255
        save_retrieval(folder / "retrieval.png", image, embeddings, test.labels)
        save_norm_extremes(folder / "norms.png", image, embeddings, test.labels)
        print(f"pictures: {folder / 'retrieval.png'} (query, then its nearest; green right, red wrong), "
              f"{folder / 'norms.png'} (a class a row, norms growing from left to right)")
    print(f"numbers: {folder / 'metrics.json'}, {folder / 'rejection.csv'}")


if __name__ == "__main__":
    import common
    common.command(main)
