"""`fastlab push`: a trained run as a repository of the Hugging Face Hub, with its model card."""

import json
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from fastlab.console import UserError, first_line, printable, public_text
from fastlab.export.card import Publication, write_card
from fastlab.export.facts import facts_of, weights_file
from fastlab.export.graphs import Input
from fastlab.files import is_free, move_into_place, partial_directory
from fastlab.predict import Predictor
from fastlab.run_records import read_run
from fastlab.runs import RunDir


def run(args: Namespace) -> None:
    """The command `fastlab push`."""
    check_repository(args.repository)
    if not args.dry_run:
        check_token()
    publication = Publication(args.repository, args.license, args.data_license)
    files = files_of(RunDir(args.run), args.also, publication, args.data)
    if args.dry_run:
        write_folder(files, args.dry_run)
        print(f"{printable(str(args.dry_run))}: {', '.join(sorted(files))}; nothing was sent")
    else:
        print(upload(files, args.repository, private=args.private))


def files_of(
    run: RunDir, others: list[Path], publication: Publication, data: str | None
) -> dict[str, bytes]:
    """The files of the repository, by name: the best weights of `run` with what describes them.
    `others` are runs that differ in their seed alone, whose figures the card gives too; `data` is
    as for `Predictor`.

    Raises `UserError` where a run cannot be read, or one of `others` differs in more.
    """
    record, *repeated = [read_run(path, str(path)) for path in (run.path, *others)]
    predictor = Predictor(run, data=data)
    takes = Input(normalise=False, dynamic_batch=True)
    facts = facts_of(predictor, "best", takes.text(predictor.spec.image_size))
    texts = {
        "README.md": write_card(record, repeated, facts, publication),
        "config.json": json.dumps(facts, indent=1, ensure_ascii=False) + "\n",
        "config.toml": public_text(run.config.read_text(encoding="utf-8")),
    }
    files = {name: text.encode(errors="replace") for name, text in texts.items()}
    return {**files, "model.safetensors": weights_file(predictor.model, facts)}


def check_repository(repository: str) -> None:
    """Raises `UserError` unless `repository` is a name that the Hub accepts, OWNER/NAME."""
    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("no OWNER/")
    except HFValidationError as error:
        raise UserError(f"{repository}: expected OWNER/NAME ({first_line(error)})") from None


def write_folder(files: dict[str, bytes], out: Path) -> None:
    """Make `out` a folder of `files`. Raises `UserError` where it exists or cannot be written."""
    if not is_free(out):
        raise UserError(f"{out}: exists; choose another folder for --dry-run")
    with partial_directory(out) as partial:
        try:
            _fill(partial, files)
            move_into_place(partial, out)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def _fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def upload(files: dict[str, bytes], repository: str, *, private: bool) -> str:
    """Send `files` to `repository` in one commit, and make the repository where it does not exist.
    Returns its address. Raises `UserError` where that fails: files there stay as they were."""
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            _fill(Path(folder), files)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Upload a model of fastlab"
            )
    except (HTTPError, OSError, HFValidationError) as error:
        reason = getattr(error, "server_message", None) or first_line(error)
        raise UserError(
            f"{repository}: cannot be uploaded ({reason}); check the network, and that the token "
            f"may write there"
        ) from error
    return str(address)


def check_token() -> None:
    """Raises `UserError` where this machine has no token of the Hub."""
    if not get_token():
        raise UserError("push: there is no token of the Hub; run `hf auth login`, or set HF_TOKEN")
