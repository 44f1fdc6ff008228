"""Replaces modules of a GPT-2, ours or another library's, and measures what changes."""

from clean_transformer.swapping.effect_report import Effect as Effect
from clean_transformer.swapping.effect_report import print_effect as print_effect
from clean_transformer.swapping.effect_report import write_html as write_html
from clean_transformer.swapping.effect_report import write_json as write_json
from clean_transformer.swapping.effects import effect as effect
from clean_transformer.swapping.loading import LayoutUnknown as LayoutUnknown
from clean_transformer.swapping.loading import WeightsNotCopied as WeightsNotCopied
from clean_transformer.swapping.swaps import HookPointsLost as HookPointsLost
from clean_transformer.swapping.swaps import LooksAhead as LooksAhead
from clean_transformer.swapping.swaps import Swap as Swap
from clean_transformer.swapping.swaps import swap as swap
from clean_transformer.swapping.swaps import transplant as transplant
from clean_transformer.swapping.trial import SwapError as SwapError
