"""The densities against closed forms, quadrature and 40-digit references; the sampler against its exact distribution;
the loss against what the paper says of it."""
import argparse
import csv
import inspect
import math
import types

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from test_common import started
from torch.utils._python_dispatch import TorchDispatchMode

import common
import data
import nir
import prob_dml
from data import UserError
from prob_dml import (
    SIMILARITIES,
    ProbabilisticProxies,
    log_vmf_normalizer,
    mean_resultant_length,
    nivmf_log_prob,
    sample_vmf,
    unit_vectors,
    vmf_log_prob,
)

CELLS = [(metric, proxy) for metric in SIMILARITIES for proxy in ("vmf", "nivmf")
         if not (proxy == "nivmf" and metric in ("cosine", "l2"))]

# dim: (kappa, log C_dim(kappa), A_dim(kappa)), by mpmath's besseli with 60 digits.
REFERENCE = {
    2: [(1e-3, -1.837877316409329859, 0.000499999937500010417), (0.5, -1.899426785594826788, 0.242499612580801945),
        (10, -9.780849149528041038, 0.948599825954845959), (200, -198.2704064206328152, 0.997496859251643528),
        (1e4, -9996.313780847841646, 0.99994999874987498), (1e5, -99995.16247705072581, 0.999994999987499875)],
    3: [(1e-3, -2.531024413635951904, 0.000333333311111113228), (0.5, -2.572349101582208902, 0.163953413738652849),
        (10, -9.535291971354146175, 0.900000004122307253), (200, -196.5395596998613088, 0.995),
        (1e4, -9992.627536694433163, 0.9999), (1e5, -99990.32495160143912, 0.99999)],
    5: [(1e-3, -3.270289124710525157, 0.00019999999428571454), (0.5, -3.295200394470957401, 0.0992935566076897645),
        (10, -8.965223433691961055, 0.81111110602184292), (200, -193.0741068578990733, 0.990025125628140704),
        (1e4, -9985.254973383865992, 0.9998000100010001), (1e5, -99980.64989320282823, 0.999980000100001)],
    64: [(1e-3, 40.76772001776205975, 0.0000156249999963008996), (0.5, 40.76576695836857667, 0.00781203766556876586),
        (10, 39.9954458219142842, 0.152711904197083136), (200, -88.59306580987668993, 0.854497184374463223),
        (1e4, -9767.719366011000857, 0.996854804218904502), (1e5, -99695.23117167135166, 0.999685048037979228)],
    128: [(1e-3, 127.0534565204537202, 7.8124999995304988e-6), (0.5, 127.0524799691957818, 0.00390619131408642821),
        (10, 126.6639961150620199, 0.0776609763821283636), (200, 29.60389623206459671, 0.731163498489644135),
        (1e4, -9531.650133330118312, 0.993669845537710636), (1e5, -99385.6145828428205, 0.999365198439464715)],
    512: [(1e-3, 867.9681031594176984, 1.95312499999257841e-6), (0.5, 867.9678590198852231, 0.000976561572303004356),
        (10, 867.8704654550120235, 0.0195238340230251351), (200, 831.4027309436825066, 0.344427428907452438),
        (1e4, -8113.084401543781383, 0.974775103410568375), (1e5, -97527.7000089682401, 0.997448251264727396)],
    2048: [(1e-3, 4898.383862653860797, 4.88281249999883698e-7), (0.5, 4898.383801618950505, 0.000244140610462283492),
        (10, 4898.359448882350078, 0.00488269620378865689), (200, 4888.664178273524128, 0.0967431374477041261),
        (1e4, -2402.000257928643, 0.902869542562498814), (1e5, -90092.35533979365993, 0.989817325591761068)],
}


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def directions(*shape, seed=0):
    return unit_vectors(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def quadrature(dim, n=400):
    """Points (N, dim) and weights (N,) of a quadrature over the circle or the sphere."""
    phi = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    if dim == 2:
        return torch.stack([phi.cos(), phi.sin()], 1), torch.full((n,), 2 * math.pi / n, dtype=torch.float64)
    w, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(n))
    radius = (1 - w.square()).sqrt()
    points = torch.stack([torch.outer(radius, phi.cos()), torch.outer(radius, phi.sin()), w[:, None].expand(n, n)], -1)
    return points.reshape(-1, 3), (weights * 2 * math.pi / n).repeat_interleave(n)


# ------------------------------------------------------------------------------------------------ the normaliser

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-7)])
def test_log_normalizer_its_gradient_and_the_mean_resultant_length_match_40_digit_references(dtype, tolerance):
    for dim, rows in REFERENCE.items():
        kappa = torch.tensor([row[0] for row in rows], dtype=dtype, requires_grad=True)
        log_c, A = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (1, 2))
        value, mean_length = log_vmf_normalizer(kappa, dim), mean_resultant_length(kappa, dim)
        gradient, = torch.autograd.grad(value.sum(), kappa)
        assert value.dtype == gradient.dtype == dtype
        for actual, expected in ((value, log_c), (gradient, -A), (mean_length, A)):
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dim", [2, 3, 5, 64, 81, 82, 512])
def test_normalizer_and_mean_resultant_length_are_differentiable_twice(dim):
    kappa = double(1e-3, 0.3, 4.0, 60.0, 700.0).requires_grad_()
    for function in (log_vmf_normalizer, mean_resultant_length):
        assert torch.autograd.gradcheck(lambda k: function(k, dim), kappa, eps=1e-5, atol=1e-7, rtol=1e-4)
        assert torch.autograd.gradgradcheck(lambda k: function(k, dim), kappa, eps=1e-5, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_of_the_normalizer_stay_right_for_tiny_and_huge_concentrations(dtype):
    for dim in (2, 3, 512, 2048):
        kappa = torch.tensor([0.0, 1e-6, 1e8], dtype=dtype, requires_grad=True)
        value = log_vmf_normalizer(kappa, dim)
        gradient, = torch.autograd.grad(value.sum(), kappa, create_graph=True)
        second, = torch.autograd.grad(gradient.sum(), kappa)
        sphere = math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)  # log of its area
        assert value[0].item() == pytest.approx(-sphere, rel=1e-6)
        assert gradient[0] == 0 and gradient[1].item() == pytest.approx(-1e-6 / dim)
        assert gradient[2].item() == pytest.approx(-1 + (dim - 1) / 2e8, rel=1e-6)  # A = 1 - (D-1) / (2 kappa) + ...
        assert second[:2].tolist() == pytest.approx([-1 / dim] * 2) and abs(second[2].item()) < 1e-7
        A_prime, = torch.autograd.grad(mean_resultant_length(kappa, dim).sum(), kappa)
        assert A_prime[:2].tolist() == pytest.approx([1 / dim] * 2) and abs(A_prime[2].item()) < 1e-7


# ------------------------------------------------------------------------------------------------- the densities

@pytest.mark.parametrize("dim", [2, 3, 10, 128])
def test_vmf_density_is_scipys(dim):
    z, mu = directions(50, dim), directions(dim, seed=1)
    for kappa in (0.1, 5.0, 80.0):
        expected = scipy.stats.vonmises_fisher(mu.numpy(), kappa).logpdf(z.numpy())
        np.testing.assert_allclose(vmf_log_prob(z, mu, double(kappa)), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dim", [2, 3])
def test_vmf_integrates_to_one(dim):
    z, weights = quadrature(dim)
    for kappa in (1e-3, 1.0, 30.0, 300.0):
        integral = (vmf_log_prob(z, directions(dim), double(kappa)).exp() * weights).sum()
        assert integral.item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("K", [[2.0, 10.0], [1.0, 20.0], [0.1, 30.0], [2.0, 5.0, 10.0], [1.0, 1.0, 20.0],
                               [0.5, 12.0, 4.0]])
def test_nivmf_integrates_to_one_on_the_circle_and_on_the_sphere(K):
    z, weights = quadrature(len(K), n=20000 if len(K) == 2 else 600)
    mu = torch.cat([directions(4, len(K)), torch.eye(len(K), dtype=torch.float64)])
    density = nivmf_log_prob(z, mu, double(*K).expand(len(mu), -1)).exp()
    np.testing.assert_allclose(weights @ density, 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 64, 512])
def test_nivmf_is_the_vmf_where_all_concentrations_are_equal(dim):
    z, mu = directions(20, dim), directions(6, dim, seed=1)
    k = double(0.1, 1, 7, 50, 300, 1e4)
    expected = vmf_log_prob(z[:, None], mu, k)
    torch.testing.assert_close(nivmf_log_prob(z, mu, k[:, None].expand(6, dim)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 3e-4)])
def test_nivmf_is_the_formula_for_any_leading_shape(dtype, tolerance):
    z, mu = directions(2, 3, 512), directions(4, 512, seed=1)
    K = 0.1 + 50 * torch.rand(4, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for form in ("exact", "official", "official log-likelihood"):
        given = z.to(dtype), mu.to(dtype), K.to(dtype)
        is_loglik = form == "official log-likelihood"
        actual = prob_dml.official_log_likelihood(*given) if is_loglik else nivmf_log_prob(*given, form)
        assert actual.shape == (2, 3, 4)
        for c in range(4):
            Kz, Kmu = K[c] * z, K[c] * mu[c]
            log_p = log_vmf_normalizer(Kmu.norm(), 512) + K[c].log().sum()
            log_p = log_p + (z * Kmu).sum(-1) if form == "official" else (
                log_p + (Kz * Kmu).sum(-1) / Kz.norm(dim=-1))
            log_p = log_p - (512 * Kz.norm(dim=-1).log() if form == "exact" else Kmu.norm().log())
            torch.testing.assert_close(actual[..., c].double(), log_p, rtol=1e-7, atol=tolerance)


def test_official_forms_do_not_integrate_to_one():
    z, weights = quadrature(3, n=600)
    mu = torch.cat([torch.eye(3, dtype=torch.float64), directions(3, 3)])

    def integral(metric, *K):
        K = double(*K).expand(6, 3)
        if metric == "loglik":
            return weights @ prob_dml.official_log_likelihood(z, mu, K).exp()
        return weights @ nivmf_log_prob(z, mu, K, "official").exp()

    # K = k I, the log-likelihood's: D log k - log k is k^2 too much on the sphere.
    np.testing.assert_allclose(integral("loglik", 5, 5, 5), 25, rtol=1e-8)
    # For other K the factor depends on where the proxy points: it shifts the competition between classes.
    np.testing.assert_allclose(integral("loglik", 2, 5, 10)[:3], [32.896, 18.208, 34.466], atol=1e-3)
    # EL-nivMF's is a vMF with natural parameter K mu, times det K / ||K mu||.
    np.testing.assert_allclose(integral("elk", 2, 5, 10), 100 / (double(2, 5, 10) * mu).norm(dim=1), rtol=1e-8)


# -------------------------------------------------------------------------------------------------- the sampler

def angle_cdf(kappa, dim):
    """Distribution function of the angle between a vMF sample and mu, by summing its density on a fine grid."""
    width = 14 * ((dim - 2) ** 2 + 4 * kappa ** 2) ** -0.25
    mode = math.acos(2 * kappa / (dim - 2 + math.sqrt((dim - 2) ** 2 + 4 * kappa ** 2)))
    grid = np.linspace(max(0, mode - width), min(math.pi, mode + width), 20001)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = kappa * (np.cos(grid) - math.cos(mode)) + (0 if dim == 2 else (dim - 2) * np.log(np.sin(grid)))
    p = np.exp(log_p - np.nanmax(log_p[np.isfinite(log_p)]))
    cdf = np.concatenate([[0], np.cumsum(p[1:] + p[:-1])])
    return lambda theta: np.interp(theta, grid, cdf / cdf[-1])


@pytest.mark.parametrize("dim", [2, 3, 128, 512])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 30.0, 1e4])
def test_samples_follow_the_vmf(dim, kappa):
    n, generator = 10000, torch.Generator().manual_seed(dim)
    first_axis = torch.eye(1, dim, dtype=torch.float64)
    mu = torch.cat([directions(3, dim), first_axis, -first_axis])
    z = sample_vmf(mu, double(kappa).expand(5), n // 5, generator)
    assert z.shape == (n // 5, 5, dim)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(n // 5, 5, dtype=torch.float64), rtol=0, atol=1e-13)
    w = (z * mu).sum(-1)
    tangent = z - w.unsqueeze(-1) * mu
    sine = tangent.norm(dim=-1)
    # the mean resultant length
    A = mean_resultant_length(double(kappa), dim).item()
    assert abs(w.mean().item() - A) < 4 * w.std().item() / math.sqrt(n)
    # the radial component; the angle is the same test as its cosine, and has more digits
    assert scipy.stats.kstest(torch.atan2(sine, w).flatten().numpy(), angle_cdf(kappa, dim)).pvalue > 1e-3
    # the tangential part is uniform: any coordinate x of it has (1 + x) / 2 ~ Beta((D-2)/2, (D-2)/2); no mean direction
    axis = directions(5, dim, seed=3)
    axis = unit_vectors(axis - (axis * mu).sum(-1, keepdim=True) * mu)
    v = tangent / sine.unsqueeze(-1)
    x = (v * axis).sum(-1).flatten().numpy()
    if dim == 2:
        assert abs((x > 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    else:
        assert scipy.stats.kstest((1 + x) / 2, scipy.stats.beta((dim - 2) / 2, (dim - 2) / 2).cdf).pvalue > 1e-3
        # Rayleigh's test: chi^2 with D-1 degrees of freedom for each of the five
        resultant = (v.mean(0).square().sum(-1) * (n // 5) * (dim - 1)).sum().item()
        assert 1e-3 < scipy.stats.chi2.cdf(resultant, 5 * (dim - 1)) < 1 - 1e-3
        assert abs(scipy.stats.spearmanr(x, w.flatten().numpy()).statistic) < 4 / math.sqrt(n)


@pytest.mark.parametrize("dim", [2, 128, 2048])
def test_float32_samples_keep_their_distance_from_mu_where_kappa_is_large(dim):
    mu = directions(400, dim).float()
    z = sample_vmf(mu, torch.full((400,), 1e4), 5, torch.Generator().manual_seed(0))
    assert z.dtype == torch.float32 and (z.norm(dim=-1) - 1).abs().max() < 3e-6
    squared = 0.5 * (z.double() - mu.double()).square().sum(-1)  # 1 - w, without cancellation
    expected = 1 - mean_resultant_length(double(1e4), dim).item()
    assert abs(squared.mean().item() - expected) < 4 * squared.std().item() / math.sqrt(2000) + 1e-6


def test_samples_are_reproducible_and_differ_between_draws():
    mu, kappa = directions(4, 8), double(0, 1, 10, 1e5)
    a, b = (sample_vmf(mu, kappa, 3, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a, b) and not torch.isclose(a[0], a[1]).any()


def test_derivative_of_a_sample_by_kappa_is_that_of_its_quantile_function():
    # On the sphere w = mu.z has the quantile function w(u) = 1 + log(u + (1 - u) exp(-2 kappa)) / kappa.
    mu, kappa = double(1, 0, 0).expand(200, 3), double(0.05, 1, 8, 40).repeat(50).requires_grad_()
    w = sample_vmf(mu, kappa, 1, torch.Generator().manual_seed(0))[0, :, 0]
    actual, = torch.autograd.grad(w.sum(), kappa)
    k = kappa.detach().requires_grad_()
    u = (((w - 1) * k).exp() - (-2 * k).exp()) / (1 - (-2 * k).exp())
    quantile = 1 + (u.detach() + (1 - u.detach()) * (-2 * k).exp()).log() / k
    torch.testing.assert_close(quantile, w)
    torch.testing.assert_close(actual, torch.autograd.grad(quantile.sum(), k)[0], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("dim", [2, 3, 128, 512])
@pytest.mark.parametrize("kappa", [1e-3, 2.0, 50.0, 1e4])
def test_reparameterised_gradient_of_the_sample_mean_is_that_of_the_exact_mean(dim, kappa):
    n, mu = 4000, directions(dim)
    mus, kappas = mu.repeat(n, 1).requires_grad_(), torch.full((n,), kappa, dtype=torch.float64, requires_grad=True)
    z = sample_vmf(mus, kappas, 1, torch.Generator().manual_seed(1))[0]
    along_mu, = torch.autograd.grad((z @ mu).sum(), kappas, retain_graph=True)
    k = double(kappa).requires_grad_()
    exact, = torch.autograd.grad(mean_resultant_length(k, dim).sum(), k)
    assert abs(along_mu.mean().item() - exact.item()) < 4 * along_mu.std().item() / math.sqrt(n)
    # The mean is A mu: turning mu towards a tangent direction moves it by A in that direction, and by nothing along mu.
    axis = directions(dim, seed=5)
    axis = unit_vectors(axis - (axis @ mu) * mu)
    gradient, = torch.autograd.grad((z @ axis).sum(), mus)
    turned = gradient @ axis
    A = mean_resultant_length(double(kappa), dim).item()
    assert abs(turned.mean().item() - A) < 4 * turned.std().item() / math.sqrt(n)
    assert (gradient @ mu).abs().max() < 1e-12


def test_reparameterised_gradient_of_a_curved_function_matches_quadrature():
    z, weights = quadrature(3)
    q_mu, q_K = directions(1, 3, seed=7), double(1, 6, 3)[None]

    def mean_of_q(e):  # E_p[q(z)] for the image e, by quadrature
        return (weights * (vmf_log_prob(z, e / e.norm(), e.norm()) + nivmf_log_prob(z, q_mu, q_K)[:, 0]).exp()).sum()

    for norm in (0.5, 4.0, 20.0):
        e = (norm * directions(3, seed=8)).requires_grad_()
        exact, = torch.autograd.grad(mean_of_q(e), e)
        copies = e.detach().repeat(20000, 1).requires_grad_()
        samples = sample_vmf(unit_vectors(copies), copies.norm(dim=1), 1, torch.Generator().manual_seed(2))
        gradient, = torch.autograd.grad(nivmf_log_prob(samples, q_mu, q_K).exp().sum(), copies)
        assert ((gradient.mean(0) - exact).abs() < 4 * gradient.std(0) / math.sqrt(20000)).all()


@pytest.mark.parametrize("kappa", [math.nan, math.inf])
def test_sampling_a_concentration_that_is_not_finite_ends_with_an_error(kappa):
    with pytest.raises(ValueError, match="not a finite number"):
        sample_vmf(directions(2, 4), double(1, kappa), 3)


def test_a_second_derivative_of_samples_is_refused_rather_than_wrong():
    mu = F.normalize(torch.ones(1, 3)).requires_grad_()
    z = prob_dml.sample_vmf(mu, torch.ones(1), 1)
    gradient, = torch.autograd.grad((z ** 2).sum(), mu, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_zero_vector_gets_the_first_axis_and_a_short_one_its_own_direction():
    x = torch.tensor([[0.0, 0, 0], [0, 3e-6, 4e-6]], requires_grad=True)
    units = prob_dml.unit_vectors(x)
    torch.testing.assert_close(units, torch.tensor([[1, 0, 0], [0, 0.6, 0.8]]))
    gradient, = torch.autograd.grad(units.sum(), x)
    assert (gradient[0] == 0).all()


# ---------------------------------------------------------------------------------------------- the similarities

def similarity(metric, e, rho, concentration, proxy="vmf", samples=1, form="exact", seed=0):
    """Of embeddings e and classes in the directions of rho, by the function of a cell."""
    function, mu = SIMILARITIES[metric][proxy], unit_vectors(rho)
    if proxy == "vmf":
        return function(e, mu, concentration)
    if metric == "loglik":
        return function(e, mu, concentration, form)
    return function(e, mu, concentration, samples, form, generator=torch.Generator().manual_seed(seed))


def integrand(metric, log_p, log_q):
    return {"elk": (log_p + log_q).exp(), "bhattacharyya": (0.5 * (log_p + log_q)).exp(),
            "kl": log_p.exp() * (log_q - log_p)}[metric]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("metric", ["elk", "bhattacharyya", "kl"])
def test_similarity_of_two_vmfs_in_closed_form_matches_quadrature(metric, dim):
    z, weights = quadrature(dim)
    e = double(0.01, 2, 20)[:, None] * directions(3, dim)
    rho, k = 5 * directions(4, dim, seed=1), double(0.1, 1, 8, 60)
    log_p = vmf_log_prob(z[:, None], unit_vectors(e), e.norm(dim=1))[:, :, None]  # (N, B, 1)
    log_q = vmf_log_prob(z[:, None], unit_vectors(rho), k)[:, None]  # (N, 1, C)
    exact = (weights[:, None, None] * integrand(metric, log_p, log_q)).sum(0)
    exact = exact if metric == "kl" else exact.log()
    torch.testing.assert_close(similarity(metric, e, rho, k), exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("metric", ["elk", "bhattacharyya", "kl"])
def test_similarity_of_a_vmf_and_a_nivmf_matches_quadrature_within_its_standard_error(metric, dim):
    z, weights = quadrature(dim, n=2000 if dim == 2 else 400)
    e, samples = double(0.5, 4, 15)[:, None] * directions(3, dim), 20000
    rho, K = directions(4, dim, seed=1), double(0.5, 2, 5, 9)[:, None] * double(*[1, 4, 2][:dim])
    log_p = vmf_log_prob(z[:, None], unit_vectors(e), e.norm(dim=1))[:, :, None]  # (N, B, 1)
    log_q = nivmf_log_prob(z, rho, K)[:, None]  # (N, 1, C)
    values = integrand(metric, log_p, log_q)
    exact = (weights[:, None, None] * values).sum(0)  # (B, C)
    second_moment = (weights[:, None, None] * values.square() / log_p.exp()).sum(0)  # of values / p under p
    if metric == "kl":  # the entropy is not sampled: the spread is that of log q alone
        second_moment = (weights[:, None, None] * log_p.exp() * log_q.square()).sum(0)
        mean = (weights[:, None, None] * log_p.exp() * log_q).sum(0)
    else:
        mean = exact
    error = (second_moment - mean.square()).clamp_min(0).sqrt() / math.sqrt(samples)
    estimate = similarity(metric, e, rho, K, "nivmf", samples)
    estimate = estimate if metric == "kl" else estimate.exp()
    assert ((estimate - exact).abs() < 4 * error + 1e-9).all()
    assert (error < 0.1 * exact.abs() + 0.05).all()  # the test can tell


@pytest.mark.parametrize("metric", ["elk", "bhattacharyya", "kl", "loglik"])
def test_sampled_similarity_to_isotropic_nivmf_proxies_approaches_the_closed_form(metric):
    e, rho = double(1, 5, 12)[:, None] * directions(3, 16), directions(5, 16, seed=1)
    k = double(1, 3, 6, 9, 12)
    closed = similarity(metric, e, rho, k)
    sampled = similarity(metric, e, rho, k[:, None].expand(5, 16), "nivmf", samples=20000)
    torch.testing.assert_close(sampled, closed, rtol=0, atol=1e-10 if metric == "loglik" else 0.1)


def test_cosine_l2_and_loglik_are_their_formulas():
    e, rho = 3 * torch.randn(4, 6, dtype=torch.float64), 2 * torch.randn(5, 6, dtype=torch.float64)
    expected = torch.nn.functional.cosine_similarity(e[:, None], rho, dim=-1)
    torch.testing.assert_close(similarity("cosine", e, rho, None), expected)
    torch.testing.assert_close(similarity("l2", e, rho, rho.norm(dim=1)), -(e[:, None] - rho).square().sum(-1))
    K = 1 + 5 * torch.rand(5, 6, dtype=torch.float64)
    expected = nivmf_log_prob(unit_vectors(e), unit_vectors(rho), K)
    torch.testing.assert_close(similarity("loglik", e, rho, K, "nivmf"), expected)


def test_an_image_is_most_similar_to_the_class_it_points_at_under_every_metric():
    rho = directions(6, 24)
    for metric, proxy in CELLS:
        concentration = torch.full((6, 24) if proxy == "nivmf" else (6,), 20.0, dtype=torch.float64)
        sim = similarity(metric, 20 * rho, rho, concentration, proxy, samples=50)
        assert sim.shape == (6, 6) and torch.equal(sim.argmax(1), torch.arange(6)), (metric, proxy)


# ---------------------------------------------------------------------------------------------- the official form

def slow_official_loss(metric, e, labels, proxies, K, T, samples):
    """The official loss as `papers` have it, image by image, sample by sample, class by class."""
    D, losses = e.shape[1], []
    for i in range(len(e)):
        k1, mu1, logits = e[i].norm(), e[i] / e[i].norm(), []
        for c in range(len(proxies)):
            mu, k = proxies[c] / proxies[c].norm(), K[c]
            Kmu = k * mu
            factor = log_vmf_normalizer(Kmu.norm(), D) + k.log().sum() - Kmu.norm().log()
            log_q = [z[i] @ Kmu + factor for z in samples]
            log_p = [log_vmf_normalizer(k1, D) + k1 * (z[i] @ mu1) for z in samples]
            if metric == "elk":
                inside = [q / T for q in log_q]
            elif metric == "bhattacharyya":
                inside = [(0.5 * q - 0.5 * p) / T for q, p in zip(log_q, log_p)]
            if metric in ("elk", "bhattacharyya"):
                logits.append((sum(value.exp() for value in inside) / len(samples)).log())
            elif metric == "kl":
                entropy = -log_vmf_normalizer(k1, D) - k1 * mean_resultant_length(k1, D)
                logits.append((sum(log_q) / len(samples) + entropy) / T)
            else:
                Kz = k * mu1
                logits.append(((Kz @ Kmu) / Kz.norm() + factor) / T)
        losses.append(-(logits[labels[i]] - torch.stack(logits).logsumexp(0)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("metric", ["elk", "bhattacharyya", "kl", "loglik"])
@pytest.mark.parametrize("temperature", [0.2, 3.0])
def test_official_form_is_the_slow_reference_with_its_gradients(metric, temperature, monkeypatch):
    torch.manual_seed(0)
    C, D, B, S = 4, 6, 5, 3
    module = ProbabilisticProxies(C, D, metric, "nivmf", "official", samples=S, temperature=temperature,
                                  concentration_init=4.0).double()
    module.proxies.data.mul_(torch.rand(C, 1) + 0.5)                           # a length of their own changes nothing
    module.concentrations.data.mul_(0.2 + 2 * torch.rand(C, D))
    module.concentrations.data[0, :2] = double(0.03, -1.0)                     # below the floor
    module.concentrations.data[2, 3] = 0.0
    e, labels = 3 * torch.randn(B, D, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    real, drawn = prob_dml.sample_vmf, []

    def shared(mu, kappa, samples, generator=None):
        drawn.append(real(mu, kappa, samples, torch.Generator().manual_seed(3)))
        return drawn[-1]
    monkeypatch.setattr(prob_dml, "sample_vmf", shared)
    floored = module.concentrations.detach().clone().clamp(min=0.1)
    leaves = [p.detach().clone().requires_grad_() for p in (module.proxies, module.temperature, floored)]
    e = e.requires_grad_()
    loss = module(e, labels)
    assert torch.equal(module.concentrations, floored)                         # moved there, so that it can leave again
    gradients = torch.autograd.grad(loss, [e, *module.parameters()])
    x = e.detach().requires_grad_()
    z = real(unit_vectors(x), x.norm(dim=1), S, torch.Generator().manual_seed(3))
    reference = slow_official_loss(metric, x, labels, leaves[0], leaves[2], leaves[1], z)
    expected = dict(zip(("e", "proxies", "temperature", "concentrations"), torch.autograd.grad(reference, [x, *leaves])))
    assert loss.item() == pytest.approx(reference.item(), rel=1e-10) and len(drawn) == (metric != "loglik")
    for name, gradient in zip(["e", *dict(module.named_parameters())], gradients):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10)


def test_forms_agree_at_a_temperature_of_one_where_the_density_does():
    """EL-nivMF's official form is log mean q / T with T inside; with T = 1 only its density is another."""
    e, rho, K = 5 * directions(3, 6), directions(4, 6, seed=1), 2 + directions(4, 6, seed=2).abs()

    def kernel(T):
        return prob_dml.elk_nivmf(e, rho, K, 7, "official", torch.tensor(T), torch.Generator().manual_seed(0))
    z = sample_vmf(unit_vectors(e), e.norm(dim=1), 7, torch.Generator().manual_seed(0))
    expected = nivmf_log_prob(z, rho, K, "official").logsumexp(0) - math.log(7)
    torch.testing.assert_close(kernel(1.0), expected)
    for T in (0.01, 0.5):                                     # a mean of powers grows with the power
        assert (kernel(T) > expected).all()


def test_form_is_the_default_unless_it_is_named_and_vmf_proxies_have_one():
    assert ProbabilisticProxies(3, 4).form == "exact"
    assert ProbabilisticProxies(3, 4, form="official").form == "official"
    for options in (dict(proxy="vmf"), dict(proxy="vmf", form="exact"), dict(metric="l2", proxy="vmf")):
        assert ProbabilisticProxies(3, 4, **options).form == "exact"


# ------------------------------------------------------------------------------------------------------- the loss

def criterion(metric="elk", proxy="nivmf", C=7, D=16, temperature=1.0, seed=0, **options):
    torch.manual_seed(seed)
    module = ProbabilisticProxies(C, D, metric, proxy, temperature=temperature, **options)
    for parameter in (module.concentrations, module.lengths):
        if parameter is not None:
            parameter.data.mul_(0.5 + torch.rand_like(parameter))
    return module


def loss_and_gradients(module, e, labels):
    e = e.clone().requires_grad_()
    loss = module(e, labels, torch.Generator().manual_seed(0))
    return loss, torch.autograd.grad(loss, [e, *module.parameters()])


@pytest.mark.parametrize("metric, proxy", CELLS)
def test_loss_is_the_cross_entropy_of_similarity_over_temperature(metric, proxy):
    module, e, labels = criterion(metric, proxy, temperature=0.5), 5 * torch.randn(6, 16), torch.arange(6)
    sim = module.similarity(e, torch.Generator().manual_seed(0)) / 0.5
    assert sim.shape == (6, 7)
    expected = -torch.stack([sim[i, i] - sim[i].logsumexp(0) for i in range(6)]).mean()
    loss, gradients = loss_and_gradients(module, e, labels)
    torch.testing.assert_close(loss, expected)
    assert loss.shape == () and all(g.abs().max() > 0 for g in gradients[1:]), "every parameter learns"


@pytest.mark.parametrize("metric, proxy", [cell for cell in CELLS if cell[1] == "vmf" or cell[0] == "loglik"])
def test_gradients_of_the_closed_forms_match_finite_differences(metric, proxy):
    module = criterion(metric, proxy, C=4, D=5).double()
    names, values = zip(*module.named_parameters())
    e, labels = 3 * torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 2, 1])

    def loss(e, *values):
        return torch.func.functional_call(module, dict(zip(names, values)), (e, labels))

    inputs = [tensor.detach().clone().requires_grad_() for tensor in (e, *values)]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("metric", ["elk", "bhattacharyya", "kl"])
def test_gradients_by_the_parameters_match_finite_differences_on_shared_samples(metric):
    # By the parameters, for which the samples stay where they are; for the image's own gradient, see the next test.
    module = criterion(metric, "nivmf", C=4, D=5, samples=3).double()
    names, values = zip(*module.named_parameters())
    e, labels = 3 * torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 2, 1])

    def loss(*values):
        return torch.func.functional_call(module, dict(zip(names, values)),
                                          (e, labels, torch.Generator().manual_seed(0)))

    assert torch.autograd.gradcheck(loss, [value.detach().clone().requires_grad_() for value in values])


@pytest.mark.parametrize("metric", ["elk", "bhattacharyya", "kl"])
def test_gradient_of_a_sampled_similarity_by_the_image_matches_quadrature(metric):
    z, weights = quadrature(3, n=200)
    rho, K = directions(2, 3, seed=1), double(1, 4, 2) * double(1, 2)[:, None]
    e = (4 * directions(1, 3)).requires_grad_()
    log_p = vmf_log_prob(z[:, None], unit_vectors(e), e.norm(dim=1))[:, :, None]
    exact = (weights[:, None, None] * integrand(metric, log_p, nivmf_log_prob(z, rho, K)[:, None])).sum(0)
    exact = exact if metric == "kl" else exact.log()
    expected, = torch.autograd.grad(exact[0, 0] - exact[0, 1], e)
    sampled = similarity(metric, e, rho, K, "nivmf", samples=200000)
    actual, = torch.autograd.grad(sampled[0, 0] - sampled[0, 1], e)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.02 * expected.norm().item())


@pytest.mark.parametrize("proxy", ["vmf", "nivmf"])
def test_norm_is_a_temperature_the_class_posterior_sharpens_as_it_grows(proxy):
    module = criterion("elk", proxy, concentration_init=20.0, samples=20000)
    direction = unit_vectors(module.proxies[:1].detach() + 0.5 * module.proxies[1:2].detach())
    e = torch.tensor([0.0, 1, 3, 10, 30, 100])[:, None] * direction
    log_posterior = (module.similarity(e, torch.Generator().manual_seed(0))).log_softmax(1)
    entropy = -(log_posterior.exp() * log_posterior).sum(1)
    assert (entropy[1:] < entropy[:-1]).all()


@pytest.mark.parametrize("proxy", ["vmf", "nivmf"])
def test_norm_scales_the_gradient_clear_images_turn_the_network_more(proxy):
    # An image halfway between two classes, whose posterior is 1/2 whatever its norm: the norm's own factor is left.
    module = ProbabilisticProxies(2, 16, "elk", proxy, temperature=1.0, samples=2000, concentration_init=20.0)
    module.proxies.data = torch.eye(2, 16)
    sizes = []
    for norm in (0.1, 1.0, 5.0, 20.0, 80.0):
        mu = unit_vectors(torch.ones(1, 2)) @ torch.eye(2, 16)
        mu.requires_grad_()
        loss = module(norm * mu, torch.tensor([0]), torch.Generator().manual_seed(0))
        gradient, = torch.autograd.grad(loss, mu)
        sizes.append(gradient[0, :2].sub(gradient[0, :2].mean()).norm().item())  # in the plane of the two proxies
    assert all(a < b for a, b in zip(sizes, sizes[1:])), sizes


@pytest.mark.parametrize("metric, proxy", CELLS)
def test_order_of_the_classes_and_of_the_batch_does_not_matter(metric, proxy):
    module, e, labels = criterion(metric, proxy), 5 * torch.randn(6, 16), torch.arange(6)
    before = loss_and_gradients(module, e, labels)[0]
    order = torch.randperm(7)
    module.proxies.data = module.proxies.data[order]
    for parameter in (module.concentrations, module.lengths):
        if parameter is not None:
            parameter.data = parameter.data[order]
    after = loss_and_gradients(module, e, order.argsort()[labels])[0]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric, proxy", CELLS)
def test_a_batch_of_one_and_a_single_sample_work(metric, proxy):
    module = criterion(metric, proxy, samples=1)
    loss, gradients = loss_and_gradients(module, torch.randn(1, 16), torch.tensor([3]))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("metric, proxy", CELLS)
def test_a_class_far_away_gets_no_weight_and_is_no_danger(metric, proxy):
    module = criterion(metric, proxy, C=3, D=64)
    e = 100 * torch.eye(1, 64)
    module.proxies.data = torch.stack([e[0] / 100, -e[0] / 100, e[0] / 100])
    if module.concentrations is not None:
        module.concentrations.data.fill_(1e4)
    if metric == "l2":
        module.lengths.data.fill_(100)
    if metric == "cosine":
        module.temperature.data.fill_(1e-3)
    loss, (_, gradient, *_) = loss_and_gradients(module, e, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-3)
    assert gradient[1].abs().max() < 1e-6
    loss, gradients = loss_and_gradients(module, e, torch.tensor([1]))  # and it is the label
    assert 100 < loss < 1e6 and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("metric, proxy", CELLS)
def test_loss_and_gradients_are_finite_for_embeddings_of_any_norm(metric, proxy):
    module = criterion(metric, proxy, C=10, D=512)
    e = unit_vectors(torch.randn(7, 512)) * torch.tensor([0, 1e-30, 1e-6, 1e-3, 1, 1e3, 1e5])[:, None]
    for temperature in (1.0, 0.003):
        module.temperature.data.fill_(temperature)
        loss, gradients = loss_and_gradients(module, e, torch.arange(7))
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
        for i in range(7):
            loss, gradients = loss_and_gradients(module, e[i:i + 1], torch.tensor([i]))
            assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("metric", ["elk", "bhattacharyya", "kl"])
def test_an_image_exactly_opposite_to_a_proxy_has_a_finite_gradient(metric):
    e, rho, k = -8 * torch.eye(1, 4), torch.eye(2, 4), torch.full((2,), 8.0)  # k1 mu1 + k2 mu2 = 0
    inputs = [tensor.requires_grad_() for tensor in (e, rho, k)]
    sim = similarity(metric, *inputs)
    assert sim.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(sim.sum(), inputs))


@pytest.mark.parametrize("metric", ["elk", "bhattacharyya", "kl"])
def test_float32_loss_is_the_float64_loss(metric):
    module, e, labels = criterion(metric, "vmf", C=10, D=512), 2 * torch.randn(6, 512), torch.arange(6)
    single = module(e, labels)
    torch.testing.assert_close(single.double(), module.double()(e.double(), labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric, proxy", CELLS)
def test_no_tensor_grows_with_batch_times_classes_times_dimension(metric, proxy):
    S, B, C, D = 3, 10, 40, 30

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if torch.is_tensor(tensor):
                    self.size = max(self.size, tensor.numel())
            return result

    module, e = criterion(metric, proxy, C=C, D=D, samples=S), torch.randn(B, D, requires_grad=True)
    with Largest() as largest:
        module(e, torch.arange(B)).backward()
    assert largest.size <= max(S * B * C, S * B * D, C * D, S * B * 24)


def test_warm_start_turns_proxies_to_the_mean_embedding_of_their_classes_and_keeps_their_length():
    module = criterion("elk", "vmf", C=3, D=4, concentration_init=50.0)
    untouched = module.proxies[1].detach().clone()
    e = torch.tensor([[3.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 2, 0]])                      # raw: the longer one weighs more
    module.warm_start(e, torch.tensor([0, 0, 2]))
    torch.testing.assert_close(module.proxies[0], 50 * torch.tensor([0.6, 0.8, 0, 0]))
    torch.testing.assert_close(module.proxies[2], 50 * torch.tensor([0.0, 0, 1, 0]))
    assert torch.equal(module.proxies[1], untouched)


@pytest.mark.parametrize("metric, proxy", CELLS)
def test_proxies_are_stored_with_the_length_of_the_first_concentration(metric, proxy):
    module = ProbabilisticProxies(100, 512, metric, proxy, concentration_init=200.0)
    torch.testing.assert_close(module.proxies.norm(dim=1), torch.full((100,), 200.0))
    e, labels = torch.randn(3, 512), torch.tensor([4, 50, 99])
    before = loss_and_gradients(module, e, labels)[0]
    module.proxies.data.mul_(0.1)                                                        # direction alone counts
    torch.testing.assert_close(loss_and_gradients(module, e, labels)[0], before, rtol=1e-4, atol=1e-4)
    if metric == "l2":           # its length is a parameter of its own, and starts as that of Xavier's normal does
        assert module.concentrations is None and module.lengths.shape == (100, 1)
        xavier = torch.nn.init.xavier_normal_(torch.empty(100, 512), gain=200.0).norm(dim=1).mean().item()
        assert module.lengths.mean().item() == pytest.approx(xavier, rel=0.01)


def test_concentrations_stay_at_the_floor_or_above_and_can_leave_it():
    module, e, labels = criterion(C=4, D=8), torch.randn(4, 8), torch.arange(4)
    module.concentrations.data[0] = -3
    loss, gradients = loss_and_gradients(module, e, labels)
    gradient = dict(zip(dict(module.named_parameters()), gradients[1:]))["concentrations"]
    assert loss.isfinite() and (module.concentrations[0] == prob_dml.MIN_CONCENTRATION).all()
    assert (gradient[0] != 0).all()


def test_temperature_itself_is_learned_down_to_its_floor_and_can_leave_it():
    module, e = criterion(temperature=0.003), 20 * torch.randn(6, 16)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.002)
    module(e, torch.arange(6)).backward()
    optimizer.step()
    assert abs(module.temperature.item() - 0.003) == pytest.approx(0.002, rel=1e-3)      # Adam's first step is its rate
    module.temperature.data.fill_(-1.0)
    _, gradients = loss_and_gradients(module, e, torch.arange(6))
    assert module.temperature.item() == pytest.approx(1e-3)
    assert dict(zip(dict(module.named_parameters()), gradients[1:]))["temperature"] != 0


def test_statistics_of_norms_concentrations_and_temperature():
    module = ProbabilisticProxies(2, 4, temperature=0.25)
    module.concentrations.data = torch.tensor([[1.0, 1, 3, 3], [5, 5, 5, 5]])
    values = module.statistics(torch.tensor([[3.0, 4, 0, 0], [0, 0, 0, 1]]))
    assert values == pytest.approx({"norm_mean": 3, "norm_std": 2, "temperature": 0.25, "concentration": 3.5,
                                    "anisotropy": 0.25})
    assert set(criterion("cosine", "vmf").statistics(torch.ones(1, 16))) == {"norm_mean", "norm_std", "temperature"}


@pytest.mark.parametrize("options, message", [
    (dict(metric="mahalanobis"), "metric must be one of elk"), (dict(proxy="gauss"), "proxy must be one of nivmf"),
    (dict(form="none"), "form must be one of exact"), (dict(metric="cosine"), "use proxy vmf"),
    (dict(metric="l2"), "use proxy vmf"), (dict(proxy="vmf", form="official"), "vMF proxies have one form"),
    (dict(samples=0), "samples must be at least 1"), (dict(dim=1), "dim must be at least 2"),
    (dict(temperature=0.0), "temperature must be"), (dict(concentration_init=-1.0), "concentration_init must be"),
    (dict(temperature=math.nan), "temperature must be"), (dict(num_classes=0), "num_classes must be")])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ProbabilisticProxies(**{"num_classes": 3, "dim": 4} | options)


def test_bad_shapes_and_labels_are_named():
    module = ProbabilisticProxies(3, 4)
    for bad in (lambda: module(torch.ones(2, 5), torch.zeros(2, dtype=torch.long)),
                lambda: module(torch.ones(2, 4), torch.zeros(3, dtype=torch.long)),
                lambda: module.warm_start(torch.ones(2, 4), torch.tensor([0, 3])),
                lambda: module.warm_start(torch.ones(2, 4), torch.tensor([0])),
                lambda: log_vmf_normalizer(torch.ones(2), 1),
                lambda: sample_vmf(torch.ones(2, 3), torch.ones(3), 5),
                lambda: sample_vmf(torch.ones(2, 3), torch.ones(2), 0),
                lambda: nivmf_log_prob(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 2)),
                lambda: nivmf_log_prob(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 3), "approximate")):
        with pytest.raises(ValueError):
            bad()


def test_statistics_are_of_what_the_loss_uses_that_is_above_the_floors():
    module = prob_dml.ProbabilisticProxies(1, 2)
    module.temperature.data.fill_(-1.0)
    module.concentrations.data = torch.tensor([[-5.0, 0.3]])
    values = module.statistics(torch.eye(2))
    assert (values["temperature"], values["concentration"]) == pytest.approx((1e-3, 0.2))


def test_class_defaults_are_the_papers():
    given = {name: p.default for name, p in inspect.signature(prob_dml.ProbabilisticProxies).parameters.items()}
    assert (given["samples"], given["temperature"], given["concentration_init"]) == (5, 0.003, 10)
    assert inspect.signature(nir.NIR).parameters["form"].default == "nll"                        # the paper's


# --------------------------------------------------------------------------------------------------------- training

def test_proxyanchor_is_on_the_directions_of_the_same_proxies():
    torch.manual_seed(0)
    embeddings, labels = 7 * torch.randn(6, 5), torch.tensor([0, 0, 1, 1, 2, 2])
    made = prob_dml.Criterion(ProbabilisticProxies(3, 5, proxy="vmf"), proxyanchor_weight=0.5)
    anchor = nir.ProxyAnchor(3, 5)
    anchor.proxies.data.copy_(made.proxies.proxies.data)
    losses = made.losses(embeddings, labels)
    assert losses["elk"].item() == pytest.approx(made.proxies(embeddings, labels).item())
    assert losses["proxyanchor"].item() == pytest.approx(0.5 * anchor(embeddings, labels).item())
    assert list(prob_dml.Criterion(ProbabilisticProxies(3, 5)).losses(embeddings, labels)) == ["elk"]


def test_each_parameter_is_in_one_group_at_its_own_rate():
    made = prob_dml.Criterion(ProbabilisticProxies(3, 5), 1.0, proxy_lr=2, concentration_lr=3, temperature_lr=5)
    rates = {id(group["params"][0]): group["lr"] for group in made.param_groups(0.1)}
    inner = made.proxies
    assert len(rates) == len(list(made.parameters())) == 3
    assert rates == pytest.approx({id(inner.proxies): 0.2, id(inner.concentrations): 0.3, id(inner.temperature): 0.5})


MAIN = dict(batch_size=64, warmup=0, lr=1e-5, proxy_lr=5000, concentration_lr=20000, temperature=0.003, temperature_lr=200,
            samples=5, proxy="nivmf")
CELL = dict(batch_size=106, warmup=0, lr=1e-5, epochs=50, lr_steps=[], proxy_lr=5000, concentration_lr=50000,
            concentration_init=10, norm_multiplier=150, temperature=1.0, temperature_lr=500, samples=10)


@pytest.mark.parametrize("dataset, dim, metric, proxy, expected", [
    ("cub200", 128, "elk", None, {**MAIN, **dict(epochs=250, lr_steps=[25, 50], lr_gamma=0.3, concentration_init=6,
                                                 norm_multiplier=30)}),
    ("cub200", 512, "elk", "nivmf", {**MAIN, **dict(epochs=250, lr_steps=[31], lr_gamma=0.1, concentration_init=18,
                                                    norm_multiplier=50)}),
    ("cars196", 128, "elk", None, {**MAIN, **dict(epochs=300, lr_steps=[60, 80], lr_gamma=0.1, proxy_lr=7500,
                                                  concentration_lr=7500, concentration_init=9, norm_multiplier=12)}),
    ("cars196", 512, "elk", None, {**MAIN, **dict(epochs=300, lr_steps=[105, 170], lr_gamma=0.2, concentration_init=22,
                                                  norm_multiplier=10)}),
    ("cub200", 512, "elk", "vmf", CELL), ("cub200", 512, "bhattacharyya", "vmf", CELL), ("cub200", 512, "kl", "vmf", CELL),
    ("cub200", 512, "loglik", None, {**CELL, "temperature": 1 / 32, "norm_multiplier": 1, "proxy": "nivmf"}),
    ("cub200", 512, "l2", None, {**CELL, "concentration_init": 200, "norm_multiplier": 1, "proxy": "vmf"}),
    ("cub200", 512, "cosine", None, {**CELL, "temperature": 1 / 256, "norm_multiplier": 1, "proxy": "vmf"})])
def test_presets_are_the_official_settings_field_by_field(dataset, dim, metric, proxy, expected):
    args = argparse.Namespace(dataset=dataset, arch="resnet50", weights="imagenet", metric=metric, proxy=proxy, form=None,
                              embed_dim=dim, proxyanchor_weight=0.0)
    given = prob_dml.preset(args)
    wanted = {"proxy": proxy, **expected, "form": "exact"}
    wanted.setdefault("lr_gamma", given["lr_gamma"])                                     # means nothing without steps
    assert given == wanted
    args.form = "official"
    assert prob_dml.preset(args)["form"] == "official"                # asked for: where there is one form, an error follows


@pytest.mark.parametrize("argv, expected", [
    ("", dict(dataset="cub200", arch="resnet50", metric="elk", proxyanchor_weight=0.0, usual_batch_size=64, batch_size=None)),
    ("--dataset toy", dict(temperature=0.1, concentration_init=10, norm_multiplier=40, samples=200, concentration_lr=200)),
    ("--dataset toy --metric kl", dict(proxy="nivmf", temperature=0.1, concentration_init=10, norm_multiplier=10)),
    ("--dataset toy --metric loglik", dict(temperature=0.3, concentration_init=30, concentration_lr=600)),
    ("--metric elk --proxyanchor_weight 5 --epochs 7", dict(proxyanchor_weight=5.0, epochs=7))])
def test_the_command_line_beats_the_preset(monkeypatch, argv, expected):
    given = vars(started(monkeypatch, prob_dml, *argv.split())[0])
    assert {key: given[key] for key in expected} == expected


# The first steps of the papers' runs: what their rates do to what is stored.

@pytest.mark.parametrize("dataset, dim, form", [(dataset, dim, form) for dataset in ("cub200", "cars196")
                                                for dim in (128, 512) for form in ("exact", "official")])
def test_first_steps_of_a_papers_run_keep_warm_started_proxies_and_free_the_temperature(dataset, dim, form):
    """On synthetic embeddings, 100 classes: a step turns no proxy far, T leaves 0.003 and ProxyAnchor gets its share."""
    args = argparse.Namespace(dataset=dataset, arch="resnet50", weights="imagenet", metric="elk", proxy=None, form=form,
                              embed_dim=dim, proxyanchor_weight=5.0)
    preset = prob_dml.preset(args)
    torch.manual_seed(0)
    module = ProbabilisticProxies(100, dim, "elk", "nivmf", form, preset["samples"], preset["temperature"],
                                  preset["concentration_init"])
    made = prob_dml.Criterion(module, 5.0, preset["proxy_lr"], preset["concentration_lr"], preset["temperature_lr"])
    labels = torch.arange(100).repeat_interleave(10)
    centres = torch.randn(100, dim)
    embeddings = preset["norm_multiplier"] / 3 * unit_vectors(centres[labels] + 1.5 * torch.randn(1000, dim))
    module.warm_start(embeddings, labels)
    first = unit_vectors(module.proxies.detach())
    optimizer = torch.optim.Adam(made.param_groups(preset["lr"]))
    for step in range(90):                                                           # CUB's epoch has 91 batches
        chosen = torch.randperm(100)[:32].repeat_interleave(2) * 10 + torch.randint(10, (64,))
        optimizer.zero_grad()
        sum(made.losses(embeddings[chosen], labels[chosen]).values()).backward()
        optimizer.step()
        if step == 0:
            assert (unit_vectors(module.proxies.detach()) * first).sum(1).min() > 0.99
    assert module.temperature > 0.02
    batch = embeddings[chosen].clone().requires_grad_()
    assert common.gradient_shares(made.losses(batch, labels[chosen]), batch)["grad_share_proxyanchor"] > 0.1


@pytest.mark.parametrize("metric, proxy", CELLS)
def test_every_cell_trains_from_the_command_line(metric, proxy, tmp_path, capsys):
    """Eight epochs on pictures of one colour each; the log follows norm, concentration and temperature."""
    rng = torch.Generator().manual_seed(0)
    for c in range(8):
        colour = torch.rand(3, 1, 1, generator=rng)
        for i in range(4):
            path = tmp_path / "photos" / f"{c}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            torchvision.utils.save_image((colour + 0.1 * torch.randn(3, 20, 20, generator=rng)).clamp(0, 1), path)
    prob_dml.main(["--dataset", "folder", "--data_root", str(tmp_path / "photos"), "--arch", "conv4", "--image_size", "16",
                   "--embed_dim", "8", "--batch_size", "8", "--workers", "0", "--device", "cpu", "--epochs", "8",
                   "--metric", metric, "--proxy", proxy, "--proxyanchor_weight", "0.1", "--out", str(tmp_path / "run")])
    first, *_, last = csv.DictReader(open(tmp_path / "run/log.csv"))
    assert {metric, "proxyanchor", f"grad_share_{metric}", "norm_mean", "norm_std", "temperature"} <= last.keys()
    assert ("anisotropy" in last) == (proxy == "nivmf") and ("concentration" in last) == (metric not in ("cosine", "l2"))
    assert ("length" in last) == (metric == "l2")
    assert float(last[metric]) < float(first[metric]) / 10
    changed = [float(first[key]) != float(last[key]) for key in ("temperature", "norm_mean")]
    assert all(changed) and "recall@1" in capsys.readouterr().out


def test_a_device_without_float64_is_one_sentence():
    kappa = types.SimpleNamespace(device=types.SimpleNamespace(type="mps"))
    with pytest.raises(ValueError, match="needs float64, which an MPS device does not have: use the CPU"):
        prob_dml.vmf_normalizer(kappa, 8)


@pytest.mark.parametrize("metric, proxy", CELLS)
def test_a_run_starts_as_the_authors_did(metric, proxy):
    """The multiplier scales the embedding layer's weight alone; the proxies of ELK, B and KL start at the class means."""
    torch.manual_seed(0)
    network = common.Network("conv4", 8, 16)
    before = {name: value.detach().clone() for name, value in network.embedding.named_parameters()}
    images, labels = torch.randint(0, 255, (6, 16, 16), dtype=torch.uint8).numpy(), torch.tensor([0, 0, 1, 1, 2, 2])
    split = data.Split(list(images), labels, ["a", "b", "c"])
    args = type("Args", (), dict(image_size=16, augment="light", workers=0, norm_multiplier=12.0, weights="imagenet"))
    criterion = prob_dml.Criterion(ProbabilisticProxies(3, 8, metric, proxy, concentration_init=7.0))
    start = criterion.proxies.proxies.detach().clone()
    criterion.start_epoch(0, network, split, args, torch.device("cpu"))
    assert torch.equal(network.embedding.weight, 12 * before["weight"]) and torch.equal(network.embedding.bias, before["bias"])
    embeddings = common.embed(network, split, args, torch.device("cpu"))
    means = 7 * torch.nn.functional.normalize(embeddings.view(3, 2, 8).sum(1))
    warm = metric in ("elk", "bhattacharyya", "kl")
    criterion.start_epoch(1, network, split, args, torch.device("cpu"))                  # later epochs change nothing
    torch.testing.assert_close(criterion.proxies.proxies.data, means if warm else start)
    args.weights, args.norm_multiplier = "none", 1.0                                     # from scratch all start there
    criterion.start_epoch(0, network, split, args, torch.device("cpu"))
    torch.testing.assert_close(criterion.proxies.proxies.data, means)


def test_a_pair_without_a_sense_is_named_on_the_command_line(capsys):
    for argv, message in ((["--metric", "cosine", "--proxy", "nivmf"], "metric cosine knows no concentration"),
                          (["--proxy", "vmf", "--form", "official"], "vMF proxies have one form"),
                          (["--embed_dim", "1"], "error: --embed_dim must be at least 2, not 1"),
                          (["--temperature", "1e-9"], "error: --temperature must be at least 0.001, not 1e-09"),
                          (["--proxyanchor_weight", "-1"], "--proxyanchor_weight: -1 is not at least 0")):
        with pytest.raises(SystemExit) as caught:
            common.command(lambda: prob_dml.main(["--dataset", "toy", "--device", "cpu", *argv]))
        assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("script", [nir, prob_dml])
def test_what_has_no_row_of_its_own_takes_cubs_and_the_nearest_dimension(script):
    def preset(dataset, dim):
        return script.preset(argparse.Namespace(dataset=dataset, weights="imagenet", embed_dim=dim, metric="elk", proxy=None,
                                                form=None, nir_weight=None))
    unlisted = ["folder"] if script is nir else ["folder", "sop"]
    assert all(preset(dataset, dim) == preset("cub200", dim) for dataset in unlisted for dim in (128, 512))
    assert preset("cub200", 64) == preset("cub200", 128) and preset("cub200", 400) == preset("cub200", 512) == preset("cub200", 1024)


def test_prob_dmls_options_reach_the_criterion(monkeypatch):
    _, criterion, name = started(monkeypatch, prob_dml, *(
        "--dataset toy --metric kl --form official --samples 3 --temperature 0.7 --concentration_init 4 --proxy_lr 2 "
        "--concentration_lr 3 --temperature_lr 5 --proxyanchor_weight 0.5").split())
    made = criterion(7)
    inner = made.proxies
    assert (inner.metric, inner.form, inner.samples, inner.stored_length, made.proxyanchor_weight) == ("kl", "official", 3, 4, 0.5)
    assert inner.temperature.item() == pytest.approx(0.7) and inner.concentrations.shape == (7, 64)
    rates = {id(group["params"][0]): group["lr"] for group in made.param_groups(0.1)}
    assert rates == pytest.approx({id(inner.proxies): 0.2, id(inner.concentrations): 0.3, id(inner.temperature): 0.5})
    assert name == "toy-kl-nivmf-official-g0.5-seed0"


def test_the_density_is_the_default_form(monkeypatch):
    assert prob_dml.ProbabilisticProxies(3, 4).form == "exact"
    _, criterion, name = started(monkeypatch, prob_dml, "--dataset", "toy")
    assert criterion(2).proxies.form == "exact" and name == "toy-elk-nivmf-exact-seed0"


@pytest.mark.parametrize("metric, proxy, T, length, norm", [
    ("elk", "nivmf", 0.1, 10, 40), ("elk", "vmf", 0.1, 10, 40), ("bhattacharyya", "nivmf", 0.1, 10, 40), ("kl", "vmf", 0.1, 10, 40),
    ("kl", "nivmf", 0.1, 10, 10), ("loglik", "nivmf", 0.3, 30, 10), ("loglik", "vmf", 1.0, 10, 10), ("cosine", "vmf", 1 / 8, 10, 10)])
def test_presets_from_scratch_are_those_of_the_results(metric, proxy, T, length, norm):
    """RESULTS.md: the rate of proxies is 10 x their length, T's 10 x its first value; nivMF's concentrations' 20 x theirs."""
    given = prob_dml.preset(argparse.Namespace(dataset="toy", weights="none", embed_dim=64, metric=metric, proxy=proxy, form=None))
    assert (given.pop("lr_steps"), given.pop("proxy"), given.pop("form")) == ([10, 13], proxy, "exact")
    assert given == pytest.approx(dict(
        batch_size=90, lr=1e-3, epochs=15, lr_gamma=0.3, warmup=0, samples=200, temperature=T, temperature_lr=10 * T,
        concentration_init=length, proxy_lr=10 * length, concentration_lr=20 * length, norm_multiplier=norm))


def test_preset_of_l2_from_scratch_is_that_of_the_results():
    given = prob_dml.preset(argparse.Namespace(dataset="toy", weights="none", embed_dim=64, metric="l2", proxy=None, form=None))
    wanted = dict(temperature=5, temperature_lr=20, concentration_lr=10, concentration_init=15, proxy_lr=10, norm_multiplier=3)
    assert {key: given[key] for key in wanted} == wanted                # "T's rate, length's rate, gain: 20, 10, 15"


def test_el_nivmfs_own_row_of_the_ablation_is_the_published_one():
    row = dict(zip(prob_dml.COLUMNS, prob_dml.ABLATION["elk/nivmf"]))
    assert (row["concentration_init"], row["norm_multiplier"], row["temperature"], row["samples"]) == (50, 150, 1, 10)


def test_options_without_a_sense_together_are_named_before_the_training(monkeypatch):
    with pytest.raises(UserError, match="knows no concentration"):
        started(monkeypatch, prob_dml, "--dataset", "cub200", "--metric", "cosine", "--proxy", "nivmf")
