"""Flags that several commands share, and the one-line errors."""
import pytest
import torch

import infer
from facesets import consensus, mtcnn_crop_align
from models.running import cli

REQUIRED = {infer: ["--output_dir", "o"], consensus: ["--output_dir", "o"],
            mtcnn_crop_align: ["--in_dir", "i", "--out_dir", "o"]}


def test_shared_flags_have_one_default_everywhere():
    shared = {"min_face_size": 20, "max_side": 3000, "overwrite": False, "resume": False}
    for command, argv in REQUIRED.items():
        args = vars(command.build_parser().parse_args([*argv, "--device", "cpu"]))
        assert {name: args[name] for name in shared} == shared and args["device"] == torch.device("cpu")
    for command in (infer, consensus):
        args = command.build_parser().parse_args(REQUIRED[command])
        assert (args.align, args.batch_size, args.num_workers) == ("auto", None, None)
    assert mtcnn_crop_align.build_parser().parse_args([*REQUIRED[mtcnn_crop_align], "--n_threads", "3"]).num_workers == 3


@pytest.mark.parametrize("command", REQUIRED)
def test_an_earlier_run_is_replaced_or_finished_but_not_both(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.build_parser().parse_args([*REQUIRED[command], "--overwrite", "--resume"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--resume: not allowed with argument --overwrite" in error
    assert error.count("\n") == 1


def test_a_flag_that_joins_the_group_excludes_the_others():
    parser = cli.Parser("")
    cli.add_rerun_flags(parser).add_argument("--check_exists", action="store_true")
    assert parser.parse_args(["--check_exists"]).check_exists
    with pytest.raises(SystemExit):
        parser.parse_args(["--check_exists", "--overwrite"])
