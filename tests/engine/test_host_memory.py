"""What memory a run may still take: the machine's, and what its control groups leave."""

import pytest

from engine.host_memory import free_host_memory, left_in_groups

MIB = 2**20


def write_group(folder, limit, used, names):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file {MIB}\ninactive_file {2 * MIB}\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [("0::/job/step", "job", V2), ("4:memory:/docker/77", "memory", V1)],
    ids=["a job of Slurm", "a container that does not see its own group"],
)
def test_a_groups_limit_counts_and_the_systems_copies_of_files_are_free(
    tmp_path, line, folder, names
):
    (tmp_path / "cgroup").write_text(f"9:cpu:/\n{line}\n")
    write_group(tmp_path / "fs" / folder, 100 * MIB, 40 * MIB, names)
    assert list(left_in_groups(tmp_path, tmp_path / "fs")) == [63 * MIB]


def test_a_group_without_a_limit_and_a_system_without_groups_count_for_nothing(tmp_path):
    (tmp_path / "cgroup").write_text("0::/job\n")
    write_group(tmp_path / "fs" / "job", "max", 40, V2)
    assert list(left_in_groups(tmp_path, tmp_path / "fs")) == []
    assert list(left_in_groups(tmp_path / "nowhere", tmp_path / "fs")) == []


def test_what_a_process_has_taken_before_it_may_take_again(run_python):
    done = run_python(
        "import torch\n"
        "from engine.host_memory import _taken_again\n"
        "before = _taken_again()\n"
        "del (x := [torch.ones(10**8)])[:]\n"
        "print(_taken_again() - before)\n"
    )
    assert int(done.stdout) > 3.5e8, done.stderr
    assert free_host_memory() > 0
