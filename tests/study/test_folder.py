import pytest

from fastlab.config import Config
from fastlab.study.folder import StudyDir, look
from fastlab.study.spec import make_task
from tests.study.studies import make_run


@pytest.mark.parametrize("damaged", ["", "{"])
def test_a_record_that_was_torn_is_ignored(damaged, tmp_path):
    folder, task = StudyDir(tmp_path), make_task(Config())
    folder.create([task])
    folder.record(task).write_text(damaged)
    assert look(folder, task).status == "waiting"
    make_run(folder, task, 0.5, "running")
    state = look(folder, task)
    assert (state.status, state.epochs, state.rate) == ("interrupted", 3, 100.0)


def test_a_record_says_how_the_last_attempt_ended_until_the_run_is_finished(tmp_path):
    folder, task = StudyDir(tmp_path), make_task(Config())
    folder.create([task])
    folder.write_record(task, "failed", "no memory", exit_status=1)
    assert (look(folder, task).status, look(folder, task).reason) == ("failed", "no memory")
    make_run(folder, task, 0.5)
    assert (look(folder, task).status, look(folder, task).reason) == ("finished", "")
