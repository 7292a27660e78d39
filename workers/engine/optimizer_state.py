"""The state of an optimizer by the names of its parameters, so that any number of ranks can read it.

torch's own form numbers the parameters; bitsandbytes hides its quantised state in a nested dict,
and its first state must come from itself, or paged memory would come back as plain.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import nn
from torch.distributed.tensor import DTensor

from studio.errors import EngineError

# What torch.optim.AdamW keeps for each parameter.
_ADAMW = frozenset(("step", "exp_avg", "exp_avg_sq"))
Scalars = dict[str, dict[str, Any]]
Load = Callable[[Mapping[str, torch.Tensor]], None]
_PREFIX = "optimizer"
# Tables of bitsandbytes, always the same and one for all parameters; safetensors refuses tensors
# that share memory.
_CONSTANTS = ("qmap1", "qmap2")


class OtherOptimizerError(EngineError):
    """A Checkpoint holds the state of an optimizer of another kind."""


def state_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return the tensors of an optimizer's state, named `optimizer|PARAMETER|FIELD`."""
    return {
        f"{_PREFIX}|{name}|{key}": value
        for name, key, value in _entries(optimizer, names)
        if isinstance(value, torch.Tensor)
    }


def state_scalars(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> Scalars:
    """Return what of an optimizer's state is no tensor, by parameter and field."""
    scalars: Scalars = {}
    for name, key, value in _entries(optimizer, names):
        if not isinstance(value, torch.Tensor):
            scalars.setdefault(name, {})[key] = value
    return scalars


def fill_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter],
    stored: Mapping[str, Any],
    scalars: Scalars,
    load: Load,
) -> None:
    """Give an optimizer the state that was saved.

    Args:
        optimizer: Built as it was, of the same parameters.
        names: Its parameters.
        stored: Size and dtype of every stored tensor, by key.
        scalars: What `state_scalars` returned.
        load: Fills tensors by key, in place.

    Raises:
        OtherOptimizerError: The state is of another optimizer; that of `optimizer` is empty then.
    """
    wanted: dict[str, dict[str, Any]] = {}
    for key, described in stored.items():
        if key.startswith(f"{_PREFIX}|"):
            _, name, field = key.split("|")
            wanted.setdefault(name, {})[field] = described
    if isinstance(optimizer, Optimizer8bit):
        states = _own_states(optimizer, names, wanted)
    else:
        _refuse_other_fields(wanted, scalars)
        states = {
            name: {field: _like(names[name], described) for field, described in fields.items()}
            for name, fields in wanted.items()
        }
    load(
        {
            f"{_PREFIX}|{name}|{field}": states[name][field]
            for name, fields in wanted.items()
            for field in fields
        }
    )
    for name, fields in scalars.items():
        states.setdefault(name, {}).update(fields)
    for name, fields in states.items():
        optimizer.state[names[name]].update(fields)


def _entries(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]
) -> list[tuple[str, str, Any]]:
    return [
        (name, key, value)
        for name, parameter in names.items()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
        if key not in _CONSTANTS
    ]


def _like(parameter: nn.Parameter, described: Any) -> torch.Tensor:
    """Return an empty tensor for a stored one, shared out as its parameter is."""
    size, dtype = described.size, described.properties.dtype
    if isinstance(parameter, DTensor) and size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype, device=parameter.device)


def _own_states(
    optimizer: Any, names: Mapping[str, nn.Parameter], wanted: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Let a bitsandbytes optimizer make its first state, in memory of its own kind."""
    name_of = {parameter: name for name, parameter in names.items()}
    optimizer.check_overrides()
    states: dict[str, dict[str, Any]] = {}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            name = name_of[parameter]
            if name not in wanted:
                continue
            optimizer.init_state(group, parameter, group_index, index)
            state = states[name] = dict(optimizer.state[parameter])
            for field, described in wanted[name].items():
                found = state.get(field)
                if found is None or (found.shape, found.dtype) != (
                    described.size,
                    described.properties.dtype,
                ):
                    optimizer.state.clear()
                    raise _other(field, name)
    return states


def _refuse_other_fields(
    wanted: Mapping[str, Mapping[str, Any]], scalars: Mapping[str, Mapping[str, Any]]
) -> None:
    for name in {*wanted, *scalars}:
        odd = _ADAMW ^ {*wanted.get(name, ()), *scalars.get(name, ())}
        if odd:
            raise _other(min(odd), name)


def _other(field: str, name: str) -> OtherOptimizerError:
    return OtherOptimizerError(
        f"The Checkpoint holds {field} of {name} as another optimizer keeps it.",
        "Resume with the optimizer that the run was started with.",
        "optim.optimizer",
    )
