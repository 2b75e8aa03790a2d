"""The prefill/decode proxy.

``policy`` (what is asked) and ``pool`` (whose turn it is) are pure; ``legs`` talks to engines
over the connections of ``session``, ``app`` to clients; ``life`` remembers what became of each
request; ``ui`` shows it to people; ``config`` is what an operator may set.
"""
