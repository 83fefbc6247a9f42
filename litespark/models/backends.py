"""Spec providers: who computes each slot of a transformer layer.

A backend answers megatron-core's questions ("which norm?", "which core attention?") with a class.
Adding a backend is adding a provider; the control flow that uses the answers is written once, in
`layer_specs.py`.
"""

from __future__ import annotations

from megatron.core.models.backends import LocalSpecProvider

from litespark.modules.core_attention import ReferenceCoreAttention
from litespark.modules.norm import RMSNorm


class ReferenceBackend(LocalSpecProvider):
    """Plain torch on any device: megatron-core's linears, Litespark's RMSNorm and attention."""

    name = "reference"

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """The norm of every norm slot; a Llama has no other than RMSNorm."""
        return RMSNorm

    def core_attention(self) -> type:
        """Softmax attention between the QKV and the output projection."""
        return ReferenceCoreAttention


BACKENDS = {"reference": ReferenceBackend}
FASTEST = "reference"


def select_backend(name: str) -> ReferenceBackend:
    """The provider for `model.backend`; `auto` takes the fastest there is."""
    return BACKENDS[FASTEST if name == "auto" else name]()
