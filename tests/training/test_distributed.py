"""What the ranks of a training agree on."""

import pytest
import torch

from fastlab.console import UserError
from fastlab.training.distributed import agreed, average_over_ranks, largest, largest_int
from tests.training.ranks import on_ranks


def test_the_largest_of_each_element_is_taken_over_the_ranks():
    values = torch.tensor([[1, 9, -3], [5, 2, -7]])
    for result in on_ranks(lambda rank: largest(rank, values[rank.process_index])):
        assert result.tolist() == [5, 9, -3]
    assert on_ranks(lambda rank: largest_int(rank, 3 + 4 * rank.process_index)) == [7, 7]


def test_only_floating_point_buffers_are_averaged():
    def averaged(rank):
        buffers = [torch.full((2,), 1.0 + 4 * rank.process_index), torch.tensor(rank.process_index)]
        average_over_ranks(rank, buffers)
        return [buffer.tolist() for buffer in buffers]

    assert on_ranks(averaged) == [[[3.0, 3.0], 0], [[3.0, 3.0], 1]]


@pytest.mark.parametrize(("failing", "reported"), [((1,), 1), ((0, 1), 0)])
def test_a_mistake_on_any_rank_ends_all_and_is_reported_by_the_first(failing, reported, capsys):
    def work(rank):
        with agreed(rank):
            if rank.process_index in failing:
                raise UserError(f"mistake {rank.process_index}")

    for end in on_ranks(work):
        assert isinstance(end, SystemExit) and end.code == 2
    assert capsys.readouterr().err == f"fastlab: mistake {reported}\n"


def test_without_a_mistake_every_rank_continues(capsys):
    def work(rank):
        with agreed(rank):
            pass
        return "continued"

    assert on_ranks(work) == ["continued", "continued"]
    assert not capsys.readouterr().err
