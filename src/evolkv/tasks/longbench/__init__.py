"""LongBench: long documents in English, Chinese and code, and what is asked of them.

Y. Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", arXiv 2308.14508.
"""

from evolkv.tasks.longbench.task import LongBench

__all__ = ["LongBench"]
