"""The proxy losses against slow references written from the formulas; the flow against autograd and its integral."""
import argparse
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_common import started

import common
import nir


def batch(B=7, C=4, D=5, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(B, D, dtype=dtype) * 3, torch.tensor([0, 0, 1, 2, 2, 2, 0][:B])


# ------------------------------------------------------------------------------------------------- proxy losses

def test_proxynca_is_the_formula():
    x, y = batch()
    loss = nir.ProxyNCA(4, 5, temperature=0.3).double()
    p, expected = loss.proxies.detach(), 0.0
    for i in range(len(x)):
        d = [float(((x[i] / x[i].norm() - p[c] / p[c].norm()) ** 2).sum()) for c in range(4)]
        expected -= math.log(math.exp(-d[y[i]] / 0.3) / sum(math.exp(-v / 0.3) for v in d)) / len(x)
    assert loss(x, y).item() == pytest.approx(expected, rel=1e-12)


def test_proxyanchor_is_the_formula():
    x, y = batch()
    loss = nir.ProxyAnchor(4, 5, margin=0.2, alpha=5.0).double()
    p = loss.proxies.detach()
    s = [[float(F.cosine_similarity(x[i], p[c], dim=0)) for c in range(4)] for i in range(len(x))]
    pull, push = [], []
    for c in range(4):                                         # class 3 has no positive in the batch
        positives = [s[i][c] for i in range(len(x)) if y[i] == c]
        negatives = [s[i][c] for i in range(len(x)) if y[i] != c]
        if positives:
            pull.append(math.log(1 + sum(math.exp(-5 * (v - 0.2)) for v in positives)))
        push.append(math.log(1 + sum(math.exp(5 * (v + 0.2)) for v in negatives)))
    assert loss(x, y).item() == pytest.approx(sum(pull) / len(pull) + sum(push) / 4, rel=1e-12)


def test_softtriple_is_the_formula():
    x, y = batch()
    C, K, la, gamma, margin, tau = 4, 3, 4.0, 0.3, 0.15, 0.7
    loss = nir.SoftTriple(C, 5, centers=K, la=la, gamma=gamma, margin=margin, tau=tau).double()
    w = F.normalize(loss.proxies.detach(), dim=-1)
    expected = 0.0
    for i in range(len(x)):
        S = []
        for c in range(C):
            s = [float(F.cosine_similarity(x[i], w[c, k], dim=0)) for k in range(K)]
            S.append(sum(math.exp(v / gamma) * v for v in s) / sum(math.exp(v / gamma) for v in s))
        own = math.exp(la * (S[y[i]] - margin))
        expected -= math.log(own / (own + sum(math.exp(la * S[c]) for c in range(C) if c != y[i]))) / len(x)
    merge = sum(float((w[c, k] - w[c, m]).norm()) for c in range(C) for k in range(K) for m in range(k + 1, K))
    assert loss(x, y).item() == pytest.approx(expected + tau * merge / (C * K * (K - 1)), rel=1e-10)


def test_softtriple_with_one_centre_has_nothing_to_merge():
    x, y = batch()
    one = nir.SoftTriple(4, 5, centers=1, tau=0.2).double()
    s = F.normalize(x) @ F.normalize(one.proxies.detach()[:, 0]).T
    expected = F.cross_entropy(20 * (s - 0.01 * F.one_hot(y, 4).double()), y)
    assert one(x, y).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", nir.LOSSES)
def test_loss_gradients_are_those_of_finite_differences(name):
    x, y = batch()
    loss = nir.LOSSES[name](4, 5).double()

    def value(x, proxies):
        return torch.func.functional_call(loss, {"proxies": proxies}, (x, y))
    assert torch.autograd.gradcheck(value, (x.requires_grad_(), loss.proxies.detach().requires_grad_()))


@pytest.mark.parametrize("make", [lambda: nir.ProxyAnchor(4, 5, alpha=1e4), lambda: nir.ProxyNCA(4, 5, temperature=1e-4),
                                  lambda: nir.SoftTriple(4, 5, la=1e5, gamma=1e-4)])
def test_losses_do_not_overflow_at_extreme_scales(make):
    x, y = batch(dtype=torch.float32)
    loss, x = make(), x.requires_grad_()
    value = loss(x, y)
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all() and loss.proxies.grad.isfinite().all()


def test_merged_softtriple_centres_have_a_finite_gradient():
    x, y = batch(dtype=torch.float32)
    loss = nir.SoftTriple(4, 5)
    loss.proxies.data[:] = loss.proxies.data[:, :1]
    loss(x, y).backward()
    assert loss.proxies.grad.isfinite().all()


@pytest.mark.parametrize("name", nir.LOSSES)
def test_losses_compute_in_float32_under_autocast(name):
    x, y = batch(dtype=torch.float32)
    loss = nir.LOSSES[name](4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(x, y)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(x, y))
    assert loss(x.bfloat16(), y).dtype == torch.float32


def test_proxies_start_with_variance_one_64th():
    torch.manual_seed(0)
    for loss in (nir.ProxyNCA(300, 64), nir.ProxyAnchor(300, 64), nir.SoftTriple(300, 64)):
        assert loss.proxies.var().item() == pytest.approx(1 / 64, rel=0.05)


def test_losses_start_with_their_papers_constants():
    nca, anchor, triple = nir.ProxyNCA(3, 4), nir.ProxyAnchor(3, 4), nir.SoftTriple(3, 4)
    assert nca.temperature == pytest.approx(1 / 9) and (anchor.margin, anchor.alpha) == (0.1, 32)
    assert (triple.la, triple.gamma, triple.margin, triple.tau, triple.proxies.shape) == (20, 0.1, 0.01, 0.2, (3, 10, 4))


def test_merging_term_of_close_but_different_centres_is_their_distance():
    loss = nir.SoftTriple(1, 2, centers=2, tau=1.0).double()
    loss.proxies.data = torch.tensor([[[1, 0], [math.cos(0.02), math.sin(0.02)]]], dtype=torch.float64)
    value = loss(torch.eye(1, 2, dtype=torch.float64), torch.tensor([0])).item()               # one class: no cross-entropy
    assert value == pytest.approx(2 * math.sin(0.01) / 2)                                      # a chord, over C K (K - 1)


# ----------------------------------------------------------------------------------------------------------- flow

def flow(dim, cond_dim=3, **options):
    torch.manual_seed(1)
    made = nir.GlowFlow(dim, cond_dim, **{"depth": 3, "width": 32, **options}).double()
    with torch.no_grad():                          # far from the identity, so that a wrong sign cannot hide
        for parameter in made.parameters():
            parameter.mul_(2.0)
    return made


@pytest.mark.parametrize("dim", [2, 5, 16])
def test_inverse_undoes_forward(dim):
    made, x, cond = flow(dim), torch.randn(9, dim).double(), torch.randn(9, 3).double()
    z, _ = made(x, cond)
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(made.inverse(z, cond), x, atol=1e-9, rtol=0)


def test_inverse_undoes_forward_at_the_papers_size_in_float32():
    torch.manual_seed(0)
    made, x, cond = nir.GlowFlow(128, 128), F.normalize(torch.randn(6, 128)), F.normalize(torch.randn(6, 128))
    torch.testing.assert_close(made.inverse(made(x, cond)[0], cond), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [2, 5])
def test_log_determinant_is_that_of_the_jacobian(dim):
    made, cond = flow(dim), torch.randn(1, 3).double()
    for x in torch.randn(4, 1, dim).double():
        jacobian = torch.autograd.functional.jacobian(lambda v: made(v, cond)[0], x).view(dim, dim)
        assert made(x, cond)[1].item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-9)


def test_density_in_two_dimensions_integrates_to_one():
    torch.manual_seed(1)
    made = nir.GlowFlow(2, 3, num_blocks=3, depth=3, width=16).double()
    axis = torch.linspace(-10, 10, 601).double()
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = made.log_prob(grid, torch.randn(1, 3).double().expand(len(grid), 3)).exp()
    assert density.sum().item() * float(axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-3)


def test_conditions_change_the_density():
    made, x = flow(4), torch.randn(1, 4).double()
    a, b = made.log_prob(x.expand(2, 4), torch.randn(2, 3).double())
    assert abs(a - b) > 1e-2


def test_scales_are_softly_clamped():
    made = flow(4, num_blocks=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1e3)
    _, log_det = made(torch.randn(5, 4).double(), torch.randn(5, 3).double())
    assert log_det.abs().max() <= 4 * 2.0 * 0.636 * math.pi / 2         # four scales of at most clamp (2 / pi) (pi / 2)
    assert log_det.abs().max() > 1


def test_blocks_permute_differently_and_reproducibly():
    a, b = nir.GlowFlow(16, 3), nir.GlowFlow(16, 3)
    permutations = [tuple(block.permutation.tolist()) for block in a.blocks]
    assert len(set(permutations)) == 5 and permutations == [tuple(block.permutation.tolist()) for block in b.blocks]
    assert all(sorted(p) == list(range(16)) for p in permutations)


def test_subnets_have_the_papers_depth_and_width():
    linear = [m for m in nir.GlowFlow(128, 128).blocks[0].subnet1 if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(192, 128)] + [(128, 128)] * 6 + [(128, 128)]


def test_flow_computes_in_float32_under_autocast():
    made, x, cond = nir.GlowFlow(8, 8), torch.randn(3, 8), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = made.log_prob(x, cond)
    assert inside.dtype == torch.float32 and torch.equal(inside, made.log_prob(x, cond))


def test_flow_needs_two_dimensions():
    with pytest.raises(ValueError, match="two dimensions"):
        nir.GlowFlow(1, 3)


def test_soft_clamp_is_the_official_one():
    raw = torch.tensor([[1e9, 7], [1, 7], [0, 7], [-1e9, 7]])
    s, t = nir.GlowFlow(2, 3).blocks[0].scale_shift(lambda x: raw, torch.zeros(4, 1), torch.zeros(4, 3))
    expected = [2 * 0.636 * angle for angle in (math.pi / 2, math.pi / 4, 0, -math.pi / 2)]
    assert s[:, 0].tolist() == pytest.approx(expected) and t[:, 0].tolist() == [7] * 4


def test_subnets_are_linear_layers_with_relu_between_them_alone():
    for block in nir.GlowFlow(6, 3).blocks:
        for subnet in (block.subnet1, block.subnet2):
            assert [type(layer).__name__ for layer in subnet] == ["Linear", "ReLU"] * 7 + ["Linear"]


def test_each_permutation_is_seeded_by_its_blocks_index():
    for i, block in enumerate(nir.GlowFlow(16, 3).blocks):
        assert block.permutation.tolist() == np.random.RandomState(i).permutation(16).tolist()


# ------------------------------------------------------------------------------------------------------- NIR term

def criterion(name="proxyanchor", **options):
    torch.manual_seed(2)
    return nir.NIR(nir.LOSSES[name](4, 6), 6, **options).double()


def test_nll_form_is_the_flows_negative_log_likelihood_given_the_own_proxy():
    x, y = batch(D=6)
    made = criterion(form="nll", nir_weight=0.5)
    psi, rho = F.normalize(x), F.normalize(made.proxy_loss.proxies)
    expected = -sum(made.flow.log_prob(psi[i:i + 1], rho[y[i]:y[i] + 1]) for i in range(len(x))) / len(x)
    assert made.losses(x, y)["nir"].item() == pytest.approx(0.5 * expected.item(), rel=1e-12)


def test_exp_form_is_the_official_exponential_and_weights_the_proxy_loss():
    x, y = batch(D=6)
    made = criterion(form="exp", proxy_weight=0.0075)
    zeta, log_det = made.flow(F.normalize(x), F.normalize(made.proxy_loss.proxies)[y])
    expected = sum(math.exp(0.5 * (zeta[i] ** 2).sum().item() - log_det[i].item()) for i in range(len(x))) / len(x)
    losses = made.losses(x, y)
    assert losses["nir"].item() == pytest.approx(expected, rel=1e-12)
    assert losses["proxy"].item() == pytest.approx(0.0075 * made.proxy_loss(x, y).item(), rel=1e-12)


def test_condition_is_the_nearest_centre_of_the_own_class():
    x, y = batch(D=6)
    made = criterion("softtriple", form="nll")
    centres, rho = F.normalize(made.proxy_loss.proxies, dim=-1), []
    for i in range(len(x)):
        rho.append(max(centres[y[i]], key=lambda centre: centre.detach() @ x[i]))
    expected = -made.flow.log_prob(F.normalize(x), torch.stack(rho)).mean()
    assert made.losses(x, y)["nir"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_both_forms_reach_embeddings_proxies_and_flow():
    for form in ("nll", "exp"):
        x, y = batch(D=6)
        made, x = criterion(form=form), x.requires_grad_()
        made.losses(x, y)["nir"].backward()
        assert x.grad.abs().sum() > 0 and made.proxy_loss.proxies.grad.abs().sum() > 0
        assert all(p.grad.abs().sum() > 0 for p in made.flow.parameters() if p.dim() == 2)


def test_exponential_form_goes_silent_where_the_flow_fits_and_the_plain_one_does_not():
    """d exp(u) = exp(u) du: at a likelihood e^100 times higher the exponential's pull is e^-100 of the plain one's."""
    x, y = batch(D=6)
    made = criterion(form="exp")
    x = x.requires_grad_()
    norms = {}
    for form in ("nll", "exp"):
        made.form = form
        for shift in (0.0, 100.0):                 # a flow that fits: the same with 100 nats of likelihood added
            made.flow.forward = lambda psi, rho, s=shift: (lambda z, d: (z, d + s))(*nir.GlowFlow.forward(made.flow, psi, rho))
            norms[form, shift] = torch.autograd.grad(made.nir(x, y), x)[0].norm().item()
    assert norms["nll", 100.0] == pytest.approx(norms["nll", 0.0])
    assert norms["exp", 100.0] < 1e-40 * norms["exp", 0.0]


def test_noise_takes_the_gain_from_shrinking_a_class_that_is_smaller_than_it():
    """A Gaussian flow of the best deviation s for embeddings at their proxy: nll falls without end as s does, with noise
    it has its least value at s = noise, the noise's entropy D/2 log(2 pi e noise^2)."""
    made, y = criterion(form="nll"), torch.zeros(400, dtype=torch.long)
    x, rho = F.normalize(made.proxy_loss.proxies.detach())[y], F.normalize(made.proxy_loss.proxies.detach())[0]

    def nll(s, noise):
        made.noise = noise
        made.flow.forward = lambda psi, cond: ((psi - rho) / s, psi.new_full((len(psi),), -6 * math.log(s)))
        torch.manual_seed(0)
        return made.nir(x, y).item()
    assert nll(1e-3, 0.0) < nll(1e-2, 0.0) < nll(0.1, 0.0)
    values = {s: nll(s, 0.1) for s in (0.05, 0.07, 0.1, 0.14, 0.2)}
    assert min(values, key=values.get) == 0.1
    assert values[0.1] == pytest.approx(3 * math.log(2 * math.pi * math.e * 0.01), abs=0.1)


def test_without_a_weight_there_is_no_flow_and_the_loss_is_the_proxy_loss():
    x, y = batch(D=6)
    made = criterion(nir_weight=0)
    assert list(made.losses(x, y)) == ["proxy"] and made.losses(x, y)["proxy"].equal(made.proxy_loss(x, y))
    assert sum(len(group["params"]) for group in made.param_groups(1.0)) == 1


def test_learning_rates_are_multiples_of_the_base_rate():
    groups = criterion(proxy_lr=4000, flow_lr=50).param_groups(1e-5)
    assert [group["lr"] for group in groups] == pytest.approx([0.04, 5e-4])
    assert all("weight_decay" not in group for group in groups)


def test_diagnostics_are_mean_cosines_to_the_own_proxy_and_between_different_images_of_a_class():
    made = nir.NIR(nir.ProxyAnchor(3, 2), 2, nir_weight=0)
    made.proxy_loss.proxies.data = torch.tensor([[1.0, 0], [0, 5], [0, -1]])
    x, y = torch.tensor([[2.0, 0], [0, 3], [1, 1], [0, 2], [1, -1]]), torch.tensor([0, 0, 1, 1, 2])
    half = 0.5 ** 0.5
    assert made.diagnostics(x, y) == pytest.approx({"own_proxy_cosine": (1 + 0 + half + 1 + half) / 5, "class_cosine": half / 2})
    many = nir.NIR(nir.SoftTriple(1, 2, centers=2), 2, nir_weight=0)
    many.proxy_loss.proxies.data = torch.tensor([[[0.0, 1], [3, 0]]])
    assert many.diagnostics(x[[0, 2]], y[[0, 0]])["own_proxy_cosine"] == pytest.approx((1 + half) / 2)       # the nearest centre


def test_inverse_and_choice_of_the_centre_are_in_float32_under_autocast():
    torch.manual_seed(0)
    made, x, y = nir.NIR(nir.SoftTriple(1, 4, centers=2), 4, form="nll"), torch.eye(1, 4), torch.tensor([0])
    made.proxy_loss.proxies.data = torch.tensor([[[math.cos(0.02), math.sin(0.02), 0, 0], [1, 0, 0, 0]]])   # bfloat16: a tie
    z, cond = torch.randn(3, 4), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = made.losses(x, y)["nir"], made.flow.inverse(z, cond)
    assert all(map(torch.equal, inside, (made.losses(x, y)["nir"], made.flow.inverse(z, cond))))


# -------------------------------------------------------------------------------------------------------- presets

PAPER = dict(batch_size=90, lr=1e-5, lr_steps=[], warmup=1, proxy_lr=4000, flow_lr=50, nir_form="exp", nir_weight=1.0,
             nir_noise=0.0)


@pytest.mark.parametrize("dataset, nir_weight, expected", [
    ("cub200", None, dict(epochs=100, proxy_weight=0.0075)),
    ("cars196", None, dict(epochs=100, proxy_weight=0.01)),
    ("sop", None, dict(epochs=300, proxy_weight=0.3, lr_steps=[140, 230], lr_gamma=0.2, warmup=5, flow_lr=1)),
    ("cub200", 0, dict(epochs=100, proxy_weight=1.0, proxy_lr=2000, warmup=0)),
    ("sop", 0, dict(epochs=300, proxy_weight=1.0, lr_steps=[140, 230], lr_gamma=0.2, proxy_lr=2000, warmup=0, flow_lr=1))])
def test_presets_are_the_official_settings_field_by_field(dataset, nir_weight, expected):
    for dim in (128, 512):
        args = argparse.Namespace(dataset=dataset, arch="resnet50", weights="imagenet", embed_dim=dim, nir_weight=nir_weight)
        given = nir.preset(args)
        wanted = {**PAPER, "lr_gamma": given["lr_gamma"], **expected}                  # the cut means nothing without steps
        assert given == wanted


def test_a_papers_run_has_the_papers_network_and_optimiser(monkeypatch):
    cub = vars(started(monkeypatch, nir, "--dataset", "cub200", "--embed_dim", "512")[0])
    assert (cub["arch"], cub["weights"], cub["image_size"], cub["augment"], cub["weight_decay"], cub["usual_batch_size"]) == (
        "resnet50", "imagenet", 224, "photo", 4e-4, 90)


def test_the_command_line_beats_the_preset(monkeypatch):
    given = vars(started(monkeypatch, nir, "--dataset", "toy", "--epochs", "3", "--proxy_lr", "7", "--nir_form", "exp", "--lr_steps")[0])
    assert (given["epochs"], given["proxy_lr"], given["nir_form"], given["lr_steps"]) == (3, 7, "exp", [])


def test_nir_acts_fades_and_pulls_as_the_gradient_shares_say():
    """On free embeddings: the plain form shrinks each class to a point, the exponential form stops acting."""
    torch.manual_seed(0)
    y = torch.arange(8).repeat_interleave(3)
    start = torch.randn(24, 16)
    spread, share = {}, {}
    for form in ("nll", "exp"):
        torch.manual_seed(0)
        made = nir.NIR(nir.ProxyAnchor(8, 16), 16, form=form, nir_weight=0.5)
        x = start.clone().requires_grad_()
        adam = torch.optim.Adam([{"params": [x, made.proxy_loss.proxies], "lr": 0.03},
                                 {"params": made.flow.parameters(), "lr": 1e-3}])
        for _ in range(200):
            losses = made.losses(x, y)
            adam.zero_grad()
            sum(losses.values()).backward()
            adam.step()
        share[form] = common.gradient_shares(made.losses(x, y), x)["grad_share_nir"]
        spread[form] = 1 - made.diagnostics(x.detach(), y)["class_cosine"]
    assert share["exp"] < 0.01 < 0.3 < share["nll"]
    assert spread["nll"] < 0.5 * spread["exp"]


@pytest.mark.parametrize("loss", nir.LOSSES)
def test_nirs_options_reach_the_criterion(loss, monkeypatch):
    _, criterion, name = started(monkeypatch, nir, *f"--dataset toy --loss {loss} --nir_form exp --nir_weight 0.7 --nir_noise "
                                 "0.3 --proxy_weight 0.2 --proxy_lr 3 --flow_lr 5".split())
    made = criterion(7)
    assert type(made.proxy_loss) is nir.LOSSES[loss] and made.proxy_loss.proxies.shape[0] == 7
    assert (made.form, made.nir_weight, made.noise, made.proxy_weight) == ("exp", 0.7, 0.3, 0.2)
    assert [group["lr"] for group in made.param_groups(0.1)] == pytest.approx([0.3, 0.5])
    assert name == f"toy-{loss}-exp0.7-seed0"


@pytest.mark.parametrize("dataset, expected", [("toy", 0.1), ("folder", 0.0), ("cub200", 0.0)])
def test_nirs_preset_from_scratch_is_that_of_the_results(dataset, expected):
    assert nir.preset(argparse.Namespace(dataset=dataset, weights="none", embed_dim=64, nir_weight=None)) == dict(
        batch_size=90, lr=1e-3, epochs=15, lr_steps=[10, 13], lr_gamma=0.3, warmup=0, proxy_lr=10, flow_lr=1, proxy_weight=1,
        nir_form="nll", nir_weight=0.01, nir_noise=expected)


def test_negative_noise_and_proxy_weight_are_named(capsys):
    for option in ("--nir_noise", "--proxy_weight"):
        with pytest.raises(SystemExit):
            nir.main(["--dataset", "toy", option, "-1", "--device", "none"])
        assert f"{option}: -1 is not at least 0" in capsys.readouterr().err


def test_help_shows_the_settings_of_what_is_named_beside_it(capsys):
    for argv, noise, epochs, weight in (([], "0.0", "100", "0.0075"), (["--dataset", "toy"], "0.1", "15", "1.0"),
                                        (["--dataset", "sop"], "0.0", "300", "0.3"),
                                        (["--dataset", "sop", "--nir_weight", "0", "--epochs", "7"], "0.0", "7", "1.0")):
        with pytest.raises(SystemExit, match="^0$"):
            nir.main([*argv, "--help"])
        lines = capsys.readouterr().out.split("\nsettings of")[1].splitlines()[1:]
        rows = dict(line.split(maxsplit=1) for line in lines)
        assert (rows["nir_noise"], rows["epochs"], rows["proxy_weight"]) == (noise, epochs, weight)
        assert (rows["ProxyAnchor.margin"], rows["ProxyAnchor.alpha"], rows["GlowFlow.num_blocks"]) == ("0.1", "32.0", "5")
