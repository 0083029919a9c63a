"""A Non-isotropic Probabilistic Take on Proxy-based Deep Metric Learning (Kirchhof, Roth, Akata, Kasneci; ECCV 2022).

An embedding e stands for a von Mises-Fisher distribution (vMF) on the unit sphere: mean direction e / ||e||,
concentration ||e||. A class proxy is a vMF too, or a non-isotropic one (nivMF) with a concentration for each dimension.
An image and a class are as similar as their two distributions, by default by the expected likelihood kernel (ELK), and
a softmax over the classes makes that a loss.

In reading order: the vMF and the nivMF - the similarities - the loss - how log C_D is computed - how a vMF is sampled -
the papers' settings - main.

    python prob_dml.py --metric elk                        the paper's settings: CUB200, ResNet50, nivMF proxies, a GPU
    ... --form released --guidance_weight 3                as published: the authors' formulas, with ProxyAnchor
    python prob_dml.py --dataset toy --metric elk          built-in characters, minutes on a laptop
    python prob_dml.py --metric kl --proxy vmf             any cell of the paper's ablation
"""
import math
from functools import partial

import common                                             # before torch: see data.py's first lines
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import nir
from data import UserError

# ---------------------------------------------------------------------------------------------------- the distributions

def vmf_log_prob(z, mu, kappa):
    """log p(z) = log C_D(kappa) + kappa mu.z for unit vectors z and mu (..., D), kappa (...), broadcast together."""
    return log_vmf_normalizer(kappa, z.shape[-1]) + kappa * (z * mu).sum(-1)


FORMS = ("exact", "released")


def nivmf_log_prob(z, mu, concentration, form="exact", metric="elk"):
    """Log density at unit vectors z (..., D) of the non-isotropic vMFs with directions mu (C, D), unit vectors, and
    K = diag(k_1 .. k_D) from concentration (C, D) > 0: (..., C). For K = k I it is the vMF with concentration k.

    If z' = Kz / ||Kz|| follows a vMF with natural parameter K mu, then by change of variables on the sphere
        log p(z) = log C_D(||K mu||) + (Kz . K mu) / ||Kz|| + log det K - D log ||Kz||                      (form "exact").
    The authors' code ("released") computes two other functions, neither of which integrates to one:
        log C_D(||K mu||) + z . K mu            + log det K - log ||K mu||          in EL-nivMF, isotropic in z,
        log C_D(||K mu||) + (Kz . K mu)/||Kz||  + log det K - log ||K mu||          in its log-likelihood (metric loglik).
    """
    if form not in FORMS:
        raise UserError(f"form must be one of {', '.join(FORMS)}, not {form!r}.")
    if concentration.shape != mu.shape or mu.dim() != 2 or z.shape[-1] != mu.shape[1]:
        raise UserError(f"nivmf_log_prob takes z (..., D), mu (C, D), concentration (C, D), not {tuple(z.shape)}, "
                        f"{tuple(mu.shape)}, {tuple(concentration.shape)}.")
    D = mu.shape[1]
    # g, the geometric mean of k_1 .. k_D, is taken out of K: log det K - D log ||Kz|| = -D/2 log (||Kz|| / g)^2 is
    # small, where its two terms alone are in the thousands and float32 has no digits left for their difference.
    log_g = concentration.log().mean(1)  # (C,)
    Kmu = concentration * mu
    norm_Kmu = Kmu.norm(dim=1)  # (C,)
    if form == "released":
        log_factor = log_vmf_normalizer(norm_Kmu, D) + D * log_g - norm_Kmu.log()  # (C,)
        if metric != "loglik":
            return z @ Kmu.T + log_factor  # (..., D) @ (D, C) -> (..., C)
    K2 = (concentration / log_g.exp().unsqueeze(1)).square()  # K^2 / g^2
    Kz2 = z.square() @ K2.T  # ||Kz||^2 / g^2, (..., D) @ (D, C) -> (..., C)
    Kz_Kmu = z @ (K2 * mu).T * log_g.exp() / Kz2.sqrt()  # (Kz . K mu) / ||Kz||
    if form == "released":
        return Kz_Kmu + log_factor
    return log_vmf_normalizer(norm_Kmu, D) + Kz_Kmu - 0.5 * D * Kz2.log()


def unit_vectors(x):
    """x / ||x|| along the last axis. A zero vector has no direction: it gets the first axis, and no gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    first_axis = torch.eye(1, x.shape[-1], dtype=x.dtype, device=x.device)[0]
    return torch.where(norm > 1e-12, x / norm.clamp_min(1e-12), first_axis)


# ---------------------------------------------------------------------------------------------------- the similarities
# Each takes embeddings e (B, D), proxies rho (C, D), whose directions alone count (but for l2), and concentration:
# (C, 1) for vMF proxies or (C, D) for nivMF proxies. Each returns (B, C), larger for more similar. p is the image's
# distribution, q the proxy's. Between two vMFs everything is in closed form, written with e itself, k1 mu1, so that it
# is smooth even at e = 0. For nivMF proxies, an expectation over p is a mean over samples that all proxies share; there
# form "released" takes the authors' density, and divides each sample's log density by T inside the log-mean-exp: then the
# result is T log mean_s exp(log q(z_s) / T), which is the log of the kernel for T = 1 alone.


def sample_log_q(embeddings, proxies, concentration, samples, form, generator):
    """Samples of the images z (S, B, D) and log q(z), (S, B, C)."""
    z = sample_vmf(unit_vectors(embeddings), embeddings.norm(dim=1), samples, generator)
    return z, nivmf_log_prob(z, unit_vectors(proxies), concentration, form)


def product_kernel(embeddings, proxies, concentration, samples, form, generator, temperature=1.0, r=1.0):
    """log int p(z)^r q(z)^r dz, the probability product kernel: r = 1 is the expected likelihood kernel (ELK), r = 1/2
    the Bhattacharyya coefficient. It is log mean_s p(z_s)^(r-1) q(z_s)^r with z_s ~ p, and between two vMFs
        r log C(k1) + r log C(k2) - log C(r ||k1 mu1 + k2 mu2||)."""
    D = embeddings.shape[1]
    norm = embeddings.norm(dim=1)
    if concentration.shape[1] == D:
        z, log_q = sample_log_q(embeddings, proxies, concentration, samples, form, generator)
        if r != 1:
            log_q = r * log_q + (r - 1) * vmf_log_prob(z, unit_vectors(embeddings), norm).unsqueeze(2)
        if form == "released":
            return temperature * ((log_q / temperature).logsumexp(0) - math.log(samples))
        return log_q.logsumexp(0) - math.log(samples)
    natural = concentration * unit_vectors(proxies)
    squared = norm.square()[:, None] + concentration[:, 0].square() + 2 * embeddings @ natural.T
    norm_of_sum = squared.clamp_min(1e-30).sqrt()  # (B, C)
    log_c = log_vmf_normalizer(norm, D)[:, None] + log_vmf_normalizer(concentration[:, 0], D)
    return r * log_c - log_vmf_normalizer(r * norm_of_sum, D)


def kl(embeddings, proxies, concentration, samples, form, generator, temperature=1.0):
    """-KL(p || q) = E_p[log q(z)] - E_p[log p(z)], where E_p[log p(z)] = log C(k1) + k1 A(k1), and if q is a vMF too,
    E_p[log q(z)] = log C(k2) + A(k1) k2 mu1.mu2. The authors' code has k1 for k1 A(k1), and +KL as a similarity."""
    D = embeddings.shape[1]
    k1 = embeddings.double().norm(dim=1, keepdim=True)
    log_c, s = vmf_normalizer(k1, D)  # s = A(k1) / k1, so A(k1) mu1 = s e
    entropy = (-log_c - s * k1.square()).to(embeddings.dtype)  # (B, 1)
    if concentration.shape[1] == D:
        _, log_q = sample_log_q(embeddings, proxies, concentration, samples, form, generator)
        return log_q.mean(0) + entropy
    expected_log_q = s.to(embeddings.dtype) * (embeddings @ (concentration * unit_vectors(proxies)).T)
    return log_vmf_normalizer(concentration[:, 0], D) + expected_log_q + entropy


def loglik(embeddings, proxies, concentration, samples, form, generator, temperature=1.0):
    """log q(mu1), the proxy's log density at the image's mean direction. The norm of the embedding plays no part."""
    mu1, mu2 = unit_vectors(embeddings), unit_vectors(proxies)
    if concentration.shape[1] == embeddings.shape[1]:
        return nivmf_log_prob(mu1, mu2, concentration, form, "loglik")
    return log_vmf_normalizer(concentration[:, 0], mu1.shape[1]) + mu1 @ (concentration * mu2).T


def cosine(embeddings, proxies, *_):
    """mu1.mu2"""
    return unit_vectors(embeddings) @ unit_vectors(proxies).T


def l2(embeddings, proxies, *_):
    """-||e - rho||^2, of the vectors as they are, not of their directions."""
    return 2 * embeddings @ proxies.T - embeddings.square().sum(1, keepdim=True) - proxies.square().sum(1)


SIMILARITIES = {"elk": product_kernel, "bhattacharyya": partial(product_kernel, r=0.5), "kl": kl, "loglik": loglik,
                "cosine": cosine, "l2": l2}

# ------------------------------------------------------------------------------------------------------------ the loss

MIN_CONCENTRATION, MIN_TEMPERATURE = 0.1, 1e-3


class ProbabilisticProxies(nn.Module):
    """One distribution per class, and the loss: softmax cross-entropy over all classes of similarity / T, the form of
    ProxyNCA++. T is learned.

    metric: a key of SIMILARITIES. proxy: "nivmf" or "vmf"; cosine and l2 know no concentration, so "vmf" alone.
    form: of the density of nivMF proxies, see `nivmf_log_prob`; None is DEFAULT_FORM. samples: per image, where there is
    no closed form. temperature: T's first value. concentration_init: first value of every concentration. For l2, whose
    `concentrations` are the proxies' lengths, it is the gain of a Xavier normal: they start at gain sqrt(2 D / (C + D)).

    `proxies` (C, D) give directions alone. They are stored with the length `concentration_init`: Adam moves each
    coordinate by about its rate, so that the length decides how far one step turns a proxy.
    """

    def __init__(self, num_classes, dim, metric="elk", proxy="nivmf", form=None, samples=5, temperature=0.003,
                 concentration_init=10.0):
        super().__init__()
        for name, value, choices in (("metric", metric, tuple(SIMILARITIES)), ("proxy", proxy, ("nivmf", "vmf")),
                                     ("form", form or "exact", FORMS)):
            if value not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")
        if proxy == "nivmf" and metric in ("cosine", "l2"):
            raise UserError(f"metric {metric} knows no concentration, so proxy nivmf makes no sense: use proxy vmf.")
        if proxy == "vmf" and form == "released":
            raise UserError("form released belongs to proxy nivmf: vMF proxies have one form, leave it out.")
        for name, value, least in (("num_classes", num_classes, 1), ("dim", dim, 2), ("samples", samples, 1),
                                   ("temperature", temperature, MIN_TEMPERATURE),
                                   ("concentration_init", concentration_init, MIN_CONCENTRATION)):
            if not least <= value < math.inf:
                raise UserError(f"{name} must be at least {least}, not {value}.")
        self.metric, self.samples, self.length = metric, samples, float(concentration_init)
        self.form = "exact" if proxy == "vmf" else form or DEFAULT_FORM
        self.proxies = nn.Parameter(self.length * F.normalize(torch.randn(num_classes, dim)))
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.concentrations = None
        if metric != "cosine":
            first = self.length * (math.sqrt(2 * dim / (num_classes + dim)) if metric == "l2" else 1)
            self.concentrations = nn.Parameter(torch.full((num_classes, dim if proxy == "nivmf" else 1), first))

    @nir.full_precision
    def similarity(self, embeddings, generator=None):
        """Similarity of the embeddings (B, D) and every class: (B, C)."""
        if embeddings.dim() != 2 or embeddings.shape[1] != self.proxies.shape[1]:
            raise UserError(f"The embeddings must be (B, {self.proxies.shape[1]}), not {tuple(embeddings.shape)}.")
        # Moved back to the floor where an update took them below. A clamp inside the graph would hold them there for
        # good: below the floor there is no gradient.
        self.temperature.data.clamp_(min=MIN_TEMPERATURE)
        if self.concentrations is not None:
            self.concentrations.data.clamp_(min=MIN_CONCENTRATION)
        proxies = self.proxies if self.metric != "l2" else self.concentrations * unit_vectors(self.proxies)
        return SIMILARITIES[self.metric](embeddings, proxies, self.concentrations, self.samples, self.form, generator,
                                         self.temperature)

    def forward(self, embeddings, labels, generator=None):
        """Loss of embeddings (B, D) with labels (B,) in 0 .. C-1, mean over the batch: a scalar."""
        if labels.shape != embeddings.shape[:1]:
            raise UserError(f"{tuple(embeddings.shape)} embeddings need one label each, not {tuple(labels.shape)}.")
        return F.cross_entropy(self.similarity(embeddings, generator) / self.temperature, labels)

    @torch.no_grad()
    def warm_start(self, embeddings, labels):
        """Turn every proxy to the mean embedding (N, D) of its class, labels (N,); a class without any keeps its own."""
        if labels.shape != embeddings.shape[:1] or embeddings.shape[1:] != self.proxies.shape[1:]:
            raise UserError(f"warm_start takes embeddings (N, {self.proxies.shape[1]}) and labels (N,), not "
                            f"{tuple(embeddings.shape)} and {tuple(labels.shape)}.")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.proxies):
            raise UserError(f"Labels must lie in 0 .. {len(self.proxies) - 1}, not {labels.min()} .. {labels.max()}.")
        sums = torch.zeros_like(self.proxies).index_add_(0, labels, embeddings.to(self.proxies))
        seen = labels.unique()
        self.proxies[seen] = self.length * unit_vectors(sums[seen])

    @torch.no_grad()
    def statistics(self, embeddings):
        """What the method is about, for the log: mean and spread of the embeddings' norms, temperature, and if there
        are any, mean concentration (l2: length) and anisotropy (coefficient of variation within a class, mean over the
        classes)."""
        norm = embeddings.norm(dim=1)
        values = {"norm_mean": norm.mean(), "norm_std": norm.std(correction=0),
                  "temperature": self.temperature.clamp(min=MIN_TEMPERATURE)}
        if self.concentrations is not None:
            K = self.concentrations.clamp(min=MIN_CONCENTRATION)
            values["concentration"] = K.mean()
            if K.shape[1] > 1:
                values["anisotropy"] = (K.std(1, correction=0) / K.mean(1)).mean()
        return {name: float(value) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------------ the criterion

class Criterion(nn.Module):
    """The loss of a run: that of the probabilistic proxies, + g times ProxyAnchor on the directions of the same proxies
    (PANC + EL-nivMF) where g, the guidance weight, is not zero."""

    def __init__(self, proxies, guidance_weight=0.0, proxy_lr=1.0, concentration_lr=1.0, temperature_lr=1.0):
        super().__init__()
        self.proxies, self.guidance_weight = proxies, guidance_weight
        self.multiples = {"proxies": proxy_lr, "concentrations": concentration_lr, "temperature": temperature_lr}
        self.anchor = nir.ProxyAnchor(*proxies.proxies.shape)
        self.anchor.proxies = proxies.proxies

    def terms(self, embeddings, labels):
        terms = {self.proxies.metric: self.proxies(embeddings, labels)}
        if self.guidance_weight:
            terms["guidance"] = self.guidance_weight * self.anchor(embeddings, labels)
        return terms

    def groups(self, lr):
        return [{"params": [parameter], "lr": self.multiples[name] * lr}
                for name, parameter in self.proxies.named_parameters()]

    def log_values(self, embeddings, labels):
        return self.proxies.statistics(embeddings)


def setup(criterion, network, train_split, args, device):
    """Before the first epoch: embeddings of a useful norm, since the norm is a concentration; proxies at the class means.
    The authors' proxies of log-likelihood, L2 and cosine stay at random; from scratch, where they have no settings, all
    start at the means."""
    with torch.no_grad():
        network.embedding.weight.mul_(args.norm_multiplier)
    if criterion.proxies.metric in ("elk", "bhattacharyya", "kl") or getattr(args, "weights", None) == "none":
        embeddings = common.embed(network, train_split, args, device, "warm start: images")
        criterion.proxies.warm_start(embeddings, train_split.labels.to(device))


# ---------------------------------------------------------------------------------------------- how log C_D is computed

# Coefficients of the polynomials u_1 .. u_4 of Debye's expansion: u_n(p) = p^n (c_0 + c_1 p^2 + ... + c_n p^(2n)).
DEBYE = [
    [3 / 24, -5 / 24],
    [81 / 1152, -462 / 1152, 385 / 1152],
    [30375 / 414720, -369603 / 414720, 765765 / 414720, -425425 / 414720],
    [4465125 / 39813120, -94121676 / 39813120, 349922430 / 39813120, -446185740 / 39813120, 185910725 / 39813120]]
DEBYE_ORDER = 40  # the expansion is used from this order of the Bessel function on, where it is good to nearly 1e-10


def scaled_bessel(kappa, dim):
    """log F_v(kappa) and F_(v+1)(kappa) / F_v(kappa), where F_v(x) = x^-v I_v(x), v = dim/2 - 1 and I is the modified
    Bessel function. kappa: float64, any shape, >= 0. Unlike I_v itself, F_v neither vanishes nor blows up at kappa = 0.

    Debye's uniform expansion for large order, with h = sqrt(m^2 + x^2), p = m/h and u_0 = 1, reads
        F_m(x) = exp(h) (m + h)^-m (2 pi h)^(-1/2) U,            U = sum_n u_n(p) / m^n
        F_(m+1)(x) / F_m(x) = 1/(m + h) - W / (U h^2),            W = sum_n (u_n(p)/2 + p u_n'(p)) / m^n
    (the second line is the expansion of I_m'/I_m with the terms that cancel taken out by hand). A low order v is
    reached from a high one by the recurrence of the ratios s_j = F_j / F_(j-1):  s_j = 1 / (2j + x^2 s_(j+1)).
    All its terms are positive and it damps errors, so both results keep nearly full precision for every kappa.
    """
    v = dim / 2 - 1
    steps = max(0, math.ceil(DEBYE_ORDER - v))
    m = v + steps
    h = torch.hypot(kappa, torch.full_like(kappa, m))
    p = m / h
    # U = 1 + sum_j a_j p^j and, as p^j / 2 + p (p^j)' = (j + 1/2) p^j, W = 1/2 + sum_j (j + 1/2) a_j p^j.
    a = [0.0] * 13
    for n, coefficients in enumerate(DEBYE, start=1):
        for i, c in enumerate(coefficients):
            a[n + 2 * i] += c / m ** n
    U_minus_1, W = torch.zeros_like(p), torch.zeros_like(p)
    for j in reversed(range(13)):
        U_minus_1.mul_(p).add_(a[j])
        W.mul_(p).add_((j + 0.5) * a[j])
    W += 0.5
    log_f = h - m * (m + h).log() - 0.5 * (2 * math.pi * h).log() + U_minus_1.log1p()
    s = 1 / (m + h) - W / ((1 + U_minus_1) * h.square())
    for step in range(steps):
        s = 1 / (2 * (m - step) + kappa.square() * s)
        log_f -= s.log()
    return log_f, s


class VMFNormalizer(torch.autograd.Function):
    """kappa (float64) -> log C_D(kappa) and s_D(kappa) = A_D(kappa) / kappa, with their derivatives given to autograd:
        d log C_D / d kappa = -A_D = -kappa s_D,         d s_D / d kappa = -kappa s_D (s_D - s_(D+2)).
    Differentiating the formulas of `scaled_bessel` would lose digits; these lose none, also at kappa = 0, where the
    usual A_D' = 1 - A_D^2 - (D-1) A_D / kappa divides by zero. The backward pass is itself differentiable."""

    @staticmethod
    def forward(ctx, kappa, dim):
        log_f, s = scaled_bessel(kappa, dim)
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kappa, s)
        return -0.5 * dim * math.log(2 * math.pi) - log_f, s

    @staticmethod
    def backward(ctx, grad_log_c, grad_s):
        kappa, s = ctx.saved_tensors
        grad = torch.zeros_like(kappa)
        if grad_log_c is not None:
            grad = grad - grad_log_c * kappa * s
        if grad_s is not None:
            grad = grad - grad_s * kappa * s * (s - VMFNormalizer.apply(kappa, ctx.dim + 2)[1])
        return grad, None


def vmf_normalizer(kappa, dim):
    """log C_D(kappa) and A_D(kappa) / kappa in float64. In float32, (D/2 - 1) log kappa - log I would be a small
    difference of large numbers, and A_D' for large kappa nothing but rounding error."""
    if dim < 2:
        raise UserError(f"A von Mises-Fisher distribution needs at least 2 dimensions, but the dimension is {dim}.")
    if kappa.device.type == "mps":
        raise UserError("The normaliser of the vMF needs float64, which an MPS device does not have: use the CPU.")
    return VMFNormalizer.apply(kappa.double(), dim)


def log_vmf_normalizer(kappa, dim):
    """log C_D(kappa) = (D/2 - 1) log kappa - (D/2) log 2 pi - log I_(D/2-1)(kappa), the log of the factor that makes
    the vMF density integrate to one. kappa: any shape, >= 0; the derivative is -A_D(kappa). For D = `dim` >= 2."""
    return vmf_normalizer(kappa, dim)[0].to(kappa.dtype)


def mean_resultant_length(kappa, dim):
    """A_D(kappa) = I_(D/2)(kappa) / I_(D/2-1)(kappa), in [0, 1): the mean of a vMF is A_D(kappa) mu."""
    kappa64 = kappa.double()  # once, as the two parts of A_D' nearly cancel and must meet in float64
    return (kappa64 * vmf_normalizer(kappa64, dim)[1]).to(kappa.dtype)


# ------------------------------------------------------------------------------------------------- how a vMF is sampled

def sample_vmf(mu, kappa, num_samples, generator=None):
    """Draw from the vMFs with mean directions mu (B, D), unit vectors, and concentrations kappa (B,) >= 0: (S, B, D).

    z = cos(theta) mu + sin(theta) v, v uniform among the unit vectors orthogonal to mu. theta comes from the rejection
    step of Wood (Simulation of the von Mises Fisher distribution, 1994), so the samples are exact. They are
    reparameterised: autograd gets the derivatives of `VMFSample`, and the rejection step drops no term of the gradient.
    (It does where the accepted proposal is differentiated, as in Davidson et al., Hyperspherical Variational
    Auto-Encoders, 2018: kappa's influence on which proposal is accepted takes a score-function term there.)
    """
    if mu.dim() != 2 or mu.shape[1] < 2 or kappa.shape != mu.shape[:1] or num_samples < 1:
        raise UserError(f"sample_vmf takes mu (B, D) with D >= 2, kappa (B,) and at least 1 sample, not "
                        f"{tuple(mu.shape)}, {tuple(kappa.shape)} and {num_samples}.")
    return VMFSample.apply(mu, kappa, num_samples, generator)


GAUSS_LEGENDRE = np.polynomial.legendre.leggauss(16)          # nodes and weights on [-1, 1]


class VMFSample(torch.autograd.Function):
    """Samples z (S, B, D) and how they move with mu and kappa while still following the vMF. If mu turns, z turns with
    it; if kappa grows, the angle theta between them shrinks so as to keep its quantile (Figurnov, Mohamed, Mnih:
    Implicit Reparameterization Gradients, NeurIPS 2018). With dmu.mu = 0 and the log density psi of the angle,
        dz = (z.mu) dmu - (z.dmu) mu                        the rotation in the plane of mu and dmu
           + (cos(theta) z - mu) / sin(theta) dtheta        along the great circle through mu and z
        dtheta / dkappa = -int_0^theta (cos t - A_D) exp(psi(t) - psi(theta)) dt
        psi(t) = kappa cos t + (D-2) log sin t + const
    The integral from 0 to pi vanishes, so minus the one from theta to pi will do as well: on the side of theta taken
    below, the integrand has one sign and nothing cancels."""

    @staticmethod
    def forward(ctx, mu, kappa, num_samples, generator):
        D = mu.shape[1]
        # theta is kept, in float64, not its cosine w: sqrt(1 - w^2) has few digits left where kappa is large.
        theta = sample_angle(kappa.double().expand(num_samples, -1), D, generator)  # (S, B)
        # Samples around the axis -sign e_1, then the Householder reflection z -> z - 2 a (a.z) / ||a||^2 that takes
        # this axis to mu; with the sign of mu_1, ||a||^2 = 2 (1 + |mu_1|) is never small.
        z = torch.randn(num_samples, *mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
        z[..., 1:] *= (theta.sin() / z[..., 1:].norm(dim=-1)).to(z).unsqueeze(-1)
        sign = torch.where(mu[:, 0] < 0, -1.0, 1.0).to(z)
        z[..., 0] = -sign * theta.cos()
        a = mu.clone()
        a[:, 0] += sign
        z -= (z * a).sum(-1, keepdim=True) * (a / (1 + mu[:, :1].abs()))
        ctx.save_for_backward(mu, kappa, theta, z)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        mu, kappa, theta, z = ctx.saved_tensors
        D = mu.shape[1]
        cosine = theta.cos()
        along_z, along_mu = (grad * z).sum(-1), (grad * mu).sum(-1)  # (S, B)
        grad_mu = (cosine.to(grad).unsqueeze(-1) * grad - along_mu.unsqueeze(-1) * z).sum(0)
        # Gauss-Legendre over ten standard deviations or up to the pole; psi'' = -sqrt((D-2)^2 + 4 kappa^2) at the mode.
        # 16 nodes give the integral to about 1e-8.
        k = kappa.double()
        mean_cosine = mean_resultant_length(k, D)
        outward = cosine < mean_cosine
        span = torch.where(outward, math.pi - theta, theta).minimum(10 * ((D - 2) ** 2 + 4 * k ** 2) ** -0.25)
        nodes, weights = (torch.from_numpy(array).to(theta) for array in GAUSS_LEGENDRE)
        t = theta.unsqueeze(-1) + torch.where(outward, span, -span).unsqueeze(-1) * (nodes + 1) / 2  # (S, B, 16)
        psi = k[:, None] * (t.cos() - cosine.unsqueeze(-1)) + (D - 2) * (t.sin() / theta.sin().unsqueeze(-1)).log()
        dtheta = -((t.cos() - mean_cosine[:, None]).abs() * psi.exp()) @ (weights / 2) * span
        grad_kappa = ((cosine * along_z - along_mu) / theta.sin() * dtheta).sum(0)
        return grad_mu, grad_kappa.to(kappa), None, None


def sample_angle(kappa, D, generator):
    """Wood's rejection step for kappa of any shape, in t = tan(theta/2)^2, where no difference of near-equal numbers
    is left. He proposes t = b y with y = e / (1 - e), e ~ Beta((D-1)/2, (D-1)/2). That is y = exp(2 asinh x) where
    sqrt(D-1) x follows Student's t with D-1 degrees of freedom, which takes two uniform numbers (Bailey, Polar
    Generation of Random Variates with the t-Distribution, 1994). With w = cos(theta) = (1-t) / (1+t) and
    x0 = (1-b) / (1+b) it is accepted if log u <= kappa (w - x0) + (D-1) log((1 - x0 w) / (1 - x0^2)): at least 65 %
    of the proposals, whatever D and kappa."""
    k = kappa.reshape(-1)
    theta = torch.full_like(k, math.nan)
    pending = torch.arange(len(k), device=k.device)
    for _ in range(100):  # 8 proposals at once for each pending sample: one or two rounds, and never 100
        k_pending = k[pending]
        b = (D - 1) / (2 * k_pending + (4 * k_pending ** 2 + (D - 1) ** 2).sqrt())
        u = torch.rand(3, 8, len(pending), dtype=k.dtype, device=k.device, generator=generator)
        x = (-2 / (D - 1) * (-u[0]).log1p()).expm1().sqrt() * (2 * math.pi * u[1]).cos()
        y = (2 * x.asinh()).exp()
        t = b * y
        log_accept = 2 * k_pending * (b - t) / ((1 + t) * (1 + b)) + (D - 1) * ((1 + y) * (1 + b) / (2 * (1 + t))).log()
        accepted = u[2].log() <= log_accept
        first = accepted.byte().argmax(0, keepdim=True)
        done = accepted.any(0)
        theta[pending[done]] = 2 * t.gather(0, first)[0, done].sqrt().atan()
        pending = pending[~done]
        if not len(pending):
            return theta.view(kappa.shape)
    raise UserError("Cannot sample: a concentration is not a finite number. If this happens in training, it has "
                    "diverged: lower the learning rates.")


# ------------------------------------------------------------------------------------------------------- the settings
# The *_lr are multiples of --lr. Adam moves a number by about its rate: T, from 0.003, by 0.002 a step in the papers'
# runs; a proxy of length 18 in 512 dimensions turns by 3.6 degrees. norm_multiplier scales the embedding layer's first weights.

DEFAULT_FORM = "exact"
PAPER = dict(batch_size=64, lr=1e-5, lr_gamma=0.1, warmup=0, proxy_lr=5000, concentration_lr=20000, temperature=0.003,
             temperature_lr=200, samples=5)
PRESETS = {  # (data set, D) -> EL-nivMF's settings where they differ from PAPER
    ("cub200", 128): dict(epochs=250, lr_steps=[25, 50], lr_gamma=0.3, concentration_init=6, norm_multiplier=30),
    ("cub200", 512): dict(epochs=250, lr_steps=[31], concentration_init=18, norm_multiplier=50),
    ("cars196", 128): dict(epochs=300, lr_steps=[60, 80], proxy_lr=7500, concentration_lr=7500, concentration_init=9,
                           norm_multiplier=12),
    ("cars196", 512): dict(epochs=300, lr_steps=[105, 170], lr_gamma=0.2, concentration_init=22, norm_multiplier=10),
}
ABLATION = dict(epochs=50, lr_steps=[], batch_size=106, concentration_lr=50000, concentration_init=10,
                norm_multiplier=150, temperature=1.0, temperature_lr=500, samples=10)
ABLATIONS = {  # metric -> settings of the other cells of the ablation (CUB, D = 512) where they differ from ABLATION
    "elk/nivmf": dict(concentration_init=50), "loglik": dict(temperature=1 / 32, norm_multiplier=1),
    "cosine": dict(temperature=1 / 256, norm_multiplier=1),
    "l2": dict(concentration_init=200, norm_multiplier=1)}   # elk/nivmf is for reference: alone, elk takes PRESETS
# A network that starts from nothing (--weights none, so also toy): other rates, fewer epochs. T, concentration_init and
# norm_multiplier were chosen for each cell on validation classes: RESULTS.md.
SCRATCH = dict(batch_size=90, lr=1e-3, epochs=15, lr_steps=[10, 13], lr_gamma=0.3, warmup=0, proxy_lr=100,
               concentration_lr=200, concentration_init=10, norm_multiplier=40, temperature=0.1, temperature_lr=1, samples=200)
SCRATCHES = {  # (metric, proxy) -> what differs from SCRATCH
    ("kl", "nivmf"): dict(norm_multiplier=10),
    ("loglik", "nivmf"): dict(temperature=0.3, temperature_lr=3, concentration_init=30, concentration_lr=600, proxy_lr=300,
                              norm_multiplier=10),
    ("loglik", "vmf"): dict(temperature=1.0, temperature_lr=10, norm_multiplier=10),
    ("cosine", "vmf"): dict(temperature=1 / 8, temperature_lr=1.25, norm_multiplier=10),
    ("l2", "vmf"): dict(temperature=5.0, temperature_lr=20, concentration_init=15, concentration_lr=10, proxy_lr=10,
                        norm_multiplier=3),
}


def preset(args):
    proxy = args.proxy or ("vmf" if args.metric in ("cosine", "l2") else "nivmf")
    form = args.form or (DEFAULT_FORM if proxy == "nivmf" else "exact")
    dim = 512 if args.embed_dim > 128 else 128             # what is not listed: CUB, and up to 128 the row of 128, else 512
    if args.weights == "none":
        settings = {**SCRATCH, **SCRATCHES.get((args.metric, proxy), {})}
    elif (args.metric, proxy) == ("elk", "nivmf"):
        settings = {**PAPER, **PRESETS.get((args.dataset, dim), PRESETS["cub200", dim])}
    else:
        settings = {**PAPER, **ABLATION, **ABLATIONS.get(args.metric, {})}
    return {**settings, "proxy": proxy, "form": form}


def main(argv=None):
    papers = {f"{name}/{dim}": {**PAPER, **row} for (name, dim), row in PRESETS.items()}
    papers |= {"ablation": {**PAPER, **ABLATION}, **{f"..{metric}": row for metric, row in ABLATIONS.items()}}
    scratch = {"elk": SCRATCH, **{f"..{'/'.join(cell)}": row for cell, row in SCRATCHES.items()}}
    p = common.parser(__doc__.split("\n\n")[0], "presets of the papers' runs: elk with nivmf proxies by data set/D (others: as "
                      "CUB), then the ablation's other cells;\n..metric: only what differs; *_lr are multiples of --lr\n" +
                      common.aligned(papers) + "\n\npresets from scratch (--weights none, toy)\n" + common.aligned(scratch))
    add = p.add_argument_group("EL-nivMF").add_argument
    add("--metric", choices=SIMILARITIES, default="elk", help="default: elk")
    add("--proxy", choices=("nivmf", "vmf"), help="default: nivmf, for cosine and l2, which know no concentration, vmf")
    add("--form", choices=FORMS, help=f"of nivMF proxies; released: the authors' formulas (default: {DEFAULT_FORM})")
    add("--guidance_weight", type=common.not_negative(float), default=0.0,
        help="weight g of ProxyAnchor (default: 0; released: CUB 3 and 5 for D = 128 and 512, Cars 0.3 and 0.1)")
    number = common.positive(float)
    for name, what in (("proxy_lr", "multiple of --lr for the proxies"), ("concentration_lr", "... concentrations"),
                       ("temperature_lr", "... temperature"), ("temperature", "T's first value"),
                       ("concentration_init", "first concentrations and length of proxies"),
                       ("norm_multiplier", "scales the first embeddings, whose norms are concentrations")):
        add(f"--{name}", type=number, help=f"{what} (default: by preset)")
    add("--samples", type=common.positive(int), help="S, Monte-Carlo samples per image (default: by preset)")
    args = common.parse(p, preset, argv)

    def criterion(num_classes):
        proxies = ProbabilisticProxies(num_classes, args.embed_dim, args.metric, args.proxy, args.form,
                                       args.samples, args.temperature, args.concentration_init)
        return Criterion(proxies, args.guidance_weight, args.proxy_lr, args.concentration_lr, args.temperature_lr)
    criterion(1)                                  # options without a sense together are named before any download
    form = f"-{args.form}" if args.proxy == "nivmf" else ""
    guidance = f"-g{args.guidance_weight:g}" if args.guidance_weight else ""
    common.train(args, criterion, f"{args.dataset}-{args.metric}-{args.proxy}{form}{guidance}-seed{args.seed}", setup)


if __name__ == "__main__":
    common.command(main)
