"""Weights with which a training begins (``--init``): those of another run, or of a file."""

from pathlib import Path

from torch import nn

from fastlab.console import UserError
from fastlab.runs import RunDir
from fastlab.training import checkpoint


def warm_start(model: nn.Module, source: Path | str, classes: list[str]) -> str:
    """Load the best weights of the run `source`, or a safetensors file, into `model`. Its head, the
    last linear layer, keeps its random weights where `classes`, the ids of its outputs, are not
    those of the weights. A file outside a run does not name its classes: there, their number
    counts. Returns which weights were loaded, for the start line.

    Raises `UserError` where the weights are missing or damaged, or do not fit the model.
    """
    source = Path(source)
    if not source.is_dir() and not source.is_file():
        raise UserError(f"--init {source}: no such run or file; give a run or a .safetensors file")
    run = RunDir(source if source.is_dir() else source.absolute().parent.parent)
    known = run.classes() if source.is_dir() or run.exists() else None
    file = run.best if source.is_dir() else source
    weights = checkpoint.read_weights(file, foreign=True)
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    outputs = weights.get(f"{head}.weight", ())
    same_classes = known == classes if known is not None else len(outputs) == len(classes)
    new = set() if same_classes else {f"{head}.weight", f"{head}.bias"}
    loaded = {name: tensor for name, tensor in weights.items() if name not in new}
    wanted = {name: t.shape for name, t in model.state_dict().items() if name not in new}
    found = {name: tensor.shape for name, tensor in loaded.items()}
    if differing := sorted(name for name, _ in wanted.items() ^ found.items()):
        name = differing[0]
        shapes = [str(list(s[name])) if name in s else "missing" for s in (found, wanted)]
        raise UserError(
            f"--init {file}: does not fit this model ({name}: {shapes[0]} in the file, {shapes[1]} "
            f"in the model); take model.name and model.width of the training that wrote it"
        )
    model.load_state_dict(loaded, strict=False)
    return str(source) if same_classes else f"{source}, with a new classifier"
