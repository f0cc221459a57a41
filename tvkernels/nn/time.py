"""The timestep's way into a UNet: once a call, or once a schedule, in place of once an image."""

from __future__ import annotations

from torch import Tensor, nn

from tvkernels.processors.clip import Clip, Span


class TimeEmbedding(nn.Module):
    """A UNet's `time_embedding`: one row where one timestep serves all, none where it is known.

    What follows broadcasts over the batch, so that every ResNet projects one row too.

    Args:
        embedding: diffusers' `TimestepEmbedding`, whose layers stay under their names.
        clip: of the call under way.
    """

    def __init__(self, embedding: nn.Module, clip: Clip):
        super().__init__()
        for name, child in embedding.named_children():
            self.add_module(name, child)
        self._embedding = (embedding,)  # not a child, whose name would be in the state dict
        self.clip = clip
        self.train(embedding.training)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """[B * F, C] sinusoids -> [1 or B * F, E]; `condition`, projected already, as it is."""
        if condition is not None:
            return condition
        return self._embedding[0](sample[:1] if self.clip.one_time else sample)


class TimeProjection(nn.Linear):
    """A ResNet's `time_emb_proj` with the activation before it, or its part of projected rows.

    Args:
        linear: the layer it stands in for, whose weight and bias it shares.
        act: the activation, which the ResNet then leaves out.
        span: this layer's part of rows from `InflatedHandle.project_time`.
    """

    def __init__(self, linear: nn.Linear, act: nn.Module, span: Span):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._act = (act,)  # the ResNet's own child
        self.span = span
        self.train(linear.training)

    def forward(self, temb: Tensor) -> Tensor:
        """[n, E] embeddings, or [n, total] projected rows -> [n, C]."""
        if temb.shape[-1] == self.span.total:
            return self.span.read(temb)
        return super().forward(self._act[0](temb))
