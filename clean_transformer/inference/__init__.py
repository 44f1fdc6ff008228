"""`optimize`: makes the modules of a model faster for inference."""

from clean_transformer.inference.fast_modules import NotOptimized as NotOptimized
from clean_transformer.inference.optimized import Optimized as Optimized
from clean_transformer.inference.optimized import SlowDtype as SlowDtype
from clean_transformer.inference.optimized import optimize as optimize
