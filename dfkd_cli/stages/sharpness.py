"""How sharp the minimum is that a network's weights are in.

    L(w)      = mean cross-entropy of a network with weights w, with the labels of some training images
    sharpness = largest eigenvalue of the Hessian d^2 L / dw^2                     w: all weights

Yao, Gholami, Keutzer, Mahoney. PyHessian: Neural Networks Through the Lens of the Hessian. 2020. arXiv:1912.07145.

Training images, because theirs is the loss that training makes small, whatever else a student learned beside or instead
of labels. The network is in evaluation mode, so that BatchNorm is a fixed map, and in float32.

The eigenvalue comes from ARPACK's Lanczos iterations, to a relative tolerance of 1e-3, on products with the Hessian by
differentiating twice. They take a fraction of the products of power iteration, which besides finds the eigenvalue of
the largest modulus, that may be negative. It is no property of the function alone: a layer scaled up and the next one
scaled down give another one (Dinh et al., arXiv:1703.04933). Compare networks of one architecture, trained alike.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ArtifactError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.names import LoadedModel
from dfkd_cli.seeds import derive

TOLERANCE = 1e-3  # of the eigenvalue
VECTORS = 8  # of all weights, held at once
RESTARTS = 25  # each of fewer products than that


def sharpness(model: Classifier, images: Images, batch_size: int, seed: int) -> dict[str, Any]:
    """The largest eigenvalue of the Hessian of a network's loss.

    Args:
        model: Where the images are.
        images: Labelled as it counts its classes.
        batch_size: Images of one pass.
        seed: Of the first vector.

    Returns:
        ``sharpness``, None where it was not found, NaN where it is not finite; ``sharpness_products``, the number of
        products with the Hessian that were tried.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh  # half a second

    like, products = _weights(model.eval())[0], 0

    def multiply(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return product(model, images, batch_size, torch.from_numpy(vector.ravel()).to(like)).cpu().numpy()

    size = sum(weight.numel() for weight in _weights(model))
    random = torch.randn(size, generator=torch.Generator().manual_seed(derive("sharpness", seed)), dtype=like.dtype)
    start, value = multiply(random.numpy()), None
    if not np.isfinite(start).all():
        value = math.nan
    elif not start.any():
        value = 0.0  # so is the Hessian
    else:
        operator = LinearOperator((size, size), multiply, dtype=start.dtype)
        most: dict[str, Any] = {"ncv": min(VECTORS, size), "maxiter": RESTARTS, "tol": TOLERANCE}
        try:
            value = float(eigsh(operator, 1, which="LA", v0=start, return_eigenvectors=False, **most)[0])
        except ArpackNoConvergence:
            value = None
    return {"sharpness": value, "sharpness_products": products}


def product(model: Classifier, images: Images, batch_size: int, vector: Tensor) -> Tensor:
    """The Hessian of a network's loss times a vector, both of all its weights, (P,).

    Raises:
        RuntimeError: The loss cannot be differentiated twice.
    """
    weights = _weights(model)
    parts = torch.split(vector, [weight.numel() for weight in weights])
    with torch.enable_grad():
        for some in images.split(batch_size):
            loss = F.cross_entropy(model(some.pixels), some.true_labels, reduction="sum") / len(images.pixels)
            gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            slope = torch.stack([g.flatten() @ part for g, part in zip(gradients, parts, strict=True)]).sum()
            torch.autograd.backward(slope)  # `grad` passes over what is differentiable once only, without a word
    rows = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    return torch.cat([row.flatten() for row in rows])


def require_hessian(model: LoadedModel, images: Images) -> None:
    """Refuse what has no weights, or a loss without a second derivative; tried on the first two images, on the CPU.

    Raises:
        ArtifactError: It has none.
    """
    weights = _weights(model.classifier.eval())
    if not weights:
        raise ArtifactError(f"{model.path}: it has no weights, whose loss could be sharp", "leave out --sharpness")
    try:
        product(model.classifier, images[:2], 2, torch.ones(sum(weight.numel() for weight in weights)))
    except RuntimeError as error:
        why = str(error).partition("\n")[0][:200]
        what = f"{model.path}: its loss cannot be differentiated twice: {why}"
        raise ArtifactError(what, "leave out --sharpness") from error


def _weights(model: Classifier) -> list[Tensor]:
    """All weights, from now on with gradients."""
    return [weight.requires_grad_() for weight in model.parameters() if weight.is_floating_point()]
