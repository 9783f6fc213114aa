"""Decoding: the keys of each row in pieces that are read side by side, and put together by their log-sum-exp.

A CPU and a GPU want other pieces. A thread of a CPU reads many small ones, each whole from its caches, and in the
order of memory. A GPU runs some hundred programs at once and is done when the last one is, so its pieces are as equal
as can be, and as few as keep all programs busy.
"""
