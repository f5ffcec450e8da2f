"""Agents that differ in their seed alone, trained side by side as one batch of networks (beyond the paper).

Most of a step of small networks is the cost of its many calls, which side by side is paid once: six agents of 64 hidden
units take about half the time that they take one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from decathlon.dtql.base import OfflineAgent
from decathlon.dtql.batch import Batch
from decathlon.dtql.fitting import check_counts, check_data, log_losses, sampler_of
from decathlon.shared.progress import progress

Agent = OfflineAgent[Any]


def fit_stacked(
    agents: Sequence[Agent],
    dataset: Any,
    *,
    steps: int,
    pretrain_steps: int = 0,
    batch_size: int = 256,
    log_every: int = 1000,
) -> None:
    """Train several agents as `fit` trains each of them; a second call trains on.

    Every agent draws its batches and its noise from its own generator, so up to rounding it learns what it would alone,
    and afterwards it can do all that it could: act, be saved, train on by itself.

    Args:
        agents: Of one class with equal settings, which have taken equally many steps.
        dataset: As for `fit`.
        steps: Training steps of each agent.
        pretrain_steps: Steps before them in which the policies do not learn.
        batch_size: Transitions in a step of one agent.
        log_every: Steps between two rows in the `log_history` of each agent.

    Raises:
        ValueError: If the agents are not alike, or as `fit`.
        FloatingPointError: If a loss is not finite.
    """
    check_counts(0, steps=steps, pretrain_steps=pretrain_steps)
    check_counts(1, batch_size=batch_size, log_every=log_every)
    _check_alike(agents)
    first, total = agents[0], pretrain_steps + steps
    check_data(first, dataset, steps)
    sampler = sampler_of(first, dataset)
    stack = _stack(agents)
    try:
        for i in progress(range(total), desc=f"{len(agents)} x {type(first).__name__}", unit="step"):
            training = i >= pretrain_steps
            if training and stack.num_updates == 0:
                stack._start_training(dataset)
            inputs = [
                agent._inputs(sampler.sample(batch_size, agent.generator), pretraining=not training) for agent in agents
            ]
            batch, noise = (_join(parts) for parts in zip(*inputs, strict=True))
            losses = stack._step(batch, noise, pretraining=not training)
            phase, step = ("train", stack.num_updates) if training else ("pretrain", stack.num_pretrain_updates)
            if i == total - 1 or step % log_every == 0:
                losses |= stack._diagnose(batch)
                for k, agent in enumerate(agents):
                    try:
                        log_losses(agent, {name: loss[k] for name, loss in losses.items()}, phase, step)
                    except FloatingPointError as error:
                        raise FloatingPointError(f"seed {agent.seed}: {error}") from error
    finally:
        _unstack(stack, agents)


def _join(parts: Sequence[Batch]) -> Batch:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _stack(agents: Sequence[Agent]) -> Agent:
    """An agent whose networks and optimisers hold those of all agents, along a further first axis."""
    first = agents[0]
    stack = type(first)(
        first.obs_dim, first.action_dim, first.config, device=first.device, dtype=first.dtype, seed=first.seed
    )
    for together, *each in zip(*map(_tensors, (stack, *agents)), strict=True):
        together.data = torch.stack([tensor.detach() for tensor in each])
    for name, optimizer in stack.optimizers.items():
        optimizer.load_state_dict(_stacked_state([agent.optimizers[name] for agent in agents]))
    for name, scheduler in stack.schedulers.items():
        scheduler.load_state_dict(first.schedulers[name].state_dict())
    stack.num_updates, stack.num_pretrain_updates = first.num_updates, first.num_pretrain_updates
    return stack


@torch.no_grad()
def _unstack(stack: Agent, agents: Sequence[Agent]) -> None:
    """Give every agent its part of the stack."""
    for together, *each in zip(*map(_tensors, (stack, *agents)), strict=True):
        for tensor, values in zip(each, together, strict=True):
            tensor.copy_(values)
    for k, agent in enumerate(agents):
        for name, optimizer in stack.optimizers.items():
            agent.optimizers[name].load_state_dict(_part_of_state(optimizer, k))
        for name, scheduler in stack.schedulers.items():
            agent.schedulers[name].load_state_dict(scheduler.state_dict())
        agent.num_updates, agent.num_pretrain_updates = stack.num_updates, stack.num_pretrain_updates


def _tensors(agent: Agent) -> list[Tensor]:
    return list(chain(agent.networks.parameters(), agent.networks.buffers()))


# Adam's state is, for each parameter, "step" without dimensions, which is the same for all, and moments of its shape


def _stacked_state(optimizers: Sequence[Adam]) -> dict[str, Any]:
    states = [optimizer.state_dict() for optimizer in optimizers]
    joined = {
        index: {
            name: value.clone() if name == "step" else torch.stack([state["state"][index][name] for state in states])
            for name, value in moments.items()
        }
        for index, moments in states[0]["state"].items()
    }
    return {"state": joined, "param_groups": states[0]["param_groups"]}


def _part_of_state(optimizer: Adam, k: int) -> dict[str, Any]:
    state = optimizer.state_dict()
    parts = {
        index: {name: (value if name == "step" else value[k]).clone() for name, value in moments.items()}
        for index, moments in state["state"].items()
    }
    return {"state": parts, "param_groups": state["param_groups"]}


def _check_alike(agents: Sequence[Agent]) -> None:
    """ValueError unless the agents can be stacked."""
    if not agents:
        raise ValueError("agents is empty: give at least one")
    if len({id(agent) for agent in agents}) < len(agents):
        raise ValueError("agents holds one agent twice: each must be an object of its own")
    for agent in agents[1:]:
        for name, of_first, of_agent in zip(_FEATURES, _features(agents[0]), _features(agent), strict=True):
            if of_first != of_agent:
                raise ValueError(f"the agents must be alike but for their seeds, but {name} differs")


_FEATURES = ("the class", "the size", "config", "the device", "dtype", "the number of steps so far", "Adam's step")


def _features(agent: Agent) -> tuple[Any, ...]:
    moments = {
        (name, index): float(moments["step"])
        for name, optimizer in agent.optimizers.items()
        for index, moments in optimizer.state_dict()["state"].items()
    }
    steps = agent.num_pretrain_updates, agent.num_updates
    sizes = agent.obs_dim, agent.action_dim
    return type(agent), sizes, agent.config, agent.device, agent.dtype, steps, moments
