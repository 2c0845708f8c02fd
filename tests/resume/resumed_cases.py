"""Runs in a plain loop that stop at a step and go on in another Safe, as a resumed process has it."""

from __future__ import annotations

import copy
import json

import torch

import cases
from adafreeze import Safe, SafeConfig

COUNT, ROWS = 32, 4  # samples, and those of a step: eight steps an epoch


def loader(count=COUNT):
    return torch.utils.data.DataLoader(cases.Samples("llama", count, length=12), ROWS, collate_fn=cases.collate)


def pieces(blocks=6):
    model = cases.lora_model("llama", blocks)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def train(model, optimizer, safe, until, rows=ROWS):
    """Losses from the step reached to ``until``."""
    data, losses = cases.Samples("llama", COUNT, length=12), []
    for step in range(safe.steps, until):
        batch = cases.collate([data[(step * rows + row) % COUNT] for row in range(rows)])
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        safe.step()
        losses.append(float(loss.detach()))
    return losses


def begun(steps, total_steps, config=None, **more):
    """Model, optimizer and Safe of a run that has come to ``steps``."""
    model, optimizer = pieces()
    safe = Safe(model, config, optimizer=optimizer, probe=loader(), total_steps=total_steps, **more)
    train(model, optimizer, safe, steps)
    return model, optimizer, safe


def resumed(run, total_steps, config=None, **more):
    """The same in a new process: model and optimizer have their state before there is a Safe."""
    model, optimizer, safe = run
    state = json.loads(json.dumps(safe.state_dict()))
    again, its_optimizer = pieces()
    again.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which it would share
    its = Safe(again, config, optimizer=its_optimizer, probe=loader(), total_steps=total_steps, **more)
    its.load_state_dict(state)
    return again, its_optimizer, its


def trained_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def measured(safe, after=0):
    return [e["step"] for e in safe.journal.events if e["event"] == "measure" and e["step"] > after]


def given(**settings):
    """Settings under which nothing is frozen before step 0."""
    return SafeConfig(**{"freeze_at_start": 0.0, "cache": "off", **settings})
