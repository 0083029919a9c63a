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
    log ELK          `expected_likelihood`
"""

import argparse
import csv
import json
import math
import os
import re
import warnings
from pathlib import Path

# Set before torch is imported: idle OpenMP threads sleep instead of slowing other
# processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid, save_image

import data
from data import UserError, progress

# How many entries of an (N, N) or (N, k) matrix are held at a time: 128 MiB in
# float32. (k is the number of clusters.)
CHUNK = 2**25

# Cosines closer than this count as equal. In float32 the same cosine, computed at two
# places of a matrix, can differ by nearly as much, and a network that maps all images
# to one point must not be rewarded for such rounding errors.
TIE = 1e-6


# ---------------------------------------------------------------------------- retrieval


def recall_at_k(embeddings, labels, ks, similarity=None):
    """How often is one of the k most similar images a positive? Returns {k: Recall@k}.

        ahead(q)  = number of negatives at least as similar to q as q's best positive
        Recall@k  = fraction of the queries q with ahead(q) < k

    So the N similarities of a query need no sorting. For embeddings (N, D) and labels
    (N,). `similarity` maps queries (B, D) and all embeddings (N, D) to (B, N); None is
    the cosine. A tie (up to TIE) counts against the query, so that a network which maps
    all images to one point scores 0; with sorting it might score 100 %. Images alone in
    their class are not used as queries. Raises UserError if no image has a positive.
    """
    check_ks(ks)
    embeddings, labels = check(embeddings, labels, need_positives=True)

    # For each chunk of queries: similarities to the positives (B, M), the most similar
    # first, and to the negatives (B, N); -inf where there is none.
    chunks = positives_and_negatives(embeddings, labels, "recall: queries", similarity)
    ahead = []
    for positives, negatives in chunks:
        best_positive = positives[:, :1]  # (B, 1)
        # Relative where a similarity exceeds 1, as log ELK does.
        tolerance = TIE * best_positive.abs().clamp(min=1)
        # In place, as ones and zeros in floats: adding up booleans is ten times slower.
        at_least_as_similar = negatives.ge_(best_positive - tolerance)  # (B, N)
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

        # ahead: how many negatives are >= positive - TIE. The search wants ascending
        # numbers, hence both sides with a minus sign.
        j = torch.arange(1, M + 1, device=R.device)
        ahead = torch.searchsorted(-top_negatives, -(positives - TIE), right=True)  # (B, M)
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
    2016). Only combinations of cluster and class that occur are stored.
    """
    clusters = clusters.unique(return_inverse=True)[1]
    labels = labels.unique(return_inverse=True)[1]
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


def uncertainty(embeddings, labels, ambiguity=None):
    """Does the norm of an embedding say how certain it is?

    Returns {name: number} and the rejection curve, for embeddings (N, D) that are not
    normalised. An image is right if its nearest neighbour by cosine is of its class.
    Unlike in Recall@1 a tie is not counted against it, and an image alone in its class
    is wrong.

        norm_auroc    chance that a right image has a larger norm than a wrong one; nan
                      if all are right or all wrong
        norm_clarity  Spearman correlation of the norm with 1 - ambiguity (N,), if known

    The rejection curve is [(fraction rejected, error of the others)], where the images
    of lowest norm are rejected first.
    """
    embeddings, labels = check(embeddings, labels)
    N = len(labels)
    unit = F.normalize(embeddings, dim=1)
    chunks = torch.arange(N, device=labels.device).split(max(1, CHUNK // N))
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

    For embeddings (N, D), which are L2-normalised first, and labels (N,). `seed` is
    that of k-means.
    """
    embeddings, labels = check(embeddings, labels)
    embeddings = F.normalize(embeddings, dim=1)

    recall = recall_at_k(embeddings, labels, ks)
    metrics = {f"recall@{k}": value for k, value in recall.items()}
    map_1000, map_r = mean_average_precisions(embeddings, labels, [1000, None])
    metrics["map@1000"] = map_1000
    metrics["map@r"] = map_r
    metrics.update(clustering(embeddings, labels, seed))
    metrics["uniformity"] = uniformity(embeddings)
    metrics["spectral_decay"] = spectral_decay(embeddings)
    metrics["density"] = density(embeddings, labels)
    metrics["concentration_variance"] = concentration_variance(embeddings, labels)
    return metrics


# --------------------------------------------- how queries are compared with all images


def positives_and_negatives(embeddings, labels, what, similarity=None):
    """The similarities of queries to their positives and negatives, chunk after chunk.

    Yields, for each chunk of B queries,
        positives (B, M)   the most similar one first; -inf after a query's last one
        negatives (B, N)   in the images' order; -inf where an image is not a negative
    where M is the largest number of positives in the chunk. `similarity` is that of
    `recall_at_k`; the cosine of a zero vector and any other is 0. Images alone in their
    class are not used as queries, which a warning tells. `what` names the pass in the
    line that shows its progress.
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

    chunk_size = CHUNK // N
    if similarity is None:
        embeddings = F.normalize(embeddings, dim=1)
        similarity = torch.inner
    else:
        chunk_size //= 8  # the function needs room for its intermediate results
    chunks = queries.split(max(1, chunk_size))

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

        similarities = similarity(embeddings[query], embeddings)  # (B, N)
        positives = similarities.gather(1, member).masked_fill(not_positive, -math.inf)
        negatives = similarities.scatter_(1, member, -math.inf)

        # Once sorted, each row ends with a -inf, that of the query itself: leave it out.
        yield positives.sort(dim=1, descending=True).values[:, :-1], negatives


def expected_likelihood(queries, others):
    """The EL-nivMF paper's kernel, here between two images: their log ELK, (B, N).

        log ELK = log C_D(||x||) + log C_D(||y||) - log C_D(||x + y||)

    The embeddings, `queries` x (B, D) and `others` y (N, D), are not normalised. They
    stand for von Mises-Fisher distributions: the direction is the mean, the norm the
    concentration. `others` take the place of the proxies.
    """
    import prob_dml  # not at the top: no other metric needs it

    return prob_dml.elk_vmf(queries, prob_dml.unit_vectors(others), others.norm(dim=1))


# ----------------------------------------------------------- how k-means finds clusters


def k_means(embeddings, k, seed=0, iterations=100):
    """Clusters (N,), 0 .. k-1, of points (N, D) by k-means++ and Lloyd's algorithm.

    Each point goes to the nearest centre, then each centre to the mean of its points,
    until nothing changes or `iterations` are done.
    """
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


def check(embeddings, labels, need_positives=False):
    """Convert the embeddings as `check_embeddings` does, and renumber the labels (N,).

    Labels become 0 .. C - 1, on the embeddings' device. Raises UserError for labels
    that are not (N,) whole numbers and, with `need_positives`, where no class has two
    images.
    """
    embeddings = check_embeddings(embeddings)
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        raise UserError(
            f"{len(embeddings)} embeddings need as many integer labels, "
            f"not {labels.dtype} {tuple(labels.shape)}"
        )
    labels = labels.to(embeddings.device).unique(return_inverse=True)[1]
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
    precision = torch.promote_types(embeddings.dtype, torch.float32)
    return embeddings.detach().to(precision)


def check_ks(ks):
    """Raise UserError unless all k of Recall@k or mAP@k are positive whole numbers."""
    if any(not isinstance(k, int) or k < 1 for k in ks):
        raise UserError(
            f"k = {list(ks)} cannot be evaluated: give positive whole numbers"
        )


# ----------------------------------------------------------------------------- pictures

# Colours of the borders, red, green and blue in [0, 1], and their width in pixels.
RIGHT = (0.1, 0.7, 0.2)
WRONG = (0.85, 0.1, 0.1)
NEUTRAL = (0.6, 0.6, 0.6)
LOW = (0.8, 0.8, 0.8)
HIGH = (0.2, 0.2, 0.2)
BORDER = 4


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


def save_retrieval(
    path, load_image, embeddings, labels, num_queries=10, neighbours=5, seed=0
):
    """Write a picture, each row a random query (grey border) and its nearest images.

    Their border is green if they are of the query's class, red if not. `load_image(i)`
    gives picture i, (3, H, W) in [0, 1], all of one size; it is called only for those
    that are shown. Each query has a positive. Raises UserError if no image has
    one.
    """
    embeddings, labels = check(embeddings, labels, need_positives=True)
    embeddings = F.normalize(embeddings, dim=1)

    possible = (labels.bincount()[labels] > 1).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(possible), generator=generator)
    queries = possible[order[:num_queries]]  # (Q,)

    neighbours = min(neighbours, len(labels) - 1)
    nearest = cosines_to_others(embeddings, queries).topk(neighbours).indices

    tiles = []
    for query, found in zip(queries.tolist(), nearest.tolist()):
        tiles.append(add_border(load_image(query), NEUTRAL))
        for i in found:
            colour = RIGHT if labels[i] == labels[query] else WRONG
            tiles.append(add_border(load_image(i), colour))
    save_image(make_grid(tiles, nrow=1 + neighbours, pad_value=1), path)


def save_norm_extremes(path, load_image, embeddings, labels, classes=8, each=3):
    """Write a picture, each row a class: its images of lowest norm, then of highest.

    `each` images of either kind are shown, with a light and with a dark border. The
    classes are evenly spaced among those that have enough images. The embeddings (N, D)
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

    tiles = []
    for c in shown:
        members = (labels == c).nonzero().flatten()
        members = members[norms[members].argsort()].tolist()
        for i in members[:each]:
            tiles.append(add_border(load_image(i), LOW))
        for i in members[-each:]:
            tiles.append(add_border(load_image(i), HIGH))
    save_image(make_grid(tiles, nrow=2 * each, pad_value=1), path)


# The colours of the curves of the first ten groups.
COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e",
    "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
)

# The area of the plot in a picture of 1440 x 840 pixels, which is halved at the end.
PLOT_LEFT = 124
PLOT_TOP = 28
PLOT_RIGHT = 1412
PLOT_BOTTOM = 752


def save_curves(path, curves):
    """Write a PNG of Recall@1 by epoch, for {group: a curve for each of its seeds}.

    A curve is a list of percentages. Each group has a colour: thin lines for the seeds,
    a thick one for their mean over the epochs that all have. Groups beyond the tenth
    take the first colours again.
    """
    all_curves = [curve for group in curves.values() for curve in group]
    epochs = max(len(curve) for curve in all_curves)
    values = [value for curve in all_curves for value in curve]

    # About eight grey lines, a whole number of percent apart, that hold all values.
    step = max(1, math.ceil((max(values) - min(values)) / 8))
    low = step * int(min(values) // step)
    high = step * int((max(values) + step) // step)

    def to_pixels(epoch, value):
        """Where an epoch, from 1, and a percentage lie in the picture: (x, y)."""
        right = (PLOT_RIGHT - PLOT_LEFT) * (epoch - 1) / max(1, epochs - 1)
        up = (PLOT_BOTTOM - PLOT_TOP) * (value - low) / (high - low)
        return PLOT_LEFT + right, PLOT_BOTTOM - up

    # Drawn at twice the size and then reduced, which makes the lines smooth.
    picture = Image.new("RGB", (1440, 840), "white")
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(26)

    def draw_curve(curve, colour, width):
        points = [to_pixels(epoch, value) for epoch, value in enumerate(curve, start=1)]
        draw.line(points, fill=colour, width=width, joint="curve")

    # The axes: grey lines, numbers and names.
    for value in range(low, high + 1, step):
        x, y = to_pixels(1, value)
        draw.line([(x, y), to_pixels(epochs, value)], fill="#dddddd", width=2)
        draw.text((x - 16, y), str(value), "black", anchor="rm")
    for epoch in range(1, epochs + 1, math.ceil(epochs / 15)):
        x, y = to_pixels(epoch, low)
        draw.text((x, y + 30), str(epoch), "black", anchor="mm")
    corners = [to_pixels(1, high), to_pixels(1, low), to_pixels(epochs, low)]
    draw.line(corners, fill="black", width=2)
    middle = (PLOT_LEFT + PLOT_RIGHT) / 2
    draw.text((middle, PLOT_BOTTOM + 68), "epoch", "black", anchor="mm")
    draw.text((PLOT_LEFT + 16, PLOT_TOP + 16), "Recall@1, %", "black", anchor="lm")

    # The curves, and a legend in the lower right corner.
    for i, (name, group) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        for curve in group:
            draw_curve(curve, colour, width=1)
        draw_curve(np.mean(list(zip(*group)), axis=1), colour, width=6)
        y = PLOT_BOTTOM + 10 - 34 * (len(curves) - i)
        text = f"{name} (n = {len(group)})"
        draw.text((PLOT_RIGHT - 16, y), text, colour, anchor="rm")
    picture.resize((720, 420), Image.Resampling.LANCZOS).save(path, format="png")


# --------------------------------------------------------------------------- comparison

# The metrics of the table, unless others are asked for.
HEADLINE = ("recall@1", "map@r", "nmi")

# Runs whose args.json differ in nothing but these are a group. Each is a circumstance of
# the run and no setting, or is tied to the seed.
CIRCUMSTANCES = (
    "seed", "out", "resume", "device", "workers", "data_root",
    "command", "torch", "commit",
)


def read_run(folder):
    """What a finished run has left in its folder (a Path), as a dictionary.

    Raises whatever comes of a file that is missing or broken; see `read_runs`.
    """
    args = json.loads((folder / "args.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    log = []
    for row in csv.DictReader((folder / "log.csv").read_text().splitlines()):
        log.append({column: float(value) for column, value in row.items()})

    # Data sets of one's own are told apart by the name of their folder.
    dataset = args["dataset"]
    if dataset == "folder":
        dataset = f"folder {Path(args['data_root']).name}"

    # NAME-seed0, NAME/0 or, for a second run, NAME-seed0-2: all are called NAME.
    seed_suffix = rf"[-_/](s(eed)?[-_]?)?{args['seed']}(-\d+)?$"
    name = Path(re.sub(seed_suffix, "", str(folder.absolute()))).name

    settings = {}
    for key, value in args.items():
        if key not in CIRCUMSTANCES and value is not None:
            settings[key] = value

    numbers, curve = {}, []
    for row in log:
        for column, value in row.items():
            numbers[f"{column}@{row['epoch']:.0f}"] = value
        recall = row.get("val_recall@1", row.get("test_recall@1", math.nan))
        curve.append(100 * recall)
    # results.json overwrites: its map@2 is not epoch 2 of a log column `map`.
    numbers.update(log[-1])
    for metric, value in results["last"].items():
        numbers[metric] = float(value)

    return {
        "folder": folder,
        "name": name,
        "seed": args["seed"],
        "command": args["command"],
        "torch": args["torch"],
        "commit": args["commit"],
        "settings": settings,
        # In words; only runs with the same protocol are compared.
        "protocol": (
            f"{dataset}, {args['epochs']} epochs, val_fraction {args['val_fraction']}"
        ),
        # {metric: number}: the last epoch's, and COLUMN@EPOCH of the log.
        "numbers": numbers,
        # Recall@1 by epoch in percent, of the validation classes where there are any.
        "curve": curve,
    }


def number_format(name, values):
    """How a metric is written: factor, unit, format of values, format of deviation."""
    is_gradient_share = name.startswith("grad_share_")
    if is_gradient_share and abs(np.mean(values)) < 1e-3:
        return 1, "", ".2g", ".2g"  # in percent it would lose its digits

    fractions = ("recall@", "map@", "test_recall@", "val_recall@")
    if is_gradient_share or name in ("nmi", "f1") or name.startswith(fractions):
        return 100, " %", ".1f", ".1f"
    return 1, "", ".4g", ".2g"


def without_missing(values):
    """The values that are not nan, and " (n = their number)" where some are missing."""
    known = [value for value in values if not math.isnan(value)]
    remark = f" (n = {len(known)})" if len(known) < len(values) else ""
    return known, remark


def format_metric(name, values):
    """A metric's values over the seeds as "mean ± sample deviation".

    Fractions are in percent. Values that are missing are nan. "-" where all are.
    """
    known, remark = without_missing(values)
    if not known:
        return "-"
    factor, unit, digits, deviation_digits = number_format(name, known)

    text = f"{factor * np.mean(known):{digits}}"
    if len(known) > 1:
        # The standard error of the mean is the sample deviation over sqrt(n).
        deviation = factor * scipy.stats.sem(known) * len(known) ** 0.5
        text += f" ± {deviation:{deviation_digits}}"
    return text + unit + remark


def format_difference(name, differences):
    """A metric's differences, paired by seed, as "mean [low, high]".

    Fractions are in percent. The interval is Student's for 95 %. Differences that are
    missing are nan. "-" for fewer than two.
    """
    known, remark = without_missing(differences)
    if len(known) < 2:
        return "-"
    factor, unit, digits, _ = number_format(name, known)

    mean = factor * np.mean(known)
    standard_error = factor * scipy.stats.sem(known)
    half_width = standard_error * scipy.stats.t.ppf(0.975, len(known) - 1)
    interval = f"[{mean - half_width:+{digits}}, {mean + half_width:+{digits}}]"
    return f"{mean:+{digits}} {interval}{unit}{remark}"


def read_runs(folders, baseline):
    """The finished runs, the baseline first, and why the remaining folders are left out.

    A run that is given twice counts once. Raises UserError if the baseline is not a
    finished run.
    """
    different = {}
    for folder in [baseline, *folders]:
        if folder:
            different[Path(folder).resolve()] = Path(folder)

    runs, left_out = [], []
    for folder in different.values():
        reason = None
        try:
            runs.append(read_run(folder))
        except (FileNotFoundError, NotADirectoryError) as error:
            reason = f"missing or unfinished: no {Path(error.filename).name}"
        except Exception as error:  # a file that somebody changed fails in any way
            reason = (
                "args.json, results.json or log.csv is broken: "
                f"{type(error).__name__}: {error}"
            )
        if reason and baseline and not runs:  # the baseline itself, as it is read first
            raise UserError(
                f"--baseline {baseline} is no finished run ({reason}): give one that is"
            )
        if reason:
            left_out.append(f"{folder} ({reason})")
    return runs, left_out


def choose_protocol(runs, baseline):
    """The runs of one protocol: the baseline's, the first run's, else the commonest.

    Also says why the other runs are left out.
    """
    protocols = [run["protocol"] for run in runs]
    if baseline:
        usual = protocols[0]
    else:
        usual = max(protocols, key=protocols.count, default=None)

    chosen, left_out = [], []
    for run in runs:
        if run["protocol"] == usual:
            chosen.append(run)
        else:
            left_out.append(f"{run['folder']} (unlike: {run['protocol']}; not {usual})")
    return chosen, left_out


def group_runs(runs):
    """The groups: lists of the runs that have the same settings.

    Also says which runs are left out, because their group has a run of the same seed.
    """
    groups, left_out = {}, []
    for run in runs:
        settings = json.dumps(run["settings"], sort_keys=True)
        group = groups.setdefault(settings, {})  # {seed: run}
        seed = run["seed"]
        if seed in group:
            left_out.append(f"{run['folder']} (same seed as {group[seed]['folder']})")
        else:
            group[seed] = run
    return [list(group.values()) for group in groups.values()], left_out


def group_titles(groups):
    """Each group's name, with the settings in which groups of the same name differ."""
    firsts = [group[0] for group in groups]
    titles = []
    for run in firsts:
        title = run["name"]
        settings = run["settings"]
        namesakes = [other["settings"] for other in firsts if other["name"] == title]
        for key in sorted(set().union(*namesakes)):
            if any(other.get(key) != settings.get(key) for other in namesakes):
                title += f" {key}={settings.get(key)}"
        titles.append(title)
    return titles


def check_metrics(metrics, runs):
    """Raise UserError for a metric that no run has, with the names that there are."""
    names = dict.fromkeys(name for run in runs for name in run["numbers"])
    unknown = [name for name in metrics if name not in names]
    if unknown:
        # All but the many COLUMN@EPOCH, where COLUMN is a name itself.
        listed = [name for name in names if name.rpartition("@")[0] not in names]
        raise UserError(
            f"no run has the metric {', '.join(unknown)}: there is {', '.join(listed)} "
            "and log.csv's COLUMN@EPOCH"
        )


def table_rows(groups, titles, metrics, baseline):
    """The rows of the comparison's table, each a list of texts.

    With a baseline, whose group is the first, the last column shows the differences to
    that group in the first metric, paired by seed.
    """
    header = ["", "n", *metrics]
    if baseline:
        header.append(f"{metrics[0]} minus {titles[0]} [95 %]")
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]

    for title, group in zip(titles, groups):
        row = [title, str(len(group))]
        for metric in metrics:
            values = [run["numbers"].get(metric, math.nan) for run in group]
            row.append(format_metric(metric, values))
        rows.append(row)

        if baseline:
            by_seed = {}
            for run in group:
                by_seed[run["seed"]] = run["numbers"].get(metrics[0], math.nan)
            if group is groups[0]:
                base = by_seed
                row.append("-")
            else:
                differences = []
                for seed, value in by_seed.items():
                    differences.append(value - base.get(seed, math.nan))
                row.append(format_difference(metrics[0], differences))
    return rows


def compare(folders, baseline=None, metrics=HEADLINE, curves=None):
    """Compare finished runs over their seeds. Returns Markdown.

    First the commands, then a table with a row for each group of runs that differ by
    seed alone, at last what was left out. `metrics` are names in the `numbers` of
    `read_run`. `baseline`, any run of a group, makes that group the first row, to which
    the others' differences in the first metric are shown, paired by seed. `curves` is a
    file for `save_curves`. Raises UserError if the baseline is not a finished run, if
    no run has a metric, or if no run is left.
    """
    runs, unreadable = read_runs(folders, baseline)
    runs, unlike = choose_protocol(runs, baseline)
    groups, doubled = group_runs(runs)
    left_out = unreadable + unlike + doubled
    if not groups:
        raise UserError(f"no finished run to compare: {'; '.join(left_out)}")

    runs = [run for group in groups for run in group]
    check_metrics(metrics, runs)
    titles = group_titles(groups)

    if curves:
        curves_of = {}
        for title, group in zip(titles, groups):
            curves_of[title] = [run["curve"] for run in group]
        with data.clear_errors(f"writing {curves}", "give another file with --curves"):
            save_curves(curves, curves_of)

    lines = []
    for title, group in zip(titles, groups):
        seeds = ", ".join(str(run["seed"]) for run in group)
        # One command for all seeds, with N for the number.
        command = re.sub(r"(seed[ =-]?)\d+", r"\1N", group[0]["command"])
        lines.append(f"- {title}, seed {seeds}: `{command}`")
    for key in ("torch", "commit"):
        versions = dict.fromkeys(run[key] for run in runs)
        lines.append(f"- {key}: {', '.join(versions)}")
    lines.append("")
    for row in table_rows(groups, titles, metrics, baseline):
        lines.append(f"| {' | '.join(row)} |")
    if left_out:
        lines.append("")
        for reason in left_out:
            lines.append(f"- left out: {reason}")
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
    add("--retrieval", choices=("cosine", "elk"),
        help="elk: also measure Recall@k by the expected likelihood kernel of the "
             "images' von Mises-Fisher distributions (default: cosine)")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--workers", type=common.not_negative(int),
        help="number of processes that load images (default: as in the run)")
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
    return parser


def check_contradictions(parser, options):
    """Stop with a usage error where options contradict each other."""
    needed_by = {
        "checkpoint": ("data_root", "pictures", "retrieval", "embeddings"),
        "embeddings": ("images",),
        "compare": ("baseline", "metrics", "out", "curves"),
    }
    for needed, names in needed_by.items():
        given_flags = [f"--{name}" for name in names if getattr(options, name)]
        if given_flags and not getattr(options, needed):
            parser.error(f"{', '.join(given_flags)} without --{needed}")

    if options.images and (options.pictures or options.retrieval or options.data_root):
        parser.error(
            "--images is not the data set: "
            "leave --data_root, --pictures and --retrieval out"
        )


def write_comparison(options):
    """What --compare does: print the table and write the files that are asked for."""
    import common

    metrics = options.metrics or HEADLINE
    text = compare(options.compare, options.baseline, metrics, options.curves)
    print(text)
    if options.out:
        common.save_file(options.out, text)
        print(f"{options.out} written")
    if options.curves:
        print(f"{options.curves} written")


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
        _, _, split = data.load_splits(args)
    network = common.build_network(args, checkpoint, device)
    return args, split, common.embed(network, split, args, device)


def save_embeddings(path, embeddings, split):
    """Write an .npz file of embeddings, labels, class_names, paths and norms.

    An image of the toy data has no path; its number stands there instead.
    """
    import common

    paths = []
    for i, image in enumerate(split.images):
        paths.append(str(i) if isinstance(image, np.ndarray) else str(image))
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

    save_retrieval(folder / "retrieval.png", load_image, embeddings, split.labels)
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
    if options.retrieval == "elk":
        recall = recall_at_k(embeddings, split.labels, ks, expected_likelihood)
        for k, value in recall.items():
            metrics[f"recall@{k} elk"] = value

    file = Path(options.checkpoint)
    folder = file.parent
    print(common.table({file.name: metrics}))
    common.save_file(folder / "metrics.json", json.dumps(metrics, indent=1))
    rows = [{"rejected": rejected, "error": error} for rejected, error in curve]
    common.save_file(folder / "rejection.csv", common.csv_text(rows))
    if options.pictures:
        save_pictures(folder, embeddings, split, args)
    print(f"numbers: {folder / 'metrics.json'}, {folder / 'rejection.csv'}")


if __name__ == "__main__":
    import common

    common.command(main)
