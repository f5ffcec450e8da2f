"""The mathematics of Diffusion Boosted Trees as pure functions: arrays in, arrays out.

Notation, in the units of the standardized response:

    y_0         the response; r_t = y_t - f is the same chain without its shift
    f           `prior_mean`, an estimate of E[y_0 | x]; the chain starts at N(f, I), not at N(0, I)
    t           the diffusion step, 1..T; index 0 of every schedule array is the clean end
    alpha_bar   share of the variance of y_0 still present at t, from 1 (t = 0) down to nearly 0 (t = T)
    s2          `residual_variance`, the mean of (y_0 - f)^2 of each output

Every function runs in float64, except that it stays in float32 if all arrays it is given are float32;
coefficients are always computed in float64 and cast once.

References:
    Han and Zhou, Diffusion Boosted Trees, arXiv 2406.01813.
    Han, Zheng and Zhou, CARD: Classification and Regression Diffusion Models, arXiv 2206.07275.
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax, stdtr

PredictionType: TypeAlias = Literal["y0", "epsilon", "residual"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)

Array: TypeAlias = NDArray[Any]
Step: TypeAlias = "int | NDArray[np.integer[Any]]"
Coefficient: TypeAlias = "float | NDArray[np.float64]"


class LinearStep(NamedTuple):
    """A reverse step as an affine function of what the tree said, the state and the prior mean.

        mean(y_{t-1}) = prediction * F + state * y_t + prior * f
        variance(y_{t-1}) = variance + gamma0^2 * extra_variance

    Without the shift, r = y - f, the same step is
        mean(r_{t-1}) = prediction * F + state * r_t + (state + prior - 1) * f,
    where the last coefficient is 0 for "epsilon" and "residual", and -gamma0 for "y0" (which predicts y_0,
    not r_0).

    Each entry is a float, or an array of the broadcast shape of t and the residual variance.
    """

    prediction: Coefficient
    state: Coefficient
    prior: Coefficient
    gamma0: Coefficient
    variance: Coefficient

    def spread(self, extra_variance: ArrayLike) -> Array:
        """Standard deviation of y_{t-1}: sqrt(variance + gamma0^2 extra_variance), of the broadcast shape."""
        return np.sqrt(self.variance + self.gamma0 * self.gamma0 * np.asarray(extra_variance))


@dataclass(frozen=True, eq=False, repr=False)
class DiffusionSchedule:
    """The noise schedule of the chain and the equations that follow from it (CARD, arXiv 2206.07275).

    The forward chain moves y towards f while adding noise,
        y_t | y_{t-1} ~ N(sqrt(alpha_t) y_{t-1} + (1 - sqrt(alpha_t)) f, beta_t I),
    and its posterior is Gaussian,
        y_{t-1} | y_t, y_0 ~ N(gamma0 y_0 + gamma1 y_t + gamma2 f, posterior_variance I).

    Make one with `linear`, `cosine`, `karras` or `from_alpha_bar`. All arrays are (T + 1,) float64 and
    read-only. At the clean end (index 0) alpha_bar = alpha = 1, and beta, the gammas and the variance are 0.
    Equal schedules compare equal.

    The methods share these arguments and check their shapes:
        y0, yt, prior_mean, noise, prediction: the response, the state at t, f, standard normal draws and what
            the tree said. The state (in `forward`: y0 with noise) and t broadcast to the shape of the result;
            every other array must fit that shape without growing it.
        t: an int or an integer array, within 1..T.
        prediction_type: "y0", "epsilon" or "residual": what a tree predicts, see `reconstruct`.
        residual_variance: s2 > 0, a number or (d,) for the last axis of y. Needed by "residual" alone.
    Breaking any of this raises ValueError.

    Attributes:
        log_alpha_bar: logarithm of alpha_bar, from which everything else derives. Kept because 1 - alpha_bar
            loses its digits at small t; `DiffusionSchedule(log_alpha_bar)` restores a stored schedule to the
            last bit.
        n_steps: T.
        alpha_bar: cumulative product of alpha.
        alpha: alpha_bar[t] / alpha_bar[t - 1].
        beta: 1 - alpha.
        gamma0: weight of y_0 in the posterior mean.
        gamma1: weight of y_t in the posterior mean.
        gamma2: weight of f in the posterior mean; the three add up to 1.
        posterior_variance: variance of the posterior.
    """

    log_alpha_bar: NDArray[np.float64]
    n_steps: int = field(init=False)
    alpha_bar: NDArray[np.float64] = field(init=False)
    alpha: NDArray[np.float64] = field(init=False)
    beta: NDArray[np.float64] = field(init=False)
    gamma0: NDArray[np.float64] = field(init=False)
    gamma1: NDArray[np.float64] = field(init=False)
    gamma2: NDArray[np.float64] = field(init=False)
    posterior_variance: NDArray[np.float64] = field(init=False)
    _noise_variance: NDArray[np.float64] = field(init=False)  # 1 - alpha_bar, without cancellation

    def __post_init__(self) -> None:
        log_alpha_bar = np.array(self.log_alpha_bar, dtype=np.float64)
        if log_alpha_bar.ndim != 1 or len(log_alpha_bar) < 2:
            raise ValueError(f"alpha_bar must be 1-D with n_steps + 1 >= 2 values, got {log_alpha_bar.shape}")
        log_alpha = np.diff(log_alpha_bar, prepend=0.0)
        if not np.isfinite(log_alpha).all() or log_alpha[0] != 0.0 or (log_alpha[1:] >= 0.0).any():
            raise ValueError("alpha_bar must start at 1, fall at every step and stay above 0")

        alpha_bar = np.exp(log_alpha_bar)
        alpha = np.exp(log_alpha)
        beta = -np.expm1(log_alpha)
        noise_variance = -np.expm1(log_alpha_bar)
        previous, now = slice(None, -1), slice(1, None)
        gamma0, gamma1, gamma2, posterior_variance = np.zeros((4, len(alpha_bar)))
        gamma0[now] = beta[now] * np.sqrt(alpha_bar[previous]) / noise_variance[now]
        gamma1[now] = noise_variance[previous] * np.sqrt(alpha[now]) / noise_variance[now]
        # The chain of y - f has no gamma2; adding f back gives f what the other two leave. This equals
        # 1 + (sqrt(alpha_bar_t) - 1)(sqrt(alpha_t) + sqrt(alpha_bar_{t-1})) / (1 - alpha_bar_t), and is
        # exactly 0 at t = 1.
        gamma2[now] = 1.0 - gamma0[now] - gamma1[now]
        posterior_variance[now] = noise_variance[previous] * beta[now] / noise_variance[now]

        arrays = {
            "log_alpha_bar": log_alpha_bar,
            "alpha_bar": alpha_bar,
            "alpha": alpha,
            "beta": beta,
            "gamma0": gamma0,
            "gamma1": gamma1,
            "gamma2": gamma2,
            "posterior_variance": posterior_variance,
            "_noise_variance": noise_variance,
        }
        object.__setattr__(self, "n_steps", len(alpha_bar) - 1)
        for name, array in arrays.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DiffusionSchedule):
            return NotImplemented
        return np.array_equal(self.log_alpha_bar, other.log_alpha_bar)

    def __hash__(self) -> int:
        return hash(self.log_alpha_bar.tobytes())

    def __repr__(self) -> str:
        return f"DiffusionSchedule(n_steps={self.n_steps}, alpha_bar[-1]={self.alpha_bar[-1]:.3g})"

    def __reduce__(self) -> tuple[type[DiffusionSchedule], tuple[NDArray[np.float64]]]:
        # A pickled array comes back writeable; the constructor keeps the schedule frozen in a worker too.
        return type(self), (self.log_alpha_bar,)

    @classmethod
    def linear(
        cls, n_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02, rescale: bool = False
    ) -> DiffusionSchedule:
        """Beta evenly spaced from `beta_start` to `beta_end`; one step alone takes `beta_end`, the noisy end.

        `rescale` multiplies both ends by 1000 / n_steps and clips beta at 0.999, so that any number of steps
        ends as close to pure noise as 1000 steps do.
        """
        fraction = _unit_grid(n_steps)
        scale = 1000.0 / n_steps if rescale else 1.0
        beta = scale * (beta_start + fraction * (beta_end - beta_start))
        if rescale:
            beta = np.minimum(beta, 0.999)
        if not ((beta > 0.0) & (beta < 1.0)).all():
            raise ValueError(f"beta must lie inside (0, 1), got beta_start={beta_start}, beta_end={beta_end}")
        return cls._from_beta(beta)

    @classmethod
    def cosine(cls, n_steps: int, s: float = 0.008, max_beta: float = 0.999) -> DiffusionSchedule:
        """Alpha_bar falling as cos^2((t / T + s) / (1 + s) * pi / 2), each beta clipped at `max_beta`."""
        _check_n_steps(n_steps)
        if not s >= 0.0:
            raise ValueError(f"s must not be negative, got {s}")
        if not 0.0 < max_beta < 1.0:
            raise ValueError(f"max_beta must lie inside (0, 1), got {max_beta}")
        angle = (np.arange(n_steps + 1) / n_steps + s) / (1.0 + s) * (np.pi / 2.0)
        before, after = angle[:-1], angle[1:]
        # 1 - cos^2(after) / cos^2(before) without the subtraction of nearly equal numbers.
        beta = np.sin(after - before) * np.sin(after + before) / np.cos(before) ** 2
        return cls._from_beta(np.minimum(beta, max_beta))

    @classmethod
    def karras(
        cls, n_steps: int, sigma_min: float = 0.02, sigma_max: float = 10.0, rho: float = 7.0
    ) -> DiffusionSchedule:
        """Noise levels sigma evenly spaced in sigma^(1/rho), with alpha_bar = 1 / (1 + sigma^2).

        Source: arXiv 2206.00364, equation 5. One step alone takes `sigma_max`, the noisy end.
        """
        fraction = _unit_grid(n_steps)
        if not (0.0 < sigma_min < sigma_max < np.inf and rho > 0.0):
            raise ValueError(
                f"karras needs 0 < sigma_min < sigma_max and rho > 0, got sigma_min={sigma_min}, "
                f"sigma_max={sigma_max}, rho={rho}"
            )
        low, high = sigma_min ** (1.0 / rho), sigma_max ** (1.0 / rho)
        sigma = (low + fraction * (high - low)) ** rho
        return cls(np.concatenate([[0.0], -np.log1p(sigma**2)]))

    @classmethod
    def from_alpha_bar(cls, alpha_bar: ArrayLike) -> DiffusionSchedule:
        """A schedule of one's own: (T + 1,) values that start at 1, fall at every step and stay above 0."""
        values = np.asarray(alpha_bar, dtype=np.float64)
        if not (values > 0.0).all():
            raise ValueError("alpha_bar must start at 1, fall at every step and stay above 0")
        return cls(np.log(values))

    @classmethod
    def _from_beta(cls, beta: NDArray[np.float64]) -> DiffusionSchedule:
        return cls(np.concatenate([[0.0], np.cumsum(np.log1p(-beta))]))

    def forward(self, y0: ArrayLike, prior_mean: ArrayLike, t: Step, noise: ArrayLike) -> Array:
        """y_t = sqrt(alpha_bar) y_0 + (1 - sqrt(alpha_bar)) f + sqrt(1 - alpha_bar) noise.

        Returns:
            y_t, of the broadcast shape of y0, noise and t.
        """
        t = self._steps(t)
        _check_shapes({"y0": y0, "noise": noise, "t": t}, prior_mean=prior_mean)
        y, f, eps, dtype = _operands(y0, prior_mean, noise)
        signal = _cast(np.exp(0.5 * _at(self.log_alpha_bar, t)), dtype)
        shrink = _cast(-np.expm1(0.5 * _at(self.log_alpha_bar, t)), dtype)
        spread = _cast(np.sqrt(_at(self._noise_variance, t)), dtype)
        return signal * y + shrink * f + spread * eps

    def posterior(self, y0: ArrayLike, yt: ArrayLike, prior_mean: ArrayLike, t: Step) -> tuple[Array, Coefficient]:
        """Mean and variance of q(y_{t-1} | y_t, y_0, f).

        Returns:
            The mean, gamma0 y_0 + gamma1 y_t + gamma2 f, and the variance of each entry: a float for one t,
            else an array of the shape of t.
        """
        t = self._steps(t)
        _check_shapes({"yt": yt, "t": t}, y0=y0, prior_mean=prior_mean)
        y, state, f, dtype = _operands(y0, yt, prior_mean)
        gamma0, gamma1, gamma2 = (_cast(_at(g, t), dtype) for g in (self.gamma0, self.gamma1, self.gamma2))
        return gamma0 * y + gamma1 * state + gamma2 * f, _at(self.posterior_variance, t)

    def residual_coefficients(self, t: Step, residual_variance: ArrayLike) -> tuple[Coefficient, Coefficient]:
        """(c_skip, c_out) of y_0 = f + c_skip (y_t - f) + c_out F, type "residual" (beyond the paper).

        Were y_0 - f Gaussian with variance s2, c_skip (y_t - f) would be its exact posterior mean and c_out
        its exact posterior standard deviation: the tree learns, at unit scale, only what is not Gaussian or
        not homoscedastic.

            c_skip = sqrt(alpha_bar) s2 / (alpha_bar s2 + 1 - alpha_bar)
            c_out = sqrt(s2 (1 - alpha_bar) / (alpha_bar s2 + 1 - alpha_bar))

        Returns:
            Two floats, or two float64 arrays of the broadcast shape of t and s2.
        """
        t = self._steps(t)
        s2 = np.asarray(residual_variance, dtype=np.float64)
        if not ((s2 > 0.0) & np.isfinite(s2)).all():
            raise ValueError(f"residual_variance must be positive and finite, got {residual_variance!r}")
        alpha_bar, noise_variance = _at(self.alpha_bar, t), _at(self._noise_variance, t)
        total = alpha_bar * s2 + noise_variance
        return (
            _cast(np.sqrt(alpha_bar) * s2 / total, np.float64),
            _cast(np.sqrt(s2 * noise_variance / total), np.float64),
        )

    def target(
        self,
        y0: ArrayLike,
        yt: ArrayLike,
        prior_mean: ArrayLike,
        t: Step,
        prediction_type: str,
        residual_variance: ArrayLike | None = None,
    ) -> Array:
        """What a tree should say at t: `reconstruct` solved for the prediction at the true y_0.

        Returns:
            The target, of the shape of `yt` and t. Squared error to it is the loss of the tree at t.
        """
        t = self._steps(t)
        _check_shapes({"yt": yt, "t": t}, y0=y0, prior_mean=prior_mean, residual_variance=residual_variance)
        coefficients = self._reconstruction(t, prediction_type, residual_variance)
        y, state, f, dtype = _operands(y0, yt, prior_mean)
        out, skip, prior = (_cast(c, dtype) for c in coefficients)
        return (y - prior * f - skip * (state - f)) / out

    def reconstruct(
        self,
        prediction: ArrayLike,
        yt: ArrayLike,
        prior_mean: ArrayLike,
        t: Step,
        prediction_type: str,
        residual_variance: ArrayLike | None = None,
        bounds: ArrayLike | None = None,
    ) -> Array:
        """The y_0 that a prediction F stands for.

            y0          F
            epsilon     f + ((y_t - f) - sqrt(1 - alpha_bar) F) / sqrt(alpha_bar)
            residual    f + c_skip (y_t - f) + c_out F, see `residual_coefficients`

        `bounds`, (2,) or (2, d), are the least and the largest y_0 to be believed (beyond the paper). With "epsilon" a
        step without them multiplies what the prediction leaves over by 1 / sqrt(alpha): the chain runs away from any
        prediction that does not grow with y_t, such as a tree's.

        Returns:
            The estimate of y_0, of the shape of `yt` and t.
        """
        t = self._steps(t)
        _check_shapes(
            {"yt": yt, "t": t},
            prediction=prediction,
            prior_mean=prior_mean,
            residual_variance=residual_variance,
        )
        coefficients = self._reconstruction(t, prediction_type, residual_variance)
        said, state, f, dtype = _operands(prediction, yt, prior_mean)
        out, skip, prior = (_cast(c, dtype) for c in coefficients)
        y0 = out * said + skip * (state - f) + prior * f
        if bounds is None:
            return y0
        low, high = np.asarray(bounds, dtype)
        return np.clip(y0, low, high)

    def linear_step(self, t: Step, prediction_type: str, residual_variance: ArrayLike | None = None) -> LinearStep:
        """The step t -> t-1 as an affine function: `reconstruct` put into `posterior`.

        Returns:
            The coefficients, see `LinearStep`.
        """
        t = self._steps(t)
        out, skip, prior = self._reconstruction(t, prediction_type, residual_variance)
        gamma0, gamma1, gamma2 = (_at(g, t) for g in (self.gamma0, self.gamma1, self.gamma2))
        return LinearStep(
            prediction=gamma0 * out,
            state=gamma0 * skip + gamma1,
            prior=gamma0 * (prior - skip) + gamma2,
            gamma0=gamma0,
            variance=_at(self.posterior_variance, t),
        )

    def reverse_step(
        self,
        prediction: ArrayLike,
        yt: ArrayLike,
        prior_mean: ArrayLike,
        t: Step,
        noise: ArrayLike,
        prediction_type: str,
        residual_variance: ArrayLike | None = None,
        extra_variance: ArrayLike = 0.0,
        bounds: ArrayLike | None = None,
    ) -> Array:
        """y_{t-1} = posterior mean at the reconstructed y_0 + sqrt(posterior_variance + gamma0^2 w) noise.

        With the extra variance w >= 0, an estimate of Var(y_0 | y_t, x) in squared units of y that must fit
        the shape of the result, the step has the exact second moment of p(y_{t-1} | y_t) (beyond the paper,
        where w = 0). For `bounds` see `reconstruct`.

        Returns:
            y_{t-1}, of the shape of `yt` and t.
        """
        t = self._steps(t)
        _check_shapes(
            {"yt": yt, "t": t},
            prediction=prediction,
            prior_mean=prior_mean,
            noise=noise,
            residual_variance=residual_variance,
            extra_variance=extra_variance,
        )
        step = self.linear_step(t, prediction_type, residual_variance)
        said, state, f, eps, extra, dtype = _operands(prediction, yt, prior_mean, noise, extra_variance)
        of_prediction, of_state, of_prior = (_cast(c, dtype) for c in step[:3])
        if np.any(np.less(extra, 0.0)):
            raise ValueError(f"extra_variance must not be negative, got {np.min(extra)}")
        spread = _cast(step.spread(extra), dtype)
        if bounds is None:
            return of_prediction * said + of_state * state + of_prior * f + spread * eps
        y0 = self.reconstruct(said, state, f, t, prediction_type, residual_variance, bounds)
        return self.posterior(y0, state, f, t)[0] + spread * eps

    def _reconstruction(
        self, t: Step, prediction_type: str, residual_variance: ArrayLike | None
    ) -> tuple[Coefficient, Coefficient, Coefficient]:
        """(out, skip, prior) of y_0 = out F + skip (y_t - f) + prior f: the one place where types differ."""
        if prediction_type == "y0":
            return 1.0, 0.0, 0.0
        if prediction_type == "epsilon":
            signal = np.exp(0.5 * _at(self.log_alpha_bar, t))
            spread = np.sqrt(_at(self._noise_variance, t))
            return _cast(-spread / signal, np.float64), _cast(1.0 / signal, np.float64), 1.0
        if prediction_type == "residual":
            if residual_variance is None:
                raise ValueError('prediction_type "residual" needs residual_variance, the mean of (y0 - prior_mean)^2')
            c_skip, c_out = self.residual_coefficients(t, residual_variance)
            return c_out, c_skip, 1.0
        raise ValueError(f"unknown prediction_type {prediction_type!r}; valid ones: {', '.join(PREDICTION_TYPES)}")

    def _steps(self, t: Step) -> Step:
        """The steps as an int or an integer array, within 1..T."""
        steps = np.asarray(t)
        if steps.dtype.kind not in "iu":
            raise ValueError(f"t must be an integer or an array of integers, got {steps.dtype}")
        outside = steps[(steps < 1) | (steps > self.n_steps)]
        if outside.size:
            raise ValueError(f"t must lie within 1..{self.n_steps}, got {outside.flat[0]}")
        return steps if steps.ndim else int(steps)


Denoiser: TypeAlias = "Callable[[int, Array], Array | tuple[Array, Array]]"


def reverse_chain(
    schedule: DiffusionSchedule,
    denoiser: Denoiser,
    prior_mean: ArrayLike,
    noise: Array,
    *,
    prediction_type: str = "residual",
    residual_variance: ArrayLike | None = None,
    return_path: bool = False,
    bounds: ArrayLike | None = None,
) -> Array:
    """Run the chain from y_T = prior_mean + noise[T] down to y_0, one `reverse_step` for each t = T..1.

    Args:
        schedule: the schedule, T steps.
        denoiser: called as denoiser(t, y_t); returns the prediction, or (prediction, extra_variance).
        prior_mean: f, must fit `shape`.
        noise: (T + 1, *shape) standard normal draws; the step t -> t-1 uses noise[t - 1].
        prediction_type: "y0", "epsilon" or "residual".
        residual_variance: s2 > 0, a number or (d,); needed by "residual" alone.
        return_path: return every state instead of the last.
        bounds: see `DiffusionSchedule.reconstruct`.

    Returns:
        y_0 of that shape; with `return_path` the path (T + 1, *shape), where path[t] is y_t and path[0] is
        y_0.
    """
    n_steps = schedule.n_steps
    noise = np.asarray(noise)
    if noise.ndim < 1 or len(noise) != n_steps + 1:
        raise ValueError(f"noise must be (n_steps + 1, *shape) = ({n_steps + 1}, ...), got the shape {noise.shape}")
    _check_shapes({"noise[0]": noise[0]}, prior_mean=prior_mean, residual_variance=residual_variance)
    start, f, _ = _operands(noise[n_steps], prior_mean)
    y = f + start
    path = [y]
    for t in range(n_steps, 0, -1):
        answer = denoiser(t, y)
        prediction, extra_variance = answer if isinstance(answer, tuple) else (answer, 0.0)
        y = schedule.reverse_step(
            prediction, y, f, t, noise[t - 1], prediction_type, residual_variance, extra_variance, bounds
        )
        if return_path:
            path.append(y)
    return np.stack(path[::-1]) if return_path else y


def class_probabilities(y0_samples: ArrayLike, temperature: float = 1.0) -> NDArray[np.float64]:
    """softmax(-(y_0 - 1)^2 / temperature) over the classes (CARD, arXiv 2206.07275).

    Args:
        y0_samples: (n, S, C) samples of the one-hot response, C >= 2.
        temperature: > 0; 1 is the paper's.

    Returns:
        (n, S, C) float64 probabilities.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    samples = _class_samples(y0_samples, "y0_samples")
    return softmax(-np.square(samples - 1.0) / temperature, axis=2)


def vote_shares(proba: ArrayLike) -> NDArray[np.float64]:
    """Share of the samples that vote for each class.

    A sample votes for its most probable class, the lowest of equals.

    Args:
        proba: (n, S, C).

    Returns:
        (n, C) float64; rows add up to 1.
    """
    proba = _class_samples(proba, "proba")
    labels = proba.argmax(axis=2)
    return (labels[:, :, None] == np.arange(proba.shape[2])).mean(axis=1)


class PairedTTest(NamedTuple):
    """Result of `paired_ttest`: `pvalue` (n,) float64 and `top2` (n, 2) int, the most voted class first."""

    pvalue: NDArray[np.float64]
    top2: NDArray[np.intp]


def paired_ttest(proba: ArrayLike) -> PairedTTest:
    """Paired two-sided t-test between the probabilities of a row's two most voted classes.

    A large p-value says that the samples do not tell the two classes apart. It depends on S and shrinks as S
    grows; CARD (arXiv 2206.07275) uses S = 100. Classes are ranked by votes, then mean probability, then
    lower index. Where all S differences are equal there is no variance to divide by: the p-value is then 1 if
    they are 0, else 0.

    Args:
        proba: (n, S, C), S >= 2 and C >= 2.

    Returns:
        `PairedTTest`.
    """
    proba = _class_samples(proba, "proba")
    n_samples = proba.shape[1]
    if n_samples < 2:
        raise ValueError(f"the paired t-test needs at least 2 samples, got proba of the shape {proba.shape}")
    ranking = np.lexsort((-proba.mean(axis=1), -vote_shares(proba)), axis=-1)
    top2 = ranking[:, :2]
    pair = np.take_along_axis(proba, top2[:, None, :], axis=2)
    difference = pair[:, :, 0] - pair[:, :, 1]
    constant = difference.min(axis=1) == difference.max(axis=1)
    mean = difference.mean(axis=1)
    standard_error = np.where(constant, 1.0, difference.std(axis=1, ddof=1) / np.sqrt(n_samples))
    pvalue = 2.0 * stdtr(n_samples - 1, -np.abs(mean) / standard_error)
    return PairedTTest(np.where(constant, (difference[:, 0] == 0.0).astype(np.float64), pvalue), top2)


def _class_samples(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 3 or array.shape[1] < 1 or array.shape[2] < 2:
        raise ValueError(f"{name} must be (n, S, C) with S >= 1 and C >= 2, got the shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} contains NaN or infinity")
    return array


def _check_n_steps(n_steps: int) -> None:
    if operator.index(n_steps) < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}")


def _unit_grid(n_steps: int) -> NDArray[np.float64]:
    """0..1 in n_steps points; a single point is 1, so that even one step starts from noise."""
    _check_n_steps(n_steps)
    return np.linspace(1.0, 0.0, n_steps)[::-1]


def _operands(*values: ArrayLike) -> list[Any]:
    """Arrays in one type, scalars as floats, then that type: float32 if all arrays are, else float64."""
    arrays = [np.asarray(value) for value in values]
    types = {array.dtype for array in arrays if array.ndim}
    dtype = np.float32 if types == {np.dtype(np.float32)} else np.float64
    return [array.astype(dtype, copy=False) if array.ndim else float(array) for array in arrays] + [dtype]


def _at(array: NDArray[np.float64], t: Step) -> Coefficient:
    """A schedule array at t: a plain float for one t, so that float32 states are not upcast."""
    return array[t] if np.ndim(t) else float(array[t])


def _cast(coefficient: Any, dtype: type[np.floating[Any]]) -> Any:
    """A scalar as a Python float, which never upcasts; an array in the given type."""
    return coefficient.astype(dtype, copy=False) if np.ndim(coefficient) else float(coefficient)


def _check_shapes(state: Mapping[str, Any], **others: Any) -> None:
    """The arrays of the state must broadcast; the others must fit that shape without growing it.

    The second rule catches (n,) beside (n, 1), which broadcasting would silently turn into (n, n).
    """
    try:
        shape = np.broadcast_shapes(*(np.shape(value) for value in state.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {np.shape(value)}" for name, value in state.items())
        raise ValueError(f"the shapes do not broadcast: {shapes}") from None
    for name, value in others.items():
        if value is None:
            continue
        try:
            fits = np.broadcast_shapes(np.shape(value), shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{name} of shape {np.shape(value)} does not fit {' and '.join(state)} of shape {shape}")
