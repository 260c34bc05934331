"""Images streamed from WebDataset shards: tar files of KEY.jpg beside KEY.cls, the class's number.

The images of an epoch, shard after shard, make one line. Every process, and every worker of it,
takes stretches of that line, and opens the shards under them only: nothing is lost or read twice,
however unequal the shards are. It takes knowing how many images are in each shard.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from acmix.data.files import EXTENSIONS, is_hidden
from acmix.data.loading import Sample, even_batch_size, kept_random_state, seed_generators
from acmix.data.sources import as_rgb, why_unreadable
from acmix.data.survey import Picture
from acmix.errors import printable

INFO = "_info.json"
NUMBERS = r"(\d+|([-_.](of[-_.])?\d+)+)?\.tar"  # what follows the split in a shard's name
Stretch = tuple[int, int]  # of the line: from, and up to but without
Raw = dict[str, Any]  # what webdataset gives of one sample: bytes by suffix


class Shards(NamedTuple):
    """The shards of a split, how many images each holds, and the names of the classes."""

    urls: list[str]
    lengths: list[int]
    class_names: list[str]


def open_shards(path: str, names: tuple[str, ...]) -> Shards | None:
    """The first split of `names` that the folder or address has, or None.

    `_info.json` there, in timm's form with the names of the classes added, says what it holds:
    {"class_names": [...], "splits": {"train": {"filenames": [...], "shard_lengths": [...]}}}. In a
    folder without it, the shards are train.tar, train-000.tar and so on, or train/*.tar; their tar
    headers are read, and the classes are named by their numbers.

    Raises:
        ValueError: If there is neither, or it is not of that form.
        ImportError: If webdataset is not installed.
    """
    if find_spec("webdataset") is None:
        raise ImportError("data.source: wds/ needs webdataset: pip install 'acmix[wds]'")
    if Path(path).is_dir() and not Path(path, INFO).is_file():
        return _scan(Path(path), names)
    from webdataset import gopen

    where = f"{path.rstrip('/')}/{INFO}"
    try:
        with gopen(where) as file:
            info = json.load(file)
        split = next((info["splits"][name] for name in names if name in info["splits"]), None)
        if split is None:
            return None
        urls = [f"{path.rstrip('/')}/{name}" for name in split["filenames"]]
        return Shards(urls, list(split["shard_lengths"]), list(info["class_names"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"data.source: cannot read {where}: {reason}") from error


def shard_splits(path: str) -> tuple[str, ...]:
    """The names of splits that the tar files of a folder have, for messages."""
    names = {re.sub(NUMBERS + "$", "", file.name) for file in Path(path).glob("*.tar")}
    return tuple(sorted(name for name in names if not is_hidden(name)))


def _scan(folder: Path, names: tuple[str, ...]) -> Shards | None:
    found = (_shards_of(folder, name) for name in names)
    paths = next((paths for paths in found if paths), None)
    if paths is None:
        return None
    lengths, classes = [], {0}
    for path in paths:
        labels = _labels(path)
        lengths.append(len(labels))
        classes.update(labels)
    class_names = [str(number) for number in range(max(classes) + 1)]
    return Shards([str(path) for path in paths], lengths, class_names)


def _shards_of(folder: Path, name: str) -> list[Path]:
    """NAME.tar, NAME-000.tar, NAME-0-of-8.tar and the like, or else all of NAME/."""
    form = re.compile(re.escape(name) + NUMBERS)
    below = (folder / name).glob("*.tar")
    shards = [path for path in folder.glob("*.tar") if form.fullmatch(path.name)]
    return sorted(shards or (path for path in below if not is_hidden(path.name)))


def _labels(path: Path) -> list[int]:
    """The classes of a shard's samples, from its headers and its members KEY.cls.

    Raises:
        ValueError: If it cannot be read, or its names are not those of samples.
    """
    try:
        with tarfile.open(path) as tar:
            members = _members(tar)
            for key, suffixes in members.items():
                check_key(key, suffixes)
            labels = (suffixes["cls"] for suffixes in members.values() if "cls" in suffixes)
            return [_number(tar, member) for member in labels]
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"data.source: cannot read {printable(str(path))}: {error}") from error


def _members(tar: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """The members of each sample by key and suffix, split as webdataset does."""
    from webdataset.tariterators import base_plus_ext

    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        key, suffix = base_plus_ext(member.name)
        if key is None or not member.isfile() or not is_of_sample(member.name):
            continue
        suffixes = members.setdefault(key, {})
        if suffix.lower() in suffixes:
            raise ValueError(f"expected each member once, got {printable(member.name)} twice")
        suffixes[suffix.lower()] = member
    return members


def _number(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    text = tar.extractfile(member).read()  # type: ignore[union-attr]  # of files, never None
    try:
        return int(text)
    except ValueError as error:
        name = printable(member.name)
        raise ValueError(f"expected a class's number in {name}, got {text[:20]!r}") from error


def is_of_sample(member: str) -> bool:
    """Whether a member of a shard is none of those that systems leave behind."""
    return not any(is_hidden(name) for name in member.split("/") if name not in (".", ".."))


def check_key(key: str, suffixes: Iterable[str]) -> None:
    """ValueError where the key of a class has dots: webdataset splits a name at its first."""
    dotted = next((suffix for suffix in suffixes if suffix.endswith(".cls")), None)
    if dotted and "cls" not in suffixes:
        raise ValueError(f"expected keys without dots, got {printable(key)}.{dotted}")


class ShardStream(Dataset[Sample]):
    """A split of shards and what becomes of its images; `make_shard_loader` reads it."""

    def __init__(
        self,
        shards: Shards,
        class_names: list[str],
        transform: Callable[[Image.Image], Tensor],
        shuffle_buffer: int = 0,
        max_corrupt: int = 0,
        background: str = "white",
    ) -> None:
        self.shards, self.transform, self.background = shards, transform, background
        self.shuffle_buffer, self.max_corrupt = shuffle_buffer, max_corrupt
        self.places = [class_names.index(name) for name in shards.class_names]

    def __len__(self) -> int:
        return sum(self.shards.lengths)

    def sample(self, raw: Raw) -> Sample:
        """Image (3, H, W) and class.

        Raises:
            ValueError: If the image or its class cannot be read; the message names it.
        """
        try:
            check_key(raw["__key__"], raw)
            image = as_rgb(open_raw(raw), self.background)
            label = int(raw["cls"])
            if not 0 <= label < len(self.places):
                raise ValueError(f"expected a class below {len(self.places)}, got {label}")
            return self.transform(image), self.places[label]
        except Exception as error:  # of a broken file, Pillow raises anything
            why = {StopIteration: "no image", KeyError: "no .cls"}.get(
                type(error), why_unreadable(error)
            )
            name = printable(f"{raw['__url__']}/{raw['__key__']}")
            raise ValueError(f"data.source: cannot read {name}: {why}") from error


def shard_pictures(shards: Shards) -> Iterator[Picture]:
    """All images of some shards, in order, to look at."""
    stream = ShardStream(shards, shards.class_names, lambda image: image)  # type: ignore[arg-type, return-value]
    for _, raw in read(shards, list(range(len(shards.urls))), [(0, len(stream))]):
        label = raw.get("cls", b"").decode(errors="replace").strip()
        known = label.isdecimal() and int(label) < len(shards.class_names)
        name = printable(f"{raw['__url__']}/{raw['__key__']}")
        classes = (shards.class_names[int(label)],) if known else ()
        yield Picture(name, classes, partial(open_raw, raw))


def open_raw(raw: Raw) -> Image.Image:
    """The image of a sample, as stored; StopIteration where it has none."""
    suffix = next(suffix for suffix in raw if f".{suffix}" in EXTENSIONS)
    return Image.open(io.BytesIO(raw[suffix]))


def make_shard_loader(
    stream: ShardStream,
    *,
    batch_size: int,
    num_workers: int = 0,
    train: bool,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> ShardLoader:
    """Batches (images (B, 3, H, W), classes (B,)) of this process's share of the shards.

    Training goes through the shards in an order that follows from (seed, epoch), in full batches
    as many in every process; else the images come in order, each once.

    Raises:
        ValueError: If there are fewer images than processes.
    """
    size = len(stream)
    if size < world_size:
        raise ValueError(f"data.source: expected an image a process, got {size} of {world_size}")
    share, larger = divmod(size, world_size)
    first = rank * share + min(rank, larger)
    images = share + (rank < larger)
    if train:
        batch_size = min(batch_size, share)
        images = share // batch_size * batch_size
        first = rank * images
    else:
        batch_size = even_batch_size(size, batch_size, world_size)
    batches = ShardBatches(stream, (first, first + images), batch_size, seed if train else None)
    return ShardLoader(batches, num_workers, batch_size * world_size)


class ShardLoader:
    """A loader whose `state_dict` is the place within the epoch, counted in batches handed out."""

    def __init__(self, batches: ShardBatches, num_workers: int, images_per_batch: int) -> None:
        self.dataset, self.num_workers = batches, num_workers
        self.images_per_batch = images_per_batch
        self.given = 0
        self.sampler = self  # where Lightning looks for `set_epoch`

    def __len__(self) -> int:
        return self.dataset.count

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.given = self.dataset.start
        self.dataset.skipped = get_context().Value("i", 0)
        # Workers are started anew, as those that persist would not learn of the next epoch.
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # of the workers' seeds: the global one stays as it was
        )
        for batch in loader:
            self.given += 1
            yield batch
        self.dataset.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch that comes next; the one that is under way goes on where it was."""
        if epoch != self.dataset.epoch:
            self.dataset.epoch, self.dataset.start = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.dataset.epoch, "batches": self.given, **self._order()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches of `state`.

        Raises:
            ValueError: If the images came in another order there.
        """
        for name, here in self._order().items():
            if state.get(name) != here:
                raise ValueError(
                    f"data: expected {name} to be {state.get(name)}, as in the checkpoint within "
                    f"an epoch, got {here}"
                )
        self.dataset.epoch, self.dataset.start = state["epoch"], state["batches"]

    def _order(self) -> dict[str, int]:
        """What the order of images follows from, beside seed and epoch."""
        return {
            "images_per_batch": self.images_per_batch,
            "num_workers": self.num_workers,
            "shuffle_buffer": self.dataset.stream.shuffle_buffer,
        }


class ShardBatches(IterableDataset[list[Tensor]]):
    """The batches of one process in an epoch, after the first `start`; without a seed, in order."""

    skipped: Any  # a number that the workers share

    def __init__(
        self, stream: ShardStream, stretch: Stretch, batch_size: int, seed: int | None
    ) -> None:
        self.stream, self.stretch, self.batch_size, self.seed = stream, stretch, batch_size, seed
        self.epoch = self.start = 0

    @property
    def count(self) -> int:
        """Batches of an epoch."""
        return -(-(self.stretch[1] - self.stretch[0]) // self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (worker + self.start) % workers  # whose turn it is: the first gives the first
        done = len(range(worker, self.start, workers)) * self.batch_size
        raws = self._raws(worker, workers)
        if self.seed is None:
            samples = self._samples(raws)
        else:
            rng = np.random.default_rng([self.seed, self.epoch, *self.stretch, worker])
            shuffled = shuffle(raws, self.stream.shuffle_buffer, rng)
            samples = self._samples(islice(shuffled, done, None))
        while batch := self._batch(samples):
            yield default_collate(batch)

    def _batch(self, samples: Iterator[Sample]) -> list[Sample]:
        with kept_random_state():
            return list(islice(samples, self.batch_size))

    def _raws(self, worker: int, workers: int) -> Iterator[tuple[int, Raw]]:
        """This worker's undecoded samples with their places in the line.

        In training the stretches of workers lie end to end, so that each opens shards of its own;
        else they interlace by batches, so that these come in the order of the line.
        """
        size, (first, end) = self.batch_size, self.stretch
        of_worker = [len(range(w, self.count, workers)) for w in range(worker + 1)]
        if self.seed is None:
            starts = range(first + worker * size, end, workers * size)
            stretches = [(start, min(start + size, end)) for start in starts]
        else:
            start = first + sum(of_worker[:-1]) * size
            stretches = [(start, start + of_worker[-1] * size)]
        return read(self.stream.shards, self._shard_order(), stretches)

    def _shard_order(self) -> list[int]:
        count = len(self.stream.shards.urls)
        if self.seed is None:
            return list(range(count))
        return np.random.default_rng([self.seed, self.epoch]).permutation(count).tolist()

    def _samples(self, raws: Iterator[tuple[int, Raw]]) -> Iterator[Sample]:
        """Decoded samples; those that cannot be are named, counted and left out.

        In training the image before takes the place: all processes have as many steps.
        """
        before: Sample | None = None
        for place, raw in raws:
            if self.seed is not None:
                seed_generators(self.seed, self.epoch, place)
            try:
                before = sample = self.stream.sample(raw)
            except ValueError as error:
                self._skip(str(error))
                if self.seed is None or before is None:
                    continue
                sample = before
            yield sample

    def _skip(self, said: str) -> None:
        with self.skipped.get_lock():
            self.skipped.value += 1
            bad, limit = self.skipped.value, self.stream.max_corrupt
        if bad > limit:
            raise ValueError(f"{said} (data.max_corrupt: expected {limit} at most)")
        print(f"skipped {bad} of at most {limit}: {said}", file=sys.stderr)


def read(shards: Shards, order: list[int], stretches: list[Stretch]) -> Iterator[tuple[int, Raw]]:
    """(place, sample) of some stretches of the line that the shards make in this order.

    Raises:
        ValueError: If a shard cannot be read, or holds another number of samples.
    """
    offset = 0
    for shard in order:
        length = shards.lengths[shard]
        wanted = {
            place
            for start, end in stretches
            for place in range(max(start, offset), min(end, offset + length))
        }
        if wanted:
            last = max(wanted)
            for place, raw in enumerate(read_shard(shards.urls[shard], length), offset):
                if place in wanted:
                    yield place, raw
                if place == last:
                    break
        offset += length


def read_shard(url: str, length: int) -> Iterator[Raw]:
    """The samples of one shard, undecoded.

    Raises:
        ValueError: If it cannot be read, or holds another number of samples.
    """
    from webdataset.handlers import reraise_exception
    from webdataset.tariterators import tarfile_samples

    count = 0
    try:
        samples = tarfile_samples([{"url": url}], reraise_exception, is_of_sample)
        for raw in samples:
            count += 1
            yield raw
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        # webdataset adds its own objects to the arguments, and to the text of a double member
        why = printable(str(error.args[0]).partition(" in tar file")[0])
        raise ValueError(f"data.source: cannot read {url}: {why}") from error
    if count != length:
        raise ValueError(f"data.source: expected {length} samples in {url}, got {count}")


def shuffle(items: Iterator[Any], size: int, rng: np.random.Generator) -> Iterator[Any]:
    """All items, each drawn from the `size` that wait."""
    waiting: list[Any] = []
    for item in items:
        if len(waiting) < max(1, size):
            waiting.append(item)
            continue
        drawn = int(rng.integers(len(waiting)))
        item, waiting[drawn] = waiting[drawn], item
        yield item
    yield from (waiting[index] for index in rng.permutation(len(waiting)))
