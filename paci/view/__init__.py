"""Pictures of a run: timelines as text, SVG, HTML page and Perfetto trace, reports; no torch.

A timeline is drawn from a ``paci.trace.Trace``, whichever engine produced it. Only
``paci.view.curves`` needs matplotlib, so it is imported by those who ask for a curve and by
nobody else.
"""
