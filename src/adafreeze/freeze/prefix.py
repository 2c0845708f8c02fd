"""The frozen prefix runs without a graph, or is skipped: this turns a freeze into saved bytes and time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import RunError
from ..model.batch import Call
from ..model.blocks import (
    Stack,
    StopForward,
    base_model,
    device_of,
    hidden_states,
    is_quiet,
    modules_outside,
    without_cache,
)
from ..model.flow import Flow, graph_leaves, tensors_in
from ..model.modes import mode_does_more
from ..model.patches import Hook, forward_hook, forward_pre_hook, held_attribute, patched, patched_forward
from ..model.traces import captures_outputs, read_by, without_users_hooks

__all__ = ["Computed", "NoKeys", "Prefix", "Server", "Slot", "Start", "Starts", "Weights", "autocast_now"]

# Settings under which a model skips whole blocks at random in training.
LAYER_DROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "layer_drop")

# Report passes that begin inside the model once there were this many; a few may be accidents.
BYPASSES = 4

Slot = tuple[str, int]
"""One call of a stack in a pass of the model: path of the stack, number of the call."""


class Start(NamedTuple):
    """Start a call above the first ``depth`` blocks, whose output was ``states``."""

    depth: int
    states: Tensor


Starts = Mapping[Slot, Start]
"""Where the calls of one pass start; the others run their prefix."""


class Computed(NamedTuple):
    """Hidden states of one pass, by call: what entered block 0, what reached the boundary, and a lower depth."""

    entered: dict[Slot, Tensor]
    boundary: dict[Slot, Tensor]
    lower: dict[Slot, Tensor]


class Server(Protocol):
    """Decides where training passes start, and evaluation passes without gradients (the prefix cache)."""

    def before_pass(self) -> None:
        """Any pass of the model begins, also one in evaluation."""

    def after_pass(self) -> None:
        """It has ended."""

    def look_up(self, call: Call) -> tuple[Starts, bool] | None:
        """Where the pass that begins with this call starts, and whether to call ``at_boundary`` in it.

        If not, compiled code need not trace it. None: the server has nothing to do with this pass.
        """

    def admits(self, slot: Slot, hidden: Tensor) -> bool:
        """Whether a call may start above its prefix, given what enters block 0."""

    def entered(self, slot: Slot, hidden: Tensor) -> None:
        """A call of such a pass runs its prefix on ``hidden``."""

    def at_boundary(self, slot: Slot, hidden: Tensor) -> None:
        """A call of such a pass reached its boundary."""

    def finished(self, output: Any, calls: Mapping[str, int]) -> None:
        """Such a pass returned ``output`` (None: it failed) and called each stack this often."""

    def bypassed(self) -> None:
        """Training passes begin inside the model, where nothing can be looked up."""


class Weights(Protocol):
    """Brings weights of the prefix that left the device."""

    def at_hand(self, block: nn.Module) -> AbstractContextManager[None]:
        """A context in which the weights of ``block`` are on the device."""


@dataclass
class _Pass:
    """One forward pass of the model.

    Attributes:
        starts: where its calls start. A call that must run its prefix is removed.
        recorded: what a nested pass has computed; None in the host's passes.
        until: leave the nested pass once these boundaries are recorded; None: run to the end.
        shadow: skipped blocks except the last return NaN, so that reading their outputs changes the result.
        watched: the server wants to see the boundaries.
        calls: of each stack, so far.
        runs: of each dropout outside the blocks, so far, and how many of them were before block 0.
        beside: what blocks return beside hidden states in the current call (T5's position bias), by stack.
        evaluates: it is the host's, in evaluation mode and without gradients, and the server is asked.
        to_blocks: leave a nested pass where the first block of a prefix is entered.
        lower: depths below the boundary, by stack, at which a nested pass records hidden states, too.
    """

    starts: dict[Slot, Start] = field(default_factory=dict)
    recorded: Computed | None = None
    until: frozenset[Slot] | None = None
    shadow: bool = False
    watched: bool = False
    calls: dict[str, int] = field(default_factory=dict)
    runs: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)
    beside: dict[str, tuple[Any, ...] | None] = field(default_factory=dict)
    evaluates: bool = False
    to_blocks: bool = False
    lower: Mapping[str, int] = field(default_factory=dict)

    def slot(self, path: str) -> Slot:
        return path, self.calls.get(path, 1) - 1

    @property
    def is_complete(self) -> bool:
        return self.recorded is not None and self.until is not None and self.until <= self.recorded.boundary.keys()


class Prefix:
    """Runs the prefix of each stack under ``torch.no_grad()`` and without dropout.

    The prefix of a stack is its longest run of blocks from the bottom without a live parameter, provided nothing
    upstream is live (trainable embeddings; an encoder that a decoder attends to). Without dropout, which there
    regularizes nothing that trains, its output for a sample is constant.

    What is upstream is traced once, and checked in every training pass: if a tensor that enters the prefix requires
    grad and was computed from anything but frozen embeddings (a projector outside the model, adversarial noise), the
    prefix of that stack ends before the graph is cut.

    No graph is built below the boundary even if hooks make the embeddings require grad. Evaluation without gradients
    may start above the prefix; other passes in evaluation mode, generation and training passes without gradients run
    the model's own code.

    Args:
        model: the module that the host calls; its ``training`` flag decides.
        stacks: in data-flow order.
        flows: what is upstream of each stack.
        keep_dropout: do not disable dropout in the prefix.
        by_mode: blocks that compute something else in evaluation mode: only their dropouts are put into it.

    Attributes:
        server: asked before each training pass where to start.
        weights: asked before a block of the prefix runs; None while they are all on the device.
        ended: stacks whose prefix ended because something that trains enters it.
        on_end: called with the path when that happens.
        on_change: called with the paths whose prefix got shorter because a parameter in it became trainable.
        modules: all of the model, as of the last change of the prefix (walking the tree takes time).
        drops_layers: the model skips blocks at random in training.
        sees_entries: a training pass showed what enters block 0. Compiled graphs do not.
        autocast: dtype of autocast, or None, in the last training pass; "unknown" before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        stacks: list[Stack],
        flows: Mapping[str, Flow],
        *,
        keep_dropout: bool = False,
        by_mode: Collection[nn.Module] = (),
    ) -> None:
        self.model = model
        self.by_mode = by_mode
        self.stacks = stacks
        self.flows = flows
        self.keep_dropout = keep_dropout
        self.depths: dict[str, int] = {stack.path: 0 for stack in stacks}
        self.server: Server | None = None
        self.weights: Weights | None = None
        self.ended: set[str] = set()
        self.on_end: Callable[[str], None] | None = None
        self.on_change: Callable[[list[str]], None] | None = None
        self.autocast: torch.dtype | str | None = "unknown"
        self.sees_entries = False
        self.drops_layers = any(
            getattr(m.__dict__.get("config"), name, None) for m in model.modules() for name in LAYER_DROP
        )
        self.modules = list(model.modules())
        self._undo = ExitStack()
        self._hooks: list[Hook] = []
        self._embedding_hooks: list[Hook] = []
        self._pass = _Pass()
        self._root: nn.Module | None = None  # the module whose call began the pass
        self._bypassed = 0
        self._patterns: dict[nn.Module, tuple[int, int]] = {}
        self._parameters: list[dict[str, nn.Parameter | None]] = []
        self._harmless: list[Tensor] = []  # require grad although nothing that trains is behind them
        self._beside: dict[str, tuple[Any, ...] | bool | None] = {}

    def update(self) -> dict[str, int]:
        """Match the prefix to the parameters' flags. Returns its depth by stack path."""
        depths = {stack.path: self._depth(stack) for stack in self.stacks}
        if depths != self.depths:
            self._undo.close()
            self._embedding_hooks = []
            self.modules = list(self.model.modules())
            self.depths = depths
            if any(depths.values()):
                self._install()
            self._parameters = [module._parameters for block in self.blocks for module in block.modules()]
        return depths

    def restore(self) -> None:
        """Leave every module, hook and flag as it was before."""
        self._undo.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._parameters, self._embedding_hooks, self.modules = [], [], [], []
        self.depths = {stack.path: 0 for stack in self.stacks}

    def runs_first(self, path: str) -> bool:
        """Whether block 0 of this stack is known to run in each pass: others use what it returns beside its output."""
        return self._beside.get(path) is True

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks of all prefixes."""
        return [block for stack in self.stacks for block in stack.blocks[: self.depths[stack.path]]]

    def _depth(self, stack: Stack) -> int:
        if stack.path in self.ended or self.flows[stack.path].live:
            return 0
        live = (any(parameter.requires_grad for parameter in block.parameters()) for block in stack.blocks)
        return next((index for index, trains in enumerate(live) if trains), len(stack))

    def _install(self) -> None:
        enter = self._undo.enter_context
        if not self._hooks:
            # These stay when the prefix changes: it may change from a hook of the same pass, after torch has listed
            # the hooks to call.
            # PEFT's wrapper and the model inside, which a loss function may call instead.
            for module in dict.fromkeys((self.model, base_model(self.model))):
                self._hooks += [forward_pre_hook(module, self._begin), forward_hook(module, self._end, always=True)]
        for stack in self.stacks:
            depth = self.depths[stack.path]
            for index, block in enumerate(stack.blocks[:depth]):
                if not self.keep_dropout:
                    enter(_KeptInEvaluation(block, self.model, by_mode=block in self.by_mode))
                enter(held_attribute(block, "gradient_checkpointing", False))
                enter(patched_forward(block, self._graphless(stack, index, block)))
            if depth and not self.keep_dropout:
                for dropout in self.flows[stack.path].dropouts:
                    enter(patched_forward(dropout, self._off_before_blocks(stack, dropout)))
        for module in self.modules:
            # wav2vec2's feature encoder makes its input require grad for checkpointing, although nothing trains there.
            if not any(parameter.requires_grad for parameter in module.parameters()):
                enter(held_attribute(module, "_requires_grad", False))
        for embeddings in _input_embeddings(self.model, self.stacks):
            hook = forward_hook(embeddings, self._after_embeddings)
            self._undo.callback(hook.remove)
            self._embedding_hooks.append(hook)

    # Passes nested in a training pass.

    def compute(
        self,
        call: Call,
        inputs: Mapping[str, Any],
        starts: Starts,
        until: Collection[Slot],
        lower: Mapping[str, int] | None = None,
    ) -> Computed | None:
        """Run the model on ``inputs`` as in training, without a graph, up to the boundaries of the calls ``until``.

        Args:
            call: how the model is called.
            inputs: of the pass.
            starts: where its calls start.
            until: the calls whose boundaries end the pass.
            lower: smaller depths by stack, at which hidden states are returned, too.

        Returns:
            None if the pass ended without reaching them all.
        """
        this = _Pass(dict(starts), Computed({}, {}, {}), frozenset(until), lower=lower or {})
        with self._nested(this), torch.no_grad(), suppress(StopForward):
            self._run(call, inputs)
        return this.recorded if this.is_complete else None

    def read_before_blocks(self, call: Call, inputs: Mapping[str, Any]) -> set[int] | None:
        """The ids of all tensors that a pass reads before it enters the first block of a prefix.

        Returns:
            None if several stacks have a prefix, since what lies between them is read, too; or if none was entered.
        """
        if sum(depth > 0 for depth in self.depths.values()) != 1:
            return None
        this = _Pass(recorded=Computed({}, {}, {}), to_blocks=True)
        with self._nested(this), torch.no_grad(), suppress(StopForward), _Reads() as reads:
            self._run(call, inputs)
        return reads.ids if this.recorded is not None and this.recorded.entered else None

    def shadow(self, call: Call, inputs: Mapping[str, Any], starts: Starts) -> Any:
        """What the host's pass from ``starts`` would return, computed without a graph."""
        with self._nested(_Pass(dict(starts), Computed({}, {}, {}), shadow=True)), torch.no_grad():
            return self._run(call, inputs)

    def rehearse(self, *args: Any, **inputs: Any) -> Any:
        """Run the model's forward pass as in training, with the prefix, invisible to server and user hooks."""
        weights, self.weights = self.weights, None  # fake ones have no data to bring
        try:
            with self._nested(_Pass()):
                return self.model.forward(*args, **inputs)
        finally:
            self.weights = weights

    def _run(self, call: Call, inputs: Mapping[str, Any]) -> Any:
        # Copies, because a model may write into its inputs, as Whisper does to mask them.
        copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        args, kwargs = call.arguments(copies)
        return call.module.forward(*args, **kwargs)  # its hooks are for the outer pass

    @contextmanager
    def _nested(self, this: _Pass) -> Iterator[None]:
        outer, root, autocast = self._pass, self._root, self.autocast
        self._pass, self._root = this, self.model
        # Within a user's autocast, torch 2.6 hands casts that were made without a graph to later passes. A rehearsal is
        # counted with the casts that a step keeps.
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(caches and this.recorded is None)
        try:
            # No compiler will see this pass again, and user hooks should not count it.
            with torch.compiler.set_stance("force_eager"), without_users_hooks(self.modules):
                yield
        finally:
            torch.set_autocast_cache_enabled(caches)
            self._pass, self._root = outer, root
            if this.recorded is None:
                self.autocast = autocast

    # One pass of the model.

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._root is not None:  # PEFT's wrapper calls the model inside
            return
        self._root, self._pass = module, _Pass()
        evaluates = not (self.model.training or torch.is_grad_enabled() or self.server is None or is_quiet())
        self._pass.evaluates = evaluates and any(self.depths.values())
        self._harmless.clear()
        if self._active():
            self._notice_unfrozen()
            for hook in self._embedding_hooks:
                hook.go_last()
        if (server := self.server) is None:
            return
        server.before_pass()
        # Do not skip what is trained through an input; the blocks will notice whether it reaches them.
        trains = any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))
        self._pass.evaluates = self._pass.evaluates and not trains
        if self._active() and not trains:
            looked_up = server.look_up(Call.of(module, args, kwargs))
            self._pass.evaluates = self._pass.evaluates and looked_up is not None
            starts, self._pass.watched = looked_up or ({}, False)
            self._pass.starts = dict(starts)

    def _notice_unfrozen(self) -> None:
        """A parameter of the prefix that was made trainable (gradual unfreezing) gets its gradient."""
        if any(p is not None and p.requires_grad for own in self._parameters for p in own.values()):
            before = self.depths
            shorter = [path for path, depth in self.update().items() if depth < before[path]]
            if shorter and self.on_change is not None:
                self.on_change(shorter)

    @torch.compiler.disable
    def _end(self, module: nn.Module, _args: Any, output: Any = None) -> Any:
        if self._root is not module:
            return None
        this, self._pass, self._root = self._pass, _Pass(), None
        if output is not None and self._active():
            self._learn_patterns(this)
        self._harmless.clear()
        if (server := self.server) is not None:
            if self._active() or this.evaluates:
                server.finished(output, this.calls)
            server.after_pass()
        if this.evaluates and this.starts and isinstance(output, dict) and output.get("past_key_values") is not None:
            output["past_key_values"] = NoKeys()
        return None

    def _active(self) -> bool:
        if self._pass.evaluates or self._pass.recorded is not None:
            return True
        return self.model.training and torch.is_grad_enabled()

    def _graphless(self, stack: Stack, index: int, block: nn.Module) -> Callable[..., Any]:
        own = block.forward
        path, depth = stack.path, self.depths[stack.path]
        at_boundary = index + 1 == depth
        above = stack.blocks[depth] if depth < len(stack) else None

        def original(*args: Any, **kwargs: Any) -> Any:
            if self.weights is None:
                return own(*args, **kwargs)
            return self._with_weights(self.weights, block, own, args, kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            this = self._pass
            if index == 0 and (self.model.training or self._active()):
                this.calls[path] = this.calls.get(path, 0) + 1
            if not self._active():
                return original(*args, **kwargs)
            if index == 0:
                self._notice_autocast(block)
                self._notice_bypass()
            if this.recorded is None and not this.evaluates and self._something_trains(args, kwargs):
                self._end_prefix(path)
                return original(*args, **kwargs)
            slot = this.slot(path)
            if index == 0 and not torch.compiler.is_compiling():
                self._enter(slot, args, kwargs)
            start = this.starts.get(slot)
            if start is not None or not this.evaluates:
                # An empty key-value cache would keep keys and values until the end of the pass. In evaluation the user
                # may continue from them, so a pass that runs the prefix leaves it alone.
                args, kwargs = without_cache(args, kwargs, filled=False)
            with torch.no_grad():
                if start is not None and index < start.depth:
                    output = self._skipped(path, index, start, lambda: original(*args, **kwargs))
                else:
                    output = original(*args, **kwargs)
                    if index == 0:
                        self._beside[path] = _beside(output)
            if this.lower.get(path) == index + 1 and this.recorded is not None:
                this.recorded.lower[slot] = hidden_states(output)
            if at_boundary:
                hidden = hidden_states(output)
                if this.recorded is not None:
                    this.recorded.boundary[slot] = hidden
                    if this.is_complete:
                        raise StopForward
                    return output
                if above is not None and getattr(above, "gradient_checkpointing", False) and not this.evaluates:
                    # Reentrant checkpointing gives no gradient to parameters unless an input requires one.
                    self.mark(hidden)
                if this.watched and self.server is not None:
                    self.server.at_boundary(slot, hidden)
            if self.drops_layers and this.recorded is None and not this.evaluates:
                # If a pass skips all live blocks, its loss must still have a graph.
                self.mark(hidden_states(output))
            return output

        return forward

    @staticmethod
    @torch.compiler.disable
    def _with_weights(
        weights: Weights, block: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with weights.at_hand(block):
            return run(*args, **kwargs)

    def _enter(self, slot: Slot, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Report what enters block 0, and remove the start of a call that must run its prefix."""
        this, server = self._pass, self.server
        hidden = next(tensors_in((args, kwargs)), None)
        if hidden is None:
            return
        hidden = hidden.detach()
        starts_above = slot in this.starts
        if this.recorded is not None:
            this.recorded.entered[slot] = hidden
            if this.to_blocks:
                raise StopForward
            if starts_above and captures_outputs():  # skipped blocks do not have the outputs to record
                del this.starts[slot]
            return
        self.sees_entries = True
        if starts_above and (server is None or not server.admits(slot, hidden)):
            this.starts.pop(slot, None)
        elif not starts_above and server is not None:
            server.entered(slot, hidden)

    def mark(self, hidden: Tensor) -> Tensor:
        """Make ``hidden``, an output of the prefix, require grad although nothing that trains is behind it."""
        self._harmless.append(hidden)
        return hidden.requires_grad_()

    def _something_trains(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether anything that trains needs the gradient of a block's inputs."""
        # Compiled code contains only this line, so that the graph does not break in every block.
        wanted = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
        return bool(wanted) and self._trains(wanted)

    @torch.compiler.disable
    def _trains(self, wanted: list[Tensor]) -> bool:
        harmless = {id(tensor) for tensor in self._harmless}
        return any(id(leaf) not in harmless for leaf in graph_leaves(wanted))

    def _end_prefix(self, path: str) -> None:
        self.ended.add(path)
        self.update()
        if self.on_end is not None:
            self.on_end(path)

    def _skipped(self, path: str, index: int, start: Start, run: Callable[[], Any]) -> Any:
        """What a skipped block returns: the known hidden states, and what block 0 returns beside them."""
        if index == 0:
            beside = self._beside.get(path, True)
            # Tensors that block 0 makes for all others (T5's position bias) depend on the batch's shape, so it runs.
            self._pass.beside[path] = _after_first(run()) if isinstance(beside, bool) else beside
        beside, states = self._pass.beside[path], start.states
        if self._pass.shadow and index < start.depth - 1 and states.is_floating_point():
            states = torch.full_like(states, float("nan"))
        return states if beside is None else (states, *beside)

    def _notice_bypass(self) -> None:
        if self._root is None and self.server is not None:
            self._bypassed += 1
            if self._bypassed == BYPASSES:
                self.server.bypassed()

    def _notice_autocast(self, block: nn.Module) -> None:
        autocast = autocast_now(device_of(block))
        if autocast != self.autocast:
            self.autocast = autocast
            if self._pass.recorded is None:
                self._pass.starts = {}  # computed under another autocast

    # Dropout below the blocks.

    def _off_before_blocks(self, stack: Stack, dropout: nn.Module) -> Callable[..., Any]:
        """``dropout``, disabled where it runs before the blocks: T5 uses one module before and after them.

        If the stack is called several times in a pass, the first pass shows which runs of a call are before the blocks.
        """
        original, path = dropout.forward, stack.path

        def forward(x: Tensor) -> Tensor:
            # Also without a graph: gradient caching runs each pass of a step twice and needs equal results.
            if not self.model.training:
                return original(x)
            if torch.compiler.is_compiling():  # counters have no place in a graph
                return original(x) if path in self._pass.calls else x
            runs, before = self._pass.runs.get(dropout, (0, 0))
            entered = path in self._pass.calls
            self._pass.runs[dropout] = runs + 1, before + (not entered)
            pattern = self._patterns.get(dropout)
            is_before = not entered if pattern is None else runs % pattern[0] < pattern[1]
            return x if is_before else original(x)

        return forward

    def _learn_patterns(self, this: _Pass) -> None:
        """How often each dropout ran per call of its stack, and how many of these runs were before the blocks."""
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
            return None  # they train by now, or a user's hook needs the gradient
        if all(self.depths.values()):
            return output.detach()
        # While one stack starts from the embeddings, reentrant checkpointing may need their gradient.
        self._harmless.append(output)
        return None


class NoKeys:
    """In place of the key-value cache that an evaluation with labels returns, if its lower blocks did not run."""

    def _raise(self, *_: Any) -> Any:
        raise RunError(
            "This evaluation started above the frozen prefix, so its past_key_values have no keys and values of the "
            "lower blocks.",
            fix="Call the model with use_cache=True to continue from them.",
        )

    get_seq_length = get_mask_sizes = update = crop = reorder_cache = to_legacy_cache = _raise
    __getitem__ = __len__ = __iter__ = _raise
    layers = key_cache = value_cache = property(_raise)


class _Reads(TorchDispatchMode):
    """Collects the ids of all tensors that operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()
        self._kept: list[Tensor] = []  # or the id of a result could become that of a weight

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._kept += (read := list(tensors_in((args, kwargs or {}))))
        self.ids |= set(map(id, read))
        return func(*args, **(kwargs or {}))


def autocast_now(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on ``device`` here; None where it is off, or there is none (meta)."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def _after_first(output: Any) -> tuple[Any, ...] | None:
    return None if isinstance(output, Tensor) else tuple(output[1:])


def _beside(output: Any) -> tuple[Any, ...] | bool | None:
    """What a block returns beside its hidden states: None where it returns them alone; True if there are tensors."""
    rest = _after_first(output)
    return True if any(True for _ in tensors_in(rest)) else rest


class _KeptInEvaluation:
    """Keeps ``block`` in evaluation mode through ``model.train()``, which hosts call before each micro-step.

    This disables its dropout, also functions that read the flag. Norms with running statistics (BatchNorm) and
    quantized layers keep their mode, because they would compute something else. So do, with ``by_mode``, all modules
    but dropouts.
    """

    def __init__(self, block: nn.Module, model: nn.Module, *, by_mode: bool = False) -> None:
        self.block, self.model, self.by_mode = block, model, by_mode
        self._undo = ExitStack()

    def __enter__(self) -> None:
        self._was = self.model.training
        modules = list(self.block.modules())
        kept = [module for module in modules if self._keeps_mode(module)]
        self._flags = [(module, module.training) for module in modules if not self._keeps_mode(module)]
        for module, _ in self._flags:
            self._undo.enter_context(patched(module, "training", False, in_copies=lambda: self.model.training))

        def train(mode: bool = True) -> nn.Module:
            for module in kept:
                module.training = mode
            return self.block

        self._undo.enter_context(patched(self.block, "train", train))

    def _keeps_mode(self, module: nn.Module) -> bool:
        if self.by_mode:
            return not isinstance(module, _DropoutNd)
        return isinstance(module, _NormBase) or mode_does_more(module)

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        for module, flag in self._flags:
            module.training = flag if self.model.training == self._was else self.model.training


def _input_embeddings(model: nn.Module, stacks: Sequence[Stack]) -> list[nn.Module]:
    """Every module whose output a hook of transformers may make require grad: a T5 has one for each stack."""
    outside = {id(module) for module in modules_outside(model.modules(), stacks)}
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        embeddings = module if isinstance(module, nn.Embedding) else None
        if callable(get := getattr(type(module), "get_input_embeddings", None)):
            with suppress(AttributeError, NotImplementedError, KeyError):
                embeddings = get(module)
        if isinstance(embeddings, nn.Module) and id(embeddings) in outside:
            found[id(embeddings)] = embeddings
    return list(found.values())
