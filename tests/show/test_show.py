"""`fastlab show`: what its server answers, to whom, and how it ends, by real requests."""

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastlab import models
from fastlab.cli import main
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.formats import Settings
from fastlab.dataset.manifest import read_manifest
from fastlab.predict import MAX_BYTES
from fastlab.runs import RunDir
from fastlab.show.mistakes import PAGE
from fastlab.show.server import Server, _Handler, open_server
from fastlab.show.site import Site
from fastlab.training import checkpoint
from tests import browser
from tests.trainings import ROOT, command


@pytest.fixture(scope="module")
def trained(synth_source, tmp_path_factory) -> Path:
    """A folder with a dataset, ``data``, and a run of one epoch, ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    settings = Settings("raw", shard_images=5)
    options = Options(formats=("array", "tar"), settings=settings, holdout=10)
    convert(synth_source, folder / "data", options)
    sets = ("train.epochs=1", "train.compile=false", "train.ema=0", "optim.lr=0.02")
    assert main(["train", *command(folder / "data", folder / "run", *sets)]) == 0
    return folder


@contextmanager
def serving(run: Path, data: Path | None = None) -> Generator[Server]:
    """The server of a run, in a thread, once it has counted the mistakes."""
    site = Site(RunDir(run), "best", str(data) if data else None)
    site._mistakes._thread.join()
    with open_server(0) as server, closing(site) as server.site:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(trained) -> Generator[Server]:
    with serving(trained / "run") as server:
        yield server


@pytest.fixture(scope="module")
def by_hand(trained) -> dict[str, np.ndarray]:
    """The dataset's validation images and labels, and the model's probabilities on them."""
    manifest = read_manifest(trained / "data")
    model = models.build(RunDir(trained / "run").load_config().model, len(manifest.classes)).eval()
    checkpoint.load_weights(model, RunDir(trained / "run").best)
    pixels = np.load(trained / "data" / "array" / "val-images.npy")
    labels = np.load(trained / "data" / "array" / "val-labels.npy").astype(int)
    normalised = (pixels / 255 - manifest.mean) / manifest.std
    with torch.no_grad():
        logits = model(torch.from_numpy(normalised).permute(0, 3, 1, 2).float())
    shares = logits.softmax(dim=1).numpy()
    return {"pixels": pixels, "labels": labels, "shares": shares, "guesses": shares.argmax(1)}


def request(
    server: Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    return connection.getresponse()


def answer(*arguments: Any, **headers: str) -> tuple[int, Any]:
    response = request(*arguments, **headers)
    return response.status, json.loads(response.read())


def picture(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def all_mistakes(server: Server, query: str = "") -> list[dict[str, Any]]:
    """The mistakes of all pages."""
    found: list[dict[str, Any]] = []
    while True:
        _, page = answer(server, "GET", f"/mistakes/images?start={len(found)}{query}")
        assert len(page["images"]) == min(PAGE, page["total"] - len(found))
        found += page["images"]
        if len(found) == page["total"]:
            return found


# What it answers


def test_a_picture_gets_the_classes_that_predict_prints(server, trained, synth_source, capsys):
    path = sorted((synth_source / "val" / "images").iterdir())[0]
    status, found = answer(server, "POST", "/predict", path.read_bytes())
    capsys.readouterr()
    assert main(["predict", str(trained / "run"), str(path), "--json"]) == 0
    assert status == 200
    assert found["predicted"] == json.loads(capsys.readouterr().out)["predicted"]


def test_what_the_network_saw_is_the_decoded_picture(server, synth_source):
    """The reference: Pillow's pixels of a JPEG of the model's size; for another size, the square in
    its centre, which a picture of two halves shows."""
    path = sorted((synth_source / "val" / "images").iterdir())[0]
    _, found = answer(server, "POST", "/predict", path.read_bytes())
    assert np.array_equal(picture(found["seen"]), np.asarray(Image.open(path).convert("RGB")))
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 96:] = 255
    stream = io.BytesIO()
    Image.fromarray(wide).save(stream, "PNG")
    _, found = answer(server, "POST", "/predict", stream.getvalue())
    assert np.array_equal(picture(found["seen"]), wide[:, 64:128])


def test_the_counts_are_those_that_the_training_recorded(server, trained):
    recorded = json.loads((trained / "run" / "errors.json").read_text())
    status, found = answer(server, "GET", "/mistakes")
    assert status == 200 and found["ready"] and not found["note"]
    assert found["classes"] == recorded["classes"]
    names = [each["name"] for each in recorded["classes"]]
    pairs = [
        {"label": names[each["label"]], "predicted": names[each["guess"]], "count": each["count"]}
        for each in found["confused"]
    ]
    assert pairs == recorded["confused"] != []


def test_each_mistake_is_shown_once_and_the_worst_first(server, by_hand):
    labels, guesses = by_hand["labels"], by_hand["guesses"]
    wrong = np.flatnonzero(labels != guesses)
    assert len(wrong) > PAGE
    found = all_mistakes(server)
    expected = {by_hand["pixels"][row].tobytes() for row in wrong}
    assert {picture(each["png"]).tobytes() for each in found} == expected
    assert len(found) == len(wrong)
    shares = [each["predicted"][0]["probability"] for each in found]
    assert shares == pytest.approx(sorted(by_hand["shares"][wrong].max(1), reverse=True), abs=1e-5)


def test_the_mistakes_of_a_class_and_of_a_pair_are_chosen(server, by_hand, trained):
    labels, guesses = by_hand["labels"], by_hand["guesses"]
    names = [each.words for each in read_manifest(trained / "data").classes]
    row = np.flatnonzero(labels != guesses)[0]
    label, guess = labels[row], guesses[row]
    found = all_mistakes(server, f"&label={label}")
    assert {each["label"] for each in found} == {names[label]}
    assert len(found) == ((labels == label) & (guesses != label)).sum()
    found = all_mistakes(server, f"&label={label}&guess={guess}")
    assert {each["predicted"][0]["name"] for each in found} == {names[guess]}
    assert len(found) == ((labels == label) & (guesses == guess)).sum()
    assert answer(server, "GET", "/mistakes/images?label=99")[1] == {"total": 0, "images": []}


@pytest.mark.parametrize("engine", ["stream", "torchvision"])
def test_other_engines_show_the_same_mistakes(engine, server, trained, tmp_path):
    """Also where images are read shard by shard, in an order of its own."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('"resident"', f'"{engine}"'))
    with serving(run) as other:
        assert answer(other, "GET", "/mistakes") == answer(server, "GET", "/mistakes")
        found, expected = all_mistakes(other), all_mistakes(server)
    assert {each["png"]: each["label"] for each in found} == {
        each["png"]: each["label"] for each in expected
    }


@pytest.fixture
def alone(trained, tmp_path) -> Path:
    """A copy of the run whose dataset is not where it was."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub('(?m)^path = ".*"', 'path = "gone"', config))
    return run


def test_without_the_dataset_the_recorded_mistakes_are_shown(alone, server, trained):
    recorded = json.loads((alone / "errors.json").read_text())
    with serving(alone) as other:
        _, found = answer(other, "GET", "/mistakes")
        assert found["ready"] and "gone: no such directory" in found["note"]
        assert str(len(recorded["worst"])) in found["note"]
        _, counted = answer(server, "GET", "/mistakes")
        assert (found["classes"], found["confused"]) == (counted["classes"], counted["confused"])
        assert all_mistakes(other) == recorded["worst"]
        worst = recorded["worst"][0]
        label, guess = (
            [each["name"] for each in recorded["classes"]].index(name)
            for name in (worst["label"], worst["predicted"][0]["name"])
        )
        assert all_mistakes(other, f"&label={label}&guess={guess}") == [
            each
            for each in recorded["worst"]
            if each["label"] == worst["label"]
            and each["predicted"][0]["name"] == worst["predicted"][0]["name"]
        ]
    with serving(alone, trained / "data") as other:
        assert answer(other, "GET", "/mistakes") == answer(server, "GET", "/mistakes")


@pytest.mark.parametrize("damage", [None, "{", '{"classes": [], "confused": [{}], "worst": []}'])
def test_without_a_record_of_mistakes_the_page_says_why_there_are_none(damage, alone, synth_source):
    (alone / "errors.json").unlink()
    if damage:
        (alone / "errors.json").write_text(damage)
    with serving(alone) as server:
        _, found = answer(server, "GET", "/mistakes")
        assert found["ready"] and found["classes"] == [] and "gone" in found["note"]
        assert ("errors.json: damaged" in found["note"]) == (damage is not None)
        path = sorted((synth_source / "val" / "images").iterdir())[0]
        assert answer(server, "POST", "/predict", path.read_bytes())[0] == 200


def test_the_page_needs_nothing_but_its_own_files(server):
    response = request(server, "GET", "/")
    page = response.read().decode()
    parts = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sorted(parts) == ["data:,", "show.css", "show.js"]
    for part in ("", "show.css", "show.js"):
        response = request(server, "GET", f"/{part}")
        assert response.status == 200
        assert not re.search(rb"https?://|@import", response.read())
        assert response.headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert response.headers["X-Content-Type-Options"] == "nosniff"


# Whom and what it refuses


@pytest.mark.parametrize("method, path", [("GET", "/mistakes"), ("POST", "/predict"), ("GET", "/")])
def test_a_name_that_was_resolved_to_this_machine_is_refused(method, path, server):
    for host in ("example.com", "example.com:8000", "127.0.0.1.example.com", ""):
        assert answer(server, method, path, Host=host)[0] == 403


@pytest.mark.parametrize("method, path", [("GET", "/mistakes"), ("POST", "/predict")])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://example.com"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_the_pages_of_other_sites_are_refused(method, path, headers, server):
    status, found = answer(server, method, path, **headers)
    assert status == 403 and "other sites" in found["error"]


def test_the_page_itself_is_answered_also_through_a_tunnel(server):
    own = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}
    assert answer(server, "GET", "/mistakes", **own, Sec_Fetch_Site="same-origin")[0] == 200


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff\xd8\xff\xe0" + bytes(99), b"ftypheic" * 9])
def test_what_is_no_image_gets_the_reason(body, server):
    status, found = answer(server, "POST", "/predict", body)
    assert status == 400 and found["error"].startswith("not an image (")


def test_a_body_that_is_too_large_is_refused_unread(server):
    length = str(MAX_BYTES + 1)
    status, found = answer(server, "POST", "/predict", Content_Length=length)
    assert status == 413 and "larger than 512 MB" in found["error"]
    for length in ("-1", "9" * 19, "x"):
        assert answer(server, "POST", "/predict", Content_Length=length)[0] == 411
    assert answer(server, "POST", "/predict", Transfer_Encoding="chunked")[0] == 411


@pytest.mark.parametrize(
    "path", ["/no", "/../site.py", "/%2e%2e/site.py", "/show.js/", "/index.html", "/predict"]
)
def test_only_the_known_addresses_are_answered(path, server):
    assert answer(server, "GET", path)[0] == 404
    assert answer(server, "POST", f"{path}/", b"")[0] == 404


@pytest.mark.parametrize(
    "query", ["label=-1", "label=x", "start=1e3", "other=1", "start=9999999999"]
)
def test_a_query_of_anything_but_numbers_is_refused(query, server):
    assert answer(server, "GET", f"/mistakes/images?{query}")[0] == 400


def test_a_client_that_sends_nothing_is_left(server, monkeypatch, capsys):
    monkeypatch.setattr(_Handler, "timeout", 0.05)
    head = b"POST /predict HTTP/1.0\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    for sent in (b"", b"GET / HT", head, head + b"half"):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as client:
            client.sendall(sent)
            assert client.recv(99) == b""
    assert capsys.readouterr().err == ""


def test_a_defect_is_one_line_and_the_server_goes_on(server, monkeypatch, capsys):
    monkeypatch.setitem(server.site.reads, "/about", lambda query: 1 // 0)
    status, found = answer(server, "GET", "/about")
    assert status == 500 and "division" in found["error"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastlab: /about: ZeroDivisionError")
    assert answer(server, "GET", "/mistakes")[0] == 200


def test_a_dataset_that_vanishes_is_reported_in_the_answer(trained, tmp_path):
    data = shutil.copytree(trained / "data", tmp_path / "data")
    with serving(trained / "run", data) as server:
        shutil.rmtree(data)
        status, found = answer(server, "GET", "/mistakes/images")
    assert status == 500 and "data" in found["error"]


# How it starts and ends


def test_a_port_that_is_taken_is_refused_in_one_line(server, trained, capsys):
    port = str(server.server_port)
    assert main(["show", str(trained / "run"), "--port", port]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastlab: --port {port}: cannot be used (Address already in use)")
    assert "--port 0" in line


def test_a_wrong_run_or_dataset_is_refused_in_one_line(trained, tmp_path, capsys):
    for arguments in ([str(tmp_path)], [str(trained / "run"), "--data", str(tmp_path)]):
        assert main(["show", *arguments, "--port", "0"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_number_that_is_no_port_is_refused(capsys):
    for text in ("65536", "-1", "x"):
        with pytest.raises(SystemExit) as stopped:
            main(["show", "run", f"--port={text}"])
        assert stopped.value.code == 2
        assert "expected a port from 0 to 65535" in capsys.readouterr().err


def test_ctrl_c_ends_it_with_success_and_without_a_word(trained):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlab", "show", str(trained / "run"), "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/  \(Ctrl-C stops it\)\n", line)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_it_as_ctrl_c_does(number, trained, monkeypatch, capsys):
    def between_requests(server: Server) -> None:
        if threading.current_thread() is threading.main_thread():  # not in another test's server
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Server, "service_actions", between_requests)
    capsys.readouterr()
    assert main(["show", str(trained / "run"), "--port", "0"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_mistakes_without_errors(server):
    dom, messages = browser.rendered(f"http://127.0.0.1:{server.server_port}/")
    assert messages == []
    assert "Mistakes of all classes: 1 to" in dom and dom.count("data:image/png") == PAGE
