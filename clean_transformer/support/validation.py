"""Checks settings and arguments, so that the errors about them have the same form."""


def require(settings: object, field: str, holds: bool, wanted: str) -> None:
    """Raise `ValueError` for the field of `settings` called `field`, unless `holds` is True.

    `wanted` says which values are valid, for example "a positive integer". An example of the
    message: "Config.n_layers is 0; it must be a positive integer".
    """
    if not holds:
        given = f"{type(settings).__name__}.{field} is {getattr(settings, field)!r}"
        raise ValueError(f"{given}; it must be {wanted}")


def refuse_other(setting: str, given: object, *valid: object) -> None:
    """Raise `ValueError` if the value `given` of `setting` is none of the `valid` values."""
    if given not in valid:
        raise ValueError(f"{setting} is {given!r}; it must be {' or '.join(map(repr, valid))}")
