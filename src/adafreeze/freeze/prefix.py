"""The frozen prefix runs without a graph, or not at all: this is what turns a freeze into bytes and seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..model.blocks import Stack, StopForward, hidden_states, without_cache
from ..model.calls import Call
from ..model.flow import Flow, leaves, tensors_in
from ..model.patches import Hook, forward_hook, forward_pre_hook, held_attribute, patched, patched_forward
from ..model.traces import captures_outputs, read_by, without_users_hooks

__all__ = ["Prefix", "Start", "Starts", "autocast_now"]

# Settings under which a model skips whole blocks in training, each with a probability.
LAYER_DROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "layer_drop")

# So many passes that begin inside the model are no accident.
BYPASSES = 4


@dataclass
class Start:
    """Where one call of a stack begins: above ``depth`` blocks, whose output was ``states``."""

    depth: int
    states: Tensor


Starts = Mapping[str, Sequence[Start | None]]
"""By stack path, for each call of the stack in one pass of the model."""


class Around(Protocol):
    """Whoever wants to know of each pass of the model."""

    def before_pass(self) -> None:
        """It begins."""

    def after_pass(self) -> None:
        """It has ended."""


@dataclass
class _Pass:
    """One forward pass of the model.

    ``runs`` counts, of each dropout outside the blocks, its runs in this pass, and those before the first block.
    ``refused`` are calls (stack, number) that do not start where ``starts`` says.
    ``recorded`` is None in a training pass; in a nested one the hidden states at the boundaries are put there, call by
    call, and with ``until`` (calls of each stack) the pass is left when all have come. ``handed_on`` is what blocks
    return beside their hidden states in the present call (T5's position bias), by stack. In a ``shadow`` skipped blocks
    return NaN, but for the last: a pass in which somebody reads more than that is not one to be served.
    """

    starts: Starts = field(default_factory=dict)
    recorded: dict[str, list[Tensor]] | None = None
    until: Mapping[str, int] | None = None
    calls: dict[str, int] = field(default_factory=dict)
    refused: set[tuple[str, int]] = field(default_factory=set)
    shadow: bool = False
    runs: dict[nn.Module, list[int]] = field(default_factory=dict)
    handed_on: dict[str, tuple[Any, ...] | None] = field(default_factory=dict)

    def start(self, path: str) -> Start | None:
        """Where the present call of this stack begins."""
        starts, call = self.starts.get(path, ()), self.calls.get(path, 1) - 1
        return starts[call] if call < len(starts) and (path, call) not in self.refused else None

    @property
    def is_complete(self) -> bool:
        """Whether all that this nested pass was made for is recorded."""
        recorded = self.recorded or {}
        return self.until is not None and all(len(recorded.get(path, ())) >= n for path, n in self.until.items())


class Prefix:
    """Runs the prefix of each stack under ``torch.no_grad()`` and without dropout, in training only.

    The prefix of a stack is the longest run of its blocks from the bottom that holds no live parameter, provided
    nothing upstream is live (trainable embeddings; an encoder that a decoder attends to). Its output for a
    sample is then a constant but for dropout, and dropout in it regularizes nothing that still trains.

    What stands upstream is read off a traced pass, and looked at again in every training pass: a tensor that enters a
    block of the prefix, requires grad and was computed from anything but frozen embeddings (a projector outside the
    model, a vision tower that most samples do without, adversarial noise) ends the prefix of that stack there and then,
    before anything is cut off.

    Whoever installed hooks that make embeddings require grad, no graph is built below the boundary. Evaluation,
    generation and passes without gradients run the model's own code.

    Args:
        model: the module that the host calls; its ``training`` flag decides.
        stacks: in data-flow order.
        flows: what stands upstream of each stack.
        keep_dropout: leave dropout in the prefix on.

    Attributes:
        look_up: asked before each training pass of the model where to start. Stacks and calls that it leaves out run
            their prefix.
        watch_entry: called with a stack's path, the number of the call and what enters its block 0 in a training pass
            that runs its prefix.
        admits: asked with the same, before a call that would start above its prefix: False runs the prefix.
        entered: by path, what entered block 0 in each call of the last nested pass.
        watch_boundary: called with a stack's path, the number of the call and the hidden states at its boundary in a
            training pass.
        finished: called after each training pass with what the model returned, None if it failed; and with how often
            each stack was called. What it returns, if anything, takes the output's place.
        around: told before and after each pass of the model, whatever for.
        ended: stacks that have no prefix any more, since something that trains was seen to enter it.
        on_end: called with the path when that happens.
        on_change: called with the paths whose prefix got shorter, since something in it trains by now.
        on_bypass: called when several training passes have come to the blocks, and none through the model itself.
        modules: all of the model, as they were when the prefix last changed; walking the tree takes time.
        drops_layers: the model leaves out blocks by chance in training.
        sees_entries: what enters block 0 is seen in training passes: no compiler has made a graph of them.
        autocast: (dtype or None) that was in force in the last training pass; "unknown" before the first.
    """

    def __init__(
        self, model: nn.Module, stacks: list[Stack], flows: Mapping[str, Flow], *, keep_dropout: bool = False
    ) -> None:
        self.model = model
        self.stacks = stacks
        self.flows = flows
        self.keep_dropout = keep_dropout
        self.depths: dict[str, int] = {stack.path: 0 for stack in stacks}
        self.look_up: Callable[[Call], Starts] | None = None
        self.watch_entry: Callable[[str, int, Tensor], None] | None = None
        self.admits: Callable[[str, int, Tensor], bool] | None = None
        self.entered: dict[str, list[Tensor]] = {}
        self.watch_boundary: Callable[[str, int, Tensor], None] | None = None
        self.finished: Callable[[Any, Mapping[str, int]], None] | None = None
        self.around: Around | None = None
        self.ended: set[str] = set()
        self.on_end: Callable[[str], None] | None = None
        self.on_change: Callable[[list[str]], None] | None = None
        self.on_bypass: Callable[[], None] | None = None
        self.autocast: torch.dtype | str | None = "unknown"
        self.sees_entries = False
        self.drops_layers = any(_setting(model, name) for name in LAYER_DROP)
        self.modules = list(model.modules())
        self._undo = ExitStack()
        self._hooks: list[Hook] = []
        self._pass = _Pass()
        self._root: nn.Module | None = None
        self._bypassed = 0
        self._patterns: dict[nn.Module, tuple[int, int]] = {}
        self._tables: list[dict[str, nn.Parameter | None]] = []
        self._on_embeddings: list[Hook] = []
        self._harmless: list[Tensor] = []
        self._hands_on: dict[str, tuple[Any, ...] | bool | None] = {}

    def update(self) -> dict[str, int]:
        """Find the prefix as the parameters' flags are now, and make it so. Returns blocks by stack path."""
        depths = {stack.path: self._depth(stack) for stack in self.stacks}
        if depths != self.depths:
            self._undo.close()
            self._on_embeddings = []
            self.modules = list(self.model.modules())
            self.depths = depths
            if any(depths.values()):
                self._install()
            self._tables = [module._parameters for block in self.blocks for module in block.modules()]
        return depths

    def restore(self) -> None:
        """Leave every module, hook and flag as it was before."""
        self._undo.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._tables, self._on_embeddings = [], [], []
        self.modules = []
        self.depths = {stack.path: 0 for stack in self.stacks}

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks of all prefixes."""
        return [block for stack in self.stacks for block in stack.blocks[: self.depths[stack.path]]]

    def _depth(self, stack: Stack) -> int:
        if stack.path in self.ended or self.flows[stack.path].live:
            return 0
        for index, block in enumerate(stack.blocks):
            if any(parameter.requires_grad for parameter in block.parameters()):
                return index
        return len(stack)

    def _install(self) -> None:
        enter = self._undo.enter_context
        if not self._hooks:
            # They stay while the prefix changes, which it may from a hook of the same pass: torch has listed them then.
            # Whoever calls an inner module between two passes of the model finds nothing to start from.
            for module in _entrances(self.model):
                self._hooks += [forward_pre_hook(module, self._begin), forward_hook(module, self._end, always=True)]
        for stack in self.stacks:
            depth = self.depths[stack.path]
            for index, block in enumerate(stack.blocks[:depth]):
                if not self.keep_dropout:
                    enter(_HeldInEvaluation(block, self.model))
                enter(held_attribute(block, "gradient_checkpointing", False))
                enter(patched_forward(block, self._graphless(stack, index, block)))
            if depth and not self.keep_dropout:
                for dropout in self.flows[stack.path].dropouts:
                    enter(patched_forward(dropout, self._until_entered(stack, dropout)))
        for module in self.modules:
            # wav2vec2's feature encoder makes its input require grad, for checkpointing and for nothing that trains.
            if not any(parameter.requires_grad for parameter in module.parameters()):
                enter(held_attribute(module, "_requires_grad", False))
        for embeddings in _input_embeddings(self.model, self.stacks):
            hook = forward_hook(embeddings, self._after_embeddings)
            self._undo.callback(hook.remove)
            self._on_embeddings.append(hook)

    def compute(
        self, call: Call, inputs: Mapping[str, Any], starts: Starts, until: Mapping[str, int]
    ) -> dict[str, list[Tensor]] | None:
        """Hidden states at the boundary of every stack that has a prefix, by path and call: a pass nested in another.

        The model runs on ``inputs`` as in training, without a graph, from ``starts`` where given, and is left when
        each stack has come to its boundary as often as ``until`` says. None if that did not happen.
        """
        this = _Pass(starts, recorded={}, until=until)
        self.entered = {}
        with self._nested(this), torch.no_grad(), suppress(StopForward):
            self._run(call, inputs)
        return this.recorded if this.is_complete else None

    def shadow(self, call: Call, inputs: Mapping[str, Any], starts: Starts) -> Any:
        """What a training pass from ``starts`` would return: the same, without a graph, noticed by nobody."""
        with self._nested(_Pass(starts, recorded={}, shadow=True)), torch.no_grad():
            return self._run(call, inputs)

    def rehearse(self, *args: Any, **inputs: Any) -> Any:
        """The model's forward pass as in training, the prefix computed, noticed by nobody."""
        with self._nested(_Pass()):
            return self.model.forward(*args, **inputs)

    def _run(self, call: Call, inputs: Mapping[str, Any]) -> Any:
        # Copies, since a model may write into what it is called with, as Whisper does to mask it.
        copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        args, kwargs = call.arguments(copies)
        return call.module.forward(*args, **kwargs)  # its hooks are for the outer pass

    @contextmanager
    def _nested(self, this: _Pass) -> Iterator[_Pass]:
        """A pass inside a training pass of the model, which goes on afterwards as if there had been none."""
        outer = self._pass, self._root, self.watch_boundary, self.autocast
        self._pass, self._root, self.watch_boundary = this, self.model, None
        try:
            # It is no pass that a compiler would see again, and none that a user's hooks should count.
            with torch.compiler.set_stance("force_eager"), without_users_hooks(self.modules):
                yield this
        finally:
            self._pass, self._root, self.watch_boundary, autocast = outer
            if this.recorded is None:
                self.autocast = autocast

    @torch.compiler.disable  # looking up is Python through and through
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._root is not None:  # PEFT's wrapper calls the model inside
            return
        self._root = module
        self._pass = _Pass()
        self._harmless.clear()
        if self._active():
            self._notice_unfrozen()
            for hook in self._on_embeddings:
                hook.go_last()
        if self.around is not None:
            self.around.before_pass()
        # What is trained through an input must not be cut off; the blocks will see whether it reaches them.
        trains = any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))
        if self.look_up is not None and self._active() and not trains:
            self._pass.starts = self.look_up(Call.of(module, args, kwargs))

    def _notice_unfrozen(self) -> None:
        """Whoever made a parameter of the prefix trainable in mid-run (gradual unfreezing) gets its gradient."""
        if any(p is not None and p.requires_grad for table in self._tables for p in table.values()):
            before = dict(self.depths)
            after = self.update()
            shorter = [path for path, depth in after.items() if depth < before[path]]
            if shorter and self.on_change is not None:
                self.on_change(shorter)

    @torch.compiler.disable
    def _end(self, module: nn.Module, _args: Any, output: Any = None) -> None:
        if self._root is not module:
            return
        this, self._pass, self._root = self._pass, _Pass(), None
        if output is not None and self._active():
            self._learn_patterns(this)
        self._harmless.clear()
        if self.finished is not None and self._active():
            self.finished(output, this.calls)
        if self.around is not None:
            self.around.after_pass()

    def _active(self) -> bool:
        return self.model.training and (torch.is_grad_enabled() or self._pass.recorded is not None)

    def _graphless(self, stack: Stack, index: int, block: nn.Module) -> Callable[..., Any]:
        original = block.forward
        path, depth = stack.path, self.depths[stack.path]
        at_boundary = index + 1 == depth
        above = stack.blocks[depth] if depth < len(stack) else None

        def forward(*args: Any, **kwargs: Any) -> Any:
            this = self._pass
            if index == 0 and self.model.training:
                this.calls[path] = this.calls.get(path, 0) + 1
            if not self._active():
                return original(*args, **kwargs)
            if index == 0:
                self._notice_autocast(block)
                self._notice_bypass()
            if this.recorded is None and self._something_trains(args, kwargs):
                self._end_prefix(path)
                return original(*args, **kwargs)
            start = this.start(path)
            if index == 0 and not self._enters(path, args, kwargs, start):
                start = None
            args, kwargs = without_cache(
                args, kwargs, filled=False
            )  # or it holds keys and values to the end of the pass
            with torch.no_grad():
                if start is not None and index < start.depth:
                    output = self._skipped(stack, index, start, lambda: original(*args, **kwargs))
                else:
                    output = original(*args, **kwargs)
                    if index == 0:
                        self._hands_on[path] = _beside(output)
            if at_boundary:
                hidden = hidden_states(output)
                if this.recorded is not None:
                    this.recorded.setdefault(path, []).append(hidden)
                    if this.is_complete:
                        raise StopForward
                    return output
                if above is not None and _checkpoints(above):
                    # Reentrant checkpointing gives no gradient to parameters unless an input requires one.
                    self.mark(hidden)
                if self.watch_boundary is not None:
                    self.watch_boundary(path, this.calls[path] - 1, hidden)
            if self.drops_layers and this.recorded is None:
                # All live blocks may be left out of a pass, and its loss must have a graph all the same.
                self.mark(hidden_states(output))
            return output

        return forward

    def _enters(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], start: Start | None) -> bool:
        """Whether this call may begin at ``start``; tells of what enters block 0, but not from within a graph."""
        if torch.compiler.is_compiling():
            return True
        hidden = next(tensors_in((args, kwargs)), None)
        this, call = self._pass, self._pass.calls[path] - 1
        if hidden is None:
            return True
        if this.recorded is not None:
            if start is not None and captures_outputs():  # it wants what blocks return, which skipped ones do not know
                this.refused.add((path, call))
                return False
            self.entered.setdefault(path, []).append(hidden.detach())
            return True
        self.sees_entries = True
        if start is None:
            if self.watch_entry is not None:
                self.watch_entry(path, call, hidden.detach())
        elif self.admits is not None and not self.admits(path, call, hidden.detach()):
            this.refused.add((path, call))
            return False
        return True

    def mark(self, hidden: Tensor) -> Tensor:
        """Let ``hidden``, a result of the prefix, require grad; nothing that trains is behind it."""
        self._harmless.append(hidden)
        return hidden.requires_grad_()

    def _something_trains(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether gradients of anything are to flow back through a block's inputs."""
        # In compiled code this loop is all there is of it: a graph should not break in every block.
        wanted = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
        return bool(wanted) and self._trains(wanted)

    @torch.compiler.disable
    def _trains(self, wanted: list[Tensor]) -> bool:
        harmless = {id(tensor) for tensor in self._harmless}
        return any(id(leaf) not in harmless for leaf in leaves(wanted))

    def _end_prefix(self, path: str) -> None:
        self.ended.add(path)
        self.update()
        if self.on_end is not None:
            self.on_end(path)

    def _skipped(self, stack: Stack, index: int, start: Start, run: Callable[[], Any]) -> Any:
        """What a skipped block returns: the known hidden states, with what block 0 hands on beside them."""
        path = stack.path
        if index == 0:
            beside = self._hands_on.get(path, True)
            # Tensors that block 0 makes for all others (T5's position bias) depend on the batch's shape: it runs.
            self._pass.handed_on[path] = _after_first(run()) if beside is True else beside  # type: ignore[assignment]
        handed_on, states = self._pass.handed_on[path], start.states
        if self._pass.shadow and index < start.depth - 1 and states.is_floating_point():
            states = torch.full_like(states, float("nan"))
        return states if handed_on is None else (states, *handed_on)

    def _notice_bypass(self) -> None:
        if self._root is None and self.on_bypass is not None:
            self._bypassed += 1
            if self._bypassed == BYPASSES:
                self.on_bypass()

    def _notice_autocast(self, block: nn.Module) -> None:
        # Weights that accelerate has put away stand on no device until their module is called.
        devices = (parameter.device for parameter in block.parameters() if not parameter.is_meta)
        autocast = autocast_now(next(devices, torch.device("cpu")))
        if autocast != self.autocast:
            self.autocast = autocast
            if self._pass.recorded is None:
                self._pass.starts = {}  # they were made under another: this pass computes its own

    def _until_entered(self, stack: Stack, dropout: nn.Module) -> Callable[..., Any]:
        """``dropout``, off where it stands before the blocks: T5 uses one module before them and after them.

        Of a stack that is called several times in a pass, how often it runs in each call is known after the first pass.
        """
        original, path = dropout.forward, stack.path

        def forward(x: Tensor) -> Tensor:
            # Off without a graph too: gradient caching runs each pass of a step twice, and wants the same of both.
            if not self.model.training:
                return original(x)
            if torch.compiler.is_compiling():  # what is counted has no place in a graph
                return original(x) if path in self._pass.calls else x
            runs, before = self._pass.runs.setdefault(dropout, [0, 0])
            pattern = self._patterns.get(dropout)
            stands_before = path not in self._pass.calls if pattern is None else runs % pattern[0] < pattern[1]
            self._pass.runs[dropout] = [runs + 1, before + (path not in self._pass.calls)]
            return x if stands_before else original(x)

        return forward

    def _learn_patterns(self, this: _Pass) -> None:
        """How often each dropout ran in a call of its stack, and how often of that before the blocks."""
        for stack in self.stacks:
            calls = this.calls.get(stack.path, 0)
            for dropout in self.flows[stack.path].dropouts if calls else ():
                runs, before = this.runs.get(dropout, (0, 0))
                if runs and runs % calls == 0 and 0 < before <= runs // calls:
                    self._patterns[dropout] = runs // calls, before

    def _after_embeddings(self, module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.requires_grad or not self._active():
            return None
        if any(parameter.requires_grad for parameter in module.parameters()) or read_by([module]) is not None:
            return None  # they train by now, or somebody's own hook asks for the gradient
        if all(self.depths.values()):
            return output.detach()
        # Where one stack still starts from the embeddings, reentrant checkpointing may need their gradient.
        self._harmless.append(output)
        return None


def autocast_now(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives to products on ``device`` here; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _after_first(output: Any) -> tuple[Any, ...] | None:
    return None if isinstance(output, Tensor) else tuple(output[1:])


def _beside(output: Any) -> tuple[Any, ...] | bool | None:
    """What a block returns beside its hidden states: None where it returns them alone; True if it holds tensors."""
    rest = _after_first(output)
    return True if any(True for _ in tensors_in(rest)) else rest


def _checkpoints(block: nn.Module) -> bool:
    return bool(getattr(block, "gradient_checkpointing", False))


def _setting(model: nn.Module, name: str) -> Any:
    """What the configuration of ``model``, or of a part of it, says."""
    return next((value for module in model.modules() if (value := getattr(_config(module), name, None))), None)


def _config(module: nn.Module) -> Any:
    return module.__dict__.get("config")


def _entrances(model: nn.Module) -> list[nn.Module]:
    """The model, and the one inside PEFT's wrapper, which a loss function may call in its place."""
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    return [model] if inner is model else [model, inner]


class _HeldInEvaluation:
    """Keeps ``block`` in evaluation mode through ``model.train()``, which hosts call before each micro-step.

    For its dropout, which may be a module or read the flag of the one it stands in. Norms with statistics of their own
    (BatchNorm) keep their mode: with others they would compute something else.
    """

    def __init__(self, block: nn.Module, model: nn.Module) -> None:
        self.block, self.model = block, model
        self._undo = ExitStack()

    def __enter__(self) -> None:
        self._was = self.model.training
        norms = [module for module in self.block.modules() if isinstance(module, _NormBase)]
        keeps = {id(module) for module in norms}
        self._flags = [(module, module.training) for module in self.block.modules() if id(module) not in keeps]
        for module, _ in self._flags:
            self._undo.enter_context(patched(module, "training", False, in_copies=lambda: self.model.training))

        def train(mode: bool = True) -> nn.Module:
            for norm in norms:
                norm.train(mode)
            return self.block

        self._undo.enter_context(patched(self.block, "train", train))

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        for module, flag in self._flags:
            module.training = flag if self.model.training == self._was else self.model.training


def _input_embeddings(model: nn.Module, stacks: Sequence[Stack]) -> list[nn.Module]:
    """Every module whose output a hook of transformers may make require grad: a T5 has one for each of its stacks."""
    inside = {id(module) for stack in stacks for block in stack.blocks for module in block.modules()}
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        embeddings = module if isinstance(module, nn.Embedding) else None
        if callable(get := getattr(type(module), "get_input_embeddings", None)):
            with suppress(AttributeError, NotImplementedError, KeyError):
                embeddings = get(module)
        if isinstance(embeddings, nn.Module) and id(embeddings) not in inside:
            found[id(embeddings)] = embeddings
    return list(found.values())
