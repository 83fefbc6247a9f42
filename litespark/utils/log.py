"""What a run says on the console: Litespark's own lines, once, and not its dependencies' noise."""

from __future__ import annotations

import logging
import warnings

# Said at every start by every rank, and nothing a user can or should act on.
_NOISE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    "`torch.distributed.* is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "If you are using transformer_engine as the transformer implementation",
)
# The same, through logging: logger and text.  A subclass of megatron-core's MLP is "unknown" to it.
_LOGGED_NOISE = {"megatron.core.transformer.transformer_layer": "Unknown MLP type"}


def quiet_upstream() -> None:
    """Silence the known warnings of megatron-core and torch; new ones still show."""
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=f".*{pattern}")
    for name, text in _LOGGED_NOISE.items():
        logger = logging.getLogger(name)
        logger.filters = [lambda record, text=text: text not in record.getMessage()]


def set_up_logging(is_first_rank: bool) -> None:
    """Plain lines on stderr: information from the first rank, errors from all.

    Each applied patch is logged by `litespark.patches`; a run sums them up in one line, so the
    details show only when that logger is set to INFO.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("litespark").setLevel(logging.INFO if is_first_rank else logging.ERROR)
    logging.getLogger("litespark.patches").setLevel(logging.WARNING)
    if not is_first_rank:
        logging.getLogger().setLevel(logging.ERROR)
