"""The family of objectives in deep metric learning: ranking and classification losses, and the miners that feed them.

They are the older branches of what T. Milbich's tutorial "The Family of Objective Functions in DML" tells, under the
protocol that made them comparable: "Revisiting Training Strategies and Generalization Performance in Deep Metric
Learning" (Roth, Milbich, Sinha, Gupta, Ommer, Cohen, ICML 2020), "Revisiting" below.

In reading order: the miners; ranking losses; classification losses; what the trainer needs; the settings; main.

    python objectives.py --dataset toy --loss multisimilarity                 a minute or two on a laptop
    python objectives.py --dataset cub200 --loss margin --miner distance      the protocol's run: ResNet50, a GPU
"""
import math

import common                                             # before torch: see data.py's first lines
import torch
import torch.nn.functional as F
from torch import nn

import nir
from data import UserError
from nir import full_precision

# Throughout: e (B, D) embeddings as the network gives them, z = e / ||e||, S_ij = z_i . z_j, d_ij = ||z_i - z_j||,
# P_i the other images of i's class in the batch, N_i the images of other classes, [x]+ = max(x, 0).


def pair_masks(labels):
    """(B,) -> (P, N), both (B, B) bool: whether column j is in P_i, in N_i."""
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


# -------------------------------------------------------------------------------------------------------- the miners
# (embeddings (B, D), labels (B,), generator or None for torch's own) -> anchors, positives, negatives: three index
# tensors (T,), one triplet for each anchor that has a positive and a negative, so T may be 0. p is uniform in P_a, and
# the miners differ in n. (Revisiting's random miner draws from the list of all triplets.)

@full_precision
def distances(embeddings):
    """d_ij (B, B), without gradient, from one matrix product: in float32 1e-3 off near 0, which no miner minds."""
    z = F.normalize(embeddings.detach())
    return (2 - 2 * z @ z.T).clamp(min=1e-12).sqrt()


def draw(weights, generator):
    """A column of each row, in proportion to the weights: (T, B) -> (T,). The one whose exponential clock of that rate
    rings first, as in torch.multinomial, which refuses T = 0."""
    return (weights / -torch.rand(weights.shape, device=weights.device, generator=generator).log()).argmax(1)


def anchors_positives(labels, generator):
    """Anchors (T,), a positive for each (T,), and the anchors' rows of the mask N (T, B)."""
    positive, negative = pair_masks(labels)
    a = (positive.any(1) & negative.any(1)).nonzero().squeeze(1)
    return a, draw(positive[a], generator), negative[a]


def mine_random(embeddings, labels, generator=None):
    """Any negative: n uniform in N_a."""
    a, p, negative = anchors_positives(labels, generator)
    return a, p, draw(negative, generator)


def mine_semihard(embeddings, labels, margin=0.2, generator=None):
    """A negative in the loss's margin: n uniform in {n in N_a: d_ap < d_an < d_ap + margin}, if that is empty in N_a.

    FaceNet (Schroff, Kalenichenko, Philbin, CVPR 2015), but as in Revisiting d is not squared, though the loss squares.
    """
    a, p, negative = anchors_positives(labels, generator)
    d = distances(embeddings)[a]                                                         # (T, B)
    d_ap = d.gather(1, p.unsqueeze(1))                                                   # (T, 1)
    window = negative & (d > d_ap) & (d < d_ap + margin)
    return a, p, draw(torch.where(window.any(1, keepdim=True), window, negative), generator)


def mine_nearest(embeddings, labels, generator=None):
    """The tutorial's semi-hard: n = argmin {d_an: n in N_a, d_an > d_ap}, if that is empty the farthest in N_a."""
    a, p, negative = anchors_positives(labels, generator)
    d = distances(embeddings)[a]                                                         # (T, B)
    beyond = negative & (d > d.gather(1, p.unsqueeze(1)))
    nearest, farthest = d.masked_fill(~beyond, math.inf).argmin(1), d.masked_fill(~negative, -1).argmax(1)
    return a, p, torch.where(beyond.any(1), nearest, farthest)


def distance_probabilities(embeddings, labels, lower=0.5, upper=1.4):
    """P(n | a), (B, B): negatives drawn evenly over distances, where a uniform draw finds them near sqrt(2) alone.

        P(n | a) ~ 1 / q(max(d_an, lower)) if d_an < upper, else 0         q(d) ~ d^(D-2) (1 - d^2 / 4)^((D-3)/2)

    q is the density of the distance of two random points of the sphere in R^D (Wu, Manmatha, Smola, Kraehenbuehl,
    "Sampling Matters in Deep Embedding Learning", ICCV 2017). Past sqrt(2) 1 / q rises again, hence `upper`, which
    Revisiting's code leaves out. A row of no negative below `upper` is uniform over N_a, one of no negative is zero.
    """
    negative, d, D = pair_masks(labels)[1], distances(embeddings), embeddings.shape[1]
    inside, clipped = negative & (d < upper), d.clamp(min=lower)
    log_weight = (2 - D) * clipped.log() - (D - 3) / 2 * (1 - clipped.square() / 4).clamp(min=1e-8).log()
    log_weight = torch.where(inside, log_weight, 0.0)                     # where nothing is inside, all are alike
    allowed = torch.where(inside.any(1, keepdim=True), inside, negative)
    # At D = 512 the weights of a batch span e^370: softmax subtracts the maximum of each row, so that no row vanishes.
    return log_weight.masked_fill(~allowed, torch.finfo(d.dtype).min).softmax(1) * allowed


def mine_distance(embeddings, labels, lower=0.5, upper=1.4, generator=None):
    """Distance-weighted: n drawn from `distance_probabilities`."""
    a, p, _ = anchors_positives(labels, generator)
    return a, p, draw(distance_probabilities(embeddings, labels, lower, upper)[a], generator)


MINERS = {"random": mine_random, "semihard": mine_semihard, "nearest": mine_nearest, "distance": mine_distance}


# ---------------------------------------------------------------------------------------------------- ranking losses
# forward(embeddings (B, D), labels (B,)) -> scalar; the first two also take a miner's triplets. With nothing to rank
# (one class, classes of one image) the sum is empty: zero, with a gradient of zeros. A distance has an infinite slope at
# 0, where copies of an image are: norm() and cdist() take 0 for it, the released codes add 1e-8 to the square.

def masked_logsumexp(x, mask):
    """log sum_j exp(x_ij) over mask, (B, B) -> (B,). Over nothing the lowest finite number: -inf - -inf is not one."""
    return x.masked_fill(~mask, torch.finfo(x.dtype).min).logsumexp(1)


class Ranking(nn.Module):
    """L = the mean of parts(...), none below 0, 0 without any. The log tells the share of parts above 0 (nan without)."""

    @full_precision
    def forward(self, *batch, **named):
        parts = self.parts(*batch, **named)
        return parts.sum() / max(len(parts), 1)

    def log_values(self, *batch):
        return {"active": (self.parts(*batch) > 0).float().mean()}


class Triplet(Ranking):
    """The triplet loss (FaceNet, CVPR 2015; before it Weinberger, Blitzer, Saul, LMNN, NIPS 2005).

        L = mean_(a,p,n)  [d_ap^2 - d_an^2 + margin]+                          inactive triplets count in the mean
    """

    def __init__(self, margin=0.2):
        super().__init__()
        self.margin = margin

    def parts(self, embeddings, labels, triplets):
        a, p, n = (F.normalize(embeddings)[index] for index in triplets)                 # (T, D) each
        return F.relu((a - p).square().sum(1) - (a - n).square().sum(1) + self.margin)


class Margin(Ranking):
    """The margin loss (Wu et al., ICCV 2017): positives within a learned boundary beta, negatives beyond it.

        l+ = [d_ap - beta_a + margin]+      l- = [beta_a - d_an + margin]+        beta_a that of the anchor's class
        L  = sum_(a,p,n) (l+ + l- + nu beta_a) / (number of l+ > 0 plus number of l- > 0)          0 if none is

    granularity: one beta (`global`) or a vector (C,) (`class`). The tutorial's beta_0 + beta_class + beta_image is only
    identified as a sum, and no released code has its part per image. nu is that of the authors' mxnet code. L jumps up
    where easy parts fall silent: read it beside the logged share.
    """

    def __init__(self, num_classes, margin=0.2, beta=1.2, nu=0.0, granularity="class"):
        super().__init__()
        self.beta = nn.Parameter(torch.full({"global": (), "class": (num_classes,)}[granularity], float(beta)))
        self.margin, self.nu = margin, nu

    def boundaries(self, labels, triplets):                                              # (T,)
        return (self.beta[labels] if self.beta.dim() else self.beta.expand(len(labels)))[triplets[0]]

    def parts(self, embeddings, labels, triplets):
        a, p, n = (F.normalize(embeddings)[index] for index in triplets)                 # (T, D) each
        beta = self.boundaries(labels, triplets)
        parts = torch.stack([(a - p).norm(dim=1) - beta, beta - (a - n).norm(dim=1)])    # (2, T)
        return F.relu(parts + self.margin)

    @full_precision
    def forward(self, embeddings, labels, triplets):
        parts = self.parts(embeddings, labels, triplets)
        total, active = parts.sum() + self.nu * self.boundaries(labels, triplets).sum(), (parts > 0).sum()
        return total * (active > 0) / active.clamp(min=1)

    def log_values(self, *batch):
        return {**super().log_values(*batch), "boundary": self.beta.mean()}


class Lifted(Ranking):
    """Lifted structure (Oh Song, Xiang, Jegelka, Savarese, CVPR 2016): a positive pair against all negatives of both.

        J_ij = log(sum_{k in N_i} exp(alpha - d_ik) + sum_{l in N_j} exp(alpha - d_jl)) + d_ij
        L    = 1 / (2 |P|) sum_{(i,j) in P} [J_ij]+^2                      P the pairs of a class

    d is between embeddings e as they are, not on the sphere. The paper's L2 penalty on e is left out.
    """

    def __init__(self, alpha=1.0):
        super().__init__()
        self.alpha = alpha

    def pairs(self, e, labels):
        """P (B, B), d (B, B), and log sum_{k in N_i} exp(alpha - d_ik) (B,)"""
        # cdist's usual way, by a matrix product, is off by 1e-3 near 0, and more the longer the embeddings.
        (positive, negative), d = pair_masks(labels), torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist")
        return positive, d, masked_logsumexp(self.alpha - d, negative)

    def parts(self, embeddings, labels):
        positive, d, push = self.pairs(embeddings, labels)
        J = torch.logaddexp(push.unsqueeze(0), push.unsqueeze(1)) + d
        return F.relu(J[positive]).square() / 2            # each pair as (i, j) and as (j, i): the mean is the same


class GenLifted(Lifted):
    """Generalised lifted structure (Hermans, Beyer, Leibe, "In Defense of the Triplet Loss", 2017): an anchor's J.

        L = mean_i [log sum_{p in P_i} exp(d_ip) + log sum_{n in N_i} exp(alpha - d_in)]+  +  weight mean_i ||e_i||

    The first mean is over anchors with a positive; d as in Lifted. Revisiting's numbers for "lifted" are of this form.
    """

    def __init__(self, alpha=1.0, weight=0.005):
        super().__init__(alpha)
        self.weight = weight

    def parts(self, embeddings, labels):
        positive, d, push = self.pairs(embeddings, labels)
        return F.relu(masked_logsumexp(d, positive) + push)[positive.any(1)]

    @full_precision
    def forward(self, embeddings, labels):
        return super().forward(embeddings, labels) + self.weight * embeddings.norm(dim=1).mean()


class MultiSimilarity(Ranking):
    """Multi-similarity (Wang, Han, Huang, Dong, Scott, CVPR 2019): the hard pairs, weighted by three similarities.

        L = 1/B sum_i  1/alpha log(1 + sum_{P_i'} exp(-alpha (S_ik - threshold)))
                     + 1/beta  log(1 + sum_{N_i'} exp( beta  (S_ik - threshold)))
        P_i' = {k in P_i: S_ik < max_{n in N_i} S_in + epsilon}, N_i' = {k in N_i: S_ik > min_{p in P_i} S_ip - epsilon}

    Settings and mean are those of the authors' code, which also drops positives with S > 1 - 1e-5, copies. (The paper has
    beta 50, threshold 1; Revisiting has these settings and a mean over the anchors that keep a pair, whose share is
    logged.) P_i' and N_i' are empty together.
    """

    def __init__(self, alpha=2.0, beta=40.0, threshold=0.5, epsilon=0.1):
        super().__init__()
        self.alpha, self.beta, self.threshold, self.epsilon = alpha, beta, threshold, epsilon

    def parts(self, embeddings, labels):
        (positive, negative), z = pair_masks(labels), F.normalize(embeddings)
        S, limit = z @ z.T, torch.finfo(z.dtype).max                                     # S (B, B)
        nearest = S.masked_fill(~negative, -limit).amax(1, keepdim=True)                 # without one, nothing is kept
        farthest = S.masked_fill(~positive, limit).amin(1, keepdim=True)
        positive, negative = positive & (S < nearest + self.epsilon), negative & (S > farthest - self.epsilon)
        pull = masked_logsumexp(-self.alpha * (S - self.threshold), positive)            # (B,)
        push = masked_logsumexp(self.beta * (S - self.threshold), negative)
        zero = S.new_zeros(())                                                           # the 1 in log(1 + ...)
        return torch.logaddexp(pull, zero) / self.alpha + torch.logaddexp(push, zero) / self.beta


# --------------------------------------------------------------------------------------------- classification losses

class ClassVectors(nn.Module):
    """L = mean_i -log softmax(logits_i)_y, y the own class of i, with a learned vector W_c per class, `proxies` (C, D),
    which starts at U(-1/sqrt(D), 1/sqrt(D)). theta_ic is the angle of e_i and W_c."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.proxies = nn.Parameter(torch.empty(num_classes, dim).uniform_(-dim ** -0.5, dim ** -0.5))

    def cosine(self, embeddings):
        return F.normalize(embeddings) @ F.normalize(self.proxies).T                     # (B, D) @ (D, C) -> (B, C)

    @full_precision
    def forward(self, embeddings, labels):
        return F.cross_entropy(self.logits(embeddings, labels.unsqueeze(1)), labels)

    def log_values(self, embeddings, labels):
        own = self.cosine(embeddings).gather(1, labels.unsqueeze(1))
        return {"own_angle": own.clamp(-1, 1).acos().rad2deg().mean()}                   # in degrees


class Softmax(ClassVectors):
    """The plain classifier: logits_ic = e_i . W_c, nothing normalised, no bias."""

    def logits(self, embeddings, own):
        return embeddings @ self.proxies.T


class NormSoftmax(ClassVectors):
    """Normalised softmax (Zhai, Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019).

        logits_ic = cos(theta_ic) / temperature                                without the paper's layer norm
    """

    def __init__(self, num_classes, dim, temperature=0.05):
        super().__init__(num_classes, dim)
        self.temperature = temperature

    def logits(self, embeddings, own):
        return self.cosine(embeddings) / self.temperature


class SphereFace(ClassVectors):
    """SphereFace, A-Softmax (Liu, Wen, Yu, Li, Raj, Song, CVPR 2017): a margin m that MULTIPLIES the own class's angle.

        logits_ic = ||e_i|| cos(theta_ic), for the own class ||e_i|| psi(theta_iy)
        psi(t)    = (-1)^k cos(m t) - 2k  for t in [k pi/m, (k+1) pi/m]        falls steadily from 1 to 1 - 2m

    The tutorial's one formula for "Sphere-/ArcFace" adds its margin, with a fixed scale in place of ||e_i||: that is
    ArcFace's. With annealing, as the authors train it, the own logit is ||e_i|| (la cos + psi) / (1 + la),
    la = max(5, 1000 / (1 + 0.12 step)); `step`, a buffer, counts the calls in training mode. Raises UserError for an m
    other than 1, 2, ...
    """

    def __init__(self, num_classes, dim, margin=4, annealing=False):
        super().__init__(num_classes, dim)
        if margin < 1 or margin != int(margin):
            raise UserError(f"SphereFace multiplies angles by whole numbers, not by {margin}: use a margin of 1, 2, ...")
        self.margin, self.annealing = int(margin), annealing
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def psi(self, c):
        """psi by c = cos(t). cos(m t) is Chebyshev's polynomial of c: the slope of acos(c) would be infinite at +-1."""
        with torch.no_grad():
            k = (self.margin * c.clamp(-1, 1).acos() / math.pi).floor().clamp(max=self.margin - 1)
        before, polynomial = torch.ones_like(c), c
        for _ in range(self.margin - 1):
            before, polynomial = polynomial, 2 * c * polynomial - before
        return (1 - 2 * (k % 2)) * polynomial - 2 * k

    def logits(self, embeddings, own):
        cosine = self.cosine(embeddings)
        c = cosine.gather(1, own)                                                        # (B, 1)
        target = self.psi(c)
        if self.annealing:
            la = (1000 / (1 + 0.12 * self.step.double())).clamp(min=5)
            target = (la * c + target) / (1 + la)
            self.step += self.training
        return embeddings.norm(dim=1, keepdim=True) * cosine.scatter(1, own, target)


class ArcFace(ClassVectors):
    """ArcFace (Deng, Guo, Xue, Zafeiriou, CVPR 2019): a margin m that is ADDED to the own class's angle.

        logits_ic = scale cos(theta_ic), for the own class scale cos(theta_iy + m)          if theta_iy <= pi - m,
                                                  as the authors scale (cos(theta_iy) - m sin(m)) beyond

    Past pi the cosine would rise again, and reward the wrong side. At the seam the logit jumps down, for m = 0.5 by
    0.12 scale. Scale 16 is Revisiting's, 64 the paper's. (Revisiting clamps all cosines to be positive, which takes the
    gradient from half the sphere: not followed.)
    """

    def __init__(self, num_classes, dim, scale=16.0, margin=0.5):
        super().__init__(num_classes, dim)
        self.scale, self.margin = scale, margin

    def logits(self, embeddings, own):
        cosine, m = self.cosine(embeddings), self.margin
        c = cosine.gather(1, own)                                                        # (B, 1)
        sine = ((1 - c) * (1 + c)).clamp(min=1e-12).sqrt()                               # slope at +-1: 0, not infinite
        target = torch.where(c < -math.cos(m), c - m * math.sin(m), c * math.cos(m) - sine * math.sin(m))
        return self.scale * cosine.scatter(1, own, target)


# ------------------------------------------------------------------------------------------- what the trainer needs

LOSSES = {  # --loss -> what makes it for C classes, D dimensions and --beta
    "triplet": lambda C, D, beta: Triplet(), "margin": lambda C, D, beta: Margin(C, granularity=beta),
    "lifted": lambda C, D, beta: Lifted(), "genlifted": lambda C, D, beta: GenLifted(),
    "multisimilarity": lambda C, D, beta: MultiSimilarity(), "softmax": lambda C, D, beta: Softmax(C, D),
    "normsoftmax": lambda C, D, beta: NormSoftmax(C, D), "arcface": lambda C, D, beta: ArcFace(C, D),
    "sphereface": lambda C, D, beta: SphereFace(C, D, annealing=True)}
MINED = ("triplet", "margin")                                                            # these take triplets


class Criterion(nn.Module):
    """A loss, and the miner of its triplets if it takes any. `loss_lr` is its parameters' rate, a multiple of --lr."""

    def __init__(self, loss, miner=None, loss_lr=1.0):
        super().__init__()
        self.loss, self.miner, self.loss_lr = loss, miner, loss_lr

    def mine(self, embeddings, labels):
        """[] or [(anchors, positives, negatives)]"""
        options = {"margin": self.loss.margin} if self.miner == "semihard" else {}
        return [MINERS[self.miner](embeddings, labels, **options)] if self.miner else []

    def terms(self, embeddings, labels):
        return {type(self.loss).__name__.lower(): self.loss(embeddings, labels, *self.mine(embeddings, labels))}

    def groups(self, lr):
        parameters = list(self.loss.parameters())
        return [{"params": parameters, "lr": self.loss_lr * lr}] if parameters else []

    @torch.no_grad()
    def log_values(self, embeddings, labels):
        """What the loss itself reports, and the mean distance of mined negatives; triplets are drawn anew."""
        triplets = self.mine(embeddings, labels)
        values = self.loss.log_values(embeddings, labels, *triplets)
        for a, _, n in triplets:
            values["mined_distance"] = distances(embeddings)[a, n].mean()
        return {name: float(value) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------------ the settings
# A loss's own settings, Revisiting's too, are its defaults above. From scratch (--weights none, so also toy) all but the
# rate is nir.py's, for comparison; the rate is the best of three on validation classes: RESULTS.md.

PAPER = dict(batch_size=112, lr=1e-5, epochs=150, lr_steps=[], lr_gamma=0.1, warmup=0)
PRESETS = {"paper": PAPER, "sop": {**PAPER, "epochs": 100}, "scratch": {**{k: nir.SCRATCH[k] for k in PAPER}, "lr": 3e-3}}
SCRATCH_LR = {"arcface": 3e-4}                                                           # all others: as in PRESETS
# loss_lr in each: multiples of --lr, published as 5e-4, for normsoftmax 1e-5 or on SOP 2e-3. For softmax and SphereFace
# nothing is published: they take ArcFace's. A boundary from scratch learns at the network's own rate.
LOSS_LR = {"margin": (50, 50, 1), "softmax": (50, 50, 10), "normsoftmax": (1, 200, 10), "sphereface": (50, 50, 10),
           "arcface": (50, 50, 10)}


def preset(args):
    column = "scratch" if args.weights == "none" else "sop" if args.dataset == "sop" else "paper"
    rates = dict(zip(PRESETS, LOSS_LR.get(args.loss, ())))
    own = {"lr": SCRATCH_LR[args.loss]} if column == "scratch" and args.loss in SCRATCH_LR else {}
    return {**PRESETS[column], **own, "loss_lr": rates.get(column), "miner": "distance" if args.loss in MINED else None,
            "beta": "class" if args.loss == "margin" else None}


def main(argv=None):
    table = {column: {**row, **{f"loss_lr {loss}": rates[i] for loss, rates in LOSS_LR.items()}}
             for i, (column, row) in enumerate(PRESETS.items())}
    table["scratch"] |= {f"lr {loss}": lr for loss, lr in SCRATCH_LR.items()}
    p = common.parser(__doc__.split("\n\n")[0], "presets: paper is Revisiting Training Strategies, scratch --weights "
                      "none;\nloss_lr is a multiple of --lr\n" + common.aligned(table))
    add = p.add_argument_group("loss and miner").add_argument
    add("--loss", choices=LOSSES, default="margin", help="default: margin")
    add("--miner", choices=MINERS, help="of triplets for triplet and margin (default: distance)")
    add("--beta", choices=("global", "class"), help="margin's boundaries: one, or one per class (default: class)")
    add("--loss_lr", type=common.positive(float), help="of boundaries or class vectors, a multiple of --lr (by preset)")
    args = common.parse(p, preset, argv)
    for option, losses in (("miner", MINED), ("beta", ["margin"]), ("loss_lr", LOSS_LR)):
        if getattr(args, option) and args.loss not in losses:
            raise UserError(f"--{option} {getattr(args, option)} means nothing to --loss {args.loss}, only to "
                            f"{', '.join(losses)}: leave it out")

    def criterion(num_classes):
        return Criterion(LOSSES[args.loss](num_classes, args.embed_dim, args.beta), args.miner, args.loss_lr)
    name = [args.dataset, args.loss, args.beta, args.miner, f"seed{args.seed}"]
    common.train(args, criterion, "-".join(part for part in name if part))


if __name__ == "__main__":
    common.command(main)
