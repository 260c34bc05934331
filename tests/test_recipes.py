"""Every recipe, through the command's parser: it builds, and its numbers are the published ones."""

from pathlib import Path

import pytest
import timm
import torch
from data.mask_folders import write
from data.scenes import write_coco
from PIL import Image

from acmix.cli import main
from acmix.tasks.command import TrainingCLI

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
HEADER = ("source", "command", "hardware", "measured")
# Images a step, learning rate, weight decay, epochs: Pan et al., CVPR 2022, supplement B.
PUBLISHED = {
    "imagenet_sgd": (256, 0.1, 1e-4, 100),
    "imagenet_pvt": (1024, 1e-3, 0.05, 300),
    "imagenet_swin": (1024, 1e-3, 0.05, 300),
}
# Images a step, learning rate, steps of warm-up and in all, power of the schedule: the same.
BY_STEPS = {
    "ade20k_semantic_fpn_pvt": (16, 1e-4, 0, 80_000, 0.9),
    "ade20k_upernet_swin": (16, 6e-5, 1500, 160_000, 1.0),
}
# Detector, optimizer, learning rate, epochs and those after which the rate falls: the same.
ON_COCO = {
    "coco_retinanet_resnet_1x": ("retinanet", "sgd", 0.01, 12, [8, 11]),
    "coco_retinanet_san_1x": ("retinanet", "sgd", 0.01, 12, [8, 11]),
    "coco_retinanet_pvt_1x": ("retinanet", "adamw", 1e-4, 12, [8, 11]),
    "coco_retinanet_pvt_3x": ("retinanet", "adamw", 1e-4, 36, [27, 33]),
    "coco_mask_rcnn_swin_1x": ("mask_rcnn", "adamw", 1e-4, 12, [8, 11]),
    "coco_mask_rcnn_swin_3x": ("mask_rcnn", "adamw", 1e-4, 36, [27, 33]),
    "coco_cascade_mask_rcnn_swin_1x": ("cascade_mask_rcnn", "adamw", 1e-4, 12, [8, 11]),
    "coco_cascade_mask_rcnn_swin_3x": ("cascade_mask_rcnn", "adamw", 1e-4, 36, [27, 33]),
}
NETWORKS = {
    "coco_retinanet_resnet_1x": ("resnet50",),
    "coco_retinanet_san_1x": ("san15",),
    **dict.fromkeys(("coco_retinanet_pvt_1x", "coco_retinanet_pvt_3x"), ("pvt_tiny", "pvt_small")),
    **dict.fromkeys((name for name in ON_COCO if "swin" in name), ("swin_tiny", "swin_small")),
    "imagenet_sgd": ("resnet26", "resnet38", "resnet50", "san10", "san15", "san19"),
    "imagenet_pvt": ("pvt_tiny", "pvt_small"),
    "imagenet_swin": ("swin_tiny", "swin_small"),
    "ade20k_semantic_fpn_pvt": ("pvt_tiny", "pvt_small"),
    "ade20k_upernet_swin": ("swin_tiny", "swin_small"),
}
ON_ONE_CPU = [
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"),
    *("--trainer.precision", "32-true"),
]


SMALL = {  # of the tasks whose images are large
    "segmentation": [
        *("--data.resize", "40", "--data.test_size", "40", "--data.crop", "64"),
        *("--model.class_weights", "null"),
    ],
    "detection": [
        *("--data.train_sizes", "[64]", "--data.test_size", "64", "--data.max_size", "96"),
    ],
}


def task_of(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("task:")]
    return lines[0].split()[1] if lines else "classification"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes, four pictures to learn from and one held out of each; and pairs with masks."""
    folder = tmp_path_factory.mktemp("pictures")
    for part in ("training", "validation"):
        for number in range(16):
            write(folder, f"{number}", None, None, f"images/{part}", f"annotations/{part}")
    (folder / "classes.txt").write_text("dark\nlight\n")
    write_coco(folder)
    for part, count in {"train": 4, "val": 1, "test": 1}.items():
        for number, name in enumerate(("dark", "light")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                grey = (200 * number + index,) * 3
                Image.new("RGB", (40, 40), grey).save(folder / part / name / f"{index}.png")
    return folder


def options(recipe, pictures, *more):
    args = ["--config", str(recipe), *ON_ONE_CPU]
    if recipe.stem != "digits":
        args += ["--data.source", str(pictures), "--data.num_workers", "0"]
        args += SMALL.get(task_of(recipe), [])
    return [*args, *more]


def recipe(name):
    return next(path for path in RECIPES if path.stem == name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_says_where_from_how_and_what_came(path):
    lines = [line[1:].split() for line in path.read_text().splitlines() if line.startswith("#")]
    first = [words[0] for words in lines if words]
    assert [word for word in first if word in HEADER] == list(HEADER)
    assert {"published", "expected"} & set(first)
    assert f"recipes/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds(path, pictures, tmp_path):
    cli = TrainingCLI("fit", options(path, pictures, "--run", str(tmp_path / "run")))
    task, data, trainer = cli.model, cli.datamodule, cli.trainer
    trainer.datamodule = data
    rate, meant_for = task.hparams["lr"], task.hparams["lr_batch_size"]
    task._trainer = trainer
    optimizer = task._create_optimizer()
    expected = rate * data.batch_size / meant_for if meant_for else rate
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(expected)] * 2
    image, _ = data.train_set()[0]
    if task.task == "detection":
        assert set(task.eval()([image])[0]) >= {"boxes", "scores", "labels"}
        return
    assert task.eval()(image[None]).shape[:2] == (1, len(data.class_names))


@pytest.mark.parametrize("name", PUBLISHED)
def test_step_of_the_published_size_has_the_published_rate(name, pictures):
    cli = TrainingCLI("fit", options(recipe(name), pictures))
    hp, data = cli.model.hparams, cli.datamodule
    assert "  devices: 8\n" in recipe(name).read_text()
    found = (8 * data.batch_size, hp["lr"], hp["weight_decay"], cli.trainer.max_epochs)
    assert found == PUBLISHED[name]
    assert hp["lr_batch_size"] == 8 * data.batch_size


@pytest.mark.parametrize("name", BY_STEPS)
def test_steps_are_the_published_ones(name, pictures):
    cli = TrainingCLI("fit", options(recipe(name), pictures))
    hp, batch_size = cli.model.hparams, cli.datamodule.batch_size
    assert "  devices: 8\n" in recipe(name).read_text()
    assert (hp["sched"], hp["opt"], cli.trainer.max_epochs) == ("poly", "adamw", -1)
    steps, power = cli.trainer.max_steps, hp["sched_kwargs"]["decay_rate"]
    found = (8 * batch_size, hp["lr"], hp["warmup_steps"], steps, power)
    assert found == BY_STEPS[name]


@pytest.mark.parametrize("name", ON_COCO)
def test_epochs_on_coco_are_the_published_ones(name, pictures):
    cli = TrainingCLI("fit", options(recipe(name), pictures))
    hp, data = cli.model.hparams, cli.datamodule
    assert "  devices: 8\n" in recipe(name).read_text()
    assert (8 * data.batch_size, hp["lr_batch_size"], hp["warmup_steps"]) == (16, 16, 500)
    assert "test_size: 800\n    max_size: 1333\n" in recipe(name).read_text()
    falls = hp["sched_kwargs"]["decay_milestones"]
    found = (hp["detector"], hp["opt"], hp["lr"], cli.trainer.max_epochs, falls)
    assert found == ON_COCO[name]


@pytest.mark.parametrize("family", NETWORKS)
def test_networks_of_a_header_exist(family):
    text = recipe(family).read_text()
    for network in NETWORKS[family]:
        assert f"#               {network} " in text
        assert timm.is_model(f"{network}_attn")
        assert timm.is_model(f"{network}_acmix")


@pytest.mark.parametrize("name", ["digits", "cifar10_cpu"])
def test_small_recipe_takes_a_step(name, pictures, tmp_path):
    limits = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"]
    small = [] if name == "digits" else ["--data.batch_size", "4"]
    run = tmp_path / "run"
    assert main(["fit", *options(recipe(name), pictures, "--run", str(run), *small, *limits)]) == 0
    assert (run / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
def test_warm_start_from_a_checkpoint_and_going_on_without_it(pictures, tmp_path):
    small = ["--data.batch_size", "4", "--trainer.limit_val_batches", "1"]
    still = ["--model.sched", "none", "--model.lr", "0", "--model.weight_decay", "0"]
    source, run = tmp_path / "source", tmp_path / "run"

    def fit(folder, *more):
        chosen = options(recipe("cifar10_cpu"), pictures, "--run", str(folder), *small, *more)
        return main(["fit", *chosen])

    conv = ["--model.name", "resnet26_small_conv"]
    assert fit(source, *conv, "--model.ema_decay", "0.5") == 0
    checkpoint = source / "checkpoints" / "last.ckpt"
    assert fit(run, *still, "--model.warm_start", str(checkpoint)) == 0
    theirs = torch.load(checkpoint, weights_only=True)["state_dict"]
    ours = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    key = "layer1.0.conv1.weight"
    assert torch.equal(ours[f"net.{key}"], theirs[f"ema.module.{key}"])
    checkpoint.unlink()  # a run that goes on has no more need of it
    more = ["--model.warm_start", str(checkpoint), "--trainer.max_epochs", "2"]
    assert fit(run, *still, *more, "--ckpt_path", "last") == 0


@pytest.mark.parametrize("source", ["resnet26_conv", "resnet5O", "broken.ckpt"])
def test_warm_start_from_nothing_is_one_line(source, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.ckpt").write_bytes(b"no checkpoint")
    chosen = options(recipe("cifar10_cpu"), pictures, "--model.warm_start", source)
    assert main(["fit", *chosen, "--data.batch_size", "4"]) == 2
    message = capsys.readouterr().err
    assert "model.warm_start" in message
    assert source in message
    assert len(message.strip().splitlines()) == 1
