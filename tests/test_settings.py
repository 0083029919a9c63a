"""The options of nir.py and prob_dml.py reach what they are for, and their settings are those of papers and RESULTS.md."""
import argparse
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import nir
import prob_dml
from data import UserError


def started(monkeypatch, script, *argv):
    """What a command line hands to common.train: settings, criterion, name of the run, and perhaps a setup."""
    caught = []
    monkeypatch.setattr(common, "train", lambda *given: caught.extend(given))
    script.main(list(argv))
    return caught


# ------------------------------------------------------------------------------------------------------------ nir.py

@pytest.mark.parametrize("loss", nir.LOSSES)
def test_nirs_options_reach_the_criterion(loss, monkeypatch):
    _, criterion, name = started(monkeypatch, nir, *f"--dataset toy --loss {loss} --nir_form exp --nir_weight 0.7 --nir_noise "
                                 "0.3 --proxy_weight 0.2 --proxy_lr 3 --flow_lr 5".split())
    made = criterion(7)
    assert type(made.proxy_loss) is nir.LOSSES[loss] and made.proxy_loss.proxies.shape[0] == 7
    assert (made.form, made.nir_weight, made.noise, made.proxy_weight) == ("exp", 0.7, 0.3, 0.2)
    assert [group["lr"] for group in made.groups(0.1)] == pytest.approx([0.3, 0.5])
    assert name == f"toy-{loss}-exp0.7-seed0"


def test_log_values_are_mean_cosines_to_the_own_proxy_and_between_different_images_of_a_class():
    made = nir.NIR(nir.ProxyAnchor(3, 2), 2, nir_weight=0)
    made.proxy_loss.proxies.data = torch.tensor([[1.0, 0], [0, 5], [0, -1]])
    x, y = torch.tensor([[2.0, 0], [0, 3], [1, 1], [0, 2], [1, -1]]), torch.tensor([0, 0, 1, 1, 2])
    half = 0.5 ** 0.5
    assert made.log_values(x, y) == pytest.approx({"own_proxy_cosine": (1 + 0 + half + 1 + half) / 5, "class_cosine": half / 2})
    many = nir.NIR(nir.SoftTriple(1, 2, centers=2), 2, nir_weight=0)
    many.proxy_loss.proxies.data = torch.tensor([[[0.0, 1], [3, 0]]])
    assert many.log_values(x[[0, 2]], y[[0, 0]])["own_proxy_cosine"] == pytest.approx((1 + half) / 2)       # the nearest centre


def test_losses_start_with_their_papers_constants():
    nca, anchor, triple = nir.ProxyNCA(3, 4), nir.ProxyAnchor(3, 4), nir.SoftTriple(3, 4)
    assert nca.temperature == pytest.approx(1 / 9) and (anchor.margin, anchor.alpha) == (0.1, 32)
    assert (triple.la, triple.gamma, triple.margin, triple.tau, triple.proxies.shape) == (20, 0.1, 0.01, 0.2, (3, 10, 4))


@pytest.mark.parametrize("dataset, expected", [("toy", 0.1), ("folder", 0.0), ("cub200", 0.0)])
def test_nirs_preset_from_scratch_is_that_of_the_results(dataset, expected):
    assert nir.preset(argparse.Namespace(dataset=dataset, weights="none", embed_dim=64, nir_weight=None)) == dict(
        batch_size=90, lr=1e-3, epochs=15, lr_steps=[10, 13], lr_gamma=0.3, warmup=0, proxy_lr=10, flow_lr=1, proxy_weight=1,
        nir_form="nll", nir_weight=0.01, nir_noise=expected)


@pytest.mark.parametrize("script", [nir, prob_dml])
def test_what_has_no_row_of_its_own_takes_cubs_and_the_nearest_dimension(script):
    def preset(dataset, dim):
        return script.preset(argparse.Namespace(dataset=dataset, weights="imagenet", embed_dim=dim, metric="elk", proxy=None,
                                                form=None, nir_weight=None))
    unlisted = ["folder"] if script is nir else ["folder", "sop"]
    assert all(preset(dataset, dim) == preset("cub200", dim) for dataset in unlisted for dim in (128, 512))
    assert preset("cub200", 64) == preset("cub200", 128) and preset("cub200", 400) == preset("cub200", 512) == preset("cub200", 1024)


def test_soft_clamp_is_the_released_one():
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


def test_inverse_and_choice_of_the_centre_are_in_float32_under_autocast():
    torch.manual_seed(0)
    made, x, y = nir.NIR(nir.SoftTriple(1, 4, centers=2), 4, form="nll"), torch.eye(1, 4), torch.tensor([0])
    made.proxy_loss.proxies.data = torch.tensor([[[math.cos(0.02), math.sin(0.02), 0, 0], [1, 0, 0, 0]]])   # bfloat16: a tie
    z, cond = torch.randn(3, 4), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = made.terms(x, y)["nir"], made.flow.inverse(z, cond)
    assert all(map(torch.equal, inside, (made.terms(x, y)["nir"], made.flow.inverse(z, cond))))


def test_merging_term_of_close_but_different_centres_is_their_distance():
    loss = nir.SoftTriple(1, 2, centers=2, tau=1.0).double()
    loss.proxies.data = torch.tensor([[[1, 0], [math.cos(0.02), math.sin(0.02)]]], dtype=torch.float64)
    value = loss(torch.eye(1, 2, dtype=torch.float64), torch.tensor([0])).item()               # one class: no cross-entropy
    assert value == pytest.approx(2 * math.sin(0.01) / 2)                                      # a chord, over C K (K - 1)


def test_negative_noise_and_proxy_weight_are_named(capsys):
    for option in ("--nir_noise", "--proxy_weight"):
        with pytest.raises(SystemExit):
            nir.main(["--dataset", "toy", option, "-1", "--device", "none"])
        assert f"{option}: -1 is negative" in capsys.readouterr().err


def test_help_shows_toys_own_noise(capsys):
    with pytest.raises(SystemExit):
        nir.main(["--help"])
    row, = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["nir_noise"]]
    assert row[-2:] == ["0.0", "0.1"]                                                              # scratch, toy


# ------------------------------------------------------------------------------------------------------- prob_dml.py

def test_prob_dmls_options_reach_the_criterion(monkeypatch):
    _, criterion, name, setup = started(monkeypatch, prob_dml, *(
        "--dataset toy --metric kl --form released --samples 3 --temperature 0.7 --concentration_init 4 --proxy_lr 2 "
        "--concentration_lr 3 --temperature_lr 5 --guidance_weight 0.5").split())
    made = criterion(7)
    inner = made.proxies
    assert (inner.metric, inner.form, inner.samples, inner.length, made.guidance_weight) == ("kl", "released", 3, 4, 0.5)
    assert inner.temperature.item() == pytest.approx(0.7) and inner.concentrations.shape == (7, 64)
    rates = {id(group["params"][0]): group["lr"] for group in made.groups(0.1)}
    assert rates == pytest.approx({id(inner.proxies): 0.2, id(inner.concentrations): 0.3, id(inner.temperature): 0.5})
    assert setup is prob_dml.setup and name == "toy-kl-nivmf-released-g0.5-seed0"


def test_the_density_is_the_default_form(monkeypatch):
    assert prob_dml.ProbabilisticProxies(3, 4).form == "exact"
    _, criterion, name, _ = started(monkeypatch, prob_dml, "--dataset", "toy")
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
    row = {**prob_dml.PAPER, **prob_dml.ABLATION, **prob_dml.ABLATIONS["elk/nivmf"]}
    assert (row["concentration_init"], row["norm_multiplier"], row["temperature"], row["samples"]) == (50, 150, 1, 10)


def test_options_without_a_sense_together_are_named_before_the_training(monkeypatch):
    with pytest.raises(UserError, match="knows no concentration"):
        started(monkeypatch, prob_dml, "--dataset", "cub200", "--metric", "cosine", "--proxy", "nivmf")


def test_a_zero_vector_gets_the_first_axis_and_a_short_one_its_own_direction():
    x = torch.tensor([[0.0, 0, 0], [0, 3e-6, 4e-6]], requires_grad=True)
    units = prob_dml.unit_vectors(x)
    torch.testing.assert_close(units, torch.tensor([[1, 0, 0], [0, 0.6, 0.8]]))
    gradient, = torch.autograd.grad(units.sum(), x)
    assert (gradient[0] == 0).all()


def test_a_second_derivative_of_samples_is_refused_rather_than_wrong():
    mu = F.normalize(torch.ones(1, 3)).requires_grad_()
    z = prob_dml.sample_vmf(mu, torch.ones(1), 1)
    gradient, = torch.autograd.grad((z ** 2).sum(), mu, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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
