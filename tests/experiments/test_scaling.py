import pytest

from experiments import scaling

PROGRAM = """
ENTRY %main {
  %a = f32[8,2]{1,0:T(8,128)} all-reduce(%x), channel_id=1, to_apply=%add
  %b = (f32[3]{0}, bf16[4]{0}, /*index=2*/s32[]) all-reduce-start(%x, %y, %z), metadata={op_name="all-gather(x)"}
  %c = (f32[3]{0}, bf16[4]{0}, s32[]) all-reduce-done(%b)
  ROOT %d = pred[2,5]{1,0} all-gather(%p), dimensions={0}
}
"""


def test_collectives_of_a_program_are_counted():
    assert scaling.count_collectives(PROGRAM) == [("all-reduce", 2, 64 + 12 + 8 + 4), ("all-gather", 1, 10)]


def test_the_time_of_an_all_reduce():
    assert scaling.all_reduce(1000, 1) == (0, 0)
    assert scaling.all_reduce(1000, 4) == (1500, pytest.approx(1500 / 100e9))
    assert scaling.all_reduce(256, 256) == (510, pytest.approx(510 / 200e9))
    # Between two pods, each chip exchanges its byte of the 256.
    assert scaling.all_reduce(256, 512) == (511, pytest.approx(510 / 200e9 + 1 / 3.125e9))
    assert [scaling.hops(chips) for chips in (1, 4, 16, 256, 4096)] == [0, 4, 12, 32, 32]


def test_the_table_of_a_net(capsys):
    assert scaling.main(["--net", "lecture", "--chips", "1", "4", "512", "--latency", "0", "--batch-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("lecture: 62,346 parameters, 7,535,104 operations per image")
    assert lines[1] == "1 all-reduces per step, 249,384 bytes; 0 batch norms over all chips"
    assert [line.split()[:3] for line in lines[4:]] == [
        ["1", "2", "0.00"],
        ["4", "8", "0.37"],
        ["512", "1,024", "0.50"],
    ]
    assert lines[4].endswith("100.0%")


@pytest.mark.slow("traces a ResNet-50")
@pytest.mark.parametrize(
    ("options", "count", "size"), [([], 107, 102_440_608), (["--local-statistics"], 1, 102_228_128)]
)
def test_resnet50_has_the_parameters_of_the_paper(options, count, size, capsys):
    assert scaling.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("resnet50: 25,557,032 parameters, 8,228,544,512 operations")
    assert lines[1].startswith(f"{count} all-reduces per step, {size:,} bytes")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--net", "vgg"], "--net: must be one of lecture, resnet50, got 'vgg'; did you mean "),
        (["--chips", "300"], "--chips: must be from 1 to 256, or multiples of 256, got 300"),
        (["--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["--utilization", "2"], "--utilization: must be above 0 and at most 1, got 2.0"),
    ],
)
def test_wrong_options_are_one_line(argv, line, capsys):
    assert scaling.main(argv) == 2
    assert capsys.readouterr().err.startswith(f"python -m experiments.scaling: {line.split('; did')[0]}")


@pytest.mark.skipif(scaling.importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_compiling_needs_libtpu(capsys):
    assert scaling.main(["--compile", "2x2"]) == 2
    assert "--compile: must be omitted unless libtpu is installed" in capsys.readouterr().err
