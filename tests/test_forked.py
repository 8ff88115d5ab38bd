"""Programs that are started from a process with torch are as those of a new Python."""

import os
import signal
import subprocess
import sys
import time

import forked
import pytest

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each program has a new Python")


def run(*argv, **settings):
    return forked.run(argv, **{"env": ENVIRONMENT, **settings})


@ON_LINUX
def test_torch_is_there_before_a_program_begins():
    code = "import sys; print('torch' in sys.modules)"
    assert run("-c", code).stdout == "True\n"
    assert run("-c", code, env=ENVIRONMENT | {"OMP_NUM_THREADS": "3"}).stdout == "False\n"  # it would not be heard


def test_a_program_has_its_folder_its_environment_and_its_arguments(tmp_path):
    text = "import os, sys\nprint(os.getcwd(), os.environ.get('ASKED_FOR'), sys.argv, __name__, sys.path[0])\n"
    (tmp_path / "program.py").write_text(text)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(text)
    here, inner = str(tmp_path), str(tmp_path / "package" / "__main__.py")
    for argv, shown, first in (
        (["program.py", "a b"], ["program.py", "a b"], here),
        (["-m", "package", "c"], [inner, "c"], here),
        (["-c", text, "d"], ["-c", "d"], ""),
    ):
        for variables in ({}, {"ASKED_FOR": "here"}):
            result = run(*argv, cwd=tmp_path, env=ENVIRONMENT | variables)
            assert (result.returncode, result.stderr) == (0, "")
            assert result.stdout == f"{here} {variables.get('ASKED_FOR')} {shown} __main__ {first}\n"
    assert run("-c", "import beside", env=ENVIRONMENT | {"PYTHONPATH": here}).returncode == 1
    (tmp_path / "beside.py").touch()
    assert run("-c", "import beside", env=ENVIRONMENT | {"PYTHONPATH": here}).returncode == 0


def test_a_program_ends_as_any_other():
    assert run("-c", "import sys; sys.exit(3)").returncode == 3
    assert run("-c", "import sys; print(repr(sys.stdin.read()))").stdout == "''\n"
    result = run("-c", "raise ValueError('all is lost')")
    assert result.returncode == 1
    assert result.stderr.endswith("ValueError: all is lost\n")
    assert run("-c", "import os; os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL
    result = run("-c", "import atexit, torch; atexit.register(print, 'the end'); print(torch.ones(2).sum())")
    assert (result.returncode, result.stdout, result.stderr) == (0, "tensor(2.)\nthe end\n", "")
    with pytest.raises(subprocess.CalledProcessError):
        run("-c", "import sys; sys.exit(3)").check_returncode()
    with pytest.raises(subprocess.TimeoutExpired):
        run("-c", "import time; time.sleep(600)", timeout=0.3)


@ON_LINUX
def test_a_program_does_not_have_what_the_server_has(tmp_path):
    """But for the variables that are kept; what Python tells at its very end is heard."""
    (tmp_path / "beside.py").touch()
    variables = {"PYTHONPATH": str(tmp_path), "MINE": "server", "KEPT": "server"}
    server = forked.ForkServer(tmp_path / "errors", ENVIRONMENT | variables, ("torch", "no.such.module"), kept=["KEPT"])
    code = "import os, weakref\nprint(os.environ.get('MINE'), os.environ['KEPT'])\n"
    code += "class Last:\n    def __del__(self):\n        raise ValueError('at the end')\n"
    code += "last = Last()\nimport beside"
    program = server.start(["-c", code], ENVIRONMENT | {"KEPT": "program"}, forked.REPOSITORY, tmp_path)
    out, err = program.communicate()
    server.close()
    assert out == "None server\n"
    assert "No module named 'beside'" in err
    assert "at the end" in err


@ON_LINUX
def test_a_server_that_ends_says_why(tmp_path):
    server = forked.ForkServer(tmp_path / "errors", ENVIRONMENT, (), [sys.executable, "-c", "raise ValueError('no')"])
    with pytest.raises(RuntimeError, match="ValueError: no"):
        server.start(["-c", ""], ENVIRONMENT, tmp_path, tmp_path)
    server.close()


def test_programs_run_at_once_and_are_signalled_and_heard_before_their_end():
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\nprint(sys.argv[1])\n"
    code += "time.sleep(600)"
    programs = [forked.start(["-c", code, number], env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}) for number in (1, 2)]
    end = time.monotonic() + 60
    while not all(program.out for program in programs):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [program.out for program in programs] == ["1\n", "2\n"]
    assert [program.poll() for program in programs] == [None, None]
    programs[0].send_signal(signal.SIGTERM)
    assert programs[0].communicate(60) == ("1\n", "")
    assert programs[0].returncode == 7
    assert programs[1].poll() is None
    programs[1].kill()
    assert programs[1].wait(60) == -signal.SIGKILL
    programs[1].send_signal(signal.SIGTERM)  # to nobody
