"""Makes bad inputs of good ones: values, texts, bytes, archives, images. All chance comes from the one generator."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import pickle
import random
import string
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import yaml

Draw = random.Random

DEEP = 3000
"""Levels that are too many for a parser that calls itself."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 5, 7, 255, 2**16, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1e-300, 1.5, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "\n", "a", "0", "-1", "1e400", "nan", "true", "null", "None", "~", "2020-13-45", "a" * 5000),
    *("\0", "a\0b", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\r", "\u202eabc", "\ud800", "é" * 40, "👾", "\ufeff"),
    *("[bold]x[/bold]", "[/]", "[link=file:///]x", "<script>alert(1)</script>", "</style>", "{{ 7 * 7 }}", "{0}", "%s"),
    *("../../secret.png", "/etc/passwd", "/dev/zero", "/dev/stdin", "~", ".", "..", "http://127.0.0.1:9/a", "file:///"),
    *("hf-hub:owner/name", "owner/name", "owner/name--module.Class", "module.Class", "os.system", "__class__"),
    *(
        [],
        [[]],
        [None],
        [1, 2, 3],
        ["a"],
        [[1], [2]],
        {},
        {"a": 1},
        {"": None},
        {"a": {"b": {"c": []}}},
        ["a", 1, None],
    ),
)
"""What may stand where something else is expected."""

KEYS = ("", " ", "a", "0", "__class__", "__metadata__", "é", "\0", "\x1b[0m", "[red]", "<b>", "a" * 300, "\ud800")


def one(draw: Draw, among: Sequence[Any]) -> Any:
    """One of a sequence; what can be changed is copied."""
    return copy.deepcopy(among[draw.randrange(len(among))])


def nested(draw: Draw, levels: int) -> Any:
    """A value of so many levels."""
    value: Any = one(draw, VALUES)
    for _ in range(levels):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


def odd(draw: Draw, instead: Any = None) -> Any:
    """A value that is not meant, often one that is near to what it stands for."""
    kind = draw.random()
    if kind < 0.3 and isinstance(instead, bool | int | float):
        change: Callable[[Any], Any] = one(
            draw, [lambda x: -x, lambda x: x + 1, lambda x: x - 1, lambda x: x * 2, lambda x: x / 2, str, lambda x: [x]]
        )
        return change(instead)
    if kind < 0.3 and isinstance(instead, str):
        return damaged_text(draw, instead)
    if kind < 0.4 and isinstance(instead, list):
        return one(draw, [instead[:-1], instead * 2, instead[::-1], [instead], dict(enumerate(map(str, instead)))])
    if kind < 0.45:
        return nested(draw, draw.choice((2, 10, 60)))
    if kind < 0.5:
        return draw.choice((-1, 1)) * 2 ** draw.randrange(70)
    if kind < 0.55:
        return [one(draw, VALUES)] * draw.choice((1, 10, 500))
    return one(draw, VALUES)


def damaged_text(draw: Draw, text: str) -> str:
    """A text with a few characters gone, changed, or too many."""
    place = draw.randrange(len(text) + 1)
    end = min(len(text), place + draw.choice((0, 1, 1, 3, 20)))
    put = draw.choice(("", draw.choice(string.printable), draw.choice(KEYS), text[:10], chr(draw.randrange(0x250))))
    return text[:place] + put + text[end:]


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every place in a value of lists and mappings, as (container, key)."""
    found, queue = [], [content]
    while queue:
        holder = queue.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            found.append((holder, key))
            queue.append(holder[key])
    return found


def changed(draw: Draw, content: Any) -> Any:
    """A copy of a value of lists and mappings with one to three changes somewhere."""
    whole = {"": copy.deepcopy(content)}
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = _places(whole)
        holder, key = places[draw.randrange(len(places))] if len(places) > 1 else places[0]
        what = draw.random()
        if what < 0.1 and holder is not whole:
            del holder[key]
        elif what < 0.2 and isinstance(holder, dict) and holder is not whole:
            name = draw.choice((str(key).upper(), f"{key}x", str(key)[1:], draw.choice(KEYS)))
            holder[name] = holder.pop(key)
        elif what < 0.27 and isinstance(holder[key], dict):
            holder[key][draw.choice(KEYS)] = odd(draw)
        elif what < 0.27 and isinstance(holder[key], list):
            holder[key].insert(draw.randrange(len(holder[key]) + 1), odd(draw))
        elif what < 0.37:
            other, place = places[draw.randrange(len(places))]
            holder[key] = copy.deepcopy(other[place])
        else:
            holder[key] = odd(draw, holder[key])
    return whole[""]


def as_bytes(text: str) -> bytes:
    """UTF-8, halves of characters too."""
    return text.encode("utf-8", "surrogatepass")


def json_file(draw: Draw, content: Any) -> bytes:
    """The bytes of a JSON file that was meant to hold a value."""
    kind = draw.random()
    if kind < 0.6:
        value = changed(draw, content)
        indent = draw.choice((None, None, 1))
        return as_bytes(json.dumps(value, indent=indent, ensure_ascii=draw.random() < 0.5, default=str))
    text = json.dumps(content)
    if kind < 0.75:
        return damaged(draw, text.encode())
    if kind < 0.9:
        return as_bytes(_spliced(draw, text, _json_piece(draw)))
    return whole_file(draw, text.encode())


def _json_piece(draw: Draw) -> str:
    deep = draw.choice((10, 200, DEEP, 10 * DEEP))
    return draw.choice(
        (
            *(
                "NaN",
                "-Infinity",
                "1e999",
                "9" * 5000,
                "-0",
                "01",
                "'a'",
                "\t",
                "/*",
                "//",
                "\\u",
                '"\\ud800"',
                "}",
                "]",
            ),
            *("[" * deep, "[" * deep + "]" * deep, '{"a":' * deep, '{"a":' * deep + "1" + "}" * deep),
            *('"a": 1, ' * 3, '"' + "x" * 100_000 + '"', "[" + "1," * 20_000 + "1]"),
        )
    )


def _spliced(draw: Draw, text: str, piece: str) -> str:
    """A text with a piece at one of the places where its structure has a joint."""
    joints = [place for place, letter in enumerate(text) if letter in '{[:,"']
    place = draw.choice(joints) + 1 if joints else 0
    end = place + draw.choice((0, 0, 1, 5))
    return text[:place] + piece + text[end:]


def yaml_file(draw: Draw, content: Any) -> bytes:
    """The bytes of a YAML file that was meant to hold a value."""
    kind = draw.random()
    if kind < 0.5:
        value = changed(draw, content)
        try:
            return yaml.safe_dump(value, allow_unicode=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        except Exception:  # PyYAML does not write everything that can be read
            return as_bytes(json.dumps(value, default=str))
    text = yaml.safe_dump(content)
    if kind < 0.65:
        return damaged(draw, text.encode())
    if kind < 0.9:
        lines = text.splitlines()
        number = draw.randrange(len(lines))
        key = lines[number].partition(":")[0] if ":" in lines[number] else "a"
        lines[number : number + draw.choice((0, 1))] = _yaml_piece(draw, key).split("\n")
        return as_bytes("\n".join(lines))
    return whole_file(draw, text.encode())


def _yaml_piece(draw: Draw, key: str) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    width, levels = draw.choice(((2, 24), (9, 9), (1, 25), (60, 3)))
    bomb = "\n".join(
        f"{letter}: &{letter} [{', '.join([f'*{before}' if before else 'x'] * width)}]"
        for before, letter in zip(("", *letters), letters[: levels + 1], strict=False)
    )
    maps = "a: &a {x: 1}\n" + "\n".join(
        f"{letter}: &{letter} {{{', '.join(f'k{i}: *{before}' for i in range(width))}}}"
        for before, letter in itertools.pairwise(letters[:levels])
    )
    merges = "a: &a {x: 1}\n" + "\n".join(
        f"{letter}: &{letter} {{<<: [{', '.join([f'*{before}'] * width)}]}}"
        for before, letter in itertools.pairwise(letters[:levels])
    )
    deep = draw.choice((10, 200, DEEP))
    return draw.choice(
        (
            *(bomb, f"{key}: {{\n{bomb}\n}}", maps, merges, f"{key}: &x [*x]", f"{key}: &x {{y: *x}}", f"{key}: *no"),
            *(f"{key}: {'[' * deep}{']' * deep}", f"{key}: {'{a: ' * deep}1{'}' * deep}", f"{key}: {'[' * deep}"),
            *("- " * deep + "a", "? " * deep + "a", "".join(f"{' ' * n}a:\n" for n in range(deep // 10))),
            *(f"{key}: !!python/object/apply:os.system [touch ran]", f"{key}: !!python/name:os.system", f"{key}: !x 1"),
            *(
                f"{key}: !!int x",
                f"{key}: !!float x",
                f"{key}: !!bool x",
                f"{key}: !!binary '*'",
                f"{key}: !!set {{a}}",
            ),
            *(f"{key}: !!timestamp x", f"{key}: 2020-99-99", f"{key}: !!omap [a: 1]", f"{key}: !!pairs [a: 1]"),
            *(f"{key}: .nan", f"{key}: -.inf", f"{key}: 0x{'f' * 5000}", f"{key}: {'9' * 5000}", f"{key}: 190:20:30"),
            *(f"{key}: 1_000", f"{key}: 0o17", f"{key}: 0b1", f"{key}: 1e400", f"{key}: ~", f"{key}: yes", f"{key}:"),
            *("--- a\n--- b", "...", "%YAML 9.9", "%TAG ! x", "\t", f"{key}: |\n x\n  y", f"{key}: >-\n", f"{key}: 'a"),
            *(f"{key}: 1\n{key}: 2", "? [a, b]\n: 1", "? {a: b}\n: 1", "<<: 5", "<<: [1]", "<<: {a: 1}", ": 1", "=: 1"),
            *(f"{key}: \x00", f"{key}: \ud800", f"{key}: '\x1b[31m'", f"{key}: {'x' * 100_000}", f"{key}: @x"),
        )
    )


def whole_file(draw: Draw, data: bytes) -> bytes:
    """A file of another kind altogether."""
    text = data.decode("utf-8", "replace")
    return draw.choice(
        (
            *(
                b"",
                b" \n\t",
                b"{",
                b"[",
                b"null",
                b"5",
                b'"a"',
                b"[]",
                b"{}",
                b"[null]",
                b"[[]]",
                b"[1]",
                b"true",
                b"NaN",
            ),
            *(
                data[: len(data) // 2],
                data + data,
                data + b"\n" + data,
                b"\xef\xbb\xbf" + data,
                b"\0" * 64,
                b"\xff" * 64,
            ),
            *(text.encode("utf-16"), text.encode("utf-32"), data.replace(b'"', b"'"), data.replace(b"\n", b"\r")),
            *(
                b"\x89PNG\r\n\x1a\n" + bytes(64),
                pickle.dumps([1, 2]),
                b"PK\x03\x04" + bytes(60),
                b"\x1f\x8b" + bytes(30),
            ),
            *(
                b"<!DOCTYPE html><html>404</html>",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            ),
            *(
                b"[" * 100_000,
                b"{" * 100_000,
                b'{"a":' * 50_000,
                b"[" * 30_000 + b"]" * 30_000,
                b"9" * 100_000,
                b"a,b\n1,2",
            ),
        )
    )


def damaged(draw: Draw, data: bytes) -> bytes:
    """Bytes with one to four damages: cut, flipped, put in, taken out, repeated, overwritten by numbers."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if not content:
            break
        # Headers are at the beginning, directories at the end.
        size = len(content)
        place = draw.choice(
            (draw.randrange(size), draw.randrange(min(64, size)), size - 1 - draw.randrange(min(64, size)))
        )
        count = draw.choice((1, 1, 2, 4, 8, 64))
        match draw.randrange(8):
            case 0:
                del content[place:]
            case 1:
                content[place] ^= 1 << draw.randrange(8)
            case 2:
                content[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            case 3:
                content[place:place] = draw.randbytes(count)
            case 4:
                del content[place : place + count]
            case 5:
                start = draw.randrange(size)
                content[place:place] = content[start : start + count]
            case 6:
                number = draw.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**24, 50_000))
                form = draw.choice((">I", "<I", ">H", "<H", "<Q", ">Q"))
                packed = struct.pack(form, number % 256 ** struct.calcsize(form))
                content[place : place + len(packed)] = packed
            case _:
                content[place : place + count] = bytes(count) if draw.random() < 0.5 else b"\xff" * count
    return bytes(content)


def safetensors_file(draw: Draw, data: bytes) -> bytes:
    """A safetensors file whose header, or length, or content is not what it should be."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = draw.random()
    if kind < 0.2:
        return damaged(draw, data)
    if kind < 0.3:
        wrong = draw.choice(
            (0, 1, 7, length - 1, length + 1, len(data), 2**20, 10**8, 10**8 + 1, 2**31, 2**62, 2**64 - 1)
        )
        return struct.pack("<Q", wrong) + data[8:]
    if kind < 0.4:
        return struct.pack("<Q", length) + damaged(draw, data[8 : 8 + length]) + body
    if kind < 0.5:
        written = json_file(draw, header)
        return struct.pack("<Q", len(written)) + written + body
    names = [name for name in header if name != "__metadata__"]
    whole = list(names)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if not whole:
            break
        name = whole.pop(draw.randrange(len(whole)))  # each tensor is changed once
        entry = header[name]
        begin, end = entry["data_offsets"]
        match draw.randrange(8):
            case 0:
                entry["dtype"] = draw.choice(
                    (
                        "F64",
                        "F16",
                        "BF16",
                        "I64",
                        "U8",
                        "BOOL",
                        "I8",
                        "F8_E4M3",
                        "F4",
                        "C64",
                        "F33",
                        "",
                        None,
                        5,
                        "F8_E8M0",
                    )
                )
            case 1:
                sizes: list[Any] = list(entry["shape"])
                sizes[draw.randrange(len(sizes)) if sizes else 0 :] = [odd(draw, 3)]
                entry["shape"] = sizes
            case 2:
                entry["shape"] = draw.choice(
                    (
                        [],
                        [0],
                        [-1],
                        [2**62, 2**62],
                        [2**40],
                        entry["shape"][::-1],
                        [1, *entry["shape"]],
                        None,
                        "a",
                        [0.5],
                    )
                )
            case 3:
                offsets = ([end, begin], [begin, end + 4], [begin + 4, end], [0, len(body)], [begin], [-4, end], None)
                entry["data_offsets"] = draw.choice((*offsets, [2**62, 2**63], [begin, begin], ["0", "4"], [0.5, 1.5]))
            case 4:
                entry["data_offsets"] = header[draw.choice(names)]["data_offsets"]
            case 5:
                header[f"{name}{draw.choice(('x', '.weight', *KEYS))}"] = header.pop(name)
                names = [each for each in header if each != "__metadata__"]
            case 6:
                header["__metadata__"] = (
                    odd(draw, {"format": "pt"})
                    if draw.random() < 0.5
                    else {draw.choice((*KEYS, "a")): draw.choice(names) for _ in range(3)}
                )
            case _:
                body = odd_numbers(draw, body)
    written = as_bytes(json.dumps(header))
    return struct.pack("<Q", len(written)) + written + body


def odd_numbers(draw: Draw, body: bytes) -> bytes:
    """Numbers of 32 bits of which some are none, or too large."""
    content = bytearray(body)
    for _ in range(draw.choice((1, 1, 100))):
        place = 4 * draw.randrange(max(1, len(content) // 4))
        content[place : place + 4] = struct.pack("<f", draw.choice((math.nan, math.inf, -math.inf, 3e38, 1e-44)))
    return bytes(content)


def archive(draw: Draw, data: bytes) -> bytes:
    """A ZIP archive, such as torch writes, that was damaged as a whole or in one of its files, checksums kept right."""
    if draw.random() < 0.35:
        return damaged(draw, data)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        entries = [(info.filename, file.read(info)) for info in file.infolist()]
    described = next(number for number, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    number = described if draw.random() < 0.6 else draw.randrange(len(entries))
    name, content = entries[number]
    match draw.randrange(6):
        case 0:
            del entries[number]
        case 1:
            entries[number] = (
                draw.choice((f"{name}x", f"../{name}", f"/{name}", name.rpartition("/")[2], "\0")),
                content,
            )
        case 2:
            entries.insert(draw.randrange(len(entries) + 1), (name, damaged(draw, content)))
        case 3:
            entries[number] = name, content * draw.choice((0, 2))
        case _:
            entries[number] = name, _pickle(draw, content) if number == described else damaged(draw, content)
    buffer = io.BytesIO()
    packed = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", packed) as file:
        for name, content in entries:
            file.writestr(zipfile.ZipInfo(name.replace("\0", "") or "a"), content, packed)
    return buffer.getvalue()


class _Runs:
    """What a pickle would call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def _pickle(draw: Draw, content: bytes) -> bytes:
    """A pickle with other names of classes, or other operations, or one that calls something."""
    kind = draw.random()
    if kind < 0.4:
        return damaged(draw, content)
    if kind < 0.7:
        names = (
            b"FloatStorage",
            b"_rebuild_tensor_v2",
            b"torch._utils",
            b"OrderedDict",
            b"collections",
            b"cpu",
            b"model",
        )
        found = [name for name in names if name in content]
        if found:
            other = draw.choice(
                (b"os", b"system", b"eval", b"builtins", b"HalfStorage", b"LongStorage", b"cuda:7", b"meta")
            )
            return content.replace(draw.choice(found), other)
    import os
    import subprocess

    called = draw.choice(
        (
            _Runs(os.system, "touch ran"),
            _Runs(eval, "open('ran', 'w')"),
            _Runs(subprocess.Popen, "touch ran"),
            _Runs(getattr, "a", "upper"),
            _Runs(bytearray, 2**33),
            _Runs(range, 2**60),
        )
    )
    return pickle.dumps({"model": {"a": called}}, protocol=draw.choice((0, 2, 4)))


def image_file(draw: Draw, data: bytes, size: tuple[int, int]) -> bytes:
    """An image file: damaged, or with another width and height where its own are written, or of another kind."""
    kind = draw.random()
    if kind < 0.6:
        return damaged(draw, data)
    if kind < 0.85:
        content = bytearray(data)
        for form in (">I", "<I", ">H", "<H"):
            for number in size:
                written = struct.pack(form, number)
                place = content.find(written)
                if place >= 0 and draw.random() < 0.6:
                    most = 256 ** len(written) - 1
                    other = draw.choice((0, 1, 2**14, 30_000, 65_500, 2**24, 2**31 - 1, most)) & most
                    content[place : place + len(written)] = struct.pack(form, other)
        return bytes(content) if bytes(content) != data else damaged(draw, data)
    if kind < 0.95:
        return whole_file(draw, data)
    return data[: draw.randrange(len(data))]
