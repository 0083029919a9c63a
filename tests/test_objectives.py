"""Losses against slow references written from the formulas, miners against their distributions; every objective trains."""
import argparse
import itertools
import json
import math
import shutil
import subprocess
import sys
import textwrap

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from test_common import ROOT, assert_same, run, started

import common
import data
import evaluate
import nir
import objectives

LABELS = torch.tensor([0, 0, 1, 2, 2, 2, 0, 1, 3])                               # the last class has one image


def batch(D=5, dtype=torch.float64, scale=3.0):
    torch.manual_seed(0)
    return torch.randn(len(LABELS), D, dtype=dtype) * scale, LABELS


def all_triplets(labels):
    """Every valid (a, p, n), by a triple loop."""
    indices = range(len(labels))
    found = [(a, p, n) for a, p, n in itertools.product(indices, indices, indices)
             if a != p and labels[a] == labels[p] and labels[a] != labels[n]]
    return tuple(torch.tensor(index) for index in zip(*found))


def call(loss, x, y):
    """A loss of a batch, given all its triplets if it takes any."""
    return loss(x, y, all_triplets(y)) if isinstance(loss, (objectives.Triplet, objectives.Margin)) else loss(x, y)


# ------------------------------------------------------------------------------------------------ slow references
# Numbers one by one, as the formulas have them, but tensors so that autograd follows.

def relu(value):
    return value if value > 0 else 0 * value


def on_sphere(x):
    return [row / row.square().sum().sqrt() for row in x]


def distance(u, v):
    return (u - v).square().sum().sqrt()


def slow_triplet(loss, x, y):
    z, values = on_sphere(x), []
    for a, p, n in zip(*all_triplets(y)):
        values.append(relu(distance(z[a], z[p]) ** 2 - distance(z[a], z[n]) ** 2 + loss.margin))
    return sum(values) / len(values)


def slow_margin(loss, x, y):
    z, total, count = on_sphere(x), 0, 0
    for a, p, n in zip(*all_triplets(y)):
        beta = loss.beta[y[a]] if loss.beta.dim() else loss.beta
        pull, push = distance(z[a], z[p]) - beta + loss.margin, beta - distance(z[a], z[n]) + loss.margin
        total, count = total + relu(pull) + relu(push) + loss.nu * beta, count + (pull > 0).item() + (push > 0).item()
    return total / count


def slow_lifted(loss, x, y):
    total, count = 0, 0
    for i, j in itertools.combinations(range(len(x)), 2):
        if y[i] == y[j]:
            negatives = [(loss.alpha - distance(x[s], x[k])).exp() for s in (i, j) for k in range(len(x)) if y[k] != y[s]]
            total, count = total + relu(sum(negatives).log() + distance(x[i], x[j])) ** 2, count + 1
    return total / (2 * count)


def slow_genlifted(loss, x, y):
    values = []
    for i in range(len(x)):
        positives = [distance(x[i], x[k]).exp() for k in range(len(x)) if k != i and y[k] == y[i]]
        negatives = [(loss.alpha - distance(x[i], x[k])).exp() for k in range(len(x)) if y[k] != y[i]]
        if positives:
            values.append(relu(sum(positives).log() + sum(negatives).log()))
    return sum(values) / len(values) + loss.weight * sum(row.square().sum().sqrt() for row in x) / len(x)


def slow_multisimilarity(loss, x, y):
    z, total = on_sphere(x), 0
    for i in range(len(x)):
        positives = [z[i] @ z[k] for k in range(len(x)) if k != i and y[k] == y[i]]
        negatives = [z[i] @ z[k] for k in range(len(x)) if y[k] != y[i]]
        if positives and negatives:
            kept = [[s for s in positives if s < max(negatives) + loss.epsilon],
                    [s for s in negatives if s > min(positives) - loss.epsilon]]
            for similarities, factor in zip(kept, (-loss.alpha, loss.beta)):
                inner = 1 + sum((factor * (s - loss.threshold)).exp() for s in similarities)
                total = total + torch.as_tensor(inner).log() / abs(factor)
    return total / len(x)


def slow_classifier(logit, own_logit):
    def loss_value(loss, x, y):
        W, total = loss.proxies, 0
        for i in range(len(x)):
            logits = []
            for c in range(len(W)):
                length, cosine = x[i].square().sum().sqrt(), F.cosine_similarity(x[i], W[c], dim=0)
                logits.append((own_logit if c == y[i] else logit)(loss, length, cosine, x[i] @ W[c]))
            total = total - (logits[y[i]].exp() / sum(value.exp() for value in logits)).log()
        return total / len(x)
    return loss_value


def slow_psi(loss, length, cosine, _):
    theta, m = cosine.acos(), loss.margin
    k = next(k for k in range(m) if k * math.pi / m <= theta <= (k + 1) * math.pi / m)
    return length * ((-1) ** k * (m * theta).cos() - 2 * k)


def slow_annealed(loss, length, cosine, _):                              # the third call: la = 1000 / 1.24
    return (1000 / 1.24 * length * cosine + slow_psi(loss, length, cosine, _)) / (1000 / 1.24 + 1)


def slow_arcface(loss, length, cosine, _):
    theta, m = cosine.acos(), loss.margin
    return loss.scale * ((theta + m).cos() if theta <= math.pi - m else cosine - m * math.sin(m))


LOGITS = {"softmax": lambda loss, length, cosine, dot: dot,
          "normsoftmax": lambda loss, length, cosine, dot: cosine / loss.temperature,
          "sphereface": lambda loss, length, cosine, dot: length * cosine,
          "arcface": lambda loss, length, cosine, dot: loss.scale * cosine}


def annealed():
    loss = objectives.SphereFace(4, 5, annealing=True)
    loss.step += 2
    return loss.eval()


CASES = {
    "triplet": (lambda: objectives.Triplet(0.5), slow_triplet),
    "margin": (lambda: objectives.Margin(4, beta=1.1), slow_margin),
    "margin, nu": (lambda: objectives.Margin(4, nu=0.05), slow_margin),
    "margin, global": (lambda: objectives.Margin(4, beta=1.1, nu=0.05, granularity="global"), slow_margin),
    "lifted": (lambda: objectives.Lifted(4.0), slow_lifted), "lifted, some far enough": (lambda: objectives.Lifted(-2.0), slow_lifted),
    "genlifted": (lambda: objectives.GenLifted(2.0, 0.1), slow_genlifted),
    "multisimilarity": (lambda: objectives.MultiSimilarity(3.0, 7.0, 0.2, 0.15), slow_multisimilarity),
    "multisimilarity, default": (objectives.MultiSimilarity, slow_multisimilarity),
    "softmax": (lambda: objectives.Softmax(4, 5), slow_classifier(LOGITS["softmax"], LOGITS["softmax"])),
    "normsoftmax": (lambda: objectives.NormSoftmax(4, 5, 0.3), slow_classifier(LOGITS["normsoftmax"], LOGITS["normsoftmax"])),
    **{f"sphereface, {m}": (lambda m=m: objectives.SphereFace(4, 5, margin=m), slow_classifier(LOGITS["sphereface"], slow_psi))
       for m in (1, 2, 3, 4, 5)},
    "sphereface, annealed": (annealed, slow_classifier(LOGITS["sphereface"], slow_annealed)),
    "arcface": (lambda: objectives.ArcFace(4, 5), slow_classifier(LOGITS["arcface"], slow_arcface)),
    "arcface, wide": (lambda: objectives.ArcFace(4, 5, 4.0, 1.5), slow_classifier(LOGITS["arcface"], slow_arcface))}
LOSSES = {key: make for key, (make, _) in CASES.items() if "," not in key} | {"sphereface": CASES["sphereface, 4"][0]}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_the_formula(case):
    make, slow = CASES[case]
    (x, y), loss = batch(scale=1.0), make().double()
    if case == "lifted, some far enough":                                    # [J]+ is 0 for some pairs
        assert 0 < (loss.summands(x, y) == 0).sum() < len(loss.summands(x, y))
    if case == "arcface, wide":                                              # angles on both sides of pi - m
        own = loss.cosine(x).gather(1, y.unsqueeze(1)).acos()
        assert (own < math.pi - 1.5).any() and (own > math.pi - 1.5).any()
    variables = [x.requires_grad_(), *loss.parameters()]
    value, expected = call(loss, x, y), slow(loss, x, y)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9) and value > 0
    for ours, theirs in zip(torch.autograd.grad(value, variables), torch.autograd.grad(expected, variables)):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


# --------------------------------------------------------------------------------------------- of all the losses

@pytest.mark.parametrize("name", LOSSES)
def test_a_permuted_batch_has_the_same_loss_and_permuted_gradients(name):
    (x, y), loss, order = batch(), LOSSES[name]().double(), torch.randperm(len(LABELS))
    x, shuffled = x.requires_grad_(), x.detach()[order].requires_grad_()
    values = call(loss, x, y), call(loss, shuffled, y[order])
    torch.testing.assert_close(*values)
    for value in values:
        value.backward()
    torch.testing.assert_close(x.grad[order], shuffled.grad)


def hard_batches():
    x, y = batch(dtype=torch.float32)
    copies = x.clone()
    copies[1], copies[7], copies[4] = x[0], x[2], x[0]                       # of the own class and of another one
    return {"one class": (x, torch.zeros_like(y)), "single images": (x[:4], torch.arange(4)), "one image": (x[:1], y[:1]),
            "copies": (copies, y), "collapsed": (x[:1].repeat(len(y), 1), y), "at zero": (torch.zeros_like(x), y)}


@pytest.mark.parametrize("kind", hard_batches())
@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_batches_have_a_finite_loss_and_gradient(name, kind):
    (x, y), loss = hard_batches()[kind], LOSSES[name]()
    for miner in objectives.MINERS if name in objectives.MINED else [None]:
        objective, x = objectives.Objective(loss, miner), x.detach().requires_grad_()
        value = sum(objective.losses(x, y).values())
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in loss.parameters())
        objective.diagnostics(x.detach(), y)
        if kind in ("one class", "single images", "one image", "collapsed") and isinstance(loss, objectives.Ranking):
            penalty = torch.autograd.grad(getattr(loss, "weight", 0) * x.norm(dim=1).mean(), x)[0]
            torch.testing.assert_close(x.grad, penalty, atol=1e-5, rtol=0)               # else nothing to learn
            assert kind == "collapsed" or value.item() == pytest.approx(getattr(loss, "weight", 0) * x.norm(dim=1).mean().item())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_compute_in_float32_under_autocast_and_of_half_precision(name):
    (x, y), loss = batch(dtype=torch.float32), LOSSES[name]()
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(loss, x, y)
    assert inside.dtype == torch.float32 and torch.equal(inside, call(loss, x, y))
    x = x.bfloat16()
    assert call(loss, x, y).dtype == torch.float32 and torch.equal(call(loss, x, y), call(loss, x.float(), y))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_miners_make_no_tensor_on_another_device(name):
    """What is made without naming a device lands on `meta` here, and does not mix with the batch."""
    (x, y), loss = batch(dtype=torch.float32), LOSSES[name]()
    for miner in objectives.MINERS if name in objectives.MINED else [None]:
        objective = objectives.Objective(loss, miner)
        with torch.device("meta"):
            assert all(value.device.type == "cpu" for value in objective.losses(x, y).values())
            objective.diagnostics(x, y)


def test_length_matters_to_lifted_softmax_and_sphereface_alone():
    x, y = batch()
    for name, make in LOSSES.items():
        loss = make().double()
        same = call(loss, x, y).item() == pytest.approx(call(loss, 2 * x, y).item())
        assert same == (name not in ("lifted", "genlifted", "softmax", "sphereface"))


@pytest.mark.parametrize("name, settings", [
    ("triplet", dict(margin=0.2)), ("margin", dict(margin=0.2, nu=0.0)), ("lifted", dict(alpha=1.0)),
    ("genlifted", dict(alpha=1.0, weight=0.005)), ("multisimilarity", dict(alpha=2.0, beta=40.0, threshold=0.5, epsilon=0.1)),
    ("softmax", {}), ("normsoftmax", dict(temperature=0.05)), ("sphereface", dict(margin=4, annealing=True)),
    ("arcface", dict(scale=16.0, margin=0.5))])
def test_a_run_has_the_published_settings(name, settings):
    made = objectives.make_loss(name, 7, 64, "class")
    assert {key: getattr(made, key) for key in settings} == settings


# ------------------------------------------------------------------------------------------------------- ranking

@pytest.mark.parametrize("granularity", ["class", "global"])
def test_a_boundarys_derivative_counts_its_active_parts(granularity):
    x, y = batch(scale=1.0)
    loss = objectives.Margin(4, granularity=granularity).double()
    a, p, n = all_triplets(y)
    z = F.normalize(x)
    pull = (z[a] - z[p]).norm(dim=1) - 1.2 + 0.2 > 0
    push = 1.2 - (z[a] - z[n]).norm(dim=1) + 0.2 > 0
    expected = torch.zeros(4).double().index_add(0, y[a], push.double() - pull.double()) / (pull.sum() + push.sum())
    loss(x, y, (a, p, n)).backward()
    assert expected[:3].abs().min() > 0 and expected[3] == 0                       # class 3 has no positive
    torch.testing.assert_close(loss.beta.grad, expected if granularity == "class" else expected.sum())


def test_margin_is_zero_where_nothing_is_active():
    x = torch.eye(4).double()[[0, 0, 1, 1]].requires_grad_()
    loss, y = objectives.Margin(2, beta=1.0, nu=0.1).double(), torch.tensor([0, 0, 1, 1])
    value = loss(x, y, objectives.mine_random(x, y))
    value.backward()
    assert value == 0 and (x.grad == 0).all() and (loss.beta.grad == 0).all()


def test_losses_take_whole_numbers_and_names():
    x, y = batch()
    assert objectives.Margin(2, beta=1).beta.dtype == torch.float32
    assert objectives.SphereFace(4, 5, margin=4.0).double()(x, y).isfinite()
    assert objectives.Lifted()(embeddings=x, labels=y) == objectives.Lifted()(x, y)


def test_lifted_distances_of_near_copies_are_exact_in_float32():
    torch.manual_seed(0)
    x = 100 * torch.randn(30, 1, 64) + 1e-3 * torch.randn(30, 2, 64)                   # more than cdist's 25 rows
    x = x.flatten(0, 1)
    d = [(x[2 * i] - x[2 * i + 1]).double().norm().item() for i in range(30)]
    ours = objectives.unnormalised_distances(x)
    assert [ours[2 * i, 2 * i + 1].item() for i in range(30)] == pytest.approx(d, rel=1e-5)


def test_multisimilarity_keeps_pairs_of_both_kinds_or_of_none():
    y = torch.arange(8).repeat_interleave(3)
    torch.manual_seed(0)
    x = (F.normalize(torch.randn(8, 6)).repeat_interleave(3, 0) + 0.25 * torch.randn(24, 6)).double().requires_grad_()
    S = F.normalize(x) @ F.normalize(x).T
    positive, negative = objectives.pair_masks(y)
    kept = S.masked_fill(~positive, 9).amin(1) - S.masked_fill(~negative, -9).amax(1) < 0.1
    loss = objectives.MultiSimilarity()
    assert 0 < kept.sum() < 24 and torch.equal(loss.summands(x, y) > 0, kept)
    assert loss(x, y).item() == pytest.approx(slow_multisimilarity(loss, x, y).item(), rel=1e-9)
    within = (S.masked_fill(~negative, -9).amax(1, keepdim=True) - S).abs() < 0.1      # pairs that epsilon decides about
    assert (within & positive)[kept].sum() > 3
    loss.summands(x, y)[~kept].sum().backward()
    assert (x.grad == 0).all()


# ------------------------------------------------------------------------------------------------ classification

def test_class_vectors_start_uniform_within_one_over_root_d():
    torch.manual_seed(0)
    for kind in (objectives.Softmax, objectives.NormSoftmax, objectives.SphereFace, objectives.ArcFace):
        proxies = kind(300, 64).proxies.detach()
        assert proxies.shape == (300, 64) and 0.124 < proxies.max() <= 0.125 and -0.125 <= proxies.min() < -0.124
        assert proxies.var().item() == pytest.approx(1 / (3 * 64), rel=0.05)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7])
def test_psi_is_continuous_and_decreasing_from_1_to_1_minus_2m(m):
    loss, theta = objectives.SphereFace(2, 2, margin=m), torch.linspace(0, math.pi, 40001, dtype=torch.float64)
    c = theta.cos().requires_grad_()
    psi = loss.psi(c)
    slope, = torch.autograd.grad(psi.sum(), c)
    assert (slope >= -1e-9).all() and slope[-1].item() == pytest.approx(m * m)         # also where k is about to be m
    steps = psi.detach().diff()
    assert (steps < 1e-12).all() and steps.min() > -1.01 * m * math.pi / 40000
    assert psi[0].item() == pytest.approx(1) and psi[-1].item() == pytest.approx(1 - 2 * m)


def test_sphereface_of_margin_1_is_the_normalised_softmax_of_unit_embeddings():
    x, y = batch()
    x = F.normalize(x)
    loss, normalised = objectives.SphereFace(4, 5, margin=1).double(), objectives.NormSoftmax(4, 5, temperature=1.0).double()
    loss.load_state_dict({**loss.state_dict(), "proxies": normalised.proxies.detach()})
    torch.testing.assert_close(loss(x, y), normalised(x, y))


def test_sphereface_anneals_from_the_softmax_to_its_margin_by_a_saved_step():
    x, y = batch()
    loss = objectives.SphereFace(4, 5, annealing=True).double()
    c = loss.cosine(x).detach().gather(1, y.unsqueeze(1))
    length = x.norm(dim=1, keepdim=True)

    def la():                                                   # from the own logit (la c + psi) / (1 + la)
        own = loss.eval().logits(x, y).gather(1, y.unsqueeze(1)).detach() / length
        loss.train()
        return ((loss.psi(c) - own) / (own - c)).median().item()
    for step in range(3):
        assert la() == pytest.approx(1000 / (1 + 0.12 * step)) and loss.state_dict()["step"] == step
        loss(x, y)
    loss.step.fill_(10 ** 6)
    assert la() == pytest.approx(5)


@pytest.mark.parametrize("margin", [0, -1, 2.5])
def test_sphereface_takes_whole_margins_only(margin):
    with pytest.raises(ValueError, match="whole numbers"):
        objectives.SphereFace(3, 3, margin=margin)


@pytest.mark.parametrize("m", [0.5, 1.5])
def test_arcface_falls_on_either_side_of_pi_minus_m(m):
    """cos(theta + m) alone would rise again beyond."""
    theta = torch.linspace(0, math.pi, 2001).double()
    loss = objectives.ArcFace(1, 2, scale=1.0, margin=m).double()
    loss.proxies.data[:] = torch.tensor([[1.0, 0.0]])
    target = loss.logits(torch.stack([theta.cos(), theta.sin()], dim=1), torch.zeros(2001, dtype=torch.long)).squeeze(1)
    before = theta < math.pi - m
    torch.testing.assert_close(target[before], (theta + m).cos()[before], atol=1e-6, rtol=0)
    torch.testing.assert_close(target[~before], theta.cos()[~before] - m * math.sin(m))
    assert (target[before].diff() < 0).all() and (target[~before].diff() < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [objectives.SphereFace, objectives.ArcFace])
def test_embeddings_on_and_opposite_to_their_class_vector_have_finite_gradients(kind, dtype):
    torch.manual_seed(0)
    loss = kind(200, 64).to(dtype)
    x = torch.cat([loss.proxies.detach(), -loss.proxies.detach()]).requires_grad_()
    loss(x, torch.arange(200).repeat(2)).backward()
    assert x.grad.isfinite().all() and loss.proxies.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------------- miners

@pytest.mark.parametrize("name", objectives.MINERS)
def test_miners_return_one_valid_triplet_for_each_anchor_that_has_one(name):
    x, y = batch(dtype=torch.float32)
    seen = set()
    for _ in range(200):
        a, p, n = objectives.MINERS[name](x, y)
        assert a.tolist() == list(range(8)) and a.dtype == p.dtype == n.dtype == torch.long
        assert (a != p).all() and (y[a] == y[p]).all() and (y[a] != y[n]).all()
        seen |= set(zip(a.tolist(), p.tolist()))
    assert len(seen) == 3 * 2 + 3 * 2 + 2                                        # every positive of every anchor


@pytest.mark.parametrize("name", objectives.MINERS)
def test_positives_are_uniform(name):
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.tensor([0, 0, 0, 0, 1, 1])
    drawn = torch.stack([objectives.MINERS[name](x, y)[1][0] for _ in range(1500)]).bincount()
    assert drawn[0] == 0 and (drawn[1:4] / 1500 - 1 / 3).abs().max() < 0.06           # five deviations


def circle(*angles):
    """Points of the unit circle; the distance of two is 2 sin(half the angle between them)."""
    t = torch.tensor(angles, dtype=torch.float64)
    return torch.stack([t.cos(), t.sin()], dim=1)


@pytest.mark.parametrize("name, reached", [("random", {2, 3, 4, 5}), ("semihard", {2, 3}), ("nearest", {2}), ("distance", {2, 3, 4})])
def test_the_miner_of_a_name_reaches_its_negatives(name, reached):
    torch.manual_seed(0)
    x, y = circle(0, 0.1, 0.25, 0.28, 1.0, 2.5), torch.tensor([0, 0, 1, 2, 3, 4])
    assert {objectives.MINERS[name](x, y)[2][0].item() for _ in range(200)} == reached


def test_a_copy_of_the_positive_is_not_beyond_it():
    x, y = circle(0, 1.0, 1.0, 2.0), torch.tensor([0, 0, 1, 2])
    assert objectives.mine_nearest(x, y)[2][0] == 3
    assert {objectives.mine_semihard(x, y, margin=1.0)[2][0].item() for _ in range(50)} == {3}


def test_the_distance_miner_uses_its_cutoffs():
    torch.manual_seed(0)
    x, y = circle(0, 0.1, 0.25, 1.0), torch.tensor([0, 0, 1, 2])
    assert {objectives.mine_distance(x, y, upper=0.6)[2][0].item() for _ in range(100)} == {2}
    x = F.pad(circle(0, 0.1, 0.25, 0.8), (0, 62))                                      # 1 / q falls by d^-62
    assert {objectives.mine_distance(x, y)[2][0].item() for _ in range(100)} == {2}
    assert {objectives.mine_distance(x, y, lower=1.0)[2][0].item() for _ in range(100)} == {2, 3}


def test_distances_of_copies_and_of_opposites_are_finite():
    torch.manual_seed(0)
    d = objectives.distances(torch.randn(200, 64).repeat(2, 1))
    assert d.isfinite().all() and d.diagonal().max() < 2e-3
    x = torch.eye(8)[[0, 0, 1, 0]] * torch.tensor([[1.0], [1], [1], [-1]])
    p = objectives.distance_probabilities(x, torch.tensor([0, 0, 1, 1]), upper=2.1)
    torch.testing.assert_close(p.sum(1), torch.ones(4))


@pytest.mark.parametrize("name", objectives.MINERS)
def test_without_a_positive_or_a_negative_miners_return_empty_tensors(name):
    x, y = batch(dtype=torch.float32)
    for labels in (torch.zeros_like(y), torch.arange(len(y))):
        assert [index.shape for index in objectives.MINERS[name](x, labels)] == [(0,)] * 3


@pytest.mark.parametrize("name", objectives.MINERS)
def test_a_generator_fixes_the_triplets_and_nothing_else_is_drawn(name):
    x, y = batch(dtype=torch.float32)
    before = torch.get_rng_state()
    first, again = [torch.stack(objectives.MINERS[name](x, y, generator=torch.Generator().manual_seed(3))) for _ in range(2)]
    assert torch.equal(first, again) and torch.equal(before, torch.get_rng_state())


def counts(miner, B, calls):
    """How often each anchor got each negative, (B, B)."""
    found = torch.zeros(B, B)
    for _ in range(calls):
        a, _, n = miner()
        found[a, n] += 1
    return found


def assert_drawn_from(probabilities, found):
    """Pearson's test over all rows, columns expected less than five times taken together."""
    expected, statistic, freedom = probabilities * found.sum(1, keepdim=True), 0.0, 0
    assert (found[probabilities == 0] == 0).all()
    for e, f in zip(expected, found.double()):
        rare = e < 5
        cells = [(float(a), float(b)) for a, b in zip(e[~rare], f[~rare])]
        cells += [(float(e[rare].sum()), float(f[rare].sum()))] * bool(e[rare].sum() >= 5)
        statistic, freedom = statistic + sum((b - a) ** 2 / a for a, b in cells), freedom + len(cells) - 1
    assert freedom > 20 and 1e-4 < scipy.stats.chi2.sf(statistic, freedom)


def test_random_negatives_are_uniform():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.arange(5).repeat_interleave(4)
    found = counts(lambda: objectives.mine_random(x, y), 20, 1000)
    assert_drawn_from((y[:, None] != y).double() / 16, found)


def test_semihard_negatives_are_uniform_in_the_window_or_else_in_all():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3).double(), torch.arange(10).repeat_interleave(2)          # one positive each
    z = F.normalize(x)
    expected, empty = torch.zeros(20, 20).double(), 0
    for a in range(20):
        positive = distance(z[a], z[a ^ 1])
        window = [n for n in range(20) if y[n] != y[a] and positive < distance(z[a], z[n]) < positive + 0.1]
        empty += not window
        for n in window or [n for n in range(20) if y[n] != y[a]]:
            expected[a, n] = 1 / len(window or range(18))
    assert 0 < empty < 10
    assert_drawn_from(expected, counts(lambda: objectives.mine_semihard(x, y, margin=0.1), 20, 1000))


def test_the_semihard_window_of_the_objective_is_the_losss_margin(monkeypatch):
    x, y = batch()
    seen = []
    monkeypatch.setitem(objectives.MINERS, "semihard", lambda x, y, margin: seen.append(margin) or all_triplets(y))
    for loss in (objectives.Triplet(0.7), objectives.Margin(4, margin=0.4)):
        objectives.Objective(loss, "semihard").losses(x, y)
    assert seen == [0.7, 0.4]


def test_nearest_negatives_are_the_nearest_beyond_the_positive_or_else_the_farthest():
    torch.manual_seed(0)
    x, y = torch.randn(40, 2).double(), torch.arange(20).repeat_interleave(2)
    x[0], x[1] = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])                   # a positive that none is beyond
    z, beyond = F.normalize(x), 0
    order = torch.randperm(40)
    found = dict(zip(*[index.tolist() for index in objectives.mine_nearest(x, y)[::2]]))
    a, _, n = objectives.mine_nearest(x[order], y[order])
    assert {order[i].item(): order[j].item() for i, j in zip(a, n)} == found
    for a in range(40):
        d = {n: distance(z[a], z[n]).item() for n in range(40) if y[n] != y[a]}
        candidates = [n for n in d if d[n] > distance(z[a], z[a ^ 1])]
        beyond += bool(candidates)
        assert found[a] == (min(candidates, key=d.get) if candidates else max(d, key=d.get))
    assert 30 < beyond <= 38                                                           # images 0 and 1 have none


@pytest.mark.parametrize("D", [2, 3, 8, 128])
def test_distance_probabilities_are_inverse_to_the_spheres_density(D):
    torch.manual_seed(0)
    x, y = torch.randn(5, 1, D) + 0.7 * torch.randn(5, 4, D), torch.arange(5).repeat_interleave(4)
    x, expected = x.flatten(0, 1).double(), torch.zeros(20, 20).double()
    z, clipped, cut = F.normalize(x), 0, 0
    for a, n in itertools.product(range(20), range(20)):
        d = float(distance(z[a], z[n]))
        if y[a] != y[n] and d < 1.4:
            clipped += d < 0.5
            d = max(d, 0.5)
            expected[a, n] = d ** (2 - D) * (1 - d * d / 4) ** ((3 - D) / 2)
        cut += d >= 1.4
    assert cut > 0 and (clipped > 0 or D > 3)
    inside = expected.sum(1) > 0
    uniform = (y[:, None] != y).double() / 16
    expected = torch.where(inside[:, None], expected / expected.sum(1, keepdim=True), uniform)
    torch.testing.assert_close(objectives.distance_probabilities(x, y), expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(objectives.distance_probabilities(x, y, lower=0.0, upper=2.1).sum(1), torch.ones(20).double())


def test_distance_draws_follow_the_probabilities():
    """20,000 draws; image 0 has all negatives beyond the cutoff."""
    torch.manual_seed(1)
    x, y = torch.randn(20, 4).double(), torch.arange(10).repeat_interleave(2)
    x[2:] = x[2:] * torch.tensor([1.0, 1.0, 1.0, 0.3]).double()
    x[0] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    x[2:, 3] = -x[2:, 3].abs()                                                         # all on the other half
    probabilities = objectives.distance_probabilities(x, y)
    torch.testing.assert_close(probabilities[0, 2:], torch.full((18,), 1 / 18).double())
    assert (probabilities[1:].amax(1) > 2 / 18).sum() > 10
    assert_drawn_from(probabilities, counts(lambda: objectives.mine_distance(x, y), 20, 1000))


def test_distance_rows_neither_vanish_nor_overflow_in_512_dimensions():
    torch.manual_seed(0)
    x, y = torch.randn(112, 512), torch.arange(56).repeat_interleave(2)
    x[2] = x[0] + 0.3 * torch.randn(512)                      # one close pair: its weight is e^200 times all the others
    p = objectives.distance_probabilities(x, y)
    torch.testing.assert_close(p.sum(1), torch.ones(112))
    inside = (objectives.distances(x) < 1.4) & (y[:, None] != y)
    assert p[0, 2] == 1 and inside.any(1).sum() > 50 and (p[inside.any(1)].amax(1) > 1 / 110).all()


def test_without_any_negative_a_row_of_probabilities_is_zero():
    x, y = batch()
    assert (objectives.distance_probabilities(x, torch.zeros_like(y)) == 0).all()


def test_miners_take_half_precision_and_give_no_gradient():
    x, y = batch(dtype=torch.float32)
    assert not objectives.distance_probabilities(x.requires_grad_(), y).requires_grad
    torch.testing.assert_close(objectives.distance_probabilities(x.bfloat16(), y),
                               objectives.distance_probabilities(x.bfloat16().float(), y))


# ----------------------------------------------------------------------------------------------- for the trainer

def test_the_log_tells_what_the_loss_is_about():
    x, y = batch(scale=1.0)
    z = F.normalize(x)
    a, p, n = triplets = all_triplets(y)
    active = (z[a] - z[p]).square().sum(1) - (z[a] - z[n]).square().sum(1) + 0.2 > 0
    assert objectives.Triplet().diagnostics(x, y, triplets)["active"].item() == pytest.approx(active.double().mean().item())
    made = objectives.Objective(objectives.Margin(4), "nearest")
    logged = made.diagnostics(x[2:8], y[2:8])
    assert logged.keys() == {"active", "boundary", "mined_distance"} and logged["boundary"] == pytest.approx(1.2)
    made.loss.beta.data[:] = torch.tensor([1.0, 2, 3, 6])
    assert made.diagnostics(x, y)["boundary"] == 3
    made = objectives.Objective(objectives.Triplet(), "nearest")                      # two classes of two: one choice of p
    pairs = x[[0, 1, 2, 7]], y[[0, 1, 2, 7]]
    a, _, n = objectives.mine_nearest(*pairs)
    mean = sum(distance(z[[0, 1, 2, 7]][i], z[[0, 1, 2, 7]][j]).item() for i, j in zip(a, n)) / 4
    assert made.diagnostics(*pairs)["mined_distance"] == pytest.approx(mean)
    loss = objectives.ArcFace(4, 5).double()
    angles = [math.degrees(math.acos(F.cosine_similarity(x[i], loss.proxies[y[i]], dim=0).item())) for i in range(len(x))]
    assert objectives.Objective(loss).diagnostics(x, y) == pytest.approx({"own_angle": sum(angles) / len(angles)})
    many = objectives.Softmax(200, 64)                                                # some cosines round to more than 1
    assert objectives.Objective(many).diagnostics(many.proxies, torch.arange(200))["own_angle"] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("name", LOSSES)
def test_an_objectives_loss_is_named_after_it(name):
    made = objectives.Objective(LOSSES[name](), "random" if name in objectives.MINED else None)
    assert list(made.losses(*batch(dtype=torch.float32))) == [name]


def test_a_losss_parameters_have_a_group_of_their_own_or_none():
    for name, make in LOSSES.items():
        groups = objectives.Objective(make(), loss_lr=50).param_groups(1e-5)
        assert [group["lr"] for group in groups] == pytest.approx([5e-4] * (name in objectives.LEARNED))
        assert all("weight_decay" not in group and len(group["params"]) == 1 for group in groups)


# -------------------------------------------------------------------------------------------------------- presets

REVISITING = dict(batch_size=112, lr=1e-5, epochs=150, lr_steps=[], warmup=0, miner=None, beta=None, loss_lr=None)


@pytest.mark.parametrize("loss, expected", [
    ("triplet", dict(miner="distance")), ("margin", dict(miner="distance", beta="class", loss_lr=50)), ("lifted", {}),
    ("genlifted", {}), ("multisimilarity", {}), ("softmax", dict(loss_lr=50)), ("normsoftmax", dict(loss_lr=1)),
    ("sphereface", dict(loss_lr=50)), ("arcface", dict(loss_lr=50))])
def test_presets_are_the_protocols_settings_field_by_field(loss, expected):
    for dataset, others in (("cub200", {}), ("cars196", {}), ("sop", dict(epochs=100))):
        given = objectives.preset(argparse.Namespace(dataset=dataset, weights="imagenet", loss=loss))
        given.pop("lr_gamma")                                                     # means nothing without steps
        rate = dict(loss_lr=200) if (loss, dataset) == ("normsoftmax", "sop") else {}
        assert given == {**REVISITING, **expected, **others, **rate}
    for dataset in ("toy", "folder", "cub200", "sop"):
        scratch = objectives.preset(argparse.Namespace(dataset=dataset, weights="none", loss=loss))
        of_nir = nir.preset(argparse.Namespace(dataset=dataset, weights="none", embed_dim=64, nir_weight=None))
        assert all(scratch[name] == of_nir[name] for name in ("batch_size", "epochs", "lr_steps", "lr_gamma", "warmup"))
        assert scratch["lr"] == (3e-4 if loss == "arcface" else 3e-3) and scratch["miner"] == expected.get("miner")
        assert scratch["loss_lr"] == (None if "loss_lr" not in expected else 1 if loss == "margin" else 10)


def test_a_run_of_the_protocol_has_its_network_loss_and_miner(monkeypatch):
    argv = "--dataset cub200 --loss margin --miner distance".split()
    args, make_criterion, name = started(monkeypatch, objectives, *argv)
    args, made = vars(args), make_criterion(7)
    assert name == "cub200-margin-class-distance-seed0" and made.loss.beta.shape == (7,)
    assert (args["arch"], args["weights"], args["embed_dim"], args["usual_batch_size"], args["weight_decay"], args["epochs"]) == (
        "resnet50", "imagenet", 128, 112, 4e-4, 150)
    assert (made.miner, made.param_groups(1e-5)[0]["lr"]) == ("distance", pytest.approx(5e-4))


def test_the_command_line_chooses_loss_miner_and_boundary(monkeypatch):
    for loss in LOSSES:
        _, make_criterion, name = started(monkeypatch, objectives, "--dataset", "toy", "--loss", loss)
        made = make_criterion(7)
        assert type(made.loss).__name__.lower() == loss and name.startswith(f"toy-{loss}-")
        assert all(p.shape in ((7,), (7, 64)) for p in made.parameters()) and (made.miner is not None) == (loss in objectives.MINED)
        assert getattr(made.loss, "annealing", True)
    argv = "--dataset toy --beta global --miner semihard --loss_lr 3".split()
    _, make_criterion, name = started(monkeypatch, objectives, *argv)
    made = make_criterion(7)
    assert made.loss.beta.shape == () and made.miner == "semihard" and name == "toy-margin-global-semihard-seed0"
    assert made.param_groups(0.1)[0]["lr"] == pytest.approx(0.3)


@pytest.mark.parametrize("argv, message", [
    (["--loss", "contrastive"], "invalid choice: 'contrastive'"),
    (["--miner", "hard"], "invalid choice: 'hard'"),
    (["--loss", "multisimilarity", "--miner", "distance"],
     "--miner distance means nothing to --loss multisimilarity, only to triplet, margin: leave it out"),
    (["--loss", "arcface", "--miner", "random"], "--miner random means nothing to --loss arcface"),
    (["--loss", "triplet", "--beta", "class"], "--beta class means nothing to --loss triplet, only to margin: leave it out"),
    (["--loss", "lifted", "--loss_lr", "2"], "--loss_lr 2.0 means nothing to --loss lifted"),
    (["--loss_lr", "0"], "0 is not above 0"), (["--beta", "image"], "invalid choice: 'image'"),
])
def test_mistakes_are_one_sentence_and_exit_code_2(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        common.command(lambda: objectives.main(["--dataset", "toy", *argv]))
    error = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and message in error[-1] and error[-1].count("error: ") == 1
    assert not list(tmp_path.iterdir())


def test_help_lists_presets_and_options(capsys):
    with pytest.raises(SystemExit):
        objectives.main(["--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--loss", "--miner", "--beta", "--loss_lr"))


@pytest.mark.parametrize("loss, expected", [
    ("normsoftmax", [["loss_lr", "10"], ["NormSoftmax.temperature", "0.05"]]),
    ("arcface", [["lr", "0.0003"], ["ArcFace.scale", "16.0"]]),
    ("sphereface", [["SphereFace.margin", "4"], ["SphereFace.annealing", "True"]]),
    ("margin", [["miner", "distance"], ["beta", "class"], ["distance_probabilities.upper", "1.4"]])])
def test_help_shows_the_settings_of_the_loss_that_is_given(loss, expected, capsys):
    with pytest.raises(SystemExit):
        objectives.main(["--dataset", "toy", "--loss", loss, "--help"])
    text = capsys.readouterr().out
    shown = [line.split() for line in text.splitlines()]
    assert all(line in shown for line in expected)
    assert "granularity" not in text                                                  # it is --beta


def test_in_an_empty_folder_with_nir_beside_it_the_objective_trains(tmp_path):
    for name in ("objectives.py", "nir.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = """
        import sys
        import torch
        import objectives
        for name in objectives.LOSSES:
            loss = objectives.make_loss(name, 3, 4, "class")
            objective = objectives.Objective(loss, "distance" if name in objectives.MINED else None)
            embeddings, labels = torch.randn(6, 4, requires_grad=True), torch.arange(6) % 3
            sum(objective.losses(embeddings, labels).values()).backward()
            assert embeddings.grad.isfinite().all()
        assert not {"common", "data", "evaluate", "torchvision", "scipy"} & sys.modules.keys()
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_script_runs_its_main():
    done = run("--loss", "lifted", "--miner", "random", script="objectives.py")
    assert done.returncode == 2 and done.stderr.startswith("error: --miner random means nothing to --loss lifted")


# ------------------------------------------------------------------------------------------------------- training

@pytest.fixture
def quick(monkeypatch):
    """Final metrics are Recall@1 alone: clustering takes longer than these runs."""
    monkeypatch.setattr(evaluate, "all_metrics", lambda rows, labels, ks: {"recall@1": evaluate.recall_at_k(rows, labels, [1])[1]})


@pytest.mark.parametrize("argv", [
    ["triplet", "--miner", "random"], ["triplet", "--miner", "semihard"], ["margin", "--miner", "nearest", "--beta", "global"],
    ["margin"], ["lifted"], ["genlifted"], ["multisimilarity"], ["softmax"], ["normsoftmax"], ["sphereface"], ["arcface"]],
    ids=" ".join)
def test_every_objective_trains_and_resumes_bit_identically(argv, tmp_path, monkeypatch, quick):
    made, save = data.load_toy(classes=24, per_class=20), common.save_file             # 240 images to train with
    monkeypatch.setattr(data, "load_toy", lambda: made)

    def keep_the_first_epoch(path, content):
        save(path, content)
        if path.name == "log.csv" and content.count("\n") == 2:
            shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    monkeypatch.setattr(common, "save_file", keep_the_first_epoch)
    objectives.main(["--dataset", "toy", "--image_size", "16", "--batch_size", "24", "--epochs", "2", "--device", "cpu",
                     "--out", str(tmp_path / "whole"), "--loss", *argv])
    whole, first = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "stopped")]
    assert first["epoch"] == 1
    learned = {**whole["network"], **whole["criterion"]}                               # and the second epoch changed them all
    assert all((value != {**first["network"], **first["criterion"]}[key]).any() for key, value in learned.items())
    torch.manual_seed(12345)
    objectives.main(["--resume", str(tmp_path / "stopped/last.pt")])
    assert_same(torch.load(tmp_path / "stopped/last.pt", weights_only=True), whole)


@pytest.fixture(scope="module")
def toy():
    return data.load_toy()


@pytest.mark.parametrize("loss, epochs", [("margin", 2), ("multisimilarity", 2), ("arcface", 4)])
def test_toy_training_beats_an_untrained_network_by_20_points(loss, epochs, toy, tmp_path, monkeypatch, quick):
    """A few epochs of the toy preset, at half its resolution."""
    monkeypatch.setattr(data, "load_toy", lambda: toy)
    objectives.main(["--dataset", "toy", "--device", "cpu", "--image_size", "16", "--epochs", str(epochs), "--loss", loss,
                     "--out", str(tmp_path)])
    args = argparse.Namespace(**common.load_checkpoint(tmp_path / "last.pt", "")["args"])
    torch.manual_seed(args.seed)
    rows = common.embed(common.build_network(args), toy[1], args, torch.device("cpu"))
    untrained = evaluate.recall_at_k(rows, toy[1].labels, [1])[1]
    trained = json.loads((tmp_path / "results.json").read_text())["last"]["recall@1"]
    assert untrained < 0.35 and trained > untrained + 0.2
