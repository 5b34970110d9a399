"""What leaves a run to be seen: metrics, live page, traces, TensorBoard.

May import: calls, data, files.
"""
