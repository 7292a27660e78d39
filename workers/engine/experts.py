"""Routed experts: transformers' experts function "studio", for frozen, adapted and trained experts.

transformers multiplies plain weights; PEFT folds a LoRA into a copy of all experts at each use and
makes the gradient of all experts only to project it. Here the LoRA works on activations, 4-bit
weights are dequantised in forward and again in backward, and a frozen weight gets no gradient:

    y_s = W2 g_s + s B2 A2 g_s,   g_s = gate(h_s),   h_s = W1 x_s + s B1 A1 x_s

for each slot s (a token and one of its experts), and out_t = sum over the slots of t of w_s y_s.
gate is the module's own: act_fn(first half) * second half.

Saved for backward: x of the tokens (not of the slots), h, A x, A g and the order of the slots. The
gradient of a routing weight is <d out_t, y_s> = <W2' d out_t, g_s>, so y is neither kept nor made
again. Nothing here waits for the device.
Not covered: transposed weights, biases, a norm after the experts, expert parallelism.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from studio.errors import EngineError
from workers.engine.quantize import expert_weight, nf4_states

IMPLEMENTATION = "studio"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
# Grouped matrix products ask for rows of a multiple of 16 bytes.
_ALIGNED_BYTES = 16

# T tokens, K experts of a token, S = T K slots, E experts, G groups of slots, D hidden,
# I inner, F = 2 I, R rank. Of one projection: M features in, N features out.


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """A LoRA on one projection of all experts, laid out as PEFT's ParamWrapper keeps it.

    Attributes:
        a: (E * R, M), expert slowest.
        b: (N, R * E), expert fastest.
        scaling: What B A is multiplied by.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def studio_experts(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    adapters: Mapping[str, LowRank] | None = None,
) -> torch.Tensor:
    """Return what the routed experts make of some tokens.

    Args:
        self: The experts module; its weights are plain or in 4 bits.
        hidden_states: (T, D); its dtype is that of all products.
        top_k_index: (T, K), the experts of each token.
        top_k_weights: (T, K), what their outputs are multiplied by.
        adapters: LoRA by name of the projection, gate_up_proj or down_proj.

    Returns:
        (T, D), in the dtype of `hidden_states`.

    Raises:
        EngineError: The module has a layout that this function does not know.
    """
    _refuse_other_layouts(self)
    adapters = adapters or {}
    groups = _Groups.of(top_k_index, vars(self)["num_experts"], few=_is_few(self, top_k_index))
    # Weights are arguments only where autograd shall see them: forward and backward read them from
    # the module, where they may be packed, or gathered from other ranks for just that long.
    tensors: list[torch.Tensor | None] = []
    for name in (GATE_UP, DOWN):
        weight: torch.Tensor = getattr(self, name)
        low = adapters.get(name)
        tensors.append(weight if weight.requires_grad else None)
        tensors += [None, None] if low is None else [low.a, low.b]
    scaling = {name: low.scaling for name, low in adapters.items()}
    weights_TK = top_k_weights.to(hidden_states.dtype)
    out: torch.Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        self, groups, scaling, hidden_states, weights_TK, *tensors
    )
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, studio_experts)


def _refuse_other_layouts(module: Any) -> None:
    if (
        module.is_transposed
        or module.has_bias
        or module.has_post_expert_norm
        or not module.has_gate
        or vars(module)["_is_expert_parallel"]
    ):
        raise EngineError(
            f"{type(module).__name__} has a layout of experts that the studio does not train.",
            "Choose a model of a family that the studio knows.",
        )


def _is_few(module: nn.Module, index_TK: torch.Tensor) -> bool:
    """Tell whether to dequantise the experts of each slot rather than all experts.

    Plain weights need no such path: a grouped product reads only what is routed to.
    """
    if torch.is_grad_enabled() or not nf4_states(module):
        return False
    return 2 * index_TK.numel() <= int(vars(module)["num_experts"])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Groups:
    """How slots are sorted into groups, each of which is multiplied with one matrix.

    Attributes:
        slots: (S,), the slot of each row after sorting by expert.
        rows: (S,), the row of each slot.
        ends: (G,), where each group ends among the rows, int32. A group is an expert; on the path for
            few tokens it is one slot, and `experts` (G,) names its expert.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    ends: torch.Tensor
    experts: torch.Tensor | None = None

    @classmethod
    def of(cls, index_TK: torch.Tensor, num_experts: int, *, few: bool) -> "_Groups":
        # Stable, so that the sums over a group have the same order on every run.
        experts_S, slots = torch.sort(index_TK.reshape(-1), stable=True)
        numbers = torch.arange(max(len(slots), num_experts), device=index_TK.device)
        rows = torch.empty_like(slots).index_copy_(0, slots, numbers[: len(slots)])
        if few:
            ends = (numbers[: len(slots)] + 1).int()
            return cls(slots=slots, rows=rows, ends=ends, experts=experts_S)
        ends = torch.searchsorted(experts_S, numbers[:num_experts], right=True, out_int32=True)
        return cls(slots=slots, rows=rows, ends=ends)

    def times(self, rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """Return the rows (S, M) of each group times its matrix (G, M, N)."""
        return F.grouped_mm(rows, matrices, offs=self.ends)

    def products(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return left' right of the rows (S, M) and (S, N) of each group: (G, M, N)."""
        return F.grouped_mm(left.mT, right, offs=self.ends)

    def by_token(self, rows_SN: torch.Tensor, top_k: int) -> torch.Tensor:
        """Bring rows back to their slots: (T, K, N)."""
        return rows_SN[self.rows].view(-1, top_k, rows_SN.shape[1])


class _Projection:
    """One projection of all experts and its LoRA, for the length of one forward or backward."""

    def __init__(
        self, module: nn.Module, name: str, groups: _Groups, low: LowRank | None, dtype: torch.dtype
    ) -> None:
        self._module, self._name, self._groups, self._dtype = module, name, groups, dtype
        self._low, self._a, self._b = low, None, None
        if low is not None:
            num_experts = int(vars(module)["num_experts"])
            self._a = self._factor(low.a.view(num_experts, -1, low.a.shape[1]))
            b_NRE = low.b.view(low.b.shape[0], -1, num_experts)
            self._b = self._factor(b_NRE.permute(2, 1, 0))

    def _factor(self, factor: torch.Tensor) -> torch.Tensor:
        """Return A (G, R, M) or transposed B (G, R, N), R filled up with zeros."""
        if self._groups.experts is not None:
            factor = factor[self._groups.experts]
        missing = -factor.shape[1] % (_ALIGNED_BYTES // self._dtype.itemsize)
        factor = factor.to(self._dtype)
        return F.pad(factor, (0, 0, 0, missing)) if missing else factor.contiguous()

    def _weight(self) -> torch.Tensor:
        if self._groups.experts is not None:
            return _routed_weight(self._module, self._name, self._groups.experts, self._dtype)
        return expert_weight(self._module, self._name, self._dtype)

    def forward(self, x_SM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return W x + s B A x, and s A x."""
        y_SN = self._groups.times(x_SM, self._weight().mT)
        if self._low is None or self._a is None or self._b is None:
            return y_SN, None
        z_SR = self._groups.times(x_SM, self._a.mT).mul_(self._low.scaling)
        return y_SN.add_(self._groups.times(z_SR, self._b)), z_SR

    def backward(self, dy_SN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return W' dy + s A' B' dy, and s B' dy."""
        dx_SM = self._groups.times(dy_SN, self._weight())
        if self._low is None or self._a is None or self._b is None:
            return dx_SM, None
        u_SR = self._groups.times(dy_SN, self._b.mT).mul_(self._low.scaling)
        return dx_SM.add_(self._groups.times(u_SR, self._a)), u_SR

    def low_rank_grads(
        self, x_SM: torch.Tensor, dy_SN: torch.Tensor, z_SR: torch.Tensor, u_SR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of A and B, in the layout and dtype of `LowRank`.

        Args:
            x_SM: What the projection was applied to.
            dy_SN: Gradient of its result.
            z_SR: s A x.
            u_SR: s B' dy.
        """
        assert self._low is not None
        a, b = self._low.a, self._low.b
        rank = b.shape[1] // int(vars(self._module)["num_experts"])
        da_GRM = self._groups.products(u_SR, x_SM)[:, :rank]
        db_GRN = self._groups.products(z_SR, dy_SN)[:, :rank]
        return da_GRM.reshape_as(a).to(a.dtype), db_GRN.permute(2, 1, 0).reshape_as(b).to(b.dtype)


class _Experts(torch.autograd.Function):
    """The formula at the top of this file, and its derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        module: Any,
        groups: _Groups,
        scaling: Mapping[str, float],
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        gate_up, down = _projections(module, groups, scaling, tensors, x_TD.dtype)
        top_k = weights_TK.shape[1]
        h_SF, z1_SR = gate_up.forward(x_TD[groups.slots // top_k])
        y_SD, z2_SR = down.forward(_gate(module, h_SF))
        ctx.module, ctx.scaling = module, scaling
        factors = [tensors[1], tensors[2], tensors[4], tensors[5]]
        saved = (
            x_TD,
            weights_TK,
            h_SF,
            z1_SR,
            z2_SR,
            groups.slots,
            groups.rows,
            groups.ends,
            *factors,
        )
        ctx.save_for_backward(*saved)
        return torch.bmm(weights_TK[:, None], groups.by_token(y_SD, top_k))[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weights_TK, h_SF, z1_SR, z2_SR, slots, rows, ends, *factors = ctx.saved_tensors
        _, _, _, needs_x, needs_weights, needs_gate_up, _, _, needs_down, *_ = ctx.needs_input_grad
        groups, top_k = _Groups(slots=slots, rows=rows, ends=ends), weights_TK.shape[1]
        tensors = (None, *factors[:2], None, *factors[2:])
        gate_up, down = _projections(ctx.module, groups, ctx.scaling, tensors, x_TD.dtype)
        token_S, w_S1 = slots // top_k, weights_TK.reshape(-1, 1)[slots]
        dx_TD = dw_TK = d_gate_up = d_down = da1 = db1 = da2 = db2 = None

        # dy and dg leave out the routing weight of the slot, so that they give its gradient, too.
        h_SF = h_SF.detach().requires_grad_()
        with torch.enable_grad():
            gated_SI = _gate(ctx.module, h_SF)
        g_SI = gated_SI.detach()
        dy_SD = grads[0][token_S]
        dg_SI, u_SR = down.backward(dy_SD)
        if needs_weights:
            dw_TK = groups.by_token((dg_SI * g_SI).sum(1, keepdim=True), top_k)[..., 0]
        if u_SR is not None:
            da2, db2 = down.low_rank_grads(g_SI, dy_SD, z2_SR * w_S1, u_SR * w_S1)
        if needs_down:
            d_down = groups.products(dy_SD, g_SI * w_S1)
        del dy_SD, u_SR

        (dh_SF,) = torch.autograd.grad(gated_SI, h_SF, dg_SI * w_S1)
        del gated_SI, g_SI, dg_SI
        x_SD = x_TD[token_S] if z1_SR is not None or needs_gate_up else None
        dx_SD, u_SR = gate_up.backward(dh_SF)
        if needs_x:
            dx_TD = groups.by_token(dx_SD, top_k).sum(1)
        del dx_SD
        if u_SR is not None and x_SD is not None:
            da1, db1 = gate_up.low_rank_grads(x_SD, dh_SF, z1_SR, u_SR)
        if needs_gate_up and x_SD is not None:
            d_gate_up = groups.products(dh_SF, x_SD)
        return None, None, None, dx_TD, dw_TK, d_gate_up, da1, db1, d_down, da2, db2


def _gate(module: Any, h_SF: torch.Tensor) -> torch.Tensor:
    # The door that transformers' own experts functions use: families may put their own gate there.
    gated: torch.Tensor = module._apply_gate(h_SF)  # noqa: SLF001
    return gated


def _projections(
    module: nn.Module,
    groups: _Groups,
    scaling: Mapping[str, float],
    tensors: tuple[torch.Tensor | None, ...],
    dtype: torch.dtype,
) -> tuple[_Projection, _Projection]:
    """Return gate_up and down; `tensors` are weight, A and B of each, None where it has none."""
    made = []
    for name, (_, a, b) in ((GATE_UP, tensors[:3]), (DOWN, tensors[3:])):
        low = None if a is None or b is None else LowRank(a=a, b=b, scaling=scaling[name])
        made.append(_Projection(module, name, groups, low, dtype))
    return made[0], made[1]


def _routed_weight(
    module: nn.Module, name: str, experts_G: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Dequantise the weights of some experts, in the order given: (G, N, M)."""
    state = nf4_states(module)[name]
    packed: torch.Tensor = getattr(module, name).detach().view(torch.uint8)
    num_experts, *expert = state.shape
    constants = state.absmax
    if state.nested:
        constants = dequantize_blockwise(constants, state.state2) + state.offset
    size = math.prod(expert)
    some = QuantState(  # type: ignore[no-untyped-call]
        absmax=constants.view(num_experts, -1)[experts_G].reshape(-1),
        # As rows of one block: on a CPU bitsandbytes 0.50 takes the wrong constants for rows that
        # are no whole number of blocks.
        shape=torch.Size((len(experts_G) * size // state.blocksize, state.blocksize)),
        dtype=state.dtype,
        blocksize=state.blocksize,
        code=state.code,
        quant_type=state.quant_type,
    )
    bytes_G = packed.view(num_experts, -1)[experts_G].view(-1, 1)
    return dequantize_4bit(bytes_G, some).view(-1, *expert).to(dtype)
