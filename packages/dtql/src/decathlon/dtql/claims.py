"""What an experiment sets out to show, judged by the finished cells.

Intervals are 95 % bootstrap intervals over seeds x episodes: seeds are drawn with replacement, and for each of them its
episodes. Where a claim rests on an interval, it counts as shown only if the whole interval supports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decathlon.dtql.protocol import LABELS, Cell, Recipe
from decathlon.shared.intervals import Interval
from decathlon.shared.records import Claim

Results = Mapping[Cell, Mapping[str, Any]]
Figure = tuple[float | None, float | None, float | None]

UNFINISHED_SUCCESS = 0.2  # below this a method has not learned the task
RETURN_MARGIN = 1.0
LONG_RUN = 10_000  # training steps from which on DTQL must have finished
LONG_SUCCESS, LONG_MARGIN = 0.95, 0.03
PANEL_SUPPORT, PANEL_REWARD, KL_SUPPORT = 0.95, 0.97, 0.2

_RESAMPLES = 4000
_NONE: Figure = (None, None, None)
_PAPER_PICTURE = "shown in a picture"
_PAPER_AVERAGE = "88.7 against 88.0 (D4RL Gym average, from secondary sources)"


def judge(recipe: Recipe, results: Results) -> list[Claim]:
    """All claims about what a recipe runs; those whose cells are missing are "not measured"."""
    claims: list[Claim] = []
    if any(part.task == "fork-narrow" for part in recipe.parts):
        claims += _Fork(recipe, results).claims()
    if recipe.bandits:
        claims += _bandits(recipe, results)
    claim = "DTQL scores above Diffusion-QL on D4RL's MuJoCo tasks"
    measured = "not run here; recipes/paper-*.yaml train on these data"
    claims.append(Claim("dtql", recipe.experiment, claim, _PAPER_AVERAGE, measured, None, None, None, None))
    return claims


def seeds_by_episodes(values: ArrayLike, rng: int = 0) -> Interval:
    """Mean of values (seeds, episodes) with its 95 % interval by a bootstrap of seeds and, within them, episodes."""
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"values must be (seeds, episodes), got {array.shape}")
    generator = np.random.default_rng(rng)
    seeds, episodes = array.shape
    means = np.empty(_RESAMPLES)
    for index, drawn in enumerate(generator.integers(seeds, size=(_RESAMPLES, seeds))):
        chosen = generator.integers(episodes, size=(seeds, episodes))
        means[index] = np.take_along_axis(array[drawn], chosen, axis=1).mean()
    return Interval(float(array.mean()), *(float(end) for end in np.quantile(means, [0.025, 0.975])))


class _Fork:
    """The claims about Fork with narrow data, where the trust region is what decides."""

    def __init__(self, recipe: Recipe, results: Results) -> None:
        self._results, self._part = results, recipe.part("fork-narrow")
        self._experiment = f"{recipe.experiment}/fork-narrow"

    def claims(self) -> Iterator[Claim]:
        """Those of a short training, or of a long one."""
        yield self._above_bc()
        yield self._needs_trust_region()
        if self._part.steps < LONG_RUN:
            yield self._median_beside_td3bc()
        else:
            yield self._finishes()
            yield self._success_beside("td3bc")
            yield self._success_beside("diffusion-ql")

    def _above_bc(self) -> Claim:
        claim = "the return of DTQL is above that of BC: the intervals do not overlap"
        returns = self._values("returns", "dtql", "bc")
        if isinstance(returns, str):
            return self._claim(claim, returns)
        ours, theirs = map(seeds_by_episodes, returns)
        measured = f"return {_show(ours)} against {_show(theirs)}, over {_count(returns)}"
        return self._claim(claim, measured, ours, ours.low > theirs.high)

    def _needs_trust_region(self) -> Claim:
        claim = f"it takes the trust region: success under {UNFINISHED_SUCCESS:g} without (alpha 0), and more with it"
        successes = self._values("successes", "dtql-alpha-0", "dtql")
        if isinstance(successes, str):
            return self._claim(claim, successes)
        without, whole = map(seeds_by_episodes, successes)
        measured = f"success {_show(without)} without, {_show(whole)} with it, over {_count(successes)}"
        shown = without.high < UNFINISHED_SUCCESS and without.high < whole.low
        return self._claim(claim, measured, without, shown)

    def _median_beside_td3bc(self) -> Claim:
        claim = f"median return of DTQL over seeds at most {RETURN_MARGIN:g} below that of tuned TD3+BC"
        returns = self._values("returns", "dtql", "td3bc")
        if isinstance(returns, str):
            return self._claim(claim, returns)
        ours, theirs = (float(np.median(values.mean(axis=1))) for values in returns)
        measured = f"medians {ours:.4g} and {theirs:.4g}, over {_count(returns)}"
        return self._claim(claim, measured, (ours - theirs, None, None), ours - theirs >= -RETURN_MARGIN)

    def _finishes(self) -> Claim:
        claim = f"mean success of DTQL at least {LONG_SUCCESS:g} after {self._part.steps} steps"
        successes = self._values("successes", "dtql")
        if isinstance(successes, str):
            return self._claim(claim, successes)
        interval = seeds_by_episodes(successes[0])
        measured = f"success {_show(interval)}, over {_count(successes)}"
        return self._claim(claim, measured, interval, interval.low >= LONG_SUCCESS)

    def _success_beside(self, rival: str) -> Claim:
        claim = f"mean success of DTQL at most {LONG_MARGIN:g} below that of tuned {LABELS[rival]}"
        successes = self._values("successes", "dtql", rival)
        if isinstance(successes, str):
            return self._claim(claim, successes)
        ours, theirs = (float(values.mean()) for values in successes)
        measured = f"success {ours:.4g} and {theirs:.4g}, over {_count(successes)}"
        return self._claim(claim, measured, (ours - theirs, None, None), ours - theirs >= -LONG_MARGIN)

    def _values(self, key: str, *methods: str) -> list[NDArray[np.float64]] | str:
        """(seeds, episodes) of each method, or what is missing."""
        found = []
        for method in methods:
            cells = [cell for cell in sorted(self._results) if (cell.setting, cell.method) == ("fork-narrow", method)]
            if not cells:
                return f"{LABELS[method]} was not run"
            found.append(np.array([self._results[cell][key] for cell in cells], np.float64))
        return found

    def _claim(self, claim: str, measured: str, figure: Figure = _NONE, shown: bool | None = None) -> Claim:
        return Claim("dtql", self._experiment, claim, None, measured, *figure, shown)


def _bandits(recipe: Recipe, results: Results) -> Iterator[Claim]:
    """The published picture: what a trust region holds in the data and a KL does not."""
    for reward in ("far", "hard", "near"):
        yield _panel(
            recipe,
            results,
            Cell(f"25_gaussian/{reward}", "dtql", 0),
            f"the trust region stays in the data and finds the best of them: in support at least {PANEL_SUPPORT:g} and "
            f"{PANEL_REWARD:g} of the best reward for every seed",
            lambda support, reward: support >= PANEL_SUPPORT and reward >= PANEL_REWARD,
        )
    yield _panel(
        recipe,
        results,
        Cell("25_gaussian/far", "kl", 0),
        f"the KL leaves the data: in support under {KL_SUPPORT:g} for every seed",
        lambda support, _: support < KL_SUPPORT,
    )


def _panel(recipe: Recipe, results: Results, like: Cell, claim: str, holds: Callable[[float, float], bool]) -> Claim:
    where = f"{recipe.experiment}/bandit/{like.setting}"
    found = [
        results[cell]["metrics"]
        for cell in sorted(results)
        if (cell.setting, cell.method) == (like.setting, like.method)
    ]
    if not found:
        return Claim("dtql", where, claim, _PAPER_PICTURE, "this panel was not run", *_NONE, None)
    verdicts = [holds(metrics["in_support"], metrics["reward_share"]) for metrics in found]
    support = float(np.mean([metrics["in_support"] for metrics in found]))
    measured = f"{sum(verdicts)} of {len(verdicts)} seeds; in support {_list(found, 'in_support')}"
    if like.method == "dtql":
        measured += f", share of the best reward {_list(found, 'reward_share')}"
    return Claim("dtql", where, claim, _PAPER_PICTURE, measured, support, None, None, all(verdicts))


def _count(found: Sequence[NDArray[np.float64]]) -> str:
    """Numbers of seeds, (seeds, episodes) for each method."""
    return " and ".join(str(len(values)) for values in found) + " seeds"


def _list(found: Sequence[Mapping[str, float]], name: str) -> str:
    return " / ".join(f"{metrics[name]:.3f}" for metrics in found)


def _show(interval: Interval) -> str:
    return f"{interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
