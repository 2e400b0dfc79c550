"""The mixer of lightning attention with optional read-in and read-out matrices, which make each head's state smaller.

S_t = a S_{t-1} + k_t v_t^T and o_t = S_t^T q_t per head, S (K, V), with a decay a in (0, 1) that is fixed. There is no
delta rule, so L k in place of k and R q in place of q change nothing where R^T L = I. This is the scan of Mamba-2 with
time steps of 1, and runs as such.

Shapes: batch B, length L, hidden size D, H heads of size K = V, r <= K rows of each state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compatibility import one_cache
from ..ops.ssd_scan import ssd_scan, ssd_state_update
from .gated_delta import in_basis
from .mixer import CachedMixer, scan_or_step
from .padding import RealFirst


class CompreSSMLightningMixer(CachedMixer):
    """The lightning attention of MiniMax, with parameters named as in transformers.

    Where `read_in` and `read_out`, each (H, r, K), are present, tokens are written with the keys read_in k and read
    with the queries read_out q, so the states have r rows. Where they are None (r = K) the mixer is that of MiniMax.

    Args:
        config: has hidden_size D, num_attention_heads H, head_dim K, num_hidden_layers, state_sizes (r of each
            linear-attention layer at the beginning), layer_types.
        layer_idx: place of this layer in `layer_types` and in a cache.
        act: the activation of queries, keys and values, as a module.
        norm: of all heads' outputs together, (..., H K) -> (..., H K).

    Source: MiniMax 2025, arXiv 2501.08313, section 2.2; read-in and read-out are this package's.
    """

    def __init__(self, config: Any, layer_idx: int, act: nn.Module, norm: nn.Module):
        super().__init__()
        self.num_k_heads, self.head_k_dim = config.num_attention_heads, config.head_dim
        self.layer_idx, self.depth = layer_idx, layer_idx / (config.num_hidden_layers - 1 + 1e-5)
        features, heads, keys = config.hidden_size, self.num_k_heads, self.head_k_dim
        size = config.state_sizes[config.layer_types[:layer_idx].count("linear_attention")]
        self.act, self.norm = act, norm
        self.read_in: nn.Parameter | None
        self.read_out: nn.Parameter | None
        for name in ("read_in", "read_out"):
            self.register_parameter(name, None if size == keys else nn.Parameter(torch.empty(heads, size, keys)))
        self.qkv_proj = nn.Linear(features, 3 * heads * keys, bias=False)
        self.out_proj = nn.Linear(heads * keys, features, bias=False)
        self.output_gate = nn.Linear(features, heads * keys, bias=False)

    @property
    def state_size(self) -> int:
        """Present number of rows r of each state."""
        return self.head_k_dim if self.read_in is None else self.read_in.shape[1]

    def log_decay(self, device: torch.device | None = None) -> Tensor:
        """log a of each head, < 0, float32 (H,): fixed numbers that follow from the heads and the layer's place."""
        heads = torch.arange(1, self.num_k_heads + 1, dtype=torch.float32, device=device)
        return -((2 ** (-8 / self.num_k_heads)) ** heads) * (1 - self.depth + 1e-5)

    def initial_values(self) -> dict[str, Tensor]:
        """New values of read_in and read_out, where present, (H, r, K): they take the first r key channels."""
        if self.read_in is None:
            return {}
        rows = torch.eye(*self.read_in.shape[1:], device=self.read_in.device).expand_as(self.read_in)
        return {"read_in": rows, "read_out": rows}

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix a sequence as `CachedMixer` does; further names of its arguments and the tuple are those of attention.

        Args:
            hidden_states: (B, L, D).
            cache, past_key_values: transformers' `DynamicCache`, under one of the two names that its versions use.
            attention_mask: (B, L), zero at padding; of a longer one the last L columns count.
            **kwargs: keywords that models pass to all their layers and that mean nothing here.

        Returns:
            (B, L, D), and None in place of attention weights.

        Raises:
            TypeError: for other keywords, or two caches.
            ValueError: if the cache has no place for a state, or one of another size; for packed sequences.
        """
        cache = one_cache(self, cache=cache, past_key_values=past_key_values)
        if cache is not None and len(cache.layers) <= self.layer_idx:
            raise ValueError(
                f"a {type(cache).__name__} has no place for the state of layer {self.layer_idx}; give the model "
                "transformers' DynamicCache(config=model.config), or none, and it makes one"
            )
        return super().forward(hidden_states, cache, attention_mask, **kwargs), None

    def mix(self, hidden_states: Tensor, cache: Any, state: Tensor | None, tokens: RealFirst | None) -> Tensor:
        """As in `CachedMixer`: (B, L, D) -> (B, L, D)."""
        q, k, v, steps = self.recurrence_inputs(hidden_states, tokens)
        q, k = self.to_state_basis(q, k)
        self._check_state(state, v, k)
        o = scan_or_step(self, cache, state, ssd_scan, ssd_state_update, (v, steps, self.log_decay(v.device), k, q))
        if cache is not None:
            # Caches note this with the input of a convolution, of which there is none here.
            cache.layers[self.layer_idx].has_previous_state[0] = True
        return self.out_proj(self.output_gate(hidden_states).sigmoid() * self.norm(o.flatten(-2)))

    def recurrence_inputs(
        self, hidden_states: Tensor, tokens: RealFirst | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the input of the recurrence, at full key size, from hidden states (B, L, D).

        Returns:
            Queries, keys and values (B, L, H, K), and how often the states decay at each token, and whether it is
            written: (B, L, H), 1, or 0 at padding.
        """
        projected = self.act(self.qkv_proj(hidden_states)).unflatten(-1, (self.num_k_heads, -1))
        q, k, v = projected.chunk(3, dim=-1)
        steps = torch.ones(v.shape[:3], dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
        return q, k, v, steps if tokens is None else tokens.clear(steps)

    def to_state_basis(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Map queries and keys (B, L, H, K) to those that read and write the state (B, L, H, r)."""
        if self.read_in is None or self.read_out is None:
            return q, k
        return in_basis(q, self.read_out), in_basis(k, self.read_in)

    def _check_state(self, state: Tensor | None, v: Tensor, k: Tensor) -> None:
        expected = (*v.shape[::2], v.shape[3], k.shape[3])
        if state is not None and state.shape != expected:
            raise ValueError(
                f"the cached state must be {expected}, (B, H, V, r); got {tuple(state.shape)}. A cache from before a "
                "cut does not fit the model after it"
            )
