"""LSMDC as it lies on disk for text-video retrieval.

Files, as CLIP4Clip reads them (dataloaders/dataloader_lsmdc_retrieval.py:44-61):
  LSMDC16_annos_training.csv, LSMDC16_annos_val.csv   101,079 and 7,408 lines
  LSMDC16_challenge_1000_publictect.csv               the 1000 test clips, one sentence each
  videos/   {clip_id}.avi (or .mp4, .webm, .mkv), in folders of their movies or not

A line has six fields between tabs and no quotes: clip id, start and end as aligned, start and end as
extracted, sentence. A clip with several lines has several captions; in evaluation each is its own query.
"""

import os
from pathlib import Path

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.assembly import Row, assemble, check_source, usable, video_names
from clipdistill_jax.data.formats.clips import ClipSplits, FormatError, Problem

FILES = {
    "train": "LSMDC16_annos_training.csv",
    "validation": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}
VIDEO_FOLDERS = ("videos", "LSMDC_Videos")
_FIELDS = ("clip id", "start aligned", "end aligned", "start extracted", "end extracted", "sentence")


def read(source: str | os.PathLike[str]) -> ClipSplits:
    """Lists the clips of an LSMDC tree; opens no video.

    Raises:
      FileNotFoundError: a needed file or the videos folder is absent.
      FormatError: a line has another structure, an id is in two splits or points out of the folder.
    """
    source = check_source(source, ", ".join(FILES.values()))
    problems: list[Problem] = []
    rows = {split: _read_lines(source / file, split, problems) for split, file in FILES.items()}
    return assemble(rows, source, VIDEO_FOLDERS, [], problems, [])


def _read_lines(path: Path, split: str, problems: list[Problem]) -> list[Row]:
    """A row a clip, at its first line. Empty sentences are noted and left out."""
    first: dict[str, int] = {}
    said: dict[str, list[str]] = {}
    for line, text in checked.read_lines(path):
        fields = text.split("\t")
        while len(fields) > len(_FIELDS) and not fields[-1].strip():
            fields.pop()  # tabs at the end
        if len(fields) != len(_FIELDS):
            raise FormatError(
                f"{path}, line {line}: {len(fields)} fields between tabs, expected {len(_FIELDS)} "
                f"({', '.join(_FIELDS)}): {text[:80]!r}"
            )
        clip_id, sentence = fields[0].strip(), fields[-1]
        checked.check_file_stem(clip_id, f"{path}, line {line}")
        first.setdefault(clip_id, line)
        if usable(sentence, problems, split, path.name, f"line {line}, clip id {clip_id!r}"):
            said.setdefault(clip_id, []).append(sentence)
    captions = {clip_id: tuple(sentences) for clip_id, sentences in said.items()}
    return [
        Row(clip_id, path, f"line {line}", captions.get(clip_id), path.name, video_names(clip_id))
        for clip_id, line in first.items()
    ]
