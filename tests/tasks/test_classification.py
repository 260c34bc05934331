"""What a training step does beyond the loss: averaging, mixing, groups of weights, formats."""

import pytest
import timm
import torch
from lightning.pytorch import Trainer

from acmix.data import Digits
from acmix.tasks.base import is_convolutional
from acmix.tasks.classification import Classification

DIGITS = [str(digit) for digit in range(10)]


def classification(name="resnet11_tiny_conv", **options):
    torch.manual_seed(0)
    return Classification(name, DIGITS, in_chans=1, **options)


def trained(steps=2, batch_size=64, trainer=(), **options):
    """The task after some steps on digits, and its trainer."""
    task = classification(**options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    limits = {"max_epochs": 1, "limit_train_batches": steps, "limit_val_batches": 1}
    run = Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **quiet,
        **{**limits, **dict(trainer)},
    )
    run.fit(task, datamodule=Digits(batch_size=batch_size))
    return task, run


def test_average_of_the_weights_is_measured_and_predicts():
    task, _ = trained(steps=1, ema_decay=0.5, sched="none")
    start = classification().net
    weights = dict(task.net.named_parameters())
    # The first update takes the weights over; the second would be half of each.
    for name, average in task.ema.module.named_parameters():
        assert torch.equal(average, weights[name]), name
    task.ema.update(start, step=2)
    images = torch.randn(2, 1, 8, 8)
    for (name, average), first in zip(
        task.ema.module.named_parameters(), start.parameters(), strict=True
    ):
        assert torch.allclose(average, (weights[name] + first) / 2), name
    task.eval()
    assert torch.equal(task(images), task.ema.module(images))
    assert not torch.equal(task(images), task.net.eval()(images))


def test_average_is_kept_with_the_checkpoint():
    names = classification(ema_decay=0.9).state_dict()
    assert "ema.module.conv1.0.weight" in names or "ema.module.conv1.weight" in names
    assert not any(name.startswith("ema") for name in classification().state_dict())


def test_mixed_images_have_classes_in_proportion():
    task = classification(mixup=1.0)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8).clone()
    mixed, targets = task._mix(images, torch.arange(4))
    share = targets[0, 0]
    assert 0 < share < 1
    assert torch.allclose(targets.sum(dim=1), torch.ones(4))
    assert torch.allclose(mixed[0], 3 * (1 - share).expand(1, 8, 8))


def test_an_odd_batch_cannot_be_mixed():
    with pytest.raises(ValueError, match="expected even for mixup, got 63 images"):
        trained(batch_size=63, cutmix=1.0)


@pytest.mark.parametrize(("lr_batch_size", "lr"), [(None, 0.1), (64, 0.2), (256, 0.05)])
def test_learning_rate_grows_with_the_images_a_step(lr_batch_size, lr):
    options = {"opt": "sgd", "lr": 0.1, "sched": "none", "lr_batch_size": lr_batch_size}
    _, run = trained(trainer={"accumulate_grad_batches": 2}, **options)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr)


def test_vectors_and_what_the_network_names_go_without_weight_decay():
    task, run = trained(name="resnet11_tiny_acmix", weight_decay=0.5)
    named = {id(weight): name for name, weight in task.net.named_parameters()}
    excepted = task.net.no_weight_decay()
    for group in run.optimizers[0].param_groups:
        for weight in group["params"]:
            name = named.pop(id(weight))
            free = weight.ndim <= 1 or name in excepted
            assert group["weight_decay"] == (0.0 if free else 0.5), name
    assert named == {}


def test_layers_near_the_images_learn_slower():
    task, run = trained(layer_decay=0.5)
    groups = run.optimizers[0].param_groups
    scale = {id(weight): group["lr_scale"] for group in groups for weight in group["params"]}
    weights = dict(task.net.named_parameters())
    names = ("layer1.0.conv1.weight", "layer3.0.conv1.weight", "fc.weight")
    first, third, head = (scale[id(weights[name])] for name in names)
    assert 0 < first < third < head == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet11_tiny_conv", True),
        ("resnet50_acmix", True),
        ("san10_acmix", True),
        ("vit_tiny_patch16_224", False),
        ("pvt_tiny_acmix", False),
        ("swin_tiny_acmix", False),
    ],
)
def test_convolutional_networks_are_known(name, expected):
    with torch.device("meta"):
        assert is_convolutional(timm.create_model(name)) == expected


@pytest.mark.parametrize("channels_last", [None, True, False])
def test_memory_format(channels_last):
    task = classification(channels_last=channels_last)
    seen = []
    task.net.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 1, 8, 8)
    logits = task.eval()(images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == (channels_last is not False)
    assert torch.allclose(logits, classification(channels_last=False).eval()(images), atol=1e-5)


def test_a_compiled_network_keeps_its_names():
    task = classification(compile=True)
    names = list(task.state_dict())
    task.configure_model()
    assert task.net._compiled_call_impl is not None
    assert list(task.state_dict()) == names


@pytest.mark.parametrize("option", ["ema_kwargs", "mixup_kwargs"])
def test_unknown_arguments_are_named(option):
    with pytest.raises(ValueError, match=f"model.{option}: "):
        classification(**{option: {"foo": 1}}, ema_decay=0.9, mixup=0.1)
