"""The flags that commands share, their aliases, --version, and errors of one line."""
import subprocess
import sys
import tomllib

import pytest
import torch
from conftest import ROOT

import infer
import models
from facesets import consensus, mtcnn_crop_align
from models.running import cli

REQUIRED = {infer: ["--output_dir", "o"], consensus: ["--output_dir", "o"],
            mtcnn_crop_align: ["--in_dir", "i", "--out_dir", "o"]}


def test_shared_flags_have_the_same_default_in_every_command():
    shared = {"min_face_size": 20, "max_side": 3000, "overwrite": False, "resume": False}
    for command, argv in REQUIRED.items():
        args = vars(command.build_parser().parse_args([*argv, "--device", "cpu"]))
        assert {name: args[name] for name in shared} == shared and args["device"] == torch.device(
            "cpu"
        )
    for command in (infer, consensus):
        args = command.build_parser().parse_args(REQUIRED[command])
        assert (args.align, args.batch_size, args.num_workers) == ("auto", None, None)
    assert (
        mtcnn_crop_align.build_parser()
        .parse_args([*REQUIRED[mtcnn_crop_align], "--n_threads", "3"])
        .num_workers
        == 3
    )


@pytest.mark.parametrize("command", REQUIRED)
def test_overwrite_and_resume_exclude_each_other(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.build_parser().parse_args([*REQUIRED[command], "--overwrite", "--resume"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--resume: not allowed with argument --overwrite" in error
    assert error.count("\n") == 1


def test_a_flag_of_the_group_excludes_the_others():
    parser = cli.Parser("")
    cli.add_rerun_flags(parser).add_argument("--check_exists", action="store_true")
    assert parser.parse_args(["--check_exists"]).check_exists
    with pytest.raises(SystemExit):
        parser.parse_args(["--check_exists", "--overwrite"])


def test_the_old_spellings_of_a_flag_are_aliases():
    parser = cli.Parser("")
    cli.add_input_dir(parser, "photographs")
    cli.add_output_dir(parser)
    cli.add_num_workers(parser)
    expected = {"input_dir": "in", "output_dir": "out", "num_workers": 3}
    for flags in (("--input_dir", "--output_dir", "--num_workers"),
                  ("--in_dir", "--out_dir", "--n_threads"), ("--src", "--dst", "--workers")):
        argv = [text for pair in zip(flags, ("in", "out", "3"), strict=True) for text in pair]
        assert vars(parser.parse_args(argv)) == expected


def test_version_is_that_of_pyproject(capsys):
    with pytest.raises(SystemExit) as stop:
        infer.build_parser().parse_args(["--version"])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert stop.value.code == 0 and capsys.readouterr().out.split()[-1] == version
    assert models.__version__ == version


def test_models_exports_lazily():
    """`import models` alone must not import PyTorch."""
    code = ("import sys, models; assert 'torch' not in sys.modules; "
            "models.load_checkpoint; models.label_photos")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = models.unknown
