"""Small feature maps, terms run on them, and a slow reference of the layer terms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from clipdistill_jax.models.features import Features

B, FRAMES = 4, 3
STUDENT = ((5, 3), (4, 5), (1, 2))  # side and channels of every layer
TEACHER = ((3, 6), (3, 6), (3, 6))
MIXED = ((3, 6), (2, 6), (3, 4))  # several grids, several widths
# Half the time to compile, and these maps are too small to gain from more.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def features(seed, shapes, batch=B):
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, FRAMES)) < 0.7
    mask[:, 0] = True
    layers = tuple(rng.normal(size=(batch, FRAMES, side, side, width)) for side, width in shapes)
    return Features(layers=tuple(jnp.asarray(x, jnp.float32) for x in layers), frame_mask=jnp.asarray(mask))


def start(term, student, teacher):
    """Parameters of a term, drawn here so that biases are not zero."""
    valid = jnp.ones(len(student.frame_mask), bool)
    shapes = jax.eval_shape(term.init, jax.random.key(0), student, teacher, valid)
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape) * 0.3, np.float32), shapes)


@functools.cache
def compiled(term):
    """(params, student, teacher, valid, key) -> values and intermediates."""
    return jit(lambda p, s, t, v, k: term.apply(p, s, t, v, rngs={"mask": k}, mutable=["intermediates"]))


def run(term, params, student, teacher, key=2):
    """[B] values, and the intermediates."""
    values, kept = compiled(term)(params, student, teacher, jnp.ones(B, bool), jax.random.key(key))
    return np.asarray(values), {name: x[0] for name, x in kept.get("intermediates", {}).items()}


# The slow reference: one example, one layer, one position at a time.


def slow_grid(x, side):
    """torch's adaptive average of one frame [h, w, c]."""
    out = np.zeros((side, side, x.shape[-1]))
    for i in range(side):
        for j in range(side):
            rows = slice(i * x.shape[0] // side, -(-(i + 1) * x.shape[0] // side))
            columns = slice(j * x.shape[1] // side, -(-(j + 1) * x.shape[1] // side))
            out[i, j] = x[rows, columns].mean((0, 1))
    return out


def standard(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


def dense(params, name, x):
    return x @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"], np.float64)


def slow_weights(term, params, rows, columns, frames):
    """[R, C] of one example; rows and columns are lists of [F, h, w, C]."""

    def vector(x):
        return standard(np.mean([x[f].mean((0, 1)) for f in frames], 0))

    scores = np.zeros((len(rows), len(columns)))
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            query = dense(params, f"query{r}", vector(row))
            key = dense(params, f"key{c}", vector(column))
            if term.scores == "cosine":
                scores[r, c] = query @ key / np.linalg.norm(query) / np.linalg.norm(key)
            else:
                scores[r, c] = query @ key / np.sqrt(term.key_dim)
    weights = np.zeros_like(scores)
    for r in range(len(rows)):
        used = list(range(len(columns)))
        if term.mask == "depth":
            used = [c for c in used if c / len(columns) < (r + 1) / len(rows)]
        if term.mask == "top_k":
            used = sorted(used, key=lambda c: -scores[r, c])[: term.top_k]
        e = {c: np.exp(scores[r, c]) for c in used}
        for c in used:
            weights[r, c] = e[c] / sum(e.values())
    return weights


def slow_term(term, params, student, teacher, kind):
    """[B] values and [B, R, C] weights of `sab` or `tab` without random masking."""
    params, values, all_weights = params["params"], [], []
    for b in range(B):
        frames = [f for f in range(FRAMES) if student.frame_mask[b, f] and teacher.frame_mask[b, f]]
        ours = [np.asarray(x[b], np.float64) for x in student.layers]
        theirs = [np.asarray(x[b], np.float64) for x in teacher.layers]
        rows, columns = (theirs, ours) if kind == "sab" else (ours, theirs)
        w = slow_weights(term, params, rows, columns, frames)
        all_weights.append(w)

        def target(m, f, i, j, theirs=theirs):
            side = term.grid or theirs[m].shape[1]
            vector = slow_grid(theirs[m][f], side)[i, j]
            return standard(vector) if term.normalize == "layer_norm" else vector

        def base(n, m, f, i, j, theirs=theirs, ours=ours):
            side, width = term.grid or theirs[m].shape[1], theirs[m].shape[-1]
            return dense(params, f"project{n}_to_{width}", slow_grid(ours[n][f], side)[i, j])

        total, n_layers, m_layers = 0.0, range(len(ours)), range(len(theirs))
        for r in range(len(rows)):
            # Where only rows are summed over, any teacher layer's grid and width will do for tab's form A.
            for m in [r] if kind == "sab" else m_layers if term.form == "B" else [0]:
                side, errors = term.grid or theirs[m].shape[1], []
                for f in frames:
                    for i in range(side):
                        for j in range(side):
                            at = (f, i, j)
                            if kind == "sab" and term.form == "A":
                                gap = target(m, *at) - sum(w[m, n] * base(n, m, *at) for n in n_layers)
                                errors.append(np.mean(gap**2))
                            elif kind == "sab":
                                gaps = [target(m, *at) - base(n, m, *at) for n in n_layers]
                                errors.append(sum(w[m, n] * np.mean(gaps[n] ** 2) for n in n_layers))
                            elif term.form == "A":
                                gap = base(r, 0, *at) - sum(w[r, k] * target(k, *at) for k in m_layers)
                                errors.append(np.mean(gap**2))
                            else:
                                gap = base(r, m, *at) - target(m, *at)
                                errors.append(w[r, m] * np.mean(gap**2))
                total += np.mean(errors) if errors else 0.0
        values.append(total / len(rows))
    return np.array(values), np.array(all_weights)
