"""Optional libraries: the extra that installs each, and messages for missing ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXTRAS: Mapping[str, str] = {
    "transformers": "hf",
    "huggingface_hub": "hf",
    "timm": "timm",
    "rich": "cli",
    "typer": "cli",
    "yaml": "cli",
    "PIL": "tasks",
    "accelerate": "tasks",
    "jinja2": "tasks",
    "matplotlib": "tasks",
    "torchmetrics": "tasks",
    "torchvision": "tasks",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "openvino": "export",
    "lightning": "integrations",
    "pycocoevalcap": "coco",
    "datasets": "data",
    "pyarrow": "data",
    "peft": "chat",
    "bitsandbytes": "chat",
    "tensorboard": "tensorboard",
}
"""Module -> the extra of upop that installs it."""
_PACKAGES = {"open_clip": "open_clip_torch", "yaml": "pyyaml"}
"""Module -> its package, if that has another name."""
_MODELS = "transformers.modeling_utils"


@contextmanager
def naming_missing() -> Iterator[None]:
    """Turn import errors within the block into ones with the command to install the library.

    Raises:
        MissingLibraryError: a library other than upop was imported in this block, and is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(error) from None


def missing(error: ModuleNotFoundError, user: str = "This") -> ModuleNotFoundError:
    """Return an error that names the missing library and the command to install it.

    Args:
        error: what an import raised. An error about a module of upop, or that names none, is returned as it is.
        user: what needs the library, as the subject of a sentence.
    """
    from upop.errors import MissingLibraryError

    name = (error.name or "upop").partition(".")[0]
    if name == "upop" or isinstance(error, MissingLibraryError):
        return error
    extra = EXTRAS.get(name)
    package = f"'upop[{extra}]'" if extra is not None else _PACKAGES.get(name, name)
    return MissingLibraryError(f"{user} needs {name}, which is not installed. Run: pip install {package}", name=name)


def installed_version(name: str) -> str | None:
    """Return the version of a package, or None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_pretrained(model: object) -> TypeGuard[PreTrainedModel]:
    """Whether a model is a `PreTrainedModel`; transformers is not imported for this check."""
    models = sys.modules.get(_MODELS)
    return models is not None and isinstance(model, models.PreTrainedModel)


def on_import_of_transformers(module: str) -> None:
    """Import a module of upop together with transformers' models; now if they are imported already."""
    if _MODELS in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _Expecting(module))


class _Expecting(MetaPathFinder):
    """Waits for the import of transformers' models, and then imports a module of upop."""

    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of transformers' models, extended by the import; None for every other module."""
        del path, target
        if name != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _AndThen(spec.loader, self._module)
        return spec


class _AndThen(Loader):
    """Runs another loader, and then imports a module of upop."""

    def __init__(self, loader: Loader, module: str) -> None:
        self._loader, self._module = loader, module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and import that of upop."""
        self._loader.exec_module(module)
        import_module(self._module)
