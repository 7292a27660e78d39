"""Bytes of activations: what a layer keeps for its backward pass, and what it needs meanwhile.

Read off, tensor by tensor, from what autograd saves in the sources that run: transformers 5.23
(modeling_qwen3_5, modeling_qwen3_5_moe, modeling_qwen3_next, modeling_qwen3, modeling_qwen3_moe),
PEFT 0.21 (tuners/lora/layer.py), flash-linear-attention 0.6 (ops/gated_delta_rule/chunk.py,
modules/causal_conv1d), FlashAttention-2 (arXiv 2307.08691: output and one logsumexp a row), and the
studio's own experts and loss. The classic account of it is arXiv 2205.05198. A test compares each
kind of layer with what autograd saves at the published shapes.
Not covered: DoRA, fused norms, activations moved to the machine's memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from studio.domain.architecture import Architecture, DeltaNet, Experts, Mixer

FLOAT32, INT64 = 4, 8
DELTA_CHUNK = 64  # tokens that the delta rule handles at once
_PADDED_RANK_BYTES = 16  # grouped matrix products ask for rows of a multiple of it
# Tensors of the plain delta rule in multiples of keys, values and chunks; see `_plain_delta_rule`.
_PLAIN_KEYS, _PLAIN_VALUES, _PLAIN_CHUNKS = 10, 3, 5
LOSS_CHUNK_TOKENS = 512  # of workers/engine/loss.py; a test compares


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One forward and backward pass over a micro-batch.

    Attributes:
        tokens: Of the micro-batch, padding included.
        rows: Of the micro-batch; 1 when packed.
        compute_bytes: Of a number in the dtype that is computed in.
        is_fused: Whether the delta rule, its convolution and attention run in fused kernels, as on
            GPUs; else in plain torch.
        dropout: Of the Adapter's inputs.
        trains_all: Whether all weights train (method full).
    """

    tokens: int
    rows: int
    compute_bytes: int
    is_fused: bool
    dropout: float = 0.0
    trains_all: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """One layer: bytes a token, from the sizes of the model and the layers that carry a LoRA."""

    model: Architecture
    ranks: Mapping[str, int]
    run: Pass

    def inputs(self, width: int, *leaves: str, is_kept: bool = False) -> float:
        """Return what linear layers keep of an input that they share.

        A frozen base keeps nothing. PEFT brings the input to the Adapter's float32, each layer for
        itself; in float32 it stays the same tensor. Dropout keeps its mask, in plain torch as wide
        as the input, and a product of its own.

        Args:
            width: Features of the input.
            leaves: The linear layers, as `self_attn.q_proj`.
            is_kept: Whether something else keeps the input in the compute dtype.
        """
        c = self.run.compute_bytes
        if self.run.trains_all:
            return 0 if is_kept else c * width
        ranks = [self.ranks[leaf] for leaf in leaves if leaf in self.ranks]
        if not ranks:
            return 0
        total = FLOAT32 * sum(ranks)
        if self.run.dropout > 0:
            mask = 1 if self.run.is_fused else FLOAT32
            return total + len(ranks) * (FLOAT32 + mask) * width
        copies = len(ranks) if c != FLOAT32 else not is_kept
        return total + FLOAT32 * width * copies

    def norm(self, width: int, *, is_kept: bool = False) -> float:
        """Return what an RMSNorm keeps: its input in float32, and its result where it trains.

        Args:
            width: Features of its input.
            is_kept: Whether something else keeps its input.
        """
        trained = 0
        if self.run.trains_all:
            is_centred = self.model.has_output_gate
            trained = FLOAT32 if is_centred else self.run.compute_bytes
        is_same = is_kept and self.run.compute_bytes == FLOAT32
        return (0 if is_same else FLOAT32 * width) + trained * width + FLOAT32

    # ---- mixers ---------------------------------------------------------------------------------

    def attention(self) -> float:
        """Softmax attention with norms on queries and keys, and an output gate in two families."""
        a, c = self.model, self.run.compute_bytes
        queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        total = self.inputs(a.hidden, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        # In float32 the norm of the queries keeps all that q_proj gave, the gate too.
        has_gate_beside = a.has_output_gate and c == FLOAT32
        total += self.norm(queries * (1 + has_gate_beside)) + self.norm(keys)
        # With a mask the keys and values are repeated for every query head.
        is_masked = self.run.rows > 1
        total += c * queries + 2 * c * (queries if is_masked else keys)
        total += c * queries + FLOAT32 * a.num_heads
        if a.has_output_gate:
            # The gate, and the result once more, with the heads of a token beside each other.
            total += 2 * c * queries
        return total + self.inputs(queries, "self_attn.o_proj", is_kept=not a.has_output_gate)

    def delta_net(self, d: DeltaNet) -> float:
        """Gated DeltaNet (arXiv 2412.06464): convolution, delta rule, gated norm."""
        c, heads = self.run.compute_bytes, d.num_value_heads
        keys, values = d.num_key_heads * d.key_dim, heads * d.value_dim
        total = self.inputs(
            self.model.hidden,
            *(f"linear_attn.in_proj_{x}" for x in ("qkv", "z", "b", "a", "qkvz", "ba")),
        )
        convolved = 2 * keys + values
        if self.run.is_fused:
            # The convolution keeps its input; the delta rule normalised q and k, v, the decays, and
            # one row of a chunk's triangular matrix a token and head.
            total += c * convolved
            total += 2 * c * keys + 2 * FLOAT32 * d.num_key_heads + c * values
            total += c * heads * DELTA_CHUNK + FLOAT32 * heads
        else:
            total += 2 * c * convolved + self._plain_delta_rule(d)
        total += c * heads + FLOAT32 * heads  # sigmoid of b, softplus of a
        # Norm of the result; gate, its SiLU and what it is multiplied with.
        total += FLOAT32 * (values + heads) + 2 * FLOAT32 * values + c * values
        if self.run.trains_all and c != FLOAT32:
            total += c * values
        return total + self.inputs(values, "linear_attn.out_proj")

    def _plain_delta_rule(self, d: DeltaNet) -> float:
        """Return what the delta rule in plain torch keeps, all of it float32.

        Beside copies of q and k (or all that the convolution gave, where no key head serves two
        value heads): ten tensors like the repeated keys, three like the values, five triangular
        matrices a chunk, and the state after each chunk.
        """
        repeated, values = d.num_value_heads * d.key_dim, d.num_value_heads * d.value_dim
        convolved = 2 * d.num_key_heads * d.key_dim + values
        sources = 2 * repeated if d.num_key_heads != d.num_value_heads else convolved
        chunks = _PLAIN_CHUNKS * d.num_value_heads * DELTA_CHUNK
        states = d.num_value_heads * d.key_dim * d.value_dim / DELTA_CHUNK
        small = 6 * d.num_value_heads
        return FLOAT32 * (
            sources + _PLAIN_KEYS * repeated + _PLAIN_VALUES * values + chunks + states + small
        )

    # ---- feed-forward ---------------------------------------------------------------------------

    def gated(self, path: str, inner: int) -> float:
        """SwiGLU (arXiv 2002.05202): gate, its SiLU, up, and what goes into down."""
        c = self.run.compute_bytes
        total = self.inputs(self.model.hidden, f"{path}.gate_proj", f"{path}.up_proj")
        return total + 3 * c * inner + self.inputs(inner, f"{path}.down_proj")

    def experts(self, e: Experts) -> float:
        """Router, routed experts and the shared one."""
        c, hidden = self.run.compute_bytes, self.model.hidden
        # Router: probabilities, and of the chosen ones index (kept twice), value and sum.
        total: float = FLOAT32 * e.count + e.top_k * (2 * INT64 + FLOAT32) + FLOAT32
        # (A LoRA on the router is folded into a copy of its weight: too small to count.)
        # The experts keep x of the token, and of each slot its order and 2 x inner.
        total += e.top_k * (2 * c * e.inner + c)
        for leaf in ("gate_up_proj", "down_proj"):
            rank = self.ranks.get(f"mlp.experts.{leaf}")
            if rank is not None:
                total += e.top_k * c * _padded(rank, c)
        if not self._is_kept_by_shared_expert():
            total += c * hidden
        if e.shared_inner is None:
            return total
        total += self.gated("mlp.shared_expert", e.shared_inner) + c * (1 + hidden)
        return total + self.inputs(hidden, "mlp.shared_expert_gate", is_kept=True)

    def _is_kept_by_shared_expert(self) -> bool:
        """Tell whether the linear layers of the shared expert keep the input of all experts."""
        e, run = self.model.experts, self.run
        if e is None or e.shared_inner is None:
            return False
        ways_in = {f"mlp.shared_expert.{x}_proj" for x in ("gate", "up")}
        is_as_it_is = run.compute_bytes == FLOAT32 and run.dropout == 0
        return run.trains_all or (is_as_it_is and not ways_in.isdisjoint(self.ranks))

    # ---- the whole layer ------------------------------------------------------------------------

    def kept(self, number: int) -> float:
        """Return what the layer keeps a token when it is not recomputed."""
        layer = self.model.layers[number]
        total = 2 * self.norm(self.model.hidden)
        if layer.mixer is Mixer.ATTENTION:
            total += self.attention()
        else:
            assert self.model.delta_net is not None
            total += self.delta_net(self.model.delta_net)
        if layer.has_experts:
            assert self.model.experts is not None
            return total + self.experts(self.model.experts)
        assert self.model.dense_inner is not None
        return total + self.gated("mlp", self.model.dense_inner)

    def passing(self, number: int) -> float:
        """Return what the layer needs a token beside what it keeps, at the worst moment.

        Gradients of the widest part: of a LoRA in 16 bits two float32 ones (the product and its
        scaled form) beside those of both factors of a gate; of experts, rows in and out of each
        slot.
        """
        a, c = self.model, self.run.compute_bytes
        layer = a.layers[number]
        widest = a.num_heads * a.head_dim
        if layer.mixer is Mixer.DELTA_NET and a.delta_net is not None:
            d = a.delta_net
            widest = 2 * d.num_key_heads * d.key_dim + d.num_value_heads * d.value_dim
        if not layer.has_experts:
            widest = max(widest, a.dense_inner or 0)
        each = c if self.run.trains_all or not self.ranks else FLOAT32
        linear = (2 * each + 2 * c) * widest
        if not layer.has_experts or a.experts is None:
            return linear + c * a.hidden
        e = a.experts
        has_lora = any(leaf.startswith("mlp.experts") for leaf in self.ranks)
        slots = e.top_k * c * ((2 + has_lora) * a.hidden + 2 * e.inner)
        return max(linear, slots) + c * a.hidden


def _padded(rank: int, compute_bytes: int) -> int:
    numbers = _PADDED_RANK_BYTES // compute_bytes
    return -(-rank // numbers) * numbers


def kept_bytes(architecture: Architecture, number: int, ranks: Mapping[str, int], run: Pass) -> int:
    """Return what a layer keeps for its backward pass when it is not recomputed.

    Args:
        architecture: What the model is made of.
        number: The layer.
        ranks: Rank of each LoRA in it by its path inside the layer, as `self_attn.q_proj`.
        run: The pass.
    """
    return round(run.tokens * _Layer(model=architecture, ranks=ranks, run=run).kept(number))


def passing_bytes(
    architecture: Architecture, number: int, ranks: Mapping[str, int], run: Pass
) -> int:
    """Return what a layer needs in its backward pass beside what it kept; see `kept_bytes`."""
    return round(run.tokens * _Layer(model=architecture, ranks=ranks, run=run).passing(number))


def boundary_bytes(architecture: Architecture, run: Pass) -> int:
    """Return what a recomputed layer keeps: its input (arXiv 1604.06174)."""
    return run.tokens * run.compute_bytes * architecture.hidden


def outside_bytes(architecture: Architecture, run: Pass) -> int:
    """Return what stays beside the layers.

    The input of the last norm in float32, its result, and of the supervised tokens a copy of that
    result and its gradient. All tokens may be supervised.
    """
    each = FLOAT32 + 3 * run.compute_bytes
    return run.tokens * (each * architecture.hidden + 3 * INT64)


def loss_bytes(architecture: Architecture, run: Pass, *, is_head_trained: bool) -> int:
    """Return what the loss needs for one chunk of tokens.

    Behind a frozen head the logits in float32, and once more while their sum of exponentials is
    taken. A head that trains keeps the log-softmax, and computes the gradient from it and from
    another one; all of its own gradient stands beside the sum so far.
    """
    chunk = min(LOSS_CHUNK_TOKENS, run.tokens)
    if not is_head_trained:
        return 2 * FLOAT32 * chunk * architecture.vocabulary
    gradient = run.compute_bytes * architecture.hidden if run.trains_all else 0
    return (3 * FLOAT32 * chunk + gradient) * architecture.vocabulary
