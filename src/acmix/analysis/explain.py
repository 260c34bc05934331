"""Where the attention of each operator looks, and which of its two paths speaks, for one image.

Attention is linear in its values, so the weight that a pixel gives to another is the derivative of
its output by the value there. That folds the reflected border back onto the map, and undoes the
rolling of shifted windows, without a formula for either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from acmix.layers import ACmix2d
from acmix.layers._sizes import crop
from acmix.layers.mix import FixedMix
from acmix.layers.patchwise import PatchwiseACmix
from acmix.layers.reduced import ReducedACmix
from acmix.layers.window import WindowACmix, roll
from acmix.ops.acmix._plan import Sizes, project_pieces, split
from acmix.ops.partition_attention import reference as partition_attention
from acmix.ops.window_attention import reference as window_attention


class LayerView(NamedTuple):
    """What one operator does with an image.

    pixel: row and column on its map of outputs. weights: that this pixel gives to the map of keys
    in each head, (N, H, W); None without attention. share: part of attention in each output,
    |alpha F_att| / (|alpha F_att| + |beta F_conv|), norms over the channels: (Ho, Wo).
    """

    layer: str
    pixel: tuple[int, int]
    weights: Tensor | None
    share: Tensor


def explain(
    network: nn.Module, image: Tensor, pixel: tuple[int, int], layers: Sequence[str] = ()
) -> list[LayerView]:
    """A view of every operator, in the order of the modules.

    The operators are `ACmix2d`, `WindowACmix`, `ReducedACmix` and `PatchwiseACmix`. The weights of
    the last have any sign and sum; of the others they sum to 1, less what a padded window or a
    class token gets.

    Args:
        network: in eval mode.
        image: (1, C, H, W), as the network takes it.
        pixel: row and column of the image.
        layers: names of the operators, as `named_modules` has them; all by default.

    Raises:
        ValueError: for a network without such operators, an unknown layer, and a pixel outside.
    """
    for place, side in zip(pixel, image.shape[2:], strict=True):
        if not 0 <= place < side:
            size = tuple(image.shape[2:])
            raise ValueError(f"pixel: expected one of an image of {size}, got {tuple(pixel)}")
    chosen = choose_layers(network, layers)
    inputs: dict[str, tuple[Any, ...]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda layer, given: inputs.update({name: given})

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in chosen.items()]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    where = [(place + 0.5) / side for place, side in zip(pixel, image.shape[2:], strict=True)]
    return [_view(name, chosen[name], given, where) for name, given in inputs.items()]


def choose_layers(network: nn.Module, names: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The operators of these names, or all."""
    kinds = tuple(ATTENTION)
    found = {name: layer for name, layer in network.named_modules() if isinstance(layer, kinds)}
    if not found:
        expected = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"network: expected layers of {expected}, got none")
    for name in names:
        if name not in found:
            raise ValueError(f"layers: expected some of {', '.join(found)}, got {name}")
    return {name: layer for name, layer in found.items() if not names or name in names}


def _view(name: str, layer: Any, given: tuple[Any, ...], where: Sequence[float]) -> LayerView:
    share = path_share(layer, *given)
    row, column = (int(part * side) for part, side in zip(where, share.shape, strict=True))
    weights = None
    if layer.mix.weights()[0] is not None:
        weights = attention_weights(layer, (row, column), *given)
    return LayerView(name, (row, column), weights, share)


def attention_weights(layer: nn.Module, pixel: tuple[int, int], *given: Any) -> Tensor:
    """Weights of each head of an output pixel, on the map of keys: (N, H, W). given: its inputs."""
    with torch.enable_grad():
        values, out = values_and_attention(layer, *given)
        # A weight is the same for all channels of a head: one of them tells it.
        [weights] = torch.autograd.grad(out[0, :, 0, pixel[0], pixel[1]].sum(), values)
    return weights[0, :, 0]


def values_and_attention(layer: nn.Module, *given: Any) -> tuple[Tensor, Tensor]:
    """The values (1, N, d, H, W), a leaf, and attention (1, N, d, Ho, Wo) before any projection."""
    return next(of for kind, of in ATTENTION.items() if isinstance(layer, kind))(layer, *given)


def _windowed(layer: ACmix2d, x: Tensor) -> tuple[Tensor, Tensor]:
    sizes = Sizes(layer.heads, layer.kernel_att, layer.stride, layer.dilation)
    pieces = project_pieces(x, layer.qkv_weight, layer.qkv_bias, sizes)
    q, k, v = split(pieces, sizes.stride)
    v = _leaf(v)
    return v, window_attention.forward(
        q, k, v, layer.position_weight, sizes.window, sizes.stride, sizes.dilation
    )


def _partitioned(layer: WindowACmix, x: Tensor) -> tuple[Tensor, Tensor]:
    size, shift = (x.shape[1], x.shape[2]), layer._shift(x)

    def padded(x: Tensor) -> Tensor:
        """Rolled and padded, in the layer's order."""
        if layer.pad_first:
            return roll(layer._pad(x), shift, -1)
        return layer._pad(roll(x, shift, -1))

    def pieces(x: Tensor) -> Tensor:
        return layer.qkv(x).unflatten(-1, (3 * layer.heads, -1)).permute(0, 3, 4, 1, 2)

    v = _leaf(pieces(x).chunk(3, 1)[2])
    q, k, _ = pieces(padded(x)).chunk(3, 1)
    values = padded(v.flatten(1, 2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    rolled = torch.cat([q, k, values.unflatten(1, v.shape[1:3])], 1)
    out = partition_attention.forward(rolled, layer._position_bias(), layer.window_size, shift)
    if layer.pad_first:
        return v, crop(torch.roll(out, shift, (3, 4)), size, dim=3)
    return v, torch.roll(crop(out, size, dim=3), shift, (3, 4))


def _reduced(layer: ReducedACmix, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    extra = x.shape[1] - size[0] * size[1]
    k, v = layer.kv(layer._reduce(x, size)).chunk(2, 2)

    def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
        heads = tokens[:, extra:].unflatten(2, (layer.heads, -1)).unflatten(1, size)
        return heads.permute(0, 3, 4, 1, 2)

    values = _leaf(as_map(v, layer._reduced(size)))
    v = torch.cat([v[:, :extra], values.flatten(3).flatten(1, 2).transpose(1, 2)], 1)
    out = layer._attention(layer.q(x), torch.cat([k, v], 2))
    return values, as_map(out, size)


def _patchwise(layer: PatchwiseACmix, x: Tensor) -> tuple[Tensor, Tensor]:
    def heads(x: Tensor) -> Tensor:  # of SAN: the channels that share a weight
        return x.unflatten(1, (layer.share_planes, -1)).transpose(1, 2)

    values = _leaf(heads(layer.conv3(x)))
    v = values.transpose(1, 2).flatten(1, 2)
    return values, heads(layer._attention(layer.conv1(x), layer.conv2(x), v))


ATTENTION: dict[type[nn.Module], Callable[..., tuple[Tensor, Tensor]]] = {
    ACmix2d: _windowed,
    WindowACmix: _partitioned,
    ReducedACmix: _reduced,
    PatchwiseACmix: _patchwise,
}


def _leaf(values: Tensor) -> Tensor:
    return values.detach().requires_grad_()


@torch.no_grad()
def path_share(layer: Any, *given: Any) -> Tensor:
    """Part of attention in each output, 0 to 1: (Ho, Wo). given: the layer's inputs."""
    alpha, beta = layer.mix.weights()
    if alpha is None or beta is None:
        return torch.full_like(_size(layer, layer(*given), *given), float(beta is None))
    with _mixed(layer, 1.0, 0.0):
        attention = abs(alpha) * _size(layer, layer(*given), *given)
    with _mixed(layer, 0.0, 1.0):
        convolution = abs(beta) * _size(layer, layer(*given), *given)
    return attention / (attention + convolution).clamp_min(torch.finfo(attention.dtype).tiny)


@contextmanager
def _mixed(layer: Any, alpha: float, beta: float) -> Iterator[None]:
    """Within, the layer weighs its paths by these: the other at 0 leaves one alone."""
    own, layer.mix = layer.mix, FixedMix(alpha, beta)
    try:
        yield
    finally:
        layer.mix = own


def _size(layer: nn.Module, out: Tensor, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Norm over the channels of a layer's output, on its map: (Ho, Wo)."""
    if size is not None:  # tokens, a class token first
        return out[0, -size[0] * size[1] :].norm(dim=-1).unflatten(0, size)
    return out[0].norm(dim=-1 if isinstance(layer, WindowACmix) else 0)
