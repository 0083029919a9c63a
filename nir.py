"""NIR: Non-isotropy Regularization for Proxy-based Deep Metric Learning.

The paper is by Roth, Vinyals and Akata (CVPR 2022).

A proxy loss sees an embedding psi only through its distances to the class proxies rho.
Embeddings at the same distance from their proxy get the same loss from it, so nothing gives
a class an inner structure: it becomes isotropic. NIR asks for more. Given the proxy,
psi = tau(zeta | rho) has to be an invertible function of a residual zeta, and zeta has to be
standard normal. tau is a conditional normalising flow. The regulariser is the flow's negative
log-likelihood, which is, up to a constant,

    L_NIR = mean_i (0.5 ||zeta_i||^2 - log|det J_i|),        zeta_i = tau^-1(psi_i | rho_y)

It is added to any proxy loss, and needs no pairs of samples. The official code minimises
mean_i exp(...) of the same terms instead: see the class `NIR`.

In reading order: precision; three proxy losses; the flow; the proxy loss with NIR; checks; the
settings; main.

    python nir.py --dataset toy                          built-in characters, minutes on a laptop
    python nir.py --dataset cub200 --loss proxyanchor    the official run: ResNet50, a GPU
    python nir.py --dataset cub200 --nir_weight 0        the official baseline without NIR

    paper         name in the code
    psi           `embeddings` (B, D) before they are L2-normalised, `psi` afterwards
    rho           `proxies` (C, D), in SoftTriple (C, K, D); `rho` (B, D), the normalised proxy of
                  each sample's class y, which is in `labels` (B,)
    tau           `GlowFlow.inverse`; tau^-1 is `GlowFlow.forward`
    zeta          `zeta` (B, D), the residual
    log|det J|    `log_det` (B,), where J is the Jacobian of tau^-1
    p(psi | rho)  `GlowFlow.log_prob`, its logarithm
    L_NIR         `NIR.nir`

One step of the training, as `common.train_one_epoch` runs it. `network` is a backbone and one
linear layer, `criterion` an instance of `NIR`, `optimizer` one Adam over network, proxies and
flow. L_NIR has a gradient for network, proxies and flow.

    embeddings = network(images)                        # (B, D), not normalised
    losses = criterion.losses(embeddings, labels)       # {"proxy": scalar, "nir": scalar}
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
"""
import functools
import math
import os

# Set before torch is imported: idle OpenMP threads sleep instead of slowing other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------------- precision
# A decorator, so it comes first.


def full_precision(function):
    """Make a function, or a method of a module, compute in float32 at least, even under autocast.

    If an argument or a parameter of the module is float64, all of them are cast to it.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        module = args[0] if args and isinstance(args[0], nn.Module) else nn.Module()
        parameters = dict(module.named_parameters())
        given = [*args, *kwargs.values(), *parameters.values()]
        floats = [x for x in given if torch.is_tensor(x) and x.is_floating_point()]
        dtype = torch.float32
        for x in floats:
            dtype = torch.promote_types(dtype, x.dtype)

        def full(x):
            return x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x

        args = [full(x) for x in args]
        kwargs = {name: full(x) for name, x in kwargs.items()}
        device = floats[0].device.type if floats else "cpu"
        with torch.autocast(device, enabled=False):
            if all(x.dtype == dtype for x in parameters.values()):
                return function(*args, **kwargs)
            # The parameters are replaced for the time of the call.
            replaced = {f"module.{name}": full(x) for name, x in parameters.items()}
            method = Method(module, function)
            return torch.func.functional_call(method, replaced, tuple(args[1:]), kwargs)

    return wrapped


class Method(nn.Module):
    """A method of a module, as a module of its own: functional_call calls nothing else."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args, **kwargs):
        return self.function(self.module, *args, **kwargs)


# ------------------------------------------------------------------------------ the proxy losses
# Each holds learnable `proxies`, one for each class (SoftTriple: several). It takes embeddings
# (B, D) and labels (B,) in 0 .. C-1, and gives the loss, a scalar. Embeddings and proxies are
# normalised inside: s = psi . rho is their cosine.


def initial_proxies(*shape):
    """Proxies start at N(0, 1/64), that is with a deviation of 1/8."""
    return nn.Parameter(torch.randn(shape) / 8)


@full_precision
def cosines(embeddings, proxies):
    """s, the cosine of every embedding and every proxy: (B, D) and (C, D) -> (B, C)."""
    return F.normalize(embeddings) @ F.normalize(proxies).T


class ProxyNCA(nn.Module):
    """Softmax cross-entropy over the distances to all proxies, the sample's own included.

        L = mean_i -log( exp(-||psi_i - rho_y||^2 / T) / sum_c exp(-||psi_i - rho_c||^2 / T) )

    This is the form of ProxyNCA++ (Teh, DeVries, Taylor, ECCV 2020).
    """

    def __init__(self, num_classes, dim, temperature=1 / 9):
        super().__init__()
        check_positive("temperature", temperature)
        self.proxies = initial_proxies(num_classes, dim)
        self.temperature = temperature

    @full_precision
    def forward(self, embeddings, labels):
        labels = check_batch(embeddings, labels, *self.proxies.shape)
        s = cosines(embeddings, self.proxies)           # (B, C)
        squared_distance = 2 - 2 * s                    # of unit vectors
        return F.cross_entropy(-squared_distance / self.temperature, labels)


class ProxyAnchor(nn.Module):
    """Proxies as anchors: each pulls its positives and pushes its negatives away.

    Those count most that are hardest: the farthest positives and the nearest negatives.

        L = 1/|P+| sum_{c in P+} log(1 + sum_{i of class c}     exp(-alpha (s_ic - margin)))
          + 1/C    sum_c         log(1 + sum_{i not of class c} exp( alpha (s_ic + margin)))

    P+ are the proxies with a positive in the batch. From "Proxy Anchor Loss for Deep
    Metric Learning" (Kim, Kim, Cho, Kwak, CVPR 2020).
    """

    def __init__(self, num_classes, dim, margin=0.1, alpha=32.0):
        super().__init__()
        check_positive("alpha", alpha)
        self.proxies = initial_proxies(num_classes, dim)
        self.margin, self.alpha = margin, alpha

    @full_precision
    def forward(self, embeddings, labels):
        labels = check_batch(embeddings, labels, *self.proxies.shape)
        num_classes = len(self.proxies)
        s = cosines(embeddings, self.proxies)           # (B, C)
        positive = F.one_hot(labels, num_classes).bool()

        # log(1 + sum exp) is softplus(logsumexp), which cannot overflow. What does not belong
        # to a sum gets the lowest finite number: the logsumexp of -inf alone has no gradient.
        lowest = torch.finfo(s.dtype).min
        pull = -self.alpha * (s - self.margin)
        push = self.alpha * (s + self.margin)
        positive_sums = pull.masked_fill(~positive, lowest).logsumexp(0)    # (B, C) -> (C,)
        negative_sums = push.masked_fill(positive, lowest).logsumexp(0)     # (B, C) -> (C,)

        # A proxy without a positive adds softplus(lowest) = 0 to the first term.
        num_with_positive = positive.any(0).sum()
        positive_term = F.softplus(positive_sums).sum() / num_with_positive
        negative_term = F.softplus(negative_sums).mean()
        return positive_term + negative_term


class SoftTriple(nn.Module):
    """Softmax cross-entropy where each class has several centres, and a sample softly chooses one.

        s_ick = psi_i . w_ck                            w_ck are the K centres of class c
        S_ic  = sum_k softmax_k(s_ick / gamma) s_ick    the similarity of sample i and class c
        L     = mean_i -log( exp(la (S_iy - margin)) /
                             (exp(la (S_iy - margin)) + sum_{c != y} exp(la S_ic)) )
              + tau / (C K (K - 1)) sum_c sum_{k < l} ||w_ck - w_cl||

    The last term merges centres that a class does not need; tau is here its weight, not the
    flow; la is the paper's lambda. From "SoftTriple Loss: Deep Metric Learning Without Triplet
    Sampling" (Qian et al., ICCV 2019).
    """

    def __init__(self, num_classes, dim, centers=10, la=20.0, gamma=0.1, margin=0.01, tau=0.2):
        super().__init__()
        check_at_least("centers", centers, 1)
        check_positive("la", la)
        check_positive("gamma", gamma)
        check_at_least("tau", tau, 0)
        self.proxies = initial_proxies(num_classes, centers, dim)
        self.la, self.gamma = la, gamma
        self.margin, self.tau = margin, tau

    @full_precision
    def forward(self, embeddings, labels):
        C, K, D = self.proxies.shape
        labels = check_batch(embeddings, labels, C, D)
        w = F.normalize(self.proxies, dim=-1)           # (C, K, D)
        s = F.normalize(embeddings) @ w.view(C * K, D).T
        s = s.view(-1, C, K)                            # (B, C K) -> (B, C, K)
        center_weights = F.softmax(s / self.gamma, dim=2)
        S = (center_weights * s).sum(2)                 # (B, C, K) -> (B, C)

        own_class = F.one_hot(labels, C).to(S)          # (B, C)
        logits = self.la * (S - self.margin * own_class)
        loss = F.cross_entropy(logits, labels)
        if self.tau and K > 1:
            loss = loss + self.tau * self.merging_term(w)
        return loss

    @staticmethod
    def merging_term(w):
        """1 / (C K (K - 1)) sum_c sum_{k < l} ||w_ck - w_cl|| of unit vectors w (C, K, D)."""
        C, K, _ = w.shape
        cosine = w @ w.mT                               # (C, K, K)
        first, second = torch.triu_indices(K, K, offset=1, device=w.device)
        squared = 2 - 2 * cosine[:, first, second]      # (C, K (K - 1) / 2)
        # The slope of the square root is infinite at 0, where two centres have merged.
        distance = squared.clamp(min=1e-5).sqrt()
        return distance.sum() / (C * K * (K - 1))


LOSSES = {"proxynca": ProxyNCA, "proxyanchor": ProxyAnchor, "softtriple": SoftTriple}


# -------------------------------------------------------------------------------------- the flow


class Coupling(nn.Module):
    """One invertible block: a fixed permutation, then GLOW's affine coupling, given a condition.

    The permuted input is cut in halves x1, x2. First x1 is scaled and shifted by what a small
    network makes of x2 and the condition, then x2 by what another makes of the new y1:

        y1 = exp(s2) * x1 + t2    with (raw2, t2) = subnet2(x2, cond)
        y2 = exp(s1) * x2 + t1    with (raw1, t1) = subnet1(y1, cond)

    The soft clamp s = clamp * 0.636 * atan(raw) keeps each scale within exp(+-clamp); 0.636 is
    the official code's 2 / pi. Each of the two lines has a triangular Jacobian, so log|det J|
    is the sum of all s1 and s2.

    After Glow (Kingma, Dhariwal, NeurIPS 2018), which changes one half in each block. A fixed
    random permutation takes the place of its 1x1 convolution, and there is no actnorm.
    """

    def __init__(self, dim, cond_dim, depth, width, clamp, seed):
        super().__init__()
        self.clamp = clamp
        order = np.random.RandomState(seed).permutation(dim)    # as in the official code
        self.register_buffer("permutation", torch.from_numpy(order))
        self.register_buffer("undo", self.permutation.argsort())

        half1 = dim // 2
        half2 = dim - half1
        self.halves = (half1, half2)
        self.subnet1 = self.make_subnet(half1 + cond_dim, 2 * half2, depth, width)
        self.subnet2 = self.make_subnet(half2 + cond_dim, 2 * half1, depth, width)

    @staticmethod
    def make_subnet(size_in, size_out, depth, width):
        """`depth` linear layers, with ReLU and `width` units between them."""
        sizes = [size_in] + [width] * (depth - 1) + [size_out]
        layers = []
        for before, after in zip(sizes, sizes[1:]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])              # no ReLU behind the last layer

    def scale_shift(self, subnet, x, cond):
        """Log-scale s and shift t for one half, from the other half x and the condition."""
        out = subnet(torch.cat([x, cond], dim=1))
        raw, t = out.chunk(2, dim=1)
        s = self.clamp * 0.636 * torch.atan(raw)
        return s, t

    def forward(self, x, cond):
        """x (B, dim), cond (B, cond_dim) -> y (B, dim), log|det J| (B,)."""
        x1, x2 = x[:, self.permutation].split(self.halves, dim=1)
        s2, t2 = self.scale_shift(self.subnet2, x2, cond)
        y1 = s2.exp() * x1 + t2
        s1, t1 = self.scale_shift(self.subnet1, y1, cond)
        y2 = s1.exp() * x2 + t1
        log_det = s1.sum(1) + s2.sum(1)
        return torch.cat([y1, y2], dim=1), log_det

    def inverse(self, y, cond):
        """The same steps undone in reverse order: y (B, dim), cond (B, cond_dim) -> x (B, dim)."""
        y1, y2 = y.split(self.halves, dim=1)
        s1, t1 = self.scale_shift(self.subnet1, y1, cond)
        x2 = (y2 - t1) * (-s1).exp()
        s2, t2 = self.scale_shift(self.subnet2, x2, cond)
        x1 = (y1 - t2) * (-s2).exp()
        x = torch.cat([x1, x2], dim=1)
        return x[:, self.undo]


class GlowFlow(nn.Module):
    """The flow tau, which maps residuals zeta to embeddings psi, given the proxy rho.

    The training needs only tau^-1, so that is `forward`. A stack of `num_blocks` couplings. psi
    and zeta are (B, dim), rho is (B, cond_dim). Raises ValueError for a dim below 2.
    """

    def __init__(self, dim, cond_dim, num_blocks=5, depth=8, width=128, clamp=2.0):
        super().__init__()
        if dim < 2:
            # common.check_options prints the first word, dim, as the option --embed_dim.
            raise ValueError(
                f"dim {dim} is too small: a coupling flow needs at least two dimensions to split"
            )
        check_at_least("num_blocks", num_blocks, 1)
        check_at_least("depth", depth, 1)
        check_at_least("width", width, 1)
        self.dim = dim
        self.blocks = nn.ModuleList()
        for i in range(num_blocks):
            self.blocks.append(Coupling(dim, cond_dim, depth, width, clamp, seed=i))

    @full_precision
    def forward(self, psi, rho):
        """psi, rho -> zeta = tau^-1(psi | rho) (B, dim), log|det J| (B,)."""
        if psi.shape[1:] != (self.dim,):
            raise ValueError(f"psi must be (B, {self.dim}), not {tuple(psi.shape)}")
        zeta = psi
        log_det = psi.new_zeros(len(psi))
        for block in self.blocks:
            zeta, block_log_det = block(zeta, rho)
            log_det = log_det + block_log_det
        return zeta, log_det

    @full_precision
    def inverse(self, zeta, rho):
        """zeta, rho -> psi = tau(zeta | rho) (B, dim)."""
        psi = zeta
        for block in reversed(self.blocks):
            psi = block.inverse(psi, rho)
        return psi

    def log_prob(self, psi, rho):
        """log p(psi | rho) (B,), a density over R^dim, by change of variables.

            log p(psi | rho) = log N(zeta; 0, I) + log|det J|
        """
        zeta, log_det = self(psi, rho)
        D = zeta.shape[1]
        log_constant = 0.5 * D * math.log(2 * math.pi)
        log_normal = -0.5 * zeta.square().sum(1) - log_constant
        return log_normal + log_det


# ---------------------------------------------------------------------- the proxy loss with NIR

FORMS = ("nll", "exp")


class NIR(nn.Module):
    """A proxy loss with the NIR term: proxy_weight * L_proxy + nir_weight * L_NIR.

    `form` chooses L_NIR, where nll_i = -log p(psi_i | rho_y):

        "nll", the project page's     mean_i nll_i
        "exp", the official code's    mean_i exp(0.5 ||zeta_i||^2 - log|det J_i|)

    The exponent is nll_i without its constant D/2 log 2 pi.

    Embeddings lie on the unit sphere, which has no volume in R^D: the density there can grow
    without bound, so "nll" keeps pulling for as long as it is trained. With "exp" the gradient
    of each sample is that of nll_i times (2 pi)^(-D/2) / p(psi_i | rho_y). Where the flow fits,
    p is large and the gradient nearly zero, like that of a satisfied hinge.

    psi and rho are L2-normalised. With several centres for each class, rho is the one nearest
    to psi.

    proxy_lr and flow_lr are the learning rates of proxies and flow, see `param_groups`.
    """

    def __init__(self, proxy_loss, dim, form="nll", nir_weight=1.0, proxy_weight=1.0,
                 proxy_lr=0.04, flow_lr=5e-4):
        super().__init__()
        check_choice("form", form, FORMS)
        check_at_least("nir_weight", nir_weight, 0)
        check_at_least("proxy_weight", proxy_weight, 0)
        self.proxy_loss = proxy_loss
        self.form = form
        self.nir_weight, self.proxy_weight = nir_weight, proxy_weight
        self.proxy_lr, self.flow_lr = proxy_lr, flow_lr
        # nir_weight 0 is the baseline: no flow.
        self.flow = GlowFlow(dim, cond_dim=dim) if nir_weight else None

    @full_precision
    def nir(self, embeddings, labels):
        """L_NIR, a scalar, of embeddings (B, D) and labels (B,)."""
        psi = F.normalize(embeddings)
        rho = self.own_proxies(psi, labels)
        if self.form == "nll":
            return -self.flow.log_prob(psi, rho).mean()
        zeta, log_det = self.flow(psi, rho)
        exponent = 0.5 * zeta.square().sum(1) - log_det
        return exponent.exp().mean()

    def own_proxies(self, psi, labels):
        """rho (B, D), the normalised proxy of each sample's class: the nearest, if several."""
        proxies = self.proxy_loss.proxies
        labels = check_batch(psi, labels, len(proxies), proxies.shape[-1])
        rho = F.normalize(proxies, dim=-1)[labels]
        if rho.dim() == 2:
            return rho
        cosine = (rho @ psi.unsqueeze(2)).squeeze(2)                    # (B, K)
        nearest = cosine.argmax(1)
        every_row = torch.arange(len(rho), device=rho.device)
        return rho[every_row, nearest]                                  # (B, K, D) -> (B, D)

    def losses(self, embeddings, labels):
        """The weighted losses, {name: scalar}, whose sum is minimised; no "nir" without a flow."""
        weighted = {"proxy": self.proxy_weight * self.proxy_loss(embeddings, labels)}
        if self.flow is not None:
            weighted["nir"] = self.nir_weight * self.nir(embeddings, labels)
        return weighted

    def param_groups(self):
        """Groups for Adam: proxies and flow, each with its learning rate, without weight decay."""
        groups = [{"params": list(self.proxy_loss.parameters()), "lr": self.proxy_lr}]
        if self.flow is not None:
            groups.append({"params": list(self.flow.parameters()), "lr": self.flow_lr})
        return groups

    @full_precision
    def diagnostics(self, embeddings, labels):
        """How tight the batch's classes are, for the log: two mean cosines as {name: float}.

        own_proxy_cosine: between an embedding and the proxy of its class, the nearest if there
        are several. class_cosine: between two embeddings of a class. embeddings (B, D) come
        detached.
        """
        psi = F.normalize(embeddings)
        rho = self.own_proxies(psi, labels).detach()
        proxy_cosine = (psi * rho).sum(1)                               # (B,)

        cosine = psi @ psi.T                                            # (B, B)
        same_class = labels.unsqueeze(0) == labels.unsqueeze(1)
        pairs = same_class.triu(diagonal=1)                             # each pair once
        return {
            "own_proxy_cosine": float(proxy_cosine.mean()),
            "class_cosine": float(cosine[pairs].mean()),
        }


# ------------------------------------------------------------------------------------ the checks
# Shared with prob_dml.py and objectives.py. Each raises an error of one sentence.


def check_batch(embeddings, labels, num_classes=None, dim=None):
    """Check embeddings (B, D) and labels (B,) of any integer type; return the labels as int64.

    As they are, uint8 labels would index like a mask. Raises TypeError for other things than
    tensors, and for embeddings that are not floats; ValueError for other shapes, for labels
    that are not integers, and on the CPU for labels outside 0 .. C-1. On a GPU, looking at them
    would wait for the device in every step: there they become C, at which the kernels stop.
    """
    if not (torch.is_tensor(embeddings) and torch.is_tensor(labels)):
        raise TypeError("embeddings and labels must be tensors: use torch.from_numpy on arrays")
    if not embeddings.is_floating_point():
        raise TypeError(f"embeddings must be floats, not {embeddings.dtype}")
    fits = embeddings.dim() == 2 and dim in (None, embeddings.shape[1])
    if not fits or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"embeddings must be (B, {dim or 'D'}) and labels (B,), not "
                         f"{tuple(embeddings.shape)} and {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, not {labels.dtype}: use labels.long()")
    labels = labels.long()
    if num_classes is None:
        return labels
    outside = (labels < 0) | (labels >= num_classes)
    if outside.is_cpu and outside.any():
        raise ValueError(f"labels must lie in 0 .. {num_classes - 1}, not {labels.min()} .. "
                         f"{labels.max()}")
    # As it is, -1 would count from the end, and cross_entropy would leave out -100.
    return labels.masked_fill(outside, num_classes)


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_at_least(name, value, least, below=math.inf):
    if not least <= value < below:
        limit = f" and below {below:.4g}" if below < math.inf else ""
        raise ValueError(f"{name} must be at least {least}{limit}, not {value}")


def check_positive(name, value):
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, not {value}")


# ---------------------------------------------------------------------------------- the settings
# The defaults of options that are not given: one row for each kind of run, whatever D is.
#
# The first six rows are the official settings, for a pretrained network. `scratch` and `toy`
# are for a network that starts from nothing (--weights none), and were found on validation
# classes: RESULTS.md.
#
# lr is the rate of backbone and embedding layer. The backbone is not trained in the first
# `warmup` epochs. After each of the epochs in lr_steps, all rates are multiplied by lr_gamma.
# proxy_weight is the official code's w: it scales the proxy loss, not NIR.

COLUMNS = (
    "epochs", "batch_size", "lr", "lr_steps", "lr_gamma", "warmup",
    "proxy_lr", "flow_lr", "proxy_weight", "nir_form", "nir_weight",
)
SETTINGS = {
    #                    epochs   lr    lr_steps         warmup   flow_lr     nir_form
    #                         batch_size           lr_gamma proxy_lr  proxy_weight   nir_weight
    "cub200":           (100, 90, 1e-5, [],         0.1, 1, 0.04, 5e-4, 0.0075, "exp", 1.0),
    "cars196":          (100, 90, 1e-5, [],         0.1, 1, 0.04, 5e-4, 0.01,   "exp", 1.0),
    "sop":              (300, 90, 1e-5, [140, 230], 0.2, 5, 0.04, 1e-5, 0.3,    "exp", 1.0),
    # With --nir_weight 0, which overrides the 1.0. There is no flow: flow_lr and NIR's columns are
    # not used.
    "cub200 baseline":  (100, 90, 1e-5, [],         0.1, 0, 0.02, 5e-4, 1.0,    "exp", 1.0),
    "cars196 baseline": (100, 90, 1e-5, [],         0.1, 0, 0.02, 5e-4, 1.0,    "exp", 1.0),
    "sop baseline":     (300, 90, 1e-5, [140, 230], 0.2, 0, 0.02, 1e-5, 1.0,    "exp", 1.0),
    "scratch":          (15,  90, 1e-3, [10, 13],   0.3, 0, 0.01, 1e-3, 1.0,    "nll", 0.01),
    "toy":              (15,  90, 1e-3, [10, 13],   0.3, 0, 0.01, 1e-3, 1.0,    "nll", 0.003),
}


def preset(args):
    """The row of SETTINGS for a run, as a dictionary. A data set of one's own uses CUB's.

    args.weights is "none" by default for conv4, which is toy's network.
    """
    if args.nir_weight == 0:
        import common

        common.refuse(args, ("nir_form", "flow_lr"), "--nir_weight 0, which has no flow")
    if args.weights == "none":
        run = "toy" if args.dataset == "toy" else "scratch"
    else:
        run = args.dataset if args.dataset in ("cars196", "sop") else "cub200"
        if args.nir_weight == 0:
            run += " baseline"
    return dict(zip(COLUMNS, SETTINGS[run]))


def make_parser():
    # Not imported at the top, so that the losses and the flow can be borrowed without it.
    import common

    parser = common.parser(__doc__)
    add = parser.add_argument_group("proxy loss and NIR").add_argument
    not_negative = common.not_negative(float)
    add("--loss", choices=LOSSES, default="proxyanchor",
        help="The proxy loss. Default: proxyanchor.")
    add("--nir_form", choices=FORMS,
        help="The NIR term: nll is the project page's, exp the official code's. Default: the "
             "preset's.")
    add("--nir_weight", type=not_negative,
        help="Weight of the NIR term; 0 is the baseline without NIR. Default: the preset's.")
    add("--proxy_weight", type=not_negative,
        help="Weight of the proxy loss. Default: the preset's.")
    add("--proxy_lr", type=common.learning_rate,
        help="Learning rate of the proxies. Default: the preset's.")
    add("--flow_lr", type=common.learning_rate,
        help="Learning rate of the flow. Default: the preset's.")
    return parser


def main(argv=None):
    import common

    # Constructor arguments without an option: --help shows them, args.json keeps them.
    def fixed(args):
        return common.defaults(LOSSES[args.loss], GlowFlow)

    args = common.parse(make_parser(), preset, argv, fixed)

    def make_criterion(num_classes):
        check_choice("loss", args.loss, LOSSES)         # a resumed run's may be somebody's own
        return NIR(
            LOSSES[args.loss](num_classes, args.embed_dim),
            args.embed_dim,
            form=args.nir_form,
            nir_weight=args.nir_weight,
            proxy_weight=args.proxy_weight,
            proxy_lr=args.proxy_lr,
            flow_lr=args.flow_lr,
        )

    # Made once now, so that an option that does not fit is named before data is read.
    common.check_options(make_criterion)
    nir_name = f"{args.nir_form}{args.nir_weight:g}" if args.nir_weight else "baseline"
    common.train(args, make_criterion, f"{args.dataset}-{args.loss}-{nir_name}-seed{args.seed}")


if __name__ == "__main__":
    import common

    common.command(main)
