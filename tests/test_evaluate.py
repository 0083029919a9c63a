"""Metrics agree with slow references; pictures, embeddings, the comparison of runs."""
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.spatial
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import error_of, make_photos, parametrize, read_checkpoint, read_json, refused, seeded
from PIL import Image, ImageColor, ImageDraw
from pytest import approx
from scipy.spatial.distance import pdist
from torch.testing import assert_close
from torchvision.transforms.functional import to_tensor

import common
import data
import evaluate
from evaluate import (
    all_metrics,
    clustering,
    concentration_variance,
    density,
    k_means,
    map_at_r,
    mean_average_precision,
    partition_scores,
    recall_at_k,
    spectral_decay,
    uncertainty,
    uniformity,
)

ignore_single_images = pytest.mark.filterwarnings("ignore:.*alone in their class")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def on_a_circle(*degrees):
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


# ---------------------------------------------------------------------------- retrieval

# Number of images, classes and dimensions, and the spread of the embeddings.
CASES = [(60, 6, 3, 0.7), (80, 5, 4, 1), (40, 30, 3, 0.7), (50, 2, 6, 2), (7, 2, 2, 1)]


def quantised(num_images, num_classes, dim, spread):
    """Embeddings of small integers: many cosines are equal, some vectors zero or copies."""
    labels = (num_classes * randn(num_images, seed=1).sigmoid()).long()
    return (spread * randn(num_images, dim)).round(), labels


def reference_positions(x, labels, tie=1e-9):
    """The positions of each query's positives; a negative `tie` decides ties in its favour."""
    x = F.normalize(x, dim=1)
    positions = []
    for q in range(len(x)):
        cosine = x @ x[q]
        positive = labels == labels[q]
        negatives = cosine[~positive]
        positive[q] = False
        positives = sorted(cosine[positive].tolist(), reverse=True)
        ahead = [int((negatives >= p - tie).sum()) for p in positives]
        if positives:
            positions.append([j + n for j, n in enumerate(ahead, start=1)])
    return positions


def reference_recall(positions, k):
    return np.mean([query[0] <= k for query in positions])


def reference_map(positions, k=None):
    average_precisions = []
    for query in positions:
        limit = k or len(query)
        precisions = [j / p for j, p in enumerate(query, start=1) if p <= limit]
        average_precisions.append(sum(precisions) / min(len(query), limit))
    return np.mean(average_precisions)


@parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@parametrize("case", CASES)
@ignore_single_images
def test_retrieval_agrees_with_a_slow_reference_on_data_full_of_ties(case, dtype):
    x, labels = quantised(*case)
    positions = reference_positions(x, labels)
    x = x.to(dtype)
    ks = (1, 2, 4, 8, 1000)
    expected = {k: reference_recall(positions, k) for k in ks}
    assert recall_at_k(x, labels, ks) == approx(expected, abs=1e-12)
    for k in (1, 3, 10, 1000):
        expected = approx(reference_map(positions, k), abs=1e-6)
        assert mean_average_precision(x, labels, k) == expected
    expected = approx(reference_map(positions), abs=1e-6)
    assert map_at_r(x, labels) == expected


@parametrize("scale", [1e-30, 1e-13, 1e13])
def test_retrieval_does_not_depend_on_the_scale(scale):
    x, y = torch.randn(60, 4, generator=seeded()), torch.arange(60) % 6
    assert recall_at_k(scale * x, y, [1, 2]) == recall_at_k(x, y, [1, 2])
    assert map_at_r(scale * x, y) == approx(map_at_r(x, y))


def test_the_ties_of_that_data_change_the_result():
    case = quantised(*CASES[0])
    pessimist = reference_recall(reference_positions(*case), 1)
    optimist = reference_recall(reference_positions(*case, tie=-1e-9), 1)
    assert optimist > pessimist + 0.1


def test_retrieval_of_five_images_by_hand():
    # The positives are at positions 1, 3 (from 0 and 10 degrees), 2, 3 (from 40), 4 (from 25:
    # 10 and 40 are as near, then 0) and 2 (from 91).
    images = on_a_circle(0, 10, 40, 25, 91), torch.tensor([0, 0, 0, 1, 1])
    for ks in ((1, 2, 3, 4), np.arange(1, 5)):
        assert recall_at_k(*images, ks) == {1: 0.4, 2: 0.8, 3: 0.8, 4: 1.0}
    everything = np.mean([5 / 6, 5 / 6, 7 / 12, 1 / 4, 1 / 2])
    assert mean_average_precision(*images) == approx(everything)
    first_two = np.mean([1 / 2, 1 / 2, 1 / 4, 0, 1 / 2])
    assert mean_average_precision(*images, k=2) == approx(first_two)
    first_R = np.mean([1 / 2, 1 / 2, 1 / 4, 0, 0])
    assert map_at_r(*images) == approx(first_R)


@parametrize("negatives, expected", [(999, 1 / 1000), (1000, 0)])
@ignore_single_images
def test_map_at_1000_ends_at_position_1000(negatives, expected):
    # The only positive is behind all negatives.
    x = on_a_circle(0, 120, *np.linspace(55, 65, negatives))
    labels = torch.arange(len(x)).sub(1).clamp(min=0)
    assert mean_average_precision(x, labels) == approx(expected, abs=1e-9)
    metrics = all_metrics(x, labels, ks=[1000])
    assert metrics["map@1000"] == approx(expected, abs=1e-9)
    assert metrics["recall@1000"] == (expected > 0)


def test_retrieval_depends_on_directions_and_classes_alone():
    x, labels = randn(60, 5), torch.arange(60) % 6
    order = randn(60, seed=1).argsort()
    norms = 50 * randn(60, 1, seed=2).abs() + 1
    same = (norms * x)[order], 1000 - 7 * labels[order]
    recall = recall_at_k(x, labels, (1, 4))
    assert recall_at_k(*same, (1, 4)) == approx(recall)
    assert map_at_r(*same) == approx(map_at_r(x, labels))


def test_images_alone_in_their_class_are_negatives_but_no_queries():
    # The lone image, at 5 degrees, lies between the two of class 0.
    x, labels = on_a_circle(0, 10, 60, 70, 5), torch.tensor([0, 0, 1, 1, 2])
    with pytest.warns(UserWarning, match="1 of 5 images are alone"):
        assert recall_at_k(x, labels, (1, 2)) == {1: 0.5, 2: 1.0}
    with pytest.warns(UserWarning, match="1 of 5 images are alone"):
        assert mean_average_precision(x, labels) == approx(0.75)
    with warnings.catch_warnings(action="error"):
        assert recall_at_k(x[:4], labels[:4], [1]) == {1: 1.0}


@parametrize("dim", [2, 512, 2048])
@parametrize("value", [0.0, 0.37, 1e-3])
def test_a_collapsed_network_retrieves_nothing_and_its_metrics_are_finite(dim, value):
    x = value * torch.linspace(0.3, 1.7, dim).repeat(203, 1)
    metrics = all_metrics(x, torch.arange(203) % 7)
    assert all(math.isfinite(number) for number in metrics.values())
    for name in ("recall@1", "recall@2", "recall@4", "recall@8", "map@r", "nmi"):
        assert metrics[name] == 0
    assert metrics["uniformity"] == approx(0, abs=1e-6)
    assert metrics["density"] >= 0


def test_rounding_errors_do_not_rescue_a_collapsed_network():
    x, labels = 1 + 1e-7 * randn(200, 64).float(), torch.arange(200) % 5
    assert recall_at_k(x, labels, [1, 8]) == {1: 0, 8: 0}
    assert map_at_r(x, labels) == 0


@parametrize("float64_images, apart, hit", [
    (3, 2e-13, 0), (3, 5e-12, 1), (2, 2e-7, 0), (2, 5e-6, 1),
])
def test_cosines_closer_than_1e_12_tie_and_beyond_the_images_of_float64_than_1e_6(
        monkeypatch, float64_images, apart, hit):
    # The first query's positive is at cosine 0.6, its negative that much farther. The second
    # query's positive is nearer by far.
    monkeypatch.setattr(evaluate, "FLOAT64_IMAGES", float64_images)
    s = 0.6 - apart
    x = np.array([[1, 0, 0], [0.6, 0.8, 0], [s, 0, math.sqrt(1 - s**2)]])
    x = x if float64_images == 3 else x.astype(np.float32)
    with pytest.warns(UserWarning, match="alone"):
        recall = recall_at_k(x, torch.tensor([0, 0, 1]), [1])
    assert recall == {1: (hit + 1) / 2}


@parametrize("images, dtype", [(16_384, torch.float64), (16_385, torch.float32)])
def test_cosines_are_in_float64_for_up_to_16384_images(images, dtype):
    assert evaluate.unit_vectors(torch.ones(images, 2)).dtype == dtype


@parametrize("dtype", [torch.float32, torch.float64])
def test_close_neighbours_on_a_circle_are_told_apart(dtype):
    x = on_a_circle(0, 0.01, 0.06, 60, 60.01, 60.06).to(dtype)
    labels = torch.tensor([0, 0, 1, 2, 2, 1])
    metrics = all_metrics(1e3 * x, labels)
    assert metrics["recall@1"] == metrics["map@r"] == approx(2 / 3)
    _, curve = uncertainty(x, labels)
    assert curve[0] == (0, approx(1 / 3))


@parametrize("dim", [2, 3])
def test_nearest_neighbours_of_thousands_in_few_dimensions_are_those_of_a_tree(dim):
    labels = torch.arange(4000) % 40
    x = (randn(40, dim)[labels] + 0.2 * randn(4000, dim, seed=1)).float()
    unit = F.normalize(x.double(), dim=1)
    _, nearest = scipy.spatial.cKDTree(unit).query(unit, k=2)
    right = (labels[nearest[:, 1]] == labels).double().mean().item()
    assert 0.2 < right < 0.9
    assert recall_at_k(x, labels, [1])[1] == approx(right, abs=1e-3)
    assert uncertainty(x, labels)[1][0][1] == approx(1 - right, abs=1e-3)


@parametrize("dtype, rows", [(torch.float32, 5), (torch.float64, 2)])
def test_a_chunk_of_cosines_has_the_same_bytes_in_either_precision(monkeypatch, dtype, rows):
    monkeypatch.setattr(evaluate, "CHUNK", 50)
    chunks = evaluate.chunked(torch.arange(10), torch.zeros(10, 3, dtype=dtype))
    assert len(chunks[0]) == rows


@parametrize("chunk", [1, 100, 61 * 7, 61 * 60, 61 * 61])
def test_chunk_boundaries_do_not_matter(monkeypatch, chunk):
    x, labels = randn(61, 4), torch.arange(61) ** 2 % 7 - 5
    metrics, judged = all_metrics(x, labels), uncertainty(x, labels)
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    assert all_metrics(x, labels) == approx(metrics, rel=1e-12)
    assert uncertainty(x, labels) == judged


# --------------------------------------------------------------------------- clustering


@parametrize("seed", range(3))
def test_nmi_and_f1_agree_with_scipy_and_with_counting_pairs(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 90) * 4 - 3
    clusters = np.where(rng.random(90) < 0.6, labels + 50, rng.integers(0, 9, 90))
    scores = partition_scores(torch.tensor(clusters), torch.tensor(labels))

    joint = scipy.stats.contingency.crosstab(clusters, labels).count
    independent = np.outer(joint.sum(1), joint.sum(0))
    information = scipy.stats.entropy(joint.ravel(), independent.ravel())
    entropies = scipy.stats.entropy(joint.sum(1)) + scipy.stats.entropy(joint.sum(0))
    assert scores["nmi"] == approx(2 * information / entropies, abs=1e-10)

    i, j = np.triu_indices(90, 1)
    in_cluster, in_class = clusters[i] == clusters[j], labels[i] == labels[j]
    right = (in_cluster & in_class).sum()
    f1 = scipy.stats.hmean([right / in_cluster.sum(), right / in_class.sum()])
    assert scores["f1"] == approx(f1, abs=1e-10)


def test_nmi_and_f1_of_extreme_partitions():
    three, one, alone = torch.arange(12) % 3, torch.zeros(12).long(), torch.arange(12)
    nmi = 2 * math.log(3) / (math.log(12) + math.log(3))  # I = H(labels) = log 3
    f1 = 2 * 18 / (66 + 18)  # precision 18 / 66, recall 1
    for clusters, labels, expected in (
        (7 - three, three, {"nmi": 1, "f1": 1}),
        (one, three, {"nmi": 0, "f1": f1}),
        (alone, three, {"nmi": nmi, "f1": 0}),
        (one, one + 1, {"nmi": 1, "f1": 1}),
        (alone, 9 - alone, {"nmi": 1, "f1": 1}),
    ):
        scores = partition_scores(clusters, labels)
        assert scores == approx(expected, abs=1e-12)


def test_the_contingency_table_of_many_classes_stays_sparse():
    labels = torch.arange(60_000) % 30_000  # a dense table would hold 9e8 cells
    scores = partition_scores(labels.flip(0), labels)
    assert scores == approx({"nmi": 1, "f1": 1})


@parametrize("seed", range(5))
def test_separated_blobs_are_clustered_perfectly_far_from_the_origin(seed):
    labels = torch.arange(160) % 20
    x = 1e5 + 10 * randn(20, 16)[labels] + 0.01 * randn(160, 16, seed=1)
    scores = clustering(x.float(), labels, seed)
    assert scores == approx({"nmi": 1, "f1": 1})


def test_k_means_ends_at_a_fixed_point_that_its_seed_decides():
    x, labels = randn(1500, 2), torch.arange(1500) % 12
    clusters = [k_means(x, 12, seed) for seed in range(4)]
    for seed, found in enumerate(clusters):
        centres = torch.stack([x[found == c].mean(0) for c in range(12)])
        assert torch.equal(torch.cdist(x, centres).argmin(1), found)
        scores = partition_scores(found, labels)
        assert clustering(x, labels, seed) == scores
    assert partition_scores(*clusters[:2])["nmi"] < 0.999


def test_k_means_plus_plus_draws_by_squared_distance():
    # The points 1 and 3 are together if 0 and 1 are drawn, in either order: with probability
    # (1 / 10 + 1 / 5) / 3 = 0.1. (By distance 0.19.)
    points = torch.tensor([[0.0], [1.0], [3.0]])
    together = 0
    for seed in range(1000):
        clusters = k_means(points, 2, seed, iterations=1)
        together += int(clusters[1] == clusters[2])
    assert 70 < together < 130  # 100 and three standard deviations


def test_an_empty_cluster_begins_anew_at_the_point_farthest_from_its_centre(monkeypatch):
    # Both centres are drawn at (4, 0), so that one of them wins no point.
    monkeypatch.setattr(torch, "searchsorted", lambda *_, **__: torch.tensor([0]))
    points = torch.tensor([[4.0, 0], [-6, 0], [0, 31], [0, -30]])
    clusters = k_means(points, 2, iterations=2)
    assert (clusters == clusters[2]).tolist() == [False, False, True, False]


def test_fewer_different_points_than_classes_are_clustered():
    x = torch.tensor([[0.0], [1.0]]).repeat(10, 1)
    scores = clustering(x, torch.arange(20) % 10)
    assert all(0 <= value <= 1 for value in scores.values())


# --------------------------------------------------------------- structure of the space


@parametrize("scale, offset", [(0.1, 5), (1, 5), (40, 5), (0.3, 1000)])
def test_uniformity_agrees_with_all_pairs_at_any_scale_and_offset(scale, offset):
    # At scale 40 the exponentials underflow.
    x = (scale * randn(40, 6) + offset).float()
    energies = -2 * pdist(x.double(), "sqeuclidean")
    expected = scipy.special.logsumexp(energies) - math.log(len(energies))
    assert uniformity(x.double()) == approx(expected, rel=1e-9)
    assert uniformity(x) == approx(expected, rel=1e-4)


def test_uniformity_near_zero_keeps_its_digits_in_float32():
    for seed in range(5):
        x = 0.1 * randn(1500, 8, seed=seed).float()
        expected = approx(uniformity(x.double()), abs=1e-7)
        assert uniformity(x) == expected


def test_uniformity_of_copies_far_apart_is_the_log_share_of_pairs_that_coincide():
    x = 300 * randn(4, 16).float().repeat(5, 1)
    assert uniformity(x) <= math.log(4 * 10 / 190) + 1e-6


@parametrize("shape", [(30, 3), (3, 3), (3, 12), (50, 20)])
@parametrize("values", [[7, 7, 7], [4, 1, 1e-5], [5]])
def test_spectral_decay_is_the_divergence_of_the_singular_values_from_equal_ones(shape, values):
    rows, columns = shape
    left, _ = torch.linalg.qr(randn(rows, len(values)))
    right, _ = torch.linalg.qr(randn(columns, len(values), seed=1))
    x = left * torch.tensor(values, dtype=left.dtype) @ right.T
    # Unused directions count as float32's resolution of the largest.
    s = np.full(min(shape), values[0] * 2.0**-23)
    s[: len(values)] = values
    expected = scipy.stats.entropy(np.ones(len(s)), s)
    assert spectral_decay(x) == approx(expected, rel=1e-9, abs=1e-12)


def test_density_agrees_with_all_pairs():
    # The last image is alone: it has no distance within its class, but a class mean.
    labels = torch.cat([torch.arange(60) % 6, torch.tensor([99])])
    x = randn(61, 8) + 2 * randn(100, 8, seed=1)[labels]
    within = np.mean([pdist(x[labels == c], "cosine").mean() for c in range(6)])
    unit = F.normalize(x, dim=1)
    means = torch.stack([unit[labels == c].mean(0) for c in labels.unique()])
    expected = within / pdist(means, "cosine").mean()
    assert density(x, labels) == approx(expected, rel=1e-9)


def test_density_of_tight_classes_close_together():
    # Cosine distances: within 1 - cos(2e-5), between 1 - cos(1e-5).
    a = math.degrees(1e-5)
    x, labels = on_a_circle(-a, a, 0, 2 * a), torch.tensor([0, 0, 1, 1])
    assert density(x, labels) == approx(4, rel=1e-4)


def test_density_is_nan_for_one_class_or_for_single_images():
    for labels in (torch.zeros(4).long(), torch.arange(4)):
        assert math.isnan(density(randn(4, 3), labels))


def test_concentration_variance_agrees_with_the_formula_class_by_class():
    # The last image is alone, and its class has no part in it.
    labels = torch.cat([torch.arange(60) % 5, torch.tensor([77])])
    x = randn(61, 7) + 1.5 * randn(78, 7, seed=1)[labels]
    kappas = []
    for c in range(5):
        R = F.normalize(x[labels == c], dim=1).mean(0).norm()
        kappas.append(R * (7 - R**2) / (1 - R**2))
    variance = concentration_variance(x, labels)
    assert variance == approx(np.var(kappas), rel=1e-9)


def test_1_minus_R_squared_is_at_least_1e_6():
    # R = 1 for two equal vectors, R^2 = 1/2 for two that are orthogonal.
    x, labels = on_a_circle(0, 0, 0, 90), torch.tensor([0, 0, 1, 1])
    expected = np.var([1e6, math.sqrt(0.5) * 1.5 / 0.5])
    assert concentration_variance(x, labels) == approx(expected, rel=1e-6)


def test_concentration_variance_recovers_the_concentrations_of_sampled_classes():
    concentrations, samples = [20.0, 60.0, 150.0], []
    for i, kappa in enumerate(concentrations):
        distribution = scipy.stats.vonmises_fisher(np.eye(16)[i], kappa, seed=i)
        samples.append(torch.tensor(distribution.rvs(3000)))
    labels = torch.arange(3).repeat_interleave(3000)
    variance = concentration_variance(torch.cat(samples), labels)
    assert variance == approx(np.var(concentrations), rel=0.1)
    equal = torch.cat([samples[0], -samples[0]])
    variance = concentration_variance(equal, labels[:6000])
    assert variance == approx(0, abs=1e-12)


def test_structure_is_computed_in_float64():
    ill_conditioned = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-20]])
    labels = torch.arange(40) % 4
    tight = (randn(4, 16)[labels] + 0.003 * randn(40, 16, seed=1)).float()
    for metric, x, *others in (
        (spectral_decay, ill_conditioned),
        (density, tight, labels),
        (concentration_variance, tight, labels),
    ):
        expected = metric(x.double(), *others)
        assert metric(x, *others) == approx(expected, rel=1e-9)


# -------------------------------------------------------------------------- uncertainty


def test_the_norm_is_judged_by_which_images_retrieve_their_class():
    # The last image is alone in its class, so it is wrong.
    labels = torch.cat([torch.arange(59) % 5, torch.tensor([5])])
    x = (randn(6, 6)[labels] + 1.5 * randn(60, 6, seed=1)).requires_grad_()
    ambiguity = randn(60, seed=2)
    values, curve = uncertainty(x, labels, ambiguity)

    norms = x.detach().norm(dim=1)
    cosine = F.cosine_similarity(x[:, None], x, dim=2).fill_diagonal_(-1)
    right = labels[cosine.argmax(1)] == labels
    auroc = (norms[right, None] > norms[~right]).double().mean()
    clarity = scipy.stats.spearmanr(norms, -ambiguity).statistic
    expected = {"norm_auroc": auroc.item(), "norm_clarity": clarity}
    assert values == approx(expected)

    wrong = ~right[norms.argsort()]
    expected = [(i / 20, wrong[3 * i :].double().mean().item()) for i in range(20)]
    assert curve == approx(np.array(expected))


def test_a_norm_has_no_auroc_where_all_images_are_right_or_all_wrong():
    x = torch.eye(4).repeat(2, 1)
    for labels, error in ((torch.arange(8) % 4, 0.0), (torch.arange(8), 1.0)):
        values, curve = uncertainty(x, labels)
        assert list(values) == ["norm_auroc"] and math.isnan(values["norm_auroc"])
        assert curve == [(i / 20, error) for i in range(20)]


# ------------------------------------------------------------- what the metrics accept


def recall_at_1(x, labels):
    return recall_at_k(x, labels, [1])


def save_retrieval(x, labels):
    evaluate.save_retrieval("unwritten.png", None, x, labels)


def save_norm_extremes(x, labels):
    evaluate.save_norm_extremes("unwritten.png", None, x, labels)


NEED_POSITIVES = [
    recall_at_1, mean_average_precision, map_at_r,
    all_metrics, save_retrieval, save_norm_extremes,
]
OTHERS = [
    clustering, density, concentration_variance,
    uncertainty,
]


def test_unusable_embeddings_are_refused():
    x, labels = torch.ones(6, 3), torch.arange(6) % 2
    broken = x.clone()
    broken[2, 1], broken[4, 0] = math.nan, math.inf
    for unusable, words in (
        (broken, "2 of 6 embeddings hold NaN or infinity"),
        (x[0], "shape"),
        (x[:1], "N >= 2"),
        (x[:, :0], "shape"),
    ):
        for metric in NEED_POSITIVES + OTHERS:
            with refused(words):
                metric(unusable, labels[: len(unusable)])
        for metric in (uniformity, spectral_decay):
            with refused(words):
                metric(unusable)


@parametrize("metric", NEED_POSITIVES)
def test_images_without_any_positive_are_refused(metric):
    with refused("no class has two images"):
        metric(torch.ones(4, 3), torch.arange(4))


def clusters(x, labels):
    return k_means(x, 3, seed=1).tolist()


def structure(x, labels):
    return uniformity(x), spectral_decay(x)


def own_scores(x, labels):
    return partition_scores(labels, labels)


# All that gives numbers.
METRICS = [*NEED_POSITIVES[:4], *OTHERS, clusters, structure, own_scores]


def assert_same_metrics(given, x, labels):
    for metric in METRICS:
        assert metric(*given) == metric(x, labels), metric


@pytest.fixture
def small_integers():
    """Embeddings and labels that float16, and all integer types, can hold."""
    x, labels = quantised(40, 3, 6, 2)
    return x.abs().float(), labels + 1


@parametrize("convert", [
    torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.int, torch.Tensor.byte,
    torch.Tensor.requires_grad_, torch.Tensor.numpy, lambda x: x.half().numpy(),
    lambda x: x.flip(0).numpy()[::-1],
])
def test_embeddings_of_any_kind_give_the_same_as_float32(small_integers, convert):
    x, labels = small_integers
    assert_same_metrics((convert(x.clone()), labels), x, labels)


def test_lists_of_numbers_give_the_same_as_float64(small_integers):
    x, labels = small_integers
    assert_same_metrics((x.tolist(), labels.tolist()), x.double(), labels)


@parametrize("convert", [torch.as_tensor, np.array])
@parametrize("dtype", [
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64",
])
def test_labels_of_any_integer_type_give_the_same_as_int64(small_integers, convert, dtype):
    x, labels = small_integers
    assert_same_metrics((x, convert(labels.numpy().astype(dtype))), x, labels)


def test_labels_and_clusters_may_be_truths(small_integers):
    x, labels = small_integers
    assert_same_metrics((x, labels > 2), x, (labels > 2).long())


@parametrize("convert", [
    torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.requires_grad_, torch.Tensor.double,
    torch.Tensor.half,
])
def test_ambiguity_of_any_kind_gives_the_same(small_integers, convert):
    # float16 can hold it, too.
    ambiguity = torch.rand(40, generator=seeded()).half().float()
    values, _ = uncertainty(*small_integers, ambiguity)
    converted, _ = uncertainty(*small_integers, convert(ambiguity))
    assert converted == approx(values)


@parametrize("float64_images", [0, 1000])
@parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_compute_in_full_precision_inside_autocast(monkeypatch, float64_images, dtype):
    monkeypatch.setattr(evaluate, "FLOAT64_IMAGES", float64_images)
    x, labels = (5 + randn(200, 8)).float(), torch.arange(200) % 4
    for metric in METRICS:
        expected = metric(x, labels)
        with torch.autocast("cpu", dtype):
            assert metric(x, labels) == expected, metric


def test_metrics_do_not_depend_on_the_default_precision(small_integers):
    expected = [metric(*small_integers) for metric in METRICS]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert [metric(*small_integers) for metric in METRICS] == expected
    finally:
        torch.set_default_dtype(torch.float32)


@parametrize("device", ["cpu", "cuda"])
def test_autocast_is_left_on_cpus_and_gpus_and_entered_again(device):
    torch.set_autocast_enabled(device, True)
    try:
        inside = evaluate.full_precision(torch.is_autocast_enabled)(device)
        assert not inside and torch.is_autocast_enabled(device)
    finally:
        torch.set_autocast_enabled(device, False)


@parametrize("labels", [
    torch.zeros(6, 1).long(), np.zeros((6, 1), int), [[0]] * 6, torch.zeros(5).long(), [],
    torch.zeros(6), np.zeros(6), torch.zeros(6, dtype=torch.complex64), torch.tensor(1),
])
def test_labels_that_are_not_one_integer_an_image_are_refused(labels):
    right = torch.arange(6) % 2
    for metric in NEED_POSITIVES + OTHERS:
        with refused("6 images need as many integer labels"):
            metric(torch.ones(6, 3), labels)
    for scores in ((right, labels), (labels, right)):
        with refused("images need as many integer labels"):
            partition_scores(*scores)


@parametrize("values", [
    list("abcdef"), np.array(list("abcdef")), [[1], [2, 3]], None, [None] * 6, {1: 2},
])
def test_what_holds_no_numbers_is_refused(values):
    x, labels = torch.ones(6, 3), torch.arange(6) % 2
    for metric in (map_at_r, clustering, uncertainty):
        for given in ((x, values), (values, labels)):
            with refused("cannot be evaluated .*: give a tensor, an array or a list of numbers"):
                metric(*given)


@parametrize("ambiguity", [torch.ones(5), np.ones((6, 1)), [1.0] * 7, 0.5])
def test_ambiguities_that_are_not_one_an_image_are_refused(ambiguity):
    with refused("6 images need as many ambiguities"):
        uncertainty(torch.ones(6, 3), torch.arange(6) % 2, ambiguity)


def test_ks_that_are_no_positive_whole_numbers_are_refused():
    x, labels = torch.ones(4, 3), torch.arange(4) % 2
    for ks in ([0], [1, -2], [1.5]):
        with refused("positive whole"):
            recall_at_k(x, labels, ks)
    with refused("positive whole"):
        mean_average_precision(x, labels, k=0)
    with refused("positive whole"):
        k_means(x, 0)


# ----------------------------------------------------- all metrics, and how they are shown


def test_all_metrics_are_those_of_the_normalised_embeddings():
    x = ((1 + 9 * randn(60, 1, seed=1).abs()) * randn(60, 8)).requires_grad_()
    labels = torch.arange(60) % 6
    metrics = all_metrics(x, labels, ks=(1, 10), seed=3)
    unit = F.normalize(x.detach(), dim=1)
    recall = recall_at_k(x, labels, (1, 10))
    expected = {
        "recall@1": recall[1],
        "recall@10": recall[10],
        "map@1000": mean_average_precision(x, labels, 1000),
        "map@r": map_at_r(x, labels),
        **clustering(unit, labels, seed=3),
        "uniformity": uniformity(unit),
        "spectral_decay": spectral_decay(unit),
        "density": density(x, labels),
        "concentration_variance": concentration_variance(x, labels),
    }
    assert list(metrics) == list(expected)
    assert metrics == approx(expected)


def test_the_table_shows_fractions_in_percent_and_the_rest_in_four_digits():
    text = common.table({
        "last epoch": {"recall@1": 0.70449, "f1": 1.0, "uniformity": -3.52481},
        "best epoch": {"recall@1": 0.05, "concentration_variance": 12345.6},
    })
    lines = text.split("\n")
    assert len({len(line) for line in lines}) == 1
    assert [re.split("  +", line.strip()) for line in lines] == [
        ["last epoch", "best epoch"],
        ["recall@1", "70.4 %", "5.0 %"],
        ["f1", "100.0 %", "-"],
        ["uniformity", "-3.525", "-"],
        ["concentration_variance", "-", "1.235e+04"],
    ]


# --------------------------------------------------------------------------------------- pictures


def tiles(path, columns, legend):
    """The rows of a picture: the numbers of the images in each, and the colours of their borders.

    The images have 64 pixels a side, and a grey level that is their number. Below each is a line
    of text, above all of them are `legend` lines.
    """
    pixels = to_tensor(Image.open(path))[:, legend * evaluate.TEXT_HEIGHT:]
    step = 64 + 2 * evaluate.BORDER + 2                 # make_grid leaves two pixels between tiles
    row_step = step + evaluate.TEXT_HEIGHT
    assert pixels.shape[2] == 2 + columns * step
    assert pixels.shape[1] % row_step == 2
    borders = pixels[:, 3:-3:row_step, step // 2::step].permute(1, 2, 0)
    numbers = 255 * pixels[0, step // 2::row_step, step // 2::step]
    return numbers.round().int().tolist(), borders


def image_of(number):
    return torch.full((3, 64, 64), number / 255)


def test_each_query_is_followed_by_its_nearest_green_if_right_and_red_if_wrong(tmp_path):
    embeddings = torch.randn(30, 3, generator=seeded())
    labels = torch.arange(30) % 3
    asked = []

    def load_image(i):
        asked.append(i)
        return image_of(i)

    evaluate.save_retrieval(tmp_path / "r.png", load_image, embeddings, labels, num_queries=4)
    rows, borders = tiles(tmp_path / "r.png", columns=6, legend=3)
    assert len({row[0] for row in rows}) == 4
    assert len(asked) == 4 * 6                          # no other picture is loaded
    cosine = F.cosine_similarity(embeddings[:, None], embeddings[None], dim=2).fill_diagonal_(-2)
    for (query, *nearest), colours in zip(rows, borders):
        assert nearest == cosine[query].topk(5).indices.tolist()
        expected = [evaluate.NEUTRAL]
        for i in nearest:
            expected.append(evaluate.RIGHT if labels[i] == labels[query] else evaluate.WRONG)
        assert_close(colours, torch.tensor(expected), atol=0.01, rtol=0)


def test_the_seed_draws_the_queries_from_all_images_with_a_positive(tmp_path):
    embeddings = torch.randn(6, 3, generator=seeded())
    labels = torch.tensor([0, 0, 0, 1, 1, 2])           # the last has none
    queries = []
    for seed in (0, 0, 1):
        file = tmp_path / "r.png"
        evaluate.save_retrieval(file, image_of, embeddings, labels, neighbours=50, seed=seed)
        rows, _ = tiles(file, columns=6, legend=3)                # a query and all others
        queries.append([row[0] for row in rows])
    assert queries[0] == queries[1] != queries[2]
    assert sorted(queries[0]) == sorted(queries[2]) == [0, 1, 2, 3, 4]


def test_norm_extremes_are_a_classs_lowest_and_highest_norms_in_order(tmp_path):
    norms = torch.tensor([5.0, 1, 9, 3, 7, 2, 8, 4, 6, 10, 60, 50, 40, 30, 20, 10, 1, 2, 3, 4])
    labels = torch.tensor([4] * 10 + [7] * 6 + [9] * 4)  # class 9 has too few images
    embeddings = norms[:, None] * F.normalize(torch.ones(20, 5))
    file = tmp_path / "n.png"
    evaluate.save_norm_extremes(file, lambda i: image_of(norms[i]), embeddings, labels)
    rows, borders = tiles(file, columns=6, legend=2)
    assert rows == [[1, 2, 3, 8, 9, 10], [10, 20, 30, 40, 50, 60]]
    expected = torch.tensor([[evaluate.LOW] * 3 + [evaluate.HIGH] * 3] * 2)
    assert_close(borders, expected, atol=0.01, rtol=0)


def test_norm_extremes_are_of_evenly_spaced_classes_and_fewer_where_these_are_small(tmp_path):
    labels = torch.arange(10).repeat_interleave(3)
    embeddings = torch.randn(30, 3, generator=seeded())
    evaluate.save_norm_extremes(tmp_path / "n.png", image_of, embeddings, labels, classes=2)
    rows, _ = tiles(tmp_path / "n.png", columns=2, legend=2)
    assert labels[torch.tensor(rows)].tolist() == [[0, 0], [5, 5]]


def test_text_is_left_out_where_it_does_not_fit():
    short = evaluate.line_of_text(72, "short")
    assert short.shape == (3, evaluate.TEXT_HEIGHT, 72)
    assert short.min() < 0.5
    assert evaluate.line_of_text(72, "a name that is long").min() == 1


@parametrize("side, shown", [(8, 64), (40, 80), (64, 64), (80, 80), (224, 112)])
def test_small_pictures_are_enlarged_by_whole_multiples_and_large_ones_reduced(side, shown):
    framed = evaluate.add_border(torch.ones(3, side, 2 * side), evaluate.WRONG)
    width = 2 * evaluate.BORDER
    assert framed.shape == (3, shown + width, 2 * shown + width)


# ------------------------------------------------------------------- a checkpoint, its embeddings


def read_arrays(path, checkpoint):
    """An .npz file's arrays. The embeddings have to be those of the network."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    kinds = {name: array.dtype.kind for name, array in arrays.items()}
    assert kinds == dict(embeddings="f", norms="f", labels="i", paths="U", class_names="U")
    assert arrays["embeddings"].dtype == np.float32
    network, prepare = common.load_network(checkpoint, "cpu")
    embeddings = network(torch.stack([prepare(path) for path in arrays["paths"]]))
    np.testing.assert_allclose(arrays["embeddings"], embeddings, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(arrays["norms"], embeddings.norm(dim=1), rtol=1e-4)
    return arrays


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A trained network, alone in a folder where files may be written."""
    file = tmp_path / "run" / "best.pt"
    file.parent.mkdir()
    return shutil.copy(trained / "best.pt", file)


def evaluated(checkpoint, *options):
    evaluate.main(["--checkpoint", str(checkpoint), *map(str, options)])


def test_embeddings_are_those_of_the_test_images_wherever_they_are_now(checkpoint, tmp_path):
    moved = make_photos(tmp_path / "moved")
    evaluated(checkpoint, "--embeddings", tmp_path / "out", "--data_root", moved)
    arrays = read_arrays(tmp_path / "out", checkpoint)
    classes = ["class4", "class5", "class6", "class7"]
    assert arrays["class_names"].tolist() == classes
    files = [str(moved / name / f"{i}.png") for name in classes for i in range(5)]
    assert arrays["paths"].tolist() == files
    assert arrays["labels"].tolist() == np.arange(4).repeat(5).tolist()


@pytest.mark.filterwarnings("ignore:.*gone or renamed")
def test_the_metrics_of_a_checkpoint_are_those_of_its_embeddings(checkpoint, monkeypatch, toy):
    split = data.Split(*(field[:300] for field in toy[1]))
    embeddings = torch.randn(300, 4, generator=seeded())
    monkeypatch.setattr(data, "load", lambda *_, **__: (split, split))
    monkeypatch.setattr(common, "embed", lambda *_: embeddings)
    folder = checkpoint.parent
    evaluated(checkpoint, "--pictures", "--embeddings", folder / "toy.npz")
    values, curve = uncertainty(embeddings, split.labels, split.ambiguity)
    metrics = {"epoch": 1, **all_metrics(embeddings, split.labels), **values}
    assert read_json(folder / "metrics.json") == approx(metrics)
    rows = np.loadtxt(folder / "rejection.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(rows, curve)
    for name in ("retrieval.png", "norms.png"):
        pixels = to_tensor(Image.open(folder / name))
        assert pixels.unique().numel() > 100
    with np.load(folder / "toy.npz") as arrays:         # numbers stand for paths
        assert arrays["paths"].tolist() == [str(i) for i in range(300)]


def test_embeddings_are_written_although_single_images_leave_nothing_to_measure(
        checkpoint, tmp_path):
    root = make_photos(tmp_path / "photos", sizes=(1, 1, 1, 1))
    with pytest.warns(UserWarning), refused("no class has two images"):
        evaluated(checkpoint, "--embeddings", tmp_path / "out", "--data_root", root,
                  "--allow_trained_classes")
    assert len(read_arrays(tmp_path / "out", checkpoint)["paths"]) == 2


def changed(checkpoint, change):
    """Change what a checkpoint's file holds."""
    content = read_checkpoint(checkpoint)
    change(content)
    torch.save(content, checkpoint)


# The network was trained with class0 to class3 of eight.
@parametrize("renamed, both", [
    ({"class6": "a", "class7": "b"}, r"2 of 4 test classes were trained \(class2, class3\)"),
    ({"class5": "a"}, r"1 of 4 test classes were trained \(class3\)"),
    ({f"class{c}": f"a{c}" for c in range(4, 8)}, r"4 of 4 .* \(class0, class1, class2\)"),
])
def test_test_classes_that_were_trained_are_refused_unless_allowed(
        checkpoint, tmp_path, renamed, both):
    root = make_photos(tmp_path / "photos")
    for name, new in renamed.items():
        (root / name).rename(root / new)
    metrics = checkpoint.parent / "metrics.json"
    with refused(f"^{both}: make the data set as it was"):
        evaluated(checkpoint, "--data_root", root)
    assert not metrics.exists()
    evaluated(checkpoint, "--data_root", root, "--allow_trained_classes")
    assert metrics.exists()


def test_a_trained_class_that_is_gone_may_be_a_test_class_and_is_warned_of(checkpoint, tmp_path):
    root = make_photos(tmp_path / "photos")
    (root / "class0").rename(root / "z")
    with pytest.warns(UserWarning, match=r"1 trained classes \(class0\) are gone or renamed"):
        evaluated(checkpoint, "--data_root", root)


def test_a_checkpoint_without_class_names_is_evaluated_with_a_warning(checkpoint):
    with warnings.catch_warnings(action="error"):
        evaluated(checkpoint)
    changed(checkpoint, lambda content: content.pop("class_names"))
    with pytest.warns(UserWarning, match=f"^{checkpoint} does not name its training classes"):
        evaluated(checkpoint)


@pytest.mark.filterwarnings("error")
def test_ones_own_pictures_may_be_of_trained_classes(checkpoint, photos, tmp_path):
    evaluated(checkpoint, "--embeddings", tmp_path / "out", "--images", photos)


@parametrize("name, words", [
    ("cub200", "is not in nowhere"), ("sop", "is not in nowhere"), ("insects", "insects"),
])
def test_evaluation_downloads_nothing_and_refuses_what_is_not_there(
        checkpoint, monkeypatch, name, words):
    monkeypatch.setattr(data, "download", None)
    changed(checkpoint, lambda content: content["args"].update(dataset=name))
    with refused(words):
        evaluated(checkpoint, "--data_root", "nowhere")


def test_a_run_of_ones_own_data_set_and_backbone_is_evaluated(checkpoint, monkeypatch):
    def load_noise(root):
        pictures = [Image.effect_noise((20, 30), 50) for _ in range(16)]
        return data.halves(data.Split(pictures, torch.arange(16) // 4, list("abcd")))

    def tiny(image_size):
        return torch.nn.Flatten(), 3 * image_size**2

    monkeypatch.setitem(data.LOADERS, "noise", load_noise)
    monkeypatch.setitem(common.BACKBONES, "tiny", tiny)
    changed(checkpoint, lambda content: content.update(
        args={**content["args"], "dataset": "noise", "arch": "tiny"},
        network=common.Network("tiny", 8, 16).state_dict(),
        criterion={"of.my.own": torch.ones(3)},
        class_names=["a", "b"],
    ))
    file = checkpoint.parent / "noise.npz"
    evaluated(checkpoint, "--pictures", "--embeddings", file)
    with np.load(file) as arrays:
        assert arrays["embeddings"].shape == (8, 8)
        assert arrays["paths"].tolist() == list("01234567")


@parametrize("classes", [
    {"a.jpg": "", "b.png": ""},
    {"x/deep/2.png": "x", "y/1.png": "y"},
    {"loose.png": "", "x/2.png": "x", "y/1.png": "y"},
])
def test_ones_own_pictures_are_embedded_without_a_data_set(checkpoint, tmp_path, classes):
    own = tmp_path / "own"
    for name in [".hidden.png", *classes]:
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 30), 50).save(own / name)
    file = tmp_path / "new" / "folder" / "own.npz"
    evaluated(checkpoint, "--embeddings", file, "--images", own)
    arrays = read_arrays(file, checkpoint)
    assert arrays["paths"].tolist() == [str(own / name) for name in classes]
    assert arrays["class_names"][arrays["labels"]].tolist() == list(classes.values())
    assert not (checkpoint.parent / "metrics.json").exists()


def test_pictures_that_cannot_be_embedded_or_written_are_named_in_a_sentence(checkpoint, tmp_path):
    own = make_photos(tmp_path / "own", sizes=(1,))
    (tmp_path / "folder.npz").mkdir()
    broken = make_photos(tmp_path / "broken", sizes=(1,))
    (broken / "b.jpg").write_bytes(b"nothing")
    for images, file, message in (
            (own, "folder.npz", "writing .*folder.npz failed"),
            (broken, "a.npz", "b.jpg is not a readable image"),
            (tmp_path / "none", "a.npz", "none is no folder, or there is no image")):
        with refused(message):
            evaluated(checkpoint, "--embeddings", tmp_path / file, "--images", images)
    assert not (tmp_path / "a.npz").exists()


# ------------------------------------------------------------------------------------- comparison


def finished_run(folder, seed=0, recall=0.5, metrics=(), **settings):
    """The files of a finished run, whose results.json has this Recall@1."""
    folder.mkdir(parents=True)
    args = {
        "dataset": "folder", "data_root": "photos/cats", "epochs": 3, "val_fraction": 0.0,
        "lr_steps": [2], "seed": seed, "torch": "2.11.0", "commit": "abc1234",
        "command": f"python nir.py --lr_steps 2 --seed {seed} --out {folder}", **settings,
    }
    (folder / "args.json").write_text(json.dumps(args))
    rows = ["epoch,grad_share_nir,test_recall@1", "1,0.05,0.1", "2,0.005,0.2", "3,0.0005,0.4"]
    (folder / "log.csv").write_text("\n".join(rows))
    last = {"recall@1": recall, "map@r": recall / 2, "uniformity": -3.52481, "nmi": 0.25}
    (folder / "results.json").write_text(json.dumps({"last": {**last, **dict(metrics)}}))
    return folder


def seeds_of(folder, recalls, **settings):
    """The folders of a group, a seed for each Recall@1."""
    runs = []
    for seed, recall in enumerate(recalls):
        runs.append(finished_run(Path(f"{folder}-seed{seed}"), seed, recall, **settings))
    return runs


def table(folders, *options):
    """What --compare writes above the table, and {first cell: the other cells} of the table."""
    file = folders[0].parent / "table.md"
    evaluate.main(["--compare", *map(str, folders), "--out", str(file), *map(str, options)])
    text = file.read_text(encoding="utf-8")
    above, _, below = text.partition("\n|")
    rows = {}
    for line in f"|{below}".strip().split("\n"):
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[first] = cells
    return above, rows


def test_a_group_is_shown_by_mean_and_sample_deviation(tmp_path, capsys):
    recalls = [0.50, 0.53, 0.55]
    runs = seeds_of(tmp_path / "many", recalls)
    runs.append(finished_run(tmp_path / "one", recall=0.4))
    above, rows = table(runs, "--metrics", "recall@1", "map@r", "uniformity")
    mean, deviation = 100 * np.mean(recalls), 100 * scipy.stats.tstd(recalls)
    assert list(rows.values()) == [
        ["n", "recall@1", "map@r", "uniformity"],
        ["---:"] * 4,
        ["3", f"{mean:.1f} ± {deviation:.1f} %", f"{mean / 2:.1f} ± {deviation / 2:.1f} %",
         "-3.525 ± 0"],
        ["1", "40.0 %", "20.0 %", "-3.525"],
    ]
    assert above in capsys.readouterr().out


def test_differences_are_paired_by_seed_with_students_interval(tmp_path):
    base, other = [0.50, 0.60, 0.40, 0.9], [0.53, 0.62, 0.45]
    controls = seeds_of(tmp_path / "control", base)
    runs = seeds_of(tmp_path / "nir", other)[::-1]
    low, high = 100 * np.array(scipy.stats.ttest_rel(other, base[:3]).confidence_interval(0.95))
    mean = 100 * np.mean(np.subtract(other, base[:3]))
    for listed in (controls, controls[1:]):             # the baseline itself may be left out
        _, rows = table([*runs, *listed], "--baseline", controls[0])
        assert list(rows) == ["", "---", "control", "nir"]
        assert rows[""][-1] == "recall@1 minus control [95 %]"
        assert rows["control"][0] == "4" and rows["control"][-1] == "-"
        assert rows["nir"][-1] == f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] %"


def test_two_pairs_are_shown_with_a_warning_and_one_is_not_shown(tmp_path):
    runs = seeds_of(tmp_path / "nir", [0.2, 0.4])
    controls = seeds_of(tmp_path / "control", [0.3, 0.5, 0.7])
    _, rows = table([*runs, *controls], "--baseline", controls[0])
    assert rows["nir"][-1] == "-10.0 [-10.0, -10.0] % (2 seeds only)"
    _, rows = table([runs[0], *controls], "--baseline", controls[0])
    assert rows["nir"][-1] == "-"


def test_runs_that_differ_by_circumstances_alone_are_a_group_named_without_seeds(tmp_path):
    changes = {
        "a-seed0": {"device": "cuda"}, "a-seed1-2": {"workers": 4}, "x/a-s2": {"torch": "2.12"},
        "a/3": {"data_root": "/mnt/cats/"}, "a/seed4": {"commit": "def"}, "a-5": {"resume": "x"},
        "a_seed6": {"not_known_then": None},
    }
    runs = [finished_run(tmp_path / "b-seed2")]         # the 2 is not its seed
    for seed, (name, change) in enumerate(changes.items()):
        runs.append(finished_run(tmp_path / name, seed, **change))
    groups = evaluate.read_groups([*runs, f"{runs[1]}/"])       # given twice it counts once
    assert {name: len(group) for name, group in groups.items()} == {"b-seed2": 1, "a": 7}


@parametrize("name, change, message", [
    ("a-seed1", {"margin": 0.1}, r"differ in margin \(None and 0.1\): .* rename one or leave it"),
    ("a-seed1", {"lr_steps": [2, 3]}, r"differ in lr_steps \(\[2\] and \[2, 3\]\): .* rename"),
    ("x/a-seed0", {"seed": 0}, "have the same seed: .* rename one or leave it out"),
    ("b-seed1", {"epochs": 4}, r"differ in epochs \(3 and 4\): .* cannot be compared, leave one"),
    ("b-seed1", {"val_fraction": 0.5}, r"differ in val_fraction \(0.0 and 0.5\): .* compared"),
    ("b-seed1", {"dataset": "toy"}, r"differ in dataset \(folder cats and toy\): .* compared"),
    ("b-seed1", {"data_root": "dogs"}, r"differ in dataset \(folder cats and folder dogs\)"),
])
def test_runs_that_are_no_group_or_cannot_be_compared_are_refused(tmp_path, name, change, message):
    first = finished_run(tmp_path / "a-seed0")
    other = finished_run(tmp_path / name, **{"seed": 1, **change})
    with refused(f"^{first} and {other} {message}"):
        evaluate.read_groups([first, other])


@parametrize("file, content", [
    ("args.json", None), ("args.json", "{"), ("args.json", "[1]"), ("args.json", "{}"),
    ("log.csv", None), ("log.csv", "epoch,loss\n1,low"), ("log.csv", "epoch,loss\n1"),
    ("results.json", None), ("results.json", "[]"), ("results.json", '{"last": {"nmi": null}}'),
])
def test_a_folder_that_is_no_finished_run_is_refused_with_its_file(tmp_path, file, content):
    run = finished_run(tmp_path / "a")
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    message = f"^{run} is no finished run, as its {file} is missing or broken .*: leave it out"
    with refused(message):
        evaluate.read_groups([run])


@parametrize("given, advice", [
    (".", "nir-seed*"), ("nir-seed0/args.json", "nir-seed*"), ("missing", "runs/NAME-seed*"),
    ("own", "own/*"), ("..", "nir-seed*"), ("empty", "runs/NAME-seed*"),
])
def test_a_folder_of_runs_or_a_file_is_refused_with_an_example(tmp_path, given, advice):
    runs = tmp_path / "project" / "runs"
    seeds_of(runs / "nir", [0.1, 0.2])
    finished_run(runs / "own" / "0")
    (runs / "empty").mkdir()
    example = advice if advice.startswith("runs") else runs / advice
    with refused(re.escape(f"or give folders of runs, such as {example}") + "$"):
        table([runs / given])


def test_a_column_of_the_log_is_its_last_epoch_or_the_one_behind_the_at(tmp_path):
    runs = seeds_of(tmp_path / "a", [0.3], metrics={"grad_share_nir@2": 7.0})
    runs += seeds_of(tmp_path / "b", [0.3])
    names = ["grad_share_nir@1", "grad_share_nir@2", "grad_share_nir", "test_recall@1@2"]
    _, rows = table(runs, "--metrics", *names)
    assert rows["a"] == ["1", "0.05", "7", "0.0005", "20.0 %"]     # results.json comes first
    assert rows["b"] == ["1", "0.05", "0.005", "0.0005", "20.0 %"]


def test_a_metric_that_a_run_lacks_is_not_shown_for_its_group(tmp_path):
    runs = seeds_of(tmp_path / "a", [0.1, 0.2], metrics={"extra": 1.0})
    runs += seeds_of(tmp_path / "b", [0.1, 0.2])
    runs.append(finished_run(tmp_path / "b-seed2", 2, metrics={"extra": 1.0}))
    _, rows = table(runs, "--metrics", "extra", "--baseline", runs[0])
    assert rows["a"] == ["2", "1 ± 0", "-"] and rows["b"] == ["3", "-", "-"]


def test_a_metric_that_no_run_has_is_refused_with_those_that_there_are(tmp_path):
    listed = "epoch, grad_share_nir, test_recall@1, recall@1, map@r, uniformity, nmi"
    message = f"recal@1: no run has it, choose from {listed} and log.csv's COLUMN@EPOCH"
    with refused(message):
        table([finished_run(tmp_path / "a")], "--metrics", "nmi", "recal@1")


@parametrize("metric, value, text", [
    ("map@1000", 0.70449, "70.4 %"), ("val_recall@1", 0.35, "35.0 %"), ("f1", 1, "100.0 %"),
    ("nmi", math.nan, "-"), ("grad_share_nir@1", 4e-8, "4e-08"), ("density", 12345.6, "1.235e+04"),
])
def test_fractions_are_in_percent_and_the_rest_has_four_digits(metric, value, text):
    assert evaluate.format_metric(metric, [value]) == text


def test_what_all_commands_share_is_printed_once_and_then_what_each_group_has(tmp_path):
    command = "python {} --lr_steps 2 3 --seed 0{} --dataset toy --out 'a run'"
    plain = seeds_of(tmp_path / "plain", [0, 0], command=command.format("nir.py", ""))
    more = " --nir_weight 0.1 --note 'a b'"
    nll = finished_run(tmp_path / "nll", 4, command=command.format("nir.py", more), commit="def")
    elk = finished_run(tmp_path / "elk", command="python prob_dml.py --seed=0 --dataset toy")
    above, _ = table([*plain, nll])
    assert above.split("\n") == [
        "All runs: `python nir.py --lr_steps 2 3 --dataset toy`", "",
        "- plain, seeds 0, 1: `-`",
        "- nll, seeds 4: `--nir_weight 0.1 --note 'a b'`", "",
        "With torch 2.11.0, commit abc1234; torch 2.11.0, commit def", ""]
    above, _ = table([nll, elk])
    assert above.split("\n")[:4] == [
        "All runs: `--dataset toy`", "",
        f"- nll, seeds 4: `python nir.py --lr_steps 2 3{more}`",
        "- elk, seeds 0: `python prob_dml.py`"]


# ----------------------------------------------------------------------------------------- curves


@parametrize("logarithmic, scale", [(False, np.array), (True, np.log)])
def test_curves_are_thin_for_seeds_and_thick_for_their_mean(
        tmp_path, monkeypatch, logarithmic, scale):
    lines = {1: [], 2: [], 6: []}                       # by width; the axis's are 2 pixels wide
    monkeypatch.setattr(ImageDraw.ImageDraw, "line", lambda _, points, colour, width, **options:
                        lines[width].append(points))
    seeds = np.array([[1e-3, 1e-1, 1.0], [1e-2, 1.0, 0.0]])
    curves = {"a": seeds.tolist(), "without": [[math.nan] * 3]}
    evaluate.save_curves(tmp_path / "c.png", curves, "loss", logarithmic)
    assert [len(lines[width]) for width in (1, 6)] == [2, 1]
    # Places in the picture are linear in the epochs and, downwards, in the numbers.
    numbers = np.vstack([seeds, seeds.mean(0)])
    shown = numbers > 0 if logarithmic else numbers > -1
    x, y = np.concatenate(lines[1] + lines[6]).T
    assert np.corrcoef(shown.nonzero()[1], x)[0, 1] == approx(1)
    assert np.corrcoef(scale(numbers[shown]), y)[0, 1] == approx(-1, abs=1e-8)


@parametrize("epochs", [1, 200])
@parametrize("groups", [1, 11])
def test_each_group_has_a_colour_for_its_points_or_lines(tmp_path, epochs, groups):
    curves = {f"run{i}": [[float(i)] * epochs] for i in range(groups)}
    evaluate.save_curves(tmp_path / "c.png", curves)
    picture = to_tensor(Image.open(tmp_path / "c.png"))[:, :, :600]     # without the legend
    for colour in evaluate.COLOURS[:groups]:
        rgb = torch.tensor(ImageColor.getrgb(colour)).view(3, 1, 1) / 255
        assert ((picture - rgb).abs().amax(0) < 0.1).sum() > 20, colour


def test_compare_draws_recall_in_percent_or_any_column(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "save_curves", lambda *given, logarithmic:
                        drawn.append((*given, logarithmic)))
    runs = seeds_of(tmp_path / "a", [0.1, 0.2])
    table(runs, "--curves", "c.png")
    table(runs, "--curves", "c.png", "--column", "grad_share_nir")
    validated = finished_run(tmp_path / "b", val_fraction=0.5)
    (validated / "log.csv").write_text("epoch,val_recall@1\n1,0.1\n2,0.3\n3,0.2")
    table([validated], "--curves", "c.png")
    recall, share = approx([10, 20, 40]), [0.05, 0.005, 0.0005]
    assert drawn == [
        ("c.png", {"a": [recall, recall]}, "test_recall@1 %", False),
        ("c.png", {"a": [share, share]}, "grad_share_nir", True),
        ("c.png", {"b": [approx([10, 30, 20])]}, "val_recall@1 %", False),
    ]


# ----------------------------------------------------------------------------------- command line


@parametrize("options, message", [
    ("", "one of the arguments --checkpoint --compare is required"),
    ("--checkpoint a --compare b", "not allowed with argument --checkpoint"),
    ("--compare", "expected at least one argument"),
    ("--compare a --pictures", "--pictures without --checkpoint"),
    ("--compare a --allow_trained_classes", "--allow_trained_classes without --checkpoint"),
    ("--compare a --data_root b", "--data_root without --checkpoint"),
    ("--compare a --embeddings b", "--embeddings without --checkpoint"),
    ("--checkpoint a --images b", "--images without --embeddings"),
    ("--checkpoint a --baseline b", "--baseline without --compare"),
    ("--checkpoint a --metrics b", "--metrics without --compare"),
    ("--checkpoint a --out b", "--out without --compare"),
    ("--checkpoint a --curves b", "--curves without --compare"),
    ("--compare a --column b", "--column without --curves"),
    ("--checkpoint a --embeddings b --images c --pictures", "--images is not the data set"),
    ("--checkpoint a --embeddings b --images c --data_root d", "--images is not the data set"),
    ("--checkpoint a --workers -1", "-1 is not at least 0"),
])
def test_options_that_contradict_each_other_are_refused(options, message, capsys):
    error = error_of(lambda: evaluate.main(options.split()), capsys)
    assert message in error.splitlines()[-1]


@parametrize("options, message", [
    ("--out .", "writing . failed"),
    ("--curves none/c.png", "writing none/c.png failed .*give another file with --curves"),
    ("--curves c.png --column los", "los: no number to draw, give another --column"),
])
def test_files_that_cannot_be_written_are_named(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(finished_run(tmp_path / "a"))
    with refused(message):
        evaluate.main(["--compare", ".", *options.split()])
