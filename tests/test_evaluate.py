import csv
import itertools
import json
import math
import warnings

import numpy as np
import pictures
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_tensor

import common
import data
import evaluate
from data import UserError


def quantised(n, classes, dim, seed, levels=2):
    """Embeddings of few small integers, so that many cosines are equal, some vectors are zero and some are copies."""
    rng = np.random.default_rng(seed)
    return rng.integers(-levels, levels + 1, (n, dim)).astype(np.float64), rng.integers(0, classes, n)


def reference_positions(x, y):
    """Slow and plain: for every query with a positive, the sorted positions of its positives, all ties against it."""
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    positions = []
    for q in range(len(x)):
        cosine = [float(np.dot(x[q], x[i])) for i in range(len(x))]
        positives = sorted((cosine[i] for i in range(len(x)) if i != q and y[i] == y[q]), reverse=True)
        negatives = [cosine[i] for i in range(len(x)) if y[i] != y[q]]
        if positives:
            positions.append([j + 1 + sum(s >= r - 1e-9 for s in negatives) for j, r in enumerate(positives)])
    return positions


def reference_map(positions, k=None):
    values = []
    for query in positions:
        limit = k or len(query)
        values.append(sum((j + 1) / p for j, p in enumerate(query) if p <= limit) / min(len(query), limit))
    return np.mean(values)


def blobs(classes, per_class, dim, spread, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    centres = 10 * torch.randn(classes, dim, generator=rng)
    return centres[labels] + spread * torch.randn(len(labels), dim, generator=rng), labels


CASES = [(60, 6, 3, 0, 1), (80, 5, 4, 1, 2), (40, 30, 3, 2, 1), (50, 2, 6, 3, 3), (7, 2, 2, 4, 1)]


# ------------------------------------------------------------------------------------------------------ retrieval

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*alone in their class")
def test_retrieval_agrees_with_a_slow_reference_on_data_full_of_ties(case, dtype):
    x, y = quantised(*case)
    positions = reference_positions(x, y)
    embeddings, labels = torch.tensor(x).to(dtype), torch.tensor(y)
    ks = (1, 2, 4, 8, 1000)
    expected = {k: np.mean([query[0] <= k for query in positions]) for k in ks}
    assert evaluate.recall_at_k(embeddings, labels, ks) == pytest.approx(expected, abs=1e-12)
    for k in (1, 3, 10, 1000):
        expected = pytest.approx(reference_map(positions, k), abs=1e-6)
        assert evaluate.mean_average_precision(embeddings, labels, k) == expected
    assert evaluate.map_at_r(embeddings, labels) == pytest.approx(reference_map(positions), abs=1e-6)


def test_the_quantised_data_holds_ties_that_change_the_result():
    x, y = quantised(*CASES[0])
    pessimist = evaluate.recall_at_k(torch.tensor(x), torch.tensor(y), [1])[1]
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    cosine = x @ x.T
    np.fill_diagonal(cosine, -np.inf)
    same = y[:, None] == y
    optimist = np.mean(np.where(same, cosine, -np.inf).max(1) >= np.where(same, -np.inf, cosine).max(1) - 1e-9)
    assert optimist > pessimist + 0.1


def on_a_circle(*degrees):
    angle = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_a_hand_computed_ranking():
    # Class 0 at 0, 10 and 40 degrees, class 1 at 25 and 91. Rankings from 0: 10 (right), 25 (wrong), 40 (right), 91;
    # from 10: 0 (right), 25, 40 (right), 91; from 40: 25 (wrong), 10 (right), 0 (right), 91;
    # from 25: 10 and 40 tie, then 0, then 91 (right, 4th); from 91: 40, then 25 (right, 2nd).
    embeddings, labels = on_a_circle(0, 10, 40, 25, 91), torch.tensor([0, 0, 0, 1, 1])
    assert evaluate.recall_at_k(embeddings, labels, (1, 2, 3, 4)) == pytest.approx({1: 0.4, 2: 0.8, 3: 0.8, 4: 1.0})
    full = [(1 + 2 / 3) / 2, (1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, 1 / 4, 1 / 2]
    assert evaluate.mean_average_precision(embeddings, labels) == pytest.approx(np.mean(full))
    assert evaluate.mean_average_precision(embeddings, labels, k=2) == pytest.approx(np.mean([1/2, 1/2, 1/4, 0, 1/2]))
    assert evaluate.map_at_r(embeddings, labels) == pytest.approx(np.mean([1 / 2, 1 / 2, 1 / 4, 0, 0]))


def test_retrieval_depends_on_directions_alone():
    x, labels = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 6
    scaled = x * torch.rand(60, 1, generator=torch.Generator().manual_seed(1)).add(0.1) * 50
    assert evaluate.recall_at_k(x, labels, (1, 4)) == evaluate.recall_at_k(scaled, labels, (1, 4))
    assert evaluate.map_at_r(x, labels) == pytest.approx(evaluate.map_at_r(scaled, labels), abs=1e-7)


def test_images_alone_in_their_class_are_negatives_to_all_but_no_queries():
    embeddings = on_a_circle(0, 10, 60, 70, 5)
    labels = torch.tensor([0, 0, 1, 1, 2])        # the lone image at 5 degrees lies between the two of class 0
    with pytest.warns(UserWarning, match="1 of 5 images are alone"):
        assert evaluate.recall_at_k(embeddings, labels, (1, 2)) == {1: 0.5, 2: 1.0}
    with pytest.warns(UserWarning, match="1 of 5"):
        assert evaluate.mean_average_precision(embeddings, labels) == pytest.approx(0.75)


def test_no_warning_when_all_images_have_a_positive():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate.recall_at_k(torch.randn(8, 3), torch.arange(8) % 4, [1])


@pytest.mark.parametrize("dim", [2, 512, 2048])
@pytest.mark.parametrize("value", [0.0, 0.37, 1e-3])
def test_a_collapsed_network_retrieves_nothing_and_all_its_metrics_are_finite(dim, value):
    row = value * torch.linspace(0.3, 1.7, dim)
    embeddings, labels = row.repeat(203, 1), torch.arange(203) % 7
    metrics = evaluate.all_metrics(embeddings, labels)
    assert [metrics[f"recall@{k}"] for k in (1, 2, 4, 8)] == [0, 0, 0, 0]
    assert metrics["map@r"] == 0 and metrics["nmi"] == 0
    assert metrics["uniformity"] == pytest.approx(0, abs=1e-6)
    assert all(math.isfinite(number) for number in metrics.values())


def test_rounding_errors_do_not_rescue_a_collapsed_network():
    noise = 1e-8 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    assert evaluate.recall_at_k(torch.ones(200, 64) + noise, torch.arange(200) % 5, [1, 8]) == {1: 0, 8: 0}


@pytest.mark.parametrize("chunk", [1, 100, 61 * 7, 61 * 60, 61 * 61])
def test_chunk_boundaries_do_not_matter(monkeypatch, chunk):
    rng = torch.Generator().manual_seed(3)
    embeddings = torch.randn(61, 4, generator=rng, dtype=torch.float64)
    labels = torch.randint(6, (61,), generator=rng) * 3 - 5
    whole = evaluate.all_metrics(embeddings, labels)
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    assert evaluate.all_metrics(embeddings, labels) == pytest.approx(whole, rel=1e-12)


def test_order_of_images_and_names_of_classes_do_not_matter_to_retrieval():
    rng = torch.Generator().manual_seed(4)
    embeddings, labels = torch.randn(50, 4, generator=rng, dtype=torch.float64), torch.randint(5, (50,), generator=rng)
    shuffled = torch.randperm(50, generator=rng)
    assert (evaluate.recall_at_k(embeddings[shuffled], 1000 - 7 * labels[shuffled], (1, 3))
            == pytest.approx(evaluate.recall_at_k(embeddings, labels, (1, 3))))


# ----------------------------------------------------------------------------------------------------- clustering

def reference_partition_scores(clusters, labels):
    n, right, in_cluster, in_class = len(labels), 0, 0, 0
    for i, j in itertools.combinations(range(n), 2):
        in_cluster += clusters[i] == clusters[j]
        in_class += labels[i] == labels[j]
        right += clusters[i] == clusters[j] and labels[i] == labels[j]
    precision, recall = right / in_cluster, right / in_class
    information = 0.0
    for c, y in itertools.product(set(clusters), set(labels)):
        p, pc, py = np.mean((clusters == c) & (labels == y)), np.mean(clusters == c), np.mean(labels == y)
        information += p * np.log(p / (pc * py)) if p else 0.0
    entropy = sum(scipy.stats.entropy(np.unique(part, return_counts=True)[1]) for part in (clusters, labels))
    return {"nmi": 2 * information / entropy, "f1": 2 * precision * recall / (precision + recall)}


@pytest.mark.parametrize("seed", range(3))
def test_nmi_and_f1_agree_with_counting_all_pairs(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 90) * 4 - 3
    clusters = np.where(rng.random(90) < 0.6, labels + 50, rng.integers(0, 9, 90))
    scores = evaluate.partition_scores(torch.tensor(clusters), torch.tensor(labels))
    assert scores == pytest.approx(reference_partition_scores(clusters, labels), abs=1e-10)


def test_nmi_and_f1_of_extreme_partitions():
    labels = torch.arange(12) % 3
    assert evaluate.partition_scores(7 - labels, labels) == pytest.approx({"nmi": 1, "f1": 1})
    one = evaluate.partition_scores(torch.zeros(12, dtype=torch.long), labels)     # precision 18 / 66, recall 1
    assert one == pytest.approx({"nmi": 0, "f1": 2 * 18 / (66 + 18)}, abs=1e-12)
    alone = evaluate.partition_scores(torch.arange(12), labels)                    # H(clusters) = log 12, I = H(labels)
    assert alone == pytest.approx({"nmi": 2 * math.log(3) / (math.log(12) + math.log(3)), "f1": 0})


def test_the_contingency_table_of_many_classes_stays_sparse():
    labels = torch.arange(60_000) % 30_000       # a dense table would hold 9e8 cells
    assert evaluate.partition_scores(labels.flip(0), labels) == pytest.approx({"nmi": 1, "f1": 1})


@pytest.mark.parametrize("seed", range(5))
def test_separated_blobs_are_clustered_perfectly(seed):
    embeddings, labels = blobs(20, 8, 16, spread=0.01)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    assert (evaluate.clustering(embeddings[shuffled] + 1e5, labels[shuffled], seed)
            == pytest.approx({"nmi": 1, "f1": 1}))


def test_k_means_reaches_a_fixed_point_and_its_seed_decides():
    embeddings, _ = blobs(6, 30, 3, spread=6.0)
    clusters = evaluate.k_means(embeddings, 6, seed=1)
    centres = torch.stack([embeddings[clusters == c].mean(0) for c in range(6)])
    assert torch.equal(torch.cdist(embeddings, centres).argmin(1), clusters)
    assert torch.equal(evaluate.k_means(embeddings, 6, seed=1), clusters)
    others = [evaluate.k_means(embeddings, 6, seed=s) for s in range(2, 6)]
    assert any(evaluate.partition_scores(other, clusters)["nmi"] < 0.999 for other in others)


def test_k_means_fills_an_empty_cluster_with_the_farthest_point(monkeypatch):
    # All draws at the beginning of the list: two equal centres, one of which wins no point.
    # The mean of all points is exactly at the origin, where an empty cluster's centre would stay for ever.
    embeddings = torch.tensor([[-10.0, -1], [-10, 0], [-10, 1], [10, -1], [10, 0], [10, 1]])
    monkeypatch.setattr(evaluate.torch, "searchsorted", lambda *_, **__: torch.tensor([0]))
    clusters = evaluate.k_means(embeddings, 2)
    assert evaluate.partition_scores(clusters, torch.tensor([0, 0, 0, 1, 1, 1]))["nmi"] == pytest.approx(1)


def test_fewer_different_points_than_classes_are_clustered():
    embeddings = torch.tensor([[0.0], [1.0]]).repeat(10, 1)
    scores = evaluate.clustering(embeddings, torch.arange(20) % 10)
    assert all(0 <= value <= 1 for value in scores.values())


# ------------------------------------------------------------------------------------------------------ structure

@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
def test_uniformity_agrees_with_all_pairs_even_where_the_exponential_underflows(scale):
    x = scale * np.random.default_rng(0).normal(size=(40, 6)) + 5
    energies = [-2 * np.sum((x[i] - x[j]) ** 2) for i, j in itertools.combinations(range(40), 2)]
    expected = scipy.special.logsumexp(energies) - np.log(len(energies))
    assert evaluate.uniformity(torch.tensor(x)) == pytest.approx(expected, rel=1e-9)
    assert evaluate.uniformity(torch.tensor(x).float()) == pytest.approx(expected, rel=1e-4)


def test_uniformity_survives_a_large_common_offset_in_float32():
    x = 1000 + 0.3 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert evaluate.uniformity(x) == pytest.approx(evaluate.uniformity(x.double()), rel=1e-4)


def test_uniformity_near_zero_keeps_its_digits_in_float32():
    for seed in range(5):
        x = 0.1 * torch.randn(1500, 8, generator=torch.Generator().manual_seed(seed))
        assert evaluate.uniformity(x) == pytest.approx(evaluate.uniformity(x.double()), abs=1e-7)


def test_uniformity_of_copies_far_apart_is_the_share_of_pairs_that_coincide():
    x = (300 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))).repeat(5, 1)             # rounding: +-0.1
    assert evaluate.uniformity(x) <= math.log(4 * 10 / 190) + 1e-6


def test_uniformity_of_two_antipodes():
    assert evaluate.uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8)


def test_spectral_decay_is_zero_for_an_orthogonal_matrix():
    q = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
    assert evaluate.spectral_decay(q) == pytest.approx(0, abs=1e-6)
    assert evaluate.spectral_decay(7 * q[:5]) == pytest.approx(0, abs=1e-6)
    assert evaluate.spectral_decay(q[:, :4]) == pytest.approx(0, abs=1e-6)


def test_spectral_decay_of_chosen_singular_values():
    left = torch.linalg.qr(torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    values = np.array([4.0, 1.0, 1e-4])
    expected = scipy.stats.entropy(np.ones(3) / 3, values / values.sum())
    assert evaluate.spectral_decay(left * torch.tensor(values) @ right) == pytest.approx(expected, rel=1e-9)


def test_spectral_decay_of_one_direction_is_large_and_finite():
    column = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    decay = evaluate.spectral_decay(column * torch.ones(1, 20))
    eps = 2.0 ** -23                              # 19 directions of 20 count as eps, the first as 1
    assert decay == pytest.approx(-math.log(20) - 19 / 20 * math.log(eps), rel=0.01)


def cosine_distances(x):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.mean([1 - x[i] @ x[j] for i, j in itertools.combinations(range(len(x)), 2)])


@pytest.mark.filterwarnings("ignore:.*alone in their class")
def test_density_agrees_with_all_pairs():
    rng = np.random.default_rng(0)
    y = np.append(rng.integers(0, 6, 60), 99)     # the last image is alone: no distance within, but a class mean
    x = rng.normal(size=(61, 8)) + 2 * rng.normal(size=(100, 8))[y]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    within = np.mean([cosine_distances(x[y == c]) for c in range(6)])
    between = cosine_distances(np.stack([unit[y == c].mean(0) for c in np.unique(y)]))
    assert evaluate.density(torch.tensor(x), torch.tensor(y)) == pytest.approx(within / between, rel=1e-9)


def test_density_by_hand():
    # Within: cosine distances 1 and 0, mean 1/2. Means at 45 and 180 degrees: distance 1 + sqrt(1/2).
    embeddings, labels = on_a_circle(0, 90, 180, 180), torch.tensor([0, 0, 1, 1])
    assert evaluate.density(embeddings, labels) == pytest.approx(0.5 / (1 + math.sqrt(0.5)))
    assert math.isnan(evaluate.density(embeddings, torch.zeros(4, dtype=torch.long)))


def test_concentration_variance_agrees_with_the_formula_class_by_class():
    rng = np.random.default_rng(1)
    y = np.append(np.arange(60) % 5, 77)
    x = rng.normal(size=(61, 7)) + 1.5 * rng.normal(size=(78, 7))[y]
    kappas = []
    for c in range(5):
        members = x[y == c] / np.linalg.norm(x[y == c], axis=1, keepdims=True)
        r = np.linalg.norm(members.mean(0))
        kappas.append(r * (7 - r * r) / (1 - r * r))
    assert evaluate.concentration_variance(torch.tensor(x), torch.tensor(y)) == pytest.approx(np.var(kappas), rel=1e-9)


def test_concentration_variance_recovers_the_concentrations_of_sampled_classes():
    concentrations, dim, samples = [20.0, 60.0, 150.0], 16, []
    for i, kappa in enumerate(concentrations):
        mu = np.eye(dim)[i]
        samples.append(scipy.stats.vonmises_fisher(mu, kappa, seed=i).rvs(3000))
    embeddings, labels = torch.tensor(np.concatenate(samples)), torch.arange(3).repeat_interleave(3000)
    assert evaluate.concentration_variance(embeddings, labels) == pytest.approx(np.var(concentrations), rel=0.1)
    equal = torch.cat([torch.tensor(samples[0]), -torch.tensor(samples[0])])
    assert evaluate.concentration_variance(equal, labels[:6000]) == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------------------------------------- mistakes and table

METRICS = [lambda x, y: evaluate.recall_at_k(x, y, [1]), evaluate.mean_average_precision, evaluate.map_at_r,
           evaluate.clustering, evaluate.density, evaluate.concentration_variance, evaluate.all_metrics,
           lambda x, y: evaluate.save_retrieval("unwritten.png", None, x, y),
           lambda x, y: evaluate.save_norm_extremes("unwritten.png", None, x, y)]


@pytest.mark.parametrize("metric", METRICS)
def test_unusable_embeddings_or_labels_are_refused_in_one_sentence(metric):
    x, y = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 1])
    broken = x.clone()
    broken[2, 1], broken[4, 0] = math.nan, math.inf
    for embeddings, labels, sentence in ((broken, y, "2 of 6 embeddings hold NaN or infinity"), (x, y[:5], "labels"),
                                         (x, y.float(), "labels"), (x, y.view(2, 3), "labels"), (x[0], y, "shape"),
                                         (x[:1], y[:1], "N >= 2"), (x[:, :0], y, "shape")):
        with pytest.raises(UserError, match=sentence) as error:
            metric(embeddings, labels)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("metric", [evaluate.uniformity, evaluate.spectral_decay])
def test_unusable_embeddings_are_refused_without_labels_too(metric):
    for embeddings in (torch.tensor([[1.0, math.nan], [0, 1]]), torch.randn(3), torch.randn(1, 3)):
        with pytest.raises(UserError):
            metric(embeddings)


def test_retrieval_without_any_positive_and_unusable_k_are_refused(tmp_path):
    x = torch.randn(4, 3)
    for metric in (METRICS[0], *METRICS[1:3], lambda x, y: evaluate.save_retrieval(tmp_path / "r.png", None, x, y),
                   lambda x, y: evaluate.save_norm_extremes(tmp_path / "n.png", None, x, y)):
        with pytest.raises(UserError, match="no class has two images"):
            metric(x, torch.arange(4))
    for ks in ([0], [1, -2], [1.5]):
        with pytest.raises(UserError, match="positive whole"):
            evaluate.recall_at_k(x, torch.arange(4) % 2, ks)
    with pytest.raises(UserError, match="positive whole"):
        evaluate.mean_average_precision(x, torch.arange(4) % 2, k=0)


def test_all_metrics_are_those_of_the_normalised_embeddings():
    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(60, 8, generator=rng) * (1 + 9 * torch.rand(60, 1, generator=rng))).requires_grad_()
    labels = torch.arange(60) % 6
    metrics, unit = evaluate.all_metrics(x, labels, ks=(1, 10), seed=3), F.normalize(x.detach(), dim=1)
    recall = evaluate.recall_at_k(x, labels, (1, 10))
    expected = {"recall@1": recall[1], "recall@10": recall[10],
                "map@1000": evaluate.mean_average_precision(x, labels, 1000), "map@r": evaluate.map_at_r(x, labels),
                **evaluate.clustering(unit, labels, seed=3), "uniformity": evaluate.uniformity(unit),
                "spectral_decay": evaluate.spectral_decay(unit), "density": evaluate.density(x, labels),
                "concentration_variance": evaluate.concentration_variance(x, labels)}
    assert list(metrics) == list(expected) and metrics == pytest.approx(expected, rel=1e-5)


def test_the_table_shows_fractions_in_percent_and_the_rest_in_four_digits():
    text = common.table({"last epoch": {"recall@1": 0.70449, "nmi": 1.0, "uniformity": -3.52481},
                           "best epoch": {"recall@1": 0.05, "concentration_variance": 12345.6}})
    lines = text.split("\n")
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    cells = [line.split("  ") for line in lines]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in cells]
    assert cells == [["last epoch", "best epoch"], ["recall@1", "70.4 %", "5.0 %"], ["nmi", "100.0 %", "-"],
                     ["uniformity", "-3.525", "-"], ["concentration_variance", "-", "1.235e+04"]]


# ------------------------------------------------------------------------------------------------------- pictures

def tiles(path, side, columns, start=0):
    """{(row, column): (border colour, centre colour)} of a grid of square pictures with `side` pixels."""
    pixels, step = to_tensor(Image.open(path)), side + 2 * evaluate.BORDER + 2
    rows = (pixels.shape[1] - 2) // step
    found = {}
    for row, column in itertools.product(range(rows), range(columns)):
        top, left = 2 + row * step, start + 2 + column * step
        found[row, column] = (tuple(round(v, 1) for v in pixels[:, top + 1, left + 1].tolist()),
                              pixels[:, top + step // 2, left + step // 2].tolist())
    return found, pixels


def closest_colour(colour):
    known = {"right": evaluate.RIGHT, "wrong": evaluate.WRONG, "neutral": evaluate.NEUTRAL}
    return min(known, key=lambda name: sum(abs(a - b) for a, b in zip(known[name], colour)))


@pytest.mark.parametrize("side, shown", [(32, 64), (64, 64), (80, 80), (224, 112)])
def test_borders_of_retrieved_images_are_green_if_right_and_red_if_wrong(tmp_path, side, shown):
    rng = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(30, 3, generator=rng), torch.arange(30) % 3
    asked = []

    def image(i):                                 # the grey level says which image it is
        asked.append(i)
        return torch.full((3, side, side), i / 30)

    evaluate.save_retrieval(tmp_path / "r.png", image, embeddings, labels, num_queries=4, neighbours=5)
    assert len(asked) == 4 * 6                    # no other picture is loaded
    found, _ = tiles(tmp_path / "r.png", shown, columns=6)
    cosine = F.cosine_similarity(embeddings[:, None], embeddings[None], dim=2).fill_diagonal_(-2)
    queries, colours = [], set()
    for row in range(4):
        index = [round(found[row, column][1][0] * 30) for column in range(6)]
        queries.append(index[0])
        assert index[1:] == cosine[index[0]].topk(5).indices.tolist()
        assert closest_colour(found[row, 0][0]) == "neutral"
        for column in range(1, 6):
            right = bool(labels[index[column]] == labels[index[0]])
            assert closest_colour(found[row, column][0]) == ("right" if right else "wrong")
            colours.add(right)
    assert len(set(queries)) == 4 and colours == {True, False}


def test_the_seed_chooses_the_queries_and_small_data_is_shown_whole(tmp_path):
    embeddings, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1, 1, 2])
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        evaluate.save_retrieval(tmp_path / f"{name}.png", lambda i: torch.full((3, 8, 8), i / 6), embeddings, labels,
                                num_queries=10, neighbours=50, seed=seed)
        files.append((tmp_path / f"{name}.png").read_bytes())
    assert files[0] == files[1] != files[2]
    found, _ = tiles(tmp_path / "a.png", 64, columns=6)
    assert {round(found[row, 0][1][0] * 6) for row in range(5)} == {0, 1, 2, 3, 4}       # image 5 has no positive
    assert max(row for row, _ in found) == 4


def test_norm_extremes_are_the_lowest_and_highest_of_each_class_in_order(tmp_path):
    norms = torch.tensor([5.0, 1, 9, 3, 7, 2, 8, 4, 6, 10, 60, 50, 40, 30, 20, 10, 1, 2])
    labels = torch.tensor([4] * 10 + [7] * 6 + [9] * 2)                                  # class 9 is too small
    embeddings = norms[:, None] * F.normalize(torch.randn(18, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    evaluate.save_norm_extremes(tmp_path / "n.png", lambda i: torch.full((3, 64, 64), norms[i] / 60), embeddings,
                                labels)
    found, pixels = tiles(tmp_path / "n.png", 64, columns=6)
    shown = [[round(found[row, column][1][0] * 60) for column in range(6)] for row in range(2)]
    assert shown == [[1, 2, 3, 8, 9, 10], [10, 20, 30, 40, 50, 60]]
    assert pixels.shape[1] == 2 + 2 * 74                                                 # two rows
    assert [found[1, column][0] for column in range(6)] == [evaluate.LOW] * 3 + [evaluate.HIGH] * 3


def test_norm_extremes_of_small_classes_show_fewer_images(tmp_path):
    embeddings, labels = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.arange(9) // 3
    evaluate.save_norm_extremes(tmp_path / "n.png", lambda i: torch.rand(3, 64, 64), embeddings, labels)
    _, pixels = tiles(tmp_path / "n.png", 64, columns=2)
    assert pixels.shape[1:] == (2 + 3 * 74, 2 + 2 * 74)


def test_pictures_of_noise_at_64_pixels_stay_small(tmp_path):
    # Noise cannot be compressed, so this bounds any picture.
    embeddings, labels = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 5
    evaluate.save_retrieval(tmp_path / "r.png", lambda i: torch.rand(3, 64, 64), embeddings, labels)
    assert (tmp_path / "r.png").stat().st_size < 1_000_000


# ---------------------------------------------------------------------------------------------------- uncertainty

def test_the_norm_is_judged_by_who_is_retrieved_rightly():
    torch.manual_seed(0)
    labels = torch.arange(5).repeat_interleave(12)
    embeddings = torch.randn(5, 6)[labels] + 1.5 * torch.randn(60, 6)
    norms = embeddings.norm(dim=1)
    similarity = F.cosine_similarity(embeddings[:, None], embeddings[None], dim=2) - 9 * torch.eye(60)
    right = labels[similarity.argmax(1)] == labels
    wins = [(a > b).item() + 0.5 * (a == b).item() for a in norms[right] for b in norms[~right]]
    ambiguity = torch.rand(60)
    values, curve = evaluate.uncertainty(embeddings, labels, ambiguity)
    assert len(wins) > 100 and values["norm_auroc"] == pytest.approx(sum(wins) / len(wins))
    assert curve[0] == (0.0, pytest.approx(1 - right.double().mean().item()))
    assert values["norm_clarity"] == pytest.approx(
        scipy.stats.spearmanr(embeddings.norm(dim=1), -ambiguity).statistic)
    order = embeddings.norm(dim=1).argsort(stable=True)
    assert curve[10] == (0.5, pytest.approx(1 - right[order[30:]].double().mean().item()))


def test_a_norm_that_knows_everything_and_one_that_knows_nothing():
    labels, directions = torch.tensor([0, 0, 1, 0]), torch.tensor([[1.0, 0], [1, 0.01], [0, 1], [0.01, 1]])
    right = torch.tensor([True, True, False, False])
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        scaled = F.normalize(directions) * (3 + sign * right.float()).unsqueeze(1)
        values, _ = evaluate.uncertainty(scaled, labels)
        assert values == {"norm_auroc": expected}
    assert math.isnan(evaluate.uncertainty(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))[0]["norm_auroc"])


def test_recall_ranks_by_whatever_similarity_it_is_given(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(evaluate, "CHUNK", 40 * 16)
    embeddings, labels = torch.randn(40, 3), torch.arange(40) % 8
    euclidean = torch.cdist(embeddings, embeddings) + 99 * torch.eye(40)
    expected = (labels[euclidean.argmin(1)] == labels).double().mean().item()
    sizes = []
    recall = evaluate.recall_at_k(embeddings, labels, [1], lambda a, b: sizes.append(a.shape[0]) or -torch.cdist(a, b))[1]
    assert recall == pytest.approx(expected) and max(sizes) == 2          # an eighth of a chunk: it needs room to compute


def test_the_picture_of_distributions_shows_what_falls_with_the_norm(tmp_path):
    pictures.save_distributions(tmp_path / "picture", size=41)
    assert (tmp_path / "picture").stat().st_size < 300_000
    picture = (255 * to_tensor(Image.open(tmp_path / "picture"))).round().int()
    assert picture.shape == (3, 2 * (41 + 20 + 8) + 8, 4 * (41 + 8) + 8)
    tiles = [picture[:, 28 + 69 * (i // 4):69 + 69 * (i // 4), 8 + 49 * (i % 4):49 + 49 * (i % 4)] for i in range(8)]
    for tile in tiles[:2]:                                                  # spheres on white, dark at their far edges
        assert (tile[:, 0, 0] == 255).all() and tile[:, 20, 1].sum() < 255
    brightness = [tile.sum(0) for tile in tiles]
    for i, knows_norm in enumerate((True, True, True, False, False, True), start=2):
        behind = torch.stack([brightness[i][20, 20 - d] for d in (1, 4, 8, 12, 16, 20)])
        assert (behind.unique().numel() > 1) == knows_norm                         # in the direction away from the proxy
        assert brightness[i][20, 35] > brightness[i][20, 5]                                # towards it and away from it


# ----------------------------------------------------------------------------------------------------- embeddings

def untrained(folder, **settings):
    """A run's checkpoint, as if it had been trained."""
    args = {"dataset": "toy", "data_root": "gone", "arch": "conv4", "embed_dim": 8, "image_size": 16, "pooling": "average",
            "weights": "none", "augment": "light", "corrupt": False, "val_fraction": 0.0, "device": "cpu", "workers": 0, **settings}
    torch.manual_seed(0)
    network = common.Network("conv4", 8, 16)
    torch.save({"args": args, "network": network.state_dict(), "epoch": 1}, folder / "best.pt")
    return str(folder / "best.pt")


def photographs(folder, *names):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    return folder


def read_arrays(path, checkpoint):
    """The file's arrays, of which the embeddings and their norms are checked."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert set(arrays) == {"embeddings", "labels", "class_names", "paths", "norms"}
    assert arrays["embeddings"].dtype == arrays["norms"].dtype == np.float32
    assert {arrays[name].dtype.kind for name in ("class_names", "paths")} == {"U"} and arrays["labels"].dtype == np.int64
    np.testing.assert_allclose(arrays["norms"], np.linalg.norm(arrays["embeddings"], axis=1), rtol=1e-5)
    network, prepare = common.load_network(checkpoint, "cpu")
    if not arrays["paths"][0].isdigit():
        expected = network(torch.stack([prepare(Image.open(path)) for path in arrays["paths"]]))
        np.testing.assert_allclose(arrays["embeddings"], expected.numpy(), rtol=1e-4, atol=1e-5)
    return arrays


def test_embeddings_of_the_test_images_are_written_for_numpy_and_the_metrics_beside_them(tmp_path, capsys):
    file, checkpoint = tmp_path / "toy.npz", untrained(tmp_path)
    evaluate.main(["--checkpoint", checkpoint, "--embeddings", str(file)])
    out, arrays, test = capsys.readouterr().out, read_arrays(file, checkpoint), data.load("toy", None)[1]
    assert out.startswith(f"embeddings of 2000 images written to {file}\n") and "recall@1" in out
    assert arrays["labels"].tolist() == test.labels.tolist() and arrays["class_names"].tolist() == test.class_names
    assert arrays["paths"].tolist() == [str(i) for i in range(2000)] and arrays["embeddings"].shape == (2000, 8)
    recall = json.loads((tmp_path / "metrics.json").read_text())["recall@1"]
    assert evaluate.recall_at_k(*map(torch.from_numpy, (arrays["embeddings"], arrays["labels"])), [1]) == {1: recall}


def test_embeddings_of_a_data_set_name_its_files(tmp_path):
    root = photographs(tmp_path / "photos", *(f"{c}/{i}.png" for c in "abcd" for i in range(2)))
    checkpoint = untrained(tmp_path, dataset="folder")
    evaluate.main(["--checkpoint", checkpoint, "--embeddings", str(tmp_path / "out"), "--data_root", str(root)])
    arrays = read_arrays(tmp_path / "out", checkpoint)
    assert arrays["paths"].tolist() == [str(root / f"{c}/{i}.png") for c in "cd" for i in range(2)]
    assert arrays["class_names"].tolist() == ["c", "d"] and arrays["labels"].tolist() == [0, 0, 1, 1]


def test_embeddings_are_written_although_single_images_leave_nothing_to_measure(tmp_path):
    root = photographs(tmp_path / "photos", *(f"{c}/0.png" for c in "abcd"))
    checkpoint = untrained(tmp_path, dataset="folder")
    with pytest.warns(UserWarning, match="have one image"), pytest.raises(UserError, match="no class has two images"):
        evaluate.main(["--checkpoint", checkpoint, "--embeddings", str(tmp_path / "out"), "--data_root", str(root)])
    assert read_arrays(tmp_path / "out", checkpoint)["class_names"].tolist() == ["c", "d"]


@pytest.mark.parametrize("names, classes", [(["one.png"], [""]), (["b.png", "a.jpg"], [""]), (["y/1.png", "x/deep/2.png"], ["x", "y"]),
                                            (["y/1.png", "x/2.png", "loose.png"], ["", "x", "y"])])
def test_embeddings_of_ones_own_pictures_need_neither_classes_nor_the_data_set(tmp_path, capsys, names, classes):
    checkpoint = untrained(tmp_path, dataset="cub200", corrupt=True)
    root = photographs(tmp_path / "own", *names, ".hidden.png")
    evaluate.main(["--checkpoint", checkpoint, "--embeddings", str(tmp_path / "own.npz"), "--images", str(root)])
    assert capsys.readouterr().out == f"embeddings of {len(names)} images written to {tmp_path / 'own.npz'}\n"
    arrays = read_arrays(tmp_path / "own.npz", checkpoint)
    assert arrays["paths"].tolist() == sorted(str(root / name) for name in names)
    assert arrays["class_names"].tolist() == classes and not (tmp_path / "metrics.json").exists()
    for path, label in zip(arrays["paths"], arrays["labels"]):
        assert path.removeprefix(f"{root}/").rpartition("/")[0].split("/")[0] == classes[label]


def test_pictures_that_cannot_be_embedded_or_written_are_one_sentence_and_leave_no_file(tmp_path):
    checkpoint, root = untrained(tmp_path), photographs(tmp_path / "own", "a.png")
    argv = ["--checkpoint", checkpoint, "--embeddings", str(tmp_path / "new/folder/a.npz"), "--images", str(root)]
    evaluate.main(argv)
    assert read_arrays(tmp_path / "new/folder/a.npz", checkpoint)["paths"].tolist() == [str(root / "a.png")]
    (tmp_path / "full.npz").mkdir()
    with pytest.raises(UserError, match="writing .*full.npz failed"):
        evaluate.main([*argv[:3], str(tmp_path / "full.npz"), *argv[4:]])
    (root / "b.jpg").write_bytes(b"nothing")
    argv[3] = str(tmp_path / "a.npz")
    for folder, message in ((root, "b.jpg is not a readable image"), (tmp_path / "none", "none is no folder, or there is no image")):
        with pytest.raises(UserError, match=message) as caught:
            evaluate.main([*argv[:-1], str(folder)])
        assert "\n" not in str(caught.value) and not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("options, message", [
    (["--checkpoint", "a.pt", "--images", "own"], "--images without --embeddings"),
    (["--compare", "a", "--embeddings", "a.npz"], "--embeddings without --checkpoint"),
    (["--compare", "a", "--images", "own"], "--images without --embeddings"),
    (["--compare", "a", "--pictures", "--data_root", "b"], "--data_root, --pictures without --checkpoint"),
    *((["--checkpoint", "a.pt", "--embeddings", "a.npz", "--images", "own", *more], "--images is not the data set: leave")
      for more in (["--pictures"], ["--retrieval", "elk"], ["--data_root", "data"]))])
def test_options_that_do_not_go_with_embeddings_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------- comparison

def finished_run(folder, seed=0, recall=0.5, epochs=3, results=True, rows=None, last=(), **settings):
    """A run's three files as training leaves them; `rows` epochs of them are done."""
    args = {"dataset": "toy", "loss": "proxyanchor", "nir_weight": 0.01, "lr_steps": [2], "val_fraction": 0.0,
            "epochs": epochs, "seed": seed, "out": str(folder), "device": "cpu", "workers": 0, "data_root": "data",
            "resume": None, "command": f"python nir.py --dataset toy --seed {seed} --epochs {epochs}",
            "torch": "2.8.0", "commit": "abc1234", **settings}
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args))
    log = [f"{epoch},{0.5 / 10 ** epoch},1.5,{recall}" for epoch in range(1, (rows or epochs) + 1)]
    (folder / "log.csv").write_text("\n".join(["epoch,grad_share_nir,seconds,test_recall@1", *log]) + "\n")
    if results:
        metrics = {"epoch": epochs, "recall@1": recall, "map@r": recall / 2, "nmi": 0.25, "uniformity": -3.52481}
        (folder / "results.json").write_text(json.dumps({"last": {**metrics, **dict(last)}, "best": {"recall@1": 1.0}}))
    return folder


def table_rows(text):
    """{first cell: the other cells} of a Markdown table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n") if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_a_group_is_shown_by_mean_and_sample_deviation_over_its_seeds(tmp_path):
    recalls = [0.50, 0.53, 0.55]
    runs = [finished_run(tmp_path / f"toy-exp1-seed{seed}", seed, recall) for seed, recall in enumerate(recalls)]
    runs.append(finished_run(tmp_path / "alone", 7, 0.4, loss="triplet"))
    rows = table_rows(evaluate.compare(runs, metrics=["recall@1", "map@r", "uniformity", "seconds"]))
    assert list(rows) == ["", "---", "toy-exp1", "alone"]
    assert rows[""] == ["n", "recall@1", "map@r", "uniformity", "seconds"]
    deviation = np.std(recalls, ddof=1)
    assert rows["toy-exp1"] == ["3", f"{100 * np.mean(recalls):.1f} ± {100 * deviation:.1f} %",
                                f"{50 * np.mean(recalls):.1f} ± {50 * deviation:.1f} %", "-3.525 ± 0", "1.5 ± 0"]
    assert rows["alone"] == ["1", "40.0 %", "20.0 %", "-3.525", "1.5"]


@pytest.mark.parametrize("listed", [True, False])
def test_differences_to_the_baseline_are_paired_by_seed_with_students_interval(tmp_path, listed):
    base, other = [0.50, 0.60, 0.40, 0.9], [0.53, 0.61, 0.45]
    controls = [finished_run(tmp_path / f"control-{seed}", seed, recall, nir_weight=0)
                for seed, recall in enumerate(base)]
    runs = [finished_run(tmp_path / f"nir-{seed}", seed, other[seed]) for seed in (2, 0, 1)]
    rows = table_rows(evaluate.compare([*runs, *controls[not listed:]], baseline=str(controls[0])))
    differences = 100 * (np.array(other) - base[:3])
    (low, high), mean = scipy.stats.ttest_1samp(differences, 0).confidence_interval(0.95), differences.mean()
    assert rows[""][-1] == "recall@1 minus control [95 %]"
    assert rows["nir"][-1] == f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] %"
    assert rows["control"][0] == "4" and rows["control"][-1] == "-"


def test_fewer_than_two_pairs_have_no_difference(tmp_path):
    runs = [finished_run(tmp_path / f"nir-{seed}", seed) for seed in (0, 1, 2)]
    control = [finished_run(tmp_path / f"control-{seed}", seed, nir_weight=0) for seed in (2, 3)]
    rows = table_rows(evaluate.compare([*runs, *control], baseline=control[1]))
    assert rows["nir"][-1] == "-" and rows["control"][-1] == "-"


def test_a_baseline_of_no_group_becomes_one_and_one_that_is_no_run_is_refused(tmp_path):
    runs = [finished_run(tmp_path / f"nir-{seed}", seed, recall=0.1 * seed) for seed in (1, 2)]
    control = finished_run(tmp_path / "control-1", 1, nir_weight=0)
    rows = table_rows(evaluate.compare(runs, baseline=control))
    assert rows["control"][0] == "1" and rows["nir"][0] == "2"
    half = finished_run(tmp_path / "half", rows=1, results=False)
    for baseline, reason in ((half, "missing or unfinished: no results.json"), (tmp_path / "none", "missing or unfinished: no args.json")):
        with pytest.raises(UserError, match=f"--baseline .* is no finished run .{reason}"):
            evaluate.compare(runs, baseline=baseline)


def test_groups_ignore_seed_folder_device_workers_and_versions_but_no_other_setting(tmp_path):
    changes = [{"device": "cuda"}, {"workers": 4}, {"data_root": "/mnt"}, {"torch": "2.9.0"}, {"commit": "def"},
               {"resume": "x"}, {"not_known_then": None}]
    same = [finished_run(tmp_path / f"a-{seed}", seed, **change) for seed, change in enumerate(changes)]
    assert table_rows(evaluate.compare(same))["a"][0] == "7"
    others = [finished_run(tmp_path / f"b{i}", 0, **change)
              for i, change in enumerate([{"loss": "x"}, {"lr_steps": [2, 3]}, {"new": 1}])]
    rows = table_rows(evaluate.compare(same + others))
    assert [row[0] for row in rows.values()][2:] == ["7", "1", "1", "1"]


def test_groups_of_one_name_are_told_apart_by_the_settings_in_which_they_differ(tmp_path):
    runs = [finished_run(tmp_path / row / f"control{separator}{seed}", seed, lr_steps=steps, margin=0.1)
            for row, separator, steps in (("row1", "-", [2]), ("row2", "/seed", [1, 2])) for seed in (0, 11)]
    runs.append(finished_run(tmp_path / "other-seed0-2", loss="triplet"))
    assert list(table_rows(evaluate.compare(runs)))[2:] == ["control lr_steps=[2]", "control lr_steps=[1, 2]", "other"]


def test_a_column_of_the_log_is_its_last_epoch_or_the_one_behind_the_at(tmp_path):
    run = finished_run(tmp_path / "a", last={"map@2": 0.125})
    (tmp_path / "b").mkdir()
    for file in ("args.json", "results.json"):
        (tmp_path / "b" / file).write_text((run / file).read_text().replace("0.01", "0"))
    (tmp_path / "b" / "log.csv").write_text("epoch,map\n1,0.7\n2,0.8\n3,0.9\n")
    names = ["grad_share_nir@1", "grad_share_nir@2", "grad_share_nir", "test_recall@1", "recall@1", "map@2", "map@3"]
    rows = table_rows(evaluate.compare([run, tmp_path / "b"], metrics=names))
    assert rows["a"] == ["1", "5.0 %", "0.5 %", "0.0005", "50.0 %", "50.0 %", "12.5 %", "-"]
    assert rows["b"] == ["1", "-", "-", "-", "-", "50.0 %", "12.5 %", "90.0 %"]


def test_tiny_gradient_shares_keep_their_digits():
    assert evaluate.format_metric("grad_share_nir@1", [4e-8, 4e-8]) == "4e-08 ± 0"
    assert evaluate.format_metric("grad_share_nir", [0.0125]) == "1.2 %"


def test_a_value_that_some_runs_of_a_group_lack_is_averaged_over_the_others_and_says_so(tmp_path):
    runs = [finished_run(tmp_path / f"a-{seed}", seed, last={"extra": seed} if seed else {}) for seed in (0, 1, 2)]
    assert table_rows(evaluate.compare(runs, metrics=["extra"]))["a"] == ["3", "1.5 ± 0.71 (n = 2)"]


def test_photographs_of_two_folders_are_two_data_sets(tmp_path):
    cats, moved, dogs = [finished_run(tmp_path / name, seed, dataset="folder", data_root=root)
                         for seed, (name, root) in enumerate((("a", "photos/cats"), ("b", "/moved/cats"), ("c", "photos/dogs")))]
    text = evaluate.compare([cats, moved, dogs])
    assert table_rows(text)["a"][0] == "2" and f"{dogs} (unlike: folder dogs, 3 epochs, val_fraction 0.0; not folder cats" in text


def test_missing_unfinished_unlike_broken_and_doubled_runs_are_named_and_left_out(tmp_path, capsys):
    def broken(name, file, content):
        folder = finished_run(tmp_path / name, 5)
        (folder / file).write_text(content)
        return folder
    good = [finished_run(tmp_path / f"good-{seed}", seed, recall) for seed, recall in ((0, 0.5), (1, 0.6))]
    (tmp_path / "empty").mkdir()
    reasons = {
        tmp_path / "none": "missing or unfinished: no args.json", tmp_path / "empty": "missing or unfinished: no args.json",
        tmp_path / "good-0" / "log.csv": "missing or unfinished: no args.json",
        finished_run(tmp_path / "short", 2, epochs=15, rows=3, results=False): "missing or unfinished: no results.json",
        finished_run(tmp_path / "long", 2, epochs=4): "unlike: toy, 4 epochs, val_fraction 0.0; not toy, 3 epochs",
        finished_run(tmp_path / "birds", 2, dataset="cub200"): "unlike: cub200, 3",
        finished_run(tmp_path / "held", 2, val_fraction=0.5): "unlike: toy, 3 epochs, val_fraction 0.5",
        finished_run(tmp_path / "twin", 1, 0.9): f"same seed as {good[1]}",
        **{broken(name, file, text): f"args.json, results.json or log.csv is broken: {error}" for name, file, text, error in (
            ("json", "args.json", "{", "JSONDecodeError"), ("list", "args.json", "[1]", "TypeError"),
            ("old", "args.json", "{}", "KeyError: 'dataset'"),
            ("csv", "log.csv", "epoch,seconds\n1,fast\n", "ValueError: could not convert string to float: 'fast'"),
            ("cut", "log.csv", "epoch,seconds\n1,2\n2\n3,4\n", "TypeError"), ("nothing", "log.csv", "", "IndexError"),
            ("null", "results.json", '{"last": {"recall@1": null}}', "TypeError"),
            ("bytes", "results.json", "[]", "TypeError"))}}
    log = finished_run(tmp_path / "no log", 5) / "log.csv"
    log.unlink()
    reasons[log.parent] = "missing or unfinished: no log.csv"
    evaluate.main(["--compare", *map(str, [*good, *reasons])])
    out = capsys.readouterr().out
    assert table_rows(out)["good"][:2] == ["2", "55.0 ± 7.1 %"] and len(table_rows(out)) == 3
    lines = [line for line in out.split("\n") if line.startswith("- left out: ")]
    assert len(lines) == len(reasons) and out.index("| good") < out.index(lines[0])
    for folder, reason in reasons.items():
        assert sum(line.startswith(f"- left out: {folder} ({reason}") for line in lines) == 1, (folder, lines)


def test_a_run_given_twice_counts_once(tmp_path):
    run = finished_run(tmp_path / "a")
    text = evaluate.compare([run, f"{run}/"])
    assert table_rows(text)["a"][0] == "1" and "left out" not in text


def test_nothing_to_compare_and_unknown_metrics_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no finished run to compare: .*none .missing or unfinished: no args.json"):
        evaluate.compare([tmp_path / "none"])
    runs = [finished_run(tmp_path / "a"), finished_run(tmp_path / "b", 1)]
    with pytest.raises(UserError, match="no run has the metric recal@1, seconds@9: there is .*recall@1") as error:
        evaluate.compare(runs, metrics=["recal@1", "nmi", "seconds@9"])
    assert "\n" not in str(error.value) and "test_recall@1" in str(error.value) and "seconds@1" not in str(error.value)


def test_commands_without_their_seed_and_versions_stand_above_the_table(tmp_path):
    runs = [finished_run(tmp_path / f"a-{seed}", seed, commit=commit)
            for seed, commit in ((3, "abc"), (14, "def"), (5, "abc"))]
    old = finished_run(tmp_path / "old", loss="triplet", torch="2.7.1", command="python nir.py --seed=12 --out runs/seed12")
    above = evaluate.compare([*runs, old]).split("\n|")[0].strip().split("\n")
    assert above == ["- a, seed 3, 14, 5: `python nir.py --dataset toy --seed N --epochs 3`",
                     "- old, seed 0: `python nir.py --seed=N --out runs/seedN`", "- torch: 2.8.0, 2.7.1", "- commit: abc, def, abc1234"]


def test_the_comparison_is_printed_and_written(tmp_path, capsys):
    runs = [str(finished_run(tmp_path / f"a-{seed}", seed)) for seed in (0, 1)]
    out = tmp_path / "table.md"
    out.write_text("old")
    evaluate.main(["--compare", *runs, "--metrics", "nmi", "--out", str(out)])
    text = evaluate.compare(runs, metrics=["nmi"])
    assert out.read_text(encoding="utf-8") == text
    assert capsys.readouterr().out == f"{text}\n{out} written\n"
    with pytest.raises(UserError, match="writing .* failed"):
        evaluate.main(["--compare", *runs, "--out", str(tmp_path)])


@pytest.mark.parametrize("options", [[], ["--checkpoint", "best.pt", "--compare", "a"], ["--compare"],
                                     ["--checkpoint", "best.pt", "--out", "table.md"]])
def test_a_checkpoint_and_a_comparison_exclude_each_other_and_one_is_needed(options, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--compare" in error and "Traceback" not in error


def test_curves_show_each_seed_thin_the_mean_thick_axes_and_a_legend(tmp_path):
    curves = {"a": [[11.0, 20.0, 30.0], [30.0, 40.0, 51.0]], "b": [[50.0, 50.0]]}
    evaluate.save_curves(tmp_path / "curves.png", curves)
    picture = to_tensor(Image.open(tmp_path / "curves.png"))
    assert picture.shape == (3, 420, 720) and (tmp_path / "curves.png").stat().st_size < 100_000

    def amount(colour, region=picture):                          # pixels of nearly that colour
        rgb = torch.tensor([int(colour[i:i + 2], 16) for i in (1, 3, 5)]).view(3, 1, 1) / 255
        return int(((region - rgb).abs().amax(0) < 0.1).sum())
    first, second = evaluate.COLOURS[:2]
    assert amount(first) > 1000 and amount(second) > 500
    # From epoch 1 at the left, multiples of 5 (10 at the bottom to 55 at the top): mean 20.5 -> 40.5 in three pixels, seeds in about one.
    column = picture[:, :376, 62 + 322]                          # epoch 2, at the middle of the axis: 20, 30 (mean), 40
    ink = (1 - column[0]) / (1 - int(first[1:3], 16) / 255)       # 1 where a pixel is all of that colour
    thick = [float(ink[y - 4:y + 5].sum()) for y in (376 - round(362 * (v - 10) / 45) for v in (30, 20, 40))]
    assert 2.8 < thick[0] < 4 and 0.4 < min(thick[1:]) and max(thick[1:]) < 1.2, thick
    assert amount("#000000", picture[:, :, :62]) > 30 and amount("#000000", picture[:, 380:]) > 30         # numbers of the axes
    assert amount(first, picture[:, 330:376, 600:]) > 10 and amount(second, picture[:, 330:376, 600:]) > 10   # the legend
    evaluate.save_curves(tmp_path / "one.png", {"a": [[3.0]]})                                             # one epoch makes no line


def test_curves_of_many_epochs_and_groups_keep_their_numbers_apart(tmp_path):
    evaluate.save_curves(tmp_path / "curves.png", {f"run{i}": [[float(10 * i)] * 300] for i in range(11)})
    picture = to_tensor(Image.open(tmp_path / "curves.png"))
    assert (picture[:, 384:400, 62:].amin((0, 1)) < 0.5).float().mean() < 0.5             # columns with ink below the axis
    shown = [picture[:, 376 - round(362 * y / 104), 300] for y in (0, 100)]                # 0 to 104 in steps of 13
    assert torch.allclose(*shown, atol=0.1) and shown[0].std() > 0.1                                 # the eleventh as the first


def test_compare_draws_the_curves_of_its_groups(tmp_path, capsys):
    runs = [finished_run(tmp_path / f"a-seed{seed}", seed=seed) for seed in (0, 1)]
    evaluate.main(["--compare", *map(str, runs), "--curves", str(tmp_path / "curves.png")])
    assert Image.open(tmp_path / "curves.png").size == (720, 420) and "curves.png written\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="writing .* failed .*give another file with --curves"):
        evaluate.main(["--compare", *map(str, runs), "--curves", str(tmp_path / "no folder/curves.png")])


# ------------------------------------------------------------------------------------- edges, and what main writes

@pytest.mark.filterwarnings("ignore:.*alone in their class")
@pytest.mark.parametrize("negatives, expected", [(999, 1 / 1000), (1000, 0)])
def test_map_at_1000_ends_at_position_1000(negatives, expected):
    # The only pair is 120 degrees apart; all negatives lie between the two, so the positive is at negatives + 1.
    embeddings, labels = on_a_circle(0, 120, *np.linspace(55, 65, negatives)), torch.arange(negatives + 2).sub(1).clamp(min=0)
    assert evaluate.mean_average_precision(embeddings, labels) == pytest.approx(expected, abs=1e-9)
    small = evaluate.all_metrics(embeddings, labels, ks=(1000,))
    assert small["map@1000"] == pytest.approx(expected, abs=1e-9) and small["recall@1000"] == (negatives < 1000)


def test_elk_clarity_and_rejection_of_a_checkpoint_agree_with_their_formulas(tmp_path, monkeypatch):
    seen, rng, y = [], np.random.default_rng(0), np.arange(300) % 10
    x = (rng.normal(size=(10, 8))[y] + rng.normal(size=(300, 8))) * rng.uniform(0.3, 10, (300, 1))
    test = data.load("toy", None)[1]
    test = test._replace(images=test.images[:300], labels=torch.tensor(y), ambiguity=test.ambiguity[:300])
    monkeypatch.setattr(data, "load_splits", lambda args: (None, None, test))
    monkeypatch.setattr(common, "embed", lambda *_: torch.tensor(x).float())
    monkeypatch.setattr(evaluate, "save_retrieval", lambda path, image, *_: seen.append(image(5)))
    monkeypatch.setattr(evaluate, "save_norm_extremes", lambda *_: None)
    evaluate.main(["--checkpoint", untrained(tmp_path), "--retrieval", "elk", "--pictures"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    norm, D = np.linalg.norm(x, axis=1), x.shape[1]

    def log_c(k):                                              # log of (D/2-1 power of k) / ((2 pi)^(D/2) I_(D/2-1)(k))
        return (D / 2 - 1) * np.log(k) - D / 2 * math.log(2 * math.pi) - np.log(scipy.special.ive(D / 2 - 1, k)) - k
    both = np.sqrt(np.maximum((norm ** 2)[:, None] + norm ** 2 + 2 * x @ x.T, 1e-30))         # |k1 mu1 + k2 mu2|
    elk = log_c(norm)[:, None] + log_c(norm) - log_c(both)
    np.fill_diagonal(elk, -np.inf)
    right = (y[elk.argmax(1)] == y).mean()
    assert abs(right - metrics["recall@1"]) > 0.02                   # it is not the cosine's
    assert metrics["recall@1 elk"] == pytest.approx(right, abs=1e-9)
    assert metrics["norm_clarity"] == pytest.approx(scipy.stats.spearmanr(norm, -test.ambiguity.numpy()).statistic, abs=1e-6)
    rows = list(csv.DictReader((tmp_path / "rejection.csv").open()))
    assert [float(row["rejected"]) for row in rows] == pytest.approx([i / 20 for i in range(20)])
    assert float(rows[0]["error"]) == pytest.approx(1 - metrics["recall@1"], abs=1e-9)
    assert 0 <= seen[0].min() and 0.05 < seen[0].max() <= 1 and len(seen[0].unique()) > 10    # a picture in [0, 1]


def test_the_curves_of_a_comparison_are_the_validations_where_there_is_one_and_in_percent(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "save_curves", lambda path, curves: drawn.append(curves))
    run = finished_run(tmp_path / "a", recall=0.25)
    evaluate.compare([run], curves="c.png")
    (run / "log.csv").write_text("epoch,test_recall@1,val_recall@1\n1,0.9,0.1\n2,0.9,0.2\n3,0.9,0.4\n")
    evaluate.compare([run], curves="c.png")
    assert drawn == [{"a": [pytest.approx([25.0] * 3)]}, {"a": [pytest.approx([10.0, 20.0, 40.0])]}]


def test_the_numbers_on_the_axes_and_the_mean_of_the_curves_are_true(tmp_path, monkeypatch):
    words, lines, text, line = {}, [], ImageDraw.ImageDraw.text, ImageDraw.ImageDraw.line
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, s, *a, **k: [words.setdefault(s, xy), text(self, xy, s, *a, **k)])
    monkeypatch.setattr(ImageDraw.ImageDraw, "line", lambda self, xy, *a, **k: [lines.append((k["width"], xy)), line(self, xy, *a, **k)])
    evaluate.save_curves(tmp_path / "c.png", {"a": [[60.0, 40.0], [60.0, 40.0], [60.0, 70.0]]})
    (x1, y60), (x2, y40) = [xy for width, xy in lines if width == 1][0]
    assert words["60"][1] == pytest.approx(y60) and words["40"][1] == pytest.approx(y40)      # ticks at their values
    assert words["1"][0] == pytest.approx(x1) and words["2"][0] == pytest.approx(x2) and "a (n = 3)" in words
    (_, start), (_, end) = [xy for width, xy in lines if width == 6][0]
    assert start == pytest.approx(y60) and end == pytest.approx(y40 + (y60 - y40) / 2)        # (40 + 40 + 70) / 3 = 50


def test_1_minus_R_squared_is_at_least_1e_6():
    # Two equal points: R = 1, kappa = (2 - 1) / 1e-6. Two orthogonal ones: R^2 = 1/2, kappa = R (2 - 1/2) / (1/2).
    kappas = [1e6, math.sqrt(0.5) * 1.5 / 0.5]
    assert evaluate.concentration_variance(on_a_circle(0, 0, 0, 90), torch.tensor([0, 0, 1, 1])) == pytest.approx(np.var(kappas), rel=1e-6)


def test_density_of_tight_classes_close_together():
    a = math.degrees(1e-5)                # within 1 - cos 2e-5, between the means 1 - cos 1e-5: (2 / 1)^2
    embeddings, labels = on_a_circle(-a, a, 0, 2 * a), torch.tensor([0, 0, 1, 1])
    assert evaluate.density(embeddings, labels) == pytest.approx(4, rel=1e-4)
    for rows in (torch.full((6, 5), 0.37), torch.linspace(0.3, 1.7, 7).repeat(9, 1)):
        assert evaluate.density(rows, torch.arange(len(rows)) % 3) >= 0


def test_structure_is_computed_in_float64():
    # [[1, 1], [1, 1 + e]]: the squares of the singular values add up to 4 + 2e + e^2, their product is e; all exact in float32.
    e = 2.0 ** -20
    total = math.sqrt(4 + 2 * e + e * e + 2 * e)                                       # s1 + s2
    expected = -math.log(2) - 0.5 * (math.log(e) - 2 * math.log(total))
    assert evaluate.spectral_decay(torch.tensor([[1.0, 1.0], [1.0, 1.0 + e]])) == pytest.approx(expected, rel=1e-6)
    rng = torch.Generator().manual_seed(0)
    x, labels = torch.randn(4, 16, generator=rng)[torch.arange(40) % 4] + 0.003 * torch.randn(40, 16, generator=rng), torch.arange(40) % 4
    for metric in (evaluate.density, evaluate.concentration_variance):
        assert metric(x, labels) == pytest.approx(metric(x.double(), labels), rel=1e-9)


def test_images_that_are_all_wrong_have_no_auroc_and_chunks_do_not_matter_to_uncertainty(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    x, labels = torch.randn(61, 4, generator=rng), torch.randint(6, (61,), generator=rng)
    values, curve = evaluate.uncertainty(x[:30], torch.arange(30))
    assert math.isnan(values["norm_auroc"]) and curve == [(i / 20, 1.0) for i in range(20)]
    whole = evaluate.uncertainty(x.requires_grad_(), labels)
    monkeypatch.setattr(evaluate, "CHUNK", 61 * 7)
    assert evaluate.uncertainty(x, labels) == whole


@pytest.mark.parametrize("apart, hit", [(2e-7, 0), (5e-6, 1)])
def test_cosines_closer_than_1e_6_are_equal(apart, hit):
    s = 0.6 - apart                      # a query, its positive at cosine 0.6, a negative a little farther
    x = torch.tensor([[1, 0, 0], [0.6, 0.8, 0], [s, 0, math.sqrt(1 - s * s)]], dtype=torch.float64)
    with pytest.warns(UserWarning):      # of the positive's cosines 0.6 to the query and 0.36 to the negative: always a hit
        assert evaluate.recall_at_k(x, torch.tensor([0, 0, 1]), [1]) == {1: (hit + 1) / 2}


def test_ties_are_relative_for_large_kernels_and_absolute_around_zero():
    rng = torch.Generator().manual_seed(0)
    labels, noise = torch.arange(40) % 4, torch.randn(40, 40, generator=rng, dtype=torch.float64)
    assert evaluate.recall_at_k(torch.ones(40, 2), labels, [1, 8], lambda a, b: 1e6 * (1 + 1e-8 * noise)) == {1: 0, 8: 0}
    assert evaluate.recall_at_k(torch.ones(40, 2), labels, [1, 8], lambda a, b: 1e-8 * noise) == {1: 0, 8: 0}


def test_partitions_without_any_information_or_any_pair_are_the_same():
    assert evaluate.partition_scores(torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.long)) == {"nmi": 1, "f1": 1}
    assert evaluate.partition_scores(torch.arange(5), 9 - torch.arange(5)) == pytest.approx({"nmi": 1, "f1": 1})


def test_k_means_plus_plus_draws_by_squared_distance():
    # Points 0, 1, 3: the first centre is any; 0 and 1 are the two with probability (1/10 + 1/5) / 3 = 1/10, and only then
    # are 1 and 3 together. (In proportion to the distance 0.19, from the points farthest from the mean 0.04.)
    points = torch.tensor([[0.0], [1.0], [3.0]])
    together = [(lambda c: bool(c[1] == c[2]))(evaluate.k_means(points, 2, seed, iterations=1)) for seed in range(1000)]
    assert 70 < sum(together) < 130


def test_lloyd_ends_at_a_fixed_point_however_long_it_takes_and_clustering_passes_its_seed_on():
    x = torch.rand(1500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(1500) % 12
    for seed in range(4):
        clusters = evaluate.k_means(x, 12, seed)
        centres = torch.stack([x[clusters == c].mean(0) for c in range(12)])
        assert torch.equal(torch.cdist(x, centres).argmin(1), clusters)
        assert evaluate.clustering(x, labels, seed) == evaluate.partition_scores(clusters, labels)


def test_an_empty_cluster_begins_anew_at_the_point_farthest_from_its_centre(monkeypatch):
    monkeypatch.setattr(evaluate.torch, "searchsorted", lambda *_, **__: torch.tensor([0]))    # two centres at (4, 0)
    clusters = evaluate.k_means(torch.tensor([[4.0, 0], [-6, 0], [0, 31], [0, -30]]), 2, iterations=2)
    assert [bool(c == clusters[2]) for c in clusters] == [False, False, True, False]


def test_f1_and_validation_recall_are_percent_and_so_is_a_negative_difference_of_shares():
    assert evaluate.format_metric("f1", [0.35]) == "35.0 %" and evaluate.format_metric("val_recall@1", [0.35]) == "35.0 %"
    assert evaluate.format_difference("grad_share_nir", [-0.05, -0.05]) == "-5.0 [-5.0, -5.0] %"


def test_the_usual_kind_is_the_commonest_or_the_baselines(tmp_path, capsys):
    odd = finished_run(tmp_path / "odd", epochs=4)
    runs = [finished_run(tmp_path / f"a-{seed}", seed) for seed in (0, 1)]
    rows = table_rows(evaluate.compare([odd, *runs]))
    assert list(rows) == ["", "---", "a"] and rows["a"][0] == "2" and rows[""] == ["n", "recall@1", "map@r", "nmi"]
    evaluate.main(["--compare", *map(str, runs), "--baseline", str(odd)])
    out = capsys.readouterr().out
    assert list(table_rows(out)) == ["", "---", "odd"] and out.count("(unlike: toy, 3 epochs") == 2
    assert table_rows(out)[""][-1] == "recall@1 minus odd [95 %]"


@pytest.mark.parametrize("options", [["--compare", "a", "--pictures"], ["--compare", "a", "--retrieval", "elk"],
                                     ["--compare", "a", "--data_root", "b"], ["--checkpoint", "a.pt", "--baseline", "b"],
                                     ["--checkpoint", "a.pt", "--metrics", "nmi"], ["--checkpoint", "a.pt", "--curves", "c.png"]])
def test_options_of_the_other_kind_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(options)
    assert stop.value.code == 2 and f"{options[2]}" in capsys.readouterr().err.splitlines()[-1]


def test_norm_extremes_choose_classes_evenly(tmp_path):
    asked, labels = [], torch.arange(10).repeat_interleave(6)
    evaluate.save_norm_extremes(tmp_path / "n.png", lambda i: [asked.append(i), torch.rand(3, 8, 8)][1],
                                torch.randn(60, 3), labels, classes=2)
    assert {int(labels[i]) for i in asked} == {0, 5}
