"""What may be wrong with checkpoints: rows that change a valid file, state dict or description."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
RUN = "ran.txt"
"""What a hostile pickle would write into the working directory."""


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {RUN}",)


class _HostileBuild:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({RUN!r}, 'w').close()",)


def saved(content: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _zip(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


FILES: dict[str, Callable[[State], bytes]] = {
    "empty": lambda _s: b"",
    "text": lambda _s: b"weights\n",
    "a page of a server": lambda _s: b"<!DOCTYPE html><html>404</html>",
    "a pointer of git-lfs": lambda _s: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "zeros": lambda _s: bytes(4096),
    "JSON": lambda _s: b'{"model": {}}',
    "the first tenth": lambda s: saved({"model": s})[: len(saved({"model": s})) // 10],
    "half": lambda s: saved({"model": s})[: len(saved({"model": s})) // 2],
    "all but the last bytes": lambda s: saved({"model": s})[:-10],
    "half of the old format": lambda s: (lambda whole: whole[: len(whole) // 2])(
        saved({"model": s}, _use_new_zipfile_serialization=False)
    ),
    "a ZIP of nothing": lambda _s: _zip({}),
    "a ZIP of texts": lambda _s: _zip({"a.txt": b"a"}),
    "a ZIP with a broken pickle": lambda _s: _zip({"archive/data.pkl": b"\x80\x02X", "archive/version": b"3"}),
    "a ZIP without its tensors": lambda s: _zip(
        {"archive/data.pkl": zipfile.ZipFile(io.BytesIO(saved({"model": s}))).read("archive/data.pkl")}
    ),
    "a pickle that runs a command": lambda _s: pickle.dumps({"model": _Hostile()}),
    "a pickle that runs code": lambda _s: pickle.dumps(_HostileBuild(), protocol=0),
    "a checkpoint that runs a command": lambda s: saved({"model": s, "args": _Hostile()}),
    "a checkpoint that runs code": lambda s: saved({**s, "head": _HostileBuild()}),
    "a checkpoint of the old format that runs a command": lambda s: saved(
        {"model": s, "args": _Hostile()}, _use_new_zipfile_serialization=False
    ),
    "a whole module": lambda _s: saved(torch.nn.Linear(2, 2)),
    "a path": lambda s: saved({"model": s, "args": Path("x")}),
    "nothing": lambda _s: saved(None),
    "a number": lambda _s: saved(5),
    "a list": lambda s: saved(list(s.values())),
    "a tensor": lambda s: saved(next(iter(s.values()))),
    "an empty mapping": lambda _s: saved({}),
    "model is nothing": lambda _s: saved({"model": None}),
    "model is empty": lambda _s: saved({"model": {}}),
    "model is a list": lambda s: saved({"model": list(s.items())}),
    "model is a text": lambda _s: saved({"model": "model.pth"}),
    "numbers beside tensors": lambda s: saved({"model": {**s, "epoch": 5}}),
    "another name for the model": lambda s: saved({"weights": s, "epoch": 5}),
    "only an optimizer": lambda _s: saved({"optimizer": {"state": {}, "param_groups": []}}),
    "keys are numbers": lambda s: saved({"model": dict(enumerate(s.values()))}),
    "a safetensors file under its name": lambda s: safetensors(s),
}
"""Files `.pth` that hold no state dict."""


def _without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if name not in names}


def _with(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: {**state, name: change(state[name])}


_V = "visual_encoder."
QKV, QKV_BIAS, FC1 = f"{_V}blocks.0.attn.qkv.weight", f"{_V}blocks.0.attn.qkv.bias", f"{_V}blocks.1.mlp.fc1.weight"
_T = "text_encoder.encoder.layer.0."


def _spoiled(value: Tensor, number: float) -> Tensor:
    value = value.clone()
    value.view(-1)[value.numel() // 2] = number
    return value


STATES: dict[str, Callable[[State], State]] = {
    "a weight is missing": lambda s: _without(s, FC1),
    "a bias is missing": lambda s: _without(s, QKV_BIAS),
    "the patches are missing": lambda s: _without(s, f"{_V}patch_embed.proj.weight"),
    "the positions are missing": lambda s: _without(s, f"{_V}pos_embed"),
    "the words are missing": lambda s: _without(s, "text_encoder.embeddings.word_embeddings.weight"),
    "the head is missing": lambda s: _without(s, "cls_head.0.weight", "cls_head.0.bias"),
    "a layer is missing": lambda s: {name: value for name, value in s.items() if ".layer.0." not in name},
    "half of the tensors": lambda s: dict(list(s.items())[: len(s) // 2]),
    "a tensor too many": lambda s: {**s, f"{_V}blocks.0.attn.extra": torch.zeros(2)},
    "a layer too many": lambda s: {**s, f"{_V}blocks.2.mlp.fc1.weight": torch.zeros(2, 2)},
    "a layer far away": lambda s: {**s, f"{_V}blocks.99999999.mlp.fc1.weight": torch.zeros(2, 2)},
    "a name of another case": lambda s: {name.upper(): value for name, value in s.items()},
    "names of DistributedDataParallel": lambda s: {f"module.{name}": value for name, value in s.items()},
    "names of another model": lambda s: {f"encoder.{name}": value for name, value in s.items()},
    "a weight turned": _with(FC1, lambda v: v.t().contiguous()),
    "a weight with a side more": _with(FC1, lambda v: v[None]),
    "a weight with a side less": _with(FC1, lambda v: v[0]),
    "a weight that is a number": _with(FC1, lambda _v: torch.tensor(1.0)),
    "a weight without rows": _with(FC1, lambda v: v[:0]),
    "a weight with too many rows": _with(FC1, lambda v: torch.cat([v, v])),
    "a weight of other columns": _with(FC1, lambda v: v[:, :-1].contiguous()),
    "queries of one row less": _with(QKV, lambda v: v[:-1].contiguous()),
    "queries of heads of other sizes": _with(QKV, lambda v: v[:-3].contiguous()),
    "queries without rows": _with(QKV, lambda v: v[:0]),
    "queries that are a number": _with(QKV, lambda _v: torch.tensor(1.0)),
    "a bias of another size": _with(QKV_BIAS, lambda v: v[:-1].contiguous()),
    "an output of other columns": _with(f"{_T}output.dense.weight", lambda v: v[:, :-1].contiguous()),
    "patches without a side": _with(f"{_V}patch_embed.proj.weight", lambda v: v[0]),
    "patches that are a number": _with(f"{_V}patch_embed.proj.weight", lambda _v: torch.tensor(1.0)),
    "patches without rows": _with(f"{_V}patch_embed.proj.weight", lambda v: v[:0]),
    "patches of no pixels": _with(f"{_V}patch_embed.proj.weight", lambda v: v[..., :0]),
    "patches of one channel": _with(f"{_V}patch_embed.proj.weight", lambda v: v[:, :1]),
    "positions without a side": _with(f"{_V}pos_embed", lambda v: v[0]),
    "positions that are a number": _with(f"{_V}pos_embed", lambda _v: torch.tensor(1.0)),
    "no positions": _with(f"{_V}pos_embed", lambda v: v[:, :0]),
    "positions of no square": _with(f"{_V}pos_embed", lambda v: torch.cat([v, v[:, :1]], 1)),
    "positions of another width": _with(f"{_V}pos_embed", lambda v: v[..., :-1]),
    "words that are a number": _with("text_encoder.embeddings.word_embeddings.weight", lambda _v: torch.tensor(1.0)),
    "words without a width": _with("text_encoder.embeddings.word_embeddings.weight", lambda v: v[:, :0]),
    "no words": _with("text_encoder.embeddings.word_embeddings.weight", lambda v: v[:0]),
    "a weight that is NaN": _with(FC1, lambda v: _spoiled(v, float("nan"))),
    "a weight that is infinite": _with(FC1, lambda v: _spoiled(v, float("inf"))),
    "a bias that is minus infinite": _with(QKV_BIAS, lambda v: _spoiled(v, float("-inf"))),
    "only NaN": lambda s: {name: v * float("nan") if v.is_floating_point() else v for name, v in s.items()},
    "NaN in half precision": _with(FC1, lambda v: _spoiled(v.half(), float("nan"))),
    "a weight of bytes": _with(FC1, lambda v: v.to(torch.int8)),
    "a weight of truths": _with(FC1, lambda v: v > 0),
    "a weight of complex numbers": _with(FC1, lambda v: v.to(torch.complex64)),
    "a sparse weight": _with(FC1, lambda v: v.to_sparse()),
    "a weight without content": _with(FC1, lambda v: v.to("meta")),
}
"""State dicts of NLVR that are damaged, or of another model."""


def safetensors(state: State) -> bytes:
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in state.items()})


def _headed(header: bytes, rest: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + rest


def _entry(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return _headed(json.dumps({"a": entry}).encode(), bytes(8))


SAFETENSORS: dict[str, Callable[[State], bytes]] = {
    "empty": lambda _s: b"",
    "seven bytes": lambda _s: bytes(7),
    "half": lambda s: safetensors(s)[: len(safetensors(s)) // 2],
    "all but the last byte": lambda s: safetensors(s)[:-1],
    "bytes too many": lambda s: safetensors(s) + b"more",
    "only the header": lambda s: safetensors(s)[: 8 + struct.unpack("<Q", safetensors(s)[:8])[0]],
    "a .pth under its name": lambda s: saved({"model": s}),
    "a header of nothing": lambda _s: _headed(b""),
    "a header without end": lambda _s: _headed(b"{}", length=2**62),
    "a header longer than the file": lambda _s: _headed(b"{}", length=100),
    "a header of 200 MB": lambda _s: _headed(b"{}", length=200_000_000),
    "a header that is no JSON": lambda _s: _headed(b"{a: 1}"),
    "a header that is no text": lambda _s: _headed(b"\xff\xfe{}"),
    "a header that is a list": lambda _s: _headed(b"[]"),
    "a header that is null": lambda _s: _headed(b"null"),
    "a header without tensors": lambda _s: _headed(b"{}"),
    "an entry that is a number": lambda _s: _headed(b'{"a": 5}'),
    "an unknown type": lambda _s: _entry(dtype="F33"),
    "a type that is a number": lambda _s: _entry(dtype=32),
    "a shape below zero": lambda _s: _entry(shape=[-2]),
    "a shape too large": lambda _s: _entry(shape=[3]),
    "a shape without end": lambda _s: _entry(shape=[2**62, 2**62]),
    "a shape that is a text": lambda _s: _entry(shape="2"),
    "offsets beyond the end": lambda _s: _entry(data_offsets=[8, 16]),
    "offsets the wrong way": lambda _s: _entry(data_offsets=[8, 0]),
    "offsets below zero": lambda _s: _entry(data_offsets=[-8, 0]),
    "one offset": lambda _s: _entry(data_offsets=[0]),
    "no offsets": lambda _s: _headed(b'{"a": {"dtype": "F32", "shape": [2]}}', bytes(8)),
    "two tensors at one place": lambda _s: _headed(
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b' "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        bytes(8),
    ),
    "a hole between tensors": lambda _s: _headed(
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b' "b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}}',
        bytes(24),
    ),
    "metadata that is a number": lambda _s: _headed(b'{"__metadata__": 5}'),
    "a tensor of another model": lambda _s: _entry(),
}
"""Files `model.safetensors` of a folder that are damaged."""


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], Any]:
    def change(description: dict[str, Any]) -> Any:
        description = copy.deepcopy(description)
        found: Any = description
        for name in path[:-1]:
            found = found[name]
        found[path[-1]] = to
        return description

    return change


def _drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda description: {key: value for key, value in description.items() if key != name}


def _kept(change: Callable[[list[int], int], list[Any]]) -> Callable[[dict[str, Any]], Any]:
    """Change the kept entries of the plan's first group; the change is given them and the group's size."""

    def changed(description: dict[str, Any]) -> Any:
        description = copy.deepcopy(description)
        group = next(iter(description["plan"]["groups"].values()))
        group["kept"] = change(group["kept"], group["size"])
        return description

    return changed


def _group(**values: Any) -> Callable[[dict[str, Any]], Any]:
    def changed(description: dict[str, Any]) -> Any:
        description = copy.deepcopy(description)
        next(iter(description["plan"]["groups"].values())).update(values)
        return description

    return changed


DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda d: [d],
    "null": lambda _d: None,
    "a text": lambda _d: "upop",
    "empty": lambda _d: {},
    **{f"no {name}": _drop(name) for name in ("format", "model", "class", "config", "plan")},
    "a later format": _set("format", to=99),
    "format is a text": _set("format", to="1"),
    "format is null": _set("format", to=None),
    "format is a list": _set("format", to=[1]),
    "an unknown model": _set("model", to="blip-nlvrr"),
    "model is a number": _set("model", to=5),
    "model is a list": _set("model", to=["blip-nlvr"]),
    "model is an object": _set("model", to={}),
    "another model": _set("model", to="blip-caption"),
    "config is null": _set("config", to=None),
    "config is a list": _set("config", to=[]),
    "config is a text": _set("config", to="base"),
    "config has an unknown field": _set("config", "vision_widht", to=8),
    "a width that is a text": _set("config", "vision_width", to="wide"),
    "a width of zero": _set("config", "vision_width", to=0),
    "a width below zero": _set("config", "vision_width", to=-8),
    "a width that no head divides": _set("config", "vision_width", to=25),
    "another width": _set("config", "vision_width", to=32),
    "a width without end": _set("config", "vision_width", to=10**12),
    "another depth": _set("config", "vision_depth", to=3),
    "a depth without end": _set("config", "vision_depth", to=10**9),
    "a depth that is true": _set("config", "vision_depth", to=True),
    "other heads": _set("config", "vision_heads", to=1),
    "a smaller MLP than is kept": _set("config", "vision_mlp", to=2),
    "another vocabulary": _set("config", "vocab_size", to=9),
    "images of another size": _set("config", "image_size", to=64),
    "a dropout that is NaN": _set("config", "dropout", to=float("nan")),
    "plan is a list": _set("plan", to=[]),
    "plan is a text": _set("plan", to="half"),
    "plan is empty": _set("plan", to={}),
    "plan of a later version": _set("plan", "version", to=99),
    "groups are a list": _set("plan", "groups", to=[]),
    "groups are null": _set("plan", "groups", to=None),
    "settings are a list": _set("plan", "settings", to=[1]),
    "a group that is a list": _set("plan", "groups", to={"a": [1]}),
    "a group of another model": _set("plan", "groups", to={"encoder.mlp": {"size": 4, "kept": [0]}}),
    "a group without kept": _set("plan", "groups", to={"a": {"size": 4}}),
    "entries beyond the end": _kept(lambda kept, size: [*kept[:-1], size]),
    "entries far beyond the end": _kept(lambda kept, _size: [*kept[:-1], 10**20]),
    "entries below zero": _kept(lambda kept, _size: [-1, *kept[1:]]),
    "entries twice": _kept(lambda kept, _size: [kept[0], *kept[:-1]]),
    "entries out of order": _kept(lambda kept, _size: kept[::-1]),
    "no entries": _kept(lambda _kept, _size: []),
    "an entry less than the weights": _kept(lambda kept, _size: kept[:-1]),
    "entries are texts": _kept(lambda kept, _size: [str(entry) for entry in kept]),
    "entries are no whole numbers": _kept(lambda kept, _size: [entry + 0.5 for entry in kept]),
    "entries are truths": _kept(lambda _kept, _size: [False, True]),
    "entries are null": _group(kept=None),
    "a size of zero": _group(size=0),
    "another size": _group(size=1000),
    "a size that is a text": _group(size="many"),
    "a size that is infinite": _group(size=float("inf")),
    "transformers, which it is not": _set("transformers", to=True),
    "timm's, which it is not": lambda d: {**d, "model": None, "timm": {"architecture": "vit_tiny_patch16_224"}},
    "timm is a list": lambda d: {**d, "model": None, "timm": [1]},
    "timm is a text": lambda d: {**d, "model": None, "timm": "deit"},
    "timm has an unknown name": lambda d: {**d, "model": None, "timm": {"architecture": "deit_smal", "arguments": {}}},
    "open_clip is a text": lambda d: {**d, "model": None, "open_clip": "ViT-B-32"},
    "no model, and nobody's": lambda d: {**d, "model": None},
}
"""Descriptions (`upop.json`) that are none, or of another model."""

DESCRIPTION_FILES: dict[str, bytes] = {
    "empty": b"",
    "cut off": b'{"format": 1, "model": "blip-nl',
    "not JSON": b"format: 1\n",
    "not UTF-8": b'{"format": 1, "model": "\xff"}',
    "null bytes": bytes(100),
    "deep": b"[" * 100_000,
    "a number of 5000 digits": b'{"format": ' + b"9" * 5000 + b"}",
    "UTF-16": '{"format": 1}'.encode("utf-16"),
}
"""Whole files of descriptions."""
