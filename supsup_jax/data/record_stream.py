"""A stream of tasks whose images do not fit into memory: read, cropped and batched as asked for."""

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from supsup_jax.checks import check_int
from supsup_jax.data import crops
from supsup_jax.data.keys import check_keys
from supsup_jax.data.records import ImageRecords
from supsup_jax.data.sources import NORMALIZATION, prepared_folder, set_apart
from supsup_jax.data.streams import Split, check_present, deal_classes, examples_of
from supsup_jax.extras import needed
from supsup_jax.types import Integers, Normalize, TaskData

# Batches that each process works at side by side; reading one waits for the disk.
BATCHES_AT_ONCE = 2
# What the draws of a task are for, so that each has numbers of its own.
_ORDER, _CROPS = range(2)
# grain 0.2.18 reads it even where no flags were parsed (google/grain#1355), which absl refuses of a
# flag that is not present. The program's own flags stay as they are.
_GRAINS_FLAG = "grain_enable_multiprocess_worker_profiling"


class RecordStream:
    """Classes dealt to tasks, as `SplitStream` does, over images that stay on disk (SplitImageNet).

    name, data_dir: a dataset that TFDS has prepared, with an image of any size and a label. Tested
      by its split "validation", as ImageNet's "test" has no labels, else "test", else a fifth that
      is drawn from "train".
    classes_per_task, order, relabel: as in `SplitStream`; `classes[i]` are task i's.
    size: of the square images. Training shows random crops, testing the middle (see `crops`).
    batch_size: images of a batch.
    num_workers: processes that read and crop; 0 is this one. Scripts that use more must guard what
      they run by `if __name__ == "__main__"`.
    seed: of the order of examples and their crops, and of what is drawn for testing.
    keys: which features are the image and its label, as in `load_dataset`.

    `train(i)` and `test[i]` iterate over task i's batches: TaskData of uint8 images [B, size,
    size, 3] and labels [B], with the normalisation as its transform, as `train_on_batches` and
    `evaluate` take them. `num_train[i]` is the number of its training images. What is read
    depends on seed and task only, whatever the number of workers.
    The first use of a dataset reads all of it to learn its labels, for minutes with ImageNet.
    Raises MissingDataError, TypeError or ValueError, before anything slow, as `ImageRecords` and
    `SplitStream` do; ValueError, while iterating, for an image that cannot be decoded.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | os.PathLike | None,
        classes_per_task: int | Integers,
        order: Integers | None = None,
        relabel: bool = False,
        *,
        size: int = 224,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        keys: Sequence[str] | None = None,
    ):
        check_int("size", size, 1)
        check_int("batch_size", batch_size, 1)
        check_int("num_workers", num_workers, 0)
        check_int("seed", seed, 0)
        check_keys(keys)
        folder = prepared_folder(name, data_dir)
        train = test = ImageRecords(folder, "train", keys)
        held_out = [split for split in ("validation", "test") if split in train.splits]
        if held_out:
            test = ImageRecords(folder, held_out[0], keys)
            parts = np.arange(len(train)), np.arange(len(test))
        else:
            drawn, num_train = set_apart(name, len(train), seed)
            parts = np.sort(drawn[:num_train]), np.sort(drawn[num_train:])
        self._records = {"training": train, "test": test}
        self._parts = dict(zip(self._records, parts, strict=True))
        self.name, self.num_labels = name, train.num_labels
        self.classes = deal_classes(classes_per_task, self.num_labels, order)
        for what, records in self._records.items():
            labels = records.labels[self._parts[what]]
            check_present(self.classes, labels, f"{name} has no {what} images")
        self.size, self.batch_size, self.num_workers = size, batch_size, num_workers
        self.transform = Normalize(*NORMALIZATION.get(name, NORMALIZATION["imagenet2012"]))
        self._relabel, self._seed = relabel, seed
        self.num_train = [len(self._examples("training", i)[0]) for i in range(len(self))]
        self.test = Split(len(self), self._test_batches)

    def __len__(self) -> int:
        return len(self.classes)

    def train(self, task: int, steps: int, start: int = 0) -> Iterator[TaskData]:
        """Batches start to steps - 1 of a task's training, the same whatever `start`.

        One epoch after another, each a new order of all examples; a batch may straddle two.
        Raises ValueError for a start outside [0, steps], IndexError for no task of that number.
        """
        if not 0 <= start <= steps:
            raise ValueError(f"start must lie in [0, {steps}], the steps of a task, got {start}")
        if not 0 <= task < len(self):
            raise IndexError(f"task {task} is not in the stream of {len(self)}")
        own, labels = self._examples("training", task)
        total = steps * self.batch_size
        orders = [
            np.random.default_rng([_ORDER, self._seed, task, epoch]).permutation(len(own))
            for epoch in range(-(-total // len(own)))
        ]
        order = np.concatenate([*orders, np.empty(0, int)])[:total]
        draws = (_CROPS, self._seed, task)
        examples = _Examples(self._records["training"], own[order], labels[order], self.size, draws)
        return self._batches(examples, start)

    def _test_batches(self, task):
        return self._batches(
            _Examples(self._records["test"], *self._examples("test", task), self.size), 0
        )

    def _examples(self, what, task):
        part = self._parts[what]
        labels = self._records[what].labels[part]
        own, mine = examples_of(self.classes[task], labels, self._relabel)
        return part[own], mine

    def _batches(self, examples, start):
        with needed("imagenet"):
            import grain
            from absl import flags

        if _GRAINS_FLAG in flags.FLAGS:
            flags.FLAGS[_GRAINS_FLAG].present = True
        batches = grain.MapDataset.source(examples).batch(self.batch_size)[start:]
        here = grain.ReadOptions(num_threads=BATCHES_AT_ONCE, prefetch_buffer_size=BATCHES_AT_ONCE)
        elsewhere = grain.MultiprocessingOptions(num_workers=self.num_workers)
        with contextlib.closing(iter(batches.to_iter_dataset(here).mp_prefetch(elsewhere))) as made:
            for images, labels in made:
                yield TaskData(images, labels, transform=self.transform)


class _Examples(Sequence):
    """Images and labels by place, as a worker makes them; random crops if there are draws."""

    def __init__(self, records, index, labels, size, draws=None):
        self._records, self._index, self._labels = records, index, labels
        self._size, self._draws = size, draws

    def __len__(self):
        return len(self._index)

    def __getitem__(self, place):
        image = self._records.image(int(self._index[place]))
        if self._draws is None:
            pixels = crops.centre_crop(image, self._size)
        else:
            rng = np.random.default_rng([*self._draws, place])
            pixels = crops.random_crop(image, self._size, rng)
        return pixels, self._labels[place]
