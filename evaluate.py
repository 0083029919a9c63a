"""How good are the embeddings? Retrieval and clustering metrics, the structure of the embedding space, pictures.

In reading order: retrieval, clustering, structure, uncertainty (what the norm knows), pictures, the comparison of
finished runs over their seeds. Everything is exact, needs no pairwise matrix in memory at once (Stanford Online
Products' 60,502 test images fit beside 2 GiB), and runs where the embeddings are.

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


def check(embeddings, labels=None, pairs=False, ks=()):
    """(embeddings in float32 or float64 without gradient, labels renumbered 0 .. C-1), or a UserError, with `pairs` also
    where no class has two images; `ks` are for Recall@k or mAP@k."""
    if any(not isinstance(k, int) or k < 1 for k in ks):
        raise UserError(f"k = {list(ks)} cannot be evaluated: give positive whole numbers")
    if embeddings.dim() != 2 or embeddings.shape[0] < 2 or embeddings.shape[1] < 1:
        raise UserError(f"embeddings of shape {tuple(embeddings.shape)} cannot be evaluated: give (N, D) with N >= 2")
    if bad := int((~embeddings.isfinite()).any(1).sum()):
        raise UserError(f"{bad} of {len(embeddings)} embeddings hold NaN or infinity: diverged, try a smaller learning rate")
    embeddings = embeddings.detach().to(torch.promote_types(embeddings.dtype, torch.float32))
    if labels is None:
        return embeddings
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        raise UserError(f"{len(embeddings)} embeddings need as many integer labels, not {labels.dtype} {tuple(labels.shape)}")
    labels = labels.to(embeddings.device).unique(return_inverse=True)[1]
    if pairs and labels.bincount().max() < 2:
        raise UserError("no class has two images, so there is nothing to compare: evaluate on other data")
    return embeddings, labels


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
        warnings.warn(f"{len(labels) - len(queries)} of {len(labels)} images are alone in their class: no queries")
    # By class: M is the largest class of the chunk, not of the data set. A kernel needs room for its intermediate steps.
    chunks = queries.split(max(1, CHUNK // len(labels) // (8 if similarity else 1)))
    if similarity is None:
        embeddings, similarity = F.normalize(embeddings, dim=1), lambda queries, others: queries @ others.T
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
    ahead = []
    for relatives, strangers in comparisons(*check(embeddings, labels, True, ks), "recall: queries", similarity):
        closest = relatives[:, :1]
        strangers.ge_(closest - TIE * closest.abs().clamp(min=1))    # ones and zeros in floats: adding those up is ten
        ahead.append(strangers.sum(1))                               # times faster than adding booleans
    ahead = torch.cat(ahead)
    return {k: (ahead < k).double().mean().item() for k in ks}


def mean_average_precisions(embeddings, labels, ks):
    """A list of mAP@k, one for each k of `ks`, in a single pass; k = None stands for R, the query's own number."""
    totals, queries, numbers = [0.0] * len(ks), 0, [k for k in ks if k is not None]
    for relatives, strangers in comparisons(*check(embeddings, labels, True, numbers), "mAP: queries"):
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
        own = slice(start, start + size)
        energy = torch.addmm(square[start:], x[own], x[start:].T, alpha=-2).add_(square[own, None]).clamp_(min=0).mul_(-2)
        energy[:, :len(energy)] += torch.full([len(energy)] * 2, -math.inf, device=x.device).tril()  # (B, N - start): i < j
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


# ------------------------------------------------------------------------------------------------------- pictures

RIGHT, WRONG, NEUTRAL, LOW, HIGH = (0.1, 0.7, 0.2), (0.85, 0.1, 0.1), (0.6,) * 3, (0.8,) * 3, (0.2,) * 3
BORDER = 4


def framed(image, colour):
    """A picture (3, H, W) in [0, 1] with a border, its shorter side brought to 64 .. 112 pixels."""
    side = min(image.shape[1:])
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
    possible = (labels.bincount()[labels] > 1).nonzero().flatten()
    queries = possible[torch.randperm(len(possible), generator=torch.Generator().manual_seed(seed))[:num_queries]]
    embeddings = F.normalize(embeddings, dim=1)
    cosine = (embeddings[queries] @ embeddings.T).scatter_(1, queries.unsqueeze(1), -math.inf)     # not itself
    nearest = cosine.topk(min(neighbours, len(labels) - 1)).indices                                # (Q, neighbours)
    tiles = []
    for query, found in zip(queries.tolist(), nearest.tolist()):
        tiles.append(framed(image(query), NEUTRAL))
        tiles += [framed(image(i), RIGHT if labels[i] == labels[query] else WRONG) for i in found]
    save_image(make_grid(tiles, nrow=1 + nearest.shape[1], pad_value=1), path)


def save_norm_extremes(path, image, embeddings, labels, classes=8, each=3):
    """A picture file: each row a class, its `each` images of lowest norm (light border), then of highest (dark).

    Takes the un-normalised (N, D) embeddings, and `image` as in `save_retrieval`. The classes are evenly spaced among
    those with enough images; UserError if all classes have one image.
    """
    embeddings, labels = check(embeddings, labels, pairs=True)
    counts, norms = labels.bincount(), embeddings.norm(dim=1)
    each = min(each, int(counts.max()) // 2)
    shown, tiles = (counts >= 2 * each).nonzero().flatten(), []
    for c in shown[torch.arange(min(classes, len(shown))) * len(shown) // min(classes, len(shown))]:
        members = (labels == c).nonzero().flatten()
        members = members[norms[members].argsort()].tolist()
        tiles += [framed(image(m), LOW) for m in members[:each]] + [framed(image(m), HIGH) for m in members[-each:]]
    save_image(make_grid(tiles, nrow=2 * each, pad_value=1), path)


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def save_curves(path, curves):
    """A PNG file of {group: [a list of percentages by epoch for each seed]}: a colour per group, a thin line per seed, a
    thick one for the mean over the epochs that all have. Groups beyond the tenth take the first colours again."""
    values = [value for runs in curves.values() for run in runs for value in run]
    epochs, step = max(len(run) for runs in curves.values() for run in runs), math.ceil((max(values) - min(values)) / 8) or 1
    low, high = (step * int(value // step) for value in (min(values), max(values) + step))
    picture, (left, top, right, bottom) = Image.new("RGB", (1440, 840), "white"), (124, 28, 1412, 752)
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(26)

    def at(epoch, value):                          # epochs from 1, in pixels
        return (left + (right - left) * (epoch - 1) / max(1, epochs - 1),
                bottom - (bottom - top) * (value - low) / (high - low))
    for value in range(low, high + 1, step):
        draw.line([at(1, value), at(epochs, value)], fill="#dddddd", width=2)
        draw.text((left - 16, at(1, value)[1]), str(value), "black", anchor="rm")
    for epoch in range(1, epochs + 1, math.ceil(epochs / 15)):
        draw.text((at(epoch, low)[0], bottom + 30), str(epoch), "black", anchor="mm")
    draw.line([at(1, high), at(1, low), at(epochs, low)], fill="black", width=2)
    draw.text(((left + right) / 2, bottom + 68), "epoch", "black", anchor="mm")
    draw.text((left + 16, top + 16), "Recall@1, %", "black", anchor="lm")
    for i, (name, runs) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        for run, thickness in (*((run, 1) for run in runs), (np.mean([*zip(*runs)], axis=1), 6)):
            points = [at(epoch, value) for epoch, value in enumerate(run, start=1)]
            draw.line(points, fill=colour, width=thickness, joint="curve")
        draw.text((right - 16, bottom + 10 - 34 * (len(curves) - i)), f"{name} (n = {len(runs)})", colour, anchor="rm")
    picture.resize((720, 420), Image.Resampling.LANCZOS).save(path, format="png")             # drawn twice as large: smooth


# ----------------------------------------------------------------------------------------------------- comparison

HEADLINE = ("recall@1", "map@r", "nmi")
# Runs are grouped by all of args.json but these, which do not change what is computed or are the repetition itself.
CIRCUMSTANCES = ("seed", "out", "resume", "device", "workers", "data_root", "command", "torch", "commit")


def read_run(folder):
    """A finished run as a dictionary, or a UserError that says why it is none. `name` is the folder's without the seed, as in
    NAME-seed0, NAME-seed0-2, NAME/0. `numbers` are results.json's of the last epoch, log.csv's last row, and all its rows
    as COLUMN@EPOCH; of equal names the first counts: recall@1 and test_recall@1 are whole names."""
    try:
        args, results = (json.loads((folder / file).read_text()) for file in ("args.json", "results.json"))
        log = [{column: float(value) for column, value in row.items()}
               for row in csv.DictReader((folder / "log.csv").read_text().splitlines())]
        # One's own photographs are told apart by their folder's name.
        dataset = args["dataset"] if args["dataset"] != "folder" else f"folder {Path(args['data_root']).name}"
        name = Path(re.sub(rf"[-_/](s(eed)?[-_]?)?{args['seed']}(-\d+)?$", "", str(folder.absolute()))).name
        return {"folder": folder, "name": name, **{key: args[key] for key in ("seed", "command", "torch", "commit")},
                "settings": {key: value for key, value in args.items() if key not in CIRCUMSTANCES and value is not None},
                "kind": f"{dataset}, {args['epochs']} epochs, val_fraction {args['val_fraction']}",
                "numbers": {**{f"{column}@{row['epoch']:.0f}": row[column] for row in log for column in row}, **log[-1],
                            **{metric: float(value) for metric, value in results["last"].items()}},
                "curve": [100 * row.get("val_recall@1", row.get("test_recall@1", math.nan)) for row in log]}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"missing or unfinished: no {Path(error.filename).name}") from None
    except Exception as error:                     # whatever becomes of files that somebody has changed
        raise UserError(f"args.json, results.json or log.csv is broken: {type(error).__name__}: {error}") from None


def spread(name, values, paired=False):
    """Text "mean ± sample deviation" of a metric's values, or "mean [low, high]" of paired differences, Student's 95 %
    interval; fractions in percent. A value that is missing is nan; then the number of the others is told, too."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 1 + paired:
        return "-"
    tiny = name.startswith("grad_share_") and abs(np.mean(known)) < 1e-3                      # which needs its digits
    fraction = name in ("nmi", "f1") or name.startswith(("recall@", "map@", "test_recall@", "val_recall@", "grad_share_"))
    factor, digits, few = (1, ".2g", ".2g") if tiny else (100, ".1f", ".1f") if fraction else (1, ".4g", ".2g")
    mean, text = factor * np.mean(known), ""
    if len(known) > 1:
        error = factor * scipy.stats.sem(known)
        half = error * scipy.stats.t.ppf(0.975, len(known) - 1)
        text = f" [{mean - half:+{digits}}, {mean + half:+{digits}}]" if paired else f" ± {error * len(known) ** 0.5:{few}}"
    return f"{mean:{'+' * paired}{digits}}{text}" + " %" * (factor == 100) + f" (n = {len(known)})" * (len(known) < len(values))


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
    left_out += [f"{run['folder']} (unlike: {run['kind']}; not {usual})" for run in runs if run["kind"] != usual]
    for run in (run for run in runs if run["kind"] == usual):
        known = groups.setdefault(json.dumps(run["settings"], sort_keys=True), {}).setdefault(run["seed"], run)
        if known is not run:
            left_out.append(f"{run['folder']} (same seed as {known['folder']})")
    runs = [run for group in groups.values() for run in group.values()]
    if not runs:
        raise UserError(f"no finished run to compare: {'; '.join(left_out)}")
    there = {name: name.rpartition("@")[0] for run in runs for name in run["numbers"]}
    if unknown := [name for name in metrics if name not in there]:
        raise UserError(f"no run has the metric {', '.join(unknown)}: there is " + ", ".join(
            name for name, column in there.items() if column not in there) + " and log.csv's COLUMN@EPOCH")

    firsts = [next(iter(group.values())) for group in groups.values()]

    def title(run):                                # with the settings in which groups of one name differ
        rivals, own = [first["settings"] for first in firsts if first["name"] == run["name"]], run["settings"]
        differ = [key for key in sorted(set().union(*rivals)) if any(rival.get(key) != own.get(key) for rival in rivals)]
        return " ".join([run["name"], *(f"{key}={own.get(key)}" for key in differ)])
    titles, groups = [title(run) for run in firsts], list(groups.values())
    if curves:
        with data.clear_errors(f"writing {curves}", "give another file with --curves"):
            save_curves(curves, {name: [run["curve"] for run in group.values()] for name, group in zip(titles, groups)})
    lines, base = [], {seed: run["numbers"].get(metrics[0], math.nan) for seed, run in groups[0].items()}
    rows = [["", "n", *metrics, *([f"{metrics[0]} minus {titles[0]} [95 %]"] if baseline else [])]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for name, group, run in zip(titles, groups, firsts):
        command = re.sub(r"(seed[ =-]?)\d+", r"\1N", run["command"])
        lines.append(f"- {name}, seed {', '.join(map(str, group))}: `{command}`")
        values = [[run["numbers"].get(key, math.nan) for run in group.values()] for key in metrics]
        rows.append([name, str(len(group)), *map(spread, metrics, values)])
        if baseline:
            pairs = [value - base.get(seed, math.nan) for seed, value in zip(group, values[0])]
            rows[-1].append("-" if group is groups[0] else spread(metrics[0], pairs, paired=True))
    for key in ("torch", "commit"):
        lines.append(f"- {key}: {', '.join(dict.fromkeys(run[key] for run in runs))}")
    lines += ["", *(f"| {' | '.join(row)} |" for row in rows), *([""] if left_out else [])]
    return "\n".join(lines + [f"- left out: {reason}" for reason in left_out]) + "\n"


# ----------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    import common                                  # here, not above: common's training loop uses this file's metrics
    p = argparse.ArgumentParser(None, "%(prog)s (--checkpoint FILE | --compare RUN ...) [options]", __doc__.split("\n\n")[0])
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="best.pt or last.pt of a run; its settings are used")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="folders of finished runs: a table over their seeds")
    add = p.add_argument
    add("--data_root", help="where the data set is now (default: where it was)")
    add("--pictures", action="store_true", help="write retrieval.png and norms.png beside the checkpoint")
    add("--retrieval", choices=("cosine", "elk"), help="elk: also Recall@k by the ELK of the images' vMFs (default: cosine)")
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
    for mode, options in (("checkpoint", ("data_root", "pictures", "retrieval", "embeddings")), ("embeddings", ("images",)),
                          ("compare", ("baseline", "metrics", "out", "curves"))):
        if alone := [f"--{option}" for option in options if getattr(given, option) and not getattr(given, mode)]:
            p.error(f"{', '.join(alone)} without --{mode}")
    if given.images and (given.pictures or given.retrieval or given.data_root):
        p.error("--images is not the data set: leave --data_root, --pictures and --retrieval out")
    if given.compare:
        text = compare(given.compare, given.baseline, given.metrics or HEADLINE, given.curves)
        print(text)
        if given.out:
            common.save_file(given.out, text)
        for file in filter(None, (given.out, given.curves)):
            print(f"{file} written")
        return
    checkpoint = common.load_checkpoint(given.checkpoint, "--checkpoint")
    changed = {key: value for key, value in vars(given).items() if value is not None}
    args = argparse.Namespace(**{**checkpoint["args"], **changed})
    device, folder = common.make_device(args.device), Path(given.checkpoint).parent
    test = data.load_pictures(given.images) if given.images else data.load_splits(args)[2]
    embeddings = common.embed(common.build_network(args, checkpoint, device), test, args, device)
    if given.embeddings:
        paths = [str(i if isinstance(image, np.ndarray) else image) for i, image in enumerate(test.images)]
        arrays = {"embeddings": embeddings.float().cpu().numpy(), "labels": test.labels.numpy(), "paths": np.array(paths),
                  "class_names": np.array(test.class_names), "norms": embeddings.float().norm(dim=1).cpu().numpy()}
        common.save_file(given.embeddings, lambda file: np.savez(file, **arrays))
        print(f"embeddings of {len(paths)} images written to {given.embeddings}")
    if given.images:
        return
    ks = data.usual_ks(args.dataset)
    certainty, curve = uncertainty(embeddings, test.labels, test.ambiguity)
    metrics = {"epoch": checkpoint["epoch"], **all_metrics(embeddings, test.labels, ks), **certainty}
    if given.retrieval == "elk":
        import prob_dml
        elk = recall_at_k(embeddings, test.labels, ks, lambda queries, others: prob_dml.product_kernel(
            queries, others, others.norm(dim=1, keepdim=True), 1, "exact", None))
        metrics.update({f"recall@{k} elk": value for k, value in elk.items()})
    print(common.table({Path(given.checkpoint).name: metrics}))
    common.save_file(folder / "metrics.json", json.dumps(metrics, indent=1))
    common.save_file(folder / "rejection.csv", common.csv_text([{"rejected": part, "error": error} for part, error in curve]))
    if given.pictures:
        shown = data.Images(test, data.test_transform(args.image_size, args.augment))
        for name, save in (("retrieval.png", save_retrieval), ("norms.png", save_norm_extremes)):
            save(folder / name, lambda i: shown[i][0] / 255, embeddings, test.labels)           # as the network sees them
        print(f"pictures: {folder / 'retrieval.png'} (query, then its nearest; green right, red wrong), "
              f"{folder / 'norms.png'} (a class a row: lowest norms, then, with a dark border, highest)")
    print(f"numbers: {folder / 'metrics.json'}, {folder / 'rejection.csv'}")


if __name__ == "__main__":
    import common
    common.command(main)
