"""Terms that match feature maps: the student's layers as bases, the teacher's as bases, fixed pairs."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipdistill_jax.distill.layers import (
    choose_layers,
    clip_vector,
    combination_distance,
    depth_mask,
    layer_weights,
    one_of,
    position_weights,
    spread_layers,
    to_grid,
)
from clipdistill_jax.distill.semckd import SemCKD
from clipdistill_jax.models.features import Features
from clipdistill_jax.models.temporal import unit

Maps = dict[int, Any]  # feature maps [B, F, h, w, C] by their index in the model


def as_target(x: Float[Array, "b f h w c"], grid: int, normalize: str) -> Float[Array, "b f _ _ c"]:
    """A teacher's map as the layer terms match it: on the grid (0: its own), standardised or not."""
    x = to_grid(x, grid or x.shape[2], grid or x.shape[3])
    return jax.nn.standardize(x, epsilon=1e-5) if normalize == "layer_norm" else x


class _LayerTerm(nn.Module):
    """What all layer terms share.

    Attributes:
      teacher_layers, student_layers: which feature maps take part; empty is all, -1 the last.
      grid: side of the grid on which maps are compared; 0 is each teacher layer's own. Maps are averaged
        down to it or interpolated up.
      normalize: "layer_norm" gives every position of the teacher's map mean 0 and variance 1 over channels:
        the states of a pre-norm transformer grow with depth, and the next block reads them normalised; so
        every layer counts alike. "none" matches the maps as they are. The student's need neither: the
        projection learns their scale.
    """

    teacher_layers: Sequence[int] = ()
    student_layers: Sequence[int] = ()
    grid: int = 0
    normalize: str = "layer_norm"
    term: ClassVar[str]
    of: ClassVar = "teacher"
    needs: ClassVar = ("layers", "frame_mask")

    def _maps(self, whose: str, features: Features, wanted: Sequence[int]) -> Maps:
        chosen = choose_layers(self.term, whose, wanted, len(features.layers))
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"term {self.term!r}: {whose}_layers names a layer twice: {tuple(wanted)}")
        return {index: features.layers[index] for index in chosen}

    def _shape(self, x: Any) -> tuple[int, int, int]:
        """Height, width and channels in which a teacher's map is matched."""
        return self.grid or x.shape[2], self.grid or x.shape[3], x.shape[-1]


class _LayerBases(_LayerTerm):
    """Layers of one model (rows) against weighted layers of the other (columns); see the terms below.

    Attributes:
      form: "A" compares a layer with the weighted sum of the others, "B" sums the weighted comparisons.
      mask: "none"; "depth": a row uses only columns of comparable or lower depth, see `depth_mask`;
        "top_k": only the `top_k` with the highest scores; "random_spatial": positions are left out at
        random (rng "mask").
      top_k: for the mask of that name.
      mask_rate: fraction of the positions that "random_spatial" leaves out.
      key_dim: width of queries and keys.
      scores: "dot" is query . key / sqrt(key_dim), by which one layer can take nearly all the weight;
        "cosine" is that of unit vectors, as in SemCKD, which keeps the ratio of two weights under e^2.
    """

    form: str = "A"
    mask: str = "none"
    top_k: int = 1
    mask_rate: float = 0.5
    key_dim: int = 64
    scores: str = "dot"
    rows: ClassVar[str]

    @nn.compact
    def __call__(self, student: Features, teacher: Features, valid: Bool[Array, " b"]) -> Float[Array, " b"]:
        """Mean over the rows, a value an example.

        `apply(..., mutable=["intermediates"])` also gives "weights" [B, R, C], whose rows sum to one, and for
        every teacher layer "targets" [B, F, h, w, C] and "bases", all student layers in that shape.

        Raises:
          ValueError: a layer that is not there, or a field with a value that it cannot have.
        """
        one_of(self.term, "form", self.form, ("A", "B"))
        one_of(self.term, "mask", self.mask, ("none", "depth", "top_k", "random_spatial"))
        one_of(self.term, "scores", self.scores, ("dot", "cosine"))
        one_of(self.term, "normalize", self.normalize, ("layer_norm", "none"))
        ours = self._maps("student", student, self.student_layers)
        theirs = jax.lax.stop_gradient(self._maps("teacher", teacher, self.teacher_layers))
        seen = student.frame_mask & teacher.frame_mask
        rows, columns = (theirs, ours) if self.rows == "teacher" else (ours, theirs)
        weights = self._weights(rows, columns, seen)
        bases, positions = self._bases(ours, theirs), self._positions(theirs, seen)
        self.sow("intermediates", "weights", weights)
        if self.is_mutable_collection("intermediates"):
            targets = tuple(as_target(x, self.grid, self.normalize) for x in theirs.values())
            self.sow("intermediates", "targets", targets)
            self.sow("intermediates", "bases", tuple(tuple(maps) for maps in bases))
        return self._compare(list(theirs.values()), bases, weights, positions) / len(rows)

    def _weights(self, rows: Maps, columns: Maps, seen: Bool[Array, "b f"]) -> Float[Array, "b r c"]:
        """Softmax over the columns of the masked scores of the rows' queries and the columns' keys."""
        if self.mask == "top_k" and not 1 <= self.top_k <= len(columns):
            raise ValueError(f"term {self.term!r}: top_k is {self.top_k}, of {len(columns)} layers")

        def embed(name: str, maps: Maps) -> Array:
            vectors = [
                nn.Dense(self.key_dim, name=f"{name}{index}")(clip_vector(x, seen))
                for index, x in maps.items()
            ]
            stacked = jnp.stack(vectors, 1)
            return unit(stacked) if self.scores == "cosine" else stacked / self.key_dim**0.25

        scores = jnp.einsum("brk,bck->brc", embed("query", rows), embed("key", columns))
        allowed = depth_mask(list(rows), list(columns)) if self.mask == "depth" else None
        return layer_weights(scores, allowed, self.top_k if self.mask == "top_k" else 0)

    def _bases(self, ours: Maps, theirs: Maps) -> list[list[Array]]:
        """For every teacher layer the student's layers in its shape; those of equal shape are made once."""
        dense: dict[tuple[int, int], nn.Module] = {}
        made: dict[tuple[int, int, int], list[Array]] = {}
        for height, width, channels in map(self._shape, theirs.values()):
            if (height, width, channels) in made:
                continue
            for index in ours:
                if (index, channels) not in dense:
                    dense[index, channels] = nn.Dense(channels, name=f"project{index}_to_{channels}")
            made[height, width, channels] = [
                dense[index, channels](to_grid(x, height, width)) for index, x in ours.items()
            ]
        return [made[self._shape(x)] for x in theirs.values()]

    def _positions(self, theirs: Maps, seen: Bool[Array, "b f"]) -> list[Array]:
        """For every teacher layer the weights [B, F, h, w] of its positions; one draw for equal grids."""
        if not 0 <= self.mask_rate < 1:
            raise ValueError(f"term {self.term!r}: mask_rate is {self.mask_rate}; it is from 0 to below 1")
        made: dict[tuple[int, int], Array] = {}
        for height, width, _ in map(self._shape, theirs.values()):
            if (height, width) not in made:
                key = self.make_rng("mask") if self.mask == "random_spatial" else None
                made[height, width] = position_weights(seen, height, width, key, self.mask_rate)
        return [made[self._shape(x)[:2]] for x in theirs.values()]

    def _compare(
        self, theirs: list[Array], bases: list[list[Array]], weights: Array, positions: list[Array]
    ) -> Float[Array, " b"]:
        """Sum over the teacher's layers of their distance from the weighted student layers."""
        grid, normalize, form = self.grid, self.normalize, self.form

        @jax.checkpoint  # so that no map of differences is kept for the backward pass
        def distance(theirs: Array, maps: list[Array], weights: Array, positions: Array) -> Array:
            target = as_target(theirs, grid, normalize)
            return combination_distance(target, maps, weights, positions, form)

        by_teacher = weights if self.rows == "teacher" else weights.swapaxes(1, 2)
        total = jnp.zeros(weights.shape[0])
        for m, x in enumerate(theirs):
            total = total + distance(x, bases[m], by_teacher[:, m], positions[m])
        return total


class StudentAsBase(_LayerBases):
    """SAB: every teacher layer is a combination of the student's layers (CLIPPING, equation 1).

    w_mn = softmax over the student's layers n. Form "A" is the equation read literally, mean over m of
    |T_m - sum_n w_mn phi_n(S_n)|^2; form "B" is mean over m of sum_n w_mn |T_m - phi_n(S_n)|^2, which is
    SemCKD's loss with the softmax over the other axis. A is at most B. phi_n is a 1x1 projection to the
    teacher's width. The paper gives neither the projections nor what it masks (it gains 0.5 by masking): the
    default "depth" is ours.
    """

    mask: str = "depth"
    term: ClassVar = "sab"
    rows: ClassVar = "teacher"


class TeacherAsBase(_LayerBases):
    """TAB: every student layer is a combination of the teacher's layers (CLIPPING, equation 2).

    w'_nm = softmax over the teacher's layers m. Form "A" is mean over n of |phi_n(S_n) - sum_m w'_nm T_m|^2,
    form "B" mean over n of sum_m w'_nm |phi_n(S_n) - T_m|^2. Form "semckd" is SemCKD as published, see
    there: form B on the maps as they are, with its own attention and regressors, so that only the layers
    and `batch_size` can be set.

    Attributes:
      batch_size: for "semckd": the training batch; its attention reads rows of the batch's Gram matrices.
    """

    batch_size: int = 0
    term: ClassVar = "tab"
    rows: ClassVar = "student"

    @nn.compact
    def __call__(self, student: Features, teacher: Features, valid: Bool[Array, " b"]) -> Float[Array, " b"]:
        """Mean over the student's layers, a value an example; else as `StudentAsBase`.

        Form "semckd" gives the intermediate "weights" only.
        """
        if self.form != "semckd":
            return super().__call__(student, teacher, valid)
        if (self.mask, self.grid) != ("none", 0):
            raise ValueError("term 'tab': form 'semckd' takes no mask and no grid")
        ours = self._maps("student", student, self.student_layers)
        theirs = jax.lax.stop_gradient(self._maps("teacher", teacher, self.teacher_layers))
        seen = student.frame_mask & teacher.frame_mask & valid[:, None]
        values, weights = SemCKD(self.batch_size, name="semckd")(
            list(ours.values()), list(theirs.values()), seen
        )
        self.sow("intermediates", "weights", weights)
        return values

    def _compare(
        self, theirs: list[Array], bases: list[list[Array]], weights: Array, positions: list[Array]
    ) -> Float[Array, " b"]:
        if self.form == "B":
            return super()._compare(theirs, bases, weights, positions)
        if len(set(map(self._shape, theirs))) > 1:
            raise ValueError(
                "term 'tab': teacher layers of several shapes cannot be summed: set grid, choose layers of "
                "one width, or take form 'B'"
            )

        grid, normalize = self.grid, self.normalize

        @jax.checkpoint
        def distance(maps: Array, theirs: list[Array], weights: Array, positions: Array) -> Array:
            targets = [as_target(x, grid, normalize) for x in theirs]
            return combination_distance(maps, targets, weights, positions, "A")

        total = jnp.zeros(weights.shape[0])
        for n, x in enumerate(bases[0]):
            total = total + distance(x, theirs, weights[:, n], positions[0])
        return total


class LayerToLayer(_LayerTerm):
    """OL2OL: one student layer to one teacher layer, mean squared error after a 1x1 projection (FitNets).

    The i-th of `student_layers` is paired with the i-th of `teacher_layers`; where these are empty, with
    evenly spread ones, the last with the last (TinyBERT's every k-th).
    """

    term: ClassVar = "ol2ol"

    @nn.compact
    def __call__(self, student: Features, teacher: Features, valid: Bool[Array, " b"]) -> Float[Array, " b"]:
        """Mean over the pairs, a value an example.

        Raises:
          ValueError: a layer that is not there, or lists of several lengths.
        """
        one_of(self.term, "normalize", self.normalize, ("layer_norm", "none"))
        seen = student.frame_mask & teacher.frame_mask
        ours = choose_layers(self.term, "student", self.student_layers, len(student.layers))
        wanted = self.teacher_layers or spread_layers(len(ours), len(teacher.layers))
        theirs = choose_layers(self.term, "teacher", wanted, len(teacher.layers))
        if len(ours) != len(theirs):
            raise ValueError(
                f"term 'ol2ol' pairs layers, but there are {len(ours)} of the student and {len(theirs)} of "
                "the teacher: give student_layers and teacher_layers of one length"
            )
        total = jnp.zeros(len(valid))
        for n, m in zip(ours, theirs, strict=True):
            target = jax.lax.stop_gradient(teacher.layers[m])
            height, width, channels = self._shape(target)
            maps = nn.Dense(channels, name=f"project{n}_to_layer{m}")(
                to_grid(student.layers[n], height, width)
            )
            target = as_target(target, self.grid, self.normalize)
            weights, positions = jnp.ones((len(valid), 1)), position_weights(seen, height, width)
            total = total + combination_distance(target, [maps], weights, positions, "A")
        return total / len(ours)
