"""How good are the embeddings? Retrieval and clustering metrics, the structure of the
embedding space, pictures.

In reading order: retrieval, clustering, the structure of the space, uncertainty (what
the norm of an embedding tells), all metrics in one call; then how queries are compared
with all images, how k-means finds clusters, what the metrics accept; pictures; the
comparison of finished runs over their seeds; main.

    python evaluate.py --checkpoint runs/NAME/best.pt --pictures
    python evaluate.py --checkpoint runs/NAME/best.pt --embeddings photos.npz --images my_photos
    python evaluate.py --compare runs/A-seed* runs/B-seed* --baseline runs/A-seed0 --out table.md

The metrics are exact. No (N, N) matrix is ever held as a whole, so the 60,502 test
images of Stanford Online Products need less than 2 GiB besides their embeddings. The
large products are computed on the device where the embeddings are.

Most metrics are those of two papers' experiments: NIR (Roth et al., CVPR 2022) and
EL-nivMF (Kirchhof et al., ECCV 2022).

    symbol           name in the code
    N, D             number of images, dimension of an embedding
    C                `num_classes`
    B                number of queries in one chunk, whose similarities are (B, N)
    query            an image for which the most similar other images are looked up
    positive         another image of the query's class
    negative         an image of another class
    R, M             number of positives of a query, and the largest one in a chunk
    Recall@k         `recall_at_k`
    mAP@k, MAP@R     `mean_average_precision`, `map_at_r`
    NMI, F1          `partition_scores`
    G_2              `uniformity`
    rho              `spectral_decay`
    pi_density       `density`
    sigma^2_kappa    `concentration_variance`, from kappa_c and R_c of each class c
"""

import argparse
import csv
import itertools
import json
import math
import os
import re
import warnings
from collections import defaultdict
from pathlib import Path

# Set before torch is imported: idle OpenMP threads sleep instead of slowing other
# processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_tensor
from torchvision.utils import make_grid, save_image

import data
from data import UserError, progress

# How many entries of an (N, N) or (N, k) matrix are held at a time: 128 MiB in
# float32. Cosines in float64 are half as many. (k is the number of clusters.)
CHUNK = 2**25

# Up to this many images cosines are computed in float64. Beyond, that takes too long.
FLOAT64_IMAGES = 16_384

# Cosines closer than this count as equal. The same cosine, computed at two places of a
# matrix, can differ by nearly as much, and a network that maps all images to one point
# must not be rewarded for such rounding errors. 1e-6 is much in two dimensions, where
# thousands of images lie closer together: hence float64.
TIE = {torch.float64: 1e-12, torch.float32: 1e-6}


def full_precision(metric):
    """A decorator: compute in float32 or float64, also inside torch.autocast."""
    for device in ("cpu", "cuda"):
        metric = torch.autocast(device, enabled=False)(metric)
    return metric


# ---------------------------------------------------------------------------- retrieval


@full_precision
def recall_at_k(embeddings, labels, ks):
    """How often is one of the k most similar images a positive? Returns {k: Recall@k}.

        ahead(q)  = number of negatives at least as similar to q as q's best positive
        Recall@k  = fraction of the queries q with ahead(q) < k

    So the N similarities of a query, which are cosines, need no sorting. For embeddings
    (N, D) and labels (N,). A tie counts against the query, so that a network which maps
    all images to one point scores 0; with sorting it might score 100 %. Up to 16,384
    images cosines are computed in float64, and two tie if they differ by 1e-12 at most;
    beyond, float32 stays float32, where they tie up to 1e-6. Images alone in their
    class are not used as queries. Raises UserError if no image has a positive.
    """
    ks = check_ks(ks)
    embeddings, labels = check(embeddings, labels, need_positives=True)

    # For each chunk of queries: similarities to the positives (B, M), the most similar
    # first, and to the negatives (B, N); -inf where there is none.
    ahead = []
    chunks = positives_and_negatives(embeddings, labels, "recall: queries")
    for positives, negatives in chunks:
        best_positive = positives[:, :1]  # (B, 1)
        # In place, as ones and zeros in floats: adding up booleans is ten times slower.
        at_least_as_similar = negatives.ge_(best_positive)  # (B, N)
        ahead.append(at_least_as_similar.sum(1))
    ahead = torch.cat(ahead)  # (number of queries,)

    return {k: (ahead < k).double().mean().item() for k in ks}


def mean_average_precision(embeddings, labels, k=1000):
    """mAP@k in [0, 1]; the formula is in `mean_average_precisions`."""
    return mean_average_precisions(embeddings, labels, [k])[0]


def map_at_r(embeddings, labels):
    """MAP@R in [0, 1]: mAP@k with k = R, the query's own number of positives.

    Source: Musgrave et al. 2020, "A Metric Learning Reality Check".
    """
    return mean_average_precisions(embeddings, labels, [None])[0]


@full_precision
def mean_average_precisions(embeddings, labels, ks):
    """Do the positives come before the negatives? A list with mAP@k for each k of `ks`.

        position(j) = j + number of negatives at least as similar as the j-th positive
        AP@k        = (sum over j with position(j) <= k of j / position(j)) / min(R, k)
        mAP@k       = mean of AP@k over the queries, in [0, 1]

    Similarity is the cosine; j = 1 is the most similar positive, and j / position(j) is
    the precision at the j-th. k = None stands for k = R. The official code divides
    mAP@1000 by the size of the class, which includes the query. Ties, images alone in
    their class and errors are treated as in `recall_at_k`.
    """
    check_ks([k for k in ks if k is not None])
    embeddings, labels = check(embeddings, labels, need_positives=True)

    sums = [0.0] * len(ks)  # of AP@k over the queries
    num_queries = 0
    for positives, negatives in positives_and_negatives(embeddings, labels, "mAP: queries"):
        is_positive = positives > -math.inf  # (B, M)
        R = is_positive.sum(1, keepdim=True)  # (B, 1)
        M = positives.shape[1]

        # Positions beyond k do not count, so the k most similar negatives are enough.
        largest_k = max(M if k is None else k for k in ks)
        top_negatives = negatives.topk(min(largest_k, negatives.shape[1])).values

        # ahead: how many negatives are >= positive. The search wants ascending numbers,
        # hence both sides with a minus sign.
        j = torch.arange(1, M + 1, dtype=torch.float32, device=R.device)
        ahead = torch.searchsorted(-top_negatives, -positives, right=True)  # (B, M)
        position = j + ahead

        for i, k in enumerate(ks):
            limit = R if k is None else torch.full_like(R, k)  # (B, 1)
            within_k = is_positive & (position <= limit)  # (B, M)
            precision = torch.where(within_k, j / position, 0.0)
            precision_sum = precision.sum(1, keepdim=True, dtype=torch.float64)
            average_precision = precision_sum / R.minimum(limit)  # (B, 1)
            sums[i] += average_precision.sum().item()
        num_queries += len(R)

    return [total / num_queries for total in sums]


# --------------------------------------------------------------------------- clustering


def clustering(embeddings, labels, seed=0):
    """NMI and F1 of k-means with as many clusters as classes. Returns {"nmi", "f1"}.

    Distances are Euclidean, between embeddings (N, D) that are not normalised here. See
    `partition_scores`.
    """
    embeddings, labels = check(embeddings, labels)
    num_classes = int(labels.max()) + 1  # `check` has numbered them 0 .. C - 1
    clusters = k_means(embeddings, num_classes, seed)
    return partition_scores(clusters, labels)


def partition_scores(clusters, labels):
    """How well do clusters and classes agree? Returns {"nmi", "f1"}, both in [0, 1].

        NMI  = 2 I / (H(clusters) + H(labels))
        I    = H(clusters) + H(labels) - H(joint)
        F1   = 2 P(joint) / (P(clusters) + P(labels))

    `clusters` and `labels` (N,) are each image's cluster and class. H is an entropy, P the
    number of pairs of images in one cluster, in one class, in both. F1 is the harmonic mean
    of the precision P(joint) / P(clusters) and the recall P(joint) / P(labels) (Song et al.
    2016). Only combinations of cluster and class that occur are stored. Raises UserError
    unless both are (N,) whole numbers.
    """
    clusters = as_tensor(clusters)
    clusters = check_labels(clusters, clusters)
    labels = check_labels(labels, clusters)
    joint = clusters * (labels.max() + 1) + labels  # a number for each combination

    cluster_sizes = clusters.unique(return_counts=True)[1].double()
    label_sizes = labels.unique(return_counts=True)[1].double()
    joint_sizes = joint.unique(return_counts=True)[1].double()

    # No entropy: all images are in one cluster and one class. No pair: each image is
    # alone in its cluster and in its class. Either way the two agree, which scores 1.
    nmi = 1.0
    sum_of_entropies = partition_entropy(cluster_sizes) + partition_entropy(label_sizes)
    if sum_of_entropies > 0:
        information = sum_of_entropies - partition_entropy(joint_sizes)
        nmi = 2 * information / sum_of_entropies

    f1 = 1.0
    sum_of_pairs = partition_pairs(cluster_sizes) + partition_pairs(label_sizes)
    if sum_of_pairs > 0:
        f1 = 2 * partition_pairs(joint_sizes) / sum_of_pairs

    return {"nmi": min(1.0, max(0.0, nmi)), "f1": f1}


def partition_entropy(sizes):
    """H = -sum_i p_i log p_i with p_i = n_i / N, of a partition with group sizes n_i."""
    p = sizes / sizes.sum()
    return -(p * p.log()).sum().item()


def partition_pairs(sizes):
    """sum_i n_i (n_i - 1) / 2: the pairs of images that are in one group."""
    return (sizes * (sizes - 1) / 2).sum().item()


# --------------------------------------------------------------- structure of the space


@full_precision
def uniformity(embeddings):
    """How evenly do the embeddings (N, D) fill the sphere?

        G_2 = log mean_{i<j} exp(-2 ||x_i - x_j||^2)

    At most 0: 0 means that all embeddings are one point; lower is more even. The
    embeddings are not normalised here. Source: Wang and Isola 2020.
    """
    x = check_embeddings(embeddings)
    N = len(x)
    # Centring keeps the distances, and ||x_i||^2 - 2 x_i.x_j + ||x_j||^2 then loses
    # fewer digits.
    x = x - x.mean(0)
    squared_norm = x.square().sum(1)  # (N,)

    log_sums = []
    chunk_size = max(1, CHUNK // N)
    starts = range(0, N, chunk_size)
    for start in progress(starts, len(starts), "uniformity: rows"):
        rows = slice(start, start + chunk_size)

        # ||x_i - x_j||^2 for the chunk's i and all j from its first image on.
        square = torch.addmm(squared_norm[start:], x[rows], x[start:].T, alpha=-2)
        square.add_(squared_norm[rows, None]).clamp_(min=0)
        exponent = square.mul_(-2)  # (B, N - start)

        # Only the pairs i < j count: -inf on and below the diagonal.
        B = len(exponent)
        exponent[:, :B] += torch.full((B, B), -math.inf, device=x.device).tril()

        # In logarithms, as the sums over distant points would underflow.
        log_sums.append(exponent.logsumexp(1).double())

    num_pairs = N * (N - 1) / 2
    return torch.cat(log_sums).logsumexp(0).item() - math.log(num_pairs)


def spectral_decay(embeddings):
    """How unevenly do the embeddings use their dimensions?

        rho = KL(uniform || s) = -log n - (1/n) sum_i log s_i

    s_1 .. s_n are the n = min(N, D) singular values of the matrix of embeddings (N, D),
    which are not normalised here, divided by their sum. At least 0: 0 means that all
    directions carry the same; larger, that fewer are in use. A singular value below
    float32's resolution of the largest (1.2e-7) counts as that much, so that rho stays
    finite with an unused direction. Source: Roth et al. 2020, "Revisiting Training
    Strategies and Generalization Performance in Deep Metric Learning".
    """
    X = check_embeddings(embeddings).double()
    # The triangular factor of X = QR has the same singular values and is small, (n, D).
    # The Gram matrix would not do: its eigenvalues are their squares, and the small
    # ones weigh most here.
    triangular = torch.linalg.qr(X, mode="r").R
    s = torch.linalg.svdvals(triangular)  # (n,), the largest first

    # 1e-300 counts where all embeddings are zero.
    resolution = torch.finfo(torch.float32).eps
    s = s.clamp(min=max(s[0].item() * resolution, 1e-300))
    s = s / s.sum()
    rho = -math.log(len(s)) - s.log().mean().item()
    return max(0.0, rho)


def density(embeddings, labels):
    """How dense are the classes, compared with the distances between them?

        within(c)   = mean cosine distance of all pairs of images of class c
        between     = mean cosine distance of all pairs of class means, normalised
        pi_density  = (mean over c of within(c)) / between

    At least 0; small for tight classes far apart. Classes of one image have no
    `within`. `between` is at least 1e-12, for a network that maps all images to one
    point. The result is nan with a single class, or where no class has two images.
    """
    embeddings, labels = check(embeddings, labels)
    sums, squares, counts = class_sums(embeddings, labels)

    paired = counts > 1  # (C,)
    within = mean_cosine_distance(sums[paired], squares[paired], counts[paired])
    within = within.clamp(min=0).mean()

    means = F.normalize(sums, dim=1)  # (C, D)
    between = mean_cosine_distance(means.sum(0), means.square().sum(), len(means))
    between = between.clamp(min=1e-12)

    return (within / between).item()


def concentration_variance(embeddings, labels):
    """How much do the classes differ in concentration? sigma^2_kappa, at least 0.

        R_c            = ||sum of the unit vectors of class c|| / number of its images
        kappa_c        = R_c (D - R_c^2) / (1 - R_c^2)
        sigma^2_kappa  = population variance over c of kappa_c

    R_c is the mean resultant length, kappa_c the concentration of a von Mises-Fisher
    distribution (Banerjee et al. 2005). 1 - R_c^2 is at least 1e-6, and classes of one
    image are left out. The estimator of the NIR paper is not known, so compare these
    values with each other only. For few images R_c is never near 0 (about 1 / sqrt(n)
    for n random ones): small classes look more concentrated than they are.
    """
    embeddings, labels = check(embeddings, labels)
    sums, _, counts = class_sums(embeddings, labels)

    D = sums.shape[1]
    paired = counts > 1  # (C,)
    R_c = sums[paired].norm(dim=1) / counts[paired]
    kappa_c = R_c * (D - R_c.square()) / (1 - R_c.square()).clamp(min=1e-6)
    return kappa_c.var(correction=0).item()


def class_sums(embeddings, labels):
    """For each class: the sums of its unit vectors and of their squared norms, its size.

    In float64; shapes (C, D), (C,), (C,). A squared norm is 1, or 0 for a zero vector.
    """
    x = F.normalize(embeddings.double(), dim=1)
    counts = labels.bincount()
    sums = x.new_zeros(len(counts), x.shape[1]).index_add_(0, labels, x)
    squares = x.new_zeros(len(counts)).index_add_(0, labels, x.square().sum(1))
    return sums, squares, counts


def mean_cosine_distance(sums, squares, n):
    """Mean of 1 - x_i.x_j over all pairs i != j of n unit vectors.

        mean = 1 - (||sum_i x_i||^2 - sum_i ||x_i||^2) / (n (n - 1))

    `sums` (..., D) is the sum of the x_i, `squares` (...) that of their squared norms.
    """
    return 1 - (sums.square().sum(-1) - squares) / (n * (n - 1))


# -------------------------------------------------------------------------- uncertainty


@full_precision
def uncertainty(embeddings, labels, ambiguity=None):
    """Does the norm of an embedding say how certain it is?

    Returns {name: number} and the rejection curve, for embeddings (N, D) that are not
    normalised. An image is right if its nearest neighbour, by the cosines of
    `recall_at_k`, is of its class. Unlike in Recall@1 a tie is not counted against it,
    and an image alone in its class is wrong.

        norm_auroc    chance that a right image has a larger norm than a wrong one; nan
                      if all are right or all wrong
        norm_clarity  Spearman correlation of the norm with 1 - ambiguity (N,), if known

    The rejection curve is [(fraction rejected, error of the others)], where the images
    of lowest norm are rejected first.
    """
    embeddings, labels = check(embeddings, labels)
    N = len(labels)
    unit = unit_vectors(embeddings)
    chunks = chunked(torch.arange(N, device=labels.device), unit)
    nearest = [cosines_to_others(unit, chunk).argmax(1) for chunk in chunks]
    nearest = torch.cat(nearest)  # (N,)

    right = (labels[nearest] == labels).cpu().numpy()
    wrong = ~right
    norm = embeddings.norm(dim=1).cpu().numpy()

    values = {"norm_auroc": math.nan}
    if right.any() and wrong.any():
        # Mann-Whitney's U: in how many pairs the right image has the larger norm.
        wins = scipy.stats.mannwhitneyu(norm[right], norm[wrong]).statistic
        values["norm_auroc"] = float(wins) / float(right.sum() * wrong.sum())
    if ambiguity is not None:
        ambiguity = full_floats(ambiguity)
        if ambiguity.shape != (N,):
            raise UserError(
                f"{N} images need as many ambiguities, not {tuple(ambiguity.shape)}"
            )
        clarity = 1 - ambiguity.cpu().numpy()
        values["norm_clarity"] = float(scipy.stats.spearmanr(norm, clarity).statistic)

    wrong_by_norm = wrong[norm.argsort(kind="stable")]  # the lowest norm first
    rejection_curve = []
    for i in range(20):
        error = wrong_by_norm[N * i // 20 :].mean()
        rejection_curve.append((i / 20, float(error)))
    return values, rejection_curve


def cosines_to_others(unit_embeddings, queries):
    """Cosines (B, N) of `queries`, indices (B,), to all images; -inf to themselves."""
    cosines = unit_embeddings[queries] @ unit_embeddings.T
    return cosines.scatter_(1, queries.unsqueeze(1), -math.inf)


# ------------------------------------ retrieval, clustering and structure in one call


def all_metrics(embeddings, labels, ks=(1, 2, 4, 8), seed=0):
    """Retrieval, clustering and structure of the space. Returns {name: number}.

    For embeddings (N, D), which are L2-normalised, and labels (N,). `seed` is that of
    k-means.
    """
    embeddings, labels = check(embeddings, labels)

    recall = recall_at_k(embeddings, labels, ks)
    metrics = {f"recall@{k}": value for k, value in recall.items()}
    map_1000, map_r = mean_average_precisions(embeddings, labels, [1000, None])
    metrics["map@1000"] = map_1000
    metrics["map@r"] = map_r

    embeddings = F.normalize(embeddings, dim=1)
    metrics.update(clustering(embeddings, labels, seed))
    metrics["uniformity"] = uniformity(embeddings)
    metrics["spectral_decay"] = spectral_decay(embeddings)
    metrics["density"] = density(embeddings, labels)
    metrics["concentration_variance"] = concentration_variance(embeddings, labels)
    return metrics


# --------------------------------------------- how queries are compared with all images


def positives_and_negatives(embeddings, labels, what):
    """The cosines of queries to their positives and negatives, chunk after chunk.

    Yields, for each chunk of B queries,
        positives (B, M)   the most similar one first; -inf after a query's last one
        negatives (B, N)   in the images' order; -inf where an image is not a negative
    where M is the largest number of positives in the chunk. The positives' cosines are
    lowered by TIE, so that ties count against the query. The cosine of a zero vector
    and any other is 0. Images alone in their class are not used as queries, which a
    warning tells. `what` names the pass in the line that shows its progress.
    """
    N = len(labels)
    class_size = labels.bincount()  # (C,)
    by_class = labels.argsort(stable=True)  # (N,), the images of class 0, class 1, ...
    class_start = class_size.cumsum(0) - class_size  # (C,), where each begins there

    # Class by class, so that M depends on the classes of one chunk alone.
    queries = by_class[class_size[labels[by_class]] > 1]
    if len(queries) < N:
        warnings.warn(
            f"{N - len(queries)} of {N} images are alone in their class: no queries"
        )

    unit = unit_vectors(embeddings)
    chunks = chunked(queries, unit)
    for query in progress(chunks, len(chunks), what):
        # A row for each query: the images of its class. All rows are as long as the
        # largest class; in the row of a smaller one, images of other classes follow.
        start = class_start[labels[query]].unsqueeze(1)  # (B, 1)
        size = class_size[labels[query]].unsqueeze(1)  # (B, 1)
        column = torch.arange(int(size.max()), device=labels.device)  # (M + 1,)
        member = by_class[(start + column).clamp(max=N - 1)]  # (B, M + 1)

        # Neither those others nor the query itself are positives. The query replaces
        # them, so that `member` is the query's class and nothing else.
        not_positive = (column >= size) | (member == query.unsqueeze(1))
        member = torch.where(not_positive, query.unsqueeze(1), member)

        similarities = unit[query] @ unit.T  # (B, N)
        positives = similarities.gather(1, member).masked_fill(not_positive, -math.inf)
        positives -= TIE[unit.dtype]
        negatives = similarities.scatter_(1, member, -math.inf)

        # Once sorted, each row ends with a -inf, that of the query itself: leave it out.
        yield positives.sort(dim=1, descending=True).values[:, :-1], negatives


def unit_vectors(embeddings):
    """Unit vectors (N, D), in float64 for up to FLOAT64_IMAGES; zero vectors stay zero."""
    if len(embeddings) <= FLOAT64_IMAGES:
        embeddings = embeddings.double()
    return F.normalize(embeddings, dim=1, eps=torch.finfo(embeddings.dtype).tiny)


def chunked(queries, unit):
    """`queries` in parts whose cosines to all images take 4 CHUNK bytes each."""
    row_bytes = len(unit) * unit.element_size()
    return queries.split(max(1, 4 * CHUNK // row_bytes))


# ----------------------------------------------------------- how k-means finds clusters


@full_precision
def k_means(embeddings, k, seed=0, iterations=100):
    """Clusters (N,), 0 .. k-1, of points (N, D) by k-means++ and Lloyd's algorithm.

    Each point goes to the nearest centre, then each centre to the mean of its points,
    until nothing changes or `iterations` are done.
    """
    check_ks([k])
    embeddings = check_embeddings(embeddings)
    # Centring keeps the distances, and ||x||^2 - 2 x.c + ||c||^2 then loses fewer
    # digits.
    x = embeddings - embeddings.mean(0)
    squared_norm = x.square().sum(1)  # (N,)

    centres = first_centres(x, squared_norm, k, seed)  # (k, D)
    clusters = None
    for _ in progress(range(iterations), iterations, "k-means: at most"):
        previous = clusters
        clusters, squared_distance = nearest_centres(x, squared_norm, centres)
        if previous is not None and torch.equal(clusters, previous):
            break

        sizes = clusters.bincount(minlength=k)  # (k,)
        sums = torch.zeros_like(centres).index_add_(0, clusters, x)
        centres = sums / sizes.clamp(min=1).unsqueeze(1)

        # An empty cluster begins anew at the point that is farthest from its centre.
        empty = (sizes == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = x[squared_distance.topk(len(empty)).indices]
    return clusters


def first_centres(x, squared_norm, k, seed):
    """The k-means++ choice of k points (k, D) of x (N, D) to start from.

    The first is any point. Each further one is drawn in proportion to the squared
    distance from the nearest centre so far. Source: Arthur and Vassilvitskii 2007.
    """
    # Drawn on the CPU, so that the choice does not depend on the device.
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(k, generator=generator, dtype=torch.float64)

    chosen = []
    weight = torch.ones_like(squared_norm)  # (N,), all equal for the first point
    for i in progress(range(k), k, "k-means: centres"):
        cumulative = weight.double().cumsum(0)
        threshold = cumulative[-1:] * uniform[i]  # (1,)
        index = torch.searchsorted(cumulative, threshold, right=True)
        index = index.clamp(max=len(x) - 1)
        chosen.append(index)

        # ||x - c||^2 = ||x||^2 - 2 x.c + ||c||^2
        squared_distance = squared_norm - 2 * (x @ x[index[0]]) + squared_norm[index]
        squared_distance = squared_distance.clamp(min=0)  # (N,)
        weight = squared_distance if i == 0 else weight.minimum(squared_distance)
    return x[torch.cat(chosen)]


def nearest_centres(x, squared_norm, centres):
    """The nearest centre of each point (N,), and its squared distance (N,)."""
    squared_centres = centres.square().sum(1)  # (k,)
    clusters, minima = [], []
    for chunk in x.split(max(1, CHUNK // len(centres))):
        # min over c of ||c||^2 - 2 x.c, (B, k) -> (B,); ||x||^2, the same for all
        # centres, is added at the end.
        values, indices = torch.addmm(squared_centres, chunk, centres.T, alpha=-2).min(1)
        clusters.append(indices)
        minima.append(values)
    return torch.cat(clusters), squared_norm + torch.cat(minima)


# -------------------------------------------------------------- what the metrics accept


# All take tensors, arrays or lists, of any integer or floating-point type.


def check(embeddings, labels, need_positives=False):
    """Convert embeddings (N, D) and labels (N,) as `check_embeddings`, `check_labels` do.

    Raises UserError where these do and, with `need_positives`, where no class has two
    images.
    """
    embeddings = check_embeddings(embeddings)
    labels = check_labels(labels, embeddings)
    if need_positives and labels.bincount().max() < 2:
        raise UserError(
            "no class has two images, so there is nothing to compare: "
            "evaluate on other data"
        )
    return embeddings, labels


def check_embeddings(embeddings):
    """Convert embeddings (N, D) to float32 or float64, without gradient.

    Raises UserError unless there are at least two, and all of them are finite.
    """
    embeddings = full_floats(embeddings)
    if embeddings.dim() != 2 or embeddings.shape[0] < 2 or embeddings.shape[1] < 1:
        raise UserError(
            f"embeddings of shape {tuple(embeddings.shape)} cannot be evaluated: "
            "give (N, D) with N >= 2"
        )
    broken = int((~embeddings.isfinite()).any(1).sum())
    if broken:
        raise UserError(
            f"{broken} of {len(embeddings)} embeddings hold NaN or infinity: "
            "the training diverged, try a smaller learning rate"
        )
    return embeddings


def check_labels(labels, images):
    """Renumber labels (N,) as 0 .. C - 1, on the device of `images` (N, ...).

    Raises UserError unless there is a whole number for each image.
    """
    labels = as_tensor(labels)
    N = images.shape[:1].numel()
    if labels.shape != (N,) or not torch.can_cast(labels.dtype, torch.int64):
        raise UserError(
            f"{N} images need as many integer labels, "
            f"not {labels.dtype} {tuple(labels.shape)}"
        )
    return labels.to(images.device).long().unique(return_inverse=True)[1]


def full_floats(values):
    """Numbers as a tensor without gradient, in float64 if they are, else in float32."""
    values = as_tensor(values)
    return values if values.dtype == torch.float64 else values.float()


def as_tensor(values):
    """A tensor, an array or a list as a tensor without gradient."""
    try:
        if not torch.is_tensor(values):
            # Copied, as torch takes no array that runs backwards.
            values = torch.from_numpy(np.array(values))
        return values.detach()
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{type(values).__name__} cannot be evaluated ({error}): "
            "give a tensor, an array or a list of numbers"
        ) from None


def check_ks(ks):
    """The k of Recall@k or mAP@k as a list; UserError unless they are positive whole numbers."""
    ks = list(ks)
    if any(not isinstance(k, (int, np.integer)) or k < 1 for k in ks):
        raise UserError(
            f"k = {ks} cannot be evaluated: give positive whole numbers"
        )
    return ks


# ----------------------------------------------------------------------------- pictures

# Colours of the borders, red, green and blue in [0, 1], their width and the height of a line
# of text in pixels.
RIGHT = (0.1, 0.7, 0.2)
WRONG = (0.85, 0.1, 0.1)
NEUTRAL = (0.6, 0.6, 0.6)
LOW = (0.8, 0.8, 0.8)
HIGH = (0.2, 0.2, 0.2)
BORDER = 4
TEXT_HEIGHT = 20


def add_border(image, colour):
    """A picture (3, H, W) in [0, 1] with a coloured border.

    The shorter side of a small picture is enlarged to at least 64 pixels, that of a
    large one reduced to 112.
    """
    side = min(image.shape[1:])
    if side < 64:
        scale = math.ceil(64 / side)  # a whole multiple keeps small pixels square
        mode = "nearest"
    else:
        scale = min(1.0, 112 / side)
        mode = "area"
    image = F.interpolate(image[None], scale_factor=scale, mode=mode)[0]

    height = image.shape[1] + 2 * BORDER
    width = image.shape[2] + 2 * BORDER
    framed = torch.tensor(colour).view(3, 1, 1).repeat(1, height, width)
    framed[:, BORDER:-BORDER, BORDER:-BORDER] = image
    return framed


def line_of_text(width, text, colour=None):
    """A line of text, (3, TEXT_HEIGHT, width) in [0, 1]; one that is too wide is left out.

    With a colour the line begins with a square of it, else it is centred.
    """
    line = Image.new("RGB", (width, TEXT_HEIGHT), "white")
    draw = ImageDraw.Draw(line)
    middle = TEXT_HEIGHT / 2
    if colour:
        square = [2, 4, TEXT_HEIGHT - 6, TEXT_HEIGHT - 4]
        draw.rectangle(square, tuple(round(255 * c) for c in colour))
        draw.font = ImageFont.load_default(14)
        draw.text((TEXT_HEIGHT, middle), text, "black", anchor="lm")
        return to_tensor(line)

    for size in (14, 12, 10):
        draw.font = ImageFont.load_default(size)
        if draw.textlength(text) <= width:
            draw.text((width / 2, middle), text, "black", anchor="mm")
            break
    return to_tensor(line)


def save_tiles(path, legend, tiles, texts, columns):
    """Write pictures in rows, each with a text below it, under a legend {text: colour}."""
    width = tiles[0].shape[2]
    lines = [line_of_text(width, text) for text in texts]
    tiles = [torch.cat(parts, dim=1) for parts in zip(tiles, lines)]
    grid = make_grid(tiles, nrow=columns, pad_value=1)
    rows = [line_of_text(grid.shape[2], text, colour) for text, colour in legend.items()]
    save_image(torch.cat([*rows, grid], dim=1), path)


@full_precision
def save_retrieval(
    path,
    load_image,
    embeddings,
    labels,
    num_queries=10,
    neighbours=5,
    seed=0,
    class_names=None,
):
    """Write a picture, each row a random query (grey border) and its nearest images.

    Their border is green if they are of the query's class, red if not. Below each is the
    name of its class, where it is short enough. `load_image(i)` gives picture i, (3, H, W)
    in [0, 1], all of one size; it is called only for those that are shown. Each query has
    a positive. Raises UserError if no image has one.
    """
    original_labels = labels  # `check` numbers them anew
    embeddings, labels = check(embeddings, labels, need_positives=True)
    unit = unit_vectors(embeddings)

    possible = (labels.bincount()[labels] > 1).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(possible), generator=generator)
    queries = possible[order[:num_queries]]  # (Q,)

    neighbours = min(neighbours, len(labels) - 1)
    nearest = cosines_to_others(unit, queries).topk(neighbours).indices

    tiles, texts = [], []
    for query, found in zip(queries.tolist(), nearest.tolist()):
        tiles.append(add_border(load_image(query), NEUTRAL))
        for i in found:
            colour = RIGHT if labels[i] == labels[query] else WRONG
            tiles.append(add_border(load_image(i), colour))
        for i in (query, *found):
            texts.append(class_names[original_labels[i]] if class_names else "")
    legend = {
        "a query, then the images nearest to it": NEUTRAL,
        "of the query's class": RIGHT,
        "of another class": WRONG,
    }
    save_tiles(path, legend, tiles, texts, columns=1 + neighbours)


def save_norm_extremes(path, load_image, embeddings, labels, classes=8, each=3):
    """Write a picture, each row a class: its images of lowest norm, then of highest.

    `each` images of either kind are shown, with a light and with a dark border, the norm
    below. The classes are evenly spaced among those that have enough images. The embeddings (N, D)
    are not normalised; `load_image` is that of `save_retrieval`. Raises UserError if no
    class has two images.
    """
    embeddings, labels = check(embeddings, labels, need_positives=True)
    counts = labels.bincount()
    norms = embeddings.norm(dim=1)

    each = min(each, int(counts.max()) // 2)
    possible = (counts >= 2 * each).nonzero().flatten()
    classes = min(classes, len(possible))
    shown = possible[torch.arange(classes) * len(possible) // classes]

    tiles, texts = [], []
    for c in shown:
        members = (labels == c).nonzero().flatten()
        members = members[norms[members].argsort()].tolist()
        for i in members[:each]:
            tiles.append(add_border(load_image(i), LOW))
        for i in members[-each:]:
            tiles.append(add_border(load_image(i), HIGH))
        texts += [f"{norms[i]:.3g}" for i in members[:each] + members[-each:]]
    legend = {
        "a class's embeddings of lowest norm": LOW,
        "of highest norm; the number is the norm": HIGH,
    }
    save_tiles(path, legend, tiles, texts, columns=2 * each)


# The colours of the curves of the first ten groups.
COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e",
    "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
)


def save_curves(path, curves, label="Recall@1, %", logarithmic=False):
    """Write a PNG of numbers by epoch, for {group: a curve for each of its seeds}.

    A curve is a list of numbers, one for each epoch. nan is left out, and on a
    logarithmic axis all numbers <= 0. Each group has a colour: thin lines for the seeds, a
    thick one for their mean; points where there is a single epoch. Groups beyond the
    tenth take the first colours again. Raises UserError if no number is left.
    """
    numbers = np.concatenate(list(curves.values()))  # (runs, epochs)
    epochs = numbers.shape[1]
    lowest = 0 if logarithmic else -math.inf
    numbers = numbers[numbers > lowest]
    if len(numbers) == 0:
        raise UserError(f"{label}: no number to draw, give another --column of log.csv")

    # Drawn at twice the size and then reduced, which makes the lines smooth.
    picture = Image.new("RGB", (1440, 840), "white")
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(26)
    left, right, top, bottom = 140, 1412, 60, 780

    # The axes. `axis` are 501 numbers at equal distances in the picture, from `bottom` to
    # `top`; at every hundredth there is a grey line.
    spaced = np.geomspace if logarithmic else np.linspace
    axis = spaced(numbers.min(), numbers.max(), 501)
    axis_y = np.linspace(bottom, top, 501)
    epoch_x = np.linspace(left, right, epochs + 2)[1:-1]
    for number, y in zip(axis[::100], axis_y[::100]):
        draw.line([left, y, right, y], "#dddddd", 2)
        draw.text((left - 16, y), f"{number:.3g}", "black", anchor="rm")
    for i in range(0, epochs, math.ceil(epochs / 15)):
        draw.text((epoch_x[i], bottom + 30), str(i + 1), "black", anchor="mm")
    draw.text((left, top - 30), f"{label} by epoch", "black", anchor="lm")

    def draw_curve(curve, colour, width):
        y = np.interp(curve, axis, axis_y, left=math.nan)
        points = [point for point in zip(epoch_x, y) if not math.isnan(point[1])]
        if len(points) == 1:
            draw.circle(points[0], 4 + width, colour)
        elif points:
            draw.line(points, colour, width, joint="curve")

    # The curves, and a legend in the lower right corner.
    for i, (name, group) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        for curve in group:
            draw_curve(curve, colour, width=1)
        draw_curve(np.mean(group, axis=0), colour, width=6)
        place = (right - 16, bottom + 10 + 34 * (i - len(curves)))
        draw.text(place, f"{name} (n = {len(group)})", colour, anchor="rm")
    picture.resize((720, 420), Image.Resampling.LANCZOS).save(path, format="png")


# --------------------------------------------------------------------------- comparison
# A group is a list of runs that differ by their seed alone.

# The metrics of the table, unless others are asked for.
HEADLINE = ("recall@1", "map@r", "nmi")

# In these all runs of a table agree, or their numbers could not be compared.
PROTOCOL = ("dataset", "epochs", "val_fraction")

# In these the runs of a group may differ, as they are no settings.
CIRCUMSTANCES = (
    "seed", "out", "resume", "device", "workers", "data_root",
    "command", "torch", "commit", "folder", "options", "numbers",
)


def read_run(folder):
    """A finished run: what its args.json says, as attributes, and four more.

        folder   its Path
        name     its group's: NAME for NAME-seed0, NAME/0 and NAME-seed0-2
        options  its command in parts: the script, then each option with its values, but
                 for --seed and --out
        numbers  {name: number}: metrics of results.json and columns of log.csv, both of
                 the last epoch, and COLUMN@EPOCH of log.csv; nan for other names

    Raises UserError for a file that is missing or broken.
    """
    file = folder / "args.json"
    try:
        run = argparse.Namespace(**json.loads(file.read_text()), folder=folder)
        # Data sets of one's own are told apart by the name of their folder.
        if run.dataset == "folder":
            run.dataset = f"folder {Path(run.data_root).name}"
        seed_suffix = rf"[-_/](s(eed)?[-_]?)?{run.seed}(-\d+)?$"
        run.name = Path(re.sub(seed_suffix, "", str(folder))).name
        parts = re.split(" (?=--)", run.command)
        run.options = [part for part in parts if not re.match("--(seed|out)[ =]", part)]

        file = folder / "log.csv"
        run.numbers = defaultdict(lambda: math.nan)
        for row in csv.DictReader(file.read_text().splitlines()):
            for column, value in row.items():
                run.numbers[column] = float(value)
                run.numbers[f"{column}@{row['epoch']}"] = float(value)
        # Last, as its map@2 is not epoch 2 of a column `map`.
        file = folder / "results.json"
        for name, value in json.loads(file.read_text())["last"].items():
            run.numbers[name] = float(value)
    except Exception as error:  # a file that somebody changed fails in any way
        # Perhaps it is a folder of runs, or a file of one.
        runs = [*folder.glob("*/results.json"), *folder.glob("*/*/results.json")]
        runs += folder.parent.glob("results.json")
        example = min(runs).parent if runs else "runs/NAME-seed0"
        pattern = re.sub(r"\d+$", "*", str(example))
        raise UserError(
            f"{folder} is no finished run, as its {file.name} is missing or broken "
            f"({type(error).__name__}): leave it out, or give folders of runs, "
            f"such as {pattern}"
        ) from None
    return run


def read_groups(folders):
    """The finished runs in these folders, {name: group}. One given twice counts once.

    Raises UserError for runs that cannot be compared, and where runs of one name differ
    in more than their seeds, or not even in these.
    """
    folders = dict.fromkeys(Path(folder).resolve() for folder in folders)
    runs = [read_run(folder) for folder in folders]
    for run, other in itertools.combinations(runs, 2):
        both = f"{run.folder} and {other.folder}"
        settings = PROTOCOL
        remedy = "their numbers cannot be compared, leave one out"
        if run.name == other.name:
            settings = {**vars(run), **vars(other)}
            remedy = "runs of one name are seeds of one group, rename one or leave it out"
            if run.seed == other.seed:
                raise UserError(f"{both} have the same seed: {remedy}")
        for setting in settings:
            value, other_value = vars(run).get(setting), vars(other).get(setting)
            if value != other_value and setting not in CIRCUMSTANCES:
                raise UserError(
                    f"{both} differ in {setting} ({value} and {other_value}): {remedy}"
                )

    groups = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def number_format(metric):
    """How a metric is written: factor, unit, format."""
    fractions = ("recall@", "test_recall@", "val_recall@", "map@", "nmi", "f1")
    if metric.startswith(fractions):
        return 100, " %", ".1f"
    return 1, "", ".4g"


def format_metric(metric, values):
    """A metric's values over the seeds as "mean ± sample deviation".

    Fractions are in percent, other numbers have two digits of the deviation. "-" if a value
    is missing, which is nan.
    """
    if np.isnan(values).any():
        return "-"
    factor, unit, digits = number_format(metric)
    mean = factor * np.mean(values)
    if len(values) < 2:
        return f"{mean:{digits}}{unit}"

    deviation = factor * np.std(values, ddof=1)
    deviation_digits = digits if unit else ".2g"
    if not unit and deviation > 1e-6:
        places = 1 - math.floor(math.log10(deviation))
        mean, deviation = round(mean, places), round(deviation, places)
        digits = deviation_digits = f".{max(0, places)}f"
    return f"{mean:{digits}} ± {deviation:{deviation_digits}}{unit}"


def format_difference(metric, group, baseline):
    """A group's lead over another in a metric, as "mean [low, high]".

    The differences are paired by seed, the interval is Student's for 95 %. "-" for the
    baseline itself, for fewer than two pairs, and where a value is missing.
    """
    differences = []
    for run, other in itertools.product(group, baseline):
        if run.seed == other.seed:
            differences.append(run.numbers[metric] - other.numbers[metric])
    n = len(differences)
    if group is baseline or n < 2 or np.isnan(differences).any():
        return "-"

    factor, unit, digits = number_format(metric)
    mean = factor * np.mean(differences)
    standard_error = factor * scipy.stats.sem(differences)
    half_width = standard_error * scipy.stats.t.ppf(0.975, n - 1)
    interval = f"[{mean - half_width:+{digits}}, {mean + half_width:+{digits}}]"
    warning = f" ({n} seeds only)" if n < 3 else ""
    return f"{mean:+{digits}} {interval}{unit}{warning}"


def compare(groups, metrics=HEADLINE, paired=False):
    """Markdown of {name: group}: their commands, then a table with a row for each.

    `metrics` are names in the runs' `numbers`. With `paired` the last column shows the
    differences to the first group in the first metric. Raises UserError for a metric
    that no run has.
    """
    runs = [run for group in groups.values() for run in group]
    known = dict.fromkeys(name for run in runs for name in run.numbers)
    for metric in metrics:
        if metric not in known:
            # All but the many COLUMN@EPOCH, where COLUMN is a name itself.
            listed = [name for name in known if name.rpartition("@")[0] not in known]
            raise UserError(
                f"--metrics {metric}: no run has it, choose from {', '.join(listed)} "
                "and log.csv's COLUMN@EPOCH"
            )

    shared = []
    for part in runs[0].options:
        if all(part in run.options for run in runs):
            shared.append(part)
    lines = [f"All runs: `{' '.join(shared) or '-'}`", ""]
    for name, group in groups.items():
        seeds = ", ".join(str(run.seed) for run in group)
        own = [part for part in group[0].options if part not in shared]
        lines.append(f"- {name}, seeds {seeds}: `{' '.join(own) or '-'}`")
    versions = dict.fromkeys(f"torch {run.torch}, commit {run.commit}" for run in runs)
    lines += ["", f"With {'; '.join(versions)}", ""]

    baseline = runs[0].name
    header = ["", "n", *metrics]
    if paired:
        header.append(f"{metrics[0]} minus {baseline} [95 %]")
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for name, group in groups.items():
        row = [name, str(len(group))]
        for metric in metrics:
            row.append(format_metric(metric, [run.numbers[metric] for run in group]))
        if paired:
            row.append(format_difference(metrics[0], group, groups[baseline]))
        rows.append(row)
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------- main
# `common` imports this file, so the functions below import it when they are called.


def make_parser():
    """The options of the command line."""
    import common

    parser = argparse.ArgumentParser(
        usage="%(prog)s (--checkpoint FILE | --compare RUN ...) [options]",
        description=__doc__.split("\n\n")[0],
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--checkpoint",
                      help="best.pt or last.pt of a run; its settings are used")
    mode.add_argument("--compare", nargs="+", metavar="RUN",
                      help="folders of finished runs: print a table over their seeds")

    add = parser.add_argument_group("with --checkpoint").add_argument
    add("--data_root", help="where the data set is now (default: where it was)")
    add("--pictures", action="store_true",
        help="also write retrieval.png and norms.png beside the checkpoint")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--workers", type=common.not_negative(int),
        help="number of processes that load images (default: as in the run)")
    add("--allow_trained_classes", action="store_true",
        help="evaluate although some of the test classes were trained")
    add("--embeddings", metavar="FILE.npz",
        help="write the test images' embeddings, labels, class_names, paths and norms")
    add("--images", metavar="FOLDER",
        help="with --embeddings: write those of all pictures below this folder "
             "instead, and measure nothing")

    add = parser.add_argument_group("with --compare").add_argument
    add("--baseline", metavar="RUN", help="show the differences to the group of this run")
    add("--metrics", nargs="+", metavar="NAME",
        help="names of results.json, or columns of log.csv: grad_share_nir (its last "
             "epoch), grad_share_nir@1 (its first), ...; the differences are those of "
             f"the first name (default: {' '.join(HEADLINE)})")
    add("--out", metavar="FILE.md", help="also write the table to this file")
    add("--curves", metavar="FILE.png", help="draw Recall@1 by epoch")
    add("--column", metavar="NAME",
        help="with --curves: draw this column of log.csv instead; the axis is logarithmic "
             "if the name begins with grad_share_")
    return parser


def check_contradictions(parser, options):
    """Stop with a usage error where options contradict each other."""
    needed_by = {
        "data_root": "checkpoint",
        "pictures": "checkpoint",
        "allow_trained_classes": "checkpoint",
        "embeddings": "checkpoint",
        "images": "embeddings",
        "baseline": "compare",
        "metrics": "compare",
        "out": "compare",
        "curves": "compare",
        "column": "curves",
    }
    for name, needed in needed_by.items():
        if getattr(options, name) and not getattr(options, needed):
            parser.error(f"--{name} without --{needed}")
    if options.images and (options.pictures or options.data_root):
        parser.error(
            "--images is not the data set: leave --data_root and --pictures out"
        )


def write_comparison(options):
    """What --compare does: print the table and write the files that are asked for."""
    import common

    baseline = [options.baseline] if options.baseline else []
    groups = read_groups(baseline + options.compare)
    text = compare(groups, options.metrics or HEADLINE, paired=bool(baseline))
    print(text)
    if options.out:
        common.save_file(options.out, text)
        print(f"{options.out} written")
    if options.curves:
        draw_column(options.curves, groups, options.column)
        print(f"{options.curves} written")


def draw_column(path, groups, column=None):
    """Draw a column of log.csv by epoch, for {name: group}; None means Recall@1."""
    run = next(iter(groups.values()))[0]
    if column is None:
        column = "val_recall@1" if run.val_fraction else "test_recall@1"
    factor, unit, _ = number_format(column)
    names = [f"{column}@{epoch}" for epoch in range(1, run.epochs + 1)]

    curves = {}
    for title, group in groups.items():
        curves[title] = []
        for run in group:
            curves[title].append([factor * run.numbers[name] for name in names])
    is_share = column.startswith("grad_share_")
    with data.clear_errors(f"writing {path}", "give another file with --curves"):
        save_curves(path, curves, f"{column}{unit}", logarithmic=is_share)


def embed_images(options, checkpoint):
    """(settings of the run, images to embed, their embeddings (N, D)) of a checkpoint.

    The settings are the run's own, but for --device and what else the command line says.
    """
    import common

    args = argparse.Namespace(**checkpoint["args"])
    for name, value in vars(options).items():
        if value is not None:
            setattr(args, name, value)
    device = common.make_device(args.device)
    if options.images:
        split = data.load_pictures(options.images)
    else:
        train, split = data.load(args.dataset, args.data_root, download=False)
        check_test_classes(options, checkpoint, train.class_names, split.class_names)
    network = common.build_network(args, checkpoint, device)
    return args, split, common.embed(network, split, args, device)


def check_test_classes(options, checkpoint, train_names, test_names):
    """Raise UserError where test classes were trained, unless that is allowed.

    The names are those of the data set as it is now. A warning tells where a trained
    class is not among them.
    """
    trained = set(checkpoint.get("class_names", []))
    both = sorted(trained.intersection(test_names))
    gone = sorted(trained.difference(test_names, train_names))
    if both and not options.allow_trained_classes:
        raise UserError(
            f"{len(both)} of {len(test_names)} test classes were trained "
            f"({', '.join(both[:3])}): make the data set as it was in training, or give "
            "--allow_trained_classes, also if their names alone are the same"
        )
    unknown = f"{len(gone)} trained classes ({', '.join(gone[:3])}) are gone or renamed"
    if not trained:
        unknown = f"{options.checkpoint} does not name its training classes"
    if gone or not trained:
        warnings.warn(f"{unknown}: whether test classes were trained cannot be checked")


def save_embeddings(path, embeddings, split):
    """Write an .npz file of embeddings, labels, class_names, paths and norms.

    An image without a file, as those of the toy data, has its number instead of a path.
    """
    import common

    paths = []
    for i, image in enumerate(split.images):
        paths.append(str(image if isinstance(image, (str, os.PathLike)) else i))
    embeddings = embeddings.float()
    arrays = {
        "embeddings": embeddings.cpu().numpy(),
        "labels": split.labels.numpy(),
        "paths": np.array(paths),
        "class_names": np.array(split.class_names),
        "norms": embeddings.norm(dim=1).cpu().numpy(),
    }
    common.save_file(path, lambda file: np.savez(file, **arrays))
    print(f"embeddings of {len(paths)} images written to {path}")


def save_pictures(folder, embeddings, split, args):
    """Write retrieval.png and norms.png, with the images as the network sees them."""
    images = data.Images(split, data.test_transform(args.image_size, args.augment))

    def load_image(i):
        pixels, _ = images[i]
        return pixels / 255

    save_retrieval(
        folder / "retrieval.png",
        load_image,
        embeddings,
        split.labels,
        class_names=split.class_names,
    )
    save_norm_extremes(folder / "norms.png", load_image, embeddings, split.labels)
    print(
        f"pictures: {folder / 'retrieval.png'} "
        "(query, then its nearest; green right, red wrong), "
        f"{folder / 'norms.png'} "
        "(a class a row: lowest norms, then, with a dark border, highest)"
    )


def main(argv=None):
    """Evaluate one checkpoint, or compare finished runs."""
    import common

    parser = make_parser()
    options = parser.parse_args(argv)
    check_contradictions(parser, options)

    if options.compare:
        write_comparison(options)
        return

    checkpoint = common.load_checkpoint(options.checkpoint, "--checkpoint")
    args, split, embeddings = embed_images(options, checkpoint)
    if options.embeddings:
        save_embeddings(options.embeddings, embeddings, split)
    if options.images:
        return

    ks = data.usual_ks(args.dataset)
    norm_metrics, curve = uncertainty(embeddings, split.labels, split.ambiguity)
    metrics = {
        "epoch": checkpoint["epoch"],
        **all_metrics(embeddings, split.labels, ks),
        **norm_metrics,
    }
    file = Path(options.checkpoint)
    folder = file.parent
    common.save_file(folder / "metrics.json", json.dumps(metrics, indent=1))
    rows = [{"rejected": rejected, "error": error} for rejected, error in curve]
    common.save_file(folder / "rejection.csv", common.csv_text(rows))
    print(common.table({file.name: metrics}))
    if options.pictures:
        save_pictures(folder, embeddings, split, args)
    print(f"numbers: {folder / 'metrics.json'}, {folder / 'rejection.csv'}")


if __name__ == "__main__":
    import common

    common.command(main)
