"""Hook of MkDocs: the pages under docs/reference/, made from the code."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
from argparse import ArgumentParser, HelpFormatter
from functools import partial
from typing import Any

import fastlab
from fastlab import cli, config
from fastlab.console import UserError
from fastlab.fields import checked, field_types


def on_files(files: Any, config: Any) -> None:
    from mkdocs.structure.files import File

    for make in (configuration, commands, python):
        name = f"docs/reference/{make.__name__}.md"
        files.append(File.generated(config, name, content=make()))


def configuration() -> str:
    """Each section of a configuration: its keys, their values, defaults and descriptions."""
    intro = """# Configuration

A configuration is a TOML file with these sections. Every key is optional, and
`--set section.key=value` overrides one. The guide is [training.md](../training.md).
"""
    return "\n".join([intro, *(_section(name, kind) for name, kind in config.SECTIONS.items())])


def _section(name: str, kind: type) -> str:
    texts = _descriptions(kind)
    lines = [f"## [{name}] {{ #{name} }}\n", _markdown(texts[""])]
    for field in dataclasses.fields(kind):
        default = json.dumps(getattr(kind(), field.name))
        values = _values(field_types(kind)[field.name])
        lines.append(f"### `{name}.{field.name}` {{ #{name}.{field.name} }}\n")
        lines.append(f"{values}; default: `{default}`\n")
        lines.append(_markdown(texts.get(field.name, "")))
    return "\n".join(lines)


def _descriptions(kind: type) -> dict[str, str]:
    """The string below each field of a section; that of the class itself by the name ""."""
    definition = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {"": ast.get_docstring(definition) or ""}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str())):
                found[name] = inspect.cleandoc(text.value.value)
    return found


def _values(kind: Any) -> str:
    """What a field takes, in the words of the error for another value."""
    try:
        checked("", kind, None)
    except UserError as error:
        return str(error).removeprefix(": expected ").removesuffix(", got None")
    raise AssertionError(f"{kind} takes None")


def commands() -> str:
    """The help of each command."""
    intro = "# Commands\n\nWhat `fastlab COMMAND --help` prints."
    return "\n".join([intro, *(_command(name) for name in cli.COMMANDS)])


def _command(name: str) -> str:
    parser = ArgumentParser(
        prog=f"fastlab {name}",
        description=cli.COMMANDS[name].help,
        formatter_class=partial(HelpFormatter, width=88),
    )
    cli.COMMANDS[name].add_options(parser)
    return f"\n## fastlab {name} {{ #{name} }}\n\n```text\n{parser.format_help()}```"


def python() -> str:
    """Signatures and docstrings of what `import fastlab` gives."""
    names = [name for name in getattr(fastlab, "__all__", []) if not name.startswith("__")]
    intro = "# Python\n\nWhat `import fastlab` gives."
    return "\n".join([intro, *(_object(name, _interface(name)) for name in names)])


def _interface(name: str) -> Any:
    """A submodule that can be called stands for the function of its name."""
    found = getattr(fastlab, name)
    if inspect.ismodule(found):
        found = getattr(importlib.import_module("fastlab.api"), name)
    return found


def _object(name: str, each: Any, heading: str = "##") -> str:
    description = inspect.getdoc(each) or ""
    if description.startswith(f"{name}("):  # a dataclass without one repeats its signature
        description = ""
    code = f"```python\n{name}{_signature(each)}\n```"
    text = f"\n{heading} `{name}` {{ #{name} }}\n\n{code}\n\n{_markdown(description)}"
    if not inspect.isclass(each):
        return text
    public = [pair for pair in vars(each).items() if not pair[0].startswith("_")]
    members = [(key, value) for key, value in public if callable(value) or _getter(value)]
    return "\n".join([text, *(_object(f"{name}.{key}", value, "###") for key, value in members)])


def _signature(each: Any) -> str:
    """Of a property, its type; an exception has none."""
    if inspect.isclass(each) and issubclass(each, Exception):
        return ""
    if getter := _getter(each):
        text = f": {inspect.formatannotation(inspect.signature(getter).return_annotation)}"
    else:
        text = str(inspect.signature(each))
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations that are strings


def _getter(member: Any) -> Any:
    """The function of a property or a cached property, otherwise None."""
    return getattr(member, "fget", getattr(member, "func", None))


def _markdown(docstring: str) -> str:
    """Its double backticks, of reStructuredText, as single ones."""
    return docstring.replace("``", "`") + "\n"
