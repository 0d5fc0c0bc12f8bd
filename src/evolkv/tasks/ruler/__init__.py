"""RULER's thirteen tasks (Hsieh et al., arXiv 2404.06654), made offline at any length or read from its files."""

from evolkv.tasks.ruler.task import Ruler

__all__ = ["Ruler"]
