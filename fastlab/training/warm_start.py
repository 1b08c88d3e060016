"""Weights with which a training begins (``--init``): those of another run, or of a file."""

from pathlib import Path

from torch import nn

from fastlab.console import UserError
from fastlab.runs import RunDir
from fastlab.training import checkpoint


def warm_start(model: nn.Module, source: Path | str, classes: list[str]) -> str:
    """Load the best weights of the run `source`, or a safetensors file, into `model`. Its `heads`
    keep their random weights where `classes`, the ids of its outputs, are not those of the weights.
    A file outside a run does not name its classes: there, their number counts. Returns which
    weights were loaded, for the start line.

    Raises `UserError` where the weights are missing or damaged, or do not fit the model.
    """
    source = Path(source)
    if not source.is_dir() and not source.is_file():
        raise UserError(f"--init {source}: no such run or file; give a run or a .safetensors file")
    run = RunDir(source if source.is_dir() else source.absolute().parent.parent)
    known = run.classes() if source.is_dir() or run.exists() else None
    file = run.best if source.is_dir() else source
    weights = checkpoint.read_weights(file, foreign=True)
    ends = heads(model, len(classes))
    outputs = {len(weights.get(f"{end}.weight", ())) for end in ends}
    same_classes = known == classes if known is not None else outputs <= {len(classes)}
    new = [] if same_classes else ends
    loaded = {name: tensor for name, tensor in weights.items() if _module(name) not in new}
    counters = _step_counters(model) - loaded.keys()
    wanted = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if _module(name) not in new and name not in counters
    }
    found = {name: tensor.shape for name, tensor in loaded.items()}
    if differing := sorted(name for name, _ in wanted.items() ^ found.items()):
        name = differing[0]
        shapes = [str(list(s[name])) if name in s else "missing" for s in (found, wanted)]
        raise UserError(
            f"--init {file}: does not fit this model ({name}: {shapes[0]} in the file, {shapes[1]} "
            f"in the model); take the settings [model] of the training that wrote it"
        )
    model.load_state_dict(loaded, strict=False)
    return str(source) if same_classes else f"{source}, with a new classifier"


def heads(model: nn.Module, classes: int) -> list[str]:
    """The names of the linear layers and convolutions whose outputs are the classes: the last with
    `classes` outputs, or all of those in `model.get_classifier()`, a method of timm's models."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and len(module.weight) == classes
    }
    classifier = getattr(model, "get_classifier", None)
    if classifier is None:
        return list(layers)[-1:]
    given = classifier()
    inside = set(nn.ModuleList(given if isinstance(given, tuple | list) else [given]).modules())
    return [name for name, layer in layers.items() if layer in inside]


def _module(name: str) -> str:
    """The module of a parameter: "fc" of "fc.weight"."""
    return name.rpartition(".")[0]


def _step_counters(model: nn.Module) -> set[str]:
    """The counters of batch norms, which no output depends on, and which some files lack."""
    return {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
