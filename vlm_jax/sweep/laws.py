"""The law of error by model size and visual tokens: its fit, its error on held-out points, the best number of tokens.

Source: Li et al. 2024, "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters" (arXiv 2411.03312),
section 3: error = A / N^alpha * B / T^beta + D. As in the released code (scaling_law_code/objective.py), A and B are
one coefficient, which is all that data can tell, and T are visual tokens. Deviation: that code draws from a grid of
bounded ranges; here the least squares are solved, with exponents in [0, 8] and nothing negative.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import least_squares, nnls

STEEPEST = 8.0  # of an exponent: beyond it every error but that of the smallest value is the floor
_STEPS = (0.02, 0.2, 1.0, 4.0)
STARTS = tuple((alpha, beta) for alpha in _STEPS for beta in _STEPS)
REPLICATES = 200


@dataclasses.dataclass(frozen=True)
class Measured:
    """A measured point.

    Attributes:
      size: N, parameters of the language model.
      tokens: T, visual tokens.
      error: 1 minus the accuracy, in [0, 1]; the mean over seeds.
      seeds: {seed: its error}; empty where that is not known.
    """

    size: float
    tokens: float
    error: float
    seeds: Mapping[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Law:
    """error = coefficient / (size^alpha * tokens^beta) + floor.

    Attributes:
      coefficient, alpha, beta, floor: not negative.
    """

    coefficient: float
    alpha: float
    beta: float
    floor: float

    def error(self, size: float | np.ndarray, tokens: float | np.ndarray) -> float | np.ndarray:
        """The error of models with `size` parameters and `tokens` visual tokens."""
        return self.coefficient * np.power(size, -self.alpha) * np.power(tokens, -self.beta) + self.floor

    def optimal_tokens(self, text_tokens: float, fewest: float, most: float) -> float:
        """Visual tokens with the least error, where the size is as large as the FLOPs of inference allow.

        With 2 N (Q + T) FLOPs, Q text tokens, the error falls with T as long as beta / T > alpha / (Q + T): the best
        number is beta Q / (alpha - beta), of any budget; all tokens where tokens matter as much as size. Only
        sizes that exist are considered by `best_within`.

        Args:
          text_tokens: Q; 0 where the text is cached.
          fewest, most: visual tokens.
        """
        if self.alpha <= self.beta:
            return most
        return float(np.clip(self.beta * text_tokens / (self.alpha - self.beta), fewest, most))


def flops_of(size: float, text_tokens: float, tokens: float) -> float:
    """FLOPs of a prompt in the language model, 2 N (Q + T)."""
    return 2 * size * (text_tokens + tokens)


def best_within(law: Law, flops: float, text_tokens: float, points: Sequence[Measured]) -> Measured | None:
    """Of the measured points within FLOPs the one with the least error by the law; None where none is within.

    The law chooses, since the least of several measured errors is too low by chance. Of equal errors the cheaper one.
    """

    def place(point: Measured) -> tuple[float, float]:
        error = float(law.error(point.size, point.tokens))
        return error, flops_of(point.size, text_tokens, point.tokens)

    return min((one for one in points if flops_of(one.size, text_tokens, one.tokens) <= flops), key=place, default=None)


def fit(points: Sequence[Measured], starts: Sequence[tuple[float, float]] = STARTS) -> Law:
    """The law with the least squared error.

    For given exponents the coefficient and the floor are a linear problem, which is solved exactly; the exponents are
    found from several starts.

    Args:
      points: at least five, of two sizes and two numbers of tokens.
      starts: (alpha, beta) from which the exponents are found.

    Raises:
      ValueError: these are too few to tell the four numbers.
    """
    sizes, tokens, errors = _columns(points)
    if len(points) < 5 or len(set(sizes)) < 2 or len(set(tokens)) < 2:
        raise ValueError(
            f"expected at least five points, of two sizes and two numbers of tokens, got {len(points)} of "
            f"{len(set(sizes))} and {len(set(tokens))}; add some, or hold fewer out"
        )
    middle = np.exp(np.log(sizes).mean()), np.exp(np.log(tokens).mean())
    size, token = sizes / middle[0], tokens / middle[1]

    def solved(exponents: Float[np.ndarray, "2"]) -> tuple[Float[np.ndarray, "2"], Float[np.ndarray, "points"]]:
        basis = np.stack([size ** -exponents[0] * token ** -exponents[1], np.ones_like(size)], axis=1)
        weights, _ = nnls(basis, errors)
        return weights, basis @ weights - errors

    tried = [
        least_squares(lambda one: solved(one)[1], start, bounds=(0, STEEPEST), xtol=1e-12, ftol=1e-14, gtol=1e-12)
        for start in starts
    ]
    alpha, beta = min(tried, key=lambda found: found.cost).x
    (scale, floor), _ = solved(np.array([alpha, beta]))
    return Law(float(scale * middle[0] ** alpha * middle[1] ** beta), float(alpha), float(beta), float(floor))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How well a law predicts points that it was not fitted to.

    Attributes:
      law: fitted to the others.
      points: that were held out.
      predicted: their errors by the law.
      rms: root mean square of predicted minus measured.
      rms_of_mean: likewise, of the mean of the points that it was fitted to, which predicts nothing.
    """

    law: Law
    points: tuple[Measured, ...]
    predicted: tuple[float, ...]
    rms: float
    rms_of_mean: float


def hold_out(points: Sequence[Measured], held: Bool[np.ndarray, "points"]) -> HeldOut:
    """Fits the law to the points that are not held out, and predicts the others.

    Raises:
      ValueError: none is held out, or as of `fit`.
    """
    if not held.any():
        raise ValueError("expected at least one point that is held out, got none")
    rest, kept = ([one for one, out in zip(points, held, strict=True) if out == wanted] for wanted in (False, True))
    law = fit(rest)
    sizes, tokens, errors = _columns(kept)
    predicted = np.asarray(law.error(sizes, tokens))
    mean = _columns(rest)[2].mean()
    return HeldOut(law, tuple(kept), tuple(predicted.tolist()), _rms(predicted - errors), _rms(mean - errors))


def splits(points: Sequence[Measured]) -> dict[str, Bool[np.ndarray, "points"]]:
    """What is held out: the largest model, which the law extrapolates to, and every fourth point, between others."""
    sizes, tokens, _ = _columns(points)
    places = np.unique(sizes, return_inverse=True)[1] + np.unique(tokens, return_inverse=True)[1]
    return {"largest model": sizes == sizes.max(), "every fourth": places % 4 == 2}


def exponent_intervals(points: Sequence[Measured]) -> dict[str, tuple[float, float]] | None:
    """Ranges of alpha and beta over the trainings: the 2.5% and 97.5% quantiles of the bootstrap.

    The points of a size are of the same trainings, one a seed. Every replicate draws n - 1 of the n seeds of each size
    with replacement, as `retained.over_seeds`, and takes the errors of all its points from these. The sizes stay the
    same, so that the ranges hold the spread of trainings, and not that of the sizes about the law; of two seeds there
    are two errors of each size, so that they are a rough guide, and no intervals of 95%.

    Returns:
      None where a size has fewer than two seeds that all of its points have.
    """
    groups = [[one for one in points if one.size == size] for size in sorted({one.size for one in points})]
    seeds = [sorted(set.intersection(*(set(one.seeds) for one in group))) for group in groups]
    if min(map(len, seeds)) < 2:
        return None
    whole = fit(points)
    start = (float(np.clip(whole.alpha, 1e-3, STEEPEST - 1e-3)), float(np.clip(whole.beta, 1e-3, STEEPEST - 1e-3)))
    rng = np.random.default_rng(0)
    drawn = [rng.multinomial(len(own) - 1, [1 / len(own)] * len(own), REPLICATES) for own in seeds]
    ends = np.cumsum([len(own) for own in seeds])[:-1]
    different, places = np.unique(np.concatenate(drawn, axis=1), axis=0, return_inverse=True)
    found = []
    for counts in different:
        replicate = [
            dataclasses.replace(one, error=float(np.average([one.seeds[seed] for seed in own], weights=weights)))
            for group, own, weights in zip(groups, seeds, np.split(counts, ends), strict=True)
            for one in group
        ]
        law = fit(replicate, (start,))
        found.append((law.alpha, law.beta))
    low, high = np.quantile(np.array(found)[places.reshape(-1)], (0.025, 0.975), axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(("alpha", "beta"))}


def residual(law: Law, points: Sequence[Measured]) -> float:
    """Root mean square of what the law predicts minus what is measured."""
    sizes, tokens, errors = _columns(points)
    return _rms(np.asarray(law.error(sizes, tokens)) - errors)


def _columns(points: Sequence[Measured]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = [(point.size, point.tokens, point.error) for point in points]
    sizes, tokens, errors = np.array(columns, float).reshape(-1, 3).T
    return sizes, tokens, errors


def _rms(differences: Float[np.ndarray, "points"]) -> float:
    return float(np.sqrt(np.mean(np.square(differences))))
