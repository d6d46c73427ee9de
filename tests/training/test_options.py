import pytest
from helpers import assert_one_line

from training.options import Options, add_options, check_args, given_options
from utils import ArgumentParser, CommandError

OTHERS = {"lr": 1e-9, "batch_size": 3, "num_epoch": 2**31 - 1, "save_freq": 1, "patch_size": 9, "seed": 7}
OTHERS |= {"recipe": "assignment", "hold_out": 2, "precision": "bf16", "train_data": "a b", "test_data": "dead-leaves"}


def parser(resume=False):
    result = ArgumentParser(prog="train.py")
    add_options(result, resume)
    return result


def on_the_line(args):
    return [f"--{name.replace('_', '-')}={value}" for name, value in args.items()]


def test_options_as_arguments_and_back():
    assert OTHERS.keys() == Options().to_args().keys()
    assert Options.from_args(OTHERS).to_args() == OTHERS
    assert check_args(OTHERS) == OTHERS
    assert given_options(parser().parse_args(on_the_line(OTHERS))) == OTHERS


def test_what_is_not_given_has_its_default():
    assert given_options(parser().parse_args([])) == {}
    assert Options.from_args({"lr": 0.5}) == Options(learning_rate=0.5)


def test_the_help_tells_the_defaults_except_for_resume_which_has_no_seed():
    text, text_of_resume = (" ".join(parser(resume).format_help().split()) for resume in (False, True))
    assert "peak learning rate of Adam (default: 0.003)" in text
    assert "as the training set (default: 100)" in text
    assert "patches in a batch (default: 32)" in text
    assert "a multiple of 3 (default: 33)" in text
    assert "default" not in text_of_resume
    assert "--seed" not in text_of_resume


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("lr", "0", "must be a positive number"),
        ("lr", "nan", "must be a positive number"),
        ("lr", "inf", "must be a positive number"),
        ("lr", "fast\x1b", r"must be a positive number (below 2^31), not 'fast\x1b'"),
        ("batch_size", "0", "must be a positive integer (below 2^31), not '0'"),
        ("batch_size", "2147483648", "must be a positive integer (below 2^31)"),
        ("num_epoch", "-3", "must be a positive integer"),
        ("save_freq", "1.5", "must be a positive integer"),
        ("patch_size", "0", "must be a positive multiple of 3"),
        ("patch_size", "32", "must be a positive multiple of 3 (below 2^31), not '32'"),
        ("seed", "-1", "must be an integer, 0 or greater (below 2^31), not '-1'"),
        ("hold_out", "-2", "must be an integer, 0 or greater"),
        ("precision", "fp16", ""),
    ],
)
def test_a_bad_value_is_refused_on_the_line_and_in_a_checkpoint(capsys, name, value, problem):
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(on_the_line({name: value}))
    assert_one_line(capsys.readouterr().err, f"--{name.replace('_', '-')}", problem)
    with pytest.raises(CommandError) as refusal:
        check_args({name: value})
    assert str(refusal.value).startswith(f"its {name} {problem or 'is unknown'}")


@pytest.mark.parametrize(("name", "value"), [("batch_size", [8]), ("train_data", "x" * 5000)], ids=["list", "long"])
def test_what_is_no_value_at_all_is_damage(name, value):
    with pytest.raises(CommandError, match=f"its {name} is damaged"):
        check_args({name: value})
