"""Running the command line within a test."""

from typer.testing import CliRunner, Result

from clean_transformer.cli import app


def call(*arguments: object, stdin: str | None = None) -> Result:
    """What a command printed and its exit status. An exception that it does not catch is raised."""
    result = CliRunner().invoke(app, [*map(str, arguments)], input=stdin)
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return result


def assert_one_line(result: Result, message: str) -> None:
    """The command ended with status 2 and one line on standard error that has this message."""
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
