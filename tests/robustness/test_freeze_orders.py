"""Freezes, training and interference in any order: what is frozen stays, and the prefix is what its definition says."""

import copy
import warnings
from functools import cache

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import cases
from adafreeze import AdafreezeWarning, Safe, SafeConfig

BLOCKS = 3
KINDS = [("llama", "block"), ("llama", "site"), ("t5", "block"), ("bert", "block")]
picks = st.integers(0, 99)


@cache
def fresh(family):
    return cases.lora_model(family, blocks=BLOCKS, lora_dropout=0.1)


def flags(model):
    """What of ``model`` a freeze may change, by name."""
    return {
        name: (
            type(module),
            module.training,
            "forward" in vars(module),
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks),
            sorted(vars(module)),
            [p.requires_grad for p in module._parameters.values() if p is not None],
        )
        for name, module in model.named_modules()
    }


class FreezeOrders(RuleBasedStateMachine):
    """A model that trains, and whatever its user and adafreeze may do to it between and within steps."""

    @initialize(kind=st.sampled_from(KINDS), cached=st.booleans())
    def begin(self, kind, cached):
        self.family, self.granularity = kind
        self.cached = cached
        self.model = copy.deepcopy(fresh(self.family))
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-2, weight_decay=0.1)
        self.batch = cases.batch(self.family, rows=2)
        self.untouched = flags(self.model)
        self.open()

    def open(self, state=None):
        cache = "ram" if self.cached else "off"
        config = SafeConfig(granularity=self.granularity, cache=cache, freeze_at_start=0)
        self.safe = Safe(
            self.model,
            config,
            optimizer=self.optimizer,
            probe=[self.batch],
            total_steps=1000,
            samples_per_epoch=2,
            samples_per_step=2,
        )
        self.frozen, self.values = frozenset(), {}
        if state is not None:
            self.safe.load_state_dict(state)
            self.note_frozen()

    def note_frozen(self):
        self.frozen = self.safe.frozen
        for parameter in self.safe.freezer.parameters():
            self.values.setdefault(parameter, parameter.detach().clone())

    # What adafreeze does.

    @rule(chosen=st.sets(picks, min_size=1, max_size=3))
    def freeze(self, chosen):
        live = [name for name in self.safe.units if name not in self.frozen]
        names = {live[pick % len(live)] for pick in chosen} if live else set()
        if len(names) < len(live):  # the last live unit never freezes: policies see to that
            self.safe.freeze(sorted(names))
            self.note_frozen()

    @rule()
    def look_for_the_prefix_again(self):
        depths = dict(self.safe.prefix.depths)
        if not self.loose():
            assert self.safe.prefix.update() == depths

    @rule()
    def resume(self):
        state = self.safe.state_dict()
        self.safe.close()
        self.open(state)
        assert self.safe.frozen == frozenset(state["frozen"])

    @rule()
    def close(self):
        self.safe.close()
        self.model.train()
        assert flags(self.model) == self.untouched
        self.open()

    # What a user does.

    @rule(within=st.sampled_from(["", "", "thaw", "gradient"]), pick=picks)
    def train(self, within, pick):
        self.model.train()
        self.model(**self.batch).loss.backward()
        frozen = list(self.safe.freezer.parameters())
        if within and frozen:
            parameter = frozen[pick % len(frozen)]
            parameter.requires_grad_(within == "thaw")
            parameter.grad = torch.ones_like(parameter)
        before = [p.detach().clone() for p in self.trainable]
        with_gradient = [p.grad is not None for p in self.trainable]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        held = {id(p) for p in self.safe.freezer.parameters()}
        for parameter, old, had in zip(self.trainable, before, with_gradient, strict=True):
            if id(parameter) in held:
                assert not parameter.requires_grad and parameter.grad is None
                assert parameter not in self.optimizer.state
                assert torch.equal(parameter, self.values[parameter])
            else:
                assert had and not torch.equal(parameter, old), "what is live learns"
        assert self.safe.prefixes == self.prefixes_by_definition()

    @rule()
    def train_without_a_step(self):
        self.model.train()
        self.model(**self.batch).loss.backward()

    @rule()
    def evaluate(self):
        self.model.eval()
        with torch.no_grad():
            self.model(**self.batch)

    @rule(pick=picks)
    def make_one_parameter_trainable(self, pick):
        frozen = list(self.safe.freezer.parameters())
        if frozen:
            frozen[pick % len(frozen)].requires_grad_(True)

    @rule(pick=picks)
    def make_one_block_trainable(self, pick):
        stack = self.safe.stacks[pick % len(self.safe.stacks)]
        for name, parameter in stack.blocks[pick % BLOCKS].named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)

    @rule()
    def switch_adapters(self):
        self.model.set_adapter("default")
        self.model.base_model.disable_adapter_layers()
        self.model.base_model.enable_adapter_layers()

    @rule()
    def look_at_the_model_without_adapters(self):
        with self.model.disable_adapter(), torch.no_grad():
            self.model(**self.batch)

    # What always holds.

    def loose(self):
        return any(p.requires_grad for p in self.safe.freezer.parameters())

    def prefixes_by_definition(self):
        """The longest run of blocks from the bottom whose units are all frozen, below which nothing is live."""
        depths, live_below = {}, False
        for stack in self.safe.stacks:
            here = [unit for unit in self.safe.units.values() if unit.stack == stack.path]
            live = {unit.block for unit in here if unit.name not in self.frozen}
            depths[stack.path] = 0 if live_below else min(live, default=BLOCKS)
            live_below = bool(live)  # T5's decoder reads its encoder
        return depths

    @invariant()
    def the_frozen_set_is_what_was_frozen(self):
        assert self.safe.frozen == self.frozen

    @invariant()
    def frozen_values_do_not_move(self):
        assert all(torch.equal(parameter, value) for parameter, value in self.values.items())

    def teardown(self):
        if hasattr(self, "safe"):
            self.safe.close()


class Quiet(FreezeOrders):
    """Without the warnings: there is one for each kind of interference."""

    def __init__(self):
        super().__init__()
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.simplefilter("ignore", AdafreezeWarning)

    def teardown(self):
        super().teardown()
        self._catch.__exit__(None, None, None)


TestFreezeOrders = Quiet.TestCase
TestFreezeOrders.settings = settings(
    max_examples=10, stateful_step_count=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
