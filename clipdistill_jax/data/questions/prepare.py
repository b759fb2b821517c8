"""Reads a tree of questions about images once: pictures, region features, items, importance of words."""

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipdistill_jax.data import index as files
from clipdistill_jax.data.formats import snli_ve, vcr, vqa
from clipdistill_jax.data.formats.clips import FormatError, Problem
from clipdistill_jax.data.formats.listing import Listing
from clipdistill_jax.data.prepared import is_prepared, locked, same_manifest
from clipdistill_jax.data.progress import progress_bar
from clipdistill_jax.data.questions import index
from clipdistill_jax.data.questions.images import ImageFiles, ImageReader, images_of
from clipdistill_jax.data.questions.importance import IMPORTANCE, ensure_importance
from clipdistill_jax.data.questions.items import Question, snli_ve_items, vcr_items, vqa_items
from clipdistill_jax.data.questions.layout import check_clip_text
from clipdistill_jax.data.questions.sources import Record, RegionSource
from clipdistill_jax.data.video import VideoOptions
from clipdistill_jax.data.vocabulary import MIN_COUNT, AnswerVocabulary, build_vocabulary, read_vocabulary
from clipdistill_jax.data.workers import available_cores, in_threads

LAYOUT = 2  # raised when newer code no longer reads what older code prepared
FORMATS = {"vcr": ("qa", "qar"), "snli_ve": ("ve",), "vqa": ("vqa",)}  # and the kinds of their items
SPLITS = ("train", "validation", "test")


def prepare_questions(
    format: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    regions: str | os.PathLike[str],
    region_format: str = "npz",
    region_width: int = 2048,
    max_regions: int = 100,
    class_probs: bool = True,
    stored_size: int = 224,
    store_square: bool = True,
    splits: Sequence[str] = SPLITS,
    answers: str | os.PathLike[str] = "",
    min_count: int = MIN_COUNT,
    clip_text: str = "both",
    workers: int | None = None,
    allow_missing: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Prepares the raw tree of a dataset of questions, or finds it prepared.

    Args:
      format: "vcr", "snli_ve" or "vqa".
      source: the raw tree, see the format's module. Where `out` is prepared already it may be absent.
      out: folder of the result: images/ (TFDS, ArrayRecord), index/ (items and images), answers.json (VQA),
        importance/, manifest.json (written last, but for the importance).
      regions: the region features, a file or a folder; see `sources.region_names` for their names there.
      region_format: "npz" or "lmdb" (UNITER's), "tsv" (bottom-up attention's), "vl_bert".
      region_width: width of the features.
      max_regions: most regions of an image, beside the whole image.
      class_probs: keep the detector's distributions over classes, where there are any (for MRC).
      stored_size: short side of the stored pictures.
      store_square: store their centre square only, which is what is fed.
      splits: which to prepare; each must be there.
      answers: file of VQA's answer vocabulary; "" builds it from the training split.
      min_count: questions that must share an answer of a vocabulary that is built.
      clip_text: score the words of "both" context and choice or of the "choice" alone; "" scores none. May
        differ between calls: each is computed when it is first asked for.
      workers: threads that read pictures, and processes that score words; one a core when None.
      allow_missing: leave out (and list) questions without their picture or region features.
      progress: show progress bars on stderr.

    Returns:
      The manifest: options, source, splits (listed, questions, items, images, left_out: ids of the questions
      that are listed, but not there), region_width, region_classes (K of class_probs, 0 for none),
      object_classes (names, background first), answers (fingerprint and count of the vocabulary, or None),
      counts of problems by kind, skipped (file, record, reason).

    Raises:
      FileNotFoundError, FormatError: the tree lacks a file or has another structure; names the file, the
        record and the field.
      ValueError: an argument is not possible, or `out` was prepared with other options or from other files,
        or holds something else.
    """
    if format not in FORMATS:
        raise ValueError(f"the question format {format!r} is not known: choose one of {', '.join(FORMATS)}")
    if not os.fspath(regions):
        raise ValueError("regions is empty: say where the region features are, a file or a folder")
    if answers and format != "vqa":
        raise ValueError(f"answers={os.fspath(answers)!r}: only VQA has a vocabulary of answers")
    if format == "vqa" and not answers and "train" not in splits:
        raise ValueError("VQA's answers are built from the split 'train': prepare it too, or give answers")
    if clip_text:
        check_clip_text(clip_text)
    source, out, workers = Path(source), Path(out), workers or available_cores()
    options: dict[str, Any] = {
        "format": format,
        "layout": LAYOUT,
        "splits": list(splits),
        "region_format": region_format,
        "region_width": region_width,
        "max_regions": max_regions,
        "class_probs": class_probs,
        "stored_size": stored_size,
        "store_square": store_square,
        "allow_missing": allow_missing,
    }
    given = read_vocabulary(answers) if answers else None
    if format == "vqa":
        options |= {"answers": given.fingerprint if given else "", "min_count": 0 if given else min_count}

    def read() -> Listing[Any]:
        if format == "vqa":
            subsets = {split: vqa.SUBSETS[split] for split in splits}
            return vqa.read(source, subsets=subsets, allow_missing=allow_missing)
        reader: Callable[..., Listing[Any]] = vcr.read if format == "vcr" else snli_ve.read
        return reader(source, splits=splits, allow_missing=allow_missing)

    def region_source() -> RegionSource:
        return RegionSource(regions, region_format, width=region_width)

    def finish(manifest: dict[str, Any]) -> dict[str, Any]:
        if clip_text:
            ensure_importance(out, clip_text, FORMATS[format], workers=workers, progress=progress)
        return manifest

    if is_prepared(out):
        known = None
        if source.exists() and Path(regions).exists():
            with region_source() as found:
                known = _fingerprint(read(), found)
        manifest = same_manifest(out, options, source, known)
        with locked(out):
            return finish(manifest)
    listing = read()
    with region_source() as found, locked(out):
        if is_prepared(out):  # by another process, while this one waited
            return finish(same_manifest(out, options, source, _fingerprint(listing, found)))
        images = {split: images_of(records, split, found) for split, records in listing.splits.items()}
        image_reader = ImageReader(
            images,
            found,
            pictures=VideoOptions(size=stored_size, store_square=store_square),
            max_regions=max_regions,
            class_probs=class_probs,
            allow_missing=allow_missing,
        )
        vocabulary = given
        if format == "vqa" and given is None:
            vocabulary = build_vocabulary(listing.splits["train"], min_count=min_count)
        manifest = _prepare(listing, images, image_reader, vocabulary, out, workers, progress)
        manifest["options"], manifest["region_width"] = options, region_width
        manifest["source"] = {
            "path": str(source.resolve()),
            "regions": str(found.path.resolve()),
            "fingerprint": _fingerprint(listing, found),
        }
        files.write_json(out / files.MANIFEST, manifest)
        return finish(manifest)


def _fingerprint(listing: Listing[Any], regions: RegionSource) -> str:
    return f"{listing.fingerprint[:32]}{regions.fingerprint[:32]}"


def _prepare(
    listing: Listing[Any],
    images: Mapping[str, Sequence[ImageFiles]],
    reader: ImageReader,
    vocabulary: AnswerVocabulary | None,
    out: Path,
    workers: int,
    progress: bool,
) -> dict[str, Any]:
    """Writes everything but the manifest, and gives what that says of it."""
    from clipdistill_jax.data import builder
    from clipdistill_jax.data.questions.records import ImageRecords  # imports TFDS

    for leavings in (index.IMAGES, files.INDEX, IMPORTANCE):  # of a run that was stopped
        shutil.rmtree(out / leavings, ignore_errors=True)
    problems = list(listing.problems)
    kept: dict[str, list[ImageFiles]] = {split: [] for split in images}
    regions: dict[str, list[int]] = {split: [] for split in images}
    classes: dict[int, str] = {}
    with progress_bar("preparing images", sum(map(len, images.values())), show=progress) as advance:

        def source(split: str) -> Iterator[dict[str, bytes]]:
            read = in_threads(reader.read, images[split], workers=workers)
            for image, found in zip(images[split], read, strict=True):
                if isinstance(found, Problem):
                    problems.append(found)
                else:
                    classes.setdefault(found.classes, image.where)
                    _check_classes(classes)
                    kept[split].append(image)
                    regions[split].append(found.regions)
                    yield found.record
                advance(len(problems))
            if not kept[split]:
                raise FormatError(f"the split {split!r} has no image that is whole: {problems[-1].reason}")

        sources = {split: (lambda split=split: source(split)) for split in images}
        builder.write(ImageRecords, out, sources)
    if vocabulary is not None:
        vocabulary.save(out / index.ANSWERS)
    splits = {}
    for split, found in kept.items():
        index.write_images(out, split, [image.path.name for image in found], regions[split])
        place = {image.path: k for k, image in enumerate(found)}
        records = [record for record in listing.splits[split] if record.image in place]
        items = (item for record in records for item in _items(record, place[record.image], vocabulary))
        splits[split] = {
            "listed": listing.listed[split],
            "questions": len(records),
            "items": index.write_items(out, split, items),
            "images": len(found),
            "left_out": [
                *listing.left_out[split],
                *(record.example_id for record in listing.splits[split] if record.image not in place),
            ],
        }
    return {
        "splits": splits,
        "region_classes": next(iter(classes)),
        "object_classes": list(reader.object_classes),
        "answers": None
        if vocabulary is None
        else {"fingerprint": vocabulary.fingerprint, "count": len(vocabulary)},
        "counts": dict(Counter(p.kind for p in problems)),
        "skipped": [dataclasses.asdict(p) for p in problems],
    }


def _items(record: Record, image: int, vocabulary: AnswerVocabulary | None) -> Iterator[Question]:
    if isinstance(record, vcr.VcrRecord):
        return vcr_items(record, image)
    if isinstance(record, snli_ve.SnliVeRecord):
        return snli_ve_items(record, image)
    if vocabulary is None:
        raise ValueError("VQA's questions need a vocabulary of answers")
    return vqa_items(record, image, vocabulary)


def _check_classes(classes: Mapping[int, str]) -> None:
    """Raises FormatError where images differ in their regions' classes: number of classes -> first image."""
    if len(classes) > 1:
        (one, first), (other, where) = classes.items()
        raise FormatError(
            f"{where}: the region features have distributions over {other} classes, those of {first} over "
            f"{one}; prepare without class_probs, or mend them"
        )
