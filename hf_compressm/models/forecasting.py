"""Forecasts of the next steps of a series: what models with such a head share.

Shapes: B batch, L length, C channels, K of them forecast, P steps ahead, Q quantiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES

from ..compatibility import one_cache
from .known_by_name import KnownByName
from .outputs import CACHE_FIELD, in_form
from .pooling import padding_of_steps, pooled

SMALLEST_SCALE = 1e-5
"""A series with a smaller scale than this, such as a constant one, is not scaled."""


class Forecasting(KnownByName):
    """Mixin of PreTrainedModels that adds a linear map of `backbone`'s features to forecasts of the next steps.

    From each position the model predicts the next P = `config.prediction_length` steps at once, as quantiles (pinball
    loss) or, if `config.quantiles` is None, as the mean (squared error). In training all positions of the context
    count: the steps after them are known, from the context and the labels.

    With P as long as the horizon the forecast is direct. Its quantiles are those of each step given the context. A
    recursion over single steps does not give these: it reads its own medians as if they had been measured, so its
    errors add up, and its intervals stay as narrow as for one step. It also needs the future of channels that are not
    forecast. So choose P as the usual horizon. A longer horizon is reached by recursion over blocks of P steps, and
    P = 1 is the recursion over single steps. Either way the context is read once, into a state of constant size.

    Forecast channels are scaled by what the context says, see `config.scaling`; in training its early positions are
    scaled by later steps of it too, but never by labels.

    Raises:
        ValueError: if the config is not for continuous input.

    Source: Wen et al. 2017, arXiv 1711.11053: direct quantiles from every position; Salinas et al. 2017, arXiv
    1704.04110: scaling by the context.
    """

    known_as = MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES
    backbone_class: Any

    def __init__(self, config: Any) -> None:
        if config.num_channels is None:
            raise ValueError(f"{type(self).__name__} reads measurements: set config.num_channels")
        super().__init__(config)  # type: ignore[call-arg]
        self.backbone = self.backbone_class(config)
        outputs = len(config.quantiles or [None]) * config.prediction_length * len(self.channels)
        self.score = nn.Linear(config.hidden_size, outputs)
        self.post_init()

    @property
    def channels(self) -> list[int]:
        """The channels that are forecast."""
        chosen = self.config.prediction_channel_indices
        return list(range(self.config.num_channels)) if chosen is None else chosen

    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        observed_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Compute forecasts of the P steps after the last real one: `logits` (B, Q, P, K), or (B, P, K) of the mean.

        They are in the unit of the input, in float32 at least, and quantiles are in order. Missing values are NaN, or
        filled by you and marked in `observed_mask`.

        Args:
            input_values: (B, L, C) floats, of one channel also (B, L).
            attention_mask: (B, L), 1 at steps of the series, 0 at padding on either side.
            observed_mask: shape of `input_values`, 0 where a value was missing: it counts neither for the loss nor for
                the scale. NaN counts as missing either way, and is read as the location of its series, or 0.
            labels: (B, P, K) floats, the steps after the last real one, of one channel also (B, P); NaN if missing.
            past_key_values: from an earlier call, to read on from; the scale stays that of the first call. Updated
                in place if `use_cache`.
            use_cache: whether to return the states; by default as the config says, and not while training.
            output_hidden_states: whether to return hidden states (B, L, H).
            return_dict: a tuple instead of an output object if False.
            cache: another name of `past_key_values`.
            **kwargs: for the loss: `num_items_in_batch`, the number of labels over which it is a mean, if that is not
                the number in this batch.

        Raises:
            ValueError: if there is no input, or a shape does not fit.
        """
        values = self._in_channels("input_values", input_values, self.config.num_channels)
        padding = padding_of_steps(attention_mask, values)
        observed = self._observed(values, observed_mask, padding)
        given = one_cache(self, cache=cache, past_key_values=past_key_values)
        known = None if given is None or not given.is_initialized else given.scaling
        location, scale = self._measure(values, observed) if known is None else known
        scaled = (values[..., self.channels] - location) / scale
        read = values.index_copy(2, self._index(values), scaled).masked_fill(values.isnan(), 0)
        outputs = self.backbone(
            input_values=read,
            attention_mask=attention_mask,
            cache=given,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        if (kept := getattr(outputs, CACHE_FIELD)) is not None:
            kept.scaling = location, scale
        features, loss = outputs.last_hidden_state, None
        if labels is None:
            logits = self._forecasts(pooled(features, attention_mask, "last"))
        else:
            every = self._forecasts(features)
            future = (self._in_channels("labels", labels, len(self.channels)) - location) / scale
            past = scaled.masked_fill(~observed[..., self.channels], torch.nan)
            loss = self._loss(every, self._next_steps(past, future, padding), **kwargs)
            logits = pooled(every.flatten(2), attention_mask, "last").unflatten(1, every.shape[2:])
        logits = logits if self.config.quantiles is None else logits.sort(1).values
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits * self._for_quantiles(scale) + self._for_quantiles(location),
            hidden_states=outputs.hidden_states,
            **{CACHE_FIELD: kept},
        )
        return in_form(output, return_dict, self.config)

    @torch.no_grad()
    def forecast(
        self,
        input_values: Tensor,
        horizon: int | None = None,
        attention_mask: Tensor | None = None,
        observed_mask: Tensor | None = None,
        future_values: Tensor | None = None,
    ) -> Tensor:
        """Forecast any number of steps; the state has constant size, whatever the context and the horizon.

        Beyond P steps the quantile nearest to the median (or the mean) is read as if it had been measured.

        Args:
            input_values, attention_mask, observed_mask: the context, as for `forward`.
            horizon: steps, >= 1; P if None.
            future_values: (B, horizon, C - K) the channels that are not forecast, in their order; needed if there are
                some and the horizon is beyond P.

        Returns:
            (B, Q, horizon, K) quantiles, or (B, horizon, K) means, in the unit of the input.

        Raises:
            ValueError: if the horizon is below 1, `future_values` are needed and lacking, or a shape does not fit.
        """
        block = self.config.prediction_length
        horizon = block if horizon is None else horizon
        rest = [channel for channel in range(self.config.num_channels) if channel not in self.channels]
        self._check_horizon(horizon, len(input_values), len(rest), future_values)
        masks = {"attention_mask": attention_mask, "observed_mask": observed_mask}
        run: Any = self
        output = run(input_values=input_values, use_cache=True, return_dict=True, **masks)
        found = output.logits.new_empty(*output.logits.shape[:-2], horizon, len(self.channels))
        for start in range(0, horizon, block):
            found[..., start : start + block, :] = output.logits[..., : horizon - start, :]
            if start + block < horizon:
                read = found.new_empty(len(found), block, self.config.num_channels)
                read[..., self.channels] = self._point(output.logits)
                if future_values is not None and rest:
                    read[..., rest] = future_values[:, start : start + block].to(read)
                cache = getattr(output, CACHE_FIELD)
                output = run(input_values=read, cache=cache, use_cache=True, return_dict=True)
        return found

    def _forecasts(self, features: Tensor) -> Tensor:
        """Scaled forecasts (..., Q, P, K), or (..., P, K) of the mean, from features (..., H)."""
        quantiles = [] if self.config.quantiles is None else [len(self.config.quantiles)]
        scores = self.score(features)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.unflatten(-1, (*quantiles, self.config.prediction_length, len(self.channels)))

    def _loss(self, found: Tensor, wanted: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        """Mean loss of forecasts (B, L, Q, P, K) or (B, L, P, K) over what is not NaN in (B, L, P, K)."""
        counted = ~wanted.isnan()
        errors = wanted.masked_fill(~counted, 0)
        if self.config.quantiles is None:
            losses = (errors - found).square()
        else:
            errors = errors[:, :, None] - found
            levels = errors.new_tensor(self.config.quantiles)[:, None, None]
            losses = torch.maximum(levels * errors, (levels - 1) * errors).mean(2)
        mean = losses.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
        if num_items_in_batch is None:
            return mean
        labels = len(wanted) * self.config.prediction_length * len(self.channels)
        return mean * (labels / torch.as_tensor(num_items_in_batch, device=mean.device))

    def _next_steps(self, past: Tensor, future: Tensor, padding: Tensor | None) -> Tensor:
        """What each position predicts, (B, L, P, K), from (B, L, K) and (B, P, K), NaN where there is nothing."""
        length, block = past.shape[1], self.config.prediction_length
        if future.shape != (len(past), block, past.shape[2]):
            raise ValueError(
                f"labels must have shape (B, prediction_length, K) = {(len(past), block, past.shape[2])}, got "
                f"{tuple(future.shape)}"
            )
        steps = torch.arange(length, device=past.device).expand(len(past), -1)
        last = pooled(steps[..., None].float(), padding, "last").long()
        places = last + 1 + torch.arange(block, device=past.device)
        joined = torch.cat([past, torch.full_like(future, torch.nan)], 1)
        joined = joined.scatter(1, places[..., None].expand_as(future), future)
        wanted = joined.unfold(1, block, 1)[:, 1:].transpose(2, 3)
        return wanted if padding is None else wanted.masked_fill(~padding[:, :, None, None], torch.nan)

    def _observed(self, values: Tensor, observed_mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """Which values (B, L, C) count, bool."""
        observed = ~values.isnan()
        if observed_mask is not None:
            given = self._in_channels("observed_mask", observed_mask, values.shape[2])
            if given.shape != values.shape:
                raise ValueError(
                    f"observed_mask must have the shape of input_values, {tuple(values.shape)}; got "
                    f"{tuple(observed_mask.shape)}"
                )
            observed = observed & given.bool()
        return observed if padding is None else observed & padding[:, :, None].to(observed.device)

    def _measure(self, values: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale (B, 1, K) of the forecast channels."""
        values, counts = values[..., self.channels], observed[..., self.channels].sum(1, keepdim=True).clamp(min=1)
        missing = ~observed[..., self.channels]
        location = values.new_zeros(counts.shape)
        if self.config.scaling is None:
            return location, torch.ones_like(location)
        if self.config.scaling == "mean":
            scale = values.masked_fill(missing, 0).abs().sum(1, keepdim=True) / counts
        else:
            location = values.masked_fill(missing, 0).sum(1, keepdim=True) / counts
            scale = ((values - location).masked_fill(missing, 0).square().sum(1, keepdim=True) / counts).sqrt()
        return location, scale.where(scale > SMALLEST_SCALE, 1)

    def _in_channels(self, name: str, values: Tensor | None, channels: int) -> Tensor:
        """(B, L, channels) in float32 at least; of one channel also from (B, L)."""
        if values is None:
            raise ValueError(f"give {name}. A Trainer drops columns of the data whose names forward does not take")
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        wide = wide[..., None] if wide.ndim == 2 and channels == 1 else wide
        if wide.ndim != 3 or wide.shape[2] != channels:
            raise ValueError(f"{name} must have shape (B, L, {channels}), got {tuple(values.shape)}")
        return wide

    def _check_horizon(self, horizon: int, batch: int, rest: int, future_values: Tensor | None) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        needed = rest > 0 and horizon > self.config.prediction_length
        if needed and (future_values is None or future_values.shape != (batch, horizon, rest)):
            got = None if future_values is None else tuple(future_values.shape)
            raise ValueError(
                f"a horizon of {horizon} is beyond prediction_length = {self.config.prediction_length}, where the "
                f"model reads the channels that are not forecast: give future_values of shape {(batch, horizon, rest)};"
                f" got {got}"
            )

    def _point(self, logits: Tensor) -> Tensor:
        """(B, P, K): the quantile nearest to the median, or the mean."""
        levels = self.config.quantiles
        return logits if levels is None else logits[:, min(range(len(levels)), key=lambda i: abs(levels[i] - 0.5))]

    def _for_quantiles(self, values: Tensor) -> Tensor:
        """(B, 1, K) -> (B, 1, 1, K), or as it is for means."""
        return values if self.config.quantiles is None else values[:, None]

    def _index(self, values: Tensor) -> Tensor:
        return torch.tensor(self.channels, device=values.device)
