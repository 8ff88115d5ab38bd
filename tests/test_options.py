"""The command line: what it accepts, what it refuses, how runs are named."""

import json
import os
import re
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spiking_kernels
from c10.c10 import EXPERIMENT as C10
from mnist.mnist import EXPERIMENT as MNIST
from mnist.mnist import main
from training.command_line import command, nearest
from training.errors import DivergedError, Refusal
from training.experiment import Pace
from training.naming import format_number
from training.options import arguments, parse, read

SPELLINGS = [
    spelling for option, both in read(MNIST, []).spellings.items() if option != "help" for spelling in both.split("/")
]


@pytest.fixture
def run_options(tmp_path):
    return lambda *argv, recipe=MNIST: parse(recipe, ["--dump-dir", str(tmp_path), *argv])


def test_defaults(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.options.REPOSITORY", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    common = dict(mode="no_prune", sparsity=None, penalty=None, soft=False, temperature=None, learning_rate=1e-4)
    common |= dict(plain_gradient=False, recipe="paper", connectivity=None)
    common |= dict(T=8, seed=2020, gpu=None, test=False, interval_train=1024)
    common |= dict(precision=None, precision_used="fp32", deterministic=False, checkpoint_minutes=10.0)
    common |= dict(compile=spiking_kernels.unavailable() is None)
    common |= dict(dataset_dir=tmp_path / "data", device=torch.device("cpu"), ranks=1)
    for recipe, own in (
        (
            MNIST,
            dict(
                batch_size=128,
                epoch=512,
                interval_test=32,
                width=800,
                dataset="mnist",
                name="lr-1e-4-b-128-T-8-no_prune",
            ),
        ),
        (
            C10,
            dict(
                batch_size=16,
                epoch=2048,
                interval_test=128,
                width=256,
                dataset="cifar10",
                name="lr-1e-4-b-16-T-8-no_prune",
            ),
        ),
    ):
        options = vars(parse(recipe, []))
        del options["defaults"], options["spellings"]
        assert options == {
            **common,
            **own,
            "experiment": recipe.name,
            "dump_dir": tmp_path / "runs" / recipe.name,
        }
        assert capsys.readouterr().out.startswith("No GPU found: running on the CPU.\n")


@pytest.mark.parametrize("recipe", [MNIST, C10])
def test_the_fast_recipe_has_defaults_of_its_own(run_options, recipe):
    def paces(*argv):
        options = run_options(*argv, recipe=recipe)
        return Pace(options.batch_size, options.learning_rate, options.epoch)

    assert paces() == recipe.paper
    assert paces("--recipe", "fast") == recipe.fast
    assert paces("--recipe", "fast", "-b", "3", "-lr", "0.5", "-N", "7") == Pace(3, 0.5, 7)
    assert recipe.fast.batch_size > recipe.paper.batch_size
    assert recipe.fast.epochs < recipe.paper.epochs


@pytest.mark.parametrize(
    ("connectivity", "sparsity"),
    [("0.05", 0.95), ("0.32", 0.68), ("0.45", 0.55), ("0.5", 0.55), ("0.8", 0.55), ("1", 0.55), ("1e-9", 0.9999)],
)
def test_the_target_sparsity_is_that_of_the_wanted_connectivity(run_options, connectivity, sparsity):
    options = run_options("-m", "grad", "--recipe", "fast", "--connectivity", connectivity)
    assert (options.sparsity, options.penalty) == (sparsity, None)


def test_both_spellings(run_options):
    short = "-b 3 -lr 2e-3 -s 0.7 -N 4 -m deep -i1 5 -i2 6 -penalty 7e-4 -soft -temperature 3e-3 -test"
    long = "--batch-size 3 --learning-rate 2e-3 --sparsity 0.7 --epoch 4 --mode deep --interval-test 5"
    long += " --interval-train 6 --penalty 7e-4 --soft --temperature 3e-3 --test"
    assert run_options(*short.split()) == run_options(*long.split())
    options = run_options(*short.split())
    assert (options.batch_size, options.learning_rate, options.sparsity, options.epoch) == (3, 2e-3, 0.7, 4)
    assert (options.interval_test, options.interval_train, options.penalty, options.mode) == (5, 6, 7e-4, "deep")
    assert (options.temperature, options.soft, options.test) == (3e-3, True, True)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ("", "lr-1e-4-b-128-T-8-no_prune"),
        ("-m grad -s 0.95", "lr-1e-4-b-128-T-8-penalty-1e-3-s-0.95-grad"),
        ("-m grad -s 0.95 -penalty 0.001 -lr 0.0001", "lr-1e-4-b-128-T-8-penalty-1e-3-s-0.95-grad"),
        ("-m deep -s 1 -penalty 5e-4 -b 7 -T 2", "lr-1e-4-b-7-T-2-penalty-5e-4-s-1.0-deep"),
        ("-m deep -soft -s 0.5 -lr 5e-4", "soft-lr-5e-4-b-128-T-8-penalty-1e-3-s-0.5-deep"),
        ("-m deep -s 0.9 -temperature 1e-3", "lr-1e-4-b-128-T-8-penalty-1e-3-s-0.9-deep-temperature-1e-3"),
        ("-m deep -s 0.9 -temperature 0", "lr-1e-4-b-128-T-8-penalty-1e-3-s-0.9-deep"),
        ("-m grad -s 0.9 --plain-gradient", "lr-1e-4-b-128-T-8-penalty-1e-3-s-0.9-grad-plain-gradient"),
        ("--precision bf16 --seed 3", "lr-1e-4-b-128-T-8-no_prune-seed-3-bf16"),
        ("--precision fp32", "lr-1e-4-b-128-T-8-no_prune"),
        ("--recipe paper -N 9", "lr-1e-4-b-128-T-8-no_prune"),
        ("--recipe fast -N 9", "lr-5e-3-b-512-T-8-no_prune-fast-N-9"),
        ("--recipe fast -m grad -s 0.9", "lr-5e-3-b-512-T-8-penalty-1e-3-s-0.9-grad-fast-N-20"),
        (
            "--recipe fast -m grad --connectivity 0.05 -b 9 --seed 3",
            "lr-5e-3-b-9-T-8-connectivity-5e-2-s-0.95-grad-fast-N-20-seed-3",
        ),
        (
            "--recipe fast -m grad --connectivity 0.05 -s 0.8 -lr 1e-3",
            "lr-1e-3-b-512-T-8-connectivity-5e-2-s-0.8-grad-fast-N-20",
        ),
        ("--width 64", "lr-1e-4-b-128-T-8-no_prune-width-64"),
        ("--width 800", "lr-1e-4-b-128-T-8-no_prune"),
        ("--dataset digits --width 64", "lr-1e-4-b-128-T-8-no_prune-digits-width-64"),
        (
            "-m deep -s 0.9 -temperature 1e-3 --seed 3 --precision bf16",
            "lr-1e-4-b-128-T-8-penalty-1e-3-s-0.9-deep-seed-3-temperature-1e-3-bf16",
        ),
        (
            "-m grad -s 0.9 --plain-gradient --seed 3",
            "lr-1e-4-b-128-T-8-penalty-1e-3-s-0.9-grad-plain-gradient-seed-3",
        ),
        ("--seed 7 --dataset digits", "lr-1e-4-b-128-T-8-no_prune-seed-7-digits"),
        ("--seed 2020 --dataset mnist -N 3 -i1 4 -i2 5", "lr-1e-4-b-128-T-8-no_prune"),
    ],
)
def test_names(run_options, argv, name):
    assert run_options(*argv.split()).name == name


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-3, "1e-3"), (5e-4, "5e-4"), (0.00025, "2.5e-4"), (0.1, "1e-1"), (1.0, "1e0"), (20.0, "2e1"), (0.0, "0")],
)
def test_numbers_in_names(value, text):
    assert format_number(value) == text
    assert float(text) == value


def test_no_two_numbers_share_a_name():
    values = [0.1 + 0.2, 0.3, 1e-8, 1.0000000000000002e-8, 123456.789]
    assert len({format_number(v) for v in values}) == len(values)


BAD = [
    ("-m dense", "-m/--mode", "deep"),
    ("-m", "-m/--mode", "needs a value"),
    ("-s 0.9", "-s/--sparsity", "-m grad or -m deep"),
    ("-penalty 1e-3", "-penalty", "-m grad or -m deep"),
    ("-m grad", "-s/--sparsity", r"a number in \[0.5, 1\)"),
    ("-m deep", "-s/--sparsity", r"a number in \[0, 1\]"),
    ("-m grad -s 0.49", "-s/--sparsity", r"\[0.5, 1\)"),
    ("-m grad -s 1", "-s/--sparsity", r"\[0.5, 1\)"),
    ("-m deep -s 1.01", "-s/--sparsity", "from 0 to 1"),
    ("-m deep -s -0.01", "-s/--sparsity", "from 0 to 1"),
    ("-m grad -s nan", "-s/--sparsity", "from 0 to 1"),
    ("-m grad -s 0.9 -penalty -1", "-penalty", ">= 0"),
    ("-m grad -s 0.9 -penalty inf", "-penalty", "finite"),
    ("-m grad -s 0.9 -penalty x", "-penalty", ">= 0"),
    ("-soft", "-soft", "-m deep"),
    ("-m grad -s 0.9 -soft", "-soft", "-m deep"),
    ("-temperature 1e-3", "-temperature", "-m deep"),
    ("--plain-gradient", "--plain-gradient", "-m grad"),
    ("-m deep -s 0.9 --plain-gradient", "--plain-gradient", "-m grad"),
    ("-m grad -s 0.9 -temperature 0", "-temperature", "-m deep"),
    ("-m deep -s 0.9 -temperature -1e-3", "-temperature", ">= 0"),
    ("--recipe quick", "--recipe", "fast"),
    ("--connectivity 0.1", "--connectivity", "-m grad and --recipe fast"),
    ("-m grad -s 0.9 --connectivity 0.1", "--connectivity", "-m grad and --recipe fast"),
    ("-m deep -s 0.9 --recipe fast --connectivity 0.1", "--connectivity", "-m grad and --recipe fast"),
    ("-m grad --recipe fast --connectivity 0.1 -penalty 1e-3", "-penalty", "not allowed with --connectivity"),
    ("-m grad --recipe fast --connectivity 0", "--connectivity", "above 0, at most 1"),
    ("-m grad --recipe fast --connectivity 1.1", "--connectivity", "above 0, at most 1"),
    ("-m grad --recipe fast --connectivity 0.1 -s 0.4", "-s/--sparsity", r"\[0.5, 1\)"),
    ("-m grad --recipe fast --connectivity 0.1 -s 0.5", "-s/--sparsity", "above 0.5 with --connectivity"),
    ("-m grad --recipe fast", "-s/--sparsity", "required with -m grad"),
    ("-b 0", "-b/--batch-size", ">= 1"),
    ("-b 1.5", "-b/--batch-size", "whole number"),
    ("-m grad -s 0.9 -penalty -inf", "-penalty", ">= 0"),
    ("-N 0", "-N/--epoch", ">= 1"),
    ("-N -3", "-N/--epoch", ">= 1"),
    ("-T 0", "-T", "from 1 to 4096"),
    ("-T 4097", "-T", "from 1 to 4096"),
    ("-T two", "-T", "whole number"),
    ("-N 9223372036854775808", "-N/--epoch", r"below 2\^63"),
    ("-N 1e3", "-N/--epoch", "whole number"),
    ("--checkpoint-minutes 0", "--checkpoint-minutes", "> 0"),
    ("--checkpoint-minutes nan", "--checkpoint-minutes", "finite"),
    ("--checkpoint-minutes 1e400", "--checkpoint-minutes", "finite"),
    ("--deterministic yes", "unrecognized arguments", "yes"),
    ("-lr 0", "-lr/--learning-rate", "> 0"),
    ("-lr nan", "-lr/--learning-rate", "finite"),
    ("-i1 0", "-i1/--interval-test", ">= 1"),
    ("-i2 0", "-i2/--interval-train", ">= 1"),
    ("--seed -1", "--seed", ">= 0"),
    ("--seed 9223372036854775808", "--seed", r"below 2\^63"),
    ("-b 1" + "0" * 5000, "-b/--batch-size", "whole number"),
    ("-gpu -1", "-gpu", ">= 0"),
    ("-gpu 99", "-gpu", "no GPU 99"),
    ("--precision fp16", "--precision", "bf16"),
    ("--precision tf32", "--precision", "needs a GPU"),
    ("--dataset cifar", "--dataset", "digits"),
    ("surplus", "unrecognized arguments", "surplus"),
    ("-s 95", "-s/--sparsity", "from 0 to 1, not '95'; 95 % is 0.95"),
    ("-s 0.95%", "-s/--sparsity", "not '0.95%'; 0.95 % is 0.0095"),
    ("--recipe fast -m grad --connectivity 5", "--connectivity", "5 % is 0.05"),
    ("-s 0,95", "-s/--sparsity", r"did you mean 0\.95\?"),
    ("-lr 1,5", "-lr/--learning-rate", r"not '1,5'; did you mean 1\.5\?"),
    ("-gpu cpu", "-gpu/--gpu", "CUDA_VISIBLE_DEVICES="),
    ("-m grad -s 0.9 -penalty", "-penalty/--penalty", "needs a value"),
    ("-m grad -s 0.9 --sparsity 0.95", "-s/--sparsity", "given twice, as 0.9 and as 0.95"),
    ("-m grad -s 0.9 -m deep", "-m/--mode", "given twice, as grad and as deep"),
    ("--compile --no-compile", "--compile", "given twice, as --compile and as --no-compile"),
    ("-test", "-test", "no saved model"),
]


@pytest.mark.parametrize(("argv", "option", "accepted"), BAD, ids=[argv[:40] or "none" for argv, _, _ in BAD])
def test_bad_options_give_one_line_and_status_2(argv, option, accepted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnist.py"])
    status = main(["--dump-dir", str(tmp_path), "--dataset-dir", str(tmp_path), *argv.split()])
    err = capsys.readouterr().err
    assert status == 2
    assert re.fullmatch(r"mnist\.py: error: [^\n]+\n", err)
    assert option in err
    assert re.search(accepted, err)
    assert list(tmp_path.iterdir()) == []


# what is typed, and the spellings of the options that it may have meant; no abbreviation is taken
MISTYPED = [
    ("--lr 1e-3", "-lr/--learning-rate"),
    ("-n 5", "-N/--epoch"),
    ("-t 4", "-T"),
    ("-sparsity 0.9", "-s/--sparsity"),
    ("-seed 3", "--seed"),  # not -s with the value eed
    ("-mode grad", "-m/--mode"),
    ("-batch-size 3", "-b/--batch-size"),
    ("--batch_size=3", "-b/--batch-size"),
    ("-so", "-soft/--soft"),
    ("-pen 3", "-penalty/--penalty"),
    ("-tes", "-test/--test"),
    ("-mgard", ""),
    ("--sparse 0.9", "-s/--sparsity"),
    ("--epochs 3", "-N/--epoch"),
    ("-penality 1e-3", "-penalty/--penalty"),
    ("--temperatur 1e-3", "-temperature/--temperature"),
    ("-gpus 0", "-gpu/--gpu"),
    ("--data-dir x", "--dataset-dir"),
    ("--interval 3", "-i1/--interval-test or -i2/--interval-train"),
    ("—sparsity 0.9", "-s/--sparsity"),  # as word processors have it
    ("–s 0.9", "-s/--sparsity"),
    ("--no-compil", "--compile/--no-compile"),
    ("--nothing-like-it", ""),
]


@pytest.mark.parametrize(("argv", "meant"), MISTYPED, ids=[argv for argv, _ in MISTYPED])
@pytest.mark.parametrize("recipe", [MNIST, C10])
def test_a_mistyped_option_names_the_nearest_right_one(run_options, recipe, argv, meant):
    typed = re.split("[ =]", argv)[0]
    hint = f"; did you mean {meant}?" if meant else ""
    with pytest.raises(Refusal) as refusal:
        run_options(*argv.split(), recipe=recipe)
    assert str(refusal.value) == f"unrecognized option {typed}{hint} (see --help)"


@pytest.mark.parametrize("option", [option for option in SPELLINGS if len(option) > 6])
def test_any_option_with_one_slip_is_recognized(option):
    places = range(2, len(option))
    slips = {option[:i] + option[i + 1 :] for i in places}  # left out
    slips |= {option[:i] + option[i] + option[i:] for i in places}  # twice
    slips |= {option[:i] + option[i : i + 2][::-1] + option[i + 2 :] for i in places}  # turned round
    slips |= {option[:i] + "x" + option[i + 1 :] for i in places}  # beside the key
    assert [slip for slip in slips if option not in nearest(slip, SPELLINGS)] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("-m gradr", "argument -m/--mode: must be deep, grad or no_prune, not 'gradr'; did you mean grad?"),
        ("-m Grad", "argument -m/--mode: must be deep, grad or no_prune, not 'Grad'; did you mean grad?"),
        ("-m no-prune", "argument -m/--mode: must be deep, grad or no_prune, not 'no-prune'; did you mean no_prune?"),
        ("-m dense", "argument -m/--mode: must be deep, grad or no_prune, not 'dense'"),
        ("--precision f32", "argument --precision: must be fp32, tf32 or bf16, not 'f32'; did you mean fp32 or tf32?"),
        ("--dataset digit", "argument --dataset: must be mnist or digits, not 'digit'; did you mean digits?"),
        ("grad -s 0.9", "unrecognized arguments: grad; did you mean -m grad?"),
    ],
)
def test_a_mistyped_choice_names_the_nearest_right_one(run_options, argv, message):
    with pytest.raises(Refusal) as refusal:
        run_options(*argv.split())
    assert str(refusal.value) == f"{message} (see --help)"


def test_values_may_be_attached_and_an_option_repeated(run_options):
    """As argparse takes them, and as a command that is put together from parts has them."""
    parts = "-m grad -mgrad -s.9 -s 0.9 -lr=1e-3 -N5 -T4 -b=7 --compile --compile -penalty 1e-3 --penalty 0.001"
    options = run_options(*parts.split())
    assert (options.mode, options.sparsity, options.learning_rate, options.penalty) == ("grad", 0.9, 1e-3, 1e-3)
    assert (options.epoch, options.T, options.batch_size) == (5, 4, 7)


@pytest.mark.parametrize("folder", ["", "file/below", "file"])
def test_a_dump_dir_that_cannot_be_written_is_refused(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    path = "" if folder == "" else str(tmp_path / folder)
    assert main(["--dump-dir", path]) == 2
    assert "--dump-dir" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_run_begun_in_the_former_default_folder_goes_on_there(run, mnist_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.options.REPOSITORY", tmp_path)
    argv = ["-m", "grad", "-s", "0.9", "-b", "20", "--dataset-dir", str(mnist_folder)]
    run(*argv[:-2], "-N", "1", dump=tmp_path / "runs")
    assert main([*argv, "-N", "2"]) == 0
    out = capsys.readouterr().out
    assert f"This run is in {tmp_path / 'runs'}, the old default of --dump-dir, and stays there." in out
    assert "Resuming after epoch 1; 2 epochs in all." in out
    assert main([*argv, "-test"]) == 0
    assert "after 2 epochs" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "mnist").exists()
    # as the line says, it can be moved
    (tmp_path / "runs" / "mnist").mkdir()
    for part in ("logs", "models"):
        (tmp_path / "runs" / part).rename(tmp_path / "runs" / "mnist" / part)
    assert main([*argv, "-N", "3"]) == 0
    out = capsys.readouterr().out
    assert "This run is in" not in out
    assert "Resuming after epoch 2; 3 epochs in all." in out
    # and a run with other options is a new one
    assert main([*argv, "-N", "1", "--seed", "1"]) == 0
    assert "This run is in" not in capsys.readouterr().out
    assert len(list((tmp_path / "runs" / "mnist" / "models").iterdir())) == 2


@pytest.mark.parametrize(
    "argv",
    [
        "-lr 1e30",
        "-lr 1e-320",
        "-m grad -s 0.9999999999999999 -penalty 1e30",
        "-m deep -s 0.9 -temperature 1e30 -penalty 1e-300",
        "-m deep -soft -s 0 -temperature 1e30",
        "-m grad --recipe fast --connectivity 1e-300 -lr 1e30",
        f"-i1 {2**63 - 1} -i2 {2**63 - 1} --seed {2**63 - 1} --checkpoint-minutes 1e300",
    ],
)
def test_extreme_values_that_are_accepted_are_trained_tested_and_gone_on_with(run, argv):
    argv = [*argv.split(), "-b", "20"]
    for more in (["-N", "2"], ["-test"], ["-N", "2"]):
        more += ["-N", "2"] if "fast" in argv and "-N" not in more else []
        result = run(*argv, *more)
        assert (result.status, result.err) == (0, "")
    assert "has finished its 2 epochs" in result.out


def test_two_experiments_with_the_same_options_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("training.options.REPOSITORY", tmp_path)
    former, argv = tmp_path / "runs", ["-b", "16"]
    logs = former / "logs" / parse(MNIST, argv).name
    logs.mkdir(parents=True)
    (logs / "run.json").write_text('{"experiment": "mnist"}')
    options = [parse(recipe, argv) for recipe in (MNIST, C10)]
    assert options[0].name == options[1].name
    assert [o.dump_dir for o in options] == [former, former / "c10"]
    # a run in its own folder comes first
    logs = former / "mnist" / "logs" / logs.name
    logs.mkdir(parents=True)
    (logs / "run.json").write_text('{"experiment": "mnist"}')
    assert parse(MNIST, argv).dump_dir == former / "mnist"
    # whose run it is cannot be told without run.json: the checkpoint says more
    (former / "models" / parse(MNIST, ["--seed", "1"]).name).mkdir(parents=True)
    assert parse(MNIST, ["--seed", "1"]).dump_dir == former / "mnist"
    (former / "models" / parse(MNIST, ["--seed", "1"]).name / "checkpoint-previous.pt").touch()
    assert parse(MNIST, ["--seed", "1"]).dump_dir == former


def test_help_explains_every_option_with_its_default(capsys):
    for recipe in (MNIST, C10):
        with pytest.raises(SystemExit) as stop:
            parse(recipe, ["--help"])
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        entries = re.split(r" (?=-[-a-zA-Z0-9]+ (?:[A-Z{]|[a-z]|, ))", text[text.index("options:") :])
        assert len(entries) >= 16
        for option in [
            "-m",
            "-s",
            "-penalty",
            "-soft",
            "-temperature",
            "--plain-gradient",
            "--recipe",
            "--connectivity",
            "-b",
            "-lr",
            "-T",
            "--width",
            "-N",
            "--seed",
            "-gpu",
            "--dataset-dir",
            "--compile",
            "--precision",
            "--dump-dir",
            "--deterministic",
            "--checkpoint-minutes",
            "-test",
        ]:
            assert f" {option}" in text
        assert text.count("(default: ") == 25
        assert re.search(rf"-N.*{recipe.paper.epochs}; fast: {recipe.fast.epochs}\)", text)


def test_failures_of_the_system_and_interruptions_are_one_line_too(capsys):
    @command
    def full():
        raise OSError(28, "No space left on device")

    @command
    def interrupted():
        raise KeyboardInterrupt

    assert (full(), interrupted()) == (1, 130)
    err = capsys.readouterr().err
    assert err.count("\n") == 2
    assert "No space left on device" in err
    assert err.count("existing files are unchanged") == 2


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RuntimeError("[enforce fail at alloc] can't allocate memory: you tried"), 1, "out of memory .*-b or -T"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "out of memory .*Tried"),
        (
            RuntimeError("upsample_cuda does not have a deterministic implementation, but you set"),
            2,
            "argument --deterministic: upsample_cuda has no",
        ),
        (DivergedError("the loss is not finite"), 1, "the loss is not finite"),
    ],
)
def test_what_can_go_wrong_is_one_line(capsys, error, status, message):
    @command
    def fails():
        raise error

    assert fails() == status
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.count("\n") == 1


def test_a_fault_of_the_program_is_not_hidden():
    @command
    def fails():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        fails()


def test_deterministic_algorithms_are_used_when_asked_for(run_options, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    run_options()
    assert asked == []
    run_options("--deterministic")
    assert asked == [True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.benchmark
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.parametrize("name", ["Grüße 日本 with spaces", "-dash", "a'b\"c", "x" * 200])
def test_unusual_folders(tmp_path, name):
    folder = tmp_path / name
    options = parse(MNIST, [f"--dump-dir={folder}"])
    assert options.dump_dir == folder
    assert folder.is_dir()


PROPERTY = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
VALUES = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(repr),
    st.sampled_from(["", "nan", "-inf", "1e999", "grad", "deep", "0.95", "-1", "0", "bf16", "digits", "--", "-soft"]),
)


@given(
    st.lists(
        st.tuples(st.sampled_from([*SPELLINGS, "--x", "-sparsity"]), VALUES),
        max_size=6,
    )
)
@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_command_line_is_taken_or_refused_in_one_line(tmp_path, capsys, words):
    argv = ["--dump-dir", str(tmp_path), *(word for pair in words for word in pair)]
    refused = None
    try:
        options = parse(MNIST, argv)
    except Refusal as refusal:
        refused = str(refusal)
    if refused is not None:
        assert re.search(r"argument|required|unrecognized", refused)
        return
    # what is taken is in its bounds, has a name that is a folder's, and one that is its own
    assert options.batch_size >= 1
    assert options.epoch >= 1
    assert 1 <= options.T <= 4096
    assert 0 < options.learning_rate < float("inf")
    assert (options.sparsity is None) == (options.mode == "no_prune") == (options.penalty is None)
    assert (options.temperature is None) == (options.mode != "deep")
    assert "/" not in options.name
    assert json.loads(json.dumps(arguments(options))) == arguments(options)
    again = parse(MNIST, argv)
    assert vars(again) == vars(options)


def test_arguments_for_the_checkpoint_leave_out_where_a_run_happens(run_options, tmp_path):
    here = arguments(run_options("-m", "grad", "-s", "0.9"))
    there = arguments(parse(MNIST, ["-m", "grad", "-s", "0.9", "--dump-dir", str(tmp_path / "x"), "-test"]))
    assert here == there
    assert here["sparsity"] == 0.9
    assert {"experiment", "epoch", "seed", "batch_size", "T"} <= here.keys()
    assert all(isinstance(v, (str, int, float, bool, type(None))) for v in here.values())
