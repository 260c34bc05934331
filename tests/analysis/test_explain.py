"""Attention weights and path shares against the layers' own outputs and the formulas."""

import pytest
import timm
import torch
from torch import nn

import acmix
from acmix.analysis.explain import attention_weights, explain, path_share, values_and_attention
from acmix.layers.mix import FixedMix
from acmix.layers.patchwise import PatchwiseACmix
from acmix.layers.reduced import ReducedACmix
from acmix.layers.window import WindowACmix

DOUBLE = {"dtype": torch.float64}
IMAGE = torch.linspace(0, 50, 8 * 9 * 10, dtype=torch.float64).sin().view(1, 8, 9, 10)
TOKENS = IMAGE.permute(0, 2, 3, 1)
LAYERS = {
    "window": (lambda: acmix.ACmix2d(8, 16, kernel_att=3, **DOUBLE), (IMAGE,)),
    "small map": (lambda: acmix.ACmix2d(8, 16, **DOUBLE), (IMAGE[..., :2, :3],)),
    "stride": (lambda: acmix.ACmix2d(8, 16, kernel_att=3, stride=2, **DOUBLE), (IMAGE,)),
    "swin": (
        lambda: WindowACmix(8, heads=2, window_size=(3, 5), shift_size=(1, 2), **DOUBLE),
        (TOKENS,),
    ),
    "pvt": (
        lambda: ReducedACmix(8, heads=2, reduction=3, **DOUBLE),
        (TOKENS.flatten(1, 2), (9, 10)),
    ),
    "san": (
        lambda: PatchwiseACmix(8, 16, kernel_att=3, share_planes=4, **DOUBLE).eval(),
        (IMAGE,),
    ),
}


def of_a_map(layer, out):
    """A layer's output on its map, (1, C, Ho, Wo)."""
    if isinstance(layer, ReducedACmix):
        return out.transpose(1, 2).unflatten(2, (9, 10))
    return out.permute(0, 3, 1, 2) if isinstance(layer, WindowACmix) else out


def attention_of(layer, given):
    """The attention path by the layer itself."""
    layer.mix = FixedMix(1.0, 0.0)
    with torch.no_grad():
        return of_a_map(layer, layer(*given))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pixel", [(0, 0), (1, 2), (-1, -1)])
def test_weights_times_values_are_the_attention_of_the_layer(name, pixel):
    make, given = LAYERS[name]
    layer = make()
    values, out = values_and_attention(layer, *given)
    weights = attention_weights(layer, pixel, *given)
    assert weights.shape == values.shape[1:2] + values.shape[3:]
    expected = torch.einsum("nhw,ndhw->nd", weights, values[0])
    torch.testing.assert_close(expected, out[0, ..., pixel[0], pixel[1]])
    if name == "san":  # a channel has the weights of its number modulo theirs
        expected = expected.t()
    expected = expected.flatten()
    if getattr(layer, "proj", None) is not None:
        expected = layer.proj(expected)
    torch.testing.assert_close(expected, attention_of(layer, given)[0, :, pixel[0], pixel[1]])


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "san"])
def test_weights_sum_to_one(name):
    make, given = LAYERS[name]
    weights = attention_weights(make(), (1, 1), *given)
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones_like(weights[:, 0, 0]))
    assert (weights >= 0).all()


def test_weights_are_the_softmax_over_the_window():
    layer = acmix.ACmix2d(8, 16, kernel_att=3, position=False, **DOUBLE)
    [(weight, bias)] = layer._projections()
    pieces = torch.einsum("jci,bihw->bjchw", weight, IMAGE) + bias[..., None, None]
    q, k, _ = pieces.chunk(3, 1)
    logits = torch.einsum("nd,ndhw->nhw", q[0, ..., 4, 5], k[0, ..., 3:6, 4:7]) * 4**-0.5
    weights = attention_weights(layer, (4, 5), IMAGE)
    torch.testing.assert_close(weights[:, 3:6, 4:7], logits.flatten(1).softmax(1).view(4, 3, 3))
    assert weights.count_nonzero() == 4 * 9


def test_a_shifted_window_lies_where_it_is_on_the_map():
    make, given = LAYERS["swin"]
    weights = attention_weights(make(), (5, 8), *given)
    # Rolled by (1, 2), the windows of 3 x 5 begin at rows 1, 4, 7 and columns 2, 7 of the map. What
    # the roll has brought in from the other border has weights of e^-100.
    rows, columns = (weights.sum(0) > 1e-9).nonzero(as_tuple=True)
    assert (rows.min(), rows.max()) == (4, 6)
    assert (columns.min(), columns.max()) == (7, 9)


def test_a_padded_window_gives_weight_to_its_padding():
    layer = WindowACmix(8, heads=2, window_size=7, **DOUBLE)
    weights = attention_weights(layer, (8, 9), TOKENS)
    assert (weights.sum((1, 2)) < 1).all()
    assert weights[:, :7].count_nonzero() == weights[..., :7].count_nonzero() == 0


def test_a_class_token_is_left_out():
    layer = ReducedACmix(8, heads=2, **DOUBLE)
    tokens = torch.cat([torch.ones(1, 1, 8, dtype=torch.float64), TOKENS.flatten(1, 2)], 1)
    weights = attention_weights(layer, (0, 0), tokens, (9, 10))
    assert weights.shape == (2, 9, 10)
    assert ((weights.sum((1, 2)) < 1) & (weights.sum((1, 2)) > 0.9)).all()
    assert path_share(layer, tokens, (9, 10)).shape == (9, 10)


@pytest.mark.parametrize("name", LAYERS)
def test_share_is_that_of_the_norms(name):
    make, given = LAYERS[name]
    layer = make()
    nn.init.constant_(layer.mix.alpha, -0.3)
    share = path_share(layer, *given)
    with torch.no_grad():
        out = of_a_map(layer, layer(*given))
    attention = -0.3 * attention_of(layer, given)
    sizes = attention[0].norm(dim=0), (out - attention)[0].norm(dim=0)
    torch.testing.assert_close(share, sizes[0] / (sizes[0] + sizes[1]))


@pytest.mark.parametrize(("mix", "share"), [("attention", 1.0), ("convolution", 0.0)])
def test_share_of_one_path(mix, share):
    layer = acmix.ACmix2d(8, 16, mix=mix, **DOUBLE)
    assert (path_share(layer, IMAGE) == share).all()


@pytest.mark.parametrize(
    ("name", "operators"),
    [("resnet11_tiny_acmix", 3), ("pvt_tiny_acmix", 8), ("swin_tiny_acmix", 12)],
)
def test_every_operator_of_a_network_is_viewed_and_left_as_it_was(name, operators):
    network = timm.create_model(name, num_classes=3, in_chans=1).eval()
    image = torch.randn(1, 1, 32, 40)
    before = network(image)
    views = explain(network, image, (8, 39))
    assert len(views) == operators
    for view in views:
        assert view.share.min() >= 0
        assert view.share.max() <= 1
        height, width = view.share.shape
        assert view.pixel == (height // 4, width - 1)
    assert torch.equal(network(image), before)


def test_chosen_layers():
    network = timm.create_model("resnet11_tiny_acmix").eval()
    [view] = explain(network, torch.randn(1, 1, 8, 8), (0, 0), ["layer2.0.conv2"])
    assert view.layer == "layer2.0.conv2"


@pytest.mark.parametrize(
    ("name", "pixel", "layers", "message"),
    [
        ("resnet11_tiny_acmix", (8, 0), (), r"pixel: expected one of an image of \(8, 8\)"),
        ("resnet11_tiny_acmix", (0, 0), ("x",), "layers: expected some of layer1.0.conv2, .*got x"),
        ("resnet11_tiny_conv", (0, 0), (), "network: expected layers of ACmix2d, .*got none"),
    ],
)
def test_mistakes(name, pixel, layers, message):
    network = timm.create_model(name).eval()
    with pytest.raises(ValueError, match=message):
        explain(network, torch.randn(1, 1, 8, 8), pixel, layers)
