"""The densities against quadrature, scipy and series; the sampler against its exact distribution;
the similarities and the loss against slow references and what the paper says of them; the runs.
"""
import argparse
import csv
import decimal
import math
import types
from decimal import Decimal
from functools import cache, partial

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import (
    error_of,
    not_finite,
    parametrize,
    refused,
    seeded,
    started,
    train,
    wrong_for_proxies,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import nir
import prob_dml
from prob_dml import (
    MIN_CONCENTRATION,
    MIN_TEMPERATURE,
    SIMILARITIES,
    Criterion,
    ProbabilisticProxies,
    log_vmf_normalizer,
    mean_resultant_length,
    nivmf_log_prob,
    official_log_likelihood,
    sample_vmf,
    unit_vectors,
    vmf_log_prob,
)

CELLS = [(metric, proxy) for metric in SIMILARITIES for proxy in SIMILARITIES[metric]]
KERNELS = ("elk", "bhattacharyya", "kl")        # integrals, sampled where a proxy is a nivMF
every_cell = parametrize("metric, proxy", CELLS)
every_kernel = parametrize("metric", KERNELS)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def directions(*shape, seed=0):
    return unit_vectors(torch.randn(shape, dtype=torch.float64, generator=seeded(seed)))


def orthogonal(axis, mu):
    """The direction of `axis` on the tangent plane at mu."""
    return unit_vectors(axis - (axis * mu).sum(-1, keepdim=True) * mu)


def gradients(scalar, *inputs):
    return torch.autograd.grad(scalar, inputs, retain_graph=True)


def with_derivatives(function, kappa, dim, order):
    values = [function(kappa, dim)]
    for _ in range(order):
        derivative, = torch.autograd.grad(values[-1].sum(), kappa, create_graph=True)
        values.append(derivative)
    return values


def assert_mean(samples, expected):
    """The mean over the first axis lies within four standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() < 4 * error + 1e-12).all()


def assert_finite(*tensors):
    assert all(tensor.isfinite().all() for tensor in tensors)


def quadrature(dim, n=400):
    """Points (N, dim) and weights (N,) for integrals over the circle or the sphere."""
    phi = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    circle = torch.stack([phi.cos(), phi.sin()], 1)
    weights = torch.full((n,), 2 * math.pi / n, dtype=torch.float64)
    if dim == 2:
        return circle, weights
    nodes = np.polynomial.legendre.leggauss(n)
    height, height_weights = (torch.from_numpy(array).view(n, 1, 1) for array in nodes)
    xy = (1 - height.square()).sqrt() * circle
    points = torch.cat([xy, height.expand(n, n, 1)], 2)
    return points.view(-1, 3), (height_weights.view(n, 1) * weights).view(-1)


# ------------------------------------------------------------------------------- the normaliser


def bessel_series(kappa, D):
    """sum_m (kappa/2)^(2m) Gamma(D/2) / (m! Gamma(m + D/2)), all terms of which are positive.

    I_v(kappa) is this sum times (kappa/2)^v / Gamma(v + 1), where v = D/2 - 1.
    """
    quarter_square = kappa * kappa / 4
    half = Decimal(D) / 2
    term = total = Decimal(1)
    m = 0
    while term > total * Decimal("1e-60"):
        m += 1
        term *= quarter_square / (m * (m + half - 1))
        total += term
    return total


@cache
def exact_normalizer(kappa, D):
    """log C_D, A_D, A_D' and A_D'' of a float kappa, computed with 60 digits."""
    with decimal.localcontext() as context:
        context.prec = 60
        k = Decimal(kappa)
        series = bessel_series(k, D)
        A_by_k = bessel_series(k, D + 2) / (D * series)
        A = k * A_by_k
        dA = 1 - A ** 2 - (D - 1) * A_by_k
        ddA = -2 * A * dA - (D - 1) * (dA - A_by_k) / k if kappa else 0
        log_C_D = math.lgamma(D / 2) - math.log(2) - D / 2 * math.log(math.pi) - float(series.ln())
        return log_C_D, float(A), float(dA), float(ddA)


# Numbers that float32 holds exactly, too.
CONCENTRATIONS = [0, 2 ** -20, 2 ** -10, 0.25, 10, 200, 3000, 20000]


@parametrize("dim", [2, 3, 5, 64, 81, 82, 512, 2048])
@parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 2e-7)])
def test_normalizer_mean_resultant_length_and_their_derivatives_are_exact(dim, dtype, rtol):
    kappa = torch.tensor(CONCENTRATIONS, dtype=dtype, requires_grad=True)
    log_C_D, A, dA, ddA = double(*(exact_normalizer(k, dim) for k in kappa.tolist())).T
    value, slope, *curvature = with_derivatives(log_vmf_normalizer, kappa, dim, 3)
    length, *d_length = with_derivatives(mean_resultant_length, kappa, dim, 2)
    for actual, expected in ((value, log_C_D), (slope, -A), (length, A)):
        assert actual.dtype == dtype
        assert_close(actual.double(), expected, rtol=rtol, atol=0)
    # Where kappa is large these are small differences of numbers near 1.
    for actual, expected in zip([*curvature, *d_length], (-dA, -ddA, dA, ddA)):
        assert_close(actual.double(), expected, rtol=1e-6, atol=1e-11)


@parametrize("dim", [2, 3, 64, 512])
def test_normalizer_of_huge_concentrations_follows_hankels_expansion(dim):
    kappa = torch.tensor([1e7, 1e8], dtype=torch.float64, requires_grad=True)
    v = dim / 2 - 1
    correction = (4 * v ** 2 - 1) / (8 * kappa)         # I_v is 1 - this, but for its square
    log_I_v = kappa - 0.5 * (2 * math.pi * kappa).log() - correction
    expected = v * kappa.log() - dim / 2 * math.log(2 * math.pi) - log_I_v
    assert_close(log_vmf_normalizer(kappa, dim), expected, rtol=1e-9, atol=0)
    expected = 1 - (dim - 1) / (2 * kappa)
    assert_close(mean_resultant_length(kappa, dim), expected, rtol=1e-9, atol=0)


@parametrize("dtype", [torch.int64, torch.uint8, torch.int16])
def test_integer_concentrations_mean_the_same_as_floats(dtype):
    kappa, mu = torch.arange(1, 6), directions(5, 3)
    for function in (
        lambda kappa: mean_resultant_length(kappa, 3),
        lambda kappa: log_vmf_normalizer(kappa, 3),
        lambda kappa: vmf_log_prob(mu.float(), mu.float(), kappa),
        lambda kappa: sample_vmf(mu, kappa, 4, seeded()),
    ):
        assert_close(function(kappa.to(dtype)), function(kappa.float()), rtol=0, atol=0)


# -------------------------------------------------------------------------------- the densities


@parametrize("dim", [2, 3, 10, 128])
def test_vmf_density_is_scipys(dim):
    z = directions(50, dim)
    mu = directions(dim, seed=1)
    for kappa in (0.1, 5.0, 80.0):
        log_p = vmf_log_prob(z, mu, double(kappa))
        expected = scipy.stats.vonmises_fisher(mu.numpy(), kappa).logpdf(z.numpy())
        np.testing.assert_allclose(log_p, expected, rtol=1e-8, atol=1e-8)


@parametrize("dim", [2, 3])
def test_vmf_integrates_to_one(dim):
    z, weights = quadrature(dim)
    log_p = vmf_log_prob(z.unsqueeze(1), directions(dim), double(1e-3, 1, 30, 300))
    assert_close(weights @ log_p.exp(), torch.ones_like(log_p[0]), rtol=0, atol=1e-9)


@parametrize("K", [(2, 10), (0.1, 30), (2, 5, 10), (1, 1, 20), (0.5, 12, 4)])
def test_nivmf_integrates_to_one(K):
    D = len(K)
    z, weights = quadrature(D, n=20000 if D == 2 else 600)
    mu = torch.cat([directions(4, D), torch.eye(D)])
    density = nivmf_log_prob(z, mu, double(*K).expand(len(mu), D)).exp()
    np.testing.assert_allclose(weights @ density, 1, rtol=0, atol=1e-6)


@parametrize("dim", [2, 3, 64, 512])
def test_nivmf_is_the_vmf_where_all_concentrations_are_equal(dim):
    z = directions(20, dim)
    mu = directions(6, dim, seed=1)
    k = double(0.1, 1, 7, 50, 300, 1e4)
    log_p = nivmf_log_prob(z, mu, k.unsqueeze(1).expand(6, dim))
    expected = vmf_log_prob(z.unsqueeze(1), mu, k)
    assert_close(log_p, expected, rtol=1e-9, atol=1e-9)


DENSITIES = {
    "exact": nivmf_log_prob,
    "official": partial(nivmf_log_prob, form="official"),
    "official log-likelihood": official_log_likelihood,
}


def slow_nivmf_log_prob(form, z, mu, K):
    """The formulas of DENSITIES, dimension by dimension."""
    D = K.shape[1]
    Kz = K * z.unsqueeze(-2)                            # (..., C, D)
    Kmu = K * mu                                        # (C, D)
    norm_Kz = Kz.norm(dim=-1)
    norm_Kmu = Kmu.norm(dim=1)
    log_p = log_vmf_normalizer(norm_Kmu, D) + K.log().sum(1)
    if form == "exact":
        return log_p + (Kz * Kmu).sum(-1) / norm_Kz - D * norm_Kz.log()
    if form == "official":
        return log_p + (z.unsqueeze(-2) * Kmu).sum(-1) - norm_Kmu.log()
    return log_p + (Kz * Kmu).sum(-1) / norm_Kz - norm_Kmu.log()


@parametrize("form", DENSITIES)
@parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 3e-4)])
def test_nivmf_is_its_formula(form, dtype, atol):
    z = directions(2, 3, 512)
    mu = directions(4, 512, seed=1)
    K = 0.1 + 50 * directions(4, 512, seed=2).abs() * math.sqrt(512)
    log_p = DENSITIES[form](z.to(dtype), mu.to(dtype), K.to(dtype))
    expected = slow_nivmf_log_prob(form, z, mu, K)
    assert log_p.dtype == dtype
    assert_close(log_p.double(), expected, rtol=1e-7, atol=atol)


def test_official_forms_do_not_integrate_to_one():
    z, weights = quadrature(3, n=600)
    mu = torch.cat([torch.eye(3), directions(1, 3)])
    K = double([2, 5, 10], [2, 5, 10], [2, 5, 10], [5, 5, 5])
    # EL-nivMF's is a vMF with natural parameter K mu, times det K / ||K mu||.
    elk = weights @ nivmf_log_prob(z, mu, K, "official").exp()
    assert_close(elk, K.prod(1) / (K * mu).norm(dim=1), rtol=1e-8, atol=0)
    # The log-likelihood's factor depends on where a proxy points, too. For K = k I it is k^2.
    loglik = weights @ official_log_likelihood(z, mu, K).exp()
    assert_close(loglik, double(32.896, 18.208, 34.466, 25), rtol=0, atol=1e-3)


def test_a_zero_vector_gets_the_first_axis_and_a_short_one_its_own_direction():
    x = torch.tensor([[0.0, 0, 0], [0, 3e-6, 4e-6]], requires_grad=True)
    units = unit_vectors(x)
    assert_close(units, torch.tensor([[1, 0, 0], [0, 0.6, 0.8]]))
    gradient, = gradients(units.sum(), x)
    assert (gradient[0] == 0).all()


# ---------------------------------------------------------------------------------- the sampler


def angle_cdf(kappa, dim):
    """The distribution function of a sample's angle to mu: its density, summed on a grid."""
    grid = np.linspace(0, math.pi, 200_002)[1:-1]
    log_p = kappa * np.cos(grid) + (dim - 2) * np.log(np.sin(grid))
    cdf = np.exp(log_p - log_p.max()).cumsum()
    return lambda theta: np.interp(theta, grid, cdf / cdf[-1])


@parametrize("dim", [2, 3, 128, 512])
@parametrize("kappa", [1e-3, 1.0, 30.0, 1e4])
def test_samples_follow_the_vmf(dim, kappa):
    n = 2000
    first_axis = torch.eye(1, dim)
    mu = torch.cat([directions(3, dim), first_axis, -first_axis])
    z = sample_vmf(mu, double(kappa).expand(5), n, seeded(dim))             # (n, 5, D)
    assert_close(z.norm(dim=-1), torch.ones_like(z[..., 0]), rtol=0, atol=1e-13)

    cos = (z * mu).sum(-1)
    tangent = z - cos.unsqueeze(-1) * mu
    theta = torch.atan2(tangent.norm(dim=-1), cos).flatten().numpy()
    assert scipy.stats.kstest(theta, angle_cdf(kappa, dim)).pvalue > 1e-3

    # The tangents are uniform: they have no mean direction (Rayleigh's test), and a coordinate x
    # has (1 + x) / 2 ~ Beta((D-2)/2, (D-2)/2), whatever the angle is.
    tangent = unit_vectors(tangent)
    resultant = n * (dim - 1) * tangent.mean(0).square().sum()
    assert 1e-3 < scipy.stats.chi2.cdf(resultant, 5 * (dim - 1)) < 1 - 1e-3
    axis = orthogonal(torch.eye(dim)[-1], mu)
    x = (tangent * axis).sum(-1).flatten().numpy()
    assert abs(scipy.stats.spearmanr(x, theta).statistic) < 4 / math.sqrt(5 * n)
    if dim > 2:
        beta = scipy.stats.beta(dim / 2 - 1, dim / 2 - 1)
        assert scipy.stats.kstest((1 + x) / 2, beta.cdf).pvalue > 1e-3


@parametrize("dim", [2, 128, 2048])
def test_float32_samples_keep_their_distance_from_mu_where_kappa_is_large(dim):
    mu = directions(400, dim).float()
    z = sample_vmf(mu, torch.full((400,), 1e4), 5, seeded())
    assert z.dtype == torch.float32
    assert_close(z.norm(dim=-1), torch.ones(5, 400), rtol=0, atol=3e-6)
    one_minus_cos = 0.5 * (z.double() - mu.double()).square().sum(-1)
    assert_mean(one_minus_cos.flatten(), 1 - mean_resultant_length(double(1e4), dim))


def test_samples_are_reproducible_and_differ_between_draws():
    mu = directions(4, 8)
    kappa = double(0, 1, 10, 1e5)
    first, again = (sample_vmf(mu, kappa, 3, seeded()) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.isclose(first[0], first[1]).any()


def test_derivative_of_a_sample_by_kappa_is_that_of_its_quantile_function():
    """On the sphere mu . z has the quantiles w(u) = 1 + log(u + (1 - u) exp(-2 kappa)) / kappa."""
    mu = double(1, 0, 0).expand(200, 3)
    kappa = double(0.05, 1, 8, 40).repeat(50).requires_grad_()
    w = sample_vmf(mu, kappa, 1, seeded())[0, :, 0]
    tail = (-2 * kappa).exp()
    u = ((((w - 1) * kappa).exp() - tail) / (1 - tail)).detach()
    quantile = 1 + (u + (1 - u) * tail).log() / kappa
    assert_close(w, quantile)
    actual, expected = (gradients(values.sum(), kappa)[0] for values in (w, quantile))
    assert_close(actual, expected, rtol=1e-6, atol=1e-10)


@parametrize("dim", [2, 3, 128, 512])
@parametrize("kappa", [1e-3, 2.0, 50.0, 1e4])
def test_gradient_of_the_sample_mean_is_that_of_the_exact_mean(dim, kappa):
    mu = directions(dim)
    mus = mu.repeat(4000, 1).requires_grad_()
    kappas = double(kappa).repeat(4000).requires_grad_()
    z = sample_vmf(mus, kappas, 1, seeded(1))[0]
    A, dA = with_derivatives(mean_resultant_length, kappas[:1], dim, 1)
    by_kappa, = gradients((z @ mu).sum(), kappas)
    assert_mean(by_kappa, dA)
    # The mean is A mu: turning mu towards a tangent moves it by A there, and not along mu.
    axis = orthogonal(directions(dim, seed=5), mu)
    by_mu, = gradients((z @ axis).sum(), mus)
    assert_mean(by_mu @ axis, A)
    assert_close(by_mu @ mu, torch.zeros_like(kappas), rtol=0, atol=1e-12)


@parametrize("kappa", [math.nan, math.inf])
def test_sampling_a_concentration_that_is_not_finite_ends_with_an_error(kappa):
    with refused("not a finite number", ValueError):
        sample_vmf(directions(2, 4), double(1, kappa), 3)


def test_a_second_derivative_of_samples_is_refused_rather_than_wrong():
    mu = directions(1, 3).requires_grad_()
    z = sample_vmf(mu, double(1), 1, seeded())
    gradient, = torch.autograd.grad(z.square().sum(), mu, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ----------------------------------------------------------------------------- the similarities


def similarity(metric, proxy, e, mu, concentration, samples=1):
    """Of embeddings e and classes, by the function of a cell."""
    function = SIMILARITIES[metric][proxy]
    if proxy == "vmf" or metric == "loglik":
        return function(e, mu, concentration)
    return function(e, mu, concentration, samples, generator=seeded())


def integral(metric, e, log_q):
    """The kernel of e (B, D) and the classes' log densities z -> (N, C), by quadrature: (B, C)."""
    dim = e.shape[1]
    z, weights = quadrature(dim, n=2000 if dim == 2 else 250)
    log_p = vmf_log_prob(z.unsqueeze(1), unit_vectors(e), e.norm(dim=1)).unsqueeze(2)   # (N, B, 1)
    log_q = log_q(z).unsqueeze(1)                                                       # (N, 1, C)
    integrand = {
        "elk": (log_p + log_q).exp(),
        "bhattacharyya": (0.5 * (log_p + log_q)).exp(),
        "kl": log_p.exp() * (log_q - log_p),
    }
    return torch.einsum("n, nbc -> bc", weights, integrand[metric])


@every_kernel
@parametrize("dim", [2, 3])
def test_similarity_of_two_vmfs_is_its_integral(metric, dim):
    e = double(0.01, 2, 20).unsqueeze(1) * directions(3, dim)
    mu = directions(4, dim, seed=1)
    kappa = double(0.1, 1, 8, 60)
    exact = integral(metric, e, lambda z: vmf_log_prob(z.unsqueeze(1), mu, kappa))
    expected = exact if metric == "kl" else exact.log()
    assert_close(similarity(metric, "vmf", e, mu, kappa), expected, rtol=1e-8, atol=1e-8)


@every_kernel
@parametrize("dim", [2, 3])
def test_similarity_to_nivmfs_and_its_gradient_by_the_image_are_those_of_the_integral(metric, dim):
    """Forty estimates of a thousand samples each, against quadrature."""
    e = (double(0.5, 4, 10).unsqueeze(1) * directions(3, dim)).requires_grad_()
    mu = directions(4, dim, seed=1)
    K = double(0.5, 2, 5, 9).unsqueeze(1) * double(1, 4, 2)[:dim]
    contrast = double(1, -2, 3, -1)
    exact = integral(metric, e, lambda z: nivmf_log_prob(z, mu, K))                     # (3, C)
    exact_gradient, = gradients((exact @ contrast).sum(), e)

    copies = e.detach().repeat(40, 1).requires_grad_()
    estimate = similarity(metric, "nivmf", copies, mu, K, samples=1000)
    if metric != "kl":
        estimate = estimate.exp()                       # the mean itself, which has no bias
    gradient, = gradients((estimate @ contrast).sum(), copies)
    assert_mean(estimate.view(40, 3, 4), exact)
    assert_mean(gradient.view(40, 3, dim), exact_gradient)


@parametrize("metric", [*KERNELS, "loglik"])
def test_similarity_to_an_isotropic_nivmf_approaches_the_closed_form_of_the_vmf(metric):
    e = double(1, 5, 12).unsqueeze(1) * directions(3, 16)
    mu = directions(5, 16, seed=1)
    kappa = double(1, 3, 6, 9, 12)
    closed = similarity(metric, "vmf", e, mu, kappa)
    K = kappa.unsqueeze(1).expand(5, 16)
    sampled = similarity(metric, "nivmf", e, mu, K, samples=20000)
    assert_close(sampled, closed, rtol=0, atol=1e-10 if metric == "loglik" else 0.1)


@parametrize("T", [0.25, 1.0, 3.0])
def test_power_mean_is_the_mean_of_powers(T):
    x = torch.rand(5, 2, 3, generator=seeded()).double()
    expected = (x ** (1 / T)).mean(0) ** T
    assert_close(prob_dml.power_mean(x.log(), T), expected.log())


def test_cosine_l2_and_loglik_are_their_formulas():
    e = 3 * directions(4, 6)
    mu = directions(5, 6, seed=1)
    length = double(1, 2, 3, 4, 5)
    K = 1 + 5 * directions(5, 6, seed=2).abs()
    cosine = F.cosine_similarity(e.unsqueeze(1), mu, dim=-1)
    assert_close(similarity("cosine", "vmf", e, mu, None), cosine)
    squared_distance = torch.cdist(e, length.unsqueeze(1) * mu).square()
    assert_close(similarity("l2", "vmf", e, mu, length), -squared_distance)
    loglik = slow_nivmf_log_prob("exact", F.normalize(e), mu, K)
    assert_close(similarity("loglik", "nivmf", e, mu, K), loglik)


# ------------------------------------------------------------------------------------- the loss


def proxies(metric="elk", proxy="nivmf", C=7, D=16, temperature=1.0, **options):
    """ProbabilisticProxies with concentrations, or lengths, that differ."""
    torch.manual_seed(0)
    module = ProbabilisticProxies(C, D, metric, proxy, temperature=temperature, **options)
    for parameter in (module.concentrations, module.lengths):
        if parameter is not None:
            parameter.data.mul_(0.5 + torch.rand_like(parameter))
    return module


def loss_and_gradients(module, e, labels):
    """The loss, and its gradients {name: tensor} by the embeddings, "e", and the parameters."""
    parameters = dict(module.named_parameters(), e=e.clone().requires_grad_())
    loss = module(parameters["e"], labels, seeded())
    return loss, dict(zip(parameters, gradients(loss, *parameters.values())))


@every_cell
def test_loss_is_the_cross_entropy_of_similarity_over_temperature(metric, proxy):
    module = proxies(metric, proxy, temperature=0.5)
    e = 5 * torch.randn(6, 16)
    labels = torch.arange(6)
    s = module.similarity(e, seeded()) / 0.5
    assert s.shape == (6, 7)
    expected = -s.log_softmax(1).diagonal().mean()
    loss, gradient = loss_and_gradients(module, e, labels)
    assert_close(loss, expected)
    del gradient["e"]
    assert all(values.any() for values in gradient.values()), "every parameter learns"


@every_cell
def test_gradients_match_finite_differences(metric, proxy):
    """For sampled similarities by the parameters alone: by them the samples do not move."""
    module = proxies(metric, proxy, C=4, D=5, samples=3).double()
    e = 3 * torch.randn(3, 5, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1])
    is_sampled = proxy == "nivmf" and metric in KERNELS
    names = list(dict(module.named_parameters()))

    def loss(e, *values):
        given = dict(zip(names, values))
        return torch.func.functional_call(module, given, (e, labels, seeded()))

    values = [value.detach().clone().requires_grad_() for value in module.parameters()]
    assert torch.autograd.gradcheck(loss, [e.requires_grad_(not is_sampled), *values])


@every_cell
def test_an_image_is_most_similar_to_the_class_it_points_at(metric, proxy):
    module = proxies(metric, proxy, samples=50)
    nearest = module.similarity(module.proxies.detach(), seeded()).argmax(1)
    assert torch.equal(nearest, torch.arange(7))


def slow_loss(metric, form, e, labels, module, z):
    """The loss as our formulas, or the official code's, have it, of the samples z (S, B, D)."""
    mu = F.normalize(module.proxies)
    K = module.concentrations
    T = module.temperature
    inside = T if form == "official" else 1
    D = e.shape[1]
    k1 = e.norm(dim=1)
    mu1 = F.normalize(e)
    log_C_D = log_vmf_normalizer(k1, D)
    log_p = log_C_D + k1 * (z * mu1).sum(-1)                                # (S, B)
    log_q = slow_nivmf_log_prob(form, z, mu, K)                             # (S, B, C)
    if metric == "loglik":
        at_mean = "official log-likelihood" if form == "official" else "exact"
        s = slow_nivmf_log_prob(at_mean, mu1, mu, K)
    elif metric == "kl":
        entropy = -log_C_D - k1 * mean_resultant_length(k1, D)
        s = log_q.mean(0) + entropy.unsqueeze(1)
    else:
        log_x = log_q if metric == "elk" else 0.5 * (log_q - log_p.unsqueeze(2))
        s = inside * (log_x / inside).exp().mean(0).log()
    return F.cross_entropy(s / T, labels)


@parametrize("metric", [*KERNELS, "loglik"])
@parametrize("form", ["exact", "official"])
@parametrize("temperature", [0.2, 3.0])
def test_loss_and_its_gradients_are_those_of_the_slow_reference(metric, form, temperature):
    module = proxies(metric, C=4, D=6, temperature=temperature, form=form, samples=3).double()
    e = 3 * torch.randn(5, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0])
    loss, gradient = loss_and_gradients(module, e, labels)

    e.requires_grad_()
    z = sample_vmf(unit_vectors(e), e.norm(dim=1), 3, seeded())     # for all classes the same
    expected = slow_loss(metric, form, e, labels, module, z)
    assert_close(loss, expected, rtol=1e-10, atol=0)
    by_name = dict(module.named_parameters(), e=e)
    for name, values in zip(by_name, gradients(expected, *by_name.values())):
        assert_close(gradient[name], values, rtol=1e-8, atol=1e-10)


@parametrize("proxy", ["vmf", "nivmf"])
def test_norm_is_a_temperature_the_class_posterior_sharpens_as_it_grows(proxy):
    module = proxies("elk", proxy, concentration_init=20.0, samples=20000)
    direction = unit_vectors(module.proxies[:1] + 0.5 * module.proxies[1:2]).detach()
    e = torch.tensor([0.0, 1, 3, 10, 30, 100]).unsqueeze(1) * direction
    log_posterior = module.similarity(e, seeded()).log_softmax(1)
    entropy = -(log_posterior.exp() * log_posterior).sum(1)
    assert (entropy.diff() < 0).all()


@parametrize("proxy", ["vmf", "nivmf"])
def test_norm_scales_the_gradient_clear_images_turn_the_network_more(proxy):
    """Halfway between two classes the posterior is 1/2 for any norm: its own factor is left."""
    module = ProbabilisticProxies(
        2, 16, "elk", proxy, temperature=1.0, samples=2000, concentration_init=20.0)
    module.proxies.data = torch.eye(2, 16)
    mu = F.normalize(torch.eye(2, 16).sum(0), dim=0).repeat(5, 1).requires_grad_()
    norms = torch.tensor([0.1, 1, 5, 20, 80]).unsqueeze(1)
    gradient, = gradients(module(norms * mu, torch.zeros(5).long(), seeded()), mu)
    turn = gradient[:, 0] - gradient[:, 1]              # in the plane of the two proxies
    assert (turn.abs().diff() > 0).all()


@every_cell
def test_order_of_the_classes_does_not_matter(metric, proxy):
    module = proxies(metric, proxy)
    e = 5 * torch.randn(6, 16)
    labels = torch.arange(6)
    before, _ = loss_and_gradients(module, e, labels)
    order = torch.randperm(7)
    for parameter in module.parameters():
        if parameter.dim():                             # all but T
            parameter.data = parameter.data[order]
    after, _ = loss_and_gradients(module, e, order.argsort()[labels])
    assert_close(after, before, rtol=1e-5, atol=1e-5)


@every_cell
def test_a_class_far_away_gets_no_weight_and_is_no_danger(metric, proxy):
    temperature = 1e-3 if metric == "cosine" else 1.0
    scale = 100.0 if metric == "l2" else 1e4
    module = ProbabilisticProxies(
        3, 64, metric, proxy, temperature=temperature, concentration_init=scale)
    axis = torch.eye(1, 64)
    module.proxies.data = torch.cat([axis, -axis, axis])
    loss, gradient = loss_and_gradients(module, 100 * axis, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-3)
    assert gradient["proxies"][1].abs().max() < 1e-6
    loss, gradient = loss_and_gradients(module, 100 * axis, torch.tensor([1]))  # it is the label
    assert 100 < loss < 1e6
    assert_finite(*gradient.values())


@every_cell
@parametrize("temperature", [1.0, 0.003])
def test_loss_and_gradients_are_finite_for_embeddings_of_any_norm(metric, proxy, temperature):
    module = proxies(metric, proxy, C=10, D=512, temperature=temperature, samples=1)
    norms = torch.tensor([0, 1e-30, 1e-6, 1e-3, 1, 1e3, 1e5])
    e = norms.unsqueeze(1) * directions(7, 512).float()
    labels = torch.arange(7)
    for chosen in (slice(7), *(slice(i, i + 1) for i in range(7))):
        loss, gradient = loss_and_gradients(module, e[chosen], labels[chosen])
        assert_finite(loss, *gradient.values())


@every_kernel
def test_an_image_exactly_opposite_to_a_proxy_has_a_finite_gradient(metric):
    e = -8 * torch.eye(1, 4)
    mu = torch.eye(2, 4)
    kappa = torch.full((2,), 8.0)
    inputs = [tensor.requires_grad_() for tensor in (e, mu, kappa)]
    s = similarity(metric, "vmf", *inputs)              # k1 mu1 + k2 mu2 = 0
    assert_finite(s, *gradients(s.sum(), *inputs))


@every_kernel
def test_float32_loss_is_the_float64_loss(metric):
    module = proxies(metric, "vmf", C=10, D=512)
    labels = torch.arange(6)
    e = 2 * torch.randn(6, 512)
    single = module(e, labels).double()
    assert_close(single, module.double()(e.double(), labels), rtol=1e-4, atol=1e-4)


@every_cell
def test_no_tensor_grows_with_batch_times_classes_times_dimension(metric, proxy):
    S, B, C, D = 3, 10, 40, 30
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(result) if torch.is_tensor(x))
            return result

    module = proxies(metric, proxy, C, D, samples=S)
    e = torch.randn(B, D, requires_grad=True)
    with Sizes():
        module(e, torch.arange(B)).backward()
    assert max(sizes) <= max(S * B * C, S * B * D, C * D, S * B * 24)


def test_warm_start_turns_proxies_to_the_mean_of_their_classes_and_keeps_their_length():
    module = proxies("elk", "vmf", C=3, D=3, concentration_init=50.0)
    before = module.proxies.detach().clone()
    e = torch.tensor([[3.0, 0, 0], [0, 4, 0], [0, 0, 2]])       # raw: the longer one weighs more
    module.warm_start(e, torch.tensor([0, 0, 2]))
    expected = torch.tensor([[30, 40, 0], before[1].tolist(), [0, 0, 50]])
    assert_close(module.proxies.detach(), expected)


@every_cell
def test_proxies_are_stored_with_the_length_of_the_first_concentration(metric, proxy):
    module = ProbabilisticProxies(7, 16, metric, proxy, concentration_init=200.0)
    assert_close(module.proxies.norm(dim=1), torch.full((7,), 200.0))


@every_cell
def test_the_direction_of_a_proxy_alone_counts(metric, proxy):
    module = proxies(metric, proxy)
    e = torch.randn(6, 16)
    before, _ = loss_and_gradients(module, e, torch.arange(6))
    module.proxies.data.mul_(0.1)
    after, _ = loss_and_gradients(module, e, torch.arange(6))
    assert_close(after, before)


def test_lengths_of_l2_start_as_those_of_a_xavier_normal():
    module = ProbabilisticProxies(100, 512, "l2", "vmf", concentration_init=200.0)
    xavier = torch.nn.init.xavier_normal_(torch.empty(100, 512), gain=200.0, generator=seeded())
    expected = xavier.norm(dim=1).mean().expand(100, 1)
    assert_close(module.lengths.detach(), expected, rtol=0.01, atol=0)


@parametrize("name, floor, metric, proxy", [
    ("concentrations", MIN_CONCENTRATION, "elk", "nivmf"),
    ("lengths", MIN_CONCENTRATION, "l2", "vmf"),
    ("temperature", MIN_TEMPERATURE, "elk", "nivmf"),
])
def test_a_parameter_below_its_floor_is_lifted_to_it_and_can_leave_it(name, floor, metric, proxy):
    module = proxies(metric, proxy)
    parameter = getattr(module, name)
    parameter.data.fill_(-3)
    loss, gradient = loss_and_gradients(module, torch.randn(6, 16), torch.arange(6))
    assert_finite(loss)
    assert_close(parameter.detach(), torch.full_like(parameter, floor))
    assert (gradient[name][:6] if parameter.dim() else gradient[name]).all()


def test_temperature_itself_is_learned():
    module = proxies(temperature=0.003)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.002)
    module(20 * torch.randn(6, 16), torch.arange(6)).backward()
    optimizer.step()
    moved = abs(module.temperature.item() - 0.003)
    assert moved == pytest.approx(0.002, rel=1e-3)      # Adam's first step is its rate


def test_statistics_of_norms_concentrations_and_temperature():
    module = ProbabilisticProxies(2, 4)
    module.temperature.data.fill_(-1)                   # below its floor
    module.concentrations.data = torch.tensor([[1.0, 1, 3, 3], [5, 5, 5, 5]])
    values = module.statistics(torch.tensor([[3.0, 4, 0, 0], [0, 0, 0, 1]]))
    norms = {"norm_mean": 3, "norm_std": 2, "temperature": MIN_TEMPERATURE}
    assert values == pytest.approx({**norms, "concentration": 3.5, "anisotropy": 0.25})
    assert set(proxies("cosine", "vmf").statistics(torch.ones(1, 16))) == set(norms)


@parametrize("option, value, message", [
    ("metric", "mahalanobis", "metric must be one of elk"),
    ("metric", "cosine", "use proxy vmf"),
    ("metric", "l2", "use proxy vmf"),
    ("proxy", "gauss", "proxy must be one of nivmf"),
    ("form", "none", "form must be one of exact"),
    ("num_classes", 0, "num_classes must be at least 1"),
    ("dim", 1, "dim must be at least 2"),
    ("samples", 0, "samples must be at least 1"),
    ("temperature", 0.0, "temperature must be at least 0.001"),
    ("temperature", math.nan, "temperature must be"),
    ("concentration_init", -1.0, "concentration_init must be at least 0.1"),
    ("concentration_init", math.inf, "concentration_init must be"),
])
def test_bad_options_are_named(option, value, message):
    with refused(message, ValueError):
        ProbabilisticProxies(**{"num_classes": 3, "dim": 4, option: value})


def test_a_vmf_has_no_official_form():
    with refused("vMF proxies have one form", ValueError):
        ProbabilisticProxies(3, 4, proxy="vmf", form="official")


def test_a_negative_weight_of_proxyanchor_is_named():
    with refused("proxyanchor_weight must be at least 0", ValueError):
        Criterion(ProbabilisticProxies(3, 4), proxyanchor_weight=-1)


@wrong_for_proxies
def test_wrong_batches_are_one_sentence(x, y, error, message):
    module = ProbabilisticProxies(4, 5)
    functions = [module]
    if error is ValueError:
        functions.append(module.warm_start)
    for function in functions:
        with refused(message, error):
            function(x, y)


@parametrize("function, shapes, message", [
    (ProbabilisticProxies(3, 4).similarity, [(2, 5)], "embeddings must be"),
    (vmf_log_prob, [(2, 3), (2, 1), 2], "a vMF takes"),
    (vmf_log_prob, [(2, 3), 4, 2], "a vMF takes"),
    (nivmf_log_prob, [(2, 3), (4, 3), (4, 2)], "a nivMF takes"),
    (partial(sample_vmf, num_samples=5), [(2, 3), 3], "sample_vmf takes"),
    (partial(sample_vmf, num_samples=0), [(2, 3), 2], "sample_vmf takes"),
    (partial(sample_vmf, num_samples=5), [(2, 1), 2], "sample_vmf takes"),
    (partial(log_vmf_normalizer, dim=1), [2], "dim 1 is too small"),
    (partial(nivmf_log_prob, form="best"), [(2, 3), (4, 3), (4, 3)],
     "form must be one of exact, official, not 'best'"),
    (partial(prob_dml.loglik_nivmf, form="Official"), [(2, 3), (4, 3), (4, 3)],
     "form must be one of exact, official, not 'Official'"),
])
def test_bad_shapes_and_forms_are_named(function, shapes, message):
    with refused(message, ValueError):
        function(*map(torch.ones, shapes))


def test_a_device_without_float64_is_refused():
    mps = types.SimpleNamespace(device=types.SimpleNamespace(type="mps"))
    with refused("needs float64, .* use the CPU", ValueError):
        prob_dml.vmf_normalizer(mps, 8)


@parametrize("metric", ["elk", "bhattacharyya", "kl", "loglik", "l2"])
@parametrize("name, shape", [
    ("kappa", (4, 1)), ("kappa", (1,)), ("kappa", ()), ("mu", (4,)),
    ("e", (4,)), ("e", (3, 5)), ("e", (2, 3, 4)),
])
def test_similarities_to_vmfs_take_one_number_for_each_class(metric, name, shape):
    """As many classes as dimensions, where nearly all products would fit."""
    shapes = {"e": (3, 4), "mu": (4, 4), "kappa": (4,), name: shape}
    with refused("a similarity to vMFs takes", ValueError):
        similarity(metric, "vmf", *map(torch.ones, shapes.values()))


@every_cell
def test_borrowed_similarities_compute_in_float32_under_autocast(metric, proxy):
    e, mu, K = 5 * directions(6, 4), directions(3, 4, seed=1), torch.rand(3, 4) + 1
    spread = K if proxy == "nivmf" else K[:, 0]
    expected = similarity(metric, proxy, e, mu, spread)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity(metric, proxy, e, mu, spread), expected)


def test_the_floors_also_hold_for_embeddings_of_another_precision():
    module = ProbabilisticProxies(3, 4)
    module.temperature.data.fill_(-0.5)
    module.concentrations.data.fill_(-4)
    module(directions(6, 4).double(), torch.arange(6) % 3)
    assert module.temperature.item() == pytest.approx(prob_dml.MIN_TEMPERATURE)
    assert module.concentrations.eq(prob_dml.MIN_CONCENTRATION).all()


def test_a_normal_number_that_is_exactly_zero_gives_a_unit_sample(monkeypatch):
    """In two dimensions it has no direction. In float32 it comes once in some 10 million."""
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    for dim in (2, 3):
        z = prob_dml.sample_vmf(directions(5, dim), torch.full((5,), 3.0), 4)
        assert_close(z.norm(dim=2), torch.ones(4, 5))


@every_cell
def test_embeddings_and_proxies_of_two_precisions_compute_in_the_higher(metric, proxy):
    module = ProbabilisticProxies(3, 4, metric, proxy, temperature=0.5)
    e, labels = 5 * directions(6, 4), torch.arange(6) % 3
    mixed = module(e, labels, seeded())
    module.double()
    assert_close(mixed, module(e, labels, seeded()), rtol=1e-9, atol=0)
    module.bfloat16()
    assert module(e.bfloat16(), labels).dtype == torch.float32


@parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
def test_labels_of_any_integer_type_mean_the_same(dtype):
    e = torch.randn(4, 5)
    labels = torch.tensor([1, 0, 0, 1])
    losses, starts = [], []
    for given in (labels, labels.to(dtype)):
        module = proxies("kl", "vmf", C=4, D=5)
        losses.append(Criterion(module, 0.5).losses(e, given))
        module.warm_start(e, given)
        starts.append(module.proxies)
    assert_close(*losses, rtol=0, atol=0)
    assert torch.equal(*starts)


@every_cell
@not_finite
def test_an_embedding_that_is_not_finite_stops_the_training(metric, proxy, bad):
    """By a loss of nan, or the sampler's sentence."""
    module = proxies(metric, proxy)
    for place in ((3, 2), (3,), ()):
        e = torch.randn(6, 16)
        e[place] = bad
        try:
            assert module(e, torch.arange(6)).isnan()
        except ValueError as error:
            assert "not a finite number" in str(error)


def test_proxyanchor_is_on_the_directions_of_the_same_proxies():
    torch.manual_seed(0)
    e = 7 * torch.randn(6, 5)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    module = ProbabilisticProxies(3, 5, "kl", "vmf")
    criterion = Criterion(module, proxyanchor_weight=0.5)
    anchor = nir.ProxyAnchor(3, 5)
    anchor.proxies.data.copy_(module.proxies.data)
    expected = {"kl": module(e, labels), "proxyanchor": 0.5 * anchor(e, labels)}
    assert_close(criterion.losses(e, labels), expected)
    assert list(Criterion(module).losses(e, labels)) == ["kl"]


@every_cell
def test_a_run_starts_as_the_authors_did(metric, proxy, monkeypatch):
    """The multiplier is the embedding layer's weight's; ELK, B and KL start at class means."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 8)
    images = torch.randn(6, 3)
    weight, bias = (parameter.detach().clone() for parameter in layer.parameters())
    network = types.SimpleNamespace(embedding=layer)
    split = types.SimpleNamespace(labels=torch.tensor([0, 0, 1, 1, 2, 2]))
    monkeypatch.setattr(common, "embed", lambda network, *_: network.embedding(images))
    criterion = Criterion(ProbabilisticProxies(3, 8, metric, proxy, concentration_init=7.0))
    rho = criterion.proxies.proxies.detach()            # shares its memory
    random = rho.clone()

    def start(epoch, weights):
        args = argparse.Namespace(weights=weights, norm_multiplier=12.0)
        criterion.start_epoch(epoch, network, split, args, torch.device("cpu"))
        return 7 * F.normalize(layer(images).view(3, 2, 8).sum(1)).detach()

    start(1, "imagenet")
    assert torch.equal(rho, random)
    class_means = start(0, "imagenet")
    assert_close(rho, class_means if metric in KERNELS else random)
    assert torch.equal(layer.weight, 12 * weight)
    assert torch.equal(layer.bias, bias)
    assert_close(start(0, "none"), rho)                 # from scratch all start there


# --------------------------------------------------------------------------------- the settings

COLUMNS = (
    "lr", "epochs", "batch_size", "lr_steps", "lr_gamma",
    "proxy_lr", "concentration_lr", "temperature_lr",
    "proxy", "temperature", "concentration_init", "norm_multiplier", "samples",
)
CUB_128 = (1e-5, 250, 64, [25, 50], 0.3, 0.05, 0.2, 0.002, "nivmf", 0.003, 6, 30, 5)
CUB_512 = (1e-5, 250, 64, [31], 0.1, 0.05, 0.2, 0.002, "nivmf", 0.003, 18, 50, 5)
ABLATION = (1e-5, 50, 106, [], 0.1, 0.05, 0.5, 0.005)
SCRATCH = (1e-3, 15, 90, [10, 13], 0.3)
SCRATCH_ELK = (*SCRATCH, 0.1, 0.2, 0.001)
RUNS = {
    # EL-nivMF, as published. Other data sets and dimensions take CUB's and the next one's.
    "cub200": CUB_128,
    "cub200 --embed_dim 512": CUB_512,
    "cars196": (1e-5, 300, 64, [60, 80], 0.1, 0.075, 0.075, 0.002, "nivmf", 0.003, 9, 12, 5),
    "cars196 --embed_dim 512":
        (1e-5, 300, 64, [105, 170], 0.2, 0.05, 0.2, 0.002, "nivmf", 0.003, 22, 10, 5),
    "folder --embed_dim 64": CUB_128,
    "sop --embed_dim 400": CUB_512,
    # The published ablation. Cells that it lacks take their metric's row.
    "cub200 --proxy vmf": (*ABLATION, "vmf", 1, 10, 150, 10),
    "cub200 --metric bhattacharyya": (*ABLATION, "nivmf", 1, 10, 150, 10),
    "cub200 --metric kl --proxy vmf": (*ABLATION, "vmf", 1, 10, 150, 10),
    "cub200 --metric loglik": (*ABLATION, "nivmf", 1 / 32, 10, 1, 10),
    "cub200 --metric l2": (*ABLATION, "vmf", 1, 200, 1, 10),
    "cub200 --metric cosine": (*ABLATION, "vmf", 1 / 256, 10, 1, 10),
    # From scratch, as in RESULTS.md.
    "toy": (*SCRATCH_ELK, "nivmf", 0.1, 10, 40, 200),
    "toy --proxy vmf": (*SCRATCH_ELK, "vmf", 0.1, 10, 40, 200),
    "toy --metric bhattacharyya": (*SCRATCH_ELK, "nivmf", 0.1, 10, 40, 200),
    "toy --metric kl": (*SCRATCH_ELK, "nivmf", 0.1, 10, 10, 200),
    "toy --metric kl --proxy vmf": (*SCRATCH_ELK, "vmf", 0.1, 10, 40, 200),
    "toy --metric loglik": (*SCRATCH, 0.3, 0.6, 0.003, "nivmf", 0.3, 30, 10, 200),
    "toy --metric loglik --proxy vmf": (*SCRATCH, 0.1, 0.2, 0.01, "vmf", 1, 10, 10, 200),
    "toy --metric cosine": (*SCRATCH, 0.1, 0.2, 0.00125, "vmf", 1 / 8, 10, 10, 200),
    "toy --metric l2": (*SCRATCH, 0.01, 0.01, 0.02, "vmf", 5, 15, 3, 200),
}


def in_columns(settings):
    return tuple(settings[name] for name in COLUMNS)


@parametrize("options", RUNS)
def test_presets_are_the_published_settings(options, monkeypatch):
    args, _, _ = started(monkeypatch, prob_dml, "--dataset", *options.split())
    args.batch_size = args.usual_batch_size
    assert in_columns(vars(args)) == RUNS[options]
    assert args.warmup == 0


def test_el_nivmfs_row_of_the_ablation_which_no_run_takes_is_the_published_one():
    row = dict(zip(prob_dml.COLUMNS, prob_dml.ABLATION["elk/nivmf"]), proxy="nivmf")
    assert in_columns(row) == (*ABLATION, "nivmf", 1, 50, 150, 10)


def test_defaults_of_the_classes_are_those_of_the_official_runs():
    official = dict(zip(COLUMNS, CUB_128))
    defaults = common.defaults(ProbabilisticProxies, Criterion)
    for name in ("ProbabilisticProxies.samples", "ProbabilisticProxies.temperature",
                 "Criterion.proxy_lr", "Criterion.concentration_lr", "Criterion.temperature_lr"):
        assert defaults[name] == official[name.split(".")[1]]


# ------------------------------------------------------------------------------------- the runs


def rates(criterion):
    """{parameter's name: its rate} of an optimiser over the criterion."""
    names = {parameter: name for name, parameter in criterion.proxies.named_parameters()}
    groups = torch.optim.Adam(criterion.param_groups()).param_groups
    assert not any(group["weight_decay"] for group in groups)
    return {names[parameter]: group["lr"] for group in groups for parameter in group["params"]}


def test_options_reach_the_criterion(monkeypatch):
    argv = (
        "--dataset toy --metric kl --form official --samples 3 --temperature 0.7 --epochs 7 "
        "--concentration_init 4 --norm_multiplier 9 --proxyanchor_weight 0.5 --proxy_lr 0.2 "
        "--concentration_lr 0.3 --temperature_lr 0.5")
    args, make_criterion, name = started(monkeypatch, prob_dml, *argv.split())
    criterion = make_criterion(7)
    module = criterion.proxies
    assert (module.metric, module.form, module.samples) == ("kl", "official", 3)
    assert module.concentrations.shape == (7, 64)
    assert (module.concentrations == 4).all()
    assert module.temperature.item() == pytest.approx(0.7)
    assert criterion.proxyanchor_weight == 0.5
    assert rates(criterion) == dict(proxies=0.2, concentrations=0.3, temperature=0.5)
    assert (args.epochs, args.norm_multiplier) == (7, 9)
    assert name == "toy-kl-nivmf-official-g0.5-seed0"


def test_a_run_without_options_is_exact_el_nivmf_on_cub(monkeypatch):
    args, make_criterion, name = started(monkeypatch, prob_dml)
    floors = {"min_concentration": MIN_CONCENTRATION, "min_temperature": MIN_TEMPERATURE}
    assert args.fixed == {**floors, **common.defaults(nir.ProxyAnchor)}
    assert list(make_criterion(2).losses(torch.randn(2, 128), torch.arange(2))) == ["elk"]
    assert name == "cub200-elk-nivmf-exact-seed0"


@every_cell
def test_an_option_is_refused_if_and_only_if_a_cell_would_not_use_it(metric, proxy, monkeypatch):
    """Tried out: does the loss, or a rate, change with its value?"""
    def outcome(concentration_lr=0.1, **given):
        module = proxies(metric, proxy, **given)
        with torch.no_grad():
            loss = module(torch.randn(6, 16), torch.arange(6), seeded())
        return float(loss), rates(Criterion(module, concentration_lr=concentration_lr))

    for option, (first, second) in {
        "samples": (3, 4), "form": ("exact", "official"), "concentration_lr": (0.1, 0.2),
    }.items():
        if (option, proxy) == ("form", "vmf"):
            is_used = False                 # there is one form, so `official` is refused
        else:
            is_used = outcome(**{option: first}) != outcome(**{option: second})
        argv = f"--dataset toy --metric {metric} --proxy {proxy} --{option} {first}".split()
        if is_used:
            started(monkeypatch, prob_dml, *argv)
        else:
            with refused(f"--{option} {first} means nothing to"):
                started(monkeypatch, prob_dml, *argv)


def test_lengths_of_l2_have_the_rate_of_the_concentrations(monkeypatch):
    argv = "--dataset toy --metric l2 --seed 3 --concentration_lr 0.3".split()
    _, make_criterion, name = started(monkeypatch, prob_dml, *argv)
    assert rates(make_criterion(2)) == dict(proxies=0.01, lengths=0.3, temperature=0.02)
    assert name == "toy-l2-vmf-seed3"


@parametrize("argv, message", [
    ("--metric cosine --proxy nivmf", "error: --metric cosine knows no concentration"),
    ("--proxy vmf --form official", "error: --form official means nothing to --metric elk --proxy"),
    ("--embed_dim 1", "error: --embed_dim must be at least 2, not 1"),
    ("--temperature 1e-9", "error: --temperature must be at least 0.001, not 1e-09"),
    ("--proxyanchor_weight -1", "--proxyanchor_weight: -1 is not at least 0"),
    ("--proxy_lr 5000", "--proxy_lr: 5000 is not above 0 and at most 1"),
    ("--concentration_lr 0", "--concentration_lr: 0 is not above 0 and at most 1"),
    ("--temperature_lr 200", "--temperature_lr: 200 is not above 0 and at most 1"),
    ("--norm_multiplier 0", "--norm_multiplier: 0 is not above 0"),
])
def test_an_option_without_a_sense_is_named_before_data_is_read(argv, message, capsys):
    options = ["--dataset", "cub200", "--data_root", "nowhere", "--device", "cpu", *argv.split()]
    assert message in error_of(lambda: prob_dml.main(options), capsys)


@parametrize("dataset", ["cub200", "cars196"])
@parametrize("dim", [128, 512])
@parametrize("form", ["exact", "official"])
def test_first_steps_keep_warm_started_proxies_and_free_the_temperature(
        dataset, dim, form, monkeypatch):
    """A step turns no proxy far, T leaves 0.003, and ProxyAnchor gets its share."""
    argv = f"--dataset {dataset} --embed_dim {dim} --form {form} --proxyanchor_weight 5"
    args, make_criterion, _ = started(monkeypatch, prob_dml, *argv.split())
    torch.manual_seed(0)
    criterion = make_criterion(100)
    module = criterion.proxies
    labels = torch.arange(100).repeat_interleave(10)
    noisy = torch.randn(100, dim)[labels] + 1.5 * torch.randn(1000, dim)
    embeddings = args.norm_multiplier / 3 * unit_vectors(noisy)
    module.warm_start(embeddings, labels)
    first = F.normalize(module.proxies.detach())
    optimizer = torch.optim.Adam(criterion.param_groups())
    for step in range(40):
        chosen = torch.randint(1000, (64,))
        batch = embeddings[chosen].requires_grad_()
        losses = criterion.losses(batch, labels[chosen])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if step == 0:
            assert (F.normalize(module.proxies) * first).sum(1).min() > 0.99
    assert module.temperature > 0.02
    share = common.gradient_shares(criterion.losses(batch, labels[chosen]), batch)
    assert share["grad_share_proxyanchor"] > 0.05       # 0.03 at most if T stays at 0.003


@every_cell
def test_every_cell_trains_from_the_command_line(metric, proxy, photos, tmp_path, capsys):
    """The loss falls; the log follows norm, concentration and temperature."""
    train(photos, tmp_path / "run", "--epochs", 6, "--batch_size", 64, "--proxyanchor_weight", 0.1,
          "--metric", metric, "--proxy", proxy, main=prob_dml.main)
    assert "recall@1" in capsys.readouterr().out
    first, *_, last = csv.DictReader(open(tmp_path / "run/log.csv"))
    logged = {metric, "proxyanchor", f"grad_share_{metric}", "norm_mean", "norm_std", "temperature"}
    assert logged <= last.keys()
    assert ("anisotropy" in last) == (proxy == "nivmf")
    assert ("length" in last) == (metric == "l2")
    assert float(last[metric]) < float(first[metric]) / 2
    assert first["temperature"] != last["temperature"]
    assert first["norm_mean"] != last["norm_mean"]
