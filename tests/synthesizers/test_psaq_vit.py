"""PSAQ-ViT against NumPy: what attention gives to patches, the entropy of their similarities, whole iterations."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from scipy.integrate import trapezoid
from tiny_synthesizers import synthesizer
from torch import nn

from dfkd_cli.models.activations import values_at
from dfkd_cli.models.attention import attention_layers
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.registry import build
from dfkd_cli.synthesizers.base import Look
from dfkd_cli.synthesizers.psaq_vit import patch_entropy

RNG = np.random.default_rng(0)
SIZE = (2, 8, 8)
MEAN, STD = (0.2, 0.4), (0.5, 0.3)


def transformer(spec: str = "vit-2-64", size: tuple[int, int, int] = SIZE, classes: int = 3) -> Classifier:
    """As if trained: position embeddings and heads are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = build(spec, classes, size)
        for parameter in net.parameters():
            if parameter.ndim == 1 or parameter.abs().max() == 0:
                parameter.data += 0.1 * torch.randn_like(parameter)
    channels = size[0]
    info = ModelInfo(spec, classes, size, mean=(MEAN * 2)[:channels], std=(STD * 2)[:channels])
    return Classifier(net, info).eval()


def entropy(values: list[np.ndarray], bandwidth: float, points: int, among: list[np.ndarray] | None = None) -> float:
    """The entropy as the paper has it; the ends of the interval are those of other values, where these are given."""
    total = 0.0
    for each, ends in zip(values, among or values, strict=True):
        low, high = (f(cosines(ends)) for f in (np.min, np.max))
        places = np.array([low + (high - low) * i / (points - 1) for i in range(points)])
        single = []
        for image in cosines(each):
            kernels = np.exp(-((places[:, None] - image.reshape(1, -1)) ** 2) / (2 * bandwidth**2))
            density = kernels.mean(1) / np.sqrt(2 * np.pi * bandwidth**2) + 1e-4
            single.append(trapezoid(-density * np.log(density), places))
        total += np.mean(single)
    return total


def cosines(values: np.ndarray) -> np.ndarray:
    """The similarities (B, N, N) of rows of (B, N, D)."""
    norms = np.linalg.norm(values, axis=2)
    return np.einsum("bnd,bmd->bnm", values, values) / (norms[:, :, None] * norms[:, None])


@pytest.mark.parametrize(("bandwidth", "points"), [(0.01, 10), (0.2, 10), (0.05, 31), (0.5, 2)])
@pytest.mark.parametrize("shapes", [[(3, 5, 4)], [(2, 9, 6), (2, 4, 3)], [(1, 2, 2)]])
def test_the_entropy_is_the_papers(shapes, bandwidth, points):
    values = [RNG.normal(size=shape) for shape in shapes]
    inputs = [torch.tensor(value, requires_grad=True) for value in values]
    np.testing.assert_allclose(
        patch_entropy(inputs, bandwidth, points).item(), entropy(values, bandwidth, points), rtol=1e-6
    )
    if bandwidth < 0.05:
        return  # narrower than what numerical differences see
    (gradient,) = torch.autograd.grad(patch_entropy(inputs, bandwidth, points), inputs[:1])

    def loss(first):
        return entropy([first, *values[1:]], bandwidth, points, values)  # the places have no gradient

    expected = oracles.numerical_gradient(loss, values[0])
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * max(np.abs(expected).max(), 1))


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """softmax(q k / sqrt(d)) v of (B, heads, N, d), mean over the heads."""
    scores = np.einsum("bhnd,bhmd->bhnm", query, key) / np.sqrt(query.shape[3])
    return np.einsum(
        "bhnm,bhmd->bhnd", oracles.softmax(scores.reshape(-1, scores.shape[3])).reshape(scores.shape), value
    ).mean(1)


def split(tokens: np.ndarray, heads: int) -> np.ndarray:
    return tokens.reshape(*tokens.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def test_what_pytorchs_attention_gives_to_patches():
    teacher = transformer()
    layers = attention_layers(teacher)
    assert list(layers) == [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    assert [layer.prefix for layer in layers.values()] == [1, 1]
    with torch.no_grad(), values_at({path: layer.tap for path, layer in layers.items()}) as seen:
        teacher.net(torch.randn(3, *SIZE))
    for path, layer in layers.items():
        x, inner = seen[path].double().numpy(), layer.layer
        weight, bias = inner.in_proj_weight.detach().double().numpy(), inner.in_proj_bias.detach().double().numpy()
        parts = np.split(x @ weight.T + bias, 3, axis=2)
        values = attend(*(split(part, 2) for part in parts))
        assert values.shape == (3, 17, 32)
        np.testing.assert_allclose(layer.patches(seen[path]).detach(), values[:, 1:], atol=1e-5)
        whole, _ = inner(*[seen[path]] * 3)  # and what the layer makes of it: the projection of all heads
        assert whole.shape == (3, 17, 64)


@pytest.mark.parametrize(
    ("spec", "prefix", "layers"),
    [
        ("timm:vit_tiny_patch16_224", 1, 12),
        ("timm:deit_tiny_distilled_patch16_224", 2, 12),
        ("timm:vit_medium_patch16_reg4_gap_256", 4, 12),
        ("timm:swin_tiny_patch4_window7_224", 0, 12),
        ("torchvision:vit_b_32", 1, 12),
    ],
)
def test_attention_of_other_makers_is_found(spec, prefix, layers):
    if spec.startswith("timm:"):
        pytest.importorskip("timm")
    side = 256 if spec.endswith("256") else 224
    teacher = Classifier(
        build(spec, 5, (3, side, side)).eval(), ModelInfo(spec, 5, (3, side, side), (0.5,) * 3, (0.5,) * 3)
    )
    found = attention_layers(teacher)
    assert len(found) == layers
    assert {layer.prefix for layer in found.values()} == {prefix}
    path, layer = next(iter(found.items()))
    with torch.no_grad(), values_at({path: layer.tap}) as seen:
        teacher.net(torch.randn(1, 3, side, side))
    values = layer.patches(seen[path])
    assert values.shape[1] in (49, (side // 16) ** 2)
    if not isinstance(layer.layer, nn.MultiheadAttention):  # timm's: what goes into the projection, of every head
        heads = seen[path].view(*seen[path].shape[:2], layer.layer.num_heads, -1)
        torch.testing.assert_close(values, heads.mean(2)[:, prefix:])


@pytest.mark.parametrize(
    "values",
    [
        {"iterations": 4, "warmup": 1, "bandwidth": 0.1},
        {"iterations": 3, "total_variation": 0.0, "bandwidth": 0.3, "points": 6, "temperature": 3.0},
        {"iterations": 2, "patch_entropy": 0.0, "schedule": "constant", "clamp": False},
    ],
)
def test_images_are_those_of_the_papers_optimisation(values, tmp_path):
    teacher = transformer("vit-1-32")
    settings = {"jitter": 0, "view_flip": False, "lr": 0.05, "warmup": 0, "variation": (0.4, 0.5)} | values
    method = synthesizer("psaq-vit", tmp_path, teacher, **settings)
    config = method.config
    torch.manual_seed(3)
    targets = method.targets(0, 2)
    aim = float(targets.variation) * np.sqrt(2 * np.prod(SIZE))
    assert config.variation[0] <= float(targets.variation) <= config.variation[1]
    torch.manual_seed(3)
    made = method.make(0, 2)
    torch.manual_seed(3)
    method.targets(0, 2)
    x = method.start(2).double().numpy()
    exact = transformer("vit-1-32").double()
    attention = exact.net.encoder.layers.encoder_layer_0.self_attention
    weight, bias = attention.in_proj_weight.detach().numpy(), attention.in_proj_bias.detach().numpy()

    def look(images):
        seen = {}
        with torch.no_grad(), attention.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0].numpy())):
            logits = exact.net(torch.from_numpy(images)).numpy()
        return logits, attend(*(split(part, 1) for part in np.split(seen["x"] @ weight.T + bias, 3, axis=2)))[:, 1:]

    def loss(images, among):
        logits, patches = look(images)
        varies = oracles.image_priors(images)["total_variation"]
        return (
            oracles.impression_loss(logits, np.eye(3)[:2], config.temperature)
            + config.total_variation * abs(varies - aim)
            - config.patch_entropy * entropy([patches], config.bandwidth, config.points, [among])
        )

    def gradient(images):
        among = look(images)[1]
        return oracles.numerical_gradient(lambda each: loss(each, among), images)

    half = -(-config.iterations // 2)
    rates = [
        config.lr * oracles.inversion_rate(t, steps, min(config.warmup, steps), config.schedule)
        for steps in (half, config.iterations - half)
        for t in range(steps)
    ]
    mean, std = (np.reshape(part, (1, 2, 1, 1)) for part in (MEAN, STD))
    project = (lambda x: np.clip(x, -mean / std, (1 - mean) / std)) if config.clamp else (lambda x: x)
    expected = oracles.adam(x, gradient, rates.__getitem__, config.iterations, project, config.betas)
    assert np.abs(expected - x).max() > 0.05
    difference = np.abs(made.pixels.double().numpy() - (expected * std + mean))
    assert np.mean(difference > 1e-3) < 0.01  # Adam's first steps follow the sign of gradients that are nearly nothing
    assert torch.equal(made.targets, torch.eye(3)[:2])


@pytest.mark.parametrize("side", [8, 4])
def test_what_is_aimed_at_goes_with_the_resolution(side, tmp_path):
    """Images of half the side, which are made first, vary less."""
    method = synthesizer("psaq-vit", tmp_path, transformer("vit-1-32"), patch_entropy=0.0)
    targets, images = method.targets(0, 3), torch.rand(3, 2, side, side)
    found = float(method.terms(Look(images, torch.zeros(3, 3)), targets)["total_variation"])
    varies = oracles.image_priors(images.double().numpy())["total_variation"]
    assert found == pytest.approx(abs(varies - float(targets.variation) * np.sqrt(images.numel())), rel=1e-5)


def test_similarities_are_not_rounded_where_networks_are():
    values = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)) + 2  # near each other
    exact = patch_entropy([values], 0.01, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(patch_entropy([values], 0.01, 10), exact)


def test_what_attention_gives_is_not_rounded_where_networks_are(tmp_path):
    method = synthesizer("psaq-vit", tmp_path, transformer("vit-1-32"))
    images = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(0))
    with method.looking() as show:
        look = show(images)
    exact = method.terms(look, method.targets(0, 2))["patch_entropy"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.terms(look, method.targets(0, 2))["patch_entropy"], exact)


def test_rolls_are_shorter_in_the_first_half(tmp_path):
    method = synthesizer("psaq-vit", tmp_path, transformer(), jitter=4, view_flip=False)
    picture = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 2, -1, -1)

    def reach(progress):
        places = [np.argwhere(method.view(picture, progress)[0, 0].numpy() == 0)[0] for _ in range(300)]
        return max(int(min(at, 8 - at)) for place in places for at in place)

    assert (reach(0.0), reach(0.49), reach(0.5), reach(0.99)) == (2, 2, 4, 4)


def test_teachers_without_attention_are_told_what_works(cli, make_teacher, tmp_path):
    command = ["synthesize", "--method", "psaq-vit", "--teacher", make_teacher("resnet8"), "--out", tmp_path / "set"]
    code, _, err = cli(*command)
    assert code == 3 and "self-attention" in err and "deepinversion" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(("spec", "size", "fits"), [
    ("vit-6-128", (1, 28, 28), True), ("vit-2-64", (3, 16, 16), True), ("vit-2-64", (3, 30, 30), False),
    ("vit-2-64", (3, 32, 28), False), ("vit-2-50", (3, 32, 32), False),
])  # fmt: skip
def test_transformers_of_any_size(spec, size, fits, cli, tmp_path):
    command = ["train-teacher", "--dataset", "digits", "--model", spec, "--input-size", *size, "--steps", 1]
    code, _, err = cli(*command, "--out", tmp_path / "t")
    assert code == (0 if fits else 2), err
    assert fits or len(err.strip().splitlines()) == 1


class Foreign(nn.Module):
    """Attention of three makes: to itself, called with keywords, and to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.head = nn.Conv2d(2, 8, 2, 2), nn.Linear(8, 3)
        self.own, self.named, self.cross = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.cut(images).flatten(2).transpose(1, 2)
        x = x + self.own(x, x, x, need_weights=False)[0]
        x = x + self.named(query=x, key=x, value=x)[0]
        x = x + self.cross(x, x + 1, x + 1)[0]
        return self.head(x.mean(1))


def test_attention_that_cannot_be_read_is_left_out():
    teacher = Classifier(Foreign().eval(), ModelInfo("foreign", 3, SIZE, MEAN, STD))
    found = attention_layers(teacher)
    assert {path: layer.prefix for path, layer in found.items()} == {"own": 0}
