from dataclasses import dataclass

import pytest

from clean_transformer.support.validation import require


@dataclass
class Oven:
    degrees: int


def test_an_error_names_the_class_the_field_the_value_and_what_is_wanted():
    require(Oven(200), "degrees", True, "0 or more")
    with pytest.raises(ValueError, match=r"^Oven\.degrees is -5; it must be 0 or more$"):
        require(Oven(-5), "degrees", False, "0 or more")
