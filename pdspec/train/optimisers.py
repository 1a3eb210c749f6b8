"""What moves the weights of a head: AdamW, or Muon for its hidden matrices and AdamW for the rest.

Muon (Jordan et al. 2024; torch's own) steps along the orthogonalised momentum of a matrix. With its steps scaled to
AdamW's root mean square both share one learning rate ("Muon is Scalable for LLM Training", 2502.16982, eq. 4). Norms,
biases, embeddings and output rows are no hidden matrices and stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

OPTIMISERS = ("adamw", "muon")
_ROWS_OF_TOKENS = ("lm_head.weight", "embed_tokens.weight")


class Optimisers:
    """One or two of torch's optimisers as one. ``parameters``: the head's, by name; ``learning_rate``: the peak."""

    def __init__(self, kind: str, parameters: Mapping[str, torch.nn.Parameter], learning_rate: float) -> None:
        matrices = [value for name, value in parameters.items() if kind == "muon" and is_hidden_matrix(name, value)]
        taken = {id(value) for value in matrices}
        others = [value for value in parameters.values() if id(value) not in taken]
        self.members: list[torch.optim.Optimizer] = []
        if others:
            self.members.append(
                torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
            )
        if matrices:
            self.members.append(
                torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            )

    @property
    def param_groups(self) -> Iterator[dict[str, Any]]:
        """Of all members."""
        for member in self.members:
            yield from member.param_groups

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Moves the weights."""
        for member in self.members:
            member.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """One per member."""
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """What ``state_dict`` gave for the same kind and head."""
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


def is_hidden_matrix(name: str, value: torch.Tensor) -> bool:
    """Whether Muon may have it."""
    return value.ndim == 2 and not name.endswith(_ROWS_OF_TOKENS)
