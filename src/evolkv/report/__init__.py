"""Report: what people look at after a run: pictures and result files."""
