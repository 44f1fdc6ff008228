"""Compares the speed of clean_transformer with other libraries and with the machine's top speed."""

from clean_transformer.benchmark.results.comparison import compare as compare
from clean_transformer.benchmark.results.data import Result as Result
from clean_transformer.benchmark.results.data import Results as Results
from clean_transformer.benchmark.results.file import read_results as read_results
from clean_transformer.benchmark.results.file import write_results as write_results
from clean_transformer.benchmark.suite import Benchmark as Benchmark
from clean_transformer.benchmark.suite import Report as Report
