"""fairseq's own layers and models under another residual rule: what Admin and the methods beside it share.

No ``forward`` is copied from fairseq. Its layers call ``residual_connection(f, x)`` with the residual branch f (after
dropout) and the sub-layer's input x, and then, in Post-LN, the sub-layer's LayerNorm. A :class:`Rule` is mixed in
before such a layer's class and says what happens instead.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any, ClassVar

from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import nn

from admin_fairseq.errors import AdminError
from admin_fairseq.family import FamilyModel

# fairseq 0.12.2 registers these copies of an encoder layer's weights for an inference-only fast path that
# knows only its own residual rule; they never get a gradient.
FAST_PATH_COPIES = tuple(f"{m}_{p}" for m in ("in_proj", "out_proj", "fc1", "fc2") for p in ("weight", "bias"))

FULLY_SHARDED = (
    "--ddp-backend fully_sharded splits the layers before they can be changed; use another --ddp-backend, and"
    " --checkpoint-activations or --memory-efficient-fp16 to save memory"
)


class Rule(nn.Module):
    """What a layer does with shortcut and residual branch; mixed in before fairseq's layer class.

    As it stands it is Post-LN: override ``residual_connection(self, x, residual)``, where x is the residual branch
    after dropout and residual the shortcut, both (time, batch, d); fairseq then applies the sub-layer's LayerNorm to
    what is returned. ``__init__`` is never called, since fairseq has built the layer: ``set_up`` makes parameters.
    :func:`admin_fairseq.register_method` makes architectures of a rule.
    """

    # traits, which analyses and checks ask for
    pre_ln = False  # fairseq's Pre-LN layers: a LayerNorm in front of each branch, and one more behind each stack
    depth_matters = False  # a trained layer computes with the number of layers, or with its own number
    start_depends_on_depth = False  # layers of a deep stack start otherwise than those of a shallow one
    crosses_sub_layers = False  # a sub-layer adds more than its branch to its shortcut, or keeps a second stream

    number: int  # of the layer in its stack, from 1

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        """Make of a finished stock layer of "encoder" or "decoder" one that follows this rule.

        ``layers`` is the number of layers by stack; a language model has no encoder.
        """

    @staticmethod
    def set_up_stacks(stacks: dict[str, nn.Module]) -> None:
        """The same for the stacks of a model, by name, whose layers follow this rule."""

    def norm_names(self) -> list[str]:
        """The attributes that hold the sub-layers' LayerNorms."""
        return [name for name, _ in self.named_children() if name.endswith("_layer_norm")]

    def drop_norms(self) -> None:
        """For methods without LayerNorm."""
        for name in self.norm_names():
            setattr(self, name, nn.Identity())

    # 0.12.2 fills the copies here
    _load_from_state_dict = nn.Module._load_from_state_dict


_MIXED: dict[tuple[Any, Any], Any] = {}


def mixed(mixin: Any, stock: Any) -> Any:
    """A class of both; one a pair, so that equal models have equal types. Its instances can be pickled."""
    if (mixin, stock) not in _MIXED:

        def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
            return (_unpickled, (mixin, stock), *object.__reduce_ex__(self, 2)[2:])

        _MIXED[mixin, stock] = type(f"{mixin.__name__}{stock.__name__}", (mixin, stock), {"__reduce_ex__": reduce})
    return _MIXED[mixin, stock]


def _unpickled(mixin: Any, stock: Any) -> nn.Module:
    kind = mixed(mixin, stock)
    return kind.__new__(kind)


def adopt(layer: nn.Module, rule: type[Rule], stack: str, layers: dict[str, int], number: int) -> None:
    """Put a finished stock layer, the one of this number in its stack, under a rule, in place.

    In place, because fairseq builds its layers in several ways (stacks, language models, activation
    checkpointing), all of which then serve as they are.
    """
    wrapped = vars(layer).pop("forward", None)  # by --checkpoint-activations, around the stock class's forward
    vars(layer).pop("precheckpoint_forward", None)
    layer.__class__ = mixed(rule, type(layer))
    if stack == "encoder":
        for name in FAST_PATH_COPIES:
            layer._parameters.pop(name, None)
    layer.number = number
    layer.set_up(stack, layers)
    if wrapped is not None:
        checkpoint_wrapper(layer, offload_to_cpu=wrapped.args[1])


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """ "encoder" and "decoder" of any of fairseq's Transformers, or "decoder" alone."""
    return {name: getattr(model, name) for name in ("encoder", "decoder") if hasattr(model, name)}


class RuledModel(FamilyModel):
    """A Transformer whose layers follow a rule; mixed in before fairseq's model class."""

    rule: ClassVar[type[Rule]]

    @classmethod
    def check(cls, args: Namespace) -> None:
        super().check(args)
        for stack in ("encoder", "decoder"):
            pre_ln = getattr(args, f"{stack}_normalize_before", cls.rule.pre_ln)
            if pre_ln and not cls.rule.pre_ln:
                raise AdminError(
                    f"--{stack}-normalize-before: this is a Post-LN method; drop the flag,"
                    " or use a stock architecture for a Pre-LN model"
                )
            if cls.rule.pre_ln and not pre_ln:
                raise AdminError(f"{stack}_normalize_before=false: this method's layers are Pre-LN; leave it out")
            layers = getattr(args, f"{stack}_layers", None)
            if layers is not None and layers < 1:
                raise AdminError(f"--{stack}-layers must be at least 1, not {layers}")
            if cls.rule.depth_matters and getattr(args, f"{stack}_layers_to_keep", None):
                raise AdminError(f"--{stack}-layers-to-keep: this method's layers need the number they were trained in")
        if getattr(args, "base_layers", 0):
            raise AdminError("--base-layers: BASE layers have no Post-LN sub-layers; drop the flag")
        if getattr(args, "ddp_backend", None) == "fully_sharded":
            raise AdminError(FULLY_SHARDED)

    def finish(self, args: Namespace) -> None:
        # fairseq's list drops layers at random when it is iterated over itself (LayerDrop)
        layers = {name: list(stack.layers.children()) for name, stack in self.stacks().items()}
        depths = {name: len(own) for name, own in layers.items()}
        for name, own in layers.items():
            for number, layer in enumerate(own, start=1):
                adopt(layer, self.rule, name, depths, number)
        self.rule.set_up_stacks(self.stacks())

    def stacks(self) -> dict[str, nn.Module]:
        """As :func:`stacks`."""
        return stacks(self)

    def depth_dependent_start(self) -> str | None:
        """What makes the layers of a deep model start otherwise than a shallow one's, if anything does."""
        return self.method if self.rule.start_depends_on_depth else None
