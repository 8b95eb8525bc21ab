"""The most memory that a training step takes on one device, from its parts.

The parts do not all live at once: in the backward pass every block's gradients come as its activations go. What is
left out is small beside them: text, rows of samples, what the operators of one block pass on to each other, and the
allocator's fragments. Within 5% of every allocation of a whole step of Goku-2B on the meta device (tests).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StepMemory"]


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one process.

    Attributes:
        lasting: weights, optimizer states, EMA, and what of them is gathered.
        gradients: of all parameters.
        copies: of the weights in the dtype of products, which autocast keeps through the forward pass.
        kept: activations of a full pack at the end of its forward pass.
        recomputed: activations that come back while one block is computed again.
        several_packs: whether gradients of earlier packs of the step are there already.
    """

    lasting: float
    gradients: float
    copies: float
    kept: float
    recomputed: float
    several_packs: bool

    @property
    def peak(self) -> float:
        """The most at any time of the step."""
        if self.several_packs:
            return self.lasting + self.gradients + self.kept + max(self.copies, self.recomputed)
        # Linear in the blocks that are done, so the most is at one end of the backward pass: all activations and no
        # gradient, or the reverse, each with one block at work.
        forward = self.kept + self.copies
        backward = max(self.kept, self.gradients) + self.recomputed
        return self.lasting + max(forward, backward)
