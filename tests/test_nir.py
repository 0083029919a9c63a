"""Losses and flow against slow references from the formulas; the official settings in one table."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error_of, not_finite, parametrize, refused, started, wrong_for_proxies
from torch.testing import assert_close

import common
import nir
from nir import LOSSES, NIR, GlowFlow, ProxyAnchor, ProxyNCA, SoftTriple

EVERY_LOSS = parametrize("name", LOSSES)
EVERY_FORM = parametrize("form", ["nll", "exp"])

# In a batch class 0 is twice as often as class 1, class 2 as class 0, and class 3 is not there.
LABELS = torch.tensor([0, 2, 1, 2, 0, 2, 2])


def batch(D=5, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(len(LABELS), D, dtype=dtype) * 3, LABELS


def assert_same(actual, expected, rtol=1e-12):
    assert_close(actual, expected, rtol=rtol, atol=0)


# ------------------------------------------------------------------------------ the proxy losses


def test_proxynca_is_the_formula():
    x, y = batch()
    loss = ProxyNCA(4, 5, temperature=0.3).double()
    distances = torch.cdist(F.normalize(x), F.normalize(loss.proxies))
    similar = (-distances.square() / 0.3).exp()
    own = similar[range(len(y)), y]
    assert_same(loss(x, y), -(own / similar.sum(1)).log().mean())


def proxyanchor():
    """The loss, and the logarithms of the formula's two sums for each class that has any."""
    x, y = batch()
    loss = ProxyAnchor(4, 5, margin=0.2, alpha=5.0).double()
    s = F.cosine_similarity(x[:, None], loss.proxies, dim=2)
    pull = [(1 + (-5 * (s[y == c, c] - 0.2)).exp().sum()).log() for c in (0, 1, 2)]
    push = [(1 + (5 * (s[y != c, c] + 0.2)).exp().sum()).log() for c in (0, 1, 2, 3)]
    return loss(x, y), torch.stack(pull), torch.stack(push)


def test_proxyanchor_is_the_formula():
    value, pull, push = proxyanchor()
    assert_same(value, pull.mean() + push.mean())


def test_proxyanchor_counts_a_class_once_however_often_it_is_in_the_batch():
    """The official code averages the first term over batch positions instead."""
    value, pull, push = proxyanchor()
    official = pull[LABELS].mean() + push.mean()
    assert abs(official - value) > 0.1


@parametrize("K", [1, 3])
def test_softtriple_is_the_formula(K):
    """One centre has nothing to merge."""
    x, y = batch()
    loss = SoftTriple(4, 5, centers=K, la=4.0, gamma=0.3, margin=0.15, tau=0.7).double()
    w = F.normalize(loss.proxies, dim=2)
    s = F.cosine_similarity(x[:, None, None], w, dim=3)
    weights = (s / 0.3).exp()
    S = (weights * s).sum(2) / weights.sum(2)
    S_own = S[range(len(y)), y]
    own = (4 * (S_own - 0.15)).exp()
    others = (4 * S).exp().sum(1) - (4 * S_own).exp()
    expected = -(own / (own + others)).log().mean()
    if K > 1:
        distances = sum(F.pdist(centres).sum() for centres in w)
        expected = expected + 0.7 * distances / (4 * K * (K - 1))
    # The distance of close centres is a small difference of large numbers.
    assert_same(loss(x, y), expected, rtol=1e-10)


@EVERY_LOSS
def test_loss_gradients_are_those_of_finite_differences(name):
    x, y = batch()
    loss = LOSSES[name](4, 5).double()

    def value(x, proxies):
        return torch.func.functional_call(loss, {"proxies": proxies}, (x, y))

    proxies = loss.proxies.detach().requires_grad_()
    assert torch.autograd.gradcheck(value, (x.requires_grad_(), proxies))


@parametrize("make, options", [
    (ProxyNCA, dict(temperature=1e-4)),
    (ProxyAnchor, dict(alpha=1e4)),
    (SoftTriple, dict(la=1e5, gamma=1e-4)),
])
def test_losses_do_not_overflow_at_extreme_scales(make, options):
    x, y = batch(dtype=torch.float32)
    loss = make(4, 5, **options)
    value = loss(x.requires_grad_(), y)
    value.backward()
    for result in (value, x.grad, loss.proxies.grad):
        assert result.isfinite().all()


def test_merging_term_of_close_centres_is_their_distance():
    w = torch.tensor([[[1, 0], [math.cos(0.02), math.sin(0.02)]]], dtype=torch.float64)
    assert SoftTriple.merging_term(w).item() == pytest.approx(2 * math.sin(0.01) / 2)


def test_merged_centres_have_a_finite_gradient():
    x, y = batch(dtype=torch.float32)
    loss = SoftTriple(4, 5)
    loss.proxies.data[:] = torch.eye(1, 5)
    loss(x, y).backward()
    assert loss.proxies.grad.isfinite().all()


@wrong_for_proxies
@EVERY_LOSS
def test_wrong_batches_are_one_sentence(name, x, y, error, message):
    made = NIR(LOSSES[name](4, 5), 5)
    functions = [made.proxy_loss]
    if error is ValueError:
        functions += [made.nir, made.diagnostics]
    for function in functions:
        with refused(message, error):
            function(x, y)


@parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
@EVERY_LOSS
def test_labels_of_any_integer_type_mean_the_same(name, dtype):
    """As many images as classes: uint8 could be taken for a mask."""
    x, _ = batch(dtype=torch.float32)
    y = torch.tensor([0, 1, 1, 0, 0, 1, 0])
    made = NIR(LOSSES[name](7, 5), 5)
    assert_same(made.losses(x, y.to(dtype)), made.losses(x, y), rtol=0)
    assert made.diagnostics(x, y.to(dtype)) == made.diagnostics(x, y)


@EVERY_LOSS
@not_finite
def test_an_embedding_that_is_not_finite_makes_the_loss_nan(name, bad):
    for place in ((3, 2), (3,), ()):
        x, y = batch(dtype=torch.float32)
        x[place] = bad
        for value in NIR(LOSSES[name](4, 5), 5).losses(x, y).values():
            assert value.isnan()


@EVERY_LOSS
@parametrize("given, loss, computed", [
    (torch.float64, torch.float32, torch.float64),
    (torch.float32, torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
])
def test_embeddings_and_loss_of_two_precisions_compute_in_the_higher(name, given, loss, computed):
    x, y = batch(dtype=given)
    made = NIR(LOSSES[name](4, 5), 5).to(loss)
    values = made.losses(x.requires_grad_(), y)
    sum(values.values()).backward()

    reference = copy.deepcopy(made).to(computed)
    assert_same(values, reference.losses(x.detach().to(computed), y), rtol=0)
    assert x.grad.dtype == given
    for parameter in made.parameters():
        assert parameter.dtype == parameter.grad.dtype == loss
    assert made.flow.log_prob(x, x).dtype == computed


@parametrize("kind, option, value, message", [
    (ProxyNCA, "temperature", -0.1, "above 0"),
    (ProxyNCA, "temperature", 0, "above 0"),
    (ProxyAnchor, "alpha", -32, "above 0"),
    (SoftTriple, "centers", 0, "at least 1, not 0"),
    (SoftTriple, "la", -20, "above 0"),
    (SoftTriple, "gamma", math.nan, "above 0 and finite, not nan"),
    (SoftTriple, "tau", -1, "at least 0"),
    (GlowFlow, "num_blocks", 0, "at least 1"),
    (GlowFlow, "depth", 0, "at least 1"),
    (GlowFlow, "width", 0, "at least 1"),
    (NIR, "form", "NLL", "one of nll, exp, not 'NLL"),
    (NIR, "form", None, "one of nll, exp, not None"),
    (NIR, "nir_weight", -1, "at least 0"),
    (NIR, "proxy_weight", -1, "at least 0"),
])
def test_arguments_that_would_be_misread_are_named(kind, option, value, message):
    first = ProxyNCA(4, 5) if kind is NIR else 5
    with refused(f"^{option} must be {message}", ValueError):
        kind(first, 5, **{option: value})


def test_proxies_start_with_variance_one_64th():
    torch.manual_seed(0)
    for make in LOSSES.values():
        assert make(300, 64).proxies.var().item() == pytest.approx(1 / 64, rel=0.05)


# -------------------------------------------------------------------------------------- the flow


def flow(dim, **options):
    """A small flow far from the identity, so that a wrong sign cannot hide, and its arguments."""
    torch.manual_seed(1)
    made = GlowFlow(dim, 3, **{"depth": 3, "width": 32, **options}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    return made, torch.randn(9, dim).double(), torch.randn(9, 3).double()


def slow_subnet(subnet, x, cond):
    first, *others = [layer for layer in subnet if isinstance(layer, torch.nn.Linear)]
    out = first(torch.cat([x, cond], dim=1))
    for layer in others:
        out = layer(out.relu())
    return out.tensor_split(2, dim=1)


@parametrize("dim", [2, 5])
def test_flow_is_the_formula(dim):
    made, x, cond = flow(dim, clamp=1.5)
    y, expected = x, 0
    for i, block in enumerate(made.blocks):
        order = np.random.RandomState(i).permutation(dim)
        x1, x2 = y[:, order].split([dim // 2, dim - dim // 2], dim=1)
        raw2, t2 = slow_subnet(block.subnet2, x2, cond)
        s2 = 1.5 * 0.636 * raw2.atan()
        y1 = s2.exp() * x1 + t2
        raw1, t1 = slow_subnet(block.subnet1, y1, cond)
        s1 = 1.5 * 0.636 * raw1.atan()
        y2 = s1.exp() * x2 + t1
        y = torch.cat([y1, y2], dim=1)
        expected = expected + s1.sum(1) + s2.sum(1)
    zeta, log_det = made(x, cond)
    assert_same((zeta, log_det), (y, expected), rtol=1e-9)


def test_subnets_have_the_given_depth_and_width():
    made, _, _ = flow(5, num_blocks=4, width=16)
    shapes = [weight.shape for weight in made.parameters() if weight.dim() == 2]
    subnet1 = [(16, 2 + 3), (16, 16), (3 * 2, 16)]
    subnet2 = [(16, 3 + 3), (16, 16), (2 * 2, 16)]
    assert shapes == 4 * (subnet1 + subnet2)


@parametrize("dim", [2, 5, 16])
def test_inverse_undoes_forward(dim):
    made, x, cond = flow(dim)
    zeta, _ = made(x, cond)
    assert (zeta - x).abs().max() > 0.1
    assert_close(made.inverse(zeta, cond), x, atol=1e-9, rtol=0)


def test_inverse_undoes_forward_at_the_papers_size_in_float32():
    torch.manual_seed(0)
    made = GlowFlow(128, 128)
    psi, rho = F.normalize(torch.randn(2, 6, 128), dim=2)
    zeta, _ = made(psi, rho)
    assert_close(made.inverse(zeta, rho), psi, atol=1e-5, rtol=0)


@parametrize("dim", [2, 5])
def test_log_determinant_is_that_of_the_jacobian(dim):
    made, x, cond = flow(dim)

    def summed(x):
        return made(x, cond)[0].sum(0)

    jacobian = torch.autograd.functional.jacobian(summed, x)            # (dim, B, dim)
    _, expected = torch.linalg.slogdet(jacobian.transpose(0, 1))
    assert_close(made(x, cond)[1], expected, atol=1e-9, rtol=0)


def test_density_integrates_to_one():
    torch.manual_seed(1)
    made = GlowFlow(2, 3, num_blocks=3, depth=3, width=16).double()
    axis = torch.linspace(-10, 10, 401).double()
    grid = torch.cartesian_prod(axis, axis)
    cond = torch.randn(1, 3).double().expand(len(grid), 3)
    with torch.no_grad():
        density = made.log_prob(grid, cond).exp()
    assert density.sum().item() * 0.05 ** 2 == pytest.approx(1, abs=1e-3)


def test_scales_are_softly_clamped():
    """Each of four log-scales is at most 2 * 0.636 * pi / 2, whatever the subnets say."""
    made, x, cond = flow(4, num_blocks=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1e3)
    _, log_det = made(x, cond)
    assert 1 < log_det.abs().max() <= 4 * 2 * 0.636 * math.pi / 2


def test_flow_needs_two_dimensions():
    with refused("two dimensions", ValueError):
        GlowFlow(1, 3)


@parametrize("shape", [(9, 6), (9, 4), (5,), (9, 5, 1)])
def test_flow_takes_no_other_dimension_than_its_own(shape):
    """The permutation alone would pick the first five of six."""
    made, _, cond = flow(5)
    with refused(r"psi must be \(B, 5\), not", ValueError):
        made(torch.ones(shape).double(), cond)


# ---------------------------------------------------------------------- the proxy loss with NIR


def criterion(name="proxyanchor", **options):
    torch.manual_seed(2)
    return NIR(LOSSES[name](4, 6), 6, **options).double()


def own_proxies(made, x, y):
    """The normalised proxy of each sample's class; of several the nearest, one by one."""
    proxies = F.normalize(made.proxy_loss.proxies, dim=-1)
    own = []
    for psi, label in zip(F.normalize(x), y):
        centres = proxies[label].view(-1, 6)
        own.append(max(centres, key=lambda centre: centre @ psi))
    return torch.stack(own)


@EVERY_LOSS
@EVERY_FORM
def test_nir_is_the_formula_given_the_nearest_proxy_of_the_class(name, form):
    x, y = batch(D=6)
    made = criterion(name, form=form, nir_weight=0.5, proxy_weight=0.0075)
    zeta, log_det = made.flow(F.normalize(x), own_proxies(made, x, y))
    if form == "nll":
        normal = torch.distributions.Normal(0, 1)
        terms = -normal.log_prob(zeta).sum(1) - log_det
    else:
        terms = (0.5 * zeta.norm(dim=1) ** 2 - log_det).exp()
    expected = {"proxy": 0.0075 * made.proxy_loss(x, y), "nir": 0.5 * terms.mean()}
    assert_same(made.losses(x, y), expected)


@EVERY_FORM
def test_nir_has_a_gradient_for_embeddings_proxies_and_flow(form):
    x, y = batch(D=6)
    made = criterion(form=form)
    made.losses(x.requires_grad_(), y)["nir"].backward()
    weights = [parameter for parameter in made.parameters() if parameter.dim() == 2]
    for parameter in (x, *weights):
        assert parameter.grad.abs().sum() > 0


def test_gradient_of_exp_is_that_of_nll_over_the_density():
    """So it vanishes where the flow fits: (2 pi)^(-D/2) / p of the gradient is left."""
    x, y = batch(D=6)
    made = criterion()
    gradients = {}
    for form in ("nll", "exp"):
        made.form = form
        gradients[form], = torch.autograd.grad(made.nir(x.requires_grad_(), y), x)
    log_p = made.flow.log_prob(F.normalize(x), own_proxies(made, x, y))
    factor = (2 * math.pi) ** -3 * (-log_p).exp()
    assert_same(gradients["exp"], factor[:, None] * gradients["nll"], rtol=1e-9)


def test_trained_nll_pulls_each_class_together_and_exp_stops_acting():
    """Here the embeddings are free, without a network."""
    y = torch.arange(8).repeat_interleave(3)
    spread, share = {}, {}
    for form in ("nll", "exp"):
        torch.manual_seed(0)
        x = torch.randn(24, 16, requires_grad=True)
        made = NIR(ProxyAnchor(8, 16), 16, form=form, nir_weight=0.5)
        made.flow = GlowFlow(16, 16, num_blocks=2, depth=3, width=32)
        adam = torch.optim.Adam([
            {"params": [x, made.proxy_loss.proxies], "lr": 0.05},
            {"params": made.flow.parameters(), "lr": 2e-3},
        ])
        for _ in range(150):
            losses = made.losses(x, y)
            adam.zero_grad()
            sum(losses.values()).backward()
            adam.step()
        share[form] = common.gradient_shares(made.losses(x, y), x)["grad_share_nir"]
        spread[form] = 1 - made.diagnostics(x.detach(), y)["class_cosine"]
    assert share["exp"] < 0.01 < 0.3 < share["nll"]
    assert spread["nll"] < 0.5 * spread["exp"]


def test_without_a_weight_there_is_no_flow_and_the_loss_is_the_proxy_loss():
    x, y = batch(D=6)
    made = criterion(nir_weight=0, proxy_lr=0.3)
    assert_same(made.losses(x, y), {"proxy": made.proxy_loss(x, y)})
    assert made.param_groups() == [{"params": list(made.parameters()), "lr": 0.3}]


def test_proxies_and_flow_have_learning_rates_of_their_own_and_no_weight_decay():
    made = criterion("softtriple", proxy_lr=0.3, flow_lr=0.2)
    assert made.param_groups() == [
        {"params": [made.proxy_loss.proxies], "lr": 0.3},
        {"params": list(made.flow.parameters()), "lr": 0.2},
    ]


@EVERY_LOSS
def test_diagnostics_are_mean_cosines_to_the_nearest_own_proxy_and_within_classes(name):
    x, y = batch(D=6)
    made = criterion(name)
    own = F.cosine_similarity(x, own_proxies(made, x, y))
    pairs = [(i, j) for i in range(7) for j in range(i) if y[i] == y[j]]
    within = [F.cosine_similarity(x[i], x[j], dim=0).item() for i, j in pairs]
    expected = {"own_proxy_cosine": own.mean().item(), "class_cosine": np.mean(within)}
    assert made.diagnostics(x, y) == pytest.approx(expected)


@EVERY_LOSS
def test_everything_is_computed_in_float32_under_autocast(name):
    x, y = batch(D=6, dtype=torch.float32)
    made = criterion(name).float()
    # In bfloat16 many of these centres would be equally near.
    made.proxy_loss.proxies.data += 30

    def compute(x):
        losses = made.proxy_loss(x, y), made.nir(embeddings=x, labels=y)
        return *losses, made.flow.log_prob(x, x), made.flow.inverse(x, x)

    half = x.bfloat16()
    expected = compute(half.float())
    with torch.autocast("cpu", torch.bfloat16):
        for given in (half, half.float()):
            assert_close(compute(given), expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------- the settings

COLUMNS = (
    "lr", "epochs", "cuts", "warmup",
    "proxy_lr", "flow_lr", "proxy_weight", "nir_form", "nir_weight",
)
CUB = (1e-5, 100, {}, 1, 0.04, 5e-4, 0.0075, "exp", 1)
SOP_CUTS = {140: 0.2, 230: 0.2}
# The official settings; the last two rows are those of RESULTS.md, found on validation classes.
SETTINGS = {
    "cub200": CUB,
    "folder": CUB,
    "cars196": (1e-5, 100, {}, 1, 0.04, 5e-4, 0.01, "exp", 1),
    "sop": (1e-5, 300, SOP_CUTS, 5, 0.04, 1e-5, 0.3, "exp", 1),
    "cub200 --nir_weight 0": (1e-5, 100, {}, 0, 0.02, 5e-4, 1, "exp", 0),
    "cars196 --nir_weight 0": (1e-5, 100, {}, 0, 0.02, 5e-4, 1, "exp", 0),
    "sop --nir_weight 0": (1e-5, 300, SOP_CUTS, 0, 0.02, 1e-5, 1, "exp", 0),
    "cub200 --weights none": (1e-3, 15, {10: 0.3, 13: 0.3}, 0, 0.01, 1e-3, 1, "nll", 0.01),
    "toy": (1e-3, 15, {10: 0.3, 13: 0.3}, 0, 0.01, 1e-3, 1, "nll", 0.003),
}


@parametrize("options", SETTINGS)
@parametrize("dim", ["128", "512"])
def test_presets_are_the_official_settings(options, dim, monkeypatch):
    argv = ["--dataset", *options.split(), "--embed_dim", dim]
    args, _, _ = started(monkeypatch, nir, *argv)
    args.cuts = dict.fromkeys(args.lr_steps, args.lr_gamma)
    assert tuple(getattr(args, name) for name in COLUMNS) == SETTINGS[options]
    assert args.usual_batch_size == 90


def test_an_official_run_has_the_official_network(monkeypatch):
    args, _, _ = started(monkeypatch, nir, "--dataset", "cub200")
    expected = dict(
        arch="resnet50", weights="imagenet", image_size=224, augment="photo", weight_decay=4e-4)
    assert expected.items() <= vars(args).items()


def test_constants_without_an_option_are_the_papers():
    assert common.defaults(*LOSSES.values(), GlowFlow, NIR) == {
        "ProxyNCA.temperature": 1 / 9,
        "ProxyAnchor.margin": 0.1, "ProxyAnchor.alpha": 32,
        "SoftTriple.centers": 10, "SoftTriple.la": 20, "SoftTriple.gamma": 0.1,
        "SoftTriple.margin": 0.01, "SoftTriple.tau": 0.2,
        "GlowFlow.num_blocks": 5, "GlowFlow.depth": 8, "GlowFlow.width": 128, "GlowFlow.clamp": 2,
        "NIR.form": "nll", "NIR.nir_weight": 1, "NIR.proxy_weight": 1,
        "NIR.proxy_lr": 0.04, "NIR.flow_lr": 5e-4,
    }


@parametrize("loss", LOSSES)
def test_options_beat_the_preset_and_reach_the_criterion(loss, monkeypatch):
    options = (
        f"--dataset toy --loss {loss} --embed_dim 6 --epochs 3 --lr_steps --nir_form exp "
        "--nir_weight 0.7 --proxy_weight 0.2 --proxy_lr 0.3 --flow_lr 0.5"
    )
    args, make_criterion, name = started(monkeypatch, nir, *options.split())
    assert (args.epochs, args.lr_steps) == (3, [])
    assert name == f"toy-{loss}-exp0.7-seed0"
    made = make_criterion(7)
    assert type(made.proxy_loss).__name__.lower() == loss
    assert (len(made.proxy_loss.proxies), made.proxy_loss.proxies.shape[-1]) == (7, 6)
    assert made.flow.blocks[0].halves == (3, 3)
    expected = dict(form="exp", nir_weight=0.7, proxy_weight=0.2, proxy_lr=0.3, flow_lr=0.5)
    assert expected.items() <= vars(made).items()


def test_a_run_without_nir_is_named_baseline(monkeypatch):
    argv = ["--dataset", "toy", "--nir_weight", "0", "--seed", "5"]
    _, _, name = started(monkeypatch, nir, *argv)
    assert name == "toy-proxyanchor-baseline-seed5"


@parametrize("argv, message", [
    ("--proxy_weight -1", "--proxy_weight: -1 is not at least 0"),
    ("--flow_lr 50", "--flow_lr: 50 is not above 0 and at most 1"),
    ("--nir_weight 0.0 --flow_lr 0.3", "--flow_lr 0.3 means nothing to --nir_weight 0"),
    ("--nir_weight 0.0 --nir_form nll", "--nir_form nll means nothing to --nir_weight 0"),
    ("--nir_weight 0.0 --weights none --nir_form exp", "--nir_form exp means nothing to"),
])
def test_options_out_of_range_or_of_no_use_to_the_baseline_are_named(argv, message, capsys):
    argv = ["--device", "none", *argv.split()]
    assert message in error_of(lambda: nir.main(argv), capsys)
