"""Every field that a config can set, with its default. Config files call these and name what they change."""

import difflib
from typing import Any

from ml_collections import ConfigDict


def data(**fields: Any) -> ConfigDict:
    """The data section: where the raw tree lies, how it is prepared, how it is fed."""
    return _with(
        "data",
        dict(
            format="msrvtt",  # of the raw tree: or msvd, didemo, activitynet, lsmdc
            source="",  # folder of the raw tree; empty: WORKDIR/world, the embedded world
            prepared="",  # folder of the prepared records; empty: WORKDIR/prepared
            train="9k",  # which train list of MSR-VTT: 9k or 7k
            num_validation=500,  # clips of MSR-VTT or ActivityNet held out where there is no validation list
            fps=1.0,  # frames kept of a clip, a second
            max_frames=32,  # most frames kept of a clip
            stored_size=0,  # short side of the stored frames; 0: image_size
            store_square=True,  # store the centre square only, which is what is fed
            max_unreadable=0.05,  # largest fraction of clips that may be missing or broken
            workers=0,  # decoding processes; 0: one a core
            image_size=224,  # side of the frames fed
            num_frames=12,  # frames fed of a clip
            max_tokens=32,  # with begin and end of text
            tokenizer="",  # a Hugging Face directory or hub id; "train:N": N entries, learned from captions
            student_tokenizer="",  # the same for a student with another text tower; empty: `tokenizer`
        ),
        fields,
    )


def stage(**fields: Any) -> ConfigDict:
    """One stage: a model, where its weights start, its teacher, how long it trains."""
    return _with(
        "stage",
        dict(
            title="",  # what the report calls it
            model="",  # "teacher" or "student": a section of the config
            temporal="",  # another kind of temporal head than the model's
            # Where weights start: "stage:NAME", a file, a directory, a hub id; temporal may also be "text".
            init=dict(model="", text="", vision="", temporal=""),
            teacher="",  # the stage to learn from
            # Raw CLIP, for local alignment: the teacher's towers without a head, of "stage:NAME" or files.
            clip="",
            cache=False,  # compute the frozen models' vectors once, before training, and join them by id
            terms={},  # what to distil: name -> weight (a number or a schedule) and the term's own fields
            captions="all",  # every caption is an item, or "one": every clip is, with its captions in turn
            max_clips=0,  # train on the first of them only; 0: all
            num_frames=0,  # 0: data.num_frames
            frame_sampling="uniform",  # or "random"
            batch_size=128,  # on all devices together
            eval_batch_size=64,
            steps=0,
            chunks=1,  # encode the batch in so many parts, to save memory; the loss stays the whole batch's
            optimizer=dict(
                name="adamw",  # or "sgd"
                learning_rate=dict(kind="cosine", value=1e-4, warmup_fraction=0.1),
                multipliers=(),  # (regex, factor) pairs on parameter paths; 0 freezes
                weight_decay=0.05,
                clip_norm=1.0,
                b1=0.9,
                b2=0.999,
            ),
            ema_decay=0.0,  # 0: no average is kept
            nan_policy="raise",  # or "skip" the step
            select="validation/t2v_R@1",  # whose best checkpoint is the stage's result; "": the last
            eval_every=0,  # steps; 0: at the end
            log_every=50,
            save_every=500,  # steps; 0: at the end, and at SIGTERM
            save_minutes=15.0,
            keep=2,  # latest checkpoints, beside the best
            sharding_rules=(),  # (regex, axes) pairs on parameter paths, for the tensor axis
            fsdp_min_size=2**20,  # elements from which a parameter is split over the fsdp axis
        ),
        fields,
    )


def _with(what: str, known: dict[str, Any], fields: dict[str, Any]) -> ConfigDict:
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"a {what} has no field {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        inner = known[name]
        # What a stage says of its optimizer or init is said on top of the defaults.
        known[name] = {**inner, **value} if isinstance(inner, dict) and name != "terms" else value
    return ConfigDict(known)
