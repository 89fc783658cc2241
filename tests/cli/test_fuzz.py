"""Whatever bytes a file holds, it is read, or a sentence says what is wrong; no command ends with 1."""

from __future__ import annotations

import pytest
from fuzz_readers import READERS, Bench, hunt

#: Inputs of a reader in the gate; the long run is of all readers together.
FEW, MANY = 12, 100_000
#: Commands that take seconds. Stores are asked in the gate as soon as all that is forged in them is refused.
SLOW = ("probe", "propagate", "train", "extract", "report", "track", "store")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name.startswith(SLOW) else []) for name in READERS],
)
def test_damaged_inputs_are_read_or_refused(bench: Bench, name: str) -> None:
    assert {"read", "exit 0"} & bench.intact(name)
    for number in range(min(FEW, READERS[name].share)):
        try:
            bench.ask(name, number)
        except Exception as error:
            again = f"python tests/support/fuzz_readers.py --reader {name!r} --number {number}"
            path, data = bench.damage(name, number)
            pytest.fail(f"{error!r} for {path.name} of {data[:200]!r}: {again}")


@pytest.mark.slow
def test_many_damaged_inputs() -> None:
    assert not hunt(list(READERS), MANY).faults
