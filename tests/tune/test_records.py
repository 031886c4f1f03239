"""The database of measurements, and what it makes of a kernel's config."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmc.errors import LlmcError
from llmc.schedules.linear import LinearConfig, LinearSchedule
from llmc.schedules.records import Record, RecordFile, Status, header_line, read_records, record_line
from llmc.schedules.tunable import code_of
from llmc.schedules.tune_experts import TunableExperts
from llmc.schedules.tuned_choice import Tuned, choose, is_current, shipped_records
from llmc.targets.backend import get
from llmc.tune.sources import dropped_note, merge, records_for_compile, soft_mismatches, tvm_version
from tests.tune.synthetic import CAPS, Toy, ToyConfig, ToySchedule

TOY = Toy()


def record(
    ratio=0.5, *, n=64, rows=1, bucket=(1, 1), device="here", tvm="1", preset="toy/one", share=0.5, **schedule
):
    values = vars(ToySchedule(**schedule))
    return Record(
        "toy", 1, TOY.to_values(ToyConfig(n)), *bucket, rows, values, preset, tvm, device,
        seconds=ratio, ratio=ratio, share=share, roofline=0.1,
    )  # fmt: skip


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    records = [
        record(),
        record(tile=4),
        replace(record(tile=2), status=Status.WRONG, ratio=0.0, note="3 of 1"),
    ]
    assert RecordFile(path).append(records) == 3
    assert path.read_text().startswith(header_line())
    assert read_records(path) == records
    again = RecordFile(path)
    assert again.append([*records, record(tile=8)]) == 0  # nothing new: tile=8 is the first record
    assert again.append([record(0.4)]) == 1
    assert [r.ratio for r in read_records(path) if r.schedule == record().schedule] == [0.4]


def test_what_an_interrupted_run_left_is_passed_over_and_cut_off(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(header_line() + record_line(record()) + record_line(record(tile=4))[:30])
    assert read_records(path) == [record()]
    RecordFile(path).append([record(tile=2)])
    assert read_records(path) == [record(), record(tile=2)]


@pytest.mark.parametrize(
    ("text", "ref", "said"),
    [
        ("nothing\n", "records-corrupt", "first line"),
        ('{"llmc-records": 7}\n', "records-version", "format 7; this llmc reads format 1"),
        (header_line() + "{]\n" + record_line(record()), "records-corrupt", "Line 2 of"),
        (header_line() + record_line(record()) + '{"rule": "toy"}\n', "records-corrupt", "Line 3 of"),
        (header_line() + '{"rule":1}\n', "records-corrupt", "lacks version"),
        (
            header_line() + record_line(record()).replace('"tile":8', '"tile":"8"'),
            "records-corrupt",
            "no int",
        ),
        (
            header_line() + record_line(record()).replace('"status":"ok"', '"status":"fine"'),
            "records-corrupt",
            "fine",
        ),
        (
            header_line() + record_line(record()).replace('"low":1', '"low":3'),
            "records-corrupt",
            "do not lie in",
        ),
    ],
)
def test_corrupt_files_are_refused_by_line(tmp_path, text, ref, said):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(LlmcError, match=said) as error:
        read_records(path)
    assert error.value.ref == ref
    assert len(error.value.message.split(". ")) == 1


def test_merge(tmp_path):
    a, b, c = (tmp_path / name for name in ("a", "b", "c"))
    RecordFile(a).append([record(), record(tile=4)])
    RecordFile(b).append([record(tile=4), record(tile=2, device="there")])
    assert merge(c, [a, b]) == (3, 1)
    assert merge(c, [a, b]) == (0, 4)
    assert len(read_records(c)) == 3
    b.write_text("broken\n")
    before = c.read_bytes()
    with pytest.raises(LlmcError):
        merge(c, [a, b])
    assert c.read_bytes() == before


def test_the_choice_agrees_in_what_is_shared():
    few, more = (1, 1), (2, 4)
    # layout 1 wins the first bucket by a little and loses the second by much
    records = [
        record(0.8, layout=1),
        record(0.9, tile=4),
        record(1.5, layout=1, rows=4, bucket=more),
        record(0.7, tile=2, rows=4, bucket=more),
    ]
    choice = choose(TOY, ToyConfig(64), records, CAPS)
    assert choice.schedule.at(1) == ToySchedule(tile=4) and choice.schedule.at(3) == ToySchedule(tile=2)
    assert choice.schedule.at(99) == choice.schedule.at(8) == ToySchedule()  # nothing known: the default
    # where the second bucket does not matter, it is the other way round
    weighted = [replace(r, share=0.001 if r.low == 2 else 0.5) for r in records]
    assert choose(TOY, ToyConfig(64), weighted, CAPS).schedule.at(1) == ToySchedule(layout=1)
    # a layout that some bucket was not measured with does not compete
    assert (
        choose(TOY, ToyConfig(64), [*records[1:3], record(0.1, layout=2, bucket=few)], CAPS)
        .schedule.at(1)
        .layout
        == 0
    )
    # a weight that is packed already
    forced = choose(TOY, ToyConfig(64), records, CAPS, {"layout": 1})
    assert {s.layout for s in forced.schedule.choices} == {1} and len(forced.records) == 2
    assert choose(TOY, ToyConfig(64), [], CAPS, {"layout": 2}).schedule.choices == (ToySchedule(layout=2),)
    assert choose(TOY, ToyConfig(64), [record(1.2, tile=4)], CAPS) is None


def test_a_threshold_is_there_only_where_it_pays():
    more = {"rows": 4, "bucket": (2, 4)}
    # in the second bucket the first one's schedule is 1 % slower than the best: it serves both
    same = [record(0.8, tile=4), record(0.7, tile=2, **more), record(0.707, tile=4, **more)]
    choice = choose(TOY, ToyConfig(64), same, CAPS)
    assert choice.schedule.at(1) == choice.schedule.at(4) == ToySchedule(tile=4)
    assert choice.schedule.limits == (4,) and [r.ratio for r in choice.records] == [0.8, 0.707]
    # 10 % slower: a threshold
    apart = [*same[:2], record(0.77, tile=4, **more)]
    assert choose(TOY, ToyConfig(64), apart, CAPS).schedule.limits == (1, 4)
    # what gains 1 % on the default is not worth the code
    assert choose(TOY, ToyConfig(64), [record(0.99, tile=4)], CAPS) is None


def test_configs_are_scheduled_by_records_of_this_machine():
    config = ToyConfig(64)

    def tile(*sources, device="here", **known):
        tuned = Tuned(sources, CAPS, "1", device, [TOY])
        return tuned.apply(replace(config, **known)).schedule.at(1).tile, len(tuned.used)

    assert tile([record(tile=4)]) == (4, 1)
    assert tile([record(tile=4)], n=65) == (8, 0)
    assert tile([record(tile=4, tvm="2")]) == (8, 0)
    assert tile([record(tile=4, preset="toy/two")]) == (8, 0)
    assert tile([replace(record(tile=4), version=2)]) == (8, 0)
    assert tile([replace(record(tile=4), status=Status.WRONG)]) == (8, 0)
    # a later file wins; in a file, this device; without it, another one
    assert tile([record(tile=4)], [record(0.9, tile=2)]) == (2, 1)
    assert tile([record(tile=4), record(0.1, tile=2, device="there")]) == (4, 1)
    assert tile([record(tile=2, device="there")]) == (2, 1)
    assert Tuned([[record(tile=4)]], CAPS, "1", "here", []).apply(config) is config


def test_a_compile_refuses_records_that_it_cannot_use(tmp_path):
    backend, caps = get("cpu/x86-64-v3")
    path = tmp_path / "r.jsonl"

    def refused():
        with pytest.raises(LlmcError) as error:
            records_for_compile(path, backend, caps)
        return error.value

    assert refused().ref == "records-missing"
    RecordFile(path).append([record()])
    assert refused().ref == "records-other-machine" and "toy/one" in refused().message
    tunable = next(t for t in backend.tunables() if t.name == "linear")
    task = tunable.to_values(tunable.task(LinearConfig(64, 64, "float32", "float32", "float32")))
    schedule = vars(LinearSchedule(prefetch=512))
    linear = replace(record(), rule="linear", preset="cpu/x86-64-v3", task=task, schedule=schedule)
    RecordFile(path).append([linear])
    assert refused().ref == "records-other-version" and "TVM 1" in refused().message
    assert "measured" not in soft_mismatches([], backend, caps)
    assert "1 of TVM 1" in soft_mismatches(read_records(path), backend, caps)
    # of this TVM, but of another template
    other = replace(linear, tvm=tvm_version(), device=backend.device(), code="0123456789abcdef")
    RecordFile(path).append([other])
    assert refused().ref == "records-other-version" and "linear 1.0123456789abcdef" in refused().message
    assert "1 of another version of linear" in soft_mismatches([other], backend, caps)
    current = replace(other, code=code_of(tunable, caps))
    usable = [current, replace(current, schedule=vars(LinearSchedule(prefetch=0)))]
    outside = replace(current, schedule=vars(LinearSchedule(prefetch=777)))
    RecordFile(path).append([*usable, outside])
    assert records_for_compile(path, backend, caps) == usable
    tuned = Tuned([read_records(path)], caps, tvm_version(), "", backend.tunables())
    assert tuned.dropped == {"linear": 2} and "2 of linear" in dropped_note(tuned)
    assert dropped_note(Tuned()) == ""


def test_code_of_a_kernel_class(monkeypatch):
    """Equal for any number of threads and in any process; other for another template or another default."""
    tunable, caps = TunableExperts(), get("cpu/x86-64-v3")[1]
    code = code_of(tunable, caps)
    assert len(code) == 16 and code_of(TunableExperts(), replace(caps, threads=64)) == code
    assert code_of(tunable, get("cpu/aarch64")[1]) != code
    assert code_of(TOY, CAPS) == ""

    class Changed(TunableExperts):
        def scheduled(self, config, schedule):
            return super().scheduled(replace(config, has_bias=True), schedule)

    assert code_of(Changed(), caps) != code


def test_shipped_records_are_of_the_kernels_as_they_are():
    """Records of kernels that have changed since are dropped by every compile: tools/ship_tuning.py makes new ones."""
    backend = get("cpu")[0]
    kernels = {t.name: t for t in backend.tunables()}
    for shipped in shipped_records():
        assert shipped.rule in kernels and shipped.status is Status.OK and not shipped.note
        assert is_current(shipped, kernels[shipped.rule], get(shipped.preset)[1]), shipped.rule


def test_lines_are_json(tmp_path: Path):
    assert json.loads(record_line(record()))["schedule"] == {"layout": 0, "tile": 8, "unroll": 1, "ahead": 0}
    assert CAPS.preset == record().preset
