"""Batches put together: images and regions as they are read, with the texts and labels of their items."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int, Int32

from clipdistill_jax.data.graph import StoppingIterator
from clipdistill_jax.data.questions.buckets import Shape
from clipdistill_jax.data.questions.reading import ImageRows
from clipdistill_jax.data.questions.split import QuestionSplit

# step -> (index of the shape, items); -1 - k stands for item k on a row that only fills the batch.
StepRows = Callable[[int], tuple[int, np.ndarray]]
ReadSteps = Callable[[range, Callable[[int], ImageRows]], StoppingIterator]


def question_batches(
    steps: range,
    rows: StepRows,
    loaded: QuestionSplit,
    shapes: Sequence[Shape],
    labelled: Bool[np.ndarray, " n"],
    read: ReadSteps,
    *,
    answers: int | None,
    official: bool,
    clip: bool,
) -> StoppingIterator:
    """The batches of steps; see `pipeline.QuestionData`.

    Args:
      steps: in order.
      rows: what each holds.
      loaded: the split.
      shapes: that `rows` points to.
      labelled: of each item, whether its label may be shown.
      read: reads the images of the steps.
      answers: classes of VQA's targets; None gives none.
      official: the targets are official accuracies, not soft scores.
      clip: give what CLIP reads.
    """

    def image_rows(step: int) -> ImageRows:
        shape, items = rows(step)
        shown = np.where(items >= 0, items, -1 - items).astype(np.int64)
        return ImageRows(shown, loaded.image[shown], shapes[shape].regions, items >= 0)

    images = read(steps, image_rows)
    inset = loaded.student.image_inset

    def finish() -> Iterator[dict[str, np.ndarray]]:
        for step, batch in zip(steps, images, strict=False):
            item, mask = batch.pop("item"), batch["mask"]
            known = labelled[item] & mask
            length = shapes[rows(step)[0]].tokens
            batch |= loaded.text(item, length, student=True, clip=clip)
            if inset:  # boxes in fractions, of images of (1, 1), have no pixels
                batch["region_boxes"] = batch["region_boxes"].copy()
                batch["region_boxes"][:, 0, 2:] -= inset * (batch["image_size"] > 1)
            batch["label"] = masked_ids(loaded.label[item], known)
            batch["labelled"] = known
            batch["example_id"] = masked_ids(item, mask)
            batch["image_id"] = masked_ids(batch["image_id"], mask)
            if answers is not None:
                batch["targets"] = loaded.targets(item, answers, official) * known[:, None]
            yield batch

    return StoppingIterator(finish())


def picture_batches(ids: Int[np.ndarray, "n b"], read: ReadSteps) -> StoppingIterator:
    """image, image_id and mask of the images `ids`; -1 gives a row of mask False."""

    def rows(step: int) -> ImageRows:
        image = np.maximum(ids[step], 0).astype(np.int64)
        return ImageRows(image, image, 0, ids[step] >= 0)

    images = read(range(len(ids)), rows)

    def finish() -> Iterator[dict[str, np.ndarray]]:
        for batch in images:
            del batch["item"]
            yield batch | {"image_id": masked_ids(batch["image_id"], batch["mask"])}

    return StoppingIterator(finish())


def masked_ids(values: np.ndarray, mask: Bool[np.ndarray, " b"]) -> Int32[np.ndarray, " b"]:
    """The values, -1 where the mask is False."""
    return np.where(mask, values, -1).astype(np.int32)
