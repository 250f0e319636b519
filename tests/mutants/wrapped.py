"""Tests of the wrapper for transformers, short enough to be run against its seeded bugs."""

from __future__ import annotations

from tests.hf.test_configuration import (
    test_a_config_reads_what_moezoo_saved_and_moezoo_reads_what_it_saves,
)
from tests.hf.test_generation import (
    test_generation_continues_from_a_cache,
    test_steps_with_a_cache_equal_the_whole,
)
from tests.hf.test_loading import saved, test_the_loading_info_tells_what_was_not_there
from tests.hf.test_outputs import (
    test_the_config_asks_as_the_arguments_do_and_an_argument_goes_before_it,
)

__all__ = [
    "saved",
    "test_a_config_reads_what_moezoo_saved_and_moezoo_reads_what_it_saves",
    "test_generation_continues_from_a_cache",
    "test_steps_with_a_cache_equal_the_whole",
    "test_the_config_asks_as_the_arguments_do_and_an_argument_goes_before_it",
    "test_the_loading_info_tells_what_was_not_there",
]
