"""Non-isotropy Regularization for Proxy-based Deep Metric Learning (Roth, Vinyals, Akata, CVPR 2022).

A proxy loss only looks at how far an embedding psi is from its class proxy rho, so everything on a circle around rho
is alike to it and classes come out round. NIR asks for more: that each psi is a unique, invertible translation of its
proxy, psi = tau(zeta | rho) with a standard normal residual zeta. tau is a conditional normalising flow, and the
regulariser is its negative log-likelihood. No pairs of samples are needed.

In reading order: three proxy losses; the GLOW flow; the NIR term on top of a loss; the papers' settings; main.

    python nir.py --dataset toy                             built-in toy characters, minutes on a laptop
    python nir.py --dataset cub200 --loss proxyanchor       the paper's run: ResNet50, a GPU
    python nir.py --dataset cub200 --nir_weight 0           its baseline, the proxy loss alone
"""
import functools
import math

import common                                             # before torch: see data.py's first lines
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import UserError


def full_precision(function):
    """Compute in float32 (or float64, if that comes in) whatever autocast or half precision surrounds the call."""
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        def full(a):
            return a.float() if torch.is_tensor(a) and a.dtype in (torch.float16, torch.bfloat16) else a
        device = next(a.device.type for a in (*args, *kwargs.values()) if torch.is_tensor(a))
        with torch.autocast(device, enabled=False):
            return function(*map(full, args), **{name: full(a) for name, a in kwargs.items()})
    return wrapped


# ------------------------------------------------------------------------------------------------- the proxy losses
# Each holds one learnable proxy per class (SoftTriple: several), forward(embeddings (B, D), labels (B,)) -> scalar.
# Embeddings and proxies are normalised inside; s = psi . rho is their cosine. Proxies start at N(0, 1/64).


class ProxyNCA(nn.Module):
    """ProxyNCA++ (Teh, DeVries, Taylor, ECCV 2020): softmax over all proxies, the positive included, of -d^2 / T.

        L = mean_i -log  exp(-||psi_i - rho_y||^2 / T) / sum_c exp(-||psi_i - rho_c||^2 / T)
    """

    def __init__(self, num_classes, dim, temperature=1 / 9):
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(num_classes, dim) / 8)
        self.temperature = temperature

    @full_precision
    def forward(self, embeddings, labels):
        cosine = F.normalize(embeddings) @ F.normalize(self.proxies).T                 # (B, C)
        return F.cross_entropy(-(2 - 2 * cosine) / self.temperature, labels)


class ProxyAnchor(nn.Module):
    """Proxy Anchor Loss for Deep Metric Learning (Kim, Kim, Cho, Kwak, CVPR 2020).

        L = 1/|P+| sum_{c in P+} log(1 + sum_{i of class c}     exp(-alpha (s_ic - margin)))
          + 1/C    sum_c         log(1 + sum_{i not of class c} exp( alpha (s_ic + margin)))

    P+ are the proxies with a positive in the batch. log(1 + sum exp) is softplus(logsumexp), which cannot overflow.
    """

    def __init__(self, num_classes, dim, margin=0.1, alpha=32.0):
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(num_classes, dim) / 8)
        self.margin, self.alpha = margin, alpha

    @full_precision
    def forward(self, embeddings, labels):
        s = F.normalize(embeddings) @ F.normalize(self.proxies).T                      # (B, C)
        positive = F.one_hot(labels, len(self.proxies)).bool()                         # (B, C)
        # The lowest finite number, not -inf: logsumexp over nothing but -inf has no gradient.
        nothing = torch.finfo(s.dtype).min
        pull = (-self.alpha * (s - self.margin)).masked_fill(~positive, nothing).logsumexp(0)        # (C,)
        push = (self.alpha * (s + self.margin)).masked_fill(positive, nothing).logsumexp(0)          # (C,)
        # A proxy without a positive adds softplus(nothing) = 0 to the first sum.
        return F.softplus(pull).sum() / positive.any(0).sum() + F.softplus(push).mean()


class SoftTriple(nn.Module):
    """SoftTriple Loss: Deep Metric Learning Without Triplet Sampling (Qian et al., ICCV 2019).

        S_ic = sum_k  softmax_k(s_ick / gamma) s_ick                      similarity to a class with K centres
        L    = mean_i -log  exp(la (S_iy - margin)) / (exp(la (S_iy - margin)) + sum_{c != y} exp(la S_ic))
             + tau / (C K (K - 1)) sum_c sum_{k < l} ||w_ck - w_cl||      merges centres that a class does not need
    """

    def __init__(self, num_classes, dim, centers=10, la=20.0, gamma=0.1, margin=0.01, tau=0.2):
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(num_classes, centers, dim) / 8)
        self.la, self.gamma, self.margin, self.tau = la, gamma, margin, tau

    @full_precision
    def forward(self, embeddings, labels):
        C, K, D = self.proxies.shape
        centers = F.normalize(self.proxies, dim=-1)
        s = (F.normalize(embeddings) @ centers.view(C * K, D).T).view(-1, C, K)        # (B, C, K)
        S = (F.softmax(s / self.gamma, dim=2) * s).sum(2)                              # (B, C)
        logits = self.la * (S - self.margin * F.one_hot(labels, C).to(S))
        loss = F.cross_entropy(logits, labels)
        if self.tau and K > 1:
            k, l = torch.triu_indices(K, K, offset=1, device=s.device)
            squared = 2 - 2 * (centers @ centers.mT)[:, k, l]                          # (C, K (K - 1) / 2)
            # The square root has an infinite slope where two centres have merged: keep away from zero.
            loss = loss + self.tau * squared.clamp(min=1e-5).sqrt().sum() / (C * K * (K - 1))
        return loss


LOSSES = {"proxynca": ProxyNCA, "proxyanchor": ProxyAnchor, "softtriple": SoftTriple}


# --------------------------------------------------------------------------------------------------------- the flow

class Coupling(nn.Module):
    """A fixed permutation, then GLOW's affine coupling (Kingma, Dhariwal, NeurIPS 2018), conditional on `cond`.

        y1 = exp(s2) * x1 + t2    with (s2, t2) = subnet2(x2, cond)
        y2 = exp(s1) * x2 + t1    with (s1, t1) = subnet1(y1, cond)

    The Jacobian is triangular, so log|det J| is the sum of s1 and s2. The released code's soft clamp keeps each scale
    within exp(+-clamp): s = clamp * 0.636 * atan(raw), 0.636 being 2 / pi.
    """

    def __init__(self, dim, cond_dim, depth, width, clamp, seed):
        super().__init__()
        self.split, self.clamp = (dim // 2, dim - dim // 2), clamp
        permutation = torch.from_numpy(np.random.RandomState(seed).permutation(dim))
        self.register_buffer("permutation", permutation)
        self.register_buffer("undo", permutation.argsort())
        self.subnet1 = self.subnet(self.split[0] + cond_dim, 2 * self.split[1], depth, width)
        self.subnet2 = self.subnet(self.split[1] + cond_dim, 2 * self.split[0], depth, width)

    @staticmethod
    def subnet(inputs, outputs, depth, width):
        """`depth` linear layers of `width` hidden units with ReLU between."""
        sizes = [inputs] + [width] * (depth - 1) + [outputs]
        layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    def scale_shift(self, subnet, x, cond):
        raw, t = subnet(torch.cat([x, cond], dim=1)).chunk(2, dim=1)
        return self.clamp * 0.636 * torch.atan(raw), t

    def forward(self, x, cond):
        x1, x2 = x[:, self.permutation].split(self.split, dim=1)
        s2, t2 = self.scale_shift(self.subnet2, x2, cond)
        y1 = s2.exp() * x1 + t2
        s1, t1 = self.scale_shift(self.subnet1, y1, cond)
        y2 = s1.exp() * x2 + t1
        return torch.cat([y1, y2], dim=1), s1.sum(1) + s2.sum(1)

    def inverse(self, y, cond):
        y1, y2 = y.split(self.split, dim=1)
        s1, t1 = self.scale_shift(self.subnet1, y1, cond)
        x2 = (y2 - t1) * (-s1).exp()
        s2, t2 = self.scale_shift(self.subnet2, x2, cond)
        x1 = (y1 - t2) * (-s2).exp()
        return torch.cat([x1, x2], dim=1)[:, self.undo]


class GlowFlow(nn.Module):
    """The translation tau between embeddings psi and residuals zeta, given the proxy rho as condition.

    forward(psi (B, dim), rho (B, cond_dim)) -> (zeta = tau^-1(psi | rho) (B, dim), log|det J_tau^-1| (B,))
    inverse(zeta, rho) -> psi = tau(zeta | rho);    log_prob(psi, rho) -> log p(psi | rho) (B,), a density over R^dim.
    """

    def __init__(self, dim, cond_dim, num_blocks=5, depth=8, width=128, clamp=2.0):
        super().__init__()
        if dim < 2:
            raise UserError(f"a coupling flow needs at least two dimensions to split, not {dim}: use --embed_dim 2")
        self.blocks = nn.ModuleList([Coupling(dim, cond_dim, depth, width, clamp, seed=i) for i in range(num_blocks)])

    @full_precision
    def forward(self, x, cond):
        log_det = x.new_zeros(len(x))
        for block in self.blocks:
            x, block_log_det = block(x, cond)
            log_det = log_det + block_log_det
        return x, log_det

    @full_precision
    def inverse(self, z, cond):
        for block in reversed(self.blocks):
            z = block.inverse(z, cond)
        return z

    def log_prob(self, x, cond):
        """Change of variables: log q(zeta) + log|det J|, with q standard normal."""
        z, log_det = self(x, cond)
        return -0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi) + log_det


# --------------------------------------------------------------------------------------------------- the regulariser

class NIR(nn.Module):
    """A proxy loss with the NIR term: proxy_weight * L_proxy + nir_weight * L_NIR.

    form `nll`: L_NIR = mean_i -log p(psi_i | rho_y), the paper's. Embeddings lie on the unit sphere, where a density
                over R^D has no upper bound, so this keeps pulling for as long as it is trained.
    form `exp`: L_NIR = mean_i exp(0.5 ||zeta_i||^2 - log|det J|), the released code's. Its gradient is that of `nll`
                times p^-1 up to a constant: once the flow fits it vanishes, so it acts like a hinge.

    psi and rho are L2-normalised. With several centres per class rho is the centre nearest to the sample.

    noise > 0 adds normal noise of that deviation to each coordinate of psi before the flow. Then no density is higher than
    the noise's own, whose mean log is -D/2 log(2 pi e noise^2): a class that is smaller than the noise gains nothing by
    shrinking further. (The released code can add uniform noise and normalise again; no run of its does.)
    """

    def __init__(self, proxy_loss, dim, form="nll", nir_weight=1.0, proxy_weight=1.0, proxy_lr=1.0, flow_lr=1.0, noise=0.0):
        super().__init__()
        self.proxy_loss, self.form, self.noise = proxy_loss, form, noise
        self.nir_weight, self.proxy_weight, self.proxy_lr, self.flow_lr = nir_weight, proxy_weight, proxy_lr, flow_lr
        self.flow = GlowFlow(dim, dim) if nir_weight else None         # without a weight there is nothing to train

    @full_precision
    def nir(self, embeddings, labels):
        psi, rho = F.normalize(embeddings), F.normalize(self.proxy_loss.proxies, dim=-1)[labels]
        if rho.dim() == 3:                                                               # (B, K, D) -> (B, D)
            nearest = (rho @ psi.unsqueeze(2)).squeeze(2).argmax(1)
            rho = rho[torch.arange(len(rho), device=rho.device), nearest]
        if self.noise:
            psi = psi + self.noise * torch.randn_like(psi)
        if self.form == "nll":
            return -self.flow.log_prob(psi, rho).mean()
        zeta, log_det = self.flow(psi, rho)
        return (0.5 * zeta.square().sum(1) - log_det).exp().mean()

    def terms(self, embeddings, labels):
        terms = {"proxy": self.proxy_weight * self.proxy_loss(embeddings, labels)}
        if self.flow is not None:
            terms["nir"] = self.nir_weight * self.nir(embeddings, labels)
        return terms

    def groups(self, lr):
        groups = [{"params": list(self.proxy_loss.parameters()), "lr": self.proxy_lr * lr}]
        if self.flow is not None:
            groups.append({"params": list(self.flow.parameters()), "lr": self.flow_lr * lr})
        return groups

    def log_values(self, embeddings, labels):
        """How tight the batch's classes are: mean cosine to the own (nearest) proxy, and between images of a class."""
        psi, rho = F.normalize(embeddings), F.normalize(self.proxy_loss.proxies.detach(), dim=-1)[labels]
        to_proxy = (rho.view(len(psi), -1, psi.shape[1]) @ psi.unsqueeze(2)).amax(1)           # (B, K or 1, 1) -> (B, 1)
        pairs = (labels.unsqueeze(0) == labels.unsqueeze(1)).triu(diagonal=1)
        return {"own_proxy_cosine": float(to_proxy.mean()), "class_cosine": float((psi @ psi.T)[pairs].mean())}


# ------------------------------------------------------------------------------------------------------ the settings
# proxy_lr and flow_lr are multiples of --lr. proxy_weight is the released code's w: it scales the proxy loss, not NIR.

PAPER = dict(batch_size=90, lr=1e-5, lr_steps=[], lr_gamma=0.1, warmup=1, proxy_lr=4000, flow_lr=50,
             nir_form="exp", nir_weight=1.0, nir_noise=0.0)
PRESETS = {  # (data set, D) -> what differs from PAPER
    ("cub200", 128): dict(epochs=100, proxy_weight=0.0075),
    ("cub200", 512): dict(epochs=100, proxy_weight=0.0075),
    ("cars196", 128): dict(epochs=100, proxy_weight=0.01),
    ("cars196", 512): dict(epochs=100, proxy_weight=0.01),
    ("sop", 128): dict(epochs=300, proxy_weight=0.3, lr_steps=[140, 230], lr_gamma=0.2, warmup=5, flow_lr=1),
    ("sop", 512): dict(epochs=300, proxy_weight=0.3, lr_steps=[140, 230], lr_gamma=0.2, warmup=5, flow_lr=1),
}
BASELINE = dict(proxy_lr=2000, proxy_weight=1.0, warmup=0)          # with --nir_weight 0
# A network that starts from nothing (--weights none, so also toy): other rates, fewer epochs.
SCRATCH = dict(batch_size=90, lr=1e-3, epochs=15, lr_steps=[10, 13], lr_gamma=0.3, warmup=0, proxy_lr=10, flow_lr=1,
               proxy_weight=1.0, nir_noise=0.0)
# ... and NIR, by validation classes (RESULTS.md). On toy the noise, 0.8 in all, is as long as two images of a class are apart.
SCRATCH_NIR = dict(nir_form="nll", nir_weight=0.01)
SCRATCH_TOY = {**SCRATCH_NIR, "nir_noise": 0.1}


def preset(args):
    if args.weights == "none":
        return {**SCRATCH, **(SCRATCH_TOY if args.dataset == "toy" else SCRATCH_NIR)}
    dim = 512 if args.embed_dim > 128 else 128             # others: up to 128 the settings of 128, else of 512
    settings = {**PAPER, **PRESETS.get((args.dataset, dim), PRESETS["cub200", dim])}
    return {**settings, **BASELINE} if args.nir_weight == 0 else settings


def main(argv=None):
    presets = {f"{name}/{dim}": {**PAPER, **row} for (name, dim), row in PRESETS.items()}
    presets.update({"--nir_weight 0": BASELINE, "scratch": {**SCRATCH, **SCRATCH_NIR},
                    "toy": {**SCRATCH, **SCRATCH_TOY}})
    p = common.parser(__doc__.split("\n\n")[0], "presets: data set/D of the paper's runs; scratch is "
                      "--weights none; proxy_lr and flow_lr are multiples of --lr\n" + common.aligned(presets))
    add = p.add_argument_group("proxy loss and NIR").add_argument
    add("--loss", choices=LOSSES, default="proxyanchor", help="default: proxyanchor")
    add("--nir_form", choices=("nll", "exp"), help="nll: the paper's; exp: the released code's (default: by preset)")
    add("--nir_weight", type=common.not_negative(float), help="0: the baseline without NIR (default: by preset)")
    add("--nir_noise", type=common.not_negative(float),
        help="deviation of the noise on embeddings before the flow (default: by preset)")
    add("--proxy_weight", type=common.not_negative(float), help="weight of the proxy loss (default: by preset)")
    add("--proxy_lr", type=common.positive(float), help="multiple of --lr for the proxies (default: by preset)")
    add("--flow_lr", type=common.positive(float), help="multiple of --lr for the flow (default: by preset)")
    args = common.parse(p, preset, argv)

    def criterion(num_classes):
        return NIR(LOSSES[args.loss](num_classes, args.embed_dim), args.embed_dim, args.nir_form, args.nir_weight,
                   args.proxy_weight, args.proxy_lr, args.flow_lr, args.nir_noise)
    nir = f"{args.nir_form}{args.nir_weight:g}" if args.nir_weight else "baseline"
    common.train(args, criterion, f"{args.dataset}-{args.loss}-{nir}-seed{args.seed}")


if __name__ == "__main__":
    common.command(main)
