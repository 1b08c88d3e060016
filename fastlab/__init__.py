"""fastlab: convert an image dataset once, train many small classifiers on it, fast."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlab.api import Run, Study, load_run, resume, study, train
    from fastlab.api_data import Dataset, Loader, convert, load_dataset, pipeline, synth
    from fastlab.config import Config
    from fastlab.console import UserError
    from fastlab.predict import Evaluation

_VERSION = Path(__file__).with_name("version.txt")  # written by a build, so not in every checkout
__version__ = _VERSION.read_text().strip() if _VERSION.exists() else "0.1.0.dev0+unknown"

__all__ = [
    "Config",
    "Dataset",
    "Evaluation",
    "Loader",
    "Run",
    "Study",
    "UserError",
    "convert",
    "load_dataset",
    "load_run",
    "pipeline",
    "resume",
    "study",
    "synth",
    "train",
]

# Where the names of `__all__` are defined; the others are in `fastlab.api`.
_ELSEWHERE = {
    **{"Config": "config", "Evaluation": "predict", "UserError": "console"},
    **dict.fromkeys(
        ("Dataset", "Loader", "convert", "load_dataset", "pipeline", "synth"), "api_data"
    ),
}
_CALLED = ("study", "train")  # functions of `fastlab.api` that share their names with submodules


def __getattr__(name: str) -> Any:
    """Import what `__all__` names when it is first used: importing fastlab takes no time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _CALLED:
        return importlib.import_module(f"{__name__}.{name}")
    module = importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'api')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Called(ModuleType):
    """A submodule that is called as the function of `fastlab.api` with its name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        """What editors and notebooks show."""
        return importlib.import_module("inspect").signature(self._function)

    @property
    def _function(self) -> Any:
        api = importlib.import_module(f"{__package__}.api")
        return getattr(api, self.__name__.rpartition(".")[2])


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Python sets a submodule here once it is imported, by whichever statement."""
        if name in _CALLED and isinstance(value, ModuleType):
            value.__class__ = _Called
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
