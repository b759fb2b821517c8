"""Questions about images: a student that reads text and regions in one sequence, and CLIP as its teacher.

A batch has B questions of K choices; its keys are those of `models.joint`, and
  image [B, H, W, 3] uint8, clip_tokens, clip_token_mask, clip_word_ids [B, K, Tc]   what CLIP reads
  importance [B, K, Tc]   of each word; word ids count over the whole text, for student and CLIP alike
  label [B]               the right choice; -1 where unknown    targets [B, V], labelled [B]   of VQA
  region_classes [B, N]   where the student has the head "objects"; class_probs [B, N, Kc] for MRC
  example_id, image_id, mask [B]
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipdistill_jax.distill.cache import similarity_variables
from clipdistill_jax.distill.cache_files import Vectors
from clipdistill_jax.distill.choice_cache import (
    cached_choice_features,
    choice_cache_spec,
    frozen_choice_vectors,
)
from clipdistill_jax.distill.choices import choice_features
from clipdistill_jax.distill.vector_cache import CacheSpec
from clipdistill_jax.evaluate.choices import ChoiceEvaluator
from clipdistill_jax.models.build import build_joint, build_model
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.models.joint import JointFeatures, JointModel, fold
from clipdistill_jax.models.joint import example_batch as joint_example
from clipdistill_jax.question_weights import answers_as_words, read_question_start
from clipdistill_jax.systems.adaptive import HEADS, INPUTS, drawn, pretraining_settings, right_choice
from clipdistill_jax.systems.adaptive import pretrain as adapt
from clipdistill_jax.systems.system import Config, Vocab, init_with_output, plain, stage_config, text_zeros
from clipdistill_jax.systems.villa import villa
from clipdistill_jax.tasks import choices
from clipdistill_jax.train.accumulate import apply_in_chunks

QUESTIONS = {"vcr": "vcr", "snli_ve": "ve", "vqa": "vqa"}  # data format -> the head that answers
CHOICES = {"vcr": 4, "snli_ve": 1, "vqa": 1}  # texts of a question
LOSSES = {"uniter": "pairs", "vl_bert": "sigmoid"}  # of VCR, as published
Forward = Callable[[Any, Any, Batch, Any], tuple[Features, Any]]


@dataclasses.dataclass(frozen=True)
class QuestionSystem:
    """See `system.System`.

    `vocab` further has, where they apply: "answers" (VQA's classes), "answer_tokens" (ids of each), "unknown"
    (the class of no answer), "mask" (the id of [MASK]), "random_low" and "random_high" (ids of plain words),
    "region_classes" and "object_classes" (VCR's).
    """

    config: Config
    vocab: Vocab | None = None
    unit: ClassVar[str] = "questions"
    cached_kinds: ClassVar[tuple[str, ...]] = ("images", "texts")

    @property
    def kind(self) -> str:
        """The data's format."""
        return self.config["data"]["format"]

    def module(self, name: str) -> JointModel:
        """The student with the heads that a stage needs: the answering one, or those of its pretraining."""
        stage, spec = stage_config(self.config, name), plain(self.config["student"])
        if stage["model"] != "student":
            raise ValueError(f"stage {name!r}: of questions only the student trains; CLIP is its `clip`")
        known = {"vocab_size": "student", "answers": "answers", "region_classes": "region_classes"}
        known |= {"object_classes": "object_classes"} if stage["object_loss"] else {}
        sizes = {field: self.vocab[key] for field, key in known.items() if self.vocab and key in self.vocab}
        if self.kind == "vcr" and spec.get("kind") == "uniter":
            sizes = {"types": 4, **sizes}  # question, region, answer, rationale
        sizes["feature_width"] = self.config["data"]["region_width"]
        if stage["pretraining"]:
            heads = tuple(dict.fromkeys(HEADS.get(task, task) for task in drawn(stage)))
        else:
            heads = (QUESTIONS[self.kind], *(["objects"] if stage["object_loss"] else []))
        return build_joint(spec, heads=heads, sizes=sizes)

    def frozen_module(self, stage: Config, of: str) -> DualEncoder:
        """CLIP."""
        if of != "clip":
            raise ValueError("a student of questions learns from `clip`; the terms of retrieval are not its")
        size = self.vocab.get("teacher") if self.vocab else None
        return build_model(plain(self.config["teacher"]), vocab_size=size, temporal="meanP")

    def example(self, name: str, size: int = 2) -> Batch:
        """A batch of zeros of the largest shapes."""
        stage, data = stage_config(self.config, name), self.config["data"]
        choices, tokens, regions = CHOICES[self.kind], data["max_tokens"], data["max_regions"] + 1
        batch = joint_example(data["region_width"], size, choices, tokens, regions)
        batch |= {name: jnp.zeros(size, jnp.int32) for name in ("label", "example_id", "image_id")}
        batch |= {name: jnp.ones(size, bool) for name in ("labelled", "mask")}
        if self.kind == "vqa":
            batch["targets"] = jnp.zeros((size, self._answers()))
        if stage["object_loss"]:
            batch["region_classes"] = jnp.zeros((size, regions), jnp.int32)
        if stage["pretraining"] and (asking := sorted({"mrc", "mrckl"} & drawn(stage).keys())):
            classes = self.vocab.get("region_classes", 0) if self.vocab else self._sizes.region_classes
            if not classes:
                raise ValueError(
                    f"stage {name!r} learns {' and '.join(asking)} from the detector's class probabilities, "
                    f"and the region features have none: set stages.{name}.pretraining.ratios.{asking[0]}=0"
                )
            batch["class_probs"] = jnp.zeros((size, regions, classes))
        if stage["clip"]:
            batch["importance"] = jnp.zeros((size, choices, data["clip_tokens"]))
            inputs = self._clip_inputs(size)
            batch |= {name: x for name, x in inputs.items() if name != "image" or not stage["cache"]}
        return batch

    @property
    def _sizes(self) -> Any:
        """The student's config, before the data has its say."""
        return build_joint(plain(self.config["student"])).config

    def _answers(self) -> int:
        return self.vocab["answers"] if self.vocab else self._sizes.answers

    def _clip_inputs(self, size: int) -> Batch:
        data = self.config["data"]
        side, shape = data["image_size"], (size, CHOICES[self.kind], data["clip_tokens"])
        return {"image": jnp.zeros((size, side, side, 3), jnp.uint8), **text_zeros(shape, "clip_")}

    def start(self, init: Config, params: Any, model_state: Any, runs: Sequence[Path]) -> tuple[Any, Any]:
        """See `question_weights.read_question_start`."""
        kind, seed = self.config["student"]["kind"], self.config["seed"]
        params = read_question_start(init, params, kind, runs, seed, self._sizes)
        if init.get("answers_as_words"):
            known = (self.vocab or {}).get("answer_tokens")
            if known is None:
                raise ValueError("init.answers_as_words: the data has no vocabulary of answers")
            params = answers_as_words(params, known)
        return params, model_state

    def own(self, batch: Batch, stage: Config) -> Batch:
        """What the student reads; in pretraining, of the right choice alone."""
        batch = right_choice(batch) if stage["pretraining"] else batch
        return {name: batch[name] for name in INPUTS if name in batch}

    def frozen(self, module: DualEncoder, stage: Config, of: str, batch: Batch) -> tuple[Features, Any]:
        """What CLIP gives for a batch, and its variables; "choices" are what its logits are made with."""
        batch = {**batch, **self._clip_inputs(len(batch["mask"]))}
        clip = {
            "frames": batch["image"][:, None],
            "frame_mask": jnp.ones((len(batch["mask"]), 1), bool),
            **{name: batch[f"clip_{name}"][:, 0] for name in ("tokens", "token_mask", "word_ids")},
        }
        features, variables = init_with_output(module, clip)
        made: dict[str, Any] = {}
        if self.kind == "vqa":
            made = {"answers": jnp.zeros((self._answers(), features.text.shape[-1]))}
        elif self.kind == "snli_ve":
            made = {"anchors": jnp.zeros(3)}
        variables = {**variables, "choices": made} if made else variables
        batch = right_choice(batch) if stage["pretraining"] else batch
        return self._asked(module, stage, variables, batch, choice_features), variables

    def student(self, module: JointModel, stage: Config) -> Forward:
        """Encodes in chunks; in pretraining, a corrupted batch."""

        def forward(params: Any, model_state: Any, batch: Batch, rng: Any) -> tuple[Features, Any]:
            features = self._encode(module, stage, params, self.own(batch, stage), rng)
            if self.kind == "vcr":  # the gate compares what ranks the answers
                logits = choices.choice_scores(self._answered(features).logits, stage["ranking"])
                features = dataclasses.replace(features, logits=logits)
            return features, model_state

        def pretrain(params: Any, model_state: Any, batch: Batch, rng: Any) -> tuple[Features, Any]:
            settings = pretraining_settings(stage, self.vocab)
            encode = partial(self._encode, module, stage, heads=())
            return adapt(module, encode, settings, params, batch, rng), model_state

        return pretrain if stage["pretraining"] else forward

    def _encode(
        self,
        module: JointModel,
        stage: Config,
        params: Any,
        batch: Batch,
        rng: Any,
        heads: tuple[str, ...] | None = None,
    ) -> JointFeatures:
        def run(part: Batch, _: Any, key: Any) -> tuple[JointFeatures, None]:
            rngs = {} if key is None else {"dropout": key}
            features: Any = module.apply({"params": params}, part, train=True, heads=heads, rngs=rngs)
            return features, None

        return apply_in_chunks(run, batch, stage["chunks"], None, rng)[0]

    def teach(
        self, module: DualEncoder, stage: Config, of: str, layers: bool
    ) -> Callable[[Any, Batch], Features]:
        """CLIP's Features of the questions, computed in chunks or read from its cache."""

        def compute(variables: Any, batch: Batch) -> Features:
            batch = right_choice(batch) if stage["pretraining"] else batch
            read = cached_choice_features if stage["cache"] else choice_features
            return self._asked(module, stage, variables, batch, read)

        return compute

    def _asked(
        self, module: DualEncoder, stage: Config, variables: Any, batch: Batch, read: Callable[..., Features]
    ) -> Features:
        made = variables.get("choices", {})
        clip = {name: value for name, value in variables.items() if name != "choices"}
        if "targets" in batch and not stage["pretraining"]:  # the answer that most have given
            known = batch["labelled"] & (batch["targets"].max(-1) > 0)
            batch = {**batch, "label": jnp.where(known, batch["targets"].argmax(-1), -1)}
        wanted = ("image", "importance", "label", "clip_", "clip/")
        batch = {name: value for name, value in batch.items() if name.startswith(wanted)}
        batch = {name: value for name, value in batch.items() if name not in ("image_id", "image_size")}
        # A frozen model needs no memory for a backward pass: chunks are the student's concern.
        return read(module, clip, batch, **made)

    def objective(self, stage: Config) -> dict[str, Any]:
        """The task, distilled on every question of the batch, labelled or not; VILLA's noise around it."""
        if stage["pretraining"]:
            if stage["adversarial"]:
                raise ValueError("adversarial training of a pretraining stage is not there: leave one out")
            return {
                "task": lambda features, batch: features.outcome,
                "distil_on": lambda features, batch: features.distil,
            }
        task = self._task(stage)
        return {
            "task": lambda features, batch: task(self._answered(features), batch),
            "distil_on": lambda features, batch: batch["mask"],
            "adversary": villa(stage, task, self._answered, self._sizes.width)
            if stage["adversarial"]
            else None,
        }

    def _task(self, stage: Config) -> Callable[[Features, Batch], Any]:
        if self.kind == "vcr":
            kind = stage["loss"] or LOSSES[self.config["student"]["kind"]]
            task = choices.choice_task(kind, stage["ranking"])
        else:
            make = choices.entailment_task if self.kind == "snli_ve" else choices.answer_task
            task = make(stage["loss"] or "sigmoid")
        if not stage["object_loss"]:
            return task

        def with_objects(features: Features, batch: Batch) -> Any:
            loss, valid, metrics = task(features, batch)
            seen = features.outputs["objects"]  # type: ignore[attr-defined]
            classes = jnp.repeat(batch["region_classes"], seen.shape[1], axis=0)
            mask = jnp.repeat(features.region_mask, seen.shape[1], axis=0)  # type: ignore[attr-defined]
            extra = choices.object_loss(fold(seen), classes, mask).reshape(seen.shape[:2]).mean(1)
            return loss + stage["object_loss"] * extra, valid, {**metrics, "object_loss": extra}

        return with_objects

    def _answered(self, features: Features) -> Features:
        """With `logits` as VCR's loss reads them: UNITER's two numbers a choice."""
        if self.kind != "vcr":
            return features
        logits = features.outputs["vcr"]  # type: ignore[attr-defined]
        return dataclasses.replace(features, logits=logits[..., 0] if logits.shape[-1] == 1 else logits)

    def cache_spec(
        self, module: DualEncoder, stage: Config, of: str, features: Features, **about: Any
    ) -> CacheSpec:
        """What the cache of CLIP holds; see `distill.choice_cache.choice_cache_spec` for `about`."""
        dtype = jnp.dtype(module.vision.dtype).name  # type: ignore[attr-defined]
        # Every choice is kept, though pretraining reads the right ones alone: one cache serves both.
        every: Config = {**stage, "pretraining": {}}
        features = jax.eval_shape(lambda: self.frozen(module, every, of, {"mask": jnp.ones(1, bool)})[0])
        return choice_cache_spec(features, dtype=dtype, **about)

    def vectors(self, *args: Any, **given: Any) -> dict[str, Vectors]:
        """See `distill.choice_cache.frozen_choice_vectors`."""
        return frozen_choice_vectors(*args, **given)

    def evaluator(self, module: JointModel, stage: Config, mesh: Mesh) -> ChoiceEvaluator | None:
        """Answers every question; None in pretraining, which has no answers."""
        if stage["pretraining"]:
            return None
        never = [self.vocab["unknown"]] if self.vocab and "unknown" in self.vocab else []
        kind = QUESTIONS[self.kind]
        return ChoiceEvaluator(module, mesh, kind=kind, ranking=stage["ranking"], never=never)

    def needed(self, module: DualEncoder, stage: Config, layers: bool, variables: Any) -> Any:
        """All of CLIP's variables, or with a cache its scale and what its logits are made with."""
        if not stage["cache"]:
            return variables
        made = {"choices": variables["choices"]} if "choices" in variables else {}
        return {**similarity_variables(module, variables), **made}
