"""Every field that a config can set, with its default. Config files call these and name what they change."""

import difflib
from typing import Any

from ml_collections import ConfigDict


def data(**fields: Any) -> ConfigDict:
    """The data section: where the raw tree lies, how it is prepared, how it is fed."""
    return _with(
        "data",
        dict(
            # Of the raw tree: clips (msrvtt, msvd, didemo, activitynet, lsmdc), images with captions
            # (karpathy) or questions (vcr, snli_ve, vqa).
            format="msrvtt",
            source="",  # folder of the raw tree; empty: WORKDIR/world, the embedded world
            prepared="",  # folder of the prepared records; empty: WORKDIR/prepared
            train="9k",  # which train list of MSR-VTT: 9k or 7k
            num_validation=500,  # clips of MSR-VTT or ActivityNet held out where there is no validation list
            restval=True,  # of Karpathy's lists: images of the split "restval" are for training too
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
            # Of questions about images (formats vcr, snli_ve, vqa):
            questions=("qa", "qar"),  # of VCR: answers to questions, rationales of answers
            clip_tokens=77,  # of CLIP's texts; max_tokens is the student's
            clip_text="both",  # CLIP reads question and choice, or "choice": it alone
            regions="",  # folder or file of region features; empty: SOURCE/regions
            region_format="npz",  # UNITER's npz or "lmdb", bottom-up "tsv", "vl_bert" json
            region_width=2048,  # of their features
            max_regions=100,  # most regions of an image, beside the image itself
            # File of VQA's answers, class by class; empty: made of the training split. Weights that have the
            # head of answers need their own file: UNITER's and LXMERT's have the same 3129 in two orders, and
            # nothing in a published `.pt` or `.model` tells which: no check can find a mistake.
            answers="",
            answer_prompt="a photo of {}",  # what CLIP reads of an answer of VQA
            buckets=14,  # most shapes of a batch: tokens and regions are padded to the next
            allow_missing=False,  # leave out questions whose files are missing
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
            # For a student of questions: beginnings of names that may be missing in a file, or are not used;
            # the BERT (a directory, a hub id) whose pooler is taken where a file has none, as VL-BERT's; and
            # whether VQA's answers start as their words' vectors.
            init=dict(
                model="",
                text="",
                vision="",
                temporal="",
                missing=(),
                unused=(),
                pooler="",
                answers_as_words=False,
            ),
            teacher="",  # the stage to learn from
            # Raw CLIP, for local alignment: the teacher's towers without a head, of "stage:NAME" or files.
            clip="",
            protocol="full",  # of questions: or "low_shot", "semi_supervised" (the rest without labels)
            shots=0,  # labelled questions of each group
            loss="",  # of the answers, see tasks.choices; empty: the student's own
            ranking="logit",  # of UNITER's choices: or "log_odds"
            object_loss=0.0,  # weight of VL-BERT's classes of regions
            pretraining={},  # fields of tasks.pretraining.Pretraining: adaptive finetuning
            adversarial={},  # fields of tasks.adversarial.Adversarial, or its preset: VILLA
            cache=False,  # compute the frozen models' vectors once, before training, and join them by id
            terms={},  # what to distil: name -> weight (a number or a schedule) and the term's own fields
            gate={},  # fields of distill.confidence.ConfidenceGate; {}: distil everywhere
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
        known[name] = {**inner, **value} if isinstance(inner, dict) and inner else value
    return ConfigDict(known)
