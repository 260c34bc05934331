"""Wrong command lines: one line that names the option, exit code 2, and nothing left behind."""

import shlex
from pathlib import Path

import pytest
from data.pictures import picture, write_folder

from acmix.cli import main

RECIPE = str(Path(__file__).parents[1] / "recipes" / "digits.yaml")
SHORT = {
    "{F}": f"fit --config {RECIPE}",
    "{P}": "fit --data Images --model.name resnet11_tiny_conv --data.img_size 8 --data.source pets",
    "{R}": RECIPE,
}
# COMMAND LINE => what the message must say. {F} is a good one on the digits, {P} on pictures.
WRONG = """
fit => model.name, data: expected a value
fit --model.name resnet11_tiny_conv => data: expected a value
fit --data Images --model.name resnet11_tiny_conv => data.source: expected a value for Images
fit --data Digits => model.name: expected a value
fit --data Imges --data.source pets --model.name resnet11_tiny_conv => did you mean Images?
{P} --data.img_size abc => data.img_size
{P} --data.img_size 0 => data.img_size
{P} --data.img_size -3 => data.img_size
{P} --data.img_size 1.5 => data.img_size
{P} --data.interpolation foo => data.interpolation
{P} --data.std [0,0,0] => data.std
{P} --data.mean [0.5] => data.mean
{P} --data.mean 0.5 => data.mean
{P} --data.std [0.1,0.2,abc] => data.std
{P} --data.scale [2,3] => data.scale
{P} --data.scale [0.5,0.1] => data.scale
{P} --data.scale 0.5 => data.scale
{P} --data.re_prob 3 => data.re_prob
{P} --data.hflip -1 => data.hflip
{P} --data.color_jitter -1 => data.color_jitter
{P} --data.auto_augment rnd => data.auto_augment
{P} --data.crop_pct 0 => data.crop_pct
{P} --data.crop_pct 2 => data.crop_pct
{P} --data.crop_padding -2 => data.crop_padding
{P} --data.max_corrupt -1 => data.max_corrupt
{P} --data.batch_size 0 => data.batch_size
{P} --data.batch_size big => data.batch_size
{P} --data.num_workers -1 => data.num_workers
{P} --data.split_seed -1 => data.split_seed
{P} --data.background whte => data.background
{P} --data.like resnet5000 => data.like
{P} --data.transform_kwargs.foo 3 => data.transform_kwargs
{P} --data.transform_kwargs 3 => data.transform_kwargs
{P} --data.shuffle_buffer -1 => data.shuffle_buffer
{P} --data.download maybe => data.download
{P} --data.sorce pets => did you mean data.source?
{P} --data.val_fraction 1 => data.val_fraction
{P} --data.val_split nothing => --data.val_split
{F} --model.lr -1 => model.lr
{F} --model.lr abc => model.lr
{F} --model.lr nan => model.lr
{F} --model.lr inf => model.lr
{F} --model.lr => model.lr
{F} --lr 0.1 => did you mean model.lr?
{F} --epochs 10 => did you mean trainer.max_epochs?
{F} --max_epochs 10 => did you mean trainer.max_epochs?
{F} --batch_size 32 => did you mean data.batch_size?
{F} --weight_decay 0.1 => weight_decay
{F} --model.weight_decay -1 => model.weight_decay
{F} --model.momentum 5 => model.momentum
{F} --model.ema_decay 1.5 => model.ema_decay
{F} --model.smoothing -0.5 => model.smoothing
{F} --model.smoothing 2 => model.smoothing
{F} --model.mixup -1 => model.mixup
{F} --model.cutmix abc => model.cutmix
{F} --model.layer_decay 0 => model.layer_decay
{F} --model.layer_decay 2 => model.layer_decay
{F} --model.warmup_epochs -1 => model.warmup_epochs
{F} --model.warmup_steps 1.5 => model.warmup_steps
{F} --model.warmup_steps 3 --model.warmup_epochs 1 => model.warmup_epochs
{F} --model.min_lr -1 => model.min_lr
{F} --model.lr_batch_size 0 => model.lr_batch_size
{F} --model.opt adamww => model.opt
{F} --model.opt "" => model.opt
{F} --model.sched cosin => model.sched
{F} --model.name resnet11_tiny_acmx => model.name
{F} --model.name "" => model.name
{F} --model.name => model.name
{F} --model.freeze layr1 => model.freeze
{F} --model.freeze [layr1] => model.freeze
{F} --model.freeze [backbone,fc] => model.freeze
{F} --model.class_weights balance => model.class_weights
{F} --model.class_weights [1,2] => model.class_weights
{F} --model.class_weights [1,2,-1] => model.class_weights
{F} --model.model_kwargs.foo 3 => model.model_kwargs
{F} --model.model_kwargs foo => model.model_kwargs
{F} --model.model_kwargs.num_classes 3 => model.model_kwargs
{F} --model.model_kwargs.in_chans 3 => model.model_kwargs
{F} --model.opt_kwargs.foo 3 => model.opt_kwargs
{F} --model.opt_kwargs.lr 3 => model.opt_kwargs
{F} --model.sched_kwargs.foo 3 => model.sched_kwargs
{F} --model.mixup 1 --model.mixup_kwargs.foo 3 => model.mixup_kwargs
{F} --model.ema_decay 0.9 --model.ema_kwargs.foo 3 => model.ema_kwargs
{F} --model.channels_last perhaps => model.channels_last
{F} --model.compile 3 => model.compile
{F} --model.warm_start nothing.ckpt => model.warm_start
{F} --model.warm_start resnet5000 => model.warm_start
{F} --model.warm_start {R} => model.warm_start
{F} --model.class_names [a,b] => model.class_names
{F} --model.in_chans 3 => model.in_chans
{F} --model.in_chans 0 => model.in_chans
{F} --seed_everything -3 => seed_everything
{F} --seed_everything abc => seed_everything
{F} --seed_everything 99999999999999999999 => seed_everything
{F} --seed_everything false => seed_everything
{F} --threads 0 => threads
{F} --threads many => threads
{F} --every_n_steps 0 => every_n_steps
{F} --patience 0 => patience
{F} --logger wandb => logger
{F} --logger foo => logger
{F} --task detect => task
{F} --task "" => task
{F} --run "" => run
{F} --run {R} => run
{F} --run /proc/x => run
{F} --run /dev/null/x => run
{F} --run pets => run: pets is not empty
{F} --ckpt_path none.ckpt => ckpt_path
{F} --ckpt_path curves.png => ckpt_path
{F} --ckpt_path pets => ckpt_path
{F} --ckpt_path "" => ckpt_path
{F} --config nothing.yaml => config
fit --config nothing.yaml => config
fit --config => config
fit --config empty.yaml => config
fit --config list.yaml => config
fit --config bad.yaml => config
fit --config str.yaml => config
fit --config typo.yaml => did you mean model?
fit --config typo2.yaml => did you mean trainer.max_epochs?
fit --config binary.yaml => config
fit --config pets => config
fit --config img.png => config
{F} --trainer.precision foo => trainer.precision
{F} --trainer.max_epochs many => trainer.max_epochs
{F} --trainer.max_epochs -5 => trainer.max_epochs
{F} --trainer.max_epochs 1.5 => trainer.max_epochs
{F} --trainer.max_steps -7 => trainer.max_steps
{F} --trainer.max_time foo => trainer.max_time
{F} --trainer.max_time 5 => trainer.max_time
{F} --trainer.min_epochs -2 => trainer.min_epochs
{F} --trainer.devices 0 => trainer.devices
{F} --trainer.devices -3 => trainer.devices
{F} --trainer.devices foo => trainer.devices
{F} --trainer.devices 99 => trainer.devices
{F} --trainer.accelerator tpu => trainer.accelerator
{F} --trainer.accelerator gpu => trainer.accelerator
{F} --trainer.accelerator foo => trainer.accelerator
{F} --trainer.strategy foo => trainer.strategy
{F} --trainer.strategy ddpp => trainer.strategy
{F} --trainer.num_nodes 0 => trainer.num_nodes
{F} --trainer.num_nodes two => trainer.num_nodes
{F} --trainer.gradient_clip_val -1 => trainer.gradient_clip_val
{F} --trainer.gradient_clip_val abc => trainer.gradient_clip_val
{F} --trainer.gradient_clip_algorithm foo => trainer.gradient_clip_algorithm
{F} --trainer.accumulate_grad_batches 0 => trainer.accumulate_grad_batches
{F} --trainer.accumulate_grad_batches 1.5 => trainer.accumulate_grad_batches
{F} --trainer.limit_train_batches 2.5 => trainer.limit_train_batches
{F} --trainer.limit_train_batches -1 => trainer.limit_train_batches
{F} --trainer.limit_val_batches foo => trainer.limit_val_batches
{F} --trainer.val_check_interval 0 => trainer.val_check_interval
{F} --trainer.val_check_interval 1000 => trainer.val_check_interval
{F} --trainer.val_check_interval -1 => trainer.val_check_interval
{F} --trainer.check_val_every_n_epoch 0 => trainer.check_val_every_n_epoch
{F} --trainer.log_every_n_steps -1 => trainer.log_every_n_steps
{F} --trainer.overfit_batches 2.5 => trainer.overfit_batches
{F} --trainer.fast_dev_run maybe => trainer.fast_dev_run
{F} --trainer.profiler foo => trainer.profiler
{F} --trainer.deterministic maybe => trainer.deterministic
{F} --trainer.benchmark 3 => trainer.benchmark
{F} --trainer.detect_anomaly 3 => trainer.detect_anomaly
{F} --trainer.barebones true => trainer.barebones
{F} --trainer.plugins foo => trainer.plugins
{F} --trainer.callbacks foo => trainer.callbacks
{F} --trainer.callbacks.foo 3 => trainer.callbacks.foo
{F} --trainer.callbacks+=Nothing => trainer.callbacks
{F} --trainer.callbacks+=EarlyStopping => trainer.callbacks
{F} --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=foo => EarlyStopping.monitor
{F} --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor=foo => ModelCheckpoint.monitor
{F} --trainer.callbacks+=LearningRateFinder => LearningRateFinder
{F} --trainer.callbacks+=BatchSizeFinder => BatchSizeFinder
{F} --trainer.logger foo => trainer.logger
{F} --trainer.logger WandbLogger => WandbLogger
{F} --trainer.logger MLFlowLogger => MLFlowLogger
{F} --trainer.reload_dataloaders_every_n_epochs -1 => trainer.reload_dataloaders_every_n_epochs
{F} --trainer.num_sanity_val_steps -5 => trainer.num_sanity_val_steps
{F} --trainer.max_epochs -1 => trainer.max_epochs
{F} --trainer.foo 3 => trainer.foo
{F} --trainer 3 => trainer
{F} --trainr.max_epochs 3 => trainr.max_epochs
{F} --foo => foo
{F} foo => unexpected argument 'foo'
{F} --model.lr= => model.lr
{F} --model.lr 1e-3 2e-3 => unexpected argument '2e-3'
validate => model.name, data
validate no/such/run => no/such/run
validate run --foo => unknown option foo
validate run --model.name resnet11_tiny_conv => the model is resnet11_tiny_conv
validate run --data.batch_size 0 => data.batch_size
validate run/checkpoints => run/checkpoints
validate run/config.yaml => run/config.yaml
validate curves.png => curves.png
validate run run => unexpected argument 'run'
validate "" => got ''
validate --config {R} --run no => no/checkpoints/last.ckpt
test run => expected test images
test => model.name, data
test no => 'no'
predict => model.name, data
predict run --foo => foo
predict nothing => nothing
predict run no.png => no.png
predict run "" => ''
predict run img.png --top 0 => --top
predict run img.png --top many => --top
predict run img.png --format xml => --format
predict run img.png --pixel 3 3 => --pixel
predict run img.png --pixel 3 => --pixel
predict run img.png --explain out --pixel 99 99 => --pixel
predict run img.png --explain out --layers foo => layers
predict run img.png --device foo => --device
predict run img.png --device cuda:7 => --device
predict run img.png --batch_size 0 => --batch_size
predict run img.png --weights x => --weights
predict runs/tinn img.png => runs/tinn
predict rum img.png => did you mean run?
predict resnet11_tiny_acmix img.png => --weights
predict resnet11_tiny_acmix img.png --weights no => --weights
predict resnet11_tiny_acmix img.png --weights img.png => --weights
predict resnet11_tiny_acmix img.png --weights run/checkpoints/last.ckpt => --weights
predict resnet50_acmix img.png --weights run/checkpoints/last.ckpt => --weights
predict resnet11_tiny_acmix img.png --weights img.png --classes no.txt => --classes
predict curves.png img.png => curves.png
predict pets img.png => pets
ablate => study
ablate foo => study
ablate paths => model.name, data
ablate paths --config {R} --seeds 0 => --seeds
ablate paths --config {R} --seeds x => --seeds
ablate paths --config {R} --variants foo => --variants
ablate paths --config {R} --run x => --run
ablate paths --config {R} --model.name resnet11_tiny_conv => model.name
ablate paths --config nothing.yaml => nothing.yaml
ablate paths --config {R} --trainer.fast_dev_run true => trainer.fast_dev_run
ablate paths --config {R} --model.lr -1 => model.lr
ablate paths --config {R} --out pets => --out
analyze foo => 'foo'
analyze costs foo => 'foo'
analyze costs resnet50_acmx => did you mean resnet50_acmix
analyze costs resnet50_acmix --size 0 => --size
analyze costs resnet50_acmix --size abc => --size
analyze costs resnet50_acmix --size 1x2x3 => --size
analyze costs resnet50_acmix --format xml => --format
analyze costs --foo => --foo
info foo => foo
foo => unknown command
fitt => did you mean fit?
--foo => unknown command
{P} --data.img_size [8] => data.img_size
{P} --data.hflip yes => data.hflip
{P} --data.crop_pct abc => data.crop_pct
{P} --data.val_fraction -0.1 => data.val_fraction
{P} --data.image_key 3.x.y => data.image_key
{P} --data.mean [nan,0,0] => data.mean
{P} --data.source pets/train/cat/0.png => data.source
{P} --data.source nowhere => data.source
{P} --data.source "" => data.source
{P} --data.source torchvision/cifar => did you mean cifar10?
{P} --data.source torchvision/cifar10 => data.source
{P} --data.source wds/nowhere => data.source
{F} --data.max_shift -1 => data.max_shift
{F} --data.max_shift 1.5 => data.max_shift
{F} --data.val_fraction 0 => data.val_fraction
{F} --data.val_fraction 1 => data.val_fraction
{F} --data.img_size 32 => data.img_size
{F} --model.lr [1,2] => model.lr
{F} --model.flip_test maybe => model.flip_test
{F} --model.freeze 3 => model.freeze
{F} --model.name resnet11_tiny_acmix.in1k => model.name
{F} --model.model_kwargs.acmix_kwargs.foo 3 => model.model_kwargs: acmix_kwargs
{F} --model.model_kwargs.acmix_kwargs.heads 7 => multiple of heads
{F} --model.model_kwargs.acmix_kwargs.window 4 => acmix_kwargs
{F} --model.opt_kwargs 3 => model.opt_kwargs
{F} --model.sched_kwargs [1] => model.sched_kwargs
{F} --model.nme resnet11_tiny_conv => did you mean model.name?
{F} --trainer.devices 1.5 => trainer.devices
{F} --trainer.devices [0,5] => trainer.devices
{F} --trainer.sync_batchnorm 3 => trainer.sync_batchnorm
{F} --trainer.inference_mode 3 => trainer.inference_mode
{F} --trainer.min_steps -1 => trainer.min_steps
{F} --trainer.callbacks+=RichProgresBar => did you mean RichProgressBar?
{F} --trainer.limit_test_batches -1 => trainer.limit_test_batches
{F} --model.lr_batch_size 1.5 => model.lr_batch_size
{F} --optimizer sgd => did you mean model.opt?
{F} --trainer.logger+=foo => trainer.logger
{F} --seed 3 => did you mean seed_everything?
{F} -x => unknown option x
{F} --run= => run
{P} --data.download true => data.download
{F} --epochs 3 => epochs
{F} --model.nam x => did you mean model.name?
{F} --trainer.max_epoch 3 => did you mean trainer.max_epochs?
{F} --data.val_frac 1 => did you mean data.val_fraction?
{F} --data Digit => did you mean Digits?
{F} --ckpt_path {R} => digits.yaml
info --all => got --all
fot => did you mean fit?
predict --config {R} --run no/such/run => no checkpoint at no/such/run
"""
CASES = [tuple(line.split(" => ")) for line in WRONG.strip().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, broken files and a run, beside which the commands are given."""
    folder = tmp_path_factory.mktemp("wrong")
    write_folder(folder / "pets" / "train", {"cat": 4, "dog": 4})
    write_folder(folder / "pets" / "val", {"cat": 2, "dog": 2})
    recipe = Path(RECIPE).read_text()
    (folder / "typo.yaml").write_text(recipe.replace("model:\n", "modle:\n"))
    (folder / "typo2.yaml").write_text(recipe.replace("  max_epochs", "  max_epoch"))
    (folder / "empty.yaml").write_text("")
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "bad.yaml").write_text("a: [1\n b: }")
    (folder / "str.yaml").write_text("just a string")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    for name in ("img.png", "curves.png"):
        picture(1).save(folder / name)
    run = ["--run", str(folder / "run"), "--trainer.max_epochs", "1"]
    args = ["fit", "--config", RECIPE, *run, "--trainer.limit_train_batches", "1"]
    assert main([*args, "--trainer.limit_val_batches", "1"]) == 0
    return folder


@pytest.mark.parametrize(("line", "said"), CASES, ids=[line for line, _ in CASES])
def test_a_wrong_command_line(folder, monkeypatch, capsys, line, said):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    for name, text in SHORT.items():
        line = line.replace(name, text)
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    [message] = err.splitlines()
    assert out == ""
    assert said in message
    assert len(message) < 700
    assert not any(word in message for word in ("Traceback", "jsonargparse", "<class", "NestedArg"))
    assert sorted(folder.rglob("*")) == before


def test_there_are_enough_of_them():
    assert len({line for line, _ in CASES}) == len(CASES) > 250
