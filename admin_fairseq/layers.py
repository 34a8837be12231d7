"""fairseq's own layers and models under another residual rule: what Admin and the methods beside it share.

No ``forward`` is copied from fairseq. Its layers call ``residual_connection(f, x)`` with the residual branch f (after
dropout) and the sub-layer's input x, and then, in Post-LN, the sub-layer's LayerNorm. A :class:`Rule` is mixed in
before such a layer's class and says what happens instead.
"""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace
from typing import Any, ClassVar

from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import nn

from admin_fairseq.config import POSITIONS, flat
from admin_fairseq.errors import AdminError

# fairseq 0.12.2 registers these copies of an encoder layer's weights for an inference-only fast path that
# knows only its own residual rule; they never get a gradient.
FAST_PATH_COPIES = tuple(f"{m}_{p}" for m in ("in_proj", "out_proj", "fc1", "fc2") for p in ("weight", "bias"))

FULLY_SHARDED = (
    "--ddp-backend fully_sharded splits the layers before they can be changed; use another --ddp-backend, and"
    " --checkpoint-activations or --memory-efficient-fp16 to save memory"
)


class Rule(nn.Module):
    """What a layer does with shortcut and residual branch; mixed in before fairseq's layer class."""

    def set_up(self, encoder_layers: int, decoder_layers: int) -> None:
        """Make of a finished stock layer one that follows this rule; the model has so many layers."""

    # 0.12.2 fills the copies here
    _load_from_state_dict = nn.Module._load_from_state_dict


@functools.lru_cache(maxsize=None)
def _mixed(rule: type[Rule], layer: type[nn.Module]) -> type[nn.Module]:
    return type(f"{rule.__name__}{layer.__name__}", (rule, layer), {})


def adopt(layer: nn.Module, rule: type[Rule], encoder_layers: int, decoder_layers: int) -> None:
    """Put a finished stock layer under a rule, in place.

    In place, because fairseq builds its layers in several ways (stacks, language models, activation
    checkpointing), all of which then serve as they are.
    """
    wrapped = vars(layer).pop("forward", None)  # by --checkpoint-activations, around the stock class's forward
    vars(layer).pop("precheckpoint_forward", None)
    layer.__class__ = _mixed(rule, type(layer))
    if isinstance(layer, TransformerEncoderLayerBase):
        layer.can_use_fastpath = False
        for name in FAST_PATH_COPIES:
            layer._parameters.pop(name, None)
    layer.set_up(encoder_layers, decoder_layers)
    if wrapped is not None:
        checkpoint_wrapper(layer, offload_to_cpu=wrapped.args[1])


class RuledModel(nn.Module):
    """A Transformer whose layers follow a rule; mixed in before fairseq's model class."""

    rule: ClassVar[type[Rule]]
    own_options: ClassVar[dict[str, Any]] = {}  # and their defaults

    @staticmethod
    def add_own_args(parser: ArgumentParser) -> None:
        """Add what ``own_options`` lists to the command line."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        super().add_args(parser)
        cls.add_own_args(parser)

    @classmethod
    def check(cls, args: Namespace) -> None:
        """Refuse options that the method cannot honour, before anything is read or written.

        Raises:
            AdminError: it cannot.
        """
        for stack in ("encoder", "decoder"):
            if getattr(args, f"{stack}_normalize_before", False):
                raise AdminError(
                    f"--{stack}-normalize-before: this is a Post-LN method; drop the flag,"
                    " or use a stock architecture for a Pre-LN model"
                )
            layers = getattr(args, f"{stack}_layers", None)
            if layers is not None and layers < 1:
                raise AdminError(f"--{stack}-layers must be at least 1, not {layers}")
        if getattr(args, "base_layers", 0):
            raise AdminError("--base-layers: BASE layers have no Post-LN sub-layers; drop the flag")
        if getattr(args, "ddp_backend", None) == "fully_sharded":
            raise AdminError(FULLY_SHARDED)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> RuledModel:
        args = flat(args)
        config = task.args if task.cfg is None else task.cfg  # of a legacy task, and of any other
        for limit in POSITIONS:
            if not hasattr(args, limit):  # hydra's model section does not repeat what the task knows
                setattr(args, limit, getattr(config, limit, None))
        return cls.finish(super().build_model(args, task), args)

    @classmethod
    def finish(cls, model: RuledModel, args: Namespace) -> RuledModel:
        """Apply ``own_options`` to a model that was just built."""
        return model

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # fairseq's list drops layers at random when it is iterated over itself (LayerDrop)
        layers = {name: list(stack.layers.children()) for name, stack in self.stacks().items()}
        for stack in layers.values():
            for layer in stack:
                adopt(layer, self.rule, len(layers.get("encoder", ())), len(layers["decoder"]))

    def stacks(self) -> dict[str, nn.Module]:
        """ "encoder" and "decoder", or "decoder" alone."""
        return {name: getattr(self, name) for name in ("encoder", "decoder") if hasattr(self, name)}
