"""Losses against slow references written from the formulas, miners against their distributions."""
import argparse
import copy
import itertools
import math
import runpy
import shutil
import sys
import types

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import (
    assert_same,
    not_finite,
    parametrize,
    read_checkpoint,
    read_json,
    refused,
    seeded,
    started,
    wrong_batches,
)
from torch.testing import assert_close

import common
import data
import evaluate
import nir
import objectives
from objectives import (
    LEARNED,
    LOSSES,
    MINED,
    MINERS,
    ArcFace,
    Margin,
    MultiSimilarity,
    Objective,
    Softmax,
    SphereFace,
    Triplet,
    distance_probabilities,
    make_loss,
    mine_nearest,
)

# A batch as the sampler draws it: images 0 and 3 stand in it twice, and class 0 four times.
# Class 3 has one image. The numbers are those of the rows of `pictures`.
IMAGES = torch.tensor([0, 3, 4, 1, 0, 5, 3, 2, 6, 7])
LABELS = torch.tensor([0, 1, 2, 0, 0, 2, 1, 0, 2, 3])
SIZES = {"num_classes": 4, "dim": 5}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(dtype=torch.float64):
    """Embeddings (10, 5), not normalised, and their labels."""
    pictures = torch.randn(8, 5, generator=seeded())
    # No negative of image 0 is beyond its positive 1, none of image 3 nearer than sqrt(2).
    pictures[1] = -pictures[0]
    pictures[:, 4] = -pictures[:, 4].abs()
    pictures[3] = torch.tensor([0, 0, 0, 0, 1.0])
    return pictures[IMAGES].to(dtype), LABELS


def others(i, labels):
    """The positives and the negatives of image i, two lists of indices."""
    positives = [j for j in range(len(labels)) if labels[j] == labels[i] and j != i]
    negatives = [j for j in range(len(labels)) if labels[j] != labels[i]]
    return positives, negatives


def all_triplets(labels):
    """Every valid (a, p, n), as three tensors."""
    triplets = []
    for a in range(len(labels)):
        triplets += itertools.product([a], *others(a, labels))
    return torch.tensor(triplets).unbind(1)


def value_of(loss, embeddings, labels):
    """A loss of a batch, given all triplets if it takes any."""
    arguments = {"embeddings": embeddings, "labels": labels}
    if isinstance(loss, (Triplet, Margin)):
        arguments["triplets"] = all_triplets(labels)
    return loss(**arguments)


def make_objective(name, miner="random"):
    """The loss as a run has it, for embeddings of `batch`."""
    loss = make_loss(name, 4, 5, "class")
    return Objective(loss, miner if name in MINED else None)


EVERY_LOSS = parametrize("name", LOSSES)
EVERY_MINER = parametrize("name", MINERS)
WITH_MINER = [(name, miner) for name in MINED for miner in MINERS]
WITHOUT_MINER = [(name, None) for name in LOSSES if name not in MINED]
EVERY_OBJECTIVE = parametrize("name, miner", WITH_MINER + WITHOUT_MINER)


# ----------------------------------------------------------------------------- slow references
# Pair by pair, as the formulas have them, in tensors so that autograd follows. norm() has the
# gradient 0 at 0, where two copies are.


def distance(u, v):
    return (u - v).norm()


def cosine(u, v):
    return F.cosine_similarity(u, v, dim=0)


def slow_triplet(loss, x, y):
    z = F.normalize(x)
    summands = []
    for a, p, n in zip(*all_triplets(y)):
        difference = distance(z[a], z[p]) ** 2 - distance(z[a], z[n]) ** 2
        summands.append(F.relu(difference + loss.margin))
    return sum(summands) / len(summands)


def slow_margin(loss, x, y):
    z = F.normalize(x)
    total, num_active = 0, 0
    for a, p, n in zip(*all_triplets(y)):
        beta = loss.beta[y[a]] if loss.beta.dim() else loss.beta
        pull = F.relu(distance(z[a], z[p]) - beta + loss.margin)
        push = F.relu(beta - distance(z[a], z[n]) + loss.margin)
        total = total + pull + push + loss.nu * beta
        num_active += int(pull > 0) + int(push > 0)
    return total / num_active


def slow_lifted(loss, x, y):
    summands = []
    for i in range(len(x)):
        positives, negatives = others(i, y)
        for j in positives:
            pairs = itertools.product([i, j], negatives)
            push = sum((loss.alpha - distance(x[s], x[k])).exp() for s, k in pairs)
            summands.append(F.relu(push.log() + distance(x[i], x[j])) ** 2)
    return sum(summands) / (2 * len(summands))


def slow_genlifted(loss, x, y):
    summands = []
    for i in range(len(x)):
        positives, negatives = others(i, y)
        pull = sum(distance(x[i], x[p]).exp() for p in positives)
        push = sum((loss.alpha - distance(x[i], x[n])).exp() for n in negatives)
        if positives:
            summands.append(F.relu(pull.log() + push.log()))
    return sum(summands) / len(summands) + loss.weight * sum(row.norm() for row in x) / len(x)


def slow_multisimilarity(loss, x, y):
    total = 0
    for i in range(len(x)):
        positives, negatives = others(i, y)
        S_p = [cosine(x[i], x[p]) for p in positives]
        S_n = [cosine(x[i], x[n]) for n in negatives]
        hard_p = [s for s in S_p if s < max(S_n) + loss.epsilon]
        hard_n = [s for s in S_n if S_p and s > min(S_p) - loss.epsilon]
        pull = 1 + sum((-loss.alpha * (s - loss.threshold)).exp() for s in hard_p)
        push = 1 + sum((loss.beta * (s - loss.threshold)).exp() for s in hard_n)
        if hard_p:
            total = total + pull.log() / loss.alpha + push.log() / loss.beta
    return total / len(x)


def classifier(logit, own_logit=None):
    """The cross-entropy of logits that are functions of loss, e_i and W_c."""
    def value(loss, x, y):
        total = 0
        for e, own in zip(x, y):
            logits = [logit(loss, e, w) for w in loss.proxies]
            logits[own] = (own_logit or logit)(loss, e, loss.proxies[own])
            total = total - torch.stack(logits).log_softmax(0)[own]
        return total / len(x)
    return value


def slow_psi(m, t):
    k = math.floor(m * t.item() / math.pi)
    return (-1) ** k * (m * t).cos() - 2 * k


def sphereface_own(loss, e, w, la=0):
    c = cosine(e, w)
    return e.norm() * (la * c + slow_psi(loss.margin, c.acos())) / (1 + la)


def arcface_own(loss, e, w):
    c, m = cosine(e, w), loss.margin
    if c.acos() <= math.pi - m:
        return loss.scale * (c.acos() + m).cos()
    return loss.scale * (c - m * math.sin(m))


REFERENCES = {
    "triplet": slow_triplet,
    "margin": slow_margin,
    "lifted": slow_lifted,
    "genlifted": slow_genlifted,
    "multisimilarity": slow_multisimilarity,
    "softmax": classifier(lambda loss, e, w: e @ w),
    "normsoftmax": classifier(lambda loss, e, w: cosine(e, w) / loss.temperature),
    "sphereface": classifier(lambda loss, e, w: e.norm() * cosine(e, w), sphereface_own),
    "arcface": classifier(lambda loss, e, w: loss.scale * cosine(e, w), arcface_own),
}


# ----------------------------------------------------------------------------- of all the losses


def assert_is(reference, loss, x, y):
    """Value and gradients, in embeddings and parameters, are those of the reference."""
    variables = [x.requires_grad_(), *loss.parameters()]
    value, expected = value_of(loss, x, y), reference(loss, x, y)
    assert value > 0
    assert_close(value, expected, rtol=1e-9, atol=0)
    gradients = torch.autograd.grad(value, variables)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, variables)):
        assert theirs.abs().max() > 1e-4
        assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@parametrize("name, settings", [
    ("triplet", {"margin": 0.5}),
    ("margin", {"num_classes": 4, "beta": 1.1}),
    ("margin", {"num_classes": 4, "margin": 0.3, "nu": 0.05}),
    ("margin", {"num_classes": 4, "beta": 0.1, "nu": 0.05, "granularity": "global"}),
    ("lifted", {"alpha": 4.0}),
    ("lifted", {"alpha": -2.0}),
    ("genlifted", {"alpha": -1.0, "weight": 0.1}),
    ("multisimilarity", {}),
    ("multisimilarity", {"alpha": 3.0, "beta": 7.0, "threshold": 0.2, "epsilon": 0.15}),
    ("softmax", SIZES),
    ("normsoftmax", {**SIZES, "temperature": 0.3}),
    *(("sphereface", {**SIZES, "margin": m}) for m in (1, 2, 3, 4.0, 5)),
    ("arcface", SIZES),
    ("arcface", {**SIZES, "scale": 4.0, "margin": 1.5}),
])
def test_value_and_gradients_are_those_of_the_formula(name, settings):
    loss = LOSSES[name](**settings).double()
    assert_is(REFERENCES[name], loss, *batch())


def nothing_to_rank():
    """Batches of one class, of classes with one image each, and of one image."""
    x, y = batch(torch.float32)
    return [(x, torch.zeros_like(y)), (x[:4], torch.arange(4)), (x[:1], y[:1])]


@EVERY_OBJECTIVE
def test_degenerate_batches_have_a_finite_loss_and_gradient(name, miner):
    """Also copies in two classes, all embeddings alike, and all of them 0."""
    objective = make_objective(name, miner)
    x, y = batch(torch.float32)
    mislabelled = y.where(y > 0, torch.arange(10) % 2)
    alike = x[:1].repeat(10, 1)
    batches = [(x, mislabelled), (alike, y), (torch.zeros_like(x), y)]
    for x, y in nothing_to_rank() + batches:
        value = objective.losses(x.requires_grad_(), y)[name]
        assert value.isfinite()
        for gradient in torch.autograd.grad(value, [x, *objective.parameters()]):
            assert gradient.isfinite().all()
        objective.diagnostics(x, y)


@EVERY_OBJECTIVE
def test_without_anything_to_rank_the_loss_is_0_or_genlifteds_penalty(name, miner):
    objective = make_objective(name, miner)
    if not isinstance(objective.loss, objectives.Ranking):
        return
    for x, y in nothing_to_rank():
        value = objective.losses(x.requires_grad_(), y)[name]
        penalty = getattr(objective.loss, "weight", 0) * x.norm(dim=1).mean()
        assert_close(value, penalty)
        gradients = (torch.autograd.grad(loss, x)[0] for loss in (value, penalty))
        assert_close(*gradients)


@EVERY_LOSS
def test_losses_compute_in_float32_under_autocast_and_of_half_precision(name):
    (x, y), loss = batch(torch.bfloat16), make_objective(name).loss.eval()
    expected = value_of(loss, x.float(), y)
    assert expected.dtype == torch.float32
    assert torch.equal(value_of(loss, x, y), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(value_of(loss, x.float(), y), expected)


@EVERY_OBJECTIVE
def test_losses_and_miners_make_no_tensor_on_another_device(name, miner):
    """What is made without naming a device lands on `meta`, and does not mix with the batch."""
    (x, y), objective = batch(torch.float32), make_objective(name, miner)
    with torch.device("meta"):
        assert objective.losses(x, y)[name].device.type == "cpu"
        objective.diagnostics(x, y)


@parametrize("change", [
    lambda a, p, n: (a[:, None], p[:, None], n[:, None]),
    lambda a, p, n: (a, p, n[:1]),
    lambda a, p, n: (a, p),
    lambda a, p, n: torch.stack([a, p, n], dim=1),
])
@parametrize("name", ["triplet", "margin"])
def test_triplets_of_other_shapes_are_refused(name, change):
    (x, y), loss = batch(torch.float32), make_objective(name).loss
    a, p, n = all_triplets(y)
    small = tuple(index.to(torch.uint8) for index in (a, p, n))
    assert torch.equal(loss(x, y, small), loss(x, y, (a, p, n)))
    with refused(r"triplets must be three index tensors \(T,\)", ValueError):
        loss(x, y, change(a, p, n))


@parametrize("granularity", ["class", "global"])
def test_a_boundary_that_is_not_finite_makes_the_loss_nan(granularity):
    (x, y), loss = batch(torch.float32), Margin(4, granularity=granularity)
    loss.beta.data.fill_(math.nan)
    assert loss(x, y, all_triplets(y)).isnan()


def test_what_is_logged_is_computed_in_float32_under_autocast():
    for name in LOSSES:
        (x, y), objective = batch(torch.float32), make_objective(name)
        torch.manual_seed(0)
        expected = objective.diagnostics(x, y)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            assert objective.diagnostics(x, y) == expected


def test_a_loss_of_ones_own_is_registered_in_one_place(monkeypatch):
    class Own(Softmax):
        pass

    monkeypatch.setitem(LOSSES, "own", Own)
    args = types.SimpleNamespace(loss="own", weights="none", dataset="toy")
    assert objectives.preset(args) == objectives.preset(
        types.SimpleNamespace(loss="softmax", weights="none", dataset="toy"))
    assert isinstance(make_loss("own", 4, 5, None), Own)
    with refused("loss must be one of .*, own, not 'other'", ValueError):
        make_loss("other", 4, 5, None)


@EVERY_OBJECTIVE
@not_finite
def test_an_embedding_that_is_not_finite_makes_the_loss_nan(name, miner, bad):
    """Image 9 is in no triplet but as a negative, and seldom mined."""
    objective = make_objective(name, miner)
    for place in ((9, 2), (3, 0), (3,), ()):
        x, y = batch(torch.float32)
        x[place] = bad
        assert objective.losses(x, y)[name].isnan()
    x, y = nothing_to_rank()[1]
    x[0] = bad
    assert objective.losses(x, y)[name].isnan()


@EVERY_OBJECTIVE
@parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_mean_the_same(name, miner, dtype):
    """As many images as classes: uint8 could be taken for a mask."""
    x, y = batch(torch.float32)
    loss = make_loss(name, 10, 5, "class")
    if name == "margin":
        loss.beta.data += torch.arange(10) / 10
    objective = Objective(loss.eval(), miner)
    values = []
    for labels in (y, y.to(dtype)):
        torch.manual_seed(0)
        values.append((objective.losses(x, labels), objective.diagnostics(x, labels)))
    assert_same(*values)


@EVERY_OBJECTIVE
@wrong_batches
def test_wrong_batches_are_one_sentence(name, miner, x, y, error, message):
    objective = make_objective(name, miner)
    functions = [objective.losses, objective.diagnostics]
    if miner:
        triplets = [torch.tensor([i]) for i in (0, 1, 2)]
        functions.append(lambda x, y: objective.loss(x, y, triplets))
        functions.append(lambda x, y: objective.loss.diagnostics(x, y, triplets))
    else:
        functions.append(distance_probabilities)
    for function in functions:
        with refused(message, error):
            function(x, y)


@parametrize("name", LEARNED)
@parametrize("label", [4, -1, -100])
def test_labels_that_are_no_class_are_one_sentence(name, label):
    """The ranking losses without parameters take any integers."""
    x, y = torch.randn(4, 5), torch.tensor([0, 0, label, label])
    with refused("labels must lie in 0 .. 3", ValueError):
        make_objective(name).losses(x, y)
    for loss in (
        Triplet(),
        MultiSimilarity(),
        Margin(4, granularity="global"),
    ):
        assert value_of(loss, x, y).isfinite()


@EVERY_LOSS
def test_embeddings_and_loss_of_two_precisions_compute_in_the_higher(name):
    (x, y), loss = batch(), make_objective(name).loss.eval()
    expected = value_of(copy.deepcopy(loss).double(), x, y)
    assert_close(value_of(loss.float(), x, y), expected)
    assert value_of(loss.bfloat16(), x.float(), y).dtype == torch.float32


@parametrize("name, option, value, message", [
    ("margin", "granularity", "Class", "one of global, class"),
    ("margin", "granularity", None, "one of global, class"),
    ("arcface", "margin", 28.6, "at least 0 and below 3.142, not"),
    ("arcface", "margin", -0.5, "at least 0"),
    ("arcface", "margin", math.pi, "at least 0"),
    ("arcface", "scale", 0, "above 0"),
    ("normsoftmax", "temperature", -0.05, "above 0"),
    ("normsoftmax", "temperature", 0, "above 0"),
    ("multisimilarity", "alpha", -2, "above 0"),
    ("multisimilarity", "beta", 0, "above 0"),
    ("genlifted", "weight", -1, "at least 0"),
])
def test_arguments_that_would_be_misread_are_named(name, option, value, message):
    sizes = {"margin": [3], "arcface": [3, 4], "normsoftmax": [3, 4]}.get(name, [])
    with refused(f"^{option} must be {message}", ValueError):
        LOSSES[name](*sizes, **{option: value})


def test_a_miner_that_is_not_known_is_named():
    with refused("miner must be one of random, semihard, nearest, distance, not", ValueError):
        Objective(Triplet(), "Random")


@EVERY_LOSS
def test_an_objective_has_its_losss_name_and_parameters(name):
    objective = make_objective(name)
    objective.loss_lr = 0.25
    assert list(objective.losses(*batch(torch.float32))) == [name]
    parameters = list(objective.loss.parameters())
    assert len(parameters) == (name in LEARNED)
    groups = [{"params": parameters, "lr": 0.25}] if parameters else []
    assert objective.param_groups() == groups


# --------------------------------------------------------------------------------------- ranking


def test_margin_is_zero_where_nothing_is_active():
    x = torch.eye(2).repeat_interleave(2, 0).requires_grad_()
    y = torch.tensor([0, 0, 1, 1])
    loss = Margin(2, beta=1, nu=0.1)
    value = loss(x, y, all_triplets(y))
    gradients = torch.autograd.grad(value, [x, loss.beta])
    assert value == 0 and not any(gradient.any() for gradient in gradients)


def test_lifted_distances_of_near_copies_are_exact_in_float32():
    """Above 25 rows cdist would by itself take a matrix product."""
    x = 100 * torch.randn(30, 64)
    near = x + 1e-3 * torch.randn(30, 64)
    d = objectives.unnormalised_distances(torch.cat([x, near]))
    expected = (x.double() - near.double()).norm(dim=1)
    assert_close(d[:30, 30:].diagonal().double(), expected, rtol=1e-5, atol=0)


def test_multisimilarity_keeps_pairs_of_both_kinds_or_of_none():
    """Anchors that keep none have nothing more to learn."""
    y = torch.arange(8).repeat_interleave(3)
    x = F.normalize(torch.randn(8, 6))[y] + 0.25 * torch.randn(24, 6)
    x = x.double().requires_grad_()
    loss = MultiSimilarity()
    S = F.normalize(x) @ F.normalize(x).T
    same_class = y[:, None] == y
    farthest_positive = S.masked_fill(~same_class, 9).amin(1)
    nearest_negative = S.masked_fill(same_class, -9).amax(1)
    kept = farthest_positive < nearest_negative + loss.epsilon
    assert 0 < kept.sum() < 24
    assert torch.equal(loss.summands(x, y) > 0, kept)
    assert not torch.autograd.grad(loss.summands(x, y)[~kept].sum(), x)[0].any()
    assert_is(slow_multisimilarity, loss, x, y)


# -------------------------------------------------------------------------------- classification

ANGLES = torch.linspace(0, math.pi, 4001, dtype=torch.float64)


@parametrize("name", ["softmax", "normsoftmax", "sphereface", "arcface"])
def test_class_vectors_start_uniform_within_one_over_root_d(name):
    proxies = make_loss(name, 300, 64, None).proxies.detach()
    assert proxies.shape == (300, 64)
    uniform = scipy.stats.uniform(-1 / 8, 2 / 8)
    assert scipy.stats.kstest(proxies.flatten(), uniform.cdf).pvalue > 1e-3
    assert proxies.abs().max() <= 1 / 8


@parametrize("kind, m", [
    *((SphereFace, m) for m in (1, 2, 3, 4, 7)),
    *((ArcFace, m) for m in (0.5, 1.5)),
])
def test_the_own_logit_falls_as_the_angle_grows(kind, m):
    x = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
    loss = kind(1, 2, margin=m).double()
    loss.proxies.data[:] = torch.tensor([1.0, 0.0])
    own_logit = loss.logits(x, torch.zeros(4001, dtype=torch.long)).detach()
    assert (own_logit.diff(dim=0) < 1e-12).all()


@parametrize("m", [1, 2, 3, 4, 7])
def test_psi_is_continuous_from_1_to_1_minus_2m(m):
    c = ANGLES.cos().requires_grad_()
    psi = SphereFace(2, 2, margin=m).psi(c)
    assert psi[0].item() == pytest.approx(1)
    assert psi[-1].item() == pytest.approx(1 - 2 * m)
    assert psi.diff().abs().max() < 1.01 * m * math.pi / 4000
    # k is m - 1 at pi as well, where the slope in c is m^2.
    assert torch.autograd.grad(psi.sum(), c)[0][-1].item() == pytest.approx(m * m)


@parametrize("step, la", [(0, 1000), (1, 1000 / 1.12), (2, 1000 / 1.24), (10 ** 6, 5)])
def test_sphereface_anneals_from_the_softmax_to_its_margin(step, la):
    """By the number of training steps, which is saved."""
    loss = SphereFace(4, 5, annealing=True).double()
    loss.load_state_dict({**loss.state_dict(), "step": torch.tensor(step)})
    annealed = classifier(
        lambda loss, e, w: e.norm() * cosine(e, w),
        lambda loss, e, w: sphereface_own(loss, e, w, la),
    )
    assert_is(annealed, loss.eval(), *batch())
    assert_is(annealed, loss.train(), *batch())
    assert loss.state_dict()["step"] == step + 1


@parametrize("margin", [0, -1, 2.5])
def test_sphereface_takes_whole_margins_only(margin):
    with refused("whole numbers", ValueError):
        SphereFace(3, 3, margin=margin)


@parametrize("dtype", [torch.float32, torch.float64])
@parametrize("kind", [SphereFace, ArcFace])
def test_embeddings_on_and_opposite_to_their_class_vector_have_finite_gradients(kind, dtype):
    loss = kind(200, 64).to(dtype)
    x = torch.cat([loss.proxies, -loss.proxies]).detach().requires_grad_()
    value = loss(x, torch.arange(200).repeat(2))
    for gradient in torch.autograd.grad(value, [x, loss.proxies]):
        assert gradient.isfinite().all()


# ---------------------------------------------------------------------------------------- miners
# A reference gives the weights with which negatives at the distances d_an are drawn.


def slow_random(d_ap, d_an, D):
    return [1.0] * len(d_an)


def slow_semihard(d_ap, d_an, D, margin=0.2):
    window = [float(d_ap < d < d_ap + margin) for d in d_an]
    return window if any(window) else [1.0] * len(d_an)


def slow_nearest(d_ap, d_an, D):
    beyond = [d for d in d_an if d > d_ap]
    chosen = min(beyond) if beyond else max(d_an)
    return [float(d == chosen) for d in d_an]


def slow_distance(d_ap, d_an, D, lower=0.5, upper=1.4):
    weights = [0.0] * len(d_an)
    for i, d in enumerate(d_an):
        if d < upper:
            d = max(d, lower)
            weights[i] = d ** (2 - D) * (1 - d * d / 4) ** ((3 - D) / 2)
    return weights if any(weights) else [1.0] * len(d_an)


def assert_drawn_from(expected, found):
    """Pearson's test, over all that is expected five times or more."""
    assert not found[expected == 0].any()
    often = expected >= 5
    statistic = ((found - expected).square() / expected)[often].sum()
    assert scipy.stats.chi2.sf(statistic, often.sum()) > 1e-3


def test_columns_are_chosen_in_proportion_to_their_weights():
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    chosen = objectives.sample_column(weights.expand(20_000, 5), None)
    assert_drawn_from(20_000 * weights / weights.sum(), chosen.bincount(minlength=5))


@parametrize("name, reference, options", [
    ("random", slow_random, {}),
    ("semihard", slow_semihard, {}),
    ("semihard", slow_semihard, {"margin": 0.5}),
    ("nearest", slow_nearest, {}),
    ("distance", slow_distance, {}),
    ("distance", slow_distance, {"lower": 1.0, "upper": 1.2}),
])
def test_miners_draw_a_uniform_positive_and_their_negative(name, reference, options):
    """One triplet for each anchor that has any. Negatives of one image count as one."""
    x, y = batch()
    d = torch.cdist(F.normalize(x), F.normalize(x)).tolist()
    expected = torch.zeros(10, 10, 8)           # (a, p, image of n)
    for a in range(10):
        positives, negatives = others(a, y)
        d_an = [d[a][n] for n in negatives]
        for p in positives:
            weights = torch.tensor(reference(d[a][p], d_an, 5, **options))
            probabilities = weights / weights.sum() / len(positives)
            expected[a, p].index_add_(0, IMAGES[negatives], probabilities)
    found = torch.zeros_like(expected)
    rng = seeded()
    for _ in range(600):
        a, p, n = MINERS[name](x, y, **options, generator=rng)
        assert a.tolist() == list(range(9))
        found[a, p, IMAGES[n]] += 1
    assert_drawn_from(600 * expected, found)


@EVERY_MINER
@parametrize("u", [0.0, 2 ** -24, 1 - 2 ** -24])
def test_miners_choose_right_whatever_is_drawn(name, u, monkeypatch):
    """Of torch.rand in float32 these are the lowest numbers and the highest."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, u))
    x, y = torch.randn(12, 5), torch.arange(12) % 4
    a, p, n = MINERS[name](x, y)
    assert len(a) == 12
    assert (y[a] == y[p]).all() and (a != p).all() and (y[a] != y[n]).all()


@parametrize("mine", [objectives.mine_semihard, mine_nearest])
def test_a_copy_of_the_positive_is_not_beyond_it(mine):
    """Only image 3 is."""
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, 0.6], [0.7, 0.7]])
    y = torch.tensor([0, 0, 1, 2])
    assert {mine(x, y)[2][0].item() for _ in range(30)} == {3}


@EVERY_MINER
def test_without_a_positive_or_a_negative_miners_return_empty_tensors(name):
    x, y = batch()
    for labels in (torch.zeros_like(y), torch.arange(len(y))):
        for index in MINERS[name](x, labels):
            assert index.shape == (0,) and index.dtype == torch.long


@EVERY_MINER
def test_a_generator_fixes_the_triplets_and_nothing_else_is_drawn(name):
    before = torch.get_rng_state()
    assert_same(*(MINERS[name](*batch(), generator=seeded(3)) for _ in range(2)))
    assert torch.equal(torch.get_rng_state(), before)


@parametrize("D", [2, 3, 8, 128])
def test_distance_probabilities_are_inverse_to_the_spheres_density(D):
    """Of distances from 0, where there are copies, to 2."""
    x = torch.randn(24, D).double() / D ** 0.5
    x[:, 0] += torch.linspace(-4, 4, 24)
    x[5], x[6], x[7] = x[4], x[0], -x[0]
    y = torch.arange(24) % 7
    d = torch.cdist(F.normalize(x), F.normalize(x)).tolist()
    for cutoffs in ({}, {"lower": 0.7, "upper": 1.0}):
        expected = torch.zeros(24, 24).double()
        for a in range(24):
            _, negatives = others(a, y)
            weights = slow_distance(0, [d[a][n] for n in negatives], D, **cutoffs)
            expected[a, negatives] = torch.tensor(weights, dtype=torch.float64)
        expected /= expected.sum(1, keepdim=True)
        found = distance_probabilities(x, y, **cutoffs)
        assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_distance_rows_neither_vanish_nor_overflow_in_512_dimensions():
    x, y = torch.randn(112, 512), torch.arange(56).repeat_interleave(2)
    # The weight of this pair is e^200 times all the others.
    x[2] = x[0] + 0.3 * torch.randn(512)
    p = distance_probabilities(x, y)
    assert_close(p.sum(1), torch.ones(112))
    inside = (objectives.distances(x) < 1.4) & (y[:, None] != y)
    assert p[0, 2] == 1 and inside.any(1).sum() > 50
    assert not p[~inside & inside.any(1, keepdim=True)].any()


def test_opposite_images_have_finite_probabilities_and_without_negatives_there_are_none():
    x = torch.eye(8)[[0, 0, 1, 0]] * torch.tensor([[1.0], [1.0], [1.0], [-1.0]])
    p = distance_probabilities(x, torch.tensor([0, 0, 1, 1]), upper=2.1)
    assert_close(p.sum(1), torch.ones(4))
    assert not distance_probabilities(x, torch.zeros(4).long()).any()


def test_miners_take_half_precision_and_give_no_gradient():
    x, y = batch(torch.bfloat16)
    p = distance_probabilities(x.requires_grad_(), y)
    assert not p.requires_grad
    assert_close(p, distance_probabilities(x.float(), y))


@parametrize("loss", [Triplet(0.7), Margin(4, margin=0.4)])
def test_the_semihard_window_of_an_objective_is_the_losss_margin(loss, monkeypatch):
    def mine(embeddings, labels, margin):
        assert margin == loss.margin
        return all_triplets(labels)

    monkeypatch.setitem(MINERS, "semihard", mine)
    Objective(loss, "semihard").losses(*batch())


# --------------------------------------------------------------------------------------- the log


def test_the_log_has_the_fraction_of_active_summands_and_the_mean_boundary():
    x, y = batch()
    a, p, n = all_triplets(y)
    z = F.normalize(x)
    difference = (z[a] - z[p]).square().sum(1) - (z[a] - z[n]).square().sum(1)
    active = (difference + 0.2 > 0).double().mean()
    found = Triplet().diagnostics(x, y, (a, p, n))["active"]
    assert 0.1 < active < 0.9 and found.item() == pytest.approx(active.item())
    margin = make_objective("margin", "nearest")
    margin.loss.beta.data[:] = torch.tensor([1.0, 2, 3, 6])
    logged = margin.diagnostics(x, y)
    assert logged.keys() == {"active", "boundary", "mined_distance"} and logged["boundary"] == 3


def test_the_log_has_the_mean_distance_of_the_mined_negatives():
    """With two images a class there is one choice of the positive."""
    x, y = batch()
    x, y = x[[1, 2, 5, 6]], y[[1, 2, 5, 6]]
    a, _, n = mine_nearest(x, y)
    z = F.normalize(x)
    logged = make_objective("triplet", "nearest").diagnostics(x, y)
    assert logged["mined_distance"] == pytest.approx((z[a] - z[n]).norm(dim=1).mean().item())


def test_the_log_has_the_mean_angle_to_the_own_class_in_degrees():
    x, y = batch()
    objective = make_objective("arcface").double()
    proxies = objective.loss.proxies
    angle = F.cosine_similarity(x, proxies[y]).acos().mean().item() * 180 / math.pi
    assert objective.diagnostics(x, y) == pytest.approx({"own_angle": angle})
    # Some cosines round to more than 1.
    many = objectives.Softmax(200, 64)
    logged = Objective(many).diagnostics(many.proxies, torch.arange(200))
    assert logged["own_angle"] == pytest.approx(0, abs=0.1)
    assert isinstance(logged["own_angle"], float)


# ---------------------------------------------------------------------------------- the settings

PUBLISHED = {
    # miner, boundaries, loss_lr, constants
    "triplet": ("distance", None, None, {"margin": 0.2}),
    "margin": ("distance", "class", 5e-4, {"margin": 0.2, "nu": 0.0}),
    "lifted": (None, None, None, {"alpha": 1.0}),
    "genlifted": (None, None, None, {"alpha": 1.0, "weight": 0.005}),
    "multisimilarity": (
        None, None, None, {"alpha": 2, "beta": 40, "threshold": 0.5, "epsilon": 0.1},
    ),
    "softmax": (None, None, 5e-4, {}),
    "normsoftmax": (None, None, 1e-5, {"temperature": 0.05}),
    "sphereface": (None, None, 5e-4, {"margin": 4, "annealing": True}),
    "arcface": (None, None, 5e-4, {"scale": 16, "margin": 0.5}),
}


@parametrize("dataset", ["cub200", "cars196", "sop"])
@EVERY_LOSS
def test_a_run_is_the_published_protocols(name, dataset, monkeypatch):
    miner, beta, loss_lr, constants = PUBLISHED[name]
    if (name, dataset) == ("normsoftmax", "sop"):
        loss_lr = 2e-3
    expected = {
        "arch": "resnet50", "weights": "imagenet", "embed_dim": 128, "weight_decay": 4e-4,
        "epochs": 100 if dataset == "sop" else 150, "usual_batch_size": 112,
        "lr": 1e-5, "lr_steps": [], "warmup": 0,
        "miner": miner, "beta": beta, "loss_lr": loss_lr,
    }
    argv = ["--dataset", dataset, "--loss", name]
    args, make_criterion, _ = started(monkeypatch, objectives, *argv)
    assert {option: getattr(args, option) for option in expected} == expected
    criterion = make_criterion(7)
    assert type(criterion.loss) is LOSSES[name]
    assert {key: getattr(criterion.loss, key) for key in constants} == constants
    assert (criterion.miner, criterion.loss_lr) == (miner, loss_lr)
    for parameter in criterion.parameters():
        assert parameter.shape == ((7,) if name == "margin" else (7, 128))
    if name == "margin":
        assert (criterion.loss.beta == 1.2).all()


@EVERY_LOSS
def test_without_pretrained_weights_a_run_is_nirs_but_for_the_rates(name):
    for dataset in ("toy", "folder", "cub200", "sop"):
        args = argparse.Namespace(dataset=dataset, weights="none", loss=name, nir_weight=None)
        ours, of_nir = objectives.preset(args), nir.preset(args)
        for option in ("batch_size", "epochs", "lr_steps", "lr_gamma", "warmup"):
            assert ours[option] == of_nir[option]
        miner, beta, loss_lr, _ = PUBLISHED[name]
        assert (ours["miner"], ours["beta"]) == (miner, beta)
        lr = 3e-4 if name == "arcface" else 3e-3
        if loss_lr is not None:
            loss_lr = pytest.approx(lr if name == "margin" else 10 * lr)
        assert (ours["lr"], ours["loss_lr"]) == (lr, loss_lr)


def test_the_command_line_chooses_loss_miner_boundary_and_rate(monkeypatch):
    for argv, name in [
        ("--loss arcface", "toy-arcface-seed0"),
        ("", "toy-margin-class-distance-seed0"),
        ("--beta global --miner semihard --loss_lr 0.3", "toy-margin-global-semihard-seed0"),
    ]:
        argv = ["--dataset", "toy", *argv.split()]
        _, make_criterion, found = started(monkeypatch, objectives, *argv)
        assert found == name
    criterion = make_criterion(7)
    assert criterion.loss.beta.shape == ()
    assert (criterion.miner, criterion.loss_lr) == ("semihard", 0.3)


@parametrize("argv, message", [
    ("--loss contrastive", "invalid choice: 'contrastive'"),
    ("--miner hard", "invalid choice: 'hard'"),
    ("--beta image", "invalid choice: 'image'"),
    ("--loss_lr 0", "0 is not above 0"),
    ("--loss lifted --miner distance",
     "--miner distance means nothing to --loss lifted, only to triplet, margin: leave it out"),
    ("--loss triplet --beta class", "--beta class means nothing to --loss triplet, only to margin"),
    ("--loss lifted --loss_lr 0.2", "--loss_lr 0.2 means nothing to --loss lifted"),
])
def test_mistakes_are_one_sentence(argv, message, capsys, monkeypatch, tmp_path):
    """The script is run as by a user; it does not come to the training."""
    monkeypatch.setattr(common, "train", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["objectives.py", "--dataset", "toy", *argv.split()])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(objectives.__file__, run_name="__main__")
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.count("error: ") == 1
    assert not list(tmp_path.iterdir())


@parametrize("loss, expected", [
    ("sphereface", "loss_lr 0.03, SphereFace.margin 4, SphereFace.annealing True"),
    ("margin", "miner distance, beta class, distance_probabilities.upper 1.4"),
])
def test_help_shows_the_settings_of_the_loss_that_is_given(loss, expected, capsys):
    with pytest.raises(SystemExit):
        objectives.main(["--dataset", "toy", "--loss", loss, "--help"])
    text = capsys.readouterr().out
    shown = [line.split() for line in text.splitlines()]
    for setting in expected.split(", "):
        assert setting.split() in shown
    # It is --beta.
    assert "granularity" not in text


# -------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def small_toy():
    return data.load_toy(classes=24, per_class=20)


@pytest.fixture
def train(monkeypatch):
    """A function that trains on images of 16 x 16. Recall@1 is the only metric."""
    def recall(embeddings, labels, ks):
        return {"recall@1": evaluate.recall_at_k(embeddings, labels, [1])[1]}

    def run(toy, out, *argv):
        monkeypatch.setattr(data, "load_toy", lambda: toy)
        options = "--dataset toy --image_size 16 --device cpu --out".split()
        objectives.main([*options, str(out), *argv])
        return read_checkpoint(out / "last.pt")

    monkeypatch.setattr(evaluate, "all_metrics", recall)
    return run


@parametrize("argv", [
    "triplet --miner random", "triplet --miner semihard", "margin --miner nearest --beta global",
    "margin", "lifted", "genlifted", "multisimilarity", "softmax", "normsoftmax", "sphereface",
    "arcface",
])
def test_every_objective_trains_and_resumes_bit_identically(argv, small_toy, train, tmp_path, monkeypatch):
    save = common.save_file

    def keep_the_first_epoch(path, content):
        save(path, content)
        if path.name == "log.csv" and content.count("\n") == 2:
            shutil.copytree(tmp_path / "whole", tmp_path / "stopped")

    monkeypatch.setattr(common, "save_file", keep_the_first_epoch)
    options = f"--batch_size 24 --epochs 2 --loss {argv}".split()
    whole = train(small_toy, tmp_path / "whole", *options)
    stopped = tmp_path / "stopped/last.pt"
    first = read_checkpoint(stopped)
    assert first["epoch"] == 1
    for part in ("network", "criterion"):
        for name, value in whole[part].items():
            assert (value != first[part][name]).any()

    torch.manual_seed(12345)
    objectives.main(["--resume", str(stopped)])
    assert_same(read_checkpoint(stopped), whole)


@parametrize("loss, epochs", [("margin", 2), ("multisimilarity", 2), ("arcface", 4)])
def test_toy_training_beats_an_untrained_network_by_20_points(loss, epochs, toy, train, tmp_path):
    saved = train(toy, tmp_path, "--epochs", str(epochs), "--loss", loss)
    args = argparse.Namespace(**saved["args"])
    torch.manual_seed(args.seed)
    network = common.build_network(args)
    untrained = common.recall_at_1(network, toy[1], args, torch.device("cpu"))
    trained = read_json(tmp_path / "results.json")["last"]["recall@1"]
    assert untrained < 0.35 and trained > untrained + 0.2
