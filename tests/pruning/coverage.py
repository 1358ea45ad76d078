"""What is proved of every architecture: masked == shrunk, in every way to compute attention, and again after loading.

`examine` runs the proof and returns a row of docs/coverage.md; run as a script, this module writes that page.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import upop
from pruning.families import uneven_plan
from pruning.registry.architecture import Architecture, Inputs
from upop.pruning.groups import tensor_of
from upop.pruning.masks import Masks
from upop.pruning.verify import compare, outputs_of, rounding_of

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
HEAD = """# Architectures

Every architecture of this table is built at a tiny size with random weights, biases and norms. Random channels of all
its groups are masked, the layers are cut to what is left, and the outputs of both models are compared: in float64 with
fused and with unfused attention, and in float32 (only in float32 if the library does not compute in float64). They may
differ by rounding only, measured by repeating the sums in another order. Generative models are compared in generation
too, with and without a cache (all but BLIP, Florence-2 and XGLM). The cut model is then saved, loaded and compared
again. `make test-all` checks all architectures, `make test` some of each kind (`tests/pruning/test_coverage.py`);
`PYTHONPATH=tests python -m pruning.coverage` writes this page.

- *Dimensions* are pruned in all heads alike. Where rotary embeddings, norms or tables tie dimensions together, whole
  *heads* are pruned, or *groups*: the heads that share keys and values. *Neurons* are those of MLPs.
- The table lists the classes of modules that look prunable but are skipped; `upop.find_prunable(model)` says why.
- The same rules read architectures that are not listed: `upop.find_groups(model)` returns the groups, and
  `upop.shrink(model, plan, verify=inputs)` verifies the cut on your inputs.

"""
_DRAWS = 16
"""Plans that are tried, until the inputs run all groups."""
_CHANNELS = {"dimension": "dimensions", "head": "heads", "group": "groups", "neuron": "neurons"}


@dataclass(frozen=True)
class Examined:
    """The proof of one architecture.

    Attributes:
        groups: how many groups, per class of the module that holds them and kind of channel.
        skipped: classes that were left alone.
        idle: groups that the inputs did not run, so that nothing is proved about them.
    """

    groups: dict[tuple[str, str], int]
    skipped: tuple[str, ...]
    idle: tuple[str, ...]

    def row(self, architecture: Architecture) -> str:
        """Return the architecture's line of the page."""
        groups = ", ".join(f"{kind} {_CHANNELS[channel]} ({count})" for (kind, channel), count in self.groups.items())
        verified = "yes" if not self.idle else "no"
        skipped = ", ".join(self.skipped) or "-"
        return f"| {architecture.library} | {architecture.name} | {groups} | {skipped} | {verified} |"


def examine(architecture: Architecture) -> Examined:
    """Prove that what is cut of an architecture is what was masked.

    Raises:
        VerificationError: it is not.
        AssertionError: metadata does not fit the weights, or generated texts differ.
    """
    dtype = torch.float64 if architecture.exact else torch.float32
    model = architecture.build(dtype)
    inputs = architecture.batch(model, dtype)
    found = upop.find_prunable(model)
    groups = list(found.groups)
    with torch.random.fork_rng():
        for seed in range(1, 1 + _DRAWS):  # the few neurons that are kept may all be asleep
            plan = uneven_plan(groups, seed)
            masked, idle = _masked(architecture, model, inputs, plan)
            if not idle:
                break
        upop.shrink(model, plan)
        for (way, context), expected in zip(architecture.ways(model), masked, strict=True):
            with context:
                compare(expected, _run(model, inputs), partial(rounding_of, partial(_run, model, inputs)))
            assert way
        _check_metadata(model)
        assert [group.size for group in upop.find_groups(model)] == [len(plan[group.name]) for group in groups]
        _check_loading(architecture, model, inputs, dtype)
        if architecture.exact:
            single = architecture.build(torch.float32)
            upop.shrink(single, plan, verify=lambda whole: _run(whole, architecture.batch(whole, torch.float32)))
    kinds = Counter((_holder(model, group), group.channel) for group in groups)
    left = sorted({_around(model, tensor) for tensor in found.coverage.reasons})
    return Examined({(name, channel): count for (name, channel), count in kinds.items()}, tuple(left), idle)


def _holder(model: nn.Module, group: upop.Group) -> str:
    """Return the class of the module which holds the group, as its library calls it."""
    name = group.name.partition("[")[0]  # several groups of one module are numbered
    module = model.get_submodule(name)
    return _class(model.get_submodule(name.rpartition(".")[0]) if isinstance(module, nn.Linear) else module)


def _around(model: nn.Module, tensor: str) -> str:
    """Return the class of the module that holds a layer, as its library calls it."""
    layer = tensor.rpartition(".")[0]
    alone = not list(model.get_submodule(layer).children())
    return _class(model.get_submodule(layer.rpartition(".")[0] if alone else layer))


def _class(module: nn.Module) -> str:
    kind = type(module)
    return getattr(kind, "uncut_class", kind).__name__


def _run(model: nn.Module, inputs: Inputs) -> list[tuple[str, Tensor]]:
    torch.manual_seed(0)  # some architectures draw in evaluation mode too
    return outputs_of(model, inputs)


def _masked(
    architecture: Architecture, model: nn.Module, inputs: Inputs, plan: dict[str, list[int]]
) -> tuple[list[list[tuple[str, Tensor]]], tuple[str, ...]]:
    """Return the outputs of the masked model in every way, and the groups that had no part in them."""
    groups = upop.find_groups(model)
    masks = Masks(model, groups)
    try:
        values = {group.name: torch.zeros(group.size) for group in groups}
        for name, value in values.items():
            value[plan[name]] = 1
        masks.set(values)
        outputs = []
        for _, context in architecture.ways(model):
            with context:
                outputs.append(_run(model, inputs))
        model.zero_grad()
        torch.manual_seed(0)
        gradient = _total(model(**inputs))
        gradient.backward()
        idle = tuple(group.name for group in groups if not _has_gradient(model, group))
        model.zero_grad()
        return outputs, idle
    finally:
        masks.remove()


def _total(outputs: Any) -> Tensor:
    """Return a number that depends on every output, and on each of its channels differently."""
    parts = []
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point() and outputs.requires_grad:
            flat = outputs.flatten()
            parts.append((flat * torch.linspace(-1, 1, len(flat), dtype=flat.dtype)).sum() + flat.square().sum())
    elif isinstance(outputs, dict):
        parts += [_total(part) for part in outputs.values()]
    elif isinstance(outputs, tuple | list):
        parts += [_total(part) for part in outputs]
    elif hasattr(outputs, "__dict__"):
        parts += [_total(part) for part in vars(outputs).values()]
    return torch.stack([part.double() for part in parts]).sum() if parts else torch.zeros(())


def _has_gradient(model: nn.Module, group: upop.Group) -> bool:
    gradients = [tensor_of(model, part.tensor).grad for part in group.producers]
    return any(gradient is not None and bool((gradient != 0).any()) for gradient in gradients)


def _check_metadata(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape), name
        elif isinstance(layer, nn.Conv2d):
            assert (layer.out_channels, layer.in_channels // layer.groups) == tuple(layer.weight.shape[:2]), name


def _check_loading(architecture: Architecture, model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> None:
    expected = _run(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        upop.save(model, Path(folder) / "saved")
        loaded = upop.load(Path(folder) / "saved", architecture.build(dtype))
    compare(expected, _run(loaded, inputs), partial(rounding_of, partial(_run, loaded, inputs)))
    if architecture.generates:
        texts = [_generated(each, inputs, cached) for each in (model, loaded) for cached in (True, False)]
        assert all(torch.equal(text, texts[0]) for text in texts)


def _generated(model: Any, inputs: Inputs, cached: bool) -> Tensor:
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder_") and name != "labels"}
    result = model.generate(
        **given, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cached, pad_token_id=0
    )
    assert isinstance(result, Tensor)
    return result


def page(rows: list[str]) -> str:
    """Return the whole page."""
    yes = sum(row.endswith("| yes |") for row in rows)
    table = [
        "| library | architecture | groups: what is pruned (how many) | skipped | verified |",
        "| --- | --- | --- | --- | --- |",
    ]
    return f"{HEAD}{yes} architectures are verified.\n\n" + "\n".join([*table, *rows]) + "\n"


def main() -> None:
    """Examine every architecture and write the page."""
    from pruning.registry import ARCHITECTURES

    torch.set_num_threads(1)
    rows = [examine(architecture).row(architecture) for architecture in ARCHITECTURES]
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
