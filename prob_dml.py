"""EL-nivMF: A Non-isotropic Probabilistic Take on Proxy-based Deep Metric Learning.

The paper is by Kirchhof, Roth, Akata and Kasneci (ECCV 2022).

An image is not a point but a distribution on the unit sphere, a von Mises-Fisher (vMF). The
direction of its embedding is the mean mu, the norm is the concentration kappa:

    log p(z) = log C_D(kappa) + kappa mu . z

A class is a distribution too, a non-isotropic vMF (nivMF), with a concentration for each
dimension. The similarity of an image p and a class q is the overlap of their distributions,
the expected likelihood kernel (ELK). A softmax over the classes turns it into a loss:

    ELK = int p(z) q(z) dz
    L   = mean_i -log softmax_c(log ELK(p_i, q_c) / T)        at c = y_i, the class of image i

In reading order: the distributions; the similarities; the loss; then how the vMF's normaliser
C_D is computed, and how a vMF is sampled; the settings; main.

    python prob_dml.py --dataset toy                 built-in characters, minutes on a laptop
    python prob_dml.py                               EL-nivMF: CUB200, ResNet50, a GPU
    python prob_dml.py --metric kl --proxy vmf       any cell of the paper's ablation

    As published, for CUB and D = 128, with the official formulas and ProxyAnchor:

    python prob_dml.py --form official --proxyanchor_weight 3

    paper         name in the code
    psi           `embeddings` (B, D), as the network gives them: they are k1 mu1
    k1, mu1       `image_kappa` (B,), `image_mu` (B, D): an image's concentration, direction
    rho           `proxies` (C, D), whose directions alone count; for L2 rho = `lengths` * `mu`
    k2, mu2       `kappa` (C,), `mu` (C, D): a class's concentration, direction
    K             `K` (C, D), the diagonal of a nivMF's matrix
                  k2 and K are stored as `concentrations`, (C, 1) and (C, D)
    S, z          `num_samples`, `z` (S, B, D): samples of the images' vMFs
    T             `temperature`
    g             `proxyanchor_weight`
    log C_D, A_D  `log_vmf_normalizer`, `mean_resultant_length`

One step of the training, as `common.train_one_epoch` runs it. `network` is a backbone and one
linear layer, `criterion` an instance of `Criterion`, `optimizer` one Adam over the network and
the classes' parameters.

    embeddings = network(images)                        # psi (B, D), not normalised
    losses = criterion.losses(embeddings, labels)       # {"elk": scalar}
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
"""
import math
import os

# Set before torch is imported: idle OpenMP threads sleep instead of slowing other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import nir
from nir import check_at_least, check_choice, full_precision

# ----------------------------------------------------------------------------- the distributions


@full_precision
def vmf_log_prob(z, mu, kappa):
    """Log density of a von Mises-Fisher distribution at unit vectors z.

        log p(z) = log C_D(kappa) + kappa mu . z

    z and mu (..., D) are unit vectors, kappa (...) >= 0; they are broadcast together. Raises
    ValueError if z and mu differ in D.
    """
    if z.shape[-1] != mu.shape[-1]:
        raise ValueError(f"a vMF takes z and mu (..., D), not {tuple(z.shape)} and "
                         f"{tuple(mu.shape)}")
    cosine = (z * mu).sum(-1)
    return log_vmf_normalizer(kappa, z.shape[-1]) + kappa * cosine


FORMS = ("exact", "official")


@full_precision
def nivmf_log_prob(z, mu, K, form="exact"):
    """Log density of non-isotropic vMFs at unit vectors z (..., D), for every class: (..., C).

    mu (C, D) are unit vectors, K (C, D) > 0 the diagonals of the matrices. If

        z' = Kz / ||Kz||

    follows a vMF with natural parameter K mu, a change of variables on the sphere gives z the
    density

        log p(z) = log C_D(||K mu||) + (Kz . K mu) / ||Kz|| + log det K - D log ||Kz||     "exact"

    For K = k I this is the vMF with concentration k. For EL-nivMF the official code uses
    instead

        log C_D(||K mu||) + z . K mu + log det K - log ||K mu||                         "official"

    As a function of z this is isotropic, and it does not integrate to one. Raises ValueError
    for other shapes or forms.
    """
    check_nivmf(z, mu, K)
    check_choice("form", form, FORMS)
    Kmu = K * mu
    if form == "official":
        return z @ Kmu.T + official_log_factor(Kmu, K)
    D = mu.shape[1]
    log_C_D = log_vmf_normalizer(Kmu.norm(dim=1), D)    # (C,)
    Kz_Kmu, norm_Kz = nivmf_products(z, mu, K)          # (..., C)
    # log det K and D log ||Kz|| nearly cancel: subtracted before they are multiplied by D.
    log_volume = D * (K.log().mean(1) - norm_Kz.log())  # (..., C)
    return log_C_D + Kz_Kmu / norm_Kz + log_volume


@full_precision
def official_log_likelihood(z, mu, K):
    """The official code's formula for the log-likelihood metric; shapes as in `nivmf_log_prob`.

        log C_D(||K mu||) + (Kz . K mu) / ||Kz|| + log det K - log ||K mu||

    The last two terms are not the volume log det K - D log ||Kz||, so this is no density.
    """
    check_nivmf(z, mu, K)
    Kz_Kmu, norm_Kz = nivmf_products(z, mu, K)          # (..., C)
    return Kz_Kmu / norm_Kz + official_log_factor(K * mu, K)


def official_log_factor(Kmu, K):
    """log C_D(||K mu||) + log det K - log ||K mu|| (C,), which both official formulas have."""
    D = K.shape[1]
    norm_Kmu = Kmu.norm(dim=1)
    log_det_K = D * K.log().mean(1)
    return log_vmf_normalizer(norm_Kmu, D) + log_det_K - norm_Kmu.log()


def nivmf_products(z, mu, K):
    """Kz . K mu and ||Kz||, both (..., C), by two matrix products: no (..., C, D) tensor is made.

        Kz . K mu = sum_d z_d K_d^2 mu_d        ||Kz||^2 = sum_d z_d^2 K_d^2
    """
    K_squared = K.square()
    Kz_Kmu = z @ (K_squared * mu).T                     # (..., D) @ (D, C) -> (..., C)
    norm_Kz = (z.square() @ K_squared.T).sqrt()         # (..., D) @ (D, C) -> (..., C)
    return Kz_Kmu, norm_Kz


def check_nivmf(z, mu, K):
    mu_fits_K = mu.dim() == 2 and mu.shape == K.shape
    if not mu_fits_K or z.shape[-1] != mu.shape[1]:
        shapes = f"{tuple(z.shape)}, {tuple(mu.shape)} and {tuple(K.shape)}"
        raise ValueError(f"a nivMF takes z (..., D), mu (C, D) and K (C, D), not {shapes}")


def unit_vectors(x):
    """x / ||x|| along the last axis. A zero vector gets the first axis, and no gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    first_axis = torch.zeros_like(x)
    first_axis[..., 0] = 1
    # Asked this way round, nan stays nan.
    return torch.where(norm <= 1e-12, first_axis, x / norm.clamp_min(1e-12))


# ------------------------------------------------------------------------------ the similarities
# How similar are images and classes? Each function takes embeddings (B, D), un-normalised, and
# the classes' directions mu (C, D), with their kappa (C,) for vMFs or K (C, D) for nivMFs. It
# gives (B, C), larger for more similar, or ValueError for other shapes. p is an image's
# distribution, q a class's.
#
# Between two vMFs all of them have a closed form. For nivMFs elk, bhattacharyya and kl take a
# mean over samples of p, which all classes share. The loss divides a similarity by T. The
# official form of elk and bhattacharyya has T inside the mean as well, as `power_temperature`,
# which is 1 otherwise. For elk:
#
#     exact:     log mean_s q(z_s)          official:     T log mean_s q(z_s)^(1/T)


def check_vmfs(embeddings, mu, kappa):
    fits = mu.dim() == 2 and embeddings.shape[1:] == mu.shape[1:]
    if not fits or kappa.shape != mu.shape[:1]:
        shapes = f"{tuple(embeddings.shape)}, {tuple(mu.shape)} and {tuple(kappa.shape)}"
        raise ValueError("a similarity to vMFs takes embeddings (B, D), mu (C, D) and one number "
                         f"for each class (C,), not {shapes}")


@full_precision
def elk_nivmf(embeddings, mu, K, num_samples, form="exact", power_temperature=1.0,
              generator=None):
    """EL-nivMF, the paper's method: log of the expected likelihood kernel, int p(z) q(z) dz.

        log ELK = log mean_s q(z_s),    z_s ~ p
    """
    image_mu = unit_vectors(embeddings)                 # (B, D)
    image_kappa = embeddings.norm(dim=1)                # the norm is the concentration, (B,)
    z = sample_vmf(image_mu, image_kappa, num_samples, generator)   # (S, B, D)
    log_q = nivmf_log_prob(z, mu, K, form)              # (S, B, C)
    return power_mean(log_q, power_temperature)         # (B, C)


def power_mean(log_x, T):
    """Log of the power mean of order 1/T over the first axis, T log mean_s x_s^(1/T)."""
    return T * ((log_x / T).logsumexp(0) - math.log(len(log_x)))


@full_precision
def elk_vmf(embeddings, mu, kappa):
    """Log of the expected likelihood kernel of two vMFs, in closed form.

        log ELK = log C_D(k1) + log C_D(k2) - log C_D(||k1 mu1 + k2 mu2||)
    """
    return vmf_product_kernel(embeddings, mu, kappa, r=1.0)


@full_precision
def bhattacharyya_nivmf(embeddings, mu, K, num_samples, form="exact", power_temperature=1.0,
                        generator=None):
    """Log of the Bhattacharyya coefficient, int sqrt(p(z) q(z)) dz.

        log BC = log mean_s sqrt(q(z_s) / p(z_s)),    z_s ~ p
    """
    image_mu = unit_vectors(embeddings)                 # (B, D)
    image_kappa = embeddings.norm(dim=1)                # (B,)
    z = sample_vmf(image_mu, image_kappa, num_samples, generator)   # (S, B, D)
    log_p = vmf_log_prob(z, image_mu, image_kappa)      # (S, B)
    log_q = nivmf_log_prob(z, mu, K, form)              # (S, B, C)
    log_root = 0.5 * (log_q - log_p.unsqueeze(2))
    return power_mean(log_root, power_temperature)      # (B, C)


@full_precision
def bhattacharyya_vmf(embeddings, mu, kappa):
    """Log of the Bhattacharyya coefficient of two vMFs: the kernel of order r = 1/2."""
    return vmf_product_kernel(embeddings, mu, kappa, r=0.5)


def vmf_product_kernel(embeddings, mu, kappa, r):
    """Log of the probability product kernel of order r of two vMFs, int p(z)^r q(z)^r dz.

        r log C_D(k1) + r log C_D(k2) - log C_D(r ||k1 mu1 + k2 mu2||)

    The embedding, which is k1 mu1, is used as it is: a zero embedding needs no direction.
    """
    check_vmfs(embeddings, mu, kappa)
    D = embeddings.shape[1]
    image_kappa = embeddings.norm(dim=1)                # (B,)
    natural = kappa.unsqueeze(1) * mu                   # k2 mu2, (C, D)
    dot = embeddings @ natural.T                        # (B, D) @ (D, C) -> (B, C)
    squared = image_kappa.square().unsqueeze(1) + kappa.square() + 2 * dot
    norm_of_sum = squared.clamp_min(1e-30).sqrt()       # (B, C)
    image_log_C_D = log_vmf_normalizer(image_kappa, D).unsqueeze(1)     # (B, 1)
    log_C_D = log_vmf_normalizer(kappa, D)              # (C,)
    return r * (image_log_C_D + log_C_D) - log_vmf_normalizer(r * norm_of_sum, D)


@full_precision
def kl_nivmf(embeddings, mu, K, num_samples, form="exact", power_temperature=1.0,
             generator=None):
    """The negative Kullback-Leibler divergence from image to class, -KL(p || q).

        -KL = E_p[log q(z)] - E_p[log p(z)]
        E_p[log q(z)] = mean_s log q(z_s),    z_s ~ p

    `power_temperature` is not used. It is there because all sampled similarities are called
    alike.
    """
    image_mu = unit_vectors(embeddings)                 # (B, D)
    image_kappa = embeddings.norm(dim=1)                # (B,)
    z = sample_vmf(image_mu, image_kappa, num_samples, generator)   # (S, B, D)
    log_q = nivmf_log_prob(z, mu, K, form)              # (S, B, C)
    entropy, _ = image_entropy(embeddings)              # (B, 1)
    return log_q.mean(0) + entropy                      # (B, C)


@full_precision
def kl_vmf(embeddings, mu, kappa):
    """-KL(p || q) of two vMFs, in closed form.

        E_p[log q(z)] = log C_D(k2) + A_D(k1) k2 mu1 . mu2
    """
    check_vmfs(embeddings, mu, kappa)
    entropy, A_by_kappa = image_entropy(embeddings)     # (B, 1)
    natural = kappa.unsqueeze(1) * mu                   # k2 mu2, (C, D)
    log_C_D = log_vmf_normalizer(kappa, mu.shape[1])    # (C,)
    expected_dot = A_by_kappa * (embeddings @ natural.T)    # (A_D(k1) / k1) (k1 mu1 . k2 mu2)
    return log_C_D + expected_dot + entropy


def image_entropy(embeddings):
    """The entropy of the images' vMFs, and A_D(k1) / k1: both (B, 1).

        -E_p[log p(z)] = -log C_D(k1) - k1 A_D(k1)

    In float64, as its two terms nearly cancel.
    """
    image_kappa = embeddings.double().norm(dim=1, keepdim=True)
    log_C_D, A_by_kappa = vmf_normalizer(image_kappa, embeddings.shape[1])
    entropy = -log_C_D - A_by_kappa * image_kappa.square()
    return entropy.to(embeddings), A_by_kappa.to(embeddings)


@full_precision
def loglik_nivmf(embeddings, mu, K, form="exact"):
    """The classes' log densities at the image's mean direction; its norm plays no part.

    The official form is another formula here than in EL-nivMF.
    """
    check_choice("form", form, FORMS)
    log_density = official_log_likelihood if form == "official" else nivmf_log_prob
    return log_density(unit_vectors(embeddings), mu, K)


@full_precision
def loglik_vmf(embeddings, mu, kappa):
    """The classes' log densities at the image's mean direction, for vMFs."""
    check_vmfs(embeddings, mu, kappa)
    natural = kappa.unsqueeze(1) * mu                   # k2 mu2, (C, D)
    log_C_D = log_vmf_normalizer(kappa, mu.shape[1])    # (C,)
    return log_C_D + unit_vectors(embeddings) @ natural.T


@full_precision
def cosine(embeddings, mu, kappa=None):
    """mu1 . mu2. `kappa` is not used; it is there for callers that treat all metrics alike."""
    return unit_vectors(embeddings) @ mu.T


@full_precision
def l2(embeddings, mu, length):
    """-||psi - rho||^2, where psi is not normalised and rho = length mu."""
    check_vmfs(embeddings, mu, length)
    rho = length.unsqueeze(1) * mu                      # (C, D)
    dot = embeddings @ rho.T                            # (B, C)
    psi_squared = embeddings.square().sum(1, keepdim=True)  # (B, 1)
    return 2 * dot - psi_squared - rho.square().sum(1)


# The cells of the paper's ablation: metric -> kind of proxy -> function. Cosine and L2 have no
# concentration; they are listed under vmf.
SIMILARITIES = {
    "elk": {"nivmf": elk_nivmf, "vmf": elk_vmf},
    "bhattacharyya": {"nivmf": bhattacharyya_nivmf, "vmf": bhattacharyya_vmf},
    "kl": {"nivmf": kl_nivmf, "vmf": kl_vmf},
    "loglik": {"nivmf": loglik_nivmf, "vmf": loglik_vmf},
    "cosine": {"vmf": cosine},
    "l2": {"vmf": l2},
}


# -------------------------------------------------------------------------------------- the loss

MIN_CONCENTRATION = 0.1
MIN_TEMPERATURE = 1e-3


class ProbabilisticProxies(nn.Module):
    """One distribution for each class, and the softmax loss over them, as in ProxyNCA++.

        L = mean_i -log softmax_c(similarity_ic / T)        at c = y_i, the image's class

    metric: a key of SIMILARITIES.
    proxy: "nivmf" or "vmf"; cosine and l2 take "vmf" alone.
    form: "exact" or "official", for nivMF proxies; see `nivmf_log_prob`.
    samples: S, the samples of each image, used where there is no closed form.
    temperature: the first value of T, which is learned.
    concentration_init: the first value of `concentrations`, (C, D) for nivMFs, (C, 1) for vMFs.

    Of `proxies` (C, D) the directions alone count. They are stored with the length
    concentration_init: Adam moves each coordinate by about the learning rate, so the stored
    length decides how far a step turns a proxy.

    Cosine has no concentrations. L2 has `lengths` (C, 1) instead. They start at
    concentration_init * sqrt(2 D / (C + D)), the length of vectors from a Xavier normal with
    that gain.

    Raises ValueError for values that are out of range or do not go together.
    """

    def __init__(self, num_classes, dim, metric="elk", proxy="nivmf", form="exact", samples=5,
                 temperature=0.003, concentration_init=10.0):
        super().__init__()
        check_choice("metric", metric, SIMILARITIES)
        check_choice("proxy", proxy, ("nivmf", "vmf"))
        check_choice("form", form, FORMS)
        if proxy not in SIMILARITIES[metric]:
            raise ValueError(f"metric {metric} knows no concentration, so proxy {proxy} makes no "
                             "sense: use proxy vmf")
        if proxy == "vmf" and form == "official":
            raise ValueError("form official belongs to proxy nivmf: vMF proxies have one form, "
                             "leave it out")
        check_at_least("num_classes", num_classes, 1)
        check_at_least("dim", dim, 2)
        check_at_least("samples", samples, 1)
        check_at_least("temperature", temperature, MIN_TEMPERATURE)
        check_at_least("concentration_init", concentration_init, MIN_CONCENTRATION)

        self.metric, self.proxy = metric, proxy
        self.form, self.samples = form, samples
        self.stored_length = float(concentration_init)
        directions = F.normalize(torch.randn(num_classes, dim))
        self.proxies = nn.Parameter(self.stored_length * directions)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.concentrations, self.lengths = None, None
        if metric == "l2":
            length = concentration_init * math.sqrt(2 * dim / (num_classes + dim))
            self.lengths = nn.Parameter(torch.full((num_classes, 1), length))
        elif metric != "cosine":
            shape = (num_classes, dim if proxy == "nivmf" else 1)
            self.concentrations = nn.Parameter(torch.full(shape, float(concentration_init)))

    def forward(self, embeddings, labels, generator=None):
        """Loss of embeddings (B, D) with labels (B,) in 0 .. C-1, mean over the batch: a scalar."""
        labels = nir.check_batch(embeddings, labels, *self.proxies.shape)
        self.keep_above_floors()
        return F.cross_entropy(self.logits(embeddings, generator), labels)

    @full_precision
    def logits(self, embeddings, generator=None):
        """similarity / T, (B, C)."""
        # `similarity` clamps T, in place, before anything is divided by it.
        return self.similarity(embeddings, generator) / self.temperature

    @full_precision
    def similarity(self, embeddings, generator=None):
        """Similarity of the embeddings (B, D) and every class: (B, C)."""
        D = self.proxies.shape[1]
        if embeddings.dim() != 2 or embeddings.shape[1] != D:
            raise ValueError(f"embeddings must be (B, {D}), not {tuple(embeddings.shape)}")
        self.keep_above_floors()
        function = SIMILARITIES[self.metric][self.proxy]
        mu = unit_vectors(self.proxies)
        if self.metric == "cosine":
            return function(embeddings, mu)
        if self.metric == "l2":
            return function(embeddings, mu, self.lengths.squeeze(1))
        if self.proxy == "vmf":
            return function(embeddings, mu, self.concentrations.squeeze(1))
        if self.metric == "loglik":
            return function(embeddings, mu, self.concentrations, self.form)
        power_temperature = self.temperature if self.form == "official" else 1.0
        return function(embeddings, mu, self.concentrations, num_samples=self.samples,
                        form=self.form, power_temperature=power_temperature, generator=generator)

    def keep_above_floors(self):
        """Clamp, in place, the parameters that the last update took below their floor.

        A clamp inside the graph would give them no gradient there, and they would never return.
        """
        self.temperature.data.clamp_(min=MIN_TEMPERATURE)
        for parameter in (self.concentrations, self.lengths):
            if parameter is not None:
                parameter.data.clamp_(min=MIN_CONCENTRATION)

    @torch.no_grad()
    def warm_start(self, embeddings, labels):
        """Turn each proxy to the mean of its class's embeddings (N, D), with labels (N,).

        The embeddings are not normalised. The proxy of a class without any stays as it is.
        Raises ValueError for other shapes or labels.
        """
        # Only once, so that the labels may be looked at on the CPU.
        labels = nir.check_batch(embeddings, labels.cpu(), *self.proxies.shape)
        sums = torch.zeros_like(self.proxies)
        labels = labels.to(sums.device)
        sums.index_add_(0, labels, embeddings.to(self.proxies))
        seen = labels.unique()
        self.proxies[seen] = self.stored_length * unit_vectors(sums[seen])

    @torch.no_grad()
    def statistics(self, embeddings):
        """Numbers for the log, {name: float}: norms, T, concentrations (or L2's lengths).

        The anisotropy is the standard deviation of a class's concentrations divided by their
        mean, averaged over the classes.
        """
        self.keep_above_floors()
        norm = embeddings.norm(dim=1)
        values = {
            "norm_mean": norm.mean(),
            "norm_std": norm.std(correction=0),
            "temperature": self.temperature,
        }
        if self.lengths is not None:
            values["length"] = self.lengths.mean()
        if self.concentrations is not None:
            values["concentration"] = self.concentrations.mean()
        if self.proxy == "nivmf":
            K = self.concentrations
            variation = K.std(1, correction=0) / K.mean(1)          # (C,)
            values["anisotropy"] = variation.mean()
        return {name: float(value) for name, value in values.items()}


class Criterion(nn.Module):
    """The loss of a run: that of the classes' distributions, plus ProxyAnchor on their directions.

        L = L_proxies + g L_ProxyAnchor             in the paper: PANC + EL-nivMF

    `proxies` is a ProbabilisticProxies; its own `proxies` are rho. The three learning rates are
    for `param_groups`.
    """

    def __init__(self, proxies, proxyanchor_weight=0.0, proxy_lr=0.05, concentration_lr=0.2,
                 temperature_lr=0.002):
        super().__init__()
        check_at_least("proxyanchor_weight", proxyanchor_weight, 0)
        self.proxies, self.proxyanchor_weight = proxies, proxyanchor_weight
        self.rates = {
            "proxies": proxy_lr,
            "concentrations": concentration_lr,
            "lengths": concentration_lr,
            "temperature": temperature_lr,
        }
        # One parameter for both losses: ProxyAnchor's own proxies are replaced.
        self.proxyanchor = nir.ProxyAnchor(*proxies.proxies.shape)
        self.proxyanchor.proxies = proxies.proxies

    def losses(self, embeddings, labels):
        """The weighted losses, {name: scalar}, whose sum is minimised."""
        weighted = {self.proxies.metric: self.proxies(embeddings, labels)}
        if self.proxyanchor_weight:
            proxyanchor = self.proxyanchor(embeddings, labels)
            weighted["proxyanchor"] = self.proxyanchor_weight * proxyanchor
        return weighted

    def param_groups(self):
        """Groups for Adam: each parameter with its learning rate, without weight decay."""
        groups = []
        for name, parameter in self.proxies.named_parameters():
            groups.append({"params": [parameter], "lr": self.rates[name]})
        return groups

    def diagnostics(self, embeddings, labels):
        """For the log: see `ProbabilisticProxies.statistics`."""
        return self.proxies.statistics(embeddings)

    def start_epoch(self, epoch, network, train_split, args, device):
        """The warm start, before the first epoch alone.

        First the embedding layer's weight is scaled, because an embedding's norm is its
        concentration. Then the proxies turn to their classes' mean embeddings. The official
        code leaves the proxies of log-likelihood, L2 and cosine at random. With --weights none,
        for which the official code has no settings, all proxies are turned.
        """
        if epoch > 0:
            return
        # Not imported at the top, so that the losses can be borrowed without it.
        import common

        with torch.no_grad():
            network.embedding.weight.mul_(args.norm_multiplier)
        if self.proxies.metric in ("elk", "bhattacharyya", "kl") or args.weights == "none":
            embeddings = common.embed(network, train_split, args, device, "warm start: images")
            self.proxies.warm_start(embeddings, train_split.labels.to(device))


# ------------------------------------------------------------------------ how log C_D is computed
# The factor that makes a vMF integrate to one is, with the modified Bessel function I of order
# v = D/2 - 1,
#
#     C_D(kappa) = kappa^v / ((2 pi)^(D/2) I_v(kappa))
#
# Its logarithm has the derivative -A_D(kappa), where A_D = I_(v+1) / I_v is the length of the
# vMF's mean vector. Neither can be computed as written: I_v overflows for large kappa and
# underflows for large D, and in float32 v log kappa - log I_v is a small difference of large
# numbers.
#
# Hence the scaled function F_v(x) = x^-v I_v(x), which stays finite at x = 0:
#
#     C_D = (2 pi)^(-D/2) / F_v        A_D / kappa = F_(v+1) / F_v
#
# For a large order, an expansion by Debye gives log F to about ten digits. A low order is
# reached from a high one by a recurrence. All is in float64. Autograd is told the derivatives:
# differentiating these formulas would lose digits.


def log_vmf_normalizer(kappa, dim):
    """log C_D(kappa), the log of the factor that makes a vMF integrate to one, for D = `dim`.

        log C_D(kappa) = (D/2 - 1) log kappa - (D/2) log 2 pi - log I_(D/2-1)(kappa)

    kappa: any shape, >= 0. The derivative is -A_D(kappa). Raises ValueError for a dim below
    2.
    """
    log_C_D, _ = vmf_normalizer(kappa, dim)
    return log_C_D.to(torch.result_type(kappa, 1.0))    # of integers floats


def mean_resultant_length(kappa, dim):
    """A_D(kappa) = I_(D/2)(kappa) / I_(D/2-1)(kappa), in [0, 1): a vMF's mean is A_D(kappa) mu."""
    # Cast before the product, so that autograd works in float64: the two terms of
    # A_D' = s + kappa s', where s = A_D / kappa, nearly cancel.
    kappa64 = kappa.double()
    _, A_by_kappa = vmf_normalizer(kappa64, dim)
    return (kappa64 * A_by_kappa).to(torch.result_type(kappa, 1.0))     # of integers floats


def vmf_normalizer(kappa, dim):
    """log C_D(kappa) and A_D(kappa) / kappa, both in float64 and of kappa's shape."""
    if dim < 2:
        raise ValueError(f"dim {dim} is too small: a von Mises-Fisher distribution needs at "
                         "least 2 dimensions")
    if kappa.device.type == "mps":
        raise ValueError("the normaliser of the vMF needs float64, which an MPS device does not "
                         "have: use the CPU")
    return VMFNormalizer.apply(kappa.double(), dim)


class VMFNormalizer(torch.autograd.Function):
    """log C_D and s_D = A_D / kappa of kappa (float64), with their derivatives given to autograd.

        d log C_D / d kappa = -A_D = -kappa s_D
        d s_D     / d kappa = -kappa s_D (s_D - s_(D+2))

    There is no division by kappa, unlike in the usual A_D' = 1 - A_D^2 - (D-1) A_D / kappa. The
    backward pass is differentiable itself, so second derivatives work.
    """

    @staticmethod
    def forward(ctx, kappa, dim):
        log_F, s = scaled_bessel(kappa, dim)
        ctx.dim = dim
        ctx.set_materialize_grads(False)                # an unused output has the gradient None
        ctx.save_for_backward(kappa, s)
        log_C_D = -0.5 * dim * math.log(2 * math.pi) - log_F
        return log_C_D, s

    @staticmethod
    def backward(ctx, grad_log_C_D, grad_s):
        kappa, s = ctx.saved_tensors
        grad = torch.zeros_like(kappa)
        if grad_log_C_D is not None:
            grad = grad - grad_log_C_D * kappa * s
        if grad_s is not None:
            _, s_next = VMFNormalizer.apply(kappa, ctx.dim + 2)
            grad = grad - grad_s * kappa * s * (s - s_next)
        return grad, None


# Coefficients of the polynomials u_1 .. u_4 of Debye's expansion:
# u_n(p) = p^n (c_0 + c_1 p^2 + ... + c_n p^(2n)).
DEBYE = [
    [3 / 24, -5 / 24],
    [81 / 1152, -462 / 1152, 385 / 1152],
    [30375 / 414720, -369603 / 414720, 765765 / 414720, -425425 / 414720],
    [4465125 / 39813120, -94121676 / 39813120, 349922430 / 39813120, -446185740 / 39813120,
     185910725 / 39813120],
]
DEBYE_ORDER = 40    # from this order on the expansion is good to about 1e-10


def scaled_bessel(kappa, dim):
    """log F_v(kappa) and F_(v+1)(kappa) / F_v(kappa), where F_v(x) = x^-v I_v(x), v = dim/2 - 1.

    kappa, which is the x of these formulas: float64, any shape, >= 0. The ratio is A_D(kappa) /
    kappa. Debye's uniform expansion for a large order m, with h = sqrt(m^2 + x^2), p = m/h and
    u_0 = 1, reads

        F_m(x) = exp(h) (m + h)^-m (2 pi h)^(-1/2) U,         U = sum_n u_n(p) / m^n
        F_(m+1)(x) / F_m(x) = 1/(m + h) - W / (U h^2),        W = sum_n (u_n(p)/2 + p u_n'(p)) / m^n

    The second line is (1/x) d log F_m / dx, since F_m' = x F_(m+1). The ratios of neighbours,
    ratio_j = F_j / F_(j-1), lead from the high order m down to the low order v:

        ratio_j = 1 / (2j + x^2 ratio_(j+1)),         log F_(j-1) = log F_j - log ratio_j

    The last of them, ratio_(v+1), is A_D / kappa. All terms are positive and errors of the
    ratio are damped, so both results are as good as the expansion.
    """
    v = dim / 2 - 1
    steps = max(0, math.ceil(DEBYE_ORDER - v))
    m = v + steps
    h = torch.hypot(kappa, torch.full_like(kappa, m))
    U_minus_1, W = debye_sums(m / h, m)
    log_root = 0.5 * (2 * math.pi * h).log()
    log_F = h - m * (m + h).log() - log_root + U_minus_1.log1p()
    U = 1 + U_minus_1
    ratio = 1 / (m + h) - W / (U * h.square())          # ratio_(m+1)
    for step in range(steps):
        j = m - step
        ratio = 1 / (2 * j + kappa.square() * ratio)
        log_F -= ratio.log()
    return log_F, ratio


def debye_sums(p, m):
    """U - 1 and W of `scaled_bessel`, for p of any shape.

    As polynomials U = 1 + sum_j a_j p^j and, since p^j / 2 + p (p^j)' = (j + 1/2) p^j,
    W = 1/2 + sum_j (j + 1/2) a_j p^j.
    """
    a = [0.0] * 13                                      # for p^0 .. p^12, the highest in u_4
    for n, coefficients in enumerate(DEBYE, start=1):
        for i, coefficient in enumerate(coefficients):
            a[n + 2 * i] += coefficient / m ** n
    U_minus_1 = torch.zeros_like(p)
    W = torch.zeros_like(p)
    for j in reversed(range(13)):                       # Horner's scheme
        U_minus_1.mul_(p).add_(a[j])
        W.mul_(p).add_((j + 0.5) * a[j])
    return U_minus_1, W + 0.5


# ------------------------------------------------------------------------- how a vMF is sampled
# A sample is z = cos(theta) mu + sin(theta) tangent, with a tangent that is uniform among the
# unit vectors orthogonal to mu. The angle theta is drawn by a rejection step that is exact for
# every D and kappa.
#
# The training needs to know how a sample moves with mu and kappa. If mu turns, z turns with it.
# If kappa grows, theta shrinks so as to keep its quantile. Both derivatives are given to
# autograd, so the gradient is complete. Differentiating the accepted proposal instead would
# leave a term out, because kappa also decides which proposal is accepted.


def sample_vmf(mu, kappa, num_samples, generator=None):
    """Draw S = `num_samples` unit vectors from each of B vMFs: (S, B, D).

    mu (B, D) are unit vectors with D >= 2, kappa (B,) >= 0; both get a gradient. Raises
    ValueError for other shapes, and for a concentration that is not finite.
    """
    is_batch = mu.dim() == 2 and mu.shape[1] >= 2
    if not is_batch or kappa.shape != mu.shape[:1] or num_samples < 1:
        given = f"{tuple(mu.shape)}, {tuple(kappa.shape)} and {num_samples}"
        raise ValueError("sample_vmf takes mu (B, D) with D >= 2, kappa (B,) and at least 1 "
                         f"sample, not {given}")
    return VMFSample.apply(mu, kappa, num_samples, generator)


class VMFSample(torch.autograd.Function):
    """Samples z (S, B, D) with their derivatives by mu and kappa.

    With dmu . mu = 0 and the log density l of the angle,

        dz = (z . mu) dmu - (z . dmu) mu                    mu moves: z turns with it
           + (cos(theta) z - mu) / sin(theta) dtheta        theta moves: z slides on the great
                                                            circle through mu and z

        dtheta / dkappa = -int_0^theta (cos t - A_D) exp(l(t) - l(theta)) dt
        l(t) = kappa cos t + (D-2) log sin t - log Z(kappa),        d log Z / dkappa = A_D

    (Figurnov, Mohamed, Mnih: Implicit Reparameterization Gradients, NeurIPS 2018.)
    """

    @staticmethod
    def forward(ctx, mu, kappa, num_samples, generator):
        D = mu.shape[1]
        # theta is kept, not its cosine: where kappa is large, sqrt(1 - cosine^2) has few
        # digits.
        theta = sample_angle(kappa.double().expand(num_samples, -1), D, generator)  # (S, B)
        shape = (num_samples, *mu.shape)
        z = torch.randn(shape, dtype=mu.dtype, device=mu.device, generator=generator)
        z.masked_fill_(z == 0, 1e-15)       # it happens, and at D = 2 zero has no direction

        # First a sample around the axis -sign e_1, which is the one of e_1 and -e_1 that is
        # farther from mu: cos(theta) along it, and the other coordinates of length sin(theta).
        sign = torch.where(mu[:, 0] < 0, -1.0, 1.0).to(z)                           # (B,)
        scale = theta.sin() / z[..., 1:].norm(dim=-1)
        z[..., 1:] *= scale.to(z).unsqueeze(-1)
        z[..., 0] = -sign * theta.cos()

        # Then the Householder reflection z -> z - 2 a (a . z) / ||a||^2, which takes that
        # axis to mu. With this sign, ||a||^2 = 2 (1 + |mu_1|) is never small.
        a = mu.clone()
        a[:, 0] += sign
        half_square = 1 + mu[:, :1].abs()
        z -= (z * a).sum(-1, keepdim=True) * (a / half_square)
        ctx.save_for_backward(mu, kappa, theta, z)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        mu, kappa, theta, z = ctx.saved_tensors
        cos = theta.cos()                                                           # (S, B)
        along_z = (grad * z).sum(-1)
        along_mu = (grad * mu).sum(-1)
        grad_mu = cos.to(grad).unsqueeze(-1) * grad                                 # (S, B, D)
        grad_mu = grad_mu - along_mu.unsqueeze(-1) * z
        dtheta_dkappa = angle_derivative(theta, kappa.double(), mu.shape[1])        # (S, B)
        grad_kappa = (cos * along_z - along_mu) / theta.sin() * dtheta_dkappa
        return grad_mu.sum(0), grad_kappa.sum(0).to(kappa), None, None


GAUSS_LEGENDRE = np.polynomial.legendre.leggauss(16)    # nodes and weights on [-1, 1]


def angle_derivative(theta, kappa, D):
    """dtheta / dkappa of `VMFSample`, for angles theta (S, B) and kappa (B,), both float64.

    The integral from 0 to pi vanishes, so the one from 0 to theta is minus the one from theta
    to pi. The integral is taken over the side of theta on which cos t - A_D keeps one sign, so
    that nothing cancels:

        dtheta / dkappa = -int |cos t - A_D| exp(l(t) - l(theta)) dt

    from theta to pi where cos(theta) < A_D, else from 0 to theta. It is computed by
    Gauss-Legendre over ten standard deviations, or up to the pole; 16 nodes give it to about
    1e-8. A deviation is (-l'')^(-1/2) at the mode of the angle, where l'' = -sqrt((D-2)^2 + 4
    kappa^2).
    """
    cos_theta = theta.cos()
    A_D = mean_resultant_length(kappa, D)                               # (B,)
    outward = cos_theta < A_D                                           # (S, B)
    to_pole = torch.where(outward, math.pi - theta, theta)
    deviation = ((D - 2) ** 2 + 4 * kappa ** 2) ** -0.25
    span = to_pole.minimum(10 * deviation)
    signed_span = torch.where(outward, span, -span)

    nodes, weights = (torch.from_numpy(array).to(theta) for array in GAUSS_LEGENDRE)
    step = signed_span.unsqueeze(-1) * (nodes + 1) / 2
    t = theta.unsqueeze(-1) + step                                      # (S, B, 16)
    cos_t = t.cos()
    cos_difference = cos_t - cos_theta.unsqueeze(-1)
    log_sine_ratio = (t.sin() / theta.sin().unsqueeze(-1)).log()
    l_difference = kappa.unsqueeze(-1) * cos_difference + (D - 2) * log_sine_ratio
    integrand = (cos_t - A_D.unsqueeze(-1)).abs() * l_difference.exp()
    return -(integrand @ (weights / 2)) * span


def sample_angle(kappa, D, generator):
    """Angles theta between samples and mean direction, one for each kappa, of any shape.

    This is the rejection step of Wood (Simulation of the von Mises Fisher distribution, 1994),
    written in t = tan(theta/2)^2, where no harmful cancellation is left. He proposes

        t = b y,        b = (D-1) / (2 kappa + sqrt(4 kappa^2 + (D-1)^2))
                        y = beta / (1 - beta),    beta ~ Beta((D-1)/2, (D-1)/2)

    With w = cos(theta) = (1-t) / (1+t) and x0 = (1-b) / (1+b) it is accepted if

        log u <= kappa (w - x0) + (D-1) log((1 - x0 w) / (1 - x0^2)),       u uniform in [0, 1)

    At least 65 % of the proposals are accepted, for every D and kappa.
    """
    kappa_flat = kappa.reshape(-1)
    theta = torch.full_like(kappa_flat, math.nan)
    pending = torch.arange(len(kappa_flat), device=kappa.device)
    # Eight proposals at once for each pending sample. One or two rounds are enough; if a
    # hundred are not, a kappa is not finite.
    for _ in range(100):
        k = kappa_flat[pending]
        root = (4 * k ** 2 + (D - 1) ** 2).sqrt()
        b = (D - 1) / (2 * k + root)
        shape = (3, 8, len(pending))
        u0, u1, u = torch.rand(shape, dtype=k.dtype, device=k.device, generator=generator)
        y = beta_ratio(u0, u1, D)                                       # (8, pending)
        t = b * y
        w_minus_x0 = 2 * (b - t) / ((1 + t) * (1 + b))
        ratio = (1 + y) * (1 + b) / (2 * (1 + t))               # (1 - x0 w) / (1 - x0^2)
        log_accept = k * w_minus_x0 + (D - 1) * ratio.log()
        accepted = u.log() <= log_accept
        done = accepted.any(0)
        first = accepted.byte().argmax(0, keepdim=True)                 # the first accepted one
        t_first = t.gather(0, first)[0]                                             # (pending,)
        theta[pending[done]] = 2 * t_first[done].sqrt().atan()
        pending = pending[~done]
        if not len(pending):
            return theta.view(kappa.shape)
    raise ValueError("kappa holds a concentration that is not a finite number, so no sample can "
                     "be drawn: if this happens in training, lower the learning rates")


def beta_ratio(u0, u1, D):
    """y = beta / (1 - beta) with beta ~ Beta((D-1)/2, (D-1)/2), from two uniform numbers.

    y = exp(2 asinh x), where sqrt(D-1) x follows Student's t with D-1 degrees of freedom
    (Bailey, Polar Generation of Random Variates with the t-Distribution, 1994).
    """
    log_u = (-u0).log1p()                               # log(1 - u0): 1 - u0 is never 0
    radius = (-2 / (D - 1) * log_u).expm1().sqrt()
    x = radius * (2 * math.pi * u1).cos()
    return (2 * x.asinh()).exp()


# ---------------------------------------------------------------------------------- the settings
# The defaults of options that are not given. A run takes one row:
#
# OFFICIAL, by data set and D, for EL-nivMF with a pretrained network. Other data sets use CUB's
# row; D <= 128 takes the row of 128, a larger D that of 512. The published results have --form
# official and --proxyanchor_weight 3, 5, 0.3 and 0.1, in this order.
#
# ABLATION, by metric and proxy, for all other cells: the official ablation on CUB, D = 512.
# Cells that it lacks borrow their metric's row. No run takes its elk/nivmf row, as OFFICIAL
# comes first: pass its values as options.
#
# SCRATCH, by metric and proxy, for a network that starts from nothing (--weights none). Its
# rows were found on validation classes: RESULTS.md.
#
# lr is the rate of backbone and embedding layer. Adam moves a number by about its rate: in the
# official runs T starts at 0.003 and moves by 0.002 a step, and a proxy of length 18 in 512
# dimensions turns by 3.6 degrees. After each of the epochs in lr_steps, all rates are
# multiplied by lr_gamma. norm_multiplier scales the embedding layer's first weights. There is no
# warm-up.

COLUMNS = (
    "epochs", "batch_size", "lr", "lr_steps", "lr_gamma",
    "proxy_lr", "concentration_lr", "temperature_lr",
    "temperature", "concentration_init", "norm_multiplier", "samples",
)
# The rows have COLUMNS' three groups: 5, 3 and 4 values.
OFFICIAL = {
    "cub200/128":    (250, 64,  1e-5, [25, 50],   0.3, 0.05,  0.2,   0.002,   0.003, 6,   30,  5),
    "cub200/512":    (250, 64,  1e-5, [31],       0.1, 0.05,  0.2,   0.002,   0.003, 18,  50,  5),
    "cars196/128":   (300, 64,  1e-5, [60, 80],   0.1, 0.075, 0.075, 0.002,   0.003, 9,   12,  5),
    "cars196/512":   (300, 64,  1e-5, [105, 170], 0.2, 0.05,  0.2,   0.002,   0.003, 22,  10,  5),
}
ABLATION = {
    "elk/nivmf":     (50,  106, 1e-5, [],         0.1, 0.05,  0.5,   0.005,   1.0,   50,  150, 10),
    "elk/vmf":       (50,  106, 1e-5, [],         0.1, 0.05,  0.5,   0.005,   1.0,   10,  150, 10),
    "bhattacharyya": (50,  106, 1e-5, [],         0.1, 0.05,  0.5,   0.005,   1.0,   10,  150, 10),
    "kl":            (50,  106, 1e-5, [],         0.1, 0.05,  0.5,   0.005,   1.0,   10,  150, 10),
    "loglik":        (50,  106, 1e-5, [],         0.1, 0.05,  0.5,   0.005,   1/32,  10,  1,   10),
    "cosine":        (50,  106, 1e-5, [],         0.1, 0.05,  0.5,   0.005,   1/256, 10,  1,   10),
    "l2":            (50,  106, 1e-5, [],         0.1, 0.05,  0.5,   0.005,   1.0,   200, 1,   10),
}
SCRATCH = {
    "elk":           (15,  90,  1e-3, [10, 13],   0.3, 0.1,   0.2,   0.001,   0.1,   10,  40,  200),
    "bhattacharyya": (15,  90,  1e-3, [10, 13],   0.3, 0.1,   0.2,   0.001,   0.1,   10,  40,  200),
    "kl/nivmf":      (15,  90,  1e-3, [10, 13],   0.3, 0.1,   0.2,   0.001,   0.1,   10,  10,  200),
    "kl/vmf":        (15,  90,  1e-3, [10, 13],   0.3, 0.1,   0.2,   0.001,   0.1,   10,  40,  200),
    "loglik/nivmf":  (15,  90,  1e-3, [10, 13],   0.3, 0.3,   0.6,   0.003,   0.3,   30,  10,  200),
    "loglik/vmf":    (15,  90,  1e-3, [10, 13],   0.3, 0.1,   0.2,   0.01,    1.0,   10,  10,  200),
    "cosine":        (15,  90,  1e-3, [10, 13],   0.3, 0.1,   0.2,   0.00125, 1/8,   10,  10,  200),
    "l2":            (15,  90,  1e-3, [10, 13],   0.3, 0.01,  0.01,  0.02,    5.0,   15,  3,   200),
}


# Options that mean nothing to a kind of proxy, or to a metric.
UNUSED = {
    "vmf": ("form", "samples"),
    "loglik": ("samples",),
    "cosine": ("concentration_lr",),
}


def preset(args):
    """The row of a run, as a dictionary, with the kind of proxy and the form it takes."""
    import common

    proxy = args.proxy
    if proxy is None:
        proxy = "vmf" if args.metric in ("cosine", "l2") else "nivmf"
    cell = f"{args.metric}/{proxy}"
    for word in (proxy, args.metric):
        common.refuse(args, UNUSED.get(word, ()), f"--metric {args.metric} --proxy {proxy}")
    if args.weights == "none":
        row = SCRATCH.get(cell) or SCRATCH[args.metric]
    elif cell == "elk/nivmf":
        dim = 512 if args.embed_dim > 128 else 128
        row = OFFICIAL.get(f"{args.dataset}/{dim}") or OFFICIAL[f"cub200/{dim}"]
    else:
        row = ABLATION.get(cell) or ABLATION[args.metric]
    settings = dict(zip(COLUMNS, row))
    return {**settings, "warmup": 0, "proxy": proxy, "form": args.form or "exact"}


def make_parser():
    # Not imported at the top, so that the losses can be borrowed without it.
    import common

    parser = common.parser(__doc__)
    add = parser.add_argument_group("EL-nivMF").add_argument
    number = common.positive(float)
    add("--metric", choices=SIMILARITIES, default="elk",
        help="How images and classes are compared. Default: elk.")
    add("--proxy", choices=("nivmf", "vmf"),
        help="The classes' distributions. Default: nivmf; for cosine and l2, which know no "
             "concentration, vmf.")
    add("--form", choices=FORMS,
        help="Formulas of nivMF proxies: exact is the density. official is what the official code "
             "has in EL-nivMF and in the log-likelihood; bhattacharyya and kl take EL-nivMF's. "
             "Default: exact.")
    add("--proxyanchor_weight", type=common.not_negative(float), default=0.0,
        help="Weight g of ProxyAnchor, which is added to the loss. The published runs have 3 and 5 "
             "on CUB for D = 128 and 512, 0.3 and 0.1 on Cars. Default: 0.")
    add("--proxy_lr", type=common.learning_rate,
        help="Learning rate of the proxies. Default: the preset's.")
    add("--concentration_lr", type=common.learning_rate,
        help="Learning rate of the classes' concentrations. Default: the preset's.")
    add("--temperature_lr", type=common.learning_rate,
        help="Learning rate of T. Default: the preset's.")
    add("--temperature", type=number,
        help="First value of T, the temperature of the softmax. Default: the preset's.")
    add("--concentration_init", type=number,
        help="First concentrations, and length of the stored proxies. Default: the preset's.")
    add("--norm_multiplier", type=number,
        help="Factor on the embedding layer's first weights, as an embedding's norm is its "
             "concentration. Default: the preset's.")
    add("--samples", type=common.positive(int),
        help="S, the Monte-Carlo samples of each image. Default: the preset's.")
    return parser


def main(argv=None):
    import common

    # Constants without an option: --help shows them, args.json keeps them.
    def fixed(args):
        floors = {"min_concentration": MIN_CONCENTRATION, "min_temperature": MIN_TEMPERATURE}
        return {**floors, **common.defaults(nir.ProxyAnchor)}

    args = common.parse(make_parser(), preset, argv, fixed)

    def make_criterion(num_classes):
        proxies = ProbabilisticProxies(
            num_classes,
            args.embed_dim,
            metric=args.metric,
            proxy=args.proxy,
            form=args.form,
            samples=args.samples,
            temperature=args.temperature,
            concentration_init=args.concentration_init,
        )
        return Criterion(proxies, args.proxyanchor_weight, args.proxy_lr, args.concentration_lr,
                         args.temperature_lr)

    # Made once now, so that options that do not fit are named before data is read.
    common.check_options(make_criterion)
    name = f"{args.dataset}-{args.metric}-{args.proxy}"
    if args.proxy == "nivmf":
        name += f"-{args.form}"
    if args.proxyanchor_weight:
        name += f"-g{args.proxyanchor_weight:g}"
    common.train(args, make_criterion, f"{name}-seed{args.seed}")


if __name__ == "__main__":
    import common

    common.command(main)
